"""`prune`: remove whole channels, so that the model gets smaller and faster on any runtime."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.errors import StageOptionError
from edgepipe.schema import record
from edgepipe.stage import StageContext

log = logging.getLogger(__name__)


@record
class Prune:
    """Options of the stage.

    ``ratio`` is the share of channels to remove, of each layer or (``ranking = "global"``) of all
    layers together; what stays is rounded to the nearest multiple of ``round_to``. Layers whose
    name matches a pattern in ``ignore`` (like ``"features.0"`` or ``"head.*"``), and layers that
    make the outputs, keep all channels.
    """

    name: ClassVar[str] = "prune"
    title: ClassVar[str] = "remove the least important channels"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.torch_ops.prune", "edgepipe.torch_ops.run",
        "edgepipe.torch_ops.model", "edgepipe.torch_ops.edits", "edgepipe.torch_ops.result",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "torch-pruning", "safetensors")

    ratio: float = 0.5
    round_to: int = 8
    ranking: Literal["layer", "global"] = "layer"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise StageOptionError(
                f"prune: ratio {self.ratio:g} is not between 0 and 1",
                hint="0.3 removes three channels in ten",
            )
        if self.round_to < 1:
            raise StageOptionError(f"prune: round_to {self.round_to} is below 1")

    def data_names(self) -> tuple[str, ...]:
        return ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The pruned model with its edits; loaded again at once, it must give the same outputs."""
        from edgepipe.torch_ops.edits import apply_edits
        from edgepipe.torch_ops.model import load_model, read_description
        from edgepipe.torch_ops.prune import plan_pruning
        from edgepipe.torch_ops.result import describe_layers, save_result
        from edgepipe.torch_ops.run import example_inputs

        model = load_model(artifact.path)
        description = read_description(artifact.path)
        examples = example_inputs([(s.shape, s.dtype) for s in artifact.inputs], seed=context.seed)
        before = describe_layers(model, examples)
        plan = plan_pruning(
            model,
            examples,
            ratio=self.ratio,
            round_to=self.round_to,
            ranking=self.ranking,
            ignore=self.ignore,
        )
        pruned = apply_edits(model, plan.edits)
        folder = context.work_dir / "model"
        notes = {name: f"{was} -> {now} channels" for name, (was, now) in plan.channels.items()}
        notes |= {name: f"left whole: it {why}" for name, why in plan.left_whole.items()}
        facts = save_result(
            before,
            pruned,
            folder,
            dataclasses.replace(description, edits=(*description.edits, *plan.edits)),
            examples,
            stage=self.name,
            notes=notes,
        )
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts={
                **facts,
                "channels": {name: list(pair) for name, pair in plan.channels.items()},
                "left_whole": plan.left_whole,
            },
        )
