"""ResNet for small pictures (He et al. 2016, section 4.2): ResNet-8 (MLPerf Tiny) to ResNet-20."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


def build(
    *,
    width: float = 1.0,
    num_classes: int = 10,
    in_channels: int = 3,
    size: Sequence[int] = (32, 32),
    blocks: int = 1,
) -> nn.Module:
    """Three stages of ``blocks`` blocks, with 6 * blocks + 2 layers: 1 is ResNet-8, 3 is ResNet-20."""
    return ResNet(width, num_classes, in_channels, size, blocks)


class ResNet(nn.Module):
    """(N, C, H, W) or (N, C, L) float32 -> (N, num_classes) class scores."""

    def __init__(
        self, width: float, num_classes: int, in_channels: int, size: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        height, length = size[0], size[1] if len(size) > 1 else 1
        counts = [max(8, 8 * round(n * width / 8)) for n in (16, 32, 64)]
        # the stages halve twice; of what is larger than 47 the first convolution takes the rest
        first = [_first_stride(height), _first_stride(length)]
        self.stem = _convolution(in_channels, counts[0], first, [2 * s - 1 if s > 1 else 3 for s in first], (height, length))  # fmt: skip
        shape = [math.ceil(height / first[0]), math.ceil(length / first[1])]
        stages: list[nn.Module] = []
        inputs = counts[0]
        for number, outputs in enumerate(counts):
            for block in range(blocks):
                halved = number > 0 and block == 0
                stride = [2 if halved and n > 4 else 1 for n in shape]
                stages.append(Block(inputs, outputs, stride, shape))
                shape = [math.ceil(n / s) for n, s in zip(shape, stride, strict=True)]
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(3)  # (N, C, L) -> (N, C, L, 1)
        return self.head(self.stages(functional.relu(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions and a way round them, of 1x1 where the shape changes (option B)."""

    def __init__(
        self, inputs: int, outputs: int, stride: Sequence[int], shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride, (3, 3), shape)
        self.second = _convolution(outputs, outputs, (1, 1), (3, 3), shape)
        changed = inputs != outputs or max(stride) > 1
        self.way_round = _convolution(inputs, outputs, stride, (1, 1), shape) if changed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + (x if self.way_round is None else self.way_round(x)))


def _first_stride(size: int) -> int:
    """1 for up to 47 values (32 -> 32), 2 for up to 95, 4 for more (96 -> 24)."""
    return 1 if size < 48 else 2 if size < 96 else 4


def _convolution(
    inputs: int, outputs: int, stride: Sequence[int], kernel: Sequence[int], shape: Sequence[int]
) -> nn.Sequential:
    # an axis of one value has no neighbours to look at
    sides = [k if n > 1 else 1 for k, n in zip(kernel, shape, strict=True)]
    padding = (sides[0] // 2, sides[1] // 2)
    return nn.Sequential(
        nn.Conv2d(
            inputs, outputs, (sides[0], sides[1]), (stride[0], stride[1]), padding, bias=False
        ),
        nn.BatchNorm2d(outputs),
    )
