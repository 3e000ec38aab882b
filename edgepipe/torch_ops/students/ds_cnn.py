"""DS-CNN (Zhang et al. 2017, "Hello Edge", section 4): keyword spotting, and any other small input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

LONGEST_MAP = 25  # 49 frames, halved once by the first convolution, as in the paper


def build(
    *,
    width: float = 1.0,
    num_classes: int = 12,
    in_channels: int = 1,
    size: Sequence[int] = (49, 10),
    blocks: int = 4,
) -> nn.Module:
    """64 channels (times ``width``) throughout, ``blocks`` depthwise separable convolutions."""
    return DsCnn(width, num_classes, in_channels, size, blocks)


class DsCnn(nn.Module):
    """(N, C, H, W) or (N, C, L) float32 -> (N, num_classes) class scores."""

    def __init__(
        self, width: float, num_classes: int, in_channels: int, size: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        count = max(8, 8 * round(64 * width / 8))
        self.size = [size[0], size[1] if len(size) > 1 else 1]
        # a long axis, like time, is looked at through a long window
        kernel = tuple(9 if n >= 40 else 3 if n > 1 else 1 for n in self.size)
        layers = self.convolution(in_channels, count, kernel, shortest=4)
        for _ in range(blocks):
            kernel = tuple(3 if n > 1 else 1 for n in self.size)
            layers += self.convolution(count, count, kernel, LONGEST_MAP + 1, groups=count)
            layers += self.convolution(count, count, (1, 1))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(count, num_classes)

    def convolution(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        shortest: float = math.inf,
        groups: int = 1,
    ) -> list[nn.Module]:
        """Batch norm and ReLU behind it; axes of ``shortest`` values or more are halved."""
        stride = tuple(2 if n >= shortest else 1 for n in self.size)
        self.size = [math.ceil(n / s) for n, s in zip(self.size, stride, strict=True)]
        padding = (kernel[0] // 2, kernel[1] // 2)
        return [
            nn.Conv2d(
                inputs, outputs, (kernel[0], kernel[1]), (stride[0], stride[1]), padding,
                groups=groups, bias=False,
            ),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(3)  # (N, C, L) -> (N, C, L, 1)
        return self.head(self.features(x).mean((2, 3)))
