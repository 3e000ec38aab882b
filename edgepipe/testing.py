"""Parts that help to test and to show what is built on edgepipe. Public: use them in your own tests.

`LoopbackSshd` is a real OpenSSH server on this machine, for as long as a ``with`` block lasts.
`NullDevice` is a board that is not there: noise, drift and faults as its `Scenario` says, in virtual
time, for gates and CI without hardware. No release gate passes on what it measures.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepipe.device.null import NullDevice
from edgepipe.device.scenario import Scenario, parse_scenario
from edgepipe.errors import NotReadyError

__all__ = ["LoopbackSshd", "NullDevice", "Scenario", "find_sshd", "parse_scenario"]

_START_TIMEOUT_S = 10.0
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where systems keep sshd, often not on PATH
_PORT_ATTEMPTS = 5


def find_sshd() -> Path | None:
    """OpenSSH's server program, where this machine has one."""
    found = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))
    return Path(found) if found else None


class LoopbackSshd:
    """A real ``sshd`` on a free port of 127.0.0.1, run as the current user, that admits one new key.

    ::

        with LoopbackSshd() as server:
            device = open_device(server.address, **server.options())
            device.run(["uname", "-m"], timeout_s=10)

    Keys, configuration and the log lie in a temporary folder that goes with the server; nothing in
    ``~/.ssh`` is read or changed. What logs in finds ``$HOME`` set to ``home`` (a temporary folder
    unless given) and the variables of ``device_environment``; only this user's key opens it. A
    ``force_command`` is run in place of every command (sshd_config(5), ForceCommand).

    With ``boards`` it stands for so many (OpenSSH: at most 16): each has a port and a home of its own, in ``addresses``
    and ``homes``; ``address``, ``port`` and ``home`` are those of the first.

    ``address`` is ``ssh://user@127.0.0.1:port``, ``known_hosts`` and ``identity_file`` are what a
    client needs, ``log_path`` is the server's log. Raises NotReadyError where there is no sshd, or
    where it does not start (with the end of its log).
    """

    def __init__(
        self,
        *,
        home: Path | None = None,
        device_environment: Mapping[str, str] | None = None,
        force_command: Path | None = None,
        boards: int = 1,
    ) -> None:
        self._given_home = home
        self._boards = boards
        self._force_command = force_command
        self._device_environment = dict(device_environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> LoopbackSshd:
        sshd = find_sshd()
        if sshd is None:
            raise NotReadyError(
                "no OpenSSH server on this machine (looked for sshd on PATH and in the sbin folders)",
                hint="install it, for example `apt-get install openssh-server`; it need not be enabled",
                code="no-sshd",
            )
        self._folder = tempfile.TemporaryDirectory(prefix="edgepipe-sshd-")
        try:
            self._start(sshd, Path(self._folder.name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def options(self) -> dict[str, Path]:
        """The keyword arguments of `open_device` for this server."""
        return {"identity_file": self.identity_file, "known_hosts": self.known_hosts}

    def environment(self) -> dict[str, str]:
        """The same as environment variables, for a child process that runs edgepipe."""
        return {
            "EDGEPIPE_SSH_IDENTITY": str(self.identity_file),
            "EDGEPIPE_KNOWN_HOSTS": str(self.known_hosts),
        }

    def _start(self, sshd: Path, folder: Path) -> None:
        self.home = self._given_home or folder / "home"
        self.homes = [self.home, *(folder / f"home-{n}" for n in range(2, self._boards + 1))]
        for home in self.homes:
            home.mkdir(parents=True, exist_ok=True)
        self.identity_file = folder / "client_key"
        self.known_hosts = folder / "known_hosts"
        self.log_path = folder / "sshd.log"
        for name in ("client_key", "host_key"):
            _make_key(folder / name)
        shutil.copyfile(folder / "client_key.pub", folder / "authorized_keys")
        if os.geteuid() == 0:
            # root's sshd insists on this folder (its privilege separation), which an sshd that was
            # never started as a service does not have
            with contextlib.suppress(OSError):
                Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for attempt in range(_PORT_ATTEMPTS):
            ports = _free_ports(self._boards)
            self.port = ports[0]
            (folder / "sshd_config").write_text(self._config(folder, ports))
            self._process = subprocess.Popen(
                [sshd, "-D", "-f", folder / "sshd_config", "-E", self.log_path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if _speaks_ssh(self.port, self._process):
                break
            self._process.kill()
            self._process.wait()
            # another process may have taken the port between our look and sshd's bind
            if attempt == _PORT_ATTEMPTS - 1 or "Address already in use" not in self._log():
                raise NotReadyError(
                    f"sshd did not start: {self._log()[-500:].strip() or 'its log is empty'}",
                    hint=f"try it by hand: {sshd} -D -e -f <configuration>",
                    code="no-sshd",
                )
        user = pwd.getpwuid(os.geteuid()).pw_name
        self.addresses = [f"ssh://{user}@127.0.0.1:{port}" for port in ports]
        self.address = self.addresses[0]
        host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        self.known_hosts.write_text("".join(f"[127.0.0.1]:{port} {host_key}\n" for port in ports))

    def _config(self, folder: Path, ports: Sequence[int]) -> str:
        listen = "\n".join(f"Port {port}" for port in ports)
        boards = ""
        for port, home in zip(ports, self.homes, strict=True):
            variables = {"HOME": str(home), **self._device_environment}
            quoted = " ".join(f'"{name}={value}"' for name, value in variables.items())
            boards += f"Match LocalPort {port}\n    SetEnv {quoted}\n"
        return f"""\
ListenAddress 127.0.0.1
{listen}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
PrintMotd no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
{f"ForceCommand {self._force_command}" if self._force_command else ""}
{boards}"""

    def _log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


def _make_key(path: Path) -> None:
    try:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "edgepipe-test", "-f", path],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError) as exc:
        raise NotReadyError(
            f"cannot make a key with ssh-keygen: {exc}",
            hint="install the OpenSSH client, for example `apt-get install openssh-client`",
            code="no-sshd",
        ) from exc


def _free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _speaks_ssh(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server greets, or has ended, or ``_START_TIMEOUT_S`` are over."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=1) as connection,
        ):
            # another program on this port would not greet like this
            if connection.recv(4) == b"SSH-":
                return True
        time.sleep(0.02)
    return False
