#!/usr/bin/env bash
# Makes .venv with edgepipe (editable) and everything the demo and the tests need, in versions
# tested together (ci/constraints.txt). Does nothing when it is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.edgepipe-setup
want=$(cat pyproject.toml ci/constraints.txt ci/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$want" ]; then
  exit 0
fi

python=""
for candidate in "${EDGEPIPE_PYTHON:-}" python3.11 python3.12 python3; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "edgepipe needs Python 3.11 or 3.12; install one or set EDGEPIPE_PYTHON" >&2
  exit 3
fi

echo "setting up .venv with $("$python" --version) (a few minutes the first time) ..." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c ci/constraints.txt -e '.[dev]'
echo "$want" > "$stamp"
