"""MobileNetV3-Small (Howard et al. 2019, table 2): squeeze-and-excite and hard-swish."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

SMALLEST_MAP = 3  # no stride that would leave fewer values on an axis, as 96 / 2**5

# (kernel, expanded channels, channels, squeeze-and-excite, hard-swish, stride)
PLAN = (
    (3, 16, 16, True, False, 2), (3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1), (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1),
)  # fmt: skip


def build(
    *,
    width: float = 0.35,
    num_classes: int = 10,
    in_channels: int = 3,
    size: Sequence[int] = (96, 96),
) -> nn.Module:
    return MobileNetV3Small(width, num_classes, in_channels, size)


class MobileNetV3Small(nn.Module):
    """(N, C, H, W) or (N, C, L) float32 -> (N, num_classes) class scores."""

    def __init__(
        self, width: float, num_classes: int, in_channels: int, size: Sequence[int]
    ) -> None:
        super().__init__()
        maps = Maps(size)
        narrow = channels(16 * width)
        layers = [*convolution(in_channels, narrow, maps, stride=2), nn.Hardswish()]
        for kernel, inner, count, squeeze, swish, stride in PLAN:
            wide = channels(count * width)
            layers.append(
                Block(narrow, channels(inner * width), wide, maps, kernel, squeeze, swish, stride)
            )
            narrow = wide
        wide = channels(576 * width)
        layers += [*convolution(narrow, wide, maps, kernel=1), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        hidden = channels(1024 * width)
        self.head = nn.Sequential(
            nn.Linear(wide, hidden), nn.Hardswish(), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(3)  # (N, C, L) -> (N, C, L, 1)
        return self.head(self.features(x).mean((2, 3)))


class Block(nn.Module):
    """Expand, filter each channel, weight the channels, project; residual where the shapes allow it."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, maps: Maps, kernel: int, squeeze: bool,
        swish: bool, stride: int,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        if inner != inputs:
            layers += [*convolution(inputs, inner, maps, kernel=1), activation(swish)]
        before = list(maps.size)
        layers += convolution(inner, inner, maps, kernel=kernel, stride=stride, groups=inner)
        if squeeze:
            layers.append(SqueezeExcite(inner))
        layers += [activation(swish), *convolution(inner, outputs, maps, kernel=1)]
        self.body = nn.Sequential(*layers)
        self.is_residual = inputs == outputs and before == maps.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)


class SqueezeExcite(nn.Module):
    """Each channel weighted by what a small network makes of the means of all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(count, channels(count / 4), 1)
        self.excite = nn.Conv2d(channels(count / 4), count, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        # the hard sigmoid relu6(x + 3) / 6; nn.Hardsigmoid becomes operators without an int8 form
        return x * (functional.relu6(weights + 3) * (1 / 6))


class Maps:
    """The height and width of the feature maps, on the way through the network."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = [size[0], size[1] if len(size) > 1 else 1]

    def halve(self, stride: int) -> tuple[int, int]:
        """``stride`` on each axis that is long enough, else 1."""
        chosen = [stride if n >= SMALLEST_MAP * stride else 1 for n in self.size]
        self.size = [math.ceil(n / s) for n, s in zip(self.size, chosen, strict=True)]
        return chosen[0], chosen[1]

    def kernel(self, kernel: int) -> tuple[int, int]:
        """``kernel`` on each axis, but 1 where there is nothing beside a value."""
        return (kernel if self.size[0] > 1 else 1, kernel if self.size[1] > 1 else 1)


def channels(count: float) -> int:
    """The nearest multiple of 8, at least 8: what integer kernels work in."""
    return max(8, 8 * round(count / 8))


def activation(swish: bool) -> nn.Module:
    return nn.Hardswish() if swish else nn.ReLU()


def convolution(
    inputs: int, outputs: int, maps: Maps, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    sides = maps.kernel(kernel)
    padding = (sides[0] // 2, sides[1] // 2)
    return [
        nn.Conv2d(inputs, outputs, sides, maps.halve(stride), padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
