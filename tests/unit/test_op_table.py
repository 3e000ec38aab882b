"""What operators cost: fitted from timings, kept, predicted with, guessed where nothing was measured."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgepipe import cli, op_table
from edgepipe.bench import MeasureOptions
from edgepipe.device import open_device
from edgepipe.errors import NotReadyError, RequestError
from edgepipe.op_table import (
    COST_KINDS,
    Op,
    OpCost,
    OpTable,
    Timing,
    estimate,
    estimate_change,
    estimate_layers,
    estimate_tflite,
    estimated_table,
    fit_table,
    gain_note,
    load_op_table,
    non_negative_least_squares,
    save_op_table,
    tflite_ops_of,
    tiled_macs,
)
from edgepipe.op_timing import SESSION, time_operators
from edgepipe.pipeline import run
from edgepipe.profile import Cluster, DeviceProfile, find_profile
from edgepipe.recipe import load_recipe
from edgepipe.report import render
from edgepipe.resources import profile_paths
from edgepipe.store import Store
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.run import invoke_once, open_tflite
from edgepipe.tflite_ops.tiny import op_chain_tflite
from edgepipe.torch_ops.result import describe_layers

pytestmark = pytest.mark.slow  # real processes and trainings: not for the inner loop

NOW = datetime.datetime(2026, 11, 23, 4, tzinfo=datetime.UTC)
SIZES = ((48, (8, 8)), (24, (16, 24)), (24, (20, 20)), (12, (64, 64)), (8, (12, 36)), (6, (128, 128)), (3, (256, 256)))  # fmt: skip
CHAINS = ("conv", "pointwise", "depthwise", "dense", "elementwise")


def ops(kind: str, *, dtype: str = "int8", size: int = 4, channels: tuple[int, int] = (8, 12), repeats: int = 1) -> list[Op]:  # fmt: skip
    model = op_chain_tflite(kind, dtype=dtype, size=size, channels=channels, repeats=repeats)
    return tflite_ops_of(parse_model(model, where=kind))


def profile(name: str) -> DeviceProfile:
    return find_profile(name, profile_paths())


def timings(cost: OpCost, kind: str, invoke_s: float, *, noise: float = 0.0, seed: int = 0) -> list[Timing]:  # fmt: skip
    """What a board would take whose operators cost exactly this."""
    generator = np.random.default_rng(seed)
    found = []
    for size, channels in SIZES:
        made = ops(kind, size=size, channels=channels, repeats=4)
        seconds = invoke_s + sum(op_table.op_seconds(op, cost) for op in made)
        found.append(Timing(tuple(made), seconds * float(np.exp(generator.normal(0, noise)))))
    return found


def fit(found: list[Timing], invoke_s: float = 0.0) -> OpTable:
    return fit_table(found, profile="board", threads=1, invoke_s=invoke_s, same={"runtime_version": "2.3.0"}, now=NOW)  # fmt: skip


# -------------------------------------------------------------------------------- what is priced


@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("kind", COST_KINDS)
def test_every_kind_of_synthetic_model_runs_and_is_of_its_kind(kind: str, dtype: str) -> None:
    content = op_chain_tflite(kind, dtype=dtype, size=4, channels=(8, 12), repeats=3)
    found = tflite_ops_of(parse_model(content, where=kind))
    assert [(op.kind, op.dtype) for op in found] == [(kind, dtype)] * 3
    invoke_once(open_tflite(content), where=kind)


def test_macs_and_bytes_of_an_operator_are_those_of_its_formula() -> None:
    (op,) = ops("conv", size=4, channels=(8, 12))
    assert op.macs == 4 * 4 * 12 * 3 * 3 * 8
    assert op.bytes == 12 * 3 * 3 * 8 + 12 * 4 + 4 * 4 * 12  # weights, int32 biases, output
    assert op.channels == (8, 12)
    (op,) = ops("depthwise", dtype="float32", size=5, channels=(6, 6))
    assert (op.macs, op.channels) == (5 * 5 * 6 * 9, (0, 6))
    (op,) = ops("pool", size=5, channels=(6, 6))
    assert (op.macs, op.bytes) == (0, 5 * 5 * 6)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Conv2d(8, 12, 3, padding=1), (1, 8, 4, 4), "conv"),
        (nn.Conv2d(8, 12, 1), (1, 8, 4, 4), "pointwise"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 4, 4), "depthwise"),
        (nn.Linear(8, 12), (1, 8), "dense"),
    ],
)
def test_a_torch_layer_is_priced_as_the_operator_it_becomes(
    layer: nn.Module, shape: tuple[int, ...], kind: str
) -> None:
    (described,) = describe_layers(layer.eval(), [torch.zeros(shape)])
    of_layer = op_table.op_of_layer(described, "int8")
    (of_file,) = ops(kind, channels=(8, 8) if kind == "depthwise" else (8, 12))
    assert (of_layer.kind, of_layer.macs, of_layer.channels) == (kind, of_file.macs, of_file.channels)  # fmt: skip
    biases = 4 * (8 if kind == "depthwise" else 12)
    assert of_layer.bytes == of_file.bytes - biases


def test_layers_without_products_cost_nothing() -> None:
    layers = describe_layers(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval(), [torch.zeros(1, 8, 4, 4)])  # fmt: skip
    found = estimate_layers(layers, estimated_table(profile("rpi4b_4gb")))
    assert found.ops_s[0] == 0.0 < found.ops_s[1]
    assert found.latency_s == pytest.approx(found.table.invoke_s + found.ops_s[1])


@given(macs=st.integers(1, 10**9), channels=st.tuples(st.integers(1, 300), st.integers(1, 300)), tile=st.sampled_from([(1, 1), (4, 8), (8, 16)]))  # fmt: skip
def test_whole_tiles_never_cost_less_and_nothing_where_channels_fill_them(
    macs: int, channels: tuple[int, int], tile: tuple[int, int]
) -> None:
    op = Op("CONV_2D", "conv", "int8", macs, 0, channels)
    assert tiled_macs(op, tile) >= macs * (1 - 1e-12)
    filled = dataclasses.replace(op, channels=(channels[0] * tile[0], channels[1] * tile[1]))
    assert tiled_macs(filled, tile) == pytest.approx(macs)


def test_three_to_twenty_channels_cost_four_to_twenty_four() -> None:
    assert tiled_macs(Op("CONV_2D", "conv", "int8", 600, 0, (3, 20)), (4, 8)) == pytest.approx(600 * 4 / 3 * 24 / 20)  # fmt: skip


# --------------------------------------------------------------------------------------- fitting


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), rows=st.integers(3, 12))
def test_least_squares_are_those_of_lawson_and_hanson(seed: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    # columns as unlike as operators, MACs and bytes are
    matrix = generator.exponential(size=(rows, 3)) * [1, 1e6, 1e4]
    wanted = generator.normal(1, 1, rows)
    found = non_negative_least_squares(matrix.tolist(), wanted.tolist())
    # scipy's own stopping rule is absolute: give it columns of like size
    expected, residual = scipy.optimize.nnls(matrix / [1, 1e6, 1e4], wanted)
    assert min(found) >= 0
    assert np.linalg.norm(matrix @ found - wanted) == pytest.approx(residual, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(np.array(found) * [1, 1e6, 1e4], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tile", [(1, 1), (1, 8), (8, 16)])
@pytest.mark.parametrize("kind", ["conv", "pointwise"])
def test_a_fit_finds_the_cost_that_made_the_timings(kind: str, tile: tuple[int, int]) -> None:
    cost = OpCost(op_s=2e-6, mac_s=1e-10, byte_s=3e-11, tile=tile)
    found = fit(timings(cost, kind, 5e-6), 5e-6).costs[f"{kind} int8"]
    assert found.tile == tile
    assert (found.op_s, found.mac_s, found.byte_s) == pytest.approx((2e-6, 1e-10, 3e-11), rel=1e-3)
    assert found.error < 1e-6
    assert found.points == len(SIZES)


def test_the_error_of_a_table_is_that_of_models_it_has_not_seen() -> None:
    cost = OpCost(op_s=2e-6, mac_s=1e-10, byte_s=3e-11)
    # three coefficients go through four timings nearly whatever these are
    few = timings(cost, "conv", 0.0, noise=0.3, seed=1)[:4]
    table = fit(few)
    seen = [abs(estimate(t.ops, table).latency_s / t.seconds - 1) for t in few]
    assert table.error > 1.5 * statistics.median(seen)
    # and with more of them an unseen model is predicted about as well as that says
    table = fit(timings(cost, "conv", 0.0, noise=0.1, seed=1))
    unseen = ops("conv", size=20, channels=(40, 48), repeats=3)
    true_s = sum(op_table.op_seconds(op, cost) for op in unseen)
    assert 0.02 < table.error < 0.3
    assert estimate(unseen, table).latency_s == pytest.approx(true_s, rel=0.3)


@pytest.mark.parametrize("spoilt", [0, 3, 6])
def test_one_timing_that_other_work_made_long_does_not_spoil_the_table(spoilt: int) -> None:
    good = timings(OpCost(op_s=2e-6, mac_s=1e-10, byte_s=3e-11), "dense", 0.0, noise=0.01)
    found = [dataclasses.replace(t, seconds=t.seconds * (4 if i == spoilt else 1)) for i, t in enumerate(good)]  # fmt: skip
    table = fit(found)
    for timing in good:  # without reweighting up to 38 % off
        assert estimate(timing.ops, table).latency_s == pytest.approx(timing.seconds, rel=0.03)


def test_too_few_timings_make_no_table() -> None:
    found = timings(OpCost(op_s=1e-6, mac_s=1e-10, byte_s=0.0), "conv", 0.0)[:3]
    with pytest.raises(NotReadyError, match="conv int8"):
        fit(found)
    with pytest.raises(NotReadyError, match="any operator"):
        fit([])


# --------------------------------------------------------------------------- predicting, guessing


def test_an_operator_that_the_table_lacks_is_guessed_and_named() -> None:
    table = fit(timings(OpCost(op_s=1e-6, mac_s=1e-10, byte_s=1e-10), "conv", 0.0))
    known = estimate(ops("conv", size=12), table)
    assert known.guessed == ()
    other_dtype = estimate(ops("conv", dtype="float32", size=12), table)
    assert other_dtype.guessed == ("CONV_2D",)
    unknown = estimate([Op("EMBEDDING_LOOKUP", "embedding_lookup", "int8", 0, 1000)], table)
    assert unknown.guessed == ("EMBEDDING_LOOKUP",)
    assert unknown.latency_s > 0
    assert "guessed: EMBEDDING_LOOKUP" in unknown.text()
    with pytest.raises(RequestError, match="is empty"):
        estimate(ops("conv"), dataclasses.replace(table, costs={}))


def test_a_reshape_costs_nothing() -> None:
    table = estimated_table(profile("rpi4b_4gb"))
    assert estimate([Op("RESHAPE", "view", "int8", 0, 10**6)], table).ops_s == (0.0,)


def test_an_estimate_says_where_it_comes_from() -> None:
    table = fit(timings(OpCost(op_s=1e-6, mac_s=1e-10, byte_s=0.0), "conv", 0.0))
    assert "measured operators of board, within " in estimate(ops("conv"), table).text()
    guess = estimate(ops("conv"), estimated_table(profile("rpi4b_4gb"))).text()
    assert "estimated operators of rpi4b_4gb, a guess that may be off by a factor of two" in guess


def test_an_estimated_table_follows_cores_frequency_threads_and_isa() -> None:
    board = profile("rpi4b_4gb")
    model = ops("pointwise", size=24, channels=(64, 64), repeats=4)

    def seconds(**changes: object) -> float:
        cluster = dataclasses.replace(board.clusters[0], **{k: v for k, v in changes.items() if k != "threads"})  # type: ignore[arg-type]  # fmt: skip
        threads = int(str(changes.get("threads", 1)))
        return estimate(model, estimated_table(dataclasses.replace(board, clusters=(cluster,)), threads=threads)).latency_s  # fmt: skip

    assert seconds(max_frequency_mhz=900) == pytest.approx(2 * seconds(max_frequency_mhz=1800))
    assert seconds() / 4 < seconds(threads=4) < seconds()
    assert seconds(core="unknown", isa=("dotprod",)) < seconds(core="unknown")
    # MobileNetV1 takes 24 ms with four threads at 1.5 GHz, says XNNPACK; its products are 569 million
    table = estimated_table(dataclasses.replace(board, clusters=(Cluster(core="Cortex-A72", count=4, max_frequency_mhz=1500),)), threads=4)  # fmt: skip
    assert 569e6 * table.costs["pointwise int8"].mac_s == pytest.approx(0.024, rel=0.05)


def test_a_profile_that_says_nothing_of_its_frequency_needs_a_measured_table() -> None:
    board = profile("rpi4b_4gb")
    cluster = dataclasses.replace(board.clusters[0], max_frequency_mhz=0)
    with pytest.raises(NotReadyError, match="says nothing of its frequency"):
        estimated_table(dataclasses.replace(board, clusters=(cluster,)))


def test_a_profile_that_says_nothing_of_its_cores_needs_a_measured_table(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="says nothing of its cores") as caught:
        load_op_table(tmp_path, profile("localhost"))
    assert "edgepipe calibrate --ops" in caught.value.hint


def layers_of(width: int) -> list[dict[str, object]]:
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 8, 1)).eval()
    return [dataclasses.asdict(la) for la in describe_layers(model, [torch.zeros(1, 3, 34, 34)])]


def test_a_step_that_gains_nothing_is_warned_of() -> None:
    table = estimated_table(profile("rpi4b_4gb"))  # channels come in eights
    change = estimate_change({"layers_before": layers_of(64), "layers": layers_of(58)}, table)
    assert change is not None
    assert gain_note(*change).startswith("rpi4b_4gb will gain nothing: ")
    change = estimate_change({"layers_before": layers_of(64), "layers": layers_of(32)}, table)
    assert change is not None
    assert gain_note(*change) == ""
    assert estimate_change({"layers_before": layers_of(64), "layers": layers_of(64)}, table) is None
    assert estimate_change({}, table) is None


NET = """\
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 4))
"""
RECIPE = """\
schema = 1
name = "small"
[model]
builder = "net.py:build"
[[model.inputs]]
name = "x"
shape = [1, 3, 12, 12]
[[stages]]
stage = "prune"
ratio = {ratio}
round_to = 1
"""


@pytest.mark.parametrize(("ratio", "gains"), [(0.05, False), (0.5, True)])
def test_a_run_tells_what_each_step_does_for_the_recipes_devices(
    tmp_path: Path, ratio: float, gains: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(ratio=ratio))
    recipe = load_recipe(tmp_path / "recipe.toml")
    # localhost has no table and says nothing of its cores: nothing is said of it
    recipe = dataclasses.replace(recipe, devices=("rpi4b_4gb", "localhost"))
    with caplog.at_level(logging.WARNING):
        done = run(recipe, Store(tmp_path / "store"))
    step = next(s for s in done.run.read()["steps"] if s["step"] == "prune")
    assert list(step["predicted"]) == ["rpi4b_4gb"]
    predicted = step["predicted"]["rpi4b_4gb"]
    assert predicted["source"] == "estimated"
    assert (predicted["after_s"] < 0.8 * predicted["before_s"]) == gains
    assert ("rpi4b_4gb will gain nothing" in caplog.text) == (not gains)
    assert ("will gain nothing" in render(done.run, markdown=False)) == (not gains)


# ------------------------------------------------------------------------------------------- kept


def test_a_kept_table_is_read_again_and_only_for_its_runtime_and_threads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = profile("rpi4b_4gb")
    table = fit(timings(OpCost(op_s=2e-6, mac_s=1e-10, byte_s=0.0), "conv", 1e-6), 1e-6)
    path = save_op_table(tmp_path, board, table)
    assert path == tmp_path / "op_tables" / "rpi4b_4gb-litert-1.json"
    assert load_op_table(tmp_path, board) == table
    assert load_op_table(tmp_path, board, threads=4).source == "estimated"
    newer = dataclasses.replace(board, runtime_version="2.4.0")
    with caplog.at_level(logging.WARNING):
        assert load_op_table(tmp_path, newer).source == "estimated"
    assert "is of litert 2.3.0, not 2.4.0" in caplog.text


@pytest.mark.parametrize("damage", ['{"schema": 99}', "{", "[]", '{"schema": 1, "profile": 3}', ""])
def test_a_damaged_table_is_warned_of_and_not_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    board = profile("rpi4b_4gb")
    path = op_table.op_table_path(tmp_path, board)
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert load_op_table(tmp_path, board).source == "estimated"
    assert "is no operator table" in caplog.text


# ---------------------------------------------------------------------------------- command line


def test_inspect_predicts_the_latency_on_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(op_chain_tflite("conv", size=24, channels=(32, 32), repeats=4))
    arguments = ["inspect", str(path), "--profile", "rpi4b_4gb", "--store", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "  latency      " in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predicted_latency"]
    expected = estimate_tflite(parse_model(path.read_bytes(), where="m"), estimated_table(profile("rpi4b_4gb")))  # fmt: skip
    assert found["operators"] == "estimated"
    assert math.isclose(found["seconds"], expected.latency_s)
    assert cli.main(["inspect", str(path), "--profile", "localhost", "--store", str(tmp_path)]) == 3
    assert "calibrate --ops" in capsys.readouterr().err


def test_a_simulated_board_has_no_operator_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    store = ["--store", str(tmp_path), "--quiet"]
    assert cli.main(["calibrate", "--ops", "--device", "null://quiet", *store]) == 2
    assert "simulates a board" in capsys.readouterr().err
    assert not (tmp_path / "op_tables").exists()
    assert cli.main(["calibrate", "--ops", "m.tflite", *store]) == 2
    assert "times models of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_operators_are_timed_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # the agent's own folder: nobody else's job is in the way
    models = [("pointwise", size, (channels, channels), 4) for size, channels in ((6, 32), (12, 64), (24, 64), (24, 128))]  # fmt: skip
    options = MeasureOptions(sessions=1, warmup=0.02, session=0.05)
    device = open_device("local")
    try:
        table = time_operators(device, profile("localhost"), options, models=models, dtypes=["int8"], now=NOW)  # fmt: skip
    finally:
        device.close()
    cost = table.costs["pointwise int8"]
    assert table.source == "measured"
    assert cost.points == 4
    assert cost.mac_s > 0  # 64 times the products from the first to the last
    assert table.same["runtime"] == "litert"
    assert table.same["runtime_sha256"]
    save_op_table(tmp_path, profile("localhost"), table)
    assert load_op_table(tmp_path, profile("localhost")) == table
    assert set(SESSION) <= {f.name for f in dataclasses.fields(MeasureOptions)}
