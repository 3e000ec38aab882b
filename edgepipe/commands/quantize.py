"""``edgepipe quantize``: any model to full-integer TFLite."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgepipe.adhoc import add_model_arguments
from edgepipe.cli import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantise a model to full int8 with representative data; converts it first where needed.\n\n"
        "  edgepipe quantize model.tflite --data samples.npz\n"
        "  edgepipe quantize model.onnx --data samples.npz --input-dtype uint8 --output-dtype float32\n"
        "  edgepipe quantize model.onnx --data samples.npz --max-drop '1 point' --evaluate labelled.npz"
    )
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="SAMPLES", help="representative inputs: x.npz, x.npy, file.py:function, or a TOML file with the keys of a [data.NAME] table")  # fmt: skip
    for door in ("input", "output"):
        parser.add_argument(f"--{door}-dtype", choices=("int8", "uint8", "float32"), default="int8", help=f"type of the model's {door}s (default: int8)")  # fmt: skip
    parser.add_argument("--allow-float", nargs="*", default=[], metavar="OP", help="operators that may stay in floating point")  # fmt: skip
    parser.add_argument("--allow-random", action="store_true", help="accept --data random, for smoke tests only")  # fmt: skip
    parser.add_argument("--method", choices=("min_max", "moving_average", "percentile", "mse", "kl"), default="min_max", help="how activation ranges follow from the samples (default: min_max)")  # fmt: skip
    parser.add_argument("--max-drop", metavar="'1 point'", help="climb the rescue ladder until the file loses no more than this; needs --evaluate")  # fmt: skip
    parser.add_argument("--evaluate", metavar="SAMPLES", help="inputs with labels to judge --max-drop by; not those of --data")  # fmt: skip
    parser.add_argument("--metric", default="top1", help="what --max-drop is a loss of: top1, ... or file.py:function (default: top1)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME_int8.tflite in this folder")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import adhoc
    from edgepipe.artifact import artifact_to_dict
    from edgepipe.errors import RequestError
    from edgepipe.rescue import rung_lines
    from edgepipe.store import check_output

    check_output(args.output)
    if bool(args.max_drop) != bool(args.evaluate):
        raise RequestError(
            "--max-drop and --evaluate go together",
            hint="--max-drop '1 point' --evaluate labelled.npz",
        )
    source = adhoc.model_source(args)
    names = (*adhoc.TO_FLOAT[adhoc.model_kind(source)], "quantize_int8")
    options = {
        "quantize_int8": {
            "input_dtype": args.input_dtype,
            "output_dtype": args.output_dtype,
            "allow_float": args.allow_float,
            "allow_random": args.allow_random,
            "method": args.method,
        }
    }
    data = adhoc.data_source(args.data)
    more = {}
    if args.max_drop:
        options["quantize_int8"] |= {"max_drop": args.max_drop, "evaluate": "validation", "metric": args.metric}  # fmt: skip
        more["validation"] = adhoc.data_source(args.evaluate)
    stages = [(n, options.get(n, {})) for n in names]
    model, output = adhoc.make_model(args, source, stages, data, suffix="_int8.tflite", more=more)
    out.text(f"{output}: {model.size_bytes} bytes, sha256 {model.sha256}")
    out.text(adhoc.model_text(model))
    islands = model.facts.get("float_islands", [])
    out.text(f"  float islands: {len(islands) or 'none'}")
    if "rescue" in model.facts:
        out.text("\n".join(f"  {line}" for line in rung_lines(model.facts["rescue"])))
    out.json({**artifact_to_dict(model), "output": str(output)})
    return 0
