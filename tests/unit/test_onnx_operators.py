"""Operators in forms that converters do not take compute the same in those that they do: onnxruntime is the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepipe.tflite_ops import onnx_recurrent
from edgepipe.tflite_ops.onnx_model import onnx_specs
from edgepipe.tflite_ops.onnx_rewrites import rewrite_for_converters
from edgepipe.tflite_ops.run import open_onnx


def model_of(
    node: NodeProto, inputs: dict[str, np.ndarray], constants: dict[str, Any], *, opset: int = 20
) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(name, kind(a.dtype), a.shape) for name, a in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(a) for a in open_onnx(model.SerializeToString()).run(None, inputs)]


def assert_rewritten(model: onnx.ModelProto, inputs: dict[str, np.ndarray], *, rewritten: bool | None = True, tolerance: float = 1e-5) -> list[str]:  # fmt: skip
    """Equal outputs, names, types and shapes; returns the operators. ``rewritten`` None: whether it was does not matter."""
    expected = run(model, inputs)
    count = rewrite_for_converters(model)
    if rewritten is not None:
        assert bool(count) == rewritten
    onnx.checker.check_model(model, full_check=True)
    for a, b in zip(expected, run(model, inputs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.abs(a).max(initial=0.0) if a.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * float(scale))
    return [node.op_type for node in model.graph.node]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SIDES = st.integers(1, 6)


@pytest.mark.slow
@given(
    sizes=st.tuples(SIDES, SIDES),
    scales=st.tuples(*[st.sampled_from([0.5, 0.6, 1.0, 1.3, 2.0, 3.0])] * 2),
    by_scale=st.booleans(),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    coordinates=st.sampled_from(["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric"]),
    rounding=st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
    antialias=st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_resize_that_tflite_has_not_is_gathers_or_matrices(
    sizes: tuple[int, int], scales: tuple[float, float], by_scale: bool, mode: str, coordinates: str, rounding: str, antialias: bool
) -> None:  # fmt: skip
    x = noise(1, 2, *sizes)
    made = [max(1, int(n * s)) for n, s in zip(sizes, scales, strict=True)]
    assume(not by_scale or all(int(n * s) for n, s in zip(sizes, scales, strict=True)))
    options: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        options["nearest_mode"] = rounding
    elif antialias:
        options["antialias"] = 1
    names = ["x", "", "scales"] if by_scale else ["x", "", "", "sizes"]
    constants = {"scales": np.array([1, 1, *scales], np.float32)} if by_scale else {"sizes": np.array([1, 2, *made])}  # fmt: skip
    model = model_of(helper.make_node("Resize", names, ["y"], **options), {"x": x}, constants)
    try:
        run(model, {"x": x})
    except Exception:  # noqa: BLE001  onnxruntime has not every combination
        assume(False)
    assert_rewritten(model, {"x": x}, rewritten=None)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_plain_resize_by_two_stays_one_operator(mode: str) -> None:
    x = noise(1, 2, 3, 4)
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode)
    model = model_of(node, {"x": x}, {"scales": np.array([1, 1, 2, 2], np.float32)})
    assert assert_rewritten(model, {"x": x}, rewritten=None) == ["Resize"]


def test_a_resize_of_a_region_extrapolates() -> None:
    x = noise(1, 1, 4, 5)
    node = helper.make_node(
        "Resize", ["x", "roi", "", "sizes"], ["y"], mode="linear", axes=[3, 2],
        coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=7.0,
    )  # fmt: skip
    constants = {"roi": np.array([0.4, 0.2, 1.2, 0.7], np.float32), "sizes": np.array([3, 6])}
    assert "Add" in assert_rewritten(model_of(node, {"x": x}, constants), {"x": x})


@pytest.mark.slow
@given(
    axis=st.integers(0, 1), size=st.integers(2, 7), parts=st.integers(1, 2), inverse=st.booleans(), onesided=st.booleans(),
    length=st.sampled_from([None, 4, 9]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_dft_is_one_matrix(axis: int, size: int, parts: int, inverse: bool, onesided: bool, length: int | None) -> None:  # fmt: skip
    assume(not onesided or (parts == 1 and not inverse))
    shape = [3, 3, parts]
    shape[axis] = size
    x = noise(*shape)
    constants: dict[str, Any] = {"axis": np.array(axis)}
    if length:
        constants["length"] = np.array(length)
    node = helper.make_node("DFT", ["x", "length" if length else "", "axis"], ["y"], inverse=int(inverse), onesided=int(onesided))  # fmt: skip
    operators = assert_rewritten(model_of(node, {"x": x}, constants), {"x": x}, tolerance=1e-4)
    assert operators.count("MatMul") == 1


@pytest.mark.parametrize("window", [True, False])
def test_an_stft_of_columns_needs_no_window(window: bool) -> None:
    x = noise(2, 50, 1)
    constants: dict[str, Any] = {"step": np.array(6), "length": np.array(16)}
    if window:
        constants["window"] = np.hanning(16).astype(np.float32)
    node = helper.make_node("STFT", ["x", "step", "window" if window else "", "length"], ["y"], onesided=1)  # fmt: skip
    model = model_of(node, {"x": x}, constants)
    assert "Conv" in assert_rewritten(model, {"x": x}, tolerance=1e-4)


@pytest.mark.slow
@given(
    kind=st.sampled_from(["MaxPool", "AveragePool", "LpPool"]),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)), kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2), dilation=st.tuples(*[st.integers(1, 2)] * 2),
    pads=st.tuples(*[st.integers(0, 1)] * 4), include=st.booleans(), same=st.sampled_from(["", "", "SAME_UPPER", "SAME_LOWER"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_pool_is_dilated_and_of_other_norms(
    kind: str, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int], pads: tuple[int, ...], include: bool, same: str,
) -> None:  # fmt: skip
    assume(all(pads[i] < kernel[i % 2] for i in range(4)))
    options: dict[str, Any] = {"kernel_shape": kernel, "strides": stride}
    if same:
        assume(all(s <= k for s, k in zip(stride, kernel, strict=True)))  # onnxruntime: no gaps
        options["auto_pad"] = same
    else:
        options |= {"pads": pads, "dilations": dilation}
    if kind == "AveragePool":
        options["count_include_pad"] = int(include)
    x = noise(1, 2, *size)
    model = model_of(helper.make_node(kind, ["x"], ["y"], **options), {"x": x}, {})
    dilated = not same and max(dilation) > 1
    operators = assert_rewritten(model, {"x": x}, rewritten=dilated or kind == "LpPool")
    if dilated:
        assert not {"MaxPool", "AveragePool", "LpPool"} & set(operators)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("start", [True, False])
def test_a_recurrent_operator_is_written_step_by_step(kind: str, direction: str, start: bool) -> None:  # fmt: skip
    gates, ways = onnx_recurrent._KINDS[kind], 2 if direction == "bidirectional" else 1
    x = noise(4, 2, 3)
    constants: dict[str, Any] = {
        "w": noise(ways, gates * 5, 3, seed=1), "r": noise(ways, gates * 5, 5, seed=2), "b": noise(ways, gates * 10, seed=3),
        "lengths": np.array([4, 4], np.int32),
    }  # fmt: skip
    names, outputs = ["x", "w", "r", "b", "lengths"], ["y", "h"]
    if start:
        constants["h0"] = noise(ways, 2, 5, seed=4)
        names.append("h0")
    if kind == "LSTM":
        outputs.append("c")
        if start:
            constants |= {"c0": noise(ways, 2, 5, seed=5), "p": noise(ways, 15, seed=6)}
            names += ["c0", "p"]
    node = helper.make_node(kind, names, outputs, hidden_size=5, direction=direction)
    operators = assert_rewritten(model_of(node, {"x": x}, constants), {"x": x})
    assert kind not in operators


def test_a_recurrent_operator_of_many_steps_or_of_a_stream_is_left_to_the_converter() -> None:
    constants = {"w": noise(1, 20, 3, seed=1), "r": noise(1, 20, 5, seed=2)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=5)
    long = noise(onnx_recurrent.MAX_STEPS + 1, 1, 3)
    assert rewrite_for_converters(model_of(node, {"x": long}, constants)) == 0
    model = model_of(node, {"x": long[:2]}, constants)
    assert rewrite_for_converters(model, streaming=True) == 0
    assert rewrite_for_converters(model) == 1


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...ij,jk->...ik", [(2, 3, 4, 5), (5, 6)]), ("ij->ji", [(2, 3)]), ("i...->...", [(2, 3, 4)]), ("ij,ij", [(2, 3)] * 2),
        ("ij,ji->", [(2, 3), (3, 2)]), ("ba", [(2, 3)]), ("i,ij", [(2,), (2, 3)]), ("...i,i...->...", [(2, 3, 4), (4, 2, 3)]),
    ],
)  # fmt: skip
def test_an_einsum_is_sums_or_without_an_ellipsis(equation: str, shapes: list[tuple[int, ...]]) -> None:  # fmt: skip
    inputs = {f"x{k}": noise(*shape, seed=k) for k, shape in enumerate(shapes)}
    node = helper.make_node("Einsum", list(inputs), ["y"], equation=equation)
    model = model_of(node, inputs, {})
    assert_rewritten(model, inputs)
    assert not any("." in a.s.decode() for node in model.graph.node for a in node.attribute if a.name == "equation")  # fmt: skip


@pytest.mark.parametrize("equation", ["ii->i", "bij,bjk->bik"])
def test_an_einsum_that_converters_know_or_of_a_diagonal_is_left(equation: str) -> None:
    inputs = {f"x{k}": noise(*[2] * len(term)) for k, term in enumerate(equation.split("->")[0].split(","))}  # fmt: skip
    node = helper.make_node("Einsum", list(inputs), ["y"], equation=equation)
    assert rewrite_for_converters(model_of(node, inputs, {})) == 0


X = noise(3, 4, 5, seed=7)


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("ArgMax", ["x"], ["y"], axis=-2, select_last_index=1), {}),
        (helper.make_node("ArgMin", ["x"], ["y"], axis=1, keepdims=0, select_last_index=1), {}),
        (helper.make_node("LpNormalization", ["x"], ["y"], axis=1, p=1), {}),
        (helper.make_node("LpNormalization", ["x"], ["y"], p=2), {}),
        (helper.make_node("PRelu", ["x", "s"], ["y"]), {"s": noise(5)}),
        (helper.make_node("PRelu", ["x", "s"], ["y"]), {"s": noise(4, 5)}),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=2, num_outputs=2), {}),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=-3, num_outputs=2), {}),
        (helper.make_node("Pad", ["x", "p", "", "a"], ["y"]), {"p": np.array([1, 0, 2, 1]), "a": np.array([-1, 0])}),
        (helper.make_node("Pad", ["x", "p", "v", "a"], ["y"]), {"p": np.array([1, 2]), "v": np.float32(3), "a": np.array([1])}),
        (helper.make_node("Pad", ["x", "p"], ["y"], mode="wrap"), {"p": np.array([0, 2, 1, 0, 3, 4])}),
        (helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["y"]), {"s": np.array([4, -1]), "e": np.array([-9, 0]), "a": np.array([2, 1]), "t": np.array([-2, -1])}),
        (helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["y"]), {"s": np.array([9, 0]), "e": np.array([0, 3]), "a": np.array([2, 1]), "t": np.array([-1, 2])}),
        (helper.make_node("Max", ["x"], ["y"]), {}),
        (helper.make_node("Mean", ["x"], ["y"]), {}),
        (helper.make_node("Gelu", ["x"], ["y"], approximate="tanh"), {}),
        (helper.make_node("Hardmax", ["x"], ["y"]), {}),
        (helper.make_node("GatherElements", ["x", "i"], ["y"], axis=1), {"i": np.array([[[0, -1, 3, -4, 2]]])}),
    ],
    ids=lambda value: value.op_type if isinstance(value, NodeProto) else "",
)  # fmt: skip
def test_what_converters_refuse_is_written_with_other_operators(node: NodeProto, constants: dict[str, Any]) -> None:  # fmt: skip
    assert_rewritten(model_of(node, {"x": X}, constants), {"x": X})


def test_a_remainder_with_the_sign_of_the_dividend_is_one_of_absolutes() -> None:
    model = model_of(helper.make_node("Mod", ["x", "s"], ["y"], fmod=1), {"x": 4 * X}, {"s": noise(5)})  # fmt: skip
    assert rewrite_for_converters(model) == 1
    (actual,) = ReferenceEvaluator(model).run(
        None, {"x": 4 * X}
    )  # onnxruntime has no Mod of floats
    np.testing.assert_allclose(actual, np.fmod(4 * X, noise(5)), rtol=1e-6)


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("PRelu", ["x", "s"], ["y"]), {"s": noise(4, 1)}),
        (helper.make_node("PRelu", ["x", "s"], ["y"]), {"s": noise(1)}),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2), {}),
        (helper.make_node("Pad", ["x", "p"], ["y"]), {"p": np.array([0, 2, 1, 0, 3, 4])}),
        (helper.make_node("Slice", ["x", "s", "e"], ["y"]), {"s": np.array([1]), "e": np.array([2])}),
        (helper.make_node("ArgMax", ["x"], ["y"]), {}),
        (helper.make_node("Gelu", ["x"], ["y"]), {}),
        (helper.make_node("Max", ["x", "s"], ["y"]), {"s": noise(5)}),
    ],
    ids=lambda value: value.op_type if isinstance(value, NodeProto) else "",
)  # fmt: skip
def test_what_converters_take_is_left(node: NodeProto, constants: dict[str, Any]) -> None:
    assert rewrite_for_converters(model_of(node, {"x": X}, constants)) == 0


@given(
    kind=st.sampled_from(["Add", "Sub", "Mul", "Greater", "LessOrEqual", "Equal", "BitwiseAnd", "BitwiseOr"]),
    dtype=st.sampled_from(["int8", "uint8", "int16", "uint16", "uint32"]), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_small_integers_wrap_as_they_did(kind: str, dtype: str, seed: int) -> None:
    assume(not (kind.startswith("Bitwise") and dtype == "uint32"))
    numbers = np.iinfo(dtype)
    random = np.random.default_rng(seed)
    inputs = {name: random.integers(numbers.min, numbers.max, (3, 4), endpoint=True).astype(dtype) for name in "ab"}  # fmt: skip
    assert_rewritten(model_of(helper.make_node(kind, ["a", "b"], ["y"]), inputs, {}), inputs)


def test_float64_becomes_float32_in_weights_constants_casts_and_at_the_door() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3))
    model = model_of(helper.make_node("Mul", ["c", "w"], ["m"]), {"x": x}, {"w": np.arange(3.0)})
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["c"], to=TensorProto.DOUBLE))
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array(2.0))))  # fmt: skip
    model.graph.node.append(helper.make_node("Add", ["m", "k"], ["y"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.DOUBLE, [2, 3]))
    (expected,) = run(model, {"x": x})
    assert rewrite_for_converters(model) == 5
    onnx.checker.check_model(model, full_check=True)
    (actual,) = run(model, {"x": x.astype(np.float32)})
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_model_that_divides_by_its_input_has_specs(tmp_path: Any) -> None:
    inputs = {name: np.ones(3, np.int32) for name in "ab"}
    onnx.save(model_of(helper.make_node("Div", ["a", "b"], ["y"]), inputs, {}), tmp_path / "m.onnx")
    _, (output,) = onnx_specs(tmp_path / "m.onnx")
    assert (output.shape, output.dtype) == ((3,), "int32")
