"""The programs that virtual boards need on this machine, and the packages that bring them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from edgepipe.errors import MissingExtra
from edgepipe.profile import Emulation

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # often not on an ordinary user's PATH
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclasses.dataclass(frozen=True)
class Packages:
    """Names of the package that brings a program, by who packs it."""

    debian: str
    fedora: str
    arch: str
    macos: str = ""  # "" = there is none: building needs Linux


PROGRAMS: dict[str, Packages] = {
    "qemu-system-aarch64": Packages("qemu-system-arm", "qemu-system-aarch64", "qemu-system-aarch64", "qemu"),
    "qemu-aarch64": Packages("qemu-user", "qemu-user", "qemu-user-static"),
    "unshare": Packages("util-linux", "util-linux", "util-linux"),
    "qemu-img": Packages("qemu-utils", "qemu-img", "qemu-img", "qemu"),
    "apt-get": Packages("apt", "apt", "apt"),
    "dpkg-deb": Packages("dpkg", "dpkg", "dpkg"),
    "tar": Packages("tar", "tar", "tar", "gnu-tar"),
    "mke2fs": Packages("e2fsprogs", "e2fsprogs", "e2fsprogs", "e2fsprogs"),
    "debugfs": Packages("e2fsprogs", "e2fsprogs", "e2fsprogs", "e2fsprogs"),
    "ssh-keygen": Packages("openssh-client", "openssh", "openssh", "openssh"),
    str(KEYRING): Packages("debian-archive-keyring", "debian-keyring", "debian-archive-keyring"),
}  # fmt: skip
_TO_BUILD = ("apt-get", "dpkg-deb", "tar", "ssh-keygen", str(KEYRING))


def to_run(emulation: Emulation) -> tuple[str, ...]:
    return ("qemu-aarch64", "unshare") if emulation.kind == "user" else ("qemu-system-aarch64",)


def to_build(emulation: Emulation) -> tuple[str, ...]:
    disk = ("mke2fs", "debugfs" if emulation.kind == "user" else "qemu-img")
    return (*_TO_BUILD, *disk, *to_run(emulation))


def find_program(name: str) -> str:
    """The path of a program of this machine (or of a file, given by its path); "" where it is absent."""
    if name.startswith("/"):
        return name if Path(name).is_file() else ""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])) or ""


def find_qemu_user() -> str:
    """QEMU's user mode, the one that needs no libraries first; "" where there is none."""
    return find_program("qemu-aarch64-static") or find_program("qemu-aarch64")


def missing_programs(names: Sequence[str]) -> list[str]:
    return [name for name in names if not (find_qemu_user() if name == "qemu-aarch64" else find_program(name))]  # fmt: skip


def check_programs(names: Sequence[str], *, doing: str) -> None:
    """Raise MissingExtra that names all that is absent and the packages that bring it."""
    missing = missing_programs(names)
    if not missing:
        return
    packages = [PROGRAMS[name] for name in missing]

    def listed(names: list[str]) -> str:
        return " ".join(sorted(set(filter(None, names))))

    lines = [
        f"Debian, Ubuntu: sudo apt-get install --no-install-recommends {listed([p.debian for p in packages])}",
        f"Fedora: sudo dnf install {listed([p.fedora for p in packages])}",
        f"Arch: sudo pacman -S {listed([p.arch for p in packages])}",
    ]
    if all(p.macos for p in packages):
        lines.append(f"macOS: brew install {listed([p.macos for p in packages])}")
    else:
        lines.append("macOS: virtual boards are built on Linux only")
    raise MissingExtra(
        f"{doing} needs {', '.join(missing)}, which this machine does not have",
        hint="\n  ".join(lines),
        code="no-emulator",
    )
