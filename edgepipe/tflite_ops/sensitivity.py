"""How much noise quantisation puts on a model's outputs, and which layer alone would put how much."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edgepipe.tflite_ops.flatbuffer import (
    CONVERSIONS,
    Subgraph,
    constants,
    parse_model,
    with_constants,
)
from edgepipe.tflite_ops.quantize import Precision, noisiest_layers, quantize
from edgepipe.tflite_ops.run import dequantize, invoke_once, open_tflite
from edgepipe.tflite_ops.run import quantize as stored

log = logging.getLogger(__name__)

# Of models with more layers only those that add most noise are looked at one by one.
LAYERS_TRIED = 64


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """``noise`` of the outputs (0 to 1, see `noise_share`) if this layer alone were int8.

    ``layer`` is the first tensor that the operator makes.
    """

    layer: str
    operator: str
    noise: float


def noise_share(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Noise power over signal power of outputs (N, ...), each element judged by its own spread.

    The mean over elements of sum (found - expected)^2 / sum (expected - its mean)^2, at most 1 each:
    0 is exact, 1 is dead. So scores from 0 to 1 weigh as much as coordinates from 0 to 320 beside
    them. Elements that never change count by the mean spread of all.
    """
    shares = []
    for e, f in zip(expected, found, strict=True):
        wanted = e.reshape(len(e), -1).astype(np.float64)
        signal = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=0)
        noise = ((f.reshape(len(f), -1) - wanted) ** 2).sum(axis=0)
        moving = signal > 1e-9 * signal.max(initial=0)
        signal = np.where(moving, signal, signal[moving].mean() if moving.any() else 1.0)
        shares.append(np.minimum(np.nan_to_num(noise / signal, nan=1.0, posinf=1.0), 1.0))
    return float(np.concatenate(shares).mean())


def outputs_of(
    content: bytes, batches: Iterable[Sequence[np.ndarray]], *, where: str
) -> list[np.ndarray]:
    """Real values of every output over all batches of real inputs, (N, ...) each."""
    interpreter = open_tflite(content)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    found: list[list[np.ndarray]] = [[] for _ in outputs]
    for batch in batches:
        for detail, array in zip(inputs, batch, strict=True):
            interpreter.set_tensor(detail["index"], stored(array, detail))
        invoke_once(interpreter, where=where)
        for rows, detail in zip(found, outputs, strict=True):
            rows.append(dequantize(interpreter.get_tensor(detail["index"]), detail)[np.newaxis])
    return [np.concatenate(rows) for rows in found]


def door_noise(
    content: bytes,
    ranges: Mapping[str, tuple[float, float]],
    batches: Sequence[Sequence[np.ndarray]],
    *,
    where: str,
) -> float:
    """`noise_share` of a float file's outputs if its inputs named in ``ranges`` were int8, and nothing else.

    Range (0, 51) has steps of 0.2: 3.33 goes in as 3.4.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    doors: list[dict[str, Any]] = []
    for tensor in (graph.tensors[i] for i in graph.inputs):
        low, high = ranges.get(tensor.name, (0.0, 0.0))
        scale = (max(high, 0.0) - min(low, 0.0)) / 255
        zero_point = round(-128 - min(low, 0.0) / scale) if scale else 0
        dtype = np.int8 if scale else tensor.dtype
        doors.append({"quantization": (scale, zero_point), "dtype": dtype, "name": tensor.name})
    rounded = [[dequantize(stored(a, d), d) for a, d in zip(batch, doors, strict=True)] for batch in batches]  # fmt: skip
    return noise_share(outputs_of(content, batches, where=where), outputs_of(content, rounded, where=where))  # fmt: skip


def weight_noise(
    content: bytes, int8: bytes, batches: Sequence[Sequence[np.ndarray]], *, where: str
) -> float:
    """`noise_share` of a float file's outputs if its weights were as ``int8`` holds them, and nothing else.

    A weight 0.37 in steps of 0.25 counts as 0.25. Tensors are matched by name.
    """
    graph, integer = (parse_model(c, where=where).subgraphs[0] for c in (content, int8))
    held = {t.name: t for t in integer.tensors if t.is_constant and t.dtype == "int8" and t.scales}
    numbers, rounded = constants(int8, integer), dict[int, np.ndarray]()
    for tensor in graph.tensors:
        twin = held.get(tensor.name)
        if tensor.is_constant and tensor.is_float and twin is not None and twin.shape == tensor.shape:  # fmt: skip
            # (C,) -> (1, ..., C, ..., 1), or one for all
            shape = [-1 if i == twin.quantized_axis and len(twin.scales) > 1 else 1 for i in range(len(twin.shape))]  # fmt: skip
            scale, zero = (np.reshape(v, shape) for v in (twin.scales, twin.zero_points))
            rounded[tensor.index] = (numbers[twin.index] - zero) * scale
    alone = with_constants(content, rounded)
    return noise_share(outputs_of(content, batches, where=where), outputs_of(alone, batches, where=where))  # fmt: skip


def layers_of(graph: Subgraph) -> dict[str, str]:
    """Name of the first tensor it makes -> operator, for every operator that makes floats."""
    return {
        graph.tensors[o.outputs[0]].name: o.name
        for o in graph.operators
        if o.outputs and graph.tensors[o.outputs[0]].is_float and o.name not in CONVERSIONS
    }


def layer_sensitivity(
    content: bytes,
    ranges: Mapping[str, tuple[float, float]],
    batches: Sequence[Sequence[np.ndarray]],
    *,
    where: str,
) -> list[Sensitivity]:
    """What each layer of a float file would spoil if it alone were int8, the worst first.

    One file is made and run for each layer, all others in float. That tells culprits apart even
    where several ruin the model, each alone; making one of them float then changes nothing.
    ``ranges`` as for `quantize`, ``batches`` real inputs of the float file. Both tensors that an
    operator reads and those that it makes are rounded, so a tensor that does not fit int8 blames
    its maker and its users.
    """
    layers = layers_of(parse_model(content, where=where).subgraphs[0])
    chosen = list(layers)
    if len(layers) > LAYERS_TRIED:
        whole = quantize(content, ranges, where=where)
        noisy = noisiest_layers(content, whole, batches[:8], count=LAYERS_TRIED)
        chosen = [row["layer"] for row in noisy if row["layer"] in layers]
    expected = outputs_of(content, batches, where=where)
    found = []
    for number, layer in enumerate(chosen, 1):
        log.debug("layer %d of %d: %s", number, len(chosen), layer)
        others: dict[str, Precision] = {name: "float" for name in layers if name != layer}
        alone = quantize(
            content, ranges, input_dtype="float32", output_dtype="float32",
            precision=others, where=where,
        )  # fmt: skip
        noise = noise_share(expected, outputs_of(alone, batches, where=where))
        found.append(Sensitivity(layer, layers[layer], noise))
    return sorted(found, key=lambda s: -s.noise)
