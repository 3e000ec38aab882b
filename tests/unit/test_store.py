from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from edgepipe.errors import RequestError
from edgepipe.measurement import Measurement
from edgepipe.store import Store, replacing, write_json


def test_a_finished_step_is_found_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building("k1") as work:
        assert work is not None
        (work / "f").write_text("x")
        assert store.entry("k1") is None
    assert (store.entry("k1") / "f").read_text() == "x"  # type: ignore[operator]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_raises_leaves_nothing_behind(
    tmp_path: Path, error: type[BaseException]
) -> None:
    store = Store(tmp_path)
    with pytest.raises(error), store.building("k1") as work:
        (work / "half").write_text("x")  # type: ignore[operator]
        raise error
    assert store.entry("k1") is None
    assert list((tmp_path / "building").iterdir()) == []


def _build_slowly(root: Path, log: Path) -> None:
    with Store(root).building("k1") as work:
        if work is not None:
            with log.open("a") as stream:
                stream.write("built\n")
            time.sleep(0.5)
            (work / "f").write_text("x")


def test_two_processes_build_a_step_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_slowly, args=(tmp_path / "s", log)) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert log.read_text() == "built\n"
    assert (Store(tmp_path / "s").entry("k1") / "f").exists()  # type: ignore[operator]


def _build_for_ever(root: Path) -> None:
    with Store(root).building("k1"):
        time.sleep(600)


def test_a_killed_process_leaves_no_half_built_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build_for_ever, args=(tmp_path,))
    process.start()
    while not list(tmp_path.glob("building/*")):
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with Store(tmp_path).building("k1") as work:
        assert work is not None
        assert [p.name for p in (tmp_path / "building").iterdir()] == [work.name]
    assert Store(tmp_path).entry("k1")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_runs_are_listed_oldest_first_and_found_by_part_of_their_id(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = store.new_run("a"), store.new_run("b")
    assert {r.id for r in store.runs()} == {first.id, second.id}
    assert store.find_run(first.id[-6:]).id == first.id
    with pytest.raises(RequestError, match="no run called"):
        store.find_run("zzz")


def test_a_run_whose_process_died_says_so(tmp_path: Path) -> None:
    run = Store(tmp_path).new_run("a")
    assert run.read()["status"] == "running"
    run.update(pid=2**22 + 1)  # above the kernel's largest pid
    assert run.read()["status"] == "killed"


def test_a_run_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    run = Store(tmp_path).new_run("a")
    data = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(RequestError, match="schema 99"):
        run.read()


def test_measurements_come_back_with_every_raw_sample(tmp_path: Path) -> None:
    run = Store(tmp_path).new_run("a")
    measured = Measurement("latency_wall", "s", ((0.1, 0.2), (0.3,)), ((9.0,), ()), {1: "throttled"}, {"k": [1]})  # fmt: skip
    run.save_measurements("pi", {"latency_wall": measured})
    assert run.load_measurements("pi") == {"latency_wall": measured}


def test_a_step_that_is_no_longer_good_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building("k") as work:
        (work / "f").write_text("old")  # type: ignore[operator]
    with pytest.raises(RuntimeError), store.building("k", is_good=lambda entry: False):
        raise RuntimeError
    assert (tmp_path / "cache" / "k" / "f").read_text() == "old"
    with store.building("k", is_good=lambda entry: False) as work:
        (work / "f").write_text("new")  # type: ignore[operator]
    assert (tmp_path / "cache" / "k" / "f").read_text() == "new"
    assert list((tmp_path / "building").iterdir()) == []


def test_a_step_another_container_builds_is_not_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a process of another container has a number that no process here has
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    store = Store(tmp_path)
    with store.building("k1") as work:
        assert work is not None
        with Store(tmp_path).building("k2"):
            assert work.is_dir()
        (work / "f").write_text("x")
    assert store.entry("k1")


def test_runs_of_one_second_are_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ids = [store.new_run("a").id for _ in range(20)]
    assert [r.id for r in store.runs()] == ids
    assert store.find_run("latest").id == ids[-1]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": "1", "status": "complete"}'])
def test_a_damaged_record_of_a_run_is_named(tmp_path: Path, content: str) -> None:
    run = Store(tmp_path).new_run("a")
    (run.folder / "run.json").write_text(content)
    with pytest.raises(RequestError, match=r"run\.json is no record of a run"):
        run.read()


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for root in (tmp_path / "f", tmp_path / "f" / "store"):
        with pytest.raises(RequestError, match="it is no folder"):
            Store(root).new_run("a")
        with pytest.raises(RequestError, match="it is no folder"), Store(root).building("k"):
            pass


def stored(samples: str, metric: str = "load", unit: str = "s") -> str:
    return f'{{"schema": 1, "metric": "{metric}", "unit": "{unit}", "samples": [[{samples}]], "warmups": [], "excluded": {{}}, "context": {{}}}}'


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"metric": "x"}', '{"schema": 1, "metric": 5}',
        stored('"1"'), stored("NaN"), stored("0.1, -0.1"), stored("Infinity"),
        stored("1", metric="latency_wall"), stored("1", unit="ms"),
    ],
)  # fmt: skip
def test_a_damaged_measurement_is_named(tmp_path: Path, content: str) -> None:
    run = Store(tmp_path).new_run("a")
    folder = run.folder / "measurements" / "pi"
    folder.mkdir(parents=True)
    (folder / "load.json").write_text(content)
    with pytest.raises(RequestError, match=r"load\.json is no record of a measurement"):
        run.load_measurements("pi")


def test_a_full_disk_is_told_by_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    """The error of a copy names its source."""
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "source"))
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/model\.tflite'"),
        replacing(tmp_path / "model.tflite"),
    ):
        raise full
    assert list(tmp_path.iterdir()) == []
