"""``edgepipe gate``: judge a stored run again, by its own gates or another recipe's."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output

if TYPE_CHECKING:
    from edgepipe.gate import Gate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Judge a stored run from its evidence; nothing is measured.\n\n"
        "  edgepipe gate                     the latest run, by the gates it was run with\n"
        "  edgepipe gate 3f2a1c --recipe strict.toml"
    )
    parser.add_argument("run", nargs="?", default="latest", help="run id, its start or end (default: latest)")  # fmt: skip
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="judge by the gates of this recipe")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.errors import NotReadyError, RecipeError
    from edgepipe.gate import EXIT_CODES, GATES, Evidence, judge_all, overall
    from edgepipe.recipe import load_recipe
    from edgepipe.report import Table, text_table
    from edgepipe.store import Store

    found = Store(Path(args.store)).find_run(args.run)
    record = found.read()
    if record["status"] != "complete":
        raise NotReadyError(
            f"run {found.id} is {record['status']}: there is no complete evidence to judge",
            hint=f"run it to the end: edgepipe run {record.get('recipe_path', 'RECIPE')}",
        )
    if args.recipe:
        gates = list(load_recipe(args.recipe).gates)
    else:
        gates = [_gate(entry, GATES) for entry in record["gates"]]
    if not gates:
        raise RecipeError("no gates to judge by", hint="add [[gates]] to the recipe, or name one with --recipe")  # fmt: skip
    sha = record["shipped"]["sha256"]
    devices = [
        Evidence(sha, d["profile"], found.load_measurements(d["profile"]))
        for d in record["devices"]
    ]
    verdicts = judge_all(gates, Evidence(sha, "", found.load_measurements("model")), devices)
    status = overall(verdicts)
    rows = tuple((v.status.value, v.gate, v.device or "-", v.reason) for v in verdicts)
    out.text(text_table(Table(f"{record['recipe']}: {status.value}", ("verdict", "gate", "device", "why"), rows)))  # fmt: skip
    out.json({"run": found.id, "verdict": status.value, "verdicts": [dataclasses.asdict(v) for v in verdicts]})  # fmt: skip
    return EXIT_CODES[status]


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
