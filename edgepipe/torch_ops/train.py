"""Supervised training on the CPU, repeatable from a seed."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepipe.errors import DataError, StageError
from edgepipe.torch_ops.run import call_model

log = logging.getLogger(__name__)

STAGE = "finetune"
EVALUATION_BATCH = 256
LOG_EVERY_S = 2.0


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Mean loss and share of right answers while training, and on the validation data where given."""

    loss: float
    accuracy: float
    validation_accuracy: float | None = None


def train(
    model: nn.Module,
    inputs: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    optimizer: Literal["adamw", "sgd"],
    lr: float,
    weight_decay: float,
    schedule: Literal["cosine", "constant"],
    label_smoothing: float,
    seed: int,
    validation: tuple[Sequence[np.ndarray], np.ndarray] | None = None,
) -> list[Epoch]:
    """Train ``model`` in place with softmax cross-entropy; it is left in evaluation mode.

    ``inputs`` are arrays (N, ...) in the order of forward's arguments, ``labels`` (N,) class
    numbers, or (N, H, W) where the model gives (N, C, H, W). ``schedule`` ``cosine`` lowers the
    learning rate from ``lr`` to 0 over all steps (Loshchilov & Hutter 2017, eq. 5, no restarts).
    Order and dropout come from ``seed``; the same seed, data and thread count give the same weights.
    Raises DataError where labels do not fit the outputs, StageError where the loss is not finite.
    """
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs]
    targets = _targets(model, tensors, labels, "training")
    held_out = None
    if validation is not None:
        held_out = [torch.from_numpy(np.ascontiguousarray(a)) for a in validation[0]]
        held_out.append(_targets(model, held_out, validation[1], "validation"))
    count = len(targets)
    # a last batch of one sample has no variance, which batch normalisation divides by
    starts = [s for s in range(0, count, batch_size) if count - s > 1 or count == 1]
    parameters = [p for p in model.parameters() if p.requires_grad]
    method: torch.optim.Optimizer
    if optimizer == "adamw":
        method = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    else:
        method = torch.optim.SGD(
            parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )
    total = epochs * len(starts)
    factor = (lambda step: 0.5 * (1 + math.cos(math.pi * step / total))) if schedule == "cosine" else (lambda step: 1.0)  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(method, factor)
    order = torch.Generator().manual_seed(seed)
    history: list[Epoch] = []
    began = said = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            shuffled = torch.randperm(count, generator=order)
            loss_sum, right, seen = 0.0, 0.0, 0
            for batch, start in enumerate(starts, 1):
                chosen = shuffled[start : start + batch_size]
                target = targets[chosen]
                output = call_model(model, [t[chosen] for t in tensors])[0]
                loss = functional.cross_entropy(output, target, label_smoothing=label_smoothing)
                value = loss.item()
                if not math.isfinite(value):
                    raise StageError(
                        f"the loss became {value} in epoch {epoch}, batch {batch}; nothing was kept",
                        stage=STAGE,
                        hint=f"lower lr (now {lr:g}), or check the training data for wrong scaling",
                        code="diverged",
                    )
                method.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                method.step()
                scheduler.step()
                loss_sum += value * len(chosen)
                right += (output.detach().argmax(1) == target).float().mean().item() * len(chosen)
                seen += len(chosen)
                now = time.monotonic()
                if now - said > LOG_EVERY_S and batch < len(starts):
                    said = now
                    done = (epoch - 1) * len(starts) + batch
                    left = (now - began) * (total - done) / done
                    log.info("epoch %d/%d, %d %%: loss %.4f, %.0f s left", epoch, epochs, 100 * batch // len(starts), loss_sum / seen, left)  # fmt: skip
            accuracy = _accuracy(model, held_out[:-1], held_out[-1]) if held_out else None
            history.append(Epoch(loss_sum / seen, right / seen, accuracy))
            now = time.monotonic()
            if now - said > LOG_EVERY_S or epoch in (1, epochs):
                said = now
                left = (now - began) * (epochs - epoch) / epoch
                log.info(
                    "epoch %d/%d: loss %.4f, train %.1f %%%s, %.0f s left", epoch, epochs, history[-1].loss,
                    100 * history[-1].accuracy, "" if accuracy is None else f", validation {100 * accuracy:.1f} %", left,
                )  # fmt: skip
    model.eval()
    return history


def _targets(
    model: nn.Module, inputs: list[torch.Tensor], labels: np.ndarray, what: str
) -> torch.Tensor:
    """Labels as int64, checked against one output of the model."""
    model.eval()
    with torch.no_grad():
        outputs = call_model(model, [t[:1] for t in inputs])
    if len(outputs) != 1:
        raise StageError(
            f"the model has {len(outputs)} outputs; cross-entropy needs one, of class scores",
            stage=STAGE,
            hint="train it in your own code and load its weights",
        )
    classes, wanted = outputs[0].shape[1] if outputs[0].ndim > 1 else 0, outputs[0].shape[2:]
    shape = labels.shape[1:]
    if labels.dtype.kind not in "iu" or not classes or tuple(shape) != tuple(wanted):
        raise DataError(
            f"the {what} labels are {labels.dtype} {labels.shape}, the model gives scores "
            f"{tuple(outputs[0].shape)}: class numbers {('N', *wanted)} are needed",
            hint="give one whole number for each sample",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"the {what} labels run from {low} to {high}, but the model has {classes} classes",
            hint=f"use labels 0 to {classes - 1}, or give the model {high + 1} outputs",
        )
    return torch.from_numpy(labels.astype(np.int64))


def _accuracy(model: nn.Module, inputs: Sequence[torch.Tensor], targets: torch.Tensor) -> float:
    model.eval()
    right = 0.0
    with torch.no_grad():
        for start in range(0, len(targets), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            output = call_model(model, [t[part] for t in inputs])[0]
            target = targets[part]
            right += (output.argmax(1) == target).float().mean().item() * len(target)
    return right / len(targets)
