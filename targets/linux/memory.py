"""What a process holds in memory, and what the page cache holds of a file. In bytes.

Standard library only, Python 3.7 or newer, and little of it: what this imports is measured too.
"""

import ctypes
import os
import re

from sysfs import read


def memory_bytes(files=()):
    """Named quantities of this process; ``file`` is what it maps of ``files``.

    ``anon`` comes from smaps_rollup, which walks the page tables; RssAnon in /proc/self/status is
    counted per CPU in batches on kernels from 6.2 on and may be off by hundreds of kB.
    """
    status = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/self/status", ""), re.M))
    rollup = re.search(r"^Anonymous:\s+(\d+) kB", read("/proc/self/smaps_rollup", ""), re.M)
    found = {
        "anon": int(rollup.group(1)) * 1024
        if rollup
        else (int(status["RssAnon"]) * 1024 if "RssAnon" in status else None),
        "anon_source": "smaps_rollup" if rollup else "status",
        "rss": int(status["VmRSS"]) * 1024 if "VmRSS" in status else None,
        "peak": int(status["VmHWM"]) * 1024 if "VmHWM" in status else None,
        "file": None,
    }
    ends = tuple(" " + path for path in files)
    try:
        with open("/proc/self/smaps") as stream:
            inside, found["file"] = False, 0
            for line in stream:
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    inside = line.rstrip("\n").endswith(ends)
                elif inside and line.startswith("Rss:"):
                    found["file"] += int(line.split()[1]) * 1024
    except OSError:
        pass
    return found


def reset_peak():
    """Set VmHWM back to the present RSS (proc(5), clear_refs value 5); False where refused."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        return True
    except OSError:
        return False


def give_back_free_memory():
    """malloc_trim(3), glibc: else a model that fits into what imports left free seems to cost 0."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass


def drop_from_page_cache(path):
    """Ask the kernel to forget a file, then return the share of its pages still in memory.

    Without privilege: fsync (dirty pages stay) and posix_fadvise(DONTNEED). mincore(2) tells
    whether it was done; tmpfs, for one, has nowhere else to keep the file. None = cannot tell.
    """
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]  # fmt: skip
        at = libc.mmap(None, size, 1, 1, descriptor, 0)  # PROT_READ, MAP_SHARED
        if at in (None, ctypes.c_void_p(-1).value):
            return None
        pages = (size + os.sysconf("SC_PAGE_SIZE") - 1) // os.sysconf("SC_PAGE_SIZE")
        resident = (ctypes.c_ubyte * pages)()
        failed = libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), resident)
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
        return None if failed else sum(flag & 1 for flag in resident) / float(pages)
    finally:
        os.close(descriptor)
