"""Data read from files: frozen records, and checking plain TOML or JSON data against them.

Checking is done by pydantic, imported only when something is checked, so that the nouns stay cheap
to import.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from edgepipe.errors import RequestError
from edgepipe.units import parse_quantity, quantity_pattern

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose unknown keys and wrong types are refused by `build`."""
    config = {
        "extra": "forbid", "strict": True, "allow_inf_nan": False, "use_attribute_docstrings": True,
    }  # fmt: skip
    cls.__pydantic_config__ = config  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Marks a float field as a quantity written with a unit: ``Annotated[float, Unit("time")]``.

    The field holds the base unit (seconds, bytes, ...); the file says ``"33 ms"``. ``minimum`` is in
    the base unit.
    """

    dimension: str
    minimum: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def parse(text: object) -> float:
            try:
                value = parse_quantity(text, self.dimension)
            except RequestError as exc:
                raise PydanticCustomError(
                    "quantity", "{reason}", {"reason": f"{exc.message} ({exc.hint})"}
                ) from exc
            if self.minimum is not None and value < self.minimum:
                raise PydanticCustomError("quantity", "{reason}", {"reason": f"{text!r} is too little"})  # fmt: skip
            return value

        return core_schema.no_info_before_validator_function(parse, core_schema.float_schema())

    def __get_pydantic_json_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        example = {"time": "33 ms", "size": "4 GiB", "ratio": "3 %", "temperature": "60 C"}
        return {
            "type": "string",
            "pattern": quantity_pattern(self.dimension),
            "examples": [example[self.dimension]] if self.dimension in example else [],
        }


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Marks a text field that must match a regular expression: ``Annotated[str, Pattern("^a*$")]``."""

    regex: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.str_schema(pattern=self.regex, strict=True)


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def json_schema(cls: Any) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the TOML files that `build` makes ``cls`` from."""
    schema: dict[str, Any] = _adapter(cls).json_schema()
    for table in (schema, *schema.get("$defs", {}).values()):
        for item in table.get("properties", {}).values():
            item.pop("title", None)  # the key again
            if item.get("default", ...) is None:  # TOML has no null: the key is left out
                del item["default"]
                item.update(item.pop("anyOf")[0])
            if "pattern" in item and not isinstance(item.get("default"), str):
                item.pop("default", None)  # in base units, which no file says
    return schema


def near_miss(word: str, legal: list[str]) -> str:
    """``"; did you mean 'prune'?"`` where something is close, else an empty string."""
    close = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _field_names(cls: Any, location: tuple[Any, ...]) -> list[str]:
    """The legal keys of the record that ``location`` (a pydantic error's path) leads to."""
    import typing

    for step in location:
        if dataclasses.is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(str(step), None)
        inner = [a for a in typing.get_args(cls) if dataclasses.is_dataclass(a)]
        if inner and not dataclasses.is_dataclass(cls):
            cls = inner[0]
    if not dataclasses.is_dataclass(cls):
        return []
    return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("internal")]


def build(
    cls: type[T],
    data: object,
    *,
    where: str,
    error: type[RequestError],
    legal: Sequence[str] = (),
) -> T:
    """Plain data -> a record of type ``cls``; every mistake is reported at once.

    ``where`` names the file and table, like ``"recipe.toml: [[stages]] 2 (prune)"``. ``legal``
    are the keys that an error offers at the top, where they are not those of ``cls``. Raises
    ``error`` naming each wrong key, what is wrong with it, and near misses.
    """
    from pydantic import ValidationError

    def refuse(value: object) -> str:
        raise error(f"{where}: {value} is a date or a time, which no key takes", hint="write it as text, in quotes")  # fmt: skip

    if isinstance(data, dict) and dataclasses.is_dataclass(cls):
        inside = [f.name for f in dataclasses.fields(cls) if f.metadata.get("internal")]
        if taken := [name for name in inside if name in data]:
            raise error(
                f"{where}: {taken[0]}: unknown key (legal: {', '.join(legal or _field_names(cls, ()))})",
                hint="mend these keys and run again",
            )
    try:
        # JSON mode: arrays become tuples and strings paths, yet "5" is no number and 1 no bool.
        return _adapter(cls).validate_json(json.dumps(data, default=refuse))  # type: ignore[arg-type]
    except RequestError as exc:  # of a record's own __post_init__, or `refuse`
        text = exc.message if exc.message.startswith(where) else f"{where}: {exc.message}"
        raise error(text, hint=exc.hint) from exc
    except ValidationError as exc:
        unknown, missing = [], []
        wrong: list[str] = []
        listed: set[tuple[str, ...]] = set()
        for item in exc.errors():
            location = tuple(item["loc"])
            # of a union: what each of its types wants
            if len(location) > 1 and re.match(
                r"(literal\[.*|int|float|str|bool)$", str(location[-1])
            ):
                location = location[:-1]
            key = ".".join(str(step) for step in location)
            if item["type"] == "unexpected_keyword_argument":
                is_top = len(location) == 1
                keys = tuple(legal) if is_top and legal else tuple(_field_names(cls, location[:-1]))
                # once is enough for several wrong keys of one table
                legal_keys = "" if keys in listed else f" (legal: {', '.join(keys)})"
                listed.add(keys)
                unknown.append(f"{key}: unknown key{near_miss(str(location[-1]), list(keys))}{legal_keys}")  # fmt: skip
            elif item["type"] in ("missing", "missing_argument"):
                missing.append(key)
            else:
                text = item["msg"][0].lower() + item["msg"][1:]
                if item["type"] not in ("quantity",):
                    text += f" (got {item['input']!r})"
                if key and wrong and wrong[-1].startswith(f"{key}: "):
                    wrong[-1] += f" or {text}"
                else:
                    wrong.append(f"{key}: {text}" if key else text)
        if len(missing) == 1:
            wrong.append(f"{missing[0]}: is missing")
        elif missing:
            wrong.append(f"missing: {', '.join(missing)}")
        raise error(
            f"{where}: " + "; ".join(unknown + wrong), hint="mend these keys and run again"
        ) from exc


def read_toml(path: Path, *, error: type[RequestError]) -> dict[str, Any]:
    """Parse a TOML file; a missing file or a syntax error is ``error`` with file and line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise error(f"{path} does not exist", hint="check the path", code="no-such-file") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise error(f"cannot read {path}: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise error(f"{path} is not valid TOML: {exc}", hint="see https://toml.io") from exc
