"""The step before the first stage: builders and model files, and what is wrong with them."""

from __future__ import annotations

import os
import py_compile
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgepipe import cli
from edgepipe.array_ops.user_code import call_function
from edgepipe.artifact import Artifact, hash_path
from edgepipe.errors import ArtifactError, RequestError
from edgepipe.predict import predict
from edgepipe.stage import StageContext
from edgepipe.stages.load import LoadModel, ModelSource, TensorOption
from edgepipe.tflite_ops.onnx_model import keep_pooled_axes
from edgepipe.torch_ops.model import ModelDescription, _find_builder, save_model
from edgepipe.torch_ops.train import write_state

from .board_side import merged_file

BUILDER = """\
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, classes)
    def forward(self, x):
        y = self.conv(x)
        return self.head(y.mean((2, 3))), y
def build(classes=3):
    return Net(classes)
"""
IMAGE = TensorOption(name="image", shape=(1, 1, 8, 8))
PIXELS = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(BUILDER)
    return tmp_path


def load(root: Path, *, seed: int = 0, **source: Any) -> Artifact:
    work = root / f"work{len(list(root.glob('work*')))}"
    work.mkdir()
    context = StageContext(work_dir=work, data={}, seed=seed, log_path=root / "log.txt")
    return LoadModel(ModelSource(root=root, **source)).run(context)


def onnx_file(path: Path, *, batch: int | str = 1, side: int | str = 8) -> Path:
    """``y = mean(x, [2, 3]) @ w``, x (batch, 2, side, 8)."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["m"], "mean", keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["y"], "product"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, side, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [
            numpy_helper.from_array(np.array([2, 3]), "axes"),
            numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def test_a_builder_gives_a_torch_artifact_with_specs_of_all_tensors(root: Path) -> None:
    artifact = load(root, builder="net.py:build", args={"classes": 5}, inputs=(IMAGE,), outputs=("scores", "map"))  # fmt: skip
    assert [(s.name, s.shape, s.layout) for s in artifact.inputs] == [("image", (1, 1, 8, 8), "NCHW")]  # fmt: skip
    assert [(s.name, s.shape) for s in artifact.outputs] == [("scores", (1, 5)), ("map", (1, 4, 6, 6))]  # fmt: skip
    assert artifact.facts["weights"] == "random"
    assert artifact.facts["macs"] == 4 * 9 * 36 + 4 * 5
    assert artifact.sha256 == hash_path(artifact.path)
    assert predict(artifact, {"image": PIXELS})["scores"].shape == (5, 5)


def test_random_weights_are_those_of_the_seed(root: Path) -> None:
    same = [load(root, seed=s, builder="net.py:build", inputs=(IMAGE,)).sha256 for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_a_builder_is_run_as_it_is_now_whatever_was_compiled_of_it_before(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("answer = lambda: 1\n")
    py_compile.compile(str(path))
    before = path.stat()
    path.write_text("answer = lambda: 2\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # saved within the same second
    assert call_function("net.py:answer", tmp_path) == 2
    assert _find_builder(ModelDescription("net.py:answer", root=tmp_path))() == 2


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond 4 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_weights_that_find_no_room_are_an_error_of_the_system_and_leave_nothing(root: Path) -> None:
    model = nn.Linear(100, 100)
    with pytest.raises(OSError, match="File too large"):
        save_model(model, root / "saved", ModelDescription("net.py:build", root=root))
    with pytest.raises(OSError, match="File too large"):
        write_state(model.state_dict(), root / "kept" / "state.pth")
    assert list((root / "kept").iterdir()) == []


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_weights_are_loaded_from_every_format(root: Path, suffix: str) -> None:
    state = {
        "conv.weight": torch.ones(4, 1, 3, 3), "conv.bias": torch.zeros(4),
        "head.weight": torch.ones(3, 4), "head.bias": torch.tensor([0.0, 1.0, 2.0]),
    }  # fmt: skip
    path = root / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, str(path))
    else:
        torch.save(state, path)
    artifact = load(root, builder="net.py:build", weights=Path(path.name), inputs=(IMAGE,))
    ones = predict(artifact, {"image": np.ones((1, 1, 8, 8), np.float32)})
    np.testing.assert_allclose(ones["output_0"], [[36, 37, 38]], rtol=1e-6)
    assert artifact.facts["weights_sha256"] == hash_path(path)


def test_a_builder_without_declared_inputs_is_refused_with_an_example(root: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        load(root, builder="net.py:build")
    assert "[[model.inputs]]" in caught.value.hint


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"name": "x", "shape": (4, 1, 8, 8)}, "begin with the batch"),
        ({"name": "x", "shape": (1, 0, 8, 8)}, "zeros"),
        ({"name": "x", "shape": (1, 1, 8, 8), "layout": "NHW"}, "4 axes"),
        ({"name": "x", "shape": (1, 1, 8, 8), "layout": "NCHH"}, "4 axes"),
        ({"name": "x", "shape": (1, 3, 8, 8)}, "fails on inputs of shape"),
    ],
)
def test_a_wrong_input_declaration_is_named(root: Path, option: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        load(root, builder="net.py:build", inputs=(TensorOption(**option),))


def test_the_wrong_number_of_output_names_is_refused(root: Path) -> None:
    with pytest.raises(ArtifactError, match=r"returns 2 tensors of shape \(1, 3\), \(1, 4, 6, 6\)"):
        load(root, builder="net.py:build", inputs=(IMAGE,), outputs=("scores",))


def test_a_pt2_file_is_loaded_and_its_free_batch_is_one(root: Path) -> None:
    model = nn.Conv2d(1, 2, 3).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, str(root / "m.pt2"))
    artifact = load(root, file=Path("m.pt2"))
    assert artifact.kind == "pt2"
    assert artifact.inputs[0].shape == (1, 1, 8, 8)
    expected = model(torch.from_numpy(PIXELS)).detach().numpy()
    result = predict(artifact, {artifact.inputs[0].name: PIXELS})
    np.testing.assert_allclose(result["output_0"], expected, rtol=1e-5, atol=1e-6)


def test_inputs_and_outputs_that_are_no_tensors_are_refused_by_name(root: Path) -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, factor: int) -> torch.Tensor:
            return x * factor

    torch.export.save(torch.export.export(Scale(), (torch.zeros(1, 4), 3)), str(root / "m.pt2"))
    with pytest.raises(ArtifactError, match=r"input 'factor' .* is no tensor but 3"):
        load(root, file=Path("m.pt2"))
    node = helper.make_node("SequenceConstruct", ["x", "x"], ["y"])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), root / "m.onnx")  # fmt: skip
    with pytest.raises(ArtifactError, match=r"output 'y' .* is a seq\(tensor\(float\)\)"):
        load(root, file=Path("m.onnx"))


def test_an_onnx_file_is_loaded_with_its_own_names(root: Path) -> None:
    onnx_file(root / "m.onnx", batch="n")
    artifact = load(root, file=Path("m.onnx"))
    assert [(s.name, s.shape) for s in (*artifact.inputs, *artifact.outputs)] == [("x", (1, 2, 8, 8)), ("y", (1, 3))]  # fmt: skip


def test_other_free_dimensions_of_an_onnx_file_need_a_declaration(root: Path) -> None:
    onnx_file(root / "m.onnx", side="height")
    with pytest.raises(ArtifactError, match="free dimensions") as caught:
        load(root, file=Path("m.onnx"))
    assert 'name = "x"' in caught.value.hint
    declared = TensorOption(name="x", shape=(1, 2, 5, 8))
    assert load(root, file=Path("m.onnx"), inputs=(declared,)).inputs[0].shape == (1, 2, 5, 8)
    with pytest.raises(ArtifactError, match="no input or output image"):
        load(root, file=Path("m.onnx"), inputs=(IMAGE,))


def test_external_weights_are_taken_in_and_missing_ones_named(root: Path) -> None:
    model = onnx.load(onnx_file(root / "m.onnx"))
    onnx.save(model, root / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)  # fmt: skip
    artifact = load(root, file=Path("big.onnx"))
    assert [p.name for p in artifact.path.parent.iterdir()] == ["model.onnx"]
    (root / "big.data").unlink()
    with pytest.raises(ArtifactError, match=r"keeps its weights in big\.data"):
        load(root, file=Path("big.onnx"))


def test_files_that_are_not_what_their_name_says_are_refused(root: Path) -> None:
    whole = onnx_file(root / "m.onnx").read_bytes()
    torch.save({}, root / "zip.onnx")
    (root / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (root / "empty.onnx").write_bytes(b"")
    (root / "text.onnx").write_text("hello, this is no model at all\n")
    (root / "page.tflite").write_text("<!DOCTYPE html>")
    (root / "lfs.tflite").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "onnx.tflite").write_bytes(whole)
    (root / "onnx.pt2").write_bytes(whole)
    (root / "flat.onnx").write_bytes(b"\x1c\0\0\0TFL3" + bytes(40))
    expected = {
        "zip.onnx": "looks like a zip archive", "cut.onnx": "cut.onnx is no",
        "empty.onnx": "it is empty", "text.onnx": "text.onnx is no",
        "page.tflite": "looks like a web page", "lfs.tflite": "git lfs pull",
        "onnx.tflite": "is not a TFLite model", "onnx.pt2": "no zip archive",
        "flat.onnx": "looks like a TFLite model", "absent.onnx": "does not exist",
        "net.py": "none of .onnx, .tflite, .pt2",
    }  # fmt: skip
    for name, told in expected.items():
        with pytest.raises(ArtifactError) as caught:
            load(root, file=Path(name))
        assert told in caught.value.message, name
        assert caught.value.hint, name


def test_a_file_of_several_signatures_is_refused_by_their_names(root: Path) -> None:
    (root / "merged.tflite").write_bytes(merged_file())
    with pytest.raises(RequestError, match="by signature: length8, length16, length4"):
        load(root, file=Path("merged.tflite"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("merged.tflite", merged_file(), "called by signature: length8, length16, length4"),
        ("page.tflite", b"<!DOCTYPE html>", "looks like a web page"),
        ("empty.onnx", b"", "it is empty"),
    ],
)
def test_check_and_init_refuse_a_file_that_run_would_refuse(
    root: Path, name: str, content: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / name).write_bytes(content)
    recipe = root / "recipe.toml"
    assert cli.main(["init", str(root / name), "--output", str(recipe)]) == 2
    assert told in capsys.readouterr().err
    assert not recipe.exists()
    recipe.write_text(f'schema = 1\n[model]\nfile = "{name}"\n')
    assert cli.main(["check", str(recipe)]) == 2
    assert told in capsys.readouterr().err


def test_weights_alone_are_refused_with_what_is_missing(root: Path) -> None:
    torch.save({}, root / "w.pth")
    with pytest.raises(ArtifactError) as caught:
        load(root, file=Path("w.pth"))
    assert caught.value.code == "weights-without-builder"
    assert "builder =" in caught.value.hint


def test_means_over_height_and_width_keep_their_axes_and_their_values(root: Path) -> None:
    import onnxruntime

    path = onnx_file(root / "m.onnx")
    model = onnx.load(path)
    assert keep_pooled_axes(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["ReduceMean", "Flatten", "MatMul"]
    assert keep_pooled_axes(model) == 0
    x = np.random.default_rng(0).normal(size=(1, 2, 8, 8)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(source).run(None, {"x": x})[0]
        for source in (str(path), model.SerializeToString())
    )
    np.testing.assert_array_equal(before, after)


def test_an_onnx_model_that_breaks_the_specification_is_refused(root: Path) -> None:
    model = onnx.load(onnx_file(root / "m.onnx"))
    model.graph.node[1].op_type = "MatMull"
    onnx.save(model, root / "bad.onnx")
    with pytest.raises(ArtifactError, match="MatMull"):
        load(root, file=Path("bad.onnx"))


MADE_IN_FORWARD = {
    "kept": ("self.late = getattr(self, 'late', None) or nn.Linear(8, 3)", "self.late(x)"),
    "drawn anew": ("late = nn.Linear(8, 3)", "late(x)"),
}


@pytest.mark.parametrize(("kind", "told"), [("kept", "late.bias, late.weight appear at its first call"), ("drawn anew", "gives other outputs at its second call")])  # fmt: skip
def test_layers_made_in_forward_are_refused(root: Path, kind: str, told: str) -> None:
    made, used = MADE_IN_FORWARD[kind]
    (root / "late.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        f"    def forward(self, x):\n        {made}\n        return {used}\n"
        "def build():\n    return Net()\n"
    )
    with pytest.raises(ArtifactError, match=told) as caught:
        load(root, builder="late.py:build", inputs=(IMAGE,))
    assert "every layer in __init__" in caught.value.hint


def test_layers_without_shapes_are_refused(root: Path) -> None:
    (root / "lazy.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.LazyLinear(3))\n")  # fmt: skip
    with pytest.raises(ArtifactError, match=r"no shapes yet: 0\.weight") as caught:
        load(root, builder="lazy.py:build", inputs=(IMAGE,))
    assert "LazyLinear" in caught.value.hint
