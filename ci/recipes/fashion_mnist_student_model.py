"""A small network of dense convolutions for pictures of 28x28 pixels.

3x3 convolutions over few pixels: integer kernels do ten times the products in a second that they do
of depthwise ones, so that for the same latency there may be more of them.
"""

from torch import Tensor, nn


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Student(nn.Module):
    """(N, 1, 28, 28) float32, standardised -> (N, 10) class scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, width, stride=2),  # 28x28 -> 14x14
            convolution(width, 2 * width),
            nn.MaxPool2d(2),  # -> 7x7
            convolution(2 * width, 3 * width),
        )
        self.refine = convolution(3 * width, 3 * width)
        self.head = nn.Linear(3 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image)
        x = x + self.refine(x)
        return self.head(x.mean((2, 3)))


def build(width: int = 16) -> nn.Module:
    return Student(width)
