"""How far the outputs of one model are from those of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from edgepipe.errors import ArtifactError

# Beyond float64's own 15.95 digits (319 dB) nothing is measured; 200 dB stands for "exact" and
# keeps every figure finite, so that records stay valid JSON.
SQNR_LIMIT_DB = 200.0
# Stands in for a reference that is zero everywhere: any error is then relatively huge, yet finite.
_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Distance of one output from its reference, over all samples.

    ``max_abs`` is in the output's own unit; ``max_abs_relative`` is max|error| / max|reference|;
    ``sqnr_db`` is 10 log10(sum reference^2 / sum error^2), clamped to +-200 dB; ``cosine`` is the
    cosine similarity of the two as flat vectors. ``variation_db`` is as ``sqnr_db`` of what each value
    differs by from its mean over samples: kelvins from 290 to 300 in steps of 8 have 42 dB of SQNR, and
    nearly none of this. None where no value differs.
    """

    max_abs: float
    max_abs_relative: float
    sqnr_db: float
    cosine: float
    variation_db: float | None


def compare(
    reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]
) -> dict[str, OutputError]:
    """Per output, how far ``candidate`` is from ``reference``; computed in float64.

    Raises ArtifactError where the outputs have other names or shapes, are empty, or hold NaN or
    infinity: such outputs cannot be compared, and that is never a pass.
    """
    if set(reference) != set(candidate):
        raise ArtifactError(
            f"outputs differ: {sorted(reference)} against {sorted(candidate)}",
            code="not-comparable",
        )
    return {name: _compare_one(name, reference[name], candidate[name]) for name in reference}


def _compare_one(name: str, reference: np.ndarray, candidate: np.ndarray) -> OutputError:
    if reference.shape != candidate.shape or reference.size == 0:
        raise ArtifactError(
            f"output {name!r} has shape {candidate.shape}, expected {reference.shape}",
            code="not-comparable",
        )
    expected = reference.astype(np.float64).ravel()
    actual = candidate.astype(np.float64).ravel()
    for label, values in (("reference", expected), ("candidate", actual)):
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        if bad:
            raise ArtifactError(
                f"output {name!r} of the {label} is NaN or infinite in {bad} of {values.size} values",
                hint="look for a division by zero, log of zero or overflow in the model or its data",
                code="not-comparable",
            )
    error = actual - expected
    max_abs = float(np.abs(error).max())
    signal, noise = float(expected @ expected), float(error @ error)
    candidate_power = float(actual @ actual)
    if signal == 0.0 or candidate_power == 0.0:
        cosine = 1.0 if signal == candidate_power else 0.0
    else:
        cosine = float(
            np.clip(expected @ actual / np.sqrt(signal) / np.sqrt(candidate_power), -1, 1)
        )
    varying = reference.astype(np.float64)
    varying = varying - varying.mean(axis=0)
    # what is left of equal values is rounding of their mean
    variation = float((varying**2).sum()) if float(np.abs(varying).max()) > 1e-6 * float(np.abs(expected).max()) else 0.0  # fmt: skip
    return OutputError(
        max_abs=max_abs,
        max_abs_relative=max_abs / max(float(np.abs(expected).max()), _TINY),
        sqnr_db=sqnr_db(signal, noise),
        cosine=cosine,
        variation_db=sqnr_db(variation, noise) if variation else None,
    )


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(np.isfinite(values).all())


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers, clamped to +-200 dB: +200 without noise, zeros included."""
    if noise == 0.0:
        return SQNR_LIMIT_DB
    if signal == 0.0:
        return -SQNR_LIMIT_DB
    return float(np.clip(10 * np.log10(signal / noise), -SQNR_LIMIT_DB, SQNR_LIMIT_DB))
