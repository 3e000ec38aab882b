"""Is this data fit to calibrate with? Found out before anything is quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from edgepipe.array_ops.layout import to_layout
from edgepipe.array_ops.load import Samples, check_shape
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError

# "A few hundred": the LiteRT post-training quantisation guide asks for 100-500 samples.
ENOUGH_SAMPLES = 100
# A range of one fiftieth holds 5 of the 256 grey levels of x / 255: no picture is that flat, but
# one that was divided by 255 twice spans 1/255.
TINY_RANGE = 1 / 50
# Ranges count as settled where the second half of the samples widens them by less than this on
# average. Clipping 5 % of a range moves a few values by at most 13 of 256 steps.
SETTLED_GROWTH = 0.05
# The order of samples decides what "the first half" holds, and files come sorted by class: average
# the curve over this many seeded orders.
ORDERS = 8


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Of one input, over all samples: its values as the model gets them."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    minimum: float
    maximum: float
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class Settling:
    """How activation ranges widen as samples are added.

    ``curve`` holds (number of samples, mean over tensors of range so far / range of all) at an
    eighth, a quarter, half and all of them. ``growth`` is how much the second half added, on
    average; ``slowest`` names the tensor it added most to, and ``slowest_growth`` how much.
    """

    curve: tuple[tuple[int, float], ...]
    growth: float
    slowest: str
    slowest_growth: float
    is_settled: bool


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What was found. Anything that would spoil the result was raised as DataError instead."""

    samples: int
    origin: str
    is_random: bool
    inputs: tuple[InputStatistics, ...]
    warnings: tuple[str, ...]
    settling: Settling | None = None


def check_calibration(
    samples: Samples,
    specs: Sequence[TensorSpec],
    *,
    source: DataSource | None = None,
    reference: Samples | None = None,
    allow_random: bool = False,
    min_samples: int = 8,
) -> CalibrationReport:
    """Check samples for a model with inputs ``specs``, both in the source layout.

    ``source`` tells which scaling was declared, ``reference`` is data the model will be judged on.
    Raises DataError for: random data unless allowed, fewer than ``min_samples``, a wrong name,
    shape, layout or dtype, NaN or infinity, inputs that never change, and data that was normalised
    before it was normalised here. Doubts are ``warnings`` of the report.
    """
    if samples.is_random and not allow_random:
        raise DataError(
            "calibration data is random noise: ranges taken from it say nothing about real inputs",
            hint="give real samples; for a smoke test only, set allow_random = true",
            code="random-calibration",
        )
    count = len(samples)
    if count < min_samples:
        raise DataError(
            f"{samples.origin}: {count} samples are too few to calibrate with"
            f" (at least {min_samples})",
            hint=f"give {ENOUGH_SAMPLES} or more real samples; min_samples lowers the limit",
            code="too-few-samples",
        )
    warnings: list[str] = []
    statistics = []
    for spec in specs:
        if spec.name not in samples.inputs:
            raise DataError(
                f"{samples.origin}: no samples for input {spec.name!r}",
                hint=f"inputs there: {', '.join(samples.inputs)}",
            )
        array = samples.inputs[spec.name]
        check_shape(array, spec, where=samples.origin)
        if array.dtype != np.dtype(spec.dtype):
            raise DataError(
                f"{samples.origin}: input {spec.name!r} is {array.dtype},"
                f" the model wants {spec.dtype}"
            )
        found = _statistics(array, spec, samples.origin)
        statistics.append(found)
        if array.dtype.kind == "f":
            if not samples.is_random:
                _check_constant(array, spec, samples.origin)
                warnings += _constant_channels(array, spec)
            warnings += _check_scaling(found, spec, source, samples.origin)
            if reference is not None:
                warnings += _compare_with(found, reference, spec)
    if samples.is_random:
        warnings.append("calibrated on random noise, as asked for: a smoke test, not a result")
    return CalibrationReport(
        samples=count,
        origin=samples.origin,
        is_random=samples.is_random,
        inputs=tuple(statistics),
        warnings=tuple(warnings),
    )


def add_settling(report: CalibrationReport, settling: Settling) -> CalibrationReport:
    """The report with what calibration itself found, and a warning where more samples are needed."""
    warnings = report.warnings
    if not settling.is_settled and not report.is_random:
        warnings += (
            f"activation ranges have not settled after {report.samples} samples: the second half"
            f" widened them by {100 * settling.growth:.0f} % on average, {settling.slowest!r} by"
            f" {100 * settling.slowest_growth:.0f} %; add samples"
            + (f" ({ENOUGH_SAMPLES} or more)" if report.samples < ENOUGH_SAMPLES else ""),
        )
    return dataclasses.replace(report, settling=settling, warnings=warnings)


def file_batches(samples: Samples, specs: Sequence[TensorSpec]) -> Iterator[list[np.ndarray]]:
    """Samples one batch of the file at a time: for each input, (batch, ...) in the file's layout.

    The last batch is filled up with its own last sample, which adds nothing to a range.
    """
    size = max((spec.shape[spec.layout.find("N")] if "N" in spec.layout else 1) for spec in specs)
    size = max(size, 1)
    for start in range(0, len(samples), size):
        rows = np.minimum(np.arange(start, start + size), len(samples) - 1)
        yield [
            np.ascontiguousarray(
                to_layout(samples.inputs[spec.name][rows], spec.source_layout, spec.layout)
            )
            for spec in specs
        ]


def settle(
    minima: np.ndarray,
    maxima: np.ndarray,
    names: Sequence[str],
    *,
    batches: int = 0,
    seed: int = 0,
) -> Settling:
    """How the ranges of T tensors widen over N samples: ``minima``, ``maxima`` are (N, T).

    Where each row stands for several batches, ``batches`` is how many there were in all; the curve
    then counts those.

    Worked example: one tensor, maxima 1, 1, 1, 2 and minima 0. In stored order the range after half
    the samples is 1 and after all 2, so the second half widened it by 50 % of the whole.
    """
    count, tensors = minima.shape
    sizes = sorted({max(1, count // 8), max(1, count // 4), max(1, count // 2), count})
    whole = maxima.max(axis=0) - minima.min(axis=0)  # (T,)
    moving = whole > 0
    if not moving.any() or tensors == 0:
        return Settling(tuple((n, 1.0) for n in sizes), 0.0, "", 0.0, is_settled=True)
    generator = np.random.default_rng(seed)
    shares = np.zeros((len(sizes), int(moving.sum())))
    for _ in range(ORDERS):
        order = generator.permutation(count)
        for row, size in enumerate(sizes):
            chosen = order[:size]
            widths = maxima[chosen][:, moving].max(axis=0) - minima[chosen][:, moving].min(axis=0)
            shares[row] += widths / whole[moving] / ORDERS
    half = sizes.index(max(1, count // 2))
    growth = 1 - shares[half] if count > 1 else np.ones(int(moving.sum()))
    worst = int(growth.argmax())
    mean_growth = float(growth.mean())
    return Settling(
        curve=tuple(
            (size * (batches or count) // count, round(float(share.mean()), 4))
            for size, share in zip(sizes, shares, strict=True)
        ),
        growth=round(mean_growth, 4),
        slowest=str(np.array(names, dtype=object)[moving][worst]),
        slowest_growth=round(float(growth[worst]), 4),
        is_settled=mean_growth < SETTLED_GROWTH,
    )


def _statistics(array: np.ndarray, spec: TensorSpec, origin: str) -> InputStatistics:
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            bad = np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1))
            kinds = "NaN" if np.isnan(array).any() else "infinity"
            raise DataError(
                f"{origin}: input {spec.name!r} has {kinds} in {len(bad)} of {len(array)} samples,"
                f" first in sample {bad[0]}",
                hint="remove these samples, or mend the code that makes them",
                code="not-finite",
            )
    return InputStatistics(
        name=spec.name,
        shape=tuple(array.shape),
        dtype=str(array.dtype),
        minimum=float(array.min()),
        maximum=float(array.max()),
        mean=float(array.mean(dtype=np.float64)),
        std=float(array.std(dtype=np.float64)),
    )


def _check_constant(array: np.ndarray, spec: TensorSpec, origin: str) -> None:
    if array.min() == array.max():
        raise DataError(
            f"{origin}: input {spec.name!r} is {array.flat[0]:.6g} everywhere, in every sample",
            hint="look at how the samples were made: the file may hold an empty buffer",
            code="constant-data",
        )
    if len(array) > 1 and bool((array == array[0]).all()):
        raise DataError(
            f"{origin}: all {len(array)} samples of input {spec.name!r} are the same",
            hint="give different samples",
            code="constant-data",
        )


def _constant_channels(array: np.ndarray, spec: TensorSpec) -> list[str]:
    axis = spec.layout.find("C")
    if not 0 < axis < array.ndim or array.shape[axis] < 2:
        return []
    others = tuple(i for i in range(array.ndim) if i != axis)
    flat = np.flatnonzero(array.min(axis=others) == array.max(axis=others))
    if not len(flat):
        return []
    return [f"input {spec.name!r}: channels {flat.tolist()} never change"]


def _check_scaling(
    found: InputStatistics, spec: TensorSpec, source: DataSource | None, origin: str
) -> list[str]:
    """Was the data scaled twice, or not at all? DataError where the declared steps prove it."""
    width = found.maximum - found.minimum
    declared = source is not None and (source.scale != 1.0 or bool(source.mean or source.std))
    if width < TINY_RANGE:
        text = (
            f"input {spec.name!r} spans only {found.minimum:.4g} to {found.maximum:.4g}:"
            " it looks scaled twice (divided by 255 two times?)"
        )
        if declared:
            raise DataError(
                f"{origin}: {text}",
                hint="the stored values are scaled already: remove scale, mean and std",
                code="normalised-twice",
            )
        return [text]
    if source is None or not (source.mean or source.std) or source.kind == "random":
        return []
    mean = float(np.mean(source.mean or (0.0,)))
    std = float(np.mean(source.std or (1.0,)))
    # what (x * scale - mean) / std was made from; standardised data sits around 0 with spread 1
    before_mean, before_std = found.mean * std + mean, found.std * std
    before_minimum = found.minimum * std + mean
    if mean > 0.2 and before_minimum < -0.5 and abs(before_mean) < 0.25 and 0.5 < before_std < 2:
        raise DataError(
            f"{origin}: input {spec.name!r} was normalised before: its values have mean"
            f" {before_mean:.2g} and spread {before_std:.2g} already, then mean = {mean:.3g} and"
            f" std = {std:.3g} were applied once more",
            hint="remove scale, mean and std from this data set, or store raw values",
            code="normalised-twice",
        )
    if source.kind == "images" and max(abs(found.minimum), abs(found.maximum)) > 20:
        return [
            f"input {spec.name!r} goes from {found.minimum:.4g} to {found.maximum:.4g} after"
            f" mean and std: were pixels divided by 255 (scale = 0.00392157)?"
        ]
    return []


def _compare_with(found: InputStatistics, reference: Samples, spec: TensorSpec) -> list[str]:
    """Doubts where calibration and evaluation data look prepared differently."""
    array = reference.inputs.get(spec.name)
    if array is None:
        return []
    mean, std = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    shift = abs(found.mean - mean) / max(std, 1e-12)
    spread = max(found.std, 1e-12) / max(std, 1e-12)
    # Two honest draws of the same pictures differ by a few per cent; other preparation, such as a
    # forgotten division by 255 or another mean, by factors.
    if shift > 1 or not 1 / 3 < spread < 3:
        return [
            f"input {spec.name!r}: calibration has mean {found.mean:.4g} and spread {found.std:.4g},"
            f" {reference.origin} has {mean:.4g} and {std:.4g}: are both prepared the same way?"
        ]
    return []
