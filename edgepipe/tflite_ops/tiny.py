"""Very small TFLite models, written field by field: for tests and for the runner's self-test."""

from __future__ import annotations

import struct

import flatbuffers
from ai_edge_litert import schema_py_generated as schema


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
    graph = schema.SubGraphT()
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
        operator.inputs = [source, weight, weight + 1]
        operator.outputs = [weight + 2]
        operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = schema.FullyConnectedOptionsT()
        graph.operators.append(operator)
    graph.inputs, graph.outputs = [0], [len(graph.tensors) - 1]
    buffers = [_buffer(None), _buffer(_identity(size, 2.0)), _buffer([1.0] * size)]
    return _pack(graph, buffers, schema.BuiltinOperator.FULLY_CONNECTED)


def crashing_tflite() -> bytes:
    """A valid flatbuffer that kills the process it is loaded in: a dense layer without weights.

    LiteRT 2.3.0 takes the optional-tensor mark -1 there and dereferences it (SIGSEGV).
    """
    model = schema.ModelT.InitFromPackedBuf(tiny_tflite())
    model.subgraphs[0].operators[0].inputs = [0, -1, 2]
    return _finish(model)


def stateful_tflite(*, size: int = 4) -> bytes:
    """A float32 model with memory: an RNN cell ``h = relu(x + h)``, ``(1, size) -> (1, size)``.

    Its hidden state is a variable tensor that starts at 0: input 1 gives 1, 2, 3, ... unless the
    state is reset in between.
    """
    graph = schema.SubGraphT()
    graph.tensors = [
        _tensor("x", (1, size), 0),
        _tensor("weight", (size, size), 1),
        _tensor("recurrent", (size, size), 1),
        _tensor("bias", (size,), 2),
        _tensor("state", (1, size), 0),
        _tensor("y", (1, size), 0),
    ]
    graph.tensors[4].isVariable = True
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = [0, 1, 2, 3, 4], [5]
    operator.builtinOptionsType = schema.BuiltinOptions.RNNOptions
    operator.builtinOptions = schema.RNNOptionsT()
    operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [5]
    buffers = [_buffer(None), _buffer(_identity(size, 1.0)), _buffer([0.0] * size)]
    return _pack(graph, buffers, schema.BuiltinOperator.RNN)


def _identity(size: int, value: float) -> list[float]:
    return [value if row == column else 0.0 for row in range(size) for column in range(size)]


def _pack(graph: schema.SubGraphT, buffers: list[schema.BufferT], operator: int) -> bytes:
    """A model of one graph whose operators are all of one kind, version 1."""
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = operator
    code.version = 1
    for item in graph.operators:
        item.opcodeIndex = 0
    graph.name = b"main"
    model = schema.ModelT()
    model.version = 3
    model.operatorCodes, model.subgraphs, model.buffers = [code], [graph], buffers
    model.description = b"edgepipe tiny"
    return _finish(model)


def _finish(model: schema.ModelT) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
