"""A TRANSPOSE at the door: inputs and outputs of a file in the layout that an application has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.array_ops.layout import permute_shape
from edgepipe.tflite_ops.stand_in import add_constant, merge_codes, operator_code


def move_axes(
    content: bytes, inputs: Mapping[int, tuple[str, str]], outputs: Mapping[int, tuple[str, str]]
) -> bytes:
    """The file with some inputs and outputs of its main graph (by position) in another layout.

    Values are (layout in the file, layout that it gets). Names at the door stay what they were.
    Example: output 0 of ("NHWC", "NCHW"), (1, 8, 6, 4), is then (1, 4, 8, 6): axes 0, 3, 1, 2.
    """
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = model.subgraphs[0]
    graph.inputs, graph.outputs = list(graph.inputs), list(graph.outputs)
    signatures = [s for s in model.signatureDefs or [] if s.subgraphIndex == 0]
    first, last = [], []
    for position, (inner, outer) in inputs.items():
        old = int(graph.inputs[position])
        graph.inputs[position] = _outside(model, old, inner, outer)
        first.append(_transpose(model, graph.inputs[position], old, outer, inner))
        _rename([e for s in signatures for e in s.inputs or []], old, graph.inputs[position])
    for position, (inner, outer) in outputs.items():
        old = int(graph.outputs[position])
        graph.outputs[position] = _outside(model, old, inner, outer)
        last.append(_transpose(model, old, graph.outputs[position], inner, outer))
        _rename([e for s in signatures for e in s.outputs or []], old, graph.outputs[position])
    graph.operators = [*first, *graph.operators, *last]
    merge_codes(model)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _outside(model: Any, old: int, inner: str, outer: str) -> int:
    """The number of a new tensor that takes the name of ``old``, and its shape in the layout ``outer``."""
    tensors = model.subgraphs[0].tensors
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer = tensors[old].name, tensors[old].type, 0
    shape = tuple(int(n) for n in tensors[old].shape)
    tensor.shape = np.array(permute_shape(shape, inner, outer), np.int32)
    tensors[old].name = tensors[old].name + f"/{inner}".encode()
    tensors.append(tensor)
    return len(tensors) - 1


def _transpose(model: Any, source: int, made: int, from_layout: str, to_layout: str) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes)
    # five axes came with version 4 of the kernel (TensorFlow, op_version.cc)
    model.operatorCodes.append(operator_code("TRANSPOSE", 4 if len(from_layout) > 4 else 1))
    axes = np.array([from_layout.index(axis) for axis in to_layout], np.int32)
    name = model.subgraphs[0].tensors[made].name.decode()
    operator.inputs = [source, add_constant(model, axes, f"{name}/axes")]
    operator.outputs = [made]
    operator.builtinOptionsType = schema.BuiltinOptions.TransposeOptions
    operator.builtinOptions = schema.TransposeOptionsT()
    return operator


def _rename(entries: Sequence[Any], old: int, new: int) -> None:
    for entry in entries:
        if entry.tensorIndex == old:
            entry.tensorIndex = new
