"""Release gates through the command line: a baseline is promoted, the next model measured beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifact import make_artifact
from edgepipe.bench import MeasureOptions, measure
from edgepipe.device import open_device
from edgepipe.errors import NotReadyError
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths
from edgepipe.tflite_ops.tiny import crashing_tflite, tiny_tflite

pytestmark = pytest.mark.slow

RECIPE = """\
schema = 1
name = "small"
devices = ["localhost"]
[model]
file = "model.tflite"
[measure]
threads = 1
memory_sessions = 1
warmup = "50 ms"
session = "200 ms"
max_sessions = 5
[[gates]]
gate = "latency"
max = "5 s"
statistic = "p50"
[[gates]]
gate = "slowdown"
max = "30 %"
[[gates]]
gate = "growth"
quantity = "anon"
max = "1 MB"
max_share = "100 %"
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "model.tflite").write_bytes(tiny_tflite())
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgepipe", *arguments],
            cwd=folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {v["gate"]: v for v in json.loads(done.stdout)["verdicts"]}


def test_a_promotion_says_what_to_commit_and_binds_the_conditions(folder: Path, run: Run) -> None:
    first = run("run", "recipe.toml")
    assert first.returncode == 3, first.stderr
    assert "there is no baseline on this profile" in first.stdout
    assert "edgepipe gate --promote" in first.stdout

    promoted = run("gate", "--promote")
    assert promoted.returncode == 0, promoted.stderr
    assert "git add ci/baselines/localhost/small.json ci/baselines/localhost/small.tflite" in promoted.stdout  # fmt: skip
    assert "the first baseline: growth, slowdown had none to compare with" in promoted.stdout
    kept = folder / "ci" / "baselines" / "localhost"
    assert (kept / "small.tflite").read_bytes() == (folder / "model.tflite").read_bytes()
    assert "nothing to do" in run("gate", "--promote").stdout

    # other threads than the baseline was measured with: the key is named, nothing passes or fails
    text = (folder / "recipe.toml").read_text().replace("threads = 1", "threads = 2")
    (folder / "recipe.toml").write_text(text)
    other = run("run", "recipe.toml", "--json")
    assert other.returncode == 3, other.stderr
    assert "threads: baseline 1, run 2" in verdicts(other)["slowdown"]["reason"]


def test_a_damaged_baseline_is_refused_before_anything_runs(folder: Path, run: Run) -> None:
    kept = folder / "ci" / "baselines" / "localhost"
    kept.mkdir(parents=True)
    (kept / "small.json").write_text("{")
    done = run("run", "recipe.toml")
    assert done.returncode == 2
    assert "is no baseline" in done.stderr
    assert not (folder / ".edgepipe" / "cache").exists()


def test_the_null_device_is_never_promoted(folder: Path, run: Run) -> None:
    done = run("run", "recipe.toml", "--device", "null://quiet")
    assert done.returncode == 3, done.stderr
    promoted = run("gate", "--promote")
    assert promoted.returncode == 3
    assert "not promoted: localhost was measured on the null device" in promoted.stdout
    assert not (folder / "ci").exists()


def test_promotion_goes_by_the_gates_of_the_run_itself(folder: Path, run: Run) -> None:
    done = run("gate", "--promote", "--recipe", "recipe.toml")
    assert done.returncode == 2
    assert "not by those of --recipe" in done.stderr


def test_a_model_fed_otherwise_is_not_measured_beside_the_baseline(folder: Path, run: Run) -> None:
    """On the null device, which lets a baseline be measured but not promoted: one is made by hand."""
    assert run("run", "recipe.toml", "--device", "null://quiet").returncode == 3
    (folder / "model.tflite").write_bytes(tiny_tflite(size=8))
    make_baseline(folder)
    done = run("run", "recipe.toml", "--device", "null://quiet", "--json")
    assert done.returncode == 3, done.stderr
    assert "model_inputs: baseline " in verdicts(done)["slowdown"]["reason"]


def test_a_baseline_that_crashes_is_no_failure_of_the_model(tmp_path: Path) -> None:
    paths = [tmp_path / "base.tflite", tmp_path / "candidate.tflite"]
    for path, content in zip(paths, (crashing_tflite(), tiny_tflite()), strict=True):
        path.write_bytes(content)
    base, candidate = (make_artifact("tflite", path, inputs=(), outputs=()) for path in paths)
    options = MeasureOptions(threads=1, sessions=1, memory_sessions=1, ops=False, warmup=0.01, session=0.05)  # fmt: skip
    profile = find_profile("localhost", profile_paths())
    with pytest.raises(NotReadyError, match=r"the baseline cannot run on local: .*SIGSEGV"):
        measure(candidate, open_device("local"), profile, options, baseline=base)
    failed = measure(base, open_device("local"), profile, options, baseline=candidate)
    assert [m.samples for m in failed.measurements if m.metric == "runs_on_device"] == [((0.0,),)]


def make_baseline(folder: Path) -> None:
    """The latest run as a baseline, whatever its verdicts."""
    from edgepipe.artifact import artifact_from_dict
    from edgepipe.baseline import promote
    from edgepipe.gate import Evidence
    from edgepipe.store import Store

    found = Store(folder / ".edgepipe").find_run("latest")
    record = found.read()
    sha = record["shipped"]["sha256"]
    promote(
        folder=folder / "ci" / "baselines", recipe="small", run_id=found.id,
        shipped=artifact_from_dict(record["shipped"]), verdicts=(),
        model=Evidence(sha, "", found.load_measurements("model")),
        device=Evidence(sha, "localhost", found.load_measurements("localhost")),
    )  # fmt: skip


def test_a_simulated_slowdown_fails_and_a_simulated_pass_does_not_pass(
    folder: Path, run: Run
) -> None:
    assert run("run", "recipe.toml", "--device", "null://quiet").returncode == 3
    make_baseline(folder)
    assert run("calibrate", "--device", "null://quiet").returncode == 0
    slower = run("run", "recipe.toml", "--device", "null://quiet?slowdown=1.5", "--json")
    assert slower.returncode == 1, slower.stdout
    assert verdicts(slower)["slowdown"]["status"] == "FAIL"
    assert "noise of this board" in verdicts(slower)["slowdown"]["reason"]
    same = run("run", "recipe.toml", "--device", "null://quiet?seed=2", "--json")
    assert same.returncode == 3, same.stdout
    assert {v["status"] for v in verdicts(same).values()} == {"INCONCLUSIVE"}


def test_gates_of_a_recipe_that_evaluates_otherwise_are_refused(folder: Path, run: Run) -> None:
    inputs = np.random.default_rng(0).random((40, 4)).astype(np.float32)
    np.savez(folder / "test.npz", x=inputs, labels=inputs.argmax(1))
    recipe = """\
schema = 1
name = "small"
devices = []
[model]
file = "model.tflite"
[data.test]
kind = "npz"
path = "test.npz"
[evaluate]
data = "test"
metric = "top1"
[[gates]]
gate = "task_metric"
min = 0.5
"""
    (folder / "recipe.toml").write_text(recipe)
    assert run("run", "recipe.toml").returncode == 0
    for old, new, named in (
        ('"top1"', '"top5"', "metric"),
        ('"test.npz"', '"test.npz"\nlimit = 5', "data set"),
    ):
        (folder / "other.toml").write_text(recipe.replace(old, new))
        done = run("gate", "--recipe", "other.toml")
        assert done.returncode == 2, done.stderr
        assert f"evaluates by another {named} than the run" in done.stderr
    # a stricter gate on the same evaluation is judged
    (folder / "other.toml").write_text(recipe.replace("min = 0.5", "min = 1.0"))
    assert run("gate", "--recipe", "other.toml").returncode in (0, 1)
