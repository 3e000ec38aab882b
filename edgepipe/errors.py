"""Every error edgepipe raises on purpose, and the exit code each one means.

::

    EdgepipeError(message, *, hint, code)
    ├─ RequestError          exit 2   what was asked for is wrong; asking again will not help
    │  ├─ RecipeError                 recipe file
    │  ├─ ProfileError                device profile
    │  ├─ ArtifactError               a model file that is not what it should be
    │  ├─ DataError                   calibration, evaluation or training data
    │  └─ StageOptionError            options of one stage
    ├─ StageError            exit 2   a stage could not do its job
    └─ NotReadyError         exit 3   the world is not ready; a retry may help
       ├─ MissingExtra                a Python package or a toolchain is not installed
       ├─ NotStable                   the device is too hot, too busy or too noisy
       └─ DeviceError
          ├─ ConnectError             host unreachable or not speaking
          ├─ HostKeyError             host key unknown or changed
          ├─ AuthError                key or password refused
          ├─ CommandFailed            a command on the device failed
          ├─ CommandTimeout           a command on the device outlived its deadline
          ├─ TransferError            a file did not arrive whole (disk full, broken link)
          └─ Busy                     another job holds the device

A failed gate is a result, not an exception: exit 1. INCONCLUSIVE is exit 3. Anything else that
escapes is a bug of ours: exit 4.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_PASS = 0
EXIT_FAIL = 1
EXIT_REQUEST = 2
EXIT_NOT_READY = 3
EXIT_BUG = 4
EXIT_SIGNAL = 128  # + number of the signal: 130 for Ctrl-C, as a shell reports it

_WORST_FIRST = (EXIT_BUG, EXIT_FAIL, EXIT_REQUEST, EXIT_NOT_READY, EXIT_PASS)


def worst_exit_code(codes: Iterable[int]) -> int:
    """The one code of several runs: a failed gate before what a retry may mend."""
    return min(codes, key=_WORST_FIRST.index)


class EdgepipeError(Exception):
    """Base of every error a user may see.

    ``message`` says what went wrong, while doing what, to which file or device. ``hint`` is
    something one can do or paste. ``code`` is a stable kebab-case name for machines.
    """

    exit_code = EXIT_BUG
    default_code = "error"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def as_dict(self) -> dict[str, str]:
        """The error as plain data, for ``--json``."""
        return {"error": self.code, "message": self.message, "hint": self.hint}


class RequestError(EdgepipeError):
    exit_code = EXIT_REQUEST
    default_code = "bad-request"


class RecipeError(RequestError):
    default_code = "bad-recipe"


class ProfileError(RequestError):
    default_code = "bad-profile"


class ArtifactError(RequestError):
    default_code = "bad-model"


class DataError(RequestError):
    default_code = "bad-data"


class StageOptionError(RequestError):
    default_code = "bad-stage-option"


class StageError(EdgepipeError):
    """A stage could not do its job. Raised ``from`` the framework's own error."""

    exit_code = EXIT_REQUEST
    default_code = "stage-failed"

    def __init__(
        self, message: str, *, stage: str, hint: str = "", code: str = "", log_path: str = ""
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.stage = stage
        self.log_path = log_path

    def as_dict(self) -> dict[str, str]:
        return {**super().as_dict(), "stage": self.stage, "log_path": self.log_path}


class NotReadyError(EdgepipeError):
    exit_code = EXIT_NOT_READY
    default_code = "not-ready"


class MissingExtra(NotReadyError):
    default_code = "missing-extra"


class NotStable(NotReadyError):
    default_code = "not-stable"


class DeviceError(NotReadyError):
    default_code = "device-error"


class ConnectError(DeviceError):
    default_code = "cannot-connect"


class HostKeyError(DeviceError):
    default_code = "host-key"


class AuthError(DeviceError):
    default_code = "auth-refused"


class CommandFailed(DeviceError):
    default_code = "command-failed"


class CommandTimeout(DeviceError):
    default_code = "command-timeout"


class TransferError(DeviceError):
    default_code = "transfer-failed"


class Busy(DeviceError):
    default_code = "device-busy"
