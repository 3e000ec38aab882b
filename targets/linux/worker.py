#!/usr/bin/env python3
"""One session in a fresh process: a spec on stdin, one JSON object on stdout, logs on stderr.

    python3 worker.py PID_OF_THE_SUPERVISOR

Standard library only, Python 3.7 or newer. A model that crashes ends this process and no other.
"""

import base64
import ctypes
import faulthandler
import gc
import hashlib
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import traceback
from array import array
from itertools import repeat

from backends import ELEMENT_TYPES, SELF_TEST_INPUT, SELF_TEST_OUTPUT, Unsupported, open_model
from sysfs import read, read_int

# Below this one sample is a batch of inferences: the call itself costs 1 to 3 us here and a clock
# read 0.1 us, which would be part of what is measured.
BATCH_BELOW_NS = 200000
BATCH_TARGET_NS = 1000000
# A session whose thread had the CPU for less than this share of the wall time was contended.
CONTENDED_BELOW = 0.97


class BadRequest(Exception):
    """What was asked for cannot be done here; that says nothing of the model."""


# --------------------------------------------------------------------------------------- memory


def memory_bytes(model_path):
    """Named quantities of this process, in bytes.

    ``anon`` comes from smaps_rollup, which walks the page tables; RssAnon in /proc/self/status is
    counted per CPU in batches on kernels from 6.2 on and may be off by hundreds of kB.
    """
    status = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/self/status", ""), re.M))
    rollup = re.search(r"^Anonymous:\s+(\d+) kB", read("/proc/self/smaps_rollup", ""), re.M)
    found = {
        "anon": int(rollup.group(1)) * 1024
        if rollup
        else (int(status["RssAnon"]) * 1024 if "RssAnon" in status else None),
        "anon_source": "smaps_rollup" if rollup else "status",
        "rss": int(status["VmRSS"]) * 1024 if "VmRSS" in status else None,
        "peak": int(status["VmHWM"]) * 1024 if "VmHWM" in status else None,
        "file": None,
    }
    try:
        with open("/proc/self/smaps") as stream:
            inside, found["file"] = False, 0
            for line in stream:
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    inside = line.rstrip("\n").endswith(" " + model_path)
                elif inside and line.startswith("Rss:"):
                    found["file"] += int(line.split()[1]) * 1024
    except OSError:
        pass
    return found


def reset_peak():
    """Set VmHWM back to the present RSS (proc(5), clear_refs value 5); False where refused."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        return True
    except OSError:
        return False


def give_back_free_memory():
    """malloc_trim(3), glibc: else a model that fits into what imports left free seems to cost 0."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass


def drop_from_page_cache(path):
    """Ask the kernel to forget a file, then return the share of its pages still in memory.

    Without privilege: fsync (dirty pages stay) and posix_fadvise(DONTNEED). mincore(2) tells
    whether it was done; tmpfs, for one, has nowhere else to keep the file. None = cannot tell.
    """
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]  # fmt: skip
        at = libc.mmap(None, size, 1, 1, descriptor, 0)  # PROT_READ, MAP_SHARED
        if at in (None, ctypes.c_void_p(-1).value):
            return None
        pages = (size + os.sysconf("SC_PAGE_SIZE") - 1) // os.sysconf("SC_PAGE_SIZE")
        resident = (ctypes.c_ubyte * pages)()
        failed = libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), resident)
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
        return None if failed else sum(flag & 1 for flag in resident) / float(pages)
    finally:
        os.close(descriptor)


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


# ------------------------------------------------------------------------------------- sessions


def described(tensors):
    return [{k: t[k] for k in ("name", "dtype", "shape", "bytes")} for t in tensors]


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
    """Load once with the file dropped from the page cache first."""
    warm_up_runtime(spec)
    resident = drop_from_page_cache(spec["model"])
    model = open_model(spec["runtime"], spec["model"], spec["threads"])
    return {"load_ns": sum(model.load_parts_ns.values()), "resident_share": resident}


def warm_up_runtime(spec):
    """One inference of the self-test model: what a runtime does once is not the model's cost."""
    model = open_model(spec["runtime"], spec["self_test"], spec["threads"])
    fill_random(model, 0)
    model.call()
    return model


def work_latency(spec):
    """Load, first inference, warm-up, steady state. Raw nanoseconds; nothing is summarised."""
    with open(spec["model"], "rb") as stream:  # load is measured with the file in the page cache
        while stream.read(1 << 20):
            pass
    keep = warm_up_runtime(spec)
    model = open_model(spec["runtime"], spec["model"], spec["threads"])
    fill_random(model, spec["seed"])
    wall = time.perf_counter_ns
    # the CPU time of one thread is the cost of an inference only where there is one thread
    single = spec["threads"] == 1
    cpu = time.thread_time_ns if single else time.process_time_ns
    call, reset = model.call, model.reset or (lambda: None)
    gc.collect()
    gc.disable()
    began = wall()
    call()
    first_ns = wall() - began

    warmups, end = [], time.monotonic() + spec["warmup_s"]
    while not warmups or time.monotonic() < end:
        reset()
        began = wall()
        call()
        warmups.append(wall() - began)
    typical = sorted(warmups)[len(warmups) // 2]
    inner = 1 if typical >= BATCH_BELOW_NS else max(1, -(-BATCH_TARGET_NS // max(1, typical)))

    walls, cpus, khz = [], [], []
    usage, delay = resource.getrusage(resource.RUSAGE_SELF), read("/proc/self/schedstat", "")
    end = time.monotonic() + spec["session_s"]
    next_look = 0.0
    while len(walls) < spec["min_inferences"] or time.monotonic() < end:
        reset()
        cpu_began = cpu()
        began = wall()
        for _ in repeat(None, inner):
            call()
        ended = wall()
        cpu_ended = cpu()
        walls.append(ended - began)
        cpus.append(cpu_ended - cpu_began)
        if time.monotonic() >= next_look:
            khz.append(read_int("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"))
            next_look = time.monotonic() + 0.25
    used, delayed = resource.getrusage(resource.RUSAGE_SELF), read("/proc/self/schedstat", "")
    share = sum(cpus) / float(sum(walls))
    del keep
    return {
        "inputs": described(model.inputs),
        "outputs": described(model.outputs),
        "output_sha256": hashlib.sha256(b"".join(model.read(t) for t in model.outputs)).hexdigest(),
        "runtime_load_ns": model.runtime_load_ns,
        "load_ns": sum(model.load_parts_ns.values()),
        "load_parts_ns": model.load_parts_ns,
        "first_inference_ns": first_ns,
        "warmup_wall_ns": warmups,
        "inner_loops": inner,
        "wall_ns": walls,
        "cpu_ns": cpus,
        "cpu_clock": "thread" if single else "process",
        "cpu_share": share,
        "contended": bool(single and share < CONTENDED_BELOW),
        "state": state_of(model, inner),
        "frequency_khz": [f for f in khz if f is not None],
        "run_queue_delay_ns": int(delayed.split()[1]) - int(delay.split()[1])
        if delay and delayed
        else None,
        "involuntary_switches": used.ru_nivcsw - usage.ru_nivcsw,
        "major_faults": used.ru_majflt - usage.ru_majflt,
    }


def state_of(model, inner):
    """What happens to variable tensors (LSTM state) between inferences."""
    if model.stateful:
        return "kept"
    if model.reset is None:
        return "none"
    return "reset-before-each-inference" if inner == 1 else "reset-before-each-batch"


def work_memory(spec):
    """What the model adds to a process whose runtime is loaded and has run once, in bytes."""
    path = spec["model"]
    keep = warm_up_runtime(spec)
    memory_bytes(path)  # once for practice: the reading itself takes some memory the first time
    gc.collect()
    give_back_free_memory()
    stages = {}
    peak_is_reset = reset_peak()
    stages["before_load"] = memory_bytes(path)
    model = open_model(spec["runtime"], path, spec["threads"])
    stages["after_load"] = memory_bytes(path)
    fill_random(model, spec["seed"])
    model.call()
    stages["after_first"] = memory_bytes(path)
    for _ in range(5):
        model.call()
    stages["steady"] = memory_bytes(path)
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
    """Outputs for given raw input bytes: sample after sample, in each the tensors in order."""
    given = spec["inputs"]
    model = open_model(spec["runtime"], spec["model"], spec["threads"])
    fresh, reloads = True, 0
    samples = []
    with open(given["path"], "rb") as stream:
        for _ in range(given["count"]):
            if model.stateful and not fresh:
                model = open_model(spec["runtime"], spec["model"], spec["threads"])
                reloads += 1
            elif model.reset is not None:
                model.reset()
            for tensor in by_name(model.inputs, given["tensors"]):
                raw = stream.read(tensor["bytes"])
                if len(raw) != tensor["bytes"]:
                    raise BadRequest("the samples end in the middle of input %r" % tensor["name"])
                model.write(tensor, 0, raw)
            model.call()
            fresh = False
            samples.append([base64.b64encode(model.read(t)).decode() for t in model.outputs])
        if stream.read(1):
            raise BadRequest("the samples are longer than the model's inputs")
    return {"outputs": described(model.outputs), "samples": samples, "reloads": reloads}


WORK = {
    "self-test": work_self_test,
    "cold": work_cold,
    "latency": work_latency,
    "memory": work_memory,
    "outputs": work_outputs,
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


def main(supervisor):
    """One session: a spec on stdin, one JSON object on what was stdout."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no orphan stays busy
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
        result, code = {"ok": WORK[spec["kind"]](spec)}, 0
    except MemoryError:
        result, code = {"error": "out of memory", "what": "out-of-memory"}, 1
    except BadRequest as exc:
        result, code = {"error": str(exc), "what": "bad-request"}, 1
    except Unsupported as exc:
        result, code = {"error": str(exc), "what": "unsupported"}, 1
    except RuntimeError as exc:  # the runtime's own words are on stderr
        result, code = {"error": str(exc)}, 1
    except Exception as exc:
        traceback.print_exc()
        result, code = {"error": "%s: %s" % (type(exc).__name__, exc)}, 1
    json.dump(result, out, separators=(",", ":"))
    out.flush()
    os._exit(code)  # without the runtime's destructors


if __name__ == "__main__":
    main(int(sys.argv[1]))
