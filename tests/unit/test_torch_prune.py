"""Pruning plans, and edits replayed on freshly built models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch_pruning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.pruning import PruningOptions
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.prune import PruningPlan, plan_pruning
from edgepipe.torch_ops.run import count_macs, same_outputs


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
