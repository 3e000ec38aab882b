"""Is this data fit to calibrate with? Found out before anything is quantised."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgepipe.array_ops.layout import to_layout
from edgepipe.array_ops.load import Samples, SampleStream, check_shape
from edgepipe.array_ops.roll import one_by_one
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.state import batch_axis, is_stateful

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
    # how many there were to take ``samples`` from, and whether ``samples = "auto"`` took them
    available: int = 0
    is_auto: bool = False


def check_calibration(
    samples: Samples | SampleStream,
    specs: Sequence[TensorSpec],
    *,
    source: DataSource | None = None,
    reference: Samples | SampleStream | None = None,
    allow_random: bool = False,
    min_samples: int = 8,
) -> CalibrationReport:
    """Check samples for a model with inputs ``specs``, both in the source layout, in one pass.

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
            f"{samples.origin} are too few to calibrate with (at least {min_samples})",
            hint=f"give {ENOUGH_SAMPLES} or more real samples; the stage's min_samples lowers the limit",
            code="too-few-samples",
        )
    warnings: list[str] = []
    statistics = []
    measured = _measure(samples, specs, only_finite=True)
    for spec in specs:
        seen = measured[spec.name]
        found = seen.statistics(spec)
        statistics.append(found)
        if seen.is_float:
            if not samples.is_random:
                _check_constant(seen, spec, samples.origin)
                warnings += _constant_channels(seen, spec)
            warnings += _check_scaling(found, spec, source, samples.origin)
    if reference is not None:
        warnings += compare_inputs(statistics, reference, specs)
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


def file_batches(
    samples: Samples | SampleStream, specs: Sequence[TensorSpec]
) -> Iterator[list[np.ndarray]]:
    """Samples one batch of the file at a time: for each input, (batch, ...) in the file's layout.

    A scalar input has (N,) samples and takes one at a time: (). A file that has one and takes several
    samples at once is a DataError.
    The last batch is filled up with its own last sample, which adds nothing to a range. Of a model with
    state every step of a sequence is a sample, with the states that ``samples.states_from`` gives it, in a
    seeded order: whoever takes every k-th must not always get the first step, whose state is zero.
    """
    size = max((spec.shape[spec.layout.find("N")] if "N" in spec.layout else 1) for spec in specs)
    size = max(size, 1)
    scalar = next((spec.name for spec in specs if not spec.shape), None)
    if scalar is not None and size > 1:
        raise DataError(
            f"input {scalar!r} is a scalar, one number for an inference, but the model takes {size} samples at once",
            hint="convert it with a batch of 1",
        )
    axes = [batch_axis(spec.source_layout) for spec in specs]
    rows = (
        row
        for chunk in samples.chunks()
        for inputs in [_single_steps(chunk, specs)]
        for row in zip(*(np.moveaxis(inputs[s.name], a, 0) for s, a in zip(specs, axes, strict=True)), strict=True)
    )  # fmt: skip
    while batch := list(itertools.islice(rows, size)):
        batch += [batch[-1]] * (size - len(batch))
        yield [
            np.ascontiguousarray(
                to_layout(np.stack(column, axis=axis), spec.source_layout, spec.layout)
            )
            if spec.shape
            else np.asarray(column[0])
            for column, spec, axis in zip(zip(*batch, strict=True), specs, axes, strict=True)
        ]


def _single_steps(chunk: Samples, specs: Sequence[TensorSpec]) -> Mapping[str, np.ndarray]:
    if not is_stateful(specs):
        return chunk.inputs
    if chunk.states_from is None:
        raise DataError("sequences for a model with state, but no model to take the states from")
    found = one_by_one(chunk.states_from, specs, chunk.inputs)
    axes = {spec.name: batch_axis(spec.source_layout) for spec in specs}
    count = next(found[name].shape[axis] for name, axis in axes.items())
    order = np.random.default_rng(0).permutation(count)
    return {name: np.take(found[name], order, axis=axis) for name, axis in axes.items()}


def settle(
    minima: np.ndarray,
    maxima: np.ndarray,
    names: Sequence[str],
    *,
    samples: int = 0,
    seed: int = 0,
) -> Settling:
    """How the ranges of T tensors widen over N samples: ``minima``, ``maxima`` are (N, T).

    Where each row stands for several of them, ``samples`` is how many there were in all; the curve
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
            (size * (samples or count) // count, round(float(share.mean()), 4))
            for size, share in zip(sizes, shares, strict=True)
        ),
        growth=round(mean_growth, 4),
        slowest=str(np.array(names, dtype=object)[moving][worst]),
        slowest_growth=round(float(growth[worst]), 4),
        is_settled=mean_growth < SETTLED_GROWTH,
    )


class _Measured:
    """What one pass notes of an input; ``add`` takes (n, ...) of it at a time.

    Mean and squared deviations are merged as in Chan, Golub and LeVeque 1979, "Updating formulae and
    a pairwise algorithm for computing sample variances", eq. 2.1.
    """

    def __init__(self, first: np.ndarray, spec: TensorSpec) -> None:
        self.first = first[0].copy()
        self.shape, self.dtype = first.shape[1:], first.dtype
        self.is_float = first.dtype.kind == "f"
        axis = spec.layout.find("C")
        # the axes that are not the channels'; none where channels are not told apart
        has_channels = 0 < axis < first.ndim and first.shape[axis] > 1
        self.others = tuple(i for i in range(first.ndim) if i != axis) if has_channels else ()
        self.count = 0
        self.mean, self.deviations = 0.0, 0.0
        self.minimum = self.maximum = self.first.reshape(-1)[:1].copy()
        self.channels: tuple[np.ndarray, np.ndarray] | None = None
        self.all_same = True
        self.bad, self.first_bad, self.has_nan = 0, 0, False

    def add(self, array: np.ndarray) -> None:
        if self.is_float:
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if not finite.all():
                self.first_bad = self.first_bad if self.bad else self.count + int(finite.argmin())
                self.bad += int((~finite).sum())
                self.has_nan |= bool(np.isnan(array).any())
        if self.bad:  # no figure means anything any more
            self.count += len(array)
            return
        self.minimum = np.minimum(self.minimum, array.min())
        self.maximum = np.maximum(self.maximum, array.max())
        self.all_same &= bool((array == self.first).all())
        if self.others:
            low, high = array.min(axis=self.others), array.max(axis=self.others)
            if self.channels is not None:
                low, high = np.minimum(low, self.channels[0]), np.maximum(high, self.channels[1])
            self.channels = low, high
        mean, values = float(array.mean(dtype=np.float64)), self.first.size
        before, new = self.count * values, len(array) * values
        shift = mean - self.mean
        self.deviations += float(array.var(dtype=np.float64)) * new + shift**2 * before * new / (before + new)  # fmt: skip
        self.mean += shift * new / (before + new)
        self.count += len(array)

    def statistics(self, spec: TensorSpec) -> InputStatistics:
        return InputStatistics(
            name=spec.name,
            shape=(self.count, *self.shape),
            dtype=str(self.dtype),
            minimum=float(self.minimum[0]),
            maximum=float(self.maximum[0]),
            mean=self.mean,
            std=float(np.sqrt(self.deviations / max(self.count * self.first.size, 1))),
        )


def _measure(
    samples: Samples | SampleStream, specs: Sequence[TensorSpec], *, only_finite: bool = False
) -> dict[str, _Measured]:
    """Input name -> what one pass over all samples finds of it. Inputs that are not there are left
    out, or with ``only_finite``, as is what is not finite, a DataError."""
    found: dict[str, _Measured] = {}
    for chunk in samples.chunks():
        for spec in specs:
            array = chunk.inputs.get(spec.name)
            if array is None and only_finite:
                raise DataError(
                    f"{samples.origin}: no samples for input {spec.name!r}",
                    hint=f"inputs there: {', '.join(chunk.inputs)}",
                )
            if array is None:
                continue
            if only_finite:
                check_shape(array.shape, spec, where=samples.origin)
                if array.dtype != np.dtype(spec.dtype):
                    raise DataError(
                        f"{samples.origin}: input {spec.name!r} is {array.dtype},"
                        f" the model wants {spec.dtype}"
                    )
            found.setdefault(spec.name, _Measured(array, spec)).add(array)
    for spec in specs if only_finite else ():
        seen = found[spec.name]
        if seen.bad:
            raise DataError(
                f"{samples.origin}: input {spec.name!r} has {'NaN' if seen.has_nan else 'infinity'}"
                f" in {seen.bad} of {len(samples)} samples, first in sample {seen.first_bad}",
                hint="remove these samples, or mend the code that makes them",
                code="not-finite",
            )
    return found


def _check_constant(seen: _Measured, spec: TensorSpec, origin: str) -> None:
    if seen.minimum[0] == seen.maximum[0]:
        raise DataError(
            f"{origin}: input {spec.name!r} is {seen.first.flat[0]:.6g} everywhere, in every sample",
            hint="look at how the samples were made: the file may hold an empty buffer",
            code="constant-data",
        )
    if seen.count > 1 and seen.all_same:
        raise DataError(
            f"{origin}: all {seen.count} samples of input {spec.name!r} are the same",
            hint="give different samples",
            code="constant-data",
        )


def _constant_channels(seen: _Measured, spec: TensorSpec) -> list[str]:
    if seen.channels is None:
        return []
    flat = np.flatnonzero(seen.channels[0] == seen.channels[1])
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


def compare_inputs(
    calibration: Sequence[InputStatistics],
    reference: Samples | SampleStream,
    specs: Sequence[TensorSpec],
) -> list[str]:
    """Doubts where float inputs of calibration and of ``reference`` look prepared differently."""
    measured = _measure(reference, specs)
    doubts = []
    for found, spec in zip(calibration, specs, strict=True):
        if spec.name not in measured or not measured[spec.name].is_float:
            continue
        other = measured[spec.name].statistics(spec)
        shift = abs(found.mean - other.mean) / max(other.std, 1e-12)
        spread = max(found.std, 1e-12) / max(other.std, 1e-12)
        # Two honest draws of the same pictures differ by a few per cent; other preparation, such as a
        # forgotten division by 255 or another mean, by factors.
        if shift > 1 or not 1 / 3 < spread < 3:
            doubts.append(
                f"input {found.name!r}: calibration has mean {found.mean:.4g} and spread {found.std:.4g},"
                f" {reference.origin} has {other.mean:.4g} and {other.std:.4g}: are both prepared the same way?"
            )
    return doubts
