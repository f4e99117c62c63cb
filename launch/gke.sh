#!/usr/bin/env bash
# GKE with XPK, v5e to v6e (XPK is deprecated: gcluster.sh has TPU7x).
# gke.sh [--dry-run] create|setup|run|resume|logs|delete|delete-cluster [vlmprune's arguments]
# Needs PROJECT, ZONE, CLUSTER; run: WORKLOAD, IMAGE, TPU_TYPE; or SLICES (1), SPOT=1, RESTARTS (100), BUCKET (in /mnt).
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/lib.sh"
action="${1:-}"
need PROJECT ZONE CLUSTER
at=("--project=$PROJECT" "--zone=$ZONE" "--cluster=$CLUSTER")

workload() { # restarted on 127 to 255 (preempted, 143: saved on SIGTERM); exit code 2, wrong input, ends it
  run xpk workload create "${at[@]}" "--workload=$WORKLOAD" "--docker-image=$IMAGE" "--tpu-type=$TPU_TYPE" \
    "--num-slices=${SLICES:-1}" "--max-restarts=${RESTARTS:-100}" --termination-grace-period-seconds=120 \
    "--command=vlmprune$(printf ' %q' "$@")"
}

case "$action" in
  create)
    need TPU_TYPE
    run xpk cluster create "${at[@]}" "--tpu-type=$TPU_TYPE" "--num-slices=${SLICES:-1}" ${SPOT:+--spot} \
      ${BUCKET:+--enable-gcsfuse-csi-driver} ;;
  setup) # the image that run uses
    build_image "$root"
    [[ -z "${BUCKET:-}" ]] || run xpk storage attach "$BUCKET" "${at[@]}" --type=gcsfuse "--bucket=$BUCKET" \
      "--mount-point=/mnt/$BUCKET" --readonly=false --auto-mount=true --size=1 ;;
  run | resume) # resume: after delete, or when the restarts are used up; vlmprune continues from its checkpoints
    need WORKLOAD IMAGE TPU_TYPE
    [[ $# -gt 1 ]] || fail "no command: use gke.sh $action recover --config=FILE.py --workdir=DIR"
    if [[ "$action" == resume ]]; then run xpk workload delete "${at[@]}" "--workload=$WORKLOAD" --force; fi
    workload "${@:2}" ;;
  logs)
    need WORKLOAD
    run kubectl logs --follow --tail=100 \
      "--selector=jobset.sigs.k8s.io/jobset-name=$WORKLOAD,batch.kubernetes.io/job-completion-index=${WORKER:-0}" ;;
  delete) need WORKLOAD && run xpk workload delete "${at[@]}" "--workload=$WORKLOAD" --force ;;
  delete-cluster) run xpk cluster delete "${at[@]}" ;;
  *) fail "unknown action '$action': use create, setup, run, resume, logs, delete or delete-cluster" ;;
esac
