"""Small TFLite models, written field by field: for tests, the agent's self-test and calibration."""

from __future__ import annotations

import struct

import flatbuffers
import numpy as np
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
        inputs, outputs = [source, weight, weight + 1], [weight + 2]
        graph.operators.append(
            _operator("FULLY_CONNECTED", inputs, outputs, "FullyConnectedOptions")
        )
    graph.inputs, graph.outputs = [0], [len(graph.tensors) - 1]
    buffers = [_buffer(None), _buffer(_identity(size, 2.0)), _buffer([1.0] * size)]
    return _pack([graph], buffers)


def conv_tflite(
    *, layers: int = 10, extra_layers: int = 0, size: int = 28, channels: int = 64, seed: int = 0
) -> bytes:
    """An int8 convolutional network of a real one's kind and cost, as file bytes.

    ``layers`` 3x3 convolutions of ``channels`` channels on (1, size, size, channels), with random
    weights and one scale per output channel, then ``extra_layers`` more of the same cost each.
    Input ``x`` and output ``y`` are int8 with scale 1/32. The defaults are 289 million
    multiplications (MobileNetV2: 300) and 390 kB. Networks of one ``seed`` begin with the same layers.
    """
    generator = np.random.default_rng(seed)
    graph = schema.SubGraphT()
    fan_in = 9 * channels
    activation_scale, weight_scale = 1 / 32, 4 / fan_in**0.5 / 127
    graph.tensors = [_quantized(_tensor("x", (1, size, size, channels), 0), [activation_scale])]
    graph.operators, buffers = [], [_buffer(None)]
    for layer in range(layers + extra_layers):
        source = len(graph.tensors) - 1
        # (out, height, width, in), about 1/sqrt(fan in) each so that the values keep their size
        weights = generator.normal(0, 127 / 4, (channels, 3, 3, channels)).clip(-127, 127)
        for array in (weights.astype(np.int8), generator.integers(-64, 64, channels, np.int32)):
            buffers.append(schema.BufferT())
            buffers[-1].data = np.frombuffer(array.tobytes(), np.uint8)
        name = "y" if layer == layers + extra_layers - 1 else f"h{layer}"
        bias = _tensor(f"bias{layer}", (channels,), len(buffers) - 1)
        graph.tensors += [
            _quantized(_tensor(f"weight{layer}", (channels, 3, 3, channels), len(buffers) - 2), [weight_scale] * channels),
            _quantized(bias, [weight_scale * activation_scale] * channels, schema.TensorType.INT32),
            _quantized(_tensor(name, (1, size, size, channels), 0), [activation_scale]),
        ]  # fmt: skip
        inputs, outputs = [source, source + 1, source + 2], [source + 3]
        graph.operators.append(
            _operator("CONV_2D", inputs, outputs, "Conv2DOptions", strideH=1, strideW=1)
        )
    graph.inputs, graph.outputs = [0], [len(graph.tensors) - 1]
    return _pack([graph], buffers)


def _quantized(
    tensor: schema.TensorT, scales: list[float], kind: int = schema.TensorType.INT8
) -> schema.TensorT:
    """The tensor as an integer one, zero points 0; several scales are one per output channel."""
    tensor.type = kind
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = scales
    tensor.quantization.zeroPoint = [0] * len(scales)
    return tensor


def op_chain_tflite(
    kind: str, *, dtype: str = "int8", size: int = 1, channels: tuple[int, int] = (8, 8),
    repeats: int = 8, seed: int = 0,
) -> bytes:  # fmt: skip
    """``repeats`` operators of one kind, to find out what one costs, as file bytes.

    ``kind`` is one of `op_table.COST_KINDS`: ``conv`` (3x3), ``pointwise``, ``depthwise`` (3x3) and
    ``dense`` go from ``channels[0]`` to ``channels[1]`` channels and back (a depthwise one keeps
    the first), ``elementwise`` (ADD) and ``activation`` (HARD_SWISH) follow one another; ``pool``
    (global AVERAGE_POOL_2D) and ``copy`` (CONCATENATION) lie side by side, each an output. Input
    ``x`` is (1, size, size, channels[0]), of a dense one (1, channels[0]); ``dtype`` is int8 or float32.
    """
    generator = np.random.default_rng(seed)
    scale = 1 / 32
    graph, buffers = schema.SubGraphT(), [_buffer(None)]
    graph.tensors, graph.operators = [], []

    def add(name: str, shape: tuple[int, ...], values: np.ndarray | None = None, scales: tuple[float, ...] = (scale,), axis: int = 0) -> int:  # fmt: skip
        tensor = _tensor(name, shape, 0)
        if values is not None:
            buffers.append(schema.BufferT())
            buffers[-1].data = np.frombuffer(values.tobytes(), np.uint8)
            tensor.buffer = len(buffers) - 1
        if dtype == "int8":
            integers = schema.TensorType.INT32 if values is not None and values.dtype == np.int32 else schema.TensorType.INT8  # fmt: skip
            _quantized(tensor, list(scales), integers)
            tensor.quantization.quantizedDimension = axis
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def weighted(number: int, inside: int, out: int) -> list[int]:
        """The tensor numbers of new random weights and biases."""
        shape, axis, fan_in = {
            "conv": ((out, 3, 3, inside), 0, 9 * inside),
            "pointwise": ((out, 1, 1, inside), 0, inside),
            "depthwise": ((1, 3, 3, out), 3, 9),
            "dense": ((out, inside), 0, inside),
        }[kind]
        deviation = 1 / fan_in**0.5  # so that the values keep their size
        weights = generator.normal(0, deviation, shape).astype(np.float32)
        scales: tuple[float, ...] = (4 * deviation / 127,) * (1 if kind == "dense" else out)
        bias = np.zeros(out, np.float32)
        if dtype == "int8":
            weights = np.round(weights / scales[0]).clip(-127, 127).astype(np.int8)
            bias = bias.astype(np.int32)
        return [
            add(f"weight{number}", shape, weights, scales, axis),
            add(f"bias{number}", (out,), bias, tuple(scale * s for s in scales)),
        ]

    spatial = (1,) if kind == "dense" else (1, size, size)
    source = first = add("x", (*spatial, channels[0]))
    graph.inputs, graph.outputs = [first], []
    for number in range(repeats):
        inside, out = channels if number % 2 == 0 else channels[::-1]
        if kind == "depthwise":
            inside = out = channels[0]
        if kind in ("conv", "pointwise", "depthwise", "dense"):
            inputs = [source, *weighted(number, inside, out)]
            source = add(f"h{number}", (*spatial, out))
            code, options, fields = {
                "depthwise": ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", {"strideH": 1, "strideW": 1, "depthMultiplier": 1}),
                "dense": ("FULLY_CONNECTED", "FullyConnectedOptions", {}),
            }.get(kind, ("CONV_2D", "Conv2DOptions", {"strideH": 1, "strideW": 1}))  # fmt: skip
            graph.operators.append(_operator(code, inputs, [source], options, **fields))
        elif kind in ("elementwise", "activation"):
            before, source = source, add(f"h{number}", (*spatial, channels[0]))
            if kind == "elementwise":
                graph.operators.append(_operator("ADD", [before, first], [source], "AddOptions"))
            else:
                graph.operators.append(_operator("HARD_SWISH", [before], [source], "HardSwishOptions"))  # fmt: skip
        elif kind == "pool":
            whole = {"filterHeight": size, "filterWidth": size, "strideH": 1, "strideW": 1, "padding": schema.Padding.VALID}  # fmt: skip
            made = add(f"h{number}", (1, 1, 1, channels[0]))
            graph.operators.append(_operator("AVERAGE_POOL_2D", [first], [made], "Pool2DOptions", **whole))  # fmt: skip
            graph.outputs.append(made)
        elif kind == "copy":
            made = add(f"h{number}", (*spatial, 2 * channels[0]))
            graph.operators.append(_operator("CONCATENATION", [first, first], [made], "ConcatenationOptions", axis=len(spatial)))  # fmt: skip
            graph.outputs.append(made)
        else:
            raise ValueError(f"no operators of kind {kind!r}")
    graph.outputs = graph.outputs or [source]
    return _pack([graph], buffers)


def crashing_tflite() -> bytes:
    """A valid flatbuffer that kills the process that loads it: a branch that leads to itself.

    Preparing IF prepares its branches, so LiteRT 2.3.0 recurses until the stack ends (SIGSEGV).
    """
    condition = _tensor("condition", (1,), 0)
    condition.type = schema.TensorType.BOOL
    graph = schema.SubGraphT()
    graph.tensors = [condition, _tensor("x", (1, 4), 0), _tensor("y", (1, 4), 0)]
    branches = {"thenSubgraphIndex": 0, "elseSubgraphIndex": 0}
    graph.operators = [_operator("IF", [0, 0, 1], [2], "IfOptions", **branches)]
    graph.inputs, graph.outputs = [0, 1], [2]
    return _pack([graph], [_buffer(None)])


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
    relu = schema.ActivationFunctionType.RELU
    graph.operators = [
        _operator("RNN", [0, 1, 2, 3, 4], [5], "RNNOptions", fusedActivationFunction=relu)
    ]
    graph.inputs, graph.outputs = [0], [5]
    buffers = [_buffer(None), _buffer(_identity(size, 1.0)), _buffer([0.0] * size)]
    return _pack([graph], buffers)


def counting_tflite(*, size: int = 4) -> bytes:
    """A float32 model with a resource variable: ``y = x + v; v = y``, ``(1, size) -> (1, size)``.

    What a tf.Variable becomes. ``v`` starts at 0, set by a second graph that runs once.
    """
    variable = {"container": b"", "sharedName": b"v"}
    handle = _tensor("handle", (), 0)
    handle.type = schema.TensorType.RESOURCE
    shape = (1, size)
    main, once = schema.SubGraphT(), schema.SubGraphT()
    main.tensors = [_tensor("x", shape, 0), handle, _tensor("v", shape, 0), _tensor("y", shape, 0)]
    main.operators = [
        _operator("CALL_ONCE", [], [], "CallOnceOptions", initSubgraphIndex=1),
        _operator("VAR_HANDLE", [], [1], "VarHandleOptions", **variable),
        _operator("READ_VARIABLE", [1], [2], "ReadVariableOptions"),
        _operator("ADD", [0, 2], [3], "AddOptions"),
        _operator("ASSIGN_VARIABLE", [1, 3], [], "AssignVariableOptions"),
    ]
    main.inputs, main.outputs = [0], [3]
    once.tensors = [handle, _tensor("zeros", shape, 1)]
    once.operators = [
        _operator("VAR_HANDLE", [], [0], "VarHandleOptions", **variable),
        _operator("ASSIGN_VARIABLE", [0, 1], [], "AssignVariableOptions"),
    ]
    once.inputs, once.outputs = [], []
    return _pack([main, once], [_buffer(None), _buffer([0.0] * size)])


def _operator(
    kind: str, inputs: list[int], outputs: list[int], options: str, **fields: object
) -> schema.OperatorT:
    made = schema.OperatorT()
    made.opcodeIndex = getattr(schema.BuiltinOperator, kind)  # replaced by the index in _pack
    made.inputs, made.outputs = inputs, outputs
    made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
    made.builtinOptions = getattr(schema, f"{options}T")()
    for name, value in fields.items():
        setattr(made.builtinOptions, name, value)
    return made


def _identity(size: int, value: float) -> list[float]:
    return [value if row == column else 0.0 for row in range(size) for column in range(size)]


def _pack(graphs: list[schema.SubGraphT], buffers: list[schema.BufferT]) -> bytes:
    """A model of these graphs; each operator's ``opcodeIndex`` is its BuiltinOperator so far."""
    operators = [operator for graph in graphs for operator in graph.operators]
    kinds = sorted({operator.opcodeIndex for operator in operators})
    model = schema.ModelT()
    model.operatorCodes = []
    for kind in kinds:
        code = schema.OperatorCodeT()
        code.builtinCode, code.version = kind, 1
        code.deprecatedBuiltinCode = min(kind, 127)  # an int8 field; readers take the larger one
        model.operatorCodes.append(code)
    for operator in operators:
        operator.opcodeIndex = kinds.index(operator.opcodeIndex)
    for number, graph in enumerate(graphs):
        graph.name = f"graph{number}".encode()
    model.version = 3
    model.subgraphs, model.buffers = graphs, buffers
    model.description = b"edgepipe tiny"
    return _finish(model)


def _finish(model: schema.ModelT) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
