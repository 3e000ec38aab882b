"""What a board keeps, and what of it goes: by the real agent, in folders of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .board_side import TARGET, call, change_job, library, make_job, payload_module, run

DAY_S = 86400.0
housekeeping = payload_module("housekeeping")


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    return tmp_path / "work"


def put(path: Path, *, age_s: float = 0.0, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    make_old(path, age_s)
    return path


def make_old(path: Path, age_s: float) -> None:
    """The path and all below it, as if nobody had touched them for so long."""
    at = time.time() - age_s
    for each in [*path.rglob("*"), path]:
        os.utime(each, (at, at))


def tidied(work_dir: Path, abandoned_s: float = 7 * DAY_S) -> dict[str, str]:
    reply = call("tidy", work_dir, abandoned_s)
    return {Path(item["path"]).name: item["why"] for item in reply["removed"]}


@contextlib.contextmanager
def supervised(job_dir: Path) -> Iterator[None]:
    with (job_dir / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def test_what_was_used_lately_stays_and_what_was_not_for_a_month_goes(work_dir: Path) -> None:
    put(work_dir / "models" / "old.tflite", age_s=31 * DAY_S)
    put(work_dir / "models" / "new.tflite", age_s=29 * DAY_S)
    put(work_dir / "rt" / "aa" / "libLiteRt.so")
    make_old(work_dir / "rt" / "aa", 31 * DAY_S)
    put(work_dir / "rt" / "bb" / "libLiteRt.so")
    put(work_dir / "mine.txt", age_s=400 * DAY_S)
    assert set(tidied(work_dir)) == {"old.tflite", "aa"}
    assert not (work_dir / "rt" / "aa").exists()
    assert (work_dir / "rt" / "bb" / "libLiteRt.so").exists()
    assert (work_dir / "models" / "new.tflite").exists()
    assert (work_dir / "mine.txt").exists()  # nothing of ours
    assert tidied(work_dir) == {}


def test_the_job_of_a_host_that_never_came_back_goes_and_one_at_work_stays(work_dir: Path) -> None:
    dead, live, young = (work_dir / "jobs" / name for name in ("dead", "live", "young"))
    for path in (dead, live, young):
        put(path / "state.json")
    make_old(dead, 8 * DAY_S)
    with supervised(live):
        make_old(live, 8 * DAY_S)
        assert tidied(work_dir) == {"dead": "its host never came back"}
        assert set(tidied(work_dir, 0)) == {"young"}  # what `doctor --fix` asks for
        assert live.is_dir()
    assert not dead.exists()


def test_an_upload_that_stopped_goes_after_an_hour(work_dir: Path) -> None:
    put(work_dir / "models" / "m.tflite.part.0a1b", age_s=2 * 3600)
    put(work_dir / "models" / "n.tflite.part.0a1b", age_s=60)
    put(work_dir / "rt" / "aa" / "libLiteRt.so.part.0a1b")
    make_old(work_dir / "rt" / "aa", 2 * 3600)
    assert set(tidied(work_dir)) == {"m.tflite.part.0a1b", "libLiteRt.so.part.0a1b"}


def test_nothing_goes_by_age_while_the_clock_was_never_set(
    work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(work_dir / "jobs" / "a" / "state.json")
    make_old(work_dir / "jobs" / "a", 60 * 365 * DAY_S)
    assert housekeeping.garbage(str(work_dir), 0, now_s=1000.0) == []
    assert len(housekeeping.garbage(str(work_dir), 0, now_s=time.time())) == 1


def test_a_link_is_removed_and_not_what_it_points_to(work_dir: Path, tmp_path: Path) -> None:
    target = put(tmp_path / "precious" / "file")
    link = work_dir / "models" / "link"
    link.parent.mkdir(parents=True)
    link.symlink_to(target.parent)
    at = time.time() - 40 * DAY_S
    os.utime(link, (at, at), follow_symlinks=False)
    make_old(target.parent, 40 * DAY_S)
    assert set(tidied(work_dir)) == {"link"}
    assert target.exists()


@pytest.mark.slow
def test_a_job_marks_what_it_uses_and_its_end_removes_what_nobody_does(work_dir: Path) -> None:
    work_dir.mkdir()
    job_dir = make_job(work_dir)
    model = put(work_dir / "models" / "m.tflite")
    model.write_bytes((work_dir / "model.tflite").read_bytes())
    job = json.loads((job_dir / "job.json").read_text())
    change_job(job_dir, models={"model": {**job["models"]["model"], "path": str(model)}})
    put(work_dir / "models" / "other.tflite", age_s=31 * DAY_S)
    make_old(model, 31 * DAY_S)
    done = run(job_dir)
    assert done.code == 0, done.state
    call("end", job_dir)
    assert [path.name for path in (work_dir / "models").iterdir()] == ["m.tflite"]
    assert not job_dir.exists()


@pytest.mark.slow
def test_a_kept_job_is_no_garbage(work_dir: Path) -> None:
    work_dir.mkdir()
    job_dir = make_job(work_dir)
    run(job_dir)
    call("end", job_dir, "--keep")
    make_old(job_dir, 100 * DAY_S)
    assert tidied(work_dir, 0) == {}
    assert job_dir.is_dir()


def survey(work_dir: Path) -> Any:
    return call("survey", work_dir, 3600)["work_dir"]


def test_a_survey_tells_who_holds_the_board_and_what_lies_there(work_dir: Path) -> None:
    put(work_dir / "models" / "m.tflite", text="12345")
    put(work_dir / "jobs" / "a" / "state.json")
    with supervised(work_dir / "jobs" / "a"):
        found = survey(work_dir)
    assert found["lease"] is None
    assert found["caches"]["models"] == {"entries": 1, "bytes": 5}
    (job,) = found["jobs"]
    assert (job["alive"], job["owner"], job["kept"]) == (True, None, False)
    (work_dir / "lock").write_text('{"owner": "me@host", "job": "j1"}')
    assert survey(work_dir)["lease"] is None  # nobody holds it any more
    with supervised(work_dir):
        (work_dir / "lock").write_text('{"owner": "me@host", "job": "j1"}')
        assert survey(work_dir)["lease"] == {"owner": "me@host", "job": "j1", "left_s": 0.0, "running": True}  # fmt: skip


def test_check_says_which_runtime_works_and_why_the_others_do_not(work_dir: Path) -> None:
    work_dir.mkdir()
    reply = call("check", work_dir, "auto", json.dumps(library()))
    assert (reply["code"], reply["runtime"]["backend"]) == (0, "litert-c")
    too_new = {**library(), "glibcxx": "3.4.999"}
    reply = call("check", work_dir, "litert-c", json.dumps(too_new))
    assert reply["code"] == 69
    assert "GLIBCXX_3.4.999" in reply["message"]
    assert list(work_dir.iterdir()) == []


@pytest.mark.parametrize("words", [("survey",), ("survey", ".", "x"), ("tidy", "."), ("check", ".", "auto", "{")])  # fmt: skip
def test_a_request_that_is_none_is_refused(words: tuple[str, ...]) -> None:
    assert call(*words)["code"] == 64


def test_a_package_that_was_pushed_for_this_python_is_found_and_one_for_another_is_not(
    work_dir: Path,
) -> None:
    agent = work_dir / "agents" / "aa"
    shutil.copytree(TARGET, agent)
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for name in (f"11-{tag}", "22-cp27"):
        put(work_dir / "runtimes" / name / "tflite_runtime" / "__init__.py")
        put(work_dir / "runtimes" / name / "tflite_runtime-2.14.0.dist-info" / "METADATA")
    done = subprocess.run(
        [sys.executable, agent / "agent.py", "facts", work_dir],
        capture_output=True,
        check=True,
    )
    found = json.loads(done.stdout)["packages"]["tflite_runtime"]
    assert found["version"] == "2.14.0"
    assert found["path"] == str(work_dir / "runtimes" / f"11-{tag}" / "tflite_runtime")
