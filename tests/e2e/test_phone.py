"""A phone, as far as one can be had here (tests/android_root.py): over adb, and over SSH as Termux's user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepipe import toolchain
from edgepipe.bench import BenchResult, MeasureOptions, measure
from edgepipe.commands.on_device import tflite_model
from edgepipe.device import Device, open_device
from edgepipe.errors import NotStable
from edgepipe.profile import DeviceProfile, find_profile
from edgepipe.resources import profile_paths
from edgepipe.testing import LoopbackSshd, find_sshd
from edgepipe.tflite_ops.tiny import op_chain_tflite
from tests import android_root
from tests.miniadbd import MiniAdbd

pytestmark = pytest.mark.slow

OPTIONS = MeasureOptions(threads=1, memory_sessions=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("unshare", "qemu-aarch64"):
        android_root.find(program)
    if not toolchain.is_installed("zig") and os.environ.get("CI") != "true":
        pytest.skip("the zig toolchain is not installed: edgepipe toolchains install zig")
    made = android_root.build_root(tmp_path_factory.mktemp("phone"))
    android_root.skip_unless_runs(made)
    return made


@pytest.fixture(scope="module")
def phone(root: Path, adb_server: None) -> Iterator[Device]:
    daemon = MiniAdbd(
        shell=android_root.shell(root), root=root, environment=android_root.environment()
    )
    with daemon, open_device(f"adb://{daemon.serial}") as device:  # type: ignore[attr-defined]
        yield device


@pytest.fixture(scope="module")
def termux(root: Path) -> Iterator[Device]:
    if find_sshd() is None:
        android_root.missing("no sshd on this machine (apt-get install openssh-server)")
    with LoopbackSshd(force_command=android_root.termux_command(root)) as server:
        device = open_device(server.address, **server.options())
        yield device
        device.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "int8.tflite"
    path.write_bytes(op_chain_tflite("conv", size=8, channels=(16, 24), repeats=4))
    return path


def profile() -> DeviceProfile:
    return find_profile("android_arm64", profile_paths())


def run(device: Device, model: Path) -> BenchResult:
    samples = {"x": np.random.default_rng(0).normal(size=(4, 8, 8, 16)).astype(np.float32)}
    return measure(tflite_model(model), device, profile(), OPTIONS, samples=samples)


def check(result: BenchResult, root: Path) -> dict[str, object]:
    """What holds for both ways: int8 outputs are this host's, nothing is timed, only our payload ran it."""
    assert not [path for path in root.rglob("ld-linux-aarch64*") if "apex" not in path.parts and ".edgepipe" not in path.parts]  # fmt: skip
    found = {m.metric: m for m in result.measurements}
    assert {name: m.samples for name, m in found.items()} == {"runs_on_device": ((1,),), "device_mismatch": ((0.0,),)}  # fmt: skip
    context = dict(found["device_mismatch"].context)
    assert "qemu-user" in context["emulated"]
    assert (context["machine"], context["python"], context["backend"]) == ("aarch64", None, "litert-c")  # fmt: skip
    assert context["runner_compiler"].endswith("with a glibc 2.36 of its own")
    assert (context["device_model"], context["os"]) == ("Pixel 6", "Android 13 (API 33)")
    assert context["affinity"] == [1]  # the fast core of the two
    assert context["departs_from_profile"] == []  # the phone's own C library stays bionic
    return context


def test_over_adb_int8_outputs_are_identical_with_nothing_installed_on_the_phone(phone: Device, root: Path, model: Path) -> None:  # fmt: skip
    assert phone.run(["python3", "-c", ""], timeout_s=30).returncode == 127
    said = root / "system/etc/dumpsys_battery"
    charged = said.read_text()
    said.write_text(charged.replace("level: 84", "level: 9").replace("USB powered: true", "USB powered: false"))  # fmt: skip
    with pytest.raises(NotStable, match="9% of its battery"):
        run(phone, model)
    said.write_text(charged)
    result = run(phone, model)
    check(result, root)
    health = result.raw["facts"]["health"]
    assert (health["thermal_status"], health["battery_level"], health["powered_by"]) == ("none", 0.84, "USB")  # fmt: skip
    assert list((root / "data/local/tmp").iterdir()) == [root / "data/local/tmp/.edgepipe"]
    assert not list((root / "data/local/tmp/.edgepipe/jobs").iterdir())


def test_over_ssh_termux_needs_no_python_no_package_and_no_permission(termux: Device, root: Path, model: Path) -> None:  # fmt: skip
    result = run(termux, model)
    check(result, root)
    assert (root / android_root.TERMUX / "home" / ".edgepipe" / "rt").is_dir()
    health = result.raw["facts"]["health"]
    assert (health["thermal_status"], health["battery_level"]) == (None, None)
