"""Networks for phones: depthwise convolutions, squeeze-excite, channel shuffles."""

from __future__ import annotations

import torch
from torch import nn

from zoo_models import model
from zoo_models.layers import Activation, Function, Residual, SqueezeExcite, conv_bn, head


def separable(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        conv_bn(inputs, inputs, kernel, stride, groups=inputs), conv_bn(inputs, outputs, 1)
    )


def inverted(
    inputs: int,
    outputs: int,
    stride: int = 1,
    *,
    expand: float = 6,
    kernel: int = 3,
    act: Activation = nn.ReLU6,
    squeeze: Activation | None = None,
) -> nn.Module:
    """Inverted residual: expand, filter by depth, project. ``squeeze`` is the gate of an SE layer."""
    hidden = int(inputs * expand)
    layers = [conv_bn(inputs, hidden, 1, act=act)] if hidden != inputs else []
    layers.append(conv_bn(hidden, hidden, kernel, stride, groups=hidden, act=act))
    if squeeze:
        layers.append(SqueezeExcite(hidden, gate=squeeze))
    body = nn.Sequential(*layers, conv_bn(hidden, outputs, 1, act=None))
    return Residual(body) if stride == 1 and inputs == outputs else body


@model(image=(3, 64, 64))
def mobilenet_v1() -> nn.Module:
    layers = [conv_bn(3, 16, stride=2)]
    for inputs, outputs, stride in [(16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]:  # fmt: skip
        layers.append(separable(inputs, outputs, stride))
    return nn.Sequential(*layers, head(128))


def _mobilenet_v2_features() -> nn.Sequential:
    layers: list[nn.Module] = [conv_bn(3, 16, stride=2, act=nn.ReLU6), inverted(16, 8, expand=1)]
    for inputs, outputs, stride in [(8, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 1), (32, 40, 2), (40, 40, 1)]:  # fmt: skip
        layers.append(inverted(inputs, outputs, stride))
    return nn.Sequential(*layers, conv_bn(40, 160, 1, act=nn.ReLU6))


@model(image=(3, 64, 64))
def mobilenet_v2() -> nn.Module:
    return nn.Sequential(_mobilenet_v2_features(), head(160))


@model(image=(3, 64, 64))
def mobilenet_v2_mean() -> nn.Module:
    """As torchvision's older code has it: the pool is a mean over two axes."""
    return nn.Sequential(_mobilenet_v2_features(), Function(lambda x: x.mean([2, 3])), nn.Linear(160, 10))  # fmt: skip


def _mobilenet_v3(rows: list[tuple[int, int, int, int, bool, Activation]], last: int) -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 16, stride=2, act=nn.Hardswish)]
    inputs = 16
    for kernel, expand, outputs, stride, squeeze, act in rows:
        layers.append(inverted(inputs, outputs, stride, expand=expand, kernel=kernel, act=act, squeeze=nn.Hardsigmoid if squeeze else None))  # fmt: skip
        inputs = outputs
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(last, last), nn.Hardswish(), nn.Linear(last, 10))  # fmt: skip
    return nn.Sequential(*layers, conv_bn(inputs, last, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), classifier)  # fmt: skip


@model(image=(3, 64, 64))
def mobilenet_v3_small() -> nn.Module:
    r, h = nn.ReLU, nn.Hardswish
    return _mobilenet_v3([(3, 1, 16, 2, True, r), (3, 4, 24, 2, False, r), (3, 3, 24, 1, False, r), (5, 4, 40, 2, True, h), (5, 6, 40, 1, True, h)], 96)  # fmt: skip


@model(image=(3, 64, 64))
def mobilenet_v3_large() -> nn.Module:
    r, h = nn.ReLU, nn.Hardswish
    rows = [(3, 1, 16, 1, False, r), (3, 4, 24, 2, False, r), (5, 3, 40, 2, True, r), (5, 3, 40, 1, True, r),
            (3, 6, 48, 2, False, h), (3, 2, 48, 1, False, h), (3, 6, 56, 1, True, h), (5, 6, 64, 1, True, h)]  # fmt: skip
    return _mobilenet_v3(rows, 128)


@model(image=(3, 64, 64))
def mobilenet_v3_flatten() -> nn.Module:
    """No global pool: the classifier reads a flattened (C, H, W) map, whose order NHWC changes."""
    return nn.Sequential(
        conv_bn(3, 16, stride=2, act=nn.Hardswish), conv_bn(16, 16, 3, 2, groups=16), SqueezeExcite(16, gate=nn.Hardsigmoid),
        conv_bn(16, 32, 5, 2, act=nn.Hardswish), nn.Flatten(), nn.Linear(32 * 8 * 8, 10),
    )  # fmt: skip


def _efficientnet(act: Activation, squeeze: Activation | None) -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 16, stride=2, act=act)]
    rows = [(3, 1, 8, 1), (3, 6, 16, 2), (3, 6, 16, 1), (5, 6, 24, 2), (3, 6, 40, 2), (5, 6, 56, 1), (5, 6, 56, 1)]  # fmt: skip
    inputs = 16
    for kernel, expand, outputs, stride in rows:
        layers.append(inverted(inputs, outputs, stride, expand=expand, kernel=kernel, act=act, squeeze=squeeze))  # fmt: skip
        inputs = outputs
    return nn.Sequential(*layers, conv_bn(inputs, 128, 1, act=act), head(128))


@model(image=(3, 64, 64))
def efficientnet_b0() -> nn.Module:
    return _efficientnet(nn.SiLU, nn.Sigmoid)


@model(image=(3, 64, 64))
def efficientnet_lite() -> nn.Module:
    return _efficientnet(nn.ReLU6, None)


@model(image=(3, 64, 64))
def mnasnet() -> nn.Module:
    rows = [(3, 3, 16, 2), (3, 3, 16, 1), (5, 3, 24, 2), (5, 3, 24, 1), (5, 6, 40, 2), (3, 6, 48, 1)]  # fmt: skip
    layers: list[nn.Module] = [conv_bn(3, 16, stride=2), conv_bn(16, 16, groups=16), conv_bn(16, 8, 1, act=None)]  # fmt: skip
    inputs = 8
    for kernel, expand, outputs, stride in rows:
        layers.append(inverted(inputs, outputs, stride, expand=expand, kernel=kernel, act=nn.ReLU))
        inputs = outputs
    return nn.Sequential(*layers, conv_bn(inputs, 128, 1), head(128))


class Ghost(nn.Module):
    """Half of the channels are cheap filters of the other half, arXiv 1911.11907."""

    def __init__(self, inputs: int, outputs: int, act: Activation | None = nn.ReLU) -> None:
        super().__init__()
        self.primary = conv_bn(inputs, outputs // 2, 1, act=act)
        self.cheap = conv_bn(outputs // 2, outputs // 2, 3, groups=outputs // 2, act=act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)


@model(image=(3, 64, 64))
def ghostnet() -> nn.Module:
    def bottleneck(inputs: int, hidden: int, outputs: int, stride: int) -> nn.Module:
        middle = [conv_bn(hidden, hidden, 3, stride, groups=hidden, act=None)] if stride > 1 else []
        body = nn.Sequential(Ghost(inputs, hidden), *middle, SqueezeExcite(hidden, gate=nn.Hardsigmoid), Ghost(hidden, outputs, None))  # fmt: skip
        if stride == 1 and inputs == outputs:
            return Residual(body)
        shortcut = nn.Sequential(conv_bn(inputs, inputs, 3, stride, groups=inputs, act=None), conv_bn(inputs, outputs, 1, act=None))  # fmt: skip
        return Residual(body, shortcut=shortcut)

    return nn.Sequential(
        conv_bn(3, 16, stride=2), bottleneck(16, 48, 24, 2), bottleneck(24, 72, 24, 1),
        bottleneck(24, 72, 40, 2), bottleneck(40, 120, 40, 1), conv_bn(40, 128, 1), head(128),
    )  # fmt: skip


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel shuffle: (N, g k, H, W) read as (N, g, k, H, W) and written as (N, k, g, H, W)."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnitV1(nn.Module):
    """arXiv 1707.01083: grouped 1x1, shuffle, depthwise, grouped 1x1; stride 2 concatenates."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 4) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        made = outputs - inputs if stride == 2 else outputs
        self.squeeze = conv_bn(inputs, outputs // 4, 1, groups=groups)
        self.depthwise = conv_bn(outputs // 4, outputs // 4, 3, stride, groups=outputs // 4, act=None)  # fmt: skip
        self.expand = conv_bn(outputs // 4, made, 1, groups=groups, act=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(self.depthwise(shuffle(self.squeeze(x), self.groups)))
        if self.stride == 1:
            return torch.relu(x + y)
        return torch.relu(torch.cat([nn.functional.avg_pool2d(x, 3, 2, 1), y], dim=1))


@model(image=(3, 64, 64))
def shufflenet_v1() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, stride=2), ShuffleUnitV1(16, 64, 2), ShuffleUnitV1(64, 64, 1),
        ShuffleUnitV1(64, 128, 2), ShuffleUnitV1(128, 128, 1), head(128),
    )  # fmt: skip


class ShuffleUnitV2(nn.Module):
    """arXiv 1807.11164: half of the channels pass, the halves are shuffled."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        inside = channels if stride == 2 else channels // 2
        self.right = nn.Sequential(
            conv_bn(inside, inside, 1), conv_bn(inside, inside, 3, stride, groups=inside, act=None), conv_bn(inside, inside, 1),
        )  # fmt: skip
        self.left = (
            nn.Sequential(conv_bn(inside, inside, 3, 2, groups=inside, act=None), conv_bn(inside, inside, 1))
            if stride == 2 else nn.Identity()
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        return shuffle(torch.cat([self.left(left), self.right(right)], dim=1), 2)


@model(image=(3, 64, 64))
def shufflenet_v2() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 24, stride=2), ShuffleUnitV2(24, 2), ShuffleUnitV2(48, 1), ShuffleUnitV2(48, 1),
        ShuffleUnitV2(48, 2), ShuffleUnitV2(96, 1), conv_bn(96, 128, 1), head(128),
    )  # fmt: skip


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.one(x)), torch.relu(self.three(x))], dim=1)


@model(image=(3, 64, 64))
def squeezenet() -> nn.Module:
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), pool, Fire(32, 8, 32), Fire(64, 8, 32), pool,
        Fire(64, 16, 48), Fire(96, 16, 48), nn.Conv2d(96, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@model(image=(3, 64, 64))
def fbnet() -> nn.Module:
    """arXiv 1812.03443: blocks of differing kernel and expansion; grouped 1x1 with a shuffle."""
    return nn.Sequential(
        conv_bn(3, 16, stride=2), inverted(16, 16, expand=1, act=nn.ReLU), inverted(16, 24, 2, kernel=5, act=nn.ReLU),
        inverted(24, 24, expand=3, act=nn.ReLU), conv_bn(24, 48, 1, groups=2), Function(lambda x: shuffle(x, 2)),
        conv_bn(48, 48, 5, 2, groups=48), conv_bn(48, 32, 1, groups=2, act=None), inverted(32, 32, kernel=5, expand=3, act=nn.ReLU),
        conv_bn(32, 96, 1), head(96),
    )  # fmt: skip


@model(image=(1, 48, 48))
def mcunet() -> nn.Module:
    """For microcontrollers: a 7x7 depthwise kernel, one channel in, tiny."""
    return nn.Sequential(
        conv_bn(1, 8, stride=2, act=nn.ReLU6), inverted(8, 8, expand=1), inverted(8, 16, 2, expand=3, kernel=7),
        inverted(16, 16, expand=4, kernel=5), inverted(16, 24, 2, expand=5), head(24, 2),
    )  # fmt: skip
