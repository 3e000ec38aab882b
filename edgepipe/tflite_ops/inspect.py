"""What is inside a .tflite file: costs, dtypes, float islands, and its tensor specs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe.artifact import TensorSpec
from edgepipe.errors import ArtifactError
from edgepipe.tflite_ops.flatbuffer import (
    CONVERSIONS,
    Model,
    Operator,
    Subgraph,
    Tensor,
    find_signature,
    parse_model,
)

# The layout of a tensor of this rank in TFLite's own operators (channels last).
TFLITE_LAYOUTS = {0: "", 1: "N", 2: "NC", 3: "NLC", 4: "NHWC", 5: "NDHWC"}


@dataclasses.dataclass(frozen=True)
class FloatIsland:
    """Operators joined by floating point tensors, in a model that is otherwise integer.

    ``computing`` are those that do more than convert between float and integer; ``output`` is the
    tensor that leaves the island.
    """

    subgraph: int
    operators: tuple[int, ...]
    names: tuple[str, ...]
    computing: tuple[str, ...]
    output: str


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """Totals over all subgraphs. ``macs`` counts multiply-accumulates of one inference.

    ``doors`` are the QUANTIZE and DEQUANTIZE operators that only give a float input or output to an
    integer model. ``float_islands`` are all other operators with float activations; in a float
    model, all of them. ``activation_bytes`` is the sum of all tensors that are no constants: an
    upper bound of the arena, whose planner lets them share space.
    """

    model: Model
    macs: int
    macs_by_operator: Mapping[str, int]
    operators: Mapping[str, int]
    dtypes: Mapping[str, int]
    weight_bytes: int
    activation_bytes: int
    transposes: int
    transpose_bytes: int
    doors: tuple[str, ...]
    float_islands: tuple[FloatIsland, ...]

    @property
    def float_operators(self) -> int:
        """Operators that compute in floating point; a lone float detour between integers is one."""
        return sum(max(len(island.computing), 1) for island in self.float_islands)

    @property
    def is_full_integer(self) -> bool:
        return not self.float_islands


def read_model(path: Path) -> Model:
    """Parse a .tflite file. Raises ArtifactError naming it where it is missing or not one."""
    return parse_model(_read(path), where=str(path))


def describe(path: Path, *, signature: str = "") -> ModelDescription:
    """What a .tflite file holds and costs, or one of its signatures. ArtifactError as `read_model`.

    Of a signature, all but the size of the file is that of its graph alone.
    """
    model = read_model(path)
    if signature:
        model = graph_of(model, signature, where=str(path))
    return describe_model(model)


def graph_of(model: Model, signature: str, *, where: str) -> Model:
    """A model with the graph of one signature only. ArtifactError where it has no such signature."""
    found = find_signature(model, signature, where=where)
    alone = dataclasses.replace(found, subgraph=0)
    graphs = (model.subgraphs[found.subgraph],)
    return dataclasses.replace(model, subgraphs=graphs, signatures=(alone,))


def by_signature(model: Model) -> dict[str, ModelDescription]:
    """What each signature's graph costs, by its key; empty where there are not several with a graph each."""
    if len(model.signatures) < 2 or len({s.subgraph for s in model.signatures}) < 2:
        return {}
    return {s.key: describe_model(graph_of(model, s.key, where=s.key)) for s in model.signatures}


def describe_model(model: Model) -> ModelDescription:
    """Totals of a parsed model."""
    macs: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    weights: dict[int, int] = {}
    activation_bytes = transposes = transpose_bytes = 0
    doors: list[str] = []
    islands: list[FloatIsland] = []
    for number, graph in enumerate(model.subgraphs):
        for tensor in graph.tensors:
            dtypes[tensor.dtype] += 1
            if tensor.is_constant:
                weights[tensor.buffer] = tensor.size_bytes  # a buffer may serve several tensors
            else:
                activation_bytes += tensor.size_bytes
        for operator in graph.operators:
            operators[operator.name] += 1
            count = operator_macs(operator, graph)
            if count:
                macs[operator.name] += count
            if operator.name == "TRANSPOSE":
                transposes += 1
                transpose_bytes += graph.tensors[operator.outputs[0]].size_bytes
        found_doors, found_islands = find_float(graph, number)
        doors += found_doors
        islands += found_islands
    return ModelDescription(
        model=model,
        macs=sum(macs.values()),
        macs_by_operator=dict(macs.most_common()),
        operators=dict(operators.most_common()),
        dtypes=dict(dtypes.most_common()),
        weight_bytes=sum(weights.values()),
        activation_bytes=activation_bytes,
        transposes=transposes,
        transpose_bytes=transpose_bytes,
        doors=tuple(doors),
        float_islands=tuple(islands),
    )


def operator_macs(operator: Operator, graph: Subgraph) -> int:
    """Multiply-accumulates of one operator; 0 for those that are no matrix product or convolution.

    Worked example: CONV_2D with weights (16, 3, 3, 8) and output (1, 10, 10, 16) does
    1 * 10 * 10 * 16 outputs of 3 * 3 * 8 products each: 115,200.
    """

    def tensor(side: tuple[int, ...], position: int) -> Tensor | None:
        return graph.tensors[side[position]] if position < len(side) and side[position] >= 0 else None  # fmt: skip

    inputs, output = operator.inputs, tensor(operator.outputs, 0)
    weights = tensor(inputs, 1)
    if output is None or weights is None:
        return 0
    w = weights.shape
    if operator.name == "CONV_2D" and len(w) == 4:
        return _elements(output) * w[1] * w[2] * w[3]  # (out, kh, kw, in per group)
    if operator.name == "DEPTHWISE_CONV_2D" and len(w) == 4:
        return _elements(output) * w[1] * w[2]  # (1, kh, kw, out)
    if operator.name == "CONV_3D" and len(w) == 5:
        return _elements(output) * w[0] * w[1] * w[2] * w[3]  # (kd, kh, kw, in, out)
    if operator.name == "FULLY_CONNECTED" and len(w) == 2:
        return _elements(output) * w[1]  # (out, in)
    if operator.name == "TRANSPOSE_CONV" and len(w) == 4:
        source = tensor(inputs, 2)
        # every input value meets the whole kernel: (out, kh, kw, in)
        return _elements(source) * w[0] * w[1] * w[2] if source else 0
    if operator.name == "BATCH_MATMUL":
        left = tensor(inputs, 0)
        if left is None or len(left.shape) < 2:
            return 0
        shared = left.shape[-2] if operator.options.get("adj_x") else left.shape[-1]
        return _elements(output) * shared
    if operator.name.endswith("SEQUENCE_LSTM"):
        source = tensor(inputs, 0)
        if source is None or len(source.shape) != 3:
            return 0
        matrices = [t for i in inputs[1:] if i >= 0 and len((t := graph.tensors[i]).shape) == 2]
        constants = sum(_elements(t) for t in matrices if t.is_constant)
        return constants * source.shape[0] * source.shape[1]  # every step uses every weight once
    return 0


def _elements(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def find_float(graph: Subgraph, number: int = 0) -> tuple[list[str], list[FloatIsland]]:
    """(doors, islands) of one subgraph, in execution order.

    Operators that share a float tensor, constants aside, belong to one group. A group that is a
    single conversion at a float graph input or output is a door.
    """

    def float_tensors(operator: Operator) -> set[int]:
        return {
            t
            for t in operator.inputs + operator.outputs
            if t >= 0 and graph.tensors[t].is_float and not graph.tensors[t].is_constant
        }

    parent: dict[int, int] = {}

    def find(tensor: int) -> int:
        while parent.setdefault(tensor, tensor) != tensor:
            parent[tensor] = parent[parent[tensor]]
            tensor = parent[tensor]
        return tensor

    members: list[tuple[Operator, set[int]]] = []
    for operator in graph.operators:
        tensors = float_tensors(operator)
        if not tensors:
            continue
        members.append((operator, tensors))
        first = find(min(tensors))
        for tensor in tensors:
            parent[find(tensor)] = first
    groups: dict[int, list[Operator]] = {}
    for operator, tensors in members:
        groups.setdefault(find(min(tensors)), []).append(operator)
    doors, islands = [], []
    for group in groups.values():
        if all(_is_door(operator, graph) for operator in group):
            doors += [
                f"{operator.name} at {'input' if operator.name == 'QUANTIZE' else 'output'}"
                f" {_door_name(operator, graph)}"
                for operator in group
            ]
            continue
        inside = {o.index for o in group}
        leaving = [o for o in group if not _feeds(o, graph, inside)] or group
        islands.append(
            FloatIsland(
                subgraph=number,
                operators=tuple(o.index for o in group),
                names=tuple(o.name for o in group),
                computing=tuple(o.name for o in group if o.name not in CONVERSIONS),
                output=graph.tensors[leaving[-1].outputs[0]].name if leaving[-1].outputs else "",
            )
        )
    return doors, islands


def _is_door(operator: Operator, graph: Subgraph) -> bool:
    if operator.name == "QUANTIZE":
        return operator.inputs[0] in graph.inputs
    return operator.name == "DEQUANTIZE" and operator.outputs[0] in graph.outputs


def _door_name(operator: Operator, graph: Subgraph) -> str:
    side = operator.inputs if operator.name == "QUANTIZE" else operator.outputs
    return repr(graph.tensors[side[0]].name)


def _feeds(operator: Operator, graph: Subgraph, inside: set[int]) -> bool:
    """Whether another operator of the island uses what this one makes."""
    made = set(operator.outputs)
    return any(o.index in inside and made & set(o.inputs) for o in graph.operators)


def tensor_specs(
    path: Path, *, signature: str = ""
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a .tflite file's main graph or of a signature's, in the file's order.

    Names are those of its signature where it has one, else the tensors'. Layouts are TFLite's
    convention, channels last. Raises ArtifactError as `read_model`, and for an input or output with
    more than one scale.
    """
    model = read_model(path)
    if signature:
        model = graph_of(model, signature, where=str(path))
    return model_specs(model, where=str(path))


def model_specs(
    model: Model, *, where: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """`tensor_specs` of a parsed model."""
    graph = model.subgraphs[0]
    signature = next((s for s in model.signatures if s.subgraph == 0), None)
    sides: tuple[Mapping[str, int], ...] = ({}, {})
    if signature is not None:
        sides = (signature.inputs, signature.outputs)
    inputs, outputs = (
        tuple(
            _spec(graph.tensors[i], name, where)
            for i, name in zip(tensors, _names(tensors, side, graph), strict=True)
        )
        for tensors, side in zip((graph.inputs, graph.outputs), sides, strict=True)
    )
    return inputs, outputs


def _names(tensors: Sequence[int], side: Mapping[str, int], graph: Subgraph) -> list[str]:
    """A name for each input or output: the signature's, else its tensor's; one that is there again
    is ``y#1``."""
    given: dict[int, list[str]] = {}
    for name, tensor in side.items():
        given.setdefault(tensor, []).append(name)
    found: list[str] = []
    for tensor in tensors:
        left = given.get(tensor)
        name = (left.pop(0) if left else "") or graph.tensors[tensor].name
        again = itertools.count(1)
        unique = name
        while unique in found:
            unique = f"{name}#{next(again)}"
        found.append(unique)
    return found


def _spec(tensor: Tensor, name: str, where: str) -> TensorSpec:
    if len(tensor.scales) > 1:
        raise ArtifactError(
            f"{where}: tensor {tensor.name!r} at its edge has {len(tensor.scales)} scales",
            hint="inputs and outputs must be quantized with one scale",
        )
    return TensorSpec(
        name=name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        layout=TFLITE_LAYOUTS.get(len(tensor.shape), ""),
        scale=tensor.scales[0] if tensor.scales else 0.0,
        zero_point=tensor.zero_points[0] if tensor.zero_points else 0,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise ArtifactError(
            f"{path} does not exist", hint="check the path", code="no-such-file"
        ) from exc
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc}", hint="check the path") from exc


def as_dict(
    description: ModelDescription, several: Mapping[str, ModelDescription], *, tensors: bool = False
) -> dict[str, Any]:
    """Plain data for ``--json``; the list of all tensors only on request. ``several``: `by_signature`."""
    model = description.model

    def costs(one: ModelDescription) -> dict[str, Any]:
        return {
            "macs": one.macs,
            "macs_by_operator": dict(one.macs_by_operator),
            "operators": dict(one.operators),
            "dtypes": dict(one.dtypes),
            "weight_bytes": one.weight_bytes,
            "activation_bytes": one.activation_bytes,
            "transposes": one.transposes,
            "transpose_bytes": one.transpose_bytes,
            "full_integer": one.is_full_integer,
            "float_operators": one.float_operators,
            "float_islands": [dataclasses.asdict(island) for island in one.float_islands],
            "doors": list(one.doors),
        }

    data: dict[str, Any] = {
        "schema": 1,
        "size_bytes": model.size_bytes,
        "description": model.description,
        "schema_version": model.version,
        **costs(description),
        "signatures": [
            {**dataclasses.asdict(s), **(costs(several[s.key]) if several else {})}
            for s in model.signatures
        ],
        "metadata": list(model.metadata),
        "subgraphs": [],
    }
    for graph in model.subgraphs:
        entry: dict[str, Any] = {
            "name": graph.name,
            "inputs": [dataclasses.asdict(graph.tensors[i]) for i in graph.inputs],
            "outputs": [dataclasses.asdict(graph.tensors[i]) for i in graph.outputs],
            "operators": [
                {**dataclasses.asdict(o), "macs": operator_macs(o, graph)} for o in graph.operators
            ],
        }
        if tensors:
            entry["tensors"] = [dataclasses.asdict(t) for t in graph.tensors]
        data["subgraphs"].append(entry)
    return data
