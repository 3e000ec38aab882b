"""Three float networks that plain int8 ruins, on scikit-learn's digits; no training beyond least squares.

Each is random features with a fault that real networks have, and a last layer fitted to them. In
float they read digits well; ``samples`` and ``labels`` are what they were not fitted to.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgepipe.tflite_ops.run import open_tflite

from .tflite_builder import Graph

RELU = schema.ActivationFunctionType.RELU
VALID = schema.Padding.VALID
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Net:
    """``calibration`` and ``samples`` (n, 8, 8, 1) float32, ``labels`` (n,); the scores are the
    outputs from ``first_score`` on. ``fault`` is a part of what the record should say of it."""

    content: bytes
    calibration: np.ndarray
    samples: np.ndarray
    labels: np.ndarray
    first_score: int
    fault: str

    def accuracy(self, content: bytes) -> float:
        """Share of ``samples`` that a file with float or int8 doors gets right."""
        from edgepipe.tflite_ops.sensitivity import outputs_of

        (found,) = outputs_of(content, [[x[None]] for x in self.samples], where="net")
        scores = found.reshape(len(found), -1)[:, self.first_score :]
        return float((scores.argmax(axis=1) == self.labels).mean())


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8, 1) float32 from 0 to 1, and (1797,) labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32), y


def _fitted(build, first_score, fault, *, regress=False):
    """``build(head)`` makes the graph's bytes: of features (head None), then with the fitted layer."""
    x, y = digits()
    fit = slice(0, 1200)
    model = open_tflite(build(None))
    features = []
    for image in x[fit]:
        model.set_tensor(model.get_input_details()[0]["index"], image[None])
        model.invoke()
        features.append(model.get_tensor(model.get_output_details()[0]["index"]).ravel())
    a = np.array(features, np.float64)
    targets = np.eye(CLASSES)[y[fit]] * 2 - 1
    if regress:  # where the ink is: four coordinates in a picture of 320 x 320
        rows = (x[fit, ..., 0].sum(axis=2) * np.arange(8)).sum(axis=1) / x[fit].sum(axis=(1, 2, 3))
        columns = (x[fit, ..., 0].sum(axis=1) * np.arange(8)).sum(axis=1) / x[fit].sum(axis=(1, 2, 3))  # fmt: skip
        boxes = np.stack([rows - 3, columns - 2, rows + 3, columns + 2], 1).clip(0, 8) * 40
        targets = np.hstack([boxes, targets])
    centred = a - a.mean(axis=0)
    # ridge regression, stiff enough that no weight is large: the fault alone shall spoil int8
    power = 0.3 * float((centred**2).sum(axis=0).mean())
    weights = np.linalg.solve(centred.T @ centred + power * np.eye(a.shape[1]), centred.T @ (targets - targets.mean(axis=0))).T  # fmt: skip
    bias = targets.mean(axis=0) - weights @ a.mean(axis=0)
    content = build((weights.astype(np.float32), bias.astype(np.float32)))
    return Net(content, x[:200], x[1200:], y[1200:], first_score, fault)


def _weights(generator, *shape):
    fan_in = int(np.prod(shape[1:]))
    return generator.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)


@functools.cache
def dead_batch_norm(seed: int = 0) -> Net:
    """Convolution and ReLU, a batch norm, a 1x1 convolution into which a converter folds it.

    6 of 24 channels never get over their ReLU: the batch norm has found a variance of 1e-40 there,
    so its gain is 1 / sqrt(1e-40 + 1e-5) = 316 and so are the folded weights, which multiply zeros.
    """

    def build(head):
        generator = np.random.default_rng(seed)
        graph = Graph()
        x = graph.input("image", (1, 8, 8, 1))
        first, bias = _weights(generator, 24, 3, 3, 1), generator.normal(0, 0.2, 24).astype(np.float32)  # fmt: skip
        first[18:], bias[18:] = 0, -1
        y = graph.conv(x, first, bias, "first", (1, 8, 8, 24), fusedActivationFunction=RELU)
        variance = np.where(np.arange(24) < 18, 1.0, 1e-40)
        gain = generator.uniform(0.5, 1.5, 24) / np.sqrt(variance + 1e-5)
        folded = (_weights(generator, 32, 1, 1, 24) * gain).astype(np.float32)
        y = graph.conv(y, folded, np.zeros(32, np.float32), "second", (1, 8, 8, 32), fusedActivationFunction=RELU)  # fmt: skip
        y = graph.op("AVERAGE_POOL_2D", [y], "pool", (1, 4, 4, 32), "Pool2DOptions", strideW=2, strideH=2, filterWidth=2, filterHeight=2, padding=VALID)  # fmt: skip
        shape = graph.const("shape", np.array([1, 512], np.int32))
        y = graph.op("RESHAPE", [y, shape], "flat", (1, 512))
        if head is not None:
            y = graph.dense(y, *head, "scores", (1, CLASSES))
        return graph.bytes([y])

    return _fitted(build, 0, "dead channel")


@functools.cache
def wide_swish(seed: int = 0) -> Net:
    """A convolution with swish, 4 of whose 32 channels are a hundred times as large as the rest.

    Swish is x * sigmoid(x), so no factor commutes with it. The next layer has weights to match.
    """

    def build(head):
        generator = np.random.default_rng(seed)
        graph = Graph()
        x = graph.input("image", (1, 8, 8, 1))
        size = np.where(np.arange(32) < 28, 0.1, 10.0).astype(np.float32)
        first = _weights(generator, 32, 3, 3, 1) * size[:, None, None, None]
        bias = (generator.normal(0, 0.2, 32) * size).astype(np.float32)
        y = graph.conv(x, first, bias, "first", (1, 8, 8, 32))
        y = _swish(graph, y, "swish", (1, 8, 8, 32))
        second = _weights(generator, 32, 3, 3, 32) / size
        second[:4, ..., :28] = 0  # 4 channels read the large ones, the others the small ones
        second[4:, ..., 28:] = 0
        y = graph.conv(y, second, np.zeros(32, np.float32), "second", (1, 8, 8, 32), fusedActivationFunction=RELU)  # fmt: skip
        y = graph.op("AVERAGE_POOL_2D", [y], "pool", (1, 4, 4, 32), "Pool2DOptions", strideW=2, strideH=2, filterWidth=2, filterHeight=2, padding=VALID)  # fmt: skip
        shape = graph.const("shape", np.array([1, 512], np.int32))
        y = graph.op("RESHAPE", [y, shape], "flat", (1, 512))
        if head is not None:
            y = graph.dense(y, *head, "scores", (1, CLASSES))
        return graph.bytes([y])

    return _fitted(build, 0, "its largest channel is")


def _swish(graph, x, name, shape):
    gate = graph.op("LOGISTIC", [x], f"{name}/gate", shape)
    return graph.op("MUL", [x, gate], name, shape, "MulOptions")


@functools.cache
def detector_head(seed: int = 0) -> Net:
    """Boxes from 0 to 320 and scores from 0 to 1 in one output: int8 has steps of 1.25 for both."""

    def build(head):
        generator = np.random.default_rng(seed)
        graph = Graph()
        x = graph.input("image", (1, 8, 8, 1))
        first, bias = _weights(generator, 24, 3, 3, 1), generator.normal(0, 0.2, 24).astype(np.float32)  # fmt: skip
        y = graph.conv(x, first, bias, "first", (1, 8, 8, 24), fusedActivationFunction=RELU)
        y = graph.op("AVERAGE_POOL_2D", [y], "pool", (1, 4, 4, 24), "Pool2DOptions", strideW=2, strideH=2, filterWidth=2, filterHeight=2, padding=VALID)  # fmt: skip
        shape = graph.const("shape", np.array([1, 384], np.int32))
        y = graph.op("RESHAPE", [y, shape], "flat", (1, 384))
        if head is None:
            return graph.bytes([y])
        weights, bias = head
        boxes = graph.dense(y, weights[:4], bias[:4], "boxes", (1, 4), fusedActivationFunction=RELU)
        logits = graph.dense(y, weights[4:], bias[4:], "logits", (1, CLASSES))
        scores = graph.op("SOFTMAX", [logits], "scores", (1, CLASSES), "SoftmaxOptions", beta=1.0)
        both = graph.op("CONCATENATION", [boxes, scores], "both", (1, 4 + CLASSES), "ConcatenationOptions", axis=1)  # fmt: skip
        return graph.bytes([both])

    return _fitted(build, 4, "both", regress=True)


NETS = {
    "dead_batch_norm": dead_batch_norm,
    "wide_swish": wide_swish,
    "detector_head": detector_head,
}
