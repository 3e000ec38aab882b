"""An arm64 root that is like a phone's as far as we can have one: mksh, toybox, getprop and dumpsys, and no
C library that a program from elsewhere would find.

mksh is a static one. toybox is Debian's, started by a glibc that lies where bionic does on a phone, so
that our own payload must bring everything. Programs run by QEMU's user mode, in namespaces of their own: on
this kernel, with this machine's times. It is not bionic, not SELinux, not a real adbd.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from edgepipe.glibc import fetch_package, find_bundle, read_member

FIXTURES = Path(__file__).parent / "fixtures" / "boards" / "android"
# (path, sha256, sha1) in Debian's archive
MKSH = (
    "pool/main/m/mksh/mksh_59c-28+deb12u1_arm64.deb",
    "57dc61d43f5f14592957cb48f1cabe7880fc87589b3ea803174901811e17067b",
    "a6d7f1f4bcdffef4fbeba50a0f5f01be61b85ccc",
)
TOYBOX = (
    "pool/main/t/toybox/toybox_0.8.9+dfsg-1_arm64.deb",
    "e423df000adb9b94af807d5c4297a625ec887677334d72e4a258df23f9616d7a",
    "1298bf2fd076ab08d1651f4bddd273a72271863d",
)
LIBCRYPT = (
    "pool/main/libx/libxcrypt/libcrypt1_4.4.33-2_arm64.deb",
    "eea0ad76ea5eb507127fea0c291622ea4ecdbb71c4b9a8ed9c76ae33fc1a0127",
    "568d1b21a6bbda60235dfea0d1ab6589c849042c",
)
HIDDEN = "apex/com.android.runtime"
# What our commands need of toybox; Android links many more.
TOOLS = (
    "cat", "chmod", "cut", "df", "find", "mkdir", "mv", "printf", "rm", "rmdir", "sha256sum", "sleep", "touch", "true", "wc",
    "uname",
)  # fmt: skip
# The loader that toybox names; ours is told where its own libraries lie, whatever the environment says.
INTERPRETER, BIONIC = b"/lib/ld-linux-aarch64.so.1", b"/apex/linker".ljust(26, b"\0")
# Termux's: an ordinary app's own folder, and nothing of the system's that asks for a permission.
TERMUX = "data/data/com.termux/files"
DENIED = (
    "Permission Denial: can not dump BatteryService from pid=12345, uid=10123 due to missing "
    "android.permission.DUMP permission"
)
CPUS = 2  # a slow and a fast one; as many as any machine has that runs the tests


def build_root(folder: Path) -> Path:
    """Make the root at ``folder/root``. Fetches Debian packages; they are pinned."""
    root = folder / "root"
    for name in (
        "system/bin",
        "system/etc",
        HIDDEN,
        "data/local/tmp",
        "dev",
        "proc",
        "sys",
        "vendor/bin",
    ):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("system/bin")
    (root / "etc").symlink_to("system/etc")
    for path, data in (
        ("system/bin/sh", read_member(_fetch(MKSH), "usr/lib/aarch64-linux-musl/bin/mksh")),
        ("system/bin/toybox", read_member(_fetch(TOYBOX), "bin/toybox").replace(INTERPRETER, BIONIC)),
        (f"{HIDDEN}/libcrypt.so.1", read_member(_fetch(LIBCRYPT), "lib/aarch64-linux-gnu/libcrypt.so.1.1.0")),
        ("system/bin/getprop", b"#!/system/bin/sh\ncat /system/etc/getprop\n"),
        ("system/bin/dumpsys", b'#!/system/bin/sh\ncat "/system/etc/dumpsys_$1"\n'),
    ):  # fmt: skip
        (root / path).write_bytes(data)
        (root / path).chmod(0o755)
    bundle = find_bundle("aarch64")
    assert bundle is not None
    for name in (bundle.loader, *bundle.libraries):
        shutil.copy(bundle.folder / name, root / HIDDEN / name)
    (root / "apex/linker").symlink_to(f"/{HIDDEN}/{bundle.loader}")
    for name in TOOLS:
        (root / "system/bin" / name).symlink_to("toybox")
    shutil.copy(FIXTURES / "getprop", root / "system/etc/getprop")
    for name in ("dumpsys_battery", "dumpsys_thermalservice"):
        shutil.copy(FIXTURES / name, root / "system/etc" / name)
    (root / "etc/edgepipe-emulated").write_text("qemu-user, an Android-like root for tests\n")
    prefix = root / TERMUX / "usr" / "bin"
    prefix.mkdir(parents=True)
    for name in ("sh", "getprop", *TOOLS):
        (prefix / name).symlink_to(f"/system/bin/{name}")
    (prefix / "dumpsys").write_text(f"#!/system/bin/sh\necho '{DENIED}'\n")
    (prefix / "dumpsys").chmod(0o755)
    (root / TERMUX / "home").mkdir()
    _make_sys(folder)
    return root


def _fetch(package: tuple[str, str, str]) -> bytes:
    path, sha256, sha1 = package
    return fetch_package(path, sha256=sha256, sha1=sha1)


def _make_sys(folder: Path) -> None:
    """A /sys and a /proc/cpuinfo of two clusters: XNNPACK asks them, and must not see this machine's."""
    cpuinfo = ""
    for cpu in range(CPUS):
        part, mhz = ("0xd05", 1704) if cpu == 0 else ("0xd0b", 2253)
        base = folder / "sys/devices/system/cpu"
        policy = base / "cpufreq" / f"policy{cpu}"
        for path, text in (
            (base / f"cpu{cpu}/topology/physical_package_id", "0"),
            (base / f"cpu{cpu}/topology/core_id", str(cpu)),
            (policy / "related_cpus", str(cpu)),
            (policy / "cpuinfo_max_freq", str(mhz * 1000)),
            (policy / "scaling_max_freq", str(mhz * 1000)),
            (policy / "scaling_governor", "sched_pixel"),
        ):  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        cpuinfo += (
            f"processor\t: {cpu}\nBogoMIPS\t: 49.15\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 0\n\n"
        )
    for name in ("possible", "present", "online"):
        (folder / "sys/devices/system/cpu" / name).write_text(f"0-{CPUS - 1}\n")
    (folder / "sys/devices/system/cpu/kernel_max").write_text("31\n")
    (folder / "cpuinfo").write_text(cpuinfo)


# $1 root, $2 its folder, $3 qemu, $4... the command. binfmt_misc is the namespace's own (Linux 6.7). qemu is
# a program of this machine and finds its libraries in the root; those of arm64 are not there.
ENTER = r"""set -e
root=$1 folder=$2 qemu=$3; shift 3
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf '%s' ':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'$qemu':F' >/proc/sys/fs/binfmt_misc/register
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$folder/sys" "$root/sys"
mount --bind "$folder/cpuinfo" "$root/proc/cpuinfo"
for name in lib64 lib/x86_64-linux-gnu usr/lib/x86_64-linux-gnu; do
  if [ -d "/$name" ]; then mkdir -p "$root/$name"; mount --bind "/$name" "$root/$name"; fi
done
exec chroot "$root" "$@"
"""


def shell(root: Path) -> list[str]:
    """The command that runs a line in the root's own shell; the line is its last word."""
    enter = root.parent / "enter"
    enter.write_text(ENTER)
    return [
        find("unshare"), "--map-root-user", "--mount", "--propagation", "private", "/bin/sh", str(enter), str(root),
        str(root.parent), find("qemu-aarch64", "qemu-aarch64-static"), "/system/bin/sh", "-c",
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """A phone's; the home is one that cannot be written, as / cannot by adb's user there."""
    return {
        "PATH": "/system/bin:/vendor/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/none", "ANDROID_ROOT": "/system",
        "TMPDIR": "/data/local/tmp", "QEMU_CPU": "cortex-a76", "LD_LIBRARY_PATH": f"/{HIDDEN}", **more,
    }  # fmt: skip


def termux_command(root: Path) -> Path:
    """What sshd runs in place of every command of a user of Termux (ForceCommand of sshd_config(5)).

    Files go through this machine's sftp-server, which sees the root as its own.
    """
    server = Path("/usr/lib/openssh/sftp-server")
    if not server.is_file():
        missing("no sftp-server on this machine (apt-get install openssh-sftp-server)")
    inside = root / str(server).lstrip("/")
    inside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(server, inside)
    (root / "etc/passwd").write_text("root:x:0:0::/:/system/bin/sh\n")  # it asks who it is
    home, prefix = f"/{TERMUX}/home", f"/{TERMUX}/usr"
    termux = environment(HOME=home, PREFIX=prefix, PATH=f"{prefix}/bin", SHELL=f"{prefix}/bin/sh")
    words = [f"{name}={value}" for name, value in termux.items()]
    enter = shlex.join([*shell(root)[:-2]])
    line = f'export {shlex.join(words)}; cd; eval "$SSH_ORIGINAL_COMMAND"'
    script = root.parent / "termux"
    script.write_text(
        "#!/bin/sh\n"
        f'if [ "$SSH_ORIGINAL_COMMAND" = internal-sftp ]; then exec {enter} {server}; fi\n'
        f"exec env QEMU_CPU=cortex-a76 {enter} /system/bin/sh -c "
        f"{shlex.quote(line)}\n"
    )
    script.chmod(0o755)
    return script


def skip_unless_runs(root: Path) -> None:
    """Skip where this kernel does not let us (private binfmt_misc: Linux 6.7); in CI that is an error."""
    done = subprocess.run([*shell(root), "uname -m"], env=environment(), capture_output=True, text=True, check=False)  # fmt: skip
    if done.stdout != "aarch64\n":
        missing(f"an arm64 root cannot be entered here: {done.stderr.strip()[-300:]}")


def find(*programs: str) -> str:
    """The first of these that is there."""
    found = next((path for program in programs if (path := shutil.which(program))), None)
    if found is None:
        missing(f"no {programs[0]} on this machine (apt-get install qemu-user util-linux)")
    return str(found)


def missing(message: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
