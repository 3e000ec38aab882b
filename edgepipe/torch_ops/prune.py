"""Structured pruning: which channels to remove, as edits that `edits.apply_edits` replays.

torch-pruning only says what goes together (`channel_groups`); the model is changed by the edits
alone, so that a saved model needs no torch-pruning to load.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepipe.errors import StageError, StageOptionError
from edgepipe.pruning import PruningOptions
from edgepipe.schema import near_miss
from edgepipe.torch_ops.channel_groups import Group, Proof, edits_for, find_groups
from edgepipe.torch_ops.edits import apply_edits, is_depthwise
from edgepipe.torch_ops.run import call_model
from edgepipe.torch_ops.sequences import Whole, as_is
from edgepipe.torch_ops.train import TrainingSet, check_labels

log = logging.getLogger(__name__)

STAGE = "prune"

# A target is reached where the result is below it by no more than this share of it
NEAR = 0.02
BISECTIONS = 12  # halvings of the ratio: to 1 channel in 4096
GRADIENT_BATCH = 32

Cost = Callable[[nn.Module], float]


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """``edits`` to make; ``channels`` (before, after) of each group that is cut, named by its first
    layer; ``heads`` likewise for those that are attention; groups left whole, with the reason."""

    edits: tuple[dict[str, Any], ...]
    channels: dict[str, tuple[int, int]]
    heads: dict[str, tuple[int, int]]
    left_whole: dict[str, str]


def plan_pruning(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    options: PruningOptions,
    *,
    seed: int = 0,
    data: TrainingSet | None = None,
    widths: Mapping[str, int] | None = None,
    share: float = 1.0,
    limit: tuple[Cost, float] | None = None,
    whole: Whole = as_is,
) -> PruningPlan:
    """Choose what to remove; ``model`` is not changed.

    With ``limit`` (cost, most) as little is removed as brings ``cost`` of the model down to ``most``;
    else ``ratio`` says how much: example: 64 channels, ratio 0.3, round_to 8 -> 44.8 -> 48 kept.
    ``share`` makes that the first of several steps (0.5: half of the way), ``widths`` are the channels
    that the groups had before the first. ``data`` is for ``importance = "taylor"``, samples of
    ``whole`` of the model.

    Groups that end in an output of the model, match a pattern in ``ignore``, hold a layer that cannot
    be cut (recurrent, group norm), or without which the others compute something else, stay whole.
    Raises StageError where the model cannot be traced, a layer would be left empty, nothing can be
    pruned, or ``limit`` cannot be reached; StageOptionError for a pattern that matches no layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning warns of what is checked here
        model = copy.deepcopy(model).eval()
        _check_patterns(model, options)
        model, opened = _with_plain_attention(model, inputs)
        groups, left_whole = find_groups(model, inputs, ignore=options.ignore)
        importance = importances(model, groups, options, seed, data, left_whole, whole)
    groups = [group for group in groups if group.name in importance]
    choice = _Choice(model, groups, importance, options, widths or {}, share)
    kept = choice.by_ratio(share * options.removed_share) if limit is None else choice.by_cost(*limit)  # fmt: skip
    for group in groups:
        if kept[group.name] == group.units:
            rounded = limit is None or group.channels <= options.multiple
            why = (
                f", to be rounded to {options.multiple}" if rounded else ", which the target allows"
            )
            left_whole[group.name] = f"has {group.channels} channels{why}"
    cut = [group for group in groups if kept[group.name] < group.units]
    if not cut:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(left_whole.items())[:4])
        raise StageError(
            f"no layer of this model can be pruned: {reasons or 'no convolution or linear layer'}",
            stage=STAGE,
            hint="lower round_to, raise ratio, or leave the stage out",
            code="nothing-to-prune",
        )
    edits = choice.edits(kept)
    problem = Proof(model, inputs).why_not_exact(edits)
    if problem:
        raise StageError(
            f"the pruned model is not exact: {problem}",
            stage=STAGE,
            hint=f"keep some layers whole, like ignore = [{cut[0].name!r}]",
            code="not-exact",
        )
    touched = {edit["layer"] for edit in edits if "layer" in edit}
    opened = [e for e in opened if any(name.startswith(e["layer"] + ".") for name in touched)]
    return PruningPlan(
        (*opened, *edits),
        {g.name: (g.channels, kept[g.name] * g.size) for g in cut},
        {g.name: (g.units, kept[g.name]) for g in cut if g.counts},
        left_whole,
    )


def _with_plain_attention(
    model: nn.Module, inputs: Sequence[torch.Tensor]
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model with every ``nn.MultiheadAttention`` opened up, so that heads can be removed, and the
    edits that do it; the model as it is where that would change what it computes."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    edits = [{"edit": "plain_attention", "layer": name} for name in layers]
    if not edits:
        return model, []
    problem = Proof(model, inputs).why_not_exact(edits)
    if problem:
        log.info("attention heads are left alone: %s", problem)
        return model, []
    return apply_edits(model, edits), edits


def _check_patterns(model: nn.Module, options: PruningOptions) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for key, patterns in (("ignore", options.ignore), ("ratios", tuple(options.ratios))):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise StageOptionError(
                    f"prune: {key} pattern {pattern!r} matches no layer{near_miss(pattern, names)}",
                    hint=f"layers: {', '.join(names)}"[:500],
                )


class _Choice:
    """How many units of each group are kept, by name; the least important go first."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], importance: Mapping[str, torch.Tensor],
        options: PruningOptions, widths: Mapping[str, int], share: float,
    ) -> None:  # fmt: skip
        self.model, self.groups, self.importance, self.options = model, groups, importance, options
        self.widths = {g.name: widths.get(g.name, g.channels) for g in groups}
        # stable: of equal units the first are removed, on every machine
        self.order = {n: torch.argsort(values, stable=True).tolist() for n, values in importance.items()}  # fmt: skip
        own = {g.name: self._own_ratio(g) for g in groups}
        self.own = {name: None if ratio is None else share * ratio for name, ratio in own.items()}

    def _own_ratio(self, group: Group) -> float | None:
        for pattern, ratio in self.options.ratios.items():
            if any(fnmatch.fnmatch(layer, pattern) for layer in group.layers):
                return ratio
        return None

    def edits(self, kept: Mapping[str, int]) -> list[dict[str, Any]]:
        gone = {g.name: self.order[g.name][: g.units - kept[g.name]] for g in self.groups}
        return edits_for((group, gone[group.name]) for group in self.groups)

    def step(self, group: Group) -> int:
        """Units are kept in multiples of this."""
        return 1 if group.counts else self.options.multiple // math.gcd(self.options.multiple, group.size)  # fmt: skip

    def by_ratio(self, ratio: float, *, never_empty: bool = False) -> dict[str, int]:
        """What is left without ``ratio`` of the channels that there were before the first step."""
        threshold = math.nan
        if self.options.ranking == "global":
            threshold = self._threshold(ratio)
        kept = {}
        for group in self.groups:
            name, step, own = group.name, self.step(group), self.own[group.name]
            wanted = self.widths[name] * (1 - (ratio if own is None else own)) / group.size
            if own is None and self.options.ranking == "global":
                wanted = float((self.importance[name] > threshold).sum())
            if wanted * group.size < 1 and not never_empty:
                raise StageError(
                    f"ratio {ratio if own is None else own:g} would leave layer {name!r} ({group.channels} channels) empty",
                    stage=STAGE,
                    hint=f'lower ratio, or ignore = ["{name}"]',
                    code="layer-emptied",
                )
            kept[name] = min(group.units, max(step, round(wanted / step) * step))
        return kept

    def _threshold(self, ratio: float) -> float:
        """The importance up to which units go, so that ``ratio`` of those there were is gone."""
        ranked = [g for g in self.groups if self.own[g.name] is None]
        if not ranked:
            return math.nan
        values = torch.cat([self.importance[g.name] for g in ranked]).sort().values
        before = sum(self.widths[g.name] / g.size for g in ranked)
        remove = round(ratio * before - (before - len(values)))
        return values[min(remove, len(values)) - 1].item() if remove > 0 else -math.inf

    def by_cost(self, cost: Cost, most: float) -> dict[str, int]:
        """The largest choice that costs no more than ``most``.

        Bisection finds the smallest ratio that does; since channels go in blocks, that may be well
        below, so blocks are then given back where the cost allows it, the most important first: to
        groups that the next smaller ratio would cut less, then to any.
        """

        text = self.options.target.text if self.options.target else "{:.6g}".format

        def price(kept: Mapping[str, int]) -> float:
            return cost(apply_edits(copy.deepcopy(self.model), self.edits(kept)))

        whole = {g.name: g.units for g in self.groups}
        start = price(whole)
        if start <= most:
            raise StageError(
                f"the model costs {text(start)} already, no more than the target of {text(most)}",
                stage=STAGE,
                hint="lower the target, or leave the stage out",
                code="nothing-to-prune",
            )
        low, high = 0.0, 1.0
        kept = self.by_ratio(high, never_empty=True)
        found = price(kept)
        if found > most:
            raise StageError(
                f"the target of {text(most)} cannot be reached: with {self.options.multiple} channels left in every "
                f"layer that may be cut, the model still costs {text(found)}",
                stage=STAGE,
                hint="lower round_to, ignore fewer layers, or raise the target",
                code="target-unreachable",
            )
        above = {name: kept[name] if self.own[name] is not None else n for name, n in whole.items()}
        if price(above) <= most:  # what `ratios` say is enough
            return above
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            trial = self.by_ratio(middle, never_empty=True)
            if trial == above or (trial != kept and price(trial) > most):
                low, above = middle, trial
            else:
                high, kept = middle, trial
        for ceiling in (
            above,
            {n: n_all if self.own[n] is None else kept[n] for n, n_all in whole.items()},
        ):
            for group in sorted(self.groups, key=lambda g: self._worth(g, kept), reverse=True):
                more = min(ceiling[group.name], kept[group.name] + self.step(group))
                if more > kept[group.name] and price({**kept, group.name: more}) <= most:
                    kept[group.name] = more
        return kept

    def _worth(self, group: Group, kept: Mapping[str, int]) -> float:
        """Mean importance of the block that would be given back."""
        gone = self.order[group.name][: group.units - kept[group.name]][-self.step(group) :]
        return self.importance[group.name][gone].mean().item() if gone else 0.0


def importances(
    model: nn.Module, groups: Sequence[Group], options: PruningOptions, seed: int,
    data: TrainingSet | None, left_whole: dict[str, str], whole: Whole = as_is,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Importance (units,) of each group, divided by its mean, so that groups compare.

    ``l2`` and ``l1``: the squares or magnitudes of all weights that go with a unit, of all layers
    together (DepGraph, eq. 5); ``batch_norm``: magnitudes in batch norms alone (Liu et al. 2017,
    "Network Slimming"); ``taylor``: (sum of weight x gradient of the loss)^2 for each layer, over
    batches of ``data`` (Molchanov et al. 2019, eq. 9); ``random``: drawn from ``seed``.
    """
    totals = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    ranked = set()
    for scores in _scores(model, options, seed, data, whole):
        for group in groups:
            for (name, axis, _), places in group.places.items():
                layer = model.get_submodule(name) if axis else None
                score = scores.get(f"{name}.weight" if name else "weight")
                if layer is None or score is None or score.numel() == 1:  # a PReLU's shared slope
                    continue
                if options.importance == "batch_norm" and not isinstance(layer, _BatchNorm):
                    continue
                indices, units = (torch.tensor(column) for column in zip(*places, strict=True))
                found = torch.zeros(group.units, dtype=torch.float64)
                found.index_add_(0, units, _by_channel(layer, score, axis)[indices])
                totals[group.name] += found.square() if options.importance == "taylor" else found
                ranked.add(group.name)
    result = {}
    for group in groups:
        if options.importance == "random":
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(group.name.encode()))
            result[group.name] = torch.rand(group.units, generator=generator, dtype=torch.float64)
        elif group.name in ranked:
            mean = totals[group.name].mean()
            result[group.name] = totals[group.name] / mean if mean > 0 else torch.ones(group.units)
        else:
            left_whole[group.name] = "has no batch norm to rank its channels by"
    return result


def _by_channel(layer: nn.Module, score: torch.Tensor, axis: str) -> torch.Tensor:
    """Scores like the weight of ``layer`` -> their sums (channels,) along an axis."""
    if score.ndim == 1:  # batch norm, PReLU
        return score
    if isinstance(layer, nn.LayerNorm):
        return score.flatten(0, -2).sum(0)
    if isinstance(layer, nn.Embedding):
        return score.sum(0)
    transposed = isinstance(layer, _ConvTransposeNd)
    # weight: (out, in/groups, *kernel); transposed: (in, out/groups, *kernel)
    if axis == ("in" if transposed else "out") or is_depthwise(layer):
        return score.flatten(1).sum(1)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    blocks = score.reshape(groups, score.shape[0] // groups, score.shape[1], -1)
    return blocks.sum((1, 3)).flatten()  # (groups, rows, share, kernel) -> (groups * share,)


def _scores(
    model: nn.Module, options: PruningOptions, seed: int, data: TrainingSet | None, whole: Whole
) -> Iterator[dict[str, torch.Tensor]]:  # fmt: skip
    """Scores (double) like the weights of the model, by name; of ``taylor`` for one batch after another."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    if options.importance == "taylor":
        if data is None:
            raise StageOptionError("prune: importance = 'taylor' needs data", hint='data = "train"')
        for gradients in _gradients(model, data, options.samples, seed, whole):
            yield {name: weights[name] * gradient for name, gradient in gradients.items()}
    elif options.importance == "l2":
        yield {name: weight.square() for name, weight in weights.items()}
    elif options.importance != "random":
        yield {name: weight.abs() for name, weight in weights.items()}


def _gradients(
    model: nn.Module, data: TrainingSet, samples: int, seed: int, whole: Whole
) -> Iterator[dict[str, torch.Tensor]]:
    """The gradient of the loss for one batch after another, in evaluation mode."""
    shown = whole(model)
    check_labels(shown, data, "pruning", STAGE)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples]
    names, parameters = zip(*model.named_parameters(), strict=True)
    for start in range(0, len(rows), GRADIENT_BATCH):
        inputs, target = data.batch(rows[start : start + GRADIENT_BATCH])
        with torch.enable_grad():
            loss = functional.cross_entropy(call_model(shown, inputs)[0], target)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        yield {n: g.double() for n, g in zip(names, gradients, strict=True) if g is not None}
