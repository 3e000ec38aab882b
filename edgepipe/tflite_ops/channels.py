"""What every channel of every activation does on real inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.quantize import HUGE, activations
from edgepipe.tflite_ops.run import invoke_once, open_tflite


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """Of one tensor, for each entry of its last axis: (C,) float64 over all samples and positions."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """Largest absolute value of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def is_constant(self) -> np.ndarray:
        """(C,) bool: channels that had one value throughout."""
        return self.low == self.high

    @property
    def spread(self) -> float:
        """Largest reach over the median of those that are not 0: 1 is even, 100 leaves most channels
        two or three of the 256 steps."""
        alive = self.reach[self.reach > 0]
        return float(alive.max() / np.median(alive)) if len(alive) else 1.0


def channel_statistics(
    content: bytes, batches: Iterable[Sequence[np.ndarray]], *, where: str
) -> dict[str, ChannelStatistics]:
    """Tensor name -> statistics, of all activations of a float file that have a channel axis.

    Channels are the last axis, as TFLite has them. Positions with an infinity are left out. One pass; memory
    32 bytes a channel.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    tensors = [t for t in activations(graph) if len(t.shape) >= 2]
    interpreter = open_tflite(content, preserve_all_tensors=True)
    sums: dict[str, list[np.ndarray]] = {}
    count: dict[str, int] = {}
    for batch in batches:
        for detail, array in zip(interpreter.get_input_details(), batch, strict=True):
            interpreter.set_tensor(detail["index"], array)
        invoke_once(interpreter, where=where)
        for tensor in tensors:
            values = interpreter.get_tensor(tensor.index)
            values = values.reshape(-1, values.shape[-1])
            if not -HUGE <= values.min(initial=0) <= values.max(initial=0) <= HUGE:
                # positions of infinities, as padding for max pooling has them
                values = values[(np.abs(values) <= HUGE).all(axis=1)]
            if not len(values):
                continue
            new = [
                values.min(axis=0), values.max(axis=0),
                values.sum(axis=0, dtype=np.float64), np.square(values, dtype=np.float64).sum(axis=0),
            ]  # fmt: skip
            old = sums.get(tensor.name)
            if old is not None:
                new = [np.minimum(old[0], new[0]), np.maximum(old[1], new[1]), old[2] + new[2], old[3] + new[3]]  # fmt: skip
            sums[tensor.name] = new
            count[tensor.name] = count.get(tensor.name, 0) + len(values)
    found = {}
    for name, (low, high, total, squares) in sums.items():
        mean = total / count[name]
        variance = np.maximum(squares / count[name] - mean**2, 0)
        found[name] = ChannelStatistics(low.astype(np.float64), high.astype(np.float64), mean, np.sqrt(variance))  # fmt: skip
    return found
