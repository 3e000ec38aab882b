"""What lies in the work folder of this board, what of it nobody needs any more, and its removal.

Standard library only, Python 3.7 or newer. All that is pushed is named by its content and pushed
again where it is missing; so what is removed too early costs a push, never a result.
"""

import json
import os
import shutil
import time

from job import load_job
from lease import SupervisorLock, boot_id, boottime_s

# Folders of the work folder whose entries are whole files or folders named by their content.
CACHES = ("models", "rt", "runtimes", "agents", "runners")
# A job whose host has not come back: longer than any measurement may last (bench.MAX_BUDGET_S, twice).
ABANDONED_S = 7 * 86400.0
UNUSED_S = 30 * 86400.0
# An upload that stopped: a transfer that moves nothing for 30 s is broken (edgepipe/device/ssh.py).
TORN_S = 3600.0
# A clock before 2020 was never set: ages by it mean nothing.
CLOCK_IS_SET_S = 1577836800
KEPT = "kept"
CHECK = "check-"


def mark_used(work_dir, paths):
    """These files were used now, and so were the cache entries they lie in."""
    for path in paths:
        inside = os.path.relpath(path, work_dir).split(os.sep)
        if inside[0] in CACHES:
            for depth in range(2, len(inside) + 1):
                try:
                    os.utime(os.path.join(work_dir, *inside[:depth]))
                except OSError:
                    pass  # not ours to mark: it looks older than it is


def files_of(job):
    """Paths of the cached files that a job uses."""
    runtime = [job["runtime"]] if job["runtime"] else []
    return [os.path.expanduser(item["path"]) for item in list(job["models"].values()) + runtime]


def size_and_time(path):
    """Bytes of all files below, and when the newest of them, or the folder, was last changed."""
    total, newest = 0, 0.0
    for folder, folders, files in os.walk(path):
        for name in files + ["."]:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            newest = max(newest, status.st_mtime)
            total += status.st_size if name != "." else 0
    if not os.path.isdir(path):
        status = os.lstat(path)
        total, newest = status.st_size, status.st_mtime
    return total, newest


def entries(folder):
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def jobs(work_dir, now_s):
    """Every job folder: whose, how old, and whether somebody works on it."""
    found = []
    for path in entries(os.path.join(work_dir, "jobs")):
        size, changed_s = size_and_time(path)
        try:
            owner = load_job(path)["owner"]
        except Exception:  # a folder without a job, or of another version: its age still counts
            owner = None
        found.append(
            {"path": path, "bytes": size, "age_s": max(0.0, now_s - changed_s), "owner": owner,
             "alive": SupervisorLock(path).is_held(),
             "kept": os.path.exists(os.path.join(path, KEPT))}
        )  # fmt: skip
    return found


def lease(work_dir):
    """Who holds this board: {"owner", "job", "left_s", "running"}, or None."""
    path = os.path.join(work_dir, "lock")
    running = SupervisorLock(work_dir).is_held()  # the board's own lock is called the same
    try:
        with open(path) as stream:
            owner = json.loads(stream.read(4096))
    except (OSError, ValueError):
        owner = None
    if not isinstance(owner, dict):
        return {"owner": None, "job": None, "left_s": 0.0, "running": True} if running else None
    here = owner.get("boot_id") == boot_id()
    left_s = max(0.0, (owner.get("until_boottime_s") or 0.0) - boottime_s()) if here else 0.0
    if not running and not left_s:
        return None
    found = {"left_s": left_s, "running": running}
    return dict(found, owner=owner.get("owner"), job=owner.get("job"))


def garbage(work_dir, abandoned_s, now_s):
    """What may go: [{"path", "bytes", "why"}]. What somebody works on or asked to keep stays."""
    found = []
    if now_s < CLOCK_IS_SET_S:
        return found
    for job in jobs(work_dir, now_s):
        if not job["alive"] and not job["kept"] and job["age_s"] > abandoned_s:
            found.append(dict(path=job["path"], bytes=job["bytes"], why="its host never came back"))
    for cache in CACHES:
        for path in entries(os.path.join(work_dir, cache)):
            size, changed_s = size_and_time(path)
            age_s = now_s - changed_s
            if ".part." in os.path.basename(path) and age_s > TORN_S:
                found.append(dict(path=path, bytes=size, why="an upload that stopped"))
            elif age_s > UNUSED_S:
                why = "not used for %d days" % (age_s // 86400)
                found.append(dict(path=path, bytes=size, why=why))
            else:
                for inner in entries(path) if os.path.isdir(path) else []:
                    if ".part." in os.path.basename(inner) and age_s > TORN_S:
                        size = os.lstat(inner).st_size
                        found.append(dict(path=inner, bytes=size, why="an upload that stopped"))
    for path in entries(work_dir):
        if os.path.basename(path).startswith(CHECK):
            size, changed_s = size_and_time(path)
            if now_s - changed_s > TORN_S:
                found.append(dict(path=path, bytes=size, why="a check that was stopped"))
    return found


def survey(work_dir, abandoned_s=ABANDONED_S):
    now_s = time.time()
    caches = {}
    for cache in CACHES:
        sizes = [size_and_time(path)[0] for path in entries(os.path.join(work_dir, cache))]
        caches[cache] = {"entries": len(sizes), "bytes": sum(sizes)}
    return {
        "lease": lease(work_dir), "jobs": jobs(work_dir, now_s), "caches": caches,
        "garbage": garbage(work_dir, abandoned_s, now_s),
    }  # fmt: skip


def tidy(work_dir, abandoned_s=ABANDONED_S):
    """Remove the garbage -> what was removed."""
    removed = []
    for item in garbage(work_dir, abandoned_s, time.time()):
        path = item["path"]
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            try:
                os.unlink(path)
            except OSError:
                pass
        if not os.path.lexists(path):
            removed.append(item)
    return removed
