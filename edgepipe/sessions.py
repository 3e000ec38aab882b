"""Sessions as a board reports them -> measurements in SI units. Pure: no device, no files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from edgepipe import stats
from edgepipe.measurement import Measurement, single
from edgepipe.metrics import METRICS
from edgepipe.units import format_bytes, format_seconds, format_value

Session = Mapping[str, Any]

# The arms of a measurement: one model by itself, or two side by side.
MODEL, BASE, CANDIDATE = "model", "base", "candidate"
# Load counts as cold when at most this share of the file's pages was still in memory.
COLD_RESIDENT_SHARE = 0.05
# A long run is steady from the first window on after which no median leaves this band around the
# median of its last third.
STEADY_BAND = 0.02
# Flags that disqualify a session, with the cause the record states. None depends on its latency.
DISQUALIFYING = {
    "throttled_now": "throttled",
    "throttle_event": "throttled",
    "cooling_rose": "throttled",
    "clock_jump": "clock jump",
    "swapped_in": "swap-in",
    "rebooted": "reboot",
    "under_voltage": "under-voltage",  # for which the firmware slows the clock down
}
MEMORY = ("memory_anon", "memory_file", "memory_peak")


def exclusion(session: Session, boot_id: object) -> str:
    """Why a session does not count, from causes independent of its latency; or an empty string."""
    causes = [DISQUALIFYING[flag] for flag in session["flags"] if flag in DISQUALIFYING]
    if session["before"].get("boot_id") != boot_id or session["after"].get("boot_id") != boot_id:
        causes.append("reboot")
    return ", ".join(sorted(set(causes)))


def round_ratios(session: Session, clock: str) -> tuple[float, ...]:
    """Candidate / base of each round of an A/B latency session; ``clock`` is ``cpu`` or ``wall``.

    Infinite where the base took no measurable time.
    """
    arms = session["data"]["arms"]
    base, candidate = arms[BASE], arms[CANDIDATE]
    scale = base["inner_loops"] / candidate["inner_loops"]
    pairs = zip(base[f"{clock}_ns"], candidate[f"{clock}_ns"], strict=True)
    return tuple(scale * b / a if a else float("inf") for a, b in pairs)


def to_measurements(
    sessions: Sequence[Session],
    context: Mapping[str, Any],
    *,
    threads: int,
    left_out: Container[str] = (),
) -> tuple[Measurement, ...]:
    """Sessions of a board -> measurements in SI units with their context.

    ``sessions`` have data, or were found to be unsupported and are passed over. Those with the arms
    ``base`` and ``candidate`` give the candidate's metrics, their ``_baseline`` twins (whose context
    has ``baseline_sha256`` and ``baseline_bytes`` for the model's) and the ratios by round.
    Nanoseconds of a batch are divided by its number of inferences. CPU latencies exist only with one
    thread, ``load_cold`` only counts sessions whose file really was out of the page cache. Of
    instructions each session gives one sample, the median over its inferences. Kinds in ``left_out``
    only showed that the model runs.
    """
    done = [s for s in sessions if s["data"] is not None and s["kind"] not in left_out]
    latency = [s for s in done if s["kind"] == "latency"]
    excluded = _excluded(latency, context["boot_id"])
    context = {
        **context,
        "contended": any(
            s["data"]["contended"] for i, s in enumerate(latency) if i not in excluded
        ),
        "sessions": [_session_context(s) for s in latency],
    }
    paired = any(BASE in s["arms"] for s in sessions)
    ours = CANDIDATE if paired else MODEL
    found = [single("runs_on_device", "", 1, context)]
    if latency:
        found += _latencies(latency, excluded, context, ours, threads)
    found += _memory(done, context, ours)
    found += _instructions(done, context, ours, "instructions")
    found += _op_time(done, context, ours, "op_time")
    if paired:
        theirs = _of_baseline(context)
        if latency:
            found += _ratios(latency, excluded, context, threads)
            found += [
                _renamed(m)
                for m in _latencies(latency, excluded, theirs, BASE, threads)
                if m.metric in ("latency_wall", "latency_cpu")
            ]
        found += [_renamed(m) for m in _memory(done, theirs, BASE) if m.metric in MEMORY]
        found += _instructions(done, theirs, BASE, "instructions_baseline")
        found += _op_time(done, theirs, BASE, "op_time_baseline")
        if context.get("model_bytes") and context.get("baseline_bytes"):
            found += [
                single("model_bytes", "B", context["model_bytes"], context),
                single("model_bytes_baseline", "B", context["baseline_bytes"], theirs),
            ]
    found += _sustained(done, context)
    found += _energy(done, context)
    return tuple(found)


def _excluded(sessions: Sequence[Session], boot_id: object) -> dict[int, str]:
    return {i: why for i, s in enumerate(sessions) if (why := exclusion(s, boot_id))}


def _of_baseline(context: Mapping[str, Any]) -> dict[str, Any]:
    swapped = {
        "model_sha256": context.get("baseline_sha256"),
        "model_bytes": context.get("baseline_bytes"),
    }
    return {**context, **swapped}


def _renamed(measurement: Measurement) -> Measurement:
    return Measurement(
        f"{measurement.metric}_baseline", measurement.unit, measurement.samples,
        measurement.warmups, measurement.excluded, measurement.context,
    )  # fmt: skip


def _one_per_session(
    metric: str, values: Iterable[float], excluded: Mapping[int, str], context: Mapping[str, Any]
) -> Measurement:
    rows = tuple((float(value),) for value in values)
    return Measurement(metric, METRICS[metric].unit, rows, excluded=dict(excluded), context=context)


def _latencies(
    latency: Sequence[Session],
    excluded: dict[int, str],
    context: Mapping[str, Any],
    arm: str,
    threads: int,
) -> list[Measurement]:
    arms = [s["data"]["arms"][arm] for s in latency]

    def batches(key: str) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(ns / 1e9 / a["inner_loops"] for ns in a[key]) for a in arms)

    warmups = tuple(tuple(ns / 1e9 for ns in a["warmup_wall_ns"]) for a in arms)
    found = [Measurement("latency_wall", "s", batches("wall_ns"), warmups, excluded, context)]
    if threads == 1:
        found.append(Measurement("latency_cpu", "s", batches("cpu_ns"), (), excluded, context))
    warm = dict(excluded)
    for i, a in enumerate(arms):
        share = a["cold"].get("resident_share")
        if share is None or share > COLD_RESIDENT_SHARE:
            warm.setdefault(i, "the file stayed in the page cache")
    for metric, values, left_out in (
        ("load", [a["load_ns"] for a in arms], excluded),
        ("load_cold", [a["cold"]["load_ns"] for a in arms], warm),
        ("first_inference", [a["first_inference_ns"] for a in arms], excluded),
    ):
        found.append(_one_per_session(metric, [ns / 1e9 for ns in values], left_out, context))
    return found


def _ratios(
    latency: Sequence[Session], excluded: dict[int, str], context: Mapping[str, Any], threads: int
) -> list[Measurement]:
    clocks = ("wall", "cpu") if threads == 1 else ("wall",)
    return [
        Measurement(
            f"latency_ratio_{clock}",
            "",
            tuple(round_ratios(s, clock) for s in latency),
            excluded=excluded,
            context=context,
        )
        for clock in clocks
    ]


def _memory(done: Sequence[Session], context: Mapping[str, Any], arm: str) -> list[Measurement]:
    memory = [s for s in done if s["kind"] == "memory" and s["arms"] == [arm]]
    excluded = _excluded(memory, context["boot_id"])
    context = {**context, "stages": [s["data"].get("stages") for s in memory]}
    found = []
    for metric, key in (
        *((m, m.removeprefix("memory_") + "_bytes") for m in MEMORY),
        ("measuring_overhead", "overhead_bytes"),
    ):
        values = [s["data"][key] for s in memory]
        if values and None not in values:
            found.append(_one_per_session(metric, values, excluded, context))
    return found


def _instructions(
    done: Sequence[Session], context: Mapping[str, Any], arm: str, metric: str
) -> list[Measurement]:
    data = [s["data"] for s in done if s["kind"] == "instructions" and s["arms"] == [arm]]
    if not data:
        return []
    counts = [[count - d["overhead"] for count in d["counts"]] for d in data]
    details = {
        "counter": data[0]["counter"],
        "counts": counts,
        "overhead": [d["overhead"] for d in data],
        "fixed_addresses": all(d["fixed_addresses"] for d in data),
    }
    # what disturbs a latency (heat, swapping, another clock) leaves the count alone
    return [_one_per_session(metric, map(statistics.median, counts), {}, {**context, **details})]


def _op_time(
    done: Sequence[Session], context: Mapping[str, Any], arm: str, metric: str
) -> list[Measurement]:
    sessions = [s for s in done if s["kind"] == "ops" and s["arms"] == [arm]]
    if not sessions:
        return []
    ops = [
        {"index": op["index"], "name": op["name"], "where": op["where"], "seconds": statistics.median(op["ns"]) / 1e9}
        for op in sessions[0]["data"]["ops"]
    ]  # fmt: skip
    total_s = sum(op["seconds"] for op in ops)
    delegated_s = sum(op["seconds"] for op in ops if op["where"] == "delegate")
    details = {"ops": ops, "delegated_share": delegated_s / total_s if total_s else None}
    excluded = _excluded(sessions[:1], context["boot_id"])
    if not total_s:
        excluded[0] = "every operator takes less than the profiler's microsecond"
    return [_one_per_session(metric, [total_s], excluded, {**context, **details})]


# --------------------------------------------------------------------------- sustained, energy


def steady_from(medians: Sequence[float], *, band: float = STEADY_BAND) -> int | None:
    """The first window from which on every median lies within ``band`` of the last third's median.

    The last third (two windows at least) must be steady as a whole, else None; the first window
    never counts, as a board that was warm before hides how it warms up.
    ``steady_from([9, 10.5, 11, 11.1, 11, 11]) == 2``.
    """
    third = max(2, len(medians) // 3)
    if len(medians) <= third:
        return None
    centre = statistics.median(medians[-third:])
    first = len(medians)
    while first > 1 and abs(medians[first - 1] - centre) <= band * centre:
        first -= 1
    return first if first <= len(medians) - third else None


def _sustained(done: Sequence[Session], context: Mapping[str, Any]) -> list[Measurement]:
    sessions = [s for s in done if s["kind"] == "sustained"]
    if not sessions:
        return []
    data = sessions[0]["data"]
    minutes = [
        {
            "start_s": m["start_s"],
            "count": m["count"],
            **{f"{key}_s": m["wall_ns"][key] / 1e9 for key in ("p50", "p90", "p99", "max")},
            "temperature_c": m.get("temperature_c"),
            "throttling": m.get("throttling"),
            "frequency_khz": m.get("frequency_khz"),
        }
        for m in data["minutes"]
    ]
    medians = [m["p50_s"] for m in minutes]
    first = steady_from(medians)
    steady = None
    # throttling is what a long run is there to show: it is reported, not left out
    excluded = {}
    if any(s.get("boot_id") != context["boot_id"] for s in (sessions[0]["before"], sessions[0]["after"])):  # fmt: skip
        excluded[0] = "reboot"
    elif first is None:
        excluded[0] = "no steady state"
    else:
        steady = {
            "from_s": minutes[first]["start_s"],
            "p50_s": statistics.median(medians[first:]),
            "p90_s": statistics.median(m["p90_s"] for m in minutes[first:]),
        }
    details = {
        "minutes": minutes,
        "window_s": data["window_s"],
        "steady": steady,
        "first_minute": {"p50_s": minutes[0]["p50_s"], "p90_s": minutes[0]["p90_s"]},
    }
    rows = (tuple(medians[first or 0 :]),)
    return [Measurement("sustained_latency", "s", rows, excluded=excluded, context={**context, **details})]  # fmt: skip


def _energy(done: Sequence[Session], context: Mapping[str, Any]) -> list[Measurement]:
    sessions = [s for s in done if s["kind"] == "energy"]
    if not sessions:
        return []
    data = sessions[0]["data"]
    power_w = data["run_w"] - data["idle_w"]
    joules = power_w * data["elapsed_ns"] / 1e9 / data["inferences"]
    details = {
        key: data.get(key)
        for key in ("method", "idle_w", "run_w", "samples_idle", "samples_run", "inferences", "elapsed_ns")
    }  # fmt: skip
    excluded = _excluded(sessions[:1], context["boot_id"])
    if power_w <= 0:
        excluded[0] = "running drew no more power than idling"
    return [_one_per_session("energy", [joules], excluded, {**context, **details})]


# --------------------------------------------------------------------------- context, progress


def _session_context(session: Session) -> dict[str, Any]:
    data, before, after = session["data"], session["before"], session["after"]
    arms = data["arms"]
    ours = arms.get(MODEL) or arms[CANDIDATE]
    return {
        "flags": session["flags"],
        "rounds": len(ours["wall_ns"]),
        **{
            key: ours.get(key)
            for key in ("inner_loops", "state", "output_sha256", "load_parts_ns")
        },
        **{
            key: data.get(key)
            for key in (
                "cpu_share", "contended", "cpu_clock", "run_queue_delay_ns", "order_seed",
                "involuntary_switches", "major_faults", "frequency_khz", "time_in_state",
                "runtime_load_ns",
            )
        },
        "temperature_before_c": before.get("temperature_c"),
        "temperature_after_c": after.get("temperature_c"),
        "throttling": after.get("throttling"),
        "loadavg_1min": after.get("loadavg_1min"),
        "memory_available_bytes": after.get("memory_available_bytes"),
        "swap_used_bytes": after.get("swap_used_bytes"),
    }  # fmt: skip


def progress(session: Session, number: int, total: int) -> str:
    """One line for the user on a finished session."""
    data = session["data"]
    text = _PROGRESS[session["kind"]](data, f"{number}/{total}")
    if session["arms"] in ([BASE], [CANDIDATE]):
        text = f"{session['arms'][0]}: {text}"
    return f"{text} [{', '.join(session['flags'])}]" if session["flags"] else text


def _latency_line(data: Mapping[str, Any], which: str) -> str:
    parts = []
    for name in (MODEL, BASE, CANDIDATE):
        if name in data["arms"]:
            arm = data["arms"][name]
            wall, cpu = (
                format_seconds(stats.percentile([ns / arm["inner_loops"] / 1e9 for ns in arm[key]], 0.5))
                for key in ("wall_ns", "cpu_ns")
            )  # fmt: skip
            parts.append(f"{'' if name == MODEL else name + ' '}p50 {wall}, cpu {cpu}")
    return f"session {which}: {'; '.join(parts)}"


def _memory_line(data: Mapping[str, Any], which: str) -> str:
    parts = [
        f"{name} {format_bytes(data[name + '_bytes'])}"
        for name in ("anon", "file", "peak")
        if data[name + "_bytes"] is not None
    ]
    return f"memory {which}: {', '.join(parts)}"


def _ops_line(data: Mapping[str, Any], which: str) -> str:
    total_s = sum(statistics.median(op["ns"]) for op in data["ops"]) / 1e9
    time = f"in {format_seconds(total_s)}" if total_s else "that take less than a microsecond each"
    return f"operators: {len(data['ops'])} {time}"


def _sustained_line(data: Mapping[str, Any], which: str) -> str:
    last = data["minutes"][-1]["wall_ns"]["p50"] / 1e9
    seconds = len(data["minutes"]) * data["window_s"]
    return f"sustained for {format_seconds(seconds)}: p50 {format_seconds(last)} at its end"


def _instructions_line(data: Mapping[str, Any], which: str) -> str:
    count = statistics.median(data["counts"]) - data["overhead"]
    return f"instructions {which}: {format_value(count, '')}"


_PROGRESS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "latency": _latency_line,
    "memory": _memory_line,
    "instructions": _instructions_line,
    "ops": _ops_line,
    "outputs": lambda data, which: f"outputs {which}: {data['count']} inferences",
    "sustained": _sustained_line,
    "energy": lambda data, which: (
        f"power {data['idle_w']:.2f} W idle, {data['run_w']:.2f} W running"
    ),
}
