"""A recurrent network that is trained, converted step by step, quantised and judged on a device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgepipe import cli
from edgepipe.artifact import load_artifact
from edgepipe.predict import predict

pytestmark = pytest.mark.slow

NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two layers; the states (layers, N, 16) are inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x, h, c):  # (N, 5)
        y, (h, c) = self.lstm(x[:, None], (h, c))
        return self.head(y[:, 0]), h, c

    def whole(self, x):  # (N, T, 5)
        return self.head(self.lstm(x)[0][:, -1])


def build():
    return Net()
'''

RECIPE = """
schema = 1
name = "remember"
devices = ["localhost"]

[model]
builder = "net.py:build"
weights = "net.safetensors"
outputs = ["y", "h_next", "c_next"]
[[model.inputs]]
name = "x"
shape = [1, 5]
[[model.inputs]]
name = "h"
shape = [2, 1, 16]
[[model.inputs]]
name = "c"
shape = [2, 1, 16]
[model.state]
h = "h_next"
c = "c_next"

[data.calibration]
kind = "npz"
path = "calibration.npz"
[data.test]
kind = "npz"
path = "test.npz"
[evaluate]
data = "test"

[[stages]]
stage = "export_onnx"
[[stages]]
stage = "to_tflite"
[[stages]]
stage = "quantize_int8"

[measure]
sessions = 1
memory_sessions = 0
warmup = "20 ms"
session = "20 ms"
evaluate_samples = 12

[[gates]]
gate = "accuracy_drop"
max = "2 points"
[[gates]]
gate = "full_integer"
[[gates]]
gate = "device_agreement"
[[gates]]
gate = "device_accuracy_drop"
max = "30 points"
"""


def remembered(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """12 steps of noise; at one of the first four the class is shown, which is asked for at the end."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0, 0.1, (count, 12, 5)).astype(np.float32)
    labels, when = generator.integers(0, 4, count), generator.integers(0, 4, count)
    x[np.arange(count), when, labels] += 1
    x[np.arange(count), when, 4] += 1
    return x, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remember")
    (root / "net.py").write_text(NET)
    (root / "recipe.toml").write_text(RECIPE)
    names: dict[str, type[nn.Module]] = {}
    exec(NET, names)
    torch.manual_seed(0)
    net = names["Net"]()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    x, labels = (torch.from_numpy(a) for a in remembered(1024, 0))
    for _ in range(20):
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(net.whole(x[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    save_file(net.state_dict(), root / "net.safetensors")
    for name, seed in (("calibration", 1), ("test", 2), ("train", 3)):
        x_, labels_ = remembered(200, seed)
        np.savez(root / f"{name}.npz", x=x_, labels=labels_)
    return root


def test_a_recurrent_net_passes_its_gates_from_torch_to_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    code = cli.main(["run", "recipe.toml", "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    (record,) = (folder / ".edgepipe" / "runs").glob("*/run.json")
    run = json.loads(record.read_text())
    assert {v["gate"]: v["status"] for v in run["verdicts"]}["device_agreement"] == "PASS"
    steps = {step["step"]: step.get("artifact") for step in run["steps"]}
    assert steps["to_tflite"]["facts"]["parity"]["steps"] == 8
    assert set(steps["to_tflite"]["facts"]["parity"]["outputs"]) == {"y", "h_next", "c_next"}
    made = steps["quantize_int8"]
    outputs = {spec["name"]: spec for spec in made["outputs"]}
    states = [spec for spec in made["inputs"] if spec["fed_by"]]
    assert len(states) == 2
    for spec in states:
        out = outputs[spec["fed_by"]]
        assert [spec[k] for k in ("dtype", "scale", "zero_point", "shape", "layout")] == [
            out[k] for k in ("dtype", "scale", "zero_point", "shape", "layout")
        ]
    (mismatch,) = (folder / ".edgepipe" / "runs").glob("*/measurements/localhost/device_mismatch.json")  # fmt: skip
    assert json.loads(mismatch.read_text())["context"]["inferences"] == 12 * 12
    (score,) = (folder / ".edgepipe" / "runs").glob("*/measurements/model/task_metric.json")
    assert json.loads(score.read_text())["samples"][0][0] > 0.9


QAT = """
[data.train]
kind = "npz"
path = "train.npz"
limit = 120

[[stages]]
stage = "qat"
epochs = 1
lr = 0.001
batch_size = 40
validation = "test"
[[stages]]
stage = "quantize_int8"
"""


def test_a_recurrent_net_is_trained_for_int8_along_its_sequences(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "qat.toml").write_text(RECIPE.replace('[[stages]]\nstage = "quantize_int8"\n', QAT))
    cli.main(["run", "qat.toml", "--json", "--no-devices"])  # what needs a device is inconclusive
    found = json.loads(capsys.readouterr().out)
    steps = {step["step"]: step["key"] for step in found["steps"] if "key" in step}
    cache = folder / ".edgepipe" / "cache"
    trained, made = (load_artifact(cache / steps[name]) for name in ("qat", "quantize_int8"))
    assert trained.facts["agreement"]["sqnr_db"] > 30
    score = trained.facts["accuracy"]
    assert min(score["after"]["int8"], score["before"]["float"]) > 0.95
    for state in (spec for spec in made.inputs if spec.fed_by):
        (out,) = (spec for spec in made.outputs if spec.name == state.fed_by)
        assert (state.scale, state.zero_point, state.layout) == (out.scale, out.zero_point, "LNC")
    x, labels = remembered(200, 2)
    right = predict(made, {"x": x})["y"].argmax(1) == labels
    # one step of rounding apart may grow along a sequence, and decide one that is close
    assert right.mean() == pytest.approx(score["after"]["int8"], abs=0.015)
