"""Options that every training stage shares: finetune, distill, qat, sparsify, iterative prune."""

from __future__ import annotations

from typing import Annotated, Literal

from edgepipe.errors import StageOptionError
from edgepipe.schema import Unit, record


@record
class Augmentation:
    """How training samples are varied, ``augment = { flip = true, shift = 2 }``; nothing by default.

    For images (N, C, H, W) and spectrograms (N, 1, time, frequency): ``flip`` mirrors the last axis
    of half of the samples; ``shift`` moves each by up to so many pixels on both axes, filling with
    its edge; ``mask_time`` and ``mask_frequency`` blank one stripe of up to so many steps of the
    third and the last axis (SpecAugment, Park et al. 2019, without warping). For any input: ``noise``
    adds a normal deviate of this standard deviation; ``mixup`` mixes pairs of samples and of labels
    with weights from Beta(a, a) (Zhang et al. 2018).
    """

    flip: bool = False
    shift: int = 0
    mask_time: int = 0
    mask_frequency: int = 0
    noise: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if min(self.shift, self.mask_time, self.mask_frequency, self.noise, self.mixup) < 0:
            raise StageOptionError(
                "augment: no value may be below 0", hint="leave out what is not wanted"
            )


@record
class TrainingOptions:
    """How a model is trained; ``data`` and ``validation`` are names of data sets with labels.

    ``warmup`` raises the learning rate linearly over so many epochs (a fraction is fine), then
    ``schedule`` takes over. ``clip_norm`` bounds the gradient's norm (0: not). ``ema`` keeps a moving
    average of the weights with this decay, like 0.999, which is what comes out (0: off).
    ``back_steps`` is for models with state: through how many steps of a sequence gradients go back (0: all).
    ``early_stop`` ends training after so many epochs without a better validation score, and keeps
    the best epoch (0: off, the last epoch is kept). Every ``checkpoint_every`` the state is saved, so
    that the same command goes on there after Ctrl-C or a kill. ``device`` ``auto`` is the GPU where
    there is one, with mixed precision.
    """

    data: str = "train"
    validation: str = ""
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    back_steps: int = 0
    ema: float = 0.0
    early_stop: int = 0
    augment: Augmentation = Augmentation()
    checkpoint_every: Annotated[float, Unit("time")] = 120.0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        problems = []
        if self.epochs < 1 or self.batch_size < 1:
            problems.append("epochs and batch_size are at least 1")
        if not self.lr > 0 or self.weight_decay < 0 or self.clip_norm < 0:
            problems.append("lr is above 0, weight_decay and clip_norm are not below 0")
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.ema < 1:
            problems.append("label_smoothing and ema are at least 0 and below 1")
        if not 0 <= self.warmup <= self.epochs:
            problems.append("warmup is from 0 to epochs")
        if self.back_steps < 0:
            problems.append("back_steps is not below 0")
        if self.early_stop < 0 or (self.early_stop and not self.validation):
            problems.append("early_stop is at least 0 and needs validation data")
        if self.checkpoint_every <= 0:
            problems.append("checkpoint_every is above 0 s")
        if problems:
            raise StageOptionError(f"{'; '.join(problems)}", hint="mend these options")

    def data_names(self) -> tuple[str, ...]:
        return (self.data, self.validation) if self.validation else (self.data,)
