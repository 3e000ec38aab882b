"""Pure parts of `edgepipe.bench`: the runner's replies, and what becomes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.bench import MeasureOptions, exclusion, parse_reply, to_measurements
from edgepipe.errors import CommandFailed, EdgepipeError, RequestError
from edgepipe.payload import payload_files
from edgepipe.resources import profile_paths
from edgepipe.schema import build

HEALTH = {"boot_id": "b1", "temperature_c": 50.0, "governor": "performance"}


def latency(**changes: Any) -> dict[str, Any]:
    """One latency session as the runner prints it: 30 batches of 10 inferences, 2 us each."""
    session = {
        "kind": "latency", "cause": None, "before": HEALTH, "after": HEALTH, "flags": [],
        "data": {
            "wall_ns": [20_000] * 30, "cpu_ns": [19_000] * 30, "warmup_wall_ns": [4_000, 2_000],
            "inner_loops": 10, "load_ns": 3_000_000, "first_inference_ns": 9_000,
            "contended": False, "cold": {"load_ns": 5_000_000, "resident_share": 0.0},
        },
    }  # fmt: skip
    data = changes.pop("data", {})
    return {**session, **changes, "data": {**session["data"], **data}}  # type: ignore[dict-item]


def memory(**data: Any) -> dict[str, Any]:
    figures = {"anon_bytes": 4096, "file_bytes": 8192, "peak_bytes": 12288, **data}
    return {
        "kind": "memory", "cause": None, "before": HEALTH, "after": HEALTH, "flags": [],
        "data": figures,
    }  # fmt: skip


def reply(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1, "code": 0, "error": None, "message": "", "runtime": {"backend": "litert-c"},
        "sessions": [latency(), memory()],
    } | changes  # fmt: skip


def measured(*sessions: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    found = to_measurements(sessions, {"boot_id": "b1"}, threads=threads)
    return {m.metric: m for m in found}


def test_nanoseconds_of_a_batch_become_seconds_of_one_inference() -> None:
    found = measured(latency(), memory())
    assert found["latency_wall"].samples == (pytest.approx((2e-6,) * 30),)
    assert found["latency_cpu"].samples == (pytest.approx((1.9e-6,) * 30),)
    # a warm-up is never batched
    assert found["latency_wall"].warmups == (pytest.approx((4e-6, 2e-6)),)
    assert found["load"].samples == ((0.003,),)
    assert found["load_cold"].samples == ((0.005,),)
    assert found["first_inference"].samples == ((9e-6,),)
    assert found["memory_anon"].samples == ((4096.0,),)
    assert (found["memory_anon"].unit, found["load"].unit) == ("B", "s")
    assert found["runs_on_device"].samples == ((1.0,),)


def test_cpu_time_of_several_threads_is_no_latency() -> None:
    found = measured(latency(), threads=2)
    assert "latency_cpu" not in found
    assert "latency_wall" in found


def test_memory_that_was_not_measured_is_not_a_figure() -> None:
    found = measured(memory(), memory(peak_bytes=None))
    assert "memory_peak" not in found
    assert len(found["memory_file"].samples) == 2


def test_a_load_from_the_page_cache_is_not_a_cold_load() -> None:
    in_cache = latency(data={"cold": {"load_ns": 1, "resident_share": 0.4}})
    unknown = latency(data={"cold": {"load_ns": 1, "resident_share": None}})
    found = measured(latency(), in_cache, unknown)
    assert set(found["load_cold"].excluded) == {1, 2}
    assert found["load"].excluded == {}


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ([], ""),
        (["frequency_capped"], ""),
        (["throttled_now", "throttle_event"], "throttled"),
        (["clock_jump"], "clock jump"),
        (["swapped_in", "throttled_now"], "swap-in, throttled"),
    ],
)
def test_sessions_are_excluded_for_causes_not_for_being_slow(flags: list[str], cause: str) -> None:
    slow = latency(flags=flags, data={"wall_ns": [20_000_000] * 30, "contended": True})
    assert exclusion(slow, "b1") == cause
    assert measured(latency(), slow)["latency_wall"].excluded == ({1: cause} if cause else {})


def test_a_reboot_between_sessions_excludes_what_came_after() -> None:
    after = latency(before={**HEALTH, "boot_id": "b2"}, after={**HEALTH, "boot_id": "b2"})
    assert measured(latency(), after)["latency_wall"].excluded == {1: "reboot"}


def test_an_excluded_session_does_not_make_the_rest_contended() -> None:
    noisy = latency(flags=["clock_jump"], data={"contended": True})
    assert measured(latency(), noisy)["latency_wall"].context["contended"] is False
    busy = latency(data={"contended": True})
    assert measured(latency(), busy)["latency_wall"].context["contended"] is True


def test_a_whole_reply_is_taken() -> None:
    assert parse_reply(json.dumps(reply()).encode()) == reply()


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "1"},
        {"code": 70},
        {"code": 70, "cause": {"what": "crash"}},
        {"owner": "pi"},
        {"message": None},
        {"sessions": {}},
        {"sessions": ["x"]},
        {"runtime": None},
        {"sessions": [memory(anon_bytes="4096")]},
        {"sessions": [memory(anon_bytes=True)]},
        {"sessions": [latency(data={"cpu_ns": [1]})]},
        {"sessions": [latency(data={"wall_ns": [], "cpu_ns": []})]},
        {"sessions": [latency(data={"wall_ns": [-1] * 30})]},
        {"sessions": [latency(data={"inner_loops": 0})]},
        {"sessions": [latency(data={"cold": None})]},
        {"sessions": [{**latency(), "kind": "hot"}]},
        {"sessions": [{**latency(), "flags": None}]},
    ],
)
def test_a_reply_that_is_not_whole_is_refused(changes: dict[str, Any]) -> None:
    whole = reply(**changes)
    with pytest.raises(CommandFailed):
        parse_reply(json.dumps(whole).encode(), returncode=whole["code"])


def test_a_login_banner_before_the_reply_is_refused_with_a_hint() -> None:
    with pytest.raises(CommandFailed) as caught:
        parse_reply(b"Welcome to pi!\n" + json.dumps(reply()).encode(), address="ssh://pi")
    assert (
        "Welcome to pi!" in json.dumps(caught.value.message) or "ssh://pi" in caught.value.message
    )
    assert "bashrc" in caught.value.hint


def test_a_killed_runner_is_not_a_reply() -> None:
    with pytest.raises(CommandFailed, match="Killed"):
        parse_reply(b"", stderr=b"Killed", returncode=137)


def test_a_newer_runner_is_refused() -> None:
    with pytest.raises(RequestError, match="schema 2"):
        parse_reply(json.dumps(reply(schema=2)).encode())


@given(st.binary(max_size=200))
def test_garbage_is_our_own_error(raw: bytes) -> None:
    with pytest.raises(EdgepipeError):
        parse_reply(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(key=st.sampled_from(sorted(reply())), value=JSON)
def test_a_reply_with_one_wrong_value_is_taken_or_refused_but_never_a_bug(
    key: str, value: Any
) -> None:
    try:
        found = parse_reply(json.dumps(reply(**{key: value})).encode())
    except EdgepipeError:
        return
    to_measurements([s for s in found["sessions"] if s["data"]], {"boot_id": "b1"}, threads=1)


@given(key=st.sampled_from(sorted(latency()["data"])), value=JSON)
def test_a_session_with_one_wrong_value_is_taken_or_refused_but_never_a_bug(
    key: str, value: Any
) -> None:
    try:
        found = parse_reply(json.dumps(reply(sessions=[latency(data={key: value})])).encode())
    except EdgepipeError:
        return
    to_measurements(found["sessions"], {"boot_id": "b1"}, threads=1)


def test_options_are_written_with_units() -> None:
    options = build(
        MeasureOptions, {"session": "300 ms", "budget": "1 min"}, where="t", error=RequestError
    )
    assert (options.session, options.budget) == (0.3, 60.0)
    with pytest.raises(RequestError, match="did you mean 'session'"):
        build(MeasureOptions, {"sesion": "2 s"}, where="t", error=RequestError)


def test_every_profile_names_a_target_with_a_runner() -> None:
    from edgepipe.profile import load_profile

    for path in profile_paths().values():
        assert payload_files(load_profile(path).target)[0] == "agent.py"
