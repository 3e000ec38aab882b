"""The QAT model computes what the int8 file computes: operator by operator, range by range."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.errors import StageError
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.inspect import model_specs
from edgepipe.tflite_ops.quantize import collect_ranges, fuse_activations, quantize
from edgepipe.tflite_ops.run import open_tflite
from edgepipe.torch_ops.qat import (
    ActivationRange,
    QatModel,
    agreement,
    fake_quantize,
    freeze_after,
    objective,
    quantize_weight,
    range_owners,
    round_ste,
)
from edgepipe.torch_ops.tflite_module import TfliteModule
from edgepipe.torch_ops.train import ArraySet, accuracy, train
from edgepipe.training import TrainingOptions

from .tflite_builder import Graph, small_cnn

pytestmark = pytest.mark.slow  # trainings: not for the inner loop

SHAPE = (1, 6, 7, 4)


def weights(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def conv(g: Graph, x: int, **fields: Any) -> int:
    options = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1, **fields}
    w, b = g.const("w", weights(5, 3, 3, 4)), g.const("b", weights(5))
    size = (1, 6, 7, 5) if not fields.get("padding") else (1, 4, 5, 5)
    if fields.get("strideW") == 2:
        size = (1, 3, 4, 5)
    return g.op("CONV_2D", [x, w, b], "y", size, "Conv2DOptions", **options)


def depthwise(g: Graph, x: int) -> int:
    w, b = g.const("w", weights(1, 3, 3, 8)), g.const("b", weights(8))
    return g.op(
        "DEPTHWISE_CONV_2D", [x, w, b], "y", (1, 3, 4, 8), "DepthwiseConv2DOptions",
        strideW=2, strideH=2, depthMultiplier=2, dilationWFactor=1, dilationHFactor=1,
        fusedActivationFunction=3,
    )  # fmt: skip


def dense(g: Graph, x: int) -> int:
    flat = g.op("RESHAPE", [x, g.const("s", ints(1, 168))], "flat", (1, 168), "ReshapeOptions")
    return g.dense(flat, weights(6, 168), weights(6), "y", (1, 6), fusedActivationFunction=1)


def pool(code: str, **fields: Any) -> Callable[[Graph, int], int]:
    def build(g: Graph, x: int) -> int:
        options = {
            "filterWidth": 3,
            "filterHeight": 2,
            "strideW": 2,
            "strideH": 2,
            "padding": 0,
            **fields,
        }
        return g.op(code, [x], "y", (1, 3, 4, 4), "Pool2DOptions", **options)

    return build


def unary(code: str, options: str | None = None, **fields: Any) -> Callable[[Graph, int], int]:
    return lambda g, x: g.op(code, [x], "y", SHAPE, options, **fields)


def two(code: str, options: str, **fields: Any) -> Callable[[Graph, int], int]:
    """An operator on two computed tensors of different ranges."""

    def build(g: Graph, x: int) -> int:
        other = g.conv(x, weights(4, 1, 1, 4), weights(4), "other", SHAPE)
        shape = (1, 6, 7, 8) if code == "CONCATENATION" else SHAPE
        return g.op(code, [x, other], "y", shape, options, **fields)

    return build


def mean(g: Graph, x: int) -> int:
    return g.op("MEAN", [x, g.const("axes", ints(1, 2))], "y", (1, 4), "ReducerOptions", keepDims=False)  # fmt: skip


def squeeze_excite(g: Graph, x: int) -> int:
    m = g.op("MEAN", [x, g.const("axes", ints(1, 2))], "m", (1, 1, 1, 4), "ReducerOptions", keepDims=True)  # fmt: skip
    a = g.conv(m, weights(4, 1, 1, 4), weights(4), "a", (1, 1, 1, 4))
    s = g.op("LOGISTIC", [a], "s", (1, 1, 1, 4))
    return g.op("MUL", [x, s], "y", SHAPE, "MulOptions")


def padded(g: Graph, x: int) -> int:
    return g.op("PAD", [x, g.const("p", ints([0, 0], [1, 2], [0, 3], [0, 0]))], "y", (1, 9, 10, 4), "PadOptions")  # fmt: skip


def sliced(g: Graph, x: int) -> int:
    begin, end, step = (g.const(n, ints(*v)) for n, v in (("b", (0, 1, 0, 0)), ("e", (1, 6, 7, 3)), ("s", (1, 2, 3, 1))))  # fmt: skip
    return g.op("STRIDED_SLICE", [x, begin, end, step], "y", (1, 3, 3, 3), "StridedSliceOptions")


def resized(code: str, options: str, **fields: Any) -> Callable[[Graph, int], int]:
    return lambda g, x: g.op(code, [x, g.const("s", ints(12, 14))], "y", (1, 12, 14, 4), options, **fields)  # fmt: skip


def softmax(g: Graph, x: int) -> int:
    return g.op("SOFTMAX", [x], "y", SHAPE, "SoftmaxOptions", beta=1.0)


def transposed(g: Graph, x: int) -> int:
    return g.transpose(x, (0, 3, 1, 2), "y", (1, 4, 6, 7))


def transpose_conv(g: Graph, x: int) -> int:
    size, w, b = g.const("s", ints(1, 12, 14, 3)), g.const("w", weights(3, 2, 2, 4)), g.const("b", weights(3))  # fmt: skip
    return g.op("TRANSPOSE_CONV", [size, w, x, b], "y", (1, 12, 14, 3), "TransposeConvOptions", strideW=2, strideH=2, padding=0)  # fmt: skip


PATTERNS: dict[str, Callable[[Graph, int], int]] = {
    "conv": conv,
    "conv relu": lambda g, x: conv(g, x, fusedActivationFunction=1),
    "conv relu6 stride 2": lambda g, x: conv(g, x, fusedActivationFunction=3, strideW=2, strideH=2),
    "conv valid": lambda g, x: conv(g, x, padding=1),
    "depthwise relu6": depthwise,
    "dense relu": dense,
    "average pool": pool("AVERAGE_POOL_2D"),
    "max pool": pool("MAX_POOL_2D"),
    "mean": mean,
    "add": two("ADD", "AddOptions"),
    "add relu": two("ADD", "AddOptions", fusedActivationFunction=1),
    "sub": two("SUB", "SubOptions"),
    "mul": two("MUL", "MulOptions"),
    "concatenation": two("CONCATENATION", "ConcatenationOptions", axis=3),
    "squeeze and excite": squeeze_excite,
    "hard swish": unary("HARD_SWISH", "HardSwishOptions"),
    "logistic": unary("LOGISTIC"),
    "tanh": unary("TANH"),
    "relu": unary("RELU"),
    "gelu": unary("GELU", "GeluOptions"),
    "softmax": softmax,
    "pad": padded,
    "slice": sliced,
    "bilinear": resized("RESIZE_BILINEAR", "ResizeBilinearOptions", halfPixelCenters=True),
    "nearest": resized("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions"),
    "transpose": transposed,
    "transpose conv": transpose_conv,
}


def made(pattern: str) -> bytes:
    g = Graph()
    x = g.input("x", SHAPE)
    return g.bytes([PATTERNS[pattern](g, x)])


def module(content: bytes) -> TfliteModule:
    inputs, outputs = model_specs(parse_model(content, where="m"), where="m")
    return TfliteModule(content, inputs, outputs, where="m")


def samples(count: int = 40, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (count, *shape[1:])).astype(np.float32)


def rounded(content: bytes, x: np.ndarray, *, learned: bool = True) -> QatModel:
    ranges = collect_ranges(content, [[row[None]] for row in x], where="m").table()
    return QatModel(module(content), range_owners(content, where="m"), ranges, learned=learned)


def in_litert(content: bytes, x: np.ndarray) -> np.ndarray:
    interpreter = open_tflite(content)
    (given,), (got,) = interpreter.get_input_details(), interpreter.get_output_details()
    found = []
    for row in x:
        interpreter.set_tensor(given["index"], row[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(got["index"]).copy())
    return np.concatenate(found)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_operator_computes_what_litert_computes(pattern: str) -> None:
    content, x = made(pattern), samples(8)
    with torch.no_grad():
        ours = module(content)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, in_litert(content, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_operator_rounds_as_its_int8_kernel_does(pattern: str) -> None:
    content, x = made(pattern), samples()
    model = rounded(content, x)
    int8 = quantize(model.baked(content), model.learned_ranges(), where="m")
    found = agreement(model, int8, [[row[None]] for row in x], where="m")
    assert found.within_one == 1.0
    # these two kernels round ties away from zero, and interpolate in steps of 1/1024
    assert found.equal > {"average pool": 0.85, "bilinear": 0.93}.get(pattern, 0.999)


def test_several_inputs_of_other_layouts_are_taken_as_the_source_model_does() -> None:
    content = small_cnn()
    inputs, outputs = model_specs(parse_model(content, where="m"), where="m")
    nchw = dataclasses.replace(inputs[0], source_layout="NCHW")
    x = samples(5, (1, 6, 6, 3))
    body = TfliteModule(content, (nchw,), outputs, where="m")
    with torch.no_grad():
        ours = body(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(ours, in_litert(content, x), atol=1e-5)


def test_an_operator_that_is_not_known_is_named() -> None:
    g = Graph()
    y = g.op("CUMSUM", [g.input("x", (1, 4)), g.const("a", ints(1))], "y", (1, 4), "CumsumOptions")
    with pytest.raises(StageError, match="CUMSUM") as caught:
        module(g.bytes([y]))
    assert "quantise it without this stage" in caught.value.hint


@given(st.floats(-8, 0), st.floats(0.01, 8), st.lists(st.floats(-20, 20), min_size=1, max_size=20))
def test_fake_quantization_is_the_specifications_formula(
    low: float, high: float, values: list[float]
) -> None:
    scale, zero = ActivationRange(low, high).scale()
    s, z = np.float32(scale.detach()), np.float32(zero.detach())
    x = np.array(values, np.float32)
    stored = np.clip(np.rint(x / s) + z, -128, 127)
    ours = fake_quantize(torch.from_numpy(x), scale, zero).detach().numpy()
    np.testing.assert_array_equal(ours, ((stored - z) * s).astype(np.float32))


def test_both_ends_of_a_range_are_learned() -> None:
    """The gradient of a clipped value goes to the end that clips it, that of an inner one through."""
    unit = ActivationRange(-1.0, 1.0)
    x = torch.tensor([5.0, 0.3, -5.0], requires_grad=True)
    unit(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]
    assert unit.factor.grad is not None
    low, high = unit.factor.grad.tolist()
    assert low < 0 < high  # widening either end lets its value through: down for low, up for high


def test_the_gradient_is_that_of_the_formula_written_operator_by_operator() -> None:
    values = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0)) * 3
    found = []
    for rounding in (fake_quantize, by_operators):
        unit, x = ActivationRange(-1.3, 2.1), values.clone().requires_grad_(True)
        run = torch.vmap(lambda v, f=rounding, u=unit: f(v, *u.scale()))  # type: ignore[misc]
        (run(x) * values).sum().backward()
        assert x.grad is not None
        assert unit.factor.grad is not None
        found.append((x.grad, unit.factor.grad))
    torch.testing.assert_close(found[0], found[1])


def by_operators(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (torch.clamp(round_ste(x / scale) + zero, -128, 127) - zero) * scale


@pytest.mark.parametrize(
    ("code", "plain"), [(1, torch.nn.ReLU()), (2, torch.nn.Hardtanh()), (3, torch.nn.ReLU6())]
)
def test_a_fused_activation_passes_the_gradient_that_its_module_passed(
    code: int, plain: torch.nn.Module
) -> None:
    g = Graph()
    zeros = g.const("zeros", np.zeros((1, 1), np.float32))
    y = g.op("ADD", [g.input("x", (1, 40)), zeros], "y", (1, 40), "AddOptions", fusedActivationFunction=code)  # fmt: skip
    x = torch.arange(-20, 20).div(2).expand(3, 40)  # the ends themselves are among these
    found = []
    for function in (module(g.bytes([y])), plain):
        own = x.clone().requires_grad_(True)
        (function(own) * x).sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_fused_activation_keeps_one_tensor_for_the_way_back() -> None:
    """What goes into the activation is dropped, what comes out is kept once: rounding needs it as well."""
    g = Graph()
    x = g.input("x", (1, 6, 7, 4))
    w, b = g.const("w", weights(5, 3, 3, 4)), g.const("b", weights(5))
    y = g.op(
        "CONV_2D", [x, w, b], "y", (1, 6, 7, 5), "Conv2DOptions",
        strideW=1, strideH=1, dilationWFactor=1, dilationHFactor=1, fusedActivationFunction=1,
    )  # fmt: skip
    batch = torch.from_numpy(samples())
    model = rounded(g.bytes([y]), batch.numpy())
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == len(batch) * 6 * 7 * 5:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(batch)
    assert len(kept) == 1
    out.sum().backward()


def test_weights_are_on_the_grid_of_their_own_channel() -> None:
    w = torch.tensor([[1.0, -0.5, 0.1], [100.0, 3.0, 0.0]])
    steps = quantize_weight(w, 0) / torch.tensor([[1 / 127], [100 / 127]])
    torch.testing.assert_close(steps, torch.tensor([[127.0, -64.0, 13.0], [127.0, 4.0, 0.0]]))


def trained(content: bytes, **options: Any) -> tuple[QatModel, ArraySet]:
    labels = np.arange(200) % 3
    x = samples(200, (1, 6, 6, 3)) + 1.5 * np.eye(3, dtype=np.float32)[labels][:, None, None]
    model = rounded(content, x[:50])
    data = ArraySet([x], labels)
    settings = TrainingOptions(**{"epochs": 6, "batch_size": 20, "lr": 2e-2, "weight_decay": 0.0})
    train(
        model, data, settings, seed=0, stage="qat",
        objective=objective(0.0, None, 0.0), after_step=freeze_after(model, options.get("freeze", 1.0)),
    )  # fmt: skip
    return model, data


def test_what_was_trained_is_in_the_int8_file_to_the_last_scale() -> None:
    content, _ = fuse_activations(small_cnn(), where="m")
    model, data = trained(content)
    before = rounded(content, data.inputs[0][:50].numpy())
    assert accuracy(model, data) > accuracy(before, data) + 0.2
    learned = model.learned_ranges()
    assert learned["conv"] != before.learned_ranges()["conv"]
    int8 = quantize(model.baked(content), learned, where="m")
    stored = {t.name: t for t in parse_model(int8, where="m").subgraphs[0].tensors}
    for name, owner in model.owners.owner.items():
        low, high = learned[owner]
        assert stored[name].scales[0] == pytest.approx((high - low) / 255, rel=1e-6)
        assert stored[name].zero_points[0] == round(-128 - low / ((high - low) / 255))
    x = samples(100, (1, 6, 6, 3), seed=5)
    found = agreement(model, int8, [[row[None]] for row in x], where="m")
    assert found.within_one > 0.999


def test_frozen_ranges_stay_while_weights_move() -> None:
    content, _ = fuse_activations(small_cnn(), where="m")
    model, data = trained(content, freeze=0.0)
    start = rounded(content, data.inputs[0][:50].numpy()).learned_ranges()
    after = model.learned_ranges()
    # the step that freezes comes after the first step of the optimiser
    assert all(abs(after[n][1] - start[n][1]) < 0.25 * start[n][1] for n in start)
    moved, _ = trained(content, freeze=1.0)
    assert any(abs(moved.learned_ranges()[n][1] - after[n][1]) > 0.01 for n in start)


@pytest.mark.slow
def test_a_published_model_rounds_as_its_int8_file_does(data_dir: Path) -> None:
    where = "vww_96_float.tflite"
    content, _ = fuse_activations((data_dir / "mlperf-tiny" / where).read_bytes(), where=where)
    coarse = np.random.default_rng(0).uniform(0, 1, (6, 4, 4, 3))
    x = coarse.repeat(24, 1).repeat(24, 2).astype(np.float32)
    model = rounded(content, x)
    int8 = quantize(model.baked(content), model.learned_ranges(), where=where)
    assert agreement(model, int8, [[row[None]] for row in x], where=where).within_one == 1.0
