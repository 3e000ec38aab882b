"""Task metric of the shipped file, and how far it is from its reference, on this host."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from edgepipe import stats
from edgepipe.artifact import Artifact, TensorSpec
from edgepipe.data import DataSource
from edgepipe.measurement import Measurement, single
from edgepipe.predict import predict

log = logging.getLogger(__name__)


def evaluate(
    *, shipped: Artifact, float_model: Artifact, reference: Artifact,
    inputs: tuple[TensorSpec, ...], source: DataSource, metric: str, root: Path,
) -> tuple[Measurement, ...]:  # fmt: skip
    """Run three models on the same samples and compare.

    ``shipped`` is the file that goes out, ``float_model`` the one it was quantised from (parity is
    taken against it) and ``reference`` the model the accuracy drop is counted from. ``inputs`` are
    those of the source model, which samples are prepared for. The drop comes with a paired 95 % interval where the metric judges each sample.
    """
    from edgepipe.array_ops.compare import compare
    from edgepipe.array_ops.load import load_samples
    from edgepipe.array_ops.task_metrics import correct, task_metric

    started = time.monotonic()
    samples = load_samples(source, inputs)
    outputs: dict[str, dict[str, Any]] = {}
    named = (("shipped", shipped), ("float", float_model), ("reference", reference))
    for role, model in named:
        if model.sha256 not in outputs:
            log.info("running the %s model on %d samples", role, len(samples))
            outputs[model.sha256] = predict(model, samples.inputs)
    context: dict[str, Any] = {
        "model_sha256": shipped.sha256,
        "float_sha256": float_model.sha256,
        "reference_sha256": reference.sha256,
        "samples": len(samples),
        "data": samples.origin,
        "random_data": samples.is_random,
        "metric": metric,
        "seconds": round(time.monotonic() - started, 2),
    }
    measured = []
    errors = compare(outputs[float_model.sha256], outputs[shipped.sha256])
    measured.append(single("parity_sqnr", "dB", min(e.sqnr_db for e in errors.values()), context))
    measured.append(single("parity_cosine", "", min(e.cosine for e in errors.values()), context))
    if samples.labels is None:
        log.info("the evaluation data has no labels: no task metric")
        return tuple(measured)

    def value(model: Artifact) -> float:
        return task_metric(metric, outputs[model.sha256], samples.labels, root=root)

    measured.append(single("task_metric", "", value(shipped), context))
    measured.append(single("task_metric_float", "", value(float_model), context))
    measured.append(single("task_metric_reference", "", value(reference), context))
    drop_context = dict(context)
    was_right = correct(metric, outputs[reference.sha256], samples.labels, root=root)
    is_right = correct(metric, outputs[shipped.sha256], samples.labels, root=root)
    if was_right is not None and is_right is not None:
        _, low, high = stats.paired_difference_interval(was_right.tolist(), is_right.tolist())
        drop_context["interval_points"] = [100 * low, 100 * high]
    drop = 100 * (value(reference) - value(shipped))
    measured.append(single("accuracy_drop", "points", drop, drop_context))
    return tuple(measured)
