"""Training: repeatable, honest about its progress, and nothing kept when it goes wrong."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgepipe.errors import DataError, StageError
from edgepipe.torch_ops import train as training
from edgepipe.torch_ops.train import train

OPTIONS: dict[str, Any] = {
    "epochs": 4, "batch_size": 16, "optimizer": "adamw", "lr": 0.02, "weight_decay": 0.0,
    "schedule": "cosine", "label_smoothing": 0.0, "seed": 0,
}  # fmt: skip


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
    inputs, labels = quadrants(321, seed=0)
    model = net()
    history = train(
        model, inputs, labels, **{**OPTIONS, "epochs": 20, "optimizer": optimizer},
        validation=quadrants(200, seed=1),
    )  # fmt: skip
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.85  # a linear model gets half of them
    assert history[-1].loss < history[0].loss
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    inputs, labels = quadrants(100, seed=0)
    results = []
    for seed in (5, 5, 6):
        model = net()
        torch.rand(seed)  # what ran before must not matter
        train(model, inputs, labels, **{**OPTIONS, "seed": seed})
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert not torch.equal(results[0]["0.weight"], results[2]["0.weight"])


def test_a_last_batch_of_one_sample_does_not_break_batch_norm() -> None:
    inputs, labels = quadrants(33, seed=0)
    train(net(), inputs, labels, **{**OPTIONS, "epochs": 1})


def test_a_diverging_loss_is_a_stage_error_that_says_where() -> None:
    inputs, labels = quadrants(64, seed=0)
    inputs[0][:] *= 1e30
    with pytest.raises(StageError, match=r"the loss became (nan|inf) in epoch \d, batch \d") as caught:  # fmt: skip
        train(nn.Linear(2, 2), inputs, labels, **{**OPTIONS, "optimizer": "sgd", "lr": 1e20})
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
        train(net(), quadrants(64, seed=0)[0], labels, **OPTIONS)


def test_a_model_with_two_outputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(StageError, match="2 outputs"):
        train(Two(), *quadrants(64, seed=0), **OPTIONS)


def test_a_pixelwise_classifier_is_trained_on_label_maps() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(40, 1, 6, 6)).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(1, 2, 1)
    history = train(model, [images], (images[:, 0] > 0).astype(np.int64), **{**OPTIONS, "lr": 0.3})  # fmt: skip
    assert history[-1].accuracy > 0.9


def test_progress_names_epoch_loss_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, logger="edgepipe"):
        train(net(), *quadrants(64, seed=0), **OPTIONS, validation=quadrants(20, seed=1))
    assert len(caplog.messages) == 4 * 4  # every batch but the last of an epoch, and every epoch
    assert caplog.messages[0].startswith("epoch 1/4, 25 %: loss ")
    assert "validation" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("s left")
