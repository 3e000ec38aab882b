"""Carries out one job to its end, whoever goes away meanwhile: ``supervisor.py JOBDIR LOCK_FD``.

Started by ``agent.py start``, detached. It checks, holds the lease, watches the clock and the
temperature, writes the journal and never loads a runtime: each session runs in a fresh worker
process (worker.py), so a model that crashes is a line of data, not the end of the measurement.

Standard library only, Python 3.7 or newer.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback

import board
import governor
import instructions
import journal
from backends import SELF_TEST_MODEL
from board import log
from job import (
    EX_BAD_JOB,
    EX_BUDGET,
    EX_BUG,
    EX_DISK_FULL,
    EX_OK,
    EX_OS,
    EX_STALE,
    EX_UNFIT,
    EX_WORKER,
    FULL,
    SCHEMA,
    Stop,
    check_file,
    identity,
    load_job,
    stop_for,
)
from lease import Lease, boot_id, boottime_s
from runtimes import choose_runtime, is_unchanged

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
HEARTBEAT_S = 5.0
COOLING_LOOK_S = 1.0
# A worker that somebody killed says nothing of the model: its session is tried again this often.
MAX_RETRIES = 2
# What cannot be done everywhere, and says nothing of the model where it fails.
OPTIONAL = ("ops", "energy", "instructions")
# What a worker is told of the job as it is.
OPTIONS = (
    "threads", "affinity", "kernel", "weight_cache", "seed", "warmup_s", "session_s",
    "min_inferences",
)  # fmt: skip


def run_worker(spec, timeout_s, tick=lambda: None):
    """(result, None) or (None, cause): a cause has `what`, `message` and `stderr`.

    ``tick()`` is called about every HEARTBEAT_S; what it raises ends the worker and comes through.
    """
    kills_before, free_before = board.oom_kills(), board.memory_available_bytes()
    peak_before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # the library needs no package: without `site`, whatever is installed there costs no memory
    bare = ["-S"] if spec["runtime"]["backend"] == "litert-c" else []
    process = subprocess.Popen(
        [sys.executable] + bare + [WORKER, str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        env=dict(os.environ, PYTHONHASHSEED="0"),  # one layout of dicts: memory repeats better
        preexec_fn=instructions.fix_addresses if spec["kind"] == "instructions" else None,
    )  # fmt: skip
    stdout, tail = [], [b""]

    def collect():
        stdout.append(process.stdout.read())

    def collect_tail():
        for chunk in iter(lambda: process.stderr.read1(4096), b""):
            tail[0] = (tail[0] + chunk)[-4000:]

    threads = [
        threading.Thread(target=collect, daemon=True),
        threading.Thread(target=collect_tail, daemon=True),
    ]
    for thread in threads:
        thread.start()
    timed_out, deadline = False, time.monotonic() + timeout_s
    try:
        try:
            process.stdin.write(json.dumps(spec).encode())
            process.stdin.close()
        except OSError:
            pass  # it is dead already; the return code says more
        # the worker's stdout ends when it ends; waiting for that costs no CPU time, unlike
        # Popen.wait with a timeout, which looks 20 times a second
        while threads[0].is_alive() and not timed_out:
            threads[0].join(max(0.001, min(HEARTBEAT_S, deadline - time.monotonic())))
            timed_out = threads[0].is_alive() and time.monotonic() >= deadline
            tick()
    finally:
        if threads[0].is_alive():
            process.kill()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed its stdout and lives
            process.kill()
            process.wait()
        for thread in threads:
            thread.join(timeout=2)  # a child of a killed worker may hold its stderr a moment longer
    result, cause = what_came(
        stdout[0] if stdout else b"",
        tail[0].decode("utf-8", "replace").strip(),
        returncode=process.returncode,
        timeout_s=timeout_s if timed_out else None,
        kills_before=kills_before,
    )
    if cause is not None:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kB; of the largest so far
        cause["peak_rss_bytes"] = peak * 1024 if peak > peak_before else None
        cause["memory_available_bytes"] = free_before
    return result, cause


def what_came(stdout, stderr, returncode, timeout_s, kills_before):
    """What `run_worker` returns, of a worker that has ended. ``timeout_s`` is None unless it was
    stopped after that time; ``kills_before`` what `board.oom_kills` said before it was started."""

    def cause(what, message, **more):
        return None, dict(what=what, message=message, stderr=stderr, **more)

    if timeout_s is not None:
        return cause("timeout", "the worker was stopped after %.1f s" % timeout_s)
    if returncode < 0:
        number = -returncode
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "signal %d" % number
        kills = board.oom_kills()
        if number == signal.SIGKILL and None not in (kills, kills_before) and kills > kills_before:
            return cause(
                "out-of-memory", "the kernel killed the worker: out of memory", signal=number
            )
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return cause("killed", "someone killed the worker with %s" % name, signal=number)
        return cause("crash", "the worker crashed with %s" % name, signal=number)
    try:
        answer = json.loads(stdout.decode())
    except ValueError:
        answer = {}
    if returncode == 0 and "ok" in answer:
        return answer["ok"], None
    message = answer.get("error") or "the worker ended with code %d" % returncode
    said = re.findall(r"^ERROR: *(.*\S)", stderr, re.M)
    if said:
        message += " (%s)" % "; ".join(said[-3:])
    return cause(answer.get("what", "error"), message)


def is_finished(session):
    """Nothing is left to do for it: there is data, or this board cannot give any."""
    cause = session["cause"]
    return session["data"] is not None or (
        session["kind"] in OPTIONAL
        and cause["what"] in ("unsupported", "error", "crash", "out-of-memory")
    )


class Supervisor:
    """One run over the plan of a job. ``state`` is what ``agent.py status`` shows of it."""

    def __init__(self, job_dir):
        self.job_dir, self.boot_id = os.path.abspath(job_dir), boot_id()
        self.job = self.journal = self.runtime = None
        self.rejected, self.unfit, self.finished = [], [], {}
        self.runs_on_device = None
        self.deadline = self.next_beat = 0.0
        self.flags = set()  # what the board said during the session that runs
        self.state = {
            "schema": SCHEMA, "job": None, "phase": "starting", "pid": os.getpid(),
            "boot_id": self.boot_id, "boottime_s": boottime_s(), "tag": None, "sessions_done": 0,
            "journal_bytes": 0, "code": None, "error": None, "message": "",
        }  # fmt: skip

    # ------------------------------------------------------------------------------- reporting

    def note(self, **changes):
        """Change the state and write it, which is also a heartbeat."""
        self.state.update(changes, boottime_s=boottime_s())
        self.next_beat = time.monotonic() + HEARTBEAT_S
        try:
            journal.write_state(self.job_dir, self.state, sync=bool(changes))
        except OSError as exc:
            log("state.json: %s" % exc)  # what is measured must not fail for that

    def tick(self):
        """Between two pieces of work, and now and then during one. Raises Stop."""
        if time.monotonic() < self.next_beat:
            return
        self.note()
        if boot_id() != self.boot_id:
            raise Stop(EX_STALE, "rebooted", "this board was started anew")
        self.flags.update(board.throttled_now(board.throttling(ask_firmware=False)))
        self.check_heat(board.temperature_c(self.job.get("thermal_zones")))

    def check_heat(self, temperature_c):
        limit_c = self.job["abort_above_c"]
        if None not in (limit_c, temperature_c) and temperature_c > limit_c:
            message = "the board reached %.1f C, measuring stops above %g C" % (
                temperature_c, limit_c,
            )  # fmt: skip
            raise Stop(EX_UNFIT, "too-hot", message)

    def append(self, record):
        self.journal.append(record)
        self.note(journal_bytes=self.journal.length, sessions_done=len(self.finished))

    def append_session(self, tag, session):
        """One line; where the disk is full it goes where the ballast was, and the job ends."""
        if is_finished(session):
            self.finished[tag] = session
        if session["data"] is not None:
            self.runs_on_device = True
        record = {"kind": "session", "tag": tag, "boot_id": self.boot_id, "session": session}
        try:
            self.append(record)
        except OSError as exc:
            if exc.errno not in FULL:
                raise
            journal.free_ballast(self.job_dir)
            stop = stop_for(exc)
            # room for the last state comes first, as it takes none later
            self.note(phase="failed", code=stop.code, error=stop.error, message=stop.message)
            try:
                self.append(record)
            except OSError:
                self.finished.pop(tag, None)
            raise stop

    def end(self, code, error, message, more):
        more = {key: more[key] for key in ("cause", "owner") if key in more}
        if self.journal is not None:
            record = dict(kind="end", code=code, error=error, message=message, **more)
            try:
                self.journal.append(dict(record, runs_on_device=self.runs_on_device))
            except OSError as exc:
                log("the end is not in the journal: %s" % exc)
            more["runs_on_device"] = self.runs_on_device
            self.state["journal_bytes"] = self.journal.length
        self.state.update(
            more, phase="done" if code == EX_OK else "failed", code=code, error=error,
            message=message, boottime_s=boottime_s(), tag=None, sessions_done=len(self.finished),
        )  # fmt: skip
        if message:
            log(message)
        for attempt in range(2):
            try:
                return journal.write_state(self.job_dir, self.state, sync=True)
            except OSError as exc:
                log("state.json: %s" % exc)
                journal.free_ballast(self.job_dir)

    # ------------------------------------------------------------------------------------ the job

    def run(self, lock):
        """The whole job -> its exit code. ``lock`` is the descriptor of the SupervisorLock."""
        code, error, message, more = EX_OK, None, "", {}
        lease = None
        try:
            os.pwrite(lock, b"%d" % os.getpid(), 0)  # whom to end
            self.job = load_job(self.job_dir)
            self.state["job"] = self.job["id"]
            self.deadline = time.monotonic() + self.job["budget_s"]
            lease = Lease(self.job)
            governor.restore(self.job["work_dir"])  # of a job whose supervisor was killed
            self.note()
            if self.job.get("set_governor"):
                governor.set_governor(self.job["work_dir"], self.job["set_governor"])
            self.resume()
            self.check_files()
            self.run_plan()
        except Stop as stop:
            code, error, message, more = stop.code, stop.error, stop.message, stop.more
        except OSError as exc:
            traceback.print_exc()
            stop = stop_for(exc)
            code, error, message = stop.code, stop.error, stop.message
        except Exception as exc:
            traceback.print_exc()
            code, error, message = EX_BUG, "bug", "%s: %s" % (type(exc).__name__, exc)
        try:
            if lease is not None:
                governor.restore(self.job["work_dir"])
                lease.leave()
        except OSError as exc:
            log("the lease: %s" % exc)
        self.end(code, error, message, more)
        return code

    def resume(self):
        """Take over what an earlier run of the very same job finished since the board started."""
        self.journal = journal.Journal(self.job_dir)
        wanted = (identity(self.job), self.boot_id)
        current = False
        for record in self.journal.records:
            if record["kind"] == "start":
                current = (record["identity"], record["boot_id"]) == wanted
                if current:
                    self.runtime, self.rejected = record["runtime"], record["rejected"]
                else:
                    self.finished = {}
            elif record["kind"] == "session" and current and is_finished(record["session"]):
                self.finished[record["tag"]] = record["session"]
        measured = any(session["data"] is not None for session in self.finished.values())
        if measured and is_unchanged(self.runtime):
            self.runs_on_device = True
        else:  # nothing that counts depends on the choice: make it again
            self.finished, self.runtime = {}, None
        if self.finished:
            log("%d finished sessions are kept" % len(self.finished))

    def check_files(self):
        job = self.job
        self.note(journal_bytes=self.journal.length)
        self.models = {
            arm: check_file("model " + arm, item, self.tick) for arm, item in job["models"].items()
        }
        self.library = self.inputs = None
        if job["runtime"] is not None:
            path = check_file("runtime", job["runtime"], self.tick)
            self.library = dict(job["runtime"], path=path)
        if job["inputs"] is not None:
            self.inputs = dict(job["inputs"], path=check_file("inputs", job["inputs"], self.tick))
        self.self_test = os.path.join(self.job_dir, "self-test.tflite")
        with open(self.self_test, "wb") as stream:
            stream.write(SELF_TEST_MODEL)

    def choose_runtime(self):
        chosen = choose_runtime(self.job["backend"], self.library, self.unfit, self.attempt)
        self.runtime, self.rejected = chosen

    def attempt(self, runtime):
        spec = {
            "kind": "self-test",
            "runtime": runtime,
            "self_test": self.self_test,
            "affinity": [],
        }
        result, cause = run_worker(spec, self.left_s(), self.tick)
        if result is not None:
            return None
        # neither of these says that the backend is unfit: no other one takes its place
        if cause["what"] == "timeout":
            raise self.over_budget("in the self-test of %s" % runtime["backend"])
        if cause["what"] == "killed":
            raise Stop(EX_WORKER, "worker-failed", cause["message"], cause=cause)
        last = cause["stderr"].splitlines()[-1:]
        return "%s (%s)" % (cause["message"], last[0]) if last else cause["message"]

    def left_s(self):
        return self.deadline - time.monotonic()

    def over_budget(self, where):
        message = "the time budget of %g s was used up %s" % (self.job["budget_s"], where)
        return Stop(EX_BUDGET, "budget", message)

    def run_plan(self):
        queue, retries = self.to_do(), {}
        if self.runtime is None and queue:
            self.choose_runtime()
        self.append_start()
        while queue:
            entry = queue.pop(0)
            self.cool_down()
            self.note(phase="running", tag=entry["tag"])
            session, stop = self.run_session(entry)
            cause = session["cause"] or {"what": None}
            if (
                cause["what"] == "unsupported"
                and entry["kind"] not in OPTIONAL
                and self.runs_on_device is None
            ):
                self.unfit.append({"backend": self.runtime["backend"], "reason": cause["message"]})
                log("%s: %s" % (self.unfit[-1]["backend"], cause["message"]))
                self.choose_runtime()
                self.append_start()
                queue.insert(0, entry)
                continue
            self.append_session(entry["tag"], session)
            if stop is not None:
                raise stop
            if cause["what"] == "killed":
                retries[entry["tag"]] = retries.get(entry["tag"], 0) + 1
                if retries[entry["tag"]] > MAX_RETRIES:
                    raise Stop(EX_WORKER, "worker-failed", cause["message"], cause=cause)
                log("%s: %s; once more, last of all" % (entry["tag"], cause["message"]))
                queue.append(entry)
            elif not is_finished(session):
                raise self.failure(entry, cause)
            zones = self.job.get("thermal_zones")
            self.check_heat(board.hottest_c(session["after"]["temperatures_c"], zones))
            queue = queue or self.extension()

    def to_do(self):
        return [entry for entry in self.job["plan"] if entry["tag"] not in self.finished]

    def extension(self):
        """What a longer plan, pushed while this one ran, asks for beyond it."""
        try:
            job = load_job(self.job_dir)
        except Stop as stop:
            log(stop.message)
            return []
        if identity(job) != identity(self.job):
            return []
        self.job = job
        queue = self.to_do()
        if queue:
            self.deadline = time.monotonic() + job["budget_s"]
        return queue

    def append_start(self):
        self.append(
            {"kind": "start", "job": self.job["id"], "identity": identity(self.job),
             "boot_id": self.boot_id, "realtime_s": time.time(), "device": board.device_facts(),
             "runtime": self.runtime, "rejected": self.rejected}
        )  # fmt: skip

    def failure(self, entry, cause):
        """How a session that gave no data ends the job."""
        message = cause["message"]
        if cause["what"] == "timeout":
            return self.over_budget("in session %s" % entry["tag"])
        if cause["what"] == "bad-request":
            return Stop(EX_BAD_JOB, "bad-request", message)
        if cause["what"] == "disk-full":
            return Stop(EX_DISK_FULL, "disk-full", message)
        if cause["what"] == "os-error":
            return Stop(EX_OS, "os-error", message)
        self.runs_on_device = False
        return Stop(EX_WORKER, "worker-failed", message, cause=cause)

    def cool_down(self):
        limit_c, began = self.job["start_below_c"], time.monotonic()
        while limit_c is not None:
            temperature_c = board.temperature_c(self.job.get("thermal_zones"))
            if temperature_c is None or temperature_c < limit_c:
                return
            waited_s = time.monotonic() - began
            if waited_s >= self.job["cool_down_s"]:
                message = "the board is at %.1f C after %.0f s, measuring starts below %g C" % (
                    temperature_c, waited_s, limit_c,
                )  # fmt: skip
                raise Stop(EX_UNFIT, "too-hot", message)
            if self.left_s() <= 0:
                raise self.over_budget("while the board cooled down")
            if self.state["phase"] != "cooling":
                self.note(phase="cooling")
                log("cooling down: %.1f C, measuring starts below %g C" % (temperature_c, limit_c))
            time.sleep(min(COOLING_LOOK_S, max(0.01, self.job["cool_down_s"] - waited_s)))
            self.tick()

    def run_session(self, entry):
        """One entry of the plan -> (session, None), or (session, Stop) where the job ends there."""
        job, tag = self.job, entry["tag"]
        spec = dict(
            entry,
            runtime=self.runtime, self_test=self.self_test,
            arms={arm: self.models[arm] for arm in entry["arms"]},
            signatures={arm: job["models"][arm].get("signature", "") for arm in entry["arms"]},
            inputs=self.inputs, job_dir=self.job_dir,
            out_path=os.path.join(self.job_dir, "outputs-%s.bin" % tag),
        )  # fmt: skip
        spec.update((key, job[key]) for key in OPTIONS)
        self.flags.clear()
        before = board.health()
        log("%s: %s with %s" % (tag, entry["kind"], self.runtime["backend"]))
        data, cause, stop = None, None, None
        try:
            data, cause = self.work(spec)
        except Stop as found:
            stop = found
            cause = {"what": found.error, "message": found.message, "stderr": ""}
        after = board.health()
        if after["boot_id"] != self.boot_id and stop is None:
            stop = Stop(EX_STALE, "rebooted", "this board was started anew")
        flags = sorted(self.flags.union(board.health_flags(before, after)))
        session = {
            "kind": entry["kind"], "arms": entry["arms"], "data": data, "cause": cause,
            "before": before, "after": after, "flags": flags,
        }  # fmt: skip
        return session, stop

    def work(self, spec):
        """A session's worker; for a latency session one more before it per arm, which loads cold."""
        cold = {}
        for arm in spec["arms"] if spec["kind"] == "latency" else ():
            one = dict(spec, kind="cold", arms={arm: spec["arms"][arm]})
            cold[arm], cause = run_worker(one, self.left_s(), self.tick)
            if cause is not None:
                return None, cause
        data, cause = run_worker(spec, self.left_s(), self.tick)
        for arm in cold if cause is None else ():
            data["arms"][arm]["cold"] = cold[arm]
        return data, cause


def main(argv):
    job_dir, lock = argv[1], int(argv[2])
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.set_inheritable(lock, False)
    return Supervisor(job_dir).run(lock)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
