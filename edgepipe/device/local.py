"""This machine as a device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edgepipe.artifact import hash_path
from edgepipe.device import base
from edgepipe.device.base import (
    Completed,
    check_argv,
    disk_full_error,
    output_error,
    timeout_error,
)
from edgepipe.errors import TransferError

_CHUNK_BYTES = 1 << 16


def open_local(address: str = "local") -> LocalDevice:
    """The device ``local``."""
    return LocalDevice()


class LocalDevice:
    """Runs commands as child processes in their own session; copies files on this disk."""

    address = "local"

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """See `Device.run`. A command that cannot be started is 127 (or 126), as in a shell."""
        words = check_argv(argv)
        try:
            return run_child(
                lambda: _start(words), words, timeout_s=timeout_s, address=self.address
            )
        except FileNotFoundError:
            return Completed(127, b"", f"{words[0]}: not found\n".encode())
        except OSError as exc:  # not executable, wrong format, list too long
            return Completed(126, b"", f"{words[0]}: {exc.strerror}\n".encode())

    def push(self, local: Path, remote: str) -> bool:
        """See `Device.push`."""
        target = _expand(remote)
        try:
            if target.is_file() and hash_path(target) == hash_path(local):
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            size_bytes = local.stat().st_size
            free_bytes = shutil.disk_usage(target.parent).free
        except OSError as exc:
            raise _transfer_error("push", local, target, exc) from exc
        if size_bytes + base.FREE_MARGIN_BYTES > free_bytes:
            raise disk_full_error(
                f"push to {target} on local", needed_bytes=size_bytes, free_bytes=free_bytes
            )
        _copy_whole(local, target, "push")
        return True

    def pull(self, remote: str, local: Path) -> None:
        """See `Device.pull`."""
        _copy_whole(_expand(remote), local, "pull")

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> LocalDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _expand(remote: str) -> Path:
    # a relative path starts in the home folder too, as over SSH
    return Path.home() / remote.removeprefix("~/")


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    home = Path.home()
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its own process group, so that its children die with it
        cwd=home if home.is_dir() else "/",  # where a command over SSH starts
    )


def run_child(
    start: Callable[[], subprocess.Popen[bytes]],
    words: Sequence[str],
    *,
    timeout_s: float,
    address: str,
    stop: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Completed:
    """Start a child process, which leads a process group, and wait for it with all it prints.

    ``words`` and ``address`` are what errors name. Past the deadline, and on Ctrl-C, ``stop`` ends it
    (`kill_group` unless given). Raises OSError where it cannot be started, CommandTimeout, and
    CommandFailed (``output-too-long``).
    """
    deadline_s = time.monotonic() + timeout_s
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # started by another thread: Ctrl-C reaches only the main one, and cannot make us forget
        # a process that runs already
        starting = pool.submit(start)
        try:
            process = starting.result()
            stdout, stderr = _collect(process, deadline_s, words, timeout_s, address)
        except BaseException:
            concurrent.futures.wait([starting])
            if starting.exception() is None:
                (stop or kill_group)(starting.result())
            raise
    code = process.returncode
    return Completed(128 - code if code < 0 else code, stdout, stderr)


def _collect(
    process: subprocess.Popen[bytes],
    deadline_s: float,
    words: Sequence[str],
    timeout_s: float,
    address: str,
) -> tuple[bytes, bytes]:
    """Both streams to their ends, and the exit, before ``deadline_s`` (monotonic)."""
    assert process.stdout is not None  # asked for by Popen(stdout=PIPE)
    assert process.stderr is not None
    stdout, stderr = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, stdout)
        selector.register(process.stderr, selectors.EVENT_READ, stderr)
        while selector.get_map():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise timeout_error(words, timeout_s, address)
            for key, _ in selector.select(left_s):
                chunk = os.read(key.fd, _CHUNK_BYTES)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
            if len(stdout) + len(stderr) > base.MAX_OUTPUT_BYTES:
                raise output_error(words, address)
    try:
        process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired as exc:
        raise timeout_error(words, timeout_s, address) from exc
    _close_streams(process)
    return bytes(stdout), bytes(stderr)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child with its process group, which it leads, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _close_streams(process)


def _close_streams(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not yet written to a child that is gone
                stream.close()


def _copy_whole(source: Path, target: Path, verb: str) -> None:
    """Copy so that ``target`` is absent, its old self or whole, even when interrupted."""
    part = target.with_name(f"{target.name}.part.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, part)
        shutil.copymode(source, part)
        if hash_path(part) != hash_path(source):
            raise TransferError(f"{verb} of {source} to {target}: the copy differs", hint="try again; if it happens twice, check the disk")  # fmt: skip
        part.replace(target)
    except OSError as exc:
        raise _transfer_error(verb, source, target, exc) from exc
    finally:
        part.unlink(missing_ok=True)


def _transfer_error(verb: str, source: Path, target: Path, exc: OSError) -> TransferError:
    if exc.errno == errno.ENOSPC:
        return disk_full_error(f"{verb} to {target} on local", needed_bytes=source.stat().st_size)
    return TransferError(
        f"{verb} of {source} to {target} on local failed: {exc.strerror or exc}",
        hint="check both paths and their permissions",
    )
