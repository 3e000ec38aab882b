"""A board reached over SSH. The only module that imports paramiko.

Two of paramiko's habits shape `SshDevice.run`: its timeouts are per read, so that a command which
keeps printing outlives them; and reading one stream to its end blocks as soon as the other has
filled its window. Both streams are polled here against a monotonic clock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import getpass
import hashlib
import logging
import math
import os
import pwd
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import paramiko

from edgepipe import password
from edgepipe.artifact import hash_path
from edgepipe.device import ADDRESS_HINT, base
from edgepipe.device.base import (
    Completed,
    check_argv,
    check_line,
    disk_full_error,
    output_error,
    shown,
    timeout_error,
)
from edgepipe.device.parse import parse_free_bytes, parse_home, parse_sha256
from edgepipe.errors import (
    AuthError,
    ConnectError,
    DeviceError,
    HostKeyError,
    RequestError,
    TransferError,
)

log = logging.getLogger(__name__)
# What paramiko raises over a link that breaks or a peer that talks nonsense. SFTPError is no
# SSHException.
_LINK_ERRORS = (OSError, EOFError, paramiko.SSHException, paramiko.SFTPError)
# paramiko logs a traceback of every failed handshake that it also raises; we report it once.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

ENV_PASSWORD = "EDGEPIPE_SSH_PASSWORD"
ENV_IDENTITY = "EDGEPIPE_SSH_IDENTITY"
ENV_KNOWN_HOSTS = "EDGEPIPE_KNOWN_HOSTS"

_GLOBAL_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")  # ssh_config(5), GlobalKnownHostsFile
_CONNECT_TIMEOUT_S = 10.0
_MAX_JUMPS = 5
_KEEPALIVE_S = 15
_DEAD_S = 45.0  # three keepalives without an acknowledgement: the link is dead
_STALL_S = 30.0  # a transfer that moves nothing for so long is broken
_HELPER_S = 30.0  # for mkdir, df and the like
_CHUNK_BYTES = 1 << 18
# Two full SSH packets per write (OpenSSH takes 32 KiB, of which paramiko keeps 64 bytes for headers)
# less the header of the write. paramiko's own 32 KiB make one full and one tiny packet each.
_WRITE_BYTES = 2 * (2**15 - 64) - 64
# Writes the file $0 to the disk, so that the name it is given next is that of the whole of it after a power
# cut, too. busybox and toybox know `sync` of everything only.
_SYNC = 'sync -- "$0" 2>/dev/null || sync; '
# Prints the sha256 of the file $0 with the program $1, or with the other where there is only that.
# Python takes longer to start, but its OpenSSL uses the processor's SHA instructions where sha256sum
# often does not: a large push got a third faster (ci/bench/push.py).
_HASH = (
    'command -v "$1" >/dev/null || if [ "$1" = python3 ]; then set sha256sum; else set python3; fi; '
    'if [ "$1" = sha256sum ]; then sha256sum <"$0"; else python3 -I -S -c \''
    'import hashlib, sys; h = hashlib.sha256(); f = open(sys.argv[1], "rb"); '
    '[h.update(b) for b in iter(lambda: f.read(1 << 20), b"")]; print(h.hexdigest())'
    '\' "$0"; fi'
)
_PYTHON_HASHES_FROM_BYTES = 8_000_000

# What runs on the board around a command. The command gets a deadline of its own ($0, seconds) for
# the case that we vanish, no standard input, and a process group of its own. We hold the script's
# standard input: its end (the connection is gone) or a line (we gave up) stops the command.
# Closing the channel alone would leave it running. `timeout` is coreutils or busybox; without it
# only the command itself is stopped, not its children.
_INNER = (
    'if timeout -k 2 "$0" true >/dev/null 2>&1; then '
    '( read -r word <&3; if [ "$word" ]; then kill -TERM -$$; sleep 2; kill -KILL -$$; '
    "else kill -TERM $$; fi ) >/dev/null 2>&1 & "
    'exec timeout -k 2 "$0" "$@" 3<&-; '
    "fi; "
    "( read -r word <&3; kill -TERM $$ || exit; sleep 2; kill -KILL $$ ) >/dev/null 2>&1 & "
    '( left="$0"; while [ "$left" -gt 0 ]; do sleep 1; kill -0 $$ || exit; left=$((left - 1)); done; '
    "kill -TERM $$; sleep 2; kill -KILL $$ ) 3<&- >/dev/null 2>&1 & "
    'exec "$@" 3<&-'
)
# The outer shell turns death by signal n into exit status 128 + n (paramiko does not report
# signals) and swallows the inner one's remark about it.
_OUTER = 'exec 3<&0 4>&2 </dev/null 2>/dev/null; ( exec sh -c "$0" "$@" 2>&4 4>&- ); exit $?'
_BOARD_GRACE_S = 1  # the board's own deadline comes after ours
_STOP_GRACE_S = 4.0  # TERM, two seconds, KILL, and the way back


def command_line(argv: Sequence[str], *, board_timeout_s: int) -> str:
    """The line for the board's login shell that runs ``argv``: the one place that quotes."""
    return "exec " + shlex.join(["sh", "-c", _OUTER, _INNER, str(board_timeout_s), *argv])


def open_ssh(
    address: str,
    *,
    identity_file: Path | None = None,
    known_hosts: Path | None = None,
    connect_timeout_s: float = _CONNECT_TIMEOUT_S,
    configured: bool = True,
) -> SshDevice:
    """Connect to ``ssh://[user@]host[:port]``, where ``host`` may be a name in ``~/.ssh/config``.

    Of the configuration HostName, Port, User, IdentityFile, IdentitiesOnly, UserKnownHostsFile,
    HostKeyAlias, ProxyJump and ProxyCommand are used, and ``IdentityAgent none``; what they are is
    asked of OpenSSH's client (`_read_config`). ``identity_file`` (or EDGEPIPE_SSH_IDENTITY)
    is then the only key tried; otherwise the agent's, the configuration's and ``~/.ssh/id_*``. A
    password is taken from EDGEPIPE_SSH_PASSWORD, or asked for where somebody can be asked
    (`edgepipe.password`). Host keys are looked up in ``known_hosts``
    (or EDGEPIPE_KNOWN_HOSTS), otherwise in UserKnownHostsFile, ``~/.ssh/known_hosts`` and the
    system's; the first file is where `trust_host_key` writes. Without ``configured`` no configuration
    is read: all is in the address and the arguments.

    Raises RequestError for a bad address or configuration, ConnectError, HostKeyError, AuthError.
    """
    options = _Options(
        configured=configured,
        identity_file=identity_file or _path_from_environment(ENV_IDENTITY),
        known_hosts=known_hosts or _path_from_environment(ENV_KNOWN_HOSTS),
        connect_timeout_s=connect_timeout_s,
    )
    endpoint = _resolve(address, options)
    log.debug("connecting to %s (%s port %d)", address, endpoint.host, endpoint.port)
    return SshDevice(address, endpoint, options)


class SshDevice:
    """See `Device` for the four methods. Opened by `open_ssh`; connects again when its link broke.

    The call during which the link breaks fails with the code ``connection-lost``; the next one
    makes a new connection, with all that `open_ssh` may raise.
    """

    def __init__(self, address: str, endpoint: _Endpoint, options: _Options) -> None:
        self.address = address
        self._endpoint, self._options = endpoint, options
        self._sftp_client: paramiko.SFTPClient | None = None
        self._home = ""
        self._is_closed = False
        self._connect()

    def _connect(self) -> None:
        with contextlib.ExitStack() as stack:
            self._client = _connect(self._endpoint, self._options, stack, jumps=0)
            self._resources = stack.pop_all()

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """See `Device.run`. Starts in the user's home; `~` and variables are not expanded."""
        words = check_argv(argv)
        line = command_line(words, board_timeout_s=math.ceil(timeout_s) + _BOARD_GRACE_S)
        check_line(line, words)
        deadline_s = time.monotonic() + timeout_s
        with self._connection_errors(f"running `{shown(words)}`"):
            channel = self._transport().open_session(timeout=max(timeout_s, 1.0))
            try:
                channel.exec_command(line.encode(errors="surrogateescape"))
                return self._collect(channel, words, deadline_s, timeout_s)
            except BaseException:
                if not _stop(channel):  # no answer at all: the link is dead, whatever TCP thinks
                    self._client.close()
                raise
            finally:
                channel.close()

    def push(self, local: Path, remote: str) -> bool:
        """See `Device.push`."""
        path = self._expand(remote)
        try:
            size_bytes, mode = local.stat().st_size, local.stat().st_mode & 0o777
            if self._size(path) == size_bytes and self._digest(path, size_bytes) == hash_path(
                local
            ):
                return False
        except _LINK_ERRORS as exc:
            failure = self._transfer_error("push", local, path, exc)
            self._drop_sftp()
            raise failure from exc
        self._make_room(path, size_bytes)
        part = f"{path}.part.{secrets.token_hex(4)}"
        log.debug("pushing %s to %s on %s", local, path, self.address)
        try:
            sent = self._upload(local, part, mode)
            if self._digest(part, size_bytes, before=_SYNC) != sent:
                raise OSError("what arrived differs from what was sent")
            self._sftp().posix_rename(part, path)
        except BaseException as exc:
            failure = self._transfer_error("push", local, path, exc)  # before connecting again
            self._drop_sftp()
            with contextlib.suppress(DeviceError):
                self.run(["rm", "-f", "--", part], timeout_s=_HELPER_S)
            if isinstance(exc, _LINK_ERRORS):
                raise self._full_disk(path, size_bytes) or failure from exc
            raise
        return True

    def pull(self, remote: str, local: Path) -> None:
        """See `Device.pull`."""
        path = self._expand(remote)
        part = local.with_name(f"{local.name}.part.{secrets.token_hex(4)}")
        size_bytes = 0
        try:
            size_bytes = self._sftp().stat(path).st_size or 0
            local.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with self._sftp().open(path, "rb") as source, part.open("wb") as target:
                # all requests at once: with a limit paramiko 5.1 takes an empty queue for the end
                # of the file and reads the rest one round trip at a time, 20 times slower
                source.prefetch(size_bytes)
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != self._digest(path, size_bytes):
                raise OSError("what arrived differs from what lies there")
            part.replace(local)
        except BaseException as exc:
            failure = self._transfer_error("pull", path, local, exc)
            self._drop_sftp()
            if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:  # here: SFTP has no errno
                raise disk_full_error(
                    f"pull of {path} from {self.address} to {local}", needed_bytes=size_bytes
                ) from exc
            if isinstance(exc, _LINK_ERRORS):
                raise failure from exc
            raise
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connection for good. Closing twice is allowed."""
        self._is_closed = True
        self._drop_sftp()
        self._resources.close()

    def __enter__(self) -> SshDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SshDevice({self.address!r})"

    def _transport(self) -> paramiko.Transport:
        """The live connection; a new one where the last has died."""
        if not self._is_alive():
            if self._is_closed:
                raise ConnectError(
                    f"the connection to {self.address} is closed", hint="open the device again"
                )
            log.debug("connecting to %s again", self.address)
            self._drop_sftp()
            self._resources.close()
            try:
                self._connect()
            except ConnectError as exc:
                if exc.code != "unknown-host":
                    raise
                # it had this name before: one of mDNS comes back with the board
                raise ConnectError(exc.message, hint=exc.hint, code="connection-lost") from exc
        transport = self._client.get_transport()
        if transport is None:
            raise EOFError("the connection was closed at once")
        return transport

    def _is_alive(self) -> bool:
        transport = self._client.get_transport()
        return transport is not None and bool(transport.is_active())

    def _answers(self) -> bool:
        """Whether the board still speaks; that a link is dead may show in one channel first."""
        transport = self._client.get_transport()
        try:
            if transport is None:
                return False
            transport.open_session(timeout=_CONNECT_TIMEOUT_S).close()
        except _LINK_ERRORS as exc:
            return isinstance(exc, paramiko.ChannelException)  # it speaks, and allows no more
        return True

    @contextlib.contextmanager
    def _connection_errors(self, doing: str) -> Iterator[None]:
        """What paramiko raises when the link breaks, as ConnectError."""
        try:
            yield
        except _LINK_ERRORS as exc:
            raise ConnectError(
                f"lost the connection to {self.address} while {doing}: {str(exc) or 'it was closed'}",
                hint="is the board still up, and does it allow another session? try again",
                code="connection-lost",
            ) from exc

    @contextlib.contextmanager
    def _sftp_errors(self) -> Iterator[None]:
        """A board that lets us in but whose SFTP server is missing, or not alone on its stdout."""
        try:
            yield
        except _LINK_ERRORS as exc:
            if isinstance(exc, paramiko.ChannelException) or not self._answers():
                raise  # the whole connection is gone, or no further session is allowed
            raise ConnectError(
                f"{self.address} lets us in, but its SFTP server does not answer: {_reason(exc)}",
                hint="on the board: sudo apt-get install openssh-sftp-server, `Subsystem sftp` in "
                "sshd_config, and a ~/.bashrc that prints nothing without a terminal",
                code="no-sftp",
            ) from exc

    def _collect(
        self, channel: paramiko.Channel, words: list[str], deadline_s: float, timeout_s: float
    ) -> Completed:
        stdout, stderr = bytearray(), bytearray()
        while not _finished(channel):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise timeout_error(words, timeout_s, self.address)
            if not _read_available(channel, stdout, stderr):
                _wait(channel, left_s)
            if len(stdout) + len(stderr) > base.MAX_OUTPUT_BYTES:
                raise output_error(words, self.address)
        if not channel.exit_status_ready() or channel.recv_exit_status() < 0:
            raise EOFError("it ended without an exit status")
        return Completed(channel.recv_exit_status(), bytes(stdout), bytes(stderr))

    def _sftp(self) -> paramiko.SFTPClient:
        if self._sftp_client is None:
            self._transport()
            with self._connection_errors("opening SFTP"), self._sftp_errors():
                self._sftp_client = self._client.open_sftp()
                channel = self._sftp_client.get_channel()
                if channel is not None:
                    channel.settimeout(_STALL_S)
        return self._sftp_client

    def _drop_sftp(self) -> None:
        """Forget the SFTP session: after an error it may be in the middle of a packet."""
        if self._sftp_client is not None:
            with contextlib.suppress(*_LINK_ERRORS):
                self._sftp_client.close()
            self._sftp_client = None

    def _expand(self, remote: str) -> str:
        if not remote.startswith("~/"):
            return remote
        if not self._home:
            done = self.run(["sh", "-c", 'printf %s "$HOME"'], timeout_s=_HELPER_S)
            home = parse_home(os.fsdecode(done.stdout), self.address)
            self._home = home.rstrip("/")
        return f"{self._home}/{remote[2:]}"

    def _size(self, path: str) -> int | None:
        try:
            return self._sftp().stat(path).st_size
        except FileNotFoundError:
            return None

    def _digest(self, path: str, size_bytes: int, *, before: str = "") -> str:
        """sha256 of a file on the board, computed there after the script ``before`` has run on it."""
        # a Pi Zero hashes 20 MB/s and more; 1 MB/s leaves room for a slow card
        timeout_s = _HELPER_S + size_bytes / 1e6
        first = "python3" if size_bytes >= _PYTHON_HASHES_FROM_BYTES else "sha256sum"
        done = self.run(["sh", "-c", before + _HASH, path, first], timeout_s=timeout_s)
        if done.returncode != 0:
            raise OSError(f"cannot hash {path}: {os.fsdecode(done.stderr).strip()[-200:]}")
        return parse_sha256(os.fsdecode(done.stdout))

    def _free_bytes(self, folder: str) -> int:
        """Free space below ``folder``, which is made where it is missing."""
        done = self.run(
            ["sh", "-c", 'mkdir -p -- "$0" && df -Pk -- "$0"', folder], timeout_s=_HELPER_S
        )
        if done.returncode != 0:
            raise TransferError(
                f"cannot make the folder {folder} on {self.address}: {os.fsdecode(done.stderr).strip()[-200:]}",
                hint="choose a work_dir that this user may write",
            )
        return parse_free_bytes(os.fsdecode(done.stdout))

    def _make_room(self, path: str, size_bytes: int) -> None:
        free_bytes = self._free_bytes(os.path.dirname(path) or ".")  # noqa: PTH120 (a remote path)
        if size_bytes + base.FREE_MARGIN_BYTES > free_bytes:
            raise disk_full_error(
                f"push to {path} on {self.address}",
                needed_bytes=size_bytes,
                free_bytes=free_bytes,
            )

    def _upload(self, local: Path, part: str, mode: int) -> str:
        """Send ``local`` to ``part``; the sha256 of what was sent.

        The sending is done by another thread: Ctrl-C reaches only the main one, and can then not
        tear a packet in two, after which nothing could be cleaned up over this connection.
        """
        stop = threading.Event()
        sftp = self._sftp()

        def send() -> str:
            digest = hashlib.sha256()
            with local.open("rb") as source, sftp.open(part, "wb") as target:
                target.set_pipelined(True)  # without it every 32 KiB wait for a round trip
                target.MAX_REQUEST_SIZE = _WRITE_BYTES
                while (chunk := source.read(_WRITE_BYTES)) and not stop.is_set():
                    digest.update(chunk)
                    target.write(chunk)
            sftp.chmod(part, mode)
            return digest.hexdigest()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            try:
                return pool.submit(send).result()
            finally:
                stop.set()

    def _full_disk(self, path: str, size_bytes: int) -> TransferError | None:
        # SFTP (protocol 3) has no code for a full disk, only "Failure"
        with contextlib.suppress(DeviceError):
            free_bytes = self._free_bytes(os.path.dirname(path) or ".")  # noqa: PTH120
            if free_bytes < size_bytes:
                return disk_full_error(
                    f"push to {path} on {self.address}",
                    needed_bytes=size_bytes,
                    free_bytes=free_bytes,
                )
        return None

    def _transfer_error(
        self, verb: str, source: str | Path, target: str | Path, exc: BaseException
    ) -> TransferError:
        reason = getattr(exc, "strerror", None) or str(exc) or "the connection was closed"
        if isinstance(exc, TimeoutError):
            reason = f"nothing moved for {_STALL_S:g} s"
            self._client.close()
        return TransferError(
            f"{verb} of {source} to {target} on {self.address} failed: {reason}",
            hint="check both paths, their permissions and the link",
            code="" if self._answers() else "connection-lost",
        )


@dataclasses.dataclass(frozen=True)
class HostKey:
    """The key a host shows now, and what ``known_hosts`` holds for it.

    ``name`` is the host as known_hosts files write it (``[host]:port`` off port 22). ``known`` are
    the fingerprints on file: empty = unknown host; without ``fingerprint`` = changed.
    """

    name: str
    key_type: str
    key_base64: str
    fingerprint: str
    known: tuple[str, ...]
    known_hosts: Path

    @property
    def is_known(self) -> bool:
        return self.fingerprint in self.known


def scan_host_key(
    address: str,
    *,
    known_hosts: Path | None = None,
) -> HostKey:
    """Ask the host at ``address`` for its key, without logging in. Raises ConnectError."""
    options = _Options(
        identity_file=_path_from_environment(ENV_IDENTITY),  # for a jump host on the way
        known_hosts=known_hosts or _path_from_environment(ENV_KNOWN_HOSTS),
        connect_timeout_s=_CONNECT_TIMEOUT_S,
    )
    endpoint = _resolve(address, options)
    with contextlib.ExitStack() as stack:
        connection = _open_socket(endpoint, options, stack, jumps=0)
        with _handshake_errors(endpoint):
            transport = paramiko.Transport(connection)
            stack.callback(transport.close)
            transport.banner_timeout = _CONNECT_TIMEOUT_S
            wanted = _known_key_types(endpoint)
            if wanted:
                security = transport.get_security_options()
                rest = [name for name in security.key_types if name not in wanted]
                security.key_types = [n for n in security.key_types if n in wanted] + rest
            transport.start_client(timeout=_CONNECT_TIMEOUT_S)
            key = transport.get_remote_server_key()
    return HostKey(
        name=endpoint.key_name,
        key_type=key.get_name(),
        key_base64=key.get_base64(),
        fingerprint=key.fingerprint,
        known=tuple(known.fingerprint for known in _known_keys(endpoint)),
        known_hosts=endpoint.known_hosts[0],
    )


def trust_host_key(key: HostKey, *, replace: bool = False) -> None:
    """Write ``key`` to its known_hosts file. A changed key needs ``replace``, or is HostKeyError.

    With ``replace`` the host's old keys are taken out of that file; other lines stay as they are.
    """
    if key.known and not key.is_known and not replace:
        raise HostKeyError(
            f"the host key of {key.name} has changed: known {', '.join(key.known)}, now {key.fingerprint}",
            hint="if the board was reinstalled, accept the new key with --replace",
            code="host-key-changed",
        )
    path = key.known_hosts
    try:
        path = path.resolve()  # a link to the file stays a link
        # other lines may hold any bytes, and go back as they came
        lines = path.read_text(errors="surrogateescape").splitlines() if path.exists() else []
        if replace:
            lines = [kept for line in lines if (kept := _without_host(line, key.name)) or not line]
        lines.append(f"{key.name} {key.key_type} {key.key_base64}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            temporary.touch(mode=0o600)
            temporary.write_text("\n".join(lines) + "\n", errors="surrogateescape")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        raise HostKeyError(
            f"cannot write {path}: {exc}", hint="check its permissions, or use --known-hosts"
        ) from exc


@dataclasses.dataclass(frozen=True)
class _Options:
    identity_file: Path | None
    known_hosts: Path | None
    connect_timeout_s: float
    configured: bool = True


@dataclasses.dataclass(frozen=True)
class _Endpoint:
    """An address after ``~/.ssh/config`` has had its say."""

    address: str
    host: str
    port: int
    user: str
    key_name: str
    identity_files: tuple[Path, ...]
    identities_only: bool
    use_agent: bool
    known_hosts: tuple[Path, ...]
    proxy_jump: str
    proxy_command: str

    @property
    def login(self) -> str:
        """Whose password it would be."""
        return f"{self.user}@{self.host}:{self.port}"


def _path_from_environment(name: str) -> Path | None:
    value = os.environ.get(name)
    return _expand_user(value) if value else None


def _expand_user(path: str) -> Path:
    # pathlib's own raises RuntimeError where there is no such user
    return Path(os.path.expanduser(path))  # noqa: PTH111


def _resolve(address: str, options: _Options) -> _Endpoint:
    bad = RequestError(
        f"{_without_password(address)!r} is not an SSH address",
        hint=ADDRESS_HINT,
        code="bad-address",
    )
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port
    except ValueError as exc:
        raise bad from exc
    if parts.password is not None:
        raise RequestError(
            f"{_without_password(address)}: an address holds no password",
            hint=f"use a key, or put the password into the variable {ENV_PASSWORD}",
            code="bad-address",
        )
    host = parts.hostname and parts.netloc.rsplit("@", 1)[-1]
    extra = parts.path.rstrip("/") or parts.query or parts.fragment
    if parts.scheme != "ssh" or not host or host.startswith("-") or extra or port == 0:
        raise bad
    # urlsplit lowers the case of host names, which are case-sensitive in ~/.ssh/config
    host = host[1 : host.index("]")] if host.startswith("[") else host.split(":")[0]
    this_user = _this_user()  # paramiko asks as well, whatever the address says
    if options.configured:
        config = _read_config(host, user=parts.username, port=port)
    else:
        plain = {"hostname": host, "user": parts.username or "", "port": str(port or 22)}
        config = paramiko.SSHConfigDict(plain)
    host = str(config["hostname"])
    configured = str(config.get("port", 22))
    if not configured.isdecimal() or not 0 < int(configured) < 2**16:
        raise RequestError(
            f"~/.ssh/config: Port {configured!r} of {address} is no port",
            hint="write a number from 1 to 65535",
        )
    alias = str(config.get("hostkeyalias", ""))
    if options.identity_file:
        identity_files = [options.identity_file]
    else:
        listed = [_expand_user(name) for name in config.get("identityfile", [])]
        identity_files = [path for path in listed if path.is_file()]
    if options.known_hosts:
        known_hosts = [options.known_hosts]
    else:
        named = config.get("userknownhostsfile", "~/.ssh/known_hosts").split()
        known_hosts = [*map(_expand_user, named), _GLOBAL_KNOWN_HOSTS]
    return _Endpoint(
        address=address,
        host=host,
        port=int(configured),
        user=str(config.get("user", "")) or this_user,
        key_name=alias or (host if configured == "22" else f"[{host}]:{configured}"),
        identity_files=tuple(identity_files),
        identities_only=bool(options.identity_file) or config.get("identitiesonly") == "yes",
        use_agent=_uses_agent(str(config.get("identityagent", "SSH_AUTH_SOCK"))),
        known_hosts=tuple(known_hosts),
        proxy_jump=str(config.get("proxyjump", "none")),
        proxy_command=str(config.get("proxycommand") or "none"),
    )


def _uses_agent(identity_agent: str) -> bool:
    if identity_agent not in ("SSH_AUTH_SOCK", "none", os.environ.get("SSH_AUTH_SOCK")):
        log.warning("IdentityAgent %s is not asked; only that of SSH_AUTH_SOCK is", identity_agent)
    return identity_agent != "none"


def _this_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as exc:  # as in many containers
        raise RequestError(
            f"the account that runs edgepipe (uid {os.getuid()}) has no name, which reading "
            "~/.ssh/config needs",
            hint="export LOGNAME=edgepipe",
        ) from exc


def _without_password(address: str) -> str:
    """The address as it may be shown: a password in it is not repeated."""
    scheme, separator, rest = address.partition("://")
    login, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{login.split(':')[0]}{at}{host}" if at else address


def _read_config(host: str, *, user: str | None, port: int | None) -> paramiko.SSHConfigDict:
    """What ssh_config(5) says of ``host``; ``user`` and ``port`` of the address come first.

    OpenSSH's own client is asked where there is one (``ssh -G``), so that Include, Match and the
    system's file mean what they mean to ssh. Without it paramiko reads ``~/.ssh/config``, where an
    Include, which it does not follow, is an error.
    """
    path = _expand_user("~/.ssh/config")
    ssh = shutil.which("ssh")
    known_home = _home_of_account()
    if ssh and known_home:
        text = _ask_ssh(ssh, path, host, user=user, port=port, is_usual=_expand_user("~") == known_home)  # fmt: skip
        text = _plain_config(text, host, known_home)
    else:
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, ValueError) as exc:
            raise _unreadable(path, exc, host) from exc
        given = (f"User {user}\n" if user else "") + (f"Port {port}\n" if port else "")
        text = f"Host *\n{given}{text}"
    try:
        config = paramiko.SSHConfig.from_text(text).lookup(host)
    # ImportError: `Match exec` needs a package that paramiko does not install
    except (ValueError, ImportError, KeyError, paramiko.SSHException) as exc:
        raise _unreadable(path, exc, host) from exc
    if "include" in config:
        raise RequestError(
            f"{path}: only OpenSSH's client can follow an Include, and it is not installed here",
            hint="apt-get install openssh-client (or the same for your system)",
        )
    return config


def _unreadable(path: Path, why: object, host: str) -> RequestError:
    return RequestError(f"cannot read {path}: {why}", hint=f"see whether `ssh -G {host}` reads it")


def _home_of_account() -> Path | None:
    """Where ssh looks for ``~``, whatever $HOME says; None for an account without an entry."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def _ask_ssh(
    ssh: str, path: Path, host: str, *, user: str | None, port: int | None, is_usual: bool
) -> str:
    # ssh goes by the account's home folder; with another $HOME its file is named
    file = [] if is_usual else ["-F", str(path) if path.exists() else "none"]
    given = [*(["-l", user] if user else []), *(["-p", str(port)] if port else [])]
    try:
        done = subprocess.run(
            [ssh, "-G", "-T", *file, *given, "--", host], capture_output=True, text=True,
            errors="replace", stdin=subprocess.DEVNULL, timeout=_HELPER_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise _unreadable(path, exc, host) from exc
    if done.returncode:
        said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise _unreadable(path, said or f"ssh ended with {done.returncode}", host)
    return done.stdout


# What is used of ssh's answer; all else is paramiko's or ours to choose.
_CONFIG_KEYS = (
    "hostname", "user", "port", "identityfile", "identitiesonly", "identityagent",
    "userknownhostsfile", "hostkeyalias", "proxyjump", "proxycommand",
)  # fmt: skip
# ssh(1) tries these where no key is named; paramiko looks for them itself.
_USUAL_KEYS = {f"~/.ssh/id_{kind}" for kind in ("rsa", "ecdsa", "ecdsa_sk", "ed25519", "ed25519_sk", "xmss", "dsa")}  # fmt: skip


def _plain_config(answer: str, host: str, home: Path) -> str:
    """What ``ssh -G`` printed, as a configuration for one host. Pure.

    Defaults that ssh fills in are left out, where their absence means the same to us.
    """
    lines = []
    for line in answer.splitlines():
        key, _, value = line.partition(" ")
        usual_hosts = f"{home}/.ssh/known_hosts {home}/.ssh/known_hosts2"
        is_default = (
            (key == "identityfile" and value in _USUAL_KEYS)
            or (key == "userknownhostsfile" and value == usual_hosts)
            or (key in ("proxyjump", "proxycommand") and value == "none")
        )
        if key in _CONFIG_KEYS and not is_default:
            # %n, the name as it was given, is one token that paramiko does not know
            lines.append(f"{key} {value.replace('%n', host)}")
    return "\n".join(["Host *", *lines]) + "\n"


def _connect(
    endpoint: _Endpoint, options: _Options, stack: contextlib.ExitStack, *, jumps: int
) -> paramiko.SSHClient:
    """A client that is logged in; what must be closed with it is put on ``stack``."""
    for path in endpoint.identity_files:
        _check_identity(path)
    client = paramiko.SSHClient()
    stack.callback(client.close)
    client.set_missing_host_key_policy(_RefuseUnknownHost(endpoint))
    for key in _known_keys(endpoint):
        client.get_host_keys().add(endpoint.key_name, key.get_name(), key)
    connection = _open_socket(endpoint, options, stack, jumps=jumps)
    with _handshake_errors(endpoint), _asking_for_password(client, endpoint):
        client.connect(
            endpoint.key_name,  # with our own socket and port 22 it is only the name of the key
            sock=connection,
            username=endpoint.user,
            password=os.environ.get(ENV_PASSWORD) or password.known(endpoint.login),
            key_filename=[str(path) for path in endpoint.identity_files],
            allow_agent=endpoint.use_agent and not endpoint.identities_only,
            look_for_keys=not endpoint.identities_only,
            timeout=options.connect_timeout_s,
            banner_timeout=options.connect_timeout_s,
            auth_timeout=options.connect_timeout_s,
            channel_timeout=options.connect_timeout_s,
            transport_factory=_fast_transport,
        )
    transport = client.get_transport()
    if transport is not None:
        transport.set_keepalive(_KEEPALIVE_S)
    return client


@contextlib.contextmanager
def _asking_for_password(client: paramiko.SSHClient, endpoint: _Endpoint) -> Iterator[None]:
    """Where no key is let in, a password may be: of somebody at a terminal who can be asked."""
    try:
        yield
    except paramiko.SSHException as exc:
        transport = client.get_transport()
        text = str(exc)
        if not isinstance(exc, paramiko.AuthenticationException) and "authentication methods" not in text:  # fmt: skip
            raise
        if os.environ.get(ENV_PASSWORD) or transport is None or not transport.is_active():
            raise
        try:
            transport.auth_none(endpoint.user)
        except paramiko.BadAuthenticationType as answer:
            if not {"password", "keyboard-interactive"} & set(answer.allowed_types):
                raise exc from None
        else:
            return  # it lets anybody in
        given = password.ask(endpoint.login)
        if given is None:
            raise
        transport.auth_password(endpoint.user, given)
        password.remember(endpoint.login, given)


def _fast_transport(
    connection: socket.socket, disabled_algorithms: dict[str, list[str]] | None = None
) -> paramiko.Transport:
    """A transport that asks for AES-GCM first, as OpenSSH's own client does.

    paramiko asks for AES-CTR first, whose separate MAC makes a push a third slower
    (ci/bench/push.py).
    """
    transport = paramiko.Transport(connection, disabled_algorithms=disabled_algorithms)
    security = transport.get_security_options()
    security.ciphers = sorted(security.ciphers, key=lambda name: "gcm" not in name)
    return transport


def _check_identity(path: Path) -> None:
    try:
        first_line = path.read_bytes().partition(b"\n")[0]
    except OSError as exc:
        raise AuthError(
            f"cannot read the key {path}: {exc.strerror}", hint="check the path of the key"
        ) from exc
    if b"PRIVATE KEY-----" not in first_line:  # PEM (RFC 7468) and OpenSSH's own format
        raise AuthError(
            f"{path} is not a private key", hint="name the key itself, not its .pub or .ppk"
        )


def _open_socket(
    endpoint: _Endpoint, options: _Options, stack: contextlib.ExitStack, *, jumps: int
) -> socket.socket | paramiko.Channel | paramiko.ProxyCommand:
    where = f"{endpoint.address} ({endpoint.host} port {endpoint.port})"
    if endpoint.proxy_command != "none":
        with _handshake_errors(endpoint):
            return paramiko.ProxyCommand(endpoint.proxy_command)
    if endpoint.proxy_jump != "none":
        if jumps == _MAX_JUMPS:
            raise ConnectError(
                f"{where}: more than {_MAX_JUMPS} jumps", hint="does ProxyJump go in a circle?"
            )
        # a,b: b is reached through a, which is what b's own ProxyJump would say
        before, _, last = endpoint.proxy_jump.rpartition(",")
        jump = _resolve(last if "://" in last else f"ssh://{last}", options)
        if before:
            jump = dataclasses.replace(jump, proxy_jump=before)
        client = _connect(jump, options, stack, jumps=jumps + 1)
        transport = client.get_transport()
        with _handshake_errors(endpoint):
            if transport is None:
                raise EOFError("the jump host closed the connection")
            return transport.open_channel(
                "direct-tcpip", (endpoint.host, endpoint.port), ("127.0.0.1", 0)
            )
    try:
        connection = socket.create_connection(
            (endpoint.host, endpoint.port), timeout=options.connect_timeout_s
        )
    except socket.gaierror as exc:
        raise ConnectError(
            f"{where}: there is no host of this name ({exc.strerror})",
            hint="check the name, or use the IP address",
            code="unknown-host",
        ) from exc
    except UnicodeError as exc:  # the name cannot be written in DNS (RFC 1035): a..b, 64 letters
        raise RequestError(
            f"{endpoint.address}: {endpoint.host!r} is no host name",
            hint=ADDRESS_HINT,
            code="bad-address",
        ) from exc
    except ConnectionRefusedError as exc:
        raise ConnectError(
            f"{where}: the host refuses connections",
            hint="is the SSH server running there, on this port?",
            code="refused",
        ) from exc
    except TimeoutError as exc:
        raise ConnectError(
            f"{where}: no answer within {options.connect_timeout_s:g} s",
            hint="is the board up and on this network?",
            code="unreachable",
        ) from exc
    except OSError as exc:
        raise ConnectError(
            f"{where}: {exc.strerror or exc}",
            hint="is the board up and on this network?",
            code="unreachable",
        ) from exc
    stack.callback(connection.close)
    # paramiko leaves Nagle's algorithm on, which makes every command wait for a delayed
    # acknowledgement (40 ms on Linux, RFC 896 and RFC 1122 4.2.3.2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux, tcp(7): keepalives that nobody acknowledges
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _DEAD_S))
    return connection


@contextlib.contextmanager
def _handshake_errors(endpoint: _Endpoint) -> Iterator[None]:
    """Everything paramiko raises between the TCP connection and the login, as ours."""
    where = f"{endpoint.address} ({endpoint.host} port {endpoint.port})"
    try:
        yield
    except paramiko.BadHostKeyException as exc:
        raise HostKeyError(
            f"the host key of {endpoint.key_name} has changed: known "
            f"{exc.expected_key.fingerprint}, now {exc.key.fingerprint}. Another machine may be "
            "posing as this board.",
            hint="if the board was reinstalled: "
            f"edgepipe devices trust --replace {_trust_arguments(endpoint)}",
            code="host-key-changed",
        ) from exc
    except paramiko.PasswordRequiredException as exc:
        raise AuthError(
            f"{where}: the key {', '.join(map(str, endpoint.identity_files))} is locked",
            hint="ssh-add it to your agent",
        ) from exc
    except paramiko.AuthenticationException as exc:
        raise AuthError(
            f"{where} refuses to let {endpoint.user} in: {_reason(exc)}",
            hint=f"ssh-copy-id -p {endpoint.port} {endpoint.user}@{endpoint.host}",
        ) from exc
    except paramiko.IncompatiblePeer as exc:
        raise ConnectError(
            f"{where} speaks only SSH algorithms that are no longer safe: {_reason(exc)}",
            hint="update the board's SSH server",
            code="no-ssh",
        ) from exc
    except (OSError, EOFError, ValueError, paramiko.SSHException) as exc:
        text = _reason(exc)
        if "authentication methods" in text or "private key" in text:
            raise AuthError(
                f"{where}: no key that could be offered as {endpoint.user} ({text})",
                hint="name a key: EDGEPIPE_SSH_IDENTITY=~/.ssh/id_ed25519",
            ) from exc
        raise ConnectError(
            f"{where} accepts connections but does not speak SSH as it should: {text}",
            hint="is it an SSH server, and is the board not overloaded?",
            code="no-ssh",
        ) from exc


def _reason(exc: BaseException) -> str:
    return str(exc).strip() or type(exc).__name__


def _trust_arguments(endpoint: _Endpoint) -> str:
    first = endpoint.known_hosts[0]
    usual = first == _expand_user("~/.ssh/known_hosts")
    return endpoint.address + ("" if usual else f" --known-hosts {shlex.quote(str(first))}")


class _RefuseUnknownHost(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]  # untyped library
    def __init__(self, endpoint: _Endpoint) -> None:
        self._endpoint = endpoint

    def missing_host_key(
        self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
    ) -> None:
        raise HostKeyError(
            f"the host key of {hostname} is not known: {key.get_name()} {key.fingerprint}",
            hint="compare it with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the board, "
            f"then: edgepipe devices trust {_trust_arguments(self._endpoint)}",
            code="host-key-unknown",
        )


def _known_keys(endpoint: _Endpoint) -> list[paramiko.PKey]:
    """The keys on file for a host: those of the first known_hosts file that has any."""
    revoked: set[str] = set()
    found: list[paramiko.PKey] = []
    for path in endpoint.known_hosts:
        try:
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        except OSError as exc:
            raise HostKeyError(
                f"cannot read {path}: {exc.strerror}", hint="check its permissions"
            ) from exc
        revoked |= {words[3] for line in lines if (words := line.split())[:1] == ["@revoked"] and len(words) > 3}  # fmt: skip
        if not found:
            found = [key for line in lines for key in _keys_of_line(line, endpoint.key_name)]
    return [key for key in found if key.get_base64() not in revoked]


def _keys_of_line(line: str, name: str) -> list[paramiko.PKey]:
    """The keys that one known_hosts line gives for ``name`` (plain, hashed or in a list)."""
    line = line.strip()
    if not line or line.startswith(("#", "@")):
        return []
    hosts = paramiko.HostKeys()
    with contextlib.suppress(paramiko.SSHException):
        entry = paramiko.hostkeys.HostKeyEntry.from_line(line)
        if entry is not None and entry.key is not None:
            for host in entry.hostnames:
                hosts.add(host, entry.key.get_name(), entry.key)
    return list((hosts.lookup(name) or {}).values())


def _known_key_types(endpoint: _Endpoint) -> set[str]:
    """Names of the host key algorithms to ask for first: those of the keys on file."""
    types = {key.get_name() for key in _known_keys(endpoint)}
    return types | ({"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in types else set())


def _without_host(line: str, name: str) -> str:
    """A known_hosts line without ``name``; empty where nothing is left of it."""
    if not _keys_of_line(line, name):
        return line
    hosts, _, rest = line.strip().partition(" ")
    others = [host for host in hosts.split(",") if not host.startswith("|") and host != name]
    return f"{','.join(others)} {rest}" if others else ""


def _finished(channel: paramiko.Channel) -> bool:
    """Both streams have ended and the exit status is there, or the channel is closed."""
    # in this order: nothing arrives after the end, but the end may arrive between two looks
    ended = channel.closed or (channel.eof_received and channel.exit_status_ready())
    return ended and not channel.recv_ready() and not channel.recv_stderr_ready()


def _read_available(channel: paramiko.Channel, stdout: bytearray, stderr: bytearray) -> bool:
    before = len(stdout) + len(stderr)
    if channel.recv_ready():
        stdout += channel.recv(_CHUNK_BYTES)
    if channel.recv_stderr_ready():
        stderr += channel.recv_stderr(_CHUNK_BYTES)
    return len(stdout) + len(stderr) > before


def _wait(channel: paramiko.Channel, left_s: float) -> None:
    """Until there is something to read, at most ``left_s``."""
    if channel.eof_received:  # the descriptor stays readable; only the exit status is missing
        channel.status_event.wait(min(left_s, 0.05))
    else:
        select.select([channel], [], [], min(left_s, 1.0))


def _stop(channel: paramiko.Channel) -> bool:
    """Stop the command on the board and wait until it is gone, at most ``_STOP_GRACE_S``.

    False where the board did not answer in that time.
    """
    deadline_s = time.monotonic() + _STOP_GRACE_S
    with contextlib.suppress(*_LINK_ERRORS):
        if channel.closed or channel.exit_status_ready():
            return True  # gone already; what it left in the background is not ours to find
        channel.settimeout(1.0)
        channel.sendall(b"stop\n")
        rest = bytearray()
        while not _finished(channel) and (left_s := deadline_s - time.monotonic()) > 0:
            if not _read_available(channel, rest, rest):
                _wait(channel, left_s)
            rest.clear()
        return _finished(channel)
    return False


__all__ = ["HostKey", "SshDevice", "command_line", "open_ssh", "scan_host_key", "trust_host_key"]
