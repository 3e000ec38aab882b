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
from onnx import NodeProto, helper, inliner, numpy_helper

from edgepipe.tflite_ops.onnx_model import keep_pooled_axes

log = logging.getLogger(__name__)

# from which on the pads of Pad are an input
_OPSET = 11


@dataclasses.dataclass(frozen=True)
class _Graph:
    """``shapes`` and ``constants`` by name, where known; ``folding``: values that only one batch norm
    reads, and that a convolution makes, which converters merge; ``added``: new initialisers."""

    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, np.ndarray]
    folding: frozenset[str]
    added: list[onnx.TensorProto] = dataclasses.field(default_factory=list)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.added.append(numpy_helper.from_array(value, name))
        return name


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
    count = keep_pooled_axes(model)
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
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    folding = frozenset(
        node.output[0]
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose") and readers[node.output[0]] == 1
    )
    return _Graph(shapes, constants, folding)
