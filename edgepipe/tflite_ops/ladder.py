"""The rescue ladder: from plain int8, rung by rung, to the first file that keeps its accuracy.

1 plain  2 ranges  3 equalise and repair  4 tensors  5 bias  6 rounding  7 mixed precision. Within a rung the
candidate wins whose outputs are nearest to the float model's on calibration data: the best score of
many is often luck, and what lies near float stays near on other data. It is then judged by the
caller, on other data and on the exported file. If it is better (`is_better`) the next rung builds
on it. The first whose drop is allowed, and by more than luck (`_Ladder._is_sure`), is the result; in
doubt the ladder goes on, but not to the last rung, which costs latency.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from edgepipe.array_ops.ranges import METHODS, Range
from edgepipe.errors import StageError
from edgepipe.tflite_ops.bias import correct_biases
from edgepipe.tflite_ops.calibrate import (
    FROM_HISTOGRAMS,
    Batches,
    collect_histograms,
)
from edgepipe.tflite_ops.channels import ChannelStatistics, channel_statistics
from edgepipe.tflite_ops.equalise import check_unchanged, equalise, repair_dead_channels
from edgepipe.tflite_ops.flatbuffer import Subgraph, parse_model
from edgepipe.tflite_ops.quantize import (
    IoDtype,
    Precision,
    check_full_integer,
    collect_ranges,
    quantize,
    wide_operators,
)
from edgepipe.tflite_ops.rewrite import SPELT_OUT, spell_out
from edgepipe.tflite_ops.run import open_tflite
from edgepipe.tflite_ops.sensitivity import (
    Sensitivity,
    door_noise,
    layer_sensitivity,
    layers_of,
    noise_share,
    outputs_of,
    weight_noise,
)

log = logging.getLogger(__name__)

# Calibration samples on which files are compared with the float file, rung against rung.
COMPARED = 64
# With noise of less than -20 dB a file decides as float does: of the trained networks of
# ci/bench/int8_rescue.py those that int8 keeps have 0.0004 to 0.0033, those that it ruins 0.12 and 0.31.
NEAR = 0.01
# Those that weights are rounded by: more, since they are fitted to them.
LEARNED_FROM = 256
# A layer whose noise alone, with all others in float, is above this is called a culprit: -20 dB.
CULPRIT = 0.01
CULPRITS_NAMED = 5
# Channels of one tensor that differ by this much are named as a cause: 255 / 64 = 4 steps are left
# for the median one.
WIDE_SPREAD = 64.0
# 16 bits for more layers are not worth their latency once noise is this near to what all of them leave
NO_BETTER = 1.1
# Tensors whose range is chosen one by one, the first of the graph: what they lose goes through all others
TENSORS = 24
# Ranges whose ends differ by less than this share of their width are the same
ALIKE = 0.02
BY_TENSOR = "by tensor"
# A door of int8 is a cause where it alone leaves more noise than `NEAR`, and this share of all that is left
DOOR_SHARE = 0.25
# Weights are learned to be rounded where they alone leave this share of all noise. Of the networks of
# ci/bench/int8_rescue.py that come so far, with shares below 0.03, one had 8 % less noise from it and two a half more.
WEIGHT_SHARE = 0.1
# Layers whose result has the size of what they are given, so that 8 bits there undo 16 around them
BRIDGES = frozenset(
    {"HARD_SWISH", "MAX_POOL_2D", "PAD", "PADV2", "RELU", "RESHAPE", "SLICE", "SPLIT", "STRIDED_SLICE", "TRANSPOSE"}
)  # fmt: skip
# Layers of the same scale before and behind
ONE_SCALE = BRIDGES - {"HARD_SWISH", "RELU"}
# 100 * (0.53 - 0.52) is 1.0000000000000009 points, which is a drop of 1
ROUNDING = 1e-9
# Of each file's latency, as many inferences as fit into a share of a second, in turns.
ROUNDS, ROUND_S = 5, 0.01


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a file is worth on the evaluation data: ``score`` (0 to 1) of ``samples`` samples, the
    loss in ``drop_points`` with its 95 % interval where the metric counts samples. ``told`` says it in
    other words where it is no accuracy."""

    score: float
    drop_points: float
    samples: int
    interval_points: tuple[float, float] | None = None
    told: str = ""


@dataclasses.dataclass(frozen=True)
class Rung:
    """``noise`` is `noise_share` against the float file on calibration samples; ``held`` whether the
    drop is allowed, ``sure`` whether it is so by more than luck; ``kept`` whether later rungs build on
    it. ``latency_s`` is this host's, None where there is no other rung to compare with."""

    name: str
    did: str
    judgement: Judgement
    noise: float
    size_bytes: int
    held: bool
    sure: bool
    kept: bool
    latency_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to make the int8 file. ``unrounded`` is the float file before its weights were made to be
    rounded, whose means biases are corrected to."""

    content: bytes
    ranges: Mapping[str, Range]
    method: str
    corrected: bool = False
    unrounded: bytes = b""
    precision: Mapping[str, Precision] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rescue:
    """Where the ladder ended. ``content`` is the int8 file of the last rung that was kept,
    ``float_content`` what it was made from, ``precision`` the layers that are not int8. ``causes`` are sentences about what was
    wrong with the model, ``culprits`` the layers that would spoil it alone, worst first. ``at_door`` is
    the noise that int8 inputs alone leave, ``at_output`` that of int8 outputs, 0 where it is no cause (`DOOR_SHARE`). ``made`` is how the
    file of each rung was made, and that file."""

    content: bytes
    float_content: bytes
    ranges: Mapping[str, Range]
    method: str
    precision: Mapping[str, Precision]
    rungs: tuple[Rung, ...]
    causes: tuple[str, ...]
    culprits: tuple[Sensitivity, ...]
    float_latency_s: float | None = None
    at_door: float = 0.0
    at_output: float = 0.0
    made: tuple[tuple[Plan, bytes], ...] = ()

    @property
    def result(self) -> Rung:
        return _last_kept(self.rungs)

    @property
    def held(self) -> bool:
        return self.result.held


Judge = Callable[[bytes], Judgement]
Until = Literal["held", "sure"]
# (float file, int8 file, calibration batches) -> (float file with weights to be rounded so, what was done)
RoundWeights = Callable[[bytes, bytes, Sequence[Sequence[np.ndarray]]], tuple[bytes, str]]


def climb(
    content: bytes,
    ranges: Mapping[str, Range],
    method: str,
    *,
    batches: Batches,
    judge: Judge,
    max_drop: float,
    input_dtype: IoDtype,
    output_dtype: IoDtype,
    allow_float: Sequence[str],
    round_weights: RoundWeights | None,
    where: str,
    until: Until = "held",
    precision: Mapping[str, Precision] | None = None,
    states: Sequence[tuple[int, int]] = (),
) -> Rescue:
    """Climb until ``judge`` finds a drop of at most ``max_drop`` points; the result says if one held.

    ``content`` is the float file with activations fused, ``ranges`` those of plain calibration by
    ``method``. ``batches`` gives the calibration data, (1, ...) for each input, as often as it is
    called. ``until`` it is "sure" layers are given 16 bits, too, where a file that costs no latency holds
    perhaps by luck. Layers are put into float only if their operator is in ``allow_float``, into 16 bits
    wherever the quantiser can. ``precision`` are those that are not int8 from the start,
    ``states`` as for `quantize.quantize`.
    """
    return _Ladder(
        batches=batches, judge=judge, max_drop=max_drop, input_dtype=input_dtype,
        output_dtype=output_dtype, allow_float=tuple(allow_float), round_weights=round_weights,
        where=where, original=content, until=until, states=states,
    ).climb(Plan(content, ranges, method, precision=precision or {}))  # fmt: skip


class _Ladder:
    """The rungs so far; each method is one rung, plan in and plan out."""

    def __init__(
        self, *, batches: Batches, judge: Judge, max_drop: float, input_dtype: IoDtype,
        output_dtype: IoDtype, allow_float: tuple[str, ...], round_weights: RoundWeights | None,
        where: str, original: bytes, until: Until, states: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        self.batches, self.judge, self.max_drop, self.until = batches, judge, max_drop, until
        self.doors: dict[str, Any] = {"input_dtype": input_dtype, "output_dtype": output_dtype, "states": states}  # fmt: skip
        self.allow_float, self.round_weights, self.where = allow_float, round_weights, where
        self.original = original
        # (step * k)th samples, so that a set sorted by class is seen whole
        total = sum(1 for _ in batches())
        step, wide = max(1, total // COMPARED), max(1, total // LEARNED_FROM)
        self.few = list(itertools.islice(batches(), 0, COMPARED * step, step))
        self.many = list(itertools.islice(batches(), 0, LEARNED_FROM * wide, wide))
        # `few` are to tell whether what was fitted to these is nearer on others, too
        self.others = [b for i, b in enumerate(self.many) if (i * wide) % step] or self.few
        self.expected = outputs_of(original, self.few, where=where)
        self.rungs: list[Rung] = []
        self.made: list[tuple[Plan, bytes]] = []
        self.causes: list[str] = []
        self.culprits: list[Sensitivity] = []
        self.known_noise: dict[bytes, float] = {}
        self.known_tables: dict[bytes, dict[str, Mapping[str, Range]]] = {}
        self.judged: dict[bytes, Judgement] = {}

    def climb(self, plan: Plan) -> Rescue:
        steps = (
            self._better_ranges,
            self._equalised,
            self._by_tensor,
            self._bias,
            self._rounded,
            self._mixed,
        )
        try:
            made = self._step("plain", f"int8 with {plan.method} ranges", plan)
        except StageError as exc:
            if exc.code != "infinite-range":
                raise
            # weights that no int8 file can hold; behind a dead channel they need not be there
            log.info("rung plain: %s", exc.message)
            before = channel_statistics(plan.content, self.batches(), where=self.where)
            content, repaired = repair_dead_channels(plan.content, before, where=self.where)
            if not repaired:
                raise
            check_unchanged(self.original, content, self.few, where=self.where)
            self.causes += repaired
            plan = dataclasses.replace(plan, content=content)
            made = self._step("repair", f"{len(repaired)} dead gain(s) set to 0", plan)
        for step in steps:
            last = _last_kept(self.rungs)
            # a doubt is worth climbing for, but not the latency of 16 bits unless that is asked for
            if last.held and last.sure:
                break
            if step == self._mixed and self.until == "held" and any(r.held for r in self.rungs):
                break
            plan, made = step(plan, made)
        if not _last_kept(self.rungs).held and any(r.held for r in self.rungs):
            plan, made = self._nearest_that_held()
        float_latency, rungs = None, tuple(self.rungs)
        if len(rungs) > 1:
            float_latency, *latencies = host_latencies([self.original, *(m for _, m in self.made)])
            rungs = tuple(
                dataclasses.replace(rung, latency_s=latency)
                for rung, latency in zip(rungs, latencies, strict=True)
            )
        self._tell_what_is_left(plan, made)
        at_door, at_output = self._noise_at_door(plan), self._noise_at_output(made)
        return Rescue(
            content=made, at_door=at_door, at_output=at_output, float_content=plan.content, ranges=plan.ranges, method=plan.method,
            precision=plan.precision, rungs=rungs, causes=tuple(self.causes),
            culprits=tuple(self.culprits), float_latency_s=float_latency,
            made=tuple(self.made),
        )  # fmt: skip

    def _nearest_that_held(self) -> tuple[Plan, bytes]:
        held = [i for i, r in enumerate(self.rungs) if r.held]
        best = min(held, key=lambda i: self.rungs[i].noise)
        self.rungs = [dataclasses.replace(r, kept=i == best or (r.kept and i < best)) for i, r in enumerate(self.rungs)]  # fmt: skip
        return self.made[best]

    def _noise_at_door(self, plan: Plan) -> float:
        """What int8 inputs alone leave, with a cause, where it is much of what is left; else 0."""
        left = _last_kept(self.rungs).noise
        if self.doors["input_dtype"] == "float32" or left <= NEAR:
            return 0.0
        names = _inputs(parse_model(plan.content, where=self.where).subgraphs[0])
        noise = door_noise(plan.content, {n: plan.ranges[n] for n in names}, self.few, where=self.where)  # fmt: skip
        if noise <= max(NEAR, DOOR_SHARE * left):
            return 0.0
        self.causes.append(
            f"int8 at the input ({', '.join(map(repr, names))}) alone leaves noise {noise:.2g}, of {left:.2g} in all:"
            " no layer can mend it"
        )
        return noise

    def _noise_at_output(self, made: bytes) -> float:
        """What rounding float's own outputs to int8 leaves, with a cause for each output where that is
        much of what is left; else 0."""
        last = _last_kept(self.rungs)
        if self.doors["output_dtype"] == "float32" or last.held:
            return 0.0
        worst = 0.0
        for values, door in zip(self.expected, open_tflite(made).get_output_details(), strict=True):
            step = float(door["quantization"][0])
            # clipping is a choice of a rung, steps are not
            noise = noise_share([values], [np.rint(values / step) * step]) if step else 0.0
            if noise <= max(NEAR, DOOR_SHARE * last.noise):
                continue
            varies = float(values.std(axis=0).mean())
            self.causes.append(
                f"int8 at the output ({door['name']!r}, {values.min():.6g} to {values.max():.6g}) alone leaves noise"
                f" {noise:.2g}: a value varies by {varies:.3g}, and one step is {step:.3g}; no layer can mend it"
            )
            worst = max(worst, noise)
        return worst

    def _tell_what_is_left(self, plan: Plan, made: bytes) -> None:
        """Of an int8 file whose loss is allowed, perhaps by luck: where its noise comes from, and what
        the rung that would cost latency would leave of it."""
        last = _last_kept(self.rungs)
        if not last.held or last.sure or plan.precision:
            return
        graph = parse_model(plan.content, where=self.where).subgraphs[0]
        doors = {n: plan.ranges[n] for n in _inputs(graph)}
        parts = [f"int8 weights alone leave {weight_noise(plan.content, made, self.few, where=self.where):.2g}"]  # fmt: skip
        if self.doors["input_dtype"] != "float32":
            parts.append(f"the int8 input {door_noise(plan.content, doors, self.few, where=self.where):.2g}")  # fmt: skip
        legal = wide_operators() | SPELT_OUT
        first = [n for n, operator in layers_of(graph).items() if operator in legal][:TENSORS]
        wide = self._widened(plan, "int16", first, self._range_tables(plan)) if first else None
        if wide is not None:
            narrow_s, wide_s = host_latencies([made, wide[1]])
            parts.append(
                f"with 16-bit activations in the first {len(first)} layers {self._noise(wide[1]):.2g} would be left"
                f" ({wide_s / narrow_s:.1f} times the latency on this host)"
            )
        self.causes.append(f"noise {last.noise:.2g} is left: " + ", ".join(parts))

    # --- rungs ---

    def _better_ranges(self, plan: Plan, made: bytes) -> tuple[Plan, bytes]:
        candidates = self._range_candidates(plan)
        best = min(candidates, key=lambda c: self._noise(c[1]))
        if best[1] == made:
            log.info("rung ranges: none of %s is nearer to float", ", ".join(c[0].method for c in candidates))  # fmt: skip
            return plan, made
        return self._accept("ranges", f"{best[0].method} ranges instead of {plan.method}", best[0], plan, made, content=best[1])  # fmt: skip

    def _range_candidates(self, plan: Plan) -> list[tuple[Plan, bytes]]:
        tables = self._range_tables(plan)
        plans = [dataclasses.replace(plan, ranges=t, method=m) for m, t in tables.items()]
        return [(p, self._make(p)) for p in plans]

    def _range_tables(self, plan: Plan) -> dict[str, Mapping[str, Range]]:
        """Method -> its ranges for the plan's float file, with the plan's own among them."""
        key = hashlib.sha256(plan.content).digest()
        if key not in self.known_tables:
            found = collect_ranges(plan.content, self.batches(), where=self.where)
            limits = found.table()
            histograms = collect_histograms(plan.content, self.batches(), limits, where=self.where)
            tables: dict[str, Mapping[str, Range]] = {
                "min_max": limits,
                "moving_average": found.averages(),
            }
            for method in FROM_HISTOGRAMS:
                tables[method] = {n: METHODS[method](h) for n, h in histograms.items()}
            self.known_tables[key] = tables
        return {plan.method: plan.ranges, **self.known_tables[key]}

    def _equalised(self, plan: Plan, made: bytes) -> tuple[Plan, bytes]:
        before = channel_statistics(plan.content, self.batches(), where=self.where)
        content, repaired = repair_dead_channels(plan.content, before, where=self.where)
        self.causes += repaired
        self._name_spread(before)
        did = [f"{len(repaired)} dead gain(s) set to 0"] if repaired else []
        options = [content] if repaired else []
        for strength in (0.5, 1.0):
            scaled, told = equalise(content, before, strength=strength, where=self.where)
            if told:
                options.append(scaled)
                if strength == 1.0:
                    did.append(f"{len(told)} layer(s) equalised")
        if not options:
            log.info("rung equalise: no dead channels with absurd weights, no pair of layers to equalise")  # fmt: skip
            return plan, made
        best: tuple[Plan, bytes] | None = None
        for option in options:
            check_unchanged(self.original, option, self.few, where=self.where)
            for candidate in self._range_candidates(dataclasses.replace(plan, content=option)):
                if best is None or self._noise(candidate[1]) < self._noise(best[1]):
                    best = candidate
        assert best is not None
        if best[0].content == content:
            did = did[:1]
        return self._accept("equalise", ", ".join(did) + f", {best[0].method} ranges", best[0], plan, made, content=best[1])  # fmt: skip

    def _by_tensor(self, plan: Plan, made: bytes) -> tuple[Plan, bytes]:
        """Ranges tensor by tensor in order of execution, each by the method that leaves outputs nearest
        to float while all behind it is in float, whose noise would hide its own."""
        tables = self._range_tables(plan)
        graph = parse_model(plan.content, where=self.where).subgraphs[0]
        ranges = {**plan.ranges, **self._door_ranges(plan.content, tables)}
        behind = layers_of(graph)
        expected = outputs_of(self.original, self.others, where=self.where)
        looked = 0
        for name in list(behind):
            operator = behind.pop(name)
            options = unlike([table[name] for table in tables.values()])
            if len(options) == 1 or operator in ONE_SCALE or name in plan.precision:
                continue
            precision = {**dict.fromkeys(behind, "float"), **plan.precision}

            def noise(option: Range, name: str = name, precision: Any = precision) -> float:
                alone = quantize(
                    plan.content, {**ranges, name: option}, precision=precision, where=self.where,
                    input_dtype=self.doors["input_dtype"], output_dtype="float32",
                )  # fmt: skip
                return noise_share(expected, outputs_of(alone, self.others, where=self.where))

            ranges[name] = min(options, key=noise)
            looked += 1
            if looked == TENSORS:
                break
        changed = sum(ranges[n] != plan.ranges[n] for n in ranges)
        if not changed:
            log.info("rung tensors: %s ranges are the nearest for each of them", plan.method)
            return plan, made
        new = dataclasses.replace(plan, ranges=ranges, method=BY_TENSOR)
        return self._accept("tensors", f"ranges of {changed} tensors by other methods than {plan.method}", new, plan, made)  # fmt: skip

    def _bias(self, plan: Plan, made: bytes) -> tuple[Plan, bytes]:
        # with all ranges: what the nearest of them clips, biases may mend in a wider or narrower one
        best: tuple[Plan, bytes] | None = None
        for candidate, bare in self._range_candidates(plan):
            content, layers = correct_biases(plan.content, bare, self.few, where=self.where)
            if best is None or self._noise(content) < self._noise(best[1]):
                best = dataclasses.replace(candidate, corrected=True), content
                did = f"biases of {layers} layers corrected, {candidate.method} ranges"
        assert best is not None
        return self._accept("bias", did, best[0], plan, made, content=best[1])

    def _rounded(self, plan: Plan, made: bytes) -> tuple[Plan, bytes]:
        if self.round_weights is None:
            log.info("rung rounding: left out (no PyTorch, or not asked for)")
            return plan, made
        bare = self._make(dataclasses.replace(plan, corrected=False))
        left = _last_kept(self.rungs).noise
        alone = weight_noise(plan.content, bare, self.few, where=self.where)
        if alone <= WEIGHT_SHARE * left:
            log.info("rung rounding: left out, int8 weights alone leave noise %.2g of %.2g", alone, left)  # fmt: skip
            return plan, made
        content, did = self.round_weights(plan.content, bare, self.many)
        # these weights are no longer the float model's: they are made to be rounded
        new = dataclasses.replace(plan, content=content, unrounded=plan.content)
        return self._accept("rounding", did, new, plan, made)

    def _mixed(self, plan: Plan, made: bytes) -> tuple[Plan, bytes]:
        tables = self._range_tables(plan)
        # before layers that add next to nothing a door needs the range that is best for itself
        doors = self._door_ranges(plan.content, tables)
        tables = {method: {**table, **doors} for method, table in tables.items()}
        ranked = layer_sensitivity(plan.content, plan.ranges, self.few, where=self.where)
        self.culprits = [s for s in ranked if s.noise > CULPRIT][:CULPRITS_NAMED] or ranked[:1]
        # those that were not looked at come last
        in_order = layers_of(parse_model(plan.content, where=self.where).subgraphs[0])
        order = {s.layer: s.operator for s in ranked} | in_order
        kinds: tuple[Precision, ...] = ("int16", "float")
        result = plan, made
        for kind, weights in itertools.product(kinds, self._weights(plan)):
            last = _last_kept(self.rungs)
            # a doubt is worth the other weights, but not float
            if last.held and (last.sure or kind == "float"):
                break
            legal = wide_operators() | SPELT_OUT if kind == "int16" else self.allow_float
            usable = [layer for layer, operator in order.items() if operator in legal]
            # what the first layers lose goes through all others, though none of them may be the worst alone
            first = [layer for layer in in_order if layer in usable]
            found = self._fewest(weights, kind, (usable, first), tables) if usable else None
            if found is None:
                continue
            new, content = found
            widened = "with 16-bit activations" if kind == "int16" else "in float"
            count = sum(layer in new.precision for layer in order)
            did = f"{count} of {len(order)} layers {widened}"
            if weights is not plan:
                did += ", weights rounded to nearest"
            result = self._accept("mixed", did, new, *result, content=content)
        return result

    def _weights(self, plan: Plan) -> list[Plan]:
        """The plan, and the same with weights that were not made for what 8 bits make of activations:
        where 16 hold those, nearest ones may lie nearer to float's."""
        return [plan, dataclasses.replace(plan, content=plan.unrounded, unrounded=b"")] if plan.unrounded else [plan]  # fmt: skip

    def _door_ranges(
        self, content: bytes, tables: Mapping[str, Mapping[str, Range]]
    ) -> dict[str, Range]:
        """For each input the range that leaves outputs nearest to float while all else is in float."""

        def noise(name: str, method: str) -> float:
            return door_noise(content, {name: tables[method][name]}, self.few, where=self.where)

        names = _inputs(parse_model(content, where=self.where).subgraphs[0])
        return {n: tables[min(tables, key=functools.partial(noise, n))][n] for n in names}

    def _fewest(
        self,
        plan: Plan,
        kind: Precision,
        orders: Sequence[Sequence[str]],
        tables: Mapping[str, Mapping[str, Range]],
    ) -> tuple[Plan, bytes] | None:
        """The fewest layers, the first of any of the ``orders``, that hold or are as near to float as all
        of them would be (`NO_BETTER`). None where no such file can be made."""
        bare: dict[tuple[str, ...], tuple[Plan, bytes] | None] = {}
        corrected: dict[tuple[str, ...], bytes] = {}

        def near(layers: tuple[str, ...]) -> float:
            if layers not in bare:
                bare[layers] = self._widened(plan, kind, layers, tables)
            found = bare[layers]
            return self._noise(found[1]) if found else float("inf")

        def content(layers: tuple[str, ...]) -> bytes:
            if layers not in corrected:
                found = bare[layers]
                assert found is not None
                corrected[layers] = self._corrected(*found)
            return corrected[layers]

        every = tuple(orders[0])
        all_left = near(every)
        enough = NO_BETTER * all_left if all_left < float("inf") else 0.0

        def is_enough(layers: tuple[str, ...]) -> bool:
            left = near(layers)
            if left == float("inf"):
                return False
            log.debug(
                "%d layers in %s: noise %.4f, all leave %.4f", len(layers), kind, left, all_left
            )
            return left <= enough or is_held(content(layers))

        def is_held(made: bytes) -> bool:
            return self._holds(made) and (self.until == "held" or self._is_sure(made))

        best: tuple[str, ...] | None = None
        for order in orders:
            most = len(every) if best is None else len(best) - 1
            count = least(lambda n, order=order: is_enough(tuple(order[:n])), most)  # type: ignore[misc]
            best = best if count is None else tuple(order[:count])
        if best is None:
            return None
        found = bare[best]
        assert found is not None
        if not is_held(content(best)) and len(best) < len(every):
            self.causes.append(
                f"noise is {near(best):.2g} with {len(best)} layer(s) in {kind} and {all_left:.2g} with all {len(every)}:"
                " more would only cost latency"
            )
        return found[0], content(best)

    def _widened(
        self,
        plan: Plan,
        kind: Precision,
        layers: Sequence[str],
        tables: Mapping[str, Mapping[str, Range]],
    ) -> tuple[Plan, bytes] | None:
        """The plan with these layers wide, before biases are corrected; None where the quantiser has
        no such form of one of them.

        With 16 bits there is no need to clip: tensors between such layers get their whole range. The
        others, which 8 bits have to hold as well, get the best of ``tables``.
        """
        source, spelt = plan.content, dict[str, Range]()
        if kind == "int16":
            layers = with_bridges(parse_model(source, where=self.where).subgraphs[0], layers)
            source, spelt = spell_out(source, layers, tables["min_max"], where=self.where)
        graph = parse_model(source, where=self.where).subgraphs[0]
        precision = {**plan.precision, **dict.fromkeys((*layers, *spelt), kind)}
        limits = tables["min_max"]
        whole = {n: limits[n] for n in tensors_between(graph, precision) if n in limits}
        made: list[tuple[Plan, bytes]] = []
        for method, table in tables.items():
            ranges = {**table, **whole, **spelt}
            new = dataclasses.replace(plan, content=source, precision=precision, ranges=ranges, method=method)  # fmt: skip
            try:
                made.append((new, self._bare(new)))
            except StageError as exc:
                log.info("%d layers in %s: %s", len(layers), kind, exc.message)
                return None
        return min(made, key=lambda m: self._noise(m[1]))

    # --- what they share ---

    def _make(self, plan: Plan) -> bytes:
        return self._corrected(plan, self._bare(plan))

    def _bare(self, plan: Plan) -> bytes:
        made = quantize(plan.content, plan.ranges, precision=plan.precision, where=self.where, **self.doors)  # fmt: skip
        check_full_integer(made, allow_float=self.allow_float, where=self.where)
        return made

    def _corrected(self, plan: Plan, bare: bytes) -> bytes:
        if not plan.corrected:
            return bare
        return correct_biases(plan.unrounded or plan.content, bare, self.few, where=self.where)[0]

    def _noise(self, content: bytes) -> float:
        key = hashlib.sha256(content).digest()
        if key not in self.known_noise:
            found = outputs_of(content, self.few, where=self.where)
            self.known_noise[key] = noise_share(self.expected, found)
        return self.known_noise[key]

    def _judge(self, content: bytes) -> Judgement:
        key = hashlib.sha256(content).digest()
        if key not in self.judged:
            self.judged[key] = self.judge(content)
        return self.judged[key]

    def _holds(self, content: bytes) -> bool:
        return self._judge(content).drop_points <= self.max_drop + ROUNDING

    def _is_sure(self, content: bytes) -> bool:
        """Is a drop that is allowed more than luck? The samples tell it (the whole interval is
        allowed), or outputs are so near to float's that luck has no part in it (`NEAR`). Where the
        metric has no interval the drop is believed."""
        interval = self._judge(content).interval_points
        return interval is None or interval[1] <= self.max_drop or self._noise(content) <= NEAR

    def _step(self, name: str, did: str, plan: Plan, content: bytes | None = None) -> bytes:
        made = self._make(plan) if content is None else content
        judged = self._judge(made)
        held, sure = self._holds(made), self._is_sure(made)
        self.rungs.append(Rung(name, did, judged, self._noise(made), len(made), held, sure, kept=True))  # fmt: skip
        self.made.append((plan, made))
        log.info(
            "rung %s (%s): %s, %s", name, did,
            judged.told or f"score {judged.score:.4f}, {judged.drop_points:+.2f} points lost",
            "does not hold" if not held else "holds" if sure else "holds, perhaps by luck",
        )  # fmt: skip
        return made

    def _accept(
        self, name: str, did: str, new: Plan, old: Plan, made: bytes, *, content: bytes | None = None
    ) -> tuple[Plan, bytes]:  # fmt: skip
        """Judge the new plan; the old one stays unless the new `is_better`."""
        before = _last_kept(self.rungs)
        after = self._step(name, did, new, content)
        rung = self.rungs[-1]
        if is_better(rung, before):
            return new, after
        self.rungs[-1] = dataclasses.replace(rung, kept=False)
        return old, made

    def _name_spread(self, statistics: Mapping[str, ChannelStatistics]) -> None:
        layers = layers_of(parse_model(self.original, where=self.where).subgraphs[0])
        wide = sorted(
            (
                (s.spread, n)
                for n, s in statistics.items()
                if n in layers and s.spread > WIDE_SPREAD
            ),
            reverse=True,
        )
        for spread, name in wide[:CULPRITS_NAMED]:
            self.causes.append(
                f"{layers[name]} {name!r}: its largest channel is {spread:.0f} times the median one,"
                f" which is left {255 / spread:.1f} of 255 steps"
            )


def least(is_enough: Callable[[int], bool], most: int) -> int | None:
    """The least of 1 to ``most`` that is enough, by doubling and halving, where all above it are; None
    where none is."""
    count = 1
    while count > most or not is_enough(count):
        if count >= most:
            return None
        count = min(2 * count, most)
    low, high = count // 2, count  # low is not enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _inputs(graph: Subgraph) -> list[str]:
    return [graph.tensors[i].name for i in graph.inputs if graph.tensors[i].is_float]


def unlike(options: Sequence[Range]) -> list[Range]:
    """``options`` without those that are as good as an earlier one (`ALIKE`)."""
    kept: list[Range] = []
    for low, high in options:
        if all(max(abs(low - a), abs(high - b)) > ALIKE * (b - a) for a, b in kept):
            kept.append((low, high))
    return kept


def _last_kept(rungs: Sequence[Rung]) -> Rung:
    return next(r for r in reversed(rungs) if r.kept)


def is_better(new: Rung, old: Rung) -> bool:
    """By score, where it leaves the old one's interval; else by noise, whichever of them holds."""
    low, high = old.judgement.interval_points or 2 * (old.judgement.drop_points,)
    if low <= new.judgement.drop_points <= high:
        return new.noise < old.noise
    return new.judgement.drop_points < low


def with_bridges(graph: Subgraph, chosen: Sequence[str]) -> list[str]:
    """``chosen`` and the layers that do no more than hand on between them (`BRIDGES`), alone or in a
    row: all that a row reads is made by chosen layers, all that it makes is read by chosen ones. Such
    layers would round to 8 bits again what their neighbours keep.
    """
    makers = {i: o for o in graph.operators for i in o.outputs}
    names = {o.index: graph.tensors[o.outputs[0]].name for o in graph.operators if o.outputs}
    bridges = {}
    for o in graph.operators:
        if o.name in BRIDGES and names[o.index] not in chosen:
            read = [makers[i].index for i in o.inputs if i in makers]
            users = [u.index for u in graph.operators if set(o.outputs) & set(u.inputs)]
            bridges[names[o.index]] = [names[i] for i in (*read, *users)] if read and users else [""]  # fmt: skip
    while True:
        stranded = [n for n, ends in bridges.items() if not {*chosen, *bridges}.issuperset(ends)]
        if not stranded:
            return [*chosen, *bridges]
        for name in stranded:
            del bridges[name]


def tensors_between(graph: Subgraph, precision: Mapping[str, Precision]) -> list[str]:
    """The tensors that only layers in ``precision`` make and read: none of them is held in 8 bits."""
    made = {i for o in graph.operators for i in o.outputs}
    narrow = [o for o in graph.operators if graph.tensors[o.outputs[0]].name not in precision]
    held = {i for o in narrow for i in (*o.inputs, *o.outputs)}
    return [graph.tensors[i].name for i in sorted(made - held)]


def host_latencies(files: Sequence[bytes]) -> list[float]:
    """Median seconds of one inference of each int8 or float file on this host, one thread, in turns."""
    models = [open_tflite(content) for content in files]
    for model in models:  # what lies in the memory of an input may be no index of an embedding
        for detail in model.get_input_details():
            model.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    taken: list[list[float]] = [[] for _ in files]
    for _ in range(ROUNDS):
        for model, rows in zip(models, taken, strict=True):
            end = time.perf_counter() + ROUND_S
            while True:
                began = time.perf_counter()
                model.invoke()
                rows.append(time.perf_counter() - began)
                if time.perf_counter() >= end:
                    break
    return [statistics.median(rows) for rows in taken]
