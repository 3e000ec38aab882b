"""Structured channel pruning: which channels to remove, as edits that `edits.apply_edits` replays.

Layers that must lose the same channels together (a convolution, its batch norm, what is added to
it, the next layer's inputs) come from torch-pruning's dependency graph, and so does the importance
of a channel: the L2 norm of its weights, averaged over the layers of its group (Fang et al. 2023,
"DepGraph", https://arxiv.org/abs/2301.12900, eq. 5, no sparsity training). torch-pruning only plans;
the model is changed by the edits alone, so that a saved model needs no torch-pruning to load.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn
from torch.nn.modules.conv import _ConvNd

from edgepipe.errors import StageError, StageOptionError
from edgepipe.schema import near_miss
from edgepipe.torch_ops.edits import PRUNABLE_LAYERS, apply_edits, is_depthwise
from edgepipe.torch_ops.run import flatten_outputs

log = logging.getLogger(__name__)

STAGE = "prune"


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """``edits`` to make; channels ``(before, after)`` per group, named by its first layer; groups
    that stay whole, with the reason."""

    edits: tuple[dict[str, Any], ...]
    channels: dict[str, tuple[int, int]]
    left_whole: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Group:
    name: str
    root: nn.Module
    importance: torch.Tensor  # (channels,)


# (layer or parameter, axis, dim of a parameter else -1) -> indices to remove from it
_Cuts = dict[tuple[str, str, int], set[int]]


def plan_pruning(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    ratio: float,
    round_to: int,
    ranking: Literal["layer", "global"],
    ignore: Sequence[str],
) -> PruningPlan:
    """Choose the least important channels; ``model`` is not changed.

    ``ratio`` is the share of channels to remove, of each group or (``ranking`` ``global``) of all
    together; what is kept is rounded to the nearest multiple of ``round_to``, at least one.
    Example: 64 channels, ratio 0.3, round_to 8 -> 44.8 -> 48 kept. Groups that end in an output of
    the model, match a pattern in ``ignore``, hold a layer that cannot be cut (grouped convolution,
    attention, recurrent), or without which the model does not run, stay whole.

    Raises StageError where the model cannot be traced, a layer would be left empty, or nothing can
    be pruned; StageOptionError for a pattern that matches no layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning warns of what is checked here
        return _plan(copy.deepcopy(model).eval(), inputs, ratio, round_to, ranking, ignore)


def _plan(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    ratio: float,
    round_to: int,
    ranking: str,
    ignore: Sequence[str],
) -> PruningPlan:
    names = {module: name for name, module in model.named_modules()}
    for pattern in ignore:
        if not fnmatch.filter(names.values(), pattern):
            raise StageOptionError(
                f"prune: ignore pattern {pattern!r} matches no layer{near_miss(pattern, list(names.values()))}",
                hint=f"layers: {', '.join(n for n in names.values() if n)}"[:500],
            )
    graph = _trace(model, inputs)
    try:
        groups, left_whole = _find_groups(graph, names, ignore)
        kept = _channels_to_keep(groups, ratio=ratio, round_to=round_to, ranking=ranking)
        cuts: dict[str, _Cuts] = {}
        for group in groups:
            count = len(group.importance)
            if kept[group.name] >= count:
                left_whole[group.name] = f"has {count} channels, to be rounded to {round_to}"
                continue
            # stable: of equal channels the first are removed, on every machine
            chosen = torch.argsort(group.importance, stable=True)[: count - kept[group.name]]
            cuts[group.name] = _cuts(graph, group.root, sorted(chosen.tolist()), names)
    except (IndexError, KeyError, AssertionError, AttributeError, RuntimeError) as exc:
        raise _cannot_trace(exc) from exc
    expected = _shapes(model, inputs)
    if cuts and _try_edits(model, inputs, _edits(cuts.values()), expected):
        for name in list(cuts):  # some group cannot be cut: find out which
            problem = _try_edits(model, inputs, _edits([cuts[name]]), expected)
            if problem:
                left_whole[name] = f"is needed whole: {problem}"
                del cuts[name]
    for name, reason in left_whole.items():
        log.info("%s is left whole: it %s", name, reason)
    if not cuts:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(left_whole.items())[:4])
        raise StageError(
            f"no layer of this model can be pruned: {reasons or 'no convolution or linear layer'}",
            stage=STAGE,
            hint="lower round_to, raise ratio, or leave the stage out",
            code="nothing-to-prune",
        )
    edits = _edits(cuts.values())
    problem = _try_edits(model, inputs, edits, expected)
    if problem:
        raise StageError(
            f"the pruned model does not run: {problem}",
            stage=STAGE,
            hint=f"keep some layers whole, like ignore = [{next(iter(cuts))!r}]",
        )
    channels = {g.name: (len(g.importance), kept[g.name]) for g in groups if g.name in cuts}
    return PruningPlan(tuple(edits), channels, left_whole)


def _find_groups(
    graph: Any, names: dict[nn.Module, str], ignore: Sequence[str]
) -> tuple[list[_Group], dict[str, str]]:
    """Groups that may be cut, and why the others may not."""
    scorer = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    groups, left_whole = [], {}
    for group in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)):
        reason = _why_whole(graph, group, names, ignore)
        cut = {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}  # fmt: skip
        first = next(name for module, name in names.items() if module in cut)
        if reason:
            left_whole[first] = reason
        else:
            groups.append(_Group(first, group[0].dep.target.module, scorer(group)))
    return groups, left_whole


def _trace(model: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    for parameter in model.parameters():  # the graph is found by following gradients
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                model,
                example_inputs=tuple(inputs),
                output_transform=flatten_outputs,
                verbose=False,
            )
    except Exception as exc:
        raise _cannot_trace(exc) from exc


def _cannot_trace(exc: Exception) -> StageError:
    return StageError(
        f"the dependencies between the layers cannot be traced: {type(exc).__name__}: {str(exc)[:300]}",
        stage=STAGE,
        hint="torch-pruning follows convolutions, linear and normalisation layers, but not recurrent ones or "
        "shuffled channels; leave the stage out for this model",
        code="cannot-trace",
    )


def _why_whole(
    graph: Any, group: Any, names: dict[nn.Module, str], ignore: Sequence[str]
) -> str:  # fmt: skip
    """The reason why a group must keep all its channels, or an empty string."""
    for dep, _ in group:
        module = dep.target.module
        cuts_outputs = graph.is_out_channel_pruning_fn(dep.handler)
        if cuts_outputs and not dep.target.outputs:
            return "makes an output of the model"
        if isinstance(module, nn.Parameter) or module not in names:
            continue
        name = names[module]
        if cuts_outputs and any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
            return f"is ignored: {name}"
        grouped = isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module)
        if grouped or isinstance(module, nn.GroupNorm) or not isinstance(module, PRUNABLE_LAYERS):
            return f"goes with {name}, a {'grouped ' if grouped else ''}{type(module).__name__}"
    return ""


def _channels_to_keep(
    groups: Sequence[_Group], *, ratio: float, round_to: int, ranking: str
) -> dict[str, int]:
    threshold = math.nan
    if ranking == "global" and groups:
        # importances are divided by their group's mean, so that groups compare
        threshold = torch.cat([g.importance for g in groups]).quantile(ratio).item()
    kept = {}
    for group in groups:
        count = len(group.importance)
        wanted = count * (1 - ratio)
        if ranking == "global":
            wanted = float((group.importance > threshold).sum())
        if wanted < 1:
            raise StageError(
                f"ratio {ratio:g} would leave layer {group.name!r} ({count} channels) empty",
                stage=STAGE,
                hint=f'lower ratio, or ignore = ["{group.name}"]',
                code="layer-emptied",
            )
        kept[group.name] = min(count, max(round_to, round(wanted / round_to) * round_to))
    return kept


def _cuts(graph: Any, root: nn.Module, chosen: list[int], names: dict[nn.Module, str]) -> _Cuts:
    """What to remove where, so that the ``chosen`` output channels of ``root`` are gone."""
    prune_out: Callable[..., Any] = graph.get_pruner_of_module(root).prune_out_channels
    cuts: _Cuts = {}
    for dep, indices in graph.get_pruning_group(root, prune_out, chosen):
        module = dep.target.module
        if isinstance(module, nn.Parameter):
            key = (graph._param_to_name[module], "", dep.target.pruning_dim)
        elif module in names:
            is_in = graph.is_in_channel_pruning_fn(
                dep.handler
            ) and not graph.is_out_channel_pruning_fn(dep.handler)
            key = (names[module], "in" if is_in else "out", -1)
        else:
            continue  # an operation such as cat or flatten: nothing stored
        cuts.setdefault(key, set()).update(indices)
    return cuts


def _edits(groups: Iterable[_Cuts]) -> list[dict[str, Any]]:
    """All indices are those of the unpruned model, so several groups' cuts of a layer are one edit."""
    removed: _Cuts = {}
    for cuts in groups:
        for key, indices in cuts.items():
            removed.setdefault(key, set()).update(indices)
    return [
        {"edit": "prune", "layer": name, "axis": axis, "remove": sorted(indices)}
        if axis
        else {"edit": "prune_parameter", "parameter": name, "dim": dim, "remove": sorted(indices)}
        for (name, axis, dim), indices in removed.items()
    ]


def _shapes(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Size]:
    with torch.no_grad():
        return [t.shape for t in flatten_outputs(model(*inputs))]


def _try_edits(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    edits: list[dict[str, Any]],
    expected: list[torch.Size],
) -> str:
    """Why a copy of the model with these edits is no working model, or an empty string."""
    try:
        shapes = _shapes(apply_edits(copy.deepcopy(model), edits), inputs)
    except Exception as exc:  # noqa: BLE001 - whatever the user's forward raises is the answer
        return f"{type(exc).__name__}: {str(exc).splitlines()[0][:200]}"
    return "" if shapes == expected else f"outputs {shapes} instead of {expected}"
