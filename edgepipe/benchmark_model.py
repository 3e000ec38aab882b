"""Google's ``benchmark_model``, where the user has one: pushed, run, and what it prints as Measurements.

It gives summaries, not samples, of inferences in one process, so its metrics have names of their own and
are compared with none of ours. Source of the format: tensorflow/lite/tools/benchmark/benchmark_model.cc
and tensorflow/core/util/stats_calculator.cc.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import secrets
from pathlib import Path
from typing import Any

from edgepipe import android, preflight
from edgepipe.artifact import Artifact, hash_path
from edgepipe.bench import BenchResult, MeasureOptions, owner_name
from edgepipe.crunner import plain_name
from edgepipe.device.base import Device
from edgepipe.emulated import why_emulated
from edgepipe.errors import Busy, CommandFailed, DeviceError, RequestError
from edgepipe.job import COMMAND_TIMEOUT_S
from edgepipe.measurement import Measurement, single
from edgepipe.profile import DeviceProfile

log = logging.getLogger(__name__)

BACKEND = "benchmark_model"
# What the agent and the C runner say, and their exit code, where the board is another job's.
EX_BUSY = 75
_BUSY = re.compile(r'"error":"busy".*"message":"([^"]*)"')
_NUMBER = r"[-+0-9.eE]+|inf|nan"
# "INFO: " in newer builds, "I tflite  : " in logcat
_SUMMARY = re.compile(
    rf"Inference timings in us: Init: ({_NUMBER}), First inference: ({_NUMBER}), "
    rf"Warmup \(avg\): ({_NUMBER}), Inference \(avg\): ({_NUMBER})"
)
_COUNT = re.compile(r"(?:^|\s)count=(\d+) ([^\n]*)$")
_MEMORY = re.compile(rf"(?:Peak memory footprint|Memory footprint delta from the start of the tool) \(MB\): init=({_NUMBER}) overall=({_NUMBER})")  # fmt: skip
_OP = re.compile(r"^\s*(\S[^\t]*)\t\s*([\d.]+)\t\s*([\d.]+)\t\s*([\d.]+)\t\s*[\d.]+%\t\s*[\d.]+%\t\s*[\d.]+\t\s*(\d+)\t(.*)$")  # fmt: skip
_DELEGATE = re.compile(r"Created TensorFlow Lite (\w+) delegate|Explicitly applied (\w+) delegate")
_OPS_BEGIN = "Operator-wise Profiling Info for Regular Benchmark Runs"


@dataclasses.dataclass(frozen=True)
class Op:
    """One operator of one inference: its mean time, and its place among those that ran."""

    index: int
    node_type: str
    name: str
    mean_s: float


@dataclasses.dataclass(frozen=True)
class Report:
    """One run. ``count`` inferences after the warm-up; memory is what the tool added, None = not said."""

    init_s: float
    first_s: float
    warmup_mean_s: float
    mean_s: float
    count: int
    min_s: float
    max_s: float
    memory_bytes: int | None
    delegates: tuple[str, ...]
    ops: tuple[Op, ...]


def parse_benchmark_model(text: str) -> Report:
    """What ``benchmark_model`` prints (both streams, any order). Raises CommandFailed on anything else."""
    summary = _SUMMARY.search(text)
    if summary is None:
        raise _garbage(text, "there is no line of inference timings")
    head = text[: summary.start()]
    # the last of these lines is of the inferences, those before are of the warm-up
    counts = [found for line in head.splitlines() if (found := _COUNT.search(line))]
    if not counts:
        raise _garbage(text, "there is no count of inferences")
    try:
        init_s, first_s, warmup_s, mean_s = (_seconds(value) for value in summary.groups())
        count = int(counts[-1][1])
        told = dict(re.findall(rf"(\w+)=({_NUMBER})", counts[-1][2]))
        # of a single inference only "curr" is told
        low_s, high_s = (
            _seconds(str(told.get(key, told.get("curr", "")))) for key in ("min", "max")
        )
        memory = _MEMORY.search(text)
        megabytes = None if memory is None else float(memory[2])  # of 2^20, memory_info.h
        if count < 1 or not low_s <= high_s:
            raise ValueError(f"count {count}, min {low_s} s, max {high_s} s")
        memory_bytes = None if megabytes is None or megabytes <= 0 else int(megabytes * 2**20)
    except (ValueError, OverflowError) as exc:
        raise _garbage(text, str(exc)) from exc
    return Report(
        init_s=init_s, first_s=first_s, warmup_mean_s=warmup_s, mean_s=mean_s, count=count, min_s=low_s,
        max_s=high_s, memory_bytes=memory_bytes, ops=_ops(text),
        delegates=tuple(dict.fromkeys(a or b for a, b in _DELEGATE.findall(text))),
    )  # fmt: skip


def _ops(text: str) -> tuple[Op, ...]:
    """The operators in the order they ran."""
    section = text.partition(_OPS_BEGIN)[2].partition("Top by Computation Time")[0]
    found = [match for line in section.splitlines() if (match := _OP.match(line))]
    return tuple(
        Op(number, match[1].strip(), re.sub(r":\d+$", "", match[6]).strip("[]"), float(match[4]) / 1e3)
        for number, match in enumerate(found)
    )  # fmt: skip


def _seconds(microseconds: str) -> float:
    value = float(microseconds) / 1e6
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{microseconds} us is no time")
    return value


def _garbage(text: str, reason: str) -> CommandFailed:
    return CommandFailed(
        f"benchmark_model printed something else than expected ({reason}): {text[-300:]!r}",
        hint="run it on the board by hand; please report the output",
        code="unexpected-output",
    )


def measure(
    model: Artifact,
    device: Device,
    profile: DeviceProfile,
    options: MeasureOptions,
    *,
    binary: Path,
) -> BenchResult:
    """Push ``binary`` and the model, run it ``options.sessions`` times, and once more for the operators.

    The board is taken as our own jobs take it, from the first run to the last. Raises Busy where another
    job has it, RequestError for an emulated board (it measures nothing but time), CommandFailed where it
    fails there or is not for that board, and what `preflight.prepare` and `android.check_health` raise.
    """
    board = preflight.prepare(device, profile)
    facts = board.facts()
    preflight.check_board(facts["device"], profile, device.address)
    android.check_health(facts["health"], device.address)
    if emulated := why_emulated(profile, facts["device"]):
        raise RequestError(
            f"benchmark_model measures time, and {device.address} is emulated ({emulated})",
            hint="leave --benchmark-model out: instructions, memory and outputs are compared",
        )
    sha256 = hash_path(binary)
    program = f"{board.work_dir}/runners/{sha256}/benchmark_model"
    graph = f"{board.work_dir}/models/{model.sha256}.tflite"
    device.push(binary, program)
    device.push(model.path, graph)
    device.run(["chmod", "755", program], timeout_s=COMMAND_TIMEOUT_S)
    threads = options.threads or profile.threads
    affinity = list(options.affinity or profile.affinity or android.fast_cpus(facts))
    mask = f"{sum(1 << cpu for cpu in affinity):x}"
    words = [*(["taskset", mask] if affinity else []), program, f"--graph={graph}", f"--num_threads={threads}"]  # fmt: skip
    words += [f"--signature_to_run_for={model.signature}"] if model.signature else []
    words += [f"--min_secs={options.session:g}", f"--warmup_min_secs={options.warmup:g}"]
    job_id, reports = f"benchmark_model-{secrets.token_hex(4)}", []
    # the lease that our own jobs take; should this host die, it ends by itself
    lease_s = options.budget + COMMAND_TIMEOUT_S
    words = [
        *board.command,
        "hold",
        board.work_dir,
        job_id,
        plain_name(owner_name()),
        f"{lease_s:.0f}",
        *words,
    ]
    try:
        for number in range(options.sessions):
            log.info("benchmark_model: run %d of %d", number + 1, options.sessions)
            reports.append(_run(device, words, options.budget))
        profiled = _run(device, [*words, "--enable_op_profiling=true"], options.budget) if options.ops else None  # fmt: skip
    finally:
        _release(board, job_id)
    context: dict[str, Any] = {
        "model_sha256": model.sha256, "model_bytes": model.size_bytes, "profile": profile.name,
        "device": device.address, "backend": BACKEND, "runtime": BACKEND, "runtime_sha256": sha256,
        "runtime_version": None, "threads": threads, "affinity": affinity, "emulated": "", "simulated": False,
        "delegates": list(reports[0].delegates), "inferences": [r.count for r in reports],
        "min_s": [r.min_s for r in reports], "max_s": [r.max_s for r in reports],
        "temperature_before_c": facts["health"].get("temperature_c"), "governor": facts["health"].get("governor"),
        "contended": False, "sessions": [], "not_measured": {"instructions": "benchmark_model does not count them"},
        "departs_from_profile": [], "runtime_differs_from_profile": True,
        "ops": [dataclasses.asdict(op) for op in (profiled.ops if profiled else ())],
        **({"model_signature": model.signature} if model.signature else {}),
    }  # fmt: skip

    def each(metric: str, values: list[float]) -> Measurement:
        unit = "B" if metric.endswith("memory") else "s"
        return Measurement(metric, unit, tuple((v,) for v in values), context=context)

    found = [
        single("runs_on_device", "", 1, context),
        each("benchmark_model_latency", [r.mean_s for r in reports]),
        each("benchmark_model_first", [r.first_s for r in reports]),
        each("benchmark_model_init", [r.init_s for r in reports]),
    ]
    memory = [float(r.memory_bytes) for r in reports if r.memory_bytes is not None]
    if memory:
        found.append(each("benchmark_model_memory", memory))
    raw = {"schema": 1, "facts": facts, "reports": [dataclasses.asdict(r) for r in reports]}
    return BenchResult(tuple(found), {**facts["device"], "packages": facts["packages"]}, raw)


def _release(board: preflight.Board, job_id: str) -> None:
    """Give the board back, whatever became of the runs: their error goes before one of this."""
    command = [*board.command, "release", board.work_dir, job_id]
    try:
        done = board.device.run(command, timeout_s=COMMAND_TIMEOUT_S)
    except DeviceError as exc:
        log.warning("%s was not given back and stays taken for a while: %s", board.device.address, exc)  # fmt: skip
        return
    if done.returncode:
        log.warning("%s was not given back: %s", board.device.address, done.stdout.decode(errors="replace").strip())  # fmt: skip


def _run(device: Device, words: list[str], timeout_s: float) -> Report:
    done = device.run(words, timeout_s=timeout_s)
    text = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
    if done.returncode == EX_BUSY and (found := _BUSY.search(text)):
        raise Busy(f"{device.address} is busy: {found[1]}", hint="wait for it to end, then try again")  # fmt: skip
    if done.returncode:
        raise CommandFailed(
            f"benchmark_model failed on {device.address} with exit code {done.returncode}: "
            f"{' '.join(text.split())[-300:]}",
            hint="is it built for this board (file benchmark_model), and does it know the model's operators?",
        )
    return parse_benchmark_model(text)
