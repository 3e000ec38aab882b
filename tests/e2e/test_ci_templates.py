"""The GitHub action and the GitLab component, checked by their schemas and run as a runner would.

The runner is imitated: it substitutes inputs where the service does, sets its variables, and runs
the steps' shell text in bash as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from edgepipe.tflite_ops.tiny import tiny_tflite

pytestmark = pytest.mark.slow

CI = Path(__file__).parents[2] / "ci"
ACTION = CI / "github" / "action.yml"
COMPONENT = CI / "gitlab" / "template.yml"
RECIPE = """\
schema = 1
name = "small"
devices = ["localhost"]
[model]
file = "model.tflite"
[measure]
threads = 1
sessions = 1
memory_sessions = 1
warmup = "10 ms"
session = "100 ms"
ops = false
[[gates]]
gate = "size"
max = "100 kB"
[[gates]]
gate = "memory"
max = "100 MB"
"""


class Job(NamedTuple):
    code: int
    log: str
    workspace: Path
    summary: str


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "work space"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "strict.toml").write_text(RECIPE.replace("100 kB", "1 B"))
    (folder / "model.tflite").write_bytes(tiny_tflite())
    return folder


def shell(text: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a step as both services do: bash, stopping at the first error, variables from outside."""
    script = folder.parent / "step.sh"
    script.write_text(text)
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": os.environ["HOME"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


# -------------------------------------------------------------------------------------- GitHub


def action() -> dict[str, Any]:
    return dict(YAML(typ="safe").load(ACTION))


def github_value(text: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    def look_up(match: re.Match[str]) -> str:
        scope, _, name = match[1].partition(".")
        return inputs[name] if scope == "inputs" else outputs[name.removeprefix("gate.outputs.")]

    return re.sub(r"\$\{\{\s*(\S+)\s*\}\}", look_up, text)


def github_condition(text: str, inputs: Mapping[str, str], *, failed: bool) -> bool:
    if text == "always()":
        return True
    match = re.fullmatch(r"inputs\.(\S+) != '(\S+)'", text)
    assert match, f"the imitation does not know the condition {text}"
    return not failed and inputs[match[1]] != match[2]


def github(folder: Path, **given: str) -> Job:
    """One step of a workflow that uses the action."""
    definition = action()
    inputs = {name: given.get(name, str(spec.get("default", ""))) for name, spec in definition["inputs"].items()}  # fmt: skip
    assert not given.keys() - inputs.keys()
    files = {name: folder.parent / name for name in ("summary", "output")}
    for path in files.values():
        path.write_text("")
    environment = {
        "CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(folder),
        "GITHUB_ACTION_PATH": str(ACTION.parent), "GITHUB_STEP_SUMMARY": str(files["summary"]),
        "GITHUB_OUTPUT": str(files["output"]),
    }  # fmt: skip
    code, log, outputs = 0, "", dict[str, str]()
    for step in definition["runs"]["steps"]:
        if not github_condition(step.get("if", f"inputs.{next(iter(inputs))} != 'x'"), inputs, failed=code != 0):  # fmt: skip
            continue
        if "uses" in step:
            if step["uses"].startswith("actions/upload-artifact@"):
                assert github_value(step["with"]["name"], inputs, outputs) == "edgepipe-report"
                for name in step["with"]["path"].split():
                    assert (folder / name).is_file(), f"{name} would not be uploaded"
            continue
        assert step["shell"] == "bash"
        variables = {k: github_value(v, inputs, outputs) for k, v in step.get("env", {}).items()}
        code, text = shell(
            github_value(step["run"], inputs, outputs), folder, {**environment, **variables}
        )
        log += text
        outputs |= dict(line.split("=", 1) for line in files["output"].read_text().splitlines())
    assert github_value(definition["outputs"]["exit-code"]["value"], inputs, outputs) == str(code)
    return Job(code, log, folder, files["summary"].read_text())


# -------------------------------------------------------------------------------------- GitLab


def gitlab(folder: Path, **given: str) -> Job:
    """One job of a pipeline that includes the component."""
    header, definition = (dict(d) for d in YAML(typ="safe").load_all(COMPONENT))
    inputs = {name: given.get(name, str((spec or {}).get("default", ""))) for name, spec in header["spec"]["inputs"].items()}  # fmt: skip
    assert not given.keys() - inputs.keys()

    def filled(text: str) -> str:
        # GitLab fills the nodes of the parsed YAML, so no input can change its structure
        return re.sub(r"\$\[\[ inputs\.(\S+) \]\]", lambda m: inputs[m[1]], text)

    ((name, job),) = definition.items()
    assert filled(name) == "edgepipe"
    variables = {key: filled(spec["value"]) for key, spec in job["variables"].items()}
    assert all(spec["expand"] is False for spec in job["variables"].values())
    environment = {"CI": "true", "GITLAB_CI": "true", "CI_PROJECT_DIR": str(folder), **variables}
    code, log = shell(filled("\n".join(job["script"])), folder, environment)
    for artifact in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]):
        assert (folder / artifact).is_file(), f"{artifact} would not be kept"
    return Job(code, log, folder, (folder / "edgepipe-report.md").read_text())


# --------------------------------------------------------------------------------------- tests


def documents(path: Path, folder: Path) -> list[Path]:
    """The YAML documents of a file, each as a file: the checker takes one at a time."""
    parts = re.split(r"(?m)^---$\n", path.read_text())
    paths = [folder / f"{number}.yml" for number in range(len(parts))]
    for part, target in zip(parts, paths, strict=True):
        target.write_text(part)
    return paths


@pytest.mark.parametrize(
    ("path", "schema", "count"),
    [(ACTION, "vendor.github-actions", 1), (COMPONENT, "vendor.gitlab-ci", 2)],
)
def test_the_templates_are_valid_by_the_published_schemas(
    path: Path, schema: str, count: int, tmp_path: Path
) -> None:
    def check(*files: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    files = documents(path, tmp_path)
    assert len(files) == count
    done = check(*files)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text(files[-1].read_text().replace("using: composite", "using: nothing").replace("max: 1", "max: many"))  # fmt: skip
    assert check(broken).returncode == 1


def test_no_input_is_written_into_shell_text() -> None:
    for step in action()["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
    _, definition = YAML(typ="safe").load_all(COMPONENT)
    for job in definition.values():
        assert not any("$[[" in line for line in job["script"])


RUNNERS = [pytest.param(github, id="github"), pytest.param(gitlab, id="gitlab")]


@pytest.mark.parametrize("service", RUNNERS)
def test_a_release_that_passes_is_green(service: Any, workspace: Path) -> None:
    job = service(workspace, recipe="recipe.toml", install="none")
    assert job.code == 0, job.log
    assert "## small: PASS" in job.summary
    assert "::error" not in job.log
    assert "\x1b[" not in job.log
    (suite,) = ET.parse(workspace / "edgepipe-junit.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert suite.get("tests") == "3"


@pytest.mark.parametrize("service", RUNNERS)
def test_a_release_that_fails_is_red_and_marked(service: Any, workspace: Path) -> None:
    job = service(workspace, recipe="strict.toml", install="none", device="null://quiet", profile="localhost")  # fmt: skip
    assert job.code == 1, job.log
    assert "## small: FAIL" in job.summary
    mark = "::error title=small%3A size FAIL::" if service is github else "small: size FAIL\x1b[0m"
    assert mark in job.log
    (suite,) = ET.parse(workspace / "edgepipe-junit.xml").getroot()
    assert suite.get("failures") == "1"


@pytest.mark.parametrize("service", RUNNERS)
def test_evidence_of_the_null_device_never_makes_a_release(service: Any, workspace: Path) -> None:
    job = service(workspace, recipe="recipe.toml", install="none", device="null://quiet")
    assert job.code == 3, job.log
    assert "## small: INCONCLUSIVE" in job.summary


@pytest.mark.parametrize("service", RUNNERS)
def test_a_run_that_could_not_start_is_reported_as_well(service: Any, workspace: Path) -> None:
    job = service(workspace, recipe="absent.toml", install="none")
    assert job.code == 2, job.log
    assert "absent.toml does not exist" in job.summary
    (suite,) = ET.parse(workspace / "edgepipe-junit.xml").getroot()
    assert suite.get("errors") == "1"


@pytest.mark.parametrize("service", RUNNERS)
@pytest.mark.parametrize("hostile", ['"; touch pwned; "$(touch pwned)`touch pwned`', "--help"])
def test_text_in_an_input_is_never_run(service: Any, hostile: str, workspace: Path) -> None:
    job = service(workspace, recipe=hostile, install="none")
    assert job.code == 2, job.log
    assert not (workspace / "pwned").exists()


def test_the_action_installs_its_own_version_unless_told_otherwise(workspace: Path) -> None:
    """A stand-in for Python prints what it is called with: installing would take a network."""
    stub = workspace.parent / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    (step,) = [s for s in action()["runs"]["steps"] if "pip install" in s.get("run", "")]
    path = f"{stub.parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "GITHUB_ACTION_PATH": str(ACTION.parent)}
    assert shutil.which("python", path=path) == str(stub)
    _, log = shell(step["run"], workspace, {**environment, "GATE_INSTALL": ""})
    source = log.splitlines()[-1].removesuffix("[all]")
    assert (Path(source) / "pyproject.toml").is_file()
    _, log = shell(step["run"], workspace, {**environment, "GATE_INSTALL": "edgepipe[all]==0.1.0"})
    assert log.splitlines() == ["-m", "pip", "install", "edgepipe[all]==0.1.0"]
