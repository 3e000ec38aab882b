"""``edgepipe compare`` on this machine: two real int8 models, and a model against itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgepipe import cli
from edgepipe.tflite_ops.tiny import conv_tflite

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.tflite"
    path.write_bytes(conv_tflite(layers=8))
    return path


def compared(base: Path, candidate: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Exit code, the verdict on the slowdown, and the measurements by metric."""
    code = cli.main(["compare", str(base), str(candidate), "--session", "0.5 s", "--json", "--quiet", "--store", str(base.parent)])  # fmt: skip
    data = json.loads(capsys.readouterr().out)
    (slowdown,) = [v for v in data["verdicts"] if v["gate"] == "slowdown"]
    return code, slowdown, {m["metric"]: m for m in data["measurements"]}


def test_a_model_with_another_layer_fails_with_what_the_layer_costs(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tmp_path / "longer.tflite"
    longer.write_bytes(conv_tflite(layers=8, extra_layers=1))
    code, verdict, measured = compared(base, longer, capsys)
    assert (code, verdict["status"]) == (1, "FAIL"), verdict["reason"]
    # what the layer costs by the sums of the operators' own times, measured in other processes:
    # 1/8 of the base. 4 points: a session's CPU time scatters by 1 % where others use the machine,
    # a sum of operators by as much, and what a contended cache adds is no operator's time.
    of_operators = measured["op_time"]["samples"][0][0] / measured["op_time_baseline"]["samples"][0][0] - 1  # fmt: skip
    assert verdict["value"] == pytest.approx(0.125, abs=0.04)
    assert verdict["value"] == pytest.approx(of_operators, abs=0.04)
    assert any(line.startswith("new: op") for line in verdict["details"])


def test_a_model_is_not_slower_than_itself(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, verdict, measured = compared(base, base, capsys)
    if (
        "wall time" in verdict["reason"]
    ):  # CPU time passed; other work can make wall time contradict
        assert verdict["status"] == "INCONCLUSIVE"
        return
    assert (code, verdict["status"]) == (0, "PASS"), verdict["reason"]
    assert abs(verdict["value"]) < 0.02
    assert len(measured["latency_ratio_cpu"]["samples"]) >= 3
