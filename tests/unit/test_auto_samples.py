"""``samples = "auto"``: as many calibration samples as activation ranges need to settle."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepipe import cli
from edgepipe.artifact import Artifact, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import StageOptionError
from edgepipe.stage import StageContext
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.tflite_ops.calibrate import FIRST_LOOK, find_ranges, looks
from edgepipe.tflite_ops.inspect import tensor_specs
from edgepipe.tflite_ops.quantize import MAX_ROWS, collect_ranges
from edgepipe.tflite_ops.tiny import tiny_tflite

from .tflite_builder import Graph

COUNT = 3000
# no sample is wider than any other, in practice
EVEN = np.random.default_rng(0).uniform(-1, 1, (COUNT, 4)).astype(np.float32)
# a few are much wider than the rest, and a few of those than these: Pareto's law with an exponent of 1
# doubles the widest with the number of samples
RARE = (EVEN * (1 + np.random.default_rng(1).pareto(1.0, (COUNT, 1)))).astype(np.float32)

Quantise = Callable[..., Artifact]


@pytest.fixture
def quantise(tmp_path: Path) -> Quantise:
    path = tmp_path / "float.tflite"
    path.write_bytes(tiny_tflite(layers=3))
    inputs, outputs = tensor_specs(path)
    model = make_artifact("tflite", path, inputs=inputs, outputs=outputs)

    def run(data: np.ndarray, *, seed: int = 0, **options: object) -> Artifact:
        np.save(tmp_path / "x.npy", data)
        source = DataSource(kind="npy", path=tmp_path / "x.npy", seed=seed)
        context = StageContext(tmp_path, {"calibration": source}, 0, tmp_path / "log")
        stage = dataclasses.replace(QuantizeInt8(), min_sqnr=-100.0, **options)
        return stage.run(model, context)

    return run


def test_rare_wide_samples_make_it_take_more(
    quantise: Quantise, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    even = quantise(EVEN).facts["calibration"]
    assert (even["samples"], even["available"], even["is_auto"]) == (FIRST_LOOK, COUNT, True)
    assert even["origin"] == f"npy x.npy: {FIRST_LOOK} of {COUNT} samples"
    assert f"samples = auto took {FIRST_LOOK} of {COUNT}: ranges have settled" in caplog.text
    rare = quantise(RARE).facts["calibration"]
    assert rare["samples"] >= 2 * FIRST_LOOK
    assert rare["settling"]["is_settled"] or rare["samples"] == COUNT


def test_ranges_that_never_settle_take_all_samples_and_say_so(quantise: Quantise) -> None:
    growing = np.sign(EVEN) * np.exp(np.random.default_rng(2).normal(0, 8, (COUNT, 1)))
    found = quantise(growing.astype(np.float32)).facts["calibration"]
    assert found["samples"] == COUNT
    assert "have not settled after 3000 samples" in found["warnings"][-1]


def test_the_choice_is_that_of_the_seed_and_the_ranges_those_of_the_chosen(quantise: Quantise) -> None:  # fmt: skip
    first, again, other = quantise(RARE), quantise(RARE), quantise(EVEN, seed=1)
    assert first.facts["calibration_samples"] == again.facts["calibration_samples"]
    assert first.sha256 == again.sha256
    assert other.facts["calibration_samples"] != quantise(EVEN).facts["calibration_samples"]
    statistics = first.facts["calibration"]["inputs"][0]
    (x,) = first.inputs
    assert x.scale is not None
    # the range of int8 is that of the input over the chosen samples, in 255 steps
    np.testing.assert_allclose(255 * x.scale, statistics["maximum"] - statistics["minimum"], rtol=1e-5)  # fmt: skip


def test_a_number_is_a_cap_and_nought_is_all(quantise: Quantise) -> None:
    assert quantise(EVEN, samples=40).facts["calibration"]["samples"] == 40
    assert quantise(EVEN, samples=0).facts["calibration"]["samples"] == COUNT
    with pytest.raises(StageOptionError, match="samples = -1"):
        QuantizeInt8(samples=-1)


@pytest.mark.parametrize("split", [1, 300, MAX_ROWS, MAX_ROWS + 7, 1000])
def test_ranges_in_two_rounds_are_those_of_one(split: int) -> None:
    content = tiny_tflite()
    batches = [[row[None]] for row in RARE[:1200]]
    whole = collect_ranges(content, batches, where="m")
    part = collect_ranges(content, batches[:split], where="m")
    both = collect_ranges(content, batches[split:], where="m", so_far=part)
    assert both.batches == whole.batches == 1200
    np.testing.assert_array_equal(both.minima, whole.minima)
    np.testing.assert_array_equal(both.maxima, whole.maxima)
    np.testing.assert_array_equal(both.moving, whole.moving)


def test_known_ranges_spare_the_first_pass() -> None:
    content = tiny_tflite()
    batches = [[row[None]] for row in EVEN[:50]]
    ranges = collect_ranges(content, batches, where="m")
    passes = []

    def counted() -> list[list[np.ndarray]]:
        passes.append(1)
        return batches

    expected, _ = find_ranges(content, lambda: batches, method="mse", where="m")
    found, _ = find_ranges(content, counted, method="mse", where="m", ranges=ranges)
    assert found == expected
    assert len(passes) == 1


def test_it_looks_at_doubling_numbers_of_samples() -> None:
    assert looks(1000, "auto") == (256, 512, 1000)
    assert looks(256, "auto") == (256,)
    assert looks(7, "auto") == looks(7, 7) == (7,)


def test_the_command_line_takes_auto_or_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.tflite").write_bytes(tiny_tflite())
    np.savez("x.npz", x=EVEN)
    assert cli.main(["quantize", "m.tflite", "--data", "x.npz", "--samples", "few"]) == 2
    assert "'few' is neither auto nor a number" in capsys.readouterr().err
    assert cli.main(["quantize", "m.tflite", "--data", "x.npz", "--samples", "100"]) == 0
    assert "calibrating on 100 samples" in capsys.readouterr().err


def test_the_curve_counts_samples_where_an_inference_takes_several(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", (4, 2))
    (tmp_path / "m.tflite").write_bytes(graph.bytes([graph.op("RELU", [x], "y", (4, 2))]))
    np.save(tmp_path / "x.npy", EVEN[:100, :2])
    inputs, outputs = tensor_specs(tmp_path / "m.tflite")
    model = make_artifact("tflite", tmp_path / "m.tflite", inputs=inputs, outputs=outputs)
    source = DataSource(kind="npy", path=tmp_path / "x.npy")
    context = StageContext(tmp_path, {"calibration": source}, 0, tmp_path / "log")
    settling = QuantizeInt8().run(model, context).facts["calibration"]["settling"]
    assert [count for count, _ in settling["curve"]] == [12, 24, 48, 100]
