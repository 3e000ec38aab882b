"""A step of a model with state as a model of whole sequences, so that training need not know of state.

The steps are unrolled, and gradients go back through all of them or the last few (Werbos 1990,
"Backpropagation through time: what it does and how to do it", section IV; truncated as in Williams
and Peng 1990, BPTT(h; h')). What is trained and saved is the step: `stepped`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgepipe.artifact import Artifact, TensorSpec
from edgepipe.errors import ArtifactError, DataError
from edgepipe.state import Steps, answer_names, batch_axis, is_stateful
from edgepipe.torch_ops.run import call_model, example_inputs

if TYPE_CHECKING:
    from edgepipe.torch_ops.train import TrainingSet


# A model -> what takes its samples: `unrolled` with all but the step, or the model `as_is`
Whole = Callable[[nn.Module], nn.Module]


def as_is(model: nn.Module) -> nn.Module:
    return model


class Unrolled(nn.Module):
    """``forward(*sequences)`` takes (N, T, ...) for each input of ``artifact`` that is no state, in its
    order, and gives the answers (`state.answer_names`) of the last step, (N, C, ...), or of each, (N, C, T, ...):
    class scores as cross-entropy takes them.

    State starts as zeros; ``axes`` says where the samples are in each. Gradients go back through
    ``back_steps`` steps (0: all): of 10 steps and 4, states are cut off before the third and seventh.
    """

    def __init__(
        self,
        step: nn.Module,
        artifact: Artifact,
        axes: Mapping[str, int],
        *,
        steps: Steps = "last",
        back_steps: int = 0,
    ) -> None:
        super().__init__()
        self.step, self.inputs, self.axes = step, artifact.inputs, dict(axes)
        self.outputs = tuple(spec.name for spec in artifact.outputs)
        self.answers = answer_names(artifact)
        self.steps, self.back_steps = steps, back_steps

    def forward(self, *sequences: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        with getattr(self.step, "same_weights", contextlib.nullcontext)():
            return self._forward(*sequences)

    def _forward(self, *sequences: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        names = [spec.name for spec in self.inputs if not spec.fed_by]
        given = dict(zip(names, sequences, strict=True))
        lengths = {x.shape[1] for x in sequences}
        if len(lengths) != 1 or 0 in lengths:
            raise DataError(
                f"sequences of {sorted(lengths)} steps: every input needs the same number, at least one",
                hint="data of a model with state is (samples, steps, ...) for each input",
            )
        length = lengths.pop()
        state = {s.name: self._zeros(s, sequences[0]) for s in self.inputs if s.fed_by}
        kept: list[list[torch.Tensor]] = []
        for number in range(length):
            if self.back_steps and (length - number) % self.back_steps == 0:
                state = {name: value.detach() for name, value in state.items()}
            inputs = [state[s.name] if s.fed_by else given[s.name][:, number] for s in self.inputs]
            found = dict(zip(self.outputs, call_model(self.step, inputs), strict=True))
            state = {s.name: found[s.fed_by] for s in self.inputs if s.fed_by}
            if self.steps == "last":
                kept.clear()
            kept.append([found[name] for name in self.answers])
        if self.steps == "last":
            answers = kept[-1]
        else:
            answers = [torch.stack(each, min(2, each[0].ndim)) for each in zip(*kept, strict=True)]
        return answers[0] if len(answers) == 1 else tuple(answers)

    def _zeros(self, spec: TensorSpec, like: torch.Tensor) -> torch.Tensor:
        shape = list(_source_shape(spec))
        shape[self.axes[spec.name]] = len(like)
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=like.device)


def unrolled(
    step: nn.Module,
    artifact: Artifact,
    data: TrainingSet | None,
    *,
    back_steps: int = 0,
    axes: Mapping[str, int] | None = None,
) -> nn.Module:
    """``step``, which computes what ``artifact`` does, for the sequences of ``data``; as it is without state.

    The labels say whose answers count: (N, ...) the last step's, (N, T, ...) each step's; without ``data``, the
    last's. ``axes`` are found out unless given. Raises ArtifactError (``one-by-one``) for a step that cannot take several samples.
    """
    if not is_stateful(artifact.inputs):
        return step
    steps: Steps = "last"
    if data is not None:
        labels = data.batch(torch.arange(1))[1]
        answer = next(s for s in artifact.outputs if s.name in answer_names(artifact))
        # scores (1, C, ...): a class number for each has (1, ...), one for each step (1, T, ...)
        steps = "each" if labels.ndim == len(answer.shape) else "last"
    return Unrolled(step, artifact, axes or _found_axes(step, artifact), steps=steps, back_steps=back_steps)  # fmt: skip


def stepped(model: nn.Module) -> nn.Module:
    """What was given to `unrolled`."""
    return model.step if isinstance(model, Unrolled) else model


def source_axes(artifact: Artifact) -> dict[str, int]:
    """Where the specs say that samples are in each state."""
    return {s.name: batch_axis(s.source_layout) for s in artifact.inputs if s.fed_by}


def _source_shape(spec: TensorSpec) -> tuple[int, ...]:
    if not spec.source_layout or spec.layout == spec.source_layout:
        return spec.shape
    sizes = dict(zip(spec.layout, spec.shape, strict=True))
    return tuple(sizes[axis] for axis in spec.source_layout)


def _found_axes(step: nn.Module, artifact: Artifact) -> dict[str, int]:
    """Where samples are in each state, proven with two samples.

    A state (1, 1, 64) may be (N, 1, 64) or, of an nn.GRU of one layer, (1, N, 64): both are tried.
    """
    told = source_axes(artifact)
    unclear = [s.name for s in artifact.inputs if s.fed_by and s.shape[:2] == (1, 1)]
    was_training = step.training
    try:
        step.eval()
        for axis in (0, 1) if unclear else (0,):
            axes = told | dict.fromkeys(unclear, axis)
            if _takes_two(step, artifact, axes):
                return axes
    finally:
        step.train(was_training)
    raise ArtifactError(
        "the model gives other results for two samples at once than for each alone, so that sequences"
        " cannot be trained in batches",
        hint="let forward take N samples: x (N, ...), and states with N where [[model.inputs]] layout has it"
        ' (layout = "LNC" for nn.LSTM and nn.GRU)',
        code="one-by-one",
    )


def _takes_two(step: nn.Module, artifact: Artifact, axes: Mapping[str, int]) -> bool:
    def axis_of(spec: TensorSpec) -> int:
        return axes.get(spec.name, batch_axis(spec.source_layout))

    feeds = {s.fed_by: axes[s.name] for s in artifact.inputs if s.fed_by}
    shapes = [(_source_shape(s), s.dtype) for s in artifact.inputs]
    samples = [example_inputs(shapes, seed=seed) for seed in range(2)]
    pairs = [
        torch.cat(pair, axis_of(spec))
        for pair, spec in zip(zip(*samples, strict=True), artifact.inputs, strict=True)
    ]
    with torch.no_grad():
        alone = [call_model(step, one) for one in samples]
        try:
            both = call_model(step, pairs)
        except ArtifactError:
            return False
    for found, one, two, spec in zip(both, *alone, artifact.outputs, strict=True):
        axis = feeds.get(spec.name, batch_axis(spec.source_layout))
        expected = torch.cat([one, two], axis)
        # kernels differ by batch size: allow the rounding of a long float32 sum
        if found.shape != expected.shape or not torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-4):  # fmt: skip
            return False
    return True
