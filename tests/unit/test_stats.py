from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, nct, t  # the independent reference

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


@given(st.floats(1e-6, 1 - 1e-6), st.floats(1, 500))
def test_t_quantile_equals_scipys(p: float, df: float) -> None:
    assert stats.t_quantile(p, df) == pytest.approx(t.ppf(p, df), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (math.nan, 3), (0.5, 0)])
def test_a_t_quantile_that_does_not_exist_is_refused(p: float, df: float) -> None:
    with pytest.raises(ValueError, match="no t quantile"):
        stats.t_quantile(p, df)


def test_a_session_is_the_median_of_its_rounds() -> None:
    assert stats.session_log_ratio([1.0, 1.1, 50.0]) == pytest.approx(math.log(1.1))


@pytest.mark.parametrize("rounds", [[], [1.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [-1.0]])
def test_a_round_without_a_ratio_decides_nothing(rounds: list[float]) -> None:
    value = stats.session_log_ratio(rounds)
    assert math.isnan(value)
    decision = stats.decide_ratio([0.0, 0.001, value, 0.002], 0.03)
    assert (decision.status, decision.low, decision.high) == ("INCONCLUSIVE", 0.0, math.inf)


@given(st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=12), st.floats(0, 0.2))
def test_the_interval_is_students_and_the_verdict_follows_it(xs: list[float], tolerance: float) -> None:  # fmt: skip
    decision = stats.decide_ratio(xs, tolerance)
    if np.std(xs) < 1e-9:
        return
    low, high = t.interval(1 - stats.LOOKS_ALPHA, len(xs) - 1, np.mean(xs), np.std(xs, ddof=1) / len(xs) ** 0.5)  # fmt: skip
    assert math.log(decision.estimate) == pytest.approx(np.mean(xs), abs=1e-9)
    assert math.log(decision.low) == pytest.approx(low, abs=1e-7)
    assert math.log(decision.high) == pytest.approx(high, abs=1e-7)
    limit = 1 + tolerance
    expected = "FAIL" if decision.low > limit else "PASS" if decision.high < limit else "INCONCLUSIVE"  # fmt: skip
    assert decision.status == expected


@pytest.mark.parametrize("xs", [[], [0.0], [0.0, 0.001], [0.0] * 12, [0.5] * 5])
def test_too_few_sessions_or_a_clock_that_repeats_itself_decide_nothing(xs: list[float]) -> None:
    decision = stats.decide_ratio(xs, 0.03)
    assert decision.status == "INCONCLUSIVE"
    assert decision.minimum_detectable == math.inf


def simulate(shift: float, looks: tuple[int, ...], runs: int = 20_000) -> tuple[float, float]:
    """Shares of PASS and FAIL over all looks, true log ratio - limit = ``shift`` SDs.

    Vectorised with scipy: an independent writing of the rule.
    """
    draws = np.random.default_rng(3).standard_normal((runs, max(looks))) + shift
    verdict = np.zeros(runs)
    for k in looks:
        part = draws[:, :k]
        half = t.ppf(1 - stats.looks_alpha(looks) / 2, k - 1) * part.std(1, ddof=1) / k**0.5
        open_ = verdict == 0
        verdict[open_ & (part.mean(1) - half > 0)] = 1
        verdict[open_ & (part.mean(1) + half < 0)] = -1
    return float(np.mean(verdict < 0)), float(np.mean(verdict > 0))


@pytest.mark.parametrize("looks", [stats.LOOKS, (3, 5, 8), (3, 5), (3,), (4, 6, 9, 10, 12)])
def test_all_looks_together_are_wrong_in_one_of_forty_at_the_tolerance(looks: tuple[int, ...]) -> None:  # fmt: skip
    # 2.5 % a side; 3 sigma of 20,000 runs = 0.33 %
    passed, failed = simulate(0.0, looks)
    assert passed < 0.025 + 0.0033
    assert failed < 0.025 + 0.0033
    if looks == stats.LOOKS:  # and the constant gives nothing away
        assert passed + failed > 0.05 - 0.0066


@pytest.mark.parametrize("k", [3, 5, 8, 12])
def test_the_minimum_detectable_ratio_fails_nine_times_in_ten(k: int) -> None:
    ratio = stats.minimum_detectable_ratio(0.01, k, 0.03)
    noncentrality = (math.log(ratio) - math.log(1.03)) / 0.01 * k**0.5
    critical = t.ppf(1 - stats.LOOKS_ALPHA / 2, k - 1)
    assert nct.sf(critical, k - 1, noncentrality) == pytest.approx(0.9, abs=1e-4)


def test_more_sessions_or_less_noise_detect_smaller_slowdowns() -> None:
    found = [stats.minimum_detectable_ratio(0.01, k, 0.03) for k in range(2, 13)]
    assert found == sorted(found, reverse=True)
    assert stats.minimum_detectable_ratio(0.001, 5, 0.03) < found[3]
    assert stats.minimum_detectable_ratio(0.0, 12, 0.03) == pytest.approx(1.03)
    assert stats.minimum_detectable_ratio(0.01, 1, 0.03) == math.inf
