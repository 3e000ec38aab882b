"""Stage ``quantize_int8``: a float TFLite file becomes full-integer int8."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource, at_most, user_path
from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.predict import predict
from edgepipe.range_table import RangeTable, read_table, table_text
from edgepipe.schema import Unit, near_miss, record
from edgepipe.stage import StageContext

if TYPE_CHECKING:
    from edgepipe.array_ops.load import Samples

log = logging.getLogger(__name__)

# Samples the int8 file is compared with the float file on: enough for a stable SQNR (the standard
# error of a mean over 64 is an eighth of the spread), few enough to cost less than calibration.
PARITY_SAMPLES = 64
LEARNED = "learned"


@record
class QuantizeInt8:
    """Activations int8 with scale and zero point, weights int8 symmetric per output channel.

    ``data`` names the calibration set and ``samples`` caps how many of it are used (a seeded choice).
    ``method`` says how each activation's range follows from them: the union of the samples' ranges
    (``min_max``), their moving average, without 0.01 % of the values at each end (``percentile``),
    with the least squared error (``mse``), or nearest in distribution (``kl``). ``ranges`` names a
    file of ranges to take instead, such as the ``ranges.json`` of an earlier run.
    ``input_dtype`` and ``output_dtype`` are those of the file's doors. Anything that would stay in
    float is an error unless its operators are in ``allow_float``. ``min_sqnr`` is the least signal
    to quantisation-noise ratio against the float file on real samples, over all outputs.
    """

    name: ClassVar[str] = "quantize_int8"
    title: ClassVar[str] = "quantise to full int8 with ranges from representative data"
    accepts: ClassVar[tuple[str, ...]] = ("tflite",)
    produces: ClassVar[str] = "tflite"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.array_ops",
        "edgepipe.predict",
        "edgepipe.range_table",
        "edgepipe.tflite_ops.calibrate",
        "edgepipe.tflite_ops.flatbuffer",
        "edgepipe.tflite_ops.inspect",
        "edgepipe.tflite_ops.quantize",
        "edgepipe.tflite_ops.run",
        "edgepipe.tflite_ops.sparse",
    )
    packages: ClassVar[tuple[str, ...]] = (
        "litert-quantizer",
        "ai-edge-litert",
        "numpy",
        "pillow",
    )

    data: str = "calibration"
    samples: int = 500
    method: Literal["min_max", "moving_average", "percentile", "mse", "kl"] = "min_max"
    ranges: Path | None = None
    input_dtype: Literal["int8", "uint8", "float32"] = "int8"
    output_dtype: Literal["int8", "uint8", "float32"] = "int8"
    allow_float: tuple[str, ...] = ()
    allow_random: bool = False
    min_samples: int = 8
    # a second data set whose statistics the calibration set must resemble, such as "evaluation"
    compare_with: str = ""
    min_sqnr: Annotated[float, Unit("level")] = 10.0

    def files(self) -> tuple[Path, ...]:
        return (self.ranges,) if self.ranges is not None else ()

    def data_names(self) -> tuple[str, ...]:
        return (self.data, self.compare_with) if self.compare_with else (self.data,)

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        from importlib.metadata import version

        from edgepipe.array_ops.calibration import (
            add_settling,
            check_calibration,
            file_batches,
            settle,
        )
        from edgepipe.array_ops.load import load_samples
        from edgepipe.tflite_ops import quantize as ops
        from edgepipe.tflite_ops.calibrate import find_ranges
        from edgepipe.tflite_ops.flatbuffer import parse_model
        from edgepipe.tflite_ops.sparse import sparsity_facts

        content = artifact.path.read_bytes()
        where = artifact.path.name
        ops.check_quantizable(parse_model(content, where=where), where=where)
        specs = source_specs(artifact.inputs)
        source = self._source(context, self.data, self.samples)
        samples = load_samples(source, specs)
        reference = None
        if self.compare_with:
            reference = load_samples(self._source(context, self.compare_with, self.samples), specs)
        report = check_calibration(
            samples,
            specs,
            source=source,
            reference=reference,
            allow_random=self.allow_random,
            min_samples=self.min_samples,
        )

        content, fused = ops.fuse_activations(content, where=where)
        for line in fused:
            log.info("fused %s", line)
        given = self._given_ranges(artifact, context)
        if given is None:
            log.info("calibrating on %d samples", len(samples))
            found, ranges = find_ranges(
                content,
                lambda: file_batches(samples, artifact.inputs),
                method=self.method,
                where=where,
                total=len(samples),
            )
            settling = settle(ranges.minima, ranges.maxima, ranges.names, batches=ranges.batches, seed=context.seed)  # fmt: skip
            report = add_settling(report, settling)
            table = RangeTable(found, self.method, len(samples), report.origin)
        else:
            ops.check_ranges(given.ranges, content, where=where)
            log.info("taking %d %s ranges as they are", len(given.ranges), given.method)
            table = given
        for warning in report.warnings:
            log.warning("calibration: %s", warning)

        quantized = ops.quantize(
            content,
            table.ranges,
            input_dtype=self.input_dtype,
            output_dtype=self.output_dtype,
            where=where,
        )
        islands = ops.check_full_integer(quantized, allow_float=self.allow_float, where=where)
        for island in islands:
            log.warning("%s stays in float: %s", " - ".join(island["operators"]), island["reason"])

        path = context.work_dir / "model.tflite"
        path.write_bytes(quantized)
        ranges_text = table_text(table)
        (context.work_dir / "ranges.json").write_text(ranges_text, encoding="utf-8")
        inputs, outputs = self._specs(artifact, quantized)
        result = make_artifact("tflite", path, inputs=inputs, outputs=outputs, parent=artifact)
        parity = self._parity(artifact, result, samples, content, quantized)
        facts: dict[str, Any] = {
            "parity": parity,
            "calibration": json.loads(json.dumps(dataclasses.asdict(report))),
            "ranges": {
                "file": "ranges.json",
                "sha256": hashlib.sha256(ranges_text.encode()).hexdigest(),
                "tensors": len(table.ranges),
                "method": table.method,
                "learned": table.method == LEARNED,
            },
            "float_islands": islands,
            "fused_activations": list(fused),
            **sparsity_facts(quantized, where=path.name),
            "quantizer": f"litert-quantizer {version('litert-quantizer')}",
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
        }
        return dataclasses.replace(result, facts=facts)

    def _given_ranges(self, artifact: Artifact, context: StageContext) -> RangeTable | None:
        """Ranges that need no calibration: those of ``ranges``, else those that training found."""
        if self.ranges is not None:
            return read_table(user_path(self.ranges, context.root))
        learned = artifact.facts.get("learned_ranges")
        if not learned:
            return None
        # the weights have grown used to them
        found = {name: (float(low), float(high)) for name, (low, high) in learned.items()}
        return RangeTable(found, LEARNED)

    def _source(self, context: StageContext, name: str, samples: int) -> DataSource:
        if name not in context.data:
            raise StageOptionError(
                f"quantize_int8: there is no data set {name!r}"
                f"{near_miss(name, list(context.data))}",
                hint=f"add [data.{name}] to the recipe (known: {', '.join(context.data) or 'none'})",
            )
        return at_most(context.data[name], samples)

    def _specs(
        self, artifact: Artifact, quantized: bytes
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The float file's specs with the dtype, scale and zero point of the int8 file.

        Names, order and layouts are the float file's, which the quantizer keeps; `_parity` proves it.
        """
        from edgepipe.tflite_ops.flatbuffer import parse_model
        from edgepipe.tflite_ops.inspect import model_specs

        found = model_specs(parse_model(quantized, where="the int8 model"), where="the int8 model")
        result: list[tuple[TensorSpec, ...]] = []
        for side, ours, theirs, dtype in (
            ("input", artifact.inputs, found[0], self.input_dtype),
            ("output", artifact.outputs, found[1], self.output_dtype),
        ):
            if [s.shape for s in ours] != [s.shape for s in theirs]:
                raise ArtifactError(
                    f"{side}s of the int8 model have shapes {[s.shape for s in theirs]},"
                    f" those of the float model {[s.shape for s in ours]}",
                    code="internal-mismatch",
                )
            for mine, new in zip(ours, theirs, strict=True):
                wanted = dtype if mine.dtype == "float32" else mine.dtype
                if new.dtype != wanted:
                    raise StageError(
                        f"{side} {mine.name!r} is {new.dtype} in the int8 model, asked for {wanted}",
                        stage=self.name,
                        hint=f'set {side}_dtype = "float32", or allow its operator to stay in float',
                    )
            result.append(
                tuple(
                    dataclasses.replace(
                        mine, dtype=new.dtype, scale=new.scale, zero_point=new.zero_point
                    )
                    for mine, new in zip(ours, theirs, strict=True)
                )
            )
        return result[0], result[1]

    def _parity(
        self,
        before: Artifact,
        after: Artifact,
        samples: Samples,
        float_content: bytes,
        quantized: bytes,
    ) -> dict[str, Any]:
        """int8 against float on real samples; StageError with the first tensor that departs."""
        from edgepipe.array_ops.calibration import file_batches
        from edgepipe.array_ops.compare import compare
        from edgepipe.tflite_ops.quantize import departures

        step = max(1, len(samples) // PARITY_SAMPLES)
        chosen = {name: a[::step][:PARITY_SAMPLES] for name, a in samples.inputs.items()}
        try:
            errors = compare(predict(before, chosen), predict(after, chosen))
        except ArtifactError as exc:
            raise StageError(
                f"cannot compare the int8 model with the float model: {exc.message}",
                stage=self.name,
                hint=exc.hint,
                code="parity",
            ) from exc
        worst = min(errors, key=lambda name: errors[name].sqnr_db)
        if errors[worst].sqnr_db < self.min_sqnr:
            few = dataclasses.replace(samples, inputs={n: a[:4] for n, a in chosen.items()})
            rows = departures(float_content, quantized, file_batches(few, before.inputs))
            first = next((r for r in rows if r[2] < self.min_sqnr), None)
            at = f"; the first tensor below it is {first[0]!r}, made by {first[1]} ({first[2]:.1f} dB)" if first else ""  # fmt: skip
            raise StageError(
                f"int8 output {worst!r} is {errors[worst].sqnr_db:.1f} dB from the float model on"
                f" {samples.origin}, below min_sqnr = {self.min_sqnr:g} dB{at}",
                stage=self.name,
                hint="look for one wide-ranging tensor there, give more or better calibration data,"
                ' or accept it with min_sqnr = "... dB"',
                code="parity",
            )
        log.info("int8 against float: %.1f dB on %r", errors[worst].sqnr_db, worst)
        return {
            "against": "float tflite",
            "reference_sha256": before.sha256,
            "samples": len(next(iter(chosen.values()))),
            "data": samples.origin,
            "random_data": samples.is_random,
            "outputs": {name: dataclasses.asdict(error) for name, error in errors.items()},
        }


def source_specs(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Input specs as the source model has them: data is prepared for that layout."""
    from edgepipe.array_ops.layout import permute_shape

    return tuple(
        dataclasses.replace(
            spec,
            shape=permute_shape(spec.shape, spec.layout, spec.source_layout)
            if spec.layout != spec.source_layout
            else spec.shape,
            layout=spec.source_layout,
        )
        for spec in specs
    )
