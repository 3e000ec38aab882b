"""Fixtures that any test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
