#!/usr/bin/env bash
# A bucket as the folder /mnt/BUCKET of this machine, by gcsfuse, installed if missing: mount.sh BUCKET
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/lib.sh"
[[ $# == 1 ]] || fail "no bucket: use mount.sh BUCKET"
if ! command -v gcsfuse > /dev/null; then
  from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  sudo tee /etc/apt/sources.list.d/gcsfuse.list <<< "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main"
  sudo apt-get update --quiet && sudo apt-get install --quiet --yes gcsfuse
fi
if ! mountpoint --quiet "/mnt/$1"; then
  sudo install --directory --owner="$(id -un)" "/mnt/$1"
  gcsfuse --implicit-dirs "$1" "/mnt/$1"
fi
