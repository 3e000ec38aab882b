"""Choosing the range of an int8 activation from a histogram of its values.

A histogram has `BINS` equal bins between the smallest and the largest value, so whatever is read off
it is exact to one bin, 1/8 of an int8 step of the whole range. Zeros are counted apart: int8 holds
them exactly, and behind a ReLU most values are zeros. Memory is 16 kB a tensor for any number of
samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

BINS = 2048
LEVELS = 255  # steps between the 256 values of int8
# Ends that `mse_range` tries on each side, and how often it goes over both sides
TRIED, SWEEPS = 128, 3
# Of bins that are no wider the reciprocal is no float32: as if nothing were to be counted
TINY = float(np.finfo(np.float32).tiny)
# `kl_range` moves its ends by so many bins at a time
KL_STRIDE = 16

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """``counts`` (BINS,) of the values other than 0 between ``low`` and ``high``; ``zeros`` of them.

    ``low`` <= 0 <= ``high``, as every int8 range holds zero.
    """

    low: float
    high: float
    counts: np.ndarray
    zeros: int

    @property
    def width(self) -> float:
        return (self.high - self.low) / BINS

    def centres(self) -> np.ndarray:
        """(BINS,) float64: the middle of each bin."""
        return np.asarray(self.low + (np.arange(BINS) + 0.5) * self.width)


def new_histogram(low: float, high: float) -> Histogram:
    """An empty one for values from ``low`` to ``high``, widened to hold zero."""
    return Histogram(min(low, 0.0), max(high, 0.0), np.zeros(BINS, np.int64), 0)


def add_values(histogram: Histogram, values: np.ndarray) -> Histogram:
    """The histogram with more values (any shape). Those outside count in its first or last bin,
    infinities too."""
    flat = values.ravel()
    flat = flat[flat != 0]
    zeros = histogram.zeros + values.size - flat.size
    if histogram.width > TINY and flat.size:
        scale = np.float32(1 / histogram.width)
        with np.errstate(over="ignore"):
            at = (flat - np.float32(histogram.low)) * scale
        # before the cast: of what an int32 cannot hold it makes its least number
        counts = np.bincount(np.clip(at, 0, BINS - 1).astype(np.int32), minlength=BINS)
        return dataclasses.replace(histogram, counts=histogram.counts + counts, zeros=zeros)
    return dataclasses.replace(histogram, zeros=zeros)


def percentile_range(histogram: Histogram, percentile: float = 99.99) -> Range:
    """The range without the outermost (100 - ``percentile``) % of the values at each end.

    Within one bin of ``numpy.percentile`` of the values themselves (and zero); zeros count.
    """
    total = int(histogram.counts.sum()) + histogram.zeros
    if not histogram.counts.any():
        return histogram.low, histogram.high
    outside = total * (1 - percentile / 100)
    edges = histogram.low + np.arange(BINS + 1) * histogram.width
    zero_bin = min(int(-histogram.low / histogram.width), BINS - 1)
    counts = histogram.counts.copy()
    counts[zero_bin] += histogram.zeros
    from_left, from_right = np.cumsum(counts), np.cumsum(counts[::-1])
    first = int(np.searchsorted(from_left, outside, side="right"))
    last = BINS - 1 - int(np.searchsorted(from_right, outside, side="right"))
    return min(float(edges[first]), 0.0), max(float(edges[last + 1]), 0.0)


def mse_range(histogram: Histogram) -> Range:
    """The range with the least mean squared error of rounding and clipping together.

    A value inside is off by s^2 / 12 on average (s the step), one outside by its distance to the
    end (Nagel et al. 2021, "A white paper on neural network quantization", section 3.1, eq. 12).
    Both ends are searched in turn over `TRIED` places each.
    """
    counts, centres = histogram.counts.astype(np.float64), histogram.centres()
    if not counts.any():
        return histogram.low, histogram.high

    def error(low: float, high: float) -> float:
        step = (high - low) / LEVELS
        inside = (centres >= low) & (centres <= high)
        clipped = np.where(centres < low, low - centres, centres - high)
        return float((counts * np.where(inside, step**2 / 12, clipped**2)).sum())

    low, high = histogram.low, histogram.high
    share = np.arange(1, TRIED + 1) / TRIED
    for _ in range(SWEEPS):
        before = (low, high)
        if histogram.high > 0:
            ends = np.append(histogram.high * share, 0.0) if low < 0 else histogram.high * share
            high = min((float(end) for end in ends), key=lambda end: error(low, end))
        if histogram.low < 0:
            ends = np.append(histogram.low * share, 0.0) if high > 0 else histogram.low * share
            low = min((float(end) for end in ends), key=lambda end: error(end, high))
        if (low, high) == before:
            break
    return low, high


def kl_range(histogram: Histogram) -> Range:
    """The range whose 256 levels keep most of the distribution (Migacz 2017, "8-bit inference with
    TensorRT", GTC, the entropy calibration there, for both ends in turn).

    For each candidate: P is the part inside with what lies outside put into its end bins, Q that part
    without it, merged to 256 levels and spread over the bins again; least sum P log(P / Q) wins.
    """
    if not histogram.counts.any():
        return histogram.low, histogram.high
    zero_bin = min(int(-histogram.low / histogram.width), BINS - 1)
    first, stop = 0, BINS
    for _ in range(SWEEPS):
        before = (first, stop)
        stops = range(BINS, max(first + LEVELS, zero_bin), -KL_STRIDE)
        stop = min(stops, key=lambda end: _divergence(histogram.counts, first, end))
        firsts = range(0, min(stop - LEVELS, zero_bin + 1), KL_STRIDE)
        first = min(firsts, key=lambda end: _divergence(histogram.counts, end, stop))
        if (first, stop) == before:
            break
    low, high = (histogram.low + end * histogram.width for end in (first, stop))
    return min(low, 0.0), max(high, 0.0)


def _divergence(counts: np.ndarray, first: int, stop: int) -> float:
    """Of the bins [first, stop), what is clipped in its ends, from what 255 levels make of them."""
    inside = counts[first:stop].astype(np.float64)
    if not inside.any():
        return float("inf")
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[stop:].sum()
    starts = np.linspace(0, len(inside), LEVELS, endpoint=False).astype(int)
    filled = np.add.reduceat((inside > 0).astype(np.float64), starts)
    merged = np.add.reduceat(inside, starts) / np.maximum(filled, 1)
    spread = np.repeat(merged, np.diff(np.append(starts, len(inside)))) * (inside > 0)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    at = p > 0
    # an end bin that is empty but for what was clipped into it: as if a billionth were there
    return float((p[at] * np.log(p[at] / np.maximum(q[at], 1e-9))).sum())


METHODS: dict[str, Callable[[Histogram], Range]] = {
    "percentile": percentile_range,
    "mse": mse_range,
    "kl": kl_range,
}
