"""A device whose link may break: the same four calls, tried again until it is back."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from edgepipe.device.base import Completed, Device
from edgepipe.errors import ConnectError, DeviceError, TransferError

log = logging.getLogger(__name__)
T = TypeVar("T")

# A Raspberry Pi is back on the network within a minute of a reboot; this leaves as much again.
PATIENCE_S = 120.0
# Waiting doubles from the first to the last.
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 8.0


class RetryingDevice:
    """Calls of ``device`` that fail because the link broke are made again.

    Only for work that may be done twice, as every step of a measurement is: a broken link does not
    tell whether the board got the call. The last error is raised after ``patience_s`` without a
    call that got through, or past ``deadline_s`` (monotonic clock). A refused key, a changed host
    key, a full disk or a command that takes too long are raised at once.

    While ``stop`` is set every call raises KeyboardInterrupt: Python raises it in the main thread
    only, and a board may be measured in another. What must be done all the same first sets ``stop``
    to an event that nobody sets.
    """

    def __init__(
        self,
        device: Device,
        *,
        patience_s: float = PATIENCE_S,
        deadline_s: float = math.inf,
        stop: threading.Event | None = None,
    ) -> None:
        self.address = device.address
        self.stop = stop or threading.Event()
        self.patience_s, self.deadline_s = patience_s, deadline_s
        self.lost_links = 0
        self._device = device

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """See `Device.run`."""
        return self._insist(lambda: self._device.run(argv, timeout_s=timeout_s))

    def push(self, local: Path, remote: str) -> bool:
        """See `Device.push`."""
        return self._insist(lambda: self._device.push(local, remote))

    def pull(self, remote: str, local: Path) -> None:
        """See `Device.pull`."""
        self._insist(lambda: self._device.pull(remote, local))

    def close(self) -> None:
        self._device.close()

    def _insist(self, call: Callable[[], T]) -> T:
        give_up_s, wait_s = math.inf, FIRST_WAIT_S
        while True:
            if self.stop.is_set():
                raise KeyboardInterrupt
            try:
                return call()
            except DeviceError as exc:
                now_s = time.monotonic()
                give_up_s = min(give_up_s, now_s + self.patience_s, self.deadline_s)
                if not is_broken_link(exc) or now_s + wait_s > give_up_s:
                    raise
                self.lost_links += 1
                log.warning("%s: trying again in %.1f s", exc.message, wait_s)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def is_broken_link(error: DeviceError) -> bool:
    """Whether the link failed, so that the same call may well succeed on a new one."""
    if isinstance(error, ConnectError):
        return error.code not in ("unknown-host", "no-sftp")
    return isinstance(error, TransferError) and error.code == "connection-lost"
