"""Instructions of an inference: the counter on the board, what its sessions become, the gate, the label."""

from __future__ import annotations

import dataclasses
import errno
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.bench import MeasureOptions, measure
from edgepipe.calibration import refuse_emulated
from edgepipe.commands.on_device import tflite_model
from edgepipe.device.parse import name_cores
from edgepipe.emulated import not_measurable, why_emulated
from edgepipe.errors import NotReadyError, RequestError
from edgepipe.gate import (
    Evidence,
    Gate,
    GrowthGate,
    InstructionsGate,
    LatencyGate,
    SlowdownGate,
    Status,
    Verdict,
    judge_all,
)
from edgepipe.judge import judge, needs_baseline
from edgepipe.measurement import Measurement, single
from edgepipe.profile import DeviceProfile, Emulation, find_profile
from edgepipe.resources import profile_paths
from edgepipe.schema import build
from edgepipe.sessions import to_measurements
from edgepipe.testing import NullDevice, parse_scenario
from edgepipe.tflite_ops.tiny import tiny_tflite
from tests.unit.board_side import payload_module

CONTEXT: dict[str, Any] = {
    "model_sha256": "m1", "profile": "pi", "runtime": "litert", "runtime_version": "2.3.0", "threads": 1,
    "cpu_model": "Cortex-A72 r0p3", "counter": "perf_event_open", "baseline_sha256": "b1",
}  # fmt: skip
EMULATED = Emulation(kind="system", cpu="cortex-a72", memory=1e9)
BASE = 1_000_000


def evidence(now: list[int], before: list[int] | None = None, base: dict[str, Any] | None = None, **changes: Any) -> Evidence:  # fmt: skip
    """One count per session of the model, and of the baseline beside it."""
    context = CONTEXT | changes
    found = {"instructions": Measurement("instructions", "", tuple((n,) for n in now), context=context)}  # fmt: skip
    if before is not None:
        theirs = context | {"model_sha256": "b1"} | (base or {})
        found["instructions_baseline"] = Measurement("instructions_baseline", "", tuple((n,) for n in before), context=theirs)  # fmt: skip
    return Evidence("m1", "pi", found)


def verdict(*args: Any, gate: InstructionsGate | None = None, **changes: Any) -> Verdict:
    return (gate or InstructionsGate()).judge(evidence(*args, **changes))


# -------------------------------------------------------------------------------------- the gate


def test_the_same_count_passes_and_one_beyond_a_thousandth_fails_with_the_exact_percentage() -> None:  # fmt: skip
    assert verdict([BASE] * 3, [BASE] * 3).status is Status.PASS
    assert verdict([BASE + 1000] * 3, [BASE] * 3).status is Status.PASS
    failed = verdict([BASE + 1001] * 3, [BASE] * 3)
    assert failed.status is Status.FAIL
    assert failed.reason == (
        "1,001,001 instructions, +0.1001 % (+1,001) against the baseline's 1,000,000 on Cortex-A72 r0p3; "
        "up to +0.1 % is allowed"
    )
    assert verdict([BASE // 2] * 3, [BASE] * 3).status is Status.PASS  # fewer are welcome


@given(
    st.lists(st.integers(900_000, 1_100_000), min_size=2, max_size=4),
    st.lists(st.integers(900_000, 1_100_000), min_size=2, max_size=4),
    st.floats(0, 0.2),
)
def test_a_pass_means_that_every_count_is_within_the_limit(now: list[int], before: list[int], growth: float) -> None:  # fmt: skip
    found = verdict(now, before, gate=InstructionsGate(max_growth=growth))
    repeats = all(max(counts) / min(counts) - 1 <= 0.0002 for counts in (now, before))
    within = max(now) <= min(before) + growth * min(before)
    beyond = min(now) > max(before) + growth * max(before)
    expected = "INCONCLUSIVE" if not repeats else "PASS" if within else "FAIL" if beyond else "INCONCLUSIVE"  # fmt: skip
    assert found.status == expected


def test_an_absolute_limit_needs_no_baseline() -> None:
    gate = build(InstructionsGate, {"max": 1_000_000}, where="gate", error=RequestError)
    assert not needs_baseline([gate])
    assert needs_baseline([InstructionsGate()])
    assert verdict([BASE] * 2, gate=gate).status is Status.PASS
    failed = verdict([BASE + 1] * 2, gate=gate)
    assert (failed.status, failed.reason) == ("FAIL", "1,000,001 instructions > 1,000,000 on Cortex-A72 r0p3")  # fmt: skip


def test_two_limits_are_two_gates() -> None:
    with pytest.raises(RequestError, match="two limits"):
        InstructionsGate(max=1, max_growth=0.1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"threads": 2}, "2 threads"),
        ({"cpu_model": None}, "does not say on which CPU"),
        ({"base": {"cpu_model": "Cortex-A76 r4p1"}}, "cpu_model of the baseline Cortex-A76 r4p1"),
        ({"base": {"runtime_version": "2.2.0"}}, "runtime_version of the baseline 2.2.0"),
        ({"now": [BASE]}, "whether it repeats"),
        ({"now": [BASE, BASE + 201]}, "does not repeat: its sessions differ by 0.02 %"),
        ({"now": [0, 0]}, "whether it repeats"),
        ({"before": None}, "no baseline was measured"),
        ({"before": [BASE, BASE + 300]}, "instructions_baseline does not repeat"),
        (
            {
                "model_inputs": [{"dtype": "int8", "shape": [1]}],
                "baseline_inputs": [{"dtype": "int8", "shape": [2]}],
            },
            "cannot be compared",
        ),
    ],
)
def test_counts_that_cannot_be_compared_decide_nothing(changes: dict[str, Any], why: str) -> None:
    found = verdict(**({"now": [BASE, BASE], "before": [BASE, BASE]} | changes))
    assert found.status is Status.INCONCLUSIVE
    assert why in found.reason


def test_a_board_that_counts_nothing_says_why() -> None:
    context = CONTEXT | {"not_measured": {"instructions": "no counter there"}}
    found = InstructionsGate().judge(
        Evidence("m1", "pi", {"runs_on_device": single("runs_on_device", "", 1, context)})
    )
    assert (found.status, found.reason) == ("INCONCLUSIVE", "no measurement of instructions: no counter there")  # fmt: skip


def test_without_a_baseline_only_the_gate_on_growth_is_open() -> None:
    gates: list[Gate] = [InstructionsGate(), InstructionsGate(max=BASE)]
    found = judge(gates, Evidence("m1", "", {}), [evidence([BASE] * 2)], baselines={"pi": None}, measured_against={}, run_id="r")  # fmt: skip
    assert [v.status for v in found if v.gate == "instructions"] == ["INCONCLUSIVE", "PASS"]


# ----------------------------------------------------------------------------------- the sessions


def session(arm: str, counts: list[int]) -> dict[str, Any]:
    data = {
        "counts": counts,
        "overhead": 1000,
        "counter": "perf_event_open",
        "fixed_addresses": True,
    }
    health = {"boot_id": "1"}
    return {"kind": "instructions", "arms": [arm], "data": data, "before": health, "after": health, "flags": ["throttled_now"]}  # fmt: skip


def test_a_session_gives_the_median_of_its_inferences_without_the_counting() -> None:
    sessions = [session("candidate", [5000, 5002, 9000]), session("base", [4000]), session("candidate", [5001])]  # fmt: skip
    context = {"boot_id": "1", "baseline_sha256": "b1", "model_sha256": "m1"}
    found = {m.metric: m for m in to_measurements(sessions, context, threads=1)}
    assert found["instructions"].samples == ((4002.0,), (4001.0,))
    assert found["instructions"].excluded == {}  # heat does not change what is counted
    assert found["instructions_baseline"].samples == ((3000.0,),)
    assert found["instructions_baseline"].context["model_sha256"] == "b1"
    assert found["instructions"].context["counts"] == [[4000, 4002, 8000], [4001]]


@pytest.fixture
def models(tmp_path: Path) -> Any:
    (tmp_path / "base.tflite").write_bytes(tiny_tflite())
    (tmp_path / "model.tflite").write_bytes(tiny_tflite(layers=2))
    return tflite_model(tmp_path / "base.tflite"), tflite_model(tmp_path / "model.tflite")


def on_null(models: Any, address: str, profile: DeviceProfile, **options: Any) -> dict[str, Measurement]:  # fmt: skip
    base, model = models
    with NullDevice(parse_scenario(address), address=address) as device:
        result = measure(model, device, profile, MeasureOptions(session=0.1, **options), baseline=base)  # fmt: skip
    return {m.metric: m for m in result.measurements}


@pytest.fixture
def localhost() -> DeviceProfile:
    return find_profile("localhost", profile_paths())


@pytest.fixture
def emulated(localhost: DeviceProfile) -> DeviceProfile:
    return dataclasses.replace(localhost, emulated=EMULATED)


def judged(gate: Gate, found: dict[str, Measurement]) -> Verdict:
    sha256 = found["runs_on_device"].context["model_sha256"]
    return judge_all([gate], Evidence(sha256, "", {}), [Evidence(sha256, "localhost", found)])[-1]


def test_a_slower_model_fails_on_the_null_device_and_nothing_passes_there(models: Any, localhost: DeviceProfile) -> None:  # fmt: skip
    slower = on_null(models, "null://quiet?slowdown=1.002", localhost, ops=False)
    failed = judged(InstructionsGate(), slower)
    assert failed.status is Status.FAIL
    assert "+0.2000 % (+20,00" in failed.reason
    same = judged(InstructionsGate(), on_null(models, "null://quiet", localhost, ops=False))
    assert same.status is Status.INCONCLUSIVE
    assert "null device" in same.reason


def test_instructions_are_left_out_where_they_are_not_wanted_or_cannot_be_counted(models: Any, localhost: DeviceProfile) -> None:  # fmt: skip
    found = on_null(models, "null://quiet", localhost, instructions=False)
    assert "instructions" not in found
    found = on_null(models, "null://quiet", localhost, threads=2)
    assert "one thread only" in found["latency_wall"].context["not_measured"]["instructions"]
    with pytest.raises(NotReadyError, match="one thread only") as caught:
        on_null(models, "null://quiet", localhost, threads=2, instructions=True)
    assert caught.value.code == "no-instructions"


# --------------------------------------------------------------------------------- emulated boards


def test_nothing_is_timed_on_an_emulated_board(models: Any, emulated: DeviceProfile) -> None:
    found = on_null(models, "null://quiet?slowdown=1.1", emulated, sustained=60.0)
    kinds = ("memory_anon", "memory_file", "memory_peak", "model_bytes", "instructions")
    assert set(found) == {"runs_on_device", "measuring_overhead", *kinds, *(f"{k}_baseline" for k in kinds)}  # fmt: skip
    assert all("cortex-a72" in m.context["emulated"] for m in found.values())
    for gate in (LatencyGate(max=1.0), SlowdownGate(max=1.0)):
        said = judged(gate, found)
        assert said.status is Status.INCONCLUSIVE
        assert 'localhost is emulated: its wall time says nothing; use gate = "instructions"' in said.reason  # fmt: skip
    failed = judged(InstructionsGate(), found)
    assert (failed.status, failed.reason[-len("(emulated)") :]) == ("FAIL", "(emulated)")
    assert judged(GrowthGate(), found).reason.count("(emulated)") == 1


def test_a_board_emulated_in_user_mode_has_no_memory_either(models: Any, emulated: DeviceProfile) -> None:  # fmt: skip
    user = dataclasses.replace(emulated, emulated=dataclasses.replace(EMULATED, kind="user"))
    found = on_null(models, "null://quiet", user)
    assert set(found) == {"runs_on_device", "model_bytes", "model_bytes_baseline"}
    assert "its memory is the emulator's" in judged(GrowthGate(), found).reason


def test_a_board_that_says_it_is_emulated_is_believed(localhost: DeviceProfile, emulated: DeviceProfile) -> None:  # fmt: skip
    said = "/etc/edgepipe-emulated: qemu-user 7.2"
    assert why_emulated(localhost, {}) == ""
    assert why_emulated(localhost, {"emulated": said}) == why_emulated(emulated, {"emulated": said}) == said  # fmt: skip
    assert "system-mode emulation of cortex-a72" in why_emulated(emulated, {})
    assert not_measurable(localhost, {"no_instructions": ""}, threads=1) == {}
    assert "memory" in not_measurable(localhost, {"emulated": said, "no_instructions": ""}, threads=1)  # fmt: skip
    assert set(not_measurable(localhost, {}, threads=1)) == {"instructions"}  # an old runner


def test_an_emulated_board_is_not_calibrated() -> None:
    refuse_emulated({"runs_on_device": single("runs_on_device", "", 1, CONTEXT)})
    with pytest.raises(RequestError, match="is emulated"):
        refuse_emulated({"runs_on_device": single("runs_on_device", "", 1, CONTEXT | {"emulated": "qemu"})})  # fmt: skip


# ------------------------------------------------------------------------------------- the board


def test_every_refusal_of_the_kernel_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    instructions, sysfs = payload_module("instructions"), payload_module("sysfs")
    monkeypatch.setattr(sysfs, "SYSROOT", str(tmp_path))
    assert "perf_event_paranoid is unknown" in instructions.why_refused(errno.EACCES)
    path = tmp_path / "proc/sys/kernel/perf_event_paranoid"
    path.parent.mkdir(parents=True)
    path.write_text("3\n")
    assert "is 3): on the board, sudo sysctl kernel.perf_event_paranoid=2" in instructions.why_refused(errno.EACCES)  # fmt: skip
    path.write_text("-1\n")
    assert "sandbox" in instructions.why_refused(errno.EPERM)
    assert "no counter" in instructions.why_refused(errno.ENOENT)
    assert "Function not implemented" in instructions.why_refused(errno.ENOSYS)


def test_a_counter_that_was_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    instructions = payload_module("instructions")
    rng = random.Random(0)
    readings = [(100, 50, 50), (100 + (work := rng.randrange(1, 10**9)), 60, 60)]

    def read(file: int, size: int) -> bytes:
        return b"".join(n.to_bytes(8, "little") for n in readings.pop(0))

    monkeypatch.setattr(instructions.os, "read", read)
    counter = instructions.Counter.__new__(instructions.Counter)
    counter.file = 3
    assert counter.count(lambda: None) == work
    readings += [(100, 50, 50), (200, 60, 55)]
    with pytest.raises(instructions.NoCounter, match="shared with others"):
        counter.count(lambda: None)


def test_what_a_process_is_asked_to_start_keeps_its_addresses() -> None:
    import subprocess
    import sys

    instructions = payload_module("instructions")
    ask = "import sys; sys.path.insert(0, sys.argv[1]); import instructions; print(instructions.addresses_are_fixed())"  # fmt: skip
    folder = str(Path(instructions.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", ask, folder], preexec_fn=instructions.fix_addresses, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "True"
    assert not instructions.addresses_are_fixed()  # only what it started


PI4 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        (PI4 * 4 + "Hardware\t: BCM2835\nModel\t: Raspberry Pi 4 Model B Rev 1.4\n", "Cortex-A72 r0p3"),
        (PI4 + PI4.replace("0xd08", "0xd03").replace(": 3", ": 4"), "Cortex-A53 r0p4 + Cortex-A72 r0p3"),
        ("processor\t: 0\nmodel name\t: Intel(R) Core(TM)\n\nprocessor\t: 1\nmodel name\t: Intel(R) Core(TM)\n", "Intel(R) Core(TM)"),
        (PI4.replace("0xd08", "0xfff"), "0x41/0xfff r0p3"),
        ("", None),
        ("CPU part\t: 0xd08\nCPU variant\t: rubbish\n", "None/0xd08 r0p0"),
    ],
)  # fmt: skip
def test_the_cpu_is_named_from_its_identity(cpuinfo: str, model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(payload_module("sysfs"), "SYSROOT", str(tmp_path))
    assert name_cores(payload_module("board").cpu_model()) == model


def test_a_board_tells_that_it_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = payload_module("board")
    monkeypatch.setattr(payload_module("sysfs"), "SYSROOT", str(tmp_path))
    assert board.emulated() == ""
    tree = tmp_path / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "compatible").write_bytes(b"linux,dummy-virt\0")
    assert board.emulated() == "the device tree says linux,dummy-virt"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/edgepipe-emulated").write_text("qemu-system 7.2 cortex-a72 icount\n")
    assert board.emulated() == "/etc/edgepipe-emulated: qemu-system 7.2 cortex-a72 icount"
