"""Every family of the zoo goes through the real converter and comes out as a full int8 file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edgepipe import pipeline
from edgepipe.adhoc import recipe_for
from edgepipe.commands.students import file_bytes
from edgepipe.data import DataSource
from edgepipe.stages.load import ModelSource, TensorOption
from edgepipe.store import Store
from edgepipe.students import FOLDER, STUDENTS, student_args
from edgepipe.tflite_ops.inspect import describe
from edgepipe.torch_ops.model import ModelDescription
from edgepipe.torch_ops.result import describe_builder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mobilenet_v3_small", (1, 1, 28, 28)),
        ("tiny_vit", (1, 1, 49, 10)),
        ("resnet8", (1, 1, 28, 28)),
        ("ds_cnn", (1, 6, 64)),  # mobilenet_v1 and _v2 have no other operators than these two
    ],
)
def test_a_student_becomes_a_full_int8_file_of_the_size_that_was_foretold(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    args = student_args(name, shape, 10, {"width": 0.25})
    source = ModelSource(
        builder=STUDENTS[name].builder, args=args, root=FOLDER,
        inputs=(TensorOption(name="x", shape=shape),),
    )  # fmt: skip
    samples = np.random.default_rng(0).normal(size=(8, *shape[1:])).astype(np.float32)
    np.save(tmp_path / "x.npy", samples)
    # not trained, so some have outputs that vary by less than an int8 step
    stages = [("export_onnx", {}), ("to_tflite", {}), ("quantize_int8", {"min_sqnr": "-200 dB"})]
    data = DataSource(kind="npy", path=tmp_path / "x.npy")
    made = pipeline.convert(recipe_for(source, stages, data), Store(tmp_path / "store"))
    found = describe(made.path)
    assert found.is_full_integer
    assert not found.doors
    # layout changes at the door of a series, and where attention tells its heads apart
    assert found.transposes <= (1 if len(shape) == 3 else 0) + (16 if name == "tiny_vit" else 0)
    layers, _ = describe_builder(ModelDescription(STUDENTS[name].builder, args, root=FOLDER), shape)
    assert math.isclose(file_bytes(layers), made.size_bytes, rel_tol=0.1)
