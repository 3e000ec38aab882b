"""What runs on a board: the files of ``targets/<platform>/``, pushed into a folder named by their content."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from edgepipe.artifact import hash_path
from edgepipe.device.base import Device
from edgepipe.errors import ProfileError
from edgepipe.resources import target_dir
from edgepipe.schema import read_toml

_CHECK_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Payload:
    """A target's files on a board. ``entry`` and ``probe`` are absolute paths there."""

    folder: str
    entry: str
    probe: str
    sha256: str


def payload_files(target: str) -> tuple[str, str, tuple[str, ...]]:
    """(entry, probe, all files) of a target, names in its folder. Raises ProfileError."""
    folder = target_dir(target)
    path = folder / "target.toml"
    data = read_toml(path, error=ProfileError)
    names = data.get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProfileError(f"{path}: files is {names!r}", hint='write files = ["agent.py", ...]')
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ProfileError(f"{path}: no such files: {', '.join(missing)}")
    for key in ("entry", "probe"):
        if data.get(key) not in names:
            raise ProfileError(
                f"{path}: {key} is {data.get(key)!r}, which is not among its files",
                hint=f'write {key} = "name.py" and list it in files',
            )
    return str(data["entry"]), str(data["probe"]), tuple(names)


def runner_target(target: str) -> str | None:
    """The target whose C runner measures in place of an agent, or None where there is an agent."""
    name = read_toml(target_dir(target) / "target.toml", error=ProfileError).get("runner")
    return None if name is None else str(name)


def push_payload(device: Device, target: str, work_dir: str) -> Payload:
    """Push what is missing of a target's files below ``work_dir`` (absolute) on the board."""
    entry, probe, names = payload_files(target)
    folder = target_dir(target)
    # named by content, as all we push: another version of edgepipe has its own
    digests = {name: hash_path(folder / name) for name in names}
    content = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    remote = f"{work_dir}/agents/{sha256}"
    push_missing(device, {name: folder / name for name in names}, remote)
    return Payload(remote, f"{remote}/{entry}", f"{remote}/{probe}", sha256)


def push_missing(device: Device, files: Mapping[str, Path], remote: str) -> None:
    """Push those of ``files`` (by name) that the board's folder ``remote`` does not hold as they are."""
    # one question instead of two for each file; where it cannot be answered all are pushed
    done = device.run(["sh", "-c", 'cd -- "$0" && sha256sum -- "$@"', remote, *files], timeout_s=_CHECK_TIMEOUT_S)  # fmt: skip
    there = set(done.stdout.decode("utf-8", "replace").splitlines())
    for name, path in files.items():
        if f"{hash_path(path)}  {name}" not in there:
            device.push(path, f"{remote}/{name}")
