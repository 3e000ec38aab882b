"""``edgepipe check``: every mistake in a recipe, before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgepipe.cli import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find every mistake in a recipe without running anything or importing a framework.\n\n"
        "  edgepipe check recipe.toml"
    )
    parser.add_argument("recipe", type=Path, help="the recipe, a TOML file")
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME=SIZE", help="only this size of the recipe's [buckets] (default: all)")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.recipe import bucket_text, load_buckets, parse_bucket
    from edgepipe.stages.load import check_file

    recipes = load_buckets(args.recipe, parse_bucket(args.bucket))
    for each in recipes:
        check_file(each.model)
    recipe = recipes[0]
    stages = [stage.name for stage in recipe.stages]
    gates = [gate.name for gate in recipe.gates]
    buckets = [r.bucket for r in recipes if r.bucket]
    out.text(
        f"{args.recipe}: fine\n"
        f"  stages: {' -> '.join(stages) or 'none'}\n"
        f"  devices: {', '.join(recipe.devices) or 'none'}\n"
        f"  gates: {', '.join(gates) or 'none'}"
        + (f"\n  buckets: {', '.join(map(bucket_text, buckets))}" if buckets else "")
    )
    out.json({"recipe": str(recipe.path), "stages": stages, "devices": recipe.devices, "gates": gates, "buckets": buckets})  # fmt: skip
    return 0
