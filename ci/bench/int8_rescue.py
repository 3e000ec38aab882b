"""What full int8 loses and what the rescue ladder brings back, on hostile and on trained networks.

    EDGEPIPE_DATA=DIR python ci/bench/int8_rescue.py --work DIR [--only NAME ...] [--list] [--qat]

Each network's float file is quantised three times on the same calibration data: by litert-quantizer
alone with its own calibration (a moving average of ranges), by `quantize_int8` as it is, and by
`quantize_int8` with ``max_drop = "1 point"``. Trained ones are judged on samples that neither
calibration nor the ladder has seen (half of the test set; the ladder chooses by the other half), the
hostile ones on those the ladder chose by. A row is kept as JSON in ``--work`` and not made again. At the end the tables are
printed, and written to ``int8_rescue.md`` and ``int8_rescue.json``.

hostile   the three of tests/unit/hostile_nets.py
keyword   the published keyword spotter, no training
fashion   students of `edgepipe.students`, trained for one epoch on 10,000 images of Fashion-MNIST

``--qat`` measures what `rescue.QAT_INFERENCES` claims: one batch of training in inferences.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from litert_quantizer import quantizer, recipe
from litert_quantizer.utils import tfl_interpreter_utils

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests/unit/hostile_nets.py is not installed

from edgepipe import pipeline  # noqa: E402
from edgepipe.array_ops.calibration import file_batches  # noqa: E402
from edgepipe.array_ops.load import Samples, load_samples  # noqa: E402
from edgepipe.artifact import Artifact, make_artifact  # noqa: E402
from edgepipe.data import DataSource  # noqa: E402
from edgepipe.errors import EdgepipeError, StageError  # noqa: E402
from edgepipe.recipe import Recipe, load_recipe  # noqa: E402
from edgepipe.stage import StageContext  # noqa: E402
from edgepipe.stages import stage_class  # noqa: E402
from edgepipe.stages.quantize_int8 import QuantizeInt8, source_specs  # noqa: E402
from edgepipe.store import Store, write_json  # noqa: E402
from edgepipe.tflite_ops.inspect import tensor_specs  # noqa: E402
from edgepipe.tflite_ops.sensitivity import outputs_of  # noqa: E402

RECIPES = ROOT / "ci" / "recipes"
MAX_DROP = 1.0
EPOCHS, IMAGES = 1, 10_000
TRAINING = {"batch_size": 64, "lr": 4e-3, "warmup": 0.3}
STUDENTS = {
    "ds_cnn": 0.5, "resnet8": 0.25, "mobilenet_v1": 0.25, "mobilenet_v2": 0.2, "mobilenet_v3_small": 0.2,
    "tiny_vit": 0.25,
}  # fmt: skip
HOSTILE = ("dead_batch_norm", "wide_swish", "detector_head")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A float file with data in its source layout; ``judge`` gives a file's accuracy on held-out data."""

    model: Artifact
    data: Mapping[str, DataSource]
    judge: Callable[[bytes], float]
    options: Mapping[str, Any]
    root: Path


# --- the networks -----------------------------------------------------------------------------------


def hostile(name: str, work: Path) -> Case:
    from tests.unit.hostile_nets import NETS

    net = NETS[name]()
    folder = work / name
    folder.mkdir(exist_ok=True)
    path = folder / "float.tflite"
    path.write_bytes(net.content)
    np.savez(folder / "calibration.npz", image=net.calibration)
    np.savez(folder / "validation.npz", image=net.samples, labels=net.labels)
    (folder / "metric.py").write_text(
        "def scores(outputs, labels):\n"
        "    found = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs\n"
        "    return float((found.reshape(len(found), -1)[:, -10:].argmax(axis=1) == labels).mean())\n"
    )
    inputs, outputs = tensor_specs(path)
    sources = {
        n: DataSource(kind="npz", path=folder / f"{n}.npz", root=folder)
        for n in ("calibration", "validation")
    }
    options = {"metric": "metric.py:scores", "output_dtype": "float32"}
    model = make_artifact("tflite", path, inputs=inputs, outputs=outputs)
    return Case(model, sources, net.accuracy, options, folder)


def converted(made: Recipe, work: Path, test: DataSource) -> Case:
    """A recipe without its quantize_int8; the test set in two halves."""
    kept = tuple(s for s in made.stages if s.name != "quantize_int8")
    model = pipeline.convert(dataclasses.replace(made, stages=kept), Store(work / "store"))
    specs = source_specs(model.inputs)
    everything = load_samples(test, specs)
    folder = work / made.name
    folder.mkdir(exist_ok=True)
    assert everything.labels is not None
    for name, rows in (("validation", slice(0, None, 2)), ("held_out", slice(1, None, 2))):
        arrays = {k: a[rows] for k, a in everything.inputs.items()}
        np.savez(folder / f"{name}.npz", labels=everything.labels[rows], **arrays)
    sources = {
        n: DataSource(kind="npz", path=folder / f"{n}.npz", root=folder)
        for n in ("validation", "held_out")
    }
    held_out = load_samples(sources["held_out"], specs)
    batches = list(file_batches(held_out, model.inputs))

    def judge(content: bytes) -> float:
        (found,) = outputs_of(content, batches, where=made.name)
        assert held_out.labels is not None
        return float((found.reshape(len(found), -1).argmax(axis=1) == held_out.labels).mean())

    return Case(model, {**sources, "calibration": made.data["calibration"]}, judge, {}, folder)


def keyword(name: str, work: Path) -> Case:
    made = load_recipe(RECIPES / "keyword_spotting.toml")
    return converted(made, work, made.data["test"])


def fashion(name: str, work: Path) -> Case:
    made = load_recipe(RECIPES / "fashion_mnist.toml")
    student = name.partition("/")[2]
    from edgepipe.students import STUDENTS as ZOO
    from edgepipe.students import student_args

    builder = f"edgepipe.torch_ops.students.{Path(ZOO[student].file).stem}:build"
    args = student_args(student, (1, 1, 28, 28), 10, {"width": STUDENTS[student]})
    steps = [("finetune", {**TRAINING, "epochs": EPOCHS}), ("export_onnx", {}), ("to_tflite", {})]
    made = dataclasses.replace(
        made, name=f"fashion-{student}", model=dataclasses.replace(made.model, builder=builder, args=args),
        stages=tuple(stage_class(n)(**options) for n, options in steps),
        data={**made.data, "train": dataclasses.replace(made.data["train"], limit=IMAGES)},
    )  # fmt: skip
    return converted(made, work, dataclasses.replace(made.data["test"], limit=0))


CASES: dict[str, Callable[[str, Path], Case]] = {
    **dict.fromkeys(HOSTILE, hostile),
    "keyword": keyword,
    **{f"fashion/{name}": fashion for name in STUDENTS},
}


# --- a row ------------------------------------------------------------------------------------------


def plain_quantizer(case: Case, samples: Samples) -> bytes:
    """litert-quantizer as its own documentation uses it."""
    content = case.model.path.read_bytes()
    rules = recipe.static_wi8_ai8()
    interpreter = tfl_interpreter_utils.create_tfl_interpreter(content)
    ((key, signature),) = interpreter.get_signature_list().items()
    names = signature["inputs"]
    data = {key: [dict(zip(names, batch, strict=True)) for batch in file_batches(samples, case.model.inputs)]}  # fmt: skip
    tool = quantizer.Quantizer(content)
    tool.load_quantization_recipe(rules)
    made = tool.quantize(tool.calibrate(data)).quantized_model
    assert made is not None
    return bytes(made)


def staged(case: Case, work: Path, **options: Any) -> tuple[Artifact, float]:
    folder = work / "trial"
    folder.mkdir(exist_ok=True)
    context = StageContext(folder, case.data, 0, work / "log", root=case.root)
    began = time.perf_counter()
    made = QuantizeInt8(**options).run(case.model, context)
    return made, time.perf_counter() - began


def make_row(name: str, work: Path) -> Row:
    case = CASES[name](name, work)
    samples = load_samples(dataclasses.replace(case.data["calibration"], limit=500), source_specs(case.model.inputs))  # fmt: skip
    row: Row = {"float": case.judge(case.model.path.read_bytes()), "bytes_float": case.model.size_bytes}  # fmt: skip
    try:
        row["quantizer"] = case.judge(plain_quantizer(case, samples))
    except Exception as exc:  # noqa: BLE001 - it raises whatever its parts raise
        row["quantizer"], row["quantizer_error"] = None, f"{type(exc).__name__}: {exc}"[:300]
    given = {k: v for k, v in case.options.items() if k != "metric"}
    plain, row["plain_s"] = staged(case, work, min_sqnr=-200.0, **given)
    row["plain"] = case.judge(plain.path.read_bytes())
    # a ladder that holds at once: its first rung and nothing else
    _, row["first_rung_s"] = staged(case, work, max_drop=100.0, evaluate="validation", **case.options)  # fmt: skip
    try:
        saved, row["ladder_s"] = staged(case, work, max_drop=MAX_DROP, evaluate="validation", **case.options)  # fmt: skip
    except StageError as exc:
        row |= {"ladder": None, "rung": "none: refused", "why": exc.message}
        return row
    facts = saved.facts["rescue"]
    return row | {
        "ladder": case.judge(saved.path.read_bytes()),
        "rung": facts["held"],
        "bytes": saved.size_bytes,
        "rungs": facts["rungs"],
        "causes": facts["causes"],
        "precision": facts["precision"],
    }


def qat_inferences(work: Path) -> None:
    """Print how many inferences of the float file one sample of a QAT step takes, on one thread."""
    import torch

    from edgepipe.tflite_ops.ladder import host_latencies
    from edgepipe.tflite_ops.quantize import collect_ranges
    from edgepipe.torch_ops.qat import QatModel, range_owners
    from edgepipe.torch_ops.tflite_module import TfliteModule

    torch.set_num_threads(1)
    case = keyword("keyword", work)
    content = case.model.path.read_bytes()
    samples = load_samples(dataclasses.replace(case.data["calibration"], limit=64), source_specs(case.model.inputs))  # fmt: skip
    table = collect_ranges(content, file_batches(samples, case.model.inputs), where="m").table()
    body = TfliteModule(content, case.model.inputs, case.model.outputs, where="m")
    model = QatModel(body, range_owners(content, where="m"), table, learned=True)
    x = [torch.from_numpy(a[:64]) for a in samples.inputs.values()]
    taken = []
    for _ in range(8):
        began = time.process_time()
        model(*x).square().mean().backward()
        taken.append((time.process_time() - began) / 64)
    (latency,) = host_latencies([content])
    print(f"one sample of a QAT step: {statistics.median(taken) / latency:.0f} inferences of {latency * 1e6:.0f} us")  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------


def table(rows: Mapping[str, Row]) -> str:
    lines = [
        "| network | float | litert-quantizer | plain | ladder | rung | plain / first rung / ladder |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [_percent(row.get(key)) for key in ("float", "quantizer", "plain", "ladder")]
        seconds = " / ".join(f"{row[k]:.1f}" for k in ("plain_s", "first_rung_s", "ladder_s") if k in row)  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {row.get('rung', '')} | {seconds} s |")
    trained = [row for name, row in rows.items() if name not in HOSTILE]
    lines.append("")
    for key, label in (("quantizer", "litert-quantizer alone"), ("plain", "quantize_int8"), ("ladder", "with the ladder")):  # fmt: skip
        losses = [100 * (r["float"] - r[key]) for r in trained if r.get(key) is not None]
        if losses:
            lines.append(f"Trained networks, {label}: loss {statistics.median(losses):.2f} points in the median, {max(losses):.2f} at worst, of {len(losses)} (of {len(trained)} networks).  ")  # fmt: skip
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="these rows")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--qat", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return 0
    if args.work is None or set(args.only) - set(CASES):
        parser.error(f"--work DIR is needed, and --only takes {', '.join(CASES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.qat:
        qat_inferences(args.work)
        return 0
    for name in args.only:
        kept = args.work / f"{name.replace('/', '-')}.json"
        if kept.exists():
            continue
        print(f"== {name}", file=sys.stderr)
        try:
            write_json(kept, make_row(name, args.work))
        except EdgepipeError as exc:
            print(f"{name}: {exc.message}", file=sys.stderr)
    rows = {
        name: json.loads(kept.read_text())
        for name in CASES
        if (kept := args.work / f"{name.replace('/', '-')}.json").exists()
    }
    text = table(rows)
    (args.work / "int8_rescue.md").write_text(text, encoding="utf-8")
    write_json(args.work / "int8_rescue.json", rows)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
