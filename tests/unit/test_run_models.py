"""Running .onnx and .tflite files on this host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgepipe.artifact import TensorSpec
from edgepipe.errors import ArtifactError, DataError
from edgepipe.tflite_ops import run as ops
from edgepipe.tflite_ops.bisect import first_departure
from edgepipe.tflite_ops.candidates import keeps_state, left_behind
from edgepipe.tflite_ops.convert import match_tensors
from edgepipe.tflite_ops.onnx_model import onnx_specs
from edgepipe.tflite_ops.run import dequantize, exact_cast, quantize, run_onnx, run_tflite
from edgepipe.tflite_ops.tiny import stateful_tflite, tiny_tflite

from .tflite_builder import Graph

X, Y = TensorSpec("x", (1, 4)), TensorSpec("y", (1, 4))


def dense_onnx(path: Path, batch: int | str) -> Path:
    """y = 2 x, for 4 numbers."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], (2 * np.eye(4)).ravel().tolist())
    shape = [batch, 4]
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], [weight],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)  # fmt: skip
    return path


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("batch", [1, 4, "n"])
def test_any_number_of_samples_runs_through_any_batch(tmp_path: Path, batch: int | str, count: int) -> None:  # fmt: skip
    path = dense_onnx(tmp_path / "m.onnx", batch)
    x = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    np.testing.assert_array_equal(run_onnx(path, [x], [X], [Y])[0], 2 * x)


def test_a_state_of_two_layers_keeps_both_rows_of_every_sample(tmp_path: Path) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 4]) for name, rows in (("x", 1), ("y", 2))]  # fmt: skip
    graph = helper.make_graph([node], "g", info[:1], info[1:])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)  # fmt: skip
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(run_onnx(path, [x], [X], [Y])[0], x.repeat(2, axis=0))


def test_a_tflite_of_batch_one_is_looped_over(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(tiny_tflite())
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(run_tflite(path, [x], [X], [Y])[0], 2 * x + 1)


def test_a_scalar_takes_one_sample_at_a_time_and_is_found_again_in_the_converted_file(
    tmp_path: Path,
) -> None:
    """y = a * b for scalars, in ONNX and in TFLite."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "aby"]
    graph = helper.make_graph([helper.make_node("Mul", ["a", "b"], ["y"])], "g", values[:2], values[2:])  # fmt: skip
    reference, converted = tmp_path / "m.onnx", tmp_path / "m.tflite"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), reference)  # fmt: skip
    g = Graph()
    y = g.op("MUL", [g.input("a", []), g.input("b", [])], "y", [], "MulOptions")
    converted.write_bytes(g.bytes([y]))

    inputs, outputs = onnx_specs(reference)
    assert [s.shape for s in (*inputs, *outputs)] == [(), (), ()]
    a, b = np.float32([1, 2, 3]), np.float32([5, 7, 11])
    for run, path in ((run_onnx, reference), (run_tflite, converted)):
        np.testing.assert_array_equal(run(path, [a, b], inputs, outputs)[0], a * b)
    match = match_tensors(reference, converted, inputs, outputs, [a, b], layouts={}, tolerance=0.0)
    assert match.errors == {"y": 0.0}
    # onnx2tf makes [1] of a scalar that meets a vector
    g = Graph()
    y = g.op("MUL", [g.input("a", [1]), g.input("b", [])], "y", [], "MulOptions")
    (tmp_path / "one.tflite").write_bytes(g.bytes([y]))
    one = match_tensors(reference, tmp_path / "one.tflite", inputs, outputs, [a, b], layouts={}, tolerance=0.0)  # fmt: skip
    assert [s.shape for s in one.inputs] == [(1,), ()]
    np.testing.assert_array_equal(run_tflite(tmp_path / "one.tflite", [a, b], one.inputs, one.outputs)[0].reshape(3), a * b)  # fmt: skip
    rows = {"a": a[:1], "b": b[:1]}
    assert not keeps_state(converted, rows, match.inputs)
    assert first_departure(reference, converted, [a[:1], b[:1]], [a[:1], b[:1]], tolerance=0.0) is None  # fmt: skip


def test_an_erf_that_a_converter_spelt_out_is_left_behind_and_negation_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.tflite"
    g = Graph()
    x = g.op("NEG", [g.input("x", [1, 4])], "negative", [1, 4], "NegOptions")
    path.write_bytes(g.bytes([g.op("SIGN", [x], "y", [1, 4], "SignOptions")]))
    assert left_behind(path)["loose_ops"] == {"SIGN": 1}


def test_state_does_not_leak_from_one_sample_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(stateful_tflite())
    x = np.ones((3, 4), np.float32)
    y = run_tflite(path, [x], [X], [Y])[0]
    np.testing.assert_array_equal(y[0], y[1])
    np.testing.assert_array_equal(y[0], y[2])


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 1), (4,)])
def test_samples_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = dense_onnx(tmp_path / "m.onnx", 1)
    with pytest.raises(DataError, match=r"input 'x' of m.onnx takes"):
        run_onnx(path, [np.zeros(shape, np.float32)], [X], [Y])


@pytest.mark.parametrize(("name", "run"), [("m.onnx", run_onnx), ("m.tflite", run_tflite)])
@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"not a model at all"])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, name: str, run: object, content: bytes) -> None:  # fmt: skip
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        run(path, [np.zeros((1, 4), np.float32)], [X], [Y])  # type: ignore[operator]


def test_a_spec_of_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(tiny_tflite())
    stale = TensorSpec("x", (1, 4), "int8", scale=0.5)
    with pytest.raises(ArtifactError, match=r"has scale 0.0 .* its spec says 0.5"):
        run_tflite(path, [np.zeros((1, 4), np.float32)], [stale], [Y])


@given(
    value=st.floats(-1, 1, width=32),
    scale=st.floats(0.0078125, 0.5, width=32),
    zero_point=st.integers(-128, 127),
)
def test_quantising_is_off_by_half_a_step_inside_the_range(value: float, scale: float, zero_point: int) -> None:  # fmt: skip
    detail = {"name": "x", "dtype": np.int8, "quantization": (scale, zero_point)}
    low, high = scale * (-128 - zero_point), scale * (127 - zero_point)
    clipped = min(max(value, low), high)
    back = dequantize(quantize(np.array([value], np.float32), detail), detail)
    # half a step, and float32's resolution of the result
    assert abs(float(back[0]) - clipped) <= scale / 2 + 1e-6 * max(1, abs(low), abs(high))


def test_fractions_are_not_cut_off_for_an_integer_input() -> None:
    np.testing.assert_array_equal(exact_cast(np.array([1.0, 2.0]), np.int64, what="ids"), [1, 2])
    with pytest.raises(DataError, match="with fractions"):
        exact_cast(np.array([1.5]), np.int64, what="ids")


def test_numbers_that_an_integer_input_cannot_hold_are_refused() -> None:
    np.testing.assert_array_equal(exact_cast(np.array([7]), np.int32, what="ids"), [7])
    with pytest.raises(DataError, match="ids holds int32"):
        exact_cast(np.array([2**40]), np.int32, what="ids")
    int8 = {"name": "x", "dtype": np.int8, "quantization": (0.5, 10)}
    np.testing.assert_array_equal(quantize(np.float32([np.inf, 3.2]), int8), [127, 16])
    with pytest.raises(DataError, match="NaN"):
        quantize(np.float32([np.nan, 3.2]), int8)


def test_a_model_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = tmp_path / "m.tflite"
    path.write_bytes(tiny_tflite())
    ops.refuse_crashing(path)
    monkeypatch.setattr(ops, "TRIAL_TIMEOUT_S", 0.001)  # shorter than Python takes to start
    with pytest.raises(ArtifactError, match="does not finish one inference"):
        ops.refuse_crashing(path)


def one_node_onnx(path: Path, operator: str, dtype: int, result: int, shape: list[int]) -> Path:
    info = [helper.make_tensor_value_info("x", dtype, shape), helper.make_tensor_value_info("y", result, None)]  # fmt: skip
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", info[:1], info[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)  # fmt: skip
    return path


def test_an_output_whose_shape_depends_on_values_is_refused(tmp_path: Path) -> None:
    path = one_node_onnx(tmp_path / "m.onnx", "NonZero", TensorProto.FLOAT, TensorProto.INT64, [1, 4])  # fmt: skip
    x = np.array([[0, 1, 0, 0], [1, 1, 0, 0]], np.float32)
    with pytest.raises(ArtifactError) as caught:
        run_onnx(path, [x], [X], [TensorSpec("y", (2, 1), "int64")])
    assert caught.value.code == "dynamic-shape"
    assert "(2, 1), (2, 2)" in caught.value.message


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_integers_run(tmp_path: Path, dtype: str) -> None:
    kind = getattr(TensorProto, dtype.upper())
    path = one_node_onnx(tmp_path / "m.onnx", "Identity", kind, kind, [1, 4])
    x = np.array([[0, 1, 2, 40_000]], dtype)
    spec = TensorSpec("x", (1, 4), dtype)
    np.testing.assert_array_equal(run_onnx(path, [x], [spec], [spec])[0], x)


def test_an_input_without_elements_is_refused(tmp_path: Path) -> None:
    path = one_node_onnx(tmp_path / "m.onnx", "Relu", TensorProto.FLOAT, TensorProto.FLOAT, [3, 0])
    with pytest.raises(ArtifactError) as caught:
        onnx_specs(path)
    assert caught.value.code == "empty-input"
