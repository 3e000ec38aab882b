"""Calibration data: each way it can be unfit, and its message."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgepipe.array_ops.calibration import add_settling, check_calibration, file_batches, settle
from edgepipe.array_ops.load import Samples
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource, ImagePreprocess
from edgepipe.errors import DataError

SPEC = TensorSpec("x", (1, 3, 8, 8))


def pixels(n=120, seed=0):
    """(n, 3, 8, 8) float32 in 0 to 1."""
    return np.random.default_rng(seed).uniform(0, 1, (n, 3, 8, 8)).astype(np.float32)


def samples(array, **fields):
    return Samples({"x": array}, None, (), "npz data.npz: all", **fields)


def refused(array, said, *, spec=SPEC, **options):
    with pytest.raises(DataError, match=said) as caught:
        check_calibration(samples(array), [spec], **options)
    assert "data.npz" in caught.value.message
    return caught.value


def test_good_data_passes_and_is_described():
    report = check_calibration(samples(pixels()), [SPEC])
    assert report.warnings == ()
    assert report.samples == 120
    (found,) = report.inputs
    assert found.minimum == pixels().min()
    assert found.mean == pytest.approx(0.5, abs=0.01)


def test_random_data_is_refused_unless_asked_for_and_then_marked():
    noise = samples(np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32), is_random=True)  # fmt: skip
    with pytest.raises(DataError, match="random noise") as caught:
        check_calibration(noise, [SPEC])
    assert "allow_random = true" in caught.value.hint
    report = check_calibration(noise, [SPEC], allow_random=True)
    assert report.is_random
    assert "smoke test" in report.warnings[0]


def test_too_few_samples_are_refused_and_the_limit_may_be_lowered():
    error = refused(pixels(7), "too few to calibrate with .*at least 8")
    assert "min_samples" in error.hint
    assert check_calibration(samples(pixels(2)), [SPEC], min_samples=2).samples == 2


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_values_that_are_not_finite_name_the_sample(value, word):
    array = pixels()
    array[17, 2, 3, 3] = value
    array[50, 0, 0, 0] = value
    refused(array, f"{word} in 2 of 120 samples, first in sample 17")


def test_an_input_that_never_changes_is_refused():
    refused(np.full((20, 3, 8, 8), 0.5, np.float32), "is 0.5 everywhere")
    refused(np.repeat(pixels(1), 20, axis=0), "all 20 samples of input 'x' are the same")


def test_a_channel_that_never_changes_is_a_doubt():
    array = pixels()
    array[:, 1] = 0.25
    assert "channels [1] never change" in check_calibration(samples(array), [SPEC]).warnings[0]


def test_a_wrong_shape_or_layout_is_refused_with_what_it_looks_like():
    error = refused(pixels().transpose(0, 2, 3, 1), r"\(3, 8, 8\) \(CHW\), got \(8, 8, 3\)")
    assert "looks like HWC; the model wants CHW" in error.hint


def test_a_wrong_dtype_is_refused():
    refused(pixels().astype(np.float64), "is float64, the model wants float32")


def test_pixels_divided_by_255_twice_are_refused():
    source = DataSource(kind="npz", scale=1 / 255)
    error = refused(pixels() / 255, "looks scaled twice", source=source)
    assert error.code == "normalised-twice"


def test_a_tiny_range_that_nobody_declared_is_a_doubt():
    report = check_calibration(samples(pixels() / 255), [SPEC])
    assert "looks scaled twice" in report.warnings[0]


def test_data_normalised_before_it_was_normalised_is_refused():
    once = (pixels() - 0.485) / 0.29  # standardised: mean 0, spread 1
    source = DataSource(kind="npz", mean=(0.485,), std=(0.229,))
    error = refused(((once - 0.485) / 0.229).astype(np.float32), "was normalised before", source=source)  # fmt: skip
    assert error.code == "normalised-twice"
    right = ((pixels() - 0.485) / 0.229).astype(np.float32)
    assert check_calibration(samples(right), [SPEC], source=source).warnings == ()


def test_pixels_that_were_not_divided_by_255_before_mean_and_std_are_a_doubt():
    source = DataSource(kind="images", mean=(0.485,), std=(0.229,), image=ImagePreprocess(size=(8, 8)))  # fmt: skip
    array = ((pixels() * 255 - 0.485) / 0.229).astype(np.float32)
    (warning,) = check_calibration(samples(array), [SPEC], source=source).warnings
    assert "divided by 255" in warning


def test_calibration_prepared_unlike_the_evaluation_data_is_a_doubt():
    reference = samples(pixels(seed=1))
    assert check_calibration(samples(pixels()), [SPEC], reference=reference).warnings == ()
    (warning,) = check_calibration(samples(pixels() * 255), [SPEC], reference=reference).warnings
    assert "prepared the same way" in warning


# --- settling


def test_settling_by_hand():
    # one tensor whose last sample doubles its range; whichever half is drawn holds it half the time
    minima, maxima = np.zeros((4, 1)), np.array([[1.0], [1], [1], [2]])
    settling = settle(minima, maxima, ["t"])
    sizes = [n for n, _ in settling.curve]
    assert sizes == [1, 2, 4]
    assert settling.curve[-1] == (4, 1.0)
    assert 0.5 <= settling.curve[0][1] <= 1
    assert settling.growth == pytest.approx(1 - settling.curve[1][1], abs=1e-3)
    assert settling.slowest == "t"


def test_ranges_that_repeat_are_settled_and_ranges_that_keep_growing_are_not():
    same = settle(np.zeros((64, 3)), np.ones((64, 3)), ["a", "b", "c"])
    assert same.growth == 0
    assert same.is_settled
    heavy = np.random.default_rng(0).standard_cauchy((64, 3))
    growing = settle(np.minimum(heavy, 0), np.maximum(heavy, 0), ["a", "b", "c"])
    assert growing.growth > 0.2
    assert not growing.is_settled
    report = add_settling(check_calibration(samples(pixels(64)), [SPEC]), growing)
    assert "have not settled after 64 samples" in report.warnings[-1]
    assert "100 or more" in report.warnings[-1]


def test_samples_sorted_by_class_do_not_fool_the_curve():
    # the second half of the file holds another class, ten times as wide
    maxima = np.repeat([[1.0], [10.0]], 50, axis=0)
    assert settle(np.zeros_like(maxima), maxima, ["t"]).is_settled


def test_one_sample_alone_is_never_settled():
    assert not settle(np.zeros((1, 1)), np.ones((1, 1)), ["t"]).is_settled


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 40), st.integers(1, 5)),
        elements=st.floats(0, 100, width=32),
    )
)
def test_the_curve_never_falls_and_ends_at_one(maxima):
    settling = settle(np.zeros_like(maxima), maxima, [str(i) for i in range(maxima.shape[1])])
    shares = [share for _, share in settling.curve]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1)
    assert 0 <= settling.growth <= 1


def test_batches_have_the_files_size_and_layout_and_the_last_is_filled_up():
    spec = TensorSpec("x", (4, 8, 8, 3), layout="NHWC", source_layout="NCHW")
    array = pixels(6)
    first, last = (batch[0] for batch in file_batches(samples(array), [spec]))
    np.testing.assert_array_equal(first, array[:4].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(last, array[[4, 5, 5, 5]].transpose(0, 2, 3, 1))
