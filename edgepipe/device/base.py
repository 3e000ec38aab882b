"""The `Device` protocol: a live board, four methods. Every transport passes tests/contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Completed:
    """A finished command. A command killed by signal *n* has ``returncode`` 128 + n, as in a shell."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Device(Protocol):
    """``address`` is how a person names it: ``local`` or ``ssh://user@host:port``."""

    address: str

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command (an argv list; no shell unless argv says so) and wait for it.

        ``timeout_s`` is a deadline for the whole command. Past it the command is killed on the
        device too, and CommandTimeout is raised. A nonzero exit is returned, not raised.
        """
        ...

    def push(self, local: Path, remote: str) -> bool:
        """Copy a file so that ``remote`` is either absent, its old self or whole.

        Uploads to a temporary name beside it, compares sha256 on the device, renames. Returns
        False where ``remote`` already held these bytes and nothing was moved. Parent folders are
        made. ``remote`` may begin with ``~/``. Raises TransferError (disk full, broken link).
        """
        ...

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the device; ``local`` appears only once it is whole."""
        ...

    def close(self) -> None: ...
