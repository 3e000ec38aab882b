"""Small networks of many architectures, as anyone would write them in PyTorch: what the converters are tried on.

Each file holds one family; a function with `@model` builds one network, and its name is that of the
function. Inputs are small, so that a conversion takes seconds. `settle` gives every network seeded
weights and batch-norm statistics that are not those of a fresh network: activations near unit
variance at every layer, gains and shifts that matter, so that a wrong layer shows in the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An input of whole numbers from 0 to ``count`` - 1, int64."""

    shape: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """``inputs``: name -> shape of one sample without its batch. ``builder`` is "module:function"."""

    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, tuple[int, ...] | Tokens]

    @property
    def builder(self) -> str:
        return f"{self.build.__module__}:{self.build.__name__}"

    @property
    def family(self) -> str:
        return self.build.__module__.rpartition(".")[2]


MODELS: dict[str, ZooModel] = {}


def model(**inputs: tuple[int, ...] | Tokens) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:  # fmt: skip
    """Register the decorated function: ``@model(image=(3, 64, 64))``."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if build.__name__ in MODELS:
            raise ValueError(f"there are two models named {build.__name__}")
        MODELS[build.__name__] = ZooModel(build.__name__, build, inputs)
        return build

    return register


def samples(entry: ZooModel, count: int, *, seed: int) -> dict[str, np.ndarray]:
    """Seeded inputs by name, (count, ...): smooth signals with noise, float32, or tokens, int64."""
    random = torch.Generator().manual_seed(seed)
    made: dict[str, np.ndarray] = {}
    for name, shape in entry.inputs.items():
        if isinstance(shape, Tokens):
            made[name] = torch.randint(shape.count, (count, *shape.shape), generator=random).numpy()
            continue
        value = 0.4 * torch.randn((count, *shape), generator=random)
        axes = shape[1:]  # a smooth signal over all but the channels: one coarse value every 8
        if axes:
            coarse = torch.randn((count, shape[0], *(max(2, n // 8) for n in axes)), generator=random)  # fmt: skip
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(axes)]
            value = value + F.interpolate(coarse, size=axes, mode=mode, align_corners=True)
        else:
            value = value + torch.randn((count, *shape), generator=random)
        made[name] = value.numpy()
    return made


def settled(entry: ZooModel, *, seed: int = 0) -> nn.Module:
    """The network in evaluation mode with seeded weights; the same seed gives the same weights.

    Weights of every convolution and matrix are scaled so that on seeded data its outputs have unit
    variance (layer-sequential unit variance, Mishkin and Matas, arXiv 1511.06422, in one pass);
    gains and shifts of normalisations and slopes of PReLU are drawn; then batch norm averages its
    statistics over two batches.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = entry.build()
        _draw_gains(network)
        network.train()
        handles = [
            module.register_forward_hook(_scale_to_unit_variance)
            for module in network.modules()
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        ]
        _run(network, samples(entry, 8, seed=seed))
        for handle in handles:
            handle.remove()
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average of all batches
        for batch in (1, 2) if norms else ():
            _run(network, samples(entry, 8, seed=seed + batch))
        for norm in norms:
            norm.momentum = 0.1
    return network.eval()


def _run(network: nn.Module, inputs: dict[str, np.ndarray]) -> None:
    network(*(torch.from_numpy(array) for array in inputs.values()))


def _draw_gains(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(0.05, 0.4)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            if module.weight is not None:
                module.weight.uniform_(0.6, 1.4)
                module.bias.normal_(std=0.2)
        elif (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.weight is not None
        ):
            module.weight.uniform_(0.6, 1.4)
            module.bias.normal_(std=0.2)


def _scale_to_unit_variance(module: nn.Module, _: Sequence[torch.Tensor], output: torch.Tensor) -> torch.Tensor:  # fmt: skip
    spread = output.std()
    if not spread > 1e-6:
        return output
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            parameter.div_(spread)
    return output / spread


# the families register themselves
from zoo_models import (  # noqa: E402
    audio,
    classic,
    dense_prediction,
    image_to_image,
    language,
    mobile,
    operators,
    residual,
    sequence,
    transformer,
)

__all__ = [
    "MODELS",
    "Tokens",
    "ZooModel",
    "audio",
    "classic",
    "dense_prediction",
    "image_to_image",
    "language",
    "mobile",
    "model",
    "operators",
    "residual",
    "samples",
    "sequence",
    "settled",
    "transformer",
]
