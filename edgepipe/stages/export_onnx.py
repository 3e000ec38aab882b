"""`export_onnx`: from PyTorch to ONNX with fixed shapes, proven to compute the same."""

from __future__ import annotations

import logging
from typing import ClassVar

from edgepipe.artifact import Artifact, hash_path, make_artifact
from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.parity import parity_inputs, verify
from edgepipe.schema import record
from edgepipe.stage import StageContext

log = logging.getLogger(__name__)


@record
class ExportOnnx:
    """Options of the stage.

    The ONNX model must give PyTorch's outputs within ``max_relative_error`` of each output's
    largest value, on ``samples`` samples of ``data`` and ``seeds`` samples of noise.
    """

    name: ClassVar[str] = "export_onnx"
    title: ClassVar[str] = "export the PyTorch model to ONNX"
    accepts: ClassVar[tuple[str, ...]] = ("torch", "pt2")
    produces: ClassVar[str] = "onnx"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.torch_ops.export", "edgepipe.torch_ops.equivalents", "edgepipe.torch_ops.model", "edgepipe.torch_ops.edits", "edgepipe.torch_ops.attention",
        "edgepipe.torch_ops.pt2", "edgepipe.torch_ops.run", "edgepipe.tflite_ops.onnx_model",
        "edgepipe.parity", "edgepipe.predict", "edgepipe.state", "edgepipe.array_ops",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")

    opset: int = 18
    optimize: bool = True
    data: str = "calibration"
    samples: int = 32
    seeds: int = 3
    # float32 has 1.2e-7 of resolution; reordered sums over some thousand terms lose two or three digits
    max_relative_error: float = 1e-4

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 25:
            raise StageOptionError(
                f"export_onnx: opset {self.opset} is not 18 to 25",
                hint="torch.onnx writes 18 and newer",
            )
        if self.samples + self.seeds < 1 or min(self.samples, self.seeds) < 0:
            raise StageOptionError("export_onnx: samples and seeds are not negative, nor both 0")
        if not self.max_relative_error > 0:
            raise StageOptionError("export_onnx: max_relative_error is above 0")

    def data_names(self) -> tuple[str, ...]:
        return (self.data,) if self.samples else ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The model as one .onnx file; input and output names are those of the artifact's specs.

        Beside it lies ``model.pt2``, the captured program, for converters that take PyTorch's own
        operators (``facts["exported_program"]``: its file and sha256).
        """
        from edgepipe.tflite_ops.onnx_model import (
            half_precision,
            keep_pooled_axes,
            onnx_specs,
            read_onnx,
            save_onnx,
        )
        from edgepipe.torch_ops.export import export_onnx
        from edgepipe.torch_ops.model import load_model
        from edgepipe.torch_ops.pt2 import load_pt2, save_pt2
        from edgepipe.torch_ops.run import example_inputs

        source = context.data[self.data] if self.samples else None
        samples = parity_inputs(source, artifact.inputs, self.samples, self.seeds)
        model = load_pt2(artifact.path) if artifact.kind == "pt2" else load_model(artifact.path)
        path = context.work_dir / "model.onnx"
        log.info("exporting to ONNX, opset %d", self.opset)
        program = export_onnx(
            model,
            example_inputs([(spec.shape, spec.dtype) for spec in artifact.inputs]),
            path,
            input_names=[spec.name for spec in artifact.inputs],
            output_names=[spec.name for spec in artifact.outputs],
            opset=self.opset,
            optimize=self.optimize,
            log_path=context.log_path,
        )
        graph = read_onnx(path)
        rewritten = keep_pooled_axes(graph)
        if rewritten:
            save_onnx(graph, path)
        half = half_precision(graph)
        try:
            found = [{s.name: s.shape for s in specs} for specs in onnx_specs(path)]
        except ArtifactError as exc:
            raise StageError(
                f"PyTorch exported a model that does not run: {exc.message.replace(str(path), path.name)}",
                stage=self.name, code="exporter-error",
                hint=half or "that node's name leads to the line of PyTorch; write it with other operators",
            ) from exc  # fmt: skip
        wanted = [{s.name: s.shape for s in specs} for specs in (artifact.inputs, artifact.outputs)]
        free = [
            v.name
            for v in graph.graph.output
            if any(not d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)
        ]
        if free:
            raise StageError(
                f"the shape of output {free[0]!r} depends on values, which TFLite has no shape for",
                stage=self.name, code="dynamic-output",
                hint="return a mask, scores to sort, or the best k (torch.topk), and choose among them outside the model",
            )  # fmt: skip
        if found != wanted:
            raise StageError(
                f"the exporter wrote inputs and outputs {found} instead of {wanted}",
                stage=self.name,
                hint="does the model ignore an input, or return one tensor twice?",
            )
        onnx_model = make_artifact(
            "onnx", path, inputs=artifact.inputs, outputs=artifact.outputs, parent=artifact
        )
        try:
            evidence = verify(artifact, onnx_model, samples, max_relative_error=self.max_relative_error, stage=self.name)  # fmt: skip
        except StageError as exc:
            if half:
                exc.hint = half
            raise
        exported: dict[str, str] = {}
        try:
            save_pt2(program, context.work_dir / "model.pt2")
            exported = {"file": "model.pt2", "sha256": hash_path(context.work_dir / "model.pt2")}
        except ArtifactError as exc:
            log.warning("%s: %s", exc.message, exc.hint)
        facts = {"opset": self.opset, "nodes": len(graph.graph.node), "means_rewritten": rewritten, "exported_program": exported, "parity": evidence}  # fmt: skip
        return make_artifact(
            "onnx",
            path,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts=facts,
        )
