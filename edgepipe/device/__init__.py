"""Live boards behind one protocol: `open_device` turns an address into a `Device`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from edgepipe.device.base import Completed, Device
from edgepipe.errors import RequestError
from edgepipe.schema import near_miss

__all__ = ["SCHEMES", "Completed", "Device", "check_address", "open_device"]

# scheme -> (module, function); the function takes the whole address and the options of its scheme
SCHEMES: dict[str, tuple[str, str]] = {
    "adb": ("edgepipe.device.adb", "open_adb"),
    "labgrid": ("edgepipe.device.labgrid", "open_labgrid"),
    "local": ("edgepipe.device.local", "open_local"),
    "null": ("edgepipe.device.null", "open_null"),
    "ssh": ("edgepipe.device.ssh", "open_ssh"),
    "virt": ("edgepipe.device.virtual", "open_virtual"),
}

ADDRESS_HINT = (
    "write `local` or `ssh://[user@]host[:port]`, `adb://SERIAL` for a phone, `virt://virt-pi-4` for a "
    "virtual board, `labgrid://PLACE`, or `null://quiet` for a simulated one"
)


def open_device(address: str, **options: Any) -> Device:
    """Open the board at ``address``: ``local``, ``ssh://[user@]host[:port]``, ``adb://serial``,
    ``virt://board``, ``labgrid://place`` or ``null://scenario``.

    ``options`` are the keyword arguments of the scheme's own function (`edgepipe.device.ssh.open_ssh`).
    Raises RequestError for an address of no known scheme, and the ConnectError, HostKeyError or
    AuthError of the transport.
    """
    check_address(address)
    module, function = SCHEMES[address.split("://", 1)[0]]
    opener: Callable[..., Device] = getattr(importlib.import_module(module), function)
    return opener(address, **options)


def check_address(
    address: str, *, where: str = "", known: Sequence[str] = (), hint: str = ""
) -> None:
    """Refuse what is of no known scheme; nothing is opened.

    ``where`` is the file and key that say so, ``known`` are names that would have been legal, too;
    ``hint`` tells of them.
    """
    scheme = address.split("://", 1)[0]
    if scheme in SCHEMES and ("://" in address) != (scheme == "local"):
        return
    legal = [name if name == "local" else f"{name}://" for name in SCHEMES]
    near = near_miss(scheme, list(SCHEMES)) or near_miss(address, [*legal, *known])
    raise RequestError(
        f"{where}{': ' if where else ''}{address!r} is not the address of a device{near}",
        hint="; ".join(filter(None, (ADDRESS_HINT, hint))),
        code="bad-address",
    )
