"""The C library for boards without one: packages by their hash, from whoever still has them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe import glibc
from edgepipe.errors import MissingExtra
from edgepipe.glibc import fetch_package, find_bundle, read_member
from edgepipe.resources import target_dir
from edgepipe.runtime import DEFAULT_VERSION, PINS
from edgepipe.schema import read_toml


def deb(files: dict[str, bytes], name: bytes = b"data.tar.xz") -> bytes:
    """A package as dpkg-deb makes it: control first, of odd length, then the files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(f"./{path}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = b"!<arch>\n"
    for member, data in ((b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (name, stream.getvalue())):  # fmt: skip
        found += member.ljust(16) + b"0".ljust(32) + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)  # fmt: skip
    return found


PACKAGE = deb({"lib/a": b"first", "lib/b": b"second"})


def digests(data: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "sha1": hashlib.sha1(data).hexdigest()}


def test_a_file_is_read_out_of_a_package() -> None:
    assert read_member(PACKAGE, "lib/b") == b"second"


@pytest.mark.parametrize("data", [b"", b"<html>", PACKAGE[:100], deb({"lib/a": b""}, name=b"other.tar.xz")])  # fmt: skip
def test_what_is_no_package_or_lacks_the_file_is_refused(data: bytes) -> None:
    with pytest.raises(MissingExtra, match=r"holds no lib/b"):
        read_member(data, "lib/b")
    with pytest.raises(MissingExtra, match=r"holds no lib/c"):
        read_member(PACKAGE, "lib/c")


@given(st.integers(0, len(PACKAGE)), st.binary(max_size=6), st.integers(0, 40))
def test_a_damaged_package_is_the_file_or_our_error(at: int, data: bytes, cut: int) -> None:
    with contextlib.suppress(MissingExtra):
        read_member(PACKAGE[:at] + data + PACKAGE[at + cut :], "lib/b")


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders as Debian's mirror and its archive."""
    for name in ("mirror/pool", "archive"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(glibc, "find_mirror", lambda: (tmp_path / "mirror").as_uri())
    monkeypatch.setattr(glibc, "DEFAULT_MIRROR", (tmp_path / "mirror").as_uri())
    monkeypatch.setattr(glibc, "SNAPSHOT", (tmp_path / "archive").as_uri())
    return tmp_path


def test_a_package_that_the_mirror_replaced_comes_from_the_archive(mirrors: Path) -> None:
    (mirrors / "mirror/pool/a.deb").write_bytes(b"a newer one under the same name")
    (mirrors / "archive" / digests(PACKAGE)["sha1"]).write_bytes(PACKAGE)
    assert fetch_package("pool/a.deb", **digests(PACKAGE)) == PACKAGE


def test_where_nobody_has_it_the_error_says_what_each_said(mirrors: Path) -> None:
    (mirrors / "mirror/pool/a.deb").write_bytes(b"another")
    with pytest.raises(MissingExtra, match=r"it is another file \(sha256\).*archive") as caught:
        fetch_package("pool/a.deb", **digests(PACKAGE))
    assert caught.value.code == "no-glibc-bundle"


def test_the_bundle_is_new_enough_for_the_pinned_runtime() -> None:
    lock = read_toml(target_dir("android") / "glibc.toml", error=AssertionError)["aarch64"]  # type: ignore[arg-type]

    def numbers(version: str) -> list[int]:
        return [int(n) for n in version.split(".")]

    pin = PINS[(DEFAULT_VERSION, "aarch64")]
    assert numbers(lock["version"]) >= numbers(pin.glibc)
    members = [member for package in lock["packages"] for member in package["files"].values()]
    # libstdc++.so.6.0.30 has GLIBCXX_3.4.30
    assert f"usr/lib/aarch64-linux-gnu/libstdc++.so.6.0.{pin.glibcxx.rpartition('.')[2]}" in members


def test_for_a_machine_without_a_lock_there_is_none() -> None:
    assert find_bundle("riscv64") is None
