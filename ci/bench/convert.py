"""CPU time and peak memory of ONNX -> proven int8 TFLite, against the bare converters.

    python ci/bench/convert.py [--samples 100] [--rounds 2]

A MobileNetV2-shaped network with seeded weights is exported once. Then, from that same ONNX file
and the same calibration samples:

ours  stage to_tflite (conversion, parity of 11 inputs), then stage quantize_int8 (calibration
      check, int8, parity with float), in one fresh process
bare  onnx2tf's own float conversion in its toolchain, no checks; then a TFLiteConverter int8 pass
      in TensorFlow's toolchain over a SavedModel of the network (made beforehand, not counted)

CPU is user + system seconds of the process and all it started; memory is the largest resident set
of any one of them (they do not overlap). Needs torch, and installs both toolchains.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from edgepipe import toolchain

TARGET_CPU_RATIO = 1.25
TARGET_MEMORY_RATIO = 1.0

EXPORT = """
import sys
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        hidden = inputs * expand
        layers = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


# (expansion, channels, repeats, stride): table 2 of the MobileNetV2 paper, arXiv 1801.04381
TABLE = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
torch.manual_seed(0)
layers, channels = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()], 32
for expand, outputs, repeats, stride in TABLE:
    for i in range(repeats):
        layers.append(Block(channels, outputs, stride if i == 0 else 1, expand))
        channels = outputs
layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
model = nn.Sequential(*layers).train()
with torch.no_grad():
    for _ in range(3):  # batch norm statistics of something
        model(torch.randn(8, 3, 96, 96))
torch.onnx.export(
    model.eval(), (torch.randn(1, 3, 224, 224),), sys.argv[1], dynamo=True, opset_version=18,
    input_names=["image"], output_names=["logits"], external_data=False, verbose=False,
)
"""

SAMPLES = """
import sys
import numpy as np

# smooth pictures: noise of 7 x 7 enlarged, so that ranges are like those of photographs
coarse = np.random.default_rng(0).normal(size=(int(sys.argv[2]), 3, 7, 7)).astype(np.float32)
np.savez(sys.argv[1], image=np.repeat(np.repeat(coarse, 32, axis=2), 32, axis=3))
"""

OURS = """
import sys
from pathlib import Path
from edgepipe.artifact import make_artifact
from edgepipe.data import DataSource
from edgepipe.stage import StageContext
from edgepipe.stages.quantize_int8 import QuantizeInt8
from edgepipe.stages.to_tflite import ToTflite
from edgepipe.tflite_ops.onnx_model import onnx_specs

onnx, npz, folder = map(Path, sys.argv[1:4])
inputs, outputs = onnx_specs(onnx)
model = make_artifact("onnx", onnx, inputs=inputs, outputs=outputs)
data = {"calibration": DataSource(kind="npz", path=npz)}
for stage in (ToTflite(route="onnx2tf"), QuantizeInt8(min_sqnr=0.1)):
    work = folder / stage.name
    work.mkdir()
    model = stage.run(model, StageContext(work, data, 0, folder / "converter.txt"))
print("int8 SQNR", model.facts["parity"]["outputs"]["logits"]["sqnr_db"])
"""

BARE_FLOAT = """
import sys
import onnx2tf

onnx2tf.convert(input_onnx_file_path=sys.argv[1], output_folder_path="out", non_verbose=True)
"""

BARE_INT8 = """
import sys
import numpy as np
import tensorflow as tf

images = np.load(sys.argv[2])["image"].transpose(0, 2, 3, 1)
converter = tf.lite.TFLiteConverter.from_saved_model(sys.argv[1])
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([image[None]] for image in images)
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
converter.inference_input_type = converter.inference_output_type = tf.int8
open("int8.tflite", "wb").write(converter.convert())
"""


def measure(python: Path, code: str, arguments: list[str], cwd: Path) -> tuple[float, float]:
    """(CPU seconds, peak resident bytes) of a script and its children, one thread each."""
    cwd.mkdir()
    environ = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    with (cwd / "log.txt").open("wb") as log:
        process = subprocess.Popen([python, "-c", code, *arguments], cwd=cwd, env=environ, stdout=log, stderr=log)  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed:\n{(cwd / 'log.txt').read_text(errors='replace')[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--samples", type=int, default=100, help="calibration samples (default: 100)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="rounds; medians are compared (default: 2)")  # fmt: skip
    args = parser.parse_args()
    direct = toolchain.install("onnx2tf") / "bin/python"
    tf = toolchain.install("onnx2tf-tf") / "bin/python"
    own = Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="edgepipe-bench-") as name:
        folder = Path(name)
        onnx, npz = folder / "mobilenet.onnx", folder / "samples.npz"
        measure(own, EXPORT, [str(onnx)], folder / "export")
        measure(own, SAMPLES, [str(npz), str(args.samples)], folder / "draw")
        print("making the SavedModel for TFLiteConverter (not counted)", flush=True)
        made = folder / "saved"
        made.mkdir()
        toolchain.call(
            "onnx2tf-tf", "onnx_to_tflite_tf.py", {"model": "model.onnx", "keep_shape": []},
            files={"model.onnx": onnx}, work_dir=made, timeout_s=900, log_path=folder / "tf.txt", stage="bench",
        )  # fmt: skip
        rows: dict[str, list[tuple[float, float]]] = {}
        for number in range(args.rounds):
            copy = folder / f"copy{number}.onnx"  # the converter rewrites its input
            copy.write_bytes(onnx.read_bytes())
            steps = [
                ("ours", own, OURS, [str(onnx), str(npz), str(folder / f"ours{number}")]),
                ("bare onnx2tf float", direct, BARE_FLOAT, [str(copy)]),
                ("bare TFLiteConverter int8", tf, BARE_INT8, [str(made / "out"), str(npz)]),
            ]
            for label, python, code, arguments in steps:
                cpu_s, peak_bytes = measure(python, code, arguments, folder / f"{label.split()[-1]}{number}")  # fmt: skip
                rows.setdefault(label, []).append((cpu_s, peak_bytes))
                print(f"{label:26} {cpu_s:6.1f} CPU s  {peak_bytes / 1e6:7.0f} MB", flush=True)
        print((folder / "ours0" / "log.txt").read_text().strip().splitlines()[-1])
    cpu = {label: statistics.median(c for c, _ in found) for label, found in rows.items()}
    peak = {label: statistics.median(m for _, m in found) for label, found in rows.items()}
    bare_cpu = cpu["bare onnx2tf float"] + cpu["bare TFLiteConverter int8"]
    bare_peak = max(peak["bare onnx2tf float"], peak["bare TFLiteConverter int8"])
    cpu_ratio, memory_ratio = cpu["ours"] / bare_cpu, peak["ours"] / bare_peak
    print(f"CPU time: {cpu_ratio:.2f}x the bare converters (target: at most {TARGET_CPU_RATIO})")
    print(f"peak memory: {memory_ratio:.2f}x the bare converters (target: below {TARGET_MEMORY_RATIO})")  # fmt: skip
    return 0 if cpu_ratio <= TARGET_CPU_RATIO and memory_ratio < TARGET_MEMORY_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
