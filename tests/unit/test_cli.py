from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgepipe import cli
from edgepipe.commands import runs
from edgepipe.errors import EdgepipeError, NotReadyError, RequestError, StageError


def test_help_lists_every_command_and_imports_next_to_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); from edgepipe.cli import main; main(['--help'])\n"
        "print(len(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert f"  {command} " in done.stdout
    assert int(done.stderr) < 30


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"edgepipe {command}" in text.partition("\n\n")[2]
    assert "--json" in text
    assert "\n  --quiet" in text


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantise"]) == 2
    assert "did you mean 'quantize'?" in capsys.readouterr().err


def test_an_unknown_option_is_a_bad_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--nonsense"]) == 2
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("what", hint="do this"), 2),
        (NotReadyError("what", hint="do this"), 3),
        (StageError("what", stage="prune", hint="do this", log_path="the.log"), 2),
        (EdgepipeError("what", hint="do this"), 4),
        (ZeroDivisionError("what"), 4),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "/full/x"), 3),
    ],
)
def test_an_error_becomes_text_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def fail(args: object, out: object) -> int:
        raise error

    monkeypatch.setattr(runs, "run", fail)
    assert cli.main(["runs"]) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    if isinstance(error, EdgepipeError):
        assert "error: what\nhint: do this" in text
    if isinstance(error, StageError):
        assert "log: the.log" in text
    if isinstance(error, ZeroDivisionError):
        traceback = text.partition("traceback: ")[2].split()[0]
        assert "ZeroDivisionError" in Path(traceback).read_text()
        Path(traceback).unlink()


def test_json_is_one_document_also_for_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object, out: object) -> int:
        raise RequestError("what", hint="do this", code="some-code")

    monkeypatch.setattr(runs, "run", fail)
    assert cli.main(["runs", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found == {"error": "some-code", "message": "what", "hint": "do this"}


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--quiet"], False)])
def test_progress_goes_to_stderr_unless_quiet(
    options: list[str], shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def work(args: object, out: cli.Output) -> int:
        logging.getLogger("edgepipe.x").info("[1/2] working")
        out.text("result")
        return 0

    monkeypatch.setattr(runs, "run", work)
    assert cli.main(["runs", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert ("[1/2] working" in captured.err) is shown
    assert "\x1b" not in captured.err


def test_no_runs_yet_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--store", str(tmp_path)]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m edgepipe --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["rum"], ["run"], ["run", "r.toml", "--nonsense"], ["quantize", "m", "--data"]]
)
def test_json_is_one_document_also_for_a_wrong_command_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["error"] == "bad-usage"
    assert found["hint"]


@pytest.mark.parametrize(
    ("error", "named", "code"),
    [
        (ZeroDivisionError("what"), "bug", 4),
        (BrokenPipeError(32, "Broken pipe"), "bug", 4),  # of a device, not of our own stdout
        (KeyboardInterrupt(), "interrupted", 130),
        (OSError(28, "No space left on device", "/full/x"), "cannot-write", 3),
        (PermissionError(13, "Permission denied", "/secret/x"), "no-access", 3),
        (SystemExit(0), "exit-called", 2),  # a builder that calls sys.exit
        (RequestError("what", code="some-code"), "some-code", 2),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_every_end_has_its_exit_code_and_one_json_document(
    error: BaseException, named: str, code: int, debug: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(args: object, out: object) -> int:
        raise error

    monkeypatch.setattr(runs, "run", fail)
    assert cli.main(["runs", "--json", *debug]) == code
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["error"] == named
    assert ("Traceback" in captured.err) is bool(debug)
    if found.get("traceback"):
        Path(found["traceback"]).unlink()


# A command that writes much to both streams and ends with a failed gate.
CHATTY = """
import logging, sys
from edgepipe import cli
from edgepipe.commands import runs

def work(args, out):
    for i in range(20000):
        logging.getLogger("edgepipe").info("step %d", i)
        out.text(f"line {i}")
    return 1

runs.run = work
sys.exit(cli.main(["runs"]))
"""


@pytest.mark.parametrize(
    "ending", ["| true", "2>&1 | true", "2>&1 >/dev/null | true", ">&-", "2>&-", ">&- 2>&- <&-"]
)
def test_a_failed_gate_fails_whoever_reads_the_output(tmp_path: Path, ending: str) -> None:
    (tmp_path / "chatty.py").write_text(CHATTY)
    command = f"{sys.executable} chatty.py {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_an_error() -> None:
    command = f"{sys.executable} -m edgepipe runs --json > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 3
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


SWALLOWS = """
import logging, signal, sys, time
from edgepipe import cli
from edgepipe.commands import runs
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(args, out):
    class Framework:
        def __del__(self):  # Python prints and drops what is raised here
            print("ready", flush=True)
            time.sleep(60)
    framework = Framework()
    del framework
    {then}

runs.run = work
sys.exit(cli.main(["runs"{quiet}]))
"""


@pytest.mark.parametrize("quiet", ["", ", '--quiet'"])
@pytest.mark.parametrize("then", ["logging.getLogger('edgepipe').info('next')", "raise ValueError"])
def test_ctrl_c_that_a_framework_swallowed_still_stops(
    tmp_path: Path, then: str, quiet: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS.format(then=then, quiet=quiet)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"  # `runs` has no steps to go on with
    assert "bug" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_cleans_up_like_ctrl_c(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom edgepipe import cli\n"
        # whoever started the tests may have had it ignored (nohup), which edgepipe respects
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        "from edgepipe.commands import runs\nfrom edgepipe.store import Store\n"
        "def work(args, out):\n"
        "    with Store(Path('store')).building('k') as work_dir:\n"
        "        print('building', flush=True)\n        time.sleep(60)\n"
        "runs.run = work\nsys.exit(cli.main(['runs']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "interrupted" in err
    assert "Traceback" not in err
    assert list((tmp_path / "store" / "building").iterdir()) == []


@pytest.mark.parametrize("command", [["init"], ["convert"], ["quantize", "--data", "x.npz"]])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("net.onnx", ["model file net.onnx does not exist", "check the path"]),
        ("net.py:build", ["the inputs of builder net.py:build are not declared", "--input image="]),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused_in_the_words_of_the_command_line(
    command: list[str],
    model: str,
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, model]) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in says)
    assert "warning" not in told
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_a_command_has_begun_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert cli.main(["runs"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
