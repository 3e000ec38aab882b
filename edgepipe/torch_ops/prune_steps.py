"""Pruning in steps: remove some, train, look at the validation score, and so on."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgepipe.errors import StageError
from edgepipe.pruning import PruningOptions
from edgepipe.torch_ops.edits import apply_edits
from edgepipe.torch_ops.prune import NEAR, STAGE, Cost, plan_pruning
from edgepipe.torch_ops.sequences import Whole, as_is
from edgepipe.torch_ops.train import TrainingSet, accuracy, train, write_state

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """What has been done to a model: all of it is plain data, kept in the checkpoint after each step.

    ``channels`` and ``heads`` are [before, after] of each group that was cut; ``steps`` say for each
    step its cost, scores and training epochs; ``stopped`` why there were not more; ``target`` its
    metric, the most that was allowed and what was reached.
    """

    edits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    channels: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    heads: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    left_whole: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stopped: str = ""
    target: dict[str, Any] = dataclasses.field(default_factory=dict)

    def notes(self) -> dict[str, str]:
        """What was done to each layer, for people."""
        notes = {name: f"left whole: it {why}" for name, why in self.left_whole.items() if name not in self.channels}  # fmt: skip
        notes |= {name: f"{was} -> {now} channels" for name, (was, now) in self.channels.items()}
        return notes | {name: f"{was} -> {now} heads" for name, (was, now) in self.heads.items()}


def prune_in_steps(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    options: PruningOptions,
    *,
    cost: Cost,
    seed: int,
    data: TrainingSet | None = None,
    training: TrainingSet | None = None,
    training_validation: TrainingSet | None = None,
    validation: TrainingSet | None = None,
    checkpoint: Path | None = None,
    whole: Whole = as_is,
) -> tuple[nn.Module, Progress]:
    """The pruned model (a copy, in evaluation mode) and what was done.

    ``cost`` is what ``options.target`` limits: it falls by equal parts, as ``ratio`` rises without a
    target. ``data`` is for Taylor importance, ``training`` (and its validation) for ``finetune``,
    ``validation`` for ``max_drop``: samples of ``whole`` of the model. ``checkpoint`` is a file that the state is kept in after each
    step, and that pruning goes on from where it exists.

    Raises StageError where nothing can be pruned, or the first step already loses too much.
    """
    model = copy.deepcopy(model).eval()
    progress = Progress()
    start = accuracy(whole(model), validation) if validation is not None else None
    before = cost(model)
    most = 0.0
    if options.target is not None:
        most = options.target.value * (before if options.target.is_share else 1)
    if checkpoint is not None and checkpoint.exists():
        model, progress = _load(checkpoint, model)
        log.info("going on after step %d/%d", len(progress.steps), options.steps)
    for number in range(len(progress.steps) + 1, options.steps + 1):
        share = number / options.steps
        limit = (cost, before + (most - before) * share) if options.target is not None else None
        try:
            plan = plan_pruning(
                model, inputs, options, seed=seed, data=data, share=share, limit=limit, whole=whole,
                widths={name: was for name, (was, _) in progress.channels.items()},
            )  # fmt: skip
        except StageError as exc:  # rounding may leave nothing for a small step
            if exc.code != "nothing-to-prune" or options.steps == 1 or (number == options.steps and not progress.edits):  # fmt: skip
                raise
            progress.steps.append({"step": number, "cost": cost(model), "skipped": exc.message})
            continue
        trial = apply_edits(copy.deepcopy(model), plan.edits).eval()
        record: dict[str, Any] = {"step": number, "cost": cost(trial)}
        if validation is not None:
            record["score_pruned"] = accuracy(whole(trial), validation)
        if options.finetune is not None and training is not None:
            part = checkpoint.with_name(f"{checkpoint.name}.training") if checkpoint else None
            history = train(
                whole(trial), training, options.finetune, seed=seed + number, stage=STAGE,
                validation=training_validation, checkpoint=part,
            )  # fmt: skip
            record["epochs"] = [dataclasses.asdict(epoch) for epoch in history]
            if part is not None:
                part.unlink(missing_ok=True)
        if validation is not None and start is not None:
            record["score"] = accuracy(whole(trial), validation)
            _say(number, options.steps, before, start, record)
            if options.max_drop and 100 * (start - record["score"]) > options.max_drop:
                progress.stopped = (
                    f"step {number} of {options.steps} lost {100 * (start - record['score']):.2f} points of accuracy, "
                    f"more than max_drop = {options.max_drop:g}"
                )
                if not progress.edits:
                    raise StageError(
                        f"{progress.stopped}: nothing can be pruned within that",
                        stage=STAGE,
                        hint="prune less in a step (steps), train more after each (finetune), or allow more",
                        code="max-drop",
                    )
                log.info("%s: the step before is kept", progress.stopped)
                break
        model = trial
        progress.edits.extend(plan.edits)
        for old, new in ((progress.channels, plan.channels), (progress.heads, plan.heads)):
            for name, (was, now) in new.items():
                old[name] = [old[name][0] if name in old else was, now]
        progress.left_whole = plan.left_whole
        progress.steps.append(record)
        if checkpoint is not None and number < options.steps:
            _save(checkpoint, model, progress)
    for name, reason in progress.left_whole.items():
        if name not in progress.channels:
            log.info("%s is left whole: it %s", name, reason)
    if options.target is not None:
        reached = cost(model)
        progress.target = {"metric": options.target.metric, "most": most, "reached": reached}
        _say_target(options, most, reached)
    return model, progress


def _say(number: int, steps: int, before: float, start: float, record: dict[str, Any]) -> None:
    log.info(
        "step %d/%d: cost %.1f %%, accuracy %.2f %% -> %.2f %% pruned -> %.2f %%", number, steps,
        100 * record["cost"] / before, 100 * start, 100 * record["score_pruned"], 100 * record["score"],
    )  # fmt: skip


def _say_target(options: PruningOptions, most: float, reached: float) -> None:
    assert options.target is not None
    near = (most - reached) / most
    log.info(
        "target %s: reached %s%s", options.target.text(most), options.target.text(reached),
        f", {100 * near:.1f} % below, since channels go {options.multiple} at a time" if near > NEAR else "",
    )  # fmt: skip


def _save(path: Path, model: nn.Module, progress: Progress) -> None:
    write_state(
        {"progress": json.dumps(dataclasses.asdict(progress)), "model": model.state_dict()}, path
    )


def _load(path: Path, model: nn.Module) -> tuple[nn.Module, Progress]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        progress = Progress(**json.loads(state["progress"]))
        pruned = apply_edits(copy.deepcopy(model), progress.edits)
        pruned.load_state_dict(state["model"])
    except Exception as exc:
        raise StageError(
            f"cannot go on from checkpoint {path}: {str(exc).splitlines()[0][:200]}",
            stage=STAGE,
            hint=f"remove it to prune from the beginning: rm {path}",
            code="bad-checkpoint",
        ) from exc
    return pruned.eval(), progress
