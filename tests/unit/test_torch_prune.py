"""Pruning plans, and edits replayed on freshly built models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.pruning import PruningOptions, PruningTarget
from edgepipe.schema import build
from edgepipe.torch_ops.attention import Attention
from edgepipe.torch_ops.channel_groups import find_groups
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.prune import PruningPlan, importances, plan_pruning
from edgepipe.torch_ops.run import count_macs, same_outputs
from edgepipe.torch_ops.students import tiny_vit
from edgepipe.torch_ops.train import ArraySet

pytestmark = pytest.mark.slow  # trainings: not for the inner loop


class Net(nn.Module):
    """Convolutions of all kinds: depthwise, residual, concatenated, transposed, then a flattened head."""

    def __init__(self, widths: tuple[int, int, int], *, residual: bool, concatenate: bool) -> None:
        super().__init__()
        a, b, c = widths
        self.residual, self.concatenate = residual, concatenate
        self.stem = nn.Sequential(nn.Conv2d(2, a, 3, padding=1), nn.BatchNorm2d(a), nn.PReLU(a))
        self.depthwise = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.side = nn.Conv2d(a, b, 1, bias=False)
        self.up = nn.ConvTranspose2d(a + b if concatenate else b, c, 2, stride=2)
        self.norm = nn.BatchNorm2d(c)
        self.head = nn.Linear(c * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.depthwise(y) if self.residual else self.depthwise(y)
        z = self.side(y).relu()
        z = torch.cat([y, z], 1) if self.concatenate else z
        return self.head(self.norm(self.up(z)).relu().flatten(1))


INPUT = [torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))]


def make(widths: tuple[int, int, int] = (8, 12, 16), *, residual: bool = True, concatenate: bool = True, seed: int = 0) -> nn.Module:  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(widths, residual=residual, concatenate=concatenate)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr,operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model.eval()


def plan(model: nn.Module, **options: Any) -> PruningPlan:
    return plan_pruning(model, INPUT, PruningOptions(**{"round_to": 1, **options}))


@settings(max_examples=25, deadline=None)
@given(
    widths=st.tuples(*[st.integers(4, 20)] * 3),
    residual=st.booleans(),
    concatenate=st.booleans(),
    ratio=st.floats(0.1, 0.7),
    round_to=st.sampled_from([1, 2, 4]),
    ranking=st.sampled_from(["layer", "global"]),
)
def test_edits_replayed_on_a_fresh_model_give_the_pruned_model_bit_for_bit(
    widths: tuple[int, int, int], residual: bool, concatenate: bool, ratio: float, round_to: int, ranking: str,
) -> None:  # fmt: skip
    shape = {"residual": residual, "concatenate": concatenate}
    model = make(widths, **shape)
    try:
        edits = plan(model, ratio=ratio, round_to=round_to, ranking=ranking).edits
    except StageError as exc:
        if exc.code not in ("nothing-to-prune", "layer-emptied"):
            raise
        return
    pruned = apply_edits(copy.deepcopy(model), edits)
    again = apply_edits(make(widths, seed=1, **shape), edits)
    again.load_state_dict(pruned.state_dict(), strict=True)
    assert same_outputs(pruned, again, INPUT)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert pruned(INPUT[0]).shape == (1, 3)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("concatenate", [True, False])
def test_edits_cut_what_torch_pruning_itself_would_cut(residual: bool, concatenate: bool) -> None:
    model = make(residual=residual, concatenate=concatenate)
    edits = plan(model, ratio=0.5).edits
    theirs = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=INPUT[0])
    roots = {"stem.0": theirs.stem[0], "side": theirs.side, "up": theirs.up}  # type: ignore[index]
    for edit in edits:
        if edit["axis"] == "out" and edit["layer"] in roots:
            layer = roots[edit["layer"]]
            prune_out = graph.get_pruner_of_module(layer).prune_out_channels  # type: ignore[arg-type]
            graph.get_pruning_group(layer, prune_out, edit["remove"]).prune()  # type: ignore[arg-type]
    assert same_outputs(apply_edits(model, edits), theirs, INPUT)


def test_channels_that_do_nothing_are_the_ones_removed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        for dead in (1, 4, 6):
            model[0].weight[dead] = 0  # type: ignore[index]
            model[0].bias[dead] = 0  # type: ignore[index]
    before = model(INPUT[0])
    edits = plan(model, ratio=3 / 8).edits
    assert edits[0] == {"edit": "prune", "layer": "0", "axis": "out", "remove": [1, 4, 6]}
    torch.testing.assert_close(apply_edits(model, edits)(INPUT[0]), before)


def test_kept_channels_are_rounded_to_the_nearest_multiple() -> None:
    model = make((32, 24, 8), residual=False, concatenate=False)
    # 22.4 -> 24 of 32, 16.8 -> 16 of 24, 5.6 -> 8 of 8 stays whole
    found = plan(model, ratio=0.3, round_to=8)
    assert found.channels == {"stem.0": (32, 24), "side": (24, 16)}
    assert set(found.left_whole) == {"up", "head"}


def test_half_the_channels_leave_about_a_quarter_of_the_macs() -> None:
    layers = [nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(2, 16, 1), *layers, nn.Conv2d(16, 3, 1)).eval()
    before = count_macs(model, INPUT)
    after = count_macs(apply_edits(model, plan(model).edits), INPUT)
    assert 0.25 < after / before < 0.30


def test_the_layers_that_make_outputs_and_ignored_ones_stay_whole() -> None:
    found = plan(make(), ignore=("side", "ste*"))
    assert found.left_whole["head"] == "makes an output of the model"
    assert found.left_whole["side"] == "is ignored: side"
    assert set(found.channels) == {"up"}


def test_an_ignore_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(StageOptionError, match=r"'sied'.*did you mean 'side'"):
        plan(make(), ignore=("sied",))


def test_a_ratio_that_empties_a_layer_is_refused_and_the_layer_named() -> None:
    with pytest.raises(StageError, match=r"ratio 0\.9 would leave layer 'stem\.0' \(8 channels\) empty"):  # fmt: skip
        plan(make(), ratio=0.9)


def test_a_model_with_recurrent_layers_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 8, batch_first=True, bidirectional=True)
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x[:, 0])[0][:, -1])

    with pytest.raises(StageError) as caught:
        plan(Recurrent().eval())
    assert caught.value.code in ("cannot-trace", "nothing-to-prune")


def test_a_layer_whose_width_is_written_into_the_forward_stays_whole() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu())
            return self.head(y.reshape(1, 8, 16).mean(2))

    found = plan(Fixed().eval())
    assert set(found.channels) == {"a"}
    assert "is needed whole" in found.left_whole["b"]


def test_planning_leaves_the_model_as_it_was() -> None:
    model = make()
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.head.weight.requires_grad  # type: ignore[union-attr]


def test_grouped_convolutions_are_cut_group_by_group() -> None:
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    x = torch.randn(1, 4, 3, 3)
    expected = layer(x.index_fill(1, torch.tensor([1, 3]), 0))
    apply_edits(nn.Sequential(layer), [{"edit": "prune", "layer": "0", "axis": "in", "remove": [1, 3]}])  # fmt: skip
    assert layer.weight.shape == (4, 1, 1, 1)
    torch.testing.assert_close(layer(x[:, [0, 2]]), expected)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"edit": "prune", "layer": "gone", "axis": "out", "remove": [0]}, "gone"),
        ({"edit": "prune", "layer": "side", "axis": "out", "remove": [12]}, "cannot remove"),
        ({"edit": "prune", "layer": "side", "axis": "up", "remove": [0]}, "'up'"),
        ({"edit": "fold", "layer": "side"}, "unknown kind of edit 'fold'"),
        ({"edit": "prune", "layer": "side", "axis": "out", "remove": list(range(12))}, "12 of 12"),
        ({"edit": "prune", "layer": "", "axis": "out", "remove": [0]}, "no way to prune a Net"),
    ],
)
def test_an_edit_that_does_not_fit_is_named(edit: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        apply_edits(make(), [edit])
    assert "edit 1" in caught.value.message
    assert told in caught.value.message


def test_a_free_parameter_is_cut_along_its_dimension() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)
            self.scale = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x) * self.scale)

    model = Scaled().eval()
    found = plan(model)
    apply_edits(model, found.edits)
    assert found.channels == {"conv": (8, 4)}
    assert model.scale.shape == (4, 1, 1)
    assert model(INPUT[0]).shape == (1, 2, 4, 4)


# ------------------------------------------------------------------------ what goes first


def conv_net(width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 3)
        ).eval()  # fmt: skip


def data_for(model: nn.Module, *, classes: int = 3) -> ArraySet:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(64, *INPUT[0].shape[1:])).astype(np.float32)
    return ArraySet([inputs], generator.integers(0, classes, 64))


def removed(model: nn.Module, **options: Any) -> list[int]:
    found = plan_pruning(model, INPUT, PruningOptions(ratio=3 / 8, round_to=1, **options), data=data_for(model))  # fmt: skip
    (edit,) = [e for e in found.edits if e.get("layer") == "0"]
    return list(edit["remove"])


@pytest.mark.parametrize("power", [1, 2])
def test_magnitudes_are_those_of_torch_pruning(power: int) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.b, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(16, 6, 2, stride=2)
            self.head = nn.Linear(6 * 64, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x)).relu()
            y = y + self.b(y)
            return self.head(self.up(torch.cat([y, self.b(y)], 1)).flatten(1))

    model = Residual().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
    theirs = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=INPUT[0])
    scorer = torch_pruning.importance.GroupMagnitudeImportance(p=power)
    kind = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
    expected = [scorer(g) for g in graph.get_all_groups(root_module_types=kind)]
    groups, left_whole = find_groups(model, INPUT, ignore=())
    options = PruningOptions(importance="l1" if power == 1 else "l2")
    ours = importances(model, groups, options, 0, None, left_whole)
    assert {group.name for group in groups} == {"a", "up"}
    for values in ours.values():
        assert any(len(e) == len(values) and torch.allclose(values.float(), e) for e in expected)


def test_the_smallest_batch_norm_scales_go_first_however_large_the_weights() -> None:
    model = conv_net()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1, 0.1, 1, 1, 0.2, 1, 0.3, 1]))  # type: ignore[union-attr]
        model[0].weight[[1, 4, 6]] *= 100  # type: ignore[index]
    assert removed(model, importance="batch_norm") == [1, 4, 6]
    assert removed(model, importance="l2") != [1, 4, 6]


def test_without_a_batch_norm_its_scale_ranks_nothing_and_the_layer_is_named() -> None:
    with pytest.raises(StageError, match=r"side has no batch norm to rank its channels by"):
        plan(make(residual=False, concatenate=False), importance="batch_norm", ignore=("stem.0", "up"))  # fmt: skip


def test_taylor_removes_what_the_loss_does_not_depend_on_though_its_weights_are_large() -> None:
    model = conv_net()
    with torch.no_grad():
        for unused in (2, 3, 7):  # the head adds the same to all classes: softmax cancels it
            model[4].weight[:, 4 * unused : 4 * unused + 4] = 5.0  # type: ignore[index]
    assert removed(model, importance="taylor") == [2, 3, 7]
    assert removed(model, importance="l1") != [2, 3, 7]


def test_random_is_a_control_that_repeats_with_its_seed() -> None:
    def drawn(seed: int) -> tuple[dict[str, Any], ...]:
        return plan_pruning(make(), INPUT, PruningOptions(round_to=1, importance="random"), seed=seed).edits  # fmt: skip

    assert drawn(1) == drawn(1) != drawn(2)


# ------------------------------------------------------------------------------- how much


def test_a_layer_may_have_a_ratio_of_its_own_and_the_first_pattern_counts() -> None:
    found = plan(make(), ratio=0.5, ratios={"up": 0.25, "u*": 0.75, "side": 0.0})
    assert found.channels == {"stem.0": (8, 4), "up": (16, 12)}
    assert "side" in found.left_whole


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_ratios_hold_under_either_ranking_and_a_target_leaves_them(ranking: str) -> None:
    found = plan(make(), ranking=ranking, ratios={"up": 0.25})
    assert found.channels["up"] == (16, 12)
    model = make()
    options = PruningOptions(round_to=1, ratios={"up": 0.25}, ranking=ranking, target=PruningTarget(macs=0.6))  # type: ignore[arg-type]  # fmt: skip
    limit = (macs, 0.6 * macs(model))
    assert plan_pruning(model, INPUT, options, limit=limit).channels["up"] == (16, 12)


def test_a_ratio_for_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(StageOptionError, match=r"ratios pattern 'sidr'.*did you mean 'side'"):
        plan(make(), ratios={"sidr": 0.5})


def macs(model: nn.Module) -> float:
    return float(count_macs(model, INPUT))


@settings(max_examples=15, deadline=None)
@given(
    widths=st.tuples(*[st.integers(12, 40)] * 3),
    share=st.floats(0.25, 0.9),
    ranking=st.sampled_from(["layer", "global"]),
    importance=st.sampled_from(["l2", "random"]),
)
def test_a_target_is_never_exceeded_and_nearly_used_up(
    widths: tuple[int, int, int], share: float, ranking: Any, importance: Any
) -> None:
    model = make(widths)
    most = share * macs(model)
    options = PruningOptions(round_to=1, ranking=ranking, importance=importance, target=PruningTarget(macs=share))  # fmt: skip
    found = plan_pruning(model, INPUT, options, limit=(macs, most))
    reached = macs(apply_edits(copy.deepcopy(model), found.edits))
    # the dearest single channel of such a net may be more than 2 % of it
    one = max(macs(model) - macs(apply_edits(copy.deepcopy(model), plan(model, ratio=1.01 / min(widths)).edits)), 0)  # fmt: skip
    assert most - max(0.02 * most, one) <= reached <= most


def test_layers_of_one_width_do_not_all_lose_a_block_at_once() -> None:
    layers = [nn.Conv2d(32, 32, 1, bias=False) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(2, 32, 1), *layers, nn.Conv2d(32, 3, 1)).eval()
    options = PruningOptions(round_to=8, target=PruningTarget(macs=0.7))
    found = plan_pruning(model, INPUT, options, limit=(macs, 0.7 * macs(model)))
    # all at 24 of 32 would be (24 / 32)^2 = 0.56; a block of one layer is 1/16 of the six
    reached = macs(apply_edits(copy.deepcopy(model), found.edits)) / macs(model)
    assert 0.7 - 1 / 16 < reached <= 0.7
    assert {now for _, now in found.channels.values()} == {24}


def test_a_target_that_is_met_or_cannot_be_is_an_error_that_says_by_how_much() -> None:
    model = make()
    with pytest.raises(StageError, match=r"costs \d+ already, no more than the target of \d+"):
        plan_pruning(model, INPUT, PruningOptions(), limit=(macs, macs(model)))
    options = PruningOptions(round_to=4, ignore=("stem.*", "depthwise"))
    with pytest.raises(StageError, match=r"target of 10 cannot be reached.* still costs \d+"):
        plan_pruning(model, INPUT, options, limit=(macs, 10))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 0.5, "target": {"macs": 0.5}}, "contradict"),
        ({"target": {"macs": 0.5, "parameters": 0.5}}, "exactly one"),
        ({"target": {}}, "exactly one"),
        ({"target": {"macs": 1.0}}, "no target"),
        ({"target": {"bytes": 5000.0}}, "neither a share nor a size"),
        ({"target": {"bytes": "5 parsecs"}}, "not a size"),
        ({"target": {"latency": "5 ms"}}, "go together"),
        ({"target": {"latency": 5}}, "no unit"),
        ({"ratios": {"a": 1.0}}, "below 1"),
        ({"max_drop": "1 point"}, "needs validation"),
        ({"steps": 0}, "at least 1"),
        ({"finetune": {"epoch": 1}}, "did you mean 'epochs'"),
        ({"round_to": "eight"}, "round_to"),
        ({"importance": "L2"}, "importance"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(StageOptionError, match=told):
        build(PruningOptions, options, where="[[stages]] 1 (prune)", error=StageOptionError)


def test_targets_may_be_shares_or_absolute() -> None:
    def target(**values: Any) -> tuple[str, float, bool]:
        found = build(PruningTarget, values, where="", error=StageOptionError)
        return found.metric, found.value, found.is_share

    assert target(macs=0.5) == ("macs", 0.5, True)
    assert target(macs=2_000_000) == ("macs", 2e6, False)
    assert target(bytes="200 kB") == ("bytes", 2e5, False)
    assert target(bytes=0.3) == ("bytes", 0.3, True)
    assert target(latency="5 ms", profile="rpi4b_4gb") == ("latency", 0.005, False)


# ------------------------------------------------------------------ what must go together


class SqueezeExcite(nn.Module):
    """A grouped convolution, then squeeze-excite with a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(2, 16, 1), nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.norm, self.narrow = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.norm(self.grouped(self.stem(x))).relu()).relu()
        scale = self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu())
        return self.head((y + y * nn.functional.hardsigmoid(scale)).mean((2, 3)))


def test_grouped_convolutions_squeeze_excite_and_residuals_lose_channels_together() -> None:
    model = SqueezeExcite().eval()
    found = plan(model, ratio=0.5)
    assert found.channels == {"stem": (16, 8), "grouped": (32, 16), "narrow": (16, 8), "squeeze": (8, 4)}  # fmt: skip
    for edit in found.edits:
        if edit["layer"] == "grouped":  # as many of each of the four groups, the same ones
            share = (32 if edit["axis"] == "out" else 16) // 4
            assert {sum(i // share == g for i in edit["remove"]) for g in range(4)} == {share // 2}
    pruned = apply_edits(copy.deepcopy(model), found.edits)
    assert pruned.grouped.weight.shape == (16, 2, 3, 3)  # type: ignore[union-attr]
    assert pruned.excite.out_channels == pruned.narrow.out_channels == 8  # type: ignore[union-attr]


class SelfAttention(nn.Module):
    """Attention of linear layers, as people write it: apart, or as one in either order."""

    def __init__(self, style: str, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.style, self.num_heads, self.head_dim, self.attn_dim = style, heads, dim // heads, dim
        if style == "apart":
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.style == "apart":
            each = (layer(x) for layer in (self.q, self.k, self.v))
            q, k, v = (t.reshape(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for t in each)  # fmt: skip
        elif self.style == "qkv of heads":
            packed = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            packed = self.qkv(x).reshape(batch, length, self.num_heads, 3, self.head_dim)
            q, k, v = packed.permute(3, 0, 2, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, length, self.attn_dim))


class Transformer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(2, 16, 2, 2), nn.Parameter(torch.randn(1, 4, 16))
        self.norm, self.attention, self.head = nn.LayerNorm(16), attention, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm(x)
        if isinstance(self.attention, nn.MultiheadAttention) or hasattr(self.attention, "out_proj"):
            y = self.attention(y, y, y)[0]
        else:
            y = self.attention(y)
        return self.head((x + y).mean(1))


@pytest.mark.parametrize("style", ["apart", "qkv of heads", "heads of qkv", "packed"])
def test_attention_loses_whole_heads_and_the_weakest_go(style: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True) if style == "packed" else SelfAttention(style)  # fmt: skip
    model = Transformer(attention).eval()
    out = attention.out_proj if style == "packed" else attention.proj  # type: ignore[union-attr]
    with torch.no_grad():
        out.weight *= 5  # type: ignore[union-attr]
        out.weight[:, [*range(4, 8), *range(12, 16)]] = 0  # type: ignore[union-attr,index]
    before = model(INPUT[0])  # heads 1 and 3 do nothing, so nothing is lost without them
    found = plan(model, ratio=0.5, ignore=("patch",))
    assert list(found.heads.values()) == [(4, 2)]
    pruned = apply_edits(copy.deepcopy(model), found.edits)
    torch.testing.assert_close(pruned(INPUT[0]), before, rtol=1e-4, atol=1e-5)
    assert pruned.attention.num_heads == 2  # type: ignore[union-attr]
    (edit,) = [e for e in found.edits if e.get("axis") == "in"]
    assert edit["remove"] == [4, 5, 6, 7, 12, 13, 14, 15]


def test_heads_of_attention_made_of_convolutions_are_found() -> None:
    model = tiny_vit.build(size=(16, 16), blocks=1).eval()
    image = [torch.randn(1, 3, 16, 16)]
    found = plan_pruning(model, image, PruningOptions(ratio=0.5))
    assert found.heads == {"blocks.0.query.0": (4, 2)}
    assert set(found.left_whole) == {"head"}
    assert {"edit": "set", "layer": "blocks.0", "attribute": "heads", "value": 2} in found.edits


def test_heads_that_a_shape_hides_are_not_cut_across() -> None:
    class Hidden(SelfAttention):
        """Takes the width of a head from its weights: half of each head would fit, any half not."""

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))  # fmt: skip
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.proj(y.transpose(1, 2).flatten(2))

    found = plan(Transformer(Hidden("apart")).eval(), ratio=0.5)
    assert "is needed whole" in found.left_whole["attention.q"]


def test_the_width_of_a_transformer_is_cut_through_its_norms_position_and_attention() -> None:
    found = plan(Transformer(SelfAttention("apart")).eval(), ratio=0.5)
    assert found.channels == {"patch": (16, 8), "attention.q": (16, 8)}
    assert {"edit": "prune_parameter", "parameter": "position", "dim": 2} in [
        {k: v for k, v in e.items() if k != "remove"} for e in found.edits
    ]


def test_attention_that_does_not_say_how_many_heads_it_has_stays_whole() -> None:
    class Unnamed(SelfAttention):
        @property
        def num_heads(self) -> int:  # type: ignore[override]
            return 4

        @num_heads.setter
        def num_heads(self, value: int) -> None: ...

    found = plan(Transformer(Unnamed("apart")).eval(), ratio=0.5)
    assert "is needed whole" in found.left_whole["attention.q"]
    assert found.channels == {"patch": (16, 8)}


@settings(max_examples=10, deadline=None)
@given(
    batch_first=st.booleans(), bias=st.booleans(), weights=st.booleans(), average=st.booleans(),
    sizes=st.sampled_from([(None, None), (6, 10)]), masked=st.booleans(), padded=st.booleans(),
)  # fmt: skip
def test_plain_attention_computes_what_multihead_attention_does(
    batch_first: bool, bias: bool, weights: bool, average: bool, sizes: Any, masked: bool, padded: bool
) -> None:  # fmt: skip
    theirs = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, kdim=sizes[0], vdim=sizes[1]).eval()  # fmt: skip
    ours = Attention(theirs)
    query, key, value = (torch.randn(2, n, d or 8) for n, d in ((3, 8), (5, sizes[0]), (5, sizes[1])))  # fmt: skip
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    given = {
        "need_weights": weights, "average_attn_weights": average,
        "attn_mask": torch.ones(3, 5, dtype=torch.bool).triu(2) if masked else None,
        "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2) if padded else None,
    }  # fmt: skip
    for one, other in zip(ours(query, key, value, **given), theirs(query, key, value, **given), strict=True):  # fmt: skip
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_cut_that_runs_but_computes_something_else_is_not_made() -> None:
    class Shared(nn.Module):
        """Splits its channels in halves by shape: cutting any moves the border between them."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(32, 16), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.a(x.flatten(1)).tanh().unflatten(1, (-1, 2)).unbind(2)
            return self.head(nn.functional.pad(one * other, (0, 8))[:, :8])

    with pytest.raises(StageError, match=r"a is needed whole"):
        plan(Shared().eval())


def test_layers_created_in_forward_are_refused() -> None:
    class Created(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.Conv2d(8, 3, 1)(self.a(x)).mean((2, 3))

    with pytest.raises(StageError, match=r"2 parameters that are not its own.*created in forward") as caught:  # fmt: skip
        plan(Created().eval())
    assert "__init__" in caught.value.hint
