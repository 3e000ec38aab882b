#!/usr/bin/env python3
"""Facts of a Linux board, as one JSON object on stdout: ``python3 probe.py [WORK_DIR]``.

Standard library, Python 3.7 or newer; lies beside board.py, whose readings it uses. Raw readings
only: what they mean (names of cores, instruction sets) is decided on the host, in
edgepipe/device/parse.py. ``null`` = this board does not say. EDGEPIPE_SYSROOT reads /proc, /sys
and /etc below another folder.
"""

import json
import os
import re
import sys

sys.dont_write_bytecode = True  # leaves nothing beside the files that were pushed

import board  # noqa: E402

SCHEMA = 1


def cpus():
    """One entry per CPU, in order. Frequencies in kHz, as the kernel gives them."""
    found = []
    for block in re.split(r"\n\s*\n", board.read("/proc/cpuinfo", "", limit=1 << 20)):
        pairs = re.findall(r"^([^:\n]*?)\s*:[ \t]*(.*)$", block, re.M)
        values = {key.strip().lower(): value.strip() for key, value in pairs}
        if not values.get("processor", "").isdigit():
            continue  # the trailer with Hardware, Revision and Serial
        number = int(values["processor"])
        base = "/sys/devices/system/cpu/cpu%d/cpufreq/" % number
        found.append(
            {
                "cpu": number,
                "implementer": values.get("cpu implementer"),
                "part": values.get("cpu part"),
                "name": values.get("model name"),
                "features": (values.get("features") or values.get("flags") or "").split(),
                "max_khz": board.read_int(base + "cpuinfo_max_freq"),
                "min_khz": board.read_int(base + "cpuinfo_min_freq"),
            }
        )
    return found


def memory():
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", board.read("/proc/meminfo", ""), re.M))
    return {
        "total_bytes": int(meminfo["MemTotal"]) * 1024 if "MemTotal" in meminfo else None,
        "swap_bytes": int(meminfo["SwapTotal"]) * 1024 if "SwapTotal" in meminfo else None,
    }


def libc():
    version = board.glibc_version()
    return "glibc " + version if version else None


def main(argv):
    folder = os.path.expanduser(argv[1] if len(argv) > 1 else "~")
    facts = {
        "schema": SCHEMA,
        "device": board.device_facts(),
        "libc": libc(),
        "compatible": board.read("/proc/device-tree/compatible", "").split(),
        "cpus": cpus(),
        "memory": memory(),
        "health": board.health(),
        "free_bytes": board.free_bytes(folder),
        "packages": {name: item["version"] for name, item in board.packages().items()},
    }
    sys.stdout.write(json.dumps(facts, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
