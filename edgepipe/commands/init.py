"""``edgepipe init``: a commented recipe for a model."""

from __future__ import annotations

import argparse
import json
import os
import re
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
    from edgepipe.stages.load import check_file, check_source
    from edgepipe.store import check_output, replacing

    check_output(args.output)
    if args.output.exists():
        raise RequestError(f"{args.output} exists", hint="remove it or choose another --output")
    find_profile(args.profile, profile_paths())
    source = adhoc.model_source(args)
    check_source(source)
    check_file(source)
    data = adhoc.data_source(args.data) if args.data else None
    if data is not None and data.kind not in ("npz", "npy", "python"):
        raise RequestError(
            f"init writes a recipe for x.npz, x.npy or file.py:function, not for {args.data!r}",
            hint="leave --data out and write the table [data.calibration] into the recipe yourself",
        )
    kind = adhoc.model_kind(source)
    stages = (*adhoc.TO_FLOAT[kind], "quantize_int8")
    text = recipe_text(source, stages, data, args.profile, args.output.resolve().parent)
    with replacing(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    out.text(f"wrote {args.output}; next: edgepipe check {args.output}")
    out.json({"recipe": str(args.output), "stages": list(stages)})
    return 0


def recipe_text(
    source: ModelSource, stages: Sequence[str], data: DataSource | None,
    profile: str, folder: Path,
) -> str:  # fmt: skip
    """The recipe as TOML with comments; paths are relative to ``folder``, where it will lie."""

    def relative(path: Path | str) -> str:
        return _quoted(os.path.relpath(Path(path), folder))

    def reference(text: str) -> str:
        module, _, function = text.partition(":")
        return _quoted(f"{os.path.relpath(module, folder)}:{function}" if module.endswith(".py") else text)  # fmt: skip

    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.name)[:100].strip("-._")
    lines = [
        "# An edgepipe recipe: model, data, stages, devices, gates.",
        "# `edgepipe check` finds mistakes without running anything, `edgepipe run` runs it.",
        "schema = 1",
        f'name = "{name or "model"}"',
        "seed = 0",
        "# Device profiles to measure on (`edgepipe devices list`). The address of a board comes from",
        "# --device ssh://user@host or from edgepipe.local.toml, never from here.",
        f"devices = [{_quoted(profile)}]",
        "",
        "[model]",
    ]
    if source.file:
        lines.append(f"file = {relative(source.resolve(source.file))}")
    else:
        lines.append(f"builder = {reference(source.builder)}")
        lines.append(
            f"weights = {relative(source.resolve(source.weights))}"
            if source.weights
            else '# weights = "model.safetensors"   # without it the model starts from random weights'
        )
    for option in source.inputs:
        lines += ["", *_input_lines(option)]
    if source.state:
        lines += ["", "# input = the output that feeds it at the next step", "[model.state]"]
        lines += [f"{_quoted(name)} = {_quoted(output)}" for name, output in source.state.items()]
    lines += ["", "# Representative samples, prepared as the model wants them: a few hundred real ones.", "[data.calibration]"]  # fmt: skip
    if data is not None and data.kind == "python":
        lines += ['kind = "python"', f"function = {reference(data.function)}"]
    elif data is not None and data.path is not None:
        lines += [f'kind = "{data.kind}"', f"path = {relative(data.path)}"]
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
        "",
        "# [[gates]]",
        '# gate = "device_accuracy_drop"   # the same for what the device itself computes',
        '# max = "1 point"',
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _input_lines(option: TensorOption) -> list[str]:
    lines = [
        "[[model.inputs]]",
        f"name = {_quoted(option.name)}",
        f"shape = {list(option.shape or ())}",
    ]
    return lines + ([f'layout = "{option.layout}"'] if option.layout else [])
