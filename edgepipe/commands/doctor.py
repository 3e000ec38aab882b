"""``edgepipe doctor``: is a board ready to measure, and if not, what mends it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from edgepipe.cli import Output
from edgepipe.errors import EXIT_NOT_READY, EXIT_PASS, DeviceError, RequestError

if TYPE_CHECKING:
    from edgepipe.doctor import Diagnosis

_SIGNS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "?"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find out whether a board is ready to measure: the way to it, its system, its health, the\n"
        "runtime, and what earlier jobs left. Each finding comes with the command that mends it.\n\n"
        "  edgepipe doctor ssh://pi@raspberrypi --profile rpi5_8gb\n"
        "  edgepipe doctor ssh://pi@raspberrypi --fix\n\n"
        "--fix pushes the runtime from this machine (the board needs no network) and removes what\n"
        "dead jobs left: files in the work folder, a governor that --set-governor had changed. It\n"
        "changes nothing else on the board: no service, no package.\n\n"
        "exit code 0: ready, perhaps with warnings; 3: not ready, or something could not be found out"
    )
    parser.add_argument(
        "address", help="the board: ssh://[user@]host[:port], virt://NAME, labgrid://PLACE or local"
    )
    parser.add_argument("--profile", metavar="NAME", help="what the board should be (default: any board)")  # fmt: skip
    parser.add_argument(
        "--fix", action="store_true", help="push the runtime, clear away what dead jobs left"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.device import open_device
    from edgepipe.doctor import examine, unreachable
    from edgepipe.profile import find_profile
    from edgepipe.resources import profile_paths

    if args.address.startswith("null://"):
        raise RequestError("a null device is no board: there is nothing to examine", hint="examine a real one: edgepipe doctor ssh://user@host", code="bad-address")  # fmt: skip
    usual = args.address.removeprefix("virt://") if args.address.startswith("virt://") else "localhost"  # fmt: skip
    profile = find_profile(args.profile or usual, profile_paths())
    try:
        device = open_device(args.address)
    except DeviceError as exc:
        found = unreachable(args.address, profile, exc)
    else:
        try:
            found = examine(device, profile, fix=args.fix)
        finally:
            device.close()
    out.text(diagnosis_text(found))
    out.json(
        {
            "address": found.address,
            "profile": found.profile,
            "ready": found.is_ready,
            "checks": [dataclasses.asdict(check) for check in found.checks],
            "fixed": list(found.fixed),
        }
    )
    return EXIT_PASS if found.is_ready else EXIT_NOT_READY


def diagnosis_text(found: Diagnosis) -> str:
    """One line per check; below those that are not ok, why it matters and what mends it."""
    lines = []
    for check in found.checks:
        lines.append(f"{_SIGNS[check.status]:5s}{check.name:14s} {check.found}".rstrip())
        if check.status != "ok":
            lines += [f"       {text}" for text in (check.why, check.mend) if text]
    lines += [f"fixed: {text}" for text in found.fixed]
    bad = [check.name for check in found.checks if check.status in ("fail", "unknown")]
    lines.append(f"not ready: {', '.join(bad)}" if bad else "ready to measure")
    return "\n".join(lines)
