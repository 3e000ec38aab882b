"""`DeviceProfile`: facts about a kind of board, one TOML file each. No host names, no secrets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from edgepipe.errors import ProfileError
from edgepipe.resources import profile_paths
from edgepipe.schema import Pattern, Unit, build, json_schema, near_miss, read_toml, record

# What `machine` may say: uname -m of the processes, or "any" for a profile of no certain board.
MACHINES = ("aarch64", "armv7l", "x86_64", "any")
# Features that decide which kernels run; edgepipe/device/parse.py knows them from /proc/cpuinfo.
IsaFeature = Literal[
    "dotprod", "fp16", "i8mm", "bf16", "sve", "sve2", "avx2", "avx_vnni", "avx512f", "avx512_vnni"
]


@record
class Cluster:
    """Cores of one kind. 0 MHz: the frequency is not fixed by this profile."""

    core: str
    count: Annotated[int, Ge(1)]
    max_frequency_mhz: Annotated[int, Ge(0)]
    isa: tuple[IsaFeature, ...] = ()


@record
class ThermalLimits:
    """Measuring starts below ``start_below`` and stops above ``abort_above``.

    ``zones`` are the kinds of thermal zones that count, as /sys/class/thermal/*/type has them; empty: all.
    """

    start_below: Annotated[float, Unit("temperature")] = 60.0
    abort_above: Annotated[float, Unit("temperature")] = 80.0
    zones: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.start_below < self.abort_above:
            raise ProfileError(
                f"thermal: start_below = {self.start_below:g} C is not below abort_above = {self.abort_above:g} C",
                hint="a measurement starts colder than it is stopped",
            )


@record
class Delegation:
    """XNNPACK must take part: at least ``min_share`` of an inference's time is spent in it."""

    kernel: Literal["xnnpack"] = "xnnpack"
    min_share: Annotated[float, Unit("ratio", minimum=0.0)] = 0.0


@record
class Budgets:
    """What a model may cost on this board: the limit of a gate that has none of its own."""

    latency: Annotated[float, Unit("time", minimum=0.0)] | None = None
    memory: Annotated[float, Unit("size", minimum=0.0)] | None = None


@record
class Emulation:
    """The machine that stands for a board: whole (``system``) or its processes only (``user``).

    ``cpu`` is QEMU's name of a core (``cortex-a72``), ``userland`` Debian's of an architecture.
    """

    kind: Literal["system", "user"]
    cpu: str
    memory: Annotated[float, Unit("size", minimum=0.0)]
    cores: Annotated[int, Ge(1)] = 1
    userland: Literal["arm64", "armhf"] = "arm64"


@record
class DeviceProfile:
    """A kind of board. A profile of no certain board leaves facts open: "any", 0, no clusters.

    ``name`` is the file's. See the JSON Schema (`edgepipe devices schema`) for every key.
    """

    schema: Literal[1]
    name: str = ""
    model: str
    """As /proc/device-tree/model says without " Rev x.y"; of a phone ro.product.model."""
    soc: str
    """The chip as the device tree's "compatible" ends: BCM2712. Upper case."""
    clusters: tuple[Cluster, ...]
    ram_bytes: Annotated[float, Unit("size", minimum=0.0)]
    """What is soldered on. Kernel and GPU may take up to a quarter of it."""
    swap_bytes: Annotated[float, Unit("size", minimum=0.0)] | None = None
    """Swap space of the system; left out: not fixed."""
    target: str
    """The folder under targets/ with the payload."""
    machine: Literal["aarch64", "armv7l", "x86_64", "any"]
    """uname -m of the processes: armv7l for a 32-bit userland under a 64-bit kernel."""
    bits: Literal[32, 64]
    os: str
    """PRETTY_NAME of /etc/os-release, or "any"."""
    kernel: str = "any"
    """What `uname -r` begins with, in whole numbers: "6.6" fits 6.6.51."""
    libc: str
    """"glibc 2.36", "bionic" or "any"."""
    page_size_bytes: Annotated[int, Ge(0)]
    python: str = "any"
    """What the version of python3 begins with: "3.11"."""
    runtime: Literal["litert", "tflite-runtime"]
    runtime_version: str
    runtime_sha256: Annotated[str, Pattern("^([0-9a-f]{64})?$")] = ""
    """Of the runtime's library; a measurement with another one says that it differs."""
    threads: Annotated[int, Ge(1)] = 1
    affinity: tuple[Annotated[int, Ge(0)], ...] = ()
    """CPU numbers to stay on, unless the recipe names others; empty: all."""
    governor: str = "any"
    """cpufreq governor that the figures are for; edgepipe sets it only where it is told to."""
    delegation: Delegation | None = None
    budgets: Budgets = dataclasses.field(default_factory=Budgets)
    work_dir: Annotated[str, Pattern("^(~$|~/|/)")] = "~/.edgepipe"
    """Folder on the board; may begin with ~."""
    transports: tuple[Literal["ssh", "adb"], ...] = ("ssh",)
    """How such a board is reached."""
    ssh_port: Annotated[int, Ge(1), Le(65535)] = 22
    thermal: ThermalLimits = dataclasses.field(default_factory=ThermalLimits)
    emulated: Emulation | None = None
    """No such board is meant, but a machine of QEMU's that stands for one."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where each fact comes from: a URL, or "probed on <date>"."""


SCHEMA = 1
# Facts that must carry a source: everything that was looked up rather than chosen.
SOURCED_FACTS = ("model", "soc", "clusters", "ram_bytes", "os", "libc", "page_size_bytes")
# The same for those that may be left open.
SOURCED_IF_GIVEN = ("swap_bytes", "kernel", "python", "governor")
FACTS = tuple(f.name for f in dataclasses.fields(DeviceProfile) if f.name not in ("schema", "name", "sources"))  # fmt: skip
# What a profile's file may say at the top.
KEYS = ("schema", "extends", *FACTS, "sources")
SCHEMA_FILE = "profile.schema.json"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A profile as its file and those it extends say together.

    ``origins`` names for each key the profile that gave it; ``chain`` begins with the profile itself.
    """

    profile: DeviceProfile
    data: Mapping[str, Any]
    origins: Mapping[str, str]
    chain: tuple[Path, ...]


def load_profile(path: Path) -> DeviceProfile:
    """Read and check one profile with what it extends. Raises ProfileError with file and key."""
    return resolve_profile(path).profile


def resolve_profile(path: Path, *, _below: tuple[Path, ...] = ()) -> Resolved:
    """A profile with every key of the one it ``extends``, its own going before.

    Tables are merged key by key, arrays replaced as a whole. A base is looked for beside ``path``,
    then among `resources.profile_paths`. A fact that is changed needs a source of its own. Raises
    ProfileError for a base that is unknown, itself, or extends what extends it.
    """
    own = read_toml(path, error=ProfileError)
    schema = own.get("schema")
    if isinstance(schema, bool):  # which equals 1
        raise ProfileError(f"{path}: schema: {schema} is no number", hint=f"write schema = {SCHEMA}")  # fmt: skip
    if isinstance(schema, int) and schema > SCHEMA:
        raise ProfileError(f"{path}: schema {schema} is newer than {SCHEMA}", hint="upgrade edgepipe")  # fmt: skip
    if "name" in own:
        raise ProfileError(f"{path}: name: a profile is called as its file is", hint="remove the key; rename the file for another name")  # fmt: skip
    if "schema" not in own:
        raise ProfileError(f"{path}: schema: is missing", hint=f"write schema = {SCHEMA}")
    chain, base = (*_below, path.resolve()), None
    data = dict(own)
    if "extends" in own:
        base = _base(data.pop("extends"), path, chain)
        _check_own_sources(path, own, base)
        data = _merged(base.data, data)
    profile = build(DeviceProfile, data, where=str(path), error=ProfileError, legal=KEYS)
    _check_sources(path, profile)
    origins = {key: path.stem for key in own if key != "extends"}
    return Resolved(
        dataclasses.replace(profile, name=path.stem),
        data,
        {**base.origins, **origins} if base else origins,
        (path, *base.chain) if base else (path,),
    )


def _base(name: object, path: Path, chain: tuple[Path, ...]) -> Resolved:
    if not isinstance(name, str):
        raise ProfileError(f"{path}: extends: {name!r} is not the name of a profile", hint='write extends = "rpi4b_4gb"')  # fmt: skip
    known = {**profile_paths(), **{p.stem: p for p in path.parent.glob("*.toml")}}
    if name not in known:
        raise ProfileError(
            f"{path}: extends: unknown device profile {name!r}{near_miss(name, list(known))}",
            hint="`edgepipe devices list` shows what there is",
        )
    found = known[name].resolve()
    if found in chain:
        names = " -> ".join([*(p.stem for p in chain), name])
        what = "it extends itself" if found == path.resolve() else f"this is a circle: {names}"
        raise ProfileError(f"{path}: extends: {what}", hint="name another profile")
    return resolve_profile(known[name], _below=chain)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``{"thermal": {"a": 1, "b": 2}}`` and ``{"thermal": {"b": 3}}`` -> ``{"thermal": {"a": 1, "b": 3}}``."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _check_own_sources(path: Path, own: Mapping[str, Any], base: Resolved) -> None:
    """The base's source does not vouch for what this file says instead."""
    given = own.get("sources")
    changed = [
        key
        for key, value in own.items()
        if key in base.profile.sources
        and value != base.data.get(key)
        and not (isinstance(given, dict) and key in given)
    ]
    if changed:
        raise ProfileError(
            f"{path}: no source for {', '.join(changed)}, which {base.profile.name} says otherwise",
            hint='add them under [sources]: a URL, or "probed on 2026-11-22"',
        )


def _check_sources(path: Path, profile: DeviceProfile) -> None:
    closed = [fact for fact in SOURCED_IF_GIVEN if getattr(profile, fact) not in (None, "any")]
    missing = [fact for fact in (*SOURCED_FACTS, *closed) if fact not in profile.sources]
    if missing:
        raise ProfileError(
            f"{path}: no source for {', '.join(missing)}",
            hint='add them under [sources]: a URL, or "probed on 2026-11-22"',
        )
    unknown = [key for key in profile.sources if key not in FACTS]
    if unknown:
        raise ProfileError(f"{path}: [sources] names no fact of this profile: {', '.join(unknown)}")


def profile_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a profile's file, for editors and check-jsonschema.

    What it cannot say: that a base exists, that a changed fact has a source of its own.
    """
    schema = json_schema(DeviceProfile)
    properties = schema["properties"]
    del properties["name"]
    properties["extends"] = {
        "description": "Name of a profile whose keys are taken over where this file has none.",
        "type": "string",
    }
    properties["sources"]["propertyNames"] = {"enum": sorted(FACTS)}
    needed = [key for key in schema.pop("required") if key != "schema"]
    whole: dict[str, Any] = {"sources": {"required": list(SOURCED_FACTS)}}
    for key, item in properties.items():
        # a table of a profile that extends another may say half of what the table needs
        table = schema["$defs"].get(str(item.get("$ref")).rpartition("/")[2], {})
        if "required" in table:
            whole[key] = {"required": table.pop("required")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "made by `edgepipe devices schema`",
        **schema,
        "title": "edgepipe device profile",
        "required": ["schema"],
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": [*needed, "sources"], "properties": whole},
    }


def schema_text() -> str:
    """`profile_schema` as the text of `SCHEMA_FILE`."""
    return json.dumps(profile_schema(), indent=2, ensure_ascii=False) + "\n"


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


def profile_path(name: str, paths: Mapping[str, Path]) -> Path:
    """The file of the profile called ``name`` among ``paths`` (from `resources.profile_paths`)."""
    if name not in paths:
        raise ProfileError(
            f"unknown device profile {name!r}{near_miss(name, list(paths))}",
            hint="`edgepipe devices list` shows what there is",
        )
    return paths[name]


def find_profile(name: str, paths: Mapping[str, Path]) -> DeviceProfile:
    """The profile called ``name`` among ``paths``. Raises ProfileError with near misses."""
    return load_profile(profile_path(name, paths))
