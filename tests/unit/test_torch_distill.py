"""Distillation: losses are those of the papers, and a teacher is asked only once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgepipe.distillation import DistillOptions, Feature
from edgepipe.errors import StageError, StageOptionError
from edgepipe.torch_ops import distill as ops
from edgepipe.torch_ops.train import ArraySet, Batch, Epoch
from edgepipe.training import Augmentation

pytestmark = pytest.mark.slow  # trainings: not for the inner loop

OPTIONS: dict[str, Any] = {"student": "ds_cnn", "epochs": 4, "batch_size": 16, "lr": 0.01, "weight_decay": 0.0, "views": 0}  # fmt: skip
scores = st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=6)


def softmax(values: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def divergence(wanted: list[float], own: list[float]) -> float:
    return sum(w * math.log(w / o) for w, o in zip(wanted, own, strict=True))


@settings(deadline=None)
@given(st.data(), scores, st.floats(1, 8))
def test_kd_is_the_divergence_of_softened_probabilities_times_the_square_of_t(
    data: st.DataObject, teacher: list[float], temperature: float
) -> None:
    student = data.draw(st.lists(st.floats(-8, 8, width=32), min_size=len(teacher), max_size=len(teacher)))  # fmt: skip
    expected = temperature**2 * divergence(
        softmax(teacher, temperature), softmax(student, temperature)
    )
    found = ops.kd_loss(torch.tensor([student]), torch.tensor([teacher]), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@settings(deadline=None)
@given(st.data(), scores, st.floats(1, 8))
def test_dkd_tells_the_right_class_from_the_others_and_the_others_from_each_other(
    data: st.DataObject, teacher: list[float], temperature: float
) -> None:
    student = data.draw(st.lists(st.floats(-8, 8, width=32), min_size=len(teacher), max_size=len(teacher)))  # fmt: skip
    target = data.draw(st.integers(0, len(teacher) - 1))
    alpha, beta = 0.5, 3.0
    wanted, own = (softmax(v, temperature) for v in (teacher, student))
    pairs = [[p[target], 1 - p[target]] for p in (wanted, own)]
    rest = [[p[i] / (1 - p[target]) for i in range(len(p)) if i != target] for p in (wanted, own)]
    expected = temperature**2 * (alpha * divergence(*pairs) + beta * divergence(*rest))
    tensors = torch.tensor([student]), torch.tensor([teacher]), torch.tensor([target])
    found = ops.dkd_loss(*tensors, temperature, alpha=alpha, beta=beta)
    assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    # eq. 6 of the paper: with alpha 1 and beta = 1 - p it is what it was decoupled from
    whole = ops.dkd_loss(*tensors, temperature, alpha=1.0, beta=1 - wanted[target])
    assert whole.item() == pytest.approx(ops.kd_loss(*tensors[:2], temperature).item(), abs=1e-3)


def test_dkd_has_a_finite_gradient_for_a_teacher_that_is_sure() -> None:
    student = torch.randn(2, 4, 3, 3, requires_grad=True)
    target = torch.randint(0, 4, (2, 3, 3))
    teacher = 200.0 * nn.functional.one_hot(target, 4).permute(0, 3, 1, 2)
    loss = ops.dkd_loss(student, teacher, target, 1.0, alpha=1.0, beta=8.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_attention_compares_where_maps_are_strong_and_not_how_strong() -> None:
    student, teacher = torch.randn(3, 5, 4, 4), torch.randn(3, 7, 4, 4)
    maps = []
    for x in (student.numpy(), teacher.numpy()):
        flat = (x**2).mean(1).reshape(3, -1)
        maps.append(flat / np.sqrt((flat**2).sum(1, keepdims=True)))
    expected = ((maps[0] - maps[1]) ** 2).mean()
    assert ops.attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert ops.attention_loss(10 * teacher, teacher).item() == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------- whole trainings


class Net(nn.Module):
    def __init__(self, width: int, classes: int = 3, pool: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(pool), nn.Conv2d(width, width, 1), nn.ReLU()
        )  # fmt: skip
        self.head = nn.Linear(width, classes)
        self.samples_seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.samples_seen += len(x)
        return self.head(self.features(x).mean((2, 3)))


def net(width: int, seed: int = 0, **options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(width, **options)


def pictures(count: int = 50, labels: int | None = None) -> ArraySet:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 1, 8, 8)).astype(np.float32)
    x += generator.normal(size=(count, 1, 1, 1)).astype(np.float32) * 2
    y = generator.integers(0, 3, count) if labels is None else np.full(count, labels)
    return ArraySet([x], y)


def run(
    student: nn.Module, *teachers: tuple[nn.Module, float], data: ArraySet | None = None, keep: tuple[Path, ...] = (),
    checkpoint: Path | None = None, **options: Any,
) -> list[Epoch]:  # fmt: skip
    chosen = DistillOptions(**{**OPTIONS, **options})
    return ops.distill(
        student, teachers, data or pictures(), chosen, seed=3, stage="distill", keep=keep, checkpoint=checkpoint
    )  # fmt: skip


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, **tolerance) for a, b in pairs)


def test_a_student_learns_what_the_teacher_says_where_labels_say_nothing() -> None:
    teacher, student, data = net(16), net(4, seed=1), pictures(200, labels=0)
    teacher.head.weight.data *= 20  # opinions that differ from sample to sample
    teacher.head.bias.data -= teacher(data.inputs[0]).mean(0)
    wanted = teacher(data.inputs[0]).argmax(1)
    assert wanted.bincount(minlength=3).max() < 0.9 * len(wanted)
    run(student, (teacher, 1.0), data=data, epochs=12, lr=0.03, soft_weight=1.0, temperature=1.0)
    assert (student(data.inputs[0]).argmax(1) == wanted).float().mean() > 0.9
    run(student, (teacher, 1.0), data=data, epochs=6, lr=0.03, soft_weight=0.0)
    assert (student(data.inputs[0]).argmax(1) == 0).all()


VARIED = Augmentation(flip=True, shift=1, noise=0.2)


@pytest.mark.parametrize(
    ("augment", "views", "passes"), [(Augmentation(), 0, 1), (VARIED, 2, 2), (VARIED, 0, 4)]
)
def test_a_teacher_is_asked_once_for_each_view_and_never_for_a_second_student(
    augment: Augmentation, views: int, passes: int, tmp_path: Path
) -> None:
    options = {"augment": augment, "views": views}
    teacher = net(16)
    first, second, live = net(4), net(4), net(4)
    run(first, (teacher, 1.0), keep=(tmp_path,), **options)
    assert teacher.samples_seen == passes * 50 + 2  # 2 to compare the outputs
    assert len(list(tmp_path.iterdir())) == passes
    teacher.samples_seen = 0
    run(second, (teacher, 1.0), keep=(tmp_path,), **options)
    assert teacher.samples_seen == 2
    assert same(first, second, rtol=0, atol=0)
    # what is kept is what it would have said of the very same variation of each sample
    run(live, (teacher, 1.0), **options)
    assert teacher.samples_seen == 2 + 2 + 4 * 50
    assert same(first, live, rtol=1e-4, atol=1e-5)
    assert not same(first, net(4))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY garbage", None])
def test_kept_answers_that_are_damaged_or_of_other_data_are_asked_for_again(
    content: bytes | None, tmp_path: Path
) -> None:
    teacher, first, second = net(16), net(4), net(4)
    run(first, (teacher, 1.0), keep=(tmp_path,))
    (kept,) = tmp_path.iterdir()
    if content is None:
        np.save(kept, np.zeros((49, 3), np.float32))
    else:
        kept.write_bytes(content)
    teacher.samples_seen = 0
    (tmp_path / f".{kept.name}.{2**30}.part").touch()  # of a process that was killed
    run(second, (teacher, 1.0), keep=(tmp_path,))
    assert teacher.samples_seen == 52
    assert same(first, second, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [kept]


def test_mixed_samples_and_features_are_shown_to_the_teacher_itself(tmp_path: Path) -> None:
    teacher = net(16)
    run(net(4), (teacher, 1.0), keep=(tmp_path,), augment=Augmentation(mixup=0.5), loss="dkd")
    assert teacher.samples_seen == 4 * 50 + 2
    feature = Feature(student="features.3", teacher="features.3")
    run(net(4), (teacher, 1.0), keep=(tmp_path,), features=(feature,))
    assert not list(tmp_path.iterdir())


def test_several_teachers_count_by_their_shares() -> None:
    options = DistillOptions(**{**OPTIONS, "soft_weight": 1.0})
    student = nn.Linear(4, 3)
    target, x, said = torch.tensor([0, 2]), torch.randn(2, 4), torch.randn(2, 2, 3)
    batch = Batch(student, [x], target, torch.arange(2), -1, 0, 10)
    teachers = [(lambda b: said[0], 1.0), (lambda b: said[1], 3.0)]
    loss, output = ops.objective(teachers, options)(batch)
    parts = [ops.kd_loss(output, s, 4.0).item() for s in said]
    assert loss.item() == pytest.approx(parts[0] / 4 + 3 * parts[1] / 4, rel=1e-5)


def test_the_soft_loss_is_warmed_up() -> None:
    options = DistillOptions(**{**OPTIONS, "epochs": 10, "soft_weight": 0.9, "soft_warmup": 1.0})
    shares = [ops.soft_weight_at(step, 1000, options) for step in (0, 50, 100, 999)]
    assert shares == pytest.approx([0, 0.45, 0.9, 0.9])
    at_once = dataclasses.replace(options, soft_warmup=0.0)
    assert ops.soft_weight_at(0, 1000, at_once) == 0.9


@pytest.mark.parametrize("loss", ["hint", "attention"])
def test_features_of_the_student_come_closer_to_those_of_the_teacher(loss: Any) -> None:
    # maps of 8x8 and of 4x4, 4 and 16 channels
    teacher, student, data = net(16), net(4, seed=1, pool=2), pictures(100)
    feature = Feature(student="features.3", teacher="features.0", loss=loss, weight=10.0)
    inputs = data.inputs

    def distance() -> float:
        features = ops.Features((feature,), student, teacher, inputs, seed=0)
        try:
            # the projection is thrown away: the best linear one there is
            own, wanted = (x.detach() for x in features._pair(feature))
            if loss == "attention":
                return ops.attention_loss(own, wanted).item()
            rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in (own, wanted)]
            rows[0] = torch.cat([rows[0], torch.ones(len(rows[0]), 1)], 1)
            fitted = rows[0] @ torch.linalg.lstsq(rows[0], rows[1]).solution
            return (fitted - rows[1]).pow(2).mean().item()
        finally:
            features.remove()

    before, names = distance(), list(student.state_dict())
    run(student, (teacher, 1.0), data=data, epochs=15, soft_weight=0.0, features=(feature,))
    assert distance() < 0.8 * before
    assert list(student.state_dict()) == names  # nothing of the projection is left
    assert not any(m._forward_hooks for n in (student, teacher) for m in n.modules())


def test_distillation_that_was_killed_goes_on_to_the_very_same_weights(tmp_path: Path) -> None:
    options = {
        "features": (Feature(student="features.3", teacher="features.3"),),
        "augment": VARIED, "views": 3, "soft_warmup": 2.0, "checkpoint_every": 1e-9, "loss": "dkd",
    }  # fmt: skip
    teacher, whole, stopped, fresh = net(16), net(4), net(4), net(4)
    expected = run(whole, (teacher, 1.0), **options)

    class Killed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.samples_seen > 100:
                raise KeyboardInterrupt
            return super().forward(x)

    dying = Killed(16)
    dying.load_state_dict(teacher.state_dict())
    with pytest.raises(KeyboardInterrupt):
        run(stopped, (dying, 1.0), checkpoint=tmp_path / "c", **options)
    assert not any(m._forward_hooks for m in stopped.modules())
    assert run(fresh, (teacher, 1.0), checkpoint=tmp_path / "c", **options) == expected
    assert same(whole, fresh, rtol=0, atol=0)


# ---------------------------------------------------------------------------------- bad requests


def test_a_teacher_and_a_student_with_different_outputs_are_refused_with_both_shapes() -> None:
    with pytest.raises(StageError, match=r"student gives \(2, 3\) and the teacher gives \(2, 5\)"):
        run(net(4), (net(16, classes=5), 1.0))


def test_a_teacher_that_cannot_take_the_data_is_refused() -> None:
    with pytest.raises(StageError, match="teacher cannot take the data"):
        run(net(4), (nn.Linear(7, 3), 1.0))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature(student="feature.3", teacher="features.3"), r"student has no module 'feature\.3'.*'features\.3'"),
        (Feature(student="features.3", teacher="neck"), "teacher has no module 'neck'"),
        (Feature(student="head", teacher="features.3"), r"head gives \(2, 3\)"),
        (Feature(student="head", teacher="head", loss="attention"), "attention needs maps"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit_are_refused_before_training(
    feature: Feature, message: str
) -> None:
    student = net(4)
    with pytest.raises(StageOptionError, match=message):
        run(student, (net(16), 1.0), features=(feature,))
    assert not any(m._forward_hooks for m in student.modules())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_maps_of_any_two_sizes_can_be_compared(channels: int, own: int, wanted: int) -> None:
    student, teacher = nn.AdaptiveAvgPool2d(own), nn.Sequential(nn.Conv2d(channels, 3, 1), nn.AdaptiveAvgPool2d(wanted))  # fmt: skip
    feature = Feature(student="", teacher="")
    features = ops.Features((feature,), student, teacher, [torch.randn(2, channels, 7, 7)], seed=0)
    assert features().item() > 0
