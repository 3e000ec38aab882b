"""The frontier of precisions: every one of a model, what it keeps, and what it costs on a device.

Int8 is not always the fastest: without the instructions for it, or with islands of float, it loses to
float. So all are made, judged on the same samples and measured beside the float file; `mark_frontier`
says which of them no other one beats, and `why_slower` why one is slower than float.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import pipeline, stats
from edgepipe.adhoc import recipe_for, write_model
from edgepipe.artifact import Artifact
from edgepipe.bench import MeasureOptions, measure
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, EdgepipeError, NotReadyError, StageError
from edgepipe.inventory import Target
from edgepipe.measurement import Measurement
from edgepipe.predict import predict
from edgepipe.rescue import check_evaluation_data
from edgepipe.stages.load import ModelSource
from edgepipe.stages.quantize_int8 import source_specs
from edgepipe.state import Steps
from edgepipe.store import Store
from edgepipe.table import Table
from edgepipe.units import format_bytes, format_seconds, format_value

if TYPE_CHECKING:
    from edgepipe.device.base import Device

log = logging.getLogger(__name__)

FLOAT = "float32"
# All of a model, the usual order of their sizes; each but float is made by the stage beside it.
PRECISIONS: dict[str, tuple[str, Mapping[str, Any]]] = {
    FLOAT: ("", {}),
    "float16": ("quantize", {"precision": "float16"}),
    "dynamic_int8": ("quantize", {"precision": "dynamic_int8"}),
    "weight_int8": ("quantize", {"precision": "weight_int8"}),
    "weight_int4": ("quantize", {"precision": "weight_int4"}),
    "int16x8": ("quantize", {"precision": "int16x8"}),
    "int8": ("quantize_int8", {}),
}
# Costs that differ by less count as equal: what two measurements of one model differ by.
SAME = 0.03
# Weights only: arithmetic stays in float.
_RESTORED = ("float16", "weight_int8", "weight_int4")


@dataclasses.dataclass(frozen=True)
class Row:
    """One precision. What was not measured is None; ``error`` says why there is no file, or no figure.

    ``sqnr_db`` and ``agreement`` (share of equal answers) are against the float file; ``score`` is the
    task metric. ``latency_ratio`` is (estimate, low, high) against float, session by session in one
    process, with 95 % bounds where there are enough sessions; ``instructions`` those of one inference. ``memory_bytes`` is
    what a process grew by. ``on_frontier`` by `mark_frontier`, ``why`` by `why_slower`.
    """

    precision: str
    path: str = ""
    sha256: str = ""
    size_bytes: int | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    score: float | None = None
    latency_s: float | None = None
    latency_ratio: tuple[float, float, float] | None = None
    instructions: float | None = None
    instructions_ratio: float | None = None
    memory_bytes: float | None = None
    delegated_share: float | None = None
    float_islands: int = 0
    runtime_needs: tuple[Mapping[str, Any], ...] = ()
    on_frontier: bool = False
    why: tuple[str, ...] = ()
    error: str = ""

    @property
    def cost(self) -> float | None:
        """Time of an inference as a multiple of float's: measured, else by instructions."""
        return self.latency_ratio[0] if self.latency_ratio else self.instructions_ratio

    @property
    def is_slower(self) -> bool:
        """Certainly, as far as sessions tell, and by more than two measurements of one model differ."""
        if self.latency_ratio is not None:
            ratio, low, _ = self.latency_ratio
            return low > 1 and ratio > 1 + SAME
        return self.instructions_ratio is not None and self.instructions_ratio > 1 + SAME


def make_all(
    source: ModelSource,
    to_float: Sequence[str],
    data: DataSource,
    store: Store,
    folder: Path,
    *,
    precisions: Sequence[str],
    int8: Mapping[str, Any],
    others: Mapping[str, Any],
    more: Mapping[str, DataSource],
) -> dict[str, Artifact | EdgepipeError]:
    """These ``precisions`` as files in ``folder``, or the error that kept it from being made.

    ``to_float`` are the stages that lead to a float file, ``int8`` options of ``quantize_int8`` and
    ``others`` of ``quantize``. An error on the way to the float file is raised: then there is none.
    """
    made: dict[str, Artifact | EdgepipeError] = {}
    for precision in precisions:
        stage, options = PRECISIONS[precision]
        given = int8 if stage == "quantize_int8" else others
        stages: list[tuple[str, Mapping[str, Any]]] = [(name, {}) for name in to_float] + (
            [(stage, {**options, **given})] if stage else []
        )
        try:
            model = pipeline.convert(recipe_for(source, stages, data, more), store)
        except (StageError, ArtifactError) as exc:
            if not stage:
                raise
            log.warning("%s: %s", precision, exc.message.splitlines()[0])
            made[precision] = exc
            continue
        path = folder / f"{precision}.tflite"
        write_model(model, path)
        made[precision] = dataclasses.replace(model, path=path)
    return made


def compare_all(
    made: Mapping[str, Artifact | EdgepipeError],
    samples_from: DataSource,
    *,
    metric: str,
    root: Path,
    with_labels: bool,
    steps: Steps = "last",
) -> list[Row]:
    """What each file keeps of the float file's answers on the same samples.

    ``with_labels``: its task metric there as well, where the samples have labels. Of a model with
    state ``steps`` are judged.
    """
    from edgepipe.array_ops.compare import compare
    from edgepipe.array_ops.load import load_samples
    from edgepipe.array_ops.task_metrics import as_judged, predictions, task_metric

    float_model = made[FLOAT]
    assert isinstance(float_model, Artifact)
    samples = load_samples(samples_from, source_specs(float_model.inputs))
    labels = samples.labels if with_labels else None
    if with_labels and labels is None:
        log.warning("%s: no labels, so agreement with the float file is all that is told", samples.origin)  # fmt: skip
    expected = predict(float_model, samples.inputs, steps=steps)
    rows = []
    for precision, model in made.items():
        if not isinstance(model, Artifact):
            rows.append(Row(precision, error=model.message.splitlines()[0]))
            continue
        row = Row(
            precision, path=str(model.path), sha256=model.sha256, size_bytes=model.size_bytes,
            float_islands=len(model.facts.get("float_islands", ())) if precision == "int8" else 0,
            runtime_needs=tuple(model.facts.get("runtime_needs", ())),
        )  # fmt: skip
        log.info("running %s on %d samples", precision, len(samples))
        try:
            found = expected if precision == FLOAT else predict(model, samples.inputs, steps=steps)
            errors = compare(expected, found)
        except ArtifactError as exc:
            rows.append(dataclasses.replace(row, error=exc.message))
            continue
        ours, theirs = (predictions(metric, each, steps=steps) for each in (found, expected))
        score = None
        if labels is not None:
            judged, known = as_judged(metric, found, labels, steps=steps)
            score = task_metric(metric, judged, known, root=root)
        rows.append(
            dataclasses.replace(
                row,
                sqnr_db=min(e.sqnr_db for e in errors.values()),
                agreement=float((ours == theirs).mean()) if ours is not None else None,
                score=score,
            )
        )
    return rows


def check_judged_by(
    made: Mapping[str, Artifact | EdgepipeError], calibration: DataSource, evaluation: DataSource
) -> None:
    """DataError where the labelled samples are those that ranges are taken from."""
    from edgepipe.array_ops.load import open_samples

    float_model = made[FLOAT]
    assert isinstance(float_model, Artifact)
    sources = (calibration, evaluation)
    ours, theirs = (open_samples(s, source_specs(float_model.inputs)) for s in sources)
    check_evaluation_data(ours, theirs, sources, where="--data and --evaluate")


# ------------------------------------------------------------------------------------ on a device


def measure_all(
    rows: Sequence[Row],
    made: Mapping[str, Artifact | EdgepipeError],
    device: Device,
    target: Target,
    options: MeasureOptions,
) -> list[Row]:
    """The rows with what each file costs on a device, measured beside the float file.

    The float row is what was measured beside the first of the others that ran. A file that cannot
    run there, or a board that is not ready for it, is that row's error.
    """
    float_model = made[FLOAT]
    assert isinstance(float_model, Artifact)
    found: list[Row] = []
    beside: Mapping[str, Measurement] = {}
    for row in rows:
        model = made[row.precision]
        if row.precision == FLOAT or row.error or not isinstance(model, Artifact):
            found.append(row)
            continue
        log.info("measuring %s beside float on %s", row.precision, target.address)
        try:
            result = measure(model, device, target.profile, options, baseline=float_model)
        except NotReadyError as exc:
            if exc.code != "baseline-does-not-run":
                raise
            found.append(dataclasses.replace(row, error=exc.message))
            continue
        measured = {m.metric: m for m in result.measurements}
        runs = measured["runs_on_device"]
        if not runs.samples[0][0]:
            found.append(
                dataclasses.replace(row, error=f"does not run there: {runs.context['reason']}")
            )
            continue
        beside = beside or measured
        found.append(_with_costs(row, measured, options.tolerance))
    return [_as_baseline(row, beside) if row.precision == FLOAT else row for row in found]


def _median(measured: Mapping[str, Measurement], metric: str) -> float | None:
    sessions = measured[metric].valid_sessions if metric in measured else ()
    return stats.sessions_percentile(sessions, 0.5) if sessions else None


def _with_costs(row: Row, measured: Mapping[str, Measurement], tolerance: float) -> Row:
    context = measured["runs_on_device"].context
    clock = "cpu" if context["threads"] == 1 else "wall"
    ratio = None
    compared = measured.get(f"latency_ratio_{clock}")
    if compared is not None and compared.valid_sessions:
        logs = [stats.session_log_ratio(session) for session in compared.valid_sessions]
        decided = stats.decide_ratio(logs, tolerance)
        ratio = (decided.estimate, decided.low, decided.high)
    ours, theirs = _median(measured, "instructions"), _median(measured, "instructions_baseline")
    operators = measured.get("op_time")
    return dataclasses.replace(
        row,
        latency_s=_median(measured, f"latency_{clock}"),
        latency_ratio=ratio,
        instructions=ours,
        instructions_ratio=ours / theirs if ours and theirs else None,
        memory_bytes=_median(measured, "memory_anon"),
        delegated_share=operators.context["delegated_share"] if operators else None,
    )


def _as_baseline(row: Row, measured: Mapping[str, Measurement]) -> Row:
    if not measured:
        return row
    clock = "cpu" if measured["runs_on_device"].context["threads"] == 1 else "wall"
    operators = measured.get("op_time_baseline")
    latency_s, instructions = (
        _median(measured, f"{m}_baseline") for m in (f"latency_{clock}", "instructions")
    )
    return dataclasses.replace(
        row,
        latency_s=latency_s,
        latency_ratio=None if latency_s is None else (1.0, 1.0, 1.0),
        instructions=instructions,
        instructions_ratio=None if instructions is None else 1.0,
        memory_bytes=_median(measured, "memory_anon_baseline"),
        delegated_share=operators.context["delegated_share"] if operators else None,
    )


# ---------------------------------------------------------------------------------------- verdicts


def why_slower(row: Row, isa: Sequence[str] | None) -> tuple[str, ...]:
    """Why this precision takes longer than float, in words; empty where it does not.

    ``isa`` are the features of the cores it runs on as profiles name them, None where not known.
    """
    if not row.is_slower:
        return ()
    reasons = []
    if row.precision in _RESTORED:
        reasons.append("its weights are turned back into floats before they are used: that saves bytes, not time")  # fmt: skip
    if row.precision == "dynamic_int8":
        reasons.append("the activations of every layer are quantised anew in each inference")
    if row.precision == "int16x8":
        reasons.append("LiteRT computes 16-bit activations with reference kernels only")
    if row.float_islands:
        reasons.append(f"{row.float_islands} float island(s): values are dequantised and quantised again around them")  # fmt: skip
    integer = row.precision in ("int8", "dynamic_int8")
    if (
        integer
        and isa is not None
        and not {"dotprod", "i8mm", "avx_vnni", "avx512_vnni"} & set(isa)
    ):
        reasons.append("these cores have no int8 dot product (dotprod): int8 multiplies hardly faster than float")  # fmt: skip
    if row.delegated_share is not None and row.delegated_share < 0.9:
        reasons.append(
            f"XNNPACK has {row.delegated_share:.0%} of the time, builtin kernels the rest"
        )
    return tuple(reasons or ["no reason found: `edgepipe explain` and `edgepipe bench` show its operators"])  # fmt: skip


def mark_frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows, ``on_frontier`` where no other one is as good in everything and better in something.

    Compared are the score (else agreement, else SQNR), bytes, time and memory, as far as all rows with
    a file have them; costs within `SAME` count as equal.
    """
    alive = [row for row in rows if not row.error]

    def quality(row: Row) -> float | None:
        for name in ("score", "agreement", "sqnr_db"):
            if all(getattr(r, name) is not None for r in alive):
                return float(getattr(row, name))
        return None

    costs = [
        c
        for c in ("size_bytes", "cost", "memory_bytes")
        if all(getattr(r, c) is not None for r in alive)
    ]

    def beats(a: Row, b: Row) -> bool:
        qualities = quality(a), quality(b)
        if qualities[0] is None or qualities[1] is None or qualities[0] < qualities[1]:
            return False
        pairs = [(float(getattr(a, c)), float(getattr(b, c))) for c in costs]
        if any(ours > theirs * (1 + SAME) for ours, theirs in pairs):
            return False
        return qualities[0] > qualities[1] or any(
            ours * (1 + SAME) < theirs for ours, theirs in pairs
        )

    return [
        dataclasses.replace(
            row, on_frontier=not row.error and not any(beats(o, row) for o in alive)
        )
        for row in rows
    ]


def isa_of(target: Target) -> tuple[str, ...] | None:
    """Features that all clusters of the profile have; None where it does not say."""
    clusters = target.profile.clusters
    if not clusters:
        return None
    return tuple(sorted(set.intersection(*(set(c.isa) for c in clusters))))


# -------------------------------------------------------------------------------------------- text


def frontier_table(rows: Sequence[Row], *, metric: str, device: str) -> Table:
    """One line for each precision; columns that no row fills are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("precision", [f"{row.precision}{' *' * row.on_frontier}" for row in rows]),
        (metric, [_text(row.score, "{:.4f}") for row in rows]),
        ("agrees", [_text(row.agreement, "{:.2%}") for row in rows]),
        ("SQNR", ["" if row.precision == FLOAT else _text(row.sqnr_db, "{:.1f} dB") for row in rows]),
        ("file", ["" if row.size_bytes is None else format_bytes(row.size_bytes) for row in rows]),
        ("memory", ["" if row.memory_bytes is None else format_bytes(row.memory_bytes) for row in rows]),
        ("latency", ["" if row.latency_s is None else format_seconds(row.latency_s) for row in rows]),
        ("instructions", ["" if row.instructions is None else format_value(row.instructions, "") for row in rows]),
        ("time / float", [_ratio_text(row) for row in rows]),
    ]  # fmt: skip
    kept = [(title, cells) for title, cells in columns if any(cells)]
    where = f" on {device}" if device else ""
    lines = tuple(tuple(cells[i] for _, cells in kept) for i in range(len(rows)))
    return Table(f"Precisions{where} (* = none is better in everything)", tuple(t for t, _ in kept), lines)  # fmt: skip


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _ratio_text(row: Row) -> str:
    if row.latency_ratio is None:
        return _text(row.instructions_ratio, "{:.2f} (instructions)")
    estimate, low, high = row.latency_ratio
    bounded = row.precision != FLOAT and high < float("inf")
    return f"{estimate:.2f}" + (f" ({low:.2f} to {high:.2f})" if bounded else "")


def notes(rows: Sequence[Row], *, runtime: tuple[str, str] | None = None) -> list[str]:
    """What a table cannot say: what is slower and why, what failed, what an old runtime lacks.

    ``runtime`` is the (name, version) of the device's; LiteRT has all that these files need.
    """
    lines = []
    for row in rows:
        if row.error:
            lines.append(f"{row.precision}: {row.error}")
        if row.why and row.cost is not None:
            more = (
                "is slower than float"
                if row.latency_ratio
                else "takes more instructions than float"
            )
            lines.append(f"{row.precision} {more} ({row.cost:.2f}x): {'; '.join(row.why)}")
        for need in row.runtime_needs[:1]:
            if runtime is None or (runtime[0] != "litert" and _older(runtime[1], need["tflite"])):
                lines.append(f"{row.precision} needs LiteRT, or TensorFlow Lite {need['tflite']}: {need['operator']} with {need['why']}")  # fmt: skip
    return lines


def _older(version: str, than: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(p) for p in text.split(".") if p.isdigit()]

    return parts(version) < parts(than)
