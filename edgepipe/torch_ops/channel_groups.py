"""What must be cut together: groups of channels that several layers share, and attention heads.

Which layers lose a channel together (a convolution, its batch norm, what is added to it, the next
layer's inputs) comes from torch-pruning's dependency graph (Fang et al. 2023, "DepGraph",
https://arxiv.org/abs/2301.12900). What it does not know is added here: channels of grouped
convolutions go in sets, one of each group, and attention loses whole heads.

No group is believed: `why_not_exact` proves on the model itself that cutting computes the same as
silencing what is cut (its weights set to 0). A group of which that is not true stays whole.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from edgepipe.errors import StageError
from edgepipe.torch_ops.edits import PRUNABLE_LAYERS, apply_edits, is_depthwise
from edgepipe.torch_ops.run import flatten_outputs

STAGE = "prune"

# Attributes under which attention modules keep how many heads they have, and their width (all heads)
HEAD_ATTRIBUTES = ("num_heads", "heads", "n_heads", "n_head", "nhead", "num_attention_heads")
WIDTH_ATTRIBUTES = ("all_head_size", "inner_dim", "attn_dim")

# (layer or parameter, "in" | "out" | "" for a parameter, dim of a parameter else -1)
Key = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class Group:
    """``units`` things of ``size`` channels each, any of which can be removed.

    A unit is a channel, a set of channels (one of each group of a grouped convolution), or a head.
    ``places`` says for each layer which index belongs to which unit; ``layers`` are those that lose
    outputs, the first names the group. ``counts`` are attributes that hold the number of heads, or
    their width: (module, attribute, value for one unit).
    """

    name: str
    layers: tuple[str, ...]
    units: int
    size: int
    places: Mapping[Key, tuple[tuple[int, int], ...]]
    counts: tuple[tuple[str, str, int], ...] = ()

    @property
    def channels(self) -> int:
        return self.units * self.size


def edits_for(removed: Iterable[tuple[Group, Iterable[int]]]) -> list[dict[str, Any]]:
    """The edits that remove these units. All indices are those of the uncut model, so what several
    groups remove from one axis of a layer is one edit."""
    cuts: dict[Key, set[int]] = {}
    counts = []
    for group, units in removed:
        gone = set(units)
        for key, places in group.places.items():
            cuts.setdefault(key, set()).update(index for index, unit in places if unit in gone)
        for module, attribute, each in group.counts:
            value = each * (group.units - len(gone))
            counts.append({"edit": "set", "layer": module, "attribute": attribute, "value": value})
    return [
        {"edit": "prune", "layer": name, "axis": axis, "remove": sorted(indices)}
        if axis
        else {"edit": "prune_parameter", "parameter": name, "dim": dim, "remove": sorted(indices)}
        for (name, axis, dim), indices in cuts.items()
        if indices
    ] + counts


def find_groups(
    model: nn.Module, inputs: Sequence[torch.Tensor], *, ignore: Sequence[str]
) -> tuple[list[Group], dict[str, str]]:
    """Groups that can be cut, and for all others, by the name of their first layer, why not.

    Raises StageError (``cannot-trace``) where the dependencies cannot be followed, or where the model
    computes with parameters that are not its own.
    """
    graph = _trace(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[Group, ...]] = []
    left_whole: dict[str, str] = {}
    try:
        for raw in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)):
            cut = {d.target.module for d, _ in raw if graph.is_out_channel_pruning_fn(d.handler)}
            first = next(name for module, name in names.items() if module in cut)
            reason = _why_whole(graph, raw, names, ignore)
            readings = () if reason else _groups_of(graph, raw, first, names)
            if readings:
                found.append(readings)
            else:
                left_whole[first] = reason or "has channels that cannot be told apart"
    except (IndexError, KeyError, AssertionError, AttributeError, RuntimeError) as exc:
        raise _cannot_trace(f"{type(exc).__name__}: {str(exc)[:300]}") from exc
    return _proven(model, inputs, found, left_whole), left_whole


def _proven(
    model: nn.Module, inputs: Sequence[torch.Tensor],
    found: Sequence[tuple[Group, ...]], left_whole: dict[str, str],
) -> list[Group]:  # fmt: skip
    """Of each group the reading by which half of it can be cut exactly; others go to ``left_whole``."""
    proof = Proof(model, inputs)

    def half(group: Group) -> tuple[Group, list[int]]:
        # any half: that of every other channel, or the first half, may be exact where others are not
        order = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
        return group, order[: group.units // 2].tolist()

    several = []
    for readings in found:
        if readings[0].units > 1:
            several.append(readings)
        else:
            left_whole[readings[0].name] = "has a single channel to cut"
    if not proof.why_not_exact(edits_for(half(readings[0]) for readings in several)):
        return [readings[0] for readings in several]
    exact = []
    for readings in several:
        problems = [proof.why_not_exact(edits_for([half(group)])) for group in readings]
        if "" in problems:
            exact.append(readings[problems.index("")])
        else:
            # of attention, why not even heads can be cut
            left_whole[readings[0].name] = f"is needed whole: {problems[min(1, len(problems) - 1)]}"
    return exact


class Proof:
    """Whether a model with some edits computes what the model computes with the same parts silenced."""

    def __init__(self, model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        self.inputs = [t.double() if t.is_floating_point() else t for t in inputs]
        self.model = copy.deepcopy(model).double()
        self.tolerance = 1e-6  # double precision; a wrong cut changes outputs by far more
        try:
            self.shapes = [t.shape for t in _run(self.model, self.inputs)]
        except RuntimeError:  # a forward that insists on float32
            self.inputs, self.model, self.tolerance = list(inputs), copy.deepcopy(model), 1e-3
            self.shapes = [t.shape for t in _run(self.model, self.inputs)]

    def why_not_exact(self, edits: Sequence[Mapping[str, Any]]) -> str:
        """Why the cut model is not exact, or an empty string."""
        try:
            cut = _run(apply_edits(copy.deepcopy(self.model), edits), self.inputs)
        except Exception as exc:  # noqa: BLE001 - whatever the user's forward raises is the answer
            return f"{type(exc).__name__}: {str(exc).splitlines()[0][:200]}"
        shapes = [t.shape for t in cut]
        if shapes != self.shapes:
            return f"outputs {[tuple(s) for s in shapes]} instead of {[tuple(s) for s in self.shapes]}"  # fmt: skip
        for one, other in zip(cut, _run(_silenced(self.model, edits), self.inputs), strict=True):
            scale = other.abs().max().item() if other.numel() else 0.0
            if not torch.allclose(one, other, rtol=0, atol=self.tolerance * scale + 1e-12):
                return "without its channels the others compute something else"
        return ""


def _run(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return flatten_outputs(model(*inputs))


def _silenced(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> nn.Module:
    """A copy with every weight that the edits remove set to 0, and normalised without it."""
    numbered, silenced = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)
        kept = dict(apply_edits(numbered, edits).named_parameters())
        for name, parameter in silenced.named_parameters():
            if name not in kept:  # of a layer that was replaced, of which nothing is removed
                continue
            mask = torch.zeros(parameter.numel(), dtype=parameter.dtype)
            mask[kept[name].detach().flatten().long()] = 1
            parameter.mul_(mask.view_as(parameter))
    for edit in edits:
        layer = silenced.get_submodule(edit["layer"]) if edit["edit"] == "prune" else None
        if isinstance(layer, nn.LayerNorm):
            gone = set(edit["remove"])
            _normalise_only(layer, [i for i in range(layer.normalized_shape[-1]) if i not in gone])
    return silenced


def _normalise_only(layer: nn.LayerNorm, kept: list[int]) -> None:
    index = torch.tensor(kept)

    def hook(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        weight, bias = (p if p is None else p.index_select(-1, index) for p in (layer.weight, layer.bias))  # fmt: skip
        shape = [*layer.normalized_shape[:-1], len(kept)]
        part = functional.layer_norm(given[0].index_select(-1, index), shape, weight, bias, layer.eps)  # fmt: skip
        return torch.zeros_like(output).index_copy(-1, index, part)

    layer.register_forward_hook(hook)


def _trace(model: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    for parameter in model.parameters():  # the graph is found by following gradients
        parameter.requires_grad_(True)
    own = set(model.parameters())

    def outputs(value: Any) -> list[torch.Tensor]:
        tensors = flatten_outputs(value)
        foreign = _leaves(tensors) - own
        if foreign:
            shapes = ", ".join(sorted(str(tuple(p.shape)) for p in foreign)[:4])
            raise _cannot_trace(
                f"it computes with {len(foreign)} parameters that are not its own ({shapes}): layers created in forward",
                hint="create layers in __init__, so that their weights are trained, saved and pruned",
            )
        return tensors

    try:
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs=tuple(inputs), output_transform=outputs, verbose=False
            )
    except StageError:
        raise
    except Exception as exc:
        raise _cannot_trace(f"{type(exc).__name__}: {str(exc)[:300]}") from exc


def _leaves(tensors: Sequence[torch.Tensor]) -> set[torch.Tensor]:
    """The parameters that these tensors were computed from."""
    pending = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen, leaves = set(pending), set[torch.Tensor]()
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)  # of AccumulateGrad
        if isinstance(variable, nn.Parameter):
            leaves.add(variable)
        for inner, _ in node.next_functions:
            if inner is not None and inner not in seen:
                seen.add(inner)
                pending.append(inner)
    return leaves


def _cannot_trace(reason: str, hint: str = "") -> StageError:
    return StageError(
        f"the dependencies between the layers cannot be traced: {reason}",
        stage=STAGE,
        hint=hint or "torch-pruning follows convolutions, linear and normalisation layers, but not recurrent ones or "
        "shuffled channels; leave the stage out for this model",
        code="cannot-trace",
    )  # fmt: skip


def _why_whole(
    graph: Any, raw: Any, names: Mapping[nn.Module, str], ignore: Sequence[str]
) -> str:  # fmt: skip
    """The reason why a group must keep all its channels, or an empty string."""
    for dep, _ in raw:
        module = dep.target.module
        cuts_outputs = graph.is_out_channel_pruning_fn(dep.handler)
        if cuts_outputs and not dep.target.outputs:
            return "makes an output of the model"
        if isinstance(module, nn.Parameter) or module not in names:
            continue
        name = names[module]
        if cuts_outputs and any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
            return f"is ignored: {name}"
        if isinstance(module, nn.GroupNorm) or not isinstance(module, PRUNABLE_LAYERS):
            return f"goes with {name}, a {type(module).__name__}"
    return ""


def _groups_of(
    graph: Any, raw: Any, first: str, names: Mapping[nn.Module, str]
) -> tuple[Group, ...]:
    """The group, and as heads where it may be the inside of an attention: readings to be tried in
    this order. None where torch-pruning does not say which channel is which."""
    places: dict[Key, list[tuple[int, int]]] = {}
    layers: dict[Key, nn.Module] = {}
    sets = 1
    for item in raw:
        module, handler = item.dep.target.module, item.dep.handler
        if isinstance(module, nn.Parameter):
            key = (graph._param_to_name[module], "", item.dep.target.pruning_dim)
        elif module in names:
            cuts_outputs = graph.is_out_channel_pruning_fn(handler)
            key = (names[module], "out" if cuts_outputs else "in", -1)
            layers[key] = module
        else:
            continue  # an operation such as cat or flatten: nothing stored
        if None in item.root_idxs:
            return ()
        places.setdefault(key, []).extend(zip(item.idxs, item.root_idxs, strict=True))
        if isinstance(module, _ConvNd) and not is_depthwise(module):
            sets = math.lcm(sets, module.groups)
    cut = tuple(dict.fromkeys([first, *(name for name, axis, _ in places if axis == "out")]))
    channels = 1 + max(unit for pairs in places.values() for _, unit in pairs)
    if channels % sets:
        return ()
    readings: tuple[Group, ...] = ()
    if len(layers) == len(places):
        count = {"in": graph.get_in_channels, "out": graph.get_out_channels}
        sizes = {key: count[key[1]](layer) for key, layer in layers.items()}
        readings = _attention(cut, sizes, {name: module for module, name in names.items()})
    share = channels // sets  # channel c of a convolution in groups is number c % share of its own
    unified = {key: tuple((i, c % share) for i, c in pairs) for key, pairs in places.items()}
    return (Group(first, cut, share, sets, unified), *readings)


def _attention(
    cut: tuple[str, ...], sizes: Mapping[Key, int], modules: Mapping[str, nn.Module]
) -> tuple[Group, ...]:
    """The heads of an attention, where layers that are cut together (``sizes``: channels of the axes)
    belong to one module that says how many heads it has; else nothing.

    One layer that gives queries, keys and values has them as (3, heads, width) or (heads, 3, width).
    """
    paths = [name.split(".") for name, _, _ in sizes]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    owner = ".".join(parts[0] for parts in shared)
    widths = {size for (_, axis, _), size in sizes.items() if axis == "in"}
    if len(widths) != 1 or len(sizes) < 2:
        return ()
    (width,), module = widths, modules[owner]
    counts = [(n, v) for n in HEAD_ATTRIBUTES if type(v := getattr(module, n, None)) is int]
    heads = counts[0][1] if counts else 1
    if heads < 2 or any(value != heads for _, value in counts) or width % heads:
        return ()
    if any(size not in (width, 3 * width) for size in sizes.values()):
        return ()
    each = width // heads
    keep = [(owner, name, 1) for name, _ in counts]
    keep += [(owner, name, each) for name in WIDTH_ATTRIBUTES if getattr(module, name, None) == width]  # fmt: skip
    readings = (
        {key: tuple((i, i % width // each) for i in range(size)) for key, size in sizes.items()},
        {key: tuple((i, i * heads // size) for i in range(size)) for key, size in sizes.items()},
    )
    return tuple(Group(cut[0], cut, heads, each, places, tuple(keep)) for places in readings)
