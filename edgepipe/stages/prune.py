"""`prune`: remove whole channels, so that the model gets smaller and faster on any runtime."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, ClassVar

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.pruning import PruningOptions
from edgepipe.schema import record
from edgepipe.stage import StageContext
from edgepipe.state import is_stateful

log = logging.getLogger(__name__)


@record
class Prune(PruningOptions):
    """The options are those of `PruningOptions`."""

    name: ClassVar[str] = "prune"
    title: ClassVar[str] = "remove the least important channels"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.pruning", "edgepipe.training", "edgepipe.op_table", "edgepipe.torch_ops.prune",
        "edgepipe.torch_ops.prune_steps", "edgepipe.torch_ops.channel_groups",
        "edgepipe.torch_ops.attention", "edgepipe.torch_ops.train", "edgepipe.torch_ops.augment",
        "edgepipe.torch_ops.data", "edgepipe.torch_ops.sequences", "edgepipe.torch_ops.run", "edgepipe.torch_ops.model",
        "edgepipe.torch_ops.edits", "edgepipe.torch_ops.result", "edgepipe.array_ops", "edgepipe.state",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "torch-pruning", "safetensors", "numpy")

    def profiles(self) -> tuple[str, ...]:
        return (self.target.profile,) if self.target is not None and self.target.profile else ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The pruned model with its edits; loaded again at once, it must give the same outputs."""
        from edgepipe.torch_ops.data import training_set
        from edgepipe.torch_ops.model import load_model, read_description
        from edgepipe.torch_ops.prune_steps import prune_in_steps
        from edgepipe.torch_ops.result import describe_layers, save_result
        from edgepipe.torch_ops.run import example_inputs
        from edgepipe.torch_ops.sequences import unrolled

        @functools.cache
        def samples(name: str) -> Any:
            return training_set(context.data[name], artifact.inputs) if name else None

        model = load_model(artifact.path)
        description = read_description(artifact.path)
        examples = example_inputs([(s.shape, s.dtype) for s in artifact.inputs], seed=context.seed)
        before = describe_layers(model, examples)
        if is_stateful(artifact.inputs):
            log.info(
                "states keep their size: distill a student with state_shapes to make them smaller"
            )
        pruned, done = prune_in_steps(
            model,
            examples,
            self,
            cost=self._cost(examples, context),
            seed=context.seed,
            data=samples(self.data) if self.importance == "taylor" else None,
            training=samples(self.finetune.data) if self.finetune else None,
            training_validation=samples(self.finetune.validation) if self.finetune else None,
            validation=samples(self.validation),
            whole=functools.partial(
                unrolled,
                artifact=artifact,
                # the labels of any of them tell whether each step is judged
                data=next((samples(name) for name in self.data_names()), None),
                back_steps=self.finetune.back_steps if self.finetune else 0,
            ),
            checkpoint=context.checkpoint,
        )
        folder = context.work_dir / "model"
        facts = save_result(
            before,
            pruned,
            folder,
            dataclasses.replace(description, edits=(*description.edits, *done.edits)),
            examples,
            stage=self.name,
            notes=done.notes(),
        )
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts={
                **facts,
                "channels": done.channels,
                "heads": done.heads,
                "left_whole": done.left_whole,
                "steps": done.steps,
                "epochs": [epoch for step in done.steps for epoch in step.get("epochs", ())],
                "stopped": done.stopped,
                "target": done.target,
            },
        )

    def _cost(self, examples: Any, context: StageContext) -> Callable[[Any], float]:
        """What ``target`` limits, of a model; its MACs without a target."""
        from edgepipe.torch_ops.result import describe_layers, totals

        if self.target is not None and self.target.latency:
            from edgepipe.op_table import estimate_layers, load_op_table
            from edgepipe.profile import find_profile
            from edgepipe.resources import profile_paths

            profile = find_profile(self.target.profile, profile_paths())
            table = load_op_table(context.store, profile)
            log.info("latency goes by the %s operators of %s", table.source, table.profile)
            return lambda model: estimate_layers(describe_layers(model, examples), table).latency_s
        metric = self.target.metric if self.target is not None else "macs"
        return lambda model: totals(describe_layers(model, examples))[metric]
