"""Render a stored run as text, markdown or JSON. Reads only what the run's folder holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgepipe import stats
from edgepipe.layer_report import (
    MODEL_TITLE,
    gain_notes,
    layer_tables,
    model_table,
    training_tables,
)
from edgepipe.measurement import Measurement, measurement_to_dict
from edgepipe.metrics import METRICS
from edgepipe.recipe import bucket_text
from edgepipe.rescue import rung_table
from edgepipe.routes import attempts_table
from edgepipe.store import Run, device_name
from edgepipe.table import Table as Table
from edgepipe.units import format_value

CONTEXT_SHOWN = (
    "emulated", "runtime", "runtime_version", "backend", "threads", "machine", "cpu", "cpu_model", "kernel",
    "governor", "temperature_before_c", "temperature_after_c",
)  # fmt: skip
GATES_TITLE = "Gates"


def report_data(run: Run) -> dict[str, Any]:
    """Everything about a run as plain data: its record and all its measurements with raw samples."""
    record = run.read()
    names = ["model", *(device_name(d) for d in record.get("devices", []))]
    return {
        **record,
        "measurements": {
            name: {m: measurement_to_dict(v) for m, v in run.load_measurements(name).items()}
            for name in names
        },
    }


def render(
    run: Run, *, markdown: bool, record: Mapping[str, Any] | None = None, layers: bool = False
) -> str:
    """The report a person reads. ``record`` stands for the run's own where it was judged again.

    ``layers`` adds what each step did to every layer.
    """
    record = run.read() if record is None else record
    lines = [_heading(record, markdown), ""]
    beside = record.get("measured_against") or {}
    if beside:
        lines += [*(f"measured beside the baseline {sha[:12]} on {profile}" for profile, sha in beside.items()), ""]  # fmt: skip
    if record.get("error"):
        error = record["error"]
        lines += [f"{error['error']}: {error['message']}", *([f"hint: {error['hint']}"] if error.get("hint") else []), ""]  # fmt: skip
    for table in _tables(run, record, layers=layers):
        lines += [_markdown_table(table) if markdown else text_table(table), ""]
        if table.title == GATES_TITLE:
            lines += [details_text(record["verdicts"], markdown=markdown), ""]
        if table.title == MODEL_TITLE:
            notes = [_one_line(note) for note in gain_notes(record.get("steps", []))]
            lines += [*(f"- {_markdown_escaped(n)}" if markdown else f"  warning: {n}" for n in notes), ""]  # fmt: skip
    text = "\n".join(lines).rstrip() + "\n"
    return re.sub("\n{3,}", "\n\n", text)


def render_all(
    runs: Sequence[Run],
    *,
    markdown: bool,
    records: Sequence[Mapping[str, Any]] = (),
    layers: bool = False,
) -> str:
    """`render` of each run, and of several (buckets) a table of all at the end."""
    records = records or [run.read() for run in runs]
    parts = [
        render(run, markdown=markdown, record=record, layers=layers)
        for run, record in zip(runs, records, strict=True)
    ]
    if len(runs) > 1:
        table = buckets_table(runs, records)
        parts.append((_markdown_table(table) if markdown else text_table(table)) + "\n")
    return "\n".join(parts)


def buckets_table(runs: Sequence[Run], records: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each bucket that was asked for: what it weighs, what it takes, and its verdict.

    A bucket without a run (it was interrupted before) is there too. ``records`` as in `render`.
    """
    together = records[0].get("together") or {}
    by_name = {record["recipe"]: (run, record) for run, record in zip(runs, records, strict=True)}
    rows = []
    names = together.get("recipes") or list(by_name)
    for name, bucket in zip(names, together.get("buckets") or names, strict=True):
        if name not in by_name:
            rows.append((bucket, "", "", "never begun"))
            continue
        run, record = by_name[name]
        latencies = []
        for device in record.get("devices", []):
            board = device_name(device)
            measured = run.load_measurements(board)
            found = next(
                (measured[m] for m in ("latency_wall", "latency_cpu") if m in measured), None
            )
            if found is not None and found.valid_sessions:
                p50 = format_value(stats.sessions_percentile(found.valid_sessions, 0.5), found.unit)
                latencies.append(f"{board} {p50}")
        size = run.load_measurements("model").get("model_bytes")
        bytes_text = format_value(size.valid_sessions[0][0], "B") if size else ""
        bucket = bucket_text(record.get("bucket", {})) or bucket
        rows.append((bucket, bytes_text, ", ".join(latencies), outcome_text(record)))
    return Table("Buckets", ("bucket", "size", "latency (p50)", "verdict"), tuple(rows))


def outcome_text(record: Mapping[str, Any]) -> str:
    """The verdict of a run, or what ended it."""
    if error := record.get("error"):
        return f"{record['status']}: {error['error']}"
    return str(record.get("verdict") or record["status"])


def details_text(verdicts: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
    """The explanation of every verdict that has one; "" where none has."""
    lines = []
    for verdict in verdicts:
        if not verdict.get("details"):
            continue
        where = f" on {verdict['device']}" if verdict["device"] else ""
        title = f"{verdict['status']} {verdict['gate']}{where}"
        found = [_one_line(line) for line in verdict["details"]]
        if markdown:
            lines += [f"**{title}**", "", *(f"- {_markdown_escaped(line)}" for line in found), ""]
        else:
            lines += [f"  {title}", *(f"    {line}" for line in found)]
    if not lines:
        return ""
    return "\n".join(["### Why", "", *lines] if markdown else ["Why", *lines]).rstrip()


def _one_line(text: str) -> str:
    """A board's own words may hold line breaks, which a CI service reads commands after."""
    return " ".join(text.splitlines())


def _markdown_escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _heading(record: Mapping[str, Any], markdown: bool) -> str:
    verdict = record.get("verdict") or record["status"].upper()
    title = f"{record['recipe']}: {verdict}"
    sub = f"run {record['id']}, started {record['started'][:19]}Z, edgepipe {record.get('edgepipe', '?')}"  # fmt: skip
    return f"## {title}\n\n{sub}" if markdown else f"{title}\n{sub}"


def _tables(run: Run, record: Mapping[str, Any], *, layers: bool) -> list[Table]:
    tables = []
    verdicts = record.get("verdicts", [])
    if verdicts:
        rows = tuple((v["status"], v["gate"], v["device"] or "-", v["reason"]) for v in verdicts)
        tables.append(Table(GATES_TITLE, ("verdict", "gate", "device", "why"), rows))
    steps = record.get("steps", [])
    tables += [_stage_table(record), model_table(steps), *training_tables(steps)]
    facts = [(step.get("artifact") or {}).get("facts", {}) for step in steps]
    tables += [attempts_table(f) for f in facts if len(f.get("attempts", ())) > 1]
    tables += [rung_table(f["rescue"]) for f in facts if f.get("rescue")]
    tables += layer_tables(steps) if layers else []
    tables.append(measurement_table("Model", run.load_measurements("model")))
    for device in record.get("devices", []):
        name = device_name(device)
        measured = run.load_measurements(name)
        emulated = any(m.context.get("emulated") for m in measured.values())
        kind = f" ({device['profile']})" if name != device["profile"] else ""
        title = f"{name}{kind} at {device['address']}{' (emulated)' * emulated}"
        tables.append(measurement_table(title, measured))
        tables.append(context_table(measured))
    return [t for t in tables if t.rows]


def _stage_table(record: Mapping[str, Any]) -> Table:
    rows = []
    for step in record.get("steps", []):
        artifact = step.get("artifact")
        took = "kept" if step["cached"] else f"{step.get('seconds', 0):.1f} s"
        if artifact is None:
            rows.append((step["step"], took, "", "", ""))
            continue
        facts = artifact["facts"]
        parity = "the same bits" if "merged" in facts else _parity_text(facts.get("parity"))
        rows.append((step["step"], took, artifact["kind"], artifact["sha256"][:12], parity))
    return Table("Steps", ("step", "took", "kind", "sha256", "parity with the step before"), tuple(rows))  # fmt: skip


def _parity_text(parity: Any) -> str:
    """The worst output of a parity record, whatever else the record holds."""
    outputs = parity.get("outputs", {}) if isinstance(parity, dict) else {}
    if not outputs:
        return ""
    worst = min(outputs.values(), key=lambda o: o["sqnr_db"])
    return f"{worst['sqnr_db']:.1f} dB, max abs {worst['max_abs']:.2g}"


def measurement_table(title: str, measured: dict[str, Measurement]) -> Table:
    """One row per metric, in the order of METRICS; time metrics show p50 and p90 with n."""
    rows = []
    for metric in METRICS:
        found = measured.get(metric)
        if found is None:
            continue
        sessions = found.valid_sessions
        if not sessions:
            why = next(iter(found.excluded.values()), "")
            rows.append((metric, "no valid session", "", why))
            continue
        p50 = format_value(stats.sessions_percentile(sessions, 0.5), found.unit)
        p90, n = "", ""
        if any(len(s) > 1 for s in sessions):
            p90 = format_value(stats.sessions_percentile(sessions, 0.9), found.unit)
        if len(sessions) > 1 or len(sessions[0]) > 1:
            n = f"{len(sessions)} x {min(len(s) for s in sessions)}"
        rows.append((metric, p50, p90, n))
    return Table(title, ("metric", "value (p50)", "p90", "sessions x samples"), tuple(rows))


def context_table(measured: dict[str, Measurement]) -> Table:
    """Under which conditions a device's figures were taken."""
    found = next((m for m in measured.values() if "runtime" in m.context), None)
    if found is None:
        return Table("", (), ())
    rows = tuple(
        (key, _context_text(found.context[key]))
        for key in CONTEXT_SHOWN
        if key in found.context and found.context[key] != ""
    )
    return Table("Measured with", ("what", "value"), rows)


def _context_text(value: Any) -> str:
    if value is None:
        return "not available"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def text_table(table: Table) -> str:
    """Columns padded with spaces; plain ASCII, no colour."""
    return "\n".join([table.title, *_padded([table.header, *table.rows])])


def _padded(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[_one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
    ]


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown_escaped(_one_line(c)) for c in cells) + " |"

    rule = "|" + "|".join(" --- " for _ in table.header) + "|"
    return "\n".join([f"### {table.title}", "", row(table.header), rule, *map(row, table.rows)])


def runs_table(runs: Sequence[Run]) -> Table:
    """The stored runs, newest first."""
    rows = []
    for run in reversed(runs):
        record = run.read()
        shipped = record.get("shipped") or {}
        rows.append(
            (
                run.id,
                record["recipe"],
                record.get("verdict") or record["status"],
                shipped.get("sha256", "")[:12],
                ", ".join(device_name(d) for d in record.get("devices", [])),
            )
        )
    return Table("Runs", ("id", "recipe", "verdict", "model", "devices"), tuple(rows))
