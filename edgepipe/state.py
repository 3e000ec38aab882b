"""Models with explicit state: inputs that are fed by outputs of the step before.

A sample of such a model is a sequence. Its state inputs are zero at the first step (`TensorSpec.fed_by`
names the output that feeds each from then on); data is for the other inputs, with an axis of steps after
that of the samples: ``x`` of shape (1, 16, 40) takes data (N, T, 16, 40).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from edgepipe.artifact import Artifact, TensorSpec
from edgepipe.errors import ArtifactError
from edgepipe.schema import near_miss

# Whose answers count: the last step's, or every step's.
Steps = Literal["last", "each"]
# The size of an axis of steps that data decides: see `data_inputs`. (0 is an axis left free by the file.)
FREE = -1
# Steps that two models are compared on, and those of noise: wrong wiring shows at the second.
PARITY_STEPS = 8
# What is said of state inside the file (``streaming = true``), and what to do instead.
STREAMING = (
    "keeps its state from one inference to the next (streaming = true), but samples are run from fresh state each:"
    " {cannot} as it will be used; its latency and memory can be measured"
)
EXPLICIT = 'give the state inputs and outputs of its own and wire them: [model.state] h = "h_next"'


def is_stateful(specs: Sequence[TensorSpec]) -> bool:
    """Whether any of these inputs is state."""
    return any(spec.fed_by for spec in specs)


def batch_axis(layout: str) -> int:
    """Where the samples are; the first axis unless the layout names another ``N``."""
    return max(layout.find("N"), 0)


def are_independent(metric: str, steps: Steps) -> bool:
    """Whether what ``metric`` judges are samples of their own, so that an interval can be told of them.

    The steps of one sequence go wrong together; a metric of the user's (``file.py:function``) judges
    whole sequences.
    """
    return steps == "last" or ":" in metric


def data_inputs(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What data must give for inputs ``specs``: those that are no state, with their axis of steps.

    ``x (1, 16, 40) NCL`` beside a state becomes ``(1, FREE, 16, 40) NTCL``, for sequences of any
    length; without state nothing changes.
    """
    if not is_stateful(specs):
        return tuple(specs)
    return tuple(_sequence(spec) for spec in specs if not spec.fed_by)


def with_steps(specs: Sequence[TensorSpec], steps: int = PARITY_STEPS) -> tuple[TensorSpec, ...]:
    """Specs of `data_inputs` with a number of steps where they leave it free."""
    return tuple(
        dataclasses.replace(s, shape=(s.shape[0], steps, *s.shape[2:])) if s.shape[1:2] == (FREE,) else s
        for s in specs
    )  # fmt: skip


def _sequence(spec: TensorSpec) -> TensorSpec:
    letter = next(c for c in "TSUVWXYZ" if c not in spec.layout + spec.source_layout)
    layouts = [f"{t[:1]}{letter}{t[1:]}" if t else "" for t in (spec.layout, spec.source_layout)]
    shape = (*spec.shape[:1], FREE, *spec.shape[1:])
    return dataclasses.replace(spec, shape=shape, layout=layouts[0], source_layout=layouts[1])


def state_numbers(artifact: Artifact) -> list[tuple[int, int]]:
    """(Number of a state input, number of the output that feeds it) for each, in the file's order."""
    outputs = [spec.name for spec in artifact.outputs]
    return [(i, outputs.index(s.fed_by)) for i, s in enumerate(artifact.inputs) if s.fed_by]


def refuse_streaming(artifact: Artifact, cannot: str) -> None:
    """Raise ArtifactError (``streaming``) for a file that keeps its state in itself between inferences.

    ``cannot`` says what is not possible with samples that are run from fresh state each.
    """
    if artifact.facts.get("streaming"):
        raise ArtifactError(f"{artifact.path.name} {STREAMING.format(cannot=cannot)}", hint=EXPLICIT, code="streaming")  # fmt: skip


def answer_names(artifact: Artifact) -> tuple[str, ...]:
    """The outputs that a model is judged by: those that feed no state, or all where every one does."""
    states = {spec.fed_by for spec in artifact.inputs}
    names = tuple(spec.name for spec in artifact.outputs)
    return tuple(name for name in names if name not in states) or names


def with_state(artifact: Artifact, wiring: Mapping[str, str]) -> Artifact:
    """The artifact with ``wiring`` (state input -> output that feeds it) in its input specs.

    Raises ArtifactError (``bad-state``) for a name that is not there, an output that feeds two inputs, a
    pair of different shape or dtype, or where no input is left for data.
    """
    inputs = {spec.name: spec for spec in artifact.inputs}
    outputs = {spec.name: spec for spec in artifact.outputs}
    check_names(wiring, tuple(inputs), tuple(outputs))
    for name, output in wiring.items():
        ours, theirs = inputs[name], outputs[output]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise _bad(
                f"{name} = {output!r}: the input is {ours.dtype} {list(ours.shape)}, the output {theirs.dtype} {list(theirs.shape)}",
                "a state has the same shape and dtype where it comes out and where it goes in again",
            )
    states = {name: _in_torch_layout(inputs[name]) for name in wiring}
    feeds = {output: states[name] for name, output in wiring.items()}
    return dataclasses.replace(
        artifact,
        inputs=tuple(
            dataclasses.replace(states[s.name], fed_by=wiring[s.name]) if s.name in states else s
            for s in artifact.inputs
        ),
        outputs=like_inputs(artifact.outputs, feeds),
    )


def with_state_shapes(artifact: Artifact, shapes: Mapping[str, Sequence[int]]) -> Artifact:
    """The artifact with its states (by the name of the input) of other shapes, where they come out, too.

    Raises ArtifactError (``bad-state``) for a name that is no state, or another number of axes.
    """
    states = {spec.name: spec for spec in artifact.inputs if spec.fed_by}
    for name, shape in shapes.items():
        if name not in states:
            raise ArtifactError(
                f"state_shapes: {name!r} is no state of the model{near_miss(name, list(states))}",
                hint=f"its states: {', '.join(states) or 'none ([model.state] wires them)'}",
                code="bad-state",
            )
        if len(shape) != len(states[name].shape) or min(shape) < 1:
            raise ArtifactError(
                f"state_shapes: {name} = {list(shape)}, but the model's own is {list(states[name].shape)}",
                hint="give as many axes, with the batch, 1, at the same place",
                code="bad-state",
            )
    feeds = {states[name].fed_by: tuple(shape) for name, shape in shapes.items()}
    own = {name: tuple(shape) for name, shape in shapes.items()}
    return dataclasses.replace(
        artifact,
        inputs=tuple(dataclasses.replace(s, shape=own.get(s.name, s.shape)) for s in artifact.inputs),
        outputs=tuple(dataclasses.replace(s, shape=feeds.get(s.name, s.shape)) for s in artifact.outputs),
    )  # fmt: skip


def _in_torch_layout(spec: TensorSpec) -> TensorSpec:
    """A state (2, 1, 64) of unknown layout is that of an RNN: (layers, N, channels), in ONNX as in PyTorch."""
    if spec.layout == spec.source_layout == "NCL" and spec.shape[0] != 1 and spec.shape[1] == 1:
        return dataclasses.replace(spec, layout="LNC", source_layout="LNC")
    return spec


def like_inputs(
    outputs: Sequence[TensorSpec], feeds: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Output specs, each that feeds a state (``feeds``: output -> input) in that one's layout."""
    return tuple(
        dataclasses.replace(s, layout=feeds[s.name].layout, source_layout=feeds[s.name].source_layout)
        if s.name in feeds
        else s
        for s in outputs
    )  # fmt: skip


def check_names(
    wiring: Mapping[str, str], inputs: Sequence[str], outputs: Sequence[str] = ()
) -> None:
    """As far as names tell: ArtifactError (``bad-state``). ``outputs`` () = not known yet."""
    for name, output in wiring.items():
        if name not in inputs:
            raise _bad(
                f"{name!r} is no input of the model{near_miss(name, list(inputs))}",
                f"its inputs: {', '.join(inputs)}; [model.state] says INPUT = OUTPUT",
            )
        if outputs and output not in outputs:
            raise _bad(
                f"{name} = {output!r}: the model has no such output{near_miss(output, list(outputs))}",
                f"its outputs: {', '.join(outputs)} ([model] outputs = [...] names those of a PyTorch model, in order)",
            )
        if list(wiring.values()).count(output) > 1:
            raise _bad(f"{output!r} feeds two inputs", "each state has an output of its own")
    if wiring and not set(inputs) - set(wiring):
        raise _bad(
            "every input is state, so that there is none for data",
            f"leave out what is data: {', '.join(inputs)}",
        )


def _bad(what: str, hint: str) -> ArtifactError:
    return ArtifactError(f"[model.state] {what}", hint=hint, code="bad-state")
