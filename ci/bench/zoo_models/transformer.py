"""Attention, and networks of the same shape without it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import model
from zoo_models.layers import Attention, Encoder, Function, Residual, conv_bn, mlp

WIDTH = 48


class VisionTransformer(nn.Module):
    """arXiv 2010.11929; with ``distilled`` a second token and head, averaged (DeiT, arXiv 2012.12877)."""

    def __init__(self, *, distilled: bool = False, depth: int = 2) -> None:
        super().__init__()
        extra = 2 if distilled else 1
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.tokens = nn.Parameter(0.5 * torch.randn(1, extra, WIDTH))
        self.position = nn.Parameter(0.5 * torch.randn(1, 16 + extra, WIDTH))
        self.blocks = nn.Sequential(*(Encoder(WIDTH, 3) for _ in range(depth)))
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in range(extra))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)  # (N, D, 4, 4) -> (N, 16, D)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        x = self.norm(self.blocks(x))
        answers = [head(x[:, i]) for i, head in enumerate(self.heads)]
        return sum(answers[1:], answers[0]) / len(answers)


@model(image=(3, 32, 32))
def vit() -> nn.Module:
    return VisionTransformer()


@model(image=(3, 32, 32))
def deit() -> nn.Module:
    return VisionTransformer(distilled=True)


@model(image=(3, 32, 32))
def vit_torch_layers() -> nn.Module:
    """PyTorch's own TransformerEncoderLayer (MultiheadAttention), with a mean instead of a token."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True)  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 8, 8), Function(lambda x: x.flatten(2).transpose(1, 2)),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), Function(lambda x: x.mean(1)), nn.Linear(WIDTH, 10),
    )  # fmt: skip


class WindowAttention(nn.Module):
    """Attention in windows of 4 x 4, of a map shifted by ``shift``, with a bias by relative place, arXiv 2103.14030."""

    def __init__(self, width: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.size, self.shift, self.window = heads, size, shift, 4
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)  # fmt: skip
        offset = places[:, :, None] - places[:, None, :] + 3
        self.register_buffer("index", offset[0] * 7 + offset[1])
        self.bias = nn.Parameter(0.5 * torch.randn(49, heads))
        label = torch.zeros(size, size)
        if shift:
            edge = torch.tensor([0] * (size - 4) + [1] * (4 - shift) + [2] * shift)
            label = edge[:, None] * 3 + edge[None, :]
        label = label.reshape(size // 4, 4, size // 4, 4).transpose(1, 2).reshape(-1, 16)
        self.register_buffer("mask", -100.0 * (label[:, None, :] != label[:, :, None]).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w, c = x.shape
        k = h // 4
        y = self.norm(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        # (N, H, W, C) -> (N windows, 16, C)
        y = y.reshape(n, k, 4, k, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n * k * k, 16, c)
        q, key, v = self.qkv(y).reshape(-1, 16, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # fmt: skip
        score = (q * (c // self.heads) ** -0.5) @ key.transpose(-2, -1)
        score = score + self.bias[self.index].permute(2, 0, 1)[None]
        score = (score.view(n, k * k, self.heads, 16, 16) + self.mask[None, :, None]).view(-1, self.heads, 16, 16)  # fmt: skip
        y = (score.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        y = self.project(y).reshape(n, k, k, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + y


class PatchMerging(nn.Module):
    """Four neighbours become one place of twice the channels; strided slices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduce(self.norm(torch.cat(parts, dim=-1)))


@model(image=(3, 32, 32))
def swin() -> nn.Module:
    def block(width: int, size: int, shift: int) -> list[nn.Module]:
        return [WindowAttention(width, 2, size, shift), Residual(nn.Sequential(nn.LayerNorm(width), mlp(width, 2 * width)))]  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4), Function(lambda x: x.permute(0, 2, 3, 1)), *block(32, 8, 0), *block(32, 8, 2),
        PatchMerging(32), *block(64, 4, 0), nn.LayerNorm(64), Function(lambda x: x.mean((1, 2))), nn.Linear(64, 10),
    )  # fmt: skip


class MobileVitBlock(nn.Module):
    """Attention between the same pixel of all 2 x 2 patches, arXiv 2110.02178."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(conv_bn(channels, channels, act=nn.SiLU), nn.Conv2d(channels, width, 1, bias=False))  # fmt: skip
        self.blocks = nn.Sequential(Encoder(width, 2), nn.LayerNorm(width))
        self.leave = conv_bn(width, channels, 1, act=nn.SiLU)
        self.fuse = conv_bn(2 * channels, channels, act=nn.SiLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        n, d, h, w = y.shape
        # (N, D, H, W) -> (N 4, H/2 W/2, D): pixels of a patch apart, patches in a row
        y = y.reshape(n, d, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(n * 4, h * w // 4, d)  # fmt: skip
        y = self.blocks(y).reshape(n, 2, 2, h // 2, w // 2, d).permute(0, 5, 3, 1, 4, 2).reshape(n, d, h, w)  # fmt: skip
        return self.fuse(torch.cat([x, self.leave(y)], dim=1))


@model(image=(3, 32, 32))
def mobilevit() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, stride=2, act=nn.SiLU), conv_bn(16, 24, stride=2, act=nn.SiLU), MobileVitBlock(24, 32), conv_bn(24, 48, 1, act=nn.SiLU),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


class ConvNextBlock(nn.Module):
    """arXiv 2201.03545: depthwise 7x7, layer norm and MLP in channels-last, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), mlp(width, 4 * width))
        self.scale = nn.Parameter(torch.empty(width).uniform_(0.3, 0.8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(self.depthwise(x).permute(0, 2, 3, 1)) * self.scale
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (N, C, H, W), written out as ConvNeXt's code does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 1).uniform_(0.6, 1.4))
        self.bias = nn.Parameter(0.2 * torch.randn(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-6) * self.weight + self.bias


@model(image=(3, 64, 64))
def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 4), ChannelNorm(24), ConvNextBlock(24), ChannelNorm(24), nn.Conv2d(24, 48, 2, 2), ConvNextBlock(48),
        Function(lambda x: x.mean((-2, -1))), nn.LayerNorm(48), nn.Linear(48, 10),
    )  # fmt: skip


@model(image=(3, 56, 56))
def convmixer() -> nn.Module:
    """arXiv 2201.09792."""

    def block(width: int) -> list[nn.Module]:
        place = nn.Sequential(nn.Conv2d(width, width, 7, groups=width, padding="same"), nn.GELU(), nn.BatchNorm2d(width))  # fmt: skip
        return [Residual(place), nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]

    return nn.Sequential(
        nn.Conv2d(3, 32, 7, 7), nn.GELU(), nn.BatchNorm2d(32), *block(32), *block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Transposed(nn.Module):
    """A module over the second axis instead of the last."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.transpose(1, 2)).transpose(1, 2)


@model(image=(3, 32, 32))
def mlp_mixer() -> nn.Module:
    """arXiv 2105.01601."""
    blocks = []
    for _ in range(2):
        blocks += [Residual(nn.Sequential(nn.LayerNorm(WIDTH), Transposed(mlp(16, 32)))), Residual(nn.Sequential(nn.LayerNorm(WIDTH), mlp(WIDTH, 96)))]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 8, 8), Function(lambda x: x.flatten(2).transpose(1, 2)), *blocks, nn.LayerNorm(WIDTH), Function(lambda x: x.mean(1)), nn.Linear(WIDTH, 10),
    )  # fmt: skip


class Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, 1, width).uniform_(0.5, 1.5))
        self.shift = nn.Parameter(0.2 * torch.randn(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, self.scale, x)


@model(image=(3, 32, 32))
def resmlp() -> nn.Module:
    """arXiv 2105.03404: affine maps instead of norms."""
    blocks = []
    for _ in range(2):
        blocks += [Residual(nn.Sequential(Affine(WIDTH), Transposed(nn.Linear(16, 16)), Affine(WIDTH))), Residual(nn.Sequential(Affine(WIDTH), mlp(WIDTH, 96), Affine(WIDTH)))]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 8, 8), Function(lambda x: x.flatten(2).transpose(1, 2)), *blocks, Affine(WIDTH), Function(lambda x: x.mean(1)), nn.Linear(WIDTH, 10),
    )  # fmt: skip


@model(image=(3, 64, 64))
def poolformer() -> nn.Module:
    """arXiv 2111.11418: the mixer of tokens is an average pool, less the identity."""

    def block(width: int) -> list[nn.Module]:
        pool = Function(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
        channels = nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))  # fmt: skip
        return [Residual(nn.Sequential(nn.GroupNorm(1, width), pool)), Residual(channels)]

    return nn.Sequential(
        nn.Conv2d(3, 32, 7, 4, 2), *block(32), nn.Conv2d(32, 48, 3, 2, 1), *block(48), nn.GroupNorm(1, 48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


class LinearAttention(nn.Module):
    """Attention of ReLU features without a softmax over places (EfficientViT, arXiv 2205.14756)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, c, h * w).unbind(1)
        q, k = F.relu(q), F.relu(k)
        mixed = torch.einsum("ncl,ndl->ncd", v, k)
        above = torch.einsum("ncd,ndl->ncl", mixed, q)
        below = torch.einsum("nd,ndl->nl", k.sum(-1), q).unsqueeze(1)
        return x + self.project((above / (below + 1.0)).reshape(n, c, h, w))


@model(image=(3, 48, 48))
def efficientvit() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, stride=2, act=nn.Hardswish), conv_bn(16, 24, stride=2, act=nn.Hardswish), LinearAttention(24),
        conv_bn(24, 48, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


class AttentionPool(nn.Module):
    """A learned query over a map's places, as CLIP's image encoder ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        return F.normalize(self.attention(x)[:, 0], dim=-1)


@model(image=(3, 48, 48))
def clip_image_encoder() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2), AttentionPool(32))
