"""Operators that litert-quantizer leaves in float get their int8 kernel: against numpy."""

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from edgepipe.tflite_ops import quantize as ops
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import describe_model
from edgepipe.tflite_ops.stand_in import STAND_INS
from tests.unit.test_quantize import run
from tests.unit.tflite_builder import Graph

SLOPES = np.linspace(-0.5, 1.5, 4).astype(np.float32)


def depth_to_space(x):
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)  # fmt: skip


REFERENCES = {
    "ABS": np.abs,
    "DEPTH_TO_SPACE": depth_to_space,
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
    "EXP": np.exp,
    "L2_NORMALIZATION": lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True)),
    "LEAKY_RELU": lambda x: np.where(x > 0, x, 0.1 * x),
    "LOG": lambda x: np.log(np.maximum(x, 1e-3)),
    "LOG_SOFTMAX": lambda x: log_softmax(x, axis=-1),
    "MINIMUM": lambda x: np.minimum(x, 0.5),
    "PRELU": lambda x: np.where(x > 0, x, SLOPES * x),
    "REDUCE_MAX": lambda x: x.max(axis=(1, 2)),
    "RELU6": lambda x: x.clip(0, 6),
    "RELU_0_TO_1": lambda x: x.clip(0, 1),
    "RELU_N1_TO_1": lambda x: x.clip(-1, 1),
}
OPTIONS = {
    "DEPTH_TO_SPACE": {"options": "DepthToSpaceOptions", "blockSize": 2},
    "L2_NORMALIZATION": {"options": "L2NormOptions"},
    "LEAKY_RELU": {"options": "LeakyReluOptions", "alpha": 0.1},
    "LOG_SOFTMAX": {"options": "LogSoftmaxOptions"},
    "MINIMUM": {"options": "MaximumMinimumOptions"},
    "REDUCE_MAX": {"options": "ReducerOptions", "keepDims": False},
}


COMPARISONS = {
    "GREATER": np.greater,
    "GREATER_EQUAL": np.greater_equal,
    "LESS": np.less,
    "LESS_EQUAL": np.less_equal,
}


def one_operator(name, shape):
    g = Graph()
    x = g.input("x", shape)
    more = {
        "PRELU": lambda: [g.const("slopes", SLOPES.reshape(1, 1, 4))],
        "MINIMUM": lambda: [g.const("limit", np.array(0.5, np.float32))],
        "REDUCE_MAX": lambda: [g.const("axes", np.array([1, 2], np.int32))],
    }.get(name, list)()
    n, h, w, c = shape
    made = {"DEPTH_TO_SPACE": (n, 2 * h, 2 * w, c // 4), "REDUCE_MAX": (n, c)}.get(name, shape)
    return g.bytes([g.op(name, [x, *more], "y", made, **OPTIONS.get(name, {}))])


def quantised(content, samples):
    table = ops.collect_ranges(content, [[x] for x in samples], where="m").table()
    return ops.quantize(content, table)


@pytest.mark.parametrize("name", sorted(STAND_INS.keys() - COMPARISONS.keys()))
@settings(max_examples=3, deadline=None)
@given(side=st.integers(1, 5), spread=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 99))
def test_the_int8_operator_is_the_real_one_of_its_stored_input(name, side, spread, seed):
    """From the integers that go in: one step off at most, for a table or a product that is rounded."""
    rng = np.random.default_rng(seed)
    shape = (1, side, side + 1, 4)
    samples = rng.normal(0, spread, (6, *shape)).astype(np.float32)
    if name == "LOG":
        samples = np.abs(samples) + 0.05
    int8 = quantised(one_operator(name, shape), samples)
    graph = parse_model(int8, where="m").subgraphs[0]
    # operators of one scale for input and output are handed an input of the output's
    assert [o.name for o in graph.operators if o.name != "QUANTIZE"] == [name]
    assert not describe_model(parse_model(int8, where="m")).float_islands
    x, y = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    for sample in samples:
        stored = np.clip(np.rint(sample / x.scales[0]) + x.zero_points[0], -128, 127)
        real = (stored - x.zero_points[0]) * x.scales[0]
        if name == "LOG":  # a kernel has its own idea of the logarithm of 0
            real = np.maximum(real, x.scales[0])
            stored = np.rint(real / x.scales[0]) + x.zero_points[0]
        wanted = np.clip(np.rint(REFERENCES[name](real) / y.scales[0]) + y.zero_points[0], -128, 127)  # fmt: skip
        (got,) = run(int8, [stored.astype(np.int8)])
        # PRELU's slopes are stored in 8 bits: an error of half a step of up to 1.5 / 127
        slack = np.abs(real).max() * 1.5 / 254 / y.scales[0] if name == "PRELU" else 0
        if name == "L2_NORMALIZATION":
            slack = 1  # its integer square root
        slack += len(graph.operators) - 1  # a step for being rounded twice
        assert np.abs(got.astype(int) - wanted).max() <= 1 + slack


def test_every_option_survives_and_operators_of_one_kind_keep_their_own():
    g = Graph()
    x = y = g.input("x", (1, 4))
    for number, slope in enumerate((0.1, 0.2, 0.3)):
        y = g.op("LEAKY_RELU", [y], f"y{number}", (1, 4), "LeakyReluOptions", alpha=slope)
    samples = np.random.default_rng(0).normal(size=(9, 1, 4)).astype(np.float32)
    int8 = quantised(g.bytes([y]), samples)
    operators = parse_model(int8, where="m").subgraphs[0].operators
    assert x != y
    assert [round(o.options["alpha"], 4) for o in operators] == [0.1, 0.2, 0.3]
    assert len({(o.name, o.version) for o in operators}) == 1


def test_the_position_of_the_largest_value_is_found_among_integers():
    g = Graph()
    x = g.input("x", (1, 8))
    y = g.dense(x, np.eye(8, dtype=np.float32), np.zeros(8, np.float32), "dense", (1, 8))
    axis = g.const("axis", np.array([1], np.int32))
    made = g.op("ARG_MAX", [y, axis], "place", (1,), "ArgMaxOptions", outputType=2)
    g.tensors[made].type = 2  # int32
    samples = np.random.default_rng(0).normal(size=(9, 1, 8)).astype(np.float32)
    int8 = quantised(g.bytes([made]), samples)
    graph = parse_model(int8, where="m").subgraphs[0]
    assert [o.name for o in graph.operators] == ["FULLY_CONNECTED", "ARG_MAX"]
    door = graph.tensors[graph.inputs[0]]
    for sample in samples:
        stored = np.clip(np.rint(sample / door.scales[0]) + door.zero_points[0], -128, 127)
        assert run(int8, [stored.astype(np.int8)])[0] == stored.argmax()


def test_an_operator_that_shall_stay_in_float_is_still_itself():
    content = one_operator("LEAKY_RELU", (1, 2, 3, 4))
    samples = np.random.default_rng(0).normal(size=(9, 1, 2, 3, 4)).astype(np.float32)
    table = ops.collect_ranges(content, [[x] for x in samples], where="m").table()
    made = ops.quantize(content, table, precision={"y": "float"})
    assert "LEAKY_RELU" in [o.name for o in parse_model(made, where="m").subgraphs[0].operators]


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_a_comparison_is_made_of_integers(name):
    g = Graph()
    x = g.input("x", (1, 16))
    twice = g.op("MUL", [x, g.const("two", np.array(2, np.float32))], "twice", (1, 16), "MulOptions")  # fmt: skip
    made = g.op(name, [twice, g.const("limit", np.array(0.5, np.float32))], "y", (1, 16))
    g.tensors[made].type = 6  # bool
    samples = np.random.default_rng(0).normal(size=(9, 1, 16)).astype(np.float32)
    int8 = quantised(g.bytes([made]), samples)
    graph = parse_model(int8, where="m").subgraphs[0]
    assert [o.name for o in graph.operators] == ["MUL", name]
    door = graph.tensors[graph.inputs[0]]
    for sample in samples:
        stored = np.clip(np.rint(sample / door.scales[0]) + door.zero_points[0], -128, 127)
        real = 2 * (stored - door.zero_points[0]) * door.scales[0]
        clear = np.abs(real - 0.5) > 2 * 2 * door.scales[0]  # beyond rounding of both sides
        got = run(int8, [stored.astype(np.int8)])[0]
        np.testing.assert_array_equal(got[clear], COMPARISONS[name](real, 0.5)[clear])


def values_and_their_places(*kinds, values_too=True):
    """(1, 8) -> itself, where ``values_too``, and the places of its extremes."""
    g = Graph()
    x = g.input("x", (1, 8))
    y = g.dense(x, np.eye(8, dtype=np.float32), np.zeros(8, np.float32), "dense", (1, 8))
    outputs = [y] if values_too else []
    for kind in kinds:
        axis = g.const(f"axis{kind}", np.array([1], np.int32))
        options = {"ARG_MAX": "ArgMaxOptions", "ARG_MIN": "ArgMinOptions"}[kind]
        outputs.append(g.op(kind, [y, axis], kind.lower(), (1,), options, outputType=2))
        g.tensors[outputs[-1]].type = 2  # int32
    return g.bytes(outputs)


@pytest.mark.parametrize("door", ["float32", "int8", "uint8"])
def test_values_that_are_an_output_too_are_still_made_where_their_largest_is_looked_for(door):
    samples = np.random.default_rng(0).normal(size=(9, 1, 8)).astype(np.float32)
    content = values_and_their_places("ARG_MAX")
    table = ops.collect_ranges(content, [[x] for x in samples], where="m").table()
    made = ops.quantize(content, table, input_dtype="float32", output_dtype=door)
    graph = parse_model(made, where="m").subgraphs[0]
    end = graph.tensors[graph.outputs[0]]
    assert end.dtype == door
    scale, zero_point = (end.scales[0], end.zero_points[0]) if end.scales else (1, 0)
    for sample in samples:
        values, place = run(made, [sample])
        real = (values.astype(float) - zero_point) * scale
        assert np.abs(real - sample).max() < 0.05
        assert place == sample.argmax()
        by_name = Interpreter(model_content=made).get_signature_runner()(x=sample)
        np.testing.assert_array_equal(by_name["dense"], values)


def test_nothing_is_turned_into_floats_for_two_readers_of_integers():
    samples = np.random.default_rng(0).normal(size=(9, 1, 8)).astype(np.float32)
    int8 = quantised(values_and_their_places("ARG_MAX", "ARG_MIN", values_too=False), samples)
    operators = [o.name for o in parse_model(int8, where="m").subgraphs[0].operators]
    assert operators == ["FULLY_CONNECTED", "ARG_MAX", "ARG_MIN"]
