"""Ranges of activations from histograms, against the values themselves."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.array_ops.ranges import (
    BINS,
    METHODS,
    add_values,
    kl_range,
    mse_range,
    new_histogram,
    percentile_range,
)
from edgepipe.errors import StageError, StageOptionError
from edgepipe.range_table import RangeTable, read_table, table_text
from edgepipe.tflite_ops.calibrate import collect_histograms, find_ranges
from edgepipe.tflite_ops.quantize import MAX_ROWS, check_ranges, collect_ranges
from edgepipe.tflite_ops.tiny import tiny_tflite

from .tflite_builder import Graph

KINDS = {
    "normal": lambda g, n: g.normal(0, 3, n),
    "relu": lambda g, n: np.maximum(g.normal(-1, 2, n), 0),
    "long tail": lambda g, n: g.standard_t(2, n),
    "skewed": lambda g, n: g.exponential(2, n) - 0.5,
}


def values_of(kind, seed, n=20_000):
    return KINDS[kind](np.random.default_rng(seed), n).astype(np.float32)


def histogram_of(values, parts=7):
    """Filled part by part, as samples come."""
    found = new_histogram(float(values.min()), float(values.max()))
    for part in np.array_split(values, parts):
        found = add_values(found, part)
    return found


def rounding_error(values, low, high):
    """Mean squared error of int8 with this range, on the values themselves."""
    scale = (high - low) / 255
    zero = np.round(-128 - low / scale)
    stored = np.clip(np.round(values / scale) + zero, -128, 127)
    return float(((values - (stored - zero) * scale) ** 2).mean())


@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999), percent=st.floats(90, 99.999))
@settings(max_examples=40, deadline=None)
def test_a_percentile_is_within_one_bin_of_the_values_own(kind, seed, percent):
    values = values_of(kind, seed)
    found = histogram_of(values)
    low, high = percentile_range(found, percent)
    ordered = np.sort(values)
    cut = int(len(values) * (1 - percent / 100))
    # float32 decides on which side of an edge a value falls
    slack = found.width * (1 + 1e-3)
    assert min(float(ordered[cut]), 0) == pytest.approx(low, abs=slack)
    assert max(float(ordered[-1 - cut]), 0) == pytest.approx(high, abs=slack)
    numpys = float(np.percentile(values, percent, method="inverted_cdf"))
    assert numpys == pytest.approx(float(ordered[-1 - cut]), abs=_gap(ordered, cut))


def _gap(ordered, cut):
    """From the value before to the one after: numpy counts ranks from 1, so may take either."""
    return float(ordered[max(-1, -cut)] - ordered[-2 - cut]) + 1e-6


@pytest.mark.slow
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_the_mse_range_is_as_good_as_brute_force_finds(kind, seed):
    values = values_of(kind, seed)
    low, high = mse_range(histogram_of(values))
    ends = np.linspace(0.04, 1, 49)
    best = min(
        rounding_error(values, min(float(values.min()), 0) * a, float(values.max()) * b)
        for a in (ends if values.min() < 0 else [1.0])
        for b in ends
    )
    # its model of rounding, s^2 / 12, is not exact where a distribution ends sharply
    assert rounding_error(values, low, high) <= 1.05 * best


def test_the_kl_range_cuts_a_far_outlier_and_keeps_a_full_range():
    normal = values_of("normal", 0)
    outlier = np.append(normal, np.float32(400))
    low, high = kl_range(histogram_of(outlier))
    assert high < 100
    assert rounding_error(normal, low, high) < rounding_error(normal, -13, 400) / 10
    flat = np.random.default_rng(0).uniform(-1, 1, 50_000).astype(np.float32)
    low, high = kl_range(histogram_of(flat))
    assert low < -0.95
    assert high > 0.95


@pytest.mark.parametrize("choose", [percentile_range, mse_range, kl_range])
def test_every_range_holds_zero_and_lies_in_the_whole(choose):
    for kind in KINDS:
        for values in (values_of(kind, 1), -values_of(kind, 1), values_of(kind, 1) + 50):
            found = histogram_of(values)
            low, high = choose(found)
            assert found.low <= low <= 0 <= high <= found.high + 1e-9
            assert low < high


@pytest.mark.parametrize("choose", [percentile_range, mse_range, kl_range])
def test_a_tensor_of_zeros_keeps_its_range(choose):
    assert choose(histogram_of(np.zeros(100, np.float32))) == (0.0, 0.0)


def test_zeros_are_counted_apart_and_the_rest_in_bins():
    found = histogram_of(np.array([0, 0, 1, 2, 4], np.float32))
    assert found.zeros == 2
    assert found.counts.sum() == 3
    assert found.counts[BINS - 1] == 1
    assert found.counts[BINS // 2] == 1


# --- on a model --------------------------------------------------------------------------------


def draws(n=40):
    generator = np.random.default_rng(0)
    return [[generator.normal(size=(1, 4)).astype(np.float32)] for _ in range(n)]


@pytest.mark.parametrize("method", ["min_max", "moving_average", "percentile", "mse", "kl"])
def test_every_method_finds_a_range_for_every_activation(method):
    found, _ = find_ranges(tiny_tflite(), draws, method=method, where="m")
    assert set(found) == {"x", "y"}
    everything = np.concatenate([x.ravel() for (x,) in draws()])
    low, high = found["x"]
    assert everything.min() <= low < high <= everything.max()
    if method == "min_max":
        assert (low, high) == (everything.min(), everything.max())


def test_the_moving_average_is_the_quantisers_own():
    found, _ = find_ranges(tiny_tflite(), draws, method="moving_average", where="m")
    low = high = None
    for (x,) in draws():
        low = float(x.min()) if low is None else 0.95 * low + 0.05 * float(x.min())
        high = float(x.max()) if high is None else 0.95 * high + 0.05 * float(x.max())
    assert found["x"] == pytest.approx((low, high), rel=1e-5)


def test_the_rows_of_ranges_do_not_grow_with_the_samples():
    batches = draws(3 * MAX_ROWS // 2)
    ranges = collect_ranges(tiny_tflite(), batches, where="m")
    assert ranges.minima.shape == (MAX_ROWS, 2)
    assert ranges.batches == len(batches)
    everything = np.concatenate([x.ravel() for (x,) in batches])
    assert ranges.table()["x"] == (everything.min(), everything.max())
    # row 0 is batches 0 and 512
    assert ranges.maxima[0, 0] == max(batches[0][0].max(), batches[MAX_ROWS][0].max())


def test_histograms_hold_every_value_of_every_sample():
    limits = collect_ranges(tiny_tflite(), draws(), where="m").table()
    found = collect_histograms(tiny_tflite(), draws(), limits, where="m")
    assert {n: int(h.counts.sum()) + h.zeros for n, h in found.items()} == {"x": 160, "y": 160}


def test_no_sample_is_an_error():
    limits = {"x": (0.0, 1.0)}
    with pytest.raises(StageError, match="no calibration sample"):
        collect_histograms(tiny_tflite(), [], limits, where="m")


# --- the table in a file -----------------------------------------------------------------------


@given(
    ranges=st.dictionaries(st.text(min_size=1), st.tuples(st.floats(-1e6, 0), st.floats(0, 1e6))),
    method=st.sampled_from(["min_max", "kl", "learned"]),
)
@settings(max_examples=30, deadline=None)
def test_a_table_is_read_as_it_was_written(tmp_path_factory, ranges, method):
    path = tmp_path_factory.mktemp("table") / "ranges.json"
    table = RangeTable(ranges, method, 7, "npz x.npz")
    path.write_text(table_text(table), encoding="utf-8")
    assert read_table(path) == table


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no "tensors"'),
        ('{"tensors": {"x": {"min": 1}}}', "tensor 'x' has no range"),
        ('{"tensors": {"x": {"min": 1, "max": 0}}}', "tensor 'x' has no range"),
        ('{"tensors": {"x": {"min": NaN, "max": 0}}}', "tensor 'x' has no range"),
        ('{"tensors": {"x": 5}}', "tensor 'x' has no range"),
        ('{"schema": 9, "tensors": {}}', "has schema 9"),
        ('{"samples": "many", "tensors": {}}', "samples is 'many'"),
        ('{"tensors": {"x": {"min": 0, "max": 1' + 400 * "0" + "}}}", "tensor 'x' has no range"),
        (100_000 * "[", "is not JSON"),
    ],
)
def test_a_broken_table_is_refused_with_its_file(tmp_path, text, said):
    path = tmp_path / "ranges.json"
    path.write_text(text)
    with pytest.raises(StageOptionError, match=said) as caught:
        read_table(path)
    assert "ranges.json" in caught.value.message


def test_a_table_without_a_range_for_each_tensor_names_the_first():
    with pytest.raises(StageError, match="lack 1 of the 2 activations of m, the first is 'y'"):
        check_ranges({"x": (0.0, 1.0)}, tiny_tflite(), where="m")
    json.loads(table_text(RangeTable({}, "kl")))


def test_values_far_outside_count_at_their_own_end():
    far = np.array([np.inf, 3e38, -np.inf, -3e38, 1.0], np.float32)
    counts = add_values(new_histogram(-1.0, 1.0), far).counts
    assert (counts[0], counts[-1], counts.sum()) == (2, 3, 5)
    # the span of the two is beyond float32
    counts = add_values(new_histogram(-3e38, 3e38), far[[1, 3]]).counts
    assert (counts[0], counts[-1]) == (1, 1)


@pytest.mark.parametrize("choose", METHODS.values(), ids=METHODS)
def test_a_range_of_denormal_numbers_stays_what_it_is(choose):
    histogram = add_values(new_histogram(0.0, 1e-39), np.float32([1e-40, 1e-39]))
    assert choose(histogram) == (0.0, 1e-39)


@pytest.mark.parametrize("method", ["percentile", "mse", "kl"])
def test_the_infinities_of_padding_are_no_values(method):
    """What a max pool's padding of -inf brings in leaves the range what it was before."""
    rng = np.random.default_rng(0)
    g = Graph()
    x = g.input("x", (1, 8, 8, 2))
    same = g.op("MUL", [x, g.const("one", np.array(1, np.float32))], "same", (1, 8, 8, 2), "MulOptions")  # fmt: skip
    edges = g.const("edges", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    lowest = g.const("lowest", np.array([-np.inf], np.float32))
    padded = g.op("PADV2", [same, edges, lowest], "padded", (1, 10, 10, 2), "PadV2Options")
    batches = [[a[None]] for a in rng.standard_t(3, (20, 8, 8, 2)).astype(np.float32)]
    found, _ = find_ranges(g.bytes([padded]), lambda: batches, method=method, where="m")
    assert found["padded"] == found["same"]
