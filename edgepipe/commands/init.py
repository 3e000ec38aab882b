"""``edgepipe init``: a commented recipe for a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.adhoc import add_model_arguments
from edgepipe.cli import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgepipe.data import DataSource
    from edgepipe.stages.load import ModelSource, TensorOption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a commented recipe for a model.\n\n"
        "  edgepipe init model.onnx --data samples.npz\n"
        "  edgepipe init net.py:build --weights net.safetensors --input image=1x3x96x96"
    )
    add_model_arguments(parser)
    parser.add_argument("--data", default="", metavar="SAMPLES", help="representative samples: x.npz, x.npy or file.py:function")  # fmt: skip
    parser.add_argument("--profile", default="localhost", help="device profile to measure on (default: localhost)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("recipe.toml"), metavar="FILE", help="default: recipe.toml")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import adhoc
    from edgepipe.errors import RequestError
    from edgepipe.profile import find_profile
    from edgepipe.resources import profile_paths

    if args.output.exists():
        raise RequestError(f"{args.output} exists", hint="remove it or choose another --output")
    find_profile(args.profile, profile_paths())
    source = adhoc.model_source(args)
    if source.file and not source.resolve(source.file).is_file():
        raise RequestError(f"model file {source.file} does not exist", hint="check the path", code="no-such-file")  # fmt: skip
    if source.builder and not source.inputs:
        raise RequestError("the inputs of a builder must be declared", hint=f"edgepipe init {args.model} --input image=1x3x96x96")  # fmt: skip
    data = adhoc.data_source(args.data) if args.data else None
    kind = adhoc.model_kind(source)
    stages = (*adhoc.TO_FLOAT[kind], "quantize_int8")
    text = recipe_text(source, stages, data, args.data, args.profile, args.output.resolve().parent)
    part = args.output.with_name(f".{args.output.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(args.output)
    out.text(f"wrote {args.output}; next: edgepipe check {args.output}")
    out.json({"recipe": str(args.output), "stages": list(stages)})
    return 0


def recipe_text(
    source: ModelSource, stages: Sequence[str], data: DataSource | None,
    data_name: str, profile: str, folder: Path,
) -> str:  # fmt: skip
    """The recipe as TOML with comments; paths are relative to ``folder``, where it will lie."""

    def relative(path: Path | str) -> str:
        return os.path.relpath(Path(path), folder)

    def reference(text: str) -> str:
        module, colon, function = text.partition(":")
        return f"{relative(module)}:{function}" if module.endswith(".py") else module + colon + function  # fmt: skip

    lines = [
        "# An edgepipe recipe: model, data, stages, devices, gates.",
        "# `edgepipe check` finds mistakes without running anything, `edgepipe run` runs it.",
        "schema = 1",
        f'name = "{folder.name or "model"}"',
        "seed = 0",
        "# Device profiles to measure on (`edgepipe devices list`). The address of a board comes from",
        "# --device ssh://user@host or from edgepipe.local.toml, never from here.",
        f'devices = ["{profile}"]',
        "",
        "[model]",
    ]
    if source.file:
        lines.append(f'file = "{relative(source.resolve(source.file))}"')
    else:
        lines.append(f'builder = "{reference(source.builder)}"')
        lines.append(
            f'weights = "{relative(source.resolve(source.weights))}"'
            if source.weights
            else '# weights = "model.safetensors"   # without it the model starts from random weights'
        )
    for option in source.inputs:
        lines += ["", *_input_lines(option)]
    lines += ["", "# Representative samples, prepared as the model wants them: a few hundred real ones.", "[data.calibration]"]  # fmt: skip
    if data is not None and data.kind == "python":
        lines += ['kind = "python"', f'function = "{reference(data.function)}"']
    elif data is not None and data.path is not None:
        lines += [f'kind = "{data.kind}"', f'path = "{relative(data.path)}"']
    else:
        lines += [
            'kind = "npz"',
            'path = "calibration.npz"   # one array for each input, by its name',
        ]
    lines += [
        "",
        "# Labelled samples that calibration has not seen, to count the accuracy drop on.",
        "# [data.test]",
        '# kind = "npz"',
        '# path = "test.npz"          # and an array called labels',
        "# [evaluate]",
        '# data = "test"',
        '# metric = "top1"',
    ]
    for stage in stages:
        lines += ["", "[[stages]]", f'stage = "{stage}"']
        if stage == "quantize_int8":
            lines += ['# input_dtype = "uint8"      # int8 (default), uint8 or float32', '# output_dtype = "float32"']  # fmt: skip
    lines += [
        "",
        "[measure]",
        "threads = 1",
        "sessions = 3                 # fresh processes on the device",
        "",
        "# Every gate must PASS for exit code 0. Adjust the limits to your device.",
        "[[gates]]",
        'gate = "latency"',
        'max = "100 ms"',
        'statistic = "p90"',
        "",
        "[[gates]]",
        'gate = "memory"',
        'max = "100 MB"',
        "",
        "[[gates]]",
        'gate = "size"',
        'max = "20 MB"',
        "",
        "[[gates]]",
        'gate = "full_integer"',
        "",
        "# [[gates]]",
        '# gate = "accuracy_drop"',
        '# max = "1 point"',
    ]
    return "\n".join(lines) + "\n"


def _input_lines(option: TensorOption) -> list[str]:
    lines = ["[[model.inputs]]", f'name = "{option.name}"', f"shape = {list(option.shape)}"]
    return lines + ([f'layout = "{option.layout}"'] if option.layout else [])
