"""Moving axes: the one place where a layout like NCHW becomes another."""

from __future__ import annotations

import numpy as np

from edgepipe.errors import ArtifactError


def to_layout(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """The same values with the axes named by ``source`` reordered to ``target``.

    ``to_layout(x, "NCHW", "NHWC")`` turns (8, 3, 32, 16) into (8, 32, 16, 3): axes 0, 2, 3, 1.
    The result is C-contiguous. Raises ArtifactError where the layouts name different axes, an axis
    twice, or another number of axes than the array has.
    """
    if source == target:
        return array
    if sorted(source) != sorted(target) or len(set(source)) != len(source):
        raise ArtifactError(
            f"layout {source!r} cannot be reordered to {target!r}: they name different axes",
            hint="both must hold the same letters once, like NCHW and NHWC",
        )
    if array.ndim != len(source):
        raise ArtifactError(
            f"layout {source!r} names {len(source)} axes, the array has {array.ndim}: "
            f"shape {array.shape}",
            hint="give the array the layout that its tensor spec declares",
        )
    return np.ascontiguousarray(np.transpose(array, [source.index(axis) for axis in target]))


def permute_shape(shape: tuple[int, ...], source: str, target: str) -> tuple[int, ...]:
    """``permute_shape((1, 3, 32, 16), "NCHW", "NHWC") == (1, 32, 16, 3)``."""
    return tuple(shape[source.index(axis)] for axis in target)
