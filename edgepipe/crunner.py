"""Boards without Python: ``targets/<platform>/runner.c``, compiled here, pushed, and one call per session.

The program is compiled on demand: by zig (a toolchain of its own, for any board), else by this
host's ``cc`` where the board has the same machine. Where it does not start there, as on a phone, it
gets a C library of its own (`edgepipe.glibc`). There is no agent on such a board, so sessions run
in the foreground of the connection; those that are finished lie on the board until the job ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe import android, toolchain
from edgepipe.artifact import hash_path
from edgepipe.device.base import Completed, Device
from edgepipe.device.snapshot import (
    FACT_FILES,
    HEALTH_FILES,
    device_facts,
    health,
    health_flags,
    hottest_c,
    probed,
    time_in_state,
)
from edgepipe.errors import CommandTimeout, MissingExtra, NotReadyError, NotStable, TransferError
from edgepipe.glibc import find_bundle
from edgepipe.job import (
    COMMAND_TIMEOUT_S,
    OPTIONAL,
    BoardJob,
    Outcome,
    bad_answer,
    line_problem,
    parse_object,
)
from edgepipe.payload import Payload, push_missing, runner_target
from edgepipe.resources import target_dir
from edgepipe.sessions import Session

log = logging.getLogger(__name__)

SOURCE = "runner.c"
SELF_TEST = "self_test.tflite"
# `uname -m` -> what zig calls it. glibc 2.28 is that of Debian 10: older than any LiteRT needs.
ZIG_TARGETS = {
    "x86_64": "x86_64-linux-gnu.2.28",
    "aarch64": "aarch64-linux-gnu.2.28",
    "armv7l": "arm-linux-gnueabihf.2.28",
}
FLAGS = ("-O2", "-s", "-std=gnu11", "-Wall")
# (e_machine, class) of an ELF file (elf.h) -> machine
ELF_MACHINES = {(40, 32): "armv7l", (62, 64): "x86_64", (183, 64): "aarch64", (3, 32): "i686"}
COMPILE_TIMEOUT_S = 300.0
# What the runner can do; the rest needs the agent.
KINDS = ("latency", "memory", "outputs", "ops", "instructions")
# A session that somebody killed is tried again this many times, as the agent does.
MAX_KILLED = 2
# After a broken link the board stops the old call within this time.
RELEASE_S = 30.0
COOLING_LOOK_S = 5.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A runner for one machine, on this host. ``compiler`` says what made it."""

    path: Path
    sha256: str
    compiler: str


@dataclasses.dataclass(frozen=True)
class CBoard:
    """A board without Python that has the runner. ``payload.entry`` is the program there.

    ``loader`` is what starts it where the board has no C library for it, ``files`` are those that
    came with it. ``phone`` is what Android says of itself, None on other boards.
    """

    device: Device
    work_dir: str
    payload: Payload
    compiler: str
    self_test: str
    loader: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    phone: Mapping[str, Any] | None = None

    @property
    def command(self) -> tuple[str, ...]:
        """What every call of the runner begins with."""
        return (*self.loader, self.payload.entry)

    def facts(self) -> dict[str, Any]:
        """``device``, ``health``, ``packages`` and ``free_bytes``, as the agent's verb has them."""
        return self._read(lambda answer: {
            "device": device_facts(answer),
            "health": health(answer["board"]),
            "packages": {},
            "free_bytes": answer["free_bytes"],
        })  # fmt: skip

    def probe(self) -> dict[str, Any]:
        """What targets/linux/probe.py prints, with what Android adds."""
        return self._read(probed)

    def _read(self, meaning: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        done = self.device.run(
            [*self.command, "read", self.work_dir, *FACT_FILES, *HEALTH_FILES],
            timeout_s=COMMAND_TIMEOUT_S,
        )
        answer = _answer(done, self.device.address)
        try:
            facts = meaning(answer)
            return facts if self.phone is None else android.add_to_facts(self.device, facts, self.phone)  # fmt: skip
        except (KeyError, TypeError, AttributeError) as exc:
            raise bad_answer("the runner's facts are not whole", done.stdout, done.stderr, self.device.address) from exc  # fmt: skip


# --------------------------------------------------------------------------- compile and push


def prepare_board(device: Device, target: str, work_dir: str) -> CBoard:
    """Compile the runner for this board, unless that was done before, and push it.

    Raises NotReadyError (``no-python``) where nothing here can compile it or nothing there can run
    it, naming both remedies.
    """
    machine = board_machine(device)
    folder = target_dir(runner_target(target) or target)
    install = "on the device: sudo apt-get install python3"
    try:
        made = compile_runner(folder / SOURCE, machine)
    except MissingExtra as exc:
        raise NotReadyError(
            f"{device.address} has no python3, and the runner for such boards cannot be made here: "
            f"{exc.message}",
            hint=f"{install}; or on this host: {exc.hint}",
            code="no-python",
        ) from exc
    entry = f"{work_dir}/runners/{made.sha256}/runner"
    device.push(made.path, entry)
    self_test = f"{work_dir}/models/{hash_path(folder / SELF_TEST)}.tflite"
    device.push(folder / SELF_TEST, self_test)
    payload = Payload(f"{work_dir}/runners/{made.sha256}", entry, "", made.sha256)
    board = CBoard(device, work_dir, payload, made.compiler, self_test, phone=android.ask(device))
    said = _does_not_start(board)
    if said and (other := _with_libc(board, machine)):
        board, said = other, _does_not_start(other)
    if said and board.phone is not None:
        raise NotReadyError(
            f"the runner made by {board.compiler} does not start on the phone {device.address}: {said}",
            hint="phones with 64-bit programs (arm64) can be measured; does Android let it run? "
            f"try: adb shell {entry}",
            code="no-python",
        )
    if said:
        raise NotReadyError(
            f"{device.address} has no python3, and the runner made by {made.compiler} does not start "
            f"there: {said}",
            hint=f"{install}; or on this host: edgepipe toolchains install zig "
            "(its programs run with glibc 2.28 and newer)",
            code="no-python",
        )
    log.info("%s: measuring with the C runner (%s)", device.address, board.compiler)
    return board


def _does_not_start(board: CBoard) -> str:
    """What the board says instead of starting the runner; "" where it starts."""
    done = board.device.run([*board.command, "read", board.work_dir, "/proc/loadavg"], timeout_s=COMMAND_TIMEOUT_S)  # fmt: skip
    said = done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}"
    return said if done.returncode else ""


def _with_libc(board: CBoard, machine: str) -> CBoard | None:
    """The same board with a C library pushed beside the runner, or None where there is none for it."""
    bundle = find_bundle(machine)
    if bundle is None:
        return None
    folder = f"{board.work_dir}/rt/glibc-{bundle.key}"
    names = (bundle.loader, *bundle.libraries)
    push_missing(board.device, {name: bundle.folder / name for name in names}, folder)
    return dataclasses.replace(
        board,
        loader=(f"{folder}/{bundle.loader}", "--library-path", folder),
        files=tuple(f"{folder}/{name}" for name in names),
        compiler=f"{board.compiler}, with a glibc {bundle.version} of its own",
    )


def board_machine(device: Device) -> str:
    """Machine of the board's *programs*: a 32-bit system on a 64-bit kernel is armv7l."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as name:
        shell = Path(name) / "sh"
        try:
            device.pull("/bin/sh", shell)
        except TransferError:  # Android before 10
            device.pull("/system/bin/sh", shell)
        with shell.open("rb") as stream:
            machine = elf_machine(stream.read(20))
    if machine not in ZIG_TARGETS:
        raise NotReadyError(
            f"{device.address} has no python3, and there is no runner for its machine ({machine})",
            hint=f"install python3 there; the runner exists for {', '.join(ZIG_TARGETS)}",
            code="no-python",
        )
    return machine


def elf_machine(head: bytes) -> str:
    """Machine that an ELF file is for, from its first 20 bytes; ``unknown`` for any other file.

    Byte 4 is the class (1: 32 bits, 2: 64), byte 5 the order (1: little-endian), 18 and 19 e_machine.
    """
    if len(head) < 20 or head[:4] != b"\x7fELF" or head[5] != 1:
        return "unknown"
    key = (int.from_bytes(head[18:20], "little"), {1: 32, 2: 64}.get(head[4], 0))
    return ELF_MACHINES.get(key, "unknown")


def compile_runner(source: Path, machine: str) -> Compiled:
    """The runner for ``machine``, compiled now or taken from the user's cache.

    Raises MissingExtra where there is no compiler for it, or where it fails.
    """
    argv, compiler, name = _compiler(machine)
    key = "\0".join([hash_path(source), machine, compiler, *FLAGS])
    folder = _cache() / hashlib.sha256(key.encode()).hexdigest()[:16]
    kept = folder / "runner"
    if not kept.is_file():
        log.info("compiling the runner for %s with %s", machine, compiler)
        _compile([*argv, *FLAGS, str(source), "-o"], kept, name)
    return Compiled(kept, hash_path(kept), compiler)


def _cache() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("edgepipe") / "runners"


def _compiler(machine: str) -> tuple[list[str], str, str]:
    """(command, what the record says of it, its short name); zig where it is installed, then cc."""
    cc = shutil.which("cc") if machine == platform.machine() else None
    if cc is None or toolchain.is_installed("zig"):
        python = toolchain.ensure("zig") / "bin" / "python"
        pinned = toolchain.find_toolchain("zig").summary.partition(" as ")[0]
        return [str(python), "-m", "ziglang", "cc", "-target", ZIG_TARGETS[machine]], pinned, "zig"
    try:
        done = subprocess.run([cc, "--version"], capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise MissingExtra(f"{cc} cannot be run: {exc}", hint="edgepipe toolchains install zig") from exc  # fmt: skip
    return [cc], (done.stdout.splitlines() or [cc])[0].strip(), "cc"


def _compile(argv: list[str], kept: Path, name: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="compile-") as scratch:
            made = Path(scratch) / "runner"
            # zig keeps what it builds of libc; its own folder would outlive the toolchain
            environ = {
                **os.environ,
                "ZIG_GLOBAL_CACHE_DIR": scratch,
                "ZIG_LOCAL_CACHE_DIR": scratch,
            }
            done = subprocess.run(
                [*argv, str(made), "-ldl"], capture_output=True, text=True, errors="replace",
                timeout=COMPILE_TIMEOUT_S, check=False, env=environ, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode == 0 and made.is_file():
                made.replace(kept)
                return
            said = " ".join(done.stderr.strip().splitlines()[-3:])[-500:]
    except (OSError, subprocess.TimeoutExpired) as exc:
        said = str(exc)
    raise MissingExtra(
        f"{name} could not compile it: {said}",
        hint="edgepipe toolchains install zig" if name == "cc" else "apt-get install gcc",
        code="compile-failed",
    )


# Without Python the board's own find(1) removes what nobody needs (targets/linux/housekeeping.py).
ABANDONED_DAYS, UNUSED_DAYS = 7, 30
_TIDY = (
    'cd "$0" || exit 0; days=$1 unused=$2; shift 2; touch -c "$@" . ; '
    "find jobs -mindepth 1 -maxdepth 1 -mtime +$days -exec rm -rf {} + ; "
    "find models rt runtimes runners agents -type f -mtime +$unused -exec rm -f {} + ; "
    "find models rt runtimes runners agents -name '*.part.*' -mtime +0 -exec rm -f {} + ; "
    "find rt runtimes runners agents -mindepth 1 -type d -mtime +$unused -exec rmdir {} + ; exit 0"
)


def tidy_without_python(device: Device, work_dir: str, *, used: Sequence[str] = ()) -> None:
    """Remove jobs of 7 days and files unused for 30; the paths ``used`` were used just now."""
    words = ["sh", "-c", f"{{ {_TIDY}; }} >/dev/null 2>&1", work_dir, str(ABANDONED_DAYS), str(UNUSED_DAYS)]  # fmt: skip
    device.run([*words, *used], timeout_s=COMMAND_TIMEOUT_S)


# -------------------------------------------------------------------------------------- the job


class CRunnerJob(BoardJob):
    """As `BoardJob`, with the C runner: every session is one call, waited for over the connection.

    ``sustained`` and ``energy`` sessions need the agent: an energy session is reported as
    impossible there, a sustained one raises NotReadyError.
    """

    def __init__(self, board: CBoard, job: Mapping[str, Any], job_dir: str, **more: Any) -> None:
        super().__init__(board.device, board.payload, job, job_dir, **more)
        self.board = board
        self._done: dict[str, Session] = {}
        self._lines: list[dict[str, Any]] = []
        self._killed = 0
        self._boot_id: str | None = None

    def find_earlier(self, *, board_time_s: float | None, max_age_s: float) -> int:
        """See `BoardJob.find_earlier`."""
        script = 'cd "$0" 2>/dev/null || exit 0; for f in session-*.json; do [ -f "$f" ] && cat "$f"; done; exit 0'  # fmt: skip
        done = self.device.run(["sh", "-c", script, self.job_dir], timeout_s=COMMAND_TIMEOUT_S)
        boot_id = self.board.facts()["health"]["boot_id"]
        found: dict[str, Session] = {}
        for line in done.stdout.decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                answer = json.loads(line)
                age_s = (board_time_s or 0.0) - answer["before"]["realtime_s"]
                session = _session(answer)
                fits = answer["identity"] == self._identity(answer["tag"], session["kind"], session["arms"])  # fmt: skip
                same_boot = {session[at]["boot_id"] for at in ("before", "after")} == {boot_id}
                if fits and same_boot and 0 <= age_s <= max_age_s:
                    found[answer["tag"]] = session
        if not found:
            self.device.run(["rm", "-rf", self.job_dir], timeout_s=COMMAND_TIMEOUT_S)
            return 0
        self._done, self._boot_id = found, boot_id
        return self._take_over(found)

    def run(self, plan: Sequence[Mapping[str, Any]]) -> Outcome:
        """See `BoardJob.run`."""
        unable = [entry["kind"] for entry in plan if entry["kind"] not in (*KINDS, *OPTIONAL)]
        if unable:
            raise NotReadyError(
                f"{self.device.address} has no python3, and the C runner cannot measure {unable[0]}",
                hint="on the device: sudo apt-get install python3; or leave it out",
                code="no-python",
            )
        self._start()
        queue = [entry for entry in plan if entry["tag"] not in self._done]
        while queue:
            entry = queue.pop(0)
            self._cool_down()
            session, failure = self._run_session(entry)
            if failure is not None:
                return self._outcome(plan, failure)
            boots = {session[at]["boot_id"] for at in ("before", "after")} - {None}
            if boots - {self._boot_id}:
                self._restart(session["after"]["boot_id"] or session["before"]["boot_id"])
                queue = list(plan)
                continue
            line = {"kind": "session", "tag": entry["tag"], "boot_id": self._boot_id, "session": session}  # fmt: skip
            if line_problem(line):
                raise bad_answer(f"a session of the runner {line_problem(line)}", str(session), "", self.device.address)  # fmt: skip
            self._lines.append(line)
            self._show([line], plan)
            if (session["cause"] or {}).get("what") == "killed":
                self._killed += 1
                if self._killed > MAX_KILLED:
                    raise NotStable(
                        f"on {self.device.address} {session['cause']['message']}, {self._killed} times",
                        hint="find out what kills processes there (a watchdog, a person)",
                        code="worker-killed",
                    )
                queue.append(entry)
                continue
            self._done[entry["tag"]] = session
            self._check_heat(session)
        return self._outcome(plan, None)

    def end(self, *, keep: bool = False) -> None:
        """Give the lease back and remove the job's files, unless ``keep``."""
        self.device.run(
            [*self.board.command, "end", self.board.work_dir, self.job["id"]],
            timeout_s=COMMAND_TIMEOUT_S,
        )
        if not keep:
            used = [
                self.payload.entry,
                *self.board.files,
                *(item["path"] for item in self.job["models"].values()),
            ]
            used += [self.job["runtime"]["path"]] if self.job["runtime"] else []
            self.device.run(["rm", "-rf", self.job_dir], timeout_s=COMMAND_TIMEOUT_S)
            tidy_without_python(self.device, self.board.work_dir, used=used)

    # ---------------------------------------------------------------------------------- one session

    def _start(self) -> None:
        """Once per job: check that the runtime can be used, with a model that is known."""
        if self._lines:
            return
        library = self.job["runtime"]
        facts = self.board.facts()
        if library is None:
            self._raise_for(69, "no-runtime", "no libLiteRt.so was pushed, which the C runner needs", None)  # fmt: skip
        has, needs = facts["device"]["glibc"], library.get("glibc")
        if needs and (has is None or _numbers(has) < _numbers(needs)):
            self._raise_for(69, "no-runtime", f"the library needs glibc {needs}, this board has {has}", None)  # fmt: skip
        self.device.run(["mkdir", "-p", self.job_dir], timeout_s=COMMAND_TIMEOUT_S)
        answer = self._call({"tag": "self-test", "kind": "self-test", "arms": []})
        if answer["code"] == 124:
            raise self._over_budget("in the self-test of the runtime")
        if answer["code"]:
            said = (answer.get("cause") or {}).get("stderr", "").splitlines()[-1:]
            message = f"litert-c: {answer['message']}" + (f" ({said[0]})" if said else "")
            self._raise_for(69 if answer["code"] == 70 else answer["code"], answer["error"], message, _owner(answer))  # fmt: skip
        android.check_health(facts["health"], self.device.address)
        boot_id = facts["health"]["boot_id"]
        if self._boot_id not in (None, boot_id):
            self._restart(boot_id)
        self._boot_id = boot_id
        start = {
            "kind": "start", "job": self.job["id"], "identity": self._identity("", "", []),
            "boot_id": boot_id, "realtime_s": facts["health"]["realtime_s"], "device": facts["device"],
            "runtime": {
                "backend": "litert-c", "name": "litert", "version": library["version"],
                "sha256": library["sha256"], "runner": "c", "compiler": self.board.compiler,
            },
            "rejected": [],
        }  # fmt: skip
        self._lines = [start, *self._lines]

    def _restart(self, boot_id: str | None) -> None:
        """Begin anew after a reboot; the record's start stays, with the new boot."""
        self._start_over()
        self._done = {}
        self._boot_id = boot_id
        self._lines = [{**line, "boot_id": boot_id} for line in self._lines[:1]]

    def _run_session(
        self, entry: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """One entry of the plan -> (session, None), or (session, why the model does not run)."""
        if entry["kind"] not in KINDS:
            now = self.board.facts()["health"]
            cannot = {"what": "unsupported", "message": f"the C runner cannot measure {entry['kind']}", "stderr": ""}  # fmt: skip
            return {"kind": entry["kind"], "arms": entry["arms"], "data": None, "cause": cannot,
                    "before": now, "after": now, "flags": []}, None  # fmt: skip
        answer = self._call(entry)
        code, cause = answer["code"], answer.get("cause") or {}
        if "before" not in answer:
            self._raise_for(code, answer["error"], answer["message"], _owner(answer))
        session = _session(answer)
        if self.board.phone is not None:
            # the files do not say it, and Termux is not told: None
            session["after"] |= android.health(self.device, session["after"])
            if android.is_throttled(session["after"]):
                session["flags"] = sorted({*session["flags"], "throttled_now"})
        if code == 0 or (cause.get("what") == "unsupported" and entry["kind"] in OPTIONAL):
            return session, None
        if cause.get("what") == "unsupported":
            self._raise_for(69, "no-runtime", f"litert-c: {cause['message']}", None)
        if code == 70:
            return session, None if cause.get("what") == "killed" else {"message": answer["message"], **cause}  # fmt: skip
        self._raise_for(code, answer["error"], answer["message"], None)

    def _call(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """One call of the runner. An own call that a broken link left behind is waited for."""
        give_up_s = time.monotonic() + RELEASE_S
        while True:
            left_s = self.left_s
            if left_s <= 0:
                raise self._over_budget(f"before session {entry['tag']}")
            try:
                done = self.device.run(
                    [*self.board.command, "session", *self._words(entry, left_s)],
                    timeout_s=left_s + COMMAND_TIMEOUT_S,
                )
            except CommandTimeout as exc:
                raise self._over_budget(f"in session {entry['tag']}") from exc
            answer = _answer(done, self.device.address)
            owner = _owner(answer)  # None: it is being written
            own = owner is None or owner.get("job") == self.job["id"]
            if answer["code"] != 75 or not own or time.monotonic() > give_up_s:
                return answer
            time.sleep(1.0)

    def _words(self, entry: Mapping[str, Any], limit_s: float) -> list[str]:
        job, runtime, given = self.job, self.job["runtime"], self.job["inputs"]
        words = {
            "id": job["id"], "owner": plain_name(job["owner"]), "work_dir": job["work_dir"],
            "job_dir": self.job_dir, "tag": entry["tag"], "kind": entry["kind"],
            "identity": self._identity(entry["tag"], entry["kind"], entry["arms"]),
            "runtime": runtime["path"], "runtime_size": runtime["size"],
            "runtime_sha256": runtime["sha256"], "self_test": self.board.self_test,
            "threads": job["threads"], "kernel": job["kernel"],
            "weight_cache": int(job["weight_cache"]), "warmup_s": job["warmup_s"],
            "session_s": job["session_s"], "min_inferences": job["min_inferences"],
            "seed": job["seed"], "lease_s": job["lease_s"], "min_free_bytes": job["min_free_bytes"],
            # as worker.py draws it
            "order_seed": zlib.crc32(f"{job['seed']} {entry['tag']}".encode()),
            "limit_s": f"{limit_s:.3f}",
        }  # fmt: skip
        found = [f"{key}={value}" for key, value in words.items()]
        found += [f"cpu={cpu}" for cpu in job["affinity"]]
        found += [f"read={pattern}" for pattern in HEALTH_FILES]
        for arm in entry["arms"]:
            model = job["models"][arm]
            found += [f"arm={arm}", f"model={model['path']}", f"size={model['size']}", f"sha256={model['sha256']}"]  # fmt: skip
            found += [f"signature={model['signature']}"] if model.get("signature") else []
        if entry["kind"] == "outputs" and given is not None:
            found += [f"inputs={given['path']}", f"inputs_size={given['size']}", f"inputs_sha256={given['sha256']}"]  # fmt: skip
            found += [f"input={name}" for name in given["tensors"]]
            if "first" in entry:  # a piece of the samples
                found += [f"first_input={entry['first']}", f"input_count={entry['count']}"]
            else:
                found.append(f"input_count={given['count']}")
        return found

    def _identity(self, tag: str, kind: str, arms: Sequence[str]) -> str:
        """What two sessions share that may stand for each other."""
        same = {k: v for k, v in self.job.items() if k not in ("plan", "budget_s")}
        text = json.dumps([same, tag, kind, list(arms), self.payload.sha256], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _cool_down(self) -> None:
        limit_c, began_s = self.job["start_below_c"], time.monotonic()
        told = False
        while limit_c is not None:
            temperature_c = hottest_c(
                self.board.facts()["health"], self.job.get("thermal_zones", ())
            )
            if temperature_c is None or temperature_c < limit_c:
                return
            waited_s = time.monotonic() - began_s
            if waited_s >= self.job["cool_down_s"]:
                self._raise_for(78, "too-hot", f"it is at {temperature_c:.1f} C after {waited_s:.0f} s, measuring starts below {limit_c:g} C", None)  # fmt: skip
            if not told:
                log.info("waiting for the device to cool down")
                told = True
            time.sleep(min(COOLING_LOOK_S, max(0.01, self.job["cool_down_s"] - waited_s)))

    def _check_heat(self, session: Session) -> None:
        limit_c = self.job["abort_above_c"]
        reached_c = hottest_c(session["after"], self.job.get("thermal_zones", ()))
        if limit_c is not None and reached_c is not None and reached_c > limit_c:
            self._raise_for(78, "too-hot", f"it reached {reached_c:.1f} C, measuring stops above {limit_c:g} C", None)  # fmt: skip

    def _outcome(
        self, plan: Sequence[Mapping[str, Any]], failure: dict[str, Any] | None
    ) -> Outcome:
        tags = [entry["tag"] for entry in plan if entry["tag"] in self._done]
        shown = {line["tag"] for line in self._lines[1:]}
        earlier = [
            {"kind": "session", "tag": t, "boot_id": self._boot_id, "session": self._done[t]}
            for t in tags
            if t not in shown
        ]
        end = {"kind": "end", "code": 70 if failure else 0, "cause": failure}
        return Outcome(
            sessions=tuple({**self._done[tag], "tag": tag} for tag in tags),
            failure=failure,
            runtime=self._lines[0]["runtime"],
            rejected=[],
            resumed=self.resumed,
            repeated=self._killed,
            boot_id=self._boot_id,
            journal=(self._lines[0], *earlier, *self._lines[1:], end),
        )


def _answer(done: Completed, address: str) -> dict[str, Any]:
    """The runner's one JSON object. Raises NotStable where the runner itself was killed or crashed."""
    if done.returncode > 128 and not done.stdout.strip():
        raise NotStable(
            f"the runner on {address} ended with signal {done.returncode - 128} before it answered",
            hint="what stops processes there (out of memory, a watchdog)? then try again",
            code="runner-killed",
        )
    answer = parse_object(
        done.stdout.decode("utf-8", "replace").encode(), stderr=done.stderr,
        returncode=done.returncode, address=address,
    )  # fmt: skip
    if not isinstance(answer.get("message"), str) or not isinstance(answer.get("error"), str | None):  # fmt: skip
        raise bad_answer("the runner's answer is not whole", done.stdout, done.stderr, address)
    return answer


def _session(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A session as the agent's journal has it, from an answer of the runner."""
    before, after, data = health(answer["before"]), health(answer["after"]), answer["data"]
    if data is not None and answer["kind"] == "latency":
        data = dict(data)
        states = time_in_state(
            data.pop("states_before"), data.pop("states_after"), ticks_per_s=data.pop("ticks_per_s")
        )
        data["time_in_state"] = states
    return {
        "kind": answer["kind"], "arms": answer["arms"], "data": data, "cause": answer["cause"],
        "before": before, "after": after, "flags": health_flags(before, after),
    }  # fmt: skip


def _owner(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        owner = json.loads(answer.get("owner_text") or "")
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def plain_name(text: str) -> str:
    """A name as the runner may put it into its lease: letters, digits and a few signs."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "-_.@ " else "_" for c in text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".") if n.isdigit())
