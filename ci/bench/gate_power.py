#!/usr/bin/env python3
"""How often is a verdict on a slowdown wrong? Replays recorded noise through our rule and others'.

    python3 ci/bench/gate_power.py                        the table, under two minutes
    python3 ci/bench/gate_power.py --record quiet --fifo  record noise/quiet.json anew
    python3 ci/bench/gate_power.py --record contended --busy 2

The noise is raw: sessions of one process in which a model (A), a second load of the same file (A2)
and a model with more layers (B) ran once a round, in shuffled order, measured by our own agent.
A replay draws sessions and in each a stretch of consecutive rounds, makes the second load slower by
a known share, and asks each rule. What no machine could be made to do on command is added to it:
drift, throttling in the middle of a session, single slow runs. Everything follows from --seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu

from edgepipe import stats

NOISE = Path(__file__).parent / "noise"
SCHEMA = 1
UNIT_NS = 100  # of the recorded times: five digits of a few milliseconds
SESSIONS, ROUNDS = 24, 150  # recorded
REPLAYED_ROUNDS = 100
TOLERANCE = 0.03
EFFECTS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07)
OTHERS_SESSIONS = 5  # of each model, for the rules that look once
# 32 layers of 3x3 convolutions, and 2 more of the same cost: 6.25 % more work
BASE_LAYERS, EXTRA_LAYERS = 32, 2

# (session, round, arm) of one clock; arms are A, A2, B
Noise = np.ndarray


@dataclasses.dataclass(frozen=True)
class Recording:
    about: dict[str, object]
    wall: Noise
    cpu: Noise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", metavar="NAME", help="record noise/NAME.json on this machine")
    parser.add_argument("--fifo", action="store_true", help="record under SCHED_FIFO (root), as on an idle machine")  # fmt: skip
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="record beside N busy processes")  # fmt: skip
    parser.add_argument("--trials", type=int, default=1000, help="replays of each cell (default: 1000)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rates here")
    args = parser.parse_args()
    if args.record:
        record(args.record, fifo=args.fifo, busy=args.busy)
        return 0
    rows = table(args.trials, args.seed)
    print(render(rows, args.trials))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1) + "\n")
    return 0


# ------------------------------------------------------------------------------------ recording


def record(name: str, *, fifo: bool, busy: int) -> None:
    """Measure A, A2 and B with our agent on this machine, and keep raw times."""
    from edgepipe.artifact import hash_path
    from edgepipe.device.local import LocalDevice
    from edgepipe.job import BoardJob
    from edgepipe.payload import push_payload
    from edgepipe.runtime import runtime_library
    from edgepipe.tflite_ops.tiny import conv_tflite

    device = LocalDevice()
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    load_before = os.getloadavg()
    try:
        if fifo:  # children inherit it; chrt -f 5
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
        with tempfile.TemporaryDirectory(prefix="edgepipe-noise-") as folder:
            work = Path(folder)
            library = runtime_library(platform.machine())
            models = {}
            for arm, extra in (("a", 0), ("a2", 0), ("b", EXTRA_LAYERS)):
                path = work / f"{arm}.tflite"
                path.write_bytes(conv_tflite(layers=BASE_LAYERS, extra_layers=extra))
                models[arm] = _file(path, hash_path(path))
            payload = push_payload(device, "linux", str(work))
            job = {
                "schema": 2, "id": f"noise-{name}", "owner": "gate_power", "work_dir": str(work),
                "models": models, "runtime": {**_file(library.path, library.sha256), "version": library.version, "glibc": library.glibc},
                "inputs": None, "backend": "litert-c", "kernel": "", "weight_cache": False, "threads": 1,
                "affinity": [], "warmup_s": 0.5, "session_s": 0.0, "min_inferences": ROUNDS, "seed": 0,
                "budget_s": 3600.0, "lease_s": 30.0, "min_free_bytes": 1 << 20,
                "start_below_c": None, "cool_down_s": 0.0, "abort_above_c": None,
            }  # fmt: skip
            plan = [
                {"tag": f"latency-{i + 1}", "kind": "latency", "arms": sorted(models)}
                for i in range(SESSIONS)
            ]
            board = BoardJob(device, payload, job, str(work / "jobs" / "noise"))
            outcome = board.run(plan)
            board.end()
    finally:
        for hog in hogs:
            hog.kill()
    datas = [s["data"] for s in outcome.sessions]
    shares = [round(d["cpu_share"], 3) for d in datas]
    about = {
        "recorded": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, a virtual machine shared with other work",
        "scheduling": "SCHED_FIFO 5" if fifo else "as every process",
        "busy_processes_beside": busy,
        "load_1min_before_after": [round(load_before[0], 1), round(os.getloadavg()[0], 1)],
        "cpu_share_median": statistics.median(shares),
        "runtime": f"{outcome.runtime['name']} {outcome.runtime['version']} ({outcome.runtime['backend']})",
        "models": f"a, a2: {BASE_LAYERS} convolutions, int8; b: {BASE_LAYERS + EXTRA_LAYERS}",
        "inner_loops": datas[0]["arms"]["a"]["inner_loops"],
    }
    clocks = {
        clock: [
            {arm: [round(ns / UNIT_NS) for ns in d["arms"][arm][f"{clock}_ns"]] for arm in sorted(models)}
            for d in datas
        ]
        for clock in ("wall", "cpu")
    }  # fmt: skip
    data = {"schema": SCHEMA, "unit_ns": UNIT_NS, "about": about, **clocks}
    path = NOISE / f"{name}.json"
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes, {json.dumps(about)}")


def _file(path: Path, sha256: str) -> dict[str, object]:
    return {"path": str(path), "size": path.stat().st_size, "sha256": sha256}


def load(name: str) -> Recording:
    data = json.loads((NOISE / f"{name}.json").read_text())
    if data["schema"] != SCHEMA:
        raise SystemExit(f"noise/{name}.json has schema {data['schema']}, not {SCHEMA}")

    def clock(key: str) -> Noise:
        return np.array([[s[arm] for arm in ("a", "a2", "b")] for s in data[key]], float).swapaxes(1, 2)  # fmt: skip

    return Recording(data["about"], clock("wall"), clock("cpu"))


# ------------------------------------------------------------------------------------ scenarios


def drifting(times: Noise, rng: np.random.Generator) -> Noise:
    """The machine slows by 30 % from the first session to the last, evenly."""
    sessions, rounds, _ = times.shape
    grows = np.linspace(1, 1.3, sessions * rounds).reshape(sessions, rounds, 1)
    return times * grows


def throttling(times: Noise, rng: np.random.Generator) -> Noise:
    """Half of the sessions run at 60 % speed from some round to some later one."""
    slowed = times.copy()
    sessions, rounds, _ = times.shape
    for session in rng.permutation(sessions)[: sessions // 2]:
        first, last = np.sort(rng.integers(0, rounds, 2))
        slowed[session, first:last] /= 0.6
    return slowed


def outliers(times: Noise, rng: np.random.Generator) -> Noise:
    """One run in twenty takes 2 to 10 times as long, whichever model it is."""
    hit = rng.random(times.shape) < 0.05
    return np.where(hit, times * rng.uniform(2, 10, times.shape), times)


SCENARIOS: tuple[tuple[str, str, Callable[[Noise, np.random.Generator], Noise] | None], ...] = (
    ("quiet", "quiet", None),
    ("contended", "contended", None),
    ("quiet + drift", "quiet", drifting),
    ("quiet + throttling", "quiet", throttling),
    ("quiet + outliers", "quiet", outliers),
    ("contended + all three", "contended", lambda t, rng: outliers(throttling(drifting(t, rng), rng), rng)),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- rules

# A rule takes noise, effect and generator, and says PASS, FAIL or INCONCLUSIVE and from how many
# sessions of each model.
Verdict = tuple[str, int]


def session_values(times: Noise, arms: tuple[int, int] = (0, 1)) -> Noise:
    """(session, first round): the median log ratio of so many rounds from there on."""
    logs = np.log(times[:, :, arms[1]] / times[:, :, arms[0]])
    windows = np.lib.stride_tricks.sliding_window_view(logs, REPLAYED_ROUNDS, axis=1)
    return np.median(windows, axis=2)


def ours(
    binding: Noise, effect: float, rng: np.random.Generator, *,
    objecting: Noise | None = None, is_same_model: bool = True,
) -> Verdict:  # fmt: skip
    """The gate slowdown: `stats.decide_ratio` after 3, 5, 8 and 12 sessions of paired rounds.

    With one thread ``binding`` is CPU time, and a PASS that wall time (``objecting``) contradicts is
    none; with more threads ``binding`` is wall time.
    """
    drawn: list[float] = []
    others: list[float] = []
    for look in stats.LOOKS:
        for _ in range(look - len(drawn)):
            at = rng.integers(binding.shape[0]), rng.integers(binding.shape[1])
            # which of two loads of one file is the candidate is a matter of chance
            sign = rng.choice((-1, 1)) if is_same_model else 1
            drawn.append(float(sign * binding[at]) + math.log1p(effect))
            if objecting is not None:
                others.append(float(sign * objecting[at]) + math.log1p(effect))
        decision = stats.decide_ratio(drawn, TOLERANCE)
        if decision.status != "INCONCLUSIVE":
            break
    if decision.status == "PASS" and stats.decide_ratio(others, TOLERANCE).status == "FAIL":
        return "INCONCLUSIVE", len(drawn)
    return decision.status, len(drawn)


def _stored(times: Noise, rng: np.random.Generator) -> tuple[Noise, Noise]:
    """(base, candidate): sessions of A at one time and of A2 at another, none at both."""
    n = OTHERS_SESSIONS
    while True:
        first, second = rng.integers(0, len(times) - n + 1, 2)
        if abs(first - second) >= n:
            break
    start = rng.integers(times.shape[1] - REPLAYED_ROUNDS + 1)
    rounds = slice(start, start + REPLAYED_ROUNDS)
    return times[first : first + n, rounds, 0], times[second : second + n, rounds, 1]


def mean_over_5_percent(times: Noise, effect: float, rng: np.random.Generator) -> Verdict:
    """Google's delegate_performance: the mean is over 105 % of the stored one's."""
    base, candidate = _stored(times, rng)
    slower = candidate.mean() * (1 + effect) > 1.05 * base.mean()
    return "FAIL" if slower else "PASS", OTHERS_SESSIONS


def mann_whitney_pooled(times: Noise, effect: float, rng: np.random.Generator) -> Verdict:
    """p < 0.01 that all inferences of the candidate are slower than all stored ones."""
    base, candidate = _stored(times, rng)
    p = mannwhitneyu(candidate.ravel() * (1 + effect), base.ravel(), alternative="greater", method="asymptotic").pvalue  # fmt: skip
    return "FAIL" if p < 0.01 else "PASS", OTHERS_SESSIONS


def p90_of_p90s(times: Noise, effect: float, rng: np.random.Generator) -> Verdict:
    """The p90 over sessions of each session's p90 is over 105 % of the stored one."""
    base, candidate = (np.quantile(np.quantile(x, 0.9, axis=1), 0.9) for x in _stored(times, rng))
    return "FAIL" if candidate * (1 + effect) > 1.05 * base else "PASS", OTHERS_SESSIONS


# ---------------------------------------------------------------------------------------- table


@dataclasses.dataclass(frozen=True)
class Row:
    """Counts of verdicts of one rule on one kind of noise, by true slowdown."""

    scenario: str
    rule: str
    effect: float
    passed: int
    failed: int
    trials: int
    sessions: float

    @property
    def undecided(self) -> int:
        return self.trials - self.passed - self.failed


def table(trials: int, seed: int) -> list[Row]:
    """Every scenario by every rule by every effect. The generator of a cell is its own."""
    rows = []
    for number, (scenario, name, change) in enumerate(SCENARIOS):
        recording = load(name)
        rng = np.random.default_rng([seed, number])
        wall = change(recording.wall, rng) if change else recording.wall
        # the same happens to both clocks
        rng = np.random.default_rng([seed, number])
        cpu = change(recording.cpu, rng) if change else recording.cpu
        cpus, walls = session_values(cpu), session_values(wall)
        rules: tuple[tuple[str, Callable[[float, np.random.Generator], Verdict]], ...] = (
            ("ours, 1 thread", lambda e, g, c=cpus, w=walls: ours(c, e, g, objecting=w)),
            ("ours, wall time alone", lambda e, g, w=walls: ours(w, e, g)),
            ("mean > 105 % of stored", lambda e, g, t=wall: mean_over_5_percent(t, e, g)),
            ("Mann-Whitney, pooled", lambda e, g, t=wall: mann_whitney_pooled(t, e, g)),
            ("p90 of p90s > 105 %", lambda e, g, t=wall: p90_of_p90s(t, e, g)),
        )
        for place, (label, rule) in enumerate(rules):
            for effect in EFFECTS:
                cell = np.random.default_rng([seed, number, place, round(1000 * effect)])
                rows.append(_row(scenario, label, effect, [rule(effect, cell) for _ in range(trials)]))  # fmt: skip
        if change is None:  # and the model that really has more layers
            cpus, walls = session_values(cpu, (0, 2)), session_values(wall, (0, 2))
            for label, binding, objecting in (("ours, 1 thread", cpus, walls), ("ours, wall time alone", walls, None)):  # fmt: skip
                cell = np.random.default_rng([seed, number, 99])
                verdicts = [ours(binding, 0.0, cell, objecting=objecting, is_same_model=False) for _ in range(trials)]  # fmt: skip
                rows.append(_row(f"{scenario}, real B", label, float(np.expm1(binding.mean())), verdicts))  # fmt: skip
    return rows


def _row(scenario: str, rule: str, effect: float, verdicts: Sequence[Verdict]) -> Row:
    statuses = [status for status, _ in verdicts]
    mean = statistics.fmean(n for _, n in verdicts)
    return Row(scenario, rule, effect, statuses.count("PASS"), statuses.count("FAIL"), len(verdicts), mean)  # fmt: skip


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927)."""
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def render(rows: Sequence[Row], trials: int) -> str:
    """P/F/I in % by true slowdown, and the intervals of the two rates that matter."""
    lines = []
    for name in ("quiet", "contended"):
        about = load(name).about
        lines.append(f"noise {name}: {', '.join(f'{k} {v}' for k, v in about.items() if k != 'models')}")  # fmt: skip
    lines.append(
        f"\nPASS/FAIL/INCONCLUSIVE in % by true slowdown, {trials} replays each, tolerance {TOLERANCE:.0%}; "
        "n = mean sessions at 0 %;\nfalse alarm = FAIL at 0 %, found = FAIL at 5 %, with 95 % intervals (Wilson)"
    )
    scenario = ""
    for first in [r for r in rows if r.effect == 0.0]:
        if first.scenario != scenario:
            scenario = first.scenario
            lines.append(f"\n{scenario}")
            lines.append(f"  {'rule':24}" + "".join(f"{e:>11.0%}" for e in EFFECTS) + "     n   false alarm       found")  # fmt: skip
        cells = {r.effect: r for r in rows if (r.scenario, r.rule) == (first.scenario, first.rule)}
        text = "".join(f"{_shares(cells[e]):>11}" for e in EFFECTS)
        alarm, found = (_interval(cells[e].failed, trials) for e in (0.0, 0.05))
        lines.append(f"  {first.rule:24}{text} {first.sessions:5.1f} {alarm:>13} {found:>11}")
    lines.append("\na model with 6.25 % more layers, really measured")
    lines += [
        f"  {r.scenario:24}{r.rule:23} {r.effect:+.1%} in all sessions: {_shares(r)}, {r.sessions:.1f} sessions, FAIL {_interval(r.failed, trials)} %"
        for r in rows
        if "real B" in r.scenario
    ]
    return "\n".join(lines)


def _shares(row: Row) -> str:
    return "/".join(f"{100 * n / row.trials:.0f}" for n in (row.passed, row.failed, row.undecided))


def _interval(hits: int, trials: int) -> str:
    low, high = wilson(hits, trials)
    return f"{100 * low:.1f}-{100 * high:.1f}"


if __name__ == "__main__":
    sys.exit(main())
