"""The governor of a board's clock: set only for a job that asks, and put back however that ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.board_side import (  # fmt: skip
    call,
    change_job,
    ending_jobs,
    is_gone,
    make_job,
    plan,
    run,
    state_of,
    wait_for,
)

pytestmark = pytest.mark.slow

OLD = {"policy0": "ondemand", "policy4": "schedutil"}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A work folder, beside a made-up /sys and /proc."""
    for policy, governor in OLD.items():
        folder = tmp_path / "root/sys/devices/system/cpu/cpufreq" / policy
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
        (folder / "scaling_available_governors").write_text("ondemand schedutil performance \n")
    boot(tmp_path, "boot-1")
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("EDGEPIPE_SYSROOT", root_of(tmp_path / "work"))
    with ending_jobs(tmp_path / "work") as work_dir:
        yield work_dir


def boot(folder: Path, name: str) -> None:
    path = folder / "root/proc/sys/kernel/random/boot_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{name}\n")


def root_of(board: Path) -> str:
    return str(board.parent / "root")


def governors(board: Path) -> dict[str, str]:
    folder = board.parent / "root/sys/devices/system/cpu/cpufreq"
    return {p: (folder / p / "scaling_governor").read_text().strip() for p in OLD}


def killed_while_it_measures(board: Path, **changes: object) -> Path:
    """A job whose supervisor is killed after it has set the governor."""
    work = plan("sustained")
    job_dir = make_job(
        board, plan=[{**work[0], "duration_s": 30}], set_governor="performance", **changes
    )
    assert call("start", job_dir)["code"] == 0
    wait_for(lambda: set(governors(board).values()) == {"performance"})
    pid = state_of(job_dir)["pid"]
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: is_gone(pid))
    assert set(governors(board).values()) == {"performance"}
    return job_dir


def test_a_job_measures_with_the_governor_it_asks_for_and_puts_the_old_ones_back(
    board: Path,
) -> None:
    found = run(make_job(board, set_governor="performance"))
    assert (found.code, found.tags) == (0, ["memory-1"])
    assert found.sessions[0]["before"]["governor"] == "performance"
    assert governors(board) == OLD
    assert not list(board.glob("governor.json*"))


def test_a_job_that_does_not_ask_changes_nothing(board: Path) -> None:
    found = run(make_job(board))
    assert found.sessions[0]["before"]["governor"] == "ondemand,schedutil"


def test_a_job_that_fails_puts_the_old_ones_back(board: Path) -> None:
    job_dir = make_job(board, model=b"no model at all", set_governor="performance")
    assert run(job_dir).code != 0
    assert governors(board) == OLD


@pytest.mark.parametrize("policies", [OLD, {}])
def test_what_cannot_be_set_is_refused_and_nothing_is_changed(board: Path, policies: dict[str, str]) -> None:  # fmt: skip
    if not policies:
        for path in Path(root_of(board)).glob("sys/devices/system/cpu/cpufreq/*/*"):
            path.unlink()
    found = run(make_job(board, set_governor="turbo"))
    assert (found.code, found.state["error"]) == (64, "bad-request")
    message = "there are ondemand schedutil performance" if policies else "no cpufreq"
    assert message in found.state["message"]
    assert not policies or governors(board) == OLD


def test_one_that_cannot_be_written_takes_back_the_others(board: Path) -> None:
    path = Path(root_of(board)) / "sys/devices/system/cpu/cpufreq/policy4/scaling_governor"
    path.unlink()
    path.symlink_to("/dev/full")  # whoever writes there is told that it failed, root too
    (path.parent / "scaling_available_governors").unlink()
    found = run(make_job(board, set_governor="performance"))
    assert (found.code, found.state["error"]) == (64, "bad-request")
    assert "policy4 cannot be set to performance" in found.state["message"]
    assert (path.parent.parent / "policy0/scaling_governor").read_text().strip() == "ondemand"


@pytest.mark.parametrize("who", ["the next job", "the end of the job", "tidy"])
def test_after_a_supervisor_that_was_killed_the_old_ones_are_put_back_by(board: Path, who: str) -> None:  # fmt: skip
    job_dir = killed_while_it_measures(board)
    if who == "the next job":
        run(make_job(board, id="job-2"))
    elif who == "the end of the job":
        assert call("end", job_dir)["code"] == 0
    else:
        assert call("tidy", board, 1e9)["governor_restored"]
    assert governors(board) == OLD
    assert not list(board.glob("governor.json*"))


def test_the_same_job_goes_on_with_it_after_its_supervisor_was_killed(board: Path) -> None:
    job_dir = killed_while_it_measures(board)
    change_job(job_dir, plan=plan("memory"))
    found = run(job_dir)
    assert found.sessions[-1]["before"]["governor"] == "performance"
    assert governors(board) == OLD


def test_what_somebody_else_has_set_since_stays(board: Path) -> None:
    killed_while_it_measures(board)
    path = Path(root_of(board)) / "sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
    path.write_text("powersave\n")
    call("tidy", board, 1e9)
    assert governors(board) == {"policy0": "powersave", "policy4": "schedutil"}


def test_after_a_power_cut_the_board_has_its_own_again_and_nothing_is_written(board: Path) -> None:
    killed_while_it_measures(board)
    boot(board.parent, "boot-2")
    call("tidy", board, 1e9)
    assert set(governors(board).values()) == {
        "performance"
    }  # of the made-up /sys, which never boots
    assert not list(board.glob("governor.json*"))


def test_a_record_that_cannot_be_read_stops_no_job(board: Path) -> None:
    (board / "governor.json").write_text(json.dumps({"set": "performance"})[:-4])
    assert run(make_job(board)).code == 0
