"""Rewriting float weights for int8: outputs stay, channels get even, and what may not be touched is not."""

import dataclasses
import re

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.errors import StageError
from edgepipe.rescue import advice, doubt
from edgepipe.tflite_ops.bias import correct_biases
from edgepipe.tflite_ops.channels import channel_statistics
from edgepipe.tflite_ops.equalise import check_unchanged, equalise, repair_dead_channels
from edgepipe.tflite_ops.flatbuffer import constants, parse_model, with_constants
from edgepipe.tflite_ops.ladder import (
    NEAR,
    Judgement,
    Rescue,
    Rung,
    climb,
    is_better,
    least,
    tensors_between,
    unlike,
    with_bridges,
)
from edgepipe.tflite_ops.quantize import collect_ranges, quantize
from edgepipe.tflite_ops.run import dequantize as to_real
from edgepipe.tflite_ops.run import open_tflite
from edgepipe.tflite_ops.run import quantize as to_stored
from edgepipe.tflite_ops.sensitivity import (
    Sensitivity,
    door_noise,
    layer_sensitivity,
    layers_of,
    noise_share,
    outputs_of,
    weight_noise,
)

from .hostile_nets import RELU, dead_batch_norm, detector_head, wide_swish
from .tflite_builder import Graph

RELU6 = schema.ActivationFunctionType.RELU6


def batches(net, n=48):
    return [[x[None]] for x in net.calibration[:n]]


def images(n=24, seed=0, channels=3):
    generator = np.random.default_rng(seed)
    return [[generator.normal(size=(1, 6, 6, channels)).astype(np.float32)] for _ in range(n)]


def chain(*, spread, activation=RELU, between="depthwise", seed=0, residual=False):
    """conv (8 channels, sizes apart by ``spread``) - something - conv 1x1 that undoes the sizes."""
    g, rng = Graph(), np.random.default_rng(seed)
    x = g.input("x", (1, 6, 6, 3))
    size = np.geomspace(1, spread, 8).astype(np.float32)
    first = rng.normal(0, 0.4, (8, 3, 3, 3)).astype(np.float32) * size[:, None, None, None]
    bias = rng.normal(0, 0.1, 8).astype(np.float32) * size
    y = top = g.conv(x, first, bias, "first", (1, 6, 6, 8), fusedActivationFunction=activation)
    shape = (1, 6, 6, 8)
    if between == "depthwise":
        w = g.const("dw/w", rng.normal(0, 0.4, (1, 3, 3, 8)).astype(np.float32))
        b = g.const("dw/b", rng.normal(0, 0.1, 8).astype(np.float32) * size)
        y = g.op("DEPTHWISE_CONV_2D", [y, w, b], "dw", shape, "DepthwiseConv2DOptions", strideW=1, strideH=1, depthMultiplier=1)  # fmt: skip
    elif between == "leaky":
        y = g.op("LEAKY_RELU", [y], "leaky", shape, "LeakyReluOptions", alpha=0.1)
    elif between == "pool":
        y = g.op("MAX_POOL_2D", [y], "pool", (1, 3, 3, 8), "Pool2DOptions", strideW=2, strideH=2, filterWidth=2, filterHeight=2)  # fmt: skip
        shape = (1, 3, 3, 8)
    elif between == "sigmoid":
        y = g.op("LOGISTIC", [y], "sigmoid", shape)
    second = (rng.normal(0, 0.4, (4, 1, 1, 8)) / size).astype(np.float32)
    y = g.conv(y, second, rng.normal(0, 0.1, 4).astype(np.float32), "y", (*shape[:3], 4))
    return g.bytes([y, top] if residual else [y])


def equalised(content, data, strength=0.5):
    found = channel_statistics(content, data, where="m")
    return equalise(content, found, strength=strength, where="m")


@given(
    spread=st.sampled_from([1.0, 10.0, 1000.0]),
    between=st.sampled_from(["depthwise", "leaky", "pool", "nothing"]),
    strength=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_equalising_leaves_the_outputs_as_they_were(spread, between, strength, seed):
    activation = 0 if between == "leaky" else RELU
    content = chain(spread=spread, between=between, seed=seed, activation=activation)
    after, _ = equalised(content, images(seed=seed), strength)
    # on other data than the statistics are of
    assert check_unchanged(content, after, images(8, seed=seed + 1000), where="m") <= 1e-4


@pytest.mark.parametrize("between", ["depthwise", "leaky", "pool", "nothing"])
def test_equalising_makes_channels_even_and_int8_better(between):
    content = chain(spread=1000, between=between, activation=0 if between == "leaky" else RELU)
    data = images()
    before = channel_statistics(content, data, where="m")["first"].spread
    after, told = equalised(content, data)
    assert told
    assert channel_statistics(after, data, where="m")["first"].spread < before / 5
    assert int8_noise(after, data) < int8_noise(content, data) / 2


def int8_noise(content, data):
    made = quantize(content, collect_ranges(content, data, where="m").table(), where="m")
    return noise_share(outputs_of(content, data, where="m"), outputs_of(made, data, where="m"))


def test_what_does_not_commute_with_factors_is_left_alone():
    for content in (
        chain(spread=1000, between="sigmoid"),
        chain(spread=1000, between="nothing", residual=True),  # the tensor is an output itself
    ):
        assert equalised(content, images()) == (content, ())


def test_a_channel_that_reaches_the_end_of_relu6_is_not_scaled():
    content = chain(spread=1000, between="nothing", activation=RELU6)
    data = images()
    after, _ = equalised(content, data)
    assert check_unchanged(content, after, images(16, seed=7), where="m") <= 1e-4
    low = channel_statistics(content, data, where="m")["first"].reach
    new = channel_statistics(after, data, where="m")["first"].reach
    cut = low >= 5.9
    assert cut.any()
    np.testing.assert_array_equal(new[cut], low[cut])


def test_a_change_of_the_outputs_is_an_error():
    with pytest.raises(StageError, match="changed its outputs by"):
        check_unchanged(chain(spread=1, seed=0), chain(spread=1, seed=1), images(2), where="m")


@pytest.mark.slow
def test_absurd_weights_behind_dead_channels_are_zeroed_and_nothing_else():
    net = dead_batch_norm()
    found = channel_statistics(net.content, batches(net), where="m")
    assert found["first"].is_constant[18:].all()
    after, told = repair_dead_channels(net.content, found, where="m")
    assert len(told) == 1
    assert "6 dead channel(s) of 'first'" in told[0]
    assert (
        check_unchanged(net.content, after, [[x[None]] for x in net.samples[:50]], where="m") == 0
    )
    assert int8_noise(after, batches(net)) < 0.1 < int8_noise(net.content, batches(net))
    # a model without the fault keeps its bytes
    other = wide_swish()
    found = channel_statistics(other.content, batches(other), where="m")
    assert repair_dead_channels(other.content, found, where="m") == (other.content, ())


def with_gain(largest):
    """A convolution with a dead channel and a batch norm that was left as a multiplication."""
    g = Graph()
    x = g.input("x", (1, 6, 6, 3))
    weights = np.random.default_rng(0).normal(size=(4, 1, 1, 3)).astype(np.float32)
    weights[3] = 0
    y = g.conv(x, weights, np.array([0, 0, 0, -1], np.float32), "c", (1, 6, 6, 4), fusedActivationFunction=RELU)  # fmt: skip
    gain = g.const("gain", np.array([1, 0.5, 2, largest], np.float32))
    return g.bytes([g.op("MUL", [y, gain], "y", (1, 6, 6, 4), "MulOptions")])


def test_a_batch_norm_left_as_a_multiplication_is_repaired_too():
    content, data = with_gain(1e4), images()
    after, told = repair_dead_channels(content, channel_statistics(content, data, where="m"), where="m")  # fmt: skip
    assert "MUL 'y' multiplies 1 dead channel(s) of 'c' by up to 1e+04" in told[0]
    assert check_unchanged(content, after, images(8, seed=9), where="m") == 0
    assert int8_noise(after, data) < 0.01 < 0.5 < int8_noise(content, data)


def test_weights_that_no_file_can_hold_are_repaired_before_the_first_file():
    net = dataclasses.replace(detector_head(), content=with_gain(1e20), calibration=np.concatenate([x for (x,) in images()]))  # fmt: skip
    rescue = climbed(net, lambda content: Judgement(1.0, 0.0, 10))
    assert [r.name for r in rescue.rungs] == ["repair"]
    assert "by up to 1e+20" in rescue.causes[0]


def test_statistics_are_those_of_the_values():
    content, data = chain(spread=3, between="nothing"), images(5)
    found = channel_statistics(content, data, where="m")["x"]
    everything = np.concatenate([x for (x,) in data]).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(found.mean, everything.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, everything.std(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.low, everything.min(axis=0))
    np.testing.assert_array_equal(found.high, everything.max(axis=0))


def test_bias_correction_takes_the_mean_error_out_of_each_channel():
    content, data = chain(spread=100, between="depthwise", activation=0), images(32)
    made = quantize(content, collect_ranges(content, data, where="m").table(), where="m")
    after, layers = correct_biases(content, made, data, where="m")
    assert layers == 3
    (wanted,) = outputs_of(content, data, where="m")

    def mean_error(file):
        (found,) = outputs_of(file, data, where="m")
        return np.abs((found - wanted).reshape(-1, 4).mean(axis=0)).max()

    assert mean_error(after) < mean_error(made) / 3
    assert len(after) == len(made)


def test_sensitivity_blames_the_layer_that_alone_ruins_the_model():
    for net, layers in ((detector_head(), {"both"}), (wide_swish(), {"first", "swish"})):
        table = collect_ranges(net.content, batches(net), where="m").table()
        ranked = layer_sensitivity(net.content, table, batches(net), where="m")
        assert {s.layer for s in ranked[: len(layers)]} == layers
        assert ranked[0].noise > 2 * ranked[len(layers)].noise


def test_noise_weighs_small_outputs_like_large_ones():
    generator = np.random.default_rng(0)
    large, small = generator.normal(size=(50, 3)) * 300, generator.normal(size=(50, 3))
    both = np.hstack([large, small])
    dead = np.hstack([large, np.zeros((50, 3))])
    assert noise_share([both], [both]) == 0
    assert noise_share([both], [dead]) == pytest.approx(0.5, abs=0.05)
    assert noise_share([both], [np.full_like(both, np.nan)]) == 1


# --- the ladder's own rules, with a judge of our making ------------------------------------------


def climbed(net, judge, **options):
    table = collect_ranges(net.content, batches(net), where="m").table()
    given = {
        "max_drop": 1.0, "input_dtype": "int8", "output_dtype": "float32", "allow_float": (), "round_weights": None,
        **options,
    }  # fmt: skip
    return climb(net.content, table, "min_max", batches=lambda: iter(batches(net)), judge=judge, where="m", **given)  # fmt: skip


def test_the_ladder_stops_at_the_first_rung_that_holds():
    rescue = climbed(detector_head(), lambda content: Judgement(1.0, 0.0, 10))
    assert [r.name for r in rescue.rungs] == ["plain"]
    assert rescue.held


def test_ranges_are_those_nearest_to_float_not_the_best_of_many_scores():
    net = wide_swish()
    table = collect_ranges(net.content, batches(net), where="m")
    plain, averages = (quantize(net.content, t, output_dtype="float32") for t in (table.table(), table.averages()))  # fmt: skip
    judged = []

    def judge(content):
        judged.append(content)
        # the farthest of all is the luckiest
        return Judgement(0.5 if content == plain else 0.995 if content == averages else 0.99, 100 * (content == plain), 10)  # fmt: skip

    rescue = climbed(net, judge)
    assert [r.name for r in rescue.rungs] == ["plain", "ranges"]
    assert judged == [plain, rescue.content]
    assert rescue.content != averages
    assert rescue.rungs[1].noise < rescue.rungs[0].noise


@pytest.mark.slow
def test_biases_of_rounded_weights_are_corrected_to_the_float_model_as_it_was(monkeypatch):
    net = wide_swish()
    monkeypatch.setattr("edgepipe.tflite_ops.ladder.WEIGHT_SHARE", 0)  # its weights do little harm

    def rounded(content, int8, data):
        graph = parse_model(content, where="m").subgraphs[0]
        values = {i: v * 1.1 for i, v in constants(content, graph).items() if v.dtype == np.float32 and v.ndim == 4}  # fmt: skip
        return with_constants(content, values), "all weights a tenth larger"

    rescue = climbed(net, lambda content: Judgement(0.5, 50.0, 10), round_weights=rounded)
    (number,) = (i for i, rung in enumerate(rescue.rungs) if rung.name == "rounding")
    plan, made = rescue.made[number]
    assert plan.corrected
    bare = quantize(plan.content, plan.ranges, output_dtype="float32")
    graph = parse_model(made, where="m").subgraphs[0]
    layer = graph.tensors[next(o.outputs[0] for o in graph.operators if o.name == "CONV_2D")].name
    wanted, *found = (mean_of(c, layer, batches(net)) for c in (net.content, bare, made))
    errors = [float(np.abs(mean - wanted).mean()) for mean in found]
    assert errors[1] < 0.5 * errors[0]


def mean_of(content, name, data):
    """Mean real value of each channel of one tensor of a file, over all samples."""
    interpreter = open_tflite(content, preserve_all_tensors=True)
    (door,) = interpreter.get_input_details()
    (tensor,) = (d for d in interpreter.get_tensor_details() if d["name"] == name)
    rows = []
    for (array,) in data:
        interpreter.set_tensor(door["index"], to_stored(array, door))
        interpreter.invoke()
        rows.append(to_real(interpreter.get_tensor(tensor["index"]), tensor))
    return np.concatenate(rows).reshape(-1, rows[0].shape[-1]).mean(axis=0)


def within(low, high):
    return lambda content: Judgement(0.9, 0.0, 100, (low, high))


@pytest.mark.slow
def test_a_drop_that_may_be_luck_is_climbed_past_as_far_as_that_costs_no_latency():
    net = wide_swish()
    rescue = climbed(net, within(-3.0, 3.0), round_weights=never_asked)
    assert [r.name for r in rescue.rungs] == ["plain", "ranges", "equalise", "tensors", "bias"]
    assert all(r.held and not r.sure for r in rescue.rungs)
    assert rescue.held
    assert rescue.result.noise == min(r.noise for r in rescue.rungs) > NEAR
    assert rescue.content == next(c for r, (_, c) in zip(rescue.rungs, rescue.made, strict=True) if r is rescue.result)  # fmt: skip
    # where the noise comes from that may yet show, and what the rung would leave that was not climbed
    told = re.fullmatch(
        r"noise (\S+) is left: int8 weights alone leave (\S+), the int8 input (\S+), with 16-bit activations in"
        r" the first 7 layers (\S+) would be left \(\S+ times the latency on this host\)",
        rescue.causes[-1],
    )
    left, weights, door, wide = map(float, told.groups())
    assert left == pytest.approx(rescue.result.noise, rel=0.1)
    assert weights == pytest.approx(weight_noise(net.content, rescue.made[0][1], batches(net)[:64], where="m"), rel=0.5)  # fmt: skip
    assert max(weights, door, wide) < left


@pytest.mark.slow
def test_until_it_is_sure_a_file_that_holds_by_luck_is_given_16_bits():
    rescue = climbed(wide_swish(), within(-3.0, 3.0), until="sure")
    assert [r.name for r in rescue.rungs][-1] == "mixed"
    assert rescue.result.sure
    assert rescue.result.noise <= NEAR
    assert len(rescue.precision) > 0


def never_asked(*given):
    pytest.fail("weights that do no harm were rounded anew")


def test_the_noise_of_weights_is_that_of_their_steps_and_of_nothing_else():
    g = Graph()
    x = g.input("x", (1, 2, 2, 3))
    weights = np.random.default_rng(0).normal(size=(4, 1, 1, 3)).astype(np.float32)
    content = g.bytes([g.conv(x, weights, np.ones(4, np.float32), "y", (1, 2, 2, 4))])
    data = [[np.random.default_rng(i).normal(size=(1, 2, 2, 3)).astype(np.float32)] for i in range(9)]  # fmt: skip
    step = np.abs(weights).max(axis=(1, 2, 3), keepdims=True) / 127
    ends = [np.concatenate([x @ w[:, 0, 0].T + 1 for (x,) in data])[:, None] for w in (weights, np.rint(weights / step) * step)]  # fmt: skip
    # wide ranges: activations are on a few steps
    int8 = quantize(content, {"x": (-50.0, 50.0), "y": (-50.0, 50.0)}, where="m")
    assert weight_noise(content, int8, data, where="m") == pytest.approx(noise_share(ends[:1], ends[1:]), rel=1e-3)  # fmt: skip
    assert noise_share(outputs_of(content, data, where="m"), outputs_of(int8, data, where="m")) > 100 * noise_share(ends[:1], ends[1:])  # fmt: skip


def test_a_drop_that_the_samples_tell_is_no_luck():
    assert [r.name for r in climbed(wide_swish(), within(-0.5, 1.0)).rungs] == ["plain"]


def test_a_doubt_says_how_many_samples_would_tell_a_loss_from_none():
    text = doubt(450, (-1.9, 1.7), 1.0)
    assert text.startswith("450 samples cannot tell a loss of 1 point from one of 1.7:")
    assert text.endswith("some 1,458 to tell it from none")
    # ever so many, and only a narrow interval was unlucky
    assert doubt(450, (0.5, 1.1), 1.0).endswith("some 451 to tell it from none")


def test_a_file_near_float_is_believed_on_few_samples():
    g = Graph()
    x = g.input("image", (1, 8, 8, 1))
    y = g.conv(x, np.ones((2, 1, 1, 1), np.float32), np.zeros(2, np.float32), "y", (1, 8, 8, 2))
    net = dataclasses.replace(detector_head(), content=g.bytes([y]))
    assert [r.name for r in climbed(net, within(-9.0, 9.0)).rungs] == ["plain"]


def test_a_drop_of_exactly_the_most_that_is_allowed_holds():
    lost = 100 * (0.53 - 0.52)
    assert lost > 1.0
    assert climbed(detector_head(), lambda content: Judgement(0.52, lost, 100)).held


def bridged(between):
    g = Graph()
    x = g.input("x", (1, 4, 4, 2))
    weights, bias = np.ones((2, 1, 1, 2), np.float32), np.zeros(2, np.float32)
    y = g.conv(x, weights, bias, "first", (1, 4, 4, 2))
    y = g.op(between, [y], "between", (1, 4, 4, 2))
    y = g.op("PAD", [y, g.const("edges", np.zeros((4, 2), np.int32))], "padded", (1, 4, 4, 2))
    y = g.conv(y, weights, bias, "second", (1, 4, 4, 2))
    graph = parse_model(g.bytes([y]), where="m").subgraphs[0]
    return with_bridges(graph, ["second", "first"]), with_bridges(graph, ["second"])


def test_what_only_hands_on_between_wide_layers_is_widened_with_them():
    assert bridged("HARD_SWISH") == (["second", "first", "between", "padded"], ["second"])
    # a sigmoid's result is from 0 to 1, whatever it is given: 8 bits hold it
    assert bridged("LOGISTIC") == (["second", "first"], ["second"])


def rung(drop, noise, *, held=False, interval=None):
    return Rung("r", "", Judgement(0.5, drop, 9, interval), noise, 1, held, sure=False, kept=True)


def test_of_two_rungs_the_nearer_to_float_is_better_where_scores_cannot_tell():
    before = rung(3.0, 0.2, interval=(1.0, 5.0))
    assert is_better(rung(4.0, 0.1), before)
    assert not is_better(rung(2.0, 0.3), before)
    # what is allowed by luck is not better; beyond the interval scores tell
    assert not is_better(rung(1.0, 0.3, held=True), before)
    assert is_better(rung(0.5, 0.3), before)
    assert not is_better(rung(5.5, 0.1), before)
    # without an interval every difference counts
    assert not is_better(rung(3.1, 0.1), rung(3.0, 0.2))


@pytest.mark.slow
def test_where_the_nearest_file_is_refused_the_nearest_that_held_is_taken():
    plain = climbed(wide_swish(), within(-0.5, 1.0)).content

    def judge(content):
        drop = 0.0 if content == plain else 2.0
        return Judgement(0.5, drop, 9, (drop - 3.0, drop + 3.0))

    rescue = climbed(wide_swish(), judge)
    assert rescue.held
    assert rescue.content == plain
    assert [r.kept for r in rescue.rungs] == [True, *[False] * (len(rescue.rungs) - 1)]
    assert len(rescue.rungs) > 2
    assert rescue.rungs[-1].name != "mixed"  # 16 bits cost latency, and one that costs none held


def test_what_8_bits_hold_as_well_is_not_stretched_to_its_whole_range():
    content = chain(spread=4)
    graph = parse_model(content, where="m").subgraphs[0]
    # "first" is read by an 8-bit layer; what comes in is 8-bit at the door
    assert tensors_between(graph, {"first": "int16"}) == []
    assert tensors_between(graph, {"first": "int16", "dw": "int16"}) == ["first"]
    assert tensors_between(graph, {"dw": "int16", "y": "int16"}) == ["dw", "y"]


@pytest.mark.slow
def test_a_rung_that_makes_it_worse_is_undone_and_none_that_holds_is_invented():
    scores = iter([0.5, *([0.1] * 99)])

    def judge(content):
        score = next(scores)
        return Judgement(score, 100 * (1 - score), 10)

    rescue = climbed(wide_swish(), judge)
    assert not rescue.held
    assert [r.kept for r in rescue.rungs] == [True, *[False] * (len(rescue.rungs) - 1)]
    assert rescue.content == climbed(wide_swish(), lambda content: Judgement(1.0, 0, 1)).content
    assert rescue.culprits[0].layer in ("first", "swish")


def test_an_island_that_may_not_stay_ends_the_climb_before_it_begins():
    g = Graph()
    x = g.input("image", (1, 8, 8, 1))
    y = g.conv(x, np.ones((2, 1, 1, 1), np.float32), np.zeros(2, np.float32), "c", (1, 8, 8, 2))
    content = g.bytes([g.op("SIN", [y], "y", (1, 8, 8, 2))])
    net = dataclasses.replace(detector_head(), content=content)
    with pytest.raises(StageError, match="is not full-integer"):
        climbed(net, lambda content: pytest.fail("nothing to judge"))


@pytest.mark.slow
def test_layers_go_into_float_only_where_their_operator_may():
    net = detector_head()

    def judge(content):
        from edgepipe.tflite_ops.flatbuffer import parse_model

        graph = parse_model(content, where="m").subgraphs[0]
        made = [graph.tensors[o.outputs[0]].dtype for o in graph.operators if o.name == "CONCATENATION"]  # fmt: skip
        return Judgement(float(made == ["float32"]), 100.0 * (made != ["float32"]), 10)

    assert not climbed(net, judge).held
    rescue = climbed(net, judge, allow_float=("CONCATENATION",))
    assert rescue.held
    assert dict(rescue.precision) == {"both": "float"}
    assert dataclasses.asdict(rescue.rungs[-1])["name"] == "mixed"


def heavy_tailed(n=48, seed=0):
    generator = np.random.default_rng(seed)
    samples = generator.exponential(0.1, (n, 6, 6, 3)) + 200 * (
        generator.random((n, 6, 6, 3)) > 0.999
    )
    return [[x[None].astype(np.float32)] for x in samples]


def test_noise_at_the_door_is_that_of_rounding_the_input_and_nothing_else():
    content, data = chain(spread=1), heavy_tailed()
    (limits,) = [(min(x.min() for (x,) in data), max(x.max() for (x,) in data))]
    low, high = min(float(limits[0]), 0.0), float(limits[1])
    step = (high - low) / 255
    # the same by hand: zero is the lowest value that is stored
    rounded = [[(np.rint(x / step) * step).astype(np.float32)] for (x,) in data]
    expected = outputs_of(content, data, where="m")
    by_hand = noise_share(expected, outputs_of(content, rounded, where="m"))
    assert by_hand > NEAR
    assert door_noise(content, {"x": (low, high)}, data, where="m") == pytest.approx(by_hand, rel=1e-4)  # fmt: skip
    assert door_noise(content, {}, data, where="m") == 0


def spoilt(content, data, door, *, output="float32"):
    table = collect_ranges(content, data, where="m").table()
    return climb(
        content, table, "min_max", batches=lambda: iter(data), judge=lambda content: Judgement(0.5, 50.0, 10),
        where="m", max_drop=1.0, input_dtype=door, output_dtype=output, allow_float=(), round_weights=None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("door", ["int8", "float32"])
def test_an_int8_input_that_spoils_the_model_alone_is_named_as_a_cause(door):
    rescue = spoilt(chain(spread=1), heavy_tailed(), door)
    named = [cause for cause in rescue.causes if "int8 at the input ('x')" in cause]
    assert (rescue.at_door > NEAR, len(named)) == ((True, 1) if door == "int8" else (False, 0))


def far_from_zero(offset):
    """A mean over the picture, of which each sample has another, far from 0: int8 has a step of offset / 255."""
    g = Graph()
    x = g.input("x", (1, 6, 6, 3))
    y = g.op("MEAN", [x, g.const("axes", np.array([1, 2, 3], np.int32))], "mean", (1,), "ReducerOptions")  # fmt: skip
    return g.bytes([g.op("ADD", [y, g.const("offset", np.array([offset], np.float32))], "y", (1,), "AddOptions")])  # fmt: skip


@pytest.mark.parametrize(
    ("offset", "door", "named"),
    [(300.0, "int8", 1), (300.0, "float32", 0), (0.0, "int8", 0)],
)
def test_an_int8_output_whose_steps_are_wider_than_what_it_varies_by_is_named(offset, door, named):
    data = [[x + i / 48] for i, (x,) in enumerate(images(48))]
    rescue = spoilt(far_from_zero(offset), data, "int8", output=door)
    found = [cause for cause in rescue.causes if "int8 at the output ('y', 299." in cause]
    assert (len(found), rescue.at_output > NEAR) == (named, bool(named))


@pytest.mark.slow
def test_weights_rounded_for_8_bit_activations_are_tried_nearest_where_those_have_16(monkeypatch):
    net = wide_swish()
    monkeypatch.setattr("edgepipe.tflite_ops.ladder.WEIGHT_SHARE", 0)  # its weights do little harm

    def rounded(content, int8, data):
        graph = parse_model(content, where="m").subgraphs[0]
        values = {i: v * 1.05 for i, v in constants(content, graph).items() if v.dtype == np.float32 and v.ndim == 4}  # fmt: skip
        return with_constants(content, values), "all weights larger"

    scores = iter(range(1000))
    # each file is judged better than the one before, so that the rounded weights are kept; none holds
    rescue = climbed(net, lambda content: Judgement(0.5, 90.0 - 0.1 * next(scores), 10), round_weights=rounded)  # fmt: skip
    mixed = [r for r in rescue.rungs if r.name == "mixed"]
    assert [r.did.endswith("rounded to nearest") for r in mixed] == [False, True]
    assert mixed[1].noise < 0.5 * mixed[0].noise
    assert rescue.made[-1][0].unrounded == b""
    assert rescue.content == rescue.made[-1][1]


def unmended(**found):
    culprits = [Sensitivity("a", "LOG", 1.0), Sensitivity("b", "ADD", 0.9), Sensitivity("c", "MEAN", 0.2)]  # fmt: skip
    return Rescue(b"", b"", {}, "min_max", {}, (), (), tuple(culprits), float_latency_s=1e-5, **found)  # fmt: skip


def test_what_may_mend_a_model_that_no_rung_does_can_be_pasted():
    assert advice(unmended()).endswith('allow_float = ["ADD", "LOG"]')
    assert "qat stage" in advice(unmended())
    # training mends no door
    assert "qat" not in advice(unmended(at_door=0.5)) + advice(unmended(at_output=0.5))
    assert 'input_dtype = "float32"' in advice(unmended(at_door=0.5))
    assert 'allow_float = ["ADD", "LOG"]' in advice(unmended(at_door=0.5))
    assert advice(unmended(at_output=0.5)).startswith('output_dtype = "float32"')


@pytest.mark.slow
def test_16_bits_stop_where_more_layers_leave_no_less_noise():
    content = chain(spread=1, between="sigmoid", activation=RELU6)
    rescue = spoilt(content, heavy_tailed(), "int8")
    assert rescue.rungs[-1].name == "mixed"
    # what the input's rounding leaves, no layer mends
    assert len(rescue.made[-1][0].precision) < 3
    assert any("with all 3: more would" in cause for cause in rescue.causes)


@pytest.mark.slow
def test_16_bits_go_to_the_first_layers_where_these_are_fewer_than_the_worst_alone(monkeypatch):
    ranked = []

    def the_last_are_the_worst(content, *given, **options):
        layers = layers_of(parse_model(content, where="m").subgraphs[0])
        ranked[:] = [Sensitivity(name, layers[name], 0.5) for name in reversed(layers)]
        return ranked

    monkeypatch.setattr("edgepipe.tflite_ops.ladder.layer_sensitivity", the_last_are_the_worst)
    # not all three layers for the last tenth
    monkeypatch.setattr("edgepipe.tflite_ops.ladder.NO_BETTER", 2.0)
    rescue = spoilt(chain(spread=1, between="sigmoid", activation=RELU6), heavy_tailed(), "float32")
    widened = rescue.made[-1][0].precision
    assert ranked[-1].layer in widened
    assert ranked[0].layer not in widened


@given(st.integers(1, 200), st.integers(0, 200))
def test_the_least_that_is_enough_is_found_in_few_looks(enough, most):
    looks = []
    found = least(lambda n: bool(looks.append(n)) or n >= enough, most)
    assert found == (enough if enough <= most else None)
    assert all(1 <= n <= most for n in looks)
    assert len(looks) <= 2 * most.bit_length() + 1


def two_tails():
    """Two branches of small values (channel 0) and rare hundreds (channel 1): "y1" is of the small, "y2" of the rare."""
    g = Graph()
    x = g.input("x", (1, 6, 6, 2))
    ends = []
    for name, of in (("a", [[1, 0]]), ("b", [[0, 1]])):
        y = g.conv(x, np.array([[[[3, 0]]], [[[0, 100]]]], np.float32), np.zeros(2, np.float32), name, (1, 6, 6, 2))  # fmt: skip
        y = g.op("HARD_SWISH", [y], f"{name}/swish", (1, 6, 6, 2))
        weights = np.array(of, np.float32)[:, None, None, :]
        ends.append(g.conv(y, weights, np.zeros(1, np.float32), f"{name}/y", (1, 6, 6, 1)))
    generator = np.random.default_rng(0)
    samples = np.stack(
        [generator.random((48, 6, 6)), generator.random((48, 6, 6)) > 0.998], axis=-1
    )
    return g.bytes(ends), [[sample[None].astype(np.float32)] for sample in samples]


@pytest.mark.slow
def test_ranges_are_chosen_tensor_by_tensor_where_no_method_fits_all():
    content, data = two_tails()
    rescue = spoilt(content, data, "int8")
    rungs = {r.name: (r, plan) for r, (plan, _) in zip(rescue.rungs, rescue.made, strict=True)}
    rung, plan = rungs["tensors"]
    assert plan.method == "by tensor"
    assert plan.ranges["a"][1] < 20 < 99 < plan.ranges["b"][1]
    assert plan.ranges["a/swish"][1] < 20 < 99 < plan.ranges["b/swish"][1]
    before = next(r for r in reversed(rescue.rungs[: rescue.rungs.index(rung)]) if r.kept)
    assert rung.noise < before.noise / 3
    assert "tensors by other methods" in rung.did


def test_ranges_that_are_as_good_as_another_are_not_tried():
    assert unlike([(0, 100), (1, 99), (0, 90), (0.5, 90.5)]) == [(0, 100), (0, 90)]
    assert unlike([(0, 0), (0, 0), (0, 1)]) == [(0, 0), (0, 1)]
