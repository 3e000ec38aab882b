"""Choosing profiles by an expression."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.errors import RequestError
from edgepipe.match import NUMBER_KEYS, TEXT_KEYS, matches, parse_filter
from edgepipe.profile import DeviceProfile, load_profile
from edgepipe.resources import profile_paths


@pytest.fixture(scope="module")
def pi5() -> DeviceProfile:
    return load_profile(profile_paths()["rpi5_8gb"])


@pytest.mark.parametrize(
    "expression",
    [
        "soc=bcm2712", "SOC=BCM2712", "soc = bcm2711,bcm2712", "soc!=bcm2711", "isa=dotprod isa=fp16",
        "isa!=sve", "ram>=2GiB", "ram=8GiB", 'ram < "9 GiB"', "cores=4 mhz>2000 page=16384 bits=64",
        "name=rpi*", "core=cortex-a76", "os=*bookworm*", 'os="debian gnu/linux 12 (bookworm)"',
        "emulated=no", "model='raspberry pi 5 model b'",
    ],
)  # fmt: skip
def test_what_a_raspberry_pi_5_is(pi5: DeviceProfile, expression: str) -> None:
    assert matches(pi5, expression)


@pytest.mark.parametrize(
    "expression",
    [
        "soc=bcm2711", "soc=bcm271", "isa=dotprod isa=sve", "isa!=dotprod", "ram>8GiB", "ram!=8GiB",
        "soc=bcm2712 ram<2GiB", "machine=armv7l", "emulated=system",
    ],
)  # fmt: skip
def test_what_a_raspberry_pi_5_is_not(pi5: DeviceProfile, expression: str) -> None:
    assert not matches(pi5, expression)


@pytest.mark.parametrize(
    "expression", ["soc=bcm2712", "soc!=bcm2712", "ram<1GiB", "ram!=1GiB", "isa!=sve", "cores<99"]
)
def test_what_a_profile_leaves_open_fits_no_condition(expression: str) -> None:
    assert not matches(load_profile(profile_paths()["localhost"]), expression)


def test_cores_without_any_feature_can_be_asked_for() -> None:
    assert matches(load_profile(profile_paths()["rpi4b_4gb"]), "isa=none isa!=dotprod")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "would fit every profile"),
        ("scc=bcm2712", "unknown key 'scc'; did you mean 'soc'"),
        ("bcm2712", "no condition"),
        ("soc=", "no condition"),
        ("soc=bcm2712 dotprod", "'dotprod' is no condition"),
        ("soc='bcm2712", "no condition"),
        ("soc>=bcm2712", "soc has no order"),
        ("ram>=2", "is not a size"),
        ("cores=four", "cores is a number"),
        ("cores=nan", "cores is a number"),
    ],
)
def test_a_mistake_is_named(pi5: DeviceProfile, expression: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        matches(pi5, expression)
    assert message in caught.value.message


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_a_clear_error(text: str) -> None:
    with contextlib.suppress(RequestError):
        assert parse_filter(text)


VALUES = st.text(st.characters(exclude_characters='"*?[', codec="ascii"), max_size=12)


@given(st.sampled_from([*TEXT_KEYS]), st.sampled_from(["=", "!="]), VALUES, st.sampled_from(["", " "]))  # fmt: skip
def test_a_quoted_value_is_taken_as_it_is(key: str, sign: str, value: str, blank: str) -> None:
    (term,) = parse_filter(f'{blank}{key}{blank}{sign}{blank}"{value}"')
    assert (term.key, term.operator, term.patterns) == (key, sign, (value,))


@given(st.sampled_from([*NUMBER_KEYS]), st.integers(1, 10**6))
def test_exactly_one_order_holds(key: str, asked: int) -> None:
    profile = load_profile(profile_paths()["rpi5_8gb"])
    number = NUMBER_KEYS[key](profile)
    unit = "B" if key == "ram" else ""
    held = [matches(profile, f"{key}{sign}{asked}{unit}") for sign in ("<", "=", ">")]
    assert held == [number < asked, number == asked, number > asked]
