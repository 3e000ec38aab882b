"""Layer by layer, what quantisation did to a model: noise, ranges, clipping, channels, and what each layer alone spoils."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from edgepipe.array_ops.compare import sqnr_db
from edgepipe.array_ops.ranges import METHODS, Range
from edgepipe.errors import ArtifactError
from edgepipe.tflite_ops.bias import correct_biases
from edgepipe.tflite_ops.calibrate import collect_histograms
from edgepipe.tflite_ops.channels import ChannelStatistics, channel_statistics
from edgepipe.tflite_ops.equalise import equalise, repair_dead_channels
from edgepipe.tflite_ops.flatbuffer import CONVERSIONS, Subgraph, Tensor, constants, parse_model
from edgepipe.tflite_ops.inspect import describe_model
from edgepipe.tflite_ops.ladder import Judge, Rung, climb
from edgepipe.tflite_ops.quantize import (
    IoDtype,
    Precision,
    added_noise,
    check_quantizable,
    collect_ranges,
    fuse_activations,
    quantize,
    values_of_both,
)
from edgepipe.tflite_ops.rewrite import rewrite
from edgepipe.tflite_ops.sensitivity import (
    layer_sensitivity,
    layers_of,
    noise_share,
    outputs_of,
)

log = logging.getLogger(__name__)

Batches = Sequence[Sequence[np.ndarray]]
# A channel so many times the median one is an outlier (as `ladder.WIDE_SPREAD`: 4 of 255 steps are
# left for the median one).
OUTLIER = 64.0
# Rounding to int8 leaves a cosine of 0.99, equalisation and learned rounding hardly less; weights of
# two trainings have one about 0.
SAME_WEIGHTS = 0.5
WITH_WEIGHTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


@dataclasses.dataclass(frozen=True)
class LayerNoise:
    """One tensor that both files have, in order of execution.

    ``sqnr_db`` is against the float file, with all that came before; ``added`` the noise-to-signal
    power ratio that this layer adds to its inputs'. ``low`` and ``high`` were seen in the float file,
    ``scale_low`` and ``scale_high`` are what the integers can say; ``clipped`` is the share of values
    outside. ``dense_share`` is how much of the seen range the least squared error would keep: a small
    one means a few values far out. ``bias_share`` is the part of the noise that is one and the same
    error for all values of a channel. Channels are the last axis; ``spread`` is the largest one over
    the median. ``scale`` 0: the layer computes in float, and what needs a scale is 0 as well.
    """

    layer: str
    operator: str
    dtype: str
    sqnr_db: float
    added: float
    low: float
    high: float
    scale: float
    zero_point: int
    scale_low: float
    scale_high: float
    clipped: float
    dense_share: float
    bias_share: float
    channels: int
    dead_channels: int
    outlier_channels: int
    spread: float

    @property
    def steps_used(self) -> float:
        """How many of the integer steps lie between the least and the largest value seen."""
        return (self.high - self.low) / self.scale if self.scale else 0.0


@dataclasses.dataclass(frozen=True)
class Repairs:
    """Layers that equalisation could even out, and sentences about dead channels with absurd weights,
    by the layer that reads them."""

    equalisable: frozenset[str]
    dead_gains: Mapping[str, str]


def comparable(float_content: bytes, quantised: bytes, *, where: tuple[str, str]) -> bytes:
    """The float file as it was just before quantisation: activations fused, operators rewritten if the
    other file holds what was rewritten. Refuses what cannot be compared.

    Raises StageError where the first file is no float file, ArtifactError where the second one is not
    quantised or they share no tensor.
    """
    check_quantizable(parse_model(float_content, where=where[0]), where=where[0])
    graph = parse_model(quantised, where=where[1]).subgraphs[0]
    if not any(t.scales and not t.is_constant for t in graph.tensors):
        only_weights = any(
            t.is_constant and (t.scales or t.dtype == "float16") for t in graph.tensors
        )
        raise ArtifactError(
            f"no activation of {where[1]} is quantised{', only weights' * only_weights}: there is no range to explain",
            hint="`edgepipe quantize --all` tells what each precision keeps"
            if only_weights
            else "give the float file first and the int8 file second",
            code="not-quantised",
        )
    fused, _ = fuse_activations(float_content, where=where[0])
    made = {t.name for t in graph.tensors}

    def common(content: bytes) -> int:
        return len(made & layers_of(parse_model(content, where=where[0]).subgraphs[0]).keys())

    # without what was rewritten in vain: of two that share as many, the file as it is
    best = max((fused, rewrite(fused, where=where[0])[0]), key=common)
    if not common(best):
        raise ArtifactError(
            f"{where[0]} and {where[1]} have no tensor in common: one was not made from the other",
            hint="give the very float file that was quantised; converters name tensors anew each time",
            code="not-comparable",
        )
    alike = _weights_alike(best, quantised)
    if alike < SAME_WEIGHTS:
        raise ArtifactError(
            f"{where[1]} was not made from {where[0]}: their tensors have the same names, but the weights"
            f" are others (cosine {alike:.2f} in the median layer)",
            hint="give the very float file that was quantised, of the same training",
            code="not-comparable",
        )
    return best


def _weights_alike(float_content: bytes, quantised: bytes) -> float:
    """Cosine between weights of both files: the median over layers of the median over their channels.

    1.0 where there are none to compare. By channel, since what equalises scales whole channels.
    """
    ours, theirs = (parse_model(c, where="the model").subgraphs[0] for c in (float_content, quantised))  # fmt: skip
    made = {ours.tensors[o.outputs[0]].name: o for o in ours.operators if o.name in WITH_WEIGHTS}
    pairs = []
    for operator in theirs.operators:
        twin = made.get(theirs.tensors[operator.outputs[0]].name) if operator.outputs else None
        if twin is not None and twin.name == operator.name:
            pairs.append((ours.tensors[twin.inputs[1]], theirs.tensors[operator.inputs[1]]))
    pairs = [
        (a, b) for a, b in pairs
        if a.is_constant and b.is_constant and a.is_float and b.dtype == "int8" and a.shape == b.shape
    ]  # fmt: skip
    if not pairs:
        return 1.0
    floats = constants(float_content, dataclasses.replace(ours, tensors=tuple(a for a, _ in pairs)))
    integers = constants(quantised, dataclasses.replace(theirs, tensors=tuple(b for _, b in pairs)))
    found = []
    for a, b in pairs:
        # (..., channels, ...) -> (channels, weights of one)
        x, y = (
            np.moveaxis(t.astype(np.float64), b.quantized_axis, 0).reshape(b.shape[b.quantized_axis], -1)
            for t in (floats[a.index], integers[b.index])
        )  # fmt: skip
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        if (norms > 0).any():
            found.append(float(np.median((x * y).sum(axis=1)[norms > 0] / norms[norms > 0])))
    return float(np.median(found)) if found else 1.0


def layer_noise(float_content: bytes, quantised: bytes, batches: Batches) -> list[LayerNoise]:
    """What `LayerNoise` says, for every layer whose result both files name.

    ``float_content`` as `comparable` gives it; ``batches`` are real inputs of it. Three passes over
    them. Both files run on builtin kernels, which keep all tensors.
    """
    where = "the float model"
    graph = parse_model(quantised, where="the quantised model").subgraphs[0]
    statistics = channel_statistics(float_content, batches, where=where)
    limits = collect_ranges(float_content, batches, where=where).table()
    histograms = collect_histograms(float_content, batches, limits, where=where)
    made = [
        (o.name, graph.tensors[i])
        for o in graph.operators
        if o.name not in CONVERSIONS
        for i in o.outputs
        if i >= 0 and graph.tensors[i].name in limits and not graph.tensors[i].is_constant
    ]
    sums = {tensor.name: _Sums() for _, tensor in made}
    for expected, found in values_of_both(float_content, quantised, [t for _, t in made], batches):
        for (_, tensor), e, f in zip(made, expected, found, strict=True):
            sums[tensor.name].add(e, f, tensor)
    ratio = {t.name: s.noise / s.signal if s.signal else float(s.noise > 0) for t, s in ((t, sums[t.name]) for _, t in made)}  # fmt: skip
    added = added_noise(graph, ratio)
    rows = []
    for operator, tensor in made:
        low, high = limits[tensor.name]
        kept = METHODS["mse"](histograms[tensor.name])
        width = max(high, 0.0) - min(low, 0.0)
        channels = statistics.get(tensor.name)
        span = _span(tensor)
        total = sums[tensor.name]
        rows.append(
            LayerNoise(
                layer=tensor.name,
                operator=operator,
                dtype=tensor.dtype,
                sqnr_db=sqnr_db(total.signal, total.noise),
                added=max(added[tensor.name], 0.0),
                low=low,
                high=high,
                scale=tensor.scales[0] if tensor.scales else 0.0,
                zero_point=tensor.zero_points[0] if tensor.scales else 0,
                scale_low=span[0] if span else 0.0,
                scale_high=span[1] if span else 0.0,
                clipped=total.clipped / max(total.count, 1),
                dense_share=(kept[1] - kept[0]) / width if width else 1.0,
                bias_share=total.bias_share(),
                channels=len(channels.low) if channels else 0,
                dead_channels=int(channels.is_constant.sum()) if channels else 0,
                outlier_channels=_outliers(channels),
                spread=channels.spread if channels else 1.0,
            )
        )
    return rows


class _Sums:
    """Powers of signal and noise of one tensor, its errors by channel, and what was clipped."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.clipped = self.count = self.rows = 0
        self.errors = np.zeros(0)

    def add(self, expected: np.ndarray, found: np.ndarray, tensor: Tensor) -> None:
        if expected.shape != found.shape or not expected.size:
            return
        error = found - expected
        self.signal += float((expected**2).sum())
        self.noise += float((error**2).sum())
        self.count += expected.size
        by_channel = error.reshape(-1, error.shape[-1] if error.ndim else 1)
        self.rows += len(by_channel)
        self.errors = (
            self.errors + by_channel.sum(axis=0) if self.errors.size else by_channel.sum(axis=0)
        )
        span = _span(tensor)
        if span is not None:
            slack = tensor.scales[0] / 2  # half a step beyond the ends still rounds to them
            self.clipped += int(((expected < span[0] - slack) | (expected > span[1] + slack)).sum())

    def bias_share(self) -> float:
        """Power of the mean error of each channel over that of all errors."""
        if not self.noise:
            return 0.0
        return float((self.errors**2).sum() / self.rows / self.noise)


def _span(tensor: Tensor) -> Range | None:
    """The least and the largest real value that an integer tensor holds; None for a float one.

    int8 with scale 0.1 and zero point -28: (-128 + 28) * 0.1 = -10 to (127 + 28) * 0.1 = 15.5.
    """
    if not tensor.scales:
        return None
    limits = np.iinfo(tensor.dtype)
    zero, scale = tensor.zero_points[0], tensor.scales[0]
    return (float(limits.min) - zero) * scale, (float(limits.max) - zero) * scale


def _outliers(channels: ChannelStatistics | None) -> int:
    if channels is None or not (channels.reach > 0).any():
        return 0
    median = float(np.median(channels.reach[channels.reach > 0]))
    return int((channels.reach > OUTLIER * median).sum())


# --- what each layer alone spoils, and what could mend it ---------------------------------------------


def ranges_in(quantised: bytes, seen: Mapping[str, Range]) -> dict[str, Range]:
    """The int8 ranges that a quantised file holds, by tensor; ``seen`` where it holds none or 16 bits."""
    graph = parse_model(quantised, where="the quantised model").subgraphs[0]
    held = {t.name: span for t in graph.tensors if t.dtype == "int8" and not t.is_constant and (span := _span(t))}  # fmt: skip
    return {name: held.get(name, limits) for name, limits in seen.items()}


def noise_alone(float_content: bytes, quantised: bytes, batches: Batches) -> dict[str, float]:
    """Noise on the outputs (0 to 1, `noise_share`) if one layer alone were int8, with the file's ranges.

    Measured: a file is made and run for each (of more than 64, for those that add most noise). Only
    layers that are int8 in ``quantised`` are told of. Weights are the float file's, so what a ladder
    did to them does not show.
    """
    where = "the float model"
    ranges = ranges_in(quantised, collect_ranges(float_content, batches, where=where).table())
    found = layer_sensitivity(float_content, ranges, batches, where=where)
    other = _other_precision(float_content, quantised)
    return {s.layer: s.noise for s in found if s.layer not in other}


def _other_precision(float_content: bytes, quantised: bytes) -> dict[str, Precision]:
    """The layers of the float file that are 16-bit or float in the other one."""
    layers = layers_of(parse_model(float_content, where="the float model").subgraphs[0])
    graph = parse_model(quantised, where="the quantised model").subgraphs[0]
    kinds: dict[str, Precision] = {"int16": "int16", "float32": "float"}
    doors = {o.outputs[0] for o in graph.operators if o.name in CONVERSIONS}
    return {t.name: kinds[t.dtype] for t in graph.tensors if t.name in layers and t.dtype in kinds and t.index not in doors}  # fmt: skip


def without_layer(float_content: bytes, quantised: bytes, layer: str, batches: Batches) -> bytes:
    """A file with the ranges and precisions of ``quantised``, in which ``layer`` alone is float as well.

    ``layer`` "" adds none. Its doors are float32, its weights the float file's.
    """
    where = "the float model"
    ranges = ranges_in(quantised, collect_ranges(float_content, batches, where=where).table())
    precision = _other_precision(float_content, quantised)
    if layer:
        precision[layer] = "float"
    return quantize(
        float_content, ranges, input_dtype="float32", output_dtype="float32",
        precision=precision, where=where,
    )  # fmt: skip


def find_repairs(float_content: bytes, batches: Batches) -> Repairs:
    """What the third rung of the ladder could do to this float file."""
    where = "the float model"
    statistics = channel_statistics(float_content, batches, where=where)
    layers = layers_of(parse_model(float_content, where=where).subgraphs[0])
    _, repaired = repair_dead_channels(float_content, statistics, where=where)
    _, equalised = equalise(float_content, statistics, strength=1.0, where=where)

    def about(sentence: str) -> tuple[str, str]:
        """(layer, the sentence without its subject)"""
        name, operator = next(
            (n, o) for n, o in layers.items() if sentence.startswith(f"{o} {n!r}")
        )
        return name, sentence.removeprefix(f"{operator} {name!r}")

    return Repairs(
        equalisable=frozenset(about(s)[0] for s in equalised),
        dead_gains={n: f"it{what.removesuffix(': set to 0')}" for n, what in map(about, repaired)},
    )


def noise_alone_by_rung(
    float_content: bytes,
    quantised: bytes,
    layers: Sequence[str],
    batches: Batches,
    *,
    judge: Judge,
    max_drop: float,
) -> list[tuple[Rung, bytes, dict[str, float]]]:
    """Climb the ladder from a quantised file's own ranges: each rung, its file, and the noise that each
    of ``layers`` alone puts on the outputs (0 to 1) if it is made as that rung makes it.

    As `noise_alone`, the other layers are float. Rounding is left out: it takes about a second for
    each layer. Doors, float operators and 16-bit layers are those of ``quantised``. ``judge`` and
    ``max_drop`` as for `climb`, whose errors this raises.
    """
    where = "the float model"
    graph = parse_model(quantised, where="the quantised model").subgraphs[0]
    ranges = ranges_in(quantised, collect_ranges(float_content, batches, where=where).table())
    islands = describe_model(parse_model(quantised, where=where)).float_islands
    rescue = climb(
        float_content, ranges, "the file's own", batches=lambda: batches, judge=judge, max_drop=max_drop,
        input_dtype=_door(graph, graph.inputs), output_dtype=_door(graph, graph.outputs),
        allow_float=sorted({o for island in islands for o in island.computing}), round_weights=None,
        precision=_other_precision(float_content, quantised), where=where,
    )  # fmt: skip
    expected = outputs_of(float_content, batches, where=where)
    found = []
    for rung, (plan, content) in zip(rescue.rungs, rescue.made, strict=True):
        names = layers_of(parse_model(plan.content, where=where).subgraphs[0])
        noise = {}
        for layer in layers:
            others: dict[str, Precision] = {n: "float" for n in names if n != layer}
            if layer in plan.precision:
                others[layer] = plan.precision[layer]
            alone = quantize(
                plan.content, plan.ranges, input_dtype="float32", output_dtype="float32",
                precision=others, where=where,
            )  # fmt: skip
            if plan.corrected:
                alone, _ = correct_biases(plan.content, alone, batches, where=where)
            noise[layer] = noise_share(expected, outputs_of(alone, batches, where=where))
        found.append((rung, content, noise))
    return found


def _door(graph: Subgraph, tensors: Sequence[int]) -> IoDtype:
    """What a file's inputs, or its outputs, are for who uses it; one of the quantiser's choices."""
    dtypes = {graph.tensors[i].dtype for i in tensors}
    kinds: tuple[IoDtype, ...] = ("int8", "uint8")
    return next((kind for kind in kinds if kind in dtypes), "float32")
