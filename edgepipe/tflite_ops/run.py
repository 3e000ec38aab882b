"""Running .onnx and .tflite files on this host: real values in, real values out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from edgepipe.artifact import TensorSpec
from edgepipe.errors import ArtifactError, DataError
from edgepipe.state import batch_axis
from edgepipe.tflite_ops.flatbuffer import find_signature, parse_model, with_main_graph
from edgepipe.tflite_ops.inspect import read_model

log = logging.getLogger(__name__)
_stderr_lock = threading.RLock()

# onnxruntime's wheels send usage events to its maker unless told not to; a user's models are theirs.
onnxruntime.disable_telemetry_events()

# Inputs (N, ...) in the file's order and layout -> its outputs
Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
# Samples run at once through a model whose batch is not fixed: bounds memory, nothing else.
DYNAMIC_BATCH = 32
# One inference of a model for small devices takes seconds even on a busy host.
TRIAL_TIMEOUT_S = 300.0


def run_onnx(
    path: Path,
    arrays: Sequence[np.ndarray],
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
) -> list[np.ndarray]:
    """Outputs of an ONNX model for N samples: see `onnx_runner`."""
    return onnx_runner(path, input_specs, output_specs)(arrays)


def onnx_runner(
    path: Path, input_specs: Sequence[TensorSpec], output_specs: Sequence[TensorSpec]
) -> Runner:
    """An ONNX model, loaded once: N samples -> outputs in the file's order and layout, one thread.

    ``arrays[i]`` is input *i* of the file, (N, ...) in its layout; a fixed batch is looped over.
    Graphs holding QuantizeLinear run unoptimised: onnxruntime's fused int8 kernels saturate on
    x86 without VNNI (the same file 41.9 dB unoptimised, 19.7 dB optimised). Raises ArtifactError
    where the file is no valid model, DataError where an input does not fit it.
    """
    session = open_onnx(path)
    names = [item.name for item in session.get_inputs()]
    shapes = [_onnx_shape(item.shape) for item in session.get_inputs()]
    dtypes = [_ONNX_DTYPES.get(item.type, np.float32) for item in session.get_inputs()]
    _check_count(path, len(session.get_outputs()), len(output_specs), "outputs")

    def invoke(batch: list[np.ndarray]) -> list[np.ndarray]:
        feed = {
            name: exact_cast(array, dtype, what=f"input {name!r} of {path.name}")
            for name, array, dtype in zip(names, batch, dtypes, strict=True)
        }
        try:
            return [np.asarray(value) for value in session.run(None, feed)]
        except Exception as exc:  # onnxruntime raises its own classes per status code
            raise DataError(
                f"onnxruntime cannot run {path} on inputs of shape {[a.shape for a in batch]}: {exc}",
                hint="the samples must have the shapes and dtypes the model declares",
            ) from exc

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        _check_count(path, len(names), len(arrays), "inputs")
        return _run_in_batches(path, arrays, input_specs, output_specs, shapes, invoke)

    return run


def run_tflite(
    path: Path,
    arrays: Sequence[np.ndarray],
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
    *,
    signature: str = "",
) -> list[np.ndarray]:
    """Outputs of a TFLite model for N samples: see `tflite_runner`."""
    _check_count(path, len(input_specs), len(arrays), "inputs")
    return tflite_runner(path, input_specs, output_specs, signature=signature)(arrays)


def tflite_runner(
    path: Path,
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
    *,
    signature: str = "",
) -> Runner:
    """A TFLite model, loaded once: N samples -> outputs in the file's order and layout, one thread.

    ``arrays[i]`` is input *i* of the file as real values, (N, ...) in its layout; quantized inputs
    are quantised with the file's scale and zero point and outputs dequantised. A fixed batch is
    looped over, and variable tensors (LSTM state) are reset before every inference. ``signature`` is
    which one of a file of several is run, by its key; empty: the main graph. Raises ArtifactError where
    the file is no valid model, has no such signature or disagrees with its specs, DataError where an
    input does not fit it.
    """
    graph = open_graph(path, signature=signature)
    _check_count(path, len(graph.inputs), len(input_specs), "inputs")
    _check_count(path, len(graph.outputs), len(output_specs), "outputs")
    for detail, spec in zip([*graph.inputs, *graph.outputs], [*input_specs, *output_specs], strict=True):  # fmt: skip
        _check_quantization(path, detail, spec)

    def invoke(batch: list[np.ndarray]) -> list[np.ndarray]:
        given = [quantize(array, d) for d, array in zip(graph.inputs, batch, strict=True)]
        return [dequantize(a, d) for d, a in zip(graph.outputs, graph.run(given), strict=True)]

    shapes: list[tuple[int | None, ...]] = [tuple(int(n) for n in d["shape"]) for d in graph.inputs]
    return lambda arrays: _run_in_batches(path, arrays, input_specs, output_specs, shapes, invoke)


def open_onnx(
    source: Path | bytes, *, optimise: bool | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on one CPU thread. ``optimise`` defaults to: unless quantized."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; warnings about the graph are not the user's
    try:
        if optimise is None:
            optimise = not has_qdq(source)
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = source if isinstance(source, bytes) else str(source)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except ArtifactError:
        raise
    except Exception as exc:  # onnxruntime raises its own classes per status code
        name = "the ONNX model" if isinstance(source, bytes) else str(source)
        raise ArtifactError(
            f"{name} is not a model onnxruntime can load: {exc}",
            hint="the file is truncated, of another format, or uses operators onnxruntime lacks",
        ) from exc


def open_tflite(
    model: Path | bytes, *, preserve_all_tensors: bool = False, delegates: bool = True
) -> Interpreter:
    """An interpreter with its tensors allocated, on one thread.

    With ``preserve_all_tensors`` every intermediate tensor can be read after an inference; the
    reference-free builtin kernels then run without delegates, which would hide tensors. Without
    ``delegates`` XNNPACK is not used.
    """
    if isinstance(model, bytes):
        source: dict[str, Any] = {"model_content": model}
        named = "the model"
    else:
        source = {"model_path": str(model)}
        named = str(model)
    try:
        with native_messages_logged(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keeping all tensors costs memory: that is meant
            interpreter = Interpreter(
                **source,
                num_threads=1,
                experimental_preserve_all_tensors=preserve_all_tensors,
                experimental_op_resolver_type=OpResolverType.AUTO
                if delegates and not preserve_all_tensors
                else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError, OSError) as exc:
        raise ArtifactError(
            f"{named} is not a model LiteRT can load: {exc}",
            hint="the file is truncated, of another format, or needs operators LiteRT lacks (Flex)",
        ) from exc
    return interpreter


@dataclasses.dataclass(frozen=True)
class OpenGraph:
    """A graph of a file, ready to run: LiteRT's details of its inputs and outputs, in its order.

    ``run`` makes one inference from fresh state of arrays as the inputs store them, shapes included.
    """

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def open_graph(source: Path | bytes, *, signature: str = "", delegates: bool = True) -> OpenGraph:
    """The main graph of a file or, by its key, a signature's, run out of that very file.

    Raises ArtifactError as `open_tflite`, and where there is no such signature.
    """
    interpreter = open_tflite(source, delegates=delegates)
    where = "the model" if isinstance(source, bytes) else str(source)
    if not signature:
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

        def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            for detail, array in zip(inputs, arrays, strict=True):
                interpreter.set_tensor(detail["index"], array)
            invoke_once(interpreter, where=where)
            return [interpreter.get_tensor(d["index"]) for d in outputs]

        return OpenGraph(inputs, outputs, run)

    model = parse_model(source, where=where) if isinstance(source, bytes) else read_model(source)
    found = find_signature(model, signature, where=where)
    graph, runner = model.subgraphs[found.subgraph], interpreter.get_signature_runner(signature)

    def names(tensors: Sequence[int], named: Mapping[str, int]) -> list[str]:
        """Those of a signature, in the order of its graph."""
        by_tensor = {tensor: name for name, tensor in named.items()}
        if set(by_tensor) != set(tensors):
            raise ArtifactError(f"signature {signature!r} of {where} does not name all of its graph's inputs and outputs")  # fmt: skip
        return [by_tensor[tensor] for tensor in tensors]

    ins, outs = names(graph.inputs, found.inputs), names(graph.outputs, found.outputs)

    def run_signature(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        with failures_named(f"signature {signature!r} of {where}"):
            interpreter.reset_all_variables()
            results = runner(**dict(zip(ins, arrays, strict=True)))
        return [results[name] for name in outs]

    details_in, details_out = runner.get_input_details(), runner.get_output_details()
    return OpenGraph([details_in[n] for n in ins], [details_out[n] for n in outs], run_signature)


def is_delegated(path: Path, *, signature: str = "") -> bool:
    """Whether XNNPACK runs any part of a model on this host."""
    # LiteRT lists the operators of the main graph only
    model = with_main_graph(path.read_bytes(), signature, where=str(path)) if signature else path
    return any(op["op_name"] == "DELEGATE" for op in open_tflite(model)._get_ops_details())


def invoke_once(interpreter: Interpreter, *, where: str) -> None:
    """One inference on the inputs set, from fresh state. ArtifactError where an operator fails."""
    interpreter.reset_all_variables()
    with failures_named(where):
        interpreter.invoke()


@contextlib.contextmanager
def failures_named(where: str) -> Iterator[None]:
    """What LiteRT raises meanwhile becomes ArtifactError (``cannot-run``)."""
    try:
        yield
    except RuntimeError as exc:
        raise ArtifactError(
            f"{where} fails in LiteRT: {exc}",
            hint="an int8 divisor that rounds to zero: keep it away from zero (a larger eps in a normalisation)"
            if "(DIV)" in str(exc)
            else "`edgepipe inspect` shows the operator; it cannot take these inputs",
            code="cannot-run",
        ) from exc  # fmt: skip


_TRIAL = """
import sys, numpy
from ai_edge_litert.interpreter import Interpreter
model = Interpreter(sys.argv[1], num_threads=1)
model.allocate_tensors()
for detail in model.get_input_details():
    model.set_tensor(detail["index"], numpy.zeros(detail["shape"], detail["dtype"]))
model.invoke()
"""


def refuse_crashing(path: Path) -> None:
    """Raises ArtifactError for a file that kills the process which loads and runs it, or hangs it.

    Tried in a child process, because LiteRT follows wrong indices in a damaged file. Errors that
    LiteRT reports are not looked at here: whoever runs the model gets them.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, str(path)],
            capture_output=True, check=False, timeout=TRIAL_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise ArtifactError(
            f"{path} does not finish one inference within {TRIAL_TIMEOUT_S:.0f} s",
            hint="does it hold a loop that never ends?",
            code="crashes",
        ) from exc
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ArtifactError(
            f"{path} crashes LiteRT ({name}) when it is loaded or run",
            hint="the file is damaged, or the converter made an invalid graph",
            code="crashes",
        )


@contextlib.contextmanager
def native_messages_logged() -> Iterator[None]:
    """What LiteRT's C++ prints on file descriptor 2 meanwhile becomes DEBUG records.

    One thread at a time: the descriptor is the process's. Others that log wait, lest their lines go
    where LiteRT's do.
    """
    with _stderr_lock, contextlib.ExitStack() as stack:
        stream = stack.enter_context(tempfile.TemporaryFile())
        for handler in logging.getLogger("edgepipe").handlers:
            handler.acquire()
            stack.callback(handler.release)
        saved = os.dup(2)
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            stream.seek(0)
            for line in stream.read().decode(errors="replace").splitlines():
                log.debug("%s", line)


def has_qdq(source: Path | bytes) -> bool:
    """Whether an ONNX graph holds quantised arithmetic. Raises ArtifactError on a broken file."""
    graph = load_onnx(source).graph
    return any(node.op_type in QDQ_OPS for node in graph.node)


QDQ_OPS = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    ]
)


def load_onnx(source: Path | bytes) -> Any:
    """The ModelProto of a file, weights kept in other files left there. ArtifactError if broken."""
    import onnx

    name = "the ONNX model" if isinstance(source, bytes) else str(source)
    try:
        model = (
            onnx.load_from_string(source)
            if isinstance(source, bytes)
            else onnx.load(str(source), load_external_data=False)
        )
    except FileNotFoundError as exc:
        raise ArtifactError(f"{name} does not exist", hint="check the path", code="no-such-file") from exc  # fmt: skip
    except Exception as exc:  # protobuf's DecodeError has no public home
        raise ArtifactError(
            f"{name} is not an ONNX file: {exc}",
            hint="the file is truncated or of another format: export it again",
        ) from exc
    if not model.graph.node:
        raise ArtifactError(
            f"{name} holds an empty ONNX graph", hint="the file is empty or truncated: export it again"
        )  # fmt: skip
    return model


def quantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Real values -> what the input tensor stores: round(x / scale) + zero_point, saturated.

    With int8, scale 0.5 and zero point 10: 3.2 -> round(6.4) + 10 = 16. Tensors without a scale
    are cast, and values that the dtype cannot hold exactly are refused with DataError, as is NaN.
    """
    dtype = np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if not scale or not np.issubdtype(dtype, np.integer):
        return exact_cast(array, dtype, what=f"input {detail['name']!r}")
    limits = np.iinfo(dtype)
    stored = np.rint(array.astype(np.float64) / scale) + zero_point
    if np.isnan(stored).any():  # integers have none: it would become some number
        raise DataError(
            f"input {detail['name']!r} is {dtype.name}, the samples hold NaN",
            hint="remove these samples, or mend the code that makes them",
            code="not-finite",
        )
    stored = np.clip(stored, limits.min, limits.max)
    return np.asarray(stored, dtype)


def dequantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """What an output tensor stores -> real values float32: scale * (stored - zero_point)."""
    scale, zero_point = detail["quantization"]
    if not scale or not np.issubdtype(array.dtype, np.integer):
        return array
    return np.asarray((array.astype(np.float64) - zero_point) * scale, np.float32)


def exact_cast(array: np.ndarray, dtype: Any, *, what: str) -> np.ndarray:
    """Cast to the dtype of a tensor. A number that an integer tensor cannot hold is DataError."""
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(invalid="ignore"):
        cast = array.astype(dtype)
    if np.issubdtype(dtype, np.integer) and not np.array_equal(cast, array):
        raise DataError(
            f"{what} holds {dtype.name}, the samples hold {array.dtype} with fractions or beyond it",
            hint="give whole numbers that it can hold for an integer input",
        )
    return cast


_ONNX_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def _onnx_shape(shape: Sequence[object]) -> tuple[int | None, ...]:
    """onnxruntime's shape, with its named (dynamic) dimensions as None."""
    return tuple(n if isinstance(n, int) and n > 0 else None for n in shape)


def _check_count(path: Path, expected: int, given: int, what: str) -> None:
    if expected != given:
        raise ArtifactError(
            f"{path} has {expected} {what}, its specs or the samples have {given}",
            hint="the record beside the model is not of this file",
        )


def _check_quantization(path: Path, detail: dict[str, Any], spec: TensorSpec) -> None:
    scale, zero_point = detail["quantization"]
    # float32 in the file, perhaps through JSON in the spec: equal to float32's own resolution
    if spec.scale and (
        not np.isclose(spec.scale, scale, rtol=1e-6) or spec.zero_point != zero_point
    ):
        raise ArtifactError(
            f"{path}: tensor {spec.name!r} has scale {scale} and zero point {zero_point}, "
            f"its spec says {spec.scale} and {spec.zero_point}",
            hint="the record beside the model is not of this file",
        )


def _run_in_batches(
    path: Path,
    arrays: Sequence[np.ndarray],
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
    shapes: Sequence[tuple[int | None, ...]],
    invoke: Callable[[list[np.ndarray]], list[np.ndarray]],
) -> list[np.ndarray]:
    """Loop N samples over the file's batch; the last batch is filled up with its last sample.

    A scalar input has (N,) samples and takes one at a time.
    """
    axes = [batch_axis(spec.layout) for spec in input_specs]
    for array, spec, shape, axis in zip(arrays, input_specs, shapes, axes, strict=True):
        fits = array.ndim == (len(shape) or 1) and all(
            n is None or i == axis or n == m
            for i, (n, m) in enumerate(zip(shape, array.shape, strict=bool(shape)))
        )
        if not fits:
            legal = ["any" if n is None else n for n in shape]
            raise DataError(
                f"input {spec.name!r} of {path.name} takes {legal} ({spec.layout}), "
                f"the samples have shape {list(array.shape)}",
                hint="the first number is the batch; the rest must be equal",
            )
    if not arrays:
        return invoke([])  # constants only: there is no batch to loop over
    counts = {array.shape[axis] for array, axis in zip(arrays, axes, strict=True)}
    if len(counts) != 1 or 0 in counts:
        raise DataError(
            f"the inputs of {path.name} hold different numbers of samples: {sorted(counts)}",
            hint="every input needs the same number of samples, at least one",
        )
    total = counts.pop()
    fixed = {shape[axis] if shape else 1 for shape, axis in zip(shapes, axes, strict=True)} - {None}
    if len(fixed) > 1:
        raise ArtifactError(f"inputs of {path} have different batch sizes: {sorted(map(str, fixed))}")  # fmt: skip
    batch_size = fixed.pop() if fixed else min(total, DYNAMIC_BATCH)
    assert batch_size is not None
    parts: list[list[np.ndarray]] = []
    for start in range(0, total, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), total - 1)
        batch = [np.take(a, rows, axis=axis) for a, axis in zip(arrays, axes, strict=True)]
        parts.append(invoke([b if s else b.reshape(()) for b, s in zip(batch, shapes, strict=True)]))  # fmt: skip
    results = []
    for index, spec in enumerate(output_specs):
        pieces = [np.atleast_1d(part[index]) for part in parts]
        axis = batch_axis(spec.layout)
        if len({piece.shape for piece in pieces}) > 1:
            raise ArtifactError(
                f"output {spec.name!r} of {path.name} has another shape for each input: "
                f"{', '.join(map(str, dict.fromkeys(piece.shape for piece in pieces)))}",
                hint="a shape that depends on values (nonzero, unique, a computed reshape) has no form in TFLite",
                code="dynamic-shape",
            )
        whole = np.concatenate(pieces, axis=axis) if len(pieces) > 1 else pieces[0]
        # a state of two layers has two rows a sample: keep what belongs to `total` samples
        kept = total * pieces[0].shape[axis] // batch_size
        results.append(np.take(whole, np.arange(kept), axis=axis))
    return results
