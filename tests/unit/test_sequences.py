"""Training models with state: whole sequences through a model of one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from edgepipe.array_ops.calibration import file_batches
from edgepipe.array_ops.load import Samples
from edgepipe.artifact import Artifact
from edgepipe.data import DataSource
from edgepipe.distillation import Teacher
from edgepipe.errors import ArtifactError, DataError, StageError
from edgepipe.predict import predict, with_states
from edgepipe.rescue import qat_advice
from edgepipe.stage import StageContext
from edgepipe.stages.distill import Distill
from edgepipe.stages.finetune import Finetune
from edgepipe.stages.load import LoadModel, ModelSource, TensorOption
from edgepipe.stages.low_rank import LowRank
from edgepipe.stages.prune import Prune
from edgepipe.stages.qat import Qat
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.stages.sparsify import Sparsify
from edgepipe.state import state_numbers
from edgepipe.tflite_ops.quantize import collect_ranges, joined_states
from edgepipe.torch_ops.model import load_model
from edgepipe.torch_ops.qat import QatModel, range_owners
from edgepipe.torch_ops.sequences import source_axes, stepped, unrolled
from edgepipe.torch_ops.tflite_module import TfliteModule
from edgepipe.torch_ops.train import ArraySet
from edgepipe.training import TrainingOptions

from .test_state import artifact as tflite_artifact
from .test_state import recurrent
from .tflite_builder import Graph

NETS = '''
import torch
from torch import nn


class Written(nn.Module):
    """A GRU written out of linear layers (Cho et al. 2014, eq. 5 to 8); h is (N, size)."""

    def __init__(self, size=16, wide=12):
        super().__init__()
        self.first = nn.Linear(8, wide)
        self.gates = nn.Linear(wide + size, 2 * size)
        self.new = nn.Linear(wide + size, size)
        self.head = nn.Linear(size, 10)

    def forward(self, x, h):
        x = torch.relu(self.first(x))
        r, z = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        new = torch.tanh(self.new(torch.cat([x, r * h], 1)))
        h = z * h + (1 - z) * new
        return self.head(h), h


class Gru(nn.Module):
    """PyTorch's own; h is (layers, N, 16)."""

    def __init__(self, layers=1):
        super().__init__()
        self.gru = nn.GRU(8, 16, layers, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x, h):
        y, h = self.gru(x[:, None], h)
        return self.head(y[:, 0]), h


class Alone(Written):
    def forward(self, x, h):
        return super().forward(x[:1], h[:1])
'''


def artifact(
    folder: Path, builder: str, state: tuple[int, ...], **args: int
) -> tuple[Artifact, nn.Module]:
    (folder / "nets.py").write_text(NETS)
    source = ModelSource(
        builder=f"nets.py:{builder}", args=args, state={"h": "h_next"}, outputs=("y", "h_next"),
        inputs=(TensorOption(name="x", shape=(1, 8)), TensorOption(name="h", shape=state)), root=folder,
    )  # fmt: skip
    made = LoadModel(source).run(context(folder, "load"))
    return made, load_model(made.path)


def context(folder: Path, name: str, **data: DataSource) -> StageContext:
    work = folder / name
    work.mkdir()
    return StageContext(work_dir=work, data=data, seed=0, log_path=work / "log.txt", root=folder)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8): a picture is a sequence of its rows."""
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataSource]:
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    x, labels = digits()
    np.savez(path, x=x, labels=labels)
    source = DataSource(kind="npz", path=path)
    return {
        "train": dataclasses.replace(source, not_fold=(0, 3)),
        "test": dataclasses.replace(source, fold=(0, 3)),
    }


def right(model: Artifact, x: np.ndarray, labels: np.ndarray) -> float:
    return float((predict(model, {"x": x})["y"].argmax(1) == labels).mean())


def judged(model: Artifact, folds: Mapping[str, DataSource]) -> float:
    """Accuracy as the recipe's evaluation finds it, on a third of the test set."""
    x, labels = digits()
    return right(model, x[::9], labels[::9])


# --- the sequence


@pytest.mark.parametrize(("layers", "state"), [(1, (1, 1, 16)), (2, (2, 1, 16))])
def test_a_sequence_gives_what_pytorchs_own_recurrence_gives(
    tmp_path: Path, layers: int, state: tuple[int, ...]
) -> None:
    made, net = artifact(tmp_path, "Gru", state, layers=layers)
    x = torch.randn(5, 7, 8)
    with torch.no_grad():
        whole = net.head(net.gru(x)[0])  # type: ignore[operator,union-attr] # (5, 7, 10)
        last = unrolled(net, made, ArraySet([x.numpy()], np.zeros(5, np.int64)))(x)
        each = unrolled(net, made, ArraySet([x.numpy()], np.zeros((5, 7), np.int64)))(x)
    torch.testing.assert_close(last, whole[:, -1])
    torch.testing.assert_close(each, whole.movedim(1, 2))


def test_gradients_go_back_as_far_as_they_are_told(tmp_path: Path) -> None:
    made, net = artifact(tmp_path, "Written", (1, 16))
    labels = ArraySet([np.zeros((4, 7, 8), np.float32)], np.zeros(4, np.int64))
    reached = {}
    for back_steps in (0, 3):
        x = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        unrolled(net, made, labels, back_steps=back_steps)(x).sum().backward()
        assert x.grad is not None
        reached[back_steps] = x.grad.abs().sum((0, 2)) > 0
    assert reached[0].all()
    assert reached[3].tolist() == [False] * 4 + [True] * 3


def test_a_model_without_state_is_left_as_it_is(tmp_path: Path) -> None:
    made, net = artifact(tmp_path, "Written", (1, 16))
    plain = dataclasses.replace(
        made, inputs=tuple(dataclasses.replace(s, fed_by="") for s in made.inputs)
    )
    labels = ArraySet([np.zeros((4, 8), np.float32)], np.zeros(4, np.int64))
    assert unrolled(net, plain, labels) is net
    assert stepped(net) is net


def test_a_step_that_cannot_take_a_batch_is_refused(tmp_path: Path) -> None:
    made, net = artifact(tmp_path, "Alone", (1, 16))
    labels = ArraySet([np.zeros((4, 7, 8), np.float32)], np.zeros(4, np.int64))
    with pytest.raises(ArtifactError, match="for two samples at once") as caught:
        unrolled(net, made, labels)
    assert "LNC" in caught.value.hint


# --- stages


@pytest.mark.slow
def test_finetune_learns_sequences_and_saves_the_step(
    tmp_path: Path, data: dict[str, DataSource]
) -> None:
    made, _ = artifact(tmp_path, "Gru", (1, 1, 16))
    stage = Finetune(epochs=6, lr=0.02, batch_size=50, validation="test")
    trained = stage.run(made, context(tmp_path, "train", **data))
    assert trained.inputs == made.inputs
    before, after = (judged(m, data) for m in (made, trained))
    assert before < 0.3
    assert after > 0.75
    assert trained.facts["epochs"][-1]["validation_accuracy"] == pytest.approx(after, abs=0.1)


def test_labels_of_each_step_train_each_step(tmp_path: Path) -> None:
    """The class of a step is what was shown the step before: only with state it can be known."""
    shown = np.random.default_rng(0).integers(0, 8, (300, 6))
    x = np.eye(8, dtype=np.float32)[shown]
    labels = np.concatenate([np.zeros((300, 1), np.int64), shown[:, :-1]], axis=1)
    np.savez(tmp_path / "d.npz", x=x, labels=labels)
    made, _ = artifact(tmp_path, "Written", (1, 16))
    source = DataSource(kind="npz", path=tmp_path / "d.npz")
    stage = Finetune(epochs=10, lr=0.03, batch_size=50, back_steps=3)
    trained = stage.run(made, context(tmp_path, "train", train=source))
    found = predict(trained, {"x": x}, steps="each")["y"].argmax(2)
    assert (found == labels).mean() > 0.5
    np.savez(tmp_path / "d.npz", x=x, labels=labels[:, :4])
    with pytest.raises(DataError, match=r"labels are \(4,\) for each sample"):
        stage.run(made, context(tmp_path, "again", train=source))


TRAINER = """
import torch


def fit(model, train_set, validation_set, options, seed):
    method = torch.optim.Adam(model.parameters(), 0.02)
    for rows in torch.arange(len(train_set)).split(100):
        inputs, labels = train_set.batch(rows)
        method.zero_grad()
        torch.nn.functional.cross_entropy(model(*inputs), labels).backward()
        method.step()
"""


def test_a_trainer_of_ones_own_is_given_whole_sequences(
    tmp_path: Path, data: dict[str, DataSource]
) -> None:
    made, _ = artifact(tmp_path, "Written", (1, 16))
    (tmp_path / "fit.py").write_text(TRAINER)
    trained = Finetune(trainer="fit.py:fit").run(made, context(tmp_path, "train", **data))
    assert judged(trained, data) > judged(made, data) + 0.1


WHOLE = '''
import torch
from torch import nn


class Whole(nn.Module):
    """Reads all rows of a picture at once; no state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.layers(x)
'''


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, data: dict[str, DataSource]) -> Artifact:
    """A trained teacher of 16 states."""
    folder = tmp_path_factory.mktemp("teacher")
    made, _ = artifact(folder, "Written", (1, 16))
    work = context(folder, "train", **data)
    made = dataclasses.replace(made, facts={})  # its random weights are trained now
    return Finetune(epochs=6, lr=0.02, batch_size=50).run(made, work)


@pytest.mark.slow
def test_a_teacher_with_state_teaches_a_student_with_less(
    taught: Artifact, tmp_path: Path, data: dict[str, DataSource]
) -> None:
    stage = Distill(
        student="nets.py:Written", args={"size": 8}, state_shapes={"h": (1, 8)}, validation="test",
        epochs=8, lr=0.02, batch_size=50,
    )  # fmt: skip
    (tmp_path / "nets.py").write_text(NETS)
    made = stage.run(taught, context(tmp_path, "distill", **data))
    assert [s.shape for s in (*made.inputs, *made.outputs)] == [(1, 8), (1, 8), (1, 10), (1, 8)]
    assert made.facts["before"]["parameters"] > 1.5 * made.facts["after"]["parameters"]
    assert made.facts["accuracy"] > 0.6
    assert made.facts["teachers"][0]["accuracy"] == pytest.approx(judged(taught, data), abs=0.1)
    assert judged(made, data) == pytest.approx(made.facts["accuracy"], abs=0.1)
    with pytest.raises(StageError, match="student cannot take steps") as caught:
        dataclasses.replace(stage, state_shapes={}).run(taught, context(tmp_path, "none", **data))
    assert (
        "h = [1, 16]; if they are not, give their shapes: state_shapes = { h = [...] }"
        in caught.value.hint
    )
    for wrong, told in (({"g": (1, 8)}, "'g' is no state"), ({"h": (8,)}, r"own is \[1, 16\]")):
        with pytest.raises(ArtifactError, match=told):
            dataclasses.replace(stage, state_shapes=wrong).run(taught, context(tmp_path, told[:8], **data))  # fmt: skip


def test_a_teacher_that_reads_whole_sequences_teaches_one_that_reads_steps(
    taught: Artifact, tmp_path: Path, data: dict[str, DataSource]
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "whole.py").write_text(WHOLE)
    names: dict[str, type[nn.Module]] = {}
    exec(WHOLE, names)
    save_file(names["Whole"]().state_dict(), tmp_path / "whole.safetensors")
    weights = Path("whole.safetensors")
    stage = Distill(teachers=(Teacher(builder="whole.py:Whole", weights=weights),), epochs=1, soft_weight=0.5)  # fmt: skip
    made = stage.run(taught, context(tmp_path, "distill", **data))
    assert made.inputs == taught.inputs
    state = load_model(taught.path).state_dict()
    save_file(state, tmp_path / "step.safetensors")
    stepwise = Teacher(builder="nets.py:Written", weights=Path("step.safetensors"))
    with pytest.raises(StageError, match="teacher cannot take the data") as caught:
        dataclasses.replace(stage, teachers=(stepwise,)).run(taught, context(tmp_path, "wrong", **data))  # fmt: skip
    assert "state_shapes" in caught.value.hint
    shaped = dataclasses.replace(stepwise, state_shapes={"h": (1, 16)})
    told = dataclasses.replace(stage, teachers=(shaped,), validation="test").run(taught, context(tmp_path, "right", **data))  # fmt: skip
    assert told.facts["teachers"][0]["accuracy"] > 0.75


# --- stages that make it smaller


@pytest.mark.slow
def test_pruning_cuts_what_is_no_state_and_trains_sequences_after_it(
    taught: Artifact, tmp_path: Path, data: dict[str, DataSource]
) -> None:
    stage = Prune(
        importance="taylor", round_to=1, validation="test",
        finetune=TrainingOptions(epochs=2, lr=0.01, batch_size=50),
    )  # fmt: skip
    made = stage.run(taught, context(tmp_path, "prune", **data))
    assert made.facts["channels"] == {"first": [12, 6]}
    assert set(made.facts["left_whole"]) == {"gates", "head"}
    (step,) = made.facts["steps"]
    assert step["score"] > step["score_pruned"] + 0.05
    assert judged(made, data) == pytest.approx(step["score"], abs=0.1)
    assert (made.inputs, made.outputs) == (taught.inputs, taught.outputs)


@pytest.mark.slow
def test_sparse_weights_are_trained_along_sequences(
    taught: Artifact, tmp_path: Path, data: dict[str, DataSource]
) -> None:
    stage = Sparsify(epochs=4, lr=0.01, batch_size=50, sparsity=0.6, validation="test")
    made = stage.run(taught, context(tmp_path, "sparsify", **data))
    assert set(made.facts["zeros"]) == {"gates", "new"}
    assert min(made.facts["zeros"].values()) > 0.55
    assert made.facts["accuracy"]["after"] > 0.7
    at_once = dataclasses.replace(stage, epochs=0).run(taught, context(tmp_path, "cut", **data))
    assert at_once.facts["accuracy"]["after"] < made.facts["accuracy"]["after"]


def test_ranks_are_chosen_by_what_sequences_lose(
    taught: Artifact, tmp_path: Path, data: dict[str, DataSource]
) -> None:
    stage = LowRank(macs=0.8, data="train", validation="test", round_to=1)
    made = stage.run(taught, context(tmp_path, "low_rank", **data))
    assert made.facts["after"]["macs"] <= 0.8 * made.facts["before"]["macs"]
    found = made.facts["accuracy"]
    assert found["before"] == pytest.approx(judged(taught, data), abs=0.1)
    assert found["before"] - 0.2 < found["after"]
    assert judged(made, data) == pytest.approx(found["after"], abs=0.1)
    without = dataclasses.replace(stage, data="", validation="")
    assert without.run(taught, context(tmp_path, "blind")).facts["ranks"]


# --- int8


def test_a_graph_with_states_of_any_layout_runs_along_sequences_as_litert_runs_it(
    tmp_path: Path,
) -> None:
    graph = Graph()
    x, h = graph.input("x", (1, 5)), graph.input("h", (2, 1, 5))
    half = graph.const("half", np.full((1, 1, 1), 0.5, np.float32))
    kept = graph.op("MUL", [h, half], "kept", (2, 1, 5), "MulOptions")
    after = graph.op("ADD", [kept, x], "h_next", (2, 1, 5), "AddOptions")
    axis = graph.const("axis", np.array([0], np.int32))
    y = graph.op("SUM", [after, axis], "y", (1, 5), "ReducerOptions")
    made = tflite_artifact(tmp_path, graph.bytes([y, after]), {"h": "h_next"})
    layers = {"layout": "LNC", "source_layout": "LNC"}
    made = dataclasses.replace(
        made,
        inputs=(made.inputs[0], dataclasses.replace(made.inputs[1], **layers)),
        outputs=(made.outputs[0], dataclasses.replace(made.outputs[1], **layers)),
    )
    body = TfliteModule(made.path.read_bytes(), made.inputs, made.outputs, where="m")
    given = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    for labels, steps in ((np.zeros(4), "last"), (np.zeros((4, 6)), "each")):
        data = ArraySet([given], labels.astype(np.int64))
        with torch.no_grad():
            found = unrolled(body, made, data, axes=source_axes(made))(torch.from_numpy(given))
        expected = predict(made, {"x": given}, steps=steps)["y"]  # type: ignore[arg-type]
        ours = found.numpy() if steps == "last" else found.movedim(1, 2).numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["tanh", "linear"])
def test_int8_is_trained_along_sequences_and_is_what_the_file_computes(
    tmp_path: Path, end: str
) -> None:
    """The class is what was shown first of four steps; the network begins with random weights."""
    generator = np.random.default_rng(0)
    shown = generator.integers(0, 3, (160, 4))
    x = np.eye(3, dtype=np.float32)[shown] + generator.normal(0, 0.1, (160, 4, 3)).astype("f4")
    np.savez(tmp_path / "d.npz", x=x, labels=shown[:, 0])
    source = DataSource(kind="npz", path=tmp_path / "d.npz")
    data = {"train": source, "calibration": dataclasses.replace(source, limit=40)}
    before = tflite_artifact(tmp_path, recurrent(end=end), {"h": "h_next"})
    stage = Qat(epochs=9, lr=0.03, batch_size=40, float_weight=0.0)
    trained = stage.run(before, context(tmp_path, "qat", **data))
    scores, agreed = trained.facts["accuracy"], trained.facts["agreement"]
    assert scores["after"]["int8"] > scores["before"]["int8"] + 0.2
    assert agreed["sqnr_db"] > 30
    assert trained.facts["agreement_apart"]["sqnr_db"] > 25
    assert agreed["values"] == 8 * 4 * (4 + 5)
    made = QuantizeInt8().run(trained, context(tmp_path, "int8", **data))
    state, out = made.inputs[1], made.outputs[1]
    assert (state.scale, state.zero_point) == (out.scale, out.zero_point)
    low, high = trained.facts["learned_ranges"]["h"]
    assert trained.facts["learned_ranges"]["h_next"] == [low, high]
    assert state.scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert right(made, x, shown[:, 0]) == pytest.approx(scores["after"]["int8"], abs=0.03)


def test_rounding_weights_once_for_a_sequence_changes_nothing(tmp_path: Path) -> None:
    made = tflite_artifact(tmp_path, recurrent(end="linear"), {"h": "h_next"})
    content = made.path.read_bytes()
    x = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    samples = with_states(Samples({"x": x}, None, (), ""), made)
    states = state_numbers(made)
    ranges = collect_ranges(content, file_batches(samples, made.inputs), where="m").table()
    owners = range_owners(content, where="m", states=states)
    body = TfliteModule(content, made.inputs, made.outputs, where="m")
    model = QatModel(body, owners, joined_states(content, ranges, states, where="m"), learned=True)
    whole = unrolled(model, made, ArraySet([x], np.zeros(6, np.int64)), axes=source_axes(made))
    for _ in range(2):  # nothing is kept from one sequence to the next
        with torch.no_grad():
            state = torch.zeros(6, 5)
            for step in range(5):
                y, state = model(torch.from_numpy(x[:, step]), state)
            assert torch.equal(whole(torch.from_numpy(x)), y)
            for weight in model.parameters():
                weight.add_(0.05)


def test_the_cost_of_the_advice_counts_every_step_of_a_sequence() -> None:
    one, ten = (qat_advice(0.001, steps=steps) for steps in (1, 10))
    assert "about 70 s for each 1000" in one
    assert "about 700 s for each 1000" in ten
