"""Float to int8: the numbers against the LiteRT 8-bit specification, and what is refused."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.errors import StageError
from edgepipe.tflite_ops import quantize as ops
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import FloatIsland, describe_model
from edgepipe.tflite_ops.precisions import make_precision
from edgepipe.tflite_ops.tiny import tiny_tflite
from tests.unit.tflite_builder import Graph, small_cnn


def graph_of(content):
    return parse_model(content, where="m").subgraphs[0]


def run(content, batch, *, reference_kernels=False):
    """Stored values in, stored values out."""
    resolver = OpResolverType.BUILTIN_REF if reference_kernels else OpResolverType.AUTO
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), batch, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]).copy() for d in interpreter.get_output_details()]


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(content, data, **options):
    content, _ = ops.fuse_activations(content, where="m")
    table = ops.collect_ranges(content, [[x[None]] for x in data], where="m").table()
    return ops.quantize(content, table, **options)


def one_dense(seed=0, outputs=6):
    rng = np.random.default_rng(seed)
    g = Graph()
    x = g.input("x", (1, 8))
    # channels of very different size: one scale for all of them would lose the small ones
    weights = (rng.normal(size=(outputs, 8)) * np.logspace(-2, 1, outputs)[:, None]).astype(np.float32)  # fmt: skip
    bias = rng.normal(size=outputs).astype(np.float32)
    return g.bytes([g.dense(x, weights, bias, "y", (1, outputs))]), weights, bias


def sqnr(expected, got):
    return 10 * np.log10((expected**2).sum() / ((got - expected) ** 2).sum())


def real_outputs(content, data):
    """Real values in and out of an int8 model, computed here from its scales."""
    graph = graph_of(content)
    x, y = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    stored = np.clip(np.rint(data / x.scales[0]) + x.zero_points[0], -128, 127).astype(np.int8)
    rows = [run(content, [row[None]])[0] for row in stored]
    return (np.concatenate(rows).astype(np.float64) - y.zero_points[0]) * y.scales[0]


# --- ranges


def test_ranges_are_the_union_over_samples_of_every_activation():
    content = tiny_tflite(size=4, layers=2)  # h0 = 2x + 1, y = 2 h0 + 1
    data = [np.array([[0.0, 1, 2, 3]], np.float32), np.array([[-5.0, 0, 0, 0]], np.float32)]
    ranges = ops.collect_ranges(content, [[x] for x in data], where="m")
    assert ranges.table() == {"x": (-5, 3), "h0": (-9, 7), "y": (-17, 15)}
    assert ranges.minima.shape == (2, 3)


def test_samples_are_streamed_one_at_a_time():
    alive = []

    def batches():
        for i in range(5):
            alive.append(i)
            yield [np.full((1, 4), i, np.float32)]

    iterator = batches()
    ops.collect_ranges(tiny_tflite(), iterator, where="m")
    assert alive == [0, 1, 2, 3, 4]


def test_a_tensor_that_becomes_nan_is_named_with_its_operator_and_sample():
    good, bad = np.ones((1, 4), np.float32), np.full((1, 4), np.inf, np.float32)
    with pytest.raises(StageError, match=r"FULLY_CONNECTED output 'y' is NaN for .* sample 1"):
        ops.collect_ranges(tiny_tflite(), [[good], [bad]], where="m")


def test_infinities_are_left_out_of_a_range():
    g = Graph()
    x = g.input("x", (1, 4))
    y = g.op("ADD", [x, g.const("one", np.ones((1, 4), np.float32))], "y", (1, 4), "AddOptions")
    big = np.array([[-np.inf, 1, 2, 3]], np.float32)
    table = ops.collect_ranges(g.bytes([y]), [[big]], where="m").table()
    assert table == {"x": (1, 3), "y": (2, 4)}


# --- numbers


def test_weights_and_bias_follow_the_8_bit_specification_channel_by_channel():
    content, weights, bias = one_dense()
    integer = quantized(content, noise(50, 8))
    graph = graph_of(integer)
    operator = graph.operators[0]
    x, w, b = (graph.tensors[i] for i in operator.inputs)
    assert (x.dtype, w.dtype, b.dtype) == ("int8", "int8", "int32")
    np.testing.assert_allclose(w.scales, np.abs(weights).max(axis=1) / 127, rtol=1e-6)
    assert set(w.zero_points) == {0}
    np.testing.assert_allclose(b.scales, np.array(w.scales) * x.scales[0], rtol=1e-6)
    interpreter = Interpreter(model_content=integer)
    interpreter.allocate_tensors()
    # half a step of each channel is all that rounding may cost
    stored = interpreter.get_tensor(w.index) * np.array(w.scales)[:, None]
    assert (np.abs(stored - weights) <= np.array(w.scales)[:, None] * 0.5 * (1 + 1e-5)).all()
    stored = interpreter.get_tensor(b.index) * np.array(b.scales)
    assert (np.abs(stored - bias) <= np.array(b.scales) * 0.5 * (1 + 1e-5)).all()


def test_the_int8_layer_computes_what_integer_arithmetic_by_hand_gives():
    content, _, _ = one_dense()
    integer = quantized(content, noise(50, 8))
    graph = graph_of(integer)
    x, w, b = (graph.tensors[i] for i in graph.operators[0].inputs)
    y = graph.tensors[graph.operators[0].outputs[0]]
    interpreter = Interpreter(model_content=integer)
    interpreter.allocate_tensors()
    weights, bias = interpreter.get_tensor(w.index), interpreter.get_tensor(b.index)
    for seed in range(20):
        stored = np.random.default_rng(seed).integers(-128, 128, (1, 8)).astype(np.int8)
        sums = (stored.astype(np.int64) - x.zero_points[0]) @ weights.T.astype(np.int64) + bias
        factors = x.scales[0] * np.array(w.scales) / y.scales[0]
        by_hand = np.clip(np.rint(sums * factors) + y.zero_points[0], -128, 127)
        for reference_kernels in (False, True):
            (got,) = run(integer, [stored], reference_kernels=reference_kernels)
            # kernels round a fixed-point factor: one step at most
            assert np.abs(got - by_hand).max() <= 1


def test_a_product_with_a_constant_matrix_is_computed_with_its_weights():
    """Of weights with a scale for each channel, LiteRT's BATCH_MATMUL would make zeros."""
    g = Graph()
    x = g.input("x", (1, 1, 8))
    w = g.const("w", noise(8, 6, seed=3))
    y = g.op("BATCH_MATMUL", [x, w], "y", (1, 1, 6), "BatchMatMulOptions")
    content, data = g.bytes([y]), noise(50, 1, 8)
    expected = np.concatenate([run(content, [row[None]])[0] for row in data])
    # 8 products, each off by half a step in 127 of a matrix and of 128 of an input: about 40 dB
    assert sqnr(expected, real_outputs(quantized(content, data), data)) > 30
    ranges = ops.collect_ranges(content, [[row[None]] for row in data], where="g").table()
    wide = make_precision(content, "int16x8", ranges=ranges, where="g")
    found = np.concatenate([run(wide, [row[None]])[0] for row in data])
    assert sqnr(expected, found) > 30


def test_a_graph_output_that_is_read_inside_is_read_as_integers():
    """litert-quantizer gives its reader the uint8 or float copy that is made for the outside."""
    g = Graph()
    hidden = g.dense(g.input("x", (1, 8)), noise(6, 8), noise(6), "hidden", (1, 6))
    y = g.dense(hidden, noise(4, 6), noise(4), "y", (1, 4))
    content, data = g.bytes([y, hidden]), noise(50, 8)
    expected = np.concatenate([run(content, [row[None]])[0] for row in data])
    ranges = ops.collect_ranges(content, [[row[None]] for row in data], where="g").table()
    wide = make_precision(content, "int16x8", ranges=ranges, where="g")
    for made in (quantized(content, data, input_dtype="float32", output_dtype="float32"), wide):
        assert sqnr(expected, np.concatenate([run(made, [row[None]])[0] for row in data])) > 30
    assert sqnr(expected, real_outputs(quantized(content, data), data)) > 30
    stored = run(quantized(content, data, output_dtype="uint8"), [np.zeros((1, 8), np.int8)])
    assert [array.dtype for array in stored] == [np.uint8, np.uint8]


@pytest.mark.parametrize("operator", ["dense", "conv", "depthwise", "transposed"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8])
def test_a_channel_of_dead_weights_keeps_its_bias(operator, size):
    """What batch normalisation with a factor near zero leaves of a channel: its bias alone."""
    g, bias = Graph(), 20 * noise(6, seed=5)
    shape = (1, 8) if operator == "dense" else (1, 4, 4, 6)
    x = g.input("x", shape)
    weights = {"dense": noise(6, 8), "depthwise": noise(1, 3, 3, 6)}.get(operator, noise(6, 3, 3, 6))  # fmt: skip
    weights[(..., 2) if operator == "depthwise" else 2] *= size
    if operator == "dense":
        y = g.dense(x, weights, bias, "y", (1, 6))
    elif operator == "conv":
        y = g.conv(x, weights, bias, "y", shape)
    else:
        w, b = g.const("w", weights), g.const("b", bias)
        strides = {"strideW": 1, "strideH": 1}
        if operator == "depthwise":
            y = g.op("DEPTHWISE_CONV_2D", [x, w, b], "y", shape, "DepthwiseConv2DOptions", depthMultiplier=1, **strides)  # fmt: skip
        else:
            to = g.const("to", np.array(shape, np.int32))
            y = g.op("TRANSPOSE_CONV", [to, w, x, b], "y", shape, "TransposeConvOptions", **strides)
    content, data = g.bytes([y]), noise(50, *shape[1:])
    integer = quantized(content, data)
    got, step = real_outputs(integer, data)[..., 2], graph_of(integer).tensors[y].scales[0]
    # half a step for the output, and one for the rounding of the kernel
    assert np.abs(got - bias[2]).max() < 1.5 * step


def test_a_layer_whose_input_is_always_zero_keeps_its_bias():
    """The first step of a recurrent cell: its state is zero, and what it gives is the bias."""
    g = Graph()
    x = g.input("x", (1, 8))
    zero = g.op("MUL", [x, g.const("none", np.zeros((1, 8), np.float32))], "zero", (1, 8), "MulOptions")  # fmt: skip
    state = g.dense(zero, noise(8, 8), noise(8, seed=2), "state", (1, 8))
    y = g.op("ADD", [x, state], "y", (1, 8), "AddOptions")
    content, data = g.bytes([y]), noise(50, 8)
    expected = np.concatenate([run(content, [row[None]])[0] for row in data])
    assert sqnr(expected, real_outputs(quantized(content, data), data)) > 30


@given(
    st.floats(-100, 100, width=32), st.floats(-100, 100, width=32),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_a_range_becomes_a_scale_that_covers_it_and_holds_zero_exactly(a, b, positions):
    low, high = sorted((a, b))
    if high - low < 1e-3:
        high = low + 1
    table = {"x": (low, high), "y": (2 * low + 1, 2 * high + 1)}
    graph = graph_of(ops.quantize(tiny_tflite(), table))
    x = graph.tensors[graph.inputs[0]]
    scale, zero_point = x.scales[0], x.zero_points[0]
    assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-5)
    assert -128 <= zero_point <= 127
    values = low + np.array(positions) * (high - low)
    stored = np.clip(np.rint(values / scale) + zero_point, -128, 127)
    # rounding the zero point may shift the covered range by half a step, on top of half for values
    assert np.abs((stored - zero_point) * scale - values).max() <= scale * (1 + 1e-4)


@given(st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8))
@settings(max_examples=25, deadline=None)
def test_quantising_and_dequantising_a_value_costs_half_a_step_at_most(values):
    from edgepipe.tflite_ops.run import dequantize, quantize

    detail = {"dtype": np.int8, "quantization": (8 / 255, -1), "name": "x"}
    array = np.array(values, np.float32)
    inside = (array >= (-128 + 1) * 8 / 255) & (array <= (127 + 1) * 8 / 255)
    error = np.abs(dequantize(quantize(array, detail), detail) - array)
    assert (error[inside] <= 4 / 255 + 4 * 2**-23).all()  # and the result is rounded to float32


def test_the_same_input_gives_the_same_file():
    assert quantized(small_cnn(), noise(20, 6, 6, 3)) == quantized(small_cnn(), noise(20, 6, 6, 3))


# --- doors


@pytest.mark.parametrize("door", ["input", "output", "both"])
def test_uint8_doors_are_the_int8_ones_shifted_by_128_exactly(door):
    data = noise(30, 6, 6, 3)
    base = quantized(small_cnn(), data)
    options = {f"{d}_dtype": "uint8" for d in ("input", "output") if door in (d, "both")}
    other = quantized(small_cnn(), data, **options)
    ours, theirs = graph_of(base), graph_of(other)
    assert describe_model(parse_model(other, where="m")).is_full_integer
    for side, shifted in (("inputs", "input_dtype"), ("outputs", "output_dtype")):
        a, b = (g.tensors[getattr(g, side)[0]] for g in (ours, theirs))
        is_shifted = shifted in options
        assert b.dtype == ("uint8" if is_shifted else "int8")
        assert b.scales == a.scales
        assert b.zero_points[0] == a.zero_points[0] + 128 * is_shifted
    for x in np.random.default_rng(3).integers(-128, 128, (20, 1, 6, 6, 3)).astype(np.int8):
        fed = (x.astype(np.int16) + 128).astype(np.uint8) if "input_dtype" in options else x
        (a,), (b,) = run(base, [x]), run(other, [fed])
        assert b.tolist() == (a.astype(np.int16) + 128 * ("output_dtype" in options)).tolist()


def test_float_doors_quantise_and_dequantise_with_the_same_scales():
    data = noise(30, 6, 6, 3)
    base = quantized(small_cnn(), data)
    other = quantized(small_cnn(), data, input_dtype="float32", output_dtype="float32")
    description = describe_model(parse_model(other, where="m"))
    assert [d.split()[0] for d in description.doors] == ["QUANTIZE", "DEQUANTIZE"]
    assert description.is_full_integer
    graph = graph_of(base)
    x, y = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    for sample in data[:10, None]:
        stored = np.clip(np.rint(sample / np.float32(x.scales[0])) + x.zero_points[0], -128, 127)
        (expected,) = run(base, [stored.astype(np.int8)])
        (got,) = run(other, [sample])
        assert got.dtype == np.float32
        exact = (expected.astype(np.float32) - y.zero_points[0]) * y.scales[0]
        np.testing.assert_allclose(got, exact, atol=y.scales[0] * 1e-3)


# --- fusing


@pytest.mark.parametrize("activation", ["RELU", "RELU6", "RELU_N1_TO_1"])
def test_a_loose_activation_behind_a_transpose_moves_into_the_convolution_exactly(activation):
    content = small_cnn(loose=activation)
    fused, lines = ops.fuse_activations(content, where="m")
    assert lines == (f"{activation} 'act' into CONV_2D",)
    graph = graph_of(fused)
    assert activation not in [o.name for o in graph.operators]
    used = {i for o in graph.operators for i in o.inputs + o.outputs}
    assert used == set(range(len(graph.tensors)))  # nothing is left over
    for x in noise(10, 1, 6, 6, 3):
        (before,), (after,) = run(content, [x]), run(fused, [x])
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("has_relu", [False, True])
def test_a_hard_sigmoid_becomes_an_exact_pair_of_clamps_with_an_int8_form(has_relu):
    g = Graph()
    x = g.input("x", (1, 8))
    before = g.op("RELU", [x], "before", (1, 8)) if has_relu else x
    slope = g.op("MUL", [before, g.const("sixth", np.full((1,), 1 / 6, np.float32))], "slope", (1, 8), "MulOptions")  # fmt: skip
    shifted = g.op("ADD", [slope, g.const("half", np.full((1,), 0.5, np.float32))], "shifted", (1, 8), "AddOptions")  # fmt: skip
    content = g.bytes([g.op("RELU_0_TO_1", [shifted], "y", (1, 8))])
    data = 3 * noise(50, 8)
    fused, lines = ops.fuse_activations(content, where="m")
    assert lines == ("RELU_0_TO_1 'y' into ADD",)
    expected = np.concatenate([run(content, [row[None]])[0] for row in data])
    assert expected.min() == (0.5 if has_relu else 0)
    assert expected.max() == 1
    np.testing.assert_array_equal(expected, np.concatenate([run(fused, [r[None]])[0] for r in data]))  # fmt: skip
    integer = quantized(content, data)
    assert ops.check_full_integer(integer) == []
    assert sqnr(expected, real_outputs(integer, data)) > 30


def test_an_activation_is_left_alone_where_its_input_is_used_elsewhere():
    g = Graph()
    x = g.input("x", (1, 4, 4, 2))
    c = g.conv(x, noise(2, 3, 3, 2), noise(2), "conv", (1, 4, 4, 2))
    a = g.op("RELU6", [c], "act", (1, 4, 4, 2))
    s = g.op("ADD", [a, c], "sum", (1, 4, 4, 2), "AddOptions")
    content = g.bytes([s])
    assert ops.fuse_activations(content, where="m") == (content, ())


def test_an_activation_is_left_alone_where_its_input_leaves_the_model_or_is_clamped_already():
    for fused, extra in ((schema.ActivationFunctionType.NONE, True), (schema.ActivationFunctionType.RELU, False)):  # fmt: skip
        g = Graph()
        x = g.input("x", (1, 4, 4, 2))
        c = g.conv(x, noise(2, 3, 3, 2), noise(2), "conv", (1, 4, 4, 2), fusedActivationFunction=fused)  # fmt: skip
        a = g.op("RELU6", [c], "act", (1, 4, 4, 2))
        content = g.bytes([a, c] if extra else [a])
        assert ops.fuse_activations(content, where="m") == (content, ())


def test_the_name_of_an_output_survives_fusing():
    g = Graph()
    x = g.input("x", (1, 4, 4, 2))
    c = g.conv(x, noise(2, 3, 3, 2), noise(2), "conv", (1, 4, 4, 2))
    content = g.bytes([g.op("RELU6", [c], "act", (1, 4, 4, 2))])
    fused, _ = ops.fuse_activations(content, where="m")
    model = parse_model(fused, where="m")
    assert model.subgraphs[0].tensors[model.subgraphs[0].outputs[0]].name == "act"
    assert list(model.signatures[0].outputs) == ["act"]
    np.testing.assert_array_equal(*(run(m, [noise(1, 4, 4, 2)])[0] for m in (content, fused)))


# --- islands


def test_an_operator_without_an_integer_form_is_refused_with_reason_and_advice():
    integer = quantized(small_cnn(loose="SIN"), noise(20, 6, 6, 3))
    with pytest.raises(StageError, match=r"DEQUANTIZE - SIN - QUANTIZE") as caught:
        ops.check_full_integer(integer, where="net.tflite")
    error = caught.value
    assert "net.tflite is not full-integer" in error.message
    assert "no int8 form of SIN" in error.message
    assert 'allow_float = ["SIN"]' in error.hint
    assert error.exit_code == 2
    lstm = ("UNIDIRECTIONAL_SEQUENCE_LSTM",)
    (record,) = ops.float_reasons([FloatIsland(0, (3,), ("DEQUANTIZE", *lstm), lstm, "h")])
    assert record["advice"] == f"{lstm[0]}: export the LSTM unrolled"


def test_an_island_may_stay_by_name_and_is_then_listed():
    integer = quantized(small_cnn(loose="SIN"), noise(20, 6, 6, 3))
    (island,) = ops.check_full_integer(integer, allow_float=("SIN",))
    assert island["operators"] == ["DEQUANTIZE", "SIN", "QUANTIZE"]
    assert "SIN" in island["reason"]
    # 180 values each: convolution, its transpose, the sign; 5 of the mean, 4 of the last layer
    assert island["elements_share"] == round(180 / (3 * 180 + 5 + 4), 4)
    assert island["macs_share"] == 0
    with pytest.raises(StageError):
        ops.check_full_integer(integer, allow_float=("RELU6",))


def test_a_float_model_is_no_full_integer_model():
    with pytest.raises(StageError, match="CONV_2D"):
        ops.check_full_integer(small_cnn())


@pytest.mark.parametrize("name", sorted(ops._ADVICE))
def test_advice_is_given_only_for_operators_that_need_it(name):
    assert name not in ops.integer_operators()


def test_an_int8_model_is_not_quantised_again():
    integer = quantized(small_cnn(), noise(20, 6, 6, 3))
    with pytest.raises(StageError, match="quantized already"):
        ops.check_quantizable(parse_model(integer, where="m"), where="m.tflite")


def test_missing_ranges_are_an_error_of_the_stage():
    with pytest.raises(StageError, match="litert-quantizer cannot quantise net"):
        ops.quantize(small_cnn(loose="RELU"), {}, where="net")


# --- departures


def test_departures_finds_the_tensor_whose_range_was_wrong():
    content, _ = ops.fuse_activations(small_cnn(), where="m")
    data = noise(20, 6, 6, 3)
    table = ops.collect_ranges(content, [[x[None]] for x in data], where="m").table()
    table["mean"] = (0.0, 0.01)  # clips
    rows = ops.departures(content, ops.quantize(content, table), [[x[None]] for x in data[:4]])
    assert [name for name, _, _ in rows] == ["conv", "act", "mean", "y"]
    below = [name for name, _, sqnr in rows if sqnr < 20]
    assert below[0] == "mean"


def test_zeros_that_stay_zeros_do_not_depart():
    g = Graph()
    x = g.input("x", (1, 4))
    zero = g.op("MUL", [x, g.const("none", np.zeros((1, 4), np.float32))], "zero", (1, 4), "MulOptions")  # fmt: skip
    content = g.bytes([g.op("ADD", [x, zero], "y", (1, 4), "AddOptions")])
    data = noise(20, 4)
    rows = ops.departures(content, quantized(content, data), [[x[None]] for x in data])
    assert rows[0] == ("zero", "MUL", 200.0)


def test_a_file_of_more_than_256_kib_keeps_its_weights_inside_and_computes_the_same(monkeypatch):
    """litert-quantizer puts them behind the flatbuffer, where old runtimes do not look."""
    rng = np.random.default_rng(0)
    g = Graph()
    x = g.input("x", (1, 512))
    weights, bias = rng.normal(size=(600, 512)).astype(np.float32), np.zeros(600, np.float32)
    content, data = g.bytes([g.dense(x, weights, bias, "y", (1, 600))]), noise(4, 512)
    made = quantized(content, data)
    monkeypatch.setattr(ops, "inline_buffers", bytes)
    behind = quantized(content, data)

    def offsets(file):
        model = schema.Model.GetRootAs(file, 0)
        return [model.Buffers(i).Offset() for i in range(model.BuffersLength())]

    assert max(offsets(behind)) > 1
    assert max(offsets(made)) == 0
    batch = [rng.integers(-128, 128, (1, 512)).astype(np.int8)]
    assert np.array_equal(run(made, batch)[0], run(behind, batch)[0])
    assert parse_model(made, where="m").subgraphs == parse_model(behind, where="m").subgraphs


def test_a_mask_of_minus_infinity_is_an_error_and_not_the_end_of_the_process():
    g = Graph()
    x = g.input("x", (1, 8))
    mask = np.where(np.arange(8) < 4, 0, np.finfo(np.float32).min).astype(np.float32)[None]
    content = g.bytes([g.op("ADD", [x, g.const("mask", mask)], "y", (1, 8), "AddOptions")])
    with pytest.raises(StageError) as caught:
        quantized(content, np.ones((2, 8), np.float32))
    assert caught.value.code == "infinite-range"
    assert "'mask' (read by ADD)" in caught.value.message
    assert "-100" in caught.value.hint


@pytest.mark.parametrize("value", [np.finfo(np.float32).min, -np.inf, -5.0])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_a_maximum_pool_with_padding_is_quantised_within_half_a_step(shape, value):
    g = Graph()
    x = g.input("x", (1, 4, 4, 2))
    pads = g.const("pads", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    padded = g.op("PADV2", [x, pads, g.const("value", np.full(shape, value, np.float32))], "padded", (1, 6, 6, 2), "PadV2Options")  # fmt: skip
    y = g.op("MAX_POOL_2D", [padded], "y", (1, 2, 2, 2), "Pool2DOptions", strideW=2, strideH=2, filterWidth=3, filterHeight=3, padding=1)  # fmt: skip
    data = noise(8, 4, 4, 2)
    content = g.bytes([y])
    made = quantized(content, data, input_dtype="float32", output_dtype="float32")
    steps = [t.scales[0] for t in graph_of(made).tensors if t.scales and not t.is_constant]
    for sample in data:
        error = np.abs(run(made, [sample[None]])[0] - run(content, [sample[None]])[0]).max()
        assert error <= sum(steps) / 2 * 1.001  # one rounding at the door, one in each operator


@pytest.mark.parametrize(
    ("kind", "dtype", "shift"),
    [("ADD", "int8", 20), ("SUB", "int8", 20), ("ADD", "int16", 15), ("SQUARED_DIFFERENCE", "int8", 14)],
)  # fmt: skip
def test_a_small_sum_of_large_values_has_a_scale_that_kernels_take(kind, dtype, shift):
    """LiteRT ends the process on others: columns of unlike size, standardised inside the model."""
    g = Graph()
    x = g.input("x", (1, 4))
    mean = g.const("mean", np.full(4, -1e7 if kind == "ADD" else 1e7, np.float32))
    options = {"ADD": "AddOptions", "SUB": "SubOptions"}.get(kind, "")
    y = g.op(kind, [x, mean], "y", (1, 4), options, **({"potScaleInt16": False} if options else {}))
    data = [np.array([1e7, 1e7 + 1, 1e7 + 2, 1e7 + i], np.float32) for i in range(8)]
    int8 = quantized(g.bytes([y]), data, precision={"y": "int16"} if dtype == "int16" else {}, output_dtype="float32")  # fmt: skip
    graph = graph_of(int8)
    (sum_,) = (o for o in graph.operators if o.name == kind)
    scales = [graph.tensors[i].scales[0] for i in (*sum_.inputs, *sum_.outputs)]
    assert graph.tensors[sum_.outputs[0]].dtype == dtype
    twice = (2 * max(scales[:2])) ** (2 if kind == "SQUARED_DIFFERENCE" else 1)
    assert twice / 2**shift / scales[2] < 1
    run(int8, [data[0][None].astype(np.int8)])  # lives


def test_a_number_that_limits_one_tensor_and_is_added_to_another_serves_both():
    """onnx2tf writes equal constants once; litert-quantizer takes those of MAXIMUM and SELECT_V2 as () only."""
    g = Graph()
    x = g.input("x", (1, 2, 3))
    half = g.const("half", np.array([0.5], np.float32))
    above = g.op("MAXIMUM", [x, half], "above", (1, 2, 3), "MaximumMinimumOptions")
    more = g.op("ADD", [above, half], "more", (1, 2, 3), "AddOptions")
    mask = np.arange(6).reshape(1, 2, 3) % 2 == 0
    where = g.tensor("mask", mask.shape, data=mask, dtype="BOOL")
    y = g.op("SELECT_V2", [where, half, more], "y", (1, 2, 3), "SelectV2Options")
    data = noise(8, 2, 3)
    int8 = quantized(g.bytes([y]), data)
    selected = next(o for o in graph_of(int8).operators if o.name == "SELECT_V2")
    assert graph_of(int8).tensors[selected.inputs[1]].shape == ()
    (shared,) = (o for o in graph_of(int8).operators if o.name == "ADD")
    assert graph_of(int8).tensors[shared.inputs[1]].shape == (1,)
    expected = np.where(mask, 0.5, np.maximum(data, 0.5) + 0.5)
    np.testing.assert_allclose(real_outputs(int8, data), expected, atol=0.03)


def test_a_bias_survives_where_another_layer_shares_the_weights():
    """As the levels of a detector's head do: the range of a flat channel is that of the largest bias."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.3, (4, 8)).astype(np.float32)
    weights[1] = 1e-12
    g = Graph()
    inputs = [g.input(name, (1, 8)) for name in ("x", "z")]
    shared = g.const("w", weights)
    outputs = []
    for name, x, bias in zip("ab", inputs, (5.0, 0.1), strict=True):
        values = g.const(f"bias_{name}", np.array([0, bias, 0, 0], np.float32))
        outputs.append(g.op("FULLY_CONNECTED", [x, shared, values], name, (1, 4), "FullyConnectedOptions"))  # fmt: skip
    content = g.bytes(outputs)
    samples = rng.normal(size=(20, 2, 1, 8)).astype(np.float32)
    ranges = ops.collect_ranges(content, samples, where="m").table()
    int8 = ops.quantize(content, ranges, input_dtype="float32", output_dtype="float32")
    for sample in samples:
        for found, wanted in zip(run(int8, sample), run(content, sample), strict=True):
            np.testing.assert_allclose(found, wanted, atol=0.1)


@pytest.mark.parametrize("tiny", [1e-12, 1e-18, 1e-20, 1e-30, 1e-42])
def test_a_layer_that_died_in_training_does_not_take_those_behind_it_along(tiny):
    rng = np.random.default_rng(0)
    g = Graph()
    x = g.input("x", (1, 8))
    dying = (rng.normal(0, 0.3, (6, 8)) * tiny).astype(np.float32)
    h = g.dense(x, dying, np.zeros(6, np.float32), "h", (1, 6))
    bias = np.array([1, -2, 0.5, 3], np.float32)
    y = g.dense(h, rng.normal(0, 0.3, (4, 6)).astype(np.float32), bias, "y", (1, 4))
    content = g.bytes([y])
    samples = rng.normal(size=(20, 1, 1, 8)).astype(np.float32)
    ranges = ops.collect_ranges(content, samples, where="m").table()
    int8 = ops.quantize(content, ranges, input_dtype="float32", output_dtype="float32")
    np.testing.assert_allclose(run(int8, samples[0])[0][0], bias, atol=5 / 255)
