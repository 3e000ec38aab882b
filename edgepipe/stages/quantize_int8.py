"""Stage ``quantize_int8``: a float TFLite file becomes full-integer int8."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource, at_most, user_path
from edgepipe.errors import ArtifactError, StageError, StageOptionError
from edgepipe.input_range import check_input_range
from edgepipe.parity import compare_to_float, compared_samples, worst_output
from edgepipe.predict import predict, with_states
from edgepipe.range_table import RangeTable, read_table, table_text
from edgepipe.rescue import (
    ENOUGH_SAMPLES,
    FLOAT_OUTPUT,
    advice,
    check_evaluation_data,
    doubt,
    kept_hashes,
    qat_advice,
    rescue_facts,
    rung_lines,
)
from edgepipe.schema import Unit, near_miss, record
from edgepipe.stage import StageContext
from edgepipe.state import (
    Steps,
    are_independent,
    data_inputs,
    is_stateful,
    refuse_streaming,
    state_numbers,
)
from edgepipe.stats import paired_difference_interval
from edgepipe.units import format_value

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.array_ops.calibration import CalibrationReport
    from edgepipe.array_ops.load import Samples, SampleStream
    from edgepipe.tflite_ops.ladder import RoundWeights

log = logging.getLogger(__name__)

# Real samples that a rewritten file must agree on with the one it was made from
REWRITE_SAMPLES = 8
# Samples that calibration data is compared with: enough for a mean and a spread
COMPARED_SAMPLES = 500
# Samples taken with "auto" where the ranges are given: those of a usual calibration set
ENOUGH_UNSETTLED = 500
LEARNED = "learned"
DEFAULT_METRIC = "top1"
PREPARE_ALIKE = (
    "give calibration and evaluation data the same scale, mean and std: no rung mends ranges that were"
    " taken from other values"
)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """What ``max_drop`` is judged by, and the float file judged by it.

    ``answered`` gives a model's score and, where the metric counts samples, which were right. ``doubts``
    say where calibration data looks prepared in another way.
    """

    evaluation: Samples
    metric: str
    answered: Callable[[Artifact], tuple[float, np.ndarray | None]]
    base: float
    was_right: np.ndarray | None
    doubts: tuple[str, ...]


@record
class QuantizeInt8:
    """Activations int8 with scale and zero point, weights int8 symmetric per output channel.

    ``data`` names the calibration set. ``samples = "auto"`` takes as many of it, in a seeded order, as
    activation ranges need to settle, all if they never do; a number is a cap (a seeded choice; 0: all).
    ``method`` says how each activation's range follows from them: the union of the samples' ranges
    (``min_max``), their moving average, without 0.01 % of the values at each end (``percentile``),
    with the least squared error (``mse``), or nearest in distribution (``kl``). ``ranges`` names a
    file of ranges to take instead, such as the ``ranges.json`` of an earlier run.
    ``input_dtype`` and ``output_dtype`` are those of the file's doors. Operators without an int8 form
    are written with others that have one (`tflite_ops.rewrite`; not with ``rewrite = false``). Anything
    that would still stay in float is an error unless its operators are in ``allow_float``. ``min_sqnr`` is the least signal
    to quantisation-noise ratio against the float file on real samples, over all outputs.

    With ``max_drop``, like ``"1 point"``, the stage climbs a ladder (`tflite_ops.ladder`) until the
    int8 file loses no more of ``metric`` on the data set ``evaluate``: plain, other ranges,
    equalisation, ranges tensor by tensor, bias correction, learned rounding, 16 bits (or float, where ``allow_float`` lets it)
    for the fewest layers. If no rung holds it is an error that names the layers at fault. A file that holds
    perhaps by luck ends the climb where the next rung would cost latency; not with ``until = "sure"``.
    """

    name: ClassVar[str] = "quantize_int8"
    title: ClassVar[str] = "quantise to full int8 with ranges from representative data"
    accepts: ClassVar[tuple[str, ...]] = ("tflite",)
    produces: ClassVar[str] = "tflite"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.array_ops",
        "edgepipe.input_range",
        "edgepipe.parity",
        "edgepipe.predict",
        "edgepipe.range_table",
        "edgepipe.rescue",
        "edgepipe.state",
        "edgepipe.stats",
        "edgepipe.tflite_ops.bias",
        "edgepipe.tflite_ops.calibrate",
        "edgepipe.tflite_ops.channels",
        "edgepipe.tflite_ops.equalise",
        "edgepipe.tflite_ops.flatbuffer",
        "edgepipe.tflite_ops.inspect",
        "edgepipe.tflite_ops.ladder",
        "edgepipe.tflite_ops.quantize",
        "edgepipe.tflite_ops.rewrite",
        "edgepipe.tflite_ops.run",
        "edgepipe.tflite_ops.scalar_functions",
        "edgepipe.tflite_ops.sensitivity",
        "edgepipe.tflite_ops.sparse",
        "edgepipe.tflite_ops.stand_in",
        "edgepipe.torch_ops.rounding",
        "edgepipe.torch_ops.tflite_module",
    )
    packages: ClassVar[tuple[str, ...]] = (
        "litert-quantizer",
        "ai-edge-litert",
        "numpy",
        "pillow",
        # of the rung that learns to round, which is left out where it is not installed
        "torch",
    )

    data: str = "calibration"
    samples: int | Literal["auto"] = "auto"
    method: Literal["min_max", "moving_average", "percentile", "mse", "kl"] = "min_max"
    ranges: Path | None = None
    input_dtype: Literal["int8", "uint8", "float32"] = "int8"
    output_dtype: Literal["int8", "uint8", "float32"] = "int8"
    allow_float: tuple[str, ...] = ()
    allow_random: bool = False
    min_samples: int = 8
    rewrite: bool = True
    # a second data set whose statistics the calibration set must resemble, such as "evaluation"
    compare_with: str = ""
    min_sqnr: Annotated[float, Unit("level")] = 10.0
    max_drop: Annotated[float, Unit("points")] = 0.0
    evaluate: str = ""
    until: Literal["held", "sure"] = "held"
    # the recipe's [evaluate] metric unless given; of a model with state its steps are judged
    metric: str = ""
    steps: Steps = "last"

    def __post_init__(self) -> None:
        check_samples(self.samples, stage=self.name)
        if self.max_drop < 0 or bool(self.max_drop) != bool(self.evaluate):
            raise StageOptionError(
                "quantize_int8: max_drop is above 0 points and goes with evaluate, data to judge by",
                hint='max_drop = "1 point", evaluate = "NAME of a [data] table"',
            )
        if self.until == "sure" and not self.max_drop:
            raise StageOptionError(
                'quantize_int8: until = "sure" is for the ladder that max_drop climbs',
                hint='max_drop = "1 point", evaluate = "NAME of a [data] table"',
            )
        if self.evaluate and self.evaluate == self.data:
            raise StageOptionError(
                f"quantize_int8: evaluate = {self.evaluate!r} is the calibration set",
                hint="name a data set of its own: a model fits the data that its ranges were taken from",
            )

    def files(self) -> tuple[Path, ...]:
        return (self.ranges,) if self.ranges is not None else ()

    def data_names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.data, self.compare_with, self.evaluate) if name)

    def functions(self) -> tuple[str, ...]:
        return (self.metric,) if ":" in self.metric else ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        from importlib.metadata import version

        from edgepipe.array_ops.calibration import check_calibration, file_batches
        from edgepipe.array_ops.load import open_samples
        from edgepipe.tflite_ops import calibrate
        from edgepipe.tflite_ops import quantize as ops
        from edgepipe.tflite_ops.flatbuffer import parse_model
        from edgepipe.tflite_ops.sparse import sparsity_facts

        content = artifact.path.read_bytes()
        where = artifact.path.name
        refuse_streaming(artifact, "no ranges can be taken of it")
        self._check_doors(artifact)
        ops.check_quantizable(parse_model(content, where=where), where=where)
        specs = source_specs(artifact.inputs)
        given = self._given_ranges(artifact, context)
        # where nothing settles there is nothing to tell how many
        wanted = ENOUGH_UNSETTLED if self.samples == "auto" and given is not None else self.samples
        source = self._source(context, self.data, 0 if wanted == "auto" else wanted)
        samples = with_states(open_samples(source, specs), artifact)
        reference = None
        if self.compare_with:
            reference = open_samples(
                self._source(context, self.compare_with, COMPARED_SAMPLES), specs
            )

        def check(taken: SampleStream) -> CalibrationReport:
            return check_calibration(
                taken,
                specs,
                source=source,
                reference=reference,
                allow_random=self.allow_random,
                min_samples=self.min_samples,
            )

        # bad data is told before anything is computed
        first = calibrate.in_order(samples, calibrate.looks(len(samples), wanted)[0])
        report = check(first)
        judged = self._judged(artifact, first, report, context) if self.max_drop else None
        content, fused = ops.fuse_activations(content, where=where)
        for line in fused:
            log.info("fused %s", line)
        content, rewritten = self._rewritten(artifact, content, first)
        if given is None:
            samples, report, ranges = calibrate.settled_ranges(
                content,
                samples,
                artifact.inputs,
                report,
                samples=wanted,
                check=check,
                where=where,
                seed=context.seed,
            )
            found, _ = calibrate.find_ranges(
                content,
                lambda: file_batches(samples, artifact.inputs),
                method=self.method,
                where=where,
                total=len(samples),
                ranges=ranges,
            )
            table = RangeTable(found, self.method, len(samples), report.origin)
        else:
            ops.check_ranges(given.ranges, content, where=where)
            log.info("taking %d %s ranges as they are", len(given.ranges), given.method)
            table = given
        for warning in report.warnings:
            log.warning("calibration: %s", warning)

        rescued: dict[str, Any] = {}
        if judged is not None:
            if len(samples) > len(first):
                self._check_evaluation(samples, judged.evaluation, context)
            content, table, quantized, rescued = self._rescue(artifact, content, table, samples, judged, context)  # fmt: skip
        else:
            quantized = ops.quantize(
                content,
                table.ranges,
                input_dtype=self.input_dtype,
                output_dtype=self.output_dtype,
                states=state_numbers(artifact),
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
            **rescued,
            "fused_activations": list(fused),
            "rewritten": list(rewritten),
            # so that an evaluation on the same samples can say so
            "calibration_samples": kept_hashes(samples),
            **sparsity_facts(quantized, where=path.name),
            "quantizer": f"litert-quantizer {version('litert-quantizer')}",
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
        }
        return dataclasses.replace(result, facts=facts)

    def _check_doors(self, artifact: Artifact) -> None:
        if is_stateful(artifact.inputs) and self.input_dtype != self.output_dtype:
            raise StageOptionError(
                f"quantize_int8: a state comes out as {self.output_dtype} and goes in as {self.input_dtype}",
                hint="give input_dtype and output_dtype the same value, so that an application copies the bytes",
            )

    def _rewritten(
        self, artifact: Artifact, content: bytes, samples: SampleStream
    ) -> tuple[bytes, tuple[str, ...]]:
        """The float file in operators that have an int8 form, proven on samples, and what was done."""
        from edgepipe.array_ops.calibration import file_batches
        from edgepipe.tflite_ops.equalise import check_unchanged
        from edgepipe.tflite_ops.rewrite import clamp_masks, rewrite

        # ranges that training found are of this graph's tensors and no others
        if not self.rewrite or artifact.facts.get("learned_ranges"):
            return content, ()
        where = artifact.path.name
        changed, told = rewrite(content, where=where)
        changed, masks = clamp_masks(changed, lambda: file_batches(samples, artifact.inputs), where=where)  # fmt: skip
        told = (*told, *masks)
        for line in told:
            log.info("rewrote %s", line)
        if told:
            few = itertools.islice(file_batches(samples, artifact.inputs), REWRITE_SAMPLES)
            check_unchanged(content, changed, few, where=where, hint="set rewrite = false, and report it with the model")  # fmt: skip
        return changed, told

    def _judged(
        self, artifact: Artifact, calibration: SampleStream, report: CalibrationReport, context: StageContext
    ) -> _Judged:  # fmt: skip
        """The float file on the data of ``evaluate``; DataError for data that cannot judge."""
        from edgepipe.array_ops.calibration import compare_inputs
        from edgepipe.array_ops.load import labels_of, load_samples
        from edgepipe.array_ops.task_metrics import as_judged, correct, task_metric

        root = context.root or Path.cwd()
        metric = self.metric or DEFAULT_METRIC
        specs = source_specs(artifact.inputs)
        evaluation = load_samples(self._source(context, self.evaluate, 0), specs)
        labels = labels_of(evaluation)
        self._check_evaluation(calibration, evaluation, context)
        if len(evaluation) < ENOUGH_SAMPLES:
            log.warning(
                "max_drop is judged on %d samples, one of which is %s",
                len(evaluation), format_value(100 / max(len(evaluation), 1), "points"),
            )  # fmt: skip

        def answered(model: Artifact) -> tuple[float, np.ndarray | None]:
            found = predict(model, evaluation.inputs, steps=self.steps)
            judged, known = as_judged(metric, found, labels, steps=self.steps)
            is_right = correct(metric, judged, known, root=root)
            score = task_metric(metric, judged, known, root=root)
            return score, is_right if are_independent(metric, self.steps) else None

        base, was_right = answered(artifact)
        log.info("float model: %s %.4f on %d samples of %s", metric, base, len(evaluation), evaluation.origin)  # fmt: skip
        check_input_range(artifact, evaluation, metric=metric, score=base, root=root, steps=self.steps)  # fmt: skip
        doubts = tuple(compare_inputs(report.inputs, evaluation, specs))
        for line in doubts:
            log.warning("calibration: %s", line)
        return _Judged(evaluation, metric, answered, base, was_right, doubts)

    def _check_evaluation(
        self, calibration: SampleStream, evaluation: Samples, context: StageContext
    ) -> None:
        sources = (context.data[self.data], self._source(context, self.evaluate, 0))
        check_evaluation_data(calibration, evaluation, sources, where="quantize_int8")

    def _rescue(
        self,
        artifact: Artifact,
        content: bytes,
        table: RangeTable,
        samples: SampleStream,
        judged: _Judged,
        context: StageContext,
    ) -> tuple[bytes, RangeTable, bytes, dict[str, Any]]:
        """Climb the ladder: the float file that was quantised at last, its ranges, the int8 file and
        the record. StageError (``accuracy``) with all rungs where none holds."""
        from edgepipe.array_ops.calibration import file_batches
        from edgepipe.tflite_ops.ladder import Judgement, climb

        where = artifact.path.name
        metric, base, evaluation = judged.metric, judged.base, judged.evaluation
        trial = context.work_dir / "trial.tflite"

        def judge(int8: bytes) -> Judgement:
            trial.write_bytes(int8)
            inputs, outputs = self._specs(artifact, int8)
            score, is_right = judged.answered(make_artifact("tflite", trial, inputs=inputs, outputs=outputs, parent=artifact))  # fmt: skip
            interval = None
            if judged.was_right is not None and is_right is not None:
                _, low, high = paired_difference_interval(
                    judged.was_right.tolist(), is_right.tolist()
                )
                interval = (100 * low, 100 * high)
            return Judgement(score, 100 * (base - score), len(evaluation), interval)

        rescue = climb(
            content,
            table.ranges,
            table.method,
            batches=lambda: file_batches(samples, artifact.inputs),
            judge=judge,
            max_drop=self.max_drop,
            until=self.until,
            input_dtype=self.input_dtype,
            output_dtype=self.output_dtype,
            allow_float=self.allow_float,
            round_weights=_round_weights(context.seed),
            states=state_numbers(artifact),
            where=where,
        )
        trial.unlink(missing_ok=True)
        facts = rescue_facts(
            rescue,
            max_drop=self.max_drop,
            data=evaluation.origin,
            metric=metric,
            samples=len(evaluation),
            float_score=base,
        )
        lines = rung_lines(facts)
        if not rescue.held:
            culprits = ", ".join(f"{c.operator} {c.layer!r} (noise {c.noise:.2g} alone)" for c in rescue.culprits)  # fmt: skip
            at_fault = f"; layers at fault: {culprits}" if culprits else ""
            raise StageError(
                f"no rung keeps {metric} within {format_value(self.max_drop, 'points')} of float ({base:.4f} on"
                f" {evaluation.origin}){at_fault}\n"
                + "\n".join((*lines, *rescue.causes, *judged.doubts)),
                stage=self.name,
                hint=PREPARE_ALIKE
                if judged.doubts
                else advice(rescue, steps=_steps(evaluation, artifact)),
                code="accuracy",
            )
        for line in (*lines, *rescue.causes):
            log.info("%s", line)
        interval = rescue.result.judgement.interval_points
        if interval is not None and interval[1] > self.max_drop:
            log.warning("%s", doubt(rescue.result.judgement.samples, interval, self.max_drop))
        if not rescue.result.sure:
            certain = 'until = "sure" gives layers 16 bits, or ' if self.until == "held" else ""
            log.info("for a file nearer to float %s%s", certain, qat_advice(rescue.float_latency_s, steps=_steps(evaluation, artifact)))  # fmt: skip
        last = RangeTable(rescue.ranges, rescue.method, table.samples, table.data)
        return rescue.float_content, last, rescue.content, {"rescue": facts}

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
        samples: SampleStream,
        float_content: bytes,
        quantized: bytes,
    ) -> dict[str, Any]:
        """int8 against float on real samples; StageError with the first tensor that departs."""
        from edgepipe.array_ops.calibration import file_batches
        from edgepipe.tflite_ops.quantize import departures

        parity = compare_to_float(before, after, samples, precision="int8", stage=self.name)
        worst, sqnr_db = worst_output(parity)
        dead = next(
            (n for n, e in parity["outputs"].items()
             if e["variation_db"] is not None and e["variation_db"] < min(0.0, self.min_sqnr)), None,
        )  # fmt: skip
        # a file that the ladder let pass was judged by what it is for, one of random data is for its latency
        if (
            dead is not None
            and not (self.max_drop or samples.is_random)
            and sqnr_db >= self.min_sqnr
        ):
            step = next((s.scale for s in after.outputs if s.name == dead), 0.0)
            raise StageError(
                f"int8 output {dead!r} is off by more than it varies on {samples.origin}:"
                f" {-parity['outputs'][dead]['variation_db']:.1f} dB more noise than differences between samples"
                + (f", one step is {step:.3g}" if step else ""),
                stage=self.name,
                hint=f'{FLOAT_OUTPUT}; max_drop and evaluate judge it by what it is for; min_sqnr = "-200 dB" accepts it, as of a model that is not trained',
                code="parity",
            )
        if not self.max_drop and sqnr_db < self.min_sqnr:
            few = samples.take(compared_samples(len(samples))[:4])
            rows = departures(float_content, quantized, file_batches(few, before.inputs))
            first = next((r for r in rows if r[2] < self.min_sqnr), None)
            at = f"; the first tensor below it is {first[0]!r}, made by {first[1]} ({first[2]:.1f} dB)" if first else ""  # fmt: skip
            raise StageError(
                f"int8 output {worst!r} is {sqnr_db:.1f} dB from the float model on"
                f" {samples.origin}, below min_sqnr = {self.min_sqnr:g} dB{at}",
                stage=self.name,
                hint="`edgepipe explain FLOAT.tflite --data SAMPLES` says which layer and why; max_drop mends much of it,"
                ' or accept it with min_sqnr = "... dB"',
                code="parity",
            )
        return parity


def check_samples(samples: int | Literal["auto"], *, stage: str) -> None:
    """StageOptionError for a negative number."""
    if samples != "auto" and samples < 0:
        raise StageOptionError(
            f"{stage}: samples = {samples} is negative", hint='write "auto", a number, or 0 for all'
        )


def _steps(samples: Samples, artifact: Artifact) -> int:
    """Inferences for one sample."""
    return next(iter(samples.inputs.values())).shape[1] if is_stateful(artifact.inputs) else 1


def _round_weights(seed: int) -> RoundWeights | None:
    """AdaRound, where PyTorch is installed; it is imported only once that rung is reached."""
    if importlib.util.find_spec("torch") is None:
        return None

    def rounding(content: bytes, int8: bytes, batches: Any) -> tuple[bytes, str]:
        from edgepipe.torch_ops.rounding import round_weights

        return round_weights(content, int8, batches, seed=seed)

    return rounding


def source_specs(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Input specs as the source model has them: data is prepared for that layout, sequences where it has state."""
    from edgepipe.array_ops.layout import permute_shape

    moved = tuple(
        dataclasses.replace(
            spec,
            shape=permute_shape(spec.shape, spec.layout, spec.source_layout)
            if spec.layout != spec.source_layout
            else spec.shape,
            layout=spec.source_layout,
        )
        for spec in specs
    )
    return data_inputs(moved)
