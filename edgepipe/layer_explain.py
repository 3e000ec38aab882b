"""Layer by layer, what an int8 file lost against its float file, why, and which rung of the ladder mends it."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource, at_most
from edgepipe.errors import StageError
from edgepipe.measurement import Measurement
from edgepipe.predict import predict, with_states
from edgepipe.stages.quantize_int8 import source_specs
from edgepipe.state import Steps
from edgepipe.table import Table
from edgepipe.units import format_seconds

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.array_ops.compare import OutputError
    from edgepipe.array_ops.load import Samples
    from edgepipe.tflite_ops.layer_noise import LayerNoise, Repairs

log = logging.getLogger(__name__)

# Samples that layers are compared on: ranges and channels are seen, and each layer's own file is run on them.
SAMPLES = 32
# Those that plain int8 takes its ranges from (as `quantize_int8`).
PLAIN_SAMPLES = 500
# A layer whose noise alone is above this, -20 dB on the outputs, is at fault (as `ladder.CULPRIT`).
FAULT = 0.01
# Of the layers at fault so many are made float, one by one, to see what that gives back.
TRIED_IN_FLOAT = 5
# Share of values outside the scale from which on clipping is a cause.
CLIPPED = 0.001
# A range that data uses a quarter of has lost two of its eight bits.
HALF_USED = 0.25
STEPS = 255
# Samples that the rungs of the ladder are tried on (as `ladder.COMPARED`).
RUNG_SAMPLES = 64
# Points of the task metric within which a rung mends a model, as `quantize --max-drop` would be told.
RUNG_DROP = 1.0
# What is named where no rung mends a layer.
NO_RUNG = "qat"


@dataclasses.dataclass(frozen=True)
class Layer:
    """``noise`` as `LayerNoise`. ``noise_alone`` (0 to 1) is what the layer puts on the outputs if it
    alone is int8; None where it was not tried. ``score_if_float`` is the task metric, and
    ``noise_if_float`` the noise of the outputs, if it alone is float. ``why`` says what is wrong with it,
    ``rung`` which rung of the ladder mends that; both "" for a layer that is not at fault.
    ``noise_after`` is its noise alone after that rung; None where the rung is named by rule only.
    """

    noise: LayerNoise
    noise_alone: float | None = None
    noise_if_float: float | None = None
    score_if_float: float | None = None
    why: str = ""
    rung: str = ""
    noise_after: float | None = None

    @property
    def is_at_fault(self) -> bool:
        return self.noise_alone is not None and self.noise_alone > FAULT


@dataclasses.dataclass(frozen=True)
class TriedRung:
    """A rung of the ladder that was tried on the whole file, like its first one, ``plain``.

    ``noise``, ``sqnr_db`` and ``score`` are of its outputs, as of `Explanation`; ``held`` says that the
    model is mended (`RUNG_DROP`, without labels `FAULT`), ``kept`` that later rungs build on it.
    ``noise_alone`` is what each of the worst layers alone puts on the outputs then.
    """

    rung: str
    did: str
    noise: float
    sqnr_db: float
    score: float | None
    held: bool
    kept: bool
    noise_alone: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """``layers`` in order of execution. ``output_noise`` is from 0 to 1 (`noise_share`), like all noise here. ``score`` and ``float_score`` of the files as they are, None
    without labels; ``made_noise`` and ``made_score`` of the int8 file that was made anew with the
    given file's ranges, which what a layer in float gives back is compared with."""

    layers: tuple[Layer, ...]
    samples: int
    data: str
    sqnr_db: float
    output_noise: float
    score: float | None
    float_score: float | None
    made_noise: float | None
    made_score: float | None
    metric: str
    rungs: tuple[TriedRung, ...] = ()

    @property
    def at_fault(self) -> list[Layer]:
        """The layers that would spoil the model alone, the worst first."""
        return sorted(
            (la for la in self.layers if la.is_at_fault), key=lambda la: -(la.noise_alone or 0)
        )


def explain_layers(
    float_model: Artifact,
    quantised: Artifact,
    data: DataSource,
    *,
    evaluation: DataSource | None = None,
    metric: str = "top1",
    root: Path,
    steps: Steps = "last",
    try_rungs: bool = True,
) -> Explanation:
    """Compare two TFLite files of one model on real samples, tensor by tensor.

    ``data`` gives up to `SAMPLES` inputs. With an ``evaluation`` set with labels the task metric is
    told too; of a model with state ``steps`` are judged. Sensitivity is measured, by files made for it: each layer alone in int8, and for the
    worst `TRIED_IN_FLOAT` the layer alone in float. With ``try_rungs`` the ladder is climbed as well,
    and the rung that is named for each of these is the first that mended it. Raises StageError and ArtifactError as
    `comparable`, DataError where the samples do not fit or ``evaluation`` has no labels.
    """
    from edgepipe.array_ops.calibration import file_batches
    from edgepipe.array_ops.compare import compare
    from edgepipe.array_ops.load import labels_of, load_samples
    from edgepipe.array_ops.task_metrics import as_judged, task_metric
    from edgepipe.tflite_ops import layer_noise as ops
    from edgepipe.tflite_ops.rewrite import clamp_masks
    from edgepipe.tflite_ops.sensitivity import noise_share

    content, int8 = float_model.path.read_bytes(), quantised.path.read_bytes()
    where = (float_model.path.name, quantised.path.name)
    content = ops.comparable(content, int8, where=where)
    specs = source_specs(float_model.inputs)
    samples = _fit_samples(data, specs, SAMPLES)
    judged = load_samples(evaluation, specs) if evaluation is not None else samples
    labels = labels_of(judged) if evaluation is not None else None
    batches = _at_most(file_batches(with_states(samples, float_model), float_model.inputs), SAMPLES)
    content, _ = clamp_masks(content, lambda: batches, where=where[0])

    def answers(model: Artifact) -> dict[str, np.ndarray]:
        return predict(model, judged.inputs, steps=steps)

    def score_of(found: Mapping[str, np.ndarray]) -> float | None:
        if labels is None:
            return None
        return task_metric(metric, *as_judged(metric, found, labels, steps=steps), root=root)

    def judge(found: Mapping[str, np.ndarray]) -> tuple[float, float | None]:
        noise = noise_share(list(expected.values()), [found[name] for name in expected])
        return noise, score_of(found)

    expected = answers(float_model)
    float_score = score_of(expected)
    outputs = answers(quantised)
    errors = compare(expected, outputs)
    output_noise, score = judge(outputs)
    log.info("comparing layers on %d samples of %s", len(samples), samples.origin)
    rows = ops.layer_noise(content, int8, batches)
    repairs = ops.find_repairs(content, batches)
    log.info("making one file for each layer, in which it alone is int8")
    alone = ops.noise_alone(content, int8, batches)
    inputs = _inputs_of(rows, int8)
    layers = [_with_advice(Layer(row, alone.get(row.layer)), repairs, inputs) for row in rows]
    worst = [la for la in sorted(layers, key=lambda la: -(la.noise_alone or 0)) if la.is_at_fault]
    given_back: dict[str, tuple[float, float | None]] = {}
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        for name in ("", *(la.noise.layer for la in worst[:TRIED_IN_FLOAT])) if worst else ():
            log.info("making %s", f"{name!r} float" if name else "the int8 file anew, all layers")
            path = Path(folder) / "trial.tflite"
            try:
                path.write_bytes(ops.without_layer(content, int8, name, batches))
            except StageError as exc:  # the quantiser has no such mixture
                log.warning("%s", exc.message)
                continue
            trial = make_artifact(
                "tflite", path, inputs=float_model.inputs, outputs=float_model.outputs
            )
            given_back[name] = judge(answers(trial))
    made_noise, made_score = given_back.get("", (None, None))
    rungs: tuple[TriedRung, ...] = ()
    if try_rungs and worst:
        few = load_samples(at_most(data, RUNG_SAMPLES), specs)
        rungs = _tried_rungs(
            content, quantised, _at_most(file_batches(with_states(few, float_model), float_model.inputs), RUNG_SAMPLES),
            [la.noise.layer for la in worst[:TRIED_IN_FLOAT]],
            lambda trial: (*judge(found := answers(trial)), compare(expected, found)),
            float_score,
        )  # fmt: skip
        layers = [_with_tried_rung(la, rungs) for la in layers]
    return Explanation(
        rungs=rungs,
        layers=tuple(_with_gain(la, given_back) for la in layers), samples=len(samples), data=samples.origin,
        sqnr_db=min(e.sqnr_db for e in errors.values()), output_noise=output_noise, score=score, made_noise=made_noise, made_score=made_score, metric=metric,
        float_score=float_score,
    )  # fmt: skip


def _fit_samples(data: DataSource, specs: Sequence[TensorSpec], most: int) -> Samples:
    """Samples that say something of a model in use. Raises DataError as `check_calibration`, but few do."""
    from edgepipe.array_ops.calibration import check_calibration
    from edgepipe.array_ops.load import load_samples

    samples = load_samples(at_most(data, most), specs)
    report = check_calibration(samples, specs, source=data, allow_random=True, min_samples=1)
    for warning in report.warnings:
        log.warning("%s: %s", samples.origin, warning)
    return samples


def _at_most(batches: Iterable[Sequence[np.ndarray]], count: int) -> list[Sequence[np.ndarray]]:
    """Evenly spaced ones: the sequences of a model with state hold many more inferences than samples."""
    found = list(batches)
    return found[:: -(-len(found) // count)]


def _tried_rungs(
    content: bytes,
    quantised: Artifact,
    batches: Sequence[Sequence[np.ndarray]],
    layers: Sequence[str],
    judge: Callable[[Artifact], tuple[float, float | None, Mapping[str, OutputError]]],
    float_score: float | None,
) -> tuple[TriedRung, ...]:
    """Climb the ladder from ``content`` (as `comparable` gives it) with the ranges of ``quantised``;
    nothing where the quantiser cannot make one of its files."""
    from edgepipe.tflite_ops.flatbuffer import parse_model
    from edgepipe.tflite_ops.inspect import model_specs
    from edgepipe.tflite_ops.ladder import Judgement
    from edgepipe.tflite_ops.layer_noise import noise_alone_by_rung

    judged: dict[bytes, tuple[float, float | None, float]] = {}

    def like(ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            dataclasses.replace(mine, dtype=new.dtype, scale=new.scale, zero_point=new.zero_point)
            for mine, new in zip(ours, theirs, strict=True)
        )

    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        path = Path(folder) / "rung.tflite"

        def judgement(int8: bytes) -> Judgement:
            path.write_bytes(int8)
            inputs, outputs = model_specs(parse_model(int8, where="the rung"), where="the rung")
            trial = make_artifact("tflite", path, inputs=like(quantised.inputs, inputs), outputs=like(quantised.outputs, outputs))  # fmt: skip
            noise, score, errors = judge(trial)
            judged[int8] = noise, score, min(e.sqnr_db for e in errors.values())
            if score is None or float_score is None:
                return Judgement(
                    1 - noise, 100 * noise, len(batches), told=f"noise {noise:.2g} of the signal"
                )
            return Judgement(score, 100 * (float_score - score), len(batches))

        log.info("trying the rungs of the ladder")
        try:
            found = noise_alone_by_rung(
                content, quantised.path.read_bytes(), layers, batches, judge=judgement,
                max_drop=100 * FAULT if float_score is None else RUNG_DROP,
            )  # fmt: skip
        except StageError as exc:
            log.warning("the rungs cannot be tried, so they are named by rule: %s", exc.message)
            return ()
    rows = []
    for rung, made, alone in found:
        noise, score, sqnr_db = judged[made]
        rows.append(TriedRung(rung.name, rung.did, noise, sqnr_db, score, rung.held, rung.kept, alone))  # fmt: skip
    return tuple(rows)


def _with_tried_rung(layer: Layer, rungs: Sequence[TriedRung]) -> Layer:
    """The first rung that brings a layer's noise below `FAULT`; else the one that mends the model in
    spite of it; else none, with the least noise that any left. One that was not tried stays as it is."""
    name = layer.noise.layer
    if not rungs or name not in rungs[0].noise_alone:
        return layer
    mended = next((r for r in rungs if r.kept and r.noise_alone[name] <= FAULT), None)
    mended = mended or next((r for r in rungs if r.held), None)
    if mended is rungs[0]:  # the model holds as it is: nothing was tried
        return layer
    if mended is None:
        least = min(r.noise_alone[name] for r in rungs)
        return dataclasses.replace(layer, rung=NO_RUNG, noise_after=least)
    return dataclasses.replace(layer, rung=mended.rung, noise_after=mended.noise_alone[name])


def _with_gain(layer: Layer, given_back: Mapping[str, tuple[float, float | None]]) -> Layer:
    if layer.noise.layer not in given_back:
        return layer
    noise, score = given_back[layer.noise.layer]
    return dataclasses.replace(layer, noise_if_float=noise, score_if_float=score)


def _inputs_of(rows: Sequence[LayerNoise], content: bytes) -> dict[str, list[LayerNoise]]:
    """The layers whose results each layer reads, by its name."""
    from edgepipe.tflite_ops.flatbuffer import parse_model

    graph = parse_model(content, where="the quantised model").subgraphs[0]
    known = {row.layer: row for row in rows}
    return {
        graph.tensors[o.outputs[0]].name: [
            known[name] for i in o.inputs if i >= 0 and (name := graph.tensors[i].name) in known
        ]
        for o in graph.operators
        if o.outputs
    }


def _with_advice(
    layer: Layer, repairs: Repairs, inputs: Mapping[str, Sequence[LayerNoise]]
) -> Layer:
    if not layer.is_at_fault:
        return layer
    why, rung = advise(layer.noise, repairs, inputs.get(layer.noise.layer, ()))
    return dataclasses.replace(layer, why=why, rung=rung)


def advise(noise: LayerNoise, repairs: Repairs, inputs: Sequence[LayerNoise]) -> tuple[str, str]:
    """(what is wrong with a layer that is at fault, the rung of the ladder that mends it).

    Told from what was measured of it and of the ``inputs`` it reads, in the order of the rungs; the
    ladder itself (``quantize_int8`` with ``max_drop``) tries them all and judges the file.
    """
    if noise.layer in repairs.dead_gains:
        return repairs.dead_gains[noise.layer], "equalise"
    if not noise.scale:
        return "it computes in float already: its noise comes from its inputs", "ranges"
    if noise.clipped > CLIPPED:
        return f"{noise.clipped:.2%} of its values lie outside {noise.scale_low:.3g} to {noise.scale_high:.3g}, what its scale can say", "ranges"  # fmt: skip
    if noise.steps_used < HALF_USED * STEPS and noise.dtype == "int8" and noise.low * noise.high > 0 and noise.steps_used < HALF_USED * _steps_to_0(noise):  # fmt: skip
        return (
            f"its values lie from {noise.low:.6g} to {noise.high:.6g}, far from 0, which an int8 range has to hold:"
            f" {noise.steps_used:.0f} of {STEPS} steps are left for them"
        ), "mixed"
    if noise.steps_used < HALF_USED * STEPS and noise.dtype == "int8":
        return f"its values use {noise.steps_used:.0f} of {STEPS} steps: the range is far wider than this data", "ranges"  # fmt: skip
    wide = max((n for n in (noise, *inputs) if n.outlier_channels), key=lambda n: n.spread, default=None)  # fmt: skip
    if wide is not None:
        which = "its" if wide is noise else f"of its input {short_name(wide.layer)!r} the"
        why = (
            f"{which} largest channel is {wide.spread:.0f} times the median one, which is left"
            f" {STEPS / wide.spread:.1f} of {STEPS} steps ({wide.outlier_channels} of {wide.channels} channels are so large)"
        )
        return why, "equalise" if wide.layer in repairs.equalisable else "mixed"
    if noise.dense_share < HALF_USED:
        return f"a few values far out: the rest would fit into {noise.dense_share:.0%} of its range", "ranges"  # fmt: skip
    if noise.bias_share > 0.5:
        return f"{noise.bias_share:.0%} of its noise is one and the same error in every value of a channel", "bias"  # fmt: skip
    return "rounding, with nothing that stands out", "rounding"


def _steps_to_0(noise: LayerNoise) -> float:
    """Steps between 0 and the value that lies farthest from it: 10 from 9.8 to 10 with steps of 1."""
    return max(abs(noise.low), abs(noise.high)) / noise.scale


def plain_int8(float_model: Artifact, data: DataSource, path: Path) -> Artifact:
    """Plain int8 of a float file, written to ``path``: ranges are the union of the samples', doors float32."""
    from edgepipe.array_ops.calibration import file_batches
    from edgepipe.tflite_ops.flatbuffer import parse_model
    from edgepipe.tflite_ops.quantize import (
        check_quantizable,
        collect_ranges,
        fuse_activations,
        quantize,
    )
    from edgepipe.tflite_ops.rewrite import clamp_masks, rewrite

    content, where = float_model.path.read_bytes(), float_model.path.name
    check_quantizable(parse_model(content, where=where), where=where)
    content, _ = rewrite(fuse_activations(content, where=where)[0], where=where)
    samples = _fit_samples(data, source_specs(float_model.inputs), PLAIN_SAMPLES)
    samples = with_states(samples, float_model)
    log.info("plain int8 by %d samples", len(samples))
    content, _ = clamp_masks(
        content, lambda: file_batches(samples, float_model.inputs), where=where
    )
    ranges = collect_ranges(content, file_batches(samples, float_model.inputs), where=where).table()
    path.write_bytes(quantize(content, ranges, input_dtype="float32", output_dtype="float32", where=where))  # fmt: skip
    return make_artifact("tflite", path, inputs=float_model.inputs, outputs=float_model.outputs)


# --- latency ------------------------------------------------------------------------------------------

# Operators that XNNPACK's delegate has a case for (VisitNode in LiteRT's xnnpack_delegate.cc).
IN_XNNPACK = frozenset(
    {"ABS", "ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CEIL", "CONCATENATION", "CONV_2D", "COS", "DEPTH_TO_SPACE",
     "DEPTHWISE_CONV_2D", "DEQUANTIZE", "DIV", "ELU", "EXP", "EXPAND_DIMS", "FLOOR", "FULLY_CONNECTED", "GELU",
     "HARD_SWISH", "LEAKY_RELU", "LOG", "LOGISTIC", "MAX_POOL_2D", "MAXIMUM", "MEAN", "MINIMUM", "MUL", "NEG",
     "PACK", "PAD", "PRELU", "QUANTIZE", "RELU", "RELU6", "RELU_N1_TO_1", "RESHAPE", "RESIZE_BILINEAR", "ROUND",
     "RSQRT", "SIN", "SLICE", "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT", "SQRT", "SQUARE", "SQUARED_DIFFERENCE",
     "SQUEEZE", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TRANSPOSE", "TRANSPOSE_CONV"}
)  # fmt: skip


def why_builtin(name: str, dtypes: frozenset[str]) -> str:
    """Why an operator is not delegated to XNNPACK; ``dtypes`` are those of its activations."""
    if "int16" in dtypes:
        return "16-bit activations: XNNPACK has 8-bit and float kernels only"
    if name not in IN_XNNPACK:
        return f"XNNPACK has no kernel for {name}"
    return "its types, shapes or options are not among those that XNNPACK takes"


@dataclasses.dataclass(frozen=True)
class OpTime:
    """One operator of the int8 file on the device; ``why_not`` is "" where it is delegated."""

    index: int
    name: str
    seconds: float
    share: float
    where: str
    why_not: str


def operator_times(measured: Mapping[str, Measurement], model: Path) -> list[OpTime]:
    """The operators of a measured file, as the board timed them; empty where it did not."""
    from edgepipe.tflite_ops.inspect import read_model

    found = measured.get("op_time")
    if found is None:
        return []
    graph = read_model(model).subgraphs[0]
    dtypes: dict[str, set[str]] = {}
    for operator in graph.operators:
        tensors = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
        dtypes.setdefault(operator.name, set()).update(
            t.dtype for t in tensors if not t.is_constant
        )
    ops = found.context["ops"]
    total_s = sum(op["seconds"] for op in ops) or 1.0
    return [
        OpTime(
            op["index"], op["name"], op["seconds"], op["seconds"] / total_s, op["where"],
            "" if op["where"] == "delegate" else why_builtin(op["name"], frozenset(dtypes.get(op["name"], ()))),
        )
        for op in ops
    ]  # fmt: skip


# --- text ------------------------------------------------------------------------------------------


def short_name(tensor: str) -> str:
    """A tensor's name as it fits into a line: converters join those of all that they fused with ``;``."""
    first = tensor.partition(";")[0]
    return first if len(first) <= 40 else "..." + first[-37:]


def summary(found: Explanation) -> list[str]:
    """The files as a whole, then one line for each layer at fault, the worst first."""
    lines = [f"outputs: {found.sqnr_db:.1f} dB SQNR against float, noise {found.output_noise:.2g}"]
    if found.score is not None and found.float_score is not None:
        lines[0] += f"; {found.metric} {found.score:.4f}, float {found.float_score:.4f}"
    if found.at_fault and found.output_noise <= FAULT:
        lines[0] += " (as it is, it holds: the layers below would spoil it if they were plain int8)"
    for layer in found.at_fault:
        noise = f"{layer.noise.operator} {short_name(layer.noise.layer)!r} alone puts {layer.noise_alone:.2g} of noise on the outputs"  # fmt: skip
        lines.append(f"{noise}: {layer.why}; rung: {_rung_text(layer)}{_gain_text(layer, found)}")
    if found.rungs and not any(r.held for r in found.rungs):
        best = min(found.rungs, key=lambda r: r.noise)
        lines.append(
            f"no rung that was tried mends the whole model (least noise {best.noise:.2g}, by {best.rung}): float32"
            " doors where they are int8, learned rounding (quantize --max-drop), or QAT"
        )
    if not found.at_fault:
        lines.append("no layer alone spoils the outputs (noise above -20 dB)")
    return lines


def _rung_text(layer: Layer) -> str:
    if layer.noise_after is None:
        return f"{layer.rung} (by rule, not tried)"
    if layer.rung == NO_RUNG:
        return f"none that was tried mends it (least noise {layer.noise_after:.2g}): learned rounding (quantize --max-drop) or QAT"  # fmt: skip
    return f"{layer.rung} (tried: {layer.noise_after:.2g} of noise left)"


def rungs_table(found: Explanation) -> Table:
    """What each rung that was tried made of the outputs and of the worst layers; no rows where none was."""
    layers = list(found.rungs[0].noise_alone) if found.rungs else []
    metric = [found.metric] if found.score is not None else []
    header = ("rung", "SQNR", "noise", *metric, *(f"{short_name(n)} alone" for n in layers), "verdict", "what was done")  # fmt: skip
    by_name = {la.noise.layer: la for la in found.layers}

    def row(name: str, sqnr_db: float, noise: float, score: float | None, alone: Sequence[float | None], *rest: str) -> tuple[str, ...]:  # fmt: skip
        scores = [f"{score:.4f}"] if score is not None else []
        return (name, f"{sqnr_db:.1f} dB", f"{noise:.2g}", *scores, *("" if a is None else f"{a:.2g}" for a in alone), *rest)  # fmt: skip

    rows = [row("as it is", found.sqnr_db, found.output_noise, found.score, [by_name[n].noise_alone for n in layers], "", "")]  # fmt: skip
    for r in found.rungs:
        verdict = "holds" if r.held else "" if r.kept else "undone"
        rows.append(row(r.rung, r.sqnr_db, r.noise, r.score, [r.noise_alone[n] for n in layers], verdict, r.did))  # fmt: skip
    allowed = f"{found.metric} within {RUNG_DROP:g} point of float" if metric else f"noise of at most {FAULT:g}"  # fmt: skip
    return Table(f"Rungs tried, from the cheapest on, up to {allowed} (learned rounding left out)", header, tuple(rows) if found.rungs else ())  # fmt: skip


def _gain_text(layer: Layer, found: Explanation) -> str:
    if layer.score_if_float is not None and found.made_score is not None:
        return f"; if it alone were float: {found.metric} {found.made_score:.4f} -> {layer.score_if_float:.4f}"  # fmt: skip
    if layer.noise_if_float is not None and found.made_noise is not None:
        return (
            f"; if it alone were float: noise {found.made_noise:.2g} -> {layer.noise_if_float:.2g}"
        )
    return ""


def layers_table(found: Explanation) -> Table:
    """One line for each layer, in order of execution."""
    header = ("layer", "operator", "SQNR", "adds", "noise alone", "seen", "scale says", "clipped", "scale", "zero", "dead", "outliers", "rung")  # fmt: skip
    rows = []
    for layer in found.layers:
        n = layer.noise
        rows.append((
            short_name(n.layer), n.operator, f"{n.sqnr_db:.1f} dB", f"{n.added:.2g}",
            "" if layer.noise_alone is None else f"{layer.noise_alone:.2g}",
            f"{n.low:.3g} to {n.high:.3g}", f"{n.scale_low:.3g} to {n.scale_high:.3g}" if n.scale else "float",
            f"{n.clipped:.2%}" if n.clipped else "", f"{n.scale:.3g}" if n.scale else "", str(n.zero_point) if n.scale else "",
            f"{n.dead_channels}/{n.channels}" if n.dead_channels else "",
            f"{n.outlier_channels}/{n.channels}" if n.outlier_channels else "", layer.rung,
        ))  # fmt: skip
    return Table(f"Layers on {found.samples} samples of {found.data} (noise alone: measured, this layer int8, all others float)", header, tuple(rows))  # fmt: skip


def ops_table(ops: Sequence[OpTime], *, device: str) -> Table:
    """The operators of the int8 file on a device, the slowest first."""
    ranked = sorted(ops, key=lambda op: -op.seconds)
    rows = [
        (
            str(op.index),
            op.name,
            format_seconds(op.seconds),
            f"{op.share:.1%}",
            op.where,
            op.why_not,
        )
        for op in ranked
    ]
    header = ("op", "name", "median", "share", "where", "why not delegated")
    return Table(f"Operators on {device}", header, tuple(rows))


def as_dict(found: Explanation) -> dict[str, Any]:
    """Plain data for ``--json``."""
    data = dataclasses.asdict(found)
    for entry, layer in zip(data["layers"], found.layers, strict=True):
        entry |= {**entry.pop("noise"), "steps_used": layer.noise.steps_used}
    return {"schema": 1, **data, "at_fault": [la.noise.layer for la in found.at_fault]}


def with_layout(specs: Sequence[TensorSpec], layout: str) -> tuple[TensorSpec, ...]:
    """Input specs whose samples come in another order of axes, like ``NCHW``."""
    return tuple(
        dataclasses.replace(s, source_layout=layout) if sorted(s.layout) == sorted(layout) else s
        for s in specs
    )
