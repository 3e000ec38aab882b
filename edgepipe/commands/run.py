"""``edgepipe run``: the whole recipe."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.cli import Output
from edgepipe.commands.on_device import add_board_arguments
from edgepipe.gate import EXIT_CODES

if TYPE_CHECKING:
    from edgepipe.ci_output import CiOutput


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
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME=SIZE", help="which of the sizes under the recipe's [buckets]")  # fmt: skip
    add_board_arguments(parser, default="the lab's boards of the recipe's profiles")
    parser.add_argument("--no-devices", action="store_true", help="stop after evaluation; device gates become INCONCLUSIVE")  # fmt: skip
    parser.add_argument("--remeasure", action="store_true", help="measure again even if nothing changed")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="also copy the shipped model here if no gate failed")  # fmt: skip
    parser.add_argument("--baselines", type=Path, metavar="DIR", help="where baselines lie (default: the recipe's folder, else ci/baselines)")  # fmt: skip
    ci_output.add_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.ci_output import CiOutput

    ci = CiOutput(args)
    with ci.reporting_errors(args.recipe.stem, out.text):
        return _run(args, out, ci)


def _run(args: argparse.Namespace, out: Output, ci: CiOutput) -> int:
    from edgepipe import adhoc, pipeline, report
    from edgepipe.errors import RequestError
    from edgepipe.inventory import resolve_targets
    from edgepipe.recipe import load_recipe, parse_bucket
    from edgepipe.store import Store, check_output

    recipe = load_recipe(args.recipe, parse_bucket(args.bucket))
    check_output(args.output)
    if args.output and recipe.model.builder and all(s.produces == "same" for s in recipe.stages):
        raise RequestError(
            "--output copies a file, but this recipe ships a PyTorch model, which is a folder",
            hint="add the stages export_onnx and to_tflite, or leave --output out",
        )
    targets = [] if args.no_devices else resolve_targets(
        recipe.devices, devices=args.device, profile=args.profile, lab=args.lab, match=args.match
    )  # fmt: skip
    result = pipeline.run(
        recipe,
        Store(Path(args.store)),
        targets=targets,
        remeasure=args.remeasure,
        baselines=args.baselines,
    )
    record = result.run.read()
    if marks := ci.write(record, report.render(result.run, markdown=True)):
        out.text(marks)
    out.text(report.render(result.run, markdown=False).rstrip())
    out.text(f"model: {result.shipped.path}")
    if args.output and result.status is not result.status.FAIL:
        adhoc.write_model(result.shipped, args.output)
        out.text(f"copied to {args.output}")
    out.json(
        {
            "run": result.run.id,
            "verdict": result.status.value,
            "verdicts": [dataclasses.asdict(v) for v in result.verdicts],
            "model": str(result.shipped.path),
            "sha256": result.shipped.sha256,
            "steps": record["steps"],
            "devices": record.get("devices", []),
        }
    )
    return EXIT_CODES[result.status]
