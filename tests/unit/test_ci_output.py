"""What CI services read: JUnit XML by Ant's schema, GitHub's workflow commands, markdown."""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgepipe.ci_output import CiOutput, add_arguments, annotate, detect_service, junit_xml
from edgepipe.errors import ConnectError, RequestError

VERDICTS: list[dict[str, Any]] = [
    {"gate": "size", "status": "PASS", "device": "", "reason": "small", "details": []},
    {"gate": "memory", "status": "FAIL", "device": "pi", "reason": "memory_peak 2 MB > 1 MB", "details": ["after_load: +2 MB"]},
    {"gate": "memory", "status": "PASS", "device": "pi", "reason": "fine", "details": []},
    {"gate": "latency", "status": "INCONCLUSIVE", "device": "pi", "reason": "cannot tell", "details": []},
]  # fmt: skip


def record(verdicts: list[dict[str, Any]] = VERDICTS) -> dict[str, Any]:
    return {
        "id": "20261122T120000Z-digits-abc123", "recipe": "digits", "status": "complete", "verdict": "FAIL",
        "started": "2026-11-22T12:00:00.123456+00:00", "edgepipe": "0.1.0", "shipped": {"sha256": "a1" * 32},
        "steps": [{"step": "load", "cached": True}, {"step": "evaluate", "seconds": 1.5}], "verdicts": verdicts,
    }  # fmt: skip


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


# -------------------------------------------------------------------------------------- JUnit


def check_junit(text: str) -> ET.Element:
    """The rules of github.com/windyroad/JUnit-Schema (Ant's, the strictest in use), by hand."""
    suites = ET.fromstring(text)
    assert suites.tag == "testsuites"
    assert not suites.attrib
    for number, suite in enumerate(suites):
        assert suite.tag == "testsuite"
        assert set(suite.attrib) == {"name", "timestamp", "hostname", "tests", "failures", "errors", "time", "package", "id"}  # fmt: skip
        assert suite.get("id") == str(number)
        assert suite.get("name", "").strip()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp", ""))
        assert float(suite.get("time", "")) >= 0
        tags = [child.tag for child in suite]
        cases = [child for child in suite if child.tag == "testcase"]
        assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
        for item in suite[0]:
            assert item.tag == "property"
            assert set(item.attrib) == {"name", "value"}
        assert suite.get("tests") == str(len(cases))
        for kind in ("failure", "error"):
            assert suite.get(f"{kind}s") == str(len(suite.findall(f"testcase/{kind}")))
        for case in cases:
            assert set(case.attrib) == {"name", "classname", "time"}
            assert len(case) <= 1
            for outcome in case:
                assert outcome.tag in ("failure", "error")
                assert set(outcome.attrib) == {"type", "message"}
    return suites


def test_every_gate_is_a_test_case_and_only_a_pass_is_green() -> None:
    suite = check_junit(junit_xml(record()))[0]
    outcomes = [(c.get("classname"), c.get("name"), [e.tag for e in c]) for c in suite.findall("testcase")]  # fmt: skip
    assert outcomes == [
        ("digits.model", "size", []),
        ("digits.pi", "memory", ["failure"]),
        ("digits.pi", "memory #2", []),
        ("digits.pi", "latency", ["error"]),
    ]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == "memory_peak 2 MB > 1 MB"
    assert failure.text == "memory_peak 2 MB > 1 MB\nafter_load: +2 MB"
    assert suite.get("time") == "1.50"


@given(st.text())
def test_junit_is_well_formed_whatever_a_board_says(text: str) -> None:
    verdict = {"gate": "runs_on_device", "status": "FAIL", "device": "pi", "reason": text, "details": [text]}  # fmt: skip
    check_junit(junit_xml(record([verdict])))


# -------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize(
    ("environment", "service"),
    [
        ({"GITHUB_ACTIONS": "true"}, "github"),
        ({"GITLAB_CI": "true"}, "gitlab"),
        ({"CI": "true"}, "none"),
        ({}, "none"),
    ],
)
def test_the_service_is_known_by_its_variables(environment: dict[str, str], service: str) -> None:
    assert detect_service(environment) == service
    assert CiOutput(arguments(), environment).service == service
    assert CiOutput(arguments("--annotations", "none"), environment).service == "none"


def test_what_did_not_pass_is_annotated() -> None:
    assert annotate(record(), "github").splitlines() == [
        "::error title=digits%3A memory on pi FAIL::memory_peak 2 MB > 1 MB%0Aafter_load: +2 MB",
        "::error title=digits%3A latency on pi INCONCLUSIVE::cannot tell",
    ]
    assert annotate(record(VERDICTS[:1]), "github") == ""
    assert annotate(record(), "none") == ""
    coloured = annotate(record(), "gitlab")
    assert "\x1b[31;1mdigits: memory on pi FAIL\x1b[0m\n  memory_peak 2 MB > 1 MB" in coloured
    assert "\x1b[33;1mdigits: latency on pi INCONCLUSIVE" in coloured


def unescape(text: str) -> str:
    """As GitHub's runner reads a message (ActionCommand.cs)."""
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        text = text.replace(code, character)
    return text


@example("50 %0A::warning::x")
@given(st.text(alphabet=st.one_of(st.sampled_from("%\r\n:,;ADabc0125"), st.characters())))
def test_no_text_of_a_board_breaks_out_of_its_annotation(text: str) -> None:
    verdict = {"gate": "size", "status": "FAIL", "device": "", "reason": text or "x", "details": []}
    line = annotate(record([verdict]), "github")
    assert "\n" not in line
    assert "\r" not in line
    title, _, message = line.removeprefix("::error title=").partition("::")
    assert title == "digits%3A size FAIL"
    assert unescape(message) == (text or "x")


# ---------------------------------------------------------------------------------- the files


def test_files_and_the_job_summary_are_written(tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("of another step\n")
    args = arguments("--junit", str(tmp_path / "out" / "j.xml"), "--markdown", str(tmp_path / "m.md"))  # fmt: skip
    marks = CiOutput(args, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}).write([record()], "## report\n")  # fmt: skip
    check_junit((tmp_path / "out" / "j.xml").read_text())
    assert (tmp_path / "m.md").read_text() == "## report\n"
    assert summary.read_text() == "of another step\n## report\n\n"
    assert marks.startswith("::error")
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_that_ended_in_an_error_is_reported_too(tmp_path: Path) -> None:
    args = arguments("--junit", str(tmp_path / "j.xml"), "--markdown", str(tmp_path / "m.md"))
    said: list[str] = []
    ci = CiOutput(args, {"GITHUB_ACTIONS": "true"})
    error = ConnectError("ssh://pi@board: <unreachable>", hint="is it on?")
    with pytest.raises(ConnectError), ci.reporting_errors("digits", said.append):
        raise error
    case = check_junit((tmp_path / "j.xml").read_text())[0].find("testcase")
    assert case is not None
    assert [(e.tag, e.get("type")) for e in case] == [("error", "cannot-connect")]
    assert "&lt;unreachable" in (tmp_path / "m.md").read_text()
    assert said == ["::error title=digits%3A cannot-connect::ssh://pi@board: <unreachable>%0Ais it on?"]  # fmt: skip


def test_files_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for option in ("--junit", "--markdown"):
        with pytest.raises(RequestError, match=f"{option} .* is a folder"):
            CiOutput(arguments(option, str(tmp_path)), {})
        with pytest.raises(RequestError, match="is no folder"):
            CiOutput(arguments(option, str(tmp_path / "file" / "x")), {})
    with pytest.raises(RequestError, match="same file"):
        CiOutput(arguments("--junit", str(tmp_path / "a"), "--markdown", str(tmp_path / "a")), {})
