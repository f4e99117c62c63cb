#!/usr/bin/env bash
# One slice of TPU VMs. tpu_vm.sh [--dry-run] create|state|wait|setup|run|resume|logs|stop|delete [vlmprune's arguments]
# Needs PROJECT, ZONE, TPU_NAME; create: ACCELERATOR, RUNTIME, perhaps SPOT=1; setup: BUCKET, mounted at /mnt/BUCKET.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/lib.sh"
if [[ "${1:-}" == --dry-run ]]; then export DRY_RUN=1; shift; fi
action="${1:-}"
need PROJECT ZONE TPU_NAME
at=("--project=$PROJECT" "--zone=$ZONE")

on_workers() { # on_workers all|NUMBER COMMAND: all workers of the slice at once, or one
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${at[@]}" "--worker=$1" "--command=$2"
}

case "$action" in
  create) # a queued resource: it waits for capacity
    need ACCELERATOR RUNTIME
    run gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${at[@]}" \
      "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" ${SPOT:+--spot} ;;
  state) run gcloud compute tpus queued-resources describe "$TPU_NAME" "${at[@]}" "--format=value(state.state)" ;;
  wait) # until the slice is there; exit code 1 if it never will be
    if [[ -n "${DRY_RUN:-}" ]]; then exec "$0" state; fi
    while state="$("$0" state)" && [[ "$state" != ACTIVE ]]; do
      if [[ "$state" == @(FAILED|SUSPEND*) ]]; then echo "$TPU_NAME is $state: delete, then create" >&2; exit 1; fi
      sleep "${POLL_SECONDS:-30}"
    done
    [[ "$state" == ACTIVE ]] ;;
  setup) # this checkout's last commit and its Python packages on every worker
    run git -C "$root" archive --format=tar.gz --output=/tmp/vlmprune-jax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp /tmp/vlmprune-jax.tar.gz "$TPU_NAME:" "${at[@]}" --worker=all
    on_workers all "mkdir -p vlmprune-jax && tar xzf vlmprune-jax.tar.gz -C vlmprune-jax"
    on_workers all "vlmprune-jax/launch/worker.sh setup${BUCKET:+ $BUCKET}" ;;
  run | resume) # the same command: vlmprune continues from what it finds; a run that is still going is followed
    [[ $# -gt 1 ]] || fail "no command: use tpu_vm.sh $action recover --config=FILE.py --workdir=DIR"
    on_workers all "vlmprune-jax/launch/worker.sh run$(printf ' %q' "${@:2}")" ;;
  logs) on_workers "${WORKER:-0}" "tail -n 100 -F vlmprune-jax/run.log" ;;
  stop) on_workers all "vlmprune-jax/launch/worker.sh stop" ;;
  delete) run gcloud compute tpus queued-resources delete "$TPU_NAME" "${at[@]}" --force --quiet ;;
  *) fail "unknown action '$action': use create, state, wait, setup, run, resume, logs, stop or delete" ;;
esac
