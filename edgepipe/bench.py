"""Measure a model on a board: preflight, push, a job of sessions there, Measurements here."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgepipe import preflight, stats
from edgepipe.android import fast_cpus
from edgepipe.artifact import Artifact, hash_path
from edgepipe.device.base import Device
from edgepipe.device.parse import name_cores
from edgepipe.device.retry import RetryingDevice
from edgepipe.device.snapshot import hottest_c
from edgepipe.emulated import not_measurable, why_emulated
from edgepipe.errors import (
    ArtifactError,
    DeviceError,
    NotReadyError,
    ProfileError,
    RequestError,
    TransferError,
)
from edgepipe.explain import why_not_run
from edgepipe.gate import other_inputs
from edgepipe.job import (
    COMMAND_TIMEOUT_S,
    BoardJob,
    Outcome,
    Progress,
)
from edgepipe.measurement import Measurement, single
from edgepipe.preflight import Board
from edgepipe.profile import DeviceProfile
from edgepipe.schema import Unit, record
from edgepipe.sessions import (
    BASE,
    CANDIDATE,
    MODEL,
    Session,
    exclusion,
    round_ratios,
    to_measurements,
)
from edgepipe.units import format_bytes

if TYPE_CHECKING:
    from edgepipe.evaluate import DeviceEvaluation
    from edgepipe.tflite_ops.raw import RawSamples

log = logging.getLogger(__name__)

SCHEMA = 2
# A session shorter than this says nothing about percentiles (44 samples bound a p90 at 99 %).
MIN_INFERENCES = 30
# What Linux is built for on the largest boards and servers (CONFIG_NR_CPUS, 8192 on x86).
MAX_CPUS = 8192
# Longer than any measurement, shorter than what poll(2) can wait (2**31 ms).
MAX_BUDGET_S = 86400.0
# How long the lease on a board outlives the agent: time for the host to ask for more sessions.
LEASE_S = 30.0
# How long to wait for a hot board (MEASUREMENT: 120 s).
COOL_DOWN_S = 120.0
# The board keeps this much free: the agent writes a few kB.
MIN_FREE_BYTES = 1 << 20
# A long set is run in pieces of so many inferences: each is told of, and none is lost with a link.
OUTPUTS_PER_SESSION = 250
# A count repeats or it does not: a third session tells a chance from a habit.
INSTRUCTION_SESSIONS = 3
# An energy session: long enough for 50 readings of each at 10 Hz.
ENERGY_IDLE_S, ENERGY_RUN_S = 5.0, 5.0
# A long run is summarised per minute; a shorter one in as many windows as show a steady state.
WINDOW_S, MIN_WINDOWS = 60.0, 10
# Giving the board back may not take as long as getting through to it.
END_PATIENCE_S = 10.0


@record
class MeasureOptions:
    """How a model is measured: ``[measure]`` in a recipe.

    ``threads`` 0 means what the device profile says. ``warmup`` and ``session`` are per session, a
    fresh process each; a session lasts at least 30 inferences. Beside a baseline, sessions are added
    up to ``max_sessions`` until it is clear whether the slowdown is within ``tolerance``.
    ``kernel`` is XNNPACK's choice of kernels, ``weight_cache`` keeps its packed weights in a file.
    ``ops`` times single operators, in a session of its own, where the backend can; ``energy`` asks
    the board's power meter (``auto``: where there is one); ``instructions`` counts those of one
    inference (``auto``: with one thread, where the board lets them be counted); ``sustained`` runs
    for that long after all else. On an emulated board nothing is timed. ``evaluate_samples`` is how
    many evaluation samples run on the board (0: all). ``affinity`` lists the CPU numbers to stay on
    (empty: all; on a phone its fastest cluster). ``set_governor`` is the governor of the board's clock
    for as long as it measures (empty: it stays what it is). ``budget`` bounds the whole measurement but for ``sustained``; ``max_age`` is how
    long a run may use it again.
    """

    threads: int = 0
    sessions: int = 3
    max_sessions: int = stats.LOOKS[-1]
    memory_sessions: int = 2
    warmup: Annotated[float, Unit("time")] = 0.5
    session: Annotated[float, Unit("time")] = 2.0
    tolerance: Annotated[float, Unit("ratio")] = 0.03
    backend: Literal["auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter"] = (
        "auto"
    )
    kernel: Literal["", "xnnpack", "builtin"] = ""
    weight_cache: bool = False
    ops: bool = True
    energy: bool | Literal["auto"] = "auto"
    instructions: bool | Literal["auto"] = "auto"
    sustained: Annotated[float, Unit("time")] = 0.0
    evaluate_samples: int = 200
    affinity: tuple[int, ...] = ()
    set_governor: str = ""
    seed: int = 0
    budget: Annotated[float, Unit("time")] = 600.0
    max_age: Annotated[float, Unit("time")] = 86400.0

    def __post_init__(self) -> None:
        # here, so that a recipe is refused before its first stage runs
        problems = []
        if self.sessions < 1 or self.memory_sessions < 0:
            problems.append(
                f"sessions = {self.sessions}, memory_sessions = {self.memory_sessions}: "
                "sessions is 1 or more, memory_sessions 0 or more"
            )
        if self.max_sessions < 1:
            problems.append(f"max_sessions = {self.max_sessions} is not 1 or more")
        if self.evaluate_samples < 0:
            problems.append(f"evaluate_samples = {self.evaluate_samples} is not 0 or more")
        if not 0 < self.tolerance <= 1:
            problems.append(f"tolerance = {100 * self.tolerance:g} % is not above 0 % up to 100 %")
        if not 0 <= self.threads <= MAX_CPUS:
            problems.append(f"threads = {self.threads} is not 0 to {MAX_CPUS}")
        if not all(0 <= cpu < MAX_CPUS for cpu in self.affinity):
            problems.append(f"affinity = {list(self.affinity)} is no list of CPU numbers")
        if self.session <= 0 or self.warmup < 0 or not 0 < self.budget <= MAX_BUDGET_S:
            problems.append(
                f"session = {self.session:g} s, warmup = {self.warmup:g} s, budget = {self.budget:g} s: "
                f"session and budget are above 0 s, budget is at most {MAX_BUDGET_S:g} s"
            )
        elif self.sessions * (self.warmup + self.session) > self.budget:
            problems.append(
                f"{self.sessions} sessions of {self.warmup:g} s and {self.session:g} s do not fit "
                f"into budget = {self.budget:g} s"
            )
        if not 0 <= self.sustained <= MAX_BUDGET_S:
            problems.append(f"sustained = {self.sustained:g} s is not 0 to {MAX_BUDGET_S:g} s")
        if problems:
            raise RequestError(
                f"[measure] {'; '.join(problems)}", hint="mend these options and run again"
            )


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What one model did on one board.

    ``device_facts`` is what the board said of itself, ``raw`` its journal as it came. A model that
    does not run has the single measurement ``runs_on_device`` = 0, whose context says why under
    ``reason``.
    """

    measurements: tuple[Measurement, ...]
    device_facts: dict[str, Any]
    raw: dict[str, Any]


def measure(
    model: Artifact,
    device: Device,
    profile: DeviceProfile,
    options: MeasureOptions,
    *,
    samples: Mapping[str, Any] | None = None,
    evaluation: DeviceEvaluation | None = None,
    baseline: Artifact | None = None,
    same_inputs: bool = False,
    keep: bool = False,
    stop: threading.Event | None = None,
) -> BenchResult:
    """Measure ``model`` (kind ``tflite``) on ``device``, which ``profile`` describes.

    ``samples`` are real values by input name, (N, ...) in the source layout; with them the board's
    outputs are compared with this host's (``device_mismatch``). An ``evaluation`` brings its own
    samples instead, and the board's task metric with them. ``baseline`` is measured beside the
    model, round by round in the same processes; sessions are added (`stats.LOOKS`) until the
    slowdown is decided. With ``same_inputs`` a baseline that takes other inputs is a RequestError as
    soon as the board has run both. ``keep`` leaves the job's files on the board. Models, runtimes and agents
    stay there anyway, named by their hash, so that the next measurement pushes nothing.

    A broken link is waited for. Where ``stop`` is set from another thread, the board is given back
    and KeyboardInterrupt raised. After a host that died, the same call goes on with the sessions that
    the board has finished since; the context says how many (``resumed_sessions``).

    On an emulated board nothing is timed; every record says what it was (``emulated``).

    A model that crashes or does not fit is a result. Raises NotReadyError (no Python, no runtime,
    Busy, too hot, rebooted twice, budget used up, broken link), ProfileError where the board is not
    what the profile says, ArtifactError and RequestError for what cannot be measured at all.
    """
    models = {MODEL: model} if baseline is None else {BASE: baseline, CANDIDATE: model}
    for artifact in models.values():
        _check_model(artifact)
    if evaluation is not None:
        samples = evaluation.inputs
    encoded = None
    if samples is not None:
        from edgepipe.tflite_ops.raw import encode_samples

        encoded = encode_samples(model.path, samples, model.inputs, signature=model.signature)
    budget_s = options.budget + options.sustained
    deadline_s = time.monotonic() + budget_s + COMMAND_TIMEOUT_S
    link = RetryingDevice(device, deadline_s=deadline_s, stop=stop)
    board = preflight.prepare(link, profile)
    if options.set_governor and board.c_board is not None:
        raise RequestError(
            f"set_governor needs Python on the board, and {link.address} has none",
            hint=f"set it there: echo {options.set_governor} | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor",
        )
    facts = board.facts()
    preflight.check_board(facts["device"], profile, link.address)
    _check_zones(facts["health"], profile, link.address)
    threads = options.threads or profile.threads
    left_out = not_measurable(profile, facts["device"], threads=threads)
    _check_demands(options, left_out, link.address)
    if emulated := why_emulated(profile, facts["device"]):
        log.info("%s is emulated (%s): nothing is timed on it", link.address, emulated)
    if encoded is not None:
        from edgepipe.evaluate import check_fits

        check_fits(model, encoded, free_bytes=facts.get("free_bytes"), reserve_bytes=MIN_FREE_BYTES, address=link.address)  # fmt: skip
    runtime = preflight.push_runtime(board, profile, options.backend, facts)
    request = _request(board, profile, options, models, runtime, encoded, budget_s, facts)
    job = _named_job(board, options, request, unique=keep)
    job_dir = f"{board.work_dir}/jobs/{job['id']}"
    hint = preflight.runtime_hint(profile, options.backend, facts["device"])
    board_job = board.job(job, job_dir, runtime_hint=hint)
    if same_inputs:
        board_job.progress = _refusing_other_inputs(board_job.progress)
    try:
        board_job.find_earlier(board_time_s=facts["health"].get("realtime_s"), max_age_s=budget_s)
        _push_models(board, models)
        _push_samples(board, job, encoded)
        inferences = 0 if encoded is None else encoded.count
        outcome = _run_sessions(board_job, options, models, inferences, left_out)
        answers = b""
        if outcome.failure is None:
            answers = b"".join(
                pull_outputs(link, s) for s in outcome.sessions if s["kind"] == "outputs"
            )
    finally:
        link.patience_s, link.stop = END_PATIENCE_S, threading.Event()
        with contextlib.suppress(DeviceError):  # must not hide the result
            board_job.end(keep=keep)
    device_facts = {**facts["device"], "packages": facts["packages"]}
    raw = {"schema": SCHEMA, "job": job, "facts": facts, "journal": list(outcome.journal)}
    context = _context(models, profile, options, job, board, outcome, facts, left_out)
    if outcome.failure is not None:
        _check_blame(outcome, link)
        reason = why_not_run(outcome.failure, model.path)
        log.info("the model does not run on the device: %s", reason)
        context = {**context, "reason": reason, "cause": outcome.failure}
        return BenchResult((single("runs_on_device", "", 0, context),), device_facts, raw)
    _check_energy(options, outcome, link)
    measurements = to_measurements(
        outcome.sessions, context, threads=job["threads"], left_out=left_out
    )
    if encoded is not None:
        from edgepipe.evaluate import device_measurements

        described = _session_of(outcome, "outputs")["data"]["outputs"]
        measurements += device_measurements(
            model, encoded, described, answers, context, evaluation,
            delegated=_is_delegated(outcome.sessions, list(models)[-1]),
        )  # fmt: skip
    return BenchResult(measurements, device_facts, raw)


def _check_model(model: Artifact) -> None:
    if model.kind != "tflite":
        raise ArtifactError(
            f"{model.path} is a {model.kind} model; a device measures .tflite files",
            hint="convert it first: edgepipe convert",
        )
    if hash_path(model.path) != model.sha256:
        raise ArtifactError(
            f"{model.path} has changed since its record was made", hint="run the recipe again"
        )
    if model.signature:
        from edgepipe.tflite_ops.flatbuffer import check_signature

        check_signature(model.path, model.signature, option="--signature")


# ------------------------------------------------------------------------------------ the request


def _request(
    board: Board,
    profile: DeviceProfile,
    options: MeasureOptions,
    models: Mapping[str, Artifact],
    runtime: dict[str, Any] | None,
    samples: RawSamples | None,
    budget_s: float,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The job but for its id, its plan and where its inputs lie."""
    return {
        "schema": SCHEMA,
        "owner": owner_name(),
        "work_dir": board.work_dir,
        "models": {
            arm: {
                "path": f"{board.work_dir}/models/{model.sha256}.tflite",
                "size": model.size_bytes,
                "sha256": model.sha256,
                "signature": model.signature,
            }
            for arm, model in models.items()
        },
        "runtime": runtime,
        "inputs": None
        if samples is None
        else {
            "size": len(samples.data),
            "sha256": hashlib.sha256(samples.data).hexdigest(),
            "count": samples.count,
            "tensors": list(samples.tensors),
        },
        "backend": options.backend,
        "kernel": options.kernel or (profile.delegation.kernel if profile.delegation else ""),
        "weight_cache": options.weight_cache,
        "threads": options.threads or profile.threads,
        "affinity": list(options.affinity or profile.affinity or fast_cpus(facts)),
        "warmup_s": options.warmup,
        "session_s": options.session,
        "min_inferences": MIN_INFERENCES,
        "seed": options.seed,
        "budget_s": budget_s,
        "lease_s": LEASE_S,
        "min_free_bytes": MIN_FREE_BYTES,
        "start_below_c": profile.thermal.start_below,
        "cool_down_s": COOL_DOWN_S,
        "abort_above_c": profile.thermal.abort_above,
        **({"thermal_zones": list(profile.thermal.zones)} if profile.thermal.zones else {}),
        **({"set_governor": options.set_governor} if options.set_governor else {}),
    }


def _named_job(
    board: Board, options: MeasureOptions, request: Mapping[str, Any], *, unique: bool
) -> dict[str, Any]:
    """The job with its id: the same for the same request, so that it is found again on the board.

    ``unique`` gives one that is never found again, for a job whose files are kept.
    """
    asked = json.dumps(
        [request, board.payload.sha256, options.sustained, secrets.token_hex(8) if unique else ""],
        sort_keys=True,
    )
    job_id = hashlib.sha256(asked.encode()).hexdigest()[:16]
    inputs = request["inputs"]
    if inputs is not None:
        inputs = {"path": f"{board.work_dir}/jobs/{job_id}/inputs.bin", **inputs}
    return {**request, "id": job_id, "inputs": inputs}


def owner_name() -> str:
    """Who takes a board: ``ada@desk``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in many containers
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _push_models(board: Board, models: Mapping[str, Artifact]) -> None:
    for model in {m.sha256: m for m in models.values()}.values():
        log.info("pushing %s (%s) to %s", model.path.name, format_bytes(model.size_bytes), board.device.address)  # fmt: skip
        board.device.push(model.path, f"{board.work_dir}/models/{model.sha256}.tflite")


def _push_samples(board: Board, job: Mapping[str, Any], samples: RawSamples | None) -> None:
    if samples is None:
        return
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = Path(folder) / "inputs.bin"
        path.write_bytes(samples.data)
        board.device.push(path, job["inputs"]["path"])


# ----------------------------------------------------------------------------------- running


def _run_sessions(
    job: BoardJob,
    options: MeasureOptions,
    models: Mapping[str, Artifact],
    inferences: int,
    left_out: Container[str] = (),
) -> Outcome:
    """All sessions, and the outputs of so many ``inferences``.

    Beside a baseline: look after look, until the slowdown is decided.
    """
    looks = [options.sessions]
    if BASE in models and "latency" not in left_out:
        most = max(options.sessions, options.max_sessions)
        looks += [k for k in stats.LOOKS if options.sessions < k <= most]
        looks += [most] if most > looks[-1] else []
    for number, look in enumerate(looks):
        outcome = job.run(plan_of(options, list(models), look, inferences, left_out))
        if outcome.failure or number == len(looks) - 1:
            break
        threads = job.job["threads"]
        decision = decide(outcome, options.tolerance, threads=threads)
        if decision.status != "INCONCLUSIVE":
            break
        if (looks[number + 1] - look) * _longest_s(outcome) > job.left_s:
            log.warning("after %d sessions the slowdown is not decided, and the budget has no room for more", look)  # fmt: skip
            break
        log.info("not decided after %d sessions: taking %d more", look, looks[number + 1] - look)
    return outcome


def _refusing_other_inputs(progress: Progress) -> Progress:
    """``progress`` that ends the job with a RequestError once two models turn out to be fed otherwise."""
    seen: list[Session] = []

    def told(session: Session, number: int, total: int) -> str:
        text = progress(session, number, total)
        seen.append(session)
        base, candidate = (_model_inputs(seen, arm) for arm in (BASE, CANDIDATE))
        if base and candidate and (why := other_inputs(base, candidate)):
            raise RequestError(
                why,
                hint="make both take the same (edgepipe quantize --input-dtype); float beside int8 is edgepipe quantize --all",
                code="other-inputs",
            )
        return text

    return told


def _check_blame(outcome: Outcome, device: Device) -> None:
    """Raise NotReadyError where a session failed that the baseline took part in.

    The model has sessions of its own before those with both: it is to blame only for them.
    """
    failed = next((line["session"] for line in reversed(outcome.journal) if line["kind"] == "session" and line["session"]["data"] is None), None)  # fmt: skip
    if outcome.failure is None or failed is None or BASE not in failed["arms"]:
        return
    what = "the baseline" if failed["arms"] == [BASE] else "the baseline and the model together"
    raise NotReadyError(
        f"{what} cannot run on {device.address}: {outcome.failure['message']}",
        hint="measure the model alone, or against a baseline that runs there (README, Release gates in CI)",
        code="baseline-does-not-run",
    )


def plan_of(
    options: MeasureOptions,
    arms: Sequence[str],
    sessions: int,
    inferences: int = 0,
    left_out: Container[str] = (),
) -> list[dict[str, Any]]:
    """What the board shall do, in this order. A longer plan begins with the tags of a shorter one.

    Kinds of session in ``left_out`` cannot be measured there. Every model runs at least once.
    """
    ours = arms[-1]  # the model itself; a baseline comes before it
    plan: list[dict[str, Any]] = []

    def add(tag: str, kind: str, on: Sequence[str], **more: Any) -> None:
        if kind not in left_out:
            plan.append({"tag": tag, "kind": kind, "arms": list(on), **more})

    for number, first in enumerate(range(0, inferences, OUTPUTS_PER_SESSION), 1):
        count = min(OUTPUTS_PER_SESSION, inferences - first)
        add(f"outputs-{number}", "outputs", [ours], first=first, count=count)
    for number in range(1, options.memory_sessions + 1):
        for arm in arms:
            add(f"memory-{arm}-{number}", "memory", [arm])
    for arm in arms if options.ops else ():
        add(f"ops-{arm}-1", "ops", [arm])
    for number in range(1, sessions + 1):
        add(f"latency-{number}", "latency", arms)
    for number in range(1, INSTRUCTION_SESSIONS + 1) if options.instructions else ():
        for arm in arms:
            add(f"instructions-{arm}-{number}", "instructions", [arm])
    if options.energy:
        add("energy-1", "energy", [ours], idle_s=ENERGY_IDLE_S, run_s=ENERGY_RUN_S)
    if options.sustained:
        window_s = min(WINDOW_S, options.sustained / MIN_WINDOWS)
        add("sustained-1", "sustained", [ours], duration_s=options.sustained, window_s=window_s)
    idle = [arm for arm in arms if not any(arm in entry["arms"] for entry in plan)]
    return plan + [{"tag": f"memory-{arm}-1", "kind": "memory", "arms": [arm]} for arm in idle]


def decide(outcome: Outcome, tolerance: float, *, threads: int) -> stats.RatioDecision:
    """What the valid A/B sessions say so far: by CPU time with one thread, else by wall time."""
    clock = "cpu" if threads == 1 else "wall"
    ratios = [
        stats.session_log_ratio(round_ratios(s, clock))
        for s in outcome.sessions
        if s["kind"] == "latency" and not exclusion(s, outcome.boot_id)
    ]
    return stats.decide_ratio(ratios, tolerance)


def _longest_s(outcome: Outcome) -> float:
    """How long the longest latency session took on the board, by its own clock."""
    ends = [(s["before"], s["after"]) for s in outcome.sessions if s["kind"] == "latency"]
    return max(
        after.get("monotonic_s", 0.0) - before.get("monotonic_s", 0.0) for before, after in ends
    )


def pull_outputs(device: Device, session: Session) -> bytes:
    """The file that an outputs session wrote on the board, checked against the session's sha256.

    Inference after inference, in each the tensors of ``session["data"]["outputs"]``. Raises
    TransferError where the file is not the one that was written.
    """
    data = session["data"]
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = Path(folder) / "outputs.bin"
        device.pull(data["path"], path)
        answers = path.read_bytes()
    if len(answers) != data["size"] or hashlib.sha256(answers).hexdigest() != data["sha256"]:
        raise TransferError(
            f"the outputs {data['path']} on {device.address} are not those that were computed: "
            f"{len(answers)} bytes of {data['size']}, or another sha256",
            hint="try again; if it happens twice, check the board's storage",
        )
    return answers


def _session_of(outcome: Outcome, kind: str) -> Session:
    return next(s for s in outcome.sessions if s["kind"] == kind)


def _is_delegated(sessions: Sequence[Session], arm: str) -> bool | None:
    """Whether XNNPACK runs any part of the model there; None where the board does not tell."""
    for session in sessions:
        data = session["data"] or {}
        if session["kind"] == "outputs" and isinstance(data.get("delegated"), bool):
            return bool(data["delegated"])
        if session["kind"] == "ops" and session["arms"] == [arm] and data:
            return any(op["where"] == "delegate" for op in data["ops"])
    return None


def _check_demands(options: MeasureOptions, left_out: Mapping[str, str], address: str) -> None:
    """Raise NotReadyError where something was asked for that this board cannot give."""
    for kind in ("energy", "instructions"):
        if getattr(options, kind) is True and kind in left_out:
            raise NotReadyError(
                f"{address} cannot measure {kind}: {left_out[kind]}",
                hint=f'use {kind} = "auto" to measure it only where the board can',
                code=f"no-{kind}",
            )


def _check_energy(options: MeasureOptions, outcome: Outcome, device: Device) -> None:
    if options.energy is not True:
        return
    session = _session_of(outcome, "energy")
    if session["data"] is None:
        raise NotReadyError(
            f"{device.address} cannot tell its energy: {session['cause']['message']}",
            hint='use energy = "auto" to measure it only where the board can',
            code="no-energy",
        )


# ----------------------------------------------------------------------------------- context


def _context(
    models: Mapping[str, Artifact],
    profile: DeviceProfile,
    options: MeasureOptions,
    job: Mapping[str, Any],
    board: Board,
    outcome: Outcome,
    facts: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """What makes the figures comparable: one dict shared by all measurements."""
    model, baseline = list(models.values())[-1], models.get(BASE)
    device, runtime, sessions = facts["device"], outcome.runtime, outcome.sessions
    zones = profile.thermal.zones
    befores = [hottest_c(s["before"], zones) for s in sessions]
    afters = [t for s in sessions if (t := hottest_c(s["after"], zones)) is not None]
    differs = (runtime.get("name"), runtime.get("version")) != (
        profile.runtime,
        profile.runtime_version,
    )
    if runtime and differs:
        log.warning(
            "measured with %s %s; profile %s asks for %s %s",
            runtime.get("name"), runtime.get("version"), profile.name, profile.runtime,
            profile.runtime_version,
        )  # fmt: skip
    governor = sessions[0]["before"].get("governor") if sessions else None
    departures = _departures(profile, device, runtime, governor)
    for departure in departures:
        log.warning("profile %s: %s", profile.name, departure)
    signatures = {"model_signature": model, "baseline_signature": baseline}
    compared: dict[str, Any] = {k: m.signature for k, m in signatures.items() if m and m.signature}
    compared |= {} if baseline is None else {
        "baseline_sha256": baseline.sha256, "baseline_bytes": baseline.size_bytes,
        "baseline_inputs": _model_inputs(sessions, BASE),
        "tolerance": options.tolerance,
    }  # fmt: skip
    return {
        "model_sha256": model.sha256,
        "model_bytes": model.size_bytes,
        **compared,
        "profile": profile.name,
        "device": board.device.address,
        "device_model": device.get("model"),
        "device_identity": device.get("identity"),
        "machine": device.get("machine"),
        "cpu": device.get("cpu"),
        "cpus": device.get("cpus"),
        "cpu_model": name_cores(device.get("cpu_model")),
        "emulated": why_emulated(profile, device),
        "kernel": device.get("kernel"),
        "os": device.get("os"),
        "glibc": device.get("glibc"),
        "python": device.get("python"),
        "page_size_bytes": device.get("page_size_bytes"),
        "boot_id": outcome.boot_id,
        "simulated": bool(facts.get("simulated") or device.get("simulated")),
        "model_inputs": _model_inputs(sessions, list(models)[-1]),
        "runtime": runtime.get("name"),
        "runtime_version": runtime.get("version"),
        "runtime_sha256": runtime.get("sha256"),
        "runtime_differs_from_profile": bool(runtime) and differs,
        "backend": runtime.get("backend"),
        "backends_rejected": outcome.rejected,
        "kernel_mode": job["kernel"],
        "weight_cache": options.weight_cache,
        "runner": "agent" if board.c_board is None else "c",
        "runner_sha256": board.payload.sha256,
        "runner_compiler": board.c_board.compiler if board.c_board is not None else None,
        "threads": job["threads"],
        "affinity": job["affinity"],
        "warmup_s": options.warmup,
        "session_s": options.session,
        "seed": options.seed,
        "governor": governor,
        "departs_from_profile": departures,
        "required_delegated_share": profile.delegation.min_share if profile.delegation else None,
        "budgets": dataclasses.asdict(profile.budgets),
        "temperature_before_c": befores[0] if befores else None,
        "temperature_after_c": max(afters) if afters else None,
        "killed_and_repeated": outcome.repeated,
        "resumed_sessions": outcome.resumed,
        "not_measured": {
            **left_out,
            **{s["kind"]: s["cause"]["message"] for s in sessions if s["data"] is None},
        },
    }  # fmt: skip


def _check_zones(health: Mapping[str, Any], profile: DeviceProfile, address: str) -> None:
    """A zone that is not there would be cold for ever."""
    there = {name.partition(":")[2] for name in health.get("temperatures_c") or {}}
    missing = [zone for zone in profile.thermal.zones if zone not in there]
    if missing:
        raise ProfileError(
            f"{address} has no thermal zone {', '.join(missing)}, which profile {profile.name} watches",
            hint=f"it has {', '.join(sorted(there)) or 'none'}: mend zones under [thermal]",
            code="wrong-profile",
        )


def _departures(
    profile: DeviceProfile,
    device: Mapping[str, Any],
    runtime: Mapping[str, Any],
    governor: str | None,
) -> list[str]:
    """In what the board that measured is not as its profile says, but for the runtime's version."""
    # a phone's own, where the runner came with a glibc
    libc = device.get("libc") or (device.get("glibc") and f"glibc {device['glibc']}")
    compared = (
        ("governor", profile.governor, governor, "any"),
        ("page_size_bytes", profile.page_size_bytes, device.get("page_size_bytes"), 0),
        ("os", profile.os, device.get("os"), "any"),
        ("libc", profile.libc, libc, "any"),
        ("runtime_sha256", profile.runtime_sha256, runtime.get("sha256"), ""),
    )
    return [
        f"{fact} is {actual if actual is not None else 'not known'}, not {expected}"
        for fact, expected, actual, left_open in compared
        if expected not in (left_open, actual)
    ]


def _model_inputs(sessions: Sequence[Session], arm: str) -> list[dict[str, Any]]:
    """Name, shape and dtype of the model's inputs, as the runtime on the board sees them."""
    for session in sessions:
        data, tensors = session["data"] or {}, None
        if session["kind"] == "latency":
            tensors = data["arms"][arm].get("inputs")
        elif session["arms"] == [arm]:
            tensors = data.get("inputs")
        if tensors:
            return [{key: t.get(key) for key in ("name", "shape", "dtype")} for t in tensors]
    return []
