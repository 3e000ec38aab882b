"""The payload's agent, `targets/linux/agent.py`: jobs carried out by real processes."""

from __future__ import annotations

import fcntl
import json
import platform
import struct
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.runtime import runtime_library
from edgepipe.tflite_ops.tiny import crashing_tflite, stateful_tflite, tiny_tflite

from .board_side import (
    AGENT,
    bucket_files,
    bucket_samples,
    call,
    change_job,
    ending_jobs,
    item,
    make_job,
    merged_file,
    outcome,
    payload_module,
    plan,
    run,
    worker_of,
)

pytestmark = pytest.mark.slow  # real processes and trainings: not for the inner loop


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Path]:
    """The work folder of a board."""
    with ending_jobs(tmp_path):
        yield tmp_path


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


# ------------------------------------------------------------------------------ a job


def test_a_job_is_started_watched_and_ended(board: Path) -> None:
    job_dir = make_job(board, plan=plan("memory", "latency"))
    started = call("start", job_dir)
    assert (started["code"], started["state"]["job"]) == (0, "job-1")
    found = outcome(job_dir)
    assert (found.code, found.state["phase"], found.state["sessions_done"]) == (0, "done", 2)
    assert [line["kind"] for line in found.lines] == ["start", "session", "session", "end"]
    assert found.lines[-1]["runs_on_device"] is True
    assert found.start["runtime"]["backend"] == "litert-c"
    assert len(found.start["runtime"]["sha256"]) == 64
    assert found.tags == ["memory-1", "latency-1"]
    assert found.sessions[0]["before"]["boot_id"] == found.start["device"]["boot_id"]
    assert found.state["journal_bytes"] == (job_dir / "results.jsonl").stat().st_size
    assert call("end", job_dir)["code"] == 0
    assert sorted(path.name for path in board.iterdir()) == ["jobs", "lock", "model.tflite"]
    assert not job_dir.exists()
    assert (board / "lock").read_text() == ""


def test_each_arm_of_a_latency_session_has_its_cold_load(board: Path) -> None:
    model = item(make_job(board) / "../../model.tflite")
    both = [{"tag": "latency-1", "kind": "latency", "arms": ["base", "candidate"]}]
    job_dir = make_job(board, models={"base": model, "candidate": model}, plan=both)
    (session,) = run(job_dir).sessions
    assert sorted(session["data"]["arms"]) == ["base", "candidate"]
    for arm in session["data"]["arms"].values():
        assert arm["cold"]["load_ns"] > 0


def test_start_returns_while_the_job_runs(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60)
    assert call("start", job_dir)["state"]["phase"] in ("starting", "running")
    assert call("status", job_dir, 0)["alive"]


def test_a_second_start_finds_the_job_at_work(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60)
    first = call("start", job_dir)["state"]["pid"]
    assert call("start", job_dir)["state"]["pid"] == first


def test_two_starts_at_once_make_one_supervisor(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60)
    both = [
        subprocess.Popen([sys.executable, AGENT, "start", job_dir], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    replies = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert [reply["code"] for reply in replies] == [0, 0]
    assert replies[0]["state"]["pid"] == replies[1]["state"]["pid"]


def test_a_longer_plan_runs_only_what_is_new(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency", "memory"))
    first = run(job_dir)
    change_job(job_dir, plan=plan("latency", "memory", "latency"), budget_s=30)
    second = run(job_dir)
    assert second.tags == ["latency-1", "memory-1", "latency-2"]
    assert second.lines[: len(first.lines)] == first.lines
    assert second.state["sessions_done"] == 3


def test_a_job_that_runs_is_made_longer(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=1)
    pid = call("start", job_dir)["state"]["pid"]
    change_job(job_dir, plan=plan("latency", "memory"))
    assert call("start", job_dir)["state"]["pid"] == pid
    assert outcome(job_dir).tags == ["latency-1", "memory-1"]


def test_another_question_keeps_no_answer(board: Path) -> None:
    job_dir = make_job(board)
    run(job_dir)
    change_job(job_dir, seed=1)
    assert run(job_dir).tags == ["memory-1", "memory-1"]


def test_a_finished_job_started_again_measures_nothing(board: Path) -> None:
    job_dir = make_job(board)
    first = run(job_dir)
    again = run(job_dir)
    assert (again.code, again.tags) == (0, first.tags)


def test_the_chosen_runtime_is_kept_for_the_rest_of_a_job(board: Path) -> None:
    """Sessions of one job are never of two runtimes, though the choice is made by trying."""
    job_dir = make_job(board, stateful_tflite())
    assert run(job_dir).start["runtime"]["backend"] == "litert-interpreter"
    change_job(job_dir, plan=plan("memory", "memory"))
    again = run(job_dir)
    assert again.start["runtime"]["backend"] == "litert-interpreter"
    starts = [line["runtime"]["backend"] for line in again.lines if line["kind"] == "start"]
    assert starts == ["litert-c", "litert-interpreter", "litert-interpreter"]


def test_a_runtime_installed_anew_voids_what_the_old_one_measured(board: Path) -> None:
    package = board / "site" / "tflite_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "interpreter.py").write_text("from ai_edge_litert.interpreter import *")
    old = package.parent / "tflite_runtime-2.14.0.dist-info"
    old.mkdir()
    job_dir = make_job(board, backend="tflite-runtime-interpreter")
    environment = {"PYTHONPATH": str(package.parent)}
    runtime = run(job_dir, **environment).start["runtime"]
    assert (runtime["name"], runtime["version"]) == ("tflite-runtime", "2.14.0")
    assert run(job_dir, **environment).tags == ["memory-1"]
    old.rename(package.parent / "tflite_runtime-2.17.0.dist-info")
    again = run(job_dir, **environment)
    assert (again.tags, again.start["runtime"]["version"]) == (["memory-1"] * 2, "2.17.0")


def test_start_waits_for_a_supervisor_that_is_about_to_exit(board: Path) -> None:
    job_dir = make_job(board)
    state = run(job_dir).state
    change_job(job_dir, plan=plan("memory", "memory"))
    with (job_dir / "lock").open("w") as stream:  # as between its last state and its exit
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(str(state["pid"]))
        stream.flush()
        process = subprocess.Popen([sys.executable, AGENT, "start", job_dir], stdout=-1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    reply = json.loads(process.communicate(timeout=60)[0])
    assert reply["state"]["pid"] != state["pid"]
    assert outcome(job_dir).tags == ["memory-1", "memory-2"]


def test_status_waits_for_news_and_gives_what_is_beyond_the_offset(board: Path) -> None:
    job_dir = make_job(board, plan=plan("memory", "latency"), session_s=2)
    call("start", job_dir)
    first = call("status", job_dir, 0, 60)
    assert first["journal"]
    second = call("status", job_dir, first["offset"], 60)
    assert second["from"] == first["offset"]
    assert (
        first["journal"] + second["journal"]
        == ((job_dir / "results.jsonl").read_text()[: second["offset"]])
    )


def test_status_beyond_the_journal_begins_anew(board: Path) -> None:
    job_dir = make_job(board)
    run(job_dir)
    whole = (job_dir / "results.jsonl").read_text()
    for offset in (len(whole) + 1, 5, -1):
        reply = call("status", job_dir, offset)
        assert (reply["from"], reply["journal"]) == (0, whole)
    reply = call("status", job_dir, len(whole))
    assert (reply["from"], reply["journal"], reply["offset"]) == (len(whole), "", len(whole))


def test_a_line_longer_than_a_reply_comes_whole(board: Path) -> None:
    journal = payload_module("journal")
    (board / "results.jsonl").write_bytes(journal.encode({"kind": "x", "text": "y" * 1000}))
    offset, text = journal.read_from(str(board), 0, 100)
    assert (offset, len(text)) == (0, (board / "results.jsonl").stat().st_size)


def test_status_of_no_job_is_code_76(board: Path) -> None:
    reply = call("status", board / "jobs" / "none", 0)
    assert (reply["code"], reply["state"]) == (76, None)


def test_end_stops_supervisor_and_worker_and_frees_the_board(board: Path) -> None:
    job_dir = make_job(board, plan=plan("latency"), session_s=60, lease_s=30)
    pid = call("start", job_dir)["state"]["pid"]
    worker = worker_of(job_dir, "latency-1")
    assert call("end", job_dir)["code"] == 0
    for process in (pid, worker):
        assert not Path(f"/proc/{process}/exe").exists()
    assert not job_dir.exists()
    assert run(make_job(board, id="job-2")).code == 0


def test_end_keeps_the_files_on_request(board: Path) -> None:
    job_dir = make_job(board)
    run(job_dir)
    assert call("end", job_dir, "--keep")["state"]["phase"] == "done"
    assert (job_dir / "results.jsonl").exists()


def test_end_of_nothing_is_fine(board: Path) -> None:
    assert call("end", board / "jobs" / "none")["code"] == 0
    (board / "jobs" / "empty").mkdir(parents=True)
    assert call("end", board / "jobs" / "empty")["code"] == 0
    assert not (board / "jobs" / "empty").exists()


def test_end_removes_no_folder_that_is_not_a_jobs(board: Path) -> None:
    (board / "photos").mkdir()
    assert call("end", board / "photos")["code"] == 64
    assert (board / "photos").exists()


def test_end_leaves_the_lease_of_another_job(board: Path) -> None:
    mine, other = make_job(board, lease_s=30), make_job(board, id="job-2")
    run(mine)
    assert call("end", other)["code"] == 0
    assert json.loads((board / "lock").read_text())["job"] == "job-1"


# ------------------------------------------------------------------------------ what a job may ask


def test_an_unknown_key_in_a_job_is_refused(board: Path) -> None:
    reply = call("start", make_job(board, tempo=3))
    assert (reply["code"], "unknown key tempo" in reply["message"]) == (64, True)


def test_a_job_of_another_schema_is_refused(board: Path) -> None:
    assert call("start", make_job(board, schema=3))["code"] == 64


def test_no_job_is_code_64_and_makes_no_file(board: Path) -> None:
    (board / "jobs" / "empty").mkdir(parents=True)
    assert call("start", board / "jobs" / "empty")["code"] == 64
    assert list((board / "jobs" / "empty").iterdir()) == []


def test_a_job_runs_the_signature_that_it_names(board: Path) -> None:
    own, inputs = bucket_files()["length16"], bucket_samples(board, "length16")
    found = []
    for number, (content, key) in enumerate(((merged_file(), "length16"), (own, ""))):
        job_dir = make_job(board, content, id=f"job-{number}", inputs=inputs, plan=plan("outputs", "latency"))  # fmt: skip
        change_job(job_dir, models={"model": {**item(board / "model.tflite"), "signature": key}})
        outputs, latency = run(job_dir).sessions
        found.append((outputs["data"]["sha256"], latency["data"]["arms"]["model"]["output_sha256"]))
    assert found[0] == found[1]


def test_a_signature_that_is_no_text_is_refused(board: Path) -> None:
    job, job_dir = payload_module("job"), make_job(board)
    change_job(job_dir, models={"model": {**item(board / "model.tflite"), "signature": 3}})
    with pytest.raises(job.Stop, match=r"models\.model\.signature is 3"):
        job.load_job(str(job_dir))


@pytest.mark.parametrize(
    "entry",
    [
        {"tag": "a", "kind": "sing", "arms": ["model"]},
        {"tag": "a/b", "kind": "memory", "arms": ["model"]},
        {"tag": "a", "kind": "memory", "arms": []},
        {"tag": "a", "kind": "memory", "arms": ["candidate"]},
        {"tag": "a", "kind": "sustained", "arms": ["model"]},
        {"tag": "a", "kind": "sustained", "arms": ["model"], "duration_s": True},
        {"tag": "a", "kind": "outputs", "arms": ["model"]},
        {"kind": "memory", "arms": ["model"]},
    ],
)
def test_a_plan_that_cannot_be_is_refused(board: Path, entry: Any) -> None:
    job, job_dir = payload_module("job"), make_job(board, plan=[entry])
    with pytest.raises(job.Stop) as stop:
        job.load_job(str(job_dir))
    assert stop.value.code == 64


def test_a_tag_is_there_once(board: Path) -> None:
    job, job_dir = payload_module("job"), make_job(board, plan=plan("memory") * 2)
    with pytest.raises(job.Stop, match="twice"):
        job.load_job(str(job_dir))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
KEYS = ["models", "runtime", "inputs", "plan", "threads", "id", "start_below_c", "weight_cache"]


@given(key=st.sampled_from(KEYS), value=JSON)
@settings(deadline=None)  # it writes a file
def test_a_job_is_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    job = payload_module("job")
    job_dir = make_job(tmp_path_factory.mktemp("job"))
    change_job(job_dir, **{key: value})
    try:
        found = job.load_job(str(job_dir))
    except job.Stop as stop:
        assert stop.code == 64  # noqa: PT017
    else:
        assert found[key] == value


@given(
    first=st.dictionaries(st.sampled_from(["seed", "plan", "budget_s", "threads"]), st.integers()),
    second=st.dictionaries(st.sampled_from(["seed", "plan", "budget_s", "threads"]), st.integers()),
)
def test_the_identity_of_a_job_is_all_but_how_much_is_asked(
    first: dict[str, int], second: dict[str, int]
) -> None:
    def question(job: dict[str, int]) -> dict[str, int]:
        return {key: job[key] for key in job if key not in ("plan", "budget_s")}

    identity = payload_module("job").identity
    assert (identity(first) == identity(second)) == (question(first) == question(second))


# ------------------------------------------------------------------------------ the lease


def test_a_second_job_is_told_who_holds_the_board(board: Path) -> None:
    pid = call("start", make_job(board, plan=plan("latency"), session_s=60))["state"]["pid"]
    second = make_job(board, id="job-2")
    reply = call("start", second)
    assert (reply["code"], reply["error"]) == (75, "busy")
    assert (reply["owner"]["job"], reply["owner"]["pid"]) == ("job-1", pid)
    assert call("status", second, 0)["state"]["owner"]["job"] == "job-1"


def test_the_lease_holds_between_two_calls_of_one_job(board: Path) -> None:
    mine, other = make_job(board, lease_s=30), make_job(board, id="job-2")
    assert run(mine).code == 0
    reply = call("start", other)
    assert (reply["code"], reply["owner"]["job"]) == (75, "job-1")
    assert run(mine).code == 0
    call("end", mine)
    assert run(other).code == 0


def test_a_lease_from_before_a_reboot_is_void(board: Path) -> None:
    run(make_job(board, lease_s=30))
    lock = board / "lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"boot_id": "another"}))
    assert run(make_job(board, id="job-2")).code == 0


def test_an_expired_lease_is_void(board: Path) -> None:
    run(make_job(board, lease_s=-1))
    assert run(make_job(board, id="job-2")).code == 0


def test_a_lease_file_of_garbage_is_void(board: Path) -> None:
    (board / "lock").write_text("[1, 2")
    assert run(make_job(board)).code == 0


def test_the_lock_is_an_flock_on_the_lease_file(board: Path) -> None:
    with (board / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert call("start", make_job(board))["code"] == 75


# ------------------------------------------------------------------------------ runtimes


def test_a_model_one_backend_does_not_support_goes_to_the_next(board: Path) -> None:
    """LiteRT 2.3.0: "Variable tensors not yet supported" by the C API."""
    found = run(make_job(board, stateful_tflite()))
    assert (found.code, found.start["runtime"]["backend"]) == (0, "litert-interpreter")
    (reason,) = [r["reason"] for r in found.start["rejected"] if r["backend"] == "litert-c"]
    assert "Variable tensors" in reason
    assert found.tags == ["memory-1"]


def test_a_model_no_backend_supports_is_not_the_models_fault(board: Path, bare_python: str) -> None:
    found = run(make_job(board, stateful_tflite()), python=bare_python)
    assert (found.code, found.state["runs_on_device"]) == (69, None)
    assert "Variable tensors" in found.state["message"]


def test_a_board_without_any_runtime_says_what_it_lacks(board: Path, bare_python: str) -> None:
    found = run(make_job(board, runtime=None), python=bare_python)
    assert (found.code, found.state["error"]) == (69, "no-runtime")
    for lack in ("no libLiteRt.so was pushed", "has no ai_edge_litert", "has no tflite_runtime"):
        assert lack in found.state["message"]


def test_a_bare_python_measures_with_a_pushed_library(board: Path, bare_python: str) -> None:
    found = run(make_job(board, plan=plan("latency")), python=bare_python)
    assert (found.code, found.start["runtime"]["backend"]) == (0, "litert-c")


def pushed(path: Path, content: bytes = b"", **changes: Any) -> dict[str, Any]:
    if content:
        path.write_bytes(content)
    return {**item(path), "version": "2.3.0", "glibc": "2.27"} | changes


# ELF, 64 bit, little endian, shared object, e_machine 40 = ARM (32 bit)
ARM_LIBRARY = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 3, 40) + bytes(44)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"glibc": "99.1"}, "needs glibc 99.1"),
        ({"version": "2.1.5"}, "2.1.6 or newer is needed"),
    ],
)
def test_a_library_this_board_cannot_hold_is_not_loaded(
    board: Path, bare_python: str, changes: dict[str, str], reason: str
) -> None:
    wrong = pushed(runtime_library(platform.machine()).path, **changes)
    found = run(make_job(board, runtime=wrong), python=bare_python)
    assert found.code == 69
    assert reason in found.state["message"]


def test_a_library_for_another_machine_is_not_loaded(board: Path, bare_python: str) -> None:
    wrong = pushed(board / "libLiteRt.so", ARM_LIBRARY)
    found = run(make_job(board, runtime=wrong), python=bare_python)
    assert found.code == 69
    expected = f"the library is for armv7l, this process is {platform.machine()}"
    assert expected in found.state["message"]


def test_a_library_that_kills_its_process_is_rejected(board: Path, bare_python: str) -> None:
    """A file with the right ELF header and nothing behind it: only a worker opens it."""
    good = runtime_library(platform.machine()).path.read_bytes()
    wrong = pushed(board / "libLiteRt.so", good[:4096])
    found = run(make_job(board, runtime=wrong), python=bare_python)
    assert (found.code, "litert-c" in found.state["message"]) == (69, True)


def test_the_next_backend_is_tried_and_the_record_says_so(board: Path) -> None:
    wrong = pushed(board / "libLiteRt.so", ARM_LIBRARY)
    found = run(make_job(board, runtime=wrong))
    assert (found.code, found.start["runtime"]["backend"]) == (0, "litert-interpreter")
    (reason,) = [r["reason"] for r in found.start["rejected"] if r["backend"] == "litert-c"]
    assert "armv7l" in reason


def test_a_demanded_backend_is_not_replaced(board: Path) -> None:
    found = run(make_job(board, runtime=None, backend="litert-c"))
    assert found.code == 69
    assert "litert-interpreter" not in found.state["message"]


# ------------------------------------------------------------------------------ what is the model's


def test_a_model_that_crashes_is_data(board: Path) -> None:
    found = run(make_job(board, crashing_tflite(), backend="litert-c"))
    assert (found.code, found.state["runs_on_device"]) == (70, False)
    assert (found.state["cause"]["what"], found.state["cause"]["signal"]) == ("crash", 11)
    assert "SIGSEGV" in found.state["message"]
    assert "Segmentation fault" in found.state["cause"]["stderr"]
    assert found.lines[-1]["runs_on_device"] is False


def test_a_model_that_is_refused_is_data_with_the_runtimes_reason(board: Path) -> None:
    damaged = bytearray(tiny_tflite())
    damaged[:4] = b"\xff\xff\xff\x7f"  # the root table lies far outside the file
    found = run(make_job(board, bytes(damaged), backend="litert-c"))
    assert (found.code, found.state["runs_on_device"]) == (70, False)
    assert "LiteRtCreateModelFromFile" in found.state["message"]


def test_a_cpu_that_is_not_there_says_nothing_of_the_model(board: Path) -> None:
    found = run(make_job(board, affinity=[8000]))
    assert (found.code, found.state["error"]) == (64, "bad-request")
    assert found.state["runs_on_device"] is None


def test_what_a_backend_cannot_profile_stops_nothing(board: Path) -> None:
    found = run(make_job(board, plan=plan("ops", "memory"), backend="litert-interpreter"))
    assert (found.code, found.tags, found.state["sessions_done"]) == (0, ["memory-1"], 2)
    assert found.sessions[0]["cause"]["what"] == "unsupported"


# ------------------------------------------------------------------------------ health

PI = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "81200",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "2",
    "sys/class/hwmon/hwmon1/name": "rpi_volt",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
    "sys/devices/system/cpu/cpufreq/policy0/related_cpus": "0 1 2 3",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "600000",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1500000",
    "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1800000",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.1\0",
    "proc/loadavg": "0.50 0.40 0.30 3/200 1234",
    "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=4711\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=12",
    "proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 3000000 kB\nSwapTotal: 100 kB\nSwapFree: 40 kB\n",
    "proc/vmstat": "nr_free_pages 1\npswpin 7\noom_kill 2\n",
}  # fmt: skip


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    for name, text in PI.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_health_of_a_hot_raspberry_pi(pi: Path) -> None:
    reply = call("facts", "/tmp", EDGEPIPE_SYSROOT=str(pi))
    assert reply["device"]["model"] == "Raspberry Pi 4 Model B Rev 1.1"
    health = reply["health"]
    assert health["temperature_c"] == 81.2
    assert health["governor"] == "ondemand"
    assert health["throttling"] == [
        "under_voltage", "throttled", "under_voltage_occurred", "throttled_occurred",
    ]  # fmt: skip
    assert health["under_voltage_alarm"] == 1
    assert (health["loadavg_1min"], health["runnable"]) == (0.5, 3)
    assert health["pressure_us"] == {"cpu": 4711, "memory": None, "io": None}
    assert health["memory_available_bytes"] == 3_000_000 * 1024
    assert health["swap_used_bytes"] == 60 * 1024
    assert (health["pages_swapped_in"], health["oom_kills"]) == (7, 2)


def test_a_board_that_says_nothing_is_not_a_healthy_one(tmp_path: Path) -> None:
    health = call("facts", "/tmp", EDGEPIPE_SYSROOT=str(tmp_path))["health"]
    for key in (
        "temperature_c", "throttling", "governor", "loadavg_1min", "runnable", "pages_swapped_in",
        "under_voltage_alarm", "oom_kills",
    ):  # fmt: skip
        assert health[key] is None


def calm(**changes: Any) -> dict[str, Any]:
    return {
        "realtime_s": 1000.0, "monotonic_s": 10.0, "boot_id": "a", "throttling": [], "cooling": {},
        "frequencies": {}, "pages_swapped_in": 0, "under_voltage_alarm": 0,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("after", "flags"),
    [
        ({}, []),
        ({"realtime_s": 1003.0, "monotonic_s": 13.0}, []),
        ({"realtime_s": 4600.0, "monotonic_s": 13.0}, ["clock_jump"]),
        ({"pages_swapped_in": 1}, ["swapped_in"]),
        ({"boot_id": "b"}, ["rebooted"]),
        ({"throttling": ["throttled"]}, ["throttle_event", "throttled_now"]),
        ({"throttling": ["throttled_occurred"]}, ["throttle_event"]),
        ({"under_voltage_alarm": 1}, ["under_voltage"]),
        ({"cooling": {"cooling_device0:pwm-fan": 3}}, []),
        ({"cooling": {"cooling_device0:cpu": 3}}, ["cooling_rose"]),
        (
            {"frequencies": {"policy0": {"limit_khz": 1, "hardware_limit_khz": 2}}},
            ["frequency_capped"],
        ),
    ],
)
def test_flags_say_what_happened_to_the_board(after: dict[str, Any], flags: list[str]) -> None:
    assert payload_module("board").health_flags(calm(), calm(**after)) == flags


def test_throttling_before_the_session_is_no_event_in_it() -> None:
    old = calm(throttling=["throttled_occurred"])
    assert payload_module("board").health_flags(old, old) == []
