"""edgepipe explain as a user runs it: text, JSON, page, operators on a device, and what it refuses."""

import json

import numpy as np
import pytest

from edgepipe import cli
from edgepipe.tflite_ops.quantize import collect_ranges, quantize

from ..unit.hostile_nets import dead_batch_norm, detector_head

pytestmark = pytest.mark.slow


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = dead_batch_norm()
    batches = [[x[None]] for x in net.calibration]
    int8 = quantize(net.content, collect_ranges(net.content, batches, where="f").table())
    (tmp_path / "net.tflite").write_bytes(net.content)
    (tmp_path / "int8.tflite").write_bytes(int8)
    np.savez("x.npz", image=net.calibration)
    np.savez("labelled.npz", image=net.samples, labels=net.labels)
    return tmp_path


def test_the_culprit_its_cause_and_what_it_costs_in_text_json_and_html(files, capsys):
    asked = ["explain", "net.tflite", "int8.tflite", "--data", "x.npz", "--evaluate", "labelled.npz"]  # fmt: skip
    assert cli.main([*asked, "--html", "why.html", "--device", "local", "--session", "0.1 s"]) == 0
    text = capsys.readouterr().out
    assert "CONV_2D 'second' alone puts" in text
    assert "rung: equalise (tried: " in text
    assert "Rungs tried" in text
    assert "Operators on localhost" in text
    page = (files / "why.html").read_text()
    assert "second" in page
    assert "Operators on localhost" in page
    assert "Rungs tried" in page
    assert len(page) < 100_000
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["at_fault"] == ["second"]
    second = next(layer for layer in found["layers"] if layer["layer"] == "second")
    assert second["score_if_float"] > found["score"] + 0.2
    assert second["rung"] == "equalise"
    assert second["noise_after"] < 0.01 < found["rungs"][0]["noise_alone"]["second"]
    assert [r["held"] for r in found["rungs"]][-2:] == [False, True]


def test_without_an_int8_file_plain_int8_is_explained(files, capsys):
    assert cli.main(["explain", "net.tflite", "--data", "x.npz", "--json", "--no-try"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["at_fault"] == ["second"]
    assert found["rungs"] == []
    assert not list(files.glob("*plain*"))


def test_where_no_rung_mends_the_model_that_is_said(files, capsys):
    # an int8 door has no room for boxes up to 320 and scores below 1
    net = detector_head()
    ranges = collect_ranges(net.content, [[x[None]] for x in net.calibration], where="f").table()
    (files / "head.tflite").write_bytes(net.content)
    (files / "head8.tflite").write_bytes(quantize(net.content, ranges))
    assert cli.main(["explain", "head.tflite", "head8.tflite", "--data", "x.npz"]) == 0
    text = capsys.readouterr().out
    assert "no rung that was tried mends the whole model (least noise 0.7" in text
    assert "float32 doors" in text
    assert "holds" not in text


def test_an_evaluation_set_without_labels_is_refused(files, capsys):
    asked = [
        "explain",
        "net.tflite",
        "int8.tflite",
        "--data",
        "labelled.npz",
        "--evaluate",
        "x.npz",
    ]
    assert cli.main(asked) == 2
    found = capsys.readouterr().err
    assert "x.npz" in found
    assert "no labels to judge by" in found


def test_samples_in_the_source_models_layout_are_turned(files, capsys):
    np.savez("first.npz", image=np.moveaxis(np.load("x.npz")["image"], 3, 1))
    asked = ["explain", "net.tflite", "int8.tflite", "--data", "first.npz", "--json"]
    assert cli.main(asked) == 2
    capsys.readouterr()
    assert cli.main([*asked, "--layout", "NCHW"]) == 0
    assert json.loads(capsys.readouterr().out)["at_fault"] == ["second"]


def test_files_in_the_wrong_order_are_refused_before_any_work(files, capsys):
    assert cli.main(["explain", "int8.tflite", "net.tflite", "--data", "x.npz"]) == 2
    assert "is quantized already" in capsys.readouterr().err
