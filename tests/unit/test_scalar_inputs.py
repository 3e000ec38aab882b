"""Inputs and outputs of rank 0: a sample is one number, N samples are (N,), an inference takes ()."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edgepipe.array_ops.calibration import file_batches
from edgepipe.array_ops.load import Samples
from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.predict import predict
from edgepipe.stage import StageContext
from edgepipe.stages.load import LoadModel, ModelSource, TensorOption
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.tflite_ops.inspect import describe, tensor_specs
from edgepipe.tflite_ops.raw import encode_samples, real_outputs, stored_outputs

from .tflite_builder import Graph


def scaled(folder: Path, *, dtype: str = "FLOAT32", batch: int = 1) -> Artifact:
    """y = x * s + s for x (batch, 4) and a scalar s."""
    graph = Graph()
    x, s = graph.input("x", (batch, 4)), graph.input("s", ())
    product = graph.op("MUL", [x, s], "product", (batch, 4), "MulOptions")
    y = graph.op("ADD", [product, s], "y", (batch, 4), "AddOptions")
    for tensor in graph.tensors:
        tensor.type = getattr(schema.TensorType, dtype)
    path = folder / f"{dtype}{batch}.tflite"
    path.write_bytes(graph.bytes([y]))
    inputs, outputs = tensor_specs(path)
    return make_artifact("tflite", path, inputs=inputs, outputs=outputs)


def samples(dtype: type = np.float32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "x": (generator.normal(size=(64, 4)) * 9).astype(dtype),
        "s": generator.uniform(1, 5, 64).astype(dtype),
    }


def by_hand(inputs: dict[str, np.ndarray]) -> np.ndarray:
    return inputs["x"] * inputs["s"][:, None] + inputs["s"][:, None]


def test_int8_takes_a_scalar_as_one_number_of_its_own_scale(tmp_path: Path) -> None:
    inputs = samples()
    np.savez(tmp_path / "x.npz", **inputs)
    data = {"calibration": DataSource(kind="npz", path=tmp_path / "x.npz")}
    made = QuantizeInt8().run(scaled(tmp_path), StageContext(tmp_path, data, 0, tmp_path / "log"))
    assert describe(made.path).is_full_integer
    _, s = made.inputs
    assert (s.name, s.shape, s.dtype) == ("s", (), "int8")
    assert s.scale == pytest.approx(5 / 255, rel=0.05)  # zero is always in a range
    expected = by_hand(inputs)
    # half a step of x at s = 5, of s at x = 27, of the product and of y, each range / 255
    steps = [np.ptp(inputs["x"]) * 5, 5 * np.abs(inputs["x"]).max(), *[np.ptp(expected)] * 2]
    assert np.abs(predict(made, inputs)["y"] - expected).max() < sum(steps) / 255 / 2


@pytest.mark.parametrize(("dtype", "numbers"), [("FLOAT32", np.float32), ("INT32", np.int32)])
def test_a_board_gets_one_number_for_each_inference(tmp_path: Path, dtype: str, numbers: type) -> None:  # fmt: skip
    model, inputs = scaled(tmp_path, dtype=dtype), samples(numbers)
    raw = encode_samples(model.path, inputs, model.inputs)
    assert (raw.count, raw.batch, len(raw.data)) == (64, 1, 64 * (4 + 1) * 4)
    found = real_outputs(model.path, stored_outputs(model.path, raw), model.outputs)
    np.testing.assert_allclose(found["y"], by_hand(inputs), rtol=1e-6)


def test_a_file_of_several_samples_and_one_scalar_is_refused(tmp_path: Path) -> None:
    model = scaled(tmp_path, batch=2)
    with pytest.raises(DataError, match="a scalar"):
        encode_samples(model.path, samples(), model.inputs)
    with pytest.raises(DataError, match="input 's' is a scalar"):
        list(file_batches(Samples(samples(), None, (), "noise"), model.inputs))


NET = """
import torch
class Net(torch.nn.Module):
    def forward(self, x, s):
        assert s.shape == ()
        y = x * s + s
        return y, y.sum()
"""


@pytest.mark.slow
def test_a_torch_model_takes_and_gives_scalars_one_sample_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    source = ModelSource(
        builder="net.py:Net", root=tmp_path, outputs=("y", "sum"),
        inputs=(TensorOption(name="x", shape=(1, 4)), TensorOption(name="s", shape=())),
    )  # fmt: skip
    made = LoadModel(source).run(StageContext(tmp_path, {}, 0, tmp_path / "log"))
    assert made.outputs[1] == TensorSpec("sum", ())
    inputs = samples()
    found = predict(made, inputs)
    np.testing.assert_allclose(found["y"], by_hand(inputs), rtol=1e-5)
    np.testing.assert_allclose(found["sum"], by_hand(inputs).sum(1), rtol=1e-4)
