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
        "  edgepipe quantize model.onnx --data samples.npz --input-dtype uint8 --output-dtype float32"
    )
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="SAMPLES", help="representative inputs: x.npz, x.npy, file.py:function, or a TOML file with the keys of a [data.NAME] table")  # fmt: skip
    for door in ("input", "output"):
        parser.add_argument(f"--{door}-dtype", choices=("int8", "uint8", "float32"), default="int8", help=f"type of the model's {door}s (default: int8)")  # fmt: skip
    parser.add_argument("--allow-float", nargs="*", default=[], metavar="OP", help="operators that may stay in floating point")  # fmt: skip
    parser.add_argument("--allow-random", action="store_true", help="accept --data random, for smoke tests only")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME_int8.tflite in this folder")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import adhoc
    from edgepipe.artifact import artifact_to_dict
    from edgepipe.store import check_output

    check_output(args.output)
    source = adhoc.model_source(args)
    names = (*adhoc.TO_FLOAT[adhoc.model_kind(source)], "quantize_int8")
    options = {
        "quantize_int8": {
            "input_dtype": args.input_dtype,
            "output_dtype": args.output_dtype,
            "allow_float": args.allow_float,
            "allow_random": args.allow_random,
        }
    }
    data = adhoc.data_source(args.data)
    stages = [(n, options.get(n, {})) for n in names]
    model, output = adhoc.make_model(args, source, stages, data, suffix="_int8.tflite")
    out.text(f"{output}: {model.size_bytes} bytes, sha256 {model.sha256}")
    out.text(adhoc.model_text(model))
    islands = model.facts.get("float_islands", [])
    out.text(f"  float islands: {len(islands) or 'none'}")
    out.json({**artifact_to_dict(model), "output": str(output)})
    return 0
