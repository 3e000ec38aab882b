"""The command line: the only place that prints, and that turns errors into text and exit codes."""

from __future__ import annotations

import sys

from edgepipe.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_NOT_READY,
    EXIT_REQUEST,
    EdgepipeError,
    MissingExtra,
    StageError,
)

TYPE_CHECKING = False  # typing itself would double the time of `edgepipe --help`
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

COMMANDS: dict[str, str] = {
    "init": "write a commented recipe for a model",
    "check": "find every mistake in a recipe without running anything",
    "run": "run a recipe: stages, evaluation, measurement, gates",
    "convert": "convert a model to float TFLite and prove that it computes the same",
    "quantize": "quantise a float TFLite model to full int8",
    "inspect": "show tensors, operators, scales, sizes, float islands and MACs of a TFLite file",
    "devices": "list and show device profiles, trust a board's host key",
    "probe": "read the facts of a board and compare them with a profile",
    "bench": "measure latency and memory of a TFLite file on a device",
    "gate": "judge a stored run again",
    "report": "show a stored run as text, markdown or JSON",
    "runs": "list stored runs",
    "toolchains": "list, install and remove converter environments",
}

# Which extra of pyproject.toml brings a package that only some commands need.
EXTRAS = {
    "torch": "torch", "torch_pruning": "torch", "safetensors": "torch", "onnxscript": "torch",
    "numpy": "convert", "onnx": "convert", "onnxruntime": "convert", "ai_edge_litert": "convert",
    "litert_quantizer": "convert", "PIL": "convert", "paramiko": "ssh", "sklearn": "demo",
}  # fmt: skip

USAGE = """\
usage: edgepipe COMMAND [options]      (edgepipe COMMAND --help for each)

Compress, convert, measure on the device, gate.

commands:
{commands}

options of every command:
  --json       one JSON document on stdout instead of text
  --quiet      no progress on stderr
  --debug      show debug messages, and the traceback of an error
  --store DIR  where results are kept (default: .edgepipe)

exit codes: 0 all gates pass, 1 a gate failed, 2 bad request, 3 not ready or inconclusive
(a retry may help), 4 a bug in edgepipe
"""


class Output:
    """Where a command's result goes: text for people, or one JSON document with ``--json``."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def text(self, text: str) -> None:
        if not self.as_json:
            print(text)

    def json(self, data: Any) -> None:
        if self.as_json:
            import json

            print(json.dumps(data, indent=1, default=str))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = _main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as in `edgepipe runs | head`
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:11} {summary}" for name, summary in COMMANDS.items())
        print(USAGE.format(commands=commands), end="")
        return 0 if arguments else EXIT_REQUEST
    if arguments[0] in ("-V", "--version"):
        from edgepipe import __version__

        print(f"edgepipe {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        from edgepipe.schema import near_miss

        close = near_miss(arguments[0], list(COMMANDS))
        print(f"edgepipe: unknown command {arguments[0]!r}{close}", file=sys.stderr)
        print("`edgepipe --help` lists the commands", file=sys.stderr)
        return EXIT_REQUEST
    return _run_command(arguments[0], arguments[1:])


def _run_command(name: str, arguments: list[str]) -> int:
    import argparse
    import importlib

    module = importlib.import_module(f"edgepipe.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"edgepipe {name}",
        description=COMMANDS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    common = parser.add_argument_group("options of every command")
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--debug", action="store_true", help="debug messages and tracebacks")
    common.add_argument("--store", default=".edgepipe", metavar="DIR", help="where results are kept (default: .edgepipe)")  # fmt: skip
    try:
        args = parser.parse_args(arguments)
    except SystemExit as exc:  # argparse has printed its own message
        return int(exc.code or 0)
    progress = _show_progress(args)
    out = Output(as_json=args.json)
    try:
        return int(module.run(args, out))
    except EdgepipeError as exc:
        if args.debug:
            raise
        return _fail(exc, out, progress)
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted; finished steps are kept, run the same command to go on", file=sys.stderr)  # fmt: skip
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as exc:
        import errno

        if args.debug or exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            return _bug(exc, args)
        progress.clear()
        where = f" {exc.filename}" if exc.filename else ""
        print(f"error: cannot write{where}: {exc.strerror}", file=sys.stderr)
        print("hint: free some space or choose another folder with --store", file=sys.stderr)
        out.json({"error": "cannot-write", "message": str(exc), "hint": ""})
        return EXIT_NOT_READY
    except ModuleNotFoundError as exc:
        extra = EXTRAS.get((exc.name or "").partition(".")[0])
        if extra is None or args.debug:
            return _bug(exc, args)
        missing = MissingExtra(
            f"edgepipe {name} needs the Python package {exc.name}, which is not installed",
            hint=f"pip install 'edgepipe[{extra}]'   (or edgepipe[all] for everything)",
        )
        return _fail(missing, out, progress)
    except Exception as exc:
        return _bug(exc, args)
    finally:
        progress.close()


def _fail(exc: EdgepipeError, out: Output, progress: Any) -> int:
    progress.clear()
    out.json(exc.as_dict())
    print(error_text(exc), file=sys.stderr)
    return exc.exit_code


def error_text(exc: EdgepipeError) -> str:
    """What a person sees of an error: message, hint, log."""
    lines = [f"error: {exc.message}"]
    if exc.hint:
        lines.append(f"hint: {exc.hint}")
    if isinstance(exc, StageError) and exc.log_path:
        lines.append(f"log: {exc.log_path}")
    return "\n".join(lines)


def _bug(exc: BaseException, args: argparse.Namespace) -> int:
    """An error nobody foresaw: one line on the screen, the traceback in a file."""
    import tempfile
    import traceback

    if args.debug:
        traceback.print_exception(exc)
        return EXIT_BUG
    with tempfile.NamedTemporaryFile(
        "w", prefix="edgepipe-bug-", suffix=".txt", delete=False
    ) as stream:
        traceback.print_exception(exc, file=stream)
    print(f"edgepipe has a bug: {type(exc).__name__}: {exc}", file=sys.stderr)
    print(f"traceback: {stream.name} (--debug shows it here)", file=sys.stderr)
    return EXIT_BUG


def _show_progress(args: argparse.Namespace) -> Any:
    """Send edgepipe's log records to stderr, and say every few seconds that work goes on."""
    import logging
    import threading
    import time

    class Progress(logging.Handler):
        """INFO lines as they are; a sign of life after `SILENCE_S` without one."""

        SILENCE_S = 5.0

        def __init__(self) -> None:
            super().__init__()
            self.live = sys.stderr.isatty() and not args.quiet
            self.began = self.last = time.monotonic()
            self.line = ""
            self.done = threading.Event()
            if not args.quiet:
                threading.Thread(target=self.beat, daemon=True).start()

        def emit(self, record: logging.LogRecord) -> None:
            self.clear()
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(prefix + record.getMessage(), file=sys.stderr, flush=True)
            self.last = time.monotonic()

        def beat(self) -> None:
            while not self.done.wait(1.0):
                now = time.monotonic()
                if self.live and now - self.last > 2:
                    self.line = f"  ... {now - self.began:.0f} s"
                    print(f"\r{self.line}", end="", file=sys.stderr, flush=True)
                elif not self.live and now - self.last > self.SILENCE_S:
                    print(f"  ... {now - self.began:.0f} s", file=sys.stderr, flush=True)
                    self.last = now

        def clear(self) -> None:
            if self.line:
                print("\r" + " " * len(self.line) + "\r", end="", file=sys.stderr)
                self.line = ""

        def close(self) -> None:
            self.done.set()
            self.clear()
            logging.getLogger("edgepipe").removeHandler(self)
            super().close()

    handler = Progress()
    logger = logging.getLogger("edgepipe")
    logger.propagate = False
    logger.setLevel(logging.DEBUG if args.debug else logging.INFO)
    handler.setLevel(logging.DEBUG if args.debug else logging.WARNING if args.quiet else logging.INFO)  # fmt: skip
    logger.addHandler(handler)
    return handler


if __name__ == "__main__":
    sys.exit(main())
