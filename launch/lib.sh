#!/usr/bin/env bash
# Sourced by the other scripts: --dry-run as first argument, required variables, and what slices of VMs have in common.
set -euo pipefail
if [[ "${1:-}" == --dry-run ]]; then export DRY_RUN=1; shift; fi # of the script: it is sourced without arguments

# need NAME...: one line and exit code 2 for the first variable that is not set.
need() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "set $name (launch/README.md has a list)"
  done
}

# need_for tpu_vm|gce|gke|gcluster: the variables that a whole run by this script takes; code 1 for another name.
need_for() {
  case "$1" in
    tpu_vm) need PROJECT ZONE TPU_NAME ACCELERATOR RUNTIME ;;
    gce) need PROJECT ZONE TPU_NAME TOPOLOGY ;;
    gke) need PROJECT ZONE CLUSTER WORKLOAD IMAGE TPU_TYPE ;;
    gcluster) need PROJECT ZONE CLUSTER WORKLOAD IMAGE TOPOLOGY ;;
    *) return 1 ;;
  esac
}

fail() {
  echo "${0##*/}: error: $*" >&2
  exit 2
}

# run COMMAND...: print it, quoted for a shell, where DRY_RUN is set; run it otherwise.
run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# build_image ROOT: build and push the image IMAGE, for workloads on a cluster.
build_image() {
  need IMAGE
  run docker build --build-arg EXTRAS=tpu --tag "$IMAGE" "$1"
  run docker push "$IMAGE"
}

# on_slice ROOT ACTION [COMMAND...]: an action on the VMs of TPU_NAME, by two functions of the script that calls it:
# on_workers all|NUMBER COMMAND runs a command on all VMs at once, or on one; copy_to_workers FILE copies to their homes.
on_slice() {
  local root="$1" action="$2" state
  case "$action" in
    wait) # until the slice is there; exit code 1 if it never will be
      if [[ -n "${DRY_RUN:-}" ]]; then exec "$0" state; fi
      while state="$("$0" state)" && [[ "$state" != ACTIVE ]]; do
        if [[ "$state" == @(FAILED|SUSPEND*) ]]; then echo "$TPU_NAME is $state: delete, then create" >&2; exit 1; fi
        sleep "${POLL_SECONDS:-30}"
      done
      [[ "$state" == ACTIVE ]] ;;
    setup) # this checkout's last commit and its Python packages on every worker
      run git -C "$root" archive --format=tar.gz --output=/tmp/vlmprune-jax.tar.gz HEAD
      copy_to_workers /tmp/vlmprune-jax.tar.gz
      on_workers all "mkdir -p vlmprune-jax && tar xzf vlmprune-jax.tar.gz -C vlmprune-jax"
      on_workers all "vlmprune-jax/launch/worker.sh setup${BUCKET:+ $BUCKET}" ;;
    run | resume) # the same command: vlmprune continues from what it finds; a run that is still going is followed
      [[ $# -gt 2 ]] || fail "no command: use ${0##*/} $action recover --config=FILE.py --workdir=DIR"
      on_workers all "vlmprune-jax/launch/worker.sh run$(printf ' %q' "${@:3}")" ;;
    logs) on_workers "${WORKER:-0}" "tail -n 100 -F vlmprune-jax/run.log" ;;
    stop) on_workers all "vlmprune-jax/launch/worker.sh stop" ;;
    *) fail "unknown action '$action': use create, state, wait, setup, run, resume, logs, stop or delete" ;;
  esac
}
