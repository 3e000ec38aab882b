"""Parity: the inputs two models are compared on, and the verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgepipe.array_ops.noise import with_zeros
from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import DataError, StageError
from edgepipe.parity import parity_inputs, verify


def scaling_model(path: Path, factor: float, *, operator: str = "Mul", size: int = 3) -> Artifact:
    """y = x * factor (or another operator of two arguments), for rows of ``size`` numbers."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "k"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor("k", TensorProto.FLOAT, [], [factor])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)  # fmt: skip
    specs = TensorSpec("x", (1, size)), TensorSpec("y", (1, size))
    return make_artifact("onnx", path, inputs=specs[:1], outputs=specs[1:])


def source(folder: Path, **arrays: np.ndarray) -> DataSource:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return DataSource(kind="npz", path=folder / "data.npz")


def test_inputs_are_real_samples_then_noise_in_their_range(tmp_path: Path) -> None:
    real = np.random.default_rng(0).uniform(5, 6, (20, 3)).astype(np.float32)
    made = parity_inputs(source(tmp_path, x=real), [TensorSpec("x", (1, 3))], 4, 2)["x"]
    assert made.shape == (4 + 2, 3)
    assert made.dtype == np.float32
    assert all((row == real).all(axis=1).any() for row in made[:4])
    assert not any((row == real).all(axis=1).any() for row in made[4:])
    assert (made[4:] >= 5).all()
    assert (made[4:] <= 6).all()
    assert not np.array_equal(made[4], made[5])


def test_noise_for_token_numbers_stays_a_token_number(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 17, (10, 5))
    spec = TensorSpec("ids", (1, 5), "int64")
    made = parity_inputs(source(tmp_path, ids=ids), [spec], 2, 4)["ids"]
    assert made.dtype == np.int64
    assert made.min() >= 3
    assert made.max() <= 16


def test_without_data_there_is_noise_of_each_seed() -> None:
    specs = [TensorSpec("a", (1, 4)), TensorSpec("b", (1, 4))]
    made = parity_inputs(None, specs, 8, 3)
    assert made["a"].shape == (3, 4)
    assert not np.array_equal(made["a"], made["b"])
    np.testing.assert_array_equal(made["a"], parity_inputs(None, specs, 8, 3)["a"])


def test_samples_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    bad = np.array([[1.0, np.nan, 2.0]], np.float32)
    with pytest.raises(DataError, match="NaN in sample 0"):
        parity_inputs(source(tmp_path, x=bad), [TensorSpec("x", (1, 3))], 1, 1)


def test_equal_models_give_the_evidence(tmp_path: Path) -> None:
    reference = scaling_model(tmp_path / "a.onnx", 2.0)
    candidate = scaling_model(tmp_path / "b.onnx", 2.00001)
    inputs = {"x": np.ones((5, 3), np.float32)}
    facts = verify(reference, candidate, inputs, max_relative_error=1e-4, stage="s")
    assert facts["samples"] == 5
    assert facts["reference_sha256"] == reference.sha256
    assert facts["outputs"]["y"]["max_abs_relative"] == pytest.approx(5e-6, rel=0.05)


def test_a_model_just_beyond_the_tolerance_fails(tmp_path: Path) -> None:
    reference = scaling_model(tmp_path / "a.onnx", 2.0)
    candidate = scaling_model(tmp_path / "b.onnx", 2.0 * 1.00011)
    inputs = {"x": np.ones((5, 3), np.float32)}
    with pytest.raises(StageError, match="output 'y' is off by") as caught:
        verify(reference, candidate, inputs, max_relative_error=1e-4, stage="s")
    assert caught.value.code == "parity"
    assert caught.value.stage == "s"


def test_nan_is_no_parity(tmp_path: Path) -> None:
    reference = scaling_model(tmp_path / "a.onnx", 1.0)
    candidate = scaling_model(tmp_path / "b.onnx", 0.5, operator="Pow")  # sqrt of negatives
    inputs = {"x": -np.ones((2, 3), np.float32)}
    with pytest.raises(StageError, match="NaN or infinite"):
        verify(reference, candidate, inputs, max_relative_error=1e-4, stage="s")


def test_another_shape_is_no_parity(tmp_path: Path) -> None:
    reference = scaling_model(tmp_path / "a.onnx", 1.0)
    candidate = scaling_model(tmp_path / "b.onnx", 1.0, operator="Mul")
    graph = onnx.load(candidate.path)
    graph.graph.node.append(helper.make_node("Concat", ["y", "y"], ["z"], axis=1))
    graph.graph.output[0].name = "z"
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6
    onnx.save(graph, candidate.path)
    with pytest.raises(StageError, match="has shape"):
        verify(reference, candidate, {"x": np.ones((2, 3), np.float32)}, max_relative_error=1e-4, stage="s")  # fmt: skip


def test_a_guard_that_was_lost_is_found_though_no_sample_is_zero(tmp_path: Path) -> None:
    def reciprocal_of(guard: float, path: Path) -> Artifact:
        model = scaling_model(path, guard, operator="Add")
        graph = onnx.load(path)
        graph.graph.node[0].output[0] = "guarded"
        graph.graph.node.append(helper.make_node("Reciprocal", ["guarded"], ["y"]))
        onnx.save(graph, path)
        return make_artifact("onnx", path, inputs=model.inputs, outputs=model.outputs)

    guarded = reciprocal_of(1e-10, tmp_path / "a.onnx")
    bare = reciprocal_of(0.0, tmp_path / "b.onnx")
    inputs = {"x": np.full((5, 3), 2.0, np.float32)}
    with pytest.raises(StageError, match="output 'y' is NaN or infinite where its inputs are all 0") as caught:  # fmt: skip
        verify(guarded, bare, inputs, max_relative_error=1e-4, stage="s")
    assert caught.value.code == "parity"
    # what the reference does not hold either is nothing to ask for
    verify(bare, bare, inputs, max_relative_error=1e-4, stage="s")


def test_whole_numbers_stay_what_they_are_where_real_values_are_zero() -> None:
    inputs = {"x": np.ones((3, 2), np.float32), "ids": np.full((3, 4), 7)}
    made = with_zeros(inputs, rows=2)
    np.testing.assert_array_equal(made["x"], np.zeros((2, 2), np.float32))
    np.testing.assert_array_equal(made["ids"], np.full((2, 4), 7))
    assert with_zeros({"ids": inputs["ids"]}, rows=1) == {}
