"""Models with explicit state: inputs that are fed by outputs of the step before."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import cli
from edgepipe.adhoc import parse_state
from edgepipe.array_ops.calibration import file_batches
from edgepipe.array_ops.load import load_samples, open_samples
from edgepipe.array_ops.roll import one_by_one, roll, roll_outputs
from edgepipe.array_ops.task_metrics import as_judged, task_metric
from edgepipe.artifact import Artifact, TensorSpec, load_artifact, make_artifact, save_artifact
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, DataError, EdgepipeError, RequestError, StageOptionError
from edgepipe.evaluate import choose_evaluation, device_measurements, evaluate
from edgepipe.predict import predict, single_steps, with_states
from edgepipe.stage import StageContext
from edgepipe.stages.load import LoadModel, ModelSource, TensorOption
from edgepipe.stages.quantize import Quantize
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.state import FREE, data_inputs, with_state
from edgepipe.tflite_ops.inspect import tensor_specs
from edgepipe.tflite_ops.raw import encode_samples, stored_outputs
from edgepipe.tflite_ops.run import open_tflite
from edgepipe.tflite_ops.tiny import stateful_tflite

from .tflite_builder import Graph

FEATURES, HIDDEN, CLASSES = 3, 5, 4


# --- numbers: against a recurrence written out here


def leaky(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """h' = h / 2 + x, y = h' - 1; the state of sample n lies at [:, n]."""
    h = inputs["h"] / 2 + inputs["x"][None]
    return {"y": h[0] - 1, "h_next": h}


LEAKY = (
    TensorSpec("x", (1, 2)),
    TensorSpec("h", (3, 1, 2), layout="LNC", fed_by="h_next"),
)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_sequence_is_run_step_by_step_from_zeros(count: int, steps: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(count, steps, 2)).astype(np.float32)
    expected = np.zeros((count, 2), np.float32)
    for step in range(steps):
        expected = expected / 2 + x[:, step]
    last = roll_outputs(leaky, LEAKY, {"x": x}, ["y", "h_next"], steps="last")
    np.testing.assert_array_equal(last["y"], expected - 1)
    assert last["h_next"].shape == (3, count, 2)
    each = roll_outputs(leaky, LEAKY, {"x": x}, ["y"], steps="each")
    assert each["y"].shape == (count, steps, 2)
    np.testing.assert_array_equal(each["y"][:, -1], last["y"])


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_single_steps_in_any_order_give_what_the_sequence_gives(
    count: int, steps: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, steps, 2)).astype(np.float32)
    each = roll_outputs(leaky, LEAKY, {"x": x}, ["y"], steps="each")["y"]
    alone = one_by_one(leaky, LEAKY, {"x": x})
    order = generator.permutation(count * steps)
    found = leaky({"x": alone["x"][order], "h": alone["h"][:, order]})["y"]
    np.testing.assert_array_equal(found, each.reshape(count * steps, 2)[order])


def test_inputs_of_different_lengths_are_refused() -> None:
    specs = (*LEAKY, TensorSpec("z", (1, 1)))
    with pytest.raises(DataError, match=r"sequences of \[2, 3\] steps"):
        next(roll(leaky, specs, {"x": np.zeros((1, 2, 2)), "z": np.zeros((1, 3, 1))}))


def test_every_step_may_be_judged() -> None:
    scores = np.eye(4, dtype=np.float32)[np.array([[0, 1, 2], [3, 3, 3]])]  # (2, 3, 4)
    labels = np.array([[0, 1, 1], [3, 3, 0]])
    outputs, known = as_judged("top1", {"y": scores}, labels, steps="each")
    assert task_metric("top1", outputs, known) == pytest.approx(4 / 6)
    with pytest.raises(DataError, match=r"labels \(2,\) for 2 sequences of 3 steps"):
        as_judged("top1", {"y": scores}, labels[:, 0], steps="each")


# --- data is for the inputs that are no state, with an axis of steps


def test_data_has_an_axis_of_steps_and_no_state(tmp_path: Path) -> None:
    specs = (TensorSpec("x", (1, 16, 40)), TensorSpec("h", (1, 64), fed_by="h_next"))
    (spec,) = data_inputs(specs)
    assert (spec.name, spec.shape, spec.layout) == ("x", (1, FREE, 16, 40), "NTCL")
    assert data_inputs((spec,)) == (spec,)
    assert data_inputs(specs[:1]) == specs[:1]
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 9, 16, 40), np.float32))
    source = DataSource(kind="npz", path=tmp_path / "d.npz")
    assert load_samples(source, specs).inputs["x"].shape == (6, 9, 16, 40)
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 16, 40), np.float32))
    with pytest.raises(DataError, match=r"wants samples of shape \(-1, 16, 40\) \(TCL\)"):
        load_samples(source, specs)


# --- wiring


def artifact(folder: Path, content: bytes, state: dict[str, str]) -> Artifact:
    path = folder / "model.tflite"
    path.write_bytes(content)
    inputs, outputs = tensor_specs(path)
    return with_state(make_artifact("tflite", path, inputs=inputs, outputs=outputs), state)


def recurrent(*, end: str = "", seed: int = 0) -> bytes:
    """h' = tanh(W [x, h]) (or without tanh for ``end`` "linear"), y = V h'."""
    generator = np.random.default_rng(seed)
    graph = Graph()
    x, h = graph.input("x", (1, FEATURES)), graph.input("h", (1, HIDDEN))
    joined = graph.op("CONCATENATION", [x, h], "joined", (1, FEATURES + HIDDEN), "ConcatenationOptions", axis=1)  # fmt: skip

    def weights(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        w = generator.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        return w, generator.normal(0, 0.1, rows).astype(np.float32)

    after = graph.dense(joined, *weights(HIDDEN, FEATURES + HIDDEN), "z" if end != "linear" else "h_next", (1, HIDDEN))  # fmt: skip
    if end != "linear":
        after = graph.op("TANH", [after], "h_next", (1, HIDDEN))
    y = graph.dense(after, *weights(CLASSES, HIDDEN), "y", (1, CLASSES))
    return graph.bytes([y, after])


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return artifact(tmp_path, recurrent(), {"h": "h_next"})


@pytest.mark.parametrize(
    ("state", "message", "hint"),
    [
        ({"g": "h_next"}, r"'g' is no input of the model", "its inputs: x, h"),
        ({"h": "h_nxt"}, r"no such output; did you mean 'h_next'", "its outputs: y, h_next"),
        ({"h": "y"}, r"float32 \[1, 5\], the output float32 \[1, 4\]", "same shape"),
        ({"h": "h_next", "x": "h_next"}, r"'h_next' feeds two inputs", "its own"),
        ({"h": "h_next", "x": "y"}, r"every input is state", "leave out what is data"),
    ],
)
def test_a_wrong_wiring_says_what_there_is(
    tmp_path: Path, state: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact(tmp_path, recurrent(), state)
    assert hint in caught.value.hint


def test_wiring_survives_the_record_of_an_artifact(model: Artifact, tmp_path: Path) -> None:
    save_artifact(model, tmp_path)
    assert load_artifact(tmp_path).inputs == model.inputs
    assert json.loads((tmp_path / "artifact.json").read_text())["inputs"][1]["fed_by"] == "h_next"


def test_a_model_file_is_wired_by_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "net.tflite").write_bytes(recurrent())
    source = ModelSource(
        file=Path("net.tflite"), state={"h": "h_next"}, root=tmp_path,
        inputs=(TensorOption(name="x"),),
    )  # fmt: skip
    made = LoadModel(source).run(context(tmp_path))
    assert [spec.fed_by for spec in made.inputs] == ["", "h_next"]


# --- int8


def context(folder: Path, name: str = "work", **data: DataSource) -> StageContext:
    work = folder / name
    work.mkdir()
    return StageContext(work_dir=work, data=data, seed=0, log_path=work / "log.txt", root=folder)


@pytest.fixture
def sequences(tmp_path: Path) -> DataSource:
    """120 sequences of 7 steps; the label is what the last step of the float model says."""
    x = np.random.default_rng(1).normal(size=(120, 7, FEATURES)).astype(np.float32)
    model = artifact(tmp_path, recurrent(), {"h": "h_next"})
    labels = predict(model, {"x": x})["y"].argmax(axis=1)
    np.savez(tmp_path / "d.npz", x=x, labels=labels)
    return DataSource(kind="npz", path=tmp_path / "d.npz")


def bytes_in_turn(model: Artifact, x: np.ndarray) -> np.ndarray:
    """What an application does with one sequence: the bytes of the state are copied, nothing else."""
    interpreter = open_tflite(model.path)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    state = np.full(inputs[1]["shape"], model.inputs[1].zero_point, inputs[1]["dtype"])
    for step in x:
        scale, zero = inputs[0]["quantization"]
        limits = np.iinfo(inputs[0]["dtype"])
        stored = np.clip(np.rint(step / scale) + zero, limits.min, limits.max)
        interpreter.set_tensor(inputs[0]["index"], stored[None].astype(inputs[0]["dtype"]))
        interpreter.set_tensor(inputs[1]["index"], state)
        interpreter.invoke()
        state = interpreter.get_tensor(outputs[1]["index"])
    return np.array(interpreter.get_tensor(outputs[0]["index"]))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("end", ["tanh", "linear"])
def test_an_int8_state_is_copied_byte_for_byte(
    tmp_path: Path, sequences: DataSource, end: str, dtype: str
) -> None:
    before = artifact(tmp_path, recurrent(end=end), {"h": "h_next"})
    stage = QuantizeInt8(input_dtype=dtype, output_dtype=dtype)  # type: ignore[arg-type]
    made = stage.run(before, context(tmp_path, calibration=sequences))
    (_, state), (answer, out) = made.inputs, made.outputs
    assert (state.scale, state.zero_point, state.dtype) == (out.scale, out.zero_point, dtype)
    x = np.load(tmp_path / "d.npz")["x"][:10]
    rolled = predict(made, {"x": x})["y"]
    for row, sequence in zip(rolled, x, strict=True):
        stored = bytes_in_turn(made, sequence).astype(np.float64)
        np.testing.assert_array_equal(((stored - answer.zero_point) * answer.scale).astype(np.float32)[0], row)  # fmt: skip
    assert min(o["sqnr_db"] for o in made.facts["parity"]["outputs"].values()) > 20
    assert set(made.facts["parity"]["outputs"]) == {"y", "h_next"}


def test_ranges_of_a_state_are_those_it_has_in_use(
    tmp_path: Path, model: Artifact, sequences: DataSource
) -> None:
    samples = with_states(open_samples(sequences, model.inputs), model)
    given = list(file_batches(samples, model.inputs))
    x = np.load(tmp_path / "d.npz")["x"]
    assert len(given) == 120 * 7
    states = predict(model, {"x": x}, steps="each", states=True)["h_next"]
    before = np.concatenate([np.zeros((120, 1, HIDDEN), np.float32), states[:, :-1]], axis=1)
    wanted = np.concatenate([x, before], axis=2).reshape(120 * 7, -1)
    found = np.concatenate([np.concatenate(batch, axis=1) for batch in given])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], wanted[np.lexsort(wanted.T)])
    # every seventh is not the first step, whose state is zero
    assert 0 < sum(not batch[1].any() for batch in given[::7]) < 60


def test_the_ladder_judges_sequences(
    tmp_path: Path, model: Artifact, sequences: DataSource
) -> None:
    halves = {
        "calibration": dataclasses.replace(sequences, fold=(0, 2)),
        "validation": dataclasses.replace(sequences, not_fold=(0, 2)),
    }
    stage = QuantizeInt8(max_drop=8.0, evaluate="validation")
    made = stage.run(model, context(tmp_path, **halves))
    assert made.facts["rescue"]["float_score"] == 1.0
    assert made.inputs[1].scale == made.outputs[1].scale


def test_other_precisions_are_compared_along_sequences(
    tmp_path: Path, model: Artifact, sequences: DataSource
) -> None:
    stage = Quantize(precision="int16x8")
    made = stage.run(model, context(tmp_path, calibration=sequences))
    assert made.facts["parity"]["outputs"]["h_next"]["sqnr_db"] > 30
    assert made.inputs[1].fed_by == "h_next"


def test_doors_of_different_kinds_are_refused(
    tmp_path: Path, model: Artifact, sequences: DataSource
) -> None:
    with pytest.raises(StageOptionError, match="comes out as float32 and goes in as int8"):
        QuantizeInt8(output_dtype="float32").run(model, context(tmp_path, calibration=sequences))


@pytest.mark.parametrize("stage", [QuantizeInt8(), Quantize(precision="dynamic_int8")])
def test_a_file_that_keeps_its_state_in_itself_is_not_quantised(
    tmp_path: Path, sequences: DataSource, stage: QuantizeInt8 | Quantize
) -> None:
    path = tmp_path / "keeps.tflite"
    path.write_bytes(stateful_tflite())
    inputs, outputs = tensor_specs(path)
    keeps = make_artifact("tflite", path, inputs=inputs, outputs=outputs, facts={"streaming": True})
    with pytest.raises(EdgepipeError, match="keeps its state") as caught:
        stage.run(keeps, context(tmp_path, calibration=sequences))
    assert "[model.state]" in caught.value.hint


# --- evaluation, here and on a board


@pytest.mark.parametrize("steps", ["last", "each"])
def test_each_model_is_judged_with_its_own_states(
    tmp_path: Path, model: Artifact, sequences: DataSource, steps: str
) -> None:
    int8 = QuantizeInt8().run(model, context(tmp_path, calibration=sequences))
    x = np.load(tmp_path / "d.npz")["x"]
    answers = predict(model, {"x": x}, steps=steps)["y"].argmax(axis=-1)  # type: ignore[arg-type]
    np.savez(tmp_path / "d.npz", x=x, labels=answers)
    found = evaluate(
        shipped=int8, float_model=model, reference=model, inputs=model.inputs, source=sequences,
        metric="top1", root=tmp_path, steps=steps,  # type: ignore[arg-type]
    )  # fmt: skip
    by_name = {m.metric: m for m in found}
    assert by_name["task_metric_reference"].samples == ((1.0,),)
    right = predict(int8, {"x": x}, steps=steps)["y"].argmax(axis=-1) == answers  # type: ignore[arg-type]
    assert by_name["task_metric"].samples == ((pytest.approx(right.mean()),),)
    assert ("interval_points" in by_name["accuracy_drop"].context) == (steps == "last")


@pytest.mark.parametrize("steps", ["last", "each"])
def test_a_board_answers_every_step_with_the_states_of_this_host(
    tmp_path: Path, model: Artifact, sequences: DataSource, steps: str
) -> None:
    x = np.load(tmp_path / "d.npz")["x"]
    labels = predict(model, {"x": x}, steps=steps)["y"].argmax(axis=-1)  # type: ignore[arg-type]
    np.savez(tmp_path / "d.npz", x=x, labels=labels)
    chosen = choose_evaluation(
        shipped=model, reference=model, inputs=model.inputs, source=sequences, metric="top1",
        root=tmp_path, count=9, seed=0, steps=steps,  # type: ignore[arg-type]
    )  # fmt: skip
    assert {name: len(array) for name, array in chosen.inputs.items()} == {"x": 63, "h": 63}
    encoded = encode_samples(model.path, chosen.inputs, model.inputs)
    stored = stored_outputs(model.path, encoded)
    described = [{"name": n, "dtype": "float32", "shape": list(a.shape[1:]), "bytes": a[0].nbytes} for n, a in stored.items()]  # fmt: skip
    wrong = {name: array.copy() for name, array in stored.items()}
    y = next(name for name, array in wrong.items() if array.shape[-1] == CLASSES)
    wrong[y][6] = -wrong[y][6]  # the last step of the first sequence
    wrong[y][8] = -wrong[y][8]  # one in the middle of the second
    flips = {}
    for name, answered in (("right", stored), ("wrong", wrong)):
        answers = b"".join(a[i].tobytes() for i in range(63) for a in answered.values())
        found = {m.metric: m for m in device_measurements(model, encoded, described, answers, {}, chosen)}  # fmt: skip
        flips[name] = found["device_flips"].samples[0][0]
        assert found["device_mismatch"].samples[0][0] == pytest.approx(0 if name == "right" else 2 * CLASSES / (63 * (CLASSES + HIDDEN)))  # fmt: skip
        context_of = found["device_accuracy_drop"].context
        assert (context_of["samples"], context_of["length"], context_of["steps"]) == (9, 7, steps)
    assert flips == {"right": 0.0, "wrong": pytest.approx((1 if steps == "last" else 2) / 9)}


def test_without_state_single_steps_are_the_samples(tmp_path: Path) -> None:
    plain = artifact(tmp_path, recurrent(), {})
    given = {"x": np.zeros((2, FEATURES)), "h": np.zeros((2, HIDDEN))}
    assert single_steps(plain, given) == given


# --- the command line


def test_state_on_the_command_line_becomes_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(recurrent())
    assert cli.main(["init", "net.tflite", "--state", "h=h_next", "--output", "r.toml"]) == 0
    assert tomllib.loads((tmp_path / "r.toml").read_text())["model"]["state"] == {"h": "h_next"}
    with pytest.raises(RequestError, match="'h:h_next' is not INPUT=OUTPUT"):
        parse_state(["h:h_next"])


@pytest.fixture
def judged_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.tflite, samples for ranges, and sequences with the float model's answer to each step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(recurrent())
    model = artifact(tmp_path, recurrent(), {"h": "h_next"})
    for name, seed in (("seen", 1), ("labelled", 2)):
        x = np.random.default_rng(seed).normal(size=(60, 6, FEATURES)).astype(np.float32)
        labels = predict(model, {"x": x}, steps="each")["y"].argmax(axis=2)
        np.savez(tmp_path / f"{name}.npz", x=x, labels=labels)
    return tmp_path


@pytest.mark.slow
def test_every_step_is_judged_on_the_command_line(
    judged_at_each_step: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data", "seen.npz", "--evaluate", "labelled.npz", "--state", "h=h_next", "--json"]
    assert cli.main(["quantize", "net.tflite", "--all", "--steps", "each", *more]) == 0
    rows = {r["precision"]: r for r in json.loads(capsys.readouterr().out)["precisions"]}
    assert (rows["float32"]["score"], rows["float32"]["agreement"]) == (1.0, 1.0)
    # of 360 answers, so that a share is no multiple of 1 / 60
    assert rows["int8"]["score"] == rows["int8"]["agreement"]
    assert round(rows["int8"]["score"] * 360) % 6
    assert cli.main(["explain", "net.tflite", "--steps", "each", "--no-try", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["float_score"] == 1.0
    assert round(found["score"] * 360) % 6


def test_steps_that_nothing_judges_are_refused(
    judged_at_each_step: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--state", "h=h_next"], ["--evaluate", "labelled.npz"]):
        given = ["net.tflite", "--data", "seen.npz", "--steps", "each", *more]
        assert cli.main(["explain", *given]) == 2
        assert "--steps each is for a model with state, judged by labels" in capsys.readouterr().err
        assert cli.main(["quantize", *given, "--all"]) == 2
        assert "--steps each is for a model with state" in capsys.readouterr().err
