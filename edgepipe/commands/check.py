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
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME=SIZE", help="which of the sizes under the recipe's [buckets]")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.recipe import load_recipe, parse_bucket

    recipe = load_recipe(args.recipe, parse_bucket(args.bucket))
    stages = [stage.name for stage in recipe.stages]
    gates = [gate.name for gate in recipe.gates]
    out.text(
        f"{args.recipe}: fine\n"
        f"  stages: {' -> '.join(stages) or 'none'}\n"
        f"  devices: {', '.join(recipe.devices) or 'none'}\n"
        f"  gates: {', '.join(gates) or 'none'}"
    )
    out.json({"recipe": str(recipe.path), "stages": stages, "devices": recipe.devices, "gates": gates})  # fmt: skip
    return 0
