from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from edgepipe.cli import main
from edgepipe.gate import Evidence, FullIntegerGate, LatencyGate, SizeGate, judge_all, overall
from edgepipe.measurement import Measurement, single
from edgepipe.report import render
from edgepipe.store import Run, Store

GOLDEN = Path(__file__).parents[1] / "fixtures" / "report"
SHA = "a1" * 32
CONTEXT = {
    "model_sha256": SHA, "profile": "rpi4b_4gb", "runtime": "litert", "runtime_version": "2.3.0",
    "backend": "litert-c", "threads": 1, "governor": "ondemand", "temperature_before_c": 48.2,
    "temperature_after_c": None, "machine": "aarch64",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A stored run with every kind of row: kept and new steps, all three verdicts."""
    run = Store(tmp_path).new_run("digits")
    steady = tuple(0.0021 + 0.00001 * (i % 7) for i in range(120))
    device = {
        "latency_wall": Measurement("latency_wall", "s", (steady, steady, steady), context=CONTEXT),
        "memory_peak": Measurement("memory_peak", "B", ((1.2e6,), (1.21e6,)), context=CONTEXT),
        "runs_on_device": single("runs_on_device", "", 1, CONTEXT),
    }
    model = {
        "model_bytes": single("model_bytes", "B", 30512, CONTEXT),
        "accuracy_drop": single("accuracy_drop", "points", 0.28, CONTEXT),
    }
    gates = [LatencyGate(max=0.005), SizeGate(max=20000), FullIntegerGate()]
    verdicts = judge_all(gates, Evidence(SHA, "", model), [Evidence(SHA, "rpi4b_4gb", device)])
    run.save_measurements("model", model)
    run.save_measurements("rpi4b_4gb", device)
    parity = {"outputs": {"y": {"sqnr_db": 121.5, "max_abs": 2.4e-6}}}
    artifact = {"kind": "tflite", "sha256": SHA, "facts": {"parity": parity}}
    run.update(
        id="20261122T120000Z-digits-abc123", started="2026-11-22T12:00:00+00:00", edgepipe="0.1.0",
        status="complete", verdict=overall(verdicts).value,
        verdicts=[dataclasses.asdict(v) for v in verdicts],
        devices=[{"profile": "rpi4b_4gb", "address": "ssh://pi@board"}],
        steps=[
            {"step": "load", "cached": True, "artifact": {"kind": "torch", "sha256": "00" * 32, "facts": {}}},
            {"step": "to_tflite", "cached": False, "seconds": 6.2, "artifact": artifact},
            {"step": "evaluate", "cached": False, "seconds": 1.0},
        ],
        shipped={"sha256": SHA}, gates=[{"gate": "size", "max": 20000}],
    )  # fmt: skip
    return run


@pytest.mark.parametrize(("markdown", "name"), [(False, "report.txt"), (True, "report.md")])
def test_the_report_reads_as_agreed(run: Run, markdown: bool, name: str) -> None:
    assert render(run, markdown=markdown) == (GOLDEN / name).read_text(encoding="utf-8")


def test_a_stored_run_is_shown_again_in_every_format(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = ["--store", str(run.folder.parents[1])]
    assert main(["report", "latest", *store]) == 0
    assert "digits: FAIL" in capsys.readouterr().out
    assert main(["report", run.id[-6:], "--format", "json", *store]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["measurements"]["rpi4b_4gb"]["latency_wall"]["samples"][0]) == 120
    output = tmp_path / "r.md"
    assert main(["report", "--format", "markdown", "--output", str(output), *store]) == 0
    assert output.read_text(encoding="utf-8").startswith("## digits: FAIL")


def test_a_stored_run_is_judged_again_from_its_evidence(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(run.folder.parents[1])]
    assert main(["gate", *store]) == 1
    assert "model_bytes 30.5 kB > 20 kB" in capsys.readouterr().out
    run.update(gates=[{"gate": "size", "max": 40000}])
    assert main(["gate", "--json", *store]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "PASS"


def test_an_unfinished_run_is_not_judged(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.update(status="interrupted")
    assert main(["gate", "--store", str(run.folder.parents[1])]) == 3
    assert "is interrupted" in capsys.readouterr().err
