"""Will zeros in the weights make a .tflite file faster, or only its download smaller?

XNNPACK skips zeros in float 1x1 convolutions, under conditions: those of "Sparse Inference" in the
README of LiteRT's XNNPACK delegate, and of ``xnn_check_nchw_compatibility`` and
``xnn_subgraph_rewrite_for_nchw`` in XNNPACK's ``src/subgraph.c``, which are checked here operator by
operator. No int8 kernel skips zeros.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.errors import StageError
from edgepipe.tflite_ops.flatbuffer import Operator, Subgraph, parse_model
from edgepipe.tflite_ops.inspect import operator_macs
from edgepipe.units import format_bytes

log = logging.getLogger(__name__)

# Quantised weights have zeros that nobody asked for, a few per cent; from here on they were made.
NOTABLE = 0.3
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "CONV_3D")
_UNARY = frozenset(
    {"ABS", "CEIL", "ELU", "FLOOR", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "RELU", "RELU6",
     "RELU_N1_TO_1", "ROUND", "SQUARE"}
)  # fmt: skip
_ENDS = frozenset({"MEAN", "DEPTH_TO_SPACE"})
_DENSE_HINT = "weights are stored dense, not through DENSIFY, which is how XNNPACK is asked for it"


@dataclasses.dataclass(frozen=True)
class LayerZeros:
    """Zeros among the weights of one operator. ``is_skipped``: XNNPACK would not multiply by them."""

    operator: int
    name: str
    output: str
    shape: tuple[int, ...]
    zeros: int
    values: int
    macs: int
    is_skipped: bool = False


@dataclasses.dataclass(frozen=True)
class Blocker:
    """What keeps a part of the graph from sparse inference: ``operator`` -1 where it is no single one."""

    operator: int
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SparseReport:
    """``compressed_bytes`` by method; zstd is absent where its package is. ``is_stored_sparse``: the
    weights go through DENSIFY. ``skipped_macs`` are those of the zeros that are not multiplied by."""

    layers: tuple[LayerZeros, ...]
    is_float: bool
    is_stored_sparse: bool
    blockers: tuple[Blocker, ...]
    size_bytes: int
    compressed_bytes: Mapping[str, int]
    macs: int
    skipped_macs: int

    @property
    def zeros(self) -> float:
        """Share of all weights."""
        values = sum(layer.values for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / values if values else 0.0

    @property
    def is_faster(self) -> bool:
        return self.skipped_macs > 0


def check_sparsity(content: bytes, *, where: str) -> SparseReport:
    """Zeros of a .tflite file's main graph and what they are worth. Raises ArtifactError for a damaged
    file."""
    model = parse_model(content, where=where)
    graph = model.subgraphs[0]
    densified = _densified(graph)
    layers = _layers(content, graph, densified)
    is_float = any(graph.tensors[o.inputs[0]].is_float for o in graph.operators if o.name in ("CONV_2D", "FULLY_CONNECTED", "DEPTHWISE_CONV_2D"))  # fmt: skip
    blockers: list[Blocker] = []
    skipped: set[int] = set()
    if is_float:
        parts, blockers = _sparse_parts(graph, densified)
        skipped, dense = _skipped(parts, layers, graph)
        blockers += dense
        if skipped and not densified:
            blockers.append(Blocker(-1, "DENSIFY", _DENSE_HINT))
            skipped = set()
    layers = [dataclasses.replace(x, is_skipped=x.operator in skipped) for x in layers]
    return SparseReport(
        layers=tuple(layers),
        is_float=is_float,
        is_stored_sparse=bool(densified),
        blockers=tuple(blockers),
        size_bytes=len(content),
        compressed_bytes=_compressed(content),
        macs=sum(operator_macs(o, graph) for o in graph.operators),
        skipped_macs=sum(round(x.macs * x.zeros / x.values) for x in layers if x.is_skipped),
    )


def sparsity_lines(report: SparseReport) -> list[str]:
    """The report's answer for people: what the zeros gain, or what stands in the way."""
    lines = [f"{100 * report.zeros:.0f} % of the weights are zero"]
    if not report.is_float:
        lines.append("no gain at run time: int8 kernels multiply by zero as by any number")
    elif report.is_faster:
        share = 100 * report.skipped_macs / report.macs
        lines.append(
            f"by its conditions XNNPACK skips {share:.0f} % of the MACs, in {sum(x.is_skipped for x in report.layers)} 1x1 "
            "convolutions (on ARM; on x86 with AVX it computes dense)"
        )
    else:
        lines.append(
            "no gain at run time: XNNPACK skips zeros only in certain float graphs, and here"
        )
        shown = report.blockers[:5]
        lines += [f"  {_operator_text(b)}{b.reason}" for b in shown]
        if len(report.blockers) > len(shown):
            lines.append(f"  and {len(report.blockers) - len(shown)} more")
    sizes = ", ".join(f"{k} {format_bytes(v)}" for k, v in report.compressed_bytes.items())
    missing = "" if "zstd" in report.compressed_bytes else " (zstd: install the package zstandard)"
    lines.append(f"download: {format_bytes(report.size_bytes)}, compressed {sizes}{missing}")
    return lines


def as_dict(report: SparseReport) -> dict[str, Any]:
    """Plain data, for ``--json`` and the facts of an artifact."""
    return {
        **dataclasses.asdict(report),
        "zeros": report.zeros,
        "is_faster": report.is_faster,
    }


def sparsity_facts(content: bytes, *, where: str) -> dict[str, Any]:
    """Facts for the artifact of a converted file, told to the user: none where every layer has few zeros."""
    graph = parse_model(content, where=where).subgraphs[0]
    layers = _layers(content, graph, _densified(graph))
    # before anything is compressed, which takes seconds of a large file
    if all(layer.zeros < NOTABLE * layer.values for layer in layers):
        return {}
    report = check_sparsity(content, where=where)
    for line in sparsity_lines(report):
        log.info("%s", line)
    return {"sparsity": as_dict(report)}


def _operator_text(blocker: Blocker) -> str:
    return "" if blocker.operator < 0 else f"operator {blocker.operator}, {blocker.name}, "


def _compressed(content: bytes) -> dict[str, int]:
    sizes = {"gzip": len(gzip.compress(content, 9, mtime=0))}
    try:
        import zstandard
    except ImportError:
        return sizes
    return sizes | {"zstd": len(zstandard.ZstdCompressor(level=19).compress(content))}


def _densified(graph: Subgraph) -> dict[int, int]:
    """Weights as operators read them -> as they are stored."""
    return {o.outputs[0]: o.inputs[0] for o in graph.operators if o.name == "DENSIFY"}


def _layers(content: bytes, graph: Subgraph, densified: Mapping[int, int]) -> list[LayerZeros]:
    return [
        found
        for operator in graph.operators
        if operator.name in WEIGHTED
        and (found := _zeros(content, graph, operator, densified)) is not None
    ]


def _zeros(
    content: bytes, graph: Subgraph, operator: Operator, densified: Mapping[int, int]
) -> LayerZeros | None:
    index = operator.inputs[1]
    weight = graph.tensors[index]
    stored = graph.tensors[densified.get(index, index)]
    if not stored.is_constant or stored.dtype not in ("float32", "float16", "int8", "uint8", "int16"):  # fmt: skip
        return None
    root = schema.Model.GetRootAs(content, 0)
    values = np.frombuffer(root.Buffers(stored.buffer).DataAsNumpy().tobytes(), stored.dtype)
    zero = stored.zero_points[0] if len(stored.zero_points) == 1 else 0
    count = int(np.prod(weight.shape))
    return LayerZeros(
        operator=operator.index,
        name=operator.name,
        output=graph.tensors[operator.outputs[0]].name,
        shape=weight.shape,
        zeros=count - int(np.count_nonzero(values != zero)),  # what is not stored is zero
        values=count,
        macs=operator_macs(operator, graph),
    )


def _sparse_parts(
    graph: Subgraph, densified: Mapping[int, int]
) -> tuple[list[set[int]], list[Blocker]]:
    """Parts of a float graph that XNNPACK can turn to channels-first, and what ends the other ones.

    A part ends in MEAN or DEPTH_TO_SPACE and is followed back to 3x3 convolutions with stride 2 on
    three channels; everything on the way must have a channels-first kernel, and nothing outside may
    read what it computes.
    """
    producers = {t: o for o in graph.operators for t in o.outputs}
    readers: dict[int, list[Operator]] = {}
    for operator in graph.operators:
        for tensor in operator.inputs:
            readers.setdefault(tensor, []).append(operator)
    constant = {t.index for t in graph.tensors if t.is_constant} | set(densified)
    pads = _fused_pads(graph, readers)
    reasons = {o.index: _why_not(graph, o, producers, pads, constant) for o in graph.operators}
    ends = [o for o in reversed(graph.operators) if o.name in _ENDS and not reasons[o.index]]
    parts: list[set[int]] = []
    blockers: dict[int, Blocker] = {}
    for end in ends:
        if any(end.index in part for part in parts):
            continue
        part, waiting = {end.index}, [end]
        found: list[Blocker] = []
        while waiting:
            operator = waiting.pop()
            if _is_start(operator, graph):
                continue
            for tensor in _activations(operator):
                if tensor in constant or tensor < 0:
                    continue
                source = producers.get(tensor)
                if source is not None and source.index in pads:
                    source = producers.get(source.inputs[0])
                if tensor in graph.outputs:
                    found.append(Blocker(operator.index, operator.name, f"reads {graph.tensors[tensor].name!r}, which is an output of the model too"))  # fmt: skip
                elif source is None:
                    found.append(Blocker(operator.index, operator.name, "reads the model's input, but a sparse part begins with a 3x3 convolution, stride 2, 3 input channels"))  # fmt: skip
                elif reasons[source.index]:
                    found.append(Blocker(source.index, source.name, reasons[source.index]))
                elif source.index not in part:
                    part.add(source.index)
                    waiting.append(source)
        inside = part | {p for p in pads if any(r.index in part for r in readers.get(graph.operators[p].outputs[0], []))}  # fmt: skip
        for index in part:
            if _is_start(graph.operators[index], graph):
                continue
            for tensor in _activations(graph.operators[index]):
                for reader in readers.get(tensor, []) if tensor not in constant else []:
                    if reader.index not in inside:
                        found.append(Blocker(reader.index, reader.name, f"reads {graph.tensors[tensor].name!r} too, from outside the part that would be sparse"))  # fmt: skip
        if found:
            blockers |= {b.operator: b for b in found}
        else:
            parts.append(part)
    if not ends:
        blockers[-1] = Blocker(-1, "MEAN", "no MEAN over height and width, or DEPTH_TO_SPACE, to end a sparse part with")  # fmt: skip
    return parts, [blockers[i] for i in sorted(blockers)]


def _skipped(
    parts: list[set[int]], layers: list[LayerZeros], graph: Subgraph
) -> tuple[set[int], list[Blocker]]:
    """The 1x1 convolutions of parts with enough zeros, and the ends of parts that have too few."""
    skipped: set[int] = set()
    blockers = []
    for part in parts:
        inside = [x for x in layers if x.operator in part and x.name == "CONV_2D" and x.shape[1:3] == (1, 1)]  # fmt: skip
        zeros, values = sum(x.zeros for x in inside), sum(x.values for x in inside)
        if zeros * 3 > values * 2:  # as XNNPACK counts
            skipped |= {x.operator for x in inside}
            continue
        end = graph.operators[max(part)]
        share = 100 * zeros / values if values else 0
        blockers.append(Blocker(end.index, end.name, f"ends a part whose 1x1 convolutions are {share:.0f} % zeros; more than two thirds are needed"))  # fmt: skip
    return skipped, blockers


def _activations(operator: Operator) -> tuple[int, ...]:
    """The inputs that other operators may have computed."""
    return operator.inputs if operator.name in ("ADD", "MUL") else operator.inputs[:1]


def _fused_pads(graph: Subgraph, readers: Mapping[int, list[Operator]]) -> set[int]:
    """PAD operators that XNNPACK takes into the convolution (without padding) that alone reads them."""
    fused = set()
    for operator in graph.operators:
        if operator.name == "PAD":
            using = readers.get(operator.outputs[0], [])
            if (
                len(using) == 1
                and using[0].name in ("CONV_2D", "DEPTHWISE_CONV_2D")
                and using[0].options.get("padding") == "VALID"
                and operator.outputs[0] not in graph.outputs
            ):
                fused.add(operator.index)
    return fused


def _padding(
    graph: Subgraph,
    operator: Operator,
    producers: Mapping[int, Operator],
    pads: set[int],
) -> int | None:
    """Padding on each side, where it is the same on all four and written out; else None.

    With stride 1 XNNPACK itself writes "SAME" out, with another stride it does not.
    """
    height, width = graph.tensors[operator.inputs[1]].shape[1:3]
    if operator.options.get("padding") == "SAME":
        stride = max(operator.options.get("stride_h", 1), operator.options.get("stride_w", 1))
        return (height - 1) // 2 if stride == 1 and height == width and height % 2 else None
    before = producers.get(operator.inputs[0])
    if before is None or before.index not in pads:
        return 0
    whole, padded = (graph.tensors[t].shape for t in (before.inputs[0], before.outputs[0]))
    grown = [p - w for p, w in zip(padded, whole, strict=True)]
    # symmetric, as a PAD that a converter makes for an odd kernel is: one number for both sides
    if grown[0] or grown[3] or grown[1] != grown[2] or grown[1] % 2:
        return None
    return grown[1] // 2


def _is_start(operator: Operator, graph: Subgraph) -> bool:
    return operator.name == "CONV_2D" and graph.tensors[operator.inputs[1]].shape[1:3] == (3, 3)


def _why_not(
    graph: Subgraph,
    operator: Operator,
    producers: Mapping[int, Operator],
    pads: set[int],
    constant: set[int],
) -> str:
    """Why XNNPACK has no channels-first kernel for an operator, or an empty string."""
    shapes = [graph.tensors[t].shape for t in operator.inputs if t >= 0]
    options = operator.options
    if operator.name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        if operator.inputs[1] not in constant:
            return "has weights that are computed"
        kernel = shapes[1][1:3]
        strides = (options.get("stride_h", 1), options.get("stride_w", 1))
        size, stride = f"{kernel[0]}x{kernel[1]}", f"{strides[0]}x{strides[1]}"
        if options.get("dilation_h_factor", 1) != 1 or options.get("dilation_w_factor", 1) != 1:
            return "is dilated"
        padding = _padding(graph, operator, producers, pads)
        if operator.name == "DEPTHWISE_CONV_2D":
            if options.get("depth_multiplier", 1) != 1:
                return "makes several channels of each"
            if kernel not in ((3, 3), (5, 5)) or strides not in ((1, 1), (2, 2)):
                return (
                    f"is {size} with stride {stride}; 3x3 and 5x5 with stride 1 or 2 are supported"
                )
            if padding != kernel[0] // 2:
                return f"is {size} without {kernel[0] // 2} of padding written out on each side"
            return ""
        if shapes[0][3] != shapes[1][3]:
            return "is a grouped convolution"
        if kernel == (1, 1):
            return "" if strides == (1, 1) and padding == 0 else f"is 1x1 with stride {stride} or padding"  # fmt: skip
        if kernel != (3, 3) or strides != (2, 2) or shapes[1][3] != 3:
            return f"is {size} with stride {stride} on {shapes[1][3]} channels; only 1x1, and 3x3 with stride 2 on 3 channels as the first, are supported"  # fmt: skip
        return "" if padding == 1 else "is 3x3 without 1 of padding written out on each side"
    if operator.name == "MEAN":
        source = graph.tensors[operator.inputs[0]].shape
        output = graph.tensors[operator.outputs[0]].shape
        spatial = len(source) == 4 and output in ((source[0], source[3]), (source[0], 1, 1, source[3]))  # fmt: skip
        return "" if spatial else "is no mean over height and width"
    if operator.name == "DEPTH_TO_SPACE":
        return ""
    if operator.name in ("ADD", "MUL"):
        if any(len(shape) != 4 for shape in shapes):
            return "has an input that is not four-dimensional"
        fixed = [graph.tensors[t].shape for t in operator.inputs if t in constant]
        if any(sum(size != 1 for size in shape) > 1 for shape in fixed):
            return "has a constant that is no scalar and no vector"
        return ""
    if operator.name == "RESIZE_BILINEAR":
        return "" if min(shapes[0][1:3]) > 1 else "enlarges a single row or column"
    if operator.name in _UNARY:
        return "" if len(shapes[0]) == 4 else "has an input that is not four-dimensional"
    if operator.name == "PAD" and operator.index in pads:
        return ""
    return "is not among the operators of sparse inference"


def store_sparse(content: bytes, *, where: str) -> bytes:
    """The file with the weights that XNNPACK would skip zeros of stored sparse, behind DENSIFY operators.

    Raises StageError naming what stands in the way where XNNPACK would skip none. Example: weights
    (3, 1, 1, 4) with rows [0 5 0 7], [0 0 0 0], [1 0 0 0] are stored as values [5, 7, 1] with
    row ends [0, 2, 2, 3] and columns [1, 3, 0] (``SparsityParameters`` in schema.fbs).
    """
    graph = parse_model(content, where=where).subgraphs[0]
    layers = [
        x
        for o in graph.operators
        if o.name in WEIGHTED and (x := _zeros(content, graph, o, {})) is not None
    ]
    parts, blockers = _sparse_parts(graph, {})
    chosen, more = _skipped(parts, layers, graph)
    if not chosen:
        told = "; ".join(_operator_text(b) + b.reason for b in (*blockers, *more)[:4])
        raise StageError(
            f"XNNPACK would skip no zeros of {where}: {told}",
            stage="to_tflite",
            hint="leave out sparse = true, or change the model; edgepipe inspect --sparsity tells all",
            code="not-sparse",
        )
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    subgraph = model.subgraphs[0]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DENSIFY
    code.version = 1
    model.operatorCodes.append(code)
    before = []
    for index in sorted({graph.operators[number].inputs[1] for number in chosen}):
        dense = subgraph.tensors[index]
        old = model.buffers[dense.buffer]
        rows = np.frombuffer(np.asarray(old.data, np.uint8).tobytes(), np.float32)
        rows = rows.reshape(dense.shape[0], dense.shape[3])  # (out, 1, 1, in) -> (out, in)
        sparse = copy.deepcopy(dense)
        sparse.name = dense.name + b"/sparse"
        sparse.sparsity = _parameters(rows)
        sparse.buffer = len(model.buffers)
        model.buffers.append(schema.BufferT())
        model.buffers[-1].data = np.frombuffer(rows[rows != 0].tobytes(), np.uint8)
        if sum(t.buffer == dense.buffer for g in model.subgraphs for t in g.tensors) == 1:
            old.data = None
        dense.buffer = 0
        operator = schema.OperatorT()
        operator.opcodeIndex = len(model.operatorCodes) - 1
        operator.inputs, operator.outputs = [len(subgraph.tensors)], [index]
        operator.builtinOptionsType = schema.BuiltinOptions.DensifyOptions
        operator.builtinOptions = schema.DensifyOptionsT()
        subgraph.tensors.append(sparse)
        before.append(operator)
    subgraph.operators = [*before, *subgraph.operators]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _parameters(rows: np.ndarray) -> schema.SparsityParametersT:
    """How a matrix (out, in), as (out, 1, 1, in), is stored row by row without its zeros."""
    dims = []
    for size in (len(rows), 1, 1):
        dims.append(schema.DimensionMetadataT())
        dims[-1].format, dims[-1].denseSize = schema.DimensionType.DENSE, size
    ends = np.concatenate([[0], np.count_nonzero(rows, axis=1).cumsum()])
    last = schema.DimensionMetadataT()
    last.format = schema.DimensionType.SPARSE_CSR
    last.arraySegmentsType, last.arraySegments = _indices(ends)
    last.arrayIndicesType, last.arrayIndices = _indices(np.nonzero(rows)[1])
    parameters = schema.SparsityParametersT()
    parameters.traversalOrder = [0, 1, 2, 3]
    parameters.dimMetadata = [*dims, last]
    return parameters


def _indices(values: np.ndarray) -> tuple[int, Any]:
    """Whole numbers in the narrowest of the schema's three kinds of vector."""
    largest = int(values.max(initial=0))
    kinds = schema.SparseIndexVector
    vector: Any = schema.Int32VectorT()
    kind, dtype = kinds.Int32Vector, "int32"
    if largest < 2**8:
        vector, kind, dtype = schema.Uint8VectorT(), kinds.Uint8Vector, "uint8"
    elif largest < 2**16:
        vector, kind, dtype = schema.Uint16VectorT(), kinds.Uint16Vector, "uint16"
    vector.values = values.astype(dtype)
    return kind, vector
