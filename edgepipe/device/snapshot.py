"""What the files in /proc and /sys of a Linux board say of it. Pure: texts by path in, plain data out.

For boards without Python, whose runner sends the files as they are; on the others ``board.py`` reads
them on the spot. Both give the same keys and values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What is read before and after every session (glob patterns).
HEALTH_FILES = (
    "/proc/sys/kernel/random/boot_id", "/proc/meminfo", "/proc/vmstat", "/proc/loadavg",
    "/sys/class/thermal/*/type", "/sys/class/thermal/*/temp", "/sys/class/thermal/*/cur_state",
    "/sys/devices/system/cpu/cpufreq/policy*/related_cpus",
    "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor",
    "/sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq",
    "/sys/devices/system/cpu/cpufreq/policy*/scaling_max_freq",
    "/sys/devices/system/cpu/cpufreq/policy*/cpuinfo_max_freq",
    "/sys/devices/platform/soc*/*firmware*/get_throttled",
    "/sys/class/hwmon/*/name", "/sys/class/hwmon/*/in0_lcrit_alarm", "/proc/pressure/*",
)  # fmt: skip
# What is read once, beside them.
FACT_FILES = (
    "/proc/cpuinfo", "/etc/os-release", "/proc/device-tree/model", "/sys/class/dmi/id/product_name",
    "/proc/device-tree/serial-number", "/etc/machine-id", "/proc/sys/kernel/osrelease",
    "/proc/device-tree/compatible", "/etc/edgepipe-emulated",
)  # fmt: skip
# Raspberry Pi firmware, "get_throttled" property: bits 0-3 now, 16-19 since boot.
THROTTLE_BITS = {
    0: "under_voltage", 1: "frequency_capped", 2: "throttled", 3: "soft_temperature_limit",
    16: "under_voltage_occurred", 17: "frequency_capped_occurred", 18: "throttled_occurred",
    19: "soft_temperature_limit_occurred",
}  # fmt: skip
FACTS_SCHEMA = 1  # of what probe.py prints
_THERMAL = "/sys/class/thermal/"
_CPUFREQ = "/sys/devices/system/cpu/cpufreq/"


def health(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """All that can disturb a measurement, in SI units; None = the board does not say.

    ``snapshot`` is ``{"realtime_s", "monotonic_s", "files": {path: text}}``.
    """
    files = {path: text.strip() for path, text in snapshot["files"].items()}
    temperatures: dict[str, float] = {}
    cooling: dict[str, int | None] = {}
    frequencies: dict[str, dict[str, Any]] = {}
    for name in _folders(files, _THERMAL):
        kind = files.get(f"{_THERMAL}{name}/type", "?")
        if name.startswith("thermal_zone"):
            millidegrees = _integer(files.get(f"{_THERMAL}{name}/temp"))
            if millidegrees is not None:
                temperatures[f"{name}:{kind}"] = millidegrees / 1000.0
        elif name.startswith("cooling_device"):
            cooling[f"{name}:{kind}"] = _integer(files.get(f"{_THERMAL}{name}/cur_state"))
    for name in _folders(files, _CPUFREQ):
        base = f"{_CPUFREQ}{name}/"
        frequencies[name] = {
            "cpus": files.get(base + "related_cpus"),
            "governor": files.get(base + "scaling_governor"),
            "current_khz": _integer(files.get(base + "scaling_cur_freq")),
            "limit_khz": _integer(files.get(base + "scaling_max_freq")),
            "hardware_limit_khz": _integer(files.get(base + "cpuinfo_max_freq")),
        }
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+)", files.get("/proc/meminfo", ""), re.M))
    vmstat = dict(re.findall(r"^(\w+) (\d+)$", files.get("/proc/vmstat", ""), re.M))
    load = re.match(r"([\d.]+) \S+ \S+ (\d+)/", files.get("/proc/loadavg", ""))
    governors = sorted({f["governor"] for f in frequencies.values() if f["governor"]})
    swap = "SwapTotal" in meminfo and "SwapFree" in meminfo
    return {
        "realtime_s": snapshot["realtime_s"],
        "monotonic_s": snapshot["monotonic_s"],
        "boot_id": files.get("/proc/sys/kernel/random/boot_id"),
        "temperatures_c": temperatures,
        "temperature_c": max(temperatures.values()) if temperatures else None,
        "cooling": cooling,
        "throttling": _throttling(files),
        "frequencies": frequencies,
        "governor": ",".join(governors) or None,
        "under_voltage_alarm": _under_voltage_alarm(files),
        "loadavg_1min": float(load.group(1)) if load else None,
        "runnable": int(load.group(2)) if load else None,
        "pressure_us": {name: _pressure_us(files, name) for name in ("cpu", "memory", "io")},
        "memory_available_bytes": int(meminfo["MemAvailable"]) * 1024
        if "MemAvailable" in meminfo
        else None,
        "swap_used_bytes": (int(meminfo["SwapTotal"]) - int(meminfo["SwapFree"])) * 1024
        if swap
        else None,
        "pages_swapped_in": int(vmstat["pswpin"]) if "pswpin" in vmstat else None,
        "oom_kills": int(vmstat["oom_kill"]) if "oom_kill" in vmstat else None,
    }


def hottest_c(health: Mapping[str, Any], zones: Sequence[str] = ()) -> float | None:
    """The hottest zone of a health, or of those of the kinds ``zones``; None = it does not say."""
    if not zones:
        hottest: float | None = health.get("temperature_c")
        return hottest
    found = dict(health.get("temperatures_c") or {}).items()
    return max((c for name, c in found if name.partition(":")[2] in zones), default=None)


def health_flags(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What happened to the board between two healths, as a sorted list of flag names."""
    flags = set()
    was, now = before["throttling"] or [], after["throttling"] or []
    if any(not name.endswith("_occurred") for name in now):
        flags.add("throttled_now")
    if set(now) - set(was):
        flags.add("throttle_event")
    if after["under_voltage_alarm"]:
        flags.add("under_voltage")
    for name, state in after["cooling"].items():
        # a fan that spins faster is not throttling
        if "fan" not in name.lower() and (state or 0) > (before["cooling"].get(name) or 0):
            flags.add("cooling_rose")
    for at in after["frequencies"].values():
        limit, hardware = at["limit_khz"], at["hardware_limit_khz"]
        if limit and hardware and limit < hardware:
            flags.add("frequency_capped")
    real_s = after["realtime_s"] - before["realtime_s"]
    if abs(real_s - (after["monotonic_s"] - before["monotonic_s"])) > 1.0:
        flags.add("clock_jump")
    if (after["pages_swapped_in"] or 0) > (before["pages_swapped_in"] or 0):
        flags.add("swapped_in")
    if before["boot_id"] != after["boot_id"]:
        flags.add("rebooted")
    return sorted(flags)


def device_facts(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the board is: ``answer`` is that of ``runner read``, with ``board`` a snapshot."""
    files = {path: text.strip() for path, text in answer["board"]["files"].items()}
    release = re.search(r'^PRETTY_NAME="?([^"\n]*)', files.get("/etc/os-release", ""), re.M)
    cpus = re.findall(r"^(?:model name|CPU part)\s*:\s*(.*)$", files.get("/proc/cpuinfo", ""), re.M)
    identity = files.get("/proc/device-tree/serial-number") or files.get("/etc/machine-id") or ""
    return {
        "model": files.get("/proc/device-tree/model")
        or files.get("/sys/class/dmi/id/product_name"),
        "machine": answer["machine"],
        "bits": answer["bits"],
        "cpu": sorted(set(cpus)),
        "cpus": answer["cpus"],
        "cpu_model": _cpu_model(files.get("/proc/cpuinfo", "")),
        "emulated": _emulated(files),
        "no_instructions": answer["no_instructions"],
        "kernel": files.get("/proc/sys/kernel/osrelease"),
        "os": release.group(1) if release else None,
        "glibc": answer["libc"],
        "python": None,
        "page_size_bytes": answer["page_size_bytes"],
        "boot_id": files.get("/proc/sys/kernel/random/boot_id"),
        # tells two boards of one kind apart without naming either
        "identity": hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else None,
    }


def probed(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The object that targets/linux/probe.py prints, from the same ``answer`` as `device_facts`."""
    device, now = device_facts(answer), health(answer["board"])
    files = answer["board"]["files"]
    limits_khz = {
        int(word): policy["hardware_limit_khz"]
        for policy in now["frequencies"].values()
        for word in (policy["cpus"] or "").split()
        if word.isdecimal()
    }
    cpus = []
    for block in re.split(r"\n\s*\n", files.get("/proc/cpuinfo", "")):
        pairs = re.findall(r"^([^:\n]*?)\s*:[ \t]*(.*)$", block, re.M)
        values = {key.strip().lower(): value.strip() for key, value in pairs}
        if not values.get("processor", "").isdecimal():
            continue  # the trailer with Hardware, Revision and Serial
        number = int(values["processor"])
        cpus.append({
            "cpu": number,
            "implementer": values.get("cpu implementer"),
            "part": values.get("cpu part"),
            "name": values.get("model name"),
            "features": (values.get("features") or values.get("flags") or "").split(),
            "max_khz": limits_khz.get(number),
        })  # fmt: skip
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", files.get("/proc/meminfo", ""), re.M))
    total, swap = (
        int(meminfo[key]) * 1024 if key in meminfo else None for key in ("MemTotal", "SwapTotal")
    )
    return {
        "schema": FACTS_SCHEMA,
        "device": {**device, "python": ""},
        "libc": f"glibc {device['glibc']}" if device["glibc"] else None,
        "compatible": re.split(r"[\0\s]+", files.get("/proc/device-tree/compatible", "").strip("\0 \n")),
        "cpus": cpus,
        "memory": {"total_bytes": total, "swap_bytes": swap},
        "health": now,
        "free_bytes": answer["free_bytes"],
        "packages": {},
    }  # fmt: skip


def time_in_state(
    before: Mapping[str, Any], after: Mapping[str, Any], *, ticks_per_s: int
) -> dict[str, dict[str, float]] | None:
    """Seconds that each frequency policy spent at each frequency (kHz) between two snapshots of
    ``cpufreq/policy*/stats/time_in_state``; None where the board does not count them."""

    def seconds(snapshot: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        return {
            path.removeprefix(_CPUFREQ).partition("/")[0]: {
                khz: int(ticks) / ticks_per_s for khz, ticks in map(str.split, text.splitlines())
            }
            for path, text in snapshot["files"].items()
        }

    was, now = seconds(before), seconds(after)
    if not was or not now:
        return None
    return {
        policy: {khz: s - was.get(policy, {}).get(khz, 0.0) for khz, s in states.items()}
        for policy, states in now.items()
    }


def _cpu_model(cpuinfo: str) -> str | None:
    """As `cpu_model` of targets/linux/board.py: ``0x41/0xd08 r0p3``, or the processor's name."""
    found = set()
    for block in re.split(r"\n\s*\n", cpuinfo):
        facts = dict(re.findall(r"^([^:\n]*?)[ \t]*:[ \t]*(.*)$", block, re.M))
        if "CPU part" in facts:
            try:
                release = int(facts["CPU variant"], 16), int(facts["CPU revision"])
            except (KeyError, ValueError):
                release = 0, 0
            found.add("{}/{} r{}p{}".format(facts.get("CPU implementer"), facts["CPU part"], *release))  # fmt: skip
        else:
            found.add(facts.get("model name", "").strip())
    return " + ".join(sorted(found - {""})) or None


def _emulated(files: Mapping[str, str]) -> str:
    """As `emulated` of targets/linux/board.py."""
    if "/etc/edgepipe-emulated" in files:
        return f"/etc/edgepipe-emulated: {' '.join(files['/etc/edgepipe-emulated'].split())}"
    if "linux,dummy-virt" in files.get("/proc/device-tree/compatible", ""):
        return "the device tree says linux,dummy-virt"
    return ""


def _folders(files: Mapping[str, str], below: str) -> list[str]:
    return sorted({p.removeprefix(below).partition("/")[0] for p in files if p.startswith(below)})


def _throttling(files: Mapping[str, str]) -> list[str] | None:
    paths = sorted(path for path in files if path.endswith("/get_throttled"))
    first = "/sys/devices/platform/soc/soc:firmware/get_throttled"
    text = next((files[p] for p in [first, *paths] if files.get(p)), "")
    try:
        bits = int(text, 16)
    except ValueError:
        return None
    return [name for bit, name in sorted(THROTTLE_BITS.items()) if bits >> bit & 1]


def _under_voltage_alarm(files: Mapping[str, str]) -> int | None:
    """1 while the supply is too weak (raspberrypi-hwmon), 0 while it is not, or None."""
    for name in _folders(files, "/sys/class/hwmon/"):
        if files.get(f"/sys/class/hwmon/{name}/name") == "rpi_volt":
            return _integer(files.get(f"/sys/class/hwmon/{name}/in0_lcrit_alarm"))
    return None


def _pressure_us(files: Mapping[str, str], resource: str) -> int | None:
    """Time that somebody waited for a resource since boot, us, or None (PSI)."""
    found = re.search(r"^some .*total=(\d+)", files.get(f"/proc/pressure/{resource}", ""), re.M)
    return int(found.group(1)) if found else None


def _integer(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
