"""Quantities with units, as people write them in recipes: ``"33 ms"``, ``"50 MiB"``, ``"3 %"``.

Inside edgepipe everything is SI base units (seconds, bytes) or plain ratios. kB and MB are powers
of ten, KiB and MiB powers of two.
"""

from __future__ import annotations

import re

from edgepipe.errors import RequestError

UNITS: dict[str, dict[str, float]] = {
    "time": {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
    "size": {
        "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    },
    # accuracy differences, as percentage points of the task metric
    "points": {"point": 1.0, "points": 1.0, "pp": 1.0},
    "level": {"dB": 1.0},
    # how much one quantity differs from another
    "ratio": {"%": 0.01},
    "temperature": {"C": 1.0, "°C": 1.0},
}  # fmt: skip

# what a quantity of a dimension is called, where it is not the dimension's name
_CALLED = {"points": "number of points"}

_QUANTITY = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([^\d\s].*?)\s*$")


def quantity_pattern(dimension: str) -> str:
    """A regular expression (of ECMA 262, as JSON Schema asks) for what `parse_quantity` takes."""
    units = "|".join(re.escape(unit) for unit in UNITS[dimension])
    return rf"^\s*[+-]?\d+(\.\d+)?([eE][+-]?\d+)?\s*({units})\s*$"


def parse_quantity(text: object, dimension: str) -> float:
    """``"33 ms"`` with dimension ``"time"`` -> ``0.033``.

    Raises RequestError for a bare number, an unknown unit or a unit of another dimension, and says
    which units are legal.
    """
    units = UNITS[dimension]
    legal, called = ", ".join(units), _CALLED.get(dimension, dimension)
    if not isinstance(text, str):
        raise RequestError(
            f"{text!r} has no unit", hint=f'write a {called} with its unit, like "{text} {next(iter(units))}" (legal: {legal})'
        )  # fmt: skip
    match = _QUANTITY.match(text)
    if match is None:
        raise RequestError(
            f"{text!r} is not a {called}", hint=f"write a number and a unit: {legal}"
        )
    number, unit = match.groups()
    if unit not in units:
        other = [name for name, table in UNITS.items() if unit in table]
        wrong = f"; {unit!r} is a unit of {other[0]}" if other else ""
        near = [name for name in units if name.lower() == unit.lower()]
        meant = f' (did you mean "{number} {near[0]}"?)' if near else ""
        raise RequestError(
            f"{text!r} is not a {called}{wrong}{meant}", hint=f"legal units: {legal}"
        )
    return float(number) * units[unit]


def _three_digits(value: float) -> float:
    """As it will be written, to choose the unit by: 999.9 us is 1 ms, not 1e+03 us."""
    return float(f"{value:.3g}")


def format_seconds(value_s: float) -> str:
    """0.0123 -> ``"12.3 ms"``: three significant digits in the unit a person would choose."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(_three_digits(value_s)) >= scale:
            return f"{value_s / scale:.3g} {unit}" if abs(value_s) < 1000 else f"{value_s:.0f} s"
    return f"{value_s / 1e-9:.3g} ns"


def format_bytes(value_bytes: float) -> str:
    """1536000 -> ``"1.54 MB"`` (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(_three_digits(value_bytes)) >= scale:
            return f"{value_bytes / scale:.3g} {unit}"
    return f"{value_bytes:.0f} B"


def format_value(value: float, unit: str) -> str:
    """A value in a base unit (``s``, ``B``, ``points``, ``dB``, ``ratio``, ...) as a person reads it."""
    if unit == "s":
        return format_seconds(value)
    if unit == "B":
        return format_bytes(value)
    if unit == "J":
        return f"{1e3 * value:.3g} mJ"
    if unit == "ratio":
        return f"{100 * value:.{'3g' if abs(value) < 9.995 else '0f'}} %"
    if unit == "":
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    number = f"{value:.4g}"
    return f"{number} {'point' if unit == 'points' and number in ('1', '-1') else unit}"
