"""Passwords of boards that take no key: asked for at a terminal, kept in memory only.

Libraries do not ask. Whoever has a terminal says how, once: ``set_prompt(getpass.getpass)``. Every
login is asked for once per process, so that a broken link can be mended without asking again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_lock = threading.Lock()  # boards that are opened side by side ask one after the other
_prompt: Callable[[str], str] | None = None
_known: dict[str, str] = {}


def set_prompt(prompt: Callable[[str], str] | None) -> None:
    """``prompt(text)`` shows the text and returns what was typed; None: nobody can be asked."""
    global _prompt
    _prompt = prompt


def ask(login: str) -> str | None:
    """The password of ``login`` (``user@host:port``), or None where nobody can be asked."""
    with _lock:
        return _prompt(f"{login}'s password: ") if _prompt else None


def remember(login: str, password: str) -> None:
    """Keep a password that was accepted, for the next connection of this process."""
    _known[login] = password


def known(login: str) -> str | None:
    """A password that was accepted before."""
    return _known.get(login)
