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


@pytest.fixture(autouse=True, scope="session")
def _quiet_frameworks() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
