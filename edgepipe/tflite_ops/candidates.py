"""What tells one converted file from another: what converters leave behind, state, latency."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgepipe.array_ops.layout import to_layout
from edgepipe.artifact import TensorSpec
from edgepipe.tflite_ops.flatbuffer import CONVERSIONS, Model
from edgepipe.tflite_ops.inspect import describe
from edgepipe.tflite_ops.onnx_model import read_onnx
from edgepipe.tflite_ops.quantize import integer_operators
from edgepipe.tflite_ops.rewrite import rewritten_operators
from edgepipe.tflite_ops.run import invoke_once, open_tflite

# Enough inferences for a median that ranks two files; at most this long for each.
LATENCY_RUNS = 15
LATENCY_LIMIT_S = 2.0

# It has an int8 form, but in a model without a Sign of its own it is part of an erf that the converter
# spelt out: some 25 operators for each GELU, which another converter writes as one.
SPELT = {"SIGN"}


def left_behind(path: Path) -> dict[str, Any]:
    """``transposes``, ``transpose_bytes``, ``loose_ops``, ``operators`` and ``bytes`` of a float file.

    ``loose_ops``: operator -> how many compute on floats and have no int8 form, so that quantisation
    puts a float island around each, or are of `SPELT`.
    """
    found = describe(path)
    return {
        "transposes": found.transposes,
        "transpose_bytes": found.transpose_bytes,
        "loose_ops": _loose(found.model),
        "operators": sum(found.operators.values()),
        "bytes": found.model.size_bytes,
    }


def _loose(model: Model) -> dict[str, int]:
    known = (integer_operators() | rewritten_operators() | CONVERSIONS) - SPELT
    counts: Counter[str] = Counter()
    for graph in model.subgraphs:
        for operator in graph.operators:
            tensors = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
            computes = any(t.is_float and not t.is_constant for t in tensors)
            if computes and operator.name not in known:
                counts[operator.name] += 1
    return dict(sorted(counts.items()))


def source_operators(path: Path) -> tuple[str, ...]:
    """The kinds of operators of an ONNX model, sorted."""
    return tuple(sorted({node.op_type for node in read_onnx(path).graph.node}))


def source_transposes(path: Path) -> int:
    """How many TRANSPOSE operators an ONNX model asks for by itself, in whatever layout it runs.

    Its own Transpose nodes, and every reshape of images: ``x.flatten(1)`` of (N, C, H, W) takes the
    values in the order C, H, W, which are in the order H, W, C where images are channels last.
    """
    model = read_onnx(path)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    live = {value.name for value in model.graph.input} - {t.name for t in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if not live.intersection(node.input):
            continue
        live.update(node.output)
        if node.op_type == "Transpose":
            count += 1
        elif node.op_type in ("Reshape", "Flatten"):
            sides = (shapes.get(node.input[0], []), shapes.get(node.output[0], []))
            count += any(len(s) == 4 and s[1] > 1 and s[2] * s[3] > 1 for s in sides)
    return count


def keeps_state(path: Path, rows: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> bool:
    """Whether the same inputs give other outputs the second time, nothing being reset in between.

    ``rows`` are one sample for each source input, (1, ...) in the source layout. So behave fused
    LSTM operators, whose state outlives an inference.
    """
    interpreter = open_tflite(path)
    details = interpreter.get_input_details()
    interpreter.reset_all_variables()
    results = []
    for _ in range(2):
        for detail, spec in zip(details, specs, strict=True):
            row = to_layout(rows[spec.name], spec.source_layout, spec.layout)
            whole = (
                np.broadcast_to(row, detail["shape"]) if len(detail["shape"]) else row.reshape(())
            )
            batched = whole.astype(detail["dtype"])
            interpreter.set_tensor(detail["index"], batched)
        interpreter.invoke()
        outputs = interpreter.get_output_details()
        results.append([np.array(interpreter.get_tensor(d["index"])) for d in outputs])
    return not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*results, strict=True))


def host_latencies_s(paths: Sequence[Path]) -> list[float]:
    """Median seconds of one inference of each file on this host, one thread, taking turns."""
    interpreters = [open_tflite(path) for path in paths]
    for interpreter, path in zip(interpreters, paths, strict=True):
        # what lies in the memory of an input may be no index of an embedding
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
        invoke_once(interpreter, where=str(path))
    taken: list[list[float]] = [[] for _ in paths]
    started = time.perf_counter()
    while len(taken[0]) < LATENCY_RUNS and time.perf_counter() - started < LATENCY_LIMIT_S * len(
        paths
    ):
        for interpreter, seconds in zip(interpreters, taken, strict=True):
            interpreter.reset_all_variables()
            begin = time.perf_counter()
            interpreter.invoke()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in taken]
