"""Numbers of types that LiteRT's kernels do not take, in types that they do."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from edgepipe.tflite_ops.onnx_graph import Graph, Writing

log = logging.getLogger(__name__)

_BYTES = (TensorProto.INT8, TensorProto.UINT8)
_NARROW = (*_BYTES, TensorProto.INT16, TensorProto.UINT16)
# LiteRT's kernels take bytes as quantised numbers, or not at all; operator -> types that go through a wider one
_THROUGH = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Mod", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitwiseNot"), (*_NARROW, TensorProto.UINT32)),
    "Div": _NARROW,  # converters divide as float32, which is exact up to 24 bits
    **dict.fromkeys(("Max", "Min"), (TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT32)),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), (TensorProto.BOOL,)),
}  # fmt: skip


def through_wider(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """Arithmetic and comparison of small integers in int32, of uint32 in int64, and back: they wrap as they did."""
    kind = graph.types.get(node.input[0])
    if kind not in _THROUGH[node.op_type]:
        return []
    wide = TensorProto.INT64 if kind == TensorProto.UINT32 else TensorProto.INT32
    write = Writing(node, graph)
    widened = {name: write.op("Cast", name, to=wide) for name in dict.fromkeys(node.input) if graph.types.get(name) == kind}  # fmt: skip
    back = graph.types.get(node.output[0])
    inner = NodeProto()
    inner.CopyFrom(node)
    inner.input[:] = [widened.get(name, name) for name in node.input]
    if back != kind:  # a comparison
        write.nodes.append(inner)
        return write.nodes
    inner.output[0] = f"{node.output[0]}_wide"
    inner.name = f"{node.name}_wide"
    write.nodes.append(inner)
    return write.end("Cast", inner.output[0], to=kind)


def bitwise(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """``a & b = (a + b - (a ^ b)) / 2`` and ``a | b = (a + b + (a ^ b)) / 2``, of at most 16 bits.

    LiteRT has only the exclusive or. Sums of wider ones are more than float32 divides exactly, as converters do.
    """
    kind = graph.types.get(node.input[0])
    if kind not in _NARROW:
        return []
    write = Writing(node, graph)
    either = write.op("Cast", write.op("BitwiseXor", *node.input), to=TensorProto.INT32)
    total = write.op("Add", *(write.op("Cast", name, to=TensorProto.INT32) for name in node.input))
    twice = write.op("Add" if node.op_type == "BitwiseOr" else "Sub", total, either)
    return write.end("Cast", write.op("Div", twice, np.int32(2)), to=kind)


def to_float32(model: onnx.ModelProto) -> int:
    """Make float64 float32 throughout, in place; returns how many tensors and operators changed.

    LiteRT has hardly a kernel for float64. A model that takes bits apart (BitCast) is left as it is.
    """
    nodes = list(_nodes(model.graph))
    if any(node.op_type == "BitCast" for node in nodes):
        return 0
    changed = 0
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            changed += _narrow(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
                changed += 1
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                changed += _narrow(attribute.t)
            # Cast's to, and the dtype of what makes numbers
            elif attribute.name in ("to", "dtype", "output_datatype", "softmax_precision", "stash_type") and attribute.i == TensorProto.DOUBLE:  # fmt: skip
                attribute.i = TensorProto.FLOAT
                changed += 1
    if changed:
        log.info("the model has numbers of float64, which LiteRT cannot compute with: float32 instead")  # fmt: skip
    return changed


def _narrow(tensor: TensorProto) -> bool:
    if tensor.data_type != TensorProto.DOUBLE:
        return False
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))  # fmt: skip
    return True


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those of its loops and branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    for inner in _graphs(graph):
        yield from inner.node
