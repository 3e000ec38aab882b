"""Which live device stands for which profile: from the command line or the user's own file.

``edgepipe.local.toml`` in the working folder, never committed::

    [devices]
    rpi4b_4gb = "ssh://pi@raspberrypi.local"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from edgepipe.errors import RequestError
from edgepipe.profile import DeviceProfile, find_profile
from edgepipe.resources import profile_paths
from edgepipe.schema import read_toml

LOCAL_FILE = Path("edgepipe.local.toml")


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to measure on: where it is, and what it is."""

    address: str
    profile: DeviceProfile


def resolve_targets(
    profiles: Sequence[str], *, address: str | None, profile: str | None
) -> list[Target]:
    """Addresses for the profiles a recipe names, or the one device the command line names.

    ``localhost`` and virtual boards need no address, and neither ``local`` nor a null device nor
    ``virt://NAME`` a profile. Raises RequestError where a profile has none.
    """
    for option, value in (("--device", address), ("--profile", profile)):
        if value == "":  # "$BOARD" of a script must not become this machine
            raise RequestError(f"{option} is empty", hint="is the variable it comes from set?")
    paths = profile_paths()
    if profile:
        names = [profile]
    elif address and len(profiles) != 1:
        # neither this machine nor a simulated board is of a kind that a profile describes
        default = "localhost" if address == "local" or address.startswith("null://") else ""
        if address.startswith("virt://"):
            default = address.removeprefix("virt://")
        if not default:
            raise RequestError(
                f"which profile describes {address}?",
                hint=f"add --profile NAME ({', '.join(profiles) or '`edgepipe devices list` shows them'})",
            )
        names = [default]
    else:
        names = list(profiles)
    if address:
        return [Target(address, find_profile(name, paths)) for name in names]
    known = _local_addresses()
    targets = []
    for name in names:
        facts = find_profile(name, paths)
        default = f"virt://{name}" if facts.emulated else "local" if name == "localhost" else ""
        found = known.get(name, default)
        if not found:
            examples = _example_addresses(facts)
            raise RequestError(
                f"no address for device profile {name!r}",
                hint=f"add --device {' or '.join(examples)}, or write it into {LOCAL_FILE}:\n"
                f'  [devices]\n  {name} = "{examples[0]}"',
            )
        targets.append(Target(found, facts))
    return targets


def _example_addresses(profile: DeviceProfile) -> list[str]:
    """How addresses of such boards look, the usual way first."""
    port = "" if profile.ssh_port == 22 else f":{profile.ssh_port}"
    forms = {"ssh": f"ssh://user@host{port}", "adb": "adb://SERIAL"}
    return [forms[transport] for transport in profile.transports]


def _local_addresses() -> dict[str, str]:
    if not LOCAL_FILE.is_file():
        return {}
    tables = read_toml(LOCAL_FILE, error=RequestError)
    unknown = [key for key in tables if key != "devices"]
    if unknown:
        raise RequestError(
            f"{LOCAL_FILE}: unknown table: {', '.join(unknown)}",
            hint="addresses are written under [devices]",
        )
    data = tables.get("devices", {})
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise RequestError(f'{LOCAL_FILE}: [devices] should map profile names to addresses like "ssh://user@host"')  # fmt: skip
    return data
