"""What single ONNX operators become: the onnx package's own node test cases through `to_tflite`.

    python ci/bench/node_cases.py --work DIR [--every N] [--only OP ...] [--route ROUTE]

Each case of ``onnx.backend.test.case.node`` is a model of one operator with inputs and the outputs
that the ONNX specification wants. The stage converts it; LiteRT then runs the file on the case's own
inputs, and its outputs are compared with the specification's here, apart from the stage's check.

pass         converted, and equal to the specification's outputs
refused      the stage said no; counted by its reason code (``unsupported-op``, ``parity``, ...)
WRONG        accepted, and not equal: there shall be none
disputed     accepted, and equal to what onnxruntime computes, which is not what the specification says
bug          an exception that is no error of edgepipe's, a crash or a timeout

Exporters write weights, axes and shapes into the file, where these cases feed them in; so all but the
first input become constants, unless all inputs are alike (as for Add). Every case runs in a child of
its own; rows are kept as JSON in ``--work`` and not made again, ``by_operator.json`` there is the table.
``--every 10`` takes every tenth case, in an order shuffled with a fixed seed. Left out: ``_expanded``
cases, which spell an operator with others, and those of ``ai.onnx.ml`` and ``ai.onnx.preview``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
from forked import run_forked
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from edgepipe import toolchain
from edgepipe.artifact import Artifact, make_artifact
from edgepipe.data import DataSource
from edgepipe.errors import ArtifactError, EdgepipeError
from edgepipe.routes import ROUTES as CONVERTERS
from edgepipe.stage import StageContext
from edgepipe.stages.to_tflite import ToTflite
from edgepipe.store import write_json
from edgepipe.tflite_ops import bisect, candidates, convert, doors, run, sparse  # noqa: F401  not in every child
from edgepipe.tflite_ops.onnx_model import onnx_specs
from edgepipe.tflite_ops.run import open_onnx, run_tflite

ROUTES = get_args(get_type_hints(ToTflite)["route"])
# float32 through other kernels; of the largest value, as everywhere in edgepipe
TOLERANCE = 1e-4
Row = dict[str, Any]


def cases() -> list[TestCase]:
    """The cases, in an order shuffled with a fixed seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # references that overflow on purpose
        found = collect_testcases(None)
    kept = [c for c in found if "_expanded" not in c.name and c.model.graph.node[0].domain in ("", "ai.onnx")]  # fmt: skip
    random.Random(0).shuffle(kept)
    return kept


def as_exported(case: TestCase) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The model with its parameters inside, and what is left to feed."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)  # before that a constant was an input as well
    arrays = case.data_sets[0][0]
    values = list(model.graph.input)
    alike = len({(np.shape(a), str(np.asarray(a).dtype)) for a in arrays}) == 1
    fed: dict[str, np.ndarray] = {}
    for position, (value, array) in enumerate(zip(values, arrays, strict=True)):
        if position == 0 or alike:
            fed[value.name] = np.asarray(array)
        else:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
            model.graph.input.remove(value)
    return model, fed


def arrays_of(case: TestCase) -> TestCase:
    """The case with arrays for the tensors that casts have."""
    sides = [[numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a for a in side] for side in case.data_sets[0]]  # fmt: skip
    return dataclasses.replace(case, data_sets=[(sides[0], sides[1])])


def make_row(case: TestCase, route: str, folder: Path) -> Row:
    """Convert one case and judge what came of it."""
    row: Row = {"case": case.name, "op": case.model.graph.node[0].op_type}
    if any(isinstance(a, onnx.TensorProto) for side in case.data_sets[0] for a in side):
        case = arrays_of(case)
    if any(not isinstance(a, (np.ndarray, np.generic)) for side in case.data_sets[0] for a in side):
        return row | {"verdict": "refused", "code": "no-tensor", "message": "a sequence or nothing"}
    model, fed = as_exported(case)
    path = folder / "case.onnx"
    onnx.save(model, path)
    try:
        inputs, outputs = onnx_specs(path)
        source = make_artifact("onnx", path, inputs=inputs, outputs=outputs)
        made = converted(source, fed, route, folder)
        arrays = [moved(fed[s.name], s.source_layout, s.layout) for s in made.inputs]
        results = run_tflite(made.path, arrays, made.inputs, made.outputs)
    except EdgepipeError as exc:
        return row | {"verdict": "refused", "code": exc.code, "message": exc.message}
    expected = dict(zip((v.name for v in model.graph.output), case.data_sets[0][1], strict=True))
    for spec, result in zip(made.outputs, results, strict=True):
        if np.ndim(expected[spec.name]) == 0 and result.shape == (1,):
            result = result.reshape(())  # one sample of a scalar; TFLite has it as [] or [1]
        result = moved(result, spec.layout, spec.source_layout)
        problem = difference(expected[spec.name], result)
        if problem:
            theirs = onnxruntime_says(path, fed)[spec.name]
            verdict = "WRONG" if difference(theirs, result) else "disputed"
            return row | {"verdict": verdict, "code": "", "message": f"{spec.name}: {problem}"}
    return row | {"verdict": "pass", "code": "", "message": ""}


def onnxruntime_says(path: Path, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_onnx(path)
    return dict(zip((v.name for v in session.get_outputs()), session.run(None, fed), strict=True))


def converted(source: Artifact, fed: dict[str, np.ndarray], route: str, folder: Path) -> Artifact:
    """Through the stage, with the case's own inputs as its data.

    A case's first axis is whatever it is; the stage takes it for a batch. So it is given exactly one
    batch of real rows and one of noise.
    """
    rows = {len(a) if a.ndim else 0 for a in fed.values()}
    batch = rows.pop() if len(rows) == 1 else 0
    data = folder / "data.npz"
    np.savez(data, **fed)  # type: ignore[arg-type]
    stage = ToTflite(
        route=route, input_layout="NCHW", parity_samples=batch, parity_seeds=max(batch, 1), timeout=120.0,
        data="calibration" if batch else "",
    )  # fmt: skip
    work = folder / "work"
    work.mkdir()
    context = StageContext(work, {"calibration": DataSource(kind="npz", path=data)}, 0, folder / "log.txt")  # fmt: skip
    context.log_path.touch()
    return stage.run(source, context)


def difference(expected: np.ndarray, actual: np.ndarray) -> str:
    """ "" where equal: numbers within TOLERANCE of the largest, NaN and infinities in the same places."""
    expected = np.asarray(expected)
    if expected.shape != actual.shape:
        return f"shape {actual.shape} for {expected.shape}"
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    scale = np.abs(a[finite]).max(initial=0.0)
    same = np.isclose(b, a, rtol=1e-3, atol=TOLERANCE * scale + 1e-7, equal_nan=True)
    if same.all():
        return ""
    first = tuple(int(i) for i in np.argwhere(~same)[0])
    return f"{int((~same).sum())} of {same.size} values differ, {b[first]:.6g} for {a[first]:.6g} at {first}"  # fmt: skip


def moved(array: np.ndarray, layout: str, wanted: str) -> np.ndarray:
    return array if layout == wanted else array.transpose([layout.index(axis) for axis in wanted])


def child(case: TestCase, route: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="edgepipe-node-") as name:
        began = time.monotonic()
        try:
            row = make_row(case, route, Path(name))
        except Exception as exc:  # noqa: BLE001  any other exception is what we look for
            row = {"case": case.name, "op": case.model.graph.node[0].op_type, "verdict": "bug", "code": type(exc).__name__, "message": str(exc)}  # fmt: skip
    write_json(target, row | {"seconds": round(time.monotonic() - began, 1)})


class WarmProcess:
    """What `toolchain` needs of a Popen, of a process that a warm converter forks."""

    def __init__(self, path: str, *, cwd: Path, env: dict[str, str], stdout: Any, **_: Any) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        request = {"cwd": str(cwd), "env": env, "log": str(Path(stdout.name).resolve())}
        self.connection.sendall((json.dumps(request) + "\n").encode())
        self.answer = self.connection.makefile()
        self.pid = int(self.answer.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.answer.readline())
            except TimeoutError:
                # a file that timed out is not read again
                self.answer = self.connection.makefile()
                raise subprocess.TimeoutExpired("warm converter", timeout or 0) from None
        return self.returncode


def refuse_crashing(path: Path) -> None:
    """`edgepipe.tflite_ops.run.refuse_crashing` in a fork, which has imported LiteRT."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(int(run.TRIAL_TIMEOUT_S))
        sys.argv = ["", str(path)]
        with contextlib.suppress(Exception):
            exec(run._TRIAL, {})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        raise ArtifactError(f"{path} crashes LiteRT ({signal.Signals(-code).name}) when it is loaded or run", code="crashes")  # fmt: skip


@contextlib.contextmanager
def warm_converter() -> Iterator[None]:
    """Meanwhile onnx2tf runs in forks of a process that has imported it (`warm_converter.py`)."""
    name, script = CONVERTERS["onnx2tf"]
    python = toolchain.ensure(name) / "bin" / "python"
    path, start = toolchain.LOCKS / script, subprocess.Popen
    with tempfile.TemporaryDirectory(prefix="edgepipe-warm-") as folder:
        door = f"{folder}/door"
        argv = [str(python), str(Path(__file__).with_name("warm_converter.py")), door, str(path)]
        env = toolchain._child_environment(python.parent.parent, Path(folder))
        server = start(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip

        def popen(argv: list[str], **options: Any) -> Any:
            return WarmProcess(door, **options) if argv[1:2] == [str(path)] else start(argv, **options)  # fmt: skip

        try:
            if b"ready\n" not in (server.stdout or ()):
                raise SystemExit("the warm converter does not start")
            toolchain.subprocess.Popen = popen  # type: ignore[misc,assignment]
            run.refuse_crashing = refuse_crashing
            yield
        finally:
            toolchain.subprocess.Popen = start  # type: ignore[misc]
            server.kill()
            server.wait()


def row_of(case: TestCase, route: str, work: Path) -> Row:
    """A row as it was kept, or made now."""
    kept = work / "rows" / route / f"{case.name}.json"
    if not kept.exists():
        code = run_forked(child, case, route, kept, log=work / "log.txt", timeout_s=300)
        if not kept.exists():
            op = case.model.graph.node[0].op_type
            what = "timeout" if code is None else "crash"
            write_json(kept, {"case": case.name, "op": op, "verdict": "bug", "code": what, "message": f"the child ended with {code}, see log.txt"})  # fmt: skip
    row: Row = json.loads(kept.read_text())
    return row


def by_operator(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Operator -> how many ``cases``, ``pass``, ``disputed``, ``bug`` and ``WRONG``; ``refused`` by reason code."""
    found = {}
    for op in sorted({row["op"] for row in rows}):
        mine = [row for row in rows if row["op"] == op]
        n = collections.Counter(row["verdict"] for row in mine)
        codes = collections.Counter(row["code"] for row in mine if row["verdict"] == "refused")
        found[op] = {
            "cases": len(mine), "pass": n["pass"], "refused": dict(codes.most_common()),
            "disputed": n["disputed"], "bug": n["bug"], "WRONG": n["WRONG"],
        }  # fmt: skip
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """Totals, then one line an operator, then what is wrong by name."""
    count = collections.Counter(row["verdict"] for row in rows)
    reasons = collections.Counter(row["code"] for row in rows if row["verdict"] == "refused")
    lines = [
        f"{len(rows)} cases: {count['pass']} pass ({100 * count['pass'] / max(len(rows), 1):.0f} %), "
        f"{count['refused']} refused ({', '.join(f'{code} {n}' for code, n in reasons.most_common())}), "
        f"{count['disputed']} disputed, {count['bug']} bugs, {count['WRONG']} WRONG",
        "", "| operator | cases | pass | refused | disputed | bug | WRONG |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for op, n in by_operator(rows).items():
        why = ", ".join(f"{code} {k}" for code, k in n["refused"].items()) or "0"
        lines.append(
            f"| {op} | {n['cases']} | {n['pass']} | {why} | {n['disputed']} | {n['bug']} | {n['WRONG']} |"
        )
    bad = [row for row in rows if row["verdict"] in ("WRONG", "bug", "disputed")]
    return [*lines, "", *(f"- {r['verdict']} {r['case']}: {r['code']} {' '.join(r['message'].split())[:200]}" for r in bad)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", type=Path, required=True, help="folder for rows")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth case (default: 1)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="operators, like Conv")
    parser.add_argument("--route", default="auto", choices=[r for r in ROUTES if r != "all"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [c for c in cases() if not args.only or c.model.graph.node[0].op_type in args.only]
    rows = []
    gc.freeze()  # lest a child that collects garbage copies all of this
    with warm_converter():
        for case in wanted[:: args.every]:
            row = row_of(case, args.route, args.work.resolve())
            rows.append(row)
            print(f"{row['verdict']:8} {row['op']:20} {row['case']} {row['code']}", flush=True)
    text = "\n".join(table(rows)) + "\n"
    print("\n" + text)
    write_json(args.work / "node_cases.json", rows)
    write_json(args.work / "by_operator.json", by_operator(rows))
    (args.work / "node_cases.md").write_text(text, encoding="utf-8")
    return 1 if any(row["verdict"] in ("WRONG", "bug") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
