"""Distillation: a student learns from what teachers answer, besides the labels.

The loss of a batch is ``(1 - s) * hard + s * soft + features``, where ``hard`` is the cross-entropy with
the labels, ``soft`` one of `kd_loss` and `dkd_loss`, and ``s`` the soft weight.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from edgepipe.distillation import DistillOptions, Feature
from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.schema import near_miss
from edgepipe.torch_ops.augment import view as view_of
from edgepipe.torch_ops.run import call_model
from edgepipe.torch_ops.sequences import Unrolled, stepped
from edgepipe.torch_ops.train import (
    Batch,
    Epoch,
    Objective,
    TrainingSet,
    batches,
    hard_loss,
    pick_device,
    train,
)
from edgepipe.training import Augmentation

log = logging.getLogger(__name__)


def kd_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence of softened class probabilities, times T^2 (Hinton et al. 2015, section 2).

    Scores are (B, C, ...). T^2 keeps the size of the gradient, which softening divides by it.
    """
    own = functional.log_softmax(student / temperature, dim=1)
    wanted = functional.log_softmax(teacher / temperature, dim=1)
    divergence = functional.kl_div(own, wanted, reduction="none", log_target=True).sum(1)
    return divergence.mean() * temperature**2


def dkd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    *,
    alpha: float,
    beta: float,
) -> torch.Tensor:
    """Decoupled distillation (Zhao et al. 2022, eq. 7): ``alpha * TCKD + beta * NCKD``, times T^2.

    TCKD is the divergence of (right class, all others), NCKD that among the others. `kd_loss` is
    TCKD + (1 - p) NCKD with the teacher's p of the right class: a sure teacher says little there.
    """
    index = target.unsqueeze(1)  # (B, ...) -> (B, 1, ...)
    right = torch.zeros_like(student, dtype=torch.bool).scatter_(1, index, True)

    def parts(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities of (right, others) (B, 2, ...) and among the others (B, C, ...)."""
        softened = functional.log_softmax(scores.float() / temperature, dim=1)
        others = softened.masked_fill(right, -torch.inf)
        all_others = others.logsumexp(1, keepdim=True)
        pair = torch.cat([softened.gather(1, index), all_others], dim=1)
        return pair, (others - all_others).masked_fill(right, 0.0)

    (own_pair, own_others), (pair, others) = parts(student), parts(teacher)
    tckd = functional.kl_div(own_pair, pair, reduction="none", log_target=True).sum(1).mean()
    apart = functional.kl_div(own_others, others, reduction="none", log_target=True)
    nckd = apart.sum(1).mean()  # the right class adds exp(0) * (0 - 0)
    return (alpha * tckd + beta * nckd) * temperature**2


def attention_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Difference of normalised attention maps (Zagoruyko & Komodakis 2017, eq. 2, mean of squares).

    (B, C, H, W) and (B, C', H, W): a map is the mean square over the channels, of length 1.
    """
    maps = [functional.normalize(x.float().pow(2).mean(1).flatten(1)) for x in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


def check_outputs(
    student: nn.Module, teacher: nn.Module, inputs: Sequence[torch.Tensor], *, stage: str
) -> None:
    """Raises StageError unless both take ``inputs`` and give one output of the same shape."""
    shapes = {}
    for who, model in (("student", student), ("teacher", teacher)):
        try:
            with torch.no_grad():
                shapes[who] = [tuple(t.shape) for t in call_model(model.eval(), inputs)]
        except ArtifactError as exc:
            raise StageError(
                f"the {who} cannot take the data: {exc.message}",
                stage=stage,
                hint="the builder of a teacher with state needs state_shapes; without, it takes whole sequences (N, T, ...)"
                if isinstance(student, Unrolled)
                else "teachers and student need the same inputs: check args of the builder",
                code="different-inputs",
            ) from exc
    if shapes["student"] != shapes["teacher"] or len(shapes["student"]) != 1:
        listed = " and ".join(f"the {who} gives {', '.join(map(str, found))}" for who, found in shapes.items())  # fmt: skip
        raise StageError(
            f"a student imitates one output of the same shape, but {listed}",
            stage=stage,
            hint="give both the same classes: args = { num_classes = ... }, or the argument of your builder",
            code="different-outputs",
        )


# ------------------------------------------------------------------------- what a teacher says

# -> class scores of the batch, without gradient
Answers = Callable[[Batch], torch.Tensor]


def live_answers(teacher: nn.Module) -> Answers:
    """Ask the teacher anew in each step: for mixed samples, and where its features are needed."""

    def answer(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return call_model(teacher, batch.inputs)[0]

    return answer


class KeptAnswers:
    """What a teacher says of each sample in each view, asked once and kept in ``folder``.

    ``view-<n>.npy`` (N, C, ...) float32, ``plain.npy`` for samples as they are. ``folder`` is to be
    named by everything that decides them: teacher, data, augmentation and seed. A file appears by
    one rename, so that two trainings may share a folder.
    """

    def __init__(
        self,
        teacher: nn.Module,
        data: TrainingSet,
        augment: Augmentation,
        *,
        seed: int,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.teacher, self.data, self.augment, self.seed = teacher, data, augment, seed
        self.folder, self.device = folder, device
        self.passes = 0  # how often the teacher had to be asked
        self._open: dict[int, np.ndarray] = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        if batch.view not in self._open:
            self._open = {
                batch.view: self._answers(batch.view)
            }  # one at a time: the last is not needed again soon
        rows = self._open[batch.view][batch.rows.numpy()]
        return torch.from_numpy(rows).to(batch.target.device)

    def _answers(self, number: int) -> np.ndarray:
        path = self.folder / ("plain.npy" if number < 0 else f"view-{number}.npy")
        try:
            kept = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(kept) == len(self.data) and kept.dtype == np.float32:
                return kept
            log.warning("%s does not fit the data: asking the teacher again", path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError) as exc:
            log.warning("%s cannot be read (%s): asking the teacher again", path, exc)
        self._ask(path, number)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _ask(self, path: Path, number: int) -> None:
        what = "all samples" if number < 0 else f"all samples of view {number}"
        log.info("asking the teacher about %s (%d)", what, len(self.data))
        self.passes += 1
        variation = None
        if number >= 0:
            variation = view_of(self.augment, len(self.data), seed=self.seed, number=number)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{path.name}.*.part"):  # by a process that was killed
            if not Path("/proc", left.suffixes[-2][1:]).exists():
                left.unlink(missing_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            answers: np.ndarray | None = None
            for rows in batches(self.data):
                inputs = self.data.batch(rows)[0]
                if variation is not None:
                    inputs = variation.apply(inputs, rows)
                with torch.no_grad():
                    said = call_model(self.teacher, [t.to(self.device) for t in inputs])[0]
                if answers is None:
                    shape = (len(self.data), *said.shape[1:])
                    answers = np.lib.format.open_memmap(part, "w+", np.float32, shape)
                answers[rows.numpy()] = said.float().cpu().numpy()
            assert isinstance(answers, np.memmap)
            answers.flush()
            del answers
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- features


class Features(nn.Module):
    """The feature losses of a student and a teacher. Parameters are the learned projections.

    Maps (N, C, H, W) of different height and width are compared at the smaller; (N, C) and tokens
    (N, T, C) as they are. Raises StageOptionError for names or shapes that do not fit.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        student: nn.Module,
        teacher: nn.Module,
        inputs: Sequence[torch.Tensor],
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self._seen: dict[str, dict[str, torch.Tensor]] = {"student": {}, "teacher": {}}
        self._hooks: list[RemovableHandle] = []
        self.projections = nn.ModuleDict()
        try:
            for who, model in (("student", student), ("teacher", teacher)):
                self._watch(who, stepped(model))
            with torch.no_grad():
                for model in (student, teacher):
                    call_model(model.eval(), inputs)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for number, feature in enumerate(features):
                    own, wanted = self._pair(feature)
                    if feature.loss == "hint":
                        self.projections[str(number)] = _projection(feature, own, wanted)
                    elif own.ndim != 4:
                        raise StageOptionError(
                            f"features: attention needs maps (N, C, H, W); {feature.student} gives "
                            f"{tuple(own.shape)}, {feature.teacher} {tuple(wanted.shape)}",
                            hint='use loss = "hint", or name convolutions',
                        )
        except BaseException:
            self.remove()
            raise

    def _watch(self, who: str, model: nn.Module) -> None:
        """Keep what the named modules of a model give."""
        modules = dict(model.named_modules())
        for name in {getattr(feature, who) for feature in self.features}:
            if name not in modules:
                legal = [n for n in modules if n]
                raise StageOptionError(
                    f"features: the {who} has no module {name!r}{near_miss(name, legal)}",
                    hint=f"it has: {', '.join(legal[:30])}{' ...' if len(legal) > 30 else ''}",
                )
            self._hooks.append(modules[name].register_forward_hook(self._keep(who, name)))

    def _keep(self, who: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, output: object) -> None:
            if not isinstance(output, torch.Tensor):
                raise StageOptionError(
                    f"features: {name} of the {who} gives a {type(output).__name__}, not a tensor",
                    hint="name a module that returns one tensor",
                )
            self._seen[who][name] = output

        return hook

    def _pair(self, feature: Feature) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            own = self._seen["student"][feature.student]
            wanted = self._seen["teacher"][feature.teacher]
        except KeyError as exc:
            raise StageOptionError(
                f"features: {exc.args[0]} never runs", hint="name a module that forward calls"
            ) from exc
        if own.ndim != wanted.ndim:
            raise StageOptionError(
                f"features: {feature.student} gives {tuple(own.shape)}, {feature.teacher} {tuple(wanted.shape)}",
                hint="name two modules whose outputs have the same number of axes",
            )
        if own.ndim == 4 and own.shape[2:] != wanted.shape[2:]:
            size = (min(own.shape[2], wanted.shape[2]), min(own.shape[3], wanted.shape[3]))
            own, wanted = (functional.adaptive_avg_pool2d(x, size) for x in (own, wanted))
        return own, wanted

    def forward(self) -> torch.Tensor:
        """The weighted sum for the batch that both models have just seen."""
        total = torch.zeros(())
        for number, feature in enumerate(self.features):
            own, wanted = self._pair(feature)
            if feature.loss == "attention":
                loss = attention_loss(own, wanted)
            else:
                loss = functional.mse_loss(self.projections[str(number)](own).float(), wanted.float())  # fmt: skip
            total = total.to(loss.device) + feature.weight * loss
        return total

    def remove(self) -> None:
        """Take the hooks off both models."""
        for hook in self._hooks:
            hook.remove()


def _projection(feature: Feature, own: torch.Tensor, wanted: torch.Tensor) -> nn.Module:
    if own.ndim == 4:
        return nn.Conv2d(own.shape[1], wanted.shape[1], 1)
    if own.ndim in (2, 3) and own.shape[1:-1] == wanted.shape[1:-1]:
        return nn.Linear(own.shape[-1], wanted.shape[-1])
    raise StageOptionError(
        f"features: no projection from {feature.student}, which gives {tuple(own.shape)}, to "
        f"{feature.teacher}, which gives {tuple(wanted.shape)}",
        hint="name two modules that give maps (N, C, H, W), vectors (N, C), or as many tokens (N, T, C)",
    )


# -------------------------------------------------------------------------------------- training


def distill(
    student: nn.Module,
    teachers: Sequence[tuple[nn.Module, float]],
    data: TrainingSet,
    options: DistillOptions,
    *,
    seed: int,
    stage: str,
    keep: Sequence[Path] = (),
    validation: TrainingSet | None = None,
    checkpoint: Path | None = None,
) -> list[Epoch]:
    """Train ``student`` in place to answer as ``teachers`` (each with its share) do.

    ``keep`` has a folder for each teacher, in which its answers are kept and found again (see
    `KeptAnswers`); without it, or where samples are mixed or features compared, teachers are asked
    anew in every step. Raises StageError where the outputs differ; and as `train` does.
    """
    device = pick_device(options.device)
    inputs, _ = data.batch(torch.arange(min(2, len(data))))
    for teacher, _ in teachers:
        check_outputs(student, teacher, inputs, stage=stage)
        teacher.requires_grad_(False).eval()
    features = Features(options.features, student, teachers[0][0], inputs, seed=seed) if options.features else None  # fmt: skip
    live = bool(options.augment.mixup or features) or not keep
    answers: list[tuple[Answers, float]] = []
    for number, (teacher, share) in enumerate(teachers):
        teacher.to(device)
        if live:
            answers.append((live_answers(teacher), share))
        else:
            kept = KeptAnswers(teacher, data, options.augment, seed=seed, folder=keep[number], device=device)  # fmt: skip
            answers.append((kept, share))
    try:
        return train(
            student,
            data,
            options,
            seed=seed,
            stage=stage,
            validation=validation,
            objective=objective(answers, options, features=features),
            extra=features,
            checkpoint=checkpoint,
            views=options.views,
        )
    finally:
        if features is not None:
            features.remove()
        for teacher, _ in teachers:
            teacher.to("cpu")


def objective(
    teachers: Sequence[tuple[Answers, float]],
    options: DistillOptions,
    *,
    features: Features | None = None,
) -> Objective:
    """The loss of `train`. ``teachers`` are (answers, share); shares are made to sum to 1."""
    all_shares = sum(share for _, share in teachers)

    def soft_loss(output: torch.Tensor, said: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if options.loss == "kd":
            return kd_loss(output, said, options.temperature)
        return dkd_loss(
            output, said, target, options.temperature, alpha=options.dkd_alpha, beta=options.dkd_beta
        )  # fmt: skip

    def compute(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        output = call_model(batch.model, batch.inputs)[0]
        soft_share = soft_weight_at(batch.step, batch.total, options)
        loss = (1 - soft_share) * hard_loss(output, batch, options.label_smoothing)
        for answers, share in teachers:
            said = answers(batch)
            soft = soft_loss(output, said, batch.target)
            if batch.partner is not None and options.loss == "dkd":  # mixed samples have two labels
                other = soft_loss(output, said, batch.target[batch.partner])
                soft = batch.weight * soft + (1 - batch.weight) * other
            loss = loss + soft_share * share / all_shares * soft
        if features is not None:
            loss = loss + features()
        return loss, output

    return compute


def soft_weight_at(step: int, total: int, options: DistillOptions) -> float:
    """The share of the soft loss in a step; it rises from 0 over ``soft_warmup`` epochs.

    0.9 over 1 of 10 epochs of 100 steps: 0.45 in step 50, 0.9 from step 100 on.
    """
    ramp = options.soft_warmup * total / options.epochs
    return options.soft_weight * min(1.0, step / ramp) if ramp else options.soft_weight
