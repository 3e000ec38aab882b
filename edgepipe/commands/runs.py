"""``edgepipe runs``: what has been run."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgepipe.cli import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List stored runs, newest first.\n\n  edgepipe runs\n  edgepipe runs --recipe digits"  # fmt: skip
    parser.add_argument("--recipe", metavar="NAME", help="only runs of this recipe")


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.report import runs_table, text_table
    from edgepipe.store import Store

    runs = Store(Path(args.store)).runs()
    if args.recipe:
        runs = [r for r in runs if r.read()["recipe"] == args.recipe]
    out.text(text_table(runs_table(runs)) if runs else "no runs yet; start one with `edgepipe run RECIPE`")  # fmt: skip
    keys = ("id", "recipe", "started", "status", "verdict", "devices")
    out.json([{k: r.read().get(k) for k in keys} for r in reversed(runs)])
    return 0
