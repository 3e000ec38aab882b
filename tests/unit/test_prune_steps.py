"""Pruning in several steps, with training between them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgepipe.errors import StageError
from edgepipe.pruning import PruningOptions, PruningTarget
from edgepipe.torch_ops import prune_steps
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.prune_steps import Progress, prune_in_steps
from edgepipe.torch_ops.run import count_macs, same_outputs
from edgepipe.torch_ops.train import ArraySet, accuracy, train
from edgepipe.training import TrainingOptions

pytestmark = pytest.mark.slow  # trainings: not for the inner loop

INPUT = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))]
FINETUNE = TrainingOptions(epochs=2, lr=0.01, batch_size=32)


def make() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(96, 4),
        ).eval()  # fmt: skip


def quarters() -> ArraySet:
    """Pictures with a bright quarter, whose number is the class."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 160)
    images = generator.normal(0, 0.3, (160, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return ArraySet([images], labels)


def macs(model: nn.Module) -> float:
    return float(count_macs(model, INPUT))


def run(model: nn.Module, checkpoint: Path | None = None, **options: Any) -> tuple[nn.Module, Progress]:  # fmt: skip
    chosen = PruningOptions(**{"round_to": 1, **options})
    data = quarters()
    return prune_in_steps(
        model, INPUT, chosen, cost=macs, seed=0, data=data, training=data, checkpoint=checkpoint,
        validation=data if chosen.validation else None,
    )  # fmt: skip


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_steps_end_where_one_step_would(ranking: Any) -> None:
    once, _ = run(make(), ratio=0.5, ranking=ranking)
    model, done = run(make(), ratio=0.5, ranking=ranking, steps=4)
    costs = [step["cost"] for step in done.steps]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4
    assert costs[-1] == macs(model)
    # a channel that is gone changes the importance of others, but not how many are left
    assert sum(now for _, now in done.channels.values()) == 28
    if ranking == "layer":
        assert macs(model) == macs(once)
        assert done.channels == {"0": [32, 16], "4": [24, 12]}
        assert done.notes()["4"] == "24 -> 12 channels"


def test_a_target_is_approached_by_equal_parts() -> None:
    start = macs(make())
    _, done = run(make(), target=PruningTarget(macs=0.4), steps=3)
    assert [s["cost"] / start for s in done.steps] == pytest.approx([0.8, 0.6, 0.4], abs=0.03)
    assert done.steps[-1]["cost"] <= 0.4 * start


def test_steps_too_small_for_rounding_are_passed_over() -> None:
    _, done = run(make(), ratio=0.5, steps=8, round_to=16)
    assert done.channels == {"0": [32, 16], "4": [24, 16]}
    assert any("skipped" in step for step in done.steps)


def test_the_edits_of_all_steps_replay_on_a_fresh_model() -> None:
    model, done = run(make(), ratio=0.5, steps=3, finetune=FINETUNE)
    again = apply_edits(make(), done.edits)
    again.load_state_dict(model.state_dict())
    assert same_outputs(model, again, INPUT)
    assert all(len(step["epochs"]) == 2 for step in done.steps)


def test_training_between_the_steps_saves_the_model() -> None:
    data, model = quarters(), make()
    train(model, data, TrainingOptions(epochs=8, lr=0.01), seed=0, stage="test")
    assert accuracy(model, data) > 0.95
    options = {"ratio": 0.85, "importance": "random", "steps": 2}
    bare, _ = run(model, **options)
    kept, done = run(model, finetune=FINETUNE, validation="test", **options)
    assert accuracy(kept, data) > accuracy(bare, data) + 0.1
    assert done.steps[-1]["score"] == accuracy(kept, data)


def test_it_stops_before_more_than_max_drop_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    data, model = quarters(), make()
    train(model, data, TrainingOptions(epochs=8, lr=0.01), seed=0, stage="test")
    options = {"ratio": 0.94, "importance": "random", "steps": 12, "validation": "test"}
    _, free = run(model, **options)
    drops = [100 * (accuracy(model, data) - s["score"]) for s in free.steps]
    allowed = 5.0
    last = next(i for i, drop in enumerate(drops) if drop > allowed)  # the first that is too much
    assert 0 < last < 11
    with caplog.at_level(logging.INFO):
        stopped, done = run(model, max_drop=allowed, **options)
    assert [s["cost"] for s in done.steps] == [s["cost"] for s in free.steps[:last]]
    assert macs(stopped) == done.steps[-1]["cost"]
    assert accuracy(stopped, data) == done.steps[-1]["score"]
    assert f"step {last + 1} of 12 lost {drops[last]:.2f} points" in done.stopped
    assert "the step before is kept" in caplog.text


def test_a_first_step_that_loses_too_much_is_an_error() -> None:
    data, model = quarters(), make()
    train(model, data, TrainingOptions(epochs=8, lr=0.01), seed=0, stage="test")
    with pytest.raises(StageError, match=r"step 1 of 1 lost \d+\.\d+ points.*nothing can be pruned"):  # fmt: skip
        run(model, ratio=0.95, validation="test", max_drop=1.0)


def test_pruning_that_was_killed_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"ratio": 0.5, "steps": 3, "finetune": FINETUNE, "validation": "test"}
    whole, expected = run(make(), **options)
    checkpoint = tmp_path / "state"
    trained = []

    def killed(*args: Any, **kwargs: Any) -> Any:
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prune_steps, "train", killed)
        run(make(), checkpoint, **options)
    assert checkpoint.exists()
    resumed, done = run(make(), checkpoint, **options)
    assert done == expected
    assert same_outputs(resumed, whole, INPUT)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(StageError, match=r"cannot go on from checkpoint") as caught:
        run(make(), tmp_path / "state", ratio=0.5)
    assert caught.value.hint == f"remove it to prune from the beginning: rm {tmp_path / 'state'}"
