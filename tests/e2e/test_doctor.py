"""``edgepipe doctor`` on real parts: an sshd on loopback, the real agent, the real runtime."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgepipe.cli import main
from edgepipe.testing import LoopbackSshd
from edgepipe.tflite_ops.tiny import tiny_tflite

from .conftest import EdgepipeRunner

pytestmark = pytest.mark.slow

QUICK = ("--sessions", "1", "--session", "200 ms", "--warmup", "50 ms", "--memory-sessions", "1")


Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs ``edgepipe doctor ARGUMENTS --json``: exit code and document, its checks by name."""

    def run(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            code = main(["doctor", *arguments, "--json"])
        found = json.loads(capsys.readouterr().out)
        found["checks"] = {check["name"]: check for check in found["checks"]}
        return code, found

    return run


def statuses(found: dict[str, Any], status: str) -> list[str]:
    return [name for name, check in found["checks"].items() if check["status"] == status]


def files_below(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__")
    return {str(p.relative_to(folder)) for p in found}


def test_a_board_is_examined_mended_and_then_needs_nothing_more(
    server: LoopbackSshd, doctor: Doctor, edgepipe: EdgepipeRunner, project: Path
) -> None:
    env = server.environment()
    code, found = doctor(server.address, env=env)
    assert statuses(found, "fail") + statuses(found, "unknown") == []
    assert (code, found["ready"], found["fixed"]) == (0, True, [])
    assert found["checks"]["runtime"]["status"] == "warn"
    assert found["checks"]["runtime"]["mend"] == f"edgepipe doctor {server.address} --fix"

    old = server.home / ".edgepipe" / "jobs" / "dead" / "state.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    for path in (old, old.parent):
        os.utime(path, (time.time() - 7200,) * 2)
    code, found = doctor(server.address, env=env)
    assert found["checks"]["leftovers"]["status"] == "warn"

    code, found = doctor(server.address, "--fix", env=env)
    assert code == 0
    assert len(found["fixed"]) == 2
    assert "its host never came back" in found["fixed"][0]
    assert "pushed LiteRT" in found["fixed"][1]
    assert found["checks"]["runtime"]["status"] == "ok"
    assert "passes its self-test" in found["checks"]["runtime"]["found"]
    assert found["checks"]["leftovers"]["status"] == "ok"
    assert not old.parent.exists()

    code, found = doctor(server.address, "--fix", env=env)
    assert (code, found["fixed"]) == (0, [])
    # what bench needs is there: it pushes nothing but the model
    before = files_below(server.home)
    (project / "m.tflite").write_bytes(tiny_tflite())
    bench = edgepipe("bench", "m.tflite", "--device", server.address, "--profile", "localhost", *QUICK, env=env)  # fmt: skip
    assert bench.returncode == 0, bench.stderr
    new = files_below(server.home) - before
    assert {Path(path).parts[1] for path in new} <= {"models", "lock"}, new


def test_a_damaged_runtime_is_noticed_and_replaced(server: LoopbackSshd, doctor: Doctor) -> None:
    env = server.environment()
    doctor(server.address, "--fix", env=env)
    (library,) = server.home.rglob("libLiteRt.so")
    with library.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * 64)
    code, found = doctor(server.address, env=env)
    assert code == 3
    assert statuses(found, "fail") == ["runtime"]
    assert "sha256" in found["checks"]["runtime"]["found"]
    assert doctor(server.address, "--fix", env=env)[0] == 0


def test_a_board_that_somebody_measures_on_is_not_ready_and_says_who(
    server: LoopbackSshd, doctor: Doctor, project: Path
) -> None:
    (project / "m.tflite").write_bytes(tiny_tflite())
    job = subprocess.Popen(
        [sys.executable, "-m", "edgepipe", "bench", "m.tflite", "--device", server.address, "--profile", "localhost", "--session", "30 s"],
        cwd=project, env={**os.environ, **server.environment()}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert job.stderr is not None
        for line in job.stderr:
            if line.startswith("memory"):
                break
        code, found = doctor(server.address, "--fix", env=server.environment())
        assert code == 3
        assert statuses(found, "fail") == ["lease"]
        assert socket.gethostname() in found["checks"]["lease"]["found"]
        assert list(server.home.glob(".edgepipe/jobs/*/state.json"))  # its job is let alone
    finally:
        job.terminate()
        job.wait(30)
    assert job.returncode in (130, 143)


def test_each_way_of_not_being_reached_is_told_apart(
    server: LoopbackSshd, doctor: Doctor, tmp_path: Path
) -> None:
    env = server.environment()
    code, found = doctor("ssh://pi@board.invalid")
    assert (code, statuses(found, "fail")) == (3, ["name"])
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert statuses(doctor(f"ssh://pi@127.0.0.1:{port}")[1], "fail") == ["TCP"]
    no_key = {**env, "EDGEPIPE_KNOWN_HOSTS": str(tmp_path / "none")}
    found = doctor(server.address, env=no_key)[1]
    assert statuses(found, "fail") == ["host key"]
    assert "edgepipe devices trust" in found["checks"]["host key"]["mend"]
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    wrong = {**env, "EDGEPIPE_SSH_IDENTITY": str(stranger), "SSH_AUTH_SOCK": ""}
    assert statuses(doctor(server.address, env=wrong)[1], "fail") == ["login"]


def test_another_kind_of_board_than_the_profile_is_not_ready(
    server: LoopbackSshd, edgepipe: EdgepipeRunner
) -> None:
    done = edgepipe("doctor", server.address, "--profile", "rpi_zero2w", env=server.environment())
    assert done.returncode == 3
    assert "FAIL userland" in done.stdout
    assert "profile rpi_zero2w says aarch64" in done.stdout


def test_a_board_without_python_gets_the_runtime_of_the_c_runner(
    doctor: Doctor, tmp_path: Path
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) on this machine")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "timeout", "true", "sleep", "sha256sum", "mkdir", "df", "rm", "cat", "find", "touch", "rmdir"):  # fmt: skip
        (tools / name).symlink_to(str(shutil.which(name)))
    with LoopbackSshd(device_environment={"PATH": str(tools)}) as server:
        stale = server.home / ".edgepipe" / "jobs" / "dead"
        stale.mkdir(parents=True)
        os.utime(stale, (time.time() - 30 * 86400,) * 2)
        env = {**server.environment(), "EDGEPIPE_NO_INSTALL": "1"}
        code, found = doctor(server.address, "--fix", env=env)
        assert code == 0, found
        assert "C runner" in found["checks"]["Python"]["found"]
        assert "passes its self-test" in found["checks"]["runtime"]["found"]
        assert list((server.home / ".edgepipe" / "jobs").iterdir()) == []
