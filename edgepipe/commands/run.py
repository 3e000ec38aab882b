"""``edgepipe run``: the whole recipe."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output
from edgepipe.commands.on_device import add_board_arguments
from edgepipe.gate import EXIT_CODES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepipe.ci_output import CiOutput
    from edgepipe.pipeline import RunResult
    from edgepipe.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from edgepipe import ci_output

    parser.description = (
        "Run a recipe: stages (unchanged ones are kept), evaluation, measurement, gates.\n\n"
        "  edgepipe run recipe.toml\n"
        "  edgepipe run recipe.toml --device ssh://pi@raspberrypi --profile rpi4b_4gb\n"
        "  edgepipe run recipe.toml --lab lab.toml           on all its boards of the recipe's profiles\n"
        "  edgepipe run recipe.toml --lab lab.toml --match 'soc=bcm2712 tag=upper'"
    )
    parser.add_argument("recipe", type=Path, help="the recipe, a TOML file")
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME=SIZE", help="only this size of the recipe's [buckets] (default: all, one after the other)")  # fmt: skip
    add_board_arguments(parser, default="the lab's boards of the recipe's profiles")
    parser.add_argument("--no-devices", action="store_true", help="stop after evaluation; device gates become INCONCLUSIVE")  # fmt: skip
    parser.add_argument("--remeasure", action="store_true", help="measure again even if nothing changed")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="also copy the shipped model here if no gate failed (of several buckets: FILE-length16 and so on)")  # fmt: skip
    parser.add_argument("--merge", type=Path, metavar="FILE", help="ship all buckets as one .tflite, a signature for each: it is what is measured and judged, and copied here if no gate failed")  # fmt: skip
    parser.add_argument("--baselines", type=Path, metavar="DIR", help="where baselines lie (default: the recipe's folder, else ci/baselines)")  # fmt: skip
    ci_output.add_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.ci_output import CiOutput

    ci = CiOutput(args)
    with ci.reporting_errors(args.recipe.stem, out.text):
        return _run(args, out, ci)


def _run(args: argparse.Namespace, out: Output, ci: CiOutput) -> int:
    from edgepipe import pipeline, report
    from edgepipe.errors import EXIT_FAIL, EdgepipeError, RequestError, worst_exit_code
    from edgepipe.inventory import resolve_targets
    from edgepipe.merge import check_mergeable
    from edgepipe.recipe import load_buckets, parse_bucket
    from edgepipe.store import Store, check_output

    recipes = load_buckets(args.recipe, parse_bucket(args.bucket))
    check_output(args.output)
    check_output(args.merge, option="--merge")
    if args.merge:
        if args.output:
            raise RequestError(
                "--output copies a file for each bucket, and with --merge one file is what ships",
                hint="give --merge FILE alone; run again without it for the single files",
            )
        check_mergeable(recipes)
    for recipe in recipes:
        _check_output_kind(args.output, recipe)
    targets = [
        [] if args.no_devices else resolve_targets(
            recipe.devices, devices=args.device, profile=args.profile, lab=args.lab, match=args.match
        )
        for recipe in recipes
    ]  # fmt: skip
    store = Store(Path(args.store))
    options = {"remeasure": args.remeasure, "baselines": args.baselines}
    if len(recipes) == 1:
        result = pipeline.run(recipes[0], store, targets=targets[0], **options)
        record = result.run.read()
        if marks := ci.write([record], report.render(result.run, markdown=True)):
            out.text(marks)
        out.text(report.render(result.run, markdown=False).rstrip())
        _hand_over(result, args.output, out)
        out.json(_as_dict(result, record))
        return EXIT_CODES[result.status]

    runs, records, entries, codes, results = [], [], [], [], []
    merge = args.merge is not None
    for run, outcome in pipeline.run_buckets(recipes, store, targets=targets, merge=merge, **options):  # fmt: skip
        record = run.read()
        runs.append(run)
        records.append(record)
        out.text(report.render(run, markdown=False).rstrip())
        if isinstance(outcome, EdgepipeError):
            codes.append(outcome.exit_code)
            entries.append({"run": run.id, "bucket": record["bucket"], "verdict": None, **outcome.as_dict()})  # fmt: skip
        else:
            codes.append(EXIT_CODES[outcome.status])
            results.append(outcome)
            entries.append(_as_dict(outcome, record))
            _hand_over(outcome, _output_of(args.output, record["bucket"]), out)
        out.text("")
    if marks := ci.write(records, report.render_all(runs, markdown=True)):
        out.text(marks)
    out.text(report.text_table(report.buckets_table(runs, records)))
    merged = None
    if args.merge and len(results) == len(recipes) and EXIT_FAIL not in codes:
        merged = _hand_over_merged(results[0], args.merge, out)
    elif args.merge:
        out.text(f"not copied to {args.merge}: a bucket failed")
    out.json({"buckets": entries, **({"merged": merged} if args.merge else {})})
    return worst_exit_code(codes)


def _hand_over_merged(result: RunResult, path: Path, out: Output) -> dict[str, Any]:
    """Copy the file of all buckets, which any one's result names, and say what it is."""
    from edgepipe import adhoc

    adhoc.write_model(result.shipped, path)
    facts = result.shipped.facts["merged"]
    out.text(
        f"copied to {path}: {facts['bytes']:,} bytes, {facts['bytes_apart']:,} apart;"
        f" signatures {', '.join(facts['samples'])}"
    )
    return {"file": str(path), **facts}


def _check_output_kind(output: Path | None, recipe: Recipe) -> None:
    from edgepipe.errors import RequestError

    if output and recipe.model.builder and all(s.produces == "same" for s in recipe.stages):
        raise RequestError(
            "--output copies a file, but this recipe ships a PyTorch model, which is a folder",
            hint="add the stages export_onnx and to_tflite, or leave --output out",
        )


def _output_of(output: Path | None, bucket: Mapping[str, int]) -> Path | None:
    """``net.tflite`` and length 16 -> ``net-length16.tflite``."""
    from edgepipe.recipe import bucket_key

    return output.with_stem(f"{output.stem}-{bucket_key(bucket)}") if output else None


def _hand_over(result: RunResult, output: Path | None, out: Output) -> None:
    from edgepipe import adhoc

    shipped = result.shipped
    which = f", signature {shipped.signature}" if shipped.signature else ""
    out.text(f"model: {shipped.path}{which}")
    if output and result.status is not result.status.FAIL:
        adhoc.write_model(shipped, output)
        out.text(f"copied to {output}")


def _as_dict(result: RunResult, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": result.run.id,
        **({"bucket": record["bucket"]} if "bucket" in record else {}),
        "verdict": result.status.value,
        "verdicts": [dataclasses.asdict(v) for v in result.verdicts],
        "model": str(result.shipped.path),
        "sha256": result.shipped.sha256,
        **({"signature": result.shipped.signature} if result.shipped.signature else {}),
        "steps": record["steps"],
        "devices": record.get("devices", []),
    }
