"""The torch artifact: built, edited and loaded; nothing in a weights file is executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgepipe.errors import ArtifactError
from edgepipe.torch_ops.model import (
    ModelDescription,
    build_model,
    load_model,
    load_state,
    read_weights,
    save_model,
)
from edgepipe.torch_ops.pt2 import load_pt2
from edgepipe.torch_ops.run import same_outputs

BUILDER = """\
import dataclasses
from torch import nn

@dataclasses.dataclass
class Widths:
    first: int

def build(width=4):
    widths = Widths(width)
    return nn.Sequential(
        nn.Conv2d(1, widths.first, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * 36, 2),
    )

def nothing():
    return None

def fails(width):
    raise RuntimeError("no such width")
"""

IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(BUILDER)
    return tmp_path


class Exploit:
    """Unpickling it makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"import pathlib; pathlib.Path({str(self.victim)!r}).touch()",))


def test_a_saved_model_loads_with_the_same_outputs(root: Path) -> None:
    description = ModelDescription("net.py:build", {"width": 8}, root=root)
    model = build_model(description, seed=3).eval()
    save_model(model, root / "saved", description)
    assert same_outputs(model, load_model(root / "saved"), [IMAGE])


def test_a_saved_model_loads_after_its_builder_was_changed_and_moved(root: Path) -> None:
    description = ModelDescription("net.py:build", root=root)
    model = build_model(description).eval()
    save_model(model, root / "saved", description)
    (root / "net.py").write_text("raise SystemExit")
    (root / "saved").rename(root / "elsewhere")
    assert same_outputs(model, load_model(root / "elsewhere"), [IMAGE])


def test_a_changed_copy_of_the_builder_is_refused(root: Path) -> None:
    description = ModelDescription("net.py:build", root=root)
    save_model(build_model(description), root / "saved", description)
    with (root / "saved/net.py").open("a") as stream:
        stream.write("# changed\n")
    with pytest.raises(ArtifactError, match="not the builder this model was saved with"):
        load_model(root / "saved")


def test_fresh_weights_depend_on_the_seed_alone(root: Path) -> None:
    description = ModelDescription("net.py:build", root=root)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    one, again, other = (build_model(description, seed=s).eval() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same_outputs(one, again, [IMAGE])
    assert not same_outputs(one, other, [IMAGE])


@pytest.mark.parametrize(
    ("reference", "args", "told"),
    [
        ("net.py:build", {"depth": 3}, "depth"),
        ("net.py:fails", {"width": 7}, "no such width"),
        ("net.py:nothing", {}, "returned a NoneType, not a torch.nn.Module"),
        ("net.py:biuld", {}, "no function 'biuld'"),
        ("gone.py:build", {}, "gone.py does not exist"),
        ("no_such_package.net:build", {}, "no_such_package"),
        ("net.py", {}, "names no builder"),
        ("broken.py:build", {}, "SyntaxError"),
        ("neighbour.py:build", {}, "No module named 'net'"),
    ],
)
def test_a_builder_that_does_not_build_is_named_with_the_reason(
    root: Path, reference: str, args: dict[str, Any], told: str
) -> None:
    (root / "broken.py").write_text("def build(:\n")
    (root / "neighbour.py").write_text("from net import build\n")
    with pytest.raises(ArtifactError) as caught:
        build_model(ModelDescription(reference, args, root=root))
    assert told in caught.value.message
    assert caught.value.hint


def test_weights_that_do_not_fit_are_named(root: Path) -> None:
    model = build_model(ModelDescription("net.py:build", root=root))
    state = dict(model.state_dict())
    state["0.weight"] = torch.zeros(5, 1, 3, 3)
    del state["4.bias"]
    state["head.bias"] = torch.zeros(2)
    with pytest.raises(ArtifactError) as caught:
        load_state(model, state, source=Path("w.pth"))
    for told in ("w.pth", "missing: 4.bias", "unexpected: head.bias", "0.weight (5, 1, 3, 3) instead of (4, 1, 3, 3)"):  # fmt: skip
        assert told in caught.value.message


def test_a_pickled_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ArtifactError, match="would run code") as caught:
        read_weights(tmp_path / "whole.pth")
    assert "state_dict()" in caught.value.hint
    assert "builder" in caught.value.hint


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("legacy", [True, False])
def test_no_code_in_a_weights_file_is_run(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path = tmp_path / f"evil{suffix}"
    torch.save({"w": Exploit(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError):
        read_weights(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the exploit works where code is allowed to run


def test_a_bare_pickle_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    torch.save(nn.Linear(99, 99).state_dict(), tmp_path / "b.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:9000])
    (tmp_path / "c.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for name in ("a.pth", "b.pth", "c.safetensors", "absent.pth"):
        with pytest.raises(ArtifactError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_the_state_dict_inside_says_how_to_take_it_out(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": nn.Linear(2, 2).state_dict()}, tmp_path / "ckpt.pth")
    with pytest.raises(ArtifactError) as caught:
        read_weights(tmp_path / "ckpt.pth")
    assert "['model']" in caught.value.hint


def test_a_newer_model_folder_is_refused(root: Path) -> None:
    description = ModelDescription("net.py:build", root=root)
    save_model(build_model(description), root / "saved", description)
    record = json.loads((root / "saved/model.json").read_text())
    (root / "saved/model.json").write_text(json.dumps({**record, "schema": 2}))
    with pytest.raises(ArtifactError, match="schema 2"):
        load_model(root / "saved")


# --- .pt2 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = torch.export.Dim("batch")
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()).eval()
    torch.export.save(torch.export.export(model, (IMAGE,), dynamic_shapes=({0: batch},)), str(path))
    return path


def rewrite(source: Path, target: Path, member: str, content: bytes) -> Path:
    """A copy of a zip archive with one member replaced, aligned as torch wants it."""
    with zipfile.ZipFile(source) as old:
        files = {name: old.read(name) for name in old.namelist()}
    assert any(name.endswith(member) for name in files)
    writer = torch._C.PyTorchFileWriter(str(target))
    for name, data in files.items():
        short = name.partition("/")[2]
        if not short.startswith((".data/", "byteorder")):
            data = content if short == member else data
            writer.write_record(short, data, len(data))
    writer.write_end_of_file()
    return target


def test_code_among_the_sample_inputs_of_a_pt2_is_not_run(pt2: Path, tmp_path: Path) -> None:
    import io

    buffer = io.BytesIO()
    torch.save(Exploit(tmp_path / "ran"), buffer)
    evil = rewrite(pt2, tmp_path / "evil.pt2", "data/sample_inputs/model.pt", buffer.getvalue())
    with pytest.raises(ArtifactError):
        load_pt2(evil)
    assert not (tmp_path / "ran").exists()


def test_a_pt2_that_calls_what_is_no_operator_is_refused(pt2: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pt2) as archive:
        graph = archive.read("net/models/model.json")
    assert b"torch.ops.aten.conv2d.default" in graph
    changed = graph.replace(b"torch.ops.aten.conv2d.default", b"torch.os.system")
    evil = rewrite(pt2, tmp_path / "evil.pt2", "models/model.json", changed)
    with pytest.raises(ArtifactError, match=r"torch\.os\.system"):
        load_pt2(evil)


@pytest.mark.parametrize(
    "expression", ["__import__('os').system('id')", "exec(chr(65))", "s0.__class__", "x if y else z()"]
)  # fmt: skip
def test_a_pt2_that_evaluates_code_as_a_shape_is_refused(
    pt2: Path, tmp_path: Path, expression: str
) -> None:
    with zipfile.ZipFile(pt2) as archive:
        graph = json.loads(archive.read("net/models/model.json"))
    graph["evil"] = {"expr_str": expression}
    evil = rewrite(pt2, tmp_path / "evil.pt2", "models/model.json", json.dumps(graph).encode())
    with pytest.raises(ArtifactError, match="would run code"):
        load_pt2(evil)


def test_a_truncated_pt2_is_refused(pt2: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(pt2.read_bytes()[:2000])
    with pytest.raises(ArtifactError, match=r"cut\.pt2 is no whole \.pt2"):
        load_pt2(tmp_path / "cut.pt2")
