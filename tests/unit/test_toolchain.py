"""Converter environments and the child processes that run in them, with a toolchain of no packages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgepipe import toolchain
from edgepipe.errors import MissingExtra, NotReadyError, RequestError, StageError

pytestmark = pytest.mark.slow  # real processes and runs: not for the inner loop

TINY = toolchain.Toolchain("tiny", "nothing at all", (sys.version_info[1],), 1, "json")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A toolchain with an empty lock; nothing of it is installed yet."""
    locks = tmp_path / "locks"
    locks.mkdir()
    shutil.copy(toolchain.LOCKS / "child.py", locks)
    (locks / "tiny.lock.txt").write_text("# nothing\n")
    monkeypatch.setattr(toolchain, "LOCKS", locks)
    monkeypatch.setitem(toolchain.TOOLCHAINS, "tiny", TINY)
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path / "toolchains"))
    monkeypatch.delenv("EDGEPIPE_NO_INSTALL", raising=False)
    return "tiny"


def script(body: str) -> str:
    """Write a converter script; returns its name."""
    path = toolchain.LOCKS / "script.py"
    path.write_text(textwrap.dedent(body))
    return path.name


def call(tmp_path: Path, body: str, *, timeout_s: float = 60.0, **request: Any) -> dict[str, Any]:
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    return toolchain.call(
        "tiny", script(body), request, files={"model.onnx": b"model"}, work_dir=work_dir,
        timeout_s=timeout_s, log_path=tmp_path / "log.txt", stage="to_tflite",
    )  # fmt: skip


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# -- installing -----------------------------------------------------------------------------------


def test_an_installed_toolchain_has_its_own_python_and_is_not_made_twice(tiny: str) -> None:
    folder = toolchain.install(tiny)
    own = subprocess.run([folder / "bin/python", "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)  # fmt: skip
    assert own.stdout.strip() == str(folder)
    made = (folder / ".complete").stat().st_mtime_ns
    assert toolchain.ensure(tiny) == folder
    assert (folder / ".complete").stat().st_mtime_ns == made


def test_a_half_made_environment_is_made_again(tiny: str) -> None:
    folder = toolchain.environment(tiny)
    folder.mkdir(parents=True)
    (folder / "rubbish").write_text("left by a process that was killed")
    assert not toolchain.is_installed(tiny)
    toolchain.install(tiny)
    assert toolchain.is_installed(tiny)
    assert not (folder / "rubbish").exists()


def test_two_at_once_make_it_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = toolchain._build
    monkeypatch.setattr(toolchain, "_build", lambda *a: (made.append(1), build(*a))[1])
    threads = [threading.Thread(target=toolchain.install, args=(tiny,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert toolchain.is_installed(tiny)


@pytest.mark.slow
def test_a_failed_install_says_why_and_leaves_nothing(tiny: str) -> None:
    TINY.lock.write_text("not a requirement !!!\n")
    with pytest.raises(MissingExtra) as caught:
        toolchain.install(tiny)
    assert caught.value.code == "install-failed"
    assert "edgepipe toolchains install tiny" in caught.value.hint
    assert "not a requirement" in caught.value.message
    assert not toolchain.environment(tiny).exists()


def test_an_interrupted_install_leaves_nothing(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert (toolchain.environment(tiny) / "bin").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(toolchain, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toolchain.install(tiny)
    assert not toolchain.environment(tiny).exists()


def test_nothing_is_installed_where_that_is_forbidden(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("EDGEPIPE_NO_INSTALL", "1")
    with pytest.raises(MissingExtra) as caught:
        toolchain.ensure(tiny)
    assert caught.value.hint == "edgepipe toolchains install tiny"
    assert not toolchain.root().exists()


def test_a_new_lock_is_a_new_environment_and_remove_takes_both(tiny: str) -> None:
    old = toolchain.install(tiny)
    TINY.lock.write_text("# still nothing\n")
    assert not toolchain.is_installed(tiny)
    new = toolchain.install(tiny)
    assert {(i.path, i.current) for i in toolchain.installed()} == {(old, False), (new, True)}
    assert set(toolchain.remove(tiny)) == {old, new}
    assert toolchain.installed() == ()


@pytest.mark.slow
def test_an_environment_in_use_is_not_removed(tiny: str, tmp_path: Path) -> None:
    folder = toolchain.install(tiny)
    log = tmp_path / "log.txt"
    body = "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\n"
    failures: list[StageError] = []

    def convert() -> None:
        try:
            call(tmp_path, body, timeout_s=3)
        except StageError as exc:
            failures.append(exc)

    thread = threading.Thread(target=convert)
    thread.start()
    wait_until((tmp_path / "work" / "started").exists)
    with pytest.raises(NotReadyError, match="in use"):
        toolchain.remove(tiny)
    assert folder.is_dir()
    thread.join()
    assert [f.code for f in failures] == ["timeout"]
    assert toolchain.remove(tiny) == (folder,)
    assert log.exists()


def test_no_python_of_the_right_version_is_told_with_what_to_do(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(toolchain.TOOLCHAINS, "tiny", toolchain.dataclasses.replace(TINY, pythons=(4,)))  # fmt: skip
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    with pytest.raises(MissingExtra) as caught:
        toolchain.install(tiny)
    assert caught.value.code == "no-python"
    assert "needs Python 3.4" in caught.value.message


def test_a_place_that_cannot_be_written_is_told_with_the_way_out(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(blocked / "toolchains"))
    with pytest.raises(NotReadyError, match="cannot write in") as caught:
        toolchain.install(tiny)
    assert "EDGEPIPE_TOOLCHAINS" in caught.value.hint


def test_an_unknown_toolchain_is_refused_with_a_near_miss() -> None:
    with pytest.raises(RequestError, match="did you mean 'onnx2tf'"):
        toolchain.find_toolchain("onnx2t")


@pytest.mark.parametrize(("name", "packages"), [("onnx2tf", 20), ("onnx2tf-tf", 20), ("zig", 1)])
def test_a_lock_pins_everything_with_hashes_and_names_no_index(name: str, packages: int) -> None:
    text = toolchain.find_toolchain(name).lock.read_text()
    blocks = [b for b in text.replace("\\\n", " ").splitlines() if b and not b.startswith("#")]
    assert len(blocks) >= packages
    assert all("==" in b.split()[0] and "--hash=sha256:" in b for b in blocks)
    assert "://" not in text


# -- calling --------------------------------------------------------------------------------------


def test_a_child_gets_the_request_and_the_files_and_answers(tiny: str, tmp_path: Path) -> None:
    body = """
        from child import serve

        def convert(request):
            open("made.bin", "wb").write(open("model.onnx", "rb").read() * request["times"])
            return {"made": "made.bin"}

        serve(convert)
    """
    assert call(tmp_path, body, times=2) == {"ok": True, "made": "made.bin"}
    assert (tmp_path / "work" / "made.bin").read_bytes() == b"modelmodel"


def test_a_child_sees_nothing_of_our_environment(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("EDGEPIPE_SECRET", "token")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    body = """
        import os
        from child import serve

        serve(lambda request: {"environ": dict(os.environ), "cwd": os.getcwd()})
    """
    answer = call(tmp_path, body)
    assert "EDGEPIPE_SECRET" not in answer["environ"]
    assert "PYTHONPATH" not in answer["environ"]
    assert answer["environ"]["HOME"] == answer["cwd"] == str(tmp_path / "work")
    assert answer["environ"]["PATH"].startswith(str(toolchain.environment(tiny) / "bin"))


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("print('all is well')", "no-output", "made nothing"),
        ("import os; os.kill(os.getpid(), 11)", "crash", "SIGSEGV"),
        ("raise ValueError('no such thing')", "crash", "ValueError: no such thing"),
        ("import time; time.sleep(60)", "timeout", "did not finish converting within 1 s"),
    ],
)
def test_each_way_to_fail_has_its_own_code(tiny: str, tmp_path: Path, body: str, code: str, told: str) -> None:  # fmt: skip
    toolchain.install(tiny)
    with pytest.raises(StageError) as caught:
        call(tmp_path, body, timeout_s=1 if code == "timeout" else 60)
    assert caught.value.code == code
    assert told in caught.value.message
    assert caught.value.log_path == str(tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("raised", "answer"),
    [
        ("raise SystemExit(1)", {"reason": "invalid-graph", "message": "the converter gave up (exit 1)"}),
        ("raise KeyError('x')", {"reason": "converter-error", "message": "KeyError: 'x'"}),
        (
            "raise NotImplementedError('validation failed: op=DFT node=n1 reason_code=bad message=no such DFT')",
            {"reason": "unsupported-op", "op": "DFT", "node": "n1", "message": "no such DFT (bad)"},
        ),
    ],
)  # fmt: skip
def test_a_converter_that_refuses_is_an_answer(tiny: str, tmp_path: Path, raised: str, answer: dict[str, str]) -> None:  # fmt: skip
    body = f"from child import serve\ndef convert(request): {raised}\nserve(convert)\n"
    assert call(tmp_path, body) == {"ok": False, **answer}


def test_the_deadline_kills_the_childs_children_too(tiny: str, tmp_path: Path) -> None:
    toolchain.install(tiny)
    body = """
        import json, os, pathlib, subprocess, time
        other = subprocess.Popen(["sleep", "60"])
        pathlib.Path("pids").write_text(json.dumps([os.getpid(), other.pid]))
        time.sleep(60)
    """
    with pytest.raises(StageError):
        call(tmp_path, body, timeout_s=2)
    pids = json.loads((tmp_path / "work" / "pids").read_text())
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)


def test_a_child_dies_with_a_parent_that_was_killed(tiny: str, tmp_path: Path) -> None:
    toolchain.install(tiny)
    name = script(
        """
        import os, pathlib, time
        from child import serve

        def convert(request):
            pathlib.Path("pid.part").write_text(str(os.getpid()))
            os.replace("pid.part", "pid")
            time.sleep(60)

        serve(convert)
        """
    )
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    code = f"""
import pathlib
from edgepipe import toolchain
toolchain.LOCKS = pathlib.Path({str(toolchain.LOCKS)!r})
toolchain.TOOLCHAINS["tiny"] = toolchain.{TINY!r}
toolchain.call("tiny", {name!r}, {{}}, files={{}}, work_dir=pathlib.Path({str(work_dir)!r}),
    timeout_s=60, log_path=pathlib.Path({str(tmp_path / "log.txt")!r}), stage="s")
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until((work_dir / "pid").exists)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child = int((work_dir / "pid").read_text())
    wait_until(lambda: not is_alive(child), 5)
