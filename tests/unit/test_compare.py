"""Figures of how far two outputs are apart."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgepipe.array_ops.compare import SQNR_LIMIT_DB, compare
from edgepipe.errors import ArtifactError

vectors = arrays(np.float32, 7, elements=st.floats(-1000, 1000, width=32))


def test_worked_example() -> None:
    # error (0, 0, 0.3): max 0.3, relative 0.3 / 4, SQNR 10 log10((9 + 16) / 0.09) = 24.44 dB
    error = compare({"y": np.array([3.0, 4.0, 0.0])}, {"y": np.array([3.0, 4.0, 0.3])})["y"]
    assert error.max_abs == pytest.approx(0.3)
    assert error.max_abs_relative == pytest.approx(0.075)
    assert error.sqnr_db == pytest.approx(10 * math.log10(25 / 0.09))
    assert error.cosine == pytest.approx(25 / (5 * math.sqrt(25.09)))


@given(vectors)
def test_an_output_equals_itself(values: np.ndarray) -> None:
    error = compare({"y": values}, {"y": values.copy()})["y"]
    varies = float(np.ptp(values.astype(np.float64))) > 1e-3 * float(np.abs(values).max())
    assert error == type(error)(
        0.0, 0.0, SQNR_LIMIT_DB, pytest.approx(1.0), SQNR_LIMIT_DB if varies else error.variation_db
    )


@given(vectors, vectors)
def test_every_figure_is_finite_json(a: np.ndarray, b: np.ndarray) -> None:
    error = dataclasses.asdict(compare({"y": a}, {"y": b})["y"])
    json.dumps(error, allow_nan=False)
    assert -1 <= error["cosine"] <= 1


def test_an_error_on_an_all_zero_reference_is_huge_not_nothing() -> None:
    error = compare({"y": np.zeros(3)}, {"y": np.array([0, 0, 1e-6])})["y"]
    assert error.max_abs_relative > 1
    assert error.sqnr_db == -SQNR_LIMIT_DB
    assert error.cosine == 0.0


def test_what_an_output_varies_by_is_told_apart_from_what_it_is() -> None:
    kelvin = np.array([[290.0], [300.0]])
    error = compare({"y": kelvin}, {"y": kelvin + np.array([[5.0], [-5.0]])})["y"]
    assert error.sqnr_db == pytest.approx(10 * math.log10((290**2 + 300**2) / 50))  # 35 dB
    assert error.variation_db == pytest.approx(0.0)
    # nothing varies: one sample, or one and the same answer
    assert compare({"y": kelvin[:1]}, {"y": kelvin[1:]})["y"].variation_db is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_nan_and_infinity_are_never_comparable(value: float, side: str) -> None:
    good, bad = np.array([1.0, 2.0]), np.array([1.0, value])
    pair = ({"y": bad}, {"y": good}) if side == "reference" else ({"y": good}, {"y": bad})
    with pytest.raises(ArtifactError, match=rf"{side} is NaN or infinite in 1 of 2"):
        compare(*pair)


def test_other_shapes_and_names_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"shape \(1, 2\), expected \(2,\)"):
        compare({"y": np.ones(2)}, {"y": np.ones((1, 2))})
    with pytest.raises(ArtifactError, match="outputs differ"):
        compare({"y": np.ones(2)}, {"z": np.ones(2)})
