"""Debian packages of another architecture, through apt with a state of its own; no root needed.

apt checks Debian's signature of the index and the sha256 of every package; nothing that a package
brings is executed, here or in an emulator: packages are unpacked only (as by ``mmdebstrap
--variant=extract``), so that an ordinary user without sub-uids or namespaces can do it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgepipe.emulator.needs import KEYRING, find_program
from edgepipe.errors import NotReadyError

log = logging.getLogger(__name__)

RELEASE = "bookworm"  # that of Raspberry Pi OS since 2023, and the last with Python 3.11
DEFAULT_MIRROR = "http://deb.debian.org/debian"
_RELEASES = ("bullseye", "bookworm", "trixie", "forky", "sid", "stable", "oldstable", "testing", "unstable")  # fmt: skip
_TIMEOUT_S = 900.0

# Folders of a system whose / holds only links to /usr; Debian's packages rely on it (usrmerge).
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libo32", "libx32")


def run_program(argv: Sequence[str | Path], *, doing: str, **options: object) -> str:
    """Run a program of this machine to its end; what it printed. Raises NotReadyError."""
    words = [find_program(str(argv[0])) or str(argv[0]), *map(str, argv[1:])]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", check=False,
            stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, **options,  # type: ignore[call-overload]
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NotReadyError(f"{doing}: {exc}", code="build-failed") from exc
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise NotReadyError(
            f"{doing}: {words[0]} failed with {done.returncode}: {said}",
            hint="is there a network, and space on the disk? with --debug every step is shown",
            code="build-failed",
        )
    return str(done.stdout)


def find_mirror() -> str:
    """The Debian mirror that this machine's apt uses already, else Debian's own."""
    wanted = "$(RELEASE) $(COMPONENT) $(REPO_URI)"
    argv = ["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]
    for line in run_program(argv, doing="reading apt's sources").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in _RELEASES and words[1] == "main":
            return words[2].rstrip("/")
    return DEFAULT_MIRROR


class Archive:
    """The packages of Debian for a userland (``arm64``, ``armhf``), with arm64 beside it."""

    def __init__(self, folder: Path, userland: str) -> None:
        self._folder, self._userland = folder, userland
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(
            f"deb [signed-by={KEYRING}] {find_mirror()} {RELEASE} main\n"
        )
        (folder / "apt.conf").write_text(self._config())

    def _config(self) -> str:
        # of this machine's settings only how to fetch: proxies, certificates, checks of dates
        fetching = run_program(["apt-config", "dump", "Acquire"], doing="reading apt's settings")
        kept = [line for line in fetching.splitlines() if "::IndexTargets" not in line]
        foreign = "" if self._userland == "arm64" else ' "arm64";'
        own = {
            "Dir::State": self._folder / "state",
            "Dir::State::status": self._folder / "status",
            "Dir::Cache": self._folder / "cache",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": self._folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::trusted": "/dev/null",
            "Dir::Etc::trustedparts": "/dev/null",
            "APT::Architecture": self._userland,
            "APT::Sandbox::User": "root",  # the folder is ours, not _apt's
            "APT::Install-Recommends": "false",
        }
        lines = [
            *kept,
            "#clear Acquire::Languages;",
            'Acquire::Languages { "none"; };',
            f'APT::Architectures {{ "{self._userland}";{foreign} }};',
            *(f'{key} "{value}";' for key, value in own.items()),
        ]
        return "\n".join(lines) + "\n"

    def _apt(self, *argv: str, doing: str) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C"}
        return run_program(argv, doing=doing, env=environment, cwd=self._folder)

    def update(self) -> None:
        """Fetch the signed index."""
        self._apt(
            "apt-get", "update", "-qq", doing=f"fetching the package index of Debian {RELEASE}"
        )

    def kernel_package(self) -> str:
        """The package that Debian's newest kernel for arm64 clouds is in."""
        text = self._apt("apt-cache", "show", "--no-all-versions", "linux-image-cloud-arm64:arm64", doing="finding the kernel")  # fmt: skip
        found = re.search(r"^Depends: (linux-image-\S+-cloud-arm64)\b", text, re.MULTILINE)
        if not found:
            raise NotReadyError("Debian's index names no kernel for arm64 clouds", code="build-failed")  # fmt: skip
        return f"{found[1]}:arm64"

    def fetch_with_dependencies(self, packages: Sequence[str]) -> list[Path]:
        """Download packages and all they depend on."""
        self._apt("apt-get", "install", "-qq", "-y", "--download-only", *packages, doing=f"fetching Debian packages for {self._userland}")  # fmt: skip
        return sorted((self._folder / "cache" / "archives").glob("*.deb"))

    def fetch(self, package: str) -> Path:
        """Download one package without what it depends on."""
        before = set(self._folder.glob("*.deb"))
        self._apt("apt-get", "download", "-qq", package, doing=f"fetching {package}")
        return (set(self._folder.glob("*.deb")) - before).pop()


def unpack(package: Path, root: Path) -> None:
    """Unpack one ``.deb`` into ``root``, owned by the user who does it."""
    plain = package.with_suffix(".tar")
    with plain.open("wb") as stream:
        try:
            subprocess.run([find_program("dpkg-deb"), "--fsys-tarfile", package], stdout=stream, stderr=subprocess.PIPE, check=True)  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as exc:
            raise NotReadyError(
                f"cannot unpack {package.name}: {exc}", code="build-failed"
            ) from exc
    try:
        run_program(
            ["tar", "-x", "-f", plain, "-C", root, "--keep-directory-symlink", "--no-same-owner", "-p"],
            doing=f"unpacking {package.name}",
        )  # fmt: skip
    finally:
        plain.unlink()


def unpack_system(packages: Sequence[Path], root: Path) -> None:
    """Unpack packages into a new root with merged /usr, without documentation."""
    root.mkdir()
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        unpack(package, root)
    for name in ("doc", "man", "locale", "info", "lintian", "bug"):
        shutil.rmtree(root / "usr" / "share" / name, ignore_errors=True)


__all__ = ["RELEASE", "Archive", "find_mirror", "run_program", "unpack", "unpack_system"]
