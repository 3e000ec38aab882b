"""Reading samples a few at a time gives what reading them at once gives, and takes no memory for it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import rescue
from edgepipe.array_ops import readers
from edgepipe.array_ops.calibration import check_calibration, file_batches
from edgepipe.array_ops.load import Samples, open_samples
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.errors import DataError
from edgepipe.rescue import in_common, kept_hashes, sample_hashes

SPECS = (TensorSpec("x", (1, 2, 3), layout="NCT"), TensorSpec("y", (1, 4)))


@given(
    count=st.integers(1, 40),
    limit=st.integers(0, 30),
    fold=st.none() | st.tuples(st.integers(0, 1), st.just(2)),
    form=st.sampled_from(["npz", "compressed", "fortran"]),
    dtype=st.sampled_from(["u1", "<f4", ">f8", "<i2"]),
    block=st.integers(1, 200),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_stream_of_an_archive_gives_what_numpy_reads(
    count: int, limit: int, fold: tuple[int, int] | None, form: str, dtype: str, block: int, data: st.DataObject
) -> None:  # fmt: skip
    x = np.arange(count * 6).reshape(count, 2, 3).astype(dtype)
    y = np.arange(count * 4).reshape(count, 4)[::-1].astype(np.float32)
    if form == "fortran":
        x = np.asfortranarray(x)
    labels = np.arange(count) % 5
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(readers, "BLOCK_BYTES", block):
        path = Path(folder, "d.npz")
        (np.savez_compressed if form == "compressed" else np.savez)(path, x=x, y=y, labels=labels)
        source = DataSource(kind="npz", path=path, limit=limit, fold=fold, scale=0.5)
        keep = np.arange(count) if fold is None else np.arange(count)[np.arange(count) % 2 == fold[0]]  # fmt: skip
        if not len(keep):
            with pytest.raises(DataError, match="none of its"):
                open_samples(source, SPECS)
            return
        if 0 < limit < len(keep):
            keep = np.sort(np.random.default_rng(0).choice(keep, size=limit, replace=False))
        stream = open_samples(source, SPECS)
        chunks = list(stream.chunks())
        for name, stored in (("x", x), ("y", y)):
            expected = stored[keep].astype(np.float32) * np.float32(0.5)
            np.testing.assert_array_equal(np.concatenate([c.inputs[name] for c in chunks]), expected)  # fmt: skip
        np.testing.assert_array_equal(np.concatenate([c.labels for c in chunks]), labels[keep])
        rows = data.draw(st.lists(st.integers(0, len(keep) - 1), min_size=1, max_size=8))
        taken = stream.take(rows)
        np.testing.assert_array_equal(taken.inputs["y"], y[keep][rows] * np.float32(0.5))
        np.testing.assert_array_equal(taken.labels, labels[keep][rows])
        again = stream.subset(rows)
        np.testing.assert_array_equal(
            next(again.chunks()).inputs["x"][0], stream.take([min(rows)]).inputs["x"][0]
        )


def test_noise_in_blocks_is_the_noise_of_one_draw() -> None:
    generator = np.random.default_rng(3)
    expected = [generator.standard_normal((50, *s.shape[1:]), dtype=np.float32) for s in SPECS]
    with mock.patch.object(readers, "BLOCK_BYTES", 256):
        stream = open_samples(DataSource(kind="random", limit=50, seed=3), SPECS)
        for spec, array in zip(SPECS, expected, strict=True):
            found = np.concatenate([c.inputs[spec.name] for c in stream.chunks()])
            np.testing.assert_array_equal(found, array)
            np.testing.assert_array_equal(stream.take([7, 49, 8]).inputs[spec.name], array[[7, 49, 8]])  # fmt: skip


def test_an_archive_damaged_behind_the_samples_that_are_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    values = np.random.default_rng(0).normal(size=(300, 4))
    np.savez(path, y=values)
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[0].header_offset
    content = bytearray(path.read_bytes())
    content[start + 5000] ^= 1
    path.write_bytes(content)
    stream = open_samples(DataSource(kind="npz", path=path), SPECS[1:])
    with pytest.raises(DataError, match="CRC"):
        stream.take([0])


def test_a_file_that_lost_its_end_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    np.save(path, np.ones((300, 4)))
    stream = open_samples(DataSource(kind="npy", path=path), SPECS[1:])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="ends before sample"):
        stream.take([299])


def test_a_wrong_shape_is_told_before_a_sample_is_read(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    np.save(path, np.ones((300, 5)))
    with pytest.raises(DataError, match="wants samples of shape"):
        open_samples(DataSource(kind="npy", path=path), SPECS[1:])


@given(st.integers(2, 60), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_found_of_a_stream_is_what_numpy_finds(count: int, block: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(3, 2, (count, 2, 3)).astype(np.float32)
    x[:, 1] = 0.5
    y = np.random.default_rng(seed + 1).normal(size=(count, 4)).astype(np.float32)
    whole = Samples({"x": x, "y": y}, None, (), origin="m")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(readers, "BLOCK_BYTES", block):
        path = Path(folder, "d.npz")
        np.savez(path, x=x, y=y)
        stream = open_samples(DataSource(kind="npz", path=path), SPECS)
        report = check_calibration(stream, SPECS, min_samples=1, reference=stream)
        assert list(sample_hashes(stream)) == list(sample_hashes(whole))
        for ours, theirs in zip(file_batches(stream, SPECS), file_batches(whole, SPECS), strict=True):  # fmt: skip
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])
    for found, array in zip(report.inputs, (x, y), strict=True):
        assert (found.minimum, found.maximum) == (array.min(), array.max())
        # float64 sums of at most 360 values near 1: far below 1e-12
        np.testing.assert_allclose(found.mean, array.mean(dtype=np.float64), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.std, array.std(dtype=np.float64), rtol=1e-12)
        assert found.shape == array.shape
    assert "input 'x': channels [1] never change" in report.warnings


READ = """
import re, sys
from collections.abc import Iterator
from pathlib import Path
import numpy as np
from edgepipe.array_ops.calibration import check_calibration, file_batches
from edgepipe.array_ops.load import open_samples
from edgepipe.artifact import TensorSpec
from edgepipe.data import DataSource
from edgepipe.rescue import kept_hashes

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

path = Path(sys.argv[1])
spec = TensorSpec("x", (1, 1, 64, 64))
stream = open_samples(DataSource(kind=path.suffix[1:], path=path, scale=1 / 255), [spec])
check_calibration(stream.subset(range(100)), [spec])
before = peak()
check_calibration(stream, [spec])
assert sum(1 for _ in file_batches(stream, [spec])) == len(stream)
kept_hashes(stream)
stream.take([5, len(stream) - 1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["npy", "npz"])
def test_memory_does_not_grow_with_the_number_of_samples(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{form}"
    pixels = np.resize(np.random.default_rng(0).integers(0, 255, 4096 * 7, np.uint8), (6000, 1, 64, 64))  # fmt: skip
    if form == "npy":
        np.save(path, pixels)
    else:
        np.savez_compressed(path, x=pixels)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)  # fmt: skip
    # 24.6 MB as stored and 98 MB as floats; a few blocks of 1 MiB as floats are held at once
    assert int(done.stdout) < 8e6


def test_kept_hashes_are_all_up_to_a_number_and_then_estimate_how_many_are_common() -> None:
    values = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    whole = Samples({"y": values}, None, (), origin="m")
    few = whole.take(range(0, 200))
    assert sorted(sample_hashes(whole)) == kept_hashes(whole)
    assert in_common(few, kept_hashes(whole), len(whole)) == 200
    with mock.patch.object(rescue, "KEPT_HASHES", 600):
        kept = kept_hashes(whole)
    assert len(kept) == 600
    # a fifth of them is kept: 40 of 200 are found, give or take 3 times sqrt(200 * 0.2 * 0.8)
    assert 200 - 85 <= in_common(few, kept, len(whole)) <= 200 + 85


@given(
    st.integers(0, 600), st.lists(st.integers(0, 19), min_size=1, max_size=8), st.integers(1, 99)
)
@settings(max_examples=30, deadline=None)
def test_what_is_kept_in_memory_changes_no_sample(room: int, rows: list[int], block: int) -> None:
    values = np.arange(80, dtype=np.float32).reshape(20, 4)
    labels, asked = np.arange(20), list[int]()

    def read(wanted: np.ndarray) -> Iterator[readers.Block]:
        for start in range(0, len(wanted), block):
            part = wanted[start : start + block]
            asked.extend(part.tolist())
            yield {"y": values[part]}, labels[part]

    reader = readers.remembering(readers.Reader(20, read), room)
    whole = np.arange(20)
    one, other = reader.read(whole), reader.read(np.unique(rows))  # two passes at once
    next(one)
    for expected, (inputs, label) in zip(np.unique(rows), other, strict=True):
        np.testing.assert_array_equal(inputs["y"], values[[expected]])
        assert label is not None
        assert label.tolist() == [expected]
    np.testing.assert_array_equal(np.concatenate([i["y"] for i, _ in one]), values[1:])
    asked.clear()
    np.testing.assert_array_equal(np.concatenate([i["y"] for i, _ in reader.read(whole)]), values)
    assert len(asked) == 20 - min(20, room // 16)  # a sample of 4 floats takes 16 bytes
