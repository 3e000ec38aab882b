"""Run any artifact on this host: real values in and out, in the source model's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgepipe.artifact import Artifact

if TYPE_CHECKING:
    import numpy as np


def predict(artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a model for N samples.

    ``inputs`` maps the source model's input names to float arrays (N, ...) in its layout; so does
    the result. Quantising the inputs of an int8 file, dequantising its outputs and moving axes
    between layouts happen here, from the artifact's tensor specs. Fixed batch sizes are looped over.
    """
    from edgepipe.array_ops.layout import to_layout

    arrays = [
        to_layout(inputs[spec.name], spec.source_layout, spec.layout) for spec in artifact.inputs
    ]
    if artifact.kind == "tflite":
        from edgepipe.tflite_ops.run import run_tflite

        results = run_tflite(artifact.path, arrays, artifact.inputs, artifact.outputs)
    elif artifact.kind == "onnx":
        from edgepipe.tflite_ops.run import run_onnx

        results = run_onnx(artifact.path, arrays, artifact.inputs, artifact.outputs)
    else:
        from edgepipe.torch_ops.run import run_torch

        results = run_torch(artifact.path, arrays)
    return {
        spec.name: to_layout(result, spec.layout, spec.source_layout)
        for spec, result in zip(artifact.outputs, results, strict=True)
    }
