#!/usr/bin/env bash
# On each worker of a slice (tpu_vm.sh and gce.sh call it there). worker.sh setup [BUCKET] | run COMMAND [FLAGS] | stop
# run starts vlmprune so that it outlives the connection, or follows the one that is going; it ends with its code.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/lib.sh"
cd "$root" || exit

going() { kill -0 "$(cat run.pid 2>/dev/null)" 2>/dev/null; }

case "${1:-}" in
  setup) # uv brings its own Python: the images of TPU VMs have 3.10, vlmprune needs 3.11; those of TPU7x forbid pip
    if [[ -n "${2:-}" ]]; then launch/mount.sh "$2"; fi
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]' ;;
  run)
    if going; then
      [[ "$(cat run.command)" == "${*:2}" ]] || fail "'$(cat run.command)' is running here: stop it first"
    else
      rm -f run.exit
      touch run.log # tail may be there before the inner shell is
      echo "${*:2}" > run.command
      # shellcheck disable=SC2016 # expanded by the inner shell, which outlives this one
      setsid nohup bash -c '.venv/bin/vlmprune "$@"; echo $? > run.exit' _ "${@:2}" >> run.log 2>&1 < /dev/null &
      echo $! > run.pid
    fi
    tail -n 20 -f --pid="$(cat run.pid)" run.log
    [[ -f run.exit ]] || { echo "vlmprune was killed; run the same command again" >&2; exit 137; }
    exit "$(cat run.exit)" ;;
  stop) # saves and ends (exit code 143); the same command continues
    if going; then pkill -TERM -P "$(cat run.pid)"; fi ;;
  *) fail "unknown action '${1:-}': use setup, run or stop" ;;
esac
