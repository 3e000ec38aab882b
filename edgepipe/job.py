"""The conversation with the agent of a board: start a job there, follow it, survive what goes wrong.

The job runs detached on the board and writes every finished session to a journal. So a link that
breaks, a host that is killed and an agent that dies cost no finished session: all steps here may be
repeated, and starting a job again goes on where its journal ends.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgepipe.device.base import Device
from edgepipe.errors import (
    Busy,
    CommandFailed,
    CommandTimeout,
    NotReadyError,
    NotStable,
    RequestError,
    TransferError,
)
from edgepipe.payload import Payload
from edgepipe.sessions import Session

log = logging.getLogger(__name__)

SCHEMA = 2
# How long the agent holds one request for news before it answers that there are none.
POLL_WAIT_S = 20.0
# What a short command may take on a slow board over a slow link, on top of what it waits there.
COMMAND_TIMEOUT_S = 60.0
# On top of the time a session may take: a heartbeat this old is that of a dead agent.
HEARTBEAT_MARGIN_S = 60.0
# The board keeps the budget itself; this much later the host stops waiting for it.
BUDGET_MARGIN_S = 60.0
# An agent found dead, or a request without an answer, is tried again so often in one job.
MAX_STRIKES = 3
# After one reboot everything is measured again; a board that reboots twice is not fit.
MAX_REBOOTS = 1
ENDED = ("done", "failed")
# Kinds of session that not every board or backend can do, which says nothing of the model.
OPTIONAL = ("ops", "energy", "instructions")


# the line that tells of a session: of which number, of how many of its kind
Progress = Callable[[Session, int, int], str]


@dataclasses.dataclass(frozen=True)
class Journal:
    """The trusted part of a journal: its whole lines up to the first that is ``damaged``."""

    lines: tuple[dict[str, Any], ...]
    damaged: bool


@dataclasses.dataclass(frozen=True)
class Status:
    """One answer of the agent. ``state`` is None where the board knows no such job."""

    code: int
    error: str | None
    message: str
    state: dict[str, Any] | None
    alive: bool
    rebooted: bool
    journal: str
    offset: int
    owner: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a plan. ``sessions`` are in the plan's order and carry their ``tag``; one that
    the board cannot do (of the kinds `OPTIONAL`) has ``data`` None and a ``cause``.

    ``failure`` is the cause why the model does not run, or None. ``runtime`` and ``rejected`` are
    the agent's choice of a backend. ``resumed`` counts sessions that an interrupted run of the same
    request had finished, ``repeated`` those whose worker somebody killed. ``journal`` is all of it.
    """

    sessions: tuple[Session, ...]
    failure: dict[str, Any] | None
    runtime: dict[str, Any]
    rejected: list[Any]
    resumed: int
    repeated: int
    boot_id: str | None
    journal: tuple[dict[str, Any], ...]


class BoardJob:
    """One job on one board: `find_earlier`, `run` (again with a longer plan), `end`.

    ``device`` should be a `RetryingDevice`. ``job`` is the content of job.json (schema 2) without
    its plan; its ``budget_s`` counts from the making of this object. ``runtime_hint`` is what
    mends a board without a runtime, ``progress(session, number, total)`` the line that tells the
    user of a finished session.
    """

    def __init__(
        self,
        device: Device,
        payload: Payload,
        job: Mapping[str, Any],
        job_dir: str,
        *,
        runtime_hint: str = "",
        progress: Progress | None = None,
    ) -> None:
        self.device, self.payload, self.job, self.job_dir = device, payload, dict(job), job_dir
        self.runtime_hint, self.progress = runtime_hint, progress or _plain_progress
        self.resumed = 0
        self._began_s = time.monotonic()
        self._strikes = self._reboots = 0
        self._shown: set[str] = set()

    @property
    def left_s(self) -> float:
        """What is left of the budget."""
        return float(self.job["budget_s"]) - (time.monotonic() - self._began_s)

    def find_earlier(self, *, board_time_s: float | None, max_age_s: float) -> int:
        """How many sessions an interrupted run of this very request has finished on the board.

        Those of a run that began more than ``max_age_s`` before ``board_time_s`` (both by the
        board's clock, seconds since the epoch) are removed: they are no part of this measurement.
        """
        status = self._ask("status", self.job_dir, "0", "0")
        if status.state is None:
            return 0
        journal = parse_journal(status.journal)
        began = [line["realtime_s"] for line in journal.lines if line["kind"] == "start"]
        age_s = board_time_s - began[0] if began and board_time_s is not None else None
        if status.rebooted or age_s is None or not 0 <= age_s <= max_age_s:
            self._ask("end", self.job_dir)
            return 0
        return self._take_over(finished(journal.lines))

    def run(self, plan: Sequence[Mapping[str, Any]]) -> Outcome:
        """Do what ``plan`` lists and is not finished yet; wait for it.

        Raises Busy, NotStable (too hot; ``worker-killed``; ``rebooted``; ``agent-lost``),
        NotReadyError (``no-runtime``), TransferError (a file was altered; ``disk-full``),
        CommandTimeout (``over-budget``), CommandFailed, RequestError, and what the device raises.
        """
        while True:
            try:
                return self._attempt(plan)
            except _AgentLost as exc:
                self._strikes += 1
                if self._strikes >= MAX_STRIKES:
                    raise NotStable(
                        f"the agent on {self.device.address} was lost {self._strikes} times while "
                        f"measuring: {exc}",
                        hint=f"what stops processes there? its log is {self.job_dir}/agent.log (keep it with --keep)",
                        code="agent-lost",
                    ) from exc
                log.warning("%s on %s: starting it again", exc, self.device.address)
                # one that hangs is stopped; what is finished stays
                self._ask("end", self.job_dir, "--keep")
            except _Rebooted:
                self._start_over()

    def end(self, *, keep: bool = False) -> None:
        """Stop the job, give the lease back and remove its files, unless ``keep``."""
        self._ask("end", self.job_dir, *(["--keep"] if keep else []))

    def _take_over(self, found: Mapping[str, Session]) -> int:
        """Sessions by tag of an interrupted run count, and nobody is told of them again."""
        self.resumed, self._shown = len(found), set(found)
        log.info("found the job of an interrupted run on %s: %d sessions are finished", self.device.address, self.resumed)  # fmt: skip
        return self.resumed

    def _start_over(self) -> None:
        """The board was restarted: nothing measured before may be mixed with what comes."""
        self._reboots += 1
        if self._reboots > MAX_REBOOTS:
            raise NotStable(
                f"{self.device.address} was restarted {self._reboots} times while measuring",
                hint="is its power supply strong enough? `dmesg` there may tell",
                code="rebooted",
            )
        log.warning("%s was restarted: measuring from the start", self.device.address)
        self.resumed, self._shown = 0, set()

    # ---------------------------------------------------------------------------------- one attempt

    def _attempt(self, plan: Sequence[Mapping[str, Any]]) -> Outcome:
        if self.left_s <= 0:
            raise self._over_budget("before all sessions were started")
        self._push({**self.job, "plan": list(plan), "budget_s": self.left_s})
        started = self._ask("start", self.job_dir)
        if started.state is None and started.code:
            self._raise_for(started.code, started.error, started.message, started.owner)
        lines, state = self._follow(plan)
        code = state["code"]
        cause: dict[str, Any] = state.get("cause") or next(
            (line["cause"] for line in reversed(lines) if line["kind"] == "end" and line.get("cause")),
            {},
        )  # fmt: skip
        start: dict[str, Any] = next(
            (line for line in reversed(lines) if line["kind"] == "start"), {}
        )
        found = finished(lines)
        failure = None
        if code == 70 and cause.get("what") != "killed":
            failure = {"message": state["message"], **cause}
        elif code == 70:
            raise NotStable(
                f"on {self.device.address} {state['message']}, again and again",
                hint="find out what kills processes there (systemd-oomd, a watchdog, a person)",
                code="worker-killed",
            )
        elif code == 76 or (code == 124 and self.left_s > 1):
            # an agent that an earlier run had started may have had less time than this one has
            raise _AgentLost(state["message"] or "it gave up")
        elif code != 0:
            self._raise_for(code, state["error"], state["message"], state.get("owner"))
        else:
            missing = [entry["tag"] for entry in plan if entry["tag"] not in found]
            if missing:
                raise _AgentLost(f"it left out {', '.join(missing)}")
        if not failure and not start:
            raise bad_answer("the journal has no start", "", "", self.device.address)
        return Outcome(
            sessions=tuple(
                {**found[entry["tag"]], "tag": entry["tag"]}
                for entry in plan
                if entry["tag"] in found
            ),
            failure=failure,
            runtime=start.get("runtime") or {},
            rejected=start.get("rejected") or [],
            resumed=self.resumed,
            repeated=sum(_is_killed(line) for line in lines),
            boot_id=start.get("boot_id"),
            journal=tuple(lines),
        )

    def _push(self, job: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(job), encoding="utf-8")
            self.device.push(path, f"{self.job_dir}/job.json")

    def _follow(
        self, plan: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Wait until the job has ended -> (all lines of its journal, its last state)."""
        longest_s = max([self.job["warmup_s"] + self.job["session_s"], *map(_duration_s, plan)])
        lines: list[dict[str, Any]] = []
        offset, looked_dead, was_cooling = 0, False, False
        beat: object = None
        beat_s = time.monotonic()
        while True:
            wait_s = 0.0 if looked_dead else POLL_WAIT_S
            status = self._ask("status", self.job_dir, str(offset), f"{wait_s:g}", wait_s=wait_s)
            if status.rebooted:
                raise _Rebooted
            if status.state is None and not status.alive:
                raise _AgentLost("its job is gone")
            new = parse_journal(status.journal)
            if new.damaged or status.offset - len(status.journal.encode()) != offset:
                raise _AgentLost("its journal was damaged")
            offset = status.offset
            lines += new.lines
            self._show(new.lines, plan)
            state = status.state or {"phase": "starting", "boottime_s": 0.0}
            if state["phase"] in ENDED:
                if offset >= state["journal_bytes"]:
                    return lines, state
                if not new.lines:
                    raise _AgentLost("its journal is shorter than it was")
                continue
            if not status.alive:
                if looked_dead:
                    raise _AgentLost("it died")
                looked_dead = True  # or it ended between its two answers: one more look
                continue
            looked_dead = False
            is_cooling = state["phase"] == "cooling"
            if is_cooling and not was_cooling:
                log.info("waiting for the device to cool down")
            was_cooling = is_cooling
            now_s = time.monotonic()
            if (state["boottime_s"], offset) != beat:
                beat, beat_s = (state["boottime_s"], offset), now_s
            elif now_s - beat_s > longest_s + HEARTBEAT_MARGIN_S:
                raise _AgentLost("it shows no sign of life")
            if self.left_s < -BUDGET_MARGIN_S:
                raise self._over_budget(f"in {state.get('tag') or 'a session'}")

    def _show(self, lines: Sequence[Mapping[str, Any]], plan: Sequence[Mapping[str, Any]]) -> None:
        """One line of progress for each new session."""
        for line in lines:
            if line["kind"] != "session" or line["tag"] in self._shown:
                continue
            session = line["session"]
            if session["data"] is None:
                if _is_killed(line):
                    log.warning("%s: trying the session again", session["cause"]["message"])
                continue
            self._shown.add(line["tag"])
            alike = [
                e["tag"]
                for e in plan
                if (e["kind"], e["arms"]) == (session["kind"], session["arms"])
            ]
            if line["tag"] in alike:
                log.info("%s", self.progress(session, alike.index(line["tag"]) + 1, len(alike)))

    # ------------------------------------------------------------------------------------- answers

    def _ask(self, *words: str, wait_s: float = 0.0) -> Status:
        """One verb of the agent. What hangs is asked again: every verb may be done twice."""
        command = ["python3", self.payload.entry, *words]
        for attempt in range(MAX_STRIKES):
            try:
                done = self.device.run(command, timeout_s=COMMAND_TIMEOUT_S + wait_s)
                break
            except CommandTimeout as exc:
                if attempt == MAX_STRIKES - 1:
                    raise
                log.warning("%s: asking again", exc.message)
        return parse_status(
            done.stdout, stderr=done.stderr, returncode=done.returncode, address=self.device.address
        )

    def _raise_for(
        self, code: int, error: str | None, message: str, owner: Mapping[str, Any] | None
    ) -> NoReturn:
        """The error for a job that ended with ``code`` (neither 0 nor a model that does not run)."""
        address, work_dir = self.device.address, self.job["work_dir"]
        if code == 75:
            who = f" (job {owner.get('job')} of {owner.get('owner')})" if owner else ""
            raise Busy(f"{address} is busy: {message}{who}", hint="wait for it to end, then try again")  # fmt: skip
        if code == 69:
            raise NotReadyError(f"no usable runtime on {address}: {message}", hint=self.runtime_hint, code="no-runtime")  # fmt: skip
        if code == 65:
            raise TransferError(f"{address} does not hold what was pushed: {message}", hint="try again; if it happens twice, check the board's storage")  # fmt: skip
        if code == 73:
            raise TransferError(f"the disk of {address} is full: {message}", hint=f"free some space there, for example rm -r {work_dir}/models", code="disk-full")  # fmt: skip
        if code == 78:
            raise NotStable(
                f"{address} is not fit to measure: {message}",
                hint="give it a heat sink or a fan, or stop what it is doing",
                code="too-hot",
            )
        if code == 124:
            raise self._over_budget(message)
        if code == 71:
            raise CommandFailed(
                f"the runner on {address} cannot use a file: {message}",
                hint=f"is {work_dir} this user's own? mend its permissions, or choose another work_dir",
                code="work-dir-unusable",
            )
        if error == "bad-request":
            raise RequestError(
                f"{address} cannot measure as asked: {message}",
                hint="change affinity, set_governor, kernel, weight_cache or the samples, or leave them out",
            )
        raise CommandFailed(
            f"the runner on {address} ended with code {code}: {message}",
            hint="this is a bug in edgepipe: please report it with --debug",
            code="runner-failed",
        )

    def _over_budget(self, what: str) -> CommandTimeout:
        return CommandTimeout(
            f"measuring on {self.device.address} took longer than {self.job['budget_s']:g} s: {what}",
            hint="raise the budget, or ask for fewer or shorter sessions",
            code="over-budget",
        )


class _AgentLost(Exception):
    """The supervisor is gone or cannot be trusted; starting it again goes on from the journal."""


class _Rebooted(Exception):
    """The board was restarted: nothing measured before may be mixed with what comes."""


def _plain_progress(session: Session, number: int, total: int) -> str:
    return f"{session['kind']} {number}/{total}"


def finished(lines: Sequence[Mapping[str, Any]]) -> dict[str, Session]:
    """Sessions by tag that need not be done again: with data, or found to be impossible there.

    As on the board, those before the last reboot or of another job are left out.
    """
    found: dict[str, Session] = {}
    current: tuple[object, object] | None = None
    for line in lines:
        if line["kind"] == "start":
            if (line["identity"], line["boot_id"]) != current:
                found, current = {}, (line["identity"], line["boot_id"])
        elif line["kind"] == "session" and current and line["boot_id"] == current[1]:
            session = line["session"]
            optional = session["kind"] in OPTIONAL and not _is_killed(line)
            if session["data"] is not None or optional:
                found[line["tag"]] = session
    return found


def _is_killed(line: Mapping[str, Any]) -> bool:
    return (
        line["kind"] == "session"
        and line["session"]["data"] is None
        and line["session"]["cause"].get("what") == "killed"
    )


def _duration_s(entry: Mapping[str, Any]) -> float:
    """How long one entry of a plan runs, as far as its own options say."""
    return float(sum(entry.get(key, 0) for key in ("duration_s", "idle_s", "run_s")))


# ------------------------------------------------------------------------------ the agent's answers


def parse_status(
    stdout: bytes, *, stderr: bytes = b"", returncode: int = 0, address: str = "the device"
) -> Status:
    """The answer to start, status or end, checked. Pure. Raises CommandFailed on anything else."""
    reply = parse_object(stdout, stderr=stderr, returncode=returncode, address=address)
    state = reply.get("state")
    fine = (
        len({key in reply for key in ("alive", "rebooted", "journal", "offset")}) == 1
        and isinstance(reply.get("error"), str | None)
        and isinstance(reply.get("message", ""), str)
        and isinstance(reply.get("alive", False), bool)
        and isinstance(reply.get("rebooted", False), bool)
        and isinstance(reply.get("journal", ""), str)
        and is_count(reply.get("offset", 0))
        and isinstance(reply.get("owner"), dict | None)
        and (state is None or _is_state(state))
    )
    if not fine:
        raise bad_answer("the agent's answer is not whole", stdout, stderr, address)
    return Status(
        code=reply["code"],
        error=reply.get("error"),
        message=reply.get("message", ""),
        state=state,
        alive=reply.get("alive", False),
        rebooted=reply.get("rebooted", False),
        journal=reply.get("journal", ""),
        offset=reply.get("offset", 0),
        owner=reply.get("owner"),
    )


def _is_state(state: object) -> bool:
    return (
        isinstance(state, dict)
        and isinstance(state.get("phase"), str)
        and is_count(state.get("journal_bytes"))
        and isinstance(state.get("code"), int | None)
        and (state["phase"] not in ENDED or is_count(state.get("code")))
        and isinstance(state.get("error"), str | None)
        and isinstance(state.get("message"), str)
        and isinstance(state.get("cause"), dict | None)
        and isinstance(state.get("owner"), dict | None)
        and is_number(state.get("boottime_s"))
    )


def parse_facts(
    stdout: bytes, *, stderr: bytes = b"", returncode: int = 0, address: str = "the device"
) -> dict[str, Any]:
    """The answer to facts, checked: ``device``, ``health``, ``packages``, ``free_bytes``. Pure."""
    facts = parse_object(stdout, stderr=stderr, returncode=returncode, address=address)
    for key in ("device", "health", "packages"):
        if not isinstance(facts.get(key), dict):
            raise bad_answer(f"the agent's facts have no {key}", stdout, stderr, address)
    if not _is_temperature(facts["health"].get("temperature_c")):
        raise bad_answer("the agent's temperature is no number", stdout, stderr, address)
    return facts


def parse_object(
    stdout: bytes, *, stderr: bytes, returncode: int, address: str
) -> dict[str, Any]:  # fmt: skip
    """The one JSON object that every verb of the agent prints, its schema and its code checked."""
    try:
        reply = json.loads(stdout)
    except ValueError as exc:
        raise bad_answer(f"the runner (exit {returncode}) did not print one JSON object", stdout, stderr, address) from exc  # fmt: skip
    if not isinstance(reply, dict) or not is_count(reply.get("schema")):
        raise bad_answer("the runner's answer has no schema number", stdout, stderr, address)
    if reply["schema"] > SCHEMA:
        raise RequestError(
            f"the runner on {address} answers with schema {reply['schema']}, this edgepipe reads up to {SCHEMA}",
            hint="upgrade edgepipe",
        )
    if reply.get("code") != returncode or not is_count(reply["code"]):
        raise bad_answer(f"the runner's answer says code {reply.get('code')!r}, it ended with {returncode}", stdout, stderr, address)  # fmt: skip
    return reply


def parse_journal(text: str) -> Journal:
    """Lines ``<crc32, 8 hex digits> <JSON>`` up to the first that is torn, altered or not whole. Pure."""
    lines: list[dict[str, Any]] = []
    *whole, torn = text.split("\n")
    for line in whole:
        checksum, _, content = line.partition(" ")
        if checksum != f"{zlib.crc32(content.encode(errors='surrogatepass')):08x}":
            return Journal(tuple(lines), damaged=True)
        try:
            found = json.loads(content)
        except ValueError:
            return Journal(tuple(lines), damaged=True)
        if line_problem(found):
            return Journal(tuple(lines), damaged=True)
        lines.append(found)
    return Journal(tuple(lines), damaged=bool(torn))


def line_problem(line: object) -> str:
    """What is wrong with one line of a journal, or an empty string."""
    if not isinstance(line, dict):
        return "is no object"
    kind = line.get("kind")
    if kind == "start":
        fine = (
            isinstance(line.get("boot_id"), str | None)
            and isinstance(line.get("identity"), str)
            and is_number(line.get("realtime_s"))
            and isinstance(line.get("runtime"), dict | None)
            and isinstance(line.get("rejected"), list | None)
        )
        return "" if fine else "is no start"
    if kind == "session":
        if not isinstance(line.get("tag"), str) or not isinstance(line.get("boot_id"), str | None):
            return "has no tag"
        return session_problem(line.get("session"))
    if kind == "end":
        fine = is_count(line.get("code")) and isinstance(line.get("cause"), dict | None)
        return "" if fine else "is no end"
    return f"is of the unknown kind {kind!r}"


def session_problem(session: object) -> str:
    """What is wrong with one session, or an empty string."""
    if not isinstance(session, dict):
        return "is no object"
    for key in ("before", "after"):
        if not isinstance(session.get(key), dict):
            return "has no health"
        if not _is_temperature(session[key].get("temperature_c")):
            return "has a temperature that is no number"
    if not is_list_of(session.get("flags"), str) or not is_list_of(session.get("arms"), str):
        return "has no flags or no arms"
    data, kind = session.get("data"), session.get("kind")
    if kind not in _DATA:
        return f"is of the unknown kind {kind!r}"
    if data is None:
        cause = session.get("cause")
        fine = isinstance(cause, dict) and all(
            isinstance(cause.get(k), str) for k in ("what", "message")
        )
        return "" if fine else "has neither data nor a cause"
    if not isinstance(data, dict) or not session["arms"]:
        return "has no data"
    return "" if _DATA[kind](data, session["arms"]) else f"has no whole {kind} data"


def _is_latency(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    found = data.get("arms")
    return (
        isinstance(found, dict)
        and sorted(found) == sorted(arms)
        and isinstance(data.get("contended"), bool)
        and all(isinstance(arm, dict) and _is_arm(arm) for arm in found.values())
        and len({len(arm["wall_ns"]) for arm in found.values()}) == 1
    )


def _is_arm(arm: Mapping[str, Any]) -> bool:
    cold = arm.get("cold")
    return (
        _is_counts(arm.get("wall_ns"))
        and _is_counts(arm.get("cpu_ns"))
        and len(arm["wall_ns"]) == len(arm["cpu_ns"]) > 0
        and _is_counts(arm.get("warmup_wall_ns"))
        and is_count(arm.get("inner_loops"))
        and arm["inner_loops"] > 0
        and is_count(arm.get("load_ns"))
        and is_count(arm.get("first_inference_ns"))
        and isinstance(cold, dict)
        and is_count(cold.get("load_ns"))
        and (cold.get("resident_share") is None or is_number(cold["resident_share"]))
    )


def _is_memory(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    keys = ("anon_bytes", "file_bytes", "peak_bytes", "overhead_bytes")
    return all(
        key in data and (data[key] is None or _is_integer(data[key])) for key in keys
    ) and _has_inputs(data)  # growth may be negative: memory can shrink


def _has_inputs(data: Mapping[str, Any]) -> bool:
    return is_list_of(data.get("inputs", []), dict)


def _is_instructions(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    return (
        _is_counts(data.get("counts"))
        and is_count(data.get("overhead"))
        and len(data["counts"]) > 0
        and min(data["counts"]) >= data["overhead"]
        and isinstance(data.get("counter"), str)
        and isinstance(data.get("fixed_addresses"), bool)
        and _has_inputs(data)
    )


def _is_outputs(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    outputs = data.get("outputs")
    return (
        is_list_of(outputs, dict)
        and all(
            isinstance(o.get("name"), str)
            and isinstance(o.get("dtype"), str)
            and is_count(o.get("bytes"))
            and _is_counts(o.get("shape"))
            for o in data["outputs"]
        )
        and is_count(data.get("count"))
        and isinstance(data.get("path"), str)
        and is_count(data.get("size"))
        and isinstance(data.get("sha256"), str)
    )


def _is_ops(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    return is_list_of(data.get("ops"), dict) and all(
        is_count(op.get("index"))
        and isinstance(op.get("name"), str)
        and isinstance(op.get("where"), str)
        and _is_counts(op.get("ns"))
        and len(op["ns"]) > 0
        for op in data["ops"]
    )


def _is_sustained(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    return (
        is_list_of(data.get("minutes"), dict)
        and len(data["minutes"]) > 0
        and is_number(data.get("window_s"))
        and all(
            is_number(minute.get("start_s"))
            and is_count(minute.get("count"))
            and isinstance(minute.get("wall_ns"), dict)
            and all(is_number(minute["wall_ns"].get(k)) for k in ("p50", "p90", "p99", "max"))
            and _is_temperature(minute.get("temperature_c"))
            and (minute.get("throttling") is None or is_list_of(minute["throttling"], str))
            for minute in data["minutes"]
        )
    )


def _is_energy(data: Mapping[str, Any], arms: Sequence[str]) -> bool:
    return (
        isinstance(data.get("method"), str)
        and is_number(data.get("idle_w"))
        and is_number(data.get("run_w"))
        and is_count(data.get("inferences"))
        and data["inferences"] > 0
        and is_count(data.get("elapsed_ns"))
        and data["elapsed_ns"] > 0
    )


_DATA: dict[str, Callable[[Mapping[str, Any], Sequence[str]], bool]] = {
    "latency": _is_latency, "memory": _is_memory, "outputs": _is_outputs, "ops": _is_ops,
    "sustained": _is_sustained, "energy": _is_energy, "instructions": _is_instructions,
}  # fmt: skip


def is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63  # neither NaN nor infinite


def is_count(value: object) -> bool:
    return _is_integer(value) and 0 <= value < 2**63  # type: ignore[operator]


def is_list_of(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_temperature(value: object) -> bool:
    return value is None or is_number(value)


def _is_counts(values: object) -> bool:
    return isinstance(values, list) and all(is_count(v) for v in values)


def bad_answer(why: str, stdout: bytes | str, stderr: bytes | str, address: str) -> CommandFailed:
    """The error for what a board printed that no agent of ours prints."""
    seen = _shortened(stdout) or _shortened(stderr) or "nothing"
    return CommandFailed(
        f"{why} on {address}; it printed: {seen}",
        hint="does a start-up file there (~/.bashrc) print something? it must not without a terminal",
        code="bad-runner-output",
    )


def _shortened(raw: bytes | str, limit: int = 300) -> str:
    """The beginning, where a login banner would be, and the end, where the last words are."""
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    text = text.strip()
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
