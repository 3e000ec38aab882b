"""What a change to a recipe, or to a file it names, makes run again: all of that and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe import cli, pipeline
from edgepipe.artifact import make_artifact
from edgepipe.tflite_ops.tiny import tiny_tflite

pytestmark = pytest.mark.slow  # real processes and runs: not for the inner loop

RECIPE = """\
schema = 1
name = "small"
[model]
builder = "net.py:build"
args = { config = "net.json" }
weights = "net.safetensors"
[[model.inputs]]
name = "x"
shape = [1, 4]
[data.test]
kind = "python"
function = "data.py:load"
args = { files = ["x.npy"], more = { labels = "labels.npy" } }
[evaluate]
data = "test"
metric = "metric.py:score"
[[gates]]
gate = "size"
max = "1 MB"
"""
FILES = {
    "net.py": "import json\nfrom pathlib import Path\nfrom torch import nn\n"
    "def build(config):\n"
    "    json.loads(Path(config).read_text())\n"
    "    return nn.Linear(4, 4, bias=False)\n",
    "net.json": '{"a": 1}',
    "data.py": "import numpy as np\nimport helper\nfrom pathlib import Path\n"
    "def load(files, more):\n"
    "    return helper.same(np.load(files[0])), np.load(more['labels'])\n",
    "helper.py": "import deeper\ndef same(x): return x * deeper.ONE\n",
    "deeper.py": "ONE = 1\n",
    "metric.py": "import own_scores\ndef score(outputs, labels): return own_scores.top1(*outputs.values(), labels)\n",
    "own_scores.py": "def top1(output, labels): return float((output.argmax(1) == labels).mean())\n",
    "unrelated.py": "",
}  # fmt: skip

Runner = Callable[[], dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a folder with a space and letters beyond ASCII."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "mein Modell für ein Gerät"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "labels.npy", x.argmax(1))
    save_file({"weight": torch.eye(4)}, str(folder / "net.safetensors"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    def run() -> dict[str, Any]:
        for cached in list(folder.rglob("__pycache__")):
            shutil.rmtree(cached)  # an edit of the same length within a second would go unseen
        for name, module in list(sys.modules.items()):  # each run of edgepipe is a new process
            if str(folder) in (getattr(module, "__file__", None) or ""):
                del sys.modules[name]
        assert cli.main(["run", "recipe.toml", "--json", "--quiet"]) == 0
        found = json.loads(capsys.readouterr().out)
        found["again"] = [s["step"] for s in found["steps"] if not s["cached"]]
        return dict(found)

    return run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "again"),
    [
        ("unrelated.py", "", "x = 1", []),
        ("recipe.toml", "1 MB", "2 MB", []),
        ("recipe.toml", "[evaluate]", '[measure]\nmax_age = "1 h"\n[evaluate]', []),
        ("recipe.toml", "metric.py:score", "top1", ["evaluate"]),
        ("recipe.toml", 'kind = "python"', 'kind = "python"\nlimit = 5', ["evaluate"]),
        ("data.py", "helper.same(", "2 * helper.same(", ["evaluate"]),
        ("helper.py", "x *", "3 * x *", ["evaluate"]),
        ("deeper.py", "1", "2", ["evaluate"]),
        ("metric.py", "return ", "return 0 * ", ["evaluate"]),
        ("own_scores.py", "== labels", "!= labels", ["evaluate"]),
        ("net.py", "nn.Linear", "nn. Linear", ["load", "evaluate"]),
        ("net.json", "1", "2", ["load"]),
        ("recipe.toml", 'name = "small"', 'name = "small"\nseed = 1', ["load"]),
        ("recipe.toml", "shape = [1, 4]", 'shape = [1, 4]\nlayout = "NT"', ["load", "evaluate"]),
    ],
)
def test_a_change_runs_again_what_depends_on_it(
    folder: Path, run: Runner, name: str, old: str, new: str, again: list[str]
) -> None:
    assert run()["again"] == ["load", "evaluate"]
    assert run()["again"] == []
    edit(folder / name, old, new)
    assert run()["again"] == again
    assert run()["again"] == []


def test_new_content_of_data_and_weights_is_seen(folder: Path, run: Runner) -> None:
    import torch
    from safetensors.torch import save_file

    run()
    np.save(folder / "labels.npy", np.zeros(40, np.int64))
    assert run()["again"] == ["evaluate"]
    save_file({"weight": -torch.eye(4)}, str(folder / "net.safetensors"))
    assert run()["again"] == ["load", "evaluate"]


def task_metric(store: Path, run_id: str) -> float:
    path = store / "runs" / run_id / "measurements" / "model" / "task_metric.json"
    return float(json.loads(path.read_text())["samples"][0][0])


def test_an_installed_builder_that_computes_something_else_is_evaluated_again(
    folder: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folder / "site" / "zoo_of_test_cache"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("from .net import build\n")
    source = (
        "from torch import nn\nclass Net(nn.Linear):\n"
        "    def forward(self, x): return SIGN * super().forward(x)\n"
        "def build(): return Net(4, 4, bias=False)\n"
    )
    (package / "inner" / "net.py").write_text("SIGN = 1\n" + source)
    monkeypatch.syspath_prepend(str(folder / "site"))
    edit(folder / "recipe.toml", '"net.py:build"\nargs = { config = "net.json" }', '"zoo_of_test_cache.inner:build"')  # fmt: skip
    first = run()
    (package / "inner" / "net.py").write_text("SIGN = -1\n" + source)
    second = run()
    # weights and model.json are the same, so the artifact has the same hash: the code has not
    assert second["sha256"] == first["sha256"]
    assert second["again"] == ["load", "evaluate"]
    store = folder / ".edgepipe"
    assert task_metric(store, first["run"]) == 1.0
    assert task_metric(store, second["run"]) < 1.0


def test_a_data_folder_that_holds_the_store_keeps_its_hash(folder: Path, run: Runner) -> None:
    edit(folder / "recipe.toml", 'files = ["x.npy"]', 'files = ["x.npy", "."]')
    run()
    assert run()["again"] == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "record", "results"])
def test_a_damaged_store_is_made_again_and_never_shipped(
    folder: Path, run: Runner, damage: str
) -> None:
    (folder / "m.tflite").write_bytes(tiny_tflite())
    text = (folder / "recipe.toml").read_text()
    start, end = text.index("builder"), text.index("[data.test]")
    (folder / "recipe.toml").write_text(text[:start] + 'file = "m.tflite"\n' + text[end:])
    first = run()
    model = Path(first["model"])
    again = "load"
    if damage == "truncate":
        model.write_bytes(model.read_bytes()[:-40])
    elif damage == "remove":
        model.unlink()
    elif damage == "record":
        (model.parent / "artifact.json").write_text("{")
    else:
        again = "evaluate"
        (model.parents[1] / first["steps"][1]["key"] / "result.json").write_text("")
    second = run()
    assert second["again"] == [again]
    assert model.read_bytes() == tiny_tflite()
    assert run()["again"] == []


def test_a_builder_that_ends_the_program_is_no_pass(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "net.py", "    return nn.Linear", "    raise SystemExit(0)\n    return nn.Linear")
    assert cli.main(["run", "recipe.toml", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "exit-called"
    assert cli.main(["runs", "--json"]) == 0
    assert [r["status"] for r in json.loads(capsys.readouterr().out)] == ["failed"]


def test_a_run_stored_with_a_gate_that_is_gone_names_it(
    folder: Path, run: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    record = folder / ".edgepipe" / "runs" / run()["run"] / "run.json"
    edit(record, '"gate": "size"', '"gate": "elegance"')
    assert cli.main(["gate"]) == 2
    assert "'gate': 'elegance'" in capsys.readouterr().err


def test_ranges_that_training_learned_decide_what_is_made_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(tiny_tflite())
    model = make_artifact("tflite", tmp_path / "m.tflite", inputs=(), outputs=())
    recipe: Any = None  # asked only for the builder of a torch model
    keys = [
        tuple(pipeline._identity(recipe, dataclasses.replace(model, facts={"learned_ranges": r})))
        for r in ({}, {"y": [0.0, 1.0]}, {"y": [0.0, 2.0]})
    ]
    assert len(set(keys)) == 3
