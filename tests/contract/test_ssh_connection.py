"""Connecting over SSH: who is let in, whose key is believed, and what a broken server looks like."""

from __future__ import annotations

import contextlib
import getpass
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edgepipe import password
from edgepipe.cli import main
from edgepipe.device import open_device
from edgepipe.device.ssh import ENV_IDENTITY, ENV_KNOWN_HOSTS, ENV_PASSWORD, SshDevice, open_ssh
from edgepipe.errors import AuthError, ConnectError, EdgepipeError, HostKeyError, RequestError
from edgepipe.testing import LoopbackSshd, find_sshd

from .conftest import skip_here
from .test_devices import is_gone, wait_until


@pytest.fixture(autouse=True)
def no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ~/.ssh, no agent, no variables: only what a test sets."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SSH_AUTH_SOCK", ENV_IDENTITY, ENV_KNOWN_HOSTS, ENV_PASSWORD):
        monkeypatch.delenv(name, raising=False)


def host_name(server: LoopbackSshd) -> str:
    return f"[127.0.0.1]:{server.port}"


def fingerprint(public_key: Path) -> str:
    """As OpenSSH itself prints it."""
    done = subprocess.run(
        ["ssh-keygen", "-lf", str(public_key)], check=True, capture_output=True, text=True
    )
    return done.stdout.split()[1]


def says_hello(device: object) -> bool:
    assert isinstance(device, SshDevice)
    with device:
        return device.run(["echo", "hello"], timeout_s=10).stdout == b"hello\n"


# ------------------------------------------------------------------------------------- host keys


def test_unknown_host_key_is_refused_with_its_fingerprint_and_the_way_to_accept_it(
    sshd: LoopbackSshd, tmp_path: Path
) -> None:
    empty = tmp_path / "none"
    with pytest.raises(HostKeyError) as caught:
        open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=empty)
    assert caught.value.code == "host-key-unknown"
    assert fingerprint(sshd.identity_file.with_name("host_key.pub")) in caught.value.message
    assert f"edgepipe devices trust {sshd.address} --known-hosts {empty}" in caught.value.hint


def test_changed_host_key_is_refused_with_both_fingerprints(
    sshd: LoopbackSshd, tmp_path: Path, new_key: Callable[[str], Path]
) -> None:
    other = new_key("other").with_suffix(".pub")
    known = tmp_path / "known"
    known.write_text(f"{host_name(sshd)} {other.read_text()}")
    with pytest.raises(HostKeyError) as caught:
        open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=known)
    assert caught.value.code == "host-key-changed"
    assert fingerprint(other) in caught.value.message
    assert fingerprint(sshd.identity_file.with_name("host_key.pub")) in caught.value.message
    assert f"edgepipe devices trust --replace {sshd.address}" in caught.value.hint


def test_revoked_host_key_is_refused(sshd: LoopbackSshd, tmp_path: Path) -> None:
    known = tmp_path / "known"
    line = sshd.known_hosts.read_text()
    known.write_text(f"{line}@revoked * {line.partition(' ')[2]}")
    with pytest.raises(HostKeyError):
        open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=known)


def test_host_key_in_a_hashed_known_hosts_file_is_found(sshd: LoopbackSshd, tmp_path: Path) -> None:
    known = tmp_path / "known"
    shutil.copyfile(sshd.known_hosts, known)
    subprocess.run(["ssh-keygen", "-H", "-f", str(known)], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    device = open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=known)
    assert says_hello(device)


def test_lines_of_known_hosts_that_mean_nothing_are_passed_over(
    sshd: LoopbackSshd, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    junk = (
        "# a comment\n\nnonsense\nhost ssh-ed25519 !!!\nhost ssh-dss AAAA\n@cert-authority * x y\n"
    )
    known.write_text(junk + sshd.known_hosts.read_text())
    device = open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=known)
    assert says_hello(device)


def test_trust_writes_a_key_with_which_connecting_works(
    sshd: LoopbackSshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "new" / "known"
    command = ["devices", "trust", sshd.address, "--known-hosts", str(known)]
    assert main([*command, "--yes"]) == 0
    assert fingerprint(sshd.identity_file.with_name("host_key.pub")) in capsys.readouterr().out
    assert known.stat().st_mode & 0o777 == 0o600
    device = open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=known)
    assert says_hello(device)
    before = known.read_text()
    assert main(command) == 0  # known already: nothing to ask, nothing to add
    assert known.read_text() == before


def test_trust_does_not_accept_what_nobody_confirms(
    sshd: LoopbackSshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "known"
    assert main(["devices", "trust", sshd.address, "--known-hosts", str(known)]) == 2
    assert "--yes" in capsys.readouterr().err
    assert not known.exists()


def test_trust_leaves_the_rest_of_the_file_and_a_link_to_it_alone(
    sshd: LoopbackSshd, tmp_path: Path
) -> None:
    known, link = tmp_path / "real", tmp_path / "link"
    others = b"# caf\xe9\n\n# not UTF-8\n"
    known.write_bytes(others)
    link.symlink_to(known)
    command = ["devices", "trust", sshd.address, "--yes", "--replace", "--known-hosts", str(link)]
    assert main(command) == 0
    assert link.is_symlink()
    assert known.read_bytes().startswith(others + host_name(sshd).encode())


def test_trust_takes_a_changed_key_only_with_replace_and_keeps_other_hosts(
    sshd: LoopbackSshd,
    tmp_path: Path,
    new_key: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    known, old = tmp_path / "known", new_key("old").with_suffix(".pub").read_text().split()
    kept = f"# mine\nelsewhere {old[0]} {old[1]}\n"
    known.write_text(f"{kept}{host_name(sshd)},alias {old[0]} {old[1]}\n")
    command = ["devices", "trust", sshd.address, "--yes", "--known-hosts", str(known)]
    before = known.read_text()
    assert main(command) == 3
    assert "has changed" in capsys.readouterr().err
    assert known.read_text() == before
    assert main([*command, "--replace"]) == 0
    assert known.read_text().startswith(f"{kept}alias {old[0]} {old[1]}\n{host_name(sshd)} ")
    device = open_device(sshd.address, identity_file=sshd.identity_file, known_hosts=known)
    assert says_hello(device)


# ------------------------------------------------------------------------------------ who are you


def test_a_key_the_board_does_not_know_is_an_auth_error(
    sshd: LoopbackSshd, new_key: Callable[[str], Path]
) -> None:
    with pytest.raises(AuthError, match="refuses to let") as caught:
        open_device(sshd.address, identity_file=new_key("stranger"), known_hosts=sshd.known_hosts)
    assert "ssh-copy-id" in caught.value.hint


def test_a_refused_password_is_in_no_message(
    sshd: LoopbackSshd, new_key: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_PASSWORD, "sesame-4711")
    with pytest.raises(AuthError) as caught:
        open_device(sshd.address, identity_file=new_key("stranger"), known_hosts=sshd.known_hosts)
    error: BaseException | None = caught.value
    while error is not None:
        assert "sesame" not in repr(error)
        error = error.__cause__
    assert "sesame" not in caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"no key at all\n", b"\xff\x00\n"])
def test_a_file_that_holds_no_key_is_an_auth_error_that_names_it(
    sshd: LoopbackSshd, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "not_a_key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AuthError, match="not_a_key"):
        open_device(sshd.address, identity_file=path, known_hosts=sshd.known_hosts)


def test_a_locked_key_is_an_auth_error(sshd: LoopbackSshd, new_key: Callable[[str], Path]) -> None:
    key = new_key("locked")
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(key)], check=True)
    with pytest.raises(AuthError, match="locked"):
        open_device(sshd.address, identity_file=key, known_hosts=sshd.known_hosts)


def test_no_key_at_all_is_an_auth_error(sshd: LoopbackSshd) -> None:
    with pytest.raises(AuthError):
        open_device(sshd.address, known_hosts=sshd.known_hosts)


# ---------------------------------------------------------------------------- where, and how there


def test_key_and_known_hosts_come_from_the_environment(
    sshd: LoopbackSshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sshd.environment().items():
        monkeypatch.setenv(name, value)
    assert says_hello(open_device(sshd.address))


def write_ssh_config(home: Path, text: str) -> None:
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_text(text)


def alias_of(server: LoopbackSshd) -> str:
    return f"""
Host Board
  HostName 127.0.0.1
  Port {server.port}
  User {server.address.partition("://")[2].partition("@")[0]}
  IdentityFile {server.identity_file}
  IdentitiesOnly yes
  UserKnownHostsFile {server.known_hosts}
"""


def test_what_needs_no_configuration_reads_none(sshd: LoopbackSshd, tmp_path: Path) -> None:
    write_ssh_config(
        tmp_path, "Host *\n  HostName 192.0.2.1\n  User nobody\n  ProxyCommand false\n"
    )
    with pytest.raises(ConnectError):
        open_ssh(sshd.address, **sshd.options(), connect_timeout_s=5)
    open_ssh(sshd.address, **sshd.options(), configured=False).close()


def test_a_name_in_the_ssh_configuration_is_enough(sshd: LoopbackSshd, tmp_path: Path) -> None:
    write_ssh_config(tmp_path, alias_of(sshd))
    assert says_hello(open_device("ssh://Board"))


def test_proxy_jump_goes_through_another_host(sshd: LoopbackSshd, tmp_path: Path) -> None:
    write_ssh_config(tmp_path, alias_of(sshd) + alias_of(sshd).replace("Board", "Behind") + "  ProxyJump Board\n")  # fmt: skip
    assert says_hello(open_device("ssh://Behind"))


def test_proxy_jump_goes_through_a_machine_with_keys_of_its_own(
    sshd: LoopbackSshd, tmp_path: Path
) -> None:
    with LoopbackSshd() as gate:
        behind = alias_of(sshd).replace("Board", "Behind") + "  ProxyJump Board\n"
        write_ssh_config(tmp_path, alias_of(gate) + behind)
        assert says_hello(open_device("ssh://Behind"))
        assert "Accepted publickey" in gate.log_path.read_text()
    with pytest.raises(ConnectError) as caught:  # the gate is gone: it is the one that is named
        open_device("ssh://Behind")
    assert str(gate.port) in caught.value.message


def test_what_the_configuration_includes_counts(sshd: LoopbackSshd, tmp_path: Path) -> None:
    more = tmp_path / "boards"
    more.mkdir()
    (more / "one.conf").write_text(alias_of(sshd))
    write_ssh_config(tmp_path, f"Include {more}/*.conf\nHost *\n  Port 1\n")
    assert says_hello(open_device("ssh://Board"))


def test_an_include_that_nobody_can_follow_is_an_error(
    sshd: LoopbackSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no ssh there
    write_ssh_config(tmp_path, alias_of(sshd))
    assert says_hello(open_device("ssh://Board"))
    (tmp_path / ".ssh" / "config").write_text("Include boards.conf\n" + alias_of(sshd))
    with pytest.raises(RequestError, match="Include") as caught:
        open_device("ssh://Board")
    assert "openssh-client" in caught.value.hint


def test_a_host_key_alias_is_what_known_hosts_are_asked_for(
    sshd: LoopbackSshd, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    known.write_text(sshd.known_hosts.read_text().replace(host_name(sshd), "my-board"))
    text = alias_of(sshd).replace(str(sshd.known_hosts), str(known))
    write_ssh_config(tmp_path, text)
    with pytest.raises(HostKeyError):
        open_device("ssh://Board")
    (tmp_path / ".ssh" / "config").write_text(text + "  HostKeyAlias my-board\n")
    assert says_hello(open_device("ssh://Board"))


@pytest.fixture
def agent(sshd: LoopbackSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real ssh-agent that holds the server's client key."""
    folder = tempfile.mkdtemp(prefix="edgepipe-agent-")  # a socket's path may have 108 bytes
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", f"{folder}/agent"], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: Path(folder, "agent").exists(), "the agent listens")
        monkeypatch.setenv("SSH_AUTH_SOCK", f"{folder}/agent")
        subprocess.run(["ssh-add", "-q", sshd.identity_file], check=True)
        yield
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.mark.usefixtures("agent")
def test_a_key_that_only_the_agent_has_opens_the_board(sshd: LoopbackSshd, tmp_path: Path) -> None:
    assert says_hello(open_device(sshd.address, known_hosts=sshd.known_hosts))
    lines = alias_of(sshd).splitlines(keepends=True)
    text = "".join(line for line in lines if "Identit" not in line) + "  IdentityAgent none\n"
    write_ssh_config(tmp_path, text)
    with pytest.raises(AuthError):
        open_device("ssh://Board")


# -------------------------------------------------------------------------------------- passwords

PASSWORD = "sesame-4711 ä"


@pytest.fixture
def password_sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackSshd]:
    """A server that knows this user by a password alone: of a shadow file that only it sees."""
    shadow, program = tmp_path / "shadow", tmp_path / "sshd"
    user = getpass.getuser()
    made = subprocess.run(["openssl", "passwd", "-6", "-stdin"], input=PASSWORD, capture_output=True, text=True, check=True)  # fmt: skip
    shadow.write_text(f"{user}:{made.stdout.strip()}:20000:0:99999:7:::\n")
    bind = f'mount --bind {shadow} /etc/shadow && exec {find_sshd()} "$@"'
    program.write_text(f"#!/bin/sh\nexec unshare -m sh -c '{bind}' sh \"$@\"\n")
    program.chmod(0o755)
    probe = subprocess.run(["unshare", "-m", "mount", "--bind", shadow, "/etc/shadow"], capture_output=True)  # fmt: skip
    if os.geteuid() != 0 or probe.returncode:
        skip_here("a password of a test's own needs root and a mount namespace")
    monkeypatch.setattr("edgepipe.testing.find_sshd", lambda: program)

    class PasswordSshd(LoopbackSshd):
        def _config(self, folder: Path, ports: Sequence[int]) -> str:
            text = super()._config(folder, ports).replace("AuthenticationMethods publickey\n", "")
            text = text.replace("prohibit-password", "yes")
            return text.replace("PasswordAuthentication no", "PasswordAuthentication yes")

    with PasswordSshd() as server:
        server.identity_file.with_name("authorized_keys").write_text("")
        yield server


def test_a_password_from_the_environment_opens_the_board(
    password_sshd: LoopbackSshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_PASSWORD, PASSWORD)
    assert says_hello(open_device(password_sshd.address, known_hosts=password_sshd.known_hosts))
    monkeypatch.setenv(ENV_PASSWORD, PASSWORD + "x")
    with pytest.raises(AuthError, match="refuses to let"):
        open_device(password_sshd.address, known_hosts=password_sshd.known_hosts)


def test_a_password_is_asked_for_once_and_never_shown(
    password_sshd: LoopbackSshd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(password, "_known", {})
    password.set_prompt(lambda text: asked.append(text) or PASSWORD)
    try:
        caplog.set_level("DEBUG")
        device = open_device(password_sshd.address, known_hosts=password_sshd.known_hosts)
        assert isinstance(device, SshDevice)
        assert "sesame" not in repr(device) + repr(vars(device))
        device._client.close()  # the link breaks
        assert device.run(["echo", "again"], timeout_s=10).stdout == b"again\n"
        device.close()
    finally:
        password.set_prompt(None)
    assert len(asked) == 1
    assert f"127.0.0.1:{password_sshd.port}'s password" in asked[0]
    assert "sesame" not in caplog.text


def test_a_wrong_password_at_the_terminal_is_an_auth_error_without_it(
    password_sshd: LoopbackSshd,
) -> None:
    """The real command line under a terminal of its own: what is typed appears nowhere."""
    environment = {**os.environ, **password_sshd.environment()}
    environment.pop("EDGEPIPE_SSH_IDENTITY")
    pid, terminal = pty.fork()
    if pid == 0:  # the child has the terminal as its stdin, stdout and stderr
        os.execve(sys.executable, [sys.executable, "-m", "edgepipe", "probe", password_sshd.address], environment)  # fmt: skip
    said = b""
    with contextlib.suppress(OSError):  # EIO: the child has closed its side
        while chunk := os.read(terminal, 4096):
            said += chunk
            if said.endswith(b"password: "):
                os.write(terminal, b"open-barley\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    os.close(terminal)
    assert said.count(b"password: ") == 1
    assert b"refuses to let" in said
    assert b"barley" not in said


def test_proxy_jump_in_a_circle_is_an_error(sshd: LoopbackSshd, tmp_path: Path) -> None:
    write_ssh_config(tmp_path, alias_of(sshd) + "  ProxyJump Board\n")
    with pytest.raises(ConnectError, match="more than 5 jumps"):
        open_device("ssh://Board")


def test_proxy_command_carries_the_connection(sshd: LoopbackSshd, tmp_path: Path) -> None:
    program = tmp_path / "carry.py"
    program.write_text(
        "import os, socket, sys, threading\n"
        "link = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def out():\n"
        "    while data := link.recv(65536):\n"
        "        os.write(1, data)\n"
        "threading.Thread(target=out, daemon=True).start()\n"
        "while data := os.read(0, 65536):\n"
        "    link.sendall(data)\n"
    )
    host = alias_of(sshd) + f"  ProxyCommand {sys.executable} {program} %h %p\n"
    moved = host.replace("Board", "Moved").replace(f"Port {sshd.port}", "Port 1")
    write_ssh_config(tmp_path, host + moved)
    assert says_hello(open_device("ssh://Board"))
    assert says_hello(open_device(f"ssh://Moved:{sshd.port}"))  # %p is the port of the address


def test_a_port_out_of_range_is_no_other_port(tmp_path: Path) -> None:
    write_ssh_config(tmp_path, "Host Board\n  HostName 127.0.0.1\n  Port 99999\n")
    with pytest.raises(RequestError, match="'99999'"):
        open_device("ssh://Board")


def test_an_account_without_a_name_is_told_to_take_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    with pytest.raises(RequestError) as caught:
        open_device("ssh://pi@127.0.0.1:1")
    assert "LOGNAME" in caught.value.hint


def test_a_folder_of_a_user_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_IDENTITY, "~no-such-user/key")
    with pytest.raises(AuthError, match="~no-such-user/key"):
        open_device("ssh://127.0.0.1:1")


def test_an_unreadable_ssh_configuration_is_named(tmp_path: Path) -> None:
    write_ssh_config(tmp_path, "Host\n")
    with pytest.raises(RequestError, match="config"):
        open_device("ssh://Board")


@pytest.mark.parametrize(
    "address",
    ["ssh://", "ssh://h:0", "ssh://h:99999", "ssh://h:x", "ssh://h/folder", "ssh://-oProxyCommand=x", "ssh://u@", "ssh://[::1", "ssh://a..b", "local://", "ssh:h", "shh://h", "", "http://h"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(RequestError) as caught:
        open_device(address)
    assert "ssh://[user@]host[:port]" in caught.value.hint


def test_near_misses_of_a_scheme_are_suggested() -> None:
    with pytest.raises(RequestError, match="did you mean 'ssh'"):
        open_device("shh://board")
    with pytest.raises(RequestError, match="did you mean 'local'"):
        open_device("locl")


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(RequestError) as caught:
        open_device("ssh://pi:sesame@board")
    assert "sesame" not in caught.value.message + caught.value.hint
    assert ENV_PASSWORD in caught.value.hint


# --------------------------------------------------------------------------------- broken servers


@contextlib.contextmanager
def server_that(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server which treats each connection with ``answer``; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"ssh://127.0.0.1:{listener.getsockname()[1]}"
        for connection in kept:
            connection.close()


def test_a_port_where_nobody_listens_is_a_connect_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectError, match="refuses connections") as caught:
        open_device(f"ssh://127.0.0.1:{port}")
    assert caught.value.code == "refused"


def test_a_host_that_does_not_answer_is_a_connect_error() -> None:
    # 192.0.2.0/24 belongs to nobody (RFC 5737): no route, or packets that vanish
    with pytest.raises(ConnectError):
        open_device("ssh://192.0.2.1", connect_timeout_s=0.3)


def test_a_name_that_does_not_exist_is_a_connect_error() -> None:
    # .invalid never exists (RFC 2606)
    with pytest.raises(ConnectError, match="no host of this name") as caught:
        open_device("ssh://board.invalid")
    assert caught.value.code == "unknown-host"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda connection: None, id="says-nothing"),
        pytest.param(lambda connection: connection.close(), id="hangs-up"),
        pytest.param(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad\r\n\r\n" * 200), id="speaks-http"),
        pytest.param(lambda connection: connection.sendall(b"SSH-2.0-mute\r\n"), id="greets-only"),
        pytest.param(lambda connection: connection.sendall(b"SSH-2.0-x\r\n" + b"\xff" * 999), id="garbage"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_speak_ssh_is_a_connect_error(
    answer: Callable[[socket.socket], None],
) -> None:
    with server_that(answer) as address, pytest.raises(ConnectError) as caught:
        open_device(address, connect_timeout_s=0.5)
    assert caught.value.code == "no-ssh"


class OddSshd(LoopbackSshd):
    """With one line of its configuration replaced."""

    line = ("", "")

    def _config(self, folder: Path, ports: Sequence[int]) -> str:
        return super()._config(folder, ports).replace(*self.line)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(("Subsystem sftp internal-sftp", ""), "no-sftp", id="no-sftp-server"),
        pytest.param(("PrintMotd no", "ForceCommand echo hello"), "no-sftp", id="prints-a-banner"),
        pytest.param(("MaxSessions 100", "MaxSessions 1"), "connection-lost", id="one-session"),
    ],
)
def test_a_board_without_a_usable_sftp_server_is_a_connect_error(
    tmp_path: Path, line: tuple[str, str], code: str
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    server = OddSshd()
    server.line = line
    with (
        server,
        contextlib.closing(open_device(server.address, **server.options())) as device,
        pytest.raises(ConnectError) as caught,
    ):
        device.push(tmp_path / "file", str(tmp_path / "there"))
    assert caught.value.code == code
    assert not (tmp_path / "there").exists()


def test_a_link_that_breaks_under_a_command_is_a_connect_error_and_the_command_ends(
    sshd: LoopbackSshd, tmp_path: Path
) -> None:
    device = open_device(sshd.address, **sshd.options())
    assert isinstance(device, SshDevice)
    pid_file = tmp_path / "pid"

    def cut() -> None:
        wait_until(lambda: pid_file.exists() and pid_file.read_text(), "the command runs")
        transport = device._client.get_transport()
        assert transport is not None
        transport.sock.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(ConnectError, match="lost the connection") as caught:
        device.run(["sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(pid_file)], timeout_s=60)
    thread.join()
    assert caught.value.code == "connection-lost"
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the command is gone")
    assert device.run(["echo", "again"], timeout_s=10).stdout == b"again\n"  # a new connection
    device.close()
    with pytest.raises(ConnectError, match="is closed"):
        device.run(["true"], timeout_s=10)


def test_a_name_that_is_gone_for_a_while_is_a_broken_link(
    sshd: LoopbackSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """raspberrypi.local is announced by the board itself, so it is gone while the board restarts."""
    known = tmp_path / "known"
    known.write_text(sshd.known_hosts.read_text().replace("127.0.0.1", "localhost"))
    address = sshd.address.replace("127.0.0.1", "localhost")
    device = open_device(address, identity_file=sshd.identity_file, known_hosts=known)
    assert isinstance(device, SshDevice)
    with device:
        device._client.close()
        real = socket.getaddrinfo

        def nobody(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", nobody)
        with pytest.raises(ConnectError) as caught:
            device.run(["true"], timeout_s=5)
        assert caught.value.code == "connection-lost"
        monkeypatch.setattr(socket, "getaddrinfo", real)
        assert device.run(["true"], timeout_s=5).returncode == 0


def test_every_error_here_may_be_tried_again() -> None:
    """CI retries exit code 3: all of these are the world's fault, not the request's."""
    for error in (ConnectError, HostKeyError, AuthError):
        assert issubclass(error, EdgepipeError)
        assert error("x").exit_code == 3
