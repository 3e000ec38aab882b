"""Task metric of the shipped file and how far it is from its reference: on this host, and on a board."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import stats
from edgepipe.artifact import Artifact, TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, TransferError
from edgepipe.input_range import check_input_range
from edgepipe.measurement import Measurement, single
from edgepipe.predict import predict, single_steps, with_states
from edgepipe.rescue import in_common
from edgepipe.state import (
    Steps,
    answer_names,
    are_independent,
    batch_axis,
    is_stateful,
    refuse_streaming,
)
from edgepipe.units import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.array_ops.load import Samples
    from edgepipe.tflite_ops.raw import RawSamples

log = logging.getLogger(__name__)

# Who computes: by whether XNNPACK runs any part of the model.
KERNELS = {True: "xnnpack", False: "builtin", None: "unknown"}
# How many samples layers are compared on, and how many of the noisiest layers are kept.
LAYER_SAMPLES = 8
LAYERS_KEPT = 10
# Samples whose answer differs between board and host are listed up to this many.
FLIPS_KEPT = 20


def evaluate(
    *, shipped: Artifact, float_model: Artifact, reference: Artifact,
    inputs: tuple[TensorSpec, ...], source: DataSource, metric: str, root: Path,
    steps: Steps = "last",
) -> tuple[Measurement, ...]:  # fmt: skip
    """Run three models on the same samples and compare.

    ``shipped`` is the file that goes out, ``float_model`` the one it was quantised from (parity is
    taken against it) and ``reference`` the model the accuracy drop is counted from. ``inputs`` are
    those of the source model, which samples are prepared for.

    The drop comes with a paired 95 % interval and the right answers by class (``by_class``) where
    the metric judges each sample. Drop and parity of a quantised file name the layers that add most
    noise (``layers``), measured on a few samples whether or not a gate will fail: it takes no longer
    than evaluating those.

    Each model with state keeps its own along a sequence. ``steps`` says which of its answers count; where
    each does, there is no interval but for a metric that judges whole sequences: steps are not independent.
    """
    from edgepipe.array_ops.compare import compare
    from edgepipe.array_ops.load import load_samples
    from edgepipe.array_ops.task_metrics import as_judged, task_metric

    refuse_streaming(shipped, "nothing can be evaluated")
    started = time.monotonic()
    samples = load_samples(source, inputs)
    outputs: dict[str, dict[str, Any]] = {}
    named = (("shipped", shipped), ("float", float_model), ("reference", reference))
    for role, model in named:
        if model.sha256 not in outputs:
            log.info("running the %s model on %d samples", role, len(samples))
            outputs[model.sha256] = predict(model, samples.inputs, steps=steps, states=True)
    context: dict[str, Any] = {
        "model_sha256": shipped.sha256,
        "float_sha256": float_model.sha256,
        "reference_sha256": reference.sha256,
        "samples": len(samples),
        "data": samples.origin,
        "random_data": samples.is_random,
        "metric": metric,
        **({"steps": steps} if is_stateful(inputs) else {}),
        "seconds": round(time.monotonic() - started, 2),
    }
    known = shipped.facts.get("calibration_samples", ())
    if known:
        calibrated = shipped.facts.get("calibration", {}).get("samples", 0)
        common = in_common(samples, known, calibrated)
        context["calibration_samples_in_common"] = common
        if common:
            log.warning(
                "%d of the %d evaluation samples (%s) are calibration samples: the int8 file fits them",
                common, len(samples), samples.origin,
            )  # fmt: skip
    context["doubts"] = _doubts(shipped, inputs, samples)
    for doubt in context["doubts"]:
        log.warning("%s", doubt)
    layers = {"layers": _noisiest_layers(shipped, float_model, samples)}
    measured = []
    errors = compare(outputs[float_model.sha256], outputs[shipped.sha256])
    worst = min(e.sqnr_db for e in errors.values())
    measured.append(single("parity_sqnr", "dB", worst, {**context, **layers}))
    measured.append(single("parity_cosine", "", min(e.cosine for e in errors.values()), context))
    if samples.labels is None:
        log.info("the evaluation data has no labels: no task metric")
        return tuple(measured)

    judged = {m.sha256: {n: outputs[m.sha256][n] for n in answer_names(m)} for _, m in named}
    for sha256, found in judged.items():
        judged[sha256], labels = as_judged(metric, found, samples.labels, steps=steps)

    def value(model: Artifact) -> float:
        return task_metric(metric, judged[model.sha256], labels, root=root)

    check_input_range(reference, samples, metric=metric, score=value(reference), root=root, steps=steps)  # fmt: skip
    measured.append(single("task_metric", "", value(shipped), context))
    measured.append(single("task_metric_float", "", value(float_model), context))
    measured.append(single("task_metric_reference", "", value(reference), context))
    paired = _paired(
        metric, judged[reference.sha256], judged[shipped.sha256], labels, samples.classes, root, steps
    )  # fmt: skip
    drop = 100 * (value(reference) - value(shipped))
    measured.append(single("accuracy_drop", "points", drop, {**context, **layers, **paired}))
    return tuple(measured)


def _paired(
    metric: str, reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray],
    labels: np.ndarray, classes: Sequence[str], root: Path, steps: Steps,
) -> dict[str, Any]:  # fmt: skip
    """``interval_points`` of the drop and ``by_class``; nothing where the metric counts no samples."""
    from edgepipe.array_ops.task_metrics import by_class, correct

    was_right = correct(metric, reference, labels, root=root)
    is_right = correct(metric, candidate, labels, root=root)
    if was_right is None or is_right is None:
        return {}
    found: dict[str, Any] = {"by_class": by_class(labels, was_right, is_right, classes)}
    if are_independent(metric, steps):
        _, low, high = stats.paired_difference_interval(was_right.tolist(), is_right.tolist())
        found["interval_points"] = [100 * low, 100 * high]
    return found


def _doubts(shipped: Artifact, inputs: Sequence[TensorSpec], samples: Samples) -> list[str]:
    """Whether calibration data, by its recorded figures, looks prepared in another way."""
    from edgepipe.array_ops.calibration import InputStatistics, compare_inputs

    specs = {spec.name: spec for spec in inputs}
    seen = [InputStatistics(**found) for found in shipped.facts.get("calibration", {}).get("inputs", ()) if found["name"] in specs]  # fmt: skip
    if not seen or samples.is_random or shipped.facts["calibration"]["is_random"]:
        return []
    return compare_inputs(seen, samples, [specs[found.name] for found in seen])


def _noisiest_layers(
    shipped: Artifact, float_model: Artifact, samples: Samples
) -> list[dict[str, Any]]:
    """What `noisiest_layers` finds in a TFLite file quantised from another; else an empty list."""
    if {shipped.kind, float_model.kind} != {"tflite"} or shipped.sha256 == float_model.sha256:
        return []
    from edgepipe.array_ops.calibration import file_batches
    from edgepipe.tflite_ops.flatbuffer import with_main_graph
    from edgepipe.tflite_ops.layer_noise import comparable
    from edgepipe.tflite_ops.quantize import noisiest_layers

    inputs = {name: array[:LAYER_SAMPLES] for name, array in samples.inputs.items()}
    few = with_states(dataclasses.replace(samples, inputs=inputs), float_model)
    try:
        before, after = float_model.path.read_bytes(), shipped.path.read_bytes()
        if shipped.signature:
            after = with_main_graph(after, shipped.signature, where=shipped.path.name)
        where = (float_model.path.name, shipped.path.name)
        return noisiest_layers(
            comparable(before, after, where=where),
            after,
            file_batches(few, float_model.inputs),
            count=LAYERS_KEPT,
        )
    except ArtifactError as exc:  # an explanation less; the evaluation itself stands
        log.warning("the layers of the shipped file cannot be compared: %s", exc.message)
        return []


# ------------------------------------------------------------------------------------ on a board


@dataclasses.dataclass(frozen=True)
class DeviceEvaluation:
    """Samples that a board shall answer, and what its answers are judged by.

    ``inputs`` by input name, (n, ...) in the source layout, one inference each; ``samples`` the same as
    `predict` takes them. They differ for a model with state: a board is given every step of n sequences of
    ``length`` with the state that this host had there, as inferences on their own. Where the board gives
    what this host does for each, it gives it for the sequence. ``labels`` (n, ...) or None; ``indices``
    (n,) are their numbers in the evaluation set. ``reference`` is the model the accuracy drop is
    counted from. ``context`` goes into the record: how many of how many, how chosen, metric, data.
    """

    inputs: Mapping[str, Any]
    samples: Mapping[str, Any]
    labels: Any
    indices: Any
    classes: tuple[str, ...]
    metric: str
    root: Path
    reference: Artifact
    context: Mapping[str, Any]
    length: int = 1
    steps: Steps = "last"


def choose_evaluation(
    *, shipped: Artifact, reference: Artifact, inputs: tuple[TensorSpec, ...], source: DataSource,
    metric: str, root: Path, count: int, seed: int, steps: Steps = "last",
) -> DeviceEvaluation:  # fmt: skip
    """A seeded sample of ``count`` from the evaluation data, classes in proportion; 0 means all.

    The count is rounded up to whole batches of ``shipped``, as far as there are samples. Arguments
    as for `evaluate`, which judges the whole set on this host by the same metric.
    """
    from edgepipe.array_ops.load import load_samples
    from edgepipe.array_ops.sampling import stratified_sample

    samples = load_samples(source, inputs)
    batch = max((s.shape[batch_axis(s.layout)] for s in shipped.inputs if s.shape), default=1)
    wanted = math.ceil(count / max(batch, 1)) * max(batch, 1)
    chosen, is_stratified = stratified_sample(wanted, len(samples), samples.labels, seed=seed)
    inputs_of = {name: array[chosen] for name, array in samples.inputs.items()}
    length, forced = 1, {}
    if is_stateful(inputs):
        length = next(iter(inputs_of.values())).shape[1]
        forced = {"length": length, "steps": steps, "states": "this host's at every step"}
    return DeviceEvaluation(
        inputs=single_steps(shipped, inputs_of),
        samples=inputs_of,
        labels=None if samples.labels is None else samples.labels[chosen],
        indices=chosen,
        classes=samples.classes,
        metric=metric,
        root=root,
        reference=reference,
        context={
            "reference_sha256": reference.sha256,
            "samples": len(chosen),
            "samples_total": len(samples),
            "samples_seed": seed,
            "stratified": is_stratified,
            "data": samples.origin,
            "random_data": samples.is_random,
            "metric": metric,
            **forced,
        },
        length=length,
        steps=steps,
    )


def check_fits(
    model: Artifact, samples: RawSamples, *, free_bytes: int | None, reserve_bytes: int, address: str
) -> None:  # fmt: skip
    """Refuse samples that the board's free disk cannot hold with their answers.

    To be called before anything is pushed. ``free_bytes`` is what the board said, ``reserve_bytes``
    what must stay free. Raises TransferError (``disk-full``) with the numbers.
    """
    from edgepipe.tflite_ops.raw import output_bytes

    answers = samples.count * output_bytes(model.path, signature=model.signature)
    needed = len(samples.data) + answers + reserve_bytes
    if free_bytes is None or needed <= free_bytes:
        return
    raise TransferError(
        f"the disk of {address} is too small for the samples: {format_bytes(free_bytes)} are free; "
        f"{samples.count * samples.batch} samples need {format_bytes(len(samples.data))}, their "
        f"outputs {format_bytes(answers)}, and {format_bytes(reserve_bytes)} stay free",
        hint="free some space there, or give fewer samples ([measure] evaluate_samples)",
        code="disk-full",
    )


def device_measurements(
    model: Artifact, samples: RawSamples, described: Sequence[Mapping[str, Any]], answers: bytes,
    context: Mapping[str, Any], evaluation: DeviceEvaluation | None = None, *,
    delegated: bool | None = None,
) -> tuple[Measurement, ...]:  # fmt: skip
    """What a board's answers are worth, computed on this host.

    ``answers`` is the outputs file of a board that was given ``samples``: inference after inference,
    in each the tensors of ``described`` (``name``, ``dtype``, ``shape``, ``bytes``). ``context`` is
    that of the measurement they belong to. ``delegated`` says whether XNNPACK ran any part of the
    model there; where it did not, this host runs the builtin kernels as well, which round otherwise.
    Gives ``device_mismatch`` (values that are not this host's, see `mismatch`) and with an ``evaluation`` of the same samples ``device_flips``,
    ``device_task_metric`` and ``device_accuracy_drop`` (with paired 95 % interval and classes), as
    far as its metric and labels allow. Raises DataError where the answers are not this file's.
    """
    from edgepipe.array_ops.task_metrics import as_judged, predictions, task_metric
    from edgepipe.tflite_ops.raw import mismatch, read_outputs, real_outputs, stored_outputs
    from edgepipe.tflite_ops.run import is_delegated

    which = model.signature
    on_device = read_outputs(model.path, answers, described, samples.count, signature=which)
    log.info("running the same %d samples on this host", samples.count * samples.batch)
    as_there = is_delegated(model.path, signature=which) and delegated is not False
    on_host = stored_outputs(model.path, samples, delegates=as_there, signature=which)
    # builtin int8 kernels are written for each instruction set and may round a tie otherwise
    steps = int(not as_there and context.get("machine") not in (None, "any", platform.machine()))
    found = mismatch(on_host, on_device, steps=steps)
    details = {
        "values": found.values,
        "unequal": found.unequal,
        "max_abs": found.max_abs,
        "max_ulps": found.max_ulps,
        "steps_allowed": steps,
        "inferences": samples.count,
        "kernels_here": KERNELS[as_there],
        "kernels_there": KERNELS[delegated],
    }
    measured = [single("device_mismatch", "", found.share, {**context, **details})]
    if evaluation is None:
        return tuple(measured)
    n = samples.count * samples.batch // evaluation.length  # the rest of the last batch was not run
    facts = {**context, **evaluation.context, "samples": n}
    metric, root = evaluation.metric, evaluation.root
    device, host = (
        _answers_of(
            model, real_outputs(model.path, said, model.outputs, signature=which), evaluation, n
        )
        for said in (on_device, on_host)
    )
    known = None if evaluation.labels is None else evaluation.labels[:n]

    device_says, host_says = (
        predictions(metric, f, steps=evaluation.steps) for f in (device, host)
    )
    if device_says is not None and host_says is not None:
        moved = (device_says != host_says).reshape(n, -1).any(axis=1)
        listed = [
            _flip(evaluation, i, host_says, device_says)
            for i in moved.nonzero()[0][:FLIPS_KEPT].tolist()
        ]
        flips = {**facts, "flips": listed, "flipped": int(moved.sum())}
        measured.append(single("device_flips", "", float(moved.mean()), flips))
    if known is None:
        log.info("the evaluation data has no labels: no task metric of the device")
        return tuple(measured)

    log.info("running the reference model on %d samples", n)
    given = {k: v[:n] for k, v in evaluation.samples.items()}
    reference = predict(evaluation.reference, given, steps=evaluation.steps)
    reference, labels = as_judged(metric, reference, known, steps=evaluation.steps)
    device, host = (as_judged(metric, f, known, steps=evaluation.steps)[0] for f in (device, host))
    value = task_metric(metric, device, labels, root=root)
    was = task_metric(metric, reference, labels, root=root)
    facts["task_metric_host"] = task_metric(metric, host, labels, root=root)
    facts["task_metric_reference"] = was
    measured.append(single("device_task_metric", "", value, facts))
    paired = _paired(metric, reference, device, labels, evaluation.classes, root, evaluation.steps)
    measured.append(single("device_accuracy_drop", "points", 100 * (was - value), {**facts, **paired}))  # fmt: skip
    return tuple(measured)


def _answers_of(
    model: Artifact, outputs: Mapping[str, np.ndarray], evaluation: DeviceEvaluation, count: int
) -> dict[str, np.ndarray]:
    """The answers of ``count`` samples out of those of their single inferences, as `predict` gives them."""
    found = {name: outputs[name] for name in answer_names(model)}
    if not is_stateful(model.inputs):
        return found
    length = evaluation.length
    apart = {n: a[: count * length].reshape(count, length, *a.shape[1:]) for n, a in found.items()}
    return apart if evaluation.steps == "each" else {n: a[:, -1] for n, a in apart.items()}


def _flip(
    evaluation: DeviceEvaluation, row: int, host: np.ndarray, device: np.ndarray
) -> dict[str, Any]:
    """One sample that board and host answer differently; classes only where there is one a sample."""
    entry: dict[str, Any] = {"sample": int(evaluation.indices[row])}
    if host.ndim == 1:
        entry |= {"host": int(host[row]), "device": int(device[row])}
        if evaluation.labels is not None and evaluation.labels.ndim == 1:
            entry["label"] = evaluation.labels[row].item()
    return entry
