"""Baselines: written whole, read only if they are what they say, compared only with their like."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.baseline import (
    COMPARABLE,
    NO_BASELINE,
    REQUIRED,
    Baseline,
    baseline_path,
    changes,
    differences,
    load_baseline,
    promote,
    refuse_incomparable,
    why_not_promotable,
)
from edgepipe.errors import RequestError
from edgepipe.gate import Evidence, Status, Verdict
from edgepipe.measurement import Measurement, single

CONTEXT: dict[str, Any] = {
    "profile": "pi", "machine": "aarch64", "page_size_bytes": 16384, "runtime": "litert",
    "runtime_version": "2.3.0", "runtime_sha256": "cd" * 32, "backend": "litert-c", "threads": 1,
    "affinity": [2, 3], "boot_id": "b1", "device": "ssh://somebody@secret-host", "governor": "performance",
    "model_inputs": [{"name": "x", "shape": [1, 8], "dtype": "int8"}], "kernel_mode": "", "weight_cache": False,
    "cpu_model": "Cortex-A76 r4p1", "is_emulated": False,
}  # fmt: skip
OTHER: dict[str, Any] = {
    "profile": "pi5", "machine": "armv7l", "page_size_bytes": 4096, "runtime": "tflite-runtime",
    "runtime_version": "2.2.0", "runtime_sha256": "ee" * 32, "backend": "litert-interpreter", "threads": 4,
    "affinity": [], "model_inputs": [{"name": "x", "shape": [1, 9], "dtype": "int8"}], "kernel_mode": "builtin",
    "weight_cache": True, "cpu_model": "Cortex-A72 r0p3", "is_emulated": True,
}  # fmt: skip
PASSED = Verdict("latency", Status.PASS, "fast enough", "pi")
SLOWDOWN = Verdict("slowdown", Status.PASS, "as fast as before", "pi")


@pytest.fixture
def shipped(tmp_path: Path) -> Artifact:
    path = tmp_path / "cache" / "model.tflite"
    path.parent.mkdir()
    path.write_bytes(b"TFL3 new")
    spec = TensorSpec("x", (1, 8), "int8", scale=0.1)
    return make_artifact("tflite", path, inputs=(spec,), outputs=(spec,), facts={"python": "/home/me"})  # fmt: skip


def evidence(shipped: Artifact, latency_s: float = 0.010, **context: Any) -> Evidence:
    shared = {**CONTEXT, "model_sha256": shipped.sha256, **context}
    sessions = tuple(tuple(latency_s + 1e-6 * i for i in range(50)) for _ in range(3))
    measured = {
        "latency_wall": Measurement("latency_wall", "s", sessions, context=shared),
        "runs_on_device": single("runs_on_device", "", 1, shared),
        "memory_peak_baseline": single("memory_peak_baseline", "B", 9, {**shared, "model_sha256": "b" * 64}),
    }  # fmt: skip
    return Evidence(shipped.sha256, "pi", measured)


def about_model(shipped: Artifact) -> Evidence:
    measured = single("model_bytes", "B", shipped.size_bytes, {"model_sha256": shipped.sha256})
    return Evidence(shipped.sha256, "", {"model_bytes": measured})


def promoted(folder: Path, shipped: Artifact, run_id: str = "run-1", **context: Any) -> Baseline:
    promote(
        folder=folder, recipe="digits", run_id=run_id, shipped=shipped, model=about_model(shipped),
        device=evidence(shipped, **context), verdicts=(PASSED, SLOWDOWN),
    )  # fmt: skip
    found = load_baseline(folder, "pi", "digits")
    assert found is not None
    return found


def test_what_was_promoted_is_read_back(tmp_path: Path, shipped: Artifact) -> None:
    found = promoted(tmp_path, shipped)
    assert (found.run, found.recipe, found.profile) == ("run-1", "digits", "pi")
    assert found.model.path == tmp_path / "pi" / "digits.tflite"
    assert found.model.path.read_bytes() == shipped.path.read_bytes()
    assert found.model.inputs == shipped.inputs
    assert found.comparable == {key: CONTEXT[key] for key in COMPARABLE}
    assert found.figures["latency_wall"]["sessions"][0]["n"] == 50
    assert found.figures["model_bytes"]["p50"] == shipped.size_bytes
    assert [v["status"] for v in found.verdicts] == ["PASS", "PASS"]
    assert sorted(p.name for p in (tmp_path / "pi").iterdir()) == ["digits.json", "digits.tflite"]


def test_a_baseline_names_no_machine_of_ours(tmp_path: Path, shipped: Artifact) -> None:
    text = promoted(tmp_path, shipped).path.read_text()
    assert "secret-host" not in text
    assert "/home/me" not in text
    assert str(tmp_path) not in text


def test_there_may_be_no_baseline(tmp_path: Path) -> None:
    assert load_baseline(tmp_path, "pi", "digits") is None


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_damaged_baseline_is_refused_and_not_taken_for_none(
    tmp_path: Path, shipped: Artifact
) -> None:
    path = promoted(tmp_path, shipped).path
    whole = path.read_bytes()

    def refused(expected: str) -> None:
        with pytest.raises(RequestError, match=expected) as caught:
            load_baseline(tmp_path, "pi", "digits")
        assert caught.value.code == "bad-baseline"
        assert caught.value.hint
        path.write_bytes(whole)
        path.with_suffix(".tflite").write_bytes(shipped.path.read_bytes())

    # the machine died between the two files of the next promotion
    path.with_suffix(".tflite").write_bytes(b"TFL3 newer")
    refused("is not the model of digits.json")
    path.with_suffix(".tflite").unlink()
    refused("no model file beside it")
    path.write_bytes(whole[: len(whole) // 2])
    refused("is no baseline")
    change(path, schema=99)
    refused("has schema 99")
    change(path, figures=[1])
    refused("is no baseline")
    change(path, profile="pi5")
    refused("is the baseline of digits on pi5")


@pytest.mark.parametrize("key", COMPARABLE)
def test_evidence_that_differs_in_one_key_is_inconclusive_and_names_it(
    key: str, tmp_path: Path, shipped: Artifact
) -> None:
    found = promoted(tmp_path, shipped)
    device = evidence(shipped, **{key: OTHER[key]})
    failed = dataclasses.replace(SLOWDOWN, status=Status.FAIL, value=1.06)
    for verdict in (SLOWDOWN, failed):
        (judged,) = refuse_incomparable([verdict], [device], {"pi": found}, {"pi": found.model.sha256}, run_id="run-2")  # fmt: skip
        assert judged.status is Status.INCONCLUSIVE
        assert f"{key}: baseline " in judged.reason
        assert judged.value is None
    (text,) = differences(CONTEXT, {**CONTEXT, key: OTHER[key]})
    old, new = text.removeprefix(f"{key}: baseline ").split(", run ")
    assert old != new


def test_a_null_device_stands_for_the_baselines_board_but_not_for_other_inputs(
    tmp_path: Path, shipped: Artifact
) -> None:
    found = promoted(tmp_path, shipped)

    def judged(**context: Any) -> Verdict:
        failed = dataclasses.replace(SLOWDOWN, status=Status.FAIL, value=1.06)
        device = evidence(shipped, simulated=True, **context)
        (verdict,) = refuse_incomparable([failed], [device], {"pi": found}, {"pi": found.model.sha256}, run_id="run-2")  # fmt: skip
        return verdict

    assert judged(machine="any", runtime_sha256="0" * 64).status is Status.FAIL
    assert judged(model_inputs=OTHER["model_inputs"]).status is Status.INCONCLUSIVE


def test_a_key_that_was_not_recorded_differs(tmp_path: Path, shipped: Artifact) -> None:
    poor = {k: v for k, v in CONTEXT.items() if k != "runtime_sha256"}
    assert differences(CONTEXT, poor) == ("runtime_sha256: baseline cdcdcdcdcdcd, run none",)


def test_equal_evidence_keeps_its_verdict(tmp_path: Path, shipped: Artifact) -> None:
    found = promoted(tmp_path, shipped)
    measured_against = {"pi": found.model.sha256}
    (judged,) = refuse_incomparable([SLOWDOWN], [evidence(shipped)], {"pi": found}, measured_against, run_id="run-2")  # fmt: skip
    assert judged is SLOWDOWN


@pytest.mark.parametrize(
    ("measured_against", "run_id", "expected"),
    [
        ({}, "run-2", "no baseline was measured beside the model"),
        ({"pi": "0" * 64}, "run-2", "the baseline is now"),
        ({}, "run-1", "this run is the baseline itself"),
    ],
)
def test_evidence_against_another_model_than_the_baseline_is_inconclusive(
    tmp_path: Path, shipped: Artifact, measured_against: dict[str, str], run_id: str, expected: str
) -> None:
    found = promoted(tmp_path, shipped)
    (judged,) = refuse_incomparable([SLOWDOWN], [evidence(shipped)], {"pi": found}, measured_against, run_id=run_id)  # fmt: skip
    assert judged.status is Status.INCONCLUSIVE
    assert expected in judged.reason


def test_figures_taken_beside_another_model_are_inconclusive(
    tmp_path: Path, shipped: Artifact
) -> None:
    found = promoted(tmp_path, shipped)
    for run_id in ("run-1", "run-2"):
        device = evidence(shipped, baseline_sha256="f" * 64)
        (judged,) = refuse_incomparable([SLOWDOWN], [device], {"pi": found}, {"pi": found.model.sha256}, run_id=run_id)  # fmt: skip
        assert judged.status is Status.INCONCLUSIVE
        assert "figures of other measurements are among these: beside the model ffffffffffff" in judged.reason  # fmt: skip


def test_a_missing_baseline_is_inconclusive_only_for_the_gates_that_ask_for_it(
    shipped: Artifact,
) -> None:
    slowdown, latency = refuse_incomparable([SLOWDOWN, PASSED], [evidence(shipped)], {"pi": None}, {}, run_id="r")  # fmt: skip
    assert slowdown.status is Status.INCONCLUSIVE
    assert "edgepipe gate --promote" in slowdown.details[0]
    assert latency is PASSED


def test_a_promoted_run_is_judged_as_it_was_then(tmp_path: Path, shipped: Artifact) -> None:
    found = promoted(tmp_path, shipped, run_id="run-1")
    (judged,) = refuse_incomparable([SLOWDOWN], [evidence(shipped)], {"pi": found}, {"pi": "0" * 64}, run_id="run-1")  # fmt: skip
    assert judged is SLOWDOWN


def test_only_a_run_whose_gates_all_passed_is_promoted(tmp_path: Path, shipped: Artifact) -> None:
    def why(*verdicts: Verdict, baseline: Baseline | None = None, **context: Any) -> str:
        devices = [evidence(shipped, **context)]
        return why_not_promotable(verdicts, shipped, devices, {"pi": baseline})

    failed = dataclasses.replace(PASSED, status=Status.FAIL)
    undecided = dataclasses.replace(SLOWDOWN, status=Status.INCONCLUSIVE, reason=NO_BASELINE)
    assert why(PASSED, SLOWDOWN) == ""
    assert "latency on pi is FAIL" in why(failed, SLOWDOWN)
    assert "latency on pi is INCONCLUSIVE" in why(dataclasses.replace(failed, status=Status.INCONCLUSIVE))  # fmt: skip
    # the first baseline cannot be compared with one; any later one must be
    assert why(PASSED, undecided) == ""
    assert "slowdown on pi is INCONCLUSIVE" in why(PASSED, undecided, baseline=promoted(tmp_path, shipped))  # fmt: skip
    # an absolute limit asks for no baseline: that it cannot tell has another reason
    unknown = Verdict("instructions", Status.INCONCLUSIVE, "no measurement of instructions", "pi")
    assert "instructions on pi is INCONCLUSIVE" in why(PASSED, unknown)
    assert "slowdown on pi is FAIL" in why(PASSED, dataclasses.replace(undecided, status=Status.FAIL))  # fmt: skip
    assert "null device" in why(PASSED, simulated=True)
    assert why(PASSED, emulated="qemu-system 7.2 cortex-a72") == ""
    assert "another model" in why(PASSED, model_sha256="0" * 64)
    assert "no device" in why_not_promotable([PASSED], shipped, [], {})


@pytest.mark.parametrize("key", REQUIRED)
def test_evidence_without_a_required_key_is_never_promoted(key: str, shipped: Artifact) -> None:
    device = evidence(shipped, **{key: None})
    assert key in why_not_promotable([PASSED], shipped, [device], {"pi": None})


def test_a_model_that_changed_or_went_is_not_promoted(shipped: Artifact) -> None:
    devices = [evidence(shipped)]
    shipped.path.write_bytes(b"TFL3 other")
    assert "has changed since the run" in why_not_promotable([PASSED], shipped, devices, {})
    shipped.path.unlink()
    assert "is gone" in why_not_promotable([PASSED], shipped, devices, {})


def test_a_promotion_says_what_it_changes(tmp_path: Path, shipped: Artifact) -> None:
    found = promoted(tmp_path, shipped, latency_s=0.010)
    rows = {row[0]: row[1:] for row in changes(found, about_model(shipped), evidence(shipped, latency_s=0.012))}  # fmt: skip
    assert rows["latency_wall"] == ("10 ms", "12 ms", "+20.0 %")
    assert rows["model_bytes"] == ("8 B", "8 B", "+0.0 %")
    first = {row[0]: row[1] for row in changes(None, about_model(shipped), evidence(shipped))}
    assert set(first.values()) == {"-"}


def test_a_merged_file_that_is_promoted_keeps_its_signature(
    tmp_path: Path, shipped: Artifact
) -> None:
    single_file = promoted(tmp_path, shipped)
    merged = dataclasses.replace(shipped, signature="length16")
    context = {"model_sha256": merged.sha256, "model_signature": "length16"}
    size = Evidence(merged.sha256, "", {"model_bytes": single("model_bytes", "B", 9, context)})
    assert ("model_bytes", "8 B", "9 B", "(merged, or not)") in changes(single_file, size, evidence(merged))  # fmt: skip
    found = promoted(tmp_path, merged)
    assert found.model.signature == "length16"
    assert ("model_bytes", "8 B", "9 B", "+12.5 %") in changes(found, size, evidence(merged))


def test_figures_on_other_evaluation_data_are_not_compared(tmp_path: Path, shipped: Artifact) -> None:  # fmt: skip
    def on_data(value: float, data: str) -> Evidence:
        context = {"model_sha256": shipped.sha256, "data_sha256": data}
        return Evidence(shipped.sha256, "", {"task_metric": single("task_metric", "", value, context)})  # fmt: skip

    device = evidence(shipped)
    promote(
        folder=tmp_path, recipe="digits", run_id="r", shipped=shipped, model=on_data(0.8, "d1"),
        device=device, verdicts=(),
    )  # fmt: skip
    old = load_baseline(tmp_path, "pi", "digits")
    assert ("task_metric", "0.8", "0.9", "(other data)") in changes(old, on_data(0.9, "d2"), device)
    assert ("task_metric", "0.8", "0.9", "+12.5 %") in changes(old, on_data(0.9, "d1"), device)


def test_a_promotion_that_cannot_copy_the_model_leaves_the_old_one(
    tmp_path: Path, shipped: Artifact
) -> None:
    old = promoted(tmp_path, shipped)
    gone = dataclasses.replace(shipped, path=tmp_path / "gone.tflite", sha256="f" * 64)
    with pytest.raises(FileNotFoundError):
        promote(
            folder=tmp_path, recipe="digits", run_id="run-2", shipped=gone,
            model=about_model(shipped), device=evidence(shipped), verdicts=(),
        )  # fmt: skip
    assert load_baseline(tmp_path, "pi", "digits") == old
    assert len(list((tmp_path / "pi").iterdir())) == 2
    assert baseline_path(tmp_path, "pi", "digits") == old.path
