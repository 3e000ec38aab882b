"""The ways to run a TFLite model, behind one shape: write, call, read. Only a worker loads one.

Standard library only, Python 3.7 or newer; numpy comes with the interpreters that need it.
"""

import base64
import ctypes
import json
import os
import struct
import sys
import time
import zlib
from ctypes import byref, sizeof


class Unsupported(RuntimeError):
    """This backend cannot do that by design: run this model, use that kernel, time operators."""


class NoSuchSignature(RuntimeError):
    """The file has no signature of the name that was asked for."""

    def __init__(self, key, keys):
        names = ", ".join(sorted(keys)) or "none"
        RuntimeError.__init__(self, "the model has no signature %r; it has: %s" % (key, names))


KERNELS = ("", "xnnpack", "builtin")  # "" = whatever the runtime takes by itself


# TfLiteType numbers (tensorflow/compiler/mlir/lite/core/c/tflite_types.h) -> name, bytes per value
ELEMENT_TYPES = {
    1: ("float32", 4), 2: ("int32", 4), 3: ("uint8", 1), 4: ("int64", 8), 6: ("bool", 1),
    7: ("int16", 2), 9: ("int8", 1), 10: ("float16", 2), 11: ("float64", 8), 13: ("uint64", 8),
    16: ("uint32", 4), 17: ("uint16", 2),
}  # fmt: skip
# Builtin operators (tflite schema.fbs) that keep state from one inference to the next.
STATEFUL_OPERATORS = {16, 24, 27, 35, 44, 46, 52, 129, 142, 143, 144}
# Those that run other graphs of the file: CALL, IF, WHILE, CALL_ONCE and StableHLO's CUSTOM_CALL,
# REDUCE, SCATTER, REDUCE_WINDOW, SORT, WHILE, COMPOSITE, CASE. What is in there is not looked for.
CALLING_OPERATORS = {31, 118, 119, 129, 173, 174, 190, 198, 199, 200, 206, 209}

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


class ProfilerEvent(ctypes.Structure):
    """LiteRtProfilerEventData (litert/c/litert_profiler_event.h, as of 2.1.6); times in us."""

    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("type", _INT),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", _SIZE * 6),
        ("node", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", _INT),
    ]


# Event types: an operator of the interpreter, an operator inside a delegate (XNNPACK). The others
# are frames around these, and one of them (32) has no elapsed time in it but garbage.
OPERATOR_EVENTS = {2: "builtin", 8: "delegate"}


class LiteRtC:
    """libLiteRt.so through ctypes: the CompiledModel C API as of LiteRT 2.1.6 (litert/c/*.h).

    Older libraries have the same symbols with other signatures, and a wrong guess is a segfault:
    hence the version check in `library_fault`, the pinned sha256 and the separate process.
    """

    reset = None  # the C API has no way to reset variable tensors
    delegated = None  # whether XNNPACK runs any part of the model: only the profiler tells

    def __init__(
        self, library, path, threads, kernel="", weight_cache="", profile=False, signature=""
    ):
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
        self.number, handle, graph = self._find_signature(signature)
        at.append(time.perf_counter_ns())
        options = self._options(threads, kernel, weight_cache, profile)
        self.do("CreateCompiledModel", self.environment, self.model, options, byref(self.compiled))
        at.append(time.perf_counter_ns())
        self.inputs, inputs = self._buffers(handle, "Input")
        self.outputs, outputs = self._buffers(handle, "Output")
        at.append(time.perf_counter_ns())
        steps = [after - before for before, after in zip(at, at[1:])]
        self.runtime_load_ns = steps[0]
        self.load_parts_ns = dict(zip(("environment", "model", "compile", "buffers"), steps[1:]))
        operators = self._operators(graph)
        self.calls_graphs = bool(operators & CALLING_OPERATORS)
        self.stateful = self.calls_graphs or bool(operators & STATEFUL_OPERATORS)  # do not guess
        run = self.api.LiteRtRunCompiledModel
        # made once: converting them by argtypes takes 0.3 us in every call
        arguments = (
            self.compiled, self.number, _SIZE(len(inputs)), inputs, _SIZE(len(outputs)), outputs,
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

    def _find_signature(self, key):
        """(number, signature, its graph) of the signature ``key``; of the main graph without one."""
        main, handle, graph, count = _VOID(), _VOID(), _VOID(), _SIZE()
        self.do("GetModelSubgraph", self.model, _SIZE(0), byref(main))
        self.do("GetNumModelSignatures", self.model, byref(count))
        keys = []
        for number in range(count.value):
            name = ctypes.c_char_p()
            self.do("GetModelSignature", self.model, _SIZE(number), byref(handle))
            self.do("GetSignatureSubgraph", handle, byref(graph))
            self.do("GetSignatureKey", handle, byref(name))
            keys.append((name.value or b"").decode("utf-8", "replace"))
            # a file without signatures has one here, of its main graph
            if (keys[-1] == key) if key else (graph.value == main.value):
                return _SIZE(number), handle, graph
        if not key:
            raise Unsupported("no signature is of the main graph; they are: %s" % ", ".join(keys))
        raise NoSuchSignature(key, keys)

    def _options(self, threads, kernel, weight_cache, profile):
        libc = ctypes.CDLL(None)
        libc.strdup.restype, libc.strdup.argtypes = _VOID, [ctypes.c_char_p]
        options = _VOID()
        self.do("CreateOptions", byref(options))
        self.do("SetOptionsHardwareAccelerators", options, _INT(1))  # CPU

        def add(name, toml):
            text, made = _VOID(libc.strdup(toml.encode())), _VOID()  # the library frees the text
            name = ctypes.c_char_p(name)
            self.do("CreateOpaqueOptions", name, text, ctypes.cast(libc.free, _VOID), byref(made))
            self.do("AddOpaqueOptions", options, made)

        cpu = "num_threads = %d\n" % threads
        if kernel:
            cpu += 'kernel_mode = "%s"\n' % kernel
        if weight_cache:
            cpu += "weight_cache_file_path = %s\n" % json.dumps(weight_cache, ensure_ascii=False)
        add(b"xnnpack", cpu)
        if profile:
            add(b"runtime_options_string", "enable_profiling = true\n")
        return options

    def _buffers(self, signature, kind):
        """Buffers of all inputs or outputs -> (their descriptions, array of handles)."""
        count = _SIZE()
        self.do("GetNumSignature%ss" % kind, signature, byref(count))
        layouts = (Layout * count.value)()
        # the model's own layouts have -1 for a dynamic batch; the compiled model's do not
        if kind == "Output":
            arguments = (self.compiled, self.number, count, layouts, ctypes.c_bool(True))
            self.do("GetCompiledModelOutputTensorLayouts", *arguments)
        handles, tensors = (_VOID * count.value)(), []
        for k in range(count.value):
            tensor, tensor_type, needs, buffer = _VOID(), TensorType(), _VOID(), _VOID()
            name, size = ctypes.c_char_p(), _SIZE()
            if kind == "Input":
                layout = byref(layouts, k * sizeof(Layout))
                arguments = (self.compiled, self.number, _SIZE(k), layout)
                self.do("GetCompiledModelInputTensorLayout", *arguments)
            self.do("GetSignature%sTensorByIndex" % kind, signature, _SIZE(k), byref(tensor))
            self.do("GetTensorName", tensor, byref(name))
            self.do("GetRankedTensorType", tensor, byref(tensor_type))
            tensor_type.layout = layouts[k]
            arguments = (self.compiled, self.number, _SIZE(k), byref(needs))
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

    def _operators(self, graph):
        """The builtin operators of a graph, as numbers."""
        count, codes = _SIZE(), set()
        self.do("GetNumSubgraphOps", graph, byref(count))
        for index in range(count.value):
            operator, code = _VOID(), _INT()
            self.do("GetSubgraphOp", graph, _SIZE(index), byref(operator))
            self.do("GetOpCode", operator, byref(code))
            codes.add(code.value)
        return codes

    def profiled_call(self):
        """One inference, opened with ``profile``: [(name, where, ns)] in order of execution.

        Recording takes about 0.1 ms of its own, and the numbers have a grain of 1 us. An operator
        is known by its place: XNNPACK counts anew in each part of the graph that it took.
        """
        if self.calls_graphs:
            raise Unsupported("operators of inner graphs are counted twice by the profiler")
        profiler, count = _VOID(), _INT()
        self.do("CompiledModelGetProfiler", self.compiled, byref(profiler))
        self.do("ResetProfiler", profiler)
        self.do("StartProfiler", profiler)
        self.call()
        self.do("StopProfiler", profiler)
        self.do("GetNumProfilerEvents", profiler, byref(count))
        events = (ProfilerEvent * max(1, count.value))()
        self.do("GetProfilerEvents", profiler, count, events)
        return [
            (
                (event.tag or b"").decode("utf-8", "replace"),
                OPERATOR_EVENTS[event.type],
                event.elapsed_us * 1000,
            )
            for event in events[: count.value]
            if event.type in OPERATOR_EVENTS
        ]

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

    def __init__(self, module, path, threads, kernel="", signature=""):
        started = time.perf_counter_ns()
        if module == "ai_edge_litert":
            from ai_edge_litert.interpreter import Interpreter as Implementation
            from ai_edge_litert.interpreter import OpResolverType
        else:
            from tflite_runtime.interpreter import Interpreter as Implementation
            from tflite_runtime.interpreter import OpResolverType
        import numpy

        self.numpy = numpy
        loaded = time.perf_counter_ns()
        resolver = OpResolverType.AUTO
        if kernel == "builtin":
            resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = self.interpreter = Implementation(
            model_path=path, num_threads=threads, experimental_op_resolver_type=resolver
        )
        keys = interpreter.get_signature_list() if signature else {}
        if signature and signature not in keys:
            raise NoSuchSignature(signature, keys)
        read_ns = time.perf_counter_ns()
        interpreter.allocate_tensors()  # of the main graph; delegates take their parts of all graphs
        self.graph = self._graph_of(signature) if signature else 0
        self.runtime_load_ns = loaded - started
        self.load_parts_ns = {
            "model": read_ns - loaded,
            "compile": time.perf_counter_ns() - read_ns,
        }
        self.reset = interpreter.reset_all_variables
        if self.graph:
            self._use_graph(signature)
            return
        self.inputs = [self._describe(d) for d in interpreter.get_input_details()]
        self.outputs = [self._describe(d) for d in interpreter.get_output_details()]
        # resource variables (tf.Variable) are not reset by reset_all_variables, only by loading anew
        operators = {operator["op_name"] for operator in interpreter._get_ops_details()}
        self.stateful = bool(operators & {"VAR_HANDLE", "CALL_ONCE"})
        self.delegated = "DELEGATE" in operators
        self.call, self.view = interpreter.invoke, interpreter.tensor

    def _graph_of(self, signature):
        """The number of a signature's graph, whose tensors have memory then."""
        try:
            graph = self.interpreter._interpreter.GetSubgraphIndexFromSignature(signature)
            if graph:
                self.interpreter._interpreter.AllocateTensors(graph)
        except (AttributeError, TypeError) as exc:
            raise Unsupported("this Python interpreter cannot run a signature: %s" % exc)
        return graph

    def _use_graph(self, signature):
        """As for the main graph. A signature's runner copies all inputs and outputs in every call,
        which would be part of what is measured; this is what it does besides."""
        interpreter, graph = self.interpreter, self.graph
        runner = interpreter.get_signature_runner(signature)
        self.inputs, self.outputs = (
            [self._describe(d) for d in sorted(details.values(), key=lambda d: d["index"])]
            for details in (runner.get_input_details(), runner.get_output_details())
        )
        # names of operators are told of the main graph only; a resource's handle has this type
        self.stateful = any(
            self._type_of(index) is self.numpy.object_
            for index in range(interpreter._interpreter.NumTensors(graph))
        )
        self.delegated = None

        def call():
            interpreter._ensure_safe()
            interpreter._interpreter.Invoke(graph)

        def view(index):
            base = interpreter._interpreter
            return lambda: base.tensor(base, index, graph)

        self.call, self.view = call, view

    def _type_of(self, index):
        try:
            return self.interpreter._interpreter.TensorType(index, self.graph)
        except ValueError:  # a kernel's scratch tensor that it has no use for has none
            return None

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
        flat = self.view(tensor["handle"])().reshape(-1).view(self.numpy.uint8)
        flat[offset : offset + len(chunk)] = self.numpy.frombuffer(chunk, self.numpy.uint8)

    def read(self, tensor):
        return self.view(tensor["handle"])().tobytes()


def open_model(runtime, path, threads, kernel="", weight_cache="", profile=False, signature=""):
    """``weight_cache`` is a file for XNNPACK's packed weights; ``profile`` allows profiled_call;
    ``signature`` names the one to run ("": the main graph). Raises Unsupported where this backend
    cannot do what was asked for, NoSuchSignature."""
    if runtime["backend"] == "litert-c":
        return LiteRtC(runtime["path"], path, threads, kernel, weight_cache, profile, signature)
    for asked, what in (
        (profile, "does not time operators"),
        (weight_cache, "takes no weight cache file"),
        (kernel == "xnnpack", "cannot be made to take XNNPACK"),
    ):
        if asked:
            raise Unsupported("the Python interpreter of %s %s" % (runtime["module"], what))
    folder = os.path.dirname(runtime.get("path") or "")
    if folder and folder not in sys.path:
        sys.path.append(folder)  # it was pushed, not installed
    return Interpreter(runtime["module"], path, threads, kernel, signature)


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
