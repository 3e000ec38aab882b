"""What every device promises (edgepipe/device/base.py), on each transport there is."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import stat
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepipe.device import Device, base, open_device
from edgepipe.device.ssh import SshDevice
from edgepipe.errors import CommandFailed, CommandTimeout, RequestError, TransferError
from edgepipe.probe import probe

from .conftest import Board

WAIT_S = 10.0


def wait_until(is_so: object, what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, f"{what}: still not so after {WAIT_S} s"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """No such process, or only its exit status is left."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError as exc:
        return exc.errno in (errno.ENOENT, errno.ESRCH)


# -------------------------------------------------------------------------------------- commands

NASTY = ["", " ", "a b", "'", '"', "\\", "$HOME", "`id`", "$(id)", "*", "~", "\n", "\t", "!", "é", "-n", "--", ";", "&", "|", ">", "#", "%s", "a'b\"c\\d", "\x7f", "{a,b}", "\r\n"]  # fmt: skip
WORDS = st.lists(
    st.one_of(
        st.sampled_from(NASTY),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    ),
    max_size=6,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=WORDS)
def test_arguments_arrive_as_they_were_given(device: Device, words: list[str]) -> None:
    # printf repeats its format for every argument, so the output ends each of them with a NUL
    done = device.run(["printf", "%s\\0", "first", *words], timeout_s=10)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"".join(f"{word}\0".encode() for word in ["first", *words])


def test_words_that_are_no_text_in_utf8_arrive_as_well(any_device: Device) -> None:
    done = any_device.run(["printf", "%s", os.fsdecode(b"\xff\xfe")], timeout_s=60)
    assert done.stdout == b"\xff\xfe"


@pytest.mark.parametrize("code", [0, 1, 3, 124, 255])
def test_exit_code_is_returned_not_raised(any_device: Device, code: int) -> None:
    assert any_device.run(["sh", "-c", f"exit {code}"], timeout_s=60).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT])
def test_death_by_signal_n_is_exit_code_128_plus_n(
    any_device: Device, number: signal.Signals
) -> None:
    done = any_device.run(["sh", "-c", f"kill -{number.value} $$"], timeout_s=60)
    assert done == base.Completed(128 + number.value, b"", b"")


def test_a_program_that_is_not_there_is_127_and_one_that_cannot_run_126(any_device: Device) -> None:
    missing = any_device.run(["no-such-program-here"], timeout_s=60)
    assert (missing.returncode, missing.stdout) == (127, b"")
    assert b"no-such-program-here" in missing.stderr
    assert any_device.run(["/etc/passwd"], timeout_s=60).returncode == 126


def test_a_home_that_is_not_there_hinders_no_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert open_device("local").run(["pwd"], timeout_s=10) == base.Completed(0, b"/\n", b"")


@pytest.mark.parametrize("argv", [[], "uname -m", ["echo", "a\0b"], ["echo", 3]])
def test_what_is_no_command_is_refused(device: Device, argv: object) -> None:
    with pytest.raises(RequestError):
        device.run(argv, timeout_s=10)  # type: ignore[arg-type]


def test_both_streams_are_kept_apart(any_device: Device) -> None:
    done = any_device.run(["sh", "-c", "echo out; echo err >&2"], timeout_s=60)
    assert done == base.Completed(0, b"out\n", b"err\n")


def test_standard_input_is_empty(any_device: Device) -> None:
    assert any_device.run(["cat"], timeout_s=60) == base.Completed(0, b"", b"")


def test_six_megabytes_on_stderr_before_any_stdout_do_not_hang(any_device: Device) -> None:
    done = any_device.run(
        ["sh", "-c", "head -c 6000000 /dev/zero >&2; head -c 6000000 /dev/zero; echo end"],
        timeout_s=60,
    )
    assert len(done.stderr) == 6_000_000
    assert done.stdout.endswith(b"\0end\n")
    assert len(done.stdout) == 6_000_004


def test_a_command_that_closes_its_output_is_still_waited_for(any_device: Device) -> None:
    done = any_device.run(["sh", "-c", "exec >&- 2>&-; sleep 0.3; exit 7"], timeout_s=60)
    assert done.returncode == 7


# ------------------------------------------------------------------------------------- deadlines


def test_a_command_past_its_deadline_is_killed_on_the_device(
    device: Device, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(CommandTimeout, match=r"sleep 600.* ran longer than 0\.3 s"):
        device.run(["sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(pid_file)], timeout_s=0.3)
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the command is gone")


def test_what_a_late_command_started_is_killed_with_it(device: Device, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = 'sleep 600 & echo $! >"$0"; wait'
    with pytest.raises(CommandTimeout):
        device.run(["sh", "-c", script, str(pid_file)], timeout_s=0.3)
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the child is gone")


def test_a_command_that_ignores_sigterm_is_killed_all_the_same(
    device: Device, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    script = 'trap "" TERM; echo $$ >"$0"; while :; do sleep 0.1; done'
    with pytest.raises(CommandTimeout):
        device.run(["sh", "-c", script, str(pid_file)], timeout_s=0.3)
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the command is gone")


def test_printing_now_and_then_does_not_move_the_deadline(device: Device) -> None:
    # ends by itself after 100 s, far beyond this test's patience
    script = "i=0; while [ $i -lt 1000 ]; do echo x; sleep 0.1; i=$((i + 1)); done"
    with pytest.raises(CommandTimeout):
        device.run(["sh", "-c", script], timeout_s=0.5)


def test_printing_without_end_is_stopped_at_the_deadline(device: Device, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = 'echo $$ >"$0"; while :; do echo xxxxxxxxxxxxxxxx; done'
    with pytest.raises(CommandTimeout):
        device.run(["sh", "-c", script, str(pid_file)], timeout_s=0.5)
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the command is gone")


def test_printing_too_much_is_stopped_before_memory_is_full(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_OUTPUT_BYTES", 2**20)
    pid_file = tmp_path / "pid"
    # prints 3 MiB and stays: only we can end it
    script = 'echo $$ >"$0"; head -c 3145728 /dev/zero; exec sleep 600'
    with pytest.raises(CommandFailed, match="printed more than 1 MiB") as caught:
        device.run(["sh", "-c", script, str(pid_file)], timeout_s=60)
    assert caught.value.code == "output-too-long"
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the command is gone")


def test_a_device_is_usable_after_a_deadline(device: Device) -> None:
    with pytest.raises(CommandTimeout):
        device.run(["sleep", "600"], timeout_s=0.2)
    assert device.run(["echo", "here"], timeout_s=10).stdout == b"here\n"


def test_ctrl_c_stops_the_command_on_the_device(device: Device, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def interrupt() -> None:
        wait_until(lambda: pid_file.exists() and pid_file.read_text(), "the command runs")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        device.run(["sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(pid_file)], timeout_s=60)
    thread.join()
    pid = int(pid_file.read_text())
    wait_until(lambda: is_gone(pid), "the command is gone")


# ------------------------------------------------------------------------------------------ push


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.part.*")]


@pytest.mark.parametrize("size_bytes", [0, 1, 32767, 32768, 3_000_001])
def test_push_makes_missing_folders_and_copies_every_byte(
    device: Device, tmp_path: Path, size_bytes: int
) -> None:
    source, target = tmp_path / "model", tmp_path / "a" / "b c" / "$x'y" / "model"
    source.write_bytes(os.urandom(size_bytes))
    assert device.push(source, str(target)) is True
    assert target.read_bytes() == source.read_bytes()
    assert leftovers(tmp_path) == []


def test_what_was_pushed_comes_back_and_a_second_push_moves_nothing(
    any_device: Device, tmp_path: Path
) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(100_001))
    remote = f"~/edgepipe-contract-{os.getpid()}/a/b"
    try:
        assert any_device.push(source, remote)
        assert not any_device.push(source, remote)
        any_device.pull(remote, back)
    finally:
        folder = remote.removeprefix("~/").partition("/")[0]
        any_device.run(["sh", "-c", 'rm -r -- "$HOME/$0"', folder], timeout_s=60)
    assert back.read_bytes() == source.read_bytes()


def test_push_keeps_the_permission_to_execute(device: Device, tmp_path: Path) -> None:
    source, target = tmp_path / "runner", tmp_path / "there"
    source.write_text("#!/bin/sh\necho ran\n")
    source.chmod(0o755)
    device.push(source, str(target))
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert device.run([str(target)], timeout_s=10).stdout == b"ran\n"


def test_a_tilde_is_the_home_of_the_device(board: Board, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_bytes(b"content")
    board.device.push(source, "~/.edgepipe/models/m")
    assert (board.home / ".edgepipe" / "models" / "m").read_bytes() == b"content"
    board.device.pull("~/.edgepipe/models/m", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"content"


def test_a_second_push_moves_nothing(device: Device, tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "there"
    source.write_bytes(os.urandom(2_000_000))
    assert device.push(source, str(target)) is True
    before = target.stat()
    sent_before = bytes_sent(device)
    assert device.push(source, str(target)) is False
    after = target.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    # commands and answers, nothing of the model's size
    assert bytes_sent(device) - sent_before < 20_000


def bytes_sent(device: Device) -> int:
    """What the kernel counts as sent on the device's connection; 0 where it has none."""
    if not isinstance(device, SshDevice):
        return 0
    transport = device._client.get_transport()
    assert transport is not None
    # struct tcp_info, <linux/tcp.h>: 8 bytes, 24 x u32, 2 x u64, then u64 bytes_acked
    raw = transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("<Q", raw, 8 + 24 * 4 + 16)[0])


def test_other_content_of_the_same_length_is_replaced(device: Device, tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "there"
    source.write_bytes(b"new!")
    target.write_bytes(b"old!")
    assert device.push(source, str(target)) is True
    assert target.read_bytes() == b"new!"


def test_what_was_there_stays_whole_while_another_reads_it(device: Device, tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "there"
    target.write_bytes(b"old")
    source.write_bytes(b"new content")
    with target.open("rb") as reader:
        device.push(source, str(target))
        assert reader.read() == b"old"  # replaced by a rename, not overwritten in place


@pytest.mark.parametrize("margin_bytes", [base.FREE_MARGIN_BYTES, -(10**9)])
def test_a_full_disk_is_a_transfer_error_and_leaves_nothing(
    device: Device,
    tmp_path: Path,
    tiny_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    margin_bytes: int,
) -> None:
    # with the negative margin the free space check lets it pass, and the writing itself fails
    monkeypatch.setattr(base, "FREE_MARGIN_BYTES", margin_bytes)
    source, target = tmp_path / "model", tiny_disk / "models" / "m"
    source.write_bytes(os.urandom(4_000_000))
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(TransferError, match=r"no space left; the file needs 4\.0 MB") as caught:
        device.push(source, str(target))
    assert caught.value.code == "disk-full"
    assert [path.name for path in target.parent.iterdir()] == ["m"]
    assert target.read_bytes() == b"old"


def test_ctrl_c_in_the_middle_of_a_push_leaves_nothing(device: Device, tmp_path: Path) -> None:
    source, folder = tmp_path / "model", tmp_path / "there"
    with source.open("wb") as stream:
        stream.truncate(400_000_000)  # sparse: long enough to be interrupted, quick to make

    def interrupt() -> None:
        wait_until(lambda: leftovers(folder) if folder.exists() else [], "the push has begun")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        device.push(source, str(folder / "model"))
    thread.join()
    assert list(folder.iterdir()) == []
    assert device.run(["echo", "here"], timeout_s=10).stdout == b"here\n"


def test_a_target_below_a_file_is_a_transfer_error(device: Device, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TransferError, match="file"):
        device.push(source, str(tmp_path / "file" / "below" / "model"))


def test_a_target_that_is_a_folder_is_a_transfer_error(device: Device, tmp_path: Path) -> None:
    source, folder = tmp_path / "model", tmp_path / "folder"
    source.write_bytes(b"x")
    folder.mkdir()
    with pytest.raises(TransferError, match="folder"):
        device.push(source, str(folder))
    assert list(folder.iterdir()) == []
    assert leftovers(tmp_path) == []


def test_pushing_a_file_that_is_not_there_is_a_transfer_error(
    device: Device, tmp_path: Path
) -> None:
    with pytest.raises(TransferError, match="No such file"):
        device.push(tmp_path / "none", str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


# ------------------------------------------------------------------------------------------ pull


@pytest.mark.parametrize("size_bytes", [0, 5, 3_000_001])
def test_pull_copies_every_byte_and_makes_missing_folders(
    device: Device, tmp_path: Path, size_bytes: int
) -> None:
    source, target = tmp_path / "result", tmp_path / "a" / "b" / "result"
    source.write_bytes(os.urandom(size_bytes))
    device.pull(str(source), target)
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()  # fmt: skip
    assert leftovers(tmp_path) == []


def test_pulling_what_is_not_there_leaves_the_old_file(device: Device, tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_bytes(b"old")
    with pytest.raises(TransferError, match="No such file"):
        device.pull(str(tmp_path / "none"), target)
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_pulling_to_a_full_disk_leaves_nothing(
    device: Device, tmp_path: Path, tiny_disk: Path
) -> None:
    source = tmp_path / "result"
    source.write_bytes(os.urandom(4_000_000))
    with pytest.raises(TransferError, match=r"no space left; the file needs 4\.0 MB"):
        device.pull(str(source), tiny_disk / "result")
    assert list(tiny_disk.iterdir()) == []


def test_the_probe_reads_the_facts_of_the_device(board: Board) -> None:
    facts = probe(board.device)
    assert facts.page_size_bytes == os.sysconf("SC_PAGE_SIZE")
    assert facts.kernel == os.uname().release
    assert leftovers(board.home) == []
    assert [path.name for path in board.home.rglob("__pycache__")] == []


def test_closing_twice_is_allowed(device: Device) -> None:
    device.close()
    device.close()
