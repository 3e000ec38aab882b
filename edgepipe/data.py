"""`DataSource`: where samples come from and how they are prepared. Loading is `array_ops.load`.

Samples are always prepared for the *source* model: its input names, shapes, dtype and layout.
Conversion stages change the layout themselves, from the tensor specs.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.machinery
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from edgepipe.artifact import hash_path
from edgepipe.errors import DataError
from edgepipe.schema import record


@record
class ImagePreprocess:
    """Decode to ``color``, resize to ``size`` (height, width), then lay out as ``layout``."""

    size: tuple[int, int]
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    resize: Literal["bilinear", "nearest", "bicubic"] = "bilinear"
    layout: Literal["CHW", "HWC"] = "CHW"


@record
class AudioPreprocess:
    """Decode 16-bit PCM WAV to float in [-1, 1], cut or zero-pad to ``seconds``, take features.

    ``mfcc``: centred frames with reflect padding, periodic Hann window, power spectrum, triangular
    mel bins by integer bin (HTK scale), ln(x + 1e-6), unnormalised DCT-II -> (1, frames, coefficients);
    for a model with state that takes a frame at a step, (1, coefficients), -> (frames, coefficients).
    """

    sample_rate: int = 16000
    seconds: float = 1.0
    features: Literal["raw", "mfcc"] = "raw"
    n_fft: int = 640
    hop: int = 320
    mel_bins: int = 40
    coefficients: int = 10
    frames: int = 49


@record
class DataSource:
    """One named set of samples, ``[data.<name>]`` in a recipe.

    ``npz``     arrays by name; ``inputs`` maps model input -> array name (default: same name),
                ``labels`` names the label array (default ``labels`` where present)
    ``npy``     one array for a model with one input
    ``images``  a folder or .zip of images; the folder of each file is its label
    ``wavs``    a folder or .zip of WAV files; the folder of each file is its label
    ``python``  ``function`` = ``"file.py:name"`` or ``"package.module:name"``, called with ``args``;
                returns arrays: inputs, or (inputs, labels), inputs an array or a dict by name.
                What it reads should be named in ``args``: those files decide whether a cached
                result is still good
    ``dataset`` ``function`` as above; returns a map-style ``torch.utils.data.Dataset`` whose items are
                (input, label). Stages that train or calibrate read it as they need it, so it may
                be larger than memory
    ``random``  standard normal noise of the model's input shape: only for smoke tests, and the
                record says so
    """

    kind: Literal["npz", "npy", "images", "wavs", "python", "dataset", "random"]
    path: Path | None = None
    function: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    labels: str = "labels"
    classes: tuple[str, ...] = ()
    image: ImagePreprocess | None = None
    audio: AudioPreprocess | None = None
    # after decoding: (x * scale - mean) / std, mean and std per channel or one number
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    # [k, n] keeps the samples whose index % n == k; not_fold those where it is not
    fold: tuple[int, int] | None = None
    not_fold: tuple[int, int] | None = None
    # a seeded random choice of this many samples, in stored order; 0 = all
    limit: int = 0
    seed: int = 0
    # folder that "file.py:name" is relative to; filled in by the recipe loader
    root: Path | None = dataclasses.field(default=None, metadata={"internal": True})

    def __post_init__(self) -> None:
        for name in ("seed", "limit"):
            if getattr(self, name) < 0:
                raise DataError(
                    f"{name} = {getattr(self, name)} is negative", hint="write 0 or more"
                )
        if self.fold and self.not_fold:
            raise DataError("fold and not_fold are both set", hint="keep one of them")


def at_most(source: DataSource, count: int) -> DataSource:
    """The source with its ``limit`` lowered to ``count`` samples; 0 changes nothing."""
    if not count or 0 < source.limit <= count:
        return source
    return dataclasses.replace(source, limit=count)


def split_reference(reference: str, root: Path | None) -> tuple[Path | str, str]:
    """``"file.py:name"`` -> (absolute Path, name); ``"package.module:name"`` -> (module, name)."""
    module, _, name = reference.partition(":")
    if not module or not name.isidentifier():
        raise DataError(
            f"{reference!r} names no Python function",
            hint='write "file.py:function" or "package.module:function"',
        )
    if module.endswith(".py"):
        return ((root or Path.cwd()) / module).resolve(), name
    return module, name


def user_path(path: Path | str, root: Path | None) -> Path:
    """A path that a recipe names: relative to ``root``, ``~`` expanded where there is such a home."""
    return (root or Path.cwd()) / os.path.expanduser(path)  # noqa: PTH111 - Path's raises on ~nobody


def path_exists(path: Path) -> bool:
    """Whether something is there. (`Path.exists` raises where a name is too long for a path.)"""
    return os.path.exists(path)  # noqa: PTH110


def fingerprint(source: DataSource) -> str:
    """What a cache key needs of a data source: its options and the sha256 of its content.

    For a Python function the content is its source and every file or folder that ``args`` name.
    """
    content = []
    if source.path is not None:
        content.append(hash_path(source.path))
    elif source.function:
        content.append(source_hash(source.function, source.root))
        content += named_files(source.args, source.root)
    options = dataclasses.asdict(source)
    options.pop("root"), options.pop("path")
    return f"{options!r} {' '.join(content)}"


def source_hash(reference: str, root: Path | None) -> str:
    """sha256 of the Python source behind ``"file.py:name"`` or ``"package.module:name"``.

    Of a file: that file and what it imports from its own folder. Of a module: the whole package it
    lies in, found without importing it, and where that lies in ``root`` what it imports from there.
    "" where there is none.
    """
    module, _ = split_reference(reference, root)
    if isinstance(module, str):
        home = str(root or Path.cwd())
        spec = importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [home, *sys.path])
        folders = spec.submodule_search_locations if spec else None
        if folders:
            files = {file for folder in folders for file in Path(folder).rglob("*.py")}
            if Path(home) in [Path(folder).parent for folder in folders]:
                files = _with_neighbours(Path(home), files)
        else:
            origin = Path(spec.origin) if spec and spec.origin else None
            files = _with_neighbours(origin.parent, [origin]) if origin else set()
    else:
        files = _with_neighbours(module.parent, [module])
    parts = [f"{file.name} {hash_path(file)}" for file in sorted(files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""


def _with_neighbours(folder: Path, files: Iterable[Path]) -> set[Path]:
    """Python files, and the modules of a folder that they import, and those that they import."""
    found: set[Path] = set()
    to_read = list(files)
    while to_read:
        path = to_read.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for name in _imported(path.read_bytes()):
            to_read += [folder / f"{name}.py", *(folder / name).rglob("*.py")]
    return found


def _imported(source: bytes) -> set[str]:
    """Names of the top-level modules that Python source imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # whoever imports it says so
        return set()
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - {""}


def named_files(value: Any, root: Path | None) -> list[str]:
    """sha256 of every file or folder that a text in ``value`` names, however nested.

    Relative ones are looked for under ``root`` and in the working folder, where Python opens them.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [found for item in value for found in named_files(item, root)]
    if not isinstance(value, str) or not value:
        return []
    paths = {user_path(value, root), Path.cwd() / value}
    return [hash_path(path) for path in sorted(paths) if path_exists(path)]
