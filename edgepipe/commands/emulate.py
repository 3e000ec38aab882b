"""``edgepipe emulate``: boards without hardware, run by QEMU on this machine."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output
from edgepipe.errors import RequestError

if TYPE_CHECKING:
    from edgepipe.emulator.machine import Running


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Build, start and stop virtual boards: arm64 machines of QEMU's, reached over SSH.\n\n"
        "  edgepipe emulate build virt-pi-4      once, about a minute\n"
        "  edgepipe bench model.tflite --device virt://virt-pi-4\n\n"
        "A board that is not up is started for each command and ends with it; `up` keeps one on.\n"
        "They compute and take memory as the real boards do, and count instructions; how long\n"
        "anything takes on them says nothing."
    )
    parser.add_argument("action", choices=["build", "up", "down", "list"], help="build a board, start it, stop it, or list all")  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="virtual boards (default for list: all)")  # fmt: skip
    parser.add_argument("--port", type=int, default=0, metavar="N", help="up: port of 127.0.0.1 for SSH (default: a free one)")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="build, up, down: all there are")


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.emulator.build import emulated_profiles, find_emulation

    if args.action == "list" or args.all:
        names = args.names or list(emulated_profiles())
    else:
        names = args.names
    if not names:
        raise RequestError(
            f"`edgepipe emulate {args.action}` needs the name of a virtual board",
            hint=f"edgepipe emulate {args.action} virt-pi-4   (or --all)",
        )
    if args.port and (args.action != "up" or len(names) != 1):
        raise RequestError("--port is for `up` with one board")
    if not 0 <= args.port < 2**16:
        raise RequestError(f"--port {args.port} is no port", hint="write a number from 1 to 65535")
    for name in names:
        find_emulation(name)  # every name is checked before any work starts
    action = {"build": _build, "up": _up, "down": _down, "list": _list}[args.action]
    action(args, names, out)
    return 0


def _build(args: argparse.Namespace, names: list[str], out: Output) -> None:
    from edgepipe.emulator.build import build, disk_bytes
    from edgepipe.units import format_bytes

    result = []
    for name in names:
        board = build(name)
        out.text(f"{name:16} built, {format_bytes(disk_bytes(board.folder))} on disk; its address is virt://{name}")  # fmt: skip
        result.append({"name": name, "address": f"virt://{name}", "folder": str(board.folder)})
    out.json(result)


def _up(args: argparse.Namespace, names: list[str], out: Output) -> None:
    from edgepipe.emulator.machine import up

    running = [up(name, port=args.port) for name in names]
    for board in running:
        out.text(f"virt://{board.name}\n  {shlex.join(board.ssh_command())}")
    out.json([_as_dict(board) for board in running])


def _down(args: argparse.Namespace, names: list[str], out: Output) -> None:
    from edgepipe.emulator.machine import down

    stopped = [name for name in names if down(name)]
    for name in names:
        out.text(f"{name:16} {'stopped' if name in stopped else 'was not up'}")
    out.json({"stopped": stopped})


def _list(args: argparse.Namespace, names: list[str], out: Output) -> None:
    from edgepipe.emulator.build import disk_bytes, find_board, find_emulation
    from edgepipe.emulator.machine import list_running
    from edgepipe.probe import ram_text
    from edgepipe.report import Table, text_table
    from edgepipe.units import format_bytes

    running = list_running()
    rows, data = [], []
    for name in names:
        emulation, board = find_emulation(name), find_board(name)
        own = [r for r in running if r.name == name]
        size_bytes = disk_bytes(board.folder) if board else 0
        ports = ", ".join(f"up, port {r.port}" if r.is_kept else f"in use by process {r.owner_pid}" for r in own)  # fmt: skip
        rows.append(
            (
                name,
                emulation.cpu,
                ram_text(emulation.memory) if emulation.memory else "-",
                "whole machine" if emulation.kind == "system" else "processes only",
                emulation.userland,
                format_bytes(size_bytes) if board else "not built",
                ports or "-",
            )
        )
        data.append(
            {
                "name": name, "cpu": emulation.cpu, "memory_bytes": int(emulation.memory),
                "kind": emulation.kind, "userland": emulation.userland, "built": board is not None,
                "disk_bytes": size_bytes, "running": [_as_dict(r) for r in own],
            }
        )  # fmt: skip
    header = ("board", "CPU", "memory", "emulated", "userland", "on disk", "running")
    out.text(text_table(Table("virtual boards", header, tuple(rows))))
    out.json(data)


def _as_dict(board: Running) -> dict[str, Any]:
    return {
        "name": board.name, "address": f"virt://{board.name}", "port": board.port, "pid": board.pid,
        "kept": board.is_kept, "ssh": board.ssh_command(),
    }  # fmt: skip
