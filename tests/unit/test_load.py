"""Loading samples: every kind of source, and every way it can be wrong."""

import contextlib
import dataclasses
import io
import os
import py_compile
import sys
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgepipe.array_ops.load import load_samples, open_samples
from edgepipe.array_ops.user_code import call_function
from edgepipe.artifact import TensorSpec
from edgepipe.data import AudioPreprocess, DataSource, ImagePreprocess, source_hash
from edgepipe.errors import DataError
from edgepipe.state import data_inputs

X = TensorSpec("x", (1, 1, 4, 4))


def npz(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


def grey(n=10):
    return np.arange(n * 16, dtype=np.float32).reshape(n, 1, 4, 4)


def png(color, size=(4, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def folder_of_images(root):
    for label, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (root / label).mkdir(parents=True)
        for i in range(5):
            (root / label / f"{i}.png").write_bytes(png(color))
    return root


def refused(source, specs=(X,)):
    with pytest.raises(DataError) as caught:
        load_samples(source, specs)
    assert caught.value.hint or caught.value.code
    return f"{caught.value.message} | {caught.value.hint}"


def test_npz_gives_inputs_and_labels_by_name(tmp_path):
    path = npz(tmp_path, x=grey(), labels=np.arange(10))
    samples = load_samples(DataSource(kind="npz", path=path), [X])
    np.testing.assert_array_equal(samples.inputs["x"], grey())
    assert samples.labels.tolist() == list(range(10))
    assert len(samples) == 10
    assert not samples.is_random


def test_npz_maps_model_inputs_to_arrays_of_other_names(tmp_path):
    path = npz(tmp_path, images=grey(), y=np.arange(10))
    source = DataSource(kind="npz", path=path, inputs={"x": "images"}, labels="y")
    assert load_samples(source, [X]).labels[3] == 3


def test_a_missing_array_is_named_with_its_near_miss_and_a_line_to_paste(tmp_path):
    text = refused(DataSource(kind="npz", path=npz(tmp_path, images=grey())))
    assert "no array 'x'" in text
    assert 'inputs = { x = "images" }' in text
    text = refused(
        DataSource(
            kind="npz", path=npz(tmp_path, images=grey()), inputs={"x": "image"}, labels="labels"
        )
    )
    assert "did you mean 'images'" in text


def test_labels_asked_for_by_name_must_exist(tmp_path):
    source = DataSource(kind="npz", path=npz(tmp_path, x=grey()), labels="target")
    assert "no array 'target' for the labels" in refused(source)


def test_channels_last_data_for_a_channels_first_model_is_named_as_such(tmp_path):
    spec = TensorSpec("x", (1, 1, 28, 28))
    text = refused(DataSource(kind="npz", path=npz(tmp_path, x=np.zeros((5, 28, 28, 1)))), [spec])
    assert "(28, 28, 1) looks like HWC; the model wants CHW" in text
    assert "array.transpose(0, 3, 1, 2)" in text
    assert 'image.layout = "CHW"' in text


def test_a_missing_sample_axis_is_named(tmp_path):
    text = refused(DataSource(kind="npz", path=npz(tmp_path, x=np.zeros((1, 4, 4)))))
    assert "array[None]" in text


def test_uint8_pixels_become_scaled_floats_per_channel(tmp_path):
    pixels = np.full((2, 3, 2, 2), 255, np.uint8)
    source = DataSource(
        kind="npz",
        path=npz(tmp_path, x=pixels),
        scale=1 / 255,
        mean=(0.0, 0.5, 1.0),
        std=(1.0, 0.5, 2.0),
    )
    inputs = load_samples(source, [TensorSpec("x", (1, 3, 2, 2))]).inputs["x"]
    assert inputs.dtype == np.float32
    # 255 * float32(1/255) is 1 to within one rounding
    np.testing.assert_allclose(inputs[0, :, 0, 0], [1.0, 1.0, 0.0], atol=2e-7)


def test_a_mean_for_another_number_of_channels_is_refused(tmp_path):
    source = DataSource(kind="npz", path=npz(tmp_path, x=grey()), mean=(0.1, 0.2, 0.3))
    assert "mean has 3 values" in refused(source)


def test_float_data_for_an_integer_input_is_refused(tmp_path):
    spec = TensorSpec("x", (1, 4), "int32")
    source = DataSource(kind="npz", path=npz(tmp_path, x=np.zeros((3, 4), np.float32)))
    assert "float32, the model wants int32" in refused(source, [spec])


def test_integers_that_do_not_fit_are_refused(tmp_path):
    spec = TensorSpec("x", (1, 4), "int8")
    source = DataSource(kind="npz", path=npz(tmp_path, x=np.full((3, 4), 200)))
    assert "beyond int8" in refused(source, [spec])


def test_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "objects are refused" in refused(DataSource(kind="npy", path=path))


def test_npy_serves_a_model_with_one_input_only(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, grey())
    assert len(load_samples(DataSource(kind="npy", path=path, limit=4), [X])) == 4
    assert "the model has 2" in refused(DataSource(kind="npy", path=path), [X, TensorSpec("y", (1, 2))])  # fmt: skip


def test_a_truncated_npz_is_refused_by_name(tmp_path):
    path = npz(tmp_path, x=grey())
    path.write_bytes(path.read_bytes()[:200])
    assert str(path) in refused(DataSource(kind="npz", path=path))


@given(st.integers(0, 700), st.integers(0, 255))
@example(447, 0x01)  # encrypted, says the archive
@example(447, 0x20)  # patched data, which zipfile does not know
@settings(max_examples=150, deadline=None)
def test_a_damaged_npz_raises_only_our_error(tmp_path_factory, position, value):
    path = npz(tmp_path_factory.mktemp("npz"), x=grey(4))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        load_samples(DataSource(kind="npz", path=path), [X])


def test_a_missing_file_is_named(tmp_path):
    assert "does not exist" in refused(DataSource(kind="npz", path=tmp_path / "no.npz"))


def test_an_empty_array_is_refused(tmp_path):
    assert "holds no samples" in refused(DataSource(kind="npz", path=npz(tmp_path, x=grey(0))))


def test_arrays_of_different_lengths_are_refused(tmp_path):
    path = npz(tmp_path, x=grey(10), labels=np.arange(9))
    assert "different numbers of samples ('x': 10; labels: 9)" in refused(
        DataSource(kind="npz", path=path)
    )


@given(st.integers(2, 7), st.integers(0, 6), st.integers(1, 40))
def test_fold_and_not_fold_split_the_samples_without_overlap(n, k, count):
    import tempfile
    from pathlib import Path

    k %= n
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        np.save(path, np.arange(count, dtype=np.float32)[:, None])
        found = []
        for option in ("fold", "not_fold"):
            source = DataSource(kind="npy", path=path, **{option: (k, n)})
            with contextlib.suppress(DataError):  # one side may be empty, which is refused
                loaded = load_samples(source, [TensorSpec("x", (1, 1))])
                found += loaded.inputs["x"].ravel().tolist()
    assert sorted(found) == list(range(count))


def test_limit_is_a_seeded_choice_in_stored_order(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100, dtype=np.float32)[:, None])

    def chosen(seed):
        source = DataSource(kind="npy", path=path, limit=10, seed=seed)
        return load_samples(source, [TensorSpec("x", (1, 1))]).inputs["x"].ravel().tolist()

    assert chosen(0) == sorted(chosen(0)) == chosen(0)
    assert chosen(0) != chosen(1)


def test_a_folder_of_images_is_labelled_by_its_folders(tmp_path):
    source = DataSource(
        kind="images", path=folder_of_images(tmp_path), image=ImagePreprocess(size=(2, 3)), scale=1 / 255
    )  # fmt: skip
    samples = load_samples(source, [TensorSpec("x", (1, 3, 2, 3))])
    assert samples.classes == ("cat", "dog")
    assert samples.labels.tolist() == [0] * 5 + [1] * 5
    np.testing.assert_allclose(samples.inputs["x"][0, :, 0, 0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(samples.inputs["x"][9, :, 0, 0], [0, 0, 1], atol=1e-6)


def test_classes_give_the_order_and_leave_other_folders_out(tmp_path):
    source = DataSource(
        kind="images",
        path=folder_of_images(tmp_path),
        image=ImagePreprocess(size=(4, 4), color="bgr", layout="HWC"),
        classes=("", "dog"),
    )
    samples = load_samples(source, [TensorSpec("x", (1, 4, 4, 3), layout="NHWC")])
    assert samples.labels.tolist() == [1] * 5
    assert samples.inputs["x"][0, 0, 0].tolist() == [255, 0, 0]  # blue first


def test_a_zip_of_images_reads_like_its_folder(tmp_path):
    folder = folder_of_images(tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path))
        archive.writestr("__MACOSX/cat/._0.png", b"junk")
    image = ImagePreprocess(size=(4, 4), color="gray")
    loaded = [
        load_samples(DataSource(kind="images", path=path, image=image), [X])
        for path in (folder, tmp_path / "images.zip")
    ]
    np.testing.assert_array_equal(loaded[0].inputs["x"], loaded[1].inputs["x"])
    np.testing.assert_array_equal(loaded[0].labels, loaded[1].labels)


def test_a_broken_image_is_named(tmp_path):
    folder_of_images(tmp_path)
    (tmp_path / "dog" / "3.png").write_bytes(png((0, 0, 0), (64, 64))[:60])
    source = DataSource(kind="images", path=tmp_path, image=ImagePreprocess(size=(4, 4)))
    text = refused(source, [TensorSpec("x", (1, 3, 4, 4))])
    assert "dog/3.png" in text
    assert "not a readable image" in text


def test_an_image_of_more_than_8_bits_is_refused_rather_than_cut_to_white(tmp_path):
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(pixels).save(tmp_path / "x.png")
    source = DataSource(kind="images", path=tmp_path, image=ImagePreprocess(size=(8, 8), color="gray"))  # fmt: skip
    with pytest.raises(DataError, match=r"x\.png has more than 8 bits"):
        load_samples(source, [TensorSpec("x", (1, 1, 8, 8))])


def test_images_without_preprocessing_or_of_an_unknown_class_are_refused(tmp_path):
    folder_of_images(tmp_path)
    assert "size = [height, width]" in refused(DataSource(kind="images", path=tmp_path))
    source = DataSource(
        kind="images", path=tmp_path, image=ImagePreprocess(size=(4, 4)), classes=("cat", "dogs")
    )
    assert "no folder 'dogs'; did you mean 'dog'?" in refused(source)


def test_a_clip_is_a_sequence_of_frames_for_a_model_with_state(tmp_path):
    folder = tmp_path / "yes"
    folder.mkdir()
    with wave.open(str(folder / "a.wav"), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(np.random.default_rng(0).integers(-9000, 9000, 16000).astype("<i2").tobytes())  # fmt: skip
    source = DataSource(
        kind="wavs", path=tmp_path, audio=AudioPreprocess(features="mfcc"), mean=tuple(range(10)),
    )  # fmt: skip
    state = TensorSpec("h", (1, 8), fed_by="h_next")
    steps = data_inputs([TensorSpec("x", (1, 10), layout="NC", source_layout="NC"), state])
    picture = TensorSpec("x", (1, 1, 49, 10), layout="NCHW", source_layout="NCHW")
    whole = load_samples(dataclasses.replace(source, mean=()), [picture]).inputs["x"]
    found = load_samples(source, steps).inputs["x"]
    assert found.shape == (1, 49, 10)
    np.testing.assert_array_equal(found, whole[:, 0] - np.arange(10, dtype=np.float32))


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("kind", ["npz", "python"])
def test_an_array_for_a_state_is_not_read_and_that_is_said(tmp_path, caplog, kind, order):
    x, h = np.zeros((3, 5, 10), order=order), np.ones((3, 8))
    np.savez(tmp_path / "d.npz", x=x, h=h)
    np.savez(tmp_path / "without.npz", x=x)
    (tmp_path / "d.py").write_text("import numpy as np\ndef make(path):\n    return dict(np.load(path))\n")  # fmt: skip
    specs = [TensorSpec("x", (1, 10)), TensorSpec("h", (1, 8), fed_by="h_next")]
    for file, told in (("d.npz", True), ("without.npz", False)):
        path = tmp_path / file
        options = {"path": path} if kind == "npz" else {"function": "d.py:make", "args": {"path": str(path)}}  # fmt: skip
        caplog.clear()
        found = open_samples(DataSource(kind=kind, root=tmp_path, **options), specs).take([0, 1, 2])
        assert list(found.inputs) == ["x"]
        assert ("h is not read: state starts at zero" in caplog.text) is told


def test_wavs_that_are_no_archive_are_refused(tmp_path):
    path = tmp_path / "clips.zip"
    path.write_bytes(b"PK\x03\x04 and then nothing")
    source = DataSource(kind="wavs", path=path, audio=AudioPreprocess())
    assert "neither a folder nor a readable .zip" in refused(source)


def test_a_python_function_is_found_beside_the_recipe_and_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("COUNT = 3\n")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def make(value):\n"
        "    import neighbour\n"
        "    return {'x': np.full((neighbour.COUNT, 1, 4, 4), value)}, np.arange(3)\n"
    )
    source = DataSource(kind="python", function="mine.py:make", args={"value": 2.5}, root=tmp_path)
    samples = load_samples(source, [X])
    assert samples.inputs["x"].dtype == np.float32
    assert samples.inputs["x"].max() == 2.5
    assert samples.labels.tolist() == [0, 1, 2]


def test_an_error_in_the_users_function_names_its_file_and_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json\ndef make():\n    return json.loads('not json')\n"
    )
    source = DataSource(kind="python", function="mine.py:make", root=tmp_path)
    with pytest.raises(DataError, match=r"JSONDecodeError.*mine\.py, line 3\)") as caught:
        load_samples(source, [X])
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def made(): pass\n", "did you mean 'made'"),
        ("def make(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("def make(): return [[1, 2], [3]]\n", "are no array"),
        ("def make(): return 'hello'\n", "not numbers"),
        ("def make(): return {'y': [1.0]}\n", "returned no array 'x'"),
        ("def make(): return 1, 2, 3\n", "tuple of 3"),
    ],
)
def test_a_python_source_that_cannot_be_used_says_why(tmp_path, code, said):
    (tmp_path / "mine.py").write_text(code)
    assert said in refused(DataSource(kind="python", function="mine.py:make", root=tmp_path))


def test_random_samples_are_marked_and_seeded():
    source = DataSource(kind="random", limit=5, seed=3)
    samples = load_samples(source, [X])
    assert samples.is_random
    assert samples.inputs["x"].shape == (5, 1, 4, 4)
    np.testing.assert_array_equal(samples.inputs["x"], load_samples(source, [X]).inputs["x"])
    assert "random noise" in samples.origin


def test_the_sign_language_zip_loads_with_its_ten_labels(data_dir):
    source = DataSource(
        kind="images",
        path=data_dir / "sign-language-digits" / "images.zip",
        image=ImagePreprocess(size=(64, 64)),
        limit=40,
        scale=1 / 255,
    )
    samples = load_samples(source, [TensorSpec("x", (1, 3, 64, 64))])
    assert samples.classes == tuple("0123456789")
    assert samples.inputs["x"].shape == (40, 3, 64, 64)
    assert 0.2 < samples.inputs["x"].mean() < 0.9


DATASET = """
from pathlib import Path
import numpy as np

class Squares:
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, row):
        if row == 13:
            raise OSError("disk broke")
        with open(Path(__file__).parent / "read", "a") as file:
            file.write(f"{row} ")
        return np.full((1, 2, 2), row, np.float32), row % 3

def make(count=10):
    return Squares(count)

def bare(count=10):
    return [np.full((1, 2, 2), row, np.float32) for row in range(count)]

def stream():
    return iter([1])
"""


def dataset_source(folder: Path, **options: Any) -> DataSource:
    (folder / "sets.py").write_text(DATASET)
    return DataSource(**{"kind": "dataset", "function": "sets.py:make", "root": folder, **options})


def test_a_dataset_is_read_sample_by_sample(tmp_path: Path) -> None:
    spec = TensorSpec("x", (1, 1, 2, 2))
    source = dataset_source(tmp_path, args={"count": 10}, not_fold=(0, 2), mean=(1.0,), std=(2.0,))
    lazy = open_samples(source, [spec])
    assert len(lazy) == 5
    found = lazy.take([4, 0])
    assert (tmp_path / "read").read_text().split() == ["1", "9"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]
    assert found.inputs["x"][:, 0, 0, 0].tolist() == [4.0, 0.0]  # (9 - 1) / 2, (1 - 1) / 2
    lazy.take([4])
    assert (tmp_path / "read").read_text().split() == ["1", "9"]  # kept
    whole = load_samples(source, [spec])
    np.testing.assert_array_equal(whole.inputs["x"][[4, 0]], found.inputs["x"])
    assert whole.labels is not None
    assert whole.labels.tolist() == [1, 0, 2, 1, 0]


def test_a_dataset_without_labels_gives_inputs(tmp_path: Path) -> None:
    spec = TensorSpec("x", (1, 1, 2, 2))
    found = load_samples(dataset_source(tmp_path, function="sets.py:bare"), [spec])
    assert found.labels is None
    assert found.inputs["x"].shape == (10, 1, 2, 2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"args": {"count": 20}}, "reading item 13"),
        ({"function": "sets.py:stream"}, "not a dataset"),
        ({"function": ""}, "needs a function"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_named(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=told):
        load_samples(dataset_source(tmp_path, **options), [TensorSpec("x", (1, 1, 2, 2))])


def test_two_folders_may_each_have_a_helper(tmp_path: Path) -> None:
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        (folder / "helper.py").write_text(f"VALUE = {number}\n")
        (folder / "data.py").write_text(
            "import helper\nimport numpy as np\ndef make():\n"
            "    import helper\n    return np.full((2, 3), helper.VALUE, np.float32)\n"
        )
        source = DataSource(kind="python", function="data.py:make", root=folder)
        found = load_samples(source, [TensorSpec("x", (1, 3))])
        assert found.inputs["x"].tolist() == [[number] * 3] * 2


def test_a_helper_is_run_as_it_is_now_whatever_was_compiled_or_imported_of_it_before(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text("import helper\ndef value():\n    return helper.VALUE\n")
    helper = tmp_path / "helper.py"
    helper.write_text("VALUE = 1\n")
    py_compile.compile(str(helper))
    before, hooks = helper.stat(), list(sys.path_hooks)
    for number in (2, 3):
        helper.write_text(f"VALUE = {number}\n")
        os.utime(
            helper, ns=(before.st_atime_ns, before.st_mtime_ns)
        )  # saved within the same second
        assert call_function("mine.py:value", tmp_path) == number
    assert sys.path_hooks == hooks


def test_an_environment_in_the_folder_of_a_recipe_is_imported_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / ".venv" / "packages"
    packages.mkdir(parents=True)
    monkeypatch.syspath_prepend(packages)
    (packages / "installed_here.py").write_text("")
    (tmp_path / "mine.py").write_text(
        "import installed_here\ndef value():\n    return type(installed_here.__loader__).__name__\n"
    )
    assert call_function("mine.py:value", tmp_path) == "SourceFileLoader"


@pytest.mark.parametrize("reference", ["mine.py:f", "nets.body:f"])
def test_what_helpers_of_a_function_import_decides_its_cache_key(
    reference: str, tmp_path: Path
) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "mine.py").write_text("from nets.body import f\n")
    (tmp_path / "nets" / "body.py").write_text("from common import WIDTH\n")
    (tmp_path / "nets" / "__init__.py").write_text("")
    (tmp_path / "common.py").write_text("WIDTH = 1\n")
    (tmp_path / "other.py").write_text("")
    before = source_hash(reference, tmp_path)
    (tmp_path / "other.py").write_text("# nobody imports it\n")
    assert source_hash(reference, tmp_path) == before
    (tmp_path / "common.py").write_text("WIDTH = 2\n")
    assert source_hash(reference, tmp_path) != before
