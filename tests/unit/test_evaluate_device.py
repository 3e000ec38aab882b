"""What a board's answers are worth: the sample it is given, its outputs file, and the judgement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.array_ops.sampling import stratified_sample
from edgepipe.array_ops.task_metrics import by_class, predictions
from edgepipe.artifact import Artifact, TensorSpec, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import DataError, TransferError
from edgepipe.evaluate import (
    DeviceEvaluation,
    check_fits,
    choose_evaluation,
    device_measurements,
    evaluate,
)
from edgepipe.gate import (
    DeviceAccuracyDropGate,
    DeviceAgreementGate,
    DeviceTaskMetricGate,
    Evidence,
    Status,
)
from edgepipe.judge import judge
from edgepipe.measurement import Measurement, single
from edgepipe.metrics import METRICS
from edgepipe.predict import predict
from edgepipe.tflite_ops import quantize as quantize_ops
from edgepipe.tflite_ops import raw
from edgepipe.tflite_ops.tiny import tiny_tflite
from tests.unit.tflite_builder import Graph, small_cnn

CONTEXT = {"profile": "pi", "runtime": "litert", "runtime_version": "2.3.0"}


# --- which samples


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    data=st.data(),
    seed=st.integers(0, 5),
)
def test_a_sample_keeps_the_share_of_every_class(labels: list[int], data: Any, seed: int) -> None:
    known = np.array(labels)
    count = data.draw(st.integers(1, len(labels)))
    chosen, is_stratified = stratified_sample(count, len(labels), known, seed=seed)
    assert is_stratified == (count < len(labels))
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    assert 0 <= chosen.min() <= chosen.max() < len(labels)
    for label in set(labels):
        exact = count * labels.count(label) / len(labels)
        assert abs((known[chosen] == label).sum() - exact) < 1
    again, _ = stratified_sample(count, len(labels), known, seed=seed)
    assert again.tolist() == chosen.tolist()


def test_the_worked_example_of_quotas() -> None:
    labels = np.repeat([0, 1, 2], [4, 5, 21])
    chosen, _ = stratified_sample(10, 30, labels, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [1, 2, 7]


def test_another_seed_is_another_sample_and_zero_is_all() -> None:
    labels = np.arange(100) % 4
    one, other = (stratified_sample(20, 100, labels, seed=s)[0].tolist() for s in (0, 1))
    assert one != other
    assert stratified_sample(0, 100, labels, seed=0)[0].tolist() == list(range(100))


@pytest.mark.parametrize("labels", [None, np.zeros(50, np.float32), np.zeros((50, 3), np.int64)])
def test_without_class_labels_the_sample_is_random(labels: np.ndarray | None) -> None:
    chosen, is_stratified = stratified_sample(10, 50, labels, seed=0)
    assert (len(set(chosen.tolist())), is_stratified) == (10, False)


# --- a board's outputs file


def two_outputs(batch: int) -> bytes:
    """x (batch, 3) -> "double" = 2 x and "negative" = -x, both (batch, 3)."""
    g = Graph()
    x = g.input("x", (batch, 3))
    double = g.op("MUL", [x, g.const("two", np.full((1, 3), 2, np.float32))], "double", (batch, 3), "MulOptions")  # fmt: skip
    negative = g.op("MUL", [x, g.const("m", np.full((1, 3), -1, np.float32))], "negative", (batch, 3), "MulOptions")  # fmt: skip
    return g.bytes([double, negative])


def artifact(folder: Path, content: bytes, name: str = "model.tflite") -> Artifact:
    """A model file with its own specs."""
    from edgepipe.tflite_ops.inspect import tensor_specs

    path = folder / name
    path.write_bytes(content)
    inputs, outputs = tensor_specs(path)
    return make_artifact("tflite", path, inputs=inputs, outputs=outputs)


def described(stored: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"name": n, "dtype": a.dtype.name, "shape": a.shape[1:], "bytes": a[0].nbytes}
        for n, a in stored.items()
    ]


def outputs_file(stored: Mapping[str, np.ndarray]) -> bytes:
    """As a board writes it: inference after inference, in each the tensors one after another."""
    count = len(next(iter(stored.values())))
    return b"".join(a[k].tobytes() for k in range(count) for a in stored.values())


ULP = 2.0**-23  # of a float32 from 1 to 2


@given(st.integers(0, 200), st.booleans())
def test_floats_may_differ_by_64_ulp_of_the_largest_of_their_inference(ulps: int, up: bool) -> None:
    host = np.array([[1.5, 0.001], [1024.0, 0.001]], np.float32)  # (inferences, values)
    device = host.astype(np.float64)
    device[0, 1] += ulps * ULP * (1 if up else -1)  # 0.001 has a finer grain than 1.5
    found = raw.mismatch({"y": host}, {"y": device.astype(np.float32)})
    assert found.share == (0.25 if ulps > 64 else 0.0)
    assert found.unequal == (0.25 if ulps else 0.0)
    assert found.max_ulps == pytest.approx(ulps, abs=0.001)
    # the same difference is one of 1024 times coarser grains in the second inference
    device = host.astype(np.float64)
    device[1, 1] += ulps * ULP
    assert raw.mismatch({"y": host}, {"y": device.astype(np.float32)}).share == 0.0


def test_what_is_no_number_on_one_side_only_differs() -> None:
    host = np.array([[np.nan, np.inf, 1.0, 2.0]], np.float32)
    assert raw.mismatch({"y": host}, {"y": host}).unequal == 0
    device = np.array([[1.0, -np.inf, np.nan, np.inf]], np.float32)
    assert raw.mismatch({"y": host}, {"y": device}).share == 1.0


def test_integers_may_differ_by_so_many_steps_as_asked() -> None:
    host, device = np.array([[0, 5, -128]], np.int8), np.array([[1, 5, 127]], np.int8)
    assert raw.mismatch({"y": host}, {"y": device}) == raw.Mismatch(2 / 3, 3, 255.0, 2 / 3)
    assert raw.mismatch({"y": host}, {"y": device}, steps=1) == raw.Mismatch(1 / 3, 3, 255.0, 2 / 3)


@pytest.mark.parametrize("delegated", [True, False, None])
def test_the_host_runs_the_kernels_that_the_board_ran(
    model: Artifact, tmp_path: Path, delegated: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = raw.stored_outputs

    def stored_outputs(path: Path, samples: raw.RawSamples, **options: Any) -> Any:
        asked.append(options["delegates"])
        return real(path, samples, **options)

    evaluation = chosen(model, digits(tmp_path, np.arange(8) % 4))
    samples = raw.encode_samples(model.path, evaluation.inputs, model.inputs)
    stored = real(model.path, samples)
    monkeypatch.setattr(raw, "stored_outputs", stored_outputs)
    upset = {"y": stored["y"][::-1]}
    (found,) = device_measurements(
        model, samples, described(stored), outputs_file(upset), {"model_sha256": model.sha256, **CONTEXT}, delegated=delegated
    )  # fmt: skip
    assert asked == [delegated is not False]
    verdict = DeviceAgreementGate().judge(Evidence(model.sha256, "pi", {"device_mismatch": found}))
    # a difference between kernels that may be others is no fault of the device
    assert verdict.status == ("INCONCLUSIVE" if delegated is None else "FAIL")
    same = dataclasses.replace(found, samples=((0.0,),))
    assert DeviceAgreementGate().judge(Evidence(model.sha256, "pi", {"device_mismatch": same})).status == "PASS"  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", [1, -1])
def test_an_outputs_file_is_read_by_tensor_name_and_batch(
    tmp_path: Path, batch: int, order: int
) -> None:
    model = artifact(tmp_path, two_outputs(batch))
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    samples = raw.encode_samples(model.path, {"x": x}, model.inputs)
    assert (samples.count, samples.batch) == (4 // batch, batch)
    stored = raw.stored_outputs(model.path, samples)
    written = dict(list(stored.items())[::order])  # a board may list its tensors in another order
    read = raw.read_outputs(model.path, outputs_file(written), described(written), samples.count)
    assert list(read) == list(stored)
    assert raw.mismatch(stored, read) == raw.Mismatch(0.0, 24, 0.0)
    real = raw.real_outputs(model.path, read, model.outputs)
    assert np.array_equal(real["double"], 2 * x)
    assert np.array_equal(real["negative"], -x)


def test_inputs_with_different_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    g = Graph()
    a, b = g.input("a", (1, 3)), g.input("b", (1, 3))
    model = artifact(tmp_path, g.bytes([g.op("ADD", [a, b], "sum", (1, 3), "AddOptions")]))
    few = {"a": np.ones((4, 3), np.float32), "b": np.ones((3, 3), np.float32)}
    with pytest.raises(DataError, match="samples for 3, 4 inferences"):
        raw.encode_samples(model.path, few, model.inputs)


def test_one_tensor_that_is_two_outputs_is_told_of_twice(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", (1, 3))
    double = g.op("ADD", [x, x], "double", (1, 3), "AddOptions")
    model = artifact(tmp_path, g.bytes([double, x, double]))
    assert [spec.name for spec in model.outputs] == ["double", "x", "double#1"]
    data = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert list(predict(model, {"x": data})) == ["double", "x", "double#1"]
    samples = raw.encode_samples(model.path, {"x": data}, model.inputs)
    stored = raw.stored_outputs(model.path, samples)
    # a board calls tensors by their names in the file
    names = [{**one, "name": one["name"].partition("#")[0]} for one in described(stored)]
    read = raw.read_outputs(model.path, outputs_file(stored), names, samples.count)
    assert raw.mismatch(stored, read) == raw.Mismatch(0.0, 36, 0.0)
    real = raw.real_outputs(model.path, read, model.outputs)
    assert {name: (array / data.clip(1)).max() for name, array in real.items()} == {
        "double": 2, "x": 1, "double#1": 2,
    }  # fmt: skip


def test_integer_outputs_are_dequantised_and_moved_to_the_source_layout(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", (1, 2, 2, 3))
    content = g.bytes([g.op("MUL", [x, g.const("one", np.ones((1, 1, 1, 3), np.float32))], "y", (1, 2, 2, 3), "MulOptions")])  # fmt: skip
    data = np.random.default_rng(0).normal(size=(5, 1, 2, 2, 3)).astype(np.float32)
    ranges = quantize_ops.collect_ranges(content, [[d] for d in data], where="m").table()
    model = artifact(tmp_path, quantize_ops.quantize(content, ranges))
    specs = tuple(
        dataclasses.replace(s, layout="NHWC", source_layout="NCHW")
        for s in (*model.inputs, *model.outputs)
    )
    nchw = np.ascontiguousarray(data[:, 0].transpose(0, 3, 1, 2))
    samples = raw.encode_samples(model.path, {"x": nchw}, specs[:1])
    real = raw.real_outputs(model.path, raw.stored_outputs(model.path, samples), specs[1:])
    step = specs[1].scale
    assert real["y"].shape == (5, 3, 2, 2)
    assert np.abs(real["y"] - nchw).max() <= step  # half a step on the way in, half on the way out


def test_an_outputs_file_of_another_model_or_length_is_refused(tmp_path: Path) -> None:
    model = artifact(tmp_path, two_outputs(1))
    samples = raw.encode_samples(model.path, {"x": np.ones((4, 3), np.float32)}, model.inputs)
    stored = raw.stored_outputs(model.path, samples)
    whole, table = outputs_file(stored), described(stored)
    with pytest.raises(DataError, match="are 95 bytes; 4 inferences"):
        raw.read_outputs(model.path, whole[:-1], table, 4)
    with pytest.raises(DataError, match="answered with outputs"):
        raw.read_outputs(model.path, whole, table[:1], 4)
    with pytest.raises(DataError, match="int8 of 12 bytes"):
        raw.read_outputs(model.path, whole, [{**table[0], "dtype": "int8"}, table[1]], 4)


# --- what answers are judged by


def test_predictions_are_the_best_classes_and_none_for_regression() -> None:
    scores = np.array([[0.1, 0.9], [0.5, 0.5]], np.float32)
    assert predictions("top1", {"y": scores}).tolist() == [1, 0]
    maps = np.zeros((1, 2, 1, 2), np.float32)
    maps[0, 1, 0, 1] = 1
    assert predictions("mean_iou", {"y": maps}).tolist() == [[[0, 1]]]
    assert predictions("mse", {"y": scores}) is None
    assert predictions("own.py:judge", {"y": scores}) is None
    assert predictions("top1", {"y": scores, "z": scores}) is None


def test_classes_are_counted_by_name_and_only_where_they_have_samples() -> None:
    labels = np.array([0, 0, 2])
    was, now = np.array([True, True, True]), np.array([True, False, True])
    assert by_class(labels, was, now, ("cat", "dog")) == [
        {"class": "cat", "n": 2, "reference_right": 2, "right": 1},
        {"class": "2", "n": 1, "reference_right": 1, "right": 1},
    ]
    assert by_class(np.zeros(3, np.float32), was, now) == []


# y = 2 x + 1 keeps the order of classes, so a sample's class is where its largest value is
CLASSES = np.eye(4, dtype=np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return artifact(tmp_path, tiny_tflite())


def digits(folder: Path, labels: np.ndarray, *, wrong: int = 0) -> DataSource:
    """Samples of the classes ``labels``, of which the first ``wrong`` look like the next class."""
    shown = labels.copy()
    shown[:wrong] = (shown[:wrong] + 1) % 4
    np.savez(folder / "set.npz", x=CLASSES[shown], labels=labels)
    return DataSource(kind="npz", path=folder / "set.npz")


def chosen(model: Artifact, source: DataSource, count: int = 0, **changes: Any) -> DeviceEvaluation:
    return dataclasses.replace(
        choose_evaluation(
            shipped=model, reference=model, inputs=(TensorSpec("x", (1, 4)),), source=source,
            metric="top1", root=Path(), count=count, seed=3,
        ),
        **changes,
    )  # fmt: skip


def judged(
    model: Artifact, evaluation: DeviceEvaluation, upset: Mapping[int, int] | None = None
) -> dict[str, Measurement]:
    """Measurements for a board that answers like this host, but class ``upset[i]`` for sample i."""
    samples = raw.encode_samples(model.path, evaluation.inputs, model.inputs)
    stored = raw.stored_outputs(model.path, samples)
    for row, answer in (upset or {}).items():
        stored["y"][row, 0] = CLASSES[answer]
    context = {"model_sha256": model.sha256, **CONTEXT}
    found = device_measurements(
        model, samples, described(stored), outputs_file(stored), context, evaluation
    )
    json.dumps([m.context for m in found], allow_nan=False)  # it is stored as JSON
    assert all(m.unit == METRICS[m.metric].unit for m in found)
    return {m.metric: m for m in found}


def test_a_board_that_computes_the_same_loses_nothing(model: Artifact, tmp_path: Path) -> None:
    evaluation = chosen(model, digits(tmp_path, np.arange(40) % 4, wrong=4))
    found = judged(model, evaluation)
    assert {name: m.samples[0][0] for name, m in found.items()} == {
        "device_mismatch": 0.0, "device_flips": 0.0, "device_task_metric": 0.9,
        "device_accuracy_drop": 0.0,
    }  # fmt: skip
    context = found["device_task_metric"].context
    assert (context["samples"], context["samples_total"], context["samples_seed"]) == (40, 40, 3)
    assert context["task_metric_host"] == context["task_metric_reference"] == 0.9


def test_flips_and_lost_classes_are_named(model: Artifact, tmp_path: Path) -> None:
    labels = np.arange(40) % 4
    # samples 1 and 5 are of class 1, 2 of class 2
    found = judged(model, chosen(model, digits(tmp_path, labels)), {1: 0, 5: 0, 2: 3})
    # the host says [1, 3, 1, 1] where the board says [1, 0, 0, 0]: three of four values differ
    assert found["device_mismatch"].samples[0][0] == pytest.approx(3 * 3 / 160)
    assert found["device_flips"].samples == ((3 / 40,),)
    assert found["device_flips"].context["flips"][0] == {
        "sample": 1, "host": 1, "device": 0, "label": 1,
    }  # fmt: skip
    drop = found["device_accuracy_drop"]
    assert drop.samples[0][0] == pytest.approx(7.5)
    low, high = drop.context["interval_points"]
    assert low < 7.5 < high
    lost = {c["class"]: c["reference_right"] - c["right"] for c in drop.context["by_class"]}
    assert lost == {"0": 0, "1": 2, "2": 1, "3": 0}
    assert found["device_task_metric"].samples[0][0] == pytest.approx(0.925)


def test_flips_give_the_number_in_the_whole_set(model: Artifact, tmp_path: Path) -> None:
    evaluation = chosen(model, digits(tmp_path, np.arange(400) % 4), count=8)
    assert evaluation.context["samples"] == 8
    assert evaluation.context["samples_total"] == 400
    row = 5
    other = (int(evaluation.labels[row]) + 1) % 4
    (flip,) = judged(model, evaluation, {row: other})["device_flips"].context["flips"]
    assert flip["sample"] == evaluation.indices[row] != row
    assert (flip["label"], flip["device"]) == (evaluation.labels[row], other)


def test_without_labels_there_are_flips_but_no_metric(model: Artifact, tmp_path: Path) -> None:
    evaluation = chosen(model, digits(tmp_path, np.arange(8) % 4), labels=None)
    assert set(judged(model, evaluation, {0: 3})) == {"device_mismatch", "device_flips"}


def test_a_count_is_rounded_up_to_whole_batches(tmp_path: Path) -> None:
    model = artifact(tmp_path, two_outputs(4))
    np.savez(tmp_path / "set.npz", x=np.zeros((10, 3), np.float32))
    evaluation = choose_evaluation(
        shipped=model, reference=model, inputs=(TensorSpec("x", (1, 3)),),
        source=DataSource(kind="npz", path=tmp_path / "set.npz"), metric="top1", root=Path(),
        count=5, seed=0,
    )  # fmt: skip
    assert evaluation.context["samples"] == 8


def test_samples_that_do_not_fill_a_batch_are_not_claimed(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", (4, 3))
    one = g.const("one", np.ones((1, 3), np.float32))
    model = artifact(tmp_path, g.bytes([g.op("MUL", [x, one], "y", (4, 3), "MulOptions")]))
    labels = np.arange(10) % 3
    np.savez(tmp_path / "set.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels)
    evaluation = choose_evaluation(
        shipped=model, reference=model, inputs=(TensorSpec("x", (1, 3)),),
        source=DataSource(kind="npz", path=tmp_path / "set.npz"), metric="top1", root=Path(),
        count=0, seed=0,
    )  # fmt: skip
    found = judged(model, evaluation)
    assert found["device_task_metric"].samples == ((1.0,),)
    assert found["device_task_metric"].context["samples"] == 8


def test_samples_too_large_for_the_boards_disk_are_refused_with_the_numbers(
    model: Artifact,
) -> None:
    samples = raw.encode_samples(model.path, {"x": np.ones((1000, 4), np.float32)}, model.inputs)
    check_fits(model, samples, free_bytes=33_000, reserve_bytes=1000, address="pi")
    check_fits(model, samples, free_bytes=None, reserve_bytes=1000, address="pi")
    with pytest.raises(TransferError, match=r"1000 samples need 16 kB.*outputs 16 kB") as caught:
        check_fits(model, samples, free_bytes=32_999, reserve_bytes=1000, address="pi")
    assert caught.value.code == "disk-full"


# --- gates


def evidence(model: Artifact, found: Mapping[str, Measurement]) -> Evidence:
    return Evidence(model.sha256, "pi", found)


def test_the_gates_bind_on_what_the_board_computed(model: Artifact, tmp_path: Path) -> None:
    evaluation = chosen(model, digits(tmp_path, np.arange(40) % 4))
    good = evidence(model, judged(model, evaluation))
    bad = evidence(model, judged(model, evaluation, {1: 0, 5: 0, 2: 3}))
    floor, drop = DeviceTaskMetricGate(min=0.95), DeviceAccuracyDropGate(max=2.0)
    assert [g.judge(good).status for g in (floor, drop)] == [Status.PASS] * 2
    assert [g.judge(bad).status for g in (floor, drop)] == [Status.FAIL] * 2
    assert "40 samples" in drop.judge(bad).reason


def test_a_loss_on_the_board_is_explained_by_the_layers_of_the_file(
    model: Artifact, tmp_path: Path
) -> None:
    found = judged(model, chosen(model, digits(tmp_path, np.arange(40) % 4)), {1: 0, 5: 0})
    layers = [{"layer": "mean", "operator": "MEAN", "sqnr_db": 4.4}]
    parity = single("parity_sqnr", "dB", 4.4, {"model_sha256": model.sha256, "layers": layers})
    (_, verdict) = judge(
        [DeviceAccuracyDropGate(max=1.0)],
        Evidence(model.sha256, "", {"parity_sqnr": parity}),
        [evidence(model, found)],
        baselines={},
        measured_against={},
        run_id="r",
    )
    assert verdict.status is Status.FAIL
    assert [line.partition(":")[0] for line in verdict.details] == [
        "the device answers 2 of 40 samples otherwise than this host does with the same file",
        "sample 1", "sample 5", "class 1", "layer mean (MEAN)",
    ]  # fmt: skip


def test_a_small_sample_does_not_exclude_a_hard_limit(model: Artifact, tmp_path: Path) -> None:
    found = judged(model, chosen(model, digits(tmp_path, np.arange(40) % 4)))
    gate = DeviceAccuracyDropGate(max=2.0, hard_max=3.0)
    verdict = gate.judge(evidence(model, found))
    assert verdict.status is Status.INCONCLUSIVE
    assert "evaluate on more samples" in verdict.reason


def test_answers_of_another_file_or_of_no_known_sample_never_pass(
    model: Artifact, tmp_path: Path
) -> None:
    found = judged(model, chosen(model, digits(tmp_path, np.arange(40) % 4)))
    gate = DeviceAccuracyDropGate(max=2.0)
    assert gate.judge(Evidence("other", "pi", found)).status is Status.INCONCLUSIVE
    drop = found["device_accuracy_drop"]
    for key in ("samples", "runtime_version"):
        context = {k: v for k, v in drop.context.items() if k != key}
        stripped = {"device_accuracy_drop": dataclasses.replace(drop, context=context)}
        verdict = gate.judge(evidence(model, stripped))
        assert (verdict.status, key in verdict.reason) == (Status.INCONCLUSIVE, True)


# --- where the error comes from


def test_layers_are_ranked_by_the_noise_they_add_and_not_by_what_they_inherit() -> None:
    content, _ = quantize_ops.fuse_activations(small_cnn(), where="m")
    data = np.random.default_rng(1).normal(size=(20, 6, 6, 3)).astype(np.float32)
    batches = [[x[None]] for x in data]
    table = quantize_ops.collect_ranges(content, batches, where="m").table()
    broken = quantize_ops.quantize(content, {**table, "mean": (0.0, 0.2 * table["mean"][1])})
    worst = quantize_ops.noisiest_layers(content, broken, batches[:4], count=2)
    # y is at 5 dB because its input is; conv is at 40 dB, all its own
    assert [row["layer"] for row in worst] == ["mean", "conv"]
    assert worst[0]["sqnr_db"] < 10
    assert worst[0]["operator"] == "MEAN"


def test_a_quantised_file_is_evaluated_with_its_layers_and_classes(tmp_path: Path) -> None:
    content, _ = quantize_ops.fuse_activations(small_cnn(), where="m")
    data = np.random.default_rng(1).normal(size=(40, 6, 6, 3)).astype(np.float32)
    table = quantize_ops.collect_ranges(content, [[x[None]] for x in data], where="m").table()
    before = artifact(tmp_path, content, "float.tflite")
    after = artifact(tmp_path, quantize_ops.quantize(content, table), "int8.tflite")
    # what was calibrated on, as pixels that nobody divided by 255
    other = {"name": before.inputs[0].name, "shape": [40, 6, 6, 3], "dtype": "float32", "minimum": 0.0, "maximum": 255.0, "mean": 120.0, "std": 70.0}  # fmt: skip
    after = dataclasses.replace(after, facts={"calibration": {"is_random": False, "inputs": [other]}})  # fmt: skip
    labels = np.arange(40) % before.outputs[0].shape[1]
    np.savez(tmp_path / "set.npz", **{before.inputs[0].name: data}, labels=labels)
    found = {
        m.metric: m
        for m in evaluate(
            shipped=after, float_model=before, reference=before, inputs=before.inputs,
            source=DataSource(kind="npz", path=tmp_path / "set.npz"), metric="top1", root=tmp_path,
        )
    }  # fmt: skip
    layers = found["parity_sqnr"].context["layers"]
    assert {row["layer"] for row in layers} == {"conv", "act", "mean", "y"}
    drop = found["accuracy_drop"].context
    assert drop["layers"] == layers
    (doubt,) = drop["doubts"]
    assert "calibration has mean 120 and spread 70" in doubt
    assert sum(c["n"] for c in drop["by_class"]) == 40
    right = sum(c["right"] for c in drop["by_class"]) / 40
    assert right == pytest.approx(found["task_metric"].samples[0][0])
