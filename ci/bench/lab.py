"""What many boards cost this host: emulated SSH endpoints on loopback, driven at once.

    python ci/bench/lab.py                   8 and 64 boards
    python ci/bench/lab.py --boards 8 16

Every board is a port and a home of a real sshd (one serves 16). Its work is a program that sleeps, as a board
that measures does: the boards are the limit, not this host. What is timed is what a lab does before
and after: connect, push a model, run, pull the answer, close; all through `lab.on_boards`.

Prints one line per number of boards; exit code 1 where 64 boards take more than twice as long as 8,
or this process more than 300 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path

from edgepipe.device import open_device
from edgepipe.errors import EdgepipeError
from edgepipe.inventory import Target
from edgepipe.lab import on_boards
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths
from edgepipe.testing import LoopbackSshd

MODEL_BYTES = 300_000  # a small int8 network
SLEEP_S = 10.0  # shorter than any measurement: three sessions of 2 s alone take as long
MAX_PORTS = 16  # MAX_LISTEN_SOCKS of OpenSSH's sshd
MAX_BYTES = 300e6
MAX_RATIO = 2.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """``wall_s`` of all boards together; ``peak_bytes`` is this process's largest resident set."""

    boards: int
    failed: int
    wall_s: float
    peak_bytes: int
    threads: int


def drive(boards: int, *, sleep_s: float, folder: Path) -> Cost:
    """Push a new model to every board, let it work ``sleep_s``, pull its answer."""
    model = folder / f"model-{boards}.tflite"
    model.write_bytes(secrets.token_bytes(MODEL_BYTES))
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    profile = find_profile("localhost", profile_paths())
    most_threads = 0

    def work(target: Target, stop: threading.Event) -> str:
        nonlocal most_threads
        device = open_device(target.address, **options[target.address])
        try:
            device.push(model, f"~/models/{sha256}.tflite")
            most_threads = max(most_threads, threading.active_count())
            program = f'sleep {sleep_s}; sha256sum "$HOME/models/{sha256}.tflite" > "$HOME/answer"'
            done = device.run(["sh", "-c", program], timeout_s=sleep_s + 60)
            answer = folder / f"{boards}-{target.name}"
            device.pull("~/answer", answer)
            return f"{done.returncode} {answer.read_text().split()[0]}"
        finally:
            device.close()

    with contextlib.ExitStack() as stack:
        sizes = [min(MAX_PORTS, boards - first) for first in range(0, boards, MAX_PORTS)]
        servers = [stack.enter_context(LoopbackSshd(boards=size)) for size in sizes]
        options = {address: s.options() for s in servers for address in s.addresses}
        targets = [Target(a, profile, f"board-{n}") for n, a in enumerate(options)]
        began_s = time.monotonic()
        outcomes = on_boards(targets, work)
        wall_s = time.monotonic() - began_s
    for outcome in outcomes:
        if isinstance(outcome, EdgepipeError):
            print(f"  {outcome.message}", file=sys.stderr)
    failed = sum(outcome != f"0 {sha256}" for outcome in outcomes)
    return Cost(boards, failed, wall_s, peak_bytes(), most_threads)


def peak_bytes() -> int:
    """VmHWM of this process, proc(5)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--boards", type=int, nargs="+", default=[8, 64], metavar="N")
    parser.add_argument("--sleep", type=float, default=SLEEP_S, metavar="S", help="how long a board works (default: %(default)g)")  # fmt: skip
    args = parser.parse_args()
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for boards in args.boards:
            cost = drive(boards, sleep_s=args.sleep, folder=Path(folder))
            print(f"{boards:3} boards: {cost.wall_s:.1f} s, of which {args.sleep:g} s are the boards'; peak {cost.peak_bytes / 1e6:.0f} MB, {cost.threads} threads, {cost.failed} failed", flush=True)  # fmt: skip
            costs.append(cost)
    ratio = costs[-1].wall_s / costs[0].wall_s
    print(json.dumps({"ratio": round(ratio, 2), "costs": [dataclasses.asdict(c) for c in costs]}))
    fine = ratio <= MAX_RATIO and all(c.peak_bytes <= MAX_BYTES and not c.failed for c in costs)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
