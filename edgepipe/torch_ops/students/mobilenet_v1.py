"""MobileNetV1 (Howard et al. 2017, table 1): depthwise separable convolutions in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

SMALLEST_MAP = 3  # no stride that would leave fewer values on an axis, as 96 / 2**5


def build(
    *,
    width: float = 0.25,
    num_classes: int = 10,
    in_channels: int = 3,
    size: Sequence[int] = (96, 96),
    blocks: int = 5,
) -> nn.Module:
    """``blocks`` of 512 channels (times ``width``) stand in the middle."""
    return MobileNetV1(width, num_classes, in_channels, size, blocks)


class MobileNetV1(nn.Module):
    """(N, C, H, W) or (N, C, L) float32 -> (N, num_classes) class scores."""

    def __init__(
        self, width: float, num_classes: int, in_channels: int, size: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        maps = Maps(size)
        narrow = channels(32 * width)
        layers = [convolution(in_channels, narrow, maps, stride=2)]
        plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
        plan += [(512, 1)] * blocks + [(1024, 2), (1024, 1)]
        for count, stride in plan:
            wide = channels(count * width)
            layers.append(convolution(narrow, narrow, maps, stride=stride, groups=narrow))
            layers.append(convolution(narrow, wide, maps, kernel=1))
            narrow = wide
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(narrow, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(3)  # (N, C, L) -> (N, C, L, 1)
        return self.head(self.features(x).mean((2, 3)))


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
    inputs: int, outputs: int, maps: Maps, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    sides = maps.kernel(kernel)
    padding = (sides[0] // 2, sides[1] // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, sides, maps.halve(stride), padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )
