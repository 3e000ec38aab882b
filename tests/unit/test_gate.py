from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.errors import RequestError
from edgepipe.gate import (
    GATES,
    REQUIRED_CONTEXT,
    AccuracyDropGate,
    Evidence,
    LatencyGate,
    MemoryGate,
    RunsOnDeviceGate,
    Status,
    Verdict,
    judge_all,
    overall,
)
from edgepipe.measurement import Measurement, single
from edgepipe.metrics import METRICS
from edgepipe.schema import build

CONTEXT: dict[str, Any] = {key: "x" for key in REQUIRED_CONTEXT} | {"model_sha256": "m1"}


def latency(*sessions: tuple[float, ...], excluded: dict[int, str] | None = None, **context: Any) -> Evidence:  # fmt: skip
    measured = Measurement(
        "latency_wall", "s", sessions, excluded=excluded or {}, context=CONTEXT | context
    )
    return Evidence("m1", "pi", {"latency_wall": measured})


STEADY = tuple(0.010 + 0.00001 * (i % 10) for i in range(100))


def test_latency_within_the_limit_passes() -> None:
    verdict = LatencyGate(max=0.02).judge(latency(STEADY, STEADY, STEADY))
    assert verdict.status is Status.PASS
    assert "3 sessions" in verdict.reason


def test_latency_beyond_the_limit_fails() -> None:
    assert LatencyGate(max=0.005).judge(latency(STEADY, STEADY)).status is Status.FAIL


def test_latency_at_the_limit_is_inconclusive() -> None:
    # a tenth of the inferences lie above 12 ms: the true p90 may be on either side
    split = tuple(0.010 if i % 10 else 0.014 for i in range(100))
    assert LatencyGate(max=0.012).judge(latency(split, split)).status is Status.INCONCLUSIVE


def test_too_few_inferences_are_inconclusive() -> None:
    verdict = LatencyGate(max=1.0).judge(latency(STEADY[:20]))
    assert verdict.status is Status.INCONCLUSIVE
    assert "too few samples" in verdict.reason


@pytest.mark.parametrize("key", REQUIRED_CONTEXT)
def test_evidence_without_its_context_is_inconclusive(key: str) -> None:
    evidence = latency(STEADY, STEADY)
    found = evidence.measurements["latency_wall"]
    poor = {k: v for k, v in found.context.items() if k != key}
    measured = {"latency_wall": dataclasses.replace(found, context=poor)}
    verdict = LatencyGate(max=1.0).judge(Evidence("m1", "pi", measured))
    assert verdict.status is Status.INCONCLUSIVE
    assert key in verdict.reason


def test_evidence_of_another_file_is_inconclusive() -> None:
    evidence = dataclasses.replace(latency(STEADY), model_sha256="m2")
    verdict = LatencyGate(max=1.0).judge(evidence)
    assert verdict.status is Status.INCONCLUSIVE
    assert "another model file" in verdict.reason


def test_emulated_latency_never_passes() -> None:
    verdict = LatencyGate(max=1.0).judge(latency(STEADY, STEADY, emulated=True))
    assert verdict.status is Status.INCONCLUSIVE


def test_a_slow_wall_clock_on_a_busy_device_is_inconclusive() -> None:
    verdict = LatencyGate(max=0.005).judge(latency(STEADY, STEADY, contended=True))
    assert verdict.status is Status.INCONCLUSIVE
    assert "busy" in verdict.reason


def test_excluded_sessions_do_not_count_and_too_many_make_the_device_unfit() -> None:
    slow = tuple(1.0 for _ in range(100))
    one = latency(STEADY, STEADY, slow, excluded={2: "throttled"})
    assert LatencyGate(max=0.02).judge(one).status is Status.PASS
    two = latency(STEADY, slow, slow, excluded={1: "throttled", 2: "throttled"})
    verdict = LatencyGate(max=0.02).judge(two)
    assert verdict.status is Status.INCONCLUSIVE
    assert "throttled" in verdict.reason


@pytest.mark.parametrize("name", GATES)
def test_no_evidence_never_passes(name: str) -> None:
    options = {
        "latency": {"max": "1 s"}, "memory": {"max": "1 GB"}, "size": {"max": "1 GB"},
        "task_metric": {"min": 0.0}, "accuracy_drop": {"max": "100 points"},
        "parity": {"min_sqnr": "0 dB"}, "device_task_metric": {"min": 0.0},
        "device_accuracy_drop": {"max": "100 points"},
    }.get(name, {})  # fmt: skip
    gate = build(GATES[name], options, where=name, error=RequestError)
    assert gate.judge(Evidence("m1", "pi", {})).status is Status.INCONCLUSIVE
    assert all(v.status is not Status.PASS for v in judge_all([gate], Evidence("m1", "", {}), []))


def test_a_model_that_crashes_on_the_device_fails_even_if_no_gate_asks() -> None:
    crashed = single("runs_on_device", "", 0, CONTEXT | {"reason": "killed by signal 11"})
    verdicts = judge_all([], Evidence("m1", "", {}), [Evidence("m1", "pi", {"runs_on_device": crashed})])  # fmt: skip
    assert [v.status for v in verdicts] == [Status.FAIL]
    assert "signal 11" in verdicts[0].reason


def test_the_gate_on_running_is_judged_once() -> None:
    ran = single("runs_on_device", "", 1, CONTEXT)
    evidence = Evidence("m1", "pi", {"runs_on_device": ran})
    assert len(judge_all([RunsOnDeviceGate()], Evidence("m1", "", {}), [evidence])) == 1


def test_memory_is_gated_on_the_named_quantity() -> None:
    evidence = Evidence("m1", "pi", {"memory_peak": single("memory_peak", "B", 2e6, CONTEXT), "memory_anon": single("memory_anon", "B", 1e6, CONTEXT)})  # fmt: skip
    assert MemoryGate(max=1.5e6).judge(evidence).status is Status.FAIL
    assert MemoryGate(max=1.5e6, quantity="anon").judge(evidence).status is Status.PASS


@given(st.lists(st.sampled_from(list(Status)), max_size=6))
def test_overall_passes_only_if_everything_passed(statuses: list[Status]) -> None:
    verdicts = [Verdict("g", status, "") for status in statuses]
    expected = (
        Status.FAIL
        if Status.FAIL in statuses
        else Status.PASS
        if statuses and set(statuses) == {Status.PASS}
        else Status.INCONCLUSIVE
    )
    assert overall(verdicts) is expected


def test_every_gate_has_its_table_row_and_says_what_it_does() -> None:
    for name, gate in GATES.items():
        assert gate.name == name
        assert gate.title
    assert all(m.meaning for m in METRICS.values())


@pytest.mark.parametrize(
    ("interval", "expected"),
    [([-1.0, 1.5], Status.PASS), ([-1.0, 3.0], Status.INCONCLUSIVE), (None, Status.INCONCLUSIVE)],
)
def test_a_hard_maximum_passes_only_with_an_interval_that_excludes_more(
    interval: list[float] | None, expected: Status
) -> None:
    context = {"model_sha256": "m1", "samples": 100}
    if interval:
        context["interval_points"] = interval
    measured = {"accuracy_drop": single("accuracy_drop", "points", 0.0, context)}
    gate = AccuracyDropGate(max=1.0, hard_max=2.0)
    assert gate.judge(Evidence("m1", "", measured)).status is expected
