#!/usr/bin/env python3
"""One session in a fresh process: a spec on stdin, one JSON object on stdout, logs on stderr.

    python3 worker.py PID_OF_THE_SUPERVISOR

The spec of every session but the self-test (which needs kind, runtime, self_test, affinity):
    kind, tag        what to do (a key of WORK); its place in the plan, which seeds the order of arms
    runtime          {"backend", and "path" of the library or "module"}
    self_test        path of the self-test model
    job_dir          where files go that outlive this process
    arms             {arm: path of its model}; two only in a latency session
    signatures       {arm: key of the signature to run}; those without run the main graph (optional)
    threads, affinity, kernel ("" = the runtime's own choice), weight_cache (bool), seed
    warmup_s, session_s, min_inferences          latency; warmup_s also sustained and energy
    inputs, out_path, first, count               outputs
    duration_s, window_s (optional, 60)          sustained
    idle_s, run_s                                energy

The answer is {"ok": data} or {"error": text, "what": cause}. Of the causes, "bad-request",
"unsupported", "disk-full" and "os-error" say nothing of the model.
Standard library only, Python 3.7 or newer; a memory session reports what the process weighs before
any runtime is in it, so what not every session needs is imported where it is needed. A model that
crashes ends this process and no other.
"""

import ctypes
import errno
import faulthandler
import gc
import json
import os
import random
import resource
import signal
import struct
import sys
import time
import zlib
from array import array
from itertools import repeat

from backends import (
    ELEMENT_TYPES,
    KERNELS,
    SELF_TEST_INPUT,
    SELF_TEST_OUTPUT,
    NoSuchSignature,
    Unsupported,
    open_model,
)
from memory import drop_from_page_cache, give_back_free_memory, memory_bytes, reset_peak
from sysfs import names, read, read_int

# Below this one sample is a batch of inferences: reading the clocks costs 1 to 2 us, which would be
# part of what is measured. And no longer a batch than that takes: on a machine with five processes
# for every CPU, A/A sessions of a 0.14 ms model scatter by 0.2 % with batches of 0.25 ms, by 1.3 %
# with 1 ms and by 4 % with 4 ms, as most of the long ones were interrupted and found cold caches.
BATCH_BELOW_NS = 200000
BATCH_TARGET_NS = 250000
# A session whose thread had the CPU for less than this share of the wall time was contended.
CONTENDED_BELOW = 0.97
PROFILED_INFERENCES = 30
# A count hardly varies: so few are for telling that it does not. The first inferences differ.
UNCOUNTED_INFERENCES, COUNTED_INFERENCES = 3, 7
# Between the end of the load and the first reading that counts: an INA2xx averages over up to
# 0.14 s (128 samples of 1.1 ms), a voltage regulator settles in less.
SETTLE_S = 0.5


class BadRequest(Exception):
    """What was asked for cannot be done here; that says nothing of the model."""


# --------------------------------------------------------------------------------------- inputs


def random_chunk(rng, dtype, count):
    """``count`` values valid for ``dtype``: floats in [-1, 1], small integer types over their
    whole range, wide integer types 0 or 1 (they are indices as a rule)."""
    if dtype in ("int8", "uint8", "int16", "uint16"):
        width = 2 if "16" in dtype else 1
        return rng.getrandbits(8 * width * count).to_bytes(width * count, "little")
    if dtype in ("float32", "float64"):
        code = "f" if dtype == "float32" else "d"
        return array(code, [rng.uniform(-1, 1) for _ in range(count)]).tobytes()
    if dtype == "float16":
        return struct.pack("=%de" % count, *[rng.uniform(-1, 1) for _ in range(count)])
    if dtype == "bool":
        return bytes(rng.getrandbits(1) for _ in range(count))
    codes = {"int32": "i", "uint32": "I", "int64": "q", "uint64": "Q"}
    if dtype not in codes:
        raise BadRequest("there is no random input of type %s: give samples" % dtype)
    return array(codes[dtype], [rng.getrandbits(1) for _ in range(count)]).tobytes()


WIDTH = {name: width for name, width in ELEMENT_TYPES.values()}


def fill_random(model, seed):
    """Seeded random inputs, written in small pieces so that they leave no trace in memory."""
    rng = random.Random(seed)
    for tensor in model.inputs:
        width, done = WIDTH.get(tensor["dtype"], 1), 0
        while done < tensor["bytes"]:
            count = min(1024, (tensor["bytes"] - done) // width)
            chunk = random_chunk(rng, tensor["dtype"], count)
            model.write(tensor, done, chunk)
            done += len(chunk)


# ------------------------------------------------------------------------------------ one model


def weight_cache_of(spec, arm):
    """Where XNNPACK keeps the packed weights of an arm, or "" where none is asked for."""
    return os.path.join(spec["job_dir"], "weights-" + arm) if spec["weight_cache"] else ""


def signature_of(spec, arm):
    return spec.get("signatures", {}).get(arm, "")


def open_arm(spec, arm, profile=False):
    return open_model(
        spec["runtime"], spec["arms"][arm], spec["threads"], spec["kernel"],
        weight_cache_of(spec, arm), profile, signature_of(spec, arm),
    )  # fmt: skip


def make_weight_caches(spec):
    """The first start with a cache packs the weights and writes them, every later one maps them.
    It is the later ones that are measured, so a child does the first before all else."""
    for arm, path in sorted(spec["arms"].items()):
        cache = weight_cache_of(spec, arm)
        if not cache or os.path.exists(cache):
            continue
        options = (
            spec["runtime"], path, spec["threads"], spec["kernel"], cache + ".part", False,
            signature_of(spec, arm),
        )  # fmt: skip
        child = os.fork()
        if child == 0:
            die_with_parent()
            code = 1
            try:
                open_model(*options)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            open_model(*options)  # once more, to tell why
            raise Unsupported("the weight cache could be written only the second time")
        if not os.path.exists(cache + ".part"):
            raise Unsupported("no weight cache was made: XNNPACK runs nothing of this model")
        os.rename(cache + ".part", cache)


def warm_up_runtime(spec):
    """One inference of the self-test model: what a runtime does once is not the model's cost."""
    model = open_model(spec["runtime"], spec["self_test"], spec["threads"])
    fill_random(model, 0)
    model.call()
    return model


def cpu_clock(spec):
    """The CPU time of one thread is the cost of an inference only where there is one thread."""
    return time.thread_time_ns if spec["threads"] == 1 else time.process_time_ns


def timed(model, count, cpu):
    """(wall ns, CPU ns) of ``count`` inferences; state is reset before them, where it can be."""
    call, wall = model.call, time.perf_counter_ns
    if model.reset is not None:
        model.reset()
    cpu_began = cpu()
    began = wall()
    for _ in repeat(None, count):
        call()
    ended = wall()
    return ended - began, cpu() - cpu_began


def warm_up(models, seconds, cpu):
    """Wall ns of every warm-up inference by arm: in turn, each once at least."""
    walls, end = {arm: [] for arm in models}, time.monotonic() + seconds
    while True:
        for arm, model in models.items():
            walls[arm].append(timed(model, 1, cpu)[0])
        if time.monotonic() >= end:
            return walls


def batch_sizes(warmups):
    """Inferences per sample by arm. Arms of about one speed get one size, so that what a batch
    costs beside the inferences is the same share of both."""
    typical = {arm: max(1, sorted(walls)[len(walls) // 2]) for arm, walls in warmups.items()}
    if max(typical.values()) <= 2 * min(typical.values()):
        typical = dict.fromkeys(typical, min(typical.values()))
    return {
        arm: 1 if ns >= BATCH_BELOW_NS else -(-BATCH_TARGET_NS // ns) for arm, ns in typical.items()
    }


def described(tensors):
    return [{k: t[k] for k in ("name", "dtype", "shape", "bytes")} for t in tensors]


def state_of(model, inner):
    """What happens to variable tensors (LSTM state) between inferences."""
    if model.stateful:
        return "kept"
    if model.reset is None:
        return "none"
    return "reset-before-each-inference" if inner == 1 else "reset-before-each-batch"


def only(models):
    """The one arm of a session that has no more."""
    if len(models) != 1:
        raise BadRequest("this session takes one model, not %s" % sorted(models))
    return next(iter(models))


# ------------------------------------------------------------------------------------- sessions


def work_self_test(spec):
    """Proves the runtime, apart from any model of the user's."""
    model = open_model(spec["runtime"], spec["self_test"], 1)
    model.write(model.inputs[0], 0, SELF_TEST_INPUT)
    model.call()
    found = model.read(model.outputs[0])
    if found != SELF_TEST_OUTPUT:
        raise RuntimeError("the runtime computes y = 2 x + 1 wrongly: %r" % (found,))
    return {"runtime_load_ns": model.runtime_load_ns}


def work_cold(spec):
    """Load once with the files dropped from the page cache first."""
    arm = only(spec["arms"])
    warm_up_runtime(spec)
    cache = weight_cache_of(spec, arm)
    if cache:
        drop_from_page_cache(cache)
    resident = drop_from_page_cache(spec["arms"][arm])
    model = open_arm(spec, arm)
    return {"load_ns": sum(model.load_parts_ns.values()), "resident_share": resident}


def time_in_state():
    """Seconds each frequency policy has spent at each frequency (kHz) so far; None = not told.
    cpufreq/policy*/stats/time_in_state counts in USER_HZ ticks (Documentation/cpu-freq)."""
    found, tick_s = {}, 1.0 / os.sysconf("SC_CLK_TCK")
    for policy in names("/sys/devices/system/cpu/cpufreq"):
        text = read("/sys/devices/system/cpu/cpufreq/%s/stats/time_in_state" % policy)
        if text:
            rows = [line.split() for line in text.splitlines()]
            found[policy] = {khz: int(ticks) * tick_s for khz, ticks in rows}
    return found or None


def time_spent(before, after):
    if before is None or after is None:
        return None
    return {
        policy: {khz: s - before.get(policy, {}).get(khz, 0.0) for khz, s in states.items()}
        for policy, states in after.items()
    }


def work_latency(spec):
    """Load, first inference, warm-up, steady state, of one arm or of two in turn: in each round
    every arm runs once, in shuffled order. Raw nanoseconds; nothing is summarised."""
    import hashlib

    for path in spec["arms"].values():  # load is measured with the file in the page cache
        with open(path, "rb") as stream:
            while stream.read(1 << 20):
                pass
    order_seed = zlib.crc32(("%s %s" % (spec["seed"], spec["tag"])).encode())
    rng = random.Random(order_seed)
    order = sorted(spec["arms"])
    rng.shuffle(order)
    keep = warm_up_runtime(spec)
    gc.collect()
    gc.disable()
    cpu = cpu_clock(spec)
    models, arms = {}, {}
    for arm in order:
        model = models[arm] = open_arm(spec, arm)
        fill_random(model, spec["seed"])
        first_ns, _ = timed(model, 1, cpu)
        outputs = b"".join(model.read(tensor) for tensor in model.outputs)
        arms[arm] = {
            "inputs": described(model.inputs),
            "outputs": described(model.outputs),
            "output_sha256": hashlib.sha256(outputs).hexdigest(),
            "load_ns": sum(model.load_parts_ns.values()),
            "load_parts_ns": model.load_parts_ns,
            "first_inference_ns": first_ns,
            "wall_ns": [],
            "cpu_ns": [],
        }
    warmups = warm_up(models, spec["warmup_s"], cpu)
    inner = batch_sizes(warmups)
    for arm in order:
        arms[arm].update(
            warmup_wall_ns=warmups[arm],
            inner_loops=inner[arm],
            state=state_of(models[arm], inner[arm]),
        )

    runs = [(models[a], inner[a], arms[a]["wall_ns"].append, arms[a]["cpu_ns"].append) for a in order]  # fmt: skip
    frequency = "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq" % min(spec["affinity"] or [0])  # fmt: skip
    usage, delay = resource.getrusage(resource.RUSAGE_SELF), read("/proc/self/schedstat", "")
    states, khz = time_in_state(), []
    rounds, end, next_look = 0, time.monotonic() + spec["session_s"], 0.0
    while rounds < spec["min_inferences"] or time.monotonic() < end:
        rng.shuffle(runs)
        for model, count, add_wall, add_cpu in runs:
            wall_ns, cpu_ns = timed(model, count, cpu)
            add_wall(wall_ns)
            add_cpu(cpu_ns)
        rounds += 1
        if time.monotonic() >= next_look:
            khz.append(read_int(frequency))
            next_look = time.monotonic() + 0.25
    states = time_spent(states, time_in_state())
    used, delayed = resource.getrusage(resource.RUSAGE_SELF), read("/proc/self/schedstat", "")
    share = sum(sum(arm["cpu_ns"]) for arm in arms.values()) / float(
        sum(sum(arm["wall_ns"]) for arm in arms.values())
    )
    single = spec["threads"] == 1
    del keep
    return {
        "rounds": rounds,
        "order_seed": order_seed,
        "arms": arms,
        "cpu_clock": "thread" if single else "process",
        "cpu_share": share,
        "contended": bool(single and share < CONTENDED_BELOW),
        "runtime_load_ns": models[order[0]].runtime_load_ns,
        "frequency_khz": [f for f in khz if f is not None],
        "time_in_state": states,
        "run_queue_delay_ns": int(delayed.split()[1]) - int(delay.split()[1])
        if delay and delayed
        else None,
        "involuntary_switches": used.ru_nivcsw - usage.ru_nivcsw,
        "major_faults": used.ru_majflt - usage.ru_majflt,
    }


def work_memory(spec):
    """What the model adds to a process whose runtime is loaded and has run once, in bytes; and
    what this process is without a runtime."""
    overhead = memory_bytes()["rss"]
    arm = only(spec["arms"])
    files = [spec["arms"][arm]] + [f for f in [weight_cache_of(spec, arm)] if f]
    keep = warm_up_runtime(spec)
    memory_bytes(files)  # once for practice: the reading itself takes some memory the first time
    gc.collect()
    give_back_free_memory()
    stages = {}
    peak_is_reset = reset_peak()
    stages["before_load"] = memory_bytes(files)
    model = open_arm(spec, arm)
    stages["after_load"] = memory_bytes(files)
    fill_random(model, spec["seed"])
    model.call()
    stages["after_first"] = memory_bytes(files)
    for _ in range(5):
        model.call()
    stages["steady"] = memory_bytes(files)
    del keep
    before, steady = stages["before_load"], stages["steady"]

    def growth(key):
        if before[key] is None or steady[key] is None:
            return None
        return steady[key] - before[key]

    return {
        "stages": stages,
        "anon_bytes": growth("anon"),
        "anon_source": steady["anon_source"],
        "file_bytes": steady["file"],
        "peak_bytes": growth("peak") if peak_is_reset else None,
        "overhead_bytes": overhead,
        "inputs": described(model.inputs),
    }


def work_instructions(spec):
    """Instructions in user space of single inferences, each with the ``overhead`` of counting it."""
    import instructions

    if spec["threads"] != 1:
        raise Unsupported("instructions are counted with one thread only: others spin as they wait")
    arm = only(spec["arms"])
    keep = warm_up_runtime(spec)
    model = open_arm(spec, arm)
    fill_random(model, spec["seed"])
    gc.collect()
    gc.disable()
    try:
        counter, counts = instructions.Counter(), []
        for _ in range(UNCOUNTED_INFERENCES + COUNTED_INFERENCES):
            if model.reset is not None:
                model.reset()
            counts.append(counter.count(model.call))
    except instructions.NoCounter as exc:
        raise Unsupported(str(exc))
    del keep
    return {
        "counts": counts[UNCOUNTED_INFERENCES:],
        "overhead": counter.overhead,
        "counter": "perf_event_open",
        "fixed_addresses": instructions.addresses_are_fixed(),
        "state": state_of(model, 1),
        "inputs": described(model.inputs),
        "outputs": described(model.outputs),
    }


def by_name(tensors, wanted):
    """Tensors in the order the job lists them. One tensor needs no name."""
    if len(tensors) == 1 and len(wanted) == 1:
        return list(tensors)
    table = {t["name"]: t for t in tensors}
    if len(table) != len(tensors) or sorted(table) != sorted(wanted):
        raise BadRequest("the model has inputs %s, the samples %s" % (sorted(table), wanted))
    return [table[name] for name in wanted]


def work_outputs(spec):
    """Outputs for given raw input bytes, written to a file as they come: sample after sample, in
    each the tensors in order. ``first`` and ``count`` choose a piece of the samples."""
    import hashlib

    given, arm = spec["inputs"], only(spec["arms"])
    first = spec.get("first", 0)
    count = spec.get("count", given["count"] - first)
    delegated = is_delegated(spec, arm) if first == 0 else None
    model = open_arm(spec, arm)
    fresh, reloads, size, digest = True, 0, 0, hashlib.sha256()
    part = spec["out_path"] + ".part"
    try:
        with open(given["path"], "rb") as stream, open(part, "wb") as out:
            stream.seek(first * sum(tensor["bytes"] for tensor in model.inputs))
            for _ in range(count):
                if model.stateful and not fresh:
                    model = open_arm(spec, arm)
                    reloads += 1
                elif model.reset is not None:
                    model.reset()
                for tensor in by_name(model.inputs, given["tensors"]):
                    raw = stream.read(tensor["bytes"])
                    if len(raw) != tensor["bytes"]:
                        message = "the samples end in the middle of input %r" % tensor["name"]
                        raise BadRequest(message)
                    model.write(tensor, 0, raw)
                model.call()
                fresh = False
                for tensor in model.outputs:
                    raw = model.read(tensor)
                    out.write(raw)
                    digest.update(raw)
                    size += len(raw)
            if first + count == given["count"] and stream.read(1):
                raise BadRequest("the samples are longer than the model's inputs")
            out.flush()
            os.fsync(out.fileno())
        os.rename(part, spec["out_path"])
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
    return {
        "outputs": described(model.outputs),
        "count": count,
        "path": spec["out_path"],
        "size": size,
        "sha256": digest.hexdigest(),
        "reloads": reloads,
        "delegated": model.delegated if delegated is None else delegated,
    }


def is_delegated(spec, arm):
    """Whether XNNPACK runs any part of the model, whose kernels round otherwise than the builtin
    ones; None where this cannot be told. In a child, whose memory is free again before the model
    is loaded to be used."""
    if spec["runtime"]["backend"] != "litert-c":
        return None
    child = os.fork()
    if child == 0:
        die_with_parent()
        answer = 2
        try:
            model = open_arm(spec, arm, profile=True)
            fill_random(model, spec["seed"])
            answer = int(any(where == "delegate" for _, where, _ in model.profiled_call()))
        finally:
            os._exit(answer)
    _, status = os.waitpid(child, 0)
    return {0: False, 1: True}.get(os.WEXITSTATUS(status)) if os.WIFEXITED(status) else None


def work_ops(spec):
    """Times of single operators by the runtime's profiler, apart from any latency: recording costs
    0.1 ms per inference."""
    model = open_arm(spec, only(spec["arms"]), profile=True)
    fill_random(model, spec["seed"])
    for _ in range(5):
        model.profiled_call()
    ops = None
    for _ in range(PROFILED_INFERENCES):
        began = time.perf_counter_ns()
        found = model.profiled_call()
        elapsed = time.perf_counter_ns() - began
        if any(ns > elapsed for _, _, ns in found):
            raise Unsupported("the profiler says that an operator took longer than its inference")
        if ops is None:
            ops = [
                {"index": index, "name": name, "where": where, "ns": []}
                for index, (name, where, _) in enumerate(found)
            ]
        if [(op["name"], op["where"]) for op in ops] != [(name, where) for name, where, _ in found]:
            raise Unsupported("the profiler names other operators in each inference")
        for op, (_, _, ns) in zip(ops, found):
            op["ns"].append(ns)
    if not ops:
        raise Unsupported("the profiler names no operator")
    return {"inferences": PROFILED_INFERENCES, "ops": ops, "profiler": True}


def percentile(ordered, p):
    """Nearest rank: the smallest value that at least p % of all do not exceed."""
    return ordered[max(0, -(-len(ordered) * p // 100) - 1)]


def work_sustained(spec):
    """Inference after inference for ``duration_s``, summarised per window, because hours of raw
    samples would grow the process that is measured."""
    from board import health

    cpu, window_s = cpu_clock(spec), spec.get("window_s", 60)
    keep = warm_up_runtime(spec)
    arm = only(spec["arms"])
    model = open_arm(spec, arm)
    fill_random(model, spec["seed"])
    inner = batch_sizes(warm_up({arm: model}, spec["warmup_s"], cpu))[arm]
    minutes, started = [], time.monotonic()
    for window in range(max(1, int(round(spec["duration_s"] / float(window_s))))):
        start_s, end = time.monotonic() - started, started + (window + 1) * window_s
        walls, cpus = array("d"), array("d")
        while not walls or time.monotonic() < end:
            wall_ns, cpu_ns = timed(model, inner, cpu)
            walls.append(wall_ns / float(inner))
            cpus.append(cpu_ns / float(inner))
        state, walls, cpus = health(), sorted(walls), sorted(cpus)
        minutes.append(
            {
                "start_s": start_s,
                "count": len(walls) * inner,
                "wall_ns": {
                    "p50": percentile(walls, 50), "p90": percentile(walls, 90),
                    "p99": percentile(walls, 99), "max": walls[-1],
                },
                "cpu_ns": {"p50": percentile(cpus, 50)},
                "temperature_c": state["temperature_c"],
                "throttling": state["throttling"],
                "frequency_khz": {k: v["current_khz"] for k, v in state["frequencies"].items()},
            }
        )  # fmt: skip
    del keep
    return {"minutes": minutes, "window_s": window_s, "inner_loops": inner}


def work_energy(spec):
    """Power while idle and while running. The inferences' share is for the host to work out:
    (P_run - P_idle) * elapsed / inferences."""
    import subprocess

    import energy

    try:
        energy.find_meter()
    except energy.NoMeter as exc:
        raise Unsupported(str(exc))
    cpu, arm = cpu_clock(spec), only(spec["arms"])
    model = open_arm(spec, arm)
    fill_random(model, spec["seed"])
    inner = batch_sizes(warm_up({arm: model}, spec["warmup_s"], cpu))[arm]

    def run_for(seconds):
        count, began = 0, time.monotonic_ns()
        while not count or time.monotonic_ns() - began < seconds * 1e9:
            timed(model, inner, cpu)
            count += inner
        return count, began, time.monotonic_ns()

    sampler = subprocess.Popen(
        [sys.executable, os.path.abspath(energy.__file__)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(SETTLE_S)
    idle_from = time.monotonic_ns()
    time.sleep(spec["idle_s"])
    idle_to = time.monotonic_ns()
    run_for(SETTLE_S)
    inferences, run_from, run_to = run_for(spec["run_s"])
    said = sampler.communicate()[0]
    if sampler.returncode:
        raise Unsupported("the power meter was lost")
    found = json.loads(said.decode())
    idle = [watts for at, watts in found["samples"] if idle_from <= at <= idle_to]
    run = [watts for at, watts in found["samples"] if run_from <= at <= run_to]
    if len(idle) < 2 or len(run) < 2:
        counts = (len(idle), len(run), found["failed"])
        raise Unsupported("the power meter gave %d idle and %d running readings, and %d errors" % counts)  # fmt: skip
    return {
        "method": found["method"],
        "idle_w": sum(idle) / len(idle),
        "run_w": sum(run) / len(run),
        "samples_idle": idle,
        "samples_run": run,
        "failed_readings": found["failed"],
        "inferences": inferences,
        "elapsed_ns": run_to - run_from,
    }


WORK = {
    "self-test": work_self_test,
    "cold": work_cold,
    "latency": work_latency,
    "memory": work_memory,
    "instructions": work_instructions,
    "outputs": work_outputs,
    "ops": work_ops,
    "sustained": work_sustained,
    "energy": work_energy,
}


def pin(cpus):
    """Stay on these CPUs: on all of them, as the kernel passes over those that are not there."""
    allowed = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, ValueError, OverflowError):
        pass
    if os.sched_getaffinity(0) != set(cpus):
        raise BadRequest("affinity %s, but it may run on CPUs %s" % (cpus, allowed))


def die_with_parent():
    """PR_SET_PDEATHSIG: no orphan stays busy."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def main(supervisor):
    """One session: a spec on stdin, one JSON object on what was stdout."""
    die_with_parent()
    if os.getppid() != supervisor:  # it died before we could ask for that
        os._exit(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints is a log
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w") as stream:
            stream.write("1000")  # of the two processes, the kernel shall take this one
    except OSError:
        pass
    spec = json.load(sys.stdin)
    try:
        if spec["affinity"]:
            pin(spec["affinity"])
        if spec.get("kernel", "") not in KERNELS:
            raise BadRequest("kernel %r is none of %s" % (spec["kernel"], ", ".join(KERNELS[1:])))
        if spec.get("weight_cache"):
            make_weight_caches(spec)
        result, code = {"ok": WORK[spec["kind"]](spec)}, 0
    except MemoryError:
        result, code = {"error": "out of memory", "what": "out-of-memory"}, 1
    except (BadRequest, NoSuchSignature) as exc:
        result, code = {"error": str(exc), "what": "bad-request"}, 1
    except Unsupported as exc:
        result, code = {"error": str(exc), "what": "unsupported"}, 1
    except RuntimeError as exc:  # the runtime's own words are on stderr
        result, code = {"error": str(exc)}, 1
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        result, code = {"error": str(exc), "what": "disk-full" if full else "os-error"}, 1
    except Exception as exc:
        import traceback

        traceback.print_exc()
        result, code = {"error": "%s: %s" % (type(exc).__name__, exc)}, 1
    json.dump(result, out, separators=(",", ":"))
    out.flush()
    os._exit(code)  # without the runtime's destructors


if __name__ == "__main__":
    main(int(sys.argv[1]))
