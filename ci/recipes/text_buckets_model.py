"""A small network for texts of several lengths, and made-up texts: what it weighs does not depend on them."""

import numpy as np
import torch
from torch import Tensor, nn

WORDS = 2000


class TextNet(nn.Module):
    """(N, L) int64 numbers of words -> (N, 4) scores: an embedding, a convolution, attention."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.attention = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, batch_first=True, dropout=0.0
        )
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (N, L, width)
        x = torch.relu(self.convolution(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.attention(x).mean(1))


def build() -> TextNet:
    return TextNet()


def texts(length: str) -> np.ndarray:
    """(256, length) int64: rare words are rarer."""
    share = 1 / np.arange(1, WORDS + 1)
    return np.random.default_rng(0).choice(WORDS, (256, int(length)), p=share / share.sum())
