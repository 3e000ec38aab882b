"""Low rank: chains that compute what the layer did, ranks that are found, layers that are better left."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.schema import build
from edgepipe.stages.low_rank import LowRank
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.factors import vbmf_rank
from edgepipe.torch_ops.low_rank import LowRankPlan, Split, apply_low_rank, plan_low_rank
from edgepipe.torch_ops.run import count_macs, same_outputs

pytestmark = pytest.mark.slow  # trainings: not for the inner loop


def seeded(make: Any, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


class Net(nn.Module):
    """A kxk convolution with a batch norm, a depthwise one, a 1x1 with stride, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kxk = nn.Conv2d(8, 24, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.point = nn.Conv2d(24, 32, 1, stride=2)
        self.head = nn.Linear(32, 20)
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y = self.point(self.depthwise(self.norm(self.kxk(x)).relu()).relu())
        return self.head(y.mean((2, 3)))


INPUT = [torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))]


def split(method: str, *ranks: int) -> Split:
    return Split(method, ranks, 0.0, 0, 0)


def factored(layer: nn.Module, x: Tensor, chosen: Split) -> nn.Module:
    model = nn.Sequential(layer).eval()
    return apply_low_rank(model, [x], LowRankPlan({"0": chosen}, {}))


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(["svd", "tucker"]),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
def test_a_convolution_of_full_rank_computes_what_it_did(
    method: str, channels: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: int, bias: bool,
) -> None:  # fmt: skip
    wide, narrow = channels
    kernel = (1, 1) if method == "svd" else kernel
    layer = seeded(
        lambda: nn.Conv2d(narrow, wide, kernel, stride, padding, dilation if max(kernel) > 1 else 1, bias=bias)
    )  # fmt: skip
    x = torch.randn(2, narrow, 9, 8, generator=torch.Generator().manual_seed(1))
    ranks = (min(wide, narrow),) if method == "svd" else (wide, narrow)
    torch.testing.assert_close(factored(layer, x, split(method, *ranks))(x), layer(x), rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("padding", [(1, 0), "same"])
def test_cp_rebuilds_a_kernel_of_low_rank_with_its_strides_and_bias(padding: Any) -> None:
    stride = 1 if padding == "same" else (1, 2)
    layer = seeded(lambda: nn.Conv2d(6, 7, (3, 5), stride, padding))
    drawn = np.random.default_rng(0)
    a, b, c, d = (drawn.normal(size=(n, 2)) for n in (7, 6, 3, 5))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.einsum("or,ir,hr,wr->oihw", a, b, c, d)))  # type: ignore[operator,union-attr]
    x = torch.randn(1, 6, 9, 10)
    chain = factored(layer, x, split("cp", 2))
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-2, atol=1e-2)
    assert [tuple(p.shape) for n, p in chain.named_parameters() if n.endswith("weight")] == [
        (2, 6, 1, 1), (2, 1, 3, 1), (2, 1, 1, 5), (7, 2, 1, 1),
    ]  # fmt: skip


def test_a_linear_layer_on_a_sequence_keeps_its_bias_and_its_best_approximation() -> None:
    layer = seeded(lambda: nn.Linear(12, 10))
    x = torch.randn(2, 5, 12)
    chain = factored(layer, x, split("svd", 4))
    assert chain(x).shape == (2, 5, 10)
    product = (chain.get_parameter("0.1.weight") @ chain.get_parameter("0.0.weight")).detach()
    left, values, right = np.linalg.svd(layer.weight.detach().numpy())  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(product, left[:, :4] * values[:4] @ right[:4], atol=1e-5)
    assert torch.equal(chain.get_parameter("0.1.bias"), layer.get_parameter("bias"))


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 12), tall=st.booleans(), noise=st.floats(0.001, 0.3), seed=st.integers(0, 9))  # fmt: skip
def test_vbmf_finds_the_rank_of_a_noisy_matrix(rank: int, tall: bool, noise: float, seed: int) -> None:  # fmt: skip
    drawn = np.random.default_rng(seed)
    matrix = drawn.normal(size=(40, rank)) @ drawn.normal(size=(rank, 60))
    matrix = matrix + noise * drawn.normal(size=matrix.shape)
    assert vbmf_rank(matrix.T if tall else matrix) == rank


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_vbmf_finds_nothing_in_noise_and_does_not_fall_over_zeros(shape: tuple[int, int]) -> None:
    assert vbmf_rank(np.random.default_rng(0).normal(size=shape)) == 0
    assert vbmf_rank(np.zeros(shape)) == 0
    assert vbmf_rank(np.ones(shape)) == 1
    assert vbmf_rank(np.ones((1, 8))) <= 1


@pytest.mark.parametrize("options", [{"energy": 0.8}, {"share": 0.6}, {"energy": 0.7, "method": "cp"}])  # fmt: skip
def test_the_plan_counts_the_macs_that_torch_counts(options: dict[str, Any]) -> None:
    model = seeded(Net)
    plan = plan_low_rank(model, INPUT, round_to=4, **options)
    assert "kxk" in plan.splits
    after = apply_low_rank(model, INPUT, plan)
    saved = sum(s.was - s.macs for s in plan.splits.values())
    assert count_macs(after, INPUT) == count_macs(model, INPUT) - saved < count_macs(model, INPUT)
    if "share" in options:
        assert count_macs(after, INPUT) <= 0.6 * count_macs(model, INPUT)
    else:
        assert all(s.energy >= options["energy"] - 1e-9 for s in plan.splits.values())


def test_a_kernel_loses_the_share_of_its_norm_that_the_plan_says() -> None:
    layer = nn.Conv2d(16, 24, 3, bias=False)
    x = torch.randn(1, 16, 6, 6)
    plan = plan_low_rank(nn.Sequential(layer), [x], energy=0.7, round_to=1)
    factors = apply_low_rank(nn.Sequential(layer), [x], plan)
    # an impulse in each input channel reads the kernel off
    impulse = torch.zeros(16, 16, 5, 5)
    impulse[range(16), range(16), 2, 2] = 1
    lost = (factors(impulse) - layer(impulse)).square().sum() / layer(impulse).square().sum()
    assert 1 - lost.item() == pytest.approx(plan.splits["0"].energy, abs=1e-5)
    assert plan.splits["0"].energy >= 0.7


def test_edits_replayed_on_a_fresh_model_give_the_factored_model_bit_for_bit() -> None:
    model = seeded(Net)
    plan = plan_low_rank(model, INPUT, energy=0.8, round_to=4)
    after = apply_low_rank(model, INPUT, plan)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = apply_edits(seeded(Net, seed=1), plan.edits())
    assert torch.equal(torch.get_rng_state(), state), "building draws no random number of ours"
    again.load_state_dict(after.state_dict(), strict=True)
    assert same_outputs(after, again.eval(), INPUT)


def test_channels_that_the_batch_norm_silences_do_not_count() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))

    model = seeded(make)
    drawn = np.random.default_rng(0)
    weight = drawn.normal(size=(32, 4)) @ drawn.normal(size=(4, 32))
    weight[16:] = 10 * drawn.normal(size=(16, 32))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(weight).reshape(32, 32, 1, 1))  # type: ignore[index]
        model[1].weight[16:] = 1e-4  # type: ignore[index]
    x = torch.randn(1, 32, 5, 5)
    plan = plan_low_rank(model, [x], energy=0.99, round_to=4)
    assert plan.splits["0"].ranks == (4,)
    after = apply_low_rank(model, [x], plan)
    assert (after(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_with_samples_it_is_the_answers_to_them_that_are_kept() -> None:
    layer = seeded(lambda: nn.Conv2d(32, 32, 1))
    basis = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    samples = torch.einsum("nkhw,kc->nchw", torch.randn(40, 4, 5, 5), basis)
    x = [torch.randn(1, 32, 5, 5)]
    model = nn.Sequential(layer).eval()
    plan = plan_low_rank(model, x, energy=0.99, round_to=4, samples=[samples.numpy()])
    assert plan.splits["0"].ranks == (4,)
    after = apply_low_rank(model, x, plan, samples=[samples.numpy()])
    torch.testing.assert_close(after(samples), layer(samples), rtol=0.05, atol=0.05)


def test_layers_that_do_not_pay_or_cannot_be_split_are_left_alone_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 64, 3)
            self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
            self.reflected = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")
            self.kept = nn.Conv2d(64, 64, 1)
            self.read = nn.Conv2d(64, 64, 1)
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.two.weight = self.one.weight
            self.low = nn.Linear(64, 64)
            self.tiny = nn.Linear(64, 2)
            with torch.no_grad():
                self.low.weight.copy_(torch.outer(torch.randn(64), torch.randn(64)))

        def forward(self, x: Tensor) -> Tensor:
            y = self.kept(self.reflected(self.depthwise(self.first(x))))
            y = y + self.read.weight.mean() + self.read(y)
            return self.tiny(self.low(self.two(self.one(y.mean((2, 3))))))

    model = seeded(Odd)
    x = [torch.randn(1, 3, 9, 9)]
    plan = plan_low_rank(model, x, ignore=("kep*",))
    assert list(plan.splits) == ["low"]
    told = plan.left_alone
    assert told["kept"] == "is ignored"
    assert "depthwise" in told["depthwise"]
    assert "reflect" in told["reflected"]
    assert "AttributeError" in told["read"]
    assert told["one"] == "shares its weights with two"
    assert "stand out from noise" in told["first"]
    assert "less than 1 %" in told["tiny"]


def test_a_rank_that_costs_more_than_the_layer_is_refused_with_the_figures() -> None:
    layer = nn.Linear(20, 20)
    drawn = np.random.default_rng(0)
    with torch.no_grad():
        low = drawn.normal(size=(20, 9)) @ drawn.normal(size=(9, 20))
        layer.weight.copy_(torch.from_numpy(low))
    told = r"1\.60 times as many MACs with ranks \[16\] of \[20\]"
    with pytest.raises(StageError, match=told) as caught:
        plan_low_rank(nn.Sequential(nn.Identity(), layer), [torch.randn(1, 20)])
    assert caught.value.code == "nothing-to-factor"


def test_a_layer_that_would_take_longer_on_the_device_is_left_alone() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Conv2d(32, 32, 1), nn.Flatten())), [torch.randn(1, 32, 4, 4)]  # fmt: skip
    assert plan_low_rank(model, x, energy=0.3).splits

    # a device on which each operator costs as much as the whole layer does
    with pytest.raises(StageError, match="is cheaper whole than with any rank"):
        plan_low_rank(model, x, energy=0.3, seconds=lambda layers: 1.0 * len(layers))


def test_measured_ranks_lose_no_more_than_was_allowed_and_save_where_it_is_free() -> None:
    model = seeded(Net)
    drawn = np.random.default_rng(0)
    with torch.no_grad():
        low = drawn.normal(size=(32, 3)) @ drawn.normal(size=(3, 24))
        model.point.weight.copy_(torch.from_numpy(low).reshape(32, 24, 1, 1))  # type: ignore[union-attr,operator]
    x = torch.randn(256, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        labels = model(x).argmax(1)

    def score(candidate: nn.Module) -> float:
        with torch.no_grad():
            return (candidate.eval()(x).argmax(1) == labels).float().mean().item()

    plan = plan_low_rank(model, INPUT, max_drop=5.0, round_to=4, score=score)
    assert score(apply_low_rank(model, INPUT, plan)) >= 0.95
    assert plan.splits["point"].ranks == (4,)
    half = plan_low_rank(model, INPUT, share=0.5, round_to=4, score=score)
    after = apply_low_rank(model, INPUT, half)
    assert count_macs(after, INPUT) <= 0.5 * count_macs(model, INPUT)


def test_a_share_that_no_rank_reaches_says_how_far_one_gets() -> None:
    with pytest.raises(StageError, match=r"to 1 % of its MACs: the smallest ranks leave \d+ %"):
        plan_low_rank(seeded(Net), INPUT, share=0.01)


def test_a_pattern_that_matches_nothing_and_options_that_contradict_are_refused() -> None:
    with pytest.raises(StageOptionError, match=r"'haed'.*did you mean 'head'"):
        plan_low_rank(seeded(Net), INPUT, ignore=("haed",))
    with pytest.raises(StageOptionError, match="energy and macs contradict"):
        LowRank(energy=0.9, macs=0.5)
    with pytest.raises(StageOptionError, match="max_drop needs validation"):
        build(LowRank, {"max_drop": "1 point"}, where="r.toml", error=StageOptionError)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"layer": "kxk", "method": "svd", "ranks": [4]}, "no svd of a 3x5"),
        ({"layer": "kxk", "method": "tucker", "ranks": [4]}, "no ranks of tucker"),
        ({"layer": "depthwise", "method": "cp", "ranks": [4]}, "no cp of a Conv2d"),
        ({"layer": "norm", "method": "svd", "ranks": [4]}, "no svd of a BatchNorm2d"),
        ({"layer": "head", "method": "svd", "ranks": [0]}, "no ranks of svd"),
    ],
)
def test_an_edit_that_does_not_fit_is_named(edit: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        apply_edits(copy.deepcopy(seeded(Net)), [{"edit": "low_rank", **edit}])
