"""Small float TFLite graphs for tests, written operator by operator."""

from __future__ import annotations

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


class Graph:
    """``value = graph.op("CONV_2D", [x, w, b], "y", (1, 4, 4, 2), options)``; `bytes` ends it."""

    def __init__(self) -> None:
        self.buffers = [schema.BufferT()]
        self.tensors: list[schema.TensorT] = []
        self.operators: list[schema.OperatorT] = []
        self.codes: list[str] = []
        self.inputs: list[int] = []

    def tensor(self, name, shape, *, data=None, dtype="FLOAT32"):
        tensor = schema.TensorT()
        tensor.name, tensor.shape = name.encode(), list(shape)
        tensor.type, tensor.buffer = getattr(schema.TensorType, dtype), 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def input(self, name, shape):
        self.inputs.append(self.tensor(name, shape))
        return self.inputs[-1]

    def const(self, name, array):
        dtype = {"float32": "FLOAT32", "int32": "INT32"}[str(array.dtype)]
        return self.tensor(name, array.shape, data=array, dtype=dtype)

    def op(self, code, inputs, name, shape, options=None, **fields):
        operator = schema.OperatorT()
        if code not in self.codes:
            self.codes.append(code)
        operator.opcodeIndex = self.codes.index(code)
        operator.inputs, operator.outputs = list(inputs), [self.tensor(name, shape)]
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, options + "T")()
            for field, value in fields.items():
                assert hasattr(operator.builtinOptions, field)
                setattr(operator.builtinOptions, field, value)
        self.operators.append(operator)
        return operator.outputs[0]

    def conv(self, x, weights, bias, name, shape, **fields):
        """weights (out, kh, kw, in), stride 1, SAME."""
        w, b = self.const(name + "/w", weights), self.const(name + "/b", bias)
        return self.op("CONV_2D", [x, w, b], name, shape, "Conv2DOptions", strideW=1, strideH=1, **fields)  # fmt: skip

    def dense(self, x, weights, bias, name, shape, **fields):
        w, b = self.const(name + "/w", weights), self.const(name + "/b", bias)
        return self.op("FULLY_CONNECTED", [x, w, b], name, shape, "FullyConnectedOptions", **fields)

    def transpose(self, x, order, name, shape):
        p = self.const(name + "/order", np.array(order, np.int32))
        return self.op("TRANSPOSE", [x, p], name, shape, "TransposeOptions")

    def bytes(self, outputs):
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs, graph.name = self.inputs, list(outputs), b"main"
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
        signature.inputs, signature.outputs = [
            [self._map(i) for i in side] for side in (self.inputs, outputs)
        ]
        model.version, model.subgraphs, model.buffers = 3, [graph], self.buffers
        model.signatureDefs = [signature]
        model.operatorCodes = []
        for name in self.codes:
            code = schema.OperatorCodeT()
            number = getattr(schema.BuiltinOperator, name)
            code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _map(self, index):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = self.tensors[index].name, index
        return entry


def small_cnn(*, seed=0, loose="RELU6", end="dense"):
    """conv -> transpose -> loose activation -> mean over the map -> dense: what a converter leaves.

    Input ``x`` (1, 6, 6, 3), output ``y`` (1, 4), float32.
    """
    rng = np.random.default_rng(seed)
    g = Graph()
    x = g.input("x", (1, 6, 6, 3))
    c = g.conv(
        x, rng.normal(0, 0.8, (5, 3, 3, 3)).astype(np.float32), rng.normal(0, 1, 5).astype(np.float32), "conv", (1, 6, 6, 5)
    )  # fmt: skip
    t = g.transpose(c, (0, 3, 1, 2), "moved", (1, 5, 6, 6))
    fields = {"options": "LeakyReluOptions", "alpha": 0.1} if loose == "LEAKY_RELU" else {}
    a = g.op(loose, [t], "act", (1, 5, 6, 6), **fields)
    axes = g.const("axes", np.array([2, 3], np.int32))
    m = g.op("MEAN", [a, axes], "mean", (1, 5), "ReducerOptions", keepDims=False)
    y = g.dense(m, rng.normal(0, 1, (4, 5)).astype(np.float32), np.zeros(4, np.float32), "y", (1, 4))  # fmt: skip
    return g.bytes([y])
