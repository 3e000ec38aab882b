"""Small networks around one thing that converters get wrong: padding, norms, activations, shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import model
from zoo_models.layers import Activation, Function, conv_bn, head


def _activated(act: Activation) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, stride=2, act=act), conv_bn(16, 16, groups=16, act=act), conv_bn(16, 24, 1, act=None), act(), head(24),
    )  # fmt: skip


@model(image=(3, 32, 32))
def leaky_relu_net() -> nn.Module:
    return _activated(lambda: nn.LeakyReLU(0.1))


@model(image=(3, 32, 32))
def silu_net() -> nn.Module:
    return _activated(nn.SiLU)


@model(image=(3, 32, 32))
def gelu_net() -> nn.Module:
    return _activated(nn.GELU)


@model(image=(3, 32, 32))
def gelu_tanh_net() -> nn.Module:
    return _activated(lambda: nn.GELU(approximate="tanh"))


@model(image=(3, 32, 32))
def mish_net() -> nn.Module:
    return _activated(nn.Mish)


@model(image=(3, 32, 32))
def elu_net() -> nn.Module:
    return _activated(lambda: nn.ELU(0.7))


@model(image=(3, 32, 32))
def prelu_net() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, stride=2, act=None), nn.PReLU(16), conv_bn(16, 24, act=None), nn.PReLU(), head(24),
    )  # fmt: skip


@model(image=(3, 32, 32))
def group_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(3, 24), nn.SiLU(), head(24),
    )  # fmt: skip


@model(image=(3, 32, 32))
def instance_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.InstanceNorm2d(24, affine=True), nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    )  # fmt: skip


@model(image=(3, 16, 16))
def layer_norm_net() -> nn.Module:
    """Layer norm over (C, H, W) of a map, with a gain for each place."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm((8, 16, 16)), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), nn.Linear(512, 10))  # fmt: skip


@model(image=(3, 20, 26))
def pad_modes() -> nn.Module:
    """Reflect, replicate and a constant that is not zero, on a picture that is not square."""
    return nn.Sequential(
        nn.ReflectionPad2d((1, 2, 3, 0)), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ReplicationPad2d((2, 0, 1, 1)), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.ConstantPad2d((1, 1, 0, 2), 0.5), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


@model(image=(3, 31, 33))
def asymmetric_padding() -> nn.Module:
    """TensorFlow's SAME as people write it, zeros on one side; pools with odd sizes and ceil."""
    return nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 12, (3, 5), 1, (1, 2)), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(12, 16, 2, padding=1), nn.ReLU(), nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(16, 4, 3, (2, 1), (2, 0)),
    )  # fmt: skip


@model(image=(3, 32, 32))
def grouped_convolutions() -> nn.Module:
    """Groups that are neither 1 nor all; a depthwise layer that doubles its channels; dilated groups."""
    return nn.Sequential(
        conv_bn(3, 12, stride=2), conv_bn(12, 24, groups=3), conv_bn(24, 48, groups=24), conv_bn(48, 24, dilation=2, groups=4),
        nn.ConvTranspose2d(24, 8, 2, 2, groups=2), nn.ReLU(), head(8),
    )  # fmt: skip


class StridedSlices(nn.Module):
    """YOLOv5's focus layer, a flip, a step along channels, negative indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(12, 16), conv_bn(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)  # fmt: skip
        x = self.first(x).flip(3)
        x = self.second(x[:, ::2, 1:-1, -9:])
        return self.head(x[:, :, -1, 2])


@model(image=(3, 32, 32))
def strided_slices() -> nn.Module:
    return StridedSlices()


class SqueezedDimensions(nn.Module):
    """Axes that come and go between 2-D and 1-D convolutions, and a swap of height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = conv_bn(1, 8, 3, 1)
        self.tall = nn.Conv2d(8, 16, (16, 1))
        self.line = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.tall(self.plane(x.unsqueeze(1)).transpose(2, 3).transpose(2, 3)).squeeze(2)
        y = F.relu(self.line(y)).unsqueeze(-1)
        return self.head(y.amax((2, 3)))


@model(spectrogram=(16, 24))
def squeezed_dimensions() -> nn.Module:
    return SqueezedDimensions()


class Siamese(nn.Module):
    """One network for two inputs of one shape, which a swap would not show were it not asymmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(conv_bn(3, 12, stride=2), conv_bn(12, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        self.head = nn.Linear(48, 2)

    def forward(self, anchor: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        a, b = self.embed(anchor), self.embed(candidate)
        return self.head(torch.cat([torch.abs(a - b), a * b, a], dim=1))


@model(anchor=(3, 32, 32), candidate=(3, 32, 32))
def siamese() -> nn.Module:
    return Siamese()


class PictureAndNumbers(nn.Module):
    """Inputs of different ranks: a picture, a series and a vector that scales channels (FiLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.series = conv_bn(3, 16, stride=2), nn.Conv1d(4, 8, 3)
        self.gain, self.shift = nn.Linear(5, 16), nn.Linear(5, 16)
        self.head = nn.Linear(24, 3)

    def forward(self, image: torch.Tensor, series: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:  # fmt: skip
        y = self.picture(image)
        y = y * self.gain(numbers)[:, :, None, None] + self.shift(numbers)[:, :, None, None]
        return self.head(torch.cat([F.relu(y).mean((2, 3)), F.relu(self.series(series)).mean(2)], dim=1))  # fmt: skip


@model(image=(3, 24, 24), series=(4, 20), numbers=(5,))
def picture_and_numbers() -> nn.Module:
    return PictureAndNumbers()


class ManyOutputs(nn.Module):
    """Outputs of ranks 2, 3 and 4; two of one shape, which only their values tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(3, 16, stride=2)
        self.age, self.mood, self.mask = nn.Linear(16, 4), nn.Linear(16, 4), nn.Conv2d(16, 1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        pooled = y.mean((2, 3))
        return {"age": self.age(pooled), "mood": self.mood(pooled), "mask": self.mask(y), "row": y.amax(2)}  # fmt: skip


@model(image=(3, 32, 32))
def many_outputs() -> nn.Module:
    return ManyOutputs()


@model(clip=(3, 6, 24, 24))
def conv_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


@model(image=(3, 32, 32))
def adaptive_pools() -> nn.Module:
    """Average and maximum pools to sizes that do and do not divide the map."""
    return nn.Sequential(conv_bn(3, 12, stride=2), nn.AdaptiveMaxPool2d(8), conv_bn(12, 16), nn.AdaptiveAvgPool2d((4, 2)), nn.Flatten(), nn.Linear(128, 6))  # fmt: skip


@model(image=(3, 32, 32))
def odd_elementwise() -> nn.Module:
    """abs, exp, neg, where, clamp, rsqrt, minimum and a remainder of constants."""

    def mix(x: torch.Tensor) -> torch.Tensor:
        y = torch.where(x > 0.2, torch.exp(-x.abs()), x.neg().clamp(-0.5, 0.9))
        return torch.minimum(y, torch.rsqrt(x * x + 1.0)) + torch.log1p(x.abs()) * torch.sin(x)

    return nn.Sequential(conv_bn(3, 12, stride=2, act=None), Function(mix), conv_bn(12, 16), head(16))  # fmt: skip


class Flattened(nn.Module):
    """(C, H, W) flattened in three ways, where an order of axes that went wrong shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(2, 6, stride=2)
        self.first, self.second, self.third = (
            nn.Linear(6 * 4 * 6, 4),
            nn.Linear(24, 4),
            nn.Linear(6, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)  # (N, 6, 4, 6): channels and width are equal, so that a mix-up fits
        a = self.first(y.flatten(1))
        b = self.second(y.reshape(len(x), 6, 24)).mean(1)
        return a + b + self.third(y.permute(0, 3, 2, 1)).amax((1, 2))


@model(image=(2, 8, 12))
def ambiguous_flatten() -> nn.Module:
    return Flattened()


@model(image=(4, 4, 4))
def cube() -> nn.Module:
    """Channels, height and width all equal: no shape tells a layout."""
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Softmax(1), nn.Conv2d(4, 4, 1), Function(lambda x: x + x.mean(2, keepdim=True)))  # fmt: skip


@model(image=(3, 28, 28))
def cosine_head() -> nn.Module:
    """Angles to learned directions (ArcFace): two normalisations and a product, scaled."""

    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 12.0 * F.linear(F.normalize(x), F.normalize(self.weight))

    return nn.Sequential(conv_bn(3, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Cosine())


class OddResizes(nn.Module):
    """Sizes and scales that have no common factor, with and without antialiasing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.ends = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.stem(x)
        made = (
            F.interpolate(y, scale_factor=1.7, mode="bilinear"),
            F.interpolate(y, scale_factor=2.3, mode="nearest"),
            F.interpolate(y, size=(9, 7), mode="bilinear", antialias=True),
            F.interpolate(y, size=(31, 29), mode="bicubic"),
        )
        return tuple(end(m) for end, m in zip(self.ends, made, strict=True))


@model(image=(3, 24, 20))
def odd_resizes() -> nn.Module:
    return OddResizes()


@model(image=(3, 24, 32))
def panorama() -> nn.Module:
    """Pictures without an edge: circular padding."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 12, 2), (12, 16, 1), (16, 16, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode="circular"), nn.BatchNorm2d(outputs), nn.ReLU()]  # fmt: skip
    return nn.Sequential(*layers, head(16))


class Prototypes(nn.Module):
    """arXiv 1703.05175: how far an embedding is from each class's; the loss wants a log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(conv_bn(1, 12, stride=2), conv_bn(12, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        self.classes = nn.Parameter(torch.randn(7, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(-torch.cdist(self.embed(x), self.classes), dim=1)


@model(image=(1, 28, 28))
def prototypes() -> nn.Module:
    return Prototypes()
