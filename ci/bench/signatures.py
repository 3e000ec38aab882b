"""What one file of several signatures costs on a board: each signature beside the file of its own.

    python ci/bench/signatures.py [--device local] [--profile NAME] [--layers 8] [--width 512] [--sessions 3]

A network of dense layers for 16, 32 and 64 tokens, whose weights are the same, as float32 and as int8:
three files and, by what `edgepipe run --merge` does, one with three signatures. Each signature is
measured as `edgepipe compare` does it, in the same processes as its own file, with and without
XNNPACK's weight cache: ratio of the latencies, memory beyond the runtime's, time to load. Exit 1 where
a signature is slower than its own file by more than the tolerance (3 %).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe import stats
from edgepipe.bench import MeasureOptions, measure
from edgepipe.commands.on_device import opened, tflite_model
from edgepipe.gate import Evidence, SlowdownGate
from edgepipe.inventory import Target, resolve_targets
from edgepipe.sessions import BASE, CANDIDATE
from edgepipe.tflite_ops.merge import merge_signatures
from edgepipe.tflite_ops.quantize import collect_ranges, quantize
from edgepipe.tflite_ops.tiny import tiny_tflite
from edgepipe.units import format_bytes, format_seconds

LENGTHS = (16, 32, 64)


def network(tokens: int, *, layers: int, width: int) -> bytes:
    """(tokens, width) -> (tokens, width), float32, with a seeded weight of its own in each layer."""
    random = np.random.default_rng(0)
    content = tiny_tflite(size=width, layers=layers)
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    (graph,) = model.subgraphs
    for tensor in graph.tensors:
        if tensor.buffer == 0:
            tensor.shape = [tokens, width]
        elif len(tensor.shape) == 2:
            weights = random.normal(0, width**-0.5, (width, width)).astype(np.float32)
            model.buffers.append(type(model.buffers[0])())
            model.buffers[-1].data = np.frombuffer(weights.tobytes(), np.uint8)
            tensor.buffer = len(model.buffers) - 1
    model.buffers[1].data = None  # the weight that all layers had
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def as_int8(content: bytes, tokens: int, width: int) -> bytes:
    samples = np.random.default_rng(1).normal(0, 1, (4, tokens, width)).astype(np.float32)
    ranges = collect_ranges(content, [[sample] for sample in samples], where="the network")
    return quantize(content, ranges.table())


def typical(measured: Mapping[str, Any], metric: str) -> float:
    return stats.sessions_percentile(measured[metric].valid_sessions, 0.5)


def beside(target: Target, own: Path, merged: Path, key: str, options: MeasureOptions) -> bool:
    """Prints a line; whether the signature is as fast as its own file."""
    base, model = tflite_model(own), tflite_model(merged, signature=key)
    with opened(target) as device:
        result = measure(model, device, target.profile, options, baseline=base, same_inputs=True)
    measured = {m.metric: m for m in result.measurements}
    evidence = Evidence(model.sha256, target.name, measured, profile=target.profile.name)
    verdict = SlowdownGate(max=options.tolerance).judge(evidence)
    anon, file = ([typical(measured, f"{m}{b}") for b in ("", "_baseline")] for m in ("memory_anon", "memory_file"))  # fmt: skip
    sessions = [line["session"] for line in result.raw["journal"] if line["kind"] == "session"]
    arms = [s["data"]["arms"] for s in sessions if s["kind"] == "latency" and s["data"]]
    load = [statistics.median(a[arm]["load_ns"] for a in arms) / 1e9 for arm in (CANDIDATE, BASE)]
    clock = "cpu" if options.threads <= 1 else "wall"
    print(
        f"  {key:9s} latency {format_seconds(typical(measured, f'latency_{clock}'))}, {verdict.status.value}: {verdict.reason}\n"
        f"  {'':9s} memory {format_bytes(anon[0])} + mapped {format_bytes(file[0])}, own file {format_bytes(anon[1])} + {format_bytes(file[1])};"
        f" load {format_seconds(load[0])}, own file {format_seconds(load[1])}",
        flush=True,
    )
    return verdict.status.value != "FAIL"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="local", metavar="ADDRESS")
    parser.add_argument("--profile", metavar="NAME")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sessions", type=int, default=3, help="at most; default 3")
    args = parser.parse_args()
    (target,) = resolve_targets([], devices=[args.device], profile=args.profile)
    options = MeasureOptions(
        sessions=3, max_sessions=args.sessions, session=0.5, warmup=0.1, ops=False, energy=False, instructions=False,
    )  # fmt: skip
    held = []
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        for dtype in ("float32", "int8"):
            contents = {
                f"length{n}": network(n, layers=args.layers, width=args.width) for n in LENGTHS
            }
            if dtype == "int8":
                contents = {k: as_int8(v, n, args.width) for (k, v), n in zip(contents.items(), LENGTHS, strict=True)}  # fmt: skip
            merged = Path(folder) / "merged.tflite"
            merged.write_bytes(merge_signatures(contents))
            apart = sum(map(len, contents.values()))
            print(
                f"{dtype}: {format_bytes(merged.stat().st_size)} merged, {format_bytes(apart)} apart"
            )
            for cache in (False, True):
                print(" with XNNPACK's weight cache" if cache else " as the runtime does by itself")
                for key, content in contents.items():
                    own = Path(folder) / f"{key}.tflite"
                    own.write_bytes(content)
                    asked = dataclasses.replace(options, weight_cache=cache)
                    held.append(beside(target, own, merged, key, asked))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
