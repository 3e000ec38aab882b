"""`finetune`: train a PyTorch model, from random weights or after it was compressed."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.schema import record
from edgepipe.stage import StageContext
from edgepipe.training import TrainingOptions

log = logging.getLogger(__name__)


@record
class Finetune(TrainingOptions):
    """Supervised training with softmax cross-entropy; the options are those of `TrainingOptions`.

    ``trainer`` = "file.py:function" trains by a function of your own instead, called as
    ``function(model, train_set, validation_set, options, seed)`` (`torch_ops.trainer`); of the
    options it heeds what it likes, and an interrupted training begins anew. A model with state takes
    whole sequences there, too (`torch_ops.sequences.Unrolled`).
    """

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "train the PyTorch model on labelled data"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.training", "edgepipe.torch_ops.train", "edgepipe.torch_ops.augment",
        "edgepipe.torch_ops.data", "edgepipe.torch_ops.sequences", "edgepipe.torch_ops.run", "edgepipe.torch_ops.model",
        "edgepipe.torch_ops.edits", "edgepipe.torch_ops.attention", "edgepipe.torch_ops.trainer", "edgepipe.array_ops", "edgepipe.state",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "numpy")

    trainer: str = ""

    def functions(self) -> tuple[str, ...]:
        return (self.trainer,) if self.trainer else ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The same model with trained weights. Nothing is kept where training fails."""
        from edgepipe.torch_ops.data import training_set
        from edgepipe.torch_ops.model import load_model, read_description, save_model
        from edgepipe.torch_ops.sequences import stepped, unrolled
        from edgepipe.torch_ops.train import train
        from edgepipe.torch_ops.trainer import train_by_function

        data = training_set(context.data[self.data], artifact.inputs)
        validation = None
        if self.validation:
            validation = training_set(context.data[self.validation], artifact.inputs)
        model = unrolled(load_model(artifact.path), artifact, data, back_steps=self.back_steps)
        facts: dict[str, Any] = {"samples": len(data), "seed": context.seed}
        if self.trainer:
            model = train_by_function(
                self.trainer, model, data, validation, self,
                seed=context.seed, stage=self.name, root=context.root,
            )  # fmt: skip
            facts["trainer"] = self.trainer
        else:
            history = train(
                model, data, self, seed=context.seed, stage=self.name, validation=validation,
                checkpoint=context.checkpoint,
            )  # fmt: skip
            facts["epochs"] = [dataclasses.asdict(epoch) for epoch in history]
        folder = context.work_dir / "model"
        save_model(stepped(model), folder, read_description(artifact.path))
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts=facts,
        )
