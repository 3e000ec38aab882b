"""What measuring costs: the agent's worker against the C runner over the same libLiteRt.so, in turns.

    python ci/bench/agent_overhead.py [--rounds 10] [--session 0.7] [--no-verdict]

Two models: about 10 ms and about 25 us per inference. In each round both programs time both models,
each in a fresh process, in shuffled order; what counts is CPU time per inference, the 10th percentile
of a session: an overhead is in every sample, a neighbour's disturbance is not, and on a contended
machine it varies a quarter as much from process to process as the median. Prints the median
difference over the rounds with the middle half of them, the resident size of the measuring process
before a runtime or a model is in it, and how long `edgepipe compare` takes to pass an unchanged
10 ms model on this machine. Exit 1 where a limit does not hold: 1 % of 10 ms, 2 us, 16 MB (10^6
bytes), 30 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgepipe.artifact import hash_path
from edgepipe.crunner import compile_runner
from edgepipe.resources import target_dir
from edgepipe.runtime import runtime_library
from edgepipe.tflite_ops.tiny import conv_tflite, tiny_tflite

LIMIT_SHARE = 0.01
LIMIT_US = 2.0
LIMIT_RESIDENT_MB = 16.0
LIMIT_VERDICT_S = 30.0
TARGET = target_dir("linux")


class Programs:
    """The two ways to run one session of one model; each answers with the session's data."""

    def __init__(self, work_dir: Path, session_s: float) -> None:
        self.work_dir, self.session_s = work_dir, session_s
        self.library = runtime_library(platform.machine())
        self.runner = compile_runner(TARGET / "runner.c", platform.machine())

    def agent(self, kind: str, model: Path) -> dict[str, Any]:
        spec = {
            "kind": kind, "tag": "bench", "self_test": str(TARGET / "self_test.tflite"),
            "arms": {"model": str(model)}, "threads": 1, "affinity": [], "kernel": "",
            "runtime": {"backend": "litert-c", "path": str(self.library.path)}, "weight_cache": False,
            "seed": 0, "warmup_s": 0.2, "session_s": self.session_s, "min_inferences": 30,
        }  # fmt: skip
        argv = [sys.executable, str(TARGET / "worker.py"), str(os.getpid())]
        done = subprocess.run(argv, input=json.dumps(spec).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)  # fmt: skip
        return json.loads(done.stdout)["ok"]

    def c(self, kind: str, model: Path) -> dict[str, Any]:
        words = {
            "id": "bench", "owner": "bench", "work_dir": self.work_dir, "job_dir": self.work_dir,
            "tag": "bench", "kind": kind, "runtime": self.library.path,
            "runtime_size": self.library.path.stat().st_size, "runtime_sha256": self.library.sha256,
            "self_test": TARGET / "self_test.tflite", "threads": 1, "warmup_s": 0.2,
            "session_s": self.session_s, "min_inferences": 30, "limit_s": 600, "arm": "model",
            "model": model, "size": model.stat().st_size, "sha256": hash_path(model),
        }  # fmt: skip
        argv = [str(self.runner.path), "session", *(f"{k}={v}" for k, v in words.items())]
        done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)["data"]


def cpu_us(data: dict[str, Any]) -> float:
    """CPU time per inference, us: the 10th percentile of a session's samples."""
    arm = data["arms"]["model"]
    return statistics.quantiles(arm["cpu_ns"], n=10)[0] / arm["inner_loops"] / 1e3


def middle_half(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def overhead(programs: Programs, models: dict[str, Path], rounds: int) -> list[bool]:
    """Prints a line per model; whether each limit held."""
    found: dict[tuple[str, str], list[float]] = {}
    ways = {"agent": programs.agent, "c": programs.c}
    rng = random.Random(0)
    for number in range(rounds):
        turns = [(way, name) for way in ways for name in models]
        rng.shuffle(turns)
        for way, name in turns:
            found.setdefault((way, name), []).append(cpu_us(ways[way]("latency", models[name])))
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    held = []
    for name in models:
        agent, c = found["agent", name], found["c", name]
        extra_us = [a - b for a, b in zip(agent, c, strict=True)]
        shares = [a / b - 1 for a, b in zip(agent, c, strict=True)]
        low_us, high_us = middle_half(extra_us)
        low, high = middle_half(shares)
        print(
            f"{name}: C loop {statistics.median(c):.2f} us, agent {statistics.median(agent):.2f} us: "
            f"{statistics.median(extra_us):+.2f} us ({low_us:+.2f} to {high_us:+.2f}), "
            f"{statistics.median(shares):+.2%} ({low:+.2%} to {high:+.2%})"
        )
        is_long = statistics.median(c) > 1000
        held.append(
            statistics.median(shares) <= LIMIT_SHARE
            if is_long
            else statistics.median(extra_us) <= LIMIT_US
        )
    return held


def resident(programs: Programs, model: Path) -> bool:
    agent, c = (
        way("memory", model)["overhead_bytes"] / 1e6 for way in (programs.agent, programs.c)
    )
    print(f"resident before a runtime is loaded: agent {agent:.1f} MB, C runner {c:.1f} MB (limit {LIMIT_RESIDENT_MB:g} MB)")  # fmt: skip
    return agent < LIMIT_RESIDENT_MB


def verdict(model: Path) -> bool:
    """A/A on this machine with the defaults of `edgepipe compare`."""
    load = os.getloadavg()[0]
    began_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "edgepipe", "compare", str(model), str(model), "--json"], capture_output=True, text=True, check=False)  # fmt: skip
    taken_s = time.perf_counter() - began_s
    print(
        f"verdict on an unchanged model: {taken_s:.1f} s, exit {done.returncode} "
        f"(limit {LIMIT_VERDICT_S:g} s on a quiet board; load here {load:.1f} on {os.cpu_count()} CPUs)"
    )
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0 and taken_s <= LIMIT_VERDICT_S


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="alternations (default 10)")
    parser.add_argument("--session", type=float, default=0.7, help="seconds per session (default 0.7)")  # fmt: skip
    parser.add_argument("--no-verdict", action="store_true", help="leave out `edgepipe compare`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepipe-bench-") as folder:
        contents = {
            "10 ms": conv_tflite(layers=16, size=56),
            "25 us": tiny_tflite(size=128, layers=32),
        }
        models = {}
        for name, data in contents.items():
            models[name] = Path(folder) / f"{name.replace(' ', '')}.tflite"
            models[name].write_bytes(data)
        programs = Programs(Path(folder), options.session)
        print(f"C loop compiled by {programs.runner.compiler}; LiteRT {programs.library.version}")
        held = overhead(programs, models, options.rounds)
        held.append(resident(programs, models["10 ms"]))
        if not options.no_verdict:
            held.append(verdict(models["10 ms"]))
    print("all limits hold" if all(held) else "a limit does not hold")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
