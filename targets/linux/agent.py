#!/usr/bin/env python3
"""Measures TFLite models on the Linux board it runs on. Standard library only, Python >= 3.7.

    agent.py facts WORK_DIR                  what this board is, its health, free space, runtimes
    agent.py start JOBDIR                    begin, resume or extend the job of JOBDIR/job.json
    agent.py status JOBDIR OFFSET [WAIT_S]   its state, and its journal from byte OFFSET on
    agent.py end JOBDIR [--keep]             stop it, give the board back, remove JOBDIR
    agent.py survey WORK_DIR AGE_S           facts, and what lies in the work folder; AGE_S: how old a
                                             job without a supervisor is when it counts as garbage
    agent.py tidy WORK_DIR AGE_S             remove that garbage, put back a governor left changed
    agent.py hold WORK_DIR JOB OWNER LEASE_S PROGRAM [ARGUMENT...]
                                             become PROGRAM, which has the board while it runs, and JOB
                                             for LEASE_S from its start
    agent.py release WORK_DIR JOB            stop such a program, give the board back
    agent.py check WORK_DIR BACKEND LIBRARY  which runtime works here: LIBRARY is {path, size, sha256,
                                             version, glibc, glibcxx} or null, as JSON

Each prints ONE JSON object on stdout and ends with the object's "code"; logs go to stderr. `start`
returns as soon as the job holds the board: a detached supervisor (supervisor.py) carries it out
and lives on when the connection is gone. `status` waits up to WAIT_S for news.

Codes (sysexits.h where one fits):
    0 done           64 bad job or request  65 a file is missing, short or altered
    69 no runtime    70 the worker failed   71 a file cannot be used   73 disk full
    75 busy          76 no such job, reboot 78 board too hot
    124 time budget used up                 1 a bug in here
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import governor
import housekeeping
import journal
from board import device_facts, free_bytes, health, log, packages
from job import (
    EX_BAD_JOB,
    EX_BUG,
    EX_DISK_FULL,
    EX_NO_RUNTIME,
    EX_OK,
    EX_OS,
    EX_STALE,
    SCHEMA,
    Stop,
    check_file,
    load_job,
    stop_for,
)
from lease import Lease, SupervisorLock, boot_id, boottime_s, give_back, stop_holder

SUPERVISOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervisor.py")
# How long `start` waits for its supervisor, and whoever ends one for it to be gone.
PATIENCE_S = 10.0
LOOK_S = 0.02
# `status` looks this often while a session runs; a look costs 0.1 ms.
WATCH_S = 0.2
JOURNAL_LIMIT_BYTES = 4000000
# A self-test takes a fraction of a second; the first one on a slow card reads 8 MB.
CHECK_S = 60.0
FINAL = ("done", "failed")


def start(job_dir):
    """Begin the job, or find it at work -> its state."""
    lock = SupervisorLock(job_dir)
    job = load_job(job_dir)  # before the lock, which would make a file where there is no job
    os.sync()  # what was pushed outlives a power cut, and is not written while we measure
    deadline = time.monotonic() + PATIENCE_S
    while True:
        descriptor = lock.take()
        if descriptor is not None:
            return launch(job_dir, job, descriptor, deadline)
        state = state_of_holder(job_dir, lock)
        if state is not None and state["boot_id"] != boot_id():
            stop_supervisor(lock)
        elif state is not None and state["phase"] not in FINAL:
            return {"state": state}
        if time.monotonic() >= deadline:
            raise Stop(EX_OS, "stuck", "the supervisor of %s is neither at work nor gone" % job_dir)
        time.sleep(LOOK_S)


def state_of_holder(job_dir, lock):
    """What the supervisor that holds the lock has written; None where it has not yet."""
    state = journal.read_state(job_dir)
    return state if state is not None and state["pid"] == lock.holder() else None


def launch(job_dir, job, descriptor, deadline):
    """Start a supervisor that inherits the lock, and wait until it holds the lease or has ended."""
    free = free_bytes(job["work_dir"])
    if free < job["min_free_bytes"]:
        message = "%s has %d bytes free, %d are needed" % (
            job["work_dir"], free, job["min_free_bytes"],
        )  # fmt: skip
        raise Stop(EX_DISK_FULL, "disk-full", message)
    journal.make_ballast(job_dir)
    kept = os.path.join(job_dir, housekeeping.KEPT)
    if os.path.exists(kept):
        os.unlink(kept)
    housekeeping.mark_used(job["work_dir"], housekeeping.files_of(job) + [__file__])
    with open(os.path.join(job_dir, "agent.log"), "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, SUPERVISOR, job_dir, str(descriptor)],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd="/",
            start_new_session=True, pass_fds=[descriptor],
        )  # fmt: skip
    os.close(descriptor)
    while True:
        ended = process.poll() is not None  # before the state is read: then that is the last one
        state = journal.read_state(job_dir)
        if state is not None and state["pid"] != process.pid:
            state = None
        if ended and (state is None or state["phase"] not in FINAL):
            message = "the supervisor ended with %d: see agent.log" % process.returncode
            raise Stop(process.returncode if process.returncode > 0 else EX_BUG, "died", message)
        if state is not None or time.monotonic() >= deadline:
            break
        time.sleep(LOOK_S)
    if state is None or state["phase"] != "failed":
        return {"state": state}
    reply = {"state": state, "code": state["code"]}
    reply.update(
        (key, state[key]) for key in ("error", "message", "owner", "cause") if key in state
    )
    return reply


def stop_supervisor(lock):
    """Kill the one that holds the lock, with its worker, and wait until it is gone."""
    deadline = time.monotonic() + PATIENCE_S
    while lock.is_held():
        pid = lock.holder()  # None: it was started this moment
        try:
            if pid is not None:
                os.killpg(pid, signal.SIGKILL)  # it leads its own session, its worker belongs to it
        except ProcessLookupError:
            pass
        if time.monotonic() >= deadline:
            raise Stop(EX_OS, "stuck", "process %s does not end" % pid)
        time.sleep(LOOK_S)


def status(job_dir, offset, wait_s):
    """State and journal, once there is something new: a line, or the supervisor's end."""
    lock, deadline = SupervisorLock(job_dir), time.monotonic() + wait_s
    while True:
        alive = lock.is_held()  # first: what follows is the last word of one that has ended
        state = journal.read_state(job_dir)
        begin, text = journal.read_from(job_dir, offset, JOURNAL_LIMIT_BYTES)
        if text or not alive or time.monotonic() >= deadline:
            break
        time.sleep(min(WATCH_S, max(0.0, deadline - time.monotonic())))
    if state is None and not alive:
        raise Stop(EX_STALE, "no-such-job", "there is no job in %s" % job_dir, state=None)
    rebooted = state is not None and state["boot_id"] != boot_id()
    return {
        "state": state, "alive": alive and not rebooted, "rebooted": rebooted, "from": begin,
        "journal": text, "offset": begin + len(text.encode()),
    }  # fmt: skip


def end(job_dir, keep):
    """Stop what runs, give the board back, remove the folder. Fine where there is nothing."""
    if os.path.basename(os.path.dirname(job_dir)) != "jobs":
        raise Stop(EX_BAD_JOB, "bad-request", "%s is no folder of a job: jobs/ID" % job_dir)
    if not os.path.isdir(job_dir):
        return {"state": None}
    lock = SupervisorLock(job_dir)
    stop_supervisor(lock)
    try:
        give_back(load_job(job_dir), governor.restore)
    except Stop as stop:
        log(stop.message)  # no job was ever asked for, so it has no lease
    state = journal.read_state(job_dir)
    if keep:
        with open(os.path.join(job_dir, housekeeping.KEPT), "w"):
            pass
    else:
        shutil.rmtree(job_dir)
        for item in housekeeping.tidy(os.path.dirname(os.path.dirname(job_dir))):
            log("removed %(path)s: %(why)s" % item)
    return {"state": state}


def hold(work_dir, job, owner, lease_s, command):
    """Become a program that has the lease. Raises Stop(75) where the board is another job's."""
    lease = Lease({"id": job, "owner": owner, "work_dir": work_dir, "lease_s": lease_s})
    lease.write(boottime_s() + lease_s)
    os.set_inheritable(lease.stream.fileno(), True)
    os.execvp(command[0], command)


def facts(work_dir):
    return {
        "device": device_facts(), "health": health(), "free_bytes": free_bytes(work_dir),
        "packages": packages(),
    }  # fmt: skip


def survey(work_dir, abandoned_s):
    from runtimes import libstdcxx_version

    found = housekeeping.survey(work_dir, abandoned_s)
    return dict(
        facts(work_dir), work_dir=found, libstdcxx=libstdcxx_version(),
        kernel_machine=os.uname().machine,
    )  # fmt: skip


def check(work_dir, backend, library):
    """The runtime that would measure, tried with a model that is known. Raises Stop(69)."""
    from backends import SELF_TEST_MODEL
    from runtimes import choose_runtime
    from supervisor import run_worker

    if library is not None:
        library = dict(library, path=check_file("runtime", library, lambda: None))
        housekeeping.mark_used(work_dir, [library["path"]])
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=housekeeping.CHECK) as folder:
        self_test = os.path.join(folder, "self-test.tflite")
        with open(self_test, "wb") as stream:
            stream.write(SELF_TEST_MODEL)

        def attempt(runtime):
            spec = {"kind": "self-test", "runtime": runtime, "self_test": self_test, "affinity": []}
            result, cause = run_worker(spec, CHECK_S)
            return None if result is not None else cause["message"]

        runtime, rejected = choose_runtime(backend, library, [], attempt)
    return {"runtime": runtime, "rejected": rejected}


def answer(argv):
    """What the command line asks for -> the reply's own keys. Raises Stop."""
    verb, arguments = (argv + [""])[1], argv[2:]
    folder = os.path.abspath(os.path.expanduser(arguments[0])) if arguments else ""
    if verb == "facts" and len(arguments) == 1:
        return facts(folder)
    if verb in ("survey", "tidy") and len(arguments) == 2:
        try:
            abandoned_s = float(arguments[1])
        except ValueError as exc:
            raise Stop(EX_BAD_JOB, "bad-request", str(exc))
        if verb == "survey":
            return survey(folder, abandoned_s)
        nobody = {"id": "tidy", "owner": "tidy", "work_dir": folder, "lease_s": 0}
        restored = give_back(nobody, governor.restore)
        return {"removed": housekeeping.tidy(folder, abandoned_s), "governor_restored": restored}
    if verb == "hold" and len(arguments) > 4:
        try:
            lease_s = float(arguments[3])
        except ValueError as exc:
            raise Stop(EX_BAD_JOB, "bad-request", str(exc))
        hold(folder, arguments[1], arguments[2], lease_s, arguments[4:])
    if verb == "release" and len(arguments) == 2:
        stop_holder(folder, arguments[1])
        nobody = {"id": arguments[1], "owner": "", "work_dir": folder, "lease_s": 0}
        return {"governor_restored": give_back(nobody, governor.restore)}
    if verb == "check" and len(arguments) == 3:
        try:
            library = json.loads(arguments[2])
        except ValueError as exc:
            raise Stop(EX_BAD_JOB, "bad-request", str(exc))
        return check(folder, arguments[1], library)
    if verb == "start" and len(arguments) == 1:
        return start(folder)
    if verb == "status" and len(arguments) in (2, 3):
        try:
            offset, wait_s = int(arguments[1]), float((arguments + ["0"])[2])
        except ValueError as exc:
            raise Stop(EX_BAD_JOB, "bad-request", str(exc))
        return status(folder, offset, wait_s)
    if verb == "end" and arguments[1:] in ([], ["--keep"]):
        return end(folder, keep=len(arguments) == 2)
    raise Stop(EX_BAD_JOB, "bad-request", __doc__)


def main(argv):
    if sys.version_info < (3, 7):
        sys.stderr.write("agent: Python 3.7 or newer is needed\n")
        return EX_NO_RUNTIME
    reply = {"schema": SCHEMA, "code": EX_OK, "error": None, "message": ""}
    try:
        reply.update(answer(argv))
    except Stop as stop:
        reply.update(code=stop.code, error=stop.error, message=stop.message, **stop.more)
    except OSError as exc:
        traceback.print_exc()
        stop = stop_for(exc)
        reply.update(code=stop.code, error=stop.error, message=stop.message)
    except Exception as exc:
        traceback.print_exc()
        reply.update(code=EX_BUG, error="bug", message="%s: %s" % (type(exc).__name__, exc))
    if reply["message"]:
        log(reply["message"])
    sys.stdout.write(json.dumps(reply, separators=(",", ":")) + "\n")
    sys.stdout.flush()
    return reply["code"]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
