"""What converters get wrong is rewritten, and computes what it did: onnxruntime is the judge."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepipe.tflite_ops import onnx_recurrent
from edgepipe.tflite_ops.onnx_rewrites import expand_functions, rewrite_for_converters


def model_of(node: onnx.NodeProto, shape: tuple[int, ...], *, opset: int = 18) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["?"] * len(shape))],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(["y"], {"x": x})[0])


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    count = rewrite_for_converters(copy)
    onnx.checker.check_model(copy, full_check=True)
    return copy, count


@pytest.mark.parametrize("alpha", [0.3, 1.7])
def test_an_elu_keeps_its_alpha_in_operators_that_tflite_has(alpha: float) -> None:
    model = model_of(helper.make_node("Elu", ["x"], ["y"], "elu", alpha=alpha), (1, 3, 4, 4))
    new, count = rewritten(model)
    assert count == 1
    elu = next(node for node in new.graph.node if node.op_type == "Elu")
    assert [a.f for a in elu.attribute] in ([], [1.0])
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4), scale=3).astype(np.float32)
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-6)


def test_an_elu_of_alpha_1_and_an_old_model_are_left_as_they_are() -> None:
    assert rewritten(model_of(helper.make_node("Elu", ["x"], ["y"]), (1, 2)))[1] == 0
    old = model_of(helper.make_node("Elu", ["x"], ["y"], alpha=0.5), (1, 2), opset=10)
    assert rewritten(old)[1] == 0


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("LogSoftmax", ["x"], ["y"], "log", axis=1),
        helper.make_node("ReduceLogSumExp", ["x", "axes"], ["y"], "log", keepdims=0),
        helper.make_node("ReduceLogSumExp", ["x", "axes"], ["y"], "log"),
    ],
    ids=["log softmax", "log sum exp", "kept"],
)
def test_logarithms_of_sums_of_exponentials_do_not_overflow(node: onnx.NodeProto) -> None:
    x = (40 * np.random.default_rng(0).normal(size=(2, 3, 4, 5))).astype(np.float32)
    model = model_of(node, x.shape)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3]), "axes"))
    if not [a for a in node.attribute if a.name == "axis"] and any(a.name == "keepdims" for a in node.attribute):  # fmt: skip
        del model.graph.output[0].type.tensor_type.shape.dim[:2]
    new, count = rewritten(model)
    assert count == 1
    kinds = [made.op_type for made in new.graph.node]
    assert kinds.index("ReduceMax") < kinds.index("Exp") < kinds.index("Log")
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-5)


def test_a_choice_beside_a_division_picks_and_does_not_multiply() -> None:
    def choice(operator: str) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Greater", ["x", "zero"], ["c"]),
            helper.make_node(operator, ["one", "x"], ["q"]),
            helper.make_node("Where", ["c", "q", "zero"], ["y"], "where"),
        ]
        model = model_of(nodes[0], (1, 4))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0), ("one", 1)))  # fmt: skip
        return model

    new, count = rewritten(choice("Div"))
    assert count == 1
    values = {t.name: tuple(t.dims) for t in new.graph.initializer}
    assert [values.get(name, (1, 4)) for name in new.graph.node[-1].input] == [(1, 4)] * 3
    x = np.array([[0, 2, -1, 0.5]], np.float32)
    np.testing.assert_array_equal(run(new, x), [[0, 0.5, 0, 2]])
    assert rewritten(choice("Mul"))[1] == 0  # finite: left as it is


def test_float64_inside_a_model_becomes_float32() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["wide", "factor"], ["product"]),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.float64(1))),
        helper.make_node("Add", ["product", "one"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes[0], (1, 3))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.1, 2, 3]), "factor"))
    new, count = rewritten(model)
    assert count == 3
    inferred = onnx.shape_inference.infer_shapes(new).graph.value_info
    assert {value.type.tensor_type.elem_type for value in inferred} == {TensorProto.FLOAT}
    x = np.array([[1, -2, 0.5]], np.float32)
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-6)


@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("shape", [(2, 50), (1, 50, 1)])
def test_a_short_time_fourier_transform_is_a_convolution(shape: tuple[int, ...], onesided: int) -> None:  # fmt: skip
    node = helper.make_node("STFT", ["x", "step", "window", "length"], ["y"], "stft", onesided=onesided)  # fmt: skip
    model = model_of(node, shape)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for size in (shape[0], 1 + (50 - 16) // 5, 9 if onesided else 16, 2):
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = size
    window = np.hanning(16).astype(np.float32)
    model.graph.initializer.extend([
        numpy_helper.from_array(np.array(5), "step"), numpy_helper.from_array(window, "window"), numpy_helper.from_array(np.array(16), "length"),
    ])  # fmt: skip
    new, count = rewritten(model)
    assert count == 1
    assert "Conv" in {made.op_type for made in new.graph.node}
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(x.reshape(shape[:2]), 16, axis=1)[:, ::5]
    expected = np.fft.fft(frames * window)[..., : 9 if onesided else 16]
    np.testing.assert_allclose(run(new, x), np.stack([expected.real, expected.imag], -1), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_a_convolution_with_computed_weights_is_a_matrix_product(groups: int, biased: bool) -> None:
    nodes = [
        helper.make_node("Abs", ["raw"], ["w"]),
        helper.make_node("Conv", ["x", "w", *(["b"] if biased else [])], ["y"], "conv", group=groups, pads=[1, 0, 1, 2], strides=[2, 1], dilations=[1, 2]),
    ]  # fmt: skip
    model = model_of(nodes[0], (2, 4, 7, 9))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    random = np.random.default_rng(0)
    for name, shape in {"raw": (6, 4 // groups, 3, 2), "b": (6,)}.items():
        model.graph.initializer.append(
            numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        )
    for dim, size in zip(model.graph.output[0].type.tensor_type.shape.dim, (2, 6, 4, 9), strict=True):  # fmt: skip
        dim.dim_value = size
    new, count = rewritten(model)
    assert count == 1
    assert "MatMul" in {made.op_type for made in new.graph.node}
    x = random.normal(size=(2, 4, 7, 9)).astype(np.float32)
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_an_output_that_is_a_view_and_read_inside_is_made_for_each() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["y"], "flat"),
        helper.make_node("Relu", ["y"], ["z"], "relu"),
    ]
    model = model_of(nodes[0], (1, 2, 3))
    del model.graph.node[:], model.graph.output[0].type.tensor_type.shape.dim[-1:]
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 6]))
    new, count = rewritten(model)
    assert count == 1
    assert [list(made.input) for made in new.graph.node] == [["x"], ["x"], ["y_inside"]]


def test_the_absolute_value_of_int64_is_the_larger_of_both_signs() -> None:
    for kind, count in ((TensorProto.INT64, 1), (TensorProto.FLOAT, 0)):
        model = model_of(helper.make_node("Abs", ["x"], ["y"], "abs"), (1, 4))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = kind
        new, found = rewritten(model)
        assert found == count
        x = np.array([[-3, 0, 2, -(2**40)]], helper.tensor_dtype_to_np_dtype(kind))
        np.testing.assert_array_equal(run(new, x), np.abs(x))


@pytest.mark.parametrize(
    ("kind", "low", "high", "kinds"),
    [
        ("Clip", 1e-12, None, ["Neg", "Min", "Neg"]), ("Clip", 1e-8, 2.0, ["Min", "Neg", "Min", "Neg"]),
        ("Max", 1e-7, None, ["Neg", "Min", "Neg"]), ("Clip", 0.0, None, ["Clip"]), ("Clip", 1e-3, None, ["Clip"]),
    ],
)  # fmt: skip
def test_a_bound_of_nearly_zero_is_no_relu(kind: str, low: float, high: float | None, kinds: list[str]) -> None:  # fmt: skip
    node = helper.make_node(kind, ["x", "low", *(["high"] if high else [])], ["y"], "clip")
    model = model_of(node, (1, 4))
    for name, value in (("low", low), ("high", high)):
        if value is not None:
            model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    new, _ = rewritten(model)
    assert [made.op_type for made in new.graph.node] == kinds
    x = np.array([[0, -1, 3, 1e-13]], np.float32)
    np.testing.assert_array_equal(run(new, x), np.clip(x, np.float32(low), high))


def test_a_flip_of_two_axes_is_two_flips() -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    model = model_of(helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"], "flip"), x.shape)  # fmt: skip
    for name, values in {"starts": [-1, 1, -1], "ends": [-(2**63), 4, -(2**63)], "axes": [1, 2, 3], "steps": [-1, 2, -1]}.items():  # fmt: skip
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    new, count = rewritten(model)
    assert (count, [made.op_type for made in new.graph.node]) == (1, ["Slice"] * 3)
    np.testing.assert_array_equal(run(new, x), x[:, ::-1, 1::2, ::-1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_last_state_of_a_bidirectional_rnn_is_taken_from_its_output(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(onnx_recurrent, "MAX_STEPS", 4)
    gates = {"LSTM": 4, "GRU": 3}[kind]
    random = np.random.default_rng(0)
    node = helper.make_node(kind, ["x", "w", "r"], ["", "y"], kind, hidden_size=4, direction="bidirectional")  # fmt: skip
    model = model_of(node, (5, 1, 3))
    for name, shape in {"w": (2, 4 * gates, 3), "r": (2, 4 * gates, 4)}.items():
        model.graph.initializer.append(
            numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        )
    new, count = rewritten(model)
    assert count == 1
    assert list(new.graph.node[0].output[1:]) == [""]
    x = random.normal(size=(5, 1, 3)).astype(np.float32)
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-6)


@pytest.mark.parametrize("axes", [None, [3, -2]])
def test_a_circular_pad_goes_on_at_the_other_side(axes: list[int] | None) -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 5)).astype(np.float32)
    widths = [0, 0, 1, 2, 0, 0, 3, 0] if axes is None else [2, 1, 0, 3]
    node = helper.make_node("Pad", ["x", "widths", "", *(["axes"] if axes else [])], ["y"], "pad", mode="wrap")  # fmt: skip
    model = model_of(node, x.shape, opset=19)
    model.graph.initializer.append(numpy_helper.from_array(np.array(widths), "widths"))
    if axes:
        model.graph.initializer.append(numpy_helper.from_array(np.array(axes), "axes"))
    new, count = rewritten(model)
    assert count == 1
    assert {made.op_type for made in new.graph.node} == {"Gather"}
    np.testing.assert_array_equal(run(new, x), np.pad(x, [(0, 0), (0, 0), (1, 3), (2, 0)], "wrap"))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_resize_of_another_scale_or_antialiased_is_sums_of_inputs(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    antialias = mode != "nearest" and data.draw(st.booleans())
    shape = (1, 2, data.draw(st.integers(3, 9)), data.draw(st.integers(3, 9)))
    scales = np.array([1, 1, *(data.draw(st.sampled_from([0.45, 0.7, 1.0, 1.3, 1.7])) for _ in "hw")], np.float32)  # fmt: skip
    options = {
        "mode": mode,
        "coordinate_transformation_mode": "pytorch_half_pixel",
        "cubic_coeff_a": -0.75,
    }
    if mode == "nearest":
        options |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    node = helper.make_node(
        "Resize", ["x", "", "scales"], ["y"], "resize", antialias=int(antialias), **options
    )
    model = model_of(node, shape)
    model.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    sizes = [int(np.floor(n * s)) for n, s in zip(shape, scales, strict=True)]
    assume(
        sizes != list(shape) or (scales == 1).all()
    )  # onnxruntime copies: its output is not the resized one
    for dim, size in zip(model.graph.output[0].type.tensor_type.shape.dim, sizes, strict=True):
        dim.dim_value = size
    new, count = rewritten(model)
    exact = all(
        n * s == pytest.approx(out, abs=1e-3)
        for n, s, out in zip(shape, scales, sizes, strict=True)
    )
    assert count == ((antialias and scales.max() != scales.min()) or not exact)
    # nearest may pick what another scale picks
    assert mode == "nearest" or ("Resize" in {made.op_type for made in new.graph.node}) != count
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("Attention", ["x", "k", "k", "", "past", "past"], ["y", "a", "b"], is_causal=1), {"k": (1, 2, 5, 8), "past": (1, 2, 3, 8)}),
        (helper.make_node("RMSNormalization", ["x", "scale"], ["y"]), {"scale": (8,)}),
        (helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"]), {"cos": (1, 4, 4), "sin": (1, 4, 4)}),
        (helper.make_node("Swish", ["x"], ["y"], alpha=0.7), {}),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)  # fmt: skip
def test_functions_of_the_standard_that_converters_lack_are_written_out(
    node: onnx.NodeProto, constants: dict[str, tuple[int, ...]]
) -> None:
    model = model_of(node, (1, 2, 4, 8), opset=24)
    model.ir_version = 11
    random = np.random.default_rng(5)
    model.graph.initializer.extend(
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in constants.items()
    )
    new = expand_functions(model)
    onnx.checker.check_model(new, full_check=True)
    assert not {node.op_type, "CastLike"} & {made.op_type for made in new.graph.node}
    x = random.normal(size=(1, 2, 4, 8)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(["y"], {"x": x})
    np.testing.assert_allclose(run(new, x), expected, rtol=1e-4, atol=1e-6)


def test_a_model_without_such_functions_is_not_touched() -> None:
    model = model_of(helper.make_node("Relu", ["x"], ["y"]), (1, 2))
    assert expand_functions(model) is model


def batch_norm_model(*before: onnx.NodeProto, reads: str) -> onnx.ModelProto:
    """``x`` (1, 3, 3, 5), then ``before``, then a batch norm of what ``reads`` names."""
    random = np.random.default_rng(3)
    names = ["scale", "bias", "mean", "variance"]
    weights = [numpy_helper.from_array(random.uniform(0.5, 2, 3).astype(np.float32), n) for n in names]  # fmt: skip
    weights.append(numpy_helper.from_array(random.normal(size=(3, 3, 1, 1)).astype(np.float32), "w"))  # fmt: skip
    norm = helper.make_node("BatchNormalization", [reads, *names], ["y"], "norm", epsilon=1e-3)
    model = model_of(norm, (1, 3, 3, 5))
    del model.graph.node[:]
    model.graph.node.extend([*before, norm])
    model.graph.initializer.extend(weights)
    return model


def test_a_lone_batch_norm_becomes_one_depthwise_convolution() -> None:
    model = batch_norm_model(reads="x")
    new, count = rewritten(model)
    assert count == 1
    assert [node.op_type for node in new.graph.node] == ["Conv"]
    x = np.random.default_rng(4).normal(size=(1, 3, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(run(new, x), run(model, x), rtol=1e-5, atol=1e-6)


def test_a_batch_norm_that_folds_into_its_convolution_is_left_to_fold() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["c"], "conv")
    assert rewritten(batch_norm_model(conv, reads="c"))[1] == 0
    model = batch_norm_model(conv, reads="c")
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["?"] * 4))
    assert rewritten(model)[1] == 1  # something else wants the convolution as it is


@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    include=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_average_pool_of_ceil_mode_counts_what_is_there(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, ...],
    include: bool,
) -> None:
    assume(all(pads[i] < kernel[i % 2] for i in range(4)))
    node = helper.make_node(
        "AveragePool", ["x"], ["y"], "pool", kernel_shape=kernel, strides=stride, pads=pads,
        ceil_mode=1, count_include_pad=int(include),
    )  # fmt: skip
    model = model_of(node, (1, 2, *size))
    new, count = rewritten(model)
    x = np.random.default_rng(1).normal(size=(1, 2, *size)).astype(np.float32)
    expected = run(model, x)
    assume(expected.shape[2:] == torch_shape(size, kernel, stride, pads))
    np.testing.assert_allclose(run(new, x), expected, rtol=1e-5, atol=1e-6)
    pools = [n for n in new.graph.node if n.op_type == "AveragePool"]
    assert count == (not any(a.name == "ceil_mode" for a in pools[0].attribute))


def torch_shape(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], pads: tuple[int, ...]) -> tuple[int, ...]:  # fmt: skip
    """PyTorch's rule (pooling_output_shape): the last window begins within the values or the left padding."""
    shape = []
    for i in range(2):
        count = -(-(size[i] + pads[i] + pads[i + 2] - kernel[i]) // stride[i]) + 1
        shape.append(count - ((count - 1) * stride[i] >= size[i] + pads[i]))
    return tuple(shape)
