"""Where payloads (``targets/``) and profiles (``device_profiles/``) are found.

A name is looked up in the user's folders first, then in the installed wheel, then in a checkout, so
that a user's own file shadows ours of the same name.
"""

from __future__ import annotations

from pathlib import Path

from edgepipe.errors import RequestError
from edgepipe.schema import near_miss

_PACKAGE = Path(__file__).resolve().parent


def user_config_dir() -> Path:
    """The user's own folder: ``~/.config/edgepipe`` on Linux (honours ``XDG_CONFIG_HOME``)."""
    from platformdirs import user_config_path

    return user_config_path("edgepipe")


def _shipped(kind: str) -> list[Path]:
    """Folders of ``kind`` that came with edgepipe: the wheel's, else the checkout's."""
    checkout = _PACKAGE.parent
    roots = [_PACKAGE / "_bundled"]
    # beside an installed package lies site-packages, whose "targets" would be somebody else's
    if (checkout / "pyproject.toml").is_file():
        roots.append(checkout)
    return [root / kind for root in roots if (root / kind).is_dir()]


def target_dir(name: str) -> Path:
    """The payload folder of platform ``name`` (it holds ``target.toml``).

    Looked up in ``<user's folder>/targets``, the wheel, the checkout. Raises RequestError naming the
    platforms there are.
    """
    legal: list[str] = []
    for folder in (user_config_dir() / "targets", *_shipped("targets")):
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []  # fmt: skip
        if name in found:
            return folder / name
        legal += [item for item in found if item not in legal]
    raise RequestError(
        f"unknown target {name!r}{near_miss(name, legal)}",
        hint=f"known targets: {', '.join(legal) or 'none (this installation is incomplete)'}",
        code="unknown-target",
    )


def profile_paths() -> dict[str, Path]:
    """Every device profile by name (file name without ``.toml``), sorted by name.

    Where two files have one name the first of these wins: ``./device_profiles``,
    ``<user's folder>/device_profiles``, the wheel, the checkout.
    """
    found: dict[str, Path] = {}
    user = (Path("device_profiles"), user_config_dir() / "device_profiles")
    for folder in (*user, *_shipped("device_profiles")):
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))
