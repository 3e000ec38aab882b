"""What a phone says of itself that no file does: its properties, its heat, its battery."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from edgepipe.device.base import Device
from edgepipe.device.parse_android import (
    android_facts,
    fastest_cpus,
    parse_battery,
    parse_getprop,
    parse_thermal,
)
from edgepipe.errors import NotStable

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
# Android's own limit: config_lowBatteryWarningLevel, frameworks/base/core/res/res/values/config.xml
LOW_BATTERY = 0.15
# From the first of these on Android has taken clock frequency away (PowerManager.THERMAL_STATUS_*).
_THROTTLED = ("moderate", "severe", "critical", "emergency", "shutdown")


def ask(device: Device) -> dict[str, Any] | None:
    """The facts that Android's properties tell; None where the board is no phone."""
    done = device.run(["getprop"], timeout_s=_TIMEOUT_S)
    if done.returncode:
        return None
    return android_facts(parse_getprop(done.stdout.decode(errors="replace")))


def add_to_facts(device: Device, facts: dict[str, Any], phone: Mapping[str, Any]) -> dict[str, Any]:
    """``facts`` of a board with what Android adds: ``phone`` (`ask`), and its health as of now."""
    told = {key: value for key, value in phone.items() if value}
    return {
        **facts,
        "device": {**facts["device"], **told, "emulated": phone["emulated"] or facts["device"]["emulated"]},
        "health": {**facts["health"], **health(device, facts["health"])},
    }  # fmt: skip


def health(device: Device, known: Mapping[str, Any]) -> dict[str, Any]:
    """Thermal status and battery as of now, and temperatures beside those ``known`` from files.

    An ordinary app (Termux) is told neither.
    """
    found: dict[str, Any] = {"thermal_status": None, "battery_level": None, "powered_by": None}
    said = _dumpsys(device, "battery")
    if said:
        battery = parse_battery(said)
        found |= {"battery_level": battery.level, "powered_by": battery.powered}
    said = _dumpsys(device, "thermalservice")
    if said:
        thermal = parse_thermal(said)
        temperatures = {**thermal.temperatures_c, **known["temperatures_c"]}
        found |= {
            "thermal_status": thermal.status,
            "temperatures_c": temperatures,
            "temperature_c": max(temperatures.values(), default=None),
        }
    return found


def _dumpsys(device: Device, service: str) -> str:
    done = device.run(["dumpsys", service], timeout_s=_TIMEOUT_S)
    text = done.stdout.decode(errors="replace")
    # "Can't find service: thermalservice" (Android 9), "Permission Denial: ..." (an app): exit code 0
    is_refused = "Can't find service" in text or "Permission Denial" in text
    return "" if done.returncode or is_refused or not text.strip() else text


def check_health(health: Mapping[str, Any], address: str) -> None:
    """Refuse a phone that slows its cores down: hot, or with a low battery and nothing that charges it.

    Raises NotStable (``too-hot``, ``low-battery``). Of boards that are no phones nothing is asked.
    """
    status, level = health.get("thermal_status"), health.get("battery_level")
    if is_throttled(health):
        raise NotStable(
            f"{address} is throttled by its heat (thermal status {status})",
            hint="let it cool: out of its case, screen off, not on a fast charger",
            code="too-hot",
        )
    if level is not None and level <= LOW_BATTERY:
        if not health.get("powered_by"):
            raise NotStable(
                f"{address} has {level:.0%} of its battery left, and nothing charges it",
                hint="plug it in: Android saves power from 15 % on, which slows its cores down",
                code="low-battery",
            )
        log.warning("%s has %.0f %% of its battery left", address, 100 * level)


def is_throttled(health: Mapping[str, Any]) -> bool:
    """Whether Android says that it has taken clock frequency away."""
    return health.get("thermal_status") in _THROTTLED


def fast_cpus(facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The fastest cluster of a phone, to stay on; () on other boards, and where it does not tell.

    Android moves a thread between clusters as it likes; a figure of two kinds of cores is none.
    """
    if "thermal_status" not in facts["health"]:
        return ()
    return fastest_cpus(facts["health"]["frequencies"])
