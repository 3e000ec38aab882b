"""Parsers of what boards print: right on real output, our own error on anything else."""

from __future__ import annotations

import contextlib
import json
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.device.parse import parse_facts, parse_free_bytes, parse_sha256
from edgepipe.errors import CommandFailed
from edgepipe.profile import Cluster

DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("tail", ["", "\n", "  -\n", "  model.tflite\n"])
def test_digest_is_what_sha256sum_prints_first(tail: str) -> None:
    assert parse_sha256(DIGEST + tail) == DIGEST


@pytest.mark.parametrize("text", ["", DIGEST[:-1], DIGEST + "0", DIGEST.upper(), "\\" + DIGEST])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        parse_sha256(text)
    assert caught.value.code == "unexpected-output"


@pytest.mark.parametrize(
    ("line", "free_kib"),
    [
        ("/dev/mmcblk0p2   30428648 5234304  23896408      18% /", 23896408),
        ("tmpfs               1024       0      1024       0% /tmp/a b 5% c", 1024),
        ("//nas/my share    2000    1500       500      75% /mnt/nas", 500),
        ("overlay 100 100 -5 100% /", 0),
        ("none 0 0 0 - /proc", 0),
    ],
)
def test_free_space_is_read_from_df(line: str, free_kib: int) -> None:
    header = "Filesystem     1024-blocks    Used Available Capacity Mounted on\n"
    assert parse_free_bytes(header + line + "\n") == free_kib * 1024


def test_free_space_is_read_from_this_machines_df() -> None:
    done = subprocess.run(["df", "-Pk", "/"], check=True, capture_output=True, text=True)
    assert parse_free_bytes(done.stdout) >= 0


@pytest.mark.parametrize("text", ["", "one line", "a\nb", "h\n1 2 3\n", "h\nd 1 2 x 5% /\n"])
def test_what_is_no_df_is_refused(text: str) -> None:
    with pytest.raises(CommandFailed):
        parse_free_bytes(text)


def facts(**changes: Any) -> dict[str, Any]:
    """What probe.py prints on a phone-like board with two clusters."""
    small = {"implementer": "0x41", "part": "0xd05", "name": None, "features": ["fp", "asimddp"], "max_khz": 1800000, "min_khz": 300000}  # fmt: skip
    big = {**small, "part": "0xd41", "features": ["fp", "asimddp", "asimdhp", "i8mm"], "max_khz": 2400000}  # fmt: skip
    return {
        "schema": 1,
        "device": {
            "model": "Board Rev 1.2", "machine": "aarch64", "bits": 64, "os": "Linux 1",
            "kernel": "6.6.1", "page_size_bytes": 4096, "python": "3.11.2",
        },
        "libc": "glibc 2.36",
        "compatible": ["maker,board", "brcm,bcm2712"],
        "cpus": [{"cpu": i, **(small if i < 4 else big)} for i in range(6)],
        "memory": {"total_bytes": 8 << 30, "swap_bytes": None},
        "health": {"governor": "ondemand", "temperature_c": 47.2, "throttling": []},
        "free_bytes": 10**9,
        "packages": {"ai_edge_litert": "2.3.0"},
        **changes,
    }  # fmt: skip


def test_cores_are_grouped_by_kind_and_frequency() -> None:
    found = parse_facts(json.dumps(facts()))
    assert found.clusters == (
        Cluster(core="Cortex-A55", count=4, max_frequency_mhz=1800, isa=("dotprod",)),
        Cluster(core="Cortex-A78", count=2, max_frequency_mhz=2400, isa=("dotprod", "fp16", "i8mm")),
    )  # fmt: skip
    assert found.socs == ("BCM2712",)
    assert found.throttling == ()
    assert found.runtimes == {"ai_edge_litert": "2.3.0"}


@pytest.mark.parametrize(
    ("status", "throttling"),
    [(None, None), ("none", ()), ("moderate", ("thermal status moderate",))],
)
def test_a_phone_names_its_chip_its_library_and_what_heat_does(
    status: str | None, throttling: tuple[str, ...] | None
) -> None:
    said = facts()
    said["device"] |= {"soc": "gs101", "libc": "bionic"}
    said |= {"libc": "glibc 2.36", "compatible": [""]}  # ours; and the device tree may not be read
    said["health"] |= {"throttling": None, "thermal_status": status}
    found = parse_facts(json.dumps(said))
    assert (found.socs, found.libc, found.throttling) == (("GS101",), "bionic", throttling)


def test_a_core_we_do_not_know_is_named_by_its_numbers() -> None:
    cpu = {"cpu": 0, "implementer": "0x61", "part": "0x022", "name": None, "features": [], "max_khz": None, "min_khz": None}  # fmt: skip
    assert parse_facts(json.dumps(facts(cpus=[cpu]))).clusters == (
        Cluster(core="unknown core 0x61/0x022", count=1, max_frequency_mhz=0, isa=()),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2}, {"device": None}, {"cpus": 3}, {"cpus": [None]}, {"memory": {}},
        {"health": []}, {"free_bytes": "much"}, {"packages": 1}, {"compatible": None},
        {"cpus": [{"cpu": 0}]}, {"free_bytes": 1e400},
    ],
)  # fmt: skip
def test_facts_of_another_shape_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CommandFailed):
        parse_facts(json.dumps(facts(**changes)))


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "Traceback ...", "[" * 100000])
def test_what_is_no_facts_is_refused(text: str) -> None:
    with pytest.raises(CommandFailed):
        parse_facts(text)


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, containers, max_leaves=8)


@given(key=st.sampled_from(sorted(facts())), value=JSON)
def test_any_wrong_value_is_our_error_or_read_as_a_value(key: str, value: object) -> None:
    with contextlib.suppress(CommandFailed):
        parse_facts(json.dumps(facts(**{key: value})))


@given(st.text())
def test_no_text_makes_a_parser_fail_in_its_own_way(text: str) -> None:
    for parser in (parse_sha256, parse_free_bytes, parse_facts):
        try:
            parser(text)
        except CommandFailed:
            continue
