"""``edgepipe compare``: is a candidate slower or larger than a base, both measured side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgepipe.artifact import Artifact
    from edgepipe.bench import MeasureOptions
    from edgepipe.gate import Verdict
    from edgepipe.measurement import Measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure two TFLite files side by side in the same processes on a device, and judge whether\n"
        "the candidate is slower or needs more memory than the base. Sessions are added until that is\n"
        "clear, or their number is used up.\n\n"
        "  edgepipe compare released.tflite new.tflite\n"
        "  edgepipe compare released.tflite new.tflite --device ssh://pi@raspberrypi --profile rpi4b_4gb\n\n"
        "exit codes: 0 neither slower nor larger, 1 slower or larger, 3 cannot tell"
    )
    parser.add_argument("base", type=Path, help="the model to compare with, a .tflite file")
    parser.add_argument("candidate", type=Path, help="the model to judge, a .tflite file with the same inputs")  # fmt: skip
    parser.add_argument("--device", metavar="ADDRESS", help="where to measure: local or ssh://user@host[:port] (default: local, or the profile's from edgepipe.local.toml)")  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help="device profile that describes it (default: localhost)")  # fmt: skip
    parser.add_argument("--tolerance", metavar="RATIO", help='how much slower it may be (default: "3 %%")')  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the runtime (default: the profile's)")  # fmt: skip
    parser.add_argument("--max-sessions", type=int, metavar="N", help="give up after so many latency sessions (default: 12)")  # fmt: skip
    parser.add_argument("--session", metavar="TIME", help='how long one session measures (default: "2 s")')  # fmt: skip
    parser.add_argument("--budget", metavar="TIME", help='give up after this long (default: "10 min")')  # fmt: skip
    parser.add_argument("--samples", type=Path, metavar="FILE", help=".npz (arrays by input name) or .npy: also compare the candidate's outputs with this machine's")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    import dataclasses

    from edgepipe import bench
    from edgepipe.calibration import quote_noise
    from edgepipe.commands.bench import tflite_model
    from edgepipe.device import open_device
    from edgepipe.gate import EXIT_CODES, overall
    from edgepipe.inventory import resolve_targets
    from edgepipe.measurement import measurement_to_dict

    options = _options(args)
    base, candidate = tflite_model(args.base), tflite_model(args.candidate)
    address = "local" if args.device is None and args.profile is None else args.device
    (target,) = resolve_targets([], address=address, profile=args.profile)
    samples = None
    if args.samples:
        from edgepipe.tflite_ops.raw import read_samples
        from edgepipe.tflite_ops.run import refuse_crashing

        samples = read_samples(args.samples)
        refuse_crashing(args.candidate)  # to compare outputs it is run in this process as well
    device = open_device(target.address)
    try:
        result = bench.measure(
            candidate, device, target.profile, options, samples=samples, baseline=base
        )
    finally:
        device.close()
    measured = {m.metric: m for m in quote_noise(Path(args.store), result.measurements)}
    verdicts = judge(measured, candidate, options.tolerance, device=target.profile.name)
    out.text(render(verdicts, measured))
    status = overall(verdicts)
    out.json(
        {
            "base": {"path": str(args.base), "sha256": base.sha256},
            "candidate": {"path": str(args.candidate), "sha256": candidate.sha256},
            "profile": target.profile.name,
            "device": target.address,
            "device_facts": result.device_facts,
            "verdict": status.value,
            "verdicts": [dataclasses.asdict(v) for v in verdicts],
            "measurements": [measurement_to_dict(m) for m in measured.values()],
        }
    )
    return EXIT_CODES[status]


def _options(args: argparse.Namespace) -> MeasureOptions:
    from edgepipe.bench import MeasureOptions
    from edgepipe.errors import RequestError
    from edgepipe.schema import build

    names = ("tolerance", "threads", "max_sessions", "session", "budget")
    data: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    return build(MeasureOptions, data, where="edgepipe compare", error=RequestError)


def judge(
    measured: Mapping[str, Measurement], candidate: Artifact, tolerance: float, *, device: str
) -> tuple[Verdict, ...]:
    """Slowdown, and growth of memory and file, each with its explanation."""
    import dataclasses

    from edgepipe.explain import explain
    from edgepipe.gate import Evidence, Gate, GrowthGate, SlowdownGate, judge_all

    evidence = Evidence(candidate.sha256, device, measured)
    model = Evidence(candidate.sha256, "", {})
    (runs,) = judge_all([], model, [evidence])
    if runs.status == "FAIL":
        return (runs,)  # the rest was not measured, and says no more
    gates: tuple[Gate, ...] = (
        SlowdownGate(max=tolerance),
        GrowthGate(quantity="anon"),
        GrowthGate(quantity="file"),
        GrowthGate(quantity="size"),
    )
    judged = [(gate, judge_all([gate], model, [evidence])[-1]) for gate in gates]
    return tuple(
        dataclasses.replace(v, details=(*v.details, *explain(gate, v, measured)))
        for gate, v in judged
    )


def render(verdicts: Sequence[Verdict], measured: Mapping[str, Measurement]) -> str:
    """One sentence, what it rests on, and the other verdicts."""
    from edgepipe.explain import ops_that_grew

    lines = []
    for verdict in verdicts:
        is_ratio = verdict.gate == "slowdown" and verdict.value is not None
        lines.append(f"{verdict.status.value}: {'candidate is ' if is_ratio else ''}{verdict.reason}")  # fmt: skip
        lines += [f"  {line}" for line in verdict.details]
        if verdict.gate == "slowdown" and verdict.status != "FAIL":  # which explains itself by them
            ops = ops_that_grew(measured)
            lines += [f"  {line}" for line in (ops[:1] if verdict.status == "PASS" else ops)]
    mismatch = measured.get("device_mismatch")
    if mismatch is not None:
        lines.append(f"outputs: {mismatch.samples[0][0]:.2%} of the values differ from this machine's")  # fmt: skip
    return "\n".join(lines)
