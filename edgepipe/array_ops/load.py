"""Load the samples a `DataSource` describes, checked against the model's inputs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from edgepipe.array_ops.readers import DECODED, READERS, Reader, remembering, where_text
from edgepipe.array_ops.roll import Run
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.state import data_inputs

log = logging.getLogger(__name__)

# Of what has to be decoded (images, clips, items of a dataset) so much stays in memory: several
# hundred images, so that a second pass over a usual calibration set decodes nothing.
KEPT_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True)
class Samples:
    """N samples for the source model, in memory.

    ``inputs`` maps each of its input names to (N, ...) in its layout and dtype, batch axis first.
    ``labels`` is (N, ...) or None; for folders of files int64 indices into ``classes``. ``origin``
    says in words where they come from; ``states_from`` is the model that a sequence's states are taken
    from, where its steps are run as single inferences.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    origin: str
    is_random: bool = False
    states_from: Run | None = None

    def __len__(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    def chunks(self) -> Iterator[Samples]:
        """All of them at once, where a `SampleStream` gives a few at a time."""
        yield self

    def take(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """The samples with these numbers, in that order."""
        at = np.asarray(rows, np.int64)
        labels = None if self.labels is None else self.labels[at]
        inputs = {name: array[at] for name, array in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, labels=labels)


@dataclasses.dataclass(frozen=True)
class SampleStream:
    """N samples for the source model, read and prepared each time they are asked for.

    Memory does not grow with N, but for what kind ``python`` returns and for a stored array in
    Fortran order. ``rows`` are their positions in the source, ascending.
    """

    source: DataSource
    specs: tuple[TensorSpec, ...]
    rows: np.ndarray
    reader: Reader
    states_from: Run | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def origin(self) -> str:
        return _origin(self.source, len(self.rows), self.reader.count)

    @property
    def is_random(self) -> bool:
        return self.source.kind == "random"

    def chunks(self) -> Iterator[Samples]:
        """All samples from the first, about a megabyte of floats at a time, prepared and checked.

        Raises DataError as `load_samples` does, where it comes to what is wrong.
        """
        where = where_text(self.source)
        for raw, labels in self.reader.read(self.rows):
            inputs = {
                spec.name: _fit(raw[spec.name], spec, self.source, where=where)
                for spec in self.specs
            }
            yield Samples(
                inputs, labels, self.reader.classes, self.origin, self.is_random, self.states_from
            )

    def subset(self, rows: Sequence[int] | np.ndarray) -> SampleStream:
        """A stream of the samples with these numbers, each once and in stored order."""
        return dataclasses.replace(self, rows=self.rows[np.unique(np.asarray(rows, np.int64))])

    def take(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """The samples with these numbers, in that order and in memory; read in one pass."""
        numbers, places = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        found = dataclasses.replace(self, rows=self.rows[numbers])._loaded()
        if np.array_equal(places, np.arange(len(numbers))):
            return found
        return dataclasses.replace(found.take(places), origin=self.origin)

    def _loaded(self) -> Samples:
        whole: dict[str, np.ndarray] = {}
        labels: list[np.ndarray] = []
        done = 0
        for chunk in self.chunks():
            for name, array in chunk.inputs.items():
                if not done:
                    whole[name] = np.empty((len(self), *array.shape[1:]), array.dtype)
                elif whole[name].shape[1:] != array.shape[1:]:
                    raise DataError(
                        f"{where_text(self.source)}: samples of input {name!r} have shapes"
                        f" {whole[name].shape[1:]} and {array.shape[1:]}",
                        hint="prepare all samples in one shape",
                    )
                self._refuse_nan(name, array, done)
                whole[name][done : done + len(chunk)] = array
            labels += [] if chunk.labels is None else [chunk.labels]
            done += len(chunk)
        joined = np.concatenate(labels) if labels else None
        if joined is not None and len(joined) != done:
            raise DataError(
                f"{where_text(self.source)}: some samples have a label and some have none",
                hint="labels need one row for each sample",
            )
        return Samples(
            whole, joined, self.reader.classes, self.origin, self.is_random, self.states_from
        )

    def _refuse_nan(self, name: str, array: np.ndarray, before: int) -> None:
        """No model is judged, trained or compared by a sample that is no number."""
        if array.dtype.kind != "f" or not np.isnan(array).any():
            return
        first = int(np.isnan(array).reshape(len(array), -1).any(axis=1).argmax())
        raise DataError(
            f"{self.origin}: input {name!r} has NaN in sample {before + first}",
            hint="remove this sample, or mend the code that makes it",
            code="not-finite",
        )


def load_samples(source: DataSource, specs: Sequence[TensorSpec]) -> Samples:
    """Read, choose, prepare and check samples for a model with inputs ``specs`` (batch = axis 0).

    Order: read -> ``fold`` / ``not_fold`` / ``limit`` -> ``(x * scale - mean) / std`` (floating
    point inputs only) -> check. Raises DataError for a missing or unreadable file, a wrong name,
    shape or dtype, NaN, an empty choice, or an error in the user's own function. Samples of a model with
    state are sequences (`edgepipe.state.data_inputs`).
    """
    samples = _stream(source, specs)._loaded()
    log.info("loaded %d samples from %s", len(samples), samples.origin)
    return samples


def open_samples(
    source: DataSource, specs: Sequence[TensorSpec], *, kept_bytes: int = KEPT_BYTES
) -> SampleStream:
    """As `load_samples`, but read a few at a time as they are needed.

    ``kept_bytes`` of samples that take decoding stay in memory; 0 where each pass must ask anew, as
    for a dataset that augments. Raises DataError for what can be told without reading samples; the rest is raised by the first
    pass over them.
    """
    stream = _stream(source, specs)
    if source.kind not in DECODED or not kept_bytes:
        return stream
    return dataclasses.replace(stream, reader=remembering(stream.reader, kept_bytes))


def _stream(source: DataSource, specs: Sequence[TensorSpec]) -> SampleStream:
    states = [spec.name for spec in specs if spec.fed_by]
    specs = data_inputs(specs)
    if not specs:
        raise DataError("the model has no inputs, so there is nothing to load samples for")
    reader = READERS[source.kind](source, specs)
    if unread := [name for name in states if name in reader.names]:
        log.warning(
            "%s: %s is not read: state starts at zero and is carried from step to step",
            where_text(source), ", ".join(unread),
        )  # fmt: skip
    for spec in specs:
        if spec.name in reader.shapes and reader.count:
            check_shape(reader.shapes[spec.name], spec, where=where_text(source))
    rows = np.arange(reader.count) if source.kind == "random" else _choose(reader.count, source)
    return SampleStream(source, tuple(specs), rows, reader)


# --- choosing ------------------------------------------------------------------------------------


def _choose(count: int, source: DataSource) -> np.ndarray:
    """Indices of the samples to keep, ascending: (k,) int64."""
    where = where_text(source)
    if count == 0:
        raise DataError(f"{where} holds no samples", hint="check the path", code="no-samples")
    keep = np.arange(count)
    for option, wanted in (("fold", True), ("not_fold", False)):
        fold: tuple[int, int] | None = getattr(source, option)
        if fold is None:
            continue
        k, n = fold
        if n < 1 or not 0 <= k < n:
            raise DataError(
                f"{where}: {option} = [{k}, {n}] keeps nothing",
                hint=f"write {option} = [k, n] with 0 <= k < n, like [0, 5]",
            )
        keep = keep[(keep % n == k) == wanted]
    if source.limit < 0:
        raise DataError(f"{where}: limit = {source.limit} is negative", hint="0 means all")
    if 0 < source.limit < len(keep):
        generator = np.random.default_rng(source.seed)
        keep = np.sort(generator.choice(keep, size=source.limit, replace=False))
    if len(keep) == 0:
        raise DataError(
            f"{where}: none of its {count} samples are left after fold, not_fold and limit",
            hint="loosen the choice",
            code="no-samples",
        )
    return keep


def _origin(source: DataSource, chosen: int, count: int) -> str:
    name = source.path.name if source.path is not None else source.function
    if source.kind == "random":
        return f"random noise, seed {source.seed}: {chosen} samples"
    part = f"{chosen} samples" if chosen == count else f"{chosen} of {count} samples"
    return f"{source.kind} {name}: {part}"


# --- preparing and checking ----------------------------------------------------------------------


def _fit(array: np.ndarray, spec: TensorSpec, source: DataSource, *, where: str) -> np.ndarray:
    """(N, ...) as read -> the dtype of ``spec``, scaled; the shape must be right already."""
    check_shape(array.shape, spec, where=where)
    wanted = np.dtype(spec.dtype)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: input {spec.name!r} is {array.dtype}, the model wants {spec.dtype}",
            hint="store numbers",
        )
    if wanted.kind == "f":
        if source.kind == "random":
            return array.astype(wanted, copy=False)
        return _normalise(array, spec, source, wanted, where=where)
    if source.mean or source.std or source.scale != 1.0:
        raise DataError(
            f"{where}: scale, mean and std are for floating point inputs; {spec.name!r} is"
            f" {spec.dtype}",
            hint="remove them from this data set",
        )
    if array.dtype.kind == "f":
        raise DataError(
            f"{where}: input {spec.name!r} is {array.dtype}, the model wants {spec.dtype}",
            hint="store whole numbers, like token ids",
        )
    if wanted.kind in "iu" and array.size:
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DataError(
                f"{where}: input {spec.name!r} has values {array.min()} to {array.max()},"
                f" beyond {spec.dtype}",
            )
    return np.ascontiguousarray(array, dtype=wanted)


def _normalise(
    array: np.ndarray, spec: TensorSpec, source: DataSource, wanted: np.dtype, *, where: str
) -> np.ndarray:
    """``(x * scale - mean) / std`` in float32, one rounding for each step."""
    result = array.astype(wanted)
    if source.scale != 1.0:
        result *= wanted.type(source.scale)
    for option, operation in (("mean", np.subtract), ("std", np.divide)):
        values: tuple[float, ...] = getattr(source, option)
        if not values:
            continue
        if option == "std" and any(value <= 0 for value in values):
            raise DataError(f"{where}: std = {list(values)} must be positive")
        operation(result, _per_channel(values, spec, option, source, where=where), out=result)
    return result


def _per_channel(
    values: tuple[float, ...], spec: TensorSpec, option: str, source: DataSource, *, where: str
) -> np.ndarray:
    """Values shaped to broadcast along the channel axis: C = 3, NCHW -> (1, 3, 1, 1)."""
    if len(values) == 1:
        return np.float32(values[0])  # type: ignore[return-value]
    layout = "N" + source.image.layout if source.kind == "images" and source.image else spec.layout
    axis = layout.find("C")
    channels = spec.shape[axis] if 0 <= axis < len(spec.shape) else 0
    if len(values) != channels:
        raise DataError(
            f"{where}: {option} has {len(values)} values, input {spec.name!r} has"
            f" {channels or 'no named'} channels (shape {spec.shape}, layout {layout or 'unknown'})",
            hint=f"give {option} one value, or one for each channel",
        )
    shape = [1] * len(spec.shape)
    shape[axis] = channels
    return np.array(values, dtype=np.float32).reshape(shape)


def labels_of(samples: Samples) -> np.ndarray:
    """The labels of samples that are to be judged by. Raises DataError where there are none."""
    if samples.labels is None:
        raise DataError(
            f"{samples.origin}: no labels to judge by",
            hint='npz: an array named labels; else a TOML file that says labels = "..."',
            code="no-labels",
        )
    return samples.labels


def check_shape(shape: tuple[int, ...], spec: TensorSpec, *, where: str) -> None:
    """Raise DataError unless it is (N, *spec.shape[1:]); sizes below 1 in the spec are free."""
    wanted, got = spec.shape[1:], shape[1:]
    if len(wanted) == len(got) and all(w in (g, 0, -1) for w, g in zip(wanted, got, strict=True)):
        return
    raise DataError(
        f"{where}: input {spec.name!r} wants samples of shape {wanted}"
        f"{f' ({spec.layout[1:]})' if spec.layout[1:] else ''}, got {got}",
        hint=_shape_hint(shape, spec),
        code="wrong-shape",
    )


def _shape_hint(shape: tuple[int, ...], spec: TensorSpec) -> str:
    wanted, got, layout = spec.shape[1:], shape[1:], spec.layout[1:]
    if shape == wanted:
        return "the axis of samples is missing: array[None] makes one sample of it"
    for order in itertools.permutations(range(len(layout))) if len(got) == len(wanted) else ():
        if layout and tuple(wanted[i] for i in order) == got:
            there = "".join(layout[i] for i in order)
            axes = ", ".join(str(order.index(axis) + 1) for axis in range(len(order)))
            return (
                f"{got} looks like {there}; the model wants {layout}: array.transpose(0, {axes}),"
                f' or for pictures image.layout = "{layout}"'
            )
    if np.prod(got) == np.prod(wanted):
        return f"the number of values is right: reshape each sample to {wanted}"
    if len(got) == 3 and len(wanted) == 3 and 3 in got and 1 in wanted:
        return 'the model wants one channel: set image.color = "gray"'
    return f"prepare each sample as {wanted}; images: set image.size to (height, width)"
