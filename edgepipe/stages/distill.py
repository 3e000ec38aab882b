"""`distill`: train a small model to answer as a large one does."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgepipe.artifact import Artifact, hash_path, make_artifact
from edgepipe.data import fingerprint, source_hash, user_path
from edgepipe.distillation import DistillOptions, Teacher
from edgepipe.errors import ArtifactError, StageError
from edgepipe.schema import record
from edgepipe.stage import StageContext
from edgepipe.state import with_state_shapes
from edgepipe.students import FOLDER, STUDENTS, student_args

if TYPE_CHECKING:
    from torch import nn

    from edgepipe.torch_ops.model import ModelDescription
    from edgepipe.torch_ops.train import TrainingSet

log = logging.getLogger(__name__)

GIVEN = Teacher(stage=-1)  # the model that the stage is given
# Our code that decides what a teacher is shown.
DECIDE_ANSWERS = ("torch_ops/augment.py", "torch_ops/data.py", "torch_ops/run.py", "torch_ops/sequences.py", "array_ops")  # fmt: skip


@record
class Distill(DistillOptions):
    """Options are those of `DistillOptions` and of training. The result is a model of the student's builder."""

    name: ClassVar[str] = "distill"
    title: ClassVar[str] = "train a smaller model to answer as this one or as earlier ones do"
    accepts: ClassVar[tuple[str, ...]] = ("torch",)
    produces: ClassVar[str] = "same"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.distillation", "edgepipe.students", "edgepipe.torch_ops.students",
        "edgepipe.torch_ops.distill", "edgepipe.training", "edgepipe.torch_ops.train",
        "edgepipe.torch_ops.augment", "edgepipe.torch_ops.data", "edgepipe.torch_ops.sequences", "edgepipe.torch_ops.run",
        "edgepipe.torch_ops.model", "edgepipe.torch_ops.edits", "edgepipe.torch_ops.attention", "edgepipe.torch_ops.result",
        "edgepipe.array_ops", "edgepipe.state",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "numpy")

    def functions(self) -> tuple[str, ...]:
        own = (self.student,) if ":" in self.student else ()
        return (*own, *(t.builder for t in self.teachers if t.builder))

    def files(self) -> tuple[Path, ...]:
        return tuple(p for p in (self.weights, *(t.weights for t in self.teachers)) if p)

    def arguments(self) -> tuple[Any, ...]:
        return (self.args, *(t.args for t in self.teachers))

    def earlier(self) -> tuple[int, ...]:
        return tuple(t.stage for t in self.teachers if t.stage is not None)

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The trained student. Nothing is kept where training fails."""
        from edgepipe.torch_ops import distill as ops
        from edgepipe.torch_ops.data import training_set
        from edgepipe.torch_ops.model import load_model
        from edgepipe.torch_ops.result import describe_layers, save_result
        from edgepipe.torch_ops.run import example_inputs
        from edgepipe.torch_ops.sequences import unrolled
        from edgepipe.torch_ops.train import accuracy

        data = training_set(context.data[self.data], artifact.inputs)
        validation = None
        if self.validation:
            validation = training_set(context.data[self.validation], artifact.inputs)
        made = with_state_shapes(artifact, self.state_shapes)  # the student, as it will be
        teachers = self._teachers(artifact, data, context)
        description, student = self._student(artifact, context)
        try:
            trained = unrolled(student, made, data, back_steps=self.back_steps)
        except ArtifactError as exc:
            if exc.code == "one-by-one":
                raise
            given = ", ".join(f"{s.name} = {list(s.shape)}" for s in made.inputs if s.fed_by)
            named = ", ".join(f"{s.name} = [...]" for s in made.inputs if s.fed_by)
            raise StageError(
                f"the student cannot take steps of this model: {exc.message}",
                stage=self.name,
                hint=f"its states were taken to be {given}; if they are not, give their shapes: "
                f"state_shapes = {{ {named} }}",
                code="different-inputs",
            ) from exc
        examples, own = (
            example_inputs([(s.shape, s.dtype) for s in one.inputs], seed=context.seed)
            for one in (artifact, made)
        )
        before = describe_layers(load_model(artifact.path), examples)
        history = ops.distill(
            trained,
            [(model, share) for model, share, _ in teachers],
            data,
            self,
            seed=context.seed,
            stage=self.name,
            keep=self._keep(artifact, context, [identity for _, _, identity in teachers]),
            validation=validation,
            checkpoint=context.checkpoint,
        )
        facts = save_result(
            before, student, context.work_dir / "model", description, own, stage=self.name
        )
        facts["teachers"] = [
            {"identity": identity, "share": share}
            | ({"accuracy": accuracy(model, validation)} if validation else {})
            for model, share, identity in teachers
        ]
        if validation is not None:
            facts["accuracy"] = accuracy(trained, validation)
            best = max(t["accuracy"] for t in facts["teachers"])
            log.info("validation: teacher %.2f %%, student %.2f %%", 100 * best, 100 * facts["accuracy"])  # fmt: skip
        return make_artifact(
            "torch",
            context.work_dir / "model",
            inputs=made.inputs,
            outputs=made.outputs,
            parent=artifact,
            facts={
                **facts,
                "samples": len(data),
                "seed": context.seed,
                "epochs": [dataclasses.asdict(epoch) for epoch in history],
            },
        )

    def _teachers(
        self, artifact: Artifact, data: TrainingSet, context: StageContext
    ) -> list[tuple[nn.Module, float, str]]:
        """(model, share, what identifies it) of each teacher; all take the samples of ``data``."""
        from edgepipe.torch_ops.model import load_model, read_description
        from edgepipe.torch_ops.sequences import unrolled

        found = []
        for teacher in self.teachers or (GIVEN,):
            if teacher.stage is None:
                built, share, identity = _built(teacher, context)
                if teacher.state_shapes:
                    shaped = with_state_shapes(artifact, teacher.state_shapes)
                    built = unrolled(built, shaped, data)
                    identity = _digest([identity, repr(shaped.inputs)])
                found.append((built, share, identity))
                continue
            model = artifact if teacher is GIVEN else context.models[teacher.stage]
            _check_teacher(model, self.name)
            identity = _digest([model.sha256, _code(read_description(model.path), context)])
            whole = unrolled(load_model(model.path), model, data)
            found.append((whole, teacher.weight, identity))
        return found

    def _keep(
        self, artifact: Artifact, context: StageContext, teachers: Sequence[str]
    ) -> list[Path]:
        """Where the answers of each teacher are kept, by everything that decides them."""
        if not self.cache:
            return []
        package = FOLDER.parents[1]
        parts = [fingerprint(context.data[self.data]), repr(artifact.inputs)]
        parts += [hash_path(package / name) for name in DECIDE_ANSWERS]
        if self.augment != type(self.augment)():
            parts += [repr(self.augment), str(context.seed)]
        return [context.store / "teacher-cache" / _digest([t, *parts]) for t in teachers]

    def _student(
        self, artifact: Artifact, context: StageContext
    ) -> tuple[ModelDescription, nn.Module]:
        from edgepipe.torch_ops.model import (
            ModelDescription,
            build_model,
            load_model,
            load_state,
            read_description,
            read_weights,
        )

        if not self.student:
            return read_description(artifact.path), load_model(artifact.path)
        if self.student in STUDENTS:
            shape = artifact.inputs[0].shape
            found = [spec.shape for spec in (*artifact.inputs, *artifact.outputs)]
            if [len(shape) for shape in found] not in ([4, 2], [3, 2]):
                raise StageError(
                    "students of the zoo take one input (1, C, H, W) or (1, C, L) and give class scores "
                    f"(1, classes); the model has {', '.join(map(str, found))}",
                    stage=self.name,
                    hint='write your own: student = "file.py:function"',
                )
            args = student_args(self.student, shape, artifact.outputs[0].shape[1], self.args)
            description = ModelDescription(STUDENTS[self.student].builder, args, root=FOLDER)
        else:
            description = ModelDescription(self.student, self.args, root=context.root)
        model = build_model(description, seed=context.seed)
        if self.weights is not None:
            path = user_path(self.weights, context.root)
            load_state(model, read_weights(path), source=path)
        return description, model


def _built(teacher: Teacher, context: StageContext) -> tuple[nn.Module, float, str]:
    from edgepipe.torch_ops.model import ModelDescription, build_model, load_state, read_weights

    assert teacher.weights is not None  # checked with the options
    path = user_path(teacher.weights, context.root)
    description = ModelDescription(teacher.builder, teacher.args, root=context.root)
    model = build_model(description, seed=context.seed)
    load_state(model, read_weights(path), source=path)
    identity = [_code(description, context), repr(teacher.args), hash_path(path)]
    return model.eval(), teacher.weight, _digest(identity)


def _code(description: ModelDescription, context: StageContext) -> str:
    """Hash of the code of a builder. (One in a file is also part of the artifact's own hash.)"""
    root = description.root if description.file else context.root
    return source_hash(description.builder, root)


def _check_teacher(artifact: Artifact, stage: str) -> None:
    if artifact.kind != "torch":
        raise StageError(
            f"a {artifact.kind} model cannot teach",
            stage=stage,
            hint="name a stage before export_onnx",
        )
    if artifact.facts.get("weights") == "random":
        raise StageError(
            "the teacher has random weights, which teach nothing",
            stage=stage,
            hint='give [model] weights, or train it first: [[stages]] stage = "finetune"',
            code="untrained-teacher",
        )


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
