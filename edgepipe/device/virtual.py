"""``virt://NAME``: a virtual board, reached over SSH like any other."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgepipe.device.base import Device, HeldDevice
from edgepipe.errors import RequestError

if TYPE_CHECKING:
    from edgepipe.device.ssh import SshDevice
    from edgepipe.emulator.machine import Running

_CONNECT_TIMEOUT_S = 60.0  # key exchange is emulated too


def open_virtual(address: str) -> VirtualDevice:
    """Open the virtual board ``virt://NAME``.

    The board that ``edgepipe emulate up`` started is used; where there is none, one is started from
    its snapshot, for as long as the device is open. Raises RequestError for an unknown board,
    MissingExtra without QEMU, NotReadyError (``not-built``) where it was not built.
    """
    from edgepipe.emulator import machine
    from edgepipe.emulator.build import find_emulation

    name = address.removeprefix("virt://").rstrip("/")
    if not name or "/" in name:
        raise RequestError(
            f"{address!r} is not the address of a virtual board",
            hint="virt://virt-pi-4; `edgepipe emulate list` shows what there is",
            code="bad-address",
        )
    find_emulation(name)
    with contextlib.ExitStack() as stack:
        running = machine.find_running(name) or stack.enter_context(machine.private_board(name))
        device = connect(running)
        device.address = f"virt://{name}"
        stack.callback(device.close)
        return VirtualDevice(device, running, stack.pop_all())


def connect(running: Running) -> SshDevice:
    """Log in to a running board, whatever the user's SSH configuration says of this machine."""
    from edgepipe.device.ssh import open_ssh

    return open_ssh(
        running.address,
        identity_file=running.identity_file,
        known_hosts=running.known_hosts,
        connect_timeout_s=_CONNECT_TIMEOUT_S,
        configured=False,
    )


class VirtualDevice(HeldDevice):
    """``running`` is the board behind it."""

    def __init__(self, device: Device, running: Running, resources: contextlib.ExitStack) -> None:
        super().__init__(device, resources)
        self.running = running
