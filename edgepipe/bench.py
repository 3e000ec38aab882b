"""Preflight, push, run on the device, and what came back as Measurements."""

from __future__ import annotations

import base64
import binascii
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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from edgepipe import stats
from edgepipe.artifact import Artifact, hash_path
from edgepipe.device.base import Device
from edgepipe.errors import (
    ArtifactError,
    Busy,
    CommandFailed,
    CommandTimeout,
    DeviceError,
    MissingExtra,
    NotReadyError,
    NotStable,
    ProfileError,
    RequestError,
    TransferError,
)
from edgepipe.evaluate import device_measurements
from edgepipe.measurement import Measurement, single
from edgepipe.metrics import METRICS
from edgepipe.payload import push_payload
from edgepipe.profile import DeviceProfile, absolute_work_dir
from edgepipe.runtime import has_runtime_library, runtime_library
from edgepipe.schema import Unit, record
from edgepipe.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from edgepipe.tflite_ops.raw import RawSamples

log = logging.getLogger(__name__)

SCHEMA = 1
PYTHON_NEEDED = (3, 7)
# A session shorter than this says nothing about percentiles (44 samples bound a p90 at 99 %).
MIN_INFERENCES = 30
# What Linux is built for on the largest boards and servers (CONFIG_NR_CPUS, 8192 on x86).
MAX_CPUS = 8192
# Longer than any measurement, shorter than what poll(2) can wait (2**31 ms).
MAX_BUDGET_S = 86400.0
# How long the lease on a board outlives one call of ours: time for the next call to arrive.
LEASE_S = 30.0
# How long to wait for a hot board, and how often to look (MEASUREMENT: 120 s).
COOL_DOWN_S = 120.0
COOL_DOWN_POLL_S = 5.0
# What a short command may take on a slow board over a slow link.
COMMAND_TIMEOUT_S = 60.0
# On top of the time a session may take on the board: the link, and starting Python twice.
LINK_MARGIN_S = 60.0
# A worker that somebody killed is tried again this many times.
MAX_KILLED = 2
# Load counts as cold when at most this share of the file's pages was still in memory.
COLD_RESIDENT_SHARE = 0.05
# The board keeps this much free: the runner writes a few kB.
MIN_FREE_BYTES = 1 << 20
# Flags that disqualify a session, with the cause the record states. None depends on its latency.
DISQUALIFYING = {
    "throttled_now": "throttled",
    "throttle_event": "throttled",
    "cooling_rose": "throttled",
    "clock_jump": "clock jump",
    "swapped_in": "swap-in",
    "rebooted": "reboot",
}


@record
class MeasureOptions:
    """How a model is measured: ``[measure]`` in a recipe.

    ``threads`` 0 means what the device profile says. ``warmup`` and ``session`` are per session, a
    fresh process each; a session lasts at least 30 inferences. ``affinity`` lists the CPU numbers
    to stay on (empty: all). ``budget`` bounds the whole measurement; ``max_age`` is how long a run
    may use it again.
    """

    threads: int = 0
    sessions: int = 3
    memory_sessions: int = 2
    warmup: Annotated[float, Unit("time")] = 0.5
    session: Annotated[float, Unit("time")] = 2.0
    backend: Literal["auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter"] = (
        "auto"
    )
    affinity: tuple[int, ...] = ()
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
        if problems:
            raise RequestError(
                f"[measure] {'; '.join(problems)}", hint="mend these options and run again"
            )


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What one model did on one board.

    ``device_facts`` is what the board said of itself, ``raw`` every reply of the runner as it came.
    A model that does not run has the single measurement ``runs_on_device`` = 0, whose context says
    why under ``reason``.
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
    keep: bool = False,
) -> BenchResult:
    """Measure ``model`` (kind ``tflite``) on ``device``, which ``profile`` describes.

    ``samples`` are real values by input name, (N, ...) in the source layout; with them the board's
    outputs are compared with this host's (``device_mismatch``). ``keep`` leaves the job's files on
    the board. Models, runtimes and runners stay there anyway, named by their hash, so that the next
    measurement pushes nothing.

    A model that crashes or does not fit is a result. Raises NotReadyError (no Python, no runtime,
    Busy, too hot, budget used up, broken link), ProfileError where the board is not what the
    profile says, ArtifactError and RequestError for what cannot be measured at all.
    """
    if model.kind != "tflite":
        raise ArtifactError(
            f"{model.path} is a {model.kind} model; a device measures .tflite files",
            hint="convert it first: edgepipe convert",
        )
    encoded = None
    if samples is not None:
        from edgepipe.tflite_ops.raw import encode_samples

        encoded = encode_samples(model.path, samples, model.inputs)
    board = _prepare_board(device, profile)
    facts = _cool_down(board, profile)
    _check_machine(facts["device"], profile, device)
    job_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
    job_dir = f"{board.work_dir}/jobs/{job_id}"
    try:
        job = _push_all(board, profile, options, model, facts, job_id, encoded)
        replies, failure = _run_sessions(board, profile, options, job, job_dir)
    finally:
        _clean_up(board, job_id, job_dir, keep)
    device_facts = {**facts["device"], "packages": facts["packages"]}
    raw = {"schema": SCHEMA, "job": job["id"], "facts": facts, "replies": replies}
    context = _context(model, profile, options, job, board, replies, device_facts)
    if failure is not None:
        log.info("the model does not run on the device: %s", failure["message"])
        context = {**context, "reason": failure["message"], "cause": failure}
        return BenchResult((single("runs_on_device", "", 0, context),), device_facts, raw)
    sessions = [session for reply in replies for session in reply["sessions"] if session["data"]]
    measurements = to_measurements(sessions, context, threads=job["threads"])
    if encoded is not None:
        measurements += (_device_mismatch(model, encoded, sessions, context, device.address),)
    return BenchResult(measurements, device_facts, raw)


# ------------------------------------------------------------------------------- preflight, push


@dataclasses.dataclass(frozen=True)
class _Board:
    device: Device
    work_dir: str
    runner: str
    runner_sha256: str

    def run_runner(self, *arguments: str, timeout_s: float) -> dict[str, Any]:
        done = self.device.run(["python3", self.runner, *arguments], timeout_s=timeout_s)
        return parse_reply(
            done.stdout, stderr=done.stderr, returncode=done.returncode, address=self.device.address
        )

    def facts(self) -> dict[str, Any]:
        reply = self.run_runner("facts", self.work_dir, timeout_s=COMMAND_TIMEOUT_S)
        for key in ("device", "health", "packages"):
            if not isinstance(reply.get(key), dict):
                raise _garbage(f"its facts have no {key}", b"", b"", self.device.address)
        if not _is_temperature(reply["health"].get("temperature_c")):
            raise _garbage("its temperature is no number", b"", b"", self.device.address)
        return reply


def _prepare_board(device: Device, profile: DeviceProfile) -> _Board:
    """Find Python and the home folder there, and push the runner."""
    question = 'import json,os,sys; print(json.dumps([os.path.expanduser("~"), list(sys.version_info[:3])]))'  # fmt: skip
    done = device.run(["python3", "-c", question], timeout_s=COMMAND_TIMEOUT_S)
    if done.returncode in (126, 127):
        raise NotReadyError(
            f"{device.address} has no python3: {_tail(done.stderr)}",
            hint="on the device: sudo apt-get install python3",
            code="no-python",
        )
    try:
        home, version = json.loads(done.stdout)
        version = tuple(int(n) for n in version)
        home = str(home)
    except (ValueError, TypeError) as exc:
        raise _garbage("python3 did not answer", done.stdout, done.stderr, device.address) from exc
    if version < PYTHON_NEEDED:
        raise NotReadyError(
            f"python3 on {device.address} is {'.'.join(map(str, version))}; "
            f"the runner needs {'.'.join(map(str, PYTHON_NEEDED))}",
            hint="on the device: sudo apt-get install python3 (of a newer release)",
            code="no-python",
        )
    work_dir = absolute_work_dir(profile.work_dir, home)
    payload = push_payload(device, profile.target, work_dir)
    return _Board(device, work_dir, payload.entry, payload.sha256)


def _cool_down(board: _Board, profile: DeviceProfile) -> dict[str, Any]:
    """The board's facts, once it is cool enough. Raises NotStable after COOL_DOWN_S."""
    limit_c, started = profile.thermal.start_below, time.monotonic()
    while True:
        facts = board.facts()
        temperature_c = facts["health"].get("temperature_c")
        if temperature_c is None or temperature_c < limit_c:
            return facts
        waited_s = time.monotonic() - started
        if waited_s >= COOL_DOWN_S:
            raise NotStable(
                f"{board.device.address} is at {temperature_c:.1f} C after waiting {waited_s:.0f} s; "
                f"measuring starts below {limit_c:g} C (profile {profile.name})",
                hint="give it a heat sink or a fan, or stop what it is doing",
                code="too-hot",
            )
        log.info("waiting for the device to cool down: %.1f C, starts below %g C", temperature_c, limit_c)  # fmt: skip
        time.sleep(COOL_DOWN_POLL_S)


def _check_machine(facts: Mapping[str, Any], profile: DeviceProfile, device: Device) -> None:
    machine = facts.get("machine")
    if profile.machine != "any" and machine != profile.machine:
        raise ProfileError(
            f"{device.address} runs {machine} programs, profile {profile.name} describes a "
            f"{profile.machine} board",
            hint="choose the profile of this board with --profile; `edgepipe devices list` shows them",
            code="wrong-profile",
        )


def _push_all(
    board: _Board,
    profile: DeviceProfile,
    options: MeasureOptions,
    model: Artifact,
    facts: Mapping[str, Any],
    job_id: str,
    samples: RawSamples | None,
) -> dict[str, Any]:
    """Push what the job needs, by hash, and return the job (without its sessions)."""
    device = board.device
    log.info("pushing %s (%s) to %s", model.path.name, format_bytes(model.size_bytes), device.address)  # fmt: skip
    remote = f"{board.work_dir}/models/{model.sha256}.tflite"
    if hash_path(model.path) != model.sha256:
        raise ArtifactError(
            f"{model.path} has changed since its record was made", hint="run the recipe again"
        )
    device.push(model.path, remote)
    return {
        "schema": SCHEMA,
        "id": job_id,
        "owner": f"{_user_name()}@{socket.gethostname()}",
        "work_dir": board.work_dir,
        "model": {"path": remote, "size": model.size_bytes, "sha256": model.sha256},
        "runtime": _push_runtime(board, profile, options, facts),
        "inputs": _push_samples(board, job_id, samples),
        "backend": options.backend,
        "threads": options.threads or profile.threads,
        "affinity": list(options.affinity),
        "warmup_s": options.warmup,
        "session_s": options.session,
        "min_inferences": MIN_INFERENCES,
        "seed": options.seed,
        "sessions": [],
        "budget_s": options.budget,
        "lease_s": LEASE_S,
        "min_free_bytes": MIN_FREE_BYTES,
    }


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in many containers
        return f"uid {os.getuid()}"


def _push_runtime(
    board: _Board, profile: DeviceProfile, options: MeasureOptions, facts: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Push libLiteRt.so where the profile's runtime is LiteRT and there is one for this board.

    With backend ``auto`` a board it cannot run on goes on to the runtimes installed there.
    """
    wanted = options.backend
    if wanted not in ("auto", "litert-c"):
        return None
    machine, version = str(facts["device"].get("machine")), profile.runtime_version
    why_not = ""
    if profile.runtime != "litert":
        why_not = f"profile {profile.name} asks for {profile.runtime}"
    elif not has_runtime_library(machine, version):
        why_not = f"there is no LiteRT {version} library for {machine}"
    if wanted == "litert-c" and why_not:
        raise RequestError(
            f"backend litert-c cannot be used on {board.device.address}: {why_not}",
            hint='use backend = "auto", or the interpreter installed on the board',
        )
    if why_not:
        log.info("no runtime is pushed (%s); using what is installed on the device", why_not)
        return None
    try:
        library = runtime_library(machine, version)
    except MissingExtra as exc:
        if wanted == "litert-c" or not facts["packages"]:
            raise
        log.warning("no runtime is pushed (%s); using what is installed on the device", exc.message)
        return None
    remote = f"{board.work_dir}/rt/{library.sha256}/{library.path.name}"
    board.device.push(library.path, remote)
    return {
        "path": remote,
        "size": library.path.stat().st_size,
        "sha256": library.sha256,
        "version": library.version,
        "glibc": library.glibc,
    }


def _push_samples(board: _Board, job_id: str, samples: RawSamples | None) -> dict[str, Any] | None:
    if samples is None:
        return None
    remote = f"{board.work_dir}/jobs/{job_id}/inputs.bin"
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = Path(folder) / "inputs.bin"
        path.write_bytes(samples.data)
        board.device.push(path, remote)
    return {
        "path": remote,
        "size": len(samples.data),
        "sha256": hashlib.sha256(samples.data).hexdigest(),
        "count": samples.count,
        "tensors": list(samples.tensors),
    }


# ----------------------------------------------------------------------------------- running


def _run_sessions(
    board: _Board,
    profile: DeviceProfile,
    options: MeasureOptions,
    job: dict[str, Any],
    job_dir: str,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """All sessions, one call of the runner each -> (replies, why the model does not run or None)."""
    plan = ["outputs"] if job["inputs"] else []
    plan += ["memory"] * options.memory_sessions + ["latency"] * options.sessions
    totals = {kind: plan.count(kind) for kind in plan}
    done: dict[str, int] = dict.fromkeys(plan, 0)
    deadline_s = time.monotonic() + options.budget
    replies: list[dict[str, Any]] = []
    backend = job["backend"]
    killed = 0
    while plan:
        kind = plan[0]
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise _over_budget(board, options, f"before {kind} session {done[kind] + 1}")
        call = {**job, "sessions": [kind], "backend": backend, "budget_s": left_s}
        reply = _call(board, call, f"{job_dir}/job-{len(replies)}.json", left_s)
        replies.append(reply)
        if reply["code"] == 70 and reply.get("runs_on_device") is False:
            return replies, reply["cause"]
        if reply["code"] == 70:  # somebody killed the worker, which says nothing of the model
            killed += 1
            if killed > MAX_KILLED:
                raise NotStable(
                    f"on {board.device.address} {reply['message']}, {killed} times",
                    hint="find out what kills processes there (systemd-oomd, a watchdog, a person)",
                    code="worker-killed",
                )
            log.warning("%s: trying the session again", reply["message"])
            continue
        if reply["code"] != 0:
            _raise_for(reply, board, options, profile)
        if [s["kind"] for s in reply["sessions"] if s["data"]] != [kind]:
            raise _garbage(f"the runner did not give one {kind} session", b"", b"", board.device.address)  # fmt: skip
        backend = reply["runtime"]["backend"]  # what was chosen once is demanded from now on
        done[kind] += 1
        plan.pop(0)
        session = reply["sessions"][0]
        log.info("%s", _progress(session, done[kind], totals[kind]))
        hottest_c = session["after"].get("temperature_c")
        if hottest_c is not None and hottest_c > profile.thermal.abort_above:
            raise NotStable(
                f"{board.device.address} reached {hottest_c:.1f} C, profile {profile.name} stops "
                f"measuring above {profile.thermal.abort_above:g} C",
                hint="give it a heat sink or a fan, or a shorter session",
                code="too-hot",
            )
    return replies, None


def _call(board: _Board, job: dict[str, Any], remote: str, budget_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        board.device.push(path, remote)
    return board.run_runner(remote, timeout_s=budget_s + LINK_MARGIN_S)


def _clean_up(board: _Board, job_id: str, job_dir: str, keep: bool) -> None:
    """Give the lease back and remove the job's files; a failure here must not hide the result."""
    # the owner file is ours only where it names our job; the runner's own flock is gone by now
    release = (
        "import fcntl,json,sys\n"
        "try:\n"
        "    f = open(sys.argv[1], 'r+')\n"
        "    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    if json.load(f).get('job') == sys.argv[2]: f.truncate(0)\n"
        "except (OSError, ValueError): pass\n"
    )
    device = board.device
    with contextlib.suppress(DeviceError):
        lock = f"{board.work_dir}/lock"
        device.run(["python3", "-c", release, lock, job_id], timeout_s=COMMAND_TIMEOUT_S)
        if not keep:
            device.run(["rm", "-rf", job_dir], timeout_s=COMMAND_TIMEOUT_S)


def _progress(session: Mapping[str, Any], number: int, total: int) -> str:
    data, kind = session["data"], session["kind"]
    if kind == "latency":
        wall, cpu = (
            stats.percentile([ns / data["inner_loops"] / 1e9 for ns in data[key]], 0.5)
            for key in ("wall_ns", "cpu_ns")
        )
        text = f"session {number}/{total}: p50 {format_seconds(wall)}, cpu {format_seconds(cpu)}"
    elif kind == "memory":
        parts = [
            f"{name} {format_bytes(data[key])}"
            for name, key in (
                ("anon", "anon_bytes"),
                ("file", "file_bytes"),
                ("peak", "peak_bytes"),
            )
            if data[key] is not None
        ]
        text = f"memory {number}/{total}: {', '.join(parts)}"
    else:
        text = f"outputs for {len(data['samples'])} samples"
    return f"{text} [{', '.join(session['flags'])}]" if session["flags"] else text


# ------------------------------------------------------------------------- the runner's replies


def parse_reply(
    stdout: bytes, *, stderr: bytes = b"", returncode: int = 0, address: str = "the device"
) -> dict[str, Any]:
    """The runner's one JSON object, checked. Pure. Raises CommandFailed on anything else."""

    def refuse(why: str) -> NoReturn:
        raise _garbage(why, stdout, stderr, address)

    try:
        reply = json.loads(stdout)
    except ValueError:
        refuse(f"the runner (exit {returncode}) did not print one JSON object")
    if not isinstance(reply, dict) or not isinstance(reply.get("schema"), int):
        refuse("the runner's answer has no schema number")
    if reply["schema"] > SCHEMA:
        raise RequestError(
            f"the runner on {address} answers with schema {reply['schema']}, this edgepipe reads "
            f"up to {SCHEMA}",
            hint="upgrade edgepipe",
        )
    if reply.get("code") != returncode:
        refuse(f"the runner's answer says code {reply.get('code')!r}, it ended with {returncode}")
    if not isinstance(reply.get("message"), str) or not isinstance(reply.get("sessions"), list):
        refuse("the runner's answer is not whole")
    cause = reply.get("cause")
    if reply["code"] == 70 and not (
        isinstance(cause, dict) and isinstance(cause.get("message"), str)
    ):
        refuse("the runner's answer gives no cause")
    if not isinstance(reply.get("owner"), dict | None):
        refuse("the runner's answer names no owner")
    if reply["sessions"] and not isinstance(reply.get("runtime"), dict):
        refuse("the runner's answer names no runtime")
    for session in reply["sessions"]:
        problem = _session_problem(session)
        if problem:
            refuse(f"a session of the runner's answer {problem}")
    return reply


def _session_problem(session: object) -> str:
    """What is wrong with one session of a reply, or an empty string."""
    if not isinstance(session, dict):
        return "is no object"
    for key in ("before", "after"):
        if not isinstance(session.get(key), dict):
            return "has no health"
        if not _is_temperature(session[key].get("temperature_c")):
            return "has a temperature that is no number"
    if not _is_list_of(session.get("flags"), str):
        return "has no flags"
    data, kind = session.get("data"), session.get("kind")
    if data is None:
        return "" if isinstance(session.get("cause"), dict) else "has neither data nor a cause"
    if not isinstance(data, dict):
        return "has no data"
    if kind == "memory":
        keys = ("anon_bytes", "file_bytes", "peak_bytes")
        fine = all(key in data and _is_count(data[key], or_none=True) for key in keys)
        return "" if fine else "has no memory figures"
    if kind == "outputs":
        fine = _is_list_of(data.get("samples"), list) and _is_list_of(data.get("outputs"), dict)
        return "" if fine else "has no outputs"
    if kind != "latency":
        return f"is of the unknown kind {kind!r}"
    cold = data.get("cold")
    fine = (
        _is_counts(data.get("wall_ns"))
        and _is_counts(data.get("cpu_ns"))
        and len(data["wall_ns"]) == len(data["cpu_ns"]) > 0
        and _is_counts(data.get("warmup_wall_ns"))
        and _is_count(data.get("inner_loops"))
        and data["inner_loops"] > 0
        and _is_count(data.get("load_ns"))
        and _is_count(data.get("first_inference_ns"))
        and isinstance(cold, dict)
        and _is_count(cold.get("load_ns"))
        and isinstance(cold.get("resident_share"), int | float | None)
    )
    return "" if fine else "has no latency samples"


def _is_temperature(value: object) -> bool:
    return isinstance(value, int | float | None)


def _is_count(value: object, *, or_none: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return or_none and value is None
    return abs(value) < 2**63  # memory can shrink: negative growth is a fact


def _is_counts(values: object) -> bool:
    return isinstance(values, list) and all(_is_count(v) and v >= 0 for v in values)


def _is_list_of(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


def _garbage(why: str, stdout: bytes, stderr: bytes, address: str) -> CommandFailed:
    seen = _tail(stdout) or _tail(stderr) or "nothing"
    return CommandFailed(
        f"{why} on {address}; it printed: {seen}",
        hint="does a start-up file there (~/.bashrc) print something? it must not without a terminal",
        code="bad-runner-output",
    )


def _tail(raw: bytes, limit: int = 300) -> str:
    text = raw.decode("utf-8", "replace").strip()
    return text if len(text) <= limit else "..." + text[-limit:]


def _raise_for(
    reply: Mapping[str, Any], board: _Board, options: MeasureOptions, profile: DeviceProfile
) -> NoReturn:
    """The error for a reply whose code is neither 0 nor 70."""
    code, message, address = reply["code"], reply["message"], board.device.address
    if code == 75:
        owner = reply.get("owner") or {}
        who = f" (job {owner.get('job')} of {owner.get('owner')})" if owner else ""
        raise Busy(f"{address} is busy: {message}{who}", hint="wait for it to end, then try again")
    if code == 69:
        raise NotReadyError(
            f"no usable runtime on {address}: {message}",
            hint=_runtime_hint(profile, options, reply.get("device") or {}),
            code="no-runtime",
        )
    if code == 65:
        raise TransferError(f"{address} does not hold what was pushed: {message}", hint="try again; if it happens twice, check the board's storage")  # fmt: skip
    if code == 73:
        raise TransferError(f"the disk of {address} is full: {message}", hint=f"free some space there, for example rm -r {board.work_dir}/models", code="disk-full")  # fmt: skip
    if code == 124:
        raise _over_budget(board, options, message)
    if code == 71:
        raise CommandFailed(
            f"the runner on {address} cannot use a file: {message}",
            hint=f"is {board.work_dir} this user's own? mend its permissions, or choose another work_dir",
            code="work-dir-unusable",
        )
    if reply.get("error") == "bad-request":
        raise RequestError(
            f"{address} cannot measure as asked: {message}",
            hint="change affinity or the samples, or leave them out",
        )
    raise CommandFailed(
        f"the runner on {address} ended with code {code}: {message}",
        hint="this is a bug in edgepipe: please report it with --debug",
        code="runner-failed",
    )


def _over_budget(board: _Board, options: MeasureOptions, what: str) -> CommandTimeout:
    return CommandTimeout(
        f"measuring on {board.device.address} took longer than {options.budget:g} s: {what}",
        hint="raise the budget, or ask for fewer or shorter sessions",
        code="over-budget",
    )


def _runtime_hint(profile: DeviceProfile, options: MeasureOptions, facts: Mapping[str, Any]) -> str:
    if options.backend == "tflite-runtime-interpreter" or facts.get("machine") == "armv7l":
        return "on the device, with Python 3.8 to 3.11: python3 -m pip install tflite-runtime==2.14.0 'numpy<2'"  # fmt: skip
    return (
        f"on the device: python3 -m pip install ai-edge-litert=={profile.runtime_version} "
        "(Debian 12, Ubuntu 22.04 or newer)"
    )


# ------------------------------------------------------------------------------- measurements


def exclusion(session: Mapping[str, Any], boot_id: object) -> str:
    """Why a session does not count, from causes independent of its latency; or an empty string."""
    causes = [DISQUALIFYING[flag] for flag in session["flags"] if flag in DISQUALIFYING]
    if session["before"].get("boot_id") != boot_id or session["after"].get("boot_id") != boot_id:
        causes.append("reboot")
    return ", ".join(sorted(set(causes)))


def to_measurements(
    sessions: Sequence[Mapping[str, Any]], context: Mapping[str, Any], *, threads: int
) -> tuple[Measurement, ...]:
    """Sessions of the runner -> measurements in SI units with their context. Pure.

    Nanoseconds of a batch are divided by its number of inferences. ``latency_cpu`` exists only with
    one thread, ``load_cold`` only counts sessions whose file really was out of the page cache.
    """
    boot_id = context["boot_id"]
    latency = [s for s in sessions if s["kind"] == "latency"]
    memory = [s for s in sessions if s["kind"] == "memory"]
    unfit = {i: why for i, s in enumerate(latency) if (why := exclusion(s, boot_id))}
    context = {
        **context,
        "contended": any(
            s["data"].get("contended") for i, s in enumerate(latency) if i not in unfit
        ),
        "sessions": [_session_context(s) for s in latency],
    }

    def one_per_session(metric: str, values: list[float], excluded: Mapping[int, str]) -> Measurement:  # fmt: skip
        rows = tuple((value,) for value in values)
        return Measurement(metric, METRICS[metric].unit, rows, excluded=dict(excluded), context=context)  # fmt: skip

    def batches(key: str) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(ns / 1e9 / s["data"]["inner_loops"] for ns in s["data"][key]) for s in latency
        )

    warmups = tuple(tuple(ns / 1e9 for ns in s["data"]["warmup_wall_ns"]) for s in latency)
    found = [single("runs_on_device", "", 1, context)]
    if latency:
        found.append(Measurement("latency_wall", "s", batches("wall_ns"), warmups, unfit, context))
        if threads == 1:
            found.append(Measurement("latency_cpu", "s", batches("cpu_ns"), (), unfit, context))
        warm = dict(unfit)
        for i, session in enumerate(latency):
            share = session["data"]["cold"].get("resident_share")
            if share is None or share > COLD_RESIDENT_SHARE:
                warm.setdefault(i, "the file stayed in the page cache")
        datas = [s["data"] for s in latency]
        found += [
            one_per_session("load", [d["load_ns"] / 1e9 for d in datas], unfit),
            one_per_session("load_cold", [d["cold"]["load_ns"] / 1e9 for d in datas], warm),
            one_per_session("first_inference", [d["first_inference_ns"] / 1e9 for d in datas], unfit),
        ]  # fmt: skip
    unfit_memory = {i: why for i, s in enumerate(memory) if (why := exclusion(s, boot_id))}
    for metric in ("memory_anon", "memory_file", "memory_peak"):
        values = [s["data"][metric.removeprefix("memory_") + "_bytes"] for s in memory]
        if values and None not in values:
            found.append(one_per_session(metric, [float(v) for v in values], unfit_memory))
    return tuple(found)


def _session_context(session: Mapping[str, Any]) -> dict[str, Any]:
    data, before, after = session["data"], session["before"], session["after"]
    return {
        "flags": session["flags"],
        "inner_loops": data["inner_loops"],
        **{
            key: data.get(key)
            for key in (
                "cpu_share", "contended", "cpu_clock", "state", "run_queue_delay_ns",
                "involuntary_switches", "major_faults", "frequency_khz", "output_sha256",
                "load_parts_ns", "runtime_load_ns",
            )
        },
        "temperature_before_c": before.get("temperature_c"),
        "temperature_after_c": after.get("temperature_c"),
        "throttling": after.get("throttling"),
        "loadavg_1min": after.get("loadavg_1min"),
        "memory_available_bytes": after.get("memory_available_bytes"),
        "swap_used_bytes": after.get("swap_used_bytes"),
    }  # fmt: skip


def _context(
    model: Artifact,
    profile: DeviceProfile,
    options: MeasureOptions,
    job: Mapping[str, Any],
    board: _Board,
    replies: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What makes the figures comparable: one dict shared by all measurements."""
    sessions = [session for reply in replies for session in reply["sessions"]]
    runtime: Mapping[str, Any] = next((r["runtime"] for r in replies if r.get("runtime")), {})
    befores = [s["before"].get("temperature_c") for s in sessions]
    afters = [t for s in sessions if (t := s["after"].get("temperature_c")) is not None]
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
    return {
        "model_sha256": model.sha256,
        "model_bytes": model.size_bytes,
        "profile": profile.name,
        "device": board.device.address,
        "device_model": facts.get("model"),
        "device_identity": facts.get("identity"),
        "machine": facts.get("machine"),
        "cpu": facts.get("cpu"),
        "cpus": facts.get("cpus"),
        "kernel": facts.get("kernel"),
        "os": facts.get("os"),
        "glibc": facts.get("glibc"),
        "python": facts.get("python"),
        "page_size_bytes": facts.get("page_size_bytes"),
        "boot_id": facts.get("boot_id"),
        "runtime": runtime.get("name"),
        "runtime_version": runtime.get("version"),
        "runtime_sha256": runtime.get("sha256"),
        "runtime_differs_from_profile": bool(runtime) and differs,
        "backend": runtime.get("backend"),
        "backends_rejected": next((r["rejected"] for r in replies if r.get("rejected")), []),
        "runner_sha256": board.runner_sha256,
        "threads": job["threads"],
        "affinity": list(options.affinity),
        "warmup_s": options.warmup,
        "session_s": options.session,
        "seed": options.seed,
        "governor": sessions[0]["before"].get("governor") if sessions else None,
        "temperature_before_c": befores[0] if befores else None,
        "temperature_after_c": max(afters) if afters else None,
        "killed_and_repeated": sum(r["code"] == 70 for r in replies),
    }


def _device_mismatch(
    model: Artifact,
    samples: RawSamples,
    sessions: Sequence[Mapping[str, Any]],
    context: Mapping[str, Any],
    address: str,
) -> Measurement:
    """Share of output values that differ between the board and this host, bit for bit."""
    data = next(s["data"] for s in sessions if s["kind"] == "outputs")
    try:
        answers = [[base64.b64decode(raw, validate=True) for raw in one] for one in data["samples"]]
    except (binascii.Error, KeyError, TypeError) as exc:
        raise _garbage(f"outputs cannot be decoded ({exc})", b"", b"", address) from exc
    raw = b"".join(part for one in answers for part in one)
    return device_measurements(model, samples, data["outputs"], raw, context)[0]
