"""What compression costs and gains: each stage alone, beside other tools, and in whole recipes.

    EDGEPIPE_DATA=DIR python ci/bench/compression.py --work DIR [--only NAME ...] [--list]

A row is a model made and judged: accuracy of the int8 TFLite file on samples kept aside, its bytes,
MACs and latency. Rows are kept as JSON in ``--work``; a row that is there is not made again, training
goes on from its checkpoint, and ``--only`` makes the named rows (or groups) alone. At the end the
latencies of all files are taken side by side and the tables are printed, and written to
``compression.md`` and ``compression.json``. Training uses the threads that OMP_NUM_THREADS allows.

alone     one stage on one trained network (FashionNet of ci/recipes, 20,000 images of Fashion-MNIST),
          1 epoch of training each where a stage trains, against nothing done and against other tools
teacher   the recipe fashion_mnist_student.toml against its teacher
distill   that recipe's student in float, and a narrow one, alone and taught at two temperatures
keyword   the published keyword spotter, pruned or of low rank; judged on half of the clips
qat       two MobileNetV3 with hard-swish and squeeze-and-excite: what PTQ loses, what QAT gets back. One
          reads Fashion-MNIST, one the magnitudes of 40 mel bands as they are, without a logarithm:
          few of their values are large, and a range that holds those has no steps left for the others
memory    peak resident memory of a process that trains one epoch, against a plain loop
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import logging
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from edgepipe import pipeline, toolchain
from edgepipe.array_ops.audio import mel_filters
from edgepipe.array_ops.load import load_samples
from edgepipe.artifact import Artifact, TensorSpec
from edgepipe.data import AudioPreprocess, DataSource
from edgepipe.errors import EdgepipeError
from edgepipe.pruning import PruningTarget
from edgepipe.recipe import Recipe, load_recipe
from edgepipe.stages import stage_class
from edgepipe.store import Store, write_json
from edgepipe.tflite_ops.inspect import describe
from edgepipe.tflite_ops.run import dequantize, invoke_once, open_tflite, quantize
from edgepipe.torch_ops.model import ModelDescription, build_model, load_state, read_weights
from edgepipe.torch_ops.train import ArraySet, accuracy, cross_entropy, train
from edgepipe.training import Augmentation, TrainingOptions

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ROUNDS = 5  # of processes that measure latency; the median over them counts
Step = tuple[str, dict[str, Any]]

TFLITE: tuple[Step, ...] = (("export_onnx", {}), ("to_tflite", {}))
INT8: tuple[Step, ...] = (*TFLITE, ("quantize_int8", {}))
# what every stage of the group "alone" may train, so that all rows have had the same
TUNE: dict[str, Any] = {"epochs": 1, "batch_size": 128, "lr": 1e-3, "warmup": 0.2}
TEACHER = TrainingOptions(
    epochs=6, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, warmup=1.0,
    label_smoothing=0.1, augment=Augmentation(flip=True, shift=2), checkpoint_every=60.0, device="cpu",
)  # fmt: skip

LATENCY = """
import statistics, sys, time
from ai_edge_litert.interpreter import Interpreter

model = Interpreter(sys.argv[1], num_threads=1)
model.allocate_tensors()
for _ in range(50):
    model.invoke()
taken, end = [], time.perf_counter() + 0.4
while time.perf_counter() < end or len(taken) < 30:
    began = time.perf_counter()
    model.invoke()
    taken.append(time.perf_counter() - began)
print(statistics.median(taken))
"""

# An epoch as anyone would write it, on the samples that the stages train on
PLAIN_LOOP = """
import sys
from pathlib import Path
import torch
from edgepipe.torch_ops.model import load_model

path, samples = Path(sys.argv[1]), Path(sys.argv[2])
data = torch.load(samples)
model = load_model(path).train()
method = torch.optim.AdamW(model.parameters(), lr=1e-3)
order = torch.randperm(len(data["labels"]))
for rows in order.split(int(sys.argv[3])):
    loss = torch.nn.functional.cross_entropy(model(data["images"][rows]), data["labels"][rows])
    method.zero_grad()
    loss.backward()
    method.step()
"""

# A stage in a process of its own, with what came before it in the store
ONE_STAGE = """
import pickle, sys
from pathlib import Path
from edgepipe import pipeline
from edgepipe.store import Store

pipeline.convert(pickle.loads(Path(sys.argv[1]).read_bytes()), Store(Path(sys.argv[2])))
"""

ONNX2TF_INT8 = """
import onnx2tf

onnx2tf.convert(
    input_onnx_file_path="model.onnx", output_folder_path="out", output_integer_quantized_tflite=True,
    quant_type="per-channel", custom_input_op_name_np_data_path=[["image", "samples.npy", [[[[0.0]]]], [[[[1.0]]]]]],
    verbosity="warn",
)
"""


@dataclasses.dataclass(frozen=True)
class Bench:
    work: Path
    cache: str = "store"

    @property
    def store(self) -> Store:
        return Store(self.work / self.cache)

    def fashion(self, weights: str = "", **model: Any) -> Recipe:
        """fashion_mnist.toml, 20,000 images to train on and all to judge by, from another row's weights."""
        recipe = load_recipe(RECIPES / "fashion_mnist.toml")
        data = {**recipe.data, "test": dataclasses.replace(recipe.data["test"], limit=0)}
        source = dataclasses.replace(recipe.model, **model)
        if weights:
            source = dataclasses.replace(source, weights=self.work / f"{weights}.safetensors")
        return dataclasses.replace(recipe, model=source, data=data)

    def make(self, recipe: Recipe, *steps: Step) -> Artifact:
        stages = tuple(stage_class(name)(**options) for name, options in steps)
        return pipeline.convert(dataclasses.replace(recipe, stages=stages), self.store)

    def trained(self, name: str, recipe: Recipe, options: dict[str, Any]) -> None:
        """Weights ``name`` that other rows start from; made once, whatever changes later."""
        target = self.work / f"{name}.safetensors"
        if not target.exists():
            made = self.make(recipe, ("finetune", options))
            shutil.copyfile(made.path / "weights.safetensors", target.with_suffix(".part"))
            target.with_suffix(".part").replace(target)

    def judge(self, name: str, path: Path, recipe: Recipe, note: str = "") -> dict[str, Any]:
        """The figures of a .tflite file; a copy of it stays for the latencies."""
        kept = self.work / "models" / f"{name.replace('/', '-')}.tflite"
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, kept)
        data = recipe.evaluate.data if recipe.evaluate else "test"
        images, labels = samples_of(recipe, data)
        content = kept.read_bytes()
        return {
            "accuracy": tflite_accuracy(kept, images, labels),
            "samples": len(labels),
            "bytes": len(content),
            "gzip_bytes": len(gzip.compress(content)),
            "macs": describe(kept).macs,
            "model": str(kept.relative_to(self.work)),
            "note": note,
        }


def samples_of(recipe: Recipe, data: str, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, C, H, W) float32 and (N,) labels of a data set, as the recipe's model takes them."""
    source = recipe.data[data]
    if limit:
        source = dataclasses.replace(source, limit=limit)
    specs = [TensorSpec(o.name, o.shape, o.dtype, o.layout) for o in recipe.model.inputs]
    samples = load_samples(source, specs)
    assert samples.labels is not None
    return next(iter(samples.inputs.values())), samples.labels


def tflite_accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples that a .tflite file of anyone's gets right; its doors may be int8 or float."""
    model = open_tflite(path)
    entry, out = model.get_input_details()[0], model.get_output_details()[0]
    if tuple(entry["shape"][1:]) != images.shape[1:]:
        images = images.transpose(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    right = 0
    for image, label in zip(images, labels, strict=True):
        model.set_tensor(entry["index"], quantize(image[np.newaxis], entry))
        invoke_once(model, where=str(path))
        right += int(dequantize(model.get_tensor(out["index"]), out).argmax() == label)
    return right / len(labels)


Row = Callable[[Bench, str], dict[str, Any]]


# --- alone: one stage at a time, and other tools ---------------------------------------------------


def fashion_net(bench: Bench) -> Recipe:
    options = {"epochs": 4, "batch_size": 128, "lr": 4e-3, "warmup": 0.5}
    bench.trained("fashion_net", bench.fashion(), options)
    return bench.fashion("fashion_net")


def alone(*steps: Step, note: str = "") -> Row:
    """A row: these stages on the trained network, then whatever the last lacks to be a TFLite file."""

    def row(bench: Bench, name: str) -> dict[str, Any]:
        recipe = fashion_net(bench)
        return bench.judge(name, bench.make(recipe, *steps).path, recipe, note or text_of(steps))

    return row


def text_of(steps: Sequence[Step]) -> str:
    """The stages of a row without the conversion, like ``prune ratio=0.4, finetune``."""
    named = [(n, o) for n, o in steps if n not in ("export_onnx", "to_tflite", "quantize_int8")]
    return ", ".join(
        " ".join([n, *(f"{k}={v}" for k, v in o.items() if k not in TUNE and k not in SPEECH)])
        for n, o in named
    )


def litert_quantizer_alone(bench: Bench, name: str) -> dict[str, Any]:
    """litert-quantizer as its README calls it: recipe static_wi8_ai8, its own calibration."""
    from litert_quantizer import quantizer
    from litert_quantizer import recipe as recipes

    recipe = fashion_net(bench)
    made = bench.make(recipe, *TFLITE)
    images, _ = samples_of(recipe, "calibration")
    tool = quantizer.Quantizer(made.path.read_bytes(), recipes.static_wi8_ai8())
    runner = open_tflite(made.path).get_signature_list()
    key, entry = next((k, v["inputs"][0]) for k, v in runner.items())
    ranges = tool.calibrate({key: [{entry: i[np.newaxis].transpose(0, 2, 3, 1)} for i in images]})
    path = bench.work / "litert-quantizer.tflite"
    path.write_bytes(bytes(tool.quantize(ranges).quantized_model or b""))
    return bench.judge(name, path, recipe, "litert-quantizer 0.11, its own calibration")


def onnx2tf_alone(bench: Bench, name: str) -> dict[str, Any]:
    """onnx2tf's own int8 file from the same ONNX and samples: 2.x, or 1.x where that refuses."""
    recipe = fashion_net(bench)
    onnx = bench.make(recipe, TFLITE[0])
    images, _ = samples_of(recipe, "calibration")
    failed = ""
    for tool in ("onnx2tf", "onnx2tf-tf"):
        folder = bench.work / tool
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(onnx.path, folder / "model.onnx")
        np.save(folder / "samples.npy", images.transpose(0, 2, 3, 1))
        python = toolchain.ensure(tool) / "bin/python"
        environ = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(folder), "TF_USE_LEGACY_KERAS": "1"}  # fmt: skip
        with (folder / "log.txt").open("wb") as log:
            done = subprocess.run([python, "-c", ONNX2TF_INT8], cwd=folder, env=environ, stdout=log, stderr=log, check=False)  # fmt: skip
        made = sorted(folder.glob("out/*_full_integer_quant.tflite"))
        version = toolchain.find_toolchain(tool).summary.split(",")[0]
        if done.returncode == 0 and made:
            return bench.judge(name, made[0], recipe, f"{version} -oiqt{failed}")
        said = (folder / "log.txt").read_text(errors="replace").splitlines()
        why = next((line for line in reversed(said) if "Error: " in line), "without a word")
        failed += f"; {version} failed: {why}"
    return {"error": failed.removeprefix("; ")}


def torch_pruning_alone(bench: Bench, name: str) -> dict[str, Any]:
    """Torch-Pruning as its README calls it, the same ratio, rounding and training, our conversion."""
    import torch_pruning

    recipe = fashion_net(bench)
    model = build_model(ModelDescription(recipe.model.builder, recipe.model.args, root=RECIPES))
    assert recipe.model.weights is not None
    load_state(model, read_weights(recipe.model.weights), source=recipe.model.weights)
    example = torch.zeros(1, 1, 28, 28)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model.eval(), example, importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.4, round_to=8, ignored_layers=[model.head],
    )  # fmt: skip
    pruner.step()
    images, labels = samples_of(recipe, "train")
    train(model, ArraySet([images], labels), TrainingOptions(**TUNE), seed=0, stage="torch-pruning")
    path = bench.work / "torch_pruning.pt2"
    torch.export.save(torch.export.export(model.eval(), (example,)), path)
    source = dataclasses.replace(recipe.model, builder="", args={}, weights=None, file=path)
    made = bench.make(dataclasses.replace(recipe, model=source), *INT8)
    return bench.judge(name, made.path, recipe, "Torch-Pruning 1.6 L2 ratio=0.4, the same training")


# --- teacher ----------------------------------------------------------------------------------------


def teacher(bench: Bench, name: str) -> dict[str, Any]:
    """The teacher, trained in 16 bits where the CPU has them, and its own int8 file."""
    weights = bench.work / "teacher.safetensors"
    recipe = bench.fashion(builder="fashion_mnist_teacher.py:build", args={})
    model = build_model(ModelDescription(recipe.model.builder, root=RECIPES), seed=0)
    if not weights.exists():
        everything = dataclasses.replace(recipe.data["train"], limit=0)
        images, labels = samples_of(
            dataclasses.replace(recipe, data={"train": everything}), "train"
        )
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def objective(batch: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return cross_entropy(TEACHER.label_smoothing)(batch)

        checkpoint = bench.work / "teacher.checkpoint"
        train(model, ArraySet([images], labels), TEACHER, seed=0, stage="teacher", objective=objective, checkpoint=checkpoint)  # fmt: skip
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    load_state(model, read_weights(weights), source=weights)
    images, labels = samples_of(recipe, "test")
    share = accuracy(model.eval(), ArraySet([images], labels))
    made = bench.make(bench.fashion("teacher", builder=recipe.model.builder, args={}), *INT8)
    found = bench.judge(name, made.path, recipe, f"in float {100 * share:.2f} %")
    return {**found, "float_accuracy": share}


# --- the rest ---------------------------------------------------------------------------------------


def recipe_row(file: str) -> Row:
    """A recipe of ci/recipes as it stands."""

    def row(bench: Bench, name: str) -> dict[str, Any]:
        os.environ["EDGEPIPE_TEACHER"] = str(bench.work / "teacher.safetensors")
        recipe = load_recipe(RECIPES / file)
        note = f"{file}: {text_of([(s.name, {}) for s in recipe.stages])}"
        return bench.judge(name, pipeline.convert(recipe, bench.store).path, recipe, note)

    return row


# width -> how that student is trained, in whichever row
STUDENTS: dict[int, dict[str, Any]] = {
    4: {"epochs": 10, "batch_size": 128, "lr": 5e-3, "warmup": 1.0},
    16: {"epochs": 24, "batch_size": 128, "lr": 4e-3, "warmup": 1.0},
}


def student(width: int, **taught: Any) -> Row:
    """A row on the recipe's student in float, alone (no options) or taught by the recipe's teacher."""

    def row(bench: Bench, name: str) -> dict[str, Any]:
        os.environ["EDGEPIPE_TEACHER"] = str(bench.work / "teacher.safetensors")
        recipe = load_recipe(RECIPES / "fashion_mnist_student.toml")
        builder, args, options = "fashion_mnist_student_model.py:build", {"width": width}, STUDENTS[width]  # fmt: skip
        stage = "distill" if taught else "finetune"
        if taught:
            options = {**options, "student": builder, "args": args, **taught}
        else:
            source = dataclasses.replace(recipe.model, builder=builder, args=args, weights=None)
            recipe = dataclasses.replace(recipe, model=source)
        made = bench.make(recipe, (stage, options), *TFLITE)
        note = f"{text_of([(stage, taught)])}, {options['epochs']} epochs"
        return bench.judge(name, made.path, recipe, note)

    return row


MOBILENET: dict[str, Any] = {
    "builder": "edgepipe.torch_ops.students.mobilenet_v3_small:build",
    "args": {"width": 0.35, "in_channels": 1, "size": [28, 28]},
}


SPOKEN: dict[str, Any] = {
    "epochs": 25, "batch_size": 32, "lr": 3e-3, "warmup": 2.0, "augment": Augmentation(shift=3),
}  # fmt: skip
# as many epochs more, with int8 rounding or, as a control, without
SPOKEN_MORE: dict[str, Any] = {**SPOKEN, "epochs": 4, "lr": 1e-3, "warmup": 0.5}
SPOKEN_QAT: dict[str, Any] = {**SPOKEN_MORE, "validation": "calibration"}
# plain int8 ruins this network, which is the point: let it pass
ANYHOW: Step = ("quantize_int8", {"min_sqnr": -200.0})


# Half of the clips is for training, ranges and choices, the other half only for the verdict
SPEECH: dict[str, Any] = {
    "epochs": 60, "batch_size": 32, "lr": 1e-3, "warmup": 2.0, "label_smoothing": 0.1,
    "augment": Augmentation(mask_time=8, mask_frequency=2),
}  # fmt: skip


def keyword(*steps: Step) -> Row:
    """A row on the published keyword spotter, judged on the odd clips."""

    def row(bench: Bench, name: str) -> dict[str, Any]:
        recipe = load_recipe(RECIPES / "keyword_spotting.toml")
        even = dataclasses.replace(recipe.data["test"], not_fold=None, fold=(0, 2))
        odd = dataclasses.replace(even, fold=(1, 2))
        data = {"train": even, "calibration": dataclasses.replace(even, limit=200), "test": odd}
        recipe = dataclasses.replace(recipe, data=data)
        return bench.judge(name, bench.make(recipe, *steps).path, recipe, text_of(steps))

    return row


def mobilenet(*steps: Step) -> Row:
    """A row on MobileNetV3-Small trained on Fashion-MNIST."""

    def row(bench: Bench, name: str) -> dict[str, Any]:
        options = {"epochs": 2, "batch_size": 128, "lr": 3e-3, "warmup": 0.5}
        bench.trained("mobilenet_v3", bench.fashion(**MOBILENET), options)
        recipe = bench.fashion("mobilenet_v3", **MOBILENET)
        return bench.judge(name, bench.make(recipe, *steps).path, recipe, text_of(steps))

    return row


def spectrograms(bench: Bench, fold: int) -> DataSource:
    """(N, 1, 49, 40) magnitudes of mel bands of every second clip, 1.0 the deviation of the first half."""
    path = bench.work / f"spectrograms-{fold}.npz"
    if not path.exists():
        audio = AudioPreprocess(features="raw")
        names = ["_silence_", "_unknown_", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]  # fmt: skip
        zipped = Path(os.environ["EDGEPIPE_DATA"]) / "speech-commands-dev" / "dev_1200.zip"
        source = DataSource(kind="wavs", path=zipped, classes=tuple(names), audio=audio)
        specs = [TensorSpec("clip", (1, 1, 16000), "float32", "NCL")]
        clips = load_samples(source, specs)
        assert clips.labels is not None
        padded = np.pad(clips.inputs["clip"][:, 0], ((0, 0), (320, 320)), mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, 640, axis=1)[:, ::320][:, :49]
        power = np.abs(np.fft.rfft(frames * np.hanning(641)[:-1])) ** 2  # (N, 49, 321)
        filters = mel_filters(n_fft=640, sample_rate=16000, mel_bins=40)
        images = np.sqrt(power @ filters)[:, np.newaxis].astype(np.float32)
        np.savez(path, image=images[fold::2] / images[::2].std(), labels=clips.labels[fold::2])
    return DataSource(kind="npz", path=path)


def spoken_recipe(bench: Bench, train: int = 0) -> Recipe:
    """MobileNetV3-Small trained on mel magnitudes of the even clips, or with ``train`` 1 of the odd
    ones; data set ``test`` are the others."""
    recipe = load_recipe(RECIPES / "fashion_mnist.toml")
    seen, unseen = (spectrograms(bench, fold) for fold in (train, 1 - train))
    args = {"width": 0.35, "in_channels": 1, "size": [49, 40], "num_classes": 12}
    inputs = (dataclasses.replace(recipe.model.inputs[0], shape=(1, 1, 49, 40)),)
    source = dataclasses.replace(recipe.model, builder=MOBILENET["builder"], args=args, inputs=inputs)  # fmt: skip
    data = {"train": seen, "calibration": dataclasses.replace(seen, limit=256), "test": unseen}
    recipe = dataclasses.replace(recipe, model=source, data=data)
    bench.trained("mobilenet_v3_spoken", recipe, SPOKEN)
    weights = bench.work / "mobilenet_v3_spoken.safetensors"
    return dataclasses.replace(recipe, model=dataclasses.replace(source, weights=weights))


def spoken(*steps: Step) -> Row:
    """A row on that network, judged on the odd clips."""

    def row(bench: Bench, name: str) -> dict[str, Any]:
        recipe = spoken_recipe(bench)
        return bench.judge(name, bench.make(recipe, *steps).path, recipe, text_of(steps))

    return row


def high_water(pid: int) -> int:
    """Peak resident bytes of a process since its exec (VmHWM); 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def memory(stage: str = "", **options: Any) -> Row:
    """Peak resident bytes of a process that trains one epoch of 1,024 samples; no ``stage``: plainly."""
    batch = 128

    def row(bench: Bench, name: str) -> dict[str, Any]:
        store = bench.work / "memory"
        shutil.rmtree(store, ignore_errors=True)
        own = dataclasses.replace(bench, cache="memory")
        weights = (
            "teacher" if stage == "distill" else ""
        )  # of row teacher/teacher: random ones are refused
        recipe = bench.fashion(weights, builder="fashion_mnist_teacher.py:build", args={})
        data = dict(recipe.data)
        data["train"] = dataclasses.replace(data["train"], limit=1024)
        recipe = dataclasses.replace(recipe, data=data)
        before = TFLITE if stage == "qat" else ()
        made = own.make(recipe, *before)  # kept, so that the process does no more than the stage
        if stage:
            steps = (*before, (stage, {"epochs": 1, "batch_size": batch, **options}))
            stages = tuple(stage_class(n)(**o) for n, o in steps)
            kept = bench.work / "memory.pickle"
            kept.write_bytes(pickle.dumps(dataclasses.replace(recipe, stages=stages)))
            argv = ["-c", ONE_STAGE, str(kept), str(store)]
        else:
            images, labels = samples_of(recipe, "train")
            kept = bench.work / "memory.pt"
            torch.save({"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}, kept)  # fmt: skip
            argv = ["-c", PLAIN_LOOP, str(made.path), str(kept), str(batch)]
        log = bench.work / "memory.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen([sys.executable, *argv], stdout=stream, stderr=stream)
            # VmHWM, not ru_maxrss: the latter of a child begins at its parent's peak
            peak = 0
            while process.poll() is None:
                peak = max(peak, high_water(process.pid))
                time.sleep(0.02)
        if process.returncode:
            return {"error": log.read_text(errors="replace").strip()[-300:]}
        return {"peak_rss_bytes": peak, "note": stage or "plain loop"}

    return row


ROWS: dict[str, Row] = {
    "alone/float": alone(*TFLITE),
    "alone/ptq": alone(*INT8),
    "alone/ptq-litert-quantizer": litert_quantizer_alone,
    "alone/ptq-onnx2tf": onnx2tf_alone,
    "alone/finetune": alone(("finetune", TUNE), *INT8),
    # to the MACs that Torch-Pruning's ratio of 0.4 leaves
    "alone/prune": alone(
        ("prune", {"target": PruningTarget(macs=0.3)}),
        ("finetune", TUNE),
        *INT8,
        note="prune target={macs=0.3}, finetune",
    ),
    "alone/prune-torch-pruning": torch_pruning_alone,
    "alone/low_rank": alone(("low_rank", {"macs": 0.7}), ("finetune", TUNE), *INT8),
    "alone/sparsify": alone(("sparsify", {**TUNE, "sparsity": 0.75}), *INT8),
    "alone/qat": alone(
        *TFLITE, ("qat", {**TUNE, "lr": 1e-4, "validation": "calibration"}), INT8[-1]
    ),
    "teacher/teacher": teacher,
    "teacher/student": recipe_row("fashion_mnist_student.toml"),
    "distill/alone": student(16),
    "distill/temperature-4": student(16, temperature=4.0),
    "distill/temperature-1": student(16, temperature=1.0),
    "distill/narrow-alone": student(4),
    "distill/narrow-temperature-4": student(4, temperature=4.0),
    "distill/narrow-temperature-1": student(4, temperature=1.0),
    "keyword/float": keyword(*TFLITE),
    "keyword/ptq": keyword(*INT8),
    "keyword/finetune": keyword(("finetune", SPEECH), *INT8),
    "keyword/prune": recipe_row("keyword_spotting_pruned.toml"),
    "keyword/low_rank": keyword(
        ("low_rank", {"macs": 0.55, "data": "calibration"}), ("finetune", SPEECH), *INT8
    ),
    "qat/float": mobilenet(*TFLITE),
    "qat/ptq": mobilenet(*INT8),
    "qat/qat": mobilenet(
        *TFLITE, ("qat", {**TUNE, "lr": 3e-4, "validation": "calibration"}), INT8[-1]
    ),
    "qat/spoken-float": spoken(*TFLITE),
    "qat/spoken-ptq": spoken(*TFLITE, ANYHOW),
    "qat/spoken-kl": spoken(*TFLITE, (ANYHOW[0], {**ANYHOW[1], "method": "kl"})),
    "qat/spoken-finetune": spoken(("finetune", SPOKEN_MORE), *TFLITE, ANYHOW),
    "qat/spoken-qat": spoken(*TFLITE, ("qat", SPOKEN_QAT), ANYHOW),
    "memory/plain": memory(),
    "memory/finetune": memory("finetune"),
    "memory/distill": memory("distill", student="fashion_mnist_teacher.py:build"),
    "memory/sparsify": memory("sparsify", sparsity=0.75),
    "memory/qat": memory("qat", validation="calibration"),
}


# --- rows and tables --------------------------------------------------------------------------------


def make_row(bench: Bench, name: str) -> dict[str, Any]:
    """The row as it was kept, or made now; one that could not be made is not kept."""
    kept = bench.work / "rows" / f"{name.replace('/', '-')}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    print(f"--- {name}", flush=True)
    began = time.monotonic()
    try:
        found = ROWS[name](bench, name)
    except EdgepipeError as exc:
        found = {"error": exc.message}
    found = {"row": name, **found, "seconds": round(time.monotonic() - began, 1)}
    found["command"] = f"python ci/bench/compression.py --work DIR --only {name}"
    print(json.dumps(found), flush=True)
    if "error" not in found:
        write_json(kept, found)
    return found


def latencies(paths: Sequence[Path]) -> dict[Path, float]:
    """Median seconds of one inference on one thread, the files in turn, a process each time."""
    taken: dict[Path, list[float]] = {path: [] for path in paths}
    for _ in range(ROUNDS):
        for path in paths:
            done = subprocess.run([sys.executable, "-c", LATENCY, str(path)], capture_output=True, text=True, check=True)  # fmt: skip
            taken[path].append(float(done.stdout))
    return {path: statistics.median(values) for path, values in taken.items()}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown; the first row of a group is what the others are compared with."""
    lines = []
    groups = dict.fromkeys(str(r["row"]).split("/")[0] for r in rows)
    for group in groups:
        members = [r for r in rows if r["row"].startswith(group + "/")]
        if group == "memory":
            lines += ["", "| row | peak memory | against the plain loop |", "|---|---|---|"]
            plain = next((r["peak_rss_bytes"] for r in members if r["row"] == "memory/plain"), None)
        else:
            lines += ["", "| row | accuracy | bytes | gzip | MACs | latency | what |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in members:
            if "error" in row:
                lines.append(f"| {row['row']} | not measured: {row['error']} |")
            elif group == "memory":
                ratio = f"{row['peak_rss_bytes'] / plain:.2f}x" if plain else ""
                lines.append(f"| {row['row']} | {row['peak_rss_bytes'] / 1e6:.0f} MB | {ratio} |")
            else:
                lines.append(
                    f"| {row['row']} | {100 * row['accuracy']:.2f} % of {row['samples']} | {row['bytes']} | "
                    f"{row['gzip_bytes']} | {row['macs']} | {1e6 * row['latency_s']:.1f} us | {row['note']} |"
                )  # fmt: skip
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", type=Path, required=True, help="folder for weights, models and rows")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows or groups")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and end")
    args = parser.parse_args()
    wanted = [n for n in ROWS if not args.only or n in args.only or n.split("/")[0] in args.only]
    if args.list or not wanted:
        print("\n".join(ROWS))
        return 0 if args.list else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench = Bench(args.work.resolve())
    bench.work.mkdir(parents=True, exist_ok=True)
    rows = [make_row(bench, name) for name in wanted]
    models = [r for r in rows if "model" in r]
    taken = latencies([bench.work / r["model"] for r in models])
    for row in models:
        row["latency_s"] = taken[bench.work / row["model"]]
    text = "\n".join(table(rows)).strip() + "\n"
    print("\n" + text)
    write_json(bench.work / "compression.json", rows)
    (bench.work / "compression.md").write_text(text, encoding="utf-8")
    return 1 if any("error" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
