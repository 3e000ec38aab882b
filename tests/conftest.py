"""Fixtures that any test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # started in the background by a shell, which makes children deaf to Ctrl-C; some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(autouse=True, scope="session")
def _quiet_frameworks() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
