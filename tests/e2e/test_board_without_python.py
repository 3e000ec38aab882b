"""A board that has sshd, a shell and a few tools, but no Python: measured by the C runner."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepipe import bench
from edgepipe.bench import MeasureOptions
from edgepipe.commands.on_device import tflite_model
from edgepipe.device import open_device
from edgepipe.device.ssh import SshDevice
from edgepipe.errors import NotReadyError
from edgepipe.profile import DeviceProfile, find_profile
from edgepipe.resources import profile_paths
from edgepipe.testing import LoopbackSshd
from edgepipe.tflite_ops.tiny import crashing_tflite, tiny_tflite

pytestmark = pytest.mark.slow

# What busybox gives a small board, and what our commands over SSH need of it.
TOOLS = ("sh", "timeout", "true", "sleep", "sha256sum", "mkdir", "df", "rm", "cat")
OPTIONS = MeasureOptions(
    sessions=1, max_sessions=1, memory_sessions=1, session=0.2, warmup=0.05, threads=1
)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def board(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackSshd]:
    """One sshd whose users find no python3; here is a cc, and no zig."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path / "toolchains"))
    monkeypatch.setenv("EDGEPIPE_NO_INSTALL", "1")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    with LoopbackSshd(device_environment={"PATH": str(tools)}) as server:
        yield server


@pytest.fixture
def device(board: LoopbackSshd) -> Iterator[SshDevice]:
    with open_device(board.address, **board.options()) as opened:
        assert isinstance(opened, SshDevice)
        assert opened.run(["python3", "--version"], timeout_s=10).returncode == 127
        yield opened


@pytest.fixture
def profile() -> DeviceProfile:
    return find_profile("localhost", profile_paths())


def write(tmp_path: Path, data: bytes, name: str = "m.tflite") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_two_models_are_measured_and_compared(device: SshDevice, board: LoopbackSshd, profile: DeviceProfile, tmp_path: Path) -> None:  # fmt: skip
    base = tflite_model(write(tmp_path, tiny_tflite(size=32, layers=2), "base.tflite"))
    candidate = tflite_model(write(tmp_path, tiny_tflite(size=32, layers=8), "candidate.tflite"))
    samples = {"x": np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)}
    result = bench.measure(candidate, device, profile, OPTIONS, samples=samples, baseline=base)
    found = {m.metric: m for m in result.measurements}
    assert found["runs_on_device"].samples == ((1,),)
    assert found["device_mismatch"].samples == ((0.0,),)
    assert np.median(found["latency_ratio_cpu"].samples[0]) > 1.3  # four times the layers
    assert {"latency_cpu", "latency_cpu_baseline", "memory_anon", "load_cold", "op_time"} <= set(found)  # fmt: skip
    context = found["latency_cpu"].context
    assert (context["runner"], context["backend"], context["python"]) == ("c", "litert-c", None)
    assert context["runner_compiler"].startswith("cc")
    assert context["machine"] == platform.machine()
    # many a virtual machine has no counter of instructions
    others = {k: v for k, v in context["not_measured"].items() if k != "instructions"}
    assert others == {"energy": "the C runner cannot measure energy"}
    assert ("instructions" in found) == ("instructions" not in context["not_measured"])
    assert not list((board.home / ".edgepipe" / "jobs").iterdir())
    assert (board.home / ".edgepipe" / "lock").read_text() == ""


def test_a_model_that_crashes_there_is_a_result(device: SshDevice, profile: DeviceProfile, tmp_path: Path) -> None:  # fmt: skip
    model = tflite_model(write(tmp_path, crashing_tflite()))
    (only,) = bench.measure(model, device, profile, OPTIONS).measurements
    assert (only.metric, only.samples) == ("runs_on_device", ((0,),))
    assert only.context["cause"]["what"] == "crash"


def test_a_broken_link_costs_one_session_and_no_finished_one(device: SshDevice, profile: DeviceProfile, tmp_path: Path) -> None:  # fmt: skip
    model = tflite_model(write(tmp_path, tiny_tflite()))
    options = dataclasses.replace(OPTIONS, sessions=1, session=3.0)

    def cut() -> None:
        while not device.run(["sh", "-c", 'cat "$HOME"/.edgepipe/jobs/*/session-memory-*'], timeout_s=10).stdout:  # fmt: skip
            time.sleep(0.1)
        time.sleep(1.0)  # into the latency session
        transport = device._client.get_transport()
        assert transport is not None
        transport.close()

    thread = threading.Thread(target=cut)
    thread.start()
    result = bench.measure(model, device, profile, options)
    thread.join()
    assert {"latency_cpu", "memory_anon"} <= {m.metric for m in result.measurements}


def test_a_host_without_any_compiler_names_both_remedies(device: SshDevice, profile: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(NotReadyError) as caught:
        bench.measure(tflite_model(write(tmp_path, tiny_tflite())), device, profile, OPTIONS)
    assert caught.value.code == "no-python"
    assert "apt-get install python3" in caught.value.hint
    assert "edgepipe toolchains install zig" in caught.value.hint
