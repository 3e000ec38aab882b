"""An initramfs of a busybox, a few kernel modules and a script. Pure: bytes in, bytes out."""

from __future__ import annotations

import dataclasses
import gzip
import re
from collections.abc import Mapping, Sequence
from typing import Literal

# Kinds of inodes as in stat(2).
_KIND = {"folder": 0o040755, "link": 0o120777, "console": 0o020600}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of an archive; ``data`` is a link's target."""

    name: str
    kind: Literal["file", "folder", "link", "console"]
    data: bytes = b""
    mode: int = 0o644


def newc(entries: Sequence[Entry]) -> bytes:
    """The entries as a cpio archive, format "newc" (Linux, driver-api/early-userspace/buffer-format).

    Everything belongs to root and carries no time, so that equal entries make equal bytes.
    """
    parts = [_record(number, entry) for number, entry in enumerate(entries, start=1)]
    return b"".join([*parts, _record(0, Entry("TRAILER!!!", "file", mode=0))])


def _record(number: int, entry: Entry) -> bytes:
    mode = _KIND.get(entry.kind, 0o100000 | entry.mode)
    major, minor = (5, 1) if entry.kind == "console" else (0, 0)  # /dev/console, devices.txt
    name = entry.name.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (number, mode, 0, 0, 1, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def load_order(wanted: Sequence[str], modules: Mapping[str, bytes]) -> list[str]:
    """Names of the modules to load, each after those it depends on (``depends=`` of its .modinfo).

    ``modules`` maps names (with underscores) to the bytes of ``.ko`` files. What is not there is
    built into the kernel.
    """
    order: list[str] = []

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in order or name not in modules:
            return
        depends = re.search(rb"\0?depends=([^\0]*)\0", modules[name])
        for needed in filter(None, depends[1].decode().split(",") if depends else ()):
            add(needed)
        order.append(name)

    for name in wanted:
        add(name)
    return order


def initramfs(*, init: bytes, busybox: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """A gzipped initramfs that runs ``init`` with ``/bin/busybox``; modules lie in ``/modules`` in order."""
    folders = [Entry(name, "folder") for name in ("bin", "proc", "sys", "dev", "root", "modules")]
    files = [
        Entry("init", "file", init, 0o755),
        Entry("bin/busybox", "file", busybox, 0o755),
        Entry("bin/sh", "link", b"busybox"),
        *(Entry(f"modules/{i:02d}_{name}.ko", "file", data) for i, (name, data) in enumerate(modules)),
        Entry("dev/console", "console"),
    ]  # fmt: skip
    return gzip.compress(newc([*folders, *files]), compresslevel=1, mtime=0)
