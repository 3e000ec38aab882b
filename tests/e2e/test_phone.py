"""A phone, as far as one can be had here (tests/android_root.py): over adb, and over SSH as Termux's user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgepipe import toolchain
from edgepipe.device import open_device
from edgepipe.testing import LoopbackSshd, find_sshd
from tests import android_root
from tests.miniadbd import MiniAdbd

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "ci" / "recipes"
# What a phone can answer that is none: nothing is timed on it, and its instructions are qemu's.
MEASURE = """[measure]
threads = 1
sessions = 1
memory_sessions = 0
evaluate_samples = 20
[[gates]]
gate = "size"
max = "60 kB"
[[gates]]
gate = "device_task_metric"
min = 0.5  # of 20 samples, 11 words
[[gates]]
gate = "device_agreement"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    android_root.find("unshare")
    android_root.find("qemu-aarch64", "qemu-aarch64-static")
    if not toolchain.is_installed("zig") and os.environ.get("CI") != "true":
        pytest.skip("the zig toolchain is not installed: edgepipe toolchains install zig")
    made = android_root.build_root(tmp_path_factory.mktemp("phone"))
    android_root.skip_unless_runs(made)
    return made


@pytest.fixture(scope="module")
def phone(root: Path, adb_server: None) -> Iterator[str]:
    """The address of the root behind adb."""
    daemon = MiniAdbd(
        shell=android_root.shell(root), root=root, environment=android_root.environment()
    )
    with daemon:
        yield f"adb://{daemon.serial}"


@pytest.fixture(scope="module")
def termux(root: Path) -> Iterator[LoopbackSshd]:
    """The same root behind SSH, as Termux's user."""
    if find_sshd() is None:
        android_root.missing("no sshd on this machine (apt-get install openssh-server)")
    with LoopbackSshd(force_command=android_root.termux_command(root)) as server:
        yield server


@pytest.fixture(autouse=True)
def own_home() -> None:
    """This user's home, for its caches: what was compiled and fetched is not made again."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    assert os.environ["EDGEPIPE_DATA"] == str(data_dir)
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copy(RECIPES / "keyword_spotting_model.py", folder)
    recipe = (RECIPES / "keyword_spotting_virtual.toml").read_text().partition("[measure]")[0]
    (folder / "recipe.toml").write_text(recipe.replace('"virt-pi-4"', '"android_arm64"') + MEASURE)
    return folder


@pytest.fixture(scope="module")
def record(project: Path, phone: str, termux: LoopbackSshd) -> dict[str, Any]:
    """The keyword spotter's recipe on both ways to the phone at once."""
    boards = ("--device", phone, "--device", termux.address)
    done = edgepipe(project, "run", "recipe.toml", *boards, env=termux.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(edgepipe(project, "report", "--json").stdout)
    return found


def edgepipe(project: Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "edgepipe", *arguments], cwd=project, env={**os.environ, **(env or {})},
        capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip


def test_the_recipe_passes_over_adb_and_as_termux_over_ssh(record: dict[str, Any]) -> None:
    assert record["verdict"] == "PASS"
    on_board = sorted(v["gate"] for v in record["verdicts"] if v["device"])
    assert on_board == sorted(2 * ["runs_on_device", "device_task_metric", "device_agreement"])
    assert {v["status"] for v in record["verdicts"]} == {"PASS"}


@pytest.mark.parametrize("scheme", ["adb", "ssh"])
def test_what_is_measured_there_is_outputs_and_they_are_this_hosts_bit_for_bit(record: dict[str, Any], scheme: str) -> None:  # fmt: skip
    name = next(d["name"] for d in record["devices"] if d["address"].startswith(f"{scheme}://"))
    on_board = record["measurements"][name]
    # nothing is timed, and memory is qemu's
    assert set(on_board) == {
        "runs_on_device", "device_mismatch", "device_task_metric", "device_accuracy_drop", "device_flips",
    }  # fmt: skip
    assert on_board["device_mismatch"]["samples"] == [[0.0]]
    context = on_board["device_mismatch"]["context"]
    assert context["unequal"] == 0.0
    assert "qemu-user" in context["emulated"]
    assert (context["machine"], context["python"], context["backend"]) == ("aarch64", None, "litert-c")  # fmt: skip
    assert context["runner_compiler"].endswith("with a glibc 2.36 of its own")
    assert (context["device_model"], context["os"]) == ("Pixel 6", "Android 13 (API 33)")
    assert context["affinity"] == [1]  # the fast core of the two
    assert context["departs_from_profile"] == []  # the phone's own C library stays bionic


def test_nothing_is_installed_on_the_phone_and_no_job_is_left(record: dict[str, Any], root: Path, phone: str) -> None:  # fmt: skip
    assert record["verdict"] == "PASS"
    loaders = [path for path in root.rglob("ld-linux-aarch64*") if "apex" not in path.parts]
    homes = [root / "data/local/tmp/.edgepipe", root / android_root.TERMUX / "home/.edgepipe"]
    assert {path.relative_to(path.parents[2]).parts[0] for path in loaders} == {"rt"}
    assert sorted(path.parents[2] for path in loaders) == sorted(homes)
    for home in homes:
        assert list(home.parent.iterdir()) == [home]
        assert not list((home / "jobs").iterdir())
    with open_device(phone) as device:
        assert device.run(["python3", "-c", ""], timeout_s=60).returncode == 127


def test_a_phone_says_what_it_is_and_with_a_low_battery_it_is_not_measured(project: Path, record: dict[str, Any], root: Path, phone: str) -> None:  # fmt: skip
    said = root / "system/etc/dumpsys_battery"
    charged = said.read_text()
    said.write_text(charged.replace("level: 84", "level: 9").replace("USB powered: true", "USB powered: false"))  # fmt: skip
    done = edgepipe(project, "run", "recipe.toml", "--remeasure", "--device", phone)
    said.write_text(charged)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "9% of its battery" in done.stdout + done.stderr
    done = edgepipe(project, "probe", phone, "--profile", "pixel_6", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    facts = found["facts"]
    assert (facts["model"], facts["os"], facts["libc"]) == ("Pixel 6", "Android 13 (API 33)", "bionic")  # fmt: skip
    assert [(c["core"], c["max_frequency_mhz"]) for c in facts["clusters"]] == [("Cortex-A55", 1704), ("Cortex-A76", 2253)]  # fmt: skip
    assert (facts["python"], facts["throttling"]) == ("", [])
    assert "model" not in {d["fact"] for d in found["differences"]}
    assert {"clusters", "emulated"} <= {d["fact"] for d in found["differences"]}
