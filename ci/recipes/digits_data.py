"""The 1,797 handwritten digits that come with scikit-learn: 8x8 pixels of 0 to 16."""

import numpy as np
from sklearn.datasets import load_digits


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, 8, 8) float32 in [0, 1] and (N,) labels; every fifth digit is in ``test``, the rest in ``train``."""
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
    # (N, 8, 8) 0..16 -> (N, 1, 8, 8) 0..1
    images = (digits.images[chosen] / 16).astype(np.float32)[:, np.newaxis]
    return images, digits.target[chosen]
