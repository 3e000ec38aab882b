"""init, convert, quantize and inspect as a user strings them together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from edgepipe.artifact import hash_path

from .conftest import EdgepipeRunner, leftovers

pytestmark = pytest.mark.slow

BUILDER = ("net.py:build", "--input", "image=1x1x12x12")


def test_init_writes_a_recipe_that_runs(project: Path, edgepipe: EdgepipeRunner) -> None:
    (project / "recipe.toml").unlink()
    written = edgepipe("init", *BUILDER, "--data", "data.npz")
    assert written.returncode == 0, written.stderr
    assert edgepipe("check", "recipe.toml").returncode == 0
    # latency and memory gates have generous defaults: this is a tiny model
    done = edgepipe("run", "recipe.toml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "PASS"


def test_init_does_not_overwrite_a_recipe(project: Path, edgepipe: EdgepipeRunner) -> None:
    before = (project / "recipe.toml").read_text()
    done = edgepipe("init", *BUILDER, "--data", "data.npz")
    assert done.returncode == 2
    assert "recipe.toml exists" in done.stderr
    assert (project / "recipe.toml").read_text() == before


def test_a_builder_becomes_a_float_file_that_computes_the_same(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    done = edgepipe("convert", *BUILDER, "--data", "data.npz", "--output", "out/net.tflite", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["inputs"][0]["layout"] == "NHWC"
    assert record["inputs"][0]["source_layout"] == "NCHW"
    assert record["facts"]["parity"]["outputs"]["output_0"]["sqnr_db"] > 80
    assert hash_path(project / "out" / "net.tflite") == record["sha256"]
    assert leftovers(project) == []


def test_the_doors_of_a_quantised_file_are_what_was_asked_for(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    done = edgepipe(
        "quantize", *BUILDER, "--data", "data.npz",
        "--input-dtype", "uint8", "--output-dtype", "float32", "--output", "q.tflite",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "float islands: none" in done.stdout
    model = Interpreter(str(project / "q.tflite"))
    assert model.get_input_details()[0]["dtype"] is np.uint8
    assert model.get_output_details()[0]["dtype"] is np.float32
    shown = edgepipe("inspect", "q.tflite", "--json")
    assert json.loads(shown.stdout)["float_operators"] == 0


def test_random_calibration_data_is_refused_unless_asked_for(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    refused = edgepipe("quantize", *BUILDER, "--data", "random")
    assert refused.returncode == 2
    assert "random noise" in refused.stderr
    allowed = edgepipe("quantize", *BUILDER, "--data", "random", "--allow-random", "--json")
    assert allowed.returncode == 0, allowed.stderr
    assert json.loads(allowed.stdout)["facts"]["calibration"]["is_random"] is True
