"""Float TFLite bytes to the precisions beside full int8: fewer bits for weights, or 16 for activations.

The rewriting is litert-quantizer's. It leaves every operator at version 1, so that a runtime without
the kernel would run the file and compute nonsense; here each gets the version that its kernel came
with (op_version.cc and runtime_version.cc of LiteRT), and an old runtime refuses it by name.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ai_edge_litert.tools import flatbuffer_utils
from litert_quantizer import qtyping, quantizer
from litert_quantizer import recipe as quantizer_recipe

from edgepipe.errors import StageError
from edgepipe.tflite_ops.flatbuffer import (
    CONVERSIONS,
    Operator,
    Subgraph,
    inline_buffers,
    parse_model,
)
from edgepipe.tflite_ops.quantize import (
    fuse_activations,
    quantize,
    wide_operators,
)
from edgepipe.tflite_ops.rewrite import SPELT_OUT, spell_out
from edgepipe.tflite_ops.run import native_messages_logged
from edgepipe.tflite_ops.sensitivity import layers_of
from edgepipe.tflite_ops.stand_in import STAND_INS

Name = Literal["dynamic_int8", "weight_int8", "weight_int4", "float16", "int16x8"]
NAMES: tuple[Name, ...] = get_args(Name)
# Weights that share one scale in an int4 dense layer: litert-quantizer's smallest, the most accurate.
BLOCK = 32
# Operators with a form of int4 weights (litert_quantizer/default_policy.py, weightonly_wi4_afp32)
_INT4 = ("CONV_2D", "BATCH_MATMUL", "EMBEDDING_LOOKUP", "FULLY_CONNECTED")


@dataclasses.dataclass(frozen=True)
class RuntimeNeed:
    """``operator`` came in ``version`` with TensorFlow Lite ``tflite``; older runtimes refuse the file."""

    operator: str
    version: int
    tflite: str
    why: str


def make_precision(
    content: bytes,
    name: Name,
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    where: str,
) -> bytes:
    """A float32 .tflite in another precision, its inputs and outputs still float32.

    ``dynamic_int8``: int8 weights, a scale for each output channel; activations are made int8 while it
    runs. ``weight_int8``: the same weights, turned back into floats. ``weight_int4``: 4 bits where
    there is such a form, in blocks of `BLOCK` for dense layers whose inputs are a multiple of it, else
    8. ``float16``: weights of 16 bits. ``int16x8``: integer arithmetic with 16-bit activations by
    ``ranges`` and int8 weights; operators without such a form stay in float. Raises StageError where
    litert-quantizer fails or changes nothing.
    """
    if name == "int16x8":
        layers = layers_of(parse_model(content, where=where).subgraphs[0])
        wide = wide_operators()
        made = quantize(
            content, ranges or {}, input_dtype="float32", output_dtype="float32", where=where,
            precision={n: "int16" if o in wide and o not in STAND_INS else "float" for n, o in layers.items()},
        )  # fmt: skip
    else:
        made = _fewer_bits(content, name, where=where)
    return _with_versions(made, where=where)


def prepared(content: bytes, name: Name, *, where: str) -> bytes:
    """The float file as `make_precision` takes it: for ``int16x8`` loose activations are fused and
    what has no kernel of 16 bits is spelt out."""
    if name != "int16x8":
        return content
    fused, _ = fuse_activations(content, where=where)
    layers = [n for n, o in layers_of(parse_model(fused, where=where).subgraphs[0]).items() if o in SPELT_OUT]  # fmt: skip
    return spell_out(fused, layers, {}, where=where)[0]  # calibrated afterwards


def _fewer_bits(content: bytes, name: Name, *, where: str) -> bytes:
    graph = parse_model(content, where=where).subgraphs[0]
    try:
        with warnings.catch_warnings(), native_messages_logged():
            warnings.simplefilter("ignore")
            tool = quantizer.Quantizer(content)
            tool.load_quantization_recipe(_recipe(name, graph))
            result = tool.quantize({}, enable_progress_bar=False, enable_progress_report=False)
    except Exception as exc:  # it raises whatever its parts raise
        raise StageError(
            f"litert-quantizer cannot make {name} of {where}: {type(exc).__name__}: {exc}",
            stage="quantize",
            hint="the message names the operator; `edgepipe inspect` lists what the file holds",
        ) from exc
    made = bytes(result.quantized_model or b"")
    if not made or len(made) >= len(content):
        raise StageError(
            f"{name} makes {where} no smaller ({len(content)} -> {len(made)} bytes): it has no weights to speak of",
            stage="quantize",
            hint="leave it in float, or quantise activations as well (quantize_int8)",
            code="nothing-gained",
        )
    return inline_buffers(made)


def _recipe(name: Name, graph: Subgraph) -> list[dict[str, Any]]:
    """litert-quantizer's rules; of two that fit an operator the later counts."""
    rules: list[dict[str, Any]]
    if name == "dynamic_int8":
        rules = quantizer_recipe.dynamic_wi8_afp32()
        return rules
    if name == "float16":
        half = {
            "num_bits": 16,
            "symmetric": True,
            "granularity": "TENSORWISE",
            "dtype": "FLOAT",
            "block_size": 0,
        }
        config = {
            "weight_tensor_config": half,
            "compute_precision": "FLOAT",
            "explicit_dequantize": True,
            "skip_checks": False,
            "min_weight_elements": 0,
        }
        return [
            {"regex": ".*", "operation": "*", "algorithm_key": "float_casting", "op_config": config}
        ]
    rules = quantizer_recipe.weight_only_wi8_afp32()
    if name == "weight_int4":
        four = quantizer_recipe.weight_only_wi4_afp32()[0]
        rules += [{**four, "operation": qtyping.TFLOperationName(operator)} for operator in _INT4]
        blocks = quantizer_recipe.dynamic_wi4b32_afp32(
            operation_name=qtyping.TFLOperationName.FULLY_CONNECTED
        )[0]
        for operator in graph.operators:
            if operator.name == "FULLY_CONNECTED" and _fits_blocks(operator, graph):
                made = graph.tensors[operator.outputs[0]].name
                rules.append({**blocks, "regex": f"^{re.escape(made)};"})
    return rules


def _fits_blocks(operator: Operator, graph: Subgraph) -> bool:
    weights = graph.tensors[operator.inputs[1]]
    return weights.is_constant and len(weights.shape) == 2 and weights.shape[1] % BLOCK == 0


# --- what runtime it takes -----------------------------------------------------------------------


def runtime_needs(content: bytes, *, where: str) -> list[RuntimeNeed]:
    """What a file asks of a runtime beyond version 1 of its operators, the newest first."""
    graph = parse_model(content, where=where).subgraphs[0]
    found = {need for operator in graph.operators if (need := _need(operator, graph))}
    return sorted(found, key=lambda n: [-int(part) for part in n.tflite.split(".")])


def _need(operator: Operator, graph: Subgraph) -> RuntimeNeed | None:
    """By op_version.cc; versions of TensorFlow Lite by runtime_version.cc."""

    def dtype(side: tuple[int, ...], position: int) -> str:
        index = side[position] if position < len(side) else -1
        return graph.tensors[index].dtype if index >= 0 else ""

    name, data, made = operator.name, dtype(operator.inputs, 0), dtype(operator.outputs, 0)
    weights = dtype(operator.inputs, 1)
    if name == "DEQUANTIZE":
        if data == "int4":
            return RuntimeNeed(name, 6, "2.18.0", "int4 weights")
        if data == "int8" and len(graph.tensors[operator.inputs[0]].scales) > 1:
            return RuntimeNeed(name, 5, "2.7.0", "a scale for each channel")
        return RuntimeNeed(name, 3, "1.15.0", "float16 weights") if data == "float16" else None
    if made == "float32" and data == "float32" and weights == "int8":
        hybrid = {
            "FULLY_CONNECTED": (12, "2.17.0"),
            "CONV_2D": (5, "2.4.0"),
            "DEPTHWISE_CONV_2D": (6, "2.3.0"),
        }
        why = "float activations with int8 weights, a scale for each channel"
        return RuntimeNeed(name, *hybrid[name], why) if name in hybrid else None
    if made == "float32" and weights == "int4" and name == "FULLY_CONNECTED":
        # op_version.cc has no rule for it: at least what int4 constants take
        return RuntimeNeed(name, 12, "2.18.0", "int4 weights with a scale for each block")
    return None


def _with_versions(content: bytes, *, where: str) -> bytes:
    """The file with the version that each operator needs among its operator codes."""
    needs = runtime_needs(content, where=where)
    if not needs:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = parse_model(content, where=where).subgraphs[0]
    for table, operator in zip(model.subgraphs[0].operators, graph.operators, strict=True):
        need = _need(operator, graph)
        if need is not None:
            # one code serves all operators of a name: runtimes read the highest version they know
            code = model.operatorCodes[table.opcodeIndex]
            code.version = max(code.version, need.version)
    return inline_buffers(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))


# --- what did not get smaller ----------------------------------------------------------------------


def float_weights(content: bytes, *, where: str) -> list[dict[str, Any]]:
    """Weights still in float32: ``operator``, ``tensor`` and ``bytes``, the largest first.

    Those of matrix products and convolutions, and what lookups and multiplications read; no biases.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    found = {}
    for operator in graph.operators:
        for index in operator.inputs:
            tensor = graph.tensors[index] if index >= 0 else None
            if (
                tensor
                and tensor.is_constant
                and tensor.dtype == "float32"
                and len(tensor.shape) > 1
            ):
                found[index] = {
                    "operator": operator.name,
                    "tensor": tensor.name,
                    "bytes": tensor.size_bytes,
                }
    return sorted(found.values(), key=lambda row: -int(row["bytes"]))


def float_operators(content: bytes, *, where: str) -> list[str]:
    """Names of the operators that compute in floating point, each as often as it does."""
    graph = parse_model(content, where=where).subgraphs[0]
    return [
        o.name
        for o in graph.operators
        if o.name not in CONVERSIONS
        and any(i >= 0 and graph.tensors[i].is_float for i in o.outputs)
    ]
