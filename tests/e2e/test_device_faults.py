"""Faults of devices through the command line: message, exit code, nothing half-written there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepipe.testing import LoopbackSshd, find_sshd
from edgepipe.tflite_ops.tiny import crashing_tflite, tiny_tflite

from .conftest import EdgepipeRunner

pytestmark = pytest.mark.slow

QUICK = ("--sessions", "1", "--session", "200 ms", "--warmup", "50 ms", "--memory-sessions", "1")


@pytest.fixture
def model(project: Path) -> str:
    (project / "tiny.tflite").write_bytes(tiny_tflite())
    return "tiny.tflite"


def check(done: subprocess.CompletedProcess[str], code: int, *named: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in named:
        assert text in done.stderr
    if code != 1:
        assert "hint: " in done.stderr


def half_written(server: LoopbackSshd) -> list[Path]:
    return [p for p in server.home.rglob("*") if ".part" in p.name or p.parent.name == "jobs"]


def bench(edgepipe: EdgepipeRunner, model: str, address: str, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:  # fmt: skip
    options = ("--device", address, "--profile", "localhost", *QUICK, *more)
    return edgepipe("bench", model, *options, env=env)


def test_a_model_is_measured_over_ssh(
    server: LoopbackSshd, edgepipe: EdgepipeRunner, model: str
) -> None:
    done = bench(edgepipe, model, server.address, server.environment())
    assert done.returncode == 0, done.stderr
    assert "latency_wall" in done.stdout
    assert half_written(server) == []


def test_an_unreachable_host_is_named(edgepipe: EdgepipeRunner, model: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = bench(edgepipe, model, f"ssh://pi@127.0.0.1:{port}", {})
    check(done, 3, "127.0.0.1", str(port))


def test_a_wrong_key_is_named(
    server: LoopbackSshd, edgepipe: EdgepipeRunner, model: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", wrong], check=True)
    env = {**server.environment(), "EDGEPIPE_SSH_IDENTITY": str(wrong), "SSH_AUTH_SOCK": "", "HOME": str(tmp_path)}  # fmt: skip
    check(
        bench(edgepipe, model, server.address, env), 3, "127.0.0.1", "refuses to let", "ssh-copy-id"
    )


def test_an_unknown_host_key_shows_its_fingerprint_and_how_to_accept_it(
    server: LoopbackSshd, edgepipe: EdgepipeRunner, model: str, tmp_path: Path
) -> None:
    known = tmp_path / "known_hosts"
    env = {**server.environment(), "EDGEPIPE_KNOWN_HOSTS": str(known)}
    done = bench(edgepipe, model, server.address, env)
    check(done, 3, "SHA256:", f"edgepipe devices trust {server.address}")
    trusted = edgepipe("devices", "trust", server.address, "--yes", env=env)
    assert trusted.returncode == 0, trusted.stderr
    assert bench(edgepipe, model, server.address, env).returncode == 0


def test_a_changed_host_key_is_refused_with_both_fingerprints(
    server: LoopbackSshd, edgepipe: EdgepipeRunner, model: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    known = tmp_path / "known_hosts"
    key = " ".join(other.with_suffix(".pub").read_text().split()[:2])
    known.write_text(f"[127.0.0.1]:{server.port} {key}\n")
    env = {**server.environment(), "EDGEPIPE_KNOWN_HOSTS": str(known)}
    done = bench(edgepipe, model, server.address, env)
    check(done, 3, "changed")
    assert done.stderr.count("SHA256:") >= 2


def test_a_board_without_the_runtime_says_how_to_mend_it(
    server: LoopbackSshd, edgepipe: EdgepipeRunner, model: str
) -> None:
    env = server.environment()
    done = bench(edgepipe, model, server.address, env, "--backend", "tflite-runtime-interpreter")
    check(done, 3, "tflite")
    assert half_written(server) == []


def test_a_model_that_crashes_the_runner_is_a_failed_gate(
    server: LoopbackSshd, project: Path, edgepipe: EdgepipeRunner
) -> None:
    (project / "crash.tflite").write_bytes(crashing_tflite())
    done = bench(edgepipe, "crash.tflite", server.address, server.environment())
    check(done, 1)
    assert "SIGSEGV" in done.stdout + done.stderr
    assert half_written(server) == []


def test_a_full_disk_on_the_board_leaves_nothing_half_written(
    project: Path, edgepipe: EdgepipeRunner, model: str
) -> None:
    if os.geteuid() != 0 or find_sshd() is None:
        pytest.skip("needs root to mount a small file system, and an sshd")
    home = project / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with LoopbackSshd(home=home) as server:
            done = bench(edgepipe, model, server.address, server.environment())
            check(done, 3, "space")
            assert half_written(server) == []
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)


def test_ctrl_c_while_measuring_leaves_no_job_on_the_board(
    server: LoopbackSshd, project: Path, model: str
) -> None:
    command = [sys.executable, "-m", "edgepipe", "bench", model, "--device", server.address, "--profile", "localhost", "--session", "30 s"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=project, env={**os.environ, **server.environment()},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("memory"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130, text
    for _ in range(100):
        if not running_jobs(server):
            break
        time.sleep(0.1)
    assert running_jobs(server) == []
    assert half_written(server) == []


def running_jobs(server: LoopbackSshd) -> list[str]:
    """Measuring processes whose files lie in the server's home."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(server.home) in line and "python" in line:
                found.append(line)
    return found
