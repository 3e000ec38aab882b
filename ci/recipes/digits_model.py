"""A small convolutional network for pictures of 8x8 pixels."""

from torch import Tensor, nn


def convolution(inputs: int, outputs: int, kernel: int, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class DigitsNet(nn.Module):
    """(N, 1, 8, 8) float32 in [0, 1] -> (N, 10) class scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, width, 3),
            convolution(width, width, 3, groups=width),  # depthwise
            convolution(width, 2 * width, 1),
            nn.MaxPool2d(2),  # 8x8 -> 4x4
            convolution(2 * width, 2 * width, 3, groups=2 * width),
            convolution(2 * width, 2 * width, 1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


def build(width: int = 32) -> nn.Module:
    return DigitsNet(width)
