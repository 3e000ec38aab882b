"""Masks before a softmax: as low as need be and no lower, so that int8 has steps left for the scores."""

import numpy as np
import pytest

from edgepipe.errors import StageError
from edgepipe.tflite_ops import quantize as ops
from edgepipe.tflite_ops.equalise import check_unchanged
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import describe_model
from edgepipe.tflite_ops.rewrite import clamp_masks
from edgepipe.tflite_ops.sensitivity import outputs_of
from tests.unit.tflite_builder import Graph

N = 6  # scores (1, N, N): who looks, at whom
SCORES = (1, N, N)
CAUSAL = np.triu(np.ones((N, N), np.float32), 1)
RNG = np.random.default_rng(3)
SAMPLES = [[RNG.normal(0, 2, SCORES).astype(np.float32)] for _ in range(24)]


def lowest(value):
    return np.where(CAUSAL > 0, np.float32(value), np.float32(0)).astype(np.float32)


def added(value):
    return lambda g, x: g.op("ADD", [x, g.const("mask", lowest(value))], "sum", SCORES, "AddOptions")  # fmt: skip


def moved(g, x):
    """The mask is added to (1, keys, 1, queries), and turned round before the softmax."""
    turned = g.op("RESHAPE", [g.transpose(x, (0, 2, 1), "turned", SCORES), shape_of(g, (1, N, 1, N), "a")], "wide", (1, N, 1, N))  # fmt: skip
    mask = g.const("mask", lowest(-1e9).T.reshape(1, N, 1, N))
    y = g.op("ADD", [mask, turned], "sum", (1, N, 1, N), "AddOptions")
    back = g.transpose(y, (0, 3, 1, 2), "back", (1, N, N, 1))
    return g.op("RESHAPE", [back, shape_of(g, SCORES, "b")], "flat", SCORES)


def shape_of(g, shape, name):
    return g.const(f"{name}/shape", np.array(shape, np.int32))


def condition(g, below=0.5):
    """Where the mask is 1, computed so that no converter could fold it."""
    found = g.op("GREATER", [g.const("causal", CAUSAL), g.const("half", np.array(below, np.float32))], "masked", (N, N))  # fmt: skip
    g.tensors[found].type = 6  # bool
    return found


def scalar(g, value, name):
    return g.const(name, np.array(value, np.float32))


def filled(g, x):
    masked = g.op("RESHAPE", [condition(g), shape_of(g, SCORES, "m")], "masked3", SCORES)
    g.tensors[masked].type = 6
    full = g.const("low", np.full(SCORES, -np.inf, np.float32))
    return g.op("SELECT_V2", [masked, full, x], "filled", SCORES, "SelectV2Options")


def chosen(g, x):
    low, nothing = g.const("low", np.full((N, N), -3.4e38, np.float32)), g.const("nothing", np.zeros((N, N), np.float32))  # fmt: skip
    mask = g.op("SELECT_V2", [condition(g), low, nothing], "mask", (N, N), "SelectV2Options")
    return g.op("ADD", [x, mask], "sum", SCORES, "AddOptions")


def multiplied(g, x):
    ones = g.op("RELU", [g.const("causal", CAUSAL)], "ones", (N, N))
    mask = g.op("MUL", [ones, scalar(g, -1e9, "low")], "mask", (N, N), "MulOptions")
    return g.op("ADD", [mask, x], "sum", SCORES, "AddOptions")


FORMS = {
    "-inf": added(-np.inf), "-3.4e38": added(-3.4e38), "-1e9": added(-1e9), "-1e4": added(-1e4),
    "moved": moved, "filled": filled, "chosen": chosen, "multiplied": multiplied,
}  # fmt: skip


def built(form):
    g = Graph()
    x = g.input("x", SCORES)
    y = g.op("SOFTMAX", [form(g, x)], "y", SCORES, "SoftmaxOptions", beta=1.0)
    return g.bytes([y])


def int8(content):
    return ops.quantize(content, ops.collect_ranges(content, SAMPLES, where="m").table())


def snr_db(content, quantised):
    (expected,), (found,) = (outputs_of(c, SAMPLES, where="m") for c in (content, quantised))
    return 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum())


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_leaves_steps_for_the_scores_and_masks_all_the_same(form):
    content = built(FORMS[form])
    made, told = clamp_masks(content, lambda: SAMPLES, where="m")
    assert len(told) == 1
    assert "clamped to" in told[0]
    check_unchanged(content, made, SAMPLES, where="m")
    quantised = int8(made)
    assert not describe_model(parse_model(quantised, where="m")).float_islands
    # scores within +-8, so at most 41 below the highest: steps of 41 / 255, worth 16 % of a weight at most
    assert snr_db(content, quantised) > 25
    (weights,) = outputs_of(quantised, SAMPLES, where="m")
    assert (weights[:, 0][..., CAUSAL > 0] == 0).all()
    if form in ("-inf", "-3.4e38"):
        with pytest.raises(StageError) as error:
            int8(content)
        assert error.value.code == "infinite-range"
    elif (
        form != "filled"
    ):  # infinities, which ranges leave out, saturate at the least score: no better
        assert snr_db(content, int8(content)) < 10


def test_what_is_no_mask_stays():
    bias = np.linspace(-20, 3, N * N, dtype=np.float32).reshape(N, N)
    wholly = lowest(-1e9)
    wholly[0] = -1e9  # all of the first row, which is a mean of everything then
    for values in (bias, wholly):
        content = built(lambda g, x, v=values: g.op("ADD", [x, g.const("c", v)], "sum", SCORES, "AddOptions"))  # fmt: skip
        assert clamp_masks(content, lambda: SAMPLES, where="m") == (content, ())


def test_a_masked_sum_that_is_a_result_as_well_stays():
    g = Graph()
    total = added(-1e9)(g, g.input("x", SCORES))
    content = g.bytes([g.op("SOFTMAX", [total], "y", SCORES, "SoftmaxOptions", beta=1.0), total])
    assert clamp_masks(content, lambda: SAMPLES, where="m") == (content, ())


def test_one_mask_for_several_layers_is_clamped_for_each():
    g = Graph()
    x, mask = g.input("x", SCORES), g.const("mask", lowest(-np.inf))
    for number, factor in enumerate((1.0, 4.0)):
        scaled = g.op("MUL", [x, scalar(g, factor, f"f{number}")], f"scaled{number}", SCORES, "MulOptions")  # fmt: skip
        total = g.op("ADD", [scaled, mask], f"sum{number}", SCORES, "AddOptions")
        x = g.op("SOFTMAX", [total], f"y{number}", SCORES, "SoftmaxOptions", beta=1.0)
    content = g.bytes([x])
    made, told = clamp_masks(content, lambda: SAMPLES, where="m")
    assert [line.partition(":")[0] for line in told] == ["ADD 'sum0'", "ADD 'sum1'"]
    check_unchanged(content, made, SAMPLES, where="m")
