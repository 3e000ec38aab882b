"""Training, repeatable from a seed, resumable to the bit, on one CPU or GPU.

Every stage that trains (finetune, distill, qat, sparsify, iterative pruning) is this loop with an
objective of its own, and at times a hook after each step.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepipe.errors import DataError, NotReadyError, StageError
from edgepipe.torch_ops.augment import check_augmentation, mixed, view
from edgepipe.torch_ops.edits import sparse_weights
from edgepipe.torch_ops.run import call_model
from edgepipe.torch_ops.sequences import stepped
from edgepipe.training import TrainingOptions

log = logging.getLogger(__name__)

EVALUATION_BATCH = 256
LOG_EVERY_S = 2.0


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Mean loss and share of right answers while training, and the validation score where there is one."""

    loss: float
    accuracy: float
    validation_accuracy: float | None = None
    lr: float = 0.0


class TrainingSet(Protocol):
    """Samples by number. ``batch`` gives input tensors (B, ...) in call order, and labels (B, ...) int64."""

    def __len__(self) -> int: ...

    def batch(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]: ...


class ArraySet:
    """A training set in memory: inputs (N, ...) in call order, labels (N,) or (N, H, W)."""

    def __init__(self, inputs: Sequence[np.ndarray], labels: np.ndarray) -> None:
        self.inputs = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs]
        self.labels = torch.from_numpy(np.ascontiguousarray(labels))
        if labels.dtype.kind not in "iu":
            raise DataError(
                f"the labels are {labels.dtype}: class numbers are needed",
                hint="give one whole number for each sample",
            )
        self.labels = self.labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return [t[rows] for t in self.inputs], self.labels[rows]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What an objective is given. ``partner`` and ``weight`` say how mixup mixed the samples.

    ``rows`` (B,) are numbers of samples, ``view`` which variation of the data they are seen in, or
    -1 where samples are as they were; ``step`` of ``total`` counts from 0.
    """

    model: nn.Module
    inputs: list[torch.Tensor]
    target: torch.Tensor
    rows: torch.Tensor
    view: int
    step: int
    total: int
    partner: torch.Tensor | None = None
    weight: float = 1.0


# -> (loss, class scores of the batch)
Objective = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Softmax cross-entropy with the labels, mixed as the samples are."""

    def objective(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        output = call_model(batch.model, batch.inputs)[0]
        return hard_loss(output, batch, label_smoothing), output

    return objective


def hard_loss(output: torch.Tensor, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of class scores (B, C, ...) with a batch's labels."""
    loss = functional.cross_entropy(output, batch.target, label_smoothing=label_smoothing)
    if batch.partner is None:
        return loss
    other = functional.cross_entropy(
        output, batch.target[batch.partner], label_smoothing=label_smoothing
    )
    return batch.weight * loss + (1 - batch.weight) * other


def pick_device(wanted: str) -> torch.device:
    """``auto`` = the GPU where there is one. Raises NotReadyError where a demanded one is missing."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise NotReadyError(
            "device = 'cuda' was asked for, but PyTorch finds no GPU",
            hint="use device = 'auto', or install a PyTorch with CUDA",
            code="no-gpu",
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    data: TrainingSet,
    options: TrainingOptions,
    *,
    seed: int,
    stage: str,
    validation: TrainingSet | None = None,
    objective: Objective | None = None,
    extra: nn.Module | None = None,
    after_step: Callable[[int, int], None] | None = None,
    checkpoint: Path | None = None,
    views: int = 0,
) -> list[Epoch]:
    """Train ``model`` in place; it is left on the CPU in evaluation mode.

    ``objective`` gives the loss (default: softmax cross-entropy), ``extra`` holds parameters that
    are trained beside the model's and thrown away, ``after_step(step, total)`` runs after each step
    of the optimiser. The learning rate is warmed up, then (``cosine``) lowered to 0 over all steps
    (Loshchilov & Hutter 2017, eq. 5, no restarts). ``checkpoint`` is a file that the state is saved
    in now and then, and that training goes on from where it exists; it is left for the caller to
    remove. ``views`` is how many variations of the data there are, taken in turn (0: another in
    every epoch). Zero weights of layers that a ``sparse`` edit marked stay zero. Same seed, data, options
    and thread count give the same weights, stopped or not.

    Raises DataError where labels do not fit the outputs, StageError where the loss is not finite: the
    weights after the last whole epoch are then kept beside ``checkpoint``, as a state dict.
    """
    device = pick_device(options.device)
    loop = _Loop(model, data, options, seed, stage, validation, objective, extra, after_step, device, views)  # fmt: skip
    if checkpoint is not None and checkpoint.exists():
        loop.load(checkpoint)
    with torch.random.fork_rng(devices=[]):
        try:
            loop.run(checkpoint)
        finally:
            model.to("cpu").eval()
    return loop.history


class _Loop:
    def __init__(
        self, model: nn.Module, data: TrainingSet, options: TrainingOptions, seed: int, stage: str,
        validation: TrainingSet | None, objective: Objective | None, extra: nn.Module | None,
        after_step: Callable[[int, int], None] | None, device: torch.device, views: int,
    ) -> None:  # fmt: skip
        self.model, self.data, self.options, self.seed, self.stage = model, data, options, seed, stage  # fmt: skip
        self.validation, self.after_step, self.device, self.views = (
            validation,
            after_step,
            device,
            views,
        )
        self.objective = objective or cross_entropy(options.label_smoothing)
        self.extra = extra if extra is not None else nn.Module()
        check_labels(model, data, "training", stage)
        check_augmentation(options.augment, data.batch(torch.arange(1))[0])
        if validation is not None:
            check_labels(model, validation, "validation", stage)
        model.to(device)
        self.extra.to(device)
        parameters = [p for m in (model, self.extra) for p in m.parameters() if p.requires_grad]
        self.parameters = parameters
        self.method: torch.optim.Optimizer
        if options.optimizer == "adamw":
            self.method = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)  # fmt: skip
        else:
            self.method = torch.optim.SGD(
                parameters, lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
            )  # fmt: skip
        count, size = len(data), options.batch_size
        # a last batch of one sample has no variance, which batch normalisation divides by
        self.starts = [s for s in range(0, count, size) if count - s > 1 or count == 1]
        self.total = options.epochs * len(self.starts)
        self.sparse = sparse_weights(model)
        self.average = _Average(model, options.ema) if options.ema else None
        self.best: dict[str, torch.Tensor] | None = None
        self.best_score, self.since_best = -math.inf, 0
        self.history: list[Epoch] = []
        self.good: dict[str, torch.Tensor] | None = None  # weights after the last whole epoch
        self.checkpoint: Path | None = None
        self.epoch, self.position = 1, 0  # where to go on: epoch, and index into starts
        self.sums = (0.0, 0.0, 0)  # of this epoch: loss, right answers, samples
        # on the CPU 16-bit arithmetic is slower and less exact, so only a GPU mixes precisions
        self.mixed = device.type == "cuda"
        torch.manual_seed(seed)
        self.rng = torch.get_rng_state()

    def run(self, checkpoint: Path | None) -> None:
        options, self.checkpoint = self.options, checkpoint
        torch.set_rng_state(self.rng)
        began = said = saved = time.monotonic()
        first = started = self.done()
        while self.epoch <= options.epochs:
            self.model.train()
            order = torch.randperm(len(self.data), generator=self.generator(self.epoch))
            variation = view(
                options.augment, len(self.data), seed=self.seed, number=self.view_number()
            )
            while self.position < len(self.starts):
                start = self.starts[self.position]
                self.step(order[start : start + options.batch_size], variation)
                self.position += 1
                now = time.monotonic()
                due = now - saved > options.checkpoint_every
                if checkpoint is not None and due and self.is_finite():
                    self.save(checkpoint)
                    saved = now
                if now - said > LOG_EVERY_S and self.position < len(self.starts):
                    said = now
                    left = (now - began) * (self.total - self.done()) / (self.done() - first)
                    percent = 100 * self.position // len(self.starts)
                    log.info("epoch %d/%d, %d %%: loss %.4f, %.0f s left", self.epoch, options.epochs, percent, self.sums[0] / self.sums[2], left)  # fmt: skip
                if self.done() == started + 1:  # it may have asked a teacher about everything
                    began, first = now, started + 1
            self.end_epoch()
            now = time.monotonic()
            if now - said > LOG_EVERY_S or self.epoch in (1, options.epochs):
                said = now
                left = (now - began) * (self.total - self.done()) / max(1, self.done() - first)
                last = self.history[-1]
                score = last.validation_accuracy
                log.info(
                    "epoch %d/%d: loss %.4f, train %.1f %%%s, %.0f s left", self.epoch, options.epochs, last.loss,
                    100 * last.accuracy, "" if score is None else f", validation {100 * score:.1f} %", left,
                )  # fmt: skip
            self.epoch, self.position, self.sums = self.epoch + 1, 0, (0.0, 0.0, 0)
            if options.early_stop and self.since_best >= options.early_stop:
                log.info("no better validation score for %d epochs: stopping", self.since_best)
                break
        if self.best is not None:
            self.model.load_state_dict(self.best)
        elif self.average is not None:
            self.average.copy_to(self.model)

    def step(self, rows: torch.Tensor, variation: Any) -> None:
        options, step = self.options, self.done()
        for group in self.method.param_groups:
            group["lr"] = options.lr * self.rate(step)
        inputs, target = self.data.batch(rows)
        if variation is not None:
            inputs = variation.apply(inputs, rows)
        partner, weight = None, 1.0
        if options.augment.mixup:
            draw = self.generator(self.epoch * 1_000_003 + self.position + 1)
            inputs, partner, weight = mixed(inputs, options.augment.mixup, draw)
        inputs = [t.to(self.device) for t in inputs]
        target = target.to(self.device)
        batch = Batch(
            self.model, inputs, target, rows, self.view_number() if variation is not None else -1,
            step, self.total, partner, weight,
        )  # fmt: skip
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed):
            loss, output = self.objective(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise self.diverged(f"the loss became {value} in epoch {self.epoch}, batch {self.position + 1} of {len(self.starts)}")  # fmt: skip
        self.method.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if options.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, options.clip_norm)
        kept = [(p, p.detach() != 0) for p in self.sparse.values()]
        self.method.step()
        with torch.no_grad():
            for parameter, mask in kept:
                parameter.mul_(mask)
        if self.after_step is not None:
            self.after_step(step, self.total)
        if self.average is not None:
            self.average.update(self.model, self.sparse)
        right = (output.detach().argmax(1) == target).float().mean().item()
        size = len(rows)
        self.sums = (self.sums[0] + value * size, self.sums[1] + right * size, self.sums[2] + size)

    def diverged(self, what: str) -> StageError:
        """The error, with the weights of the last whole epoch kept where there is one."""
        hint = f"lower lr (now {self.options.lr:g}), set clip_norm = 1.0, or check the training data for wrong scaling"  # fmt: skip
        kept = "nothing of this stage was kept"
        if self.good and self.checkpoint is not None:
            path = self.checkpoint.with_name(f"{self.checkpoint.name}-last-good.pth")
            write_state(self.good, path)
            kept = f"the weights after epoch {self.epoch - 1} are kept in {path}"
        return StageError(f"{what}; {kept}", stage=self.stage, hint=hint, code="diverged")

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.parameters)

    def end_epoch(self) -> None:
        if not self.is_finite():  # the loss of the last batch was that of the weights before it
            raise self.diverged(f"weights became nan or infinite in the last batch of epoch {self.epoch}")  # fmt: skip
        if self.checkpoint is not None:
            self.good = _state(stepped(self.model))
        score = None
        if self.validation is not None:
            kept = None
            if self.average is not None:
                kept = _state(self.model)
                self.average.copy_to(self.model)
            score = accuracy(self.model, self.validation, self.device)
            if self.options.early_stop:
                if score > self.best_score:
                    self.best_score, self.since_best, self.best = score, 0, _state(self.model)
                else:
                    self.since_best += 1
            if kept is not None:
                self.model.load_state_dict(kept)
        loss, right, seen = self.sums
        rate = self.options.lr * self.rate(self.done() - 1)
        self.history.append(Epoch(loss / seen, right / seen, score, rate))

    def view_number(self) -> int:
        """Which variation of the data this epoch sees, from 1."""
        return (self.epoch - 1) % self.views + 1 if self.views else self.epoch

    def done(self) -> int:
        """Steps that are behind us."""
        return (self.epoch - 1) * len(self.starts) + self.position

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of ``lr``."""
        ramp = self.options.warmup * len(self.starts)
        if step < ramp:
            return (step + 1) / (ramp + 1)
        if self.options.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1.0, self.total - ramp)))

    def generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 2_147_483_659 % 2**62 + number)

    def save(self, path: Path) -> None:
        """Everything that decides what comes next, in one file that appears by one rename."""
        state = {
            "model": self.model.state_dict(), "extra": self.extra.state_dict(),
            "method": self.method.state_dict(), "best": self.best or {}, "good": self.good or {},
            "average": self.average.state if self.average else {},
            "best_score": self.best_score, "since_best": self.since_best,
            "epoch": self.epoch, "position": self.position, "sums": list(self.sums),
            "history": [dataclasses.astuple(e) for e in self.history],
            "rng": torch.get_rng_state(),
        }  # fmt: skip
        write_state(state, path)

    def load(self, path: Path) -> None:
        """Go on where `save` was. What is no whole checkpoint of this training is ignored, and said."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.extra.load_state_dict(state["extra"])
            self.method.load_state_dict(state["method"])
        except Exception as exc:
            raise StageError(
                f"cannot go on from checkpoint {path}: {str(exc).splitlines()[0][:200]}",
                stage=self.stage,
                hint=f"remove it to train from the beginning: rm {path}",
                code="bad-checkpoint",
            ) from exc
        self.best, self.good = state["best"] or None, state["good"] or None
        if self.average is not None:
            self.average.state = {k: v.to(self.device) for k, v in state["average"].items()}
        self.best_score, self.since_best = state["best_score"], state["since_best"]
        self.epoch, self.position, self.rng = state["epoch"], state["position"], state["rng"]
        self.sums = (state["sums"][0], state["sums"][1], state["sums"][2])
        self.history = [Epoch(*values) for values in state["history"]]
        log.info("going on at epoch %d/%d, batch %d", self.epoch, self.options.epochs, self.position + 1)  # fmt: skip


class _Average:
    """Exponential moving average of a model's parameters; buffers are those of the model.

    The decay starts low, min(decay, (1 + n) / (10 + n)) at step n, so that a short training is not
    an average with its random start (as TensorFlow's ExponentialMovingAverage does).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.state["_steps"] = torch.zeros(())

    def update(self, model: nn.Module, sparse: Mapping[str, nn.Parameter]) -> None:
        steps = float(self.state["_steps"])
        decay = min(self.decay, (1 + steps) / (10 + steps))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self.state[name].lerp_(parameter, 1 - decay)
            for name, parameter in sparse.items():  # an average with what was cut away is not zero
                self.state[name].mul_(parameter != 0)
        self.state["_steps"] += 1

    def copy_to(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.state[name])


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all. Raises OSError where there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part.{os.getpid()}")
    try:
        with part.open("wb") as stream:  # given a path, PyTorch tells no errno
            torch.save(state, stream)
        part.replace(path)
    except RuntimeError as exc:
        if isinstance(exc.__context__, OSError):  # upon which PyTorch's own clean-up fails
            raise exc.__context__ from None
        raise
    finally:
        part.unlink(missing_ok=True)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def check_labels(model: nn.Module, data: TrainingSet, what: str, stage: str) -> None:
    """Labels against the outputs of the model, before long work starts."""
    model.eval()
    if not len(data):
        raise DataError(f"the {what} data is empty", hint="check its path and its limit")
    inputs, first = data.batch(torch.arange(1))
    with torch.no_grad():
        outputs = call_model(model, inputs)
    if len(outputs) != 1:
        raise StageError(
            f"the model has {len(outputs)} outputs; cross-entropy needs one, of class scores",
            stage=stage,
            hint='train it in your own function: trainer = "file.py:function"',
        )
    scores = outputs[0]
    classes = scores.shape[1] if scores.ndim > 1 else 0
    if not classes or first.shape[1:] != scores.shape[2:]:
        needed = ", ".join(map(str, ("samples", *scores.shape[2:])))
        each = " and place that has scores (of a sequence: each step, or one for all of it)"
        raise DataError(
            f"the {what} labels are {tuple(first.shape[1:])} for each sample, the model gives scores "
            f"{tuple(scores.shape)}: class numbers of shape ({needed}) are needed",
            hint=f"give one whole number for each sample{each if scores.ndim > 2 else ''}",
        )
    low, high = _label_range(data)
    if low < 0 or high >= classes:
        raise DataError(
            f"the {what} labels run from {low} to {high}, but the model has {classes} classes",
            hint=f"use labels 0 to {classes - 1}, or give the model {high + 1} outputs",
        )


def _label_range(data: TrainingSet) -> tuple[int, int]:
    if isinstance(data, ArraySet):
        return int(data.labels.min()), int(data.labels.max())
    # reading all of a dataset from disk only for its labels would take as long as an epoch
    labels = data.batch(torch.linspace(0, len(data) - 1, min(64, len(data))).long())[1]
    return int(labels.min()), int(labels.max())


def batches(data: TrainingSet, size: int = EVALUATION_BATCH) -> Iterator[torch.Tensor]:
    """Row numbers of all samples, in order, ``size`` at a time."""
    for start in range(0, len(data), size):
        yield torch.arange(start, min(start + size, len(data)))


def accuracy(model: nn.Module, data: TrainingSet, device: torch.device | str = "cpu") -> float:
    """Share of samples (or pixels) whose highest score is the label's; evaluation mode."""
    model.eval()
    right = 0.0
    with torch.no_grad():
        for rows in batches(data):
            inputs, target = data.batch(rows)
            output = call_model(model, [t.to(device) for t in inputs])[0]
            right += (output.argmax(1) == target.to(device)).float().mean().item() * len(rows)
    return right / len(data)
