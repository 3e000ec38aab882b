"""Moving axes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.array_ops.layout import permute_shape, to_layout
from edgepipe.errors import ArtifactError

layouts = st.permutations("NCHW").map("".join)


def test_nchw_becomes_nhwc_value_by_value() -> None:
    image = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    moved = to_layout(image, "NCHW", "NHWC")
    assert moved.shape == (2, 4, 5, 3)
    assert moved[1, 3, 2, 0] == image[1, 0, 3, 2]
    assert moved.flags.c_contiguous


@given(layouts, layouts)
def test_there_and_back_is_the_same_array(source: str, target: str) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    there = to_layout(array, source, target)
    assert there.shape == permute_shape(array.shape, source, target)
    np.testing.assert_array_equal(to_layout(there, target, source), array)


@pytest.mark.parametrize(("source", "target"), [("NCHW", "NHW"), ("NCHW", "NHWD"), ("NNHW", "NHWN")])  # fmt: skip
def test_layouts_of_different_axes_are_refused(source: str, target: str) -> None:
    with pytest.raises(ArtifactError, match="different axes"):
        to_layout(np.zeros((1, 1, 1, 1)), source, target)


def test_an_array_of_another_rank_is_refused() -> None:
    with pytest.raises(ArtifactError, match="names 4 axes, the array has 3"):
        to_layout(np.zeros((1, 2, 3)), "NCHW", "NHWC")
