"""The payload's power meter, `targets/linux/energy.py`: captured outputs, made-up hwmon trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.board_side import wait_for
from tests.unit.test_worker import TARGET, load, make_spec, refused, run_worker

pytestmark = pytest.mark.slow  # real processes and trainings: not for the inner loop

# The form of `vcgencmd pmic_read_adc` on a Raspberry Pi 5; the values are typical, not captured.
PI5 = """   3V7_WL_SW_A current(0)=0.09759375A
   3V3_SYS_A current(1)=0.08685844A
   1V8_SYS_A current(2)=0.17761200A
  DDR_VDD2_A current(3)=0.01561392A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.18932160A
    0V8_SYS_A current(6)=0.36504750A
  VDD_CORE_A current(7)=0.81000000A
   3V3_DAC_A current(17)=0.00012210A
   3V3_ADC_A current(18)=0.00012210A
   0V8_AON_A current(16)=0.00616605A
      HDMI_A current(22)=0.01294260A
 3V7_WL_SW_V volt(8)=3.72041700V
   3V3_SYS_V volt(9)=3.31299200V
   1V8_SYS_V volt(10)=1.79633400V
  DDR_VDD2_V volt(11)=1.10476200V
  DDR_VDDQ_V volt(12)=0.60818400V
   1V1_SYS_V volt(13)=1.10256600V
   0V8_SYS_V volt(14)=0.80201000V
  VDD_CORE_V volt(15)=0.88000000V
   3V3_DAC_V volt(20)=3.30769100V
   3V3_ADC_V volt(21)=3.30952300V
   0V8_AON_V volt(19)=0.79780000V
      HDMI_V volt(23)=5.14536000V
     EXT5V_V volt(24)=5.14536000V
      BATT_V volt(25)=0.00000000V
"""


@pytest.fixture(scope="module")
def energy() -> Any:
    return load("energy")


def chip(root: Path, number: int, **files: str) -> None:
    folder = root / f"sys/class/hwmon/hwmon{number}"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def vcgencmd(folder: Path, script: str) -> str:
    """A PATH that begins with a program vcgencmd, which runs ``script``."""
    program = folder / "bin" / "vcgencmd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def measure(folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return run_worker(make_spec(folder, "energy", idle_s=0.6, run_s=0.6), **environment)


# ------------------------------------------------------------------------------ one reading


def test_the_power_of_a_pi_5_is_the_sum_over_its_rails(energy: Any) -> None:
    # by hand, in W: 0.3631 + 0.2878 + 0.3190 + 0.0172 + 0 + 0.2087 + 0.2928 + 0.7128 (the cores)
    # + 0.0004 + 0.0004 + 0.0049 + 0.0666 = 2.2737, each rounded at 0.00005; and nothing of the
    # 5.15 V input, whose current nobody measures
    assert energy.pmic_watts(PI5) == pytest.approx(2.2737, abs=12 * 0.00005)


RAILS = st.dictionaries(
    st.from_regex(r"[0-9A-Z]{2,8}(_[A-Z]{2,4})?", fullmatch=True),
    st.tuples(st.floats(0, 10), st.floats(0, 10)),
    min_size=1,
    max_size=8,
)


@given(rails=RAILS)
def test_watts_are_volts_times_amperes_whatever_the_order_of_the_lines(
    energy: Any, rails: dict[str, tuple[float, float]]
) -> None:
    lines = [f"{name}_A current(1)={a:.8f}A" for name, (a, _) in rails.items()]
    lines += [f"  {name}_V volt(2)={v:.8f}V" for name, (_, v) in sorted(rails.items())]
    expected = sum(a * v for a, v in rails.values())
    # two factors below 10, each rounded at 5e-9, on each of up to 8 rails
    assert energy.pmic_watts("\n".join(lines)) == pytest.approx(expected, abs=8 * 1e-7)


@pytest.mark.parametrize(
    "text",
    ["", "error=1 error_msg=\"Command not registered\"", "EXT5V_V volt(24)=5.1V",
     PI5.replace("VDD_CORE_V", "VDD_COLD_V")],
)  # fmt: skip
def test_half_a_reading_is_none(energy: Any, text: str) -> None:
    with pytest.raises(energy.NoMeter):
        energy.pmic_watts(text)


@given(text=st.text(max_size=200))
def test_garbage_is_no_power(energy: Any, text: str) -> None:
    try:
        assert energy.pmic_watts(text) >= 0
    except energy.NoMeter:
        pass


# ------------------------------------------------------------------------------ which meter


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"power1_input": "2500000"}, 2.5),  # uW
        ({"in1_input": "5000", "curr1_input": "400"}, 2.0),  # mV, mA
        ({"power1_input": "2500000", "in1_input": "1", "curr1_input": "1"}, 2.5),
    ],
)
def test_an_ina2xx_gives_watts(
    energy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    watts: float,
) -> None:
    chip(tmp_path, 0, name="cpu_thermal", power1_input="7")
    chip(tmp_path, 3, name="ina219", **files)
    monkeypatch.setattr(sys.modules["sysfs"], "SYSROOT", str(tmp_path))
    method, read_watts = energy.find_meter()
    assert (method, read_watts()) == ("ina2xx:hwmon3", pytest.approx(watts))


def test_of_two_meters_nobody_knows_which_feeds_the_board(tmp_path: Path) -> None:
    chip(tmp_path, 0, name="ina226", power1_input="1")
    chip(tmp_path, 1, name="ina219", power1_input="1")
    answer = json.loads(measure(tmp_path, EDGEPIPE_SYSROOT=str(tmp_path)).stdout)
    assert (answer["what"], "hwmon0, hwmon1" in answer["error"]) == ("unsupported", True)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'error=1 error_msg=\"Command not registered\"'", "gives no current"),
        ("echo no access >&2; exit 255", "no access"),
    ],
)
def test_a_board_that_cannot_tell_is_no_fault_of_the_model(
    tmp_path: Path, script: str, reason: str
) -> None:
    path = vcgencmd(tmp_path, script)
    answer = json.loads(measure(tmp_path, EDGEPIPE_SYSROOT=str(tmp_path), PATH=path).stdout)
    assert (answer["what"], reason in answer["error"]) == ("unsupported", True)


def test_a_board_without_a_meter_says_so(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "energy", idle_s=0.1, run_s=0.1)
    assert refused(spec)["what"] == "unsupported"


# ------------------------------------------------------------------------------ a session


def test_a_session_gives_power_idle_and_running(tmp_path: Path) -> None:
    chip(tmp_path, 1, name="ina226", power1_input="2500000")
    # wired in on purpose, it comes before the PMIC
    path = vcgencmd(tmp_path, "printf 'VDD_CORE_A current(7)=1.0A\\nVDD_CORE_V volt(15)=1.0V\\n'")
    done = measure(tmp_path, EDGEPIPE_SYSROOT=str(tmp_path), PATH=path)
    data = json.loads(done.stdout)["ok"]
    assert data["method"] == "ina2xx:hwmon1"
    assert set(data["samples_idle"]) == set(data["samples_run"]) == {2.5}
    assert (data["idle_w"], data["run_w"]) == (2.5, 2.5)
    assert data["inferences"] > 0
    assert data["elapsed_ns"] >= 0.6e9
    assert data["failed_readings"] == 0


def test_idle_comes_first_and_running_after_it(tmp_path: Path) -> None:
    """A PMIC whose core current grows by 1 mA with every reading."""
    count = tmp_path / "count"
    script = f"""echo x >>{count}
n=$(wc -l <{count})
echo "VDD_CORE_A current(7)=0.$(printf %03d $n)A"
echo "VDD_CORE_V volt(15)=1.0V"
"""
    done = measure(tmp_path, EDGEPIPE_SYSROOT=str(tmp_path), PATH=vcgencmd(tmp_path, script))
    data = json.loads(done.stdout)["ok"]
    assert data["method"] == "pmic"
    samples = data["samples_idle"] + data["samples_run"]
    assert samples == sorted(samples)
    assert (
        data["run_w"]
        > data["idle_w"]
        == pytest.approx(sum(data["samples_idle"]) / len(data["samples_idle"]))
    )
    # ten readings a second at most, in 0.6 s and what one inference goes beyond
    assert 2 <= len(data["samples_idle"]) <= 7


def test_a_meter_that_fails_in_the_middle_gives_no_figure(tmp_path: Path) -> None:
    """It answers four times: twice where a meter is looked for, then to the first two samples."""
    count = tmp_path / "count"
    script = f"""echo x >>{count}
[ $(wc -l <{count}) -le 4 ] || exit 1
printf 'VDD_CORE_A current(7)=1.0A\\nVDD_CORE_V volt(15)=1.0V\\n'
"""
    done = measure(tmp_path, EDGEPIPE_SYSROOT=str(tmp_path), PATH=vcgencmd(tmp_path, script))
    answer = json.loads(done.stdout)
    assert (answer["what"], " 0 running readings" in answer["error"]) == ("unsupported", True)


def test_the_sampler_ends_with_whoever_asked(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"echo x >>{count}; printf 'VDD_CORE_A current(7)=1.0A\\nVDD_CORE_V volt(15)=1.0V\\n'"
    sampler = subprocess.Popen(
        [sys.executable, TARGET / "energy.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "EDGEPIPE_SYSROOT": str(tmp_path), "PATH": vcgencmd(tmp_path, script)},
    )
    wait_for(lambda: count.exists() and len(count.read_text().split()) >= 3)
    said, _ = sampler.communicate(timeout=30)  # closes its stdin
    answer = json.loads(said)
    assert answer["method"] == "pmic"
    times = [at for at, _ in answer["samples"]]
    assert times == sorted(times)
    assert {watts for _, watts in answer["samples"]} == {1.0}
