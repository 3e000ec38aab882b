"""Pools in forms that TFLite has not: windows that reach over the edge, dilated ones, other norms than mean and max."""

from __future__ import annotations

import dataclasses
from functools import reduce

import numpy as np
from onnx import NodeProto, TensorProto

from edgepipe.tflite_ops.onnx_graph import Graph, Writing, attributes


@dataclasses.dataclass(frozen=True)
class _Window:
    """A pool along one spatial axis of ``size`` values; pads and counts in values."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    ceil: bool

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    @property
    def count(self) -> int:
        """How many windows there are; PyTorch and ONNX: none begins beyond the values and the padding before."""
        free = self.size + self.before + self.after - self.reach
        count = (-(-free // self.stride) if self.ceil else free // self.stride) + 1
        return count - (self.ceil and (count - 1) * self.stride >= self.size + self.before)

    @property
    def extra(self) -> int:
        """How far the last window reaches beyond the padding."""
        last = (self.count - 1) * self.stride + self.reach
        return max(0, last - (self.size + self.before + self.after))

    def counted(self, *, include_pad: bool) -> np.ndarray:
        """How many values count in each window.

        A size of 11, kernel 2, stride 2: six windows, the last of them over values 10 and 11, of which
        one exists: [2, 2, 2, 2, 2, 1].
        """
        low, high = (-self.before, self.size + self.after) if include_pad else (0, self.size)
        starts = np.arange(self.count) * self.stride - self.before
        places = starts[:, None] + np.arange(self.kernel) * self.dilation
        return ((places >= low) & (places < high)).sum(1).astype(np.float64)


def pool(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """MaxPool, AveragePool or LpPool, where TFLite has no such pool.

    TFLite's pools either stop before the edge or pad as it suits them, and are not dilated. With k values in
    a window of which n count, ``mean = (sum / k) * (k / n)``: over zeros a pool without padding gives sum / k,
    and k / n is a constant of shape (1, 1, *spatial). A dilated window is its values one by one, an axis
    after the other: the largest, or their sum. ``LpPool(x; p) = sum(|x| ** p) ** (1 / p)``.
    """
    options = attributes(node)
    shape = graph.shapes.get(node.input[0], ())
    rank = len(shape) - 2
    if rank < 1 or len(node.output) > 1 or graph.types.get(node.input[0]) != TensorProto.FLOAT:
        return []
    windows = _windows(options, shape)
    dilated = any(w.dilation > 1 for w in windows)
    average = node.op_type == "AveragePool"
    if not dilated and (
        node.op_type == "MaxPool" or (average and not any(w.extra for w in windows))
    ):
        return []
    write = Writing(node, graph)
    value = node.input[0]
    p = float(options.get("p", 2))
    if node.op_type == "LpPool":
        value = write.op("Pow", write.op("Abs", value), np.float32(p))
    widths = [0, 0, *(w.before for w in windows), 0, 0, *(w.after + w.extra for w in windows)]
    if any(widths):
        around = np.float32(np.finfo(np.float32).min if node.op_type == "MaxPool" else 0)
        value = write.op("Pad", value, np.array(widths, np.int64), around)
    kernel, strides = [w.kernel for w in windows], [w.stride for w in windows]
    if dilated:
        for axis, window in enumerate(windows):
            value = _across(write, value, axis + 2, window, "Max" if node.op_type == "MaxPool" else "Add")  # fmt: skip
    else:
        value = write.op("AveragePool", value, kernel_shape=kernel, strides=strides)
    if node.op_type == "MaxPool":
        return write.done(value)
    whole = 1 if dilated else np.prod(kernel)
    if node.op_type == "LpPool":
        total = value if dilated else write.op("Mul", value, np.float32(whole))
        return write.end("Pow", total, np.float32(1 / p))
    counts = np.ones([1] * (rank + 2))
    for i, window in enumerate(windows):
        counted = window.counted(include_pad=bool(options.get("count_include_pad")))
        counts = counts * counted.reshape([-1 if a == i + 2 else 1 for a in range(rank + 2)])
    return write.end("Mul", value, (whole / counts).astype(np.float32))


def _windows(options: dict[str, object], shape: tuple[int, ...]) -> list[_Window]:
    sizes = shape[2:]
    rank = len(sizes)
    kernel: list[int] = list(options["kernel_shape"])  # type: ignore[call-overload]
    strides: list[int] = list(options.get("strides", [1] * rank))  # type: ignore[call-overload]
    dilations: list[int] = list(options.get("dilations", [1] * rank))  # type: ignore[call-overload]
    pads: list[int] = list(options.get("pads", [0] * 2 * rank))  # type: ignore[call-overload]
    auto = options.get("auto_pad", b"NOTSET")
    found = []
    for i, size in enumerate(sizes):
        before, after = pads[i], pads[rank + i]
        if auto in (b"SAME_UPPER", b"SAME_LOWER"):
            reach = (kernel[i] - 1) * dilations[i] + 1
            total = max(0, (-(-size // strides[i]) - 1) * strides[i] + reach - size)
            less, more = total // 2, total - total // 2
            before, after = (less, more) if auto == b"SAME_UPPER" else (more, less)
        ceil = bool(options.get("ceil_mode")) and auto == b"NOTSET"
        found.append(_Window(size, kernel[i], strides[i], dilations[i], before, after, ceil))
    return found


def _across(write: Writing, value: str, axis: int, window: _Window, kind: str) -> str:
    """``kind`` (Max, Add) over the values of each window along one axis, which is padded already."""
    last = (window.count - 1) * window.stride + 1
    parts = [
        write.op("Slice", value, *(np.array([n], np.int64) for n in (start, start + last, axis, window.stride)))
        for start in range(0, window.kernel * window.dilation, window.dilation)
    ]  # fmt: skip
    return reduce(lambda a, b: write.op(kind, a, b), parts)
