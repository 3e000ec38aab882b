"""Networks of token ids: blocks of the language models that people take to boards, and what came before them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import Tokens, model

WIDTH, HEADS, LENGTH = 32, 4, 12


def _heads(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """(N, T, D) -> (N, heads, T, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class RmsNorm(nn.Module):
    """arXiv 1910.07467."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(0.6 + 0.8 * torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions (arXiv 2104.09864), two heads of keys for four of queries, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.norms = nn.ModuleList([RmsNorm(), RmsNorm()])
        self.query, self.mix = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 64, bias=False) for _ in range(2))
        self.down = nn.Linear(64, WIDTH, bias=False)
        angles = torch.outer(torch.arange(LENGTH), 10000 ** -(torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, -1)
        return x * self.cos + torch.cat([-two, one], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        query, key = self.rotate(_heads(self.query(y))), self.rotate(_heads(self.key(y), 2))
        key, value = (z.repeat_interleave(2, 1) for z in (key, _heads(self.value(y), 2)))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Two blocks; the embedding is the last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.Sequential(LlamaBlock(), LlamaBlock())
        self.norm = RmsNorm()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.blocks(self.embed(tokens))), self.embed.weight / 8)


@model(tokens=Tokens((LENGTH,), 50))
def llama() -> nn.Module:
    return Llama()


class Bert(nn.Module):
    """arXiv 1810.04805: a mask made of the tokens, the mean over what is no padding, class and states."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, WIDTH, padding_idx=0)
        self.places = nn.Embedding(16, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.classify = nn.Linear(WIDTH, 4)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        real = (tokens != 0).float()
        x = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))
        scores = _heads(self.query(x)) @ _heads(self.key(x)).transpose(-1, -2) / math.sqrt(WIDTH // HEADS)  # fmt: skip
        scores = scores + (1 - real[:, None, None, :]) * torch.finfo(torch.float32).min
        states = (scores.softmax(-1) @ _heads(self.value(x))).transpose(1, 2).flatten(2)
        mean = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return self.classify(torch.tanh(mean)), states


@model(tokens=Tokens((LENGTH,), 60))
def bert() -> nn.Module:
    return Bert()


class T5Attention(nn.Module):
    """arXiv 1910.10683: a learned bias for each logarithmic bucket of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.bias = nn.Embedding(16, HEADS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        place = torch.arange(tokens.shape[1])
        apart = place[None, :] - place[:, None]
        far = 4 + (torch.log(apart.abs().float() / 4 + 1e-9) / math.log(8) * 4).long()
        bucket = torch.where(apart.abs() < 4, apart.abs(), far.clamp(max=7)) + 8 * (apart > 0)
        query, key, value = (_heads(z) for z in self.qkv(self.embed(tokens)).chunk(3, -1))
        scores = query @ key.transpose(-1, -2) + self.bias(bucket).permute(2, 0, 1)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@model(tokens=Tokens((LENGTH,), 40))
def t5_attention() -> nn.Module:
    return T5Attention()


class CausalEncoder(nn.Module):
    """PyTorch's own encoder with a mask, as its tutorials have it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True, activation="gelu")  # fmt: skip
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.head(self.layers(self.embed(tokens), mask=self.mask)), -1)


@model(tokens=Tokens((LENGTH,), 50))
def causal_encoder() -> nn.Module:
    return CausalEncoder()


class EncoderDecoder(nn.Module):
    """PyTorch's own pair: a series read, tokens written."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, WIDTH)
        self.embed = nn.Embedding(30, WIDTH)
        self.pair = nn.Transformer(WIDTH, HEADS, 1, 1, 64, 0.0, batch_first=True, norm_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(8))
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, series: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.pair(self.read(series), self.embed(tokens), tgt_mask=self.mask))


@model(series=(16, 6), tokens=Tokens((8,), 30))
def encoder_decoder() -> nn.Module:
    return EncoderDecoder()


class SelectiveScan(nn.Module):
    """arXiv 2312.00752, one block without its gate: a causal convolution, then a state that inputs steer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 4, groups=8, padding=3)
        self.step = nn.Linear(8, 8)
        self.write, self.read = nn.Linear(8, 4), nn.Linear(8, 4)
        self.decay = nn.Parameter(-torch.rand(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        x = F.silu(self.conv(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        step, write, read = F.softplus(self.step(x)), self.write(x), self.read(x)
        state = x.new_zeros(x.shape[0], 8, 4)
        outputs = []
        for t in range(length):
            state = torch.exp(step[:, t, :, None] * self.decay) * state
            state = state + (step[:, t] * x[:, t])[..., None] * write[:, t, None]
            outputs.append((state * read[:, t, None]).sum(-1))
        return torch.stack(outputs, 1)


@model(series=(12, 8))
def selective_scan() -> nn.Module:
    return SelectiveScan()


class WordBags(nn.Module):
    """fastText (arXiv 1607.01759): the mean of the words that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(80, 16, mode="mean", padding_idx=0)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(tokens))


@model(tokens=Tokens((20,), 80))
def word_bags() -> nn.Module:
    return WordBags()
