"""Models whose inputs are no images: token indices beside numbers, several outputs; through int8."""

import numpy as np

from edgepipe.artifact import make_artifact
from edgepipe.data import DataSource
from edgepipe.predict import predict
from edgepipe.stage import StageContext
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.tflite_ops.candidates import host_latencies_s
from edgepipe.tflite_ops.inspect import describe, tensor_specs
from edgepipe.tflite_ops.ladder import host_latencies
from tests.unit.tflite_builder import Graph

WORDS, WIDTH, LENGTH = 30, 8, 6


def token_model(tmp_path):
    """``scores`` and ``tags`` of tokens (1, 6) int32, through an embedding, and numbers (1, 4)."""
    rng = np.random.default_rng(0)

    def weights(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    g = Graph()
    tokens = g.input("tokens", (1, LENGTH))
    g.tensors[tokens].type = 2  # int32
    numbers = g.input("numbers", (1, 4))
    table = g.const("table", weights(WORDS, WIDTH))
    found = g.op("GATHER", [table, tokens], "found", (1, LENGTH, WIDTH), "GatherOptions", axis=0)
    tags = g.dense(found, weights(3, WIDTH), np.zeros(3, np.float32), "tags", (1, LENGTH, 3), keepNumDims=True)  # fmt: skip
    axes = g.const("axes", np.array([1], np.int32))
    mean = g.op("MEAN", [found, axes], "mean", (1, WIDTH), "ReducerOptions", keepDims=False)
    both = g.op("CONCATENATION", [mean, numbers], "both", (1, WIDTH + 4), "ConcatenationOptions", axis=1)  # fmt: skip
    scores = g.dense(both, weights(5, WIDTH + 4), np.zeros(5, np.float32), "scores", (1, 5))
    path = tmp_path / "float.tflite"
    path.write_bytes(g.bytes([scores, tags]))
    inputs, outputs = tensor_specs(path)
    return make_artifact("tflite", path, inputs=inputs, outputs=outputs)


def test_indices_stay_integers_and_both_outputs_keep_close_to_float(tmp_path):
    model = token_model(tmp_path)
    rng = np.random.default_rng(1)
    samples = {
        "tokens": rng.integers(0, WORDS, (60, LENGTH)).astype(np.int32),
        "numbers": rng.normal(size=(60, 4)).astype(np.float32),
    }
    np.savez(tmp_path / "x.npz", **samples)
    (tmp_path / "work").mkdir()
    context = StageContext(
        work_dir=tmp_path / "work", seed=0, log_path=tmp_path / "log",
        data={"calibration": DataSource(kind="npz", path=tmp_path / "x.npz")},
    )  # fmt: skip
    int8 = QuantizeInt8().run(model, context)
    assert describe(int8.path).is_full_integer
    assert {s.name: s.dtype for s in int8.inputs} == {"tokens": "int32", "numbers": "int8"}
    assert [s.name for s in int8.outputs] == ["scores", "tags"]
    expected, got = predict(model, samples), predict(int8, samples)
    for spec in int8.outputs:
        error = np.abs(got[spec.name] - expected[spec.name]).max()
        assert error < 4 * spec.scale  # the sum of a few roundings, of the door's own step


def test_timing_a_file_does_not_look_up_indices_that_are_not_there(tmp_path):
    """An input that nobody wrote to holds what was in memory: no index of an embedding."""
    path = token_model(tmp_path).path
    assert all(seconds > 0 for seconds in host_latencies_s([path, path]))
    assert all(seconds > 0 for seconds in host_latencies([path.read_bytes()]))
