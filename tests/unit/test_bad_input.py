"""Input that would waste a long run, or give a wrong answer without an error: told at once."""

import dataclasses
import logging

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import cli, host_memory
from edgepipe.array_ops.load import Samples
from edgepipe.artifact import make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, DataError, StageError
from edgepipe.evaluate import evaluate
from edgepipe.host_memory import available_bytes, check_fits
from edgepipe.input_range import check_input_range
from edgepipe.pipeline import run
from edgepipe.predict import predict
from edgepipe.recipe import load_recipe
from edgepipe.rescue import kept_hashes
from edgepipe.stage import StageContext
from edgepipe.stages.load import LoadModel, ModelSource
from edgepipe.store import Store
from edgepipe.tflite_ops.inspect import tensor_specs
from edgepipe.tflite_ops.onnx_model import read_onnx
from edgepipe.tflite_ops.quantize import collect_ranges

from .tflite_builder import Graph, small_cnn

GIB = 1 << 30


# --- a model that is too new, or too large


@pytest.mark.parametrize(("opset", "ir_version"), [(99, 10), (18, 99)])
def test_an_onnx_file_that_is_newer_than_this_host_says_so(tmp_path, opset, ir_version):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )  # fmt: skip
    path = tmp_path / "new.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)  # fmt: skip
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"new\.onnx is of ONNX opset") as caught:
        read_onnx(path)
    assert caught.value.code == "opset-too-new"


def fake_host(root, *, free_kib, files):
    """A /proc and /sys/fs/cgroup."""
    texts = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {free_kib} kB\n", **files}
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/memory.max": f"{2 * GIB}\n",
    "sys/fs/cgroup/job/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB // 4}\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": f"{GIB}\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n0::/\n",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}",
    "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB // 2}",
    "sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, 8 * GIB), (V2, GIB + GIB // 4), (V1, 3 * GIB // 4), ({"proc/self/cgroup": "odd"}, 8 * GIB)],
)  # fmt: skip
def test_free_memory_is_the_least_of_the_hosts_and_its_control_groups(tmp_path, files, expected):
    assert available_bytes(fake_host(tmp_path, free_kib=8 * GIB // 1024, files=files)) == expected


def test_a_host_that_does_not_tell_its_memory_refuses_nothing(tmp_path):
    assert available_bytes(tmp_path) is None
    (tmp_path / "model").write_bytes(b"x")
    check_fits([tmp_path / "model"], root=tmp_path)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.onnx"
    with path.open("wb") as stream:
        stream.truncate(3 * GIB)  # takes no room on the disk; reading it would take 3 GiB
    monkeypatch.setattr(host_memory, "available_bytes", lambda root: 8 * GIB)
    work = tmp_path / "work"
    work.mkdir()
    context = StageContext(work_dir=work, data={}, seed=0, log_path=tmp_path / "log")
    with pytest.raises(ArtifactError, match=r"takes about 9\.66 GB") as caught:
        LoadModel(ModelSource(file=path)).run(context)
    assert caught.value.code == "larger-than-memory"


def test_weights_beside_an_onnx_file_count_as_well(tmp_path, monkeypatch):
    weights = np.ones((256, 256), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    read_onnx(path)
    monkeypatch.setattr(host_memory, "available_bytes", lambda root: weights.nbytes)
    with pytest.raises(ArtifactError) as caught:
        read_onnx(path)
    assert caught.value.code == "larger-than-memory"


# --- data of another range, or seen before


def classifier(tmp_path):
    """Knows which of 4 values is the largest, of inputs from -1 to 1; beyond 1 it saturates."""
    g = Graph()
    x = g.input("x", (1, 4))
    clamped = g.op("RELU_N1_TO_1", [x], "clamped", (1, 4))
    path = tmp_path / "float.tflite"
    eye, zeros = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    path.write_bytes(g.bytes([g.dense(clamped, eye, zeros, "y", (1, 4))]))
    inputs, outputs = tensor_specs(path)
    return make_artifact("tflite", path, inputs=inputs, outputs=outputs)


def pixels(count=200):
    """(count, 4) from 0 to 255, and which is the largest."""
    values = np.random.default_rng(0).integers(0, 256, (count, 4)).astype(np.float32)
    return values, values.argmax(axis=1)


def accuracy(model, values, labels):
    return float((predict(model, {"x": values})["y"].argmax(axis=1) == labels).mean())


def check(model, values, labels, tmp_path):
    samples = Samples({"x": values}, labels, (), origin="x.npz")
    score = accuracy(model, values, labels)
    check_input_range(model, samples, metric="top1", score=score, root=tmp_path)
    return score


def test_pixels_given_to_a_network_that_wants_minus_one_to_one_are_found_out(tmp_path):
    model = classifier(tmp_path)
    values, labels = pixels()
    assert accuracy(model, values, labels) < 0.4
    with pytest.raises(DataError, match=r"right, and \d+ if they are divided by (255|127\.5)") as caught:  # fmt: skip
        check(model, values, labels, tmp_path)
    assert caught.value.code == "wrong-range"
    assert "from 0 to 255" in caught.value.message


def test_data_in_the_right_range_and_a_model_that_knows_nothing_are_left_alone(tmp_path):
    model = classifier(tmp_path)
    values, labels = pixels()
    assert check(model, values / 127.5 - 1, labels, tmp_path) > 0.95
    assert check(model, values, np.random.default_rng(1).permutation(labels), tmp_path) < 0.4


def test_a_model_that_is_right_more_often_than_not_may_still_get_the_wrong_range(tmp_path):
    values, labels = pixels()
    samples = Samples({"x": values}, labels, (), origin="x.npz")
    with pytest.raises(DataError, match="trained on another range"):
        check_input_range(classifier(tmp_path), samples, metric="top1", score=0.7, root=tmp_path)


def test_an_evaluation_in_another_range_is_an_error_and_not_a_low_score(tmp_path):
    model = classifier(tmp_path)
    values, labels = pixels()
    np.savez(tmp_path / "d.npz", x=values, labels=labels)
    roles = dict.fromkeys(("shipped", "float_model", "reference"), model)
    with pytest.raises(DataError) as caught:
        evaluate(**roles, inputs=model.inputs, source=DataSource(kind="npz", path=tmp_path / "d.npz"), metric="top1", root=tmp_path)  # fmt: skip
    assert caught.value.code == "wrong-range"


def test_samples_that_the_ranges_were_taken_from_are_counted_and_told(tmp_path, caplog):
    values, labels = pixels(60)
    values = values / 127.5 - 1
    np.savez(tmp_path / "d.npz", x=values, labels=labels)
    seen = kept_hashes(Samples({"x": values[:20]}, None, (), origin=""))
    model = classifier(tmp_path)
    model = dataclasses.replace(model, facts={"calibration_samples": list(seen)})
    roles = dict.fromkeys(("shipped", "float_model", "reference"), model)
    with caplog.at_level(logging.WARNING, logger="edgepipe"):
        found = evaluate(**roles, inputs=model.inputs, source=DataSource(kind="npz", path=tmp_path / "d.npz"), metric="top1", root=tmp_path)  # fmt: skip
    assert found[0].context["calibration_samples_in_common"] == 20
    assert "20 of the 60 evaluation samples" in caplog.text


def test_a_streaming_file_is_not_evaluated_from_fresh_state(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((3, 4), np.float32))
    model = dataclasses.replace(classifier(tmp_path), facts={"streaming": True})
    roles = dict.fromkeys(("shipped", "float_model", "reference"), model)
    with pytest.raises(ArtifactError) as caught:
        evaluate(**roles, inputs=model.inputs, source=DataSource(kind="npz", path=tmp_path / "d.npz"), metric="top1", root=tmp_path)  # fmt: skip
    assert caught.value.code == "streaming"


SEEN_RECIPE = """
schema = 1
[model]
file = "float.tflite"
[data.calibration]
kind = "npz"
path = "calibration.npz"
[data.test]
kind = "npz"
path = "test.npz"
[[stages]]
stage = "quantize_int8"
[evaluate]
data = "test"
metric = "top1"
"""


@pytest.mark.parametrize(
    ("common", "refused"), [(200, "200 samples in common"), (20, "20 samples in common"), (19, "")]
)
def test_an_evaluation_set_that_is_the_calibration_set_under_another_name_is_refused_before_long_work(
    tmp_path, caplog, common, refused
):
    classifier(tmp_path)
    values, labels = pixels(400)
    values = values / 127.5 - 1
    np.savez(tmp_path / "calibration.npz", x=values[:200])
    chosen = slice(200 - common, 400 - common)
    np.savez(tmp_path / "test.npz", x=values[chosen], labels=labels[chosen])
    (tmp_path / "r.toml").write_text(SEEN_RECIPE)
    recipe, store = load_recipe(tmp_path / "r.toml"), Store(tmp_path / "store")
    if not refused:
        run(recipe, store)
        assert "19 samples are in both" in caplog.text
        return
    for _ in range(2):  # what was refused once is not kept as good
        with pytest.raises(DataError, match=refused) as caught:
            run(recipe, store)
        assert caught.value.code == "evaluation-is-calibration"
    assert [step["step"] for step in store.runs()[-1].read()["steps"]] == ["load"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            lambda y: y + 100,
            r"\[data\.test\] \(npz test\.npz: 200 samples\): labels go from 100 to",
        ),
        (lambda y: y + 0.5, r"\[data\.test\] .* need class numbers as labels, got float64"),
    ],
)
def test_labels_that_do_not_fit_the_model_are_told_before_long_work(tmp_path, labels, said):
    classifier(tmp_path)
    values, known = pixels(400)
    values = values / 127.5 - 1
    np.savez(tmp_path / "calibration.npz", x=values[:200])
    np.savez(tmp_path / "test.npz", x=values[200:], labels=labels(known[200:]))
    (tmp_path / "r.toml").write_text(SEEN_RECIPE)
    recipe, store = load_recipe(tmp_path / "r.toml"), Store(tmp_path / "store")
    for _ in range(2):
        with pytest.raises(DataError, match=said):
            run(recipe, store)
    assert [step["step"] for step in store.runs()[-1].read()["steps"]] == ["load"]


def test_one_file_with_two_choices_of_samples_is_one_source(tmp_path):
    classifier(tmp_path)
    values, labels = pixels(400)
    np.savez(tmp_path / "test.npz", x=values / 127.5 - 1, labels=labels)
    text = SEEN_RECIPE.replace('"calibration.npz"', '"test.npz"\nlimit = 10')
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(DataError, match="are the same source"):
        run(load_recipe(tmp_path / "r.toml"), Store(tmp_path / "store"))


# --- errors name what the user gave


def refusal(capsys, *argv):
    assert cli.main(list(argv)) == 2
    told = capsys.readouterr().err
    assert "hint: " in told
    assert ".edgepipe" not in told
    return told


def test_an_operator_that_nobody_knows_is_told_with_the_users_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    graph = helper.make_graph(
        [helper.make_node("Magic", ["x"], ["y"], domain="acme")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), "odd.onnx")
    np.savez("x.npz", x=np.zeros((16, 2), np.float32))
    told = refusal(capsys, "convert", "odd.onnx", "--data", "x.npz")
    assert f"{tmp_path}/odd.onnx" in told
    assert "acme:Magic" in told


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:60] + b"Z" * len(b)])
def test_a_damaged_file_is_told_by_the_name_it_was_given_by(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(damage(small_cnn()))
    np.savez("x.npz", x=np.zeros((16, 6, 6, 3), np.float32))
    told = refusal(capsys, "quantize", "net.tflite", "--data", "x.npz")
    assert f"{tmp_path}/net.tflite is a damaged or truncated TFLite model" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('kind = "images"\npath = "absent"\n[image]\nsize = [6, 6]\n', "absent does not exist"),
        ('kind = "images"\npath = "."\n', "images need a declared preprocessing"),
        ('kind = "python"\nfunction = "absent.py:f"\n', "absent.py does not exist"),
        ('kind = "npz"\n', "needs a path"),
    ],
)
def test_a_data_file_of_the_command_line_is_checked_like_a_recipe(
    text, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(small_cnn())
    (tmp_path / "data.toml").write_text(text)
    assert told in refusal(capsys, "quantize", "net.tflite", "--data", "data.toml")


def test_a_sample_that_is_no_number_judges_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(small_cnn())
    x = np.random.default_rng(0).normal(size=(140, 6, 6, 3)).astype(np.float32)
    np.savez("seen.npz", x=x[:40])
    x[57, 0, 0, 0] = np.nan
    np.savez("labelled.npz", x=x[40:], labels=np.zeros(100, int))
    more = ["--data", "seen.npz", "--evaluate", "labelled.npz"]
    told = "input 'x' has NaN in sample 17"
    assert told in refusal(capsys, "quantize", "net.tflite", *more, "--max-drop", "1 point")
    assert told in refusal(capsys, "explain", "net.tflite", *more)


def test_nothing_is_explained_by_samples_that_are_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(small_cnn())
    one = np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype(np.float32)
    np.savez("same.npz", x=np.repeat(one, 9, axis=0))
    told = refusal(capsys, "explain", "net.tflite", "--data", "same.npz")
    assert "all 9 samples of input 'x' are the same" in told


def test_a_nan_that_calibration_is_given_is_not_blamed_on_the_model():
    batches = [[np.full((1, 6, 6, 3), np.nan, np.float32)]]
    with pytest.raises(StageError, match="input 'x' is NaN for calibration sample 0") as caught:
        collect_ranges(small_cnn(), batches, where="net")
    assert caught.value.hint.startswith("remove this sample")
