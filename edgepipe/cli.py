"""The command line: the only place that prints, and that turns errors into text and exit codes."""

from __future__ import annotations

import os
import sys

from edgepipe.errors import (
    EXIT_BUG,
    EXIT_REQUEST,
    EXIT_SIGNAL,
    EdgepipeError,
    MissingExtra,
    NotReadyError,
    RequestError,
    StageError,
)

TYPE_CHECKING = False  # typing itself would double the time of `edgepipe --help`
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any, NoReturn, TextIO

COMMANDS: dict[str, str] = {
    "init": "write a commented recipe for a model",
    "check": "find every mistake in a recipe without running anything",
    "run": "run a recipe: stages, evaluation, measurement, gates",
    "students": "propose small networks that fit a latency and a size, to distil a model into",
    "convert": "convert a model to float TFLite and prove that it computes the same",
    "quantize": "quantise any model to full int8, or to every precision side by side",
    "explain": "say which layers of an int8 file lost what and why, and what operators cost on a device",
    "inspect": "show tensors, operators, scales, sizes, float islands and MACs of a TFLite file",
    "devices": "list and show device profiles, trust a board's host key",
    "probe": "read the facts of a board and compare them with a profile",
    "doctor": "find out whether a board is ready to measure, and mend what can be mended",
    "emulate": "build, start and stop virtual boards: arm64 machines that need no hardware",
    "bench": "measure latency and memory of a TFLite file on a device",
    "compare": "measure two TFLite files side by side on a device: is one slower or larger",
    "calibrate": "find out how noisy a device is, and which slowdowns it can tell",
    "gate": "judge a stored run again",
    "report": "show a stored run as text, markdown or JSON",
    "runs": "list stored runs",
    "toolchains": "list, install and remove converter environments",
}

# Commands that go on at the step that an interruption left unfinished.
KEEP_STEPS = ("run", "convert", "quantize")
# Which extra of pyproject.toml brings a package that only some commands need.
EXTRAS = {
    "torch": "torch", "torch_pruning": "torch", "tensorly": "torch", "safetensors": "torch", "onnxscript": "torch",
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
            _write(sys.stdout, text + "\n")

    def json(self, data: Any) -> None:
        if self.as_json:
            import json

            _write(sys.stdout, json.dumps(data, indent=1, default=str) + "\n")


def _write(stream: TextIO, text: str) -> None:
    """Write at once. A reader that went away changes neither the work nor its exit code."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    """One message on stderr; where stderr cannot be written nobody can be told so."""
    import contextlib

    with contextlib.suppress(OSError):
        _write(sys.stderr, text + "\n")


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C), SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class StopSignals:
    """Turns the stop signals into `Stopped`, and remembers the first one.

    Frameworks swallow exceptions at times (Python drops those of callbacks and of ``__del__``): what
    was swallowed is raised again by `check`, and whatever it broke is not mistaken for a bug.
    A signal that is ignored (nohup) stays so.
    """

    def __init__(self) -> None:
        self.caught: Stopped | None = None
        self._changed: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        import signal
        import threading

        if threading.current_thread() is threading.main_thread():
            usual = (signal.SIG_DFL, signal.default_int_handler)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(number)
                if handler in usual:
                    self._changed[number] = handler
                    signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._changed.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.caught = self.caught or Stopped(number)
        raise self.caught

    def check(self) -> None:
        if self.caught is not None:
            raise self.caught


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    out = Output(as_json="--json" in arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:11} {summary}" for name, summary in COMMANDS.items())
        _write(sys.stdout, USAGE.format(commands=commands))
        return 0 if arguments else EXIT_REQUEST
    if arguments[0] in ("-V", "--version"):
        from edgepipe import __version__

        _write(sys.stdout, f"edgepipe {__version__}\n")
        return 0
    if arguments[0] not in COMMANDS:
        from edgepipe.schema import near_miss

        close = near_miss(arguments[0], list(COMMANDS))
        return _fail(
            RequestError(
                f"unknown command {arguments[0]!r}{close}",
                hint="`edgepipe --help` lists the commands",
                code="bad-usage",
            ),
            out,
        )
    try:
        return _run_command(arguments[0], arguments[1:], out)
    except KeyboardInterrupt as exc:  # while the command was still being imported
        return _explain(exc, arguments[0], out, debug=False)


def _open_closed_streams() -> None:
    """`edgepipe ... >&-`: the next file opened would become stdout, for native code to print into."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _run_command(name: str, arguments: list[str], out: Output) -> int:
    import argparse
    import importlib

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise RequestError(f"edgepipe {name}: {message}", hint=f"edgepipe {name} --help", code="bad-usage")  # fmt: skip

    module = importlib.import_module(f"edgepipe.commands.{name}")
    parser = Parser(
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
    except RequestError as exc:
        return _fail(exc, out)
    except SystemExit:  # --help
        return 0
    except BrokenPipeError:  # --help into a reader that went away
        _write(sys.stdout, "")
        return 0
    out.as_json = args.json
    with StopSignals() as signals:
        progress = _show_progress(args, signals)
        if sys.stdin.isatty() and sys.stderr.isatty():
            from edgepipe import password

            password.set_prompt(_ask_password)
        try:
            return int(module.run(args, out))
        except BaseException as exc:
            progress.close()
            if args.debug:
                import traceback

                _say("".join(traceback.format_exception(exc)).rstrip())
            return _explain(signals.caught or exc, name, out, debug=args.debug)
        finally:
            progress.close()


def _ask_password(text: str) -> str:
    import getpass

    return getpass.getpass(text)


def _explain(exc: BaseException, name: str, out: Output, *, debug: bool) -> int:
    """Whatever ended a command, as text (or JSON) and an exit code."""
    import errno

    if isinstance(exc, EdgepipeError):
        return _fail(exc, out)
    if isinstance(exc, KeyboardInterrupt):
        text = "interrupted"
        if name in KEEP_STEPS:
            text += "; finished steps are kept, run the same command to go on"
        _say(text)
        _print_json(out, {"error": "interrupted", "message": text, "hint": ""})
        return EXIT_SIGNAL + (exc.number if isinstance(exc, Stopped) else 2)
    if isinstance(exc, SystemExit):
        return _fail(
            RequestError(
                f"Python code that the recipe names ended the program (sys.exit({exc.code!r}))",
                hint="builders, data and metric functions return or raise; --debug shows where it was",
                code="exit-called",
            ),
            out,
        )
    if isinstance(exc, ModuleNotFoundError):
        extra = EXTRAS.get((exc.name or "").partition(".")[0])
        if extra:
            return _fail(
                MissingExtra(
                    f"edgepipe {name} needs the Python package {exc.name}, which is not installed",
                    hint=f"pip install 'edgepipe[{extra}]'   (or edgepipe[all] for everything)",
                ),
                out,
            )
    if isinstance(exc, OSError):
        where = f" {exc.filename}" if exc.filename else ""
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            message = f"cannot write{where}: {exc.strerror}"
            hint = "free some space there, or choose another place (--store, --output, TMPDIR)"
            return _fail(NotReadyError(message, hint=hint, code="cannot-write"), out)
        if exc.errno in (errno.EACCES, errno.EPERM):
            message = f"no access to{where or ' a file'}: {exc.strerror}"
            hint = "check its owner and permissions, or choose another folder with --store"
            return _fail(NotReadyError(message, hint=hint, code="no-access"), out)
    return _bug(exc, out, debug=debug)


def _fail(exc: EdgepipeError, out: Output) -> int:
    _say(error_text(exc))
    _print_json(out, exc.as_dict())
    return exc.exit_code


def _print_json(out: Output, data: dict[str, str]) -> None:
    import contextlib

    with contextlib.suppress(OSError):  # it may be stdout that cannot be written
        out.json(data)


def error_text(exc: EdgepipeError) -> str:
    """What a person sees of an error: message, hint, log."""
    lines = [f"error: {exc.message}"]
    if exc.hint:
        lines.append(f"hint: {exc.hint}")
    if isinstance(exc, StageError) and exc.log_path:
        lines.append(f"log: {exc.log_path}")
    return "\n".join(lines)


def _bug(exc: BaseException, out: Output, *, debug: bool) -> int:
    """An error nobody foresaw: one line on the screen, the traceback in a file."""
    import tempfile
    import traceback

    message = f"edgepipe has a bug: {type(exc).__name__}: {exc}"
    text = "".join(traceback.format_exception(exc))
    where = ""
    if not debug:
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="edgepipe-bug-", suffix=".txt", delete=False
            ) as stream:
                stream.write(text)
            where = stream.name
        except OSError:
            _say(text.rstrip())
    _say(message)
    if where:
        _say(f"traceback: {where} (--debug shows it here)")
    _print_json(out, {"error": "bug", "message": message, "hint": "", "traceback": where})
    return EXIT_BUG


def _show_progress(args: argparse.Namespace, signals: StopSignals) -> Any:
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
            self.shown_from = logging.DEBUG if args.debug else logging.WARNING if args.quiet else logging.INFO  # fmt: skip
            self.began = self.last = time.monotonic()
            self.line = ""
            self.done = threading.Event()
            if not args.quiet:
                threading.Thread(target=self.beat, daemon=True).start()

        def emit(self, record: logging.LogRecord) -> None:
            if (
                record.levelno <= logging.INFO
                and threading.current_thread() is threading.main_thread()
            ):
                signals.check()  # between two steps: a good place to stop
            if record.levelno < self.shown_from:
                return
            self.clear()
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            if threading.current_thread() is not threading.main_thread():
                prefix = f"[{record.threadName}] {prefix}"  # a board's name, see lab.on_boards
            _say(prefix + record.getMessage())
            self.last = time.monotonic()

        def beat(self) -> None:
            while not self.done.wait(1.0):
                now = time.monotonic()
                if self.live and now - self.last > 2:
                    self.line = f"  ... {now - self.began:.0f} s"
                    _write(sys.stderr, f"\r{self.line}")
                elif not self.live and now - self.last > self.SILENCE_S:
                    _say(f"  ... {now - self.began:.0f} s")
                    self.last = now

        def clear(self) -> None:
            if self.line:
                _write(sys.stderr, "\r" + " " * len(self.line) + "\r")
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
    logger.addHandler(handler)
    return handler


if __name__ == "__main__":
    sys.exit(main())
