"""`prune`: remove whole channels, so that the model gets smaller and faster on any runtime."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.errors import StageError, StageOptionError
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
        "edgepipe.torch_ops.model", "edgepipe.torch_ops.edits",
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
        from edgepipe.torch_ops.model import load_model, read_description, save_model
        from edgepipe.torch_ops.prune import plan_pruning
        from edgepipe.torch_ops.run import count_macs, example_inputs, same_outputs

        model = load_model(artifact.path)
        description = read_description(artifact.path)
        examples = example_inputs([(s.shape, s.dtype) for s in artifact.inputs], seed=context.seed)
        plan = plan_pruning(
            model,
            examples,
            ratio=self.ratio,
            round_to=self.round_to,
            ranking=self.ranking,
            ignore=self.ignore,
        )
        before = {"macs": count_macs(model, examples), "parameters": _parameters(model)}
        pruned = apply_edits(model, plan.edits)
        after = {"macs": count_macs(pruned, examples), "parameters": _parameters(pruned)}
        folder = context.work_dir / "model"
        edits = (*description.edits, *plan.edits)
        save_model(pruned, folder, dataclasses.replace(description, edits=edits))
        if not same_outputs(pruned, load_model(folder), examples):
            raise StageError(
                "the saved model does not give the outputs of the pruned one",
                stage=self.name,
                hint="does the builder draw random numbers that are no parameters or buffers? Make them buffers",
                code="not-reproducible",
            )
        log.info(
            "pruned %d groups of layers: %.3g -> %.3g million MACs, %d -> %d parameters",
            len(plan.channels),
            before["macs"] / 1e6,
            after["macs"] / 1e6,
            before["parameters"],
            after["parameters"],
        )
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts={
                "before": before,
                "after": after,
                "channels": {name: list(pair) for name, pair in plan.channels.items()},
                "left_whole": plan.left_whole,
            },
        )


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
