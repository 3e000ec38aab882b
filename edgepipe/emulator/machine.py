"""Start, find and stop virtual boards of QEMU's.

A running board has a folder below ``running/`` with its copy of the disk, its QMP socket and what a
client needs (``board.json``, ``known_hosts``). QEMU holds a lock on that folder for as long as it
lives, so that a folder without one is known to be left over, whatever its pid says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepipe.emulator import needs, user_mode
from edgepipe.emulator.build import SNAPSHOT, USER, Board, built_board, emulator_dir, find_emulation
from edgepipe.emulator.debian import run_program
from edgepipe.errors import NotReadyError
from edgepipe.profile import Emulation

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0  # 5 s when nothing else runs; a restored snapshot takes 1 s
_QMP_TIMEOUT_S = 60.0
_PORT_ATTEMPTS = 5
_DISK, _HOME = "disk.qcow2", "home"
_NETWORK = "net0"  # the name of the network card for QMP's set_link

# Runs "$@" until it ends or the standard input does: that of a board which lives no longer than the
# process that opened it, even where that one is killed. The folder "$0" goes with it.
_WATCHED = (
    'exec 3<&0 </dev/null; "$@" 3<&- & board=$!; '
    '{ read -r word <&3; kill -KILL "$board"; } 2>/dev/null & watch=$!; '
    'exec 3<&-; wait "$board"; status=$?; kill "$watch" 2>/dev/null; '
    '[ "$status" = 137 ] && rm -rf "$0"; exit "$status"'
)


@functools.cache
def qemu_version() -> str:
    """What ``qemu-system-aarch64 --version`` says of itself; "" where it is not installed."""
    program = needs.find_program("qemu-system-aarch64")
    if not program:
        return ""
    text = run_program([program, "--version"], doing="asking QEMU for its version")
    return text.splitlines()[0]


def machine_arguments(emulation: Emulation) -> list[str]:
    """Arguments of QEMU that make the machine: a snapshot is restored only with the same ones.

    ``-icount shift=0`` lets the guest's clock and its performance counters count instructions, so
    that both repeat (QEMU, "TCG Instruction Counting"); it needs emulation even on an arm64 host.
    """
    return [
        "-machine", "virt,gic-version=2", "-accel", "tcg", "-cpu", emulation.cpu,
        "-smp", str(emulation.cores), "-m", f"{int(emulation.memory) // 2**20}M", "-icount", "shift=0",
        "-nodefaults", "-no-user-config", "-display", "none",
        "-append", "console=ttyAMA0 quiet panic=-1 random.trust_cpu=on",
    ]  # fmt: skip


class Qmp:
    """QEMU's control connection (docs/interop/qmp-spec): one command after the other.

    ::

        with Qmp(running.folder / "qmp") as qmp:
            qmp.set_link(up=False)
    """

    def __init__(self, path: Path) -> None:
        self._socket = _connect_unix(path)
        self._stream = self._socket.makefile("rw", encoding="utf-8")
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; what it returns. Raises NotReadyError with what QEMU says."""
        try:
            self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self._stream.flush()
            while True:
                answer = self._read()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    said = answer["error"].get("desc", "")
                    raise NotReadyError(f"QEMU refuses {command}: {said}", code="emulator-refuses")
        except (OSError, ValueError) as exc:
            raise NotReadyError(f"QEMU did not answer to {command}: {exc}", code="emulator-gone") from exc  # fmt: skip

    def monitor(self, line: str) -> str:
        """Run a command of QEMU's monitor for people (savevm has no other); what it printed."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def set_link(self, *, up: bool) -> None:
        """Plug the network cable in, or pull it."""
        self.execute("set_link", name=_NETWORK, up=up)

    def stop(self) -> None:
        """Freeze the board: nothing runs until `resume`."""
        self.execute("stop")

    def resume(self) -> None:
        self.execute("cont")

    def reset(self) -> None:
        """Cut the power and switch it on again."""
        self.execute("system_reset")

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise OSError("it closed the connection")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclasses.dataclass(frozen=True)
class Running:
    """A running board. ``name`` is its profile's, ``address`` where its SSH server listens."""

    name: str
    folder: Path
    port: int
    pid: int
    identity_file: Path

    @property
    def address(self) -> str:
        return f"ssh://{USER}@127.0.0.1:{self.port}"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def is_kept(self) -> bool:
        """Whether `up` started it: another lives only as long as the process that opened it."""
        return self.folder.name == self.name

    @property
    def owner_pid(self) -> int:
        """The process that a board which is not kept belongs to; 0 for one that is."""
        return 0 if self.is_kept else int(self.folder.name.rpartition(".")[2].partition("-")[0])

    def ssh_command(self) -> list[str]:
        """The words of an ``ssh`` command that logs in."""
        return [
            "ssh", "-F", "none", "-i", str(self.identity_file), "-o", "IdentitiesOnly=yes",
            "-o", f"UserKnownHostsFile={self.known_hosts}", "-p", str(self.port), f"{USER}@127.0.0.1",
        ]  # fmt: skip


def up(name: str, *, port: int = 0) -> Running:
    """Start the board from its snapshot and wait until it speaks SSH; it runs until `down`.

    A board that runs already is left as it is. ``port`` 0 is a free one of 127.0.0.1. Raises
    NotReadyError where it is not built, or does not start.
    """
    found = find_running(name)
    if found is None:
        board = _ready_board(name)
        try:
            with _run_folder(board, name) as (folder, lock):
                return _start(board, folder, lock, port=port, watched=False)[0]
        except FileExistsError:  # somebody else was quicker
            found = _await_start(name)
    if port not in (0, found.port):
        raise NotReadyError(
            f"{name} is up already, on port {found.port}",
            hint=f"edgepipe emulate down {name}",
            code="already-up",
        )
    return found


@contextlib.contextmanager
def private_board(name: str) -> Iterator[Running]:
    """A board of one's own, started from the snapshot, gone with the ``with`` block or this process."""
    board = _ready_board(name)
    log.info("starting %s from its snapshot", name)
    own = f"{name}.{os.getpid()}-{secrets.token_hex(3)}"
    with _run_folder(board, own) as (folder, lock):
        running, process = _start(board, folder, lock, port=0, watched=True)
    try:
        yield running
    finally:
        _end_watched(process)
        shutil.rmtree(folder, ignore_errors=True)


def down(name: str) -> bool:
    """Switch a board off that `up` started; False where it was not on. What was on its disk is gone."""
    found = find_running(name)
    if found is None:
        return False
    try:
        with Qmp(found.folder / "qmp") as qmp:
            qmp.execute("quit")
    except NotReadyError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _QMP_TIMEOUT_S
    while _is_locked(found.folder):
        if time.monotonic() > deadline_s:
            raise NotReadyError(f"{name} (pid {found.pid}) does not end", code="emulator-stuck")
        time.sleep(0.02)
    list_running()  # clears away what it left
    return True


def find_running(name: str) -> Running | None:
    """The board that `up` started, or None."""
    return next((r for r in list_running() if r.folder.name == name), None)


def list_running() -> list[Running]:
    """All running boards, private ones included; what dead ones left is removed."""
    folder = emulator_dir() / "running"
    if not folder.is_dir():
        return []
    with _running_lock():
        found = [_read_running(path) for path in sorted(folder.iterdir())]
    return [running for running in found if running is not None]


@contextlib.contextmanager
def _running_lock() -> Iterator[None]:
    """One look at the folders of running boards, or one more of them, at a time."""
    folder = emulator_dir() / "running"
    folder.mkdir(parents=True, exist_ok=True)
    with _folder_descriptor(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _run_folder(board: Board, name: str) -> Iterator[tuple[Path, int]]:
    """A folder to start ``board`` in, and the descriptor of the lock that the board inherits.

    The folder goes where the start fails. Raises FileExistsError where there is one of that name.
    """
    folder = emulator_dir() / "running" / name
    with _running_lock():
        folder.mkdir(mode=0o700)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        _copy_state(board, folder)
        yield folder, lock
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _copy_state(board: Board, folder: Path) -> None:
    """What a board changes while it runs is a copy of its own; holes stay holes."""
    # the snapshot lies in the overlay
    source, name = (board.folder / _HOME, _HOME) if board.is_user_mode else (board.overlay, _DISK)
    run_program(["cp", "-a", "--sparse=always", "--reflink=auto", source, folder / name], doing="copying the disk")  # fmt: skip


def _await_start(name: str) -> Running:
    """The board that another process is starting, once it is up."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        found = find_running(name)
        if found is not None:
            return found
        if not (emulator_dir() / "running" / name).is_dir():
            break
        time.sleep(0.1)
    raise NotReadyError(f"another process failed to start {name}", hint="try again", code="emulator-failed")  # fmt: skip


@contextlib.contextmanager
def _folder_descriptor(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    try:
        with _folder_descriptor(folder) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _read_running(folder: Path) -> Running | None:
    """What runs in a folder. Under the lock of all: a folder that nobody holds is left over."""
    if not folder.is_dir():
        return None
    if not _is_locked(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    try:
        data = json.loads((folder / "board.json").read_text())
        return Running(data["name"], folder, data["port"], data["pid"], Path(data["identity_file"]))
    except (OSError, ValueError, KeyError):
        return None  # it is being started


def _ready_board(name: str) -> Board:
    needs.check_programs(
        needs.to_run(find_emulation(name)), doing=f"starting the virtual board {name}"
    )
    return built_board(name)


def _start(
    board: Board, folder: Path, lock: int, *, port: int, watched: bool
) -> tuple[Running, subprocess.Popen[bytes]]:
    """Restore the snapshot in ``folder``, on ``port`` or (0) on a free one."""
    for attempt in range(_PORT_ATTEMPTS):
        chosen = port or _free_port()
        process = _launch(board, folder, lock, chosen, restore=True, watched=watched)
        try:
            _wait_for_banner(board, chosen, process, folder)
            if not board.is_user_mode:
                set_clock(folder, time.time())
            break
        except NotReadyError:
            _end_watched(process) if watched else _kill(process)
            # another process may have taken the port between our look and QEMU's bind
            taken = any(words in _said(folder) for words in ("hostfwd", "Bind to port"))
            if port or attempt == _PORT_ATTEMPTS - 1 or not taken:
                raise
        except BaseException:
            _end_watched(process) if watched else _kill(process)
            raise
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{chosen} {board.system.host_key}\n")
    data = {
        "name": board.name,
        "port": chosen,
        "pid": process.pid,
        "identity_file": str(board.system.identity_file),
    }
    (folder / "board.json").write_text(json.dumps(data) + "\n")
    return Running(board.name, folder, chosen, process.pid, board.system.identity_file), process


def set_clock(folder: Path, unix_s: float) -> None:
    """Tell the board that runs in ``folder`` what time it is; it believes its serial port."""
    line, echo = b"clock %.3f" % unix_s, b""
    try:
        with _connect_unix(folder / "serial") as serial:
            serial.sendall(line + b"\n")
            # what it has not taken when the connection closes is lost; it echoes what it takes
            while line not in echo or not echo.endswith(b"\n"):
                said = serial.recv(4096)
                if not said:
                    raise OSError("it closed the connection")
                echo += said
    except OSError as exc:
        raise NotReadyError(f"the board does not take the time: {exc}", code="emulator-failed") from exc  # fmt: skip


def _connect_unix(path: Path) -> socket.socket:
    """A connection to a socket of QEMU's. Raises NotReadyError."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_QMP_TIMEOUT_S)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # the path of a socket may have 107 bytes (unix(7)), and a cache folder's may be longer
        short = Path(f"/proc/self/fd/{folder}/{path.name}")
        connection.connect(str(short if short.parent.exists() else path))
    except OSError as exc:
        connection.close()
        raise NotReadyError(f"cannot reach QEMU at {path}: {exc}", code="emulator-gone") from exc
    finally:
        os.close(folder)
    return connection


def _launch(
    board: Board, folder: Path, lock: int, port: int, *, restore: bool, watched: bool
) -> subprocess.Popen[bytes]:
    if board.is_user_mode:
        argv = user_mode.command(board, home=folder / _HOME, port=port)
    else:
        argv = _machine_command(board, folder, port, restore=restore)
    try:
        with (folder / "qemu.log").open("wb") as output:
            return subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, str(folder), *argv] if watched else argv,
                cwd=folder,
                stdin=subprocess.PIPE if watched else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),  # the lock is held until all who have it are gone
                start_new_session=True,  # Ctrl-C here does not reach it
            )
    except OSError as exc:
        raise NotReadyError(f"cannot start {argv[0]}: {exc}", code="emulator-failed") from exc


def _machine_command(board: Board, folder: Path, port: int, *, restore: bool) -> list[str]:
    disk = ",".join(
        (
            "driver=qcow2",
            f"file.filename={_escaped(folder / _DISK)}",
            "backing.driver=raw",
            f"backing.file.filename={_escaped(board.system.disk)}",
        )
    )
    return [
        needs.find_program("qemu-system-aarch64"), *machine_arguments(board.emulation),
        "-kernel", str(board.system.kernel), "-initrd", str(board.system.initramfs),
        "-chardev", "socket,id=serial0,path=serial,server=on,wait=off,logfile=console.log", "-serial", "chardev:serial0",
        "-qmp", "unix:qmp,server=on,wait=off",
        "-drive", f"if=none,id=disk0,cache=unsafe,{disk}", "-device", "virtio-blk-device,drive=disk0",
        "-netdev", f"user,id=user0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22",
        "-device", f"virtio-net-device,id={_NETWORK},netdev=user0", "-device", "virtio-rng-device",
        *(("-loadvm", SNAPSHOT) if restore else ()),
    ]  # fmt: skip


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU, "-drive": a comma is written twice


def _end_watched(process: subprocess.Popen[bytes]) -> None:
    """End a board that was started under watch: its watcher sees the end of its input."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_QMP_TIMEOUT_S)
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _said(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / "qemu.log").read_text(errors="replace").strip()
    return ""


def _wait_for_banner(
    board: Board, port: int, process: subprocess.Popen[bytes], folder: Path
) -> None:
    """Until sshd greets: QEMU itself accepts connections before anybody listens inside."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            again = f"build the board again: edgepipe emulate build {board.name}"
            raise NotReadyError(
                f"QEMU ended with {process.returncode} while starting {board.name}: {_said(folder)[-500:]}",
                hint=user_mode.WHY_NOT if board.is_user_mode else again,
                code="emulator-failed",
            )
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=2) as connection,
        ):
            if connection.recv(4) == b"SSH-":
                return
        time.sleep(0.05)
    console = (folder / "console.log").read_text(errors="replace") if (folder / "console.log").exists() else ""  # fmt: skip
    raise NotReadyError(
        f"the virtual board did not speak SSH within {_START_TIMEOUT_S:g} s; its console: {console[-500:]}",
        code="emulator-failed",
    )


def make_snapshot(board: Board) -> None:
    """Start a board that was just made, log in once, and keep it as the snapshot "ready".

    Without a kernel there is no snapshot, but what its home holds afterwards is kept.
    """
    folder = board.folder
    if board.is_user_mode:
        folder = folder / "first-start"
        folder.mkdir()
        _copy_state(board, folder)
        with _folder_descriptor(folder) as lock:
            running, process = _start(board, folder, lock, port=0, watched=True)
        try:
            _warm_up(running)
            shutil.rmtree(board.folder / _HOME)
            (folder / _HOME).rename(board.folder / _HOME)
        finally:
            _end_watched(process)
            shutil.rmtree(folder, ignore_errors=True)
        return
    overlay = folder / _DISK
    board.overlay.rename(overlay)
    port = _free_port()
    with _folder_descriptor(folder) as lock:
        process = _launch(board, folder, lock, port, restore=False, watched=True)
    try:
        _wait_for_banner(board, port, process, folder)
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {board.system.host_key}\n")
        running = Running(board.name, folder, port, process.pid, board.system.identity_file)
        _warm_up(running)
        with Qmp(folder / "qmp") as qmp:
            said = qmp.monitor(f"savevm {SNAPSHOT}")
            if said.strip():
                raise NotReadyError(
                    f"QEMU cannot keep the snapshot: {said.strip()}", code="build-failed"
                )
            qmp.execute("quit")
        process.wait(_QMP_TIMEOUT_S)
    finally:
        _end_watched(process)
    overlay.rename(board.overlay)
    for name in ("qmp", "serial", "qemu.log", "console.log", "known_hosts"):
        (folder / name).unlink(missing_ok=True)


def _warm_up(running: Running) -> None:
    """Do once what every measurement begins with: files are then in place and in memory."""
    from edgepipe.device.virtual import connect
    from edgepipe.preflight import prepare, push_runtime
    from edgepipe.profile import find_profile
    from edgepipe.resources import profile_paths

    profile = find_profile(running.name, profile_paths())
    device = connect(running)
    try:
        board = prepare(device, profile)
        push_runtime(board, profile, "auto", board.facts())
        device.run(["sync"], timeout_s=_START_TIMEOUT_S)
    finally:
        device.close()
