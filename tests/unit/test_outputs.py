"""Files that commands write where a user says, and recipes that `init` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepipe import cli
from edgepipe.tflite_ops.tiny import tiny_tflite

RECIPE = """\
schema = 1
[model]
file = "model.tflite"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.tflite").write_bytes(tiny_tflite())
    (tmp_path / "recipe.toml").write_text(RECIPE)
    np.savez(tmp_path / "data.npz", x=np.ones((9, 4), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = {
    "run": ["run", "recipe.toml"],
    "report": ["report"],
    "init": ["init", "model.tflite"],
    "convert": ["convert", "model.tflite"],
    "quantize": ["quantize", "model.tflite", "--data", "data.npz"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("output", [".", "model.tflite/x", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    folder: Path, command: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "folder").mkdir()
    if command == "report":
        assert cli.main(["run", "recipe.toml"]) == 0
    before = sorted(folder.rglob("*"))
    assert cli.main([*COMMANDS[command], "--output", output]) == 2
    assert f"--output {output}" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_folders_above_an_output_are_made(folder: Path) -> None:
    assert cli.main(["run", "recipe.toml", "--output", "new/m.tflite"]) == 0
    assert (folder / "new" / "m.tflite").read_bytes() == tiny_tflite()
    assert cli.main(["report", "--output", "new/er/report.txt"]) == 0
    assert "model_bytes" in (folder / "new" / "er" / "report.txt").read_text()
    assert cli.main(["init", "model.tflite", "--output", "new/est/recipe.toml"]) == 0
    assert [p.name for p in folder.rglob("*.part")] == []


def test_a_model_that_is_a_folder_cannot_be_copied_to_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(4, 4)\n")
    (folder / "recipe.toml").write_text(
        'schema = 1\n[model]\nbuilder = "net.py:build"\n[[model.inputs]]\nname = "x"\nshape = [1, 4]\n'
    )
    assert cli.main(["run", "recipe.toml", "--output", "m.tflite"]) == 2
    assert "add the stages export_onnx and to_tflite" in capsys.readouterr().err
    assert not (folder / ".edgepipe").exists()


@pytest.mark.parametrize(
    "name", ["mein Modell", "für", 'a"b', "a\\b", "..x", "模型", "t" * 150, "ok"]
)
def test_init_writes_a_recipe_that_check_accepts_in_any_folder(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).mkdir()
    (folder / "model.tflite").rename(folder / name / f"{name}.tflite")
    (folder / "data.npz").rename(folder / name / f"{name}.npz")
    arguments = ["init", f"{name}/{name}.tflite", "--data", f"{name}/{name}.npz"]
    assert cli.main([*arguments, "--output", f"{name}/recipe.toml"]) == 0
    assert cli.main(["check", f"{name}/recipe.toml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "random"], "not for 'random'"),
        (["--data", "images.toml"], "not for 'images.toml'"),
        (["--weights", "data.npz"], "weights belong to a builder"),
        (["--input", "x=0x4"], "should begin with the batch"),
    ],
)
def test_init_leaves_nothing_out_silently(
    folder: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images.toml").write_text('kind = "images"\npath = "."\n[image]\nsize = [4, 4]\n')
    assert cli.main(["init", "model.tflite", "--output", "new.toml", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (folder / "new.toml").exists()
