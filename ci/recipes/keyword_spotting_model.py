"""DS-CNN keyword spotter of MLPerf Tiny (https://arxiv.org/abs/1711.07128), for 49 frames of 10 MFCCs."""

import torch
from torch import Tensor, nn


class SeparableBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.depthwise_bn(self.depthwise(x)))
        return self.relu(self.pointwise_bn(self.pointwise(x)))


class DsCnn(nn.Module):
    """(N, 1, 49, 10) float32 MFCCs -> (N, 12) scores: _silence_ _unknown_ and ten keywords."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        # (49, 10) -> (25, 5); the names of the layers are those of the published weights
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(1, channels, (10, 4), stride=2, padding=(5, 1), bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(0.2),
            *(SeparableBlock(channels) for _ in range(4)),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, mfcc: Tensor) -> Tensor:
        x = self.pool(self.feature_extractor(mfcc))
        return self.classifier(x.flatten(1))  # (N, C, 1, 1) -> (N, C)


def build(channels: int = 64, classes: int = 12) -> nn.Module:
    return DsCnn(channels, classes)


class WithDetour(DsCnn):
    """The same answers by one operator more: a pointwise convolution that hands its input on."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes)
        identity = torch.eye(channels).reshape(channels, channels, 1, 1)
        self.register_buffer("identity", identity, persistent=False)  # no part of the weights

    def forward(self, mfcc: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.feature_extractor(mfcc), self.get_buffer("identity"))
        return self.classifier(self.pool(x).flatten(1))


def build_slower(channels: int = 64, classes: int = 12) -> nn.Module:
    """What a gate on instructions is there to refuse."""
    return WithDetour(channels, classes)
