"""Reading an ``.onnx`` file: checking that it is one, and its tensor specs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from edgepipe.artifact import TensorSpec
from edgepipe.errors import ArtifactError
from edgepipe.host_memory import check_fits

# onnxruntime's wheels send usage events to its maker unless told not to; a user's models are theirs.
onnxruntime.disable_telemetry_events()

# A TFLite flatbuffer, and a protobuf message, cannot be larger: 32-bit signed offsets.
MAX_BYTES = 2**31 - 1


def read_onnx(path: Path) -> onnx.ModelProto:
    """The whole model, external data included. Raises ArtifactError where ``path`` holds none.

    A truncated file, one whose external data is missing, and one that breaks the ONNX
    specification (``onnx.checker``) are refused with the reason.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node or not model.opset_import:
            raise ArtifactError(
                f"{path} is no ONNX model: it holds no graph",
                hint="export it again, or copy it again whole",
            )
        _check_opset(model, path)
        check_fits([path, *(path.parent / name for name in external_files(model))])
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(str(path))
    except ArtifactError:
        raise
    except DecodeError as exc:
        raise ArtifactError(
            f"{path} is no ONNX model, or not a whole one: {exc}",
            hint="export it again, or copy it again whole",
        ) from exc
    except (OSError, ValueError, onnx.checker.ValidationError) as exc:
        reason = str(exc).strip().splitlines()[0][:300]
        external = external_files(model)
        if any(not (path.parent / name).is_file() for name in external):
            raise ArtifactError(
                f"{path} keeps its weights in {', '.join(external)}, which is not beside it",
                hint=f"copy {', '.join(external)} into {path.parent}",
                code="no-external-data",
            ) from exc
        raise ArtifactError(
            f"{path} is not a valid ONNX model: {reason}", hint="export it again with torch.onnx.export(dynamo=True)"
        ) from exc  # fmt: skip
    return model


def _check_opset(model: onnx.ModelProto, path: Path) -> None:
    known = onnx.defs.onnx_opset_version()
    newest = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if newest > known or model.ir_version > onnx.IR_VERSION:
        raise ArtifactError(
            f"{path} is of ONNX opset {newest} (file format {model.ir_version}); this host's onnx"
            f" {onnx.__version__} knows up to {known} ({onnx.IR_VERSION})",
            hint="export it with opset 18, or upgrade onnx and onnxruntime",
            code="opset-too-new",
        )


def external_files(model: onnx.ModelProto) -> list[str]:
    """Names of the files, beside the model, that hold its weights."""
    return sorted(
        {
            entry.value
            for tensor in model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def half_precision(model: onnx.ModelProto) -> str:
    """What to do about a model with weights or casts of float16 or bfloat16 that is off by their rounding; ""
    for any other model."""
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    weights = any(tensor.data_type in halves for tensor in model.graph.initializer)
    casts = any(
        a.name == "to" and a.i in halves for node in model.graph.node for a in node.attribute
    )
    if not weights and not casts:
        return ""
    return "the model computes in float16 or bfloat16: call .float() on it where it is built; smaller weights are chosen after conversion (edgepipe quantize)"


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file. Raises ArtifactError where that would be larger than 2 GiB."""
    if model.ByteSize() > MAX_BYTES:
        raise ArtifactError(
            f"the model is larger than 2 GiB ({model.ByteSize()} bytes), more than ONNX or TFLite hold in one file",
            hint="this pipeline is for models that fit on small devices",
        )
    onnx.save(model, path)


def onnx_specs(
    path: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    layouts: Mapping[str, str] | None = None,
    where: Path | None = None,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of the inputs and outputs, found by running the model once on zeros, or on ones where it
    divides by them.

    A free batch dimension (axis 0) is 1 in the spec. Other free dimensions need a shape in
    ``shapes``; ``layouts`` names axes where PyTorch's usual ones (NCHW, ...) are wrong. ``where`` is the
    file that the user knows. Raises ArtifactError where the model does not run.
    """
    where = where or path
    shapes, layouts = shapes or {}, layouts or {}
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # the failure is ours to report
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as exc:
        raise ArtifactError(
            f"onnxruntime cannot load {where}: {str(exc).replace(str(path), where.name).splitlines()[0][:300]}",
            hint="export the model with standard ONNX operators, opset 18",
        ) from exc
    _known(where, [v.name for v in session.get_inputs()], {*shapes})
    _known(where, [v.name for v in (*session.get_inputs(), *session.get_outputs())], {*layouts})
    inputs, feeds = [], {}
    for value in session.get_inputs():
        shape = shapes.get(value.name) or _fixed_shape(where, value.name, value.shape)
        dtype = _dtype(where, value.name, value.type)
        if 0 in shape:
            raise ArtifactError(
                f"input {value.name!r} of {where} has no elements: its shape is {list(shape)}",
                hint="declare its real shape under [[model.inputs]]",
                code="empty-input",
            )
        inputs.append(TensorSpec(value.name, shape, dtype, layouts.get(value.name, "")))
        feeds[value.name] = np.zeros(shape, dtype)
    try:
        try:
            results = session.run(None, feeds)
        except Exception as exc:
            if "by zero" not in str(exc):
                raise
            results = session.run(None, {name: np.ones_like(zeros) for name, zeros in feeds.items()})  # fmt: skip
    except Exception as exc:
        raise ArtifactError(
            f"{where} does not run in onnxruntime on inputs of shape "
            f"{', '.join(str(spec.shape) for spec in inputs)}: {str(exc).splitlines()[0][:300]}",
            hint="declare the right shapes under [[model.inputs]]",
        ) from exc
    for value, result in zip(session.get_outputs(), results, strict=True):
        if not isinstance(result, np.ndarray) or result.dtype.kind not in "biuf":
            raise ArtifactError(
                f"output {value.name!r} of {where} is a {value.type}, not a tensor of numbers",
                hint="export it without that output, or with tensors only (skl2onnx: zipmap = False)",
            )
    outputs = tuple(
        TensorSpec(value.name, result.shape, str(result.dtype), layouts.get(value.name, ""))
        for value, result in zip(session.get_outputs(), results, strict=True)
    )
    return tuple(inputs), outputs


def _known(path: Path, names: list[str], declared: set[str]) -> None:
    unknown = sorted(declared - set(names))
    if unknown:
        raise ArtifactError(
            f"{path} has no input or output {', '.join(unknown)}",
            hint=f"it has: {', '.join(names)}",
        )


def _fixed_shape(path: Path, name: str, shape: list[int | str | None]) -> tuple[int, ...]:
    sizes = [1 if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(shape)]  # fmt: skip
    fixed = tuple(size for size in sizes if isinstance(size, int))
    if len(fixed) != len(sizes):
        raise ArtifactError(
            f"input {name!r} of {path} has free dimensions: {shape}",
            hint=f'declare its shape: [[model.inputs]] name = "{name}", shape = [...]',
            code="free-dimensions",
        )
    return fixed


def _dtype(path: Path, name: str, ort_type: str) -> str:
    """``tensor(float)`` -> ``float32``."""
    kind = ort_type.removeprefix("tensor(").removesuffix(")")
    known = {"float": "float32", "double": "float64"}
    dtype = known.get(kind, kind)
    try:
        return str(np.dtype(dtype))
    except TypeError as exc:
        raise ArtifactError(f"input {name!r} of {path} is a {ort_type}, not a tensor of numbers") from exc  # fmt: skip


def keep_pooled_axes(model: onnx.ModelProto) -> int:
    """Write means over height and width the way converters to NHWC follow; returns how many.

    ``ReduceMean(x, axes [2, 3], keepdims 0)`` of a 4-D x becomes keepdims 1 and Flatten, the same
    values. onnx2tf 2.6.9 turns the first form of MobileNetV2's ``x.mean([2, 3])`` into a Transpose
    and a loose RELU6 (72 operators, one of them float after quantization), the second into neither
    (71 operators).
    """
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    nodes, changed = [], 0
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4:
            continue
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        axes = options.get("axes")  # an attribute up to opset 17, an input from 18
        if axes is None and len(node.input) > 1:
            axes = constants.get(node.input[1])
        if axes is None or options.get("keepdims", 1) or {int(a) % 4 for a in axes} != {2, 3}:
            continue
        result, pooled = node.output[0], f"{node.output[0]}_pooled"
        # (N, C, H, W) -> (N, C, 1, 1) -> (N, C)
        next(a for a in node.attribute if a.name == "keepdims").i = 1
        node.output[0] = pooled
        flatten = onnx.helper.make_node("Flatten", [pooled], [result], f"{node.name}_flatten", axis=1)  # fmt: skip
        flatten.metadata_props.extend(node.metadata_props)
        nodes.append(flatten)
        changed += 1
    if changed:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return changed
