"""Accuracy on the device: the validation set runs there, on the very file that was timed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepipe import cli
from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.bench import MeasureOptions, measure
from edgepipe.data import DataSource
from edgepipe.device.base import Device
from edgepipe.device.local import LocalDevice
from edgepipe.errors import TransferError
from edgepipe.evaluate import DeviceEvaluation, choose_evaluation
from edgepipe.gate import DeviceAccuracyDropGate, Evidence, Status
from edgepipe.measurement import Measurement
from edgepipe.resources import target_dir
from edgepipe.tflite_ops.inspect import tensor_specs
from edgepipe.tflite_ops.tiny import tiny_tflite

from .test_bench import Wrapped, profile

pytestmark = pytest.mark.slow

QUICK = MeasureOptions(sessions=1, memory_sessions=0, warmup=0.02, session=0.02)


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    """y = 2 x + 1: the class of a sample is where it is largest."""
    path = tmp_path / "model.tflite"
    path.write_bytes(tiny_tflite())
    inputs, outputs = tensor_specs(path)
    return make_artifact("tflite", path, inputs=inputs, outputs=outputs)


@pytest.fixture
def evaluation(model: Artifact, tmp_path: Path) -> DeviceEvaluation:
    """60 of 300 samples of four classes, a tenth of them shown as the next class."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    shown = np.where(generator.random(300) < 0.1, (labels + 1) % 4, labels)
    images = np.eye(4, dtype=np.float32)[shown]
    np.savez(tmp_path / "set.npz", x=images, labels=labels)
    return choose_evaluation(
        shipped=model, reference=model, inputs=(TensorSpec("x", (1, 4)),),
        source=DataSource(kind="npz", path=tmp_path / "set.npz"), metric="top1", root=tmp_path,
        count=60, seed=1,
    )  # fmt: skip


def on_board(
    model: Artifact, device: Device, work: Path, evaluation: DeviceEvaluation,
    options: MeasureOptions = QUICK,
) -> dict[str, Measurement]:  # fmt: skip
    result = measure(model, device, profile(work), options, evaluation=evaluation)
    return {m.metric: m for m in result.measurements}


def judged(found: dict[str, Measurement], model: Artifact, max_points: float) -> Status:
    gate = DeviceAccuracyDropGate(max=max_points)
    return gate.judge(Evidence(model.sha256, "test", found)).status


def test_the_board_answers_a_sample_of_the_validation_set(
    device: Device, model: Artifact, tmp_path: Path, evaluation: DeviceEvaluation
) -> None:
    found = on_board(model, device, tmp_path / "work", evaluation)
    shown = np.asarray(evaluation.inputs["x"]).argmax(axis=1)
    right = float((shown == evaluation.labels).mean())
    assert 0.7 < right < 1
    assert found["device_task_metric"].samples == ((pytest.approx(right),),)
    assert found["device_accuracy_drop"].samples == ((0.0,),)
    assert found["device_flips"].samples == found["device_mismatch"].samples == ((0.0,),)
    context = found["device_task_metric"].context
    assert (context["samples"], context["samples_total"], context["samples_seed"]) == (60, 300, 1)
    assert context["model_sha256"] == model.sha256
    assert context["runtime_sha256"] == found["latency_wall"].context["runtime_sha256"]
    assert judged(found, model, 0.0) is Status.PASS


def test_a_long_set_is_answered_in_pieces_that_are_told_of(
    model: Artifact, tmp_path: Path, evaluation: DeviceEvaluation,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("edgepipe.bench.OUTPUTS_PER_SESSION", 25)
    caplog.set_level("INFO")
    found = on_board(model, LocalDevice(), tmp_path / "work", evaluation)
    assert found["device_mismatch"].context["inferences"] == 60
    assert found["device_mismatch"].samples == ((0.0,),)
    told = [r.message for r in caplog.records if r.message.startswith("outputs ")]
    assert [line.partition(":")[0] for line in told] == [
        "outputs 1/3",
        "outputs 2/3",
        "outputs 3/3",
    ]


# --- a board that computes wrongly


@pytest.fixture
def wrong_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board whose runtime swaps the first two values of every tenth output."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "edgepipe" / "targets" / "linux"
    shutil.copytree(target_dir("linux"), folder)
    text = (folder / "worker.py").read_text()
    honest = "raw = model.read(tensor)\n"
    wrong = (
        "raw = model.read(tensor)\n"
        "                    spec['n'] = spec.get('n', 0) + 1\n"
        "                    if spec['n'] % 10 == 0:\n"
        "                        raw = raw[4:8] + raw[:4] + raw[8:]\n"
    )
    assert text.count(honest) == 1
    (folder / "worker.py").write_text(text.replace(honest, wrong))


@pytest.mark.usefixtures("wrong_board")
def test_a_board_that_computes_wrongly_fails_its_gates(
    model: Artifact, tmp_path: Path, evaluation: DeviceEvaluation
) -> None:
    found = on_board(model, LocalDevice(), tmp_path / "work", evaluation)
    shown = np.asarray(evaluation.inputs["x"]).argmax(axis=1)[9::10]
    swapped = int((shown < 2).sum())  # of the six answers changed, those whose best class moved
    assert swapped > 0
    assert found["device_mismatch"].samples == ((pytest.approx(2 * swapped / (4 * 60)),),)
    assert found["device_flips"].samples == ((pytest.approx(swapped / 60),),)
    flip = found["device_flips"].context["flips"][0]
    assert {flip["host"], flip["device"]} == {0, 1}
    drop = found["device_accuracy_drop"]
    assert drop.samples[0][0] > 0
    assert judged(found, model, 0.0) is Status.FAIL
    lost = {c["class"] for c in drop.context["by_class"] if c["right"] < c["reference_right"]}
    assert lost <= {"0", "1"}
    assert lost


class Meddling(Wrapped):
    """Something happens to a file between the board and this host, or on the board itself."""

    def __init__(self, inner: Device, *, on_pull: bool = False, file: str = "") -> None:
        super().__init__(inner)
        self.on_pull, self.file = on_pull, file

    def push(self, local: Path, remote: str) -> bool:
        moved = super().push(local, remote)
        if self.file and remote.endswith(self.file):
            damage(Path(remote))
        return moved

    def pull(self, remote: str, local: Path) -> None:
        super().pull(remote, local)
        if self.on_pull and ".bin" in remote:
            damage(local)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_outputs_file_altered_on_its_way_is_refused(
    model: Artifact, tmp_path: Path, evaluation: DeviceEvaluation
) -> None:
    with pytest.raises(TransferError, match="outputs"):
        on_board(model, Meddling(LocalDevice(), on_pull=True), tmp_path / "work", evaluation)


@pytest.mark.parametrize("file", [".tflite", "libLiteRt.so", "inputs.bin"])
def test_a_file_altered_on_the_board_is_refused_before_it_is_used(
    model: Artifact, tmp_path: Path, evaluation: DeviceEvaluation, file: str
) -> None:
    with pytest.raises(TransferError, match="sha256"):
        on_board(model, Meddling(LocalDevice(), file=file), tmp_path / "work", evaluation)


def test_samples_that_do_not_fit_on_the_board_are_refused_before_they_are_pushed(
    model: Artifact, tmp_path: Path, evaluation: DeviceEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepipe.bench.MIN_FREE_BYTES", 1 << 60)
    device = Wrapped(LocalDevice())
    with pytest.raises(TransferError, match="60 samples need") as caught:
        on_board(model, device, tmp_path / "work", evaluation)
    assert caught.value.code == "disk-full"
    assert not [path for path in device.pushed if path.endswith(("inputs.bin", ".tflite"))]


# --- a recipe

RECIPE = """\
schema = 1
name = "classes"
devices = ["localhost"]
[model]
file = "model.tflite"
[data.test]
kind = "npz"
path = "set.npz"
[evaluate]
data = "test"
[measure]
threads = 1
sessions = 1
memory_sessions = 0
warmup = "20 ms"
session = "20 ms"
ops = false
evaluate_samples = 60
[[gates]]
gate = "device_accuracy_drop"
max = "1 point"
[[gates]]
gate = "device_task_metric"
min = 0.7
"""


@pytest.mark.usefixtures("model", "evaluation")
def test_a_recipe_gates_on_what_the_board_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "recipe.toml", "--device", "local", "--json"]
    Path("recipe.toml").write_text(RECIPE)
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    verdicts = {v["gate"]: v for v in result["verdicts"]}
    assert verdicts["device_accuracy_drop"]["status"] == "PASS"
    assert "60 samples" in verdicts["device_accuracy_drop"]["reason"]
    folder = Path(".edgepipe", "runs", result["run"], "measurements", "localhost")
    context = json.loads((folder / "device_accuracy_drop.json").read_text())["context"]
    assert (context["samples"], context["samples_total"], context["stratified"]) == (60, 300, True)
    assert sum(c["n"] for c in context["by_class"]) == 60

    # other gates judge the same evidence, other samples are other evidence
    Path("recipe.toml").write_text(RECIPE.replace("min = 0.7", "min = 1.0"))
    assert cli.main(arguments) == 1
    again = json.loads(capsys.readouterr().out)
    assert all(step["cached"] for step in again["steps"])
    Path("recipe.toml").write_text(RECIPE.replace("evaluate_samples = 60", "evaluate_samples = 0"))
    assert cli.main(arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    assert [step["cached"] for step in whole["steps"]][-1] is False
    assert "300 samples" in json.dumps(whole["verdicts"])
