"""Training by a function of the user's own, and what must hold of what comes back."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path

import torch
from torch import nn

from edgepipe.array_ops.user_code import call_function
from edgepipe.errors import StageError
from edgepipe.torch_ops.edits import sparse_weights
from edgepipe.torch_ops.run import same_outputs
from edgepipe.torch_ops.train import TrainingSet
from edgepipe.training import TrainingOptions

log = logging.getLogger(__name__)


def train_by_function(
    function: str,
    model: nn.Module,
    data: TrainingSet,
    validation: TrainingSet | None,
    options: TrainingOptions,
    *,
    seed: int,
    stage: str,
    root: Path | None,
) -> nn.Module:
    """Call ``function`` ("file.py:name", relative to ``root``) to train a copy of ``model``.

    It is called as ``function(model, train_set, validation_set, options, seed)``, with torch's random
    numbers seeded, the model in training mode on the CPU, and sets that have ``len(set)`` and
    ``set.batch(rows)`` (rows: numbers of samples, (B,) int64; gives the input tensors (B, ...) in
    call order and the labels). It returns the trained module, or None where it trained the one it
    was given. Raises DataError for what the function raises, StageError where it returns no module,
    or one of another structure, with weights that are no numbers or lost zeros of a sparse layer.
    """
    given = copy.deepcopy(model).train()
    given.requires_grad_(True)
    began = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        returned = call_function(function, root, given, data, validation, options, seed)
    trained = given if returned is None else returned
    if not isinstance(trained, nn.Module):
        raise StageError(
            f"{function} returned a {type(trained).__name__}, not the trained module",
            stage=stage,
            hint="end it with `return model`, or with nothing where it trained the model it was given",
            code="bad-trainer",
        )
    trained = trained.cpu().eval()
    _check_structure(function, model, trained, stage)
    _check_values(function, model, trained, stage)
    rebuilt = copy.deepcopy(model).eval()
    rebuilt.load_state_dict(trained.state_dict())
    if not same_outputs(rebuilt, trained, data.batch(torch.arange(1))[0]):
        raise StageError(
            f"{function} returned a module that computes something else than the given one with its weights",
            stage=stage,
            hint="train the model that is given; what else shall change belongs into its builder",
            code="bad-trainer",
        )
    log.info("%s trained the model in %.1f s", function, time.monotonic() - began)
    return rebuilt


def _check_structure(function: str, before: nn.Module, after: nn.Module, stage: str) -> None:
    expected, found = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (before, after))  # fmt: skip
    changed = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is new" for name in found if name not in expected),
        *(f"{name} is {found[name]} instead of {shape}" for name, shape in expected.items() if name in found and found[name] != shape),
    ]  # fmt: skip
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise StageError(
            f"{function} returned a module of another structure: {', '.join(changed[:3])}{more}",
            stage=stage,
            hint="train the model that is given; unwrap it again (model.module of DataParallel, model._orig_mod of torch.compile)",
            code="bad-trainer",
        )


def _check_values(function: str, before: nn.Module, after: nn.Module, stage: str) -> None:
    state = after.state_dict()
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]  # fmt: skip
    if broken:
        raise StageError(
            f"{function} returned weights that are nan or infinite: {', '.join(broken[:3])}",
            stage=stage,
            hint="lower its learning rate, or clip its gradients",
            code="diverged",
        )
    sparse = sparse_weights(before)
    lost = [name for name, weight in sparse.items() if (state[name][weight.detach() == 0] != 0).any()]  # fmt: skip
    if lost:
        raise StageError(
            f"{function} trained zeros away that an earlier stage made: {', '.join(lost[:3])}",
            stage=stage,
            hint="after each step of the optimiser: weight.data.mul_(mask), with mask = weight != 0 from the beginning",
            code="lost-zeros",
        )
