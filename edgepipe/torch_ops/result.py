"""What every compressing stage does with its result: save it, prove that it loads, say what changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgepipe.errors import StageError
from edgepipe.torch_ops.model import ModelDescription, build_model, load_model, save_model
from edgepipe.torch_ops.run import count_macs, same_outputs

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that holds parameters. ``bytes`` are those of its int8 form: weights 1, biases 4.

    ``macs`` are for one sample; ``note`` says what a stage did to it and why.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    bytes: int
    note: str = ""


def describe_layers(
    model: nn.Module, inputs: Sequence[torch.Tensor], notes: Mapping[str, str] | None = None
) -> tuple[Layer, ...]:
    """The layers of ``model`` with parameters of their own, in the order in which they run.

    MACs are counted from each layer's own input and output: a convolution does (output values) x
    (inputs per group) x (kernel size), an LSTM or GRU all its matrices at each step. Layers that never
    run are left out.
    """
    ran: dict[str, int] = {}
    hooks = []

    def counting(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], result: Any) -> None:
            ran[name] = ran.get(name, 0) + _macs(module, given, result)

        return hook

    modules = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}  # fmt: skip
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(counting(name, module)))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for name, macs in ran.items():
        parameters = list(modules[name].parameters(recurse=False))
        largest = max(parameters, key=torch.numel)
        layers.append(
            Layer(
                name=name,
                kind=type(modules[name]).__name__,
                shape=tuple(largest.shape),
                parameters=sum(p.numel() for p in parameters),
                macs=macs,
                bytes=sum(p.numel() * (4 if p.ndim == 1 else 1) for p in parameters),
                note=(notes or {}).get(name, ""),
            )
        )
    return tuple(layers)


def _macs(module: nn.Module, given: tuple[Any, ...], result: Any) -> int:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # each matrix once a step: LSTM, GRU, RNN
        steps = 1
        if isinstance(module, nn.RNNBase):  # (T, N, C), (N, T, C) or (T, C)
            steps = given[0].shape[1 if module.batch_first and given[0].ndim == 3 else 0]
        return int(steps * sum(p.numel() for p in module.parameters() if p.ndim == 2))
    output = result[0] if isinstance(result, tuple) else result
    weight = getattr(module, "weight", None)
    if not isinstance(output, torch.Tensor) or not isinstance(weight, torch.Tensor) or weight.ndim < 2:  # fmt: skip
        return 0
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return int(given[0].numel() // len(given[0]) * weight[0].numel())
    if isinstance(module, nn.Embedding):
        return 0
    return int(output.numel() // len(output) * weight[0].numel())


def describe_builder(
    description: ModelDescription, shape: Sequence[int]
) -> tuple[tuple[Layer, ...], int]:
    """Layers of what a builder makes for one input of ``shape``, and MACs in all.

    These are also those of matrix products between activations, which belong to no layer.
    """
    model = build_model(description).eval()
    inputs = [torch.zeros(tuple(shape))]
    return describe_layers(model, inputs), count_macs(model, inputs)


def totals(layers: Sequence[Layer]) -> dict[str, int]:
    """Parameters, MACs and int8 bytes of all layers together."""
    return {
        "parameters": sum(layer.parameters for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "bytes": sum(layer.bytes for layer in layers),
    }


def save_result(
    before: Sequence[Layer],
    model: nn.Module,
    folder: Path,
    description: ModelDescription,
    inputs: Sequence[torch.Tensor],
    *,
    stage: str,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Save ``model``, load it again, and return the facts of the artifact.

    ``before`` are the layers of the model that the stage was given, ``notes`` what it did to a layer
    (by name). The facts are ``before`` and ``after`` (totals), ``layers_before`` and ``layers``.
    Raises StageError where what was saved does not give the same outputs, bit for bit.
    """
    model = model.eval()
    save_model(model, folder, description)
    if not same_outputs(model, load_model(folder), inputs):
        raise StageError(
            f"the saved model does not give the outputs of the one that {stage} made",
            stage=stage,
            hint="does the builder draw random numbers that are no parameters or buffers? Make them buffers",
            code="not-reproducible",
        )
    after = describe_layers(model, inputs, notes)
    was, now = totals(before), totals(after)
    log.info(
        "%s: %.3g -> %.3g million MACs, %d -> %d parameters",
        stage, was["macs"] / 1e6, now["macs"] / 1e6, was["parameters"], now["parameters"],
    )  # fmt: skip
    return {
        "before": was,
        "after": now,
        "layers_before": [dataclasses.asdict(layer) for layer in before],
        "layers": [dataclasses.asdict(layer) for layer in after],
    }
