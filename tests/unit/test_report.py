"""The golden report. After a wanted change: EDGEPIPE_UPDATE_GOLDEN=1 pytest tests/unit/test_report.py,
then read the difference before committing it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from edgepipe.artifact import Artifact
from edgepipe.baseline import Baseline, comparable
from edgepipe.cli import main
from edgepipe.gate import (
    AccuracyDropGate,
    Evidence,
    FullIntegerGate,
    GrowthGate,
    LatencyGate,
    MemoryGate,
    SizeGate,
    SlowdownGate,
    overall,
)
from edgepipe.judge import judge
from edgepipe.measurement import Measurement, single
from edgepipe.report import measurement_table, render
from edgepipe.store import Run, Store

GOLDEN = Path(__file__).parents[1] / "fixtures" / "report"
SHA = "a1" * 32
CONTEXT = {
    "model_sha256": SHA, "profile": "rpi4b_4gb", "runtime": "litert", "runtime_version": "2.3.0",
    "backend": "litert-c", "threads": 1, "governor": "ondemand", "temperature_before_c": 48.2,
    "temperature_after_c": None, "machine": "aarch64",
}  # fmt: skip
# CPU time of candidate / base in four rounds of each session: 6 % slower
RATIOS = ((1.058, 1.061, 1.060, 1.063), (1.062, 1.059, 1.064, 1.061), (1.057, 1.06, 1.062, 1.06))
LAYERS = [
    {"layer": 3, "operator": "CONV_2D", "sqnr_db": 7.25},
    {"layer": 7, "operator": "FULLY_CONNECTED", "sqnr_db": 24.0},
]

RESCUE = {
    "metric": "top1", "samples": 500, "max_drop": 1.0, "float_score": 0.98, "float_latency_s": 4e-5, "rungs": [
        {"rung": "plain", "score": 0.9, "drop_points": 8.0, "interval_points": [5.5, 10.5], "bytes": 30000, "latency_s": 2e-5, "held": False, "kept": True, "did": "int8 with min_max ranges"},
        {"rung": "ranges", "score": 0.89, "drop_points": 9.0, "interval_points": None, "bytes": 30000, "latency_s": 2e-5, "held": False, "kept": False, "did": "mse ranges instead of min_max"},
        {"rung": "equalise", "score": 0.979, "drop_points": 0.1, "interval_points": [-0.4, 0.6], "bytes": 30512, "latency_s": None, "held": True, "kept": True, "did": "1 dead gain(s) set to 0"},
    ],
}  # fmt: skip


def op(index: int, name: str, seconds: float) -> dict[str, object]:
    return {"index": index, "name": name, "where": "delegate", "seconds": seconds}


def layer(name: str, shape: list[int], macs: int, note: str = "") -> dict[str, object]:
    parameters = shape[0] * shape[1] + shape[0]
    return {"name": name, "kind": "Linear", "shape": shape, "parameters": parameters, "macs": macs, "bytes": parameters + 3 * shape[0], "note": note}  # fmt: skip


def compressed_steps() -> list[dict[str, object]]:
    """A training and a pruning that cuts one layer, splits another, and gains nothing on one of two devices."""
    epochs = [{"loss": 2.0 - 0.15 * i, "accuracy": 0.5 + 0.03 * i, "validation_accuracy": 0.6 + 0.03 * min(i, 7), "lr": 0.01} for i in range(10)]  # fmt: skip
    before = [layer("body.0", [32, 16], 51200), layer("body.1", [32, 32], 102400), layer("head", [10, 32], 320)]  # fmt: skip
    after = [layer("body.0", [24, 16], 38400, "32 -> 24 channels"), layer("body.1.0", [8, 24], 19200, "rank 8"), layer("head", [10, 32], 320, "left whole: it makes the output")]  # fmt: skip
    totals = [{key: sum(int(str(la[key])) for la in layers) for key in ("parameters", "macs", "bytes")} for layers in (before, after)]  # fmt: skip
    predicted = {
        "rpi4b_4gb": {"before_s": 0.00021, "after_s": 0.00013, "source": "measured", "note": ""},
        "rpi5_8gb": {"before_s": 0.0001, "after_s": 0.000099, "source": "estimated", "note": "rpi5_8gb will gain nothing: 100 us -> 99 us (estimated operators)"},
    }  # fmt: skip
    facts = {"before": totals[0], "after": totals[1], "layers_before": before, "layers": after}
    return [
        {"step": "finetune", "cached": False, "seconds": 9.0, "artifact": {"kind": "torch", "sha256": "11" * 32, "facts": {"epochs": epochs}}},
        {"step": "prune", "cached": False, "seconds": 2.0, "predicted": predicted, "artifact": {"kind": "torch", "sha256": "22" * 32, "facts": facts}},
    ]  # fmt: skip


def stages(after_load: int) -> list[dict[str, dict[str, int]]]:
    names = ("before_load", "after_load", "after_first", "steady")
    return [{name: {"peak": 9_000_000 + added} for name, added in zip(names, (0, after_load, after_load + 200_000, after_load + 200_000), strict=True)}]  # fmt: skip


def baseline(folder: Path) -> Baseline:
    """One measured as `CONTEXT` says."""
    return Baseline(
        path=folder / "digits.json", recipe="digits", profile="rpi4b_4gb", run="earlier",
        promoted="2026-11-01T00:00:00+00:00", edgepipe="0.1.0", conditions={}, figures={}, verdicts=(),
        model=Artifact("tflite", folder / "digits.tflite", "b0" * 32, (), ()),
        comparable=comparable(CONTEXT),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A stored run with every kind of row: kept and new steps, all three verdicts, explanations."""
    run = Store(tmp_path).new_run("digits")
    steady = tuple(0.0021 + 0.00001 * (i % 7) for i in range(120))
    convolutions = [op(0, "Convolution", 0.0011), op(1, "Convolution", 0.0006)]
    device = {
        "latency_wall": Measurement("latency_wall", "s", (steady, steady, steady), context=CONTEXT),
        "latency_ratio_cpu": Measurement("latency_ratio_cpu", "", RATIOS, context=CONTEXT),
        "latency_ratio_wall": Measurement("latency_ratio_wall", "", RATIOS, context=CONTEXT),
        "op_time": single("op_time", "s", 0.00202, CONTEXT | {"ops": [*convolutions, op(2, "Convolution", 0.00012), op(3, "Fully Connected", 0.0002)]}),
        "op_time_baseline": single("op_time_baseline", "s", 0.0019, CONTEXT | {"ops": [*convolutions, op(2, "Fully Connected", 0.0002)]}),
        "memory_peak": Measurement("memory_peak", "B", ((1.2e6,), (1.21e6,)), context=CONTEXT | {"stages": stages(1_000_000)}),
        "memory_peak_baseline": Measurement("memory_peak_baseline", "B", ((0.9e6,), (0.9e6,)), context=CONTEXT | {"stages": stages(700_000)}),
        "runs_on_device": single("runs_on_device", "", 1, CONTEXT),
    }  # fmt: skip
    by_class = [{"class": c, "n": 40, "reference_right": 39, "right": 39 - 6 * (c == 8)} for c in range(10)]  # fmt: skip
    model = {
        "model_bytes": single("model_bytes", "B", 30512, CONTEXT),
        "accuracy_drop": single("accuracy_drop", "points", 1.5, CONTEXT | {"by_class": by_class, "layers": LAYERS}),
    }  # fmt: skip
    gates = [
        LatencyGate(max=0.005), LatencyGate(max=0.00213), SlowdownGate(max=0.03),
        GrowthGate(quantity="peak"), GrowthGate(quantity="anon"), MemoryGate(max=1e6), SizeGate(max=20000),
        AccuracyDropGate(max=1.0), FullIntegerGate(),
    ]  # fmt: skip
    verdicts = judge(
        gates,
        Evidence(SHA, "", model),
        [Evidence(SHA, "rpi4b_4gb", device)],
        baselines={"rpi4b_4gb": baseline(tmp_path)},
        measured_against={"rpi4b_4gb": "b0" * 32},
        run_id=run.id,
    )
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
            *compressed_steps(),
            {"step": "to_tflite", "cached": False, "seconds": 6.2, "artifact": artifact},
            {"step": "quantize_int8", "cached": False, "seconds": 4.0, "artifact": {"kind": "tflite", "sha256": SHA, "facts": {"rescue": RESCUE}}},
            {"step": "evaluate", "cached": False, "seconds": 1.0},
        ],
        measured_against={"rpi4b_4gb": "b0" * 32},
        shipped={"sha256": SHA}, gates=[{"gate": "size", "max": 20000}],
    )  # fmt: skip
    return run


@pytest.mark.parametrize(("markdown", "name"), [(False, "report.txt"), (True, "report.md")])
def test_the_report_reads_as_agreed(run: Run, markdown: bool, name: str) -> None:
    text = render(run, markdown=markdown, layers=True)
    if os.environ.get("EDGEPIPE_UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(text, encoding="utf-8")
    assert text == (GOLDEN / name).read_text(encoding="utf-8")


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


def test_a_measurement_without_a_valid_session_says_why() -> None:
    why = "every operator takes less than the profiler's microsecond"
    found = {"op_time": Measurement("op_time", "s", ((0.0,),), excluded={0: why})}
    (row,) = measurement_table("", found).rows
    assert row == ("op_time", "no valid session", "", why)


def test_what_a_board_said_begins_no_line_of_its_own(run: Run) -> None:
    """A CI service reads commands at the start of a line."""
    hostile = "killed\n::error title=x::y\n| a | <b>"
    verdict = {"gate": "runs_on_device", "status": "FAIL", "device": "pi", "reason": hostile, "details": [hostile]}  # fmt: skip
    run.update(verdicts=[verdict])
    for markdown in (False, True):
        lines = render(run, markdown=markdown).splitlines()
        assert sum("killed ::error" in line for line in lines) == 2
        assert not any(line.lstrip("| ").startswith(("::", "a |")) for line in lines)
    assert "&lt;b>" in render(run, markdown=True)


def test_an_unfinished_run_is_not_judged(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.update(status="interrupted")
    assert main(["gate", "--store", str(run.folder.parents[1])]) == 3
    assert "is interrupted" in capsys.readouterr().err
