"""Operators without an int8 form, written with ones that have it: float outputs stay what they were.

Where LiteRT itself has an int8 kernel nothing needs rewriting: see stand_in.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.tflite_ops.flatbuffer import Operator, Subgraph, constants, drop_tensors, parse_model
from edgepipe.tflite_ops.quantize import collect_ranges
from edgepipe.tflite_ops.scalar_functions import find_function
from edgepipe.tflite_ops.stand_in import add_constant, merge_codes, operator_code

# e^-16 = 1.1e-7: a softmax takes it for nothing, in float32 nearly and in int8 (steps of 1/256) by far.
MASKED = 16.0
# Operators through which a mask is looked for
_MOVING = frozenset({"RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS"})
# Axes that LiteRT's STRIDED_SLICE takes (kernels/strided_slice.cc)
MAX_STRIDED = 5
# A TILE is written as one CONCATENATION for each axis, of at most this many copies.
MAX_COPIES = 16


def rewrite(content: bytes, *, where: str) -> tuple[bytes, tuple[str, ...]]:
    """The float file without operators that quantisation would leave in float, as far as known.

    Returns the file and, for each operator that was replaced, a line such as ``"NEG 'name': MUL by
    -1"``. Each replacement is the same function in real numbers and gives its result the same name, so outputs
    differ by float32 rounding; `equalise.check_unchanged` proves it for a model.
    """
    told: list[str] = []
    content, lines = _one_pass(content, _functions, where=where)
    told += lines
    content, lines = _one_pass(content, _operators, where=where)
    return content, (*told, *lines)


# What `spell_out` can write with operators that compute in 16 bits, and well.
SPELT_OUT = frozenset({"HARD_SWISH", "RSQRT", "SQUARED_DIFFERENCE"})
# From one piece of `_pieces` to the next. LiteRT's 16-bit RSQRT goes straight between 257 points from 0 to its
# input's end: at a 16th of that it is off by 0.75 / 8 / 16**2 of the value.
PIECE = 16.0
PIECES = 5


def spell_out(
    content: bytes,
    layers: Collection[str],
    known: Mapping[str, tuple[float, float]],
    *,
    where: str,
) -> tuple[bytes, dict[str, tuple[float, float]]]:
    """The float file with those of ``layers`` in operators that do well in 16 bits that have no such kernel, or a coarse one.

    HARD_SWISH as ``x * (relu6(x + 3) / 6)``; SQUARED_DIFFERENCE, which layer norms take their variance
    from, as ``(a - b) * (a - b)``; RSQRT, which they divide by it with, in `_pieces` where its range is
    known and wide. The result keeps its name. Returns the file and the ranges of the
    tensors that are new, by name, from those that are ``known``: a square from 0 to 9 is of a
    difference from -3 to 3.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def apply(draft: _Draft) -> None:
        for o in draft.graph.operators:
            if o.name not in SPELT_OUT or draft.name(o) not in layers:
                continue
            seen = known.get(draft.name(o))
            if o.name == "SQUARED_DIFFERENCE":
                made, new = _squared_difference(draft, o, seen)
            elif o.name == "RSQRT":
                made, new = _pieces(draft, o, seen)
            else:
                made, new = _gated(draft, o)
            if made:
                draft.replace(o, made, "spelt out")
                ranges.update(new)
            for operator in made:
                if hasattr(operator.builtinOptions, "potScaleInt16"):
                    # any scale in 16 bits, not powers of two only
                    operator.builtinOptions.potScaleInt16 = False

    return _one_pass(content, apply, where=where)[0], ranges


Spelt = tuple[list[Any], dict[str, tuple[float, float]]]


def _gated(draft: _Draft, o: Operator) -> Spelt:
    name, shape, x = draft.name(o), draft.shape(o.outputs[0]), o.inputs[0]
    shifted, gate = draft.tensor(shape, f"{name}/shifted"), draft.tensor(shape, f"{name}/gate")
    made = [
        draft.pointwise("ADD", [x, draft.constant(3.0, f"{name}/three")], shifted, "RELU6"),
        draft.pointwise("MUL", [shifted, draft.constant(1 / 6, f"{name}/sixth")], gate),
        draft.pointwise("MUL", [x, gate], o.outputs[0]),
    ]
    return made, {f"{name}/shifted": (0.0, 6.0), f"{name}/gate": (0.0, 1.0)}


def _squared_difference(draft: _Draft, o: Operator, seen: tuple[float, float] | None) -> Spelt:
    name = f"{draft.name(o)}/difference"
    difference = draft.tensor(draft.shape(o.outputs[0]), name)
    most = max(seen[1], 0.0) ** 0.5 if seen else 0.0
    made = [
        draft.pointwise("SUB", o.inputs, difference),
        draft.pointwise("MUL", [difference, difference], o.outputs[0]),
    ]
    return made, {name: (-most, most)} if seen else {}


def _pieces(draft: _Draft, o: Operator, seen: tuple[float, float] | None) -> Spelt:
    """``rsqrt(v)`` as the sum of ``rsqrt(clip(v, a, b))`` over ranges (a, b] that follow each other, less
    ``rsqrt`` of the ends between them: each has a table of its own.

    A token with a hundred times the variance of others leaves those two points of one table. Example: results from 0.1 to 1
    are of v from 1 to 100, in pieces up to 6.25 and beyond.
    """
    if not seen or not 0 < seen[0] < seen[1]:
        return [], {}
    name, shape, v = draft.name(o), draft.shape(o.outputs[0]), o.inputs[0]
    top, bottom = seen[0] ** -2.0, seen[1] ** -2.0
    ends = [top]
    while len(ends) < PIECES and ends[-1] > bottom * PIECE:
        ends.append(ends[-1] / PIECE)
    ends.reverse()
    if len(ends) == 1:
        return [], {}
    made: list[Any] = []
    ranges: dict[str, tuple[float, float]] = {}

    def step(kind: str, inputs: Sequence[int], label: str, most: float, activation: str = "NONE") -> int:  # fmt: skip
        result = draft.tensor(shape, f"{name}/{label}")
        ranges[f"{name}/{label}"] = (0.0, most)
        made.append(draft.pointwise(kind, inputs, result, activation))
        return result

    constants = [draft.constant(end, f"{name}/end{k}") for k, end in enumerate(ends)]
    total = None
    for k, end in enumerate(ends):
        clipped, least = v, ends[k - 1] if k else bottom
        if k < len(ends) - 1:
            below = step("SUB", [constants[k], clipped], f"below{k}", end, "RELU")
            clipped = step("SUB", [constants[k], below], f"least{k}", end)
        if k:
            above = step("SUB", [clipped, constants[k - 1]], f"above{k}", end - least, "RELU")
            clipped = step("ADD", [above, constants[k - 1]], f"clipped{k}", end)
        part = step("RSQRT", [clipped], f"part{k}", least**-0.5)
        if k:
            # what this piece adds is 0 up to where it begins
            offset = draft.constant(least**-0.5, f"{name}/offset{k}")
            fall = step("SUB", [offset, part], f"fall{k}", least**-0.5 - end**-0.5)
            assert total is not None
            if k == len(ends) - 1:
                made.append(draft.pointwise("SUB", [total, fall], o.outputs[0]))
            else:
                total = step("SUB", [total, fall], f"total{k}", seen[1])
        else:
            total = part
    return made, ranges


def rewritten_operators() -> frozenset[str]:
    """Names of the operators of which `rewrite` can replace all or most uses."""
    return frozenset(_RULES) - {"DIV"}


@dataclasses.dataclass
class _Draft:
    """One file while it is rewritten: ``graph`` as it was, ``model`` as it becomes.

    ``new`` holds, by the number of an operator that goes, those that take its place.
    """

    graph: Subgraph
    model: Any
    constants: dict[int, np.ndarray]
    new: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    told: list[str] = dataclasses.field(default_factory=list)

    def name(self, operator: Operator) -> str:
        return self.graph.tensors[operator.outputs[0]].name

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.graph.tensors[tensor].shape

    def value(self, operator: Operator, position: int) -> np.ndarray | None:
        """A constant input, or None."""
        return self.constants.get(operator.inputs[position]) if position < len(operator.inputs) else None  # fmt: skip

    def maker(self, tensor: int) -> Operator | None:
        return next((o for o in self.graph.operators if tensor in o.outputs), None)

    def constant(self, values: Any, name: str, dtype: Any = np.float32) -> int:
        return add_constant(self.model, np.array(values, dtype), name)

    def tensor(self, shape: Sequence[int], name: str) -> int:
        """A new activation, float32."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape = name.encode(), np.array(shape, np.int32)
        tensor.type, tensor.buffer = schema.TensorType.FLOAT32, 0
        tensors = self.model.subgraphs[0].tensors
        tensors.append(tensor)
        return len(tensors) - 1

    def operator(self, kind: str, inputs: Sequence[int], output: int, options: str = "", version: int = 1, **fields: Any) -> Any:  # fmt: skip
        made = schema.OperatorT()
        made.opcodeIndex = len(self.model.operatorCodes)
        self.model.operatorCodes.append(operator_code(kind, version))
        made.inputs, made.outputs = list(inputs), [output]
        if options:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            made.builtinOptions = getattr(schema, options + "T")()
            for name, value in fields.items():
                setattr(made.builtinOptions, name, value)
        return made

    def pointwise(self, kind: str, inputs: Sequence[int], output: int, activation: str = "NONE") -> Any:  # fmt: skip
        """ADD, SUB, MUL or DIV, which may clamp, or an operator without options."""
        options = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions", "DIV": "DivOptions"}.get(kind, "")  # fmt: skip
        if not options:
            return self.operator(kind, inputs, output)
        clamp = getattr(schema.ActivationFunctionType, activation)
        return self.operator(kind, inputs, output, options, fusedActivationFunction=clamp)

    def replace(self, operator: Operator, by: list[Any], how: str) -> None:
        self.new[operator.index] = by
        self.told.append(f"{operator.name} {self.name(operator)!r}: {how}")


def _one_pass(content: bytes, apply: Callable[[_Draft], None], *, where: str) -> tuple[bytes, list[str]]:  # fmt: skip
    graph = parse_model(content, where=where).subgraphs[0]
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    draft = _Draft(graph, model, constants(content, graph))
    apply(draft)
    if not draft.told:
        return content, []
    main = model.subgraphs[0]
    was: list[list[Any]] = [draft.new.get(i, [o]) for i, o in enumerate(main.operators)]
    main.operators = [o for group in was for o in group]
    _drop_unused(model)
    merge_codes(model)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)), draft.told


def _drop_unused(model: Any) -> None:
    """Operators whose result nothing uses, then tensors that nothing uses."""
    main = model.subgraphs[0]
    needed = {int(i) for i in main.outputs}
    kept = []
    for operator in reversed(main.operators):
        outputs = [] if operator.outputs is None else [int(i) for i in operator.outputs]
        if not outputs or needed.intersection(outputs):
            kept.append(operator)
            needed.update(int(i) for i in operator.inputs)
    main.operators = kept[::-1]
    used = needed | {int(i) for i in main.inputs}
    used |= {int(i) for o in main.operators for i in (*o.outputs, *(o.intermediates if o.intermediates is not None else ()))}  # fmt: skip
    drop_tensors(model, set(range(len(main.tensors))) - used)


# --- masks -----------------------------------------------------------------------------------------


def clamp_masks(
    content: bytes, batches: Callable[[], Iterable[Sequence[np.ndarray]]], *, where: str
) -> tuple[bytes, tuple[str, ...]]:
    """The float file with the masks of its softmaxes no lower than need be: -inf or -1e9 leaves int8
    no step for the scores.

    Of scores from a to b a masked one is a - 16 at most, `MASKED` below the least that is not.
    ``batches`` are calibration data, run once if there is a mask, to know a and b. Found are
    a constant that is added to the scores, which at least one score of each row escapes; a
    factor of a mask of 0 and 1, or a choice of two constants, that is added; and a constant that a
    SELECT puts in place of scores. Returns the file and what was done, as `rewrite` does.
    Example: scores from -4 to 5 and a mask of 0 and -3.4e38, which becomes 0 and -25.
    """
    graph = parse_model(content, where=where).subgraphs[0]
    sites = _mask_sites(graph, constants(content, graph))
    if not sites:
        return content, ()
    limits = collect_ranges(content, batches(), where=where).table()

    def apply(draft: _Draft) -> None:
        for site in sites:
            if graph.tensors[site.scores].name not in limits or site.operator.index in draft.new:
                continue
            low, high = limits[graph.tensors[site.scores].name]
            least = low - MASKED if site.replaces else site.top - (high - low) - MASKED
            table = copy.copy(draft.model.subgraphs[0].operators[site.operator.index])
            table.inputs = list(site.operator.inputs)
            lowest = 0.0
            for position in site.positions:
                was = draft.constants[site.operator.inputs[position]]
                if was.dtype == np.float32 and (was < least).any():
                    lowest = min(lowest, float(was.min()))
                    name = f"{draft.name(site.operator)}/mask{position}"
                    table.inputs[position] = draft.constant(np.maximum(was, np.float32(least)), name)  # fmt: skip
            if lowest:
                draft.replace(
                    site.operator, [table], f"mask of {lowest:.2g} clamped to {least:.3g}"
                )

    content, told = _one_pass(content, apply, where=where)
    return content, tuple(told)


@dataclasses.dataclass(frozen=True)
class _MaskSite:
    """Constants of ``operator`` that are added to the tensor ``scores``, or ``replaces`` some of it.

    ``top`` is what the mask adds at least to one score of each row.
    """

    operator: Operator
    positions: tuple[int, ...]
    scores: int
    top: float = 0.0
    replaces: bool = False


def _mask_sites(graph: Subgraph, values: Mapping[int, np.ndarray]) -> list[_MaskSite]:
    makers = {i: o for o in graph.operators for i in o.outputs}
    found = []
    for softmax in graph.operators:
        if softmax.name != "SOFTMAX":
            continue
        tensor, movers = softmax.inputs[0], list[Operator]()
        while tensor in makers and tensor not in graph.outputs and sum(tensor in o.inputs for o in graph.operators) == 1:  # fmt: skip
            operator = makers[tensor]
            if operator.name in _MOVING:
                movers.append(operator)
                tensor = operator.inputs[0]
                continue
            if operator.name not in ("ADD", "SELECT", "SELECT_V2"):
                break
            places = (0, 1) if operator.name == "ADD" else (1, 2)
            fixed = [p for p in places if operator.inputs[p] in values]
            scores = [operator.inputs[p] for p in places if p not in fixed]
            if len(fixed) == 1 and operator.name == "ADD":
                rows = np.broadcast_to(values[operator.inputs[fixed[0]]], graph.tensors[tensor].shape)  # fmt: skip
                for mover in reversed(movers):
                    if mover.name == "TRANSPOSE":
                        rows = rows.transpose(values[mover.inputs[1]])
                    rows = rows.reshape(graph.tensors[mover.outputs[0]].shape)
                found.append(_MaskSite(operator, tuple(fixed), scores[0], float(rows.max(axis=-1).min())))  # fmt: skip
            elif len(fixed) == 1:
                found.append(_MaskSite(operator, tuple(fixed), scores[0], replaces=True))
            elif operator.name == "ADD":
                for mask, other in (scores, scores[::-1]):
                    found += _computed_mask(mask, other, graph, makers, values)
            if len(fixed) != 1:
                break
            tensor = scores[0]
    return found


def _computed_mask(
    mask: int, scores: int, graph: Subgraph, makers: Mapping[int, Operator], values: Mapping[int, np.ndarray]
) -> list[_MaskSite]:  # fmt: skip
    """``mask`` where it is a choice of two constants, or (1 - what it is given) times a constant."""
    while mask in makers and makers[mask].name in _MOVING:
        mask = makers[mask].inputs[0]
    operator = makers.get(mask)
    if operator is None:
        return []
    fixed = tuple(p for p, i in enumerate(operator.inputs) if i in values)
    if operator.name in ("SELECT", "SELECT_V2") and {1, 2} <= set(fixed):
        top = max(float(values[operator.inputs[p]].max()) for p in (1, 2))
        return [_MaskSite(operator, (1, 2), scores, top)]
    if operator.name == "MUL" and len(fixed) == 1 and (values[operator.inputs[fixed[0]]] < -1e3).all():  # fmt: skip
        return [_MaskSite(operator, fixed, scores)]
    return []


# --- a function that was spelt out ----------------------------------------------------------------


def _functions(draft: _Draft) -> None:
    """GELU, hard swish, mish and softplus that an exporter wrote with other operators."""
    taken: set[int] = set()
    for operator in reversed(draft.graph.operators):
        if operator.index in taken or len(operator.outputs) != 1:
            continue
        found = find_function(operator, draft.graph, draft.constants)
        if found is None:
            continue
        taken.update(found.operators)
        y, name, shape = operator.outputs[0], draft.name(operator), draft.shape(operator.outputs[0])
        by = _SPELLINGS[found.name](draft, found.source, y, name, shape)
        draft.new[operator.index] = by
        draft.told.append(f"{found.name} {name!r}: found in {len(found.operators)} operators")


Shape = tuple[int, ...]


def _gelu(approximate: bool) -> Callable[..., list[Any]]:
    def spell(draft: _Draft, x: int, y: int, name: str, shape: Shape) -> list[Any]:
        return [draft.operator("GELU", [x], y, "GeluOptions", approximate=approximate)]

    return spell


def _hard_swish(draft: _Draft, x: int, y: int, name: str, shape: Shape) -> list[Any]:
    return [draft.operator("HARD_SWISH", [x], y, "HardSwishOptions")]


def _mish(draft: _Draft, x: int, y: int, name: str, shape: Shape) -> list[Any]:
    """``x * tanh(log(1 + e^x)) = x * (1 - s^2) / (1 + s^2)`` with ``s = sigmoid(-x)``: all within 0 and 2,
    where e^x would leave int8 no step for anything but its largest values."""
    negative, s, squared, above, below, ratio = (
        draft.tensor(shape, f"{name}/{part}") for part in ("neg", "s", "s2", "above", "below", "ratio")
    )  # fmt: skip
    one = draft.constant(1.0, f"{name}/one")
    return [
        draft.pointwise("MUL", [x, draft.constant(-1.0, f"{name}/minus")], negative),
        draft.pointwise("LOGISTIC", [negative], s),
        draft.pointwise("MUL", [s, s], squared),
        draft.pointwise("SUB", [one, squared], above),
        draft.pointwise("ADD", [squared, one], below),
        draft.pointwise("DIV", [above, below], ratio),
        draft.pointwise("MUL", [x, ratio], y),
    ]


def _softplus(draft: _Draft, x: int, y: int, name: str, shape: Shape) -> list[Any]:
    """``log(1 + e^x) = relu(x) - log(sigmoid(|x|))``: the logarithm is of values from 0.5 to 1."""
    size, s, log, positive = (draft.tensor(shape, f"{name}/{part}") for part in ("abs", "s", "log", "relu"))  # fmt: skip
    return [
        draft.operator("ABS", [x], size, "AbsOptions"),
        draft.pointwise("LOGISTIC", [size], s),
        draft.pointwise("LOG", [s], log),
        draft.pointwise("RELU", [x], positive),
        draft.pointwise("SUB", [positive, log], y),
    ]


_SPELLINGS: dict[str, Callable[[_Draft, int, int, str, Shape], list[Any]]] = {
    "GELU": _gelu(False),
    "GELU (tanh)": _gelu(True),
    "HARD_SWISH": _hard_swish,
    "mish": _mish,
    "softplus": _softplus,
}


# --- one operator by others ------------------------------------------------------------------------


def _operators(draft: _Draft) -> None:
    for operator in draft.graph.operators:
        rule = _RULES.get(operator.name)
        if rule is not None and draft.graph.tensors[operator.inputs[0]].dtype in ("float32", "bool"):  # fmt: skip
            rule(draft, operator)


def _negate(draft: _Draft, o: Operator) -> None:
    minus = draft.constant(-1.0, f"{draft.name(o)}/minus")
    draft.replace(o, [draft.pointwise("MUL", [o.inputs[0], minus], o.outputs[0])], "MUL by -1")


def _square(draft: _Draft, o: Operator) -> None:
    draft.replace(o, [draft.pointwise("MUL", [o.inputs[0]] * 2, o.outputs[0])], "MUL by itself")


def _power(draft: _Draft, o: Operator) -> None:
    """Exponents of quarters up to 4, and -0.5: products and square roots. x^2.75 = x * x * x^0.5 * x^0.25."""
    exponent = draft.value(o, 1)
    if exponent is None or exponent.size != 1 or draft.shape(o.inputs[0]) != draft.shape(o.outputs[0]):  # fmt: skip
        return
    p, x, y = float(exponent.flat[0]), o.inputs[0], o.outputs[0]
    if p == -0.5:
        draft.replace(o, [draft.pointwise("RSQRT", [x], y)], "RSQRT")
        return
    if not 0 < p <= 4 or p == 1 or 4 * p != int(4 * p):
        return
    made: list[Any] = []
    fraction, factors = p - int(p), [x] * int(p)

    def another(kind: str, inputs: list[int]) -> int:
        out = draft.tensor(draft.shape(y), f"{draft.name(o)}/{len(made)}")
        made.append(draft.pointwise(kind, inputs, out))
        return out

    if fraction:
        root = another("SQRT", [x])
        fourth = another("SQRT", [root]) if fraction != 0.5 else None
        factors += [root] * (fraction >= 0.5) + ([fourth] if fourth is not None else [])
    total = factors[0]
    for factor in factors[1:]:
        total = another("MUL", [total, factor])
    made[-1].outputs = [y]
    draft.replace(o, made, "products and square roots")


def _divide(draft: _Draft, o: Operator) -> None:
    """By a constant: a product, which is faster; by a square root: its reciprocal, since a divisor
    that int8 rounds to 0 has none."""
    divisor = draft.value(o, 1)
    activation = str(o.options.get("fused_activation_function", "NONE"))
    if divisor is not None and draft.value(o, 0) is None:
        if divisor.dtype == np.float32 and (np.abs(divisor) > 1e-30).all():
            factor = draft.constant(1 / divisor.astype(np.float64), f"{draft.name(o)}/reciprocal")
            made = draft.pointwise("MUL", [o.inputs[0], factor], o.outputs[0], activation)
            draft.replace(o, [made], "MUL by the reciprocal")
        return
    root = draft.maker(o.inputs[1])
    if root is None or root.name != "SQRT":
        return
    one = draft.value(o, 0)
    if one is not None and (one == 1).all() and activation == "NONE" and draft.shape(o.inputs[1]) == draft.shape(o.outputs[0]):  # fmt: skip
        draft.replace(o, [draft.pointwise("RSQRT", [root.inputs[0]], o.outputs[0])], "RSQRT")
        return
    reciprocal = draft.tensor(draft.shape(o.inputs[1]), f"{draft.name(o)}/rsqrt")
    made = draft.pointwise("MUL", [o.inputs[0], reciprocal], o.outputs[0], activation)
    draft.replace(o, [draft.pointwise("RSQRT", [root.inputs[0]], reciprocal), made], "MUL by RSQRT")


def _reshape(draft: _Draft, o: Operator) -> None:
    shape = draft.constant(draft.shape(o.outputs[0]), f"{draft.name(o)}/shape", np.int32)
    draft.replace(o, [draft.operator("RESHAPE", [o.inputs[0], shape], o.outputs[0])], "RESHAPE")


def _sum_of_all(draft: _Draft, o: Operator) -> None:
    made: list[Any] = []
    total = o.inputs[0]
    for number, term in enumerate(o.inputs[1:]):
        last = number == len(o.inputs) - 2
        out = o.outputs[0] if last else draft.tensor(draft.shape(o.outputs[0]), f"{draft.name(o)}/{number}")  # fmt: skip
        made.append(draft.pointwise("ADD", [total, term], out))
        total = out
    if made:
        draft.replace(o, made, f"{len(made)} ADD")


def _tile(draft: _Draft, o: Operator) -> None:
    copies = draft.value(o, 1)
    if copies is None or copies.max(initial=1) > MAX_COPIES or copies.min(initial=1) < 1 or copies.max(initial=1) == 1:  # fmt: skip
        return
    made: list[Any] = []
    x, shape = o.inputs[0], list(draft.shape(o.inputs[0]))
    for axis in np.flatnonzero(copies > 1).tolist():
        shape[axis] *= int(copies[axis])
        out = draft.tensor(shape, f"{draft.name(o)}/{axis}")
        tensors = draft.model.subgraphs[0].tensors
        tensors[out].type = tensors[x].type  # a mask of conditions is repeated as well
        made.append(draft.operator("CONCATENATION", [x] * int(copies[axis]), out, "ConcatenationOptions", axis=axis))  # fmt: skip
        x = out
    made[-1].outputs = [o.outputs[0]]
    draft.replace(o, made, "CONCATENATION of copies")


def _split(draft: _Draft, o: Operator) -> None:
    axis, made = draft.value(o, 2), []
    if axis is None:
        return
    rank, start = len(draft.shape(o.inputs[0])), 0
    along = int(axis.flat[0]) % rank
    for output in o.outputs:
        begin = [0] * rank
        begin[along] = start
        shape = draft.shape(output)
        start += shape[along]
        name = draft.graph.tensors[output].name
        bounds = [draft.constant(v, f"{name}/{what}", np.int32) for what, v in (("begin", begin), ("size", shape))]  # fmt: skip
        made.append(draft.operator("SLICE", [o.inputs[0], *bounds], output, "SliceOptions"))
    draft.replace(o, made, f"{len(made)} SLICE")


def _cast(draft: _Draft, o: Operator) -> None:
    """A condition as a number: 1 where it holds, else 0."""
    tensors = draft.graph.tensors
    if (tensors[o.inputs[0]].dtype, tensors[o.outputs[0]].dtype) != ("bool", "float32"):
        return
    values = [draft.constant(v, f"{draft.name(o)}/{v:g}") for v in (1.0, 0.0)]
    made = draft.operator("SELECT_V2", [o.inputs[0], *values], o.outputs[0], "SelectV2Options")
    draft.replace(o, [made], "SELECT_V2 of 1 and 0")


def _sign(draft: _Draft, o: Operator) -> None:
    """1 above 0, -1 below, 0 at 0."""
    x, y, name = o.inputs[0], o.outputs[0], draft.name(o)
    zero, one, minus = (draft.constant(v, f"{name}/{v:g}") for v in (0.0, 1.0, -1.0))
    above, below = (draft.tensor(draft.shape(y), f"{name}/{side}") for side in ("above", "below"))
    for condition in (above, below):
        draft.model.subgraphs[0].tensors[condition].type = schema.TensorType.BOOL
    rest = draft.tensor(draft.shape(y), f"{name}/rest")
    made = [
        draft.operator("GREATER", [x, zero], above, "GreaterOptions"),
        draft.operator("LESS", [x, zero], below, "LessOptions"),
        draft.operator("SELECT_V2", [below, minus, zero], rest, "SelectV2Options"),
        draft.operator("SELECT_V2", [above, one, rest], y, "SelectV2Options"),
    ]
    draft.replace(o, made, "SELECT_V2 by GREATER and LESS")


def _reverse(draft: _Draft, o: Operator) -> None:
    """``x[:, ::-1]`` for the axes that it names."""
    axes, shape = draft.value(o, 1), draft.shape(o.inputs[0])
    if axes is None or len(shape) > MAX_STRIDED:
        return
    along = {int(a) % len(shape) for a in axes.flat}
    everywhere = (1 << len(shape)) - 1  # a bit for each axis: from its one end to its other
    bounds = [
        draft.constant(values, f"{draft.name(o)}/{what}", np.int32)
        for what, values in (
            ("begin", [0] * len(shape)),
            ("end", [0] * len(shape)),
            ("strides", [-1 if a in along else 1 for a in range(len(shape))]),
        )
    ]
    made = draft.operator(
        "STRIDED_SLICE", [o.inputs[0], *bounds], o.outputs[0], "StridedSliceOptions",
        beginMask=everywhere, endMask=everywhere,
    )  # fmt: skip
    draft.replace(o, [made], "STRIDED_SLICE with steps of -1")


def _convolve_volume(draft: _Draft, o: Operator) -> None:
    """The slices of a volume as a batch of pictures, with the ``k`` slices that a filter sees side by
    side as channels, through one CONV_2D: the same products and sums.

    Example: (1, 8, 26, 26, 3) by filters (3, 3, 3, 3, 8): three times (6, 26, 26, 3), together
    (6, 26, 26, 9), by filters (8, 3, 3, 9): (6, 24, 24, 8) is (1, 6, 24, 24, 8).
    """
    filters = draft.value(o, 1)
    shape, out = draft.shape(o.inputs[0]), draft.shape(o.outputs[0])
    if filters is None or shape[0] != 1 or filters.shape[3] != shape[4]:
        return
    get, name, made = o.options.__getitem__, draft.name(o), list[Any]()
    step, spacing = int(get("stride_d")), int(get("dilation_d_factor"))
    depth, height, width, channels = shape[1:]
    taps, frames = filters.shape[0], out[1]

    def add(kind: str, inputs: list[int], to: Sequence[int], suffix: str, options: str = "", **fields: Any) -> int:  # fmt: skip
        result = draft.tensor(to, f"{name}/{suffix}")
        made.append(draft.operator(kind, inputs, result, options, **fields))
        return result

    def number(values: Any, suffix: str) -> int:
        return draft.constant(values, f"{name}/{suffix}", np.int32)

    x = add("RESHAPE", [o.inputs[0], number(shape[1:], "shape")], shape[1:], "frames")
    missing = (frames - 1) * step + (taps - 1) * spacing + 1 - depth
    if missing > 0:  # padding SAME
        before = missing // 2
        depth += missing
        edges = number([[before, missing - before], [0, 0], [0, 0], [0, 0]], "edges")
        x = add("PAD", [x, edges], (depth, height, width, channels), "padded", "PadOptions")
    seen = []
    for tap in range(taps):
        first = tap * spacing
        bounds = [
            number([first, 0, 0, 0], f"begin{tap}"),
            number([first + (frames - 1) * step + 1, height, width, channels], f"end{tap}"),
            number([step, 1, 1, 1], f"step{tap}"),
        ]
        to = (frames, height, width, channels)
        seen.append(add("STRIDED_SLICE", [x, *bounds], to, f"tap{tap}", "StridedSliceOptions"))
    together = seen[0]
    if taps > 1:
        to = (frames, height, width, taps * channels)
        together = add("CONCATENATION", seen, to, "taps", "ConcatenationOptions", axis=3)
    # (taps, kh, kw, in, out) -> (out, kh, kw, taps * in)
    flat = filters.transpose(4, 1, 2, 0, 3).reshape(*filters.shape[4:], *filters.shape[1:3], -1)
    weights = draft.constant(flat, f"{name}/filters")
    bias = o.inputs[2] if len(o.inputs) > 2 and o.inputs[2] >= 0 else draft.constant(np.zeros(len(flat)), f"{name}/bias")  # fmt: skip
    y = add(
        "CONV_2D", [together, weights, bias], out[1:], "pictures", "Conv2DOptions",
        padding=getattr(schema.Padding, get("padding")),
        strideH=get("stride_h"), strideW=get("stride_w"),
        dilationHFactor=get("dilation_h_factor"), dilationWFactor=get("dilation_w_factor"),
        fusedActivationFunction=getattr(schema.ActivationFunctionType, get("fused_activation_function")),
    )  # fmt: skip
    made.append(draft.operator("RESHAPE", [y, number(out, "out")], o.outputs[0]))
    draft.replace(o, made, f"CONV_2D of {taps} slices side by side")


def _shape_of(draft: _Draft, o: Operator) -> None:
    """The shape of a tensor never changes here: what reads it reads a constant."""
    output = draft.model.subgraphs[0].tensors[o.outputs[0]]
    if output.type != schema.TensorType.INT32 or o.outputs[0] in draft.graph.outputs:
        return
    known = draft.constant(draft.shape(o.inputs[0]), f"{draft.name(o)}/constant", np.int32)
    for operator in draft.model.subgraphs[0].operators:
        operator.inputs = [known if int(i) == o.outputs[0] else int(i) for i in operator.inputs]
    draft.replace(o, [], "a constant")


_RULES: dict[str, Callable[[_Draft, Operator], None]] = {
    "ADD_N": _sum_of_all,
    "CAST": _cast,
    "CONV_3D": _convolve_volume,
    "DIV": _divide,
    "EXPAND_DIMS": _reshape,
    "NEG": _negate,
    "POW": _power,
    "REVERSE_V2": _reverse,
    "SHAPE": _shape_of,
    "SIGN": _sign,
    "SPLIT_V": _split,
    "SQUARE": _square,
    "SQUEEZE": _reshape,
    "TILE": _tile,
}
