"""Replaying the edits that compression made to a model, from plain data and without its library.

A pruned model is its builder's model plus a list of edits, each readable on its own::

    {"edit": "prune", "layer": "features.3", "axis": "out", "remove": [1, 6]}
    {"edit": "prune_parameter", "parameter": "position", "dim": 2, "remove": [0]}

``axis`` is ``out`` or ``in`` of a convolution or linear layer; layers with one axis (batch norm,
depthwise convolution, ...) use ``out``. ``remove`` are indices at the moment of the edit, so edits
are replayed in order. Example: removing channel 1 of ``Conv2d(1, 4, 3)`` turns its weight
(4, 1, 3, 3) into (3, 1, 3, 3), keeping rows 0, 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from edgepipe.errors import ArtifactError

PRUNABLE_LAYERS = (
    _ConvNd,
    nn.Linear,
    _BatchNorm,
    _InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
)


def apply_edits(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Apply ``edits`` to ``model`` in place, in order, and return it.

    Raises ArtifactError where an edit is unknown or does not fit the model.
    """
    for number, edit in enumerate(edits, 1):
        try:
            if edit["edit"] == "prune":
                layer = model.get_submodule(edit["layer"])
                _prune_layer(layer, axis=edit["axis"], remove=edit["remove"])
            elif edit["edit"] == "prune_parameter":
                owner, _, name = edit["parameter"].rpartition(".")
                _slice(model.get_submodule(owner), name, edit["dim"], edit["remove"])
            else:
                raise ValueError(f"unknown kind of edit {edit['edit']!r}")
        except (KeyError, AttributeError, IndexError, TypeError, ValueError) as exc:
            target = edit.get("layer") or edit.get("parameter") or "?"
            raise ArtifactError(
                f"edit {number} ({edit.get('edit', '?')} {target}) does not fit the model: {exc}",
                hint="the builder no longer makes the model that was compressed; restore it, or run the recipe again",
            ) from exc
    return model


def is_depthwise(layer: nn.Module) -> bool:
    """One filter per channel: input, output and groups shrink together."""
    return (
        isinstance(layer, _ConvNd)
        and layer.groups > 1
        and layer.groups == layer.in_channels == layer.out_channels
    )


def _kept(size: int, remove: Sequence[int]) -> list[int]:
    gone = set(remove)
    if not all(0 <= index < size for index in gone) or len(gone) >= size:
        raise ValueError(
            f"cannot remove {len(gone)} of {size} channels (indices up to {max(gone)})"
        )
    return [index for index in range(size) if index not in gone]


def _slice(owner: nn.Module, name: str, dim: int, remove: Sequence[int]) -> None:
    """Replace one parameter or buffer by what is left of it along ``dim``. Absent ones stay absent."""
    old = getattr(owner, name)
    if old is None:
        return
    kept = torch.tensor(_kept(old.shape[dim], remove))
    new = torch.index_select(old.detach(), dim, kept)
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(owner, name, new)


def _prune_layer(layer: nn.Module, *, axis: str, remove: Sequence[int]) -> None:
    if axis not in ("in", "out"):
        raise ValueError(f"axis {axis!r} is neither 'in' nor 'out'")
    if isinstance(layer, _ConvNd):
        _prune_conv(layer, axis=axis, remove=remove)
    elif isinstance(layer, nn.Linear):
        _slice(layer, "weight", 0 if axis == "out" else 1, remove)
        if axis == "out":
            _slice(layer, "bias", 0, remove)
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, (_BatchNorm, _InstanceNorm)):
        left = len(_kept(layer.num_features, remove))
        for name in ("weight", "bias", "running_mean", "running_var"):
            _slice(layer, name, 0, remove)
        layer.num_features = left
    elif isinstance(layer, nn.LayerNorm):
        left = len(_kept(layer.normalized_shape[-1], remove))
        for name in ("weight", "bias"):
            _slice(layer, name, -1, remove)
        layer.normalized_shape = (*layer.normalized_shape[:-1], left)
    elif isinstance(layer, nn.GroupNorm):
        left = len(_kept(layer.num_channels, remove))
        if left % layer.num_groups:
            raise ValueError(f"{left} channels do not divide into {layer.num_groups} groups")
        for name in ("weight", "bias"):
            _slice(layer, name, 0, remove)
        layer.num_channels = left
    elif isinstance(layer, nn.PReLU):
        if layer.num_parameters > 1:  # one shared slope has no channels
            _slice(layer, "weight", 0, remove)
            layer.num_parameters = layer.weight.shape[0]
    elif isinstance(layer, nn.Embedding):
        _slice(layer, "weight", 1, remove)
        layer.embedding_dim = layer.weight.shape[1]
    else:
        raise TypeError(f"no way to prune a {type(layer).__name__}")


def _prune_conv(layer: _ConvNd, *, axis: str, remove: Sequence[int]) -> None:
    # weight: (out, in/groups, *kernel); transposed: (in, out/groups, *kernel)
    transposed = isinstance(layer, _ConvTransposeNd)
    if is_depthwise(layer):
        left = len(_kept(layer.groups, remove))
        _slice(layer, "weight", 0, remove)
        _slice(layer, "bias", 0, remove)
        layer.in_channels = layer.out_channels = layer.groups = left
        return
    # the axis stored whole (dim 0) can be cut anywhere; the other holds one group's share (dim 1)
    whole_axis = "in" if transposed else "out"
    size = layer.out_channels if axis == "out" else layer.in_channels
    kept = _kept(size, remove)
    per_group = _kept_per_group(kept, size, layer.groups)
    if axis == whole_axis:
        _slice(layer, "weight", 0, remove)
    else:
        blocks = layer.weight.detach().chunk(layer.groups, dim=0)
        cut = [b.index_select(1, torch.tensor(k)) for b, k in zip(blocks, per_group, strict=True)]
        layer.weight = nn.Parameter(torch.cat(cut, dim=0), layer.weight.requires_grad)
    if axis == "out":
        _slice(layer, "bias", 0, remove)
        layer.out_channels = len(kept)
    else:
        layer.in_channels = len(kept)


def _kept_per_group(kept: Sequence[int], size: int, groups: int) -> list[list[int]]:
    """Kept indices of each group, relative to it: kept 0, 2 of 4 in 2 groups -> [[0], [0]]."""
    share = size // groups
    lists: list[list[int]] = [[] for _ in range(groups)]
    for index in kept:
        lists[index // share].append(index % share)
    if len({len(indices) for indices in lists}) != 1:
        raise ValueError(f"the {groups} groups would keep different numbers of channels")
    return lists
