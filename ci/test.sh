#!/usr/bin/env bash
# The tests. `ci/test.sh` runs everything that runs on this machine, `ci/test.sh fast` the inner
# loop (about a minute). More arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The contract suite talks to a real OpenSSH server; in CI its absence is an error.
if [ "${CI:-}" = true ] && [ ! -x /usr/sbin/sshd ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq openssh-server >/dev/null
fi
# The folder of real data (README, "Running the tests"); one beside the checkout is found by itself.
if [ -z "${EDGEPIPE_DATA:-}" ] && [ -d ../shared/data ]; then
  EDGEPIPE_DATA=$(cd ../shared/data && pwd)
  export EDGEPIPE_DATA
fi
bash ci/setup.sh

export OMP_NUM_THREADS=1
if [ "${1:-}" = fast ]; then
  shift
  exec .venv/bin/python -m pytest -q -n 2 -m 'not slow' "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q -n 2 "$@"
