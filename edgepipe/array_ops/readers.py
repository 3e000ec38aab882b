"""What each kind of `DataSource` holds: read a few samples at a time, and not kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgepipe.array_ops.audio import prepare_clip
from edgepipe.array_ops.images import SUFFIXES, prepare_image
from edgepipe.array_ops.user_code import call_function, user_error
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.schema import near_miss
from edgepipe.state import FREE, with_steps

log = logging.getLogger(__name__)

# How many samples of noise `kind = "random"` makes where `limit` says nothing.
RANDOM_SAMPLES = 100
# What zipfile and numpy raise for damaged files; RuntimeError for one that seems to be encrypted.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
# Samples are read so many stored bytes at a time (or one by one where one is larger): enough
# for numpy to be busy, next to nothing beside a model's activations.
BLOCK_BYTES = 1 << 18
# Items of a dataset read at a time: what they take is not known before.
DATASET_ROWS = 16

# Inputs by name (n, ...) as they are stored, and their labels (n, ...)
Block = tuple[dict[str, np.ndarray], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Reader:
    """``count`` samples as they are stored: nothing is chosen, scaled or cast yet.

    ``read(rows)`` begins anew with each call and gives the samples ``rows``, (k,) ascending, in blocks.
    ``shapes`` are those of the inputs, (count, ...), where they are known before anything is read;
    ``names`` are those of all arrays that there are, used or not, where arrays have names.
    """

    count: int
    read: Callable[[np.ndarray], Iterator[Block]]
    classes: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()


def where_text(source: DataSource) -> str:
    return str(source.path) if source.path is not None else source.function or source.kind


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


@contextlib.contextmanager
def _damaged(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as exc:
        raise DataError(
            f"cannot read {path} as {what}: {exc}",
            hint="the file may be truncated or of another format; arrays of Python objects are refused",
            code="unreadable-data",
        ) from exc


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
            f"{where_text(source)}: {what} gives one input, but the model has {len(specs)}"
            f" ({', '.join(spec.name for spec in specs)})",
            hint='use kind = "npz" with one array for each input, or kind = "python"',
        )
    return specs[0]


# --- arrays --------------------------------------------------------------------------------------


def _npz(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    path = _existing(source)
    wanted = _array_names(source, specs)
    with _damaged(path, ".npz"):
        opened = np.load(path, allow_pickle=False)  # reads names alone
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError(f"{path} holds one bare array", hint='use kind = "npy" for it')
        with opened:
            names = list(opened.files)
    for input_name, array_name in wanted.items():
        if array_name not in names:
            raise DataError(
                f"{path} has no array {array_name!r} for model input {input_name!r}"
                f"{near_miss(array_name, names)} (arrays: {', '.join(names)})",
                hint=f"say which array it is: inputs = {{ {input_name} = "
                f'"{next((n for n in names if n != source.labels), "...")}" }}',
            )
    has_labels = source.labels in names
    if not has_labels and source.labels != "labels" and source.labels:
        raise DataError(
            f"{path} has no array {source.labels!r} for the labels"
            f"{near_miss(source.labels, names)} (arrays: {', '.join(names)})",
            hint='set labels = "..." to one of them',
        )
    members = [*wanted.values(), *([source.labels] if has_labels else [])]
    with _damaged(path, ".npz"), zipfile.ZipFile(path) as archive:
        headers = [_member_header(archive, member) for member in members]
        if any(header.is_fortran for header in headers):
            # what belongs to one sample lies all over such an array
            with np.load(path, allow_pickle=False) as whole:
                arrays = {name: whole[member] for name, member in wanted.items()}
                labels = whole[source.labels] if has_labels else None
            return _in_memory(source, arrays, labels, names)
    shapes = {name: header.shape for name, header in zip(wanted, headers, strict=False)}
    count = _count(source, shapes, headers[-1].shape if has_labels else None)
    intact: set[str] = set()

    def read(rows: np.ndarray) -> Iterator[Block]:
        size = _rows_of(sum(header.row_bytes for header in headers))
        with (
            _damaged(path, ".npz"),
            zipfile.ZipFile(path) as archive,
            contextlib.ExitStack() as stack,
        ):
            streams = [stack.enter_context(_open_member(archive, m)) for m in members]
            columns = [_array_rows(s, rows, size) for s in streams]
            for parts in zip(*columns, strict=True):
                inputs = dict(zip(wanted, parts, strict=False))
                yield inputs, parts[-1] if has_labels else None
            for member, stream in zip(members, streams, strict=True):
                if member not in intact:  # zipfile compares checksums at the end of a member
                    while stream.read(BLOCK_BYTES):
                        pass
                    intact.add(member)

    return Reader(count, read, source.classes, shapes, tuple(names))


def _npy(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    path = _existing(source)
    spec = _only(specs, source, "a .npy file")
    with _damaged(path, ".npy"):
        array = np.load(path, allow_pickle=False, mmap_mode="r")  # finds files that are cut short
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path} holds several arrays", hint='use kind = "npz" for it')
    if not array.flags.c_contiguous:
        return _in_memory(source, {spec.name: array}, None)
    count = _count(source, {spec.name: array.shape}, None)
    size = _rows_of(array.nbytes // max(count, 1))

    def read(rows: np.ndarray) -> Iterator[Block]:
        # not through the map: pages of a map count as this process's memory
        with _damaged(path, ".npy"), path.open("rb") as stream:
            for part in _array_rows(stream, rows, size):
                yield {spec.name: part}, None

    return Reader(count, read, source.classes, {spec.name: array.shape})


def _in_memory(
    source: DataSource,
    arrays: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    names: Iterable[str] = (),
) -> Reader:
    shapes = {name: array.shape for name, array in arrays.items()}
    count = _count(source, shapes, None if labels is None else labels.shape)
    size = _rows_of(sum(array.nbytes for array in arrays.values()) // max(count, 1))

    def read(rows: np.ndarray) -> Iterator[Block]:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            inputs = {name: np.asarray(array[part]) for name, array in arrays.items()}
            yield inputs, None if labels is None else np.asarray(labels[part])

    return Reader(count, read, source.classes, shapes, tuple(names))


def _count(
    source: DataSource, shapes: Mapping[str, tuple[int, ...]], labels: tuple[int, ...] | None
) -> int:
    """The number of samples that arrays of these shapes agree on."""
    where = where_text(source)
    for name, shape in shapes.items():
        if not shape:
            raise DataError(
                f"{where}: the array for input {name!r} is a single number",
                hint="samples go on the first axis",
            )
    lengths = {shape[0] for shape in shapes.values()} | ({labels[0]} if labels else set())
    if len(lengths) != 1 or labels == ():
        listed = ", ".join(f"{name!r}: {shape[0]}" for name, shape in shapes.items())
        tail = "" if labels is None else f"; labels: {labels[0] if labels else 'a number'}"
        raise DataError(
            f"{where}: different numbers of samples ({listed}{tail})",
            hint="every array, labels too, needs the same number of samples on its first axis",
        )
    return lengths.pop()


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the beginning of a .npy file says (numpy.lib.format)."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def _read_header(stream: IO[bytes]) -> _Header:
    """Leaves the stream at the first value."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0  # fmt: skip
    header = _Header(*read(stream))
    if header.dtype.hasobject or any(size < 0 for size in header.shape):
        raise ValueError(f"an array of {header.dtype} and shape {header.shape}")
    return header


def _open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)


def _member_header(archive: zipfile.ZipFile, name: str) -> _Header:
    with _open_member(archive, name) as stream:
        header = _read_header(stream)
        held = archive.getinfo(stream.name).file_size - stream.tell()
    if held < math.prod(header.shape) * header.dtype.itemsize:
        raise ValueError(f"array {name!r} is cut short")
    return header


def _array_rows(stream: IO[bytes], rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Of a .npy file that begins here, the ascending ``rows``, ``size`` at a time, read forwards."""
    header = _read_header(stream)
    position = 0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        block = np.empty((len(part), *header.shape[1:]), header.dtype)
        done = 0
        for run in np.split(part, np.flatnonzero(np.diff(part) != 1) + 1):
            _skip(stream, (int(run[0]) - position) * header.row_bytes)
            wanted = len(run) * header.row_bytes
            content = stream.read(wanted)
            if len(content) != wanted:
                raise ValueError(f"it ends before sample {run[-1]}")
            shape = (len(run), *header.shape[1:])
            block[done : done + len(run)] = np.frombuffer(content, header.dtype).reshape(shape)
            done, position = done + len(run), int(run[-1]) + 1
        yield block


def _skip(stream: IO[bytes], count: int) -> None:
    if not isinstance(stream, zipfile.ZipExtFile):
        stream.seek(count, 1)
        return
    while count > 0:  # seek of a compressed stream reads 16 MiB at once
        read = len(stream.read(min(count, BLOCK_BYTES)))
        if not read:
            raise ValueError("it ends early")
        count -= read


def _rows_of(row_bytes: int) -> int:
    """How many samples of so many bytes make a block."""
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


# --- files ---------------------------------------------------------------------------------------


def _images(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    options = source.image
    if options is None:
        raise DataError(
            f"{where_text(source)}: images need a declared preprocessing",
            hint="add [data.NAME.image] with size = [height, width]",
        )
    return _files(
        source,
        _only(specs, source, "a folder of images"),
        SUFFIXES,
        lambda content, where: prepare_image(content, options, where=where),
    )


def _wavs(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    options = source.audio
    if options is None:
        raise DataError(
            f"{where_text(source)}: WAV files need a declared preprocessing",
            hint='add [data.NAME.audio] with features = "raw" or "mfcc"',
        )
    spec = _only(specs, source, "a folder of WAV files")
    # of a model with state a frame is a step: (1, frames, coefficients) -> (frames, coefficients)
    is_sequence = options.features == "mfcc" and spec.shape[1:2] == (FREE,) and len(spec.shape) == 3

    def prepare(content: bytes, where: str) -> np.ndarray:
        clip = prepare_clip(content, options, where=where)
        return clip[0] if is_sequence else clip

    return _files(source, spec, (".wav",), prepare)


def _files(
    source: DataSource,
    spec: TensorSpec,
    suffixes: tuple[str, ...],
    prepare: Callable[[bytes, str], np.ndarray],
) -> Reader:
    """Files in order of their path; only the chosen ones are opened.

    The folder a file lies in is its label. ``classes`` gives the order; folders it does not name
    are left out; an empty name stands for a model output that has no samples. Without ``classes``
    they are the folders in order of name.
    """
    path = _existing(source)
    files = sorted(
        name
        for name in _names_in(path)
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
    position = {name: i for i, name in enumerate(classes) if name}

    def read(rows: np.ndarray) -> Iterator[Block]:
        with _opened(path) as content_of:
            prepared = (
                (prepare(content_of(files[row]), f"{path}/{files[row]}"), position.get(_folder(files[row]), 0))
                for row in rows.tolist()
            )  # fmt: skip
            for clips, labels in _in_blocks(prepared):
                yield (
                    {spec.name: np.stack(clips)},
                    np.array(labels, dtype=np.int64) if classes else None,
                )

    return Reader(len(files), read, classes)


def _in_blocks(items: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Items of several values each -> columns of so many of them as make a block."""
    held: list[tuple[Any, ...]] = []
    for item in items:
        held.append(item)
        if len(held) >= _rows_of(sum(np.asarray(value).nbytes for value in held[0])):
            yield list(zip(*held, strict=True))
            held = []
    if held:
        yield list(zip(*held, strict=True))


def _folder(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def _names_in(path: Path) -> list[str]:
    """Names (``/``-separated) of the files inside a folder or .zip."""
    if path.is_dir():
        return [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    with _archive(path) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Callable[[str], bytes]]:
    """How to read one file of a folder or .zip."""
    if path.is_dir():

        def read_file(name: str) -> bytes:
            try:
                return (path / name).read_bytes()
            except OSError as exc:
                raise DataError(f"cannot read {path / name}: {exc}") from exc

        yield read_file
        return
    with _archive(path) as archive:

        def read_member(name: str) -> bytes:
            try:
                return archive.read(name)
            except DAMAGED as exc:
                raise DataError(f"cannot read {name} in {path}: {exc}") from exc

        yield read_member


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as exc:
        raise DataError(
            f"{path} is neither a folder nor a readable .zip: {exc}",
            hint="unpack it, or fetch it again if it is truncated",
            code="unreadable-data",
        ) from exc


# --- the user's function, and noise --------------------------------------------------------------


def _python(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    if not source.function:
        raise DataError('data of kind "python" needs a function', hint='function = "file.py:name"')
    result = call_function(source.function, source.root, **source.args)
    labels = None
    returned: tuple[str, ...] = ()
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
        returned = tuple(map(str, result))
    else:
        spec = _only(specs, source, "a function that returns one array")
        arrays = {spec.name: _as_array(result, source)}
    return _in_memory(
        source, arrays, None if labels is None else _as_array(labels, source, "labels"), returned
    )


def _dataset(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    """A map-style dataset (``torch.utils.data.Dataset`` or a list), read item by item.

    Its items are (input, label), (input, input, ..., label), or without the label only an input.
    """
    if not source.function:
        raise DataError('data of kind "dataset" needs a function', hint='function = "file.py:name"')
    items = call_function(source.function, source.root, **source.args)
    if not (hasattr(items, "__getitem__") and hasattr(items, "__len__")):
        raise DataError(
            f"{source.function} returned a {type(items).__name__}, not a dataset",
            hint="return something with __len__ and __getitem__; an iterable dataset is not enough",
        )

    def item_of(row: int) -> tuple[Any, ...]:
        try:
            item = items[row]
        except Exception as exc:
            raise user_error(exc, f"reading item {row} of {source.function}", "") from exc
        values = tuple(item) if isinstance(item, (tuple, list)) else (item,)
        if len(values) not in (len(specs), len(specs) + 1):
            raise DataError(
                f"item {row} of {source.function} holds {len(values)} values, the model has"
                f" {len(specs)} inputs",
                hint="return the inputs in the model's order, then the label",
            )
        return tuple(np.asarray(value) for value in values)

    def read(rows: np.ndarray) -> Iterator[Block]:
        for start in range(0, len(rows), DATASET_ROWS):
            found = [item_of(row) for row in rows[start : start + DATASET_ROWS].tolist()]
            if len({len(values) for values in found}) > 1:
                raise DataError(
                    f"some items of {source.function} have a label and some have none",
                    hint="return the inputs in the model's order, then the label, for each",
                )
            columns = [_as_array(list(column), source) for column in zip(*found, strict=True)]
            inputs = {spec.name: column for spec, column in zip(specs, columns, strict=False)}
            yield inputs, columns[-1] if len(columns) > len(specs) else None

    return Reader(len(items), read, source.classes)


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


def _random(source: DataSource, specs: Sequence[TensorSpec]) -> Reader:
    """Standard normal noise. One generator makes all of the first input, then all of the next."""
    count = source.limit or RANDOM_SAMPLES
    specs = with_steps(specs)
    for spec in specs:
        if spec.dtype != "float32":
            raise DataError(
                f"random samples are noise; input {spec.name!r} wants {spec.dtype}",
                hint='give real data, or a function that makes it (kind = "python")',
            )
        if any(size < 1 for size in spec.shape[1:]):
            raise DataError(f"input {spec.name!r} has a free axis {spec.shape}: give real data")
    size = _rows_of(sum(4 * math.prod(spec.shape[1:]) for spec in specs))
    blocks = [min(size, count - start) for start in range(0, count, size)]

    def draw(generator: np.random.Generator, spec: TensorSpec, rows: int) -> np.ndarray:
        return generator.standard_normal((rows, *spec.shape[1:]), dtype=np.float32)

    # each input's generator, where the one before it stopped
    starts = [np.random.default_rng(source.seed)]
    for spec in specs[:-1]:
        generator = copy.deepcopy(starts[-1])
        for rows in blocks:
            draw(generator, spec, rows)
        starts.append(generator)

    def read(rows: np.ndarray) -> Iterator[Block]:
        generators = copy.deepcopy(starts)
        position = 0
        for length in blocks:
            inputs = {s.name: draw(g, s, length) for s, g in zip(specs, generators, strict=True)}
            wanted = rows[(rows >= position) & (rows < position + length)] - position
            if len(wanted):
                yield {name: array[wanted] for name, array in inputs.items()}, None
            position += length

    return Reader(count, read)


READERS: dict[str, Callable[[DataSource, Sequence[TensorSpec]], Reader]] = {
    "npz": _npz,
    "npy": _npy,
    "images": _images,
    "wavs": _wavs,
    "python": _python,
    "dataset": _dataset,
    "random": _random,
}
# Kinds whose samples cost more to make than to hold
DECODED = ("images", "wavs", "dataset")


def remembering(reader: Reader, most_bytes: int) -> Reader:
    """The reader, with the first samples that it reads kept in memory, up to so many bytes."""
    held: dict[int, Block] = {}
    room = most_bytes

    def read(rows: np.ndarray) -> Iterator[Block]:
        nonlocal room
        known = dict(held)  # another pass may add to them before this one ends
        fresh = (
            ({name: array[i : i + 1] for name, array in inputs.items()}, None if labels is None else labels[i : i + 1])
            for inputs, labels in reader.read(np.array([r for r in rows.tolist() if r not in known], np.int64))
            for i in range(len(next(iter(inputs.values()))))
        )  # fmt: skip
        for row in rows.tolist():
            block = known.get(row)
            if block is None:
                block = next(fresh)
                size = sum(array.nbytes for array in block[0].values())
                if size <= room and row not in held:
                    # a copy: a view would hold the whole block that it is of
                    held[row] = ({n: a.copy() for n, a in block[0].items()}, block[1])
                    room -= size
            yield block

    return dataclasses.replace(reader, read=read)
