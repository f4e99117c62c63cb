#!/usr/bin/env bash
# Keeps a spot slice until the command is done: spot_loop.sh [--dry-run] COMMAND [FLAGS of vlmprune]
# A preempted slice is deleted, created again and given the same command, which resumes from its last checkpoint.
# Variables of tpu_vm.sh, or with BY=gce of gce.sh. Ends with 0 when the command succeeds, or with its exit code when it
# fails on a healthy slice.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/lib.sh"
by="${BY:-tpu_vm}"
[[ "$by" == @(tpu_vm|gce) ]] || fail "BY=$by: use tpu_vm or gce"
need_for "$by"
[[ $# -gt 0 ]] || fail "no command: use spot_loop.sh recover --config=FILE.py --workdir=DIR"
export SPOT=1

slice() { "$here/$by.sh" "$@"; }
state() { slice state 2>/dev/null || echo NONE; }

if [[ -n "${DRY_RUN:-}" ]]; then # one round
  slice create && slice wait && slice setup && slice run "$@" && slice delete && exit 0
fi
failures=0 # of gcloud itself, one after the other
while true; do
  case "$(state)" in
    FAILED | SUSPEND*) echo "$TPU_NAME was taken away: creating it again" && slice delete && slice create ;;
    NONE) slice create ;;
  esac || true
  if ! { slice wait && slice setup; }; then
    failures=$((failures + 1))
    [[ $failures -lt ${TRIES:-20} ]] || fail "no slice after $failures tries"
    sleep "${POLL_SECONDS:-30}" && continue
  fi
  failures=0 code=0
  slice run "$@" || code=$?
  if [[ $code == 0 || $code == 2 ]]; then exit "$code"; fi # done, or wrong input: no other slice would help
  sleep "${GRACE_SECONDS:-120}" # a preemption shows in the state some time after the workers fall silent
  # 143: saved on SIGTERM; 255: the connection broke. On a healthy slice anything else is the command's own failure.
  if [[ "$(state)" == ACTIVE && $code != 143 && $code != 255 ]]; then exit "$code"; fi
done
