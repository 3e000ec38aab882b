"""What full int8 loses and what the rescue ladder brings back, on hostile and on trained networks.

    EDGEPIPE_DATA=DIR python ci/bench/int8_rescue.py --work DIR [--only NAME ...] [--list] [--qat] [--memory] [--samples] [--sure]

Each network's float file is quantised on the same calibration data by `quantize_int8` as it is, by
`quantize_int8` with ``max_drop = "1 point"``, and by litert-quantizer alone with its own calibration
(a moving average of ranges); its ONNX file by onnx2tf's own int8 (2.6.9 and 1.29.24) and by
TensorFlow's TFLiteConverter, on the SavedModel that onnx2tf 1.29.24 makes. Trained networks are judged
on samples that neither calibration nor the ladder has seen, the hostile ones on those the ladder chose
by. A row is kept as JSON in ``--work`` and not made again. At the end the tables are printed, and
written to ``int8_rescue.md`` and ``int8_rescue.json``.

hostile   the three of tests/unit/hostile_nets.py
keyword   the published keyword spotter, no training
fashion   students of `edgepipe.students` on Fashion-MNIST; the ladder chooses by half of the test set,
          the other half judges
spoken    the network of ci/bench/compression.py's `qat/spoken-*` that plain int8 hurts; half of the clips
          that it was not trained on are for the ladder to choose by, the other half judges, at 3 shifts;
          _odd: trained on those clips instead, and judged on what the other was trained on
signs     photographs of hands showing digits: every fifth file of a class judges, the one after it is
          for the ladder to choose by, the others train

The seconds are of CPU, the least of two runs: plain int8 with both models judged on the ladder's own
data, which is what the first rung does, the ladder that ends at its first rung, and the whole ladder.

``--qat`` measures what `rescue.QAT_INFERENCES` claims: one batch of training in inferences.
``--memory`` measures the peak memory of processes that calibrate on 500, 5,000 and 50,000 samples.
``--samples`` sets ``samples = "auto"``, in two orders, beside all samples: plain int8 of each trained network,
ranges from the data that the ladder otherwise chooses by.
``--sure`` climbs with ``until = "sure"``, with an int8 and a float32 input.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression import Bench, spoken_recipe, tflite_accuracy
from litert_quantizer import quantizer, recipe
from litert_quantizer.utils import tfl_interpreter_utils
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests/unit/hostile_nets.py is not installed

from edgepipe import pipeline, toolchain  # noqa: E402
from edgepipe.array_ops.calibration import file_batches  # noqa: E402
from edgepipe.array_ops.load import Samples, load_samples  # noqa: E402
from edgepipe.array_ops.task_metrics import task_metric  # noqa: E402
from edgepipe.artifact import Artifact, TensorSpec, make_artifact  # noqa: E402
from edgepipe.data import DataSource, ImagePreprocess  # noqa: E402
from edgepipe.errors import EdgepipeError, StageError  # noqa: E402
from edgepipe.predict import predict  # noqa: E402
from edgepipe.recipe import Recipe, load_recipe  # noqa: E402
from edgepipe.stage import StageContext  # noqa: E402
from edgepipe.stages import stage_class  # noqa: E402
from edgepipe.stages.quantize_int8 import QuantizeInt8, source_specs  # noqa: E402
from edgepipe.store import Store, write_json  # noqa: E402
from edgepipe.tflite_ops.inspect import tensor_specs  # noqa: E402
from edgepipe.torch_ops.model import ModelDescription, build_model  # noqa: E402
from edgepipe.torch_ops.tflite_module import TfliteModule  # noqa: E402
from edgepipe.torch_ops.train import ArraySet, train  # noqa: E402
from edgepipe.training import Augmentation, TrainingOptions  # noqa: E402

RECIPES = ROOT / "ci" / "recipes"
MAX_DROP = 1.0
CALIBRATION = 256
IMAGES = 30_000  # of Fashion-MNIST to train on
STUDENTS = "edgepipe.torch_ops.students"


@dataclasses.dataclass(frozen=True)
class Network:
    """One to train: ``builder`` and ``args`` as in a recipe, ``size`` of its square images."""

    builder: str
    size: int
    epochs: int
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lr: float = 4e-3


def _student(name: str, width: float, channels: int, size: int, epochs: int, lr: float = 4e-3, **args: Any) -> Network:  # fmt: skip
    options = {**args, "width": width, "in_channels": channels, "size": [size, size]}
    return Network(f"{STUDENTS}.{name}:build", size, epochs, options, lr)


NETWORKS: dict[str, Network] = {
    "fashion/ds_cnn": _student("ds_cnn", 0.5, 1, 28, 2),
    "fashion/resnet8": _student("resnet", 0.25, 1, 28, 2, blocks=1),
    "fashion/mobilenet_v2": _student("mobilenet_v2", 0.2, 1, 28, 3),
    "fashion/mobilenet_v3_small": _student("mobilenet_v3_small", 0.2, 1, 28, 5),
    "fashion/tiny_vit": _student("tiny_vit", 0.25, 1, 28, 3),
    "signs/mobilenet_v3_small": _student("mobilenet_v3_small", 0.35, 3, 64, 25),
    "signs/efficientnet_b0": Network("zoo_models.mobile:efficientnet_b0", 64, 25),
    "signs/vit": Network("zoo_models.transformer:vit", 32, 40, lr=1e-3),
}
TRAINING = TrainingOptions(
    epochs=1, batch_size=64, lr=4e-3, warmup=1.0, label_smoothing=0.1,
    augment=Augmentation(flip=True, shift=3), device="cpu",
)  # fmt: skip
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
    onnx: Artifact | None = None


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
    return Case(
        model, sources, net.accuracy, options, folder, as_onnx(model, folder / "model.onnx")
    )


class Upright(torch.nn.Module):
    """A TFLite file of one picture as PyTorch has it, (1, C, H, W)."""

    def __init__(self, model: Artifact) -> None:
        super().__init__()
        content = model.path.read_bytes()
        self.body = TfliteModule(content, model.inputs, model.outputs, where=model.path.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body._run(x.permute(0, 2, 3, 1))[0]


def as_onnx(model: Artifact, path: Path) -> Artifact:
    """What other converters start from, of a network that was made as a TFLite file."""
    (image,), (result,) = model.inputs, model.outputs
    shape = tuple(image.shape[axis] for axis in (0, 3, 1, 2))
    torch.onnx.export(
        Upright(model).eval(), (torch.rand(shape),), str(path), dynamo=False, opset_version=17,
        input_names=[image.name], output_names=[result.name],
    )  # fmt: skip
    return make_artifact("onnx", path, inputs=[TensorSpec(image.name, shape)], outputs=[result])


def converted(made: Recipe, work: Path) -> Case:
    """A recipe with its data sets ``calibration``, ``validation`` and ``held_out``, in float."""
    stages = (stage_class("export_onnx")(), stage_class("to_tflite")())
    store = Store(work / "store")
    onnx, model = (
        pipeline.convert(dataclasses.replace(made, stages=stages[:n]), store) for n in (1, 2)
    )
    folder = work / made.name
    folder.mkdir(exist_ok=True)
    held_out = load_samples(made.data["held_out"], source_specs(model.inputs))
    (images,) = held_out.inputs.values()
    labels = held_out.labels
    assert labels is not None

    def judge(content: bytes) -> float:
        path = folder / "judged.tflite"
        path.write_bytes(content)
        return tflite_accuracy(path, images, labels)

    data = {n: made.data[n] for n in ("calibration", "validation", "held_out")}
    return Case(model, data, judge, {}, folder, onnx)


def kept(folder: Path, name: str, images: np.ndarray, labels: np.ndarray, *, key: str = "image") -> DataSource:  # fmt: skip
    path = folder / f"{name}.npz"
    np.savez(path, **{"labels": labels, key: images})  # type: ignore[arg-type]
    return DataSource(kind="npz", path=path, root=folder)


def keyword(name: str, work: Path) -> Case:
    made = load_recipe(RECIPES / "keyword_spotting.toml")
    folder = work / "keyword-data"
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(o.name, o.shape, o.dtype, o.layout) for o in made.model.inputs]
    test = load_samples(made.data["test"], specs)
    assert test.labels is not None
    halves = {
        n: kept(folder, n, test.inputs["mfcc"][k::2], test.labels[k::2], key="mfcc")
        for k, n in enumerate(("validation", "held_out"))
    }
    return converted(dataclasses.replace(made, data={**made.data, **halves}), work)


# Frames of 20 ms: each clip is judged three times, since of 300 three would decide on a point
SHIFTS = (-2, 0, 2)


def spoken(name: str, work: Path) -> Case:
    """That of ci/bench/compression.py, which plain int8 hurts; the clips it has not seen are shared."""
    train = int(name.endswith("_odd"))  # which clips
    folder = work / ("spoken-odd" if train else "spoken")
    folder.mkdir(exist_ok=True)
    made = spoken_recipe(Bench(folder), train)
    unseen = load_samples(made.data["test"], [TensorSpec("image", (1, 1, 49, 40), "float32", "NCHW")])  # fmt: skip
    assert unseen.labels is not None
    halves = {}
    for k, half in enumerate(("validation", "held_out")):
        clips, labels = unseen.inputs["image"][k::2], unseen.labels[k::2]
        halves[half] = kept(folder, half, shifted(clips), np.tile(labels, len(SHIFTS)))
    data = {"calibration": made.data["calibration"], **halves}
    return converted(dataclasses.replace(made, name=name.replace("/", "-"), data=data, evaluate=None), work)  # fmt: skip


def shifted(clips: np.ndarray) -> np.ndarray:
    """(N, 1, frames, bands) -> (3 N, 1, frames, bands): each early, as it is, late; silence comes in."""
    frames = clips.shape[2]
    padded = np.pad(clips, ((0, 0), (0, 0), (2, 2), (0, 0)))
    return np.concatenate([padded[:, :, 2 + s : 2 + s + frames] for s in SHIFTS])


@functools.cache
def fashion_data(folder: Path, size: int) -> dict[str, DataSource]:
    made = load_recipe(RECIPES / "fashion_mnist.toml")
    specs = [TensorSpec(o.name, o.shape, o.dtype, o.layout) for o in made.model.inputs]
    found = {n: load_samples(dataclasses.replace(made.data[n], limit=0), specs) for n in ("train", "test")}  # fmt: skip
    (train_x,), (test_x,) = found["train"].inputs.values(), found["test"].inputs.values()
    train_y, test_y = found["train"].labels, found["test"].labels
    assert train_y is not None
    assert test_y is not None
    return {
        "train": kept(folder, "train", train_x[:IMAGES], train_y[:IMAGES]),
        "calibration": kept(folder, "calibration", train_x[:CALIBRATION], train_y[:CALIBRATION]),
        "validation": kept(folder, "validation", test_x[::2], test_y[::2]),
        "held_out": kept(folder, "held_out", test_x[1::2], test_y[1::2]),
    }


@functools.cache
def signs_data(folder: Path, size: int) -> dict[str, DataSource]:
    path = Path(os.environ["EDGEPIPE_DATA"]) / "sign-language-digits" / "images.zip"
    source = DataSource(
        kind="images", path=path, image=ImagePreprocess(size=(size, size)),
        scale=1 / 255, mean=(0.5,), std=(0.25,),
    )  # fmt: skip
    found = load_samples(source, [TensorSpec("image", (1, 3, size, size), "float32", "NCHW")])
    images, labels = found.inputs["image"], found.labels
    assert labels is not None
    place = np.array([(labels[:row] == label).sum() for row, label in enumerate(labels)]) % 5
    rest = np.random.default_rng(0).permutation(np.flatnonzero(place > 1))
    parts = {
        "train": rest, "calibration": rest[:CALIBRATION],
        "validation": np.flatnonzero(place == 1), "held_out": np.flatnonzero(place == 0),
    }  # fmt: skip
    return {n: kept(folder, n, images[rows], labels[rows]) for n, rows in parts.items()}


def trained(name: str, work: Path) -> Case:
    """Train once, convert. Training is ours with channels last, which suits a CPU twice as well."""
    network, kind = NETWORKS[name], name.partition("/")[0]
    folder = work / f"{kind}-{network.size}"
    folder.mkdir(exist_ok=True)
    data = (fashion_data if kind == "fashion" else signs_data)(folder, network.size)
    made = load_recipe(RECIPES / "fashion_mnist.toml")
    shape = (1, 1 if kind == "fashion" else 3, network.size, network.size)
    specs = [TensorSpec("image", shape, "float32", "NCHW")]
    weights = work / f"{name.replace('/', '-')}.safetensors"
    if not weights.exists():
        model = build_model(ModelDescription(network.builder, dict(network.args)), seed=0)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        samples = load_samples(data["train"], specs)
        assert samples.labels is not None
        options = dataclasses.replace(TRAINING, epochs=network.epochs, lr=network.lr)
        train(model, ArraySet([samples.inputs["image"]], samples.labels), options, seed=0, stage=name)  # fmt: skip
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    source = dataclasses.replace(
        made.model, builder=network.builder, args=dict(network.args), weights=weights,
        inputs=(dataclasses.replace(made.model.inputs[0], shape=shape),),
    )  # fmt: skip
    made = dataclasses.replace(made, name=name.replace("/", "-"), model=source, data=data, evaluate=None)  # fmt: skip
    return converted(made, work)


CASES: dict[str, Callable[[str, Path], Case]] = {
    **dict.fromkeys(HOSTILE, hostile),
    "keyword": keyword,
    "spoken/mobilenet_v3_small": spoken,
    "spoken/mobilenet_v3_small_odd": spoken,
    **dict.fromkeys(NETWORKS, trained),
}


# --- other tools ------------------------------------------------------------------------------------


def litert_quantizer_alone(case: Case, samples: Samples) -> bytes:
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


# onnx2tf's -oiqt; with "saved_model" TensorFlow's converter on the SavedModel that it leaves, too.
# A file of that name keeps onnx2tf 1.x from fetching it (toolchains/onnx_to_tflite_tf.py).
ONNX2TF_INT8 = """
import pathlib, sys
import numpy, onnx2tf

name, kind, wanted = sys.argv[1:]
samples = numpy.load("samples.npy")
numpy.save("calibration_image_sample_data_20x128x128x3_float32.npy", numpy.zeros((20, 128, 128, 3), "float32"))
channels = samples.shape[-1]
onnx2tf.convert(
    input_onnx_file_path="model.onnx", output_folder_path="out", output_integer_quantized_tflite=True,
    quant_type=kind, verbosity="warn", output_signaturedefs=True,
    replace_to_pseudo_operators=["erf"],  # TFLite has none: with TensorFlow's no file would load
    custom_input_op_name_np_data_path=[
        [name, "samples.npy", numpy.zeros((1, 1, 1, channels)).tolist(), numpy.ones((1, 1, 1, channels)).tolist()]
    ],
)
if wanted == "saved_model":
    import tensorflow

    converter = tensorflow.lite.TFLiteConverter.from_saved_model("out")
    converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tensorflow.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tensorflow.int8
    pathlib.Path("tflite_converter.tflite").write_bytes(converter.convert())
"""


def onnx2tf_alone(case: Case, samples: Samples, work: Path) -> dict[str, Path | str]:
    """Column -> an int8 file from the same ONNX and samples, or why there is none."""
    found: dict[str, Path | str] = {}
    assert case.onnx is not None
    ((name, images),) = samples.inputs.items()
    # 2.6.9's per-channel files of depthwise layers name an axis that LiteRT refuses to open
    for tool, column, kind in (("onnx2tf", "onnx2tf_2", "per-tensor"), ("onnx2tf-tf", "onnx2tf_1", "per-channel")):  # fmt: skip
        folder = work / "trial" / tool
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copyfile(case.onnx.path, folder / "model.onnx")
        is_upright = images.shape[1:] == tuple(case.onnx.inputs[0].shape[1:])
        np.save(folder / "samples.npy", images.transpose(0, 2, 3, 1) if is_upright else images)
        python = toolchain.ensure(tool) / "bin/python"
        environ = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(folder), "TF_USE_LEGACY_KERAS": "1"}  # fmt: skip
        wanted = "saved_model" if tool == "onnx2tf-tf" else ""
        with (folder / "log.txt").open("wb") as stream:
            subprocess.run([python, "-c", ONNX2TF_INT8, name, kind, wanted], cwd=folder, env=environ, stdout=stream, stderr=stream, check=False)  # fmt: skip
        said = (folder / "log.txt").read_text(errors="replace").splitlines()
        why = next((line for line in said if re.match(r"[\w.]+Error: ", line)), "without a word")[:200]  # fmt: skip
        patterns = {column: "out/*_full_integer_quant.tflite"}
        if wanted:
            patterns["tflite_converter"] = "tflite_converter.tflite"
        for key, pattern in patterns.items():
            found[key] = next(iter(sorted(folder.glob(pattern))), why)
    return found


# --- a row ------------------------------------------------------------------------------------------


def staged(case: Case, work: Path, **options: Any) -> Artifact:
    folder = work / "trial"
    folder.mkdir(exist_ok=True)
    context = StageContext(folder, case.data, 0, work / "log", root=case.root)
    return QuantizeInt8(**options).run(case.model, context)


def judged(case: Case, made: Artifact) -> None:
    """What a user does after plain int8 to know what it lost: the first rung does that as well."""
    data = load_samples(case.data["validation"], source_specs(case.model.inputs))
    assert data.labels is not None
    for model in (case.model, made):
        task_metric(case.options.get("metric", "top1"), predict(model, data.inputs), data.labels, root=case.root)  # fmt: skip


def cpu_s(action: Callable[[], Any], *, runs: int = 2) -> float:
    taken = []
    for _ in range(runs):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return min(taken)


def make_row(name: str, work: Path) -> Row:
    case = CASES[name](name, work)
    samples = load_samples(dataclasses.replace(case.data["calibration"], limit=500), source_specs(case.model.inputs))  # fmt: skip
    row: Row = {"float": case.judge(case.model.path.read_bytes()), "bytes_float": case.model.size_bytes}  # fmt: skip
    try:
        row["quantizer"] = case.judge(litert_quantizer_alone(case, samples))
    except Exception as exc:  # noqa: BLE001 - it raises whatever its parts raise
        row["quantizer"], row["quantizer_error"] = None, f"{type(exc).__name__}: {exc}"[:300]
    if case.onnx is not None:
        for key, file in onnx2tf_alone(case, samples, work).items():
            try:
                row[key] = case.judge(file.read_bytes()) if isinstance(file, Path) else None
                why = str(file)
            except EdgepipeError as exc:
                row[key], why = None, exc.message
            if row[key] is None:
                row[f"{key}_error"] = why[:200]
    given = {k: v for k, v in case.options.items() if k != "metric"}
    plain = staged(case, work, min_sqnr=-200.0, **given)
    row["plain"] = case.judge(plain.path.read_bytes())
    row["plain_s"] = cpu_s(lambda: judged(case, staged(case, work, min_sqnr=-200.0, **given)))
    # a ladder that holds at once: its first rung and nothing else
    row["first_rung_s"] = cpu_s(lambda: staged(case, work, max_drop=100.0, evaluate="validation", **case.options))  # fmt: skip
    began = time.process_time()
    try:
        saved = staged(case, work, max_drop=MAX_DROP, evaluate="validation", **case.options)
    except StageError as exc:
        row |= {"ladder": None, "rung": "none: refused", "why": exc.message}
        return row
    facts = saved.facts["rescue"]
    return row | {
        "ladder_s": time.process_time() - began,
        "ladder": case.judge(saved.path.read_bytes()),
        "rung": facts["held"],
        "bytes": saved.size_bytes,
        "rungs": facts["rungs"],
        "causes": facts["causes"],
        "precision": facts["precision"],
    }


def qat_inferences(work: Path) -> None:
    """Print how many inferences of the float file one sample of a QAT step takes, on one thread."""
    from edgepipe.tflite_ops.ladder import host_latencies
    from edgepipe.tflite_ops.quantize import collect_ranges
    from edgepipe.torch_ops.qat import QatModel, range_owners

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


CALIBRATE = """
import pickle, re, sys, tempfile
from pathlib import Path
from edgepipe.stage import StageContext
from edgepipe.stages.quantize_int8 import QuantizeInt8

model, source, method = pickle.loads(Path(sys.argv[1]).read_bytes())
with tempfile.TemporaryDirectory() as folder:
    context = StageContext(Path(folder), {"calibration": source}, 0, Path(folder, "log"))
    QuantizeInt8(method=method, samples=0, min_sqnr=-200.0).run(model, context)
# not ru_maxrss, which begins with that of the process that started this one
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def memory(work: Path) -> None:
    """Print the peak resident memory of processes that quantise with more and more samples."""
    case = keyword("keyword", work)
    found = load_samples(case.data["validation"], source_specs(case.model.inputs))
    (clips,) = found.inputs.values()
    for method in ("min_max", "kl"):
        for count in (500, 5_000, 50_000):
            images = np.resize(clips, (count, *clips.shape[1:]))  # the same ones again and again
            source = kept(work, "memory", images, np.zeros(count, int), key="mfcc")
            job = work / "memory.pickle"
            job.write_bytes(pickle.dumps((case.model, source, method)))
            done = subprocess.run([sys.executable, "-c", CALIBRATE, str(job)], capture_output=True, text=True, check=True)  # fmt: skip
            print(
                f"{method}: {1024 * int(done.stdout) / 1e6:.1f} MB with {count:,} samples"
                f" of {images.nbytes / 1e6:.1f} MB in all",
                flush=True,
            )


def auto_samples(work: Path, names: Sequence[str]) -> None:
    """Print for each network what int8 keeps with ``samples = "auto"``, in two orders, and with all samples."""
    gained = []
    print("| network | samples | of | auto | all | auto against all |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        case = CASES[name](name, work)

        def judged(seed: int, samples: int | str, case: Case = case) -> tuple[int, float]:
            source = dataclasses.replace(case.data["validation"], seed=seed)
            ordered = dataclasses.replace(case, data={"calibration": source})
            made = staged(ordered, work, samples=samples, min_sqnr=-200.0)
            return made.facts["calibration"]["samples"], case.judge(made.path.read_bytes())

        of, best = judged(0, 0)
        for seed in (0, 1):
            took, kept = judged(seed, "auto")
            gained.append(100 * (kept - best))
            print(f"| {name} | {took:,} | {of:,} | {_percent(kept)} | {_percent(best)} | {gained[-1]:+.2f} points |", flush=True)  # fmt: skip
    print(f"\nauto against all: {statistics.median(gained):+.2f} points in the median, {min(gained):+.2f} to {max(gained):+.2f}")  # fmt: skip


def until_sure(work: Path, names: Sequence[str]) -> None:
    """Print for each network what the ladder keeps that goes on to 16 bits for certainty."""
    print("| network | float | input | with the ladder | last rung | latency, of plain int8's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        case = CASES[name](name, work)
        expected = case.judge(case.model.path.read_bytes())
        for door in ("int8", "float32"):
            made = staged(case, work, max_drop=MAX_DROP, evaluate="validation", until="sure", **(dict(case.options) | {"input_dtype": door}))  # fmt: skip
            facts = made.facts["rescue"]
            last = next(rung for rung in facts["rungs"] if rung["rung"] == facts["held"])
            times = last["latency_s"] / facts["rungs"][0]["latency_s"] if len(facts["rungs"]) > 1 else 1.0  # fmt: skip
            print(f"| {name} | {_percent(expected)} | {door} | {_percent(case.judge(made.path.read_bytes()))} | {last['did']} | {times:.1f} |", flush=True)  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------


TOOLS = {
    "quantizer": "litert-quantizer", "tflite_converter": "TFLiteConverter", "onnx2tf_1": "onnx2tf 1.29.24",
    "onnx2tf_2": "onnx2tf 2.6.9, per tensor", "plain": "quantize_int8", "ladder": "with the ladder",
}  # fmt: skip


def table(rows: Mapping[str, Row]) -> str:
    lines = [
        f"| network | float | {' | '.join(TOOLS.values())} | rung | plain, first rung, ladder |",
        "| --- | --- |" + " --- |" * (len(TOOLS) + 2),
    ]
    for name, row in rows.items():
        cells = [_percent(row.get(key)) for key in ("float", *TOOLS)]
        seconds = ", ".join(f"{row[k]:.1f}" for k in ("plain_s", "first_rung_s", "ladder_s") if k in row)  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {row.get('rung', '')} | {seconds} s |")
    trained = [row for name, row in rows.items() if name not in HOSTILE]
    lines += ["", "| trained networks | median loss | worst | networks |", "| --- | --- | --- | --- |"]  # fmt: skip
    for key, label in TOOLS.items():
        losses = [100 * (r["float"] - r[key]) for r in trained if r.get(key) is not None]
        if losses:
            lines.append(f"| {label} | {statistics.median(losses):.2f} points | {max(losses):.2f} points | {len(losses)} of {len(trained)} |")  # fmt: skip
    ratios = [r["first_rung_s"] / r["plain_s"] for r in rows.values() if "first_rung_s" in r]
    if ratios:
        lines += ["", f"First rung over plain int8 and judging: {statistics.median(ratios):.2f} in the median, {max(ratios):.2f} at most."]  # fmt: skip
    for name, row in rows.items():
        lines += [f"- {name}, {TOOLS[key]}: {row[f'{key}_error']}" for key in TOOLS if f"{key}_error" in row]  # fmt: skip
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="these rows")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--qat", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--sure", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return 0
    if args.work is None or set(args.only) - set(CASES):
        parser.error(f"--work DIR is needed, and --only takes {', '.join(CASES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.qat or args.memory:
        (qat_inferences if args.qat else memory)(args.work)
        return 0
    if args.samples:
        auto_samples(args.work, [name for name in args.only if name not in HOSTILE])
        return 0
    if args.sure:
        until_sure(args.work, args.only)
        return 0
    for name in args.only:
        stored = args.work / f"{name.replace('/', '-')}.json"
        if stored.exists():
            continue
        print(f"== {name}", file=sys.stderr)
        try:
            write_json(stored, make_row(name, args.work))
        except EdgepipeError as exc:
            print(f"{name}: {exc.message}", file=sys.stderr)
    rows = {
        name: json.loads(stored.read_text())
        for name in CASES
        if (stored := args.work / f"{name.replace('/', '-')}.json").exists()
    }
    text = table(rows)
    (args.work / "int8_rescue.md").write_text(text, encoding="utf-8")
    write_json(args.work / "int8_rescue.json", rows)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
