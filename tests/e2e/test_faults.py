"""Bad input through the command line: message, exit code, and nothing half-written.

Faults of devices are in test_device_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgepipe.tflite_ops.tiny import crashing_tflite

from .conftest import EdgepipeRunner, leftovers

pytestmark = pytest.mark.slow


def edit(project: Path, old: str, new: str) -> None:
    recipe = project / "recipe.toml"
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new, 1))


def use_model_file(project: Path, name: str) -> None:
    """Point the recipe at a model file and drop the stages of the PyTorch side."""
    text = (project / "recipe.toml").read_text()
    text = re.sub(r'builder = "net.py:build"\nargs.*\n', f'file = "{name}"\n', text)
    text = re.sub(r"\[\[model.inputs\]\]\n.*\n.*\n", "", text)
    text = text.replace("reference = 2\n", "")
    text = re.sub(
        r'\[\[stages\]\]\nstage = "(finetune|prune|export_onnx)"\n((epochs|ratio) = .*\n)?',
        "",
        text,
    )
    (project / "recipe.toml").write_text(text)


def check_failure(
    done: subprocess.CompletedProcess[str], project: Path, code: int, *named: str
) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for text in named:
        assert text in done.stderr
    assert "hint: " in done.stderr
    assert leftovers(project) == []


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("model.onnx", b"", "it is empty"),
        ("model.onnx", b"\x08\x0a\x12\x07pytorch" + bytes(40), "model.onnx"),
        ("model.onnx", b"PK\x03\x04" + bytes(60), "looks like a zip archive"),
        ("model.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(40), "model.tflite"),
        ("model.tflite", b"<html>not found</html>", "looks like a web page"),
        ("model.pt2", b"not a zip", "no zip archive"),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(
    project: Path, edgepipe: EdgepipeRunner, name: str, content: bytes, named: str
) -> None:
    (project / name).write_bytes(content)
    use_model_file(project, name)
    if name.endswith(".tflite"):
        edit(project, '[[stages]]\nstage = "to_tflite"\n', "")
    if name.endswith(".pt2"):
        edit(project, "[[stages]]", '[[stages]]\nstage = "export_onnx"\n[[stages]]')
    check_failure(edgepipe("run", "recipe.toml"), project, 2, named)


def test_a_model_that_crashes_litert_is_refused_before_it_takes_us_along(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    (project / "model.tflite").write_bytes(crashing_tflite())
    use_model_file(project, "model.tflite")
    edit(project, '[[stages]]\nstage = "to_tflite"\n', "")
    check_failure(edgepipe("run", "recipe.toml"), project, 2, "model.tflite", "SIGSEGV")


def test_a_typo_in_a_recipe_is_found_before_anything_runs(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    edit(project, "epochs = 3", "epoch = 3")
    check_failure(
        edgepipe("run", "recipe.toml"), project, 2, "recipe.toml", "did you mean 'epochs'?"
    )
    assert not (project / ".edgepipe").exists()


def test_data_of_the_wrong_shape_names_file_expected_and_got(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    images = np.zeros((20, 12, 12, 1), np.float32)
    np.savez(project / "data.npz", image=images, labels=np.zeros(20, np.int64))
    done = edgepipe("run", "recipe.toml")
    check_failure(done, project, 2, "data.npz", "(12, 12, 1)", "(1, 12, 12)")


def test_a_pickled_module_is_refused_with_what_to_do(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    trap = project / "trap"
    script = (
        "import torch, os\n"
        "class Evil:\n"
        f"    def __reduce__(self): return (os.mkdir, ({str(trap)!r},))\n"
        "torch.save({'w': Evil()}, 'w.pth')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=project, check=True)
    edit(project, "[[model.inputs]]", 'weights = "w.pth"\n[[model.inputs]]')
    done = edgepipe("run", "recipe.toml")
    check_failure(done, project, 2, "w.pth", "state_dict")
    assert not trap.exists()


def test_an_operator_that_does_not_convert_is_named_with_its_pytorch_line(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    source = (project / "net.py").read_text()
    # Gradients flow through det, ONNX has it, and TFLite does not
    source = source.replace(
        "return self.head(x.mean((2, 3)))",
        "return self.head(x.mean((2, 3)) + torch.linalg.det(x))",
    )
    (project / "net.py").write_text(source)
    edit(project, 'stage = "to_tflite"', 'stage = "to_tflite"\nroute = "onnx2tf"')
    done = edgepipe("run", "recipe.toml")
    line = 1 + source[: source.index("torch.linalg.det")].count("\n")
    check_failure(done, project, 2, "Det", f"net.py:{line}", "log: ")


def test_a_full_disk_loses_nothing(project: Path, edgepipe: EdgepipeRunner) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    small = project / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        done = edgepipe("run", "recipe.toml", "--store", str(small / "store"))
        assert done.returncode == 3, done.stderr
        # by the file that was being written, or by its disk
        assert f"error: cannot write {small}" in done.stderr
        assert "No space left on device" in done.stderr
        assert "hint: " in done.stderr
        assert list(small.glob("store/building/*")) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


STAGES = (
    "load", "prune", "finetune", "export_onnx", "to_tflite", "quantize_int8", "evaluate", "measure on",
)  # fmt: skip


def test_ctrl_c_in_any_stage_leaves_nothing_half_written_and_the_run_goes_on_later(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    """One run, interrupted in each of its stages in turn, each time going on where it was."""
    for number, stage in enumerate(STAGES):
        if stage == "finetune":
            edit(project, "epochs = 3", "epochs = 2000")
        process = subprocess.Popen(
            [sys.executable, "-m", "edgepipe", "run", "recipe.toml"],
            cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if re.match(rf"\[\d/\d\] {stage}.* \.\.\.", line):
                break
        time.sleep(0.05 if stage == "prune" else 0.3)  # pruning itself takes a tenth of a second
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        text = "".join(seen) + rest
        assert process.returncode == 130, text
        assert "interrupted" in text, text
        assert "Traceback" not in text, text
        assert text.count("unchanged, kept") >= number - 1, text  # all before the one interrupted
        assert leftovers(project) == [], stage
        assert group_is_empty(process.pid), stage
        if stage == "finetune":
            edit(project, "epochs = 2000", "epochs = 3")
    done = edgepipe("run", "recipe.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("unchanged, kept") >= len(STAGES) - 1


def test_two_runs_at_once_share_the_work_and_both_pass(project: Path) -> None:
    command = [sys.executable, "-m", "edgepipe", "run", "recipe.toml", "--json", "--quiet"]
    both = [
        subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    results = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    assert results[0]["run"] != results[1]["run"]
    assert results[0]["sha256"] == results[1]["sha256"]
    # every step is in the cache once, and that labels fit and no sample of the calibration is evaluated on
    assert len(list((project / ".edgepipe" / "cache").iterdir())) == len(results[0]["steps"]) + 2
    assert leftovers(project) == []


def group_is_empty(group: int) -> bool:
    """Whether no process of the session is left, given two seconds to go."""
    for _ in range(40):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
