#!/usr/bin/env bash
# One slice of TPU VMs, v5e to v6e (the Cloud TPU API ends there: gce.sh has TPU7x).
# tpu_vm.sh [--dry-run] create|state|wait|setup|run|resume|logs|stop|delete [vlmprune's arguments]
# Needs PROJECT, ZONE, TPU_NAME; create: ACCELERATOR, RUNTIME, perhaps SPOT=1; setup: BUCKET, mounted at /mnt/BUCKET.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/lib.sh"
need PROJECT ZONE TPU_NAME
at=("--project=$PROJECT" "--zone=$ZONE")

on_workers() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${at[@]}" "--worker=$1" "--command=$2"; }
copy_to_workers() { run gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:" "${at[@]}" --worker=all; }

case "${1:-}" in
  create) # a queued resource: it waits for capacity
    need ACCELERATOR RUNTIME
    run gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${at[@]}" \
      "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" ${SPOT:+--spot} ;;
  state) run gcloud compute tpus queued-resources describe "$TPU_NAME" "${at[@]}" "--format=value(state.state)" ;;
  delete) run gcloud compute tpus queued-resources delete "$TPU_NAME" "${at[@]}" --force --quiet ;;
  *) on_slice "$root" "${1:-}" "${@:2}" ;;
esac
