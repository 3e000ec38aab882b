"""Load the samples a `DataSource` describes, checked against the model's inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import logging
import os
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from edgepipe.array_ops.audio import prepare_clip
from edgepipe.array_ops.images import SUFFIXES, prepare_image
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource, split_reference
from edgepipe.errors import DataError
from edgepipe.schema import near_miss
from edgepipe.state import PARITY_STEPS, data_inputs, is_sequence

log = logging.getLogger(__name__)

# How many samples of noise `kind = "random"` makes where `limit` says nothing.
RANDOM_SAMPLES = 100
# What zipfile and numpy raise for damaged files; RuntimeError for one that seems to be encrypted.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Samples:
    """N samples for the source model.

    ``inputs`` maps each of its input names to (N, ...) in its layout and dtype, batch axis first.
    ``labels`` is (N, ...) or None; for folders of files int64 indices into ``classes``. ``origin``
    says in words where they come from.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    origin: str
    is_random: bool = False

    def __len__(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])


def load_samples(source: DataSource, specs: Sequence[TensorSpec]) -> Samples:
    """Read, choose, prepare and check samples for a model with inputs ``specs`` (batch = axis 0).

    Order: read -> ``fold`` / ``not_fold`` / ``limit`` -> ``(x * scale - mean) / std`` (floating
    point inputs only) -> check. Raises DataError for a missing or unreadable file, a wrong name,
    shape or dtype, an empty choice, or an error in the user's own function. Samples of a model with
    state are sequences (`edgepipe.state.data_inputs`).
    """
    specs = data_inputs(specs)
    if not specs:
        raise DataError("the model has no inputs, so there is nothing to load samples for")
    if source.fold is not None and source.not_fold is not None:
        raise DataError(
            "data: fold and not_fold are both set", hint="keep one: fold = [0, 5] or not_fold"
        )
    raw = _READERS[source.kind](source, specs)
    where = _where(source)
    count = len(next(iter(raw.inputs.values()))) if raw.inputs else 0
    inputs = {}
    for spec in specs:
        array = raw.inputs[spec.name]
        if len(array) != count:
            raise DataError(
                f"{where}: input {spec.name!r} has {len(array)} samples,"
                f" {specs[0].name!r} has {count}",
                hint="every array needs the same number of samples on its first axis",
            )
        inputs[spec.name] = _fit(array, spec, source, where=where)
    labels = raw.labels
    if labels is not None and len(labels) != count:
        raise DataError(
            f"{where}: {count} samples but {len(labels)} labels",
            hint="labels need one row for each sample",
        )
    log.info("loaded %d samples from %s", count, raw.origin)
    return Samples(inputs, labels, raw.classes, raw.origin, is_random=source.kind == "random")


def load_function(
    reference: str, root: Path | None
) -> tuple[Callable[..., Any], contextlib.AbstractContextManager[None]]:
    """The function ``"file.py:name"`` or ``"package.module:name"``, and a context to call it in.

    Inside the context the file's own folder is importable, so that it may import its neighbours.
    Raises DataError where the file, module or name does not exist or its import fails.
    """
    module, name = split_reference(reference, root)
    if isinstance(module, Path):
        if not module.is_file():
            raise DataError(
                f"{module} (named by {reference!r}) does not exist",
                hint="the path is relative to the recipe's folder",
                code="no-such-file",
            )
        context = _importable(module.parent)
    else:
        context = _importable(root or Path.cwd())
    with context:
        try:
            loaded = (
                _load_file(module) if isinstance(module, Path) else importlib.import_module(module)
            )
        except Exception as exc:
            raise _user_error(exc, f"importing {reference!r}", str(module)) from exc
    function = getattr(loaded, name, None)
    if not callable(function):
        legal = [n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")]
        raise DataError(
            f"{reference!r}: {module} has no function {name!r}{near_miss(name, legal)}",
            hint=f"functions there: {', '.join(legal) or 'none'}",
        )
    return function, context


def call_function(reference: str, root: Path | None, *args: object, **options: object) -> Any:
    """Call the user's function; whatever it raises becomes a DataError with its file and line."""
    function, context = load_function(reference, root)
    with context:
        try:
            return function(*args, **options)
        except Exception as exc:
            module, _ = split_reference(reference, root)
            raise _user_error(exc, f"calling {reference!r}", str(module)) from exc


# --- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Raw:
    """What a reader found: chosen samples, before scaling and checking."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    origin: str


def _where(source: DataSource) -> str:
    return str(source.path) if source.path is not None else source.function or source.kind


def _choose(count: int, source: DataSource) -> np.ndarray:
    """Indices of the samples to keep, ascending: (k,) int64."""
    where = _where(source)
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
    part = f"{chosen} samples" if chosen == count else f"{chosen} of {count} samples"
    return f"{source.kind} {name}: {part}"


def _existing(source: DataSource) -> Path:
    if source.path is None:
        raise DataError(
            f'data of kind "{source.kind}" needs a path', hint='add path = "..."', code="no-path"
        )
    if not source.path.exists():
        raise DataError(
            f"{source.path} does not exist",
            hint="a path in a recipe is relative to the recipe's folder",
            code="no-such-file",
        )
    return source.path


def _unreadable(path: Path, what: str, exc: Exception) -> DataError:
    return DataError(
        f"cannot read {path} as {what}: {exc}",
        hint="the file may be truncated or of another format; arrays of Python objects are refused",
        code="unreadable-data",
    )


def _read_npz(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    path = _existing(source)
    wanted = _array_names(source, specs)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds one bare array", hint='use kind = "npy" for it')
            names = list(archive.files)
            for input_name, array_name in wanted.items():
                if array_name not in names:
                    raise DataError(
                        f"{path} has no array {array_name!r} for model input {input_name!r}"
                        f"{near_miss(array_name, names)} (arrays: {', '.join(names)})",
                        hint=f"say which array it is: inputs = {{ {input_name} = "
                        f'"{next((n for n in names if n != source.labels), "...")}" }}',
                    )
            arrays = {name: archive[array_name] for name, array_name in wanted.items()}
            labels = archive[source.labels] if source.labels in names else None
            if labels is None and source.labels != "labels" and source.labels:
                raise DataError(
                    f"{path} has no array {source.labels!r} for the labels"
                    f"{near_miss(source.labels, names)} (arrays: {', '.join(names)})",
                    hint='set labels = "..." to one of them',
                )
    except DAMAGED as exc:
        raise _unreadable(path, ".npz", exc) from exc
    return _choose_arrays(source, arrays, labels)


def _read_npy(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    path = _existing(source)
    spec = _only(specs, source, "a .npy file")
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except DAMAGED as exc:
        raise _unreadable(path, ".npy", exc) from exc
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path} holds several arrays", hint='use kind = "npz" for it')
    return _choose_arrays(source, {spec.name: array}, None)


def _choose_arrays(
    source: DataSource, arrays: Mapping[str, np.ndarray], labels: np.ndarray | None
) -> _Raw:
    where = _where(source)
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(
                f"{where}: the array for input {name!r} is a single number",
                hint="samples go on the first axis",
            )
    lengths = {len(a) for a in arrays.values()} | ({len(labels)} if labels is not None and labels.ndim else set())  # fmt: skip
    if len(lengths) != 1:
        listed = ", ".join(f"{name!r}: {len(a)}" for name, a in arrays.items())
        tail = "" if labels is None else f"; labels: {len(labels) if labels.ndim else 'a number'}"
        raise DataError(
            f"{where}: different numbers of samples ({listed}{tail})",
            hint="every array, labels too, needs the same number of samples on its first axis",
        )
    count = lengths.pop()
    keep = _choose(count, source)
    return _Raw(
        {name: np.asarray(array[keep]) for name, array in arrays.items()},
        labels[keep] if labels is not None else None,
        source.classes,
        _origin(source, len(keep), count),
    )


def _array_names(source: DataSource, specs: Sequence[TensorSpec]) -> dict[str, str]:
    legal = [spec.name for spec in specs]
    for name in source.inputs:
        if name not in legal:
            raise DataError(
                f"data: inputs names {name!r}, which is no input of the model"
                f"{near_miss(name, legal)}",
                hint=f"inputs of the model: {', '.join(legal)}",
            )
    return {name: source.inputs.get(name, name) for name in legal}


def _only(specs: Sequence[TensorSpec], source: DataSource, what: str) -> TensorSpec:
    if len(specs) != 1:
        raise DataError(
            f"{_where(source)}: {what} gives one input, but the model has {len(specs)}"
            f" ({', '.join(spec.name for spec in specs)})",
            hint='use kind = "npz" with one array for each input, or kind = "python"',
        )
    return specs[0]


def _read_images(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    options = source.image
    if options is None:
        raise DataError(
            f"{_where(source)}: images need a declared preprocessing",
            hint="add [data.NAME.image] with size = [height, width]",
        )
    return _read_files(
        source,
        _only(specs, source, "a folder of images"),
        SUFFIXES,
        lambda content, where: prepare_image(content, options, where=where),
    )


def _read_wavs(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    options = source.audio
    if options is None:
        raise DataError(
            f"{_where(source)}: WAV files need a declared preprocessing",
            hint='add [data.NAME.audio] with features = "raw" or "mfcc"',
        )
    return _read_files(
        source,
        _only(specs, source, "a folder of WAV files"),
        (".wav",),
        lambda content, where: prepare_clip(content, options, where=where),
    )


def _read_files(
    source: DataSource,
    spec: TensorSpec,
    suffixes: tuple[str, ...],
    prepare: Callable[[bytes, str], np.ndarray],
) -> _Raw:
    """Files in order of their path; only the chosen ones are opened.

    The folder a file lies in is its label. ``classes`` gives the order; folders it does not name
    are left out; an empty name stands for a model output that has no samples. Without ``classes``
    they are the folders in order of name.
    """
    path = _existing(source)
    with _opened(path) as (names, read):
        files = sorted(
            name
            for name in names
            if name.lower().endswith(suffixes)
            and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        )
        folders = sorted({_folder(name) for name in files})
        classes = source.classes
        for name in classes:
            if name and name not in folders:
                raise DataError(
                    f"{path} has no folder {name!r}{near_miss(name, folders)}"
                    f" (folders: {', '.join(f for f in folders if f) or 'none'})",
                    hint='mend classes; "" stands for a model output that has no samples',
                )
        if classes:
            left_out = [f for f in folders if f not in classes]
            if left_out:
                log.info("%s: left out folders %s", path.name, ", ".join(left_out))
            files = [name for name in files if _folder(name) in classes]
        elif len(folders) > 1:
            if "" in folders:
                raise DataError(
                    f"{path}: some files lie in folders and some do not, so their labels are unclear",
                    hint="put every file into the folder of its class, or name classes",
                )
            classes = tuple(folders)
        keep = _choose(len(files), source)
        chosen = [files[i] for i in keep]
        first = prepare(read(chosen[0]), f"{path}/{chosen[0]}")
        # one array from the start: (N, ...) of the first sample's shape and dtype
        array = np.empty((len(chosen), *first.shape), dtype=first.dtype)
        for index, name in enumerate(chosen):
            array[index] = prepare(read(name), f"{path}/{name}")
    labels = None
    if classes:
        position = {name: i for i, name in enumerate(classes) if name}
        labels = np.array([position[_folder(name)] for name in chosen], dtype=np.int64)
    return _Raw({spec.name: array}, labels, classes, _origin(source, len(chosen), len(files)))


def _folder(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Names (``/``-separated) inside a folder or .zip, and how to read one."""
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]

        def read_file(name: str) -> bytes:
            try:
                return (path / name).read_bytes()
            except OSError as exc:
                raise DataError(f"cannot read {path / name}: {exc}") from exc

        yield names, read_file
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as exc:
        raise DataError(
            f"{path} is neither a folder nor a readable .zip: {exc}",
            hint="unpack it, or fetch it again if it is truncated",
            code="unreadable-data",
        ) from exc
    with archive:

        def read_member(name: str) -> bytes:
            try:
                return archive.read(name)
            except DAMAGED as exc:
                raise DataError(f"cannot read {name} in {path}: {exc}") from exc

        yield [n for n in archive.namelist() if not n.endswith("/")], read_member


def _read_python(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    if not source.function:
        raise DataError('data of kind "python" needs a function', hint='function = "file.py:name"')
    result = call_function(source.function, source.root, **source.args)
    labels = None
    if isinstance(result, tuple):
        if len(result) != 2:
            raise DataError(
                f"{source.function} returned a tuple of {len(result)}",
                hint="return inputs, or (inputs, labels)",
            )
        result, labels = result
    if isinstance(result, Mapping):
        names = _array_names(source, specs)
        missing = [f"{names[s.name]!r}" for s in specs if names[s.name] not in result]
        if missing:
            raise DataError(
                f"{source.function} returned no array {', '.join(missing)}"
                f" (returned: {', '.join(map(str, result))})",
                hint=f"inputs of the model: {', '.join(spec.name for spec in specs)}",
            )
        arrays = {name: _as_array(result[key], source) for name, key in names.items()}
    else:
        spec = _only(specs, source, "a function that returns one array")
        arrays = {spec.name: _as_array(result, source)}
    return _choose_arrays(
        source, arrays, None if labels is None else _as_array(labels, source, "labels")
    )


class LazyDataset:
    """A map-style dataset (``torch.utils.data.Dataset`` or a list) read sample by sample.

    Its items are (input, label), (input, input, ..., label), or without the label only an input.
    ``len`` is what fold, not_fold and limit leave of it; `read` prepares and checks like `load_samples`.
    """

    def __init__(self, source: DataSource, specs: Sequence[TensorSpec]) -> None:
        if not source.function:
            raise DataError(
                'data of kind "dataset" needs a function', hint='function = "file.py:name"'
            )
        self.items = call_function(source.function, source.root, **source.args)
        if not (hasattr(self.items, "__getitem__") and hasattr(self.items, "__len__")):
            raise DataError(
                f"{source.function} returned a {type(self.items).__name__}, not a dataset",
                hint="return something with __len__ and __getitem__; an iterable dataset is not enough",
            )
        self.source, self.specs = source, tuple(specs)
        self.rows = _choose(len(self.items), source)
        self.origin = _origin(source, len(self.rows), len(self.items))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Inputs by name (len(numbers), ...), and labels (or None) of the samples ``numbers``."""
        columns: list[tuple[Any, ...]] = []
        for number in numbers:
            row = int(self.rows[number])
            try:
                item = self.items[row]
            except Exception as exc:
                raise _user_error(exc, f"reading item {row} of {self.source.function}", "") from exc
            columns.append(tuple(item) if isinstance(item, (tuple, list)) else (item,))
        widths = {len(item) for item in columns}
        if len(widths) != 1 or widths.pop() not in (len(self.specs), len(self.specs) + 1):
            raise DataError(
                f"items of {self.source.function} hold {sorted({len(c) for c in columns})} values, the "
                f"model has {len(self.specs)} inputs",
                hint="return the inputs in the model's order, then the label",
            )
        arrays = [_as_array([np.asarray(v) for v in column], self.source) for column in zip(*columns, strict=True)]  # fmt: skip
        where = _where(self.source)
        inputs = {
            spec.name: _fit(array, spec, self.source, where=where)
            for spec, array in zip(self.specs, arrays, strict=False)
        }
        return inputs, arrays[-1] if len(arrays) > len(self.specs) else None


def _read_dataset(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    # `load_samples` prepares what is read here, so it must not be prepared yet
    plain = dataclasses.replace(source, scale=1.0, mean=(), std=())
    dataset = LazyDataset(plain, specs)
    inputs, labels = dataset.read(range(len(dataset)))
    return _Raw(inputs, labels, source.classes, dataset.origin)


def _as_array(value: Any, source: DataSource, what: str = "inputs") -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as exc:
        raise DataError(f"{source.function}: its {what} are no array: {exc}") from exc
    if array.dtype == object or array.dtype.kind not in "biuf":
        raise DataError(
            f"{source.function}: its {what} are {type(value).__name__} of {array.dtype},"
            " not numbers in rows of one length",
            hint="return numpy arrays, samples on the first axis",
        )
    return array


def _read_random(source: DataSource, specs: Sequence[TensorSpec]) -> _Raw:
    count = source.limit or RANDOM_SAMPLES
    generator = np.random.default_rng(source.seed)
    inputs = {}
    for spec in specs:
        if spec.dtype != "float32":
            raise DataError(
                f"random samples are noise; input {spec.name!r} wants {spec.dtype}",
                hint='give real data, or a function that makes it (kind = "python")',
            )
        if is_sequence(spec):
            spec = dataclasses.replace(spec, shape=(1, PARITY_STEPS, *spec.shape[2:]))
        if any(size < 1 for size in spec.shape[1:]):
            raise DataError(f"input {spec.name!r} has a free axis {spec.shape}: give real data")
        inputs[spec.name] = generator.standard_normal((count, *spec.shape[1:]), dtype=np.float32)
    return _Raw(inputs, None, (), f"random noise, seed {source.seed}: {count} samples")


_READERS: dict[str, Callable[[DataSource, Sequence[TensorSpec]], _Raw]] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "images": _read_images,
    "wavs": _read_wavs,
    "python": _read_python,
    "dataset": _read_dataset,
    "random": _read_random,
}


# --- preparing and checking ----------------------------------------------------------------------


def _fit(array: np.ndarray, spec: TensorSpec, source: DataSource, *, where: str) -> np.ndarray:
    """(N, ...) as read -> the dtype of ``spec``, scaled; the shape must be right already."""
    check_shape(array, spec, where=where)
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


def check_shape(array: np.ndarray, spec: TensorSpec, *, where: str) -> None:
    """Raise DataError unless ``array`` is (N, *spec.shape[1:]); sizes below 1 in the spec are free."""
    wanted, got = spec.shape[1:], array.shape[1:]
    if len(wanted) == len(got) and all(w in (g, 0, -1) for w, g in zip(wanted, got, strict=True)):
        return
    raise DataError(
        f"{where}: input {spec.name!r} wants samples of shape {wanted}"
        f"{f' ({spec.layout[1:]})' if spec.layout[1:] else ''}, got {got}",
        hint=_shape_hint(array.shape, spec),
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


# --- the user's own code -------------------------------------------------------------------------


class _importable(contextlib.AbstractContextManager[None]):
    """Puts a folder first on sys.path while the user's code runs.

    Modules that code of another folder imported from beside itself are forgotten first: two recipes
    may each have a ``helper.py``.
    """

    _neighbours: ClassVar[dict[str, str]] = {}  # module -> the folder it was found beside

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __enter__(self) -> None:
        for name in [n for n, folder in self._neighbours.items() if folder != self.folder]:
            sys.modules.pop(name, None)
            del self._neighbours[name]
        self.before = set(sys.modules)
        sys.path.insert(0, self.folder)

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ValueError):
            sys.path.remove(self.folder)
        for name in set(sys.modules) - self.before:
            file = getattr(sys.modules.get(name), "__file__", None) or ""
            beside = str(Path(self.folder, name.partition(".")[0]))
            if file == f"{beside}.py" or file.startswith(beside + os.sep):
                self._neighbours[name] = self.folder


def _load_file(path: Path) -> ModuleType:
    """A fresh module from a file, under a name that shadows no other module."""
    name = f"_edgepipe_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _user_error(exc: Exception, doing: str, module: str) -> DataError:
    """The user's exception with the last line of *their* file that it passed through."""
    if isinstance(exc, DataError):
        return exc
    frames = traceback.extract_tb(exc.__traceback__)
    file = getattr(sys.modules.get(module), "__file__", None) or module
    theirs = [f for f in frames if f.filename == file]
    if isinstance(exc, SyntaxError) and exc.filename:
        place = f"{exc.filename}, line {exc.lineno}"
    elif theirs or frames:
        frame = (theirs or frames)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
    else:
        place = module
    return DataError(
        f"{doing} failed: {type(exc).__name__}: {exc} ({place})",
        hint="mend the function; --debug shows the whole traceback",
        code="user-function-failed",
    )
