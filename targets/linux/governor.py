"""Sets the governor of the processor's clock for a job that asks for it, and puts back what was there.

``governor.json`` in the work folder remembers what was there from before the first write until all of
it is back; so whoever has the board next puts it back where a supervisor was killed. Only the holder
of the board's lease comes here. Standard library only, Python 3.7 or newer.
"""

import json
import os
import subprocess

from board import log
from job import EX_BAD_JOB, Stop
from lease import boot_id
from sysfs import SYSROOT, names, read

POLICIES = "/sys/devices/system/cpu/cpufreq"  # Linux, admin-guide/pm/cpufreq
RECORD = "governor.json"
SUDO_S = 10.0


def set_governor(work_dir, wanted):
    """Let every policy have the governor ``wanted``, or Stop(64) and nothing is changed."""
    before = {
        policy: read("%s/%s/scaling_governor" % (POLICIES, policy))
        for policy in names(POLICIES)
        if policy.startswith("policy")
    }
    if not before or None in before.values():
        raise Stop(
            EX_BAD_JOB, "bad-request", "this board lets nobody choose a governor (no cpufreq)"
        )
    for policy in before:
        known = read("%s/%s/scaling_available_governors" % (POLICIES, policy))
        if known is not None and wanted not in known.split():
            message = "there is no governor %r for %s; there are %s" % (wanted, policy, known)
            raise Stop(EX_BAD_JOB, "bad-request", message)
    changed = {policy: old for policy, old in before.items() if old != wanted}
    if not changed:
        return
    remember(work_dir, {"boot_id": boot_id(), "set": wanted, "before": changed})
    for policy in changed:
        why_not = write(policy, wanted)
        if why_not:
            restore(work_dir)
            message = "the governor of %s cannot be set to %s: %s" % (policy, wanted, why_not)
            raise Stop(EX_BAD_JOB, "bad-request", message)
    log("governor %s instead of %s" % (wanted, ", ".join(sorted(set(changed.values())))))


def restore(work_dir):
    """Put back what `set_governor` changed, whoever called it -> whether there was anything.

    A policy that somebody else has set since stays as it is; after a restart the board has its own
    governors again. What cannot be put back stays remembered.
    """
    path = os.path.join(work_dir, RECORD)
    try:
        with open(path) as stream:
            record = json.load(stream)
        wanted, before, boot = record["set"], dict(record["before"]), record["boot_id"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        if not isinstance(exc, FileNotFoundError):
            log("%s cannot be used: %s" % (path, exc))
        return False
    failed = []
    for policy, old in before.items() if boot == boot_id() else ():
        if read("%s/%s/scaling_governor" % (POLICIES, policy)) == wanted:
            why_not = write(policy, old)
            if why_not:
                failed.append("%s stays at %s: %s" % (policy, wanted, why_not))
    if failed:
        log("; ".join(failed))
    else:
        os.unlink(path)
    return True


def remember(work_dir, record):
    path = os.path.join(work_dir, RECORD)
    with open(path + ".new", "w") as stream:
        json.dump(record, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(path + ".new", path)


def write(policy, governor):
    """Set one policy's -> why it did not work, "" where it did."""
    path = "%s/%s/scaling_governor" % (POLICIES, policy)
    try:
        with open(SYSROOT + path, "w") as stream:
            stream.write(governor)
    except PermissionError as exc:
        if SYSROOT:
            return str(exc)
        # the usual account of a Raspberry Pi may use sudo without a password
        try:
            done = subprocess.run(
                ["sudo", "-n", "tee", path], input=governor.encode(), stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, timeout=SUDO_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as sudo:
            return "%s, and %s" % (exc.strerror, sudo)
        if done.returncode:
            return done.stderr.decode("utf-8", "replace").strip() or "sudo failed"
    except OSError as exc:
        return exc.strerror or str(exc)
    found = read(path)
    return "" if found == governor else "it is %s afterwards" % found
