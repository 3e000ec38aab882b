"""``edgepipe compare``, on the null device: what it judges and says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgepipe import bench, cli
from edgepipe.artifact import make_artifact
from edgepipe.bench import MeasureOptions
from edgepipe.commands import compare
from edgepipe.device import open_device
from edgepipe.errors import EXIT_NOT_READY, EXIT_REQUEST, RequestError
from edgepipe.gate import Status, Verdict
from edgepipe.inventory import resolve_targets
from edgepipe.measurement import Measurement
from edgepipe.tflite_ops.tiny import tiny_tflite

from .board_side import bucket_files, merged_file


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    for name, layers in (("base", 1), ("candidate", 2)):
        (tmp_path / f"{name}.tflite").write_bytes(tiny_tflite(layers=layers))
    return tmp_path / "base.tflite", tmp_path / "candidate.tflite"


def test_a_signature_is_compared_with_its_own_file_or_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    merged, own = tmp_path / "merged.tflite", tmp_path / "own.tflite"
    merged.write_bytes(merged_file())
    own.write_bytes(bucket_files()["length16"])
    more = ["--device", "null://quiet", "--session", "0.2 s", "--weight-cache", "--json", "--quiet", "--store", str(tmp_path)]  # fmt: skip
    for base, expected in ((own, None), (merged, "length16")):
        cli.main(["compare", str(base), str(merged), "--signature", "length16", *more])
        data = json.loads(capsys.readouterr().out)
        context = data["measurements"][0]["context"]
        assert context["model_inputs"] == context["baseline_inputs"]
        assert context["model_inputs"][0]["shape"] == [1, 16, 4, 1]
        assert context["weight_cache"]
        assert (context["model_signature"], context.get("baseline_signature")) == ("length16", expected)  # fmt: skip
        sized = any("model_bytes" in v["reason"] for v in data["verdicts"])
        assert sized is (
            expected is not None
        )  # 1 file of 3 models, 1 of 1: their sizes say nothing
    assert cli.main(["compare", str(own), str(merged), "--signature", "length16", *more[:4]]) == EXIT_NOT_READY  # fmt: skip
    assert (
        "size: this model is one signature (length16) of a file of several"
        in capsys.readouterr().out
    )
    # the other way round, too: from one file for all to a file of its own
    assert (
        cli.main(["compare", str(merged), str(own), "--signature", "length16", *more])
        == EXIT_NOT_READY
    )
    context = json.loads(capsys.readouterr().out)["measurements"][0]["context"]
    assert (context.get("model_signature", ""), context["baseline_signature"]) == ("", "length16")
    assert (
        cli.main(["compare", str(merged), str(own), "--signature", "nope", *more]) == EXIT_REQUEST
    )
    assert "it has: length8, length16, length4" in capsys.readouterr().out
    assert cli.main(["compare", str(merged), str(own), *more]) == EXIT_REQUEST
    assert "which-signature" in capsys.readouterr().out


def on_a_board(address: str, models: tuple[Path, Path], **options: Any) -> tuple[tuple[Verdict, ...], dict[str, Measurement]]:  # fmt: skip
    """As the command judges what the null device measured, were it a real board."""
    base, candidate = (make_artifact("tflite", p, inputs=(), outputs=()) for p in models)
    (target,) = resolve_targets([], devices=[address])
    result = bench.measure(
        candidate, open_device(address), target.profile,
        MeasureOptions(session=0.2, **options), baseline=base,
    )  # fmt: skip
    measured = {
        m.metric: dataclasses.replace(m, context={k: v for k, v in m.context.items() if k != "simulated"})
        for m in result.measurements
    }  # fmt: skip
    return compare.judge(measured, candidate, 0.03, device="localhost"), measured


def test_an_unchanged_model_passes_in_one_sentence(models: tuple[Path, Path]) -> None:
    verdicts, measured = on_a_board("null://quiet", models)
    assert {v.status for v in verdicts} == {Status.PASS}
    first, *rest = compare.render(verdicts, measured).splitlines()
    assert first.startswith("PASS: candidate is 0.")
    assert "3 sessions x 30 rounds, 1 thread, CPU time), tolerance 3 %, detectable from " in first
    assert rest[0].startswith("  wall time: ")
    assert "all ops together" not in "".join(rest)  # their noise would contradict a PASS
    assert [line.split()[1] for line in rest if line.startswith("PASS")] == ["memory_anon", "memory_file", "model_bytes"]  # fmt: skip


def test_a_slower_and_larger_model_fails_with_its_operators(models: tuple[Path, Path]) -> None:
    verdicts, measured = on_a_board("null://quiet?slowdown=1.062&growth=284kB", models)
    text = compare.render(verdicts, measured)
    assert [v.status for v in verdicts] == ["FAIL", "FAIL", "PASS", "PASS"]
    assert verdicts[0].value == pytest.approx(0.062, abs=0.012)
    assert text.startswith("FAIL: candidate is ")
    assert "all ops together" in text
    assert "FAIL: memory_anon" in text


def test_sessions_are_added_until_they_are_used_up(models: tuple[Path, Path]) -> None:
    # the truth is the tolerance: nobody can tell
    (slowdown, *_), _ = on_a_board("null://noisy?slowdown=1.03&seed=2", models)
    assert slowdown.status is Status.INCONCLUSIVE
    assert "12 sessions" in slowdown.reason
    (slowdown, *_), _ = on_a_board("null://noisy?slowdown=1.03&seed=2", models, max_sessions=5)
    assert "5 sessions" in slowdown.reason


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> tuple[int, str]:
    code = cli.main(["compare", *map(str, arguments), "--quiet", "--store", str(tmp_path / "store")])  # fmt: skip
    return code, capsys.readouterr().out


def test_the_exit_code_is_the_verdicts_and_the_null_device_never_passes(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, tmp_path, *models, "--device", "null://quiet?slowdown=1.1")
    assert code == 1
    assert text.startswith("FAIL: candidate is ")
    code, text = run(capsys, tmp_path, *models, "--device", "null://quiet")
    assert code == 3
    assert "null device, which is no board" in text
    code, text = run(capsys, tmp_path, *models, "--device", "null://quiet?slowdown=1.1", "--tolerance", "20 %")  # fmt: skip
    assert code == 3
    assert "tolerance 20 %" in text


def test_json_holds_verdicts_and_raw_samples(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = run(capsys, tmp_path, *models, "--device", "null://quiet?slowdown=1.1", "--json")
    data = json.loads(text)
    assert data["verdict"] == "FAIL"
    assert data["base"]["sha256"] != data["candidate"]["sha256"]
    ratios = next(m for m in data["measurements"] if m["metric"] == "latency_ratio_cpu")
    assert len(ratios["samples"]) >= 3


def test_a_calibrated_board_is_quoted(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--device", "null://quiet?slowdown=1.1"]
    _, before = run(capsys, tmp_path, *models, *where)
    assert "noise of this board" not in before
    cli.main(["calibrate", "--device", "null://quiet", "--quiet", "--store", str(tmp_path / "store")])  # fmt: skip
    capsys.readouterr()
    _, after = run(capsys, tmp_path, *models, *where)
    assert "noise of this board" in after


@pytest.mark.parametrize("board", ["null://quiet", pytest.param("local", marks=pytest.mark.slow)])
def test_models_that_are_fed_otherwise_are_refused_once_both_have_run(
    board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (4, 8):
        (tmp_path / f"{size}.tflite").write_bytes(tiny_tflite(size=size))
    models = [str(tmp_path / f"{size}.tflite") for size in (4, 8)]
    assert cli.main(["compare", *models, "--device", board, "--store", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "the baseline is fed float32 [1, 4], the model float32 [1, 8]" in told
    assert "base: memory 1/2" in told
    assert "session 1/" not in told


def test_nothing_is_said_of_runtime_libraries_for_the_null_device(
    models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    on_a_board("null://quiet", models)
    assert "pushing base.tflite" in caplog.text
    assert "runtime" not in caplog.text
    with pytest.raises(RequestError, match=r"no LiteRT .* library for a simulated board"):
        on_a_board("null://quiet", models, backend="litert-c")


def test_a_candidate_that_crashes_fails_and_nothing_else_is_judged(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # sessions 1 and 2 are the memory of base and candidate
    crash = "null://quiet?fault=crash@session:{}"
    code, text = run(capsys, tmp_path, *models, "--device", crash.format(1))
    assert (code, text) == (3, "")  # a base that does not run says nothing of the candidate
    code, text = run(capsys, tmp_path, *models, "--device", crash.format(2))
    assert code == 1
    assert text.startswith("FAIL: candidate does not run on the device: ")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tolerance", "3"), "is not a ratio"),
        (("--tolerance", "0 %"), "tolerance"),
        (("--device", ""), "--device is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], named: str, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert cli.main(["compare", *map(str, models), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_file_that_is_no_model_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.tflite").write_text("hello")
    assert cli.main(["compare", str(models[0]), str(tmp_path / "text.tflite")]) == 2
