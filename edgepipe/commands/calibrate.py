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
    from edgepipe.op_table import OpTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a model against itself on a device and keep how much its sessions differ: from then\n"
        "on verdicts on that board quote it, for 30 days.\n\n"
        "  edgepipe calibrate --device ssh://pi@raspberrypi --profile rpi4b_4gb\n"
        "  edgepipe calibrate model.tflite --threads 4\n\n"
        "With --ops, find out instead what operators cost there: latencies on that board are then\n"
        "predicted from measurements (`edgepipe inspect --profile`, prune to a latency), not guessed.\n\n"
        "  edgepipe calibrate --ops --device ssh://pi@raspberrypi --profile rpi4b_4gb\n\n"
        "exit code 3: the model seems to differ from itself, or the board is too noisy to tell"
    )
    parser.add_argument("model", type=Path, nargs="?", help="the model, a .tflite file (default: an int8 network of the cost of MobileNetV2)")  # fmt: skip
    parser.add_argument(
        "--ops", action="store_true", help="time operators of every kind: some five minutes"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    import dataclasses
    import tempfile

    from edgepipe.calibration import calibrate, detectable, save_noise
    from edgepipe.errors import EXIT_NOT_READY, EXIT_PASS
    from edgepipe.gate import Status, decide_sessions
    from edgepipe.store import check_output

    if args.ops:
        return _time_operators(args, out)
    options, target = measure_options(args, command="calibrate"), find_target(args)
    check_output(Path(args.store) / "calibration" / "noise.json", option="--store")
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
        differs = decision.status == Status.FAIL
        what = f"the model seems to differ from itself by {decision.estimate - 1:+.1%}" if differs else f"{decision.sessions} sessions cannot tell the model from one that is {options.tolerance:.0%} slower"  # fmt: skip
        out.text(f"{what}: stop other work on the board, cool it, fix its clock, and calibrate again")  # fmt: skip
    out.text(f"kept in {saved}")
    table = {c: detectable(sd, options.tolerance) for c, sd in _deviations(noise).items()}
    out.json({"noise": dataclasses.asdict(noise), "path": str(saved), "tolerance": options.tolerance, "detectable": table, "agrees_with_itself": same})  # fmt: skip
    return EXIT_PASS if same else EXIT_NOT_READY


def _time_operators(args: argparse.Namespace, out: Output) -> int:
    import dataclasses

    from edgepipe.errors import EXIT_PASS, RequestError
    from edgepipe.op_table import save_op_table
    from edgepipe.op_timing import SESSION, time_operators

    if args.model is not None:
        raise RequestError("--ops times models of its own, not yours", hint="leave the model out", code="bad-usage")  # fmt: skip
    short = {name: value for name, value in SESSION.items() if getattr(args, name, None) is None}
    options, target = measure_options(args, command="calibrate", **short), find_target(args)
    with opened(target) as device:
        table = time_operators(device, target.profile, options)
    saved = save_op_table(Path(args.store), target.profile, table)
    out.text(render_costs(table, title=f"{target.profile.name} ({target.address})"))
    out.text(f"kept in {saved}")
    out.json({"op_table": dataclasses.asdict(table), "path": str(saved)})
    return EXIT_PASS


def render_costs(table: OpTable, *, title: str) -> str:
    """What operators cost, for people: rates rather than seconds per MAC."""
    from edgepipe.report import Table, text_table
    from edgepipe.units import format_seconds, format_value

    rows = []
    for name, cost in table.costs.items():
        tile = "-" if cost.tile == (1, 1) else f"{cost.tile[0]} -> {cost.tile[1]}"
        rows.append((
            name, format_seconds(cost.op_s), f"{1e-9 / cost.mac_s:.3g}" if cost.mac_s else "-",
            f"{1e-9 / cost.byte_s:.3g}" if cost.byte_s else "-", tile, format_value(cost.error, "ratio"),
        ))  # fmt: skip
    header = ("operators", "each", "10^9 MAC/s", "GB/s", "whole channels", "error")
    head = f"Operators of {title}: {table.threads} thread(s), {format_seconds(table.invoke_s)} beside them"  # fmt: skip
    note = (
        'The last columns: channels (in -> out) that kernels work on at once, a "-" where they make no '
        "difference; and how far each model is off when it is predicted from the others (median)."
    )
    return f"{text_table(Table(head, header, tuple(rows)))}\n{note}"


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
