from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.errors import RecipeError, RequestError
from edgepipe.gate import (
    GATES,
    REQUIRED_CONTEXT,
    AccuracyDropGate,
    DelegationGate,
    Evidence,
    GrowthGate,
    LatencyGate,
    MemoryGate,
    RunsOnDeviceGate,
    SlowdownGate,
    Status,
    Verdict,
    judge_all,
    overall,
)
from edgepipe.judge import check_budgets
from edgepipe.measurement import Measurement, single
from edgepipe.metrics import METRICS
from edgepipe.profile import Budgets, load_profile
from edgepipe.resources import profile_paths
from edgepipe.schema import build

CONTEXT: dict[str, Any] = {key: "x" for key in REQUIRED_CONTEXT} | {
    "model_sha256": "m1",
    "profile": "pi",
}


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


@pytest.mark.parametrize(
    ("budgets", "status", "reason"),
    [
        ({"latency": 0.02, "memory": None}, Status.PASS, "<= 20 ms"),
        ({"latency": 0.005}, Status.FAIL, "> 5 ms"),
        ({"latency": None}, Status.INCONCLUSIVE, "the profile no budget for latency"),
        (None, Status.INCONCLUSIVE, "the profile no budget for latency"),
    ],
)
def test_a_gate_without_a_limit_takes_the_budget_of_the_profile(
    budgets: dict[str, Any] | None, status: Status, reason: str
) -> None:
    verdict = LatencyGate().judge(latency(STEADY, STEADY, budgets=budgets))
    assert (verdict.status, reason in verdict.reason) == (status, True)
    # a limit of its own goes before
    assert LatencyGate(max=0.02).judge(latency(STEADY, STEADY, budgets=budgets)).status is Status.PASS  # fmt: skip


def test_a_recipe_without_a_limit_that_no_profile_has_either_is_refused() -> None:
    profile = load_profile(profile_paths()["rpi5_8gb"])
    with pytest.raises(RecipeError, match="'memory' has no max, and profile rpi5_8gb no budget"):
        check_budgets([MemoryGate()], [profile])
    rich = dataclasses.replace(profile, budgets=Budgets(memory=1e6))
    check_budgets([MemoryGate()], [rich])
    check_budgets([MemoryGate(max=1.0)], [profile])


def delegated(share: float | None, required: float | None = None) -> Evidence:
    context = {**CONTEXT, "delegated_share": share, "required_delegated_share": required}
    return Evidence("m1", "pi", {"op_time": Measurement("op_time", "s", ((0.01,),), context=context)})  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "evidence", "status"),
    [
        (DelegationGate(min=0.9), delegated(0.95), Status.PASS),
        (DelegationGate(min=0.9), delegated(0.89), Status.FAIL),
        (DelegationGate(min=0.9), delegated(None), Status.INCONCLUSIVE),
        (DelegationGate(), delegated(0.95), Status.INCONCLUSIVE),
        (DelegationGate(), delegated(0.95, required=0.96), Status.FAIL),
        (DelegationGate(min=0.5), delegated(0.6, required=0.96), Status.PASS),
    ],
)
def test_delegation_is_judged_by_share_of_time(
    gate: DelegationGate, evidence: Evidence, status: Status
) -> None:
    assert gate.judge(evidence).status is status


def test_a_profile_that_requires_delegation_has_it_judged_though_no_gate_asks() -> None:
    def names(evidence: Evidence) -> list[tuple[str, Status]]:
        return [(v.gate, v.status) for v in judge_all([], Evidence("m1", "", {}), [evidence])]

    ran = single("runs_on_device", "", 1, {**CONTEXT, "required_delegated_share": 0.9})
    found = delegated(0.2, required=0.9)
    whole = Evidence("m1", "pi", {**found.measurements, "runs_on_device": ran})
    assert names(whole) == [("runs_on_device", Status.PASS), ("delegation", Status.FAIL)]
    # without operators timed there is no evidence of it
    bare = Evidence("m1", "pi", {"runs_on_device": ran})
    assert names(bare) == [("runs_on_device", Status.PASS), ("delegation", Status.INCONCLUSIVE)]


def test_latency_at_the_limit_is_inconclusive() -> None:
    # a tenth of the inferences lie above 12 ms: the true p90 may be on either side
    split = tuple(0.010 if i % 10 else 0.014 for i in range(100))
    assert LatencyGate(max=0.012).judge(latency(split, split)).status is Status.INCONCLUSIVE


def test_evidence_of_another_device_is_inconclusive() -> None:
    verdict = LatencyGate(max=1.0).judge(latency(STEADY, STEADY, profile="rpi5"))
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.reason == "latency_wall was measured on rpi5, not on pi"


def test_a_percentile_of_batches_says_so() -> None:
    reason = LatencyGate(max=1.0).judge(latency(STEADY, sessions=[{"inner_loops": 40}])).reason
    assert "each the mean of 40 inferences" in reason
    assert "each the mean" not in LatencyGate(max=1.0).judge(latency(STEADY, sessions=[{}])).reason


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
        "parity": {"min_sqnr": "0 dB"}, "slowdown": {"max": "3 %"}, "device_task_metric": {"min": 0.0},
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


def test_every_gate_is_found_by_its_name_and_every_metric_has_a_meaning() -> None:
    assert all(gate.name == name for name, gate in GATES.items())
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


def ratios(
    slowdown: float, *, sessions: int = 5, spread: float = 0.003, rounds: int = 100, seed: int = 0
) -> tuple[tuple[float, ...], ...]:
    """Rounds of sessions whose true ratio is ``1 + slowdown``; ``spread`` is the SD of a session."""
    generator = random.Random(seed)
    return tuple(
        tuple((1 + slowdown) * (1 + shift) * generator.uniform(0.99, 1.01) for _ in range(rounds))
        for shift in (generator.gauss(0, spread) for _ in range(sessions))
    )


def beside_baseline(
    cpu: tuple[tuple[float, ...], ...] | None,
    wall: tuple[tuple[float, ...], ...],
    excluded: dict[int, str] | None = None,
    **context: Any,
) -> Evidence:
    context = CONTEXT | {"threads": 1} | context
    measured = {
        f"latency_ratio_{clock}": Measurement(f"latency_ratio_{clock}", "", samples, (), excluded or {}, context)
        for clock, samples in (("cpu", cpu), ("wall", wall)) if samples is not None
    }  # fmt: skip
    return Evidence("m1", "pi", measured)


def test_a_slowdown_verdict_says_what_it_rests_on() -> None:
    noise = {"sd_cpu": 0.0031, "sd_wall": 0.02, "sessions": 12, "measured": "2026-11-22T10:00:00+00:00"}  # fmt: skip
    evidence = beside_baseline(ratios(0.062), ratios(0.06, spread=0.02), noise=noise)
    verdict = SlowdownGate(max=0.03).judge(evidence)
    assert verdict.status is Status.FAIL
    assert verdict.value == pytest.approx(0.062, abs=0.006)
    assert verdict.unit == "ratio"
    for part in (
        "% slower (95 % CI ", "5 sessions x 100 rounds", "1 thread, CPU time", "tolerance 3 %",
        "detectable from ", "noise of this board 0.31 % per session (calibrated 2026-11-22)",
    ):  # fmt: skip
        assert part in verdict.reason
    assert verdict.details[0].startswith("wall time: ")


def test_an_unchanged_model_is_not_slower() -> None:
    verdict = SlowdownGate(max=0.03).judge(beside_baseline(ratios(0.0), ratios(0.0)))
    assert verdict.status is Status.PASS
    assert "noise of this board" not in verdict.reason


def test_with_one_thread_cpu_time_decides_even_on_a_busy_device() -> None:
    noisy = ratios(0.0, spread=0.1)
    verdict = SlowdownGate(max=0.03).judge(beside_baseline(ratios(0.0), noisy, contended=True))
    assert verdict.status is Status.PASS
    slower = SlowdownGate(max=0.03).judge(beside_baseline(ratios(0.06), noisy, contended=True))
    assert slower.status is Status.FAIL


def test_wall_time_that_contradicts_a_pass_by_cpu_time_is_inconclusive() -> None:
    evidence = beside_baseline(ratios(0.0), ratios(0.2))
    verdict = SlowdownGate(max=0.03).judge(evidence)
    assert verdict.status is Status.INCONCLUSIVE
    assert "by wall time it is 20" in verdict.reason
    # whoever asks for CPU time alone gets CPU time alone
    assert SlowdownGate(max=0.03, clock="cpu").judge(evidence).status is Status.PASS
    assert SlowdownGate(max=0.03, clock="wall").judge(evidence).status is Status.FAIL


def test_a_pass_by_cpu_time_needs_wall_time_to_be_there() -> None:
    evidence = beside_baseline(ratios(0.0), ((),))
    assert SlowdownGate(max=0.03).judge(evidence).status is Status.INCONCLUSIVE


def test_with_more_threads_wall_time_decides_and_a_busy_device_cannot_fail() -> None:
    gate = SlowdownGate(max=0.03)
    quiet = beside_baseline(None, ratios(0.06), threads=4)
    assert gate.judge(quiet).status is Status.FAIL
    assert "4 threads, wall time" in gate.judge(quiet).reason
    busy = gate.judge(beside_baseline(None, ratios(0.06), threads=4, contended=True))
    assert busy.status is Status.INCONCLUSIVE
    assert "busy" in busy.reason
    fast = beside_baseline(None, ratios(0.0), threads=4, contended=True)
    assert gate.judge(fast).status is Status.PASS
    cpu_alone = beside_baseline(ratios(0.0), ratios(0.0), threads=4)
    assert SlowdownGate(max=0.03, clock="cpu").judge(cpu_alone).status is Status.INCONCLUSIVE


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        (ratios(0.06, sessions=2), "a verdict needs 3 valid sessions"),
        (((1.0,) * 100,) * 5, "clock is too coarse"),
        ((*ratios(0.0, sessions=4), (1.0, 0.0)), "clock is too coarse"),
        (ratios(0.03, spread=0.02), "cannot tell"),
    ],
)
def test_a_slowdown_that_cannot_be_told_is_inconclusive(
    samples: tuple[tuple[float, ...], ...], why: str
) -> None:
    verdict = SlowdownGate(max=0.03).judge(beside_baseline(samples, ratios(0.0)))
    assert verdict.status is Status.INCONCLUSIVE
    assert why in verdict.reason


def test_models_that_are_fed_otherwise_are_not_compared() -> None:
    small, large = ({"name": "x", "dtype": "int8", "shape": [1, n]} for n in (96, 224))
    gate, same = SlowdownGate(max=0.03), ratios(0.0)
    other = beside_baseline(same, same, baseline_inputs=[large], model_inputs=[small])
    assert gate.judge(other).status is Status.INCONCLUSIVE
    assert "is fed int8 [1, 224], the model int8 [1, 96]" in gate.judge(other).reason
    renamed = beside_baseline(same, same, baseline_inputs=[small], model_inputs=[{**small, "name": "y"}])  # fmt: skip
    assert gate.judge(renamed).status is Status.PASS


def test_sessions_are_excluded_for_a_cause_and_too_many_make_the_device_unfit() -> None:
    samples = (*ratios(0.0, sessions=4), (1.5,) * 100)
    one = SlowdownGate(max=0.03).judge(beside_baseline(samples, samples, {4: "throttled"}))
    assert one.status is Status.PASS
    assert "4 sessions" in one.reason
    assert "session 5 does not count: throttled" in one.details
    unfit = dict.fromkeys(range(3), "throttled")
    verdict = SlowdownGate(max=0.03).judge(beside_baseline(samples, samples, unfit))
    assert verdict.status is Status.INCONCLUSIVE
    assert "device unfit" in verdict.reason


@pytest.mark.parametrize("gate", [SlowdownGate(max=0.03), GrowthGate(), GrowthGate(quantity="size")])  # fmt: skip
def test_without_a_baseline_nothing_is_judged_and_the_way_to_one_is_named(gate: Any) -> None:
    evidence = Evidence("m1", "pi", {"memory_anon": single("memory_anon", "B", 1, CONTEXT), "model_bytes": single("model_bytes", "B", 1, CONTEXT)})  # fmt: skip
    verdict = gate.judge(evidence)
    assert verdict.status is Status.INCONCLUSIVE
    assert "--promote" in verdict.details[0]


def grown(before: tuple[float, ...], now: tuple[float, ...]) -> Evidence:
    made = {
        name: Measurement(name, "B", tuple((x,) for x in values), context=CONTEXT)
        for name, values in (("memory_anon_baseline", before), ("memory_anon", now))
    }
    return Evidence("m1", "pi", made)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        # small models may grow by 32 pages, large ones by 2 %
        ((1e6, 1e6), (1e6 + 131072, 1e6), Status.PASS),
        ((1e6, 1e6), (1e6 + 131073, 1.2e6), Status.FAIL),
        ((100e6,), (102e6,), Status.PASS),
        ((100e6,), (102e6 + 1,), Status.FAIL),
        ((1e6, 1e6), (0.5e6, 0.5e6), Status.PASS),
        # one session of the model fits, the other does not
        ((1e6, 1e6), (1.1e6, 1.2e6), Status.INCONCLUSIVE),
        # fits the one session of the baseline, not the other
        ((1e6, 1.1e6), (1.2e6, 1.2e6), Status.INCONCLUSIVE),
    ],
)
def test_growth_allows_the_larger_of_pages_and_share(
    before: tuple[float, ...], now: tuple[float, ...], expected: Status
) -> None:
    verdict = GrowthGate().judge(grown(before, now))
    assert verdict.status is expected
    assert "against the baseline's" in verdict.reason


def test_growth_of_the_file_is_judged_like_memory() -> None:
    made = {"model_bytes": single("model_bytes", "B", 3e6, CONTEXT), "model_bytes_baseline": single("model_bytes_baseline", "B", 2e6, CONTEXT)}  # fmt: skip
    verdict = GrowthGate(quantity="size").judge(Evidence("m1", "pi", made))
    assert verdict.status is Status.FAIL
    assert "model_bytes 3 MB, +1 MB against the baseline's 2 MB" in verdict.reason


@pytest.mark.parametrize(
    ("signatures", "expected", "hint"),
    [
        ({"model_signature": "length16"}, Status.INCONCLUSIVE, "run without --merge"),
        ({"baseline_signature": "length16"}, Status.INCONCLUSIVE, "run with --merge"),
        ({"model_signature": "length16", "baseline_signature": "length16"}, Status.FAIL, ""),
    ],
)
def test_the_size_of_a_merged_file_is_not_compared_with_that_of_a_single_one(
    signatures: dict[str, str], expected: Status, hint: str
) -> None:
    context = {**CONTEXT, **signatures}
    names = (("model_bytes", 3e6), ("model_bytes_baseline", 2e6))
    made = {name: single(name, "B", value, context) for name, value in names}
    verdict = GrowthGate(quantity="size").judge(Evidence("m1", "pi", made))
    assert verdict.status is expected
    assert "".join(verdict.details).startswith(hint)
    # what a process takes is measured with either, so it may be compared
    sessions = {f"memory_anon{name}": Measurement(f"memory_anon{name}", "B", ((1e6,), (1e6,)), context=context) for name in ("", "_baseline")}  # fmt: skip
    assert GrowthGate().judge(Evidence("m1", "pi", sessions)).status is Status.PASS


def test_the_null_device_can_fail_a_gate_and_never_pass_one() -> None:
    gates = [SlowdownGate(max=0.03)]
    fine = beside_baseline(ratios(0.0), ratios(0.0), simulated=True)
    (passed,) = [v for v in judge_all(gates, Evidence("m1", "", {}), [fine]) if v.gate == "slowdown"]  # fmt: skip
    assert passed.status is Status.INCONCLUSIVE
    assert "null device" in passed.reason
    slow = beside_baseline(ratios(0.06), ratios(0.06), simulated=True)
    verdicts = judge_all(gates, Evidence("m1", "", {}), [slow])
    assert Status.FAIL in {v.status for v in verdicts}
    assert Status.PASS not in {v.status for v in verdicts}


def test_a_latency_verdict_names_the_limits_it_could_tell() -> None:
    split = tuple(0.010 if i % 10 else 0.014 for i in range(100))
    verdict = LatencyGate(max=0.012).judge(latency(split, split))
    assert verdict.details == ("from these samples a limit below 10 ms would FAIL, one from 14 ms PASS",)  # fmt: skip
