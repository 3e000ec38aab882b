"""What a rewrite of one ONNX operator reads, and how it writes the operators that replace it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

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


@dataclasses.dataclass(frozen=True)
class Graph:
    """``shapes``, ``types`` (of `onnx.TensorProto`) and ``constants`` by name, where known; ``folding``:
    values that only one batch norm reads, and that a convolution makes, which converters merge; ``makers``:
    the node that makes a value; ``read``: values that a node or the caller reads; ``added``: new initialisers."""

    opset: int
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]
    constants: Mapping[str, np.ndarray]
    folding: frozenset[str]
    makers: Mapping[str, NodeProto]
    read: frozenset[str]
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

    def given(self, node: NodeProto, position: int, attribute: str = "") -> np.ndarray | None:
        """A constant input of a node, or the attribute that it was before an opset; None where neither is."""
        if position < len(node.input) and node.input[position]:
            return self.constants.get(node.input[position])
        value = attributes(node).get(attribute)
        return None if value is None else np.asarray(value)


class Writing:
    """The operators that stand for one: `op` adds one and names its output, `end` adds the last."""

    def __init__(self, node: NodeProto, graph: Graph) -> None:
        self.node, self.graph = node, graph
        self.nodes: list[NodeProto] = []

    def op(
        self, kind: str, *inputs: str | np.ndarray | np.generic, makes: str = "", **options: Any
    ) -> str:
        """The name of its output: ``makes``, or a new one. An array becomes a constant."""
        own = makes or f"{self.node.output[0]}_rewritten_{len(self.nodes)}"
        names = [i if isinstance(i, str) else self.graph.constant(f"{own}_constant_{k}", np.asarray(i)) for k, i in enumerate(inputs)]  # fmt: skip
        self.nodes.append(helper.make_node(kind, names, [own], f"{self.node.name}_{len(self.nodes)}", **options))  # fmt: skip
        return own

    def end(
        self, kind: str, *inputs: str | np.ndarray | np.generic, **options: Any
    ) -> list[NodeProto]:
        """All operators; the last one makes the output of the node that they replace."""
        self.op(kind, *inputs, makes=self.node.output[0], **options)
        self.nodes[-1].name = self.node.name
        return self.nodes

    def done(self, value: str) -> list[NodeProto]:
        """All operators, of which the last one's output, or the value that nothing was done to, is the node's."""
        if not self.nodes:
            return self.end("Identity", value)
        self.nodes[-1].output[0] = self.node.output[0]
        return self.nodes

    def reduce(self, kind: str, value: str, axes: Sequence[int]) -> str:
        """A reduction over ``axes``, which stay as 1: they are an input from opset 18 on (ReduceSum: 13)."""
        if self.graph.opset >= (13 if kind == "ReduceSum" else 18):
            return self.op(kind, value, np.array(axes, np.int64), keepdims=1)
        return self.op(kind, value, axes=list(axes), keepdims=1)

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", value, np.array(shape, np.int64))


def attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def read_graph(model: onnx.ModelProto) -> Graph:
    """What is known of a model's main graph."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes, types = {}, {}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        kind = value.type.tensor_type
        types[value.name] = kind.elem_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name != "sparse_value":
            value = helper.get_attribute_value(node.attribute[0])
            tensor = isinstance(value, onnx.TensorProto)
            constants[node.output[0]] = numpy_helper.to_array(value) if tensor else np.asarray(value)  # fmt: skip
    for name, array in constants.items():
        shapes[name] = array.shape
    types |= {t.name: t.data_type for t in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    folding = frozenset(
        node.output[0]
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose") and readers[node.output[0]] == 1
    )
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    makers = {name: node for node in model.graph.node for name in node.output}
    return Graph(opset, shapes, types, constants, folding, makers, frozenset(readers))
