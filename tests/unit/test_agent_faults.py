"""Faults on a board, injected into real processes: none loses a finished session, none invents one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.tflite_ops.tiny import tiny_tflite

from .board_side import (
    AGENT,
    call,
    change_job,
    ending_jobs,
    held_worker,
    is_gone,
    item,
    lines_of,
    make_job,
    outcome,
    outcome_lines,
    payload_module,
    plan,
    run,
    state_of,
    wait_for,
    worker_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Path]:
    """The work folder of a board."""
    with ending_jobs(tmp_path):
        yield tmp_path


class SysRoot:
    """A made-up /proc and /sys that a test changes while a job runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.set(boot_id="boot-1", temperature_c=40, throttled="0", oom_kills=2)

    def set(self, **values: Any) -> None:
        if "boot_id" in values:
            self.write("proc/sys/kernel/random/boot_id", values["boot_id"])
        if "temperature_c" in values:
            self.write("sys/class/thermal/thermal_zone0/type", "cpu-thermal")
            self.write("sys/class/thermal/thermal_zone0/temp", values["temperature_c"] * 1000)
        if "throttled" in values:
            self.write("sys/devices/platform/soc/soc:firmware/get_throttled", values["throttled"])
        if "oom_kills" in values:
            self.write("proc/vmstat", f"pswpin 0\noom_kill {values['oom_kills']}\n")

    def write(self, name: str, value: object) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(f"{value}\n")
        path.with_suffix(".part").rename(path)


@pytest.fixture
def sysroot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SysRoot:
    payload_module("sysfs")  # it reads the variable once
    monkeypatch.setenv("EDGEPIPE_SYSROOT", str(tmp_path / "sysroot"))
    return SysRoot(tmp_path / "sysroot")


def python_that(folder: Path, statements: str) -> dict[str, str]:
    """Environment in which each Python runs ``statements`` before all else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(statements)
    return {"PYTHONPATH": str(folder)}


# ------------------------------------------------------------------------------ processes that die


def test_a_session_whose_worker_was_killed_is_repeated_last(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency", "memory"), session_s=1)
    call("start", job_dir)
    os.kill(held_worker(job_dir, "latency-1"), signal.SIGKILL)
    found = outcome(job_dir)
    assert (found.code, found.tags) == (0, ["memory-1", "latency-1"])
    cause = found.sessions[0]["cause"]
    assert (cause["what"], cause["signal"]) == ("killed", signal.SIGKILL)
    assert found.state["runs_on_device"] is True


def test_a_worker_killed_every_time_says_nothing_of_the_model(board: Path) -> None:
    job_dir, killed = make_job(board, plan=plan("latency"), session_s=60), set[int]()
    call("start", job_dir)
    for _ in range(3):
        worker = held_worker(job_dir, "latency-1", beside=killed)
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGCONT)
        killed.add(worker)
    found = outcome(job_dir)
    assert (found.code, found.tags, found.state["runs_on_device"]) == (70, [], None)
    assert found.state["cause"]["what"] == "killed"


def test_a_worker_killed_in_the_self_test_says_nothing_of_the_backend(board: Path) -> None:
    package = board / "site" / "ai_edge_litert"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "interpreter.py").write_text("import os; os.kill(os.getpid(), 9)")
    found = run(make_job(board, runtime=None), PYTHONPATH=str(package.parent))
    assert (found.code, found.state["runs_on_device"]) == (70, None)
    assert found.state["cause"]["what"] == "killed"


def test_a_killed_supervisor_takes_its_worker_along_and_loses_no_session(board: Path) -> None:
    job_dir = make_job(board, plan=plan("memory", "latency"), session_s=2)
    call("start", job_dir)
    worker = worker_of(job_dir, "latency-1")
    os.kill(state_of(job_dir)["pid"], signal.SIGKILL)
    wait_for(lambda: is_gone(worker))
    status = call("status", job_dir, 0, 30)
    assert (status["code"], status["alive"], status["state"]["phase"]) == (0, False, "running")
    journal = job_dir / "results.jsonl"
    whole = journal.read_bytes()
    torn = whole.splitlines()[-1][:50]  # as a loss of power leaves it
    journal.write_bytes(whole + torn)
    assert call("status", job_dir, 0)["journal"].encode() == whole
    found = run(job_dir)
    assert (found.code, found.tags) == (0, ["memory-1", "latency-1"])
    assert journal.read_bytes().startswith(whole)
    assert torn not in journal.read_bytes()[len(whole) :]


def test_the_lease_dies_with_its_holder(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60, lease_s=600)
    pid = call("start", job_dir)["state"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: is_gone(pid))
    assert run(make_job(board, id="job-2")).code == 0


def test_an_agent_killed_before_it_has_the_lease_leaves_nothing_in_the_way(board: Path) -> None:
    job_dir = make_job(board)
    dies = (
        "import fcntl, os, sys\n"
        "if 'supervisor.py' in ' '.join(sys.orig_argv):\n"
        "    fcntl.flock = lambda *arguments: os.kill(os.getpid(), 9)\n"
    )
    reply = call("start", job_dir, **python_that(board / "site", dies))
    assert (reply["code"], reply["error"]) == (1, "died")
    reply = call("status", job_dir, 0)
    assert (reply["code"], reply["state"]) == (76, None)
    assert run(job_dir).tags == ["memory-1"]


def test_a_job_outlives_the_session_that_started_it(board: Path) -> None:
    """What sshd does when the connection is gone: its children get SIGHUP, their pipes close."""
    job_dir = make_job(board, plan=plan("latency"), session_s=1)
    shell = subprocess.Popen(
        ["/bin/sh", "-c", f"'{sys.executable}' '{AGENT}' start '{job_dir}'; read line"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert shell.stdout is not None
    pid = json.loads(shell.stdout.readline())["state"]["pid"]
    os.killpg(shell.pid, signal.SIGHUP)
    shell.communicate()
    os.kill(pid, signal.SIGHUP)
    assert outcome(job_dir).tags == ["latency-1"]


def test_end_also_ends_a_supervisor_that_was_stopped(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60)
    pid = call("start", job_dir)["state"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert call("end", job_dir)["code"] == 0
    assert is_gone(pid)


# ------------------------------------------------------------------------------ files


def test_a_truncated_model_is_never_loaded(board: Path) -> None:
    job_dir = make_job(board)
    model = board / "model.tflite"
    model.write_bytes(model.read_bytes()[:-100])
    found = run(job_dir)
    assert (found.code, found.state["error"], found.sessions) == (65, "data-mismatch", [])
    assert str(model) in found.state["message"]


def test_an_altered_runtime_is_never_loaded(board: Path) -> None:
    library = board / "libLiteRt.so"
    library.write_bytes(b"\x7fELF" + bytes(100))
    right = item(library)
    library.write_bytes(b"\x7fELF" + bytes(99) + b"\1")
    found = run(make_job(board, runtime={**right, "version": "2.3.0", "glibc": "2.27"}))
    assert found.code == 65
    assert right["sha256"] in found.state["message"]


def test_a_work_folder_that_is_not_there_is_code_71(board: Path) -> None:
    job_dir = make_job(board)
    change_job(job_dir, work_dir=str(board / "absent"))
    assert run(job_dir).code == 71


def test_a_full_disk_is_found_before_anything_runs(board: Path) -> None:
    reply = call("start", make_job(board, min_free_bytes=2**60))
    assert (reply["code"], reply["error"]) == (73, "disk-full")
    assert not (board / "jobs" / "job-1" / "state.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A board whose file system has 600 KiB, nearly half of it for the ballast."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with ending_jobs(folder):
            yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(512))
    return path


def test_a_disk_without_room_for_the_last_word_is_code_73(small_disk: Path) -> None:
    job_dir = make_job(small_disk)
    fill(small_disk)
    reply = call("start", job_dir)
    assert (reply["code"], reply["error"]) == (73, "disk-full")


def test_a_disk_that_fills_up_costs_no_session_and_no_last_word(small_disk: Path) -> None:
    job_dir = make_job(small_disk, plan=plan("memory", "latency", "latency"), session_s=1)
    call("start", job_dir)
    worker_of(job_dir, "latency-1")
    filler = fill(small_disk)
    found = outcome(job_dir)
    assert (found.code, found.state["phase"], found.state["error"]) == (73, "failed", "disk-full")
    assert found.tags == ["memory-1", "latency-1"]  # the second found room where the ballast was
    filler.unlink()
    again = run(job_dir)
    assert (again.code, again.tags) == (0, ["memory-1", "latency-1", "latency-2"])


def test_a_line_that_does_not_fit_leaves_no_part_of_it(small_disk: Path) -> None:
    journal = payload_module("journal").Journal(str(small_disk))
    journal.append({"kind": "start"})
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        journal.append({"kind": "session", "data": "x" * 100_000})
    assert lines_of((small_disk / "results.jsonl").read_text()) == [{"kind": "start"}]


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_what_follows_damage_is_measured_again(board: Path, at: float) -> None:
    job_dir = make_job(board, plan=plan("memory", "memory"))
    before = run(job_dir)
    journal = job_dir / "results.jsonl"
    raw = bytearray(journal.read_bytes())
    raw[int(at * len(raw))] ^= 0x10
    journal.write_bytes(raw)
    whole = lines_of(call("status", job_dir, 0)["journal"])
    assert whole == before.lines[: len(whole)]
    assert len(whole) < len(before.lines)
    after = run(job_dir)
    assert (after.code, after.tags) == (0, ["memory-1", "memory-2"])
    assert after.lines[: len(whole)] == whole


RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["kind", "tag", "data"]), st.integers() | st.text(max_size=8)),
    max_size=4,
)


@given(
    records=RECORDS,
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=3),
)
def test_a_damaged_journal_yields_only_what_was_written(
    records: list[Any], cut: int, flips: list[tuple[int, int]]
) -> None:
    journal = payload_module("journal")
    whole = b"".join(map(journal.encode, records))
    assert journal.trusted(whole) == (records, len(whole))
    damaged = bytearray(whole[: max(0, len(whole) - cut)])
    for at, bits in flips:
        if at < len(damaged):
            damaged[at] ^= bits
    found, length = journal.trusted(bytes(damaged))
    assert found == records[: len(found)]
    assert damaged[:length] == whole[:length]


# ------------------------------------------------------------------------------ memory


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes have 50 MB together."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"edgepipe-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text("50000000")
            (group / "cgroup.procs").stat()
        except OSError:
            group.rmdir()
            continue
        break
    else:
        pytest.skip("no memory control group can be made here")
    yield group
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_model_that_does_not_fit_into_memory_is_data(board: Path, small_memory: Path) -> None:
    # XNNPACK packs the weights of each of the 64 layers by itself: 64 MiB
    model = tiny_tflite(size=512, layers=64)
    job_dir = make_job(board, model, plan=plan("memory", "latency"), backend="litert-c")
    inside = f"echo $$ > {small_memory}/cgroup.procs; exec '{sys.executable}' '{AGENT}' start '{job_dir}'"
    subprocess.run(["/bin/sh", "-c", inside], check=True, capture_output=True)
    found = outcome(job_dir)
    assert (found.code, found.state["runs_on_device"]) == (70, False)
    assert found.state["cause"]["what"] == "out-of-memory"
    assert len(found.sessions) == 1  # not tried again


def test_an_out_of_memory_kill_is_told_from_any_other(board: Path, sysroot: SysRoot) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60)
    call("start", job_dir)
    worker = held_worker(job_dir, "latency-1")
    sysroot.set(oom_kills=3)
    os.kill(worker, signal.SIGKILL)
    found = outcome(job_dir)
    assert (found.code, found.state["runs_on_device"]) == (70, False)
    assert found.state["cause"]["what"] == "out-of-memory"


# ------------------------------------------------------------------------------ time


@pytest.mark.parametrize("kinds", [(), ("memory",)])
def test_a_budget_that_ends_in_the_self_test_blames_no_runtime(
    board: Path, kinds: tuple[str, ...]
) -> None:
    found = run(make_job(board, budget_s=0.01, plan=plan("memory", *kinds)))
    assert (found.code, found.state["error"]) == (124, "budget")


def test_the_time_budget_is_kept_on_the_board(board: Path) -> None:
    job_dir = make_job(board, plan=plan("memory", "latency"), session_s=600, budget_s=3)
    found = run(job_dir)
    assert (found.code, found.state["error"], found.tags) == (124, "budget", ["memory-1"])
    assert found.sessions[-1]["cause"]["what"] == "timeout"


def test_a_jump_of_the_clock_is_seen_and_ends_nothing(board: Path) -> None:
    jumps = (
        "import os, time\n"
        "real = time.time\n"
        f"time.time = lambda: real() + 3600 * os.path.exists({str(board / 'jump')!r})\n"
    )
    job_dir = make_job(board, plan=plan("latency", "memory"), session_s=1)
    call("start", job_dir, **python_that(board / "site", jumps))
    worker_of(job_dir, "latency-1")
    (board / "jump").touch()
    found = outcome(job_dir)
    assert (found.code, found.tags) == (0, ["latency-1", "memory-1"])
    assert ["clock_jump" in session["flags"] for session in found.sessions] == [True, False]


def test_a_reboot_voids_what_was_measured_before(board: Path, sysroot: SysRoot) -> None:
    job_dir = make_job(board)
    run(job_dir)
    sysroot.set(boot_id="boot-2")
    status = call("status", job_dir, 0)
    assert (status["rebooted"], status["alive"]) == (True, False)
    found = run(job_dir)
    assert found.tags == ["memory-1", "memory-1"]
    assert found.state["boot_id"] == "boot-2"


def test_a_supervisor_that_finds_itself_on_a_rebooted_board_ends(
    board: Path, sysroot: SysRoot
) -> None:
    job_dir = make_job(board, plan=plan("latency", "memory"), session_s=1)
    call("start", job_dir)
    worker_of(job_dir, "latency-1")
    sysroot.set(boot_id="boot-2")
    assert wait_for(lambda: state_of(job_dir).get("code")) == 76
    sessions = [line["session"] for line in outcome_lines(job_dir) if line["kind"] == "session"]
    assert ["rebooted" in session["flags"] for session in sessions] == [True]


def test_start_puts_a_supervisor_of_another_boot_aside(board: Path, sysroot: SysRoot) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60)
    old = call("start", job_dir)["state"]["pid"]
    worker_of(job_dir, "latency-1")
    sysroot.set(boot_id="boot-2")
    status = call("status", job_dir, 0)
    assert (status["rebooted"], status["alive"]) == (True, False)
    new = call("start", job_dir)["state"]
    assert (new["boot_id"], is_gone(old)) == ("boot-2", True)


# ------------------------------------------------------------------------------ heat, power


def test_throttling_in_a_session_is_flagged_in_that_session(board: Path, sysroot: SysRoot) -> None:
    job_dir = make_job(board, plan=plan("latency", "latency"), session_s=1)
    call("start", job_dir)
    worker_of(job_dir, "latency-1")
    sysroot.set(throttled="40004")
    wait_for(lambda: state_of(job_dir).get("tag") == "latency-2")
    sysroot.set(throttled="40000")
    found = outcome(job_dir)
    flags = [session["flags"] for session in found.sessions]
    assert flags == [["throttle_event", "throttled_now"], []]
    assert found.code == 0


def supervisor_of(job_dir: Path, sysroot: SysRoot, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The supervisor of a job, in this process."""
    monkeypatch.setattr(payload_module("sysfs"), "SYSROOT", str(sysroot.folder))
    supervisor = payload_module("supervisor").Supervisor(str(job_dir))
    supervisor.job = payload_module("job").load_job(str(job_dir))
    return supervisor


def test_throttling_that_comes_and_goes_is_seen_by_the_heartbeat(
    board: Path, sysroot: SysRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervisor_of(make_job(board), sysroot, monkeypatch)
    supervisor.tick()
    assert supervisor.flags == set()
    supervisor.next_beat = 0.0
    sysroot.set(throttled="4")
    supervisor.tick()
    assert supervisor.flags == {"throttled_now"}
    assert state_of(board / "jobs" / "job-1")["phase"] == "starting"


def test_a_board_that_gets_too_hot_in_a_session_stops_it(
    board: Path, sysroot: SysRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_dir = make_job(board, abort_above_c=85)
    supervisor = supervisor_of(job_dir, sysroot, monkeypatch)
    sysroot.set(temperature_c=86)
    with pytest.raises(payload_module("job").Stop, match=r"86\.0 C") as stop:
        supervisor.tick()
    assert stop.value.code == 78


def test_a_session_starts_once_the_board_is_cool(board: Path, sysroot: SysRoot) -> None:
    sysroot.set(temperature_c=70)
    job_dir = make_job(board, start_below_c=60, cool_down_s=60)
    call("start", job_dir)
    wait_for(lambda: state_of(job_dir).get("phase") == "cooling")
    sysroot.set(temperature_c=59)
    found = outcome(job_dir)
    assert (found.code, found.sessions[0]["before"]["temperature_c"]) == (0, 59)


def test_a_board_that_stays_hot_is_code_78(board: Path, sysroot: SysRoot) -> None:
    sysroot.set(temperature_c=70)
    found = run(make_job(board, start_below_c=60, cool_down_s=0.2))
    assert (found.code, found.state["error"], found.sessions) == (78, "too-hot", [])


@pytest.mark.parametrize(("zones", "code"), [(["cpu-thermal"], 0), (["cpu-thermal", "battery"], 78), ([], 78)])  # fmt: skip
def test_only_the_thermal_zones_that_a_job_names_are_watched(
    board: Path, sysroot: SysRoot, zones: object, code: int
) -> None:
    sysroot.set(temperature_c=40)
    sysroot.write("sys/class/thermal/thermal_zone1/type", "battery")
    sysroot.write("sys/class/thermal/thermal_zone1/temp", 90000)
    job = make_job(board, start_below_c=60, cool_down_s=0.2, abort_above_c=80, thermal_zones=zones)
    assert run(job).code == code
    change_job(job, thermal_zones=7)
    assert call("start", job)["code"] == 64


def test_a_board_too_hot_after_a_session_keeps_the_session(board: Path, sysroot: SysRoot) -> None:
    job_dir = make_job(board, plan=plan("latency", "memory"), session_s=1, abort_above_c=85)
    call("start", job_dir)
    worker_of(job_dir, "latency-1")
    sysroot.set(temperature_c=86)
    found = outcome(job_dir)
    assert (found.code, found.state["error"], found.tags) == (78, "too-hot", ["latency-1"])


# ------------------------------------------------------------------------------ ends of the journal


def test_the_journal_tells_the_same_end_as_the_state(board: Path) -> None:
    found = run(make_job(board, affinity=[8000]))
    last = outcome_lines(board / "jobs" / "job-1")[-1]
    for key in ("code", "error", "message", "runs_on_device"):
        assert last[key] == found.state[key]
