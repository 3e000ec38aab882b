"""Several files of one network as one: every signature computes what its own file did, weights lie in it once."""

import json

import numpy as np
import pytest

from edgepipe import cli
from edgepipe.errors import ArtifactError, DataError
from edgepipe.tflite_ops import raw
from edgepipe.tflite_ops.flatbuffer import parse_model, with_main_graph
from edgepipe.tflite_ops.inspect import describe, tensor_specs
from edgepipe.tflite_ops.merge import RUNTIME_KEY, check_merged, merge_signatures
from edgepipe.tflite_ops.quantize import collect_ranges, quantize
from edgepipe.tflite_ops.run import is_delegated, open_tflite, run_tflite
from edgepipe.tflite_ops.tiny import stateful_tflite

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


def test_a_model_that_keeps_state_of_its_own_is_not_merged(buckets):
    files, _ = buckets
    with pytest.raises(ArtifactError, match="of length8 keeps a state of its own") as caught:
        merge_signatures({**files, "length8": stateful_tflite()})
    assert caught.value.code == "not-mergeable"


@pytest.fixture(scope="module")
def merged_path(buckets, tmp_path_factory):
    path = tmp_path_factory.mktemp("merged") / "merged.tflite"
    path.write_bytes(merge_signatures(buckets[0]))
    return path


def test_real_values_go_through_the_signature_that_is_asked_for(buckets, merged_path, tmp_path):
    files, batches = buckets
    for key in ("length4", "length8", "length16", ""):
        alone = tmp_path / f"{key}.tflite"
        alone.write_bytes(files[key or "length4"])  # the main graph is the first
        specs = tensor_specs(alone)
        assert tensor_specs(merged_path, signature=key) == specs
        given = [np.concatenate([b[0] for b in batches[key or "length4"]])]
        (expected,) = run_tflite(alone, given, *specs)
        (found,) = run_tflite(merged_path, given, *specs, signature=key)
        assert len(found) == 6
        np.testing.assert_array_equal(found, expected)


def test_what_a_board_is_given_and_answers_is_that_of_the_signature(buckets, merged_path, tmp_path):
    files, batches = buckets
    alone = tmp_path / "alone.tflite"
    alone.write_bytes(files["length8"])
    specs, _ = tensor_specs(alone)
    samples = {"x": np.concatenate([b[0] for b in batches["length8"]])}
    expected = raw.encode_samples(alone, samples, specs)
    found = raw.encode_samples(merged_path, samples, specs, signature="length8")
    assert found == expected
    here = raw.stored_outputs(merged_path, found, signature="length8")
    there = raw.stored_outputs(alone, expected)
    assert raw.mismatch(there, here).unequal == 0
    assert raw.output_bytes(merged_path, signature="length8") == raw.output_bytes(alone)
    answer = np.stack(list(there["second"])).tobytes()
    described = [{"name": "second", "dtype": "int8", "shape": [1, 8, 8, 64], "bytes": 8 * 8 * 64}]
    read = raw.read_outputs(merged_path, answer, described, 6, signature="length8")
    np.testing.assert_array_equal(read["second"], there["second"])
    with pytest.raises(DataError, match="4096 bytes on the device, int8 of 8192"):
        raw.read_outputs(merged_path, answer, described, 6, signature="length16")


def test_a_signature_that_is_not_there_is_refused_with_those_that_are(merged_path):
    specs = tensor_specs(merged_path)
    for ask in (
        lambda: describe(merged_path, signature="length5"),
        lambda: tensor_specs(merged_path, signature="length5"),
        lambda: run_tflite(merged_path, [], (), specs[1], signature="length5"),
        lambda: is_delegated(merged_path, signature="length5"),
    ):
        with pytest.raises(ArtifactError, match="no signature 'length5'; it has: 'length4', 'length8', 'length16'") as caught:  # fmt: skip
            ask()
        assert caught.value.code == "no-such-signature"


def test_costs_are_those_of_one_signature(buckets, merged_path, tmp_path):
    alone = tmp_path / "alone.tflite"
    for key, content in buckets[0].items():
        alone.write_bytes(content)
        of_file, of_signature = describe(alone), describe(merged_path, signature=key)
        assert of_signature.macs == of_file.macs > 0
        assert of_signature.operators == of_file.operators
        assert of_signature.weight_bytes == of_file.weight_bytes
    assert describe(merged_path).operators["CONV_2D"] == 6


def test_inspect_says_what_each_signature_costs(merged_path, capsys):
    def asked(*options):
        assert cli.main(["inspect", str(merged_path), *options]) == 0
        return capsys.readouterr().out

    text, found = asked(), json.loads(asked("--json"))
    one = describe(merged_path, signature="length16")
    assert [s["key"] for s in found["signatures"]] == ["length4", "length8", "length16"]
    assert found["signatures"][2]["macs"] == one.macs > found["signatures"][1]["macs"]
    block = text[text.index("signature    length16: x -> second") :].splitlines()
    assert block[1].strip() == f"MACs         {one.macs:,} (CONV_2D 100 %)"
    assert text.count("integer      every operator") == 3
    assert json.loads(asked("--signature", "length16", "--json"))["macs"] == one.macs
    assert cli.main(["inspect", str(merged_path), "--profile", "rpi4b_4gb"]) == 2
    assert "choose one with --signature: length4, length8, length16" in capsys.readouterr().err


def test_another_main_graph_changes_no_signature(buckets, merged_path):
    content = merged_path.read_bytes()
    moved = with_main_graph(content, "length16", where="merged")
    assert [s.subgraph for s in parse_model(moved, where="moved").signatures] == [2, 1, 0]
    assert open_tflite(moved).get_input_details()[0]["shape"].tolist() == [1, 16, 8, 1]
    assert check_merged(moved, *buckets) == dict.fromkeys(buckets[0], 6)
    assert with_main_graph(content, "length4", where="merged") == content


@pytest.mark.parametrize("delegates", [True, False])
def test_a_signature_is_run_by_the_kernels_that_are_asked_for(tmp_path, delegates):
    """XNNPACK sums floats in another order than the builtin kernels do."""
    generator = np.random.default_rng(0)
    files = {}
    for n in (8, 16):
        graph = Graph()
        x = graph.input("x", (1, n, 8, 16))
        y = graph.conv(x, np.random.default_rng(1).normal(0, 0.1, (16, 3, 3, 16)).astype(np.float32), np.zeros(16, np.float32), "y", (1, n, 8, 16))  # fmt: skip
        files[f"length{n}"] = graph.bytes([y])
    merged, alone = tmp_path / "merged.tflite", tmp_path / "alone.tflite"
    merged.write_bytes(merge_signatures(files))
    alone.write_bytes(files["length16"])
    assert is_delegated(merged, signature="length16")
    samples = {"x": generator.normal(0, 1, (4, 16, 8, 16)).astype(np.float32)}
    given = raw.encode_samples(merged, samples, (), signature="length16")
    found = raw.stored_outputs(merged, given, signature="length16", delegates=delegates)["y"]
    same, other = (raw.stored_outputs(alone, given, delegates=d)["y"] for d in (delegates, not delegates))  # fmt: skip
    np.testing.assert_array_equal(found, same)
    assert not np.array_equal(found, other)
