#!/usr/bin/env bash
# Sourced by the other scripts: required variables, and commands that --dry-run prints instead of running.
set -euo pipefail

# need NAME...: one line and exit code 2 for the first variable that is not set.
need() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "set $name (launch/README.md has a list)"
  done
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
