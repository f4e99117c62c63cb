#!/usr/bin/env bash
# A sweep over N slices at once, each with every N-th run: sweep.sh [--dry-run] N [FLAGS of vlmprune sweep]
# BY=spot (the default): variables of spot_loop.sh, slices TPU_NAME-1 ...; a slice is deleted when its runs are done.
# BY=gke: variables of gke.sh run, workloads WORKLOAD-1 ... --workdir must be on storage that all of them see.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/lib.sh"
if [[ "${1:-}" == --dry-run ]]; then export DRY_RUN=1; shift; fi
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]?$ && $# -gt 1 ]] || fail "number of slices or command missing: use sweep.sh 4 --config=FILE.py --workdir=DIR"
shift
case "${BY:-spot}" in
  spot) need PROJECT ZONE TPU_NAME ACCELERATOR RUNTIME ;;
  gke) need PROJECT ZONE CLUSTER WORKLOAD IMAGE TPU_TYPE ;;
  *) fail "BY=$BY: use spot or gke" ;;
esac

share() { # share NUMBER COMMAND...: the runs of one slice, on a slice of its own
  if [[ "${BY:-spot}" == gke ]]; then
    WORKLOAD="$WORKLOAD-$1" "$here/gke.sh" run "${@:2}"
    return
  fi
  local code=0
  TPU_NAME="$TPU_NAME-$1" "$here/spot_loop.sh" "${@:2}" || code=$?
  if [[ -z "${DRY_RUN:-}" ]]; then TPU_NAME="$TPU_NAME-$1" "$here/tpu_vm.sh" delete; fi
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
