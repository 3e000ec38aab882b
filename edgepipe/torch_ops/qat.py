"""Quantisation-aware training on the float TFLite graph, with the arithmetic of the int8 kernels.

The LiteRT 8-bit specification, as `tflite_ops.quantize` applies it: activations int8 with a scale and
a zero point, real = scale * (stored - zero_point); weights int8 symmetric with one scale for each
output channel, largest value / 127; biases int32 in steps of both scales multiplied. What is trained
are the weights and, as in LSQ+ (Bhalgat et al. 2020, eq. 1 to 4), both ends of every range.

Which tensors share a range, and which have a fixed one (softmax), is not written down here: it is
read off what the quantiser does with the very graph (`range_owners`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepipe.errors import StageError
from edgepipe.tflite_ops.flatbuffer import parse_model, with_constants
from edgepipe.tflite_ops.quantize import quantize
from edgepipe.torch_ops.tflite_module import STAGE, TfliteModule, channel_axis
from edgepipe.torch_ops.train import Batch, Objective, hard_loss

log = logging.getLogger(__name__)

T = TypeVar("T")
Range = tuple[float, float]
# The ends of a range are learned as factors of where they began, exp(SPEED * u): a step of 1e-4 in u
# (an optimiser's, at lr = 1e-4) moves an end by a thousandth.
SPEED = 10.0


class _Round(torch.autograd.Function):
    """Round to even; the gradient passes through (Bengio et al. 2013)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def round_ste(x: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded


class ActivationRange(nn.Module):
    """One range [low, high] that holds zero, learned; ``forward`` rounds a tensor to its 256 steps."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        low, high = min(low, 0.0), max(high, 0.0)
        high = 1.0 if low == high == 0 else high
        self.register_buffer("start", torch.tensor([low, high]))
        self.factor = nn.Parameter(torch.zeros(2))
        self.start: torch.Tensor

    def scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero point): 0-d tensors, differentiable."""
        low, high = (self.start * torch.exp(SPEED * self.factor)).unbind()
        scale = (high - low) / 255
        zero = round_ste(-128 - low / scale).clamp(-128, 127)
        return scale, zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, *self.scale())

    def limits(self) -> Range:
        """The range as the int8 file will hold it: the real values of -128 and 127."""
        with torch.no_grad():
            scale, zero = (float(v) for v in self.scale())
        return (-128 - zero) * scale, (127 - zero) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """x -> the nearest of 256 steps. Example: scale 0.5, zero point -128, 0.8 -> 2 steps -> 1.0.

    Differentiable in all three: a value inside the range passes its gradient on to x, one outside to
    the end of the range that clips it (LSQ+, eq. 3 and 4).
    """
    rounded: torch.Tensor = _FakeQuantize.apply(x, scale, zero)  # type: ignore[no-untyped-call]
    return rounded


class _FakeQuantize(torch.autograd.Function):
    """Keeps only x for the way back; written as single operators it would keep five of its size."""

    @staticmethod
    def forward(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return ((x / scale).round_().add_(zero).clamp_(-128, 127).sub_(zero)).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, scale, zero = ctx.saved_tensors
        # in place where that changes no sum's order: three of x's size at a time, not eight
        steps = x / scale
        rounded = steps.round()
        apart = torch.sub(rounded, steps, out=steps)
        rounded.add_(zero)
        below, above = rounded < -128, rounded > 127
        del rounded
        apart.masked_fill_(below, -128 - zero).masked_fill_(above, 127 - zero)
        by_scale = (gradient * apart).sum()
        del steps, apart
        outside = below.logical_or_(above)
        by_zero = -(gradient * outside).sum() * scale
        return gradient * ~outside, by_scale, by_zero

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, scale: Any, zero: Any) -> tuple[torch.Tensor, Any]:
        # every value for itself: all samples at once, scale and zero point are theirs together
        return fake_quantize(x, scale, zero), in_dims[0]


def quantize_weight(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Each output channel on the grid of its largest value / 127; the gradient passes through."""
    others = [i for i in range(weight.ndim) if i != axis]
    largest = weight.detach().abs().amax(others, keepdim=True).clamp_min(1e-12)
    scale = largest / 127
    return round_ste(weight / scale) * scale


@dataclasses.dataclass(frozen=True)
class Owners:
    """``owner``: tensor -> the tensor whose range it is stored with; ``fixed``: tensor -> (scale, zero
    point) that no range decides. Tensors in neither stay in float."""

    owner: Mapping[str, str]
    fixed: Mapping[str, tuple[float, int]]


def range_owners(content: bytes, *, where: str, states: Sequence[tuple[int, int]] = ()) -> Owners:
    """Find out what the quantiser does with every tensor, by giving each a range of its own.

    Tensor number i gets [-r, r] with r = 1 + i / 64; the scale it then has in the int8 file tells
    whose range that was. Example: max pooling keeps its input's scale, softmax always has 1/256.
    ``states`` as in `quantize`: what goes in has the owner of what comes out.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    names = [t.name for t in graph.tensors if t.is_float and not t.is_constant]
    reach = {name: 1 + i / 64 for i, name in enumerate(names)}
    probed = quantize(content, {n: (-r, r) for n, r in reach.items()}, states=states, where=where)
    by_scale = {round(2 * r / 255, 7): name for name, r in reach.items()}
    owner: dict[str, str] = {}
    fixed: dict[str, tuple[float, int]] = {}
    for tensor in parse_model(probed, where=where).subgraphs[0].tensors:
        if tensor.name not in reach or tensor.dtype != "int8" or len(tensor.scales) != 1:
            continue
        found = by_scale.get(round(tensor.scales[0], 7))
        if found is not None:
            owner[tensor.name] = found
        else:
            fixed[tensor.name] = (tensor.scales[0], tensor.zero_points[0])
    return Owners(owner, fixed)


class QatModel(nn.Module):
    """A `TfliteModule` whose activations and weights are rounded as the int8 file's will be.

    ``ranges`` are where each tensor's range starts, usually those of post-training quantisation.
    With ``learned = False`` they stay. ``is_quantized = False`` makes it the float model.
    """

    def __init__(self, body: TfliteModule, owners: Owners, ranges: Mapping[str, Range], *, learned: bool) -> None:  # fmt: skip
        super().__init__()
        self.body, self.owners, self.is_quantized = body, owners, True
        self.numbers = {name: str(i) for i, name in enumerate(sorted(set(owners.owner.values())))}
        self.ranges = nn.ModuleDict({n: ActivationRange(*ranges[name]) for name, n in self.numbers.items()})  # fmt: skip
        for module in self.ranges.values():
            module.requires_grad_(learned)
        self.axes = channel_axis(body.graph)
        names = {t.index: t.name for t in body.graph.tensors}
        self.bias_of = {names[b]: (names[x], names[w]) for b, (x, w) in body.biases.items()}
        self.weight_numbers = {t.name: str(t.index) for t in body.graph.tensors}
        body.on_activation, body.on_weight = self._activation, self._weight
        self._kept: dict[str, Any] | None = None

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.body(*inputs)

    def _activation(self, value: torch.Tensor, name: str) -> torch.Tensor:
        if not self.is_quantized:
            return value
        if name in self.owners.fixed:
            scale, zero = self.owners.fixed[name]
            return fake_quantize(value, value.new_tensor(scale), value.new_tensor(float(zero)))
        if name in self.owners.owner:
            return fake_quantize(value, *self._scale(self.owners.owner[name]))
        return value

    def _weight(self, value: torch.Tensor, name: str) -> torch.Tensor:
        if not self.is_quantized:
            return value
        if name in self.axes:
            return self._once(name, lambda: quantize_weight(value, self.axes[name]))
        if name in self.bias_of:
            return self._once(name, lambda: self._bias(value, *self.bias_of[name]))
        return value

    def _bias(self, bias: torch.Tensor, x: str, w: str) -> torch.Tensor:
        """int32 in steps of the input's scale times the channel's."""
        if w not in self.axes or x not in self.owners.owner:
            return bias
        weight = self.body.weights[self.weight_numbers[w]].detach()
        others = [i for i in range(weight.ndim) if i != self.axes[w]]
        step = weight.abs().amax(others).clamp_min(1e-12) / 127
        scale, _ = self._scale(self.owners.owner[x])
        step = step * scale.detach()
        return round_ste(bias / step) * step

    def _scale(self, owner: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._once(f"scale of {owner}", self._range(self.numbers[owner]).scale)

    def _once(self, key: str, compute: Callable[[], T]) -> T:
        if self._kept is None:
            return compute()
        if key not in self._kept:
            self._kept[key] = compute()
        found: T = self._kept[key]
        return found

    @contextlib.contextmanager
    def same_weights(self) -> Iterator[None]:
        """Inside, weights and scales are rounded once: for the many calls of one sequence."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _range(self, number: str) -> ActivationRange:
        module = self.ranges[number]
        assert isinstance(module, ActivationRange)
        return module

    def learned_ranges(self) -> dict[str, Range]:
        """Tensor name -> range, for every tensor that has one."""
        limits = {n: self._range(n).limits() for n in self.ranges}
        fixed = {n: ((-128 - z) * s, (127 - z) * s) for n, (s, z) in self.owners.fixed.items()}
        return fixed | {n: limits[self.numbers[owner]] for n, owner in self.owners.owner.items()}

    def baked(self, content: bytes) -> bytes:
        """The float file with the trained weights, on their grid: quantising finds it again exactly."""
        with torch.no_grad():
            values = {
                int(number): (
                    quantize_weight(p, self.axes[name]) if (name := self.body.graph.tensors[int(number)].name) in self.axes else p
                ).cpu().numpy()
                for number, p in self.body.weights.items()
            }  # fmt: skip
        return with_constants(content, values)

    @contextlib.contextmanager
    def as_float(self) -> Iterator[None]:
        """Inside, the model computes in float."""
        self.is_quantized = False
        try:
            yield
        finally:
            self.is_quantized = True


def objective(label_smoothing: float, teacher: nn.Module | None, weight: float) -> Objective:
    """Cross-entropy, and with ``weight`` the divergence from what the float model says of the sample."""

    def loss(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        said = None
        if teacher is not None and weight:
            with torch.no_grad():  # first: afterwards the model's own activations are held as well
                said = teacher(*batch.inputs)
        output = batch.model(*batch.inputs)
        value = hard_loss(output, batch, label_smoothing)
        if said is None:
            return value, output
        soft = functional.kl_div(
            output.log_softmax(1), said.log_softmax(1), log_target=True, reduction="batchmean"
        ) / max(1, output[0, 0].numel())
        return (1 - weight) * value + weight * soft, output

    return loss


def freeze_after(model: QatModel, share: float) -> Any:
    """A hook for `train`: from that share of the steps on, ranges stay and only weights move."""

    def hook(step: int, total: int) -> None:
        if step + 1 >= share * total:
            for module in model.ranges.values():
                module.requires_grad_(False)
                for parameter in module.parameters():
                    parameter.grad = None

    return hook


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The int8 file against the model that was trained: share of equal output values, and the share
    that is at most one step apart; ``values`` were compared. ``sqnr_db`` is what the output that departs most
    holds against the difference, which counts as one step at least."""

    equal: float
    within_one: float
    values: int
    sqnr_db: float


def agreement(
    model: QatModel,
    int8: bytes,
    batches: Sequence[Sequence[np.ndarray]],
    *,
    where: str,
    states: Sequence[tuple[int, int]] = (),
    length: int = 1,
    goes_on: Literal["together", "apart"] = "together",
) -> Agreement:
    """Run both on ``batches`` (inputs of the float file, one inference each) and compare steps.

    An output that the int8 file gives as an integer is compared as it is stored. Of a model with ``states``
    (number of an input, number of the output that feeds it) each ``length`` batches are a sequence. Along it
    ``together`` both go on from the state that the file has come to, so that the file computes the sequence
    as it was trained where it does each step; ``apart`` each goes on from its own, and one step of rounding
    may grow from there on.
    """
    from edgepipe.tflite_ops.run import dequantize as real
    from edgepipe.tflite_ops.run import invoke_once, open_tflite
    from edgepipe.tflite_ops.run import quantize as stored

    interpreter = open_tflite(int8)
    made: list[np.ndarray] = []
    expected: tuple[torch.Tensor, ...] = ()
    equal = near = count = 0
    details = interpreter.get_output_details()
    signal, noise = np.zeros(len(details)), np.zeros(len(details))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            ours = [torch.from_numpy(np.ascontiguousarray(a)) for a in batch]
            given = [stored(a, d) for a, d in zip(batch, interpreter.get_input_details(), strict=True)]  # fmt: skip
            for i, j in states if number % length else ():
                given[i], ours[i] = made[j], expected[j]
                if goes_on == "together":
                    ours[i] = torch.from_numpy(real(made[j], details[j]))
            for detail, array in zip(interpreter.get_input_details(), given, strict=True):
                interpreter.set_tensor(detail["index"], array)
            invoke_once(interpreter, where=where)
            expected = model.body._run(*ours)
            made = [interpreter.get_tensor(d["index"]) for d in details]
            for k, (detail, value, found) in enumerate(zip(details, expected, made, strict=True)):
                scale, zero = detail["quantization"]
                if not scale:
                    raise StageError(f"{where}: an output is not quantised", stage=STAGE)
                wanted = stored(value.numpy(), detail).astype(np.int64)
                apart = np.abs(found.astype(np.int64) - wanted)
                equal += int((apart == 0).sum())
                near += int((apart <= 1).sum())
                count += apart.size
                signal[k] += np.square(wanted - zero).sum()
                noise[k] += np.square(apart).sum()
    least = (np.maximum(signal, 1) / np.maximum(noise, 1)).min()
    return Agreement(equal / count, near / count, count, round(10 * math.log10(least), 1))
