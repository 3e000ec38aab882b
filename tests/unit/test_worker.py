"""The payload's worker, `targets/linux/worker.py`: one session in one process, on real runtimes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.payload import payload_files
from edgepipe.resources import target_dir
from edgepipe.runtime import runtime_library
from edgepipe.tflite_ops.merge import merge_signatures
from edgepipe.tflite_ops.tiny import (
    counting_tflite,
    crashing_tflite,
    op_chain_tflite,
    stateful_tflite,
    tiny_tflite,
)
from tests.unit.board_side import (
    branching_tflite,
    bucket_files,
    bucket_samples,
    merged_file,
    one_counts,
)
from tests.unit.tflite_builder import Graph

pytestmark = pytest.mark.slow  # real processes and trainings: not for the inner loop

TARGET = target_dir("linux")
WORKER = TARGET / "worker.py"
RUNTIMES = {
    "litert-c": {"backend": "litert-c", "path": str(runtime_library(platform.machine()).path)},
    "litert-interpreter": {"backend": "litert-interpreter", "module": "ai_edge_litert"},
}


@functools.cache
def slow_tflite() -> bytes:
    """24 layers of 512 x 512: 6.3 million multiplications take more than 200 us anywhere."""
    return tiny_tflite(size=512, layers=24)


def load(name: str) -> Any:
    """A module of the payload, in this process."""
    spec = importlib.util.spec_from_file_location(f"linux_{name}", TARGET / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TARGET))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backends() -> Any:
    return load("backends")


@pytest.fixture(scope="module")
def worker() -> Any:
    return load("worker")


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


def test_its_table_of_operators_that_run_other_graphs_is_that_of_the_schema(backends: Any) -> None:
    from ai_edge_litert import schema_py_generated as schema

    found = set()
    for union, by_options in ((schema.BuiltinOptions, "BuiltinOptions"), (schema.BuiltinOptions2, "BuiltinOptions2")):  # fmt: skip
        assert union.__name__ == by_options
        for name in vars(union):
            fields = vars(getattr(schema, name + "T", object)()) if hasattr(schema, name + "T") else {}  # fmt: skip
            if any(
                re.search("subgraph|calledcomputations|branch", field, re.I) for field in fields
            ):
                found.add(name[: -len("Options")])
    assert found == {
        "Call", "If", "While", "CallOnce", "StablehloCustomCall", "StablehloReduce", "StablehloScatter",
        "StablehloReduceWindow", "StablehloSort", "StablehloWhile", "StableHLOComposite", "StablehloCase",
    }  # fmt: skip
    numbers = {k.replace("_", "").lower(): v for k, v in vars(schema.BuiltinOperator).items()}
    assert {numbers[name.lower()] for name in found} == backends.CALLING_OPERATORS


def test_a_worker_born_an_orphan_does_nothing() -> None:
    """The supervisor was killed before its worker could ask to die with it."""
    done = subprocess.run([sys.executable, WORKER, "1"], input=b"{}", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_all_that_runs_on_a_board_is_pushed_to_it() -> None:
    _, _, files = payload_files("linux")
    assert {path.name for path in TARGET.glob("*.py")} <= set(files)


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
    # 2 us per inference: the batch is meant to last 0.25 ms
    assert work(make_spec(tmp_path, "latency"))["arms"]["model"]["inner_loops"] > 10


def test_a_slow_model_is_timed_one_by_one(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "latency", slow_tflite())
    assert work(spec)["arms"]["model"]["inner_loops"] == 1


def two_arms(folder: Path, base: bytes, candidate: bytes, **changes: Any) -> dict[str, Any]:
    arms = {"base": folder / "base.tflite", "candidate": folder / "candidate.tflite"}
    arms["base"].write_bytes(base)
    arms["candidate"].write_bytes(candidate)
    paths = {arm: str(path) for arm, path in arms.items()}
    return make_spec(folder, "latency", arms=paths, **changes)


def round_ratios(data: Any) -> list[float]:
    """CPU time of the candidate over that of the base, round by round."""
    base, candidate = data["arms"]["base"], data["arms"]["candidate"]
    scale = base["inner_loops"] / candidate["inner_loops"]
    pairs = zip(candidate["cpu_ns"], base["cpu_ns"], strict=True)
    return [new / old * scale for new, old in pairs]


def test_two_models_are_timed_round_by_round_in_one_process(tmp_path: Path) -> None:
    spec = two_arms(
        tmp_path, tiny_tflite(size=256, layers=8), tiny_tflite(size=256, layers=16), session_s=0.3
    )
    data = work(spec)
    ratios = round_ratios(data)
    assert len(ratios) == data["rounds"] >= 30
    # twice the layers; the call itself is 2 us of some 100, so the ratio is a little under 2, and
    # no neighbour on this machine counts as CPU time of ours
    assert 1.5 < statistics.median(ratios) < 2.5


def test_a_model_beside_itself_takes_the_same_time(tmp_path: Path) -> None:
    model = tiny_tflite(size=256, layers=16)
    data = work(two_arms(tmp_path, model, model, session_s=0.5))
    # some 300 rounds of 0.25 ms; sessions scatter by 0.3 % with five processes for every CPU
    assert 0.95 < statistics.median(round_ratios(data)) < 1.05
    shas = {arm["output_sha256"] for arm in data["arms"].values()}
    assert len(shas) == 1


def test_each_round_runs_every_arm_once_in_shuffled_order(tmp_path: Path) -> None:
    """The worker's own loop, which notes whose turn it is."""
    script = """
import json, sys
import worker
turns, timed = [], worker.timed
worker.timed = lambda model, count, cpu: turns.append(id(model)) or timed(model, count, cpu)
data = worker.work_latency(json.load(sys.stdin))
print(json.dumps([data["rounds"], turns[-2 * data["rounds"]:]]))
"""
    spec = two_arms(tmp_path, tiny_tflite(), tiny_tflite(layers=2))

    def turns(**changes: Any) -> list[tuple[int, int]]:
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(spec | changes).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(TARGET)},
            check=True,
        )
        rounds, models = json.loads(done.stdout)
        number = {model: index for index, model in enumerate(sorted(set(models)))}
        found = [number[model] for model in models]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        assert len(pairs) == rounds
        return pairs

    # 60 rounds all in one order come once in 2^59 seeds
    assert set(turns(min_inferences=60)) == {(0, 1), (1, 0)}


def test_another_session_has_another_order(tmp_path: Path) -> None:
    spec = two_arms(tmp_path, tiny_tflite(), tiny_tflite())
    seeds = [work(spec | {"tag": tag})["order_seed"] for tag in ("latency-1", "latency-1", "latency-2")]  # fmt: skip
    assert seeds[0] == seeds[1] != seeds[2]


@given(
    st.dictionaries(
        st.sampled_from(["base", "candidate"]),
        st.lists(st.integers(1, 10**8), min_size=1, max_size=5),
        min_size=1,
    )
)
def test_a_sample_is_one_inference_or_a_quarter_millisecond_of_them(
    worker: Any, warmups: dict[str, list[int]]
) -> None:
    sizes = worker.batch_sizes(warmups)
    typical = {arm: sorted(walls)[len(walls) // 2] for arm, walls in warmups.items()}
    slow, fast = max(typical.values()), min(typical.values())
    for arm, ns in typical.items():
        like = fast if slow <= 2 * fast else ns
        assert sizes[arm] == 1 if like >= 200_000 else sizes[arm] * ns >= 250_000
    if slow <= 2 * fast:
        assert len(set(sizes.values())) == 1


def test_time_in_state_is_that_of_the_session(worker: Any) -> None:
    before = {"policy0": {"600000": 10.0, "1500000": 5.0}}
    after = {"policy0": {"600000": 10.5, "1500000": 7.0}}
    assert worker.time_spent(before, after) == {"policy0": {"600000": 0.5, "1500000": 2.0}}
    assert worker.time_spent(None, after) is None


def test_time_in_state_is_read_from_the_kernels_ticks(tmp_path: Path) -> None:
    stats = tmp_path / "sys/devices/system/cpu/cpufreq/policy0/stats"
    stats.mkdir(parents=True)
    (stats / "time_in_state").write_text("600000 100\n1500000 250\n")
    spec = make_spec(tmp_path, "latency")
    # the tree does not change while the session runs: no time is spent anywhere
    data = work(spec, EDGEPIPE_SYSROOT=str(tmp_path))
    assert data["time_in_state"] == {"policy0": {"600000": 0.0, "1500000": 0.0}}
    assert work(spec)["time_in_state"] != data["time_in_state"]


def test_the_measuring_process_weighs_less_than_16_mb(tmp_path: Path) -> None:
    data = work(make_spec(tmp_path, "memory"))
    assert 0 < data["overhead_bytes"] < 16e6
    assert data["overhead_bytes"] < data["stages"]["before_load"]["rss"]


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


def test_what_an_operator_of_control_flow_runs_is_not_guessed(tmp_path: Path) -> None:
    model = branching_tflite()
    arm = work(make_spec(tmp_path, "latency", model))["arms"]["model"]
    assert arm["state"] == "kept"
    inputs = samples_for(tmp_path, [[0, 1, 2, 3]] * 2)
    data = work(make_spec(tmp_path, "outputs", model, inputs=inputs))
    assert (outputs_of(data), data["reloads"]) == ([(1, 3, 5, 7)] * 2, 1)
    assert refused(make_spec(tmp_path, "ops", model))["what"] == "unsupported"


@pytest.mark.parametrize("main", ["counts", "plain"])
@pytest.mark.parametrize(("backend", "stateless"), [("litert-c", "none"), ("litert-interpreter", "reset-before-each-batch")])  # fmt: skip
def test_state_is_that_of_the_signature_and_not_of_others(
    tmp_path: Path, backend: str, stateless: str, main: str
) -> None:
    def state(key: str) -> str:
        spec = make_spec(tmp_path, "latency", one_counts(main=main), backend, signatures={"model": key})  # fmt: skip
        return str(work(spec)["arms"]["model"]["state"])

    assert (state("counts"), state("plain")) == ("kept", stateless)


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("main", ["counts", "plain"])
def test_a_signature_that_keeps_state_begins_anew_with_each_sample(
    tmp_path: Path, backend: str, main: str
) -> None:
    inputs = samples_for(tmp_path, [[1, 1, 1, 1]] * 3)
    spec = make_spec(tmp_path, "outputs", one_counts(main=main), backend, inputs=inputs, signatures={"model": "counts"})  # fmt: skip
    assert outputs_of(work(spec)) == [(1, 1, 1, 1)] * 3


@pytest.mark.parametrize("backend", RUNTIMES)
def test_the_main_graph_is_what_its_signature_is(tmp_path: Path, backend: str) -> None:
    def measured(model: bytes, **changes: Any) -> Any:
        data = work(make_spec(tmp_path, "latency", model, backend, **changes))["arms"]["model"]
        return {key: data[key] for key in ("inputs", "outputs", "output_sha256", "state")}

    first = next(iter(bucket_files()))
    assert measured(merged_file()) == measured(merged_file(), signatures={"model": first})
    assert measured(merged_file()) == measured(bucket_files()[first])
    second = one_counts(main="plain")  # where it is not the first signature
    assert measured(second) == measured(second, signatures={"model": "plain"})
    assert measured(second) != measured(second, signatures={"model": "counts"})


@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_signature_runs_whatever_scratch_tensors_its_kernels_leave_unused(
    tmp_path: Path, backend: str
) -> None:
    # a dense layer's builtin kernel has some that get no type
    files = {f"dense{n}": op_chain_tflite("dense", repeats=n) for n in (1, 2)}
    signatures = {"model": "dense2"}
    of_it = make_spec(tmp_path, "latency", merge_signatures(files), backend, kernel="builtin", signatures=signatures)  # fmt: skip
    found = work(of_it)["arms"]["model"]
    alone = work(make_spec(tmp_path, "latency", files["dense2"], backend, kernel="builtin"))["arms"]["model"]  # fmt: skip
    assert found["output_sha256"] == alone["output_sha256"]


@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_signature_that_is_not_there_is_a_bad_request_that_names_those_that_are(
    tmp_path: Path, backend: str
) -> None:
    reply = refused(make_spec(tmp_path, "memory", merged_file(), backend, signatures={"model": "length5"}))  # fmt: skip
    assert reply["what"] == "bad-request"
    assert reply["error"] == "the model has no signature 'length5'; it has: length16, length4, length8"  # fmt: skip


def test_a_signature_has_a_weight_cache_as_its_own_file_has(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "memory", merged_file(), weight_cache=True, signatures={"model": "length16"})  # fmt: skip
    assert work(spec)["inputs"][0]["shape"] == [1, 16, 4, 1]
    assert (tmp_path / "weights-model").stat().st_size > 0


# ------------------------------------------------------------------------------ operators


def test_operators_are_timed_one_by_one(tmp_path: Path) -> None:
    model = slow_tflite()
    data = work(make_spec(tmp_path, "ops", model))
    assert (data["inferences"], data["profiler"]) == (30, True)
    ops = data["ops"]
    assert [op["index"] for op in ops] == list(range(len(ops)))
    assert all(len(op["ns"]) == 30 for op in ops)
    dense = [op for op in ops if "Fully Connected" in op["name"]]
    assert len(dense) == 24
    assert {op["where"] for op in ops} == {"delegate"}


def test_the_operators_together_take_about_the_time_of_the_inference(tmp_path: Path) -> None:
    model = slow_tflite()
    ops = work(make_spec(tmp_path, "ops", model))["ops"]
    total = sum(min(op["ns"]) for op in ops)
    arm = work(make_spec(tmp_path, "latency", model, session_s=0.5))["arms"]["model"]
    # near 1 on an idle machine; the shortest times are the ones least disturbed on a busy one, and
    # a unit mistaken or operators counted twice are factors
    assert 0.5 < total / min(arm["cpu_ns"]) < 1.8


def test_operators_outside_the_delegate_are_told_from_those_inside(tmp_path: Path) -> None:
    """LOG_SOFTMAX is not in XNNPACK, so it cuts the graph; XNNPACK counts anew in each part."""
    graph = Graph()
    weights, bias = np.eye(8, dtype=np.float32), np.ones(8, np.float32)
    first = graph.dense(graph.input("x", (1, 8)), weights, bias, "first", (1, 8))
    middle = graph.op("LOG_SOFTMAX", [first], "middle", (1, 8), "LogSoftmaxOptions")
    last = graph.dense(middle, weights, bias, "last", (1, 8))
    ops = work(make_spec(tmp_path, "ops", graph.bytes([last])))["ops"]
    assert [op["where"] for op in ops if "Reshape" not in op["name"]] == [
        "delegate", "builtin", "delegate",
    ]  # fmt: skip
    assert [op["name"] for op in ops if op["where"] == "builtin"] == ["LOG_SOFTMAX"]


@pytest.mark.parametrize("key", bucket_files())
def test_the_operators_of_a_signature_are_those_of_its_own_file(tmp_path: Path, key: str) -> None:
    def operators(model: bytes, **changes: Any) -> list[tuple[str, str]]:
        ops = work(make_spec(tmp_path, "ops", model, **changes))["ops"]
        return [(op["name"], op["where"]) for op in ops]

    found = operators(merged_file(), signatures={"model": key})
    assert found == operators(bucket_files()[key])
    assert [where for name, where in found if "SOFTMAX" in name] == ["builtin"]


@pytest.mark.parametrize(
    ("model", "backend"), [(tiny_tflite, "litert-interpreter"), (counting_tflite, "litert-c")]
)
def test_operators_that_cannot_be_timed_say_nothing_of_the_model(
    tmp_path: Path, model: Any, backend: str
) -> None:
    assert refused(make_spec(tmp_path, "ops", model(), backend))["what"] == "unsupported"


# ------------------------------------------------------------------------------ kernels, cache


def test_the_kernel_is_the_one_asked_for(tmp_path: Path) -> None:
    for kernel, where in (("builtin", "builtin"), ("xnnpack", "delegate")):
        ops = work(make_spec(tmp_path, "ops", kernel=kernel))["ops"]
        assert {op["where"] for op in ops} == {where}


def test_the_interpreter_can_do_without_xnnpack(tmp_path: Path) -> None:
    inputs = samples_for(tmp_path, [[0, 1, 2, 3]])
    said = {}
    for kernel in ("", "builtin"):
        spec = make_spec(
            tmp_path, "outputs", backend="litert-interpreter", kernel=kernel, inputs=inputs
        )
        done = run_worker(spec)
        assert outputs_of(json.loads(done.stdout)["ok"]) == [(1, 3, 5, 7)]
        said[kernel] = b"XNNPACK delegate" in done.stderr
    assert said == {"": True, "builtin": False}


def test_an_unknown_kernel_is_a_bad_request(tmp_path: Path) -> None:
    answer = refused(make_spec(tmp_path, "memory", kernel="fast"))
    assert (answer["what"], "fast" in answer["error"]) == ("bad-request", True)


@pytest.mark.parametrize("option", [{"kernel": "xnnpack"}, {"weight_cache": True}])
def test_what_the_interpreter_cannot_do_is_no_fault_of_the_model(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    spec = make_spec(tmp_path, "memory", backend="litert-interpreter", **option)
    assert refused(spec)["what"] == "unsupported"


def test_a_weight_cache_moves_packed_weights_from_memory_to_a_mapped_file(tmp_path: Path) -> None:
    # one weight matrix of 512 x 512 float32 = 1 MiB
    model = tiny_tflite(size=512)
    plain = work(make_spec(tmp_path, "memory", model))
    cached = work(make_spec(tmp_path, "memory", model, weight_cache=True))
    cache = tmp_path / "weights-model"
    assert cache.stat().st_size > 2**20
    assert plain["anon_bytes"] - cached["anon_bytes"] > 2**19
    assert cached["file_bytes"] >= 2**20
    made = cache.stat().st_mtime_ns
    work(make_spec(tmp_path, "latency", model, weight_cache=True))
    assert cache.stat().st_mtime_ns == made


def test_each_arm_has_its_own_weight_cache(tmp_path: Path) -> None:
    work(two_arms(tmp_path, tiny_tflite(size=64), tiny_tflite(size=128), weight_cache=True))
    sizes = [(tmp_path / f"weights-{arm}").stat().st_size for arm in ("base", "candidate")]
    assert sizes[0] < sizes[1]
    assert not list(tmp_path.glob("*.part"))


def test_a_cache_of_nothing_is_refused(tmp_path: Path) -> None:
    answer = refused(make_spec(tmp_path, "memory", kernel="builtin", weight_cache=True))
    assert (answer["what"], "no weight cache" in answer["error"]) == ("unsupported", True)


def test_a_model_that_crashes_while_its_cache_is_made_crashes_the_worker(tmp_path: Path) -> None:
    done = run_worker(make_spec(tmp_path, "memory", crashing_tflite(), weight_cache=True))
    assert done.returncode == -signal.SIGSEGV


# ------------------------------------------------------------------------------ sustained


def test_a_sustained_session_is_summarised_window_by_window(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal")
    (zone / "temp").write_text("61500")
    policy = tmp_path / "sys/devices/system/cpu/cpufreq/policy0"
    policy.mkdir(parents=True)
    (policy / "scaling_cur_freq").write_text("1500000")
    firmware = tmp_path / "sys/devices/platform/soc/soc:firmware"
    firmware.mkdir(parents=True)
    (firmware / "get_throttled").write_text("4")
    spec = make_spec(tmp_path, "sustained", duration_s=0.6, window_s=0.2)
    data = work(spec, EDGEPIPE_SYSROOT=str(tmp_path))
    assert (len(data["minutes"]), data["window_s"]) == (3, 0.2)
    for number, minute in enumerate(data["minutes"]):
        assert minute["start_s"] >= number * 0.2
        assert minute["count"] >= data["inner_loops"]
        wall = minute["wall_ns"]
        assert 0 < wall["p50"] <= wall["p90"] <= wall["p99"] <= wall["max"]
        assert minute["cpu_ns"]["p50"] > 0
        assert minute["temperature_c"] == 61.5
        assert minute["throttling"] == ["throttled"]
        assert minute["frequency_khz"] == {"policy0": 1_500_000}


def test_a_window_shorter_than_an_inference_holds_one(tmp_path: Path) -> None:
    model = slow_tflite()
    spec = make_spec(tmp_path, "sustained", model, duration_s=0.001, window_s=0.0001)
    assert [minute["count"] for minute in work(spec)["minutes"]] == [1] * 10


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300), st.sampled_from([50, 90, 99]))
def test_percentiles_are_the_nearest_rank(worker: Any, values: list[int], p: int) -> None:
    reference = np.percentile(values, p, method="inverted_cdf")
    assert worker.percentile(sorted(values), p) == reference


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
    assert not list(tmp_path.glob("*.part"))


BACKENDS = [("litert-c", ""), ("litert-c", "builtin"), ("litert-interpreter", ""), ("litert-interpreter", "builtin")]  # fmt: skip


@pytest.mark.parametrize(("backend", "kernel"), BACKENDS)
def test_each_signature_gives_the_bits_of_its_own_file(
    tmp_path: Path, backend: str, kernel: str
) -> None:
    for key, own in bucket_files().items():
        more: dict[str, Any] = {"inputs": bucket_samples(tmp_path, key), "kernel": kernel}
        found = work(make_spec(tmp_path, "outputs", merged_file(), backend, signatures={"model": key}, **more))  # fmt: skip
        alone = work(make_spec(tmp_path, "outputs", own, backend, **more))
        assert found["outputs"] == alone["outputs"]
        assert (found["sha256"], found["size"]) == (alone["sha256"], alone["size"])


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


def test_a_piece_of_the_samples_gives_its_own_outputs(tmp_path: Path) -> None:
    inputs = samples_for(tmp_path, [[n, 0, 0, 0] for n in range(5)])
    data = work(make_spec(tmp_path, "outputs", inputs=inputs, first=1, count=3))
    assert outputs_of(data) == [(2.0 * n + 1, 1, 1, 1) for n in (1, 2, 3)]
    assert data["count"] == 3


def test_outputs_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "inputs.bin"
    path.write_bytes(bytes(100 * 16 + 1))
    inputs = {"path": str(path), "count": 101, "tensors": ["x"]}
    assert refused(make_spec(tmp_path, "outputs", inputs=inputs))["what"] == "bad-request"
    assert not list(tmp_path.glob("outputs.bin*"))


def test_a_disk_that_fills_up_is_no_fault_of_the_model(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        rows = samples_for(tmp_path, [[0, 1, 2, 3]] * 10_000)
        spec = make_spec(tmp_path, "outputs", inputs=rows, out_path=str(small / "outputs.bin"))
        assert refused(spec)["what"] == "disk-full"
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


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
