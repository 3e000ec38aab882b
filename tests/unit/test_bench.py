"""Options of a measurement, what is planned for a board, and when enough sessions were taken."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import bench, cli
from edgepipe.bench import MeasureOptions, measure, plan_of
from edgepipe.commands.on_device import tflite_model
from edgepipe.errors import EXIT_PASS, EXIT_REQUEST, ProfileError, RequestError
from edgepipe.job import BoardJob, Outcome
from edgepipe.payload import payload_files
from edgepipe.preflight import check_board
from edgepipe.profile import Budgets, Delegation, ThermalLimits, find_profile, load_profile
from edgepipe.resources import profile_paths
from edgepipe.schema import build
from edgepipe.testing import NullDevice
from edgepipe.tflite_ops.flatbuffer import signature_graphs
from edgepipe.tflite_ops.tiny import tiny_tflite

from .board_side import bucket_files, merged_file
from .test_sessions import arm, latency


def test_options_are_written_with_units() -> None:
    written = {"session": "300 ms", "budget": "1 min", "tolerance": "2 %", "sustained": "1 h", "energy": False}  # fmt: skip
    options = build(MeasureOptions, written, where="t", error=RequestError)
    assert (options.session, options.budget, options.tolerance) == (0.3, 60.0, 0.02)
    assert (options.sustained, options.energy) == (3600.0, False)
    with pytest.raises(RequestError, match="did you mean 'session'"):
        build(MeasureOptions, {"sesion": "2 s"}, where="t", error=RequestError)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sessions": 0}, "sessions = 0"),
        ({"max_sessions": 0}, "] max_sessions = 0 is not 1 or more$"),
        ({"tolerance": "0 %"}, "] tolerance = 0 % is not above 0 %"),
        ({"evaluate_samples": -1}, "evaluate_samples = -1"),
        ({"sustained": "2000 h"}, "sustained = 7.2e"),
        ({"kernel": "fast"}, "kernel"),
        ({"energy": "maybe"}, "energy"),
        ({"session": "10 min"}, "do not fit into budget = 600 s"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        build(MeasureOptions, options, where="t", error=RequestError)


def test_every_profile_of_a_linux_board_names_a_target_with_an_agent() -> None:
    targets = {load_profile(path).target for path in profile_paths().values()}
    for target in targets - {"android"}:
        assert payload_files(target)[0] == "agent.py"


def test_a_profile_decides_where_the_recipe_says_nothing(tmp_path: Path) -> None:
    asked = dataclasses.replace(
        find_profile("rock5b_8gb", profile_paths()),
        governor="schedutil",
        page_size_bytes=65536,
        runtime_sha256="1" * 64,
        delegation=Delegation(min_share=0.9),
        budgets=Budgets(latency=0.02),
    )
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_tflite())
    model = tflite_model(path)

    def context(**options: Any) -> dict[str, Any]:
        chosen = MeasureOptions(sessions=1, memory_sessions=0, session=0.2, warmup=0.0, **options)
        return measure(model, NullDevice(), asked, chosen).measurements[0].context

    found = context()
    assert found["affinity"] == [4, 5, 6, 7]
    assert found["kernel_mode"] == "xnnpack"
    assert found["required_delegated_share"] == 0.9
    assert found["budgets"] == {"latency": 0.02, "memory": None}
    departs = " ".join(found["departs_from_profile"])
    assert "runtime_sha256 is" in departs
    assert "page_size_bytes is" in departs
    assert "governor is" in departs
    assert context(affinity=(0,))["affinity"] == [0]
    assert context(kernel="builtin")["kernel_mode"] == "builtin"


def test_a_thermal_zone_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_tflite())
    chosen = MeasureOptions(sessions=1, memory_sessions=0, session=0.2, warmup=0.0)
    for zones, refused in ((("cpu-thermal",), ""), (("cpu-thermal", "gpu"), "no thermal zone gpu")):
        watching = ThermalLimits(start_below=60.0, abort_above=80.0, zones=zones)
        asked = dataclasses.replace(find_profile("rpi5_8gb", profile_paths()), thermal=watching)
        with (
            pytest.raises(ProfileError, match=refused) if refused else contextlib.nullcontext()
        ):  # fmt: skip
            measure(tflite_model(path), NullDevice(), asked, chosen)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A file of the signatures length8 (the main graph), length16 and length4."""
    path = tmp_path / "merged.tflite"
    path.write_bytes(merged_file())
    return path


def test_a_file_of_several_signatures_is_measured_by_the_name_of_one(
    merged: Path, tmp_path: Path
) -> None:
    """The null device reads the inputs out of the file it was given."""
    own = tmp_path / "own.tflite"
    own.write_bytes(bucket_files()["length16"])
    profile, base = find_profile("localhost", profile_paths()), tflite_model(own)
    options = MeasureOptions(sessions=1, memory_sessions=0, session=0.2, warmup=0.0)
    found = {}
    for key in bucket_files():
        result = measure(tflite_model(merged, signature=key), NullDevice(), profile, options)
        context = result.measurements[0].context
        assert context["model_signature"] == key
        (tensor,) = context["model_inputs"]
        found[tensor["shape"][1]] = result.raw["job"]["id"]
    assert list(found) == [8, 16, 4]
    assert len(set(found.values())) == 3  # what was measured of one is not taken for another
    beside = measure(
        tflite_model(merged, signature="length16"), NullDevice(), profile,
        dataclasses.replace(options, max_sessions=1), baseline=base, same_inputs=True,
    ).measurements[0].context  # fmt: skip
    assert beside["baseline_inputs"] == beside["model_inputs"]
    assert "baseline_signature" not in beside


def test_bench_takes_the_name_and_says_which_it_measured(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--device", "null://quiet", "--session", "0.2 s", "--quiet", "--store", str(tmp_path)]
    assert cli.main(["bench", str(merged), "--signature", "length4", *more]) == EXIT_PASS
    assert f"{merged} signature length4 on localhost" in capsys.readouterr().out
    assert cli.main(["bench", str(merged), "--signature", "length4", "--json", *more]) == EXIT_PASS
    assert json.loads(capsys.readouterr().out)["signature"] == "length4"
    assert cli.main(["bench", str(merged), *more]) == EXIT_REQUEST
    assert "hint: name the one that is meant: --signature length8" in capsys.readouterr().err


def test_which_signature_is_meant_is_not_guessed(merged: Path) -> None:
    with pytest.raises(RequestError, match="called by signature: length8, length16, length4") as asked:  # fmt: skip
        tflite_model(merged, signature="")
    assert (asked.value.code, asked.value.hint) == ("which-signature", "name the one that is meant: --signature length8")  # fmt: skip
    with pytest.raises(RequestError, match="has no signature 'length5'; it has: length8, length16") as unknown:  # fmt: skip
        tflite_model(merged, signature="length5")
    assert unknown.value.code == "no-such-signature"
    model = dataclasses.replace(tflite_model(merged, signature="length4"), signature="length5")
    profile, device = find_profile("localhost", profile_paths()), NullDevice()
    with pytest.raises(RequestError, match="has no signature 'length5'"):
        measure(model, device, profile, MeasureOptions())
    assert not device.files  # nothing was pushed
    with pytest.raises(RequestError) as unable:  # edgepipe explain has no --signature
        tflite_model(merged)
    assert unable.value.hint.startswith("give the file of one of them alone")


def test_a_file_without_signatures_has_none_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_tflite())
    assert tflite_model(path, signature="").signature == ""
    with pytest.raises(RequestError, match="it has: none"):
        tflite_model(path, signature="x")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_signatures_of_a_damaged_file_are_read_or_there_are_none(data: st.DataObject) -> None:
    content = bytearray(merged_file())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=20)):
        content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tflite"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        found = signature_graphs(path)
    assert all(isinstance(key, str) and isinstance(found[key], int) for key in found)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        ("Raspberry Pi 4 Model B Rev 1.5", ""),
        (None, ""),  # a board that does not name itself
        ("Raspberry Pi 5 Model B Rev 1.0", "is a Raspberry Pi 5 Model B, profile rpi4b_4gb"),
        ("Raspberry Pi 400 Rev 1.0", "is a Raspberry Pi 400"),
    ],
)
def test_a_board_of_another_kind_is_not_measured_under_a_profile(
    model: str | None, refused: str
) -> None:
    profile = find_profile("rpi4b_4gb", profile_paths())
    expected = pytest.raises(ProfileError, match=refused) if refused else contextlib.nullcontext()
    with expected:
        check_board({"machine": "aarch64", "model": model}, profile, "ssh://pi@board")


# ------------------------------------------------------------------------------- the plan


def tags(*arms: str, sessions: int = 1, inferences: int = 0, **options: Any) -> list[str]:
    plan = plan_of(MeasureOptions(**options), arms, sessions, inferences)
    assert all(set(entry["arms"]) <= set(arms) for entry in plan)
    return [entry["tag"] for entry in plan]


def test_one_model_is_measured_by_itself() -> None:
    found = tags("model", inferences=1, memory_sessions=1, sustained=60.0)
    assert found == [
        "outputs-1", "memory-model-1", "ops-model-1", "latency-1",
        "instructions-model-1", "instructions-model-2", "instructions-model-3", "energy-1", "sustained-1",
    ]  # fmt: skip


def test_what_is_not_wanted_is_not_planned() -> None:
    assert tags("model", sessions=2, ops=False, energy=False, instructions=False, memory_sessions=0) == ["latency-1", "latency-2"]  # fmt: skip


def test_beside_a_baseline_latency_is_measured_in_one_process_and_memory_in_two() -> None:
    options = MeasureOptions(memory_sessions=1, ops=True, energy=True, instructions=False)
    plan = plan_of(options, ["base", "candidate"], 1, inferences=3)
    arms = {entry["tag"]: entry["arms"] for entry in plan}
    assert arms == {
        "outputs-1": ["candidate"], "memory-base-1": ["base"], "memory-candidate-1": ["candidate"],
        "ops-base-1": ["base"], "ops-candidate-1": ["candidate"],
        "latency-1": ["base", "candidate"], "energy-1": ["candidate"],
    }  # fmt: skip


EMULATED = ("latency", "ops", "energy", "sustained")


def test_on_an_emulated_board_nothing_is_timed() -> None:
    plan = plan_of(MeasureOptions(memory_sessions=1, sustained=60), ["base", "candidate"], 3, 1, EMULATED)  # fmt: skip
    assert {entry["kind"] for entry in plan} == {"outputs", "memory", "instructions"}
    assert {tuple(e["arms"]) for e in plan if e["kind"] == "instructions"} == {("base",), ("candidate",)}  # fmt: skip


def test_every_model_runs_where_nothing_can_be_measured() -> None:
    nothing = (*EMULATED, "memory", "instructions")
    assert [e["arms"] for e in plan_of(MeasureOptions(), ["base", "candidate"], 3, 0, nothing)] == [["base"], ["candidate"]]  # fmt: skip
    assert [e["tag"] for e in plan_of(MeasureOptions(), ["model"], 3, 1, nothing)] == ["outputs-1"]


def test_many_inferences_are_asked_for_in_pieces() -> None:
    plan = plan_of(MeasureOptions(), ["model"], 1, 2 * bench.OUTPUTS_PER_SESSION + 1)
    pieces = [entry for entry in plan if entry["kind"] == "outputs"]
    assert [entry["tag"] for entry in pieces] == ["outputs-1", "outputs-2", "outputs-3"]
    assert [(entry["first"], entry["count"]) for entry in pieces] == [
        (0, 250),
        (250, 250),
        (500, 1),
    ]


def test_a_longer_plan_asks_for_all_of_a_shorter_one() -> None:
    shorter, longer = tags("base", "candidate", sessions=3), tags("base", "candidate", sessions=5)
    assert set(shorter) < set(longer)
    assert set(longer) - set(shorter) == {"latency-4", "latency-5"}


@pytest.mark.parametrize(("sustained", "window_s"), [(5.0, 0.5), (600.0, 60.0), (7200.0, 60.0)])
def test_a_long_run_is_told_of_by_the_minute(sustained: float, window_s: float) -> None:
    *_, last = plan_of(MeasureOptions(sustained=sustained), ["model"], 1)
    assert (last["duration_s"], last["window_s"]) == (sustained, window_s)


# ------------------------------------------------------------------------------- looks


@dataclasses.dataclass
class SlowBoard:
    """Stands for a `BoardJob`: the candidate's ratio in each session is what it is told."""

    ratios: Sequence[float]
    flags: Sequence[list[str]] = ()
    left_s: float = 600.0
    session_s: float = 3.0
    job: dict[str, Any] = dataclasses.field(default_factory=lambda: {"threads": 1})
    asked: list[int] = dataclasses.field(default_factory=list)

    def run(self, plan: Sequence[dict[str, Any]]) -> Outcome:
        self.asked.append(sum(entry["kind"] == "latency" for entry in plan))
        sessions = tuple(self.session(i) for i in range(self.asked[-1]))
        return Outcome(sessions, None, {}, [], 0, 0, "b1", ())

    def session(self, number: int) -> dict[str, Any]:
        times = [1_000_000] * 9
        slower = [round(ns * self.ratios[number]) for ns in times]
        flags = self.flags[number] if number < len(self.flags) else []
        health = {"boot_id": "b1", "monotonic_s": 0.0}
        both = {"base": arm(wall_ns=times, cpu_ns=times), "candidate": arm(wall_ns=slower, cpu_ns=slower)}  # fmt: skip
        after = {**health, "monotonic_s": self.session_s}
        return latency(arms=both, before=health, after=after, flags=flags)


def looks(board: SlowBoard, **options: Any) -> list[int]:
    models: Any = {"base": None, "candidate": None}
    job: BoardJob = board  # type: ignore[assignment]
    bench._run_sessions(job, MeasureOptions(**options), models, 0)
    return board.asked


def spread(around: float, sd: float) -> list[float]:
    return [around * (1 + sd * (-1) ** i * (1 + i % 3)) for i in range(12)]


def test_a_clear_slowdown_is_decided_at_the_first_look() -> None:
    assert looks(SlowBoard(spread(1.06, 0.001))) == [3]
    assert looks(SlowBoard(spread(1.0, 0.001))) == [3]


def test_sessions_are_added_until_the_slowdown_is_decided_or_there_are_12() -> None:
    assert looks(SlowBoard(spread(1.0, 0.01))) == [3, 5, 8]
    assert looks(SlowBoard(spread(1.03, 0.01))) == [3, 5, 8, 12]
    assert looks(SlowBoard(spread(1.03, 0.01)), tolerance=0.5) == [3]


def test_the_first_look_has_the_sessions_asked_for_and_the_last_the_most_allowed() -> None:
    undecided = spread(1.03, 0.01)
    assert looks(SlowBoard(undecided), sessions=4) == [4, 5, 8, 12]
    assert looks(SlowBoard(undecided), sessions=12) == [12]
    assert looks(SlowBoard(undecided), max_sessions=5) == [3, 5]
    assert looks(SlowBoard(undecided), max_sessions=6) == [3, 5, 6]
    assert looks(SlowBoard(undecided), sessions=1, max_sessions=1) == [1]


def test_sessions_that_do_not_count_decide_nothing() -> None:
    throttled = [["throttle_event"]] * 2
    assert looks(SlowBoard(spread(1.0, 0.001), flags=throttled)) == [3, 5]


def test_no_sessions_are_begun_that_the_budget_has_no_room_for() -> None:
    assert looks(SlowBoard(spread(1.03, 0.01), left_s=10.0)) == [3, 5, 8]  # 4 more take 12 s


def test_one_model_by_itself_takes_the_sessions_asked_for() -> None:
    board = SlowBoard(spread(1.03, 0.01))
    job: BoardJob = board  # type: ignore[assignment]
    bench._run_sessions(job, MeasureOptions(sessions=4), {"model": None}, 0)  # type: ignore[dict-item]
    assert board.asked == [4]
