"""What a null device measures: session data in the shape of targets/linux/worker.py, drawn from a scenario."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepipe.device.scenario import CONTENDED_CPU_BIAS, Scenario

# As targets/linux/worker.py: batches below 200 us, of about 250 us.
_BATCH_BELOW_S, _BATCH_TARGET_S = 200e-6, 250e-6
# A board that throttles runs at half its frequency: 1500 of 3000 MHz.
_THROTTLED_FACTOR = 2.0
_FULL_KHZ = 3_000_000
# Kernel by kernel, the share of an inference of a small convolutional network on XNNPACK.
_OPS = (
    ("Convolution (NHWC, QC8) IGEMM", "delegate", 0.60),
    ("Convolution (NHWC, QC8) DWConv", "delegate", 0.25),
    ("Fully Connected (NC, QC8) GEMM", "delegate", 0.10),
    ("SOFTMAX", "builtin", 0.05),
)
HOT_C = 95.0
_IDLE_W, _RUN_W = 2.7, 4.9  # a Raspberry Pi 5, its core rails
# One a nanosecond; what a Python worker takes to read the counter twice; counts that differ by a few.
_INSTRUCTIONS_PER_S, _COUNTING_INSTRUCTIONS, _SCATTER = 1e9, 7800, 6
_OVERHEAD_BYTES = 11_000_000
_RUNTIME_BYTES = 9_000_000


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What of the board's state a session depends on: its age in seconds, and whether it throttles."""

    age_s: float
    throttled: bool


def session_seconds(spec: Mapping[str, Any], scenario: Scenario) -> float:
    """How long a session takes on the board, in its own (virtual) time."""
    kind = spec["kind"]
    inference_s = scenario.latency * scenario.noise.wait
    if kind == "latency":
        least_s = spec["min_inferences"] * inference_s * len(spec["arms"])
        return float(1.0 + spec["warmup_s"] + max(spec["session_s"], least_s))
    if kind == "sustained":
        return float(1.0 + spec["duration_s"])
    if kind == "energy":
        return float(1.0 + spec["idle_s"] + spec["run_s"])
    if kind == "outputs":
        return float(1.0 + _piece(spec)[1] * inference_s)
    return 1.0 + 30 * inference_s


def session_data(
    spec: Mapping[str, Any], scenario: Scenario, around: Surroundings, models: Mapping[str, bytes]
) -> dict[str, Any]:
    """The data of one session of ``spec["kind"]``; ``models`` are the files' bytes by arm.

    The same scenario, tag and files give the same figures, whenever they are asked for.
    """
    names = sorted(hashlib.sha256(content).hexdigest() for content in models.values())
    rng = random.Random(f"{scenario.seed} {spec['tag']} {' '.join(names)}")
    return _KINDS[spec["kind"]](spec, scenario, around, models, rng)


def _latency_s(scenario: Scenario, arm: str, threads: int, around: Surroundings) -> float:
    drift = math.exp(math.log1p(scenario.per_minute) * around.age_s / 60)
    slower = scenario.slowdown if arm == "candidate" else 1.0
    if around.throttled:
        slower *= _THROTTLED_FACTOR
    if scenario.contended:
        slower *= CONTENDED_CPU_BIAS
    # two threads 1.8 times as fast as one, four 3.2 times
    return scenario.latency * slower * drift / threads**0.85


def _latency(
    spec: Mapping[str, Any],
    scenario: Scenario,
    around: Surroundings,
    models: Mapping[str, bytes],
    rng: random.Random,
) -> dict[str, Any]:
    noise, threads, warmup_s = scenario.noise, spec["threads"], spec["warmup_s"]
    session, wall_session = rng.gauss(0, noise.session), rng.gauss(0, noise.wall_session)
    latency_s = {arm: _latency_s(scenario, arm, threads, around) for arm in models}
    load = {arm: rng.gauss(0, noise.load) for arm in models}
    inner = {arm: _inner_loops(value * noise.wait) for arm, value in latency_s.items()}
    round_s = sum(latency_s[arm] * noise.wait * inner[arm] for arm in models)
    rounds = max(spec["min_inferences"], math.ceil(spec["session_s"] / round_s))

    def draw(arm: str) -> tuple[int, int]:
        wall_s, cpu_s = noise.draw(
            rng, latency_s=latency_s[arm], session=session, load=load[arm], wall=wall_session
        )
        busy = 1.0 if threads == 1 else 0.9 * threads
        return round(wall_s * inner[arm] * 1e9), round(cpu_s * busy * inner[arm] * 1e9)

    arms: dict[str, dict[str, Any]] = {}
    for arm, content in models.items():
        wall_ns, cpu_ns = map(list, zip(*(draw(arm) for _ in range(rounds)), strict=True))
        once_ns = round(latency_s[arm] * 1e9)
        parts = {"environment": 20_000, "model": 300_000, "compile": once_ns // 2 + 200_000}
        inputs, outputs = model_tensors(content)
        arms[arm] = {
            "wall_ns": wall_ns,
            "cpu_ns": cpu_ns,
            "inner_loops": inner[arm],
            "first_inference_ns": round(once_ns * 2.2),
            "load_ns": sum(parts.values()),
            "load_parts_ns": parts,
            "warmup_wall_ns": [
                round(once_ns * (1 + math.exp(-i)))
                for i in range(max(1, min(50, math.floor(warmup_s / latency_s[arm]))))
            ],
            "output_sha256": hashlib.sha256(content + str(spec["seed"]).encode()).hexdigest(),
            "state": "none",
            "inputs": inputs,
            "outputs": outputs,
            "cold": {"load_ns": 4 * sum(parts.values()), "resident_share": 0.0},
        }
    share = sum(sum(a["cpu_ns"]) for a in arms.values()) / sum(sum(a["wall_ns"]) for a in arms.values())  # fmt: skip
    return {
        "rounds": rounds,
        "order_seed": spec["seed"],
        "arms": arms,
        "cpu_clock": "thread" if threads == 1 else "process",
        "cpu_share": share,
        # a single slow inference of a short session is no other work
        "contended": scenario.contended and threads == 1 and share < 0.97,
        "runtime_load_ns": 3_000_000,
        "frequency_khz": [round(_FULL_KHZ / (_THROTTLED_FACTOR if around.throttled else 1))] * 4,
        "time_in_state": None,
        "run_queue_delay_ns": round((1 - min(share, 1)) * spec["session_s"] * 1e9),
        "involuntary_switches": 400 if scenario.contended else 3,
        "major_faults": 0,
    }


def _inner_loops(latency_s: float) -> int:
    return 1 if latency_s >= _BATCH_BELOW_S else math.ceil(_BATCH_TARGET_S / latency_s)


def _memory(
    spec: Mapping[str, Any],
    scenario: Scenario,
    around: Surroundings,
    models: Mapping[str, bytes],
    rng: random.Random,
) -> dict[str, Any]:
    ((arm, content),) = models.items()
    # two runs of one model differ by a few pages
    anon = round(scenario.memory + (scenario.growth if arm == "candidate" else 0)) // 4096 * 4096
    anon += rng.randrange(5) * 4096
    file = math.ceil(len(content) / 4096) * 4096

    def stage(anon: int, file: int) -> dict[str, Any]:
        total = _RUNTIME_BYTES + anon + file
        return {
            "anon": 3_000_000 + anon,
            "anon_source": "smaps_rollup",
            "rss": _OVERHEAD_BYTES + total,
            "peak": _OVERHEAD_BYTES + total,
            "file": file,
        }

    return {
        "stages": {
            "before_load": stage(0, 0),
            "after_load": stage(anon * 3 // 4, file),
            "after_first": stage(anon, file),
            "steady": stage(anon, file),
        },
        "anon_bytes": anon,
        "anon_source": "smaps_rollup",
        "file_bytes": file,
        "peak_bytes": anon + file,
        "overhead_bytes": _OVERHEAD_BYTES,
        "inputs": model_tensors(content)[0],
    }


def _ops(
    spec: Mapping[str, Any],
    scenario: Scenario,
    around: Surroundings,
    models: Mapping[str, bytes],
    rng: random.Random,
) -> dict[str, Any]:
    ((arm, _),) = models.items()
    base_s = _latency_s(scenario, "base", spec["threads"], around)
    parts = [(name, where, share * base_s) for name, where, share in _OPS]
    more_s = _latency_s(scenario, arm, spec["threads"], around) - base_s
    if more_s > 0:  # what makes the candidate slower is one more kernel
        parts.insert(2, ("Convolution (NHWC, QC8) GEMM", "delegate", more_s))
    else:
        parts = [(name, where, seconds * (1 + more_s / base_s)) for name, where, seconds in parts]
    inferences = 30
    return {
        "inferences": inferences,
        "ops": [
            {
                "index": index,
                "name": name,
                "where": where,
                "ns": [
                    round(seconds * math.exp(rng.gauss(0, 0.01)) * 1e9) for _ in range(inferences)
                ],
            }
            for index, (name, where, seconds) in enumerate(parts)
        ],
        "profiler": True,
    }


def _sustained(
    spec: Mapping[str, Any],
    scenario: Scenario,
    around: Surroundings,
    models: Mapping[str, bytes],
    rng: random.Random,
) -> dict[str, Any]:
    ((arm, _),) = models.items()
    window_s = float(spec.get("window_s", 60))
    minutes = []
    for number in range(max(1, round(spec["duration_s"] / window_s))):
        start_s = number * window_s
        # the chip warms up with a time constant of two minutes; throttling begins in minute 3
        throttled = around.throttled and number >= 2
        now = Surroundings(around.age_s + start_s, throttled)
        latency_s = _latency_s(scenario, arm, spec["threads"], now)
        latency_s *= scenario.noise.wait * (1 + 0.03 * math.exp(-number))
        wall = {
            name: round(latency_s * factor * math.exp(rng.gauss(0, 0.002)) * 1e9)
            for name, factor in (("p50", 1.0), ("p90", 1.03), ("p99", 1.2), ("max", 1.9))
        }
        khz = round(_FULL_KHZ / (_THROTTLED_FACTOR if throttled else 1))
        minutes.append(
            {
                "start_s": start_s,
                "count": max(1, int(window_s / latency_s)),
                "wall_ns": wall,
                "cpu_ns": {"p50": round(wall["p50"] / scenario.noise.wait)},
                "temperature_c": 45 + 15 * (1 - math.exp(-number / 2)) + (19 if throttled else 0),
                "throttling": ["throttled"] if throttled else [],
                "frequency_khz": {"policy0": khz},
            }
        )
    inner = _inner_loops(_latency_s(scenario, arm, spec["threads"], around) * scenario.noise.wait)
    return {"minutes": minutes, "window_s": window_s, "inner_loops": inner}


def _energy(
    spec: Mapping[str, Any],
    scenario: Scenario,
    around: Surroundings,
    models: Mapping[str, bytes],
    rng: random.Random,
) -> dict[str, Any]:
    ((arm, _),) = models.items()
    latency_s = _latency_s(scenario, arm, spec["threads"], around) * scenario.noise.wait
    idle = [round(rng.gauss(_IDLE_W, 0.02), 4) for _ in range(max(2, int(spec["idle_s"] * 10)))]
    run = [round(rng.gauss(_RUN_W, 0.05), 4) for _ in range(max(2, int(spec["run_s"] * 10)))]
    inferences = max(1, int(spec["run_s"] / latency_s))
    return {
        "method": "pmic",
        "idle_w": sum(idle) / len(idle),
        "run_w": sum(run) / len(run),
        "samples_idle": idle,
        "samples_run": run,
        "inferences": inferences,
        "elapsed_ns": round(inferences * latency_s * 1e9),
    }


def _instructions(
    spec: Mapping[str, Any],
    scenario: Scenario,
    around: Surroundings,
    models: Mapping[str, bytes],
    rng: random.Random,
) -> dict[str, Any]:
    ((arm, content),) = models.items()
    slower = scenario.slowdown if arm == "candidate" else 1.0
    count = round(scenario.latency * slower * _INSTRUCTIONS_PER_S) + _COUNTING_INSTRUCTIONS
    inputs, outputs = model_tensors(content)
    return {
        "counts": [count + rng.randrange(_SCATTER) for _ in range(7)],
        "overhead": _COUNTING_INSTRUCTIONS,
        "counter": "simulated",
        "fixed_addresses": True,
        "state": "none",
        "inputs": inputs,
        "outputs": outputs,
    }


def outputs_data(
    spec: Mapping[str, Any], scenario: Scenario, model: bytes, raw: bytes
) -> tuple[dict[str, Any], bytes]:
    """(data of an ``outputs`` session without its path, the bytes of its file).

    This host runs the model on the raw input bytes ``raw``, of which the session's ``first`` and
    ``count`` choose a piece, so that what is compared with a device can be tried out; the outputs of
    a share ``flips`` of all inferences are then upset, byte by byte.
    """
    from edgepipe.tflite_ops.raw import RawSamples, stored_outputs
    from edgepipe.tflite_ops.run import is_delegated

    total = spec["inputs"]["count"]
    first, count = _piece(spec)
    inputs, outputs = model_tensors(model)
    size = sum(tensor["bytes"] for tensor in inputs)
    piece = raw[first * size : (first + count) * size]
    samples = RawSamples(piece, count, tuple(spec["inputs"]["tensors"]))
    with tempfile.TemporaryDirectory(prefix="edgepipe-null-") as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(model)
        found, delegated = stored_outputs(path, samples), is_delegated(path)
    rng = random.Random(f"{scenario.seed} flips")
    upset = set(rng.sample(range(total), round(scenario.flips * total)))
    content = bytearray()
    for number in range(count):
        for tensor in outputs:
            value = found[tensor["name"]][number].tobytes()
            content += value[::-1] if first + number in upset else value
    data = {
        "outputs": outputs,
        "count": count,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "reloads": 0,
        "delegated": delegated,
    }
    return data, bytes(content)


def _piece(spec: Mapping[str, Any]) -> tuple[int, int]:
    """(first, count) of the samples that an ``outputs`` session runs; all where it does not say."""
    first = int(spec.get("first", 0))
    return first, int(spec.get("count", spec["inputs"]["count"] - first))


def model_tensors(content: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(inputs, outputs) of a .tflite file as the board lists them. Raises ArtifactError."""
    from edgepipe.tflite_ops.flatbuffer import parse_model

    graph = parse_model(content, where="the model on the null device").subgraphs[0]

    def described(numbers: tuple[int, ...]) -> list[dict[str, Any]]:
        tensors = [graph.tensors[number] for number in numbers]
        return [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.size_bytes}
            for t in tensors
        ]

    return described(graph.inputs), described(graph.outputs)


_KINDS = {
    "latency": _latency,
    "memory": _memory,
    "ops": _ops,
    "sustained": _sustained,
    "energy": _energy,
    "instructions": _instructions,
}


def health(scenario: Scenario, *, boot_id: str, realtime_s: float, monotonic_s: float, throttled: bool, hot: bool) -> dict[str, Any]:  # fmt: skip
    """One snapshot in the shape of targets/linux/board.py."""
    temperature_c = HOT_C if hot else 79.0 if throttled else 45.0
    current_khz = round(_FULL_KHZ / (_THROTTLED_FACTOR if throttled else 1))
    return {
        "realtime_s": realtime_s,
        "monotonic_s": monotonic_s,
        "boot_id": boot_id,
        "temperatures_c": {"thermal_zone0:cpu-thermal": temperature_c},
        "temperature_c": temperature_c,
        "cooling": {},
        "throttling": ["throttled"] if throttled else [],
        "frequencies": {
            "policy0": {
                "cpus": "0 1 2 3",
                "governor": "performance",
                "current_khz": current_khz,
                "limit_khz": _FULL_KHZ,
                "hardware_limit_khz": _FULL_KHZ,
            }
        },
        "governor": "performance",
        "under_voltage_alarm": None,
        "loadavg_1min": 5.2 if scenario.contended else 0.1,
        "runnable": 6 if scenario.contended else 1,
        "pressure_us": {"cpu": None, "memory": None, "io": None},
        "memory_available_bytes": 2_000_000_000,
        "swap_used_bytes": 0,
        "pages_swapped_in": 0,
        "oom_kills": 0,
    }
