"""Distillation as a recipe uses it: who teaches, who learns, what is kept and what runs again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from edgepipe import pipeline
from edgepipe.artifact import Artifact
from edgepipe.errors import EdgepipeError, RecipeError, StageError
from edgepipe.recipe import load_recipe
from edgepipe.store import Store

pytestmark = pytest.mark.slow  # real processes and trainings: not for the inner loop

NET = """\
from torch import nn
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)
    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))
def build(width=16, classes=3):
    return Net(width, classes)
"""
RECIPE = """\
schema = 1
[model]
builder = "net.py:build"
[[model.inputs]]
name = "image"
shape = [1, 1, 8, 8]
[data.train]
kind = "npz"
path = "data.npz"
[data.test]
kind = "npz"
path = "data.npz"
limit = 40
[data.other]
kind = "npz"
path = "data.npz"
limit = 40
seed = 1
"""
TRAIN = '[[stages]]\nstage = "finetune"\nepochs = 3\nlr = 0.01\n'
DISTILL = """\
[[stages]]
stage = "distill"
student = "ds_cnn"
args = { width = 0.125, blocks = 1 }
epochs = 3
lr = 0.01
views = 2
augment = { shift = 1 }
validation = "test"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 120)
    images = generator.normal(size=(120, 1, 8, 8)) + labels[:, None, None, None]
    np.savez(tmp_path / "data.npz", image=images.astype(np.float32), labels=labels)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


Runner = Callable[[str], tuple[Artifact, str]]


@pytest.fixture
def run(folder: Path, caplog: pytest.LogCaptureFixture) -> Runner:
    def run(stages: str) -> tuple[Artifact, str]:
        (folder / "recipe.toml").write_text(RECIPE + stages)
        caplog.clear()
        with caplog.at_level(logging.INFO, "edgepipe"):
            made = pipeline.convert(load_recipe(folder / "recipe.toml"), Store(folder / "store"))
        return made, caplog.text

    return run


def test_the_trained_model_teaches_a_student_of_the_zoo_whose_code_is_the_result(
    run: Runner,
) -> None:
    made, _ = run(TRAIN + DISTILL.replace("epochs = 3", "epochs = 10\nbatch_size = 16"))
    saved = json.loads((made.path / "model.json").read_text())
    assert saved["builder"] == "ds_cnn.py:build"
    assert saved["args"] == {"width": 0.125, "blocks": 1, "num_classes": 3, "in_channels": 1, "size": [8, 8]}  # fmt: skip
    assert (made.path / "ds_cnn.py").is_file()
    facts = made.facts
    assert facts["accuracy"] == pytest.approx(facts["epochs"][-1]["validation_accuracy"])
    assert facts["accuracy"] > 0.6
    assert facts["teachers"][0]["accuracy"] > 0.6
    assert facts["after"]["parameters"] == sum(layer["parameters"] for layer in facts["layers"])
    assert facts["before"]["parameters"] == 16 * 9 + 16 + 32 + 16 * 3 + 3  # the teacher's


def test_a_second_student_costs_no_teacher_pass_and_other_data_or_views_do(run: Runner) -> None:
    asked = "asking the teacher about all samples of view"
    _, text = run(TRAIN + DISTILL)
    assert text.count(asked) == 2
    _, text = run(TRAIN + DISTILL.replace("width = 0.125", "width = 0.25"))
    assert text.count(asked) == 0
    _, text = run(TRAIN + DISTILL.replace("shift = 1", "shift = 2"))
    assert text.count(asked) == 2
    _, text = run(TRAIN.replace("0.01", "0.02") + DISTILL)
    assert text.count(asked) == 2
    for name in ("test", "other"):  # as many samples, but others
        _, text = run(f'{TRAIN}{DISTILL}data = "{name}"\n')
        assert text.count(asked) == 2


def test_an_earlier_model_teaches_what_was_cut_from_it(run: Runner) -> None:
    recovered = '[[stages]]\nstage = "distill"\nteachers = [{ stage = 1 }]\nepochs = 1\n'
    cut = '[[stages]]\nstage = "prune"\nratio = 0.5\n'
    made, text = run(TRAIN + cut + recovered)
    assert json.loads((made.path / "model.json").read_text())["edits"]
    assert made.facts["after"] == made.facts["before"]
    assert "asking the teacher about all samples (120)" in text
    # the teacher is part of what decides: trained otherwise, it teaches again
    _, text = run(TRAIN + cut + recovered)
    assert "[4/4] distill: unchanged, kept" in text
    _, text = run(TRAIN + cut + recovered.replace("stage = 1", "stage = 2"))
    assert "asking the teacher" in text


def test_what_an_earlier_teacher_learned_decides_even_where_the_student_does_not_come_from_it(
    run: Runner, folder: Path
) -> None:
    from edgepipe.torch_ops.model import ModelDescription, build_model

    model = build_model(ModelDescription("net.py:build", root=folder), seed=1)
    save_file(model.state_dict(), str(folder / "x.safetensors"))
    small = '[[stages]]\nstage = "distill"\nstudent = "net.py:build"\nargs = { width = 4 }\nepochs = 1\n'
    small += 'teachers = [{ builder = "net.py:build", weights = "x.safetensors" }]\n'
    last = '[[stages]]\nstage = "distill"\nteachers = [{ stage = 1 }]\nepochs = 1\n'
    first, _ = run(TRAIN + small + last)
    second, _ = run(TRAIN.replace("epochs = 3", "epochs = 4") + small + last)
    assert first.parents[0] == second.parents[0]
    assert first.sha256 != second.sha256


def test_teachers_with_weights_and_a_student_of_ones_own(run: Runner, folder: Path) -> None:
    from edgepipe.torch_ops.model import ModelDescription, build_model

    for number in (1, 2):
        model = build_model(ModelDescription("net.py:build", {"width": 24}, root=folder), seed=number)  # fmt: skip
        save_file(model.state_dict(), str(folder / f"{number}.safetensors"))
    teachers = ", ".join(f'{{ builder = "net.py:build", args = {{ width = 24 }}, weights = "{n}.safetensors" }}' for n in (1, 2))  # fmt: skip
    own = '[[stages]]\nstage = "distill"\nstudent = "net.py:build"\nargs = { width = 4 }\nepochs = 1\n'
    made, text = run(f"{own}teachers = [{teachers}]\n")
    assert text.count("asking the teacher about all samples (120)") == 2
    assert json.loads((made.path / "model.json").read_text())["args"] == {"width": 4}
    model.head.weight.data += 1
    save_file(model.state_dict(), str(folder / "2.safetensors"))
    _, text = run(f"{own}teachers = [{teachers}]\n")
    assert text.count("asking the teacher about all samples (120)") == 1


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        (DISTILL, StageError, "the teacher has random weights"),
        (TRAIN + DISTILL.replace("blocks = 1", "num_classes = 5"), StageError, r"student gives \(2, 5\)"),
        (TRAIN + DISTILL.replace("blocks = 1", "layers = 1"), EdgepipeError, "failed with arguments"),
        (TRAIN + DISTILL.replace("ds_cnn", "ds_cmm"), RecipeError, "no student 'ds_cmm'; did you mean 'ds_cnn'"),
        (TRAIN + '[[stages]]\nstage = "distill"\n', RecipeError, "nobody teaches"),
        (TRAIN + DISTILL + "teachers = [{ stage = 2 }]\n", RecipeError, "reads the result of stage 2, which comes no earlier"),
        (TRAIN + DISTILL + "teachers = [{ stage = -1 }]\n", RecipeError, "stage -1, which comes no earlier"),
        (TRAIN + DISTILL + 'teachers = [{ builder = "net.py:build" }]\n', RecipeError, "has no weights"),
        (TRAIN + DISTILL + 'teachers = [{ builder = "net.py:build", weights = "x.pth" }]\n', RecipeError, "x.pth does not exist"),
        (TRAIN + DISTILL + 'teachers = [{ builder = "nett.py:build", weights = "data.npz" }]\n', RecipeError, "nett.py does not exist"),
        (TRAIN + DISTILL + "temperature = 0.0\nsoft_weight = 1.5\n", RecipeError, "temperature is above 0; soft_weight is from 0 to 1"),
        (TRAIN + DISTILL + 'features = [{ student = "features.0", teacher = "features.0", loss = "fitnet" }]\n', RecipeError, "'hint' or 'attention'"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(
    stages: str, error: type[EdgepipeError], message: str, run: Runner
) -> None:
    with pytest.raises(error, match=message):
        run(stages)


def test_a_student_whose_code_was_changed_is_trained_again(run: Runner, folder: Path) -> None:
    (folder / "small.py").write_text(NET)
    own = TRAIN + '[[stages]]\nstage = "distill"\nstudent = "small.py:build"\nargs = { width = 4 }\nepochs = 1\n'  # fmt: skip
    first, _ = run(own)
    (folder / "small.py").write_text(NET.replace("nn.ReLU()", "nn.ReLU6()"))
    second, text = run(own)
    assert "[3/3] distill: done" in text
    assert first.sha256 != second.sha256
