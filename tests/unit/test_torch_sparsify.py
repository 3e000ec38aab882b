"""Sparsity: which weights go, on which schedule, and that they never come back."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.stages.sparsify import Sparsify
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import model_specs
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.sparsify import (
    SparsePlan,
    cut_weights,
    gradually,
    plan_sparsity,
    scheduled_sparsity,
    zero_shares,
)
from edgepipe.torch_ops.tflite_module import TfliteModule
from edgepipe.torch_ops.train import ArraySet, train
from edgepipe.training import TrainingOptions

from .tflite_builder import Graph

pytestmark = pytest.mark.slow  # trainings: not for the inner loop


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(6, 3),
        ).eval()  # fmt: skip


INPUT = [torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))]


def plan(*layers: str, pattern: str = "unstructured") -> SparsePlan:
    return SparsePlan(layers, pattern, {})


@settings(max_examples=40, deadline=None)
@given(
    wide=st.integers(1, 6), blocks=st.integers(1, 3), kernel=st.integers(1, 3),
    pattern=st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 8)]), transposed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_n_of_m_leaves_the_largest_of_each_group_along_the_input_channels(
    wide: int, blocks: int, kernel: int, pattern: tuple[int, int], transposed: bool, seed: int
) -> None:
    kept, block = pattern
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(make(blocks * block, wide, kernel))
    weight = model[0].weight
    with torch.no_grad():
        # few distinct values: ties must not leave more or less than N
        drawn = np.random.default_rng(seed).integers(1, 6, tuple(weight.shape))
        weight.copy_(torch.from_numpy(drawn))
    before = weight.detach().clone()
    cut_weights(model, plan("0", pattern=f"{kept}:{block}"), 1 - kept / block)
    axis = 0 if transposed else 1
    was, now = (np.moveaxis(t.detach().numpy(), axis, -1).reshape(-1, block) for t in (before, weight))  # fmt: skip
    assert ((now != 0).sum(1) == kept).all()
    assert (now[now != 0] == was[now != 0]).all()
    np.testing.assert_array_equal(np.sort(now, 1)[:, -kept:], np.sort(was, 1)[:, -kept:])


@settings(max_examples=30, deadline=None)
@given(sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_unstructured_cuts_the_smallest_weights_of_each_layer(sparsity: float, seed: int) -> None:
    model = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 5))
    before = copy.deepcopy(model)
    cut_weights(model, plan("0", "1"), sparsity)
    for name in ("0.weight", "1.weight"):
        was, now = before.get_parameter(name).abs(), model.get_parameter(name).abs()
        assert (now == 0).sum() == int(sparsity * was.numel())
        left = now[now != 0]
        assert was[now == 0].numel() == 0 or was[now == 0].max() <= left.min()


def test_global_ranking_takes_more_from_the_layer_with_small_weights() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.mul_(0.1)
    flat = torch.cat([model[0].weight, model[1].weight]).detach().abs().flatten()
    cut_weights(model, plan("0", "1"), 0.4, ranking="global")
    shares = zero_shares(model, ("0", "1"))
    assert shares["0"] > 0.6 > 0.2 > shares["1"]
    now = torch.cat([model[0].weight, model[1].weight]).detach().abs().flatten()
    assert flat[now == 0].max() <= flat[now != 0].min()


def test_a_share_that_empties_a_layer_is_refused_and_the_layer_named() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
    with pytest.raises(StageError, match="75 % zeros of all layers together leave layer '0' empty"):
        cut_weights(model, plan("0", "1"), 0.75, ranking="global")


def test_the_schedule_is_that_of_zhu_and_gupta() -> None:
    final, begin, end, updates = 0.875, 10, 110, 10
    for step in range(10, 111, 10):  # at each update their equation 1, with delta t = 10 steps
        expected = final + (0 - final) * (1 - (step - begin) / (updates * 10)) ** 3
        found = scheduled_sparsity(step, final=final, begin=begin, end=end, updates=updates)
        assert found == pytest.approx(expected)
    whole = [scheduled_sparsity(s, final=final, begin=begin, end=end, updates=updates) for s in range(130)]  # fmt: skip
    assert whole[9] == 0
    assert whole[110:] == [final] * 20
    assert whole == sorted(whole)
    assert len(set(whole)) == updates + 1


def data(count: int = 120) -> ArraySet:
    drawn = np.random.default_rng(0)
    x = drawn.normal(size=(count, 2, 8, 8)).astype(np.float32)
    return ArraySet([x], (x[:, 0].mean((1, 2)) > 0).astype(np.int64))


OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.01}


@pytest.mark.parametrize("extra", [{}, {"ema": 0.9}, {"optimizer": "sgd", "clip_norm": 1.0}])
def test_zeros_grow_on_the_schedule_and_survive_further_training(extra: dict[str, Any]) -> None:
    model = net()
    chosen = plan_sparsity(model, INPUT, pattern="unstructured")
    apply_edits(model, chosen.edits())
    seen: list[tuple[int, torch.Tensor]] = []
    hook = gradually(model, chosen, final=0.75, ranking="layer", begin=0.0, end=0.75, updates=5)

    def watch(step: int, total: int) -> None:
        hook(step, total)
        seen.append((step, model.get_parameter("4.weight").detach() == 0))

    train(model, data(), TrainingOptions(**OPTIONS, **extra), seed=0, stage="s", after_step=watch)
    assert chosen.layers == ("4", "6")
    assert zero_shares(model, chosen.layers) == pytest.approx({"4": 0.75, "6": 0.75})
    counts = [int(mask.sum()) for _, mask in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) == 6  # none, and five cuts
    assert all((after | ~before).all() for (_, before), (_, after) in itertools.pairwise(seen))
    zeros = {n: model.get_parameter(f"{n}.weight").detach() == 0 for n in ("4", "6")}
    start = model.get_parameter("4.weight").detach().clone()
    train(model, data(), TrainingOptions(**OPTIONS, **extra), seed=1, stage="finetune")
    for name, mask in zeros.items():
        assert torch.equal(model.get_parameter(f"{name}.weight").detach() == 0, mask)
    assert not torch.equal(model.get_parameter("4.weight"), start)


def test_without_the_edit_training_brings_the_zeros_back() -> None:
    model = net()
    cut_weights(model, plan("4"), 0.75)
    train(model, data(), TrainingOptions(**OPTIONS), seed=1, stage="finetune")
    assert zero_shares(model, ("4",))["4"] < 0.3  # those of channels that are never active


@pytest.mark.parametrize("stop", [3, 11, 16, 22])
def test_a_run_that_was_killed_ends_with_the_very_same_zeros(stop: int, tmp_path: Path) -> None:
    options = TrainingOptions(**OPTIONS, ema=0.8, checkpoint_every=1e-9)

    def run(checkpoint: Path | None, kill: int = -1) -> nn.Module:
        model = net()
        chosen = plan_sparsity(model, INPUT, pattern="2:4", ignore=("6",))
        apply_edits(model, chosen.edits())
        hook = gradually(model, chosen, final=0.5, ranking="layer", begin=0.1, end=0.8, updates=6)

        def step(number: int, total: int) -> None:
            hook(number, total)
            if number == kill:
                raise KeyboardInterrupt

        train(model, data(), options, seed=0, stage="s", after_step=step, checkpoint=checkpoint)
        return model

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c", kill=stop)
    again = run(tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))  # fmt: skip
    assert zero_shares(again, ("4",))["4"] == 0.5


def test_ends_and_depthwise_layers_stay_dense_unless_asked_for() -> None:
    found = plan_sparsity(net(), INPUT, pattern="unstructured")
    assert found.layers == ("4", "6")
    assert found.left_dense["0"] == "is the first layer (keep_ends)"
    assert found.left_dense["9"] == "is the last layer (keep_ends)"
    assert "depthwise" in found.left_dense["3"]
    whole = plan_sparsity(net(), INPUT, pattern="unstructured", keep_ends=False, ignore=("6",))
    assert whole.layers == ("0", "4", "9")
    blocked = plan_sparsity(net(), INPUT, pattern="2:4", keep_ends=False)
    assert blocked.layers == ("4", "6")
    assert blocked.left_dense["9"] == "has 6 input channels, no multiple of 4"
    with pytest.raises(StageOptionError, match="'seven' matches no layer"):
        plan_sparsity(net(), INPUT, pattern="unstructured", layers=("seven",))
    with pytest.raises(StageError, match="can be made sparse") as caught:
        plan_sparsity(net(), INPUT, pattern="unstructured", layers=("3",))
    assert caught.value.code == "nothing-to-sparsify"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pattern": "4:2"}, "neither 'unstructured' nor N:M"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"begin": 0.8}, "begin below end"),
        ({"early_stop": 2, "validation": "v"}, "not yet sparse"),
        ({"lr": 0.0}, "lr is above 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(StageOptionError, match=told):
        Sparsify(**options)


def test_one_shot_needs_no_data_and_n_of_m_has_its_own_share() -> None:
    assert Sparsify(epochs=0).data_names() == ()
    assert Sparsify().data_names() == ("train",)
    assert Sparsify(pattern="1:4").final == 0.75
    assert Sparsify(sparsity=0.9).final == 0.9


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"layer": "4", "pattern": "4:4"}, "N below M"),
        ({"layer": "2", "pattern": "2:4"}, "no weight"),
    ],
)
def test_an_edit_that_does_not_fit_is_named(edit: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        apply_edits(net(), [{"edit": "sparse", **edit}])


def test_training_of_the_converted_graph_keeps_the_zeros_and_moves_biases_off_theirs() -> None:
    drawn = np.random.default_rng(0)
    weight = drawn.normal(size=(4, 1, 1, 8)).astype(np.float32)
    weight[:, :, :, ::2] = 0
    g = Graph()
    x = g.input("x", (1, 4, 4, 8))
    y = g.conv(x, weight, np.zeros(4, np.float32), "point", (1, 4, 4, 4))
    axes = g.const("axes", np.array([1, 2], np.int32))
    content = g.bytes([g.op("MEAN", [y, axes], "mean", (1, 4), "ReducerOptions", keepDims=False)])
    specs = model_specs(parse_model(content, where="m"), where="m")
    model = TfliteModule(content, *specs, where="m")
    samples = drawn.normal(size=(64, 4, 4, 8)).astype(np.float32)
    labels = ArraySet([samples], drawn.integers(0, 4, 64))
    train(model, labels, TrainingOptions(**OPTIONS), seed=0, stage="qat")
    after, bias = (p.detach().numpy() for p in model.weights.values())
    assert (after[..., ::2] == 0).all()
    assert (after[..., 1::2] != weight[..., 1::2]).all()
    assert (bias != 0).all()
