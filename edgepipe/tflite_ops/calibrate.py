"""The range of every activation of a float file, by any method, in at most two passes over the data,
and how many samples that takes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from edgepipe.array_ops.calibration import CalibrationReport, add_settling, file_batches, settle
from edgepipe.array_ops.load import SampleStream
from edgepipe.array_ops.ranges import METHODS, Histogram, Range, add_values, new_histogram
from edgepipe.artifact import TensorSpec
from edgepipe.errors import StageError
from edgepipe.state import is_stateful
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.quantize import HUGE, STAGE, Ranges, activations, collect_ranges
from edgepipe.tflite_ops.run import invoke_once, open_tflite

log = logging.getLogger(__name__)

Method = Literal["min_max", "moving_average", "percentile", "mse", "kl"]
# the methods that need a histogram, which is a second pass
FROM_HISTOGRAMS = tuple(m for m in get_args(Method) if m in METHODS)
_PROGRESS_S = 2.0
# With ``samples = "auto"`` ranges are looked at after so many samples, then twice as many, and so on:
# 256 are amid the 100 to 500 that LiteRT's guide to post-training quantisation asks for.
FIRST_LOOK = 256
Samples = int | Literal["auto"]

# Calibration data, from its beginning each time it is called
Batches = Callable[[], Iterable[Sequence[np.ndarray]]]


def looks(available: int, samples: Samples) -> tuple[int, ...]:
    """After how many samples ranges are looked at: of 1,000, 256, 512 and 1,000 with ``"auto"``."""
    if samples != "auto":
        return (available,)
    counts = [FIRST_LOOK]
    while counts[-1] < available:
        counts.append(2 * counts[-1])
    return (*counts[:-1], available)


def in_order(samples: SampleStream, count: int) -> SampleStream:
    """The first ``count`` in the seeded order of the data set, in which ``"auto"`` takes them."""
    if count >= len(samples):
        return samples
    return samples.subset(_order(samples)[:count])


def _order(samples: SampleStream) -> np.ndarray:
    return np.random.default_rng(samples.source.seed).permutation(len(samples))


def settled_ranges(
    content: bytes,
    available: SampleStream,
    specs: Sequence[TensorSpec],
    first: CalibrationReport,
    *,
    samples: Samples,
    check: Callable[[SampleStream], CalibrationReport],
    where: str,
    seed: int,
) -> tuple[SampleStream, CalibrationReport, Ranges]:
    """The samples that were taken of those ``available``, what was found of them, and their ranges.

    With ``"auto"`` samples are taken in a seeded order until activation ranges have settled
    (`array_ops.calibration.settle`) or there are no more; with a number, all of ``available``.
    ``specs`` are the file's inputs. ``check`` is asked before samples are run, but for those of the
    first look, of which ``first`` tells.
    """
    order = _order(available)
    ranges: Ranges | None = None
    report, taken = first, 0
    for count in looks(len(available), samples):
        chosen = in_order(available, count)
        report = check(chosen) if taken else first
        log.info("calibrating on %d samples", count)
        more = available if count - taken == len(available) else available.subset(order[taken:count])  # fmt: skip
        # of a sequence every step is an inference
        total = 0 if is_stateful(specs) else count
        ranges = collect_ranges(content, file_batches(more, specs), where=where, total=total, so_far=ranges)  # fmt: skip
        settling = settle(ranges.minima, ranges.maxima, ranges.names, samples=total or ranges.batches, seed=seed)  # fmt: skip
        taken = count
        if settling.is_settled:
            break
    assert ranges is not None
    report = dataclasses.replace(
        add_settling(report, settling), available=len(available), is_auto=samples == "auto"
    )
    if samples == "auto":
        log.info(
            "samples = auto took %d of %d: %s (the second half widened them by %.1f %% on average)",
            taken, len(available), "ranges have settled" if settling.is_settled else "ranges have not settled",
            100 * settling.growth,
        )  # fmt: skip
    return chosen, report, ranges


def find_ranges(
    content: bytes,
    batches: Batches,
    *,
    method: Method,
    where: str,
    total: int = 0,
    ranges: Ranges | None = None,
) -> tuple[dict[str, Range], Ranges]:
    """Tensor name -> (low, high) by ``method``, and the ranges batch by batch behind it.

    ``min_max`` is the union of all samples' ranges; ``moving_average`` what litert-quantizer and
    TensorFlow do by default; ``percentile`` (99.99 at each end), ``mse`` and ``kl`` read
    `array_ops.ranges` histograms, which a second pass fills. Memory depends on the model alone.
    ``ranges`` are those of these very batches, where they are known already.
    """
    if ranges is None:
        ranges = collect_ranges(content, batches(), where=where, total=total)
    if method == "min_max":
        return ranges.table(), ranges
    if method == "moving_average":
        return ranges.averages(), ranges
    histograms = collect_histograms(content, batches(), ranges.table(), where=where, total=total)
    return ranges_of(histograms, method=method), ranges


def ranges_of(histograms: Mapping[str, Histogram], *, method: Method) -> dict[str, Range]:
    """Tensor name -> (low, high) by one of the methods that read histograms."""
    choose = METHODS[method]
    return {name: choose(histogram) for name, histogram in histograms.items()}


def collect_histograms(
    content: bytes,
    batches: Iterable[Sequence[np.ndarray]],
    limits: Mapping[str, Range],
    *,
    where: str,
    total: int = 0,
) -> dict[str, Histogram]:
    """Run the float model on each batch and count the values of every tensor named in ``limits``.

    ``limits`` are the ranges of the very same batches (`collect_ranges`), so that bins need not
    grow. Memory: all activations of one inference, and 16 kB a tensor.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    tensors = [t for t in activations(graph) if t.name in limits]
    found = {t.name: new_histogram(*limits[t.name]) for t in tensors}
    interpreter = open_tflite(content, preserve_all_tensors=True)
    inputs = interpreter.get_input_details()
    seen, shown = 0, time.monotonic()
    for batch in batches:
        for detail, array in zip(inputs, batch, strict=True):
            interpreter.set_tensor(detail["index"], array)
        invoke_once(interpreter, where=where)
        for tensor in tensors:
            values = interpreter.get_tensor(tensor.index)
            if not -HUGE <= values.min(initial=0) <= values.max(initial=0) <= HUGE:
                values = values[np.abs(values) <= HUGE]  # as `collect_ranges` leaves them out
            found[tensor.name] = add_values(found[tensor.name], values)
        seen += 1
        if total and time.monotonic() - shown > _PROGRESS_S:
            shown = time.monotonic()
            log.info("counting values: %d of %d samples", seen, total)
    if not seen:
        raise StageError(f"{where}: there is no calibration sample", stage=STAGE)
    return found
