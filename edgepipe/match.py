"""Which profiles an expression means: ``soc=bcm2712``, ``isa=dotprod ram>=2GiB``.

Terms are separated by blanks and all must hold. A term is a key, one of ``= != < <= > >=`` and a
value; a value may be quoted, have ``*`` for any text, or list alternatives: ``soc=bcm2711,bcm2712``.
Letter case does not matter. What a profile leaves open ("any", 0) fits no term, not even ``!=``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import operator
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from edgepipe.errors import RequestError
from edgepipe.profile import DeviceProfile
from edgepipe.schema import near_miss
from edgepipe.units import parse_quantity

Texts = tuple[str, ...]


def _known(*values: str) -> Texts:
    return tuple(value for value in values if value != "any")


TEXT_KEYS: dict[str, Callable[[DeviceProfile], Texts]] = {
    "name": lambda p: (p.name,),
    "model": lambda p: _known(p.model),
    "soc": lambda p: _known(p.soc),
    "core": lambda p: tuple(c.core for c in p.clusters),
    "isa": lambda p: tuple(f for c in p.clusters for f in c.isa) or ("none",) * bool(p.clusters),
    "machine": lambda p: _known(p.machine),
    "os": lambda p: _known(p.os),
    "kernel": lambda p: _known(p.kernel),
    "libc": lambda p: _known(p.libc),
    "python": lambda p: _known(p.python),
    "runtime": lambda p: (p.runtime,),
    "target": lambda p: (p.target,),
    "governor": lambda p: _known(p.governor),
    "transport": lambda p: p.transports,
    "emulated": lambda p: (p.emulated.kind if p.emulated else "no",),
}
NUMBER_KEYS: dict[str, Callable[[DeviceProfile], float]] = {
    "ram": lambda p: p.ram_bytes,  # with its unit: 2GiB
    "cores": lambda p: sum(c.count for c in p.clusters),
    "mhz": lambda p: max((c.max_frequency_mhz for c in p.clusters), default=0),
    "page": lambda p: p.page_size_bytes,
    "bits": lambda p: p.bits,
    "threads": lambda p: p.threads,
}
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge,
}  # fmt: skip
_TERM = re.compile(
    r"""\s*([A-Za-z_]+)\s*(!=|<=|>=|=|<|>)\s*("[^"]*"|'[^']*'|[^\s"'<>=!]+)(?=\s|$)"""
)


@dataclasses.dataclass(frozen=True)
class Term:
    """One condition: ``number`` of a key that is one, else the ``patterns`` of which one must fit."""

    key: str
    operator: str
    patterns: Texts = ()
    number: float = 0.0


def parse_filter(expression: str, *, more: Collection[str] = ()) -> tuple[Term, ...]:
    """The terms of an expression. Raises RequestError naming what is wrong and what is legal.

    ``more`` are keys of text that are legal beside those of profiles.
    """
    terms, end = [], 0
    while expression[end:].strip():
        match = _TERM.match(expression, end)
        if match is None:
            raise RequestError(
                f"{expression[end:].strip()!r} is no condition on a profile",
                hint="write key=value, like soc=bcm2712 or 'isa=dotprod ram>=2GiB'",
                code="bad-filter",
            )
        terms.append(_term(*match.groups(), more=more))
        end = match.end()
    if not terms:
        raise RequestError("an empty filter would fit every profile", hint="write key=value, like soc=bcm2712", code="bad-filter")  # fmt: skip
    return tuple(terms)


def _term(key: str, sign: str, value: str, *, more: Collection[str]) -> Term:
    key = key.lower()
    legal = [*more, *TEXT_KEYS, *NUMBER_KEYS]
    if key not in legal:
        raise RequestError(
            f"unknown key {key!r}{near_miss(key, legal)}",
            hint=f"{'boards' if more else 'profiles'} are chosen by {', '.join(legal)}",
            code="bad-filter",
        )
    quoted = value[0] in "\"'"
    text = value[1:-1] if quoted else value
    if key in NUMBER_KEYS:
        return Term(key, sign, number=_number(key, text))
    if sign not in ("=", "!="):
        raise RequestError(f"{key} has no order: {key}{sign}{value}", hint=f"write {key}={value} or {key}!={value}", code="bad-filter")  # fmt: skip
    return Term(key, sign, patterns=tuple([text] if quoted else text.split(",")))


def _number(key: str, text: str) -> float:
    if key == "ram":
        return parse_quantity(text, "size")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise RequestError(f"{key} is a number, not {text!r}", hint=f"write {key}=4", code="bad-filter")  # fmt: skip
    return float(text)


def matches(
    profile: DeviceProfile, expression: str, *, more: Mapping[str, Texts] = MappingProxyType({})
) -> bool:
    """Whether all terms of ``expression`` hold for a profile. Raises as `parse_filter` does.

    ``more`` holds the values of a board's own keys, like its tags.
    """
    return all(_holds(profile, term, more) for term in parse_filter(expression, more=more))


def _holds(profile: DeviceProfile, term: Term, more: Mapping[str, Texts]) -> bool:
    if term.key in NUMBER_KEYS:
        number = NUMBER_KEYS[term.key](profile)
        return number != 0 and _OPERATORS[term.operator](number, term.number)
    values = more[term.key] if term.key in more else TEXT_KEYS[term.key](profile)
    found = any(
        fnmatch.fnmatchcase(value.casefold(), pattern.casefold())
        for value in values
        for pattern in term.patterns
    )
    return bool(values) and found == (term.operator == "=")
