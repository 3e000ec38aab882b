"""Which boards there are: from the command line, or from a *lab*, the user's own inventory.

``edgepipe.local.toml`` in the working folder, or the file of ``--lab``; never committed::

    [devices]
    rpi4b_4gb = "ssh://pi@raspberrypi.local"     # short: the one board of that profile

    [devices.shelf-1]
    address = "ssh://pi@10.0.0.11"
    profile = "rpi5_8gb"
    tags = ["upper"]
    power = "uhubctl -l 1-1 -p 2 -a cycle"       # shown where the board does not answer
"""

from __future__ import annotations

import collections
import dataclasses
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepipe.device import check_address
from edgepipe.errors import RequestError
from edgepipe.match import matches, parse_filter
from edgepipe.profile import DeviceProfile, find_profile
from edgepipe.resources import profile_paths
from edgepipe.schema import build, read_toml, record

LOCAL_FILE = Path("edgepipe.local.toml")
# What a board is called is part of a folder's name; "model" is the folder of facts about the file.
_NAME = re.compile(r"(?!(model|local)$)[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@record
class LabBoard:
    """One board of a lab. ``power`` is a command that a person may type, never run by edgepipe."""

    address: str
    profile: str
    tags: tuple[str, ...] = ()
    power: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """A board to measure on: where it is, what it is, and its name in records (default: its profile's)."""

    address: str
    profile: DeviceProfile
    name: str = ""
    power: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.profile.name)


def resolve_targets(
    profiles: Sequence[str],
    *,
    devices: Sequence[str] = (),
    profile: str | None = None,
    lab: Path | None = None,
    match: str | None = None,
) -> list[Target]:
    """The boards to measure on, each once.

    ``devices`` are addresses or names of the lab's boards; ``match`` chooses from the lab
    (`edgepipe.match`, and by ``board`` and ``tag``). Without either every board of the lab whose
    profile is one of ``profiles`` (those of a recipe; none: all of an explicit ``lab``). ``profile``
    takes the place of ``profiles``, and describes addresses that the lab does not hold.

    ``localhost`` and virtual boards need no address, and neither ``local`` nor a null device nor
    ``virt://NAME`` a profile. Raises RequestError where a profile has no board, nothing matches, or
    two addresses are of one board.
    """
    options = [*(("--device", d) for d in devices), ("--profile", profile), ("--match", match)]
    for option, value in options:
        if (
            value is not None and not value.strip()
        ):  # "$BOARD" of a script must not become this machine
            raise RequestError(f"{option} is empty", hint="is the variable it comes from set?")
    if devices and match is not None:
        raise RequestError("--match chooses from the lab, --device names boards", hint="give one of them")  # fmt: skip
    file = lab or LOCAL_FILE
    boards = load_lab(file) if lab or LOCAL_FILE.is_file() else {}
    wanted = [profile] if profile else list(profiles)
    if devices:
        targets = [
            _named(device, boards, wanted, explicit=profile is not None) for device in devices
        ]
    elif match is not None:
        targets = _matching(boards, match, profile, file)
    elif lab and not wanted:
        targets = [_target(name, board) for name, board in boards.items()]
    else:
        targets = [target for name in wanted for target in _of_profile(name, boards, file)]
    _refuse_same_board([(target.name, target.address) for target in targets], "two devices are")
    return _with_names_of_their_own(targets)


def load_lab(path: Path) -> dict[str, LabBoard]:
    """The boards of a lab's file by name. Raises RequestError naming every wrong key."""
    tables = read_toml(path, error=RequestError)
    unknown = [key for key in tables if key != "devices"]
    if unknown:
        raise RequestError(
            f"{path}: unknown table: {', '.join(unknown)}",
            hint="boards are written under [devices]",
        )
    entries = tables.get("devices", {})
    if not isinstance(entries, dict) or not entries:
        raise RequestError(
            f"{path}: no board under [devices]",
            hint='write one: rpi4b_4gb = "ssh://user@host", or a table [devices.NAME] with address and profile',
        )
    boards = {}
    for name, entry in entries.items():
        where = f"{path}: [devices.{name}]"
        if isinstance(entry, str):
            entry = {"address": entry, "profile": name}
        elif not _NAME.fullmatch(name):
            raise RequestError(f"{where}: {name!r} is no name for a board", hint="use A-Z a-z 0-9 . _ -")  # fmt: skip
        boards[name] = build(LabBoard, entry, where=where, error=RequestError)
        check_address(boards[name].address, where=where)
    _refuse_same_board(
        [(name, b.address) for name, b in boards.items()], f"{path}: two entries are"
    )
    return boards


def _target(name: str, board: LabBoard) -> Target:
    return Target(board.address, find_profile(board.profile, profile_paths()), name, board.power)


def _named(
    device: str, boards: Mapping[str, LabBoard], profiles: Sequence[str], *, explicit: bool
) -> Target:
    """The board that ``--device`` means: one of the lab by name or address, else an address."""
    if device in boards and "://" not in device:
        return _target(device, boards[device])
    names = (
        f"boards of the lab: {', '.join(boards)}"
        if boards
        else f"boards get names in {LOCAL_FILE}, which is not in this folder, or the file of --lab"
    )
    check_address(device, known=tuple(boards), hint=names)
    same = [name for name, board in boards.items() if place(board.address) == place(device)]
    if same and not explicit:
        return _target(same[0], boards[same[0]])
    if len(profiles) == 1:
        name = profiles[0]
    elif device.startswith("virt://"):
        name = device.removeprefix("virt://")
    elif device == "local" or device.startswith("null://"):
        # neither this machine nor a simulated board is of a kind that a profile describes
        name = "localhost"
    else:
        raise RequestError(
            f"which profile describes {device}?",
            hint=f"add --profile NAME ({', '.join(profiles) or '`edgepipe devices list` shows them'})",
        )
    return Target(device, find_profile(name, profile_paths()))


def _matching(
    boards: Mapping[str, LabBoard], expression: str, profile: str | None, file: Path
) -> list[Target]:
    parse_filter(expression, more=("board", "tag"))  # before anything is said about the lab
    if not boards:
        raise RequestError(
            f"--match chooses from a lab, but there is no {file}",
            hint="name the lab's file with --lab",
        )
    found = [_target(name, b) for name, b in boards.items() if profile in (None, b.profile)]
    chosen = [
        target
        for target in found
        if matches(
            target.profile,
            expression,
            more={"board": (target.name,), "tag": boards[target.name].tags or ("none",)},
        )
    ]
    if not chosen:
        raise RequestError(
            f"no board of {file} matches {expression!r}",
            hint=f"it holds {', '.join(f'{name} ({b.profile})' for name, b in boards.items())}",
            code="no-match",
        )
    return chosen


def _of_profile(name: str, boards: Mapping[str, LabBoard], file: Path) -> list[Target]:
    """All boards of a profile; ``localhost`` and virtual ones need not be in the lab."""
    found = [_target(n, board) for n, board in boards.items() if board.profile == name]
    if found:
        return found
    facts = find_profile(name, profile_paths())
    if facts.emulated:
        return [Target(f"virt://{name}", facts)]
    if name == "localhost":
        return [Target("local", facts)]
    examples = _example_addresses(facts)
    raise RequestError(
        f"no address for device profile {name!r}",
        hint=f"add --device {' or '.join(examples)}, or write it into {file}:\n"
        f'  [devices]\n  {name} = "{examples[0]}"',
    )


def _example_addresses(profile: DeviceProfile) -> list[str]:
    """How addresses of such boards look, the usual way first."""
    port = "" if profile.ssh_port == 22 else f":{profile.ssh_port}"
    forms = {"ssh": f"ssh://user@host{port}", "adb": "adb://SERIAL"}
    return [forms[transport] for transport in profile.transports]


def place(address: str) -> str:
    """What two addresses of one board have in common: of ``ssh://pi@host`` it is ``ssh://host:22``."""
    address = address.rstrip("/")
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port or 22
    except ValueError:  # no address, which whoever opens it says
        return address
    if parts.scheme != "ssh" or not host:
        return address
    return f"ssh://[{host}]:{port}" if ":" in host else f"ssh://{host}:{port}"


def _refuse_same_board(boards: Sequence[tuple[str, str]], what: str) -> None:
    """Two jobs on one board would spoil each other's figures."""
    seen: dict[str, str] = {}
    for name, address in boards:
        shown = f"{address} ({name})"
        if place(address) in seen:
            raise RequestError(
                f"{what} one board: {seen[place(address)]} and {shown}",
                hint="name every board once",
                code="same-board",
            )
        seen[place(address)] = shown


def _with_names_of_their_own(targets: Sequence[Target]) -> list[Target]:
    """Several boards called after one profile get their address added: ``rpi4b_4gb@10.0.0.5``."""
    often = collections.Counter(target.name for target in targets)
    return [
        dataclasses.replace(t, name=f"{t.name}@{t.address.partition('://')[2].rpartition('@')[2]}")
        if often[t.name] > 1 and t.name == t.profile.name
        else t
        for t in targets
    ]
