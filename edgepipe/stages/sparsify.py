"""`sparsify`: set small weights to zero, gradually while training, and keep them there."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any, ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.errors import StageOptionError
from edgepipe.schema import record
from edgepipe.stage import StageContext
from edgepipe.training import TrainingOptions

log = logging.getLogger(__name__)


@record
class Sparsify(TrainingOptions):
    """Options of the stage, beside those of `TrainingOptions`.

    ``sparsity`` is the share of zeros to get to, of each layer or (``ranking = "global"``) of all
    together; ``pattern = "2:4"`` leaves two of each four weights along the input channels instead. The
    smallest weights go, in ``updates`` cuts on a cubic schedule between the shares ``begin`` and ``end``
    of the training; with ``epochs = 0`` all at once, without data. ``layers`` and ``ignore`` are
    patterns of layer names; ``keep_ends`` leaves the first and last layer dense. Later stages that
    train keep the zeros. What they are worth on a device, `edgepipe inspect --sparsity` says.
    """

    name: ClassVar[str] = "sparsify"
    title: ClassVar[str] = "set the smallest weights to zero and keep them there"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.training", "edgepipe.torch_ops.sparsify", "edgepipe.torch_ops.train",
        "edgepipe.torch_ops.augment", "edgepipe.torch_ops.data", "edgepipe.torch_ops.sequences", "edgepipe.torch_ops.run",
        "edgepipe.torch_ops.model", "edgepipe.torch_ops.edits", "edgepipe.torch_ops.attention", "edgepipe.torch_ops.result",
        "edgepipe.array_ops", "edgepipe.state",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "numpy")

    epochs: int = 5
    sparsity: float = 0.75
    pattern: str = "unstructured"
    ranking: Literal["layer", "global"] = "layer"
    begin: float = 0.0
    end: float = 0.75
    updates: int = 20
    layers: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    keep_ends: bool = True

    def __post_init__(self) -> None:
        if self.epochs:  # 0 is no training, and needs none of its options
            super().__post_init__()
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if self.pattern != "unstructured" and not (match and 0 < int(match[1]) < int(match[2])):
            raise StageOptionError(
                f"sparsify: pattern {self.pattern!r} is neither 'unstructured' nor N:M with N below M",
                hint='pattern = "2:4" leaves two weights of each four',
            )
        if not 0 < self.sparsity < 1 or not 0 <= self.begin < self.end <= 1 or self.updates < 1:
            raise StageOptionError(
                "sparsify: sparsity is between 0 and 1, begin below end within the training (0 to 1), "
                "updates at least 1"
            )
        if self.early_stop:
            raise StageOptionError(
                "sparsify: early_stop would keep an epoch in which the model was not yet sparse",
                hint="leave it out, and add a finetune stage that has it",
            )

    def data_names(self) -> tuple[str, ...]:
        if self.epochs:
            return super().data_names()
        return (self.validation,) if self.validation else ()

    @property
    def final(self) -> float:
        """The share of zeros in the end: N:M has its own."""
        if self.pattern == "unstructured":
            return self.sparsity
        kept, block = (int(part) for part in self.pattern.split(":"))
        return 1 - kept / block

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The sparse model; loaded again at once, it must give the same outputs."""
        from edgepipe.torch_ops.data import training_set
        from edgepipe.torch_ops.edits import apply_edits
        from edgepipe.torch_ops.model import load_model, read_description
        from edgepipe.torch_ops.result import describe_layers, save_result
        from edgepipe.torch_ops.run import example_inputs
        from edgepipe.torch_ops.sequences import unrolled
        from edgepipe.torch_ops.sparsify import cut_weights, gradually, plan_sparsity, zero_shares
        from edgepipe.torch_ops.train import accuracy, train

        model = load_model(artifact.path)
        description = read_description(artifact.path)
        examples = example_inputs([(s.shape, s.dtype) for s in artifact.inputs], seed=context.seed)
        plan = plan_sparsity(
            model,
            examples,
            pattern=self.pattern,
            layers=self.layers,
            ignore=self.ignore,
            keep_ends=self.keep_ends,
        )
        before = describe_layers(model, examples)
        validation = None
        facts: dict[str, Any] = {}
        if self.validation:
            validation = training_set(context.data[self.validation], artifact.inputs)
            whole = unrolled(model, artifact, validation)
            facts["accuracy"] = {"before": accuracy(whole, validation)}
        apply_edits(model, plan.edits())
        if self.epochs:
            data = training_set(context.data[self.data], artifact.inputs)
            history = train(
                unrolled(model, artifact, data, back_steps=self.back_steps),
                data,
                self,
                seed=context.seed,
                stage=self.name,
                validation=validation,
                after_step=gradually(
                    model,
                    plan,
                    final=self.final,
                    ranking=self.ranking,
                    begin=self.begin,
                    end=self.end,
                    updates=self.updates,
                ),
                checkpoint=context.checkpoint,
            )
            facts["epochs"] = [dataclasses.asdict(epoch) for epoch in history]
        else:
            cut_weights(model, plan, self.final, ranking=self.ranking)
        shares = zero_shares(model, plan.layers)
        if validation is not None:
            facts["accuracy"]["after"] = accuracy(whole, validation)
            log.info("accuracy on %s: %.2f %% before, %.2f %% after", self.validation, *(100 * v for v in facts["accuracy"].values()))  # fmt: skip
        notes = {name: f"stays dense: it {why}" for name, why in plan.left_dense.items()}
        notes |= {name: f"{100 * share:.1f} % zeros ({self.pattern})" for name, share in shares.items()}  # fmt: skip
        folder = context.work_dir / "model"
        facts |= save_result(
            before,
            model,
            folder,
            dataclasses.replace(description, edits=(*description.edits, *plan.edits())),
            examples,
            stage=self.name,
            notes=notes,
        )
        facts |= {"zeros": dict(shares), "left_dense": plan.left_dense, "seed": context.seed}
        log.info(
            "%d of %d layers are sparse; MACs and int8 bytes count zeros too: what they save, "
            "edgepipe inspect --sparsity says of the converted file", len(shares), len(shares) + len(plan.left_dense),
        )  # fmt: skip
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts=facts,
        )
