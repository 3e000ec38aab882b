"""The same values in operators that ONNX has, where PyTorch's own have no counterpart there."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

aten = torch.ops.aten


def with_known_operators(program: ExportedProgram) -> ExportedProgram:
    """The program with operators that ONNX has no counterpart of written with others; itself where it has none."""
    used = {node.target for node in program.graph.nodes if node.op == "call_function"}
    table = {operator: same for operator, same in _EQUIVALENTS.items() if operator in used}
    if aten.adaptive_max_pool2d.default in table and _wants_places(program):
        del table[aten.adaptive_max_pool2d.default]
    return program.run_decompositions(table) if table else program


def bake_parametrizations(model: nn.Module) -> None:
    """Replace, in place, every parametrized weight (``nn.utils.parametrizations``) by the value that it has."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """``nn.Transformer*`` looks at the values of a mask to see whether it is the causal one, for a
    faster kernel; torch.export cannot follow that. Any mask is applied as it is given meanwhile, which
    computes the same.
    """
    transformer = nn.modules.transformer
    original = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = original


@contextlib.contextmanager
def whole_bags() -> Iterator[None]:
    """``nn.EmbeddingBag`` on bags of one size (N, L) as an embedding and its sum, mean or maximum over L:
    its own operator takes bags of any sizes, and neither ONNX nor TFLite has it.
    """
    functional = nn.functional
    original = functional.embedding_bag

    def embedding_bag(input: torch.Tensor, weight: torch.Tensor, offsets: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        bound = inspect.signature(original).bind(input, weight, offsets, *args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        if input.dim() != 2 or options["max_norm"] is not None:
            return original(input, weight, offsets, *args, **kwargs)
        rows = functional.embedding(input, weight)  # (N, L, C)
        if options["per_sample_weights"] is not None:
            rows = rows * options["per_sample_weights"].unsqueeze(-1)
        mode, padding = options["mode"], options["padding_idx"]
        if padding is None:
            return (
                rows.amax(1) if mode == "max" else rows.mean(1) if mode == "mean" else rows.sum(1)
            )
        counts = (input != padding % len(weight)).unsqueeze(-1)
        if mode == "max":
            some = counts.any(1)
            return torch.where(
                some, rows.masked_fill(~counts, torch.finfo(rows.dtype).min).amax(1), 0.0
            )
        total = (rows * counts).sum(1)
        return total / counts.sum(1).clamp(min=1) if mode == "mean" else total

    functional.embedding_bag = embedding_bag
    try:
        yield
    finally:
        functional.embedding_bag = original


@contextlib.contextmanager
def tiny_constants_kept() -> Iterator[None]:
    """PyTorch's exporter takes a constant below 1e-8 for 0, and leaves out the ``+ 1e-10`` that guards a logarithm or a
    division (onnxscript 0.x, rewriter/_matcher.py, ``abs_tol``): only 0 is 0 meanwhile. Where an onnxscript has no such
    place, the proof on inputs of 0 (`parity.verify`) tells what was lost.
    """
    try:
        matcher: Any = importlib.import_module("onnxscript.rewriter._matcher")
    except ImportError:
        matcher = None
    if not hasattr(matcher, "math"):
        yield
        return

    def isclose(a: float, b: float, *, rel_tol: float = 1e-9, abs_tol: float = 0.0) -> bool:
        return math.isclose(a, b, rel_tol=rel_tol)

    original = matcher.math
    matcher.math = types.SimpleNamespace(**{**vars(math), "isclose": isclose})
    try:
        yield
    finally:
        matcher.math = original


def _cdist(
    x: torch.Tensor, y: torch.Tensor, p: float = 2.0, compute_mode: int | None = None
) -> torch.Tensor:
    """Distances of rows: (..., P, C), (..., R, C) -> (..., P, R)."""
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    if p == 2:
        return apart.square().sum(-1).sqrt()
    if p == 1:
        return apart.abs().sum(-1)
    if math.isinf(p):
        return apart.abs().amax(-1)
    return apart.abs().pow(p).sum(-1).pow(1 / p)


def _hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * x + y * y).sqrt()


def _kth(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The k-th smallest, from 1, along ``dim`` and where it is."""
    least, places = x.topk(k, dim, largest=False, sorted=True)
    values, indices = least.narrow(dim, k - 1, 1), places.narrow(dim, k - 1, 1)
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def _median(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower of two middle values, as torch.median."""
    return _kth(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _median_of_all(x: torch.Tensor) -> torch.Tensor:
    return _median(x.reshape(-1), 0)[0]


def _adaptive_max_pool(x: torch.Tensor, output_size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The largest of each cell, (..., H, W) -> (..., *output_size); cell i of m is from i n / m down to (i + 1) n / m up.

    Where they were is not said: every place is 0.
    """
    for axis, count in zip((-2, -1), output_size, strict=True):
        size = x.shape[axis]
        cells = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        x = torch.cat([x.narrow(axis, a, b - a).amax(axis, keepdim=True) for a, b in cells], axis)
    return x, torch.zeros_like(x, dtype=torch.int64)


def _wants_places(program: ExportedProgram) -> bool:
    """Whether somebody reads where the largest values were."""
    pools = [n for n in program.graph.nodes if n.target is aten.adaptive_max_pool2d.default]
    return any(reader.args[1] == 1 and reader.users for node in pools for reader in node.users)


def _rrelu(x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None) -> torch.Tensor:  # fmt: skip
    """Of a model in evaluation mode, where the slope is the middle one."""
    return nn.functional.leaky_relu(x, (lower + upper) / 2)


_EQUIVALENTS: dict[Any, Callable[..., Any]] = {
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.cdist.default: _cdist,
    aten.hypot.default: _hypot,
    aten.kthvalue.default: _kth,
    aten.median.dim: _median,
    aten.median.default: _median_of_all,
    aten.rrelu.default: _rrelu,
}
