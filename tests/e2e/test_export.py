"""Real exports to ONNX: proven equal, or refused with the operator and the line at fault."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgepipe.artifact import Artifact
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, StageError
from edgepipe.predict import predict
from edgepipe.stage import StageContext
from edgepipe.stages.export_onnx import ExportOnnx
from edgepipe.stages.load import LoadModel, ModelSource, TensorOption

pytestmark = pytest.mark.slow

BUILDERS = """\
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.head = nn.Linear(4, 3)
        self.projected = nn.LSTM(8, 4, proj_size=2, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(8))

    def forward(self, x, y=None):
        z = F.relu6(self.norm(self.conv(x)))
        if self.kind == "pooled":
            return self.head(z.mean([2, 3]))
        if self.kind == "two":
            return {"score": self.head((z * y).mean((2, 3))), "map": (self.up(z), x[:, :, 0])}
        if self.kind == "recurrent":
            return self.lstm(x[:, 0])[0]
        if self.kind == "attention":
            return self.attention(x[:, 0], x[:, 1], x[:, 0])[0]
        if self.kind == "masked":
            return self.encoder(x[:, 0], mask=self.mask)
        if self.kind == "guarded":
            return torch.log(x.abs() + 1e-10), x / (x.abs() + 1e-9)
        if self.kind == "half":
            return F.linear(z.mean([2, 3]).half(), self.head.weight.half()).float()
        if self.kind == "cond":
            return torch.cond(z.sum() > 0, lambda a: a * 2, lambda a: a - 1, (z,))
        if self.kind == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(x[:, 0], torch.tensor([5]), batch_first=True)
            return self.lstm(packed)[1][0]
        if self.kind == "filtered":
            return z[z > 0]  # as many values as are above 0
        if self.kind == "projected":
            return self.projected(x[:, 0])[0]
        if self.kind == "no_onnx":
            return torch.linalg.qr(z)[0]  # not in ONNX
        if self.kind == "branch":
            if z.sum() > 0:  # depends on values
                return z
            return -z
        if self.kind == "random":
            return z + torch.rand_like(z)


def build(kind):
    return Net(kind)
"""
IMAGE = TensorOption(name="image", shape=(1, 2, 8, 8))
OTHER = TensorOption(name="gate", shape=(1, 1, 8, 8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(BUILDERS)
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        image=generator.normal(1, 2, (6, 2, 8, 8)).astype(np.float32),
        gate=generator.uniform(0, 1, (6, 1, 8, 8)).astype(np.float32),
        x=generator.normal(size=(6, 2, 8, 8)).astype(np.float32),
    )
    return tmp_path


def context(root: Path) -> StageContext:
    work = root / f"work{len(list(root.glob('work*')))}"
    work.mkdir()
    data = {"calibration": DataSource(kind="npz", path=root / "data.npz")}
    return StageContext(work_dir=work, data=data, seed=0, log_path=root / "log.txt")


def load(root: Path, *, inputs: tuple[TensorOption, ...] = (IMAGE,), **source: Any) -> Artifact:
    return LoadModel(ModelSource(root=root, inputs=inputs, **source)).run(context(root))


def net(root: Path, kind: str, *inputs: TensorOption, outputs: tuple[str, ...] = ()) -> Artifact:
    return load(root, builder="nets.py:build", args={"kind": kind}, inputs=inputs or (IMAGE,), outputs=outputs)  # fmt: skip


@pytest.mark.parametrize("kind", ["pooled", "recurrent", "attention", "masked"])
def test_the_exported_model_computes_the_same_on_real_inputs_and_noise(
    root: Path, kind: str
) -> None:
    source = net(root, kind)
    exported = ExportOnnx().run(source, context(root))
    assert exported.kind == "onnx"
    assert (exported.inputs, exported.outputs) == (source.inputs, source.outputs)
    assert exported.parents == (source.sha256,)
    parity = exported.facts["parity"]
    assert parity["samples"] == 6 + 3
    assert parity["outputs"]["output_0"]["sqnr_db"] > 100


def test_a_tiny_number_that_guards_a_logarithm_is_kept(root: Path) -> None:
    exported = ExportOnnx().run(net(root, "guarded"), context(root))
    found = predict(exported, {"image": np.zeros((1, 2, 8, 8), np.float32)})
    np.testing.assert_allclose(found["output_0"], np.log(1e-10), rtol=1e-6)
    np.testing.assert_array_equal(found["output_1"], 0)


def test_names_and_order_of_several_inputs_and_outputs_are_kept(root: Path) -> None:
    source = net(root, "two", IMAGE, OTHER, outputs=("score", "map", "row"))
    exported = ExportOnnx().run(source, context(root))
    model = onnx.load(exported.path)
    assert [v.name for v in model.graph.input] == ["image", "gate"]
    assert [v.name for v in model.graph.output] == ["score", "map", "row"]
    assert [s.shape for s in exported.outputs] == [(1, 3), (1, 2, 16, 16), (1, 2, 8)]
    with np.load(root / "data.npz") as data:
        inputs = {"image": data["image"], "gate": data["gate"]}
    one, other = predict(source, inputs), predict(exported, inputs)
    np.testing.assert_array_equal(other["row"], inputs["image"][:, :, 0])
    np.testing.assert_allclose(other["map"], one["map"], rtol=1e-4, atol=1e-5)


def test_every_node_keeps_the_line_it_came_from(root: Path) -> None:
    exported = ExportOnnx().run(net(root, "pooled"), context(root))
    nodes = onnx.load(exported.path).graph.node
    traces = [{p.key: p.value for p in n.metadata_props}["pkg.torch.onnx.stack_trace"] for n in nodes if n.op_type in ("Conv", "ReduceMean", "Flatten", "Gemm")]  # fmt: skip
    assert len(traces) == 4
    assert all("nets.py" in trace for trace in traces)
    assert exported.facts["means_rewritten"] == 1


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_pt2_file_is_exported_with_batch_one(root: Path, dynamic: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic else None
    example = torch.zeros(2 if dynamic else 1, 2, 8, 8)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    program = torch.export.export(Named().eval(), (example,), dynamic_shapes=shapes)
    torch.export.save(program, str(root / "m.pt2"))
    exported = ExportOnnx().run(load(root, file=Path("m.pt2"), inputs=()), context(root))
    assert [d.dim_value for d in onnx.load(exported.path).graph.input[0].type.tensor_type.shape.dim] == [1, 2, 8, 8]  # fmt: skip
    assert exported.facts["parity"]["outputs"]["output_0"]["sqnr_db"] > 100


def test_an_operator_without_counterpart_is_named_with_its_line(root: Path) -> None:
    source = net(root, "no_onnx")
    where = context(root)
    with pytest.raises(StageError) as caught:
        ExportOnnx().run(source, where)
    message = caught.value.message
    assert "aten.linalg_qr" in message
    assert "nets.py: return torch.linalg.qr(z)[0]" in message
    assert caught.value.__cause__ is not None
    assert caught.value.stage == "export_onnx"
    assert "linalg_qr" in where.log_path.read_text()
    assert list(where.work_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("branch", "if z.sum() > 0"),
        ("packed", "return self.lstm(packed)"),
        ("cond", "return torch.cond("),
    ],
)
def test_what_cannot_be_traced_is_named_with_its_line(root: Path, kind: str, line: str) -> None:
    with pytest.raises(StageError) as caught:
        ExportOnnx().run(net(root, kind), context(root))
    assert caught.value.code == "cannot-trace"
    assert f"nets.py: {line}" in caught.value.message
    assert "torch.where" in caught.value.hint


def test_a_model_that_draws_random_numbers_is_refused_before_it_is_exported(root: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        net(root, "random")
    assert caught.value.code == "changing-outputs"


def test_half_precision_is_told_to_become_float32(root: Path) -> None:
    with pytest.raises(StageError) as caught:
        ExportOnnx().run(net(root, "half"), context(root))
    assert caught.value.code == "parity"
    assert ".float()" in caught.value.hint


def test_a_graph_that_the_exporter_got_wrong_is_said_to_be_its_own(root: Path) -> None:
    with pytest.raises(StageError) as caught:
        ExportOnnx().run(net(root, "projected"), context(root))
    assert caught.value.code == "exporter-error"
    assert "LSTM" in caught.value.message
    assert str(root) not in caught.value.message


def test_an_output_whose_size_depends_on_values_is_refused_as_such(root: Path) -> None:
    with pytest.raises(StageError) as caught:
        ExportOnnx().run(net(root, "filtered"), context(root))
    assert caught.value.code == "dynamic-output"
    assert "'output_0'" in caught.value.message


def test_the_exporter_says_nothing_on_the_screen(
    root: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = net(root, "pooled")
    capfd.readouterr()
    with caplog.at_level(logging.INFO, logger="edgepipe"):
        ExportOnnx().run(source, context(root))
    told = capfd.readouterr()
    assert told.out == ""
    assert "torchvision" not in told.err
    assert any("exporting to ONNX" in message for message in caplog.messages)
