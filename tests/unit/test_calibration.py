"""The noise of a board: found by measuring a model against itself, kept, quoted."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe import calibration, cli, stats
from edgepipe.artifact import Artifact, make_artifact
from edgepipe.bench import MeasureOptions
from edgepipe.calibration import SAME, Noise, load_noise, noise_of, quote_noise, save_noise
from edgepipe.device import open_device
from edgepipe.errors import NotReadyError, NotStable
from edgepipe.inventory import resolve_targets
from edgepipe.measurement import Measurement, single
from edgepipe.tflite_ops.tiny import conv_tflite, tiny_tflite

NOW = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
CONTEXT: dict[str, Any] = {
    "model_sha256": "m1", "profile": "rpi5", "device_identity": "ab12", "threads": 1,
    "runtime": "litert", "runtime_version": "2.3.0", "runtime_sha256": "f00d", "backend": "litert-c",
}  # fmt: skip
NOISE = Noise(
    measured=NOW.isoformat(), sessions=12, rounds=100, sd_wall=0.01, bias_wall=0.001, sd_cpu=0.003,
    bias_cpu=-0.0002, latency_s=0.01, contended=False, model_sha256="m1",
    same={key: CONTEXT[key] for key in SAME},
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    path = tmp_path / "model.tflite"
    path.write_bytes(tiny_tflite())
    return make_artifact("tflite", path, inputs=(), outputs=())


def measured(
    *sessions: tuple[float, ...], excluded: dict[int, str] | None = None
) -> dict[str, Measurement]:
    made = {
        f"latency_ratio_{clock}": Measurement(f"latency_ratio_{clock}", "", sessions, (), excluded or {}, CONTEXT)
        for clock in ("cpu", "wall")
    }  # fmt: skip
    return made | {"latency_wall": single("latency_wall", "s", 0.01, CONTEXT)}


def test_noise_is_the_spread_of_the_sessions_log_ratios() -> None:
    sessions = [(1.01, 1.02, 1.50), (0.99, 0.98, 0.97), (1.0, 1.001, 1.002), (1.0, 1.03, 1.01)]
    noise = noise_of(measured(*sessions), now=NOW)
    logs = [np.log(np.median(s)) for s in sessions]
    assert noise.sd_cpu == pytest.approx(np.std(logs, ddof=1))
    assert noise.bias_wall == pytest.approx(np.mean(logs))
    assert (noise.sessions, noise.rounds) == (4, 3)


def test_sessions_excluded_for_a_cause_are_no_noise() -> None:
    calm = [(1.0, 1.001), (1.002, 1.001), (0.999, 1.0)]
    noise = noise_of(measured(*calm, (2.0, 2.0), excluded={3: "throttled"}), now=NOW)
    assert noise.sessions == 3
    assert noise.sd_cpu is not None
    assert noise.sd_cpu < 0.01


@pytest.mark.parametrize(
    ("sessions", "why"),
    [([(1.0, 1.1)] * 2, "too coarse"), ([(1.0, 1.1), (1.0, 1.2), (1.0, 0.0)], "too coarse")],
)
def test_too_few_sessions_are_no_noise_model(sessions: list[tuple[float, ...]], why: str) -> None:
    with pytest.raises(NotStable, match=why):
        noise_of(measured(*sessions), now=NOW)


def test_a_null_device_is_found_as_noisy_as_it_was_made(model: Artifact) -> None:
    (target,) = resolve_targets([], devices=["null://quiet"])
    device = open_device("null://noisy?sd=0.02")
    noise, _ = calibration.calibrate(model, device, target.profile, MeasureOptions(session=0.2))
    assert noise.sessions == max(stats.LOOKS)
    assert noise.sd_cpu is not None
    # 12 sessions tell an SD to -29 % and +70 % (95 %, chi square of 11 degrees of freedom)
    assert 0.02 * 0.71 / 1.1 < noise.sd_cpu < 0.02 * 1.7 * 1.1
    assert abs(noise.bias_cpu or 0) < 3 * noise.sd_cpu


def test_kept_noise_is_found_for_the_very_same_board(tmp_path: Path) -> None:
    path = save_noise(tmp_path, NOISE)
    assert path == tmp_path / "calibration" / "rpi5-ab12-1.json"
    assert load_noise(tmp_path, CONTEXT, now=NOW) == NOISE


@pytest.mark.parametrize("key", SAME)
def test_noise_of_anything_else_is_not_quoted(key: str, tmp_path: Path) -> None:
    save_noise(tmp_path, NOISE)
    assert load_noise(tmp_path, {**CONTEXT, key: "other"}, now=NOW) is None
    assert load_noise(tmp_path, {k: v for k, v in CONTEXT.items() if k != key}, now=NOW) is None


def test_noise_older_than_thirty_days_is_not_quoted(tmp_path: Path) -> None:
    save_noise(tmp_path, NOISE)
    later = NOW + datetime.timedelta(days=30)
    assert load_noise(tmp_path, CONTEXT, now=later) == NOISE
    assert load_noise(tmp_path, CONTEXT, now=later + datetime.timedelta(seconds=1)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "sd_cpu": "x"}'])
def test_a_damaged_calibration_is_warned_of_and_not_quoted(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_noise(tmp_path, NOISE).write_text(text)
    assert load_noise(tmp_path, CONTEXT, now=NOW) is None
    assert "rpi5-ab12-1.json" in caplog.text


def test_a_board_without_identity_is_not_kept(tmp_path: Path) -> None:
    noise = dataclasses.replace(NOISE, same={**NOISE.same, "device_identity": None})
    with pytest.raises(NotReadyError, match="neither a serial number nor a machine id"):
        save_noise(tmp_path, noise)
    assert load_noise(tmp_path, {**CONTEXT, "device_identity": None}, now=NOW) is None


def test_only_ratios_quote_the_noise(tmp_path: Path) -> None:
    save_noise(tmp_path, NOISE)
    quoted = {m.metric: m for m in quote_noise(tmp_path, list(measured((1.0,)).values()), now=NOW)}
    assert quoted["latency_ratio_cpu"].context["noise"]["sd_cpu"] == 0.003
    assert "noise" not in quoted["latency_wall"].context
    json.dumps(quoted["latency_ratio_cpu"].context)  # as a stored run holds it


def test_the_command_prints_what_can_be_told_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", "--device", "null://quiet", "--quiet", "--store", str(tmp_path)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "12 sessions x " in text
    assert "3 sessions" in text
    assert "smallest slowdown that FAILs in 9 of 10" in text
    (kept,) = (tmp_path / "calibration").iterdir()
    assert str(kept) in text
    assert cli.main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [sessions for sessions, _ in data["detectable"]["cpu"]] == list(stats.LOOKS)
    assert data["agrees_with_itself"] is True


def test_a_board_on_which_a_model_differs_from_itself_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = ["--device", "null://quiet?slowdown=1.1", "--quiet", "--store", str(tmp_path)]
    assert cli.main(["calibrate", *rig]) == 3
    assert "seems to differ from itself by +10" in capsys.readouterr().out
    rig[1] = "null://noisy?sd=0.05"
    assert cli.main(["calibrate", *rig]) == 3
    text = capsys.readouterr().out
    assert "12 sessions cannot tell the model from one that is 3% slower" in text
    assert "differ from itself" not in text


def test_a_model_that_does_not_run_calibrates_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = ["--device", "null://quiet?fault=crash", "--quiet", "--store", str(tmp_path)]
    assert cli.main(["calibrate", *rig]) == 3
    error = capsys.readouterr().err
    assert "cannot be calibrated with" in error
    assert "choose another model" in error
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    rig = ["--device", "null://quiet?fault=crash", "--quiet", "--store", str(tmp_path / "file")]
    assert cli.main(["calibrate", *rig]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_the_built_in_model_computes_and_its_longer_twin_begins_alike() -> None:
    from ai_edge_litert.interpreter import Interpreter

    small = {"layers": 2, "size": 6, "channels": 8}
    x = np.random.default_rng(0).integers(-60, 60, (1, 6, 6, 8)).astype(np.int8)
    outputs = []
    for extra in (0, 1):
        content = conv_tflite(**small, extra_layers=extra)
        interpreter = Interpreter(model_content=content, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        # tensors are the input, then weights, bias and output of each layer: 6 is the second's
        outputs.append(interpreter.get_tensor(6))
    assert outputs[0].std() > 5  # neither dead nor saturated
    assert np.array_equal(outputs[0], outputs[1])
