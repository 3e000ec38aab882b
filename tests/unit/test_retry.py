"""`RetryingDevice`: which failures are tried again, and for how long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgepipe.device import retry
from edgepipe.device.base import Completed
from edgepipe.device.retry import RetryingDevice
from edgepipe.errors import (
    AuthError,
    CommandTimeout,
    ConnectError,
    DeviceError,
    HostKeyError,
    TransferError,
)


class Flaky:
    """Fails with each of these errors first; then every call works."""

    address = "ssh://board"

    def __init__(self, *errors: DeviceError) -> None:
        self.errors = list(errors)
        self.calls = 0

    def _call(self) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        self._call()
        return Completed(0, b"done", b"")

    def push(self, local: Path, remote: str) -> bool:
        self._call()
        return True

    def pull(self, remote: str, local: Path) -> None:
        self._call()

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only waiting moves on; the waits that were made."""
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


LOST = ConnectError("lost", code="connection-lost")


@pytest.mark.parametrize(
    "error",
    [LOST, ConnectError("refused"), TransferError("push failed", code="connection-lost")],
)
def test_a_call_that_a_broken_link_has_cost_is_made_again(error: DeviceError) -> None:
    for call in ("run", "push", "pull"):
        device = RetryingDevice(Flaky(error, error))
        if call == "run":
            assert device.run(["true"], timeout_s=1).stdout == b"done"
        elif call == "push":
            assert device.push(Path("a"), "b")
        else:
            device.pull("a", Path("b"))
        assert device.lost_links == 2


@pytest.mark.parametrize(
    "error",
    [
        AuthError("refused"),
        HostKeyError("changed"),
        ConnectError("no sftp", code="no-sftp"),
        ConnectError("no such host", code="unknown-host"),
        TransferError("disk full", code="disk-full"),
        TransferError("no permission"),
        CommandTimeout("too long"),
    ],
)
def test_what_another_try_would_not_mend_is_raised_at_once(error: DeviceError) -> None:
    flaky = Flaky(error)
    with pytest.raises(type(error)):
        RetryingDevice(flaky).run(["true"], timeout_s=1)
    assert flaky.calls == 1


def test_waiting_doubles_and_ends_when_patience_does(waits: list[float]) -> None:
    flaky = Flaky(*[LOST] * 100)
    with pytest.raises(ConnectError):
        RetryingDevice(flaky, patience_s=30).run(["true"], timeout_s=1)
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 8.0, 8.0])
    assert sum(waits) <= 30


def test_nothing_is_tried_again_past_the_deadline(waits: list[float]) -> None:
    with pytest.raises(ConnectError):
        RetryingDevice(Flaky(*[LOST] * 100), deadline_s=1.5).run(["true"], timeout_s=1)
    assert sum(waits) <= 1.5


def test_patience_begins_anew_with_every_call(waits: list[float]) -> None:
    device = RetryingDevice(Flaky(*[LOST] * 4), patience_s=5)
    device.run(["true"], timeout_s=1)
    time.sleep(100)
    device.run(["true"], timeout_s=1)
    assert retry.PATIENCE_S > 60  # a Raspberry Pi takes up to a minute to be back after a reboot
