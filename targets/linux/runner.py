#!/usr/bin/env python3
"""Measures one TFLite model on the Linux board it runs on. Standard library only, Python >= 3.7.

    python3 runner.py job.json         measure; ONE JSON object on stdout, logs on stderr
    python3 runner.py facts WORK_DIR   what this board is, its health, free space, runtimes found

The process started by hand is a supervisor: it checks, holds the lease, watches the clock and
never loads a runtime. Every session runs in a fresh worker process, so a model that crashes is a
line of data ("runs_on_device": false), not the end of the measurement.

Exit codes (sysexits.h where one fits); the JSON object is printed with every one of them:
    0 done          64 bad job or request 65 a file is missing, short or altered
    69 no runtime   70 the worker failed  71 a file cannot be used  73 disk full
    75 busy         124 time budget used up         1 a bug in here
"""

import base64
import ctypes
import errno
import faulthandler
import fcntl
import gc
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from array import array
from ctypes import byref, sizeof
from itertools import repeat

SCHEMA = 1
EX_OK, EX_BUG, EX_BAD_JOB, EX_DATA, EX_NO_RUNTIME, EX_WORKER = 0, 1, 64, 65, 69, 70
EX_OS, EX_DISK_FULL, EX_BUSY, EX_BUDGET = 71, 73, 75, 124

# Tests point this at a made-up /sys and /proc.
SYSROOT = os.environ.get("EDGEPIPE_SYSROOT", "")

# Below this one sample is a batch of inferences: the call itself costs 1 to 3 us here and a clock
# read 0.1 us, which would be part of what is measured.
BATCH_BELOW_NS = 200000
BATCH_TARGET_NS = 1000000
# A session whose thread had the CPU for less than this share of the wall time was contended.
CONTENDED_BELOW = 0.97


class Stop(Exception):
    """Ends the job with an exit code; what is known so far is still printed."""

    def __init__(self, code, error, message, **more):
        Exception.__init__(self, message)
        self.code, self.error, self.message, self.more = code, error, message, more


class Unsupported(RuntimeError):
    """This backend cannot run this model by design; another one may."""


class BadRequest(Exception):
    """What was asked for cannot be done here; that says nothing of the model."""


def log(text):
    sys.stderr.write("runner: %s\n" % text)
    sys.stderr.flush()


# ---------------------------------------------------------------------------------------- files


def read(path, default=None, limit=65536):
    try:
        with open(SYSROOT + path, "rb") as stream:
            raw = stream.read(limit)
    except OSError:
        return default
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()


def read_int(path):
    try:
        return int(read(path, ""))
    except ValueError:
        return None


def names(path):
    try:
        return sorted(os.listdir(SYSROOT + path))
    except OSError:
        return []


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(what, item):
    """The file is there and is the one the job was made for, or Stop."""
    path = os.path.expanduser(item["path"])
    try:
        size = os.path.getsize(path)
        found = sha256_of(path) if size == item["size"] else None
    except OSError as exc:
        raise Stop(EX_DATA, "data-mismatch", "%s %s: %s" % (what, path, exc.strerror))
    if found is None:
        message = "%s %s has %d bytes, the job says %d" % (what, path, size, item["size"])
        raise Stop(EX_DATA, "data-mismatch", message)
    if found != item["sha256"]:
        message = "%s %s has sha256 %s, the job says %s" % (what, path, found, item["sha256"])
        raise Stop(EX_DATA, "data-mismatch", message)
    return os.path.realpath(path)  # as /proc/self/smaps spells it


# --------------------------------------------------------------------------------------- health

# Raspberry Pi firmware, "get_throttled" property: bits 0-3 now, 16-19 since boot.
THROTTLE_BITS = {
    0: "under_voltage", 1: "frequency_capped", 2: "throttled", 3: "soft_temperature_limit",
    16: "under_voltage_occurred", 17: "frequency_capped_occurred", 18: "throttled_occurred",
    19: "soft_temperature_limit_occurred",
}  # fmt: skip


def throttling():
    """Firmware throttling as names; None where this board does not say."""
    text = None
    for platform_dir in ["/sys/devices/platform/soc/soc:firmware"] + [
        "/sys/devices/platform/%s/%s" % (soc, firmware)
        for soc in names("/sys/devices/platform")
        if soc.startswith("soc")
        for firmware in names("/sys/devices/platform/" + soc)
        if "firmware" in firmware
    ]:
        text = text or read(platform_dir + "/get_throttled")
    if text is None and not SYSROOT and shutil.which("vcgencmd"):
        try:
            done = subprocess.run(
                ["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=5,
            )  # fmt: skip
            match = re.match(rb"throttled=(0x[0-9a-fA-F]+)", done.stdout)
            text = match.group(1).decode() if match else None
        except (OSError, subprocess.TimeoutExpired):
            text = None
    try:
        bits = int(text or "", 16)
    except ValueError:
        return None
    return [name for bit, name in sorted(THROTTLE_BITS.items()) if bits >> bit & 1]


def health():
    """One snapshot of everything that can disturb a measurement. SI units; None = not readable."""
    temperatures, cooling, frequencies = {}, {}, {}
    for zone in names("/sys/class/thermal"):
        base = "/sys/class/thermal/%s/" % zone
        kind = read(base + "type", "?")
        if zone.startswith("thermal_zone"):
            value = read_int(base + "temp")
            if value is not None:
                temperatures["%s:%s" % (zone, kind)] = value / 1000.0
        elif zone.startswith("cooling_device"):
            cooling["%s:%s" % (zone, kind)] = read_int(base + "cur_state")
    for policy in names("/sys/devices/system/cpu/cpufreq"):
        base = "/sys/devices/system/cpu/cpufreq/%s/" % policy
        if policy.startswith("policy"):
            frequencies[policy] = {
                "cpus": read(base + "related_cpus"),
                "governor": read(base + "scaling_governor"),
                "current_khz": read_int(base + "scaling_cur_freq"),
                "limit_khz": read_int(base + "scaling_max_freq"),
                "hardware_limit_khz": read_int(base + "cpuinfo_max_freq"),
            }
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+)", read("/proc/meminfo", ""), re.M))
    vmstat = dict(re.findall(r"^(\w+) (\d+)$", read("/proc/vmstat", ""), re.M))
    load = read("/proc/loadavg", "").split()
    return {
        "realtime_s": time.time(),
        "monotonic_s": time.monotonic(),
        "boot_id": read("/proc/sys/kernel/random/boot_id"),
        "temperatures_c": temperatures,
        "temperature_c": max(temperatures.values()) if temperatures else None,
        "cooling": cooling,
        "throttling": throttling(),
        "frequencies": frequencies,
        "governor": ",".join(sorted({f["governor"] for f in frequencies.values() if f["governor"]}))
        or None,
        "loadavg_1min": float(load[0]) if load else None,
        "memory_available_bytes": int(meminfo["MemAvailable"]) * 1024
        if "MemAvailable" in meminfo
        else None,
        "swap_used_bytes": (int(meminfo["SwapTotal"]) - int(meminfo["SwapFree"])) * 1024
        if "SwapTotal" in meminfo and "SwapFree" in meminfo
        else None,
        "pages_swapped_in": int(vmstat["pswpin"]) if "pswpin" in vmstat else None,
        "oom_kills": int(vmstat["oom_kill"]) if "oom_kill" in vmstat else None,
    }


def health_flags(before, after):
    """What happened to the board between two snapshots, as a sorted list of flag names."""
    flags = set()
    was, now = before["throttling"] or [], after["throttling"] or []
    if any(not name.endswith("_occurred") for name in now):
        flags.add("throttled_now")
    if set(now) - set(was):
        flags.add("throttle_event")
    for name, state in after["cooling"].items():
        # a fan that spins faster is not throttling
        if "fan" not in name.lower() and (state or 0) > (before["cooling"].get(name) or 0):
            flags.add("cooling_rose")
    for policy, now_at in after["frequencies"].items():
        limit, hardware = now_at["limit_khz"], now_at["hardware_limit_khz"]
        if limit and hardware and limit < hardware:
            flags.add("frequency_capped")
    real = after["realtime_s"] - before["realtime_s"]
    if abs(real - (after["monotonic_s"] - before["monotonic_s"])) > 1.0:
        flags.add("clock_jump")
    if (after["pages_swapped_in"] or 0) > (before["pages_swapped_in"] or 0):
        flags.add("swapped_in")
    if before["boot_id"] != after["boot_id"]:
        flags.add("rebooted")
    return sorted(flags)


def machine():
    """Architecture of this *process*: a 32-bit userland on a 64-bit kernel is armv7l."""
    name = platform.machine()
    if struct.calcsize("P") == 4:
        return {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(name, name)
    return name


def glibc_version():
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, ValueError, OSError):
        return None
    return version if name == "glibc" else None


def device_facts():
    cpuinfo = read("/proc/cpuinfo", "")
    release = read("/etc/os-release", "")
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.M)
    cpus = sorted(set(re.findall(r"^(?:model name|CPU part)\s*:\s*(.*)$", cpuinfo, re.M)))
    identity = read("/proc/device-tree/serial-number") or read("/etc/machine-id") or ""
    return {
        "model": read("/proc/device-tree/model") or read("/sys/class/dmi/id/product_name"),
        "machine": machine(),
        "bits": struct.calcsize("P") * 8,
        "cpu": cpus,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "os": match.group(1) if match else None,
        "glibc": glibc_version(),
        "python": platform.python_version(),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "boot_id": read("/proc/sys/kernel/random/boot_id"),
        # tells two boards of one kind apart without naming either
        "identity": hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else None,
    }


def free_bytes(folder):
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def packages():
    """Runtimes installed for this Python, found by path: importing a broken wheel could crash."""
    found = {}
    for folder in sys.path:
        for package in ("ai_edge_litert", "tflite_runtime"):
            path = os.path.join(folder or ".", package)
            if package not in found and os.path.isdir(path):
                found[package] = {"version": None, "path": path}
                for name in os.listdir(folder or "."):
                    match = re.match(package + r"-([^-]+)\.(?:dist|egg)-info$", name)
                    if match:
                        found[package]["version"] = match.group(1)
    return found


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


# ------------------------------------------------------------------------------------- backends

# TfLiteType numbers (tensorflow/compiler/mlir/lite/core/c/tflite_types.h) -> name, bytes per value
ELEMENT_TYPES = {
    1: ("float32", 4), 2: ("int32", 4), 3: ("uint8", 1), 4: ("int64", 8), 6: ("bool", 1),
    7: ("int16", 2), 9: ("int8", 1), 10: ("float16", 2), 11: ("float64", 8), 13: ("uint64", 8),
    16: ("uint32", 4), 17: ("uint16", 2),
}  # fmt: skip
# Builtin operators (tflite schema.fbs) that keep state from one inference to the next.
STATEFUL_OPERATORS = {16, 24, 27, 35, 44, 46, 52, 129, 142, 143, 144}

_VOID, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Layout(ctypes.Structure):
    _fields_ = [
        ("bits", ctypes.c_uint32),
        ("dims", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    ]


class TensorType(ctypes.Structure):
    _fields_ = [("element", _INT), ("layout", Layout)]


class LiteRtAny(ctypes.Structure):
    _fields_ = [("type", _INT), ("value", ctypes.c_int64)]


class EnvironmentOption(ctypes.Structure):
    _fields_ = [("tag", _INT), ("value", LiteRtAny)]


class LiteRtC:
    """libLiteRt.so through ctypes: the CompiledModel C API as of LiteRT 2.1.6 (litert/c/*.h).

    Older libraries have the same symbols with other signatures, and a wrong guess is a segfault:
    hence the version check in `library_fault`, the pinned sha256 and the separate process.
    """

    reset = None  # the C API has no way to reset variable tensors

    def __init__(self, library, path, threads):
        at = [time.perf_counter_ns()]
        self.api = ctypes.CDLL(library, mode=os.RTLD_LAZY | os.RTLD_LOCAL)
        at.append(time.perf_counter_ns())
        self.environment, self.model, self.compiled = _VOID(), _VOID(), _VOID()
        # tag 24: accelerators to register = CPU only (1); tag 25: log severity = errors (3);
        # both are integers (LiteRtAny type 2). litert/c/litert_environment_options.h
        wanted = (EnvironmentOption * 2)(
            EnvironmentOption(24, LiteRtAny(2, 1)), EnvironmentOption(25, LiteRtAny(2, 3))
        )
        self.do("CreateEnvironment", _INT(2), wanted, byref(self.environment))
        at.append(time.perf_counter_ns())
        file = ctypes.c_char_p(os.fsencode(path))
        self.do("CreateModelFromFile", self.environment, file, byref(self.model))
        at.append(time.perf_counter_ns())
        options = self._options(threads)
        self.do("CreateCompiledModel", self.environment, self.model, options, byref(self.compiled))
        at.append(time.perf_counter_ns())
        signature = _VOID()
        self.do("GetModelSignature", self.model, _SIZE(0), byref(signature))
        self.inputs, inputs = self._buffers(signature, "Input")
        self.outputs, outputs = self._buffers(signature, "Output")
        at.append(time.perf_counter_ns())
        steps = [after - before for before, after in zip(at, at[1:])]
        self.runtime_load_ns = steps[0]
        self.load_parts_ns = dict(zip(("environment", "model", "compile", "buffers"), steps[1:]))
        self.stateful = self._is_stateful()
        self._keep = (inputs, outputs)
        run = self.api.LiteRtRunCompiledModel
        run.argtypes, run.restype = [_VOID, _SIZE, _SIZE, _VOID, _SIZE, _VOID], _INT
        arguments = (
            self.compiled, 0, len(inputs), ctypes.addressof(inputs), len(outputs),
            ctypes.addressof(outputs),
        )  # fmt: skip

        def call():
            status = run(*arguments)
            if status:
                raise RuntimeError("LiteRtRunCompiledModel: status %d" % status)

        self.call = call

    def do(self, function, *arguments):
        status = getattr(self.api, "LiteRt" + function)(*arguments)
        if status == 2:  # kLiteRtStatusErrorMemoryAllocationFailure (litert/c/litert_common.h)
            raise MemoryError
        if status:
            # kLiteRtStatusErrorUnsupported: variable tensors (LSTM, RNN, SVDF), for one
            error = Unsupported if status == 5 else RuntimeError
            raise error("LiteRt%s: status %d" % (function, status))

    def _options(self, threads):
        libc = ctypes.CDLL(None)
        libc.strdup.restype, libc.strdup.argtypes = _VOID, [ctypes.c_char_p]
        options, cpu = _VOID(), _VOID()
        self.do("CreateOptions", byref(options))
        self.do("SetOptionsHardwareAccelerators", options, _INT(1))  # CPU
        toml = _VOID(libc.strdup(b"num_threads = %d\n" % threads))  # the library frees it
        name = ctypes.c_char_p(b"xnnpack")
        self.do("CreateOpaqueOptions", name, toml, ctypes.cast(libc.free, _VOID), byref(cpu))
        self.do("AddOpaqueOptions", options, cpu)
        return options

    def _buffers(self, signature, kind):
        """Buffers of all inputs or outputs -> (their descriptions, array of handles)."""
        count = _SIZE()
        self.do("GetNumSignature%ss" % kind, signature, byref(count))
        layouts = (Layout * count.value)()
        # the model's own layouts have -1 for a dynamic batch; the compiled model's do not
        if kind == "Output":
            arguments = (self.compiled, _SIZE(0), count, layouts, ctypes.c_bool(True))
            self.do("GetCompiledModelOutputTensorLayouts", *arguments)
        handles, tensors = (_VOID * count.value)(), []
        for k in range(count.value):
            tensor, tensor_type, needs, buffer = _VOID(), TensorType(), _VOID(), _VOID()
            name, size = ctypes.c_char_p(), _SIZE()
            if kind == "Input":
                arguments = (self.compiled, _SIZE(0), _SIZE(k), byref(layouts, k * sizeof(Layout)))
                self.do("GetCompiledModelInputTensorLayout", *arguments)
            self.do("GetSignature%sTensorByIndex" % kind, signature, _SIZE(k), byref(tensor))
            self.do("GetTensorName", tensor, byref(name))
            self.do("GetRankedTensorType", tensor, byref(tensor_type))
            tensor_type.layout = layouts[k]
            arguments = (self.compiled, _SIZE(0), _SIZE(k), byref(needs))
            self.do("GetCompiledModel%sBufferRequirements" % kind, *arguments)
            arguments = (self.environment, byref(tensor_type), needs, byref(buffer))
            self.do("CreateManagedTensorBufferFromRequirements", *arguments)
            self.do("GetTensorBufferPackedSize", buffer, byref(size))
            handles[k] = buffer.value
            element = tensor_type.element
            tensors.append(
                {
                    "name": (name.value or b"").decode("utf-8", "replace"),
                    "dtype": ELEMENT_TYPES.get(element, ("type %d" % element, 0))[0],
                    "shape": [int(n) for n in layouts[k].dims[: layouts[k].bits & 0x7F]],
                    "bytes": int(size.value),
                    "handle": buffer,
                }
            )
        return tensors, handles

    def _is_stateful(self):
        graph, count = _VOID(), _SIZE()
        self.do("GetNumModelSubgraphs", self.model, byref(count))
        if count.value > 1:
            return True  # control flow or CALL_ONCE: do not guess
        self.do("GetModelSubgraph", self.model, _SIZE(0), byref(graph))
        self.do("GetNumSubgraphOps", graph, byref(count))
        for index in range(count.value):
            operator, code = _VOID(), _INT()
            self.do("GetSubgraphOp", graph, _SIZE(index), byref(operator))
            self.do("GetOpCode", operator, byref(code))
            if code.value in STATEFUL_OPERATORS:
                return True
        return False

    def _locked(self, tensor, mode):
        address = _VOID()
        self.do("LockTensorBuffer", tensor["handle"], byref(address), _INT(mode))
        return address.value

    def write(self, tensor, offset, chunk):
        # kLiteRtTensorBufferLockModeWrite = 1
        ctypes.memmove(self._locked(tensor, 1) + offset, chunk, len(chunk))
        self.do("UnlockTensorBuffer", tensor["handle"])

    def read(self, tensor):
        # kLiteRtTensorBufferLockModeRead = 0
        raw = ctypes.string_at(self._locked(tensor, 0), tensor["bytes"])
        self.do("UnlockTensorBuffer", tensor["handle"])
        return raw


class Interpreter:
    """The Python interpreter of ai_edge_litert or tflite_runtime; needs numpy on the board."""

    def __init__(self, module, path, threads):
        started = time.perf_counter_ns()
        if module == "ai_edge_litert":
            from ai_edge_litert.interpreter import Interpreter as Implementation
        else:
            from tflite_runtime.interpreter import Interpreter as Implementation
        import numpy

        self.numpy = numpy
        loaded = time.perf_counter_ns()
        interpreter = self.interpreter = Implementation(model_path=path, num_threads=threads)
        read_ns = time.perf_counter_ns()
        interpreter.allocate_tensors()
        self.runtime_load_ns = loaded - started
        self.load_parts_ns = {
            "model": read_ns - loaded,
            "compile": time.perf_counter_ns() - read_ns,
        }
        self.inputs = [self._describe(d) for d in interpreter.get_input_details()]
        self.outputs = [self._describe(d) for d in interpreter.get_output_details()]
        # resource variables (tf.Variable) are not reset by reset_all_variables, only by loading anew
        operators = {operator["op_name"] for operator in interpreter._get_ops_details()}
        self.stateful = bool(operators & {"VAR_HANDLE", "CALL_ONCE"})
        self.call, self.reset = interpreter.invoke, interpreter.reset_all_variables

    def _describe(self, detail):
        dtype = self.numpy.dtype(detail["dtype"])
        shape = [int(n) for n in detail["shape"]]
        count = 1
        for n in shape:
            count *= n
        return {
            "name": detail["name"],
            "dtype": dtype.name,
            "shape": shape,
            "bytes": count * dtype.itemsize,
            "handle": detail["index"],
        }

    def write(self, tensor, offset, chunk):
        # no copy of the whole input, and no view left behind: invoke refuses while one is alive
        flat = self.interpreter.tensor(tensor["handle"])().reshape(-1).view(self.numpy.uint8)
        flat[offset : offset + len(chunk)] = self.numpy.frombuffer(chunk, self.numpy.uint8)

    def read(self, tensor):
        return self.interpreter.get_tensor(tensor["handle"]).tobytes()


def open_model(runtime, path, threads):
    if runtime["backend"] == "litert-c":
        return LiteRtC(runtime["path"], path, threads)
    return Interpreter(runtime["module"], path, threads)


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


# --------------------------------------------------------------------------------------- worker

# A float32 model of one dense layer, y = 2 x + 1, (1, 4) -> (1, 4): edgepipe's tiny_tflite().
SELF_TEST_MODEL = zlib.decompress(
    base64.b64decode(
        "eNqNkLEOAUEQhgeHE0uuuEKhUCoUl3gAKpVSqSEud5eIXJAgUSg9gEfwWCpP4A3Ov7Nz7Kns5cvOzv3/7sy4RDSb"
        "TIeTLMt8xDdwB68SUYUMZzAADnhCp3eP9LqMitTIhaom2jFr8q2w/s5d8F4LQbiKwjRJw94+2ZxwRnnks6RNHUQe"
        "KX67LfkuWIEYrIm4pmi7SOOg6PW5F0VNy4vlehI7/BlPPg+Sc9nKlyTvyAznoC/nK3pwsSvRnSyv/v/AfyU5/W4V"
        "LJPFLrA0iqsk7lFZd2l9HRzCJIr3Ad/hfDx6JqYq4/36jj815HcpnsXX0zBtNd4vcyya"
    )
)  # fmt: skip
SELF_TEST_INPUT = struct.pack("<4f", 0.0, 1.0, 2.0, 3.0)
SELF_TEST_OUTPUT = struct.pack("<4f", 1.0, 3.0, 5.0, 7.0)


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


def worker(supervisor):
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


# ----------------------------------------------------------------------------------- supervisor


def run_worker(spec, timeout_s):
    """(result, None) or (None, cause): a cause has `what`, `message` and `stderr`."""
    kills_before = health()["oom_kills"]
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "--worker", str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        env=dict(os.environ, PYTHONHASHSEED="0"),  # one layout of dicts: memory repeats better
    )  # fmt: skip
    stdout, tail = [], [b""]

    def collect():
        stdout.append(process.stdout.read())

    def collect_tail():
        for chunk in iter(lambda: process.stderr.read1(4096), b""):
            tail[0] = (tail[0] + chunk)[-4000:]

    threads = [threading.Thread(target=collect), threading.Thread(target=collect_tail)]
    for thread in threads:
        thread.start()
    timed_out = False
    try:
        process.stdin.write(json.dumps(spec).encode())
        process.stdin.close()
    except OSError:
        pass  # it is dead already; the return code says more
    try:
        process.wait(timeout=max(0.001, timeout_s))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
        process.stdout.close()
        process.stderr.close()
    stderr = tail[0].decode("utf-8", "replace").strip()

    def cause(what, message, **more):
        return None, dict(what=what, message=message, stderr=stderr, **more)

    if timed_out:
        return cause("timeout", "the worker was stopped after %.1f s" % timeout_s)
    if process.returncode < 0:
        number = -process.returncode
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "signal %d" % number
        kills = health()["oom_kills"]
        if number == signal.SIGKILL and None not in (kills, kills_before) and kills > kills_before:
            return cause(
                "out-of-memory", "the kernel killed the worker: out of memory", signal=number
            )
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return cause("killed", "someone killed the worker with %s" % name, signal=number)
        return cause("crash", "the worker crashed with %s" % name, signal=number)
    try:
        answer = json.loads((stdout[0] if stdout else b"").decode())
    except ValueError:
        answer = {}
    if process.returncode == 0 and "ok" in answer:
        return answer["ok"], None
    message = answer.get("error") or "the worker ended with code %d" % process.returncode
    said = re.findall(r"^ERROR: *(.*\S)", stderr, re.M)
    if said:
        message += " (%s)" % "; ".join(said[-3:])
    return cause(answer.get("what", "error"), message)


# ELF e_machine (elf.h) and EI_CLASS for what `machine` returns
ELF_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64"}


def elf_machine(path):
    with open(path, "rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return ELF_MACHINES.get(struct.unpack("<H", head[18:20])[0], "unknown")


def numbers(version):
    return tuple(int(n) for n in re.findall(r"\d+", version or "")[:3])


def library_fault(library):
    """Why a pushed libLiteRt.so must not be loaded here, or None."""
    found, here = elf_machine(library["path"]), machine()
    if found != here:
        return "the library is for %s, this process is %s" % (found or "no machine: not ELF", here)
    if numbers(library["version"]) < (2, 1, 6):
        return (
            "the C API of LiteRT %s is another one (2.1.6 or newer is needed)" % library["version"]
        )
    if library.get("glibc"):
        has = glibc_version()
        if has is None:
            return "the C library here is not glibc"
        if numbers(has) < numbers(library["glibc"]):
            return "the library needs glibc %s, this board has %s" % (library["glibc"], has)
    return None


def choose_runtime(job, self_test, deadline, unfit):
    """The first backend that loads and passes the self-test -> (runtime, rejected ones).

    ``unfit`` are backends that turned out not to support the model, with the reason. Raises
    Stop(69) with every reason where none is left.
    """
    wanted, rejected, found = job["backend"], list(unfit), packages()
    candidates = []
    if job["runtime"] is not None:
        item = job["runtime"]
        candidates.append(
            {"backend": "litert-c", "name": "litert", "version": item["version"],
             "sha256": item["sha256"], "path": item["path"]}
        )  # fmt: skip
    else:
        rejected.append({"backend": "litert-c", "reason": "no libLiteRt.so was pushed"})
    for backend, module, name in (
        ("litert-interpreter", "ai_edge_litert", "litert"),
        ("tflite-runtime-interpreter", "tflite_runtime", "tflite-runtime"),
    ):
        if module in found:
            candidates.append(
                {"backend": backend, "name": name, "version": found[module]["version"],
                 "module": module, "path": found[module]["path"],
                 "sha256": package_library_sha256(found[module]["path"])}
            )  # fmt: skip
        else:
            reason = "Python %s has no %s" % (platform.python_version(), module)
            rejected.append({"backend": backend, "reason": reason})
    for candidate in candidates:
        known_unfit = [r["backend"] for r in unfit]
        if wanted not in ("auto", candidate["backend"]) or candidate["backend"] in known_unfit:
            continue
        reason = None
        if candidate["backend"] == "litert-c":
            reason = library_fault(job["runtime"])
        if reason is None:
            spec = {
                "kind": "self-test",
                "runtime": candidate,
                "self_test": self_test,
                "affinity": [],
            }
            result, cause = run_worker(spec, deadline - time.monotonic())
            if result is not None:
                return candidate, rejected
            # neither of these says that the backend is unfit: no other one takes its place
            if cause["what"] == "timeout":
                message = "the time budget of %g s was used up in the self-test of %s" % (
                    job["budget_s"], candidate["backend"],
                )  # fmt: skip
                raise Stop(EX_BUDGET, "budget", message)
            if cause["what"] == "killed":
                raise Stop(EX_WORKER, "worker-failed", cause["message"], cause=cause)
            reason = cause["message"]
            if cause["stderr"]:
                reason += " (%s)" % cause["stderr"].splitlines()[-1]
        rejected.append({"backend": candidate["backend"], "reason": reason})
        log("%s: %s" % (candidate["backend"], reason))
    reasons = [r for r in rejected if wanted in ("auto", r["backend"])]
    message = "; ".join("%s: %s" % (r["backend"], r["reason"]) for r in reasons)
    raise Stop(EX_NO_RUNTIME, "no-runtime", message, rejected=rejected)


def package_library_sha256(folder):
    """sha256 of the largest shared object of a package: its runtime."""
    libraries = [os.path.join(folder, n) for n in os.listdir(folder) if n.endswith(".so")]
    libraries = [p for p in libraries if "Accelerator" not in os.path.basename(p)]
    return sha256_of(max(libraries, key=os.path.getsize)) if libraries else None


class Lease:
    """One job at a time on a board: flock while running, and until a moment after for its owner.

    The lock falls with the process, however it dies. Between two calls of one job the owner file
    keeps others out for `lease_s`; a reboot or the passing of that time ends it.
    """

    def __init__(self, job):
        self.job, self.path = job, os.path.join(job["work_dir"], "lock")
        self.stream = open(self.path, "a+")
        self.now = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(EX_BUSY, "busy", "another job is running on this board", owner=self.owner())
        owner = self.owner()
        if (
            owner
            and owner.get("job") != job["id"]
            and owner.get("boot_id") == read("/proc/sys/kernel/random/boot_id")
            and owner.get("until_boottime_s", 0) > self.now()
        ):
            message = "another job holds this board for %.0f s more" % (
                owner["until_boottime_s"] - self.now()
            )
            raise Stop(EX_BUSY, "busy", message, owner=owner)
        self.write(self.now())

    def owner(self):
        self.stream.seek(0)
        try:
            owner = json.loads(self.stream.read(4096))
        except ValueError:
            return None
        return owner if isinstance(owner, dict) else None

    def write(self, until):
        text = json.dumps(
            {"job": self.job["id"], "owner": self.job["owner"], "pid": os.getpid(),
             "since_unix_s": time.time(), "until_boottime_s": until,
             "boot_id": read("/proc/sys/kernel/random/boot_id")}
        )  # fmt: skip
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write(text)
        self.stream.flush()

    def leave(self):
        self.write(self.now() + self.job["lease_s"])


SESSIONS = ["latency", "memory", "outputs"]
NUMBER = (int, float)
JOB_KEYS = {
    "schema": int, "id": str, "owner": str, "work_dir": str, "model": dict,
    "runtime": (dict, type(None)), "backend": str, "threads": int, "affinity": list,
    "warmup_s": NUMBER, "session_s": NUMBER, "min_inferences": int, "seed": int,
    "sessions": list, "inputs": (dict, type(None)), "budget_s": NUMBER, "lease_s": NUMBER,
    "min_free_bytes": int,
}  # fmt: skip


def load_job(path):
    try:
        with open(path) as stream:
            job = json.load(stream)
    except (OSError, ValueError) as exc:
        raise Stop(EX_BAD_JOB, "bad-job", "%s: %s" % (path, exc))
    if not isinstance(job, dict):
        raise Stop(EX_BAD_JOB, "bad-job", "%s holds no JSON object" % path)
    if not isinstance(job.get("schema"), int) or job["schema"] > SCHEMA:
        message = "job schema %r, this runner knows %d" % (job.get("schema"), SCHEMA)
        raise Stop(EX_BAD_JOB, "bad-job", message)
    wrong = ["no %s" % key for key in JOB_KEYS if key not in job]
    wrong += ["unknown key %s" % key for key in job if key not in JOB_KEYS]
    wrong += [
        "%s is %r" % (key, job[key])
        for key, kind in JOB_KEYS.items()
        if key in job and not isinstance(job[key], kind)
    ]
    for name, keys in (
        ("model", {"path": str, "size": int, "sha256": str}),
        ("runtime", {"path": str, "size": int, "sha256": str, "version": str}),
        ("inputs", {"path": str, "size": int, "sha256": str, "count": int, "tensors": list}),
    ):
        if isinstance(job.get(name), dict):
            wrong += [
                "%s.%s is %r" % (name, key, job[name].get(key))
                for key, kind in keys.items()
                if not isinstance(job[name].get(key), kind)
            ]
    if not wrong:
        wrong += ["no session is called %r" % s for s in job["sessions"] if s not in SESSIONS]
        if job["backend"] not in ("auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter"):  # fmt: skip
            wrong.append("backend is %r" % job["backend"])
        if job["threads"] < 1:
            wrong.append("threads is %d" % job["threads"])
        if "outputs" in job["sessions"] and job["inputs"] is None:
            wrong.append("a session 'outputs' needs inputs")
    if wrong:
        raise Stop(EX_BAD_JOB, "bad-job", "%s: %s" % (path, "; ".join(wrong)))
    job["work_dir"] = os.path.expanduser(job["work_dir"])
    return job


def run_job(path, reply):
    began = time.monotonic()
    job = load_job(path)
    deadline = began + job["budget_s"]
    reply["job"] = job["id"]
    lease = Lease(job)
    try:
        measure(job, reply, deadline, os.path.dirname(os.path.abspath(path)))
    finally:
        lease.leave()


def measure(job, reply, deadline, job_dir):
    reply["device"] = device_facts()
    if not job["sessions"]:
        return
    free = free_bytes(job["work_dir"])
    if free < job["min_free_bytes"]:
        message = "%s has %d bytes free, %d are needed" % (
            job["work_dir"], free, job["min_free_bytes"],
        )  # fmt: skip
        raise Stop(EX_DISK_FULL, "disk-full", message)
    job["model"]["path"] = check_file("model", job["model"])
    if job["runtime"] is not None:
        job["runtime"]["path"] = check_file("runtime", job["runtime"])
    if job["inputs"] is not None:
        job["inputs"]["path"] = check_file("inputs", job["inputs"])
    folder = tempfile.mkdtemp(prefix="session-", dir=job_dir)
    try:
        self_test = os.path.join(folder, "self-test.tflite")
        with open(self_test, "wb") as stream:
            stream.write(SELF_TEST_MODEL)
        unfit = []
        reply["runtime"], reply["rejected"] = choose_runtime(job, self_test, deadline, unfit)
        kinds = list(job["sessions"])
        while kinds:
            kind = kinds[0]
            session = run_session(job, kind, reply["runtime"], self_test, deadline)
            cause = session["cause"]
            if cause is not None and cause["what"] == "unsupported" and not reply["sessions"]:
                unfit.append({"backend": reply["runtime"]["backend"], "reason": cause["message"]})
                log("%s: %s" % (unfit[-1]["backend"], cause["message"]))
                chosen = choose_runtime(job, self_test, deadline, unfit)
                reply["runtime"], reply["rejected"] = chosen
                continue
            kinds.pop(0)
            reply["sessions"].append(session)
            if cause is None:
                reply["runs_on_device"] = True
            elif cause["what"] == "timeout":
                message = "the time budget of %g s was used up in a %s session" % (
                    job["budget_s"], kind,
                )  # fmt: skip
                raise Stop(EX_BUDGET, "budget", message)
            elif cause["what"] == "bad-request":
                raise Stop(EX_BAD_JOB, "bad-request", cause["message"])
            else:
                if cause["what"] != "killed":
                    reply["runs_on_device"] = False
                raise Stop(EX_WORKER, "worker-failed", cause["message"], cause=cause)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_session(job, kind, runtime, self_test, deadline):
    spec = {
        "kind": kind, "runtime": runtime, "self_test": self_test, "model": job["model"]["path"],
        "threads": job["threads"], "affinity": job["affinity"], "seed": job["seed"],
        "warmup_s": job["warmup_s"], "session_s": job["session_s"],
        "min_inferences": job["min_inferences"], "inputs": job["inputs"],
    }  # fmt: skip
    before = health()
    log("%s session with %s %s" % (kind, runtime["backend"], runtime["version"]))
    data, cause = None, None
    if kind == "latency":
        cold, cause = run_worker(dict(spec, kind="cold"), deadline - time.monotonic())
        log("cold load: %s" % ("done" if cause is None else cause["message"]))
    if cause is None:
        data, cause = run_worker(spec, deadline - time.monotonic())
    if data is not None and kind == "latency":
        data["cold"] = cold
    after = health()
    return {
        "kind": kind,
        "cause": cause,
        "data": data,
        "before": before,
        "after": after,
        "flags": health_flags(before, after),
    }


def main(argv):
    if sys.version_info < (3, 7):
        sys.stderr.write("runner: Python 3.7 or newer is needed\n")
        return EX_NO_RUNTIME
    if argv[1:2] == ["--worker"]:
        return worker(int(argv[2]))
    reply = {
        "schema": SCHEMA, "code": EX_OK, "error": None, "message": "", "job": None,
        "device": None, "runtime": None, "rejected": [], "runs_on_device": None, "sessions": [],
    }  # fmt: skip
    try:
        if len(argv) == 3 and argv[1] == "facts":
            reply["device"], reply["health"] = device_facts(), health()
            reply["free_bytes"] = free_bytes(os.path.expanduser(argv[2]))
            reply["packages"] = packages()
        elif len(argv) == 2:
            run_job(argv[1], reply)
        else:
            raise Stop(
                EX_BAD_JOB, "bad-job", "usage: runner.py job.json | runner.py facts WORK_DIR"
            )
    except Stop as stop:
        reply.update(code=stop.code, error=stop.error, message=stop.message, **stop.more)
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        reply.update(
            code=EX_DISK_FULL if full else EX_OS,
            error="disk-full" if full else "os-error",
            message=str(exc),
        )
        traceback.print_exc()
    except Exception as exc:
        traceback.print_exc()
        reply.update(code=EX_BUG, error="bug", message="%s: %s" % (type(exc).__name__, exc))
    if reply["message"]:
        log(reply["message"])
    sys.stdout.write(json.dumps(reply, separators=(",", ":")) + "\n")
    sys.stdout.flush()
    return reply["code"]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
