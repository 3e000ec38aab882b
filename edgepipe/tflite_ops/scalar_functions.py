"""Which well-known function a few elementwise operators compute together: found by value, not by form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from edgepipe.tflite_ops.flatbuffer import Operator, Subgraph

# An erf that an exporter spells out takes 20 to 30 operators.
MAX_OPERATORS = 40
# Between these a function is compared; beyond, those below are 0, x, or saturated.
GRID = np.linspace(-15.0, 15.0, 6001)
# The polynomials for erf that are in use are off by up to 2.5e-5 (Abramowitz and Stegun, 7.1.25 to 7.1.28).
TOLERANCE = 5e-5


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x]))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


# GELU: Hendrycks and Gimpel 2016, section 2; hard swish: Howard 2019, eq. 3; mish: Misra 2019, eq. 1
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "GELU": _gelu,
    "GELU (tanh)": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "HARD_SWISH": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "softplus": _softplus,
}  # fmt: skip

_ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "ABS": np.abs,
    "ADD": np.add,
    "CAST": np.asarray,
    "DIV": np.divide,
    "EQUAL": np.equal,
    "EXP": np.exp,
    "GREATER": np.greater,
    "GREATER_EQUAL": np.greater_equal,
    "LESS": np.less,
    "LESS_EQUAL": np.less_equal,
    "LOG": np.log,
    "LOGISTIC": lambda x: 1 / (1 + np.exp(-x)),
    "MAXIMUM": np.maximum,
    "MINIMUM": np.minimum,
    "MUL": np.multiply,
    "NEG": np.negative,
    "POW": np.power,
    "RELU": lambda x: np.maximum(x, 0),
    "RELU6": lambda x: np.clip(x, 0, 6),
    "RELU_0_TO_1": lambda x: np.clip(x, 0, 1),
    "RELU_N1_TO_1": lambda x: np.clip(x, -1, 1),
    "RSQRT": lambda x: 1 / np.sqrt(x),
    "SELECT": np.where,
    "SELECT_V2": np.where,
    "SIGN": np.sign,
    "SQRT": np.sqrt,
    "SQUARE": np.square,
    "SUB": np.subtract,
    "TANH": np.tanh,
}


@dataclasses.dataclass(frozen=True)
class Found:
    """``name`` of `FUNCTIONS` of the tensor ``source``, computed by ``operators`` (their numbers)."""

    name: str
    source: int
    operators: tuple[int, ...]


def find_function(
    last: Operator, graph: Subgraph, constants: Mapping[int, np.ndarray]
) -> Found | None:
    """The function that ends in ``last``, or None: of one tensor of the same shape and dtype, by 2 operators or more.

    The graph is walked back from ``last`` through elementwise operators with constants of one value.
    Wherever all that is left to compute from is one tensor, what lies behind is evaluated on `GRID`.
    """
    makers = {i: o for o in graph.operators for i in o.outputs}
    open_tensors = {last.outputs[0]}
    region: list[Operator] = []
    result: Found | None = None
    while len(region) < MAX_OPERATORS:
        made = [t for t in open_tensors if t in makers]
        if not made:
            break
        # the latest first, so that all that is made from a tensor comes before its own maker
        operator = makers[max(made, key=lambda t: makers[t].index)]
        if not _is_elementwise(operator, constants):
            break
        region.append(operator)
        open_tensors -= set(operator.outputs)
        open_tensors |= {i for i in operator.inputs if i >= 0 and i not in constants}
        if len(region) > 1 and len(open_tensors) == 1:
            (source,) = open_tensors
            x, y = graph.tensors[source], graph.tensors[last.outputs[0]]
            same = (x.shape, x.dtype) == (y.shape, y.dtype)
            name = _name(region, source, last.outputs[0], constants) if same else ""
            if name:
                result = Found(name, source, tuple(o.index for o in region))
    return result


def _is_elementwise(operator: Operator, constants: Mapping[int, np.ndarray]) -> bool:
    values = [constants[i] for i in operator.inputs if i in constants]
    uniform = all(v.size and (v == v.flat[0]).all() for v in values)
    clamp = operator.options.get("fused_activation_function", "NONE")
    return operator.name in _ELEMENTWISE and uniform and (clamp == "NONE" or clamp in _ELEMENTWISE)


def _name(
    region: list[Operator], source: int, result: int, constants: Mapping[int, np.ndarray]
) -> str:
    values: dict[int, np.ndarray] = {source: GRID}
    with np.errstate(all="ignore"):
        for operator in reversed(region):
            inputs = [
                values[i] if i in values else np.full_like(GRID, constants[i].flat[0])
                for i in operator.inputs
                if i >= 0
            ]
            value = _ELEMENTWISE[operator.name](*inputs)
            clamp = operator.options.get("fused_activation_function", "NONE")
            values[operator.outputs[0]] = value if clamp == "NONE" else _ELEMENTWISE[clamp](value)
        for name, function in FUNCTIONS.items():
            # e^x overflows in float64 far later than in float32; NaN is never near
            if bool((np.abs(values[result] - function(GRID)) <= TOLERANCE).all()):
                return name
    return ""
