"""Many boards at once: each in a thread of its own, none stops the others, Ctrl-C ends them all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from edgepipe.errors import EdgepipeError
from edgepipe.inventory import Target

log = logging.getLogger(__name__)
T = TypeVar("T")

# Boards wait for nobody, this host only now and then works for one of them.
MAX_AT_ONCE = 64


def on_boards(
    targets: Sequence[Target],
    work: Callable[[Target, threading.Event], T],
    *,
    finished: Callable[[Target, T | EdgepipeError], None] = lambda target, outcome: None,
    at_once: int = MAX_AT_ONCE,
) -> list[T | EdgepipeError]:
    """``work(target, stop)`` for every board, side by side; results in the order of ``targets``.

    ``finished(target, outcome)`` is called in this thread as they come in. The outcome of a board
    whose work raised an EdgepipeError is that error. Any other exception, a bug, is raised when all
    boards are done. Threads are named after their boards, so that log lines can be.

    Where this thread is stopped (Ctrl-C) ``stop`` is set, on which ``work`` should give its board
    back and raise; boards not begun are left out, and those at work are waited for.
    """
    stop = threading.Event()
    outcomes: dict[str, T | EdgepipeError] = {}
    bugs: list[BaseException] = []

    def named(target: Target) -> T:
        threading.current_thread().name = target.name
        return work(target, stop)

    def take(target: Target, future: Future[T]) -> None:
        error = future.exception()
        if error is None or isinstance(error, EdgepipeError):
            outcomes[target.name] = error or future.result()
            finished(target, outcomes[target.name])
        else:
            bugs.append(error)

    with ThreadPoolExecutor(max_workers=min(len(targets), at_once) or 1) as pool:
        futures = {pool.submit(named, target): target for target in targets}
        try:
            for future in as_completed(futures):
                take(futures[future], future)
        except BaseException:
            stop.set()
            at_work = [
                target.name for f, target in futures.items() if not f.cancel() and not f.done()
            ]
            if at_work:
                log.warning("stopping; waiting until %s are given back", ", ".join(at_work))
            raise
    if bugs:
        raise bugs[0]
    return [outcomes[target.name] for target in targets]
