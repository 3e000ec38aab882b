"""What a CI service reads of a run: JUnit XML, a markdown summary, annotations in its log.

Renderers are pure: a run's record (`Run.read`) in, text out. Only `CiOutput` writes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgepipe.errors import EdgepipeError, RequestError
from edgepipe.store import check_output, replacing

Service = Literal["github", "gitlab", "none"]
# Characters that XML 1.0 cannot hold (section 2.2), which a program's last words may contain.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_RED, _YELLOW, _PLAIN = "\x1b[31;1m", "\x1b[33;1m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that ends in verdicts."""
    group = parser.add_argument_group("options for CI services")
    group.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    group.add_argument("--markdown", type=Path, metavar="FILE", help="write the report as markdown (on GitHub it also goes to the job summary)")  # fmt: skip
    group.add_argument("--annotations", choices=("auto", "github", "gitlab", "none"), default="auto", help="mark what did not pass in the log as this service shows it (default: auto, by its environment variables)")  # fmt: skip


def detect_service(environment: Mapping[str, str]) -> Service:
    """The CI service we run in, by the variables that its documentation promises."""
    if environment.get("GITHUB_ACTIONS") == "true":
        return "github"
    return "gitlab" if environment.get("GITLAB_CI") == "true" else "none"


class CiOutput:
    """Writes what the options of `add_arguments` ask for. Makes sure first that it can."""

    def __init__(self, args: argparse.Namespace, environment: Mapping[str, str] | None = None) -> None:  # fmt: skip
        environment = os.environ if environment is None else environment
        self.junit: Path | None = args.junit
        self.markdown: Path | None = args.markdown
        self.service: Service = detect_service(environment) if args.annotations == "auto" else args.annotations  # fmt: skip
        summary = environment.get("GITHUB_STEP_SUMMARY", "")
        self.summary = Path(summary) if summary else None
        check_output(self.junit, option="--junit")
        check_output(self.markdown, option="--markdown")
        if self.junit and self.markdown and self.junit.resolve() == self.markdown.resolve():
            raise RequestError("--junit and --markdown name the same file", hint="name two files")

    def write(self, records: Sequence[Mapping[str, Any]], report: str) -> str:
        """Write everything for judged runs; returns the annotations for the log ("" for none)."""
        if self.junit:
            _replace(self.junit, junit_xml(*records))
        self._write_report(report)
        return "\n".join(marks for r in records if (marks := annotate(r, self.service)))

    @contextlib.contextmanager
    def reporting_errors(self, what: str, say: Callable[[str], None]) -> Iterator[None]:
        """The same where ``what`` (a recipe or run) ends in an error, so that the service shows why."""
        try:
            yield
        except EdgepipeError as exc:
            if self.junit:
                now = datetime.datetime.now(datetime.UTC).isoformat()[:19]
                _replace(self.junit, junit_of_error(exc, what, timestamp=now))
            hint = f"\n\n    {exc.hint}" if exc.hint else ""
            self._write_report(f"## {what}: {exc.code}\n\n{_no_html(exc.message)}{hint}\n")
            marks = _annotation(self.service, f"{what}: {exc.code}", [exc.message, exc.hint])
            if marks:
                say(marks)
            raise

    def _write_report(self, report: str) -> None:
        if self.markdown:
            _replace(self.markdown, report)
        if self.summary:  # other steps of the job write to it too
            with self.summary.open("a", encoding="utf-8") as stream:
                stream.write(report + "\n")


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _no_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


# --------------------------------------------------------------------------------------- JUnit


def junit_xml(*records: Mapping[str, Any]) -> str:
    """One test suite per run with one test case per gate and device. FAIL is a failure; INCONCLUSIVE,
    which proves nothing, an error, and so is what ended one run of several.

    Valid by the strictest schema in use, that of Ant's JUnit task
    (https://github.com/windyroad/JUnit-Schema), and so by Jenkins', GitLab's and GitHub apps'.
    """
    return _document([_suite_of(record, number) for number, record in enumerate(records)])


def _suite_of(record: Mapping[str, Any], number: int) -> ET.Element:
    cases = []
    if error := record.get("error"):
        cases.append(_error_case(record["recipe"], error["error"], error["message"], error.get("hint", "")))  # fmt: skip
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for verdict in record.get("verdicts", []):
        device = verdict["device"] or "model"
        seen[verdict["gate"], device] += 1
        count = seen[verdict["gate"], device]
        name = verdict["gate"] + (f" #{count}" if count > 1 else "")
        case = ET.Element("testcase", name=name, classname=f"{record['recipe']}.{device}", time="0")
        if verdict["status"] != "PASS":
            kind = "failure" if verdict["status"] == "FAIL" else "error"
            found = ET.SubElement(case, kind, type=verdict["status"], message=_xml(verdict["reason"]))  # fmt: skip
            found.text = _xml("\n".join([verdict["reason"], *verdict.get("details", [])]))
        cases.append(case)
    properties = {
        "run": record["id"],
        "verdict": record.get("verdict") or record["status"],
        "edgepipe": record.get("edgepipe", ""),
        "model_sha256": (record.get("shipped") or {}).get("sha256", ""),
    }
    seconds = sum(step.get("seconds", 0.0) for step in record.get("steps", []))
    return _suite(record["recipe"], record["started"][:19], seconds, properties, cases, number)


def junit_of_error(error: EdgepipeError, recipe: str, *, timestamp: str) -> str:
    """A run that was not judged: one test case, an error."""
    case = _error_case(recipe, error.code, error.message, error.hint)
    return _document([_suite(recipe, timestamp, 0.0, {}, [case])])


def _error_case(recipe: str, code: str, message: str, hint: str) -> ET.Element:
    case = ET.Element("testcase", name="run", classname=recipe, time="0")
    found = ET.SubElement(case, "error", type=code, message=_xml(message))
    found.text = _xml("\n".join(line for line in (message, hint) if line))
    return case


def _suite(
    name: str, timestamp: str, seconds: float, properties: Mapping[str, str], cases: Sequence[ET.Element],
    number: int = 0,
) -> ET.Element:  # fmt: skip
    suite = ET.Element(
        "testsuite", name=name, id=str(number), package="edgepipe", timestamp=timestamp,
        hostname="localhost", time=f"{seconds:.2f}", tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors=str(sum(case.find("error") is not None for case in cases)),
    )  # fmt: skip
    table = ET.SubElement(suite, "properties")
    for key, value in properties.items():
        ET.SubElement(table, "property", name=key, value=_xml(value))
    suite.extend(cases)
    ET.SubElement(suite, "system-out")
    ET.SubElement(suite, "system-err")
    return suite


def _document(suites: Sequence[ET.Element]) -> str:
    root = ET.Element("testsuites")
    root.extend(suites)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"  # fmt: skip


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)


# --------------------------------------------------------------------------------- annotations


def annotate(record: Mapping[str, Any], service: Service) -> str:
    """What did not pass, one annotation each, as ``service`` shows it in a job's log."""
    lines = []
    if error := record.get("error"):
        title = f"{record['recipe']}: {error['error']}"
        lines.append(_annotation(service, title, [error["message"], error.get("hint", "")]))
    for verdict in record.get("verdicts", []):
        if verdict["status"] == "PASS":
            continue
        where = f" on {verdict['device']}" if verdict["device"] else ""
        title = f"{record['recipe']}: {verdict['gate']}{where} {verdict['status']}"
        text = [verdict["reason"], *verdict.get("details", [])]
        # both end the job: an undecided gate is no lesser trouble than a failed one
        lines.append(_annotation(service, title, text))
    return "\n".join(line for line in lines if line)


def _annotation(service: Service, title: str, text: Sequence[str]) -> str:
    body = "\n".join(line for line in text if line)
    if service == "github":
        return f"::error title={_property(title)}::{_data(body)}"
    if service == "gitlab":  # no annotations there, but its log shows colours
        colour = _YELLOW if title.endswith("INCONCLUSIVE") else _RED
        printable = _NOT_XML.sub("�", body)
        return f"{colour}{title}{_PLAIN}\n" + "\n".join(f"  {line}" for line in printable.split("\n"))  # fmt: skip
    return ""


def _data(text: str) -> str:
    """As the runner's toolkit escapes a message (actions/toolkit, core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
