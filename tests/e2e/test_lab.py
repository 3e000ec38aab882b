"""Many boards in one command: real SSH servers and simulated boards, failures, Ctrl-C, labgrid."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepipe.device import open_device
from edgepipe.device.labgrid import parse_place
from edgepipe.errors import Busy, HostKeyError, RequestError
from edgepipe.store import Store
from edgepipe.testing import LoopbackSshd, find_sshd
from edgepipe.tflite_ops.tiny import tiny_tflite

pytestmark = pytest.mark.slow

RECIPE = """\
schema = 1
name = "small"
devices = ["localhost"]
[model]
file = "model.tflite"
[measure]
threads = 1
memory_sessions = 1
warmup = "50 ms"
session = "200 ms"
instructions = false
energy = false
[[gates]]
gate = "latency"
max = "5 s"
statistic = "p50"
[[gates]]
gate = "growth"
quantity = "size"
max = "1 MB"
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "model.tflite").write_bytes(tiny_tflite())
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgepipe", *arguments],
            cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def bench() -> Iterator[LoopbackSshd]:
    """Three boards: ports of a real sshd, with a home folder each."""
    if find_sshd() is None:
        message = "no OpenSSH server on this machine (apt-get install openssh-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with LoopbackSshd(boards=3) as server:
        yield server


def write_lab(folder: Path, addresses: list[str], *, more: str = "") -> None:
    entries = "".join(
        f'[devices.board-{n}]\naddress = "{address}"\nprofile = "localhost"\n'
        for n, address in enumerate(addresses, 1)
    )
    (folder / "lab.toml").write_text(entries + more)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def latest(folder: Path) -> tuple[Any, dict[str, Any]]:
    found = Store(folder / ".edgepipe").find_run("latest")
    return found, found.read()


# ------------------------------------------------------------------------------------- recipes


def test_one_board_that_is_off_leaves_the_others_measured_and_the_run_inconclusive(
    folder: Path, run: Run, bench: LoopbackSshd
) -> None:
    off = f'[devices.off]\naddress = "ssh://pi@127.0.0.1:{closed_port()}"\nprofile = "localhost"\npower = "uhubctl -p 2"\n'
    write_lab(folder, bench.addresses[:2], more=off)
    done = run("run", "recipe.toml", "--lab", "lab.toml", "--json", "--junit", "j.xml", **bench.environment())  # fmt: skip
    assert done.returncode == 3, done.stderr
    answer = json.loads(done.stdout)
    assert [d["name"] for d in answer["devices"]] == ["board-1", "board-2", "off"]
    assert answer["devices"][2]["error"]["error"] == "refused"
    by_board = {(v["device"], v["gate"]): v for v in answer["verdicts"]}
    assert by_board["board-1", "latency"]["status"] == "PASS"
    assert by_board["board-2", "runs_on_device"]["status"] == "PASS"
    assert "was not measured" in by_board["off", "latency"]["reason"]
    assert "power is switched by: uhubctl -p 2" in done.stderr
    assert "[board-1] " in done.stderr
    assert "[board-2] " in done.stderr
    found, _ = latest(folder)
    contexts = [found.load_measurements(n)["latency_wall"].context for n in ("board-1", "board-2")]
    assert [c["profile"] for c in contexts] == ["localhost", "localhost"]
    assert found.load_measurements("off") == {}
    cases = {case.get("classname") for case in ET.parse(folder / "j.xml").iter("testcase")}
    assert {"small.board-1", "small.board-2", "small.off"} <= cases
    # judged again from what is stored, it is the same; and the board is still named
    again = run("gate", "--json")
    assert (again.returncode, json.loads(again.stdout)["verdicts"]) == (3, answer["verdicts"])
    assert "board-1 (localhost) at ssh://" in run("report").stdout
    refused = run("gate", "--promote")
    assert "off was not measured" in refused.stdout
    # what was measured is not measured again when the board is back
    write_lab(folder, bench.addresses)
    healed = run("run", "recipe.toml", "--lab", "lab.toml", **bench.environment())
    assert healed.stderr.count("using the measurement taken") == 2


def test_boards_of_one_profile_share_their_baseline(
    folder: Path, run: Run, bench: LoopbackSshd
) -> None:
    write_lab(folder, bench.addresses[:2])
    first = run("run", "recipe.toml", "--lab", "lab.toml", "--json", **bench.environment())
    assert first.returncode == 3, first.stderr  # there is no baseline yet
    promoted = run("gate", "--promote", "--json")
    assert promoted.returncode == 0, promoted.stdout
    assert json.loads(promoted.stdout)["promoted"] == [
        "ci/baselines/localhost/small.json",
        "ci/baselines/localhost/small.tflite",
    ]
    (folder / "model.tflite").write_bytes(tiny_tflite(layers=2))
    second = run("run", "recipe.toml", "--lab", "lab.toml", "--json", **bench.environment())
    assert second.returncode == 0, second.stdout + second.stderr
    growth = [v for v in json.loads(second.stdout)["verdicts"] if v["gate"] == "growth"]
    assert [(v["device"], v["status"]) for v in growth] == [("board-1", "PASS"), ("board-2", "PASS")]  # fmt: skip
    assert latest(folder)[1]["measured_against"].keys() == {"board-1", "board-2"}


def test_one_board_on_which_the_model_fails_fails_the_run(folder: Path, run: Run) -> None:
    bad = '[devices.bad]\naddress = "null://quiet?fault=crash&seed=3"\nprofile = "localhost"\n'
    off = f'[devices.off]\naddress = "ssh://pi@127.0.0.1:{closed_port()}"\nprofile = "localhost"\n'
    write_lab(folder, ["null://quiet?seed=1", "null://quiet?seed=2"], more=bad + off)
    done = run("bench", "model.tflite", "--lab", "lab.toml", "--session", "0.2 s", "--json")
    assert done.returncode == 1, done.stderr
    found = {b["name"]: b for b in json.loads(done.stdout)["boards"]}
    assert list(found) == ["board-1", "board-2", "bad", "off"]
    assert [m["metric"] for m in found["bad"]["measurements"]] == ["runs_on_device"]
    assert found["off"]["error"] == "refused"
    assert len(found["board-2"]["measurements"]) > 5
    compared = run("compare", "model.tflite", "model.tflite", "--lab", "lab.toml", "--match", "board=board-*|off", "--json")  # fmt: skip
    assert compared.returncode == 2  # "|" is no alternative
    compared = run("compare", "model.tflite", "model.tflite", "--lab", "lab.toml", "--match", "board=board-1,off", "--json")  # fmt: skip
    assert compared.returncode == 3
    assert [b["name"] for b in json.loads(compared.stdout)["boards"]] == ["board-1", "off"]


# -------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_gives_every_board_back(folder: Path, bench: LoopbackSshd) -> None:
    write_lab(folder, bench.addresses)
    command = [sys.executable, "-m", "edgepipe", "bench", "model.tflite", "--lab", "lab.toml", "--session", "60 s", "--budget", "10 min"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **bench.environment()}, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not all(list(home.glob(".edgepipe/jobs/*/results.jsonl")) for home in bench.homes):
            assert time.monotonic() < until, "the boards never began"
            assert process.poll() is None
            time.sleep(0.1)
        assert all("owner" in (home / ".edgepipe" / "lock").read_text() for home in bench.homes)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.terminate()  # a kill would leave the boards at work
        process.wait()
    assert process.returncode == 130, stderr
    assert "waiting until board-1, board-2, board-3 are given back" in stderr
    assert "Traceback" not in stderr
    for home in bench.homes:
        assert list(home.glob(".edgepipe/jobs/*")) == []
        assert (home / ".edgepipe" / "lock").read_text() == ""  # nobody's lease


# ------------------------------------------------------------------------------- eight at once


def test_eight_boards_take_little_longer_than_one_and_little_memory(tmp_path: Path) -> None:
    if find_sshd() is None and os.environ.get("CI") != "true":
        pytest.skip("no OpenSSH server on this machine (apt-get install openssh-server)")
    script = Path(__file__).parents[2] / "ci" / "bench" / "lab.py"
    done = subprocess.run(
        [sys.executable, str(script), "--boards", "1", "8", "--sleep", "5"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    one, eight = json.loads(done.stdout.splitlines()[-1])["costs"]
    assert one["failed"] == eight["failed"] == 0, done.stderr
    assert eight["peak_bytes"] < 300e6
    # eight boards one after the other would need 40 s; a slow host needs a few for logging in
    assert eight["wall_s"] < 8 * 5


# ------------------------------------------------------------------------------------- labgrid


@pytest.fixture(scope="module")
def labgrid(bench: LoopbackSshd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real coordinator with a place "pi4", and an exporter of a real SSH server.

    labgrid's programs are those of `.venv-labgrid` (ci/test.sh), or on PATH.
    """
    own = Path(__file__).parents[2] / ".venv-labgrid" / "bin"
    path = f"{own}{os.pathsep}{os.environ['PATH']}"
    if not all(shutil.which(f"labgrid-{part}", path=path) for part in ("client", "coordinator", "exporter")):  # fmt: skip
        message = "no labgrid on this machine (python3 -m venv .venv-labgrid && .venv-labgrid/bin/pip install -c ci/constraints.txt labgrid)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    tmp_path, address = tmp_path_factory.mktemp("labgrid"), f"127.0.0.1:{closed_port()}"
    user = bench.address.removeprefix("ssh://").partition("@")[0]
    (tmp_path / "exporter.yaml").write_text(
        f"bench:\n  NetworkService:\n    address: 127.0.0.1\n    port: {bench.port}\n    username: {user}\n"
    )
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**bench.environment(), "PATH": path, "LG_COORDINATOR": address}.items():
            patch.setenv(name, value)
        for command in (
            ["labgrid-coordinator", "-l", address],
            ["labgrid-exporter", "-n", "test", str(tmp_path / "exporter.yaml")],
        ):
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.terminate)
            until = time.monotonic() + 60
            ready = "test/bench/NetworkService" if "exporter" in command[0] else ""
            while ready not in (listed := client("resources")).stdout or listed.returncode:
                assert time.monotonic() < until, listed.stderr
                time.sleep(0.2)
        assert client("-p", "pi4", "create").returncode == 0
        assert client("-p", "pi4", "add-match", "test/bench/NetworkService").returncode == 0
        yield "labgrid://pi4"


def client(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["labgrid-client", *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def is_acquired() -> bool:
    return "acquired: None" not in client("-p", "pi4", "show").stdout


def test_a_labgrid_place_is_held_while_its_board_is_measured(labgrid: str) -> None:
    assert not is_acquired()
    device = open_device(labgrid)
    try:
        assert device.address == labgrid
        assert device.run(["echo", "here"], timeout_s=10).stdout == b"here\n"
        assert is_acquired()
        assert parse_place(client("-p", "pi4", "show").stdout, "pi4").host == "127.0.0.1"
    finally:
        device.close()
        device.close()
    assert not is_acquired()


def test_a_labgrid_place_is_released_after_an_error(
    labgrid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "known_hosts").write_text("")
    monkeypatch.setenv("EDGEPIPE_KNOWN_HOSTS", str(tmp_path / "known_hosts"))
    with pytest.raises(HostKeyError):
        open_device(labgrid)
    assert not is_acquired()


def test_a_labgrid_place_of_somebody_else_is_busy_and_one_of_ones_own_stays_so(labgrid: str) -> None:  # fmt: skip
    other = {"LG_USERNAME": "somebody"}
    assert client("-p", "pi4", "acquire", **other).returncode == 0
    with pytest.raises(Busy, match="somebody"):
        open_device(labgrid)
    assert is_acquired()
    assert client("-p", "pi4", "release", **other).returncode == 0
    assert client("-p", "pi4", "acquire").returncode == 0
    open_device(labgrid).close()
    assert is_acquired()


def test_an_unknown_labgrid_place_is_an_error(labgrid: str) -> None:
    with pytest.raises(RequestError, match="matches nothing"):
        open_device("labgrid://pi9")
