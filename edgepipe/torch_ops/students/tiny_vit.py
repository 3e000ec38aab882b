"""A small vision transformer that int8 does not hurt, shaped after LeViT (Graham et al. 2021).

Projections are 1x1 convolutions with batch norm, which the converter folds, where a ViT has linear
layers behind layer norms; a few strided convolutions make the patches. Where a patch lies is told by
a depthwise convolution (Chu et al. 2021, "Conditional positional encodings"), so any size will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

MOST_PATCHES = 64
HEAD_CHANNELS = 16


def build(
    *,
    width: float = 1.0,
    num_classes: int = 10,
    in_channels: int = 3,
    size: Sequence[int] = (96, 96),
    blocks: int = 4,
) -> nn.Module:
    """64 channels (times ``width``, in heads of 16), ``blocks`` of attention and of two layers."""
    return TinyViT(width, num_classes, in_channels, size, blocks)


class TinyViT(nn.Module):
    """(N, C, H, W) or (N, C, L) float32 -> (N, num_classes) class scores."""

    def __init__(
        self, width: float, num_classes: int, in_channels: int, size: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        count = HEAD_CHANNELS * max(1, round(64 * width / HEAD_CHANNELS))
        shape = [size[0], size[1] if len(size) > 1 else 1]
        halvings = 0
        while math.prod(math.ceil(n / 2**halvings) for n in shape) > MOST_PATCHES:
            halvings += 1
        layers: list[nn.Module] = []
        inputs = in_channels
        for left in reversed(range(max(1, halvings))):
            outputs = max(8, count // 2**left)
            stride = [2 if n > 1 and halvings else 1 for n in shape]
            kernel = [3 if n > 1 else 1 for n in shape]
            layers += [*_convolution(inputs, outputs, kernel, stride), nn.ReLU()]
            shape = [math.ceil(n / s) for n, s in zip(shape, stride, strict=True)]
            inputs = outputs
        self.patches = nn.Sequential(*layers)
        kernel = [3 if n > 1 else 1 for n in shape]
        self.place = nn.Sequential(*_convolution(count, count, kernel, groups=count))
        self.blocks = nn.ModuleList(
            m for _ in range(blocks) for m in (Attention(count), _two_layers(count))
        )
        self.head = nn.Linear(count, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(3)  # (N, C, L) -> (N, C, L, 1)
        x = self.patches(x)
        x = x + self.place(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Every patch looks at all patches: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.heads = count // HEAD_CHANNELS
        self.query, self.key, self.value = (
            nn.Sequential(*_convolution(count, count, (1, 1))) for _ in range(3)
        )
        self.project = nn.Sequential(nn.ReLU(), *_convolution(count, count, (1, 1)))
        # the division by sqrt(d) of the attention begins as the scale of the queries
        nn.init.constant_(self.query[1].weight, HEAD_CHANNELS**-0.5)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # tokens with channels last, as TFLite keeps maps anyway: (N, C, H, W) -> (N, heads, patches, C / heads)
        query, key, value = (
            layer(x)
            .permute(0, 2, 3, 1)
            .flatten(1, 2)
            .unflatten(2, (self.heads, HEAD_CHANNELS))
            .transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(2, 3), dim=-1)  # (N, heads, patches, patches)
        seen = (weights @ value).transpose(1, 2).flatten(2)  # (N, patches, C)
        return self.project(seen.unflatten(1, tuple(x.shape[2:])).permute(0, 3, 1, 2))


def _two_layers(count: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(count, 2 * count, (1, 1)), nn.ReLU(), *_convolution(2 * count, count, (1, 1))
    )


def _convolution(
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    groups: int = 1,
) -> list[nn.Module]:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return [
        nn.Conv2d(
            inputs, outputs, (kernel[0], kernel[1]), (stride[0], stride[1]), padding,
            groups=groups, bias=False,
        ),
        nn.BatchNorm2d(outputs),
    ]  # fmt: skip
