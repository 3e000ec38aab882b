"""`Store`: a content-addressed cache of artifacts and an append-only log of runs, in one folder.

::

    .edgepipe/cache/<key>/          one finished step: artifact.json or result.json, and its files
    .edgepipe/building/<key>/       a step in the making; removed when it fails or its process died
    .edgepipe/locks/<key>           held while a step is built, so that two runs never build it twice
    .edgepipe/runs/<utc>-<recipe>-<6 hex>/  run.json, measurements/<device>/<metric>.json, logs/

An entry appears in ``cache/`` by one rename of files that are on the disk, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from edgepipe.errors import RequestError
from edgepipe.measurement import Measurement, measurement_from_dict, measurement_to_dict
from edgepipe.metrics import METRICS

log = logging.getLogger(__name__)

RUN_SCHEMA = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)


def unique_name(started: datetime.datetime, name: str) -> str:
    """``<utc>-<name>-<6 hex>``, which sorts by time."""
    return f"{started:%Y%m%dT%H%M%S.%fZ}-{name}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it becomes ``path`` when the block succeeds.

    So ``path`` is its old self or whole, and on the disk. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.part")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        # a copy's error names what it was made from, a write's names nothing
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: object, *, indent: int | None = 1) -> None:
    """Write JSON so that ``path`` is its old self or whole."""
    text = json.dumps(data, indent=indent) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_output(path: Path | None, *, option: str = "--output") -> None:
    """Refuse a file name of a user's that cannot be written to, before long work is done for it."""
    if path is None:
        return
    if path.is_dir():
        raise RequestError(f"{option} {path} is a folder", hint="name the file to write")
    above = next(p for p in path.resolve().parents if p.exists())
    if not above.is_dir():
        raise RequestError(
            f"{option} {path}: {above} is no folder", hint=f"choose another {option}"
        )
    if not os.access(above, os.W_OK):
        raise RequestError(f"{option} {path}: no permission to write into {above}", hint=f"choose another {option}")  # fmt: skip


def _sync(folder: Path) -> None:
    """Bring every file of a folder to the disk, so that no power cut leaves a name without content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


class Store:
    """The cache and the runs under ``root`` (usually ``.edgepipe``). Safe for several processes."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def entry(self, key: str) -> Path | None:
        """The folder of a finished step, or None."""
        folder = self.root / "cache" / key
        return folder if folder.is_dir() else None

    @contextlib.contextmanager
    def building(
        self, key: str, *, is_good: Callable[[Path], bool] = lambda entry: True
    ) -> Iterator[Path | None]:
        """A folder to build step ``key`` in; it becomes the cache entry when the block succeeds.

        Waits while another process builds the same step. Yields None where there is an entry that
        ``is_good``; one that is not is replaced by the new one. When the block raises (Ctrl-C
        included) the folder is removed, and what was in the cache stays there.
        """
        with self._lock(key) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another run that is building this step")
                fcntl.flock(lock, fcntl.LOCK_EX)
            old = self.entry(key)
            if old and is_good(old):
                yield None
                return
            self._remove_abandoned(key)
            work = self.root / "building" / key
            replaced = work.with_name(f"{key}.replaced")
            work.mkdir()
            try:
                yield work
                _sync(work)
                if old:
                    old.rename(replaced)
                work.rename(self.root / "cache" / key)
            except OSError as exc:
                if exc.errno not in _FULL or exc.filename is not None:
                    raise
                # what stages write lies in the work folder, or in a temporary one
                places = (self.root.resolve(), Path(tempfile.gettempdir()))
                fullest = min(places, key=lambda place: shutil.disk_usage(place).free)
                raise OSError(exc.errno, exc.strerror, str(fullest)) from exc
            finally:
                shutil.rmtree(work, ignore_errors=True)
                shutil.rmtree(replaced, ignore_errors=True)

    def _lock(self, key: str) -> IO[str]:
        """The lock file of a step, opened; makes the folders of the store where they are missing."""
        try:
            for name in ("cache", "building", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            raise self._no_folder() from exc
        return (self.root / "locks" / key).open("w")

    def _no_folder(self) -> RequestError:
        return RequestError(
            f"{self.root} cannot hold results: it is no folder",
            hint="choose a folder with --store; it is made where it does not exist",
        )

    def _remove_abandoned(self, own: str) -> None:
        """Remove half-built steps whose builder is gone (killed, power cut): nobody has their lock.

        (A process number would not tell: it may be of another container, or used again.)
        """
        for folder in (self.root / "building").iterdir():
            key = folder.name.partition(".")[0]
            with self._lock(key) as lock, contextlib.suppress(BlockingIOError):
                if key != own:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

    def new_run(self, recipe_name: str) -> Run:
        """Start a run: a fresh folder whose name sorts by time."""
        started = datetime.datetime.now(datetime.UTC)
        run_id = unique_name(started, recipe_name)
        folder = self.root / "runs" / run_id
        try:
            (folder / "logs").mkdir(parents=True)
        except (FileExistsError, NotADirectoryError) as exc:
            raise self._no_folder() from exc
        run = Run(folder)
        run.update(
            id=run_id, recipe=recipe_name, started=started.isoformat(), status="running", pid=os.getpid()
        )  # fmt: skip
        return run

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        folder = self.root / "runs"
        if not folder.is_dir():
            return []
        return [Run(p) for p in sorted(folder.iterdir()) if (p / "run.json").is_file()]

    def find_run(self, name: str) -> Run:
        """The run whose id is, starts or ends with ``name``; ``latest`` is the newest."""
        runs = self.runs()
        if not runs:
            raise RequestError(
                f"no runs in {self.root}", hint="start one with `edgepipe run RECIPE`"
            )
        if name == "latest":
            return runs[-1]
        matches = [r for r in runs if r.id.startswith(name) or r.id.endswith(name)]
        if len(matches) != 1:
            what = "no run" if not matches else f"{len(matches)} runs"
            raise RequestError(f"{what} called {name!r}", hint="`edgepipe runs` lists them")
        return matches[0]

    def find_together(self, name: str) -> list[Run]:
        """`find_run`, but the newest with all that were asked for at once (buckets), in their order."""
        found = self.find_run(name)
        together = found.read().get("together")
        return self.runs_together(together) if name == "latest" and together else [found]

    def runs_together(self, together: Mapping[str, Any]) -> list[Run]:
        """The runs that hold ``together``: its ``id`` begins with a time before all of them, and
        ``recipes`` are their names in order. A run that never began is left out."""
        by_recipe = {}
        for run in reversed(self.runs()):
            if run.id < together["id"]:
                break
            record = run.read()
            if record.get("together") == together:
                by_recipe[record["recipe"]] = run
        return [by_recipe[recipe] for recipe in together["recipes"] if recipe in by_recipe]


def device_name(entry: Mapping[str, Any]) -> str:
    """What a board is called in a run, of its entry in ``devices`` (long ago it was its profile's)."""
    return str(entry.get("name") or entry["profile"])


class Run:
    """One run's folder. ``run.json`` is rewritten whole at every step, so it is always readable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    def read(self) -> dict[str, Any]:
        """The run's record. Refuses one of a newer schema, or damaged."""
        path = self.folder / "run.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] > RUN_SCHEMA:
                raise RequestError(
                    f"run {self.id} has schema {data['schema']}, this edgepipe reads up to {RUN_SCHEMA}",
                    hint="upgrade edgepipe",
                )
            if data["status"] == "running" and not Path(f"/proc/{data['pid']}").exists():
                data["status"] = "killed"
        except (ValueError, KeyError, TypeError) as exc:
            raise RequestError(
                f"{path} is no record of a run: {type(exc).__name__}: {exc}",
                hint=f"it is damaged; remove {self.folder}",
            ) from exc
        return data

    def update(self, **fields: Any) -> None:
        """Set fields of the record."""
        path = self.folder / "run.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, {"schema": RUN_SCHEMA, **old, **fields})

    def log_path(self, step: str) -> Path:
        """Where the long output of one step goes."""
        return self.folder / "logs" / f"{step}.log"

    def save_measurements(self, device: str, measurements: Mapping[str, Measurement]) -> None:
        """Write one file per metric; ``device`` is "model" for facts about the file itself."""
        folder = self.folder / "measurements" / device.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        for metric, measurement in measurements.items():
            write_json(folder / f"{metric}.json", measurement_to_dict(measurement), indent=None)

    def load_measurements(self, device: str) -> dict[str, Measurement]:
        """What `save_measurements` wrote, by metric; empty where nothing was measured."""
        folder = self.folder / "measurements" / device.replace("/", "_")
        found = {}
        for path in sorted(folder.glob("*.json")):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                found[path.stem] = measurement_from_dict(data)
                if (data["metric"], data["unit"]) != (path.stem, METRICS[path.stem].unit):
                    raise ValueError(f"it holds {data['metric']} in {data['unit']!r}")
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise RequestError(
                    f"{path} is no record of a measurement: {type(exc).__name__}: {exc}",
                    hint="it is damaged; run the recipe again",
                ) from exc
        return found
