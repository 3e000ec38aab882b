"""Virtual boards without starting one: what they are made of, and what is said where it is missing."""

from __future__ import annotations

import dataclasses
import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.device import open_device
from edgepipe.emulator import needs
from edgepipe.emulator.build import emulated_profiles, find_board, find_emulation
from edgepipe.emulator.initramfs import Entry, initramfs, load_order, newc
from edgepipe.emulator.machine import machine_arguments
from edgepipe.emulator.user_mode import cpuinfo
from edgepipe.errors import MissingExtra, NotReadyError, RequestError
from edgepipe.inventory import resolve_targets

VIRTUAL = ["virt-pi-4", "virt-pi-4-32bit", "virt-pi-5", "virt-pi-user", "virt-pi-zero2w"]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPIPE_EMULATOR", str(tmp_path / "emulator"))
    return tmp_path / "emulator"


@pytest.mark.skipif(not shutil.which("busybox"), reason="no busybox to read the archive with")
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_busybox_reads_the_archive_that_the_kernel_is_given(contents: list[bytes]) -> None:
    names = [f"folder/{'x' * number}" for number in range(1, len(contents) + 1)]
    files = [Entry(name, "file", data) for name, data in zip(names, contents, strict=True)]
    archive = newc([Entry("folder", "folder"), *files])
    listed = subprocess.run(
        ["busybox", "cpio", "-t"], input=archive, capture_output=True, check=True
    )
    assert listed.stdout.decode().split() == ["folder", *names]
    for entry in files:
        command = ["busybox", "cpio", "-i", "--to-stdout", entry.name]
        read = subprocess.run(command, input=archive, capture_output=True, check=True)
        assert read.stdout == entry.data


def test_an_initramfs_of_the_same_parts_is_the_same() -> None:
    def make() -> bytes:
        return initramfs(init=b"#!/bin/sh\n", busybox=b"ELF", modules=[("virtio", b"module")])

    assert make() == make()
    assert b"modules/00_virtio.ko" in gzip.decompress(make())


def test_a_module_is_loaded_after_those_it_depends_on() -> None:
    modules = {
        "virtio_net": b"\0license=GPL\0depends=net-failover,virtio\0",
        "net_failover": b"\0depends=failover\0",
        "failover": b"\0depends=\0",
        "virtio": b"depends=\0",
    }
    modules["net-failover"] = modules["net_failover"]
    order = load_order(["virtio_net", "ext4", "virtio"], modules)
    assert order == ["failover", "net_failover", "virtio", "virtio_net"]


def test_every_virtual_board_is_a_profile_with_an_address(empty_cache: Path) -> None:
    assert list(emulated_profiles()) == VIRTUAL
    targets = resolve_targets(VIRTUAL)
    assert [target.address for target in targets] == [f"virt://{name}" for name in VIRTUAL]
    (target,) = resolve_targets([], devices=["virt://virt-pi-5"])
    assert target.profile.name == "virt-pi-5"


def test_a_board_counts_instructions_on_one_core() -> None:
    machines = [
        p for p in emulated_profiles().values() if p.emulated and p.emulated.kind == "system"
    ]
    assert len(machines) == 4
    for profile in machines:
        assert profile.emulated is not None
        arguments = " ".join(machine_arguments(profile.emulated))
        assert f"-cpu {profile.emulated.cpu} -smp 1" in arguments
        assert "-icount shift=0" in arguments
        assert f"-m {int(profile.ram_bytes) // 2**20}M" in arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", ["virt-pi-4", "virt-pi-user"])
def test_a_board_that_was_not_built_says_how(empty_cache: Path, name: str) -> None:
    if needs.missing_programs(needs.to_run(find_emulation(name))):
        pytest.skip("no QEMU on this machine")
    assert find_board(name) is None
    with pytest.raises(NotReadyError) as caught:
        open_device(f"virt://{name}")
    assert caught.value.hint == f"edgepipe emulate build {name}"
    assert not list(empty_cache.rglob("virt-*"))


def test_a_core_whose_identity_is_not_known_is_refused() -> None:
    emulation = find_emulation("virt-pi-user")
    assert "CPU part\t: 0xd08\nCPU revision\t: 3\n" in cpuinfo(emulation)
    with pytest.raises(RequestError, match="max"):
        cpuinfo(dataclasses.replace(emulation, cpu="max"))


def test_missing_programs_are_one_error_with_the_packages_of_every_system(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "find_program", lambda name: "")
    with pytest.raises(MissingExtra, match="which this machine does not have") as caught:
        open_device("virt://virt-pi-user")
    assert "qemu-aarch64, unshare" in caught.value.message
    assert "macOS: virtual boards are built on Linux only" in caught.value.hint
    with pytest.raises(MissingExtra) as caught:
        open_device("virt://virt-pi-4")
    assert "qemu-system-aarch64" in caught.value.message
    for command in ("apt-get install", "dnf install", "pacman -S", "brew install"):
        assert re.search(rf"{command}.* qemu", caught.value.hint)


@pytest.mark.parametrize(
    "address", ["virt://", "virt://a/b", "virt://virt-pi-9", "virt://localhost"]
)
def test_what_is_no_virtual_board_is_refused(address: str) -> None:
    with pytest.raises(RequestError):
        open_device(address)
