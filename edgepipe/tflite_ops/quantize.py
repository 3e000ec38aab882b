"""Float TFLite bytes to full-integer int8 bytes, with ranges that we collect ourselves.

The arithmetic follows the LiteRT 8-bit specification: activations int8 with scale and zero point,
``real = scale * (stored - zero_point)``; weights int8 symmetric, one scale for each output channel.
The rewriting of the file is litert-quantizer's; the activation ranges are ours, because its default
calibration is a moving average of the samples' ranges and loses 8-19 dB against their union.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from litert_quantizer import default_policy, qtyping, quantizer
from litert_quantizer import recipe as quantizer_recipe

from edgepipe.array_ops.compare import sqnr_db
from edgepipe.errors import StageError
from edgepipe.tflite_ops.flatbuffer import (
    CONVERSIONS,
    Model,
    Operator,
    Subgraph,
    Tensor,
    drop_tensors,
    inline_buffers,
    parse_model,
)
from edgepipe.tflite_ops.inspect import FloatIsland, describe_model, operator_macs
from edgepipe.tflite_ops.run import invoke_once, native_messages_logged, open_tflite
from edgepipe.tflite_ops.run import quantize as stored
from edgepipe.tflite_ops.stand_in import STAND_INS, fixed_ranges, hide, show

log = logging.getLogger(__name__)

STAGE = "quantize_int8"
# The square of a scale, and its product with another, must be a float32.
_MAX_SCALE = 1e15
# Values below are as good as 0, which layers that training let die are full of. A scale for them asks for
# one of the weights behind that kernels cannot multiply by (from 1e-19 on XNNPACK refuses the file).
_NOTHING = 1e-15
IoDtype = Literal["int8", "uint8", "float32"]
Precision = Literal["int16", "float"]

# Operators whose kernels clamp their result themselves: the *Options tables of schema.fbs with a
# fused_activation_function that every runtime from TFLite 2.14 on honours.
_CLAMPING = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "SUB", "MUL",
     "AVERAGE_POOL_2D", "MAX_POOL_2D"}
)  # fmt: skip
# Operators that only move values, so that clamping before or after them is the same.
_MOVING = frozenset({"TRANSPOSE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS"})
_FUSED = {
    "RELU": schema.ActivationFunctionType.RELU,
    "RELU6": schema.ActivationFunctionType.RELU6,
    "RELU_N1_TO_1": schema.ActivationFunctionType.RELU_N1_TO_1,
}
_HALF = "RELU_0_TO_1"
# Operators with a bias: positions of their input and their bias, and the weights' channel axis
BIASED = {
    "CONV_2D": (0, 2, 0),
    "DEPTHWISE_CONV_2D": (0, 2, 3),
    "FULLY_CONNECTED": (0, 2, 0),
    "TRANSPOSE_CONV": (2, 3, 0),
}
# Infinity, and what kernels make of it: they clamp their result to the float32 limits of 3.4e38.
HUGE = 3e38
_PROGRESS_S = 2.0


# Rows of `Ranges`: enough for its curve of settling, and all the memory it takes
MAX_ROWS = 512
# litert-quantizer's own calibration (utils/qsv_utils.py, moving_average_update)
SMOOTHING = 0.95


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Smallest and largest value of T activation tensors in N groups of batches: (N, T) float32.

    ``batches`` were seen in all, number i in group i mod N, one each up to `MAX_ROWS`. ``moving``
    (2, T) are the moving averages of the batches' ends, in their order.
    """

    names: tuple[str, ...]
    minima: np.ndarray
    maxima: np.ndarray
    moving: np.ndarray
    batches: int

    def table(self) -> dict[str, tuple[float, float]]:
        """Tensor name -> (minimum, maximum) over all batches."""
        lowest, highest = self.minima.min(axis=0), self.maxima.max(axis=0)
        return {name: (float(lowest[i]), float(highest[i])) for i, name in enumerate(self.names)}

    def averages(self) -> dict[str, tuple[float, float]]:
        """Tensor name -> moving average (0.95) of the batches' minima and maxima."""
        low, high = self.moving
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.names)}


def check_quantizable(model: Model, *, where: str) -> None:
    """Raise StageError for a file that cannot be the input of int8 quantisation, with the reason."""
    graph = model.subgraphs[0]
    scaled = [t.name for t in graph.tensors if t.scales]
    if scaled:
        raise StageError(
            f"{where} is quantized already: {len(scaled)} of its {len(graph.tensors)} tensors have"
            f" scales (the first is {scaled[0]!r})",
            stage=STAGE,
            hint="start from the float32 model",
        )
    if any(operator.name == "DENSIFY" for operator in graph.operators):
        raise StageError(
            f"{where} stores its weights sparse, which only float kernels read",
            stage=STAGE,
            hint="leave sparse = true out of to_tflite: zeros gain nothing in int8",
        )
    for number, other in enumerate(model.subgraphs):
        if number and describe_model(dataclasses.replace(model, subgraphs=(other,))).float_islands:
            callers = ("WHILE", "IF", "CALL_ONCE", "STABLEHLO_COMPOSITE", "STABLEHLO_REDUCE_WINDOW")
            flow = [o.name for o in graph.operators if o.name in callers]
            raise StageError(
                f"{where} computes in subgraph {number} ({other.name!r}), called by"
                f" {', '.join(sorted(set(flow))) or 'control flow'}: such models have no int8 form",
                stage=STAGE,
                hint="export the model with its loops unrolled; a STABLEHLO_REDUCE_WINDOW is one converter's way to "
                "write a pool: convert with route = auto or onnx2tf",
            )
    names = Counter(
        t.name for t in graph.tensors if t.is_float and not t.is_constant and _is_used(t.index, graph)
    )  # fmt: skip
    double = [name for name, count in names.items() if count > 1 or not name]
    if double:
        raise StageError(
            f"{where}: {names[double[0]]} activation tensors are called {double[0]!r}; ranges are"
            " kept by name",
            stage=STAGE,
            hint="convert the model again with distinct names",
        )


def _is_used(tensor: int, graph: Subgraph) -> bool:
    return (
        tensor in graph.inputs
        or tensor in graph.outputs
        or any(tensor in o.inputs or tensor in o.outputs for o in graph.operators)
    )


# --- exact rewriting of the float file -----------------------------------------------------------


def fuse_activations(content: bytes, *, where: str) -> tuple[bytes, tuple[str, ...]]:
    """Move loose RELU, RELU6 and RELU_N1_TO_1 into the operator that computes their input.

    Exact in float32: the producer applies the same clamp to the same values. Needed because the
    quantizer has no integer form of a loose RELU6, which converters leave behind where a transpose
    stands between a convolution and its activation; transposes and reshapes between are looked
    through. RELU_0_TO_1, what is left of a hard sigmoid, is half of that: ``clamp(x, 0, 1) =
    relu(clamp(x, -1, 1))``, the inner clamp in the producer and RELU in its own place. Returns the
    file and, for each fusion, ``"RELU6 'name' into CONV_2D"``.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    found = [(o, chain) for o in graph.operators if (chain := _producers(o, graph))]
    if not found:
        return content, ()
    model = flatbuffer_utils.read_model_from_bytearray(content)
    target = model.subgraphs[0]
    fused = []
    gone = {activation.index for activation, _ in found if activation.name != _HALF}
    for activation, chain in found:
        producer, nearest = chain[-1], chain[0]
        inner = "RELU_N1_TO_1" if activation.name == _HALF else activation.name
        target.operators[producer.index].builtinOptions.fusedActivationFunction = _FUSED[inner]
        if activation.index in gone:
            target.operators[nearest.index].outputs = [activation.outputs[0]]
        else:
            target.operators[activation.index].opcodeIndex = _relu_code(model)
        name = graph.tensors[activation.outputs[0]].name
        fused.append(f"{activation.name} {name!r} into {producer.name}")
    unused = {activation.inputs[0] for activation, _ in found if activation.index in gone}
    target.operators = [o for i, o in enumerate(target.operators) if i not in gone]
    drop_tensors(model, unused)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)), tuple(fused)


def _relu_code(model: Any) -> int:
    """The index of RELU among the model's operator codes, added where it is not there."""
    relu = schema.BuiltinOperator.RELU
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == relu:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = relu
    code.version = 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _producers(activation: Operator, graph: Subgraph) -> list[Operator]:
    """From the operator before a loose activation back to the one that can take it over; or []."""
    if activation.name not in _FUSED and activation.name != _HALF:
        return []
    chain: list[Operator] = []
    tensor = activation.inputs[0]
    while True:
        users = [o for o in graph.operators if tensor in o.inputs]
        makers = [o for o in graph.operators if tensor in o.outputs]
        if len(users) != 1 or len(makers) != 1 or tensor in graph.outputs:
            return []
        maker = makers[0]
        chain.append(maker)
        if maker.name in _CLAMPING:
            is_free = maker.options.get("fused_activation_function") == "NONE"
            return chain if is_free and graph.tensors[maker.outputs[0]].is_float else []
        if maker.name not in _MOVING:
            return []
        tensor = maker.inputs[0]


# --- ranges --------------------------------------------------------------------------------------


def collect_ranges(
    content: bytes,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    where: str,
    total: int = 0,
    so_far: Ranges | None = None,
) -> Ranges:
    """Run the float model on each batch and note the range of every activation, in one pass.

    ``so_far`` is what batches before these gave: the result is that of all of them in one go.

    A batch holds one array for each input, of exactly the file's shape and dtype and in its order.
    Memory: all activations of one inference, and 8 bytes for each tensor and one of `MAX_ROWS`
    batches. Raises StageError naming the tensor where one becomes NaN. Infinities, which padding for
    max pooling brings in, are left out of the range.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    tensors = activations(graph)
    interpreter = open_tflite(content, preserve_all_tensors=True)
    rows = np.empty((MAX_ROWS, 2, len(tensors)), np.float32)
    moving = np.empty((2, len(tensors)))
    seen = 0
    if so_far is not None:
        seen, moving = so_far.batches, so_far.moving
        rows[: len(so_far.minima), 0], rows[: len(so_far.minima), 1] = so_far.minima, so_far.maxima
    shown = time.monotonic()
    for batch in batches:
        _invoke(interpreter, batch, where=where)
        row = np.empty((2, len(tensors)), np.float32)
        for position, tensor in enumerate(tensors):
            row[:, position] = _extremes(interpreter, tensor.index)
        if np.isnan(row).any():
            # in order of execution, the first to go wrong is the cause
            nan = {t.index for t, v in zip(tensors, row[0], strict=True) if np.isnan(v)}
            raise StageError(
                f"{where}: {_first_nan(graph, nan)} is NaN for calibration sample {seen}",
                stage=STAGE,
                hint="remove this sample, or mend the code that makes it"
                if nan & {*graph.inputs}
                else "run the float model on this sample: it divides by zero or overflows",
            )
        kept = rows[seen % MAX_ROWS]
        if seen < MAX_ROWS:
            kept[:] = row
        else:
            kept[0], kept[1] = np.minimum(kept[0], row[0]), np.maximum(kept[1], row[1])
        moving = SMOOTHING * moving + (1 - SMOOTHING) * row if seen else row.astype(np.float64)
        seen += 1
        if time.monotonic() - shown > _PROGRESS_S:
            shown = time.monotonic()
            log.info("calibrating: %d %s", seen, f"of {total} samples" if total else "inferences")
    if not seen:
        raise StageError(f"{where}: there is no calibration sample", stage=STAGE)
    rows = rows[:seen]
    return Ranges(tuple(t.name for t in tensors), rows[:, 0], rows[:, 1], moving, seen)


def activations(graph: Subgraph) -> list[Tensor]:
    """The float tensors that an inference computes or is given, in the file's order."""
    return [
        t for t in graph.tensors
        if t.is_float and not t.is_constant and _is_used(t.index, graph)
    ]  # fmt: skip


def _invoke(interpreter: Interpreter, batch: Sequence[np.ndarray], *, where: str) -> None:
    for detail, array in zip(interpreter.get_input_details(), batch, strict=True):
        interpreter.set_tensor(detail["index"], array)
    invoke_once(interpreter, where=where)


def _extremes(interpreter: Interpreter, index: int) -> tuple[float, float]:
    """(minimum, maximum) of a tensor without copying it; (0, 0) where it is empty."""
    values = interpreter.tensor(index)()
    if values.size == 0:
        return 0.0, 0.0
    low, high = float(values.min()), float(values.max())
    if low < -HUGE or high > HUGE:
        finite = values[np.abs(values) <= HUGE]
        return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return low, high


def _first_nan(graph: Subgraph, bad: set[int]) -> str:
    for index in graph.inputs:
        if index in bad:
            return f"input {graph.tensors[index].name!r}"
    for operator in graph.operators:
        for output in operator.outputs:
            if output in bad:
                return f"{operator.name} output {graph.tensors[output].name!r}"
    return "a tensor that no operator makes"


def check_ranges(ranges: Mapping[str, tuple[float, float]], content: bytes, *, where: str) -> None:
    """Raise StageError unless every activation of the file has a range."""
    graph = parse_model(content, where=where).subgraphs[0]
    missing = [t.name for t in activations(graph) if t.name not in ranges]
    if missing:
        raise StageError(
            f"the given ranges lack {len(missing)} of the {len(activations(graph))} activations of"
            f" {where}, the first is {missing[0]!r}",
            stage=STAGE,
            hint="tensors have other names in each conversion: take the ranges.json of this very float file",
            code="ranges-missing",
        )


# --- quantising ----------------------------------------------------------------------------------


def quantize(
    content: bytes,
    ranges: Mapping[str, tuple[float, float]],
    *,
    input_dtype: IoDtype = "int8",
    output_dtype: IoDtype = "int8",
    precision: Mapping[str, Precision] | None = None,
    states: Sequence[tuple[int, int]] = (),
    where: str = "the model",
) -> bytes:
    """A float32 .tflite -> int8 .tflite, with the given range of every activation tensor.

    A range is widened to hold zero (one of zeros, or nearly, to 1) and becomes ``scale = (max - min) / 255`` and a zero point. uint8
    at a door is the int8 value + 128 (same scale, zero point + 128), through one QUANTIZE operator;
    float32 leaves one QUANTIZE or DEQUANTIZE there. Inputs and outputs that are integers stay.
    Operators without an integer form stay in float between DEQUANTIZE and QUANTIZE: look for them
    with `float_reasons`. ``precision`` says for single operators, by the name of the first tensor
    they make, that they compute with 16-bit activations or in float. ``states`` are (number of an input,
    number of the output that feeds it): both get one scale and zero point, so that an application copies
    bytes. Raises StageError where litert-quantizer fails, or cannot give a state one scale.
    """
    names = _state_names(content, states, where=where)
    ranges = joined_states(content, ranges, states, where=where)
    made = _quantized(content, ranges, input_dtype, output_dtype, precision or {}, where)
    if coarser := _coarser_sums(made, ranges, where=where):
        ranges = joined_states(content, {**ranges, **coarser}, states, where=where)
        made = _quantized(content, ranges, input_dtype, output_dtype, precision or {}, where)
    # what makes a state may have a scale of its own, like TANH's 1 / 128, which its input then takes
    own = _own_ranges(made, states, names, where=where)
    if own:
        made = _quantized(content, {**ranges, **own}, input_dtype, output_dtype, precision or {}, where)  # fmt: skip
    if left := _own_ranges(made, states, names, where=where):
        raise StageError(
            f"{where}: state {next(iter(left))!r} has another scale than the output that feeds it",
            stage=STAGE,
            hint='give states float doors: input_dtype = "float32" and output_dtype = "float32"',
            code="state-scale",
        )
    return made


def joined_states(
    content: bytes,
    ranges: Mapping[str, tuple[float, float]],
    states: Sequence[tuple[int, int]],
    *,
    where: str,
) -> dict[str, tuple[float, float]]:
    """``ranges`` with the union of both for the two tensors of each state (as in `quantize`)."""
    return {**ranges, **_joined(ranges, _state_names(content, states, where=where))}


def _state_names(
    content: bytes, states: Sequence[tuple[int, int]], *, where: str
) -> list[tuple[str, str]]:
    """The tensors of each state: where it goes in and where it comes out."""
    if not states:
        return []
    graph = parse_model(content, where=where).subgraphs[0]
    return [(graph.tensors[graph.inputs[i]].name, graph.tensors[graph.outputs[j]].name) for i, j in states]  # fmt: skip


def _joined(
    ranges: Mapping[str, tuple[float, float]], names: Sequence[tuple[str, str]]
) -> dict[str, tuple[float, float]]:
    """The union of both ranges for the two tensors of each state."""
    found = {}
    for pair in names:
        lows, highs = zip(*(ranges[name] for name in pair if name in ranges), strict=True)
        found.update(dict.fromkeys(pair, (min(lows), max(highs))))
    return found


def _own_ranges(
    made: bytes, states: Sequence[tuple[int, int]], names: Sequence[tuple[str, str]], *, where: str
) -> dict[str, tuple[float, float]]:
    """State input -> the range of the output that feeds it, where they have not one scale.

    Example: an output of scale 1 / 128 and zero point 0 holds -1 to 127 / 128.
    """
    if not states:
        return {}
    graph = parse_model(made, where=where).subgraphs[0]
    found = {}
    for (i, j), (name, _) in zip(states, names, strict=True):
        into, out = graph.tensors[graph.inputs[i]], graph.tensors[graph.outputs[j]]
        if not into.scales and not out.scales:  # float doors
            continue
        if not out.scales or not np.allclose(into.scales, out.scales, rtol=1e-6) or into.zero_points != out.zero_points:  # fmt: skip
            scale, zero = (out.scales or (1.0,))[0], (out.zero_points or (0,))[0]
            least = 0 if out.dtype == "uint8" else -128
            found[name] = (scale * (least - zero), scale * (least + 255 - zero))
    return found


def _quantized(
    content: bytes,
    ranges: Mapping[str, tuple[float, float]],
    input_dtype: IoDtype,
    output_dtype: IoDtype,
    precision: Mapping[str, Precision],
    where: str,
) -> bytes:
    content = _scalar_limits(content, where=where)
    ranges = {**ranges, **fixed_ranges(content, where=where)}
    content, hidden = hide(content, where=where)
    graph = parse_model(content, where=where).subgraphs[0]
    statistics = {}
    for tensor in graph.tensors:
        if tensor.name in ranges and tensor.is_float and not tensor.is_constant:
            shape = (1,) * max(len(tensor.shape), 1)
            low, high = ranges[tensor.name]
            if max(-low, high) < _NOTHING:
                # Any scale holds zeros. The quantizer would take 4e-12, in steps of which (times
                # the weights') the bias of a layer behind it overflows its 32 bits.
                low, high = 0.0, 1.0
            statistics[tensor.name] = {
                "min": np.full(shape, min(low, 0.0), np.float32),
                "max": np.full(shape, max(high, 0.0), np.float32),
            }
    statistics |= _weight_ranges(content, graph, statistics)
    with _quiet():
        try:
            tool = quantizer.Quantizer(content)
            tool.load_quantization_recipe(_recipe(input_dtype, output_dtype, precision))
            result = tool.quantize(
                statistics, enable_progress_bar=False, enable_progress_report=False
            )
        except Exception as exc:  # it raises whatever its parts raise
            raise StageError(
                f"litert-quantizer cannot quantise {where}: {type(exc).__name__}: {exc}",
                stage=STAGE,
                hint="the message names the operator; `edgepipe inspect` lists what the file holds",
            ) from exc
    if result.quantized_model is None:
        raise StageError(f"litert-quantizer made no model of {where}", stage=STAGE)
    made = show(inline_buffers(bytes(result.quantized_model)), hidden, where=where)
    _refuse_absurd_scales(made, where=where)
    made = _read_before_doors(made, where=where)
    return _outputs_at_doors(made, parse_model(content, where=where), output_dtype, where=where)


def _outputs_at_doors(content: bytes, before: Model, output_dtype: IoDtype, *, where: str) -> bytes:
    """The file with outputs of ``output_dtype``, and under the names that the float file had for them.

    Of an output that an operator reads which litert-quantizer 0.11 does not know it gives away the
    float values, and leaves the name with the integers.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    outputs = list(graph.outputs)
    for position, index in enumerate(outputs):
        maker = next((o for o in graph.operators if index in o.outputs), None)
        if maker is None or maker.name != "DEQUANTIZE" or output_dtype == "float32":
            continue
        inside = maker.inputs[0]
        ways = [inside, *(o.outputs[0] for o in graph.operators if o.name == "QUANTIZE" and o.inputs[0] == inside)]  # fmt: skip
        outputs[position] = next((i for i in ways if graph.tensors[i].dtype == output_dtype), index)
    names = {
        name: outputs[before.subgraphs[0].outputs.index(tensor)]
        for s in before.signatures
        if s.subgraph == 0
        for name, tensor in s.outputs.items()
        if tensor in before.subgraphs[0].outputs
    }
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    main = model.subgraphs[0]
    entries = [e for s in model.signatureDefs or () if s.subgraphIndex == 0 for e in s.outputs]
    right = [names.get(e.name.decode(), e.tensorIndex) for e in entries]
    if outputs == list(graph.outputs) and right == [e.tensorIndex for e in entries]:
        return content
    for entry, tensor in zip(entries, right, strict=True):
        entry.tensorIndex = tensor
    needed = {*outputs} | {int(i) for o in main.operators for i in o.inputs}
    main.outputs = outputs
    main.operators = [o for o in main.operators if needed & {*o.outputs} or not len(o.outputs)]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _read_before_doors(content: bytes, *, where: str) -> bytes:
    """Integer operators that read a graph output read it before its door, not after.

    A state that also goes on inside the model is both. litert-quantizer 0.11 lets its readers have what
    DEQUANTIZE (or QUANTIZE to uint8) makes of it for the outside, which their kernels refuse or misread.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    inside = {
        o.outputs[0]: o.inputs[0]
        for o in graph.operators
        if o.name in ("DEQUANTIZE", "QUANTIZE") and o.outputs[0] in graph.outputs and graph.tensors[o.inputs[0]].scales
    }  # fmt: skip
    wrong = [
        (n, k, inside[i])
        for n, o in enumerate(graph.operators)
        if o.name not in ("DEQUANTIZE", "QUANTIZE") and graph.tensors[o.outputs[0]].scales
        for k, i in enumerate(o.inputs)
        if i in inside
    ]  # fmt: skip
    if not wrong:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    for number, position, tensor in wrong:
        model.subgraphs[0].operators[number].inputs[position] = tensor
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _scalar_limits(content: bytes, *, where: str) -> bytes:
    """The value of every PADV2, MAXIMUM, MINIMUM and SELECT_V2 with shape () instead of (1,), which
    litert-quantizer 0.11 cannot take; where other operators read it too, a copy.

    onnx2tf writes (1,) for the -inf before a MAX_POOL_2D with padding: the stem of every ResNet.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    limited = {"PADV2": (2,), "MAXIMUM": (0, 1), "MINIMUM": (0, 1), "SELECT_V2": (1, 2)}
    uses = [(o, place) for o in graph.operators for place in limited.get(o.name, ())]
    uses = [(o, p) for o, p in uses if graph.tensors[o.inputs[p]].is_constant and graph.tensors[o.inputs[p]].shape == (1,)]  # fmt: skip
    if not uses:
        return content
    others = {i for o in graph.operators if o.name not in limited for i in o.inputs}
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    main = model.subgraphs[0]
    scalars: dict[int, int] = {}
    for operator, place in uses:
        index = operator.inputs[place]
        if index not in scalars:
            scalars[index] = index
            if index in others:
                tensor = copy.deepcopy(main.tensors[index])
                model.buffers.append(copy.deepcopy(model.buffers[tensor.buffer]))
                tensor.name, tensor.buffer = tensor.name + b"/scalar", len(model.buffers) - 1
                main.tensors.append(tensor)
                scalars[index] = len(main.tensors) - 1
            main.tensors[scalars[index]].shape = np.array([], np.int32)
        main.operators[operator.index].inputs[place] = scalars[index]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _refuse_absurd_scales(content: bytes, *, where: str) -> None:
    """LiteRT ends the process (SIGABRT) on a file with a scale of 1e36, as a mask of -inf gets."""
    for graph in parse_model(content, where=where).subgraphs:
        for tensor in graph.tensors:
            if tensor.scales and not max(tensor.scales) < _MAX_SCALE:
                users = [o.name for o in graph.operators if tensor.index in o.inputs]
                what = "constant" if tensor.is_constant else "tensor"
                raise StageError(
                    f"{where}: the {what} {tensor.name!r} (read by {', '.join(users) or 'nothing'}) holds values up to "
                    f"{127 * max(tensor.scales):.2g}, which int8 cannot hold beside any other",
                    stage=STAGE,
                    hint="a mask of -inf or -1e38: write -100 instead, which a softmax takes for the same",
                    code="infinite-range",
                )  # fmt: skip


def _coarser_sums(
    content: bytes, ranges: Mapping[str, tuple[float, float]], *, where: str
) -> dict[str, tuple[float, float]]:
    """Wider ranges for sums so fine beside what they are of that LiteRT ends the process (SIGABRT).

    Its kernels of ADD and SUB want ``2 * (larger input scale) / 2**20`` (2**15 of 16 bits) to be less
    than the scale of the result, that of SQUARED_DIFFERENCE ``(2 * scale)**2 / 2**14`` (kernels/add.cc,
    sub.cc, squared_difference.cc: left_shift). The rounding that is added is a thousandth of what comes in.
    Example: inputs in steps of 107,000 need steps of 0.2 where the result from -2 to 18 would have 0.08.
    """
    found: dict[str, tuple[float, float]] = {}
    for graph in parse_model(content, where=where).subgraphs:
        for o in graph.operators:
            result = graph.tensors[o.outputs[0]] if o.outputs else None
            if o.name not in ("ADD", "SUB", "SQUARED_DIFFERENCE") or result is None or not result.scales:  # fmt: skip
                continue
            twice = 2 * max(max(graph.tensors[i].scales, default=0.0) for i in o.inputs)
            least = twice**2 / 2**14 if o.name == "SQUARED_DIFFERENCE" else twice / 2 ** (15 if result.dtype == "int16" else 20)  # fmt: skip
            if result.name in ranges and least >= result.scales[0]:
                low, high = ranges[result.name]
                factor = 1.01 * least / result.scales[0]
                high = max(high, 0.0) or (1.0 if low >= 0 else 0.0)  # as `_quantized`
                found[result.name] = (factor * min(low, 0.0), factor * high)
                log.info("%s %r: its range is widened %.3g times, since its inputs are that much wider", o.name, result.name, factor)  # fmt: skip
    return found


def _weight_ranges(
    content: bytes, graph: Subgraph, activations: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Ranges for the weights whose own would let a bias overflow, by tensor name.

    A bias is stored in int32 steps of (input scale * weight scale). A channel whose weights are
    almost zero, as batch normalisation leaves behind, would have a scale so small that its bias
    saturates and is lost. Its scale is made large enough instead: its weights become zeros.
    Example: input scale 0.02, bias 0.25, weights up to 1e-9: scale 1e-9 / 127 would need a bias of
    1.6e12; 0.25 / (0.02 * 2**30) = 1.2e-8 keeps it at 2**30.
    """
    buffers = schema.Model.GetRootAs(content, 0)
    found: dict[str, dict[str, np.ndarray]] = {}
    for operator in graph.operators:
        if operator.name not in BIASED or len(operator.inputs) <= BIASED[operator.name][1]:
            continue
        source, bias_at, axis = BIASED[operator.name]
        x, w, b = (graph.tensors[operator.inputs[i]] for i in (source, 1, bias_at))
        constants = operator.inputs[bias_at] >= 0 and w.is_constant and b.is_constant
        if not constants or x.name not in activations or {w.dtype, b.dtype} != {"float32"}:
            continue
        weights, bias = (
            np.frombuffer(buffers.Buffers(t.buffer).DataAsNumpy(), np.float32).reshape(t.shape)
            for t in (w, b)
        )
        others = tuple(i for i in range(len(w.shape)) if i != axis)
        largest = np.abs(weights).max(axis=others, keepdims=True)
        if w.name in found:  # several layers share them
            largest = found[w.name]["max"]
        range_of = activations[x.name]
        scale = float((range_of["max"] - range_of["min"]).max()) / 255
        # half of int32's range: the rest is for the sum of products that the bias is added to
        least = 127 * np.abs(bias).reshape(largest.shape) / (scale * 2**30)
        if (least > largest).any():
            largest = np.maximum(largest, least).astype(np.float32)
            found[w.name] = {"min": -largest, "max": largest}
    return found


def _one_scale(rule: Mapping[str, Any]) -> dict[str, Any]:
    """The rule for BATCH_MATMUL, whose integer kernels read one scale for a tensor: of a constant with a
    scale for each channel they make zeros (LiteRT 2.3.0, kernels/batch_matmul.cc uses params.scale)."""
    weights = {**rule["op_config"]["weight_tensor_config"], "granularity": qtyping.QuantGranularity.TENSORWISE}  # fmt: skip
    config = {**rule["op_config"], "weight_tensor_config": weights}
    return {**rule, "operation": qtyping.TFLOperationName.BATCH_MATMUL, "op_config": config}


def _recipe(
    input_dtype: IoDtype, output_dtype: IoDtype, precision: Mapping[str, Precision]
) -> list[dict[str, Any]]:
    """litert-quantizer's own int8 recipe with our rule for BATCH_MATMUL, then the layers that are not
    int8, then one rule for each door. Of two scopes that fit, the later counts."""
    rules: list[dict[str, Any]] = quantizer_recipe.static_wi8_ai8()
    base = rules[0]["op_config"]
    rules.append(_one_scale(rules[0]))
    wide = quantizer_recipe.static_wi8_ai16()[0]
    for name, kind in precision.items():
        # an operator's scope is "NAME;" of all that it makes (utils/tfl_flatbuffer_utils.py)
        scope = {"regex": f"^{re.escape(name)};", "operation": rules[0]["operation"]}
        if kind == "int16":
            rules += [{**wide, **scope}, _one_scale({**wide, **scope})]
        else:
            rules.append({**scope, "algorithm_key": "no_quantize", "op_config": base})
    for door, dtype in (("INPUT", input_dtype), ("OUTPUT", output_dtype)):
        # a scope of its own, which comes after those of single operators
        rule: dict[str, Any] = {"regex": ".+", "operation": qtyping.TFLOperationName(door)}
        if dtype == "float32":
            rules.append({**rule, "algorithm_key": "no_quantize", "op_config": base})
        else:
            activation = {**base["activation_tensor_config"], "dtype": "UINT" if dtype == "uint8" else "INT"}  # fmt: skip
            config = {**base, "activation_tensor_config": activation}
            rules.append({**rule, "algorithm_key": "min_max_uniform_quantize", "op_config": config})
    return rules


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """litert-quantizer draws a progress bar on stderr and warns about how it keeps tensors."""
    with warnings.catch_warnings(), native_messages_logged():
        warnings.simplefilter("ignore")
        yield


def integer_operators() -> frozenset[str]:
    """Names of the operators with an int8 form: litert-quantizer's and those of `STAND_INS`."""
    return _operators_of("static_wi8_ai8") | STAND_INS.keys()


def wide_operators() -> frozenset[str]:
    """Names of the operators it has a form with 16-bit activations for."""
    return _operators_of("static_wi8_ai16")


def _operators_of(config: str) -> frozenset[str]:
    names = json.loads(default_policy.DEFAULT_JSON_POLICY)["ops_per_config"][config]
    return frozenset({"TRANSPOSE_CONV" if n == "CONV_2D_TRANSPOSE" else n for n in names})


_ADVICE = {
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "export the LSTM unrolled",
}


def float_reasons(islands: Sequence[FloatIsland]) -> list[dict[str, Any]]:
    """For each island: its operators, the tensor it makes, why it is float and what to do."""
    known = integer_operators()
    records = []
    for island in islands:
        missing = sorted({n for n in island.computing if n not in known})
        if missing:
            reason = f"no int8 form of {', '.join(missing)} in litert-quantizer"
        elif island.computing:
            reason = "its shape, options or neighbours rule out the int8 form"
        else:
            reason = "a detour through float between two integer tensors"
        advice = [f"{n}: {_ADVICE[n]}" for n in missing if n in _ADVICE]
        records.append(
            {
                "operators": list(island.names),
                "computing": list(island.computing),
                "tensor": island.output,
                "reason": reason,
                "advice": "; ".join(advice),
            }
        )
    return records


def check_full_integer(
    content: bytes, *, allow_float: Sequence[str] = (), where: str = "the model"
) -> list[dict[str, Any]]:
    """The islands that may stay, as `float_reasons` gives them, with their shares of the model:
    ``macs_share`` of its multiply-accumulates and ``elements_share`` of the values it computes.

    Raises StageError listing every island that holds an operator not named in ``allow_float``.
    """
    model = parse_model(content, where=where)
    islands = describe_model(model).float_islands
    records = [
        {**record, **_shares(model, island)}
        for record, island in zip(float_reasons(islands), islands, strict=True)
    ]
    refused = [
        record
        for record in records
        if not record["computing"] or set(record["computing"]) - set(allow_float)
    ]
    if refused:
        listed = "; ".join(
            f"{' - '.join(r['operators'])} (makes {r['tensor']!r}, {100 * r['macs_share']:.0f} % of the MACs,"
            f" {100 * r['elements_share']:.0f} % of the values): {r['reason']}"
            for r in refused
        )
        advice = "; ".join(dict.fromkeys(r["advice"] for r in refused if r["advice"]))
        names = sorted({n for r in refused for n in r["computing"]})
        allow = f"or let them stay: allow_float = {json.dumps(names)}" if names else ""
        raise StageError(
            f"{where} is not full-integer: {len(refused)} float island(s): {listed}",
            stage=STAGE,
            hint="; ".join(part for part in (advice, allow) if part),
            code="float-islands",
        )
    return records


def _shares(model: Model, island: FloatIsland) -> dict[str, float]:
    """Of the operators that compute, what share of MACs and of output elements is the island's."""
    totals, own = [0, 0], [0, 0]
    for number, graph in enumerate(model.subgraphs):
        for operator in graph.operators:
            if operator.name in CONVERSIONS:
                continue
            elements = sum(math.prod(graph.tensors[i].shape) for i in operator.outputs if i >= 0)
            inside = number == island.subgraph and operator.index in island.operators
            for place, cost in enumerate((operator_macs(operator, graph), elements)):
                totals[place] += cost
                own[place] += cost if inside else 0
    shares = [round(part / whole, 4) if whole else 0.0 for part, whole in zip(own, totals, strict=True)]  # fmt: skip
    return {"macs_share": shares[0], "elements_share": shares[1]}


# --- where int8 departs from float ---------------------------------------------------------------


def values_of_both(
    float_content: bytes,
    integer_content: bytes,
    tensors: Sequence[Tensor],
    batches: Iterable[Sequence[np.ndarray]],
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """For each batch the real values (float64) of these tensors of the second file in both files.

    ``batches`` hold real inputs of the float file. Where that holds an infinity, as padding for max
    pooling brings in, which no integer is meant to be, both are 0.
    """
    reference = open_tflite(float_content, preserve_all_tensors=True)
    candidate = open_tflite(integer_content, preserve_all_tensors=True)
    index = {d["name"]: d["index"] for d in reference.get_tensor_details()}
    for batch in batches:
        _invoke(reference, batch, where="the float model")
        details = candidate.get_input_details()
        stored_batch = [stored(a, d) for a, d in zip(batch, details, strict=True)]
        _invoke(candidate, stored_batch, where="the int8 model")
        expected, found = [], []
        for tensor in tensors:
            ours = reference.get_tensor(index[tensor.name]).astype(np.float64)
            theirs = candidate.get_tensor(tensor.index).astype(np.float64)
            if tensor.scales:
                theirs = (theirs - tensor.zero_points[0]) * tensor.scales[0]
            infinite = np.abs(ours) > HUGE
            if infinite.any() and ours.shape == theirs.shape:
                ours[infinite] = theirs[infinite] = 0
            expected.append(ours)
            found.append(theirs)
        yield expected, found


def departures(
    float_content: bytes, integer_content: bytes, batches: Iterable[Sequence[np.ndarray]]
) -> list[tuple[str, str, float]]:
    """(tensor, operator, SQNR in dB) of the tensors both files name, in order of execution.

    ``batches`` hold real inputs of the float file. Finds where quantisation first goes wrong: a
    tensor far below those before it.
    """
    graph = parse_model(integer_content, where="the int8 model").subgraphs[0]
    float_names = {t.name for t in parse_model(float_content, where="the float model").subgraphs[0].tensors}  # fmt: skip
    made = [(o.name, graph.tensors[i]) for o in graph.operators for i in o.outputs if i >= 0]
    made = [(o, t) for o, t in made if t.name in float_names and not t.is_constant]
    signal, noise = np.zeros(len(made)), np.zeros(len(made))
    tensors = [t for _, t in made]
    for values in values_of_both(float_content, integer_content, tensors, batches):
        for position, (expected, got) in enumerate(zip(*values, strict=True)):
            if got.shape == expected.shape:
                signal[position] += float((expected**2).sum())
                noise[position] += float(((got - expected) ** 2).sum())
    return [
        (tensor.name, operator, sqnr_db(float(s), float(n)))
        for (operator, tensor), s, n in zip(made, signal, noise, strict=True)
    ]


def added_noise(graph: Subgraph, ratio: Mapping[str, float]) -> dict[str, float]:
    """Noise-to-signal ratio of each tensor less the largest of its inputs', by tensor name.

    Tensors without a ``ratio``, which only one of two files names, hand on what they were given.
    """
    carried: dict[int, float] = {}
    added: dict[str, float] = {}
    for operator in graph.operators:
        inherited = max((carried.get(i, 0.0) for i in operator.inputs), default=0.0)
        for index in operator.outputs:
            name = graph.tensors[index].name if index >= 0 else ""
            carried[index] = ratio.get(name, inherited)
            added[name] = carried[index] - inherited
    return added


def noisiest_layers(
    float_content: bytes,
    integer_content: bytes,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    count: int,
) -> list[dict[str, Any]]:
    """The ``count`` layers that add most noise: ``layer``, ``operator``, ``sqnr_db``, worst first.

    ``sqnr_db`` of a tensor includes what its inputs brought along, so it falls along the graph and
    the last layer would always be blamed. Ranked is what each layer adds: its noise-to-signal ratio
    less the largest of its inputs'. Example: 30 dB in, 20 dB out adds 0.01 - 0.001 = 0.009; a later
    layer that goes from 20 to 19 dB adds 0.0026. ``batches`` as for `departures`.
    """
    graph = parse_model(integer_content, where="the int8 model").subgraphs[0]
    rows = departures(float_content, integer_content, batches)
    added = added_noise(graph, {tensor: 10 ** (-db / 10) for tensor, _, db in rows})
    ranked = sorted(rows, key=lambda row: -added[row[0]])
    return [
        {"layer": tensor, "operator": operator, "sqnr_db": round(db, 2)}
        for tensor, operator, db in ranked[:count]
    ]
