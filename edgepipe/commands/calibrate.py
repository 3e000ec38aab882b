"""``edgepipe calibrate``: how noisy a board is, and which slowdowns it can tell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.cli import Output
from edgepipe.commands.on_device import (
    add_device_arguments,
    find_target,
    measure_options,
    opened,
    tflite_model,
)

if TYPE_CHECKING:
    from edgepipe.calibration import Noise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a model against itself on a device and keep how much its sessions differ: from then\n"
        "on verdicts on that board quote it, for 30 days.\n\n"
        "  edgepipe calibrate --device ssh://pi@raspberrypi --profile rpi4b_4gb\n"
        "  edgepipe calibrate model.tflite --threads 4\n\n"
        "exit code 3: the model seems to differ from itself, so no verdict of this board can be trusted"
    )
    parser.add_argument("model", type=Path, nargs="?", help="the model, a .tflite file (default: an int8 network of the cost of MobileNetV2)")  # fmt: skip
    add_device_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    import dataclasses
    import tempfile

    from edgepipe.calibration import calibrate, detectable, save_noise
    from edgepipe.errors import EXIT_NOT_READY, EXIT_PASS
    from edgepipe.gate import Status, decide_sessions

    options, target = measure_options(args, command="calibrate"), find_target(args)
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = args.model
        if path is None:
            from edgepipe.tflite_ops.tiny import conv_tflite

            path = Path(folder) / "calibration.tflite"
            path.write_bytes(conv_tflite())
        model = tflite_model(path)
        with opened(target) as device:
            noise, measured = calibrate(model, device, target.profile, options)
    saved = save_noise(Path(args.store), noise)
    clock = "cpu" if noise.sd_cpu is not None else "wall"
    decision = decide_sessions(measured[f"latency_ratio_{clock}"], options.tolerance)
    same = decision.status == Status.PASS
    out.text(render(noise, options.tolerance, title=f"{target.profile.name} ({target.address})"))
    if not same:
        out.text(f"the model seems to differ from itself by {decision.estimate - 1:+.1%}: stop other work on the board, cool it, fix its clock, and calibrate again")  # fmt: skip
    out.text(f"kept in {saved}")
    table = {c: detectable(sd, options.tolerance) for c, sd in _deviations(noise).items()}
    out.json({"noise": dataclasses.asdict(noise), "path": str(saved), "tolerance": options.tolerance, "detectable": table, "agrees_with_itself": same})  # fmt: skip
    return EXIT_PASS if same else EXIT_NOT_READY


def _deviations(noise: Noise) -> dict[str, float]:
    return {c: sd for c, sd in (("cpu", noise.sd_cpu), ("wall", noise.sd_wall)) if sd is not None}


def render(noise: Noise, tolerance: float, *, title: str) -> str:
    """The table a person reads: noise, and what so many sessions can tell."""
    from edgepipe.calibration import detectable
    from edgepipe.report import Table, text_table
    from edgepipe.units import format_seconds, format_value

    rows = []
    looks: list[str] = []
    for clock, deviation in _deviations(noise).items():
        bias = noise.bias_cpu if clock == "cpu" else noise.bias_wall
        found = detectable(deviation, tolerance)
        looks = [f"{sessions} sessions" for sessions, _ in found]
        rows.append((clock, format_value(deviation, "ratio"), f"{100 * (bias or 0):+.2f} %", *(format_value(share, "ratio") for _, share in found)))  # fmt: skip
    header = ("time", "SD per session", "bias", *looks)
    head = (
        f"Noise of {title}: {noise.sessions} sessions x {noise.rounds} rounds at "
        f"{format_seconds(noise.latency_s)}, {noise.same.get('threads')} thread(s)"
        f"{', other work ran beside' if noise.contended else ''}"
    )
    note = f"The last columns: the smallest slowdown that FAILs in 9 of 10 comparisons, tolerance {format_value(tolerance, 'ratio')}."  # fmt: skip
    return f"{text_table(Table(head, header, tuple(rows)))}\n{note}"
