#!/usr/bin/env bash
# The tests. `ci/test.sh` runs everything that runs on this machine, `ci/test.sh fast` the inner
# loop (about a minute). More arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tests talk to a real OpenSSH server, to Android's client and to virtual boards; in CI their absence is an error.
packages=()
have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; }
have sshd || packages+=(openssh-server)
have qemu-system-aarch64 || packages+=(qemu-system-arm)
have qemu-img || packages+=(qemu-utils)
have adb || packages+=(adb)
have mksh || packages+=(mksh)
have qemu-aarch64 || have qemu-aarch64-static || packages+=(qemu-user)
if [ "${CI:-}" = true ] && [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && have apt-get; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
# The folder of real data (README, "Running the tests"); one beside the checkout is found by itself.
if [ -z "${EDGEPIPE_DATA:-}" ] && [ -d ../shared/data ]; then
  EDGEPIPE_DATA=$(cd ../shared/data && pwd)
  export EDGEPIPE_DATA
fi
bash ci/setup.sh

export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE  # what pytest rewrites and hundreds of children import is compiled once
if [ "${1:-}" = fast ]; then
  shift
  exec .venv/bin/python -m pytest -q -n 2 -m 'not slow' "$@"
fi
# labgrid's programs, apart from ours: it is a plugin of pytest that every run would load
if [ "${CI:-}" = true ]; then
  [ -x .venv-labgrid/bin/python ] || .venv/bin/python -m venv .venv-labgrid
  .venv-labgrid/bin/python -m pip install --quiet --disable-pip-version-check -c ci/constraints.txt labgrid ||
    echo "labgrid could not be installed: its tests fail" >&2
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# By file: boards and recipes that a file's tests share are made once. In the order of pyproject.toml:
# by itself, xdist leaves the files of few tests for the end, and those are the virtual boards.
# More workers than CPUs: what talks to boards mostly waits.
exec .venv/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder "$@"
