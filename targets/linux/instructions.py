"""Counts the instructions of this thread in user space, by perf_event_open(2).

A count has no noise: it repeats to a few instructions in a million where the same code runs on the
same data at the same addresses. Hence one thread (others spin while they wait), no address space
randomisation, and a worker of its own.

Standard library only, Python 3.7 or newer.
"""

import ctypes
import errno
import os
import platform
import struct

from sysfs import read

# The number of perf_event_open by what this *process* is, not by what the kernel is: arm64 as in
# asm-generic/unistd.h, arm as in arch/arm/tools/syscall.tbl, x86 as in arch/x86/entry/syscalls.
SYSCALLS = {
    ("aarch64", 8): 241, ("x86_64", 8): 298, ("riscv64", 8): 241,
    ("aarch64", 4): 364, ("armv8l", 4): 364, ("armv7l", 4): 364, ("armv6l", 4): 364,
}  # fmt: skip
# struct perf_event_attr (linux/perf_event.h) as of its first version, PERF_ATTR_SIZE_VER0
ATTRIBUTES = struct.Struct("=IIQQQQQ16x")
TYPE_HARDWARE, COUNT_INSTRUCTIONS = 0, 1
TIME_ENABLED, TIME_RUNNING = 1, 2  # of read_format
EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR = 1 << 5, 1 << 6
ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h
PARANOID = "/proc/sys/kernel/perf_event_paranoid"
EMPTY_READINGS = 11


class NoCounter(Exception):
    """This board counts no instructions; the text says why, and what would mend it."""


def why_refused(number):
    """What an errno of perf_event_open means here."""
    if number in (errno.EACCES, errno.EPERM):
        level = read(PARANOID, "unknown")
        if level.lstrip("-").isdigit() and int(level) <= 2:
            return (
                "a sandbox forbids counting instructions (perf_event_open: Operation not permitted)"
            )
        return (
            "the kernel forbids counting instructions (kernel.perf_event_paranoid is %s): "
            "on the board, sudo sysctl kernel.perf_event_paranoid=2" % level
        )
    if number in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return "this CPU, or the machine it is emulated by, has no counter of instructions"
    return "instructions cannot be counted (perf_event_open: %s)" % os.strerror(number)


class Counter:
    """Instructions of the calling thread in user space, of no other thread or child of it."""

    def __init__(self):
        name = platform.machine(), struct.calcsize("P")
        if name not in SYSCALLS:
            raise NoCounter("the number of perf_event_open on %s is not known" % name[0])
        attributes = ATTRIBUTES.pack(
            TYPE_HARDWARE, ATTRIBUTES.size, COUNT_INSTRUCTIONS, 0, 0, TIME_ENABLED | TIME_RUNNING,
            EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR,
        )  # fmt: skip
        libc, long = ctypes.CDLL(None, use_errno=True), ctypes.c_long
        this_thread, any_cpu, no_group = long(0), long(-1), long(-1)
        self.file = libc.syscall(
            long(SYSCALLS[name]), ctypes.create_string_buffer(attributes, len(attributes)),
            this_thread, any_cpu, no_group, long(0),
        )  # fmt: skip
        if self.file < 0:
            raise NoCounter(why_refused(ctypes.get_errno()))
        try:
            overhead = sorted(self.count(lambda: None) for _ in range(EMPTY_READINGS))
            if not overhead[0]:
                raise NoCounter("the counter of instructions stands still")
        except NoCounter:
            self.close()
            raise
        self.overhead = overhead[EMPTY_READINGS // 2]  # of reading twice, and of calling

    def count(self, call):
        """Instructions of ``call()`` and of reading the counter twice."""
        before = os.read(self.file, 24)
        call()
        after = os.read(self.file, 24)
        count, enabled, running = struct.unpack("=QQQ", after)
        if enabled != running:
            raise NoCounter(
                "the counter of instructions was shared with others, or the thread moved to a CPU "
                "of another kind (stay on one kind by affinity)"
            )
        return count - struct.unpack("=QQQ", before)[0]

    def close(self):
        os.close(self.file)


def why_not():
    """Why no instructions are counted on this board, or an empty string."""
    try:
        Counter().close()
    except NoCounter as exc:
        return str(exc)
    return ""


def _personality(value):
    function = ctypes.CDLL(None).personality
    function.argtypes = [ctypes.c_ulong]
    return function(value)


def fix_addresses():
    """What this process starts is not moved about in its address space, where that is allowed."""
    now = _personality(0xFFFFFFFF)  # only asks
    if now != -1:
        _personality(now | ADDR_NO_RANDOMIZE)


def addresses_are_fixed():
    now = _personality(0xFFFFFFFF)
    return now != -1 and bool(now & ADDR_NO_RANDOMIZE)
