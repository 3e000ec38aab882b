"""Pure parsers of what boards print: text in, data out, CommandFailed on garbage."""

from __future__ import annotations

import re

from edgepipe.errors import CommandFailed

_SHA256 = re.compile(r"^[0-9a-f]{64}(?=\s|$)")


def parse_sha256(text: str) -> str:
    """The digest from what ``sha256sum`` prints: 64 hexadecimal digits, then anything."""
    match = _SHA256.match(text)
    if match is None:
        raise _garbage("sha256sum", text)
    return match.group()


def parse_free_bytes(text: str) -> int:
    """Free bytes from ``df -Pk`` of one folder.

    The POSIX format is a header and one line: device, size, used, available (in KiB), capacity as
    ``n%``, mount point. Device and mount point may contain blanks, so we count from the capacity.
    """
    lines = text.splitlines()
    words = lines[1].split() if len(lines) == 2 else []
    for index, word in enumerate(words):
        if (
            re.fullmatch(r"(\d+%|-)", word)
            and index >= 4
            and re.fullmatch(r"-?\d+", words[index - 1])
        ):
            return max(int(words[index - 1]), 0) * 1024
    raise _garbage("df -Pk", text)


def _garbage(command: str, text: str) -> CommandFailed:
    return CommandFailed(
        f"`{command}` printed something else than expected: {text[:200]!r}",
        hint="run it on the board by hand; please report the output",
        code="unexpected-output",
    )
