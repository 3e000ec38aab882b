"""Every transport, on real parts: this machine, a real OpenSSH server and the stock adb on loopback."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgepipe.device import Device, open_device
from edgepipe.testing import LoopbackSshd, find_sshd
from tests.miniadbd import MiniAdbd


def skip_here(reason: str) -> None:
    """Skip, except in CI, where a test that cannot run is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def sshd() -> Iterator[LoopbackSshd]:
    if find_sshd() is None:
        skip_here("no sshd on this machine (apt-get install openssh-server)")
    with LoopbackSshd() as server:
        yield server


@dataclasses.dataclass(frozen=True)
class Board:
    """A device, and the folder of this machine that it calls ``~``."""

    device: Device
    home: Path


@pytest.fixture(scope="session")
def adbd(adb_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniAdbd]:
    """This machine behind adb, with the shell that Android has."""
    mksh = shutil.which("mksh")
    if mksh is None:
        skip_here("no mksh, Android's shell, on this machine (apt-get install mksh)")
    tools = tmp_path_factory.mktemp("tools")
    (tools / "sh").symlink_to(str(mksh))
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path_factory.mktemp("home")),
    }
    with MiniAdbd(shell=[str(mksh), "-c"], environment=environment) as daemon:
        yield daemon


@pytest.fixture(params=["local", "ssh", pytest.param("adb", marks=pytest.mark.slow)])
def board(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Board]:
    if request.param == "local":
        home = tmp_path / "home"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        address, options = "local", {}
    elif request.param == "adb":
        daemon: MiniAdbd = request.getfixturevalue("adbd")
        home, address, options = Path(daemon.environment["HOME"]), f"adb://{daemon.serial}", {}
    else:
        server: LoopbackSshd = request.getfixturevalue("sshd")
        home, address, options = server.home, server.address, server.options()
    device = open_device(address, **options)
    yield Board(device, home)
    device.close()


@pytest.fixture
def device(board: Board) -> Device:
    return board.device


@pytest.fixture(scope="session")
def virtual_device(virtual_pi4: str) -> Iterator[Device]:
    device = open_device(virtual_pi4)
    yield device
    device.close()


@pytest.fixture(params=["local", "ssh", "adb", pytest.param("virtual", marks=pytest.mark.slow)])
def any_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device for tests that see its files and processes only through it, as of a real board."""
    if request.param == "virtual":
        yield request.getfixturevalue("virtual_device")
        return
    options = {}
    address = "local"
    if request.param == "ssh":
        server: LoopbackSshd = request.getfixturevalue("sshd")
        address, options = server.address, server.options()
    elif request.param == "adb":
        address = f"adb://{request.getfixturevalue('adbd').serial}"
    device = open_device(address, **options)
    yield device
    device.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "edgepipe-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        skip_here("mounting a file system of 1 MiB needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def new_key(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a key pair; the public half lies beside it as ``.pub``."""

    def make(name: str) -> Path:
        path = tmp_path / name
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True)
        return path

    return make
