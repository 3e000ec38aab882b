"""How noisy a board is: the same model measured against itself, and what that lets a gate tell.

The noise model of a board is kept in ``<store>/calibration/<profile>-<identity>-<threads>.json``.
Gates quote it; no verdict depends on it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe import bench, stats
from edgepipe.artifact import Artifact
from edgepipe.bench import MeasureOptions
from edgepipe.device.base import Device
from edgepipe.errors import NotReadyError, NotStable, RequestError
from edgepipe.measurement import Measurement
from edgepipe.profile import DeviceProfile
from edgepipe.schema import build, record
from edgepipe.store import write_json

log = logging.getLogger(__name__)

SCHEMA = 1
# A board older than that may have another heat sink, kernel or power supply.
MAX_AGE = datetime.timedelta(days=30)
# What must be the same for the noise of one measurement to be that of another.
SAME = ("profile", "device_identity", "threads", "runtime", "runtime_version", "runtime_sha256", "backend")  # fmt: skip


@record
class Noise:
    """What sessions of a model against itself say of a board.

    ``sd_cpu`` and ``sd_wall`` are the standard deviation over sessions of the log ratio (0.003 is
    0.3 %), ``bias_cpu`` and ``bias_wall`` their mean, which is 0 but for chance; None where there is
    no CPU time (more than one thread). ``same`` holds the context (`SAME`) it is the noise of.
    """

    measured: str
    sessions: int
    rounds: int
    sd_wall: float
    bias_wall: float
    sd_cpu: float | None
    bias_cpu: float | None
    latency_s: float
    contended: bool
    model_sha256: str
    same: Mapping[str, Any]


def calibrate(
    model: Artifact,
    device: Device,
    profile: DeviceProfile,
    options: MeasureOptions,
    *,
    now: datetime.datetime | None = None,
) -> tuple[Noise, dict[str, Measurement]]:
    """Measure ``model`` against itself, as many sessions as the last look has, and what they say.

    Returns the noise and the measurements. Raises NotStable where too few sessions count, and what
    `bench.measure` raises.
    """
    options = dataclasses.replace(
        options, sessions=max(stats.LOOKS), memory_sessions=0, ops=False, energy=False, instructions=False
    )  # fmt: skip
    try:
        result = bench.measure(model, device, profile, options, baseline=model)
    except NotReadyError as exc:
        if exc.code != "baseline-does-not-run":
            raise
        raise NotReadyError(
            f"{device.address} cannot be calibrated with {model.path}: {exc.message}",
            hint="choose another model: edgepipe calibrate MODEL",
            code="model-does-not-run",
        ) from exc
    measured = {m.metric: m for m in result.measurements}
    refuse_emulated(measured)
    return noise_of(measured, now=now or datetime.datetime.now(datetime.UTC)), measured


def refuse_emulated(measured: Mapping[str, Measurement]) -> None:
    """Raise RequestError where measurements are of an emulated board, on which nothing is timed."""
    context = next(iter(measured.values())).context
    if context.get("emulated"):
        raise RequestError(
            f"{context.get('device')} is emulated ({context['emulated']}): its wall time says nothing",
            hint='calibrate a real board; on an emulated one use gate = "instructions", which needs no calibration',
            code="emulated",
        )


def noise_of(measured: Mapping[str, Measurement], *, now: datetime.datetime) -> Noise:
    """The noise that ratios of a model to itself show. Pure. Raises NotStable for too few of them."""
    wall = measured["latency_ratio_wall"]
    walls = _log_ratios(wall)
    cpus = _log_ratios(measured["latency_ratio_cpu"]) if "latency_ratio_cpu" in measured else []
    for values in (walls, cpus or walls):
        if len(values) < min(stats.LOOKS) or not all(map(math.isfinite, values)):
            causes = ", ".join(sorted(set(wall.excluded.values()))) or "its clock is too coarse"
            raise NotStable(
                f"{len(values)} of {len(wall.samples)} sessions count on {wall.context.get('device')}: {causes}",
                hint="cool the board, stop other work on it, and calibrate again",
                code="too-few-sessions",
            )
    return Noise(
        measured=now.isoformat(timespec="seconds"),
        sessions=len(walls),
        rounds=min(len(s) for s in wall.valid_sessions),
        sd_wall=statistics.stdev(walls),
        bias_wall=statistics.fmean(walls),
        sd_cpu=statistics.stdev(cpus) if cpus else None,
        bias_cpu=statistics.fmean(cpus) if cpus else None,
        latency_s=stats.sessions_percentile(measured["latency_wall"].valid_sessions, 0.5),
        contended=bool(wall.context.get("contended")),
        model_sha256=str(wall.context["model_sha256"]),
        same={key: wall.context.get(key) for key in SAME},
    )


def _log_ratios(ratios: Measurement) -> list[float]:
    return [stats.session_log_ratio(s) for s in ratios.valid_sessions]


def detectable(deviation: float, tolerance: float) -> tuple[tuple[int, float], ...]:
    """(sessions, smallest slowdown that fails in 9 of 10 runs, as a share), for every look."""
    return tuple((k, stats.minimum_detectable_ratio(deviation, k, tolerance) - 1) for k in stats.LOOKS)  # fmt: skip


# ----------------------------------------------------------------------------------------- kept


def noise_path(root: Path, context: Mapping[str, Any]) -> Path:
    """Where the noise of the board, profile and threads of a context is kept in the store ``root``."""
    name = f"{context['profile']}-{context['device_identity']}-{context['threads']}.json"
    return root / "calibration" / name.replace("/", "_")


def save_noise(root: Path, noise: Noise) -> Path:
    """Keep it, whole or not at all. Raises NotReadyError for a board that has no identity."""
    if not noise.same.get("device_identity"):
        raise NotReadyError(
            "the board has neither a serial number nor a machine id: its noise cannot be told from another board's",
            hint="on the device: sudo systemd-machine-id-setup",
            code="no-identity",
        )
    path = noise_path(root, noise.same)
    write_json(path, {"schema": SCHEMA, **dataclasses.asdict(noise)})
    return path


def load_noise(
    root: Path, context: Mapping[str, Any], *, now: datetime.datetime | None = None
) -> Noise | None:
    """The noise of the very board, runtime and threads of a measurement's ``context``.

    None where it was never calibrated, more than `MAX_AGE` ago, or with another of `SAME`. A file
    that cannot be read is warned of, and is none.
    """
    if not context.get("device_identity") or not {"profile", "threads"} <= context.keys():
        return None
    path = noise_path(root, context)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") > SCHEMA:
            raise RequestError(f"{path} is of a newer edgepipe")
        noise = build(Noise, data, where=str(path), error=RequestError)
        age = (now or datetime.datetime.now(datetime.UTC)) - datetime.datetime.fromisoformat(noise.measured)  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RequestError) as exc:
        log.warning("%s is no calibration (%s): calibrate again", path, exc)
        return None
    same = all(noise.same.get(key) == context.get(key) for key in SAME)
    return noise if same and abs(age) <= MAX_AGE else None


def quote_noise(
    root: Path, measurements: Sequence[Measurement], *, now: datetime.datetime | None = None
) -> tuple[Measurement, ...]:
    """The measurements; ratios with the board's own noise in their context, where it is known."""
    return tuple(
        dataclasses.replace(m, context={**m.context, "noise": dataclasses.asdict(noise)})
        if m.metric.startswith("latency_ratio_")
        and (noise := load_noise(root, m.context, now=now)) is not None
        else m
        for m in measurements
    )
