"""What explain says of layers: figures against numpy, causes, the page, and operators on a board."""

import dataclasses
import html.parser
import logging
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.artifact import make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, StageError
from edgepipe.layer_explain import (
    Explanation,
    Layer,
    TriedRung,
    _with_tried_rung,
    advise,
    as_dict,
    explain_layers,
    layers_table,
    plain_int8,
    rungs_table,
    short_name,
    summary,
    why_builtin,
)
from edgepipe.layer_html import html_report
from edgepipe.table import Table
from edgepipe.tflite_ops.flatbuffer import constants, parse_model, with_constants
from edgepipe.tflite_ops.inspect import tensor_specs
from edgepipe.tflite_ops.layer_noise import (
    LayerNoise,
    Repairs,
    comparable,
    layer_noise,
    noise_alone,
)
from edgepipe.tflite_ops.precisions import make_precision
from edgepipe.tflite_ops.quantize import collect_ranges, departures, quantize
from edgepipe.tflite_ops.rewrite import rewrite
from edgepipe.tflite_ops.sensitivity import noise_share, outputs_of

from .hostile_nets import NETS, detector_head
from .tflite_builder import Graph

NOTHING = Repairs(frozenset(), {})


def noise(layer="conv", **more):
    usual = LayerNoise(
        layer=layer, operator="CONV_2D", dtype="int8", sqnr_db=30.0, added=0.001, low=-1.0, high=1.0,
        scale=2 / 255, zero_point=0, scale_low=-1.0, scale_high=1.0, clipped=0.0, dense_share=1.0,
        bias_share=0.1, channels=8, dead_channels=0, outlier_channels=0, spread=2.0,
    )  # fmt: skip
    return dataclasses.replace(usual, **more)


def one_sigmoid():
    graph = Graph()
    x = graph.input("x", (1, 4, 8))
    return graph.bytes([graph.op("LOGISTIC", [x], "y", (1, 4, 8))])


# --- figures


def test_noise_and_clipping_are_what_numpy_finds_in_the_same_values():
    graph = Graph()
    x = graph.input("x", (1, 6, 6, 1))
    weights = np.array([1.0, -2.0], np.float32).reshape(2, 1, 1, 1)
    y = graph.conv(x, weights, np.zeros(2, np.float32), "y", (1, 6, 6, 2))
    content = graph.bytes([y])
    batches = [[a[None]] for a in np.random.default_rng(0).normal(0, 1, (20, 6, 6, 1)).astype(np.float32)]  # fmt: skip
    narrow = {**collect_ranges(content, batches, where="f").table(), "y": (-1.5, 1.5)}
    int8 = quantize(content, narrow, output_dtype="float32")
    (row,) = layer_noise(content, int8, batches)

    expected = np.concatenate([b[0] * weights.reshape(2) for b in batches])
    (found,) = outputs_of(int8, batches, where="q")
    found = found.reshape(expected.shape)
    assert row.sqnr_db == pytest.approx(10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()), abs=0.05)  # fmt: skip
    low, high = row.scale_low, row.scale_high
    assert (low, high) == pytest.approx((-1.5, 1.5), abs=row.scale)
    assert row.clipped == pytest.approx(((expected < low) | (expected > high)).mean(), abs=0.01)
    assert row.clipped > 0.25
    assert (row.low, row.high) == pytest.approx((expected.min(), expected.max()), rel=1e-5)
    assert row.steps_used == pytest.approx((expected.max() - expected.min()) / row.scale, rel=1e-5)
    assert row.channels == 2


@pytest.mark.parametrize("name", NETS)
def test_the_sqnr_of_layers_is_that_of_the_stages_own_search_for_departures(name):
    net = NETS[name]()
    batches = [[x[None]] for x in net.calibration[:10]]
    ranges = collect_ranges(net.content, batches, where="f").table()
    int8 = quantize(net.content, ranges)
    found = {r.layer: r.sqnr_db for r in layer_noise(net.content, int8, batches)}
    wanted = {tensor: db for tensor, operator, db in departures(net.content, int8, batches) if operator != "QUANTIZE"}  # fmt: skip
    assert found == pytest.approx(wanted, abs=1e-6)


def test_an_error_that_is_one_and_the_same_is_bias_and_one_that_changes_sign_is_not():
    from edgepipe.tflite_ops.layer_noise import _Sums

    zeros = np.zeros((4, 5, 3))
    tensor = parse_model(one_sigmoid(), where="f").subgraphs[0].tensors[0]
    shifted, mixed = _Sums(), _Sums()
    shifted.add(zeros, zeros + np.array([0.5, -1.0, 2.0]), tensor)
    signs = np.where(np.arange(20) % 2, 1.0, -1.0).reshape(4, 5, 1)
    mixed.add(zeros, zeros + signs, tensor)
    assert shifted.bias_share() == pytest.approx(1.0)
    assert mixed.bias_share() == pytest.approx(0.0)


def test_a_value_beyond_the_last_of_65536_steps_is_clipped():
    """Half a step beyond the end still rounds to it, and a step of 16 bits is narrow."""
    graph = Graph()
    x = graph.input("x", (1, 1000))
    y = graph.op("MUL", [x, graph.const("one", np.array(1, np.float32))], "y", (1, 1000), "MulOptions")  # fmt: skip
    content = graph.bytes([y])
    batches = [[np.linspace(0, 1.001, 1000, dtype=np.float32)[None]]]
    ranges = {**collect_ranges(content, batches, where="f").table(), "y": (-1.0, 1.0)}
    wide = quantize(content, ranges, input_dtype="float32", output_dtype="float32", precision={"y": "int16"})  # fmt: skip
    (row,) = (r for r in layer_noise(content, wide, batches) if r.layer == "y")
    assert row.dtype == "int16"
    assert row.clipped == pytest.approx((batches[0][0] > row.scale_high + row.scale / 2).mean())


def test_noise_alone_is_told_of_layers_that_are_int8_and_of_no_others():
    net = detector_head()
    batches = [[x[None]] for x in net.calibration[:8]]
    ranges = collect_ranges(net.content, batches, where="f").table()
    plain = quantize(net.content, ranges, output_dtype="float32")
    mixed = quantize(net.content, ranges, output_dtype="float32", precision={"both": "int16"})
    alone = noise_alone(net.content, plain, batches)
    assert max(alone, key=alone.get) == "both"
    # one layer in int8 and nothing else: the whole noise of this net is nearly all of it
    whole = noise_share(outputs_of(net.content, batches, where="f"), outputs_of(plain, batches, where="q"))  # fmt: skip
    assert alone["both"] == pytest.approx(whole, rel=0.3)
    rest = noise_alone(net.content, mixed, batches)
    assert "both" not in rest
    assert max(rest.values()) < 0.01


# --- causes


CAUSES = {
    "dead_batch_norm": ("second", "equalise", "dead channel"),
    "wide_swish": ("first", "mixed", "its largest channel is"),
    "detector_head": ("both", "mixed", "times the median one"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_explain_names_the_cause_of_each_network_that_int8_ruins(name, tmp_path):
    net = NETS[name]()
    path = tmp_path / "float.tflite"
    path.write_bytes(net.content)
    np.savez(tmp_path / "x.npz", image=net.calibration)
    np.savez(tmp_path / "labelled.npz", image=net.samples, labels=net.labels)
    (tmp_path / "metric.py").write_text(
        "def scores(outputs, labels):\n"
        "    found = next(iter(outputs.values()))\n"
        "    return float((found[:, -10:].argmax(axis=1) == labels).mean())\n"
    )
    inputs, outputs = tensor_specs(path)
    model = make_artifact("tflite", path, inputs=inputs, outputs=outputs)
    data, labelled = (DataSource(kind="npz", path=tmp_path / f"{n}.npz", root=tmp_path) for n in ("x", "labelled"))  # fmt: skip
    int8 = plain_int8(model, data, tmp_path / "int8.tflite")
    found = explain_layers(model, int8, data, evaluation=labelled, metric="metric.py:scores", root=tmp_path)  # fmt: skip
    layer, rung, why = CAUSES[name]
    worst = found.at_fault[0]
    assert (worst.noise.layer, worst.rung) == (layer, rung)
    assert why in worst.why
    assert why in summary(found)[1]
    assert found.float_score - found.score > 0.04
    assert found.score == pytest.approx(net.accuracy(int8.path.read_bytes()))
    assert found.made_score == pytest.approx(found.score, abs=0.02)
    if name != "wide_swish":  # of several culprits one in float gives nothing back
        assert worst.score_if_float > found.float_score - 0.02
        assert worst.noise_if_float < 0.1
    harmless = {la.noise.layer for la in found.layers} - {la.noise.layer for la in found.at_fault}
    assert {"pool", "flat"} <= harmless
    assert as_dict(found)["at_fault"][0] == layer
    # the rung is the one that the ladder ends with (tests/e2e/test_rescue.py), and was tried
    assert [r.rung for r in found.rungs if r.held] == [rung] == [found.rungs[-1].rung]
    assert all(la.rung == rung and la.noise_after < 0.01 < la.noise_alone for la in found.at_fault)
    before = [r.noise_alone[layer] for r in found.rungs[:-1]]
    assert min(before) > 0.04
    assert found.rungs[-1].score > found.float_score - 0.01 > found.rungs[0].score
    assert found.rungs[0].noise == pytest.approx(found.output_noise, rel=0.05)
    assert found.rungs[-1].sqnr_db > found.sqnr_db + 1
    assert "tried:" in summary(found)[1]
    named = rungs_table(found)
    assert short_name(layer) + " alone" in named.header
    assert len(named.rows) == 1 + len(found.rungs)


@pytest.mark.slow
def test_without_labels_rungs_are_told_by_their_noise_and_not_as_points(tmp_path, caplog):
    net = NETS["dead_batch_norm"]()
    path = tmp_path / "float.tflite"
    path.write_bytes(net.content)
    np.savez(tmp_path / "x.npz", image=net.calibration)
    inputs, outputs = tensor_specs(path)
    model = make_artifact("tflite", path, inputs=inputs, outputs=outputs)
    data = DataSource(kind="npz", path=tmp_path / "x.npz", root=tmp_path)
    caplog.set_level(logging.INFO)
    explain_layers(model, plain_int8(model, data, tmp_path / "int8.tflite"), data, root=tmp_path)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rung plain")]
    assert "of the signal, does not hold" in told[0]
    assert "points" not in told[0]


@pytest.mark.parametrize(
    ("change", "rung", "word"),
    [
        ({"clipped": 0.02}, "ranges", "outside -1 to 1"),
        ({"low": -0.1, "high": 0.1}, "ranges", "use 26 of 255 steps"),
        ({"low": 0.9, "high": 1.0}, "mixed", "from 0.9 to 1, far from 0"),
        ({"low": 0.001, "high": 0.1}, "ranges", "use 13 of 255 steps"),
        ({"outlier_channels": 2, "spread": 100.0}, "mixed", "100 times the median"),
        ({"dense_share": 0.1}, "ranges", "far out"),
        ({"bias_share": 0.8}, "bias", "80%"),
        ({}, "rounding", "nothing that stands out"),
    ],
)
def test_each_cause_has_its_rung(change, rung, word):
    why, found = advise(noise(**change), NOTHING, ())
    assert found == rung
    assert word in why


def test_a_wide_tensor_is_blamed_on_its_reader_too_and_equalised_where_that_can_be():
    wide = noise("swish", outlier_channels=3, spread=150.0)
    why, rung = advise(noise(), NOTHING, [wide])
    assert "of its input 'swish'" in why
    assert rung == "mixed"
    assert advise(noise(), Repairs(frozenset({"swish"}), {}), [wide])[1] == "equalise"
    assert advise(noise(), Repairs(frozenset(), {"conv": "it multiplies"}), [wide]) == ("it multiplies", "equalise")  # fmt: skip


def test_files_that_cannot_be_compared_are_refused_by_name():
    net = detector_head()
    batches = [[x[None]] for x in net.calibration[:4]]
    int8 = quantize(net.content, collect_ranges(net.content, batches, where="f").table())
    with pytest.raises(StageError, match=r"a\.tflite is quantized already"):
        comparable(int8, net.content, where=("a.tflite", "b.tflite"))
    with pytest.raises(ArtifactError, match=r"no activation of b\.tflite is quantised"):
        comparable(net.content, net.content, where=("a.tflite", "b.tflite"))
    weights = make_precision(net.content, "weight_int8", where="b.tflite")
    with pytest.raises(ArtifactError, match=r"b\.tflite is quantised, only weights") as caught:
        comparable(net.content, weights, where=("a.tflite", "b.tflite"))
    assert "edgepipe quantize --all" in caught.value.hint
    graph = parse_model(net.content, where="f").subgraphs[0]
    others = {
        index: np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
        for index, values in constants(net.content, graph).items()
        if values.dtype == np.float32 and values.ndim > 1
    }
    trained_anew = with_constants(net.content, others)
    with pytest.raises(ArtifactError, match=r"b\.tflite was not made from a\.tflite: .*weights are others"):  # fmt: skip
        comparable(trained_anew, int8, where=("a.tflite", "b.tflite"))
    with pytest.raises(ArtifactError, match="no tensor in common"):
        comparable(one_sigmoid(), int8, where=("a.tflite", "b.tflite"))


# --- the page


TRIED = (
    TriedRung("plain", "", 0.5, 3.0, None, False, True, {"a": 0.4, "b": 0.2}),
    TriedRung("ranges", "", 0.6, 3.0, None, False, False, {"a": 0.001, "b": 0.2}),
    TriedRung("equalise", "", 0.2, 7.0, None, False, True, {"a": 0.002, "b": 0.03}),
)


@pytest.mark.parametrize(
    ("layer", "held", "rung", "left"),
    [
        ("a", False, "equalise", 0.002),  # not ranges, which was undone as it made the rest worse
        ("b", True, "equalise", 0.03),  # the model holds in spite of it
        ("b", False, "qat", 0.03),
        ("c", False, "bias", None),  # not among the worst, so not tried
    ],
)
def test_a_layer_gets_the_first_rung_that_stands_and_mends_it(layer, held, rung, left):
    rungs = (*TRIED[:2], dataclasses.replace(TRIED[2], held=held))
    told = _with_tried_rung(Layer(noise(layer), 0.4, why="w", rung="bias"), rungs)
    assert (told.rung, told.noise_after) == (rung, left)


def test_a_model_that_holds_as_it_is_leaves_rungs_to_the_rule():
    holds = (dataclasses.replace(TRIED[0], held=True),)
    layer = Layer(noise("a"), 0.4, why="w", rung="bias")
    assert _with_tried_rung(layer, holds) == layer
    assert "bias (by rule, not tried)" in summary(explanation(layer))[1]
    assert "it holds" not in summary(explanation(layer))[0]
    mended = dataclasses.replace(explanation(layer), output_noise=0.001)
    assert "as it is, it holds" in summary(mended)[0]


def explanation(*layers):
    return Explanation(tuple(layers), 32, "npz x", 20.0, 0.1, 0.8, 0.9, 0.1, 0.8, "top1")


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.words, self.attributes = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


names = st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)


@given(names, st.floats(-200, 200), st.floats(0, 1))
def test_no_name_of_a_layer_gets_out_of_its_text(name, sqnr_db, alone):
    hostile = f"<script>'{name}'</script>\"&"
    layer = Layer(noise(hostile, sqnr_db=sqnr_db), alone, why=hostile, rung="bias")
    plain = Layer(noise("plain", sqnr_db=sqnr_db), alone, why="plain", rung="bias")
    table = Table(hostile, ("h",), ((hostile,),))
    page = read(html_report(explanation(layer), title=hostile, tables=[table]))
    like = read(html_report(explanation(plain), title="t", tables=[Table("t", ("h",), (("c",),))]))
    assert page.tags == like.tags
    assert "script" not in page.tags
    assert hostile in page.words  # the table's title
    assert short_name(hostile) in page.words


def test_long_names_of_fused_operators_are_shortened_in_text_and_whole_in_json():
    fused = "model/activation/Relu;model/batch_normalization/FusedBatchNormV3;model/conv2d/BiasAdd"
    found = explanation(Layer(noise(fused), 0.5, why="w", rung="bias"))
    assert layers_table(found).rows[0][0] == "model/activation/Relu"
    assert "'model/activation/Relu' alone puts" in summary(found)[1]
    assert as_dict(found)["layers"][0]["layer"] == fused
    assert len(short_name("x" * 100)) == 40


def test_the_page_loads_nothing_and_shows_every_layer():
    layers = [Layer(noise(f"layer{i}"), 0.5 if i == 3 else 1e-4, why="w", rung="bias") for i in range(60)]  # fmt: skip
    page = html_report(explanation(*layers), title="net")
    assert len(page) < 100_000
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not [v for k, v in reader.attributes if k in ("src", "href", "style", "onload")]
    assert not re.search(r"https?:|url\(|@import", page)
    assert reader.tags.count("svg") == 2
    assert all(f"layer{i}" in reader.words for i in range(60))
    assert 'class="bad"' in page


def test_a_layer_in_float_has_no_range_and_no_scale():
    page = html_report(explanation(Layer(noise(scale=0.0, dtype="float32"))), title="net")
    assert "float" in read(page).words


# --- operators


def test_an_operator_that_is_not_delegated_has_a_reason():
    assert "16-bit" in why_builtin("CONV_2D", frozenset({"int16"}))
    assert "no kernel for GATHER" in why_builtin("GATHER", frozenset({"int8"}))
    assert "types, shapes or options" in why_builtin("CONV_2D", frozenset({"int8"}))


def test_a_file_whose_operators_were_rewritten_is_compared_with_what_it_was_made_from():
    graph = Graph()
    x = graph.input("x", (1, 4, 8))
    y = graph.op("NEG", [x], "negative", (1, 4, 8))
    content = graph.bytes([graph.op("LOGISTIC", [y], "y", (1, 4, 8))])
    batches = [[a[None]] for a in np.random.default_rng(0).normal(0, 1, (20, 4, 8)).astype(np.float32)]  # fmt: skip
    written, told = rewrite(content, where="f")
    assert told
    int8 = quantize(written, collect_ranges(written, batches, where="f").table())
    best = comparable(content, int8, where=("a", "b"))
    rows = layer_noise(best, int8, batches)
    assert [r.operator for r in rows] == ["MUL", "LOGISTIC"]
    assert all(r.sqnr_db > 30 for r in rows)
    plain = quantize(one_sigmoid(), {"x": (-3, 3), "y": (0, 1)})
    assert comparable(one_sigmoid(), plain, where=("a", "b")) == one_sigmoid()


def test_the_infinities_of_padding_are_no_noise():
    """A max pool with padding, as the stem of every ResNet has it, pads with -inf."""
    rng = np.random.default_rng(0)
    g = Graph()
    x = g.input("x", (1, 6, 6, 3))
    c = g.conv(x, rng.normal(0, 0.5, (4, 3, 3, 3)).astype(np.float32), np.zeros(4, np.float32), "conv", (1, 6, 6, 4))  # fmt: skip
    edges = g.const("edges", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    lowest = g.const("lowest", np.array([-np.inf], np.float32))
    padded = g.op("PADV2", [c, edges, lowest], "padded", (1, 8, 8, 4), "PadV2Options")
    pool = {"padding": 1, "strideW": 2, "strideH": 2, "filterWidth": 3, "filterHeight": 3}
    content = g.bytes([g.op("MAX_POOL_2D", [padded], "y", (1, 3, 3, 4), "Pool2DOptions", **pool)])
    batches = [[rng.normal(size=(1, 6, 6, 3)).astype(np.float32)] for _ in range(4)]
    int8 = quantize(content, collect_ranges(content, batches, where="m").table())
    rows = {row.layer: row for row in layer_noise(content, int8, batches)}
    # what is padded is the convolution's, bit for bit
    assert rows["padded"].sqnr_db == rows["conv"].sqnr_db
    assert (rows["padded"].added, rows["padded"].clipped) == (0, 0)
    assert rows["padded"].spread == rows["conv"].spread
    assert {tensor: db for tensor, _, db in departures(content, int8, batches)} == {
        name: row.sqnr_db for name, row in rows.items()
    }
