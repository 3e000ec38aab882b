"""`DeviceProfile`: facts about a kind of board, one TOML file each. No host names, no secrets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from edgepipe.errors import ProfileError
from edgepipe.schema import Unit, build, near_miss, read_toml, record

# What `machine` may say: uname -m of the processes, or "any" for a profile of no certain board.
MACHINES = ("aarch64", "armv7l", "x86_64", "any")


@record
class Cluster:
    """Cores of one kind. ``isa`` are the features that decide kernel speed (dotprod, i8mm, fp16, sve)."""

    core: str
    count: int
    max_frequency_mhz: int
    isa: tuple[str, ...] = ()


@record
class ThermalLimits:
    """Measuring starts below ``start_below`` and stops above ``abort_above``."""

    start_below: Annotated[float, Unit("temperature")] = 60.0
    abort_above: Annotated[float, Unit("temperature")] = 80.0


@record
class Emulation:
    """The machine that stands for a board: whole (``system``) or its processes only (``user``).

    ``cpu`` is QEMU's name of a core (``cortex-a72``), ``userland`` Debian's of an architecture.
    """

    kind: Literal["system", "user"]
    cpu: str
    memory: Annotated[float, Unit("size")]
    cores: int = 1
    userland: Literal["arm64", "armhf"] = "arm64"


@record
class DeviceProfile:
    """``sources`` maps each fact (key of this table) to a URL or ``"probed on <date>"``.

    ``target`` is the folder under ``targets/`` with the payload; ``runtime`` the inference runtime
    the numbers are for. ``work_dir`` may begin with ``~``.
    A profile of no certain board (localhost) leaves facts open: ``"any"``, 0, no clusters.
    ``emulated`` says that no such board is meant but a machine of QEMU's that stands for one.
    """

    schema: int
    name: str = ""
    model: str
    soc: str
    clusters: tuple[Cluster, ...]
    ram_bytes: Annotated[float, Unit("size")]
    target: str
    machine: Literal["aarch64", "armv7l", "x86_64", "any"]
    bits: Literal[32, 64]
    os: str
    libc: str
    page_size_bytes: int
    runtime: Literal["litert", "tflite-runtime"]
    runtime_version: str
    threads: int = 1
    work_dir: str = "~/.edgepipe"
    thermal: ThermalLimits = dataclasses.field(default_factory=ThermalLimits)
    emulated: Emulation | None = None
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


SCHEMA = 1
# Facts that must carry a source: everything that was looked up rather than chosen.
SOURCED_FACTS = ("model", "soc", "clusters", "ram_bytes", "os", "libc", "page_size_bytes")


def load_profile(path: Path) -> DeviceProfile:
    """Read and check one profile. Raises ProfileError with file and key."""
    data = read_toml(path, error=ProfileError)
    if isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
        raise ProfileError(f"{path}: schema {data['schema']} is newer than {SCHEMA}", hint="upgrade edgepipe")  # fmt: skip
    profile = build(DeviceProfile, data, where=str(path), error=ProfileError)
    missing = [fact for fact in SOURCED_FACTS if fact not in profile.sources]
    if missing:
        raise ProfileError(
            f"{path}: no source for {', '.join(missing)}",
            hint='add them under [sources]: a URL, or "probed on 2026-11-22"',
        )
    unknown = [
        k for k in profile.sources if k not in {f.name for f in dataclasses.fields(DeviceProfile)}
    ]
    if unknown:
        raise ProfileError(f"{path}: [sources] names no fact of this profile: {', '.join(unknown)}")
    return dataclasses.replace(profile, name=path.stem)


def absolute_work_dir(work_dir: str, home: str) -> str:
    """``work_dir`` of a profile on a board whose home folder is ``home``: ``~/x`` -> ``/home/pi/x``."""
    if work_dir == "~" or work_dir.startswith("~/"):
        return home.rstrip("/") + work_dir[1:]
    if not work_dir.startswith("/"):
        raise ProfileError(
            f"work_dir {work_dir!r} is neither absolute nor under ~",
            hint='write work_dir = "~/.edgepipe" into the profile',
        )
    return work_dir


def find_profile(name: str, paths: dict[str, Path]) -> DeviceProfile:
    """The profile called ``name`` among ``paths`` (from `resources.profile_paths`)."""
    if name not in paths:
        raise ProfileError(
            f"unknown device profile {name!r}{near_miss(name, list(paths))}",
            hint="`edgepipe devices list` shows what there is",
        )
    return load_profile(paths[name])
