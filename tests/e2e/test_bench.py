"""Measuring through real devices: this machine, and a real OpenSSH server on loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe import bench, runtime
from edgepipe.artifact import Artifact, make_artifact
from edgepipe.bench import MeasureOptions, measure
from edgepipe.cli import main
from edgepipe.device.base import Completed, Device
from edgepipe.device.local import LocalDevice
from edgepipe.errors import (
    ArtifactError,
    Busy,
    CommandFailed,
    CommandTimeout,
    NotReadyError,
    NotStable,
    ProfileError,
    RequestError,
    TransferError,
)
from edgepipe.gate import REQUIRED_CONTEXT
from edgepipe.metrics import METRICS
from edgepipe.profile import DeviceProfile, ThermalLimits
from edgepipe.tflite_ops.tiny import crashing_tflite, stateful_tflite, tiny_tflite

pytestmark = pytest.mark.slow

QUICK = MeasureOptions(
    sessions=1, memory_sessions=1, warmup=0.02, session=0.05, ops=False, energy=False
)


def profile(work_dir: Path, **changes: Any) -> DeviceProfile:
    facts: dict[str, Any] = {
        "schema": 1, "name": "test", "model": "any", "soc": "any", "clusters": (), "ram_bytes": 0.0,
        "target": "linux", "machine": "any", "bits": 64, "os": "any", "libc": "any",
        "page_size_bytes": 0, "runtime": "litert", "runtime_version": runtime.DEFAULT_VERSION,
        "work_dir": str(work_dir),
    } | changes  # fmt: skip
    return DeviceProfile(**facts)


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return artifact(tmp_path, tiny_tflite())


def artifact(folder: Path, data: bytes) -> Artifact:
    path = folder / "model.tflite"
    path.write_bytes(data)
    return make_artifact("tflite", path, inputs=(), outputs=())


class Wrapped:
    """A device with one thing changed; every other word goes to the real one."""

    def __init__(self, inner: Device, prefix: Sequence[str] = ()) -> None:
        self.inner, self.address, self.prefix = inner, inner.address, tuple(prefix)
        self.pushed: list[str] = []

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        return self.inner.run([*self.prefix, *argv], timeout_s=timeout_s)

    def push(self, local: Path, remote: str) -> bool:
        moved = self.inner.push(local, remote)
        if moved:
            self.pushed.append(remote)
        return moved

    def pull(self, remote: str, local: Path) -> None:
        self.inner.pull(remote, local)

    def close(self) -> None:
        self.inner.close()


def by_metric(result: bench.BenchResult) -> dict[str, Any]:
    return {m.metric: m for m in result.measurements}


def test_a_model_is_measured_with_its_context(
    device: Device, model: Artifact, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    samples = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    options = dataclasses.replace(QUICK, sessions=2, ops=True, energy="auto")
    result = measure(model, device, profile(work), options, samples=samples)
    found = by_metric(result)
    assert set(found) == {
        "runs_on_device", "latency_wall", "latency_cpu", "load", "load_cold", "first_inference",
        "memory_anon", "memory_file", "memory_peak", "measuring_overhead", "op_time",
        "device_mismatch",
    }  # fmt: skip
    assert all(m.unit == METRICS[m.metric].unit for m in result.measurements)
    assert [len(s) >= bench.MIN_INFERENCES for s in found["latency_wall"].samples] == [True] * 2
    assert all(0 < s < 1 for session in found["latency_wall"].samples for s in session)
    assert found["device_mismatch"].samples == ((0.0,),)
    assert found["device_mismatch"].context["values"] == 12
    for measurement in result.measurements:
        assert [k for k in REQUIRED_CONTEXT if k not in measurement.context] == []
        assert measurement.context["model_sha256"] == model.sha256
        assert measurement.context["device"] == device.address
        assert measurement.context["boot_id"]
        json.dumps(measurement.context)
    wall = found["latency_wall"].context
    pin = runtime.PINS[runtime.DEFAULT_VERSION, platform.machine()]
    assert (wall["backend"], wall["runtime_sha256"]) == ("litert-c", pin.sha256)
    assert [s["inner_loops"] > 1 for s in wall["sessions"]] == [True, True]


def test_only_the_content_addressed_files_stay(
    device: Device, model: Artifact, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    measure(model, device, profile(work), QUICK)
    kept = {path.relative_to(work).parts[0] for path in work.rglob("*") if path.is_file()}
    assert kept == {"agents", "models", "rt", "lock"}
    assert (work / "models" / f"{model.sha256}.tflite").is_file()
    assert (work / "lock").read_text() == ""


def test_a_second_measurement_pushes_no_model_bytes(model: Artifact, tmp_path: Path) -> None:
    work = tmp_path / "work"
    measure(model, LocalDevice(), profile(work), QUICK)
    watched = Wrapped(LocalDevice())
    measure(model, watched, profile(work), QUICK)
    assert {Path(p).relative_to(work).parts[0] for p in watched.pushed} == {"jobs"}


def test_keep_leaves_the_jobs_files(model: Artifact, tmp_path: Path) -> None:
    work = tmp_path / "work"
    measure(model, LocalDevice(), profile(work), QUICK, keep=True)
    assert list((work / "jobs").rglob("job.json"))


def test_two_threads_have_no_cpu_latency(model: Artifact, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, threads=2, memory_sessions=0)
    found = by_metric(measure(model, LocalDevice(), profile(tmp_path / "w"), options))
    assert "latency_cpu" not in found
    assert found["latency_wall"].context["threads"] == 2


def test_the_profile_chooses_threads_unless_told(model: Artifact, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, memory_sessions=0)
    found = by_metric(measure(model, LocalDevice(), profile(tmp_path / "w", threads=2), options))
    assert found["latency_wall"].context["threads"] == 2


def test_progress_is_logged_for_every_session(
    model: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="edgepipe"):
        measure(model, LocalDevice(), profile(tmp_path / "w"), QUICK)
    lines = [r.getMessage() for r in caplog.records]
    assert any(line.startswith("memory 1/1: anon ") for line in lines)
    assert any(line.startswith("session 1/1: p50 ") and "cpu " in line for line in lines)


def test_two_models_are_measured_side_by_side(model: Artifact, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = artifact(tmp_path / "base", tiny_tflite(size=64))
    options = dataclasses.replace(QUICK, sessions=3, max_sessions=3, ops=True)
    result = measure(model, LocalDevice(), profile(tmp_path / "w"), options, baseline=base)
    found = by_metric(result)
    for metric in ("latency_wall", "latency_cpu", "memory_anon", "memory_file", "op_time"):
        ours, theirs = found[metric], found[f"{metric}_baseline"]
        assert len(ours.samples) == len(theirs.samples)
        assert (ours.context["model_sha256"], theirs.context["model_sha256"]) == (model.sha256, base.sha256)  # fmt: skip
    ratios = found["latency_ratio_cpu"]
    assert [len(s) for s in ratios.samples] == [len(s) for s in found["latency_cpu"].samples]
    # round by round, of the very samples that are in the record
    first = found["latency_cpu"].samples[0][0] / found["latency_cpu_baseline"].samples[0][0]
    assert ratios.samples[0][0] == pytest.approx(first)
    tags = [line["tag"] for line in result.raw["journal"] if line["kind"] == "session"]
    assert tags[-3:] == ["latency-1", "latency-2", "latency-3"]


def test_options_of_the_runtime_are_used_and_recorded(model: Artifact, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, kernel="builtin", memory_sessions=0, ops=True, sustained=0.5)  # fmt: skip
    found = by_metric(measure(model, LocalDevice(), profile(tmp_path / "w"), options))
    context = found["latency_wall"].context
    assert (context["kernel_mode"], context["weight_cache"], context["simulated"]) == ("builtin", False, False)  # fmt: skip
    assert context["model_inputs"] == [{"name": "x", "shape": [1, 4], "dtype": "float32"}]
    assert {op["where"] for op in found["op_time"].context["ops"]} == {"builtin"}
    assert len(found["sustained_latency"].context["minutes"]) == bench.MIN_WINDOWS


def test_energy_that_was_demanded_and_cannot_be_told_is_not_left_out(
    model: Artifact, tmp_path: Path
) -> None:
    options = dataclasses.replace(QUICK, memory_sessions=0, energy=True)
    with pytest.raises(NotReadyError, match="cannot tell its energy") as caught:
        measure(model, LocalDevice(), profile(tmp_path / "w"), options)
    assert caught.value.code == "no-energy"


@pytest.mark.data
def test_an_int8_model_computes_the_same_bits_there(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "mlperf-tiny" / "kws_ref_model.tflite"
    kws = make_artifact("tflite", path, inputs=(), outputs=())
    values = np.random.default_rng(0).normal(0, 30, (4, 49, 10, 1))
    found = by_metric(
        measure(kws, LocalDevice(), profile(tmp_path / "w"), QUICK, samples={"x": values})
    )
    assert found["device_mismatch"].samples == ((0.0,),)
    assert found["device_mismatch"].context["values"] == 4 * 12


def test_outputs_that_differ_are_counted(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepipe.tflite_ops import raw

    honest = raw.stored_outputs

    def off_by_one(path: Path, samples: raw.RawSamples, **options: Any) -> Any:
        outputs = honest(path, samples, **options)
        outputs["y"][0, 0, 0] += 1
        return outputs

    monkeypatch.setattr(raw, "stored_outputs", off_by_one)
    samples = {"x": np.ones((2, 4), np.float32)}
    found = by_metric(
        measure(model, LocalDevice(), profile(tmp_path / "w"), QUICK, samples=samples)
    )
    assert found["device_mismatch"].samples == ((1 / 8,),)
    assert found["device_mismatch"].context["max_abs"] == 1.0


# ------------------------------------------------------------------------------ faults


def test_a_model_that_crashes_is_a_result(device: Device, tmp_path: Path) -> None:
    model = artifact(tmp_path, crashing_tflite())
    options = dataclasses.replace(QUICK, backend="litert-c", memory_sessions=0)
    result = measure(model, device, profile(tmp_path / "w"), options)
    (only,) = result.measurements
    assert (only.metric, only.samples) == ("runs_on_device", ((0.0,),))
    assert "SIGSEGV" in only.context["reason"]
    assert only.context["runtime"] == "litert"
    assert list((tmp_path / "w" / "jobs").iterdir()) == []


class Truncating(Wrapped):
    """A board whose storage loses the end of every model after it was written."""

    def push(self, local: Path, remote: str) -> bool:
        moved = super().push(local, remote)
        if remote.endswith(".tflite"):
            os.truncate(remote, 100)
        return moved


def test_a_model_truncated_on_the_board_is_never_measured(model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="has 100 bytes, the job says"):
        measure(model, Truncating(LocalDevice()), profile(tmp_path / "w"), QUICK)


def find_worker(work: Path) -> int | None:
    """The pid of a worker whose supervisor runs from this work folder."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(work).encode() in w and w.endswith(b"/worker.py") for w in words):
            return int(entry.parent.name)
    return None


def kill_workers(work: Path, times: int, stop: threading.Event) -> None:
    """SIGKILL the worker of each of the first sessions, once it has the model in memory."""
    killed: set[int] = set()
    while len(killed) < times and not stop.is_set():
        worker = find_worker(work)
        try:
            # latency sessions of these tests last minutes: only they are caught here
            if worker and worker not in killed and b"/models/" in Path(f"/proc/{worker}/maps").read_bytes():  # fmt: skip
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
        except OSError:
            pass
        time.sleep(0.005)


def test_a_worker_killed_again_and_again_says_nothing_of_the_model(
    model: Artifact, tmp_path: Path
) -> None:
    options = dataclasses.replace(QUICK, memory_sessions=0, session=120)
    stop = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(tmp_path / "w", 3, stop))
    killer.start()
    try:
        with pytest.raises(NotStable, match="SIGKILL, again and again"):
            measure(model, LocalDevice(), profile(tmp_path / "w"), options)
    finally:
        stop.set()
        killer.join()


def test_a_session_whose_worker_was_killed_is_taken_again(model: Artifact, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, memory_sessions=0, warmup=0.5, session=0.5)
    stop = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(tmp_path / "w", 1, stop))
    killer.start()
    try:
        found = by_metric(measure(model, LocalDevice(), profile(tmp_path / "w"), options))
    finally:
        stop.set()
        killer.join()
    assert found["runs_on_device"].samples == ((1.0,),)
    assert found["latency_wall"].context["killed_and_repeated"] == 1


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder for PATH with a python3 that has no packages."""
    import venv

    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    return tmp_path / "bare" / "bin"


def test_a_board_without_a_runtime_gets_the_command_that_mends_it(
    tmp_path: Path, bare_path: Path
) -> None:
    # the C API of the pushed library does not know variable tensors, and nothing else is there
    model = artifact(tmp_path, stateful_tflite())
    board = Wrapped(LocalDevice(), ["env", f"PATH={bare_path}:/usr/bin:/bin"])
    with pytest.raises(NotReadyError, match="no usable runtime") as caught:
        measure(model, board, profile(tmp_path / "w"), QUICK)
    assert caught.value.code == "no-runtime"
    assert "pip install ai-edge-litert==" in caught.value.hint


def test_a_bare_board_needs_no_packages(model: Artifact, tmp_path: Path, bare_path: Path) -> None:
    board = Wrapped(LocalDevice(), ["env", f"PATH={bare_path}:/usr/bin:/bin"])
    found = by_metric(measure(model, board, profile(tmp_path / "w"), QUICK))
    assert found["latency_wall"].context["backend"] == "litert-c"


def test_a_board_with_an_old_python_is_not_ready(model: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "python3").write_text("#!/bin/sh\necho '[\"/home/pi\", [3, 5, 3]]'\n")
    (folder / "python3").chmod(0o755)
    board = Wrapped(LocalDevice(), ["env", f"PATH={folder}:/usr/bin:/bin"])
    with pytest.raises(NotReadyError, match=r"is 3\.5\.3; the runner needs 3\.7"):
        measure(model, board, profile(tmp_path / "w"), QUICK)


def test_a_board_that_prints_a_banner_is_told_apart(model: Artifact, tmp_path: Path) -> None:
    board = Wrapped(LocalDevice(), ["sh", "-c", 'echo "Welcome"; exec "$@"', "sh"])
    with pytest.raises(CommandFailed, match="Welcome") as caught:
        measure(model, board, profile(tmp_path / "w"), QUICK)
    assert "bashrc" in caught.value.hint


def test_a_busy_board_says_who_holds_it(model: Artifact, tmp_path: Path) -> None:
    import fcntl

    work = tmp_path / "w"
    work.mkdir()
    with (work / "lock").open("w") as stream:
        stream.write(json.dumps({"job": "nightly", "owner": "ci@host"}))
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="nightly of ci@host"):
            measure(model, LocalDevice(), profile(work), QUICK)
    assert by_metric(measure(model, LocalDevice(), profile(work), QUICK))


def test_the_lease_of_another_job_is_not_taken_away(model: Artifact, tmp_path: Path) -> None:
    work = tmp_path / "w"
    work.mkdir()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + 1000
    owner = {"job": "nightly", "owner": "ci", "boot_id": boot_id, "until_boottime_s": until}
    (work / "lock").write_text(json.dumps(owner))
    with pytest.raises(Busy):
        measure(model, LocalDevice(), profile(work), QUICK)
    assert json.loads((work / "lock").read_text()) == owner


def test_a_work_folder_of_somebody_else_is_no_bug_of_ours(model: Artifact, tmp_path: Path) -> None:
    (tmp_path / "w/lock").mkdir(parents=True)  # cannot be opened, not even by root
    with pytest.raises(CommandFailed, match=r"cannot use a file: .*w/lock") as caught:
        measure(model, LocalDevice(), profile(tmp_path / "w"), QUICK)
    assert (caught.value.code, "work_dir" in caught.value.hint) == ("work-dir-unusable", True)


def test_a_profile_of_another_machine_is_refused(model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="describes a armv7l board"):
        measure(model, LocalDevice(), profile(tmp_path / "w", machine="armv7l"), QUICK)


@pytest.mark.parametrize(
    ("said", "changed", "why"),
    [
        (b'"temperature_c":null', b'"temperature_c":"hot"', "temperature"),
        (b'"alive":', b'"is_alive":', "not whole"),
    ],
)
def test_a_runner_that_answers_something_else_is_our_own_error(
    model: Artifact, tmp_path: Path, said: bytes, changed: bytes, why: str
) -> None:
    class Altered(Wrapped):
        def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
            done = super().run(argv, timeout_s=timeout_s)
            return Completed(done.returncode, done.stdout.replace(said, changed), done.stderr)

    board = fake_board(tmp_path / "root", "nonsense")  # it says no temperature
    with pytest.raises(CommandFailed, match=why):
        measure(model, Altered(board), profile(tmp_path / "w"), QUICK)


def test_a_budget_that_is_too_short_is_an_error(model: Artifact, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, memory_sessions=0, warmup=0.0, session=2.0, budget=2.0)
    with pytest.raises(CommandTimeout, match="longer than 2 s") as caught:
        measure(model, LocalDevice(), profile(tmp_path / "w"), options)
    assert "budget" in caught.value.hint


def fake_board(folder: Path, temperature_mc: str) -> Wrapped:
    """This machine, but with one thermal zone of a made-up /sys."""
    zone = folder / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal")
    (zone / "temp").write_text(temperature_mc)
    return Wrapped(LocalDevice(), ["env", f"EDGEPIPE_SYSROOT={folder}"])


def test_a_hot_board_is_waited_for_and_then_refused(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    monkeypatch.setattr(bench, "COOL_DOWN_S", 1.0)
    board = fake_board(tmp_path / "root", "71200")
    with caplog.at_level("INFO", logger="edgepipe"), pytest.raises(NotStable, match=r"71\.2 C"):
        measure(model, board, profile(tmp_path / "w"), QUICK)
    assert any("waiting for the device to cool down" in r.getMessage() for r in caplog.records)


def test_a_board_that_gets_too_hot_stops_the_measurement(model: Artifact, tmp_path: Path) -> None:
    board = fake_board(tmp_path / "root", "59000")
    zone = tmp_path / "root/sys/class/thermal/thermal_zone0/temp"
    done = threading.Event()

    def heat_up() -> None:  # as soon as the agent has begun
        while not done.wait(0.01):
            if list((tmp_path / "w").rglob("results.jsonl")):
                zone.write_text("71200")
                return

    limits = ThermalLimits(start_below=60.0, abort_above=70.0)
    heating = threading.Thread(target=heat_up)
    heating.start()
    try:
        with pytest.raises(NotStable, match="measuring stops above 70 C"):
            measure(model, board, profile(tmp_path / "w", thermal=limits), QUICK)
    finally:
        done.set()
        heating.join()


def test_a_runtime_for_an_unknown_version_is_not_guessed(model: Artifact, tmp_path: Path) -> None:
    options = MeasureOptions(backend="litert-c")
    with pytest.raises(RequestError, match=r"no LiteRT 9\.9\.9 library"):
        measure(model, LocalDevice(), profile(tmp_path / "w", runtime_version="9.9.9"), options)


def test_a_model_changed_since_its_record_is_refused(model: Artifact, tmp_path: Path) -> None:
    model.path.write_bytes(tiny_tflite(size=8))
    with pytest.raises(ArtifactError, match="has changed"):
        measure(model, LocalDevice(), profile(tmp_path / "w"), QUICK)


def test_samples_of_the_wrong_shape_are_found_before_the_board_is_asked(
    model: Artifact, tmp_path: Path
) -> None:
    from edgepipe.errors import DataError

    samples = {"x": np.zeros((2, 5), np.float32)}
    with pytest.raises(DataError, match=r"has shape \[1, 4\]"):
        measure(model, LocalDevice(), profile(tmp_path / "w"), QUICK, samples=samples)
    assert not (tmp_path / "w").exists()


# ------------------------------------------------------------------------------ command line


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **more}


def edgepipe(*arguments: str | Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgepipe", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
        env=environment(home, **more),
    )


SHORT = (
    "--sessions",
    "1",
    "--session",
    "50 ms",
    "--warmup",
    "20 ms",
    "--memory-sessions",
    "0",
    "--no-ops",
)


def test_bench_prints_a_table(model: Artifact, tmp_path: Path) -> None:
    done = edgepipe("bench", model.path, *SHORT, "--memory-sessions", "1", home=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("latency_wall", "p90, 99% bounds", "memory_anon", "litert-c", "1 x "):
        assert text in done.stdout
    assert "session 1/1: p50 " in done.stderr


def test_bench_gives_raw_samples_as_json(model: Artifact, tmp_path: Path) -> None:
    done = edgepipe("bench", model.path, *SHORT, "--json", "--quiet", home=tmp_path)
    data = json.loads(done.stdout)
    wall = next(m for m in data["measurements"] if m["metric"] == "latency_wall")
    assert len(wall["samples"][0]) >= bench.MIN_INFERENCES
    assert data["model_sha256"] == model.sha256


def test_bench_compares_outputs_for_samples(model: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", x=np.ones((2, 4), np.float32))
    done = edgepipe("bench", model.path, *SHORT, "--samples", "samples.npz", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "device_mismatch" in done.stdout


def test_bench_of_a_model_that_crashes_is_exit_1(tmp_path: Path) -> None:
    model = artifact(tmp_path, crashing_tflite())
    done = edgepipe("bench", model.path, *SHORT, "--backend", "litert-c", home=tmp_path)
    assert done.returncode == 1
    assert "runs on the device  NO" in done.stdout
    assert "SIGSEGV" in done.stdout


def test_a_model_that_crashes_does_not_take_the_comparison_along(tmp_path: Path) -> None:
    model = artifact(tmp_path, crashing_tflite())
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.float32))
    done = edgepipe("bench", model.path, *SHORT, "--samples", "x.npy", home=tmp_path)
    assert done.returncode == 2
    assert "crashes LiteRT (SIGSEGV)" in done.stderr


def test_bench_without_a_runtime_is_exit_3_with_the_command_that_mends_it(
    tmp_path: Path, bare_path: Path
) -> None:
    model = artifact(tmp_path, stateful_tflite())
    path = f"{bare_path}:/usr/bin:/bin"
    done = edgepipe("bench", model.path, *SHORT, home=tmp_path, PATH=path)
    assert done.returncode == 3
    assert "error: no usable runtime on local" in done.stderr
    assert "hint: on the device: python3 -m pip install ai-edge-litert==" in done.stderr


def test_bench_on_a_full_disk_is_exit_3_and_leaves_no_half_file(
    model: Artifact, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", home]  # the runtime is larger
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = edgepipe("bench", model.path, *SHORT, home=home)
        assert done.returncode == 3
        assert "no space left" in done.stderr
        assert "hint: free some space" in done.stderr
        names = [path.name for path in (home / ".edgepipe").rglob("*") if path.is_file()]
        assert [name for name in names if ".part" in name or name.startswith("job-")] == []
    finally:
        subprocess.run(["umount", home], check=True)


def test_an_interrupted_bench_leaves_the_board_free(model: Artifact, tmp_path: Path) -> None:
    work = tmp_path / ".edgepipe"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgepipe", "bench", model.path, "--session", "100 s"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"memory 2/2"):
                break
        deadline = time.monotonic() + 30
        while find_worker(work) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.communicate()
    assert find_worker(work) is None
    assert list((work / "jobs").iterdir()) == []
    done = edgepipe("bench", model.path, *SHORT, home=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_cpu_the_board_does_not_have_is_not_replaced_by_another(
    model: Artifact, tmp_path: Path
) -> None:
    done = edgepipe("bench", model.path, *SHORT, "--affinity", "0,8000", home=tmp_path)
    assert done.returncode == 2, done.stdout
    assert "affinity [0, 8000], but it may run on CPUs [0" in done.stderr


def test_an_account_without_a_name_can_measure(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    measure(model, LocalDevice(), profile(tmp_path / "w"), QUICK)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("absent.tflite",), 2, "absent.tflite"),
        (("text.tflite",), 2, "is not a TFLite file"),
        (("model.tflite", "--session", "2"), 2, "session: '2' is not a time"),
        (("model.tflite", "--session", "2 MB"), 2, "is not a time"),
        (("model.tflite", "--affinity", "a"), 2, "--affinity"),
        (("model.tflite", "--affinity=0,-1",), 2, "affinity = [0, -1]"),
        (("model.tflite", "--affinity", ""), 2, "--affinity ''"),
        (("model.tflite", "--device", ""), 2, "--device is empty"),
        (("model.tflite", "--profile", ""), 2, "--profile is empty"),
        (("model.tflite", "--sessions", "0"), 2, "sessions = 0"),
        (("model.tflite", "--threads", "99999999999999999999"), 2, "threads = 99999999999999999999"),
        (("model.tflite", "--budget", "1e30 s"), 2, "budget = 1e+30 s"),
        (("model.tflite", "--session", "10 min"), 2, "do not fit into budget = 600 s"),
        (("model.tflite", "--device", "carrier-pigeon://x", "--profile", "localhost"), 2, "carrier-pigeon"),
        (("model.tflite", "--samples", "text.tflite"), 2, "holds no arrays"),
        (("model.tflite", "--profile", "localhos"), 2, "did you mean 'localhost'"),
    ],
)  # fmt: skip
def test_bench_names_what_is_wrong(
    model: Artifact, tmp_path: Path, arguments: tuple[str, ...], code: int, named: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text.tflite").write_text("this is no model\n")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == code
    said = capsys.readouterr().err
    assert named in said
    assert "Traceback" not in said
    assert not (tmp_path / ".edgepipe").exists()
