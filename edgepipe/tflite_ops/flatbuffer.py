"""Reading .tflite files: bytes in, plain frozen records out; nothing is executed.

The format is the FlatBuffers schema of LiteRT (``schema.fbs``, identifier ``TFL3``). Weights are
left where they are: only their size is looked at, so a large file parses in milliseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import mmap
import re
import shlex
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.errors import ArtifactError, RequestError

IDENTIFIER = b"TFL3"
# More than any file has; a damaged one may claim billions.
MAX_SIGNATURES = 10_000
FLOAT_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})

_BITS = {
    "float32": 32, "float16": 16, "bfloat16": 16, "float64": 64,
    "int2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16,
    "int32": 32, "uint32": 32, "int64": 64, "uint64": 64, "bool": 8,
    "complex64": 64, "complex128": 128, "float8_e4m3fn": 8, "float8_e5m2": 8,
}  # fmt: skip

# What flatbuffers' Python reader raises on bytes that are not what their offsets promise.
_DAMAGE = (
    struct.error,
    IndexError,
    KeyError,
    ValueError,  # also UnicodeDecodeError
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """``scales`` and ``zero_points`` have one entry, or one for each slice along ``quantized_axis``.

    ``size_bytes`` is the stored size of a constant, and what the shape and dtype need otherwise.
    ``buffer`` is the number of the model's buffer that holds a constant.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    quantized_axis: int
    is_constant: bool
    is_variable: bool
    size_bytes: int
    buffer: int

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES


@dataclasses.dataclass(frozen=True)
class Operator:
    """``inputs`` and ``outputs`` are tensor numbers of its subgraph, -1 for an absent optional one.

    ``options`` are the scalar fields of its option table, by their schema name in snake case.
    """

    index: int
    name: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Subgraph:
    name: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Signature:
    """Names for the inputs and outputs of one subgraph: name -> tensor number."""

    key: str
    subgraph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Model:
    version: int
    description: str
    size_bytes: int
    subgraphs: tuple[Subgraph, ...]
    signatures: tuple[Signature, ...]
    metadata: tuple[str, ...]


def parse_model(content: bytes, *, where: str) -> Model:
    """The bytes of a .tflite file -> Model. ``where`` names the file in errors.

    Raises ArtifactError for bytes of another format (named where it is a known one), a truncated
    file, or offsets and numbers that lead out of it.
    """
    check_identifier(content, where=where)
    try:
        reader = _Reader(content)
        model = reader.model()
        _check(model)
    except _Damaged as exc:
        raise _damaged(where, str(exc)) from exc
    except _DAMAGE as exc:
        raise _damaged(where, "its offsets lead out of the file") from exc
    return model


def find_signature(model: Model, key: str, *, where: str) -> Signature:
    """The signature of this key. ArtifactError (``no-such-signature``) naming those there are."""
    for signature in model.signatures:
        if signature.key == key:
            return signature
    known = ", ".join(repr(s.key) for s in model.signatures) or "none"
    raise ArtifactError(
        f"{where} has no signature {key!r}; it has: {known}",
        hint="`edgepipe inspect` lists the signatures of a file",
        code="no-such-signature",
    )


def signature_graphs(path: Path) -> dict[str, int]:
    """The number of each signature's graph by its key; empty where the file has none or is damaged.

    Nothing else of the file is looked at, so that whatever runs it can tell what is wrong with it.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            root = schema.Model.GetRootAs(content, 0)
            numbers = range(min(root.SignatureDefsLength(), MAX_SIGNATURES))
            found = [root.SignatureDefs(number) for number in numbers]
            return {(s.SignatureKey() or b"").decode(): s.SubgraphIndex() for s in found}
    except (*_DAMAGE, OSError):
        return {}


def check_signature(path: Path, key: str, *, option: str) -> None:
    """RequestError unless ``key`` is a signature of the file, or is empty and there is nothing to choose.

    ``option`` is how the user names one; empty where there is no way to.
    """
    graphs = signature_graphs(path)
    known = ", ".join(graphs) or "none"
    example = f"{option} {shlex.quote(next(iter(graphs), ''))}"
    if key and key not in graphs:
        raise RequestError(
            f"{path} has no signature {key!r}; it has: {known}",
            hint=f"{example} or another of these" if graphs else f"leave {option} out",
            code="no-such-signature",
        )
    # one that is not of the main graph is no better known to programs that ask for none
    if not key and (len(graphs) > 1 or set(graphs.values()) - {0}):
        raise RequestError(
            f"{path} has several graphs, each a model by itself, called by signature: {known}",
            hint=f"name the one that is meant: {example}"
            if option
            else "give the file of one of them alone; edgepipe bench --signature measures one of these",
            code="which-signature",
        )


def with_main_graph(content: bytes, key: str, *, where: str) -> bytes:
    """The file with the graph of a signature as its main one, which changes places with it."""
    number = find_signature(parse_model(content, where=where), key, where=where).subgraph
    if number == 0:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(inline_buffers(content)))
    places = {0: number, number: 0}
    model.subgraphs[0], model.subgraphs[number] = model.subgraphs[number], model.subgraphs[0]
    for signature in model.signatureDefs:
        signature.subgraphIndex = places.get(signature.subgraphIndex, signature.subgraphIndex)
    for operator in (o for graph in model.subgraphs for o in graph.operators or []):
        for options in (operator.builtinOptions, operator.builtinOptions2):
            for name, value in vars(options).items() if options else ():
                # IF, WHILE and CALL_ONCE name the graphs they run
                if name.endswith("SubgraphIndex"):
                    setattr(options, name, places.get(value, value))
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def check_identifier(content: bytes, *, where: str) -> None:
    """Raise ArtifactError unless the bytes begin like a TFLite file; say what they are instead."""
    if content[4:8] == IDENTIFIER:
        return
    if not content:
        found = "it is empty"
    elif content[:4] == b"PK\x03\x04":
        found = "it is a zip archive (a PyTorch .pt/.pt2, a Keras or an .npz file?)"
    elif content[:2] in (b"\x80\x02", b"\x80\x04"):
        found = "it is a Python pickle"
    elif content[:8] == b"\x89HDF\r\n\x1a\n":
        found = "it is an HDF5 (Keras) file"
    elif content[:1] == b"\x08" and (b"onnx" in content[:400] or b"pytorch" in content[:400]):
        found = "it is an ONNX model"
    elif content.startswith(b"version https://git-lfs"):
        found = "it is a Git LFS pointer, not the file it stands for (git lfs pull)"
    elif content[:1] == b"<":
        found = "it is HTML or XML, perhaps an error page that was saved"
    else:
        found = f"it begins with {content[:8].hex(' ')}"
    raise ArtifactError(
        f"{where} is not a TFLite model: {found}",
        hint="a TFLite file has the letters TFL3 at its fifth byte",
        code="not-tflite",
    )


def operator_codes(code: Any) -> tuple[str, int]:
    """(name, version) of a schema.OperatorCode; a custom operator's own name."""
    # Codes above 127 do not fit the first field, which then holds 127 (schema.fbs, OperatorCode).
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number == schema.BuiltinOperator.CUSTOM:
        custom = code.CustomCode()
        return (custom.decode("utf-8") if custom else "CUSTOM"), code.Version()
    return _OPERATORS.get(number, f"BUILTIN_{number}"), code.Version()


def constants(content: bytes, graph: Subgraph) -> dict[int, np.ndarray]:
    """The constant tensors of the main graph, by tensor number: copies, in their shape and dtype."""
    buffers = schema.Model.GetRootAs(content, 0)
    return {
        tensor.index: np.frombuffer(
            buffers.Buffers(tensor.buffer).DataAsNumpy().tobytes(), tensor.dtype
        )
        .reshape(tensor.shape)
        .copy()
        for tensor in graph.tensors
        if tensor.is_constant
    }


def with_constants(content: bytes, values: Mapping[int, np.ndarray]) -> bytes:
    """The file with some constant float32 tensors of the main graph (by number) replaced."""
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    for index, array in values.items():
        tensor = model.subgraphs[0].tensors[index]
        raw = np.ascontiguousarray(array, np.float32).tobytes()
        model.buffers[tensor.buffer].data = np.frombuffer(raw, np.uint8)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def inline_buffers(content: bytes) -> bytes:
    """The file with all weights inside its flatbuffer; as it is where they are.

    litert-quantizer keeps them behind it from 256 KiB on (offset and size in place of data), which
    is meant for files of 2 GiB and which runtimes before LiteRT's 2023 schema do not read.
    """
    root = schema.Model.GetRootAs(content, 0)
    if not any(root.Buffers(i).Offset() > 1 for i in range(root.BuffersLength())):
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = content[buffer.offset : buffer.offset + buffer.size]
            buffer.offset = buffer.size = 0
        # an array is written at once, bytes one by one
        if isinstance(buffer.data, bytes | bytearray):
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def drop_tensors(model: Any, gone: set[int]) -> None:
    """Remove tensors of the main graph that nothing uses, and renumber the rest."""
    graph = model.subgraphs[0]
    kept = [i for i in range(len(graph.tensors)) if i not in gone]
    number = {old: new for new, old in enumerate(kept)} | {-1: -1}
    graph.tensors = [graph.tensors[i] for i in kept]

    def moved(indices: Iterable[int] | None) -> list[int]:
        return [number[int(i)] for i in indices] if indices is not None else []

    graph.inputs, graph.outputs = moved(graph.inputs), moved(graph.outputs)
    for operator in graph.operators:
        operator.inputs, operator.outputs = moved(operator.inputs), moved(operator.outputs)
        if operator.intermediates is not None:
            operator.intermediates = moved(operator.intermediates)
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex == 0:
            for entry in [*(signature.inputs or []), *(signature.outputs or [])]:
                entry.tensorIndex = number[entry.tensorIndex]


class _Damaged(Exception):
    """The file contradicts itself; the text says how."""


def _damaged(where: str, how: str) -> ArtifactError:
    return ArtifactError(
        f"{where} is a damaged or truncated TFLite model: {how}",
        hint="convert or copy it again, and compare sha256 with the original",
        code="damaged-model",
    )


def _names(enum: type) -> dict[int, str]:
    return {v: k for k, v in vars(enum).items() if isinstance(v, int) and not k.startswith("_")}


_OPERATORS = _names(schema.BuiltinOperator)
_DTYPES = {number: name.lower() for number, name in _names(schema.TensorType).items()}
_OPTION_TYPES = {
    **{(1, number): name for number, name in _names(schema.BuiltinOptions).items()},
    **{(2, number): name for number, name in _names(schema.BuiltinOptions2).items()},
}
_OPTION_ENUMS = {
    "fused_activation_function": _names(schema.ActivationFunctionType),
    "padding": _names(schema.Padding),
}


@functools.cache
def _option_fields(name: str) -> tuple[tuple[str, str], ...]:
    """(snake case name, accessor) of the scalar fields of an option table."""
    fields = []
    for accessor, function in vars(getattr(schema, name)).items():
        if accessor.startswith("_") or accessor == "Init" or not inspect.isfunction(function):
            continue
        if len(inspect.signature(function).parameters) == 1 and not accessor.endswith(
            ("AsNumpy", "IsNone", "Length")
        ):
            fields.append(
                (
                    re.sub(
                        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", accessor
                    ).lower(),
                    accessor,
                )
            )
    return tuple(fields)


class _Reader:
    """Walks one file. Every element read is counted, and no file may hold more elements than it has
    bytes: so a vector length turned into four thousand million by damage ends the walk at once."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.left = len(content)

    def length(self, length: int) -> int:
        self.left -= length
        if length < 0 or self.left < 0:
            raise _Damaged("a list in it claims more elements than the file has bytes")
        return length

    def items(self, owner: Any, name: str) -> list[Any]:
        """All elements of a vector of tables."""
        get = getattr(owner, name)
        return [get(i) for i in range(self.length(getattr(owner, name + "Length")()))]

    def numbers(self, owner: Any, name: str) -> list[Any]:
        """All elements of a vector of numbers."""
        count = self.length(getattr(owner, name + "Length")())
        if count == 0:
            return []
        array: np.ndarray = getattr(owner, name + "AsNumpy")()
        return array.tolist()

    def text(self, raw: bytes | None) -> str:
        return "" if raw is None else raw[: self.length(len(raw))].decode("utf-8")

    def model(self) -> Model:
        root = schema.Model.GetRootAs(self.content, 0)
        codes = [operator_codes(code) for code in self.items(root, "OperatorCodes")]
        buffers = [self.buffer_bytes(item) for item in self.items(root, "Buffers")]
        subgraphs = tuple(self.subgraph(g, codes, buffers) for g in self.items(root, "Subgraphs"))
        if not subgraphs:
            raise _Damaged("it holds no graph")
        return Model(
            version=root.Version(),
            description=self.text(root.Description()),
            size_bytes=len(self.content),
            subgraphs=subgraphs,
            signatures=tuple(self.signature(s) for s in self.items(root, "SignatureDefs")),
            metadata=tuple(self.text(m.Name()) for m in self.items(root, "Metadata")),
        )

    def buffer_bytes(self, buffer: Any) -> int:
        # Files over 2 GiB keep their data behind the flatbuffer: offset and size instead of data.
        offset, size = buffer.Offset(), buffer.Size()
        if offset > 1:
            if offset + size > len(self.content):
                raise _Damaged("weights kept at its end are cut off")
            return int(size)
        length = int(buffer.DataLength())
        if length > len(self.content):
            raise _Damaged("weights in it are cut off")
        if length:
            buffer.Data(length - 1)  # the last byte must be there
        return length

    def subgraph(self, graph: Any, codes: list[tuple[str, int]], buffers: list[int]) -> Subgraph:
        return Subgraph(
            name=self.text(graph.Name()),
            tensors=tuple(
                self.tensor(index, tensor, buffers)
                for index, tensor in enumerate(self.items(graph, "Tensors"))
            ),
            operators=tuple(
                self.operator(index, operator, codes)
                for index, operator in enumerate(self.items(graph, "Operators"))
            ),
            inputs=tuple(self.numbers(graph, "Inputs")),
            outputs=tuple(self.numbers(graph, "Outputs")),
        )

    def tensor(self, index: int, tensor: Any, buffers: list[int]) -> Tensor:
        shape = tuple(self.numbers(tensor, "Shape"))
        quantization = tensor.Quantization()
        scales: list[float] = []
        zero_points: list[int] = []
        if quantization is not None:
            scales = self.numbers(quantization, "Scale")
            zero_points = self.numbers(quantization, "ZeroPoint")
        dtype = _DTYPES.get(tensor.Type())
        if dtype is None:
            raise _Damaged(f"tensor {index} has the unknown element type {tensor.Type()}")
        if any(size < 0 for size in shape):
            raise _Damaged(f"tensor {index} has the shape {shape}")
        stored = buffers[tensor.Buffer()]
        elements = 1
        for size in shape:
            elements *= size
        needed = (elements * _BITS.get(dtype, 0) + 7) // 8
        if stored and _BITS.get(dtype) and stored < needed and not tensor.Sparsity():
            raise _Damaged(f"tensor {index} needs {needed} bytes, its buffer has {stored}")
        return Tensor(
            index=index,
            name=self.text(tensor.Name()),
            shape=shape,
            dtype=dtype,
            scales=tuple(scales),
            zero_points=tuple(zero_points),
            quantized_axis=quantization.QuantizedDimension() if quantization else 0,
            is_constant=stored > 0,
            is_variable=bool(tensor.IsVariable()),
            size_bytes=stored or needed,
            buffer=tensor.Buffer(),
        )

    def operator(self, index: int, operator: Any, codes: list[tuple[str, int]]) -> Operator:
        name, version = codes[operator.OpcodeIndex()]
        options: dict[str, Any] = {}
        for table, kind in (
            (operator.BuiltinOptions(), (1, operator.BuiltinOptionsType())),
            (operator.BuiltinOptions2(), (2, operator.BuiltinOptions2Type())),
        ):
            type_name = _OPTION_TYPES.get(kind, "NONE")
            if table is None or type_name == "NONE":
                continue
            record = getattr(schema, type_name)()
            record.Init(table.Bytes, table.Pos)
            for field, accessor in _option_fields(type_name):
                value = getattr(record, accessor)()
                if isinstance(value, bytes):
                    value = self.text(value)
                if field in _OPTION_ENUMS:
                    value = _OPTION_ENUMS[field].get(value, value)
                if isinstance(value, (bool, int, float, str)):
                    options[field] = value
        return Operator(
            index=index,
            name=name,
            version=version,
            inputs=tuple(self.numbers(operator, "Inputs")),
            outputs=tuple(self.numbers(operator, "Outputs")),
            options=options,
        )

    def signature(self, signature: Any) -> Signature:
        def named(side: str) -> dict[str, int]:
            return {self.text(m.Name()): m.TensorIndex() for m in self.items(signature, side)}

        return Signature(
            key=self.text(signature.SignatureKey()),
            subgraph=signature.SubgraphIndex(),
            inputs=named("Inputs"),
            outputs=named("Outputs"),
        )


def _check(model: Model) -> None:
    """Every number that refers to a tensor or subgraph must refer to one that is there."""
    for graph in model.subgraphs:
        count = len(graph.tensors)
        used = [("graph inputs", 0, graph.inputs), ("graph outputs", 0, graph.outputs)]
        used += [
            (f"operator {operator.index} ({operator.name})", -1, operator.inputs + operator.outputs)
            for operator in graph.operators
        ]
        for what, lowest, numbers in used:
            bad = [n for n in numbers if not lowest <= n < count]
            if bad:
                raise _Damaged(f"{what} name tensor {bad[0]}, but there are {count}")
    for signature in model.signatures:
        if not 0 <= signature.subgraph < len(model.subgraphs):
            raise _Damaged(f"signature {signature.key!r} names subgraph {signature.subgraph}")
        count = len(model.subgraphs[signature.subgraph].tensors)
        named = [*signature.inputs.values(), *signature.outputs.values()]
        if any(not 0 <= n < count for n in named):
            raise _Damaged(f"signature {signature.key!r} names a tensor that is not there")
