"""Parity: proof that the model a stage made computes what the model it was given computes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepipe.artifact import Artifact, TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, StageError
from edgepipe.predict import predict
from edgepipe.state import PARITY_STEPS, data_inputs, is_stateful, with_steps

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.array_ops.load import SampleStream

log = logging.getLogger(__name__)

# Samples a quantised file is compared with the float file on: enough for a stable SQNR (the standard
# error of a mean over 64 is an eighth of the spread), few enough to cost less than calibration.
QUANTISED_SAMPLES = 64


def parity_inputs(
    source: DataSource | None, specs: Sequence[TensorSpec], samples: int, seeds: int
) -> dict[str, np.ndarray]:
    """Inputs to compare two models on: real samples, then noise in the range of the real ones.

    Returns source input name -> (n + seeds, ...) in the source layout and dtype, n being
    ``samples`` or as many as the data has. Row n + k is noise of seed k: uniform between the least
    and the largest real value of that input. Without ``source`` there is only noise: standard
    normal, or 0 and 1 for integers. Of a model with state they are sequences of at most `PARITY_STEPS`
    steps. Raises DataError where the data does not fit ``specs``, or is NaN or infinite.
    """
    from edgepipe.array_ops.noise import with_noise

    real: dict[str, np.ndarray] = {}
    if source is not None and samples > 0:
        from edgepipe.array_ops.load import load_samples

        limit = min(source.limit, samples) if source.limit else samples
        real = load_samples(dataclasses.replace(source, limit=limit), specs).inputs
    if is_stateful(specs):
        real = {name: array[:, :PARITY_STEPS] for name, array in real.items()}
        steps = next((array.shape[1] for array in real.values()), PARITY_STEPS)
        specs = with_steps(data_inputs(specs), steps)
    return with_noise(real, specs, seeds)


def verify(
    reference: Artifact,
    candidate: Artifact,
    inputs: Mapping[str, np.ndarray],
    *,
    max_relative_error: float,
    stage: str,
) -> dict[str, Any]:
    """Run both models on the same inputs and compare every output, at every step; returns the evidence.

    ``inputs`` are as `parity_inputs` makes them. The evidence (``Artifact.facts["parity"]``) holds
    per output max abs error, that relative to max|reference|, SQNR and cosine. Raises StageError
    (``parity``) where an output is off by more than ``max_relative_error`` of the largest absolute
    value of its reference, has another shape, or is NaN; so is one that is NaN or infinite where all real
    inputs are 0 and the reference is not, as on a black picture and in silence: samples seldom are, and
    what guards a division or a logarithm there is what exporters and converters fold away.
    """
    from edgepipe.array_ops.compare import compare
    from edgepipe.array_ops.noise import with_zeros

    try:
        found = [predict(m, inputs, steps="each", states=True) for m in (reference, candidate)]
        errors = compare(*found)
        batch = (
            candidate.inputs[0].shape[0] if candidate.inputs and candidate.inputs[0].shape else 1
        )
        zeros = with_zeros(inputs, rows=max(batch, 1))
        lost = _no_longer_finite(reference, candidate, zeros) if zeros else []
    except ArtifactError as exc:
        raise StageError(
            f"cannot show that the {candidate.kind} model computes the same as the "
            f"{reference.kind} model: {exc.message}",
            stage=stage, hint=exc.hint, code="parity",
        ) from exc  # fmt: skip
    outputs = {name: dataclasses.asdict(error) for name, error in errors.items()}
    departed = [name for name, error in errors.items() if not error.max_abs_relative <= max_relative_error]  # fmt: skip
    if departed:
        told = "; ".join(
            f"output {name!r} is off by {errors[name].max_abs:.3g} ({errors[name].max_abs_relative:.2g} "
            f"of its largest value), SQNR {errors[name].sqnr_db:.1f} dB"
            for name in departed
        )
        raise StageError(
            f"the {candidate.kind} model does not compute the same as the {reference.kind} model: {told}; "
            f"allowed is {max_relative_error:.2g}",
            stage=stage, code="parity",
            hint="if the model is random or unstable by nature, raise max_relative_error; else report it",
        )  # fmt: skip
    if lost:
        raise StageError(
            f"the {candidate.kind} model does not compute the same as the {reference.kind} model: output {lost[0]!r} "
            "is NaN or infinite where its inputs are all 0, which it was not",
            stage=stage, code="parity",
            hint="look for a division, a square root or a logarithm whose guard (+ 1e-10, clamp) was lost, and write a larger one",
        )  # fmt: skip
    worst = min(error.sqnr_db for error in errors.values())
    samples = len(next(iter(inputs.values()))) if inputs else 0
    log.info("%s = %s on %d inputs: SQNR at least %.1f dB", candidate.kind, reference.kind, samples, worst)  # fmt: skip
    sequences = is_stateful(reference.inputs)
    return {
        "reference": reference.kind,
        "reference_sha256": reference.sha256,
        "samples": samples,
        **({"steps": next(iter(inputs.values())).shape[1]} if sequences else {}),
        "max_relative_error": max_relative_error,
        "outputs": outputs,
    }


def _no_longer_finite(
    reference: Artifact, candidate: Artifact, inputs: Mapping[str, np.ndarray]
) -> list[str]:
    """Outputs that hold NaN or infinity only in the candidate. Values are not compared: at 0, ties and
    vanishing variances make models differ that are the same."""
    from edgepipe.array_ops.compare import is_finite

    expected = predict(reference, inputs, steps="each", states=True)
    if not all(map(is_finite, expected.values())):
        return []
    found = predict(candidate, inputs, steps="each", states=True)
    return [name for name, values in found.items() if not is_finite(values)]


def compare_to_float(
    before: Artifact, after: Artifact, samples: SampleStream, *, precision: str, stage: str
) -> dict[str, Any]:
    """How far a quantised file is from the float file it was made from, on real samples; the evidence.

    Samples are `compared_samples`, outputs those of every step, states included. What is far enough
    is for the caller to say (`worst_output`). Raises StageError (``parity``) where they cannot be compared.
    """
    from edgepipe.array_ops.compare import compare

    few = samples.take(compared_samples(len(samples)))
    try:
        found = [predict(m, few.inputs, steps="each", states=True) for m in (before, after)]
        errors = compare(*found)
    except ArtifactError as exc:
        raise StageError(
            f"cannot compare the {precision} model with the float model: {exc.message}",
            stage=stage, hint=exc.hint, code="parity",
        ) from exc  # fmt: skip
    parity = {
        "against": "float tflite",
        "reference_sha256": before.sha256,
        "samples": len(few),
        "data": samples.origin,
        "random_data": samples.is_random,
        "outputs": {name: dataclasses.asdict(error) for name, error in errors.items()},
    }
    worst, sqnr_db = worst_output(parity)
    log.info("%s against float: %.1f dB on %r", precision, sqnr_db, worst)
    return parity


def worst_output(parity: Mapping[str, Any]) -> tuple[str, float]:
    """The output with the least SQNR in the evidence of `compare_to_float`, and that in dB."""
    outputs = parity["outputs"]
    worst = min(outputs, key=lambda name: outputs[name]["sqnr_db"])
    return worst, outputs[worst]["sqnr_db"]


def compared_samples(total: int) -> range:
    """Up to `QUANTISED_SAMPLES` sample numbers, evenly spread over all ``total``."""
    step = max(1, total // QUANTISED_SAMPLES)
    return range(0, total, step)[:QUANTISED_SAMPLES]
