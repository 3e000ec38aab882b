"""Pure parsers of what Android's own tools print: text in, data out, CommandFailed on garbage.

Formats: frameworks/base/services/core/java/com/android/server/{BatteryService.java,
power/ThermalManagerService.java}, system/core/toolbox/getprop.cpp, packages/modules/adb/transport.cpp.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from edgepipe.errors import CommandFailed

# PowerManager.THERMAL_STATUS_*: from MODERATE on the system has taken clock frequency away
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
# Temperature.TYPE_* (frameworks/base/core/java/android/os/Temperature.java); vendors add others
TEMPERATURE_TYPES = {0: "cpu", 1: "gpu", 2: "battery", 3: "skin", 4: "usb_port", 5: "power_amplifier", 9: "npu"}  # fmt: skip
# What a sensor that is not there shows instead of a temperature is far outside of these.
_COLDEST_C, _HOTTEST_C = -40.0, 150.0


@dataclasses.dataclass(frozen=True)
class Attached:
    """One line of ``adb devices -l``. ``state`` is "device" where it can be used."""

    serial: str
    state: str
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Battery:
    """``level`` is 0 to 1; None where there is no battery. ``powered`` names what charges it ("" = nothing)."""

    level: float | None
    temperature_c: float | None
    powered: str


@dataclasses.dataclass(frozen=True)
class Thermal:
    """``status`` is one of THERMAL_STATUS; ``temperatures_c`` maps "NAME:type" to what is read now."""

    status: str
    temperatures_c: Mapping[str, float]


def parse_devices(text: str) -> tuple[Attached, ...]:
    """What ``adb devices -l`` prints: serial, state, then words such as ``model:Pixel_8``."""
    lines = text.splitlines()
    if "List of devices attached" not in lines:
        raise _garbage("adb devices -l", text)
    found = []
    for line in lines[lines.index("List of devices attached") + 1 :]:
        serial, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not serial or serial == "*":  # "* daemon started successfully"
            continue
        # "no permissions (...); see [http://developer.android.com/tools/device.html]" has blanks
        state = "no permissions" if rest.startswith("no permissions") else rest.partition(" ")[0]
        if not state:
            raise _garbage("adb devices -l", text)
        model = re.search(r"(?:^|\s)model:(\S+)", rest)
        found.append(Attached(serial, state, model[1].replace("_", " ") if model else ""))
    return tuple(found)


def parse_getprop(text: str) -> dict[str, str]:
    """What ``getprop`` prints, ``[key]: [value]``; a value may go on over several lines."""
    found = {
        match[1]: match[2] for match in re.finditer(r"^\[([^\]\n]+)\]: \[(.*?)\]\r?$", text, re.M | re.S)
    }  # fmt: skip
    if not found:
        raise _garbage("getprop", text)
    return found


def android_facts(properties: Mapping[str, str]) -> dict[str, Any]:
    """The facts of `edgepipe.device.snapshot.device_facts` that only Android's properties tell."""
    release, api = properties.get("ro.build.version.release"), properties.get("ro.build.version.sdk")  # fmt: skip
    soc = properties.get("ro.soc.model") or properties.get("ro.board.platform")
    serial = properties.get("ro.serialno") or properties.get("ro.boot.serialno") or ""
    emulated = ""
    if "1" in (properties.get("ro.kernel.qemu"), properties.get("ro.boot.qemu")):
        emulated = f"Android says it runs in an emulator ({properties.get('ro.hardware', 'qemu')})"
    return {
        "model": properties.get("ro.product.model"),
        "os": f"Android {release or '?'} (API {api or '?'})" if release or api else None,
        "soc": soc,
        "build": properties.get("ro.build.fingerprint"),
        "libc": "bionic",
        # tells two phones of one kind apart without naming either
        "identity": hashlib.sha256(serial.encode()).hexdigest()[:16] if serial else None,
        "emulated": emulated,
    }


def parse_battery(text: str) -> Battery:
    """What ``dumpsys battery`` prints."""
    pairs = dict(re.findall(r"^\s*([A-Za-z][A-Za-z ]*?): *(\S*)\s*$", text, re.M))
    if "Current Battery Service state" not in text or "level" not in pairs:
        raise _garbage("dumpsys battery", text)
    sources = ("AC", "USB", "Wireless", "Dock")
    powered = "+".join(name for name in sources if pairs.get(f"{name} powered") == "true")
    try:
        level, scale = int(pairs["level"]), int(pairs.get("scale", "100"))
        tenths = int(pairs["temperature"]) if "temperature" in pairs else None
        if not 0 <= level <= scale:
            raise ValueError(f"level {level} of {scale}")
    except ValueError as exc:
        raise _garbage("dumpsys battery", text, str(exc)) from exc
    if scale == 0 or pairs.get("present") == "false":
        return Battery(None, None, powered)
    return Battery(level / scale, None if tenths is None else _plausible(tenths / 10), powered)


def parse_thermal(text: str) -> Thermal:
    """What ``dumpsys thermalservice`` prints. Cached temperatures may be old; only current ones count."""
    status = re.search(r"^Thermal Status: (\d+)\s*$", text, re.M)
    if status is None or int(status[1]) >= len(THERMAL_STATUS):
        raise _garbage("dumpsys thermalservice", text)
    now = text.partition("Current temperatures from HAL:")[2].partition("Current cooling devices")[0]  # fmt: skip
    found: dict[str, float] = {}
    for value, kind, name in re.findall(r"Temperature\{mValue=([^,}]+), mType=(-?\d+), mName=([^,}]*)", now):  # fmt: skip
        try:
            degrees = _plausible(float(value))
        except ValueError as exc:
            raise _garbage("dumpsys thermalservice", text, str(exc)) from exc
        if degrees is not None:
            found[f"{name}:{TEMPERATURE_TYPES.get(int(kind), kind)}"] = degrees
    return Thermal(THERMAL_STATUS[int(status[1])], found)


def fastest_cpus(frequencies: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
    """The CPUs of the cluster that reaches the highest frequency; () where all are alike or unknown.

    ``frequencies`` is that of `edgepipe.device.snapshot.health`: ``{"policy4": {"cpus": "4 5 6 7",
    "hardware_limit_khz": 2850000, ...}}``.
    """
    limits: dict[tuple[int, ...], int] = {}
    for policy in frequencies.values():
        words, limit_khz = str(policy.get("cpus") or "").split(), policy.get("hardware_limit_khz")
        if not limit_khz or not all(word.isdecimal() for word in words):
            return ()
        limits[tuple(int(word) for word in words)] = limit_khz
    fastest = [cpus for cpus, khz in limits.items() if khz == max(limits.values())]
    return tuple(sorted(sum(fastest, ()))) if len(fastest) < len(limits) else ()


def _plausible(degrees_c: float) -> float | None:
    # 0.0 is what Samsung's sensors say that are not there, NaN what the HAL prescribes
    return degrees_c if degrees_c and math.isfinite(degrees_c) and _COLDEST_C < degrees_c < _HOTTEST_C else None  # fmt: skip


def _garbage(command: str, text: str, reason: str = "") -> CommandFailed:
    why = f" ({reason[:200]})" if reason else ""
    return CommandFailed(
        f"`{command}` printed something else than expected{why}: {text[:200]!r}",
        hint="run it by hand; please report the output",
        code="unexpected-output",
    )
