"""What a measurement survives: links, agents, boards and hosts that go away in the middle of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe import bench
from edgepipe.artifact import Artifact
from edgepipe.bench import BenchResult, measure
from edgepipe.device import open_device, retry
from edgepipe.device.base import Completed, Device
from edgepipe.device.local import LocalDevice
from edgepipe.device.ssh import SshDevice
from edgepipe.errors import ConnectError, NotStable
from edgepipe.testing import LoopbackSshd
from edgepipe.tflite_ops.tiny import tiny_tflite

from ..unit.board_side import call
from .test_bench import QUICK, Wrapped, artifact, find_worker, profile

pytestmark = pytest.mark.slow

# Latency sessions of half a second: something to interrupt.
OPTIONS = dataclasses.replace(QUICK, sessions=3, memory_sessions=0, session=0.5)


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return artifact(tmp_path, tiny_tflite())


def lines_of(result: BenchResult, kind: str) -> list[dict[str, Any]]:
    return [line for line in result.raw["journal"] if line["kind"] == kind]


def context_of(result: BenchResult) -> Any:
    return next(m for m in result.measurements if m.metric == "latency_wall").context


def check_nothing_was_measured_twice(result: BenchResult, sessions: int = 3) -> None:
    wall = next(m for m in result.measurements if m.metric == "latency_wall")
    assert len(wall.valid_sessions) == sessions
    tags = [line["tag"] for line in lines_of(result, "session")]
    assert len(tags) == len(set(tags))


# ------------------------------------------------------------------------------- broken links


class Cutting:
    """A real SSH device whose link is cut once at each step: before the call, or after the board
    has done it, so that only the answer is lost."""

    def __init__(self, inner: SshDevice, when: str) -> None:
        self.inner, self.address, self.when = inner, inner.address, when
        self.cut: list[str] = []

    def _around(self, step: str, call: Callable[[], Any]) -> Any:
        if step in self.cut:
            return call()
        self.cut.append(step)
        if self.when == "before":
            self._shut()
            return call()  # fails by itself, on the dead socket
        call()
        self._shut()
        raise ConnectError("the answer is lost", code="connection-lost")

    def _shut(self) -> None:
        transport = self.inner._client.get_transport()
        assert transport is not None
        with contextlib.suppress(OSError):
            transport.sock.shutdown(socket.SHUT_RDWR)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        is_agent = argv[1].endswith("agent.py")
        step = argv[2] if is_agent else "hello"
        found: Completed = self._around(step, lambda: self.inner.run(argv, timeout_s=timeout_s))
        return found

    def push(self, local: Path, remote: str) -> bool:
        moved: bool = self._around(f"push {Path(remote).name}", lambda: self.inner.push(local, remote))  # fmt: skip
        return moved

    def pull(self, remote: str, local: Path) -> None:
        self._around("pull", lambda: self.inner.pull(remote, local))

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("when", ["before", "answer lost"])
def test_a_link_that_breaks_at_every_step_of_the_protocol_costs_no_session(
    server: LoopbackSshd, model: Artifact, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    inner = open_device(server.address, **server.options())
    assert isinstance(inner, SshDevice)
    device = Cutting(inner, when)
    samples = {"x": np.ones((2, 4), np.float32)}
    with contextlib.closing(device):
        result = measure(model, device, profile(tmp_path / "w"), OPTIONS, samples=samples)
    pushed = {"push agent.py", "push libLiteRt.so", f"push {model.sha256}.tflite", "push inputs.bin", "push job.json"}  # fmt: skip
    assert pushed | {"hello", "facts", "status", "start", "pull", "end"} <= set(device.cut)
    check_nothing_was_measured_twice(result)
    assert len(lines_of(result, "start")) == 1
    assert list((tmp_path / "w" / "jobs").iterdir()) == []


class Relay:
    """Passes connections on to a port of this machine; `cut` breaks them and lets none in."""

    def __init__(self, to_port: int) -> None:
        self._to = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._live: list[socket.socket] = []
        self._open = True
        self.passed_bytes = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._live += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                target.sendall(chunk)
                self.passed_bytes += len(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._open = False
        for end in self._live:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        self._listener.close()


@pytest.fixture
def relay(server: LoopbackSshd) -> Iterator[Relay]:
    running = Relay(server.port)
    yield running
    running.close()


@pytest.fixture
def far_away(server: LoopbackSshd, relay: Relay, tmp_path: Path) -> Iterator[Device]:
    """The server, reached through the relay."""
    known = tmp_path / "known_hosts"
    known.write_text(server.known_hosts.read_text().replace(f":{server.port}", f":{relay.port}"))
    address = server.address.replace(f":{server.port}", f":{relay.port}")
    device = open_device(address, identity_file=server.identity_file, known_hosts=known)
    yield device
    device.close()


def when_logged(text: str, caplog: pytest.LogCaptureFixture, act: Callable[[], None]) -> threading.Thread:  # fmt: skip
    """Do ``act`` in another thread once this was logged."""

    def watch() -> None:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if any(text in record.getMessage() for record in caplog.records):
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_link_that_goes_down_and_up_in_the_middle_of_a_push_costs_only_the_push(
    far_away: Device, relay: Relay, tmp_path: Path
) -> None:
    local, remote = tmp_path / "large", tmp_path / "w" / "models" / "large"
    local.write_bytes(os.urandom(12_000_000))

    def unplug() -> None:
        while relay.passed_bytes < 4_000_000:
            time.sleep(0.001)
        relay.cut()
        time.sleep(1.0)
        relay.mend()

    thread = threading.Thread(target=unplug)
    thread.start()
    link = retry.RetryingDevice(far_away)
    assert link.push(local, str(remote))
    thread.join()
    assert link.lost_links >= 1
    assert remote.read_bytes() == local.read_bytes()
    assert not link.push(local, str(remote))
    # with no link nobody could remove what had arrived: an hour later the next job does
    torn = [path for path in remote.parent.iterdir() if path != remote]
    assert len(torn) == 1
    os.utime(torn[0], (time.time() - 7200,) * 2)
    call("tidy", tmp_path / "w", 0)
    assert list(remote.parent.iterdir()) == [remote]


def test_a_second_measurement_sends_next_to_nothing(
    far_away: Device, relay: Relay, model: Artifact, tmp_path: Path
) -> None:
    once = dataclasses.replace(OPTIONS, sessions=1)
    measure(model, far_away, profile(tmp_path / "w"), once)
    first = relay.passed_bytes
    measure(model, far_away, profile(tmp_path / "w"), once)
    again = relay.passed_bytes - first
    assert first > 5_000_000  # the runtime alone has 6 MB and more
    assert again < 200_000  # questions, job.json and the journal; the agent's files have 130 kB
    kept = {path.name for path in (tmp_path / "w").iterdir()}
    assert kept == {"agents", "models", "rt", "jobs", "lock"}
    assert list((tmp_path / "w" / "jobs").iterdir()) == []


def test_the_board_measures_on_while_there_is_no_link(
    far_away: Device, relay: Relay, model: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    def unplug() -> None:
        relay.cut()
        time.sleep(1.5)
        relay.mend()

    with caplog.at_level("INFO", logger="edgepipe"):
        thread = when_logged("session 1/3", caplog, unplug)
        result = measure(model, far_away, profile(tmp_path / "w"), OPTIONS)
        thread.join()
    assert any("trying again" in record.getMessage() for record in caplog.records)
    check_nothing_was_measured_twice(result)
    assert len(lines_of(result, "start")) == 1


def test_a_link_that_stays_away_is_an_error_and_its_sessions_are_found_later(
    far_away: Device, relay: Relay, model: Artifact, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench, "END_PATIENCE_S", 0.0)
    patience_s = retry.RetryingDevice.__init__.__kwdefaults__
    monkeypatch.setitem(patience_s, "patience_s", 0.5)
    work = tmp_path / "w"
    with caplog.at_level("INFO", logger="edgepipe"):
        thread = when_logged("session 1/3", caplog, relay.cut)
        with pytest.raises(ConnectError):
            measure(model, far_away, profile(work), OPTIONS)
        thread.join()
    relay.mend()
    result = measure(model, far_away, profile(work), OPTIONS)
    check_nothing_was_measured_twice(result)
    assert context_of(result)["resumed_sessions"] >= 1
    assert len(lines_of(result, "start")) <= 2
    assert list((work / "jobs").iterdir()) == []


# ------------------------------------------------------------------------------- agent and board


def supervisor_of(work: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if any(str(work).encode() in w and w.endswith(b"/supervisor.py") for w in words):
                return int(entry.parent.name)
    raise AssertionError("no supervisor")


def test_an_agent_that_was_killed_goes_on_where_it_was(
    model: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "w"
    with caplog.at_level("INFO", logger="edgepipe"):
        thread = when_logged("session 1/3", caplog, lambda: os.kill(supervisor_of(work), signal.SIGKILL))  # fmt: skip
        result = measure(model, LocalDevice(), profile(work), OPTIONS)
        thread.join()
    assert any("it died on local: starting it again" in r.getMessage() for r in caplog.records)
    check_nothing_was_measured_twice(result)
    assert len(lines_of(result, "start")) == 2
    assert find_worker(work) is None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """This machine's /proc and /sys, but with a boot_id that a test can change."""
    folder = tmp_path / "root"
    random = folder / "proc/sys/kernel/random"
    random.mkdir(parents=True)
    (random / "boot_id").write_text("first\n")
    for name in ("self", "meminfo", "vmstat", "loadavg", "cpuinfo", "pressure", "stat"):
        (folder / "proc" / name).symlink_to(f"/proc/{name}")
    return folder


def restart(root: Path, name: str) -> None:
    path = root / "proc/sys/kernel/random/boot_id"
    (root / "new").write_text(f"{name}\n")
    (root / "new").rename(path)


def test_a_board_that_was_restarted_is_measured_again_from_the_start(
    model: Artifact, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = Wrapped(LocalDevice(), ["env", f"EDGEPIPE_SYSROOT={root}"])
    with caplog.at_level("INFO", logger="edgepipe"):
        thread = when_logged("session 1/3", caplog, lambda: restart(root, "second"))
        result = measure(model, board, profile(tmp_path / "w"), OPTIONS)
        thread.join()
    assert any("was restarted" in record.getMessage() for record in caplog.records)
    assert context_of(result)["boot_id"] == "second"
    wall = next(m for m in result.measurements if m.metric == "latency_wall")
    assert (len(wall.samples), wall.excluded) == (3, {})  # none of those from before
    counted = [line for line in lines_of(result, "session") if line["boot_id"] == "second"]
    assert len(counted) == 3


def test_a_board_that_restarts_again_and_again_is_not_fit(
    model: Artifact, tmp_path: Path, root: Path
) -> None:
    stop = threading.Event()

    def restart_often() -> None:
        number = 0
        while not stop.wait(0.4):
            number += 1
            restart(root, f"boot {number}")

    board = Wrapped(LocalDevice(), ["env", f"EDGEPIPE_SYSROOT={root}"])
    thread = threading.Thread(target=restart_often)
    thread.start()
    try:
        with pytest.raises(NotStable) as caught:
            measure(model, board, profile(tmp_path / "w"), OPTIONS)
    finally:
        stop.set()
        thread.join()
    assert caught.value.code in ("rebooted", "agent-lost")
    assert find_worker(tmp_path / "w") is None


# ------------------------------------------------------------------------------- the host


def command(model: Artifact, *more: str) -> list[str]:
    options = ("--session", "1 s", "--warmup", "20 ms", "--memory-sessions", "0", "--no-ops", *more)
    return [sys.executable, "-m", "edgepipe", "bench", str(model.path), *options]


def test_a_host_that_was_killed_finds_its_sessions_again(model: Artifact, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    first = subprocess.Popen(
        command(model), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("session 1/3"):
            break
    first.kill()
    first.communicate()
    jobs = list((tmp_path / ".edgepipe/jobs").iterdir())
    assert len(jobs) == 1  # nobody has tidied up
    second = subprocess.run(
        command(model), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert second.returncode == 0, second.stderr
    assert "found the job of an interrupted run" in second.stderr
    assert "session 1/3" not in second.stderr  # it was told of before
    assert "sessions are from an interrupted run" in second.stdout
    assert list((tmp_path / ".edgepipe/jobs").iterdir()) == []


def test_a_job_of_another_request_is_not_taken_for_this_one(
    model: Artifact, tmp_path: Path
) -> None:
    names: list[str] = []
    for options in (OPTIONS, OPTIONS, dataclasses.replace(OPTIONS, seed=1)):
        small = dataclasses.replace(options, sessions=1, session=0.05)
        result = measure(model, LocalDevice(), profile(tmp_path / "w"), small)
        names.append(result.raw["job"]["id"])
        assert context_of(result)["resumed_sessions"] == 0  # what has ended is gone
    assert names[0] == names[1] != names[2]


def test_kept_files_are_not_taken_for_an_interrupted_run(model: Artifact, tmp_path: Path) -> None:
    small = dataclasses.replace(OPTIONS, sessions=1, session=0.05)
    for _ in range(2):
        result = measure(model, LocalDevice(), profile(tmp_path / "w"), small, keep=True)
        assert context_of(result)["resumed_sessions"] == 0
    assert len(list((tmp_path / "w" / "jobs").iterdir())) == 2
