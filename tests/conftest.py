"""Fixtures that any test may use."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# No test asserts on wall-clock time, and machines are busy. In CI every run tries the same examples,
# so that a commit passes or fails for what it changed; developers' runs look for new ones.
hypothesis.settings.register_profile(
    "edgepipe", deadline=None, derandomize=os.environ.get("CI") == "true"
)
hypothesis.settings.load_profile("edgepipe")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # started in the background by a shell, which makes children deaf to Ctrl-C; some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The inner loop does not read files whose tests are all slow, nor import what they import."""
    if config.option.markexpr != "not slow" or not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    return True if re.search(r"^pytestmark = pytest\.mark\.slow\b", text, re.MULTILINE) else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data named by EDGEPIPE_DATA (see README, "Running the tests")."""
    folder = os.environ.get("EDGEPIPE_DATA", "")
    if folder and Path(folder).is_dir():
        return Path(folder)
    message = "EDGEPIPE_DATA does not name the folder with the real data sets"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def virtual_pi4() -> str:
    """The address of the virtual Raspberry Pi 4, built on demand; see `virtual_board`."""
    return virtual_board("virt-pi-4")


def virtual_board(name: str) -> str:
    """The address of a virtual board, which is built first where it was not.

    Opening the address starts a machine of one's own in about 2 s. In CI it is an error where QEMU
    is missing. Tests change $HOME; what is built stays in this user's cache.
    """
    from edgepipe.emulator.build import ENV_FOLDER, build, emulator_dir
    from edgepipe.errors import MissingExtra

    os.environ.setdefault(ENV_FOLDER, str(emulator_dir()))
    try:
        build(name)
    except MissingExtra as exc:
        if os.environ.get("CI") == "true":
            pytest.fail(exc.message)
        pytest.skip(exc.message)
    return f"virt://{name}"


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A port and a home of its own for adb's server, which ends with the tests."""
    if shutil.which("adb") is None:
        message = "no adb, Android's client, on this machine (apt-get install adb)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", port)
        home = {**os.environ, "HOME": str(tmp_path_factory.mktemp("adb"))}
        subprocess.run(["adb", "start-server"], env=home, capture_output=True, check=True)
        yield
        subprocess.run(["adb", "kill-server"], capture_output=True, check=True)


@pytest.fixture(autouse=True, scope="session")
def _quiet_frameworks() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
