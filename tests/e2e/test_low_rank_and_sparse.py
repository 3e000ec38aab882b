"""Low rank and sparsity in recipes: what was cut stays cut, to the file that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifact import Artifact, load_artifact
from edgepipe.tflite_ops.sparse import check_sparsity

from .conftest import EdgepipeRunner

NET = '''\
"""3x16x16 in, 4 classes out, of operators that XNNPACK can run sparse."""
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        nn.Conv2d(32, 64, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )
'''

RECIPE = """\
schema = 1
name = "small"
[model]
builder = "net.py:build"
[[model.inputs]]
name = "image"
shape = [1, 3, 16, 16]
[data.train]
kind = "npz"
path = "data.npz"
labels = "label"
[data.calibration]
kind = "npz"
path = "data.npz"
limit = 64
"""

TO_INT8 = """\
[[stages]]
stage = "finetune"
epochs = 3
lr = 0.01
[[stages]]
stage = "low_rank"
energy = 0.8
round_to = 4
data = "calibration"
validation = "train"
ignore = ["0", "3", "13"]
[[stages]]
stage = "sparsify"
pattern = "2:4"
epochs = 2
lr = 0.005
[[stages]]
stage = "finetune"
epochs = 2
lr = 0.005
ema = 0.9
[[stages]]
stage = "export_onnx"
[[stages]]
stage = "to_tflite"
[[stages]]
stage = "quantize_int8"
"""

TO_SPARSE_FLOAT = """\
[[stages]]
stage = "sparsify"
sparsity = 0.75
epochs = 0
[[stages]]
stage = "export_onnx"
[[stages]]
stage = "to_tflite"
sparse = true
"""


def run(folder: Path, edgepipe: EdgepipeRunner, stages: str) -> dict[str, Artifact]:
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "recipe.toml").write_text(RECIPE + stages)
    drawn = np.random.default_rng(0)
    labels = drawn.integers(0, 4, 256)
    images = drawn.normal(0, 0.3, (256, 3, 16, 16)).astype(np.float32)
    images[range(256), labels % 3, :8] += 1 + labels[:, None, None] / 3
    np.savez(folder / "data.npz", image=images, label=labels)
    done = edgepipe("run", "recipe.toml", "--no-devices", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    kept = folder / ".edgepipe" / "cache"
    return {
        s["step"]: load_artifact(kept / s["key"]) for s in found["steps"] if s["step"] != "evaluate"
    }


def zeros_of(artifact: Artifact) -> dict[tuple[int, ...], float]:
    """Share of zeros by shape of the weights."""
    report = check_sparsity(artifact.path.read_bytes(), where="m")
    return {x.shape: x.zeros / x.values for x in report.layers}


@pytest.mark.slow
def test_a_factored_layers_zeros_survive_training_conversion_and_int8(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    steps = run(project, edgepipe, TO_INT8)
    (rank,) = steps["low_rank"].facts["ranks"]["9"]["ranks"]
    assert steps["low_rank"].facts["left_alone"].keys() >= {"0", "3", "6"}
    assert steps["low_rank"].facts["after"]["macs"] < steps["low_rank"].facts["before"]["macs"]
    # the factored layer's halves are "9.0" and "9.1" from here on
    assert steps["sparsify"].facts["zeros"] == {"3": 0.5, "9.0": 0.5, "9.1": 0.5}
    edits = json.loads((steps["sparsify"].path / "model.json").read_text())["edits"]
    assert [e["edit"] for e in edits] == ["low_rank", "sparse", "sparse", "sparse"]
    exact = {(32, 1, 1, 16): 0.5, (rank, 1, 1, 32): 0.5, (64, 1, 1, rank): 0.5}
    found = zeros_of(steps["to_tflite"])
    assert {shape: found[shape] for shape in exact} == exact
    int8 = zeros_of(steps["quantize_int8"])
    assert all(int8[shape] >= 0.5 for shape in exact)
    report = steps["quantize_int8"].facts["sparsity"]
    assert report["is_float"] is report["is_faster"] is False
    assert report["compressed_bytes"]["gzip"] < report["size_bytes"]


@pytest.mark.slow
def test_a_float_model_made_for_it_ships_with_weights_that_xnnpack_skips(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    steps = run(project, edgepipe, TO_SPARSE_FLOAT)
    report = steps["to_tflite"].facts["sparsity"]
    assert report["is_stored_sparse"]
    assert report["is_faster"]
    assert [x["shape"] for x in report["layers"] if x["is_skipped"]] == [[32, 1, 1, 16], [64, 1, 1, 32]]  # fmt: skip
    # the proof of the conversion is of this very file
    assert steps["to_tflite"].facts["parity"]["outputs"]
