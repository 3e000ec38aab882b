"""ci/bench/zoo.py and zoo_models: networks worth converting, and a judge that sees what is wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("onnxscript")

from edgepipe.artifact import make_artifact  # noqa: E402

BENCH = Path(__file__).parents[2] / "ci" / "bench"
sys.path.insert(0, str(BENCH))

import node_cases  # noqa: E402
import zoo  # noqa: E402
import zoo_models  # noqa: E402

ROW: dict[str, Any] = {
    "model": "net", "family": "mobile", "route": "onnx2tf", "used": "onnx2tf", "converted": True, "parity": 1e-6, "transposes": 2,
    "int8": {"islands": 0, "sqnr_db": 30.0}, "cpu_s": 3.0, "peak_rss_bytes": 400_000_000,
}  # fmt: skip


def test_there_are_at_least_60_networks_and_each_has_a_builder_that_can_be_imported() -> None:
    assert len(zoo_models.MODELS) >= 60
    for name, entry in zoo_models.MODELS.items():
        module, _, function = entry.builder.partition(":")
        assert function == name
        assert getattr(sys.modules[module], function) is entry.build


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo_models.MODELS))
def test_a_network_has_the_same_weights_twice_and_outputs_that_depend_on_its_input(name: str) -> None:  # fmt: skip
    entry = zoo_models.MODELS[name]
    network, again = zoo_models.settled(entry), zoo_models.settled(entry)
    for (key, one), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):  # fmt: skip
        assert torch.equal(one, other), key
    inputs = [torch.from_numpy(a) for a in zoo_models.samples(entry, 8, seed=99).values()]
    with torch.no_grad():
        outputs = zoo.flatten_outputs(network(*inputs))
    for output in outputs:
        assert torch.isfinite(output).all()
        assert len(output) == 8
        # samples differ by far more than float32 rounds: a layer gone wrong is not hidden
        assert output.std(0).mean() > 0.01 * output.abs().max()
        assert output.abs().max() < 100


def test_another_seed_gives_other_weights_and_other_samples() -> None:
    entry = zoo_models.MODELS["lenet"]
    one, other = zoo_models.settled(entry, seed=0), zoo_models.settled(entry, seed=1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert not np.array_equal(zoo_models.samples(entry, 2, seed=0)["image"], zoo_models.samples(entry, 2, seed=1)["image"])  # fmt: skip


def test_settling_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    zoo_models.settled(zoo_models.MODELS["lenet"])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("actual", "error"),
    [
        ([[1.0, -2.0]], 0.0),
        ([[1.0, -1.9]], 0.05),  # off by 0.1 where the largest is 2
        ([[1.0, float("nan")]], float("inf")),
        ([[1.0], [-2.0]], float("inf")),
    ],
)
def test_parity_is_the_largest_error_over_the_largest_value(actual: list[list[float]], error: float) -> None:  # fmt: skip
    expected = {"output_0": np.array([[1.0, -2.0]], np.float32)}
    found = zoo.worst(expected, {"output_0": np.array(actual, np.float32)})
    assert found == pytest.approx(error, abs=1e-7)


def test_an_output_that_is_missing_is_no_parity() -> None:
    assert zoo.worst({"a": np.ones(1)}, {}) == float("inf")


def test_the_judge_sees_swapped_axes(tmp_path: Path) -> None:
    """A record that names the wrong layout must not pass for the right one."""
    from edgepipe.tflite_ops.tiny import tiny_tflite

    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_tflite(size=4))
    from edgepipe.tflite_ops.inspect import tensor_specs

    inputs, outputs = tensor_specs(path)
    made = make_artifact("tflite", path, inputs=inputs, outputs=outputs)
    unseen = {inputs[0].name: np.random.default_rng(0).normal(size=(zoo.JUDGED, *inputs[0].shape[1:])).astype(np.float32)}  # fmt: skip
    found = zoo.run_tflite(made, unseen)
    assert zoo.worst(found, zoo.run_tflite(made, unseen)) == 0.0
    assert zoo.moved(np.zeros((1, 2, 3, 4)), "NCHW", "NHWC").shape == (1, 3, 4, 2)
    swapped = {name: array[::-1] for name, array in found.items()}
    assert zoo.worst(found, swapped) > zoo.PARITY


def test_a_wrong_result_that_was_accepted_is_shown_and_not_counted_as_the_same() -> None:
    refused = {"model": "b", "family": "mobile", "route": "onnx2tf", "converted": False, "code": "parity", "message": "off | by far"}  # fmt: skip
    rows = [ROW, {**ROW, "model": "c", "parity": 0.3}, refused]
    lines = zoo.summary(rows)
    assert lines[2] == "| onnx2tf | 3 | 1 (33.3 %) | 1 | 1 | 2 | 1 | 30.0 dB | 3.0 s |"
    assert "- c by onnx2tf: parity 0.3" in lines
    shown = zoo.table(rows)
    assert "**accepted, but not the same**" in shown[3]
    assert shown[4].endswith("| parity: off / by far |")


def test_what_auto_tried_is_counted_by_way() -> None:
    def tried(route: str, code: str) -> dict[str, Any]:
        exporter = "dynamo" if route == "onnx2tf" else "torch.export"
        return {"route": route, "exporter": exporter, "simplified": route == "onnx2tf", "ok": not code, "clean": not code, "code": code}  # fmt: skip

    one = ROW | {"route": "auto", "attempts": [tried("onnx2tf", "parity"), tried("litert-torch", "")]}  # fmt: skip
    other = ROW | {"route": "auto", "attempts": [tried("onnx2tf", "")]}
    assert zoo.searched([one, other, ROW])[-2:] == [
        "| onnx2tf from dynamo | 2 | 1 | 1 | parity 1 |", "| litert-torch | 1 | 1 | 1 |  |",
    ]  # fmt: skip
    assert zoo.searched([ROW]) == []


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_row_is_made_once_and_a_crash_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def crash(entry: object, route: str, work: Path, timeout_s: float, keep: Any) -> None:
        keep({**ROW, "model": "lenet"})  # what was known before int8
        die()

    monkeypatch.setattr(zoo, "make_row", crash)
    row = zoo.row_of("lenet", "onnx2tf", tmp_path, 60.0)
    assert row["parity"] == 1e-6
    assert zoo.row_of("lenet", "onnx2tf", tmp_path, 60.0) == row

    monkeypatch.setattr(zoo, "make_row", lambda *_: die())
    row = zoo.row_of("vgg", "onnx2tf", tmp_path, 60.0)
    assert (row["converted"], row["code"]) == (False, "crash")


def test_a_row_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(zoo, "make_row", lambda *_: time.sleep(60))
    assert zoo.row_of("lenet", "onnx2tf", tmp_path, 0.3)["code"] == "timeout"


@pytest.mark.slow
def test_two_networks_go_all_the_way_and_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--work", str(tmp_path), "--route", "onnx2tf", "--only", "siamese", "ambiguous_flatten"])  # fmt: skip
    assert zoo.main() == 0
    rows = json.loads((tmp_path / "zoo.json").read_text())
    assert [row["model"] for row in rows] == ["siamese", "ambiguous_flatten"]
    for row in rows:
        assert row["parity"] < 1e-5
        assert row["int8"]["sqnr_db"] > 15
        assert row["peak_rss_bytes"] > 1e8
    assert "| onnx2tf | 2 | 2 (100.0 %) |" in (tmp_path / "zoo.md").read_text()


# -- node_cases.py ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return {case.name: case for case in node_cases.cases()}


@pytest.mark.slow
def test_there_are_more_than_a_thousand_node_cases_in_the_same_order_every_time(cases: dict[str, Any]) -> None:  # fmt: skip
    assert len(cases) > 1000
    assert not [name for name in cases if "_expanded" in name]


@pytest.mark.slow
def test_weights_become_constants_and_equal_inputs_stay_inputs(cases: dict[str, Any]) -> None:
    model, fed = node_cases.as_exported(cases["test_basic_conv_with_padding"])
    assert list(fed) == ["x"]
    assert [t.name for t in model.graph.initializer] == ["W"]
    model, fed = node_cases.as_exported(cases["test_add"])
    assert list(fed) == ["x", "y"]


def test_a_difference_is_seen_and_rounding_is_not() -> None:
    expected = np.array([1.0, -100.0, np.nan, np.inf], np.float32)
    assert node_cases.difference(expected, expected + np.array([5e-4, 0, 0, 0], np.float32)) == ""
    assert "1 of 4 values differ" in node_cases.difference(expected, np.array([1.1, -100, np.nan, np.inf]))  # fmt: skip
    assert node_cases.difference(expected, np.array([1.0, -100, 0.0, np.inf])) != ""
    assert node_cases.difference(expected, expected[:3]) == "shape (3,) for (4,)"
    assert node_cases.difference(np.array([True]), np.array([False])) != ""


def test_verdicts_are_counted_by_operator_and_refusals_by_reason() -> None:
    def row(op: str, verdict: str, code: str = "") -> dict[str, str]:
        return {"case": "c", "op": op, "verdict": verdict, "code": code, "message": ""}

    rows = [row("Mod", "refused", "parity"), row("Add", "pass"), row("Mod", "WRONG"), row("Mod", "pass")]  # fmt: skip
    assert node_cases.by_operator(rows) == {
        "Add": {"cases": 1, "pass": 1, "refused": {}, "disputed": 0, "bug": 0, "WRONG": 0},
        "Mod": {
            "cases": 3,
            "pass": 1,
            "refused": {"parity": 1},
            "disputed": 0,
            "bug": 0,
            "WRONG": 1,
        },
    }
    assert "| Mod | 3 | 1 | parity 1 | 0 | 0 | 1 |" in node_cases.table(rows)


@pytest.mark.slow
def test_an_accepted_wrong_answer_is_called_wrong(
    cases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases["test_relu"]
    row = node_cases.make_row(case, "onnx2tf", _folder(tmp_path / "right"))
    assert row["verdict"] == "pass"
    other = node_cases.make_row(
        cases["test_quantizelinear"], "onnx2tf", _folder(tmp_path / "refused")
    )
    assert other["verdict"] == "refused"

    def lie(source: Any, *_: Any) -> Any:  # a converter whose file gives back its input
        return source

    def identity(path: Path, arrays: Any, *_: Any) -> Any:
        return arrays

    monkeypatch.setattr(node_cases, "convert", lie)
    monkeypatch.setattr(node_cases, "run_tflite", identity)
    row = node_cases.make_row(case, "onnx2tf", _folder(tmp_path / "wrong"))
    assert row["verdict"] == "WRONG"
    assert "WRONG test_relu" in "\n".join(node_cases.table([row]))

    # a file that does what onnxruntime does, where that is not what the specification says
    monkeypatch.setattr(node_cases, "onnxruntime_says", lambda _, fed: {"y": fed["x"]})
    row = node_cases.make_row(case, "onnx2tf", _folder(tmp_path / "disputed"))
    assert row["verdict"] == "disputed"


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
