"""Task metrics against counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.array_ops.task_metrics import TASK_METRICS, correct, task_metric
from edgepipe.errors import DataError


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=8),
    st.data(),
)
def test_top_k_agrees_with_sorting_each_row_stably(rows, data):
    labels = [data.draw(st.integers(0, 6)) for _ in rows]
    output = {"y": np.array(rows, np.float32)}
    for name, k in (("top1", 1), ("top5", 5)):
        by_hand = [
            label in sorted(range(7), key=lambda i, row=row: -row[i])[:k]
            for row, label in zip(rows, labels, strict=True)
        ]
        assert correct(name, output, np.array(labels)).tolist() == by_hand
        assert task_metric(name, output, np.array(labels)) == pytest.approx(np.mean(by_hand))


def test_a_classifier_that_says_nan_is_wrong():
    output = {"y": np.array([[np.nan, np.nan], [0, 1]], np.float32)}
    assert correct("top1", output, np.array([0, 1])).tolist() == [False, True]


@pytest.mark.parametrize("name", ["r2", "mse"])
def test_regression_metrics_are_one_for_perfect_answers_and_less_otherwise(name):
    labels = np.random.default_rng(0).normal(size=(20, 3))
    assert task_metric(name, {"y": labels}, labels) == pytest.approx(1)
    worse = task_metric(name, {"y": labels + 0.5}, labels)
    assert 0 <= task_metric(name, {"y": labels + 5.0}, labels) < worse < 1


def test_r2_of_predicting_the_mean_is_zero():
    labels = np.arange(10.0)[:, None]
    assert task_metric("r2", {"y": np.full((10, 1), 4.5)}, labels) == 0


def test_mean_iou_by_hand():
    wanted = np.array([[[0, 0], [1, 1]]])
    found = np.array([[[0, 1], [1, 1]]])
    scores = np.stack([found == 0, found == 1], axis=1).astype(float)
    # class 0: 1 of 2; class 1: 2 of 3
    assert task_metric("mean_iou", {"y": scores}, wanted) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert task_metric("pixel_accuracy", {"y": scores}, wanted) == 0.75
    assert correct("mean_iou", {"y": scores}, wanted) is None


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "said"),
    [
        ("top", {"y": np.ones((2, 3))}, np.zeros(2, int), "did you mean 'top"),
        ("top1", {"y": np.ones((2, 3))}, None, "needs labels"),
        ("top1", {"y": np.ones((2, 3))}, np.array([0, 3]), "from 0 to 3.*3 outputs"),
        ("top1", {"y": np.ones((2, 3))}, np.zeros(3, int), "2 answers but 3 labels"),
        ("top1", {"y": np.ones((2, 3, 4))}, np.zeros(2, int), r"\(2, 3, 4\)"),
        ("top1", {"y": np.ones((2, 3))}, np.zeros(2), "float64"),
        ("top1", {"y": np.ones((2, 3)), "z": np.ones(2)}, np.zeros(2, int), "the model has 2"),
        ("r2", {"y": np.ones((2, 3))}, np.zeros((2, 1)), r"shape \(2, 3\)"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_the_reason(name, outputs, labels, said):
    with pytest.raises(DataError, match=said) as caught:
        task_metric(name, outputs, labels)
    assert caught.value.hint


def test_a_metric_of_ones_own_may_give_a_number_or_one_truth_value_a_sample(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def near(outputs, labels):\n    return abs(outputs['y'][:, 0] - labels) < 1\n"
        "def share(outputs, labels):\n    return 0.25\n"
        "def wrong(outputs, labels):\n    return 7\n"
    )
    outputs, labels = {"y": np.array([[1.0], [5.0]])}, np.array([1.5, 1.0])
    assert task_metric("mine.py:near", outputs, labels, root=tmp_path) == 0.5
    assert correct("mine.py:near", outputs, labels, root=tmp_path).tolist() == [True, False]
    assert task_metric("mine.py:share", outputs, labels, root=tmp_path) == 0.25
    assert correct("mine.py:share", outputs, labels, root=tmp_path) is None
    with pytest.raises(DataError, match="not between 0 and 1"):
        task_metric("mine.py:wrong", outputs, labels, root=tmp_path)


def test_every_metric_says_what_it_means():
    assert all(metric.meaning for metric in TASK_METRICS.values())
