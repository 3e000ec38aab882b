"""The same samples in the other ranges that networks are commonly trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# Mean and standard deviation of ImageNet's pixels / 255 (torchvision.transforms.v2.Normalize)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def other_ranges(
    inputs: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(what was done, inputs) for each: every float input (n, ...) is changed the same way.

    Values beyond 20 are taken for pixels from 0 to 255, others for pixels / 255 or -1 to 1.
    """
    floats = [a for a in inputs.values() if a.dtype.kind == "f"]
    if not floats:
        return
    highest = max(float(a.max()) for a in floats)
    lowest = min(float(a.min()) for a in floats)
    mean, std = float(np.mean(MEAN)), float(np.mean(STD))
    ways = (
        [
            ("divided by 255", 1 / 255, 0.0),
            ("divided by 127.5, less 1", 1 / 127.5, -1.0),
            (f"divided by 255, less {mean:.3g}, divided by {std:.3g}", 1 / 255 / std, -mean / std),
        ]
        if highest > 20
        else [
            ("multiplied by 255", 255.0, 0.0),
            ("doubled, less 1", 2.0, -1.0),
            ("halved, plus 0.5", 0.5, 0.5),
            ("multiplied by 127.5, plus 127.5", 127.5, 127.5),
            (f"less {mean:.3g}, divided by {std:.3g}", 1 / std, -mean / std),
        ]
    )
    for what, factor, offset in ways:
        if lowest < 0 and offset < 0:
            continue  # centred already
        yield what, {
            name: (a * np.float32(factor) + np.float32(offset)).astype(a.dtype) if a.dtype.kind == "f" else a
            for name, a in inputs.items()
        }  # fmt: skip
