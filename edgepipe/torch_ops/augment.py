"""Varying training samples, repeatably: what happens to a sample depends on seed, view and number.

Each *view* of the data set draws one table of parameters for all samples. So sample 17 in view 3 is
the same picture whichever batch it falls into, and what a teacher said of it can be kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.nn import functional

from edgepipe.errors import StageOptionError
from edgepipe.training import Augmentation


@dataclasses.dataclass(frozen=True)
class View:
    """One view of N samples: parameters by row. ``noise_seed`` begins a stream for each sample."""

    options: Augmentation
    flip: torch.Tensor  # (N,) bool
    shift: torch.Tensor  # (N, 2) int64, rows and columns
    stripes: torch.Tensor  # (N, 2, 2) in [0, 1): for both axes, width and place of the blank
    noise_seed: int

    def apply(self, inputs: Sequence[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
        """The samples ``rows`` (B,) of the data set, given as (B, ...) tensors; new tensors."""
        return [self._apply(t, rows) if t.is_floating_point() else t for t in inputs]

    def _apply(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        options = self.options
        if options.flip:
            mirrored = self.flip[rows].to(x.device).view(-1, *[1] * (x.ndim - 1))
            x = torch.where(mirrored, x.flip(-1), x)
        if options.shift:
            x = _shifted(x, self.shift[rows].to(x.device), options.shift)
        for axis, width in ((2, options.mask_time), (3, options.mask_frequency)):
            if width:
                x = _striped(x, self.stripes[rows, axis - 2].to(x.device), axis, width)
        if options.noise:
            drawn = [_normal(x.shape[1:], self.noise_seed, int(row)) for row in rows]
            x = x + options.noise * torch.stack(drawn).to(x)
        return x


def view(options: Augmentation, count: int, *, seed: int, number: int) -> View | None:
    """View ``number`` of ``count`` samples; None where nothing is varied (``mixup`` is no view)."""
    if not any((options.flip, options.shift, options.mask_time, options.mask_frequency, options.noise)):  # fmt: skip
        return None
    draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return View(
        options,
        flip=torch.rand(count, generator=draw) < 0.5,
        shift=torch.randint(-options.shift, options.shift + 1, (count, 2), generator=draw),
        stripes=torch.rand((count, 2, 2), generator=draw),
        noise_seed=seed * 1_000_003 + number,
    )


def check_augmentation(options: Augmentation, inputs: Sequence[torch.Tensor]) -> None:
    """Raises StageOptionError where the options need images and an input is none."""
    if not (options.flip or options.shift or options.mask_time or options.mask_frequency):
        return
    for tensor in inputs:
        if tensor.is_floating_point() and tensor.ndim != 4:
            raise StageOptionError(
                f"augment: flip, shift and masks take inputs (N, C, H, W), this one has {tensor.ndim} axes",
                hint="use noise or mixup, or augment in your own dataset",
            )


def mixed(
    inputs: Sequence[torch.Tensor], alpha: float, draw: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """Mixup of a batch (Zhang et al. 2018, eq. 1): inputs, the partner of each sample, its own weight."""
    # Beta(a, a) from two gamma deviates; torch's own sampler takes no generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=draw)))
        weight = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(len(inputs[0]), generator=draw)
    pairs = [
        weight * t + (1 - weight) * t[partner.to(t.device)] if t.is_floating_point() else t
        for t in inputs
    ]
    return pairs, partner, weight


def _shifted(x: torch.Tensor, by: torch.Tensor, most: int) -> torch.Tensor:
    """Each (C, H, W) moved by ``by`` (B, 2) pixels; what comes in repeats the edge."""
    height, width = x.shape[2:]
    padded = functional.pad(x, (most, most, most, most), mode="replicate")
    rows = torch.arange(height, device=x.device) + most - by[:, :1]
    columns = torch.arange(width, device=x.device) + most - by[:, 1:]
    index = torch.arange(len(x), device=x.device)[:, None, None]
    picked = padded[index, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()


def _striped(x: torch.Tensor, place: torch.Tensor, axis: int, most: int) -> torch.Tensor:
    """A stripe of 0 to ``most`` steps of ``axis`` of each sample set to that sample's mean."""
    size = x.shape[axis]
    width = (place[:, 0] * (min(most, size) + 1)).long()
    start = (place[:, 1] * (size - width + 1)).long()
    at = torch.arange(size, device=x.device)
    inside = (at >= start[:, None]) & (at < (start + width)[:, None])
    shape = [len(x), 1, 1, 1]
    shape[axis] = size
    mean = x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return torch.where(inside.view(shape), mean, x)


def _normal(shape: torch.Size, seed: int, row: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 7_919 + row))
