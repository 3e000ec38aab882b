"""Run any artifact on this host: real values in and out, in the source model's layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from edgepipe.artifact import Artifact
from edgepipe.state import Steps, answer_names, batch_axis, is_stateful

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.array_ops.load import Samples, SampleStream

    S = TypeVar("S", Samples, SampleStream)


def predict(
    artifact: Artifact,
    inputs: Mapping[str, np.ndarray],
    *,
    steps: Steps = "last",
    states: bool = False,
) -> dict[str, np.ndarray]:
    """Outputs of a model for N samples.

    ``inputs`` maps the source model's input names to float arrays (N, ...) in its layout; so does
    the result. Quantising the inputs of an int8 file, dequantising its outputs and moving axes
    between layouts happen here, from the artifact's tensor specs. Fixed batch sizes are looped over.

    A model with state takes sequences, (N, T, ...) for each input that is no state, each from zeros,
    and gives its answers (`state.answer_names`) at the last step, (N, ...), or at ``each``, (N, T, ...).
    ``states`` adds the outputs that feed states.
    """
    run = opened(artifact)
    if not is_stateful(artifact.inputs):
        return run(inputs)
    from edgepipe.array_ops.roll import roll_outputs

    names = [spec.name for spec in artifact.outputs] if states else answer_names(artifact)
    return roll_outputs(run, artifact.inputs, inputs, names, steps=steps)


def single_steps(artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Samples as `predict` takes them -> every input of each inference that it makes of them.

    Without state they are the same. Else (N, T, ...) becomes (N * T, ...), sequence after sequence, and the
    states are there as well, as this model has them at each step.
    """
    if not is_stateful(artifact.inputs):
        return dict(inputs)
    from edgepipe.array_ops.roll import one_by_one

    return one_by_one(opened(artifact), artifact.inputs, inputs)


def with_states(samples: S, artifact: Artifact) -> S:
    """Samples that `array_ops.calibration.file_batches` turns into single inferences of a model with state."""
    if not is_stateful(artifact.inputs):
        return samples
    return dataclasses.replace(samples, states_from=opened(artifact))


def opened(
    artifact: Artifact,
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """The model as a function: one inference for N samples, all inputs by name -> all outputs by name."""
    from edgepipe.array_ops.layout import to_layout

    run: Callable[[list[np.ndarray]], list[np.ndarray]]
    if artifact.kind == "tflite":
        from edgepipe.tflite_ops.run import tflite_runner

        run = tflite_runner(
            artifact.path, artifact.inputs, artifact.outputs, signature=artifact.signature
        )
    elif artifact.kind == "onnx":
        from edgepipe.tflite_ops.run import onnx_runner

        run = onnx_runner(artifact.path, artifact.inputs, artifact.outputs)
    else:
        from edgepipe.torch_ops.run import open_torch

        axes = [[batch_axis(spec.layout) if spec.shape else None for spec in specs] for specs in (artifact.inputs, artifact.outputs)]  # fmt: skip
        run = open_torch(artifact.path, *axes)

    def call(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = [
            to_layout(inputs[spec.name], spec.source_layout, spec.layout)
            for spec in artifact.inputs
        ]
        return {
            spec.name: to_layout(result, spec.layout, spec.source_layout)
            for spec, result in zip(artifact.outputs, run(arrays), strict=True)
        }

    return call
