"""Recipes made on the spot: what `convert`, `quantize` and `init` are pointed at on the command line."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe import pipeline
from edgepipe.artifact import Artifact
from edgepipe.bench import MeasureOptions
from edgepipe.data import DataSource
from edgepipe.errors import DataError, RequestError
from edgepipe.recipe import SOURCE_KINDS, Recipe, check_data, resolve_source
from edgepipe.schema import build, read_toml
from edgepipe.stage import Stage
from edgepipe.stages import stage_class
from edgepipe.stages.load import ModelSource, TensorOption
from edgepipe.store import Store, replacing

# The stages that lead from each kind of model to a float TFLite file.
TO_FLOAT = {
    "torch": ("export_onnx", "to_tflite"),
    "pt2": ("export_onnx", "to_tflite"),
    "onnx": ("to_tflite",),
    "tflite": (),
}
_INPUT = re.compile(r"^(\w[\w.:/-]*)=(\d+(?:x\d+)*)?(?::([A-Z]+))?$")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model: shared by convert, quantize and init."""
    parser.add_argument("model", help="model.onnx, model.pt2, model.tflite, or a builder: file.py:function or package.module:function")  # fmt: skip
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state dict for a builder (.safetensors, .pth)")  # fmt: skip
    parser.add_argument("--input", action="append", default=[], metavar="NAME=1x3x224x224[:NCHW]", help="an input of a builder, in order; may be repeated")  # fmt: skip
    add_state_argument(parser)


def add_state_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", action="append", default=[], metavar="INPUT=OUTPUT", help="an input that is state, and the output that feeds it at the next step (h=output_1); samples are then sequences; may be repeated")  # fmt: skip


def add_steps_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", choices=("last", "each"), default="last", help="which answers of a model with --state are judged by --evaluate: those of the last step of each sequence (default), or of each (labels: samples x steps)")  # fmt: skip


def check_steps(args: argparse.Namespace) -> None:
    """RequestError where ``--steps each`` has no steps, or nothing to judge them by."""
    if args.steps == "each" and not (args.state and args.evaluate):
        raise RequestError(
            "--steps each is for a model with state, judged by labels",
            hint="--state h=output_1 --evaluate labelled.npz --steps each",
        )


def parse_state(texts: Sequence[str]) -> dict[str, str]:
    """``["h=output_1"]`` -> ``{"h": "output_1"}``. Raises RequestError for anything else."""
    state = {}
    for text in texts:
        name, equals, output = text.rpartition("=")
        if not (name and equals and output):
            raise RequestError(
                f"--state {text!r} is not INPUT=OUTPUT", hint="like --state h=output_1"
            )
        state[name] = output
    return state


def model_source(args: argparse.Namespace) -> ModelSource:
    """The model that the arguments of `add_model_arguments` name. Raises RequestError for a file that is not there
    and for a builder without inputs.
    """
    inputs = []
    for text in args.input:
        match = _INPUT.match(text)
        if match is None:
            raise RequestError(f"--input {text!r} is not NAME=SHAPE", hint="like --input image=1x3x224x224, or with a layout: --input image=1x224x224x3:NHWC; a scalar: --input gain=")  # fmt: skip
        shape = tuple(int(n) for n in match[2].split("x")) if match[2] else ()
        inputs.append(TensorOption(name=match[1], shape=shape, layout=match[3] or ""))
    state = parse_state(args.state)
    root = Path.cwd()
    if Path(args.model).suffix.lower() in SOURCE_KINDS or ":" not in args.model:
        if not Path(args.model).is_file():
            raise RequestError(f"model file {args.model} does not exist", hint="check the path", code="no-such-file")  # fmt: skip
        return ModelSource(file=Path(args.model), weights=args.weights, inputs=tuple(inputs), state=state, root=root)  # fmt: skip
    if not inputs:
        raise RequestError(f"the inputs of builder {args.model} are not declared", hint="--input image=1x3x96x96, one for each")  # fmt: skip
    return ModelSource(
        builder=args.model, weights=args.weights, inputs=tuple(inputs), state=state, root=root
    )


def model_kind(source: ModelSource) -> str:
    """The artifact kind a source loads as; "torch" for anything that is no model file."""
    return SOURCE_KINDS.get(source.file.suffix.lower(), "torch") if source.file else "torch"


def data_source(text: str) -> DataSource:
    """Samples named on the command line.

    ``x.npz``, ``x.npy``, ``file.py:function``, ``random``, or a TOML file holding the keys of one
    ``[data.NAME]`` table of a recipe (for images and sounds, whose preprocessing must be declared).
    """
    root = Path.cwd()
    if text == "random":
        return DataSource(kind="random", limit=32)
    suffix = Path(text).suffix.lower()
    if suffix == ".toml":
        table = read_toml(Path(text), error=DataError)
        source = build(DataSource, table, where=text, error=DataError)
        source = resolve_source(source, Path(text).resolve().parent)
        problems: list[str] = []
        check_data(source, text, problems)
        if problems:
            raise DataError("\n  ".join(problems), hint=f"mend {text} and run again")
        return source
    if suffix in (".npz", ".npy"):
        if not Path(text).is_file():
            raise DataError(f"data file {text} does not exist", hint="check the path", code="no-such-file")  # fmt: skip
        options: dict[str, Any] = {"kind": suffix[1:], "path": text}
    elif ":" in text:
        options = {"kind": "python", "function": text}
    else:
        raise DataError(
            f"cannot tell how to read samples from {text!r}",
            hint="give x.npz, x.npy, file.py:function, random, or a TOML file with the keys of a [data.NAME] table "
            '(kind = "images", path = ..., [image] size = [h, w])',
        )
    return resolve_source(build(DataSource, options, where="--data", error=DataError), root)


def recipe_for(
    source: ModelSource,
    stages: Sequence[tuple[str, Mapping[str, Any]]],
    data: DataSource,
    more: Mapping[str, DataSource] | None = None,
) -> Recipe:
    """A recipe of these stages, all reading ``data`` as their calibration set, or ``more`` by name."""
    built: list[Stage] = [
        build(stage_class(name), dict(options), where=name, error=RequestError)
        for name, options in stages
    ]
    return Recipe(
        path=Path.cwd() / "adhoc", name="adhoc", seed=0, model=source, data={"calibration": data, **(more or {})},
        stages=tuple(built), evaluate=None, devices=(), measure=MeasureOptions(), gates=(),
    )  # fmt: skip


def make_model(
    args: argparse.Namespace,
    source: ModelSource,
    stages: Sequence[tuple[str, Mapping[str, Any]]],
    data: DataSource,
    *,
    suffix: str,
    more: Mapping[str, DataSource] | None = None,
) -> tuple[Artifact, Path]:
    """Run the stages and write the model to ``--output``, or to NAME + ``suffix`` in this folder."""
    model = pipeline.convert(recipe_for(source, stages, data, more), Store(Path(args.store)))
    output = args.output or Path(Path(args.model.partition(":")[0]).stem + suffix)
    write_model(model, output)
    return model, output


def write_model(artifact: Artifact, output: Path) -> None:
    """Copy a model out of the store; ``output`` appears only once it is whole."""
    with replacing(output) as temporary:
        shutil.copyfile(artifact.path, temporary)


def model_text(artifact: Artifact) -> str:
    """Inputs, outputs and parity of a converted model, as a person reads them."""
    lines = []
    for kind, specs in (("input", artifact.inputs), ("output", artifact.outputs)):
        for spec in specs:
            shape = "x".join(map(str, spec.shape))
            scale = f", scale {spec.scale:.6g}, zero point {spec.zero_point}" if spec.scale else ""
            lines.append(f"  {kind} {spec.name}: {shape} {spec.layout} {spec.dtype}{scale}")
    parity = artifact.facts.get("parity", {})
    for name, error in parity.get("outputs", {}).items():
        lines.append(f"  parity of {name}: SQNR {error['sqnr_db']:.1f} dB, max abs {error['max_abs']:.3g}, cosine {error['cosine']:.6f}")  # fmt: skip
    return "\n".join(lines)
