"""A float TFLite graph as a PyTorch module: the same operators on the same tensors, differentiable.

Training on the graph that ships means that batch norms are folded and activations fused exactly as
the converter did it, and that every tensor has the name by which the int8 file knows it.

A graph is made for one sample (batch 1), with that 1 written into the shapes of its reshapes and
transposes. `torch.vmap` runs it over B samples without touching any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgepipe.artifact import TensorSpec
from edgepipe.errors import StageError
from edgepipe.state import batch_axis
from edgepipe.tflite_ops.flatbuffer import Operator, Subgraph, constants, parse_model
from edgepipe.torch_ops.edits import SPARSE

STAGE = "qat"
# Operators with trained weights: position of the weights, and the axis of their output channels.
WEIGHTED = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
_CLAMPS = {
    "NONE": (-math.inf, math.inf), "RELU": (0.0, math.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0),
}  # fmt: skip

# (value, name of the tensor) -> value: where quantisation is put in
Activation = Callable[[torch.Tensor, str], torch.Tensor]
Weight = Callable[[torch.Tensor, str], torch.Tensor]


class TfliteModule(nn.Module):
    """``forward(*inputs)`` takes what the source model takes, B samples in its layout and order.

    Weights and biases of convolutions and dense layers are parameters, under their tensor's number
    in ``weights``; ``on_activation`` and ``on_weight`` are called on every float tensor that is
    computed, and on every weight before its use. Raises StageError for an operator that is not
    known here.
    """

    def __init__(
        self, content: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, where: str
    ) -> None:  # fmt: skip
        super().__init__()
        model = parse_model(content, where=where)
        self.graph: Subgraph = model.subgraphs[0]
        unknown = sorted({o.name for o in self.graph.operators} - set(OPERATORS))
        if unknown or len(model.subgraphs) > 1:
            raise StageError(
                f"{where} holds {', '.join(unknown) or 'several subgraphs'}, which cannot be trained here",
                stage=STAGE,
                hint=f"quantise it without this stage; known operators: {', '.join(sorted(OPERATORS))}",
                code="unknown-operator",
            )
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.on_activation: Activation = lambda value, name: value
        self.on_weight: Weight = lambda value, name: value
        self.weights = nn.ParameterDict()
        # a weight that is exactly zero was made so (`sparsify`): training leaves it there
        setattr(self.weights, SPARSE, "unstructured")
        trained = _trained(self.graph)
        for index, array in constants(content, self.graph).items():
            value = torch.from_numpy(array)
            if index in trained:
                self.weights[str(index)] = nn.Parameter(value)
            else:
                self.register_buffer(f"constant_{index}", value, persistent=False)
        self.done_with = _done_with(self.graph)
        # bias -> (input, weights) of its operator
        self.biases = {
            operator.inputs[2]: (operator.inputs[0], operator.inputs[1])
            for operator in self.graph.operators
            if operator.name in WEIGHTED and operator.name != "TRANSPOSE_CONV"
            and len(operator.inputs) > 2 and operator.inputs[2] in trained
        }  # fmt: skip

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        single = [_to_file(x, spec) for x, spec in zip(inputs, self.inputs, strict=True)]
        found = torch.vmap(self._run, randomness="same")(*single)
        results = [_from_file(y, spec) for y, spec in zip(found, self.outputs, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One sample through the graph, tensors as the file has them."""
        values: dict[int, torch.Tensor] = {}
        for index, value in zip(self.graph.inputs, inputs, strict=True):
            values[index] = self._activation(value, index)
        for operator, done_with in zip(self.graph.operators, self.done_with, strict=True):
            given = [self._value(i, values, operator) for i in operator.inputs]
            made = OPERATORS[operator.name](operator, given, self.graph)
            for index, value in zip(operator.outputs, made, strict=True):
                values[index] = self._activation(value, index)
            for index in done_with:
                values.pop(index, None)
        return tuple(values[i] for i in self.graph.outputs)

    def _activation(self, value: torch.Tensor, index: int) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        return self.on_activation(value, self.graph.tensors[index].name)

    def _value(
        self, index: int, values: Mapping[int, torch.Tensor], operator: Operator
    ) -> torch.Tensor | None:
        if index < 0:
            return None
        if index in values:
            return values[index]
        if str(index) in self.weights:
            weight: torch.Tensor = self.weights[str(index)]
            return self.on_weight(weight, self.graph.tensors[index].name)
        constant: torch.Tensor = getattr(self, f"constant_{index}")
        return constant


def channel_axis(graph: Subgraph) -> dict[str, int]:
    """Tensor name of each trained weight -> the axis of its output channels; biases are not in it."""
    return {
        graph.tensors[operator.inputs[1]].name: WEIGHTED[operator.name]
        for operator in graph.operators
        if operator.name in WEIGHTED and graph.tensors[operator.inputs[1]].is_constant
    }


def _trained(graph: Subgraph) -> set[int]:
    found = set()
    for operator in graph.operators:
        if operator.name in WEIGHTED:
            positions = (1, 3) if operator.name == "TRANSPOSE_CONV" else (1, 2)
            found |= {operator.inputs[p] for p in positions if p < len(operator.inputs)}
    return {i for i in found if i >= 0 and graph.tensors[i].is_constant and graph.tensors[i].is_float}  # fmt: skip


def _done_with(graph: Subgraph) -> list[list[int]]:
    """For each operator the tensors that nothing after it reads, so that none is held longer."""
    last = {index: n for n, o in enumerate(graph.operators) for index in (*o.inputs, *o.outputs)}
    return [
        [i for i, at in last.items() if at == n and i not in graph.outputs]
        for n in range(len(graph.operators))
    ]


def _to_file(x: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """B samples in the source layout -> (B, ...), each of batch 1 in the file's layout, for vmap.

    A state LNC (2, B, 16) -> (B, 2, 1, 16).
    """
    if spec.source_layout != spec.layout:
        x = x.permute([spec.source_layout.index(axis) for axis in spec.layout])
    axis = batch_axis(spec.layout)
    return x.movedim(axis, 0).unsqueeze(axis + 1)


def _from_file(y: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """(B, ...) as vmap gives it -> B samples in the source layout."""
    axis = batch_axis(spec.layout)
    y = y.squeeze(axis + 1).movedim(0, axis)
    if spec.source_layout != spec.layout:
        y = y.permute([spec.layout.index(axis) for axis in spec.source_layout])
    return y


# --- operators: (operator, values of its inputs, graph) -> values of its outputs ------------------

Values = Sequence[Any]


def _clamped(value: torch.Tensor, operator: Operator) -> list[torch.Tensor]:
    name = operator.options.get("fused_activation_function", "NONE")
    if name == "NONE":
        return [value]
    return [_Clamp.apply(value, *_CLAMPS[name])]  # type: ignore[no-untyped-call]


class _Clamp(torch.autograd.Function):
    """A fused ReLU, ReLU6 or ReLU_N1_TO_1, with PyTorch's gradient of them: 0 at the ends.

    Keeps what it gives, which the next operator keeps anyway; `torch.clamp` keeps what it is given.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)
        ctx.ends = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (value,) = ctx.saved_tensors
        low, high = ctx.ends
        return gradient * ((value > low) & (value < high)), None, None


def _pads(size: int, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    """SAME padding before and after, as TFLite computes it (kernels/padding.h)."""
    if padding == "VALID":
        return 0, 0
    reach = (kernel - 1) * dilation + 1
    total = max(0, (-(-size // stride) - 1) * stride + reach - size)
    return total // 2, total - total // 2


def _window(operator: Operator, x: torch.Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """(strides, dilations, pads as functional.pad takes them) of a 2-D window over x (1, H, W, C)."""
    options = operator.options
    strides = [options["stride_h"], options["stride_w"]]
    dilations = [options.get("dilation_h_factor", 1), options.get("dilation_w_factor", 1)]
    top, bottom = _pads(x.shape[1], kernel[0], strides[0], dilations[0], options["padding"])
    left, right = _pads(x.shape[2], kernel[1], strides[1], dilations[1], options["padding"])
    return strides, dilations, [left, right, top, bottom]


def _conv(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, w, b = given[0], given[1], given[2] if len(given) > 2 else None
    depthwise = operator.name == "DEPTHWISE_CONV_2D"
    strides, dilations, pads = _window(operator, x, w.shape[1:3])
    # (O, H, W, I) or, depthwise, (1, H, W, O) -> PyTorch's (O, I / groups, H, W)
    kernel = w.permute(3, 0, 1, 2) if depthwise else w.permute(0, 3, 1, 2)
    groups = x.shape[3] // kernel.shape[1]
    y = functional.conv2d(
        functional.pad(x.permute(0, 3, 1, 2), pads), kernel, b, strides, 0, dilations, groups
    )
    return _clamped(y.permute(0, 2, 3, 1), operator)


def _transpose_conv(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    _, w, x = given[:3]
    b = given[3] if len(given) > 3 else None
    height, width = graph.tensors[operator.outputs[0]].shape[1:3]
    strides = [operator.options["stride_h"], operator.options["stride_w"]]
    padding = operator.options["padding"]
    top, _ = _pads(height, w.shape[1], strides[0], 1, padding)
    left, _ = _pads(width, w.shape[2], strides[1], 1, padding)
    y = functional.conv_transpose2d(x.permute(0, 3, 1, 2), w.permute(3, 0, 1, 2), b, strides)
    y = functional.pad(y, [0, max(0, left + width - y.shape[3]), 0, max(0, top + height - y.shape[2])])  # fmt: skip
    y = y[:, :, top : top + height, left : left + width]
    return _clamped(y.permute(0, 2, 3, 1), operator)


def _dense(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, w, b = given[0], given[1], given[2] if len(given) > 2 else None
    y = functional.linear(x.reshape(-1, w.shape[1]), w, b)
    shape = graph.tensors[operator.outputs[0]].shape
    return _clamped(y.reshape(shape), operator)


def _pool(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, options = given[0], operator.options
    kernel = [options["filter_height"], options["filter_width"]]
    strides, _, pads = _window(operator, x, kernel)
    x = x.permute(0, 3, 1, 2)
    if operator.name == "MAX_POOL_2D":
        y = functional.max_pool2d(functional.pad(x, pads, value=-math.inf), kernel, strides)
    else:  # the padding does not count
        y = functional.avg_pool2d(functional.pad(x, pads), kernel, strides, divisor_override=1)
        ones = functional.pad(torch.ones_like(x[:1, :1]), pads)
        y = y / functional.avg_pool2d(ones, kernel, strides, divisor_override=1)
    return _clamped(y.permute(0, 2, 3, 1), operator)


def _reduce(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, axes = given
    dims = [int(axis) for axis in axes.flatten()]
    keep = bool(operator.options.get("keep_dims", False))
    if operator.name == "REDUCE_MAX":
        return [x.amax(dims, keepdim=keep)]
    return [x.mean(dims, keepdim=keep) if operator.name == "MEAN" else x.sum(dims, keepdim=keep)]


def _reshape(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    return [given[0].reshape(graph.tensors[operator.outputs[0]].shape)]


def _strided_slice(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, begins, ends, strides = given
    options = operator.options
    if options.get("ellipsis_mask") or options.get("new_axis_mask") or (strides < 1).any():
        raise StageError(
            "STRIDED_SLICE with an ellipsis, a new axis or a backward stride cannot be trained here",
            stage=STAGE,
            hint="quantise the model without this stage",
        )
    for axis in range(len(begins)):
        size, bit = x.shape[axis], 1 << axis
        begin = 0 if options.get("begin_mask", 0) & bit else int(begins[axis])
        begin = max(begin + size, 0) if begin < 0 else min(begin, size)
        end = size if options.get("end_mask", 0) & bit else int(ends[axis])
        end = max(end + size, 0) if end < 0 else min(end, size)
        if options.get("shrink_axis_mask", 0) & bit:
            end = begin + 1
        rows = torch.arange(begin, end, int(strides[axis]), device=x.device)
        x = x.index_select(axis, rows)
    return [x.reshape(graph.tensors[operator.outputs[0]].shape)]


def _slice(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, begins, _ = given
    for axis, size in enumerate(graph.tensors[operator.outputs[0]].shape):
        x = x.narrow(axis, int(begins[axis]), size)
    return [x]


def _split(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    axis, x = (given[0], given[1]) if operator.name == "SPLIT" else (given[2], given[0])
    dim = int(axis.flatten()[0])
    sizes = [graph.tensors[i].shape[dim] for i in operator.outputs]
    return list(x.split(sizes, dim))


def _pad(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, pads = given[0], given[1]
    flat = [int(n) for pair in reversed(pads.tolist()) for n in pair]
    if operator.name == "MIRROR_PAD":
        raise StageError("MIRROR_PAD cannot be trained here", stage=STAGE, hint="pad with zeros")
    return [functional.pad(x, flat, value=float(given[2]) if len(given) > 2 else 0.0)]


def _resize(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, options = given[0], operator.options
    size = list(graph.tensors[operator.outputs[0]].shape[1:3])
    linear = operator.name == "RESIZE_BILINEAR"
    corners, halves = options.get("align_corners", False), options.get("half_pixel_centers", False)
    y = _resize_axis(x, 1, size[0], linear, corners, halves)
    return [_resize_axis(y, 2, size[1], linear, corners, halves)]


def _resize_axis(
    x: torch.Tensor, axis: int, size: int, linear: bool, corners: bool, halves: bool
) -> torch.Tensor:
    """One axis of a resize, as kernels/internal/reference/resize_*.h place the samples."""
    old = x.shape[axis]
    ratio = (old - 1) / (size - 1) if corners and size > 1 else old / size
    at = torch.arange(size, device=x.device, dtype=torch.float32)
    place = (at + 0.5) * ratio - (0.5 if linear else 0.0) if halves else at * ratio
    if not linear:
        nearest = torch.round(place) if corners else torch.floor(place)
        return x.index_select(axis, nearest.long().clamp(0, old - 1))
    low = place.floor()
    share = (place - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    first = x.index_select(axis, low.long().clamp(0, old - 1))
    second = x.index_select(axis, (low.long() + 1).clamp(0, old - 1))
    return first + (second - first) * share


def _matmul(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    a, b = given
    a = a.transpose(-1, -2) if operator.options.get("adj_x") else a
    b = b.transpose(-1, -2) if operator.options.get("adj_y") else b
    return [a @ b]


def _gather(operator: Operator, given: Values, graph: Subgraph) -> list[torch.Tensor]:
    x, rows = given
    axis = operator.options.get("axis", 0)
    picked = x.index_select(axis, rows.flatten().long())
    return [picked.reshape(graph.tensors[operator.outputs[0]].shape)]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., list[torch.Tensor]]:
    return lambda operator, given, graph: _clamped(function(given[0], given[1]), operator)


def _unary(function: Callable[[Any], Any]) -> Callable[..., list[torch.Tensor]]:
    return lambda operator, given, graph: [function(given[0])]


OPERATORS: dict[str, Callable[[Operator, Values, Subgraph], list[torch.Tensor]]] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _conv,
    "TRANSPOSE_CONV": _transpose_conv,
    "FULLY_CONNECTED": _dense,
    "AVERAGE_POOL_2D": _pool,
    "MAX_POOL_2D": _pool,
    "MEAN": _reduce,
    "SUM": _reduce,
    "REDUCE_MAX": _reduce,
    "ADD": _binary(torch.add),
    "SUB": _binary(torch.sub),
    "MUL": _binary(torch.mul),
    "DIV": _binary(torch.div),
    "MAXIMUM": _binary(torch.maximum),
    "MINIMUM": _binary(torch.minimum),
    "SQUARED_DIFFERENCE": _binary(lambda a, b: (a - b) ** 2),
    "BATCH_MATMUL": _matmul,
    "RELU": _unary(torch.relu),
    "RELU6": _unary(functional.relu6),
    "RELU_N1_TO_1": _unary(lambda x: x.clamp(-1, 1)),
    "RELU_0_TO_1": _unary(lambda x: x.clamp(0, 1)),
    "HARD_SWISH": _unary(functional.hardswish),
    "LOGISTIC": _unary(torch.sigmoid),
    "TANH": _unary(torch.tanh),
    "ABS": _unary(torch.abs),
    "NEG": _unary(torch.neg),
    "SQRT": _unary(torch.sqrt),
    "RSQRT": _unary(torch.rsqrt),
    "GELU": lambda o, given, g: [functional.gelu(given[0], approximate="tanh" if o.options.get("approximate") else "none")],
    "SOFTMAX": lambda o, given, g: [torch.softmax(o.options.get("beta", 1.0) * given[0], dim=-1)],
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "EXPAND_DIMS": _reshape,
    "TRANSPOSE": lambda o, given, g: [given[0].permute([int(n) for n in given[1]])],
    "CONCATENATION": lambda o, given, g: _clamped(torch.cat(list(given), dim=o.options["axis"]), o),
    "PACK": lambda o, given, g: [torch.stack(list(given), dim=o.options.get("axis", 0))],
    "UNPACK": lambda o, given, g: list(given[0].unbind(o.options.get("axis", 0))),
    "PAD": _pad,
    "PADV2": _pad,
    "MIRROR_PAD": _pad,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "SPLIT": _split,
    "SPLIT_V": _split,
    "GATHER": _gather,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
}  # fmt: skip
