"""Exact rewriting of a float file's weights, so that int8 fits its channels better.

Two things spoil int8 that float never sees: a channel that is always 0 but has absurd weights behind
it, which a batch norm of variance 1e-40 leaves there, and channels of one tensor whose sizes differ
a hundredfold, of which the small ones get two or three of the 256 steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from edgepipe.errors import StageError
from edgepipe.tflite_ops.channels import ChannelStatistics
from edgepipe.tflite_ops.flatbuffer import (
    Operator,
    Subgraph,
    constants,
    parse_model,
    with_constants,
)
from edgepipe.tflite_ops.quantize import STAGE
from edgepipe.tflite_ops.sensitivity import outputs_of

# Weights of a dead channel are taken out where they are so many times the largest living one: below
# it they cost less than 3 of the 8 bits, and a channel that this data leaves dead may live elsewhere.
ABSURD = 8.0
# No channel is scaled by more: biases have to fit into 32 bits
MOST = 1e4
# A channel under a RELU6 is scaled only if it stays this far below 6 before and after.
RELU6_SAFE = 0.8 * 6
# Outputs may differ by this share of their largest value.
TOLERANCE = 1e-4

# position of the input channels' axis in the weights; a depthwise one has them times its multiplier
_INPUT_AXIS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 1}
_OUTPUT_AXIS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
# f(x / s) = f(x) / s for s > 0, channel by channel
_HOMOGENEOUS = frozenset(
    {"RELU", "LEAKY_RELU", "MAX_POOL_2D", "AVERAGE_POOL_2D", "RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR", "PAD"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A place that takes a scaled tensor up: position 1 of ``operator``, whose input channels repeat
    ``tiles`` times (a flattened map)."""

    operator: Operator
    tiles: int


class _Weights:
    """The constants of a file while they are rewritten."""

    def __init__(self, content: bytes, *, where: str) -> None:
        self.content = content
        self.graph: Subgraph = parse_model(content, where=where).subgraphs[0]
        self.values = constants(content, self.graph)
        self.changed: set[int] = set()

    def name(self, index: int) -> str:
        return self.graph.tensors[index].name

    def is_free(self, index: int) -> bool:
        """A float constant that one operator uses, alone in its buffer: it may be rewritten."""
        if index not in self.values or self.graph.tensors[index].dtype != "float32":
            return False
        buffer = self.graph.tensors[index].buffer
        users = sum(list(o.inputs).count(index) for o in self.graph.operators)
        return users == 1 and sum(t.buffer == buffer for t in self.graph.tensors) == 1

    def set(self, index: int, value: np.ndarray) -> None:
        self.values[index] = value.astype(np.float32)
        self.changed.add(index)

    def users(self, index: int) -> list[Operator]:
        return [o for o in self.graph.operators if index in o.inputs]

    def bytes(self) -> bytes:
        if not self.changed:
            return self.content
        return with_constants(self.content, {i: self.values[i] for i in self.changed})


def repair_dead_channels(
    content: bytes, statistics: Mapping[str, ChannelStatistics], *, where: str
) -> tuple[bytes, tuple[str, ...]]:
    """Zero the weights that read channels which are always 0, where they are absurdly large.

    In float they multiply zeros; in int8 they decide the scale of all the others. Looked at are
    convolutions, dense layers and multiplications by a constant. Returns the file and a sentence for
    each tensor repaired. ``statistics`` are of the very file.
    """
    weights = _Weights(content, where=where)
    repaired = []
    for operator in weights.graph.operators:
        found = _gain(operator, weights, statistics)
        if found is None:
            continue
        index, axis, dead = found
        value = weights.values[index]
        gain = np.abs(value).max(axis=tuple(i for i in range(value.ndim) if i != axis))
        bad = dead & (gain > ABSURD * max(float(gain[~dead].max(initial=0)), 1e-12))
        if not bad.any():
            continue
        worst, alive = float(gain[bad].max()), float(gain[~dead].max(initial=0))
        value = np.moveaxis(value.copy(), axis, -1)
        value[..., bad] = 0
        weights.set(index, np.moveaxis(value, -1, axis))
        repaired.append(
            f"{operator.name} {weights.name(operator.outputs[0])!r} multiplies {int(bad.sum())} dead"
            f" channel(s) of {weights.name(operator.inputs[0])!r} by up to {worst:.3g}, living ones by"
            f" {alive:.3g} at most: set to 0"
        )
    return weights.bytes(), tuple(repaired)


def _gain(
    operator: Operator, weights: _Weights, statistics: Mapping[str, ChannelStatistics]
) -> tuple[int, int, np.ndarray] | None:
    """(constant, axis of its input channels, which of them are always 0) of an operator's gains."""
    # not of depthwise ones: each channel has a scale of its own, so an absurd one spoils no other
    if operator.name not in ("CONV_2D", "FULLY_CONNECTED", "MUL"):
        return None
    data, index = operator.inputs[0], operator.inputs[1]
    if operator.name == "MUL" and data in weights.values:
        data, index = index, data
    found = statistics.get(weights.name(data)) if data >= 0 else None
    if found is None or not weights.is_free(index):
        return None
    value = weights.values[index]
    axis = value.ndim - 1 if operator.name == "MUL" else _INPUT_AXIS[operator.name]
    if value.ndim == 0 or value.shape[axis] != len(found.low):
        return None
    return index, axis, found.is_constant & (found.high == 0)


def equalise(
    content: bytes,
    statistics: Mapping[str, ChannelStatistics],
    *,
    strength: float = 0.5,
    where: str,
) -> tuple[bytes, tuple[str, ...]]:
    """Cross-layer equalisation: scale channels down in one layer and up in the next.

    Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction",
    eq. 5 to 9: a layer's output channel c is divided by s_c and the next layer's weights for it
    multiplied by s_c. There s = sqrt(r1 / r2) of two layers' weight ranges; since our weights have
    a scale for each output channel, r1 is the channel's largest activation and r2 the largest weight
    that reads it: s = r1^a / r2^(1 - a), a = ``strength`` (Xiao et al. 2022, eq. 4). Behind a
    depthwise layer a = 1: its channels have scales of their own. Between both may lie what
    commutes with positive factors: ReLU, LeakyReLU, pooling, means, padding with zeros, flattening.
    RELU6 commutes only below 6, so there only channels that stay well below are scaled.
    """
    weights = _Weights(content, where=where)
    told = []
    reach = {name: s.reach.copy() for name, s in statistics.items()}
    for operator in weights.graph.operators:
        readers = _readers(operator, weights)
        name = weights.name(operator.outputs[0]) if operator.outputs else ""
        if not readers or name not in reach:
            continue
        s = _factors(operator, readers, reach[name], weights, strength)
        if s is None or np.allclose(s, 1, rtol=0.05):
            continue
        _scale(operator, readers, s, weights)
        before = ChannelStatistics(-reach[name], reach[name], reach[name], reach[name]).spread
        reach[name] = reach[name] / s
        after = ChannelStatistics(-reach[name], reach[name], reach[name], reach[name]).spread
        told.append(f"{operator.name} {name!r}: largest channel {before:.3g} times the median, now {after:.3g}")  # fmt: skip
    return weights.bytes(), tuple(told)


def _readers(operator: Operator, weights: _Weights) -> list[_Reader]:
    """Everything that reads what an operator makes, through what commutes with factors; [] if any
    reader does not take factors up, or the operator's own weights cannot be scaled."""
    if operator.name not in _OUTPUT_AXIS or not weights.is_free(operator.inputs[1]):
        return []
    bias = operator.inputs[2] if len(operator.inputs) > 2 else -1
    if bias >= 0 and not weights.is_free(bias):
        return []
    if operator.options.get("fused_activation_function", "NONE") not in ("NONE", "RELU", "RELU6"):
        return []
    found: list[_Reader] = []
    pending = [(operator.outputs[0], 1)]
    while pending:
        tensor, tiles = pending.pop()
        if tensor in weights.graph.outputs:
            return []
        users = weights.users(tensor)
        if not users:
            return []
        for user in users:
            if user.name in _INPUT_AXIS and user.inputs[0] == tensor:
                if not weights.is_free(user.inputs[1]):
                    return []
                found.append(_Reader(user, tiles))
                continue
            through = _through(user, tensor, tiles, weights)
            if through is None:
                return []
            pending.append((user.outputs[0], through))
    return found


def _through(user: Operator, tensor: int, tiles: int, weights: _Weights) -> int | None:
    """How often the channels repeat behind an operator that commutes with factors, else None."""
    graph = weights.graph
    before, after = graph.tensors[tensor].shape, graph.tensors[user.outputs[0]].shape
    if user.options.get("fused_activation_function", "NONE") not in ("NONE", "RELU"):
        return None
    if user.name in _HOMOGENEOUS:
        return tiles if before and after and before[-1] == after[-1] else None
    if user.name == "MEAN":
        axes = weights.values.get(user.inputs[1])
        last = len(before) - 1
        is_spatial = axes is not None and all(int(a) % len(before) != last for a in axes.ravel())
        return tiles if is_spatial and len(before) == 4 else None
    if user.name == "RESHAPE" and before and after and len(after) == 2 and after[0] == 1:
        return tiles * (after[-1] // before[-1]) if before[0] == 1 else None
    return None


def _factors(
    operator: Operator,
    readers: Sequence[_Reader],
    reach: np.ndarray,
    weights: _Weights,
    strength: float,
) -> np.ndarray | None:
    """s (C,) with largest 1, or None where the shapes do not fit."""
    channels = weights.values[operator.inputs[1]].shape[_OUTPUT_AXIS[operator.name]]
    if len(reach) != channels:
        return None
    read = np.zeros(channels)
    for reader in readers:
        value = weights.values[reader.operator.inputs[1]]
        axis = _INPUT_AXIS[reader.operator.name]
        if reader.operator.name == "DEPTHWISE_CONV_2D":
            if value.shape[axis] % channels or reader.tiles != 1:
                return None
            continue
        if value.shape[axis] != channels * reader.tiles:
            return None
        gain = np.abs(value).max(axis=tuple(i for i in range(value.ndim) if i != axis))
        read = np.maximum(read, gain.reshape(reader.tiles, channels).max(axis=0))
    is_depthwise = not read.any()
    alive = (reach > 0) & ((read > 0) | is_depthwise)
    if not alive.any():
        return None
    a = 1.0 if is_depthwise else strength
    s = np.ones(channels)
    s[alive] = reach[alive] ** a / (1.0 if is_depthwise else read[alive] ** (1 - a))
    s[alive] = np.clip(s[alive] / s[alive].max(), 1 / MOST, 1.0)
    if operator.options.get("fused_activation_function") == "RELU6":
        s[(reach > RELU6_SAFE) | (reach / s > RELU6_SAFE)] = 1.0
    # powers of two: dividing and multiplying by them loses nothing
    return np.asarray(2.0 ** np.round(np.log2(s)))


def _scale(
    operator: Operator, readers: Sequence[_Reader], s: np.ndarray, weights: _Weights
) -> None:
    index, axis = operator.inputs[1], _OUTPUT_AXIS[operator.name]
    value = weights.values[index]
    weights.set(index, value / s.reshape([-1 if i == axis else 1 for i in range(value.ndim)]))
    if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
        weights.set(operator.inputs[2], weights.values[operator.inputs[2]] / s)
    for reader in readers:
        index, axis = reader.operator.inputs[1], _INPUT_AXIS[reader.operator.name]
        value = weights.values[index]
        if reader.operator.name == "DEPTHWISE_CONV_2D":
            factors = np.repeat(s, value.shape[axis] // len(s))
        else:
            factors = np.tile(s, reader.tiles)
        weights.set(index, value * factors.reshape([-1 if i == axis else 1 for i in range(value.ndim)]))  # fmt: skip


def check_unchanged(
    before: bytes,
    after: bytes,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    where: str,
    hint: str = "report it with the model; without max_drop no weights are rewritten",
) -> float:
    """The largest difference of any output, over that output's largest value.

    Raises StageError (``parity``) where it is above `TOLERANCE`.
    """
    samples = list(batches)
    pairs = zip(outputs_of(before, samples, where=where), outputs_of(after, samples, where=where), strict=True)  # fmt: skip
    error = 0.0
    for old, new in pairs:
        largest = float(np.abs(old).max(initial=0)) or 1.0
        error = max(error, float(np.abs(new - old).max(initial=0)) / largest)
    if not error <= TOLERANCE:
        raise StageError(
            f"rewriting {where} changed its outputs by {error:.2g} of their largest"
            f" value, allowed is {TOLERANCE:g}",
            stage=STAGE,
            hint=hint,
            code="parity",
        )
    return error
