"""Google's benchmark_model: its output as captured, and a run of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe import benchmark_model, preflight
from edgepipe.bench import MeasureOptions
from edgepipe.benchmark_model import Op, measure, parse_benchmark_model
from edgepipe.commands.on_device import tflite_model
from edgepipe.device import open_device
from edgepipe.errors import Busy, CommandFailed, RequestError
from edgepipe.metrics import METRICS
from edgepipe.profile import Emulation, find_profile
from edgepipe.resources import profile_paths
from edgepipe.tflite_ops.tiny import tiny_tflite

from .board_side import merged_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "benchmark_model"
LOGS = sorted(path.name for path in FIXTURES.iterdir() if path.suffix != ".md")


def captured(name: str) -> str:
    return (FIXTURES / name).read_text()


@pytest.mark.parametrize(
    ("name", "init", "first", "mean", "count", "low", "high", "memory"),
    [
        ("android_2020", 855e-6, 49060e-6, 33209.4e-6, 50, 32641e-6, 34005e-6, int(12.8672 * 2**20)),
        ("raspberry_pi_2021", 18777e-6, 64791e-6, 55043.2e-6, 50, 53077e-6, 60727e-6, int(18.7227 * 2**20)),
        ("prefixed_2024", 630e-6, 3678e-6, 3790.92e-6, 261, 3190e-6, 6333e-6, None),
        ("riscv_profiled", 17187e-6, 3512391e-6, 2.95034, 50, 2727568e-6, 3189954e-6, int(46.0859 * 2**20)),
    ],
)  # fmt: skip
def test_the_summary_is_read_in_seconds_and_bytes(
    name: str, init: float, first: float, mean: float, count: int, low: float, high: float, memory: int | None,
) -> None:  # fmt: skip
    report = parse_benchmark_model(captured(name))
    assert (report.init_s, report.first_s, report.mean_s) == pytest.approx((init, first, mean))
    assert (report.count, report.min_s, report.max_s) == (count, pytest.approx(low), pytest.approx(high))  # fmt: skip
    assert report.memory_bytes == memory


def test_the_delegate_is_told() -> None:
    assert parse_benchmark_model(captured("raspberry_pi_2021")).delegates == ("XNNPACK",)
    assert parse_benchmark_model(captured("riscv_profiled")).delegates == ()


def test_operators_are_read_in_the_order_they_ran() -> None:
    ops = parse_benchmark_model(captured("riscv_profiled")).ops
    # not those of the initialisation, nor the table of the slowest
    assert [op.node_type for op in ops] == ["CONV_2D", "DEPTHWISE_CONV_2D", "AVERAGE_POOL_2D", "CONV_2D", "SQUEEZE", "SOFTMAX"]  # fmt: skip
    assert ops[0] == Op(0, "CONV_2D", "MobilenetV1/MobilenetV1/Conv2d_0/Relu6", pytest.approx(60.957e-3))  # type: ignore[arg-type]  # fmt: skip
    assert parse_benchmark_model(captured("android_2020")).ops == ()


@pytest.mark.parametrize("text", ["", "STARTING!\nFailed to load model\n", captured("first_2019")])
def test_what_has_no_timings_as_we_know_them_is_refused(text: str) -> None:
    with pytest.raises(CommandFailed):
        parse_benchmark_model(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [("Inference (avg): 33209.4", "Inference (avg): nan"), ("Init: 855", "Init: -1"), ("count=50", "count=0"), ("max=34005", "max=1")],
)  # fmt: skip
def test_figures_that_cannot_be_are_refused(old: str, new: str) -> None:
    with pytest.raises(CommandFailed):
        parse_benchmark_model(captured("android_2020").replace(old, new))


@given(st.sampled_from(LOGS), st.data())
def test_damaged_output_is_a_report_or_our_error(name: str, data: st.DataObject) -> None:
    text = captured(name)
    at = data.draw(st.integers(0, len(text)))
    damaged = text[:at] + data.draw(st.text(max_size=8)) + text[data.draw(st.integers(at, len(text))) :]  # fmt: skip
    with contextlib.suppress(CommandFailed):
        parse_benchmark_model(damaged)


def test_it_is_pushed_and_run_for_each_session_and_once_for_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    model, binary, calls = tmp_path / "m.tflite", tmp_path / "benchmark_model", tmp_path / "calls"
    model.write_bytes(merged_file())
    binary.write_text(
        f'#!/bin/sh\necho "$@" >>{calls}\ncase "$*" in *profiling*) cat {FIXTURES}/riscv_profiled;; '
        f"*) cat {FIXTURES}/android_2020 >&2;; esac\n"
    )
    options = MeasureOptions(sessions=2, max_sessions=2, threads=3)
    profile = find_profile("localhost", profile_paths())
    chosen = tflite_model(model, signature="length16")
    result = measure(chosen, open_device("local"), profile, options, binary=binary)
    found = {m.metric: m for m in result.measurements}
    assert found["benchmark_model_latency"].samples == ((pytest.approx(0.0332094),),) * 2
    assert found["benchmark_model_latency"].context["backend"] == "benchmark_model"
    assert [op["node_type"] for op in found["runs_on_device"].context["ops"]][-1] == "SOFTMAX"
    assert set(found) <= set(METRICS)
    lines = calls.read_text().splitlines()
    assert ["profiling" in line for line in lines] == [False, False, True]
    assert all("--num_threads=3" in line and ".tflite" in line for line in lines)
    # tensorflow/lite/tools/benchmark/benchmark_tflite_model.cc
    assert all("--signature_to_run_for=length16" in line.split() for line in lines)
    assert found["runs_on_device"].context["model_signature"] == "length16"


@pytest.fixture(params=["agent", "C runner"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host as a board with Python, and as one without."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if request.param == "C runner":
        if shutil.which("cc") is None:
            pytest.skip("no C compiler (cc) on this machine")
        monkeypatch.setattr(preflight, "runner_target", lambda target: True)


@pytest.mark.slow
@pytest.mark.usefixtures("kind")
def test_while_it_runs_the_board_is_taken_and_free_afterwards(tmp_path: Path) -> None:
    model, binary, seen = tmp_path / "m.tflite", tmp_path / "benchmark_model", tmp_path / "seen"
    model.write_bytes(tiny_tflite())
    lock = tmp_path / ".edgepipe" / "lock"
    binary.write_text(
        f"#!/bin/sh\nflock -n {lock} true && echo free >>{seen} || cat {lock} >>{seen}\necho >>{seen}\ncat {FIXTURES}/android_2020\n"
    )
    profile = find_profile("localhost", profile_paths())
    options = MeasureOptions(sessions=1, max_sessions=1)

    def run() -> None:
        measure(tflite_model(model), open_device("local"), profile, options, binary=binary)

    run()
    owners = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(owners) == 2  # the second is for the operators
    assert {o["job"] for o in owners} == {owners[0]["job"]}
    assert owners[0]["job"].startswith("benchmark_model-")
    assert lock.read_text() == ""
    # a job that runs, and one between two of its calls
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another job is running on this board"):
            run()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + 1000
    other = json.dumps({"job": "other", "owner": "ada", "pid": 1, "until_boottime_s": until, "boot_id": boot_id})  # fmt: skip
    lock.write_text(other)
    with pytest.raises(Busy, match="another job holds this board"):
        run()
    assert lock.read_text() == other
    lock.write_text("")
    run()


@pytest.mark.usefixtures("kind")
def test_one_that_runs_on_is_stopped_and_the_board_given_back(tmp_path: Path) -> None:
    profile = find_profile("localhost", profile_paths())
    board = preflight.prepare(open_device("local"), profile)
    hold = [*board.command, "hold", board.work_dir, "mine", "ada", "600", "sleep", "600"]
    # as one whose connection was lost
    with subprocess.Popen(hold) as runs_on:
        lock = tmp_path / ".edgepipe" / "lock"
        deadline = time.monotonic() + 30
        while (not lock.exists() or not lock.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        benchmark_model._release(board, "another")
        assert runs_on.poll() is None
        benchmark_model._release(board, "mine")
        assert runs_on.wait(30) == -signal.SIGKILL
    assert lock.read_text() == ""


def test_a_program_that_fails_there_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    model, binary = tmp_path / "m.tflite", tmp_path / "benchmark_model"
    model.write_bytes(tiny_tflite())
    binary.write_text('#!/bin/sh\necho "CANNOT LINK EXECUTABLE" >&2; exit 1\n')
    profile = find_profile("localhost", profile_paths())
    with pytest.raises(CommandFailed, match="CANNOT LINK EXECUTABLE"):
        measure(tflite_model(model), open_device("local"), profile, MeasureOptions(), binary=binary)
    assert (tmp_path / ".edgepipe" / "lock").read_text() == ""


def test_on_an_emulated_board_it_is_refused_as_it_measures_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "m.tflite"
    model.write_bytes(tiny_tflite())
    emulation = Emulation(kind="system", cpu="cortex-a72", memory=1e9)
    profile = dataclasses.replace(find_profile("localhost", profile_paths()), emulated=emulation)
    with pytest.raises(RequestError, match="emulated"):
        measure(tflite_model(model), open_device("local"), profile, MeasureOptions(), binary=model)
