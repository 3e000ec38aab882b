"""``edgepipe devices``: profiles there are, which of them fits, and which boards are trusted."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output
from edgepipe.errors import EXIT_FAIL, EXIT_PASS, HostKeyError, ProfileError, RequestError

if TYPE_CHECKING:
    from edgepipe.device.ssh import HostKey
    from edgepipe.profile import DeviceProfile

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List, show and choose device profiles, or accept the host key of a board.\n\n"
        "  edgepipe devices list\n"
        "  edgepipe devices show rpi5_8gb             # every fact and its source\n"
        "  edgepipe devices match 'isa=dotprod ram>=2GiB'\n"
        "  edgepipe devices match ssh://pi@raspberrypi # which profile fits this board\n"
        "  edgepipe devices schema                    # JSON Schema of a profile, for editors\n"
        "  edgepipe devices trust ssh://pi@raspberrypi\n\n"
        "A filter is terms like soc=bcm2712, all of which must hold: a key, = != < <= > >= and a\n"
        "value, which may have * for any text or list alternatives with commas. Keys: name model soc\n"
        "core isa machine os kernel libc python runtime target governor transport emulated, ram cores\n"
        "mhz page bits threads. What a profile leaves open fits no term. Exit code 1: nothing fits.\n\n"
        "`trust` shows the fingerprint of the board's key and asks; compare it with\n"
        "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the board itself."
    )
    parser.add_argument("action", choices=["list", "show", "match", "schema", "trust"], help="list profiles, show one, find those that fit, print their JSON Schema, or trust a board's host key")  # fmt: skip
    parser.add_argument("name", nargs="?", help="show: name of a profile; match: a filter or the address of a board; trust: address of a board, ssh://[user@]host[:port]")  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="trust: accept the key without asking")
    parser.add_argument("--replace", action="store_true", help="trust: accept a key that has changed, and forget the old one")  # fmt: skip
    parser.add_argument("--known-hosts", type=Path, metavar="FILE", help="trust: file to write to (default: EDGEPIPE_KNOWN_HOSTS, or what ssh would use)")  # fmt: skip


_NEEDS = {
    "show": ("the name of a profile", "rpi5_8gb"),
    "match": ("a filter or the address of a board", "'soc=bcm2712'"),
    "trust": ("the address of a board", "ssh://pi@raspberrypi"),
}


def run(args: argparse.Namespace, out: Output) -> int:
    if args.action in _NEEDS and not args.name:
        what, example = _NEEDS[args.action]
        raise RequestError(
            f"`edgepipe devices {args.action}` needs {what}",
            hint=f"edgepipe devices {args.action} {example}",
        )
    if args.action == "list":
        return _list(out)
    if args.action == "schema":
        return _schema(out)
    if args.action == "show":
        return _show(args.name, out)
    if args.action == "match":
        is_address = args.name == "local" or "://" in args.name
        return _match_board(args.name, out) if is_address else _match_filter(args.name, out)
    return _trust(args, out)


def _profiles() -> list[DeviceProfile]:
    """All there are; a file that is none is left out with a warning."""
    from edgepipe.profile import load_profile
    from edgepipe.resources import profile_paths

    found = []
    for path in profile_paths().values():
        try:
            found.append(load_profile(path))
        except ProfileError as exc:
            log.warning("left out: %s", exc.message)
    return found


def _list(out: Output) -> int:
    profiles = _profiles()
    _table(profiles, out)
    out.json([_as_dict(p) for p in profiles])
    return EXIT_PASS


def _match_filter(expression: str, out: Output) -> int:
    from edgepipe.match import matches

    found = [p for p in _profiles() if matches(p, expression)]
    if found:
        _table(found, out)
    else:
        out.text(f"no profile fits {expression!r}")
    out.json([_as_dict(p) for p in found])
    return EXIT_PASS if found else EXIT_FAIL


def _table(profiles: Sequence[DeviceProfile], out: Output) -> None:
    from edgepipe.probe import ram_text
    from edgepipe.report import Table, text_table

    rows = [
        (
            p.name,
            p.model if p.emulated is None else f"{p.model} (emulated)",
            p.soc,
            ", ".join(f"{c.count} x {c.core}" for c in p.clusters) or "any",  # clocks: devices show
            " ".join(dict.fromkeys(f for c in p.clusters for f in c.isa)) or "-",
            ram_text(p.ram_bytes) if p.ram_bytes else "any",
            p.target,
        )
        for p in profiles
    ]
    header = ("name", "model", "SoC", "cores", "ISA", "RAM", "target")
    out.text(text_table(Table("device profiles", header, tuple(rows))))


def _schema(out: Output) -> int:
    from edgepipe.profile import profile_schema, schema_text

    out.text(schema_text().rstrip())
    out.json(profile_schema())
    return EXIT_PASS


def _show(name: str, out: Output) -> int:
    """Each fact as the profile and those it extends say, where it says so, and its source."""
    from edgepipe.profile import FACTS, profile_path, resolve_profile
    from edgepipe.report import Table, text_table
    from edgepipe.resources import profile_paths

    path = profile_path(name, profile_paths())
    resolved = resolve_profile(path)
    inherited = len(resolved.chain) > 1
    rows = []
    for key in FACTS:
        said = key in resolved.data
        value = _value_text(resolved.data[key] if said else getattr(resolved.profile, key))
        source = resolved.profile.sources.get(key, "" if said else "default")
        origin = (resolved.origins.get(key, ""),) if inherited else ()
        rows.append((key, value, *origin, source))
    header = ("fact", "value", *(("said by",) if inherited else ()), "source")
    out.text("\n".join(f"# {file}" for file in resolved.chain))
    out.text(text_table(Table(name, header, tuple(rows))))
    out.json(
        {
            **_as_dict(resolved.profile),
            "path": str(path),
            "extends": [file.stem for file in resolved.chain[1:]],
            "origins": dict(resolved.origins),
        }
    )
    return EXIT_PASS


def _value_text(value: Any) -> str:
    """A value of a TOML file, or a default, on one line."""
    if value is None:
        return "-"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        separator = "; " if value and isinstance(value[0], dict) else " "
        return separator.join(map(_value_text, value)) or "-"
    return str(value) or "-"


def _match_board(address: str, out: Output) -> int:
    """Every profile with what the board departs from it in, the best first."""
    from edgepipe.device import open_device
    from edgepipe.probe import probe, rank_profiles

    device = open_device(address)
    try:
        facts = probe(device)
    finally:
        device.close()
    ranked = rank_profiles(facts, _profiles())
    fitting = [r for r in ranked if r.same_board]
    if not fitting:
        out.text(f"{address} is a {facts.model or 'board that does not say what it is'}; no profile is of such a board")  # fmt: skip
        out.text(f"write one: edgepipe probe {address} --write NAME")
    for item in fitting:
        out.text(f"{item.profile.name}: " + ("fits" if not item.differences else "differs in"))
        out.text("\n".join(f"  {d.fact}: profile {d.profile}, board {d.board}" for d in item.differences))  # fmt: skip
    out.json(
        {
            "address": address,
            "facts": dataclasses.asdict(facts),
            "profiles": [
                {
                    "name": r.profile.name,
                    "same_board": r.same_board,
                    "differences": [dataclasses.asdict(d) for d in r.differences],
                }
                for r in ranked
            ],
        }
    )
    return EXIT_PASS if fitting and not fitting[0].differences else EXIT_FAIL


def _as_dict(profile: DeviceProfile) -> dict[str, Any]:
    return dataclasses.asdict(profile)


def _trust(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.device.ssh import scan_host_key, trust_host_key

    key = scan_host_key(args.name, known_hosts=args.known_hosts)
    result = {
        "host": key.name, "key_type": key.key_type, "fingerprint": key.fingerprint,
        "known_hosts": str(key.known_hosts),
    }  # fmt: skip
    shown = f"{key.name}  {key.key_type}  {key.fingerprint}"
    if key.is_known:
        out.text(f"{shown}\nis trusted already")
        out.json({**result, "added": False})
        return 0
    out.text(shown)
    if key.known and not args.replace:
        trust_host_key(key)  # raises: the key has changed
    if not args.yes:
        _confirm(key, args.name)
    trust_host_key(key, replace=args.replace)
    out.text(f"added to {key.known_hosts}")
    out.json({**result, "added": True})
    return 0


def _confirm(key: HostKey, address: str) -> None:
    """Ask on stderr, so that stdout stays clean for --json. Anything but yes raises."""
    if not sys.stdin.isatty():
        raise RequestError(
            f"nobody to ask whether {key.fingerprint} is the key of {address}",
            hint="compare the fingerprint, then run this again with --yes",
        )
    sys.stderr.write("Is this the fingerprint that the board itself shows? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise HostKeyError(
            f"the key of {address} was not accepted",
            hint="on the board: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
            code="host-key-unknown",
        )
