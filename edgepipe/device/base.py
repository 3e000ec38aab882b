"""The `Device` protocol: a live board, four methods. Every transport passes tests/contract."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edgepipe.errors import CommandFailed, CommandTimeout, RequestError, TransferError

# A command that prints more than this is stopped: nothing we ask of a board prints a hundredth of it.
MAX_OUTPUT_BYTES = 64 * 2**20
# Room that a push leaves on the device: a few blocks for folders and the file system's own books.
FREE_MARGIN_BYTES = 64 * 2**10
# One word of a command line may have 128 KiB on Linux (MAX_ARG_STRLEN, execve(2)), and the whole
# command is one word of the login shell's.
MAX_LINE_BYTES = 120_000


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


class HeldDevice:
    """A device, and what is held for as long as it is open: a place of a lab, a virtual board.

    ``resources`` closes the device first, then gives back what is held.
    """

    def __init__(self, device: Device, resources: contextlib.ExitStack) -> None:
        self.address = device.address
        self._device, self._resources = device, resources

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """See `Device.run`."""
        return self._device.run(argv, timeout_s=timeout_s)

    def push(self, local: Path, remote: str) -> bool:
        """See `Device.push`."""
        return self._device.push(local, remote)

    def pull(self, remote: str, local: Path) -> None:
        """See `Device.pull`."""
        self._device.pull(remote, local)

    def close(self) -> None:
        """Twice is allowed."""
        self._resources.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"


def check_argv(argv: Sequence[str]) -> list[str]:
    """The command as a list of strings. Raises RequestError where no system could run it."""
    if isinstance(argv, str) or not argv or not all(isinstance(word, str) for word in argv):
        raise RequestError(
            f"a command is a list of words, not {argv!r}", hint='write ["uname", "-m"]'
        )
    if any("\0" in word for word in argv):
        raise RequestError(f"{argv[0]!r}: an argument contains a NUL byte")
    return list(argv)


def check_line(line: str, argv: Sequence[str]) -> None:
    """RequestError where ``line``, which runs ``argv``, is longer than a board's shell takes."""
    if len(line.encode(errors="surrogateescape")) > MAX_LINE_BYTES:
        raise RequestError(
            f"`{shown(argv)}` is longer than {MAX_LINE_BYTES} bytes",
            hint="push a file with the long part",
        )


def timeout_error(argv: Sequence[str], timeout_s: float, address: str) -> CommandTimeout:
    """The error of every transport for a command that outlived its deadline."""
    return CommandTimeout(
        f"`{shown(argv)}` on {address} ran longer than {timeout_s:g} s and was stopped",
        hint="is the device busy or the work too large? give it a longer timeout",
    )


def output_error(argv: Sequence[str], address: str) -> CommandFailed:
    """The error of every transport for a command that prints without end."""
    return CommandFailed(
        f"`{shown(argv)}` on {address} printed more than {MAX_OUTPUT_BYTES // 2**20} MiB and was stopped",
        hint="let it write to a file and pull the file",
        code="output-too-long",
    )


def disk_full_error(
    doing: str, *, needed_bytes: int, free_bytes: int | None = None
) -> TransferError:
    """The error of every transport where the file does not fit; ``free_bytes`` where it is known."""
    free = "" if free_bytes is None else f" and {max(free_bytes, 0) / 1e6:.1f} MB are free"
    return TransferError(
        f"{doing}: no space left; the file needs {needed_bytes / 1e6:.1f} MB{free}",
        hint="free some space there, or choose another work_dir",
        code="disk-full",
    )


def shown(argv: Sequence[str]) -> str:
    """A command as a message shows it: quoted, and cut where it is long."""
    text = shlex.join(argv)
    return text if len(text) <= 120 else f"{text[:117]}..."
