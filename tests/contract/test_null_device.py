"""The null device against the real agent: the same questions, answers of the same shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepipe.device import Device, open_device
from edgepipe.job import parse_journal
from edgepipe.payload import push_payload
from edgepipe.runtime import runtime_library
from edgepipe.testing import NullDevice
from edgepipe.tflite_ops.merge import merge_signatures
from edgepipe.tflite_ops.tiny import tiny_tflite

pytestmark = pytest.mark.slow

PLAN = [
    {"tag": "outputs-1", "kind": "outputs", "arms": ["base"]},
    {"tag": "outputs-2", "kind": "outputs", "arms": ["base"], "first": 1, "count": 2},
    {"tag": "memory-1", "kind": "memory", "arms": ["base"]},
    {"tag": "latency-1", "kind": "latency", "arms": ["base", "candidate"]},
    {"tag": "ops-1", "kind": "ops", "arms": ["base"]},
    {"tag": "sustained-1", "kind": "sustained", "arms": ["base"], "duration_s": 1, "window_s": 1},
    {"tag": "energy-1", "kind": "energy", "arms": ["base"], "idle_s": 1, "run_s": 1},
]
# The main graph takes other inputs than the signature that is measured.
SEVERAL = merge_signatures({f"size{size}": tiny_tflite(size=size) for size in (8, 256)})
# Objects whose keys are names of the board's own parts, or of the runtime's own stages.
OPEN = {"temperatures_c", "cooling", "frequencies", "packages", "load_parts_ns", "frequency_khz", "time_in_state"}  # fmt: skip


def conversation(device: Device, folder: Path) -> dict[str, Any]:
    """One whole job on ``device`` -> what it answered to facts, start, status and end."""
    home, _ = json.loads(device.run(["python3", "-c", "import json,os,sys; print(json.dumps([os.path.expanduser('~'), list(sys.version_info[:3])]))"], timeout_s=30).stdout)  # fmt: skip
    work_dir = f"{home}/.edgepipe"
    job_dir = f"{work_dir}/jobs/one"
    entry = push_payload(device, "linux", work_dir).entry

    def push(content: bytes, remote: str) -> dict[str, Any]:
        (folder / "file").write_bytes(content)
        device.push(folder / "file", remote)
        return {"path": remote, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def ask(*words: str) -> dict[str, Any]:
        done = device.run(["python3", entry, *words], timeout_s=60)
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer["code"] == done.returncode, answer
        return answer

    facts = ask("facts", work_dir)
    library = runtime_library("x86_64") if facts["device"]["machine"] == "x86_64" else None
    runtime = None
    if library is not None:
        pushed = push(library.path.read_bytes(), f"{work_dir}/rt/libLiteRt.so")
        runtime = {**pushed, "version": library.version, "glibc": library.glibc}
    job = {
        "schema": 2, "id": "1" * 16, "owner": "me@here", "work_dir": work_dir,
        "models": {
            "base": {**push(SEVERAL, f"{work_dir}/models/base.tflite"), "signature": "size256"},
            "candidate": push(tiny_tflite(size=256, layers=2), f"{work_dir}/models/candidate.tflite"),
        },
        "runtime": runtime,
        "inputs": {**push(bytes(range(64)) * 48, f"{work_dir}/jobs/one/inputs.bin"), "count": 3, "tensors": ["x"]},
        "backend": "auto", "kernel": "", "weight_cache": False, "threads": 1, "affinity": [],
        "warmup_s": 0.05, "session_s": 0.1, "min_inferences": 30, "seed": 0, "budget_s": 100,
        "lease_s": 0, "min_free_bytes": 1, "start_below_c": None, "cool_down_s": 1,
        "abort_above_c": None, "plan": PLAN,
    }  # fmt: skip
    push(json.dumps(job).encode(), f"{job_dir}/job.json")
    start = ask("start", job_dir)
    lines, status = follow(ask, job_dir)
    again = ask("start", job_dir)
    follow(ask, job_dir)
    missing = ask("status", f"{work_dir}/jobs/other", "0")
    ended = ask("end", job_dir)
    for answer in (start, again):  # a job this short may have ended before `start` looks
        answer["state"].pop("runs_on_device", None)
    return {
        "facts": facts,
        "start": start,
        "status": status,
        "start again": again,
        "status of nothing": missing,
        "end": ended,
        "end of nothing": ask("end", job_dir),
        "usage": ask("end"),
        **{f"line {line['kind']}": line for line in lines if line["kind"] != "session"},
        **{line["tag"]: line for line in lines if line["kind"] == "session"},
    }


def follow(
    ask: Callable[..., dict[str, Any]], job_dir: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Wait for the end of a job -> (its journal's lines, the last status)."""
    lines: list[dict[str, Any]] = []
    offset = 0
    while True:
        status = ask("status", job_dir, str(offset), "20")
        assert status["state"]["phase"] != "failed", status
        journal = parse_journal(status["journal"])
        assert not journal.damaged
        lines += journal.lines
        offset = status["offset"]
        if not status["alive"]:
            return lines, status


def shape(value: object, name: str = "") -> object:
    """Keys and kinds of values. A list has the shape of its first element; None fits everything."""
    if isinstance(value, dict) and name in OPEN:
        return shape(next(iter(value.values())), "") if value else None
    if isinstance(value, dict):
        return {key: shape(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    if isinstance(value, bool) or value is None:
        return value if value is None else "truth"
    return "number" if isinstance(value, int | float) else type(value).__name__


def differences(real: object, null: object, where: str = "") -> list[str]:
    if real is None or null is None or [] in (real, null):
        return []  # one of the two boards does not tell
    if isinstance(real, dict) and isinstance(null, dict):
        found = [f"{where}.{key}: only the agent" for key in real.keys() - null.keys()]
        found += [f"{where}.{key}: only the null device" for key in null.keys() - real.keys()]
        for key in real.keys() & null.keys():
            found += differences(real[key], null[key], f"{where}.{key}")
        return found
    if isinstance(real, list) and isinstance(null, list):
        return differences(real[0], null[0], f"{where}[]")
    return [] if real == null else [f"{where}: {real} of the agent, {null} of the null device"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the real agent on this machine and the null device say to the same questions."""
    folder = tmp_path_factory.mktemp("null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        (folder / "home").mkdir()
        real = conversation(open_device("local"), folder)
    return real, conversation(NullDevice(), folder)


def test_the_null_device_answers_every_question_in_the_shape_of_the_real_agent(
    answers: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    real, null = answers
    assert real.keys() == null.keys()
    found = [
        text
        for question in real
        for text in differences(shape(real[question]), shape(null[question]), question)
    ]
    assert sorted(found) == [
        "facts.device.simulated: only the null device",
        "line start.device.simulated: only the null device",
    ]


def test_both_compute_the_same_outputs(answers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for tag in ("outputs-1", "outputs-2"):
        real, null = (answer[tag]["session"]["data"] for answer in answers)
        assert (real["sha256"], real["count"], real["size"], real["outputs"]) == (
            null["sha256"],
            null["count"],
            null["size"],
            null["outputs"],
        )


@pytest.mark.parametrize("question", ["start", "status", "start again", "status of nothing", "end", "end of nothing", "usage"])  # fmt: skip
def test_both_end_every_verb_with_the_same_code(
    question: str, answers: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    real, null = answers
    assert (real[question]["code"], real[question]["error"]) == (
        null[question]["code"],
        null[question]["error"],
    )


def test_the_comparison_sees_a_key_that_only_one_of_them_has() -> None:
    """Guards the test above: a comparison that accepts anything proves nothing."""
    real = {"a": {"b": [1], "c": None}, "d": "x"}
    assert differences(shape(real), shape({"a": {"b": [2.5], "c": "x"}, "d": "y"})) == []
    assert differences(shape(real), shape({"a": {"b": [1]}, "d": "y"})) == [".a.c: only the agent"]
    assert differences(shape(real), shape({"a": {"b": ["1"], "c": 0}, "d": "y"})) == [
        ".a.b[]: number of the agent, str of the null device"
    ]
