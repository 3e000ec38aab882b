"""Isolated converter environments: made on demand from exact locks, called as child processes.

A converter lives in a virtual environment of its own because its pins fight everybody else's and
the best one needs a newer Python than ours; and behind a process boundary because it rewrites its
input, leaves through ``SystemExit``, may exit 0 with nothing done, and takes its memory with it.

An environment is ``<root>/<name>-<first 12 digits of its lock's sha256>/``, complete once
``.complete`` is there, which is written last. ``<root>`` is the user's cache folder, or
``EDGEPIPE_TOOLCHAINS``. With ``EDGEPIPE_NO_INSTALL`` set nothing is installed on demand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe.artifact import hash_path
from edgepipe.errors import MissingExtra, NotReadyError, RequestError, StageError
from edgepipe.schema import near_miss

log = logging.getLogger(__name__)

LOCKS = Path(__file__).parent / "toolchains"
COMPLETE = ".complete"
# Installing moves up to a gigabyte over a network we know nothing about.
INSTALL_TIMEOUT_S = 3600.0
_HEARTBEAT_S = 10.0
_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """One converter or compiler. ``pythons`` are the minor versions of CPython 3 its lock is for, best first.

    ``borrowed`` are distributions that the environment does not install but links from the one
    edgepipe runs in: torch, whose ordinary wheel brings gigabytes of CUDA, and which is there
    wherever there is a PyTorch model to convert. Such a toolchain runs on our own Python version.
    """

    name: str
    summary: str
    pythons: tuple[int, ...]
    disk_mb: int
    # imported once after installing, and what the converter scripts import
    check: str
    borrowed: tuple[str, ...] = ()

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.name}.lock.txt"


TOOLCHAINS: dict[str, Toolchain] = {
    tool.name: tool
    for tool in (
        Toolchain("onnx2tf", "onnx2tf 2.6.9, ONNX to TFLite without TensorFlow", (12, 13), 540, "onnx2tf.tflite_builder"),
        Toolchain("onnx2tf-tf", "onnx2tf 1.29.24 with TensorFlow 2.19, for hosts without Python 3.12", (11, 12), 2400, "onnx2tf"),
        Toolchain("litert-torch", "litert-torch 0.10.0, PyTorch programs to TFLite, on edgepipe's own torch", (11, 12), 1100, "litert_torch", ("torch",)),
        Toolchain("zig", "zig 0.17.1 as C compiler, for boards without Python (edgepipe/crunner.py)", (11, 12, 13, 14), 420, "ziglang"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Installed:
    """An environment on disk. ``current`` is false for one of an older lock."""

    name: str
    path: Path
    complete: bool
    current: bool
    size_bytes: int


def root() -> Path:
    """The folder that holds the environments."""
    override = os.environ.get("EDGEPIPE_TOOLCHAINS")
    if override:
        return Path(override).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("edgepipe") / "toolchains"


def environment(name: str) -> Path:
    """Where the environment of a toolchain is, or would be."""
    tool = find_toolchain(name)
    content = hash_path(tool.lock)
    if tool.borrowed:  # links into one environment are of no use to another
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            links = [f"{importlib.metadata.version(n)} {importlib.metadata.distribution(n).locate_file(n)}" for n in tool.borrowed]  # fmt: skip
            content = hashlib.sha256("\0".join([content, *links]).encode()).hexdigest()
    return root() / f"{name}-{content[:12]}"


def find_toolchain(name: str) -> Toolchain:
    """Raises RequestError for an unknown name."""
    if name not in TOOLCHAINS:
        raise RequestError(
            f"unknown toolchain {name!r}{near_miss(name, list(TOOLCHAINS))}",
            hint=f"there are: {', '.join(TOOLCHAINS)}",
        )
    return TOOLCHAINS[name]


def is_installed(name: str) -> bool:
    return (environment(name) / COMPLETE).is_file()


def installed() -> tuple[Installed, ...]:
    """Every environment on disk, whole or half-made, of this lock or an older one."""
    found = []
    folder = root()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.rpartition("-")[0]
        if path.is_dir() and name in TOOLCHAINS:
            size = sum(p.lstat().st_size for p in path.rglob("*") if not p.is_dir())
            complete = (path / COMPLETE).is_file()
            found.append(Installed(name, path, complete, path == environment(name), size))
    return tuple(found)


def may_install() -> bool:
    return os.environ.get("EDGEPIPE_NO_INSTALL", "") in ("", "0")


def ensure(name: str) -> Path:
    """The environment, installed now if it has to be. Raises MissingExtra where that is not allowed."""
    if is_installed(name):
        return environment(name)
    if not may_install():
        raise MissingExtra(
            f"the {name} toolchain is not installed, and EDGEPIPE_NO_INSTALL forbids installing it",
            hint=f"edgepipe toolchains install {name}",
            code="missing-toolchain",
        )
    return install(name)


def install(name: str) -> Path:
    """Make the environment of a toolchain, unless it is there. Returns its folder.

    Safe against another process doing the same: the second waits, and finds it made. Stopped at
    any point, it leaves nothing. Raises MissingExtra (``no-python`` where there is no CPython of
    the right version and none can be fetched, ``install-failed`` with the installer's last words).
    """
    tool, target = find_toolchain(name), environment(name)
    if is_installed(name):
        return target
    with contextlib.suppress(OSError):  # where that fails, so does the lock, which says it well
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target, fcntl.LOCK_EX, wait=True):
        if is_installed(name):
            return target
        _remove_tree(target)  # half-made by a process that was killed
        started = time.monotonic()
        log.info("installing toolchain %s (%s; about %d MB) into %s", name, tool.summary, tool.disk_mb, target)  # fmt: skip
        try:
            installer = _build(tool, target)
            record = {"lock_sha256": hash_path(tool.lock), "installer": installer}
            partial = target / (COMPLETE + ".part")
            partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
            partial.rename(target / COMPLETE)
        except BaseException:
            _remove_tree(target)
            raise
        log.info("toolchain %s is ready after %.0f s", name, time.monotonic() - started)
    return target


def remove(name: str) -> tuple[Path, ...]:
    """Remove every environment of a toolchain, older ones too. Returns what was removed.

    Raises NotReadyError where a conversion is using one.
    """
    find_toolchain(name)
    gone = []
    for item in installed():
        if item.name == name:
            with _locked(item.path, fcntl.LOCK_EX, wait=False):
                _remove_tree(item.path)
            gone.append(item.path)
    return tuple(gone)


# -- finding a Python, making the environment ------------------------------------------------------


def find_python(tool: Toolchain) -> Path | None:
    """A CPython of the right version on this machine: ours, on PATH, of pyenv, or known to uv."""
    for candidate in _python_candidates(tool):
        version = _minor_version(candidate)
        if version in tool.pythons:
            return candidate
    return None


def _python_candidates(tool: Toolchain) -> Iterator[Path]:
    if sys.version_info[:2] in [(3, minor) for minor in tool.pythons]:
        yield Path(sys.executable)
    if tool.borrowed:  # what we borrow is compiled for our own Python
        return
    for minor in tool.pythons:
        on_path = shutil.which(f"python3.{minor}")
        if on_path:
            yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in tool.pythons:
        yield from sorted(pyenv.glob(f"3.{minor}.*/bin/python3.{minor}"), reverse=True)
    for minor in tool.pythons:
        for uv in _uv_command():
            found = _output([*uv, "python", "find", f"3.{minor}"], UV_PYTHON_DOWNLOADS="never")
            if found:
                yield Path(found)


def _minor_version(python: Path) -> int | None:
    """12 for a CPython 3.12 that really runs (a pyenv shim may not); else None."""
    code = "import sys, venv; print(sys.implementation.name, *sys.version_info[:2])"
    words = (_output([str(python), "-I", "-c", code]) or "").split()
    return int(words[2]) if words[:2] == ["cpython", "3"] else None


def _output(argv: Sequence[str], **environ: str) -> str | None:
    """Standard output of a quick command, or None where it cannot be run or fails."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=60, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, **environ},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _uv_command() -> list[list[str]]:
    """How to call uv, as a list of no or one command: installed beside us, or on PATH."""
    if importlib.util.find_spec("uv") is not None:
        return [[sys.executable, "-m", "uv"]]
    found = shutil.which("uv")
    return [[found]] if found else []


def _build(tool: Toolchain, target: Path) -> str:
    """Make the environment in its final place (it cannot be moved); returns the installer's name.

    uv is ten times faster than pip; pip, tried next, knows the user's own mirrors and folders of
    wheels. Both install the same bytes: the lock has their hashes.
    """
    python = find_python(tool)
    wanted = " or ".join(f"3.{minor}" for minor in tool.pythons)
    failures = []
    borrowed = _find_borrowed(tool)
    if tool.borrowed and python is None:
        raise MissingExtra(
            f"the {tool.name} toolchain needs Python {wanted}, and edgepipe runs in {sys.version_info[0]}.{sys.version_info[1]}",
            hint=f"install edgepipe in a virtual environment of Python 3.{tool.pythons[0]}",
            code="no-python",
        )
    for uv in _uv_command():
        if python is None:
            log.info("no Python %s on this machine: asking uv to fetch one", wanted)
        try:
            _run([*uv, "venv", "--quiet", "--no-project", "--python", str(python or f"3.{tool.pythons[0]}"), str(target)], target.parent)  # fmt: skip
            own = target / "bin" / "python"
            _run([*uv, "pip", "install", "--no-deps", "--require-hashes", "--python", str(own), "-r", str(tool.lock)], target.parent)  # fmt: skip
            _link(borrowed, target)
            _check(tool, target)
            return "uv"
        except _InstallError as exc:
            failures.append(str(exc))
            if python is not None:
                log.info("uv could not install it (%s); trying pip", str(exc).splitlines()[-1])
            _remove_tree(target)
    python = python or find_python(tool)  # uv may have fetched one, and failed after that
    if python is None:
        raise MissingExtra(
            f"the {tool.name} toolchain needs Python {wanted}, and none was found here or could be fetched",
            hint=f"install Python 3.{tool.pythons[0]} (for example `uv python install 3.{tool.pythons[0]}`), "
            f"then: edgepipe toolchains install {tool.name}",
            code="no-python",
        )
    try:
        _run([str(python), "-m", "venv", str(target)], target.parent)
        own = target / "bin" / "python"
        _run([str(own), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-deps", "--require-hashes", "-r", str(tool.lock)], target.parent)  # fmt: skip
        _link(borrowed, target)
        _check(tool, target)
    except _InstallError as exc:
        failures.append(str(exc))
        raise MissingExtra(
            f"cannot install the {tool.name} toolchain with {python}: {' | '.join(failures)}",
            hint=f"with a network and disk space ({tool.disk_mb} MB), run: edgepipe toolchains install {tool.name}",
            code="install-failed",
        ) from exc
    return "pip"


def _find_borrowed(tool: Toolchain) -> list[Path]:
    """The packages and records of what a toolchain borrows. MissingExtra where we lack it, too."""
    found: list[Path] = []
    for name in tool.borrowed:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as exc:
            raise MissingExtra(
                f"the {tool.name} toolchain runs on edgepipe's own {name}, which is not installed",
                hint="pip install 'edgepipe[torch]'",
                code="no-borrowed-package",
            ) from exc
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        found += [Path(str(distribution.locate_file(top))) for top in sorted(tops)]
    return found


def _link(borrowed: Sequence[Path], target: Path) -> None:
    """Links, not a path entry: nothing else of our environment may be found from the other one."""
    for folder in target.glob("lib/python3.*/site-packages"):
        for path in borrowed:
            (folder / path.name).symlink_to(path)


def _check(tool: Toolchain, target: Path) -> None:
    log.info("checking that %s can be imported", tool.name)
    _run([str(target / "bin" / "python"), "-c", f"import {tool.check}"], target.parent)


class _InstallError(Exception):
    """An installer failed; its last words."""


def _run(argv: Sequence[str], cwd: Path) -> None:
    """Run one installing step to its end, in its own process group; says that it is still at it."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}  # fmt: skip
    lines: list[str] = []
    with subprocess.Popen(
        argv, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
        reader.start()
        started = told = time.monotonic()
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now - started > INSTALL_TIMEOUT_S:
                    raise _InstallError(
                        f"gave up after {INSTALL_TIMEOUT_S:.0f} s: {' '.join(argv)}"
                    )
                if now - told > _HEARTBEAT_S:
                    told = now
                    log.info("still installing (%.0f s): %s", now - started, (lines or ["..."])[-1].strip()[:100])  # fmt: skip
                time.sleep(_POLL_S)
        except BaseException:
            _kill_group(process)
            raise
        reader.join(timeout=10)
    if process.returncode:
        told_us = [line.strip() for line in lines if line.strip()]
        raise _InstallError(" ".join(told_us[-3:])[:500] or f"exit code {process.returncode}")


@contextlib.contextmanager
def _locked(target: Path, kind: int, *, wait: bool) -> Iterator[None]:
    """Hold the lock of an environment. It is released by the system even if we are killed."""
    try:
        stream = (target.parent / f"{target.name}.lock").open("a")
    except OSError as exc:
        if kind == fcntl.LOCK_SH:  # a shared folder we may only read: nor can we remove from it
            yield
            return
        raise NotReadyError(
            f"cannot write in {target.parent}: {exc.strerror}",
            hint="make it writable, or set EDGEPIPE_TOOLCHAINS to a folder that is",
        ) from exc
    with stream:
        told = False
        while True:
            try:
                fcntl.flock(stream, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if not wait:
                    raise NotReadyError(
                        f"{target} is in use by another edgepipe process",
                        hint="try again when it has finished",
                        code="toolchain-in-use",
                    ) from exc
                if not told:
                    log.info("waiting for another process that is installing %s", target.name)
                    told = True
                time.sleep(0.2)
        yield


def _remove_tree(path: Path) -> None:
    """Remove a folder, its ``.complete`` first, so that it is never half there and complete."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        raise NotReadyError(f"cannot remove {path}", hint=f"rm -rf {path}")


# -- calling a converter ---------------------------------------------------------------------------


def call(
    name: str,
    script: str,
    request: Mapping[str, Any],
    *,
    files: Mapping[str, Path | bytes],
    work_dir: Path,
    timeout_s: float,
    log_path: Path,
    stage: str,
) -> dict[str, Any]:
    """Run a script of ``edgepipe/toolchains`` in a toolchain's environment; returns its answer.

    ``files`` are copied to ``work_dir``, the child's working directory and home, under their names
    (paths or contents); ``request`` goes in and the answer comes out as JSON files beside them.
    The child sees neither our environment variables nor our files. What it prints goes to
    ``log_path``. It and all it started are killed at the deadline and on Ctrl-C.

    The answer has ``ok``; where it is false, ``reason`` (``unsupported-op``, ``invalid-graph``,
    ``converter-error``) and ``message``. Raises StageError with code ``timeout``, ``crash`` (killed
    by a signal, or died without an answer) or ``no-output`` (exit 0 without an answer).
    """
    target = ensure(name)
    for file_name, content in files.items():
        if isinstance(content, bytes):
            (work_dir / file_name).write_bytes(content)
        else:
            shutil.copyfile(content, work_dir / file_name)
    cpu_limit_s = int(timeout_s * (os.cpu_count() or 1)) + 1
    (work_dir / "request.json").write_text(json.dumps({**request, "cpu_limit_s": cpu_limit_s}), encoding="utf-8")  # fmt: skip
    answer = work_dir / "answer.json"
    argv = [str(target / "bin" / "python"), str(LOCKS / script), "request.json", "answer.json"]
    with _locked(target, fcntl.LOCK_SH, wait=True), log_path.open("ab") as output:
        output.write(f"\n--- {name}: {script}\n".encode())
        output.flush()
        process = subprocess.Popen(
            argv, cwd=work_dir, env=_child_environment(target, work_dir), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            returncode = _wait(process, timeout_s, script)
        finally:
            _kill_group(process)  # also what the child left running
    if returncode is None:
        raise StageError(
            f"{name} did not finish converting within {timeout_s:.0f} s",
            stage=stage, code="timeout", log_path=str(log_path),
            hint="give the stage more time (timeout), or look at its log",
        )  # fmt: skip
    if answer.is_file():
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result
    if returncode == 0:
        raise StageError(
            f"{name} ended as if all were well, but made nothing",
            stage=stage, code="no-output", log_path=str(log_path), hint=f"its log: {log_path}",
        )  # fmt: skip
    cause = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    raise StageError(
        f"{name} died while converting ({cause}): {_last_line(log_path)}",
        stage=stage, code="crash", log_path=str(log_path),
        hint=f"SIGKILL mostly means out of memory; its log: {log_path}",
    )  # fmt: skip


def _child_environment(target: Path, home: Path) -> dict[str, str]:
    keep = {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}
    (home / "tmp").mkdir(exist_ok=True)
    return {
        **keep,
        "PATH": f"{target / 'bin'}:/usr/local/bin:/usr/bin:/bin",  # onnx2tf calls `onnxsim`
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "LANG": "C.UTF-8",
        "NO_COLOR": "1",
        "PYTHONHASHSEED": "0",  # the same model gives the same bytes
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_USE_LEGACY_KERAS": "1",
    }


def _wait(process: subprocess.Popen[bytes], timeout_s: float, what: str) -> int | None:
    """Exit code, or None at the deadline; says every while that it is still at it."""
    started = time.monotonic()
    while True:
        left = started + timeout_s - time.monotonic()
        if left <= 0:
            return None
        try:
            return process.wait(timeout=min(left, _HEARTBEAT_S))
        except subprocess.TimeoutExpired:
            log.info("still at it (%.0f s): %s", time.monotonic() - started, what)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a child that leads its own process group, and all the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
