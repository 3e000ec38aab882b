#!/usr/bin/env bash
# A release gate with no hardware: builds the virtual Raspberry Pi 4 from nothing, runs the keyword
# spotting recipe on it over SSH and gates on instructions, memory and accuracy; then shows that a
# model with one operator more fails the instruction gate, by how much exactly.
# EDGEPIPE_DATA names the folder that holds kws-dscnn/ and speech-commands-dev/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/setup.sh
folder=$(mktemp -d)
export EDGEPIPE_EMULATOR="$folder/emulator"
cp -r ci/recipes "$folder"
cd "$folder"
edgepipe="$OLDPWD/.venv/bin/edgepipe"
trap '"$edgepipe" emulate down virt-pi-4 --quiet || true; rm -rf "$folder"' EXIT
step() { printf '\n=== %4d s  %s\n' "$SECONDS" "$*"; }
expect() { # exit code, command: any other one ends the script
  local wanted=$1 code=0
  shift
  "$@" || code=$?
  if [ "$code" != "$wanted" ]; then
    printf 'exit code %s, expected %s: %s\n' "$code" "$wanted" "$*" >&2
    exit 1
  fi
}

step "build the board and start it"
"$edgepipe" emulate build virt-pi-4
"$edgepipe" emulate up virt-pi-4
step "the first run: nothing is released yet, so that the gate on growth cannot tell (exit code 3)"
expect 3 "$edgepipe" run recipes/keyword_spotting_virtual.toml
step "release it"
"$edgepipe" gate --promote
step "the same model again: every gate passes"
"$edgepipe" run recipes/keyword_spotting_virtual.toml
step "one operator more, with the same answers: the instruction gate fails (exit code 1)"
sed -i 's/model.py:build"/model.py:build_slower"/' recipes/keyword_spotting_virtual.toml
expect 1 "$edgepipe" run recipes/keyword_spotting_virtual.toml
step "done"
