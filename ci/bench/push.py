"""Throughput of a push over SFTP against OpenSSH's scp, on loopback, in alternation.

    python ci/bench/push.py [--size-mb 50] [--rounds 5]

Both send the same random file to the same server; each scp opens its own connection, as a script
that calls it would, and each push opens its own device. The push also hashes the file on both
sides, which scp does not. Prints the median of each, their ratio (above 1 = faster than scp), and
how many bytes crossed the connection when the same file was pushed again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgepipe.device import open_device
from edgepipe.device.ssh import SshDevice
from edgepipe.testing import LoopbackSshd

TARGET_RATIO = 0.7


def scp_s(server: LoopbackSshd, source: Path, target: Path) -> float:
    command = ["scp", "-q", "-F", "none", "-i", str(server.identity_file), "-P", str(server.port)]
    command += ["-o", f"UserKnownHostsFile={server.known_hosts}", "-o", "BatchMode=yes"]
    start_s = time.perf_counter()
    subprocess.run([*command, str(source), f"127.0.0.1:{target}"], check=True)
    return time.perf_counter() - start_s


def push_s(server: LoopbackSshd, source: Path, target: Path) -> float:
    start_s = time.perf_counter()
    with open_device(server.address, **server.options()) as device:
        if not device.push(source, str(target)):
            raise SystemExit("the push moved nothing")
    return time.perf_counter() - start_s


def second_push_bytes(server: LoopbackSshd, source: Path, target: Path) -> int:
    """Bytes that this side sends when the board has the file already."""
    with open_device(server.address, **server.options()) as device:
        device.push(source, str(target))
        assert isinstance(device, SshDevice)
        before = bytes_sent(device)
        if device.push(source, str(target)):
            raise SystemExit("the second push moved the file again")
        return bytes_sent(device) - before


def bytes_sent(device: SshDevice) -> int:
    """What the kernel counts as sent on the device's TCP connection."""
    import socket
    import struct

    transport = device._client.get_transport()
    assert transport is not None
    # struct tcp_info of <linux/tcp.h>: 8 bytes, 24 x u32, then u64 pacing_rate, max_pacing_rate,
    # bytes_acked
    raw = transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("<Q", raw, 8 + 24 * 4 + 16)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mb", type=float, default=50, help="size of the file, 10^6 bytes")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"scp": [], "push": []}
    with LoopbackSshd() as server, tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model", Path(folder) / "copy"
        source.write_bytes(os.urandom(int(options.size_mb * 1e6)))
        for number in range(options.rounds + 1):
            # the first round warms the page cache and is not counted; the order alternates
            for name, send in sorted([("scp", scp_s), ("push", push_s)], reverse=bool(number % 2)):
                target.unlink(missing_ok=True)
                taken_s = send(server, source, target)
                if number:
                    times[name].append(taken_s)
        moved = second_push_bytes(server, source, target)
    for name, values in times.items():
        print(f"{name:5s} median {statistics.median(values):.3f} s  {options.size_mb / statistics.median(values):.0f} MB/s  ({', '.join(f'{v:.2f}' for v in values)})")  # fmt: skip
    ratio = statistics.median(times["scp"]) / statistics.median(times["push"])
    print(f"push is {ratio:.2f}x the throughput of scp (target: at least {TARGET_RATIO}x)")
    print(f"second push of the same file: {moved} bytes sent, no model bytes")
    return 0 if ratio >= TARGET_RATIO and moved < 100_000 else 1


if __name__ == "__main__":
    sys.exit(main())
