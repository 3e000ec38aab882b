"""Operators written with others: the same float outputs, no float island, int8 as good or better."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.errors import StageError
from edgepipe.tflite_ops import quantize as ops
from edgepipe.tflite_ops.equalise import check_unchanged
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import describe_model
from edgepipe.tflite_ops.rewrite import rewrite, spell_out
from tests.unit.test_quantize import real_outputs, run, sqnr
from tests.unit.tflite_builder import Graph

INT32 = 2


def operators(content):
    return [o.name for o in parse_model(content, where="m").subgraphs[0].operators]


def scalar(g, value):
    return g.const(f"c{len(g.tensors)}", np.array(value, np.float32))


def chain(g, x, shape, *steps):
    """Each step: (operator, other input or None); a number stands for a constant, a str for "first" x."""
    y = x
    for kind, other in steps:
        inputs = [y] if other is None else [y, other if isinstance(other, int) else scalar(g, other)]  # fmt: skip
        options = {"ADD": "AddOptions", "MUL": "MulOptions", "SUB": "SubOptions", "DIV": "DivOptions"}.get(kind)  # fmt: skip
        y = g.op(kind, inputs, f"t{len(g.tensors)}", shape, options)
    return y


# --- one operator


def power(exponent):
    return lambda g, x, shape: g.op("POW", [x, scalar(g, exponent)], "y", shape)


def squeezed(g, x, shape):
    wide = g.op("EXPAND_DIMS", [x, g.const("axis", np.array([1], np.int32))], "wide", (shape[0], 1, *shape[1:]), "ExpandDimsOptions")  # fmt: skip
    return g.op("SQUEEZE", [wide], "y", shape, "SqueezeOptions", squeezeDims=[1])


def tiled(g, x, shape):
    copies = g.const("copies", np.array([1, 2, 3], np.int32))
    return g.op("TILE", [x, copies], "y", (1, 2 * shape[1], 3 * shape[2]))


def normalised(g, x, shape):
    """Layer normalisation over the last axis, as exporters spell it."""
    axes, mean_shape = g.const("axes", np.array([2], np.int32)), (*shape[:2], 1)
    mean = g.op("MEAN", [x, axes], "mean", mean_shape, "ReducerOptions", keepDims=True)
    centred = g.op("SUB", [x, mean], "centred", shape, "SubOptions")
    squared = g.op("SQUARE", [centred], "squared", shape)
    variance = g.op("MEAN", [squared, axes], "variance", mean_shape, "ReducerOptions", keepDims=True)  # fmt: skip
    root = chain(g, variance, mean_shape, ("ADD", 1e-5), ("SQRT", None))
    return g.op("DIV", [centred, root], "y", shape, "DivOptions")


def condition(g, x, shape):
    above = g.op("GREATER", [x, scalar(g, 0.25)], "above", shape)
    g.tensors[above].type = 6  # bool
    return g.op("CAST", [above], "y", shape, "CastOptions", inDataType=6, outDataType=0)


def split(g, x, shape):
    first = shape[2] // 2 + 1
    sizes = g.const("sizes", np.array([first, shape[2] - first], np.int32))
    axis = g.const("axis", np.array(-1, np.int32))
    one = g.op("SPLIT_V", [x, sizes, axis], "one", (*shape[:2], first), "SplitVOptions", numSplits=2)  # fmt: skip
    two = g.tensor("two", (*shape[:2], shape[2] - first))
    g.operators[-1].outputs = [one, two]
    return g.op("CONCATENATION", [two, one], "y", shape, "ConcatenationOptions", axis=2)


def backwards(g, x, shape):
    return g.op("REVERSE_V2", [x, g.const("axes", np.array([2, 1], np.int32))], "y", shape)


def signs(g, x, shape):
    return g.op("SIGN", [chain(g, x, shape, ("SUB", 1.0))], "y", shape)


def asks_shape(g, x, shape):
    found = g.op("SHAPE", [x], "found", (3,), "ShapeOptions", outType=INT32)
    g.tensors[found].type = INT32
    return g.op("RESHAPE", [chain(g, x, shape, ("MUL", 2.0)), found], "y", shape)


CASES = {
    "ADD_N": lambda g, x, s: g.op("ADD_N", [x, x, x], "y", s),
    "CAST": condition,
    "DIV": lambda g, x, s: g.op("DIV", [x, g.const("d", np.linspace(0.5, 9, s[2], dtype=np.float32))], "y", s, "DivOptions"),
    "EXPAND_DIMS": squeezed,
    "NEG": lambda g, x, s: g.op("NEG", [x], "y", s),
    "POW -0.5": power(-0.5),
    "POW 0.25": power(0.25),
    "POW 0.75": power(0.75),
    "POW 2": power(2.0),
    "POW 3.5": power(3.5),
    "REVERSE_V2": backwards,
    "SHAPE": asks_shape,
    "SIGN": signs,
    "SPLIT_V": split,
    "SQUARE": normalised,
    "TILE": tiled,
}  # fmt: skip


def built(case, shape):
    g = Graph()
    return g.bytes([CASES[case](g, g.input("x", shape), shape)])


@pytest.mark.parametrize("case", sorted(CASES))
@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_outputs_and_their_name_stay_and_nothing_is_left_in_float(case, rows, columns, seed):
    shape = (1, rows, columns)
    content = built(case, shape)
    made, told = rewrite(content, where="m")
    kind = case.split()[0]
    assert kind not in operators(made)
    assert any(line.startswith(kind) for line in told)
    samples = np.random.default_rng(seed).uniform(0.05, 2, (9, *shape)).astype(np.float32)
    for x in samples:
        (before,), (after,) = run(content, [x]), run(made, [x])
        np.testing.assert_allclose(after, before, rtol=2e-5, atol=1e-5)
    graph = parse_model(made, where="m").subgraphs[0]
    assert graph.tensors[graph.outputs[0]].name == "y"
    table = ops.collect_ranges(made, [[x] for x in samples], where="m").table()
    int8 = ops.quantize(made, table)
    assert not describe_model(parse_model(int8, where="m")).float_islands


def test_a_file_without_such_operators_is_not_touched():
    g = Graph()
    content = g.bytes([chain(g, g.input("x", (1, 4)), (1, 4), ("MUL", 2.0), ("TANH", None))])
    assert rewrite(content, where="m") == (content, ())


def test_powers_and_divisors_that_have_no_such_form_stay():
    for case in (power(1.3), power(-2.0), power(7.0)):
        g = Graph()
        content = g.bytes([case(g, g.input("x", (1, 2, 3)), (1, 2, 3))])
        assert rewrite(content, where="m") == (content, ())
    g = Graph()
    x = g.input("x", (1, 2))
    zero = g.const("zero", np.array([1.0, 0.0], np.float32))
    content = g.bytes([g.op("DIV", [x, zero], "y", (1, 2), "DivOptions")])
    assert rewrite(content, where="m") == (content, ())


def test_a_rewriting_that_changes_outputs_is_refused():
    before, after = built("POW 2", (1, 2, 3)), built("POW 0.75", (1, 2, 3))
    with pytest.raises(StageError, match=r"rewriting m changed its outputs") as caught:
        check_unchanged(before, after, [[np.full((1, 2, 3), 2, np.float32)]], where="m", hint="x")
    assert caught.value.code == "parity"


# --- functions spelt out


def erf_gelu(g, x, shape):
    """x / 2 * (1 + erf(x / sqrt 2)) with erf by Abramowitz and Stegun 7.1.26, as onnx2tf writes it."""
    z = chain(g, x, shape, ("MUL", 0.7071067811865476))
    sign, size = g.op("SIGN", [z], "sign", shape), g.op("ABS", [z], "size", shape)
    below = chain(g, size, shape, ("MUL", 0.3275911), ("ADD", 1.0))
    t = g.op("DIV", [scalar(g, 1.0), below], "t", shape, "DivOptions")
    p = chain(
        g, t, shape, ("MUL", 1.061405429), ("ADD", -1.453152027), ("MUL", t), ("ADD", 1.421413741),
        ("MUL", t), ("ADD", -0.284496736), ("MUL", t), ("ADD", 0.254829592), ("MUL", t),
    )  # fmt: skip
    bell = chain(g, size, shape, ("MUL", size), ("NEG", None), ("EXP", None), ("MUL", p))
    erf = g.op("SUB", [scalar(g, 1.0), bell], "one_less", shape, "SubOptions")
    return chain(g, erf, shape, ("MUL", sign), ("ADD", 1.0), ("MUL", x), ("MUL", 0.5))


def tanh_gelu(g, x, shape):
    cube = chain(g, x, shape, ("MUL", x), ("MUL", x), ("MUL", 0.044715), ("ADD", x))
    return chain(g, cube, shape, ("MUL", 0.7978845608), ("TANH", None), ("ADD", 1.0), ("MUL", x), ("MUL", 0.5))  # fmt: skip


def softplus(g, x, shape):
    return chain(g, x, shape, ("EXP", None), ("ADD", 1.0), ("LOG", None))


def mish(g, x, shape):
    return chain(g, softplus(g, x, shape), shape, ("TANH", None), ("MUL", x))


def hard_swish(g, x, shape):
    return chain(g, x, shape, ("ADD", 3.0), ("RELU6", None), ("MUL", x), ("MUL", 1 / 6))


SPELT = {"GELU": erf_gelu, "GELU (tanh)": tanh_gelu, "HARD_SWISH": hard_swish, "mish": mish, "softplus": softplus}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SPELT))
def test_a_function_that_was_spelt_out_is_found_and_int8_does_not_lose_by_it(name):
    shape = (1, 6, 8)
    g = Graph()
    before_it = chain(g, g.input("x", shape), shape, ("MUL", 2.0))
    content = g.bytes([chain(g, SPELT[name](g, before_it, shape), shape, ("ADD", 0.5))])
    made, told = rewrite(content, where="m")
    assert len(told) == 1
    assert told[0].startswith(f"{name} ")
    samples = np.random.default_rng(0).normal(0, 1.5, (40, *shape)).astype(np.float32)
    batches = [[x] for x in samples]
    assert check_unchanged(content, made, batches, where="m") < 1e-4
    found = {}
    wanted = np.concatenate([run(content, [x])[0] for x in samples])
    for label, file in (("before", content), ("after", made)):
        table = ops.collect_ranges(file, batches, where="m").table()
        int8 = ops.quantize(file, table)
        if label == "after":
            assert not describe_model(parse_model(int8, where="m")).float_islands
        found[label] = sqnr(wanted, real_outputs(int8, samples[:, 0]).reshape(wanted.shape))
    assert found["after"] > max(found["before"] - 0.5, 30)


def test_a_function_that_is_only_near_is_left_alone():
    """x * sigmoid(1.702 x) is called an approximation of GELU; it is off by 0.02."""
    g = Graph()
    x = g.input("x", (1, 4))
    y = chain(g, x, (1, 4), ("MUL", 1.702), ("LOGISTIC", None), ("MUL", x))
    content = g.bytes([y])
    assert rewrite(content, where="m") == (content, ())


def test_what_else_reads_the_middle_of_a_function_still_gets_it():
    g = Graph()
    x = g.input("x", (1, 4))
    inner = softplus(g, x, (1, 4))
    content = g.bytes([chain(g, inner, (1, 4), ("TANH", None), ("MUL", x)), inner])
    made, told = rewrite(content, where="m")
    assert told
    sample = np.linspace(-4, 4, 4, dtype=np.float32)[None]
    for before, after in zip(run(content, [sample]), run(made, [sample]), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def volume(*, depth, taps, step, spacing, padding, bias, seed):
    """CONV_3D of (1, depth, 7, 6, 2) to 3 channels, its steps and spacings over the picture 1 or 2."""
    across = (2, 1) if spacing == 1 else (1, 2)
    rng = np.random.default_rng(seed)
    seen = [depth - (taps - 1) * spacing, 7 - 2 * across[1], 6 - across[1]]
    steps = (step, across[0], across[0])
    if padding == "SAME":
        seen = [depth, 7, 6]
    out = (1, *(-(-n // s) for n, s in zip(seen, steps, strict=True)), 3)
    g = Graph()
    x = g.input("x", (1, depth, 7, 6, 2))
    inputs = [x, g.const("w", rng.normal(0, 0.3, (taps, 3, 2, 2, 3)).astype(np.float32))]
    inputs += [g.const("b", rng.normal(0, 1, 3).astype(np.float32))] * bias
    y = g.op(
        "CONV_3D", inputs, "y", out, "Conv3DOptions", padding=["SAME", "VALID"].index(padding),
        strideD=step, strideH=across[0], strideW=across[0],
        dilationDFactor=spacing, dilationHFactor=across[1], dilationWFactor=across[1],
        fusedActivationFunction=1,
    )  # fmt: skip
    samples = [rng.normal(0, 1, (1, depth, 7, 6, 2)).astype(np.float32) for _ in range(6)]
    return g.bytes([y]), samples


@settings(max_examples=12, deadline=None)
@given(
    depth=st.integers(5, 8), taps=st.integers(1, 3), step=st.integers(1, 2), spacing=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID"]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_convolution_of_volumes_is_one_of_pictures(**case):
    content, samples = volume(**case)
    made, told = rewrite(content, where="m")
    assert len(told) == 1
    assert "CONV_3D" not in operators(made)
    for x in samples:
        np.testing.assert_allclose(run(made, [x])[0], run(content, [x])[0], rtol=1e-5, atol=1e-5)
    table = ops.collect_ranges(made, [[x] for x in samples], where="m").table()
    int8 = ops.quantize(made, table, input_dtype="float32", output_dtype="float32")
    assert not describe_model(parse_model(int8, where="m")).float_islands
    expected = np.concatenate([run(content, [x])[0] for x in samples])
    assert sqnr(expected, np.concatenate([run(int8, [x])[0] for x in samples])) > 28


def test_signs_survive_int8():
    g = Graph()
    x = g.input("x", (1, 3, 4))
    content = g.bytes([g.op("SIGN", [x], "y", (1, 3, 4))])
    made, _ = rewrite(content, where="m")
    values = np.array([-3, -1, -0.5, 0, 0.25, 2, 3, 1, -2, 0, 1.5, -0.1], np.float32).reshape(1, 3, 4)  # fmt: skip
    int8 = ops.quantize(made, ops.collect_ranges(made, [[values]], where="m").table())
    found = real_outputs(int8, values)
    np.testing.assert_allclose(np.ravel(found), np.sign(values).ravel(), atol=1 / 127)


# --- for 16 bits


def small_beside_large(g, x):
    """Hard swish of values up to 50, then what stays of it below 0, where 8 bits have two steps."""
    swish = g.op("HARD_SWISH", [x], "swish", (1, 40), "HardSwishOptions")
    negative = g.op("MUL", [swish, scalar(g, -1.0)], "negative", (1, 40), "MulOptions")
    return g.op("RELU", [negative], "y", (1, 40))


def test_hard_swish_is_spelt_out_where_it_is_to_compute_in_16_bits():
    g = Graph()
    content = g.bytes([small_beside_large(g, g.input("x", (1, 40)))])
    rng = np.random.default_rng(5)
    samples = [rng.uniform(-4, 50, (1, 40)).astype(np.float32) for _ in range(20)]
    samples += [rng.uniform(-4, 1, (1, 40)).astype(np.float32) for _ in range(20)]
    assert spell_out(content, ["another"], {}, where="m") == (content, {})
    made, new = spell_out(content, ["swish"], {}, where="m")
    check_unchanged(content, made, [[x] for x in samples], where="m")
    assert "HARD_SWISH" not in operators(made)
    table = ops.collect_ranges(made, [[x] for x in samples], where="m").table()
    for name, (low, high) in new.items():
        assert low <= table[name][0] <= table[name][1] <= high
    wide = dict.fromkeys([*new, "swish", "negative", "y"], "int16")
    for file, precision, least, most in ((content, {}, -99, 20), (made, wide, 45, 99)):
        int8 = ops.quantize(file, {**table, **new}, precision=precision, input_dtype="float32", output_dtype="float32")  # fmt: skip
        assert not describe_model(parse_model(int8, where="m")).float_islands
        expected = np.concatenate([run(content, [x])[0] for x in samples])
        found = np.concatenate([run(int8, [x])[0] for x in samples])
        assert least < sqnr(expected, found) < most


def test_squared_difference_is_spelt_out_where_it_is_to_compute_in_16_bits():
    # what a layer norm takes the variance from, where one channel is ten times the others
    g = Graph()
    x = g.input("x", (1, 4, 16))
    square = g.op("SQUARED_DIFFERENCE", [x, scalar(g, 0.5)], "square", (1, 4, 16))
    content = g.bytes([square])
    gain = np.where(np.arange(16) == 3, 10, 1)
    batches = [[(np.random.default_rng(i).normal(size=(1, 4, 16)) * gain).astype(np.float32)] for i in range(20)]  # fmt: skip
    table = ops.collect_ranges(content, batches, where="m").table()
    made, new = spell_out(content, ["square"], table, where="m")
    check_unchanged(content, made, batches, where="m")
    seen = ops.collect_ranges(made, batches, where="m").table()
    for name, ends in new.items():  # float32 rounds the square
        assert max(map(abs, seen[name])) == pytest.approx(ends[1], rel=1e-6)
    noise = []
    for file, precision in ((content, {}), (made, dict.fromkeys([*new, "square"], "int16"))):
        int8 = ops.quantize(file, {**table, **new}, precision=precision, input_dtype="float32", output_dtype="float32")  # fmt: skip
        small = np.arange(16) != 3
        expected = np.concatenate([run(content, b)[0] for b in batches])[..., small]
        noise.append(sqnr(expected, np.concatenate([run(int8, b)[0] for b in batches])[..., small]))
    assert noise[0] < 10
    assert noise[1] > 35


def test_a_reciprocal_root_of_values_of_unlike_size_is_taken_in_pieces_in_16_bits():
    g = Graph()
    content = g.bytes([g.op("RSQRT", [g.input("v", (1, 8))], "y", (1, 8))])
    # the variances of tokens, one of which is a thousand times the others
    batches = [[np.geomspace(0.5 + i / 10, 800 - i, 8, dtype=np.float32)[None]] for i in range(20)]
    table = ops.collect_ranges(content, batches, where="m").table()
    made, new = spell_out(content, ["y"], table, where="m")
    check_unchanged(content, made, batches, where="m")
    # also beyond what calibration saw
    check_unchanged(content, made, [[np.geomspace(0.01, 1e5, 8, dtype=np.float32)[None]]], where="m")  # fmt: skip
    seen = ops.collect_ranges(made, batches, where="m").table()
    for name, (low, high) in new.items():
        assert low <= seen[name][0] + 1e-6
        assert seen[name][1] <= high * 1.001
    found = []
    for file in (content, made):
        wide = dict.fromkeys([*new, "y"], "int16")
        int8 = ops.quantize(file, {**table, **new}, precision=wide, input_dtype="float32", output_dtype="float32")  # fmt: skip
        expected = np.concatenate([run(content, b)[0] for b in batches])
        found.append(sqnr(expected, np.concatenate([run(int8, b)[0] for b in batches])))
    assert found[0] < 20
    assert found[1] > 35
    # results that are alike need no pieces
    assert spell_out(content, ["y"], {"y": (0.5, 1.0)}, where="m") == (content, {})
    assert spell_out(content, ["y"], {}, where="m") == (content, {})


def test_a_condition_is_repeated_along_two_axes():
    g = Graph()
    x = g.input("x", (1, 1, 4))
    above = g.op("GREATER", [x, scalar(g, 0.0)], "above", (1, 1, 4))
    copies = g.const("copies", np.array([2, 3, 1], np.int32))
    many = g.op("TILE", [above, copies], "many", (2, 3, 4))
    g.tensors[above].type = g.tensors[many].type = 6  # bool
    content = g.bytes([g.op("SELECT_V2", [many, x, scalar(g, 0.0)], "y", (2, 3, 4))])
    changed, told = rewrite(content, where="m")
    assert len(told) == 1
    batch = [np.array([[[-1, 2, -3, 4]]], np.float32)]
    np.testing.assert_array_equal(run(changed, batch)[0], run(content, batch)[0])


def test_a_function_of_whole_numbers_begins_behind_their_cast():
    g = Graph()
    x = g.tensor("x", (1, 8), dtype="INT32")
    g.inputs.append(x)
    number = g.op("CAST", [x], "number", (1, 8), "CastOptions", inDataType=2, outDataType=0)
    y = chain(g, number, (1, 8), ("EXP", None), ("ADD", 1.0), ("LOG", None))
    content = g.bytes([y])
    changed, told = rewrite(content, where="m")
    assert told == (f"softplus 't{y}': found in 3 operators",)
    batch = [np.arange(-4, 4, dtype=np.int32)[None]]
    np.testing.assert_allclose(run(changed, batch)[0], run(content, batch)[0], atol=1e-6)
