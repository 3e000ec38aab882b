"""The torch side as a recipe uses it: train, prune, train again; and published weights on real sound."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepipe.array_ops.load import load_samples
from edgepipe.array_ops.task_metrics import task_metric
from edgepipe.artifact import Artifact
from edgepipe.predict import predict
from edgepipe.recipe import Recipe, load_recipe
from edgepipe.stage import StageContext
from edgepipe.stages.finetune import Finetune
from edgepipe.stages.load import LoadModel
from edgepipe.stages.prune import Prune

from .conftest import EdgepipeRunner

RECIPES = Path(__file__).parents[2] / "ci/recipes"


def context(recipe: Recipe, folder: Path) -> StageContext:
    folder.mkdir()
    return StageContext(
        work_dir=folder, data=recipe.data, seed=recipe.seed, log_path=folder / "log.txt"
    )


def accuracy(recipe: Recipe, artifact: Artifact) -> float:
    samples = load_samples(recipe.data["test"], artifact.inputs)
    assert samples.labels is not None
    return task_metric("top1", predict(artifact, samples.inputs), samples.labels, root=RECIPES)


@pytest.mark.slow
def test_digits_are_learned_survive_pruning_and_train_the_same_twice(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "digits.toml")
    fresh = LoadModel(recipe.model).run(context(recipe, tmp_path / "fresh"))
    stage = Finetune(epochs=6, lr=0.005, validation="test")
    trained = stage.run(fresh, context(recipe, tmp_path / "trained"))
    again = stage.run(fresh, context(recipe, tmp_path / "again"))
    assert trained.sha256 == again.sha256
    assert accuracy(recipe, fresh) < 0.3 < 0.95 < accuracy(recipe, trained)
    assert trained.facts["epochs"][-1]["validation_accuracy"] == pytest.approx(accuracy(recipe, trained))  # fmt: skip

    pruned = Prune(ratio=0.5).run(trained, context(recipe, tmp_path / "pruned"))
    assert pruned.facts["after"]["macs"] < 0.4 * pruned.facts["before"]["macs"]
    assert pruned.facts["channels"]["features.0.0"] == [32, 16]
    edits = json.loads((pruned.path / "model.json").read_text())["edits"]
    assert {edit["layer"] for edit in edits} >= {"features.0.0", "features.0.1", "features.1.0", "head"}  # fmt: skip

    recovered = Finetune(epochs=4, lr=0.005).run(pruned, context(recipe, tmp_path / "recovered"))
    assert accuracy(recipe, recovered) > 0.95
    assert recovered.parents[:3] == (pruned.sha256, trained.sha256, fresh.sha256)
    # a second pruning adds its edits to those of the first
    twice = Prune(ratio=0.25).run(recovered, context(recipe, tmp_path / "twice"))
    both = json.loads((twice.path / "model.json").read_text())["edits"]
    assert both[: len(edits)] == edits
    assert len(both) > len(edits)


@pytest.mark.data
@pytest.mark.slow
def test_published_keyword_weights_score_what_their_source_says(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPIPE_DATA", str(data_dir))
    recipe = load_recipe(RECIPES / "keyword_spotting.toml")
    model = LoadModel(recipe.model).run(context(recipe, tmp_path / "model"))
    every = dataclasses.replace(recipe.data["test"], not_fold=None)
    recipe = dataclasses.replace(recipe, data={"test": every})
    # 848 of the 1,000 keyword clips; rounding in the front end may move a few
    assert accuracy(recipe, model) == pytest.approx(0.848, abs=0.005)


@pytest.mark.slow
def test_training_that_was_killed_goes_on_where_it_was(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    recipe = project / "recipe.toml"
    text = recipe.read_text().replace("epochs = 3", 'epochs = 150\ncheckpoint_every = "1 ms"')
    recipe.write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "edgepipe", "run", "recipe.toml", "--no-devices"],
        cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = project / ".edgepipe" / "checkpoints"
    try:
        for _ in range(600):
            if folder.is_dir() and any(".part." not in p.name for p in folder.iterdir()):
                break
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    (kept,) = [p for p in folder.iterdir() if ".part." not in p.name]
    done = edgepipe("run", "recipe.toml", "--no-devices")
    assert "going on at epoch" in done.stderr, done.stderr
    assert not kept.exists()
