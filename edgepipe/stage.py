"""The `Stage` contract, and what a stage is given to work with.

A stage is a frozen record whose fields are its options. Its module imports no framework: `run`
imports one ``*_ops`` function, calls it, and returns the new artifact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from edgepipe.artifact import Artifact
from edgepipe.data import DataSource


@dataclasses.dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its input.

    Files are written under ``work_dir``, which becomes the cache entry when `run` returns and is
    removed when it raises. ``log_path`` is for long tool output; it is kept either way.
    ``checkpoint`` is a file (not there at first) in which long work may save its state: it outlives
    Ctrl-C and a kill, and is removed once the stage has its result. ``root`` is the recipe's folder,
    which names of files and functions in options are relative to; ``store`` the folder of the store,
    where operator tables lie (`op_table.load_op_table`). ``models`` are the results of all steps so
    far, the model that the recipe starts from first.
    """

    work_dir: Path
    data: Mapping[str, DataSource]
    seed: int
    log_path: Path
    checkpoint: Path | None = None
    root: Path | None = None
    store: Path = Path(".edgepipe")
    models: tuple[Artifact, ...] = ()


class Stage(Protocol):
    """``accepts`` and ``produces`` are artifact kinds; ``"same"`` = the kind it was given.

    ``ops`` are the modules or packages whose source decides the result and ``packages`` the
    distributions whose version does: both go into the cache key. ``title`` is one line for help.

    A stage may also have ``functions()``, ``profiles()``, ``files()``, ``arguments()`` and
    ``earlier()`` (see `functions_of` and its neighbours).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    accepts: ClassVar[tuple[str, ...]]
    produces: ClassVar[str]
    ops: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]

    def data_names(self) -> tuple[str, ...]:
        """Names of the data sets (``[data.<name>]``) this stage reads, given its options."""
        ...

    def run(self, artifact: Artifact, context: StageContext) -> Artifact: ...


def functions_of(stage: Stage) -> tuple[str, ...]:
    """The user's functions ("file.py:name") that a stage calls: their source is part of its key."""
    found: tuple[str, ...] = stage.functions() if hasattr(stage, "functions") else ()
    return found


def profiles_of(stage: Stage) -> tuple[str, ...]:
    """The device profiles whose operator tables decide a stage's result: they are part of its key."""
    found: tuple[str, ...] = stage.profiles() if hasattr(stage, "profiles") else ()
    return found


def files_of(stage: Stage) -> tuple[Path, ...]:
    """The files that a stage reads besides data: their content is part of its key."""
    found: tuple[Path, ...] = stage.files() if hasattr(stage, "files") else ()
    return found


def arguments_of(stage: Stage) -> tuple[Any, ...]:
    """What the user's functions are called with: the content of files named there is part of the key."""
    found: tuple[Any, ...] = stage.arguments() if hasattr(stage, "arguments") else ()
    return found


def earlier_of(stage: Stage) -> tuple[int, ...]:
    """Numbers of the stages (0 = the source model) whose results a stage reads besides its own input."""
    found: tuple[int, ...] = stage.earlier() if hasattr(stage, "earlier") else ()
    return found
