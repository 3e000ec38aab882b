"""Find libLiteRt.so for a board, on this host: it is pushed, so that the board needs no packages.

The library is the same file in the cp310 to cp314 wheels of ai-edge-litert and uses no Python
symbols; it is taken from the installed package where that is for the board's machine, else from a
wheel for it, fetched once into the user's cache. Either way its sha256 is compared with a pin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from edgepipe.artifact import hash_path
from edgepipe.errors import MissingExtra

log = logging.getLogger(__name__)

PACKAGE = "ai-edge-litert"
MEMBER = "ai_edge_litert/libLiteRt.so"
DEFAULT_VERSION = "2.3.0"
_FETCH_TIMEOUT_S = 900.0


@dataclasses.dataclass(frozen=True)
class Pin:
    """One known build. ``glibc`` and ``glibcxx`` (libstdc++) are the newest symbol versions it needs
    (``readelf -V``), which the wheel's platform tag understates for aarch64. A libstdc++ that has
    the GLIBCXX version has the older CXXABI and GCC ones, too. ``max_page_bytes`` is the alignment of
    its segments: a kernel with larger pages cannot load it."""

    sha256: str
    size_bytes: int
    glibc: str
    glibcxx: str
    max_page_bytes: int


# (version, machine) -> build, computed from the wheels on PyPI
PINS: dict[tuple[str, str], Pin] = {
    ("2.3.0", "x86_64"): Pin(
        "eec47eb35e2924b3166015887e652a58edc9af823ae38e02bf83bef2548300bb",
        8039424,
        "2.27",
        "3.4.22",
        4096,
    ),
    ("2.3.0", "aarch64"): Pin(
        "b57687dc234d2b8b0598aef5a9c961ed24263df8f8b3f56adbee1cff618e544b",
        5991672,
        "2.34",
        "3.4.30",
        65536,
    ),
}


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A package for boards that LiteRT is not made for; it needs numpy there. ``tag`` is the Python."""

    requirement: str
    platform: str
    tag: str
    sha256: str


# (runtime of a profile, version, machine, Python) -> wheel on PyPI
WHEELS: dict[tuple[str, str, str, tuple[int, ...]], Wheel] = {
    ("tflite-runtime", "2.14.0", "armv7l", (3, 11)): Wheel(
        "tflite-runtime==2.14.0", "manylinux_2_34_armv7l", "cp311",
        "c4e66a74165b18089c86788400af19fa551768ac782d231a9beae2f6434f7949",
    ),
    ("tflite-runtime", "2.14.0", "armv7l", (3, 9)): Wheel(
        "tflite-runtime==2.14.0", "manylinux_2_34_armv7l", "cp39",
        "eca7672adca32727bbf5c0f1caf398fc17bbe222f2a684c7a2caea6fc6767203",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RuntimeLibrary:
    """A libLiteRt.so on this host that is known to be the one it should be."""

    path: Path
    version: str
    sha256: str
    glibc: str
    glibcxx: str
    max_page_bytes: int


def has_runtime_library(machine: str, version: str) -> bool:
    """Whether LiteRT of this version exists as a library for this machine (``uname -m``)."""
    return (version, machine) in PINS


def runtime_library(machine: str, version: str = DEFAULT_VERSION) -> RuntimeLibrary:
    """libLiteRt.so of LiteRT ``version`` for ``machine`` (``x86_64``, ``aarch64``).

    Raises MissingExtra where there is no such build, or where it is neither installed nor cached
    and cannot be fetched (no network, no pip and no uv), or where what was fetched is not it.
    """
    pin = PINS.get((version, machine))
    if pin is None:
        known = ", ".join(f"{v} for {m}" for v, m in sorted(PINS))
        raise MissingExtra(
            f"no libLiteRt.so is known for LiteRT {version} on {machine}",
            hint=f"known: {known}; other boards measure with the runtime installed on them "
            "(backend = litert-interpreter or tflite-runtime-interpreter)",
            code="no-runtime-library",
        )
    found = RuntimeLibrary(
        cache_path(pin), version, pin.sha256, pin.glibc, pin.glibcxx, pin.max_page_bytes
    )
    installed = _installed(version)
    if installed is not None and _is(installed, pin):
        return dataclasses.replace(found, path=installed)
    if _is(found.path, pin):
        return found
    _fetch(machine, version, pin, found.path)
    return found


def cache_path(pin: Pin) -> Path:
    """Where a fetched library is kept: ``<user cache>/runtimes/<sha256>/libLiteRt.so``."""
    from platformdirs import user_cache_path

    return user_cache_path("edgepipe") / "runtimes" / pin.sha256 / "libLiteRt.so"


def runtime_package(wheel: Wheel) -> Path:
    """The folder with the unpacked wheel, fetched once into the user's cache.

    Raises MissingExtra where it cannot be fetched, or where what was fetched is not it.
    """
    from platformdirs import user_cache_path

    kept = user_cache_path("edgepipe") / "runtimes" / f"{wheel.sha256}-{wheel.tag}"
    if kept.is_dir():
        return kept
    log.info("fetching %s for %s from PyPI, once", wheel.requirement, wheel.platform)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="fetch-") as name:
        folder = Path(name)
        argv = [
            *_pip(), "download", wheel.requirement, "--no-deps", "--no-input", "--disable-pip-version-check",
            "--only-binary=:all:", f"--platform={wheel.platform}", "--implementation=cp",
            f"--python-version={wheel.tag[2:]}", f"--abi={wheel.tag}", f"--dest={folder}",
        ]  # fmt: skip
        hint = "with a network, run this once more; or install it on the board"
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise MissingExtra(f"cannot fetch {wheel.requirement}: {exc}", hint=hint) from exc
        found = list(folder.glob("*.whl"))
        if done.returncode or len(found) != 1:
            tail = " ".join((done.stderr or done.stdout).strip().splitlines()[-2:])
            raise MissingExtra(f"cannot fetch {wheel.requirement}: {tail}", hint=hint)
        if hash_path(found[0]) != wheel.sha256:
            raise MissingExtra(
                f"{found[0].name} is not the wheel edgepipe was tested with (sha256 {wheel.sha256})",
                hint="do not use it; check the package index this machine uses",
                code="runtime-library-altered",
            )
        unpacked = folder / "unpacked"
        with zipfile.ZipFile(found[0]) as archive:
            archive.extractall(unpacked)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster
            unpacked.rename(kept)
    return kept


def _pip() -> list[str]:
    import importlib.util

    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    raise MissingExtra("this Python has no pip to fetch packages with", hint="python -m ensurepip")


def _is(path: Path, pin: Pin) -> bool:
    return (
        path.is_file() and path.stat().st_size == pin.size_bytes and hash_path(path) == pin.sha256
    )


def _installed(version: str) -> Path | None:
    """The library of the installed package, found without importing it."""
    import importlib.metadata

    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(MEMBER))) if distribution.version == version else None


def _fetch(machine: str, version: str, pin: Pin, target: Path) -> None:
    """Download the wheel for ``machine``, take the library out of it and keep it as ``target``."""
    log.info("fetching LiteRT %s for %s from PyPI, once", version, machine)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as name:
        folder = Path(name)
        argv = _download_command(machine, version, folder)
        wheel = f"{PACKAGE}=={version} for {machine}"
        hint = (
            f"with a network, run `edgepipe bench` once more; without, put libLiteRt.so from the "
            f"{machine} wheel of {PACKAGE} {version} at {target}"
        )
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise MissingExtra(f"cannot fetch {wheel}: {exc}", hint=hint) from exc
        if done.returncode:
            tail = " ".join((done.stderr or done.stdout).strip().splitlines()[-2:])
            raise MissingExtra(f"cannot fetch {wheel}: {tail}", hint=hint)
        library = folder / MEMBER
        for path in folder.glob("*.whl"):
            try:
                with zipfile.ZipFile(path) as archive:
                    archive.extract(MEMBER, folder)
            except (zipfile.BadZipFile, KeyError) as exc:
                raise MissingExtra(f"{path.name} holds no {MEMBER}: {exc}", hint=hint) from exc
        if not _is(library, pin):
            raise MissingExtra(
                f"the library in {wheel} is not the one edgepipe was tested with (sha256 {pin.sha256})",
                hint="do not use it; check the package index this machine uses",
                code="runtime-library-altered",
            )
        library.replace(target)


def _download_command(machine: str, version: str, folder: Path) -> list[str]:
    """pip where this Python has it, else uv. Raises MissingExtra where there is neither."""
    import importlib.util

    requirement = f"{PACKAGE}=={version}"
    if importlib.util.find_spec("pip"):
        return [
            sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--no-input",
            "--disable-pip-version-check", "--only-binary=:all:", f"--platform=manylinux_2_27_{machine}",
            "--python-version=3.11", "--implementation=cp", "--abi=cp311", f"--dest={folder}",
        ]  # fmt: skip
    uv = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))  # fmt: skip
    if uv:
        return [
            uv, "pip", "install", requirement, "--no-deps", "--only-binary=:all:",
            f"--python-platform={machine}-manylinux_2_28", "--python-version=3.11",
            f"--target={folder}",
        ]  # fmt: skip
    raise MissingExtra(
        f"LiteRT {version} for {machine} must be fetched, and this Python has neither pip nor uv",
        hint="python -m ensurepip",
    )
