"""The payload's worker, `targets/linux/worker.py`: one session in one process, on real runtimes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepipe.resources import target_dir
from edgepipe.runtime import runtime_library
from edgepipe.tflite_ops.tiny import (
    counting_tflite,
    crashing_tflite,
    stateful_tflite,
    tiny_tflite,
)

TARGET = target_dir("linux")
WORKER = TARGET / "worker.py"
RUNTIMES = {
    "litert-c": {"backend": "litert-c", "path": str(runtime_library(platform.machine()).path)},
    "litert-interpreter": {"backend": "litert-interpreter", "module": "ai_edge_litert"},
}


@pytest.fixture(scope="module")
def backends() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("linux_backends", TARGET / "backends.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_spec(
    folder: Path, kind: str, model: bytes | None = None, backend: str = "litert-c", **changes: Any
) -> dict[str, Any]:
    """A session of a fraction of a second; ``changes`` replace its keys."""
    path = folder / "model.tflite"
    path.write_bytes(tiny_tflite() if model is None else model)
    (folder / "self-test.tflite").write_bytes(tiny_tflite())
    return {
        "kind": kind, "tag": f"{kind}-1", "runtime": RUNTIMES[backend],
        "self_test": str(folder / "self-test.tflite"), "job_dir": str(folder),
        "arms": {"model": str(path)}, "threads": 1, "affinity": [], "kernel": "",
        "weight_cache": False, "seed": 0, "warmup_s": 0.02, "session_s": 0.05,
        "min_inferences": 30, "inputs": None, "out_path": str(folder / "outputs.bin"),
    } | changes  # fmt: skip


def run_worker(spec: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, WORKER, str(os.getpid())],
        input=json.dumps(spec).encode(),
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def work(spec: dict[str, Any], **environment: str) -> Any:
    """The data of a session that succeeds; its stdout must be one JSON object."""
    done = run_worker(spec, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["ok"]


def refused(spec: dict[str, Any]) -> Any:
    done = run_worker(spec)
    assert done.returncode == 1
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------ what it is


def test_its_self_test_model_is_the_tiny_model(backends: Any) -> None:
    assert tiny_tflite() == backends.SELF_TEST_MODEL


def test_its_table_of_stateful_operators_is_that_of_the_schema(backends: Any) -> None:
    from ai_edge_litert.schema_py_generated import BuiltinOperator as Op

    assert {
        Op.LSTM, Op.RNN, Op.SVDF, Op.UNIDIRECTIONAL_SEQUENCE_RNN, Op.UNIDIRECTIONAL_SEQUENCE_LSTM,
        Op.BIDIRECTIONAL_SEQUENCE_RNN, Op.BIDIRECTIONAL_SEQUENCE_LSTM, Op.CALL_ONCE, Op.VAR_HANDLE,
        Op.READ_VARIABLE, Op.ASSIGN_VARIABLE,
    } == backends.STATEFUL_OPERATORS  # fmt: skip


def test_a_worker_born_an_orphan_does_nothing() -> None:
    """The supervisor was killed before its worker could ask to die with it."""
    done = subprocess.run([sys.executable, WORKER, "1"], input=b"{}", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


# ------------------------------------------------------------------------------ latency, memory


def test_a_latency_session_gives_raw_wall_and_cpu_nanoseconds(tmp_path: Path) -> None:
    data = work(make_spec(tmp_path, "latency"))["arms"]["model"]
    assert len(data["wall_ns"]) == len(data["cpu_ns"]) >= 30
    assert all(isinstance(ns, int) and ns > 0 for ns in data["wall_ns"])
    # one thread cannot use more CPU than there is time, but for the clock reads around the wall
    # interval: 2 system calls of at most 20 us per sample
    assert sum(data["cpu_ns"]) <= sum(data["wall_ns"]) + 40_000 * len(data["wall_ns"])
    assert data["warmup_wall_ns"]
    assert data["first_inference_ns"] > 0
    assert data["load_ns"] == sum(data["load_parts_ns"].values()) > 0


def test_a_fast_model_is_timed_in_batches(tmp_path: Path) -> None:
    # 2 us per inference: the batch is meant to last 1 ms
    assert work(make_spec(tmp_path, "latency"))["arms"]["model"]["inner_loops"] > 10


def test_a_slow_model_is_timed_one_by_one(tmp_path: Path) -> None:
    # 24 layers of 512 x 512: 6.3 million multiplications take more than 200 us anywhere
    spec = make_spec(tmp_path, "latency", tiny_tflite(size=512, layers=24))
    assert work(spec)["arms"]["model"]["inner_loops"] == 1


def test_memory_grows_by_what_the_model_needs(tmp_path: Path) -> None:
    # one weight matrix of 512 x 512 float32 = 1 MiB
    data = work(make_spec(tmp_path, "memory", tiny_tflite(size=512)))
    file_size = (tmp_path / "model.tflite").stat().st_size
    assert 2**20 <= data["file_bytes"] <= file_size + os.sysconf("SC_PAGE_SIZE")
    assert data["anon_bytes"] >= 2**20  # XNNPACK packs the weights into a second copy
    assert data["peak_bytes"] is None or data["peak_bytes"] >= data["anon_bytes"]
    assert set(data["stages"]) == {"before_load", "after_load", "after_first", "steady"}


def test_what_a_runtime_prints_is_no_part_of_the_answer(tmp_path: Path) -> None:
    """Also the way of a board with tflite_runtime: a package of that name, around LiteRT's."""
    package = tmp_path / "site" / "tflite_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os; os.write(1, b'hello from the runtime')\n")
    (package / "interpreter.py").write_text(
        "from ai_edge_litert.interpreter import Interpreter, OpResolverType\n"
    )
    runtime = {"backend": "tflite-runtime-interpreter", "module": "tflite_runtime"}
    spec = make_spec(tmp_path, "latency", runtime=runtime)
    assert work(spec, PYTHONPATH=str(package.parent))["rounds"] >= 30


def test_the_same_seed_gives_the_same_outputs_on_every_backend(tmp_path: Path) -> None:
    def output_sha256(**changes: Any) -> str:
        data = work(make_spec(tmp_path, "latency", **changes))
        return str(data["arms"]["model"]["output_sha256"])

    same = output_sha256(backend="litert-c", seed=3)
    assert same == output_sha256(backend="litert-interpreter", seed=3)
    assert same != output_sha256(seed=4)


@pytest.mark.parametrize(
    ("model", "backend", "state"),
    [
        (tiny_tflite, "litert-c", "none"),
        (counting_tflite, "litert-c", "kept"),
        (counting_tflite, "litert-interpreter", "kept"),
        (stateful_tflite, "litert-interpreter", "reset-before-each-batch"),
    ],
)
def test_the_record_says_what_became_of_state(
    tmp_path: Path, model: Any, backend: str, state: str
) -> None:
    data = work(make_spec(tmp_path, "latency", model(), backend))
    assert data["arms"]["model"]["state"] == state


# ------------------------------------------------------------------------------ outputs


def samples_for(folder: Path, rows: list[list[float]]) -> dict[str, Any]:
    path = folder / "inputs.bin"
    path.write_bytes(b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows))
    return {"path": str(path), "count": len(rows), "tensors": ["x"]}


def outputs_of(data: Any, width: int = 4) -> list[tuple[float, ...]]:
    raw = Path(data["path"]).read_bytes()
    assert (data["size"], data["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    return list(struct.iter_unpack(f"<{width}f", raw))


def test_outputs_come_back_for_given_inputs(tmp_path: Path) -> None:
    inputs = samples_for(tmp_path, [[0, 1, 2, 3], [4, 5, 6, 7]])
    data = work(make_spec(tmp_path, "outputs", inputs=inputs))
    assert outputs_of(data) == [(1, 3, 5, 7), (9, 11, 13, 15)]


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
    inputs = samples_for(tmp_path, [[1, 1, 1, 1]] * 3)
    data = work(make_spec(tmp_path, "outputs", model(), backend, inputs=inputs))
    assert outputs_of(data) == [(1, 1, 1, 1)] * 3


# ------------------------------------------------------------------------------ what it refuses


def test_samples_that_do_not_fit_say_nothing_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "inputs.bin"
    path.write_bytes(bytes(17))
    inputs = {"path": str(path), "count": 1, "tensors": ["x"]}
    assert refused(make_spec(tmp_path, "outputs", inputs=inputs))["what"] == "bad-request"


@pytest.mark.parametrize("cpus", [[8000], [0, 8000], [-1]])
def test_a_cpu_that_is_not_there_says_nothing_of_the_model(tmp_path: Path, cpus: list[int]) -> None:
    assert refused(make_spec(tmp_path, "memory", affinity=cpus))["what"] == "bad-request"


def test_a_model_the_backend_does_not_support_is_told_from_a_bad_one(tmp_path: Path) -> None:
    """LiteRT 2.3.0: "Variable tensors not yet supported" by the C API."""
    assert refused(make_spec(tmp_path, "memory", stateful_tflite()))["what"] == "unsupported"
    damaged = bytearray(tiny_tflite())
    damaged[:4] = b"\xff\xff\xff\x7f"  # the root table lies far outside the file
    answer = refused(make_spec(tmp_path, "memory", bytes(damaged)))
    assert "what" not in answer
    assert "LiteRtCreateModelFromFile" in answer["error"]


def test_a_model_that_crashes_ends_its_worker_by_the_signal(tmp_path: Path) -> None:
    done = run_worker(make_spec(tmp_path, "memory", crashing_tflite()))
    assert done.returncode == -signal.SIGSEGV
    assert b"Segmentation fault" in done.stderr
