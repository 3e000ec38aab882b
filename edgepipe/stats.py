"""Statistics that need nothing but the standard library."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

# After how many sessions a ratio is looked at (MEASUREMENT 5.4); after the last one it stays open.
LOOKS = (3, 5, 8, 12)
# Confidence of the interval of a ratio, over all looks together.
RATIO_CONFIDENCE = 0.95
# The error each of those four looks may spend (Pocock 1977, for t intervals after 3, 5, 8 and 12
# sessions): solved for 5 % over all four, 400,000 simulated runs of normal session values.
LOOKS_ALPHA = 0.0157
# A verdict names the slowdown it would have failed this often.
POWER = 0.9


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


# ------------------------------------------------------------------------- ratios of two models


@dataclasses.dataclass(frozen=True)
class RatioDecision:
    """What k sessions say of candidate / base. All numbers are ratios: 1.062 is 6.2 % slower.

    ``low`` and ``high`` hold the true ratio at 95 % confidence, whichever look they come from.
    Where nothing can be said they are 0 and infinity. ``minimum_detectable`` is the smallest true
    ratio that as many sessions of this spread would FAIL with 90 % probability.
    """

    status: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    estimate: float
    low: float
    high: float
    minimum_detectable: float
    sessions: int


def session_log_ratio(per_round_ratios: Sequence[float]) -> float:
    """One session's value: the median over its rounds of log(candidate / base).

    Both models ran in every round, so a busy moment slows both (MEASUREMENT 5.3: paired rounds
    halve the spread of a ratio of medians). NaN where a round has no ratio (a clock that did not
    move) or there is none: `decide_ratio` then decides nothing.
    """
    if not per_round_ratios or not all(0 < r < math.inf for r in per_round_ratios):
        return math.nan
    return statistics.median(math.log(r) for r in per_round_ratios)


def decide_ratio(
    session_log_ratios: Sequence[float], tolerance: float, *, looks: Sequence[int] = LOOKS
) -> RatioDecision:
    """Is the candidate slower than ``1 + tolerance`` times the base? Sessions are the sample.

    With x the values of k sessions (`session_log_ratio`), the interval is
    ``mean(x) +- t(1 - a/2, k - 1) sd(x) / sqrt(k)``: FAIL when it lies above ``log(1 + tolerance)``,
    PASS when below, else INCONCLUSIVE: add sessions up to the next of ``looks``.

    The repeated looks are paid for. With a = 5 % at each of four looks either wrong verdict at the
    tolerance itself has 7.0 % (normal session values, 400,000 runs), and a "95 %" interval that
    holds the truth at all looks in 86 % of runs; a = `LOOKS_ALPHA` gives 2.5 % and 95 %. The price
    with the spread of CPU time (SD 0.3 %) is nothing at no slowdown and half a session at 2 %; with
    that of wall time on a busy machine (SD 1.6 %) one session. For other ``looks`` each gets an
    equal share of 5 % (Bonferroni), which is never too little.

    INCONCLUSIVE, whatever the values, with fewer than 3 of them, with one that is not finite, and
    with all of them equal: no real clock repeats itself to the last digit, so it is too coarse.

    Example: ``decide_ratio([0.060, 0.061, 0.0615], 0.03)`` is a FAIL: 1.063 (1.059 to 1.066).
    """
    k = len(session_log_ratios)
    unknown = RatioDecision("INCONCLUSIVE", math.nan, 0.0, math.inf, math.inf, k)
    if not k or not all(math.isfinite(x) for x in session_log_ratios):
        return unknown
    mean = statistics.fmean(session_log_ratios)
    unknown = dataclasses.replace(unknown, estimate=math.exp(mean))
    if k < min(LOOKS):
        return unknown
    deviation = statistics.stdev(session_log_ratios)
    if deviation == 0.0:
        return unknown
    alpha = looks_alpha(looks)
    half = t_quantile(1 - alpha / 2, k - 1) * deviation / math.sqrt(k)
    limit = math.log1p(tolerance)
    status: Literal["PASS", "FAIL", "INCONCLUSIVE"] = "INCONCLUSIVE"
    if mean - half > limit:
        status = "FAIL"
    elif mean + half < limit:
        status = "PASS"
    detectable = minimum_detectable_ratio(deviation, k, tolerance, looks=looks)
    return RatioDecision(status, math.exp(mean), math.exp(mean - half), math.exp(mean + half), detectable, k)  # fmt: skip


def looks_alpha(looks: Sequence[int] = LOOKS) -> float:
    """The two-sided error that one look may spend so that all together spend 5 %."""
    return LOOKS_ALPHA if tuple(looks) == LOOKS else (1 - RATIO_CONFIDENCE) / max(1, len(looks))


def minimum_detectable_ratio(
    deviation: float, sessions: int, tolerance: float, *, looks: Sequence[int] = LOOKS
) -> float:
    """The smallest true ratio that ``sessions`` sessions of SD ``deviation`` FAIL in 90 % of runs.

    The exact power of a t test (noncentral t) at that many sessions; looking earlier too only adds
    to it. ``deviation`` is of the sessions' log ratios.
    """
    if sessions < 2:
        return math.inf
    distance = _detectable_distance(sessions - 1, 1 - looks_alpha(looks) / 2)
    return math.exp(math.log1p(tolerance) + distance * deviation / math.sqrt(sessions))


@functools.cache
def _detectable_distance(df: int, p: float) -> float:
    """The noncentrality d with P(T > t(p, df)) = `POWER`, for T of the noncentral t distribution.

    P(T > t) is the mean of Phi(d - t u) over u = sqrt(chi2_df / df), whose density is
    ``2 (df/2)^(df/2) / Gamma(df/2) u^(df-1) exp(-df u^2 / 2)`` (Johnson, Kotz & Balakrishnan, 31.2).
    """
    critical, phi = t_quantile(p, df), statistics.NormalDist().cdf
    scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    step = 0.005
    # midpoints up to 8: beyond, the density is below exp(-30) for every df
    nodes = [(i + 0.5) * step for i in range(1600)]
    weights = [math.exp(scale + (df - 1) * math.log(u) - df * u * u / 2) * step for u in nodes]

    def power(distance: float) -> float:
        return sum(w * phi(distance - critical * u) for u, w in zip(nodes, weights, strict=True))

    return _bisect(power, POWER, 0.0, 8 * critical + 8, 1e-4)


@functools.lru_cache(maxsize=1000)
def t_quantile(p: float, df: float) -> float:
    """The p-quantile of Student's t distribution, 0 < p < 1, df > 0: ``t_quantile(0.975, 2) == 4.3027``.

    Bisection on the cumulative distribution, which is an incomplete beta function:
    P(|T| > t) = I_x(df/2, 1/2) with x = df / (df + t^2) (Abramowitz & Stegun 26.7.1).
    """
    if not (0 < p < 1 and df > 0):
        raise ValueError(f"no t quantile for p = {p}, df = {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)

    def inside(t: float) -> float:
        return 1 - 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))

    high = 1.0
    while inside(high) < p and high < 1e15:
        high *= 2
    return _bisect(inside, p, 0.0, high, 1e-12 * high)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction.

    Evaluated with Lentz's method (Numerical Recipes, 3rd ed., 6.4).
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction of the mirrored one converges fast
        return 1 - _incomplete_beta(b, a, 1 - x)
    tiny = 1e-300
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def _bisect(
    rising: Callable[[float], float], target: float, low: float, high: float, precision: float
) -> float:
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2
