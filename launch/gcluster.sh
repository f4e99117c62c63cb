#!/usr/bin/env bash
# GKE with Cluster Toolkit, TPU7x and others. gcluster.sh [--dry-run] create|setup|run|resume|logs|delete|delete-cluster
# [vlmprune's arguments]. Needs PROJECT, ZONE, CLUSTER; create: TOPOLOGY, BUCKET (for its state), BLUEPRINT (a file of
# the toolkit's, examples/gke-tpu-7x/gke-tpu-7x.yaml), perhaps RESERVATION, CIDR; setup: IMAGE; run: WORKLOAD, IMAGE,
# TOPOLOGY, perhaps COMPUTE_TYPE (tpu7x-standard-4t), SLICES (1), SPOT=1, RESTARTS (100), BUCKET (at /mnt/BUCKET).
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/lib.sh"
action="${1:-}"
need PROJECT ZONE CLUSTER
at=("--project=$PROJECT" "--location=${ZONE%-*}" "--cluster=$CLUSTER")

submit() { # restarted after 134, 137 (preempted) and 143 (saved on SIGTERM); any other code ends it
  run gcluster job submit "${at[@]}" "--name=$WORKLOAD" "--image=$IMAGE" "--topology=$TOPOLOGY" \
    "--compute-type=${COMPUTE_TYPE:-tpu7x-standard-4t}" "--num-slices=${SLICES:-1}" "--restarts=${RESTARTS:-100}" \
    --restart-on-exit-codes=134,137,143 --grace-period=2m ${SPOT:+--gke-nap-provisioning=spot} \
    ${BUCKET:+"--mount=gs://$BUCKET:/mnt/$BUCKET:rw"} "--command=vlmprune$(printf ' %q' "$@")"
}

case "$action" in
  create) # SPOT=1 needs a cluster that makes its nodes itself (node auto-provisioning), not this one
    need TOPOLOGY BUCKET BLUEPRINT
    run gcluster deploy "$BLUEPRINT" --auto-approve "--backend-config=bucket=$BUCKET" \
      "--vars=project_id=$PROJECT,deployment_name=$CLUSTER,region=${ZONE%-*},zone=$ZONE,num_slices=${SLICES:-1}" \
      "--vars=tpu_topology=$TOPOLOGY,reservation=${RESERVATION:-},authorized_cidr=${CIDR:-0.0.0.0/0}" ;;
  setup) build_image "$root" ;; # the image that run uses
  run | resume) # resume: after delete, or when the restarts are used up; vlmprune continues from its checkpoints
    need WORKLOAD IMAGE TOPOLOGY
    [[ $# -gt 1 ]] || fail "no command: use gcluster.sh $action recover --config=FILE.py --workdir=DIR"
    if [[ "$action" == resume ]]; then run gcluster job cancel "$WORKLOAD" "${at[@]}"; fi
    submit "${@:2}" ;;
  logs) need WORKLOAD && run gcluster job logs "$WORKLOAD" "${at[@]}" --follow ;;
  delete) need WORKLOAD && run gcluster job cancel "$WORKLOAD" "${at[@]}" ;;
  delete-cluster) run gcluster destroy "$CLUSTER" --auto-approve ;; # the folder that create made here
  *) fail "unknown action '$action': use create, setup, run, resume, logs, delete or delete-cluster" ;;
esac
