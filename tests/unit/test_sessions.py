"""What becomes of a board's sessions: measurements in SI units. No device takes part."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.metrics import METRICS
from edgepipe.sessions import exclusion, progress, round_ratios, steady_from, to_measurements

HEALTH = {"boot_id": "b1", "temperature_c": 50.0, "governor": "performance"}
CONTEXT = {"boot_id": "b1", "model_sha256": "m", "model_bytes": 5, "baseline_sha256": "b", "baseline_bytes": 4}  # fmt: skip


def session(kind: str, arms: list[str], data: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:  # fmt: skip
    whole = {
        "kind": kind, "arms": arms, "tag": f"{kind}-1", "cause": None, "before": HEALTH,
        "after": HEALTH, "flags": [], "data": data,
    }  # fmt: skip
    return whole | changes


def arm(**changes: Any) -> dict[str, Any]:
    """30 batches of 10 inferences, 2 us each."""
    return {
        "wall_ns": [20_000] * 30, "cpu_ns": [19_000] * 30, "warmup_wall_ns": [4_000, 2_000],
        "inner_loops": 10, "load_ns": 3_000_000, "first_inference_ns": 9_000,
        "cold": {"load_ns": 5_000_000, "resident_share": 0.0},
    } | changes  # fmt: skip


def latency(*, contended: bool = False, arms: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:  # fmt: skip
    arms = arms or {"model": arm()}
    return session("latency", list(arms), {"arms": arms, "contended": contended}, **changes)


def memory(which: str = "model", **figures: Any) -> dict[str, Any]:
    data = {"anon_bytes": 4096, "file_bytes": 8192, "peak_bytes": 12288, "overhead_bytes": 9000}
    return session("memory", [which], data | figures)


def ops(which: str, *times_ns: int) -> dict[str, Any]:
    """One operator per time, of which every second one is delegated."""
    listed = [
        {"index": i, "name": f"OP{i}", "where": ("delegate", "builtin")[i % 2], "ns": [ns, ns, 9 * ns]}
        for i, ns in enumerate(times_ns)
    ]  # fmt: skip
    return session("ops", [which], {"inferences": 3, "ops": listed, "profiler": True})


def sustained(*medians_ns: float, **changes: Any) -> dict[str, Any]:
    minutes = [
        {"start_s": 60.0 * i, "count": 100, "wall_ns": {"p50": ns, "p90": 1.5 * ns, "p99": 2 * ns, "max": 3 * ns},
         "cpu_ns": {"p50": ns}, "temperature_c": 50.0 + i, "throttling": [], "frequency_khz": {}}
        for i, ns in enumerate(medians_ns)
    ]  # fmt: skip
    return session("sustained", ["model"], {"minutes": minutes, "window_s": 60}, **changes)


def energy(idle_w: float, run_w: float) -> dict[str, Any]:
    data = {"method": "pmic", "idle_w": idle_w, "run_w": run_w, "samples_idle": [], "samples_run": [], "inferences": 500, "elapsed_ns": 5_000_000_000}  # fmt: skip
    return session("energy", ["model"], data)


def measured(*sessions: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    found = to_measurements(sessions, CONTEXT, threads=threads)
    assert all(m.unit == METRICS[m.metric].unit for m in found)
    return {m.metric: m for m in found}


def test_nanoseconds_of_a_batch_become_seconds_of_one_inference() -> None:
    found = measured(latency(), memory())
    assert found["latency_wall"].samples == (pytest.approx((2e-6,) * 30),)
    assert found["latency_cpu"].samples == (pytest.approx((1.9e-6,) * 30),)
    # a warm-up is never batched
    assert found["latency_wall"].warmups == (pytest.approx((4e-6, 2e-6)),)
    assert found["load"].samples == ((0.003,),)
    assert found["load_cold"].samples == ((0.005,),)
    assert found["first_inference"].samples == ((9e-6,),)
    assert found["memory_anon"].samples == ((4096.0,),)
    assert found["measuring_overhead"].samples == ((9000.0,),)
    assert found["runs_on_device"].samples == ((1.0,),)


def test_cpu_time_of_several_threads_is_no_latency() -> None:
    found = measured(latency(), threads=2)
    assert "latency_cpu" not in found
    assert "latency_wall" in found


def test_memory_that_was_not_measured_is_not_a_figure() -> None:
    found = measured(memory(), memory(peak_bytes=None))
    assert "memory_peak" not in found
    assert len(found["memory_file"].samples) == 2


def test_the_stages_of_memory_are_in_its_context() -> None:
    stages = {"before_load": {"anon": 1}, "after_load": {"anon": 2}}
    assert measured(memory(stages=stages))["memory_anon"].context["stages"] == [stages]


def test_a_load_from_the_page_cache_is_not_a_cold_load() -> None:
    in_cache = latency(arms={"model": arm(cold={"load_ns": 1, "resident_share": 0.4})})
    unknown = latency(arms={"model": arm(cold={"load_ns": 1, "resident_share": None})})
    found = measured(latency(), in_cache, unknown)
    assert set(found["load_cold"].excluded) == {1, 2}
    assert found["load"].excluded == {}


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ([], ""),
        (["frequency_capped"], ""),
        (["throttled_now", "throttle_event"], "throttled"),
        (["clock_jump"], "clock jump"),
        (["under_voltage"], "under-voltage"),
        (["swapped_in", "throttled_now"], "swap-in, throttled"),
    ],
)
def test_sessions_are_excluded_for_causes_not_for_being_slow(flags: list[str], cause: str) -> None:
    slow = latency(flags=flags, contended=True, arms={"model": arm(wall_ns=[20_000_000] * 30)})
    assert exclusion(slow, "b1") == cause
    assert measured(latency(), slow)["latency_wall"].excluded == ({1: cause} if cause else {})


def test_a_reboot_between_sessions_excludes_what_came_after() -> None:
    after = latency(before={**HEALTH, "boot_id": "b2"}, after={**HEALTH, "boot_id": "b2"})
    assert measured(latency(), after)["latency_wall"].excluded == {1: "reboot"}


def test_an_excluded_session_does_not_make_the_rest_contended() -> None:
    noisy = latency(flags=["clock_jump"], contended=True)
    assert measured(latency(), noisy)["latency_wall"].context["contended"] is False
    assert measured(latency(), latency(contended=True))["latency_wall"].context["contended"] is True


# ------------------------------------------------------------------------------- two models


def test_ratios_are_taken_round_by_round_of_one_inference_each() -> None:
    base = arm(wall_ns=[1000, 2000, 4000], cpu_ns=[1000, 1000, 0], inner_loops=2)
    candidate = arm(wall_ns=[600, 1100, 2000], cpu_ns=[500, 550, 1], inner_loops=1)
    both = latency(arms={"base": base, "candidate": candidate})
    assert round_ratios(both, "wall") == pytest.approx((1.2, 1.1, 1.0))
    # a clock that did not move gives no number, which decides nothing
    assert round_ratios(both, "cpu")[:2] == pytest.approx((1.0, 1.1))
    assert math.isinf(round_ratios(both, "cpu")[2])


def test_a_comparison_gives_the_candidates_metrics_and_the_baselines_beside_them() -> None:
    both = latency(arms={"base": arm(), "candidate": arm(wall_ns=[22_000] * 30)})
    found = measured(both, memory("base", anon_bytes=1), memory("candidate", anon_bytes=2))
    assert found["latency_wall"].samples[0][0] == pytest.approx(2.2e-6)
    assert found["latency_wall_baseline"].samples[0][0] == pytest.approx(2e-6)
    assert found["latency_ratio_wall"].samples == (pytest.approx((1.1,) * 30),)
    assert found["latency_ratio_cpu"].samples == (pytest.approx((1.0,) * 30),)
    assert (found["memory_anon"].samples, found["memory_anon_baseline"].samples) == (((2.0,),), ((1.0,),))  # fmt: skip
    assert found["memory_anon"].context["model_sha256"] == "m"
    assert found["memory_anon_baseline"].context["model_sha256"] == "b"
    assert found["latency_wall_baseline"].context["model_bytes"] == 4
    assert found["latency_ratio_cpu"].context["model_sha256"] == "m"


def test_several_threads_have_no_ratio_of_cpu_time() -> None:
    both = latency(arms={"base": arm(), "candidate": arm()})
    found = measured(both, threads=2)
    assert "latency_ratio_wall" in found
    assert "latency_ratio_cpu" not in found
    assert "latency_cpu_baseline" not in found


def test_a_session_that_does_not_count_does_not_count_in_any_figure_of_it() -> None:
    both = latency(arms={"base": arm(), "candidate": arm()}, flags=["throttle_event"])
    found = measured(both)
    for metric in ("latency_ratio_cpu", "latency_ratio_wall", "latency_wall_baseline", "load"):
        assert found[metric].excluded == {0: "throttled"}, metric


# ----------------------------------------------------------------- operators, energy, long runs


def test_operators_add_up_by_their_medians() -> None:
    found = measured(ops("model", 3000, 1000))["op_time"]
    assert found.samples == (pytest.approx((4e-6,)),)
    assert found.context["delegated_share"] == pytest.approx(0.75)
    assert [op["seconds"] for op in found.context["ops"]] == pytest.approx([3e-6, 1e-6])


def test_operators_of_two_models_are_kept_apart() -> None:
    found = measured(ops("base", 1000), ops("candidate", 1000, 500))
    assert found["op_time"].samples == (pytest.approx((1.5e-6,)),)
    assert found["op_time_baseline"].samples == (pytest.approx((1e-6,)),)
    assert found["op_time_baseline"].context["model_sha256"] == "b"


def test_operators_too_fast_for_the_profiler_are_no_figure() -> None:
    found = measured(ops("model", 0, 0))["op_time"]
    assert found.valid_sessions == ()
    assert found.context["delegated_share"] is None


def test_what_a_board_cannot_do_is_no_figure() -> None:
    cannot = session(
        "energy", ["model"], None, cause={"what": "unsupported", "message": "no meter"}
    )
    assert set(measured(cannot)) == {"runs_on_device"}


def test_energy_is_what_running_takes_beyond_idling() -> None:
    # 2.2 W for 5 s over 500 inferences
    found = measured(energy(2.7, 4.9))["energy"]
    assert found.samples == (pytest.approx((0.022,)),)
    assert found.context["method"] == "pmic"


def test_energy_below_idle_is_no_figure() -> None:
    assert measured(energy(4.0, 3.9))["energy"].valid_sessions == ()


def test_the_steady_state_is_reported_apart_from_the_first_minute() -> None:
    found = measured(sustained(9e6, 10e6, 11e6, 11.1e6, 11e6, 11e6, 11e6))["sustained_latency"]
    assert found.samples == (pytest.approx((0.011, 0.0111, 0.011, 0.011, 0.011)),)
    assert found.context["steady"]["from_s"] == 120.0
    assert found.context["steady"]["p90_s"] == pytest.approx(0.0165)
    assert found.context["first_minute"]["p50_s"] == pytest.approx(0.009)
    assert len(found.context["minutes"]) == 7


def test_a_board_that_keeps_slowing_down_has_no_steady_state() -> None:
    drifting = [10e6 * 1.02**minute for minute in range(12)]
    found = measured(sustained(*drifting))["sustained_latency"]
    assert found.excluded == {0: "no steady state"}
    assert found.context["steady"] is None


def test_throttling_in_a_long_run_is_its_result_not_a_reason_to_drop_it() -> None:
    found = measured(sustained(*[10e6] * 6, flags=["throttled_now", "throttle_event"]))
    assert found["sustained_latency"].excluded == {}


@pytest.mark.parametrize(
    ("medians", "first"),
    [
        ([], None),
        ([10.0], None),
        ([10, 10], None),  # the first minute never counts
        ([10, 10, 10], 1),
        ([9, 10.9, 11, 11.1, 11, 11], 1),
        ([9, 10.5, 11, 11.1, 11, 11], 2),
        ([10, 10, 10, 10, 10, 12], None),  # 12 is not within 2 % of the median of (10, 12)
        ([10, 10, 12, 10, 10, 10, 10], 3),
    ],
)
def test_steady_from(medians: list[float], first: int | None) -> None:
    assert steady_from(medians) == first


@given(st.lists(st.floats(1, 100), max_size=30))
def test_from_the_steady_state_on_no_median_leaves_the_band(medians: list[float]) -> None:
    first = steady_from(medians)
    if first is not None:
        assert 1 <= first <= len(medians) - max(2, len(medians) // 3)
        steady = medians[first:]
        assert max(steady) - min(steady) <= 2 * 0.02 * max(steady)


# ------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("finished", "line"),
    [
        (latency(), "session 2/3: p50 2 us, cpu 1.9 us"),
        (latency(flags=["clock_jump"]), "session 2/3: p50 2 us, cpu 1.9 us [clock_jump]"),
        (
            latency(arms={"base": arm(), "candidate": arm(inner_loops=5)}),
            "session 2/3: base p50 2 us, cpu 1.9 us; candidate p50 4 us, cpu 3.8 us",
        ),
        (memory(), "memory 2/3: anon 4.1 kB, file 8.19 kB, peak 12.3 kB"),
        (memory("base", peak_bytes=None), "base: memory 2/3: anon 4.1 kB, file 8.19 kB"),
        (ops("candidate", 3000, 1000), "candidate: operators: 2 in 4 us"),
        (ops("candidate", 0, 0), "candidate: operators: 2 that take less than a microsecond each"),
        (energy(2.7, 4.9), "power 2.70 W idle, 4.90 W running"),
        (sustained(9e6, 11e6), "sustained for 120 s: p50 11 ms at its end"),
    ],
)
def test_a_finished_session_is_one_line(finished: dict[str, Any], line: str) -> None:
    assert progress(finished, 2, 3) == line
