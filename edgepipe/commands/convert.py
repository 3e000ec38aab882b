"""``edgepipe convert``: any model to float TFLite."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgepipe.adhoc import add_model_arguments
from edgepipe.cli import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a model to float TFLite and prove that it computes the same.\n\n"
        "  edgepipe convert model.onnx --data samples.npz\n"
        "  edgepipe convert net.py:build --weights net.safetensors --input image=1x3x96x96"
    )
    add_model_arguments(parser)
    parser.add_argument("--data", default="random", metavar="SAMPLES", help="real inputs for the parity check: x.npz, x.npy, file.py:function, a TOML file, or random (default)")  # fmt: skip
    parser.add_argument("--route", choices=("auto", "all", "onnx2tf", "litert-torch", "tf"), default="auto", help="converter: auto stops at the first clean result (default), all compares every one")  # fmt: skip
    parser.add_argument("--streaming", action="store_true", help="the model's state shall last from one inference to the next (LSTM)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME.tflite in this folder")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    import logging

    from edgepipe import adhoc
    from edgepipe.artifact import artifact_to_dict
    from edgepipe.errors import RequestError
    from edgepipe.report import text_table
    from edgepipe.routes import attempts_table
    from edgepipe.store import check_output

    check_output(args.output)
    source = adhoc.model_source(args)
    names = adhoc.TO_FLOAT[adhoc.model_kind(source)]
    if not names:
        raise RequestError(f"{args.model} is a TFLite model already", hint=f"edgepipe quantize {args.model} --data SAMPLES")  # fmt: skip
    data = adhoc.data_source(args.data)
    if data.kind == "random":
        logging.getLogger("edgepipe").warning("parity is checked on random inputs; --data gives real ones")  # fmt: skip
    options = {"to_tflite": {"route": args.route, "streaming": args.streaming}}
    stages = [(n, options.get(n, {})) for n in names]
    model, output = adhoc.make_model(args, source, stages, data, suffix=".tflite")
    out.text(f"{output}: {model.size_bytes} bytes, sha256 {model.sha256}")
    out.text(adhoc.model_text(model))
    out.text(f"  route: {model.facts['route']}: {model.facts['route_reason']}")
    out.text(text_table(attempts_table(model.facts)))
    out.json({**artifact_to_dict(model), "output": str(output)})
    return 0
