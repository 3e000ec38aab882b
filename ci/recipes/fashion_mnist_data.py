"""Fashion-MNIST from its four idx files (https://github.com/zalandoresearch/fashion-mnist)."""

import gzip
from pathlib import Path

import numpy as np


def read_idx(path: Path) -> np.ndarray:
    """uint8 array from an idx file: two zero bytes, type 8, rank, sizes as big-endian uint32, data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, 28, 28) uint8 and (N,) labels; ``split`` is ``train`` (60,000) or ``test`` (10,000)."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz")
    return images[:, np.newaxis], labels.astype(np.int64)
