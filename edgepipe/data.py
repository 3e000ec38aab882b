"""`DataSource`: where samples come from and how they are prepared. Loading is `array_ops.load`.

Samples are always prepared for the *source* model: its input names, shapes, dtype and layout.
Conversion stages change the layout themselves, from the tensor specs.
"""

from __future__ import annotations

import dataclasses
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
    mel bins by integer bin (HTK scale), ln(x + 1e-6), unnormalised DCT-II -> (1, frames, coefficients).
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
    ``random``  standard normal noise of the model's input shape: only for smoke tests, and the
                record says so
    """

    kind: Literal["npz", "npy", "images", "wavs", "python", "random"]
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
    root: Path | None = None


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


def fingerprint(source: DataSource) -> str:
    """What a cache key needs of a data source: its options and the sha256 of its content.

    For a Python function the content is the source file of its module (a module by name is found
    without importing it) and every file or folder that one of its ``args`` names.
    """
    import importlib.util

    content = ""
    if source.path is not None:
        content = hash_path(source.path)
    elif source.function:
        module, _ = split_reference(source.function, source.root)
        if isinstance(module, str):
            spec = importlib.util.find_spec(module)
            module = Path(spec.origin) if spec and spec.origin else Path()
        content = hash_path(module) if module.is_file() else ""
        for value in source.args.values():
            if isinstance(value, str) and value:
                path = (source.root or Path()) / value
                content += hash_path(path) if path.exists() else ""
    options = dataclasses.asdict(source)
    options.pop("root"), options.pop("path")
    return f"{options!r} {content}"
