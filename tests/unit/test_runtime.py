"""Finding libLiteRt.so: installed, cached, fetched from an index; pinned in every case."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from edgepipe import runtime
from edgepipe.errors import MissingExtra
from edgepipe.runtime import PINS, WHEELS, Pin, cache_path, runtime_library, runtime_package

pytestmark = pytest.mark.slow  # real processes and runs: not for the inner loop

LIBRARY = b"\x7fELF a library for a board"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds one wheel for aarch64, and no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "ai_edge_litert-2.3.0.dist-info"
    name = "ai_edge_litert-2.3.0-cp311-cp311-manylinux_2_27_aarch64.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(runtime.MEMBER, LIBRARY)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ai-edge-litert\nVersion: 2.3.0\n")  # fmt: skip
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: cp311-cp311-manylinux_2_27_aarch64\n")  # fmt: skip
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pin_the_test_library(monkeypatch: pytest.MonkeyPatch) -> Pin:
    pin = Pin(hashlib.sha256(LIBRARY).hexdigest(), len(LIBRARY), "2.34", "3.4.30", 65536)
    monkeypatch.setitem(PINS, ("2.3.0", "aarch64"), pin)
    return pin


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_a_pinned_library_needs_is_what_readelf_says(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    path = runtime_library(machine).path
    said = subprocess.run(["readelf", "-V", path], check=True, capture_output=True, text=True)
    for what, pinned in (("GLIBC", "glibc"), ("GLIBCXX", "glibcxx")):
        versions = [v.split(".") for v in re.findall(rf"\b{what}_([\d.]+)", said.stdout)]
        newest = max(versions, key=lambda v: [int(n) for n in v])
        assert ".".join(newest) == getattr(PINS["2.3.0", machine], pinned)
    said = subprocess.run(["readelf", "-lW", path], check=True, capture_output=True, text=True)
    aligned = {int(a, 16) for a in re.findall(r"^ +LOAD .* (0x\w+)$", said.stdout, re.M)}
    assert aligned == {PINS["2.3.0", machine].max_page_bytes}


needs_pip = pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="needs pip here")


def test_the_installed_library_is_taken_where_it_is_the_pinned_one() -> None:
    found = runtime_library(platform.machine())
    assert found.path.name == "libLiteRt.so"
    assert hashlib.sha256(found.path.read_bytes()).hexdigest() == found.sha256
    assert found.version == importlib.metadata.version("ai-edge-litert")


@needs_pip
def test_a_library_for_another_machine_is_fetched_once(
    index: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = pin_the_test_library(monkeypatch)
    first = runtime_library("aarch64")
    assert first.path.read_bytes() == LIBRARY
    assert first.path == cache_path(pin)
    assert [p for p in own_cache.rglob("*") if p.is_file()] == [first.path]
    (next(index.iterdir())).unlink()
    assert runtime_library("aarch64") == first


@needs_pip
def test_a_library_that_is_not_the_pinned_one_is_refused(index: Path, own_cache: Path) -> None:
    with pytest.raises(MissingExtra, match="not the one edgepipe was tested with") as caught:
        runtime_library("aarch64")
    assert caught.value.code == "runtime-library-altered"
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []


@needs_pip
def test_an_altered_cached_library_is_fetched_again(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache_path(pin_the_test_library(monkeypatch))
    path.parent.mkdir(parents=True)
    path.write_bytes(LIBRARY[:-1])
    assert runtime_library("aarch64").path.read_bytes() == LIBRARY


@needs_pip
def test_without_a_network_the_error_says_where_to_put_the_library(
    index: Path, own_cache: Path
) -> None:
    (next(index.iterdir())).unlink()
    with pytest.raises(MissingExtra, match="cannot fetch") as caught:
        runtime_library("aarch64")
    assert str(cache_path(PINS["2.3.0", "aarch64"])) in caught.value.hint
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []


def test_without_pip_and_uv_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(runtime.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(MissingExtra, match="neither pip nor uv"):
        runtime_library("aarch64")


@pytest.mark.parametrize(("machine", "version"), [("armv7l", "2.3.0"), ("aarch64", "9.9.9")])
def test_a_build_nobody_tested_is_not_guessed(machine: str, version: str) -> None:
    with pytest.raises(MissingExtra, match=r"no libLiteRt\.so is known") as caught:
        runtime_library(machine, version)
    assert "2.3.0 for aarch64" in caught.value.hint


@needs_pip
def test_a_package_for_a_32_bit_board_is_fetched_once_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    index = tmp_path / "wheels"
    index.mkdir()
    info = "tflite_runtime-2.14.0.dist-info"
    path = index / "tflite_runtime-2.14.0-cp311-cp311-manylinux_2_34_armv7l.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tflite_runtime/__init__.py", "x = 1\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tflite-runtime\nVersion: 2.14.0\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: cp311-cp311-manylinux_2_34_armv7l\n")  # fmt: skip
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    known = WHEELS["tflite-runtime", "2.14.0", "armv7l", (3, 11)]
    with pytest.raises(MissingExtra, match="not the wheel") as caught:  # not the one on PyPI
        runtime_package(known)
    assert caught.value.code == "runtime-library-altered"
    wheel = dataclasses.replace(known, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    folder = runtime_package(wheel)
    assert (folder / "tflite_runtime" / "__init__.py").read_text() == "x = 1\n"
    assert [p.name for p in folder.parent.iterdir()] == [f"{wheel.sha256}-cp311"]  # nothing half
    path.unlink()
    assert runtime_package(wheel) == folder
