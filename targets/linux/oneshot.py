#!/usr/bin/env python3
"""Measures a TFLite model on the Linux board it runs on. Standard library only, Python >= 3.7.

    python3 agent.py job.json         measure; ONE JSON object on stdout, logs on stderr
    python3 agent.py facts WORK_DIR   what this board is, its health, free space, runtimes found

This process is a supervisor: it checks, holds the lease, watches the clock and never loads a
runtime. Every session runs in a fresh worker process (worker.py), so a model that crashes is a
line of data ("runs_on_device": false), not the end of the measurement.

Exit codes (sysexits.h where one fits); the JSON object is printed with every one of them:
    0 done          64 bad job or request 65 a file is missing, short or altered
    69 no runtime   70 the worker failed  71 a file cannot be used  73 disk full
    75 busy         124 time budget used up         1 a bug in here
"""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from backends import SELF_TEST_MODEL
from board import (
    device_facts,
    free_bytes,
    glibc_version,
    health,
    health_flags,
    log,
    machine,
    packages,
    read,
    sha256_of,
)

SCHEMA = 1
EX_OK, EX_BUG, EX_BAD_JOB, EX_DATA, EX_NO_RUNTIME, EX_WORKER = 0, 1, 64, 65, 69, 70
EX_OS, EX_DISK_FULL, EX_BUSY, EX_BUDGET = 71, 73, 75, 124

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")


class Stop(Exception):
    """Ends the job with an exit code; what is known so far is still printed."""

    def __init__(self, code, error, message, **more):
        Exception.__init__(self, message)
        self.code, self.error, self.message, self.more = code, error, message, more


def check_file(what, item):
    """The file is there and is the one the job was made for, or Stop."""
    path = os.path.expanduser(item["path"])
    try:
        size = os.path.getsize(path)
        found = sha256_of(path) if size == item["size"] else None
    except OSError as exc:
        raise Stop(EX_DATA, "data-mismatch", "%s %s: %s" % (what, path, exc.strerror))
    if found is None:
        message = "%s %s has %d bytes, the job says %d" % (what, path, size, item["size"])
        raise Stop(EX_DATA, "data-mismatch", message)
    if found != item["sha256"]:
        message = "%s %s has sha256 %s, the job says %s" % (what, path, found, item["sha256"])
        raise Stop(EX_DATA, "data-mismatch", message)
    return os.path.realpath(path)  # as /proc/self/smaps spells it


# ----------------------------------------------------------------------------------- supervisor


def run_worker(spec, timeout_s):
    """(result, None) or (None, cause): a cause has `what`, `message` and `stderr`."""
    kills_before = health()["oom_kills"]
    process = subprocess.Popen(
        [sys.executable, WORKER, str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        env=dict(os.environ, PYTHONHASHSEED="0"),  # one layout of dicts: memory repeats better
    )  # fmt: skip
    stdout, tail = [], [b""]

    def collect():
        stdout.append(process.stdout.read())

    def collect_tail():
        for chunk in iter(lambda: process.stderr.read1(4096), b""):
            tail[0] = (tail[0] + chunk)[-4000:]

    threads = [threading.Thread(target=collect), threading.Thread(target=collect_tail)]
    for thread in threads:
        thread.start()
    timed_out = False
    try:
        process.stdin.write(json.dumps(spec).encode())
        process.stdin.close()
    except OSError:
        pass  # it is dead already; the return code says more
    try:
        process.wait(timeout=max(0.001, timeout_s))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
        process.stdout.close()
        process.stderr.close()
    stderr = tail[0].decode("utf-8", "replace").strip()

    def cause(what, message, **more):
        return None, dict(what=what, message=message, stderr=stderr, **more)

    if timed_out:
        return cause("timeout", "the worker was stopped after %.1f s" % timeout_s)
    if process.returncode < 0:
        number = -process.returncode
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "signal %d" % number
        kills = health()["oom_kills"]
        if number == signal.SIGKILL and None not in (kills, kills_before) and kills > kills_before:
            return cause(
                "out-of-memory", "the kernel killed the worker: out of memory", signal=number
            )
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return cause("killed", "someone killed the worker with %s" % name, signal=number)
        return cause("crash", "the worker crashed with %s" % name, signal=number)
    try:
        answer = json.loads((stdout[0] if stdout else b"").decode())
    except ValueError:
        answer = {}
    if process.returncode == 0 and "ok" in answer:
        return answer["ok"], None
    message = answer.get("error") or "the worker ended with code %d" % process.returncode
    said = re.findall(r"^ERROR: *(.*\S)", stderr, re.M)
    if said:
        message += " (%s)" % "; ".join(said[-3:])
    return cause(answer.get("what", "error"), message)


# ELF e_machine (elf.h) and EI_CLASS for what `machine` returns
ELF_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64"}


def elf_machine(path):
    with open(path, "rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return ELF_MACHINES.get(struct.unpack("<H", head[18:20])[0], "unknown")


def numbers(version):
    return tuple(int(n) for n in re.findall(r"\d+", version or "")[:3])


def library_fault(library):
    """Why a pushed libLiteRt.so must not be loaded here, or None."""
    found, here = elf_machine(library["path"]), machine()
    if found != here:
        return "the library is for %s, this process is %s" % (found or "no machine: not ELF", here)
    if numbers(library["version"]) < (2, 1, 6):
        return (
            "the C API of LiteRT %s is another one (2.1.6 or newer is needed)" % library["version"]
        )
    if library.get("glibc"):
        has = glibc_version()
        if has is None:
            return "the C library here is not glibc"
        if numbers(has) < numbers(library["glibc"]):
            return "the library needs glibc %s, this board has %s" % (library["glibc"], has)
    return None


def choose_runtime(job, self_test, deadline, unfit):
    """The first backend that loads and passes the self-test -> (runtime, rejected ones).

    ``unfit`` are backends that turned out not to support the model, with the reason. Raises
    Stop(69) with every reason where none is left.
    """
    wanted, rejected, found = job["backend"], list(unfit), packages()
    candidates = []
    if job["runtime"] is not None:
        item = job["runtime"]
        candidates.append(
            {"backend": "litert-c", "name": "litert", "version": item["version"],
             "sha256": item["sha256"], "path": item["path"]}
        )  # fmt: skip
    else:
        rejected.append({"backend": "litert-c", "reason": "no libLiteRt.so was pushed"})
    for backend, module, name in (
        ("litert-interpreter", "ai_edge_litert", "litert"),
        ("tflite-runtime-interpreter", "tflite_runtime", "tflite-runtime"),
    ):
        if module in found:
            candidates.append(
                {"backend": backend, "name": name, "version": found[module]["version"],
                 "module": module, "path": found[module]["path"],
                 "sha256": package_library_sha256(found[module]["path"])}
            )  # fmt: skip
        else:
            reason = "Python %s has no %s" % (platform.python_version(), module)
            rejected.append({"backend": backend, "reason": reason})
    for candidate in candidates:
        known_unfit = [r["backend"] for r in unfit]
        if wanted not in ("auto", candidate["backend"]) or candidate["backend"] in known_unfit:
            continue
        reason = None
        if candidate["backend"] == "litert-c":
            reason = library_fault(job["runtime"])
        if reason is None:
            spec = {
                "kind": "self-test",
                "runtime": candidate,
                "self_test": self_test,
                "affinity": [],
            }
            result, cause = run_worker(spec, deadline - time.monotonic())
            if result is not None:
                return candidate, rejected
            # neither of these says that the backend is unfit: no other one takes its place
            if cause["what"] == "timeout":
                message = "the time budget of %g s was used up in the self-test of %s" % (
                    job["budget_s"], candidate["backend"],
                )  # fmt: skip
                raise Stop(EX_BUDGET, "budget", message)
            if cause["what"] == "killed":
                raise Stop(EX_WORKER, "worker-failed", cause["message"], cause=cause)
            reason = cause["message"]
            if cause["stderr"]:
                reason += " (%s)" % cause["stderr"].splitlines()[-1]
        rejected.append({"backend": candidate["backend"], "reason": reason})
        log("%s: %s" % (candidate["backend"], reason))
    reasons = [r for r in rejected if wanted in ("auto", r["backend"])]
    message = "; ".join("%s: %s" % (r["backend"], r["reason"]) for r in reasons)
    raise Stop(EX_NO_RUNTIME, "no-runtime", message, rejected=rejected)


def package_library_sha256(folder):
    """sha256 of the largest shared object of a package: its runtime."""
    libraries = [os.path.join(folder, n) for n in os.listdir(folder) if n.endswith(".so")]
    libraries = [p for p in libraries if "Accelerator" not in os.path.basename(p)]
    return sha256_of(max(libraries, key=os.path.getsize)) if libraries else None


class Lease:
    """One job at a time on a board: flock while running, and until a moment after for its owner.

    The lock falls with the process, however it dies. Between two calls of one job the owner file
    keeps others out for `lease_s`; a reboot or the passing of that time ends it.
    """

    def __init__(self, job):
        self.job, self.path = job, os.path.join(job["work_dir"], "lock")
        self.stream = open(self.path, "a+")
        self.now = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(EX_BUSY, "busy", "another job is running on this board", owner=self.owner())
        owner = self.owner()
        if (
            owner
            and owner.get("job") != job["id"]
            and owner.get("boot_id") == read("/proc/sys/kernel/random/boot_id")
            and owner.get("until_boottime_s", 0) > self.now()
        ):
            message = "another job holds this board for %.0f s more" % (
                owner["until_boottime_s"] - self.now()
            )
            raise Stop(EX_BUSY, "busy", message, owner=owner)
        self.write(self.now())

    def owner(self):
        self.stream.seek(0)
        try:
            owner = json.loads(self.stream.read(4096))
        except ValueError:
            return None
        return owner if isinstance(owner, dict) else None

    def write(self, until):
        text = json.dumps(
            {"job": self.job["id"], "owner": self.job["owner"], "pid": os.getpid(),
             "since_unix_s": time.time(), "until_boottime_s": until,
             "boot_id": read("/proc/sys/kernel/random/boot_id")}
        )  # fmt: skip
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write(text)
        self.stream.flush()

    def leave(self):
        self.write(self.now() + self.job["lease_s"])


SESSIONS = ["latency", "memory", "outputs"]
NUMBER = (int, float)
JOB_KEYS = {
    "schema": int, "id": str, "owner": str, "work_dir": str, "model": dict,
    "runtime": (dict, type(None)), "backend": str, "threads": int, "affinity": list,
    "warmup_s": NUMBER, "session_s": NUMBER, "min_inferences": int, "seed": int,
    "sessions": list, "inputs": (dict, type(None)), "budget_s": NUMBER, "lease_s": NUMBER,
    "min_free_bytes": int,
}  # fmt: skip


def load_job(path):
    try:
        with open(path) as stream:
            job = json.load(stream)
    except (OSError, ValueError) as exc:
        raise Stop(EX_BAD_JOB, "bad-job", "%s: %s" % (path, exc))
    if not isinstance(job, dict):
        raise Stop(EX_BAD_JOB, "bad-job", "%s holds no JSON object" % path)
    if not isinstance(job.get("schema"), int) or job["schema"] > SCHEMA:
        message = "job schema %r, this agent knows %d" % (job.get("schema"), SCHEMA)
        raise Stop(EX_BAD_JOB, "bad-job", message)
    wrong = ["no %s" % key for key in JOB_KEYS if key not in job]
    wrong += ["unknown key %s" % key for key in job if key not in JOB_KEYS]
    wrong += [
        "%s is %r" % (key, job[key])
        for key, kind in JOB_KEYS.items()
        if key in job and not isinstance(job[key], kind)
    ]
    for name, keys in (
        ("model", {"path": str, "size": int, "sha256": str}),
        ("runtime", {"path": str, "size": int, "sha256": str, "version": str}),
        ("inputs", {"path": str, "size": int, "sha256": str, "count": int, "tensors": list}),
    ):
        if isinstance(job.get(name), dict):
            wrong += [
                "%s.%s is %r" % (name, key, job[name].get(key))
                for key, kind in keys.items()
                if not isinstance(job[name].get(key), kind)
            ]
    if not wrong:
        wrong += ["no session is called %r" % s for s in job["sessions"] if s not in SESSIONS]
        if job["backend"] not in ("auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter"):  # fmt: skip
            wrong.append("backend is %r" % job["backend"])
        if job["threads"] < 1:
            wrong.append("threads is %d" % job["threads"])
        if "outputs" in job["sessions"] and job["inputs"] is None:
            wrong.append("a session 'outputs' needs inputs")
    if wrong:
        raise Stop(EX_BAD_JOB, "bad-job", "%s: %s" % (path, "; ".join(wrong)))
    job["work_dir"] = os.path.expanduser(job["work_dir"])
    return job


def run_job(path, reply):
    began = time.monotonic()
    job = load_job(path)
    deadline = began + job["budget_s"]
    reply["job"] = job["id"]
    lease = Lease(job)
    try:
        measure(job, reply, deadline, os.path.dirname(os.path.abspath(path)))
    finally:
        lease.leave()


def measure(job, reply, deadline, job_dir):
    reply["device"] = device_facts()
    if not job["sessions"]:
        return
    free = free_bytes(job["work_dir"])
    if free < job["min_free_bytes"]:
        message = "%s has %d bytes free, %d are needed" % (
            job["work_dir"], free, job["min_free_bytes"],
        )  # fmt: skip
        raise Stop(EX_DISK_FULL, "disk-full", message)
    job["model"]["path"] = check_file("model", job["model"])
    if job["runtime"] is not None:
        job["runtime"]["path"] = check_file("runtime", job["runtime"])
    if job["inputs"] is not None:
        job["inputs"]["path"] = check_file("inputs", job["inputs"])
    folder = tempfile.mkdtemp(prefix="session-", dir=job_dir)
    try:
        self_test = os.path.join(folder, "self-test.tflite")
        with open(self_test, "wb") as stream:
            stream.write(SELF_TEST_MODEL)
        unfit = []
        reply["runtime"], reply["rejected"] = choose_runtime(job, self_test, deadline, unfit)
        kinds = list(job["sessions"])
        while kinds:
            kind = kinds[0]
            session = run_session(job, kind, reply["runtime"], self_test, deadline)
            cause = session["cause"]
            if cause is not None and cause["what"] == "unsupported" and not reply["sessions"]:
                unfit.append({"backend": reply["runtime"]["backend"], "reason": cause["message"]})
                log("%s: %s" % (unfit[-1]["backend"], cause["message"]))
                chosen = choose_runtime(job, self_test, deadline, unfit)
                reply["runtime"], reply["rejected"] = chosen
                continue
            kinds.pop(0)
            reply["sessions"].append(session)
            if cause is None:
                reply["runs_on_device"] = True
            elif cause["what"] == "timeout":
                message = "the time budget of %g s was used up in a %s session" % (
                    job["budget_s"], kind,
                )  # fmt: skip
                raise Stop(EX_BUDGET, "budget", message)
            elif cause["what"] == "bad-request":
                raise Stop(EX_BAD_JOB, "bad-request", cause["message"])
            else:
                if cause["what"] != "killed":
                    reply["runs_on_device"] = False
                raise Stop(EX_WORKER, "worker-failed", cause["message"], cause=cause)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_session(job, kind, runtime, self_test, deadline):
    spec = {
        "kind": kind, "runtime": runtime, "self_test": self_test,
        "arms": {"model": job["model"]["path"]}, "tag": kind, "kernel": "", "weight_cache": False,
        "job_dir": os.path.dirname(self_test), "out_path": os.path.join(os.path.dirname(self_test), "out.bin"),
        "threads": job["threads"], "affinity": job["affinity"], "seed": job["seed"],
        "warmup_s": job["warmup_s"], "session_s": job["session_s"],
        "min_inferences": job["min_inferences"], "inputs": job["inputs"],
    }  # fmt: skip
    before = health()
    log("%s session with %s %s" % (kind, runtime["backend"], runtime["version"]))
    data, cause = None, None
    if kind == "latency":
        cold, cause = run_worker(dict(spec, kind="cold"), deadline - time.monotonic())
        log("cold load: %s" % ("done" if cause is None else cause["message"]))
    if cause is None:
        data, cause = run_worker(spec, deadline - time.monotonic())
    if data is not None and kind == "latency":
        data.update(data.pop("arms")["model"])
        data["cold"] = cold
    if data is not None and kind == "outputs":
        import base64

        with open(data["path"], "rb") as stream:
            data["samples"] = [
                [base64.b64encode(stream.read(t["bytes"])).decode() for t in data["outputs"]]
                for _ in range(data["count"])
            ]
    after = health()
    return {
        "kind": kind,
        "cause": cause,
        "data": data,
        "before": before,
        "after": after,
        "flags": health_flags(before, after),
    }


def main(argv):
    if sys.version_info < (3, 7):
        sys.stderr.write("agent: Python 3.7 or newer is needed\n")
        return EX_NO_RUNTIME
    reply = {
        "schema": SCHEMA, "code": EX_OK, "error": None, "message": "", "job": None,
        "device": None, "runtime": None, "rejected": [], "runs_on_device": None, "sessions": [],
    }  # fmt: skip
    try:
        if len(argv) == 3 and argv[1] == "facts":
            reply["device"], reply["health"] = device_facts(), health()
            reply["free_bytes"] = free_bytes(os.path.expanduser(argv[2]))
            reply["packages"] = packages()
        elif len(argv) == 2:
            run_job(argv[1], reply)
        else:
            raise Stop(EX_BAD_JOB, "bad-job", "usage: agent.py job.json | agent.py facts WORK_DIR")
    except Stop as stop:
        reply.update(code=stop.code, error=stop.error, message=stop.message, **stop.more)
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        reply.update(
            code=EX_DISK_FULL if full else EX_OS,
            error="disk-full" if full else "os-error",
            message=str(exc),
        )
        traceback.print_exc()
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
