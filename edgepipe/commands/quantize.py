"""``edgepipe quantize``: any model to full-integer TFLite, or to every precision side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgepipe.adhoc import add_model_arguments, add_steps_argument
from edgepipe.cli import Output
from edgepipe.commands.on_device import add_device_arguments

if TYPE_CHECKING:
    from edgepipe.artifact import Artifact
    from edgepipe.data import DataSource
    from edgepipe.errors import EdgepipeError
    from edgepipe.inventory import Target
    from edgepipe.stages.load import ModelSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantise a model to full int8 with representative data; converts it first where needed.\n\n"
        "  edgepipe quantize model.tflite --data samples.npz\n"
        "  edgepipe quantize model.onnx --data samples.npz --input-dtype uint8 --output-dtype float32\n"
        "  edgepipe quantize model.onnx --data samples.npz --max-drop '1 point' --evaluate labelled.npz\n"
        "  edgepipe quantize model.onnx --data samples.npz --evaluate labelled.npz --all --device local"
    )
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="SAMPLES", help="representative inputs: x.npz, x.npy, file.py:function, or a TOML file with the keys of a [data.NAME] table")  # fmt: skip
    for door in ("input", "output"):
        parser.add_argument(f"--{door}-dtype", choices=("int8", "uint8", "float32"), default="int8", help=f"type of the model's {door}s (default: int8)")  # fmt: skip
    parser.add_argument("--allow-float", nargs="*", default=[], metavar="OP", help="operators that may stay in floating point")  # fmt: skip
    parser.add_argument("--allow-random", action="store_true", help="accept --data random, for smoke tests only")  # fmt: skip
    parser.add_argument("--samples", type=_sample_count, default="auto", metavar="auto|N", help="how many of --data to take ranges from: as many as it takes for them to settle, or at most N (0: all; default: auto)")  # fmt: skip
    parser.add_argument("--method", choices=("min_max", "moving_average", "percentile", "mse", "kl"), default="min_max", help="how activation ranges follow from the samples (default: min_max)")  # fmt: skip
    parser.add_argument("--max-drop", metavar="'1 point'", help="climb the rescue ladder until the file loses no more than this; needs --evaluate")  # fmt: skip
    parser.add_argument("--until", choices=("held", "sure"), default="held", help="with --max-drop: end at a file that holds perhaps by luck, or give layers 16 bits for certainty (default: held)")  # fmt: skip
    parser.add_argument("--evaluate", metavar="SAMPLES", help="inputs with labels to judge by, with --max-drop or --all; not those of --data")  # fmt: skip
    parser.add_argument("--metric", default="top1", help="the task metric of --evaluate: top1, ... or file.py:function (default: top1)")  # fmt: skip
    add_steps_argument(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME_int8.tflite in this folder; with --all a folder, default NAME_precisions")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="make every precision, and compare what they keep, their bytes and (with --device or --profile) their latency and memory there")  # fmt: skip
    add_device_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import adhoc
    from edgepipe.artifact import artifact_to_dict
    from edgepipe.errors import RequestError
    from edgepipe.rescue import rung_lines
    from edgepipe.store import check_output

    device = _device_given(args)
    if device and not args.all:
        raise RequestError(
            "a device is only measured with --all",
            hint="add --all, or measure one file: edgepipe bench FILE --device ADDRESS",
        )
    if (args.max_drop and not args.evaluate) or (args.evaluate and not (args.max_drop or args.all)):
        raise RequestError(
            "--max-drop and --evaluate go together",
            hint="--max-drop '1 point' --evaluate labelled.npz",
        )
    if args.until == "sure" and not args.max_drop:
        raise RequestError(
            "--until sure goes with --max-drop", hint="--max-drop '1 point' --until sure"
        )
    adhoc.check_steps(args)
    options: dict[str, Any] = {
        "input_dtype": args.input_dtype,
        "output_dtype": args.output_dtype,
        "allow_float": args.allow_float,
        "allow_random": args.allow_random,
        "method": args.method,
        "samples": args.samples,
    }
    source = adhoc.model_source(args)
    data = adhoc.data_source(args.data)
    more = {"validation": adhoc.data_source(args.evaluate)} if args.evaluate else {}
    if args.max_drop:
        options |= {
            "max_drop": args.max_drop,
            "until": args.until,
            "evaluate": "validation",
            "metric": args.metric,
            "steps": args.steps,
        }
    if args.all:
        return _run_all(args, out, source, data, more, options)
    check_output(args.output)
    names = (*adhoc.TO_FLOAT[adhoc.model_kind(source)], "quantize_int8")
    stages = [(n, options if n == "quantize_int8" else {}) for n in names]
    model, output = adhoc.make_model(args, source, stages, data, suffix="_int8.tflite", more=more)
    out.text(f"{output}: {model.size_bytes} bytes, sha256 {model.sha256}")
    out.text(adhoc.model_text(model))
    islands = model.facts.get("float_islands", [])
    out.text(f"  float islands: {len(islands) or 'none'}")
    if "rescue" in model.facts:
        out.text("\n".join(f"  {line}" for line in rung_lines(model.facts["rescue"])))
    out.json({**artifact_to_dict(model), "output": str(output)})
    return 0


def _sample_count(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number")
    return int(text)


def _device_given(args: argparse.Namespace) -> bool:
    return any(getattr(args, name, None) for name in ("device", "profile", "lab", "match"))


def _run_all(
    args: argparse.Namespace,
    out: Output,
    source: ModelSource,
    data: DataSource,
    more: dict[str, DataSource],
    options: dict[str, Any],
) -> int:
    """Every precision: made, compared, measured where there is a device; files stay in a folder."""
    import dataclasses

    from edgepipe import adhoc, frontier
    from edgepipe.commands.on_device import find_target, measure_options, opened
    from edgepipe.report import text_table
    from edgepipe.store import Store, check_output

    folder = args.output or Path(Path(args.model.partition(":")[0]).stem + "_precisions")
    check_output(folder / "float32.tflite")
    target: Target | None = find_target(args) if _device_given(args) else None
    # the float file is measured beside each of the others: three sessions of both tell enough
    measuring = measure_options(args, command="quantize", sessions=3, max_sessions=3, memory_sessions=1, energy=False)  # fmt: skip
    judged_by = more.get("validation", data)

    def make(*precisions: str) -> dict[str, Artifact | EdgepipeError]:
        return frontier.make_all(
            source, adhoc.TO_FLOAT[adhoc.model_kind(source)], data, Store(Path(args.store)), folder,
            precisions=precisions, int8=options, others={"allow_random": args.allow_random, "samples": args.samples}, more=more,
        )  # fmt: skip

    def compare(made: dict[str, Artifact | EdgepipeError]) -> list[frontier.Row]:
        return frontier.compare_all(
            made,
            judged_by,
            metric=args.metric,
            root=Path.cwd(),
            with_labels=bool(args.evaluate),
            steps=args.steps,
        )

    made = make(frontier.FLOAT)
    if args.evaluate:
        frontier.check_judged_by(made, data, judged_by)
    # labels that do not fit the metric are found before anything is quantised
    compare(made)
    made |= make(*(name for name in frontier.PRECISIONS if name != frontier.FLOAT))
    rows = compare(made)
    where, runtime, isa = "", None, None
    if target is not None:
        with opened(target) as device:
            rows = frontier.measure_all(rows, made, device, target, measuring)
        where = f"{target.profile.name} ({target.address})"
        runtime = (target.profile.runtime, target.profile.runtime_version)
        isa = frontier.isa_of(target)
    rows = [dataclasses.replace(row, why=frontier.why_slower(row, isa)) for row in rows]
    rows = frontier.mark_frontier(rows)
    out.text(text_table(frontier.frontier_table(rows, metric=args.metric, device=where)))
    out.text("\n".join(["", *frontier.notes(rows, runtime=runtime), f"files are in {folder}"]))
    out.json({
        "schema": 1, "folder": str(folder), "data": args.evaluate or args.data, "metric": args.metric, "device": where,
        "precisions": [dataclasses.asdict(row) for row in rows],
    })  # fmt: skip
    return 0
