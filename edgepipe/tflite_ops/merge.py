"""One .tflite file out of several of the same network: a subgraph and a signature for each, weights once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.errors import ArtifactError
from edgepipe.tflite_ops.flatbuffer import inline_buffers, parse_model
from edgepipe.tflite_ops.run import open_graph
from edgepipe.tflite_ops.run import quantize as stored

# The key of a metadata entry (schema.fbs): a runtime older than its text is told to refuse the file.
RUNTIME_KEY = b"min_runtime_version"


def merge_signatures(files: Mapping[str, bytes]) -> bytes:
    """The files as one, by the key of the signature that each becomes.

    The first file's graph is the main graph, which programs run that ask for no signature. Constants
    of equal bytes lie in it once, whichever tensors they belong to. Inputs and outputs keep their
    names. Raises ArtifactError for a file with several subgraphs (control flow) or variable tensors.
    """
    merged = schema.ModelT()
    merged.version, merged.description = 3, b"edgepipe"
    merged.subgraphs, merged.signatureDefs = [], []
    merged.buffers, merged.operatorCodes, merged.metadata = [schema.BufferT()], [], []
    numbers: dict[bytes, int] = {b"": 0}
    codes: dict[tuple[Any, ...], int] = {}
    runtimes: list[bytes] = []
    for key, content in files.items():
        named = _door_names(content, key)
        model = flatbuffer_utils.read_model_from_bytearray(bytearray(inline_buffers(content)))
        (graph,) = model.subgraphs
        data = [b"" if b.data is None else np.asarray(b.data, np.uint8).tobytes() for b in model.buffers]  # fmt: skip
        for tensor in graph.tensors:
            tensor.buffer = _number(data[tensor.buffer], numbers, merged.buffers)
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            known = (code.deprecatedBuiltinCode, code.builtinCode, code.customCode, code.version)
            if known not in codes:
                codes[known] = len(merged.operatorCodes)
                merged.operatorCodes.append(code)
            operator.opcodeIndex = codes[known]
        graph.name = key.encode()
        runtimes += [data[m.buffer].rstrip(b"\0") for m in model.metadata or [] if m.name == RUNTIME_KEY]  # fmt: skip
        merged.signatureDefs.append(_signature(key, len(merged.subgraphs), graph, *named))
        merged.subgraphs.append(graph)
    if runtimes:
        entry = schema.MetadataT()
        newest = max(runtimes, key=lambda text: [int(n) for n in text.split(b".") if n.isdigit()])
        # padded as LiteRT's converter does: it is read up to a zero
        entry.name, entry.buffer = (
            RUNTIME_KEY,
            _number(newest.ljust(16, b"\0"), numbers, merged.buffers),
        )
        merged.metadata.append(entry)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(merged))


def _number(data: bytes, numbers: dict[bytes, int], buffers: list[Any]) -> int:
    """The number of the buffer that holds these bytes, which is added where there is none."""
    if data not in numbers:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        numbers[data] = len(buffers)
        buffers.append(buffer)
    return numbers[data]


def _door_names(content: bytes, key: str) -> tuple[list[str], list[str]]:
    """Names of inputs and outputs in the graph's order: its signature's, else the tensors'."""
    model = parse_model(content, where=key)
    if len(model.subgraphs) != 1:
        raise ArtifactError(
            f"the model of {key} has {len(model.subgraphs)} subgraphs (control flow), so it cannot be merged",
            hint="ship the files as they are, one for each bucket",
            code="not-mergeable",
        )
    graph = model.subgraphs[0]
    if any(tensor.is_variable for tensor in graph.tensors):
        # LiteRT resets those of all graphs, and refuses while it has not allocated every one
        raise ArtifactError(
            f"the model of {key} keeps a state of its own (a fused LSTM or RNN), so it cannot be merged",
            hint="ship the files as they are, one for each bucket",
            code="not-mergeable",
        )
    found = []
    for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        signature = getattr(model.signatures[0], side) if model.signatures else {}
        names = {number: name for name, number in signature.items()}
        chosen = [names.get(i, graph.tensors[i].name) for i in tensors]
        if len(set(chosen)) != len(chosen):
            chosen = [f"{side[:-1]}_{number}" for number in range(len(tensors))]
        found.append(chosen)
    return found[0], found[1]


def _signature(
    key: str, subgraph: int, graph: Any, inputs: Sequence[str], outputs: Sequence[str]
) -> Any:
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = key.encode(), subgraph

    def maps(names: Sequence[str], tensors: Sequence[int]) -> list[Any]:
        entries = []
        for name, number in zip(names, tensors, strict=True):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), int(number)
            entries.append(entry)
        return entries

    signature.inputs = maps(inputs, graph.inputs)
    signature.outputs = maps(outputs, graph.outputs)
    return signature


def check_merged(
    merged: bytes,
    files: Mapping[str, bytes],
    batches: Mapping[str, Iterable[Sequence[np.ndarray]]],
) -> dict[str, int]:
    """Run each signature beside its own file: how many samples of each were compared.

    ``batches`` are real inputs in each file's layout and order, of any float or integer dtype. Raises
    ArtifactError (``merged-differs``) unless every output is the same bit for bit.
    """
    compared = {}
    for key, content in files.items():
        alone, together = open_graph(content), open_graph(merged, signature=key)
        names = _door_names(content, key)[1]
        count = 0
        for batch in batches[key]:
            given = [stored(a, d) for a, d in zip(batch, alone.inputs, strict=True)]
            for name, expected, found in zip(
                names, alone.run(given), together.run(given), strict=True
            ):
                if expected.tobytes() != found.tobytes():
                    raise ArtifactError(
                        f"signature {key!r} of the merged file differs from its own file in output {name!r}",
                        hint="ship the files as they are, one for each bucket, and report it with the models",
                        code="merged-differs",
                    )
            count += 1
        compared[key] = count
    return compared
