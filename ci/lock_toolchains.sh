#!/usr/bin/env bash
# Make the locks of the converter environments again: ci/lock_toolchains.sh (needs uv, a network,
# CPython 3.12 and 3.11). After it, run the conversion tests: a new lock is a new converter.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

lock() {  # name, Python to resolve with, Pythons it is for, requirements...
    local name=$1 python=$2 range=$3 dependencies=""
    shift 3
    for requirement in "$@"; do dependencies+="\"$requirement\", "; done
    cat > "$folder/pyproject.toml" <<TOML
[project]
name = "toolchain"
version = "0"
requires-python = ">=3.11"
dependencies = [$dependencies]
[tool.uv]
environments = ["python_version < '${range#*<}' and sys_platform == 'linux'"]
TOML
    # backports-strenum 1.3 is for Python < 3.11, which uv does not look at
    echo "backports-strenum<1.3" > "$folder/constraints.txt"
    # the full opencv-python needs libGL, which servers and containers lack; headless does not
    echo "opencv-python ; python_version < '3'" > "$folder/overrides.txt"
    # borrowed from edgepipe's own environment (Toolchain.borrowed); its dependencies are named below
    echo "torch ; python_version < '3'" >> "$folder/overrides.txt"
    (cd "$folder" && uv pip compile pyproject.toml --python "$python" --universal --generate-hashes \
        --constraint constraints.txt --override overrides.txt --no-header --no-annotate --quiet \
        --output-file lock.txt > /dev/null)
    {
        echo "# Toolchain \"$name\": exact pins with hashes, for CPython $range on Linux."
        echo "# Made by ci/lock_toolchains.sh; installed without resolving (--no-deps --require-hashes)."
        sed -E "s/ ; python_full_version < '3.1[345]' and sys_platform == 'linux'//;
                s/ ; python_full_version < '3.12' and sys_platform == 'linux'/ ; python_version < '3.12'/" \
            "$folder/lock.txt"
    } > "edgepipe/toolchains/$name.lock.txt"
}

lock onnx2tf 3.12 ">=3.12,<3.14" "onnx2tf==2.6.9" "opencv-python-headless==4.13.0.92"
lock onnx2tf-tf 3.11 ">=3.11,<3.13" "onnx2tf==1.29.24" "opencv-python-headless==4.11.0.86"
# the last seven are what torch needs
lock litert-torch 3.11 ">=3.11,<3.13" "litert-torch==0.10.0" "jax==0.10.2" \
    filelock "typing-extensions>=4.10.0" "setuptools>=77.0.3" "sympy>=1.13.3" "networkx>=2.5.1" jinja2 "fsspec>=0.8.5"
lock zig 3.11 ">=3.11,<3.15" "ziglang==0.17.1"
