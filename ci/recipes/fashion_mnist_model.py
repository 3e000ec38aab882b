"""A small network of depthwise separable convolutions for pictures of 28x28 pixels."""

from torch import Tensor, nn


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class FashionNet(nn.Module):
    """(N, 1, 28, 28) float32, standardised -> (N, 10) class scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),  # 28x28 -> 14x14
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            separable(width, 2 * width, 1),
            separable(2 * width, 4 * width, 2),  # 14x14 -> 7x7
            separable(4 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


def build(width: int = 16) -> nn.Module:
    return FashionNet(width)
