"""Zeros in weights, by magnitude: unstructured or N:M, at once or gradually while training.

Which layers are sparse is an edit (`edits.SPARSE`), so that later training keeps the zeros; which weights
are zero is in the weights themselves.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepipe.errors import StageError, StageOptionError
from edgepipe.schema import near_miss
from edgepipe.torch_ops.edits import is_depthwise, parse_pattern
from edgepipe.torch_ops.result import describe_layers

log = logging.getLogger(__name__)

STAGE = "sparsify"


@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """``pattern`` of the layers to make sparse, in the order in which they run, and why others stay."""

    layers: tuple[str, ...]
    pattern: str
    left_dense: dict[str, str]

    def edits(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"edit": "sparse", "layer": name, "pattern": self.pattern} for name in self.layers
        )


def plan_sparsity(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    pattern: str,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    keep_ends: bool = True,
) -> SparsePlan:
    """Choose the convolutions and linear layers whose names match ``layers`` and not ``ignore``.

    Depthwise convolutions stay dense (they hold few weights), with ``keep_ends`` also the layers that
    run first and last, and with an N:M ``pattern`` layers whose input channels do not divide by M.
    Raises StageOptionError for a pattern that matches no layer, StageError where none is left.
    """
    modules = dict(model.named_modules())
    for wanted in (*layers, *ignore):
        if not fnmatch.filter(modules, wanted):
            raise StageOptionError(
                f"{STAGE}: pattern {wanted!r} matches no layer{near_miss(wanted, list(modules))}",
                hint=f"layers: {', '.join(n for n in modules if n)}"[:500],
            )
    _, block = parse_pattern(pattern)
    ran = [layer.name for layer in describe_layers(model, inputs)]
    weighted = [n for n in ran if isinstance(modules[n], (_ConvNd, nn.Linear))]
    chosen: list[str] = []
    dense: dict[str, str] = {}
    for name in weighted:
        module = modules[name]
        weight = module.get_parameter("weight")
        if not any(fnmatch.fnmatch(name, p) for p in layers) or any(
            fnmatch.fnmatch(name, p) for p in ignore
        ):
            dense[name] = "is not asked for"
        elif keep_ends and name in (weighted[0], weighted[-1]):
            dense[name] = f"is the {'first' if name == weighted[0] else 'last'} layer (keep_ends)"
        elif is_depthwise(module):
            dense[name] = "is depthwise: it has few weights"
        elif block and weight.shape[_in_axis(module)] % block:
            dense[name] = f"has {weight.shape[_in_axis(module)]} input channels, no multiple of {block}"  # fmt: skip
        elif not bool(weight.detach().any()):
            dense[name] = "has no weight that is not zero: train it first"
        else:
            chosen.append(name)
    for name, reason in dense.items():
        log.info("%s stays dense: it %s", name, reason)
    if not chosen:
        reasons = "; ".join(f"{name} {why}" for name, why in list(dense.items())[:4])
        raise StageError(
            f"no layer of this model can be made sparse: {reasons or 'no convolution or linear layer'}",
            stage=STAGE,
            hint="widen layers, or set keep_ends = false",
            code="nothing-to-sparsify",
        )
    return SparsePlan(tuple(chosen), pattern, dense)


def scheduled_sparsity(step: int, *, final: float, begin: int, end: int, updates: int) -> float:
    """The share of zeros after a step, cubic from 0 to ``final`` (Zhu & Gupta 2017, eq. 1).

    It changes ``updates`` times between the steps ``begin`` and ``end``. Example: final 0.8, steps 0
    to 100 in 10 updates: 0.8 * (1 - 0.5^3) = 0.7 at step 50.
    """
    if step < begin:
        return 0.0
    if step >= end:
        return final
    done = (step - begin) * updates // (end - begin) / updates
    return final * (1 - (1 - done) ** 3)


def cut_weights(
    model: nn.Module,
    plan: SparsePlan,
    sparsity: float,
    *,
    ranking: Literal["layer", "global"] = "layer",
) -> None:
    """Set the smallest weights of the plan's layers to zero, in place.

    Unstructured: a share ``sparsity`` of each layer or (``ranking`` ``global``) of all together, where
    weights are compared as they are. N:M: in each group of M neighbours along the input channels the N
    largest stay at ``sparsity`` 1 - N/M, more of them where it is smaller. Of equal weights the
    first go, so that every machine makes the same zeros. Raises StageError where a layer would be
    left empty.
    """
    kept, block = parse_pattern(plan.pattern)
    weights = {n: model.get_submodule(n).get_parameter("weight") for n in plan.layers}
    with torch.no_grad():
        if block:
            goes = min(block - kept, int(sparsity * block + 1e-9))
            for name, weight in weights.items():
                axis = _in_axis(model.get_submodule(name))
                rows = weight.abs().movedim(axis, -1)
                groups = rows.reshape(-1, block)  # (..., in) -> (groups, M)
                mask = torch.ones_like(groups).scatter(1, _smallest(groups, goes), 0)
                weight.mul_(mask.reshape(rows.shape).movedim(-1, axis))
        elif ranking == "global":
            flat = torch.cat([w.abs().flatten() for w in weights.values()])
            mask = torch.ones_like(flat).scatter(0, _smallest(flat, int(sparsity * len(flat))), 0)
            at = 0
            for weight in weights.values():
                weight.mul_(mask[at : at + weight.numel()].reshape(weight.shape))
                at += weight.numel()
            empty = [name for name, weight in weights.items() if not bool(weight.any())]
            if empty:
                raise StageError(
                    f"{100 * sparsity:.0f} % zeros of all layers together leave layer {empty[0]!r} empty",
                    stage=STAGE,
                    hint=f'lower sparsity, set ranking = "layer", or ignore = ["{empty[0]}"]',
                    code="layer-emptied",
                )
        else:
            for weight in weights.values():
                flat = weight.abs().flatten()
                gone = _smallest(flat, int(sparsity * len(flat)))
                weight.mul_(torch.ones_like(flat).scatter(0, gone, 0).reshape(weight.shape))


def gradually(
    model: nn.Module,
    plan: SparsePlan,
    *,
    final: float,
    ranking: Literal["layer", "global"],
    begin: float,
    end: float,
    updates: int,
) -> Callable[[int, int], None]:
    """A hook for `train.train` that cuts weights on the schedule; ``begin`` and ``end`` are shares of
    all steps. What was cut stays zero, as long as the layers are marked sparse."""

    def hook(step: int, total: int) -> None:
        first, last = round(begin * total), max(1, round(end * total))
        share = scheduled_sparsity(step + 1, final=final, begin=first, end=last, updates=updates)
        if share > scheduled_sparsity(step, final=final, begin=first, end=last, updates=updates):
            cut_weights(model, plan, share, ranking=ranking)

    return hook


def zero_shares(model: nn.Module, layers: Sequence[str]) -> Mapping[str, float]:
    """The share of zeros among each layer's weights."""
    weights = {n: model.get_submodule(n).get_parameter("weight").detach() for n in layers}
    return {n: 1 - torch.count_nonzero(w).item() / w.numel() for n, w in weights.items()}


def _smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` smallest along the last axis, the first of equal ones."""
    return torch.argsort(values, dim=-1, stable=True)[..., :count]


def _in_axis(module: nn.Module) -> int:
    return 0 if isinstance(module, _ConvTransposeNd) else 1
