"""Learned rounding: weights stay on their int8 grid, one step from where they were, and fit better."""

import numpy as np
import pytest

from edgepipe.tflite_ops.flatbuffer import constants, parse_model
from edgepipe.tflite_ops.quantize import collect_ranges, quantize
from edgepipe.tflite_ops.sensitivity import outputs_of

from .test_equalise import chain, images
from .tflite_builder import Graph

pytest.importorskip("torch")

from edgepipe.torch_ops import rounding


@pytest.fixture(scope="module")
def rounded():
    content, data = chain(spread=1, between="depthwise", seed=3), images(64)
    table = collect_ranges(content, data, where="m").table()
    int8 = quantize(content, table, where="m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "STEPS", 100)
        after, did = rounding.round_weights(content, int8, data, seed=0)
    assert did == "weights of 3 layers rounded by AdaRound"
    return content, int8, after, quantize(after, table, where="m"), data


def weights(content):
    graph = parse_model(content, where="m").subgraphs[0]
    values = constants(content, graph)
    return {graph.tensors[i].name: (values[i], graph.tensors[i]) for i in values if graph.tensors[i].name.endswith("/w")}  # fmt: skip


def test_every_weight_is_rounded_up_or_down_and_some_not_to_the_nearest(rounded):
    content, int8, after, again, _ = rounded
    before, nearest, found = weights(content), weights(int8), weights(again)
    others = 0
    for name, (stored, tensor) in found.items():
        # quantising the rounded file finds the grid it was rounded to
        np.testing.assert_allclose(tensor.scales, nearest[name][1].scales, rtol=1e-6)
        axis = [-1 if i == tensor.quantized_axis else 1 for i in range(stored.ndim)]
        steps = before[name][0] / np.array(tensor.scales).reshape(axis)
        assert np.abs(stored - steps).max() < 1 + 1e-3
        others += int((stored != nearest[name][0]).sum())
        assert weights(after)[name][0].dtype == np.float32
    assert others > 0


def test_the_first_layers_output_is_nearer_to_float_than_by_nearest_rounding(rounded):
    content, int8, _, again, data = rounded
    (wanted,) = outputs_of(content, data, where="m")

    def error(file):
        (found,) = outputs_of(file, data, where="m")
        return float(((found - wanted) ** 2).mean())

    # 8 bits leave little to win: activations' own rounding is the larger part
    assert error(again) < 1.02 * error(int8)


def test_a_layer_too_large_for_the_time_given_keeps_nearest_rounding(monkeypatch):
    monkeypatch.setattr(rounding, "MOST_MACS", 1.0)
    content, data = chain(spread=1), images(8)
    int8 = quantize(content, collect_ranges(content, data, where="m").table(), where="m")
    after, did = rounding.round_weights(content, int8, data)
    assert did.startswith("weights of 0 layers")
    assert weights(after)["first/w"][0] is not None


def test_a_file_of_several_samples_at_once_is_rounded_as_well():
    generator = np.random.default_rng(0)
    graph = Graph()
    x = graph.input("x", (4, 5, 5, 3))
    weights = generator.normal(size=(6, 3, 3, 3)).astype(np.float32)
    y = graph.conv(x, weights, np.zeros(6, np.float32), "y", (4, 5, 5, 6))
    content = graph.bytes([y])
    data = [[generator.normal(size=(4, 5, 5, 3)).astype(np.float32)] for _ in range(6)]
    int8 = quantize(content, collect_ranges(content, data, where="m").table(), where="m")
    _, did = rounding.round_weights(content, int8, data)
    assert did == "weights of 1 layers rounded by AdaRound"
