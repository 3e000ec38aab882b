"""What is particular to adb: finding the phone, and losing it."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepipe.device import open_device
from edgepipe.errors import (
    AuthError,
    ConnectError,
    EdgepipeError,
    MissingExtra,
    RequestError,
    TransferError,
)
from tests.miniadbd import MiniAdbd

pytestmark = pytest.mark.slow


def attached() -> str:
    return subprocess.run(["adb", "devices"], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def none_attached(adb_server: None) -> Iterator[None]:
    subprocess.run(["adb", "disconnect"], capture_output=True, check=True)
    yield
    subprocess.run(["adb", "disconnect"], capture_output=True, check=True)


def opening(address: str) -> EdgepipeError:
    with pytest.raises(EdgepipeError) as caught:
        open_device(address)
    return caught.value


def test_without_the_client_its_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = opening("adb://R58M123ABCD")
    assert isinstance(error, MissingExtra)
    assert "apt-get install adb" in error.hint


@pytest.mark.parametrize("address", ["adb://user@host:5555", "adb://a b", "adb://-s", "adb://x/y"])
def test_what_is_no_serial_is_refused(address: str) -> None:
    assert isinstance(opening(address), RequestError)


def test_a_phone_that_is_not_there_is_said_with_those_that_are(none_attached: None) -> None:
    error = opening("adb://R58M123ABCD")
    assert isinstance(error, ConnectError)
    assert "no device R58M123ABCD is attached" in error.message
    assert "USB debugging" in error.hint
    assert "no device is attached" in opening("adb://").message


def test_a_port_where_nobody_listens_is_a_connect_error(none_attached: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = opening(f"adb://127.0.0.1:{port}")
    assert isinstance(error, ConnectError)
    assert "adb cannot connect" in error.message


def test_a_phone_that_does_not_trust_this_computer_says_what_to_tap(none_attached: None) -> None:
    with MiniAdbd(shell=["sh", "-c"], is_authorized=False) as daemon:
        error = opening(f"adb://{daemon.serial}")
    assert isinstance(error, AuthError)
    assert error.code == "unauthorized"
    assert "Allow USB debugging" in error.hint


def test_a_phone_older_than_exit_codes_is_refused(none_attached: None) -> None:
    with MiniAdbd(shell=["sh", "-c"], features="cmd") as daemon:
        error = opening(f"adb://{daemon.serial}")
    assert error.code == "no-shell-v2"
    assert "Android 7" in error.hint


def test_the_only_phone_needs_no_serial_and_of_two_one_must_be_named(
    none_attached: None, adbd: MiniAdbd
) -> None:
    subprocess.run(["adb", "connect", adbd.serial], capture_output=True, check=True)
    with open_device("adb://") as device:
        assert device.address == f"adb://{adbd.serial}"
        assert device.run(["echo", "here"], timeout_s=10).stdout == b"here\n"
    with MiniAdbd(shell=["sh", "-c"]) as other:
        subprocess.run(["adb", "connect", other.serial], capture_output=True, check=True)
        error = opening("adb://")
    assert isinstance(error, RequestError)
    assert f"adb://{other.serial} (Mini Phone)" in error.message
    # what was connected before stays connected
    assert adbd.serial in attached()


def test_closing_undoes_the_connection_that_opening_made(
    none_attached: None, adbd: MiniAdbd
) -> None:
    device = open_device(f"adb://{adbd.serial}")
    assert adbd.serial in attached()
    device.close()
    assert adbd.serial not in attached()
    with pytest.raises(ConnectError, match="closed"):
        device.run(["true"], timeout_s=10)


def test_a_cable_that_is_pulled_is_a_lost_connection_and_the_next_call_connects_again(
    none_attached: None, adbd: MiniAdbd, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"

    def pull() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.01)
        adbd.cut()

    with open_device(f"adb://{adbd.serial}") as device:
        thread = threading.Thread(target=pull)
        thread.start()
        with pytest.raises(ConnectError) as caught:
            device.run(["sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(pid_file)], timeout_s=60)
        thread.join()
        assert caught.value.code == "connection-lost"
        assert device.run(["echo", "back"], timeout_s=10).stdout == b"back\n"
    # the phone stopped the command by itself: nobody was left who could
    deadline_s = time.monotonic() + 10
    while (Path("/proc") / pid_file.read_text().strip()).exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_what_arrives_otherwise_than_it_was_sent_never_gets_its_name(
    none_attached: None, adbd: MiniAdbd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adbd, "spoils", True)
    source, target = tmp_path / "model", tmp_path / "there" / "model"
    source.write_bytes(b"content")
    with open_device(f"adb://{adbd.serial}") as device:
        with pytest.raises(TransferError, match="differs from what was sent"):
            device.push(source, str(target))
        assert list(target.parent.iterdir()) == []
