"""The device's side of adb, on loopback: enough of adbd for the stock client to connect, run commands
(shell_v2: two streams and an exit code), push and pull.

Protocol: packages/modules/adb/{protocol.txt, SYNC.TXT, shell_protocol.h} of Android. Like adbd, every
command is the leader of a session, and has one socket for its stdin and stdout together.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (int.from_bytes(n, "little") for n in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE"))  # fmt: skip
VERSION, MAX_PAYLOAD = 0x01000001, 256 * 1024
TOKEN, RSA_PUBLIC_KEY = 1, 3  # of AUTH
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)  # shell_protocol.h


class MiniAdbd:
    """Serves for as long as a ``with`` block lasts; ``serial`` is what ``adb connect`` takes.

    ``shell`` is the command that takes a line for the target's shell as its last word, ``root`` the
    target's ``/`` as this process sees it, ``features`` what it offers. One that ``is_authorized``
    not accepts no key, as a phone before somebody taps "Allow".
    """

    def __init__(
        self, *, shell: Sequence[str], root: Path = Path("/"), environment: Mapping[str, str] | None = None,
        features: str = "shell_v2,cmd", is_authorized: bool = True,
    ) -> None:  # fmt: skip
        self.shell, self.root, self.features = list(shell), root, features
        self.is_authorized = is_authorized
        self.spoils = False  # whether files arrive with another last byte
        self.environment = dict(environment or os.environ)
        self._connections: list[_Connection] = []

    def __enter__(self) -> MiniAdbd:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection, as when the cable is pulled."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = _Connection(self, self._socket.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Connection:
    """One client's connection: packets of 24 bytes and a payload, for streams by number."""

    def __init__(self, daemon: MiniAdbd, link: socket.socket) -> None:
        self.daemon, self.link = daemon, link
        self.payload = 4096
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()

    def serve(self) -> None:
        last = 0
        try:
            while True:
                command, first, second, length = struct.unpack("<4I8x", self._read(24))
                data = self._read(length)
                stream = self._streams.get(second)
                if command in (CNXN, AUTH) and not self.daemon.is_authorized:
                    if first != RSA_PUBLIC_KEY:
                        self.send(AUTH, TOKEN, 0, bytes(20))
                elif command == CNXN:
                    self.payload = min(MAX_PAYLOAD, second)
                    banner = f"device::ro.product.name=mini;ro.product.model=Mini_Phone;ro.product.device=mini;features={self.daemon.features}"
                    self.send(CNXN, VERSION, MAX_PAYLOAD, banner.encode())
                elif command == OPEN:
                    last += 1
                    self._streams[last] = stream = _Stream(self, last, first)
                    self.send(OKAY, last, first)
                    threading.Thread(target=stream.serve, args=(data.rstrip(b"\0"),), daemon=True).start()  # fmt: skip
                elif stream is None:
                    continue
                elif command == WRTE:
                    stream.inbox.put(data)
                    self.send(OKAY, second, first)
                elif command == OKAY:
                    stream.may_send.release()
                elif command == CLSE:
                    del self._streams[second]
                    stream.end()
        except (EOFError, OSError):
            self.close()

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)  # fmt: skip
        with self._lock:
            self.link.sendall(head + data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)
        for stream in list(self._streams.values()):
            stream.end()

    def _read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            chunk = self.link.recv(size - len(found))
            if not chunk:
                raise EOFError
            found += chunk
        return bytes(found)


class _Stream:
    """One service that the client opened."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.inbox: queue.Queue[bytes] = queue.Queue()
        self.may_send = threading.Semaphore(0)
        self._rest = b""
        self._is_open = True
        self._lock = threading.Lock()

    def serve(self, service: bytes) -> None:
        with contextlib.suppress(EOFError, OSError):
            if service.startswith(b"shell,v2"):
                self._shell(service.partition(b":")[2])
            elif service == b"sync:":
                self._sync()
        with contextlib.suppress(OSError):
            self.connection.send(CLSE, self.local, self.remote)

    def end(self) -> None:
        self._is_open = False
        self.inbox.put(b"")
        self.may_send.release()

    def write(self, data: bytes) -> None:
        with self._lock:
            for at in range(0, len(data), self.connection.payload):
                self.connection.send(WRTE, self.local, self.remote, data[at : at + self.connection.payload])  # fmt: skip
                self.may_send.acquire()
                if not self._is_open:
                    raise EOFError

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            chunk = self.inbox.get()
            if not chunk and not self._is_open:
                raise EOFError
            self._rest += chunk
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    # -------------------------------------------------------------------------------------- shell

    def _shell(self, line: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            process = subprocess.Popen(
                [*(os.fsencode(word) for word in self.connection.daemon.shell), line], stdin=theirs, stdout=theirs,
                stderr=subprocess.PIPE, start_new_session=True, env=self.connection.daemon.environment, cwd="/",
            )  # fmt: skip
            theirs.close()
            assert process.stderr is not None
            stderr = process.stderr.fileno()
            threading.Thread(target=self._feed, args=(ours, process.pid), daemon=True).start()
            pumps = [
                threading.Thread(target=self._pump, args=(STDOUT, lambda: ours.recv(1 << 16))),
                threading.Thread(target=self._pump, args=(STDERR, lambda: os.read(stderr, 1 << 16))),
            ]  # fmt: skip
            for pump in pumps:
                pump.start()
            for pump in pumps:
                pump.join()
            code = process.wait()
            process.stderr.close()
            self.write(struct.pack("<BIB", EXIT, 1, 128 - code if code < 0 else code & 255))

    def _pump(self, kind: int, read: object) -> None:
        is_sent = True
        with contextlib.suppress(OSError):
            while data := read():  # type: ignore[operator]
                with contextlib.suppress(EOFError, OSError):
                    if is_sent:
                        is_sent = False
                        self.write(struct.pack("<BI", kind, len(data)) + data)
                        is_sent = True

    def _feed(self, target: socket.socket, pid: int) -> None:
        """The client's input to the command; its end where the client is gone."""
        try:
            while True:
                kind, length = struct.unpack("<BI", self.read(5))
                data = self.read(length)
                if kind == STDIN:
                    target.sendall(data)
                elif kind == CLOSE_STDIN:
                    target.shutdown(socket.SHUT_WR)
        except (EOFError, OSError):
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)
            if not self._is_open:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGHUP)

    # --------------------------------------------------------------------------------------- sync

    def _sync(self) -> None:
        while True:
            name, length = struct.unpack("<4sI", self.read(8))
            argument = self.read(length)
            if name == b"STAT":
                try:
                    found = self._path(argument).stat()
                    mode, size, mtime = found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)  # fmt: skip
                except OSError:
                    mode = size = mtime = 0
                self.write(struct.pack("<4s3I", b"STAT", mode, size, mtime))
            elif name == b"SEND":
                path, _, mode_text = argument.rpartition(b",")
                self._receive(self._path(path), int(mode_text))
            elif name == b"RECV":
                self._send(self._path(argument))
            elif name == b"QUIT":
                return
            else:
                self._fail(f"unknown request {name!r}")

    def _receive(self, path: Path, mode: int) -> None:
        problem, target = "", None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path.open("wb", buffering=0)
        except OSError as exc:
            problem = f"couldn't create file: {exc.strerror}"
        while True:
            name, length = struct.unpack("<4sI", self.read(8))
            if name == b"DONE":
                break
            data = self.read(length)
            try:
                if target is not None and not problem:
                    target.write(data)
            except OSError as exc:
                problem = f"write failed: {exc.strerror}"
                path.unlink()
        if target is not None:
            if self.connection.daemon.spoils:
                os.pwrite(target.fileno(), b"?", max(target.tell() - 1, 0))
            target.close()
        if problem:
            self._fail(problem)
        else:
            path.chmod(
                (mode & 0o777) | ((mode >> 3) & 0o070)
            )  # as adbd: the group gets what the user has
            self.write(struct.pack("<4sI", b"OKAY", 0))

    def _send(self, path: Path) -> None:
        try:
            with path.open("rb") as source:
                while data := source.read(1 << 16):
                    self.write(struct.pack("<4sI", b"DATA", len(data)) + data)
            self.write(struct.pack("<4sI", b"DONE", 0))
        except OSError as exc:
            self._fail(f"open failed: {exc.strerror}")

    def _fail(self, reason: str) -> None:
        self.write(struct.pack("<4sI", b"FAIL", len(reason.encode())) + reason.encode())

    def _path(self, name: bytes) -> Path:
        return self.connection.daemon.root / os.fsdecode(name).lstrip("/")
