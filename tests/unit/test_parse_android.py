"""What Android's tools print: right on captured output, our own error on anything else."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.android import check_health, fast_cpus
from edgepipe.device.parse_android import (
    Attached,
    Battery,
    android_facts,
    fastest_cpus,
    parse_battery,
    parse_devices,
    parse_getprop,
    parse_thermal,
)
from edgepipe.errors import CommandFailed, NotStable

FIXTURES = Path(__file__).parents[1] / "fixtures" / "boards" / "android"
PARSERS: list[Any] = [parse_devices, parse_getprop, parse_battery, parse_thermal]


def captured(name: str) -> str:
    return (FIXTURES / name).read_text()


def test_the_temperatures_of_now_count_and_not_the_cached_ones() -> None:
    text = captured("dumpsys_thermalservice").replace("mValue=25.6, mType=0", "mValue=99.0, mType=0", 1)  # fmt: skip
    thermal = parse_thermal(text)
    assert thermal.status == "none"
    assert thermal.temperatures_c["AP:cpu"] == 25.6
    # sensors that say 0.0 are not there
    assert sorted(thermal.temperatures_c) == ["AP:cpu", "BAT:battery", "LRB:skin", "LRF:skin", "LRP:skin", "PA:power_amplifier"]  # fmt: skip


def test_a_sensor_that_is_not_there_has_no_temperature() -> None:
    # Samsung's own service numbers its types otherwise; -99.9 is none
    assert list(parse_thermal(captured("dumpsys_thermalservice_sdhms")).temperatures_c.values()) == [24.0, 24.4, 25.3, 24.2]  # fmt: skip


@pytest.mark.parametrize(("number", "status"), [(0, "none"), (2, "moderate"), (6, "shutdown")])
def test_thermal_status_has_a_name(number: int, status: str) -> None:
    text = captured("dumpsys_thermalservice").replace("Status: 0", f"Status: {number}")
    assert parse_thermal(text).status == status


def test_battery_is_read_with_what_charges_it() -> None:
    assert parse_battery(captured("dumpsys_battery")) == Battery(0.84, 32.6, "USB")
    assert parse_battery(captured("dumpsys_battery_tv")) == Battery(0.9, 2.6, "")


def test_a_board_without_a_battery_has_no_level() -> None:
    text = captured("dumpsys_battery").replace("present: true", "present: false")
    assert parse_battery(text).level is None


def test_properties_are_read_also_over_several_lines() -> None:
    properties = parse_getprop(captured("getprop") + "[a.b]: [one\ntwo]\n[empty]: []\n")
    assert properties["ro.product.model"] == "Pixel 6"
    assert (properties["a.b"], properties["empty"]) == ("one\ntwo", "")


def test_facts_name_no_serial_number_and_say_when_it_is_an_emulator() -> None:
    facts = android_facts({**parse_getprop(captured("getprop")), "ro.serialno": "SECRET123"})
    assert (facts["model"], facts["os"], facts["emulated"]) == ("Pixel 6", "Android 13 (API 33)", "")  # fmt: skip
    assert len(facts["identity"]) == 16
    assert "SECRET" not in str(facts)
    assert "emulator" in android_facts({"ro.boot.qemu": "1"})["emulated"]


def test_every_state_of_a_phone_is_read() -> None:
    text = (
        "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"
        "List of devices attached\n"
        "R58M123ABCD            device usb:1-2 product:beyond1 model:SM_G973F device:beyond1 transport_id:1\n"
        "0A041FDD4003CR         unauthorized usb:1-1 transport_id:3\n"
        "1234567890             no permissions (user in plugdev group; are your udev rules wrong?); see [http://developer.android.com/tools/device.html] usb:3-1\n"
        "192.168.1.7:5555       offline\n\n"
    )
    assert parse_devices(text) == (
        Attached("R58M123ABCD", "device", "SM G973F"),
        Attached("0A041FDD4003CR", "unauthorized"),
        Attached("1234567890", "no permissions"),
        Attached("192.168.1.7:5555", "offline"),
    )
    assert parse_devices("List of devices attached\n\n") == ()


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("text", ["", "Can't find service: battery\n", "error: closed"])
def test_what_is_something_else_is_refused(parse: Any, text: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        parse(text)
    assert caught.value.code == "unexpected-output"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("dumpsys_battery", "level: 84", "level: 840"),
        ("dumpsys_battery", "level: 84", "level: much"),
        ("dumpsys_thermalservice", "Status: 0", "Status: 7"),
        ("dumpsys_thermalservice", "mValue=25.6, mType=0", "mValue=warm, mType=0"),
    ],
)
def test_figures_that_cannot_be_are_refused(name: str, old: str, new: str) -> None:
    parse = parse_battery if "battery" in name else parse_thermal
    with pytest.raises(CommandFailed):
        parse(captured(name).replace(old, new))


@given(
    st.sampled_from(PARSERS), st.sampled_from(sorted(p.name for p in FIXTURES.iterdir())), st.data()
)
def test_damaged_output_is_data_or_our_error(parse: Any, name: str, data: st.DataObject) -> None:
    text = captured(name)
    at = data.draw(st.integers(0, len(text)))
    damaged = text[:at] + data.draw(st.text(max_size=8)) + text[data.draw(st.integers(at, len(text))) :]  # fmt: skip
    with contextlib.suppress(CommandFailed):
        parse(damaged)


def policy(cpus: str, khz: int | None) -> dict[str, Any]:
    return {"cpus": cpus, "hardware_limit_khz": khz}


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ([("0 1 2 3", 1803000), ("4 5", 2253000), ("6 7", 2802000)], (6, 7)),
        ([("0 1 2 3", 1800000)], ()),  # all alike
        ([("0", 1800000), ("1", 1800000)], ()),
        ([("0 1", 1000), ("2", 2000), ("3", 2000)], (2, 3)),
        ([("0 1 2 3", 1803000), ("4 5", None)], ()),  # one does not tell
        ([("0-3", 1803000), ("4 5", 2000000)], ()),
        ([], ()),
    ],
)  # fmt: skip
def test_the_fastest_cluster_is_the_one_with_the_highest_frequency(policies: Any, expected: tuple[int, ...]) -> None:  # fmt: skip
    found = {f"policy{n}": policy(*p) for n, p in enumerate(policies)}
    assert fastest_cpus(found) == expected


def test_only_a_phone_is_kept_on_its_fast_cores() -> None:
    frequencies = {"policy0": policy("0", 1000), "policy1": policy("1", 2000)}
    assert fast_cpus({"health": {"frequencies": frequencies, "thermal_status": None}}) == (1,)
    assert fast_cpus({"health": {"frequencies": frequencies}}) == ()


@pytest.mark.parametrize(
    ("health", "code"),
    [
        ({"thermal_status": "moderate", "battery_level": 0.9, "powered_by": "USB"}, "too-hot"),
        ({"thermal_status": "shutdown", "battery_level": 0.9, "powered_by": "USB"}, "too-hot"),
        ({"thermal_status": "none", "battery_level": 0.15, "powered_by": ""}, "low-battery"),
    ],
)
def test_a_phone_that_slows_down_is_refused(health: dict[str, Any], code: str) -> None:
    with pytest.raises(NotStable) as caught:
        check_health(health, "adb://x")
    assert caught.value.code == code


@pytest.mark.parametrize(
    "health",
    [
        {"thermal_status": "light", "battery_level": 0.16, "powered_by": ""},
        {"thermal_status": None, "battery_level": 0.02, "powered_by": "USB"},
        {"thermal_status": None, "battery_level": None, "powered_by": ""},
        {},
    ],
)
def test_a_phone_that_is_fit_or_does_not_tell_is_measured(health: dict[str, Any]) -> None:
    check_health(health, "adb://x")
