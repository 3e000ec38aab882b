"""``labgrid://PLACE``: a board that labgrid (https://labgrid.readthedocs.io) keeps, reached over SSH.

The place is acquired while the device is open, so that nobody else in the lab gets it, and its
NetworkService says where the board is. Spoken to through labgrid's own command, ``labgrid-client``,
which need not be installed beside edgepipe; the coordinator is that of its variable LG_COORDINATOR.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import logging
import re
import shutil
import subprocess

from edgepipe.device.base import HeldDevice
from edgepipe.errors import Busy, ConnectError, DeviceError, MissingExtra, RequestError

log = logging.getLogger(__name__)

CLIENT = "labgrid-client"
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Talking to the coordinator takes a second; one that does not answer is given this long.
_TIMEOUT_S = 30.0
_RESOURCE = re.compile(r"^Acquired resource '.*' \((.*)\):\n((?:[ \t].*(?:\n|$))+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class NetworkService:
    """Where labgrid says that a board's SSH server is. A password that labgrid knows is not kept."""

    host: str
    user: str
    port: int

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user}{'@' * bool(self.user)}{host}:{self.port}"


def open_labgrid(address: str) -> HeldDevice:
    """Acquire the place of ``labgrid://PLACE`` and connect to its board; `close` releases it.

    A place that this user holds already is used, and stays theirs. Raises MissingExtra without
    labgrid-client, RequestError for an unknown place or one without a NetworkService, Busy where
    somebody else holds it, ConnectError without a coordinator, and the errors of SSH.
    """
    from edgepipe.device.ssh import open_ssh

    place = address.removeprefix("labgrid://").rstrip("/")
    if not _PLACE.fullmatch(place):
        raise RequestError(
            f"{address!r} is not the address of a labgrid place",
            hint=f"labgrid://PLACE; `{CLIENT} places` shows what there is",
            code="bad-address",
        )
    with contextlib.ExitStack() as stack:
        if _acquire(place):
            stack.callback(_release, place)
        service = parse_place(_ask(place, "show").stdout, place)
        log.info("labgrid place %s is at %s", place, service.address)
        device = open_ssh(service.address)
        device.address = f"labgrid://{place}"
        stack.callback(device.close)
        return HeldDevice(device, stack.pop_all())


def parse_place(shown: str, place: str) -> NetworkService:
    """The network service in what ``labgrid-client show`` prints of an acquired place.

    Raises RequestError where there is none, or not one alone, or one that cannot be reached from here.
    """
    found = []
    for match in _RESOURCE.finditer(shown):
        try:
            entry = ast.literal_eval(match[2].strip())
            if entry["cls"] not in ("NetworkService", "RemoteNetworkService"):
                continue
            params = entry["params"]
            extra = params.get("extra") or {}
            service = NetworkService(
                host=_text(params["address"]).split("%")[0],
                user=_text(params.get("username") or ""),
                port=int(params.get("port") or 22),
            )
            if not service.host or not 0 < service.port < 2**16:
                raise ValueError("no address")
        except (SyntaxError, ValueError, KeyError, TypeError, AttributeError) as exc:
            # its text may hold a password
            raise RequestError(
                f"labgrid place {place}: cannot read what {CLIENT} says of {match[1]} ({type(exc).__name__})",
                hint=f"{CLIENT} -p {place} show",
            ) from None
        if extra.get("proxy_required"):
            raise RequestError(
                f"labgrid place {place}: {match[1]} is only reached through {extra.get('proxy')}",
                hint="name it as ProxyJump for the board in ~/.ssh/config, and use ssh://",
            )
        found.append(service)
    if len(found) != 1:
        raise RequestError(
            f"labgrid place {place} has {len(found) or 'no'} network service{'s' if found else ''}",
            hint=f"give it one NetworkService: {CLIENT} -p {place} add-match '*/*/NetworkService'",
        )
    return found[0]


def _text(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.:%-]*", value) or value.startswith("-"):
        raise ValueError("no plain text")
    return value


def _acquire(place: str) -> bool:
    """Whether the place was acquired now; False where it is this user's already."""
    try:
        _ask(place, "acquire")
    except DeviceError as exc:
        if "You have already acquired" not in exc.message:
            raise
        log.info("labgrid place %s is acquired already; it stays so", place)
        return False
    log.info("acquired labgrid place %s", place)
    return True


def _release(place: str) -> None:
    try:
        _ask(place, "release")
    except (DeviceError, RequestError) as exc:  # must not hide the result
        log.warning("%s; give it back with: %s -p %s release", exc.message, CLIENT, place)


def _ask(place: str, verb: str) -> subprocess.CompletedProcess[str]:
    """One call of labgrid's client."""
    client = shutil.which(CLIENT)
    if client is None:
        raise MissingExtra(
            f"labgrid://{place} needs {CLIENT}, which is not installed",
            hint="pip install 'edgepipe[labgrid]', or pipx install labgrid",
        )
    doing = f"{CLIENT} -p {place} {verb}"
    try:
        done = subprocess.run(
            [client, "-p", place, verb],
            capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise ConnectError(f"`{doing}` took longer than {_TIMEOUT_S:g} s", hint="does the coordinator (LG_COORDINATOR) answer?") from exc  # fmt: skip
    if done.returncode == 0:
        return done
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    why = why.removeprefix(f"{CLIENT}: ").removeprefix("Error: ")
    if "matches nothing" in why or "matches multiple" in why:
        raise RequestError(f"labgrid: {why}", hint=f"`{CLIENT} places` shows what there is")
    if "already acquired" in why:
        raise Busy(f"labgrid: {why}", hint=f"wait for it: {CLIENT} -p {place} show")
    raise ConnectError(f"`{doing}` failed: {why}", hint="is the coordinator of LG_COORDINATOR running?", code="labgrid")  # fmt: skip
