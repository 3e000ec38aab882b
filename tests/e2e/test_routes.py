"""The search for the best converter, with real converters: what each gets wrong is never kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgepipe.artifact import Artifact, hash_path, make_artifact
from edgepipe.data import DataSource
from edgepipe.predict import predict
from edgepipe.routes import Candidate
from edgepipe.stage import StageContext
from edgepipe.stages import to_tflite
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.stages.to_tflite import ConversionError, ToTflite
from edgepipe.tflite_ops import onnx_recurrent
from edgepipe.tflite_ops.inspect import describe
from edgepipe.tflite_ops.onnx_model import onnx_specs
from edgepipe.torch_ops.export import export_onnx
from edgepipe.torch_ops.pt2 import save_pt2

pytestmark = pytest.mark.slow


class SqueezeExcite(nn.Module):
    """MobileNet's parts that converters stumble over: ReLU6, squeeze-excite, ``mean([2, 3])``."""

    shape = (1, 3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self.norm(self.stem(x)))
        y = functional.relu6(self.depthwise(x))
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y * scale)).mean([2, 3]))


class Shuffle(nn.Module):
    """ShuffleNet's unit."""

    shape = (1, 3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(2):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, torch.relu(self.depthwise(self.one(right)))], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean([2, 3]))


class Lstm(nn.Module):
    shape = (1, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def exported(kind: type[nn.Module], folder: Path) -> Artifact:
    """A model as `export_onnx` leaves it: ONNX, and the program beside it."""
    path = folder / "model.onnx"
    program = export_onnx(
        seeded(kind), [torch.zeros(kind.shape)], path, input_names=["x"], output_names=["y"],  # type: ignore[attr-defined]
        opset=18, optimize=True, log_path=folder / "export.txt",
    )  # fmt: skip
    save_pt2(program, folder / "model.pt2")
    inputs, outputs = onnx_specs(path)
    kept = {"file": "model.pt2", "sha256": hash_path(folder / "model.pt2")}
    return make_artifact("onnx", path, inputs=inputs, outputs=outputs, facts={"exported_program": kept})  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    work = tmp_path / "work"
    work.mkdir()
    return StageContext(work, {"calibration": DataSource(kind="random", limit=8)}, 0, tmp_path / "log.txt")  # fmt: skip


def assert_computes_the_same(made: Artifact, kind: type[nn.Module]) -> None:
    x = np.random.default_rng(9).normal(size=(3, *kind.shape[1:])).astype(np.float32)  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = np.concatenate([seeded(kind)(torch.from_numpy(row[None])).numpy() for row in x])
    np.testing.assert_allclose(predict(made, {"x": x})["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["onnx2tf", "litert-torch"])
def test_mean_over_height_and_width_costs_no_transpose_and_no_loose_relu6(route: str, tmp_path: Path, context: StageContext) -> None:  # fmt: skip
    made = ToTflite(route=route).run(exported(SqueezeExcite, tmp_path), context)  # type: ignore[arg-type]
    assert made.facts["route"] == route
    assert made.inputs[0].layout == "NHWC"
    assert_computes_the_same(made, SqueezeExcite)
    found = describe(made.path)
    assert found.transposes == 0
    assert not {"RELU6", "TRANSPOSE"} & set(found.operators)
    (attempt,) = made.facts["attempts"]
    assert attempt["clean"]
    assert attempt["parity"] < 1e-4


class Map(nn.Module):
    shape = (1, 3, 8, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


# the other combinations differ in nothing that is decided here
@pytest.mark.parametrize(
    ("route", "input_layout", "output_layout"),
    [("onnx2tf", "NCHW", "NCHW"), ("litert-torch", "NHWC", "NCHW")],
)
def test_every_route_makes_the_layouts_asked_for(route: Any, input_layout: Any, output_layout: Any, tmp_path: Path, context: StageContext) -> None:  # fmt: skip
    stage = ToTflite(route=route, input_layout=input_layout, output_layout=output_layout)
    made = stage.run(exported(Map, tmp_path), context)
    shapes = {"x": {"NHWC": (1, 8, 6, 3), "NCHW": (1, 3, 8, 6)}, "y": {"NHWC": (1, 8, 6, 4), "NCHW": (1, 4, 8, 6)}}  # fmt: skip
    assert [(s.layout, s.shape) for s in (*made.inputs, *made.outputs)] == [
        (input_layout, shapes["x"][input_layout]), (output_layout, shapes["y"][output_layout])
    ]  # fmt: skip
    assert_computes_the_same(made, Map)
    (attempt,) = made.facts["attempts"]
    channels_first = [input_layout, output_layout].count("NCHW")
    assert (attempt["transposes"], attempt["clean"]) == (channels_first, True)
    asked = {"name": "y", "converted": "NHWC", "layout": "NCHW"}
    assert made.facts["doors"] == ([asked] if route == "onnx2tf" else [])


def test_int8_takes_the_transpose_at_a_door(tmp_path: Path, context: StageContext) -> None:
    x = np.random.default_rng(9).normal(size=(16, 3, 8, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    context.data["calibration"] = DataSource(kind="npy", path=tmp_path / "x.npy")
    source = dataclasses.replace(exported(Map, tmp_path), facts={})  # ONNX only
    made = ToTflite(output_layout="NCHW").run(source, context)
    assert [door["name"] for door in made.facts["doors"]] == ["y"]
    int8 = QuantizeInt8(samples=16).run(made, context)
    assert [(s.name, s.layout, s.dtype) for s in int8.outputs] == [("y", "NCHW", "int8")]
    found = describe(int8.path)
    assert found.transposes == 1
    assert "DEQUANTIZE" not in found.operators
    expected, actual = predict(source, {"x": x})["y"], predict(int8, {"x": x})["y"]
    # a map with its axes mixed up has an error like its values
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


def test_an_lstm_of_few_steps_keeps_no_state_through_onnx(tmp_path: Path, context: StageContext) -> None:  # fmt: skip
    source = dataclasses.replace(exported(Lstm, tmp_path), facts={})
    made = ToTflite(route="onnx2tf").run(source, context)
    assert made.facts["variable_tensors"] == 0
    assert_computes_the_same(made, Lstm)


def test_a_long_lstm_goes_on_to_the_converter_whose_file_keeps_no_state(
    tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_recurrent, "MAX_STEPS", 4)
    made = ToTflite().run(exported(Lstm, tmp_path), context)
    first, second = made.facts["attempts"]
    assert (first["route"], first["ok"], first["code"]) == ("onnx2tf", False, "keeps-state")
    assert (second["route"], second["ok"], second["clean"]) == ("litert-torch", True, True)
    assert made.facts["route"] == "litert-torch"
    assert "onnx2tf from dynamo: keeps-state" in made.facts["route_reason"]
    assert_computes_the_same(made, Lstm)


def test_a_fused_lstm_that_keeps_state_is_refused(
    tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_recurrent, "MAX_STEPS", 4)
    source = dataclasses.replace(exported(Lstm, tmp_path), facts={})
    with pytest.raises(ConversionError) as caught:
        ToTflite(route="onnx2tf").run(source, context)
    assert caught.value.code == "keeps-state"
    assert "streaming = true" in caught.value.hint
    assert caught.value.attempts[0].code == "keeps-state"
    assert not any(attempt.ok for attempt in caught.value.attempts)
    assert list(context.work_dir.iterdir()) == []


def test_shufflenet_from_torchscript_unsimplified_is_an_invalid_graph(tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """onnx2tf 2.6.9 exits 0 with a file that loads and does not run."""
    monkeypatch.setattr(to_tflite, "candidates", lambda *_, **__: (Candidate("onnx2tf", "torchscript", False),))  # fmt: skip
    with pytest.raises(ConversionError) as caught:
        ToTflite().run(exported(Shuffle, tmp_path), context)
    assert caught.value.code == "invalid-graph"
    assert [a.code for a in caught.value.attempts] == ["invalid-graph"]
    assert list(context.work_dir.iterdir()) == []


def test_a_program_that_was_changed_since_is_no_route(tmp_path: Path, context: StageContext) -> None:  # fmt: skip
    source = exported(SqueezeExcite, tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"something else")
    with pytest.raises(ConversionError) as caught:
        ToTflite(route="litert-torch").run(source, context)
    assert caught.value.code == "no-exported-program"
