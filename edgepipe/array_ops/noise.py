"""Noise in the range of real samples: inputs on which a wrong model cannot hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgepipe.artifact import TensorSpec
from edgepipe.errors import DataError


def with_noise(
    real: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], seeds: int
) -> dict[str, np.ndarray]:
    """Real samples followed by one sample of noise per seed, for every input of ``specs``.

    (n, ...) -> (n + seeds, ...) in the same dtype. Noise is uniform between the least and the
    largest real value of that input; where there are no real values, or they are all equal, it is
    standard normal (0 or 1 for integers without real values). Raises DataError for NaN or infinity.
    """
    made = {}
    for position, spec in enumerate(specs):
        rows = [real[spec.name]] if spec.name in real else []
        if rows and not np.isfinite(rows[0]).all():
            raise DataError(
                f"samples for input {spec.name!r} hold NaN or infinity",
                hint="mend the data: a model cannot be judged on it",
            )
        rows += [
            _noise(np.random.default_rng([seed, position]), spec, real.get(spec.name))
            for seed in range(seeds)
        ]
        made[spec.name] = np.concatenate(rows)
    return made


def with_zeros(inputs: Mapping[str, np.ndarray], *, rows: int) -> dict[str, np.ndarray]:
    """The first ``rows`` samples with 0 for every real value; {} where all inputs are whole numbers,
    which count or name something and so stay."""
    few = {name: array[:rows] for name, array in inputs.items()}
    if not any(np.issubdtype(array.dtype, np.floating) for array in few.values()):
        return {}
    return {n: np.zeros_like(a) if np.issubdtype(a.dtype, np.floating) else a for n, a in few.items()}  # fmt: skip


def _noise(generator: np.random.Generator, spec: TensorSpec, real: np.ndarray | None) -> np.ndarray:
    """One sample, (1, ...)."""
    shape, dtype = (1, *spec.shape[1:]), np.dtype(spec.dtype)
    if dtype == np.bool_:
        return generator.integers(0, 2, shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        low, high = (int(real.min()), int(real.max())) if real is not None else (0, 1)
        return generator.integers(low, high, shape, endpoint=True).astype(dtype)
    if real is None or real.min() == real.max():
        return generator.standard_normal(shape).astype(dtype)
    return generator.uniform(float(real.min()), float(real.max()), shape).astype(dtype)
