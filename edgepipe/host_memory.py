"""Does a model fit into this host's memory? Found out from sizes, before it is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgepipe.errors import ArtifactError
from edgepipe.units import format_bytes

# The file as read, the model made of it, and a second runtime's copy for the parity check.
COPIES = 3


def available_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take: the least of free memory and its control groups' limits.

    From /proc/meminfo (MemAvailable, proc(5)) and, for the process's own control group and those above
    it, memory.max less memory.current, cached files aside (cgroup v2), or the same of version 1. None
    where the system tells neither, as macOS does.
    """
    found = []
    meminfo = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.M)
    if meminfo:
        found.append(int(meminfo[1]) * 1024)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if controllers else ("memory.max", "memory.current", "inactive_file")  # fmt: skip
        for folder in (group, *group.parents):
            left = _left(folder, *names)
            if left is not None:
                found.append(left)
            if folder == top:
                break
    return min(found, default=None)


def _left(folder: Path, limit_file: str, used_file: str, cached: str) -> int | None:
    limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
    if not limit.isdigit() or not used.isdigit():
        return None
    cache = re.search(rf"^{cached} (\d+)$", _read(folder / "memory.stat"), re.M)
    return max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def check_fits(files: Sequence[Path], *, root: Path = Path("/")) -> None:
    """Raise ArtifactError (``larger-than-memory``) where a model of these files would not fit."""
    size = sum(path.stat().st_size for path in files if path.is_file())
    available = available_bytes(root)
    if available is not None and size * COPIES > available:
        raise ArtifactError(
            f"{files[0]} is {format_bytes(size)} of weights; loading and checking it takes about"
            f" {format_bytes(size * COPIES)}, and {format_bytes(available)} of memory are free here",
            hint="end other programs, raise the container's memory limit, or use a larger host",
            code="larger-than-memory",
        )
