"""`finetune` with `trainer`: a training loop of the user's own, and what may come back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import DataError, EdgepipeError, RecipeError, StageError
from edgepipe.pipeline import convert
from edgepipe.recipe import load_recipe
from edgepipe.stage import StageContext
from edgepipe.stages.finetune import Finetune
from edgepipe.store import Store
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.model import ModelDescription, build_model, load_model, save_model
from edgepipe.torch_ops.train import ArraySet
from edgepipe.torch_ops.trainer import train_by_function
from edgepipe.training import TrainingOptions

pytestmark = pytest.mark.slow  # trainings: not for the inner loop

BUILDER = "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2))\n"
TRAINER = """\
import torch
import helper
def fit(model, train_set, validation_set, options, seed):
    assert model.training and len(train_set) == 200
    method = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    for epoch in range(options.epochs):
        for rows in torch.randperm(len(train_set)).split(options.batch_size):
            (points,), labels = train_set.batch(rows)
            method.zero_grad()
            helper.loss(model(points), labels).backward()
            method.step()
"""
HELPER = "from torch.nn.functional import cross_entropy as loss\n"
RECIPE = """\
schema = 1
name = "own"
[model]
builder = "net.py:build"
[[model.inputs]]
name = "x"
shape = [1, 2]
[data.train]
kind = "npz"
path = "data.npz"
labels = "y"
[[stages]]
stage = "finetune"
trainer = "own.py:fit"
lr = 0.05
epochs = 20
batch_size = 16
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    points = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    labels = (points[:, 0] * points[:, 1] > 0).astype(np.int64)
    np.savez(tmp_path / "data.npz", x=points, y=labels)
    files = {"net.py": BUILDER, "own.py": TRAINER, "helper.py": HELPER, "recipe.toml": RECIPE}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def train_with(root: Path, body: str, *, model: nn.Module | None = None) -> nn.Module:
    """Train by a function of this body; XOR of two signs, as everywhere here."""
    (root / "other.py").write_text(
        "import torch\nfrom torch import nn\ndef fit(model, train_set, validation_set, options, seed):\n    "
        + body.replace("\n", "\n    ")
    )
    arrays = np.load(root / "data.npz")
    model = model or build_model(ModelDescription("net.py:build", root=root)).eval()
    return train_by_function(
        "other.py:fit", model, ArraySet([arrays["x"]], arrays["y"]), None, TrainingOptions(),
        seed=0, stage="finetune", root=root,
    )  # fmt: skip


def test_a_recipe_may_train_with_a_function_of_its_own(root: Path) -> None:
    recipe, store = load_recipe(root / "recipe.toml"), Store(root / "store")
    made = convert(recipe, store)
    arrays = np.load(root / "data.npz")
    with torch.no_grad():
        answers = load_model(made.path)(torch.from_numpy(arrays["x"])).argmax(1).numpy()
    assert (answers == arrays["y"]).mean() > 0.85  # a linear model gets half of them
    assert made.facts["trainer"] == "own.py:fit"
    # the seed decides what is random in it, whatever was drawn before
    torch.rand(3)
    assert convert(recipe, Store(root / "again")).sha256 == made.sha256


@pytest.mark.parametrize(("file", "change", "again"), [("own.py", "# nothing\n", True), ("helper.py", "# nothing\n", True), ("unrelated.py", "", False)])  # fmt: skip
def test_the_source_of_the_function_and_of_what_it_imports_is_part_of_the_key(
    root: Path, file: str, change: str, again: bool
) -> None:
    store = Store(root / "store")
    convert(load_recipe(root / "recipe.toml"), store)
    before = {p.name for p in (store.root / "cache").iterdir()}
    path = root / file
    path.write_text((path.read_text() if path.exists() else "") + change)
    convert(load_recipe(root / "recipe.toml"), store)
    new = {p.name for p in (store.root / "cache").iterdir()} - before
    assert len(new) == (1 if again else 0)


def test_a_missing_file_is_found_with_the_recipe(root: Path) -> None:
    (root / "own.py").unlink()
    with pytest.raises(RecipeError, match=r"\[\[stages\]\] 1 \(finetune\).*own\.py does not exist"):
        load_recipe(root / "recipe.toml")


def test_the_given_artifact_stays_as_it_was_and_a_returned_module_counts(root: Path) -> None:
    model = build_model(ModelDescription("net.py:build", root=root)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = train_with(root, "import copy\nother = copy.deepcopy(model)\nnn.init.ones_(other[0].weight)\nreturn other", model=model)  # fmt: skip
    assert (trained.get_parameter("0.weight") == 1).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not trained.training


@pytest.mark.parametrize(
    ("body", "kind", "told"),
    [
        ("return model.state_dict()", StageError, "returned a OrderedDict, not the trained module"),
        ("return nn.Sequential(model, nn.ReLU())", StageError, r"another structure: 0\.weight is missing"),
        ("model[3] = nn.Linear(8, 3)", StageError, r"3\.weight is \(3, 8\) instead of \(2, 8\)"),
        ("return nn.Sequential(model[0], nn.Identity(), nn.Tanh(), model[3])", StageError, "computes something else"),
        ("model[0].weight.data[0, 0] = float('inf')", StageError, r"nan or infinite: 0\.weight"),
        ("raise ValueError('no such batch')", DataError, r"ValueError: no such batch \(.*other\.py, line 4"),
        ("return undefined", DataError, "NameError"),
    ],
)  # fmt: skip
def test_what_may_not_come_back_is_refused(
    root: Path, body: str, kind: type[EdgepipeError], told: str
) -> None:
    with pytest.raises(kind, match=told) as caught:
        train_with(root, body)
    assert caught.value.hint


def test_zeros_of_a_sparse_layer_may_not_be_trained_away(root: Path) -> None:
    model = build_model(ModelDescription("net.py:build", root=root)).eval()
    model = apply_edits(model, [{"edit": "sparse", "layer": "0", "pattern": "unstructured"}])
    model.get_parameter("0.weight").data[::2] = 0
    with pytest.raises(StageError, match=r"zeros away.*0\.weight"):
        train_with(root, "model[0].weight.data += 1", model=model)
    kept = train_with(root, "model[0].weight.data *= 2", model=model)
    assert (kept.get_parameter("0.weight")[::2] == 0).all()


def test_options_and_sets_reach_the_function(root: Path) -> None:
    description = ModelDescription("net.py:build", root=root)
    save_model(build_model(description), root / "model", description)
    spec = (TensorSpec("x", (1, 2), "float32"),)
    artifact: Artifact = make_artifact("torch", root / "model", inputs=spec, outputs=spec)
    (root / "asks.py").write_text(
        "def fit(model, train_set, validation_set, options, seed):\n"
        "    assert (options.epochs, seed, len(train_set), len(validation_set)) == (3, 5, 200, 20)\n"
    )
    train = DataSource(kind="npz", path=root / "data.npz", labels="y", root=root)
    held: dict[str, Any] = {"train": train, "held": DataSource(kind="npz", path=root / "data.npz", labels="y", root=root, limit=20)}  # fmt: skip
    work = root / "work"
    work.mkdir()
    context = StageContext(work_dir=work, data=held, seed=5, log_path=root / "log.txt", root=root)
    Finetune(trainer="asks.py:fit", epochs=3, validation="held").run(artifact, context)
