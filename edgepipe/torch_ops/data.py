"""Labelled samples for training, from any data source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgepipe.array_ops.load import SampleStream, load_samples, open_samples
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.state import data_inputs
from edgepipe.torch_ops.train import ArraySet, TrainingSet


def training_set(source: DataSource, specs: Sequence[TensorSpec]) -> TrainingSet:
    """The samples of ``source`` prepared for inputs ``specs``: in memory, or (kind ``dataset``) read
    batch by batch; of a model with state, sequences. Raises DataError where there are no labels."""
    if source.kind == "dataset":
        return _Lazy(open_samples(source, specs, kept_bytes=0))
    samples = load_samples(source, specs)
    if samples.labels is None:
        raise _no_labels(source)
    return ArraySet([samples.inputs[spec.name] for spec in data_inputs(specs)], samples.labels)


class _Lazy:
    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def batch(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        found = self.stream.take(rows.numpy())
        if found.labels is None or found.labels.dtype.kind not in "iu":
            raise _no_labels(self.stream.source)
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in found.inputs.values()]
        return tensors, torch.from_numpy(found.labels.astype(np.int64))


def _no_labels(source: DataSource) -> DataError:
    return DataError(
        f"{source.path or source.function or source.kind} has no labels to train on",
        hint='for kind = "python" return (inputs, labels); for npz name the array: labels = "y"; '
        'for kind = "dataset" return (input, label) with a whole number as label',
    )
