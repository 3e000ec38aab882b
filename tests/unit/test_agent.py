"""The payload `targets/linux/agent.py`, as a process: real runtime, real models, real faults."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.resources import target_dir
from edgepipe.runtime import runtime_library
from edgepipe.tflite_ops.tiny import (
    counting_tflite,
    crashing_tflite,
    stateful_tflite,
    tiny_tflite,
)

RUNNER = target_dir("linux") / "agent.py"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("linux_runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


def item(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"path": str(path), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def make_job(folder: Path, model: bytes | None = None, **changes: Any) -> Path:
    """A job for a tiny model that takes a fraction of a second; ``changes`` replace its keys."""
    path = folder / "model.tflite"
    path.write_bytes(tiny_tflite() if model is None else model)
    library = runtime_library(platform.machine())
    job = {
        "schema": 1, "id": "job-1", "owner": "test", "work_dir": str(folder), "model": item(path),
        "runtime": {**item(library.path), "version": library.version, "glibc": library.glibc},
        "backend": "auto", "threads": 1, "affinity": [], "warmup_s": 0.02, "session_s": 0.05,
        "min_inferences": 30, "seed": 0, "sessions": ["memory"], "inputs": None, "budget_s": 60,
        "lease_s": 0, "min_free_bytes": 0,
    } | changes  # fmt: skip
    target = folder / f"{job['id']}.json"
    target.write_text(json.dumps(job))
    return target


def execute(*arguments: str | Path, python: str = sys.executable, **environment: str) -> Any:
    """Run it; its stdout must be one JSON object that tells the exit code."""
    done = subprocess.run(
        [python, RUNNER, *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    reply = json.loads(done.stdout)
    assert reply["code"] == done.returncode
    return reply


# ------------------------------------------------------------------------------ what it is


def test_it_is_python_3_7() -> None:
    ast.parse(RUNNER.read_text(), feature_version=(3, 7))


def test_it_imports_only_the_standard_library_and_the_runtimes() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "ai_edge_litert", "tflite_runtime"}
    tree = ast.parse(RUNNER.read_text())
    top_level = {node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]}
        else:
            continue
        assert names <= (set(sys.stdlib_module_names) if node in top_level else allowed)


def test_its_self_test_model_is_the_tiny_model(runner: ModuleType) -> None:
    assert tiny_tflite() == runner.SELF_TEST_MODEL


def test_its_table_of_stateful_operators_is_that_of_the_schema(runner: ModuleType) -> None:
    from ai_edge_litert.schema_py_generated import BuiltinOperator as Op

    assert {
        Op.LSTM, Op.RNN, Op.SVDF, Op.UNIDIRECTIONAL_SEQUENCE_RNN, Op.UNIDIRECTIONAL_SEQUENCE_LSTM,
        Op.BIDIRECTIONAL_SEQUENCE_RNN, Op.BIDIRECTIONAL_SEQUENCE_LSTM, Op.CALL_ONCE, Op.VAR_HANDLE,
        Op.READ_VARIABLE, Op.ASSIGN_VARIABLE,
    } == runner.STATEFUL_OPERATORS  # fmt: skip


# ------------------------------------------------------------------------------ what it measures


def test_a_latency_session_gives_raw_wall_and_cpu_nanoseconds(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, sessions=["latency"]))
    assert (reply["code"], reply["runs_on_device"]) == (0, True)
    (session,) = reply["sessions"]
    data = session["data"]
    assert len(data["wall_ns"]) == len(data["cpu_ns"]) >= 30
    assert all(isinstance(ns, int) and ns > 0 for ns in data["wall_ns"])
    # one thread cannot use more CPU than there is time, but for the clock reads around the wall
    # interval: 2 system calls of at most 20 us per sample
    assert sum(data["cpu_ns"]) <= sum(data["wall_ns"]) + 40_000 * len(data["wall_ns"])
    assert data["warmup_wall_ns"]
    assert data["first_inference_ns"] > 0
    assert data["load_ns"] == sum(data["load_parts_ns"].values()) > 0
    assert data["cold"]["load_ns"] > 0
    assert session["before"]["boot_id"] == reply["device"]["boot_id"]


def test_a_fast_model_is_timed_in_batches(tmp_path: Path) -> None:
    fast = execute(make_job(tmp_path, sessions=["latency"]))["sessions"][0]["data"]
    # 2 us per inference: the batch is meant to last 1 ms
    assert fast["inner_loops"] > 10


def test_a_slow_model_is_timed_one_by_one(tmp_path: Path) -> None:
    # 16 layers of 512 x 512: 4.2 million multiplications take more than 200 us anywhere
    model = tiny_tflite(size=512, layers=24)
    slow = execute(make_job(tmp_path, model, sessions=["latency"]))["sessions"][0]["data"]
    assert slow["inner_loops"] == 1


def test_memory_grows_by_what_the_model_needs(tmp_path: Path) -> None:
    # one weight matrix of 512 x 512 float32 = 1 MiB
    reply = execute(make_job(tmp_path, tiny_tflite(size=512)))
    data = reply["sessions"][0]["data"]
    page = reply["device"]["page_size_bytes"]
    file_size = (tmp_path / "model.tflite").stat().st_size
    assert 2**20 <= data["file_bytes"] <= file_size + page
    assert data["anon_bytes"] >= 2**20  # XNNPACK packs the weights into a second copy
    assert data["peak_bytes"] is None or data["peak_bytes"] >= data["anon_bytes"]
    assert set(data["stages"]) == {"before_load", "after_load", "after_first", "steady"}


def test_what_a_runtime_prints_is_no_part_of_the_answer(tmp_path: Path) -> None:
    """Also the way of a board with tflite_runtime: a package of that name, around LiteRT's."""
    package = tmp_path / "site" / "tflite_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os; os.write(1, b'hello from the runtime')\n")
    (package / "interpreter.py").write_text("from ai_edge_litert.interpreter import Interpreter\n")
    (package.parent / "tflite_runtime-2.14.0.dist-info").mkdir()
    job = make_job(tmp_path, sessions=["latency"], backend="tflite-runtime-interpreter")
    reply = execute(job, PYTHONPATH=str(package.parent))
    assert reply["code"] == 0
    assert (reply["runtime"]["name"], reply["runtime"]["version"]) == ("tflite-runtime", "2.14.0")


def test_the_same_seed_gives_the_same_outputs_on_every_backend(tmp_path: Path) -> None:
    found = {}
    for backend in ("litert-c", "litert-interpreter"):
        reply = execute(make_job(tmp_path, sessions=["latency"], backend=backend, seed=3))
        assert reply["runtime"]["backend"] == backend
        assert len(reply["runtime"]["sha256"]) == 64
        found[backend] = reply["sessions"][0]["data"]["output_sha256"]
    assert found["litert-c"] == found["litert-interpreter"]
    other = execute(make_job(tmp_path, sessions=["latency"], seed=4))
    assert other["sessions"][0]["data"]["output_sha256"] != found["litert-c"]


def samples_for(folder: Path, rows: list[list[float]]) -> dict[str, Any]:
    path = folder / "inputs.bin"
    path.write_bytes(b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows))
    return {**item(path), "count": len(rows), "tensors": ["x"]}


def outputs_of(reply: Any) -> list[tuple[float, ...]]:
    import base64

    (session,) = reply["sessions"]
    raws = [base64.b64decode(sample[0]) for sample in session["data"]["samples"]]
    return [struct.unpack(f"<{len(raw) // 4}f", raw) for raw in raws]


def test_outputs_come_back_for_given_inputs(tmp_path: Path) -> None:
    given_inputs = samples_for(tmp_path, [[0, 1, 2, 3], [4, 5, 6, 7]])
    reply = execute(make_job(tmp_path, sessions=["outputs"], inputs=given_inputs))
    assert outputs_of(reply) == [(1, 3, 5, 7), (9, 11, 13, 15)]


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        (stateful_tflite, "litert-interpreter"),
        (counting_tflite, "litert-interpreter"),
        (counting_tflite, "litert-c"),
    ],
)
def test_state_does_not_leak_from_one_sample_to_the_next(
    tmp_path: Path, model: Any, backend: str
) -> None:
    ones = samples_for(tmp_path, [[1, 1, 1, 1]] * 3)
    job = make_job(tmp_path, model(), sessions=["outputs"], inputs=ones, backend=backend)
    assert outputs_of(execute(job)) == [(1, 1, 1, 1)] * 3


def test_the_record_says_what_became_of_state(tmp_path: Path) -> None:
    for model, backend, state in (
        (tiny_tflite(), "litert-c", "none"),
        (counting_tflite(), "litert-c", "kept"),
        (counting_tflite(), "litert-interpreter", "kept"),
        (stateful_tflite(), "litert-interpreter", "reset-before-each-batch"),
    ):
        job = make_job(tmp_path, model, sessions=["latency"], backend=backend)
        assert execute(job)["sessions"][0]["data"]["state"] == state


def test_a_model_one_backend_does_not_support_goes_to_the_next(tmp_path: Path) -> None:
    """LiteRT 2.3.0: "Variable tensors not yet supported" by the C API."""
    reply = execute(make_job(tmp_path, stateful_tflite()))
    assert (reply["code"], reply["runtime"]["backend"]) == (0, "litert-interpreter")
    (reason,) = [r["reason"] for r in reply["rejected"] if r["backend"] == "litert-c"]
    assert "Variable tensors" in reason


def test_a_model_no_backend_supports_is_not_the_models_fault(
    tmp_path: Path, bare_python: str
) -> None:
    reply = execute(make_job(tmp_path, stateful_tflite()), python=bare_python)
    assert (reply["code"], reply["runs_on_device"]) == (69, None)
    assert "Variable tensors" in reply["message"]


def test_nothing_is_left_behind_but_the_lease_file(tmp_path: Path) -> None:
    job = make_job(tmp_path, sessions=["memory", "latency"])
    before = {path.name for path in tmp_path.iterdir()}
    execute(job)
    assert {path.name for path in tmp_path.iterdir()} == before | {"lock"}


# ------------------------------------------------------------------------------ faults


def test_a_truncated_model_is_never_loaded(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    model = tmp_path / "model.tflite"
    model.write_bytes(model.read_bytes()[:-100])
    reply = execute(job)
    assert (reply["code"], reply["error"], reply["sessions"]) == (65, "data-mismatch", [])
    assert str(model) in reply["message"]


def test_an_altered_runtime_is_never_loaded(tmp_path: Path) -> None:
    library = tmp_path / "libLiteRt.so"
    library.write_bytes(b"\x7fELF" + bytes(100))
    right = item(library)
    library.write_bytes(b"\x7fELF" + bytes(99) + b"\1")
    reply = execute(make_job(tmp_path, runtime={**right, "version": "2.3.0", "glibc": "2.27"}))
    assert reply["code"] == 65
    assert right["sha256"] in reply["message"]


def test_a_model_that_crashes_is_data(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, crashing_tflite(), backend="litert-c"))
    assert (reply["code"], reply["runs_on_device"]) == (70, False)
    assert reply["cause"]["what"] == "crash"
    assert reply["cause"]["signal"] == signal.SIGSEGV
    assert "SIGSEGV" in reply["message"]
    assert "Segmentation fault" in reply["cause"]["stderr"]


def test_a_model_that_is_refused_is_data_with_the_runtimes_reason(tmp_path: Path) -> None:
    damaged = bytearray(tiny_tflite())
    damaged[:4] = b"\xff\xff\xff\x7f"  # the root table lies far outside the file
    reply = execute(make_job(tmp_path, bytes(damaged), backend="litert-c"))
    assert (reply["code"], reply["runs_on_device"]) == (70, False)
    assert "LiteRtCreateModelFromFile" in reply["message"]


@pytest.mark.slow
def test_too_little_memory_is_data(tmp_path: Path, runner: ModuleType) -> None:
    # sessions run in a process that must not grow: the address space is limited by a wrapper
    job = make_job(tmp_path, tiny_tflite(size=2048), backend="litert-c")
    limited = "import resource,sys,os; resource.setrlimit(resource.RLIMIT_AS, (60 << 20, 60 << 20)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", limited, str(RUNNER), str(job)], capture_output=True, timeout=60
    )
    reply = json.loads(done.stdout)
    assert reply["code"] in (69, 70)  # the runtime itself may be what does not fit
    assert reply["runs_on_device"] is not True


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def wait_for(condition: Any, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("nothing happened")


@contextlib.contextmanager
def running(job: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, RUNNER, job], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def in_session(process: subprocess.Popen[bytes]) -> int:
    """The pid of the worker of a latency session, once self-test and cold load are over."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"cold load: done" in line:
            break
    (pid,) = wait_for(lambda: children_of(process.pid))
    return int(pid)


def test_a_killed_worker_says_nothing_of_the_model(tmp_path: Path) -> None:
    with running(make_job(tmp_path, sessions=["latency"], session_s=60)) as process:
        os.kill(in_session(process), signal.SIGKILL)
        assert process.stdout is not None
        reply = json.loads(process.stdout.read())
        assert process.wait() == 70
    assert reply["runs_on_device"] is None
    assert (reply["cause"]["what"], reply["cause"]["signal"]) == ("killed", signal.SIGKILL)


def test_a_worker_killed_in_the_self_test_says_nothing_of_the_backend(tmp_path: Path) -> None:
    package = tmp_path / "site" / "ai_edge_litert"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "interpreter.py").write_text("import os; os.kill(os.getpid(), 9)")
    job = make_job(tmp_path, runtime=None)
    reply = execute(job, PYTHONPATH=str(package.parent))
    assert (reply["code"], reply["runs_on_device"], reply["cause"]["what"]) == (70, None, "killed")


def test_samples_that_do_not_fit_say_nothing_of_the_model(tmp_path: Path) -> None:
    given = tmp_path / "inputs.bin"
    given.write_bytes(bytes(17))
    inputs = {**item(given), "count": 1, "tensors": ["x"]}
    reply = execute(make_job(tmp_path, sessions=["outputs"], inputs=inputs))
    assert (reply["code"], reply["error"]) == (64, "bad-request")
    assert reply["runs_on_device"] is None


@pytest.mark.parametrize("cpus", [[8000], [0, 8000], [-1]])
def test_a_cpu_that_is_not_there_says_nothing_of_the_model(tmp_path: Path, cpus: list[int]) -> None:
    reply = execute(make_job(tmp_path, affinity=cpus))
    assert (reply["code"], reply["error"]) == (64, "bad-request")
    assert reply["runs_on_device"] is None


def test_no_worker_outlives_its_supervisor(tmp_path: Path) -> None:
    with running(make_job(tmp_path, sessions=["latency"], session_s=60)) as process:
        worker = in_session(process)
        wait_for(lambda: Path(f"/proc/{worker}/comm").exists())
        # give it time to ask for the signal: it does so before it reads its job
        wait_for(lambda: b"libLiteRt" in Path(f"/proc/{worker}/maps").read_bytes())
        process.kill()
        process.wait()
        wait_for(lambda: is_gone(worker))


def test_a_worker_born_an_orphan_does_nothing(tmp_path: Path) -> None:
    """The supervisor was killed before its worker could ask to die with it."""
    done = subprocess.run(
        [sys.executable, RUNNER, "--worker", "1"], input=b"{}", capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def is_gone(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_a_second_job_is_told_who_holds_the_board(tmp_path: Path) -> None:
    with running(make_job(tmp_path, sessions=["latency"], session_s=60)) as process:
        in_session(process)
        reply = execute(make_job(tmp_path, id="job-2"))
    assert (reply["code"], reply["error"]) == (75, "busy")
    assert (reply["owner"]["job"], reply["owner"]["pid"]) == ("job-1", process.pid)


def test_the_lease_dies_with_its_holder(tmp_path: Path) -> None:
    with running(make_job(tmp_path, sessions=["latency"], session_s=60)) as process:
        worker = in_session(process)
        process.kill()
        process.wait()
        wait_for(lambda: is_gone(worker))
    assert execute(make_job(tmp_path, id="job-2", sessions=[]))["code"] == 0


def test_the_lease_holds_between_two_calls_of_one_job(tmp_path: Path) -> None:
    assert execute(make_job(tmp_path, sessions=[], lease_s=30))["code"] == 0
    other = make_job(tmp_path, id="job-2", sessions=[])
    reply = execute(other)
    assert (reply["code"], reply["owner"]["job"]) == (75, "job-1")
    assert execute(make_job(tmp_path, sessions=[], lease_s=0))["code"] == 0
    assert execute(other)["code"] == 0


def test_a_lease_from_before_a_reboot_is_void(tmp_path: Path) -> None:
    execute(make_job(tmp_path, sessions=[], lease_s=30))
    lock = tmp_path / "lock"
    owner = json.loads(lock.read_text())
    lock.write_text(json.dumps({**owner, "boot_id": "another"}))
    assert execute(make_job(tmp_path, id="job-2", sessions=[]))["code"] == 0


def test_an_expired_lease_is_void(tmp_path: Path) -> None:
    execute(make_job(tmp_path, sessions=[], lease_s=-1))
    assert execute(make_job(tmp_path, id="job-2", sessions=[]))["code"] == 0


def test_a_lease_file_of_garbage_is_void(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("[1, 2")
    assert execute(make_job(tmp_path, sessions=[]))["code"] == 0


def test_the_lock_is_an_flock_on_the_lease_file(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert execute(make_job(tmp_path, sessions=[]))["code"] == 75


def test_a_full_disk_is_found_before_anything_runs(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, min_free_bytes=2**60))
    assert (reply["code"], reply["error"], reply["sessions"]) == (73, "disk-full", [])


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the job but for nothing more."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_is_code_73(full_disk: Path) -> None:
    job = make_job(full_disk)
    (full_disk / "lock").write_text(" " * 100)
    with contextlib.suppress(OSError), (full_disk / "ballast").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(512))
    reply = execute(job)
    assert (reply["code"], reply["error"]) == (73, "disk-full")


def test_a_board_without_any_runtime_says_what_it_lacks(tmp_path: Path, bare_python: str) -> None:
    reply = execute(make_job(tmp_path, runtime=None), python=bare_python)
    assert (reply["code"], reply["error"]) == (69, "no-runtime")
    assert {r["backend"] for r in reply["rejected"]} == {
        "litert-c", "litert-interpreter", "tflite-runtime-interpreter",
    }  # fmt: skip
    assert "has no ai_edge_litert" in reply["message"]


def test_a_bare_python_measures_with_a_pushed_library(tmp_path: Path, bare_python: str) -> None:
    reply = execute(make_job(tmp_path, sessions=["latency"]), python=bare_python)
    assert (reply["code"], reply["runtime"]["backend"]) == (0, "litert-c")


def test_a_library_for_another_machine_is_not_loaded(tmp_path: Path, bare_python: str) -> None:
    library = tmp_path / "libLiteRt.so"
    # ELF, 64 bit, little endian, shared object, e_machine 40 = ARM (32 bit)
    library.write_bytes(b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 3, 40) + bytes(44))
    wrong = {**item(library), "version": "2.3.0", "glibc": "2.27"}
    reply = execute(make_job(tmp_path, runtime=wrong), python=bare_python)
    assert reply["code"] == 69
    assert f"the library is for armv7l, this process is {platform.machine()}" in reply["message"]


def test_a_library_that_needs_a_newer_libc_is_not_loaded(tmp_path: Path, bare_python: str) -> None:
    library = runtime_library(platform.machine())
    wrong = {**item(library.path), "version": "2.3.0", "glibc": "99.1"}
    reply = execute(make_job(tmp_path, runtime=wrong), python=bare_python)
    assert reply["code"] == 69
    assert "needs glibc 99.1" in reply["message"]


def test_a_library_with_the_older_c_api_is_not_loaded(tmp_path: Path, bare_python: str) -> None:
    library = runtime_library(platform.machine())
    wrong = {**item(library.path), "version": "2.1.5", "glibc": "2.27"}
    reply = execute(make_job(tmp_path, runtime=wrong), python=bare_python)
    assert (reply["code"], "2.1.6" in reply["message"]) == (69, True)


def test_a_library_that_kills_its_process_is_rejected(tmp_path: Path, bare_python: str) -> None:
    """A file with the right ELF header and nothing behind it: only a worker opens it."""
    good = runtime_library(platform.machine()).path.read_bytes()
    library = tmp_path / "libLiteRt.so"
    library.write_bytes(good[:4096])
    wrong = {**item(library), "version": "2.3.0", "glibc": "2.27"}
    reply = execute(make_job(tmp_path, runtime=wrong), python=bare_python)
    assert reply["code"] == 69
    assert reply["rejected"][-1]["backend"] == "litert-c"


def test_the_next_backend_is_tried_and_the_record_says_so(tmp_path: Path) -> None:
    library = tmp_path / "libLiteRt.so"
    library.write_bytes(b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 3, 40) + bytes(44))
    wrong = {**item(library), "version": "2.3.0", "glibc": "2.27"}
    reply = execute(make_job(tmp_path, runtime=wrong))
    assert (reply["code"], reply["runtime"]["backend"]) == (0, "litert-interpreter")
    assert "armv7l" in next(r["reason"] for r in reply["rejected"] if r["backend"] == "litert-c")


def test_a_demanded_backend_is_not_replaced(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, runtime=None, backend="litert-c"))
    assert reply["code"] == 69
    assert "litert-interpreter" not in reply["message"]


@pytest.mark.slow
def test_the_time_budget_is_kept_on_the_board(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, sessions=["latency"], session_s=600, budget_s=3))
    assert (reply["code"], reply["error"]) == (124, "budget")


def test_a_budget_that_ends_in_the_self_test_blames_no_runtime(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, budget_s=0.01))
    assert (reply["code"], reply["error"]) == (124, "budget")


def test_an_unknown_key_in_a_job_is_refused(tmp_path: Path) -> None:
    reply = execute(make_job(tmp_path, tempo=3))
    assert (reply["code"], "unknown key tempo" in reply["message"]) == (64, True)


def test_a_newer_job_is_refused(tmp_path: Path) -> None:
    assert execute(make_job(tmp_path, schema=2))["code"] == 64


def test_no_job_is_code_64(tmp_path: Path) -> None:
    assert execute(tmp_path / "absent.json")["code"] == 64


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(key=st.sampled_from(["model", "runtime", "inputs", "sessions", "threads", "id"]), value=JSON)
def test_a_job_is_whole_or_refused(
    runner: ModuleType, tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    path = make_job(tmp_path_factory.mktemp("job"))
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    try:
        job = runner.load_job(str(path))
    except runner.Stop as stop:
        assert stop.code == 64  # noqa: PT017
    else:
        assert job[key] == value


# ------------------------------------------------------------------------------ health

PI = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "81200",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "2",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
    "sys/devices/system/cpu/cpufreq/policy0/related_cpus": "0 1 2 3",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "600000",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1500000",
    "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1800000",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.1\0",
    "proc/loadavg": "0.50 0.40 0.30 1/200 1234",
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
    reply = execute("facts", "/tmp", EDGEPIPE_SYSROOT=str(pi))
    assert reply["device"]["model"] == "Raspberry Pi 4 Model B Rev 1.1"
    health = reply["health"]
    assert health["temperature_c"] == 81.2
    assert health["governor"] == "ondemand"
    assert health["throttling"] == [
        "under_voltage", "throttled", "under_voltage_occurred", "throttled_occurred",
    ]  # fmt: skip
    assert health["memory_available_bytes"] == 3_000_000 * 1024
    assert health["swap_used_bytes"] == 60 * 1024
    assert (health["pages_swapped_in"], health["oom_kills"]) == (7, 2)


def test_a_board_that_says_nothing_is_not_a_healthy_one(tmp_path: Path) -> None:
    health = execute("facts", "/tmp", EDGEPIPE_SYSROOT=str(tmp_path))["health"]
    for key in ("temperature_c", "throttling", "governor", "loadavg_1min", "pages_swapped_in"):
        assert health[key] is None


def calm(**changes: Any) -> dict[str, Any]:
    return {
        "realtime_s": 1000.0, "monotonic_s": 10.0, "boot_id": "a", "throttling": [], "cooling": {},
        "frequencies": {}, "pages_swapped_in": 0,
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
        ({"cooling": {"cooling_device0:pwm-fan": 3}}, []),
        ({"cooling": {"cooling_device0:cpu": 3}}, ["cooling_rose"]),
        (
            {"frequencies": {"policy0": {"limit_khz": 1, "hardware_limit_khz": 2}}},
            ["frequency_capped"],
        ),
    ],
)
def test_flags_say_what_happened_to_the_board(
    runner: ModuleType, after: dict[str, Any], flags: list[str]
) -> None:
    assert runner.health_flags(calm(), calm(**after)) == flags


def test_throttling_before_the_session_is_no_event_in_it(runner: ModuleType) -> None:
    old = calm(throttling=["throttled_occurred"])
    assert runner.health_flags(old, old) == []
