"""A phone reached with Android's own client, ``adb``: over USB (``adb://SERIAL``) or the network.

Every call is a child process of the client. Its ``adb shell`` (protocol shell_v2, Android 7 and
newer) keeps stdout and stderr apart and returns exit codes; its exit code 1 may also mean that the
link broke, so each command ends with a mark on stderr by which we know that it was carried out.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import secrets
import selectors
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from edgepipe.artifact import hash_path
from edgepipe.device import base
from edgepipe.device.base import Completed, check_argv, check_line, disk_full_error, shown
from edgepipe.device.local import kill_group, run_child
from edgepipe.device.parse import parse_free_bytes, parse_home, parse_sha256
from edgepipe.device.parse_android import Attached, parse_devices
from edgepipe.errors import (
    AuthError,
    ConnectError,
    DeviceError,
    MissingExtra,
    RequestError,
    TransferError,
)

log = logging.getLogger(__name__)

_HELPER_S = 30.0  # for mkdir, df and the like
_CONNECT_S = 15.0  # until a phone on the network answers
_SETTLE_S = 5.0  # a new connection is "offline" or "authorizing" at first
_SLOWEST_BYTES_PER_S = 200e3  # a file takes no longer than at this rate
_BOARD_GRACE_S = 1  # the phone's own deadline comes after ours
_STOP_GRACE_S = 4.0  # TERM, two seconds, KILL, and the way back
_MARK = b"edgepipe: carried out\n"
_SERVER_PORT = 5037
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")

# What runs on the phone around a command. adbd makes its shell the leader of a session ($$), with one
# socket for stdin and stdout: whoever still held it would keep us waiting after the command. The
# watcher waits for a line (we gave up), the end of input (the connection is gone), or the deadline
# ($0, seconds), and ends the whole group. `read -t`: Android's sh is mksh.
# `adb shell` has / for its home, where it may not write.
_AROUND = (
    'test -w "$HOME" || export HOME=/data/local/tmp; '
    "exec 3<&0 4>&2 </dev/null 2>/dev/null; "
    '( exec >/dev/null 4>&-; trap "" HUP TERM; read -t "$0" -r word <&3; kill -TERM -$$; '
    # a new shell, for mksh keeps a copy of what was its stdin
    "exec sh -c 'sleep 2; kill -KILL -$0' $$ 3<&- ) & "
    '( exec "$@" 2>&4 3<&- 4>&- ); code=$?; kill -KILL $!; '
    f'echo "{_MARK.decode().rstrip()}" >&4; exit $code'
)
_HASH = 'sha256sum <"$0" && wc -c <"$0"'
_LOOK = 'if [ -f "$0" ] && sha256sum <"$0" 2>/dev/null; then :; else echo -; fi; mkdir -p "$1" && df -Pk "$1"'
_FINISH = (
    'case "$(sha256sum <"$0")" in "$2"*) ;; *) echo "what arrived differs from what was sent" >&2; exit 1;; esac; '
    '[ ! -d "$1" ] || { echo "it is a folder" >&2; exit 1; }; chmod "$3" "$0" && mv -f "$0" "$1"'
)


def command_line(argv: Sequence[str], *, board_timeout_s: int) -> str:
    """The line for the phone's shell that runs ``argv``: the one place that quotes."""
    return "exec " + shlex.join(["sh", "-c", _AROUND, str(board_timeout_s), *argv])


def open_adb(address: str) -> AdbDevice:
    """Connect to ``adb://SERIAL``, to ``adb://host:port`` over the network, or to the only phone there
    is (``adb://``).

    The client's server is started where it does not run, and stays, as it is adb's way
    (ANDROID_ADB_SERVER_PORT is honoured). A connection over the network that is made here is
    undone by ``close``. Raises MissingExtra without the client, AuthError (``unauthorized``) where
    the phone does not allow debugging, ConnectError otherwise.
    """
    program = shutil.which("adb")
    if program is None:
        raise MissingExtra(
            f"{address} needs Android's client `adb`, which this machine does not have",
            hint="\n  ".join((
                "Debian, Ubuntu: sudo apt-get install adb",
                "Fedora: sudo dnf install android-tools",
                "Arch: sudo pacman -S android-tools",
                "macOS: brew install android-platform-tools",
            )),
            code="no-adb",
        )  # fmt: skip
    serial = address.removeprefix("adb://").rstrip("/")
    if not address.startswith("adb://") or re.search(r"[\s/@?#]", serial) or serial.startswith("-"):
        raise RequestError(
            f"{address!r} is not the address of a phone",
            hint="adb://SERIAL (`adb devices` shows it) or adb://host:port",
            code="bad-address",
        )
    return AdbDevice(program, serial)


class AdbDevice:
    """See `Device` for the four methods. Opened by `open_adb`; connects again when its link broke."""

    def __init__(self, program: str, serial: str) -> None:
        self._program, self._serial = program, serial
        self._home = ""
        self._is_ours = self._is_closed = self._is_lost = False
        if not _server_runs():
            log.info("starting the adb server; it stays until `adb kill-server`")
        self._connect()
        self.address = f"adb://{self._serial}"

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """See `Device.run`. Starts in ``/``, as adb's shell does; `~` and variables are not expanded."""
        words = check_argv(argv)
        line = command_line(words, board_timeout_s=math.ceil(timeout_s) + _BOARD_GRACE_S)
        check_line(line, words)
        self._check_open()
        adb = [self._program, "-s", self._serial, "shell", "-T", "-e", "none", line]
        done = run_child(
            lambda: _start(adb), words, timeout_s=timeout_s, address=self.address, stop=_stop
        )
        before, mark, after = done.stderr.rpartition(_MARK)
        if not mark:
            self._is_lost = True
            raise ConnectError(
                f"lost the connection to {self.address} while running `{shown(words)}`: {_last_words(done)}",
                hint="is the phone still plugged in, awake and in the network? try again",
                code="connection-lost",
            )
        return Completed(done.returncode, done.stdout, before + after)

    def push(self, local: Path, remote: str) -> bool:
        """See `Device.push`."""
        path = self._expand(remote)
        doing = f"push of {local} to {path} on {self.address}"
        try:
            digest, status = hash_path(local), local.stat()
        except OSError as exc:
            raise self._transfer_error(doing, exc.strerror or str(exc)) from exc
        found, free_bytes = self._look(path, timeout_s=_file_timeout_s(status.st_size))
        if found.startswith(digest):
            return False
        if status.st_size + base.FREE_MARGIN_BYTES > free_bytes:
            raise disk_full_error(
                f"push to {path} on {self.address}", needed_bytes=status.st_size, free_bytes=free_bytes
            )  # fmt: skip
        part = f"{path}.part.{secrets.token_hex(4)}"
        try:
            done = self._adb("push", str(local), part, timeout_s=_file_timeout_s(status.st_size))
            if done.returncode == 0:
                words = ["sh", "-c", _FINISH, part, path, digest, f"{status.st_mode & 0o777:o}"]
                done = self.run(words, timeout_s=_file_timeout_s(status.st_size))
            if done.returncode:
                raise self._transfer_error(doing, _last_words(done))
        except BaseException as exc:
            with contextlib.suppress(DeviceError):
                self.run(["rm", "-f", part], timeout_s=_HELPER_S)
            if isinstance(exc, TransferError) and self._look(path)[1] < status.st_size:
                raise disk_full_error(f"push to {path} on {self.address}", needed_bytes=status.st_size) from exc  # fmt: skip
            raise
        return True

    def pull(self, remote: str, local: Path) -> None:
        """See `Device.pull`."""
        path = self._expand(remote)
        doing = f"pull of {path} from {self.address} to {local}"
        there = self.run(["sh", "-c", _HASH, path], timeout_s=_file_timeout_s(2**30))
        if there.returncode:
            raise self._transfer_error(doing, _last_words(there))
        digest, size_bytes = parse_sha256(there.stdout.decode()), int(there.stdout.split()[-1])
        part = local.with_name(f"{local.name}.part.{secrets.token_hex(4)}")
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            done = self._adb("pull", path, str(part), timeout_s=_file_timeout_s(size_bytes))
            if done.returncode:
                said = _last_words(done)
                if os.strerror(errno.ENOSPC) in said:
                    raise disk_full_error(doing, needed_bytes=size_bytes)
                raise self._transfer_error(doing, said)
            if hash_path(part) != digest:
                raise self._transfer_error(doing, "what arrived differs from what lies there")
            part.replace(local)
        except OSError as exc:
            raise self._transfer_error(doing, exc.strerror or str(exc)) from exc
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Undo a connection over the network that was made here. Closing twice is allowed."""
        if self._is_ours and not self._is_closed:
            with contextlib.suppress(DeviceError):
                self._adb("disconnect", self._serial, timeout_s=_HELPER_S, any_device=True)
        self._is_closed = True

    def __enter__(self) -> AdbDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"AdbDevice({self.address!r})"

    # ----------------------------------------------------------------------------------- the link

    def _connect(self) -> None:
        """Find the phone among those attached; over the network, connect to it first."""
        is_remote = _HOST_AND_PORT.fullmatch(self._serial) is not None
        give_up_s = time.monotonic() + _SETTLE_S
        if is_remote and self._state() != "device":
            self._adb("disconnect", self._serial, timeout_s=_HELPER_S, any_device=True)
            done = self._adb("connect", self._serial, timeout_s=_CONNECT_S, any_device=True)
            said = done.stdout.decode(errors="replace").strip()
            if not said.startswith(("connected to", "already connected to", "failed to authenticate")):  # fmt: skip
                raise ConnectError(
                    f"adb cannot connect to {self._serial}: {said or _last_words(done)}",
                    hint="is it in this network, with wireless debugging on? over USB first: adb tcpip 5555",
                )
            self._is_ours = True
        while (state := self._state()) in ("offline", "authorizing", "connecting") and time.monotonic() < give_up_s:  # fmt: skip
            time.sleep(0.2)
        if state != "device":
            raise self._not_usable(state)
        done = self._adb("features", timeout_s=_HELPER_S)
        if b"shell_v2" not in done.stdout.split():
            raise ConnectError(
                f"adb://{self._serial} has no shell that returns exit codes (shell_v2)",
                hint="Android 7 or newer is needed, and a client that is not older",
                code="no-shell-v2",
            )
        self._is_lost = False

    def _state(self) -> str:
        """What adb says of this phone; "" where it does not know it. Without a serial, of the only one."""
        found = self._attached()
        if not self._serial:
            if len(found) > 1:
                listed = ", ".join(f"adb://{item.serial}" + f" ({item.model})" * bool(item.model) for item in found)  # fmt: skip
                raise RequestError(
                    f"adb:// may be any of {len(found)} devices: {listed}",
                    hint=f"say which: --device adb://{found[0].serial}",
                    code="bad-address",
                )
            if found:
                self._serial = found[0].serial
        return next((item.state for item in found if item.serial == self._serial), "")

    def _attached(self) -> tuple[Attached, ...]:
        done = self._adb("devices", "-l", timeout_s=_HELPER_S, any_device=True)
        if done.returncode:
            raise ConnectError(
                f"adb does not work here: {_last_words(done)}",
                hint="try by hand: adb devices",
            )
        return parse_devices(done.stdout.decode(errors="replace"))

    def _not_usable(self, state: str) -> DeviceError:
        name = f"adb://{self._serial}"
        if state == "unauthorized":
            return AuthError(
                f"{name} does not allow this computer to debug it",
                hint="unlock the phone and accept `Allow USB debugging?`; if it does not ask: adb kill-server, then replug",
                code="unauthorized",
            )
        if state == "no permissions":
            return ConnectError(
                f"{name}: this user may not use the phone's USB device",
                hint="sudo apt-get install android-sdk-platform-tools-common; then replug",
                code="no-usb-permission",
            )
        if state:
            return ConnectError(
                f"{name} is {state}",
                hint="start Android; replug it" if state != "offline" else "replug it, or: adb reconnect offline",
                code="offline",
            )  # fmt: skip
        others = ", ".join(f"adb://{item.serial}" for item in self._attached())
        missing = f"no device {self._serial} is attached" if self._serial else "no device is attached"  # fmt: skip
        return ConnectError(
            f"{missing}{f'; there is {others}' * bool(others)}",
            hint="plug it in, with Settings > System > Developer options > USB debugging on; `adb devices` shows it",
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectError(f"the connection to {self.address} is closed", hint="open the device again")  # fmt: skip
        if self._is_lost:
            self._connect()

    def _adb(self, *argv: str, timeout_s: float, any_device: bool = False) -> Completed:
        """One call of the client on this machine; ``any_device``: it is not about this phone."""
        words = [self._program, *([] if any_device else ["-s", self._serial]), *argv]
        return run_child(lambda: _start(words), ["adb", *words[1:]], timeout_s=timeout_s, address="this machine")  # fmt: skip

    # -------------------------------------------------------------------------------------- files

    def _expand(self, remote: str) -> str:
        if not remote.startswith("~/"):
            return remote
        if not self._home:
            done = self.run(["sh", "-c", 'echo -n "$HOME"'], timeout_s=_HELPER_S)
            self._home = parse_home(os.fsdecode(done.stdout), self.address).rstrip("/")
        return f"{self._home}/{remote[2:]}"

    def _look(self, path: str, *, timeout_s: float = _HELPER_S) -> tuple[str, int]:
        """What sha256sum says of ``path``, and the free bytes beside it; its folder is made where missing."""
        folder = os.path.dirname(path) or "."  # noqa: PTH120 (a remote path)
        done = self.run(["sh", "-c", _LOOK, path, folder], timeout_s=timeout_s)
        if done.returncode:
            raise TransferError(
                f"cannot make the folder {folder} on {self.address}: {_last_words(done)}",
                hint="`adb shell` may write below /data/local/tmp only: work_dir of the profile",
            )
        found, _, free = os.fsdecode(done.stdout).partition("\n")
        return found, parse_free_bytes(free)

    def _transfer_error(self, doing: str, reason: str) -> TransferError:
        return TransferError(
            f"{doing} failed: {reason}", hint="check both paths, their permissions and the link"
        )


def _start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A call of the client in a process group of its own, which Ctrl-C does not reach."""
    return subprocess.Popen(
        [os.fsencode(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Have the command stopped on the phone, for which its output must go on flowing; then the client."""
    deadline_s = time.monotonic() + _STOP_GRACE_S
    with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                if not os.read(key.fd, 1 << 16):
                    selector.unregister(key.fileobj)
    kill_group(process)


def _server_runs() -> bool:
    try:
        port = int(os.environ.get("ANDROID_ADB_SERVER_PORT") or _SERVER_PORT)
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def _last_words(done: Completed) -> str:
    text = (done.stderr.replace(_MARK, b"") or done.stdout).decode(errors="replace").strip()
    return " ".join(text.splitlines()[-3:])[-300:] or f"exit code {done.returncode}"


def _file_timeout_s(size_bytes: int) -> float:
    return _HELPER_S + size_bytes / _SLOWEST_BYTES_PER_S
