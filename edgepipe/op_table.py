"""`OpTable`: what operators cost on a kind of board, to predict latency without running there.

Measured tables are made by `edgepipe calibrate --ops` (op_timing.py) and kept in
``<store>/op_tables/<profile>-<runtime>-<threads>.json``. Where there is none, `estimated_table`
makes one from the profile's cores; everything that comes of it says "estimated".
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgepipe.errors import NotReadyError, RequestError
from edgepipe.profile import DeviceProfile
from edgepipe.schema import build, record
from edgepipe.store import write_json
from edgepipe.units import format_seconds, format_value

if TYPE_CHECKING:
    from edgepipe.tflite_ops.flatbuffer import Model, Operator, Subgraph

log = logging.getLogger(__name__)

SCHEMA = 1

# TFLite operator -> kind. What is not here is priced by its bytes, as "copy", and named in `guessed`.
KINDS = {
    "CONV_2D": "conv", "CONV_3D": "conv", "TRANSPOSE_CONV": "conv", "DEPTHWISE_CONV_2D": "depthwise",
    "FULLY_CONNECTED": "dense", "BATCH_MATMUL": "dense",
    "ADD": "elementwise", "SUB": "elementwise", "MUL": "elementwise", "MAXIMUM": "elementwise", "MINIMUM": "elementwise",
    "AVERAGE_POOL_2D": "pool", "MAX_POOL_2D": "pool", "MEAN": "pool", "SUM": "pool",
    "HARD_SWISH": "activation", "LOGISTIC": "activation", "TANH": "activation", "SOFTMAX": "activation",
    "RELU": "activation", "RELU6": "activation", "LEAKY_RELU": "activation", "PRELU": "activation", "GELU": "activation",
    "QUANTIZE": "copy", "DEQUANTIZE": "copy", "PAD": "copy", "PADV2": "copy", "CONCATENATION": "copy",
    "TRANSPOSE": "copy", "SLICE": "copy", "STRIDED_SLICE": "copy", "SPLIT": "copy",
    "RESHAPE": "view", "SQUEEZE": "view", "EXPAND_DIMS": "view",
}  # fmt: skip
# A 1x1 convolution is a kind of its own, "pointwise": a matrix product without gathering.
COST_KINDS = (
    "conv",
    "pointwise",
    "depthwise",
    "dense",
    "elementwise",
    "activation",
    "pool",
    "copy",
)
# Channels that kernels work on at once; the fit chooses (XNNPACK's microkernels have 1 to 64).
TILES = (1, 4, 8, 16, 32)
# A change smaller than this is none: nobody notices it, and no table is that exact.
MIN_GAIN = 0.05


@dataclasses.dataclass(frozen=True)
class Op:
    """One operator to be priced. ``bytes`` are those of its weights and of what it writes.

    (Of its largest tensor where it has no weights.) ``channels`` are (in, out) of a matrix product
    or convolution, whose MACs a kernel does for whole tiles of channels; (0, 0) for other operators.
    """

    name: str
    kind: str
    dtype: str
    macs: int
    bytes: int
    channels: tuple[int, int] = (0, 0)


@record
class OpCost:
    """seconds = ``op_s`` + ``mac_s`` * MACs in whole tiles + ``byte_s`` * bytes.

    ``tile`` is (in, out): 20 output channels cost as much as 24 where it is (., 8). ``error`` is the
    median relative error of predicting each measured model from the others, ``points`` their number.
    """

    op_s: float
    mac_s: float
    byte_s: float
    tile: tuple[int, int] = (1, 1)
    error: float = 0.0
    points: int = 0


@record
class OpTable:
    """Costs by ``"<kind> <dtype>"``, like ``"conv int8"``, and ``invoke_s`` for an inference of nothing.

    ``error`` is the typical relative error of a whole model: measured for a measured table, 1.0 (a
    factor of two) for an estimated one. ``same`` says of which device, runtime, sha256 and version it is.
    """

    profile: str
    source: Literal["measured", "estimated"]
    threads: int
    invoke_s: float
    costs: Mapping[str, OpCost]
    error: float
    measured: str = ""
    same: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A predicted latency. ``ops_s`` are the parts, in the order of the operators or layers.

    ``guessed`` are operators of kinds that the table has no figure for.
    """

    latency_s: float
    ops_s: tuple[float, ...]
    table: OpTable
    guessed: tuple[str, ...] = ()

    def text(self) -> str:
        """For people: ``2.1 ms (measured operators of rpi4b_4gb, within 15 %)``."""
        within = f"within {format_value(self.table.error, 'ratio')}" if self.table.source == "measured" else "a guess that may be off by a factor of two"  # fmt: skip
        more = f"; guessed: {', '.join(sorted(set(self.guessed)))}" if self.guessed else ""
        return f"{format_seconds(self.latency_s)} ({self.table.source} operators of {self.table.profile}, {within}{more})"  # fmt: skip


class LayerLike(Protocol):
    """What `torch_ops.result.Layer` says of a layer, and `RecordedLayer` of one in an artifact's facts."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def macs(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class RecordedLayer:
    """A layer as the facts of an artifact hold it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int


# ---------------------------------------------------------------------------------- predicting


def estimate(ops: Sequence[Op], table: OpTable) -> Estimate:
    """Predict the latency of a model of these operators.

    An operator whose kind or dtype the table lacks is priced by the nearest that it has (the kind in
    the other dtype, or by its bytes), and named. Raises RequestError for a table without any cost.
    """
    if not table.costs:
        raise RequestError(f"the operator table of {table.profile} is empty", hint=_CALIBRATE.format(table.profile))  # fmt: skip
    parts, guessed = [], []
    for op in ops:
        cost, is_guess = _cost_of(op, table)
        parts.append(op_seconds(op, cost))
        if is_guess:
            guessed.append(op.name)
    return Estimate(table.invoke_s + sum(parts), tuple(parts), table, tuple(guessed))


def op_seconds(op: Op, cost: OpCost) -> float:
    """Seconds of one operator at this cost."""
    return cost.op_s + cost.mac_s * tiled_macs(op, cost.tile) + cost.byte_s * op.bytes


def tiled_macs(op: Op, tile: tuple[int, int]) -> float:
    """MACs where channels come in whole tiles: 3 -> 20 channels in tiles (4, 8) cost 4 -> 24."""
    macs = float(op.macs)
    for channels, size in zip(op.channels, tile, strict=True):
        if channels:
            macs *= math.ceil(channels / size) * size / channels
    return macs


def _cost_of(op: Op, table: OpTable) -> tuple[OpCost, bool]:
    if op.kind == "view":  # nothing moves
        return OpCost(op_s=0.0, mac_s=0.0, byte_s=0.0), False
    known = op.kind in COST_KINDS
    kind = op.kind if known else "copy"
    for wanted in (f"{kind} {op.dtype}", f"{kind} float32", f"{kind} int8"):
        if wanted in table.costs:
            return table.costs[wanted], not known or wanted != f"{kind} {op.dtype}"
    # every kind is made of moving bytes and multiplying: take the dearest that is known
    return max(table.costs.values(), key=lambda c: op_seconds(op, c)), True


def estimate_tflite(model: Model, table: OpTable) -> Estimate:
    """Predict the latency of a parsed TFLite file (`tflite_ops.inspect.read_model`)."""
    return estimate(tflite_ops_of(model), table)


def estimate_layers(
    layers: Sequence[LayerLike], table: OpTable, *, dtype: Literal["int8", "float32"] = "int8"
) -> Estimate:
    """Predict the latency of torch layers (`describe_layers`) once they are TFLite of this dtype.

    Only layers with weights are counted: batch normalisation is folded and activations are fused by
    then, and what is left (additions, pooling) is little beside them.
    """
    return estimate([op_of_layer(layer, dtype) for layer in layers], table)


def op_of_layer(layer: LayerLike, dtype: str) -> Op:
    """A torch layer as an operator. Worked example: Conv2d (16, 8, 3, 3) with 115,200 MACs writes
    115,200 / (8 * 9) = 1,600 values beside 1,152 weights: 2,752 bytes in int8."""
    if layer.macs == 0 or len(layer.shape) < 2:
        return Op(layer.name, "view", dtype, 0, 0)
    per_output = math.prod(layer.shape[1:])
    out, inside = layer.shape[0], layer.shape[1]
    if "Transpose" in layer.kind:  # (in, out, ...), and every input value meets the whole kernel
        out, inside = inside, out
    kernel = math.prod(layer.shape[2:])
    if "Conv" not in layer.kind:
        kind = "dense"
    elif inside == 1 and out > 1 and kernel > 1:
        kind = "depthwise"
    else:
        kind = "pointwise" if kernel == 1 else "conv"
    moved = math.prod(layer.shape) + layer.macs // per_output
    channels = (0, out) if kind == "depthwise" else (inside, out)
    return Op(layer.name, kind, dtype, layer.macs, moved * (1 if dtype == "int8" else 4), channels)


def tflite_ops_of(model: Model) -> list[Op]:
    """The operators of a TFLite file's main graph, to be priced."""
    graph = model.subgraphs[0]
    return [op_of_operator(operator, graph) for operator in graph.operators]


def op_of_operator(operator: Operator, graph: Subgraph) -> Op:
    """One TFLite operator to be priced."""
    from edgepipe.tflite_ops.inspect import operator_macs

    tensors = {t: graph.tensors[t] for t in (*operator.inputs, *operator.outputs) if t >= 0}
    output = graph.tensors[operator.outputs[0]] if operator.outputs else None
    kind = KINDS.get(operator.name, operator.name.lower())
    weights = tensors.get(operator.inputs[1]) if len(operator.inputs) > 1 else None
    macs, channels = operator_macs(operator, graph), (0, 0)
    if macs and weights is not None and len(weights.shape) > 1:
        shape = weights.shape  # (out, ..., in); a depthwise one is (1, kh, kw, out)
        channels = (0, shape[-1]) if kind == "depthwise" else (shape[-1], shape[0])
        if kind == "conv" and math.prod(shape[1:-1]) == 1:
            kind = "pointwise"
    sizes = [t.size_bytes for t in tensors.values()]
    moved = max(sizes, default=0)
    if macs and output is not None:
        moved = sum(t.size_bytes for t in tensors.values() if t.is_constant) + output.size_bytes
    dtype = "int8" if output is not None and not output.is_float else "float32"
    if macs and dtype == "float32" and weights is not None and weights.dtype == "int8":
        dtype = "dynamic"  # quantised at every call: no kernel of either kind
    return Op(operator.name, kind, dtype, macs, moved, channels)


def estimate_change(
    facts: Mapping[str, Any], table: OpTable, *, dtype: Literal["int8", "float32"] = "int8"
) -> tuple[Estimate, Estimate] | None:
    """(before, after) of a stage by the facts of its artifact; None where no layer changed its shape."""
    before, after = (
        [RecordedLayer(la["name"], la["kind"], tuple(la["shape"]), la["macs"]) for la in facts.get(key, ())]
        for key in ("layers_before", "layers")
    )  # fmt: skip
    if not before or before == after:
        return None
    return estimate_layers(before, table, dtype=dtype), estimate_layers(after, table, dtype=dtype)


def gain_note(before: Estimate, after: Estimate) -> str:
    """A warning where a change gains nothing on this board; "" where it does."""
    gain = 1 - after.latency_s / before.latency_s if before.latency_s else 0.0
    if gain >= MIN_GAIN:
        return ""
    return (
        f"{before.table.profile} will gain nothing: {format_seconds(before.latency_s)} -> "
        f"{format_seconds(after.latency_s)} ({before.table.source} operators)"
    )


# --------------------------------------------------------------------------- kept and estimated

_CALIBRATE = "measure one: edgepipe calibrate --ops --device ADDRESS --profile {}"


def op_table_path(root: Path, profile: DeviceProfile, *, threads: int = 0) -> Path:
    """Where the table of a profile is kept in the store ``root``; ``threads`` 0: the profile's."""
    name = f"{profile.name}-{profile.runtime}-{threads or profile.threads}.json"
    return root / "op_tables" / name.replace("/", "_")


def save_op_table(root: Path, profile: DeviceProfile, table: OpTable) -> Path:
    """Keep a measured table, whole or not at all."""
    path = op_table_path(root, profile, threads=table.threads)
    write_json(path, {"schema": SCHEMA, **dataclasses.asdict(table)})
    return path


def load_op_table(root: Path, profile: DeviceProfile, *, threads: int = 0) -> OpTable:
    """The measured table of a profile, else an estimated one, which says so.

    A file that cannot be read or is of another runtime version is warned of and not used. Raises
    NotReadyError where there is no table and the profile says nothing of its cores.
    """
    path = op_table_path(root, profile, threads=threads)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") > SCHEMA:
            raise RequestError(f"{path} is of a newer edgepipe")
        table = build(OpTable, data, where=str(path), error=RequestError)
        version = table.same.get("runtime_version")
        if version == profile.runtime_version:
            return table
        log.warning("%s is of %s %s, not %s: not used; %s", path, profile.runtime, version, profile.runtime_version, _CALIBRATE.format(profile.name))  # fmt: skip
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RequestError) as exc:
        log.warning("%s is no operator table (%s): not used; %s", path, exc, _CALIBRATE.format(profile.name))  # fmt: skip
    return estimated_table(profile, threads=threads)


# MACs per cycle of one core in convolutions, (int8, float32). Cortex-A53 and -A72: MobileNetV1, 569
# million MACs, in the table of XNNPACK's README ("Raspberry Pi", four threads): 46 and 114 ms at 1.4
# GHz, 24 and 77 ms at 1.5 GHz. Cortex-A76: two pipes of SDOT do four times the MACs of a pipe of
# SMLAL, and two of FMLA twice (Arm's software optimization guides of both cores).
CORE_RATES = {
    "Cortex-A53": (2.2, 0.9),
    "Cortex-A72": (4.0, 1.25),
    "Cortex-A76": (16.0, 2.5),
}
# Other cores, by what their instructions do at once.
ISA_RATES = (("i8mm", (24.0, 2.5)), ("dotprod", (12.0, 2.0)), ("", (3.0, 1.0)))
# A depthwise kernel loads a value for each product: a quarter of that rate, bytes at 2 per cycle.
DEPTHWISE_RATE, BYTES_PER_CYCLE, CYCLES_PER_OP = 0.25, 2.0, 3000.0


def estimated_table(profile: DeviceProfile, *, threads: int = 0) -> OpTable:
    """A table from nothing but the profile's fastest cores, frequency and ISA: no measurement.

    Raises NotReadyError where the profile says nothing of its cores (localhost).
    """
    if not profile.clusters:
        raise NotReadyError(
            f"profile {profile.name} says nothing of its cores, so no latency can be estimated",
            hint=_CALIBRATE.format(profile.name),
            code="no-op-table",
        )
    threads = threads or profile.threads
    fastest = max(profile.clusters, key=lambda c: c.max_frequency_mhz * _rates(c.core, c.isa)[0])
    if not fastest.max_frequency_mhz:
        raise NotReadyError(
            f"profile {profile.name} says nothing of its frequency, so no latency can be estimated",
            hint=_CALIBRATE.format(profile.name),
            code="no-op-table",
        )
    cycles_per_s = fastest.max_frequency_mhz * 1e6
    cores = min(threads, sum(c.count for c in profile.clusters))
    costs = {}
    for dtype, rate in zip(("int8", "float32"), _rates(fastest.core, fastest.isa), strict=True):
        for kind in COST_KINDS:
            share = {"depthwise": DEPTHWISE_RATE, "dense": 0.5}.get(kind, 1.0)
            costs[f"{kind} {dtype}"] = OpCost(
                op_s=CYCLES_PER_OP / cycles_per_s,
                mac_s=1 / (rate * share * cycles_per_s * cores),
                byte_s=1 / (BYTES_PER_CYCLE * cycles_per_s),
                tile=(1, 8) if kind in ("conv", "pointwise", "depthwise") else (1, 1),
            )
    return OpTable(
        profile=profile.name, source="estimated", threads=threads,
        invoke_s=2 * CYCLES_PER_OP / cycles_per_s, costs=costs, error=1.0,
    )  # fmt: skip


def _rates(core: str, isa: Sequence[str]) -> tuple[float, float]:
    return CORE_RATES.get(core) or next(rates for feature, rates in ISA_RATES if not feature or feature in isa)  # fmt: skip


# ------------------------------------------------------------------------------------- fitting


@dataclasses.dataclass(frozen=True)
class Timing:
    """A model of operators of one kind and dtype, and how long one inference took."""

    ops: tuple[Op, ...]
    seconds: float

    @property
    def cost_key(self) -> str:
        return f"{self.ops[0].kind} {self.ops[0].dtype}"


REWEIGHTINGS = 5  # they settle within a few
# Below this many models of a kind nothing tells its three coefficients from chance.
MIN_POINTS = 4


def fit_table(
    timings: Sequence[Timing],
    *,
    profile: str,
    threads: int,
    invoke_s: float,
    same: Mapping[str, Any],
    now: datetime.datetime,
) -> OpTable:
    """Costs by kind and dtype that explain these timings; pure. ``invoke_s`` is taken off each.

    Raises NotReadyError where a kind has fewer than `MIN_POINTS` timings.
    """
    by_key: dict[str, list[Timing]] = {}
    for timing in timings:
        by_key.setdefault(timing.cost_key, []).append(timing)
    few = [key for key, found in by_key.items() if len(found) < MIN_POINTS]
    if few or not by_key:
        raise NotReadyError(
            f"too few models could be timed for {', '.join(few) or 'any operator'}",
            hint="stop other work on the board, cool it, and calibrate again",
            code="too-few-timings",
        )
    costs = {key: fit_cost(found, invoke_s) for key, found in sorted(by_key.items())}
    return OpTable(
        profile=profile, source="measured", threads=threads, invoke_s=invoke_s, costs=costs,
        error=statistics.median(c.error for c in costs.values()),
        measured=now.isoformat(timespec="seconds"), same=dict(same),
    )  # fmt: skip


def fit_cost(timings: Sequence[Timing], invoke_s: float) -> OpCost:
    """The cost that makes the relative errors of these timings smallest, robustly.

    For every tile the three coefficients, none below 0 (a longer operator is never faster), by
    iteratively reweighted least squares with Huber's weights (Huber 1964; k = 1.345 of the scale by
    the median absolute deviation), since a measurement may be spoilt by other work on the board. The
    tile with the smallest error of leaving one out wins; a larger one must earn it.
    """
    best: tuple[float, tuple[int, int], tuple[float, ...]] | None = None
    for tile in _tiles(timings):
        rows, wanted = _equations(timings, invoke_s, tile)
        error = statistics.median(_left_out_errors(rows, wanted))
        # a tenth better at least: with few models some tile always fits them by chance
        if best is None or error < 0.9 * best[0]:
            best = (error, tile, _robust_fit(rows, wanted))
    assert best is not None  # _tiles has (1, 1) at least
    error, tile, (op_s, mac_s, byte_s) = best
    return OpCost(op_s=op_s, mac_s=mac_s, byte_s=byte_s, tile=tile, error=error, points=len(timings))  # fmt: skip


def _tiles(timings: Sequence[Timing]) -> list[tuple[int, int]]:
    channels = [op.channels for t in timings for op in t.ops]
    inside, out = (TILES if any(c[side] for c in channels) else (1,) for side in (0, 1))
    return sorted(itertools.product(inside, out), key=math.prod)


def _equations(
    timings: Sequence[Timing], invoke_s: float, tile: tuple[int, int]
) -> tuple[list[list[float]], list[float]]:
    """(rows, wanted): operators, MACs in whole tiles and bytes of each model, and what they should
    come to. Both are divided by the model's own time, so that residuals are relative errors."""
    rows = [
        [
            len(timing.ops) / timing.seconds,
            sum(tiled_macs(op, tile) for op in timing.ops) / timing.seconds,
            sum(op.bytes for op in timing.ops) / timing.seconds,
        ]
        for timing in timings
    ]
    return rows, [max(0.0, 1 - invoke_s / timing.seconds) for timing in timings]


def _residuals(x: Sequence[float], rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:  # fmt: skip
    return [sum(c * f for c, f in zip(x, row, strict=True)) - y for row, y in zip(rows, wanted, strict=True)]  # fmt: skip


def _left_out_errors(rows: list[list[float]], wanted: list[float]) -> list[float]:
    """Relative error of predicting each model from all others."""
    errors = []
    for i in range(len(rows)):
        found = _robust_fit(rows[:i] + rows[i + 1 :], wanted[:i] + wanted[i + 1 :])
        errors.append(abs(_residuals(found, rows[i : i + 1], wanted[i : i + 1])[0]))
    return errors


def _robust_fit(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> tuple[float, ...]:
    found = non_negative_least_squares(rows, wanted)
    for _ in range(REWEIGHTINGS):
        residuals = _residuals(found, rows, wanted)
        scale = 1.4826 * statistics.median(abs(r) for r in residuals)
        if scale == 0:
            break
        roots = [math.sqrt(min(1.0, 1.345 * scale / abs(r))) if r else 1.0 for r in residuals]
        found = non_negative_least_squares(
            [[root * f for f in row] for root, row in zip(roots, rows, strict=True)],
            [root * y for root, y in zip(roots, wanted, strict=True)],
        )
    return found


def non_negative_least_squares(
    rows: Sequence[Sequence[float]], wanted: Sequence[float]
) -> tuple[float, ...]:
    """x >= 0 with the smallest sum of (rows x - wanted)^2, for a handful of unknowns.

    The answer is the unconstrained one on those unknowns that are not 0 (Lawson & Hanson 1974,
    chapter 23), so every subset of unknowns is tried: 8 for three.
    """
    count = len(rows[0])
    # columns of like size, so that 1e-12 s per MAC is not lost beside 1e-6 s per operator
    sizes = [math.sqrt(sum(row[i] ** 2 for row in rows)) or 1.0 for i in range(count)]
    scaled = [[row[i] / sizes[i] for i in range(count)] for row in rows]
    best, smallest = (0.0,) * count, sum(y * y for y in wanted)
    for used in (s for n in range(1, count + 1) for s in itertools.combinations(range(count), n)):
        normal = [[sum(row[i] * row[j] for row in scaled) for j in used] for i in used]
        right = [sum(row[i] * y for row, y in zip(scaled, wanted, strict=True)) for i in used]
        solved = _solve(normal, right)
        if solved is None or min(solved) < 0:
            continue
        x = [0.0] * count
        for i, value in zip(used, solved, strict=True):
            x[i] = value
        left = sum((sum(c * f for c, f in zip(x, row, strict=True)) - y) ** 2 for row, y in zip(scaled, wanted, strict=True))  # fmt: skip
        if left < smallest:
            best, smallest = tuple(c / s for c, s in zip(x, sizes, strict=True)), left
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination with pivoting; None for a singular matrix."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) < 1e-12:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]
