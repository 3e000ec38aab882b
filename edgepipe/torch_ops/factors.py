"""The arithmetic of low rank: kernels into factors, what is lost, and which rank a noisy matrix has.

Kernels are float64: (out, in), or (out, in, height, width) for the methods ``tucker`` and ``cp``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import tensorly.decomposition

# Alternating least squares: passes over the factors, enough for the error to settle in 3 digits.
CP_PASSES = 100


def factors_of(kernel: np.ndarray, method: str, ranks: Sequence[int]) -> list[np.ndarray]:
    """svd: (r, in), (out, r). tucker: (r_in, in), (r_out, r_in, h, w), (out, r_out). cp: (r, in), (r, h),
    (r, w), (out, r). Scales are spread evenly, so that each factor quantises well."""
    if method == "svd":
        left, values, right = np.linalg.svd(kernel, full_matrices=False)
        root = np.sqrt(values[: ranks[0]])
        return [root[:, None] * right[: ranks[0]], left[:, : ranks[0]] * root]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorly's, of ranks above a side of the kernel
        if method == "tucker":
            (core, (left, right)), _ = tensorly.decomposition.partial_tucker(
                kernel, rank=list(ranks), modes=[0, 1], n_iter_max=20, random_state=0
            )
            return [right.T, core, left]
        weights, factors = tensorly.decomposition.parafac(
            kernel, rank=ranks[0], n_iter_max=CP_PASSES, init="svd", random_state=0, tol=1e-6
        )
    norms = [np.maximum(np.linalg.norm(f, axis=0), 1e-30) for f in factors]
    size = (np.abs(weights) * np.prod(norms, axis=0)) ** 0.25
    wide, narrow, height, width = (f / n * size for f, n in zip(factors, norms, strict=True))
    return [narrow.T, height.T, width.T, wide * np.sign(weights)]


def product_of(factors: list[np.ndarray], method: str) -> np.ndarray:
    """The kernel that the factors make together."""
    if method == "svd":
        return factors[1] @ factors[0]
    if method == "tucker":
        narrow, core, wide = factors
        return np.einsum("oa,abhw,bi->oihw", wide, core, narrow, optimize=True)
    narrow, height, width, wide = factors
    return np.einsum("or,ri,rh,rw->oihw", wide, narrow, height, width, optimize=True)


def energy_of(kernel: np.ndarray, method: str, ranks: Sequence[int]) -> float:
    """1 - |W - W'|^2 / |W|^2 of the factored kernel."""
    difference = kernel - product_of(factors_of(kernel, method, ranks), method)
    return float(1 - (difference**2).sum() / max(float((kernel**2).sum()), 1e-300))


def spectrum_of(kernel: np.ndarray, method: str) -> np.ndarray:
    """Share of the squared norm kept at each rank: (rank,), or (r_out, r_in) for Tucker.

    Tucker by the truncated higher-order SVD (De Lathauwer et al. 2000), which the alternating fit
    that follows only betters. Entry [i] is for rank i + 1.
    """
    if method == "cp":
        return np.empty(0)
    total = max(float((kernel**2).sum()), 1e-300)
    if method == "svd":
        return np.cumsum(np.linalg.svd(kernel, compute_uv=False) ** 2) / total
    left, right = (np.linalg.svd(m, full_matrices=True)[0] for m in unfoldings_of(kernel, method))
    core = np.einsum("oihw,oa,ib->abhw", kernel, left, right, optimize=True)
    return (core**2).sum((2, 3)).cumsum(0).cumsum(1) / total


def unfoldings_of(kernel: np.ndarray, method: str) -> list[np.ndarray]:
    """(out, in) for a matrix; (out, in * h * w) and (in, out * h * w) for a kernel."""
    if method == "svd":
        return [kernel]
    return [kernel.reshape(len(kernel), -1), np.moveaxis(kernel, 1, 0).reshape(kernel.shape[1], -1)]


def vbmf_rank(matrix: np.ndarray) -> int:
    """The rank of a low-rank matrix under noise of unknown strength; 0 where it is all noise.

    Empirical variational Bayes, global analytic solution: a singular value stays where it exceeds the
    threshold of Nakajima et al. 2013 (JMLR 14, theorem 2 and 2015, JMLR 16, theorem 2), with the noise
    variance that minimises the free energy (2015, equations 25 to 28), searched on a grid. Example: a
    60x80 matrix of rank 5 and noise far below its singular values gives 5.
    """
    small, large = sorted(matrix.shape)  # L <= M
    squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    if not squares[0] > 0:
        return 0
    alpha = small / large
    tau = 2.5129 * math.sqrt(alpha)
    floor = (1 + tau) * (
        1 + alpha / tau
    )  # below it a squared singular value / (M sigma^2) is noise
    hidden = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    rest = squares[hidden:]
    lowest = max(rest[0] / (large * floor), rest.mean() / large, squares[0] * 1e-14 / large)
    highest = squares.mean() / large
    if highest <= lowest:
        return int((squares > large * lowest * floor).sum())
    variances = np.geomspace(lowest, highest, 2000)  # (V,)
    x = np.maximum(squares[None] / (large * variances[:, None]), 1e-300)  # (V, L)
    energy = x - np.log(x)
    above = x > floor
    y = np.where(above, x, floor) - (1 + alpha)
    t = 0.5 * (y + np.sqrt(y**2 - 4 * alpha))
    energy += np.where(above, np.log(t + 1) + alpha * np.log(t / alpha + 1) - t, 0.0)
    best = variances[np.argmin(energy.sum(1))]
    return int((squares > large * best * floor).sum())
