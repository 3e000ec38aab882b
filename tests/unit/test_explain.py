"""Explanations name what grew, where it grew, and what to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.explain import explain, match_ops, why_not_run
from edgepipe.gate import (
    AccuracyDropGate,
    DeviceAccuracyDropGate,
    Evidence,
    FullIntegerGate,
    Gate,
    GrowthGate,
    LatencyGate,
    MemoryGate,
    SlowdownGate,
    Status,
    TaskMetricGate,
    Verdict,
)
from edgepipe.measurement import Measurement, single
from edgepipe.tflite_ops.tiny import op_chain_tflite


def op(index: int, name: str, microseconds: float, where: str = "delegate") -> dict[str, Any]:
    return {"index": index, "name": name, "where": where, "seconds": microseconds * 1e-6}


def ops(*named: tuple[str, float]) -> list[dict[str, Any]]:
    return [op(i, name, us) for i, (name, us) in enumerate(named)]


def lines(gate: Gate, *measured: Measurement, status: Status = Status.FAIL) -> str:
    evidence = Evidence("m", "pi", {m.metric: m for m in measured})
    verdict = Verdict(gate.name, status, "", "pi", value=1.0)
    return "\n".join(explain(gate, verdict, evidence.measurements))


def op_time(listed: list[dict[str, Any]], metric: str = "op_time") -> Measurement:
    return single(metric, "s", sum(o["seconds"] for o in listed), {"ops": listed})


def test_a_new_op_among_ops_of_its_name_is_found() -> None:
    base = ops(("conv", 500), ("conv", 100), ("fc", 50), ("conv", 300))
    candidate = ops(("conv", 503), ("conv", 290), ("conv", 101), ("fc", 50), ("conv", 298))
    new = [c for c in match_ops(base, candidate) if c.base_index is None]
    assert [(c.candidate_index, round(c.growth_s * 1e6)) for c in new] == [(1, 290)]


named_ops = st.lists(
    st.tuples(st.sampled_from(["conv", "fc", "add"]), st.integers(1, 1000)), max_size=12
)


@settings(max_examples=200)
@given(named_ops, named_ops)
def test_every_op_is_matched_once_in_order_and_the_growth_adds_up(
    base: list[tuple[str, int]], candidate: list[tuple[str, int]]
) -> None:
    found = match_ops(ops(*base), ops(*candidate))
    assert [c.base_index for c in found if c.base_index is not None] == list(range(len(base)))
    assert [c.candidate_index for c in found if c.candidate_index is not None] == list(range(len(candidate)))  # fmt: skip
    total = sum(us for _, us in candidate) - sum(us for _, us in base)
    assert sum(c.growth_s for c in found) * 1e6 == pytest.approx(total, abs=1e-6)
    same = match_ops(ops(*base), ops(*base))
    assert all(c.growth_s == 0 and c.base_index == c.candidate_index for c in same)


def test_a_slowdown_names_the_ops_that_grew() -> None:
    base = op_time(ops(("conv", 500), ("fc", 100)), "op_time_baseline")
    candidate = op_time(ops(("conv", 500), ("softmax", 40), ("fc", 312)))
    text = lines(SlowdownGate(max=0.03), base, candidate)
    assert text.splitlines() == [
        "all ops together: 600 us -> 852 us (+252 us)",
        "op 2 fc: 100 us -> 312 us (+212 us)",
        "new: op 1 softmax: +40 us",
    ]


def test_ops_that_went_are_counted_against_those_that_grew() -> None:
    text = lines(SlowdownGate(max=0.03), op_time(ops(("a", 100)), "op_time_baseline"), op_time(ops(("b", 150))))  # fmt: skip
    assert "new: op 0 b: +150 us" in text
    assert "gone with ops of the baseline: 100 us" in text


def test_an_absolute_limit_names_the_most_expensive_ops_and_what_is_not_delegated() -> None:
    listed = [*ops(*((f"op{i}", 10.0) for i in range(9))), op(9, "CUSTOM", 90, "builtin")]
    text = lines(LatencyGate(max=1e-4), op_time(listed))
    assert text.splitlines()[0] == "op 9 CUSTOM: 90 us (50% of all ops)"
    assert "1 of 10 ops (50% of the time) are not delegated" in text
    assert len(text.splitlines()) == 6


def stages(anon: tuple[int, int, int, int]) -> dict[str, Any]:
    names = ("before_load", "after_load", "after_first", "steady")
    return {"stages": [{name: {"anon": value} for name, value in zip(names, anon, strict=True)}]}


def test_memory_names_the_quantity_and_the_stage_it_grew_at() -> None:
    now = single("memory_anon", "B", 0, stages((1_000_000, 3_000_000, 3_500_000, 3_500_000)))
    base = single("memory_anon_baseline", "B", 0, stages((1_000_000, 1_500_000, 2_000_000, 2_000_000)))  # fmt: skip
    for gate in (GrowthGate(quantity="anon"), MemoryGate(max=1.0, quantity="anon")):
        text = lines(gate, now, base)
        assert "the quantity is anon" in text
        assert "after_load, loading and compiling (packed weights, arena): +2 MB, in the baseline +500 kB" in text  # fmt: skip
        assert "after_first, the first inference: +500 kB, in the baseline +500 kB" in text


def test_accuracy_names_the_classes_that_lost_most_and_the_noisiest_layers() -> None:
    by_class = [{"class": c, "n": 10, "reference_right": 9, "right": 9 - c} for c in range(8)]
    layers = [{"layer": 3, "operator": "CONV_2D", "sqnr_db": 7.0}]
    drop = single("accuracy_drop", "points", 3, {"by_class": by_class, "layers": layers})
    doubtful = dataclasses.replace(drop, context={**drop.context, "doubts": ["prepared the same way?"]})  # fmt: skip
    assert lines(AccuracyDropGate(max=1.0), doubtful).startswith("prepared the same way?")
    text = lines(AccuracyDropGate(max=1.0), drop).splitlines()
    assert text[0] == "class 7: 2 of 10 right, the reference 9"
    assert "and 2 more classes" in text
    assert any("CONV_2D" in line and "7.0 dB" in line for line in text)


def test_no_layer_is_blamed_where_the_float_file_fails_as_well() -> None:
    layers = {"layers": [{"layer": 3, "operator": "CONV_2D", "sqnr_db": 7.0}]}
    verdict = Verdict("task_metric", Status.FAIL, "", value=0.05, limit=0.7)
    for score, said in ((0.06, "float file it was made from reaches 0.06"), (0.9, "7.0 dB")):
        found = {m.metric: m for m in (single("task_metric", "", 0.05, layers), single("task_metric_float", "", score, {}))}  # fmt: skip
        (line,) = explain(TaskMetricGate(min=0.7), verdict, found)
        assert said in line
    verdict = Verdict("accuracy_drop", Status.FAIL, "", value=25.0, limit=3.0)
    for score, said in ((0.74, "float file it was made from loses 25 points"), (0.98, "7.0 dB")):
        known = (single("accuracy_drop", "points", 25, layers), single("task_metric_reference", "", 0.99, {}), single("task_metric_float", "", score, {}))  # fmt: skip
        (line,) = explain(AccuracyDropGate(max=3.0), verdict, {m.metric: m for m in known})
        assert said in line


def test_a_device_that_computes_otherwise_is_told_from_a_model_that_lost() -> None:
    gate = DeviceAccuracyDropGate(max=1.0)
    flips = [{"sample": 7, "host": 1, "device": 0, "label": 1}]
    wrong = single("device_flips", "", 0.1, {"flipped": 1, "samples": 10, "flips": flips})
    assert lines(gate, wrong).splitlines() == [
        "the device answers 1 of 10 samples otherwise than this host does with the same file",
        "sample 7: 0 there, 1 here, labelled 1",
    ]
    alike = single("device_flips", "", 0.0, {"flipped": 0, "samples": 10, "flips": []})
    assert lines(gate, alike).endswith("the loss is the model's")


def test_operators_below_the_profilers_grain_are_not_told_apart() -> None:
    fast = op_time(ops(("conv", 3), ("fc", 2))), op_time(ops(("conv", 30), ("fc", 2)), "op_time_baseline")  # fmt: skip
    for gate, most in ((SlowdownGate(max=0.03), "32 us"), (LatencyGate(max=1e-6), "5 us")):
        text = lines(gate, *fast)
        assert len(text.splitlines()) == 1
        assert text.endswith(f"counts whole microseconds, and all together they take {most}")
    nothing = op_time(ops(("conv", 0)))
    assert lines(LatencyGate(max=1e-9), nothing).endswith("take less than one")
    # unless one has grown by far more than its rounding
    grown = op_time(ops(("conv", 3), ("fc", 2)), "op_time_baseline"), op_time(ops(("conv", 12), ("fc", 4)))  # fmt: skip
    text = lines(SlowdownGate(max=0.03), *grown)
    assert "op 0 conv: 3 us -> 12 us (+9 us)" in text
    assert "fc" not in text
    # and none is said to have grown by less than the profiler can count
    slow = op_time(ops(("conv", 500), ("fc", 100)), "op_time_baseline"), op_time(ops(("conv", 500.2), ("fc", 110)))  # fmt: skip
    assert "conv" not in lines(SlowdownGate(max=0.03), *slow)


def test_models_that_cannot_be_compared_get_no_advice_on_noise() -> None:
    ratios = Measurement("latency_wall", "s", ((0.01,) * 40,), context={"governor": "ondemand"})
    lacking = Verdict("slowdown", Status.INCONCLUSIVE, "the models cannot be compared", "pi")
    assert explain(SlowdownGate(max=0.03), lacking, {"latency_wall": ratios}) == ()


def test_float_operators_are_named() -> None:
    island = {"computing": ("SOFTMAX",), "names": ("SOFTMAX",), "output": "probabilities"}
    text = lines(FullIntegerGate(), single("float_islands", "", 1, {"islands": [island]}))
    assert text == "SOFTMAX in floating point, up to tensor probabilities"


def test_an_undecided_latency_says_what_to_change() -> None:
    sessions = [{"contended": True}, {"contended": False}]
    latency = Measurement(
        "latency_wall", "s", ((0.010,) * 40, (0.011,) * 40, (0.5,) * 40), excluded={2: "swap-in, throttled"},
        context={"sessions": sessions, "governor": ["ondemand"]},
    )  # fmt: skip
    text = lines(LatencyGate(max=0.0105), latency, status=Status.INCONCLUSIVE)
    assert "cool it" in text
    assert "the board swapped" in text
    assert "in 1 of 2 sessions: stop it" in text
    assert "the CPU governor is ondemand" in text
    assert "2 sessions of 40 samples whose medians lie 10.0% apart" in text


def test_a_steady_governor_is_not_complained_of() -> None:
    latency = Measurement("latency_wall", "s", ((0.01,) * 40,), context={"governor": "performance"})
    assert "governor" not in lines(LatencyGate(max=1.0), latency, status=Status.INCONCLUSIVE)


def test_the_null_device_is_named_as_the_reason() -> None:
    simulated = single("memory_peak", "B", 1, {"simulated": True})
    text = lines(MemoryGate(max=2.0), simulated, status=Status.INCONCLUSIVE)
    assert "measure on a real one" in text


def test_nothing_is_said_of_a_pass_or_where_nothing_was_recorded() -> None:
    assert lines(SlowdownGate(max=0.03), op_time(ops(("a", 1))), status=Status.PASS) == ""
    for gate in (SlowdownGate(max=0.03), LatencyGate(max=1.0), AccuracyDropGate(max=1.0), FullIntegerGate()):  # fmt: skip
        assert lines(gate) == ""


def test_a_model_that_does_not_fit_says_how_much_memory_was_missing(tmp_path: Path) -> None:
    model = tmp_path / "m.tflite"  # (1, 100, 100, 8) int8 in and out: 80 kB each
    model.write_bytes(op_chain_tflite("activation", size=100, channels=(8, 8), repeats=2))
    killed = {"what": "out-of-memory", "message": "killed", "memory_available_bytes": 100_000}
    assert why_not_run({**killed, "peak_rss_bytes": 90_000}, model) == (
        "killed; 100 kB were free and it had taken 90 kB; the model needs at least 160 kB "
        "(0 B of weights, 160 kB for its largest operator); at least 60 kB are missing"
    )
    refused = {"what": "error", "message": "status 3", "memory_available_bytes": 100_000}
    assert why_not_run(refused, model).endswith("at least 60 kB are missing")
    assert why_not_run({**refused, "memory_available_bytes": 170_000}, model) == "status 3"
    assert why_not_run({**killed, "what": "crash"}, model) == "killed"
