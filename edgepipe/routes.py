"""The ways from a model to TFLite, what each attempt gave, and which result is the best: no I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edgepipe.table import Table
from edgepipe.units import format_bytes, format_seconds

# route -> toolchain and the script that converts
ROUTES = {
    "onnx2tf": ("onnx2tf", "onnx_to_tflite_direct.py"),
    "litert-torch": ("litert-torch", "pt2_to_tflite.py"),
    "tf": ("onnx2tf-tf", "onnx_to_tflite_tf.py"),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way: a route from the graph of one exporter, simplified by onnxsim before it or not.

    ``exporter``: ``given`` is the ONNX file as it is; ``torchscript`` is PyTorch's older ONNX
    exporter; ``torch.export`` needs no ONNX at all.
    """

    route: str
    exporter: str
    simplified: bool

    def __str__(self) -> str:
        if self.route == "litert-torch":
            return self.route
        return f"{self.route} from {self.exporter}{'' if self.simplified else ', not simplified'}"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of one candidate.

    ``code`` is "" where it is a proven model, else why it is none: ``unsupported-op``,
    ``invalid-graph``, ``parity``, ``keeps-state``, ``no-state``, ``timeout``, ``crash``,
    ``no-output``, ``converter-error``, ``op-not-converted`` (by the exporter), ``no-toolchain``,
    ``no-exported-program``. ``node`` and ``op`` are the operator at fault in the graph that was
    converted, ``source_line`` the line of PyTorch it came from. ``parity`` is the worst
    max|error| / max|reference| over all outputs; ``loose_ops`` counts the operators that int8
    quantisation would leave in float; ``latency_s`` is one inference on this host, beside the
    other candidates, None where nothing was compared.
    """

    route: str
    exporter: str
    simplified: bool
    ok: bool
    code: str = ""
    message: str = ""
    op: str = ""
    node: str = ""
    source_line: str = ""
    transposes: int | None = None
    transpose_bytes: int | None = None
    loose_ops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    operators: int | None = None
    bytes: int | None = None
    parity: float | None = None
    latency_s: float | None = None
    clean: bool = False
    seconds: float = 0.0

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.route, self.exporter, self.simplified)


def candidates(route: str, *, exporter: str, has_program: bool) -> tuple[Candidate, ...]:
    """What is tried for an option ``route``, in order of preference.

    ``exporter`` is where the ONNX file at hand is from; ``has_program``: the program it was exported
    from is at hand, too, and so is a second exporter.
    """
    exporters = (exporter, "torchscript") if has_program else (exporter,)
    direct = [Candidate("onnx2tf", e, s) for s in (True, False) for e in exporters]
    litert = Candidate("litert-torch", "torch.export", False)
    tensorflow = [Candidate("tf", e, True) for e in exporters]
    ways = {
        "onnx2tf": direct,
        "litert-torch": [litert],
        "tf": tensorflow,
        "auto": [direct[0], litert, *direct[1:], *tensorflow],
        "all": [direct[0], litert, *direct[1:], *tensorflow],
    }
    return tuple(ways[route])


def needs_float(attempt: Attempt, source_operators: Sequence[str]) -> bool:
    """Whether int8 would leave an operator in float by the converter's fault.

    One that is among ``source_operators``, the model's ONNX operators, is none (Exp); a RELU6 is (Clip).
    """
    own = {name.lower() for name in source_operators}
    return any(name.replace("_", "").lower() not in own for name in attempt.loose_ops)


def is_clean(attempt: Attempt, *, transposes: int, source_operators: Sequence[str]) -> bool:
    """Whether nothing better is to be expected of another candidate.

    ``transposes`` is how many the source model itself asks for.
    """
    few = (attempt.transposes or 0) <= transposes
    return attempt.ok and few and not needs_float(attempt, source_operators)


def is_worthwhile(candidate: Candidate, attempts: Sequence[Attempt], source_operators: Sequence[str]) -> bool:  # fmt: skip
    """Whether ``auto``, which found nothing clean yet, goes on to this candidate.

    A converter that was not tried yet: always, but TensorFlow's only while nothing is proven, since
    it is slow, large and mostly worse. Another form of a graph that was tried (the second exporter,
    not simplified): only while int8 would leave float operators in all that is proven. Such forms
    mend refusals and float operators, not transposes.
    """
    proven = [attempt for attempt in attempts if attempt.ok]
    if candidate.route == "tf":
        return not proven
    if all(attempt.route != candidate.route for attempt in attempts):
        return True
    return all(needs_float(attempt, source_operators) for attempt in proven)


# Below it two latencies measured on a busy host are one.
FASTER = 0.9


def rank(attempt: Attempt) -> tuple[float, ...]:
    """Sort key of proven results, the best first: clean, what int8 can take, what costs time, size."""
    return (
        not attempt.clean,
        sum(attempt.loose_ops.values()),
        attempt.transposes or 0,
        attempt.transpose_bytes or 0,
        attempt.operators or 0,
        attempt.bytes or 0,
    )


def best(attempts: Sequence[Attempt]) -> Attempt:
    """The best of proven attempts: by `rank`, then the first, unless another is faster by a tenth."""
    equal = [a for a in attempts if rank(a) == min(map(rank, attempts))]
    fastest = min(equal, key=lambda a: a.latency_s or 0.0)
    is_faster = (fastest.latency_s or 0.0) < FASTER * (equal[0].latency_s or 0.0)
    return fastest if is_faster else equal[0]


def reason(chosen: Attempt, attempts: Sequence[Attempt], asked: str) -> str:
    """Why this one, for the log and the record."""
    proven = [a for a in attempts if a.ok]
    failed = [f"{a.candidate}: {a.code}" for a in attempts if not a.ok]
    others = f"; failed: {', '.join(failed)}" if failed else ""
    if asked not in ("auto", "all"):
        return f"asked for{others}"
    if len(proven) == 1:
        return ("clean" if chosen.clean else "the only one that is proven") + others
    second = min((a for a in proven if a is not chosen), key=rank)
    if chosen.clean and not second.clean:
        return f"the only clean one of {len(proven)} that are proven{others}"
    names = ("operators without an int8 form", "transposes", "transpose bytes", "operators", "bytes")  # fmt: skip
    for name, ours, theirs in zip(names, rank(chosen)[1:], rank(second)[1:], strict=True):
        if ours != theirs:
            return f"best of {len(proven)} by {name} ({ours:g}, next {theirs:g}){others}"
    return f"first or fastest of {len(proven)} that are equal{others}"


def attempts_table(facts: Mapping[str, Any]) -> Table:
    """What was tried, for a person. ``facts`` are those of a converted artifact, as stored."""
    rows = []
    for item in facts.get("attempts", ()):
        way = Candidate(item["route"], item["exporter"], item["simplified"])
        mine = (item["route"], item["exporter"], item["simplified"])
        chosen = mine == (facts["route"], facts["exporter"], facts["simplified"])
        result = "chosen" if chosen else "proven" if item["ok"] else item["code"]
        if not item["ok"]:
            place = f" ({item['source_line']})" if item["source_line"] else ""
            rows.append((str(way), result, *[""] * 6, f"{item['seconds']:.1f} s", f"{item['op']}{place}"))  # fmt: skip
            continue
        loose = ", ".join(f"{n} {name}" for name, n in item["loose_ops"].items())
        latency = "" if item["latency_s"] is None else format_seconds(item["latency_s"])
        rows.append((
            str(way), result, f"{item['parity']:.1e}", str(item["transposes"]), loose or "0", str(item["operators"]),
            format_bytes(item["bytes"]), latency, f"{item['seconds']:.1f} s", "",
        ))  # fmt: skip
    header = ("route", "result", "parity", "transposes", "float or spelt out", "operators", "size", "host latency", "took", "at fault")  # fmt: skip
    return Table("Conversion", header, tuple(rows))
