"""Functions that a recipe names: the user's own code, loaded and called with errors that name its line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from edgepipe.artifact import hash_path
from edgepipe.data import split_reference
from edgepipe.errors import DataError
from edgepipe.schema import near_miss


def load_function(
    reference: str, root: Path | None
) -> tuple[Callable[..., Any], contextlib.AbstractContextManager[None]]:
    """The function ``"file.py:name"`` or ``"package.module:name"``, and a context to call it in.

    Inside the context the file's own folder is importable, so that it may import its neighbours.
    Raises DataError where the file, module or name does not exist or its import fails.
    """
    module, name = split_reference(reference, root)
    if isinstance(module, Path):
        if not module.is_file():
            raise DataError(
                f"{module} (named by {reference!r}) does not exist",
                hint="the path is relative to the recipe's folder",
                code="no-such-file",
            )
        context = _importable(module.parent)
    else:
        context = _importable(root or Path.cwd())
    with context:
        try:
            loaded = (
                _load_file(module) if isinstance(module, Path) else importlib.import_module(module)
            )
        except Exception as exc:
            raise user_error(exc, f"importing {reference!r}", str(module)) from exc
    function = getattr(loaded, name, None)
    if not callable(function):
        legal = [n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")]
        raise DataError(
            f"{reference!r}: {module} has no function {name!r}{near_miss(name, legal)}",
            hint=f"functions there: {', '.join(legal) or 'none'}",
        )
    return function, context


def call_function(reference: str, root: Path | None, *args: object, **options: object) -> Any:
    """Call the user's function; whatever it raises becomes a DataError with its file and line."""
    function, context = load_function(reference, root)
    with context:
        try:
            return function(*args, **options)
        except Exception as exc:
            module, _ = split_reference(reference, root)
            raise user_error(exc, f"calling {reference!r}", str(module)) from exc


class _importable(contextlib.AbstractContextManager[None]):
    """Puts a folder first on sys.path while the user's code runs.

    Modules that were imported from beside the user's code are forgotten first where they are of
    another folder, since two recipes may each have a ``helper.py``, or where one of them was changed.
    """

    # module -> the folder it was found beside, its file and the hash that had
    _neighbours: ClassVar[dict[str, tuple[str, Path, str]]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __enter__(self) -> None:
        held = self._neighbours.values()
        if any(folder != self.folder or _hash(file) != digest for folder, file, digest in held):
            for name in self._neighbours:
                sys.modules.pop(name, None)
            self._neighbours.clear()
        self.before = set(sys.modules)
        sys.path.insert(0, self.folder)
        sys.path_hooks.insert(0, self._finder)
        sys.path_importer_cache.pop(self.folder, None)

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ValueError):
            sys.path.remove(self.folder)
        with contextlib.suppress(ValueError):
            sys.path_hooks.remove(self._finder)
        for name in set(sys.modules) - self.before:
            file = getattr(sys.modules.get(name), "__file__", None) or ""
            beside = str(Path(self.folder, name.partition(".")[0]))
            if file == f"{beside}.py" or file.startswith(beside + os.sep):
                self._neighbours[name] = (self.folder, Path(file), _hash(Path(file)))

    def _finder(self, path: str) -> importlib.machinery.FileFinder:
        """Of the folder and packages in it modules are run from their source as well, but not those of an
        environment that lies there."""
        inner = [p for p in sys.path if p != self.folder and _is_in(p, self.folder)]
        if not _is_in(path, self.folder) or any(_is_in(path, p) for p in inner):
            raise ImportError(path)
        return importlib.machinery.FileFinder(
            path,
            (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
            (FromSource, importlib.machinery.SOURCE_SUFFIXES),
        )


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _hash(file: Path) -> str:
    return hash_path(file) if file.is_file() else ""


class FromSource(importlib.machinery.SourceFileLoader):
    """Runs a file as it is now, and writes no ``.pyc`` beside it: one that is there is taken for that of
    any file of the same size that was saved in the same second."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("compiled anew")


def _load_file(path: Path) -> ModuleType:
    """A fresh module from a file, under a name that shadows no other module."""
    name = f"_edgepipe_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=FromSource(name, str(path)))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def user_error(exc: Exception, doing: str, module: str) -> DataError:
    """The user's exception with the last line of *their* file that it passed through."""
    if isinstance(exc, DataError):
        return exc
    frames = traceback.extract_tb(exc.__traceback__)
    file = getattr(sys.modules.get(module), "__file__", None) or module
    theirs = [f for f in frames if f.filename == file]
    if isinstance(exc, SyntaxError) and exc.filename:
        place = f"{exc.filename}, line {exc.lineno}"
    elif theirs or frames:
        frame = (theirs or frames)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
    else:
        place = module
    return DataError(
        f"{doing} failed: {type(exc).__name__}: {exc} ({place})",
        hint="mend the function; --debug shows the whole traceback",
        code="user-function-failed",
    )
