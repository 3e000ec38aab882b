"""Operators that LiteRT computes in int8 but litert-quantizer 0.11 does not know, such as LEAKY_RELU.

Each goes through the quantiser under the name of one that it knows and treats the same way: as many
inputs, and the same rule for scales (any, or one for all). In its int8 file they get their own names back. The
arithmetic is LiteRT's own integer kernel, so nothing of the float model changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.tflite_ops.flatbuffer import Operator, Subgraph, parse_model


@dataclasses.dataclass(frozen=True)
class StandIn:
    """``known`` is the operator to go by, ``version`` that of the int8 kernel (op_version.cc of LiteRT).
    ``output`` is the only range that the kernel can write (its Prepare checks scale and zero point)."""

    known: str
    version: int
    output: tuple[float, float] | None = None


# One input, any scales: GELU. Two inputs, any scales: MUL, EQUAL. One scale for all: MAXIMUM, REDUCE_MIN, RESHAPE.
# NEG has an int8 kernel as well, which takes no zero point into account (off by up to 255 steps).
STAND_INS = {
    "ABS": StandIn("GELU", 2),
    "DEPTH_TO_SPACE": StandIn("RESHAPE", 2),
    "ELU": StandIn("GELU", 1),
    "EXP": StandIn("GELU", 2),
    "GREATER": StandIn("EQUAL", 2),
    "GREATER_EQUAL": StandIn("EQUAL", 2),
    "L2_NORMALIZATION": StandIn("GELU", 2, (-1.0, 127 / 128)),
    "LEAKY_RELU": StandIn("GELU", 1),
    "LESS": StandIn("EQUAL", 2),
    "LESS_EQUAL": StandIn("EQUAL", 2),
    "LOG": StandIn("GELU", 2),
    "LOG_SOFTMAX": StandIn("GELU", 2, (-255 / 16, 0.0)),
    "MINIMUM": StandIn("MAXIMUM", 2),
    "PRELU": StandIn("MUL", 1),
    "REDUCE_MAX": StandIn("REDUCE_MIN", 2),
    "RELU6": StandIn("GELU", 2),
    "RELU_0_TO_1": StandIn("GELU", 1),
    "RELU_N1_TO_1": StandIn("GELU", 1),
}
# Operators with an integer result, whose int8 kernel needs no scale: they read the integers themselves.
_READERS = {"ARG_MAX": 2, "ARG_MIN": 2}


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """What an operator was: by its place among the operator codes, which the quantiser appends to."""

    name: str
    inputs: tuple[int, ...]
    options: Any
    options_type: int


def hide(content: bytes, *, where: str) -> tuple[bytes, dict[int, _Hidden]]:
    """The file with stand-ins, and what to give `show` after quantisation; as it is without any."""
    graph = parse_model(content, where=where).subgraphs[0]
    chosen = [o for o in graph.operators if o.name in STAND_INS and _computes(o, graph)]
    if not chosen:
        return content, {}
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    main = model.subgraphs[0]
    hidden = {}
    for operator in chosen:
        known = STAND_INS[operator.name].known
        table = main.operators[operator.index]
        table.opcodeIndex = len(model.operatorCodes)
        # one code for each: its number in the list says later which operator this was
        model.operatorCodes.append(operator_code(known, 1 if known != "MUL" else 2))
        hidden[table.opcodeIndex] = _Hidden(operator.name, operator.inputs, table.builtinOptions, table.builtinOptionsType)  # fmt: skip
        if known == "RESHAPE":
            shape = np.array(graph.tensors[operator.outputs[0]].shape, np.int32)
            table.inputs = [operator.inputs[0], add_constant(model, shape, f"{operator.index}/shape")]  # fmt: skip
            table.builtinOptions, table.builtinOptionsType = None, schema.BuiltinOptions.NONE
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)), hidden


def show(content: bytes, hidden: Mapping[int, _Hidden], *, where: str) -> bytes:
    """The quantised file with the operators' own names."""
    graph = parse_model(content, where=where).subgraphs[0]
    readers = [o for o in graph.operators if o.name in _READERS and _is_detour(o, graph)]
    if not hidden and not readers:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    main = model.subgraphs[0]
    for table in main.operators:
        was = hidden.get(table.opcodeIndex)
        if was is None:
            continue
        # the first input may be another tensor now: behind a QUANTIZE to another scale
        table.inputs = [table.inputs[0], *table.inputs[1 : len(was.inputs)]]
        table.builtinOptions, table.builtinOptionsType = was.options, was.options_type
        floats = main.tensors[table.inputs[0]].type == schema.TensorType.FLOAT32
        version = 1 if floats else STAND_INS[was.name].version
        model.operatorCodes[table.opcodeIndex] = operator_code(was.name, version)
    detours = set()
    for reader in readers:
        maker = next(o for o in graph.operators if reader.inputs[0] in o.outputs)
        table = main.operators[reader.index]
        table.inputs = [maker.inputs[0], *reader.inputs[1:]]
        model.operatorCodes.append(operator_code(reader.name, _READERS[reader.name]))
        table.opcodeIndex = len(model.operatorCodes) - 1
        detours.add(maker.index)
    # what others still read, or the model gives away, has to be made
    needed = {int(i) for o in main.operators for i in o.inputs} | {int(i) for i in main.outputs}
    main.operators = [
        o for i, o in enumerate(main.operators) if i not in detours or needed & {*o.outputs}
    ]
    merge_codes(model)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def fixed_ranges(content: bytes, *, where: str) -> dict[str, tuple[float, float]]:
    """The ranges that kernels insist on, by tensor name: only those of operators in `STAND_INS`."""
    graph = parse_model(content, where=where).subgraphs[0]
    return {
        graph.tensors[o.outputs[0]].name: output
        for o in graph.operators
        if o.name in STAND_INS and (output := STAND_INS[o.name].output) is not None
    }


def operator_code(name: str, version: int = 1) -> schema.OperatorCodeT:
    """An entry for the list of operator codes of a model."""
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    code.deprecatedBuiltinCode = min(
        code.builtinCode, 127
    )  # an int8 field; readers take the larger
    code.version = version
    return code


def add_constant(model: Any, values: np.ndarray, name: str) -> int:
    """Append a constant tensor (float32 or int32) to the main graph of a `ModelT`; its number."""
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor.name, tensor.shape = name.encode(), np.array(values.shape, np.int32)
    tensor.type = {"float32": schema.TensorType.FLOAT32, "int32": schema.TensorType.INT32}[str(values.dtype)]  # fmt: skip
    tensor.buffer = len(model.buffers) - 1
    model.subgraphs[0].tensors.append(tensor)
    return len(model.subgraphs[0].tensors) - 1


def _computes(operator: Operator, graph: Subgraph) -> bool:
    return graph.tensors[operator.inputs[0]].dtype == "float32"


def _is_detour(reader: Operator, graph: Subgraph) -> bool:
    """Whether it reads the float values of an int8 tensor."""
    maker = next((o for o in graph.operators if reader.inputs[0] in o.outputs), None)
    return maker is not None and maker.name == "DEQUANTIZE" and graph.tensors[maker.inputs[0]].dtype == "int8"  # fmt: skip


def merge_codes(model: Any) -> None:
    """One entry for each kind and version of operator, none that nothing uses."""
    kept: dict[tuple[int, int, bytes | None], int] = {}
    codes: list[Any] = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            key = (max(code.builtinCode, code.deprecatedBuiltinCode), code.version, code.customCode)
            if key not in kept:
                kept[key] = len(codes)
                codes.append(code)
            operator.opcodeIndex = kept[key]
    model.operatorCodes = codes
