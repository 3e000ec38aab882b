from __future__ import annotations

import random
import statistics
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom  # the independent reference

from edgepipe import stats

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=60), st.floats(0, 1))
def test_percentile_equals_numpys(samples: list[float], q: float) -> None:
    assert stats.percentile(samples, q) == pytest.approx(np.quantile(samples, q), abs=1e-6)


@given(st.integers(1, 400), st.floats(0.01, 0.99))
def test_binomial_cdf_equals_scipys(n: int, p: float) -> None:
    expected = binom.cdf(np.arange(n + 1), n, p)
    assert list(stats.binomial_cdfs(n, p)) == pytest.approx(expected, abs=1e-9)


def test_binomial_cdf_is_exact_on_a_worked_example() -> None:
    p = Fraction(1, 10)
    exact = sum(comb(20, i) * p**i * (1 - p) ** (20 - i) for i in range(4))
    assert list(stats.binomial_cdfs(20, 0.1))[3] == pytest.approx(float(exact), rel=1e-12)


def test_many_samples_do_not_underflow() -> None:
    found = list(stats.binomial_cdfs(20000, 0.9))
    assert found[18000] == pytest.approx(binom.cdf(18000, 20000, 0.9), rel=1e-6)


@pytest.mark.parametrize(
    ("n", "q", "rank_from_top"),
    # 0.9^43 = .0108 > 1 %, 0.9^44 = .0097; for 64 the second largest is the first allowed
    [(43, 0.9, 0), (44, 0.9, 1), (64, 0.9, 2), (90, 0.95, 1), (459, 0.99, 1)],
)
def test_upper_bound_uses_the_right_order_statistic(n: int, q: float, rank_from_top: int) -> None:
    samples = list(range(n))
    random.Random(0).shuffle(samples)
    expected = n - rank_from_top if rank_from_top else None
    assert stats.percentile_upper_bound(samples, q, 0.99) == expected


def test_bounds_cover_the_true_percentile_as_often_as_promised() -> None:
    # 2,000 draws of 100 exponentials: the p90 bound may fall short in 1 %, 3 sigma = 0.67 %.
    generator = random.Random(1)
    true_p90 = 2.302585
    missed_up = missed_low = 0
    for _ in range(2000):
        samples = [generator.expovariate(1) for _ in range(100)]
        missed_up += stats.percentile_upper_bound(samples, 0.9, 0.99) < true_p90  # type: ignore[operator]
        missed_low += stats.percentile_lower_bound(samples, 0.9, 0.99) > true_p90  # type: ignore[operator]
    assert missed_up / 2000 < 0.0167
    assert missed_low / 2000 < 0.0167


def test_a_session_too_small_for_the_bound_gives_none() -> None:
    assert stats.sessions_upper_bound([list(range(100)), list(range(10))], 0.9, 0.99) is None


def test_sessions_are_not_pooled() -> None:
    fast, slow = [1.0] * 100, [9.0] * 100
    assert stats.sessions_upper_bound([fast, fast, slow], 0.9, 0.99) == 1.0
    assert stats.sessions_percentile([fast, slow, slow], 0.5) == 9.0


def test_paired_interval_covers_the_true_difference() -> None:
    # reference right 90 %, candidate right 88 %, errors overlapping; 95 % +- 3 sigma of 500 draws
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(500):
        shared = generator.random(400)
        _, low, high = stats.paired_difference_interval(
            list(shared < 0.90), list((shared < 0.86) | ((shared > 0.92) & (shared < 0.94)))
        )
        covered += low <= 0.02 <= high
    assert covered / 500 > 0.95 - 3 * (0.95 * 0.05 / 500) ** 0.5


def test_paired_interval_is_not_empty_without_flips() -> None:
    difference, low, high = stats.paired_difference_interval([True] * 100, [True] * 100)
    assert difference == 0
    assert low < 0 < high
    assert statistics.mean([low, high]) == pytest.approx(0)
