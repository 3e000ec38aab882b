"""``edgepipe gate``: judge a stored run again, by its own gates or another recipe's, and promote it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgepipe.baseline import Baseline
    from edgepipe.ci_output import CiOutput
    from edgepipe.gate import Evidence, Gate, Verdict
    from edgepipe.measurement import Measurement
    from edgepipe.recipe import Recipe
    from edgepipe.store import Run

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from edgepipe import ci_output

    parser.description = (
        "Judge a stored run from its evidence; nothing is measured.\n\n"
        "  edgepipe gate                     the latest run, by the gates it was run with\n"
        "  edgepipe gate 3f2a1c --recipe strict.toml\n"
        "  edgepipe gate --promote           and make it the baseline of the next ones\n\n"
        "--promote writes ci/baselines/<profile>/<recipe>.json and .tflite, to be committed, if every\n"
        "gate PASSed (a first baseline: every gate but those that need one). Exit code 0 then."
    )
    parser.add_argument("run", nargs="?", default="latest", help="run id, its start or end (default: latest, with all buckets of that command)")  # fmt: skip
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="judge by the gates of this recipe")  # fmt: skip
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME=SIZE", help="only this size of the [buckets]")  # fmt: skip
    parser.add_argument("--baselines", type=Path, metavar="DIR", help="where baselines lie (default: where the run looked)")  # fmt: skip
    parser.add_argument("--promote", action="store_true", help="make the run the baseline, if every gate passed")  # fmt: skip
    ci_output.add_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.ci_output import CiOutput

    ci = CiOutput(args)
    with ci.reporting_errors(f"run {args.run}", out.text):
        return _run(args, out, ci)


def _run(args: argparse.Namespace, out: Output, ci: CiOutput) -> int:
    from edgepipe.errors import EXIT_NOT_READY, EdgepipeError, RequestError, worst_exit_code
    from edgepipe.recipe import parse_bucket
    from edgepipe.report import buckets_table, render_all, text_table
    from edgepipe.store import Store

    if args.promote and args.recipe:
        raise RequestError(
            "--promote judges by the gates of the run itself, not by those of --recipe",
            hint="run the other recipe, then promote that run",
        )
    asked = parse_bucket(args.bucket)
    together = Store(Path(args.store)).find_together(args.run)
    runs = [run for run in together if _is_asked_for(run.read().get("bucket", {}), asked)]
    if not runs:
        raise RequestError(
            f"{args.run} holds no run of the bucket {' '.join(args.bucket)}",
            hint="`edgepipe runs` lists what there is",
        )
    if len(runs) == 1 and (asked or len(together) == len(_names(together[0].read()))):
        judged, result, code = _judge(runs[0], args, out)
        if marks := ci.write([judged], render_all(runs, markdown=True, records=[judged])):
            out.text(marks)
        out.json(result)
        return code

    records, entries, codes = [], [], []
    for run in runs:
        try:
            judged, result, code = _judge(run, args, out)
        except EdgepipeError as exc:
            log.warning("%s: %s", run.read()["recipe"], exc.message)
            judged, result, code = run.read(), {"run": run.id, **exc.as_dict()}, exc.exit_code
            judged.setdefault("error", exc.as_dict())
        records.append({**judged, "together": None} if asked else judged)
        entries.append({"bucket": judged["bucket"], **result})
        codes.append(code)
        out.text("")
    begun = {record["recipe"] for record in records}
    for name in _names(records[0]) if not asked else ():
        if name not in begun:
            log.warning("%s was never begun: there is no evidence to judge", name)
            codes.append(EXIT_NOT_READY)
    if marks := ci.write(records, render_all(runs, markdown=True, records=records)):
        out.text(marks)
    out.text(text_table(buckets_table(runs, records)))
    out.json({"buckets": entries})
    return worst_exit_code(codes)


def _names(record: Mapping[str, Any]) -> list[str]:
    """The recipes that were asked for together with a run, its own among them."""
    together = record.get("together") or {}
    return together.get("recipes") or [record["recipe"]]


def _is_asked_for(bucket: Mapping[str, int], asked: Mapping[str, Sequence[int]]) -> bool:
    return all(size in asked.get(name, [size]) for name, size in bucket.items())


def _judge(found: Run, args: argparse.Namespace, out: Output) -> tuple[dict[str, Any], dict[str, Any], int]:  # fmt: skip
    """Judge one run and show it: (its record as judged, what ``--json`` says, exit code)."""
    from edgepipe.baseline import DEFAULT_FOLDER, load_baseline
    from edgepipe.errors import EXIT_NOT_READY, NotReadyError, RecipeError
    from edgepipe.gate import EXIT_CODES, GATES, Evidence, Status, overall
    from edgepipe.judge import judge, needs_baseline
    from edgepipe.report import Table, details_text, text_table
    from edgepipe.store import device_name

    record = found.read()
    if record["status"] != "complete":
        raise NotReadyError(
            f"run {found.id} is {record['status']}: there is no complete evidence to judge",
            hint=f"run it to the end: edgepipe run {record.get('recipe_path', 'RECIPE')}",
        )
    if args.recipe:
        recipe = _recipe_for(record, args)
        _check_evaluation(recipe, found.load_measurements("model"))
        gates = list(recipe.gates)
    else:
        gates = [_gate(entry, GATES) for entry in record["gates"]]
    if not gates:
        raise RecipeError("no gates to judge by", hint="add [[gates]] to the recipe, or name one with --recipe")  # fmt: skip
    folder = args.baselines or Path(record.get("baselines") or DEFAULT_FOLDER)
    baselines = {}
    if needs_baseline(gates) or args.promote:
        baselines = {device_name(d): load_baseline(folder, d["profile"], record["recipe"]) for d in record["devices"]}  # fmt: skip
    sha = record["shipped"]["sha256"]
    model = Evidence(sha, "", found.load_measurements("model"))
    devices = [
        Evidence(
            sha,
            device_name(d),
            found.load_measurements(device_name(d)),
            profile=d["profile"],
            missing=(d.get("error") or {}).get("message", ""),
        )
        for d in record["devices"]
    ]
    verdicts = judge(
        gates,
        model,
        devices,
        baselines=baselines,
        measured_against=record.get("measured_against", {}),
        run_id=found.id,
    )
    status = overall(verdicts)
    judged = {**record, "verdict": status.value, "verdicts": [dataclasses.asdict(v) for v in verdicts]}  # fmt: skip
    rows = tuple((v.status.value, v.gate, v.device or "-", v.reason) for v in verdicts)
    out.text(text_table(Table(f"{record['recipe']}: {status.value}", ("verdict", "gate", "device", "why"), rows)))  # fmt: skip
    if why := details_text(judged["verdicts"], markdown=False):
        out.text(f"\n{why}")
    result: dict[str, Any] = {"run": found.id, "verdict": status.value, "verdicts": judged["verdicts"]}  # fmt: skip
    code = EXIT_CODES[status]
    if args.promote:
        result["promoted"], refusal = _promote(folder, record, model, devices, verdicts, baselines, out)  # fmt: skip
        result["not_promoted"] = refusal
        code = 0 if not refusal else EXIT_NOT_READY if status is Status.PASS else code
    return judged, result, code


def _recipe_for(record: Mapping[str, Any], args: argparse.Namespace) -> Recipe:
    """The recipe of ``--recipe``, of its buckets the one that was run."""
    from edgepipe.errors import RecipeError
    from edgepipe.recipe import load_buckets, parse_bucket

    recipes = load_buckets(args.recipe, parse_bucket(args.bucket))
    same = [r for r in recipes if r.bucket == record.get("bucket", {})]
    if len(recipes) > 1 and not same:
        raise RecipeError(
            f"{args.recipe} has no bucket like that of run {record['id']} ({record.get('bucket') or 'none'})",
            hint="choose one with --bucket NAME=SIZE",
        )
    return (same or recipes)[0]


def _promote(
    folder: Path,
    record: Mapping[str, Any],
    model: Evidence,
    devices: Sequence[Evidence],
    verdicts: Sequence[Verdict],
    baselines: Mapping[str, Baseline | None],
    out: Output,
) -> tuple[list[str], str]:
    """Promote on every device of the run, or on none: (paths written, why not)."""
    from edgepipe.artifact import artifact_from_dict
    from edgepipe.baseline import changes, device_context, promote, why_not_promotable
    from edgepipe.report import Table, text_table

    shipped = artifact_from_dict(record["shipped"])
    current = {d.device: baselines[d.device] for d in devices}
    if devices and all(b is not None and b.run == record["id"] for b in current.values()):
        out.text(f"\nnothing to do: this run is the baseline in {_shown(folder)}")
        return [], ""
    refusal = why_not_promotable(verdicts, shipped, devices, baselines)
    if refusal:
        out.text(f"\nnot promoted: {refusal}")
        return [], refusal
    written = []
    # boards of one profile share its baseline: the figures kept with it are those of the first
    firsts: dict[str, Evidence] = {}
    for device in devices:
        firsts.setdefault(device.profile, device)
    for device in firsts.values():
        old = current[device.device]
        was = f"{old.model.sha256[:12]} of run {old.run}" if old else "none"
        label = " (emulated)" if device_context(device.measurements).get("emulated") else ""
        title = f"\n{record['recipe']} on {device.profile}{label}: baseline {was} -> {shipped.sha256[:12]} of run {record['id']}"  # fmt: skip
        header = ("metric", "old (p50)", "new (p50)", "change")
        out.text(text_table(Table(title, header, changes(old, model, device))))
        open_ = sorted({v.gate for v in verdicts if v.device == device.device and v.status.value != "PASS"})  # fmt: skip
        if open_:
            out.text(f"the first baseline: {', '.join(open_)} had none to compare with")
        path = promote(
            folder=folder, recipe=record["recipe"], run_id=record["id"], shipped=shipped,
            model=model, device=device, verdicts=verdicts,
        )  # fmt: skip
        written += [_shown(path), _shown(path.with_suffix(".tflite"))]
    out.text(f"wrote {', '.join(written)}\ncommit them: git add {' '.join(written)}")
    return written, ""


def _check_evaluation(recipe: Recipe, measured: Mapping[str, Measurement]) -> None:
    """Refuse gates on accuracy that were meant for another metric or other data than the run's."""
    import hashlib

    from edgepipe.data import fingerprint
    from edgepipe.errors import RecipeError

    options, judged = recipe.evaluate, measured.get("task_metric")
    if options is None or judged is None:
        return
    data = hashlib.sha256(fingerprint(recipe.data[options.data]).encode()).hexdigest()
    for what, asked, was in (("metric", options.metric, judged.context["metric"]), ("data set", data, judged.context["data_sha256"])):  # fmt: skip
        if asked != was:
            raise RecipeError(
                f"{recipe.path} evaluates by another {what} than the run: {asked[:12]}, the run {was[:12]}",
                hint=f"run that recipe instead: edgepipe run {recipe.path}, or leave [evaluate] out of it",
            )


def _shown(path: Path) -> str:
    """As one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _gate(entry: dict[str, Any], registry: dict[str, type[Gate]]) -> Gate:
    """A gate as the run's record holds it: already in base units, so no checking of text."""
    from edgepipe.errors import RecipeError

    try:
        return registry[entry["gate"]](**{k: v for k, v in entry.items() if k != "gate"})
    except (KeyError, TypeError) as exc:
        raise RecipeError(
            f"this edgepipe has no gate like the run's {entry}",
            hint="judge by the gates of a recipe: edgepipe gate --recipe FILE",
        ) from exc
