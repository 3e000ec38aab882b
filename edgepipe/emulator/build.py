"""Build virtual boards: a system (kernel, initramfs, disk, keys) and, for each board, its snapshot.

::

    <cache>/emulator/systems/<key>/         one for all boards of a userland
    <cache>/emulator/boards/<name>/<key>/   the disk as the board changed it, with the snapshot "ready";
                                            of one without a kernel its files (`user_mode`)
    <cache>/emulator/running/               one folder for each running board (`machine`)

Keys are hashes of what was asked for; ``system.json`` records what it was built of: every Debian
package with its sha256. A folder appears by one rename, whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edgepipe.artifact import hash_path
from edgepipe.emulator import debian, needs
from edgepipe.emulator.initramfs import initramfs, load_order
from edgepipe.errors import MissingExtra, NotReadyError, RequestError
from edgepipe.profile import DeviceProfile, Emulation, find_profile, load_profile
from edgepipe.resources import profile_paths, target_dir
from edgepipe.schema import near_miss

log = logging.getLogger(__name__)

ENV_FOLDER = "EDGEPIPE_EMULATOR"
SNAPSHOT = "ready"
USER = "pi"
_USERLANDS = ("arm64", "armhf")
_VERSION = 2  # of what is built; another one builds anew
_DISK_BYTES = 2 * 2**30
_PACKAGES = (
    "base-files", "base-passwd", "bash", "dash", "coreutils", "findutils", "grep", "gzip", "hostname",
    "iproute2", "libatomic1", "libc-bin", "libgomp1", "libstdc++6", "login", "mawk", "mount",
    "ncurses-base", "openssh-server", "openssh-sftp-server", "procps", "python3", "sed", "tar", "util-linux",
)  # fmt: skip
# 32-bit boards measure with tflite-runtime, as LiteRT has no library for them; its last release is for
# Python 3.11, and takes numpy from Debian.
_ARMHF_PACKAGES = ("python3-numpy",)
_ARMHF_WHEELS = {
    "tflite-runtime==2.14.0": "c4e66a74165b18089c86788400af19fa551768ac782d231a9beae2f6434f7949"
}
_ARMHF_PLATFORM = "manylinux_2_34_armv7l"
# What a machine of QEMU's "virt" needs beyond what is built into Debian's kernel for clouds.
_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng")
_SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
MaxSessions 100
PidFile none
Subsystem sftp /usr/lib/openssh/sftp-server
"""


@dataclasses.dataclass(frozen=True)
class System:
    """A built system. ``identity_file`` opens the account ``pi``; ``host_key`` is what its sshd shows."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def initramfs(self) -> Path:
        return self.folder / "initramfs.gz"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    @property
    def identity_file(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def host_key(self) -> str:
        """Type and key, as in a known_hosts line."""
        return " ".join((self.folder / "host_key.pub").read_text().split()[:2])


@dataclasses.dataclass(frozen=True)
class Board:
    """A built board: ``folder`` holds its snapshot, or its files where it has no kernel."""

    name: str
    emulation: Emulation
    system: System
    folder: Path

    @property
    def overlay(self) -> Path:
        return self.folder / "ready.qcow2"

    @property
    def is_user_mode(self) -> bool:
        return self.emulation.kind == "user"

    @property
    def is_built(self) -> bool:
        ready = self.folder / "home" if self.is_user_mode else self.overlay
        return self.system.disk.is_file() and ready.exists()


def emulator_dir() -> Path:
    """EDGEPIPE_EMULATOR, else ``emulator`` in the user's cache folder."""
    given = os.environ.get(ENV_FOLDER)
    if given:
        return Path(given).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("edgepipe") / "emulator"


def emulated_profiles() -> dict[str, DeviceProfile]:
    """The profiles that stand for a virtual board, by name."""
    profiles = {name: load_profile(path) for name, path in profile_paths().items() if name.startswith("virt-")}  # fmt: skip
    return {name: profile for name, profile in profiles.items() if profile.emulated}


def find_emulation(name: str) -> Emulation:
    """The machine that the profile ``name`` asks for. Raises ProfileError, RequestError."""
    paths = profile_paths()
    emulation = find_profile(name, paths).emulated if name in paths else None
    if emulation is None:
        boards = list(emulated_profiles())
        what = "is no virtual board" if name in paths else "is unknown"
        raise RequestError(
            f"virtual board {name!r} {what}{near_miss(name, boards)}",
            hint=f"there are {', '.join(boards)}",
            code="no-virtual-board",
        )
    return emulation


def find_board(name: str) -> Board | None:
    """The board as it was built, or None where it was not. Raises RequestError for an unknown one."""
    emulation = find_emulation(name)
    system = System(emulator_dir() / "systems" / _system_key(emulation.userland))
    folder = emulator_dir() / "boards" / name / _board_key(emulation, system)
    board = Board(name, emulation, system, folder)
    return board if board.is_built else None


def built_board(name: str) -> Board:
    """Like `find_board`; raises NotReadyError where it was not built."""
    board = find_board(name)
    if board is None:
        raise NotReadyError(
            f"the virtual board {name} is not built",
            hint=f"edgepipe emulate build {name}",
            code="not-built",
        )
    return board


def build(name: str) -> Board:
    """Build the board ``name``, and the system it runs where there is none yet.

    Nothing is done where it is built already. Raises MissingExtra where programs are missing,
    NotReadyError where packages cannot be fetched or the machine does not start.
    """
    emulation = find_emulation(name)
    needs.check_programs(needs.to_build(emulation), doing=f"building the virtual board {name}")
    with _build_lock():
        board = find_board(name)
        if board is not None:
            return board
        began_s = time.monotonic()
        system = _build_system(emulation.userland)
        board = _build_board(name, emulation, system)
        _forget_old(board)
        log.info("%s is built (%.0f s)", name, time.monotonic() - began_s)
        return board


@contextlib.contextmanager
def _build_lock() -> Iterator[None]:
    """One build at a time; what an interrupted one left is removed."""
    folder = emulator_dir()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another build in %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        for rest in folder.glob("building-*"):
            shutil.rmtree(rest, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=emulator_dir(), prefix="building-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _guest_files() -> dict[str, bytes]:
    folder = target_dir("emulator")
    return {name: (folder / name).read_bytes() for name in ("initramfs-init", "guest-init")}


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _system_key(userland: str) -> str:
    own = (_ARMHF_PACKAGES, _ARMHF_WHEELS) if userland == "armhf" else ()
    return _key(_VERSION, debian.RELEASE, userland, own, _PACKAGES, _MODULES, _SSHD_CONFIG, _DISK_BYTES, sorted(_guest_files().items()))  # fmt: skip


def _board_key(emulation: Emulation, system: System) -> str:
    from edgepipe.emulator.machine import machine_arguments, qemu_version
    from edgepipe.emulator.user_mode import init_script

    if emulation.kind == "user":
        return _key(system.folder.name, emulation.cpu, emulation.cores, init_script().read_bytes())
    # a snapshot is bound to the very machine and version of QEMU that made it
    return _key(system.folder.name, machine_arguments(emulation), qemu_version())


def _build_system(userland: str) -> System:
    target = System(emulator_dir() / "systems" / _system_key(userland))
    if target.disk.is_file():
        return target
    with _work_folder() as work:
        log.info("fetching Debian %s for %s", debian.RELEASE, userland)
        (work / "apt").mkdir()
        archive = debian.Archive(work / "apt", userland)
        archive.update()
        own = _ARMHF_PACKAGES if userland == "armhf" else ()
        packages = archive.fetch_with_dependencies((*_PACKAGES, *own))
        kernel = archive.fetch(archive.kernel_package())
        busybox = archive.fetch("busybox-static:arm64")
        size_bytes = sum(path.stat().st_size for path in (*packages, kernel, busybox))
        log.info("unpacking %d packages, %.0f MB", len(packages) + 2, size_bytes / 1e6)
        made = System(work / "system")
        made.folder.mkdir()
        _make_kernel(kernel, busybox, work, made)
        _make_keys(made.folder)
        debian.unpack_system(packages, work / "root")
        _provision(work / "root", made, userland)
        if userland == "armhf":
            _add_runtime(work)
        debian.run_program(
            ["mke2fs", "-q", "-t", "ext4", "-L", "edgepipe", "-d", work / "root", made.disk, f"{_DISK_BYTES // 1024}k"],
            doing="making the disk",
        )  # fmt: skip
        record = {
            "schema": 1,
            "userland": userland,
            "release": debian.RELEASE,
            "packages": {p.name: hash_path(p) for p in (*packages, kernel, busybox)},
            "wheels": _ARMHF_WHEELS if userland == "armhf" else {},
        }
        (made.folder / "system.json").write_text(json.dumps(record, indent=1) + "\n")
        target.folder.parent.mkdir(parents=True, exist_ok=True)
        made.folder.rename(target.folder)
    return target


def _make_kernel(kernel: Path, busybox: Path, work: Path, made: System) -> None:
    for name in ("kernel", "busybox"):
        (work / name).mkdir()
    debian.unpack(kernel, work / "kernel")
    debian.unpack(busybox, work / "busybox")
    (image,) = (work / "kernel" / "boot").glob("vmlinuz-*")
    image.rename(made.kernel)
    files = {p.stem.replace("-", "_"): p for p in (work / "kernel" / "lib").rglob("*.ko")}
    modules = {name: path.read_bytes() for name, path in files.items()}
    made.initramfs.write_bytes(
        initramfs(
            init=_guest_files()["initramfs-init"],
            busybox=(work / "busybox" / "bin" / "busybox").read_bytes(),
            modules=[(name, modules[name]) for name in load_order(_MODULES, modules)],
        )
    )


def _make_keys(folder: Path) -> None:
    for name in ("host_key", "id_ed25519"):
        debian.run_program(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"edgepipe-{name}", "-f", folder / name],
            doing="making SSH keys",
        )  # fmt: skip


def _provision(root: Path, made: System, userland: str) -> None:
    """Accounts, keys and process 1: what the packages' own scripts would do, and what is ours."""
    etc = root / "etc"
    masters = root / "usr" / "share" / "base-passwd"
    accounts = (masters / "passwd.master").read_text().replace(":*:", ":x:")
    accounts += "sshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
    accounts += f"{USER}:x:1000:1000:,,,:/home/{USER}:/bin/bash\n"
    (etc / "passwd").write_text(accounts)
    names = [line.split(":")[0] for line in accounts.splitlines()]
    _write(etc / "shadow", "".join(f"{name}:*:19700:0:99999:7:::\n" for name in names), 0o640)
    groups = (masters / "group.master").read_text().replace(":*:", ":x:")
    (etc / "group").write_text(f"{groups}{USER}:x:1000:\n")
    (etc / "hostname").write_text("virtual-board\n")
    (etc / "hosts").write_text("127.0.0.1 localhost virtual-board\n")
    (etc / "ssh" / "sshd_config").write_text(_SSHD_CONFIG)
    host_key = (made.folder / "host_key").read_text()
    _write(etc / "ssh" / "ssh_host_ed25519_key", host_key, 0o600)
    (made.folder / "host_key").unlink()  # only the board needs it
    ssh = root / "home" / USER / ".ssh"
    ssh.mkdir(mode=0o700, parents=True)
    _write(ssh / "authorized_keys", (made.folder / "id_ed25519.pub").read_text(), 0o600)
    _write(root / "usr" / "sbin" / "edgepipe-init", _guest_files()["guest-init"].decode(), 0o755)
    (etc / "edgepipe-first-start").touch()
    (etc / "edgepipe-emulated").write_text(f"qemu-system, {userland} userland\n")
    # what alternatives would link
    (root / "usr" / "bin" / "awk").symlink_to("mawk")
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)


def _add_runtime(work: Path) -> None:
    """Install the pinned wheels for 32-bit ARM into ``work/root``, and link what numpy computes with."""
    if importlib.util.find_spec("pip") is None:
        raise MissingExtra(
            "a 32-bit board needs tflite-runtime, and this Python has no pip to fetch it",
            hint="python -m ensurepip",
        )
    lock = work / "wheels.txt"
    lock.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in _ARMHF_WHEELS.items()))
    debian.run_program(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-input", "--no-compile",
            "--disable-pip-version-check", "--only-binary=:all:", f"--platform={_ARMHF_PLATFORM}",
            "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--require-hashes",
            f"--target={work / 'root' / 'usr' / 'local' / 'lib' / 'python3.11' / 'dist-packages'}", "-r", lock,
        ],
        doing="fetching tflite-runtime for armv7l from PyPI",
    )  # fmt: skip
    libraries = work / "root" / "usr" / "lib" / "arm-linux-gnueabihf"
    for kind in (
        "blas",
        "lapack",
    ):  # Debian chooses among several by alternatives, which do not run
        for library in (libraries / kind).glob("lib*.so.3"):
            (libraries / library.name).symlink_to(f"{kind}/{library.name}")


def _write(path: Path, text: str, mode: int) -> None:
    path.write_text(text)
    path.chmod(mode)


def _build_board(name: str, emulation: Emulation, system: System) -> Board:
    from edgepipe.emulator import machine, user_mode

    target = emulator_dir() / "boards" / name / _board_key(emulation, system)
    with _work_folder() as work:
        made = Board(name, emulation, system, work / "board")
        made.folder.mkdir()
        if made.is_user_mode:
            user_mode.make_root(made)
        else:
            debian.run_program(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", system.disk, "-F", "raw", made.overlay],
                doing="making the overlay",
            )  # fmt: skip
        log.info("starting %s for the first time", name)
        machine.make_snapshot(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.folder.rename(target)
    return dataclasses.replace(made, folder=target)


def _forget_old(board: Board) -> None:
    """Remove what an earlier version built; a board that runs on it has its files open."""
    kept = {_system_key(userland) for userland in _USERLANDS}
    old = [path for path in board.folder.parent.iterdir() if path != board.folder]
    old += [path for path in board.system.folder.parent.iterdir() if path.name not in kept]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def disk_bytes(folder: Path) -> int:
    """What the files below ``folder`` occupy on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


__all__ = ["Board", "System", "build", "built_board", "disk_bytes", "emulated_profiles", "emulator_dir", "find_board", "find_emulation"]  # fmt: skip
