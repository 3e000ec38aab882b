"""Pictures in, pictures out: super-resolution, denoising, autoencoders, decoders."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import model
from zoo_models.layers import Function, Residual, conv_bn


@model(image=(3, 32, 32))
def srcnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 24, 9, padding=4), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 5, padding=2))  # fmt: skip


@model(image=(1, 24, 24))
def espcn() -> nn.Module:
    """arXiv 1609.05158: pixel shuffle by three."""
    return nn.Sequential(nn.Conv2d(1, 24, 5, padding=2), nn.Tanh(), nn.Conv2d(24, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 9, 3, padding=1), nn.PixelShuffle(3))  # fmt: skip


@model(image=(1, 24, 24))
def fsrcnn() -> nn.Module:
    """arXiv 1608.00367: PReLU, and a 9x9 ConvTranspose of stride 2."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, padding=2), nn.PReLU(24), nn.Conv2d(24, 8, 1), nn.PReLU(8), nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(8),
        nn.Conv2d(8, 24, 1), nn.PReLU(24), nn.ConvTranspose2d(24, 1, 9, 2, 4, output_padding=1),
    )  # fmt: skip


class Edsr(nn.Module):
    """arXiv 1707.02921: no batch norm, scaled residuals, and the mean colour taken off and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.44, 0.43, 0.40]).view(1, 3, 1, 1))
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        body = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), Function(lambda x: 0.1 * x)) for _ in range(2)]  # fmt: skip
        self.body = nn.Sequential(*(Residual(block) for block in body))
        self.leave = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3, padding=1))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x - self.mean)
        return self.leave(y + self.body(y)) + self.mean


@model(image=(3, 24, 24))
def edsr() -> nn.Module:
    return Edsr()


class DnCnn(nn.Module):
    """arXiv 1608.03981: the network finds the noise, which is taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), conv_bn(16, 16), conv_bn(16, 16), nn.Conv2d(16, 1, 3, padding=1))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.noise(x)


@model(image=(1, 32, 32))
def dncnn() -> nn.Module:
    return DnCnn()


@model(image=(1, 28, 28))
def autoencoder_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(784, 16), nn.Linear(16, 784), nn.ReLU(),
        nn.Unflatten(1, (16, 7, 7)), nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid(),
    )  # fmt: skip


@model(features=(640,))
def autoencoder_dense() -> nn.Module:
    """MLPerf Tiny's anomaly detector."""
    widths = [640, 64, 64, 8, 64, 64]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 640))


@model(latent=(16,))
def vae_decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32 * 4 * 4), nn.ReLU(), nn.Unflatten(1, (32, 4, 4)), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip


@model(image=(3, 32, 32))
def style_transfer() -> nn.Module:
    """arXiv 1603.08155: reflection padding and instance norm."""

    def block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel, stride), nn.InstanceNorm2d(outputs, affine=True)]  # fmt: skip

    inner = nn.Sequential(*block(16, 16, 3, 1), nn.ReLU(), *block(16, 16, 3, 1))
    return nn.Sequential(
        *block(3, 8, 9, 1), nn.ReLU(), *block(8, 16, 3, 2), nn.ReLU(), Residual(inner), nn.Upsample(scale_factor=2, mode="nearest"),
        *block(16, 8, 3, 1), nn.ReLU(), nn.ReflectionPad2d(4), nn.Conv2d(8, 3, 9),
    )  # fmt: skip


class ZeroDce(nn.Module):
    """arXiv 2001.06826: eight curves brighten a picture, x + a (x^2 - x), one after the other."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.curves = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3 * steps, 3, padding=1), nn.Tanh())  # fmt: skip
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(x)
        for curve in torch.split(self.curves(x), 3, dim=1):
            x = x + curve * (torch.pow(x, 2) - x)
        return x


@model(image=(3, 32, 32))
def low_light_curves() -> nn.Module:
    return ZeroDce()


@model(image=(3, 32, 32))
def deblur() -> nn.Module:
    """NAFNet's gate (two halves multiplied) in place of an activation; pixel unshuffle on the way in."""

    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second

    block = nn.Sequential(nn.Conv2d(24, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48), Function(gate), nn.Conv2d(24, 24, 1))  # fmt: skip
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 24, 3, padding=1), Residual(block), nn.Conv2d(24, 12, 3, padding=1), nn.PixelShuffle(2), Function(lambda x: F.hardtanh(x, -3, 3)))  # fmt: skip
