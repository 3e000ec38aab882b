"""Tables of a stored run that say what its stages made of the model, and how training went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgepipe.table import Table
from edgepipe.units import format_bytes, format_seconds

MODEL_TITLE = "Model by step"
# Levels of a curve, lowest first; ASCII, as a report goes to any terminal and log.
LEVELS = "_.-:=+*#"
CURVE_WIDTH = 40


def model_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """Parameters, MACs, int8 bytes and predicted latencies of the model after each compressing step."""
    changed = [s for s in steps if {"before", "after"} <= _facts(s).keys()]
    profiles = list(dict.fromkeys(p for s in changed for p in s.get("predicted", {})))
    rows: list[tuple[str, ...]] = []
    last: Mapping[str, Any] = {}
    for step in changed:
        facts, predicted = _facts(step), step.get("predicted", {})
        # another model may stand between two steps: distill begins with another one
        if facts["before"] != last:
            name = "before" if not rows else f"before {step['step']}"
            rows.append(_model_row(name, facts["before"], {p: v["before_s"] for p, v in predicted.items()}, profiles))  # fmt: skip
        rows.append(_model_row(step["step"], facts["after"], {p: v["after_s"] for p, v in predicted.items()}, profiles))  # fmt: skip
        last = facts["after"]
    sources = {p: v["source"] for s in changed for p, v in s.get("predicted", {}).items()}
    header = ("after", "parameters", "MACs", "int8 bytes", *(f"predicted on {p} (operators {sources[p]})" for p in profiles))  # fmt: skip
    return Table(MODEL_TITLE, header, tuple(rows))


def _model_row(
    name: str, totals: Mapping[str, int], latencies_s: Mapping[str, float], profiles: Sequence[str]
) -> tuple[str, ...]:
    latencies = (format_seconds(latencies_s[p]) if p in latencies_s else "" for p in profiles)
    return (name, f"{totals['parameters']:,}", f"{totals['macs']:,}", format_bytes(totals["bytes"]), *latencies)  # fmt: skip


def gain_notes(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was warned of: steps that gain nothing on a device."""
    return [
        f"{step['step']}: {predicted['note']}"
        for step in steps
        for predicted in step.get("predicted", {}).values()
        if predicted["note"]
    ]


def layer_tables(steps: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table for each step that changed layers: every layer, before -> after, and why."""
    tables = []
    for step in steps:
        facts = _facts(step)
        if "layers" not in facts:
            continue
        before = {layer["name"]: layer for layer in facts.get("layers_before", ())}
        rows = [_layer_row(layer, before.get(layer["name"]), bool(before)) for layer in facts["layers"]]  # fmt: skip
        kept = {layer["name"] for layer in facts["layers"]}
        rows += [
            (name, layer["kind"], _shape(layer["shape"]), f"{layer['parameters']:,} -> 0", f"{layer['macs']:,} -> 0", f"{layer['bytes']:,} -> 0", "gone")
            for name, layer in before.items()
            if name not in kept
        ]  # fmt: skip
        header = ("layer", "kind", "shape", "parameters", "MACs", "int8 bytes", "what was done")
        tables.append(Table(f"Layers after {step['step']}", header, tuple(rows)))
    return tables


def _layer_row(
    layer: Mapping[str, Any], before: Mapping[str, Any] | None, is_compared: bool
) -> tuple[str, ...]:
    def change(key: str) -> str:
        now = f"{layer[key]:,}"
        if not is_compared:
            return now
        was = before[key] if before else 0
        return now if was == layer[key] else f"{was:,} -> {now}"

    shape = _shape(layer["shape"])
    if before and before["shape"] != layer["shape"]:
        shape = f"{_shape(before['shape'])} -> {shape}"
    return (layer["name"], layer["kind"], shape, change("parameters"), change("macs"), change("bytes"), layer["note"])  # fmt: skip


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def training_tables(steps: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table for each step that trained: first, best and last value of each curve, and its shape."""
    tables = []
    for step in steps:
        epochs = _facts(step).get("epochs") or ()
        rows = []
        for key, title, best, text in (
            ("loss", "loss", min, "{:.4g}"),
            ("accuracy", "training accuracy", max, "{:.2%}"),
            ("validation_accuracy", "validation accuracy", max, "{:.2%}"),
        ):
            values = [e[key] for e in epochs if e.get(key) is not None]
            if not values:
                continue
            chosen = best(values)
            rows.append((
                title, text.format(values[0]), f"{text.format(chosen)} (epoch {values.index(chosen) + 1})",
                text.format(values[-1]), sparkline(values),
            ))  # fmt: skip
        if rows:
            title = f"Training in {step['step']}, {len(epochs)} epochs"
            tables.append(Table(title, ("curve", "first", "best", "last", "from first to last"), tuple(rows)))  # fmt: skip
    return tables


def sparkline(values: Sequence[float], *, width: int = CURVE_WIDTH) -> str:
    """A curve of characters, `LEVELS` from the smallest value to the largest; means of neighbours
    where there are more than ``width``. ``sparkline([0, 1, 7]) == "_.#"``."""
    if len(values) > width:
        ends = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    low, high = min(values), max(values)
    if not math.isfinite(high - low):
        return ""
    span = high - low
    return "".join(LEVELS[min(len(LEVELS) - 1, int((v - low) / span * len(LEVELS))) if span else 0] for v in values)  # fmt: skip


def _facts(step: Mapping[str, Any]) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = (step.get("artifact") or {}).get("facts", {})
    return facts
