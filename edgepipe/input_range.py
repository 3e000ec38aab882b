"""Is the data in the range that the model was trained on? By the task metric, tried on other ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifact import Artifact
from edgepipe.errors import DataError
from edgepipe.predict import predict
from edgepipe.state import Steps

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.array_ops.load import Samples

# Enough samples to see 20 points (their standard error is 3 points), few enough to cost little.
TRIED = 256
BETTER = 0.2
# A model that is right more often than this cannot be so much better in another range.
SUSPICIOUS = 1 - BETTER
LEAST = 10


def check_input_range(
    model: Artifact,
    samples: Samples,
    *,
    metric: str,
    score: float,
    root: Path,
    steps: Steps = "last",
) -> None:
    """Raise DataError (``wrong-range``) where the model does far better on the same data in another range.

    Such as pixels from 0 to 255 given to a network that wants -1 to 1: nothing fails, every answer is
    made of saturated activations. Looked at only where ``score``, its metric on these samples, is
    poor. A range is at fault if `BETTER` more of the samples, and at least `LEAST`, are right in another.
    """
    from edgepipe.array_ops.input_ranges import other_ranges
    from edgepipe.array_ops.task_metrics import as_judged, correct

    if samples.labels is None or score >= SUSPICIOUS or samples.is_random:
        return
    step = max(1, len(samples) // TRIED)
    few = {name: a[::step][:TRIED] for name, a in samples.inputs.items()}
    known = samples.labels[::step][:TRIED]

    def right(inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        answers, labels = as_judged(metric, predict(model, inputs, steps=steps), known, steps=steps)
        return correct(metric, answers, labels, root=root)

    before = right(few)
    if before is None:
        return
    best: tuple[int, str] = (0, "")
    for what, changed in other_ranges(few):
        after = right(changed)
        if after is not None:
            best = max(best, (int(after.sum()) - int(before.sum()), what))
    gain, what = best
    if gain < max(BETTER * len(before), LEAST):
        return
    count = int(before.sum())
    lowest = min(float(a.min()) for a in few.values())
    highest = max(float(a.max()) for a in few.values())
    raise DataError(
        f"{samples.origin}: of {len(before)} samples with values from {lowest:.4g} to {highest:.4g} the"
        f" model gets {count} right, and {count + gain} if they are {what}: it was trained on another range",
        hint="set scale, mean and std of the [data] table to what was used in training",
        code="wrong-range",
    )
