"""What a doctor says of a board: pure checks of what real boards answer, and of garbage."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.commands.doctor import diagnosis_text
from edgepipe.doctor import (
    Check,
    Diagnosis,
    Findings,
    board_checks,
    link_checks,
    runtime_check,
)
from edgepipe.errors import AuthError, ConnectError, HostKeyError
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths

PI5 = find_profile("rpi5_8gb", profile_paths())
ANY = find_profile("localhost", profile_paths())
ADDRESS = "ssh://pi@board"
NOW_S = 1_800_000_000.0

# The answer of `agent.py survey` on a Raspberry Pi 5 that is ready, as its files say
# (targets/linux/board.py); parts of it are replaced below by what other boards say.
READY: dict[str, Any] = {
    "schema": 2, "code": 0, "error": None, "message": "",
    "device": {
        "model": "Raspberry Pi 5 Model B Rev 1.0", "machine": "aarch64", "bits": 64, "cpus": 4,
        "glibc": "2.36", "python": "3.11.2", "page_size_bytes": 16384, "kernel": "6.6.51+rpt-rpi-2712",
        "os": "Debian GNU/Linux 12 (bookworm)",
    },
    "kernel_machine": "aarch64", "libstdcxx": "3.4.30", "free_bytes": 20e9, "packages": {},
    "health": {
        "realtime_s": NOW_S, "governor": "performance", "temperature_c": 48.2, "throttling": [],
        "under_voltage_alarm": 0, "loadavg_1min": 0.08, "memory_available_bytes": 7.4e9,
        "swap_used_bytes": 0,
    },
    "work_dir": {"lease": None, "jobs": [], "garbage": [], "caches": {"rt": {"entries": 0, "bytes": 0}}},
}  # fmt: skip
ALARMED = {"under_voltage": ["under_voltage", "throttled_occurred"], "since": ["under_voltage_occurred"]}  # fmt: skip


def checked(changes: dict[str, Any] | None = None, *, profile: Any = PI5, **more: Any) -> dict[str, Check]:  # fmt: skip
    """Checks by name, of a ready board but for ``changes``: values by dotted path."""
    survey = copy.deepcopy(READY)
    for path, value in (changes or {}).items():
        *folders, last = path.split(".")
        at = survey
        for folder in folders:
            at = at[folder]
        at[last] = value
    findings = Findings(survey, more.pop("asked_s", NOW_S - 0.1), NOW_S + 0.1, **more)
    return {check.name: check for check in board_checks(findings, profile, ADDRESS)}


def test_a_board_that_is_ready_has_nothing_to_mend() -> None:
    found = checked()
    assert {check.status for check in found.values()} == {"ok"}
    assert Diagnosis(ADDRESS, "rpi5_8gb", tuple(found.values())).is_ready


@pytest.mark.parametrize(
    ("changes", "name", "status", "said", "mend"),
    [
        # Debian 11: Raspberry Pi OS before October 2023
        ({"device.glibc": "2.31"}, "glibc", "fail", "2.31", "Debian 12"),
        ({"device.glibc": "2.9"}, "glibc", "fail", "2.9", "Debian 12"),  # not a number with a point
        ({"device.glibc": None}, "glibc", "unknown", "", "Debian 12"),  # Alpine: musl
        ({"libstdcxx": "3.4.28"}, "libstdc++", "fail", "GLIBCXX_3.4.28", "Debian 12"),
        ({"libstdcxx": "3.4.9"}, "libstdc++", "fail", "3.4.9", "Debian 12"),
        ({"libstdcxx": None}, "libstdc++", "unknown", "", "libstdc++6"),
        ({"device.python": "3.6.9"}, "Python", "fail", "3.6.9", "python3"),
        ({"device.machine": "armv7l", "device.bits": 32}, "userland", "fail", "under a 64-bit kernel (aarch64)", "--profile"),
        ({"device.model": "Raspberry Pi 4 Model B Rev 1.5"}, "kind of board", "fail", "Raspberry Pi 4", "--profile"),
        ({"device.page_size_bytes": 131072}, "page size", "fail", "128 KiB", "kernel8.img"),
        ({"device.page_size_bytes": 4096}, "page size", "warn", "16 KiB", ""),
        ({"free_bytes": 3e6}, "free disk", "fail", "MB", "work_dir"),
        ({"free_bytes": 20e6}, "free disk", "warn", "20", "work_dir"),
        ({"health.memory_available_bytes": 20e6}, "free memory", "fail", "20", "ps aux"),
        ({"health.swap_used_bytes": 5e6}, "free memory", "warn", "in swap", "ps aux"),
        ({"health.governor": "ondemand"}, "governor", "warn", "ondemand", "scaling_governor"),
        ({"health.governor": "performance,powersave"}, "governor", "warn", "powersave", "performance"),
        ({"health.governor": None}, "governor", "warn", "shows none", ""),
        ({"health.temperature_c": 84.0}, "temperature", "fail", "84.0 C", "fan"),
        ({"health.temperature_c": 70.0}, "temperature", "warn", "70.0 C", "fan"),
        ({"health.throttling": ALARMED["under_voltage"]}, "throttling", "fail", "under_voltage", "supply"),
        ({"health.throttling": ALARMED["since"]}, "throttling", "warn", "under_voltage_occurred", "supply"),
        ({"health.under_voltage_alarm": 1}, "throttling", "fail", "under_voltage", "supply"),
        ({"health.loadavg_1min": 3.9}, "load", "warn", "3.90 on 4 CPUs", "top"),
        ({"health.realtime_s": NOW_S - 3 * 86400}, "clock", "warn", "3 days behind", "timedatectl"),
        ({"health.realtime_s": NOW_S + 7300}, "clock", "warn", "2 h ahead", "timedatectl"),
        ({"work_dir.lease": {"owner": "ann@host", "job": "j1", "left_s": 12.0, "running": False}}, "lease", "fail", "job j1 of ann@host, for 12 s", "wait"),
        ({"work_dir.garbage": [{"path": "/x", "bytes": 3e6, "why": "old"}]}, "leftovers", "warn", "1 of earlier jobs, 3 MB", "--fix"),
        ({"work_dir.jobs": [{"path": "/w/jobs/a b", "kept": True}]}, "leftovers", "warn", "--keep", "rm -r '/w/jobs/a b'"),
    ],
)  # fmt: skip
def test_a_board_with_one_fault_is_told_of_it_and_what_mends_it(
    changes: dict[str, Any], name: str, status: str, said: str, mend: str
) -> None:
    found = checked(changes)
    assert found[name].status == status
    assert said in found[name].found
    assert mend in found[name].mend
    if status != "ok":
        assert found[name].why or found[name].mend
    others = {c.name for c in found.values() if c.status in ("fail", "unknown")} - {name}
    assert others <= ({"kind of board", "userland"} if name == "userland" else set())
    assert Diagnosis(ADDRESS, "p", tuple(found.values())).is_ready == (status == "warn")


def test_a_32_bit_userland_without_a_profile_is_a_warning_that_names_the_runtime() -> None:
    found = checked({"device.machine": "armv7l", "device.bits": 32}, profile=ANY)
    assert found["userland"].status == "warn"
    assert "tflite-runtime" in found["userland"].why
    assert found["glibc"].status == "ok"  # no LiteRT is pushed there, so nothing needs it


def test_a_clock_is_only_wrong_beyond_the_time_that_asking_took() -> None:
    assert checked({"health.realtime_s": NOW_S - 9}, asked_s=NOW_S - 10)["clock"].status == "ok"
    assert checked({"health.realtime_s": NOW_S - 20}, asked_s=NOW_S - 10)["clock"].status == "warn"


def test_a_board_without_python_is_measured_in_c_with_warnings() -> None:
    found = checked({"device.python": None, "libstdcxx": None}, runner="c")
    assert {c.name for c in found.values() if c.status == "warn"} >= {"Python", "libstdc++", "lease", "leftovers"}  # fmt: skip
    assert not {c.name for c in found.values() if c.status in ("fail", "unknown")}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
PATHS = [
    *READY, *(f"device.{key}" for key in READY["device"]), *(f"health.{key}" for key in READY["health"]),
    *(f"work_dir.{key}" for key in READY["work_dir"]),
]  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(PATHS), JSON, max_size=4))
def test_garbage_is_never_an_exception_and_never_lost(changes: dict[str, Any]) -> None:
    shallow_first = dict(sorted(changes.items(), key=lambda item: item[0].count("."), reverse=True))
    found = checked(shallow_first)
    assert list(found) == list(checked())
    json.dumps([check.found for check in found.values()])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("device", "glibc"), ("device.bits", "userland"), ("libstdcxx", "libstdc++"),
        ("device.page_size_bytes", "page size"), ("free_bytes", "free disk"),
        ("health.memory_available_bytes", "free memory"), ("health.realtime_s", "clock"),
        ("work_dir", "lease"), ("work_dir.garbage", "leftovers"), ("device.python", "Python"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("garbage", [None, True, "?", [], float("nan")])
def test_evidence_that_must_be_there_and_is_not_is_not_ok(
    path: str, name: str, garbage: Any
) -> None:
    found = checked({path: garbage}, profile=ANY if path == "device" else PI5)
    if path == "device":
        assert found["userland"].status == "unknown"
    elif path == "work_dir.garbage" and garbage == []:
        assert found[name].status == "ok"
    else:
        assert found[name].status == "unknown"


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (ConnectError("x", hint="h", code="unknown-host"), "name"),
        (ConnectError("x", hint="h", code="refused"), "TCP"),
        (ConnectError("x", hint="h", code="unreachable"), "TCP"),
        (ConnectError("x", hint="h", code="no-ssh"), "SSH server"),
        (HostKeyError("x", hint="h", code="host-key-changed"), "host key"),
        (AuthError("x", hint="h"), "login"),
    ],
)
def test_each_step_to_a_board_is_a_finding_of_its_own(error: Any, failed: str) -> None:
    steps = link_checks(ADDRESS, error)
    names = [check.name for check in steps]
    assert names == ["name", "TCP", "SSH server", "host key", "login"]
    at = names.index(failed)
    assert [c.status for c in steps] == ["ok"] * at + ["fail"] + ["unknown"] * (4 - at)
    assert (steps[at].found, steps[at].mend) == ("x", "h")
    assert not Diagnosis(ADDRESS, "p", tuple(steps)).is_ready


def test_a_runtime_that_is_not_there_yet_is_no_obstacle_and_one_that_fails_is() -> None:
    missing = {"code": 69, "message": "no libLiteRt.so was pushed"}
    assert runtime_check(missing, ADDRESS, is_pushed=False, hint="h").status == "warn"
    assert runtime_check(missing, ADDRESS, is_pushed=True, hint="h").status == "fail"
    works = {"code": 0, "runtime": {"backend": "litert-c", "name": "litert", "version": "2.3.0"}}
    assert "2.3.0 (pushed)" in runtime_check(works, ADDRESS, is_pushed=True, hint="h").found
    assert runtime_check({"code": 0}, ADDRESS, is_pushed=True, hint="h").status == "fail"


def test_people_read_what_was_found_why_it_matters_and_what_mends_it() -> None:
    checks = (
        Check("glibc", "ok", "2.36", "needed"),
        Check("governor", "warn", "ondemand", "the clock follows the load", "echo performance"),
        Check("lease", "fail", "held by job j1", "one at a time", "wait"),
    )
    assert diagnosis_text(Diagnosis(ADDRESS, "p", checks, ("pushed LiteRT",))) == (
        "ok   glibc          2.36\n"
        "warn governor       ondemand\n"
        "       the clock follows the load\n"
        "       echo performance\n"
        "FAIL lease          held by job j1\n"
        "       one at a time\n"
        "       wait\n"
        "fixed: pushed LiteRT\n"
        "not ready: lease"
    )
