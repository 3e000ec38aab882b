"""Replaying the edits that compression made to a model, from plain data and without its library.

A compressed model is its builder's model plus a list of edits, each readable on its own::

    {"edit": "prune", "layer": "features.3", "axis": "out", "remove": [1, 6]}
    {"edit": "prune_parameter", "parameter": "position", "dim": 2, "remove": [0]}
    {"edit": "plain_attention", "layer": "blocks.0.attention"}
    {"edit": "set", "layer": "blocks.0.attention", "attribute": "num_heads", "value": 3}
    {"edit": "low_rank", "layer": "features.4", "method": "tucker", "ranks": [16, 8]}
    {"edit": "sparse", "layer": "features.6", "pattern": "2:4"}

``axis`` is ``out`` or ``in`` of a convolution or linear layer; layers with one axis (batch norm,
depthwise convolution, ...) use ``out``. ``remove`` are indices at the moment of the edit, so edits
are replayed in order. Example: removing channel 1 of ``Conv2d(1, 4, 3)`` turns its weight
(4, 1, 3, 3) into (3, 1, 3, 3), keeping rows 0, 2 and 3. ``plain_attention`` puts four linear layers
(`attention.Attention`) in the place of an ``nn.MultiheadAttention``, whose heads can then be cut like
channels; ``set`` says how many are left.

``low_rank`` puts a sequence of smaller layers in the place of one (`factor_layers`). ``sparse``
changes no structure: it marks a layer whose zero weights stay zero in all training (`sparse_weights`).
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
from edgepipe.torch_ops.attention import Attention

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


# the attribute of a layer that a ``sparse`` edit marked: its pattern
SPARSE = "sparse_pattern"


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
            elif edit["edit"] == "plain_attention":
                attention = model.get_submodule(edit["layer"])
                if not isinstance(attention, nn.MultiheadAttention):
                    raise TypeError(f"a {type(attention).__name__} is no MultiheadAttention")
                model.set_submodule(edit["layer"], Attention(attention))
            elif edit["edit"] == "set":
                module = model.get_submodule(edit["layer"])
                if type(getattr(module, edit["attribute"])) is not int:
                    raise TypeError(f"{edit['attribute']} is no whole number")
                setattr(module, edit["attribute"], edit["value"])
            elif edit["edit"] == "low_rank":
                layer = model.get_submodule(edit["layer"])
                factors = factor_layers(layer, method=edit["method"], ranks=edit["ranks"])
                model.set_submodule(edit["layer"], factors)
            elif edit["edit"] == "sparse":
                _mark_sparse(model.get_submodule(edit["layer"]), edit["pattern"])
            else:
                raise ValueError(f"unknown kind of edit {edit['edit']!r}")
        except (KeyError, AttributeError, IndexError, TypeError, ValueError) as exc:
            target = edit.get("layer") or edit.get("parameter") or "?"
            raise ArtifactError(
                f"edit {number} ({edit.get('edit', '?')} {target}) does not fit the model: {exc}",
                hint="the builder no longer makes the model that was compressed; restore it, or run the recipe again",
            ) from exc
    return model


def factor_layers(layer: nn.Module, *, method: str, ranks: Sequence[int]) -> nn.Sequential:
    """The layers that ``layer`` becomes, with weights yet to be filled in.

    ``svd`` [r]: a linear layer or 1x1 convolution (in -> r -> out). ``tucker`` [r_out, r_in]: 1x1
    (in -> r_in), kxk (r_in -> r_out), 1x1 (r_out -> out) (Kim et al. 2016, section 3.1). ``cp`` [r]:
    1x1 (in -> r), kx1 and 1xk on each channel alone, 1x1 (r -> out) (Lebedev et al. 2015, eq. 3).
    Stride, padding and dilation go to the layers with the kernel; the last has the bias. Raises
    ValueError for a layer or method that do not go together.
    """
    ranks = [int(rank) for rank in ranks]
    if min(ranks) < 1 or len(ranks) != (2 if method == "tucker" else 1):
        raise ValueError(f"ranks {ranks} are no ranks of {method}")
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        if isinstance(layer, nn.Linear) and method == "svd":
            parts: list[nn.Module] = [
                nn.Linear(layer.in_features, ranks[0], bias=False),
                nn.Linear(ranks[0], layer.out_features, bias=layer.bias is not None),
            ]
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
            parts = _factor_convolution(layer, method, ranks)
        else:
            raise ValueError(f"no {method} of a {type(layer).__name__}")
    weight: torch.Tensor = layer.weight
    return nn.Sequential(*parts).to(weight.device, weight.dtype).train(layer.training)


def _factor_convolution(layer: nn.Conv2d, method: str, ranks: list[int]) -> list[nn.Module]:
    narrow, wide, has_bias = layer.in_channels, layer.out_channels, layer.bias is not None
    stride = (layer.stride[0], layer.stride[1])
    dilation = (layer.dilation[0], layer.dilation[1])
    if isinstance(layer.padding, str):
        # "same" is symmetric for odd kernels, and `low_rank` takes no others
        side = [d * (k - 1) // 2 for d, k in zip(dilation, layer.kernel_size, strict=True)]
        padding = (side[0], side[1]) if layer.padding == "same" else (0, 0)
    else:
        padding = (layer.padding[0], layer.padding[1])
    height, width = layer.kernel_size
    if method == "svd" and layer.kernel_size == (1, 1):
        # the stride comes first: what it skips is never computed
        first = nn.Conv2d(narrow, ranks[0], 1, stride=stride, padding=padding, bias=False)
        return [first, nn.Conv2d(ranks[0], wide, 1, bias=has_bias)]
    if method == "tucker":
        core = nn.Conv2d(
            ranks[1], ranks[0], (height, width), stride=stride, padding=padding, dilation=dilation, bias=False
        )  # fmt: skip
        return [nn.Conv2d(narrow, ranks[1], 1, bias=False), core, nn.Conv2d(ranks[0], wide, 1, bias=has_bias)]  # fmt: skip
    if method == "cp":
        rank = ranks[0]
        down = nn.Conv2d(
            rank, rank, (height, 1), stride=(stride[0], 1), padding=(padding[0], 0),
            dilation=(dilation[0], 1), groups=rank, bias=False,
        )  # fmt: skip
        across = nn.Conv2d(
            rank, rank, (1, width), stride=(1, stride[1]), padding=(0, padding[1]),
            dilation=(1, dilation[1]), groups=rank, bias=False,
        )  # fmt: skip
        return [nn.Conv2d(narrow, rank, 1, bias=False), down, across, nn.Conv2d(rank, wide, 1, bias=has_bias)]  # fmt: skip
    raise ValueError(f"no {method} of a {height}x{width} convolution")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` -> (2, 4): at most 2 of each 4 weights along the input channels are not zero;
    ``"unstructured"`` -> (0, 0). Raises ValueError."""
    if pattern == "unstructured":
        return 0, 0
    kept, _, block = pattern.partition(":")
    if not (kept.isdecimal() and block.isdecimal() and 0 < int(kept) < int(block)):
        raise ValueError(f"pattern {pattern!r} is neither 'unstructured' nor N:M with N below M")
    return int(kept), int(block)


def _mark_sparse(layer: nn.Module, pattern: str) -> None:
    parse_pattern(pattern)
    if not isinstance(getattr(layer, "weight", None), nn.Parameter):
        raise ValueError(f"a {type(layer).__name__} has no weight")  # noqa: TRY004 - as all misfits
    setattr(layer, SPARSE, pattern)


def sparse_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of marked layers by parameter name; biases, which may well begin at zero, are none."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if hasattr(module, SPARSE)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }


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
