"""The doors of a file: inputs and outputs in the layout that an application has, each a tensor of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.array_ops.layout import permute_shape
from edgepipe.tflite_ops.flatbuffer import Subgraph, parse_model
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


def own_outputs(content: bytes, *, where: str) -> bytes:
    """The file with a tensor of its own for every output of its main graph: a RESHAPE copies one that is
    an input as well, or an output before it.

    LiteRT's compiled models (litert/c) have a buffer for each input and output, of which a tensor gets
    one: the other is never written, and an operator that reads the tensor may get the wrong one.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    shared = _shared_outputs(graph)
    if not shared:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    target = model.subgraphs[0]
    target.outputs = list(target.outputs)
    signatures = [s for s in model.signatureDefs or [] if s.subgraphIndex == 0]
    for position in shared:
        old = int(target.outputs[position])
        made = copy.deepcopy(target.tensors[old])
        made.name, made.buffer = made.name + f"/output_{position}".encode(), 0
        target.tensors.append(made)
        target.outputs[position] = len(target.tensors) - 1
        operator = schema.OperatorT()
        operator.opcodeIndex = len(model.operatorCodes)
        model.operatorCodes.append(operator_code("RESHAPE", 1))
        sizes = np.array(graph.tensors[old].shape, np.int32)
        operator.inputs = [old, add_constant(model, sizes, f"{made.name.decode()}/shape")]
        operator.outputs = [target.outputs[position]]
        target.operators.append(operator)
        for signature in signatures:
            # of the entries that name the tensor, the last: those before it keep it
            entries = [e for e in signature.outputs or [] if e.tensorIndex == old]
            _rename(entries[-1:], old, target.outputs[position])
    merge_codes(model)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def unmade_outputs(graph: Subgraph) -> list[str]:
    """Names of the outputs that no operator makes, and that are neither an input nor a constant."""
    made = {i for o in graph.operators for i in o.outputs} | set(graph.inputs)
    return [graph.tensors[i].name for i in graph.outputs if i not in made and not (graph.tensors[i].is_constant or graph.tensors[i].is_variable)]  # fmt: skip


def _shared_outputs(graph: Subgraph) -> list[int]:
    """Positions of the outputs that are an input, or were an output before, from the last one back."""
    seen = set(graph.inputs)
    shared = []
    for position, tensor in enumerate(graph.outputs):
        shared += [position] if tensor in seen else []
        seen.add(tensor)
    return shared[::-1]


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
