from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgepipe.errors import RecipeError
from edgepipe.recipe import load_buckets, load_recipe, parse_bucket

GOOD = """\
schema = 1
name = "tiny"
devices = ["localhost"]
[model]
builder = "net.py:build"
[[model.inputs]]
name = "x"
shape = [1, 4]
[data.calibration]
kind = "npz"
path = "c.npz"
[data.test]
kind = "npz"
path = "c.npz"
[evaluate]
data = "test"
metric = "top1"
[[stages]]
stage = "export_onnx"
[[stages]]
stage = "to_tflite"
[[stages]]
stage = "quantize_int8"
[measure]
session = "2 s"
[[gates]]
gate = "latency"
max = "20 ms"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text("def build(): ...\n")
    (tmp_path / "c.npz").write_bytes(b"")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_good_recipe_is_read(folder: Path) -> None:
    recipe = load_recipe(write(folder, GOOD))
    assert [s.name for s in recipe.stages] == ["export_onnx", "to_tflite", "quantize_int8"]
    assert recipe.gates[0].max == 0.02  # type: ignore[attr-defined]
    assert recipe.measure.session == 2.0
    assert recipe.data["calibration"].path == folder / "c.npz"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "tiny"', 'nmae = "tiny"', "nmae: unknown key; did you mean 'name'?"),
        ("schema = 1", "", '"schema = 1" is missing'),
        ('[data.test]', '[data.test]\nroot = "/"', "[data.test]: root: unknown key (legal: kind, path,"),
        ('stage = "to_tflite"', 'stage = "to_tflit"', "unknown stage 'to_tflit'; did you mean 'to_tflite'?"),
        ('stage = "export_onnx"', 'stage = "quantize_int8"', "[[stages]] 1 (quantize_int8): needs tflite, but the model gives torch; put to_tflite"),
        ('stage = "quantize_int8"', 'stage = "quantize_int8"\ninput_dtyp = "int8"', "input_dtyp: unknown key; did you mean 'input_dtype'?"),
        ('stage = "quantize_int8"', 'stage = "quantize_int8"\ninput_dtype = "int4"', "input_dtype: input should be 'int8', 'uint8' or 'float32'"),
        ('max = "20 ms"', "max = 20", "20 has no unit"),
        ('max = "20 ms"', 'max = "20 MB"', "is not a time; 'MB' is a unit of size"),
        ('gate = "latency"', 'gate = "latensy"', "unknown gate 'latensy'; did you mean 'latency'?"),
        ('session = "2 s"', 'sesion = "2 s"', "sesion: unknown key; did you mean 'session'?"),
        ('devices = ["localhost"]', 'devices = ["localhsot"]', "unknown profile 'localhsot'; did you mean 'localhost'?"),
        ('path = "c.npz"', 'path = "gone.npz"', "gone.npz does not exist"),
        ('builder = "net.py:build"', 'builder = "nett.py:build"', "nett.py does not exist"),
        ('builder = "net.py:build"', 'builder = "net.py"', "names no Python function"),
        ('builder = "net.py:build"', 'file = "net.pth"', "weights of a PyTorch model"),
        ('metric = "top1"', 'metric = "topp1"', "unknown metric 'topp1'; did you mean 'top1'?"),
        ('data = "test"', 'data = "tset"', "no [data.tset]; did you mean 'test'?"),
        ("[data.calibration]", "[data.calibrate]", "reads [data.calibration], which is not there; did you mean 'calibrate'?"),
        ('kind = "npz"', 'kind = "npz"\nfold = [5, 5]', "fold [k, n] needs 0 <= k < n"),
        ('kind = "npz"', 'kind = "wavs"', "declared preprocessing"),
        ('path = "c.npz"', 'path = "${EDGEPIPE_NO_SUCH_VARIABLE}/c.npz"', "EDGEPIPE_NO_SUCH_VARIABLE is not set"),
        ('name = "x"\nshape = [1, 4]', 'name = "x"\nshape = "1x4"', "shape"),
        ("schema = 1", "schema = 99", "schema 99 is newer"),
        ("[model]", "[model", "is not valid TOML"),
        ('["localhost"]', '[["localhost"]]', "unknown profile ['localhost']"),
        ('["localhost"]', '["localhost", "localhost"]', "'localhost' is named twice"),
        ('path = "c.npz"', "path = 2026-11-23", "2026-11-23 is a date or a time"),
        ('path = "c.npz"', 'path = "~nobody-of-that-name/c.npz"', "~nobody-of-that-name/c.npz does not exist"),
        ('path = "c.npz"', f'path = "{"a" * 5000}"', "aaa does not exist"),
        ('path = "c.npz"', 'path = "."', "is a folder, not a .npz file"),
        ('builder = "net.py:build"', f'file = "{"a" * 5000}.onnx"', "aaa.onnx does not exist"),
        ('builder = "net.py:build"', f'builder = "{"a" * 5000}.py:build"', "aaa.py does not exist"),
        ('builder = "net.py:build"', 'file = "m.onnx"\nweights = "c.npz"', "names a file (m.onnx) and weights"),
        ('name = "x"\nshape = [1, 4]', 'name = "x"', "x has no shape"),
        ('shape = [1, 4]', 'shape = [0, 4]', "should begin with the batch"),
        ('shape = [1, 4]', 'shape = [1, 4]\nlayout = "NCHW"', "should name each of the 2 axes once"),
        ('shape = [1, 4]', 'shape = [7, 1, 4]\nlayout = "TNC"', "layout 'TNC' has the samples (N) on another axis"),
        ('shape = [1, 4]', 'shape = [1, 4]\ndtype = "floaty"', "dtype: input should be 'float32'"),
        ('kind = "npz"', 'kind = "npz"\nseed = -1', "[data.calibration]: seed = -1 is negative"),
        ('kind = "npz"', 'kind = "npz"\nscale = nan', "scale: input should be a finite number"),
        ('kind = "npz"', 'kind = "npz"\nfold = [0, 2]\nnot_fold = [0, 2]', "fold and not_fold are both set"),
        ('name = "tiny"', 'name = "tiny\\n"', "is not a plain name"),
        ('name = "tiny"', f'name = "{"t" * 300}"', "is not a plain name"),
        ('name = "tiny"', 'name = "tiny"\nseed = -1', "seed: -1 is not a whole number from 0"),
        ('max = "20 ms"', 'max = "-20 ms"', "[[gates]] 1 (latency): max = -0.02 should be 0 or more"),
        ('max = "20 ms"', 'max = "1e999 s"', "max: input should be a finite number"),
        ('max = "20 ms"', 'max = "20 ms"\nconfidence = 99.0', "confidence = 99 should be from 0.5"),
        ('max = "20 ms"', 'max = "20 ms"\nconfidence = 0.0', "confidence = 0 should be from 0.5"),
        ('max = "20 ms"', 'max = "20 ms"\nconfidence = nan', "confidence: input should be a finite number"),
        ('gate = "latency"\nmax = "20 ms"', 'gate = "task_metric"\nmin = 90.0', "min = 90 should be a share from 0 to 1"),
        ('gate = "latency"\nmax = "20 ms"', 'gate = "task_metric"\nmin = nan', "min: input should be a finite number"),
        ('gate = "latency"\nmax = "20 ms"', 'gate = "device_agreement"\nmax_mismatch = -1.0', "max_mismatch = -1 should be a share"),
        ('gate = "latency"\nmax = "20 ms"', 'gate = "accuracy_drop"\nmax = "2 points"\nhard_max = "1 point"', "hard_max = 1 should be max or more"),
        ('[evaluate]\ndata = "test"', '[evaluate]\ndata = "calibration"', "is the calibration set of [[stages]]"),
        ('[[stages]]\nstage = "export_onnx"', '[[stages]]\nstage = "finetune"\ndata = "test"\n[[stages]]\nstage = "export_onnx"', "[evaluate] data = 'test' is what [[stages]] 1 (finetune) learns from"),
        ('[[stages]]\nstage = "export_onnx"', '[[stages]]\nstage = "finetune"\ndata = "calibration"\nvalidation = "test"\nearly_stop = 2\n[[stages]]\nstage = "export_onnx"', "[evaluate] data = 'test' is what [[stages]] 1 (finetune) chooses by"),
        ('[[stages]]\nstage = "quantize_int8"', '[[stages]]\nstage = "qat"\ndata = "calibration"\ncalibration = "test"\n[[stages]]\nstage = "quantize_int8"', "[evaluate] data = 'test' is the calibration set of [[stages]] 3 (qat)"),
        ('[evaluate]\ndata = "test"\nmetric = "top1"\n', '[[gates]]\ngate = "device_agreement"\n', "gate device_agreement needs data"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_and_key(folder: Path, old: str, new: str, named: str) -> None:
    assert old in GOOD
    path = write(folder, GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert named in caught.value.message
    assert str(path) in caught.value.message


def test_all_mistakes_are_reported_at_once(folder: Path) -> None:
    text = GOOD.replace("20 ms", "20 MB").replace("to_tflite", "to_tflit").replace("top1", "topp1")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    for named in ("'MB' is a unit", "to_tflit", "topp1"):
        assert named in caught.value.message


def test_a_device_needs_a_tflite_model(folder: Path) -> None:
    text = GOOD[: GOOD.index('[[stages]]\nstage = "to_tflite"')] + GOOD[GOOD.index("[measure]") :]
    with pytest.raises(RecipeError, match="last stage gives onnx"):
        load_recipe(write(folder, text))


def test_checking_a_recipe_imports_no_framework(folder: Path) -> None:
    path = write(folder, GOOD)
    code = (
        "import sys; from edgepipe.cli import main\n"
        f"assert main(['check', {str(path)!r}]) == 0\n"
        "bad = {'torch', 'numpy', 'onnx', 'ai_edge_litert', 'paramiko', 'tensorflow'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_paths_may_name_environment_variables(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLES", str(folder))
    recipe = load_recipe(write(folder, GOOD.replace('"c.npz"', '"${SAMPLES}/c.npz"')))
    assert recipe.data["test"].path == folder / "c.npz"


def test_the_accuracy_drop_counts_from_the_trained_model(folder: Path) -> None:
    assert load_recipe(write(folder, GOOD)).reference_stage == 1
    (folder / "w.safetensors").write_bytes(b"")
    weighted = GOOD.replace("[[model.inputs]]", 'weights = "w.safetensors"\n[[model.inputs]]', 1)
    assert load_recipe(write(folder, weighted)).reference_stage == 0


# --- streaming


STREAMING = GOOD.replace('"to_tflite"', '"to_tflite"\nstreaming = true')
NO_SAMPLES = STREAMING.replace('[evaluate]\ndata = "test"\nmetric = "top1"\n', "")


def test_a_streaming_model_is_not_judged_by_samples_that_are_run_from_fresh_state(
    folder: Path,
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, STREAMING))
    assert "[evaluate]: the model of [[stages]] 2 keeps its state" in caught.value.message
    assert "[[stages]] 3 (quantize_int8): the model of [[stages]] 2" in caught.value.message
    assert "no ranges can be taken" in caught.value.message


def test_a_streaming_model_can_be_measured(folder: Path) -> None:
    text = NO_SAMPLES.replace('[[stages]]\nstage = "quantize_int8"\n', "")
    assert "[evaluate]" not in text
    assert load_recipe(write(folder, text)).stages[-1].streaming  # type: ignore[attr-defined]


# --- state


STATE = GOOD.replace(
    "[[model.inputs]]",
    '[model.state]\nh = "h_next"\n[[model.inputs]]\nname = "h"\nshape = [1, 8]\n[[model.inputs]]', 1,
)  # fmt: skip


def test_a_model_with_state_may_be_trained_and_judged_at_each_step(folder: Path) -> None:
    training = '"finetune"\ndata = "calibration"\nback_steps = 3\n[[stages]]\nstage = "export_onnx"'
    trained = load_recipe(write(folder, STATE.replace('"export_onnx"', training, 1)))
    assert trained.stages[0].back_steps == 3  # type: ignore[attr-defined]
    found = load_recipe(write(folder, STATE.replace("[evaluate]", '[evaluate]\nsteps = "each"')))
    assert found.model.state == {"h": "h_next"}
    assert found.evaluate is not None
    assert found.evaluate.steps == "each"


def test_a_recipe_whose_state_is_wired_wrongly_is_refused(folder: Path) -> None:
    for before, after, message in (
        ('h = "h_next"', 'g = "h_next"', "'g' is no input of the model"),
        ('h = "h_next"', 'h = "h_next"\nx = "x_next"', "every input is state"),
        ("[data.test]", 'inputs = { h = "h0" }\n[data.test]', "'h' is state"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(folder, STATE.replace(before, after, 1)))
    with pytest.raises(RecipeError, match=r"has no \[model.state\], so there is one step"):
        load_recipe(write(folder, GOOD.replace("[evaluate]", '[evaluate]\nsteps = "each"')))
    with pytest.raises(RecipeError, match=r"back_steps: the model has no \[model.state\]"):
        load_recipe(write(folder, GOOD.replace('"export_onnx"', '"finetune"\nback_steps = 3', 1)))


def test_state_that_is_wired_is_not_streamed_as_well(folder: Path) -> None:
    with pytest.raises(RecipeError, match="leave streaming out") as caught:
        load_recipe(write(folder, STATE.replace('"to_tflite"', '"to_tflite"\nstreaming = true')))
    assert "h_next" not in caught.value.message


# --- buckets


@pytest.fixture
def buckets(folder: Path) -> Path:
    text = GOOD.replace("shape = [1, 4]", 'shape = [1, "${length}", "${width}"]')
    text = text.replace('path = "c.npz"', 'path = "c_${length}.npz"')
    assert text.count("${") == 4
    for length in (16, 32):
        (folder / f"c_{length}.npz").write_bytes(b"")
    path = folder / "buckets.toml"
    path.write_text(f"{text}\n[buckets]\nlength = [16, 32]\nwidth = [4]\n")
    return path


def test_a_bucket_is_a_recipe_of_its_own(buckets: Path) -> None:
    made = [load_recipe(buckets, {"length": n, "width": 4}) for n in (16, 32)]
    assert [r.model.inputs[0].shape for r in made] == [(1, 16, 4), (1, 32, 4)]
    assert [r.name for r in made] == ["tiny-length16-width4", "tiny-length32-width4"]
    found = [r.data["calibration"].path for r in made]
    assert [p.name for p in found if p] == ["c_16.npz", "c_32.npz"]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({}, "none was chosen of length"),
        ({"length": 16}, "none was chosen of width"),
        ({"length": 17, "width": 4}, "length = 17 is none of them"),
        ({"lenght": 16}, "has no bucket 'lenght'; did you mean 'length'"),
    ],
)
def test_a_bucket_that_is_not_declared_or_not_chosen_is_told_with_the_choices(
    buckets: Path, chosen: dict[str, int], told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(buckets, chosen)
    assert told in caught.value.message
    assert "length = 16, 32" in caught.value.message


def test_all_buckets_are_loaded_in_order_or_those_that_are_asked_for(buckets: Path) -> None:
    names = ["tiny-length16-width4", "tiny-length32-width4"]
    assert [r.name for r in load_buckets(buckets)] == names
    assert [r.bucket for r in load_buckets(buckets)] == [
        {"length": n, "width": 4} for n in (16, 32)
    ]
    assert [r.name for r in load_buckets(buckets, {"length": [32]})] == names[1:]
    assert [r.name for r in load_buckets(buckets, {"length": [32, 16], "width": [4]})] == names[
        ::-1
    ]
    for wrong, told in (({"length": [16, 17]}, "length = 17 is none of them"), ({"lenght": [16]}, "did you mean")):  # fmt: skip
        with pytest.raises(RecipeError, match=told):
            load_buckets(buckets, wrong)


def test_a_recipe_without_buckets_is_the_only_one(folder: Path) -> None:
    (made,) = load_buckets(write(folder, GOOD))
    assert (made.name, made.bucket) == ("tiny", {})
    with pytest.raises(RecipeError, match="has no bucket 'length'"):
        load_buckets(write(folder, GOOD), {"length": [16]})


def test_what_is_wrong_with_every_bucket_is_told_once_and_what_is_not_by_name(
    folder: Path, buckets: Path
) -> None:
    text = buckets.read_text()
    buckets.write_text(text.replace('metric = "top1"', 'metric = "top9"'))
    with pytest.raises(RecipeError) as caught:
        load_buckets(buckets)
    assert caught.value.message.count("top9") == 1
    buckets.write_text(text)
    for length in (16, 32):
        (folder / f"c_{length}.npz").unlink()
    with pytest.raises(RecipeError) as caught:
        load_buckets(buckets)
    assert [line.split(":")[0] for line in caught.value.message.splitlines() if line.startswith("bucket")] == [
        "bucket length=16 width=4", "bucket length=32 width=4",
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["length = 16", "length = [8, 8]", "length = []", "length = [0]", "length = [1.5]", '"a b" = [1]'])  # fmt: skip
def test_buckets_are_lists_of_sizes(folder: Path, wrong: str) -> None:
    (folder / "r.toml").write_text(f"{GOOD}\n[buckets]\n{wrong}\n")
    with pytest.raises(RecipeError, match=r"\[buckets\] should give sizes"):
        load_recipe(folder / "r.toml")


@pytest.mark.parametrize("text", ["length", "length=", "=3", "length=-3", "length=x"])
def test_a_bucket_on_the_command_line_is_name_and_size(text: str) -> None:
    assert parse_bucket(["a=1", "b=20", "a=3", "a=1"]) == {"a": [1, 3], "b": [20]}
    with pytest.raises(RecipeError, match="is not NAME=SIZE"):
        parse_bucket([text])
