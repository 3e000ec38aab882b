"""Facts of a board: read below a made-up /proc and /sys, compared with profiles, written as one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import toolchain
from edgepipe.cli import main
from edgepipe.device import Completed, open_device
from edgepipe.device.parse import Facts, parse_facts
from edgepipe.errors import CommandFailed, NotReadyError
from edgepipe.probe import Difference, differences, probe, profile_toml, rank_profiles
from edgepipe.profile import SCHEMA_FILE, Cluster, Emulation, find_profile, load_profile
from edgepipe.resources import profile_paths, target_dir


@dataclasses.dataclass(frozen=True)
class Tree:
    """What the kernel of a board says. From public reports of these boards, not from ours."""

    model: str
    compatible: str
    part: str
    features: str
    max_khz: int
    ram_kib: int


V8 = "fp asimd evtstrm crc32 cpuid"
V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"  # fmt: skip
BOARDS = {
    "rpi3b_plus": Tree("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberrypi,3-model-b-plus\0brcm,bcm2837\0", "0xd03", V8, 1400000, 930220),
    "rpi4b_4gb": Tree("Raspberry Pi 4 Model B Rev 1.5", "raspberrypi,4-model-b\0brcm,bcm2711\0", "0xd08", V8, 1800000, 3884300),
    "rpi5_8gb": Tree("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b\0brcm,bcm2712\0", "0xd0b", V82, 2400000, 8245632),
    "rpi_zero2w": Tree("Raspberry Pi Zero 2 W Rev 1.0", "raspberrypi,model-zero-2-w\0brcm,bcm2837\0", "0xd03", V8, 1000000, 426604),
}  # fmt: skip


def write_tree(root: Path, tree: Tree) -> None:
    cores = "".join(
        f"processor\t: {i}\nBogoMIPS\t: 108.00\nFeatures\t: {tree.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {tree.part}\nCPU revision\t: 3\n\n"
        for i in range(4)
    )
    files = {
        "proc/cpuinfo": f"{cores}Revision\t: c03114\nSerial\t\t: 10000000deadbeef\nModel\t\t: {tree.model}\n",
        "proc/meminfo": f"MemTotal:      {tree.ram_kib} kB\nMemFree:   1 kB\nSwapTotal:     102396 kB\nSwapFree: 102396 kB\n",
        "proc/device-tree/model": f"{tree.model}\0",
        "proc/device-tree/compatible": tree.compatible,
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
        "sys/class/thermal/thermal_zone0/temp": "47231\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
    }
    for i in range(4):
        files[f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq"] = f"{tree.max_khz}\n"
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def run_probe(root: Path) -> Facts:
    done = subprocess.run(
        [sys.executable, target_dir("linux") / "probe.py", root],
        env={**os.environ, "EDGEPIPE_SYSROOT": str(root)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1  # one JSON object, one line, nothing else
    return parse_facts(done.stdout)


@pytest.mark.parametrize("name", BOARDS)
def test_a_raspberry_pi_is_what_its_profile_says(name: str, tmp_path: Path) -> None:
    write_tree(tmp_path, BOARDS[name])
    facts = run_probe(tmp_path)
    profile = find_profile(name, profile_paths())
    # these four are read from the running Python, which is this machine's
    facts = dataclasses.replace(
        facts, machine="aarch64", bits=64, libc="glibc 2.36",
        page_size_bytes=profile.page_size_bytes, runtimes={},
    )  # fmt: skip
    assert differences(facts, profile) == []
    assert facts.temperature_c == 47.231
    assert facts.governor == "ondemand"
    assert facts.throttling == ("under_voltage_occurred", "throttled_occurred")
    assert facts.swap_bytes == 102396 * 1024
    for other in BOARDS.keys() - {name}:
        assert differences(facts, find_profile(other, profile_paths())) != []


def test_a_machine_without_a_device_tree_says_null_not_nonsense(tmp_path: Path) -> None:
    facts = run_probe(tmp_path)  # an empty root: nothing can be read
    assert (facts.model, facts.socs, facts.clusters, facts.ram_bytes) == (None, (), (), None)
    assert (facts.os, facts.governor, facts.temperature_c, facts.throttling) == (None,) * 4


PI = Facts(
    model="Raspberry Pi 5 Model B Rev 1.0", socs=("BCM2712",),
    clusters=(Cluster(core="Cortex-A76", count=4, max_frequency_mhz=2400, isa=("dotprod", "fp16")),),
    ram_bytes=8245632 * 1024, swap_bytes=0, machine="aarch64", emulated="", bits=64,
    os="Debian GNU/Linux 12 (bookworm)", kernel="6.6", libc="glibc 2.36", page_size_bytes=16384,
    python="3.11.2", governor="ondemand", temperature_c=50.0, throttling=(), free_bytes=10**9,
    runtimes={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": None}, Difference("model", "Raspberry Pi 5 Model B", "?")),
        ({"model": "Raspberry Pi 500 Rev 1.0"}, Difference("model", "Raspberry Pi 5 Model B", "Raspberry Pi 500 Rev 1.0")),
        ({"socs": ()}, Difference("soc", "BCM2712", "?")),
        ({"ram_bytes": 4 << 30}, Difference("ram_bytes", "8 GiB", "4 GiB")),
        ({"ram_bytes": 16 << 30}, Difference("ram_bytes", "8 GiB", "16 GiB")),
        ({"machine": "armv7l"}, Difference("machine", "aarch64", "armv7l")),
        ({"bits": 32}, Difference("bits", "64", "32")),
        ({"os": "Debian GNU/Linux 13 (trixie)"}, Difference("os", "Debian GNU/Linux 12 (bookworm)", "Debian GNU/Linux 13 (trixie)")),
        ({"libc": None}, Difference("libc", "glibc 2.36", "?")),
        ({"page_size_bytes": 4096}, Difference("page_size_bytes", "16384", "4096")),
        ({"runtimes": {"ai_edge_litert": "2.1.0"}}, Difference("runtime_version", "2.3.0", "2.1.0")),
        ({"clusters": (Cluster(core="Cortex-A76", count=4, max_frequency_mhz=1500),)},
         Difference("clusters", "4 x Cortex-A76 at 2400 MHz (dotprod fp16)", "4 x Cortex-A76 at 1500 MHz")),
    ],
)  # fmt: skip
def test_each_fact_that_departs_from_the_profile_is_named(
    change: dict[str, object], difference: Difference
) -> None:
    profile = find_profile("rpi5_8gb", profile_paths())
    assert differences(PI, profile) == []
    assert differences(dataclasses.replace(PI, **change), profile) == [difference]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "change", "difference"),
    [
        ({"kernel": "6.6"}, {"kernel": "6.60.1"}, Difference("kernel", "6.6", "6.60.1")),
        ({"python": "3.11"}, {"python": "3.13.5"}, Difference("python", "3.11", "3.13.5")),
        ({"governor": "performance"}, {}, Difference("governor", "performance", "ondemand")),
        ({"governor": "performance"}, {"governor": None}, Difference("governor", "performance", "?")),
        ({"swap_bytes": 2.0**29}, {}, Difference("swap_bytes", "512 MiB", "0 MiB")),
        ({"swap_bytes": 2.0**29}, {"swap_bytes": None}, Difference("swap_bytes", "512 MiB", "?")),
        ({}, {"emulated": "/etc/edgepipe-emulated: qemu"}, Difference("emulated", "no", "/etc/edgepipe-emulated: qemu")),
        ({"emulated": Emulation(kind="user", cpu="cortex-a72", memory=2.0**30)}, {}, Difference("emulated", "user", "no")),
    ],
)  # fmt: skip
def test_what_a_profile_leaves_open_is_compared_where_it_says_it(
    said: dict[str, object], change: dict[str, object], difference: Difference
) -> None:
    profile = dataclasses.replace(find_profile("rpi5_8gb", profile_paths()), **said)  # type: ignore[arg-type]
    assert differences(dataclasses.replace(PI, **change), profile) == [difference]  # type: ignore[arg-type]


def test_a_line_of_versions_fits_every_version_of_it() -> None:
    profile = dataclasses.replace(find_profile("rpi5_8gb", profile_paths()), kernel="6.6", python="3.11", swap_bytes=102400.0 * 1024)  # fmt: skip
    facts = dataclasses.replace(PI, kernel="6.6.51+rpt-rpi-2712", swap_bytes=102396 * 1024)
    assert differences(facts, profile) == []


@pytest.mark.parametrize(("mhz", "fits"), [(2400, True), (2350, True), (2300, False), (2500, False), (0, False)])  # fmt: skip
def test_a_frequency_may_be_rounded_but_not_another(mhz: int, fits: bool) -> None:
    cluster = dataclasses.replace(PI.clusters[0], max_frequency_mhz=mhz)
    facts = dataclasses.replace(PI, clusters=(cluster,))
    assert (differences(facts, find_profile("rpi5_8gb", profile_paths())) == []) is fits


def test_profiles_are_ranked_by_how_well_they_fit_a_board() -> None:
    profiles = [load_profile(path) for path in profile_paths().values()]
    mine = dataclasses.replace(load_profile(profile_paths()["rpi5_8gb"]), name="mine", os="any")
    facts = dataclasses.replace(PI, os="Debian GNU/Linux 13 (trixie)")
    ranked = rank_profiles(facts, [*profiles, mine])
    assert [fit.profile.name for fit in ranked if fit.same_board] == ["mine", "rpi5_8gb"]
    assert ranked[0].differences == ()
    assert [d.fact for d in ranked[1].differences] == ["os"]
    assert not {"localhost", "android_arm64"} & {fit.profile.name for fit in ranked}
    emulated = rank_profiles(dataclasses.replace(facts, emulated="device tree"), profiles)
    assert not any(fit.same_board and not fit.profile.emulated for fit in emulated)


# ------------------------------------------------------------- what boards were captured to print

CAPTURED = Path(__file__).parents[1] / "fixtures" / "boards"


@pytest.mark.parametrize("name", sorted(p.parent.name for p in CAPTURED.glob("*/cpuinfo")))
def test_the_cores_of_a_profile_are_those_that_such_a_board_reports(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    shutil.copy(CAPTURED / name / "cpuinfo", tmp_path / "proc")
    profile = find_profile(name, profile_paths())

    def kinds(clusters: tuple[Cluster, ...]) -> list[tuple[str, int, list[str]]]:
        return sorted((c.core, c.count, sorted(c.isa)) for c in clusters)

    facts = run_probe(tmp_path)
    assert kinds(facts.clusters) == kinds(profile.clusters)
    assert all(c.max_frequency_mhz == 0 for c in facts.clusters)  # which no cpuinfo says
    # the CPUs to stay on are those of the fastest kind
    if profile.affinity:
        fastest = max(profile.clusters, key=lambda c: c.max_frequency_mhz)
        assert len(profile.affinity) == fastest.count


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("rpi5_8gb", "Debian GNU/Linux 12 (bookworm)"),
        ("rpi4b_4gb_32bit", "Raspbian GNU/Linux 12 (bookworm)"),
        ("rpi_zero2w", "Ubuntu Core 24"),  # PRETTY_NAME is not its first line
    ],
)
def test_the_system_is_named_as_its_os_release_does(name: str, system: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    shutil.copy(CAPTURED / name / "os-release", tmp_path / "etc")
    assert run_probe(tmp_path).os == system


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpuinfo", "os-release"])
@given(damage=st.data())
@settings(max_examples=10, deadline=None)
def test_a_damaged_file_is_facts_or_none_of_them_never_a_crash(
    name: str, damage: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = (CAPTURED / "rpi4b_4gb_32bit" / name).read_bytes()
    start = damage.draw(st.integers(0, len(whole)))
    end = damage.draw(st.integers(start, len(whole)))
    root = tmp_path_factory.mktemp("root")
    folder = root / ("proc" if name == "cpuinfo" else "etc")
    folder.mkdir()
    (folder / name).write_bytes(whole[:start] + damage.draw(st.binary(max_size=20)) + whole[end:])
    facts = run_probe(root)
    assert sum(c.count for c in facts.clusters) <= 8


# What `vcgencmd get_throttled` printed on boards, from public reports; the last are made up.
@pytest.mark.parametrize(
    ("printed", "flags"),
    [
        ("throttled=0x0", ()),
        ("throttled=0x50000", ("under_voltage_occurred", "throttled_occurred")),
        ("throttled=0x50005", ("under_voltage", "throttled", "under_voltage_occurred", "throttled_occurred")),
        ("throttled=0xe0008", ("soft_temperature_limit", "frequency_capped_occurred", "throttled_occurred", "soft_temperature_limit_occurred")),
        ("VCHI initialization failed", None),
        ('error=1 error_msg="Command not registered"', None),
        ("throttled=0x", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_firmwares_word_on_throttling_is_read_from_vcgencmd(
    printed: str, flags: tuple[str, ...] | None, tmp_path: Path
) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = get_throttled ] && echo '{printed}'\n")
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("EDGEPIPE_SYSROOT", None)
    done = subprocess.run([sys.executable, target_dir("linux") / "probe.py", tmp_path], env=env, check=True, capture_output=True, text=True)  # fmt: skip
    assert parse_facts(done.stdout).throttling == flags


def test_the_localhost_profile_fits_every_machine() -> None:
    assert differences(PI, find_profile("localhost", profile_paths())) == []
    assert differences(probe(open_device("local")), find_profile("localhost", profile_paths())) == []  # fmt: skip


NAMES = st.text(max_size=12).filter(lambda text: " Rev " not in text)


@given(
    model=NAMES, os_name=NAMES, core=NAMES, count=st.integers(1, 64), mhz=st.integers(0, 6000),
    ram_bytes=st.integers(4 << 20, 1 << 40), machine=st.sampled_from(["aarch64", "x86_64", "riscv64"]),
)  # fmt: skip
def test_a_written_profile_reads_back_as_what_was_probed(
    tmp_path_factory: pytest.TempPathFactory,
    model: str, os_name: str, core: str, count: int, mhz: int, ram_bytes: int, machine: str,
) -> None:  # fmt: skip
    cluster = Cluster(core=core, count=count, max_frequency_mhz=mhz, isa=("dotprod",))
    facts = dataclasses.replace(
        PI, model=model, os=os_name, clusters=(cluster,), ram_bytes=ram_bytes, machine=machine
    )
    path = tmp_path_factory.mktemp("profiles") / "mine.toml"
    path.write_text(profile_toml(facts, date="2026-11-23"), encoding="utf-8")
    profile = load_profile(path)
    assert profile.clusters == (cluster,)
    assert (profile.model, profile.os) == (model or "any", os_name or "any")
    assert 0 <= profile.ram_bytes - ram_bytes < 2**20
    assert profile.machine == (machine if machine != "riscv64" else "any")
    assert set(profile.sources.values()) == {"probed on 2026-11-23"}
    assert differences(facts, profile) == []


# ---------------------------------------------------------------------------- through the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and an empty home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_probe_writes_a_profile_that_fits_the_machine(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "local", "--write", "mine"]) == 0
    assert main(["probe", "local", "--profile", "mine", "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :])["differences"] == []
    folder = here / "device_profiles"
    assert {path.name for path in folder.iterdir()} == {"mine.toml", SCHEMA_FILE}
    assert (folder / "mine.toml").read_text().splitlines()[0] == f"#:schema {SCHEMA_FILE}"
    schema = json.loads((folder / SCHEMA_FILE).read_text())
    jsonschema.Draft202012Validator(schema).validate(tomllib.loads((folder / "mine.toml").read_text()))  # fmt: skip


def test_probe_never_overwrites_a_profile(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "device_profiles").mkdir()
    (here / "device_profiles" / "mine.toml").write_text("kept")
    assert main(["probe", "local", "--write", "mine"]) == 2
    assert "exists" in capsys.readouterr().err
    assert (here / "device_profiles" / "mine.toml").read_text() == "kept"


def test_probe_says_what_differs_and_exits_1(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "local", "--profile", "rpi_zero2w"]) == 1
    assert "differs from profile rpi_zero2w:\n  model: profile Raspberry Pi Zero 2 W" in capsys.readouterr().out  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "a b", "", "a.b"])
def test_a_name_that_is_no_file_name_is_refused(
    here: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "local", f"--write={name}"]) == 2
    assert not (here / "device_profiles").exists()


class Broken:
    """A board whose python3 does not do what it should."""

    address = "broken"

    def __init__(self, returncode: int, stdout: bytes, home: bytes = b"/home/pi") -> None:
        self.done = Completed(returncode, stdout, b"it hurts")
        self.home = Completed(0, home, b"")

    def run(self, argv: list[str], *, timeout_s: float) -> Completed:
        return self.home if argv[0] == "sh" else self.done

    def push(self, local: Path, remote: str) -> bool:
        return True

    def pull(self, remote: str, local: Path) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


def test_a_null_device_has_nothing_to_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "null://quiet"]) == 2
    assert "no facts to read" in capsys.readouterr().err


def test_a_board_without_python_is_not_ready() -> None:
    with pytest.raises(NotReadyError, match="has no python3"):
        probe(Broken(127, b""))  # type: ignore[arg-type]


def test_a_probe_that_fails_shows_what_it_said() -> None:
    with pytest.raises(CommandFailed, match="it hurts"):
        probe(Broken(1, b""))  # type: ignore[arg-type]
    with pytest.raises(CommandFailed, match="something else"):
        probe(Broken(0, b"hello"))  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [b"", b"Welcome!\n/home/pi", b"/motd\n/home/pi"])
def test_a_banner_is_not_taken_for_the_home_folder(said: bytes) -> None:
    with pytest.raises(CommandFailed, match="home folder") as caught:
        probe(Broken(0, b"", said))  # type: ignore[arg-type]
    assert "bashrc" in caught.value.hint


def test_the_work_folder_and_target_of_a_profile_are_used_and_passed_on(
    here: Path, tmp_path: Path
) -> None:
    targets = tmp_path / "home/.config/edgepipe/targets"
    shutil.copytree(target_dir("linux"), targets / "mine")
    (here / "device_profiles").mkdir()
    shipped = profile_paths()["localhost"].read_text()
    changed = shipped.replace('target = "linux"', 'target = "mine"')
    changed = changed.replace("~/.edgepipe", str(tmp_path / "elsewhere"))
    (here / "device_profiles/board.toml").write_text(changed)
    assert main(["probe", "local", "--profile", "board", "--write", "copy"]) == 0
    assert load_profile(here / "device_profiles/copy.toml").target == "mine"
    assert (tmp_path / "elsewhere/agents").is_dir()
    assert not (tmp_path / "home/.edgepipe").exists()


def test_an_empty_profile_is_not_the_same_as_none(here: Path) -> None:
    assert main(["probe", "local", "--profile", ""]) == 2


def test_the_profile_of_a_board_with_tflite_runtime_asks_for_what_the_runner_reports() -> None:
    text = profile_toml(dataclasses.replace(PI, runtimes={"tflite_runtime": "2.14.0"}), date="x")
    asked = tomllib.loads(text)
    assert (asked["runtime"], asked["runtime_version"]) == ("tflite-runtime", "2.14.0")


def test_the_c_runner_says_of_a_board_what_probe_py_says(tmp_path: Path) -> None:
    if shutil.which("cc") is None and not toolchain.is_installed("zig"):
        pytest.skip("no C compiler on this machine")
    # of the target for phones nobody asks for Python
    by_runner, by_python = (
        probe(open_device("local"), target=target, work_dir=str(tmp_path))
        for target in ("android", "linux")
    )
    changing = ("free_bytes", "memory_available_bytes", "load_1min", "temperature_c", "thermal_zones_c")  # fmt: skip
    same = {name: getattr(by_python, name) for name in changing}
    assert (by_runner.python, by_runner.runtimes) == ("", {})
    # what perf_event_open says is told in other words, and python3 may be of another glibc
    told = {"python": by_python.python, "runtimes": by_python.runtimes, "no_instructions": by_python.no_instructions}  # fmt: skip
    assert dataclasses.replace(by_runner, **same, **told) == by_python
