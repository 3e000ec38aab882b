"""``edgepipe report``: a stored run again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edgepipe.cli import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a stored run.\n\n"
        "  edgepipe report\n"
        "  edgepipe report --layers            what compression did to every layer, and why\n"
        "  edgepipe report 3f2a1c --format markdown --output report.md"
    )
    parser.add_argument("run", nargs="?", default="latest", help="run id, its start or end (default: latest, with all buckets of that command)")  # fmt: skip
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default: text")  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="also list the layers after each step that changed them")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it here instead of stdout")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.report import render_all, report_data
    from edgepipe.store import Store, check_output, replacing

    found = Store(Path(args.store)).find_together(args.run)
    data: Any = report_data(found[0])
    if "together" in data and args.run == "latest":
        data = {"buckets": [data, *map(report_data, found[1:])]}
    if args.format == "json":
        text = json.dumps(data, indent=1) + "\n"
    else:
        text = render_all(found, markdown=args.format == "markdown", layers=args.layers)
    if args.output:
        check_output(args.output)
        with replacing(args.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
        out.text(f"wrote {args.output}")
    else:
        out.text(text.rstrip())
    out.json(data)
    return 0
