"""Quantisation-aware training as a stage of a recipe: its ranges reach the file that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepipe.artifact import load_artifact
from edgepipe.tflite_ops.flatbuffer import parse_model

from .conftest import EdgepipeRunner

STAGE = """[[stages]]
stage = "qat"
epochs = 2
lr = 0.001
validation = "test"
[[stages]]
stage = "quantize_int8\""""


@pytest.mark.slow
def test_the_ranges_that_were_trained_are_those_of_the_int8_file(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    recipe = project / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('[[stages]]\nstage = "quantize_int8"', STAGE))
    done = edgepipe("run", "recipe.toml", "--no-devices", "--json")
    found = json.loads(done.stdout)
    assert found["steps"][-2]["step"] == "quantize_int8", done.stderr
    cache = project / ".edgepipe" / "cache"
    before, after = (load_artifact(cache / step["key"]) for step in found["steps"][-3:-1])
    learned = before.facts["learned_ranges"]
    assert before.facts["agreement"]["within_one"] > 0.99
    assert after.facts["ranges"]["learned"] is True
    int8 = parse_model(after.path.read_bytes(), where="int8").subgraphs[0]
    checked = 0
    for tensor in int8.tensors:
        if tensor.name in learned and len(tensor.scales) == 1 and not tensor.is_constant:
            low, high = learned[tensor.name]
            assert tensor.scales[0] == pytest.approx((high - low) / 255, rel=1e-5), tensor.name
            checked += 1
    assert checked >= 5
    # and again: nothing is trained twice
    again = edgepipe("run", "recipe.toml", "--no-devices")
    assert "qat: unchanged, kept" in again.stderr
