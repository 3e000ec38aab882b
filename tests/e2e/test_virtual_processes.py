"""A virtual board without a kernel: programs compute as this host's do, and no figure is taken there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepipe.bench import MeasureOptions, measure
from edgepipe.commands.on_device import tflite_model
from edgepipe.device import open_device
from edgepipe.device.virtual import VirtualDevice
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths
from edgepipe.tflite_ops.run import open_tflite
from tests.conftest import virtual_board

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def board() -> Iterator[VirtualDevice]:
    device = open_device(virtual_board("virt-pi-user"))
    assert isinstance(device, VirtualDevice)
    yield device
    device.close()
    assert not device.running.folder.exists()


@pytest.mark.parametrize(
    ("name", "unequal"), [("kws_ref_model", 0.0), ("kws_ref_model_float32", None)]
)
def test_outputs_are_those_of_this_host_and_nothing_else_is_measured(
    board: VirtualDevice, data_dir: Path, name: str, unequal: float | None
) -> None:
    model = data_dir / "mlperf-tiny" / f"{name}.tflite"
    (detail,) = open_tflite(model).get_input_details()
    mfcc = np.random.default_rng(0).normal(0, 30, (16, *detail["shape"][1:])).astype(np.float32)
    result = measure(
        tflite_model(model), board, find_profile("virt-pi-user", profile_paths()),
        MeasureOptions(), samples={detail["name"]: mfcc},
    )  # fmt: skip
    found = {m.metric: m for m in result.measurements}
    assert set(found) == {"runs_on_device", "device_mismatch"}
    mismatch = found["device_mismatch"]
    assert mismatch.samples == ((0.0,),)
    assert mismatch.context["kernels_here"] == mismatch.context["kernels_there"] == "xnnpack"
    assert mismatch.context["max_ulps"] <= 64
    if unequal is not None:
        assert mismatch.context["unequal"] == unequal  # bit for bit
    assert mismatch.context["cpu_model"] == "Cortex-A72 r0p3"
    assert "qemu-user" in mismatch.context["emulated"]
