"""The same values in operators that converters get right: what is known to go wrong, rewritten.

Each was found by ``ci/bench/zoo.py`` or ``ci/bench/node_cases.py`` with onnx2tf 2.6.9, which refused it or
whose file computed something else. A rewrite that does not help does no harm: what is converted is
compared with the model as it was. Pools, constant matrices and types are in the ``onnx_*`` beside this.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, inliner

from edgepipe.tflite_ops.onnx_graph import Graph, Writing, attributes, read_graph
from edgepipe.tflite_ops.onnx_linear import fourier, resize, short_fourier
from edgepipe.tflite_ops.onnx_model import keep_pooled_axes
from edgepipe.tflite_ops.onnx_pools import pool
from edgepipe.tflite_ops.onnx_recurrent import unroll
from edgepipe.tflite_ops.onnx_types import bitwise, through_wider, to_float32

log = logging.getLogger(__name__)

# from which on the pads of Pad are an input
_OPSET = 11

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


def rewrite_for_converters(model: onnx.ModelProto, *, streaming: bool = False) -> int:
    """Rewrite in place what converters get wrong; returns how many operators were rewritten.

    With ``streaming`` an RNN or LSTM stays what it is, which a converter makes one that keeps its state.
    Names of inputs, outputs and of all other values stay. Operators inside loops and branches, and
    in models of an opset before 11, are left as they are.
    """
    count = to_float32(model) + keep_pooled_axes(model)
    if any(o.domain in ("", "ai.onnx") and o.version < _OPSET for o in model.opset_import):
        return count
    graph = read_graph(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        rewrite = _REWRITES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if streaming and rewrite is _step_by_step:
            rewrite = _last_steps
        made = rewrite(node, graph) if rewrite else []
        for new in made:
            del new.metadata_props[:]
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


def _scaled_elu(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``Elu(x; a) = LeakyRelu(Elu(x; 1); a)``: TFLite's ELU has no alpha, and a converter drops it."""
    alpha = attributes(node).get("alpha", 1.0)
    if alpha == 1.0:
        return []
    whole = f"{node.output[0]}_elu"
    return [
        helper.make_node("Elu", [node.input[0]], [whole], f"{node.name}_elu"),
        helper.make_node("LeakyRelu", [whole], [node.output[0]], node.name, alpha=alpha),
    ]


def _lone_batch_norm(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A batch norm that no convolution takes in becomes a depthwise one of 1x1, one operator for two.

    ``y = x * s + (bias - mean * s)`` with ``s = scale / sqrt(variance + epsilon)``, each (C,). As MUL
    and ADD converters leave transposes around it, and take the wrong axis where C is H or W; int8
    has one scale for all channels there, and one for each in a convolution.
    """
    options = attributes(node)
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


def _conv_with_computed_weights(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A convolution whose weights another operator makes (CondConv, a tracker's correlation) as a matrix product.

    A depthwise convolution with one-hot kernels lays each window out as a column: (N, C, H, W) ->
    (N, C K, H', W'), K being the values of a window; (O, C/G, kh, kw) is then (G, O/G, C/G K) times (G, C/G K, H' W').
    """
    options = attributes(node)
    x, w = node.input[:2]
    image, kernel, made = (graph.shapes.get(name, ()) for name in (x, w, node.output[0]))
    if w in graph.constants or len(image) < 3 or not kernel or not made or options.get("auto_pad", b"NOTSET") != b"NOTSET":  # fmt: skip
        return []
    groups = options.get("group", 1)
    window = int(np.prod(kernel[2:]))
    rows = kernel[1] * window
    one_hot = np.eye(window, dtype=np.float32).reshape(1, window, 1, *kernel[2:])
    spread = np.repeat(one_hot, image[1], axis=0).reshape(-1, 1, *kernel[2:])
    options = {key: value for key, value in options.items() if key not in ("group", "auto_pad")}
    write = Writing(node, graph)
    windows = write.op("Conv", x, spread, group=image[1], **options)
    columns = write.reshape(windows, [image[0], groups, rows, -1])
    weights = write.reshape(w, [1, groups, kernel[0] // groups, rows])
    value = write.reshape(write.op("MatMul", weights, columns), made)
    if len(node.input) > 2 and node.input[2]:
        bias = write.reshape(node.input[2], [1, -1, *[1] * (len(made) - 2)])
        value = write.op("Add", value, bias)
    return write.done(value)


def _last_steps(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """The last state of a bidirectional RNN as its output's last step forwards and first step backwards.

    Y is (steps, 2, N, H), Y_h (2, N, H): a converter gives others for Y_h.
    """
    options = attributes(node)
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


# A bound nearer to 0 is 0 to onnx2tf 2.6.9 (build_clip_op, passes/graph_cleanup.py), and its clip or maximum a RELU
_NEARLY_ZERO = 1e-6


def _tiny_bound(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A clip, or a maximum, with a tiny value as ``-min(-x, -low)``: a converter makes it a RELU, whose 0 then is
    divided by or put into a logarithm (``F.normalize`` has 1e-12, ``torch.log(mel.clamp(min=1e-10))``), NaN or -inf on
    black pictures and silence.
    """
    tiny = [name for name in node.input[1 : 2 if node.op_type == "Clip" else None] if _is_tiny(graph.constants.get(name))]  # fmt: skip
    if not tiny or (node.op_type == "Max" and len(node.input) != 2):
        return []
    write = Writing(node, graph)
    value = node.input[0]
    if len(node.input) > 2 and node.input[2]:
        value = write.op("Min", value, node.input[2])
    return write.done(_at_least(write, value, graph.constants[tiny[0]]))


def _at_least(write: Writing, value: str, low: np.ndarray | np.float32) -> str:
    return write.op("Neg", write.op("Min", write.op("Neg", value), np.negative(low)))


def _is_tiny(bound: np.ndarray | None) -> bool:
    return bound is not None and bound.size == 1 and 0 < abs(float(bound.reshape(()))) <= _NEARLY_ZERO  # fmt: skip


def _whole_abs(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``|x| = max(x, -x)`` of whole numbers, for which TFLite's kernel has no int64."""
    if graph.types.get(node.input[0]) != TensorProto.INT64:
        return []
    write = Writing(node, graph)
    return write.end("Max", node.input[0], write.op("Neg", node.input[0]))


def _where_that_picks(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A choice beside values that may be infinite or NaN, its three inputs of one shape.

    A converter computes one of unlike shapes as ``c * x + (1 - c) * y``, which is NaN wherever the value
    that is not chosen is infinite: ``torch.where(d > 0, n / d, 0.0)`` at d = 0. Of one shape it picks.
    """
    made = graph.shapes.get(node.output[0], ())
    shapes = [graph.shapes.get(name, graph.constants[name].shape if name in graph.constants else None) for name in node.input]  # fmt: skip
    if not made or None in shapes or all(shape == made for shape in shapes) or not any(map(graph.may_overflow, node.input[1:])):  # fmt: skip
        return []
    write = Writing(node, graph)
    whole: list[str | np.ndarray] = []
    for name, shape in zip(node.input, shapes, strict=True):
        if shape == made:
            whole.append(name)
        elif name in graph.constants:
            whole.append(np.ascontiguousarray(np.broadcast_to(graph.constants[name], made)))
        else:
            whole.append(write.op("Expand", name, np.array(made, np.int64)))
    return write.end("Where", *whole)


def _log_sum_exp(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``log(sum(exp(x)))`` as ``m + log(sum(exp(x - m)))``, m being the largest x; log-softmax, ``x`` less that.

    Converters write the first without m, which is infinite for x above 88, and the second as the logarithm of
    the softmax, which is that of 0 for values 104 below the largest (float32).
    """
    options = attributes(node)
    is_softmax = node.op_type == "LogSoftmax"
    if graph.opset < 18:
        return []  # axes were an attribute, and LogSoftmax before 13 of another shape
    axes = np.array([options.get("axis", -1)], np.int64) if is_softmax else None
    if not is_softmax and len(node.input) > 1 and node.input[1]:
        axes = graph.constants.get(node.input[1])
        if axes is None:
            return []
    made = graph.shapes.get(node.output[0])
    keeps = bool(options.get("keepdims", 1))
    if not is_softmax and not keeps and made is None:
        return []
    write = Writing(node, graph)
    x = node.input[0]
    along = [] if axes is None else [axes]
    most = write.op("ReduceMax", x, *along, keepdims=1)
    below = write.op("Sub", x, most)
    total = write.op("ReduceSum", write.op("Exp", below), *along, keepdims=1)
    log_sum = write.op("Log", total)
    if is_softmax:
        return write.end("Sub", below, log_sum)
    value = write.op("Add", log_sum, most)
    return write.done(value if keeps or made is None else write.reshape(value, made))


def _last_of_equals(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """ArgMax and ArgMin that want the last of equals: the first from behind, counted from the front."""
    options = attributes(node)
    shape = graph.shapes.get(node.input[0], ())
    if not options.pop("select_last_index", 0) or not shape:
        return []
    axis = options.get("axis", 0) % len(shape)
    write = Writing(node, graph)
    behind = np.arange(shape[axis] - 1, -1, -1)
    turned = write.op("Gather", node.input[0], behind, axis=axis)
    return write.end("Sub", np.int64(shape[axis] - 1), write.op(node.op_type, turned, **options))


def _lp_normalization(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``x / |x|_p``, 0 where that is 0: converters have it for the last axis and p = 2.

    A bound that is almost 0 would be taken for one, and Max for a ReLU: it is that of `_tiny_bound`.
    """
    options = attributes(node)
    rank = len(graph.shapes.get(node.input[0], ()))
    axis, p = options.get("axis", -1), options.get("p", 2)
    if not rank or p not in (1, 2) or graph.types.get(node.input[0]) != TensorProto.FLOAT:
        return []
    write = Writing(node, graph)
    norm = write.reduce(f"ReduceL{p}", node.input[0], [axis % rank])
    return write.end("Div", node.input[0], _at_least(write, norm, np.float32(1e-20)))


def _prelu_of_any_slope(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``relu(x) - slope * relu(-x)``, where the slope is not a constant for each channel."""
    x, slope = node.input
    shape = graph.shapes.get(x, ())
    known = graph.constants.get(slope)
    per_channel = known is not None and len(shape) > 1 and known.size in (1, shape[1]) and known.size == max((1, *known.shape[-len(shape) + 1 :][:1]))  # fmt: skip
    if per_channel or graph.types.get(x) != TensorProto.FLOAT:
        return []
    write = Writing(node, graph)
    below = write.op("Relu", write.op("Neg", x))
    return write.end("Sub", write.op("Relu", x), write.op("Mul", slope, below))


def _remainder(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``fmod(x, y) = sign(x) * mod(|x|, |y|)`` of floats, for which ONNX has no mod before opset 28, and LiteRT has."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    if not attributes(node).get("fmod") or graph.types.get(node.input[0]) not in floats:
        return through_wider(node, graph)
    x, y = node.input
    write = Writing(node, graph)
    rest = write.op("Mod", write.op("Abs", x), write.op("Abs", y), fmod=0)
    return write.end("Mul", write.op("Sign", x), rest)


def _uneven_split(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """Into parts of which the last is smaller: their sizes written out."""
    options = attributes(node)
    shape, parts = graph.shapes.get(node.input[0], ()), options.get("num_outputs", 1)
    axis = options.get("axis", 0)
    if not shape or shape[axis] % parts == 0:
        return []
    size = -(-shape[axis] // parts)
    sizes = np.array([size] * (parts - 1) + [shape[axis] - size * (parts - 1)], np.int64)
    named = graph.constant(f"{node.output[0]}_sizes", sizes)
    return [helper.make_node("Split", [node.input[0], named], node.output, node.name, axis=axis)]


def _pad_of_axes(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A Pad of some axes as one of all; one that wraps around as a choice of values along each axis."""
    rank = len(graph.shapes.get(node.input[0], ()))
    pads, axes = graph.given(node, 1), graph.given(node, 3)
    mode = attributes(node).get("mode", b"constant").decode()
    if not rank or pads is None or (len(node.input) < 4 and mode != "wrap"):
        return []
    where = [int(a) % rank for a in (np.arange(rank) if axes is None else axes)]
    widths = np.zeros((2, rank), np.int64)
    widths[:, where] = pads.reshape(2, -1)
    write = Writing(node, graph)
    if mode != "wrap":
        around = [node.input[2]] if len(node.input) > 2 and node.input[2] else []
        return write.end("Pad", node.input[0], widths.reshape(-1), *around, mode=mode)
    value = node.input[0]
    for axis in np.flatnonzero(widths.any(0)):
        size = graph.shapes[node.input[0]][axis]
        chosen = np.arange(-widths[0, axis], size + widths[1, axis]) % size
        value = write.op("Gather", value, chosen, axis=int(axis))
    return write.done(value)


def _backward_slice(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A slice that walks backwards along some axes, one axis after the other: whole ones are flipped, others picked.

    ``x.flip((1, 3))``, ``x[::-2]``: TFLite reverses, and steps backwards along no axis.
    """
    shape = graph.shapes.get(node.input[0], ())
    known = [v for v in (graph.given(node, k) for k in (1, 2, 3, 4)) if v is not None]
    if not shape or len(known) < 4 or known[3].min(initial=1) > 0:
        return []
    write = Writing(node, graph)
    value, picked = node.input[0], False
    for start, end, axis, step in zip(*known, strict=True):
        size = shape[axis % len(shape)]
        # ends before the first value are the smallest numbers there are
        stop = None if step < 0 and end < -size else int(end)
        chosen = np.arange(size)[slice(int(start), stop, int(step))]
        if step > 0 or (step == -1 and len(chosen) == size):
            value = write.op("Slice", value, *(np.array([n], np.int64) for n in (start, end, axis, step)))  # fmt: skip
        else:
            value, picked = write.op("Gather", value, chosen, axis=int(axis)), True
    if not picked and len(known[0]) == 1:
        return []
    return write.done(value)


def _step_by_step(node: NodeProto, graph: Graph) -> list[NodeProto]:
    return unroll(node, graph) or _last_steps(node, graph)


def _one_operand(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """The sum, or the largest, of one tensor is that tensor."""
    if len(node.input) == 1:
        return Writing(node, graph).end("Identity", node.input[0])
    return through_wider(node, graph) if node.op_type in ("Max", "Min") else []


def _gelu_by_tanh(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``: a converter writes the other GELU.

    As ONNX defines Gelu (opset 20) with ``approximate = "tanh"``.
    """
    if attributes(node).get("approximate", b"none") != b"tanh":
        return []
    x = node.input[0]
    write = Writing(node, graph)
    cube = write.op("Mul", write.op("Mul", x, x), x)
    inner = write.op("Add", x, write.op("Mul", cube, np.float32(0.044715)))
    gate = write.op("Tanh", write.op("Mul", inner, np.float32(np.sqrt(2 / np.pi))))
    return write.end(
        "Mul", write.op("Mul", x, np.float32(0.5)), write.op("Add", gate, np.float32(1))
    )


def _axis_of_hardmax(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """The axis that it has where none is named, which a converter takes for another."""
    if graph.opset < 13 or "axis" in attributes(node):
        return []
    return Writing(node, graph).end("Hardmax", node.input[0], axis=-1)


def _indices_from_the_front(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """Constant indices that count from the end, which LiteRT refuses."""
    indices, shape = graph.given(node, 1), graph.shapes.get(node.input[0], ())
    if indices is None or not shape or (indices >= 0).all():
        return []
    size = shape[attributes(node).get("axis", 0)]
    chosen = np.where(indices < 0, indices + size, indices)
    return Writing(node, graph).end("GatherElements", node.input[0], chosen, **attributes(node))


def _plain_einsum(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """An Einsum of one tensor, or of two to a number, as sums and a Transpose; another without an ellipsis."""
    equation = attributes(node)["equation"].decode().replace(" ", "")
    left, _, right = equation.partition("->")
    shapes = [graph.shapes.get(name, ()) for name in node.input]
    dots = max((len(s) - len(t) + 3 for t, s in zip(left.split(","), shapes, strict=True) if "..." in t), default=0)  # fmt: skip
    ellipsis = "".join(c for c in string.ascii_lowercase if c not in equation)[:dots]
    terms = left.replace("...", ellipsis).split(",")
    if any(len(set(term)) != len(shape) or not term for term, shape in zip(terms, shapes, strict=True)):  # fmt: skip
        return []  # a diagonal, or a shape that is not known
    letters = "".join(terms)
    once = "".join(sorted(c for c in letters if letters.count(c) == 1 and c not in ellipsis))
    made = right.replace("...", ellipsis) if "->" in equation else ellipsis + once
    write = Writing(node, graph)
    value, term = node.input[0], terms[0]
    if len(terms) == 2 and not made and set(terms[0]) == set(terms[1]):
        order = [terms[1].index(c) for c in term]
        value = write.op("Mul", value, write.op("Transpose", node.input[1], perm=order))
    elif len(terms) > 1:
        plain = f"{','.join(terms)}->{made}"
        return [] if plain == equation else write.end("Einsum", *node.input, equation=plain)
    gone = [k for k, c in enumerate(term) if c not in made]
    if gone:
        value = write.reduce("ReduceSum", value, gone)
        value = write.reshape(value, [n for k, n in enumerate(shapes[0]) if k not in gone])
    rest = [c for c in term if c in made]
    if not rest:
        return write.done(value)
    return write.end("Transpose", value, perm=[rest.index(c) for c in made])


_REWRITES: dict[str, Callable[[NodeProto, Graph], list[NodeProto]]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), through_wider),
    **dict.fromkeys(("BitwiseNot", "ReduceMax", "ReduceMin"), through_wider),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr"), bitwise),
    **dict.fromkeys(("ArgMax", "ArgMin"), _last_of_equals),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), pool),
    **dict.fromkeys(("Min", "Sum", "Mean"), _one_operand),
    "BatchNormalization": _lone_batch_norm,
    "DFT": fourier,
    "Einsum": _plain_einsum,
    "Elu": _scaled_elu,
    "GatherElements": _indices_from_the_front,
    "Gelu": _gelu_by_tanh,
    "Hardmax": _axis_of_hardmax,
    "Abs": _whole_abs,
    "Clip": _tiny_bound,
    "Conv": _conv_with_computed_weights,
    "GRU": _last_steps,
    "LSTM": _step_by_step,
    "LogSoftmax": _log_sum_exp,
    "LpNormalization": _lp_normalization,
    "Max": lambda node, graph: _tiny_bound(node, graph) or _one_operand(node, graph),
    "Mod": _remainder,
    "PRelu": _prelu_of_any_slope,
    "Pad": _pad_of_axes,
    "RNN": _step_by_step,
    "ReduceLogSumExp": _log_sum_exp,
    "Resize": resize,
    "STFT": short_fourier,
    "Slice": _backward_slice,
    "Split": _uneven_split,
    "Where": _where_that_picks,
}  # fmt: skip
