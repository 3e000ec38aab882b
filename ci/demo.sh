#!/usr/bin/env bash
# The main job end to end: trains a small network on scikit-learn's digits, prunes it, converts it,
# quantises it, pushes it over SSH to a real OpenSSH server started on loopback (or measures on this
# machine where there is no sshd; it says which), and gates it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/setup.sh
exec .venv/bin/python ci/demo.py "$@"
