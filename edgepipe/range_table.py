"""The range of every activation: one table, whichever way it was found, that can be read and given."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from edgepipe.errors import StageOptionError

SCHEMA = 2

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class RangeTable:
    """Tensor name -> (low, high), how they were found, on how many samples of which data."""

    ranges: Mapping[str, Range]
    method: str
    samples: int = 0
    data: str = ""


def table_text(table: RangeTable) -> str:
    """``ranges.json``: what `read_table` reads."""
    tensors = {name: {"min": low, "max": high} for name, (low, high) in table.ranges.items()}
    data = {
        "schema": SCHEMA,
        "method": table.method,
        "samples": table.samples,
        "data": table.data,
        "tensors": tensors,
    }
    return json.dumps(data, indent=1) + "\n"


def read_table(path: Path) -> RangeTable:
    """Read a ``ranges.json``; StageOptionError naming the file and what is wrong with it.

    Files of schema 1 do not say their method: they are ``min_max``.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise StageOptionError(f"cannot read {path}: {exc}", hint="check ranges = ...") from exc
    except (ValueError, RecursionError) as exc:
        raise StageOptionError(f"{path} is not JSON: {exc}", hint="write it as quantize_int8 writes ranges.json") from exc  # fmt: skip
    if not isinstance(data, dict) or not isinstance(data.get("tensors"), dict):
        raise StageOptionError(f'{path} has no "tensors"', hint='{"schema": 2, "tensors": {"NAME": {"min": -1.0, "max": 1.0}}}')  # fmt: skip
    if data.get("schema", SCHEMA) not in (1, SCHEMA):
        raise StageOptionError(f"{path} has schema {data['schema']!r}, known are 1 and {SCHEMA}", hint="update edgepipe")  # fmt: skip
    found = {}
    for name, entry in data["tensors"].items():
        low, high = _ends(entry)
        if not math.isfinite(low) or not math.isfinite(high) or low > high:
            raise StageOptionError(f"{path}: tensor {name!r} has no range: {entry!r}", hint='{"min": -1.0, "max": 1.0}')  # fmt: skip
        found[name] = (low, high)
    samples = data.get("samples", 0)
    if not isinstance(samples, int):
        raise StageOptionError(f"{path}: samples is {samples!r}, not a number of them", hint='"samples": 500')  # fmt: skip
    return RangeTable(
        ranges=found,
        method=str(data.get("method", "min_max")),
        samples=samples,
        data=str(data.get("data", "")),
    )


def _ends(entry: object) -> Range:
    """(min, max) of one tensor's entry; NaN for what is no number."""
    given = [entry.get("min"), entry.get("max")] if isinstance(entry, dict) else [None, None]
    try:
        low, high = (float(v) if isinstance(v, int | float) else math.nan for v in given)
    except OverflowError:
        return math.nan, math.nan
    return low, high
