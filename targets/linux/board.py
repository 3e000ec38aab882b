"""What this board is and how it fares: facts, health, free space, installed runtimes.

Standard library only, Python 3.7 or newer. Raw readings in SI units; None = this board does not say.
"""

import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import time

import instructions
from sysfs import SYSROOT, names, read, read_int


def log(text):
    try:
        sys.stderr.write("agent: %s\n" % text)
        sys.stderr.flush()
    except OSError:
        pass  # the log may lie on the disk that is full


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------- health

# Raspberry Pi firmware, "get_throttled" property: bits 0-3 now, 16-19 since boot.
THROTTLE_BITS = {
    0: "under_voltage", 1: "frequency_capped", 2: "throttled", 3: "soft_temperature_limit",
    16: "under_voltage_occurred", 17: "frequency_capped_occurred", 18: "throttled_occurred",
    19: "soft_temperature_limit_occurred",
}  # fmt: skip


def throttling(ask_firmware=True):
    """Firmware throttling as names; None where this board does not say.

    Without ``ask_firmware`` only files are read, which costs no process.
    """
    text = None
    for platform_dir in ["/sys/devices/platform/soc/soc:firmware"] + [
        "/sys/devices/platform/%s/%s" % (soc, firmware)
        for soc in names("/sys/devices/platform")
        if soc.startswith("soc")
        for firmware in names("/sys/devices/platform/" + soc)
        if "firmware" in firmware
    ]:
        text = text or read(platform_dir + "/get_throttled")
    if text is None and ask_firmware and not SYSROOT and shutil.which("vcgencmd"):
        try:
            done = subprocess.run(
                ["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=5,
            )  # fmt: skip
            match = re.match(rb"throttled=(0x[0-9a-fA-F]+)", done.stdout)
            text = match.group(1).decode() if match else None
        except (OSError, subprocess.TimeoutExpired):
            text = None
    try:
        bits = int(text or "", 16)
    except ValueError:
        return None
    return [name for bit, name in sorted(THROTTLE_BITS.items()) if bits >> bit & 1]


def throttled_now(bits):
    """The flag for what `throttling` says of this moment, in a set."""
    now = [name for name in bits or [] if not name.endswith("_occurred")]
    return {"throttled_now"} if now else set()


def temperatures():
    """Degrees Celsius by thermal zone."""
    found = {}
    for zone in names("/sys/class/thermal"):
        if zone.startswith("thermal_zone"):
            value = read_int("/sys/class/thermal/%s/temp" % zone)
            if value is not None:
                kind = read("/sys/class/thermal/%s/type" % zone, "?")
                found["%s:%s" % (zone, kind)] = value / 1000.0
    return found


def hottest_c(found, zones=()):
    """The hottest of `temperatures`, or of the zones of these kinds; None where there is none."""
    return max(
        (c for name, c in found.items() if not zones or name.partition(":")[2] in zones),
        default=None,
    )


def temperature_c(zones=()):
    """The hottest zone, or of those of these kinds; None where this board does not say."""
    return hottest_c(temperatures(), zones)


def vmstat():
    return {
        name: int(count)
        for name, count in re.findall(r"^(\w+) (\d+)$", read("/proc/vmstat", ""), re.M)
    }


def memory_available_bytes():
    """What the kernel could give to a new process without swapping (proc(5), MemAvailable)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", read("/proc/meminfo") or "", re.M)
    return int(found.group(1)) * 1024 if found else None


def oom_kills():
    return vmstat().get("oom_kill")


def under_voltage_alarm():
    """1 while the supply is too weak (raspberrypi-hwmon), 0 while it is not, or None."""
    for folder in names("/sys/class/hwmon"):
        if read("/sys/class/hwmon/%s/name" % folder) == "rpi_volt":
            return read_int("/sys/class/hwmon/%s/in0_lcrit_alarm" % folder)
    return None


def pressure_us(resource):
    """Time that somebody waited for ``cpu``, ``memory`` or ``io`` since boot, us, or None (PSI)."""
    found = re.search(r"^some .*total=(\d+)", read("/proc/pressure/" + resource, ""), re.M)
    return int(found.group(1)) if found else None


def health():
    """One snapshot of everything that can disturb a measurement. SI units; None = not readable."""
    zones, cooling, frequencies = temperatures(), {}, {}
    for device in names("/sys/class/thermal"):
        if device.startswith("cooling_device"):
            base = "/sys/class/thermal/%s/" % device
            cooling["%s:%s" % (device, read(base + "type", "?"))] = read_int(base + "cur_state")
    for policy in names("/sys/devices/system/cpu/cpufreq"):
        base = "/sys/devices/system/cpu/cpufreq/%s/" % policy
        if policy.startswith("policy"):
            frequencies[policy] = {
                "cpus": read(base + "related_cpus"),
                "governor": read(base + "scaling_governor"),
                "current_khz": read_int(base + "scaling_cur_freq"),
                "limit_khz": read_int(base + "scaling_max_freq"),
                "hardware_limit_khz": read_int(base + "cpuinfo_max_freq"),
            }
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+)", read("/proc/meminfo", ""), re.M))
    counters = vmstat()
    load = re.match(r"([\d.]+) \S+ \S+ (\d+)/", read("/proc/loadavg", ""))
    return {
        "realtime_s": time.time(),
        "monotonic_s": time.monotonic(),
        "boot_id": read("/proc/sys/kernel/random/boot_id"),
        "temperatures_c": zones,
        "temperature_c": max(zones.values(), default=None),
        "cooling": cooling,
        "throttling": throttling(),
        "frequencies": frequencies,
        "governor": ",".join(sorted({f["governor"] for f in frequencies.values() if f["governor"]}))
        or None,
        "under_voltage_alarm": under_voltage_alarm(),
        "loadavg_1min": float(load.group(1)) if load else None,
        "runnable": int(load.group(2)) if load else None,
        "pressure_us": {name: pressure_us(name) for name in ("cpu", "memory", "io")},
        "memory_available_bytes": memory_available_bytes(),
        "swap_used_bytes": (int(meminfo["SwapTotal"]) - int(meminfo["SwapFree"])) * 1024
        if "SwapTotal" in meminfo and "SwapFree" in meminfo
        else None,
        "pages_swapped_in": counters.get("pswpin"),
        "oom_kills": counters.get("oom_kill"),
    }


def health_flags(before, after):
    """What happened to the board between two snapshots, as a sorted list of flag names."""
    flags = throttled_now(after["throttling"])
    if set(after["throttling"] or []) - set(before["throttling"] or []):
        flags.add("throttle_event")
    if after["under_voltage_alarm"]:
        flags.add("under_voltage")
    for name, state in after["cooling"].items():
        # a fan that spins faster is not throttling
        if "fan" not in name.lower() and (state or 0) > (before["cooling"].get(name) or 0):
            flags.add("cooling_rose")
    for policy, now_at in after["frequencies"].items():
        limit, hardware = now_at["limit_khz"], now_at["hardware_limit_khz"]
        if limit and hardware and limit < hardware:
            flags.add("frequency_capped")
    real = after["realtime_s"] - before["realtime_s"]
    if abs(real - (after["monotonic_s"] - before["monotonic_s"])) > 1.0:
        flags.add("clock_jump")
    if (after["pages_swapped_in"] or 0) > (before["pages_swapped_in"] or 0):
        flags.add("swapped_in")
    if before["boot_id"] != after["boot_id"]:
        flags.add("rebooted")
    return sorted(flags)


def machine():
    """Architecture of this *process*: a 32-bit userland on a 64-bit kernel is armv7l."""
    name = platform.machine()
    if struct.calcsize("P") == 4:
        return {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(name, name)
    return name


def glibc_version():
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, ValueError, OSError):
        return None
    return version if name == "glibc" else None


def cpu_model():
    """What decides which instructions run: ``0x41/0xd08 r0p3`` of an Arm core (its MIDR), else the
    processor's name; of a board with several kinds of cores all, joined by `` + ``."""
    found = []
    for block in re.split(r"\n\s*\n", read("/proc/cpuinfo", "")):
        facts = dict(re.findall(r"^([^:\n]*?)[ \t]*:[ \t]*(.*)$", block, re.M))
        if "CPU part" in facts:
            try:
                release = int(facts["CPU variant"], 16), int(facts["CPU revision"])
            except (KeyError, ValueError):
                release = 0, 0
            name = "%s/%s r%dp%d" % ((facts.get("CPU implementer"), facts["CPU part"]) + release)
        else:
            name = facts.get("model name", "").strip()
        if name and name not in found:
            found.append(name)
    return " + ".join(sorted(found)) or None


def emulated():
    """What says that this is no real board, or an empty string."""
    said = read("/etc/edgepipe-emulated")
    if said is not None:
        return "/etc/edgepipe-emulated: %s" % " ".join(said.split())
    if "linux,dummy-virt" in read("/proc/device-tree/compatible", ""):
        return "the device tree says linux,dummy-virt"
    return ""


def device_facts():
    cpuinfo = read("/proc/cpuinfo", "")
    release = read("/etc/os-release", "")
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.M)
    cpus = sorted(set(re.findall(r"^(?:model name|CPU part)\s*:\s*(.*)$", cpuinfo, re.M)))
    identity = read("/proc/device-tree/serial-number") or read("/etc/machine-id") or ""
    return {
        "model": read("/proc/device-tree/model") or read("/sys/class/dmi/id/product_name"),
        "machine": machine(),
        "bits": struct.calcsize("P") * 8,
        "cpu": cpus,
        "cpus": os.cpu_count(),
        "cpu_model": cpu_model(),
        "emulated": emulated(),
        # why instructions cannot be counted; "" where they can
        "no_instructions": instructions.why_not(),
        "kernel": platform.release(),
        "os": match.group(1) if match else None,
        "glibc": glibc_version(),
        "python": platform.python_version(),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "boot_id": read("/proc/sys/kernel/random/boot_id"),
        # tells two boards of one kind apart without naming either
        "identity": hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else None,
    }


def free_bytes(folder):
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def pushed_folders():
    """Packages that were pushed for this version of Python: WORK_DIR/runtimes/<sha256>-cp311/."""
    agents = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # WORK_DIR/agents/<sha256>
    runtimes = os.path.join(os.path.dirname(agents), "runtimes")
    if os.path.basename(agents) != "agents" or not os.path.isdir(runtimes):
        return []
    tag = "-cp%d%d" % sys.version_info[:2]
    return [os.path.join(runtimes, n) for n in sorted(os.listdir(runtimes)) if n.endswith(tag)]


def packages():
    """Runtimes installed or pushed for this Python, found by path: importing a broken wheel could
    crash."""
    found = {}
    for folder in sys.path + pushed_folders():
        for package in ("ai_edge_litert", "tflite_runtime"):
            path = os.path.join(folder or ".", package)
            if package not in found and os.path.isdir(path):
                found[package] = {"version": None, "path": path}
                for name in os.listdir(folder or "."):
                    match = re.match(package + r"-([^-]+)\.(?:dist|egg)-info$", name)
                    if match:
                        found[package]["version"] = match.group(1)
    return found
