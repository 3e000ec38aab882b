"""Training: repeatable, honest about its progress, and nothing kept when it goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgepipe.errors import DataError, NotReadyError, StageError, StageOptionError
from edgepipe.torch_ops import train as training
from edgepipe.torch_ops.augment import view
from edgepipe.torch_ops.model import read_weights
from edgepipe.torch_ops.train import ArraySet, Epoch, train
from edgepipe.training import Augmentation, TrainingOptions

pytestmark = pytest.mark.slow  # trainings: not for the inner loop

OPTIONS: dict[str, Any] = {"epochs": 4, "batch_size": 16, "lr": 0.02, "weight_decay": 0.0}


def run(
    model: nn.Module, data: tuple[list[np.ndarray], np.ndarray], *, seed: int = 0,
    validation: tuple[list[np.ndarray], np.ndarray] | None = None,
    checkpoint: Path | None = None, after_step: Callable[[int, int], None] | None = None, **options: Any,
) -> list[Epoch]:  # fmt: skip
    held_out = ArraySet(*validation) if validation else None
    named = {"validation": "held out"} if validation else {}
    return train(
        model, ArraySet(*data), TrainingOptions(**{**OPTIONS, **named, **options}), seed=seed, stage="finetune",
        validation=held_out, checkpoint=checkpoint, after_step=after_step,
    )  # fmt: skip


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)
        )


def quadrants(count: int, *, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Points, and whether their coordinates have the same sign (XOR): [(N, 2) float32], (N,)."""
    points = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
    return [points], (points[:, 0] * points[:, 1] > 0).astype(np.int64)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_learns_what_a_linear_model_cannot(optimizer: str) -> None:
    model = net()
    history = run(
        model, quadrants(321, seed=0), epochs=20, optimizer=optimizer, validation=quadrants(200, seed=1)
    )  # fmt: skip
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.85  # a linear model gets half of them
    assert history[-1].loss < history[0].loss
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    results = []
    for seed in (5, 5, 6):
        model = net()
        torch.rand(seed)  # what ran before must not matter
        run(model, quadrants(100, seed=0), seed=seed)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert not torch.equal(results[0]["0.weight"], results[2]["0.weight"])


FULL = {"ema": 0.9, "clip_norm": 1.0, "warmup": 0.5, "augment": Augmentation(noise=0.1, mixup=0.3)}


@pytest.mark.parametrize("stop", [1, 7, 14, 20, 27])
def test_training_that_was_killed_goes_on_to_the_very_same_weights(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, validation = quadrants(101, seed=0), quadrants(50, seed=1)
    options = {**FULL, "early_stop": 3, "checkpoint_every": 1e-9}
    whole, stopped = net(), net()
    expected = run(whole, data, validation=validation, **options)

    def kill(step: int, total: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, data, validation=validation, checkpoint=tmp_path / "c", after_step=kill, **options)  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    fresh = net()
    history = run(fresh, data, validation=validation, checkpoint=tmp_path / "c", **options)
    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values(), strict=True))  # fmt: skip


def test_a_checkpoint_of_another_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = quadrants(64, seed=0)
    run(net(), data, checkpoint=tmp_path / "c", checkpoint_every=1e-9)
    with pytest.raises(StageError, match="cannot go on from checkpoint") as caught:
        run(nn.Linear(2, 2), data, checkpoint=tmp_path / "c")
    assert str(tmp_path / "c") in caught.value.hint


def test_a_moving_average_of_the_weights_is_what_comes_out() -> None:
    seen: list[torch.Tensor] = []
    model = nn.Linear(2, 2)
    start = model.weight.detach().clone()
    run(
        model, quadrants(64, seed=0), epochs=1, ema=0.5,
        after_step=lambda step, total: seen.append(model.weight.detach().clone()),
    )  # fmt: skip
    expected = start
    for n, weight in enumerate(seen):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), expected)
    assert not torch.equal(model.weight, seen[-1])


def test_early_stop_keeps_the_best_epoch() -> None:
    validation = quadrants(200, seed=1)
    model = net()
    history = run(model, quadrants(64, seed=0), epochs=60, lr=0.3, validation=validation, early_stop=2)  # fmt: skip
    scores = [e.validation_accuracy or 0.0 for e in history]
    assert len(history) < 60
    assert max(scores) > scores[-1] or scores[-1] == scores[-3]
    assert training.accuracy(model, ArraySet(*validation)) == pytest.approx(max(scores))


def test_the_learning_rate_is_warmed_up_and_then_lowered_to_nothing() -> None:
    history = run(net(), quadrants(64, seed=0), epochs=8, warmup=2.0, lr=0.01)
    rates = [e.lr for e in history]
    assert rates[0] < rates[1] <= 0.01
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.001


def test_a_clipped_gradient_moves_the_weights_by_at_most_its_norm() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    inputs, labels = quadrants(16, seed=0)
    run(model, ([1000 * inputs[0]], labels), epochs=1, optimizer="sgd", lr=1.0, clip_norm=0.01)
    # one step of Nesterov momentum 0.9 on a gradient g is 1.9 g
    assert 0 < (model.weight.detach() - before).norm() < 0.02


def test_a_view_shows_a_sample_the_same_way_whatever_its_batch() -> None:
    options = Augmentation(flip=True, shift=2, mask_time=3, mask_frequency=2, noise=0.1)
    images = torch.randn(40, 2, 8, 9)
    seen = view(options, 40, seed=3, number=1)
    assert seen is not None
    whole = seen.apply([images], torch.arange(40))[0]
    rows = torch.tensor([17, 3, 39])
    torch.testing.assert_close(seen.apply([images[rows]], rows)[0], whole[rows])
    other = view(options, 40, seed=3, number=2)
    assert other is not None
    assert not torch.equal(other.apply([images], torch.arange(40))[0], whole)


def test_a_shift_moves_a_picture_and_repeats_its_edge() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    seen = view(Augmentation(shift=2), 1, seed=0, number=1)
    assert seen is not None
    down, right = seen.shift[0].tolist()
    assert (down, right) != (0, 0)
    rows = [min(max(i - down, 0), 2) for i in range(3)]
    columns = [min(max(j - right, 0), 3) for j in range(4)]
    found = seen.apply([image], torch.tensor([0]))[0][0, 0]
    assert torch.equal(found, image[0, 0][rows][:, columns])


def test_masks_blank_whole_stripes_with_the_mean() -> None:
    picture = torch.randn(200, 1, 10, 8)
    seen = view(Augmentation(mask_time=4), 200, seed=0, number=1)
    assert seen is not None
    changed = (seen.apply([picture], torch.arange(200))[0] != picture).any(dim=3)[:, 0]  # (200, 10)
    widths = changed.sum(1)
    assert set(widths.tolist()) == {0, 1, 2, 3, 4}
    for row in changed:  # one stripe, without gaps
        at = row.nonzero()[:, 0]
        assert len(at) == 0 or int(at.max() - at.min()) + 1 == len(at)


def test_images_are_needed_for_what_moves_pixels() -> None:
    with pytest.raises(StageOptionError, match="take inputs"):
        run(net(), quadrants(64, seed=0), augment=Augmentation(flip=True))


def test_mixup_still_learns() -> None:
    history = run(net(), quadrants(321, seed=0), epochs=20, augment=Augmentation(mixup=0.2), validation=quadrants(200, seed=1))  # fmt: skip
    assert (history[-1].validation_accuracy or 0) > 0.8


def test_a_demanded_gpu_that_is_missing_is_not_replaced() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(NotReadyError, match="no GPU"):
        run(net(), quadrants(64, seed=0), device="cuda")


def test_a_last_batch_of_one_sample_does_not_break_batch_norm() -> None:
    run(net(), quadrants(33, seed=0), epochs=1)


def test_a_diverging_loss_is_a_stage_error_that_says_where() -> None:
    inputs, labels = quadrants(64, seed=0)
    inputs[0][:] *= 1e30
    with pytest.raises(StageError, match=r"the loss became (nan|inf) in epoch \d, batch \d") as caught:  # fmt: skip
        run(nn.Linear(2, 2), (inputs, labels), optimizer="sgd", lr=1e20)
    assert caught.value.code == "diverged"
    assert "lower lr" in caught.value.hint


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.full(64, 2), "labels run from 2 to 2, but the model has 2 classes"),
        (np.full(64, -1), "labels run from -1"),
        (np.zeros(64), "class numbers"),
        (np.zeros((64, 3), np.int64), "class numbers"),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_refused(labels: np.ndarray, told: str) -> None:
    with pytest.raises(DataError, match=told):
        run(net(), (quadrants(64, seed=0)[0], labels))


def test_a_model_with_two_outputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(StageError, match="2 outputs"):
        run(Two(), quadrants(64, seed=0))


def test_a_pixelwise_classifier_is_trained_on_label_maps() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(40, 1, 6, 6)).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(1, 2, 1)
    history = run(model, ([images], (images[:, 0] > 0).astype(np.int64)), lr=0.3)
    assert history[-1].accuracy > 0.9


def test_progress_names_epoch_loss_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, logger="edgepipe"):
        run(net(), quadrants(64, seed=0), validation=quadrants(20, seed=1))
    assert len(caplog.messages) == 4 * 4  # every batch but the last of an epoch, and every epoch
    assert caplog.messages[0].startswith("epoch 1/4, 25 %: loss ")
    assert "validation" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("s left")


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"lr": 0.0}, {"ema": 1.0}, {"early_stop": 2}, {"warmup": 9.0}, {"clip_norm": -1.0}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StageOptionError, match=next(iter(wrong))):
        TrainingOptions(**{**OPTIONS, **wrong})


def test_training_that_diverges_keeps_the_weights_of_the_last_whole_epoch(tmp_path: Path) -> None:
    model, seen = nn.Linear(2, 2), {}

    def poison(step: int, total: int) -> None:
        if step == 7:  # the last of the second epoch: 4 batches each
            seen.update({k: v.clone() for k, v in model.state_dict().items()})
        if step == 9:
            model.weight.data.fill_(torch.nan)

    with pytest.raises(StageError, match=r"nan in epoch 3, batch 3 of 4; .* after epoch 2 are kept in") as caught:  # fmt: skip
        run(model, quadrants(64, seed=0), checkpoint=tmp_path / "c", after_step=poison, checkpoint_every=1e-9)  # fmt: skip
    assert caught.value.code == "diverged"
    kept = read_weights(tmp_path / "c-last-good.pth")
    assert kept.keys() == seen.keys()
    assert all(torch.equal(kept[name], seen[name]) for name in kept)
    # nothing is saved that training could not go on from
    state = torch.load(tmp_path / "c", weights_only=True)
    assert all(v.isfinite().all() for v in state["model"].values())


def test_weights_that_become_nan_in_the_very_last_batch_are_no_result() -> None:
    model = nn.Linear(2, 2)

    def poison(step: int, total: int) -> None:
        if step == total - 1:
            model.weight.data.fill_(torch.nan)

    with pytest.raises(StageError, match="in the last batch of epoch 4; nothing of this stage was kept"):  # fmt: skip
        run(model, quadrants(64, seed=0), after_step=poison)
