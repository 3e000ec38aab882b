"""The table of metrics: their unit, and what they mean exactly."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "latency_wall": Metric("s", "wall-clock time of one inference on the device, steady state; of a fast model each sample is the mean of a batch of 0.25 ms"),
    "latency_cpu": Metric("s", "CPU time of the calling thread for one inference; threads = 1 only"),
    "load": Metric("s", "model load and compile in a fresh process, file in the page cache"),
    "load_cold": Metric("s", "model load and compile after the file was dropped from the page cache"),
    "first_inference": Metric("s", "wall-clock time of the first inference after loading"),
    "memory_anon": Metric("B", "RssAnon growth from before loading to steady state: arena, packed weights"),
    "memory_file": Metric("B", "resident part of the mapped model file"),
    "memory_peak": Metric("B", "VmHWM growth from before loading, high-water mark reset first"),
    "model_bytes": Metric("B", "size of the model file that ships"),
    "task_metric": Metric("", "task metric of the shipped file on the evaluation set, 0 to 1"),
    "task_metric_float": Metric("", "task metric of the model that was quantised, same samples"),
    "task_metric_reference": Metric("", "task metric of the reference model, same samples"),
    "accuracy_drop": Metric("points", "loss of the task metric against the reference model, in percentage points"),
    "parity_sqnr": Metric("dB", "lowest signal to quantisation-noise ratio over outputs, shipped file against the float model it was made from"),
    "parity_cosine": Metric("", "lowest cosine similarity over outputs, shipped file against the float model it was made from"),
    "float_islands": Metric("", "operators of the shipped file that compute in floating point"),
    "device_mismatch": Metric("", "share of output values that differ between device and host, same inputs: integers at all, floats by more than 64 ulp of the largest in their output"),
    "device_task_metric": Metric("", "task metric of the device's own outputs, 0 to 1"),
    "device_accuracy_drop": Metric("points", "loss of the task metric of the device's own outputs against the reference model, same samples, in percentage points"),
    "device_flips": Metric("", "share of samples whose prediction differs between device and host"),
    "latency_ratio_wall": Metric("", "wall-clock time of the candidate over that of the baseline, round by round in one process"),
    "latency_ratio_cpu": Metric("", "CPU time of the candidate over that of the baseline, round by round; threads = 1 only"),
    "latency_wall_baseline": Metric("s", "latency_wall of the baseline, measured in the candidate's sessions"),
    "latency_cpu_baseline": Metric("s", "latency_cpu of the baseline, measured in the candidate's sessions"),
    "memory_anon_baseline": Metric("B", "memory_anon of the baseline, on the same board in the same run"),
    "memory_file_baseline": Metric("B", "memory_file of the baseline, on the same board in the same run"),
    "memory_peak_baseline": Metric("B", "memory_peak of the baseline, on the same board in the same run"),
    "model_bytes_baseline": Metric("B", "size of the baseline's model file"),
    "measuring_overhead": Metric("B", "resident memory of the measuring process before it loaded the runtime"),
    "instructions": Metric("", "instructions of one inference in user space; threads = 1 only, without what counting takes"),
    "instructions_baseline": Metric("", "instructions of the baseline, on the same board in the same run"),
    "op_time": Metric("s", "sum over the operators of their median time, from a profiled pass of its own"),
    "op_time_baseline": Metric("s", "op_time of the baseline"),
    "sustained_latency": Metric("s", "median latency_wall of each window of a long run, from its steady state on"),
    "energy": Metric("J", "energy of one inference above idle, as the board's own power sensors tell it"),
    "benchmark_model_latency": Metric("s", "mean wall-clock time of one inference as Google's benchmark_model tells it; comparable with no metric of ours"),
    "benchmark_model_first": Metric("s", "its first inference"),
    "benchmark_model_init": Metric("s", "its loading and compiling of the model"),
    "benchmark_model_memory": Metric("B", "its own estimate of the memory it grew by"),
    "runs_on_device": Metric("", "1 where the model loaded and ran on the device, 0 where it crashed"),
}  # fmt: skip

# Names of the built-in task metrics; array_ops.task_metrics computes them.
TASK_METRICS = ("top1", "top5", "r2", "mse", "pixel_accuracy", "mean_iou")
