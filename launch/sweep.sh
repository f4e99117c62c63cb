#!/usr/bin/env bash
# A sweep over N slices at once, each with every N-th run: sweep.sh [--dry-run] N [FLAGS of vlmprune sweep]
# BY=tpu_vm (the default) or gce: variables of spot_loop.sh, slices TPU_NAME-1 ..., each deleted when its runs are done.
# BY=gke or gcluster: variables of its run, workloads WORKLOAD-1 ... --workdir must be on storage that all of them see.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/lib.sh"
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]?$ && $# -gt 1 ]] || fail "number of slices or command missing: use sweep.sh 4 --config=FILE.py --workdir=DIR"
shift
by="${BY:-tpu_vm}"
need_for "$by" || fail "BY=$by: use tpu_vm, gce, gke or gcluster"

share() { # share NUMBER COMMAND...: the runs of one slice, on a slice of its own
  if [[ "$by" == @(gke|gcluster) ]]; then
    WORKLOAD="$WORKLOAD-$1" "$here/$by.sh" run "${@:2}"
    return
  fi
  local code=0
  TPU_NAME="$TPU_NAME-$1" "$here/spot_loop.sh" "${@:2}" || code=$?
  if [[ -z "${DRY_RUN:-}" ]]; then TPU_NAME="$TPU_NAME-$1" "$here/$by.sh" delete; fi
  return "$code"
}

code=0 started=()
for number in $(seq "$count"); do
  command=(sweep "$@" "--shard=$number/$count")
  if [[ -n "${DRY_RUN:-}" ]]; then share "$number" "${command[@]}" && continue; fi
  (share "$number" "${command[@]}" 2>&1 | sed -u "s/^/[$number] /") &
  started+=($!)
done
for process in "${started[@]}"; do wait "$process" || code=$?; done
exit "$code" # 0, or that of a slice whose runs were not all done
