from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import pytest

from edgepipe.errors import RequestError
from edgepipe.schema import Unit, build, record


@record
class Inner:
    size: tuple[int, int]


@record
class Outer:
    name: str
    limit: Annotated[float, Unit("time")] = 1.0
    inner: Inner | None = None
    flag: bool = False


@record
class Choice:
    samples: int | Literal["auto"] = "auto"


def test_what_may_be_of_several_types_is_one_mistake() -> None:
    with pytest.raises(RequestError, match=r"^w: samples: .*integer .* or .*'auto' \(got 'all'\)$"):
        build(Choice, {"samples": "all"}, where="w", error=RequestError)


def test_plain_data_becomes_a_frozen_record() -> None:
    outer = build(Outer, {"name": "a", "limit": "5 ms", "inner": {"size": [1, 2]}}, where="w", error=RequestError)  # fmt: skip
    assert outer == Outer(name="a", limit=0.005, inner=Inner(size=(1, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        outer.name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({}, "name: is missing"),
        ({"name": "a", "nam": 1}, "nam: unknown key; did you mean 'name'?"),
        ({"name": 1}, "name: input should be a valid string"),
        ({"name": "a", "flag": 1}, "flag: input should be a valid boolean"),
        ({"name": "a", "limit": 5}, "limit: 5 has no unit"),
        ({"name": "a", "inner": {"size": [1]}}, "inner.size"),
        ({"name": "a", "inner": {"sise": [1, 2]}}, "did you mean 'size'?"),
        ("text", "w: "),
    ],
)
def test_a_wrong_key_is_named(data: object, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        build(Outer, data, where="w", error=RequestError)
    assert named in caught.value.message
