"""A virtual Raspberry Pi 4: instructions repeat and decide, outputs are this host's, nothing is timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifact import Artifact
from edgepipe.bench import MeasureOptions, measure
from edgepipe.commands.compare import judge, render
from edgepipe.commands.on_device import tflite_model
from edgepipe.device import Device, open_device
from edgepipe.gate import InstructionsGate
from edgepipe.measurement import Measurement
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths
from edgepipe.tflite_ops.run import open_tflite
from edgepipe.tflite_ops.tiny import conv_tflite

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def board(virtual_pi4: str) -> Iterator[Device]:
    device = open_device(virtual_pi4)
    yield device
    device.close()


def measured(board: Device, model: Path, samples: Any = None, baseline: Path | None = None, **options: Any) -> dict[str, Measurement]:  # fmt: skip
    result = measure(
        tflite_model(model), board, find_profile("virt-pi-4", profile_paths()), MeasureOptions(**options), samples=samples,
        baseline=tflite_model(baseline) if baseline else None,
    )  # fmt: skip
    return {m.metric: m for m in result.measurements}


@pytest.fixture(scope="module")
def slower(board: Device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measurement]:
    """A network of five layers beside one that begins with the same four."""
    folder = tmp_path_factory.mktemp("models")
    base, candidate = folder / "base.tflite", folder / "candidate.tflite"
    base.write_bytes(conv_tflite(layers=4, size=8, channels=16))
    candidate.write_bytes(conv_tflite(layers=4, extra_layers=1, size=8, channels=16))
    return measured(board, candidate, baseline=base, memory_sessions=1)


def test_a_count_repeats_within_20_parts_in_a_million(slower: dict[str, Measurement]) -> None:
    for metric in ("instructions", "instructions_baseline"):
        counts = [count for (count,) in slower[metric].samples]
        assert len(counts) == 3
        assert max(counts) / min(counts) - 1 <= 20e-6
    context = slower["instructions"].context
    assert (context["cpu_model"], context["counter"]) == ("Cortex-A72 r0p3", "perf_event_open")
    assert context["fixed_addresses"]
    # 64 places, 16 x 9 products each, 16 channels, and 8 a NEON instruction at best
    assert min(counts) > 4 * 64 * 16 * 9 * 16 / 8


def test_a_slower_model_fails_by_the_exact_percentage(slower: dict[str, Measurement]) -> None:
    now, before = (slower[m].samples[0][0] for m in ("instructions", "instructions_baseline"))
    sha256 = slower["instructions"].context["model_sha256"]
    candidate = Artifact("tflite", Path("candidate.tflite"), sha256, inputs=(), outputs=())
    verdicts = judge(slower, candidate, 0.03, device="virt-pi-4")
    (found,) = (v for v in verdicts if v.gate == InstructionsGate.name)
    assert found.status == "FAIL"
    assert now > before * 1.1  # a fifth of the work is new
    assert f"{100 * (now / before - 1):+.4f} % ({now - before:+,.0f})" in found.reason
    assert found.reason.endswith("(emulated)")
    assert "slowdown" not in {v.gate for v in verdicts}
    assert "FAIL: " in render(verdicts, slower)


def test_memory_is_measured_and_time_is_not(slower: dict[str, Measurement]) -> None:
    times = ("latency", "load", "first", "op_time", "energy", "sustained")
    assert [metric for metric in slower if metric.startswith(times)] == []
    assert all("qemu-system" in m.context["emulated"] for m in slower.values())
    anon, file = (slower[f"memory_{what}"].samples[0][0] for what in ("anon", "file"))
    size = slower["model_bytes"].samples[0][0]
    assert 2 * 8 * 8 * 16 <= anon < 4e6  # two activations at least
    assert size <= file <= size + 2 * 4096
    assert slower["memory_peak"].samples[0][0] >= anon


@pytest.mark.parametrize(
    ("name", "unequal"), [("kws_ref_model", 0.0), ("kws_ref_model_float32", None)]
)
def test_outputs_are_those_of_this_host(board: Device, data_dir: Path, name: str, unequal: float | None) -> None:  # fmt: skip
    model = data_dir / "mlperf-tiny" / f"{name}.tflite"
    (detail,) = open_tflite(model).get_input_details()
    mfcc = np.random.default_rng(0).normal(0, 30, (16, *detail["shape"][1:])).astype(np.float32)
    found = measured(board, model, {detail["name"]: mfcc}, memory_sessions=0, instructions=False)
    mismatch = found["device_mismatch"]
    assert mismatch.samples == ((0.0,),)
    assert mismatch.context["kernels_here"] == mismatch.context["kernels_there"] == "xnnpack"
    assert mismatch.context["max_ulps"] <= 64
    if unequal is not None:
        assert mismatch.context["unequal"] == unequal  # bit for bit
