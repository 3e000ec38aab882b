"""edgepipe: compress, convert, measure on the device, gate.

Importing this package imports nothing heavy; the public names below are resolved on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_recipe": "edgepipe.recipe",
    "run": "edgepipe.pipeline",
    "Store": "edgepipe.store",
    "open_device": "edgepipe.device",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgepipe' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
