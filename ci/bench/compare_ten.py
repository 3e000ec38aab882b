#!/usr/bin/env python3
"""`edgepipe compare` ten times: a model with one more layer must FAIL, the same model must PASS.

    python3 ci/bench/compare_ten.py [--times 10] [--device ADDRESS --profile NAME]

The models are int8 networks of 16 and 17 layers. What the layer really costs is known without the
statistics: from the sums of the operators' own times, measured in separate passes. Five minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgepipe.tflite_ops.tiny import conv_tflite


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--device", default="local")
    parser.add_argument("--profile", default="localhost")
    args = parser.parse_args()
    right = 0
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        base, longer = Path(folder) / "base.tflite", Path(folder) / "longer.tflite"
        base.write_bytes(conv_tflite(layers=16))
        longer.write_bytes(conv_tflite(layers=16, extra_layers=1))
        where = ["--device", args.device, "--profile", args.profile]
        for number in range(1, args.times + 1):
            for candidate, expected in ((longer, "FAIL"), (base, "PASS")):
                found = compare(base, candidate, where)
                verdict = next((v for v in found["verdicts"] if v["gate"] == "slowdown"), {})
                right += verdict.get("status") == expected
                print(f"{number:3} {'one more layer' if candidate is longer else 'the same model':15}{_of_operators(found)} by its operators; {verdict.get('status')}: {verdict.get('reason')}", flush=True)  # fmt: skip
    print(f"{right} of {2 * args.times} verdicts are right")
    return 0 if right == 2 * args.times else 1


def compare(base: Path, candidate: Path, where: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgepipe", "compare", str(base), str(candidate), *where, "--json", "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1, 3) or "verdicts" not in (found := json.loads(done.stdout)):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return dict(found)


def _of_operators(found: dict[str, Any]) -> str:
    sums = {m["metric"]: m["samples"][0][0] for m in found["measurements"] if "op_time" in m["metric"]}  # fmt: skip
    if len(sums) != 2:
        return "unknown"
    return f"{sums['op_time'] / sums['op_time_baseline'] - 1:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
