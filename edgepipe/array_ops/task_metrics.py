"""How good answers are: a table of task metrics, each from 0 (useless) to 1 (perfect)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.array_ops.user_code import call_function
from edgepipe.errors import DataError
from edgepipe.schema import near_miss
from edgepipe.state import Steps

Score = Callable[[np.ndarray, np.ndarray], float]
Predict = Callable[[np.ndarray], np.ndarray]
PerSample = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TaskMetric:
    """``score(output, labels)`` -> 0..1. ``correct(output, labels)`` -> (N,) bool, for metrics
    that count samples: their score is its mean, and paired statistics can be made from it.
    ``predict(output)`` -> (N, ...) class numbers, for metrics of classes."""

    meaning: str
    score: Score
    correct: PerSample | None = None
    predict: Predict | None = None


def _top_k(k: int) -> PerSample:
    def correct(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
        scores = _scores(output, labels)
        own = np.take_along_axis(scores, labels.reshape(-1, 1), axis=1)  # (N, 1)
        # Classes that beat the label; among equals, as after int8 rounding, the lowest index wins.
        index = np.arange(scores.shape[1])
        ahead = (scores > own) | ((scores == own) & (index < labels.reshape(-1, 1)))
        return np.asarray(ahead.sum(axis=1) < k) & ~np.isnan(scores).any(axis=1)

    return correct


def _scores(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, classes) or (N, 1, ..., classes, ..., 1) -> (N, classes), labels checked against it."""
    scores = output.reshape(len(output), -1)
    if max(output.shape[1:], default=0) != scores.shape[1] or labels.ndim != 1:
        raise DataError(
            f"top1 and top5 need outputs (samples, classes) and one label a sample,"
            f" got {output.shape} and {labels.shape}",
            hint='choose another metric, or your own: metric = "file.py:function"',
        )
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"top1 and top5 need class numbers as labels, got {labels.dtype}",
            hint="store labels as integers from 0",
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < scores.shape[1]):
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, but the model has"
            f" {scores.shape[1]} outputs",
            hint="name the classes in the order of the model's outputs: classes = [...]",
        )
    return scores


def _mean_of(correct: PerSample) -> Score:
    return lambda output, labels: float(correct(output, labels).mean())


def _same_shape(output: np.ndarray, labels: np.ndarray, name: str) -> None:
    if output.shape != labels.shape:
        raise DataError(
            f"{name} needs labels of the output's shape {output.shape}, got {labels.shape}",
            hint="store labels in the same shape and layout as the model's output",
        )


def _r2(output: np.ndarray, labels: np.ndarray) -> float:
    """1 - squared error / variance of the labels, floored at 0 (predicting the mean)."""
    _same_shape(output, labels, "r2")
    target = labels.astype(np.float64)
    spread = float(((target - target.mean(axis=0)) ** 2).sum())
    error = float(((output.astype(np.float64) - target) ** 2).sum())
    if spread == 0:
        raise DataError("r2 is undefined: all labels are the same", hint="use more varied samples")
    return float(np.clip(1 - error / spread, 0, 1)) if np.isfinite(error) else 0.0


def _mse(output: np.ndarray, labels: np.ndarray) -> float:
    """1 / (1 + mean squared error): 1 where equal, falling towards 0."""
    _same_shape(output, labels, "mse")
    error = float(((output.astype(np.float64) - labels) ** 2).mean())
    return 1 / (1 + error) if np.isfinite(error) else 0.0


def _classes_per_pixel(output: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, C, ...) and labels (N, ...) or (N, 1, ...) -> two (N, ...) of class numbers."""
    if labels.ndim == output.ndim and labels.shape[1] == 1:
        labels = labels[:, 0]
    if output.ndim < 3 or labels.shape != output.shape[:1] + output.shape[2:]:
        raise DataError(
            f"per-pixel metrics need scores (N, classes, ...) and labels (N, ...),"
            f" got {output.shape} and {labels.shape}",
            hint="check the layout: the channel axis of the source model comes second",
        )
    return output.argmax(axis=1), labels


def _pixel_accuracy(output: np.ndarray, labels: np.ndarray) -> float:
    found, wanted = _classes_per_pixel(output, labels)
    return float((found == wanted).mean())


def _mean_iou(output: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes present in the labels of intersection / union (PASCAL VOC, section 4.1)."""
    found, wanted = _classes_per_pixel(output, labels)
    ratios = [
        ((found == c) & (wanted == c)).sum() / ((found == c) | (wanted == c)).sum()
        for c in np.unique(wanted)
    ]
    return float(np.mean(ratios))


_top1, _top5 = _top_k(1), _top_k(5)


def _best_class(output: np.ndarray) -> np.ndarray:
    """(N, classes) or (N, 1, ..., classes, ..., 1) -> (N,); among equals the lowest, as in `_top_k`."""
    return np.asarray(output.reshape(len(output), -1).argmax(axis=1))


def _best_class_per_pixel(output: np.ndarray) -> np.ndarray:
    """(N, C, ...) -> (N, ...)"""
    return np.asarray(output.argmax(axis=1))


TASK_METRICS: dict[str, TaskMetric] = {
    "top1": TaskMetric(
        "share of samples whose best class is the label", _mean_of(_top1), _top1, _best_class
    ),
    "top5": TaskMetric(
        "share whose label is among the five best", _mean_of(_top5), _top5, _best_class
    ),
    "r2": TaskMetric("explained variance, 1 - squared error / variance, at least 0", _r2),
    "mse": TaskMetric("1 / (1 + mean squared error)", _mse),
    "pixel_accuracy": TaskMetric(
        "share of pixels of the right class", _pixel_accuracy, predict=_best_class_per_pixel
    ),
    "mean_iou": TaskMetric(
        "mean intersection over union of the classes present",
        _mean_iou,
        predict=_best_class_per_pixel,
    ),
}


def task_metric(
    name: str,
    outputs: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    *,
    root: Path | None = None,
) -> float:
    """The task metric of N answers, 0 to 1.

    ``outputs`` maps output names to (N, ...) in the source model's layout; built-in metrics need a
    model with one output. ``name`` is one of TASK_METRICS or ``"file.py:function"`` (relative to
    ``root``), which is called with (outputs, labels) and returns a number from 0 to 1, or one
    truth value a sample. Raises DataError for an unknown name, missing labels or wrong shapes.
    """
    if ":" in name:
        result = _own(name, outputs, labels, root)
        value = float(result.mean())
        if not 0 <= value <= 1:
            raise DataError(
                f"{name} returned {value}, which is not between 0 and 1",
                hint="return a share of correct answers, or one truth value a sample",
            )
        return value
    output, known = _checked(name, outputs, labels)
    return TASK_METRICS[name].score(output, known)


def as_judged(
    name: str, outputs: Mapping[str, np.ndarray], labels: np.ndarray, *, steps: Steps
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Answers and labels as the functions here take them.

    With ``steps = "each"`` they are (N, T, ...) both, and a built-in metric counts every step as a sample,
    (N * T, ...); a function of the user's own gets them as they are. Raises DataError where labels have
    no step axis of that length.
    """
    if steps == "last" or ":" in name:
        return dict(outputs), labels
    wanted = next(iter(outputs.values())).shape[:2]
    if labels.shape[:2] != wanted:
        raise DataError(
            f"labels {labels.shape} for {wanted[0]} sequences of {wanted[1]} steps, each of which is judged",
            hint='give labels (samples, steps, ...), or judge the last step: [evaluate] steps = "last"',
        )
    return {n: _flat(array) for n, array in outputs.items()}, _flat(labels)


def check_labels(
    name: str, answer: Mapping[str, np.ndarray], labels: np.ndarray, *, steps: Steps
) -> None:
    """DataError where N labels do not fit answers like this one, (1, ...), by a built-in metric."""
    answers = {n: np.broadcast_to(a, (len(labels), *a.shape[1:])) for n, a in answer.items()}
    judged, known = as_judged(name, answers, labels, steps=steps)
    task_metric(name, judged, known)


def _flat(array: np.ndarray) -> np.ndarray:
    """(N, T, ...) -> (N * T, ...)"""
    return array.reshape(-1, *array.shape[2:])


def correct(
    name: str,
    outputs: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    *,
    root: Path | None = None,
) -> np.ndarray | None:
    """(N,) bool, which samples were answered correctly; None for a metric that does not count samples.

    Arguments and errors as `task_metric`, which is the mean of this.
    """
    if ":" in name:
        result = _own(name, outputs, labels, root)
        return result if result.dtype == bool and result.ndim == 1 else None
    output, known = _checked(name, outputs, labels)
    per_sample = TASK_METRICS[name].correct
    return None if per_sample is None else per_sample(output, known)


def predictions(
    name: str, outputs: Mapping[str, np.ndarray], *, steps: Steps = "last"
) -> np.ndarray | None:
    """The classes that a built-in metric reads from N answers: (N, ...) int64.

    With ``steps = "each"`` of answers (N, T, ...): (N, T, ...). None for metrics that know no classes
    (regression, functions of the user's own), and for answers they do not fit. Arguments as
    `task_metric`; no labels are needed.
    """
    if steps == "each":
        shape = next(iter(outputs.values())).shape[:2]
        found = predictions(name, {n: _flat(array) for n, array in outputs.items()})
        return None if found is None else found.reshape(*shape, *found.shape[1:])
    metric = TASK_METRICS.get(name)
    output = next(iter(outputs.values()))
    if metric is None or metric.predict is None or len(outputs) != 1 or output.ndim < 2:
        return None
    return metric.predict(output)


def by_class(
    labels: np.ndarray, was_right: np.ndarray, is_right: np.ndarray, classes: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Right answers of a reference and of a candidate for every class that has samples.

    ``labels`` (N,) integers, the others (N,) bool. Empty where labels are no class numbers.
    ``classes`` are their names; a class without one is called by its number.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return []
    rows = []
    for number in np.unique(labels).tolist():
        own = labels == number
        name = classes[number] if 0 <= number < len(classes) else ""
        rows.append(
            {
                "class": name or str(number),
                "n": int(own.sum()),
                "reference_right": int(was_right[own].sum()),
                "right": int(is_right[own].sum()),
            }
        )
    return rows


def _checked(
    name: str, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    if name not in TASK_METRICS:
        raise DataError(
            f"unknown task metric {name!r}{near_miss(name, list(TASK_METRICS))}",
            hint=f'known: {", ".join(TASK_METRICS)}, or your own: "file.py:function"',
        )
    if labels is None:
        raise DataError(
            f"task metric {name!r} needs labels, and this data set has none",
            hint='name the label array (labels = "...") or use a data set that has labels',
        )
    if len(outputs) != 1:
        raise DataError(
            f"task metric {name!r} judges one output, but the model has {len(outputs)}"
            f" ({', '.join(outputs)})",
            hint='write a function that judges them together: metric = "file.py:function"',
        )
    output = next(iter(outputs.values()))
    if len(output) != len(labels) or len(output) == 0:
        raise DataError(
            f"task metric {name!r}: {len(output)} answers but {len(labels)} labels",
            hint="give both for the same samples",
        )
    return output, labels


def _own(
    name: str, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None, root: Path | None
) -> np.ndarray:
    result = np.asarray(call_function(name, root, dict(outputs), labels))
    count = len(next(iter(outputs.values())))
    is_number = result.ndim == 0 and result.dtype.kind in "biuf"
    if not is_number and not (result.dtype == bool and result.shape == (count,)):
        raise DataError(
            f"{name} returned {result.dtype} of shape {result.shape}",
            hint=f"return a number from 0 to 1, or a bool array of shape ({count},)",
        )
    return result
