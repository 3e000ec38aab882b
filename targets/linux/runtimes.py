"""Which of the runtimes on this board measures: the pushed library first, then what is installed.

Standard library only, Python 3.7 or newer. Nothing is loaded here; an attempt in a worker decides.
"""

import os
import platform
import re
import struct
import sys

from board import glibc_version, log, machine, packages, sha256_of
from job import EX_NO_RUNTIME, Stop
from sysfs import SYSROOT

# ELF e_machine (elf.h) and EI_CLASS for what `machine` returns
ELF_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64"}
INSTALLED = (
    ("litert-interpreter", "ai_edge_litert", "litert"),
    ("tflite-runtime-interpreter", "tflite_runtime", "tflite-runtime"),
)


def elf_machine(path):
    with open(path, "rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return ELF_MACHINES.get(struct.unpack("<H", head[18:20])[0], "unknown")


def numbers(version):
    return tuple(int(n) for n in re.findall(r"\d+", version or "")[:3])


# Where distributions keep libstdc++.so.6, besides what the dynamic linker lists.
LIBRARY_FOLDERS = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")


def libstdcxx_version():
    """The newest GLIBCXX symbol version of this process's libstdc++ ("3.4.30"); None = no such library.

    Read from the file's text, as loading a broken library could end this process.
    """
    multiarch = getattr(sys.implementation, "_multiarch", "")
    for folder in [os.path.join(f, multiarch) for f in LIBRARY_FOLDERS[:2]] + list(LIBRARY_FOLDERS):
        try:
            with open(os.path.join(SYSROOT + folder, "libstdc++.so.6"), "rb") as stream:
                found = re.findall(rb"\0GLIBCXX_(\d+(?:\.\d+)+)(?=\0)", stream.read())
        except OSError:
            continue
        if found:
            newest = max(found, key=lambda text: [int(n) for n in text.split(b".")])
            return newest.decode()
    return None


def library_fault(library):
    """Why a pushed libLiteRt.so must not be loaded here, or None."""
    found, here = elf_machine(library["path"]), machine()
    if found != here:
        return "the library is for %s, this process is %s" % (found or "no machine: not ELF", here)
    if numbers(library["version"]) < (2, 1, 6):
        return (
            "the C API of LiteRT %s is another one (2.1.6 or newer is needed)" % library["version"]
        )
    if library.get("glibc"):
        has = glibc_version()
        if has is None:
            return "the C library here is not glibc"
        if numbers(has) < numbers(library["glibc"]):
            return "the library needs glibc %s, this board has %s" % (library["glibc"], has)
    if library.get("glibcxx"):
        has = libstdcxx_version()  # None: not where we look; the self-test will tell
        if has is not None and numbers(has) < numbers(library["glibcxx"]):
            return "the library needs libstdc++ with GLIBCXX_%s, this board's has %s" % (
                library["glibcxx"], has,
            )  # fmt: skip
    return None


def package_library_sha256(folder):
    """sha256 of the largest shared object of a package: its runtime."""
    libraries = [os.path.join(folder, n) for n in os.listdir(folder) if n.endswith(".so")]
    libraries = [p for p in libraries if "Accelerator" not in os.path.basename(p)]
    return sha256_of(max(libraries, key=os.path.getsize)) if libraries else None


def installed(backend, module, name, found):
    """The runtime of a package that `packages` found."""
    return {
        "backend": backend, "name": name, "version": found["version"], "module": module,
        "path": found["path"], "sha256": package_library_sha256(found["path"]),
    }  # fmt: skip


def is_unchanged(runtime):
    """A runtime chosen before is what it was. (A pushed library is checked as models are.)"""
    found = packages()
    return runtime["backend"] == "litert-c" or any(
        module in found and installed(backend, module, name, found[module]) == runtime
        for backend, module, name in INSTALLED
    )


def choose_runtime(wanted, library, unfit, attempt):
    """The first backend that loads and passes the self-test -> (runtime, rejected ones).

    ``wanted`` is a backend or ``auto``; ``library`` the pushed one with its ``path`` here, or None;
    ``unfit`` are backends that turned out not to support the model, with the reason;
    ``attempt(runtime)`` returns why a runtime does not work, or None. Raises Stop(69) with every
    reason where none is left.
    """
    rejected, found, candidates = list(unfit), packages(), []
    if library is not None:
        candidates.append(
            {"backend": "litert-c", "name": "litert", "version": library["version"],
             "sha256": library["sha256"], "path": library["path"]}
        )  # fmt: skip
    else:
        rejected.append({"backend": "litert-c", "reason": "no libLiteRt.so was pushed"})
    for backend, module, name in INSTALLED:
        if module in found:
            candidates.append(installed(backend, module, name, found[module]))
        else:
            reason = "Python %s has no %s" % (platform.python_version(), module)
            rejected.append({"backend": backend, "reason": reason})
    known_unfit = [r["backend"] for r in unfit]
    for candidate in candidates:
        if wanted not in ("auto", candidate["backend"]) or candidate["backend"] in known_unfit:
            continue
        reason = library_fault(library) if candidate["backend"] == "litert-c" else None
        reason = reason or attempt(candidate)
        if reason is None:
            return candidate, rejected
        rejected.append({"backend": candidate["backend"], "reason": reason})
        log("%s: %s" % (candidate["backend"], reason))
    reasons = [r for r in rejected if wanted in ("auto", r["backend"])]
    message = "; ".join("%s: %s" % (r["backend"], r["reason"]) for r in reasons)
    raise Stop(EX_NO_RUNTIME, "no-runtime", message, rejected=rejected)
