"""Gates: predicates over measurements. Missing or incomparable evidence is INCONCLUSIVE, never PASS."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Protocol

from edgepipe import stats
from edgepipe.errors import EXIT_FAIL, EXIT_NOT_READY, EXIT_PASS, RequestError
from edgepipe.measurement import Measurement
from edgepipe.schema import Unit, record
from edgepipe.units import format_value


class Status(enum.StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a gate decided and why. ``value`` and ``limit`` are in ``unit`` (a base unit).

    ``details`` are lines for a person: what the figure is made of, or what to change.
    """

    gate: str
    status: Status
    reason: str
    device: str = ""
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    details: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The measurements a gate may look at: of one model file, on one device (or "" for the model)."""

    model_sha256: str
    device: str
    measurements: Mapping[str, Measurement]


class Gate(Protocol):
    """``scope``: ``model`` gates are judged once, ``device`` gates once per device."""

    name: ClassVar[str]
    title: ClassVar[str]
    scope: ClassVar[Literal["model", "device"]]

    def judge(self, evidence: Evidence) -> Verdict: ...


# Without these a latency or memory figure cannot be compared with anything.
REQUIRED_CONTEXT = (
    "model_sha256", "profile", "runtime", "runtime_version", "threads", "governor",
    "temperature_before_c", "temperature_after_c",
)  # fmt: skip


# What tells answers of one device and runtime from those of another.
ON_DEVICE = ("model_sha256", "profile", "runtime", "runtime_version", "samples", "samples_total")


def _evidence(
    gate: Gate, evidence: Evidence, metric: str, required: Sequence[str] = ("model_sha256",)
) -> Measurement | Verdict:
    """The measurement of ``metric``, or the INCONCLUSIVE verdict that says why there is none."""

    def inconclusive(reason: str) -> Verdict:
        return Verdict(gate.name, Status.INCONCLUSIVE, reason, evidence.device)

    found = evidence.measurements.get(metric)
    if found is None:
        return inconclusive(f"no measurement of {metric}")
    missing = [key for key in required if key not in found.context]
    if missing:
        return inconclusive(f"{metric} was recorded without {', '.join(missing)}")
    if found.context["model_sha256"] != evidence.model_sha256:
        return inconclusive(f"{metric} was measured on another model file")
    if found.context.get("emulated") and metric.startswith(("latency", "load", "first")):
        return inconclusive(f"{metric} was measured on an emulated device")
    if len(found.valid_sessions) * 2 < len(found.samples) or not found.valid_sessions:
        causes = ", ".join(sorted(set(found.excluded.values()))) or "no samples"
        return inconclusive(f"device unfit: {len(found.excluded)} of {len(found.samples)} sessions excluded ({causes})")  # fmt: skip
    return found


def _limit(
    gate: Gate, evidence: Evidence, metric: str, limit: float, *,
    at_most: bool, required: Sequence[str] = ("model_sha256",),
) -> Verdict:  # fmt: skip
    """A plain limit on the median over sessions of a quantity that is exact or nearly so."""
    found = _evidence(gate, evidence, metric, required)
    if isinstance(found, Verdict):
        return found
    value = stats.sessions_percentile(found.valid_sessions, 0.5)
    ok = value <= limit if at_most else value >= limit
    relation = ("<=" if ok else ">") if at_most else (">=" if ok else "<")
    reason = f"{metric} {format_value(value, found.unit)} {relation} {format_value(limit, found.unit)}"  # fmt: skip
    status = Status.PASS if ok else Status.FAIL
    return Verdict(gate.name, status, reason, evidence.device, value, limit, found.unit)


def _check_option(name: str, value: float, low: float, high: float, legal: str) -> None:
    """Refuse an option that no evidence could be judged by; ``low`` and ``high`` are legal."""
    if not low <= value <= high:
        raise RequestError(f"{name} = {value:g} should be {legal}", hint="mend the gate")


@record
class LatencyGate:
    """A percentile of the latency stays under ``max``, at ``confidence``.

    PASS when the median over sessions of the order-statistic upper bound of the percentile is
    within the limit, FAIL when that of the lower bound is beyond it, INCONCLUSIVE between.
    """

    name: ClassVar[str] = "latency"
    title: ClassVar[str] = "a latency percentile on the device stays under a limit"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max: Annotated[float, Unit("time")]
    statistic: Literal["p50", "p90", "p95", "p99"] = "p90"
    clock: Literal["wall", "cpu"] = "wall"
    confidence: float = 0.99

    def __post_init__(self) -> None:
        _check_option("confidence", self.confidence, 0.5, 0.9999, "from 0.5 to 0.9999, like 0.99")
        _check_option("max", self.max, 0, math.inf, "0 or more")

    def judge(self, evidence: Evidence) -> Verdict:
        metric = f"latency_{self.clock}"
        found = _evidence(self, evidence, metric, REQUIRED_CONTEXT)
        if isinstance(found, Verdict):
            return found
        q = int(self.statistic[1:]) / 100
        sessions = found.valid_sessions
        upper = stats.sessions_upper_bound(sessions, q, self.confidence)
        lower = stats.sessions_lower_bound(sessions, q, self.confidence)
        value = stats.sessions_percentile(sessions, q)
        n = min(len(s) for s in sessions)
        limit = format_value(self.max, "s")
        what = f"{self.statistic} {metric} {format_value(value, 's')}"
        size = f"{len(sessions)} sessions, n >= {n}"

        def verdict(status: Status, reason: str) -> Verdict:
            return Verdict(self.name, status, reason, evidence.device, value, self.max, "s")

        if upper is None or lower is None:
            return verdict(
                Status.INCONCLUSIVE,
                f"{what}: too few samples for a {self.confidence:.0%} bound ({size}); raise [measure] session",
            )
        bounds = f"{self.confidence:.0%} bounds {format_value(lower, 's')} to {format_value(upper, 's')}, {size}"  # fmt: skip
        if upper <= self.max:
            return verdict(Status.PASS, f"{what} <= {limit} ({bounds})")
        if lower > self.max and self.clock == "wall" and found.context.get("contended"):
            return verdict(
                Status.INCONCLUSIVE,
                f"{what} > {limit} ({bounds}), but the device was busy with other work: stop it and measure again",
            )
        if lower > self.max:
            return verdict(Status.FAIL, f"{what} > {limit} ({bounds})")
        return verdict(Status.INCONCLUSIVE, f"{what}: cannot tell from {limit} ({bounds}); measure more")  # fmt: skip


@record
class MemoryGate:
    """Memory that the model costs on the device stays under ``max``.

    ``quantity``: ``anon`` (arena and packed weights), ``file`` (mapped weights) or ``peak``.
    """

    name: ClassVar[str] = "memory"
    title: ClassVar[str] = "memory on the device stays under a limit"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max: Annotated[float, Unit("size")]
    quantity: Literal["anon", "file", "peak"] = "peak"

    def __post_init__(self) -> None:
        _check_option("max", self.max, 0, math.inf, "0 or more")

    def judge(self, evidence: Evidence) -> Verdict:
        metric = f"memory_{self.quantity}"
        return _limit(self, evidence, metric, self.max, at_most=True, required=REQUIRED_CONTEXT)


@record
class SizeGate:
    """The file that ships is at most ``max``."""

    name: ClassVar[str] = "size"
    title: ClassVar[str] = "the model file stays under a limit"
    scope: ClassVar[Literal["model", "device"]] = "model"

    max: Annotated[float, Unit("size")]

    def __post_init__(self) -> None:
        _check_option("max", self.max, 0, math.inf, "0 or more")

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(self, evidence, "model_bytes", self.max, at_most=True)


@record
class TaskMetricGate:
    """The task metric of the file that ships is at least ``min`` (0 to 1)."""

    name: ClassVar[str] = "task_metric"
    title: ClassVar[str] = "the task metric of the shipped file reaches a floor"
    scope: ClassVar[Literal["model", "device"]] = "model"

    min: float

    def __post_init__(self) -> None:
        _check_option("min", self.min, 0, 1, "a share from 0 to 1, like 0.9 for 90 %")

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(self, evidence, "task_metric", self.min, at_most=False)


def _judge_drop(
    gate: Gate, evidence: Evidence, metric: str, limit: float, hard_max: float | None,
    required: Sequence[str] = ("model_sha256",),
) -> Verdict:  # fmt: skip
    """A limit on a loss in points, and where ``hard_max`` is set, on its 95 % interval."""
    verdict = _limit(gate, evidence, metric, limit, at_most=True, required=required)
    if verdict.value is None:
        return verdict
    context = evidence.measurements[metric].context
    low, high = context.get("interval_points", (None, None))
    if low is None or high is None:
        if verdict.status is Status.PASS and hard_max is not None:
            reason = f"{verdict.reason}; this metric gives no interval to judge hard_max by: let it return one truth value a sample"
            return dataclasses.replace(verdict, status=Status.INCONCLUSIVE, reason=reason)
        return verdict
    reason = f"{verdict.reason} (95 % interval {low:+.2f} to {high:+.2f} points, {context['samples']} samples)"  # fmt: skip
    status = verdict.status
    if status is Status.PASS and hard_max is not None and high > hard_max:
        status = Status.INCONCLUSIVE
        reason += f"; a loss above {hard_max:g} points is not excluded: evaluate on more samples"
    return dataclasses.replace(verdict, status=status, reason=reason)


@record
class AccuracyDropGate:
    """The shipped file loses at most ``max`` percentage points against the reference model.

    PASS also needs the paired 95 % interval to exclude a loss above ``hard_max``.
    """

    name: ClassVar[str] = "accuracy_drop"
    title: ClassVar[str] = "the shipped file loses at most so many points of the task metric"
    scope: ClassVar[Literal["model", "device"]] = "model"

    max: Annotated[float, Unit("points")]
    hard_max: Annotated[float, Unit("points")] | None = None

    def __post_init__(self) -> None:
        if self.hard_max is not None:
            _check_option("hard_max", self.hard_max, self.max, math.inf, "max or more")

    def judge(self, evidence: Evidence) -> Verdict:
        return _judge_drop(self, evidence, "accuracy_drop", self.max, self.hard_max)


@record
class ParityGate:
    """The shipped file computes what the float model did: SQNR of every output >= ``min_sqnr``."""

    name: ClassVar[str] = "parity"
    title: ClassVar[str] = "the shipped file agrees with the float model it was made from"
    scope: ClassVar[Literal["model", "device"]] = "model"

    min_sqnr: Annotated[float, Unit("level")]

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(self, evidence, "parity_sqnr", self.min_sqnr, at_most=False)


@record
class FullIntegerGate:
    """No operator of the shipped file computes in floating point."""

    name: ClassVar[str] = "full_integer"
    title: ClassVar[str] = "no operator of the shipped file computes in floating point"
    scope: ClassVar[Literal["model", "device"]] = "model"

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(self, evidence, "float_islands", 0, at_most=True)


@record
class RunsOnDeviceGate:
    """The model loads and runs on the device. Always judged; it cannot be left out."""

    name: ClassVar[str] = "runs_on_device"
    title: ClassVar[str] = "the model loads and runs on the device (always judged)"
    scope: ClassVar[Literal["model", "device"]] = "device"

    def judge(self, evidence: Evidence) -> Verdict:
        found = _evidence(self, evidence, "runs_on_device")
        if isinstance(found, Verdict):
            return found
        if found.samples[0][0] == 1:
            return Verdict(self.name, Status.PASS, "the model loaded and ran", evidence.device)
        reason = str(found.context.get("reason", "the model did not run"))
        return Verdict(self.name, Status.FAIL, reason, evidence.device)


@record
class DeviceAgreementGate:
    """Outputs on the device equal the host's on the same file: at most ``max_mismatch`` differ."""

    name: ClassVar[str] = "device_agreement"
    title: ClassVar[str] = "outputs on the device equal those on the host"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max_mismatch: float = 0.0

    def __post_init__(self) -> None:
        _check_option("max_mismatch", self.max_mismatch, 0, 1, "a share from 0 to 1")

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(self, evidence, "device_mismatch", self.max_mismatch, at_most=True)


@record
class DeviceTaskMetricGate:
    """The task metric of the device's own outputs is at least ``min`` (0 to 1)."""

    name: ClassVar[str] = "device_task_metric"
    title: ClassVar[str] = "the task metric of the device's own outputs reaches a floor"
    scope: ClassVar[Literal["model", "device"]] = "device"

    min: float

    def __post_init__(self) -> None:
        _check_option("min", self.min, 0, 1, "a share from 0 to 1, like 0.9 for 90 %")

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(
            self, evidence, "device_task_metric", self.min, at_most=False, required=ON_DEVICE
        )


@record
class DeviceAccuracyDropGate:
    """What the device computed loses at most ``max`` percentage points against the reference model.

    PASS also needs the paired 95 % interval to exclude a loss above ``hard_max``.
    """

    name: ClassVar[str] = "device_accuracy_drop"
    title: ClassVar[str] = "the device's own outputs lose at most so many points of the task metric"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max: Annotated[float, Unit("points")]
    hard_max: Annotated[float, Unit("points")] | None = None

    def __post_init__(self) -> None:
        if self.hard_max is not None:
            _check_option("hard_max", self.hard_max, self.max, math.inf, "max or more")

    def judge(self, evidence: Evidence) -> Verdict:
        return _judge_drop(
            self, evidence, "device_accuracy_drop", self.max, self.hard_max, required=ON_DEVICE
        )


GATES: dict[str, type[Gate]] = {
    gate.name: gate
    for gate in (
        LatencyGate,
        MemoryGate,
        SizeGate,
        TaskMetricGate,
        AccuracyDropGate,
        ParityGate,
        FullIntegerGate,
        RunsOnDeviceGate,
        DeviceAgreementGate,
        DeviceTaskMetricGate,
        DeviceAccuracyDropGate,
    )
}


def judge_all(
    gates: Sequence[Gate], model: Evidence, devices: Sequence[Evidence]
) -> tuple[Verdict, ...]:
    """Every gate once per thing it looks at; `RunsOnDeviceGate` is added for every device.

    A device gate with no device measured is INCONCLUSIVE.
    """
    verdicts = [RunsOnDeviceGate().judge(device) for device in devices]
    for gate in gates:
        if gate.name == RunsOnDeviceGate.name and devices:
            continue
        if gate.scope == "model":
            verdicts.append(gate.judge(model))
        elif not devices:
            verdicts.append(Verdict(gate.name, Status.INCONCLUSIVE, "no device was measured"))
        else:
            verdicts += [gate.judge(device) for device in devices]
    return tuple(verdicts)


def overall(verdicts: Sequence[Verdict]) -> Status:
    """FAIL if any gate failed, else INCONCLUSIVE if any is, or none was judged; else PASS."""
    statuses = {v.status for v in verdicts}
    if Status.FAIL in statuses:
        return Status.FAIL
    return Status.PASS if statuses == {Status.PASS} else Status.INCONCLUSIVE


EXIT_CODES = {
    Status.PASS: EXIT_PASS,
    Status.FAIL: EXIT_FAIL,
    Status.INCONCLUSIVE: EXIT_NOT_READY,
}
