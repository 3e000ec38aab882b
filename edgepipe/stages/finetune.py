"""`finetune`: train a PyTorch model, from random weights or after it was compressed."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.errors import DataError, StageOptionError
from edgepipe.schema import record
from edgepipe.stage import StageContext

log = logging.getLogger(__name__)


@record
class Finetune:
    """Options of the stage. ``data`` and ``validation`` are names of data sets with labels."""

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "train the PyTorch model on labelled data"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.torch_ops.train", "edgepipe.torch_ops.run",
        "edgepipe.torch_ops.model", "edgepipe.torch_ops.edits", "edgepipe.array_ops.load",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "numpy")

    data: str = "train"
    validation: str = ""
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise StageOptionError("finetune: epochs and batch_size are at least 1")
        if not self.lr > 0 or self.weight_decay < 0:
            raise StageOptionError("finetune: lr is above 0, weight_decay not below 0")
        if not 0 <= self.label_smoothing < 1:
            raise StageOptionError("finetune: label_smoothing is at least 0 and below 1")

    def data_names(self) -> tuple[str, ...]:
        return (self.data, self.validation) if self.validation else (self.data,)

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The same model with trained weights. Nothing is kept where training fails or is stopped."""
        from edgepipe.array_ops.load import load_samples
        from edgepipe.torch_ops.model import load_model, read_description, save_model
        from edgepipe.torch_ops.train import train

        loaded = {}
        for name in self.data_names():
            samples = load_samples(context.data[name], artifact.inputs)
            if samples.labels is None:
                raise DataError(
                    f"[data.{name}] has no labels to train on",
                    hint='for kind = "python" return (inputs, labels); for npz name the array: labels = "y"',
                )
            arrays = [samples.inputs[spec.name] for spec in artifact.inputs]
            loaded[name] = (arrays, samples.labels, samples.origin)
        arrays, labels, origin = loaded[self.data]
        model = load_model(artifact.path)
        history = train(
            model,
            arrays,
            labels,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            label_smoothing=self.label_smoothing,
            seed=context.seed,
            validation=loaded[self.validation][:2] if self.validation else None,
        )
        folder = context.work_dir / "model"
        save_model(model, folder, read_description(artifact.path))
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts={
                "data": origin,
                "samples": len(labels),
                "seed": context.seed,
                "epochs": [dataclasses.asdict(epoch) for epoch in history],
            },
        )
