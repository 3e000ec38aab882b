"""Gates: predicates over measurements. Missing or incomparable evidence is INCONCLUSIVE, never PASS."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

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
    """The measurements a gate may look at: of one model file, on one device (or "" for the model).

    ``device`` is the board's name in a run, ``profile`` its kind (default: the same). A board that
    could not be measured has no measurements, and says in ``missing`` why.
    """

    model_sha256: str
    device: str
    measurements: Mapping[str, Measurement]
    profile: str = ""
    missing: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "profile", self.profile or self.device)


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


# How names of metrics begin -> the kind of session they come from; those of time or power.
KINDS = {
    "latency": "latency", "load": "latency", "first": "latency", "memory": "memory", "op_time": "ops",
    "instructions": "instructions", "energy": "energy", "sustained": "sustained",
}  # fmt: skip
OF_TIME = ("latency", "load", "first", "op_time", "energy", "sustained")

# Without these a count of instructions cannot be compared with another.
COUNTED_CONTEXT = ("model_sha256", "profile", "runtime", "runtime_version", "threads", "cpu_model", "counter")  # fmt: skip
# Counts of one model on an emulated Cortex-A72 repeat within 2 ppm at fixed addresses, else within 10 ppm.
REPEATS_WITHIN = 0.0002
MAX_GROWTH = 0.001

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
        return inconclusive(f"no measurement of {metric}{_why_missing(evidence, metric)}")
    missing = [key for key in required if key not in found.context]
    if missing:
        return inconclusive(f"{metric} was recorded without {', '.join(missing)}")
    if found.context["model_sha256"] != evidence.model_sha256:
        return inconclusive(f"{metric} was measured on another model file")
    profile = found.context.get("profile", evidence.profile)
    if evidence.device and profile != evidence.profile:
        return inconclusive(f"{metric} was measured on {profile}, not on {evidence.profile}")
    if found.context.get("emulated") and metric.startswith(OF_TIME):
        return inconclusive(f'{metric} was measured on {profile}, which is emulated: its wall time says nothing; use gate = "instructions"')  # fmt: skip
    if len(found.valid_sessions) * 2 < len(found.samples) or not found.valid_sessions:
        causes = ", ".join(sorted(set(found.excluded.values()))) or "no samples"
        return inconclusive(f"device unfit: {len(found.excluded)} of {len(found.samples)} sessions excluded ({causes})")  # fmt: skip
    return found


def _why_missing(evidence: Evidence, metric: str) -> str:
    """What the board said of a kind of session that it cannot do, to be added to a reason."""
    kind = next((kind for kind in KINDS if metric.startswith(kind)), metric)
    for found in evidence.measurements.values():
        why = (found.context.get("not_measured") or {}).get(KINDS.get(kind, ""))
        if why:
            return f": {why}"
    return ""


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


def _within_budget(gate: Gate, evidence: Evidence, budget: str) -> Verdict:
    """The verdict of a gate without a limit: its ``max`` is what the board's profile allows."""
    for found in evidence.measurements.values():
        limit = (found.context.get("budgets") or {}).get(budget)
        if limit is not None:
            return dataclasses.replace(gate, max=limit).judge(evidence)  # type: ignore[type-var]
    reason = f"no limit: the gate has no max, and the profile no budget for {budget}"
    return Verdict(gate.name, Status.INCONCLUSIVE, reason, evidence.device)


def _check_option(name: str, value: float, low: float, high: float, legal: str) -> None:
    """Refuse an option that no evidence could be judged by; ``low`` and ``high`` are legal."""
    if not low <= value <= high:
        raise RequestError(f"{name} = {value:g} should be {legal}", hint="mend the gate")


@record
class LatencyGate:
    """A percentile of the latency stays under ``max``, at ``confidence``.

    Without ``max`` it is the ``latency`` of the profile's ``[budgets]``.
    PASS when the median over sessions of the order-statistic upper bound of the percentile is
    within the limit, FAIL when that of the lower bound is beyond it, INCONCLUSIVE between.
    """

    name: ClassVar[str] = "latency"
    title: ClassVar[str] = "a latency percentile on the device stays under a limit"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max: Annotated[float, Unit("time")] | None = None
    statistic: Literal["p50", "p90", "p95", "p99"] = "p90"
    clock: Literal["wall", "cpu"] = "wall"
    confidence: float = 0.99

    def __post_init__(self) -> None:
        _check_option("confidence", self.confidence, 0.5, 0.9999, "from 0.5 to 0.9999, like 0.99")
        _check_option("max", self.max or 0, 0, math.inf, "0 or more")

    def judge(self, evidence: Evidence) -> Verdict:
        if self.max is None:
            return _within_budget(self, evidence, "latency")
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

        details: tuple[str, ...] = ()
        batch = max((s.get("inner_loops") or 1 for s in found.context.get("sessions") or ()), default=1)  # fmt: skip
        if batch > 1:
            size += f", each the mean of {batch} inferences"

        def verdict(status: Status, reason: str) -> Verdict:
            return Verdict(self.name, status, reason, evidence.device, value, self.max, "s", details)  # fmt: skip

        if upper is None or lower is None:
            return verdict(
                Status.INCONCLUSIVE,
                f"{what}: too few samples for a {self.confidence:.0%} bound ({size}); raise [measure] session",
            )
        bounds = f"{self.confidence:.0%} bounds {format_value(lower, 's')} to {format_value(upper, 's')}, {size}"  # fmt: skip
        details = (f"from these samples a limit below {format_value(lower, 's')} would FAIL, one from {format_value(upper, 's')} PASS",)  # fmt: skip
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

    Without ``max`` it is the ``memory`` of the profile's ``[budgets]``.
    ``quantity``: ``anon`` (arena and packed weights), ``file`` (mapped weights) or ``peak``.
    """

    name: ClassVar[str] = "memory"
    title: ClassVar[str] = "memory on the device stays under a limit"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max: Annotated[float, Unit("size")] | None = None
    quantity: Literal["anon", "file", "peak"] = "peak"

    def __post_init__(self) -> None:
        _check_option("max", self.max or 0, 0, math.inf, "0 or more")

    def judge(self, evidence: Evidence) -> Verdict:
        if self.max is None:
            return _within_budget(self, evidence, "memory")
        metric = f"memory_{self.quantity}"
        return _limit(self, evidence, metric, self.max, at_most=True, required=REQUIRED_CONTEXT)


@record
class SlowdownGate:
    """The model is at most ``max`` slower than the baseline, measured beside it on the device.

    The rule is `stats.decide_ratio` on the ratios of every round both models ran in. ``clock``
    ``auto`` is the policy of MEASUREMENT 5.4: with one thread CPU time decides, which other work on
    the device hardly moves, and a PASS also needs that wall time does not FAIL; with more threads
    wall time decides, and a busy device gives no FAIL. ``cpu`` and ``wall`` use that clock alone.
    """

    name: ClassVar[str] = "slowdown"
    title: ClassVar[str] = "the model is hardly slower on the device than the baseline beside it"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max: Annotated[float, Unit("ratio")]
    clock: Literal["auto", "cpu", "wall"] = "auto"

    def __post_init__(self) -> None:
        _check_option("max", self.max, 0, 10, "from 0 % to 1000 %, like 3 %")

    def judge(self, evidence: Evidence) -> Verdict:
        wall = evidence.measurements.get("latency_ratio_wall")
        if wall is None:
            return _no_baseline(self, evidence, "latency_ratio_wall")
        threads = wall.context.get("threads")
        clock = self.clock
        if clock == "auto":
            clock = "cpu" if threads == 1 else "wall"
        found = _evidence(self, evidence, f"latency_ratio_{clock}", REQUIRED_CONTEXT)
        if isinstance(found, Verdict):
            return found
        if clock == "cpu" and threads != 1:
            reason = f"CPU time says nothing of the latency of {threads} threads: judge wall time"
            return Verdict(self.name, Status.INCONCLUSIVE, reason, evidence.device)
        if why := _other_inputs(found):
            return Verdict(self.name, Status.INCONCLUSIVE, why, evidence.device)
        decision = decide_sessions(found, self.max)
        details: tuple[str, ...] = ()
        status, but = Status(decision.status), ""
        if clock == "wall" and status is Status.FAIL and found.context.get("contended"):
            status, but = Status.INCONCLUSIVE, ", but the device was busy with other work: stop it and measure again"  # fmt: skip
        if clock == "cpu" and self.clock == "auto":
            other = _evidence(self, evidence, "latency_ratio_wall", REQUIRED_CONTEXT)
            if isinstance(other, Verdict):
                return other
            second = decide_sessions(other, self.max)
            details = (f"wall time: {ratio_text(second)}",)
            if status is Status.PASS and second.status == "FAIL":
                status, but = Status.INCONCLUSIVE, f", but by wall time it is {ratio_text(second)}: what does it wait for?"  # fmt: skip
        details += tuple(
            f"session {number + 1} does not count: {cause}"
            for number, cause in sorted(found.excluded.items())
        )
        reason = f"{_slowdown_text(decision, found, clock)}, tolerance {format_value(self.max, 'ratio')}"  # fmt: skip
        if math.isfinite(decision.minimum_detectable):
            reason += f", detectable from {format_value(decision.minimum_detectable - 1, 'ratio')}"
        reason += _noise_text(found, clock) + but
        if not but and status is Status.INCONCLUSIVE:
            reason += f": {_why_open(decision)}"
        value = decision.estimate - 1 if math.isfinite(decision.estimate) else None
        return Verdict(self.name, status, reason, evidence.device, value, self.max, "ratio", details)  # fmt: skip


def _other_inputs(found: Measurement) -> str:
    """Why two models that are fed otherwise cannot be compared, or an empty string; names may differ."""
    return other_inputs(*(found.context.get(k) or () for k in ("baseline_inputs", "model_inputs")))


def other_inputs(baseline: Sequence[Mapping[str, Any]], model: Sequence[Mapping[str, Any]]) -> str:
    """The same of the inputs (``dtype`` and ``shape``) themselves; nothing known is nothing said."""
    base, candidate = (
        [f"{i['dtype']} {i['shape']}" for i in inputs] for inputs in (baseline, model)
    )
    if not base or base == candidate:
        return ""
    return f"the models cannot be compared: the baseline is fed {', '.join(base)}, the model {', '.join(candidate)}"  # fmt: skip


def decide_sessions(ratios: Measurement, tolerance: float) -> stats.RatioDecision:
    """`stats.decide_ratio` on the valid sessions of ``latency_ratio_cpu`` or ``latency_ratio_wall``."""
    return stats.decide_ratio([stats.session_log_ratio(s) for s in ratios.valid_sessions], tolerance)  # fmt: skip


def ratio_text(decision: stats.RatioDecision, more: str = "") -> str:
    """``"6.2 % slower (95 % CI 6.0 to 6.5 %)"``, with ``more`` in the same parentheses."""
    if not math.isfinite(decision.estimate):
        return f"not comparable ({decision.sessions} sessions{more})"
    digits = 2 if decision.high - decision.low < 0.001 else 1
    change, low, high = (100 * (x - 1) for x in (decision.estimate, decision.low, decision.high))
    text = f"{abs(change):.{digits}f} % {'slower' if change >= 0 else 'faster'}"
    if not math.isfinite(high):
        return f"{text} (no interval{more})"
    sign = "" if low >= 0 else "+"
    return f"{text} (95 % CI {low:{sign}.{digits}f} to {high:{sign}.{digits}f} %{more})"


def _slowdown_text(decision: stats.RatioDecision, found: Measurement, clock: str) -> str:
    threads = found.context["threads"]
    rounds = min(len(s) for s in found.valid_sessions)
    size = f"{decision.sessions} sessions x {rounds} rounds, {threads} thread{'s' * (threads != 1)}"
    return ratio_text(decision, f", {size}, {'CPU' if clock == 'cpu' else 'wall'} time")


def _noise_text(found: Measurement, clock: str) -> str:
    """What `edgepipe calibrate` found on this very board, where it is known."""
    noise = found.context.get("noise") or {}
    deviation = noise.get(f"sd_{clock}")
    if deviation is None:
        return ""
    return f", noise of this board {format_value(deviation, 'ratio')} per session (calibrated {noise['measured'][:10]})"  # fmt: skip


def _why_open(decision: stats.RatioDecision) -> str:
    if decision.sessions < min(stats.LOOKS):
        return f"a verdict needs {min(stats.LOOKS)} valid sessions"
    if not math.isfinite(decision.high):
        return "the device's clock is too coarse for this model, its rounds repeat or have no ratio"
    return "cannot tell; take more sessions, or measure on a quieter device"


def _no_baseline(gate: Gate, evidence: Evidence, metric: str) -> Verdict:
    why = _why_missing(evidence, metric)
    if why:
        reason = f"no measurement of {metric}{why}"
        return Verdict(gate.name, Status.INCONCLUSIVE, reason, evidence.device)
    return Verdict(
        gate.name,
        Status.INCONCLUSIVE,
        f"no measurement of {metric}: no baseline was measured beside the model",
        evidence.device,
        details=("promote a run that may be the baseline: edgepipe gate --promote",),
    )


@record
class GrowthGate:
    """A quantity grows against the baseline by at most the larger of ``max`` and ``max_share`` of it.

    ``quantity``: ``anon`` (arena and packed weights), ``file`` (mapped weights), ``peak``, or
    ``size`` of the model file. These hardly vary (MEASUREMENT 4: anon 0 to 4 kB, peak 1 %), so the
    rule is exact: PASS when every session of the model is within the limit of every session of
    the baseline, FAIL when none is, INCONCLUSIVE between.
    """

    name: ClassVar[str] = "growth"
    title: ClassVar[str] = "memory or file size hardly grows against the baseline"
    scope: ClassVar[Literal["model", "device"]] = "device"

    quantity: Literal["anon", "file", "peak", "size"] = "anon"
    # 32 pages of 4 KiB, and MEASUREMENT 4
    max: Annotated[float, Unit("size")] = 131072.0
    max_share: Annotated[float, Unit("ratio")] = 0.02

    def __post_init__(self) -> None:
        _check_option("max", self.max, 0, math.inf, "0 or more")
        _check_option("max_share", self.max_share, 0, math.inf, "0 % or more")

    def judge(self, evidence: Evidence) -> Verdict:
        metric = "model_bytes" if self.quantity == "size" else f"memory_{self.quantity}"
        required = ("model_sha256",) if self.quantity == "size" else REQUIRED_CONTEXT
        base = evidence.measurements.get(f"{metric}_baseline")
        if base is None:
            return _no_baseline(self, evidence, f"{metric}_baseline")
        found = _evidence(self, evidence, metric, required)
        if isinstance(found, Verdict):
            return found
        if self.quantity == "size" and (why := other_kinds_of_file(found.context)):
            return Verdict(self.name, Status.INCONCLUSIVE, why[0], evidence.device, details=why[1:])
        if len(base.valid_sessions) * 2 < len(base.samples) or not base.valid_sessions:
            return Verdict(self.name, Status.INCONCLUSIVE, f"device unfit: too few sessions of {metric}_baseline count", evidence.device)  # fmt: skip
        before = sorted(x for s in base.valid_sessions for x in s)
        now = sorted(x for s in found.valid_sessions for x in s)
        low, high = (x + max(self.max, self.max_share * x) for x in (before[0], before[-1]))
        status = Status.PASS if now[-1] <= low else Status.FAIL if now[0] > high else Status.INCONCLUSIVE  # fmt: skip
        value, limit = stats.percentile(now, 0.5), stats.percentile([low, high], 0.5)
        growth = value - stats.percentile(before, 0.5)
        reason = (
            f"{metric} {format_value(value, 'B')}, {'+' if growth >= 0 else '-'}{format_value(abs(growth), 'B')} "
            f"against the baseline's {format_value(value - growth, 'B')}; up to {format_value(limit, 'B')} is allowed"
        )
        if status is Status.INCONCLUSIVE:
            reason += f": cannot tell, sessions differ by up to {format_value(max(now[-1] - now[0], before[-1] - before[0]), 'B')}"  # fmt: skip
        return Verdict(self.name, status, reason, evidence.device, value, limit, "B")


def other_kinds_of_file(context: Mapping[str, Any]) -> tuple[str, ...]:
    """Why the sizes of model and baseline say nothing, and what mends it, where one file holds one model
    and the other a signature for each of several."""
    ours, theirs = context.get("model_signature", ""), context.get("baseline_signature", "")
    if bool(ours) == bool(theirs):
        return ()
    merged, own = ("this model", "the baseline") if ours else ("the baseline", "this model")
    how = "without --merge" if ours else "with --merge"
    return (
        f"{merged} is one signature ({ours or theirs}) of a file of several, {own} a file of its own: their sizes cannot be compared",
        f"run {how}, as the baseline was, or remove the baseline's .json and .tflite and promote anew",
    )


@record
class InstructionsGate:
    """The model takes hardly more instructions than the baseline, or at most ``max`` of them.

    Instructions of one inference in user space, with one thread: they repeat to a few in a million
    where wall time scatters by percents, on a real board and on an emulated one. The rule is exact:
    PASS when the largest count of the model is within the limit, FAIL when the smallest is beyond
    it, INCONCLUSIVE between, and where sessions of one model differ by more than 0.02 %. Without
    ``max`` the baseline counts, and ``max_growth`` is 0.1 %. They ignore caches and clocks: a
    regression detector, no forecast of latency.
    """

    name: ClassVar[str] = "instructions"
    title: ClassVar[str] = (
        "an inference takes hardly more instructions than the baseline's, or at most so many"
    )
    scope: ClassVar[Literal["model", "device"]] = "device"

    max_growth: Annotated[float, Unit("ratio")] | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        if self.max is not None and self.max_growth is not None:
            raise RequestError(
                "max and max_growth are two limits",
                hint="write two gates: one with max, one with max_growth",
            )
        _check_option("max", self.max or 0, 0, math.inf, "0 or more")
        _check_option("max_growth", self.max_growth or 0, 0, 10, "from 0 % to 1000 %, like 0.1 %")

    @property
    def is_on_baseline(self) -> bool:
        return self.max is None

    def judge(self, evidence: Evidence) -> Verdict:
        found = self._repeating(evidence, "instructions")
        if isinstance(found, Verdict):
            return found
        now = sorted(x for s in found.valid_sessions for x in s)
        value, cpu = stats.percentile(now, 0.5), found.context["cpu_model"]

        def verdict(low: float, high: float, reason: str) -> Verdict:
            status = Status.PASS if now[-1] <= low else Status.FAIL if now[0] > high else Status.INCONCLUSIVE  # fmt: skip
            but = ": cannot tell, the counts lie on both sides of it" if status is Status.INCONCLUSIVE else ""  # fmt: skip
            return Verdict(self.name, status, reason + but, evidence.device, value, (low + high) / 2)  # fmt: skip

        if self.max is not None:
            relation = "<=" if value <= self.max else ">"
            return verdict(self.max, self.max, f"{format_value(value, '')} instructions {relation} {self.max:,} on {cpu}")  # fmt: skip
        if "instructions_baseline" not in evidence.measurements:
            return _no_baseline(self, evidence, "instructions_baseline")
        theirs = evidence.measurements["instructions_baseline"].context.get("model_sha256")
        beside = dataclasses.replace(evidence, model_sha256=str(theirs))
        base = self._repeating(beside, "instructions_baseline")
        if isinstance(base, Verdict):
            return base
        if why := _other_inputs(found):
            return Verdict(self.name, Status.INCONCLUSIVE, why, evidence.device)
        for key in ("cpu_model", "runtime_version"):
            if base.context[key] != found.context[key]:
                reason = f"the counts cannot be compared: {key} of the baseline {base.context[key]}, of the model {found.context[key]}"  # fmt: skip
                return Verdict(self.name, Status.INCONCLUSIVE, reason, evidence.device)
        growth = MAX_GROWTH if self.max_growth is None else self.max_growth
        before = sorted(x for s in base.valid_sessions for x in s)
        was = stats.percentile(before, 0.5)
        reason = (
            f"{format_value(value, '')} instructions, {instruction_change(value, was)} against the baseline's "
            f"{format_value(was, '')} on {cpu}; up to +{100 * growth:g} % is allowed"
        )
        return verdict(before[0] + growth * before[0], before[-1] + growth * before[-1], reason)

    def _repeating(self, evidence: Evidence, metric: str) -> Measurement | Verdict:
        """The counts, or the INCONCLUSIVE verdict that says why they decide nothing."""
        found = _evidence(self, evidence, metric, COUNTED_CONTEXT)
        if isinstance(found, Verdict):
            return found

        def inconclusive(reason: str) -> Verdict:
            return Verdict(self.name, Status.INCONCLUSIVE, reason, evidence.device)

        if found.context["threads"] != 1:
            return inconclusive(f"{metric} was counted with {found.context['threads']} threads: only those of one repeat")  # fmt: skip
        if not found.context["cpu_model"]:
            return inconclusive(f"the board does not say on which CPU {metric} was counted")
        counts = sorted(x for s in found.valid_sessions for x in s)
        if len(counts) < 2 or counts[0] <= 0:
            return inconclusive(f"{metric} has {len(counts)} session of {format_value(counts[0], '')}: whether it repeats is not known")  # fmt: skip
        spread = counts[-1] / counts[0] - 1
        if spread > REPEATS_WITHIN:
            return inconclusive(f"{metric} does not repeat: its sessions differ by {100 * spread:.2g} %, more than {100 * REPEATS_WITHIN:g} %")  # fmt: skip
        return found


def instruction_change(value: float, was: float) -> str:
    """``"+0.197 % (+12,274)"``: digits enough to tell one instruction in a million."""
    return f"{100 * (value / was - 1):+.4f} % ({value - was:+,.0f})"


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
    required: ClassVar[tuple[str, ...]] = ("model_sha256",)  # of the metric of the same name

    min: float

    def __post_init__(self) -> None:
        _check_option("min", self.min, 0, 1, "a share from 0 to 1, like 0.9 for 90 %")

    def judge(self, evidence: Evidence) -> Verdict:
        return _limit(self, evidence, self.name, self.min, at_most=False, required=self.required)


@record
class AccuracyDropGate:
    """The shipped file loses at most ``max`` percentage points against the reference model.

    PASS also needs the paired 95 % interval to exclude a loss above ``hard_max``.
    """

    name: ClassVar[str] = "accuracy_drop"
    title: ClassVar[str] = "the shipped file loses at most so many points of the task metric"
    scope: ClassVar[Literal["model", "device"]] = "model"
    required: ClassVar[tuple[str, ...]] = ("model_sha256",)  # of the metric of the same name

    max: Annotated[float, Unit("points")]
    hard_max: Annotated[float, Unit("points")] | None = None

    def __post_init__(self) -> None:
        if self.hard_max is not None:
            _check_option("hard_max", self.hard_max, self.max, math.inf, "max or more")

    def judge(self, evidence: Evidence) -> Verdict:
        verdict = _limit(self, evidence, self.name, self.max, at_most=True, required=self.required)
        if verdict.value is None:
            return verdict
        context = evidence.measurements[self.name].context
        low, high = context.get("interval_points", (None, None))
        if low is None or high is None:
            if verdict.status is Status.PASS and self.hard_max is not None:
                reason = f"{verdict.reason}; this metric gives no interval to judge hard_max by: let it return one truth value a sample"
                return dataclasses.replace(verdict, status=Status.INCONCLUSIVE, reason=reason)
            return verdict
        reason = f"{verdict.reason} (95 % interval {low:+.2f} to {high:+.2f} points, {context['samples']} samples)"  # fmt: skip
        status = verdict.status
        if status is Status.PASS and self.hard_max is not None and high > self.hard_max:
            status = Status.INCONCLUSIVE
            reason += f"; a loss above {format_value(self.hard_max, 'points')} is not excluded: evaluate on more samples"  # fmt: skip
        return dataclasses.replace(verdict, status=status, reason=reason)


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
class DelegationGate:
    """At least ``min`` of an inference's time is spent in the delegate, XNNPACK.

    Without ``min`` it is what the profile's ``[delegation]`` requires; such a profile has it judged
    always.
    """

    name: ClassVar[str] = "delegation"
    title: ClassVar[str] = "XNNPACK takes at least a share of an inference's time"
    scope: ClassVar[Literal["model", "device"]] = "device"

    min: Annotated[float, Unit("ratio")] | None = None

    def __post_init__(self) -> None:
        _check_option("min", self.min or 0, 0, 1, "from 0 % to 100 %, like 90 %")

    def judge(self, evidence: Evidence) -> Verdict:
        limit = required_share(evidence) if self.min is None else self.min
        found = _evidence(self, evidence, "op_time")
        if limit is None:
            return Verdict(self.name, Status.INCONCLUSIVE, "no limit: the gate has no min, and the profile requires no delegation", evidence.device)  # fmt: skip
        if isinstance(found, Verdict):
            return found
        share = found.context.get("delegated_share")
        if share is None:
            return Verdict(self.name, Status.INCONCLUSIVE, "op_time was recorded without delegated_share", evidence.device)  # fmt: skip
        relation = ">=" if share >= limit else "<"
        reason = f"{format_value(share, 'ratio')} of the time is spent in XNNPACK {relation} {format_value(limit, 'ratio')}"  # fmt: skip
        status = Status.PASS if share >= limit else Status.FAIL
        return Verdict(self.name, status, reason, evidence.device, share, limit, "ratio")


def required_share(evidence: Evidence) -> float | None:
    """The share of time that the board's profile wants delegated, where it wants one."""
    for found in evidence.measurements.values():
        share = found.context.get("required_delegated_share")
        if share is not None:
            return float(share)
    return None


@record
class DeviceAgreementGate:
    """Outputs on the device equal the host's on the same file: at most ``max_mismatch`` differ.

    Integers by anything, floats by more than 64 ulp of the largest value of their output. The host
    computes as the device does: with XNNPACK, or with the builtin kernels where that has none (whose
    integers may differ by one step between instruction sets).
    """

    name: ClassVar[str] = "device_agreement"
    title: ClassVar[str] = "outputs on the device equal those on the host"
    scope: ClassVar[Literal["model", "device"]] = "device"

    max_mismatch: float = 0.0

    def __post_init__(self) -> None:
        _check_option("max_mismatch", self.max_mismatch, 0, 1, "a share from 0 to 1")

    def judge(self, evidence: Evidence) -> Verdict:
        verdict = _limit(self, evidence, "device_mismatch", self.max_mismatch, at_most=True)
        if verdict.value is None:
            return verdict
        context = evidence.measurements["device_mismatch"].context
        here, there = context.get("kernels_here"), context.get("kernels_there")
        reason = verdict.reason
        if context.get("unequal") and not verdict.value:
            reason += f" ({context['unequal']:.2%} are not bit for bit equal, by at most {_difference(context)})"  # fmt: skip
        # what differs between kernels says nothing of the device
        if verdict.status is Status.FAIL and here != there:
            reason += f"; but the host ran {here} kernels, the device {there} ones: the two cannot be compared"  # fmt: skip
            return dataclasses.replace(verdict, status=Status.INCONCLUSIVE, reason=reason)
        return dataclasses.replace(verdict, reason=reason)


def _difference(context: Mapping[str, Any]) -> str:
    ulps = context.get("max_ulps")
    return f"{ulps:.3g} ulp of the largest" if ulps else f"{context['max_abs']:g}"


@record
class DeviceTaskMetricGate(TaskMetricGate):
    """The task metric of the device's own outputs is at least ``min`` (0 to 1)."""

    name: ClassVar[str] = "device_task_metric"
    title: ClassVar[str] = "the task metric of the device's own outputs reaches a floor"
    scope: ClassVar[Literal["model", "device"]] = "device"
    required: ClassVar[tuple[str, ...]] = ON_DEVICE


@record
class DeviceAccuracyDropGate(AccuracyDropGate):
    """What the device computed loses at most ``max`` percentage points against the reference model.

    PASS also needs the paired 95 % interval to exclude a loss above ``hard_max``.
    """

    name: ClassVar[str] = "device_accuracy_drop"
    title: ClassVar[str] = "the device's own outputs lose at most so many points of the task metric"
    scope: ClassVar[Literal["model", "device"]] = "device"
    required: ClassVar[tuple[str, ...]] = ON_DEVICE


GATES: dict[str, type[Gate]] = {
    gate.name: gate
    for gate in (
        LatencyGate,
        SlowdownGate,
        MemoryGate,
        GrowthGate,
        InstructionsGate,
        SizeGate,
        TaskMetricGate,
        AccuracyDropGate,
        ParityGate,
        FullIntegerGate,
        RunsOnDeviceGate,
        DelegationGate,
        DeviceAgreementGate,
        DeviceTaskMetricGate,
        DeviceAccuracyDropGate,
    )
}


def judge_all(
    gates: Sequence[Gate], model: Evidence, devices: Sequence[Evidence]
) -> tuple[Verdict, ...]:
    """Every gate once per thing it looks at; `RunsOnDeviceGate` is added for every device, and
    `DelegationGate` for those whose profile requires it.

    A device gate with no device measured is INCONCLUSIVE, and so is a PASS whose evidence comes
    from the null device: what is scripted can show that a gate fails, never that a model is fit.
    """
    verdicts = [_judge(RunsOnDeviceGate(), device) for device in devices]
    if not any(gate.name == DelegationGate.name for gate in gates):
        wanted = [device for device in devices if required_share(device) is not None]
        verdicts += [_judge(DelegationGate(), device) for device in wanted]
    for gate in gates:
        if gate.name == RunsOnDeviceGate.name and devices:
            continue
        if gate.scope == "model":
            verdicts.append(_judge(gate, model))
        elif not devices:
            verdicts.append(Verdict(gate.name, Status.INCONCLUSIVE, "no device was measured"))
        else:
            verdicts += [_judge(gate, device) for device in devices]
    return tuple(verdicts)


def _judge(gate: Gate, evidence: Evidence) -> Verdict:
    if evidence.missing:
        reason = f"the board was not measured: {evidence.missing}"
        return Verdict(gate.name, Status.INCONCLUSIVE, reason, evidence.device)
    verdict = gate.judge(evidence)
    if evidence.device and any(m.context.get("emulated") for m in evidence.measurements.values()):
        verdict = dataclasses.replace(verdict, reason=labelled(verdict.reason))
    simulated = any(m.context.get("simulated") for m in evidence.measurements.values())
    if simulated and verdict.status is Status.PASS:
        reason = f"{verdict.reason}; but on the null device, which is no board"
        return dataclasses.replace(verdict, status=Status.INCONCLUSIVE, reason=reason)
    return verdict


def labelled(reason: str) -> str:
    """A reason that rests on figures of an emulated board says so."""
    return reason if "emulated" in reason else f"{reason} (emulated)"


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
