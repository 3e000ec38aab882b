"""Which samples of an evaluation set a board is given."""

from __future__ import annotations

import numpy as np


def stratified_sample(
    count: int, total: int, labels: np.ndarray | None, *, seed: int
) -> tuple[np.ndarray, bool]:
    """(Ascending indices (count,) int64 of ``total`` samples, whether classes were kept in proportion).

    With one integer label a sample, every class keeps its share of the whole to within one sample
    (quotas by largest remainder), chosen at random inside the class; else the choice is random
    overall. ``count`` 0, or one not below ``total``, takes all.

    A mean over such a sample is an unbiased estimate of the whole set's (to the rounding of
    quotas), and its variance is at most that of a plain random sample (Cochran, Sampling
    Techniques, 5.6): intervals that assume the latter hold. Worked example: 10 of 30 samples, of
    which 4, 5 and 21 are of three classes: 1.33, 1.67 and 7, so 1, 2 and 7.
    """
    if count <= 0 or count >= total:
        return np.arange(total), False
    generator = np.random.default_rng(seed)
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return np.sort(generator.choice(total, size=count, replace=False)), False
    classes, sizes = np.unique(labels, return_counts=True)
    exact = count * sizes / total
    quotas = np.floor(exact).astype(int)
    left = count - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1  # largest remainders first
    chosen = [
        generator.choice(np.flatnonzero(labels == c), size=quota, replace=False)
        for c, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen)), True
