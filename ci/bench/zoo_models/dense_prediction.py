"""An answer for every place: segmentation, detection, key points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo_models import model
from zoo_models.layers import Parallel, Residual, conv_bn
from zoo_models.mobile import inverted


def double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_bn(inputs, outputs), conv_bn(outputs, outputs))


class UNet(nn.Module):
    """arXiv 1505.04597; one level up by ConvTranspose, one by interpolation."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(3, width), double(width, 2 * width), double(2 * width, 4 * width)])  # fmt: skip
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.second, self.first = double(4 * width, 2 * width), double(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.max_pool2d(b, 2))
        y = self.second(torch.cat([self.up(c), b], dim=1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.first(torch.cat([y, a], dim=1)))


@model(image=(3, 48, 48))
def unet() -> nn.Module:
    return UNet()


class UNetPlusPlus(nn.Module):
    """arXiv 1807.10165: nodes between encoder and decoder; align_corners as its authors have it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.x00, self.x10, self.x20 = double(3, w), double(w, 2 * w), double(2 * w, 4 * w)
        self.x01, self.x11, self.x02 = double(3 * w, w), double(6 * w, 2 * w), double(4 * w, w)
        self.head = nn.Conv2d(w, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def up(y: torch.Tensor) -> torch.Tensor:
            return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)

        x00 = self.x00(x)
        x10 = self.x10(F.max_pool2d(x00, 2))
        x20 = self.x20(F.max_pool2d(x10, 2))
        x01 = self.x01(torch.cat([x00, up(x10)], 1))
        x11 = self.x11(torch.cat([x10, up(x20)], 1))
        return self.head(self.x02(torch.cat([x00, x01, up(x11)], 1)))


@model(image=(3, 32, 32))
def unet_plus_plus() -> nn.Module:
    return UNetPlusPlus()


class SegNet(nn.Module):
    """Nearest up-sampling and a sigmoid mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 24), nn.MaxPool2d(2))  # fmt: skip
        self.decode = nn.Sequential(nn.Upsample(scale_factor=2), conv_bn(24, 16), nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, padding=1))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.decode(self.encode(x)))


@model(image=(3, 32, 32))
def segnet() -> nn.Module:
    return SegNet()


class DeepLab(nn.Module):
    """Dilated convolutions at three rates and a pooled branch, then up by four, arXiv 1706.05587."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16, stride=2), inverted(16, width, 2), inverted(width, width))  # fmt: skip
        self.rates = Parallel(conv_bn(width, 12, 1), *(conv_bn(width, 12, 3, dilation=d) for d in (2, 4, 6)))  # fmt: skip
        self.pooled = conv_bn(width, 12, 1)
        self.project = nn.Sequential(conv_bn(60, 24, 1), nn.Conv2d(24, 5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x)
        pooled = self.pooled(F.adaptive_avg_pool2d(y, 1))
        pooled = F.interpolate(pooled, size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = self.project(torch.cat([self.rates(y), pooled], dim=1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


@model(image=(3, 64, 64))
def deeplab() -> nn.Module:
    return DeepLab()


class PyramidPool(nn.Module):
    """PSPNet: pools of several sizes, enlarged and concatenated, arXiv 1612.01105."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv_bn(channels, 8, 1)) for n in (1, 2, 4))  # fmt: skip
        self.head = nn.Conv2d(channels + 24, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [F.interpolate(part(x), size=x.shape[2:], mode="bilinear", align_corners=False) for part in self.parts]  # fmt: skip
        return self.head(torch.cat([x, *pooled], dim=1))


@model(image=(3, 32, 32))
def pspnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 24, stride=2), PyramidPool(24))


class FeaturePyramid(nn.Module):
    """arXiv 1612.03144: three outputs of three sizes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3, 16, 3, 2), conv_bn(16, 24, 3, 2), conv_bn(24, 32, 3, 2)])  # fmt: skip
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (16, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        merged = [lateral(y) for lateral, y in zip(self.lateral, found, strict=True)]
        for i in (1, 0):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], scale_factor=2, mode="nearest")
        return tuple(smooth(y) for smooth, y in zip(self.smooth, merged, strict=True))


@model(image=(3, 64, 64))
def feature_pyramid() -> nn.Module:
    return FeaturePyramid()


class Ssd(nn.Module):
    """arXiv 1512.02325: boxes and scores of two maps, permuted, flattened and concatenated."""

    def __init__(self, classes: int = 4, anchors: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.near = nn.Sequential(conv_bn(3, 16, stride=2, act=nn.ReLU6), inverted(16, 24, 2), inverted(24, 24))  # fmt: skip
        self.far = inverted(24, 40, 2)
        self.boxes = nn.ModuleList(nn.Conv2d(c, anchors * 4, 3, padding=1) for c in (24, 40))
        self.scores = nn.ModuleList(nn.Conv2d(c, anchors * classes, 3, padding=1) for c in (24, 40))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = self.near(x)
        maps = [near, self.far(near)]
        boxes = [head(y).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for head, y in zip(self.boxes, maps, strict=True)]  # fmt: skip
        scores = [head(y).permute(0, 2, 3, 1).reshape(len(x), -1, self.classes) for head, y in zip(self.scores, maps, strict=True)]  # fmt: skip
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1).softmax(-1)


@model(image=(3, 64, 64))
def ssd() -> nn.Module:
    return Ssd()


class Yolo(nn.Module):
    """YOLOv5's parts: SiLU, split bottlenecks, SPPF, up-sampling neck, decoded boxes in one tensor."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 12, 6 // 2, 2, act=nn.SiLU), conv_bn(12, 24, 3, 2, act=nn.SiLU))  # fmt: skip
        self.left, self.right = conv_bn(24, 12, 1, act=nn.SiLU), conv_bn(24, 12, 1, act=nn.SiLU)
        self.inner = Residual(nn.Sequential(conv_bn(12, 12, 1, act=nn.SiLU), conv_bn(12, 12, act=nn.SiLU)))  # fmt: skip
        self.down = conv_bn(24, 32, 3, 2, act=nn.SiLU)
        self.pooled = conv_bn(128, 24, 1, act=nn.SiLU)
        self.heads = nn.ModuleList([nn.Conv2d(48, 2 * (5 + classes), 1), nn.Conv2d(24, 2 * (5 + classes), 1)])  # fmt: skip
        self.register_buffer("anchors", torch.tensor([[[1.0, 1.5], [2.0, 1.0]], [[3.0, 2.5], [4.0, 6.0]]]))  # fmt: skip
        for i, size in enumerate((16, 8)):
            row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
            self.register_buffer(f"grid{i}", torch.stack([column, row], -1).float()[None, None])

    def decode(self, y: torch.Tensor, i: int, grid: torch.Tensor) -> torch.Tensor:
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        place = (y[..., 0:2] * 2.0 - 0.5 + grid) / w
        size = (y[..., 2:4] * 2.0) ** 2 * self.anchors[i][None, :, None, None] / 8
        return torch.cat([place, size, y[..., 4:]], dim=-1).view(n, -1, c // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        near = torch.cat([self.inner(self.left(x)), self.right(x)], dim=1)
        far = self.down(near)
        one = F.max_pool2d(far, 5, 1, 2)
        two = F.max_pool2d(one, 5, 1, 2)
        far = self.pooled(torch.cat([far, one, two, F.max_pool2d(two, 5, 1, 2)], dim=1))
        merged = torch.cat([F.interpolate(far, scale_factor=2.0, mode="nearest"), near], dim=1)
        answers = [self.decode(self.heads[0](merged), 0, self.grid0), self.decode(self.heads[1](far), 1, self.grid1)]  # fmt: skip
        return torch.cat(answers, dim=1)


@model(image=(3, 64, 64))
def yolo() -> nn.Module:
    return Yolo()


class CenterNet(nn.Module):
    """arXiv 1904.07850: a heat map with its maxima kept, sizes and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 24, stride=2), nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU())  # fmt: skip
        self.heat, self.size, self.offset = (nn.Conv2d(16, n, 3, padding=1) for n in (2, 2, 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.body(x)
        heat = torch.sigmoid(self.heat(y))
        peak = (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        return heat * peak, F.relu(self.size(y)), self.offset(y)


@model(image=(3, 48, 48))
def centernet() -> nn.Module:
    return CenterNet()


class Hourglass(nn.Module):
    """arXiv 1603.06937, two levels."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.skip = Residual(conv_bn(channels, channels))
        self.down = Residual(conv_bn(channels, channels))
        self.inner = Hourglass(depth - 1, channels) if depth > 1 else Residual(conv_bn(channels, channels))  # fmt: skip
        self.up = Residual(conv_bn(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.skip(x) + F.interpolate(y, scale_factor=2)


@model(image=(3, 64, 64))
def hourglass_pose() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16, 7, 2), Hourglass(2, 16), nn.Conv2d(16, 7, 1))


class SoftArgmax(nn.Module):
    """Heat maps to coordinates: the mean place under a softmax."""

    def __init__(self, points: int = 5, size: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 16, stride=2), nn.Conv2d(16, points, 1))  # fmt: skip
        self.register_buffer("line", torch.linspace(-1, 1, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heat = self.body(x)
        chance = heat.flatten(2).softmax(-1).view(heat.shape)
        across = (chance.sum(2) * self.line).sum(-1)
        along = (chance.sum(3) * self.line).sum(-1)
        return torch.stack([across, along], dim=-1)


@model(image=(3, 64, 64))
def keypoints_soft_argmax() -> nn.Module:
    return SoftArgmax()


@model(image=(3, 48, 48))
def depth_estimation() -> nn.Module:
    """An encoder of inverted residuals; up by ConvTranspose with output padding; ELU; positive out."""
    return nn.Sequential(
        conv_bn(3, 16, stride=2), inverted(16, 24, 2), inverted(24, 24), nn.ConvTranspose2d(24, 16, 3, 2, 1, output_padding=1), nn.ELU(),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1), nn.ELU(), nn.Conv2d(8, 1, 3, padding=1), nn.Softplus(),
    )  # fmt: skip


class DistributedBoxes(nn.Module):
    """YOLOv8's head: each side of a box is the mean of 16 distances (arXiv 2006.04388), around a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=4, act=nn.SiLU)
        self.down = conv_bn(16, 16, stride=2, act=nn.SiLU)
        self.boxes = nn.ModuleList(nn.Conv2d(16, 64, 1) for _ in range(2))
        self.classes = nn.ModuleList(nn.Conv2d(16, 5, 1) for _ in range(2))
        self.register_buffer("distance", torch.arange(16.0).view(1, 1, 16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.stem(x)]
        maps.append(self.down(maps[0]))
        boxes = torch.cat([head(m).flatten(2) for head, m in zip(self.boxes, maps, strict=True)], 2)
        classes = torch.cat([head(m).flatten(2) for head, m in zip(self.classes, maps, strict=True)], 2)  # fmt: skip
        places, strides = [], []
        for stride, m in zip((4 / 32, 8 / 32), maps, strict=True):  # of a picture of 32
            rows, columns = m.shape[2:]
            y, x_ = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")  # fmt: skip
            places.append(torch.stack([x_, y]).flatten(1))
            strides.append(torch.full((1, rows * columns), stride))
        place, scale = torch.cat(places, 1), torch.cat(strides, 1)
        sides = (boxes.unflatten(1, (4, 16)).softmax(2) * self.distance).sum(2)
        low, high = place - sides[:, :2], place + sides[:, 2:]
        return torch.cat([(low + high) / 2 * scale, (high - low) * scale, classes.sigmoid()], 1)


@model(image=(3, 32, 32))
def yolo_distributed_boxes() -> nn.Module:
    return DistributedBoxes()


class SpatialTransformer(nn.Module):
    """arXiv 1506.02025: the picture is turned and scaled as a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(conv_bn(3, 8, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6))  # fmt: skip
        self.register_buffer("whole", torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        self.body = nn.Sequential(conv_bn(3, 12, stride=2), conv_bn(12, 12), nn.Conv2d(12, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = 0.2 * torch.tanh(self.locate(x)).view(-1, 2, 3) + self.whole
        grid = F.affine_grid(turn, list(x.shape), align_corners=False)
        return self.body(F.grid_sample(x, grid, align_corners=False))


@model(image=(3, 28, 28))
def spatial_transformer() -> nn.Module:
    return SpatialTransformer()
