"""What is asked of the board: ``job.json``, checked whole before anything runs; and how jobs end.

Standard library only, Python 3.7 or newer.
"""

import errno
import hashlib
import json
import os
import re

SCHEMA = 2

# sysexits.h where one fits
EX_OK, EX_BUG, EX_BAD_JOB, EX_DATA, EX_NO_RUNTIME, EX_WORKER = 0, 1, 64, 65, 69, 70
EX_OS, EX_DISK_FULL, EX_BUSY, EX_STALE, EX_UNFIT, EX_BUDGET = 71, 73, 75, 76, 78, 124

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BACKENDS = ("auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter")
# kind of session -> options without which it cannot run; all are numbers
KINDS = {
    "latency": (), "memory": (), "outputs": (), "ops": (), "sustained": ("duration_s",),
    "energy": ("idle_s", "run_s"), "instructions": (),
}  # fmt: skip
NUMBER = (int, float)
NONE = type(None)
JOB_KEYS = {
    "schema": int, "id": str, "owner": str, "work_dir": str, "models": dict,
    "runtime": (dict, NONE), "inputs": (dict, NONE), "backend": str, "kernel": str,
    "weight_cache": bool, "threads": int, "affinity": list, "warmup_s": NUMBER,
    "session_s": NUMBER, "min_inferences": int, "seed": int, "plan": list, "budget_s": NUMBER,
    "lease_s": NUMBER, "min_free_bytes": int, "start_below_c": NUMBER + (NONE,),
    "cool_down_s": NUMBER, "abort_above_c": NUMBER + (NONE,),
}  # fmt: skip
# without them every zone is watched, and the governor stays what it is
OPTIONAL_KEYS = {"thermal_zones": list, "set_governor": str}
FILE_KEYS = {"path": str, "size": int, "sha256": str}
# without it, or where it is "", the main graph is run
MODEL_KEYS = dict(FILE_KEYS, signature=str)


class Stop(Exception):
    """Ends the job with an exit code; what is known so far is still reported."""

    def __init__(self, code, error, message, **more):
        Exception.__init__(self, message)
        self.code, self.error, self.message, self.more = code, error, message, more


def stop_for(exc):
    """How an OSError ends a job."""
    if exc.errno in FULL:
        return Stop(EX_DISK_FULL, "disk-full", str(exc))
    return Stop(EX_OS, "os-error", str(exc))


def wrong_types(where, value, keys):
    """What is missing or of another type, as text. ``True`` is no number here."""
    problems = []
    for key, kind in keys.items():
        found = value.get(key)
        is_bool = isinstance(found, bool) and kind is not bool
        if key not in value:
            problems.append("no %s%s" % (where, key))
        elif is_bool or not isinstance(found, kind):
            problems.append("%s%s is %r" % (where, key, found))
    return problems


def wrong_entry(entry, models):
    """What is wrong with one entry of the plan, as a list of texts."""
    if not isinstance(entry, dict):
        return ["a plan entry is %r" % (entry,)]
    problems = wrong_types("plan ", entry, {"tag": str, "kind": str, "arms": list})
    if problems:
        return problems
    tag, kind, arms = entry["tag"], entry["kind"], entry["arms"]
    if not re.match(r"[\w.-]{1,100}\Z", tag):
        problems.append("a plan tag is %r" % tag)
    if kind not in KINDS:
        problems.append("no session is called %r" % kind)
    if not arms or not all(isinstance(arm, str) and arm in models for arm in arms):
        problems.append("the arms of %s are %r, the models %s" % (tag, arms, sorted(models)))
    elif len(set(arms)) != len(arms) or (len(arms) > 1 and kind != "latency"):
        problems.append("the arms of %s are %r" % (tag, arms))
    problems += wrong_types(tag + " ", entry, dict.fromkeys(KINDS.get(kind, ()), NUMBER))
    return problems


def load_job(job_dir):
    """``job.json`` of a job's folder, whole and as schema 2 has it, or Stop(64)."""
    path = os.path.join(job_dir, "job.json")
    try:
        with open(path) as stream:
            job = json.load(stream)
    except (OSError, ValueError) as exc:
        raise Stop(EX_BAD_JOB, "bad-job", "%s: %s" % (path, exc))
    if not isinstance(job, dict):
        raise Stop(EX_BAD_JOB, "bad-job", "%s holds no JSON object" % path)
    if job.get("schema") != SCHEMA:
        message = "job schema %r, this agent knows %d" % (job.get("schema"), SCHEMA)
        raise Stop(EX_BAD_JOB, "bad-job", message)
    known = dict(JOB_KEYS, **{key: kind for key, kind in OPTIONAL_KEYS.items() if key in job})
    wrong = wrong_types("", job, known)
    wrong += ["unknown key %s" % key for key in job if key not in known]
    if not wrong:
        for arm, item in job["models"].items():
            item = dict({"signature": ""}, **item) if isinstance(item, dict) else {}
            wrong += wrong_types("models.%s." % arm, item, MODEL_KEYS)
        if job["runtime"] is not None:
            wrong += wrong_types("runtime.", job["runtime"], dict(FILE_KEYS, version=str))
        if job["inputs"] is not None:
            wrong += wrong_types("inputs.", job["inputs"], dict(FILE_KEYS, count=int, tensors=list))
        if job["backend"] not in BACKENDS:
            wrong.append("backend is %r" % job["backend"])
        if job["threads"] < 1:
            wrong.append("threads is %d" % job["threads"])
        for entry in job["plan"]:
            wrong += wrong_entry(entry, job["models"])
    if not wrong:
        tags = [entry["tag"] for entry in job["plan"]]
        wrong += [
            "the tag %s is there twice" % tag for tag in sorted(set(tags)) if tags.count(tag) > 1
        ]
        if job["inputs"] is None and any(entry["kind"] == "outputs" for entry in job["plan"]):
            wrong.append("a session 'outputs' needs inputs")
    if wrong:
        raise Stop(EX_BAD_JOB, "bad-job", "%s: %s" % (path, "; ".join(wrong)))
    return dict(job, work_dir=os.path.expanduser(job["work_dir"]))


def identity(job):
    """What two jobs share whose sessions may stand side by side: all but how much is asked."""
    same = {key: job[key] for key in job if key not in ("plan", "budget_s")}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def check_file(what, item, tick):
    """Where the file is, if it is the one the job was made for, or Stop(65). Reads all of it."""
    path = os.path.expanduser(item["path"])
    digest = hashlib.sha256()
    try:
        size = os.path.getsize(path)
        if size == item["size"]:
            with open(path, "rb") as stream:
                for chunk in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(chunk)
                    tick()
    except OSError as exc:
        raise Stop(EX_DATA, "data-mismatch", "%s %s: %s" % (what, path, exc.strerror))
    if size != item["size"]:
        message = "%s %s has %d bytes, the job says %d" % (what, path, size, item["size"])
        raise Stop(EX_DATA, "data-mismatch", message)
    if digest.hexdigest() != item["sha256"]:
        message = "%s %s has sha256 %s, the job says %s" % (
            what, path, digest.hexdigest(), item["sha256"],
        )  # fmt: skip
        raise Stop(EX_DATA, "data-mismatch", message)
    return os.path.realpath(path)  # as /proc/self/smaps spells it
