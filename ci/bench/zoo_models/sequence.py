"""Series and text: recurrent, convolutional and attending networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import Tokens, model
from zoo_models.layers import Encoder, Function


class Recurrent(nn.Module):
    """``kind`` of torch.nn over (N, T, F); the last step, or the mean, is classified."""

    def __init__(self, kind: str, *, layers: int = 1, both: bool = False, mean: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.mean = mean
        self.body = getattr(nn, kind)(16, 24, layers, batch_first=True, bidirectional=both)
        for weight in self.body.parameters():
            nn.init.uniform_(weight, -0.4, 0.4)
        self.head = nn.Linear(48 if both else 24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.body(x)
        return self.head(states.mean(1) if self.mean else states[:, -1])


@model(series=(20, 16))
def lstm() -> nn.Module:
    return Recurrent("LSTM")


@model(series=(20, 16))
def lstm_two_layers() -> nn.Module:
    return Recurrent("LSTM", layers=2, mean=True)


@model(series=(20, 16))
def bilstm() -> nn.Module:
    return Recurrent("LSTM", both=True, mean=True)


@model(series=(20, 16))
def gru() -> nn.Module:
    return Recurrent("GRU")


@model(series=(20, 16))
def bigru() -> nn.Module:
    return Recurrent("GRU", both=True, mean=True)


@model(series=(20, 16))
def elman_rnn() -> nn.Module:
    return Recurrent("RNN")


class LstmCellLoop(nn.Module):
    """Steps written out in Python, from a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 16)
        self.first = nn.Parameter(torch.randn(2, 1, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = (state.expand(x.shape[0], -1) for state in self.first)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


@model(series=(8, 8))
def lstm_cell_loop() -> nn.Module:
    return LstmCellLoop()


class TemporalBlock(nn.Module):
    """Two causal dilated convolutions and a residual, arXiv 1803.01271."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.first = nn.Conv1d(inputs, outputs, 3, padding=self.pad, dilation=dilation)
        self.second = nn.Conv1d(outputs, outputs, 3, padding=self.pad, dilation=dilation)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x)[:, :, : -self.pad])
        y = F.relu(self.second(y)[:, :, : -self.pad])
        return F.relu(y + self.shortcut(x))


@model(series=(16, 64))
def tcn() -> nn.Module:
    return nn.Sequential(TemporalBlock(16, 24, 1), TemporalBlock(24, 24, 2), TemporalBlock(24, 24, 4), Function(lambda x: x[:, :, -1]), nn.Linear(24, 10))  # fmt: skip


@model(series=(6, 128))
def cnn_1d() -> nn.Module:
    """Activity from an accelerometer and a gyroscope."""
    return nn.Sequential(
        nn.Conv1d(6, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(16, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(),
        nn.AvgPool1d(2), nn.Conv1d(32, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 6),
    )  # fmt: skip


class Bottleneck1d(nn.Module):
    """InceptionTime's block, arXiv 1909.04939: three kernel lengths and a pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(inputs, 8, 1, bias=False)
        self.long = nn.ModuleList(nn.Conv1d(8, 8, k, padding="same", bias=False) for k in (9, 19, 39))  # fmt: skip
        self.pooled = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(inputs, 8, 1, bias=False))
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.reduce(x)
        return F.relu(self.norm(torch.cat([*(conv(y) for conv in self.long), self.pooled(x)], dim=1)))  # fmt: skip


@model(series=(6, 96))
def inception_time() -> nn.Module:
    return nn.Sequential(Bottleneck1d(6), Bottleneck1d(32), Function(lambda x: x.mean(-1)), nn.Linear(32, 6))  # fmt: skip


class SequenceTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 32)
        place = torch.arange(32)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        self.register_buffer("position", torch.stack([place.sin(), place.cos()], -1).flatten(1))
        self.blocks = nn.Sequential(Encoder(32, 4), Encoder(32, 4))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.enter(x) + self.position).mean(1))


@model(series=(32, 16))
def transformer_encoder() -> nn.Module:
    return SequenceTransformer()


class CausalTransformer(nn.Module):
    """A small language model: tokens in, logits of the next token out, causal mask."""

    def __init__(self, count: int = 64, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(count, width)
        self.position = nn.Parameter(0.5 * torch.randn(1, length, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, count)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.project(mixed.transpose(1, 2).reshape(n, t, d)))


@model(tokens=Tokens((16,), 64))
def language_model() -> nn.Module:
    return CausalTransformer()


class TextCnn(nn.Module):
    """arXiv 1408.5882: convolutions of three lengths over embeddings, maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.convs = nn.ModuleList(nn.Conv1d(16, 12, k) for k in (2, 3, 4))
        self.head = nn.Linear(36, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(-1) for conv in self.convs], dim=1))


@model(tokens=Tokens((24,), 100))
def text_cnn() -> nn.Module:
    return TextCnn()


class Recommender(nn.Module):
    """Two embeddings and numbers, multiplied and mixed: a table of features, no picture."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 16), nn.Embedding(80, 16)
        self.mix = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:  # fmt: skip
        u, i = self.user(user).squeeze(1), self.item(item).squeeze(1)
        deep = self.mix(torch.cat([u, i, numbers], dim=1))
        return torch.sigmoid(self.head(torch.cat([u * i, deep], dim=1)))


@model(user=Tokens((1,), 50), item=Tokens((1,), 80), numbers=(8,))
def recommender() -> nn.Module:
    return Recommender()


@model(features=(21,))
def tabular_mlp() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(21), nn.Linear(21, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.SELU(), nn.Linear(48, 3), nn.Softmax(-1),
    )  # fmt: skip


class LastStates(nn.Module):
    """A bidirectional LSTM or GRU read only where it ends: forwards at the last step, backwards at the first."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(6, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.rnn(x)[1]
        last = states[0] if isinstance(states, tuple) else states
        return self.head(torch.cat([last[-2], last[-1]], dim=1))


@model(series=(9, 6))
def bilstm_last_states() -> nn.Module:
    return LastStates(nn.LSTM)


@model(series=(9, 6))
def bigru_last_states() -> nn.Module:
    return LastStates(nn.GRU)
