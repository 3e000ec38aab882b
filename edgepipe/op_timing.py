"""Time operators of every kind on a device, for its `op_table.OpTable`.

Each kind is a few small models of many like operators, of sizes spread over decades, each run for a
moment as `bench` runs any model. Whole inferences are timed, since a runtime's profiler counts whole
microseconds, many runtimes have none, and the time between two operators is paid for too.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepipe import bench, stats
from edgepipe.artifact import Artifact, make_artifact
from edgepipe.bench import MeasureOptions
from edgepipe.calibration import refuse_emulated
from edgepipe.device.base import Device
from edgepipe.errors import Busy, NotReadyError, RequestError
from edgepipe.op_table import Op, OpTable, Timing, fit_table, tflite_ops_of
from edgepipe.profile import DeviceProfile

log = logging.getLogger(__name__)

# A short session for each of many models: at least 30 inferences anyway.
SESSION = {"sessions": 1, "warmup": "50 ms", "session": "200 ms"}
BUSY_WAIT_S = 2.0
DTYPES = ("int8", "float32")
SyntheticModel = tuple[str, int, tuple[int, int], int]  # kind, size, channels, repeats
# Sizes and channels of nets from keyword spotters to MobileNets,
# among them some that fill no whole tile of a kernel.
MODELS: tuple[SyntheticModel, ...] = (
    ("conv", 32, (3, 16), 4), ("conv", 48, (8, 8), 4), ("conv", 16, (24, 20), 6), ("conv", 16, (32, 32), 4),
    ("conv", 8, (64, 64), 6), ("conv", 28, (33, 17), 2), ("conv", 24, (64, 64), 2),
    ("pointwise", 48, (8, 16), 8), ("pointwise", 24, (32, 32), 8), ("pointwise", 12, (64, 64), 8), ("pointwise", 6, (128, 128), 8),
    ("pointwise", 3, (256, 256), 8), ("pointwise", 14, (100, 36), 8), ("pointwise", 25, (64, 64), 4), ("pointwise", 24, (12, 20), 8),
    ("depthwise", 48, (8, 8), 8), ("depthwise", 48, (16, 16), 4), ("depthwise", 24, (32, 32), 8), ("depthwise", 12, (64, 64), 8),
    ("depthwise", 24, (20, 20), 8), ("depthwise", 6, (128, 128), 8), ("depthwise", 3, (256, 256), 8),
    ("dense", 1, (64, 10), 32), ("dense", 1, (64, 64), 32), ("dense", 1, (256, 256), 16), ("dense", 1, (100, 300), 16), ("dense", 1, (640, 128), 8),
    ("elementwise", 4, (16, 16), 32), ("elementwise", 16, (32, 32), 16), ("elementwise", 24, (20, 20), 16), ("elementwise", 32, (64, 64), 8),
    ("activation", 4, (16, 16), 32), ("activation", 16, (32, 32), 16), ("activation", 24, (20, 20), 16), ("activation", 32, (64, 64), 8),
    ("pool", 3, (256, 256), 16), ("pool", 8, (64, 64), 16), ("pool", 25, (64, 64), 8), ("pool", 24, (20, 20), 8),
    ("copy", 4, (16, 16), 16), ("copy", 16, (32, 32), 16), ("copy", 24, (20, 20), 8), ("copy", 32, (64, 64), 4),
)  # fmt: skip
# What an inference costs beside its operators shows between one and many small additions.
ONE, MANY = ("elementwise", 1, (8, 8), 1), ("elementwise", 1, (8, 8), 33)


def time_operators(
    device: Device,
    profile: DeviceProfile,
    options: MeasureOptions,
    *,
    models: Sequence[SyntheticModel] = MODELS,
    dtypes: Sequence[str] = DTYPES,
    now: datetime.datetime | None = None,
) -> OpTable:
    """Measure the operator table of a board: some 90 models, one short session each.

    ``options`` are those of a measurement; its sessions, warm-up and length apply to each model.
    Raises NotReadyError where too few models of a kind could be timed, and what `bench.measure` raises.
    """
    options = dataclasses.replace(options, memory_sessions=0, ops=False, energy=False, instructions=False, sustained=0.0)  # fmt: skip
    plan = [(model, dtype) for dtype in dtypes for model in models]
    timings = []
    context: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = Path(folder) / "operators.tflite"

        def seconds(model: SyntheticModel, dtype: str) -> float | None:
            nonlocal context
            found, context = _time_model(model, dtype, path, device, profile, options)
            return found

        one, many = seconds(ONE, "float32"), seconds(MANY, "float32")
        if one is None or many is None:
            raise NotReadyError(f"{device.address} runs no model of additions", hint="try `edgepipe bench MODEL`", code="model-does-not-run")  # fmt: skip
        if context.get("simulated"):
            raise RequestError(f"{device.address} simulates a board: its operators cost nothing real", hint="measure on a real one")  # fmt: skip
        invoke_s = max(0.0, one - (many - one) / (MANY[3] - ONE[3]))
        for number, (model, dtype) in enumerate(plan, 1):
            log.info("[%d/%d] %s %s, %d x %d x %s", number, len(plan), model[0], dtype, model[1], model[1], "-".join(map(str, model[2])))  # fmt: skip
            found = seconds(model, dtype)
            if found is not None:
                timings.append(Timing(_ops(path), found))
    return fit_table(
        timings,
        profile=profile.name,
        threads=int(context["threads"]),
        invoke_s=invoke_s,
        same={key: context.get(key) for key in SAME},
        now=now or datetime.datetime.now(datetime.UTC),
    )


# What a table is of: kept with it, and shown.
SAME = ("profile", "device_identity", "device_model", "cpu", "threads", "runtime", "runtime_version", "runtime_sha256", "backend", "governor")  # fmt: skip


def _ops(path: Path) -> tuple[Op, ...]:
    from edgepipe.tflite_ops.inspect import read_model

    return tuple(tflite_ops_of(read_model(path)))


def _measure(
    model: Artifact, device: Device, profile: DeviceProfile, options: MeasureOptions
) -> bench.BenchResult:
    """One measurement; where somebody else's came between two of ours, theirs is waited for."""
    deadline = time.monotonic() + options.budget
    while True:
        try:
            return bench.measure(model, device, profile, options)
        except Busy:
            if time.monotonic() > deadline:
                raise
            log.info("%s is busy: waiting", device.address)
            time.sleep(BUSY_WAIT_S)


def _time_model(
    model: SyntheticModel,
    dtype: str,
    path: Path,
    device: Device,
    profile: DeviceProfile,
    options: MeasureOptions,
) -> tuple[float | None, dict[str, Any]]:
    """Seconds of one inference (CPU time with one thread, which other work disturbs less), and the
    context of the measurement; None where it does not run or no session counts."""
    from edgepipe.tflite_ops.tiny import op_chain_tflite

    kind, size, channels, repeats = model
    path.write_bytes(op_chain_tflite(kind, dtype=dtype, size=size, channels=channels, repeats=repeats))  # fmt: skip
    artifact = make_artifact("tflite", path, inputs=(), outputs=())
    result = _measure(artifact, device, profile, options)
    measured = {m.metric: m for m in result.measurements}
    refuse_emulated(measured)
    found = measured.get("latency_cpu") or measured.get("latency_wall")
    if found is None or not found.valid_sessions:
        context = dict(next(iter(measured.values())).context)
        causes = ", ".join(sorted(set(found.excluded.values()))) if found else context.get("reason")
        log.warning("%s %s is left out: %s", kind, dtype, causes)
        return None, context
    return stats.sessions_percentile(found.valid_sessions, 0.5), dict(found.context)
