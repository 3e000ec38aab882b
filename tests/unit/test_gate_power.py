"""What ci/bench/gate_power.py claims of the gate slowdown, on the committed noise."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgepipe import stats

SCRIPT = Path(__file__).parents[2] / "ci" / "bench" / "gate_power.py"
TRIALS = 60


@pytest.fixture(scope="module")
def gate_power() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate_power", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_power"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_gate_neither_cries_wolf_nor_sleeps_where_other_rules_do(gate_power: ModuleType) -> None:  # fmt: skip
    rows = gate_power.table(TRIALS, 0)
    ours = {(r.scenario, r.effect): r for r in rows if r.rule == "ours, 1 thread"}
    for scenario, name, _ in gate_power.SCENARIOS:
        assert ours[scenario, 0.0].passed == TRIALS, scenario
        assert ours[scenario, 0.05].failed == TRIALS, scenario
        # at the tolerance itself 2.5 % a side, and 3 sigma of 60 replays
        assert ours[scenario, 0.03].failed <= TRIALS * (0.025 + 3 * (0.025 / TRIALS) ** 0.5), name
    real = [r for r in rows if "real B" in r.scenario and r.rule == "ours, 1 thread"]
    assert [r.failed for r in real] == [TRIALS] * 2
    assert all(r.effect == pytest.approx(0.0625, abs=0.003) for r in real)
    pooled = [r for r in rows if r.rule == "Mann-Whitney, pooled" and r.effect == 0.0]
    assert all(r.failed > 0.1 * TRIALS for r in pooled)  # what the page says of it


def test_a_replay_is_the_same_for_the_same_seed(gate_power: ModuleType) -> None:
    values = gate_power.session_values(gate_power.load("contended").wall)

    def replay(seed: int) -> list[tuple[str, int]]:
        rng = gate_power.np.random.default_rng(seed)
        return [gate_power.ours(values, 0.04, rng) for _ in range(5)]

    assert replay(1) == replay(1)
    assert replay(1) != replay(2)


def test_wall_time_takes_a_pass_back_and_never_gives_one(gate_power: ModuleType) -> None:
    rng = gate_power.np.random.default_rng(0)
    steady = rng.normal(0, 0.001, (24, 50))
    slower = steady + 0.2
    status, _ = gate_power.ours(steady, 0.0, rng, objecting=slower, is_same_model=False)
    assert status == "INCONCLUSIVE"
    status, _ = gate_power.ours(slower, 0.0, rng, objecting=steady, is_same_model=False)
    assert status == "FAIL"


def test_wilson_holds_the_share_it_is_of(gate_power: ModuleType) -> None:
    # worked by hand: 0 of 100 -> z^2 / (n + z^2) = 3.84 / 103.84
    assert gate_power.wilson(0, 100) == pytest.approx((0.0, 0.03699), abs=1e-4)
    low, high = gate_power.wilson(50, 100)
    assert low < 0.5 < high


def test_the_recordings_are_small_and_say_how_they_were_made(gate_power: ModuleType) -> None:
    for name in ("quiet", "contended"):
        assert (gate_power.NOISE / f"{name}.json").stat().st_size < 300_000
        recording = gate_power.load(name)
        assert recording.wall.shape == recording.cpu.shape == (24, 150, 3)
        assert {"scheduling", "busy_processes_beside", "runtime", "recorded"} <= recording.about.keys()  # fmt: skip
    assert max(stats.LOOKS) <= 24
