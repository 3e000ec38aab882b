"""``edgepipe bench``: one .tflite file on one device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output
from edgepipe.commands.on_device import (
    add_device_arguments,
    add_samples_argument,
    add_signature_argument,
    add_weight_cache_argument,
    asks_for_many,
    find_targets,
    measure_options,
    on_each,
    read_samples,
    tflite_model,
)

if TYPE_CHECKING:
    import threading

    from edgepipe.bench import BenchResult
    from edgepipe.device.base import Device
    from edgepipe.errors import EdgepipeError
    from edgepipe.inventory import Target
    from edgepipe.measurement import Measurement
    from edgepipe.report import Table

# Of the operators and of the windows of a long run, so many are shown.
OPS_SHOWN, WINDOWS_SHOWN = 5, 12
# Metrics that are not rows of the first table.
OWN_TABLE = ("runs_on_device", "sustained_latency")
KERNELS = ("xnnpack", "builtin")
BACKENDS = ("auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter")
# One-sided confidence of the p90 bounds, as in the latency gate.
CONFIDENCE = 0.99


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure latency, load time, memory, operators and (where the board can tell) instructions and\n"
        "energy of a TFLite file on a device; of an emulated one nothing is timed. Nothing is judged.\n\n"
        "  edgepipe bench model.tflite\n"
        "  edgepipe bench model.tflite --device ssh://pi@raspberrypi --profile rpi4b_4gb --sessions 5\n"
        "  edgepipe bench model.tflite --lab lab.toml --match soc=bcm2712\n\n"
        "exit code 1: the model crashes or cannot be loaded there; 3: a board could not be measured"
    )
    parser.add_argument("model", type=Path, help="the model, a .tflite file")
    add_device_arguments(parser)
    parser.add_argument("--sessions", type=int, metavar="N", help="latency sessions, a fresh process each (default: 3)")  # fmt: skip
    parser.add_argument("--warmup", metavar="TIME", help='warm-up before each session (default: "0.5 s")')  # fmt: skip
    parser.add_argument("--memory-sessions", type=int, metavar="N", help="memory sessions (default: 2)")  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, help="demand one way of running the model (default: auto, the first that works)")  # fmt: skip
    parser.add_argument("--benchmark-model", type=Path, metavar="FILE", help="measure with this program, Google's benchmark_model built for the device, in place of our own runner; its figures have names of their own")  # fmt: skip
    parser.add_argument("--kernel", choices=KERNELS, help="demand one kind of kernels (default: the runtime's own choice)")  # fmt: skip
    add_weight_cache_argument(parser)
    parser.add_argument("--sustained", metavar="TIME", help='then run for this long, like "10 min", and report the steady state; not part of the budget')  # fmt: skip
    parser.add_argument("--no-ops", action="store_false", dest="ops", help="do not time single operators")  # fmt: skip
    parser.add_argument("--affinity", metavar="CPUS", help="stay on these CPUs of the device, like 0,1")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the random inputs (default: 0)")  # fmt: skip
    add_samples_argument(parser)
    add_signature_argument(parser, of="MODEL")
    parser.add_argument("--keep", action="store_true", help="leave the job's files on the device")


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import bench
    from edgepipe.errors import EXIT_FAIL, EXIT_NOT_READY, EXIT_PASS, EdgepipeError

    options = measure_options(args, command="bench", affinity=_affinity(args.affinity))
    model, targets = tflite_model(args.model, signature=args.signature), find_targets(args)
    samples = read_samples(args, args.model)

    def work(device: Device, target: Target, stop: threading.Event) -> BenchResult:
        if args.benchmark_model is not None:
            from edgepipe import benchmark_model

            return benchmark_model.measure(
                model, device, target.profile, options, binary=args.benchmark_model
            )
        return bench.measure(
            model, device, target.profile, options, samples=samples, keep=args.keep, stop=stop
        )

    def show(target: Target, result: BenchResult) -> str:
        emulated = any(m.context["emulated"] for m in result.measurements)
        which = f" signature {args.signature}" if args.signature else ""
        title = f"{args.model}{which} on {target.name} ({target.address}){' (emulated)' * emulated}"
        return render(result, title)

    measured = on_each(targets, work, show, out)
    named = {"model": str(args.model), "model_sha256": model.sha256}
    named |= {"signature": args.signature} if args.signature else {}
    boards = [_board(target, outcome) for target, outcome in measured]
    many = len(targets) > 1 or asks_for_many(args)
    out.json({**named, "boards": boards} if many else {**named, **boards[0]})
    if not all(isinstance(outcome, EdgepipeError) or _runs(outcome) for _, outcome in measured):
        return EXIT_FAIL
    failed = any(isinstance(outcome, EdgepipeError) for _, outcome in measured)
    return EXIT_NOT_READY if failed else EXIT_PASS


def _board(target: Target, outcome: BenchResult | EdgepipeError) -> dict[str, Any]:
    """One board's entry in the JSON document."""
    from edgepipe.errors import EdgepipeError
    from edgepipe.measurement import measurement_to_dict

    named = {"name": target.name, "profile": target.profile.name, "device": target.address}
    if isinstance(outcome, EdgepipeError):
        return {**named, **outcome.as_dict()}
    measurements = [measurement_to_dict(m) for m in outcome.measurements]
    return {**named, "device_facts": outcome.device_facts, "measurements": measurements}


def _runs(result: BenchResult) -> bool:
    runs = next(m for m in result.measurements if m.metric == "runs_on_device")
    return bool(runs.samples[0][0])


def _affinity(text: str | None) -> list[int] | None:
    from edgepipe.errors import RequestError

    try:
        return None if text is None else [int(cpu) for cpu in text.split(",")]
    except ValueError as exc:
        raise RequestError(
            f"--affinity {text!r} is no list of CPU numbers", hint="write --affinity 0,1"
        ) from exc


def render(result: BenchResult, title: str) -> str:
    """The tables a person reads."""
    from edgepipe.report import Table, context_table, text_table

    measured = {m.metric: m for m in result.measurements}
    runs = measured["runs_on_device"]
    if not runs.samples[0][0]:
        rows = [("runs on the device", "NO"), ("reason", str(runs.context["reason"]))]
        stderr = str(runs.context["cause"].get("stderr", "")).splitlines()
        rows += [("its last words", line) for line in stderr[-3:]]
        return text_table(Table(title, ("what", "value"), tuple(rows)))
    bounds = f"p90, {CONFIDENCE:.0%} bounds"
    header = ("metric", "p50", "p90", bounds, "sessions x samples")
    tables = [
        Table(
            title, header, tuple(_row(m) for m in result.measurements if m.metric not in OWN_TABLE)
        ),
        _ops_table(measured.get("op_time")),
        _sustained_table(measured.get("sustained_latency")),
        context_table(measured),
    ]
    tables = [table for table in tables if table.rows]
    notes = _notes(measured)
    return "\n\n".join([*(text_table(t) for t in tables), *(["\n".join(notes)] if notes else [])])


def _row(measurement: Any) -> tuple[str, str, str, str, str]:
    from edgepipe import stats
    from edgepipe.units import format_value

    sessions, unit = measurement.valid_sessions, measurement.unit
    if not sessions:
        return measurement.metric, "no valid session", "", "", f"0 of {len(measurement.samples)}"
    p50 = format_value(stats.sessions_percentile(sessions, 0.5), unit)
    size = f"{len(sessions)} x {min(len(s) for s in sessions)}"
    if all(len(s) == 1 for s in sessions):
        return measurement.metric, p50, "", "", size
    low = stats.sessions_lower_bound(sessions, 0.9, CONFIDENCE)
    high = stats.sessions_upper_bound(sessions, 0.9, CONFIDENCE)
    if low is None or high is None:
        interval = "too few samples"
    else:
        interval = f"{format_value(low, unit)} to {format_value(high, unit)}"
    p90 = format_value(stats.sessions_percentile(sessions, 0.9), unit)
    return measurement.metric, p50, p90, interval, size


def _ops_table(op_time: Measurement | None) -> Table:
    """The operators that cost most, and how much of the time XNNPACK has."""
    from edgepipe.report import Table
    from edgepipe.units import format_seconds

    total_s = op_time.samples[0][0] if op_time else 0.0
    if op_time is None or not total_s:
        return Table("", (), ())
    ops = op_time.context["ops"]
    most = sorted(ops, key=lambda op: -float(op["seconds"]))[:OPS_SHOWN]
    rows = tuple(
        (str(op["index"]), op["name"], op["where"], format_seconds(op["seconds"]), f"{op['seconds'] / total_s:.1%}")
        for op in most
    )  # fmt: skip
    share = op_time.context["delegated_share"]
    title = f"Operators: the first {len(most)} of {len(ops)} by time; {share:.1%} of the time is delegated"
    return Table(title, ("op", "name", "where", "median", "share"), rows)


def _sustained_table(measurement: Measurement | None) -> Table:
    """A long run window by window: the first ones, evenly chosen others, the last."""
    from edgepipe.report import Table
    from edgepipe.units import format_seconds

    if measurement is None:
        return Table("", (), ())
    context = measurement.context
    minutes, steady = context["minutes"], context["steady"]
    step = -(-len(minutes) // WINDOWS_SHOWN)
    shown = sorted({*range(0, len(minutes), step), len(minutes) - 1})
    rows = tuple(
        (
            f"{m['start_s']:.0f} s",
            format_seconds(m["p50_s"]),
            format_seconds(m["p90_s"]),
            "" if m["temperature_c"] is None else f"{m['temperature_c']:.1f} C",
            ", ".join(m["throttling"] or []),
        )
        for m in (minutes[i] for i in shown)
    )
    title = f"Sustained, windows of {context['window_s']:g} s: "
    if steady is None:
        title += measurement.excluded[0]
    else:
        title += (
            f"steady from {steady['from_s']:.0f} s on: p50 {format_seconds(steady['p50_s'])}, "
            f"p90 {format_seconds(steady['p90_s'])} (first window: p50 "
            f"{format_seconds(context['first_minute']['p50_s'])})"
        )
    return Table(title, ("from", "p50", "p90", "temperature", "throttling"), rows)


def _notes(measured: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the figures."""
    context, notes = measured["runs_on_device"].context, []
    if context["emulated"]:
        left = (
            "outputs only"
            if "memory" in context["not_measured"]
            else "instructions, memory and outputs"
        )
        notes.append(f"note: this board is emulated ({context['emulated']}): nothing is timed; compare {left}")  # fmt: skip
    elif why_not := context["not_measured"].get("instructions"):
        notes.append(f"note: no instructions: {why_not}")
    if context["contended"]:
        shares = ", ".join(f"{s['cpu_share']:.0%}" for s in context["sessions"])
        notes.append(f"note: the device was busy with other work (CPU time / wall time {shares}): trust latency_cpu")  # fmt: skip
    for metric, measurement in measured.items():
        if metric in OWN_TABLE:
            continue
        for session, cause in sorted(measurement.excluded.items()):
            notes.append(f"note: {metric}: session {session + 1} does not count: {cause}")
    flags = sorted({flag for s in context["sessions"] for flag in s["flags"]})
    if flags:
        notes.append(f"note: flags: {', '.join(flags)}")
    if context["runtime_differs_from_profile"]:
        notes.append("note: measured with another runtime than the profile's")
    notes += [f"note: not as the profile says: {text}" for text in context["departs_from_profile"]]
    if context["simulated"]:
        notes.append("note: a null device made these figures up: no gate passes on them")
    if context.get("resumed_sessions"):
        notes.append(f"note: {context['resumed_sessions']} sessions are from an interrupted run of the same measurement")  # fmt: skip
    if any(s["state"] == "kept" for s in context["sessions"]):
        notes.append("note: the model keeps state between inferences; it was not reset")
    return notes
