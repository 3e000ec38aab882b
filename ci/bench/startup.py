"""How fast edgepipe starts, against bare Python, and how fast a run with nothing to do is.

    python ci/bench/startup.py [RECIPE]

Prints ratios of medians, the commands run in turn so that a busy machine slows both. With a recipe
it also runs it twice and reports the second run: seconds, stages run, frameworks imported.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 20
FRAMEWORKS = ("torch", "tensorflow", "onnx", "onnxruntime", "ai_edge_litert", "numpy", "paramiko")


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def help_ratio() -> float:
    script = Path(sys.executable).with_name("edgepipe")
    bare, ours = [], []
    for _ in range(ROUNDS):
        bare.append(seconds([sys.executable, "-c", "pass"]))
        ours.append(seconds([str(script), "--help"]))
    return statistics.median(ours) / statistics.median(bare)


def second_run(recipe: str) -> None:
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "edgepipe", "run", recipe, "--store", store]
        subprocess.run(command, capture_output=True, check=True)
        code = (
            "import sys; from edgepipe.cli import main\n"
            f"main(['run', {recipe!r}, '--store', {store!r}])\n"
            f"print('imported:', sorted(set({FRAMEWORKS!r}) & set(sys.modules)) or 'no framework', file=sys.stderr)"
        )
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        elapsed = time.perf_counter() - started
    kept = done.stderr.count("unchanged, kept")
    ran = done.stderr.count(": done in")
    print(
        f"second run: {elapsed:.2f} s, {kept} steps kept, {ran} steps run, {done.stderr.splitlines()[-1]}"
    )


if __name__ == "__main__":
    print(f"edgepipe --help / python -c pass: {help_ratio():.2f}x (at most 3)")
    if len(sys.argv) > 1:
        second_run(sys.argv[1])
