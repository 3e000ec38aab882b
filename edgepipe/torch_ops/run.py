"""Running the ``torch`` and ``pt2`` artifacts on this host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgepipe.errors import ArtifactError
from edgepipe.torch_ops.model import load_model
from edgepipe.torch_ops.pt2 import call_arguments, input_shapes, load_pt2

log = logging.getLogger(__name__)

BATCH = 256


def run_torch(path: Path, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs for N samples, whose axis is the first everywhere; see `open_torch`."""
    return open_torch(path)(arrays)


def open_torch(
    path: Path, input_axes: Sequence[int | None] = (), output_axes: Sequence[int | None] = ()
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """A model as a function: arrays (N, ...) in call order -> one array (N, ...) per output tensor.

    ``path`` is a ``torch`` folder or a ``.pt2`` file, read once. The axes say where N is in each input and
    output (default: first), None for a scalar, of which N samples are (N,). Evaluation mode, no gradients,
    at most 256 samples at a time; a program exported with a fixed batch runs that many at a time, the last
    batch filled up by repeating its last sample. A model that gives other results in a batch than one by
    one, or takes or gives a scalar, is run one by one.
    """
    call, dtypes, batch = _open(path)
    if None in (*input_axes, *output_axes):
        batch = 1

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        nonlocal batch
        axes_in = tuple(input_axes) or (0,) * len(arrays)
        count = arrays[0].shape[axes_in[0] or 0]
        types = dtypes or [torch.from_numpy(a[:0]).dtype for a in arrays]
        if batch is None and count > 1 and not _is_batchable(call, arrays, types, axes_in, output_axes):  # fmt: skip
            log.info("%s gives other results in a batch: running samples one by one", path.name)
            batch = 1
        parts: list[list[np.ndarray]] = []
        with torch.no_grad():
            for start in range(0, count, batch or BATCH):
                size = min(batch or BATCH, count - start)
                rows = np.minimum(np.arange(start, start + (batch or size)), count - 1)
                outputs = [
                    np.atleast_1d(t.numpy())
                    for t in call_model(call, _tensors(arrays, types, axes_in, rows))
                ]
                axes_out = tuple(axis or 0 for axis in output_axes) or (0,) * len(outputs)
                # a state of two layers has two rows a sample: keep what belongs to `size` samples
                parts.append([
                    np.take(a, range(a.shape[axis] * size // (batch or size)), axis=axis) if batch else a
                    for a, axis in zip(outputs, axes_out, strict=True)
                ])  # fmt: skip
        return [np.concatenate(pieces, axis=axis) for pieces, axis in zip(zip(*parts, strict=True), axes_out, strict=True)]  # fmt: skip

    return run


def _tensors(
    arrays: Sequence[np.ndarray],
    dtypes: Sequence[torch.dtype],
    axes: Sequence[int | None],
    rows: Any,
) -> list[torch.Tensor]:
    """The samples ``rows`` of each input as a tensor; the only one of a scalar as ()."""
    chunks = [
        np.ascontiguousarray(np.take(a, rows, axis=axis or 0))
        for a, axis in zip(arrays, axes, strict=True)
    ]
    shaped = [a.reshape(()) if axis is None else a for a, axis in zip(chunks, axes, strict=True)]
    return [torch.from_numpy(a).to(d) for a, d in zip(shaped, dtypes, strict=True)]


def _open(path: Path) -> tuple[Callable[..., Any], list[torch.dtype], int | None]:
    """What to call with one tensor for each input, the dtypes it takes (none: those it is given), and
    its batch where that is fixed."""
    if path.is_dir():
        return load_model(path), [], None
    program = load_pt2(path)
    module = program.module()

    def call(*tensors: torch.Tensor) -> Any:
        args, kwargs = call_arguments(program, tensors)
        return module(*args, **kwargs)

    inputs = input_shapes(program)
    batch = inputs[0][1][0] if inputs and inputs[0][1] else None
    return call, [getattr(torch, dtype) for _, _, dtype in inputs], batch


def _is_batchable(
    call: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    dtypes: Sequence[torch.dtype],
    input_axes: Sequence[int | None],
    output_axes: Sequence[int | None],
) -> bool:
    """Whether two samples at once give what each gives alone, up to rounding."""
    pair = _unlike(arrays, input_axes)
    with torch.no_grad():
        single = [call_model(call, _tensors(arrays, dtypes, input_axes, [i])) for i in pair]
        try:
            both = call_model(call, _tensors(arrays, dtypes, input_axes, pair))
        except ArtifactError:
            return False
    axes = tuple(axis or 0 for axis in output_axes) or (0,) * len(both)
    return all(
        tuple(b.shape) == (*one.shape[:axis], 2, *one.shape[axis + 1 :])
        # kernels differ by batch size: allow the rounding of a long float32 sum
        and torch.allclose(
            b.double(), torch.cat([one, two], dim=axis).double(), rtol=1e-3, atol=1e-4
        )
        for b, one, two, axis in zip(both, *single, axes, strict=True)
    )


def _unlike(arrays: Sequence[np.ndarray], axes: Sequence[int | None]) -> list[int]:
    """The first sample and the first that differs from it: twice the same has the mean of one."""
    columns = [np.moveaxis(a, axis or 0, 0) for a, axis in zip(arrays, axes, strict=True)]
    rows = range(1, min(map(len, columns)))
    return [0, next((i for i in rows if any((c[i] != c[0]).any() for c in columns)), 1)]


def flatten_outputs(value: Any) -> list[torch.Tensor]:
    """The tensors in a model's return value, depth first: tensor, tuple, list, dict, dataclass-like.

    ``{"a": x, "b": (y, None)}`` -> ``[x, y]``.
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:
        return []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in flatten_outputs(item)]
    raise ArtifactError(
        f"the model returns a {type(value).__name__}; only tensors, and tuples, lists and dicts of them, can be converted",
        hint="return tensors from forward",
    )


def call_model(model: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output tensors for these inputs. Whatever the model raises becomes an ArtifactError."""
    try:
        return flatten_outputs(model(*inputs))
    except ArtifactError:
        raise
    except Exception as exc:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise ArtifactError(
            f"the model fails on inputs of shape {shapes}: {type(exc).__name__}: {str(exc)[:300]}",
            hint="check shapes and dtypes (--input, or [[model.inputs]] of the recipe), and the values in the data",
        ) from exc


def output_shapes(
    model: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of each output for these inputs. Raises ArtifactError where the model fails."""
    with torch.no_grad():
        outputs = call_model(model, inputs)
    return [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in outputs]


def check_same_at_every_call(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Raise ArtifactError for a model that is another one at its second call.

    Layers made in forward are the usual cause: their weights are in no state dict that was saved
    before the first call, and those that forward keeps nowhere are drawn anew at every call.
    """
    before = set(model.state_dict())
    with torch.no_grad():
        first = call_model(model, inputs)
        appeared = sorted(set(model.state_dict()) - before)
        second = call_model(model, inputs)
    if appeared:
        more = f" and {len(appeared) - 3} more" if len(appeared) > 3 else ""
        raise ArtifactError(
            f"the model makes layers in forward: {', '.join(appeared[:3])}{more} appear at its first call, "
            "so its weights can be neither loaded nor saved",
            hint="make every layer in __init__",
            code="layers-in-forward",
        )
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in zip(first, second, strict=True)):  # fmt: skip
        raise ArtifactError(
            "the model gives other outputs at its second call, for the same input in evaluation mode",
            hint="make every layer in __init__, draw no random numbers in forward while not self.training, and keep no state between calls",
            code="changing-outputs",
        )


def count_macs(model: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Multiply-accumulates of convolutions and matrix products in one forward pass (FLOPs / 2)."""
    counter = FlopCounterMode(display=False)
    # torch 2.13's counter fails on a parameter that forward takes apart (`for row in self.first`): even
    # without gradients the parts say that they want one, and have nothing to hang its hook on
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one_dnn = torch.backends.mkldnn.enabled
    try:
        # its LSTM is one operator, which the counter does not know
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        for parameter in trained:
            parameter.requires_grad_(False)
        with counter, torch.no_grad():
            model(*inputs)
    finally:
        torch.backends.mkldnn.enabled = one_dnn
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def example_inputs(
    shapes: Sequence[tuple[Sequence[int], str]], *, seed: int = 0
) -> list[torch.Tensor]:
    """Seeded standard normal tensors (zeros for integer dtypes, which may be indices)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tuple(shape), generator=generator).to(getattr(torch, dtype))
        if getattr(torch, dtype).is_floating_point
        else torch.zeros(tuple(shape), dtype=getattr(torch, dtype))
        for shape, dtype in shapes
    ]


def same_outputs(one: nn.Module, other: nn.Module, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether two models in evaluation mode give the same outputs, bit for bit."""
    with torch.no_grad():
        pairs = zip(flatten_outputs(one(*inputs)), flatten_outputs(other(*inputs)), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
