"""Ask a board what it is, compare the answer with a profile, write a profile from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from edgepipe.crunner import prepare_board
from edgepipe.device.base import Device
from edgepipe.device.parse import Facts, parse_facts, parse_home
from edgepipe.errors import CommandFailed, NotReadyError
from edgepipe.payload import push_payload, runner_target
from edgepipe.profile import (
    MACHINES,
    SCHEMA,
    SCHEMA_FILE,
    SOURCED_FACTS,
    Cluster,
    DeviceProfile,
    absolute_work_dir,
    schema_text,
)
from edgepipe.runtime import DEFAULT_VERSION

PROBE_TIMEOUT_S = 60.0
# MemTotal is what the kernel and the GPU leave of the RAM that is soldered on: on a 512 MiB
# Raspberry Pi with 76 MiB for the GPU about 80 %.
_RAM_SHARE = 0.75
# Makers round: the 2.2 GHz of a Snapdragon 8 Gen 3 are 2265.6 MHz.
_FREQUENCY_SHARE = 0.03
RUNTIME_PACKAGES = {"ai_edge_litert": "litert", "tflite_runtime": "tflite-runtime"}


def probe(device: Device, *, target: str = "linux", work_dir: str = "~/.edgepipe") -> Facts:
    """Push the target's probe to ``work_dir`` on the board, run it, read what it prints.

    Of a target without an agent (phones) it is the C runner that reads. Raises NotReadyError where
    the board has no python3, or does not start the runner, CommandFailed where the probe fails.
    """
    asked = device.run(["sh", "-c", 'printf %s "$HOME"'], timeout_s=PROBE_TIMEOUT_S)
    home = parse_home(os.fsdecode(asked.stdout), device.address)
    folder = absolute_work_dir(work_dir, home)
    if runner_target(target):
        return parse_facts(json.dumps(prepare_board(device, target, folder).probe()))
    payload = push_payload(device, target, folder)
    command = ["python3", payload.probe, payload.folder]
    done = device.run(command, timeout_s=PROBE_TIMEOUT_S)
    if done.returncode in (126, 127):
        raise NotReadyError(
            f"{device.address} has no python3",
            hint="on the device: sudo apt-get install python3",
            code="no-python",
        )
    if done.returncode != 0:
        raise CommandFailed(
            f"the probe failed on {device.address} with exit code {done.returncode}: "
            f"{os.fsdecode(done.stderr).strip()[-500:]}",
            hint="is python3 there 3.7 or newer?",
        )
    return parse_facts(done.stdout.decode(errors="replace"))


@dataclasses.dataclass(frozen=True)
class Difference:
    """One fact in which a board departs from a profile, both as text."""

    fact: str
    profile: str
    board: str


def differences(facts: Facts, profile: DeviceProfile) -> list[Difference]:
    """Every fact of ``profile`` that the board contradicts, or does not confirm ("?").

    Facts that a profile leaves open ("any", 0, no clusters) are not compared. The model may carry
    a revision, and RAM may be smaller by what kernel and GPU take.
    """
    found: list[Difference] = []

    def compare(fact: str, expected: object, actual: object, same: bool) -> None:
        if not same:
            found.append(Difference(fact, str(expected), "?" if actual is None else str(actual)))

    if profile.model != "any":
        model = (facts.model or "").split(" Rev ")[0]
        compare("model", profile.model, facts.model, model == profile.model)
    if profile.soc != "any":
        socs = ", ".join(facts.socs) or None
        compare("soc", profile.soc, socs, profile.soc.upper() in facts.socs)
    if profile.clusters:
        same = _same_clusters(profile.clusters, facts.clusters)
        compare("clusters", clusters_text(profile.clusters), clusters_text(facts.clusters), same)
    if profile.ram_bytes:
        ram_bytes = facts.ram_bytes
        fits = ram_bytes is not None and (
            _RAM_SHARE * profile.ram_bytes <= ram_bytes <= profile.ram_bytes
        )
        shown = None if ram_bytes is None else ram_text(ram_bytes)
        compare("ram_bytes", ram_text(profile.ram_bytes), shown, fits)
    if profile.machine != "any":
        compare("machine", profile.machine, facts.machine, profile.machine == facts.machine)
        compare("bits", profile.bits, facts.bits, profile.bits == facts.bits)
    if profile.os != "any":
        compare("os", profile.os, facts.os, profile.os == facts.os)
    if profile.libc != "any":
        compare("libc", profile.libc, facts.libc, profile.libc == facts.libc)
    if profile.page_size_bytes:
        compare(
            "page_size_bytes",
            profile.page_size_bytes,
            facts.page_size_bytes,
            profile.page_size_bytes == facts.page_size_bytes,
        )
    if profile.swap_bytes is not None:
        # what a swap partition or file loses to its header
        fits = facts.swap_bytes is not None and 0 <= profile.swap_bytes - facts.swap_bytes < 2**20
        shown = None if facts.swap_bytes is None else ram_text(facts.swap_bytes)
        compare("swap_bytes", ram_text(profile.swap_bytes), shown, fits)
    if profile.kernel != "any":
        compare("kernel", profile.kernel, facts.kernel, _begins(facts.kernel, profile.kernel))
    if profile.python != "any":
        compare("python", profile.python, facts.python, _begins(facts.python, profile.python))
    if profile.governor != "any":
        compare("governor", profile.governor, facts.governor, profile.governor == facts.governor)
    if profile.model != "any" and bool(profile.emulated) != bool(facts.emulated):
        said = "no" if profile.emulated is None else profile.emulated.kind
        compare("emulated", said, facts.emulated or "no", False)
    for package, version in facts.runtimes.items():
        if RUNTIME_PACKAGES.get(package) == profile.runtime:
            compare("runtime_version", profile.runtime_version, version, version == profile.runtime_version)  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well a profile describes a board. ``same_board``: model, chip and cores are the same."""

    profile: DeviceProfile
    same_board: bool
    differences: tuple[Difference, ...]


def rank_profiles(facts: Facts, profiles: Sequence[DeviceProfile]) -> list[Fit]:
    """Every profile of a certain board, the best first: same board, then fewest differences.

    A real board never is an emulated profile's, nor the other way round.
    """
    fits = []
    for profile in profiles:
        if profile.model == profile.soc == "any" and not profile.clusters:
            continue  # of no certain board: it would fit all
        found = tuple(differences(facts, profile))
        named = {difference.fact for difference in found}
        fits.append(Fit(profile, not named & {"model", "soc", "clusters", "emulated"}, found))
    return sorted(fits, key=lambda f: (not f.same_board, len(f.differences), f.profile.name))


def clusters_text(clusters: tuple[Cluster, ...]) -> str:
    return ", ".join(map(_cluster_text, clusters)) or "?"


def _cluster_text(cluster: Cluster) -> str:
    isa = f" ({' '.join(sorted(cluster.isa))})" if cluster.isa else ""
    clock = f" at {cluster.max_frequency_mhz} MHz" if cluster.max_frequency_mhz else ""
    return f"{cluster.count} x {cluster.core}{clock}{isa}"


def _same_clusters(profile: Sequence[Cluster], board: Sequence[Cluster]) -> bool:
    def order(cluster: Cluster) -> tuple[str, int, int]:
        return cluster.core, cluster.count, cluster.max_frequency_mhz

    def same(expected: Cluster, actual: Cluster) -> bool:
        mhz = expected.max_frequency_mhz
        return (
            (expected.core, expected.count, set(expected.isa))
            == (actual.core, actual.count, set(actual.isa))
        ) and (mhz == 0 or abs(actual.max_frequency_mhz - mhz) <= _FREQUENCY_SHARE * mhz)

    if len(profile) != len(board):
        return False
    return all(map(same, sorted(profile, key=order), sorted(board, key=order)))


def _begins(version: str, prefix: str) -> bool:
    """Whether a version is of a line, number by number: 6.6.51+rpt is of 6.6, 6.60 is not."""
    return re.match(rf"{re.escape(prefix)}(?![0-9])", version) is not None


def ram_text(ram_bytes: float) -> str:
    """RAM as its makers count it, in powers of two: 8589934592 -> "8 GiB"."""
    return f"{ram_bytes / 2**30:.3g} GiB" if ram_bytes >= 2**30 else f"{ram_bytes / 2**20:.3g} MiB"


def profile_toml(facts: Facts, *, date: str, target: str = "linux") -> str:
    """A new profile with the board's facts; every source is ``probed on <date>`` (YYYY-MM-DD)."""
    # without an installed one it is what we push with a job
    runtime, version = "litert", DEFAULT_VERSION
    for package, installed in facts.runtimes.items():
        if installed and package in RUNTIME_PACKAGES:
            runtime, version = RUNTIME_PACKAGES[package], installed
            break
    lines = [
        f"#:schema {SCHEMA_FILE}",
        "# What the board said of itself. Look it over: thermal limits and the number of threads",
        "# are a choice, and ram_bytes is without what kernel and GPU keep for themselves.",
        "",
        f"schema = {SCHEMA}",
        f"model = {_quoted((facts.model or 'any').split(' Rev ')[0])}",
        f"soc = {_quoted(facts.socs[0] if facts.socs else 'any')}",
        f'ram_bytes = "{-(-(facts.ram_bytes or 0) // 2**20)} MiB"',  # rounded up: it must fit
        f"target = {_quoted(target)}",
        f"machine = {_quoted(facts.machine if facts.machine in MACHINES else 'any')}",
        f"bits = {facts.bits}",
        f"os = {_quoted(facts.os or 'any')}",
        f"libc = {_quoted(facts.libc or 'any')}",
        f"page_size_bytes = {facts.page_size_bytes}",
        f"runtime = {_quoted(runtime)}",
        f"runtime_version = {_quoted(version)}",
        "threads = 1",
        'work_dir = "~/.edgepipe"',
    ]
    for cluster in facts.clusters:
        lines += [
            "",
            "[[clusters]]",
            f"core = {_quoted(cluster.core)}",
            f"count = {cluster.count}",
            f"max_frequency_mhz = {cluster.max_frequency_mhz}",
            f"isa = [{', '.join(map(_quoted, cluster.isa))}]",
        ]
    if not facts.clusters:
        lines.append("clusters = []")
    lines += ["", "[sources]", *(f'{fact} = "probed on {date}"' for fact in SOURCED_FACTS)]
    return "\n".join(lines) + "\n"


def write_profile(facts: Facts, path: Path, *, date: str, target: str = "linux") -> None:
    """`profile_toml` into a new file, whole or not at all. Raises FileExistsError.

    The JSON Schema that its first line names is put beside it, for editors.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _create(path, profile_toml(facts, date=date, target=target))
    with contextlib.suppress(FileExistsError):
        _create(path.with_name(SCHEMA_FILE), schema_text())


def _create(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.link(part, path)  # unlike a rename it refuses to replace what is there
    finally:
        part.unlink(missing_ok=True)


def _quoted(text: str) -> str:
    """A TOML basic string: the escapes of JSON are escapes of TOML (TOML 1.0, "String")."""
    whole = text.encode("utf-8", "replace").decode()  # a lone surrogate is in no TOML file
    return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")
