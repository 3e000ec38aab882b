"""Real conversions in the real toolchain, and everything that may go wrong in one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgepipe import toolchain
from edgepipe.artifact import Artifact, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, MissingExtra, StageError, StageOptionError
from edgepipe.predict import predict
from edgepipe.stage import StageContext
from edgepipe.stages import to_tflite
from edgepipe.stages.to_tflite import ToTflite
from edgepipe.tflite_ops.onnx_model import onnx_specs
from edgepipe.tflite_ops.run import open_tflite

pytestmark = pytest.mark.slow


class Conv(nn.Module):
    """What int8 boards run: conv + batch norm + relu6, depthwise, global pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.conv(image)))
        x = nn.functional.relu(self.depthwise(x))
        return self.head(x.mean((2, 3)))


class TwoByTwo(nn.Module):
    """Two inputs of one shape whose order matters, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.relu(self.left(left)) * torch.sigmoid(self.right(right))
        return y, y.mean((2, 3))


class Cube(nn.Module):
    """As many channels as rows and columns: shapes say nothing about the layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 8, 3, padding=2, dilation=2), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Bicubic(nn.Module):
    """An operator that exports to ONNX but has no TFLite form here."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.tanh(self.dense(x)).reshape(1, 2, 2, 2)
        return nn.functional.grid_sample(x.reshape(1, 1, 2, 4), grid, mode="bicubic", align_corners=True)  # fmt: skip


class Guarded(nn.Module):
    """What is guarded against zeros and overflow, as people write it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            nn.functional.normalize(x, dim=1),
            torch.log(x.clamp(min=1e-10)),
            nn.functional.log_softmax(x, dim=1),
            torch.where(x > 0, 1 / x, 0.0),
            torch.logsumexp(x, 1),
        )


MODELS: dict[str, tuple[type[nn.Module], dict[str, tuple[int, ...]], list[str]]] = {
    "conv": (Conv, {"image": (1, 3, 16, 12)}, ["logits"]),
    "two": (TwoByTwo, {"left": (1, 3, 10, 8), "right": (1, 3, 10, 8)}, ["map", "mean"]),
    "cube": (Cube, {"x": (1, 8, 8, 8)}, ["y"]),
    "tcn": (Tcn, {"x": (1, 6, 20)}, ["y"]),
    "lstm": (Lstm, {"x": (1, 12, 6)}, ["y"]),
    "guarded": (Guarded, {"x": (1, 4, 6)}, ["unit", "log", "score", "inverse", "sum"]),
    "bicubic": (Bicubic, {"x": (1, 8)}, ["y"]),
}

Exporter = Callable[..., Artifact]


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """``export(name)`` -> the ONNX artifact of one of MODELS, made once."""
    folder = tmp_path_factory.mktemp("onnx")

    def make(name: str, *, free_batch: bool = False) -> Artifact:
        kind, inputs, outputs = MODELS[name]
        path = folder / f"{name}{'-free' if free_batch else ''}.onnx"
        if not path.exists():
            batch = 2 if free_batch else 1
            samples = tuple(torch.randn(batch, *shape[1:]) for shape in inputs.values())
            dynamic = tuple({0: torch.export.Dim("batch")} for _ in inputs) if free_batch else None
            torch.onnx.export(
                seeded(kind), samples, path, dynamo=True, opset_version=18, verbose=False,
                input_names=list(inputs), output_names=outputs, external_data=False,
                dynamic_shapes=dynamic,
            )  # fmt: skip
        found_inputs, found_outputs = onnx_specs(path)
        return make_artifact("onnx", path, inputs=found_inputs, outputs=found_outputs)

    return make


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """A stage's context with noise for calibration data, and a private folder for temporary files."""
    work = tmp_path / "work"
    work.mkdir()
    noise = DataSource(kind="random", limit=8)
    return StageContext(work, {"calibration": noise}, 0, tmp_path / "log.txt")


@pytest.fixture(autouse=True)
def private_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def layouts(artifact: Artifact) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {s.name: (s.layout, s.shape) for s in (*artifact.inputs, *artifact.outputs)}


# -- what it makes --------------------------------------------------------------------------------


def test_a_convolution_net_becomes_nhwc_and_computes_the_same(export: Exporter, context: StageContext, private_temp: Path) -> None:  # fmt: skip
    source = export("conv")
    before = source.path.read_bytes()
    made = ToTflite().run(source, context)
    assert layouts(made) == {"image": ("NHWC", (1, 16, 12, 3)), "logits": ("NC", (1, 5))}
    assert made.inputs[0].source_layout == "NCHW"
    assert made.parents == (source.sha256,)
    parity = made.facts["parity"]
    assert parity["samples"] == 8 + 3
    assert parity["outputs"]["logits"]["sqnr_db"] > 100
    assert made.facts["route"] == "onnx2tf"
    # inputs of a seed of our own, not those of the proof
    x = {"image": np.random.default_rng(9).normal(size=(4, 3, 16, 12)).astype(np.float32)}
    with torch.no_grad():
        expected = seeded(Conv)(torch.from_numpy(x["image"])).numpy()
    np.testing.assert_allclose(predict(made, x)["logits"], expected, rtol=1e-4, atol=1e-5)
    assert source.path.read_bytes() == before, "the converter changed its input"
    assert [p.name for p in context.work_dir.iterdir()] == ["model.tflite"]
    assert not list(private_temp.glob("edgepipe*"))


def test_two_inputs_and_two_outputs_keep_their_names(export: Exporter, context: StageContext) -> None:  # fmt: skip
    source = export("two")
    made = ToTflite().run(source, context)
    assert {s.name for s in made.inputs} == {"left", "right"}
    assert {s.name for s in made.outputs} == {"map", "mean"}
    generator = np.random.default_rng(5)
    x = {n: generator.normal(size=(2, 3, 10, 8)).astype(np.float32) for n in ("left", "right")}
    ours, theirs = predict(made, x), predict(source, x)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["NHWC", "NCHW"])
def test_the_layout_asked_for_is_made_even_where_shapes_cannot_tell(export: Exporter, context: StageContext, wanted: Any) -> None:  # fmt: skip
    made = ToTflite(input_layout=wanted).run(export("cube"), context)
    assert made.inputs[0].layout == wanted


def test_a_signal_of_rank_three_keeps_its_axes(export: Exporter, context: StageContext) -> None:
    made = ToTflite().run(export("tcn"), context)
    assert layouts(made)["x"] == ("NCL", (1, 6, 20))


def test_guards_hold_where_no_sample_of_the_proof_was(export: Exporter, context: StageContext) -> None:  # fmt: skip
    made = ToTflite(route="onnx2tf").run(export("guarded"), context)
    interpreter = open_tflite(made.path)
    for scale in (0.0, 200.0):
        x = scale * torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
        expected = dict(zip(MODELS["guarded"][2], Guarded()(x), strict=True))
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
        interpreter.invoke()
        for detail, spec in zip(interpreter.get_output_details(), made.outputs, strict=True):
            found = interpreter.get_tensor(detail["index"])
            np.testing.assert_allclose(found, expected[spec.name], rtol=1e-4, atol=1e-5, err_msg=f"{spec.name} at {scale}")  # fmt: skip


def test_an_lstm_is_proven_sample_by_sample_and_its_state_is_recorded(export: Exporter, context: StageContext) -> None:  # fmt: skip
    made = ToTflite(streaming=True).run(export("lstm"), context)
    assert made.facts["variable_tensors"] > 0
    assert made.facts["streaming"] is True
    assert made.facts["parity"]["outputs"]["y"]["sqnr_db"] > 100


def test_a_free_batch_becomes_the_batch_asked_for(export: Exporter, context: StageContext) -> None:
    source = export("conv", free_batch=True)
    made = ToTflite(batch=2).run(source, context)
    assert layouts(made) == {"image": ("NHWC", (2, 16, 12, 3)), "logits": ("NC", (2, 5))}
    assert made.facts["parity"]["samples"] == 11  # an odd number, through a batch of two


def test_a_fixed_batch_is_not_changed(export: Exporter, context: StageContext) -> None:
    with pytest.raises(StageOptionError, match="has a fixed batch of 1"):
        ToTflite(batch=4).run(export("conv"), context)


def test_the_tensorflow_route_makes_the_same_model(export: Exporter, context: StageContext) -> None:
    made = ToTflite(route="tf").run(export("conv"), context)
    assert made.facts["route"] == "tf"
    assert made.facts["toolchain"]["name"] == "onnx2tf-tf"
    assert layouts(made) == {"image": ("NHWC", (1, 16, 12, 3)), "logits": ("NC", (1, 5))}
    assert made.facts["parity"]["outputs"]["logits"]["sqnr_db"] > 100


# -- what it refuses ------------------------------------------------------------------------------


def test_an_operator_that_does_not_convert_is_named_with_its_pytorch_line(export: Exporter, context: StageContext) -> None:  # fmt: skip
    with pytest.raises(StageError) as caught:
        ToTflite(route="onnx2tf").run(export("bicubic"), context)
    assert caught.value.code == "unsupported-op"
    assert "operator GridSample" in caught.value.message
    assert "test_to_tflite.py:" in caught.value.message
    assert "nn.functional.grid_sample(" in caught.value.message
    assert caught.value.log_path == str(context.log_path)
    assert list(context.work_dir.iterdir()) == []


def tampering_script(tmp_path: Path, change: str) -> None:
    """A converter that converts something slightly else: ``change`` edits the ONNX ``model``."""
    script = tmp_path / "tampering.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(toolchain.LOCKS)!r})
from child import serve
from onnx_to_tflite_direct import convert

def wrong(request):
    import numpy, onnx
    from onnx import numpy_helper
    model = onnx.load(request["model"])
    {change}
    onnx.save(model, request["model"])
    return convert(request)

serve(wrong)
"""
    )


def test_a_wrong_weight_is_found_and_its_layer_named(export: Exporter, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    tampering_script(
        tmp_path,
        "w = next(i for i in model.graph.initializer if 'depthwise.weight' in i.name);"
        " a = numpy_helper.to_array(w).copy(); a[3] *= 1.01;"
        " w.CopyFrom(numpy_helper.from_array(a, w.name))",
    )
    monkeypatch.setitem(to_tflite.ROUTES, "onnx2tf", ("onnx2tf", str(tmp_path / "tampering.py")))
    with pytest.raises(StageError) as caught:
        ToTflite(route="onnx2tf").run(export("conv"), context)
    assert caught.value.code == "parity"
    assert "output 'logits' is off by" in caught.value.message
    assert "the first operator to compute something else is Conv" in caught.value.message
    assert "self.depthwise(x)" in caught.value.message


def test_swapped_inputs_are_found_out_by_value(export: Exporter, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Names that lie: what the file calls left is the source's right."""
    tampering_script(
        tmp_path,
        "swap = {'left': 'right', 'right': 'left'}\n"
        "    for node in model.graph.node:\n"
        "        for i, name in enumerate(node.input): node.input[i] = swap.get(name, name)",
    )
    monkeypatch.setitem(to_tflite.ROUTES, "onnx2tf", ("onnx2tf", str(tmp_path / "tampering.py")))
    source = export("two")
    made = ToTflite().run(source, context)
    generator = np.random.default_rng(5)
    x = {n: generator.normal(size=(1, 3, 10, 8)).astype(np.float32) for n in ("left", "right")}
    np.testing.assert_allclose(predict(made, x)["mean"], predict(source, x)["mean"], atol=1e-5)
    assert [s.name for s in made.inputs] == ["right", "left"]


def test_a_converter_that_lies_about_its_file_is_caught(export: Exporter, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    script = tmp_path / "lying.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(toolchain.LOCKS)!r})\n"
        "from child import serve\nserve(lambda request: {'tflite': 'out/model_float32.tflite'})\n"
    )
    monkeypatch.setitem(to_tflite.ROUTES, "onnx2tf", ("onnx2tf", str(script)))
    with pytest.raises(StageError) as caught:
        ToTflite(route="onnx2tf").run(export("conv"), context)
    assert caught.value.code == "no-output"


def test_a_damaged_result_is_an_invalid_graph(export: Exporter, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    script = tmp_path / "damaged.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(toolchain.LOCKS)!r})\n"
        "from child import serve\n"
        "def convert(request):\n"
        "    open('x.tflite', 'wb').write(b'\\x1c\\0\\0\\0TFL3' + bytes(40))\n"
        "    return {'tflite': 'x.tflite'}\n"
        "serve(convert)\n"
    )
    monkeypatch.setitem(to_tflite.ROUTES, "onnx2tf", ("onnx2tf", str(script)))
    with pytest.raises(StageError) as caught:
        ToTflite(route="onnx2tf").run(export("conv"), context)
    assert caught.value.code == "invalid-graph"
    assert list(context.work_dir.iterdir()) == []


def test_the_deadline_ends_a_conversion(export: Exporter, context: StageContext, private_temp: Path) -> None:  # fmt: skip
    with pytest.raises(StageError) as caught:
        ToTflite(route="onnx2tf", timeout=0.3).run(export("conv"), context)
    assert caught.value.code == "timeout"
    assert list(context.work_dir.iterdir()) == list(private_temp.glob("edgepipe*")) == []


def test_quantised_onnx_is_refused_before_anything_is_converted(context: StageContext, tmp_path: Path) -> None:  # fmt: skip
    path = tmp_path / "qdq.onnx"
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.1])
    zero = helper.make_tensor("z", TensorProto.INT8, [], [0])
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize_x"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [scale, zero],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)  # fmt: skip
    inputs, outputs = onnx_specs(path)
    source = make_artifact("onnx", path, inputs=inputs, outputs=outputs)
    with pytest.raises(ArtifactError) as caught:
        ToTflite().run(source, context)
    assert caught.value.code == "qdq-onnx"
    assert "quantize_x" in caught.value.message
    assert not context.log_path.exists()


def test_an_output_without_elements_is_refused_before_anything_is_converted(export: Exporter, context: StageContext) -> None:  # fmt: skip
    source = export("conv")
    empty = dataclasses.replace(source.outputs[0], shape=(0, 5))
    with pytest.raises(ArtifactError, match=r"has no elements: its shape is \[0, 5\]") as caught:
        ToTflite().run(dataclasses.replace(source, outputs=(empty,)), context)
    assert caught.value.code == "empty-output"


def test_a_model_without_inputs_is_refused(export: Exporter, context: StageContext) -> None:
    with pytest.raises(ArtifactError, match="has no inputs: its outputs are always the same"):
        ToTflite().run(dataclasses.replace(export("conv"), inputs=()), context)


def test_a_truncated_onnx_is_refused(export: Exporter, context: StageContext, tmp_path: Path) -> None:  # fmt: skip
    source = export("conv")
    path = tmp_path / "cut.onnx"
    path.write_bytes(source.path.read_bytes()[:-700])
    with pytest.raises(ArtifactError, match=r"cut\.onnx"):
        ToTflite().run(dataclasses.replace(source, path=path), context)


def test_a_missing_toolchain_is_one_message_with_the_command(export: Exporter, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path / "none"))
    monkeypatch.setenv("EDGEPIPE_NO_INSTALL", "1")
    with pytest.raises(MissingExtra) as caught:
        ToTflite().run(export("conv"), context)
    assert caught.value.hint == "edgepipe toolchains install onnx2tf"


def test_without_python_3_12_tensorflow_is_the_way_and_the_record_says_so(export: Exporter, context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    ensure = toolchain.ensure

    def no_python(name: str) -> Path:
        if name == "onnx2tf":
            raise MissingExtra("no Python 3.12", code="no-python")
        return ensure(name)

    monkeypatch.setattr(toolchain, "ensure", no_python)
    made = ToTflite().run(export("conv"), context)
    assert made.facts["route"] == "tf"
    codes = {(a["route"], a["simplified"]): a["code"] for a in made.facts["attempts"]}
    assert codes == {
        ("onnx2tf", True): "no-toolchain", ("litert-torch", False): "no-exported-program",
        ("onnx2tf", False): "no-toolchain", ("tf", True): "",
    }  # fmt: skip
    assert "onnx2tf from given: no-toolchain" in made.facts["route_reason"]


def test_a_failed_install_is_no_reason_for_another_converter(export: Exporter, context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def ensure(name: str) -> Path:
        raise MissingExtra("no network", code="install-failed")

    monkeypatch.setattr(toolchain, "ensure", ensure)
    with pytest.raises(MissingExtra, match="no network"):
        ToTflite().run(export("conv"), context)


# -- through the command line ---------------------------------------------------------------------


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is below a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_ctrl_c_in_the_middle_of_a_conversion_leaves_no_process_and_no_file(export: Exporter, tmp_path: Path, private_temp: Path) -> None:  # fmt: skip
    toolchain.install("onnx2tf")
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(export("conv").path, project / "conv.onnx")
    process = subprocess.Popen(
        [sys.executable, "-m", "edgepipe", "convert", "conv.onnx"],
        cwd=project, env={**os.environ, "TMPDIR": str(private_temp)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not processes_in(private_temp):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert processes_in(private_temp) == []
    assert not list(private_temp.glob("edgepipe*"))
    assert not list(project.glob("*.tflite"))
    assert not list(project.glob(".edgepipe/building/*"))
