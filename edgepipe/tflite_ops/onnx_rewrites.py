"""The same values in operators that converters get right: what is known to go wrong, rewritten.

Each was found by ``ci/bench/zoo.py`` with onnx2tf 2.6.9, whose file computed something else. A rewrite
that does not help does no harm: what is converted is compared with the model as it was.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, helper, inliner, numpy_helper

from edgepipe.tflite_ops.onnx_model import keep_pooled_axes

log = logging.getLogger(__name__)

# from which on the pads of Pad are an input
_OPSET = 11


@dataclasses.dataclass(frozen=True)
class _Graph:
    """``shapes`` and ``constants`` by name, where known; ``folding``: values that only one batch norm
    reads, and that a convolution makes, which converters merge; ``makers``: the node that makes a value;
    ``read``: values that a node or the caller reads; ``int64``: those of that type; ``added``: new initialisers."""

    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, np.ndarray]
    folding: frozenset[str]
    makers: Mapping[str, NodeProto]
    read: frozenset[str]
    int64: frozenset[str]
    opset: int
    added: list[onnx.TensorProto] = dataclasses.field(default_factory=list)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.added.append(numpy_helper.from_array(value, name))
        return name

    def may_overflow(self, name: str) -> bool:
        """Whether a value may be infinite or NaN while the model's inputs are not."""
        waiting, seen = [name], set()
        while waiting:
            value = waiting.pop()
            node = self.makers.get(value)
            if node is None or value in seen or node.op_type in _MIXING:
                continue
            if node.op_type in _UNSAFE:
                return True
            seen.add(value)
            waiting += node.input
        return False


# Functions of the ONNX standard that no converter knows, and what their bodies are written with
FUNCTIONS = ("Attention", "CausalConvWithState", "RMSNormalization", "RotaryEmbedding", "Swish", "CastLike")  # fmt: skip


def expand_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each of `FUNCTIONS` replaced by its body, as the ONNX standard defines it.

    Names of inputs and outputs stay. One whose types cannot be inferred is left for the converter
    to refuse.
    """
    if not any(node.op_type in FUNCTIONS and not node.domain for node in model.graph.node):
        return model
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    # the inliner asks for the types of constants, too, and of an optional input that is left out, which has no name
    typed.graph.value_info.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )  # fmt: skip
    typed.graph.value_info.append(helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, []))
    try:
        expanded = inliner.inline_selected_functions(typed, [("", n) for n in FUNCTIONS], inline_schema_functions=True)  # fmt: skip
    except RuntimeError as exc:
        log.info("a function of the ONNX standard cannot be written out: %s", exc)
        return model
    del expanded.graph.value_info[:]
    return expanded


def rewrite_for_converters(model: onnx.ModelProto) -> int:
    """Rewrite in place what converters get wrong; returns how many operators were rewritten.

    Names of inputs, outputs and of all other values stay. Operators inside loops and branches, and
    in models of an opset before 11, are left as they are.
    """
    count = keep_pooled_axes(model) + _doubles_as_floats(model.graph)
    if any(o.domain in ("", "ai.onnx") and o.version < _OPSET for o in model.opset_import):
        return count
    graph = _read(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        rewrite = _REWRITES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        made = rewrite(node, graph) if rewrite else []
        for new in made:
            new.metadata_props.extend(node.metadata_props)
        count += bool(made)
        nodes += made or [node]
    if count:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(graph.added)
    return count + _views_of_their_own(model.graph)


# Operators that only name or order values anew
_VIEWS = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}


def _views_of_their_own(graph: onnx.GraphProto) -> int:
    """A view that is an output of the model and is read inside, too, made once for each; returns how many were.

    Converters merge views with what reads them, and leave an output that nothing makes.
    """
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input}
    count = 0
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in _VIEWS or node.output[0] not in outputs & read:
            continue
        inside = NodeProto()
        inside.CopyFrom(node)
        inside.name, inside.output[0] = f"{node.name}_inside", f"{node.output[0]}_inside"
        nodes.append(inside)
        count += 1
        for reader in graph.node:
            for position, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[position] = inside.output[0]
    if count:
        del graph.node[:]
        graph.node.extend(nodes)
    return count


def _scaled_elu(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """``Elu(x; a) = LeakyRelu(Elu(x; 1); a)``: TFLite's ELU has no alpha, and a converter drops it."""
    alpha = _attributes(node).get("alpha", 1.0)
    if alpha == 1.0:
        return []
    whole = f"{node.output[0]}_elu"
    return [
        helper.make_node("Elu", [node.input[0]], [whole], f"{node.name}_elu"),
        helper.make_node("LeakyRelu", [whole], [node.output[0]], node.name, alpha=alpha),
    ]


def _average_pool_of_ceil_mode(node: NodeProto, graph: _Graph) -> list[NodeProto]:  # fmt: skip
    """An average pool whose last windows reach over the edge: zeros around, and the counts mended.

    TFLite's pools either stop before the edge or pad as it suits them. With k values in a window of
    which n count, ``mean = (sum / k) * (k / n)``: over zeros a pool without padding gives sum / k,
    and k / n is a constant of shape (1, 1, *spatial).
    """
    options = _attributes(node)
    shape = graph.shapes.get(node.input[0], ())
    kernel = list(options["kernel_shape"])
    rank = len(kernel)
    pads = list(options.get("pads", [0] * 2 * rank))
    strides = list(options.get("strides", [1] * rank))
    plain = options.get("auto_pad", b"NOTSET") == b"NOTSET" and set(options.get("dilations", [1])) == {1}  # fmt: skip
    if not options.get("ceil_mode") or not plain or len(shape) != rank + 2:
        return []
    axes = [
        _windows(size, kernel[i], strides[i], pads[i], pads[rank + i], bool(options.get("count_include_pad")))
        for i, size in enumerate(shape[2:])
    ]  # fmt: skip
    if all(extra == 0 for extra, _ in axes):
        return []  # nothing reaches over: ceil_mode makes no difference
    after = [pads[rank + i] + extra for i, (extra, _) in enumerate(axes)]
    padded, pooled = f"{node.output[0]}_padded", f"{node.output[0]}_pooled"
    counts = np.ones([1] * (rank + 2))
    for i, (_, counted) in enumerate(axes):
        along = [1] * (rank + 2)
        along[i + 2] = len(counted)
        counts = counts * counted.reshape(along)
    factors = (np.prod(kernel) / counts).astype(np.float32)
    widths = np.array([0, 0, *pads[:rank], 0, 0, *after], dtype=np.int64)
    made = [
        helper.make_node("Pad", [node.input[0], graph.constant(f"{padded}_widths", widths)], [padded], f"{node.name}_pad"),
        helper.make_node("AveragePool", [padded], [pooled], node.name, kernel_shape=kernel, strides=strides),
        helper.make_node("Mul", [pooled, graph.constant(f"{pooled}_factors", factors)], [node.output[0]], f"{node.name}_counts"),
    ]  # fmt: skip
    return made


def _lone_batch_norm(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A batch norm that no convolution takes in becomes a depthwise one of 1x1, one operator for two.

    ``y = x * s + (bias - mean * s)`` with ``s = scale / sqrt(variance + epsilon)``, each (C,). As MUL
    and ADD converters leave transposes around it, and take the wrong axis where C is H or W; int8
    has one scale for all channels there, and one for each in a convolution.
    """
    options = _attributes(node)
    shape = graph.shapes.get(node.input[0], ())
    known = [graph.constants.get(name) for name in node.input[1:5]]
    values = [v.astype(np.float64) for v in known if v is not None and v.dtype == np.float32]
    trained = len(node.output) > 1 or options.get("training_mode")
    if trained or len(shape) != 4 or len(values) != 4 or node.input[0] in graph.folding:
        return []
    scale, bias, mean, variance = values
    gain = scale / np.sqrt(variance + options.get("epsilon", 1e-5))
    y = node.output[0]
    weights = graph.constant(f"{y}_gain", gain.reshape(-1, 1, 1, 1).astype(np.float32))
    offsets = graph.constant(f"{y}_offset", (bias - mean * gain).astype(np.float32))
    return [
        helper.make_node(
            "Conv", [node.input[0], weights, offsets], [y], node.name, kernel_shape=[1, 1], group=len(gain)
        )
    ]  # fmt: skip


def _doubles_as_floats(graph: onnx.GraphProto) -> int:
    """Every float64 value of a graph as float32, which TFLite's kernels take; returns how many were named.

    A NumPy constant makes float64 of all that it touches. Whether float32 is enough, parity says.
    """
    double, single = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    count = 0

    def as_single(tensor: onnx.TensorProto) -> None:
        nonlocal count
        if tensor.data_type == double:
            with np.errstate(over="ignore"):  # infinite then, as in float32
                values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            count += 1

    for tensor in graph.initializer:
        as_single(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == double:
            value.type.tensor_type.elem_type = single
            count += 1
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                as_single(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                count += _doubles_as_floats(attribute.g)
            elif attribute.name in ("to", "dtype") and attribute.i == double:
                attribute.i = single
                count += 1
    return count


def _conv_with_computed_weights(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A convolution whose weights another operator makes (CondConv, a tracker's correlation) as a matrix product.

    A depthwise convolution with one-hot kernels lays each window out as a column: (N, C, H, W) ->
    (N, C K, H', W'), K being the values of a window; (O, C/G, kh, kw) is then (G, O/G, C/G K) times (G, C/G K, H' W').
    """
    options = _attributes(node)
    x, w = node.input[:2]
    image, kernel, made = (graph.shapes.get(name, ()) for name in (x, w, node.output[0]))
    if w in graph.constants or len(image) < 3 or not kernel or not made or options.get("auto_pad", b"NOTSET") != b"NOTSET":  # fmt: skip
        return []
    groups = options.get("group", 1)
    window, y = int(np.prod(kernel[2:])), node.output[0]
    rows = kernel[1] * window
    one_hot = np.eye(window, dtype=np.float32).reshape(1, window, 1, *kernel[2:])
    spread = np.repeat(one_hot, image[1], axis=0).reshape(-1, 1, *kernel[2:])
    options = {key: value for key, value in options.items() if key not in ("group", "auto_pad")}

    def shaped(name: str, source: str, sizes: list[int], to: str) -> NodeProto:
        target = graph.constant(f"{y}_{name}_shape", np.array(sizes, np.int64))
        return helper.make_node("Reshape", [source, target], [to], f"{node.name}_{name}")

    nodes = [
        helper.make_node("Conv", [x, graph.constant(f"{y}_spread", spread)], [f"{y}_windows"], f"{node.name}_windows", group=image[1], **options),
        shaped("columns", f"{y}_windows", [image[0], groups, rows, -1], f"{y}_columns"),
        shaped("weights", w, [1, groups, kernel[0] // groups, rows], f"{y}_weights"),
        helper.make_node("MatMul", [f"{y}_weights", f"{y}_columns"], [f"{y}_products"], node.name),
    ]  # fmt: skip
    if len(node.input) < 3 or not node.input[2]:
        return [*nodes, shaped("result", f"{y}_products", list(made), y)]
    return [
        *nodes, shaped("result", f"{y}_products", list(made), f"{y}_unbiased"),
        shaped("bias", node.input[2], [1, -1, *[1] * (len(made) - 2)], f"{y}_bias"),
        helper.make_node("Add", [f"{y}_unbiased", f"{y}_bias"], [y], f"{node.name}_add"),
    ]  # fmt: skip


def _stft(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A short-time Fourier transform of a real signal as a convolution with windowed cosines and sines.

    ``Y[m, k] = sum over n of w[n] x[m s + n] e^(-2 pi i k n / L)`` (ONNX, STFT-17): (N, T[, 1]) -> (N, frames,
    L/2 + 1, 2), the last axis being the real and the imaginary part.
    """
    shape, made = graph.shapes.get(node.input[0], ()), graph.shapes.get(node.output[0], ())
    step, window, length = ([graph.constants.get(n) for n in node.input[1:]] + [None] * 3)[:3]
    if window is None and length is not None and not node.input[2]:
        window = np.ones(int(length))
    bins = made[2] if len(made) == 4 else 0
    real = len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)
    if not real or step is None or window is None or not bins:
        return []
    size = len(window)
    angles = 2 * np.pi * (np.outer(np.arange(bins), np.arange(size)) % size) / size
    waves = np.concatenate([np.cos(angles), -np.sin(angles)]) * window  # (2 bins, L)
    y = node.output[0]
    batch, frames = made[:2]
    return [
        helper.make_node("Reshape", [node.input[0], graph.constant(f"{y}_row", np.array([batch, 1, shape[1]], np.int64))], [f"{y}_signal"], f"{node.name}_signal"),
        helper.make_node("Conv", [f"{y}_signal", graph.constant(f"{y}_waves", waves[:, None].astype(np.float32))], [f"{y}_parts"], node.name, kernel_shape=[size], strides=[int(step)]),
        # (N, 2 bins, frames) -> (N, 2, bins, frames) -> (N, frames, bins, 2)
        helper.make_node("Reshape", [f"{y}_parts", graph.constant(f"{y}_split", np.array([batch, 2, bins, frames], np.int64))], [f"{y}_two"], f"{node.name}_two"),
        helper.make_node("Transpose", [f"{y}_two"], [y], f"{node.name}_last", perm=[0, 3, 2, 1]),
    ]  # fmt: skip


def _last_steps(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """The last state of a bidirectional RNN as its output's last step forwards and first step backwards.

    Y is (steps, 2, N, H), Y_h (2, N, H): a converter gives others for Y_h.
    """
    options = _attributes(node)
    lengths = node.input[4] if len(node.input) > 4 else ""
    read = len(node.output) > 1 and node.output[1] in graph.read
    if (
        options.get("direction") != b"bidirectional"
        or options.get("layout", 0)
        or lengths
        or not read
    ):
        return []
    whole, last = node.output[0] or f"{node.output[1]}_whole", node.output[1]
    made = NodeProto()
    made.CopyFrom(node)
    made.output[0], made.output[1] = whole, ""
    bounds = {
        "end": [-1, 0],
        "end_stop": [2**31 - 1, 1],
        "start": [0, 1],
        "start_stop": [1, 2],
        "axes": [0, 1],
        "first": [0],
    }
    for name, values in bounds.items():
        graph.constant(f"{last}_{name}", np.array(values, np.int64))
    parts = [
        helper.make_node("Slice", [whole, f"{last}_{at}", f"{last}_{at}_stop", f"{last}_axes"], [f"{last}_of_{at}"], f"{node.name}_{at}")
        for at in ("end", "start")
    ]  # fmt: skip
    return [
        made, *parts,
        helper.make_node("Concat", [f"{last}_of_end", f"{last}_of_start"], [f"{last}_steps"], f"{node.name}_both", axis=1),
        helper.make_node("Squeeze", [f"{last}_steps", f"{last}_first"], [last], f"{node.name}_last"),
    ]  # fmt: skip


# A bound nearer to 0 is 0 to onnx2tf 2.6.9 (build_clip_op), and the clip a RELU
_NEARLY_ZERO = 1e-6


def _tiny_bound(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A clip at a tiny positive value as Max: a converter makes it a RELU, whose 0 then is divided by or put into a
    logarithm (``F.normalize`` has 1e-12, ``torch.log(mel.clamp(min=1e-10))``), NaN or -inf on black pictures and silence.
    """
    bounds = [name for name in node.input[1:] if name]
    low = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if low is None or low.size != 1 or not 0 < abs(float(low.reshape(()))) <= _NEARLY_ZERO:
        return []
    if len(bounds) == 1:
        return [helper.make_node("Max", [node.input[0], bounds[0]], [node.output[0]], node.name)]
    low_enough = f"{node.output[0]}_least"
    return [
        helper.make_node("Max", [node.input[0], bounds[0]], [low_enough], f"{node.name}_least"),
        helper.make_node("Min", [low_enough, bounds[1]], [node.output[0]], node.name),
    ]


def _whole_abs(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """``|x| = max(x, -x)`` of whole numbers, for which TFLite's kernel has no int64."""
    if node.input[0] not in graph.int64:
        return []
    minus = f"{node.output[0]}_minus"
    return [
        helper.make_node("Neg", [node.input[0]], [minus], f"{node.name}_minus"),
        helper.make_node("Max", [node.input[0], minus], [node.output[0]], node.name),
    ]


def _flip(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A slice that walks several axes, one of them backwards (``x.flip((1, 3))``), one axis after the other."""
    names = ("starts", "ends", "axes", "steps")
    known = [graph.constants[name] for name in node.input[1:] if name in graph.constants]
    if len(known) != len(names) or len(known[0]) < 2 or min(known[3]) > 0:
        return []
    nodes: list[NodeProto] = []
    current = node.input[0]
    for i in range(len(known[0])):
        made = node.output[0] if i == len(known[0]) - 1 else f"{node.output[0]}_{i}"
        along = [
            graph.constant(f"{node.output[0]}_{i}_{n}", v[i : i + 1])
            for n, v in zip(names, known, strict=True)
        ]
        nodes.append(helper.make_node("Slice", [current, *along], [made], f"{node.name}_{i}"))
        current = made
    return nodes


# What may make infinity or NaN of finite values
_UNSAFE = {
    "Div",
    "Log",
    "Reciprocal",
    "Sqrt",
    "Pow",
    "Exp",
    "Tan",
    "Asin",
    "Acos",
    "Acosh",
    "Atanh",
    "Sinh",
    "Cosh",
}
# What a value is no more simply passed on by: sums of products, and what is bounded
_MIXING = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Softmax", "Sigmoid", "Tanh", "LayerNormalization", "LSTM", "GRU", "RNN"}  # fmt: skip


def _where_that_picks(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A choice beside values that may be infinite or NaN, its three inputs of one shape.

    A converter computes one of unlike shapes as ``c * x + (1 - c) * y``, which is NaN wherever the value
    that is not chosen is infinite: ``torch.where(d > 0, n / d, 0.0)`` at d = 0. Of one shape it picks.
    """
    made = graph.shapes.get(node.output[0], ())
    shapes = [graph.shapes.get(name, graph.constants[name].shape if name in graph.constants else None) for name in node.input]  # fmt: skip
    if not made or None in shapes or all(shape == made for shape in shapes) or not any(map(graph.may_overflow, node.input[1:])):  # fmt: skip
        return []
    nodes, whole = [], []
    for position, (name, shape) in enumerate(zip(node.input, shapes, strict=True)):
        wide = f"{node.output[0]}_whole{position}"
        if shape == made:
            wide = name
        elif name in graph.constants:
            graph.constant(wide, np.ascontiguousarray(np.broadcast_to(graph.constants[name], made)))
        else:
            sizes = graph.constant(f"{wide}_shape", np.array(made, np.int64))
            nodes.append(helper.make_node("Expand", [name, sizes], [wide], f"{node.name}_expand{position}"))  # fmt: skip
        whole.append(wide)
    return [*nodes, helper.make_node("Where", whole, [node.output[0]], node.name)]


def _log_sum_exp(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """``log(sum(exp(x)))`` as ``m + log(sum(exp(x - m)))``, m being the largest x; log-softmax, ``x`` less that.

    Converters write the first without m, which is infinite for x above 88, and the second as the logarithm of
    the softmax, which is that of 0 for values 104 below the largest (float32).
    """
    options = _attributes(node)
    is_softmax = node.op_type == "LogSoftmax"
    if graph.opset < 18:
        return []  # axes were an attribute, and LogSoftmax before 13 of another shape
    axes = np.array([options.get("axis", -1)], np.int64) if is_softmax else None
    if not is_softmax and len(node.input) > 1 and node.input[1]:
        axes = graph.constants.get(node.input[1])
        if axes is None:
            return []
    x, y = node.input[0], node.output[0]
    along = [] if axes is None else [graph.constant(f"{y}_axes", axes)]
    made = [
        helper.make_node("ReduceMax", [x, *along], [f"{y}_max"], f"{node.name}_max", keepdims=1),
        helper.make_node("Sub", [x, f"{y}_max"], [f"{y}_below"], f"{node.name}_below"),
        helper.make_node("Exp", [f"{y}_below"], [f"{y}_exp"], f"{node.name}_exp"),
        helper.make_node("ReduceSum", [f"{y}_exp", *along], [f"{y}_sum"], f"{node.name}_sum", keepdims=1),
        helper.make_node("Log", [f"{y}_sum"], [f"{y}_log"], f"{node.name}_log"),
    ]  # fmt: skip
    if is_softmax:
        return [*made, helper.make_node("Sub", [f"{y}_below", f"{y}_log"], [y], node.name)]
    if options.get("keepdims", 1):
        return [*made, helper.make_node("Add", [f"{y}_log", f"{y}_max"], [y], node.name)]
    if y not in graph.shapes:
        return []
    sizes = graph.constant(f"{y}_shape", np.array(graph.shapes[y], np.int64))
    return [
        *made, helper.make_node("Add", [f"{y}_log", f"{y}_max"], [f"{y}_kept"], f"{node.name}_add"),
        helper.make_node("Reshape", [f"{y}_kept", sizes], [y], node.name),
    ]  # fmt: skip


def _circular_pad(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A pad that goes on at the other side (``padding_mode="circular"``): every axis picked by index.

    Three values padded by 1 and 2: 2, 0, 1, 2, 0, 1.
    """
    shape = graph.shapes.get(node.input[0], ())
    widths = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    given = graph.constants.get(node.input[3]) if len(node.input) > 3 and node.input[3] else range(len(shape))  # fmt: skip
    if _attributes(node).get("mode") != b"wrap" or not shape or widths is None or given is None:
        return []
    axes = [int(axis) % len(shape) for axis in given]
    nodes: list[NodeProto] = []
    current = node.input[0]
    for axis, before, after in zip(axes, widths[: len(axes)], widths[len(axes) :], strict=True):
        if not before and not after:
            continue
        name = f"{node.output[0]}_axis{axis}"
        index = graph.constant(f"{name}_index", np.arange(-before, shape[axis] + after) % shape[axis])  # fmt: skip
        nodes.append(helper.make_node("Gather", [current, index], [name], name, axis=axis))
        current = name
    if nodes:
        nodes[-1].output[0] = node.output[0]
    return nodes


def _resize_of_another_scale(node: NodeProto, graph: _Graph) -> list[NodeProto]:
    """A resize that TFLite has no operator for, one axis after the other: with an antialiasing filter,
    or by a scale that is not the output's size over the input's (5 by 1.7 is 8: of TFLite's operators it is 1.6).

    Each output along an axis is a sum of inputs with fixed weights, so the axis is multiplied with their
    matrix (in, out), and picked by index where they are 0 and 1 (nearest). The weights are those
    of onnxruntime, of the identity.
    """
    options = _attributes(node)
    shape, made = graph.shapes.get(node.input[0], ()), graph.shapes.get(node.output[0], ())
    scales = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    whole = range(len(shape))
    if not shape or len(made) != len(shape) or options.get("axes") or options.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":  # fmt: skip
        return []
    if scales is None or len(scales) != len(shape):
        scales = np.array([made[i] / shape[i] for i in whole], dtype=np.float32)
    mode = options.get("coordinate_transformation_mode", b"half_pixel")
    inexact = mode != b"align_corners" and any(
        abs(shape[i] * scales[i] - made[i]) > 1e-3 for i in whole
    )
    if mode == b"tf_crop_and_resize" or not (inexact or options.get("antialias")):
        return []
    nodes: list[NodeProto] = []
    current = node.input[0]
    for axis in [i for i in whole if scales[i] != 1]:
        weights = _resize_weights(node, shape[axis], float(scales[axis]))
        if weights.shape != (shape[axis], made[axis]):
            return []
        last = axis == len(shape) - 1
        name = f"{node.output[0]}_axis{axis}"
        if options.get("mode", b"nearest") == b"nearest":
            picked = graph.constant(f"{name}_index", weights.argmax(0).astype(np.int64))
            nodes.append(helper.make_node("Gather", [current, picked], [name], name, axis=axis))
        elif last:
            nodes.append(
                helper.make_node(
                    "MatMul", [current, graph.constant(f"{name}_weights", weights)], [name], name
                )
            )
        else:
            order = [i for i in whole if i != axis] + [axis]
            back = [order.index(i) for i in whole]
            nodes += [
                helper.make_node("Transpose", [current], [f"{name}_last"], f"{name}_last", perm=order),
                helper.make_node("MatMul", [f"{name}_last", graph.constant(f"{name}_weights", weights)], [f"{name}_made"], name),
                helper.make_node("Transpose", [f"{name}_made"], [name], f"{name}_back", perm=back),
            ]  # fmt: skip
        current = name
    if nodes:
        nodes[-1].output[0] = node.output[0]
    return nodes


def _resize_weights(node: NodeProto, size: int, scale: float) -> np.ndarray:
    """What onnxruntime's resize of one axis multiplies with: (size, size * scale), float32."""
    one = helper.make_node("Resize", ["x", "", "scales"], ["y"])
    one.attribute.extend(node.attribute)
    tensor = onnx.TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            [one], "one_axis",
            [helper.make_tensor_value_info("x", tensor, [1, size, 1, size])],
            [helper.make_tensor_value_info("y", tensor, [1, size, 2, None])],
            # one row becomes two equal ones: onnxruntime copies what keeps its size, 3 by 1.3, instead of resizing it
            [numpy_helper.from_array(np.array([1, 1, 2, scale], np.float32), "scales")],
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=8,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # fmt: skip
    weights = session.run(["y"], {"x": np.eye(size, dtype=np.float32)[None, :, None]})[0]
    return np.asarray(weights)[0, :, 0]


def _windows(size: int, kernel: int, stride: int, before: int, after: int, include_pad: bool) -> tuple[int, np.ndarray]:  # fmt: skip
    """How far the windows reach beyond the padding, and how many values count in each.

    A size of 11, kernel 2, stride 2: six windows, the last of them over values 10 and 11, of which
    one exists: (1, [2, 2, 2, 2, 2, 1]).
    """
    count = -(-(size + before + after - kernel) // stride) + 1
    if (count - 1) * stride >= size + before:
        count -= 1  # PyTorch and ONNX: no window begins beyond the values
    low, high = (-before, size + after) if include_pad else (0, size)
    starts = range(-before, -before + count * stride, stride)
    counted = np.array([min(s + kernel, high) - max(s, low) for s in starts], dtype=np.float64)
    return max(0, (count - 1) * stride + kernel - (size + before + after)), counted


_REWRITES: dict[str, Callable[[NodeProto, _Graph], list[NodeProto]]] = {
    "Elu": _scaled_elu,
    "BatchNormalization": _lone_batch_norm,
    "AveragePool": _average_pool_of_ceil_mode,
    "Conv": _conv_with_computed_weights,
    "STFT": _stft,
    "Abs": _whole_abs,
    "Clip": _tiny_bound,
    "Slice": _flip,
    "LSTM": _last_steps,
    "GRU": _last_steps,
    "RNN": _last_steps,
    "LogSoftmax": _log_sum_exp,
    "ReduceLogSumExp": _log_sum_exp,
    "Pad": _circular_pad,
    "Resize": _resize_of_another_scale,
    "Where": _where_that_picks,
}


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _read(model: onnx.ModelProto) -> _Graph:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    int64 = frozenset(
        v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.INT64
    )
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    folding = frozenset(
        node.output[0]
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose") and readers[node.output[0]] == 1
    )
    makers = {name: node for node in model.graph.node for name in node.output}
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    return _Graph(shapes, constants, folding, makers, frozenset(readers), int64, opset)
