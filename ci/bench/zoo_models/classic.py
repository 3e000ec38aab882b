"""Plain networks of the years before residuals, and those that came back to them."""

from __future__ import annotations

import torch
from torch import nn

from zoo_models import model
from zoo_models.layers import Parallel, conv_bn, head


@model(image=(1, 28, 28))
def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


@model(image=(3, 63, 63))
def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 11, 4, 2), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2), nn.Conv2d(24, 48, 5, padding=2, groups=2),
        nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(64 * 3 * 3, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10),
    )  # fmt: skip


@model(image=(3, 32, 32))
def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (16, 16, 0, 32, 32, 0, 64, 64, 0):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()] if outputs else [nn.MaxPool2d(2)]  # fmt: skip
        inputs = outputs or inputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))  # fmt: skip


@model(image=(3, 32, 32))
def network_in_network() -> nn.Module:
    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(outputs, outputs, 1), nn.ReLU()]  # fmt: skip

    return nn.Sequential(
        *block(3, 32, 5), nn.MaxPool2d(3, 2, 1), *block(32, 48, 5), nn.AvgPool2d(3, 2, 1), *block(48, 10, 3), nn.AvgPool2d(8), nn.Flatten(),
    )  # fmt: skip


@model(image=(3, 64, 64))
def inception() -> nn.Module:
    """Branches of 1x1, 3x3, factorised 5x5 (1x5 and 5x1) and a pool, arXiv 1512.00567."""

    def block(inputs: int, width: int) -> nn.Module:
        long = nn.Sequential(nn.Conv2d(inputs, width, (1, 5), padding=(0, 2)), nn.Conv2d(width, width, (5, 1), padding=(2, 0)), nn.ReLU())  # fmt: skip
        pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv_bn(inputs, width, 1))  # fmt: skip
        return Parallel(conv_bn(inputs, width, 1), nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, width)), long, pooled)  # fmt: skip

    reduce = Parallel(conv_bn(64, 32, 3, 2), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(conv_bn(3, 16, stride=2), block(16, 16), reduce, block(96, 16), head(64))


class RepVggBlock(nn.Module):
    """The form that is trained: 3x3, 1x1 and identity, each with batch norm, arXiv 2101.03697."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.three = conv_bn(inputs, outputs, 3, stride, act=None)
        self.one = conv_bn(inputs, outputs, 1, stride, act=None)
        self.identity = nn.BatchNorm2d(inputs) if stride == 1 and inputs == outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.three(x) + self.one(x)
        return torch.relu(y + self.identity(x) if self.identity is not None else y)


@model(image=(3, 64, 64))
def repvgg() -> nn.Module:
    return nn.Sequential(
        RepVggBlock(3, 16, 2), RepVggBlock(16, 16, 1), RepVggBlock(16, 32, 2), RepVggBlock(32, 32, 1), RepVggBlock(32, 64, 2), head(64),
    )  # fmt: skip
