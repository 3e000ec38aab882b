"""What converts: every network of the zoo through every route to TFLite, and on to int8.

    python ci/bench/zoo.py --work DIR [--only NAME ...] [--route ROUTE ...] [--list]

`ci/bench/zoo_models` holds the networks. Each is exported, converted and quantised by the stages of a
recipe, one at a time in a child process. What counts is measured here, apart from the stages' own
checks: the .tflite file is run by LiteRT on seeded inputs that no stage has seen, beside the network
itself in PyTorch. A row is kept as JSON under ``--work`` as soon as it is made, a later run goes on
from there, and ``--again`` makes rows anew. At the end the tables are printed, and written to
``zoo.md`` and ``zoo.json``.

converted   to_tflite accepted a file; if not, the reason code
parity      max |TFLite - PyTorch| / max |PyTorch|, the worst output
TRANSPOSE   such operators in the float file
islands     float operators left after int8, which quantize_int8 refuses unless told otherwise
SQNR        of the int8 file against PyTorch, the worst output
CPU         seconds of to_tflite, its converters included; memory: the largest process of the row
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from forked import run_forked
from safetensors.torch import save_file
from zoo_models import MODELS, ZooModel, samples, settled

from edgepipe import pipeline
from edgepipe.adhoc import recipe_for
from edgepipe.artifact import Artifact
from edgepipe.data import DataSource
from edgepipe.errors import EdgepipeError, StageError
from edgepipe.routes import Candidate
from edgepipe.stages.load import ModelSource, TensorOption
from edgepipe.stages.to_tflite import ToTflite
from edgepipe.store import Store, write_json
from edgepipe.tflite_ops.inspect import describe
from edgepipe.torch_ops.run import flatten_outputs

PARITY = 1e-4  # what counts as the same: relative, max abs over max, of issue and stages alike
ROUTES = get_args(get_type_hints(ToTflite)["route"])
CALIBRATION = 32  # samples; the stages see these, the judge's are others
JUDGED = 8
Row = dict[str, Any]


# -- one model, in a child process -----------------------------------------------------------------


def make_row(entry: ZooModel, route: str, work: Path, timeout_s: float, keep: Callable[[Row], None]) -> Row:  # fmt: skip
    """Export, convert, quantise and judge one network. ``keep`` is given the row before int8 is tried."""
    torch.set_num_threads(1)
    network = settled(entry)
    folder = work / "models" / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    weights, data = folder / "weights.safetensors", folder / "calibration.npz"
    if not weights.exists():
        save_file(network.state_dict(), weights)
        np.savez(data, **samples(entry, CALIBRATION, seed=101))  # type: ignore[arg-type]
    unseen = samples(entry, JUDGED, seed=202)
    inputs = tuple(TensorOption(name=n, shape=(1, *a.shape[1:]), dtype=a.dtype.name) for n, a in unseen.items())  # type: ignore[arg-type]  # fmt: skip
    source = ModelSource(builder=entry.builder, weights=weights, inputs=inputs, root=folder)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("export_onnx", {}),
        ("to_tflite", {"route": route, "timeout": f"{timeout_s:g} s"}),
    ]
    row: Row = {"model": entry.name, "family": entry.family, "route": route, "converted": False}
    with torch.no_grad():
        outputs = flatten_outputs(network(*(torch.from_numpy(a) for a in unseen.values())))
    expected = {f"output_{i}": value.numpy() for i, value in enumerate(outputs)}

    def convert(count: int) -> Artifact:
        recipe = recipe_for(source, steps[:count], DataSource(kind="npz", path=data))
        return pipeline.convert(recipe, Store(folder / "store"))

    try:
        convert(1)
        began = _cpu_s()
        made = convert(2)
        row |= {"cpu_s": _cpu_s() - began, "converted": True}
        row |= judge_float(made, unseen, expected)
    except Exception as exc:  # noqa: BLE001  what is no error of edgepipe's is a bug, and a row
        return row | failure(exc)
    content = describe(made.path)
    row |= {
        "transposes": content.transposes,
        "operators": sum(content.operators.values()),
        "bytes": made.size_bytes,
        "used": made.facts.get("route"),
        "why": made.facts.get("route_reason"),
        "attempts": made.facts.get("attempts", []),
    }
    steps.append(
        (
            "quantize_int8",
            {
                # float operators and a low SQNR are to be counted here, not refused
                "allow_float": list(content.operators), "min_sqnr": "-190 dB",
                "input_dtype": "float32", "output_dtype": "float32",
            },
        )
    )  # fmt: skip
    # a crash of the runtime on the int8 file ends this process, and shall not take the row with it
    keep(row | {"int8": {"code": "crash", "message": "the process ended while quantising"}})
    try:
        int8 = convert(3)
        row["int8"] = {
            "islands": describe(int8.path).float_operators,
            "sqnr_db": min(sqnr_db(expected[n], a) for n, a in run_tflite(int8, unseen).items()),
        }
    except Exception as exc:  # noqa: BLE001  what is no error of edgepipe's is a bug, and a row
        row["int8"] = failure(exc)
    return row


def failure(exc: Exception) -> Row:
    """A failed stage as JSON; ``bug`` for an exception that is no error of edgepipe's."""
    if not isinstance(exc, EdgepipeError):
        logging.exception("bug")
        return {"stage": "", "code": "bug", "message": f"{type(exc).__name__}: {exc}"}
    return {"stage": exc.stage if isinstance(exc, StageError) else "", "code": exc.code, "message": exc.message}  # fmt: skip


def judge_float(made: Artifact, unseen: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Row:  # fmt: skip
    """Parity of a float file; ``keeps_state`` where it needs a reset between inferences."""
    declared = bool(made.facts.get("variable_tensors"))
    parity = worst(expected, run_tflite(made, unseen, reset=declared))
    return {"parity": parity, "keeps_state": declared}


def worst(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> float:
    """Largest over outputs of max |error| / max |expected|; infinity where they cannot be compared."""
    if set(expected) != set(actual):
        return math.inf
    return max(relative_error(expected[name], actual[name]) for name in expected)


def relative_error(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return math.inf
    error = np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max()
    return float(error / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def sqnr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    """10 log10 of signal power over noise power, at most 200."""
    noise = float(((expected.astype(np.float64) - actual) ** 2).sum())
    signal = float((expected.astype(np.float64) ** 2).sum())
    return min(200.0, 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300)))


def run_tflite(made: Artifact, unseen: Mapping[str, np.ndarray], *, reset: bool = True) -> dict[str, np.ndarray]:  # fmt: skip
    """Outputs by name in the network's own layout, one sample after the other on one interpreter.

    Only the record's names and layouts are believed; everything else is LiteRT's own.
    """
    interpreter = Interpreter(str(made.path), num_threads=1)
    interpreter.allocate_tensors()
    found: dict[str, list[np.ndarray]] = {spec.name: [] for spec in made.outputs}
    for index in range(JUDGED):
        for detail, spec in zip(interpreter.get_input_details(), made.inputs, strict=True):
            value = moved(unseen[spec.name][index : index + 1], spec.source_layout, spec.layout)
            interpreter.set_tensor(detail["index"], value.astype(detail["dtype"]))
        if reset:
            interpreter.reset_all_variables()
        interpreter.invoke()
        for detail, spec in zip(interpreter.get_output_details(), made.outputs, strict=True):
            value = interpreter.get_tensor(detail["index"])
            found[spec.name].append(moved(value, spec.layout, spec.source_layout))
    return {name: np.concatenate(values) for name, values in found.items()}


def moved(array: np.ndarray, layout: str, wanted: str) -> np.ndarray:
    """Axes from one layout to another: NCHW to NHWC is a transpose by (0, 2, 3, 1)."""
    return array if layout == wanted else array.transpose([layout.index(axis) for axis in wanted])


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def child(name: str, route: str, work: Path, timeout_s: float) -> None:
    """What the forked process does: one row."""
    logging.info("--- %s by %s", name, route)

    def keep(row: Row) -> None:
        usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]  # fmt: skip
        write_json(row_file(work, name, route), row | {"peak_rss_bytes": max(usage) * 1024})

    keep(make_row(MODELS[name], route, work, timeout_s, keep))


# -- all of them -----------------------------------------------------------------------------------


def row_file(work: Path, name: str, route: str) -> Path:
    return work / "rows" / route / f"{name}.json"


def row_of(name: str, route: str, work: Path, timeout_s: float, *, again: bool = False) -> Row:
    """A row as it was kept, or made now by a child process; a crash or a timeout is a row, too."""
    kept = row_file(work, name, route)
    if again:
        kept.unlink(missing_ok=True)
    if not kept.exists():
        began = time.monotonic()
        code = run_forked(child, name, route, work, timeout_s, log=work / "log.txt", timeout_s=timeout_s)  # fmt: skip
        seconds = round(time.monotonic() - began, 1)
        row: Row = {
            "model": name,
            "family": MODELS[name].family,
            "route": route,
            "converted": False,
        }
        if code is None:
            row |= {"code": "timeout", "message": f"not done after {timeout_s:g} s"}
        elif not kept.exists():
            row |= {"code": "crash", "message": f"the child ended with {code}, see log.txt"}
        else:
            row = json.loads(kept.read_text())
        write_json(kept, row | {"seconds": seconds})
    found: Row = json.loads(kept.read_text())
    return found


def warm_up() -> None:
    """Have everything imported and registered once, which is half of what a row costs otherwise."""
    import edgepipe.tflite_ops.quantize  # noqa: F401

    torch.set_num_threads(1)  # no threads before the forks
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not here
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),), dynamo=True, verbose=False)


def is_good(row: Row) -> bool:
    return bool(row["converted"]) and row["parity"] <= PARITY


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, one line a row."""
    lines = [
        "| model | route | parity | TRANSPOSE | islands | int8 SQNR | CPU | memory | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        int8 = row.get("int8", {})
        notes = [] if row["converted"] else [f"{row['code']}: {_short(row['message'])}"]
        if row["converted"] and not is_good(row):
            notes.append("**accepted, but not the same**")
        if "code" in int8:
            notes.append(f"int8 {int8['code']}: {_short(int8['message'])}")
        if row.get("keeps_state"):
            notes.append("keeps state")
        shown = [
            row["model"], f"{row['route']} ({row['used']})" if row.get("used", row["route"]) != row["route"] else row["route"],
            f"{row['parity']:.1e}" if row["converted"] else "-", row.get("transposes", "-"), int8.get("islands", "-"),
            f"{int8['sqnr_db']:.1f} dB" if "sqnr_db" in int8 else "-", f"{row['cpu_s']:.1f} s" if "cpu_s" in row else "-",
            f"{row['peak_rss_bytes'] / 1e6:.0f} MB" if "peak_rss_bytes" in row else "-", "; ".join(notes),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in shown) + " |")
    return lines


def _short(message: str) -> str:
    return " ".join(message.replace("|", "/").split())[:160]


def summary(rows: Sequence[Row]) -> list[str]:
    """One line a route, then what was accepted and is not the same, by name."""
    lines = [
        "| route | models | same as PyTorch | refused | accepted, but not the same | median TRANSPOSE | int8 without islands | median SQNR | CPU, median |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for route in dict.fromkeys(row["route"] for row in rows):
        mine = [row for row in rows if row["route"] == route]
        good = [row for row in mine if is_good(row)]
        wrong = [row for row in mine if row["converted"] and not is_good(row)]
        whole = [row["int8"] for row in good if row["int8"].get("islands") == 0]
        sqnr = [row["int8"]["sqnr_db"] for row in good if "sqnr_db" in row["int8"]]
        shown = [
            route, len(mine), f"{len(good)} ({100 * len(good) / len(mine):.1f} %)", len(mine) - len(good) - len(wrong), len(wrong),
            _median([row["transposes"] for row in good], ".0f"), len(whole), _median(sqnr, ".1f", " dB"), _median([row["cpu_s"] for row in good], ".1f", " s"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in shown) + " |")
    wrong = [row for row in rows if row["converted"] and not is_good(row)]
    if wrong:
        lines += ["", "Accepted, but not the same:", *(f"- {r['model']} by {r['route']}: parity {r['parity']:.2g}" for r in wrong)]  # fmt: skip
    return lines


def searched(rows: Sequence[Row]) -> list[str]:
    """One line for each way that ``auto`` tried, over the networks that it converted."""
    attempts: dict[str, list[Row]] = {}
    for row in rows:
        for made in row.get("attempts", []) if row["route"] == "auto" else []:
            way = Candidate(made["route"], made["exporter"], made["simplified"])
            attempts.setdefault(str(way), []).append(made)
    if not attempts:
        return []
    lines = ["", "What `auto` tried:", "", "| way | tried | proven | clean | refused |", "|---|---|---|---|---|"]  # fmt: skip
    for name, made in sorted(attempts.items(), key=lambda item: -len(item[1])):
        codes = Counter(attempt["code"] for attempt in made if not attempt["ok"])
        why = ", ".join(f"{code} {n}" for code, n in codes.most_common())
        shown = [name, len(made), sum(a["ok"] for a in made), sum(a["clean"] for a in made), why]
        lines.append("| " + " | ".join(str(cell) for cell in shown) + " |")
    return lines


def _median(values: Sequence[float], form: str, unit: str = "") -> str:
    return f"{statistics.median(values):{form}}{unit}" if values else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder for models and rows")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models or families")
    parser.add_argument("--route", nargs="+", default=["auto"], choices=ROUTES, help="default: auto")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one row (default: 600)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="make these rows anew")
    parser.add_argument("--list", action="store_true", help="print the models and their inputs, and end")  # fmt: skip
    args = parser.parse_args()
    wanted = [e for e in MODELS.values() if not args.only or e.name in args.only or e.family in args.only]  # fmt: skip
    if args.list or not wanted:
        for entry in MODELS.values():
            print(f"{entry.family:17} {entry.name:24} {entry.inputs}")
        return 0 if args.list else 2
    if args.work is None:
        parser.error("--work is needed")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    warm_up()
    rows = []
    for route in args.route:
        for entry in wanted:
            row = row_of(entry.name, route, work, args.timeout, again=args.again)
            rows.append(row)
            print("\n".join(table([row])[2:]), flush=True)
    text = "\n".join([*summary(rows), *searched(rows), "", *table(rows)]) + "\n"
    print("\n" + text)
    write_json(work / "zoo.json", rows)
    (work / "zoo.md").write_text(text, encoding="utf-8")
    return 0 if all(is_good(row) or not row["converted"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
