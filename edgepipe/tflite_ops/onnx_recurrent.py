"""RNN and LSTM step by step: TFLite's fused ones keep their state from one inference to the next."""

from __future__ import annotations

import dataclasses

import numpy as np
from onnx import NodeProto, TensorProto

from edgepipe.tflite_ops.onnx_graph import Graph, Writing, attributes

# Each step is some ten operators, and converters take seconds for a thousand.
MAX_STEPS = 64
_KINDS = {"RNN": 1, "LSTM": 4}
_KNOWN = {"direction", "hidden_size", "activations", "layout", "input_forget"}


def unroll(node: NodeProto, graph: Graph) -> list[NodeProto]:
    """An RNN or LSTM of constant weights and at most `MAX_STEPS` steps, in its specification's own equations.

    ``RNN: h = tanh(W x + R h + b)``. ``LSTM: c = f * c + i * g, h = o * tanh(c)``; i, o, f and g are parts of
    ``W x + R h + b``, to which peepholes add ``P * c``. W x is computed for all steps at once. Other activations
    than the usual ones, clipping and sequences of several lengths are left to the converter.
    """
    options = attributes(node)
    names = [*node.input, *[""] * 8][:8]
    shape = graph.shapes.get(names[0], ())
    given = {k: graph.constants[names[k]] for k in (1, 2, 3, 4, 7) if names[k] in graph.constants}
    directions = {b"forward": [1], b"reverse": [-1], b"bidirectional": [1, -1]}[options.get("direction", b"forward")]  # fmt: skip
    usual = [b"Tanh"] if node.op_type == "RNN" else [b"Sigmoid", b"Tanh", b"Tanh"]
    if node.op_type == "RNN" and options.get("activations") == [b"Relu"] * len(directions):
        usual = [b"Relu"]
    plain = options.get("activations", usual * len(directions)) == usual * len(directions)
    if len(shape) != 3 or not plain or set(options) - _KNOWN or options.get("layout") or options.get("input_forget"):  # fmt: skip
        return []
    steps = shape[0]
    if graph.types.get(names[0]) != TensorProto.FLOAT or any(names[k] and k not in given for k in (1, 2, 3, 4, 7)):  # fmt: skip
        return []
    if not 0 < steps * len(directions) <= MAX_STEPS or np.any(given.get(4, steps) != steps):
        return []
    write = Writing(node, graph)
    ways = [
        _Way(write, names, given, shape, which, usual[0].decode())
        for which in range(len(directions))
    ]
    every, last_h, last_c = [], [], []
    for way, direction in zip(ways, directions, strict=True):
        hs, c = way.run(direction)
        every.append(_joined(write, [write.reshape(h, [1, 1, shape[1], way.hidden]) for h in hs], 0))  # fmt: skip
        last_h.append(write.reshape(hs[-1 if direction > 0 else 0], [1, shape[1], way.hidden]))
        last_c.append(write.reshape(c, [1, shape[1], way.hidden]) if c else "")
    for output, values, axis in zip(node.output, (every, last_h, last_c), (1, 0, 0), strict=False):
        if output:
            write.op("Identity", _joined(write, values, axis), makes=output)
    return write.nodes


@dataclasses.dataclass
class _Way:
    """One direction of a recurrent operator; ``given`` are its constant inputs by position, ``which`` its number."""

    write: Writing
    names: list[str]
    given: dict[int, np.ndarray]
    shape: tuple[int, ...]
    which: int
    activation: str

    @property
    def hidden(self) -> int:
        return int(self.given[2].shape[2])

    def run(self, direction: int) -> tuple[list[str], str]:
        """The outputs h of all steps, in the order of the sequence, and the last c ("" of an RNN)."""
        write, (steps, batch, _) = self.write, self.shape
        kind = write.node.op_type
        width = _KINDS[kind] * self.hidden
        weights = np.ascontiguousarray(self.given[1][self.which].T)
        again = np.ascontiguousarray(self.given[2][self.which].T)
        bias = self.given[3][self.which].reshape(2, -1).sum(0) if 3 in self.given else np.zeros(width, np.float32)  # fmt: skip
        seen = write.op("Add", write.op("MatMul", self.names[0], weights), bias)  # (T, B, width)
        h, c = self._start(5), self._start(6)
        made: list[str] = []
        for step in range(steps)[::direction]:
            part = write.op("Gather", seen, np.array(step), axis=0) if steps > 1 else write.reshape(seen, [batch, width])  # fmt: skip
            if h:
                part = write.op("Add", part, write.op("MatMul", h, again))
            if kind == "RNN":
                h = write.op(self.activation, part)
            else:
                h, c = self._lstm(part, c)
            made.append(h)
        return made[::direction], c

    def _start(self, position: int) -> str:
        """The state that is given, (B, hidden), or "": zero."""
        name = self.names[position]
        return self.write.op("Gather", name, np.array(self.which), axis=0) if name else ""

    def _lstm(self, part: str, c: str) -> tuple[str, str]:
        write, hidden = self.write, self.hidden
        i, o, f, g = (write.op("Slice", part, *(np.array([n], np.int64) for n in (k * hidden, (k + 1) * hidden, 1))) for k in range(4))  # fmt: skip
        if 7 in self.given and c:
            i, f = (write.op("Add", gate, write.op("Mul", c, self._peephole(k))) for gate, k in ((i, 0), (f, 2)))  # fmt: skip
        new = write.op("Mul", write.op("Sigmoid", i), write.op("Tanh", g))
        if c:
            new = write.op("Add", write.op("Mul", write.op("Sigmoid", f), c), new)
        if 7 in self.given:
            o = write.op("Add", o, write.op("Mul", new, self._peephole(1)))
        return write.op("Mul", write.op("Sigmoid", o), write.op("Tanh", new)), new

    def _peephole(self, gate: int) -> np.ndarray:
        """That of the input, output or forget gate (0, 1, 2)."""
        return self.given[7][self.which].reshape(3, -1)[gate]


def _joined(write: Writing, values: list[str], axis: int) -> str:
    return values[0] if len(values) == 1 else write.op("Concat", *values, axis=axis)
