"""The profiles that come with edgepipe, and where profiles and payloads are found."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from edgepipe.cli import main
from edgepipe.errors import ProfileError, RequestError
from edgepipe.inventory import resolve_targets
from edgepipe.profile import (
    SOURCED_FACTS,
    absolute_work_dir,
    find_profile,
    load_profile,
    profile_schema,
    resolve_profile,
)
from edgepipe.resources import profile_paths, target_dir

EXPECTED = {
    "localhost", "rpi_zero2w", "rpi3b_plus", "rpi4b_4gb", "rpi4b_4gb_32bit", "rpi_cm4_4gb", "rpi5_8gb",
    "rock5b_8gb", "beagleplay", "jetson_orin_nano_8gb",
    "android_arm64", "pixel_6", "pixel_7", "pixel_8", "galaxy_s23", "galaxy_s24",
}  # fmt: skip
FOLDER = Path(__file__).parents[2] / "device_profiles"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))
VIRTUAL = [name for name in SHIPPED if name.startswith("virt-")]
BOARDS = sorted(EXPECTED - {"localhost"})


def test_the_shipped_profiles_are_there() -> None:
    assert set(SHIPPED) >= EXPECTED
    assert set(SHIPPED) - EXPECTED == set(VIRTUAL)


@pytest.mark.parametrize("name", BOARDS)
def test_every_fact_of_a_board_has_a_source_that_can_be_looked_up(name: str) -> None:
    profile = load_profile(profile_paths()[name])
    assert set(SOURCED_FACTS) <= set(profile.sources)
    for fact, source in profile.sources.items():
        value = getattr(profile, fact)
        if source.startswith("left open"):
            assert value in ("any", 0, ()), fact
        elif source.startswith("assumed: "):
            assert fact == "affinity"  # a choice, not a fact
        elif source.startswith("captured: "):
            assert (FOLDER.parent / source.removeprefix("captured: ")).is_file(), fact
        else:
            assert re.match(r"https://[\w.-]+/|reported: ", source), fact


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_names_no_host_and_a_payload_that_exists(name: str) -> None:
    path = profile_paths()[name]
    assert "ssh://" not in path.read_text()
    profile = load_profile(path)
    assert (target_dir(profile.target) / "target.toml").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_measuring_starts_colder_than_it_stops(name: str) -> None:
    thermal = load_profile(profile_paths()[name]).thermal
    assert thermal.start_below < thermal.abort_above


def test_only_the_raspberry_pi_5_has_dot_products_and_large_pages() -> None:
    profiles = {n: load_profile(profile_paths()[n]) for n in BOARDS if n.startswith("rpi")}
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
    assert re.search(r"rpi5_8gb +Raspberry Pi 5 Model B +BCM2712 +4 x Cortex-A76 +dotprod fp16 +8 GiB +linux", listed)  # fmt: skip
    assert main(["devices", "show", "rpi4b_4gb"]) == 0
    assert re.search(
        r"soc +BCM2711 +https://www.raspberrypi.com/.*#bcm2711\n", capsys.readouterr().out
    )
    assert main(["devices", "show", "rpi4b"]) == 2
    assert "did you mean 'rpi4b_4gb'" in capsys.readouterr().err
    assert main(["devices", "show"]) == 2
    assert "needs the name of a profile" in capsys.readouterr().err


def test_a_broken_profile_keeps_no_other_one_from_being_listed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path("device_profiles")
    mine.mkdir()
    (mine / "broken.toml").write_text("schema = 1\nmodle =")
    (mine / "wrong.toml").write_text('schema = 1\nextends = "rpi5_8gb"\nthread = 2\n')
    (mine / "good.toml").write_text('schema = 1\nextends = "rpi5_8gb"\nthreads = 2\n')
    assert main(["devices", "list", "--json"]) == 0
    shown = capsys.readouterr()
    names = {p["name"] for p in json.loads(shown.out)}
    assert names == {*SHIPPED, "good"}
    assert "broken.toml is not valid TOML" in shown.err
    assert "wrong.toml: thread: unknown key; did you mean 'threads'" in shown.err
    assert main(["devices", "match", "threads=2", "--json"]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["devices", "show", "broken"]) == 2


def test_wrong_keys_are_told_before_those_that_are_missing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path("device_profiles")
    mine.mkdir()
    (mine / "mine.toml").write_text(
        'schema = 1\nsoc = "BCM2712"\nthread = 2\nmodle = "Pi"\nbits = 16\n'
    )
    assert main(["devices", "show", "mine"]) == 2
    told = capsys.readouterr().err
    parts = [
        "mine.toml: thread: unknown key; did you mean 'threads'? (legal: schema, extends, ",
        "; modle: unknown key; did you mean 'model'?; bits: ",
        "; missing: model, clusters, ram_bytes, target, machine, os, libc, page_size_bytes, runtime, runtime_version\n",
    ]
    places = [told.find(part) for part in parts]
    assert -1 not in places, told
    assert places == sorted(places)
    assert told.count("(legal: ") == 1


def test_the_legal_keys_of_a_profile_are_those_of_its_file(here: Path) -> None:
    path = write(here, "mine", 'schema = 1\nextend = "rpi5_8gb"\n')
    with pytest.raises(ProfileError, match=r"did you mean 'extends'.*\(legal: ") as caught:
        load_profile(path)
    legal = re.findall(r"\(legal: (.*?)\)", caught.value.message)[0].split(", ")
    assert set(legal) == set(profile_schema()["properties"])


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
        resolve_targets(["rpi5_8gb"])


# ------------------------------------------------------------------------------------- extends


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_profile_takes_over_what_it_does_not_say_itself(here: Path) -> None:
    path = write(here, "mine", 'schema = 1\nextends = "rpi4b_4gb"\nram_bytes = "8 GiB"\n[thermal]\nstart_below = "40 C"\n[sources]\nram_bytes = "probed on 2026-11-23"\nthermal = "chosen"\n')  # fmt: skip
    base, mine = load_profile(profile_paths()["rpi4b_4gb"]), load_profile(path)
    assert mine == dataclasses.replace(
        base,
        name="mine",
        ram_bytes=8 * 2.0**30,
        thermal=dataclasses.replace(base.thermal, start_below=40.0),  # merged key by key
        sources={**base.sources, "ram_bytes": "probed on 2026-11-23", "thermal": "chosen"},
    )
    resolved = resolve_profile(path)
    assert resolved.origins["ram_bytes"] == "mine"
    assert resolved.origins["soc"] == "rpi4b_4gb"


def test_arrays_are_replaced_as_a_whole() -> None:
    module = load_profile(profile_paths()["rpi_cm4_4gb"])
    assert [c.max_frequency_mhz for c in module.clusters] == [1500]


def test_a_base_is_looked_for_beside_the_file_first(here: Path) -> None:
    text = profile_paths()["rpi4b_4gb"].read_text()
    write(here, "rpi4b_4gb", text.replace("threads = 1", "threads = 3"))
    path = write(here, "mine", 'schema = 1\nextends = "rpi4b_4gb"\n')
    assert load_profile(path).threads == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'extends = "a"'}, r"a.toml: extends: it extends itself"),
        ({"a": 'extends = "b"', "b": 'extends = "a"'}, r"b.toml: extends: this is a circle: a -> b -> a"),
        ({"a": 'extends = "rpi5_8g"'}, r"a.toml: extends: unknown device profile 'rpi5_8g'; did you mean 'rpi5_8gb'"),
        ({"a": "extends = 5"}, r"a.toml: extends: 5 is not the name"),
        ({"a": 'extends = "b"', "b": "modle = 1"}, r"b.toml: .*modle: unknown key; did you mean 'model'"),
        ({"a": 'extends = "rpi5_8gb"\nthread = 1'}, r"a.toml: thread: unknown key; did you mean 'threads'"),
        ({"a": 'extends = "rpi5_8gb"\nsoc = "BCM2713"'}, r"a.toml: no source for soc, which rpi5_8gb says otherwise"),
        ({"a": 'extends = "rpi5_8gb"\nkernel = "6.6"'}, r"a.toml: no source for kernel"),
        ({"a": 'extends = "rpi5_8gb"\nname = "b"'}, r"a.toml: name: a profile is called as its file is"),
        ({"a": 'extends = "rpi5_8gb"\n[thermal]\nstart_below = "90 C"\n[sources]\nthermal = "x"'}, r"a.toml: .*start_below = 90 C is not below abort_above = 80 C"),
        ({"a": 'extends = "rpi5_8gb"\nram_bytes = "-1 GiB"\n[sources]\nram_bytes = "x"'}, r"a.toml: ram_bytes: .* is too little"),
        ({"a": 'extends = "rpi5_8gb"\nwork_dir = "x"'}, r"a.toml: work_dir: "),
        ({"a": 'extends = "rpi5_8gb"\nruntime_sha256 = "x"'}, r"a.toml: runtime_sha256: "),
        ({"a": 'extends = "rpi5_8gb"\n[sources]\nsok = "x"'}, r"a.toml: \[sources\] names no fact of this profile: sok"),
    ],
)  # fmt: skip
def test_a_mistake_in_what_is_extended_names_file_and_key(
    here: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        write(here, name, f"schema = 1\n{text}\n")
    with pytest.raises(ProfileError, match=message):
        load_profile(here / "a.toml")


def test_show_says_which_profile_gave_each_fact(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "show", "rpi_cm4_4gb"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"soc +BCM2711 +rpi4b_4gb +https://", shown)
    assert re.search(r"model +Raspberry Pi Compute Module 4 +rpi_cm4_4gb +https://", shown)
    assert re.search(r"ssh_port +22 +default\n", shown)
    assert main(["devices", "show", "rpi_cm4_4gb", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["extends"], shown["soc"], shown["origins"]["soc"]) == (["rpi4b_4gb"], "BCM2711", "rpi4b_4gb")  # fmt: skip


def test_profiles_are_chosen_by_a_filter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "match", "soc=bcm2711 bits=64", "--json"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)] == ["rpi4b_4gb", "rpi_cm4_4gb"]
    assert main(["devices", "match", "soc=z80"]) == 1
    assert "no profile fits" in capsys.readouterr().out
    assert main(["devices", "match", "sock=bcm2712"]) == 2
    assert "did you mean 'soc'" in capsys.readouterr().err


def test_a_machine_that_is_no_board_fits_no_profile(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert main(["devices", "match", "local", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["profiles"]
    assert not any(item["same_board"] for item in found)
    assert "localhost" not in {item["name"] for item in found}


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("rpi5_8gb", 'rpi5_8gb = "ssh://user@host"'),
        ("pixel_8", 'pixel_8 = "adb://SERIAL"'),
        ("pixel_8", "--device adb://SERIAL or ssh://user@host:8022"),
    ],
)
def test_a_board_without_an_address_is_told_how_such_boards_are_reached(
    here: Path, name: str, example: str
) -> None:
    with pytest.raises(RequestError, match="no address") as caught:
        resolve_targets([name])
    assert example in caught.value.hint
