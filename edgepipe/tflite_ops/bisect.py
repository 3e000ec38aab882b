"""Where two models part: the first ONNX tensor that no TFLite tensor reproduces."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgepipe.array_ops.layout import to_layout
from edgepipe.artifact import TORCH_LAYOUTS
from edgepipe.tflite_ops.convert import channels_last, relative_error
from edgepipe.tflite_ops.onnx_model import read_onnx
from edgepipe.tflite_ops.run import invoke_once, open_onnx, open_tflite

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')
# Frames of these are not where the user's model says what it does.
_LIBRARIES = ("/site-packages/", "/dist-packages/", "/torch/")


@dataclasses.dataclass(frozen=True)
class Departure:
    """``node`` computes ``tensor``, the first that has no equal; ``last_equal`` still had one.

    ``source`` is the PyTorch line the node came from, where the exporter recorded it.
    """

    node: str
    operator: str
    tensor: str
    last_equal: str
    source: str

    def __str__(self) -> str:
        text = f"{self.operator} (node {self.node!r}, tensor {self.tensor!r})"
        return f"{text} from {self.source}" if self.source else text


def first_departure(
    reference: Path,
    converted: Path,
    reference_inputs: Sequence[np.ndarray],
    converted_inputs: Sequence[np.ndarray],
    *,
    tolerance: float,
) -> Departure | None:
    """The first ONNX node, in order of computation, after which nothing is as it should be.

    ``reference_inputs`` and ``converted_inputs`` are one inference's inputs for either file, in its
    order and layout. Tensors are compared by value, in their own layout and channels last. A node
    without an equal is passed over while something computed from it has one: converters fuse.
    Returns None where everything that can be compared agrees.
    """
    model = read_onnx(reference)
    expected = _onnx_tensors(model, reference_inputs)
    actual = _tflite_tensors(converted, converted_inputs)
    by_size: dict[int, list[np.ndarray]] = {}
    for array in actual:
        by_size.setdefault(array.size, []).append(array)
    live = {value.name for value in model.graph.input} - {t.name for t in model.graph.initializer}
    nodes = []
    for node in model.graph.node:  # ONNX: in topological order
        if live.intersection(node.input):
            live.update(node.output)
            nodes.append(node)
    equal = {
        name: _has_equal(expected[name], by_size.get(expected[name].size, []), tolerance)
        for node in nodes
        for name in node.output
        if name in expected
    }
    # from the end: is anything computed from this tensor equal?
    redeemed: set[str] = set()
    for node in reversed(nodes):
        if any(equal.get(name, False) or name in redeemed for name in node.output):
            redeemed.update(node.input)
    last_equal = "its inputs"
    for node in nodes:
        for name in node.output:
            if equal.get(name):
                last_equal = name
            elif name in equal and name not in redeemed:
                return Departure(node.name, node.op_type, name, last_equal, source_line(node))
    return None


def _onnx_tensors(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every floating point tensor that one inference computes, by name."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    for node in model.graph.node:
        extended.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in node.output if name and name not in known
        )
    session = open_onnx(extended.SerializeToString(), optimise=False)
    # a scalar's one sample is (1,)
    feed = {v.name: a if v.shape else a.reshape(()) for v, a in zip(session.get_inputs(), inputs, strict=True)}  # fmt: skip
    names = [v.name for v in session.get_outputs()]
    values = map(_as_array, session.run(names, feed))
    return {n: v for n, v in zip(names, values, strict=True) if _is_comparable(v)}


def _tflite_tensors(path: Path, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    interpreter = open_tflite(path, preserve_all_tensors=True)
    for detail, array in zip(interpreter.get_input_details(), inputs, strict=True):
        fed = array if len(detail["shape"]) else array.reshape(())
        interpreter.set_tensor(detail["index"], fed.astype(detail["dtype"]))
    invoke_once(interpreter, where=str(path))
    found = []
    for detail in interpreter.get_tensor_details():
        try:
            value = _as_array(interpreter.get_tensor(detail["index"]))
        except ValueError:  # a temporary of a kernel, without data
            continue
        if _is_comparable(value):
            found.append(value)
    return found


def _as_array(value: Any) -> np.ndarray:
    """Runtimes give a scalar as a number; what is no tensor becomes an array that nothing is compared with."""
    return np.asarray(value if isinstance(value, (np.ndarray, np.generic)) else [])


def _is_comparable(value: np.ndarray) -> bool:
    return value.dtype == np.float32 and value.size > 0


def _has_equal(reference: np.ndarray, others: Sequence[np.ndarray], tolerance: float) -> bool:
    layout = TORCH_LAYOUTS.get(reference.ndim, "")
    flat = [
        to_layout(reference, layout, moved).ravel()
        for moved in dict.fromkeys((layout, channels_last(layout)))
    ]
    return any(
        relative_error(mine, other.ravel()) <= tolerance for other in others for mine in flat
    )


def source_line(node: onnx.NodeProto) -> str:
    """``model.py:12 in forward: x = torch.fft.fft(x)``, or "" where the exporter recorded nothing.

    The dynamo exporter keeps PyTorch's stack trace in the node's metadata; the innermost frame
    outside libraries is the line a person wrote.
    """
    traces = [p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.stack_trace"]
    frames = _FRAME.findall(traces[0]) if traces else []
    own = [f for f in frames if not any(part in f[0] for part in _LIBRARIES)] or frames
    if not own:
        return ""
    file, line, function, code = own[-1]
    return f"{Path(file).name}:{line} in {function}: {code.strip()}"


def find_node(path: Path, name: str, operator: str) -> tuple[str, str, str] | None:
    """(name, operator, PyTorch line) of the node a converter named, else the first such operator."""
    nodes = read_onnx(path).graph.node
    named = [node for node in nodes if node.name == name]
    found = named or [node for node in nodes if node.op_type == operator]
    return (found[0].name, found[0].op_type, source_line(found[0])) if found else None
