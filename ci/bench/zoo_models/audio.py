"""Sound, raw or as a spectrogram (1, frequency or time, time or frequency)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import model
from zoo_models.layers import conv_bn


@model(spectrogram=(1, 49, 10))
def ds_cnn() -> nn.Module:
    """arXiv 1711.07128, as in MLPerf Tiny: the first kernel is 10 x 4."""
    layers: list[nn.Module] = [nn.Conv2d(1, 32, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(32), nn.ReLU()]  # fmt: skip
    for _ in range(3):
        layers += [conv_bn(32, 32, groups=32), conv_bn(32, 32, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 12))


class BroadcastBlock(nn.Module):
    """arXiv 2106.04140: a 2-D branch, its mean over frequency through a 1-D branch, added back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = nn.Sequential(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), groups=channels, bias=False), nn.BatchNorm2d(channels))  # fmt: skip
        self.time = nn.Sequential(
            nn.Conv2d(channels, channels, (1, 3), padding=(0, 2), dilation=(1, 2), groups=channels, bias=False), nn.BatchNorm2d(channels), nn.SiLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frequency(x)
        return F.relu(x + y + self.time(y.mean(2, keepdim=True)))


@model(spectrogram=(1, 40, 50))
def bc_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, (2, 1), 2), nn.BatchNorm2d(16), nn.ReLU(), BroadcastBlock(16), BroadcastBlock(16),
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 12),
    )  # fmt: skip


@model(sound=(1, 2000))
def m5() -> nn.Module:
    """arXiv 1610.00087: raw samples, a first kernel of 80."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 80, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(16, 24, 3), nn.BatchNorm1d(24), nn.ReLU(),
        nn.MaxPool1d(4), nn.Conv1d(24, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 12), nn.LogSoftmax(-1),
    )  # fmt: skip


class Crnn(nn.Module):
    """Convolutions, then a recurrent layer over what is left of time, arXiv 1507.05717."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(1, 12, stride=2), conv_bn(12, 16), nn.MaxPool2d((2, 1)))  # fmt: skip
        self.recurrent = getattr(nn, kind)(16 * 8, 24, batch_first=True)
        self.head = nn.Linear(24, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x)  # (N, C, F, T)
        y = y.permute(0, 3, 1, 2).flatten(2)  # (N, T, C F)
        return self.head(self.recurrent(y)[0])


@model(spectrogram=(1, 32, 24))
def crnn_gru() -> nn.Module:
    return Crnn("GRU")


@model(spectrogram=(1, 32, 24))
def crnn_lstm() -> nn.Module:
    return Crnn("LSTM")


class TcResBlock(nn.Module):
    """arXiv 1904.03814: frequencies as channels, 9 x 1 kernels in time."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, (9, 1), (2, 1), (4, 0), bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, (9, 1), 1, (4, 0), bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, (2, 1), bias=False), nn.BatchNorm2d(outputs), nn.ReLU())  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class TcResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(40, 16, (3, 1), padding=(1, 0), bias=False)
        self.blocks = nn.Sequential(TcResBlock(16, 24), TcResBlock(24, 32))
        self.head = nn.Linear(32, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(self.enter(x.permute(0, 3, 2, 1)))  # (N, 1, T, F) -> (N, F, T, 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@model(spectrogram=(1, 49, 40))
def tc_resnet() -> nn.Module:
    return TcResNet()


class ConvTasNet(nn.Module):
    """arXiv 1809.07454: a learned filter bank, a mask from dilated convolutions, the filters back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, 32, 16, 8, bias=False)
        self.norm = nn.GroupNorm(1, 32)
        self.mask = nn.Sequential(
            nn.Conv1d(32, 24, 1), nn.PReLU(), nn.Conv1d(24, 24, 3, padding=2, dilation=2, groups=24), nn.PReLU(), nn.Conv1d(24, 32, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.decode = nn.ConvTranspose1d(32, 1, 16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.encode(x))
        return self.decode(y * self.mask(self.norm(y)))


@model(sound=(1, 512))
def conv_tasnet() -> nn.Module:
    return ConvTasNet()


class GatedBlock(nn.Module):
    """WaveNet's tanh times sigmoid, with a causal pad, arXiv 1609.03499."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.project = nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signal, gate = self.conv(F.pad(x, (self.dilation, 0))).chunk(2, dim=1)
        return x + self.project(torch.tanh(signal) * torch.sigmoid(gate))


@model(sound=(1, 128))
def wavenet() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 16, 1), *(GatedBlock(16, 2**i) for i in range(4)), nn.ReLU(), nn.Conv1d(16, 8, 1))  # fmt: skip


class SpeakerEmbedding(nn.Module):
    """An x-vector: frames, then mean and standard deviation over time, then a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(nn.Conv1d(24, 32, 5), nn.ReLU(), nn.Conv1d(32, 32, 3, dilation=2), nn.ReLU())  # fmt: skip
        self.embed = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frames(x)
        y = torch.cat([y.mean(2), y.std(2)], dim=1)
        return F.normalize(self.embed(y), dim=1)


@model(spectrogram=(24, 50))
def x_vector() -> nn.Module:
    return SpeakerEmbedding()


class InnerSpectrogram(nn.Module):
    """The spectrogram is made inside: windowed Fourier transforms, their power, its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.body = nn.Sequential(conv_bn(1, 16, stride=2), conv_bn(16, 16, groups=16), conv_bn(16, 24, 1, stride=2))  # fmt: skip
        self.head = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.view_as_real(torch.stft(x[:, 0], 64, 32, window=self.window, return_complex=True))  # fmt: skip
        power = torch.log1p(parts.square().sum(-1))  # (N, 33, frames)
        return self.head(self.body(power[:, None]).mean((2, 3)))


@model(sound=(1, 1024))
def inner_spectrogram() -> nn.Module:
    return InnerSpectrogram()
