"""What stands around a converter: an ONNX file it can take, and proof of what it gave back.

A converter renames, reorders and transposes inputs and outputs. Which tensor of its file is which
of the source model, in which layout, is found by trying the possibilities on real values.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.array_ops.layout import permute_shape, to_layout
from edgepipe.artifact import TensorSpec
from edgepipe.errors import ArtifactError, StageOptionError
from edgepipe.state import batch_axis
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.onnx_model import external_files, read_onnx
from edgepipe.tflite_ops.onnx_rewrites import expand_functions, rewrite_for_converters
from edgepipe.tflite_ops.quantize import BIASED
from edgepipe.tflite_ops.run import QDQ_OPS, invoke_once, open_tflite, run_onnx

log = logging.getLogger(__name__)

# How many ways to hand the inputs over are tried: inputs of one shape, named beyond recognition.
MAX_ASSIGNMENTS = 120


def prepare_onnx(
    path: Path,
    specs: Sequence[TensorSpec],
    *,
    batch: int | None,
    where: str = "",
    streaming: bool = False,
) -> bytes:
    """The bytes of a model a converter can take: one file, every input dimension fixed, and what
    converters are known to get wrong rewritten (`onnx_rewrites`). ``where`` is what the user calls it.

    A free batch becomes ``batch`` (1 if None), other free dimensions what ``specs`` say; a ``streaming``
    model's LSTM is left to keep its state. Raises
    ArtifactError for a broken file and for quantised ONNX (``qdq-onnx``), StageOptionError where
    the batch is fixed and another one is asked for.
    """
    model = read_onnx(path)
    quantized = next((node for node in model.graph.node if node.op_type in QDQ_OPS), None)
    if quantized is not None:
        raise ArtifactError(
            f"{where or path} is already quantised: node {quantized.name or quantized.output[0]!r} is a "
            f"{quantized.op_type}. Converters drop or float such nodes without a word",
            hint="give the float model; quantize_int8 quantises after conversion",
            code="qdq-onnx",
        )
    shapes = {spec.name: spec for spec in specs}
    constants = {item.name for item in model.graph.initializer}
    changed = bool(external_files(model))
    for value in model.graph.input:
        if value.name in constants:  # an input with a default is a weight
            continue
        if value.name not in shapes:
            raise ArtifactError(
                f"{path} has an input {value.name!r} that its record does not name",
                hint="the record beside the model is not of this file",
            )
        spec = shapes[value.name]
        axis = batch_axis(spec.layout)
        for index, dimension in enumerate(value.type.tensor_type.shape.dim):
            free = not dimension.HasField("dim_value")
            size = batch or 1 if index == axis else spec.shape[index]
            if not free and index == axis and batch not in (None, dimension.dim_value):
                raise StageOptionError(
                    f"to_tflite: batch = {batch}, but input {value.name!r} of {path} has a fixed "
                    f"batch of {dimension.dim_value}",
                    hint=f"leave batch out, or export with a free batch (export_onnx) instead of {dimension.dim_value}",
                )
            if free:
                dimension.dim_value = size
                changed = True
    if changed:
        del model.graph.value_info[:]  # intermediate shapes still name the free dimensions
        for value in model.graph.output:
            if any(not d.HasField("dim_value") for d in value.type.tensor_type.shape.dim):
                value.type.tensor_type.ClearField("shape")
    expanded = expand_functions(model)
    if rewrite_for_converters(expanded, streaming=streaming) or changed or expanded is not model:
        return bytes(expanded.SerializeToString())
    return path.read_bytes()


def flat_biases(content: bytes, *, where: str) -> bytes:
    """The file with every bias (C,): litert-torch 0.10 writes (1, 1, 1, C), of which int8 makes an invalid file."""
    graph = parse_model(content, where=where).subgraphs[0]
    reads = [(i, BIASED.get(o.name, (0, -1))[1] == k) for o in graph.operators for k, i in enumerate(o.inputs)]  # fmt: skip
    elsewhere = {i for i, as_bias in reads if not as_bias}
    odd = {
        i for i, as_bias in reads
        if as_bias and i >= 0 and i not in elsewhere and graph.tensors[i].is_constant and len(graph.tensors[i].shape) > 1
    }  # fmt: skip
    if not odd:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    for i in odd:
        model.subgraphs[0].tensors[i].shape = np.array([graph.tensors[i].shape[-1]], np.int32)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def channels_last(layout: str) -> str:
    """``"NCHW" -> "NHWC"``; layouts whose second axis is not C are returned as they are."""
    if len(layout) > 2 and layout.startswith("NC"):
        return f"N{layout[2:]}C"
    return layout


@dataclasses.dataclass(frozen=True)
class Match:
    """Specs of a converted file, and per source output the largest relative error they gave."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    errors: Mapping[str, float]


def match_tensors(
    reference: Path,
    converted: Path,
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
    samples: Sequence[np.ndarray],
    *,
    layouts: Mapping[str, str],
    tolerance: float,
) -> Match:
    """Which input and output of the TFLite file is which of the ONNX file, and in which layout.

    ``samples[i]`` (n, ...) is source input *i*. Inputs are assigned by shape, preferring the same
    name and the layout wished for in ``layouts`` (source name -> layout); outputs by value. The
    first assignment that reproduces every output within ``tolerance`` of its largest value is the
    answer, else the best one: its errors tell. Raises ArtifactError where inputs or outputs
    cannot be paired at all.
    """
    interpreter = open_tflite(converted)
    files_in, files_out = interpreter.get_input_details(), interpreter.get_output_details()
    if len(files_out) != len(output_specs):
        raise ArtifactError(
            f"the converted model has {len(files_out)} outputs "
            f"({', '.join(plain_name(d['name']) for d in files_out)}), the source {len(output_specs)} "
            f"({', '.join(s.name for s in output_specs)})",
            hint="two outputs that are the same tensor become one: give one of them up",
            code="not-comparable",
        )
    batch_sizes = {int(d["shape"][0]) for d in files_in if len(d["shape"])}
    batch = batch_sizes.pop() if len(batch_sizes) == 1 else 1
    axes = [batch_axis(spec.layout) for spec in input_specs]
    rows = [
        [np.take(a, [i] * batch, axis=axis).astype(s.dtype) for a, s, axis in zip(samples, input_specs, axes, strict=True)]
        for i in range(samples[0].shape[axes[0]] if samples else 1)
    ]  # fmt: skip
    expected = [run_onnx(reference, row, input_specs, output_specs) for row in rows]
    best: Match | None = None
    for assignment in _assignments(files_in, input_specs, layouts, batch):
        specs = tuple(
            _file_spec(detail, input_specs[i], layout)
            for detail, (i, layout) in zip(files_in, assignment, strict=True)
        )
        actual = []
        for row in rows:
            for detail, (i, layout) in zip(files_in, assignment, strict=True):
                moved = to_layout(row[i], input_specs[i].layout, layout)
                # a scalar's one sample is (1,)
                fed = moved.astype(detail["dtype"]).reshape(detail["shape"])
                interpreter.set_tensor(detail["index"], fed)
            invoke_once(interpreter, where=str(converted))
            actual.append(
                [np.atleast_1d(interpreter.get_tensor(d["index"])).copy() for d in files_out]
            )
        paired = _pair_outputs(files_out, output_specs, actual, expected, tolerance)
        if paired is None:
            continue
        match = Match(specs, *paired)
        if max(match.errors.values()) <= tolerance:
            return match
        if best is None or max(match.errors.values()) < max(best.errors.values()):
            best = match
    if best is None:
        raise ArtifactError(
            f"the converted model's tensors fit no tensors of the source: inputs "
            f"{[(plain_name(d['name']), d['shape'].tolist()) for d in files_in]} against {[(s.name, list(s.shape)) for s in input_specs]}, outputs "
            f"{[(plain_name(d['name']), d['shape'].tolist()) for d in files_out]} against {[(s.name, list(s.shape)) for s in output_specs]}",
            hint="report the model to the converter, or try another route",
            code="not-comparable",
        )
    return best


def plain_name(name: str) -> str:
    """A TFLite tensor's name without what TensorFlow adds: ``serving_default_x:0`` -> ``x``."""
    return re.sub(r":\d+$", "", name).removeprefix("serving_default_")


def _file_spec(detail: dict[str, Any], source: TensorSpec, layout: str) -> TensorSpec:
    return TensorSpec(
        name=source.name,
        shape=tuple(int(n) for n in detail["shape"]),
        dtype=np.dtype(detail["dtype"]).name,
        layout=layout,
        source_layout=source.source_layout,
        fed_by=source.fed_by,
    )


def _assignments(
    files: Sequence[dict[str, Any]],
    sources: Sequence[TensorSpec],
    layouts: Mapping[str, str],
    batch: int,
) -> Iterator[tuple[tuple[int, str], ...]]:
    """Ways to feed the file's inputs: per file input (number of the source input, layout), the
    likeliest first. Shape and kind of number must fit."""
    if len(files) != len(sources):
        return
    choices: list[list[tuple[int, int, str]]] = []  # per file input: (unlikeliness, source, layout)
    for detail in files:
        shape = tuple(int(n) for n in detail["shape"])
        fits = []
        for i, spec in enumerate(sources):
            wished = layouts.get(spec.name, spec.layout)
            sized = tuple(
                batch if k == batch_axis(spec.layout) else n for k, n in enumerate(spec.shape)
            )
            for layout in dict.fromkeys((wished, spec.layout, channels_last(spec.layout))):
                moved = sized if layout == spec.layout else permute_shape(sized, spec.layout, layout)  # fmt: skip
                same_kind = _is_integer(detail["dtype"]) == _is_integer(spec.dtype)
                # converters may make [1] of a scalar
                if same_kind and (moved == shape or (not spec.shape and shape == (1,))):
                    cost = 2 * (plain_name(detail["name"]) != spec.name) + (layout != wished)
                    fits.append((cost, i, layout))
        choices.append(sorted(fits))
    ways = [
        way
        for way in itertools.islice(itertools.product(*choices), 10 * MAX_ASSIGNMENTS)
        if len({i for _, i, _ in way}) == len(way)
    ]
    ways.sort(key=lambda way: sum(cost for cost, _, _ in way))
    for way in ways[:MAX_ASSIGNMENTS]:
        yield tuple((i, layout) for _, i, layout in way)


def _is_integer(dtype: Any) -> bool:
    return not np.issubdtype(np.dtype(dtype), np.floating)


def _pair_outputs(
    files: Sequence[dict[str, Any]],
    sources: Sequence[TensorSpec],
    actual: Sequence[Sequence[np.ndarray]],
    expected: Sequence[Sequence[np.ndarray]],
    tolerance: float,
) -> tuple[tuple[TensorSpec, ...], dict[str, float]] | None:
    """Specs for the file's outputs by value, and the relative error of each source output."""
    candidates = []
    for j, detail in enumerate(files):
        for i, spec in enumerate(sources):
            for layout in dict.fromkeys((spec.layout, channels_last(spec.layout))):
                references = [to_layout(row[i], spec.layout, layout) for row in expected]
                results = [row[j] for row in actual]
                if any(a.shape != b.shape for a, b in zip(references, results, strict=True)):
                    continue
                error = max(map(relative_error, references, results))
                unlike = plain_name(detail["name"]) != spec.name
                candidates.append((error > tolerance, unlike, error, i, j, layout))
    chosen: dict[int, tuple[int, str, float]] = {}  # file output -> source, layout, error
    taken: set[int] = set()
    for _, _, error, i, j, layout in sorted(candidates):
        if j not in chosen and i not in taken:
            chosen[j] = (i, layout, error)
            taken.add(i)
    if len(chosen) != len(sources):
        return None
    specs = tuple(
        _file_spec(detail, sources[chosen[j][0]], chosen[j][1]) for j, detail in enumerate(files)
    )
    return specs, {sources[i].name: error for i, _, error in chosen.values()}


def relative_error(reference: np.ndarray, values: np.ndarray) -> float:
    """max|values - reference| / max|reference|; infinite for NaN, or where only one is all zero."""
    if reference.size == 0:
        return 0.0
    a, b = reference.astype(np.float64), values.astype(np.float64)
    error = float(np.abs(a - b).max())
    scale = float(np.abs(a).max())
    if not np.isfinite(error) or not np.isfinite(scale):
        return float("inf")
    return error / scale if scale else (0.0 if error == 0.0 else float("inf"))
