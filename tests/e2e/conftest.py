"""A small project of a user, and the command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from edgepipe.device import Device, open_device
from edgepipe.testing import LoopbackSshd, find_sshd

NET = '''\
"""A small convolutional classifier: 1x12x12 in, 4 classes out."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8, broken=False):
        super().__init__()
        self.broken = broken
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width), nn.ReLU6(),
            nn.Conv2d(width, 2 * width, 1), nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, 4)

    def forward(self, image):
        x = self.features(image)
        if self.broken:
            x = x[torch.nonzero(x.sum((1, 2, 3)) > 0)[:, 0]]
        return self.head(x.mean((2, 3)))


def build(width=8, broken=False):
    return Net(width, broken)
'''

RECIPE = """\
schema = 1
name = "small"
devices = ["localhost"]
[model]
builder = "net.py:build"
args = { width = 16 }
[[model.inputs]]
name = "image"
shape = [1, 1, 12, 12]
[data.train]
kind = "npz"
path = "data.npz"
[data.calibration]
kind = "npz"
path = "data.npz"
fold = [0, 2]
limit = 64
[data.test]
kind = "npz"
path = "data.npz"
not_fold = [0, 2]
limit = 100
seed = 1
[evaluate]
data = "test"
metric = "top1"
reference = 2
[[stages]]
stage = "prune"
ratio = 0.5
[[stages]]
stage = "finetune"
epochs = 3
[[stages]]
stage = "export_onnx"
[[stages]]
stage = "to_tflite"
[[stages]]
stage = "quantize_int8"
[measure]
threads = 1
sessions = 2
warmup = "100 ms"
session = "300 ms"
[[gates]]
gate = "latency"
max = "1 s"
[[gates]]
gate = "memory"
max = "100 MB"
[[gates]]
gate = "size"
max = "100 kB"
[[gates]]
gate = "accuracy_drop"
max = "10 points"
[[gates]]
gate = "parity"
min_sqnr = "10 dB"
[[gates]]
gate = "full_integer"
"""


def blobs(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with a bright quarter, whose number is the class: (N, 1, 12, 12) float32, (N,)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count)
    images = generator.normal(0, 0.3, (count, 1, 12, 12)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6] += 1
    return images, labels


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own for every test: the local device's lease and files lie there.

    Converter environments stay where they are, as they take a while to install.
    """
    caches = platformdirs.user_cache_path("edgepipe")
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", os.environ.get("EDGEPIPE_TOOLCHAINS") or str(caches / "toolchains"))  # fmt: skip
    home = tmp_path / "own-home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a builder, data and a recipe."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    (folder / "recipe.toml").write_text(RECIPE)
    images, labels = blobs(400, seed=0)
    np.savez(folder / "data.npz", image=images, labels=labels)
    return folder


@pytest.fixture
def server() -> Iterator[LoopbackSshd]:
    """A real sshd on loopback; in CI its absence is an error."""
    if find_sshd() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no sshd on this machine")
        pytest.skip("no sshd on this machine")
    with LoopbackSshd() as running:
        yield running


@pytest.fixture(params=["local", "ssh"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """This machine, by itself and over SSH."""
    address, options = "local", {}
    if request.param == "ssh":
        server: LoopbackSshd = request.getfixturevalue("server")
        address, options = server.address, server.options()
    opened = open_device(address, **options)
    try:
        yield opened
    finally:
        opened.close()


EdgepipeRunner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def edgepipe(project: Path) -> EdgepipeRunner:
    """Runs ``edgepipe ARGUMENTS`` in the project's folder."""

    def run(
        *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgepipe", *arguments],
            cwd=project,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


def leftovers(folder: Path) -> list[str]:
    """Half-written files: anything temporary, anything being built."""
    found = [p for p in folder.rglob("*") if p.is_file() and ".part" in p.name]
    found += list(folder.glob(".edgepipe/building/*"))
    return [str(p) for p in found]
