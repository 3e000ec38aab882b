"""The profiles that come with edgepipe, and where profiles and payloads are found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgepipe.cli import main
from edgepipe.errors import ProfileError, RequestError
from edgepipe.inventory import resolve_targets
from edgepipe.profile import SOURCED_FACTS, absolute_work_dir, find_profile, load_profile
from edgepipe.resources import profile_paths, target_dir

SHIPPED = ["localhost", "rpi3b_plus", "rpi4b_4gb", "rpi5_8gb", "rpi_zero2w"]
BOARDS = [name for name in SHIPPED if name != "localhost"]


def test_the_shipped_profiles_are_there() -> None:
    assert set(SHIPPED) <= set(profile_paths())


@pytest.mark.parametrize("name", BOARDS)
def test_every_fact_of_a_board_has_a_source_that_can_be_looked_up(name: str) -> None:
    profile = load_profile(profile_paths()[name])
    assert set(SOURCED_FACTS) <= set(profile.sources)
    for fact, source in profile.sources.items():
        assert re.match(r"https://[\w.-]+/", source), fact


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_names_no_host_and_a_payload_that_exists(name: str) -> None:
    path = profile_paths()[name]
    assert "ssh://" not in path.read_text()
    assert (target_dir(load_profile(path).target) / "target.toml").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_measuring_starts_colder_than_it_stops(name: str) -> None:
    thermal = load_profile(profile_paths()[name]).thermal
    assert thermal.start_below < thermal.abort_above


def test_only_the_raspberry_pi_5_has_dot_products_and_large_pages() -> None:
    profiles = {name: load_profile(profile_paths()[name]) for name in BOARDS}
    assert [n for n, p in profiles.items() if "dotprod" in p.clusters[0].isa] == ["rpi5_8gb"]
    assert [n for n, p in profiles.items() if p.page_size_bytes != 4096] == ["rpi5_8gb"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_users_profile_shadows_ours_and_the_nearest_folder_wins(here: Path) -> None:
    shipped = profile_paths()["rpi5_8gb"]
    mine = here / "config" / "edgepipe" / "device_profiles"
    near = here / "work" / "device_profiles"
    for folder, model in ((mine, "Mine"), (near, "Nearest")):
        folder.mkdir(parents=True)
        text = re.sub(r'^model = ".*"', f'model = "{model}"', shipped.read_text(), flags=re.M)
        (folder / "rpi5_8gb.toml").write_text(text)
        assert find_profile("rpi5_8gb", profile_paths()).model == model
    assert set(SHIPPED) <= set(profile_paths())


def test_an_unknown_profile_suggests_the_one_that_was_meant() -> None:
    with pytest.raises(ProfileError, match="did you mean 'rpi_zero2w'"):
        find_profile("rpi_zero_2w", profile_paths())


def test_an_unknown_target_lists_those_there_are() -> None:
    with pytest.raises(RequestError, match="did you mean 'linux'") as caught:
        target_dir("linus")
    assert "linux" in caught.value.hint


def test_a_users_target_shadows_ours(here: Path) -> None:
    mine = here / "config" / "edgepipe" / "targets" / "linux"
    mine.mkdir(parents=True)
    assert target_dir("linux") == mine


def test_devices_list_and_show(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"rpi5_8gb +Raspberry Pi 5 Model B +BCM2712 +4 x Cortex-A76 at 2400 MHz +dotprod fp16 +8 GiB +linux", listed)  # fmt: skip
    assert main(["devices", "show", "rpi4b_4gb"]) == 0
    assert re.search(
        r"soc +BCM2711 +https://www.raspberrypi.com/.*#bcm2711\n", capsys.readouterr().out
    )
    assert main(["devices", "show", "rpi4b"]) == 2
    assert "did you mean 'rpi4b_4gb'" in capsys.readouterr().err
    assert main(["devices", "show"]) == 2
    assert "needs the name of a profile" in capsys.readouterr().err


def test_a_work_folder_is_below_the_home_of_the_board_or_absolute() -> None:
    assert absolute_work_dir("~/.edgepipe", "/home/pi") == "/home/pi/.edgepipe"
    assert absolute_work_dir("~", "/root/") == "/root"
    assert absolute_work_dir("/data", "/root") == "/data"
    with pytest.raises(ProfileError, match="neither absolute"):
        absolute_work_dir("data", "/root")


def test_a_profile_names_a_runtime_that_there_is(here: Path) -> None:
    text = profile_paths()["localhost"].read_text()
    (here / "mine.toml").write_text(text.replace('runtime = "litert"', 'runtime = "litret"'))
    with pytest.raises(ProfileError, match=r"runtime: .*'litert' or 'tflite-runtime'"):
        load_profile(here / "mine.toml")


def test_an_unknown_table_of_the_local_file_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    (here / "edgepipe.local.toml").write_text('[device]\nrpi5_8gb = "ssh://pi"\n')
    with pytest.raises(RequestError, match="unknown table: device"):
        resolve_targets(["rpi5_8gb"], address=None, profile=None)
