"""Are zeros worth anything on the device: XNNPACK's conditions, operator by operator, and the download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import cli
from edgepipe.errors import StageError
from edgepipe.tflite_ops import sparse
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.quantize import check_quantizable
from edgepipe.tflite_ops.run import invoke_once, open_tflite
from edgepipe.tflite_ops.sparse import check_sparsity, sparsity_lines, store_sparse
from edgepipe.tflite_ops.tiny import conv_tflite

from .tflite_builder import Graph


def sparse_cnn(
    *, zeros: float = 0.8, channels: int = 3, padded: bool = True, dw_stride: int = 2, dw_padded: bool = True,
    between: str = "", end: str = "MEAN", tap: bool = False, seed: int = 0,
) -> bytes:  # fmt: skip
    """3x3 stride 2 -> 1x1 -> depthwise -> 1x1 -> mean -> dense: what XNNPACK can run sparse.

    ``zeros`` is their share in the 1x1 convolutions; the other options each break one condition.
    """
    rng = np.random.default_rng(seed)
    g = Graph()

    def weights(*shape: int, share: float = 0.0) -> np.ndarray:
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        order = rng.permutation(values.size)[: round(share * values.size)]
        values.reshape(-1)[order] = 0
        return values

    def bias(count: int) -> np.ndarray:
        return rng.normal(0, 0.1, count).astype(np.float32)

    def pad(x: int, size: int, count: int) -> int:
        sides = g.const(f"sides{x}", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
        return g.op("PAD", [x, sides], f"pad{x}", (1, size + 2, size + 2, count), "PadOptions")

    def strided(code: str, x: int, w: np.ndarray, name: str, size: int, stride: int, is_valid: bool) -> int:  # fmt: skip
        options = "Conv2DOptions" if code == "CONV_2D" else "DepthwiseConv2DOptions"
        more = {} if code == "CONV_2D" else {"depthMultiplier": 1}
        inputs = [x, g.const(name + "/w", w), g.const(name + "/b", bias(8))]
        return g.op(
            code, inputs, name, (1, size, size, 8), options, strideW=stride, strideH=stride,
            padding=1 if is_valid else 0, **more,
        )  # fmt: skip

    x = g.input("x", (1, 16, 16, channels))
    first = pad(x, 16, channels) if padded else x
    y = strided("CONV_2D", first, weights(8, 3, 3, channels), "first", 8, 2, padded)
    y = p = g.conv(y, weights(12, 1, 1, 8, share=zeros), bias(12), "point1", (1, 8, 8, 12))
    if between == "tanh":
        y = g.op("TANH", [y], "tanh", (1, 8, 8, 12))
    if between == "hard_swish":
        y = g.op("HARD_SWISH", [y], "swish", (1, 8, 8, 12), "HardSwishOptions")
    if between == "residual":
        y = g.op("ADD", [y, p], "sum", (1, 8, 8, 12), "AddOptions")
    y = g.conv(y, weights(8, 1, 1, 12, share=zeros), bias(8), "point2", (1, 8, 8, 8))
    size = 8 // dw_stride
    before = pad(y, 8, 8) if dw_padded else y
    y = strided("DEPTHWISE_CONV_2D", before, weights(1, 3, 3, 8), "depthwise", size, dw_stride, dw_padded)  # fmt: skip
    outputs = []
    if tap:
        outputs.append(y)
    if end == "MEAN":
        axes = g.const("axes", np.array([1, 2], np.int32))
        y = g.op("MEAN", [y, axes], "mean", (1, 8), "ReducerOptions", keepDims=False)
    else:
        whole = {"filterHeight": size, "filterWidth": size, "strideH": 1, "strideW": 1, "padding": 1}  # fmt: skip
        y = g.op("AVERAGE_POOL_2D", [y], "pooled", (1, 1, 1, 8), "Pool2DOptions", **whole)
    y = g.dense(y, weights(4, 8), bias(4), "y", (1, 4))
    return g.bytes([*outputs, y])


def run(content: bytes, tmp_path: Path, x: np.ndarray) -> np.ndarray:
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    interpreter = open_tflite(path)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    invoke_once(interpreter, where="m")
    return interpreter.get_tensor(interpreter.get_output_details()[-1]["index"])


@pytest.mark.parametrize("options", [{}, {"between": "hard_swish"}, {"between": "residual"}, {"dw_stride": 1, "dw_padded": False}])  # fmt: skip
def test_a_graph_of_supported_operators_is_skipped_once_it_is_stored_sparse(options: dict[str, Any]) -> None:  # fmt: skip
    content = sparse_cnn(**options)
    dense = check_sparsity(content, where="m")
    assert not dense.is_faster
    assert [b.reason for b in dense.blockers] == [
        "weights are stored dense, not through DENSIFY, which is how XNNPACK is asked for it"
    ]
    stored = store_sparse(content, where="m")
    report = check_sparsity(stored, where="m")
    assert report.is_faster
    assert not report.blockers
    assert {x.output for x in report.layers if x.is_skipped} == {"point1", "point2"}
    zeros = {x.output: (x.zeros, x.values) for x in report.layers}
    assert zeros["point1"] == zeros["point2"] == (round(0.8 * 96), 96)
    # of 8 x 8 positions, each of the two layers skips 77 of 96 products
    assert report.skipped_macs == 2 * 64 * 77
    assert report.zeros == dense.zeros
    assert "XNNPACK skips" in sparsity_lines(report)[1]


@pytest.mark.parametrize(
    ("options", "operator", "told"),
    [
        ({"zeros": 0.6}, "MEAN", "60 % zeros; more than two thirds are needed"),
        ({"channels": 1}, "CONV_2D", "3x3 with stride 2x2 on 1 channels"),
        ({"padded": False}, "CONV_2D", "without 1 of padding written out"),
        ({"dw_padded": False}, "DEPTHWISE_CONV_2D", "without 1 of padding written out"),
        ({"between": "tanh"}, "TANH", "not among the operators of sparse inference"),
        ({"end": "pool"}, "MEAN", "no MEAN over height and width"),
        ({"tap": True}, "MEAN", "'depthwise', which is an output of the model too"),
    ],
)  # fmt: skip
def test_the_operator_that_breaks_sparse_inference_is_named(options: dict[str, Any], operator: str, told: str) -> None:  # fmt: skip
    content = sparse_cnn(**options)
    report = check_sparsity(content, where="m")
    assert not report.is_faster
    found = [b for b in report.blockers if told in b.reason]
    assert [b.name for b in found] == [operator], report.blockers
    if found[0].operator >= 0:
        graph = parse_model(content, where="m").subgraphs[0]
        assert graph.operators[found[0].operator].name == operator
    with pytest.raises(StageError, match="would skip no zeros of m") as caught:
        store_sparse(content, where="m")
    assert told in caught.value.message


def test_sixty_seven_per_cent_is_enough_and_two_thirds_are_not() -> None:
    # 96 weights each: 64 are two thirds to the last, 65 are more
    for zeros, enough in ((64 / 96, False), (65 / 96, True)):
        report = check_sparsity(sparse_cnn(zeros=zeros), where="m")
        assert (report.blockers[-1].name == "DENSIFY") is enough


@settings(max_examples=15, deadline=None)
@given(zeros=st.floats(0.68, 1.0), seed=st.integers(0, 9))
def test_a_file_stored_sparse_computes_what_it_did(tmp_path_factory: pytest.TempPathFactory, zeros: float, seed: int) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("m")
    content = sparse_cnn(zeros=zeros, seed=seed)
    x = np.random.default_rng(seed).normal(size=(1, 16, 16, 3)).astype(np.float32)
    before, after = run(content, folder, x), run(store_sparse(content, where="m"), folder, x)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)
    assert np.abs(before).max() > 0


def test_wide_layers_get_wider_indices_and_a_smaller_file(tmp_path: Path) -> None:
    g = Graph()
    rng = np.random.default_rng(0)
    x = g.input("x", (1, 4, 4, 3))
    sides = g.const("sides", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    y = g.op("PAD", [x, sides], "pad", (1, 6, 6, 3), "PadOptions")
    first = [y, g.const("w", rng.normal(size=(300, 3, 3, 3)).astype(np.float32)), g.const("b", np.zeros(300, np.float32))]  # fmt: skip
    y = g.op("CONV_2D", first, "first", (1, 2, 2, 300), "Conv2DOptions", strideW=2, strideH=2, padding=1)  # fmt: skip
    wide = rng.normal(size=(400, 1, 1, 300)).astype(np.float32)
    wide[rng.random(wide.shape) < 0.9] = 0
    y = g.conv(y, wide, np.zeros(400, np.float32), "point", (1, 2, 2, 400))
    axes = g.const("axes", np.array([1, 2], np.int32))
    y = g.op("MEAN", [y, axes], "mean", (1, 400), "ReducerOptions", keepDims=False)
    content = g.bytes([y])
    stored = store_sparse(content, where="m")
    assert len(stored) < 0.35 * len(content)
    sample = rng.normal(size=(1, 4, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(run(content, tmp_path, sample), run(stored, tmp_path, sample), rtol=1e-5, atol=1e-5)  # fmt: skip


def test_an_int8_model_is_told_the_truth() -> None:
    report = check_sparsity(conv_tflite(layers=2, size=8, channels=8), where="m")
    assert not report.is_float
    assert not report.is_faster
    text = "\n".join(sparsity_lines(report))
    assert "int8 kernels multiply by zero as by any number" in text
    assert "compressed gzip" in text
    assert report.compressed_bytes["gzip"] < report.size_bytes


def test_inspect_tells_what_the_zeros_are_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.tflite"
    path.write_bytes(sparse_cnn(between="tanh"))
    assert cli.main(["inspect", str(path), "--sparsity"]) == 0
    text = capsys.readouterr().out
    assert "operator 3, TANH, is not among the operators of sparse inference" in text
    assert cli.main(["inspect", str(path), "--sparsity", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sparsity"]
    assert found["is_faster"] is False
    assert [x["output"] for x in found["layers"]][:2] == ["first", "point1"]
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert "sparsity" not in json.loads(capsys.readouterr().out)


def test_published_models_answer_as_their_graphs_are(data_dir: Path) -> None:
    folder = data_dir / "mlperf-tiny"
    int8 = check_sparsity((folder / "vww_96_int8.tflite").read_bytes(), where="vww")
    assert int8.zeros > 0.8  # its published weights are mostly zero
    assert not int8.is_faster
    resnet = check_sparsity((folder / "pretrainedResnet.tflite").read_bytes(), where="resnet")
    assert resnet.is_float
    assert resnet.blockers[0].reason.startswith("no MEAN")


def test_a_file_that_is_stored_sparse_has_no_int8_form() -> None:
    stored = parse_model(store_sparse(sparse_cnn(), where="m"), where="m")
    with pytest.raises(StageError, match="m stores its weights sparse"):
        check_quantizable(stored, where="m")


def test_a_file_with_few_zeros_is_not_compressed_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compressed(content: bytes) -> None:
        raise AssertionError("compressed")

    monkeypatch.setattr(sparse, "_compressed", compressed)
    assert sparse.sparsity_facts(conv_tflite(layers=1), where="m") == {}
