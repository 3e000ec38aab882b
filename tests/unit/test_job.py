"""The conversation with a board's agent: its answers, checked, and what the host makes of them.

The agent here is a script of answers; tests/e2e runs the real one through the same faults.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe import job as job_module
from edgepipe.device.base import Completed
from edgepipe.errors import (
    Busy,
    CommandFailed,
    CommandTimeout,
    EdgepipeError,
    NotReadyError,
    NotStable,
    RequestError,
    TransferError,
)
from edgepipe.job import BoardJob, finished, parse_facts, parse_journal, parse_status
from edgepipe.payload import Payload

from .test_sessions import energy, latency, memory, ops, session, sustained

START = {"kind": "start", "job": "j", "identity": "i1", "boot_id": "b1", "realtime_s": 1000.0, "device": {}, "runtime": {"backend": "litert-c"}, "rejected": []}  # fmt: skip
KILLED = session("memory", ["model"], None, cause={"what": "killed", "message": "someone killed it"})  # fmt: skip


def line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def done(tag: str, result: Mapping[str, Any] | None = None, boot_id: str = "b1") -> dict[str, Any]:
    return {"kind": "session", "tag": tag, "boot_id": boot_id, "session": result or memory()}


def state(phase: str = "running", **changes: Any) -> dict[str, Any]:
    return {
        "schema": 2, "job": "j", "phase": phase, "pid": 1, "boot_id": "b1", "boottime_s": 5.0,
        "tag": None, "sessions_done": 0, "journal_bytes": 0, "code": 0 if phase == "done" else None,
        "error": None, "message": "",
    } | changes  # fmt: skip


# ------------------------------------------------------------------------------- the journal

EVERY_KIND = (
    START, done("memory-1"), done("latency-1", latency()), done("ops-1", ops("model", 5)),
    done("sustained-1", sustained(5e6)), done("energy-1", energy(1, 2)), done("memory-2", KILLED),
    {"kind": "end", "code": 0, "error": None, "message": "", "runs_on_device": True},
)  # fmt: skip


def test_a_whole_journal_is_read() -> None:
    found = parse_journal("".join(map(line, EVERY_KIND)))
    assert found.lines == EVERY_KIND
    assert not found.damaged


def test_nothing_is_a_journal_without_lines() -> None:
    assert parse_journal("") == job_module.Journal((), damaged=False)


def test_a_torn_or_altered_line_ends_what_is_trusted() -> None:
    whole = [line(record) for record in EVERY_KIND]
    torn = parse_journal("".join(whole[:2]) + whole[2][:-20])
    assert (torn.lines, torn.damaged) == (EVERY_KIND[:2], True)
    altered = whole[1].replace("4096", "4097")
    assert altered != whole[1]
    middle = parse_journal(whole[0] + altered + whole[2])
    assert (middle.lines, middle.damaged) == (EVERY_KIND[:1], True)


TEXT = "".join(map(line, EVERY_KIND))


@given(at=st.integers(0, len(TEXT) - 1), to=st.characters(codec="ascii"))
def test_a_changed_character_never_gives_a_line_that_was_not_written(at: int, to: str) -> None:
    found = parse_journal(TEXT[:at] + to + TEXT[at + 1 :])
    assert found.lines == EVERY_KIND[: len(found.lines)]
    assert found.damaged == (len(found.lines) < len(EVERY_KIND))


@given(at=st.integers(0, len(TEXT)))
def test_a_cut_journal_gives_its_whole_lines(at: int) -> None:
    found = parse_journal(TEXT[:at])
    assert found.lines == EVERY_KIND[: len(found.lines)]
    assert len(found.lines) == TEXT[:at].count("\n")


@pytest.mark.parametrize(
    "record",
    [
        "text",
        {"kind": "other"},
        {**START, "realtime_s": None},
        {**START, "identity": None},
        {**done("t"), "tag": 1},
        {"kind": "end", "code": "0"},
        {"kind": "end", "code": 70, "cause": "it died"},
        *(
            done("t", wrong)
            for wrong in (
                {**memory(), "flags": None},
                {**memory(), "arms": "model"},
                {**memory(), "arms": []},
                {**memory(), "before": None},
                {**memory(), "after": {"temperature_c": "hot"}},
                {**memory(), "kind": "hot"},
                {**memory(), "data": None, "cause": None},
                {**memory(), "data": None, "cause": {"what": "killed"}},
                {**memory(), "data": None, "cause": {"message": "killed"}},
                memory(anon_bytes="4096"),
                memory(anon_bytes=True),
                latency(arms={"model": {}}),
                {**latency(), "arms": ["base"]},
                {**ops("model", 5), "data": {"ops": [{}]}},
                {**ops("model", 5), "data": {"ops": [{"index": 0, "name": "A", "where": "x", "ns": []}]}},
                sustained(),
                sustained(float("nan")),
                sustained(float("inf")),
                {**energy(1, 2), "data": {**energy(1, 2)["data"], "inferences": 0}},
                session("outputs", ["model"], {"outputs": [{"name": "y"}], "count": 1, "path": "p", "size": 1, "sha256": ""}),
            )
        ),
    ],
)  # fmt: skip
def test_a_line_that_is_not_whole_is_not_trusted_whatever_its_checksum(record: Any) -> None:
    assert parse_journal(line(START) + line(record)).lines == (START,)


ARM = latency()["data"]["arms"]["model"]


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu_ns": [1]}, {"wall_ns": [], "cpu_ns": []}, {"wall_ns": [-1] * 30}, {"inner_loops": 0},
        {"cold": None}, {"cold": {"load_ns": 1, "resident_share": "all"}}, {"load_ns": None},
    ],
)  # fmt: skip
def test_samples_that_are_not_whole_are_not_trusted(changes: dict[str, Any]) -> None:
    wrong = latency(arms={"model": {**ARM, **changes}})
    assert parse_journal(line(START) + line(done("latency-1", wrong))).lines == (START,)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(key=st.sampled_from(sorted(ARM)), value=JSON)
def test_a_session_with_one_wrong_value_is_taken_or_refused_but_never_a_bug(
    key: str, value: Any
) -> None:
    from edgepipe.sessions import to_measurements

    text = line(done("latency-1", latency(arms={"model": {**ARM, key: value}})))
    for found in parse_journal(text).lines:
        to_measurements([found["session"]], {"boot_id": "b1"}, threads=1)


def test_what_the_board_finished_before_a_reboot_or_for_another_job_does_not_count() -> None:
    rebooted = [START, done("memory-1"), {**START, "boot_id": "b2"}, done("memory-2", boot_id="b2")]
    assert set(finished(rebooted)) == {"memory-2"}
    other = [START, done("memory-1"), {**START, "identity": "i2"}, done("memory-2")]
    assert set(finished(other)) == {"memory-2"}
    resumed = [START, done("memory-1"), START, done("memory-2")]
    assert set(finished(resumed)) == {"memory-1", "memory-2"}
    assert finished([done("memory-1")]) == {}


def test_a_killed_worker_leaves_its_session_to_be_done_and_a_missing_profiler_does_not() -> None:
    cannot = session("ops", ["model"], None, cause={"what": "unsupported", "message": "no profiler"})  # fmt: skip
    assert set(finished([START, done("memory-1", KILLED), done("ops-1", cannot)])) == {"ops-1"}
    again = finished([START, done("memory-1", KILLED), done("memory-1")])
    assert again["memory-1"]["data"] is not None


# ------------------------------------------------------------------------------- answers

ANSWER = {"schema": 2, "code": 0, "error": None, "message": "", "state": state(), "alive": True, "rebooted": False, "journal": "", "offset": 0}  # fmt: skip


def test_a_whole_answer_is_taken() -> None:
    found = parse_status(json.dumps(ANSWER).encode())
    assert (found.code, found.alive, found.state) == (0, True, state())


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "2"}, {"schema": -1}, {"code": 70}, {"owner": "pi"}, {"message": None},
        {"alive": "yes"}, {"rebooted": 1}, {"journal": None}, {"offset": -1}, {"state": "running"},
        {"state": {}}, {"state": state("failed")}, {"state": state(boottime_s=None)},
        {"state": state(journal_bytes="0")}, {"state": state(cause="it died")},
    ],
)  # fmt: skip
def test_an_answer_that_is_not_whole_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CommandFailed):
        parse_status(json.dumps(ANSWER | changes).encode())


def test_a_login_banner_before_the_answer_is_refused_with_a_hint() -> None:
    with pytest.raises(CommandFailed, match="Welcome to pi!") as caught:
        parse_status(b"Welcome to pi!\n" + json.dumps(ANSWER).encode(), address="ssh://pi")
    assert "ssh://pi" in caught.value.message
    assert "bashrc" in caught.value.hint


def test_a_killed_agent_is_no_answer() -> None:
    with pytest.raises(CommandFailed, match="Killed"):
        parse_status(b"", stderr=b"Killed", returncode=137)


def test_a_newer_agent_is_refused() -> None:
    with pytest.raises(RequestError, match="schema 3"):
        parse_status(json.dumps(ANSWER | {"schema": 3}).encode())


@given(st.binary(max_size=200))
def test_garbage_is_our_own_error(raw: bytes) -> None:
    for parse in (parse_status, parse_facts):
        with pytest.raises(EdgepipeError):
            parse(raw)


@given(key=st.sampled_from(sorted(ANSWER)), value=JSON)
def test_an_answer_with_one_wrong_value_is_taken_or_refused_but_never_a_bug(
    key: str, value: Any
) -> None:
    try:
        found = parse_status(json.dumps(ANSWER | {key: value}).encode())
    except EdgepipeError:
        return
    parse_journal(found.journal)


# ------------------------------------------------------------------------------- the conversation

Answer = dict[str, Any] | Exception


class ScriptedAgent:
    """A device whose agent gives these answers to `start` and `status`, the last one for ever."""

    address = "ssh://board"

    def __init__(self, *, start: Sequence[Answer] = ({},), status: Sequence[Answer]) -> None:
        self.answers = {"start": list(start), "status": list(status), "end": [{"state": None}]}
        self.asked: list[str] = []
        self.pushed: list[dict[str, Any]] = []

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        verb = argv[2]
        self.asked.append(" ".join(a for a in argv[2:] if a != "/w/jobs/j"))
        left = self.answers[verb]
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        whole = ANSWER | answer
        return Completed(whole["code"], json.dumps(whole).encode(), b"")

    def push(self, local: Path, remote: str) -> bool:
        self.pushed.append(json.loads(local.read_text()))
        return True

    def pull(self, remote: str, local: Path) -> None:
        raise AssertionError(remote)

    def close(self) -> None: ...


PLAN = [{"tag": f"memory-{n}", "kind": "memory", "arms": ["model"]} for n in (1, 2)]
JOB = {"id": "j", "work_dir": "/w", "budget_s": 60.0, "warmup_s": 0.5, "session_s": 2.0}


def board_job(agent: ScriptedAgent, **changes: Any) -> BoardJob:
    payload = Payload("/w/agents/p", "/w/agents/p/agent.py", "/w/agents/p/probe.py", "p")
    return BoardJob(agent, payload, JOB | changes, "/w/jobs/j", runtime_hint="pip install it")


def news(*records: Mapping[str, Any], after: Sequence[Mapping[str, Any]] = (), **changes: Any) -> dict[str, Any]:  # fmt: skip
    """An answer to status: these lines of the journal, after others that were fetched before."""
    text, offset = "".join(map(line, records)), len("".join(map(line, after)))
    end = offset + len(text)
    state_changes = changes.pop("state", {})
    return {"state": state(**{"journal_bytes": end} | state_changes), "journal": text, "offset": end} | changes  # fmt: skip


ALL = (START, done("memory-1"), done("memory-2"))
DONE = {"state": {"phase": "done", "code": 0}}


def test_sessions_come_as_they_finish_in_the_order_of_the_plan(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = (START, done("memory-2"))
    agent = ScriptedAgent(status=[news(*first), news(done("memory-1"), after=first, **DONE)])
    with caplog.at_level("INFO", logger="edgepipe"):
        outcome = board_job(agent).run(PLAN)
    assert [s["tag"] for s in outcome.sessions] == ["memory-1", "memory-2"]
    assert (outcome.failure, outcome.resumed, outcome.repeated) == (None, 0, 0)
    assert (outcome.runtime, outcome.boot_id) == ({"backend": "litert-c"}, "b1")
    assert [r.getMessage() for r in caplog.records] == ["memory 2/2", "memory 1/2"]
    assert agent.pushed[0]["plan"] == PLAN
    assert [a.split()[0] for a in agent.asked] == ["start", "status", "status"]


def test_an_end_without_all_sessions_is_never_a_result() -> None:
    agent = ScriptedAgent(status=[news(START, done("memory-1"), **DONE)])
    with pytest.raises(NotStable, match="left out memory-2") as caught:
        board_job(agent).run(PLAN)
    assert caught.value.code == "agent-lost"
    assert sum(a == "start" for a in agent.asked) == 3


def test_a_dead_agent_is_started_again_and_its_sessions_kept_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dead = news(START, done("memory-1"), alive=False)
    agent = ScriptedAgent(status=[dead, news(after=ALL[:2], alive=False), news(*ALL, **DONE)])
    with caplog.at_level("INFO", logger="edgepipe"):
        outcome = board_job(agent).run(PLAN)
    assert len(outcome.sessions) == 2
    assert caplog.text.count("memory 1/2") == caplog.text.count("memory 2/2") == 1
    assert [a for a in agent.asked if not a.startswith("status")] == ["start", "end --keep", "start"]  # fmt: skip


def test_an_agent_that_ended_between_two_looks_is_not_taken_for_dead() -> None:
    agent = ScriptedAgent(status=[news(*ALL, alive=False), news(after=ALL, alive=False, **DONE)])
    assert len(board_job(agent).run(PLAN).sessions) == 2
    assert agent.asked.count("start") == 1


def test_a_journal_longer_than_one_answer_is_fetched_to_its_end() -> None:
    size = len("".join(map(line, ALL)))
    part = news(*ALL[:2], state={"phase": "done", "code": 0, "journal_bytes": size})
    agent = ScriptedAgent(status=[part, news(*ALL[2:], after=ALL[:2], **DONE)])
    assert len(board_job(agent).run(PLAN).sessions) == 2
    assert agent.asked.count("start") == 1


def test_three_dead_agents_are_enough() -> None:
    agent = ScriptedAgent(status=[{"alive": False}])
    with pytest.raises(NotStable, match="lost 3 times") as caught:
        board_job(agent).run(PLAN)
    assert (caught.value.code, "agent.log" in caught.value.hint) == ("agent-lost", True)


def test_a_restarted_board_is_measured_from_the_start_once() -> None:
    fresh = (
        {**START, "boot_id": "b2"}, done("memory-1", boot_id="b2"), done("memory-2", boot_id="b2")
    )  # fmt: skip
    agent = ScriptedAgent(
        status=[news(START, done("memory-1")), {"rebooted": True, "alive": False}, news(*fresh, **DONE)]
    )  # fmt: skip
    outcome = board_job(agent).run(PLAN)
    assert (outcome.boot_id, len(outcome.sessions)) == ("b2", 2)
    agent = ScriptedAgent(status=[{"rebooted": True}])
    with pytest.raises(NotStable) as caught:
        board_job(agent).run(PLAN)
    assert (caught.value.code, agent.asked.count("start")) == ("rebooted", 2)


def test_sessions_from_before_a_reboot_are_not_mixed_with_later_ones() -> None:
    lines = (START, done("memory-1"), {**START, "boot_id": "b2"}, done("memory-2", boot_id="b2"))
    agent = ScriptedAgent(status=[news(*lines, **DONE)])
    with pytest.raises(NotStable, match="left out memory-1"):
        board_job(agent).run(PLAN)


def test_a_journal_that_was_altered_is_read_again_after_a_new_start() -> None:
    altered = news(*ALL) | {"journal": "".join(map(line, ALL)).replace("4096", "4097")}
    agent = ScriptedAgent(status=[altered, news(*ALL, **DONE)])
    outcome = board_job(agent).run(PLAN)
    assert {s["data"]["anon_bytes"] for s in outcome.sessions} == {4096}
    assert agent.asked == ["start", "status 0 20", "end --keep", "start", "status 0 20"]


def test_a_journal_that_shrank_is_read_from_its_start_again() -> None:
    shrunk = news(START) | {"offset": len(line(START))}
    agent = ScriptedAgent(status=[news(*ALL[:2]), shrunk, news(*ALL, **DONE)])
    outcome = board_job(agent).run(PLAN)
    assert (len(outcome.sessions), outcome.journal) == (2, ALL)


def test_an_agent_without_a_heartbeat_is_dead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job_module, "HEARTBEAT_MARGIN_S", -3.0)  # with 2.5 s of a session: at once
    agent = ScriptedAgent(status=[news(START)] + [news(after=ALL[:1])] * 2 + [news(*ALL, **DONE)])
    outcome = board_job(agent).run(PLAN)
    assert len(outcome.sessions) == 2
    assert "end --keep" in agent.asked
    assert "it shows no sign of life" in caplog.text


def test_an_agent_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    silence = CommandTimeout("no answer")
    agent = ScriptedAgent(start=[silence, silence, {}], status=[silence, news(*ALL, **DONE)])
    assert len(board_job(agent).run(PLAN).sessions) == 2
    with pytest.raises(CommandTimeout):
        board_job(ScriptedAgent(start=[silence], status=[{}])).run(PLAN)


def failing(code: int, error: str, message: str = "why", **more: Any) -> ScriptedAgent:
    """An agent whose job ends like this, as soon as it is started."""
    failed = state("failed", code=code, error=error, message=message, **more)
    return ScriptedAgent(start=[{"code": code, "state": failed}], status=[{"state": failed, "alive": False}])  # fmt: skip


@pytest.mark.parametrize(
    ("code", "error", "kind", "named", "hint"),
    [
        (64, "bad-request", RequestError, "why", "affinity"),
        (64, "bad-job", CommandFailed, "code 64", "bug in edgepipe"),
        (65, "data-mismatch", TransferError, "does not hold what was pushed", "storage"),
        (69, "no-runtime", NotReadyError, "no usable runtime", "pip install it"),
        (71, "os-error", CommandFailed, "cannot use a file", "/w"),
        (73, "disk-full", TransferError, "disk of ssh://board is full", "rm -r /w/models"),
        (75, "busy", Busy, r"busy: why \(job nightly of ci\)", "wait"),
        (78, "too-hot", NotStable, "not fit to measure: why", "heat sink"),
        (1, "bug", CommandFailed, "code 1", "bug in edgepipe"),
    ],
)
def test_each_code_of_the_agent_is_an_error_with_a_remedy(
    code: int, error: str, kind: type[EdgepipeError], named: str, hint: str
) -> None:
    with pytest.raises(kind, match=named) as caught:
        board_job(failing(code, error, owner={"job": "nightly", "owner": "ci"})).run(PLAN)
    assert hint in caught.value.hint


def test_a_start_without_a_state_is_an_error_too() -> None:
    agent = ScriptedAgent(start=[{"code": 73, "message": "no space", "state": None}], status=[{}])
    with pytest.raises(TransferError, match="no space"):
        board_job(agent).run(PLAN)


def test_a_budget_used_up_is_an_error_and_one_of_an_earlier_run_is_not() -> None:
    with pytest.raises(CommandTimeout, match=r"longer than 0\.5 s: why") as caught:
        board_job(failing(124, "budget"), budget_s=0.5).run(PLAN)
    assert caught.value.code == "over-budget"
    over = news(*ALL[:2], state={"phase": "failed", "code": 124, "message": "over"})
    agent = ScriptedAgent(status=[over, news(*ALL, **DONE)])
    assert len(board_job(agent).run(PLAN).sessions) == 2


@pytest.mark.parametrize("what", ["crash", "out-of-memory", "error"])
def test_a_model_that_does_not_run_is_a_result(what: str) -> None:
    cause = {"what": what, "message": "SIGSEGV", "stderr": "last words"}
    outcome = board_job(failing(70, "worker-failed", "it crashed", cause=cause)).run(PLAN)
    assert outcome.failure is not None
    assert (outcome.failure["what"], outcome.failure["stderr"]) == (what, "last words")
    assert outcome.sessions == ()


def test_a_worker_that_is_killed_again_and_again_says_nothing_of_the_model() -> None:
    cause = {"what": "killed", "message": "SIGKILL"}
    with pytest.raises(NotStable) as caught:
        board_job(failing(70, "worker-failed", cause=cause)).run(PLAN)
    assert caught.value.code == "worker-killed"


def test_a_worker_killed_once_is_counted() -> None:
    lines = (START, done("memory-1", KILLED), done("memory-2"), done("memory-1"))
    assert board_job(ScriptedAgent(status=[news(*lines, **DONE)])).run(PLAN).repeated == 1


# ---------------------------------------------------------------------------- an interrupted host


def find(agent: ScriptedAgent, **arguments: Any) -> int:
    return board_job(agent).find_earlier(**{"board_time_s": 1100.0, "max_age_s": 600.0} | arguments)


def test_sessions_of_an_interrupted_run_are_found_and_counted() -> None:
    agent = ScriptedAgent(status=[news(*ALL[:2]), news(*ALL, **DONE)])
    job = board_job(agent)
    assert job.find_earlier(board_time_s=1100.0, max_age_s=600.0) == 1
    assert job.run(PLAN).resumed == 1
    assert "end" not in agent.asked


@pytest.mark.parametrize(
    "arguments", [{"board_time_s": 1700.0}, {"board_time_s": 900.0}, {"board_time_s": None}]
)
def test_a_job_too_old_to_be_this_measurement_is_removed(arguments: dict[str, Any]) -> None:
    agent = ScriptedAgent(status=[news(*ALL, **DONE)])
    assert find(agent, **arguments) == 0
    assert agent.asked[-1] == "end"


def test_a_job_from_before_a_reboot_is_removed() -> None:
    agent = ScriptedAgent(status=[news(*ALL, **DONE) | {"rebooted": True}])
    assert find(agent) == 0
    assert agent.asked[-1] == "end"


def test_where_there_is_no_earlier_job_nothing_is_done() -> None:
    agent = ScriptedAgent(status=[{"code": 76, "state": None, "alive": False}])
    assert find(agent) == 0
    assert agent.asked == ["status 0 0"]


def test_ending_keeps_the_files_only_when_asked() -> None:
    agent = ScriptedAgent(status=[{}])
    board_job(agent).end(keep=True)
    board_job(agent).end()
    assert agent.asked == ["end --keep", "end"]
