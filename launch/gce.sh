#!/usr/bin/env bash
# One slice of Compute Engine VMs, TPU7x: a managed instance group whose workload policy gives the topology.
# gce.sh [--dry-run] create|state|wait|setup|run|resume|logs|stop|delete [vlmprune's arguments]
# Needs PROJECT, ZONE, TPU_NAME; create: TOPOLOGY (2x2x2; VMs have 4 chips), perhaps SPOT=1 or RESERVATION, and
# MACHINE_TYPE, IMAGE_FAMILY for v5p and v6e; setup: BUCKET, mounted at /mnt/BUCKET; logs: WORKER, a VM by its place.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/lib.sh"
need PROJECT ZONE TPU_NAME
at=("--project=$PROJECT" "--zone=$ZONE") region=("--project=$PROJECT" "--region=${ZONE%-*}")
group=(gcloud compute instance-groups managed)
list=("${group[@]}" list-instances "$TPU_NAME" "${at[@]}")

exists() { # exists KIND FLAGS: code 0 if TPU_NAME is one, perhaps left by a create that failed
  [[ -z "${DRY_RUN:-}" ]] && gcloud compute "$1" describe "$TPU_NAME" "${@:2}" > /dev/null 2>&1
}

on_workers() { each_worker "$1" ssh "--command=$2"; }
copy_to_workers() { each_worker all scp "$1"; }

each_worker() { # each_worker all|NUMBER ssh|scp ARGUMENT: at once; the exit code is 0 or that of a VM that failed
  local vm vms code=0 started=()
  if [[ -n "${DRY_RUN:-}" ]]; then run "${list[@]}" "--format=value(instance.basename())" && vms=VM; fi
  vms="${vms:-$("${list[@]}" "--format=value(instance.basename())" | sort)}"
  [[ -n "$vms" ]] || { echo "$TPU_NAME has no VMs" >&2; return 1; }
  if [[ "$1" != all ]]; then vms="$(sed -n "$(($1 + 1))p" <<< "$vms")"; fi
  for vm in $vms; do
    case "$2" in
      ssh) run gcloud compute ssh "$vm" "${at[@]}" "$3" & ;;
      scp) run gcloud compute scp "$3" "$vm:" "${at[@]}" & ;;
    esac
    started+=($!)
  done
  for vm in "${started[@]}"; do wait "$vm" || code=$?; done
  return "$code"
}

create() {
  local chips=$((${TOPOLOGY//x/*})) template=() policy=()
  template=("--machine-type=${MACHINE_TYPE:-tpu7x-standard-4t}" --maintenance-policy=TERMINATE --scopes=cloud-platform
    "--image-family=${IMAGE_FAMILY:-ubuntu-accel-2404-amd64-tpu-tpu7x}" --image-project=ubuntu-os-accelerator-images
    --boot-disk-type=hyperdisk-balanced --boot-disk-size=200GB)
  if [[ -n "${SPOT:-}" ]]; then
    template+=(--provisioning-model=SPOT --instance-termination-action=STOP)
  elif [[ -n "${RESERVATION:-}" ]]; then
    template+=(--reservation-affinity=specific "--reservation=$RESERVATION" --provisioning-model=RESERVATION_BOUND
      --instance-termination-action=DELETE)
  fi
  if [[ $chips -gt 4 ]]; then # VMs that are connected to each other
    policy=("--workload-policy=projects/$PROJECT/regions/${ZONE%-*}/resourcePolicies/$TPU_NAME")
    exists resource-policies "${region[@]}" || run gcloud compute resource-policies create workload-policy "$TPU_NAME" \
      "${region[@]}" --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY"
  fi
  exists instance-templates "--project=$PROJECT" ||
    run gcloud compute instance-templates create "$TPU_NAME" "--project=$PROJECT" "${template[@]}"
  # a VM that is repaired alone would leave the topology: a preempted slice is deleted and created as one
  run "${group[@]}" create "$TPU_NAME" "${at[@]}" "--template=$TPU_NAME" "--size=$((chips / 4))" \
    --default-action-on-vm-failure=do-nothing "${policy[@]}"
}

state() { # ACTIVE where all VMs run, SUSPENDED where one was stopped
  local vms
  vms="$(run "${list[@]}" "--format=csv[no-heading](instanceStatus,currentAction)")"
  if [[ -n "${DRY_RUN:-}" ]]; then echo "$vms" && return; fi
  if grep -qE '^(STOP|SUSPEND|TERMINAT)' <<< "$vms"; then
    echo SUSPENDED
  elif [[ -n "$vms" ]] && ! grep -qvx RUNNING,NONE <<< "$vms"; then
    echo ACTIVE
  else
    echo PROVISIONING
  fi
}

case "${1:-}" in
  create)
    need TOPOLOGY
    [[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "TOPOLOGY=$TOPOLOGY: use for example 2x2x2"
    create ;;
  state) state ;;
  delete) # all three; those that are missing do not keep the others
    code=0
    run "${group[@]}" delete "$TPU_NAME" "${at[@]}" --quiet || code=$?
    run gcloud compute instance-templates delete "$TPU_NAME" "--project=$PROJECT" --quiet || code=$?
    if [[ -n "${DRY_RUN:-}" ]] || exists resource-policies "${region[@]}"; then
      run gcloud compute resource-policies delete "$TPU_NAME" "${region[@]}" --quiet || code=$?
    fi
    exit "$code" ;;
  *) on_slice "$root" "${1:-}" "${@:2}" ;;
esac
