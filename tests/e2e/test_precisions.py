"""Stage quantize: every precision on a network that reads digits, run by LiteRT; what its record says."""

import json

import numpy as np
import pytest

from edgepipe import cli
from edgepipe.artifact import make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import DataError, StageError, StageOptionError
from edgepipe.frontier import PRECISIONS
from edgepipe.predict import predict
from edgepipe.schema import build
from edgepipe.stage import StageContext
from edgepipe.stages.quantize import Quantize
from edgepipe.tflite_ops.inspect import describe, read_model, tensor_specs
from edgepipe.tflite_ops.precisions import NAMES
from edgepipe.tflite_ops.run import open_tflite

from ..unit.hostile_nets import detector_head, wide_swish
from ..unit.tflite_builder import Graph

pytestmark = pytest.mark.slow


@pytest.fixture
def quantise(tmp_path):
    """Run the stage on a net's bytes with samples (n, 8, 8, 1)."""

    def run(content, samples, *, source=None, **options):
        (tmp_path / "float.tflite").write_bytes(content)
        np.savez(tmp_path / "x.npz", image=samples)
        inputs, outputs = tensor_specs(tmp_path / "float.tflite")
        model = make_artifact("tflite", tmp_path / "float.tflite", inputs=inputs, outputs=outputs)
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        source = source or DataSource(kind="npz", path=tmp_path / "x.npz")
        context = StageContext(work, {"calibration": source}, 0, tmp_path / "log")
        stage = build(Quantize, options, where="test", error=StageOptionError)
        return model, stage.run(model, context)

    return run


# Bytes of the float file that are left at most: weights are most of it, and headers stay.
SHARES = {"dynamic_int8": 0.4, "weight_int8": 0.4, "weight_int4": 0.3, "float16": 0.6, "int16x8": 0.4}  # fmt: skip


@pytest.mark.parametrize("precision", NAMES)
def test_every_precision_shrinks_the_file_and_keeps_its_answers(quantise, precision):
    net = wide_swish()
    model, result = quantise(net.content, net.calibration, precision=precision, min_sqnr="3 dB")
    facts = result.facts
    assert facts["bytes"] == {"before": model.size_bytes, "after": result.size_bytes}
    assert result.size_bytes < SHARES[precision] * model.size_bytes
    assert [s.dtype for s in (*result.inputs, *result.outputs)] == ["float32", "float32"]
    assert result.inputs == model.inputs
    (expected,), (found,) = (predict(m, {"image": net.samples}).values() for m in (model, result))
    agreement = (expected.argmax(axis=1) == found.argmax(axis=1)).mean()
    # 4 bits, and activations that 8 bits cannot hold (which this net is about), cost more
    assert agreement > {"weight_int4": 0.85, "dynamic_int8": 0.7}.get(precision, 0.99)
    assert facts["parity"]["outputs"]["scores"]["sqnr_db"] > 3
    assert facts["float_weights"] == []
    # weights of fewer bits leave the arithmetic in float, and no gate may take them for integer files
    assert describe(result.path).is_full_integer == (precision == "int16x8")
    assert bool(facts["float_operators"]) == (precision != "int16x8")


@pytest.mark.parametrize(
    ("precision", "operator", "version", "tflite"),
    [
        ("dynamic_int8", "FULLY_CONNECTED", 12, "2.17.0"),
        ("weight_int8", "DEQUANTIZE", 5, "2.7.0"),
        ("weight_int4", "DEQUANTIZE", 6, "2.18.0"),
        ("float16", "DEQUANTIZE", 3, "1.15.0"),
    ],
)
def test_a_runtime_without_the_kernels_is_named_and_refuses_the_file(quantise, precision, operator, version, tflite):  # fmt: skip
    net = detector_head()
    _, result = quantise(net.content, net.calibration, precision=precision)
    need = next(n for n in result.facts["runtime_needs"] if n["operator"] == operator)
    assert (need["version"], need["tflite"]) == (version, tflite)
    # what TensorFlow Lite checks before it runs anything, however good its kernels are
    assert {o.version for o in read_model(result.path).subgraphs[0].operators if o.name == operator} == {version}  # fmt: skip
    open_tflite(result.path).invoke()


def test_a_layer_without_a_form_of_four_bits_gets_eight(quantise):
    rng = np.random.default_rng(0)
    graph = Graph()
    x = graph.input("image", (1, 8, 8, 1))
    y = graph.conv(x, rng.normal(0, 1, (20, 3, 3, 1)).astype(np.float32), np.zeros(20, np.float32), "first", (1, 8, 8, 20))  # fmt: skip
    axes = graph.const("axes", np.array([1, 2], np.int32))
    y = graph.op("MEAN", [y, axes], "mean", (1, 20), "ReducerOptions", keepDims=False)
    # 20 inputs are no multiple of a block of 32, 160 are
    y = graph.dense(y, rng.normal(0, 1, (160, 20)).astype(np.float32), np.zeros(160, np.float32), "odd", (1, 160))  # fmt: skip
    y = graph.dense(y, rng.normal(0, 1, (10, 160)).astype(np.float32), np.zeros(10, np.float32), "even", (1, 10))  # fmt: skip
    samples = rng.normal(0, 1, (40, 8, 8, 1)).astype(np.float32)
    _, result = quantise(graph.bytes([y]), samples, precision="weight_int4")
    tensors = {t.name: t for t in read_model(result.path).subgraphs[0].tensors if t.is_constant}
    assert {tensors[f"{n}/w"].dtype for n in ("first", "odd", "even")} == {"int4"}
    operators = [o.name for o in read_model(result.path).subgraphs[0].operators]
    assert operators.count("DEQUANTIZE") == 2  # the blocks are read by the dense layer itself


def test_hard_swish_computes_in_sixteen_bits(quantise):
    rng = np.random.default_rng(0)
    graph = Graph()
    x = graph.input("image", (1, 8, 8, 1))
    y = graph.conv(x, rng.normal(0, 9, (64, 3, 3, 1)).astype(np.float32), np.zeros(64, np.float32), "first", (1, 8, 8, 64))  # fmt: skip
    y = graph.op("HARD_SWISH", [y], "swish", (1, 8, 8, 64), "HardSwishOptions")
    y = graph.conv(y, rng.normal(0, 1, (32, 3, 3, 64)).astype(np.float32), np.zeros(32, np.float32), "second", (1, 8, 8, 32))  # fmt: skip
    samples = rng.normal(0, 1, (40, 8, 8, 1)).astype(np.float32)
    _, result = quantise(graph.bytes([y]), samples, precision="int16x8", min_sqnr="40 dB")
    assert describe(result.path).is_full_integer


def test_the_variance_of_a_layer_norm_computes_in_sixteen_bits(quantise):
    graph = Graph()
    x = graph.input("image", (1, 64))
    square = graph.op("SQUARED_DIFFERENCE", [x, graph.const("mean", np.zeros(1, np.float32))], "square", (1, 64))  # fmt: skip
    y = graph.op("FULLY_CONNECTED", [square, graph.const("w", np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32))], "y", (1, 64), "FullyConnectedOptions")  # fmt: skip
    samples = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    _, result = quantise(graph.bytes([y]), samples, precision="int16x8", min_sqnr="35 dB")
    assert describe(result.path).is_full_integer


def test_a_file_that_departs_too_far_is_refused_with_its_distance(quantise):
    net = wide_swish()
    with pytest.raises(
        StageError, match=r"weight_int4 output 'scores' is .* dB from the float model"
    ) as caught:
        quantise(net.content, net.calibration, precision="weight_int4", min_sqnr="60 dB")
    assert caught.value.code == "parity"


def test_a_model_without_weights_gains_nothing_and_says_so(quantise):
    graph = Graph()
    x = graph.input("image", (1, 8, 8, 1))
    y = graph.op("LOGISTIC", [x], "y", (1, 8, 8, 1))
    with pytest.raises(StageError, match="no smaller") as caught:
        quantise(graph.bytes([y]), np.zeros((9, 8, 8, 1), np.float32), precision="float16")
    assert caught.value.code == "nothing-gained"


def test_ranges_of_sixteen_bits_are_not_taken_from_noise(quantise):
    net = detector_head()
    with pytest.raises(DataError, match="random"):
        quantise(net.content, net.calibration, precision="int16x8", source=DataSource(kind="random", limit=20))  # fmt: skip


def test_an_unknown_precision_is_refused_with_the_legal_ones():
    with pytest.raises(StageOptionError, match="int4"):
        build(Quantize, {"precision": "int4"}, where="test", error=StageOptionError)


def test_all_precisions_side_by_side_where_one_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    net = detector_head()
    (tmp_path / "net.tflite").write_bytes(net.content)
    np.savez("cal.npz", image=net.calibration)
    np.savez("eval.npz", image=net.samples)
    asked = ["quantize", "net.tflite", "--data", "cal.npz", "--evaluate", "eval.npz", "--all", "--allow-random", "--json"]  # fmt: skip
    # an int8 door of a box and a score: nothing is left of the scores, and SQNR does not see it
    assert (
        cli.main([*asked, "--output", "out", "--device", "null://quiet", "--session", "0.1 s"]) == 0
    )
    told = capsys.readouterr()
    assert "no labels, so agreement with the float file is all that is told" in told.err
    found = json.loads(told.out)
    rows = {row["precision"]: row for row in found["precisions"]}
    assert list(rows) == list(PRECISIONS)
    for name, row in rows.items():
        assert not row["error"]
        assert row["size_bytes"] == (tmp_path / "out" / f"{name}.tflite").stat().st_size
        assert row["latency_s"] > 0
        assert row["memory_bytes"] > 0
        assert row["score"] is None  # no labels were given
    assert any(row["on_frontier"] for row in rows.values())

    # Neither a device nor a folder is demanded; an island in float keeps int8 from being made
    graph = Graph()
    x = graph.input("image", (1, 8, 8, 1))
    y = graph.conv(x, np.ones((40, 3, 3, 1), np.float32), np.zeros(40, np.float32), "first", (1, 8, 8, 40))  # fmt: skip
    y = graph.op("SIN", [y], "signs", (1, 8, 8, 40))
    (tmp_path / "net.tflite").write_bytes(graph.bytes([y]))
    assert cli.main(asked) == 0
    rows = {row["precision"]: row for row in json.loads(capsys.readouterr().out)["precisions"]}
    assert "SIN" in rows["int8"]["error"]
    assert not (tmp_path / "net_precisions" / "int8.tflite").exists()
    assert rows["dynamic_int8"]["error"] == ""
    assert rows["dynamic_int8"]["latency_s"] is None


def test_a_device_without_all_is_refused(tmp_path, capsys):
    assert cli.main(["quantize", "net.tflite", "--data", "x.npz", "--device", "local"]) == 2
    assert "--all" in capsys.readouterr().err


def test_labels_that_do_not_fit_are_found_before_anything_is_quantised(tmp_path, monkeypatch, capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    net = wide_swish()
    (tmp_path / "net.tflite").write_bytes(net.content)
    np.savez("cal.npz", image=net.calibration)
    np.savez("eval.npz", image=net.samples, labels=net.labels + 5)
    asked = ["quantize", "net.tflite", "--data", "cal.npz", "--evaluate", "eval.npz", "--all"]
    assert cli.main(asked) == 2
    assert "labels go from 5 to 14" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "net_precisions").iterdir()] == ["float32.tflite"]


@pytest.mark.parametrize(("judged_by", "told"), [("cal.npz", "are the same source"), ("copy.npz", "samples in common")])  # fmt: skip
def test_precisions_are_not_judged_by_the_samples_that_ranges_are_taken_from(tmp_path, monkeypatch, capsys, judged_by, told):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    net = wide_swish()
    (tmp_path / "net.tflite").write_bytes(net.content)
    labels = np.zeros(len(net.calibration), np.int64)
    np.savez("cal.npz", image=net.calibration, labels=labels)
    np.savez("copy.npz", image=net.calibration[::2], labels=labels[::2])
    asked = ["quantize", "net.tflite", "--data", "cal.npz", "--evaluate", judged_by, "--all"]
    assert cli.main(asked) == 2
    assert told in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "net_precisions").iterdir()] == ["float32.tflite"]


RECIPE = """
schema = 1
name = "weights"
[model]
file = "net.tflite"
[data.calibration]
kind = "npz"
path = "cal.npz"
[data.test]
kind = "npz"
path = "eval.npz"
[evaluate]
data = "test"
metric = "top1"
[[stages]]
stage = "quantize"
precision = "weight_int8"
[[gates]]
gate = "accuracy_drop"
max = "1 point"
[[gates]]
gate = "full_integer"
"""


def test_in_a_recipe_it_is_judged_like_int8_and_is_no_integer_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = wide_swish()
    (tmp_path / "net.tflite").write_bytes(net.content)
    np.savez("cal.npz", image=net.calibration)
    np.savez("eval.npz", image=net.samples, labels=net.labels)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert cli.main(["run", "recipe.toml", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    verdicts = {v["gate"]: v["status"] for v in found["verdicts"]}
    assert verdicts == {"accuracy_drop": "PASS", "full_integer": "FAIL"}
