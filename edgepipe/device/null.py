"""A board that is not there: it speaks the agent's verbs and answers from a scenario, in virtual time.

For trying out gates, recipes and CI with no hardware. What it measures is made up: every record says
``simulated`` and no release gate passes on it. `edgepipe.device.scenario` tells what an address may ask.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgepipe.device import null_sessions
from edgepipe.device.base import Completed, check_argv
from edgepipe.device.scenario import Fault, Scenario, parse_scenario
from edgepipe.errors import ConnectError, TransferError
from edgepipe.runtime import DEFAULT_VERSION

T = TypeVar("T")

SCHEMA = 2
HOME = "/home/null"
# What the board calls its processor: it stands for the board of any profile.
MACHINE = "any"
# 2026-01-01: a fixed one, so that a record depends on nothing but its scenario
_EPOCH_S = 1_767_225_600.0
_BOOT_S = 1000.0  # age of the board when it is opened
_REBOOT_S = 20.0
_BROKEN_LINK_S = 2.0
_FREE_BYTES = 8_000_000_000
_MAX_RETRIES = 2
_SESSION_KINDS = ("latency", "memory", "outputs", "ops", "sustained", "energy", "instructions")


def open_null(address: str) -> NullDevice:
    """The device of an address like ``null://noisy?sd=0.02&fault=busy``. Raises RequestError."""
    return NullDevice(parse_scenario(address), address=address)


class _Stop(Exception):
    """Ends a job with one of the agent's exit codes."""

    def __init__(self, code: int, error: str | None, message: str, **more: Any) -> None:
        super().__init__(message)
        self.code, self.error, self.message, self.more = code, error, message, more


class _Died(Exception):
    """The supervisor was killed, or the board restarted under it."""


@dataclasses.dataclass
class _Job:
    """One job folder on the board: state file, journal, and its supervisor while that lives."""

    description: Mapping[str, Any]
    state: dict[str, Any]
    journal: bytearray
    supervisor: Iterator[float] | None = None
    wake_s: float = 0.0
    finished: set[str] = dataclasses.field(default_factory=set)
    runs_on_device: bool | None = None
    cause: Mapping[str, Any] | None = None  # of the last session that gave no data


class NullDevice:
    """A simulated board, kept in memory; see `Scenario` for what happens on it.

    Its files, lease, jobs and faults live as long as the object, so that what a second measurement
    finds there can be tried, too: ``device.boot_id``, ``sessions_begun`` and ``faults_struck`` tell what happened.
    """

    def __init__(self, scenario: Scenario | None = None, *, address: str = "null://quiet") -> None:
        self.address = address
        self.scenario = scenario or Scenario()
        self.files: dict[str, bytes] = {}
        self.sessions_begun: list[str] = []
        self.faults_struck: list[str] = []
        self._boots = 0
        self._now_s = _BOOT_S
        self._jobs: dict[str, _Job] = {}
        self._lease: dict[str, Any] | None = None
        self._steps: collections.Counter[str] = collections.Counter()
        self._spent: set[Fault] = set()
        self._link_is_down = False

    @property
    def boot_id(self) -> str:
        """Another one after each restart."""
        return f"{self.scenario.seed:08x}-0000-4000-8000-{self._boots:012x}"

    # ------------------------------------------------------------------------------- the link

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """See `Device.run`: it knows ``python3 -c`` (asked for home and version) and the agent."""
        words = check_argv(argv)
        if words[0] != "python3" or len(words) < 2:
            return Completed(127, b"", f"{words[0]}: not on a null device\n".encode())
        if words[1] == "-c":
            return self._step("hello", lambda: _reply(0, [HOME, [3, 11, 2]]))
        verb = words[2] if len(words) > 2 else ""
        if words[1] not in self.files or not words[1].endswith("/agent.py") or verb not in _VERBS:
            return Completed(2, b"", f"python3: cannot run {words[1]!r} {verb}\n".encode())
        return self._step(verb, lambda: self._answer(verb, words[3:]))

    def push(self, local: Path, remote: str) -> bool:
        """See `Device.push`."""
        return self._step("push", lambda: self._store(local, _absolute(remote)))

    def pull(self, remote: str, local: Path) -> None:
        """See `Device.pull`."""
        content = self._step("pull", lambda: self.files.get(_absolute(remote)))
        if content is None:
            raise TransferError(
                f"pull of {remote} on {self.address} failed: No such file or directory",
                hint="check both paths and their permissions",
            )
        part = local.with_name(f"{local.name}.part")
        local.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(local)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> NullDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self, step: str, do: Callable[[], T]) -> T:
        """One exchange with the board, which a fault may cut off before or after it is done."""
        self._steps[step] += 1
        if self._strikes("drop", step, self._steps[step]):
            raise self._broken_link(step)
        result = do()
        lost = self._strikes("drop-reply", step, self._steps[step])
        if lost or self._link_is_down:
            self._link_is_down = False
            raise self._broken_link(step)
        return result

    def _broken_link(self, step: str) -> ConnectError:
        self._advance(_BROKEN_LINK_S)
        return ConnectError(
            f"lost the connection to {self.address} while asking for {step!r} (a fault of its scenario)",
            hint="is the board still up, and does it allow another session? try again",
            code="connection-lost",
        )

    def _strikes(self, name: str, where: str, number: int) -> bool:
        """Whether a fault of the scenario happens here; each happens once, those without a place always."""
        for fault in self.scenario.faults:
            if fault.name != name or fault in self._spent:
                continue
            if not fault.where:
                return True
            if (fault.where, fault.number) == (where, number):
                self._spent.add(fault)
                self.faults_struck.append(f"{name}@{where}:{number}")
                return True
        return False

    def _store(self, local: Path, remote: str) -> bool:
        content = local.read_bytes()
        if self.files.get(remote) == content:
            return False
        self.files[remote] = content
        cut = Fault("truncated-model", "", 0)
        if remote.endswith(".tflite") and cut in self.scenario.faults and cut not in self._spent:
            self._spent.add(cut)
            self.files[remote] = content[: len(content) // 2]
        return True

    # -------------------------------------------------------------------------------- the verbs

    def _answer(self, verb: str, arguments: Sequence[str]) -> Completed:
        reply: dict[str, Any] = {"schema": SCHEMA, "code": 0, "error": None, "message": ""}
        try:
            reply |= _VERBS[verb](self, *arguments)
        except _Stop as stop:
            reply |= {"code": stop.code, "error": stop.error, "message": stop.message, **stop.more}
        except (TypeError, ValueError) as exc:  # other arguments than the verb takes
            reply |= {"code": 64, "error": "bad-request", "message": f"{verb}: {exc}"}
        return _reply(reply["code"], reply)

    def _facts(self, work_dir: str) -> dict[str, Any]:
        return {
            "device": self._device_facts(),
            "health": self._health(),
            "free_bytes": 0 if self._disk_is_full else _FREE_BYTES,
            "packages": {"ai_edge_litert": {"version": DEFAULT_VERSION, "path": "/usr/lib/null"}},
        }

    def _start(self, job_dir: str) -> dict[str, Any]:
        job = self._jobs.get(job_dir)
        if job is not None and job.supervisor is not None:
            return {"state": dict(job.state)}
        description = _load_job(self.files.get(f"{job_dir}/job.json"), job_dir)
        if self._disk_is_full:
            raise _Stop(73, "disk-full", f"{description['work_dir']} has 0 bytes free, {description['min_free_bytes']} are needed")  # fmt: skip
        state = {
            "schema": SCHEMA, "job": description["id"], "phase": "starting", "pid": 4242,
            "boot_id": self.boot_id, "boottime_s": self._now_s, "tag": None, "sessions_done": 0,
            "journal_bytes": 0, "code": None, "error": None, "message": "",
        }  # fmt: skip
        job = _Job(description, state, journal=job.journal if job else bytearray())
        job.supervisor, job.wake_s = self._supervise(job, job_dir), self._now_s
        self._jobs[job_dir] = job
        self._wake(job)  # until it holds the lease, or has ended
        reply: dict[str, Any] = {"state": dict(job.state)}
        if job.state["code"]:
            keys = ("code", "error", "message", "owner", "cause")
            reply |= {key: job.state[key] for key in keys if key in job.state}
        return reply

    def _status(self, job_dir: str, offset: str, wait_s: str = "0") -> dict[str, Any]:
        until_s = self._now_s + float(wait_s)
        job = self._jobs.get(job_dir)
        if job is None:
            raise _Stop(76, "no-such-job", f"there is no job in {job_dir}", state=None)
        begin, text = _lines_from(job.journal, int(offset))
        while not text and job.supervisor is not None and self._now_s < until_s:
            self._advance(min(until_s, max(job.wake_s, self._now_s)) - self._now_s)
            begin, text = _lines_from(job.journal, int(offset))
        if job.supervisor is not None:
            self._note(job)  # its heartbeat
        return {
            "state": dict(job.state),
            "alive": job.supervisor is not None,
            "rebooted": job.state["boot_id"] != self.boot_id,
            "from": begin,
            "journal": text.decode(),
            "offset": begin + len(text),
        }

    def _end(self, job_dir: str, keep: str = "") -> dict[str, Any]:
        job = self._jobs.get(job_dir)
        if job is not None:
            job.supervisor = None
            if self._holds_lease(job):
                self._lease = None
        if not keep:
            self._jobs.pop(job_dir, None)
            for path in [path for path in self.files if path.startswith(f"{job_dir}/")]:
                del self.files[path]
        return {"state": dict(job.state) if job else None}

    # --------------------------------------------------------------------------- the supervisor

    def _advance(self, seconds: float) -> None:
        """Let virtual time pass; supervisors do what falls due."""
        until_s = self._now_s + seconds
        while True:
            due = [job for job in self._jobs.values() if job.supervisor and job.wake_s <= until_s]
            if not due:
                break
            job = min(due, key=lambda one: one.wake_s)
            self._now_s = max(self._now_s, job.wake_s)
            self._wake(job)
        self._now_s = max(self._now_s, until_s)

    def _wake(self, job: _Job) -> None:
        assert job.supervisor is not None
        try:
            job.wake_s = self._now_s + next(job.supervisor)
        except StopIteration:
            job.supervisor = None
        except _Died:
            job.supervisor = None  # and its state file stays as it was
        except _Stop as stop:
            self._end_job(job, stop)

    def _end_job(self, job: _Job, stop: _Stop) -> None:
        """The last line of the journal, which a job that never held the lease has not, and the last state."""
        more = {key: value for key, value in stop.more.items() if key in ("cause", "owner")}
        if self._holds_lease(job):
            runs = {"runs_on_device": job.runs_on_device}
            end = {"kind": "end", "code": stop.code, "error": stop.error, "message": stop.message}
            job.journal += _journal_line({**end, **more, **runs})
            more |= runs
            self._take_lease(job, job.description["lease_s"])
        self._note(
            job,
            phase="failed" if stop.code else "done",
            code=stop.code,
            error=stop.error,
            message=stop.message,
            tag=None,
            **more,
        )
        job.supervisor = None

    def _supervise(self, job: _Job, job_dir: str) -> Iterator[float]:
        """The supervisor's life; it yields the seconds until it has something to do again."""
        self._refuse_other_job(job)
        self._take_lease(job, job.description["budget_s"])
        self._recover(job)
        description = job.description
        for item in [*description["models"].values(), description["runtime"], description["inputs"]]:  # fmt: skip
            self._check_file(item)
        yield 0.2
        if self._strikes("no-runtime", "", 0):
            raise _Stop(69, "no-runtime", "litert-interpreter: Python 3.11.2 has no ai_edge_litert")
        self._write(job, self._start_record(description))
        deadline_s = self._now_s + description["budget_s"]
        retries: collections.Counter[str] = collections.Counter()
        pending = self._to_do(job)
        while pending:
            entry = pending.pop(0)
            limit_c = description["start_below_c"]
            if limit_c is not None and self._strikes("too-hot", "", 0):
                self._note(job, phase="cooling")
                yield float(description["cool_down_s"])
                raise _Stop(78, "too-hot", f"the board is at {null_sessions.HOT_C} C after {description['cool_down_s']:.0f} s, measuring starts below {limit_c:g} C")  # fmt: skip
            self._note(job, phase="running", tag=entry["tag"])
            yield from self._run_session(job, job_dir, entry, deadline_s)
            if entry["tag"] not in job.finished:  # somebody killed the worker
                retries[entry["tag"]] += 1
                if retries[entry["tag"]] > _MAX_RETRIES:
                    cause = job.cause or {}
                    raise _Stop(70, "worker-failed", cause["message"], cause=cause)
                pending.append(entry)
            if not pending:  # a longer plan may have been pushed meanwhile
                longer = _load_job(self.files.get(f"{job_dir}/job.json"), job_dir)
                if _identity(longer) == _identity(description):
                    job.description = longer
                    pending = self._to_do(job)
                    deadline_s = self._now_s + longer["budget_s"] if pending else deadline_s
        raise _Stop(0, None, "")

    def _to_do(self, job: _Job) -> list[dict[str, Any]]:
        return [entry for entry in job.description["plan"] if entry["tag"] not in job.finished]

    def _run_session(
        self, job: _Job, job_dir: str, entry: Mapping[str, Any], deadline_s: float
    ) -> Iterator[float]:
        """One session of the plan, in two halves: what strikes in a session strikes between them."""
        tag, spec = entry["tag"], {**job.description, **entry}
        self.sessions_begun.append(tag)
        number = len(self.sessions_begun)
        latency_tags = [e["tag"] for e in job.description["plan"] if e["kind"] == "latency"]
        throttled = latency_tags[self.scenario.at_session - 1 : self.scenario.at_session] == [tag] and self.scenario.at_session > 0  # fmt: skip
        before, data = self._health(), None
        seconds = null_sessions.session_seconds(spec, self.scenario)
        left_s = max(0.0, deadline_s - self._now_s)
        yield min(seconds / 2, left_s)
        if self._strikes("reboot", "session", number):
            self._reboot()
        if self._strikes("kill-agent", "session", number):
            raise _Died
        cause = self._cause(number)
        yield min(seconds, left_s) / 2
        if seconds > left_s:
            cause = {"what": "timeout", "message": f"the worker was stopped after {left_s:.1f} s", "stderr": ""}  # fmt: skip
        clock_jumped = self._strikes("clock-jump", "session", number)
        after = self._health(throttled=throttled, clock_offset_s=3600.0 if clock_jumped else 0.0)
        if cause is None:
            data = self._data(job_dir, spec, throttled=throttled)
            job.runs_on_device = True
        flags = [*(["clock_jump"] if clock_jumped else []), *(["throttle_event", "throttled_now"] if throttled else [])]  # fmt: skip
        session = {"kind": entry["kind"], "arms": entry["arms"], "data": data, "cause": cause, "before": before, "after": after, "flags": flags}  # fmt: skip
        line = {"kind": "session", "tag": tag, "boot_id": self.boot_id, "session": session}
        if self._strikes("torn-journal", "session", number):
            text = _journal_line(line)
            job.journal += text[: len(text) // 2]
            raise _Died
        job.cause = cause
        if _is_finished(session):
            job.finished.add(tag)
        self._write(job, line)
        if self._strikes("disk-full", "session", number):  # the line went where the ballast was
            raise _Stop(73, "disk-full", f"[Errno 28] No space left on device: '{job_dir}/results.jsonl'")  # fmt: skip
        if cause is not None and cause["what"] == "timeout":
            raise _Stop(124, "budget", f"the time budget of {job.description['budget_s']:g} s was used up in session {tag}")  # fmt: skip
        if cause is not None and cause["what"] != "killed":
            job.runs_on_device = False
            raise _Stop(70, "worker-failed", cause["message"], cause=cause)

    def _cause(self, number: int) -> dict[str, Any] | None:
        for fault, what, signal, message in (
            ("kill-worker", "killed", 9, "someone killed the worker with SIGKILL"),
            ("oom", "out-of-memory", 9, "the kernel killed the worker: out of memory"),
            ("crash", "crash", 11, "the worker crashed with SIGSEGV"),
        ):
            if self._strikes(fault, "session", number):
                return {"what": what, "message": message, "stderr": "", "signal": signal}
        return None

    def _data(self, job_dir: str, spec: Mapping[str, Any], *, throttled: bool) -> dict[str, Any]:
        models = {arm: self._model(spec["models"][arm]) for arm in spec["arms"]}
        if spec["kind"] == "outputs":
            (model,) = models.values()
            raw = self.files[spec["inputs"]["path"]]
            data, content = null_sessions.outputs_data(spec, self.scenario, model, raw)
            path = f"{job_dir}/outputs-{spec['tag']}.bin"
            self.files[path] = content
            return {**data, "path": path}
        around = null_sessions.Surroundings(self._now_s - _BOOT_S, throttled)
        return null_sessions.session_data(spec, self.scenario, around, models)

    def _model(self, item: Mapping[str, Any]) -> bytes:
        content = self.files[item["path"]]
        if not item.get("signature"):
            return content
        from edgepipe.tflite_ops.flatbuffer import with_main_graph

        return with_main_graph(content, item["signature"], where="the model on the null device")

    def _reboot(self) -> None:
        self._boots += 1
        self._lease = None
        self._link_is_down = True
        self._now_s += _REBOOT_S
        raise _Died

    def _check_file(self, item: Mapping[str, Any] | None) -> None:
        if item is None:
            return
        content = self.files.get(_absolute(item["path"]))
        if content is None:
            raise _Stop(65, "data-mismatch", f"{item['path']}: No such file or directory")
        if len(content) != item["size"]:
            raise _Stop(65, "data-mismatch", f"{item['path']} has {len(content)} bytes, the job says {item['size']}")  # fmt: skip
        found = hashlib.sha256(content).hexdigest()
        if found != item["sha256"]:
            raise _Stop(65, "data-mismatch", f"{item['path']} has sha256 {found}, the job says {item['sha256']}")  # fmt: skip

    def _refuse_other_job(self, job: _Job) -> None:
        lease = self._lease
        if self._strikes("busy", "", 0):
            lease = self._owner("0123456789abcdef", "somebody@elsewhere", 600.0)
        if lease and lease["job"] != job.description["id"]:
            left_s = lease["until_boottime_s"] - self._now_s
            if left_s > 0:
                raise _Stop(75, "busy", f"another job holds this board for {left_s:.0f} s more", owner=lease)  # fmt: skip

    def _take_lease(self, job: _Job, seconds: float) -> None:
        self._lease = self._owner(job.description["id"], job.description["owner"], seconds)

    def _holds_lease(self, job: _Job) -> bool:
        return self._lease is not None and self._lease["job"] == job.description["id"]

    def _owner(self, job: str, owner: str, seconds: float) -> dict[str, Any]:
        return {
            "job": job,
            "owner": owner,
            "pid": 4242,
            "since_unix_s": _EPOCH_S + self._now_s,
            "until_boottime_s": self._now_s + seconds,
            "boot_id": self.boot_id,
        }

    def _recover(self, job: _Job) -> None:
        """Cut the journal after its last good line; what this job finished since the board started counts."""
        lines, length = _trusted(bytes(job.journal))
        del job.journal[length:]
        wanted, current = (_identity(job.description), self.boot_id), False
        for line in lines:
            if line["kind"] == "start":
                current = (line["identity"], line["boot_id"]) == wanted
                if not current:
                    job.finished.clear()
            elif line["kind"] == "session" and current and _is_finished(line["session"]):
                job.finished.add(line["tag"])
                job.runs_on_device = True

    def _write(self, job: _Job, record: Mapping[str, Any]) -> None:
        start = len(job.journal)
        job.journal += _journal_line(record)
        self._note(job)
        if self._strikes("corrupt-journal", "line", job.journal.count(b"\n")):
            job.journal[start + 20] ^= 1
            raise _Died

    def _note(self, job: _Job, **changes: Any) -> None:
        """Write the state file, which is also a heartbeat."""
        job.state |= {
            **changes,
            "boottime_s": self._now_s,
            "sessions_done": len(job.finished),
            "journal_bytes": len(job.journal),
        }

    def _start_record(self, description: Mapping[str, Any]) -> dict[str, Any]:
        pushed = description["runtime"]
        runtime = {
            "backend": "litert-c" if pushed else "litert-interpreter",
            "name": "litert",
            "version": pushed["version"] if pushed else DEFAULT_VERSION,
            "sha256": pushed["sha256"] if pushed else "0" * 64,
            "path": pushed["path"] if pushed else "/usr/lib/null",
        }
        return {
            "kind": "start",
            "job": description["id"],
            "identity": _identity(description),
            "boot_id": self.boot_id,
            "realtime_s": _EPOCH_S + self._now_s,
            "device": self._device_facts(),
            "runtime": runtime,
            "rejected": [],
        }

    @property
    def _disk_is_full(self) -> bool:
        return Fault("disk-full", "session", 0) in self.scenario.faults

    def _device_facts(self) -> dict[str, Any]:
        return {
            "model": "edgepipe null device",
            "machine": MACHINE,
            "bits": 64,
            "cpu": ["simulated"],
            "cpus": 4,
            "cpu_model": "simulated",
            "emulated": "",
            "no_instructions": "",
            "kernel": "null",
            "os": "null",
            "glibc": None,
            "python": "3.11.2",
            "page_size_bytes": 4096,
            "boot_id": self.boot_id,
            # another noise is another board, so that a calibration is quoted for its own only
            "identity": hashlib.sha256(repr(self.scenario.noise).encode()).hexdigest()[:16],
            "simulated": True,
        }

    def _health(self, *, throttled: bool = False, clock_offset_s: float = 0.0) -> dict[str, Any]:
        return null_sessions.health(
            self.scenario,
            boot_id=self.boot_id,
            realtime_s=_EPOCH_S + self._now_s + clock_offset_s,
            monotonic_s=self._now_s,
            throttled=throttled,
            hot=Fault("too-hot", "", 0) in self.scenario.faults,
        )


_VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "facts": NullDevice._facts,
    "start": NullDevice._start,
    "status": NullDevice._status,
    "end": NullDevice._end,
}


def _reply(code: int, answer: Any) -> Completed:
    return Completed(code, json.dumps(answer, separators=(",", ":")).encode() + b"\n", b"")


def _absolute(remote: str) -> str:
    return remote if remote.startswith("/") else f"{HOME}/{remote.removeprefix('~/')}"


def _load_job(content: bytes | None, job_dir: str) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(content or b"")
        if description["schema"] != SCHEMA:
            raise ValueError(f"schema {description['schema']}, this agent knows {SCHEMA}")
        unknown = [e["kind"] for e in description["plan"] if e["kind"] not in _SESSION_KINDS]
        if unknown:
            raise ValueError(f"no session is called {unknown[0]!r}")
    except (ValueError, KeyError, TypeError) as exc:
        raise _Stop(64, "bad-job", f"{job_dir}/job.json: {exc}") from exc
    return description


def _is_finished(session: Mapping[str, Any]) -> bool:
    return session["data"] is not None


def _identity(description: Mapping[str, Any]) -> str:
    fixed = {k: v for k, v in description.items() if k not in ("plan", "budget_s")}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _journal_line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines_from(journal: bytearray, offset: int) -> tuple[int, bytes]:
    """Whole trusted lines from ``offset`` on; from 0 on where no line begins there any more."""
    if not 0 <= offset <= len(journal) or (offset > 0 and journal[offset - 1] != ord("\n")):
        offset = 0
    raw = bytes(journal[offset:])
    return offset, raw[: _trusted(raw)[1]]


def _trusted(journal: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines before the first torn or altered one, and how many bytes they are."""
    lines: list[dict[str, Any]] = []
    length = 0
    for line in journal.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        lines.append(json.loads(text))
        length += len(line)
    return lines, length
