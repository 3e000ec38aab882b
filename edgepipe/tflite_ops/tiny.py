"""Very small TFLite models, written field by field: for tests and for the runner's self-test."""

from __future__ import annotations

import struct

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

# XNNPACK reads up to 16 bytes past a tensor; the schema aligns buffers to 16 (tflite schema.fbs).
_FILE_IDENTIFIER = b"TFL3"


def _tensor(name: str, shape: tuple[int, ...], buffer: int) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name = name.encode()
    tensor.shape = list(shape)
    tensor.type = schema.TensorType.FLOAT32
    tensor.buffer = buffer
    return tensor


def _buffer(values: list[float] | None) -> schema.BufferT:
    buffer = schema.BufferT()
    if values is not None:
        buffer.data = list(struct.pack(f"<{len(values)}f", *values))
    return buffer


def tiny_tflite(*, size: int = 4, layers: int = 1) -> bytes:
    """A float32 model of ``layers`` dense layers, ``(1, size) -> (1, size)``, as file bytes.

    Each layer computes ``y[i] = 2 * x[i] + 1`` (weight ``2 * identity``, bias 1), so one layer maps
    ``[0, 1, 2, 3]`` to ``[1, 3, 5, 7]``. Input tensor ``x``, output ``y``. Size 4 with one layer
    is under a kilobyte; a large ``size`` makes a slow model.
    """
    weights = [2.0 if row == column else 0.0 for row in range(size) for column in range(size)]
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.buffers = [_buffer(None), _buffer(weights), _buffer([1.0] * size)]
    graph.tensors = [_tensor("x", (1, size), 0)]
    graph.operators = []
    for layer in range(layers):
        source = len(graph.tensors) - 1
        name = "y" if layer == layers - 1 else f"h{layer}"
        weight = source + 1
        graph.tensors += [
            _tensor(f"weight{layer}", (size, size), 1),
            _tensor(f"bias{layer}", (size,), 2),
            _tensor(name, (1, size), 0),
        ]
        operator = schema.OperatorT()
        operator.opcodeIndex = 0
        operator.inputs = [source, weight, weight + 1]
        operator.outputs = [weight + 2]
        operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = schema.FullyConnectedOptionsT()
        graph.operators.append(operator)
    graph.inputs, graph.outputs = [0], [len(graph.tensors) - 1]
    graph.name = b"main"
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    model.version = 3
    model.operatorCodes = [code]
    model.subgraphs = [graph]
    model.description = b"edgepipe tiny"
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=_FILE_IDENTIFIER)
    return bytes(builder.Output())
