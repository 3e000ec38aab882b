"""Statistics that need nothing but the standard library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1) by linear interpolation (Hyndman & Fan 1996, type 7).

    ``percentile([1, 2, 3, 4], 0.5) == 2.5``.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def binomial_cdfs(n: int, p: float) -> Iterator[float]:
    """P(X <= 0), P(X <= 1), ... for X ~ Binomial(n, p), 0 < p < 1.

    Terms by the recurrence P(i+1) = P(i) (n-i)/(i+1) p/(1-p), in log space so that n in the
    thousands does not underflow.
    """
    log_odds = math.log(p) - math.log1p(-p)
    log_term = n * math.log1p(-p)
    total = 0.0
    for i in range(n + 1):
        total += math.exp(log_term)
        yield min(1.0, total)
        if i < n:
            log_term += math.log(n - i) - math.log(i + 1) + log_odds


def percentile_upper_bound(samples: Sequence[float], q: float, confidence: float) -> float | None:
    """A value the true q-quantile does not exceed, at one-sided ``confidence``; None if n is too small.

    Distribution-free order-statistic bound (Hahn & Meeker, Statistical Intervals, 5.2): the k-th
    largest sample bounds the quantile from above when BinomCDF(k - 1; n, 1 - q) <= 1 - confidence;
    the largest such k is used. p90 at 99 %: 44 samples -> the maximum, 64 -> the 2nd largest.
    """
    k = _tail_rank(len(samples), 1.0 - q, confidence)
    return sorted(samples)[len(samples) - k] if k else None


def percentile_lower_bound(samples: Sequence[float], q: float, confidence: float) -> float | None:
    """A value the true q-quantile is not below, at one-sided ``confidence``; None if n is too small."""
    k = _tail_rank(len(samples), q, confidence)
    return sorted(samples)[k - 1] if k else None


def _tail_rank(n: int, p: float, confidence: float) -> int:
    """The largest k with BinomCDF(k - 1; n, p) <= 1 - confidence; 0 if there is none."""
    rank = 0
    for below in binomial_cdfs(n, p):
        if below > 1.0 - confidence:
            break
        rank += 1
    return min(rank, n)


def sessions_upper_bound(
    sessions: Sequence[Sequence[float]], q: float, confidence: float
) -> float | None:
    """Median over sessions of each session's upper bound; None if any session is too small.

    Inferences of one process are not independent of each other, so sessions are never pooled.
    """
    return _median_bound([percentile_upper_bound(s, q, confidence) for s in sessions])


def sessions_lower_bound(
    sessions: Sequence[Sequence[float]], q: float, confidence: float
) -> float | None:
    """Median over sessions of each session's lower bound; None if any session is too small."""
    return _median_bound([percentile_lower_bound(s, q, confidence) for s in sessions])


def _median_bound(bounds: Sequence[float | None]) -> float | None:
    known = [b for b in bounds if b is not None]
    return statistics.median(known) if known and len(known) == len(bounds) else None


def sessions_percentile(sessions: Sequence[Sequence[float]], q: float) -> float:
    """Median over sessions of each session's q-quantile."""
    return statistics.median(percentile(s, q) for s in sessions)


def paired_difference_interval(
    reference: Sequence[bool], candidate: Sequence[bool], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(difference, low, high) of two accuracies on the same samples, as reference - candidate.

    Wald interval for a difference of paired proportions with Agresti & Min's (2005) adjustment,
    which adds 1/2 to each cell of the 2x2 table so that zero flips do not give a zero-width interval.
    """
    n = len(reference)
    if n == 0 or n != len(candidate):
        raise ValueError(f"{n} reference and {len(candidate)} candidate samples")
    lost = sum(r and not c for r, c in zip(reference, candidate, strict=True))
    won = sum(c and not r for r, c in zip(reference, candidate, strict=True))
    b, c, total = lost + 0.5, won + 0.5, n + 2
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    adjusted = (b - c) / total
    half = z * math.sqrt(max(0.0, (b + c) - (b - c) ** 2 / total)) / total
    return (lost - won) / n, max(-1.0, adjusted - half), min(1.0, adjusted + half)
