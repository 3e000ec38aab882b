from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.errors import RequestError
from edgepipe.units import UNITS, format_bytes, format_seconds, format_value, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("33 ms", "time", 0.033),
        ("33ms", "time", 0.033),
        ("1e-3 s", "time", 1e-3),
        ("50 MiB", "size", 50 * 2**20),
        ("50 MB", "size", 50e6),
        ("-2 points", "points", -2.0),
        ("25 dB", "level", 25.0),
        ("3 %", "ratio", 0.03),
        ("2.5%", "ratio", 0.025),
    ],
)
def test_quantities_are_read_in_base_units(text: str, dimension: str, value: float) -> None:
    assert parse_quantity(text, dimension) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "dimension", "named"),
    [
        (33, "time", "has no unit"),
        ("33", "time", "is not a time"),
        ("33 MB", "time", "unit of size"),
        ("33 mb", "size", 'did you mean "33 MB"'),
        ("fast", "time", "is not a time"),
        ("33 Ms", "time", 'did you mean "33 ms"'),
        ("1 lightyear", "points", "is not a number of points"),
        ("1", "points", "is not a number of points"),
    ],
)
def test_a_wrong_unit_is_named_with_the_legal_ones(
    text: object, dimension: str, named: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_quantity(text, dimension)
    assert named in caught.value.message
    assert next(iter(UNITS[dimension])) in caught.value.hint


@given(st.text(max_size=20), st.sampled_from(list(UNITS)))
def test_any_text_is_a_quantity_or_our_error(text: str, dimension: str) -> None:
    try:
        assert isinstance(parse_quantity(text, dimension), float)
    except RequestError:
        pass


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9999e-6, "s", "1 us"), (0.99999e-3, "s", "1 ms"), (0.9999, "s", "1 s"),
        (999.9, "B", "1 kB"), (999_999, "B", "1 MB"), (-999_999, "B", "-1 MB"), (0.0123, "s", "12.3 ms"),
        (0.0123, "ratio", "1.23 %"), (23.81, "ratio", "2381 %"),
    ],
)  # fmt: skip
def test_a_value_just_below_the_next_unit_is_written_in_it(value: float, unit: str, text: str) -> None:  # fmt: skip
    assert format_value(value, unit) == text


def test_one_point_is_singular() -> None:
    written = [format_value(value, "points") for value in (1, -1, 0.99996, 0.9, 0, 2)]
    assert written == ["1 point", "-1 point", "1 point", "0.9 points", "0 points", "2 points"]


@given(st.floats(1e-9, 1e4))
def test_formatted_seconds_read_back_within_three_digits(value_s: float) -> None:
    # three significant digits = 0.5 % at worst
    assert parse_quantity(format_seconds(value_s), "time") == pytest.approx(value_s, rel=5.1e-3)


@given(st.integers(0, 10**12))
def test_formatted_bytes_read_back_within_three_digits(value: int) -> None:
    assert parse_quantity(format_bytes(value), "size") == pytest.approx(value, rel=5.1e-3)


@given(st.floats(0.001, 10))
def test_formatted_ratios_read_back_within_three_digits(value: float) -> None:
    assert parse_quantity(format_value(value, "ratio"), "ratio") == pytest.approx(value, rel=5.1e-3)
