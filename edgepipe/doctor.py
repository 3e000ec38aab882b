"""Is a board ready to measure? What was found, why it matters, and the command that mends it.

The checks are pure functions of what a board said; `examine` asks it. With ``fix`` it mends what is
edgepipe's own: the runtime and what earlier jobs left in the work folder. Governor, services and
packages of the system are the user's: there the command is only shown.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from edgepipe import preflight
from edgepipe.crunner import ABANDONED_DAYS, tidy_without_python
from edgepipe.device.base import Device
from edgepipe.device.retry import RetryingDevice
from edgepipe.emulated import why_emulated
from edgepipe.errors import (
    AuthError,
    ConnectError,
    EdgepipeError,
    HostKeyError,
    NotReadyError,
)
from edgepipe.job import COMMAND_TIMEOUT_S, parse_object
from edgepipe.preflight import Board
from edgepipe.profile import DeviceProfile
from edgepipe.runtime import PINS, Pin
from edgepipe.units import format_bytes, format_seconds

log = logging.getLogger(__name__)

Status = Literal["ok", "warn", "fail", "unknown"]
# A job without a supervisor may be resumed by its host; one this old is not (ours mends now).
FIX_JOBS_AFTER_S = 3600.0
# Files written by a job besides what is pushed: outputs of a long set, the journal.
SPARE_DISK_BYTES = 50e6
# LiteRT and a small model take about 30 MB; below twice that the kernel starts to reclaim.
SPARE_MEMORY_BYTES = 64e6
# Beyond this, ages and dates of the two sides no longer mean the same.
CLOCK_SKEW_S = 5.0
# Somebody else's work on one of these cores shows in every percentile.
BUSY_SHARE = 0.5
PATIENCE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Check:
    """``found`` is what the board says, ``why`` what it is good for, ``mend`` a command to paste.

    A check whose evidence is missing is ``unknown``, which is not ok.
    """

    name: str
    status: Status
    found: str
    why: str = ""
    mend: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything about one board; ``fixed`` is what was mended on the way."""

    address: str
    profile: str
    checks: tuple[Check, ...]
    fixed: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """No check failed and none is unknown; warnings are allowed."""
        return all(check.status in ("ok", "warn") for check in self.checks)


# ------------------------------------------------------------------------------------ the link

# The steps to a board, and the codes of the errors that each may end with.
_STEPS = (
    ("name", "the board's name must lead to an address", ("unknown-host",)),
    ("TCP", "the port must accept connections", ("refused", "unreachable")),
    ("SSH server", "what answers there must speak SSH", ("no-ssh", ConnectError.default_code)),
    ("host key", "another machine must not pose as this board", ()),
    ("login", "commands run as a user of the board", ()),
)  # fmt: skip


def link_checks(address: str, error: EdgepipeError | None) -> list[Check]:
    """One check per step to the board; those behind the step that failed are unknown. Pure."""
    if not address.startswith("ssh://"):
        failed = None if error is None else "connection"
        why = "without it nothing can be asked"
        return [_failed(failed, error, why) if failed and error else Check("connection", "ok", address)]  # fmt: skip
    at = len(_STEPS)
    if isinstance(error, HostKeyError):
        at = 3
    elif isinstance(error, AuthError):
        at = 4
    elif error is not None:
        at = next((n for n, (_, _, codes) in enumerate(_STEPS) if error.code in codes), 2)
    found = [Check(name, "ok", "") for name, _, _ in _STEPS[:at]]
    if error is not None and at < len(_STEPS):
        name, why, _ = _STEPS[at]
        found.append(_failed(name, error, why))
        found += [Check(name, "unknown", f"not reached: see {_STEPS[at][0]}") for name, _, _ in _STEPS[at + 1 :]]  # fmt: skip
    return found


def _failed(name: str, error: EdgepipeError, why: str) -> Check:
    return Check(name, "fail", error.message, why, error.hint)


# ------------------------------------------------------------------------------------ the board


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was asked: the agent's ``survey`` (targets/linux/agent.py), and when, by this host's clock.

    ``runner`` is ``agent`` or ``c``, for a board without Python, which has no survey of its folder.
    """

    survey: Mapping[str, Any]
    asked_s: float
    answered_s: float
    runner: Literal["agent", "c"] = "agent"


def board_checks(findings: Findings, profile: DeviceProfile, address: str) -> list[Check]:
    """Every check of one board's own state. Pure, and for any JSON: what is not there is unknown."""
    return [check(findings, profile, address) for check in _CHECKS]


def _at(data: object, *keys: str) -> Any:
    """What lies at a path of objects, or None."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _number(data: object, *keys: str) -> float | None:
    found = _at(data, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return float(found) if abs(found) < 1e300 else None  # neither infinite nor NaN


def _words(data: object, *keys: str) -> str | None:
    found = _at(data, *keys)
    return found if isinstance(found, str) and found else None


def _version(text: str | None) -> tuple[int, ...]:
    """The numbers a version begins with: "3.13.0rc1" -> (3, 13, 0); empty for what is no version."""
    found = re.match(r"\d{1,6}(\.\d{1,6})*", text or "", re.ASCII)
    return tuple(map(int, found.group().split("."))) if found else ()


def pin_for(survey: Mapping[str, Any], profile: DeviceProfile) -> Pin | None:
    """The LiteRT library that would be pushed to this board, or None."""
    machine = _words(survey, "device", "machine") or ""
    return PINS.get((profile.runtime_version, machine)) if profile.runtime == "litert" else None


def _python(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    why = "the measuring program is written in it; without it a program in C is pushed, which has no energy, no sustained runs and no resuming on the board"  # fmt: skip
    install = "on the board: sudo apt-get install python3"
    if findings.runner == "c":
        return Check("Python", "warn", "none; the C runner works", why, install)
    found = _words(findings.survey, "device", "python")
    if not _version(found):
        return Check("Python", "unknown", "its version is not told", why, install)
    good = _version(found) >= preflight.PYTHON_NEEDED
    return Check("Python", "ok" if good else "fail", str(found), why, "" if good else install)


def _userland(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    why = "runtimes are chosen by the programs' own bits; a 64-bit kernel may run 32-bit programs"
    device = findings.survey.get("device")
    machine, bits = _words(device, "machine"), _number(device, "bits")
    if machine is None or bits not in (32, 64):
        return Check("userland", "unknown", "it is not told", why)
    kernel = _words(findings.survey, "kernel_machine")
    found = f"{machine}, {bits:.0f} bit"
    if bits == 32 and kernel in ("aarch64", "x86_64"):
        found += f" under a 64-bit kernel ({kernel})"
    if profile.machine not in ("any", machine):
        mend = "choose the profile of this board with --profile; `edgepipe devices list` shows them"
        return Check("userland", "fail", f"{found}; profile {profile.name} says {profile.machine}", why, mend)  # fmt: skip
    if bits == 32 and kernel == "aarch64":
        return Check("userland", "warn", found, f"{why}; there is no LiteRT for 32 bit, only tflite-runtime", "a 64-bit image of the system is faster")  # fmt: skip
    return Check("userland", "ok", found, why)


def _profile(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    why = "figures of one kind of board must not pass for those of another"
    device = _at(findings.survey, "device")
    try:
        preflight.check_board(device if isinstance(device, Mapping) else {}, profile, address)
    except EdgepipeError as exc:
        return _failed("kind of board", exc, why)
    return Check("kind of board", "ok", _words(device, "model") or "it does not name itself", why)


def _needs(name: str, has: str | None, needed: str | None, mend: str, pin: Pin | None) -> Check:
    why = f"libLiteRt.so needs {needed}" if needed else "no library is pushed to this machine"
    if pin is None:
        return Check(name, "ok", has or "not told", why)
    if not _version(has):
        return Check(name, "unknown", "not found", why, mend)
    good = _version(has) >= _version(needed)
    return Check(name, "ok" if good else "fail", str(has), why, "" if good else mend)


_NEWER_SYSTEM = "a newer system on the board: Debian 12, Ubuntu 22.04 or Raspberry Pi OS of 2023-10-10, or newer"  # fmt: skip


def _glibc(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    pin = pin_for(findings.survey, profile)
    has = _words(findings.survey, "device", "glibc")
    return _needs("glibc", has, pin.glibc if pin else None, _NEWER_SYSTEM, pin)


def _libstdcxx(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    if findings.runner == "c":
        return Check("libstdc++", "warn", "not asked without Python; the self-test of the runtime tells")  # fmt: skip
    pin, has = pin_for(findings.survey, profile), _words(findings.survey, "libstdcxx")
    mend = _NEWER_SYSTEM if has else "on the board: sudo apt-get install libstdc++6"
    check = _needs("libstdc++", has, pin.glibcxx if pin else None, mend, pin)
    return dataclasses.replace(check, found=f"GLIBCXX_{has}") if has else check


def _pages(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    size, pin = _number(findings.survey, "device", "page_size_bytes"), pin_for(findings.survey, profile)  # fmt: skip
    why = "a library cannot be loaded where pages are larger than its segments are aligned to"
    if size is None:
        return Check("page size", "unknown", "it is not told", why, "on the board: getconf PAGESIZE")  # fmt: skip
    found = f"{size / 1024:g} KiB"
    if pin is not None and size > pin.max_page_bytes:
        return Check("page size", "fail", found, f"{why} ({pin.max_page_bytes // 1024} KiB)", "boot a kernel with 4 KiB pages: kernel=kernel8.img in /boot/firmware/config.txt")  # fmt: skip
    if profile.page_size_bytes and size != profile.page_size_bytes:
        return Check("page size", "warn", f"{found}; profile {profile.name} says {profile.page_size_bytes / 1024:g} KiB", "memory figures differ with it")  # fmt: skip
    return Check("page size", "ok", found, why)


def _disk(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    free = _number(findings.survey, "free_bytes")
    why = "the runtime, models and outputs are pushed there"
    mend = f"free some space in {profile.work_dir} on the board, or choose another work_dir"
    if free is None:
        return Check("free disk", "unknown", "it is not told", why, f"on the board: df -h {profile.work_dir}")  # fmt: skip
    pin = pin_for(findings.survey, profile)
    pushed = _number(findings.survey, "work_dir", "caches", "rt", "bytes") or 0.0
    needed = max(0.0, (pin.size_bytes if pin else 0) - pushed)
    if free < needed + (1 << 20):
        return Check("free disk", "fail", f"{format_bytes(free)}, {format_bytes(needed)} are needed for the runtime alone", why, mend)  # fmt: skip
    good = free >= needed + SPARE_DISK_BYTES
    return Check("free disk", "ok" if good else "warn", format_bytes(free), why, "" if good else mend)  # fmt: skip


def _memory(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    free = _number(findings.survey, "health", "memory_available_bytes")
    swapped = _number(findings.survey, "health", "swap_used_bytes")
    why = "a model that does not fit fails, and one that swaps is slow"
    mend = "on the board: stop what takes it (`ps aux --sort -rss | head`)"
    if free is None:
        return Check("free memory", "unknown", "it is not told", why, "on the board: free -h")
    found = format_bytes(free) + ("" if not swapped else f", {format_bytes(swapped)} in swap")
    if free < SPARE_MEMORY_BYTES / 2:
        return Check("free memory", "fail", found, why, mend)
    good = free >= SPARE_MEMORY_BYTES and not swapped
    return Check("free memory", "ok" if good else "warn", found, why, "" if good else mend)


def _emulated(findings: Findings, profile: DeviceProfile) -> str:
    """Why the board's clock and heat do not matter: nothing is timed on an emulated one."""
    device = _at(findings.survey, "device")
    said = why_emulated(profile, device if isinstance(device, Mapping) else {})
    return f"emulated, nothing is timed ({said})" if said else ""


def _governor(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    if emulated := _emulated(findings, profile):
        return Check("governor", "ok", emulated)
    found = _words(findings.survey, "health", "governor")
    why = "with another governor than `performance` the clock follows the load, and figures with it"
    wanted = "performance" if profile.governor == "any" else profile.governor
    mend = f"on the board, until its next boot: echo {wanted} | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"  # fmt: skip
    if found is None:
        return Check("governor", "warn", "the board shows none (no cpufreq)", why)
    good = set(found.split(",")) == {wanted}
    return Check("governor", "ok" if good else "warn", found, why, "" if good else mend)


def _temperature(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    if emulated := _emulated(findings, profile):
        return Check("temperature", "ok", emulated)
    found = _number(findings.survey, "health", "temperature_c")
    limits = profile.thermal
    why = f"measuring starts below {limits.start_below:g} C and stops above {limits.abort_above:g} C"  # fmt: skip
    mend = "give it a heat sink or a fan, or let it rest"
    if found is None:
        return Check("temperature", "warn", "the board shows none", why)
    if found > limits.abort_above:
        return Check("temperature", "fail", f"{found:.1f} C", why, mend)
    good = found < limits.start_below
    return Check("temperature", "ok" if good else "warn", f"{found:.1f} C", why, "" if good else mend)  # fmt: skip


def _throttling(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    if emulated := _emulated(findings, profile):
        return Check("throttling", "ok", emulated)
    bits, alarm = _at(findings.survey, "health", "throttling"), _number(findings.survey, "health", "under_voltage_alarm")  # fmt: skip
    why = "a board that lowers its clock for heat or a weak supply measures itself, not the model"
    mend = "a stronger supply (5 V, 3 A or more; 5 A for a Pi 5) with a short cable, and cooling; then boot it anew"  # fmt: skip
    said = [str(bit) for bit in bits] if isinstance(bits, list) else []
    now = [bit for bit in said if not bit.endswith("_occurred")]
    if alarm:
        now.append("under_voltage")
    if now:
        return Check("throttling", "fail", f"now: {', '.join(sorted(set(now)))}", why, mend)
    if said:
        return Check("throttling", "warn", f"since boot: {', '.join(said)}", why, mend)
    if not isinstance(bits, list) and alarm is None:
        return Check("throttling", "warn", "the board does not tell", why)
    return Check("throttling", "ok", "none since boot", why)


def _load(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    load, cpus = _number(findings.survey, "health", "loadavg_1min"), _number(findings.survey, "device", "cpus")  # fmt: skip
    why = "what else runs there shows in every figure"
    mend = "on the board: top -bn1 | head -15"
    if load is None or not cpus or cpus < 1:
        return Check("load", "warn", "it is not told", why, mend)
    good = load < BUSY_SHARE * cpus
    return Check("load", "ok" if good else "warn", f"{load:.2f} on {cpus:.0f} CPUs", why, "" if good else mend)  # fmt: skip


def _clock(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    board_s = _number(findings.survey, "health", "realtime_s")
    why = "ages of files and jobs are told by it; durations are not"
    mend = "on the board: sudo timedatectl set-ntp true"
    if board_s is None:
        return Check("clock", "unknown", "it is not told", why, mend)
    # it read its clock at some moment between our two looks
    skew_s = max(findings.asked_s - board_s, board_s - findings.answered_s, 0.0)
    if skew_s <= CLOCK_SKEW_S:
        return Check("clock", "ok", "as this machine's", why)
    if emulated := _emulated(findings, profile):
        return Check("clock", "ok", emulated)
    way = "behind" if board_s < findings.asked_s else "ahead"
    return Check("clock", "warn", f"{_age(skew_s)} {way}", why, mend)


def _lease(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    why = "one job at a time is measured"
    if findings.runner == "c":
        return Check("lease", "warn", "not asked without Python; a job that finds it taken says so", why)  # fmt: skip
    folder = _at(findings.survey, "work_dir")
    if not isinstance(folder, Mapping) or "lease" not in folder:
        return Check("lease", "unknown", "it is not told", why)
    lease = folder["lease"]
    if lease is None:
        return Check("lease", "ok", "free", why)
    left_s = _number(lease, "left_s") or 0.0
    until = "while it runs" if _at(lease, "running") else f"for {left_s:.0f} s more"
    who = f"job {_at(lease, 'job')} of {_at(lease, 'owner')}"
    return Check("lease", "fail", f"held by {who}, {until}", why, "wait for it to end")


def _leftovers(findings: Findings, profile: DeviceProfile, address: str) -> Check:
    why = f"what nobody uses takes space; jobs of {ABANDONED_DAYS} days and files unused for 30 go by themselves"  # fmt: skip
    mend = f"edgepipe doctor {shlex.quote(address)} --fix"
    if findings.runner == "c":
        return Check("leftovers", "warn", "not asked without Python", why, mend)
    garbage, jobs = _at(findings.survey, "work_dir", "garbage"), _at(findings.survey, "work_dir", "jobs")  # fmt: skip
    if not isinstance(garbage, list) or not isinstance(jobs, list):
        return Check("leftovers", "unknown", "they are not told", why)
    kept = [str(_words(job, "path")) for job in jobs if _at(job, "kept")]
    if garbage:
        size = sum(_number(item, "bytes") or 0.0 for item in garbage)
        found = f"{len(garbage)} of earlier jobs, {format_bytes(size)}"
        return Check("leftovers", "warn", found, why, mend)
    if kept:
        mend = f"on the board: rm -r {shlex.join(kept)}"
        return Check("leftovers", "warn", f"{len(kept)} jobs that were kept (--keep)", why, mend)
    return Check("leftovers", "ok", "none", why)


_CHECKS: tuple[Callable[[Findings, DeviceProfile, str], Check], ...] = (
    _profile, _python, _userland, _glibc, _libstdcxx, _pages, _disk, _memory, _governor,
    _temperature, _throttling, _load, _clock, _lease, _leftovers,
)  # fmt: skip


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return format_seconds(seconds)


def runtime_check(reply: Mapping[str, Any], address: str, *, is_pushed: bool, hint: str) -> Check:
    """What came of trying the runtimes: the agent's answer to ``check``. Pure."""
    why = "without a runtime that passes a self-test nothing can be measured"
    runtime = _at(reply, "runtime")
    if _at(reply, "code") == 0 and isinstance(runtime, Mapping):
        origin = "pushed" if runtime.get("backend") == "litert-c" else "installed on the board"
        found = f"{runtime.get('name')} {runtime.get('version')} ({origin}) passes its self-test"
        return Check("runtime", "ok", found, why)
    said = _words(reply, "message") or "the board did not say why"
    if not is_pushed:
        return Check("runtime", "warn", f"not pushed yet, and none installed works ({said})", f"{why}; bench pushes it by itself", f"edgepipe doctor {shlex.quote(address)} --fix")  # fmt: skip
    return Check("runtime", "fail", said, why, hint)


# --------------------------------------------------------------------------------------- asking


def examine(device: Device, profile: DeviceProfile, *, fix: bool = False) -> Diagnosis:
    """Ask a board everything, and with ``fix`` mend what is edgepipe's own.

    Pushes the payload (about 100 kB) to the profile's work_dir, as ``probe`` does; with ``fix`` the
    runtime, too (``bench`` would). Whatever fails on the way is a failed check, not an exception.
    """
    address = device.address
    link = RetryingDevice(device, patience_s=PATIENCE_S)
    checks = link_checks(address, None)
    fixed: list[str] = []
    try:
        board = preflight.prepare(link, profile)
        if fix:
            fixed += _tidy(board)
        findings = _survey(board)
    except EdgepipeError as exc:
        why = "without it nothing can be measured"
        return Diagnosis(address, profile.name, (*checks, _failed("first commands", exc, why)))
    checks += board_checks(findings, profile, address)
    try:
        runtime, pushed = _runtime(board, profile, findings, fix=fix)
        checks.append(runtime)
        fixed += pushed
    except EdgepipeError as exc:
        checks.append(_failed("runtime", exc, "without it nothing can be measured"))
    return Diagnosis(address, profile.name, tuple(checks), tuple(fixed))


def unreachable(address: str, profile: DeviceProfile, error: EdgepipeError) -> Diagnosis:
    """The diagnosis of a board that could not be opened."""
    return Diagnosis(address, profile.name, tuple(link_checks(address, error)))


def _survey(board: Board) -> Findings:
    asked_s = time.time()
    if board.c_board is not None:
        return Findings(board.c_board.facts(), asked_s, time.time(), runner="c")
    reply = _ask(board, "survey", board.work_dir, str(FIX_JOBS_AFTER_S))
    return Findings(reply, asked_s, time.time())


def _ask(board: Board, *words: str) -> dict[str, Any]:
    done = board.device.run(["python3", board.payload.entry, *words], timeout_s=2 * COMMAND_TIMEOUT_S)  # fmt: skip
    return parse_object(
        done.stdout, stderr=done.stderr, returncode=done.returncode, address=board.device.address
    )


def _tidy(board: Board) -> list[str]:
    if board.c_board is not None:
        tidy_without_python(board.device, board.work_dir)
        return []
    reply = _ask(board, "tidy", board.work_dir, str(FIX_JOBS_AFTER_S))
    removed = reply.get("removed")
    fixed = ["put back the governor that a job had left changed"] if reply.get("governor_restored") else []  # fmt: skip
    return fixed + [
        f"removed {_words(item, 'path')} ({format_bytes(_number(item, 'bytes') or 0.0)}): {_words(item, 'why')}"
        for item in (removed if isinstance(removed, Sequence) else [])
    ]


def _runtime(
    board: Board, profile: DeviceProfile, findings: Findings, *, fix: bool
) -> tuple[Check, list[str]]:
    """Try what would measure; with ``fix`` what is missing is pushed first."""
    device = findings.survey["device"]
    hint = preflight.runtime_hint(profile, "auto", device)
    fixed: list[str] = []
    library = None
    pin = pin_for(findings.survey, profile)
    if fix:
        before = _is_there(board, pin)
        library = preflight.push_runtime(board, profile, "auto", findings.survey)
        if library is not None and not before:
            fixed.append(f"pushed LiteRT {library['version']} to {library['path']}")
    elif pin is not None and _is_there(board, pin):
        library = preflight.pushed_library(board, pin, profile.runtime_version)
    wheel = preflight.package_for(profile, device) if pin is None else None
    if wheel is not None and fix and not findings.survey["packages"]:
        fixed.append(f"pushed {wheel.requirement} to {board.work_dir}/runtimes")
    is_pushed = fix or library is not None or (pin is None and wheel is None)
    if board.c_board is not None:
        return _c_runtime(board, library, hint), fixed
    reply = _ask(board, "check", board.work_dir, "auto", json.dumps(library))
    return runtime_check(reply, board.device.address, is_pushed=is_pushed, hint=hint), fixed


def _is_there(board: Board, pin: Pin | None) -> bool:
    """Whether the library lies where it would be pushed; its hash is checked when it is used."""
    if pin is None:
        return False
    asked = ["sh", "-c", '[ -f "$0" ]', preflight.library_path(board, pin)]
    return board.device.run(asked, timeout_s=COMMAND_TIMEOUT_S).returncode == 0


def _c_runtime(board: Board, library: dict[str, Any] | None, hint: str) -> Check:
    address, reply = board.device.address, {"code": 69, "message": "libLiteRt.so is not there"}
    if library is not None:
        try:
            preflight.try_c_runner(board, library)
        except NotReadyError as exc:
            return _failed("runtime", exc, "without it nothing can be measured")
        reply = {"code": 0, "runtime": {"backend": "litert-c", "name": "litert", "version": library["version"]}}  # fmt: skip
    return runtime_check(reply, address, is_pushed=library is not None, hint=hint)
