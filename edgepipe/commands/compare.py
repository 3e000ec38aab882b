"""``edgepipe compare``: is a candidate slower or larger than a base, both measured side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    from collections.abc import Mapping, Sequence

    from edgepipe.artifact import Artifact
    from edgepipe.device.base import Device
    from edgepipe.errors import EdgepipeError
    from edgepipe.gate import Verdict
    from edgepipe.inventory import Target
    from edgepipe.measurement import Measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure two TFLite files side by side in the same processes on a device, and judge whether\n"
        "the candidate is slower or needs more memory than the base. Sessions are added until that is\n"
        "clear, or their number is used up. On an emulated board instructions decide (0.1 %).\n\n"
        "  edgepipe compare released.tflite new.tflite\n"
        "  edgepipe compare released.tflite new.tflite --device ssh://pi@raspberrypi --profile rpi4b_4gb\n\n"
        "On several boards at once it must be so on each.\n\n"
        "exit codes: 0 neither slower nor larger, 1 slower or larger, 3 cannot tell"
    )
    parser.add_argument("base", type=Path, help="the model to compare with, a .tflite file")
    parser.add_argument("candidate", type=Path, help="the model to judge, a .tflite file with the same inputs")  # fmt: skip
    add_device_arguments(parser)
    parser.add_argument("--tolerance", metavar="RATIO", help='how much slower it may be (default: "3 %%")')  # fmt: skip
    parser.add_argument("--max-sessions", type=int, metavar="N", help="give up after so many latency sessions, 3 at least (default: 12)")  # fmt: skip
    add_weight_cache_argument(parser)
    add_samples_argument(parser)
    add_signature_argument(parser, of="CANDIDATE and BASE, or of the one that has it")


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import bench
    from edgepipe.calibration import quote_noise
    from edgepipe.errors import EdgepipeError
    from edgepipe.gate import EXIT_CODES, Status, Verdict, overall
    from edgepipe.tflite_ops.flatbuffer import signature_graphs

    options = measure_options(args, command="compare")
    # of both; or of one, where the other is a file of its own
    keys = [args.signature if args.signature in signature_graphs(path) else "" for path in (args.base, args.candidate)]  # fmt: skip
    keys = keys if any(keys) else [args.signature] * 2  # refused, if it says anything
    base, candidate = (
        tflite_model(path, signature=key)
        for path, key in zip((args.base, args.candidate), keys, strict=True)
    )
    targets = find_targets(args)
    samples = read_samples(args, args.candidate)

    def work(device: Device, target: Target, stop: threading.Event) -> Compared:
        result = bench.measure(
            candidate, device, target.profile, options, samples=samples, baseline=base,
            same_inputs=True, stop=stop,
        )  # fmt: skip
        measured = {m.metric: m for m in quote_noise(Path(args.store), result.measurements)}
        verdicts = judge(measured, candidate, options.tolerance, device=target.name, profile=target.profile.name)  # fmt: skip
        return Compared(verdicts, measured, result.device_facts)

    def show(target: Target, found: Compared) -> str:
        text = render(found.verdicts, found.measured)
        return text if len(targets) == 1 else f"{target.name} ({target.address})\n{text}\n"

    compared = on_each(targets, work, show, out)
    verdicts = [
        verdict
        for target, found in compared
        for verdict in (
            [Verdict("runs_on_device", Status.INCONCLUSIVE, found.message, target.name)]
            if isinstance(found, EdgepipeError)
            else found.verdicts
        )
    ]
    status = overall(verdicts)
    named = {
        "base": {"path": str(args.base), "sha256": base.sha256},
        "candidate": {"path": str(args.candidate), "sha256": candidate.sha256},
        "verdict": status.value,
    }
    named |= {"signature": args.signature} if args.signature else {}
    boards = [_board(target, found) for target, found in compared]
    many = len(targets) > 1 or asks_for_many(args)
    out.json({**named, "boards": boards} if many else {**named, **boards[0]})
    return EXIT_CODES[status]


class Compared(NamedTuple):
    """What came of two models on one board."""

    verdicts: tuple[Verdict, ...]
    measured: Mapping[str, Measurement]
    device_facts: Mapping[str, Any]


def _board(target: Target, found: Compared | EdgepipeError) -> dict[str, Any]:
    """One board's entry in the JSON document."""
    import dataclasses

    from edgepipe.errors import EdgepipeError
    from edgepipe.gate import overall
    from edgepipe.measurement import measurement_to_dict

    named = {"name": target.name, "profile": target.profile.name, "device": target.address}
    if isinstance(found, EdgepipeError):
        return {**named, **found.as_dict()}
    return {
        **named,
        "device_facts": found.device_facts,
        "verdict": overall(found.verdicts).value,
        "verdicts": [dataclasses.asdict(v) for v in found.verdicts],
        "measurements": [measurement_to_dict(m) for m in found.measured.values()],
    }


def judge(
    measured: Mapping[str, Measurement],
    candidate: Artifact,
    tolerance: float,
    *,
    device: str,
    profile: str = "",
) -> tuple[Verdict, ...]:
    """Slowdown (of an emulated board: instructions), and growth of memory and file, each explained.

    Sizes of a file of several signatures and a file of one model are not judged: `render` says so."""
    import dataclasses

    from edgepipe.explain import explain
    from edgepipe.gate import Evidence, Gate, GrowthGate, InstructionsGate, SlowdownGate, judge_all

    evidence = Evidence(candidate.sha256, device, measured, profile=profile)
    model = Evidence(candidate.sha256, "", {})
    (runs,) = judge_all([], model, [evidence])
    if runs.status == "FAIL":
        return (runs,)  # the rest was not measured, and says no more
    # where nothing can be timed, instructions decide
    emulated = any(m.context.get("emulated") for m in measured.values())
    gates: tuple[Gate, ...] = (
        InstructionsGate() if emulated else SlowdownGate(max=tolerance),
        GrowthGate(quantity="anon"),
        GrowthGate(quantity="file"),
        *(() if _sizes_apart(measured) else (GrowthGate(quantity="size"),)),
    )
    judged = [(gate, judge_all([gate], model, [evidence])[-1]) for gate in gates]
    return tuple(
        dataclasses.replace(v, details=(*v.details, *explain(gate, v, measured)))
        for gate, v in judged
    )


def _sizes_apart(measured: Mapping[str, Measurement]) -> str:
    """Why the sizes of the two files are not compared; empty where they are."""
    from edgepipe.gate import other_kinds_of_file

    size = measured.get("model_bytes")
    return next(iter(other_kinds_of_file(size.context)), "") if size else ""


def render(verdicts: Sequence[Verdict], measured: Mapping[str, Measurement]) -> str:
    """One sentence, what it rests on, and the other verdicts."""
    from edgepipe import stats
    from edgepipe.explain import ops_that_grew
    from edgepipe.gate import instruction_change
    from edgepipe.units import format_value

    lines = []
    for verdict in verdicts:
        what = ""
        is_ratio = verdict.gate == "slowdown" and verdict.value is not None
        if is_ratio:
            what = "candidate is "
        elif verdict.gate == "runs_on_device":
            what = "candidate does not run on the device: "
        lines.append(f"{verdict.status.value}: {what}{verdict.reason}")
        lines += [f"  {line}" for line in verdict.details]
        if is_ratio and verdict.status == "INCONCLUSIVE":  # a FAIL explains itself by them
            lines += [f"  {line}" for line in ops_that_grew(measured)]
    if why := _sizes_apart(measured):
        lines.append(f"size: {why}")
    counts = [measured.get(name) for name in ("instructions", "instructions_baseline")]
    if counts[0] and counts[1] and not any(v.gate == "instructions" for v in verdicts):
        now, was = (stats.sessions_percentile(c.valid_sessions, 0.5) for c in counts if c)
        lines.append(f"instructions: {format_value(now, '')}, {instruction_change(now, was)} against the base")  # fmt: skip
    mismatch = measured.get("device_mismatch")
    if mismatch is not None:
        lines.append(f"outputs: {mismatch.samples[0][0]:.2%} of the values differ from this machine's")  # fmt: skip
    return "\n".join(lines)
