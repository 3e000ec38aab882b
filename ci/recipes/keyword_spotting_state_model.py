"""A keyword spotter that hears one frame of ten MFCCs at a time and keeps its state outside, for streams."""

import torch
from torch import Tensor, nn


class Spotter(nn.Module):
    """x (N, 10) float32 and the state h (1, N, 64) of a GRU -> scores of ten words (N, 10), next state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.gru(torch.relu(self.first(x))[:, None], h)
        return self.head(y[:, 0]), h


def build() -> Spotter:
    return Spotter()
