"""The installed wheel, not the checkout: it holds targets/ and device_profiles/ and runs by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import NET, RECIPE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel and its core dependencies only."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]  # fmt: skip
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("edgepipe-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "env/bin/python", "install", "-q", "--no-compile", "-c", ROOT / "ci/constraints.txt", wheel]  # fmt: skip
    subprocess.run(pip, check=True, capture_output=True)
    return folder / "env" / "bin"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [installed / "edgepipe", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_the_wheel_holds_every_profile_and_payload(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "devices", "list")
    assert listed.returncode == 0, listed.stderr
    for profile in (ROOT / "device_profiles").glob("*.toml"):
        assert profile.stem in listed.stdout
    code = "from edgepipe.resources import target_dir; print(*sorted(p.name for p in target_dir('linux').iterdir()))"  # fmt: skip
    done = subprocess.run([installed / "python", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)  # fmt: skip
    expected = sorted(p.name for p in (ROOT / "targets/linux").iterdir() if p.name != "__pycache__")
    assert [name for name in done.stdout.split() if name != "__pycache__"] == expected


def test_the_wheel_holds_the_converter_locks(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "toolchains", "list")
    assert done.returncode == 0, done.stderr
    assert "onnx2tf" in done.stdout


def test_a_core_install_checks_recipes_and_names_the_missing_extra(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "data.npz").write_bytes(b"")
    checked = run(installed, tmp_path, "check", "recipe.toml")
    assert checked.returncode == 0, checked.stderr
    done = run(installed, tmp_path, "run", "recipe.toml")
    assert done.returncode == 3, done.stderr
    assert "needs the Python package" in done.stderr
    assert "pip install 'edgepipe[" in done.stderr
