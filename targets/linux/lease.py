"""Who has what: one job at a time on a board, one supervisor at a time for a job.

Standard library only, Python 3.7 or newer. Locks are flock(2): they fall with the process that
holds them, however it dies.
"""

import fcntl
import json
import os
import signal
import time

from job import EX_BUSY, Stop
from sysfs import read

# How often `stop_holder` looks, 0.02 s apart, whether what it killed is gone.
HOLDER_LOOKS = 250


def boottime_s():
    """Seconds since boot, also those spent asleep; no clock that anybody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id():
    return read("/proc/sys/kernel/random/boot_id")


class Lease:
    """The board is one job's: by flock while it runs, and for a moment after for its next call.

    Between two calls of one job the owner file keeps others out for `lease_s`; a reboot or the
    passing of that time ends it. Raises Stop(75) with the owner where the board is another's.
    """

    def __init__(self, job):
        self.job = job
        self.stream = open(os.path.join(job["work_dir"], "lock"), "a+")
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(EX_BUSY, "busy", "another job is running on this board", owner=self.owner())
        owner = self.owner()
        if (
            owner
            and owner.get("job") != job["id"]
            and owner.get("boot_id") == boot_id()
            and owner.get("until_boottime_s", 0) > boottime_s()
        ):
            left_s = owner["until_boottime_s"] - boottime_s()
            message = "another job holds this board for %.0f s more" % left_s
            raise Stop(EX_BUSY, "busy", message, owner=owner)
        self.write(boottime_s())

    def owner(self):
        self.stream.seek(0)
        try:
            owner = json.loads(self.stream.read(4096))
        except ValueError:
            return None
        return owner if isinstance(owner, dict) else None

    def write(self, until_boottime_s):
        text = json.dumps(
            {"job": self.job["id"], "owner": self.job["owner"], "pid": os.getpid(),
             "since_unix_s": time.time(), "until_boottime_s": until_boottime_s,
             "boot_id": boot_id()}
        )  # fmt: skip
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write(text)
        self.stream.flush()

    def leave(self):
        """Keep it for the next call of this job, `lease_s` from now."""
        self.write(boottime_s() + self.job["lease_s"])
        self.stream.close()


def give_back(job, restore):
    """End the lease of a job that no longer runs; that of another job stays as it is.

    ``restore(work_dir)`` is called while the board is nobody else's -> whether it had anything to do.
    """
    try:
        lease = Lease(dict(job, lease_s=0))
    except (Stop, OSError):
        return False
    restored = restore(job["work_dir"])
    lease.stream.truncate(0)
    lease.stream.close()
    return restored


def stop_holder(work_dir, job):
    """Kill the program that ``agent.py hold`` became for this job, where it still runs."""
    with open(os.path.join(work_dir, "lock"), "a+") as stream:
        for _ in range(HOLDER_LOOKS):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                stream.seek(0)
                try:
                    owner = json.loads(stream.read(4096))
                except ValueError:
                    owner = None  # it is being written
                if isinstance(owner, dict) and owner.get("job") == job:
                    # whoever holds the lock wrote its number into it
                    os.kill(owner["pid"], signal.SIGKILL)
                elif owner is not None:
                    return
            time.sleep(0.02)


class SupervisorLock:
    """``lock`` in a job's folder: held by the one supervisor of the job while it lives."""

    def __init__(self, job_dir):
        self.path = os.path.join(job_dir, "lock")

    def is_held(self):
        try:
            with open(self.path) as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # no such job
        return False

    def take(self):
        """A descriptor that holds the lock for whoever inherits it, or None where it is held."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if self.is_held():
                    return None
                time.sleep(0.005)  # somebody looked at that moment
            else:
                os.ftruncate(descriptor, 0)
                return descriptor

    def holder(self):
        """The process that wrote itself into it, which lives only while `is_held`."""
        try:
            with open(self.path) as stream:
                return int(stream.read(20))
        except (OSError, ValueError):
            return None
