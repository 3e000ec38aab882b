"""Stage ``quantize``: a float TFLite file in a precision other than full int8."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.data import at_most
from edgepipe.errors import StageError, StageOptionError
from edgepipe.parity import compare_to_float, worst_output
from edgepipe.predict import with_states
from edgepipe.schema import Unit, near_miss, record
from edgepipe.stage import StageContext
from edgepipe.stages.quantize_int8 import (
    ENOUGH_UNSETTLED,
    check_samples,
    source_specs,
)
from edgepipe.state import refuse_streaming

if TYPE_CHECKING:
    from edgepipe.array_ops.load import SampleStream

log = logging.getLogger(__name__)


@record
class Quantize:
    """Weights of fewer bits, or 16-bit activations; inputs and outputs of the file stay float32.

    ``precision``: ``dynamic_int8`` (int8 weights, activations made int8 while it runs),
    ``weight_int8`` and ``weight_int4`` (turned back into floats to compute), ``float16``, or
    ``int16x8`` (integer arithmetic: activations int16, weights int8). ``data`` names real samples:
    ranges of ``int16x8`` come from ``samples`` of them, as for ``quantize_int8``, and every file is run
    by LiteRT on some and must keep ``min_sqnr`` against the float file, over all outputs.
    """

    name: ClassVar[str] = "quantize"
    title: ClassVar[str] = "quantise to another precision than full int8"
    accepts: ClassVar[tuple[str, ...]] = ("tflite",)
    produces: ClassVar[str] = "tflite"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.array_ops",
        "edgepipe.parity",
        "edgepipe.predict",
        "edgepipe.state",
        "edgepipe.tflite_ops.calibrate",
        "edgepipe.tflite_ops.flatbuffer",
        "edgepipe.tflite_ops.inspect",
        "edgepipe.tflite_ops.precisions",
        "edgepipe.tflite_ops.quantize",
        "edgepipe.tflite_ops.rewrite",
        "edgepipe.tflite_ops.run",
        "edgepipe.tflite_ops.scalar_functions",
        "edgepipe.tflite_ops.sensitivity",
        "edgepipe.tflite_ops.stand_in",
    )
    packages: ClassVar[tuple[str, ...]] = (
        "litert-quantizer",
        "ai-edge-litert",
        "numpy",
        "pillow",
    )

    precision: Literal["dynamic_int8", "weight_int8", "weight_int4", "float16", "int16x8"]
    data: str = "calibration"
    samples: int | Literal["auto"] = "auto"
    allow_random: bool = False
    min_samples: int = 8
    min_sqnr: Annotated[float, Unit("level")] = 10.0

    def __post_init__(self) -> None:
        check_samples(self.samples, stage=self.name)

    def data_names(self) -> tuple[str, ...]:
        return (self.data,)

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        from importlib.metadata import version

        from edgepipe.array_ops.calibration import CalibrationReport, check_calibration
        from edgepipe.array_ops.load import open_samples
        from edgepipe.tflite_ops import precisions
        from edgepipe.tflite_ops.calibrate import in_order, looks, settled_ranges
        from edgepipe.tflite_ops.flatbuffer import parse_model
        from edgepipe.tflite_ops.quantize import check_quantizable

        where, content = artifact.path.name, artifact.path.read_bytes()
        refuse_streaming(artifact, "it cannot be compared with the float model")
        check_quantizable(parse_model(content, where=where), where=where)
        if self.data not in context.data:
            raise StageOptionError(
                f"quantize: there is no data set {self.data!r}{near_miss(self.data, list(context.data))}",
                hint=f"add [data.{self.data}] to the recipe (known: {', '.join(context.data) or 'none'})",
            )
        needs_ranges = self.precision == "int16x8"
        wanted = self.samples if needs_ranges or self.samples != "auto" else ENOUGH_UNSETTLED
        source = at_most(context.data[self.data], 0 if wanted == "auto" else wanted)
        specs = source_specs(artifact.inputs)
        samples = with_states(open_samples(source, specs), artifact)
        report, ranges = None, None

        def check(taken: SampleStream) -> CalibrationReport:
            return check_calibration(
                taken, specs, source=source,
                allow_random=self.allow_random, min_samples=self.min_samples,
            )  # fmt: skip

        if needs_ranges:  # bad data is told before anything is computed
            report = check(in_order(samples, looks(len(samples), wanted)[0]))
        content = precisions.prepared(content, self.precision, where=where)
        if report is not None:
            samples, report, found = settled_ranges(
                content, samples, artifact.inputs, report, samples=wanted, check=check,
                where=where, seed=context.seed,
            )  # fmt: skip
            for warning in report.warnings:
                log.warning("calibration: %s", warning)
            ranges = found.table()
        made = precisions.make_precision(content, self.precision, ranges=ranges, where=where)
        path = context.work_dir / "model.tflite"
        path.write_bytes(made)
        # names, order, layouts and dtypes are the float file's; running it by them proves it
        result = make_artifact("tflite", path, inputs=artifact.inputs, outputs=artifact.outputs, parent=artifact)  # fmt: skip
        facts: dict[str, Any] = {
            "precision": self.precision,
            "parity": self._parity(artifact, result, samples),
            **({"calibration": json.loads(json.dumps(dataclasses.asdict(report)))} if report else {}),
            "bytes": {"before": artifact.size_bytes, "after": len(made)},
            "float_weights": precisions.float_weights(made, where=where),
            "float_operators": precisions.float_operators(made, where=where),
            "runtime_needs": [dataclasses.asdict(n) for n in precisions.runtime_needs(made, where=where)],
            "quantizer": f"litert-quantizer {version('litert-quantizer')}",
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
        }  # fmt: skip
        for need in facts["runtime_needs"][:1]:
            log.info("needs TensorFlow Lite %s or LiteRT: %s with %s", need["tflite"], need["operator"], need["why"])  # fmt: skip
        return dataclasses.replace(result, facts=facts)

    def _parity(self, before: Artifact, after: Artifact, samples: SampleStream) -> dict[str, Any]:
        parity = compare_to_float(before, after, samples, precision=self.precision, stage=self.name)
        worst, sqnr_db = worst_output(parity)
        if sqnr_db < self.min_sqnr:
            raise StageError(
                f"{self.precision} output {worst!r} is {sqnr_db:.1f} dB from the float model on"
                f" {samples.origin}, below min_sqnr = {self.min_sqnr:g} dB",
                stage=self.name,
                hint='choose another precision, or accept it with min_sqnr = "... dB"',
                code="parity",
            )
        return parity
