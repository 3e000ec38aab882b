"""A lab of boards: its file, which boards are meant, and many of them at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepipe.device.labgrid import NetworkService, parse_place
from edgepipe.errors import ConnectError, EdgepipeError, ProfileError, RequestError
from edgepipe.gate import (
    Evidence,
    GrowthGate,
    InstructionsGate,
    LatencyGate,
    SlowdownGate,
    Status,
    judge_all,
)
from edgepipe.inventory import Target, load_lab, place, resolve_targets
from edgepipe.lab import on_boards
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths

LAB = """\
[devices]
rpi4b_4gb = "ssh://pi@10.0.0.4"

[devices.shelf-1]
address = "ssh://pi@10.0.0.11"
profile = "rpi5_8gb"
tags = ["upper", "fan"]

[devices.shelf-2]
address = "ssh://pi@10.0.0.12"
profile = "rpi5_8gb"
power = "uhubctl -l 1-1 -p 2 -a cycle"
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(LAB)
    return path


def names(targets: list[Target]) -> list[str]:
    return [target.name for target in targets]


# ------------------------------------------------------------------------------- which boards


def test_a_recipe_is_measured_on_every_board_of_its_profiles(lab: Path) -> None:
    assert names(resolve_targets(["rpi5_8gb"], lab=lab)) == ["shelf-1", "shelf-2"]
    assert names(resolve_targets(["rpi4b_4gb", "rpi5_8gb"], lab=lab)) == ["rpi4b_4gb", "shelf-1", "shelf-2"]  # fmt: skip


def test_without_a_recipe_all_boards_of_a_lab_are_meant(lab: Path) -> None:
    assert names(resolve_targets([], lab=lab)) == ["rpi4b_4gb", "shelf-1", "shelf-2"]


def test_the_local_file_is_a_lab(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.parent)
    lab.rename(lab.with_name("edgepipe.local.toml"))
    assert names(resolve_targets(["rpi5_8gb"])) == ["shelf-1", "shelf-2"]
    assert names(resolve_targets([], devices=["shelf-2"])) == ["shelf-2"]


def test_a_name_without_a_lab_is_told_which_file_gives_boards_names(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.parent)
    with pytest.raises(RequestError, match="'shelf-2' is not the address") as caught:
        resolve_targets([], devices=["shelf-2"])
    assert "edgepipe.local.toml, which is not in this folder" in caught.value.hint
    with pytest.raises(RequestError, match="did you mean 'shelf-2'") as caught:
        resolve_targets([], devices=["shelf2"], lab=lab)
    assert "boards of the lab: rpi4b_4gb, shelf-1, shelf-2" in caught.value.hint


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("soc=bcm2712", ["shelf-1", "shelf-2"]),
        ("soc=bcm2711", ["rpi4b_4gb"]),
        ("tag=fan", ["shelf-1"]),
        ("soc=bcm2712 tag!=fan", ["shelf-2"]),
        ("board=shelf-* ram>=8GB", ["shelf-1", "shelf-2"]),
    ],
)
def test_boards_are_chosen_by_profile_name_and_tag(lab: Path, expression: str, found: list[str]) -> None:  # fmt: skip
    assert names(resolve_targets(["localhost"], lab=lab, match=expression)) == found


def test_what_matches_no_board_is_an_error_that_lists_them(lab: Path) -> None:
    with pytest.raises(RequestError, match=r"no board of .* matches 'tag=lower'") as caught:
        resolve_targets([], lab=lab, match="tag=lower")
    assert "shelf-1 (rpi5_8gb)" in caught.value.hint
    with pytest.raises(RequestError, match="did you mean 'tag'"):
        resolve_targets([], lab=lab, match="tga=lower")


def test_match_without_a_lab_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="chooses from a lab"):
        resolve_targets([], match="soc=bcm2712")
    with pytest.raises(RequestError, match="does not exist"):
        resolve_targets([], lab=Path("lab.toml"))


def test_a_board_is_named_by_the_lab_whatever_way_it_is_asked_for(lab: Path) -> None:
    for device in ("shelf-2", "ssh://pi@10.0.0.12", "ssh://root@10.0.0.12:22"):
        (target,) = resolve_targets([], devices=[device], lab=lab)
        assert (target.name, target.profile.name) == ("shelf-2", "rpi5_8gb")
    assert target.power.startswith("uhubctl")


def test_a_name_that_is_no_board_is_refused_with_a_near_miss(lab: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'shelf-1'"):
        resolve_targets([], devices=["shelf-11"], lab=lab)


def test_boards_of_one_profile_without_names_are_told_apart_by_address() -> None:
    devices = ["ssh://pi@10.0.0.1", "ssh://pi@10.0.0.2:2222"]
    targets = resolve_targets([], devices=devices, profile="rpi5_8gb")
    assert names(targets) == ["rpi5_8gb@10.0.0.1", "rpi5_8gb@10.0.0.2:2222"]
    assert {t.profile.name for t in targets} == {"rpi5_8gb"}


def test_a_lone_board_without_a_name_is_called_after_its_profile() -> None:
    (target,) = resolve_targets([], devices=["ssh://pi@10.0.0.1"], profile="rpi5_8gb")
    assert target.name == "rpi5_8gb"


def test_a_recipe_with_many_profiles_cannot_guess_that_of_an_address() -> None:
    with pytest.raises(RequestError, match=r"which profile describes ssh://pi@10\.0\.0\.1"):
        resolve_targets(["rpi4b_4gb", "rpi5_8gb"], devices=["ssh://pi@10.0.0.1"])


@pytest.mark.parametrize(
    "same",
    [
        ["ssh://pi@10.0.0.1", "ssh://pi@10.0.0.1"],
        ["ssh://pi@10.0.0.1", "ssh://root@10.0.0.1:22"],
        ["ssh://pi@Board", "ssh://board/"],
        ["ssh://[::1]", "ssh://[::1]:22"],
        ["virt://virt-pi-4", "virt://virt-pi-4/"],
        ["local", "local"],
    ],
)
def test_one_board_is_not_measured_twice_at_once(same: list[str]) -> None:
    with pytest.raises(RequestError, match="are one board") as caught:
        resolve_targets([], devices=same, profile="localhost")
    assert caught.value.code == "same-board"


def test_two_ports_of_a_host_are_two_boards() -> None:
    assert place("ssh://pi@10.0.0.1:2201") != place("ssh://pi@10.0.0.1:2202")
    assert place("ssh://[::1]:2201") != place("ssh://[::1]:2202")


def test_an_empty_device_is_not_this_machine() -> None:
    with pytest.raises(RequestError, match="--device is empty"):
        resolve_targets([], devices=["local", ""])


# ----------------------------------------------------------------------------- the lab's file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[device]\n", "unknown table: device"),
        ("", "no board under"),
        ("[devices.a]\naddress = 'ssh://a'\n", "profile: is missing"),
        ("[devices.a]\naddress = 'ssh://a'\nprofile = 'x'\ntag = ['b']\n", "did you mean 'tags'"),
        ("[devices]\nrpi5_8gb = 'pi@host'\n", "'pi@host' is not the address of a device"),
        ("[devices.model]\naddress = 'ssh://a'\nprofile = 'x'\n", "'model' is no name"),
        ("[devices.'../a']\naddress = 'ssh://a'\nprofile = 'x'\n", "is no name"),
        ("[devices]\na = 'ssh://h'\nb = 'ssh://pi@h:22'\n", "two entries are one board"),
        ("[devices]\na = 3\n", "devices.a"),
    ],
)
def test_a_lab_that_is_wrong_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=says) as caught:
        load_lab(path)
    assert str(path) in caught.value.message


def test_a_lab_may_not_name_a_profile_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text("[devices.a]\naddress = 'ssh://a'\nprofile = 'rpi5_8g'\n")
    with pytest.raises(ProfileError, match="did you mean 'rpi5_8gb'"):
        resolve_targets([], lab=tmp_path / "lab.toml")


@given(st.text(max_size=30) | st.text("[]:@/ab1", max_size=12))
def test_any_text_is_a_place_or_not_and_nothing_worse(text: str) -> None:
    assert place(place(f"ssh://{text}")) == place(f"ssh://{text}")


# ------------------------------------------------------------------------------ many at once


def boards(count: int) -> list[Target]:
    profile = find_profile("localhost", profile_paths())
    return [Target(f"null://quiet?seed={n}", profile, f"board-{n}") for n in range(count)]


def test_boards_work_at_the_same_time() -> None:
    together = threading.Barrier(8, timeout=20)  # nobody gets past it alone

    def work(target: Target, stop: threading.Event) -> str:
        together.wait()
        return target.name

    assert on_boards(boards(8), work) == [f"board-{n}" for n in range(8)]


def test_no_more_boards_work_at_once_than_asked() -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def work(target: Target, stop: threading.Event) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01)
        with lock:
            at_work -= 1

    on_boards(boards(12), work, at_once=3)
    assert most == 3


def test_results_come_as_they_are_ready_and_are_returned_in_order() -> None:
    first_is_told = threading.Event()
    told = []

    def work(target: Target, stop: threading.Event) -> str:
        if target.name == "board-0":
            assert first_is_told.wait(20)
        return target.name

    def finished(target: Target, outcome: str | EdgepipeError) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append(outcome)
        first_is_told.set()

    assert on_boards(boards(2), work, finished=finished) == ["board-0", "board-1"]
    assert told == ["board-1", "board-0"]


def test_a_board_that_fails_does_not_stop_the_others() -> None:
    def work(target: Target, stop: threading.Event) -> str:
        if target.name == "board-1":
            raise ConnectError("no route")
        return target.name

    outcomes = on_boards(boards(3), work)
    assert [o if isinstance(o, str) else o.message for o in outcomes] == ["board-0", "no route", "board-2"]  # fmt: skip


def test_a_bug_on_one_board_is_raised_when_the_others_are_done() -> None:
    done = []

    def work(target: Target, stop: threading.Event) -> None:
        if target.name == "board-0":
            raise ZeroDivisionError
        time.sleep(0.05)
        done.append(target.name)

    with pytest.raises(ZeroDivisionError):
        on_boards(boards(3), work)
    assert sorted(done) == ["board-1", "board-2"]


def test_a_stop_reaches_every_board_and_waits_for_all() -> None:
    given_back = []

    def work(target: Target, stop: threading.Event) -> None:
        if target.name == "board-0":
            return
        assert stop.wait(20)
        given_back.append(target.name)
        raise KeyboardInterrupt

    def finished(target: Target, outcome: EdgepipeError | None) -> None:
        raise KeyboardInterrupt  # as Ctrl-C does, in the main thread

    with pytest.raises(KeyboardInterrupt):
        on_boards(boards(4), work, finished=finished, at_once=3)
    assert sorted(given_back) in (["board-1", "board-2"], ["board-1", "board-2", "board-3"])


def test_no_gate_passes_on_a_board_that_was_not_measured() -> None:
    gates = [
        LatencyGate(max=1.0),
        SlowdownGate(max=0.03),
        GrowthGate(quantity="file"),
        InstructionsGate(),
    ]
    off = Evidence("m", "shelf-1", {}, profile="rpi5_8gb", missing="connection refused")
    verdicts = judge_all(gates, Evidence("m", "", {}), [off])
    assert {v.gate for v in verdicts} == {"runs_on_device", *(gate.name for gate in gates)}
    for verdict in verdicts:
        assert (verdict.status, verdict.device) == (Status.INCONCLUSIVE, "shelf-1")
        assert verdict.reason == "the board was not measured: connection refused"


# ------------------------------------------------------------------------------------ labgrid

# of labgrid-client 26.0.1, with a real coordinator and exporter
SHOWN = """\
Place 'pi4':
  matches:
    exp1/bench/NetworkService
  acquired: vm/root
  acquired resources:
    exp1/bench/NetworkService/NetworkService
  created: 2026-11-23 07:29:13.894891
  changed: 2026-11-23 07:29:17.096735
Acquired resource 'NetworkService' (exp1/bench/NetworkService/NetworkService):
  {'acquired': 'pi4',
   'avail': True,
   'cls': 'NetworkService',
   'params': {'address': '127.0.0.1',
              'extra': {'proxy': 'localhost', 'proxy_required': False},
              'port': 2222,
              'username': 'root'}}
"""


def test_a_labgrid_place_says_where_its_board_is() -> None:
    assert parse_place(SHOWN, "pi4") == NetworkService(host="127.0.0.1", user="root", port=2222)
    bare = SHOWN.replace("'port': 2222,", "").replace("'username': 'root'", "'username': ''")
    assert parse_place(bare.replace("127.0.0.1", "fe80::1"), "pi4").address == "ssh://[fe80::1]:22"


def test_a_second_resource_that_is_no_network_service_is_passed_over() -> None:
    power = "Acquired resource 'P' (exp1/bench/P/P):\n  {'cls': 'NetworkPowerPort', 'params': {}}\n"
    assert parse_place(power + SHOWN + power, "pi4").port == 2222


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ("", "no network service"),
        (SHOWN + SHOWN[SHOWN.index("Acquired resource") :], "2 network services"),
        (SHOWN.replace("'127.0.0.1'", "'-oProxyCommand=x'"), "cannot read"),
        (SHOWN.replace("'127.0.0.1'", "7"), "cannot read"),
        (SHOWN.replace("2222", "70000"), "cannot read"),
        (SHOWN.replace("'params'", "'parms'"), "cannot read"),
        (SHOWN.replace("}}", "}"), "cannot read"),
        (SHOWN.replace("False", "True"), "only reached through localhost"),
    ],
)
def test_what_labgrid_cannot_mean_is_an_error(shown: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_place(shown, "pi4")


def test_a_password_that_labgrid_knows_is_in_no_error() -> None:
    shown = SHOWN.replace("'port': 2222", "'password': 'hush', 'port': 'hush'")
    with pytest.raises(RequestError) as caught:
        parse_place(shown, "pi4")
    assert "hush" not in f"{caught.value.message} {caught.value.hint} {caught.value.__cause__}"


@given(st.text())
def test_no_text_of_labgrid_breaks_the_parser(text: str) -> None:
    for shown in (text, SHOWN.replace("'params'", text)):
        try:
            parse_place(shown, "pi4")
        except RequestError:
            pass
