#!/usr/bin/env python3
"""Reads the power meter a board has: the PMIC of a Raspberry Pi 5, or an INA2xx on I2C.

    python3 energy.py     sample at 10 Hz until stdin ends, then print ONE JSON object:
                          {"method", "samples": [[CLOCK_MONOTONIC ns, W], ...], "failed": count}

A process of its own, so that reading never sits inside an inference. What a reading itself takes
(vcgencmd: about 10 ms of CPU) is in idle and run samples alike and leaves their difference alone.
Standard library only, Python 3.7 or newer.
"""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

from sysfs import names, read, read_int

PERIOD_S = 0.1


class NoMeter(Exception):
    """This board cannot tell its power; the text says why."""


def pmic_watts(text):
    """Watts from ``vcgencmd pmic_read_adc``: the sum of volts times amperes over its rails.

    Lines: ``VDD_CORE_A current(7)=0.77860000A`` and ``VDD_CORE_V volt(15)=0.72037050V``. EXT5V_V
    and BATT_V have no current: what USB devices draw at 5 V is not in the sum.
    """
    found = re.findall(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=([0-9.]+)[AV]", text)
    amperes = {rail: float(value) for rail, kind, value in found if kind == "A"}
    volts = {rail: float(value) for rail, kind, value in found if kind == "V"}
    unpaired = sorted(set(amperes) - set(volts))
    if not amperes or unpaired:
        raise NoMeter(
            "vcgencmd pmic_read_adc gives no current"
            if not amperes
            else "vcgencmd pmic_read_adc gives no voltage of %s" % ", ".join(unpaired)
        )
    return sum(amperes[rail] * volts[rail] for rail in amperes)


def read_pmic():
    try:
        done = subprocess.run(
            ["vcgencmd", "pmic_read_adc"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NoMeter("vcgencmd pmic_read_adc: %s" % exc)
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        raise NoMeter("vcgencmd pmic_read_adc: %s" % (text.strip() or done.returncode))
    return pmic_watts(text)


def read_ina2xx(chip):
    """Watts by the kernel's ina2xx driver (Documentation/hwmon/ina2xx.rst): power1_input is in
    uW; in1_input, the bus voltage, in mV; curr1_input in mA."""
    base = "/sys/class/hwmon/%s/" % chip
    microwatts = read_int(base + "power1_input")
    if microwatts is None:
        millivolts, milliamperes = read_int(base + "in1_input"), read_int(base + "curr1_input")
        if millivolts is None or milliamperes is None:
            raise NoMeter("%s gives neither power nor voltage and current" % chip)
        microwatts = millivolts * milliamperes
    return microwatts / 1e6


def find_meter():
    """(method, a function that returns watts), or NoMeter. An INA2xx, which someone wired in on
    purpose, comes before the PMIC; of several, nobody here knows which feeds the board."""
    chips = [
        chip
        for chip in names("/sys/class/hwmon")
        if re.match(r"ina2\d\d$", read("/sys/class/hwmon/%s/name" % chip, ""))
    ]
    if len(chips) > 1:
        raise NoMeter("which of %s feeds the board is not known" % ", ".join(chips))
    if chips:
        meter = "ina2xx:" + chips[0], lambda: read_ina2xx(chips[0])
    elif shutil.which("vcgencmd"):
        meter = "pmic", read_pmic
    else:
        raise NoMeter("this board has no INA2xx and no vcgencmd")
    meter[1]()
    return meter


def main():
    try:
        # the inferences may be pinned to one CPU, and so would be this child of theirs
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    except OSError:
        pass
    method, watts = find_meter()
    samples, failed, due = [], 0, time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        due = max(due + PERIOD_S, time.monotonic())
        try:
            value = watts()
        except NoMeter:
            failed += 1
        else:
            samples.append([time.monotonic_ns(), value])
    json.dump({"method": method, "samples": samples, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    main()
