"""MobileNetV2 (Sandler et al. 2018, table 2): inverted residuals with linear bottlenecks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

SMALLEST_MAP = 3  # no stride that would leave fewer values on an axis, as 96 / 2**5

# (expansion, channels, repeats, stride)
PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip


def build(
    *,
    width: float = 0.35,
    num_classes: int = 10,
    in_channels: int = 3,
    size: Sequence[int] = (96, 96),
) -> nn.Module:
    return MobileNetV2(width, num_classes, in_channels, size)


class MobileNetV2(nn.Module):
    """(N, C, H, W) or (N, C, L) float32 -> (N, num_classes) class scores."""

    def __init__(
        self, width: float, num_classes: int, in_channels: int, size: Sequence[int]
    ) -> None:
        super().__init__()
        maps = Maps(size)
        narrow = channels(32 * width)
        layers: list[nn.Module] = [convolution(in_channels, narrow, maps, stride=2)]
        for expansion, count, repeats, stride in PLAN:
            for number in range(repeats):
                wide = channels(count * width)
                step = stride if number == 0 else 1
                layers.append(InvertedResidual(narrow, wide, expansion, maps, step))
                narrow = wide
        wide = channels(1280 * width)
        layers.append(convolution(narrow, wide, maps, kernel=1))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(wide, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(3)  # (N, C, L) -> (N, C, L, 1)
        return self.head(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; what came in is added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, maps: Maps, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        layers = []
        if expansion > 1:
            layers.append(convolution(inputs, inner, maps, kernel=1))
        before = list(maps.size)
        layers.append(convolution(inner, inner, maps, stride=stride, groups=inner))
        layers.append(convolution(inner, outputs, maps, kernel=1, linear=True))
        self.body = nn.Sequential(*layers)
        self.is_residual = inputs == outputs and before == maps.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)


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


def convolution(
    inputs: int, outputs: int, maps: Maps, *, kernel: int = 3, stride: int = 1, groups: int = 1,
    linear: bool = False,
) -> nn.Sequential:  # fmt: skip
    sides = maps.kernel(kernel)
    padding = (sides[0] // 2, sides[1] // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, sides, maps.halve(stride), padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers if linear else [*layers, nn.ReLU6()])
