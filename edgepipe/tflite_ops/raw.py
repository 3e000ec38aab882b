"""Raw tensor bytes of a TFLite file: what a board is given, and how its answers compare."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.array_ops.layout import to_layout
from edgepipe.array_ops.readers import DAMAGED
from edgepipe.artifact import TensorSpec
from edgepipe.errors import DataError
from edgepipe.state import batch_axis
from edgepipe.tflite_ops.inspect import graph_of, read_model
from edgepipe.tflite_ops.run import dequantize, open_graph, quantize

log = logging.getLogger(__name__)

# Floats of two instruction sets are summed in another order: the error of a sum of n terms grows like
# sqrt(n) ulp (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2), and 64 is
# that of the 4096 terms of a wide layer. MobileNetV2-like nets differ by up to 17 between x86 and arm64;
# a single fp16 value rounded otherwise would be 4096 ulp.
FLOAT_ULPS = 64

# How often a long run on this host says how far it is.
PROGRESS_S = 10.0


@dataclasses.dataclass(frozen=True)
class RawSamples:
    """Input bytes for ``count`` inferences of ``batch`` samples: for each, the tensors one after
    another in the order of ``tensors`` (names in the file), C order, in the file's dtype."""

    data: bytes
    count: int
    tensors: tuple[str, ...]
    batch: int = 1


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """``share`` of output values that differ by more than was allowed, ``unequal`` that of those
    that are not bit for bit equal; ``max_abs`` their largest difference, as stored (quantisation
    steps for an integer output), and ``max_ulps`` that of floats in ulp of the largest value."""

    share: float
    values: int
    max_abs: float
    unequal: float = 0.0
    max_ulps: float = 0.0


def encode_samples(
    path: Path,
    samples: Mapping[str, np.ndarray],
    specs: Sequence[TensorSpec],
    *,
    signature: str = "",
) -> RawSamples:
    """Real values by input name, (N, ...) in the source layout -> bytes for the file's inputs.

    ``specs`` are the artifact's inputs in the file's order; without any, names are those of the
    file's tensors and the layout is the file's. Quantised inputs are quantised, and N samples make
    N // batch inferences; a scalar input has (N,), one for each. ``signature`` as for `tflite_runner`.
    Raises DataError where a sample set does not fit.
    """
    details = open_graph(path, signature=signature).inputs
    arrays: list[list[np.ndarray]] = []
    sizes: list[int] = []
    for index, detail in enumerate(details):
        shape = tuple(int(n) for n in detail["shape"])
        spec = specs[index] if specs else TensorSpec(detail["name"], shape)
        name = spec.name
        if not specs and len(details) == len(samples) == 1:
            name = next(iter(samples))
        if name not in samples:
            raise DataError(
                f"no samples for input {name!r} of {path.name}",
                hint=f"there are samples for: {', '.join(sorted(samples))}",
            )
        array = to_layout(np.asarray(samples[name]), spec.source_layout, spec.layout)
        axis = batch_axis(spec.layout)
        # a sample of a scalar is one number
        rank, size = len(shape) or 1, shape[axis] if shape else 1
        if array.ndim != rank or any(
            n != m for i, (n, m) in enumerate(zip(shape, array.shape, strict=False)) if i != axis
        ):
            raise DataError(
                f"input {name!r} of {path.name} has shape {list(shape)}, "
                f"the samples have {list(array.shape)}",
                hint="the first number is the batch; the rest must be equal",
            )
        stored = quantize(array, detail)
        sizes.append(size)
        runs = array.shape[axis] // size
        rows = [range(k * size, (k + 1) * size) for k in range(runs)]
        arrays.append([np.ascontiguousarray(np.take(stored, row, axis=axis)) for row in rows])
    batch = max(sizes, default=1)
    if batch > 1 and any(not len(detail["shape"]) for detail in details):
        raise DataError(
            f"{path.name} takes {batch} samples at once, and one number for all of them: a scalar input",
            hint="convert it with a batch of 1",
        )
    counts = {len(runs_of) for runs_of in arrays}
    if len(counts) > 1:
        raise DataError(
            f"the inputs of {path.name} hold samples for {', '.join(map(str, sorted(counts)))} inferences",
            hint="every input needs the same number of samples",
        )
    count = counts.pop() if counts else 0
    if count == 0:
        raise DataError(f"too few samples for one inference of {path.name}")
    data = b"".join(runs_of[k].tobytes() for k in range(count) for runs_of in arrays)
    return RawSamples(data, count, tuple(d["name"] for d in details), batch)


def stored_outputs(
    path: Path, samples: RawSamples, *, delegates: bool = True, signature: str = ""
) -> dict[str, np.ndarray]:
    """What this host computes: output tensor name -> (inferences, *shape) as the file stores it.

    Without ``delegates`` by the builtin kernels, as a device without XNNPACK does.
    """
    graph = open_graph(path, signature=signature, delegates=delegates)
    model = read_model(path)
    if signature:
        model = graph_of(model, signature, where=str(path))
    # resource variables (tf.Variable) outlive a reset of variables: only loading anew clears them
    has_resources = any(op.name == "VAR_HANDLE" for op in model.subgraphs[0].operators)
    results: dict[str, list[np.ndarray]] = {name: [] for name in _by_name(graph.outputs)}
    at, shown = 0, time.monotonic()
    for done in range(samples.count):
        if has_resources and done:
            graph = open_graph(path, signature=signature, delegates=delegates)
        given = []
        for detail in graph.inputs:
            shape, dtype = tuple(detail["shape"]), np.dtype(detail["dtype"])
            size = int(np.prod(shape)) * dtype.itemsize
            given.append(np.frombuffer(samples.data[at : at + size], dtype).reshape(shape))
            at += size
        for rows, array in zip(results.values(), graph.run(given), strict=True):
            rows.append(array)
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            log.info("running on this host: %d of %d inferences", done + 1, samples.count)
    return {name: np.stack(rows) for name, rows in results.items()}


def _by_name(details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Outputs by their tensor's name. A tensor that is an output again: ``y``, ``y#1``, ``y#2``."""
    found: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    for detail in details:
        name = detail["name"]
        found[f"{name}#{seen[name]}" if seen[name] else name] = detail
        seen[name] += 1
    return found


def output_bytes(path: Path, *, signature: str = "") -> int:
    """Bytes of all outputs of one inference."""
    details = open_graph(path, signature=signature).outputs
    return sum(int(np.prod(d["shape"])) * np.dtype(d["dtype"]).itemsize for d in details)


def read_outputs(
    path: Path,
    data: bytes,
    described: Sequence[Mapping[str, Any]],
    count: int,
    *,
    signature: str = "",
) -> dict[str, np.ndarray]:
    """A board's outputs file -> as `stored_outputs`, keyed and ordered like the model file.

    ``data`` holds ``count`` inferences, in each the tensors in the order of ``described`` (``name``,
    ``dtype``, ``shape``, ``bytes``). Raises DataError where it is not what this model file puts out.
    """
    details = _by_name(open_graph(path, signature=signature).outputs)
    names = list(_by_name([{"name": str(one.get("name"))} for one in described]))
    if len(names) == len(details) == 1:
        names = list(details)  # one output needs no name: a runtime may use the signature's
    if sorted(names) != sorted(details):
        raise DataError(
            f"the device answered with outputs {names}, {path.name} has {list(details)}",
            hint="the board ran another file than the one here",
        )
    sizes = [int(np.prod(details[n]["shape"])) * np.dtype(details[n]["dtype"]).itemsize for n in names]  # fmt: skip
    for name, size, one in zip(names, sizes, described, strict=True):
        dtype = np.dtype(details[name]["dtype"]).name
        if one.get("bytes") != size or one.get("dtype") != dtype:
            raise DataError(
                f"output {name!r} is {one.get('dtype')} of {one.get('bytes')} bytes on the device, "
                f"{dtype} of {size} in {path.name}",
                hint="the board ran another file than the one here",
            )
    if len(data) != count * sum(sizes):
        raise DataError(
            f"the device's outputs are {len(data)} bytes; {count} inferences of {path.name} give "
            f"{count * sum(sizes)}",
            hint="measure again; if it happens twice, check the board's storage",
        )
    rows = np.frombuffer(data, np.uint8).reshape(count, sum(sizes))
    found, at = {}, 0
    for name, size in zip(names, sizes, strict=True):
        column = np.ascontiguousarray(rows[:, at : at + size])
        shape = tuple(int(n) for n in details[name]["shape"])
        found[name] = column.view(details[name]["dtype"]).reshape(count, *shape)
        at += size
    return {name: found[name] for name in details}


def real_outputs(
    path: Path,
    stored: Mapping[str, np.ndarray],
    specs: Sequence[TensorSpec],
    *,
    signature: str = "",
) -> dict[str, np.ndarray]:
    """Stored outputs -> real values by output name, (N, ...) in the source model's layout.

    Worked example: 5 inferences of batch 2, stored (5, 2, 4, 4, 3) int8, layout NHWC -> dequantised
    (10, 3, 4, 4) for a source layout NCHW. ``specs`` are the artifact's outputs in the file's order.
    """
    details = _by_name(open_graph(path, signature=signature).outputs)
    found = {}
    for (name, rows), spec in zip(stored.items(), specs, strict=True):
        axis = batch_axis(spec.layout)
        values = dequantize(rows, details[name])
        # (inferences, ..., batch, ...) -> (..., inferences * batch, ...)
        whole = np.concatenate([np.atleast_1d(row) for row in values], axis=axis)
        found[spec.name] = to_layout(whole, spec.layout, spec.source_layout)
    return found


def mismatch(
    host: Mapping[str, np.ndarray], device: Mapping[str, np.ndarray], *, steps: int = 0
) -> Mismatch:
    """Compare stored outputs, (inferences, *shape) each.

    Integers may differ by ``steps``, floats by `FLOAT_ULPS` ulp of the largest value of their output
    in that inference. Two NaN count as equal, and so do 0.0 and -0.0.
    """
    beyond, unequal, total, largest, most_ulps = 0, 0, 0, 0.0, 0.0
    for name, ours in host.items():
        here, there = ours, device[name]
        total += here.size
        if not np.issubdtype(here.dtype, np.floating):
            apart = np.abs(here.astype(np.int64) - there.astype(np.int64))
            unequal += int((apart > 0).sum())
            beyond += int((apart > steps).sum())
            largest = max(largest, float(apart.max(initial=0)))
            continue
        ulp = _ulp_of_largest(here)
        here, there = here.astype(np.float64), there.astype(np.float64)
        differ = ~((here == there) | (np.isnan(here) & np.isnan(there)))
        unequal += int(differ.sum())
        if not differ.any():
            continue
        apart = np.abs(here[differ] - there[differ])  # NaN or infinite where only one of them is
        ulps = apart / np.broadcast_to(ulp, here.shape)[differ]
        beyond += int((~(ulps <= FLOAT_ULPS)).sum())
        largest = max(largest, float(apart[np.isfinite(apart)].max(initial=0)))
        most_ulps = max(most_ulps, float(ulps[np.isfinite(ulps)].max(initial=0)))
    share, unequal_share = (n / total if total else 0.0 for n in (beyond, unequal))
    return Mismatch(share, total, largest, unequal_share, most_ulps)


def _ulp_of_largest(values: np.ndarray) -> np.ndarray:
    """The distance to the next float at the largest finite magnitude of each inference, (n, 1, ...)."""
    magnitude = np.where(np.isfinite(values), np.abs(values), 0)
    axes = tuple(range(1, values.ndim))
    return np.spacing(magnitude.max(axis=axes, keepdims=True)).astype(np.float64)


def read_samples(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a ``.npz`` by name, or the one array of a ``.npy`` under the name ``""``.

    Raises DataError where it is neither, or holds Python objects (which could run code).
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError as exc:
        raise DataError(f"{path} does not exist", hint="check the path", code="no-such-file") from exc  # fmt: skip
    except DAMAGED as exc:
        raise DataError(
            f"{path} holds no arrays: {exc}", hint="save them with numpy.savez or numpy.save"
        ) from exc
