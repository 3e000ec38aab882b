"""`low_rank`: put chains of smaller layers in the place of large ones, where that costs less."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.data import at_most
from edgepipe.errors import StageOptionError
from edgepipe.schema import Unit, record
from edgepipe.stage import StageContext
from edgepipe.state import data_inputs

if TYPE_CHECKING:
    from torch import nn

    from edgepipe.op_table import OpTable

log = logging.getLogger(__name__)


@record
class LowRank:
    """Options of the stage.

    Linear layers and 1x1 convolutions are split in two by singular values, kxk convolutions by
    ``method``: ``tucker`` (1x1, kxk, 1x1) or ``cp`` (1x1, kx1, 1xk, 1x1). Ranks come from one of:
    ``energy``, the share of each kernel's squared norm to keep, like 0.95; ``macs``, the share of the
    model's MACs to get down to; ``max_drop``, the accuracy on ``validation`` that all layers together
    may lose, like ``"1 point"``; or, with none, variational Bayes. With ``validation`` and ``macs`` the
    layers that lose least accuracy give most. ``data`` names samples, without labels, whose answers
    are to change least; without it, it is the weights that are. Ranks are multiples of ``round_to``
    where a layer is wide enough. A layer that would cost more MACs, or more time on the board that
    ``profile`` names, stays as it is, and so do those that a pattern in ``ignore`` matches.
    """

    name: ClassVar[str] = "low_rank"
    title: ClassVar[str] = "split layers into cheaper ones of low rank"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.torch_ops.low_rank", "edgepipe.torch_ops.factors", "edgepipe.torch_ops.run", "edgepipe.torch_ops.model",
        "edgepipe.torch_ops.edits", "edgepipe.torch_ops.attention", "edgepipe.torch_ops.result", "edgepipe.torch_ops.train",
        "edgepipe.torch_ops.data", "edgepipe.torch_ops.sequences", "edgepipe.array_ops", "edgepipe.state", "edgepipe.op_table",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "tensorly", "numpy", "safetensors")

    method: Literal["tucker", "cp"] = "tucker"
    energy: float = 0.0
    macs: float = 0.0
    max_drop: Annotated[float, Unit("points")] = 0.0
    data: str = ""
    samples: int = 200
    validation: str = ""
    profile: str = ""
    round_to: int = 8
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [n for n in ("energy", "macs", "max_drop") if getattr(self, n)]
        if len(given) > 1:
            raise StageOptionError(
                f"low_rank: {' and '.join(given)} contradict each other", hint="give one of them"
            )
        if not 0 <= self.energy < 1 or not 0 <= self.macs < 1 or self.max_drop < 0:
            raise StageOptionError(
                "low_rank: energy and macs are shares between 0 and 1, max_drop is above 0 points",
                hint='energy = 0.95, or macs = 0.5, or max_drop = "1 point"',
            )
        if self.max_drop and not self.validation:
            raise StageOptionError(
                "low_rank: max_drop needs validation data", hint='validation = "NAME of a [data] table"'
            )  # fmt: skip
        if self.round_to < 1:
            raise StageOptionError(f"low_rank: round_to {self.round_to} is below 1")

    def data_names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.data, self.validation) if name)

    def profiles(self) -> tuple[str, ...]:
        return (self.profile,) if self.profile else ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The model with its layers split; loaded again at once, it must give the same outputs."""
        from edgepipe.array_ops.load import load_samples
        from edgepipe.op_table import estimate_layers, gain_note
        from edgepipe.torch_ops.data import training_set
        from edgepipe.torch_ops.low_rank import apply_low_rank, plan_low_rank
        from edgepipe.torch_ops.model import load_model, read_description
        from edgepipe.torch_ops.result import describe_layers, save_result
        from edgepipe.torch_ops.run import example_inputs
        from edgepipe.torch_ops.sequences import unrolled
        from edgepipe.torch_ops.train import accuracy

        model = load_model(artifact.path)
        description = read_description(artifact.path)
        examples = example_inputs([(s.shape, s.dtype) for s in artifact.inputs], seed=context.seed)
        data = None
        if self.validation:
            data = training_set(context.data[self.validation], artifact.inputs)
        samples = None
        if self.data:
            source = at_most(context.data[self.data], self.samples)
            loaded = load_samples(source, artifact.inputs)
            samples = [loaded.inputs[spec.name] for spec in data_inputs(artifact.inputs)]

        def whole(step: nn.Module) -> nn.Module:
            return unrolled(step, artifact, data)

        table = self._table(context)
        by_score = data is not None and bool(self.macs or self.max_drop)
        plan = plan_low_rank(
            model,
            examples,
            method=self.method,
            energy=self.energy,
            share=self.macs,
            max_drop=self.max_drop,
            round_to=self.round_to,
            ignore=self.ignore,
            samples=samples,
            whole=whole,
            seconds=(lambda layers: estimate_layers(layers, table).latency_s) if table else None,
            score=(lambda candidate: accuracy(whole(candidate), data))
            if data and by_score
            else None,
        )
        split = apply_low_rank(model, examples, plan, samples=samples, whole=whole)
        facts: dict[str, Any] = {}
        if data is not None:
            facts["accuracy"] = {
                "before": accuracy(whole(model), data),
                "after": accuracy(whole(split), data),
            }
            log.info(
                "accuracy on %s: %.2f %% before, %.2f %% after, before any training", self.validation,
                100 * facts["accuracy"]["before"], 100 * facts["accuracy"]["after"],
            )  # fmt: skip
        notes = {name: f"left alone: it {why}" for name, why in plan.left_alone.items()}
        for name, s in plan.splits.items():
            ranks = "x".join(str(rank) for rank in s.ranks)
            notes[f"{name}.0"] = f"{s.method} rank {ranks}: {100 * s.energy:.1f} % of the energy, {100 * s.macs / s.was:.0f} % of the MACs"  # fmt: skip
        folder = context.work_dir / "model"
        facts |= save_result(
            describe_layers(model, examples),
            split,
            folder,
            dataclasses.replace(description, edits=(*description.edits, *plan.edits())),
            examples,
            stage=self.name,
            notes=notes,
        )
        if table is not None:
            was, now = (
                estimate_layers(describe_layers(m, examples), table) for m in (model, split)
            )
            facts["latency"] = {
                "before_s": was.latency_s,
                "after_s": now.latency_s,
                "told": now.text(),
            }
            log.info("int8 latency: %s before, %s after", was.text(), now.text())
            gain = gain_note(was, now)
            if gain:
                log.warning("%s", gain)
        facts["ranks"] = {name: dataclasses.asdict(s) for name, s in plan.splits.items()}
        facts["left_alone"] = plan.left_alone
        return make_artifact(
            "torch",
            folder,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts=facts,
        )

    def _table(self, context: StageContext) -> OpTable | None:
        from edgepipe.op_table import load_op_table
        from edgepipe.profile import find_profile
        from edgepipe.resources import profile_paths

        if not self.profile:
            return None
        return load_op_table(context.store, find_profile(self.profile, profile_paths()))
