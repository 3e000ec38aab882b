"""The main job on real data: the three recipes, over a real SSH server where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepipe.recipe import load_buckets
from edgepipe.testing import LoopbackSshd, find_sshd

from .conftest import EdgepipeRunner

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "ci" / "recipes"


@pytest.fixture(scope="module")
def device() -> Iterator[tuple[str, dict[str, str]]]:
    """An address and the environment to reach it."""
    if find_sshd() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no sshd on this machine")
        yield "local", {}
        return
    with LoopbackSshd() as server:
        yield server.address, server.environment()


def run(
    recipe: str, device: tuple[str, dict[str, str]], store: Path, **env: str
) -> tuple[dict[str, Any], str]:
    address, extra = device
    done = subprocess.run(
        [sys.executable, "-m", "edgepipe", "run", str(RECIPES / recipe), "--device", address, "--json", "--store", str(store)],
        env={**os.environ, **extra, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def measurement(
    store: Path, result: dict[str, Any], name: str, device: str = "model"
) -> dict[str, Any]:
    path = store / "runs" / result["run"] / "measurements" / device / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def metric(store: Path, result: dict[str, Any], name: str, device: str = "model") -> float:
    return float(measurement(store, result, name, device)["samples"][0][0])


def test_every_recipe_to_copy_from_is_fine(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPIPE_DATA", str(data_dir))
    monkeypatch.setenv("EDGEPIPE_TEACHER", str(data_dir / "kws-dscnn" / "kws_dscnn.pth"))
    recipes = sorted(RECIPES.glob("*.toml"))
    assert sum(len(load_buckets(path)) for path in recipes) >= 10


def test_the_digits_recipe_passes_and_a_second_run_does_nothing(
    device: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    result, _ = run("digits.toml", device, tmp_path)
    assert result["verdict"] == "PASS"
    assert metric(tmp_path, result, "task_metric") > 0.95
    assert metric(tmp_path, result, "float_islands") == 0
    assert metric(tmp_path, result, "device_mismatch", "localhost") == 0
    assert metric(tmp_path, result, "device_flips", "localhost") == 0
    on_board = metric(tmp_path, result, "device_task_metric", "localhost")
    assert on_board == metric(tmp_path, result, "task_metric")  # the whole set, bit for bit
    again, progress = run("digits.toml", device, tmp_path)
    assert again["sha256"] == result["sha256"]
    assert all(step["cached"] for step in again["steps"])
    assert ": done in" not in progress


def test_the_fashion_mnist_recipe_passes(
    data_dir: Path, device: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    result, _ = run("fashion_mnist.toml", device, tmp_path, EDGEPIPE_DATA=str(data_dir))
    assert result["verdict"] == "PASS"
    assert metric(tmp_path, result, "task_metric") > 0.8


def test_the_keyword_spotting_recipe_passes(
    data_dir: Path, device: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    result, _ = run("keyword_spotting.toml", device, tmp_path, EDGEPIPE_DATA=str(data_dir))
    assert result["verdict"] == "PASS"
    # 848 of 1,000 clips were right with a front-end rebuilt from the same description; a different
    # rounding of its filters moves a handful of clips
    assert 0.83 < metric(tmp_path, result, "task_metric_reference") < 0.87
    # the board's own answers to all of them, in pieces
    drop = measurement(tmp_path, result, "device_accuracy_drop", "localhost")
    assert drop["context"]["samples"] == drop["context"]["samples_total"] == 900
    assert drop["samples"][0][0] == metric(tmp_path, result, "accuracy_drop")
    low, high = drop["context"]["interval_points"]
    assert low < drop["samples"][0][0] < high < low + 8
    assert len(drop["context"]["by_class"]) == 10


def test_the_accuracy_drop_may_be_counted_from_a_converted_model(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    """Its file wants NHWC, while samples are prepared for the source model, which wants NCHW."""
    text = (project / "recipe.toml").read_text()
    start, end = (
        text.index('[[stages]]\nstage = "prune"'),
        text.index('[[stages]]\nstage = "export'),
    )
    (project / "recipe.toml").write_text(text[:start] + text[end:])  # reference = 2 is to_tflite
    done = edgepipe("run", "recipe.toml", "--no-devices", "--json")
    assert done.returncode == 3, done.stderr  # no device, so its gates have nothing to go by
    verdicts = {v["gate"]: v["status"] for v in json.loads(done.stdout)["verdicts"]}
    assert verdicts["accuracy_drop"] == "PASS"
