"""Raw tensor bytes of a TFLite file: what a board is given, and how its answers compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgepipe.array_ops.layout import to_layout
from edgepipe.array_ops.load import DAMAGED
from edgepipe.artifact import TensorSpec
from edgepipe.errors import DataError
from edgepipe.tflite_ops.run import invoke_once, open_tflite, quantize


@dataclasses.dataclass(frozen=True)
class RawSamples:
    """Input bytes for ``count`` inferences: for each, the tensors one after another in the order of
    ``tensors`` (names in the file), C order, in the file's dtype."""

    data: bytes
    count: int
    tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """``share`` of output values that are not bit for bit equal; ``max_abs`` their largest
    difference, as stored (quantisation steps for an integer output)."""

    share: float
    values: int
    max_abs: float


def encode_samples(
    path: Path, samples: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> RawSamples:
    """Real values by input name, (N, ...) in the source layout -> bytes for the file's inputs.

    ``specs`` are the artifact's inputs in the file's order; without any, names are those of the
    file's tensors and the layout is the file's. Quantised inputs are quantised, and N samples make
    N // batch inferences. Raises DataError where a sample set does not fit.
    """
    interpreter = open_tflite(path)
    details = interpreter.get_input_details()
    arrays = []
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
        axis = max(spec.layout.find("N"), 0)
        if not shape:
            raise DataError(f"input {name!r} of {path.name} is a scalar: it takes no samples")
        if array.ndim != len(shape) or any(
            n != m for i, (n, m) in enumerate(zip(array.shape, shape, strict=True)) if i != axis
        ):
            raise DataError(
                f"input {name!r} of {path.name} has shape {list(shape)}, "
                f"the samples have {list(array.shape)}",
                hint="the first number is the batch; the rest must be equal",
            )
        stored = quantize(array, detail)
        runs = array.shape[axis] // shape[axis]
        rows = [range(k * shape[axis], (k + 1) * shape[axis]) for k in range(runs)]
        arrays.append([np.ascontiguousarray(np.take(stored, row, axis=axis)) for row in rows])
    count = min(len(runs_of) for runs_of in arrays)
    if count == 0:
        raise DataError(f"too few samples for one inference of {path.name}")
    data = b"".join(runs_of[k].tobytes() for k in range(count) for runs_of in arrays)
    return RawSamples(data, count, tuple(d["name"] for d in details))


def host_outputs(path: Path, samples: RawSamples) -> tuple[dict[str, str], list[dict[str, bytes]]]:
    """(dtype of each output, output bytes by tensor name for each inference) on this host."""
    interpreter = open_tflite(path)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    # resource variables (tf.Variable) outlive reset_all_variables: only loading anew clears them
    has_resources = any(op["op_name"] == "VAR_HANDLE" for op in interpreter._get_ops_details())
    results: list[dict[str, bytes]] = []
    at = 0
    for _ in range(samples.count):
        if has_resources and results:
            interpreter = open_tflite(path)
        for detail in inputs:
            shape, dtype = tuple(detail["shape"]), np.dtype(detail["dtype"])
            size = int(np.prod(shape)) * dtype.itemsize
            piece = samples.data[at : at + size]
            interpreter.set_tensor(detail["index"], np.frombuffer(piece, dtype).reshape(shape))
            at += size
        invoke_once(interpreter, where=str(path))
        results.append({d["name"]: interpreter.get_tensor(d["index"]).tobytes() for d in outputs})
    return {d["name"]: np.dtype(d["dtype"]).name for d in outputs}, results


def mismatch(
    path: Path, samples: RawSamples, names: Sequence[str], device: Sequence[Sequence[bytes]]
) -> Mismatch:
    """Compare a board's outputs with this host's for the same input bytes.

    ``device[k][i]`` is output ``names[i]`` of inference *k*. Two NaN count as equal. Raises
    DataError where the outputs are not those of this file.
    """
    dtypes, host = host_outputs(path, samples)
    if len(names) == len(dtypes) == 1:
        names = list(dtypes)
    if sorted(names) != sorted(dtypes) or len(device) != len(host):
        raise DataError(f"the device answered with outputs {list(names)}, the file has {list(dtypes)}")  # fmt: skip
    different, total, largest = 0, 0, 0.0
    for ours, theirs in zip(host, device, strict=True):
        for name, raw in zip(names, theirs, strict=True):
            if len(raw) != len(ours[name]):
                raise DataError(
                    f"output {name!r} has {len(raw)} bytes on the device, {len(ours[name])} here"
                )
            here = np.frombuffer(ours[name], dtypes[name])
            there = np.frombuffer(raw, dtypes[name])
            if np.issubdtype(here.dtype, np.floating):
                here, there = here.astype(np.float64), there.astype(np.float64)
                unequal = ~((here == there) | (np.isnan(here) & np.isnan(there)))
            else:
                here, there = here.astype(np.int64), there.astype(np.int64)
                unequal = here != there
            total += here.size
            different += int(unequal.sum())
            if unequal.any():
                largest = max(largest, float(np.abs(here[unequal] - there[unequal]).max()))
    return Mismatch(different / total if total else 0.0, total, largest)


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
