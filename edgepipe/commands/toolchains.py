"""``edgepipe toolchains``: the isolated environments that hold converters."""

from __future__ import annotations

import argparse

from edgepipe.cli import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
List, install and remove converter environments. `convert` and `run` install what they need by
themselves, unless EDGEPIPE_NO_INSTALL=1; here it can be done ahead, on a machine with a network.
They lie in the user's cache folder, or in EDGEPIPE_TOOLCHAINS.

  edgepipe toolchains list
  edgepipe toolchains install onnx2tf
  edgepipe toolchains remove onnx2tf"""
    parser.add_argument("action", nargs="?", choices=("list", "install", "remove"), default="list", help="what to do (default: list)")  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="toolchains to install or remove; `list` shows the names")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe import toolchain
    from edgepipe.errors import RequestError

    if args.action == "list":
        _list(out)
        return 0
    if not args.names:
        raise RequestError(
            f"`toolchains {args.action}` needs the name of a toolchain",
            hint=f"edgepipe toolchains {args.action} {next(iter(toolchain.TOOLCHAINS))}",
        )
    for name in args.names:
        toolchain.find_toolchain(name)
    if args.action == "install":
        paths = [toolchain.install(name) for name in args.names]
        out.text("\n".join(f"{name}: {path}" for name, path in zip(args.names, paths, strict=True)))
    else:
        paths = [path for name in args.names for path in toolchain.remove(name)]
        out.text("\n".join(f"removed {path}" for path in paths) or "nothing was installed")
    out.json([str(path) for path in paths])
    return 0


def _list(out: Output) -> None:
    from edgepipe import toolchain
    from edgepipe.units import format_bytes

    found = toolchain.installed()
    rows = []
    for tool in toolchain.TOOLCHAINS.values():
        own = [item for item in found if item.name == tool.name]
        state = "installed" if toolchain.is_installed(tool.name) else "not installed"
        rows.append((tool, state, own))
    lines = []
    for tool, state, own in rows:
        pythons = " or ".join(f"3.{minor}" for minor in tool.pythons)
        lines.append(f"{tool.name:13} {state:14} {tool.summary} (Python {pythons})")
        lines += [
            f"{'':13} {'' if i.complete else 'half-made '}{'' if i.current else 'of an older lock '}"
            f"{i.path} ({format_bytes(i.size_bytes)})"
            for i in own
        ]
    out.text("\n".join(lines))
    out.json(
        [
            {
                "name": tool.name,
                "summary": tool.summary,
                "installed": state == "installed",
                "environments": [
                    {
                        "path": str(i.path),
                        "complete": i.complete,
                        "current": i.current,
                        "size_bytes": i.size_bytes,
                    }
                    for i in own
                ],
            }
            for tool, state, own in rows
        ]
    )
