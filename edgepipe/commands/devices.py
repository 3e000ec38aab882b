"""``edgepipe devices``: profiles there are, and which boards are trusted."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output
from edgepipe.errors import HostKeyError, RequestError

if TYPE_CHECKING:
    from edgepipe.device.ssh import HostKey
    from edgepipe.profile import DeviceProfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List and show device profiles, or accept the host key of a board.\n\n"
        "  edgepipe devices list\n"
        "  edgepipe devices show rpi5_8gb\n"
        "  edgepipe devices trust ssh://pi@raspberrypi\n\n"
        "`trust` shows the fingerprint of the board's key and asks; compare it with\n"
        "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the board itself."
    )
    parser.add_argument("action", choices=["list", "show", "trust"], help="list profiles, show one, or trust a board's host key")  # fmt: skip
    parser.add_argument("name", nargs="?", help="show: name of a profile; trust: address of a board, ssh://[user@]host[:port]")  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="trust: accept the key without asking")
    parser.add_argument("--replace", action="store_true", help="trust: accept a key that has changed, and forget the old one")  # fmt: skip
    parser.add_argument("--known-hosts", type=Path, metavar="FILE", help="trust: file to write to (default: EDGEPIPE_KNOWN_HOSTS, or what ssh would use)")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    if args.action == "list":
        return _list(out)
    if not args.name:
        what = "the name of a profile" if args.action == "show" else "the address of a board"
        example = "rpi5_8gb" if args.action == "show" else "ssh://pi@raspberrypi"
        raise RequestError(
            f"`edgepipe devices {args.action}` needs {what}",
            hint=f"edgepipe devices {args.action} {example}",
        )
    return _show(args.name, out) if args.action == "show" else _trust(args, out)


def _list(out: Output) -> int:
    from edgepipe.probe import clusters_text, ram_text
    from edgepipe.profile import load_profile
    from edgepipe.report import Table, text_table
    from edgepipe.resources import profile_paths

    paths = profile_paths()
    profiles = [load_profile(path) for path in paths.values()]
    rows = [
        (
            p.name,
            p.model,
            clusters_text(p.clusters) if p.clusters else "any",
            ram_text(p.ram_bytes) if p.ram_bytes else "any",
            p.machine,
            f"{p.runtime} {p.runtime_version}",
        )
        for p in profiles
    ]
    header = ("name", "model", "cores", "RAM", "machine", "runtime")
    out.text(text_table(Table("device profiles", header, tuple(rows))))
    out.json([_as_dict(p, paths[p.name]) for p in profiles])
    return 0


def _show(name: str, out: Output) -> int:
    from edgepipe.profile import find_profile
    from edgepipe.resources import profile_paths

    paths = profile_paths()
    profile = find_profile(name, paths)
    out.text(f"# {paths[name]}\n{paths[name].read_text(encoding='utf-8').rstrip()}")
    out.json(_as_dict(profile, paths[name]))
    return 0


def _as_dict(profile: DeviceProfile, path: Path) -> dict[str, Any]:
    return {**dataclasses.asdict(profile), "path": str(path)}


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
