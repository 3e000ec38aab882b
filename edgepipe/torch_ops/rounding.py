"""AdaRound: round each weight up or down as the layer's output likes it, not to the nearest step.

Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization": layer by layer, on
what the layer is given in the int8 model, against what it makes in the float model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from edgepipe.tflite_ops.flatbuffer import (
    Operator,
    Subgraph,
    Tensor,
    constants,
    parse_model,
    with_constants,
)
from edgepipe.tflite_ops.run import invoke_once, open_tflite
from edgepipe.tflite_ops.run import quantize as stored
from edgepipe.torch_ops.tflite_module import OPERATORS, WEIGHTED

log = logging.getLogger(__name__)

# Section 4 of the paper: stretched sigmoid, learning rate, and the annealing of the regulariser
ZETA, GAMMA = 1.1, -0.1
LEARNING_RATE, WEIGHT = 1e-2, 0.01
BETA_START, BETA_END, WARM_UP = 20.0, 2.0, 0.2
BATCH = 16
# Bounds of the work for one layer: steps, and multiplications over all steps (about a second)
STEPS, MOST_MACS = 500, 2e10
LEAST_STEPS = 20
# Of what a layer is given and makes, over all samples
MOST_BYTES = 256 * 2**20


def round_weights(
    float_content: bytes,
    int8_content: bytes,
    batches: Sequence[Sequence[np.ndarray]],
    *,
    seed: int = 0,
    where: str = "the model",
) -> tuple[bytes, str]:
    """The float file with the weights of convolutions and dense layers on their int8 grid, and how
    many layers were done.

    ``int8_content`` was quantised from the float file and gives each layer its grid; quantising the
    result by the same ranges finds the same grid, so the choice survives. Layers whose work does not
    fit `MOST_MACS` keep nearest rounding. ``batches`` hold real inputs of the float file, one
    inference each.
    """
    graph = parse_model(float_content, where=where).subgraphs[0]
    integer = parse_model(int8_content, where=where).subgraphs[0]
    by_name = {t.name: t for t in integer.tensors}
    values = constants(float_content, graph)
    used = [i for o in graph.operators for i in o.inputs]
    chosen: dict[int, np.ndarray] = {}
    generator = torch.Generator().manual_seed(seed)
    for operator in graph.operators:
        if operator.name not in WEIGHTED or operator.name == "TRANSPOSE_CONV":
            continue
        index = operator.inputs[1]
        grid = by_name.get(graph.tensors[index].name)
        if index not in values or grid is None or grid.dtype != "int8" or used.count(index) > 1:
            continue
        macs = _macs(operator, graph)
        steps = int(min(STEPS, MOST_MACS / max(3 * macs * BATCH, 1)))
        if steps < LEAST_STEPS:
            continue
        rounded = _round_layer(
            operator, graph, values, grid, float_content, int8_content, by_name, batches,
            steps=steps, generator=generator, where=where,
        )  # fmt: skip
        if rounded is not None:
            chosen[index] = rounded
            log.debug("rounded %s in %d steps", graph.tensors[operator.outputs[0]].name, steps)
    return with_constants(
        float_content, chosen
    ), f"weights of {len(chosen)} layers rounded by AdaRound"


def _macs(operator: Operator, graph: Subgraph) -> int:
    shape = graph.tensors[operator.inputs[1]].shape
    out = graph.tensors[operator.outputs[0]].shape
    if operator.name == "FULLY_CONNECTED":
        return int(np.prod(shape))
    positions = int(np.prod(out[1:3]))
    return positions * int(np.prod(shape))


def _round_layer(
    operator: Operator, graph: Subgraph, values: dict[int, np.ndarray], grid: Tensor,
    float_content: bytes, int8_content: bytes, by_name: dict[str, Tensor],
    batches: Sequence[Sequence[np.ndarray]], *, steps: int, generator: torch.Generator, where: str,
) -> np.ndarray | None:  # fmt: skip
    """The layer's weights on their grid, or None where the int8 file does not hold its tensors."""
    given, made = graph.tensors[operator.inputs[0]], graph.tensors[operator.outputs[0]]
    source = by_name.get(given.name)
    if source is None or not source.scales:
        return None
    held = 4 * int(np.prod(given.shape) + np.prod(made.shape))
    batches = batches[: max(BATCH, MOST_BYTES // held)]
    # the first axis of a convolution is the file's batch, of a dense layer it may be anything
    flat = operator.name != "FULLY_CONNECTED"
    x = torch.from_numpy(_tensor_values(int8_content, source, batches, flat=flat, where=where))
    wanted = torch.from_numpy(_tensor_values(float_content, made, batches, flat=flat, where=where))
    weight = torch.from_numpy(values[operator.inputs[1]])
    bias_index = operator.inputs[2] if len(operator.inputs) > 2 else -1
    bias = torch.from_numpy(values[bias_index]) if bias_index >= 0 else None
    axis = WEIGHTED[operator.name]
    scale = torch.tensor(grid.scales).reshape([-1 if i == axis and len(grid.scales) > 1 else 1 for i in range(weight.ndim)])  # fmt: skip
    steps_of = weight / scale
    floor = steps_of.floor()
    rest = (steps_of - floor).clamp(1e-4, 1 - 1e-4)
    # h(v) = rest at first, so the layer begins as in float (eq. 23)
    v = torch.log((rest - GAMMA) / (ZETA - GAMMA) / (1 - (rest - GAMMA) / (ZETA - GAMMA)))
    v.requires_grad_(True)
    method = torch.optim.Adam([v], lr=LEARNING_RATE)
    # so that one weight of the regulariser suits layers of any size
    power = float((wanted**2).mean()) or 1.0
    for step in range(steps):
        rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
        h = (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        w = ((floor + h).clamp(-127, 127)) * scale
        loss = ((_run(operator, x[rows], w, bias, graph) - wanted[rows]) ** 2).mean() / power
        share = step / steps
        if share > WARM_UP:
            done = (share - WARM_UP) / (1 - WARM_UP)
            beta = BETA_END + (BETA_START - BETA_END) * (1 + np.cos(done * np.pi)) / 2
            loss = loss + WEIGHT * (1 - (2 * h - 1).abs() ** beta).mean()
        method.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        method.step()
    with torch.no_grad():
        up = torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA >= 0.5
        nearest = steps_of.round().clamp(-127, 127)
        learned = (floor + up).clamp(-127, 127)
        # the largest weight decides the scale: it has to stay where it is
        learned = torch.where(nearest.abs() == 127, nearest, learned)
        errors = [
            float(((_run(operator, x, q * scale, bias, graph) - wanted) ** 2).mean())
            for q in (nearest, learned)
        ]
        best = learned if errors[1] < errors[0] else nearest
        return np.asarray((best * scale).numpy(), np.float32)


def _run(
    operator: Operator, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, graph: Subgraph
) -> torch.Tensor:
    """The layer on (B, ...) inputs as the file has them."""
    if operator.name == "FULLY_CONNECTED":
        y = functional.linear(x.reshape(len(x), -1, w.shape[1]), w, b)
        shape = graph.tensors[operator.outputs[0]].shape
        name = operator.options.get("fused_activation_function", "NONE")
        y = y.reshape(len(x), *shape[1:]) if shape[0] == 1 else y.reshape(len(x), *shape)
        if name == "RELU":
            return y.clamp_min(0)
        return y.clamp(0, 6) if name == "RELU6" else y
    made: torch.Tensor = OPERATORS[operator.name](operator, [x, w, b], graph)[0]
    return made


def _tensor_values(
    content: bytes, tensor: Tensor, batches: Sequence[Sequence[np.ndarray]], *, flat: bool, where: str
) -> np.ndarray:  # fmt: skip
    """Real values of one tensor for each inference: (N, ...) float32, the file's batch of 1 as N; with
    ``flat`` a batch of B as well: (N * B, ...)."""
    interpreter = open_tflite(content, preserve_all_tensors=True)
    rows = []
    for batch in batches:
        for detail, array in zip(interpreter.get_input_details(), batch, strict=True):
            interpreter.set_tensor(detail["index"], stored(array, detail))
        invoke_once(interpreter, where=where)
        values = interpreter.get_tensor(tensor.index)
        if tensor.scales:
            values = (values.astype(np.float32) - tensor.zero_points[0]) * np.float32(tensor.scales[0])  # fmt: skip
        rows.append(values if flat or values.shape[:1] == (1,) else values[np.newaxis])
    return np.concatenate(rows)
