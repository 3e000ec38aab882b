"""The script that runs around every command over SSH, under this machine's own shells."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepipe.artifact import hash_path
from edgepipe.device.base import MAX_LINE_BYTES, check_line
from edgepipe.device.parse import parse_sha256
from edgepipe.device.ssh import _HASH, command_line
from edgepipe.errors import RequestError

TOOLS = ("sh", "sleep", "true", "cat", "kill")


@pytest.fixture(params=["with timeout", "without timeout"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A PATH with few programs; a board may have no `timeout`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    names = (*TOOLS, "timeout") if request.param == "with timeout" else TOOLS
    for name in names:
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)


@contextlib.contextmanager
def running(
    path: str, argv: list[str], *, board_timeout_s: int = 60
) -> Iterator[subprocess.Popen[bytes]]:
    """The line as sshd runs it: by the login shell, leading a session, with pipes all around."""
    process = subprocess.Popen(
        [shutil.which("sh") or "sh", "-c", command_line(argv, board_timeout_s=board_timeout_s)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": path}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    """Exit code and output, with our end of its standard input still open."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(20), out, err


def test_output_and_exit_code_pass_through(path: str) -> None:
    with running(path, ["sh", "-c", "echo out; echo err >&2; exit 5"]) as process:
        assert finish(process) == (5, b"out\n", b"err\n")


def test_the_command_sees_no_input_and_none_of_our_descriptors(path: str) -> None:
    script = 'cat; for n in 3 4; do (true <&$n) 2>/dev/null && echo "$n is open"; done; echo end'
    with running(path, ["sh", "-c", script]) as process:
        assert finish(process) == (0, b"end\n", b"")


def test_death_by_signal_is_128_plus_n_and_nothing_is_remarked(path: str) -> None:
    with running(path, ["sh", "-c", "kill -9 $$"]) as process:
        assert finish(process) == (137, b"", b"")


def test_quotes_survive(path: str) -> None:
    word = "a'b\"c $HOME `id` \\ \n*"
    with running(path, ["sh", "-c", 'printf %s "$1"', "sh", word]) as process:
        assert finish(process) == (0, word.encode(), b"")


def begun(process: subprocess.Popen[bytes]) -> int:
    """The pid that the command prints first."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def assert_ends(pid: int) -> None:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


SLEEPER = ["sh", "-c", "echo $$; exec sleep 600"]
STUBBORN = ["sh", "-c", 'trap "" TERM; echo $$; while :; do sleep 0.1; done']


@pytest.mark.parametrize("argv", [SLEEPER, STUBBORN], ids=["sleeper", "ignores-sigterm"])
@pytest.mark.slow
def test_a_host_that_vanishes_stops_the_command(path: str, argv: list[str]) -> None:
    with running(path, argv) as process:
        pid = begun(process)
        assert process.stdin is not None
        process.stdin.close()
        assert_ends(pid)


@pytest.mark.parametrize("argv", [SLEEPER, STUBBORN], ids=["sleeper", "ignores-sigterm"])
@pytest.mark.slow
def test_a_line_on_standard_input_stops_the_command(path: str, argv: list[str]) -> None:
    with running(path, argv) as process:
        pid = begun(process)
        assert process.stdin is not None
        process.stdin.write(b"stop\n")
        process.stdin.flush()
        assert_ends(pid)


@pytest.mark.parametrize("argv", [SLEEPER, STUBBORN], ids=["sleeper", "ignores-sigterm"])
@pytest.mark.slow
def test_the_board_itself_stops_a_command_past_its_deadline(path: str, argv: list[str]) -> None:
    with running(path, argv, board_timeout_s=1) as process:
        assert_ends(begun(process))


def test_a_missing_program_is_127(path: str) -> None:
    with running(path, ["no-such-program"]) as process:
        code, out, err = finish(process)
    assert (code, out) == (127, b"")
    assert b"no-such-program" in err


@pytest.mark.parametrize("first", ["sha256sum", "python3"])
@pytest.mark.parametrize("there", ["sha256sum", "python3"])
def test_a_file_is_hashed_with_whichever_program_there_is(
    tmp_path: Path, first: str, there: str
) -> None:
    (tmp_path / "bin").mkdir()
    program = shutil.which(there) if there == "sha256sum" else sys.executable
    assert program is not None
    (tmp_path / "bin" / there).symlink_to(program)
    file = tmp_path / "a b'c$"
    file.write_bytes(b"x" * 3_000_000)
    done = subprocess.run(
        [shutil.which("sh") or "sh", "-c", _HASH, file, first],
        env={"PATH": str(tmp_path / "bin")}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert parse_sha256(done.stdout) == hash_path(file)


@pytest.mark.parametrize("letter", ["a", "ä", "\udcff"])
def test_the_longest_line_that_is_let_through_is_one_that_a_shell_takes(letter: str) -> None:
    count = (MAX_LINE_BYTES - 2) // len(letter.encode(errors="surrogateescape"))
    longest = ": " + letter * count
    check_line(longest, ["sh"])
    assert subprocess.run([b"sh", b"-c", os.fsencode(longest)], check=False).returncode == 0
    with pytest.raises(RequestError, match=f"`sh` is longer than {MAX_LINE_BYTES} bytes"):
        check_line(longest + letter, ["sh"])
