"""The GNU C library for boards that have none (Android, musl), as libLiteRt.so needs it.

The loader and the libraries come from Debian packages, which ``targets/android/glibc.toml`` pins by
their sha256. Nothing on the board is replaced: the loader is started by its path and told where the
libraries lie (ld.so(8), ``--library-path``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import lzma
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepipe.emulator.debian import DEFAULT_MIRROR, find_mirror
from edgepipe.errors import MissingExtra, NotReadyError, ProfileError
from edgepipe.resources import target_dir
from edgepipe.schema import read_toml

log = logging.getLogger(__name__)

LOCK = "glibc.toml"
# keeps every package that Debian ever had, by its sha1
SNAPSHOT = "https://snapshot.debian.org/file"
_FETCH_TIMEOUT_S = 60.0
_MAX_PACKAGE_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A loader with its libraries in a folder of this host. ``key`` names them by their content."""

    folder: Path
    loader: str
    libraries: tuple[str, ...]
    version: str
    key: str


def find_bundle(machine: str) -> Bundle | None:
    """The glibc for ``machine`` (``uname -m``), fetched once into the user's cache; None where none is known.

    Raises MissingExtra where it cannot be fetched, or where what was fetched is not it.
    """
    from platformdirs import user_cache_path

    path = target_dir("android") / LOCK
    lock: dict[str, Any] = read_toml(path, error=ProfileError).get(machine, {})
    if not lock:
        return None
    names = {name: member for package in lock["packages"] for name, member in package["files"].items()}  # fmt: skip
    key = hashlib.sha256(repr(sorted((p["path"], p["sha256"], sorted(p["files"].items())) for p in lock["packages"])).encode()).hexdigest()  # fmt: skip
    loader = str(lock["loader"])
    folder = user_cache_path("edgepipe") / "glibc" / key[:16]
    found = Bundle(folder, loader, tuple(sorted(set(names) - {loader})), str(lock["version"]), key)
    if not folder.is_dir():
        _make(folder, lock["packages"])
    return found


def _make(folder: Path, packages: list[dict[str, Any]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as name:
        made = Path(name) / "made"
        made.mkdir()
        for package in packages:
            data = fetch_package(package["path"], sha256=package["sha256"], sha1=package["sha1"])
            for file_name, member in package["files"].items():
                (made / file_name).write_bytes(read_member(data, member))
                (made / file_name).chmod(0o755)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster
            made.rename(folder)


def fetch_package(path: str, *, sha256: str, sha1: str) -> bytes:
    """A Debian package (``pool/main/...``), from this machine's mirror, Debian's own, or its archive.

    Raises MissingExtra where none of them has it, naming what each of them said.
    """
    said = []
    for url in _addresses(path, sha1):
        log.info("fetching %s, once", url)
        try:
            with urllib.request.urlopen(url, timeout=_FETCH_TIMEOUT_S) as answer:
                data: bytes = answer.read(_MAX_PACKAGE_BYTES)
        except (OSError, ValueError) as exc:
            said.append(f"{url}: {exc}")
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        said.append(f"{url}: it is another file (sha256)")
    raise MissingExtra(
        f"cannot fetch a package of Debian: {'; '.join(said)}",
        hint="with a network (http_proxy is honoured), run this once more",
        code="no-glibc-bundle",
    )


def _addresses(path: str, sha1: str) -> Iterator[str]:
    with contextlib.suppress(NotReadyError):
        if shutil.which("apt-get") and (mirror := find_mirror()) != DEFAULT_MIRROR:
            yield f"{mirror}/{path}"
    yield f"{DEFAULT_MIRROR}/{path}"
    yield f"{SNAPSHOT}/{sha1}"


def read_member(package: bytes, member: str) -> bytes:
    """One file of a ``.deb``: an ar archive (deb(5)) whose ``data.tar.*`` holds the files.

    Raises MissingExtra where it is none, or has no such regular file.
    """
    try:
        if package[:8] != b"!<arch>\n":
            raise ValueError("it is no ar archive")
        at = 8
        while at < len(package):
            name, size = package[at : at + 16].rstrip(b" /"), int(package[at + 48 : at + 58])
            if name.startswith(b"data.tar"):
                content = io.BytesIO(package[at + 60 : at + 60 + size])
                with tarfile.open(fileobj=content) as archive:
                    stream = archive.extractfile(f"./{member}")
                    if stream is None:
                        raise ValueError(f"{member} is no file")
                    return stream.read()
            at += 60 + size + size % 2  # members begin at even offsets
        raise ValueError("it has no data.tar")
    except (ValueError, KeyError, EOFError, OSError, lzma.LZMAError, tarfile.TarError) as exc:
        raise MissingExtra(
            f"a package of Debian holds no {member}: {exc}", code="no-glibc-bundle"
        ) from exc
