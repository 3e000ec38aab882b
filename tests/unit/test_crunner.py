"""The C runner for boards without Python: what it measures, what it survives, how it is made."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import crunner, toolchain
from edgepipe.crunner import CBoard, Compiled, CRunnerJob, compile_runner, elf_machine
from edgepipe.device import snapshot
from edgepipe.device.local import LocalDevice
from edgepipe.device.parse_android import android_facts
from edgepipe.errors import (
    Busy,
    CommandTimeout,
    MissingExtra,
    NotReadyError,
    NotStable,
    TransferError,
)
from edgepipe.job import session_problem
from edgepipe.payload import Payload
from edgepipe.tflite_ops.tiny import crashing_tflite, stateful_tflite, tiny_tflite
from tests.unit.board_side import (
    TARGET,
    branching_tflite,
    bucket_files,
    bucket_samples,
    children_of,
    is_gone,
    item,
    library,
    merged_file,
    one_counts,
    payload_module,
    wait_for,
)

pytestmark = pytest.mark.slow

Reply = dict[str, Any]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "boards"
SLOW_S = 30.0  # a session that must not end by itself


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The runner for this machine, by this machine's cc."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) on this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path_factory.mktemp("toolchains")))
        return compile_runner(TARGET / "runner.c", platform.machine())


@pytest.fixture
def board(compiled: Compiled, tmp_path: Path) -> CBoard:
    """This machine as a board without Python, whose work folder is the test's."""
    payload = Payload(str(compiled.path.parent), str(compiled.path), "", compiled.sha256)
    return CBoard(LocalDevice(), str(tmp_path), payload, compiled.compiler, str(TARGET / "self_test.tflite"))  # fmt: skip


def words(board: CBoard, model: Path, **changes: Any) -> list[str]:
    """A session of one arm that takes a fraction of a second; ``changes`` replace its keys."""
    job_dir = Path(board.work_dir) / "job"
    job_dir.mkdir(exist_ok=True)
    runtime, own = changes.pop("library", library()), item(model)
    given: dict[str, Any] = {
        "id": "job-1", "owner": "test", "work_dir": board.work_dir, "job_dir": job_dir, "tag": "t-1",
        "kind": "latency", "runtime": runtime["path"], "runtime_size": runtime["size"],
        "runtime_sha256": runtime["sha256"], "self_test": board.self_test, "warmup_s": 0.02,
        "session_s": 0.05, "min_inferences": 30, "limit_s": 60, "lease_s": 0,
        "arm": "model", "model": own["path"], "size": own["size"], "sha256": own["sha256"],
    } | changes  # fmt: skip
    return [
        board.payload.entry,
        "session",
        *(f"{k}={v}" for k, v in given.items() if v is not None),
    ]


def call(argv: list[str]) -> Reply:
    done = subprocess.run(argv, capture_output=True, timeout=120)
    reply: Reply = json.loads(done.stdout.decode("utf-8", "replace"))  # a runtime logs any bytes
    assert reply["code"] == done.returncode
    return reply


def write(folder: Path, data: bytes, name: str = "m.tflite") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path, tiny_tflite())


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 MB of weights, of which XNNPACK makes a packed copy."""
    return write(tmp_path_factory.mktemp("large"), tiny_tflite(size=500), "large.tflite")


# ------------------------------------------------------------------------------ what it measures


def test_two_models_are_timed_in_the_same_rounds(board: CBoard, tiny: Path, tmp_path: Path) -> None:
    slower = write(tmp_path, tiny_tflite(size=64, layers=9), "slower.tflite")
    base, candidate = item(tiny), item(slower)
    argv = words(board, tiny, arm="base", order_seed=5)
    argv += [f"{k}={v}" for k, v in (("arm", "candidate"), ("model", slower), ("size", candidate["size"]), ("sha256", candidate["sha256"]))]  # fmt: skip
    session = crunner._session(call(argv))
    assert session_problem(session) == ""
    data = session["data"]
    arms = data["arms"]
    assert len(arms["base"]["wall_ns"]) == len(arms["candidate"]["wall_ns"]) == data["rounds"] >= 30
    assert data["order_seed"] == 5
    assert data["cpu_clock"] == "thread"
    per_inference = {a: sorted(arms[a]["cpu_ns"])[15] / arms[a]["inner_loops"] for a in arms}
    assert per_inference["candidate"] > 1.5 * per_inference["base"]
    assert base["sha256"] != candidate["sha256"]
    assert arms["base"]["output_sha256"] != arms["candidate"]["output_sha256"]


def test_its_tables_of_operators_are_those_of_the_agent() -> None:
    text, backends = (TARGET / "runner.c").read_text(), payload_module("backends")
    for name, table in (("STATEFUL", backends.STATEFUL_OPERATORS), ("CALLING", backends.CALLING_OPERATORS)):  # fmt: skip
        (numbers,) = re.findall(rf"int {name}\[\] = {{([^}}]*)}}", text)
        assert {int(n) for n in numbers.split(",")} == table


def test_each_signature_gives_the_bits_of_its_own_file(board: CBoard, tmp_path: Path) -> None:
    merged = write(tmp_path, merged_file())
    for key, content in bucket_files().items():
        own, inputs = write(tmp_path, content, f"{key}.tflite"), bucket_samples(tmp_path, key)
        asked = {"inputs": inputs["path"], "inputs_size": inputs["size"], "inputs_sha256": inputs["sha256"], "input_count": 3, "input": "x"}  # fmt: skip
        found = call(words(board, merged, kind="outputs", signature=key, **asked))["data"]
        alone = call(words(board, own, kind="outputs", **asked))["data"]
        assert (found["outputs"], found["sha256"]) == (alone["outputs"], alone["sha256"])
        ops = [call(words(board, merged, kind="ops", signature=key)), call(words(board, own, kind="ops"))]  # fmt: skip
        timed = [[(op["name"], op["where"]) for op in reply["data"]["ops"]] for reply in ops]
        assert timed[0] == timed[1]
        assert len(timed[0]) >= 3
    # without a key it is the main graph
    inputs = bucket_samples(tmp_path, "length8")
    main, first = (call(words(board, merged, **more))["data"]["arms"]["model"] for more in ({}, {"signature": "length8"}))  # fmt: skip
    assert (main["inputs"], main["output_sha256"]) == (first["inputs"], first["output_sha256"])


def test_two_signatures_of_a_file_are_timed_in_turn(board: CBoard, tmp_path: Path) -> None:
    merged = item(write(tmp_path, merged_file()))
    argv = words(board, tmp_path / "m.tflite", arm="base", signature="length16")
    argv += ["arm=candidate", f"model={merged['path']}", f"size={merged['size']}", f"sha256={merged['sha256']}", "signature=length4"]  # fmt: skip
    arms = call(argv)["data"]["arms"]
    shapes = {arm: arms[arm]["inputs"][0]["shape"] for arm in arms}
    assert shapes == {"base": [1, 16, 4, 1], "candidate": [1, 4, 4, 1]}


def test_a_signature_that_is_not_there_is_refused_with_those_that_are(board: CBoard, tmp_path: Path) -> None:  # fmt: skip
    reply = call(words(board, write(tmp_path, merged_file()), signature="length5"))
    assert (reply["code"], reply["error"]) == (64, "bad-request")
    assert reply["message"] == "the model has no signature 'length5'; it has: length8, length16, length4"  # fmt: skip


@pytest.mark.parametrize("main", ["counts", "plain"])
def test_state_is_that_of_the_signature_and_not_of_others(board: CBoard, tmp_path: Path, main: str) -> None:  # fmt: skip
    model = write(tmp_path, one_counts(main=main))

    def state(key: str) -> str:
        return str(call(words(board, model, signature=key))["data"]["arms"]["model"]["state"])

    assert (state("counts"), state("plain")) == ("kept", "none")
    assert state("") == state(main)


def test_what_an_operator_of_control_flow_runs_is_not_guessed(board: CBoard, tmp_path: Path) -> None:  # fmt: skip
    model = write(tmp_path, branching_tflite())
    assert call(words(board, model))["data"]["arms"]["model"]["state"] == "kept"
    assert call(words(board, model, kind="ops"))["cause"]["what"] == "unsupported"


def test_the_same_seed_gives_the_same_inputs(board: CBoard, tiny: Path) -> None:
    def output(seed: int) -> str:
        return str(call(words(board, tiny, seed=seed))["data"]["arms"]["model"]["output_sha256"])

    assert output(1) == output(1) != output(2)


def test_outputs_are_those_of_the_model_bit_for_bit(board: CBoard, tiny: Path, tmp_path: Path) -> None:  # fmt: skip
    values = [random.Random(0).uniform(-9, 9) for _ in range(12)]
    floats = struct.unpack("<12f", struct.pack("<12f", *values))
    inputs = item(write(tmp_path, struct.pack("<12f", *floats), "in.bin"))
    reply = call(words(board, tiny, kind="outputs", inputs=inputs["path"], inputs_size=48, inputs_sha256=inputs["sha256"], input_count=3, input="x"))  # fmt: skip
    data = reply["data"]
    found = Path(data["path"])
    # y = 2 x + 1: 2 x is exact, so there is one rounding, as in float32 here
    assert found.read_bytes() == b"".join(struct.pack("<f", ctypes.c_float(2 * x + 1).value) for x in floats)  # fmt: skip
    assert (data["count"], data["size"], data["sha256"]) == (3, 48, item(found)["sha256"])
    assert data["outputs"] == [{"name": "y", "dtype": "float32", "bytes": 16, "shape": [1, 4]}]
    assert session_problem(crunner._session(reply)) == ""


def test_a_piece_of_the_samples_gives_its_own_outputs(board: CBoard, tiny: Path, tmp_path: Path) -> None:  # fmt: skip
    inputs = item(write(tmp_path, struct.pack("<20f", *range(20)), "in.bin"))
    reply = call(words(board, tiny, kind="outputs", inputs=inputs["path"], inputs_size=80, inputs_sha256=inputs["sha256"], input_count=2, first_input=1, input="x"))  # fmt: skip
    assert struct.unpack("<8f", Path(reply["data"]["path"]).read_bytes()) == tuple(2.0 * x + 1 for x in range(4, 12))  # fmt: skip
    assert reply["data"]["count"] == 2


@pytest.mark.parametrize(("size", "named"), [(40, "end in the middle"), (64, "longer")])
def test_samples_of_another_length_are_a_bad_request(board: CBoard, tiny: Path, tmp_path: Path, size: int, named: str) -> None:  # fmt: skip
    inputs = item(write(tmp_path, bytes(size), "in.bin"))
    reply = call(words(board, tiny, kind="outputs", inputs=inputs["path"], inputs_size=size, inputs_sha256=inputs["sha256"], input_count=3, input="x"))  # fmt: skip
    assert (reply["code"], reply["error"]) == (64, "bad-request")
    assert named in reply["message"]


def test_memory_finds_the_weights_and_their_packed_copy(board: CBoard, large: Path) -> None:
    data = crunner._session(call(words(board, large, kind="memory")))["data"]
    weights = 500 * 500 * 4
    assert weights <= data["file_bytes"] <= weights + 64 * 1024  # mapped; pages are 4 to 64 kB
    assert weights <= data["anon_bytes"] <= weights * 1.3
    assert data["anon_bytes"] <= data["peak_bytes"]
    assert 0 < data["overhead_bytes"] < 4e6
    assert list(data["stages"]) == ["before_load", "after_load", "after_first", "steady"]


def test_a_weight_cache_moves_the_packed_weights_into_a_file(board: CBoard, large: Path) -> None:
    plain = call(words(board, large, kind="memory"))["data"]
    cached = call(words(board, large, kind="memory", weight_cache=1))["data"]
    assert cached["anon_bytes"] < plain["anon_bytes"] / 3
    # all of the packed copy, and as much of the model, no longer read, as the page cache maps along
    assert cached["file_bytes"] > plain["file_bytes"]


def test_the_memory_of_a_model_is_what_the_agent_finds(board: CBoard, large: Path) -> None:
    spec = {
        "kind": "memory", "tag": "memory-1", "self_test": board.self_test, "arms": {"model": str(large)},
        "runtime": {"backend": "litert-c", "path": library()["path"]}, "threads": 1, "affinity": [],
        "kernel": "", "weight_cache": False, "seed": 0,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, TARGET / "worker.py", str(os.getpid())], input=json.dumps(spec).encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    agent, own = json.loads(done.stdout)["ok"], call(words(board, large, kind="memory"))["data"]
    # what malloc happens to have left differs by less than the gate's own allowance
    assert abs(own["anon_bytes"] - agent["anon_bytes"]) <= 128 * 1024
    assert abs(own["file_bytes"] - agent["file_bytes"]) <= 64 * 1024


def test_operators_are_timed_in_their_order(board: CBoard, tmp_path: Path) -> None:
    model = write(tmp_path, tiny_tflite(size=500, layers=2))
    session = crunner._session(call(words(board, model, kind="ops")))
    assert session_problem(session) == ""
    ops = session["data"]["ops"]
    assert [op["index"] for op in ops] == list(range(len(ops)))
    dense = [op for op in ops if "Fully Connected" in op["name"]]
    assert [op["where"] for op in dense] == ["delegate", "delegate"]
    assert all(len(op["ns"]) == session["data"]["inferences"] for op in ops)
    assert sum(sum(op["ns"]) for op in dense) > 0


def test_without_xnnpack_the_operators_are_builtin(board: CBoard, tiny: Path) -> None:
    ops = call(words(board, tiny, kind="ops", kernel="builtin"))["data"]["ops"]
    assert [(op["name"], op["where"]) for op in ops] == [("FULLY_CONNECTED", "builtin")]


def test_a_model_with_memory_is_unsupported_as_with_the_agent(board: CBoard, tmp_path: Path) -> None:  # fmt: skip
    reply = call(words(board, write(tmp_path, stateful_tflite())))
    assert (reply["code"], reply["cause"]["what"]) == (70, "unsupported")


# --------------------------------------------------------------------------------------- faults


def test_a_crash_of_the_model_is_data_and_the_runner_lives_on(board: CBoard, tmp_path: Path) -> None:  # fmt: skip
    reply = call(words(board, write(tmp_path, crashing_tflite())))
    assert (reply["code"], reply["error"], reply["data"]) == (70, "worker-failed", None)
    assert (reply["cause"]["what"], reply["cause"]["signal"]) == ("crash", signal.SIGSEGV)
    assert reply["after"]["monotonic_s"] > reply["before"]["monotonic_s"]


def test_a_file_that_is_no_model_is_an_error_of_the_model(board: CBoard, tmp_path: Path) -> None:
    reply = call(words(board, write(tmp_path, b"TFL3" * 100)))
    assert (reply["code"], reply["cause"]["what"]) == (70, "error")
    assert "CreateModelFromFile" in reply["message"]


def test_a_model_that_was_cut_after_the_push_is_not_run(board: CBoard, tiny: Path) -> None:
    argv = words(board, tiny)
    tiny.write_bytes(tiny.read_bytes()[:-100])
    assert call(argv)["code"] == 65


def test_a_model_that_was_altered_after_the_push_is_not_run(board: CBoard, tiny: Path) -> None:
    argv = words(board, tiny)
    tiny.write_bytes(tiny.read_bytes()[:-1] + b"\xaa")
    reply = call(argv)
    assert (reply["code"], reply["error"]) == (65, "data-mismatch")
    assert "sha256" in reply["message"]


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 1000])
def test_its_sha256_is_sha256(board: CBoard, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    reply = call(words(board, write(tmp_path, data)))
    assert reply["code"] != 65  # found equal to Python's


def test_a_library_for_another_machine_is_never_loaded(board: CBoard, tiny: Path, tmp_path: Path) -> None:  # fmt: skip
    raw = bytearray(Path(library()["path"]).read_bytes()[:4096])
    raw[18] = 183 if platform.machine() != "aarch64" else 62
    other = item(write(tmp_path, bytes(raw), "other.so"))
    reply = call(words(board, tiny, kind="self-test", library=other))
    assert (reply["code"], reply["error"]) == (69, "no-runtime")
    assert "ELF machine" in reply["message"]


def test_a_library_that_is_none_or_broken_is_no_runtime(board: CBoard, tiny: Path, tmp_path: Path) -> None:  # fmt: skip
    text = item(write(tmp_path, b"hello, world, this is no library", "text.so"))
    assert call(words(board, tiny, kind="self-test", library=text))["code"] == 69
    half = item(write(tmp_path, Path(library()["path"]).read_bytes()[:100_000], "half.so"))
    reply = call(words(board, tiny, kind="self-test", library=half))
    assert reply["code"] == 70
    assert reply["cause"]["what"] in ("error", "crash")


def test_a_session_past_its_time_is_killed_and_leaves_no_process(board: CBoard, tiny: Path) -> None:
    process = subprocess.Popen(
        words(board, tiny, session_s=SLOW_S, limit_s=5), stdout=subprocess.PIPE
    )
    child = wait_for(lambda: _measuring(process.pid))
    reply = json.loads(process.communicate(timeout=60)[0])
    assert (reply["code"], process.returncode, reply["cause"]["what"]) == (124, 124, "timeout")
    assert is_gone(child)


def test_a_session_that_somebody_killed_says_so(board: CBoard, tiny: Path) -> None:
    process = subprocess.Popen(words(board, tiny, session_s=SLOW_S), stdout=subprocess.PIPE)
    os.kill(wait_for(lambda: _measuring(process.pid)), signal.SIGKILL)
    reply = json.loads(process.communicate(timeout=60)[0])
    assert (reply["code"], reply["cause"]["what"]) == (70, "killed")


def test_with_the_runner_its_session_dies(board: CBoard, tiny: Path) -> None:
    process = subprocess.Popen(words(board, tiny, session_s=SLOW_S), stdout=subprocess.PIPE)
    child = wait_for(lambda: _measuring(process.pid))
    process.kill()
    process.communicate()
    wait_for(lambda: is_gone(child))


def _measuring(pid: int) -> int | None:
    """The child that is in its rounds: the cold one before it ends by itself."""
    for child in children_of(pid):
        try:
            if b"libLiteRt" in Path(f"/proc/{child}/maps").read_bytes():
                time.sleep(0.2)
                return None if is_gone(child) else child
        except OSError:
            continue
    return None


def test_a_full_disk_before_the_session_is_said(board: CBoard, tiny: Path) -> None:
    reply = call(words(board, tiny, min_free_bytes=2**62))
    assert (reply["code"], reply["error"]) == (73, "disk-full")


def test_a_disk_that_fills_up_while_outputs_are_written_is_said(board: CBoard, tiny: Path, tmp_path: Path) -> None:  # fmt: skip
    inputs = item(write(tmp_path, bytes(16), "in.bin"))
    argv = words(board, tiny, kind="outputs", inputs=inputs["path"], inputs_size=16, inputs_sha256=inputs["sha256"], input_count=1, input="x")  # fmt: skip
    (tmp_path / "job" / "outputs-t-1.bin.part").symlink_to("/dev/full")
    reply = call(argv)
    assert (reply["code"], reply["cause"]["what"]) == (73, "disk-full")


def test_a_board_in_use_is_busy_and_names_the_owner(board: CBoard, tiny: Path) -> None:
    owner = json.dumps({"job": "other", "owner": "someone@somewhere"})
    lock = Path(board.work_dir) / "lock"
    lock.write_text(owner)
    with lock.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        reply = call(words(board, tiny))
    assert (reply["code"], reply["owner_text"]) == (75, owner)
    assert call(words(board, tiny))["code"] == 0


def test_the_lease_keeps_others_out_until_it_is_given_back(board: CBoard, tiny: Path) -> None:
    assert call(words(board, tiny, lease_s=1000))["code"] == 0
    assert call(words(board, tiny, id="job-2"))["code"] == 75
    assert call([board.payload.entry, "end", board.work_dir, "job-2"])["code"] == 0  # not its own
    assert call(words(board, tiny, id="job-2"))["code"] == 75
    assert call([board.payload.entry, "end", board.work_dir, "job-1"])["code"] == 0
    assert call(words(board, tiny, id="job-2"))["code"] == 0


def test_the_lease_is_the_agents_too(board: CBoard, tiny: Path) -> None:
    assert call(words(board, tiny, lease_s=1000))["code"] == 0
    code = (
        f"import sys; sys.path.insert(0, {str(TARGET)!r}); import lease, job\n"
        f"make = lambda name: lease.Lease(dict(id=name, owner='a', work_dir={board.work_dir!r}, lease_s=1000))\n"
        "try: make('agent')\n"
        "except job.Stop as stop: assert stop.code == 75, stop\n"
        "else: raise SystemExit('it took the lease')\n"
        "make('job-1').leave()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert call(words(board, tiny, id="job-2"))["code"] == 75  # now as the agent wrote it
    assert call(words(board, tiny))["code"] == 0


@pytest.mark.parametrize("changes", [
    {"kind": "nap"}, {"sustained": 1}, {"threads": 0}, {"sha256": None}, {"tag": "../x"}, {"limit_s": 0},
    {"kind": "outputs"}, {"kernel": 'x"'}, {"id": 'a"b'},
])  # fmt: skip
def test_a_job_that_makes_no_sense_is_refused(board: CBoard, tiny: Path, changes: dict[str, Any]) -> None:  # fmt: skip
    reply = call(words(board, tiny, **changes))
    assert (reply["code"], reply["error"]) == (64, "bad-job")


def test_a_cpu_that_is_not_there_is_a_bad_request(board: CBoard, tiny: Path) -> None:
    assert call(words(board, tiny, cpu=999))["code"] == 64


# ------------------------------------------------------------------------ what the board's files say


@pytest.fixture
def sysroot(tmp_path: Path) -> Path:
    """/proc and /sys of a hot Raspberry Pi."""
    files = {
        "proc/sys/kernel/random/boot_id": "aaaa-bbbb\n",
        "proc/meminfo": "MemTotal:  1000 kB\nMemAvailable:  500 kB\nSwapTotal: 100 kB\nSwapFree: 60 kB\n",
        "proc/vmstat": "nr_free_pages 1\npswpin 7\noom_kill 2\n",
        "proc/loadavg": "1.50 0.5 0.1 1/2 3\n",
        "proc/cpuinfo": "processor : 0\nCPU part\t: 0xd08\n\nprocessor : 1\nCPU part\t: 0xd08\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.1\0",
        "proc/device-tree/serial-number": "1000\0",
        "etc/os-release": 'NAME=x\nPRETTY_NAME="Debian 12"\n',
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "81200\n",
        "sys/class/thermal/thermal_zone1/type": "broken\n",
        "sys/class/thermal/thermal_zone1/temp": "?\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
        "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
        "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
        "proc/pressure/cpu": "some avg10=0.00 total=77\nfull avg10=0.00 total=0\n",
    }
    for number, khz in ((0, 600000), (4, 1500000)):
        base = f"sys/devices/system/cpu/cpufreq/policy{number}/"
        files |= {
            base + "related_cpus": f"{number} {number + 1}\n", base + "scaling_governor": "ondemand\n",
            base + "scaling_cur_freq": f"{khz}\n", base + "scaling_max_freq": "1500000\n",
            base + "cpuinfo_max_freq": "1800000\n",
        }  # fmt: skip
    root = tmp_path / "root"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def agent_says(expression: str, **environment: str) -> Any:
    """What the agent's board.py answers on this machine."""
    code = f"import sys, json; sys.path.insert(0, {str(TARGET)!r}); import board; print(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, **environment})  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("faked", [True, False])
def test_health_and_facts_are_those_of_the_agent(board: CBoard, sysroot: Path, monkeypatch: pytest.MonkeyPatch, faked: bool) -> None:  # fmt: skip
    if faked:
        monkeypatch.setenv("EDGEPIPE_SYSROOT", str(sysroot))
    own = board.facts()
    agent_health, agent_facts = agent_says("[board.health(), board.device_facts()]")
    moving = {"realtime_s", "monotonic_s"}
    if not faked:
        moving |= {"loadavg_1min", "runnable", "pressure_us", "memory_available_bytes", "frequencies", "temperatures_c", "temperature_c", "swap_used_bytes"}  # fmt: skip
    assert own["health"].keys() == agent_health.keys()
    assert {k: v for k, v in own["health"].items() if k not in moving} == {k: v for k, v in agent_health.items() if k not in moving}  # fmt: skip
    ignored = {"python", "kernel"} if faked else {"python"}  # the agent has it from uname(2)
    assert {k: v for k, v in own["device"].items() if k not in ignored} == {k: v for k, v in agent_facts.items() if k not in ignored}  # fmt: skip
    if faked:
        assert own["health"]["temperature_c"] == 81.2
        assert own["health"]["throttling"][:2] == ["under_voltage", "throttled"]


_healths = st.fixed_dictionaries({
    "throttling": st.none() | st.lists(st.sampled_from(sorted(snapshot.THROTTLE_BITS.values())), max_size=3, unique=True),
    "cooling": st.dictionaries(st.sampled_from(["cooling_device0:pwm-fan", "cooling_device1:cpu"]), st.none() | st.integers(0, 3)),
    "frequencies": st.dictionaries(st.sampled_from(["policy0"]), st.fixed_dictionaries({"limit_khz": st.none() | st.integers(1, 3), "hardware_limit_khz": st.none() | st.integers(1, 3)})),
    "realtime_s": st.sampled_from([0.0, 5.0]), "monotonic_s": st.sampled_from([0.0, 5.0]),
    "under_voltage_alarm": st.none() | st.integers(0, 1), "pages_swapped_in": st.none() | st.integers(0, 2), "boot_id": st.sampled_from(["a", "b"]),
})  # fmt: skip


@pytest.fixture(scope="module")
def agent_flags() -> Callable[..., list[str]]:
    """board.health_flags of the payload, imported from its folder."""
    sys.path.insert(0, str(TARGET))
    try:
        import board as payload_board  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(TARGET))
        sys.modules.pop("board", None)
    flags: Callable[..., list[str]] = payload_board.health_flags
    return flags


@settings(max_examples=200, deadline=None)
@given(before=_healths, after=_healths)
def test_flags_are_those_of_the_agent(agent_flags: Callable[..., list[str]], before: Any, after: Any) -> None:  # fmt: skip
    assert snapshot.health_flags(before, after) == agent_flags(before, after)


@given(
    zones=st.dictionaries(st.sampled_from(["thermal_zone0:cpu", "thermal_zone1:gpu", "thermal_zone2:cpu"]), st.floats(-40, 130)),
    watched=st.lists(st.sampled_from(["cpu", "gpu", "battery"]), max_size=2),
)  # fmt: skip
def test_the_hottest_of_the_zones_that_count_is_the_agents(
    zones: dict[str, float], watched: list[str]
) -> None:
    health = {"temperatures_c": zones, "temperature_c": max(zones.values(), default=None)}
    here = snapshot.hottest_c(health, watched)
    assert here == payload_module("board").hottest_c(zones, watched)
    counted = [c for name, c in zones.items() if not watched or name.split(":")[1] in watched]
    assert here == (max(counted) if counted else None)


def test_time_in_state_is_in_seconds() -> None:
    path = "/sys/devices/system/cpu/cpufreq/policy0/stats/time_in_state"
    before, after = {"files": {path: "600000 100\n1500000 7"}}, {"files": {path: "600000 150\n1500000 7"}}  # fmt: skip
    found = snapshot.time_in_state(before, after, ticks_per_s=100)
    assert found == {"policy0": {"600000": 0.5, "1500000": 0.0}}
    assert snapshot.time_in_state({"files": {}}, {"files": {}}, ticks_per_s=100) is None


# ------------------------------------------------------------------------------------- the job


def make_job(board: CBoard, model: Path, **changes: Any) -> CRunnerJob:
    job: dict[str, Any] = {
        "schema": 2, "id": "job-1", "owner": "tester@höst", "work_dir": board.work_dir,
        "models": {"model": item(model)}, "runtime": library(), "inputs": None, "backend": "auto",
        "kernel": "", "weight_cache": False, "threads": 1, "affinity": [], "warmup_s": 0.02,
        "session_s": 0.05, "min_inferences": 30, "seed": 0, "budget_s": 60, "lease_s": 0,
        "min_free_bytes": 0, "start_below_c": None, "cool_down_s": 0, "abort_above_c": None,
    } | changes  # fmt: skip
    return CRunnerJob(board, job, f"{board.work_dir}/jobs/{job['id']}")


def plan(*kinds: str) -> list[dict[str, Any]]:
    return [{"tag": f"{kind}-{n}", "kind": kind, "arms": ["model"]} for n, kind in enumerate(kinds)]


def test_a_phone_is_asked_for_its_heat_after_each_session(board: CBoard, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    said = tmp_path / "said"
    shutil.copytree(FIXTURES / "android", said)
    (tmp_path / "dumpsys").write_text(f'#!/bin/sh\ncat "{said}/dumpsys_$1"\n')
    (tmp_path / "dumpsys").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = make_job(dataclasses.replace(board, phone=android_facts({})), tiny)
    job.run(plan("memory"))
    thermal = said / "dumpsys_thermalservice"
    cool = thermal.read_text()
    thermal.write_text(cool.replace("Thermal Status: 0", "Thermal Status: 3"))
    cold, hot = job.run(plan("memory", "memory")).sessions
    assert (cold["after"]["thermal_status"], hot["after"]["thermal_status"]) == ("none", "severe")
    assert "throttled_now" in hot["flags"]
    assert "throttled_now" not in cold["flags"]
    thermal.write_text(cool)  # 25.7 C at the hottest place
    with pytest.raises(NotStable, match=r"reached 25.7 C, measuring stops above 25 C"):
        make_job(job.board, tiny, id="job-2", abort_above_c=25).run(plan("memory"))


def test_a_job_names_the_signature_and_takes_no_session_of_another(board: CBoard, tmp_path: Path) -> None:  # fmt: skip
    merged = write(tmp_path, merged_file())
    found = []
    for key, length in (("length16", 16), ("length4", 4), ("", 8)):
        job = make_job(board, merged, models={"model": {**item(merged), "signature": key}})
        (session,) = job.run(plan("latency")).sessions
        assert session["data"]["arms"]["model"]["inputs"][0]["shape"] == [1, length, 4, 1]
        found.append(job._identity("latency-0", "latency", ["model"]))
    assert len(set(found)) == 3


def test_a_job_gives_its_sessions_in_the_order_of_the_plan(board: CBoard, tiny: Path) -> None:
    job = make_job(board, tiny)
    outcome = job.run(plan("memory", "latency", "energy"))
    assert [s["tag"] for s in outcome.sessions] == ["memory-0", "latency-1", "energy-2"]
    assert outcome.sessions[2]["cause"]["what"] == "unsupported"
    assert outcome.runtime["backend"] == "litert-c"
    assert outcome.failure is None
    longer = job.run([*plan("memory", "latency", "energy"), *plan("latency")])
    assert longer.sessions[:2] == outcome.sessions[:2]  # what is finished is not done again
    assert len(longer.sessions) == 4
    job.end()
    assert not Path(job.job_dir).exists()
    assert (Path(board.work_dir) / "lock").read_text() == ""


def test_after_a_host_that_died_finished_sessions_are_found(board: CBoard, tiny: Path) -> None:
    first = make_job(board, tiny).run(plan("latency", "memory"))
    again = make_job(board, tiny)
    assert again.find_earlier(board_time_s=time.time(), max_age_s=600) == 2
    assert again.run(plan("latency", "memory")).sessions == first.sessions


@pytest.mark.parametrize("changes", [{"threads": 2}, {"max_age_s": -1}, {"boot_id": "other"}])
def test_sessions_of_another_request_time_or_boot_are_not_used(board: CBoard, tiny: Path, changes: dict[str, Any]) -> None:  # fmt: skip
    make_job(board, tiny).run(plan("latency"))
    kept = Path(board.work_dir) / "jobs" / "job-1" / "session-latency-0.json"
    if "boot_id" in changes:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        kept.write_text(kept.read_text().replace(boot_id, changes["boot_id"]))
    other = make_job(board, tiny, **{k: v for k, v in changes.items() if k == "threads"})
    assert (
        other.find_earlier(board_time_s=time.time(), max_age_s=changes.get("max_age_s", 600)) == 0
    )
    assert not kept.exists()


def test_half_a_kept_session_is_measured_again(board: CBoard, tiny: Path) -> None:
    make_job(board, tiny).run(plan("latency"))
    kept = Path(board.work_dir) / "jobs" / "job-1" / "session-latency-0.json"
    kept.write_bytes(kept.read_bytes()[:500])
    assert make_job(board, tiny).find_earlier(board_time_s=time.time(), max_age_s=600) == 0


def test_a_model_that_crashes_is_a_result(board: CBoard, tmp_path: Path) -> None:
    outcome = make_job(board, write(tmp_path, crashing_tflite())).run(plan("memory", "latency"))
    assert outcome.failure is not None
    assert outcome.failure["what"] == "crash"
    assert outcome.sessions == ()


class Tampering(LocalDevice):
    """This machine, but the runner's answers pass through ``change`` on their way."""

    def __init__(self, change: Callable[[int, bytes], bytes]) -> None:
        self.change, self.sessions = change, 0

    def run(self, argv: Any, *, timeout_s: float) -> Any:
        done = super().run(argv, timeout_s=timeout_s)
        if argv[1:2] != ["session"] or "kind=self-test" in argv:
            return done
        self.sessions += 1
        stdout = self.change(self.sessions, done.stdout)
        code = 70 if b'"code": 70' in stdout else done.returncode
        return type(done)(code, stdout, done.stderr)


def tampered(board: CBoard, change: Callable[[int, bytes], bytes]) -> CBoard:
    return crunner.dataclasses.replace(board, device=Tampering(change))


def test_a_killed_session_is_repeated_at_the_end_but_not_for_ever(board: CBoard, tiny: Path) -> None:  # fmt: skip
    def killed(raw: bytes) -> bytes:
        reply = json.loads(raw) | {"code": 70, "error": "worker-failed", "data": None}
        reply["cause"] = {"what": "killed", "message": "someone killed it", "stderr": ""}
        return json.dumps(reply).encode() + b"\n"

    once = tampered(board, lambda n, raw: killed(raw) if n == 1 else raw)
    outcome = make_job(once, tiny).run(plan("latency", "memory"))
    assert (len(outcome.sessions), outcome.repeated) == (2, 1)
    with pytest.raises(NotStable, match="killed it, 3 times"):
        make_job(tampered(board, lambda n, raw: killed(raw)), tiny).run(plan("latency"))


def test_after_a_reboot_all_is_measured_again_but_only_once(board: CBoard, tiny: Path) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    rebooted = tampered(board, lambda n, raw: raw.replace(boot_id, b"later") if n > 1 else raw)
    outcome = make_job(rebooted, tiny).run(plan("memory", "latency"))
    assert outcome.boot_id == "later"
    assert {s["before"]["boot_id"] for s in outcome.sessions} == {"later"}
    always = tampered(board, lambda n, raw: raw.replace(boot_id, b"boot %d" % n))
    with pytest.raises(NotStable, match="restarted 2 times"):
        make_job(always, tiny).run(plan("memory", "latency"))


@pytest.mark.parametrize("raw", [b"", b"{}\n", b"Welcome!\n{}\n", b'{"schema":2,"code":0'])
def test_an_answer_that_is_not_whole_is_our_error(board: CBoard, tiny: Path, raw: bytes) -> None:
    from edgepipe.errors import EdgepipeError

    device = tampered(board, lambda n, _: raw)
    with pytest.raises(EdgepipeError, match="local"):
        make_job(device, tiny).run(plan("memory"))


def test_an_own_call_left_behind_by_a_broken_link_is_waited_for(board: CBoard, tiny: Path) -> None:
    left = subprocess.Popen(words(board, tiny, session_s=1), stdout=subprocess.PIPE)
    wait_for(lambda: _measuring(left.pid))
    outcome = make_job(board, tiny).run(plan("memory"))
    assert len(outcome.sessions) == 1
    left.communicate()


def test_a_board_of_another_job_is_busy(board: CBoard, tiny: Path) -> None:
    call(words(board, tiny, id="other", lease_s=1000))
    with pytest.raises(Busy, match="job other of test"):
        make_job(board, tiny).run(plan("memory"))


def test_a_hot_board_is_not_measured(board: CBoard, tiny: Path, sysroot: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("EDGEPIPE_SYSROOT", str(sysroot))
    with pytest.raises(NotStable, match=r"81\.2 C"):
        make_job(board, tiny, start_below_c=60).run(plan("memory"))
    with pytest.raises(NotStable, match="stops above 80"):
        make_job(board, tiny, abort_above_c=80).run(plan("memory"))


def test_each_failure_of_the_board_is_its_error(board: CBoard, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="disk"):
        make_job(board, tiny, min_free_bytes=2**62).run(plan("memory"))
    with pytest.raises(CommandTimeout) as caught:
        make_job(board, tiny, session_s=SLOW_S, budget_s=2).run(plan("latency"))
    assert caught.value.code == "over-budget"
    for runtime in (None, {**library(), "glibc": "99.0"}, item(write(tmp_path, b"no library" * 9, "text.so")) | {"version": "0"}):  # fmt: skip
        with pytest.raises(NotReadyError) as refused:
            make_job(board, tiny, runtime=runtime).run(plan("memory"))
        assert refused.value.code == "no-runtime"
    with pytest.raises(NotReadyError, match="sustained"):
        make_job(board, tiny).run(plan("sustained"))


# -------------------------------------------------------------------------------- how it is made


def test_the_self_test_model_is_the_agents(tmp_path: Path) -> None:
    assert (TARGET / "self_test.tflite").read_bytes() == tiny_tflite()


@pytest.mark.parametrize(("machine", "elf_class", "name"), [
    (62, 2, "x86_64"), (183, 2, "aarch64"), (40, 1, "armv7l"), (40, 2, "unknown"), (8, 1, "unknown"),
])  # fmt: skip
def test_the_machine_of_a_program_is_read_from_its_header(machine: int, elf_class: int, name: str) -> None:  # fmt: skip
    head = b"\x7fELF" + bytes([elf_class, 1]) + bytes(12) + struct.pack("<H", machine)
    assert elf_machine(head) == name
    assert elf_machine(head[:19]) == "unknown"


@given(st.binary(max_size=40))
def test_no_bytes_make_the_reader_of_headers_fail(head: bytes) -> None:
    assert elf_machine(head) in {*crunner.ELF_MACHINES.values(), "unknown"}


def test_a_runner_is_compiled_once(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled.path.parents[3]))
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path))
    monkeypatch.setattr(crunner, "_compile", lambda *_: pytest.fail("it was compiled again"))
    assert compile_runner(TARGET / "runner.c", platform.machine()) == compiled
    assert compiled.compiler.startswith("cc")


def test_a_source_that_does_not_compile_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path / "toolchains"))
    source = tmp_path / "runner.c"
    source.write_text("int main(void) { return oops; }\n")
    with pytest.raises(MissingExtra, match="oops"):
        compile_runner(source, platform.machine())
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_without_any_compiler_both_remedies_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(tmp_path / "toolchains"))
    monkeypatch.setenv("EDGEPIPE_NO_INSTALL", "1")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(NotReadyError) as caught:
        crunner.prepare_board(LocalDevice(), "linux", str(tmp_path))
    assert caught.value.code == "no-python"
    assert "apt-get install python3" in caught.value.hint
    assert "edgepipe toolchains install zig" in caught.value.hint


def test_a_runner_that_does_not_start_there_is_not_ready(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    broken = write(
        tmp_path, b'#!/bin/sh\necho "version \\`GLIBC_2.34\' not found" >&2; exit 1\n', "r"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(crunner, "compile_runner", lambda *_: Compiled(broken, "0" * 64, "cc 12"))
    with pytest.raises(NotReadyError, match=r"GLIBC_2\.34") as caught:
        crunner.prepare_board(LocalDevice(), "linux", str(tmp_path / "work"))
    assert "zig" in caught.value.hint


@pytest.mark.parametrize("machine", ["aarch64", "armv7l"])
def test_zig_compiles_the_runner_for_other_machines(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    if not toolchain.is_installed("zig") and os.environ.get("CI") != "true":
        pytest.skip("the zig toolchain is not installed: edgepipe toolchains install zig")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("EDGEPIPE_TOOLCHAINS", str(toolchain.root()))
    made = compile_runner(TARGET / "runner.c", machine)
    raw = made.path.read_bytes()
    assert elf_machine(raw) == machine
    assert b"libc.so.6" in raw
    assert made.compiler.startswith("zig")
    assert len(raw) < 200_000
