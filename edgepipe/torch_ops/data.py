"""Labelled samples for training, from any data source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgepipe.array_ops.load import LazyDataset, load_samples
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.torch_ops.train import ArraySet, TrainingSet


def training_set(source: DataSource, specs: Sequence[TensorSpec]) -> TrainingSet:
    """The samples of ``source`` prepared for inputs ``specs``: in memory, or (kind ``dataset``) read
    batch by batch. Raises DataError where there are no labels."""
    if source.kind == "dataset":
        return _Lazy(LazyDataset(source, specs))
    samples = load_samples(source, specs)
    if samples.labels is None:
        raise _no_labels(source)
    return ArraySet([samples.inputs[spec.name] for spec in specs], samples.labels)


class _Lazy:
    def __init__(self, dataset: LazyDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        inputs, labels = self.dataset.read(rows.tolist())
        if labels is None or labels.dtype.kind not in "iu":
            raise _no_labels(self.dataset.source)
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs.values()]
        return tensors, torch.from_numpy(labels.astype(np.int64))


def _no_labels(source: DataSource) -> DataError:
    return DataError(
        f"{source.path or source.function or source.kind} has no labels to train on",
        hint='for kind = "python" return (inputs, labels); for npz name the array: labels = "y"; '
        'for kind = "dataset" return (input, label) with a whole number as label',
    )
