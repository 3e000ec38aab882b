"""The processes of a board without its kernel: QEMU's user mode, in namespaces of this machine's.

There is no start, and no memory or clock but this machine's; programs compute as on the board. What it
is made of lies in the board's folder: ``root/`` the system's files, ``sys/`` and ``cpuinfo`` what the
board says of its processor, ``home/`` what ``/home/pi`` is at first. ``targets/emulator/user-init``
puts them together.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.emulator import needs
from edgepipe.emulator.debian import run_program
from edgepipe.errors import NotReadyError, RequestError
from edgepipe.profile import Emulation
from edgepipe.resources import target_dir

if TYPE_CHECKING:
    from edgepipe.emulator.build import Board

# Arm's part numbers and the revisions that QEMU emulates (MIDR_EL1 in target/arm/cpu64.c).
_PARTS = {
    "cortex-a53": ("0xd03", 0, 4),
    "cortex-a72": ("0xd08", 0, 3),
    "cortex-a76": ("0xd0b", 4, 1),
}
_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
WHY_NOT = (
    "it needs Linux 6.7 and leave to make namespaces (as root, or user namespaces: "
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0); containers often forbid it"
)


def init_script() -> Path:
    return target_dir("emulator") / "user-init"


def make_root(board: Board) -> None:
    """Fill the folder of a board that is being built. Raises NotReadyError, RequestError."""
    if platform.machine() in ("aarch64", "arm64"):
        raise NotReadyError(
            f"{board.name} emulates the programs of a board, which this machine runs itself",
            hint="edgepipe bench model.tflite --device local",
            code="no-emulator",
        )
    folder, root = board.folder, board.folder / "root"
    root.mkdir()
    # debugfs reads the disk without mounting it; its arguments are words of a line of its own
    run_program(["debugfs", "-R", "rdump / root", board.system.disk], doing="unpacking the disk", cwd=folder)  # fmt: skip
    if not (root / "usr/sbin/sshd").is_file():
        raise NotReadyError("debugfs unpacked no system", code="build-failed")
    shutil.rmtree(root / "lost+found", ignore_errors=True)
    (root / "home/pi").rename(folder / "home")
    (root / "home/pi").mkdir()
    emulation = board.emulation
    (root / "etc/edgepipe-emulated").write_text(
        f"qemu-user {emulation.cpu}, {emulation.userland} userland\n"
    )
    (folder / "cpuinfo").write_text(cpuinfo(emulation))
    cpus = folder / "sys/devices/system/cpu"
    for number in range(emulation.cores):
        topology = cpus / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        for name, value in (("physical_package_id", 0), ("cluster_id", 0), ("core_id", number)):
            (topology / name).write_text(f"{value}\n")
    for name in ("possible", "present", "online"):
        (cpus / name).write_text(f"0-{emulation.cores - 1}\n" if emulation.cores > 1 else "0\n")
    (cpus / "kernel_max").write_text("7\n")


def cpuinfo(emulation: Emulation) -> str:
    """What /proc/cpuinfo says of the cores, as arm64 Linux writes it. Raises RequestError."""
    if emulation.cpu not in _PARTS or emulation.userland != "arm64":
        raise RequestError(
            f"the processes of {emulation.cpu} with a userland for {emulation.userland} cannot be emulated",
            hint=f"there are {', '.join(_PARTS)}, with arm64",
            code="no-virtual-board",
        )
    part, variant, revision = _PARTS[emulation.cpu]
    return "".join(
        f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {_FEATURES}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: {variant:#x}\nCPU part\t: {part}\nCPU revision\t: {revision}\n\n"
        for number in range(emulation.cores)
    )


def command(board: Board, *, home: Path, port: int) -> list[str]:
    """The words that run the board's sshd until they are killed (SIGKILL: all inside goes with it)."""
    return [
        needs.find_program("unshare"), "--user", "--map-root-user", "--mount", "--pid", "--fork",
        "--kill-child=KILL", "--propagation", "private", "/bin/sh", str(init_script()),
        str(board.folder / "root"), str(board.folder), str(home), needs.find_qemu_user(), board.emulation.cpu, str(port),
    ]  # fmt: skip


__all__ = ["WHY_NOT", "command", "cpuinfo", "init_script", "make_root"]
