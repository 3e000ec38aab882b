"""The release gate with no hardware: the keyword spotter's recipe on a virtual Raspberry Pi 4 (ci/virtual.sh)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "ci" / "recipes"
RECIPE = "keyword_spotting_virtual.toml"


@dataclasses.dataclass(frozen=True)
class Run:
    """The exit code of ``edgepipe run``, and what ``edgepipe report --json`` says of it."""

    code: int
    record: dict[str, Any]

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        return [(v["gate"], v["status"]) for v in self.record["verdicts"]]

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.record["measurements"]["virt-pi-4"]
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    for name in (RECIPE, "keyword_spotting_model.py"):
        shutil.copy(RECIPES / name, folder)
    return folder


def edgepipe(project: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit code, what --json printed)"""
    done = subprocess.run(
        [sys.executable, "-m", "edgepipe", *arguments, "--json"],
        cwd=project, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr
    return done.returncode, json.loads(done.stdout)


def run(project: Path) -> Run:
    code, _ = edgepipe(project, "run", RECIPE)
    return Run(code, edgepipe(project, "report")[1])


@pytest.fixture(scope="module")
def first(virtual_pi4: str, data_dir: Path, project: Path) -> Run:
    """A first run: nothing is released yet."""
    assert os.environ["EDGEPIPE_DATA"] == str(data_dir)
    return run(project)


@pytest.fixture(scope="module")
def slower(first: Run, project: Path) -> Run:
    """The model of the first run is released, and one with an operator more is to be the next."""
    assert edgepipe(project, "gate", "--promote")[0] == 0
    text = (project / RECIPE).read_text()
    (project / RECIPE).write_text(text.replace("model.py:build", "model.py:build_slower"))
    return run(project)


def test_a_first_run_passes_all_but_the_gate_on_growth(first: Run) -> None:
    assert first.code == 3
    assert first.verdicts == [
        ("runs_on_device", "PASS"), ("instructions", "INCONCLUSIVE"), ("instructions", "PASS"),
        ("memory", "PASS"), ("device_task_metric", "PASS"), ("device_agreement", "PASS"),
    ]  # fmt: skip


def test_outputs_are_those_of_this_host_bit_for_bit(first: Run) -> None:
    mismatch = first.measured["device_mismatch"]
    assert mismatch["samples"] == [[0.0]]
    assert mismatch["context"]["unequal"] == 0.0
    assert mismatch["context"]["kernels_here"] == mismatch["context"]["kernels_there"] == "xnnpack"


def test_a_slower_model_fails_by_the_exact_percentage(slower: Run) -> None:
    assert slower.code == 1
    assert slower.verdicts == [
        ("runs_on_device", "PASS"), ("instructions", "FAIL"), ("instructions", "PASS"),
        ("memory", "PASS"), ("device_task_metric", "PASS"), ("device_agreement", "PASS"),
    ]  # fmt: skip
    now, before = (slower.measured[m]["samples"][0][0] for m in ("instructions", "instructions_baseline"))  # fmt: skip
    # 25 x 5 places of 64 x 64 products, of which a NEON instruction makes 8 at best
    assert now - before > 25 * 5 * 64 * 64 / 8
    reason = slower.record["verdicts"][1]["reason"]
    assert f"{100 * (now / before - 1):+.4f} % ({now - before:+,.0f})" in reason
    assert reason.endswith("(emulated)")


def test_a_count_repeats_within_20_parts_in_a_million(first: Run, slower: Run) -> None:
    counts = [first.measured["instructions"], slower.measured["instructions_baseline"]]
    found = [count for m in counts for (count,) in m["samples"]]
    assert len(found) >= 4
    assert max(found) / min(found) - 1 <= 20e-6
    assert max(slower.measured["instructions"]["samples"]) == min(slower.measured["instructions"]["samples"])  # fmt: skip
    context = counts[0]["context"]
    assert (context["cpu_model"], context["counter"]) == ("Cortex-A72 r0p3", "perf_event_open")
    assert context["fixed_addresses"]


def test_memory_is_measured_and_time_is_not(slower: Run) -> None:
    measured = slower.measured
    times = ("latency", "load", "first", "op_time", "energy", "sustained")
    assert [metric for metric in measured if metric.startswith(times)] == []
    assert all("qemu-system" in m["context"]["emulated"] for m in measured.values())
    anon, file, peak = (measured[f"memory_{what}"]["samples"][0][0] for what in ("anon", "file", "peak"))  # fmt: skip
    size = measured["model_bytes"]["samples"][0][0]
    assert 2 * 25 * 5 * 64 <= anon < 4e6  # two activations at least
    assert size <= file <= size + 2 * 4096
    assert peak >= anon
