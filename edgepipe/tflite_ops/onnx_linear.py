"""Operators that are linear maps known beforehand, as constant matrices: Resize, DFT, STFT.

The matrices are read off onnxruntime and numpy, which are given the unit vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from edgepipe.tflite_ops.onnx_graph import Graph, Writing, attributes
from edgepipe.tflite_ops.run import open_onnx

# What TFLite's RESIZE_BILINEAR computes, where the scale is that of the sizes
_BILINEAR = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")


def resize(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A Resize in a form that TFLite has not: a Gather for each axis of nearest, a matrix for each of others.

    TFLite's bilinear takes its scale from the sizes and knows no anti-aliasing, no region of interest
    and no symmetric coordinates. Its nearest rounds as ``asymmetric`` with ``floor`` does; one that
    picks the same values (by 2, as a rule) becomes that.
    """
    options: dict[str, Any] = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes(node).items()}  # fmt: skip
    size, made = graph.shapes.get(node.input[0], ()), graph.shapes.get(node.output[0], ())
    scales, sizes = graph.given(node, 2), graph.given(node, 3)
    scales = None if scales is not None and not scales.size else scales
    if not size or len(made) != len(size) or (scales is None and sizes is None):
        return []
    axes: list[int] = [axis % len(size) for axis in options.get("axes", range(len(size)))]
    along = dict(zip(axes, [0.0] * len(axes) if scales is None else scales, strict=True))
    roi = graph.given(node, 1)
    roi = roi if roi is not None and roi.size == 2 * len(axes) else np.repeat([0.0, 1.0], len(axes))
    mode = options.get("coordinate_transformation_mode", "half_pixel")
    changed = [a for a in axes if size[a] != made[a] or mode == "tf_crop_and_resize" or along[a] not in (0, 1)]  # fmt: skip
    if not changed or size == made:
        return []  # onnxruntime copies
    exact = mode == "align_corners" or all(
        not along[a] or abs(along[a] * size[a] - made[a]) < 1e-3 for a in changed
    )
    plain = exact and not (options.get("antialias") or options.get("exclude_outside") or "axes" in options)  # fmt: skip
    nearest = options.get("mode", "nearest") == "nearest"
    if not nearest and plain and mode in _BILINEAR and all(made[a] > 1 for a in changed):
        return []
    if nearest and plain and (mode, options.get("nearest_mode")) == ("asymmetric", "floor"):
        return []
    found = {}
    for axis in changed:
        k = axes.index(axis)
        found[axis] = _matrix(options, size[axis], made[axis], float(along[axis]), (float(roi[k]), float(roi[k + len(axes)])), graph.opset)  # fmt: skip
    if nearest and all(_is_floor(matrix) for matrix, _ in found.values()):
        new = NodeProto()
        new.CopyFrom(node)
        del new.attribute[:], new.input[1:]
        new.input.extend(["", "", graph.constant(f"{node.output[0]}_sizes", np.array(made, np.int64))])  # fmt: skip
        kept = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}  # fmt: skip
        new.attribute.extend(helper.make_attribute(k, v) for k, v in kept.items())
        return [new]
    if not nearest and graph.types.get(node.input[0]) != TensorProto.FLOAT:
        return []
    write = Writing(node, graph)
    value = node.input[0]
    inside = np.ones((1,) * len(size), np.float32)
    for axis, (matrix, outside) in found.items():
        value = _along(write, value, axis, len(size), matrix, is_choice=nearest)
        inside = inside * (1 - outside).reshape([-1 if a == axis else 1 for a in range(len(size))])
    rest = np.float32(options.get("extrapolation_value", 0.0)) * (1 - inside)
    if nearest and (inside == 0).any():
        return []
    return write.end("Add", value, rest) if rest.any() else write.done(value)


def _matrix(
    options: dict[str, Any], size: int, made: int, scale: float, roi: tuple[float, float], opset: int
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(made, size), and 1 for each of ``made`` that is extrapolated: what Resize does along one axis."""
    drop = ("axes", "keep_aspect_ratio_policy", "extrapolation_value")
    kept = {k: v for k, v in options.items() if k not in drop}
    inputs = [
        helper.make_tensor("roi", TensorProto.FLOAT, [8], [0, 0, roi[0], 0, 1, 1, roi[1], 1]),
        # one column becomes two equal ones: onnxruntime copies what keeps its size, 3 by 1.3
        helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, scale, 2])
        if scale
        else helper.make_tensor("sizes", TensorProto.INT64, [4], [1, size + 1, made, 2]),
    ]
    names = ["x", "roi", "scales"] if scale else ["x", "roi", "", "sizes"]
    graph = helper.make_graph(
        [helper.make_node("Resize", names, ["y"], extrapolation_value=1.0, **kept)], "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size + 1, size, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["?"] * 4)], inputs,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    units = np.vstack([np.eye(size), np.zeros(size)]).astype(np.float32)
    (result,) = open_onnx(model.SerializeToString()).run(None, {"x": units[None, :, :, None]})
    columns = np.asarray(result)[0, :, :, 0]  # (size + 1, made); the last is of zeros
    return np.ascontiguousarray((columns[:-1] - columns[-1]).T), columns[-1]


def _is_floor(matrix: np.ndarray) -> bool:
    """Whether value i is number ``floor(i * size / made)``."""
    made, size = matrix.shape
    return bool((matrix.argmax(1) == np.arange(made) * size // made).all())


def _along(write: Writing, value: str, axis: int, rank: int, matrix: np.ndarray, *, is_choice: bool) -> str:  # fmt: skip
    """``value`` with a matrix (made, size) applied along one axis."""
    if is_choice:
        return write.op("Gather", value, matrix.argmax(1).astype(np.int64), axis=axis)
    if axis == rank - 1:
        return write.op("MatMul", value, np.ascontiguousarray(matrix.T))
    if axis == rank - 2:
        return write.op("MatMul", matrix, value)
    order = [*range(rank)]
    order[axis], order[-1] = order[-1], order[axis]
    turned = write.op("Transpose", value, perm=order)
    return write.op("Transpose", write.op("MatMul", turned, np.ascontiguousarray(matrix.T)), perm=order)  # fmt: skip


def fourier(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """A DFT as one matrix: (..., n, c) -> (..., n * c) -> (..., k * o) -> (..., k, o), c and o being 1
    for real and 2 for complex numbers."""
    options = attributes(node)
    shape, made = graph.shapes.get(node.input[0], ()), graph.shapes.get(node.output[0], ())
    axis = graph.given(node, 2, "axis")
    length = graph.given(node, 1)
    named = [i for i in node.input[1:] if i]
    if not shape or any(i not in graph.constants for i in named) or graph.types.get(node.input[0]) != TensorProto.FLOAT:  # fmt: skip
        return []
    rank = len(shape)
    at = int(axis if axis is not None else (1 if graph.opset < 20 else -2)) % rank
    inverse, onesided = bool(options.get("inverse")), bool(options.get("onesided"))
    matrix = _fourier_matrix(shape[at], shape[-1], int(length) if length is not None else None, inverse, onesided)  # fmt: skip
    count, parts = matrix.shape[1:]
    if made and (made[at], made[-1]) != (count, parts):
        return []
    write = Writing(node, graph)
    # the axis of the transform comes last but one, and goes back
    order = [a for a in range(rank - 1) if a != at] + [at, rank - 1]
    outer = [shape[a] for a in order[:-2]]
    turned = write.op("Transpose", node.input[0], perm=order) if at != rank - 2 else node.input[0]
    flat = write.reshape(turned, [*outer, shape[at] * shape[-1]])
    value = write.op("MatMul", flat, matrix.reshape(len(matrix), -1))
    value = write.reshape(value, [*outer, count, parts])
    return write.end("Transpose", value, perm=[order.index(a) for a in range(rank)])


def short_fourier(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """An STFT as one convolution: its kernels are the window times the waves.

    (B, L, c) -> (B, c, L) -> (B, k * 2, frames) -> (B, frames, k, 2).
    """
    shape = graph.shapes.get(node.input[0], ())
    step, window, length = (graph.given(node, k) for k in (1, 2, 3))
    if len(shape) not in (2, 3) or step is None or any(i and i not in graph.constants for i in node.input[1:]):  # fmt: skip
        return []
    if graph.types.get(node.input[0]) != TensorProto.FLOAT or (window is None and length is None):
        return []
    batch, total, parts = (*shape, 1)[:3]
    size = int(length) if length is not None else len(np.ravel(window))  # type: ignore[arg-type]
    onesided = bool(attributes(node).get("onesided", 1))
    matrix = _fourier_matrix(size, parts, None, False, onesided)  # (size * parts, k, 2)
    count = matrix.shape[1]
    waves = matrix.reshape(size, parts, count * 2)
    if window is not None:
        waves = waves * window.reshape(-1, 1, 1)
    kernels = np.ascontiguousarray(waves.transpose(2, 1, 0).astype(np.float32))
    write = Writing(node, graph)
    signal = node.input[0]
    if parts == 1:
        signal = write.reshape(signal, [batch, 1, total])
    else:
        signal = write.op("Transpose", signal, perm=[0, 2, 1])
    found = write.op("Conv", signal, kernels, kernel_shape=[size], strides=[int(step)])
    turned = write.op("Transpose", found, perm=[0, 2, 1])
    frames = (total - size) // int(step) + 1
    return write.end("Reshape", turned, np.array([batch, frames, count, 2], np.int64))


def _fourier_matrix(size: int, parts: int, length: int | None, inverse: bool, onesided: bool) -> np.ndarray:  # fmt: skip
    """(size * parts, count, 1 or 2): what each unit vector becomes, by numpy."""
    units = np.eye(size * parts).reshape(size * parts, size, parts)
    values = units[..., 0] + 1j * units[..., 1] if parts == 2 else units[..., 0]
    if inverse and onesided:
        return np.fft.irfft(values, length)[..., None].astype(np.float32)
    transform = np.fft.ifft if inverse else np.fft.fft
    result = transform(values, length)
    if onesided:
        result = result[:, : result.shape[1] // 2 + 1]
    return np.stack([result.real, result.imag], -1).astype(np.float32)
