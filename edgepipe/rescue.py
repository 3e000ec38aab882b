"""What `quantize_int8` says about its rescue ladder: is the data fit to judge by, the rungs, advice."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.table import Table
from edgepipe.units import format_bytes, format_seconds, format_value

if TYPE_CHECKING:
    from edgepipe.array_ops.load import Samples, SampleStream
    from edgepipe.tflite_ops.ladder import Rescue, Rung
    from edgepipe.tflite_ops.sensitivity import Sensitivity

log = logging.getLogger(__name__)

# From this share of common samples on, two data sets count as one: an accuracy that is 10 points better
# on samples that were fitted is then off by a point.
SAME_DATA = 0.1
# Below so many samples one of them is worth a point or more of accuracy.
ENOUGH_SAMPLES = 100
# Hashes of calibration samples that a record keeps: the smallest of them all, which are as good as a
# random choice (Broder 1997, "On the resemblance and containment of documents", section 4).
KEPT_HASHES = 4096
# CPU time of one sample of a QAT step (64 at once) over that of an inference of the float file, both on
# one thread: 68 for the keyword spotter (ci/bench/int8_rescue.py --qat)
QAT_INFERENCES = 70
# QAT can train what comes before such an output, but not its steps.
FLOAT_OUTPUT = (
    'output_dtype = "float32", so that 16-bit layers can answer in full; or let the model predict what is left'
    " once a mean is taken off and a spread divided by, and have the application put them back"
)


def check_evaluation_data(
    calibration: Samples | SampleStream,
    evaluation: Samples | SampleStream,
    sources: tuple[DataSource, DataSource],
    *,
    where: str,
) -> None:
    """DataError where the samples to judge by are those that ranges were taken from.

    By source, whatever number and choice of its samples, and by content: a tenth of either set found
    in the other. Fewer common samples are a warning. ``where`` says who asks. Noise is let through:
    nothing is judged by it.
    """
    if calibration.is_random or evaluation.is_random:
        return
    bare = [dataclasses.replace(s, limit=0, seed=0) for s in sources]
    theirs = set(sample_hashes(evaluation))
    found = Counter(digest for digest in sample_hashes(calibration) if digest in theirs)
    common = len(found)
    share = max(found.total() / max(1, len(calibration)), common / max(1, len(theirs)))
    if bare[0] == bare[1] or share >= SAME_DATA:
        same = "are the same source" if bare[0] == bare[1] else f"have {common} samples in common"
        raise DataError(
            f"{where}: calibration ({calibration.origin}) and evaluation ({evaluation.origin})"
            f" {same}: a model fits the data that its ranges were taken from",
            hint="keep samples aside: not_fold = [0, 5] in the one data set and fold = [0, 5] in the other",
            code="evaluation-is-calibration",
        )
    if common:
        log.warning("%d samples are in both the calibration and the evaluation data", common)


def sample_hashes(samples: Samples | SampleStream) -> Iterator[str]:
    """A short hash of each sample, over all its inputs as the source model gets them."""
    for chunk in samples.chunks():
        for row in range(len(chunk)):
            digest = hashlib.blake2b(digest_size=8)
            for name in sorted(chunk.inputs):
                digest.update(chunk.inputs[name][row].tobytes())
            yield digest.hexdigest()


def kept_hashes(samples: Samples | SampleStream) -> list[str]:
    """What a record keeps of calibration samples: the `KEPT_HASHES` smallest of their hashes."""
    return heapq.nsmallest(KEPT_HASHES, sample_hashes(samples))


def in_common(samples: Samples | SampleStream, kept: Collection[str], calibrated: int) -> int:
    """How many samples are among the ``calibrated`` ones of which `kept_hashes` are ``kept``.

    Exact where all were kept; else an estimate, from the share that was.
    """
    known = set(kept)
    found = sum(digest in known for digest in sample_hashes(samples))
    return round(found * max(1.0, calibrated / max(1, len(kept))))


def rescue_facts(rescue: Rescue, **context: Any) -> dict[str, Any]:
    """The record of a ladder, plain data: rungs, causes, culprits and what is not int8."""
    return {
        **context,
        "held": rescue.result.name if rescue.held else "",
        "float_latency_s": rescue.float_latency_s,
        "method": rescue.method,
        "rungs": [_rung_facts(rung) for rung in rescue.rungs],
        "precision": dict(rescue.precision),
        "causes": list(rescue.causes),
        "culprits": [dataclasses.asdict(c) for c in rescue.culprits],
    }


def _rung_facts(rung: Rung) -> dict[str, Any]:
    judged = rung.judgement
    return {
        "rung": rung.name,
        "did": rung.did,
        "score": judged.score,
        "drop_points": judged.drop_points,
        "interval_points": list(judged.interval_points) if judged.interval_points else None,
        "samples": judged.samples,
        "noise": rung.noise,
        "bytes": rung.size_bytes,
        "latency_s": rung.latency_s,
        "held": rung.held,
        "sure": rung.sure,
        "kept": rung.kept,
    }


def rung_lines(facts: Mapping[str, Any]) -> list[str]:
    """`rung_table` as lines of text, columns padded."""
    table = rung_table(facts)
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]  # fmt: skip


def rung_table(facts: Mapping[str, Any]) -> Table:
    """The rungs of a ladder as it was recorded, with the float model first."""
    rows: list[tuple[str, ...]] = [("float", f"{facts['float_score']:.4f}", "", "", _latency(facts["float_latency_s"]), "", "")]  # fmt: skip
    for rung in facts["rungs"]:
        interval = rung["interval_points"]
        within = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        verdict = "" if rung["kept"] else "undone"
        if rung["held"] and rung["kept"]:
            verdict = "holds" if rung.get("sure", True) else "luck?"
        rows.append((
            rung["rung"], f"{rung['score']:.4f}", f"{rung['drop_points']:.2f}{within}", format_bytes(rung["bytes"]),
            _latency(rung["latency_s"]), verdict, rung["did"],
        ))  # fmt: skip
    header = ("rung", "score", "points lost", "bytes", "this host", "verdict", "what was done")
    title = f"Rungs of int8: {facts['metric']} on {facts['samples']} samples, at most {format_value(facts['max_drop'], 'points')} to be lost"  # fmt: skip
    return Table(title, header, tuple(rows))


def _latency(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)


def advice(rescue: Rescue, *, steps: int = 1) -> str:
    """What may mend a model that no rung does; ``steps`` as for `qat_advice`."""
    if rescue.at_output:
        return FLOAT_OUTPUT
    named = worst_operators(rescue.culprits)
    in_float = f"allow_float = {json.dumps(named)}" if named else "allow_float"
    if rescue.at_door:
        # QAT trains what comes behind such an input, but not its steps
        return (
            f'input_dtype = "float32", so that 16-bit layers are given the input before it is rounded; with {in_float}'
            " where 16 bits are too few, too; or do in the application what the model begins with"
            " (each column by its own mean and spread, a logarithm)"
        )
    return f"{qat_advice(rescue.float_latency_s, steps=steps)}, or leave the worst layers in float with {in_float}"


def worst_operators(culprits: Sequence[Sensitivity]) -> list[str]:
    """Operators of the layers that spoil most: those with at least half the noise of the worst."""
    most = max((c.noise for c in culprits), default=0.0)
    return sorted({c.operator for c in culprits if c.noise >= most / 2})


def doubt(samples: int, interval_points: tuple[float, float], max_drop: float) -> str:
    """That so many samples do not tell whether a loss is allowed, and how many would tell a file that
    loses nothing: an interval is as wide as the root of their number is small.

    450 samples with -1.9 to 1.7 points, of which 1 is allowed: half of it is 1.8, 1.8^2 * 450 = 1,458.
    """
    low, high = interval_points
    needed = math.ceil(samples * ((high - low) / 2 / max_drop) ** 2)
    return (
        f"{samples:,} samples cannot tell a loss of {format_value(max_drop, 'points')} from one of {high:.1f}:"
        f" judge the file on more, by [evaluate]; it takes some {max(needed, samples + 1):,} to tell it from none"
    )


def qat_advice(float_latency_s: float | None, *, steps: int = 1) -> str:
    """The last rung: what quantisation-aware training would take, by this host's float latency of an
    inference, of which a sample takes ``steps``."""
    cost = ""
    if float_latency_s is not None:
        seconds = 1000 * QAT_INFERENCES * steps * float_latency_s
        cost = f" (about {format_seconds(seconds)} for each 1000 training samples and epoch on one thread of this host)"  # fmt: skip
    return f"train it for int8: a qat stage before quantize_int8{cost}"
