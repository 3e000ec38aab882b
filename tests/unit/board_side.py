"""Jobs for the payload `targets/linux`, carried out by its real agent on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.resources import target_dir
from edgepipe.runtime import runtime_library
from edgepipe.tflite_ops.flatbuffer import with_main_graph
from edgepipe.tflite_ops.merge import merge_signatures
from edgepipe.tflite_ops.tiny import counting_tflite, tiny_tflite

from .tflite_builder import Graph

TARGET = target_dir("linux")
AGENT = TARGET / "agent.py"
OPTIONS = {"sustained": {"duration_s": 1}, "energy": {"idle_s": 1, "run_s": 1}}


def item(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"path": str(path), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def payload_module(name: str) -> ModuleType:
    """A module of the payload, as the agent imports it."""
    sys.path.insert(0, str(TARGET))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TARGET))


@functools.cache
def library() -> dict[str, Any]:
    """The runtime of this machine, as a job names it."""
    found = runtime_library(platform.machine())
    return {**item(found.path), "version": found.version, "glibc": found.glibc}


def bucket(length: int) -> bytes:
    """(1, length, 4, 1) -> (1, length, 4, 2): XNNPACK takes the convolutions and not what is between."""
    random = np.random.default_rng(0)
    graph, shape = Graph(), (1, length, 4, 2)
    weights = [random.normal(0, 1, (2, 3, 3, n)).astype(np.float32) for n in (1, 2)]
    bias = np.ones(2, np.float32)
    y = graph.conv(graph.input("x", (1, length, 4, 1)), weights[0], bias, "first", shape)
    y = graph.op("LOG_SOFTMAX", [y], "middle", shape, "LogSoftmaxOptions")
    return graph.bytes([graph.conv(y, weights[1], bias, "last", shape)])


@functools.cache
def bucket_files() -> dict[str, bytes]:
    """Three files of one network, by the key of the signature that each is in `merged_file`."""
    return {f"length{n}": bucket(n) for n in (8, 16, 4)}


@functools.cache
def merged_file() -> bytes:
    return merge_signatures(bucket_files())


def bucket_samples(folder: Path, key: str, count: int = 3) -> dict[str, Any]:
    """Inputs of so many inferences of a bucket, as a job names them."""
    path = folder / f"{key}.bin"
    values = [Random(0).uniform(-2, 2) for _ in range(count * 4 * int(key[len("length") :]))]
    path.write_bytes(struct.pack(f"<{len(values)}f", *values))
    return {**item(path), "count": count, "tensors": ["x"]}


def _with_graph(content: bytes, other: bytes) -> Any:
    """A model (as objects) with the only graph of another file as its last one."""
    model, added = (
        flatbuffer_utils.read_model_from_bytearray(bytearray(file)) for file in (content, other)
    )
    (graph,) = added.subgraphs
    for tensor in graph.tensors:
        tensor.buffer += len(model.buffers)
    for operator in graph.operators:
        operator.opcodeIndex += len(model.operatorCodes)
    model.buffers += added.buffers
    model.operatorCodes += added.operatorCodes
    model.subgraphs.append(graph)
    return model


def one_counts(*, main: str) -> bytes:
    """A file with the signatures ``counts``, which keeps state and runs another graph, and ``plain``."""
    plain = merge_signatures({"plain": tiny_tflite()})
    model = _with_graph(counting_tflite(), plain)
    signatures = [
        flatbuffer_utils.read_model_from_bytearray(bytearray(plain)).signatureDefs[0]
        for _ in range(2)
    ]
    signatures[0].signatureKey = b"counts"
    signatures[0].inputs[0].tensorIndex, signatures[0].outputs[0].tensorIndex = 0, 3
    signatures[1].subgraphIndex = 2
    model.signatureDefs = signatures
    return with_main_graph(bytes(flatbuffer_utils.convert_object_to_bytearray(model)), main, where="it")  # fmt: skip


def branching_tflite() -> bytes:
    """``y = 2 x + 1`` in a graph of its own, run by an IF; float32 (1, 4)."""
    graph = Graph()
    yes = graph.tensor("yes", (1,), data=np.array([True]), dtype="BOOL")
    y = graph.op("IF", [yes, graph.input("x", (1, 4))], "y", (1, 4), "IfOptions", thenSubgraphIndex=1, elseSubgraphIndex=1)  # fmt: skip
    model = _with_graph(graph.bytes([y]), tiny_tflite())
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def plan(*kinds: str) -> list[dict[str, Any]]:
    """latency-1, latency-2, ... of the arm ``model``, in the order given."""
    return [
        {"tag": f"{kind}-{kinds[:at].count(kind) + 1}", "kind": kind, "arms": ["model"]}
        | OPTIONS.get(kind, {})
        for at, kind in enumerate(kinds)
    ]


def make_job(work_dir: Path, model: bytes | None = None, **changes: Any) -> Path:
    """The folder of a job that takes a fraction of a second; ``changes`` replace its keys."""
    path = work_dir / "model.tflite"
    path.write_bytes(tiny_tflite() if model is None else model)
    job = {
        "schema": 2, "id": "job-1", "owner": "test", "work_dir": str(work_dir),
        "models": {"model": item(path)},
        "runtime": library(), "inputs": None, "backend": "auto", "kernel": "", "weight_cache": False,
        "threads": 1, "affinity": [], "warmup_s": 0.02, "session_s": 0.05, "min_inferences": 30, "seed": 0,
        "plan": plan("memory"), "budget_s": 60, "lease_s": 0, "min_free_bytes": 0,
        "start_below_c": None, "cool_down_s": 0, "abort_above_c": None,
    } | changes  # fmt: skip
    job_dir = work_dir / "jobs" / str(job["id"])
    job_dir.mkdir(parents=True, exist_ok=True)
    (job_dir / "job.json").write_text(json.dumps(job))
    return job_dir


def change_job(job_dir: Path, **changes: Any) -> None:
    path = job_dir / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def call(*arguments: object, python: str = sys.executable, **environment: str) -> Any:
    """One verb; its stdout must be one JSON object that tells the exit code."""
    done = subprocess.run(
        [python, AGENT, *map(str, arguments)],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    reply = json.loads(done.stdout)
    assert reply["code"] == done.returncode
    return reply


def lines_of(text: str) -> list[dict[str, Any]]:
    """The records of a journal, each CRC checked."""
    records = []
    for line in text.splitlines():
        crc, _, body = line.partition(" ")
        assert crc == f"{zlib.crc32(body.encode()):08x}"
        records.append(json.loads(body))
    return records


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a host knows of a job whose supervisor has ended."""

    code: int
    state: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return [line["session"] for line in self.lines if line["kind"] == "session"]

    @property
    def tags(self) -> list[str]:
        """Of the sessions with data, in the order of the journal."""
        return [
            line["tag"]
            for line in self.lines
            if line["kind"] == "session" and line["session"]["data"] is not None
        ]

    @property
    def start(self) -> dict[str, Any]:
        return [line for line in self.lines if line["kind"] == "start"][-1]


def outcome(job_dir: Path) -> Outcome:
    """Wait for the end of a job that was started."""
    offset, text, deadline = 0, "", time.monotonic() + 60
    while time.monotonic() < deadline:
        reply = call("status", job_dir, offset, 10)
        text = text[: reply["from"]] + reply["journal"]
        offset = reply["offset"]
        if not reply["alive"]:
            return Outcome(reply["state"]["code"], reply["state"], lines_of(text))
    raise AssertionError("it does not end")


def run(job_dir: Path, **environment: Any) -> Outcome:
    """A job from its start to its end. Where it ends at once, so does ``start``, with its code."""
    reply = call("start", job_dir, **environment)
    if reply["code"] != 0:
        return Outcome(reply["code"], reply["state"] or reply, outcome_lines(job_dir))
    return outcome(job_dir)


def outcome_lines(job_dir: Path) -> list[dict[str, Any]]:
    path = job_dir / "results.jsonl"
    return lines_of(path.read_text()) if path.exists() else []


def state_of(job_dir: Path) -> Any:
    with contextlib.suppress(OSError):
        return json.loads((job_dir / "state.json").read_text())
    return {}


def wait_for(condition: Any, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("nothing happened")


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(word) for word in text.split()]
    return []


def is_gone(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def worker_of(job_dir: Path, tag: str) -> int:
    """The pid of the worker of a session, once it has loaded the runtime."""

    def running() -> int | None:
        state = state_of(job_dir)
        if state.get("tag") != tag:
            return None
        for pid in children_of(state["pid"]):
            with contextlib.suppress(OSError):
                if b"libLiteRt" in Path(f"/proc/{pid}/maps").read_bytes():
                    return pid
        return None

    return int(wait_for(running))


def held_worker(job_dir: Path, tag: str, *, beside: Collection[int] = ()) -> int:
    """`worker_of`, stopped by SIGSTOP: one that loads cold ends of itself between being seen and being killed.
    Not one of those ``beside``."""

    def held() -> int | None:
        worker = worker_of(job_dir, tag)
        if worker in beside:
            return None
        with contextlib.suppress(OSError):
            os.kill(worker, signal.SIGSTOP)
            while (state := state_letter(worker)) not in "TZX":
                time.sleep(0.01)
            return worker if state == "T" else None
        return None

    return int(wait_for(held))


def state_letter(pid: int) -> str:
    """As in proc_pid_stat(5): T is stopped, Z and X are dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def ending_jobs(work_dir: Path) -> Iterator[Path]:
    """Whatever a test leaves running below ``work_dir`` ends with it."""
    try:
        yield work_dir
    finally:
        for job_dir in work_dir.glob("jobs/*"):
            call("end", job_dir)
