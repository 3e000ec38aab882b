"""All buckets of a recipe by one command: run, gate, report, each with its own evidence and baseline."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe import cli, pipeline
from edgepipe.artifact import hash_path
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.tiny import tiny_tflite

from ..unit.tflite_builder import Graph

RECIPE = """\
schema = 1
name = "small"
devices = ["localhost"]
[buckets]
length = [4, 8, 16]
[model]
file = "model_${length}.tflite"
[measure]
warmup = "10 ms"
session = "10 ms"
sessions = 3
memory_sessions = 1
[[gates]]
gate = "size"
max = "LIMIT"
"""

DATA = """\
[data.test]
kind = "npy"
path = "x_${length}.npy"
"""
LABELLED = """\
[data.test]
kind = "npz"
path = "labelled_${length}.npz"
labels = "y"
[evaluate]
data = "test"
[[gates]]
gate = "device_agreement"
[[gates]]
gate = "growth"
quantity = "size"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for length in (4, 8, 16):
        (tmp_path / f"model_{length}.tflite").write_bytes(tiny_tflite(size=length))
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("LIMIT", "1 MB"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = cli.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def buckets_table(text: str) -> list[list[str]]:
    """The cells of the summary, by line, size and latency joined to their units."""
    lines = text[text.rindex("Buckets\n") :].splitlines()[2:]
    return [line.split() for line in lines if line.startswith("  ")]


@pytest.mark.slow
def test_all_buckets_are_measured_judged_and_summed_up(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "recipe.toml", "--device", "null://quiet", "--junit", "j.xml", "--markdown", "m.md"]  # fmt: skip
    assert cli.main([*command, "--output", "out.tflite"]) == 3  # on a null device nothing passes
    rows = buckets_table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["length=4", "length=8", "length=16"]
    assert all(row[3] == "localhost" and row[-1] == "INCONCLUSIVE" for row in rows)
    assert len({row[1] for row in rows}) == 3  # three files, three sizes
    for length in (4, 8, 16):
        model = (folder / f"model_{length}.tflite").read_bytes()
        assert (folder / f"out-length{length}.tflite").read_bytes() == model
    suites = [s.get("name") for s in ET.parse(folder / "j.xml").getroot()]
    assert suites == [f"small-length{n}" for n in (4, 8, 16)]
    assert "### Buckets" in (folder / "m.md").read_text()
    code, found = asked(capsys, "gate", "--promote")
    assert code == 3
    assert ["null device" in b["not_promoted"] for b in found["buckets"]] == [True] * 3


def test_a_bucket_that_fails_stops_no_other_and_decides_the_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (folder / "model_8.tflite").stat().st_size
    (folder / "recipe.toml").write_text(RECIPE.replace("LIMIT", f"{size} B"))
    (folder / "model_4.tflite").write_bytes(b"no model")
    code, found = asked(capsys, "run", "recipe.toml", "--no-devices", "--junit", "j.xml")
    assert code == 1  # FAIL comes before the error of another bucket
    assert [(b["bucket"]["length"], b["verdict"]) for b in found["buckets"]] == [(4, None), (8, "PASS"), (16, "FAIL")]  # fmt: skip
    assert found["buckets"][0]["error"] == "wrong-format"
    counts = [(s.get("errors"), s.get("failures")) for s in ET.parse(folder / "j.xml").getroot()]
    assert counts == [("1", "0"), ("0", "0"), ("0", "1")]

    code, _ = asked(capsys, "run", "recipe.toml", "--no-devices", "--bucket", "length=4", "--bucket", "length=8")  # fmt: skip
    assert code == 2
    code, one = asked(capsys, "run", "recipe.toml", "--no-devices", "--bucket", "length=8")
    assert (code, one["bucket"], one["verdict"]) == (0, {"length": 8}, "PASS")
    code, shown = asked(capsys, "report")
    assert shown["bucket"] == {"length": 8}  # the latest command had but one


def test_gate_and_report_take_all_buckets_of_the_latest_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "recipe.toml", "--no-devices"]) == 0
    capsys.readouterr()
    code, found = asked(capsys, "gate")
    assert (code, [b["bucket"]["length"] for b in found["buckets"]]) == (0, [4, 8, 16])
    size = (folder / "model_8.tflite").stat().st_size
    (folder / "strict.toml").write_text(RECIPE.replace("LIMIT", f"{size} B"))
    code, found = asked(capsys, "gate", "--recipe", "strict.toml")
    assert (code, [b["verdict"] for b in found["buckets"]]) == (1, ["PASS", "PASS", "FAIL"])
    code, found = asked(capsys, "gate", "--recipe", "strict.toml", "--bucket", "length=4")
    assert (code, found["verdict"]) == (0, "PASS")
    assert cli.main(["gate", "--bucket", "length=4", "--bucket", "length=16"]) == 0
    assert [row[0] for row in buckets_table(capsys.readouterr().out)] == ["length=4", "length=16"]
    code, found = asked(capsys, "report")
    assert [b["recipe"] for b in found["buckets"]] == [f"small-length{n}" for n in (4, 8, 16)]
    assert cli.main(["report"]) == 0
    assert [row[-1] for row in buckets_table(capsys.readouterr().out)] == ["PASS"] * 3
    code, found = asked(capsys, "check", "recipe.toml")
    assert found["buckets"] == [{"length": n} for n in (4, 8, 16)]


def test_what_was_interrupted_has_no_evidence_for_the_buckets_that_were_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.run

    def stopped(recipe: Any, *arguments: Any, **options: Any) -> Any:
        if recipe.bucket == {"length": 8}:
            raise KeyboardInterrupt
        return whole(recipe, *arguments, **options)

    monkeypatch.setattr(pipeline, "run", stopped)
    assert cli.main(["run", "recipe.toml", "--no-devices"]) == 130
    capsys.readouterr()
    code, found = asked(capsys, "gate")
    assert code == 3
    assert [b["bucket"]["length"] for b in found["buckets"]] == [4]
    assert cli.main(["gate"]) == 3
    table = buckets_table(capsys.readouterr().out)
    assert [row[-1] for row in table] == ["PASS", "begun", "begun"]
    assert [row[0] for row in table] == ["length=4", "length=8", "length=16"]


@pytest.mark.slow
def test_all_buckets_are_merged_into_one_file_with_a_signature_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "recipe.toml", "--no-devices", "--merge", "all.tflite"]
    assert cli.main(command) == 2
    assert "on real samples, but this recipe has none" in capsys.readouterr().err
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text + '[model.state]\nx = "y"\n')
    assert cli.main(command) == 2
    assert "has state" in capsys.readouterr().err
    (folder / "recipe.toml").write_text(text + DATA)
    for length in (4, 8, 16):
        np.save(f"x_{length}.npy", np.random.default_rng(0).normal(0, 1, (5, length)).astype(np.float32))  # fmt: skip
    code, found = asked(capsys, *command)
    assert code == 0
    assert found["merged"]["samples"] == {"length4": 5, "length8": 5, "length16": 5}
    model = parse_model((folder / "all.tflite").read_bytes(), where="all")
    assert [s.key for s in model.signatures] == ["length4", "length8", "length16"]
    # it is what was judged, and not the files it was made of
    sha256 = hash_path(folder / "all.tflite")
    assert [(b["sha256"], b["signature"]) for b in found["buckets"]] == [(sha256, f"length{n}") for n in (4, 8, 16)]  # fmt: skip
    code, shown = asked(capsys, "report")
    assert [b["merged"]["sha256"] for b in shown["buckets"]] == [sha256] * 3
    for bucket in shown["buckets"]:
        size = bucket["measurements"]["model"]["model_bytes"]
        assert size["context"]["model_sha256"] == sha256
        assert size["samples"] == [[(folder / "all.tflite").stat().st_size]]
        assert [step["step"] for step in bucket["steps"]] == ["load", "merge", "evaluate"]
    assert cli.main(["report"]) == 0
    assert capsys.readouterr().out.count("the same bits") == 3

    # nothing is handed over of a recipe one of whose buckets failed; the limit is one for the whole file
    (folder / "all.tflite").unlink()
    size = (folder / "model_16.tflite").stat().st_size
    (folder / "recipe.toml").write_text(RECIPE.replace("LIMIT", f"{size} B") + DATA)
    code, found = asked(capsys, *command)
    assert (code, found["merged"]) == (1, None)
    assert [b["verdict"] for b in found["buckets"]] == ["FAIL"] * 3
    assert not (folder / "all.tflite").exists()
    assert cli.main([*command, "--bucket", "length=8"]) == 2
    assert "there is only one" in capsys.readouterr().err
    assert cli.main([*command, "--output", "out.tflite"]) == 2
    assert "with --merge one file is what ships" in capsys.readouterr().err


def test_nothing_is_merged_where_the_stages_of_a_bucket_failed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace("LIMIT", "1 MB") + DATA)
    for length in (4, 8, 16):
        np.save(f"x_{length}.npy", np.ones((2, length), np.float32))
    (folder / "model_8.tflite").write_bytes(b"no model")
    code = cli.main(["run", "recipe.toml", "--no-devices", "--merge", "all.tflite", "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (code, found["merged"]) == (2, None)
    assert "nothing is merged, since a bucket failed" in said.err
    assert said.err.count("load ...") == 3  # what fails is not tried twice
    assert [b["verdict"] for b in found["buckets"]] == ["PASS", None, "PASS"]
    assert found["buckets"][2]["sha256"] == hash_path(folder / "model_16.tflite")
    assert not (folder / "all.tflite").exists()


def test_whoever_interrupts_a_merged_run_leaves_no_bucket_that_seems_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace("LIMIT", "1 MB") + DATA)
    for length in (4, 8, 16):
        np.save(f"x_{length}.npy", np.ones((2, length), np.float32))
    whole = pipeline.run_stages

    def stopped(recipe: Any, steps: Any) -> Any:
        if recipe.bucket == {"length": 8}:
            raise KeyboardInterrupt
        return whole(recipe, steps)

    monkeypatch.setattr(pipeline, "run_stages", stopped)
    assert cli.main(["run", "recipe.toml", "--no-devices", "--merge", "all.tflite"]) == 130
    assert not (folder / "all.tflite").exists()
    capsys.readouterr()
    assert cli.main(["report"]) == 0
    rows = buckets_table(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["interrupted", "interrupted", "never"]


@pytest.mark.slow
def test_a_merged_int8_file_is_judged_and_explained_like_the_files_it_was_made_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for length in (4, 8, 16):
        graph = Graph()
        weights = np.random.default_rng(0).normal(0, 0.3, (8, 3, 3, 4)).astype(np.float32)
        x = graph.input("x", (1, length, 8, 4))
        y = graph.conv(x, weights, np.zeros(8, np.float32), "conv", (1, length, 8, 8))
        (folder / f"model_{length}.tflite").write_bytes(graph.bytes([y]))
        for seed, name in enumerate(("x", "calibration")):
            values = np.random.default_rng(seed).normal(0, length, (16, length, 8, 4))
            np.save(f"{name}_{length}.npy", values.astype(np.float32))
    calibration = DATA.replace("test", "calibration").replace("x_", "calibration_")
    more = '[evaluate]\ndata = "test"\n[[stages]]\nstage = "quantize_int8"\ndata = "calibration"\nmin_samples = 16\n'
    gate = '[[gates]]\ngate = "parity"\nmin_sqnr = "60 dB"\n'  # so that each FAILs, with its layers
    (folder / "recipe.toml").write_text(RECIPE.replace("LIMIT", "1 MB") + DATA + calibration + more + gate)  # fmt: skip
    said = []
    for options in ([], ["--merge", "all.tflite"]):
        code, found = asked(capsys, "run", "recipe.toml", "--no-devices", *options)
        assert code == 1
        said.append([[v for v in b["verdicts"] if v["gate"] == "parity"] for b in found["buckets"]])
    assert said[0] == said[1]
    assert len({v["reason"] for (v,) in said[0]}) == 3
    assert all("layer conv (CONV_2D)" in v["details"][0] for (v,) in said[0])


@pytest.mark.slow
def test_a_device_measures_each_signature_of_the_merged_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for length in (4, 8):
        x = np.random.default_rng(0).normal(0, 1, (5, length)).astype(np.float32)
        np.savez(f"labelled_{length}.npz", x=x, y=x.argmax(1))
    text = RECIPE.replace("LIMIT", "1 MB").replace("[4, 8, 16]", "[4, 8]")
    (folder / "recipe.toml").write_text(text + LABELLED)
    command = ["run", "recipe.toml", "--merge", "all.tflite", "--device", "local", "--json"]
    assert cli.main(command) == 3  # there is no baseline yet
    capsys.readouterr()
    sha256 = hash_path(folder / "all.tflite")
    code, shown = asked(capsys, "report")
    for bucket, length in zip(shown["buckets"], (4, 8), strict=True):
        measured = bucket["measurements"]["localhost"]
        context = measured["latency_wall"]["context"]
        assert (context["model_sha256"], context["model_signature"]) == (sha256, f"length{length}")
        assert context["model_inputs"][0]["shape"] == [1, length]
        # every output of the signature on the device is that of this host
        mismatch = measured["device_mismatch"]
        assert (mismatch["samples"], mismatch["context"]["values"]) == ([[0.0]], 5 * length)
        # and this host's are those of the file that it was made of
        assert measured["device_task_metric"]["context"]["task_metric_host"] == 1
    code, found = asked(capsys, "gate", "--promote")
    assert (code, [b["not_promoted"] for b in found["buckets"]]) == (0, ["", ""])
    kept = json.loads((folder / "ci/baselines/localhost/small-length8.json").read_text())
    assert (kept["model"]["sha256"], kept["model"]["signature"]) == (sha256, "length8")

    assert cli.main(command) == 0  # now measured beside that signature of it
    found = json.loads(capsys.readouterr().out)
    growth = [v for b in found["buckets"] for v in b["verdicts"] if v["gate"] == "growth"]
    assert [(v["status"], "+0 B against the baseline's" in v["reason"]) for v in growth] == [("PASS", True)] * 2  # fmt: skip
    assert cli.main(["bench", "all.tflite", "--signature", "length5", "--device", "local"]) == 2
    assert "length4, length8" in capsys.readouterr().err
