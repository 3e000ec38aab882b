"""Reads /proc and /sys, and nothing else: a worker that measures memory imports no more than this.

Standard library only, Python 3.7 or newer. A file that is not there is a default, never an error.
"""

import os

# Tests point this at a made-up /sys and /proc.
SYSROOT = os.environ.get("EDGEPIPE_SYSROOT", "")


def read(path, default=None, limit=65536):
    try:
        with open(SYSROOT + path, "rb") as stream:
            raw = stream.read(limit)
    except OSError:
        return default
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()


def read_int(path):
    try:
        return int(read(path, ""))
    except ValueError:
        return None


def names(path):
    try:
        return sorted(os.listdir(SYSROOT + path))
    except OSError:
        return []
