"""Why a verdict is what it is, in lines for a person: ops that grew, memory by stage, classes, what to change.

Reads only what the measurements hold (and the model, where it did not fit); says nothing where they
hold nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe import stats
from edgepipe.gate import Gate, Status, Verdict
from edgepipe.measurement import Measurement
from edgepipe.units import format_bytes, format_seconds

# The LiteRT profiler counts whole microseconds: of a model as fast as that, its operators' times are
# mostly rounding (each of a few dozen may be off by one), and only a growth of several is one.
GRAIN_S, TOO_FAST_S, SURE_GROWTH_S = 1e-6, 50e-6, 3e-6
SHOWN = 5  # lines of one kind; who wants all finds them in the record
# What a process does up to each reading of its memory (targets/linux/worker.py, work_memory).
MEMORY_STAGES = {
    "after_load": "loading and compiling (packed weights, arena)",
    "after_first": "the first inference",
    "steady": "later inferences",
}
MEMORY_QUANTITIES = {
    "anon": "anonymous memory (arena and packed weights)",
    "file": "resident part of the mapped model file",
    "peak": "peak resident memory",
    "size": "size of the model file",
}
# What to do about the causes that exclude sessions (bench.DISQUALIFYING).
REMEDIES = {
    "throttled": "the board throttled: cool it (heat sink, fan), check its power supply, or measure shorter sessions",
    "under-voltage": "the board's supply voltage dropped: use the power supply and cable its maker recommends",
    "swap-in": "the board swapped: stop what else uses its memory",
    "reboot": "the board rebooted: check its power supply",
    "clock jump": "the board's clock was set in mid-run: wait for its time synchronisation to settle",
}


def explain(gate: Gate, verdict: Verdict, measurements: Mapping[str, Measurement]) -> tuple[str, ...]:  # fmt: skip
    """Lines to add to ``verdict``, which ``gate`` gave on ``measurements``. None for a PASS."""
    if verdict.status is Status.PASS:
        return ()
    if verdict.status is Status.INCONCLUSIVE:
        if gate.scope == "model":
            return ()
        timing = verdict.gate in ("latency", "slowdown")
        # one without a value lacks evidence, which no quieter device would give
        undecided = timing and verdict.value is not None
        return (*why_unfit(measurements), *(what_to_change(measurements) if undecided else ()))
    name = verdict.gate
    if name == "slowdown":
        return ops_that_grew(measurements) or most_expensive_ops(measurements)
    if name == "latency":
        return most_expensive_ops(measurements)
    if name in ("memory", "growth"):
        return memory_by_stage(measurements, getattr(gate, "quantity", ""))
    if name == "device_agreement":
        return answers_that_differ(measurements)
    if name in ("device_accuracy_drop", "device_task_metric"):
        return (*answers_that_differ(measurements), *doubts_of_data(measurements), *classes_that_lost(measurements), *layers_that_lost(measurements))  # fmt: skip
    if name == "task_metric" and (known := float_score(verdict, measurements)):
        return known
    if name == "accuracy_drop" and (known := float_drop(verdict, measurements)):
        return (*known, *doubts_of_data(measurements), *classes_that_lost(measurements))
    if name in ("accuracy_drop", "task_metric", "parity"):
        return (*doubts_of_data(measurements), *classes_that_lost(measurements), *layers_that_lost(measurements))  # fmt: skip
    if name == "full_integer":
        return float_islands(measurements)
    return ()


# ----------------------------------------------------------------------------------------- ops


@dataclasses.dataclass(frozen=True)
class OpChange:
    """One op of the base, of the candidate, or the same op of both. Times in seconds."""

    name: str
    base_index: int | None
    base_s: float
    candidate_index: int | None
    candidate_s: float

    @property
    def growth_s(self) -> float:
        return self.candidate_s - self.base_s


def match_ops(base: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]) -> list[OpChange]:  # fmt: skip
    """Pair the ops of two models, in order, so that few ops have changed much.

    Ops are dicts with ``index``, ``name`` and ``seconds``. Only ops of one name pair; a pair costs
    the square root of the difference of their times, an op without a partner that of its own (the
    edit distance of Wagner & Fischer, 1974). The root makes one change of 290 us cheaper than 190
    and 100: most ops of a network have the same name, and a new one must not shift all after it.

    Example: base conv 500, conv 100; candidate conv 503, conv 290, conv 101 -> conv 290 is new.
    """
    rows, columns = len(base), len(candidate)
    times_b, times_c = ([float(op["seconds"]) for op in ops] for ops in (base, candidate))

    def pair(i: int, j: int) -> float:
        return math.sqrt(abs(times_b[i] - times_c[j]))

    cost = [[0.0] * (columns + 1) for _ in range(rows + 1)]  # of what is left from (i, j) on
    for i in range(rows, -1, -1):
        for j in range(columns, -1, -1):
            ways = []
            if i < rows:
                ways.append(cost[i + 1][j] + math.sqrt(times_b[i]))
            if j < columns:
                ways.append(cost[i][j + 1] + math.sqrt(times_c[j]))
            if i < rows and j < columns and base[i]["name"] == candidate[j]["name"]:
                ways.append(cost[i + 1][j + 1] + pair(i, j))
            cost[i][j] = min(ways, default=0.0)
    found: list[OpChange] = []
    i = j = 0
    while i < rows or j < columns:
        both = i < rows and j < columns and base[i]["name"] == candidate[j]["name"]
        if both and cost[i][j] == cost[i + 1][j + 1] + pair(i, j):
            found.append(OpChange(str(base[i]["name"]), base[i]["index"], times_b[i], candidate[j]["index"], times_c[j]))  # fmt: skip
            i, j = i + 1, j + 1
        elif i < rows and cost[i][j] == cost[i + 1][j] + math.sqrt(times_b[i]):
            found.append(OpChange(str(base[i]["name"]), base[i]["index"], times_b[i], None, 0.0))
            i += 1
        else:
            found.append(OpChange(str(candidate[j]["name"]), None, 0.0, candidate[j]["index"], times_c[j]))  # fmt: skip
            j += 1
    return found


def ops_that_grew(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """The ops that cost most more than in the baseline, and how much of the slowdown they are."""
    base, candidate = _ops(measurements, "op_time_baseline"), _ops(measurements, "op_time")
    if not base or not candidate:
        return ()
    changed = match_ops(base, candidate)
    total = sum(op.growth_s for op in changed)
    before, after = (sum(float(op["seconds"]) for op in ops) for ops in (base, candidate))
    lines = [f"all ops together: {format_seconds(before)} -> {format_seconds(after)} ({_signed(total)})"]  # fmt: skip
    least_s = GRAIN_S / 2
    if max(before, after) < TOO_FAST_S:
        lines, least_s = [_too_fast(max(before, after))], SURE_GROWTH_S
    grew = sorted((op for op in changed if op.growth_s > least_s), key=lambda op: -op.growth_s)[:SHOWN]  # fmt: skip
    for op in grew:
        if op.base_index is None:
            lines.append(f"new: op {op.candidate_index} {op.name}: {_signed(op.growth_s)}")
        else:
            lines.append(f"op {op.candidate_index} {op.name}: {format_seconds(op.base_s)} -> {format_seconds(op.candidate_s)} ({_signed(op.growth_s)})")  # fmt: skip
    gone = sum(op.base_s for op in changed if op.candidate_index is None and op.base_s > least_s)
    return (*lines, *([f"gone with ops of the baseline: {format_seconds(gone)}"] if gone else []))


def most_expensive_ops(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """The ops that cost most, with their share of all."""
    ops = _ops(measurements, "op_time")
    total = sum(float(op["seconds"]) for op in ops)
    if not ops:
        return ()
    if total < TOO_FAST_S:
        return (_too_fast(total),)
    first = sorted(ops, key=lambda op: -float(op["seconds"]))[:SHOWN]
    lines = [f"op {op['index']} {op['name']}: {format_seconds(float(op['seconds']))} ({float(op['seconds']) / total:.0%} of all ops)" for op in first]  # fmt: skip
    on_builtin = [op for op in ops if op.get("where") == "builtin"]
    share = sum(float(op["seconds"]) for op in on_builtin) / total
    if share >= 0.01:
        lines.append(f"{len(on_builtin)} of {len(ops)} ops ({share:.0%} of the time) are not delegated to XNNPACK")  # fmt: skip
    return tuple(lines)


def _ops(measurements: Mapping[str, Measurement], metric: str) -> Sequence[Mapping[str, Any]]:
    found = measurements.get(metric)
    return found.context.get("ops") or () if found else ()


def _too_fast(seconds: float) -> str:
    return f"operators are hardly told apart: the profiler counts whole microseconds, and all together they take {f'{seconds * 1e6:.0f} us' if seconds >= GRAIN_S else 'less than one'}"  # fmt: skip


def _signed(seconds: float) -> str:
    return ("+" if seconds >= 0 else "-") + format_seconds(abs(seconds))


# -------------------------------------------------------------------------------------- memory


def why_not_run(failure: Mapping[str, Any], model: Path) -> str:
    """What the agent says of a model that did not run, and how much memory was missing.

    What a model needs is at least its weights (of which XNNPACK packs a copy) and what its largest
    operator reads and writes; tensors that live longer, and the runtime, come on top. An allocation
    that the kernel refuses outright is an error of the runtime's that does not say so.
    """
    from edgepipe.tflite_ops.inspect import read_model

    said = str(failure["message"])
    free_bytes, peak_bytes = failure.get("memory_available_bytes"), failure.get("peak_rss_bytes")
    if failure.get("what") not in ("out-of-memory", "error") or free_bytes is None:
        return said
    graphs = read_model(model).subgraphs
    weights_bytes = sum({t.buffer: t.size_bytes for g in graphs for t in g.tensors if t.is_constant}.values())  # fmt: skip
    largest_bytes = max(
        (
            sum(g.tensors[i].size_bytes for i in {*op.inputs, *op.outputs} if i >= 0 and not g.tensors[i].is_constant)
            for g in graphs for op in g.operators
        ),
        default=0,
    )  # fmt: skip
    needed_bytes = weights_bytes + largest_bytes
    if failure["what"] == "error" and needed_bytes <= free_bytes:
        return said
    taken = f" and it had taken {format_bytes(peak_bytes)}" if peak_bytes else ""
    needed = (
        f"the model needs at least {format_bytes(needed_bytes)} ({format_bytes(weights_bytes)} of weights, "
        f"{format_bytes(largest_bytes)} for its largest operator)"
    )
    parts = [said, f"{format_bytes(free_bytes)} were free{taken}", needed]
    if needed_bytes > free_bytes:
        parts.append(f"at least {format_bytes(needed_bytes - free_bytes)} are missing")
    return "; ".join(parts)


def memory_by_stage(measurements: Mapping[str, Measurement], quantity: str) -> tuple[str, ...]:
    """Which quantity grew, and at which stage of a process's life."""
    if quantity not in MEMORY_QUANTITIES:
        return ()
    lines = [f"the quantity is {quantity}: {MEMORY_QUANTITIES[quantity]}"]
    now = _stages(measurements.get(f"memory_{quantity}"), quantity)
    before = _stages(measurements.get(f"memory_{quantity}_baseline"), quantity)
    for stage, meaning in MEMORY_STAGES.items():
        if stage not in now:
            continue
        text = f"{stage}, {meaning}: {_signed_bytes(now[stage])}"
        if stage in before:
            text += f", in the baseline {_signed_bytes(before[stage])}"
        lines.append(text)
    return tuple(lines)


def _stages(found: Measurement | None, quantity: str) -> dict[str, float]:
    """Bytes that each stage added, from the first session that read them all."""
    for stages in found.context.get("stages") or () if found else ():
        names = ("before_load", *MEMORY_STAGES)
        read = {name: float(stages[name][quantity]) for name in names if (stages.get(name) or {}).get(quantity) is not None}  # fmt: skip
        if len(read) == len(names):
            return {now: read[now] - read[before] for before, now in itertools.pairwise(names)}
    return {}


def _signed_bytes(value: float) -> str:
    return ("+" if value >= 0 else "-") + format_bytes(abs(value))


# ------------------------------------------------------------------------------------ accuracy


def classes_that_lost(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """The classes in which the shipped file is right less often than the reference."""
    found = measurements.get("device_accuracy_drop") or measurements.get("accuracy_drop")
    rows = [r for r in (found.context.get("by_class") or () if found else ()) if r["reference_right"] > r["right"]]  # fmt: skip
    rows.sort(key=lambda r: r["right"] - r["reference_right"])
    more = [f"and {len(rows) - SHOWN} more classes"] if len(rows) > SHOWN else []
    return (
        *(f"class {r['class']}: {r['right']} of {r['n']} right, the reference {r['reference_right']}" for r in rows[:SHOWN]),
        *more,
    )  # fmt: skip


def doubts_of_data(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """That calibration and evaluation data look prepared differently, where they do."""
    return next((tuple(m.context["doubts"]) for m in measurements.values() if m.context.get("doubts")), ())  # fmt: skip


def float_score(verdict: Verdict, measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """That the float file does not reach the floor either, where it does not: no layer is to blame."""
    found = measurements.get("task_metric_float")
    score = found.samples[0][0] if found is not None else math.inf
    if verdict.limit is None or score >= verdict.limit:
        return ()
    return (f"the float file it was made from reaches {score:.4g} on the same data: look at its training, at the labels and their order, not at its precision",)  # fmt: skip


def float_drop(verdict: Verdict, measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """That the float file loses more than is allowed, too, where it does: no layer of int8 is to blame."""
    found = [measurements.get(f"task_metric_{name}") for name in ("reference", "float")]
    reference, score = (m.samples[0][0] if m is not None else math.nan for m in found)
    lost = 100 * (reference - score)
    if verdict.limit is None or not lost > verdict.limit:
        return ()
    return (f"the float file it was made from loses {lost:.4g} points on the same data: look at the stages before int8, not at its precision",)  # fmt: skip


def answers_that_differ(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """Whether the board computes something else than this host on the same file, and where."""
    found = measurements.get("device_flips")
    if found is None:
        return ()
    count, samples = found.context["flipped"], found.context["samples"]
    if not count:
        return ("the device and this host answer every sample alike: the loss is the model's",)
    first = [
        f"sample {f['sample']}: {f['device']} there, {f['host']} here, labelled {f.get('label', 'nothing')}"
        for f in found.context["flips"][:SHOWN]
        if "host" in f
    ]  # fmt: skip
    return (f"the device answers {count} of {samples} samples otherwise than this host does with the same file", *first)  # fmt: skip


def layers_that_lost(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """The layers that add most quantisation noise, worst first, where they were looked at."""
    for found in measurements.values():
        layers = found.context.get("layers")
        if layers:
            return tuple(f"layer {layer['layer']} ({layer['operator']}): {layer['sqnr_db']:.1f} dB SQNR against its float twin" for layer in layers[:SHOWN])  # fmt: skip
    return ()


def float_islands(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """The operators that compute in floating point."""
    found = measurements.get("float_islands")
    islands = found.context.get("islands") or () if found else ()
    return tuple(f"{', '.join(i['computing'] or i['names'])} in floating point, up to tensor {i['output']}" for i in islands[:SHOWN])  # fmt: skip


# -------------------------------------------------------------------------------- inconclusive


def why_unfit(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """What to do about a device whose sessions did not count, by their recorded causes."""
    lines = []
    if any(m.context.get("simulated") for m in measurements.values()):
        lines.append("the null device simulates a board and proves nothing: measure on a real one")
    causes = {part for m in measurements.values() for cause in m.excluded.values() for part in cause.split(", ")}  # fmt: skip
    return (*lines, *(REMEDIES[cause] for cause in sorted(causes) if cause in REMEDIES))


def what_to_change(measurements: Mapping[str, Measurement]) -> tuple[str, ...]:
    """What would let an undecided verdict on latency be decided."""
    lines: list[str] = []
    timed = measurements.get("latency_wall") or measurements.get("latency_ratio_wall")
    if timed is None:
        return ()
    sessions = [s for s in timed.context.get("sessions") or () if isinstance(s, Mapping)]
    busy = sum(bool(s.get("contended")) for s in sessions)
    if busy:
        lines.append(f"other work ran on the device in {busy} of {len(sessions)} sessions: stop it, or judge CPU time with threads = 1")  # fmt: skip
    governor = timed.context.get("governor")
    governors = {str(g) for g in (governor if isinstance(governor, (list, tuple)) else [governor]) if g}  # fmt: skip
    if governors - {"performance"}:
        lines.append(f"the CPU governor is {', '.join(sorted(governors))}; a fixed clock is steadier: echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor")  # fmt: skip
    if timed.valid_sessions:
        spread = _session_spread(timed)
        size = f"{len(timed.valid_sessions)} sessions of {min(map(len, timed.valid_sessions))} samples"  # fmt: skip
        apart = f" whose medians lie {spread:.1%} apart" if spread else ""
        lines.append(f"there are {size}{apart}: more or longer ones tell more")  # fmt: skip
    return tuple(lines)


def _session_spread(found: Measurement) -> float:
    """(largest - smallest) / smallest median of a session."""
    medians = [stats.percentile(s, 0.5) for s in found.valid_sessions]
    return (max(medians) - min(medians)) / min(medians) if min(medians) > 0 else 0.0
