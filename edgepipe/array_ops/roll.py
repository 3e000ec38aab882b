"""Running a model with state along sequences, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edgepipe.artifact import TensorSpec
from edgepipe.errors import DataError
from edgepipe.state import Steps, batch_axis

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], dict[str, np.ndarray]]


def roll(
    run: Run, specs: Sequence[TensorSpec], sequences: Arrays
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """For each step, what the model was given and what came out, by name, for all N sequences at once.

    ``run`` does one inference for N samples in the source layouts; ``specs`` are the model's inputs
    there. ``sequences`` holds (N, T, ...) for each that is no state. State starts as zeros. Raises
    DataError where there is no step, or one input has more of them than another.
    """
    lengths = {sequences[s.name].shape[1] for s in specs if not s.fed_by}
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(
            f"sequences of {sorted(lengths)} steps: every input needs the same number, at least one",
            hint="data of a model with state is (samples, steps, ...) for each input",
        )
    count = len(next(iter(sequences.values())))
    state = {s.name: _zeros(s, count) for s in specs if s.fed_by}
    for step in range(lengths.pop()):
        given = {
            s.name: state[s.name] if s.fed_by else np.ascontiguousarray(sequences[s.name][:, step])
            for s in specs
        }
        found = run(given)
        state = {s.name: found[s.fed_by] for s in specs if s.fed_by}
        yield given, found


def roll_outputs(
    run: Run, specs: Sequence[TensorSpec], sequences: Arrays, names: Sequence[str], *, steps: Steps
) -> dict[str, np.ndarray]:
    """The outputs ``names`` of the last step, (N, ...), or of ``each``, (N, T, ...). Else as `roll`."""
    kept: list[dict[str, np.ndarray]] = []
    for _, outputs in roll(run, specs, sequences):
        if steps == "last":
            kept.clear()
        kept.append({name: outputs[name] for name in names})
    if steps == "last":
        return kept[-1]
    return {name: np.stack([one[name] for one in kept], axis=1) for name in names}


def one_by_one(run: Run, specs: Sequence[TensorSpec], sequences: Arrays) -> dict[str, np.ndarray]:
    """All inputs of every step as samples of their own, in the order of sequences, then steps.

    (N, T, ...) -> (N * T, ...) with the states that ``run`` had at each step: what was a sequence
    becomes independent inferences. Where they give what they gave in the sequence, each for itself,
    the sequence does. Arguments as for `roll`.
    """
    given = [inputs for inputs, _ in roll(run, specs, sequences)]
    return {
        spec.name: _merge([one[spec.name] for one in given], batch_axis(spec.source_layout))
        for spec in specs
    }


def _merge(steps: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """T arrays (..., N, ...) -> (..., N * T, ...), the steps of each sample side by side."""
    whole = np.stack(steps, axis=axis + 1)
    shape = (
        *whole.shape[:axis],
        whole.shape[axis] * whole.shape[axis + 1],
        *whole.shape[axis + 2 :],
    )
    return whole.reshape(shape)  # fmt: skip


def _zeros(spec: TensorSpec, count: int) -> np.ndarray:
    """What real values the state of ``count`` samples has at first, in the source layout."""
    sizes = dict(zip(spec.layout, spec.shape, strict=False))
    shape = [sizes[a] for a in spec.source_layout] if spec.source_layout else list(spec.shape)
    shape[batch_axis(spec.source_layout)] = count
    dtype = "float32" if spec.scale else spec.dtype
    return np.zeros(shape, np.dtype(dtype))
