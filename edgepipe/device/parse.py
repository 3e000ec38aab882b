"""Pure parsers of what boards print: text in, data out, CommandFailed on garbage."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from edgepipe.errors import CommandFailed
from edgepipe.profile import Cluster, IsaFeature

FACTS_SCHEMA = 1

# (implementer, part) of /proc/cpuinfo -> core. Linux, arch/arm64/include/asm/cputype.h (Arm's own
# 32-bit cores: arch/arm/include/asm/cputype.h)
CORES = {
    ("0x41", "0xb76"): "ARM1176",
    ("0x41", "0xc07"): "Cortex-A7",
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd0d"): "Cortex-A77",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd48"): "Cortex-X2",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4b"): "Cortex-A78C",
    ("0x41", "0xd4d"): "Cortex-A715",
    ("0x41", "0xd4e"): "Cortex-X3",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd80"): "Cortex-A520",
    ("0x41", "0xd81"): "Cortex-A720",
    ("0x41", "0xd82"): "Cortex-X4",
}
# What /proc/cpuinfo calls the features that decide which kernels run, and what profiles call them.
# Arm: Linux, Documentation/arch/arm64/elf_hwcaps.rst. x86: Documentation/arch/x86/cpuinfo.rst.
ISA_FEATURES: dict[str, IsaFeature] = {
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a board says of itself (targets/linux/probe.py). None = it does not say.

    ``socs`` are the chip's names from the device tree, most specific first. ``runtimes`` maps
    installed inference packages to their versions. ``throttling`` are the firmware's own words,
    ``emulated`` what says that this is no real board ("" = nothing does). ``under_voltage`` is the
    supply's alarm, ``no_instructions`` why retired instructions cannot be counted ("": they can).
    """

    model: str | None
    socs: tuple[str, ...]
    clusters: tuple[Cluster, ...]
    ram_bytes: int | None
    swap_bytes: int | None
    machine: str
    bits: int
    os: str | None
    kernel: str
    libc: str | None
    page_size_bytes: int
    python: str
    governor: str | None
    temperature_c: float | None
    throttling: tuple[str, ...] | None
    free_bytes: int
    runtimes: Mapping[str, str | None]
    emulated: str = ""
    thermal_zones_c: Mapping[str, float] = dataclasses.field(default_factory=dict)
    under_voltage: bool | None = None
    memory_available_bytes: int | None = None
    load_1min: float | None = None
    no_instructions: str | None = None


def parse_facts(text: str) -> Facts:
    """The JSON object that a target's probe prints. Raises CommandFailed on anything else.

    Of a phone it has what Android says, too: its chip, its C library, and what heat takes away.
    """
    try:
        data = json.loads(text)
        if data["schema"] != FACTS_SCHEMA:
            raise ValueError(f"schema {data['schema']}, expected {FACTS_SCHEMA}")
        device, health, memory = data["device"], data["health"], data["memory"]
        throttling = health["throttling"]
        soc, heat = _text(device.get("soc")), _text(health.get("thermal_status"))
        if throttling is None and heat is not None:
            throttling = [] if heat == "none" else [f"thermal status {heat}"]
        return Facts(
            model=_text(device["model"]),
            socs=(*([soc.upper()] if soc else []), *_socs(data["compatible"])),
            clusters=_clusters(data["cpus"]),
            ram_bytes=_whole(memory["total_bytes"]),
            swap_bytes=_whole(memory["swap_bytes"]),
            machine=str(device["machine"]),
            emulated=str(device.get("emulated") or ""),
            bits=int(device["bits"]),
            os=_text(device["os"]),
            kernel=str(device["kernel"]),
            libc=_text(device.get("libc") or data["libc"]),
            page_size_bytes=int(device["page_size_bytes"]),
            python=str(device["python"]),
            governor=_text(health["governor"]),
            temperature_c=None
            if health["temperature_c"] is None
            else float(health["temperature_c"]),
            throttling=None if throttling is None else tuple(str(item) for item in throttling),
            free_bytes=int(data["free_bytes"]),
            runtimes={str(k): _text(v) for k, v in dict(data["packages"]).items()},
            thermal_zones_c={
                str(zone).partition(":")[2]: float(value)
                for zone, value in dict(health.get("temperatures_c") or {}).items()
            },
            under_voltage=None
            if health.get("under_voltage_alarm") is None
            else bool(health["under_voltage_alarm"]),
            memory_available_bytes=_whole(health.get("memory_available_bytes")),
            load_1min=None if health.get("loadavg_1min") is None else float(health["loadavg_1min"]),
            no_instructions=_text(device.get("no_instructions")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise _garbage("probe.py", text, f"{type(exc).__name__}: {exc}") from exc


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _socs(compatible: Any) -> tuple[str, ...]:
    """["raspberrypi,5-model-b", "brcm,bcm2712"] -> ("BCM2712",): the chip comes after the board."""
    names = [str(item).rpartition(",")[2].upper() for item in list(compatible)]
    return tuple(names[1:])


def _clusters(cpus: Any) -> tuple[Cluster, ...]:
    """CPUs that are of one kind and reach one frequency, in the order they first appear."""
    counts: dict[tuple[str, int, tuple[IsaFeature, ...]], int] = {}
    for cpu in list(cpus):
        part = (str(cpu["implementer"]), str(cpu["part"]))
        core = CORES.get(part) or _text(cpu["name"]) or f"unknown core {part[0]}/{part[1]}"
        features = set(cpu["features"])
        isa = tuple(name for flag, name in ISA_FEATURES.items() if flag in features)
        kind = (core, round((_whole(cpu["max_khz"]) or 0) / 1000), isa)
        counts[kind] = counts.get(kind, 0) + 1
    return tuple(
        Cluster(core=core, count=count, max_frequency_mhz=mhz, isa=isa)
        for (core, mhz, isa), count in counts.items()
    )


_SHA256 = re.compile(r"^[0-9a-f]{64}(?=\s|$)")


def name_cores(text: str | None) -> str | None:
    """``cpu_model`` as a board gives it -> for a person: ``0x41/0xd08 r0p3`` -> ``Cortex-A72 r0p3``."""
    if text is None:
        return None
    return re.sub(r"(0x\w+)/(0x\w+)", lambda found: CORES.get((found[1], found[2]), found[0]), text)  # fmt: skip


def parse_home(text: str, address: str) -> str:
    """The home folder that ``printf %s "$HOME"`` printed on the board at ``address``."""
    if not text.startswith("/") or "\n" in text:
        raise CommandFailed(
            f"{address} did not say where its home folder is, but printed {text[:200]!r}",
            hint="does a start-up file there (~/.bashrc) print something? it must not without a terminal",
            code="unexpected-output",
        )
    return text


def parse_sha256(text: str) -> str:
    """The digest from what ``sha256sum`` prints: 64 hexadecimal digits, then anything."""
    match = _SHA256.match(text)
    if match is None:
        raise _garbage("sha256sum", text)
    return match.group()


def parse_free_bytes(text: str) -> int:
    """Free bytes from ``df -Pk`` of one folder.

    The POSIX format is a header and one line: device, size, used, available (in KiB), capacity as
    ``n%``, mount point. Device and mount point may contain blanks, so we count from the capacity.
    """
    lines = text.splitlines()
    words = lines[1].split() if len(lines) == 2 else []
    for index, word in enumerate(words):
        if (
            re.fullmatch(r"(\d+%|-)", word)
            and index >= 4
            and re.fullmatch(r"-?\d+", words[index - 1])
        ):
            return max(int(words[index - 1]), 0) * 1024
    raise _garbage("df -Pk", text)


def _garbage(command: str, text: str, reason: str = "") -> CommandFailed:
    why = f" ({reason[:200]})" if reason else ""
    return CommandFailed(
        f"`{command}` printed something else than expected{why}: {text[:200]!r}",
        hint="run it on the board by hand; please report the output",
        code="unexpected-output",
    )
