"""``edgepipe probe``: what a board is, and whether it is what a profile says."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.cli import Output
from edgepipe.errors import EXIT_FAIL, EXIT_PASS, RequestError

if TYPE_CHECKING:
    from edgepipe.device.parse import Facts

PROFILE_FOLDER = Path("device_profiles")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read the facts of a board, compare them with a profile, or write a profile from them.\n\n"
        "  edgepipe probe local\n"
        "  edgepipe probe ssh://pi@raspberrypi --profile rpi5_8gb\n"
        "  edgepipe probe ssh://pi@raspberrypi --write my_board\n\n"
        "exit code 1: the board differs from the profile"
    )
    parser.add_argument("address", help="the board: local, ssh://[user@]host[:port], adb://SERIAL, virt://NAME or labgrid://PLACE")  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help="say what differs from this profile")
    parser.add_argument("--write", metavar="NAME", help=f"write the facts to {PROFILE_FOLDER}/NAME.toml, a new profile")  # fmt: skip
    parser.add_argument("--target", metavar="PLATFORM", help="payload that knows how to ask (default: the profile's; android over adb, else linux)")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.device import open_device
    from edgepipe.probe import differences, probe
    from edgepipe.profile import find_profile
    from edgepipe.resources import profile_paths

    if args.address.startswith("null://"):
        raise RequestError("a null device is no board: it has no facts to read", hint="probe a real one: edgepipe probe ssh://user@host", code="bad-address")  # fmt: skip
    path = _new_profile_path(args.write) if args.write is not None else None
    profile = find_profile(args.profile, profile_paths()) if args.profile is not None else None
    by_address = "android" if args.address.startswith("adb://") else "linux"
    target = args.target or (profile.target if profile else by_address)
    work_dir = profile.work_dir if profile else "~/.edgepipe"
    device = open_device(args.address)
    try:
        facts = probe(device, target=target, work_dir=work_dir)
    finally:
        device.close()
    found = differences(facts, profile) if profile else []
    out.text(facts_text(facts))
    if profile and found:
        out.text(f"\ndiffers from profile {profile.name}:")
        out.text("\n".join(f"  {d.fact}: profile {d.profile}, board {d.board}" for d in found))
    elif profile:
        out.text(f"\nis what profile {profile.name} says")
    if path:
        _write(facts, path, target)
        out.text(f"\nwrote {path}")
    out.json(
        {
            "address": args.address,
            "facts": dataclasses.asdict(facts),
            "profile": profile.name if profile else None,
            "differences": [dataclasses.asdict(d) for d in found],
            "written": str(path) if path else None,
        }
    )
    return EXIT_FAIL if found else EXIT_PASS


def _new_profile_path(name: str) -> Path:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise RequestError(
            f"{name!r} is no name for a profile", hint="use letters, digits, - and _, like my_board"
        )
    path = PROFILE_FOLDER / f"{name}.toml"
    if path.exists():
        raise RequestError(f"{path} exists", hint="choose another name, or remove the file first")
    return path


def _write(facts: Facts, path: Path, target: str) -> None:
    import datetime

    from edgepipe.probe import write_profile

    try:
        write_profile(facts, path, date=datetime.date.today().isoformat(), target=target)
    except OSError as exc:
        raise RequestError(
            f"cannot write {path}: {exc.strerror}", hint="check the folder and its permissions"
        ) from exc


def facts_text(facts: Facts) -> str:
    """The facts as people read them, one line each; `?` = the board does not say."""
    from edgepipe.probe import clusters_text, ram_text
    from edgepipe.units import format_bytes

    def memory(value_bytes: int | None) -> str:
        return "?" if value_bytes is None else ram_text(value_bytes)

    throttling = "?" if facts.throttling is None else ", ".join(facts.throttling) or "none"
    temperature = "?" if facts.temperature_c is None else f"{facts.temperature_c:.1f} C"
    zones = ", ".join(f"{name} {c:.1f} C" for name, c in facts.thermal_zones_c.items())
    supply = {None: "?", False: "no under-voltage", True: "UNDER-VOLTAGE"}[facts.under_voltage]
    load = "?" if facts.load_1min is None else f"{facts.load_1min:.2f} in the last minute"
    counters = "?" if facts.no_instructions is None else facts.no_instructions or "can be counted"
    runtimes = ", ".join(f"{name} {version or '?'}" for name, version in facts.runtimes.items())
    lines = {
        "model": facts.model or "?",
        "SoC": ", ".join(facts.socs) or "?",
        "cores": clusters_text(facts.clusters),
        "RAM": f"{memory(facts.ram_bytes)} ({memory(facts.memory_available_bytes)} available), "
        f"swap {memory(facts.swap_bytes)}",
        "machine": f"{facts.machine}, {facts.bits} bit, pages of {facts.page_size_bytes} bytes",
        "OS": f"{facts.os or '?'}, kernel {facts.kernel}, {facts.libc or 'libc ?'}",
        "Python": facts.python or "none",
        "runtimes": runtimes or "none installed",
        "emulated": facts.emulated or "no sign of it",
        "governor": facts.governor or "?",
        "load": load,
        "temperature": temperature + (f" ({zones})" if len(facts.thermal_zones_c) > 1 else ""),
        "throttling": throttling,
        "supply": supply,
        "instructions": counters,
        "free disk": format_bytes(facts.free_bytes),
    }
    return "\n".join(f"{name:12s} {value}" for name, value in lines.items())
