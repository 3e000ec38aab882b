"""Several files of one network as one: every signature computes what its own file did, weights lie in it once."""

import numpy as np
import pytest

from edgepipe.errors import ArtifactError
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.merge import RUNTIME_KEY, check_merged, merge_signatures
from edgepipe.tflite_ops.quantize import collect_ranges, quantize
from edgepipe.tflite_ops.run import open_tflite

from .tflite_builder import Graph


def bucket(length, *, seed=0):
    """An int8 file of two convolutions for ``length`` rows, with ranges of its own, and inputs."""
    generator = np.random.default_rng(seed)
    graph = Graph()
    x = graph.input("x", (1, length, 8, 1))
    first, second = (generator.normal(0, 0.3, s).astype(np.float32) for s in ((32, 3, 3, 1), (64, 3, 3, 32)))  # fmt: skip
    y = graph.conv(x, first, np.zeros(32, np.float32), "first", (1, length, 8, 32))
    y = graph.conv(y, second, np.ones(64, np.float32), "second", (1, length, 8, 64))
    content = graph.bytes([y])
    batches = [[a[None]] for a in generator.normal(0, length, (6, length, 8, 1)).astype(np.float32)]
    return quantize(content, collect_ranges(content, batches, where="f").table()), batches


@pytest.fixture(scope="module")
def buckets():
    made = {f"length{n}": bucket(n) for n in (4, 8, 16)}
    return {k: v[0] for k, v in made.items()}, {k: v[1] for k, v in made.items()}


def test_each_signature_gives_the_bits_of_its_own_file(buckets):
    files, batches = buckets
    merged = merge_signatures(files)
    assert check_merged(merged, files, batches) == dict.fromkeys(files, 6)
    model = parse_model(merged, where="merged")
    assert [(s.key, s.subgraph) for s in model.signatures] == [(k, i) for i, k in enumerate(files)]
    # and by hand, not through the code under test
    interpreter, alone = open_tflite(merged), open_tflite(files["length8"])
    given = np.random.default_rng(1).integers(-128, 128, (1, 8, 8, 1), np.int8)
    alone.set_tensor(alone.get_input_details()[0]["index"], given)
    alone.invoke()
    (found,) = interpreter.get_signature_runner("length8")(x=given).values()
    np.testing.assert_array_equal(found, alone.get_tensor(alone.get_output_details()[0]["index"]))


def test_weights_of_equal_bytes_lie_in_the_file_once(buckets):
    files, _ = buckets
    merged = merge_signatures(files)
    graphs = parse_model(merged, where="merged").subgraphs
    weights = [{t.name: t.buffer for t in g.tensors if t.dtype == "int8" and t.is_constant} for g in graphs]  # fmt: skip
    assert len(weights[0]) == 2
    assert weights[0] == weights[1] == weights[2]
    kernel = 64 * 3 * 3 * 32
    assert len(merged) < len(files["length4"]) + kernel / 2 < sum(map(len, files.values()))


def test_a_file_that_computes_otherwise_is_not_taken_for_its_own(buckets):
    files, batches = buckets
    other, _ = bucket(8, seed=1)
    merged = merge_signatures({**files, "length8": other})
    with pytest.raises(ArtifactError, match=r"signature 'length8' .* differs") as caught:
        check_merged(merged, files, batches)
    assert caught.value.code == "merged-differs"


def test_the_newest_runtime_that_any_file_needs_is_kept(buckets):
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    files = {}
    for version, (key, content) in zip((b"2.9.0", b"2.17.0", b"1.5.0"), buckets[0].items(), strict=True):  # fmt: skip
        model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
        entry, buffer = schema.MetadataT(), schema.BufferT()
        buffer.data = np.frombuffer(version.ljust(16, b"\0"), np.uint8)
        model.buffers.append(buffer)
        entry.name, entry.buffer = RUNTIME_KEY, len(model.buffers) - 1
        model.metadata = [entry]
        files[key] = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    merged = flatbuffer_utils.read_model_from_bytearray(bytearray(merge_signatures(files)))
    (entry,) = merged.metadata
    assert bytes(merged.buffers[entry.buffer].data) == b"2.17.0".ljust(16, b"\0")
