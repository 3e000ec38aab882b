"""Low rank: a layer becomes a chain of smaller ones, where that costs less.

Linear layers and 1x1 convolutions by singular values, kxk convolutions by Tucker-2 (Kim et al. 2016,
https://arxiv.org/abs/1511.06530) or CP (Lebedev et al. 2015, https://arxiv.org/abs/1412.6553). What is
approximated is the kernel with its batch norm's scale, as it will be in the converted file (the batch
norm itself stays), and where samples are given, the kernel's answers to them: their channels' second
moments weigh the kernel's (Zhang et al. 2016, https://arxiv.org/abs/1505.06798, section 3.1, the
linear case, without its bias). The edits say only which layer has which ranks: a saved model needs no
tensorly to load.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepipe.errors import StageError, StageOptionError
from edgepipe.schema import near_miss
from edgepipe.torch_ops.edits import SPARSE, apply_edits
from edgepipe.torch_ops.factors import energy_of, factors_of, spectrum_of, unfoldings_of, vbmf_rank
from edgepipe.torch_ops.result import Layer, describe_layers, totals
from edgepipe.torch_ops.run import flatten_outputs
from edgepipe.torch_ops.sequences import Whole, as_is

log = logging.getLogger(__name__)

STAGE = "low_rank"
# Shares of a layer's cost that are tried where each try is a decomposition or a validation run.
STEPS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)

# Samples at a time
BATCH = 32
# A layer with less than this share of both MACs and parameters is not worth another operator.
LEAST = 0.01

Cost = Callable[[Sequence[Layer]], float]


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to factor a layer. ``energy`` is the share of the kernel's squared norm that it keeps,
    ``macs`` what its layers do together for one sample, ``was`` what the whole layer did."""

    method: str
    ranks: tuple[int, ...]
    energy: float
    macs: int
    was: int
    loss: float = 0.0  # what the layer's ranks are chosen by: 1 - energy, or points of accuracy


@dataclasses.dataclass(frozen=True)
class LowRankPlan:
    """``splits`` by layer name, and why the other layers stay as they are."""

    splits: dict[str, Split]
    left_alone: dict[str, str]

    def edits(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"edit": "low_rank", "layer": name, "method": s.method, "ranks": list(s.ranks)}
            for name, s in self.splits.items()
        )


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Values of one channel for one sample, over all calls of a layer: in its input, in its output,
    and (CP) in between, with the height of the output and the width of the input."""

    before: int = 0
    between: int = 0
    after: int = 0


@dataclasses.dataclass(frozen=True)
class _Metric:
    """``scale`` (out,): what a batch norm after a layer multiplies by. ``root`` (in, in): the square root
    of its input channels' second moments E[x x^T], where samples are there to tell."""

    scale: np.ndarray
    root: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Target:
    """A layer that can be factored."""

    name: str
    layer: nn.Linear | nn.Conv2d
    method: str
    positions: _Positions
    metric: _Metric

    def kernel(self) -> np.ndarray:
        """(out, in) or (out, in, height, width) float64, weighed by the metric."""
        weight = self.layer.weight.detach().cpu().double().numpy()
        if self.method == "svd":
            weight = weight.reshape(weight.shape[:2])
        weight = weight * self.metric.scale.reshape(-1, *[1] * (weight.ndim - 1))
        if self.metric.root is not None:
            weight = np.einsum("oi...,ij->oj...", weight, self.metric.root)
        return weight


def plan_low_rank(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    method: Literal["tucker", "cp"] = "tucker",
    energy: float = 0.0,
    share: float = 0.0,
    max_drop: float = 0.0,
    round_to: int = 8,
    ignore: Sequence[str] = (),
    samples: Sequence[np.ndarray] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    seconds: Cost | None = None,
    whole: Whole = as_is,
) -> LowRankPlan:
    """Choose ranks; ``model`` is not changed. ``samples`` (N, ...) are real inputs, in call order, of ``whole``
    of the model.

    At most one of these is given, and none means the ranks that variational Bayes finds (`vbmf_rank`):
    ``energy``, the share of each kernel's squared norm to keep; ``share``, the share of the model's
    MACs to get to; ``max_drop``, the points of ``score`` (a share of right answers) that all
    layers together may lose. With ``score`` a layer's loss is measured with that layer alone
    factored, without it is the energy lost; of all layers those ranks are taken whose loss stays
    below one common bound, the one that meets ``share`` or ``max_drop``.

    Ranks are multiples of ``round_to`` where a layer is wide enough. A layer whose chain would do more
    MACs, or take longer by ``seconds`` where that is given, stays, and so do layers that ``ignore``
    matches. Raises StageError where no layer pays or the share is out of reach, StageOptionError for a
    pattern that matches no layer.
    """
    model = copy.deepcopy(model).eval()
    macs = totals(describe_layers(model, inputs))["macs"]
    targets, alone = _find_targets(model, inputs, method, ignore, samples, whole)
    targets = [t for t in targets if not _refusal(model, inputs, t, alone)]
    if score is None and not energy and not share:
        splits = {}
        for target in targets:
            split = _guess(target, round_to, seconds)
            if isinstance(split, str):
                alone[target.name] = split
            else:
                splits[target.name] = split
    else:
        choices: dict[str, list[Split]] = {}
        for target in targets:
            found = _choices(target, round_to, seconds, few=score is not None)
            if found:
                choices[target.name] = found
            else:
                alone[target.name] = "is cheaper whole than with any rank"
        if score is None:
            bound = 1 - energy if energy else _bound_for(choices, macs, share)
            splits = _cheapest(choices, bound)
        else:
            metrics = {t.name: t.metric for t in targets}
            splits = _measured(model, choices, metrics, score, macs, share, max_drop)
        for name in choices.keys() - splits.keys():
            alone[name] = "loses too much with every rank that would make it cheaper"
    for name, reason in alone.items():
        log.info("%s is left alone: it %s", name, reason)
    if not splits:
        reasons = "; ".join(f"{name} {why}" for name, why in list(alone.items())[:4])
        raise StageError(
            f"no layer of this model gains from low rank: {reasons or 'no convolution or linear layer'}",
            stage=STAGE,
            hint="accept more loss (energy, max_drop), prune channels instead, or leave the stage out",
            code="nothing-to-factor",
        )
    exact = {}
    for target in targets:
        if target.name in splits:
            split = splits[target.name]
            kept = energy_of(target.kernel(), split.method, split.ranks)
            exact[target.name] = dataclasses.replace(split, energy=kept)
    return LowRankPlan(exact, alone)


def apply_low_rank(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    plan: LowRankPlan,
    *,
    samples: Sequence[np.ndarray] | None = None,
    whole: Whole = as_is,
) -> nn.Module:
    """A copy of ``model`` with the plan's layers factored, weights filled in."""
    result = copy.deepcopy(model).eval()
    metrics = _metrics(result, inputs, samples, whole)
    for name, split in plan.splits.items():
        _fill(result, name, split, metrics[name])
    return result


def _find_targets(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    method: str,
    ignore: Sequence[str],
    samples: Sequence[np.ndarray] | None,
    whole: Whole,
) -> tuple[list[_Target], dict[str, str]]:
    """Layers that can be factored, in the order in which they run, and why others cannot."""
    modules = dict(model.named_modules())
    for pattern in ignore:
        if not fnmatch.filter(modules, pattern):
            raise StageOptionError(
                f"{STAGE}: ignore pattern {pattern!r} matches no layer{near_miss(pattern, list(modules))}",
                hint=f"layers: {', '.join(n for n in modules if n)}"[:500],
            )
    metrics = _metrics(model, inputs, samples, whole)
    of_all = totals(describe_layers(model, inputs))
    positions = _positions(model, inputs)
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    targets, alone = [], {}
    for name, where in positions.items():
        layer = modules[name]
        if any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
            alone[name] = "is ignored"
        elif len(owners[id(layer.weight)]) > 1:
            alone[name] = f"shares its weights with {owners[id(layer.weight)][1]}"
        elif hasattr(layer, SPARSE):
            alone[name] = "was made sparse, and its factors would not be"
        elif name == "":
            alone[name] = "is the whole model"
        elif isinstance(layer, nn.Conv2d):
            reason = _odd_convolution(layer)
            if reason:
                alone[name] = reason
                continue
            how = "svd" if layer.kernel_size == (1, 1) else method
            targets.append(_Target(name, layer, how, where, metrics[name]))
        elif isinstance(layer, nn.Linear):
            targets.append(_Target(name, layer, "svd", where, metrics[name]))
    large = []
    for target in targets:
        layer = _whole(target)
        if layer.macs < LEAST * of_all["macs"] and layer.parameters < LEAST * of_all["parameters"]:
            alone[target.name] = f"is less than {100 * LEAST:g} % of the model: nothing to gain"
        else:
            large.append(target)
    return large, alone


def _odd_convolution(layer: nn.Conv2d) -> str:
    if layer.groups > 1:
        return "is a depthwise or grouped convolution: no product of channels to factor"
    if layer.padding_mode != "zeros":
        return f"pads with {layer.padding_mode!r}"
    if layer.padding == "same" and any(k % 2 == 0 for k in layer.kernel_size):
        return "pads an even kernel to the same size"
    return ""


def _positions(model: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, _Positions]:
    found: dict[str, _Positions] = {}
    hooks = []

    def counting(name: str) -> Any:
        def hook(layer: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            old, source = found.get(name, _Positions()), given[0]
            if isinstance(layer, nn.Linear):
                rows = source.numel() // len(source) // layer.in_features
                new = (rows, rows, rows)
            else:  # (..., channels, height, width)
                new = (
                    source.shape[-2] * source.shape[-1],
                    result.shape[-2] * source.shape[-1],
                    result.shape[-2] * result.shape[-1],
                )
            found[name] = _Positions(old.before + new[0], old.between + new[1], old.after + new[2])

        return hook

    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            hooks.append(module.register_forward_hook(counting(name)))
    _run(model, inputs, hooks)
    return found


def _metrics(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    samples: Sequence[np.ndarray] | None,
    whole: Whole,
) -> dict[str, _Metric]:
    """What counts in each layer that could be factored."""
    made: dict[int, tuple[str, Any]] = {}  # the tensor is kept, so that no other gets its id
    scales: dict[str, np.ndarray] = {}
    moments: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        def hook(layer: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            made[id(result)] = name, result
            scales.setdefault(name, np.ones(len(layer.weight)))  # type: ignore[arg-type]
            if samples is not None and getattr(layer, "groups", 1) == 1:
                rows = given[0].detach().double()
                if isinstance(layer, nn.Conv2d):
                    rows = rows.movedim(-3, -1)
                rows = rows.reshape(-1, rows.shape[-1])  # (positions, in)
                moments[name] = moments.get(name, torch.zeros(())) + rows.T @ rows

        return hook

    def pair(norm: Any, given: tuple[Any, ...], _: Any) -> None:
        if id(given[0]) in made and norm.running_var is not None:
            deviation = (norm.running_var + norm.eps).sqrt()
            gain = torch.ones_like(deviation) if norm.weight is None else norm.weight.detach().abs()
            scale = (gain / deviation).cpu().double().numpy()
            # a channel that the batch norm silences must not be divided by nothing
            scales[made[id(given[0])][0]] = np.maximum(scale, 1e-3 * max(scale.max(), 1e-12))

    hooks = []
    shown = model if samples is None else whole(model)
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            hooks.append(module.register_forward_hook(remember(name)))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_hook(pair))
    batches = [list(inputs)]
    if samples is not None:
        batches = [
            [torch.from_numpy(np.ascontiguousarray(a[i : i + BATCH])) for a in samples]
            for i in range(0, len(samples[0]), BATCH)
        ]
    for number, batch in enumerate(batches, 1):
        _run(shown, batch, hooks if number == len(batches) else [])
        made.clear()
    roots = {name: _root(moment.numpy()) for name, moment in moments.items()}
    return {name: _Metric(scale, roots.get(name)) for name, scale in scales.items()}


def _root(moments: np.ndarray) -> np.ndarray:
    """The symmetric square root of E[x x^T], channels that never speak lifted off zero."""
    values, vectors = np.linalg.eigh(moments)
    values = np.maximum(values, 1e-4 * max(float(values.mean()), 1e-12))
    return (vectors * np.sqrt(values)) @ vectors.T


def _run(model: nn.Module, inputs: Sequence[torch.Tensor], hooks: list[Any]) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _refusal(
    model: nn.Module, inputs: Sequence[torch.Tensor], target: _Target, alone: dict[str, str]
) -> str:
    """Why the model does not run with this layer replaced (its forward reads the layer's weights,
    say), or an empty string; noted in ``alone``."""
    ranks = [1, 1] if target.method == "tucker" else [1]
    edit = {"edit": "low_rank", "layer": target.name, "method": target.method, "ranks": ranks}
    with torch.no_grad():
        expected = [t.shape for t in flatten_outputs(model(*inputs))]
    try:
        with torch.no_grad():
            got = flatten_outputs(apply_edits(copy.deepcopy(model), [edit])(*inputs))
    except Exception as exc:  # noqa: BLE001 - whatever the user's forward raises is the answer
        reason = f"{type(exc).__name__}: {str(exc).splitlines()[0][:200]}"
        alone[target.name] = f"is needed as it is: {reason}"
        return reason
    if [t.shape for t in got] != expected:
        alone[target.name] = "is needed as it is: the outputs would change shape"
    return alone.get(target.name, "")


def _chain(target: _Target, ranks: Sequence[int]) -> list[Layer]:
    """The layers that a target would become, with their costs."""
    wide, narrow = target.layer.weight.shape[:2]
    where = target.positions
    rows: list[tuple[tuple[int, ...], int]]
    if target.method == "svd":
        (rank,) = ranks
        ends = (1, 1) if isinstance(target.layer, nn.Conv2d) else ()
        # the first factor has the stride
        rows = [((rank, narrow, *ends), where.after), ((wide, rank, *ends), where.after)]
    else:
        height, width = target.layer.weight.shape[2:]
        if target.method == "tucker":
            out, into = ranks
            rows = [
                ((into, narrow, 1, 1), where.before),
                ((out, into, height, width), where.after),
                ((wide, out, 1, 1), where.after),
            ]
        else:
            (rank,) = ranks
            rows = [
                ((rank, narrow, 1, 1), where.before),
                ((rank, 1, height, 1), where.between),
                ((rank, 1, 1, width), where.after),
                ((wide, rank, 1, 1), where.after),
            ]
    return [_layer(target, f".{number}", *row) for number, row in enumerate(rows)]


def _macs(target: _Target, ranks: Sequence[int]) -> int:
    return sum(layer.macs for layer in _chain(target, ranks))


def _is_slower(target: _Target, ranks: Sequence[int], seconds: Cost | None) -> bool:
    return seconds is not None and seconds(_chain(target, ranks)) >= seconds([_whole(target)])


def _whole(target: _Target) -> Layer:
    return _layer(target, "", tuple(target.layer.weight.shape), target.positions.after)


def _layer(target: _Target, suffix: str, shape: tuple[int, ...], positions: int) -> Layer:
    count = math.prod(shape)
    kind = type(target.layer).__name__
    return Layer(target.name + suffix, kind, shape, count, count * positions, count)


def _guess(target: _Target, round_to: int, seconds: Cost | None) -> Split | str:
    """The ranks of variational Bayes, or why the layer stays."""
    kernel = target.kernel()
    ranks = [vbmf_rank(matrix) for matrix in unfoldings_of(kernel, target.method)]
    if min(ranks) == 0:
        return "has no ranks that stand out from noise"
    if target.method == "cp":
        ranks = [max(ranks)]
    limits = _limits(target)
    ranks = [
        next((r for r in _grid(limit, round_to) if r >= rank), limit)
        for rank, limit in zip(ranks, limits, strict=True)
    ]
    was, now = _whole(target).macs, _macs(target, ranks)
    if now >= was:
        return f"would do {now / was:.2f} times as many MACs with ranks {ranks} of {list(limits)}"
    if _is_slower(target, ranks, seconds):
        return f"would take longer with ranks {ranks} of {list(limits)}"
    return Split(target.method, tuple(ranks), 0.0, now, was)


def _limits(target: _Target) -> tuple[int, ...]:
    """The largest ranks that can be of use: the channels; for CP, where it costs as much as the whole."""
    wide, narrow = target.layer.weight.shape[:2]
    if target.method == "svd":
        return (min(wide, narrow),)
    if target.method == "tucker":
        return (wide, narrow)
    return (max(1, _whole(target).macs // _macs(target, [1])),)


def _grid(limit: int, round_to: int) -> list[int]:
    """The ranks to choose from: multiples, or all where there would be but one."""
    if limit <= 2 * round_to:
        return list(range(1, limit + 1))
    return list(range(round_to, limit, round_to))


def _choices(target: _Target, round_to: int, seconds: Cost | None, *, few: bool) -> list[Split]:
    """Ranks at which the layer is cheaper than whole, none both dearer and worse than another,
    cheapest first; ``few`` where each is to be tried out."""
    kernel = target.kernel()
    was = _whole(target).macs
    grids = [_grid(limit, round_to) for limit in _limits(target)]
    if target.method == "cp":
        most = grids[0][-1]
        wanted = [most * step for step in STEPS]
        grids = [sorted({min(grids[0], key=lambda r, w=w: abs(r - w)) for w in wanted})]  # type: ignore[misc]
    spectrum = spectrum_of(kernel, target.method)
    found = []
    for ranks in itertools.product(*grids):
        now = _macs(target, ranks)
        if now < was and not _is_slower(target, ranks, seconds):
            if target.method == "cp":
                kept = energy_of(kernel, "cp", ranks)
            else:
                kept = float(spectrum[tuple(r - 1 for r in ranks)])
            found.append(Split(target.method, ranks, kept, now, was, loss=1 - kept))
    front: list[Split] = []
    for split in sorted(found, key=lambda s: (s.macs, -s.energy)):
        if not front or split.energy > front[-1].energy:
            front.append(split)
    if few and len(front) > len(STEPS):
        nearest = {min(range(len(front)), key=lambda i, s=s: abs(front[i].macs - s * was)) for s in STEPS}  # type: ignore[misc]  # fmt: skip
        front = [front[i] for i in sorted(nearest)]
    return front


def _fill(model: nn.Module, name: str, split: Split, metric: _Metric) -> None:
    """Put the factored layer in the place of ``name``."""
    layer = model.get_submodule(name)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    target = _Target(name, layer, split.method, _Positions(), metric)
    factors = factors_of(target.kernel(), split.method, split.ranks)
    factors[-1] = factors[-1] / metric.scale[:, None]
    if metric.root is not None:
        factors[0] = np.linalg.solve(metric.root, factors[0].T).T
    edit = {"edit": "low_rank", "layer": name, "method": split.method, "ranks": split.ranks}
    apply_edits(model, [edit])
    parts: Any = model.get_submodule(name)
    with torch.no_grad():
        for part, values in zip(parts, factors, strict=True):
            part.weight.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(part.weight.shape))  # fmt: skip
        if layer.bias is not None:
            parts[-1].bias.copy_(layer.bias)


def _cheapest(choices: Mapping[str, list[Split]], bound: float) -> dict[str, Split]:
    """Of each layer the cheapest ranks that lose no more than ``bound``; layers with none are absent."""
    chosen = {}
    for name, splits in choices.items():
        fitting = [s for s in splits if s.loss <= bound]
        if fitting:
            chosen[name] = min(fitting, key=lambda s: s.macs)
    return chosen


def _saved(splits: Mapping[str, Split]) -> int:
    return sum(s.was - s.macs for s in splits.values())


def _bound_for(choices: Mapping[str, list[Split]], whole: int, share: float) -> float:
    """The smallest common bound on the loss at which the model does ``share`` of its MACs."""
    bounds = sorted({s.loss for splits in choices.values() for s in splits})
    for bound in bounds:
        if whole - _saved(_cheapest(choices, bound)) <= share * whole:
            return bound
    least = (whole - _saved(_cheapest(choices, math.inf))) / whole
    raise StageError(
        f"low rank cannot bring this model to {100 * share:.0f} % of its MACs: the smallest ranks leave {100 * least:.0f} %",
        stage=STAGE,
        hint="prune channels first, or ask for less",
        code="out-of-reach",
    )


def _measured(
    model: nn.Module,
    choices: Mapping[str, list[Split]],
    metrics: Mapping[str, _Metric],
    score: Callable[[nn.Module], float],
    whole: int,
    share: float,
    max_drop: float,
) -> dict[str, Split]:
    """Ranks by what each layer loses of the score when it alone is factored, in points."""
    before = score(model)
    measured: dict[str, list[Split]] = {}
    count = sum(len(splits) for splits in choices.values())
    log.info("measuring %d ranks of %d layers; whole: %.2f %%", count, len(choices), 100 * before)

    def drop(splits: Mapping[str, Split]) -> float:
        trial = copy.deepcopy(model)
        for name, split in splits.items():
            _fill(trial, name, split, metrics[name])
        return max(0.0, 100 * (before - score(trial)))

    for name, splits in choices.items():
        measured[name] = [dataclasses.replace(s, loss=drop({name: s})) for s in splits]
        log.info("%s: %s points", name, ", ".join(f"{s.loss:.2f}" for s in measured[name]))
    if share:
        return _cheapest(measured, _bound_for(measured, whole, share))
    bounds = sorted({s.loss for splits in measured.values() for s in splits})
    low, high = 0, len(bounds)  # bounds[:low] hold together, bounds[high:] do not
    while low < high:
        middle = (low + high) // 2
        lost = drop(_cheapest(measured, bounds[middle]))
        log.info("up to %.2f points for each layer: %.2f together", bounds[middle], lost)
        if lost <= max_drop:
            low = middle + 1
        else:
            high = middle
    return _cheapest(measured, bounds[low - 1]) if low else {}
