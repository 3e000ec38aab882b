"""Bias correction: take out of an int8 file the mean error that rounding puts on each channel."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgepipe.tflite_ops.channels import channel_statistics
from edgepipe.tflite_ops.flatbuffer import Operator, Subgraph, parse_model
from edgepipe.tflite_ops.quantize import BIASED
from edgepipe.tflite_ops.run import invoke_once, open_tflite
from edgepipe.tflite_ops.run import quantize as stored

log = logging.getLogger(__name__)

# A mean over so many samples (times the positions of a map) is known to a fraction of a step.
SAMPLES = 32


def correct_biases(
    float_content: bytes,
    int8_content: bytes,
    batches: Sequence[Sequence[np.ndarray]],
    *,
    where: str,
) -> tuple[bytes, int]:
    """The int8 file with corrected biases, and how many layers had theirs changed.

    Nagel et al. 2019, section 4.2 and appendix D (the empirical form): layer by layer in order of
    execution, all before it corrected already, the mean of each output channel is compared with the
    float file's on the same samples and the difference subtracted from the bias. Means are taken
    behind the activation that is fused into the layer, where a channel that is cut off half of the
    time moves by half of what its bias does: the correction is then too small, never too large.
    Example: a channel 0.03 too high, bias steps of 0.0004: its int32 bias falls by 75.
    """
    few = list(batches)[:SAMPLES]
    wanted = channel_statistics(float_content, few, where=where)
    content = bytearray(int8_content)
    graph = parse_model(int8_content, where=where).subgraphs[0]
    corrected = 0
    for operator in graph.operators:
        bias = _own_bias(operator, graph)
        name = graph.tensors[operator.outputs[0]].name if operator.outputs else ""
        if bias is None or name not in wanted:
            continue
        found = _channel_means(bytes(content), operator.outputs[0], graph, few, where=where)
        tensor = graph.tensors[bias]
        if found.shape != tensor.shape or len(tensor.scales) not in (1, *tensor.shape):
            continue
        steps = np.rint((found - wanted[name].mean) / np.array(tensor.scales))
        if not steps.any():
            continue
        raw = np.frombuffer(_buffer(content, tensor.buffer), tensor.dtype)
        limits = np.iinfo(raw.dtype)
        # in place: the buffer is a view of ``content``
        raw[:] = np.clip(raw - steps, limits.min, limits.max).astype(raw.dtype)
        corrected += 1
    log.debug("%s: biases of %d layers corrected", where, corrected)
    return bytes(content), corrected


def _buffer(content: bytearray, number: int) -> np.ndarray:
    """A model's buffer as a writable view (n,) uint8 of the file's bytes."""
    return np.asarray(schema.Model.GetRootAs(content, 0).Buffers(number).DataAsNumpy())


def _own_bias(operator: Operator, graph: Subgraph) -> int | None:
    """The number of an integer operator's bias, if no other operator or tensor shares it."""
    if operator.name not in BIASED or len(operator.inputs) <= BIASED[operator.name][1]:
        return None
    index = operator.inputs[BIASED[operator.name][1]]
    if index < 0:
        return None
    tensor = graph.tensors[index]
    shared = sum(t.buffer == tensor.buffer for t in graph.tensors) > 1
    users = sum(list(o.inputs).count(index) for o in graph.operators)
    is_integer = tensor.is_constant and tensor.dtype in ("int32", "int64")
    return index if is_integer and not shared and users == 1 else None


def _channel_means(
    content: bytes, index: int, graph: Subgraph, batches: Sequence[Sequence[np.ndarray]], *, where: str
) -> np.ndarray:  # fmt: skip
    """Mean real value of each channel (last axis) of one tensor of an int8 file: (C,) float64."""
    interpreter = open_tflite(content, preserve_all_tensors=True)
    details: list[Mapping[str, object]] = interpreter.get_input_details()
    tensor = graph.tensors[index]
    total, count = np.zeros(tensor.shape[-1]), 0
    for batch in batches:
        for detail, array in zip(details, batch, strict=True):
            interpreter.set_tensor(detail["index"], stored(array, dict(detail)))
        invoke_once(interpreter, where=where)
        values = interpreter.get_tensor(index)
        total += values.reshape(-1, values.shape[-1]).sum(axis=0, dtype=np.float64)
        count += values.size // values.shape[-1]
    return (total / max(count, 1) - tensor.zero_points[0]) * tensor.scales[0]
