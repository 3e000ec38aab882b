"""The chain a release engineer uses, on the command line: run, promote, change the model, run again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.tflite_builder import Graph

pytestmark = pytest.mark.slow

# Wide enough for a machine that does other things meanwhile; the slower model is twice as slow.
RECIPE = """\
schema = 1
name = "release"
devices = ["localhost"]
[model]
file = "model.tflite"
[data.test]
kind = "npz"
path = "test.npz"
[evaluate]
data = "test"
metric = "top1"
[measure]
threads = 1
memory_sessions = 0
warmup = "50 ms"
session = "150 ms"
evaluate_samples = 40
tolerance = "20 %"
[[gates]]
gate = "slowdown"
max = "20 %"
[[gates]]
gate = "growth"
quantity = "size"
[[gates]]
gate = "device_task_metric"
min = 0.9
"""
# so wide that an operator takes many of the microseconds it is timed in
CLASSES, WIDTH = 8, 512


def dense_model(*, layers: int, shift: int = 0) -> bytes:
    """(1, 512) -> (1, 8), the class being the largest of the first eight values.

    ``layers`` dense layers that hand their input on, then one that takes eight values; ``shift``
    makes it answer the next class but so many.
    """
    g = Graph()
    x = g.input("x", (1, WIDTH))
    none = np.zeros(WIDTH, np.float32)
    for number in range(layers):
        x = g.dense(x, np.eye(WIDTH, dtype=np.float32), none, f"h{number}", (1, WIDTH))
    head = np.roll(np.eye(CLASSES, WIDTH, dtype=np.float32), shift, axis=0)
    y = g.dense(x, head, np.zeros(CLASSES, np.float32), "y", (1, CLASSES))
    return g.bytes([y])


class Project:
    """A folder with a model and a recipe, and the command line in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        (self.folder / "home").mkdir(parents=True)
        generator = np.random.default_rng(0)
        labels = generator.integers(0, CLASSES, 200)
        x = generator.normal(0, 0.1, (200, WIDTH)).astype(np.float32)
        x[np.arange(200), labels] += 1
        np.savez(self.folder / "test.npz", x=x, labels=labels)
        (self.folder / "recipe.toml").write_text(RECIPE)
        self.ship(dense_model(layers=4))

    def ship(self, content: bytes) -> None:
        (self.folder / "model.tflite").write_bytes(content)

    def edgepipe(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, what --json printed, what was said)"""
        done = subprocess.run(
            [sys.executable, "-m", "edgepipe", *arguments, "--json"],
            cwd=self.folder, env={**os.environ, "HOME": str(self.folder / "home")}, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        result = json.loads(done.stdout) if done.stdout.strip() else {}
        return done.returncode, result, done.stderr

    def run(self) -> tuple[int, dict[str, dict[str, Any]], str]:
        """(exit code, verdicts by gate, what was said)"""
        code, result, said = self.edgepipe("run", "recipe.toml", "--device", "local")
        return code, {v["gate"]: v for v in result.get("verdicts", [])}, said

    def baseline(self, suffix: str) -> Path:
        return self.folder / "ci" / "baselines" / "localhost" / f"release{suffix}"


@dataclasses.dataclass(frozen=True)
class FirstRelease:
    """A project whose first run was promoted, and how that went."""

    folder: Path
    first: tuple[int, dict[str, dict[str, Any]], str]
    promoted: tuple[int, dict[str, Any], str]


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> FirstRelease:
    project = Project(tmp_path_factory.mktemp("release") / "project")
    project.make()
    first = project.run()
    assert not project.baseline(".json").exists()
    return FirstRelease(project.folder, first, project.edgepipe("gate", "--promote"))


@pytest.fixture
def release(first_release: FirstRelease, tmp_path: Path) -> Project:
    """A copy of the project after its first release."""
    shutil.copytree(first_release.folder, tmp_path / "project")
    return Project(tmp_path / "project")


def statuses(verdicts: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: v["status"] for name, v in verdicts.items()}


def test_a_first_run_is_no_pass_until_a_person_promotes_it(first_release: FirstRelease) -> None:
    code, verdicts, said = first_release.first
    assert code == 3, said
    assert statuses(verdicts) == {
        "runs_on_device": "PASS", "slowdown": "INCONCLUSIVE", "growth": "INCONCLUSIVE",
        "device_task_metric": "PASS",
    }  # fmt: skip
    assert "--promote" in json.dumps(verdicts["slowdown"])
    code, promoted, said = first_release.promoted
    assert code == 0, said
    assert len(promoted["promoted"]) == 2
    kept = Project(first_release.folder).baseline(".tflite")
    assert kept.read_bytes() == dense_model(layers=4)


def test_a_slower_release_is_refused_and_a_lighter_one_is_the_next(release: Project) -> None:
    # the same model is no slower than itself
    code, verdicts, said = release.run()
    assert code == 0, said
    assert set(statuses(verdicts).values()) == {"PASS"}
    assert "95 % CI" in verdicts["slowdown"]["reason"]

    # one with twice the layers is slower and larger, and both are said
    release.ship(dense_model(layers=8))
    code, verdicts, said = release.run()
    assert code == 1, said
    assert statuses(verdicts) == {
        "runs_on_device": "PASS", "slowdown": "FAIL", "growth": "FAIL", "device_task_metric": "PASS",
    }  # fmt: skip
    assert verdicts["slowdown"]["value"] > 0.5
    assert any("Fully Connected" in line for line in verdicts["slowdown"]["details"])

    # and does not become the baseline
    code, refused, _ = release.edgepipe("gate", "--promote")
    assert code == 1
    assert refused["promoted"] == []
    assert release.baseline(".tflite").read_bytes() == dense_model(layers=4)

    # a lighter one passes, and does, once
    release.ship(dense_model(layers=2))
    code, verdicts, said = release.run()
    assert code == 0, said
    assert verdicts["slowdown"]["value"] < 0
    assert release.edgepipe("gate", "--promote")[0] == 0
    assert release.baseline(".tflite").read_bytes() == dense_model(layers=2)
    code, again, _ = release.edgepipe("gate", "--promote")
    assert (code, again["promoted"]) == (0, [])


def test_a_model_that_answers_wrongly_on_the_board_fails_though_it_is_as_fast(
    release: Project,
) -> None:
    release.ship(dense_model(layers=4, shift=1))
    code, verdicts, said = release.run()
    assert code == 1, said
    assert statuses(verdicts) == {
        "runs_on_device": "PASS", "slowdown": "PASS", "growth": "PASS", "device_task_metric": "FAIL",
    }  # fmt: skip


def test_a_baseline_that_was_altered_or_taken_elsewhere_is_never_passed(release: Project) -> None:
    record = json.loads(release.baseline(".json").read_text())
    other = {**record, "comparable": {**record["comparable"], "runtime_version": "1.0.0"}}
    release.baseline(".json").write_text(json.dumps(other))
    code, verdicts, said = release.run()
    assert code == 3, said
    assert verdicts["slowdown"]["status"] == verdicts["growth"]["status"] == "INCONCLUSIVE"
    assert "runtime_version" in verdicts["slowdown"]["reason"]
    assert "1.0.0" in verdicts["slowdown"]["reason"]

    release.baseline(".json").write_text(json.dumps(record))
    release.baseline(".tflite").write_bytes(dense_model(layers=5))
    code, verdicts, said = release.run()
    assert (code, verdicts) == (2, {})
    assert "is not the model of release.json" in said
