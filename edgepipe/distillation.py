"""Options of distillation: who teaches, and which features of a teacher a student is to imitate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgepipe.errors import StageOptionError
from edgepipe.schema import near_miss, record
from edgepipe.students import STUDENTS
from edgepipe.training import TrainingOptions


@record
class Teacher:
    """One teacher: ``stage``, the number of an earlier stage of the recipe whose result it is (0 = the
    model that the recipe starts from), or a ``builder`` with ``args`` and ``weights``, as in ``[model]``.

    ``weight`` is its share among several. A builder whose model has state, wired as ``[model.state]`` says,
    gives its ``state_shapes``, ``{ h = [1, 1, 128] }``; without them it takes whole sequences, (N, T, ...).
    """

    stage: int | None = None
    builder: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: Path | None = None
    weight: float = 1.0
    state_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.stage is None) == (not self.builder):
            raise StageOptionError(
                "a teacher is either the result of a stage or a builder with weights",
                hint='teachers = [{ stage = 1 }] or [{ builder = "net.py:build", weights = "net.safetensors" }]',
            )
        if self.builder and self.weights is None:
            raise StageOptionError(
                f"teacher {self.builder} has no weights, and random ones teach nothing",
                hint='name its state dict: weights = "teacher.safetensors"',
            )
        if self.state_shapes and not self.builder:
            raise StageOptionError("a teacher that is the result of a stage has the states of that")
        if not self.weight > 0:
            raise StageOptionError(f"the weight of a teacher is above 0, not {self.weight:g}")


@record
class Feature:
    """A module of the student (``student``, by its name) that is to do what one of the first teacher does.

    ``hint`` (FitNets, Romero et al. 2015, eq. 3): the mean squared difference, behind a learned 1x1
    convolution or linear layer that is thrown away afterwards. ``attention`` (Zagoruyko & Komodakis
    2017, eq. 2): where on a map (N, C, H, W) the activations are strong, whatever their channels. Of a model with state the
    last step's are compared.
    """

    student: str
    teacher: str
    loss: Literal["hint", "attention"] = "hint"
    weight: float = 1.0


@record
class DistillOptions(TrainingOptions):
    """``student`` is what is trained: a name of the zoo (`edgepipe students` lists them), or a builder
    ``"file.py:function"`` with ``args`` and perhaps ``weights``; then the model that the stage is given
    teaches, unless ``teachers`` are named. Without ``student`` the given model is the student.

    ``loss`` is ``kd`` (softened by ``temperature``) or ``dkd``; ``soft_weight`` its share beside the
    labels', reached after ``soft_warmup`` epochs. A teacher that was trained with label smoothing has soft
    answers already: ``temperature = 1.0`` (Mueller et al. 2019, section 4). Where the data is augmented, teachers and student see
    the same variations: ``views`` of them in turn (0: another in every epoch). What teachers say of a
    view is kept in the store unless ``cache`` is off, samples are mixed or ``features`` compared. A student
    whose states are smaller than the given model's says so: ``state_shapes = { h = [1, 1, 32] }``.
    """

    student: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: Path | None = None
    state_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    teachers: tuple[Teacher, ...] = ()
    loss: Literal["kd", "dkd"] = "kd"
    temperature: float = 4.0
    soft_weight: float = 0.9
    soft_warmup: float = 0.0
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    features: tuple[Feature, ...] = ()
    views: int = 8
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student and ":" not in self.student and self.student not in STUDENTS:
            raise StageOptionError(
                f"distill: no student {self.student!r}{near_miss(self.student, list(STUDENTS))} (legal: "
                f'{", ".join(STUDENTS)}, or your own "file.py:function")',
                hint="`edgepipe students` shows what they cost",
            )
        if not self.student and not self.teachers:
            raise StageOptionError(
                "distill: nobody teaches",
                hint='name a student to be taught by the model (student = "mobilenet_v2"), or teachers of '
                "the model (teachers = [{ stage = 1 }])",
            )
        if not self.student and (self.args or self.weights or self.state_shapes):
            raise StageOptionError(
                "distill: args, weights and state_shapes are those of a student, but none is named"
            )
        problems = []
        if not self.temperature > 0:
            problems.append("temperature is above 0")
        if not 0 <= self.soft_weight <= 1:
            problems.append("soft_weight is from 0 to 1")
        if not 0 <= self.soft_warmup <= self.epochs:
            problems.append("soft_warmup is from 0 to epochs")
        if min(self.dkd_alpha, self.dkd_beta, self.views, *(f.weight for f in self.features)) < 0:
            problems.append("dkd_alpha, dkd_beta, views and weights of features are not below 0")
        if problems:
            raise StageOptionError(f"distill: {'; '.join(problems)}", hint="mend these options")
