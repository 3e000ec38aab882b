"""Run a function in a forked process, so that a crash, a hang or its memory is not ours.

Forked and not started anew, because the import of torch costs more than most rows of a bench; so
the caller shall have imported everything and computed nothing: threads do not survive a fork.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("fork")
_GRACE_S = 20.0


def run_forked(function: Callable[..., None], *args: Any, log: Path, timeout_s: float) -> int | None:  # fmt: skip
    """Exit code of the child (negative: the signal that ended it), or None at the deadline.

    What the child prints and logs is appended to ``log``. At the deadline it is interrupted, so that
    it ends what it started, and killed if that does not help.
    """
    process = _FORK.Process(target=_child, args=(function, args, log))
    process.start()
    try:
        process.join(timeout_s)
        if process.exitcode is not None:
            return process.exitcode
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(_GRACE_S)
        return None
    finally:
        process.kill()
        process.join()


def _child(function: Callable[..., None], args: tuple[Any, ...], log: Path) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where we began in the background
    stream = log.open("a", encoding="utf-8")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    logging.basicConfig(stream=stream, level=logging.INFO, format="%(message)s", force=True)
    function(*args)
