"""Looking into .tflite files: known models by their published figures, damaged ones by our error."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgepipe import cli
from edgepipe.errors import ArtifactError
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import describe, describe_model, tensor_specs
from edgepipe.tflite_ops.tiny import tiny_tflite

TINY = tiny_tflite(size=4, layers=2)


@pytest.fixture
def tiny_path(tmp_path):
    path = tmp_path / "tiny.tflite"
    path.write_bytes(TINY)
    return path


def test_a_small_model_is_described_exactly(tiny_path):
    description = describe(tiny_path)
    assert dict(description.operators) == {"FULLY_CONNECTED": 2}
    assert description.macs == 2 * 4 * 4
    # one 4x4 matrix and one bias of 4, float32, each shared by both layers
    assert description.weight_bytes == 4 * (16 + 4)
    assert description.activation_bytes == 3 * 4 * 4
    assert description.float_operators == 2
    assert not description.is_full_integer


# multiply-accumulates by hand: output values times products for each, layer by layer
KWS_MACS = 25 * 5 * 64 * 10 * 4 + 4 * (25 * 5 * 64 * 9 + 25 * 5 * 64 * 64) + 64 * 12
RESNET_MACS = (
    32 * 32 * 16 * (27 + 2 * 9 * 16)
    + 16 * 16 * 32 * (9 * 16 + 9 * 32 + 16)
    + 8 * 8 * 64 * (9 * 32 + 9 * 64 + 32)
    + 64 * 10
)


@pytest.mark.parametrize(
    ("name", "macs", "integer"),
    [
        ("kws_ref_model.tflite", KWS_MACS, True),
        ("pretrainedResnet.tflite", RESNET_MACS, False),
        ("pretrainedResnet_quant.tflite", RESNET_MACS, True),
        ("vww_96_int8.tflite", None, True),
    ],
)
def test_the_mlperf_tiny_models_have_their_known_costs(data_dir, name, macs, integer):
    description = describe(data_dir / "mlperf-tiny" / name)
    assert macs in (None, description.macs)
    assert description.is_full_integer is integer
    assert description.transposes == 0


def test_our_reading_agrees_with_the_interpreters(data_dir):
    from ai_edge_litert.interpreter import Interpreter

    path = data_dir / "mlperf-tiny" / "vww_96_int8.tflite"
    graph = describe(path).model.subgraphs[0]
    details = {d["index"]: d for d in Interpreter(model_path=str(path)).get_tensor_details()}
    for tensor in graph.tensors:
        theirs = details[tensor.index]
        assert tensor.name == theirs["name"]
        assert tensor.shape == tuple(theirs["shape"])
        assert np.dtype(tensor.dtype) == theirs["dtype"]
        quantization = theirs["quantization_parameters"]
        np.testing.assert_array_equal(np.float32(tensor.scales), quantization["scales"])
        np.testing.assert_array_equal(tensor.zero_points, quantization["zero_points"])


def test_tensor_specs_carry_scale_zero_point_and_the_tflite_layout(data_dir):
    (image,), (scores,) = tensor_specs(data_dir / "mlperf-tiny" / "pretrainedResnet_quant.tflite")
    assert (image.layout, image.dtype, image.scale, image.zero_point) == ("NHWC", "int8", 1.0, -128)
    assert image.source_layout == "NHWC"
    assert (scores.layout, scores.scale, scores.zero_point) == ("NC", 1 / 256, -128)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x02}q\x00." + bytes(10), "Python pickle"),
        (b"\x08\x08\x12\x07pytorch" + bytes(50), "ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "error page"),
        (b"hello world", "begins with 68 65 6c"),
    ],
)
def test_a_file_of_another_format_is_named_for_what_it_is(tmp_path, content, said):
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=said) as caught:
        describe(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        describe(tmp_path / "none.tflite")


@given(st.integers(8, len(TINY) - 1))
@settings(deadline=None)
def test_a_truncated_model_is_damaged_or_still_readable_but_never_a_crash(length):
    with contextlib.suppress(ArtifactError):
        describe_model(parse_model(TINY[:length], where="m.tflite"))


def test_every_truncation_in_the_first_half_is_said_to_be_damage():
    for length in range(8, len(TINY) // 2):
        with pytest.raises(ArtifactError, match=r"m\.tflite is a damaged or truncated") as caught:
            parse_model(TINY[:length], where="m.tflite")
        assert caught.value.code == "damaged-model"


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
)
@example([(4, 0)], False)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bytes_raise_only_our_error(flips, near_the_start):
    content = bytearray(TINY)
    for position, value in flips:
        content[position % (64 if near_the_start else len(content))] = value
    try:
        describe_model(parse_model(bytes(content), where="m.tflite"))
    except ArtifactError:
        return


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8))
@settings(
    max_examples=150, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_flipped_bytes_of_a_real_model_raise_only_our_error(data_dir, flips):
    content = bytearray((data_dir / "mlperf-tiny" / "kws_ref_model.tflite").read_bytes())
    tail = 24_000  # weights come first in this file: damage its structure
    for position, value in flips:
        content[len(content) - 1 - position % tail] = value
    try:
        describe_model(parse_model(bytes(content), where="m.tflite"))
    except ArtifactError:
        return


def test_half_a_real_model_is_said_to_be_damaged(data_dir, tmp_path, capsys):
    path = tmp_path / "half.tflite"
    content = (data_dir / "mlperf-tiny" / "vww_96_int8.tflite").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert cli.main(["inspect", str(path)]) == 2
    assert "damaged or truncated" in capsys.readouterr().err


def test_inspect_prints_what_people_look_for(tiny_path, capsys):
    assert cli.main(["inspect", str(tiny_path)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == f"{tiny_path}: {len(TINY)} B ({len(TINY)} bytes)"
    assert lines[1:] == [
        "  made by      edgepipe tiny",
        "  input        x  [1, 4] float32",
        "  output       y  [1, 4] float32",
        "  MACs         32 (FULLY_CONNECTED 100 %)",
        "  weights      80 B",
        "  activations  48 B in all (the arena shares their space)",
        "  operators    2: 2 FULLY_CONNECTED",
        "  dtypes       7 float32",
        "  transposes   0",
        "  integer      none: a float model",
    ]


def test_inspect_lists_every_tensor_on_request(tiny_path, capsys):
    assert cli.main(["inspect", str(tiny_path), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "1  float32  4x4    64     constant  weight0" in text
    assert "h0" in text


def test_inspect_gives_json_for_machines(tiny_path, capsys):
    assert cli.main(["inspect", str(tiny_path), "--json", "--tensors"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["macs"] == 32
    assert data["full_integer"] is False
    assert [o["macs"] for o in data["subgraphs"][0]["operators"]] == [16, 16]
    assert len(data["subgraphs"][0]["tensors"]) == 7


def test_inspect_shows_scales_of_an_integer_model(data_dir, capsys):
    path = data_dir / "mlperf-tiny" / "kws_ref_model.tflite"
    assert cli.main(["inspect", str(path), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "input_1  [1, 49, 10, 1] int8  scale 0.584703, zero point 83" in text
    assert "64 scales" in text
    assert "integer      every operator" in text
