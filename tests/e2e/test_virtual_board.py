"""A virtual board and its faults: what only a whole machine can suffer. One board for all tests."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.bench import BenchResult, MeasureOptions, measure
from edgepipe.device import Completed, Device, open_device
from edgepipe.device.virtual import VirtualDevice
from edgepipe.emulator.machine import Qmp, list_running, set_clock
from edgepipe.errors import DeviceError, TransferError
from edgepipe.gate import Evidence, RunsOnDeviceGate, Status
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths
from edgepipe.tflite_ops.tiny import op_chain_tflite, tiny_tflite

pytestmark = pytest.mark.slow

# As little as there is: one process, for memory.
QUICK = MeasureOptions(sessions=1, memory_sessions=1, ops=False, instructions=False)


@pytest.fixture(scope="module")
def board(virtual_pi4: str) -> Iterator[VirtualDevice]:
    device = open_device(virtual_pi4)
    assert isinstance(device, VirtualDevice)
    yield device
    device.close()
    assert not device.running.folder.exists()


@pytest.fixture
def qmp(board: VirtualDevice) -> Iterator[Qmp]:
    with Qmp(board.running.folder / "qmp") as control:
        yield control
        control.set_link(up=True)
        control.resume()


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_tflite())
    return make_artifact("tflite", path, inputs=(), outputs=())


class Meddling:
    """A device that lets ``then`` happen right after the job was started on it."""

    def __init__(self, device: Device, then: Callable[[], None]) -> None:
        self.address, self._device, self._then = device.address, device, then
        self.met = 0

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        done = self._device.run(argv, timeout_s=timeout_s)
        if "start" in argv and self.met == 0:
            self.met += 1
            self._then()
        return done

    def push(self, local: Path, remote: str) -> bool:
        return self._device.push(local, remote)

    def pull(self, remote: str, local: Path) -> None:
        self._device.pull(remote, local)

    def close(self) -> None:
        pass


def measured(model: Artifact, device: Device) -> BenchResult:
    return measure(model, device, find_profile("virt-pi-4", profile_paths()), QUICK)


def after(delay_s: float, *calls: Callable[[], None]) -> None:
    """Make the calls from another thread, each ``delay_s`` after the last."""

    def work() -> None:
        for call in calls:
            time.sleep(delay_s)
            call()

    threading.Thread(target=work, daemon=True).start()


def boot_id(device: Device) -> str:
    done = device.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s=60)
    return done.stdout.decode().strip()


def test_the_cable_may_be_pulled_in_the_middle_of_a_push(
    board: VirtualDevice, qmp: Qmp, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(8_000_000))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(board.push, source, "~/large")
        time.sleep(0.5)  # 8 MB take a second and more on any machine
        qmp.set_link(up=False)
        time.sleep(2)
        assert not pushing.done()
        qmp.set_link(up=True)
        assert pushing.result(timeout=120)
    assert not board.push(source, "~/large")
    board.run(["rm", "large"], timeout_s=60)


def test_a_cable_that_is_pulled_while_the_board_measures_costs_nothing(
    board: VirtualDevice, qmp: Qmp, model: Artifact
) -> None:
    def pull() -> None:
        qmp.set_link(up=False)
        after(3, lambda: qmp.set_link(up=True))

    meddling = Meddling(board, pull)
    result = measured(model, meddling)
    assert meddling.met == 1
    assert {m.metric for m in result.measurements} >= {"runs_on_device", "memory_anon"}


def test_a_frozen_board_is_an_error_within_the_deadline_and_works_again_afterwards(
    board: VirtualDevice, qmp: Qmp
) -> None:
    before = boot_id(board)
    qmp.stop()
    began_s = time.monotonic()
    with pytest.raises(DeviceError):
        board.run(["true"], timeout_s=2)
    assert time.monotonic() - began_s < 60
    qmp.resume()
    assert boot_id(board) == before


def test_a_power_cut_in_the_middle_of_a_measurement_has_it_made_anew_and_loses_no_file(
    board: VirtualDevice, qmp: Qmp, model: Artifact, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(2_000_000))
    before = boot_id(board)
    board.push(source, "~/large")
    # ext4 writes names every 5 s, and what is in the files up to 30 s later (ext4(5), commit)
    board.run(["sleep", "8"], timeout_s=120)
    meddling = Meddling(board, qmp.reset)
    result = measured(model, meddling)
    assert meddling.met == 1
    memory = next(m for m in result.measurements if m.metric == "memory_anon")
    assert len(memory.samples) == 1
    assert boot_id(board) != before
    assert not board.push(source, "~/large")  # it is there
    board.run(["rm", "large"], timeout_s=60)


def test_a_full_disk_is_named_with_what_was_free(board: VirtualDevice, tmp_path: Path) -> None:
    fill = "fallocate -l $(($(df --output=avail -k . | tail -n 1) - 1000))K filler"
    assert board.run(["sh", "-c", fill], timeout_s=60).returncode == 0
    source = tmp_path / "large"
    source.write_bytes(b"x" * 3_000_000)
    try:
        with pytest.raises(TransferError, match=r"needs 3\.0 MB and 1\.0 MB are free"):
            board.push(source, "~/large")
        left = board.run(["sh", "-c", "ls -d large*"], timeout_s=60)
        assert left.stdout == b""
    finally:
        board.run(["rm", "filler"], timeout_s=60)


def test_a_model_that_does_not_fit_fails_its_gate_and_says_how_much_memory_was_missing(
    board: VirtualDevice, tmp_path: Path
) -> None:
    # tensors of 170 and 340 MB: less than the board has, so that the kernel promises them, and more
    # than it can keep beside the 450 MB that lie in its memory already
    path = tmp_path / "huge.tflite"
    path.write_bytes(op_chain_tflite("copy", size=1630, channels=(64, 64), repeats=1))
    huge = make_artifact("tflite", path, inputs=(), outputs=())
    ballast = "/dev/shm/ballast"
    assert board.run(["fallocate", "-l", "450M", ballast], timeout_s=60).returncode == 0
    try:
        result = measured(huge, board)
    finally:
        board.run(["rm", ballast], timeout_s=60)
    evidence = Evidence(huge.sha256, "virt-pi-4", {m.metric: m for m in result.measurements})
    verdict = RunsOnDeviceGate().judge(evidence)
    assert verdict.status is Status.FAIL
    assert "the kernel killed the worker: out of memory" in verdict.reason
    assert "the model needs at least 510 MB" in verdict.reason
    assert "MB are missing" in verdict.reason


def test_a_board_does_not_outlive_the_process_that_opened_it(virtual_pi4: str) -> None:
    code = (
        "import json, sys, time\n"
        "from edgepipe.device import open_device\n"
        f"device = open_device({virtual_pi4!r})\n"
        "print(json.dumps([device.running.pid, str(device.running.folder)]), flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, folder = json.loads(process.stdout.readline())
    assert any(running.pid == pid for running in list_running())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline_s = time.monotonic() + 30
    while (Path(folder).exists() or machines_in(folder)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(folder).exists()
    assert machines_in(folder) == []


def test_a_board_starts_with_the_time_of_this_machine_and_without_its_ssh_configuration(
    virtual_pi4: str, own_home: None
) -> None:
    folder = Path("~/.ssh").expanduser()
    folder.mkdir()
    (folder / "config").write_text("Host *\n  ProxyCommand false\n")
    began_s = time.time()  # later than when the snapshot was made
    device = open_device(virtual_pi4)
    assert isinstance(device, VirtualDevice)
    try:
        assert now_of(device) > began_s - 1
        set_clock(device.running.folder, 2e9)
        assert 2e9 <= now_of(device) < 2e9 + 600
    finally:
        device.close()


def now_of(device: Device) -> float:
    return float(device.run(["date", "+%s.%N"], timeout_s=60).stdout)


def machines_in(folder: str) -> list[int]:
    """Processes that work on the disk of a board."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found
