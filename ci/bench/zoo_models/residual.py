"""Residual and dense networks, and what attends to their channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import model
from zoo_models.layers import Residual, SqueezeExcite, conv_bn, head


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    return conv_bn(inputs, outputs, 1, stride, act=None) if stride > 1 or inputs != outputs else None  # fmt: skip


def basic(inputs: int, outputs: int, stride: int = 1, *extra: nn.Module) -> nn.Module:
    body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, act=None), *extra)  # fmt: skip
    return Residual(body, shortcut=shortcut(inputs, outputs, stride), act=nn.ReLU)


def bottleneck(inputs: int, width: int, stride: int = 1, groups: int = 1, expand: int = 4, *extra: nn.Module) -> nn.Module:  # fmt: skip
    outputs = width * expand
    body = nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride, groups=groups), conv_bn(width, outputs, 1, act=None), *extra)  # fmt: skip
    return Residual(body, shortcut=shortcut(inputs, outputs, stride), act=nn.ReLU)


@model(image=(3, 32, 32))
def resnet8() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), basic(16, 16), basic(16, 32, 2), basic(32, 64, 2), head(64))  # fmt: skip


@model(image=(3, 64, 64))
def resnet18() -> nn.Module:
    rows = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1)]  # fmt: skip
    return nn.Sequential(conv_bn(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1), *(basic(*row) for row in rows), head(96))  # fmt: skip


@model(image=(3, 64, 64))
def resnet50() -> nn.Module:
    rows = [(16, 8, 1), (32, 8, 1), (32, 16, 2), (64, 16, 1), (64, 24, 2), (96, 24, 1)]
    return nn.Sequential(conv_bn(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1), *(bottleneck(*row) for row in rows), head(96))  # fmt: skip


@model(image=(3, 64, 64))
def resnext() -> nn.Module:
    rows = [(16, 16, 1, 4, 2), (32, 32, 2, 8, 2), (64, 32, 1, 8, 2)]
    return nn.Sequential(conv_bn(3, 16, stride=2), *(bottleneck(*row) for row in rows), head(64))


@model(image=(3, 32, 32))
def wide_resnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), basic(16, 64), basic(64, 96, 2), basic(96, 96), head(96))


class PreActivation(nn.Module):
    """Batch norm and ReLU before each convolution, arXiv 1603.05027: neither folds into one before it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))  # fmt: skip
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(x))
        return (self.shortcut(y) if self.shortcut is not None else x) + self.second(self.first(y))


@model(image=(3, 32, 32))
def preact_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), PreActivation(16, 16), PreActivation(16, 32, 2), PreActivation(32, 32),
        PreActivation(32, 64, 2), nn.BatchNorm2d(64), nn.ReLU(), head(64),
    )  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.body(x)], dim=1)


@model(image=(3, 32, 32))
def densenet() -> nn.Module:
    def transition(inputs: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, inputs // 2, 1, bias=False), nn.AvgPool2d(2)]  # fmt: skip

    first = [DenseLayer(16 + 8 * i, 8) for i in range(4)]
    second = [DenseLayer(24 + 8 * i, 8) for i in range(4)]
    return nn.Sequential(conv_bn(3, 16), *first, *transition(48), *second, nn.BatchNorm2d(56), nn.ReLU(), head(56))  # fmt: skip


@model(image=(3, 64, 64))
def se_resnet() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, stride=2), basic(16, 16, 1, SqueezeExcite(16)), basic(16, 32, 2, SqueezeExcite(32)),
        basic(32, 64, 2, SqueezeExcite(64)), head(64),
    )  # fmt: skip


class Cbam(nn.Module):
    """Attention to channels (mean and maximum through one MLP), then to places, arXiv 1807.06521."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, channels))  # fmt: skip
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.shared(x.mean((2, 3))) + self.shared(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        places = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.place(places))


@model(image=(3, 64, 64))
def cbam_resnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16, stride=2), basic(16, 16, 1, Cbam(16)), basic(16, 32, 2, Cbam(32)), head(32))  # fmt: skip


class Eca(nn.Module):
    """A 1-D convolution over the channels' means, arXiv 1910.03151."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (N, C, 1, 1) -> (N, 1, C) -> (N, C, 1, 1)
        pooled = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        return x * torch.sigmoid(self.conv(pooled).transpose(-1, -2).unsqueeze(-1)).expand_as(x)


@model(image=(3, 64, 64))
def eca_resnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16, stride=2), basic(16, 16, 1, Eca()), basic(16, 32, 2, Eca()), head(32))  # fmt: skip


@model(image=(3, 64, 64))
def regnet_y() -> nn.Module:
    rows = [(16, 24, 2, 3), (24, 24, 1, 3), (24, 56, 2, 7), (56, 56, 1, 7), (56, 104, 2, 13)]
    blocks = []
    for inputs, width, stride, groups in rows:
        body = nn.Sequential(
            conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride, groups=groups), SqueezeExcite(width), conv_bn(width, width, 1, act=None),
        )  # fmt: skip
        blocks.append(Residual(body, shortcut=shortcut(inputs, width, stride), act=nn.ReLU))
    return nn.Sequential(conv_bn(3, 16, stride=2), *blocks, head(104))


class Res2Block(nn.Module):
    """Channels in four parts, each filtered after adding the one before it, arXiv 1904.01169."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(conv_bn(channels // 4, channels // 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = torch.split(x, x.shape[1] // 4, dim=1)
        made = [first]
        for part, conv in zip(rest, self.parts, strict=True):
            made.append(conv(part + made[-1] if len(made) > 1 else part))
        return x + torch.cat(made, dim=1)


@model(image=(3, 64, 64))
def res2net() -> nn.Module:
    return nn.Sequential(conv_bn(3, 32, stride=2), Res2Block(32), conv_bn(32, 64, 3, 2), Res2Block(64), head(64))  # fmt: skip


class SelectiveKernel(nn.Module):
    """Two branches weighed by a softmax over them, arXiv 1903.06586."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.small = conv_bn(channels, channels, 3)
        self.large = conv_bn(channels, channels, 3, dilation=2)
        self.choose = nn.Linear(channels, 2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([self.small(x), self.large(x)], dim=1)  # (N, 2, C, H, W)
        pooled = F.adaptive_avg_pool2d(both.sum(1), 1).flatten(1)
        weight = torch.softmax(self.choose(pooled).view(len(x), 2, -1), dim=1)
        return (both * weight[..., None, None]).sum(1)


@model(image=(3, 48, 48))
def selective_kernel_net() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16, stride=2), SelectiveKernel(16), conv_bn(16, 32, 3, 2), SelectiveKernel(32), head(32))  # fmt: skip
