"""A wide residual network for pictures of 28x28 pixels: the teacher of fashion_mnist_student.toml."""

from torch import Tensor, nn


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Stage(nn.Module):
    """Twice the channels at half the resolution, then a convolution that is added to what it is given."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.widen = convolution(inputs, outputs, stride)
        self.refine = convolution(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        return x + self.refine(x)


class Teacher(nn.Module):
    """(N, 1, 28, 28) float32, standardised -> (N, 10) class scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, width),
            nn.MaxPool2d(2),  # 28x28 -> 14x14
            Stage(width, 2 * width, 1),
            nn.MaxPool2d(2),  # -> 7x7
            Stage(2 * width, 4 * width, 1),
            Stage(4 * width, 8 * width, 2),  # -> 4x4
        )
        self.head = nn.Linear(8 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


def build(width: int = 32) -> nn.Module:
    return Teacher(width)
