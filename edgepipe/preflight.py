"""What must be there before a board can measure: a way to ask it, a board of the right kind, a runtime."""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any

from edgepipe.crunner import CBoard, CRunnerJob, prepare_board
from edgepipe.device.base import Device
from edgepipe.device.parse import parse_home
from edgepipe.errors import MissingExtra, NotReadyError, ProfileError, RequestError
from edgepipe.job import COMMAND_TIMEOUT_S, BoardJob, bad_answer, parse_facts
from edgepipe.payload import Payload, push_payload, runner_target
from edgepipe.profile import DeviceProfile, absolute_work_dir
from edgepipe.runtime import (
    PINS,
    WHEELS,
    Pin,
    Wheel,
    has_runtime_library,
    runtime_library,
    runtime_package,
)
from edgepipe.sessions import progress

log = logging.getLogger(__name__)

PYTHON_NEEDED = (3, 7)
# What there is for 32-bit boards, whichever runtime the profile asks for.
TFLITE_RUNTIME, TFLITE_VERSION = "tflite-runtime", "2.14.0"


@dataclasses.dataclass(frozen=True)
class Board:
    """A board that was found fit to be asked: by the agent, or by the C runner where it has no Python."""

    device: Device
    work_dir: str
    payload: Payload
    c_board: CBoard | None = None

    def job(self, job: Mapping[str, Any], job_dir: str, *, runtime_hint: str) -> BoardJob:
        if self.c_board is not None:
            return CRunnerJob(self.c_board, job, job_dir, runtime_hint=runtime_hint, progress=progress)  # fmt: skip
        return BoardJob(
            self.device, self.payload, job, job_dir, runtime_hint=runtime_hint, progress=progress
        )

    @property
    def command(self) -> tuple[str, ...]:
        """What every call of the agent, or of the C runner, begins with."""
        return self.c_board.command if self.c_board else ("python3", self.payload.entry)

    def facts(self) -> dict[str, Any]:
        if self.c_board is not None:
            return self.c_board.facts()
        done = self.device.run([*self.command, "facts", self.work_dir], timeout_s=COMMAND_TIMEOUT_S)
        return parse_facts(
            done.stdout, stderr=done.stderr, returncode=done.returncode, address=self.device.address
        )


def prepare(device: Device, profile: DeviceProfile) -> Board:
    """Find Python and the home folder there, and push the agent; without Python, the C runner.

    Where the target has no agent (phones), nobody asks for Python.
    """
    if runner_target(profile.target):
        return _prepare_without_python(device, profile)
    question = 'import json,os,sys; print(json.dumps([os.path.expanduser("~"), list(sys.version_info[:3])]))'  # fmt: skip
    done = device.run(["python3", "-c", question], timeout_s=COMMAND_TIMEOUT_S)
    if done.returncode in (126, 127):
        return _prepare_without_python(device, profile)
    try:
        home, version = json.loads(done.stdout)
        version = tuple(int(n) for n in version)
        home = str(home)
    except (ValueError, TypeError) as exc:
        raise bad_answer(
            "python3 did not answer", done.stdout, done.stderr, device.address
        ) from exc
    if version < PYTHON_NEEDED:
        raise NotReadyError(
            f"python3 on {device.address} is {'.'.join(map(str, version))}; "
            f"the runner needs {'.'.join(map(str, PYTHON_NEEDED))}",
            hint="on the device: sudo apt-get install python3 (of a newer release)",
            code="no-python",
        )
    work_dir = absolute_work_dir(profile.work_dir, home)
    return Board(device, work_dir, push_payload(device, profile.target, work_dir))


def _prepare_without_python(device: Device, profile: DeviceProfile) -> Board:
    said = device.run(["sh", "-c", 'echo "$HOME"'], timeout_s=COMMAND_TIMEOUT_S)
    home = parse_home(said.stdout.decode("utf-8", "replace").rstrip("\n"), device.address)
    work_dir = absolute_work_dir(profile.work_dir, home)
    c_board = prepare_board(device, profile.target, work_dir)
    return Board(device, work_dir, c_board.payload, c_board)


def check_board(facts: Mapping[str, Any], profile: DeviceProfile, address: str) -> None:
    """Refuse a board of another kind than the profile's. Raises ProfileError (``wrong-profile``)."""
    machine = facts.get("machine")
    # "any" of a profile fits every board; a null device says it, too, and fits every profile
    if "any" not in (profile.machine, machine) and machine != profile.machine:
        raise ProfileError(
            f"{address} runs {machine} programs, profile {profile.name} describes a "
            f"{profile.machine} board",
            hint="choose the profile of this board with --profile; `edgepipe devices list` shows them",
            code="wrong-profile",
        )
    # a board that names itself must be of the profile's kind, or its figures would pass for those of
    # another ("Raspberry Pi 4 Model B Rev 1.5" is a "Raspberry Pi 4 Model B")
    model = str(facts.get("model") or "").split(" Rev ")[0]
    if machine != "any" and profile.model != "any" and model and model != profile.model:
        raise ProfileError(
            f"{address} is a {model}, profile {profile.name} describes a {profile.model}",
            hint="choose the profile of this board with --profile, or write one: edgepipe probe ADDRESS --write NAME",
            code="wrong-profile",
        )


def push_runtime(
    board: Board, profile: DeviceProfile, backend: str, facts: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Push libLiteRt.so where the profile's runtime is LiteRT and there is one for this board.

    With backend ``auto`` a board it cannot run on goes on to the runtimes installed there.
    """
    if backend not in ("auto", "litert-c"):
        return None
    machine, version = str(facts["device"].get("machine")), profile.runtime_version
    is_null, why_not = machine == "any", ""  # as `check_board`
    if profile.runtime != "litert":
        why_not = f"profile {profile.name} asks for {profile.runtime}"
    elif not has_runtime_library(machine, version):
        why_not = f"there is no LiteRT {version} library for {'a simulated board' if is_null else machine}"
    if backend == "litert-c" and why_not:
        raise RequestError(
            f"backend litert-c cannot be used on {board.device.address}: {why_not}",
            hint='use backend = "auto", or the interpreter installed on the board',
        )
    if why_not:
        if not _push_package(board, profile, facts) and not is_null:
            log.info("no runtime is pushed (%s); using what is installed on the device", why_not)
        return None
    try:
        library = runtime_library(machine, version)
    except MissingExtra as exc:
        if backend == "litert-c" or not facts["packages"]:
            raise
        log.warning("no runtime is pushed (%s); using what is installed on the device", exc.message)
        return None
    pin = PINS[(version, machine)]
    board.device.push(library.path, library_path(board, pin))
    return pushed_library(board, pin, version)


def _push_package(board: Board, profile: DeviceProfile, facts: Mapping[str, Any]) -> bool:
    """Push a Python package as the runtime, where there is one for this board and it has none.

    It lies beside the agent, which finds it there; the system's Python stays as it is.
    """
    wheel = package_for(profile, facts["device"])
    mine = f"{board.work_dir}/runtimes/"  # what lies there may have stayed half there
    if wheel is None or any(not str(p["path"]).startswith(mine) for p in facts["packages"].values()):  # fmt: skip
        return False
    folder = runtime_package(wheel)
    remote = f"{board.work_dir}/runtimes/{folder.name}"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            board.device.push(path, f"{remote}/{path.relative_to(folder).as_posix()}")
    return True


def package_for(profile: DeviceProfile, facts: Mapping[str, Any]) -> Wheel | None:
    """The package that is pushed to a board for which there is no LiteRT library, or None."""
    python = tuple(int(n) for n in str(facts.get("python")).split(".")[:2] if n.isdigit())
    version = profile.runtime_version if profile.runtime == TFLITE_RUNTIME else TFLITE_VERSION
    return WHEELS.get((TFLITE_RUNTIME, version, str(facts.get("machine")), python))


def library_path(board: Board, pin: Pin) -> str:
    """Where libLiteRt.so lies on a board once it was pushed."""
    return f"{board.work_dir}/rt/{pin.sha256}/libLiteRt.so"


def pushed_library(board: Board, pin: Pin, version: str) -> dict[str, Any]:
    """A pushed library as a job names it, with what it needs of the board."""
    return {
        "path": library_path(board, pin),
        "size": pin.size_bytes,
        "sha256": pin.sha256,
        "version": version,
        "glibc": pin.glibc,
        "glibcxx": pin.glibcxx,
    }


def try_c_runner(board: Board, library: Mapping[str, Any]) -> None:
    """Run the C runner's self-test with a pushed library. Raises NotReadyError (``no-runtime``, Busy)."""
    job: dict[str, Any] = {
        "id": f"doctor-{secrets.token_hex(4)}", "owner": "doctor", "work_dir": board.work_dir,
        "models": {}, "runtime": dict(library), "inputs": None, "threads": 1, "affinity": [],
        "kernel": "", "weight_cache": False, "warmup_s": 0.0, "session_s": 0.0,
        "min_inferences": 1, "seed": 0, "lease_s": 0, "min_free_bytes": 0,
        "budget_s": COMMAND_TIMEOUT_S,
    }  # fmt: skip
    tried = board.job(job, f"{board.work_dir}/jobs/{job['id']}", runtime_hint="")
    try:
        tried.run([])
    finally:
        tried.end()


def runtime_hint(profile: DeviceProfile, backend: str, facts: Mapping[str, Any]) -> str:
    """What mends a board on which no runtime works."""
    if backend == "tflite-runtime-interpreter" or facts.get("machine") == "armv7l":
        return (
            "on the device, for the package that edgepipe pushes to Python 3.9 and 3.11: "
            "sudo apt-get install python3-numpy; or with Python 3.8 to 3.11: "
            "python3 -m pip install tflite-runtime==2.14.0 'numpy<2'"
        )
    return (
        f"on the device: python3 -m pip install ai-edge-litert=={profile.runtime_version} "
        "(Debian 12, Ubuntu 22.04 or newer)"
    )
