"""The ``torch`` artifact: a folder that says how to build the model, never a pickle.

::

    model.json            builder "digits_model.py:build", its arguments, the edits compression made
    digits_model.py       copy of a file builder; model.json holds its sha256
    weights.safetensors   the state dict

Loading = build, replay the edits, load the weights (strict). A builder file is copied in so that the
artifact still loads, as the same model, after the original was changed or moved; it must therefore
stand alone: it may import installed packages but no file beside it. A builder in a package
(``"package.module:build"``) is imported by name and not copied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from edgepipe.array_ops.user_code import FromSource
from edgepipe.artifact import hash_path
from edgepipe.errors import ArtifactError
from edgepipe.torch_ops.edits import apply_edits

SCHEMA = 1
MODEL_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """How to build a model: ``builder(**args)``, then ``edits`` in order.

    ``root`` is the folder that a file builder (``"file.py:build"``) is relative to.
    """

    builder: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    edits: tuple[Mapping[str, Any], ...] = ()
    root: Path | None = None

    @property
    def file(self) -> Path | None:
        """The builder's file, or None for a builder in a package."""
        module = self.builder.partition(":")[0]
        return ((self.root or Path.cwd()) / module).resolve() if module.endswith(".py") else None


def build_model(description: ModelDescription, *, seed: int = 0) -> nn.Module:
    """The model with freshly initialised weights, edits applied.

    Initialisation draws from torch's CPU generator seeded with ``seed``; the caller's random state
    is left as it was. Raises ArtifactError where the builder is missing, fails or returns no module.
    """
    build = _find_builder(description)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = build(**description.args)
        except Exception as exc:
            raise ArtifactError(
                f"builder {description.builder} failed with arguments {dict(description.args)}: "
                f"{type(exc).__name__}: {exc}",
                hint="call it yourself with these arguments, and mend it or [model] args",
                code="bad-builder",
            ) from exc
    if not isinstance(model, nn.Module):
        raise ArtifactError(
            f"builder {description.builder} returned a {type(model).__name__}, not a torch.nn.Module",
            hint="end it with `return model`",
            code="bad-builder",
        )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ArtifactError(
            f"builder {description.builder} returned a model whose layers have no shapes yet: {', '.join(lazy[:3])}",
            hint="give their sizes (nn.Linear instead of nn.LazyLinear), or call the model once in the builder",
            code="bad-builder",
        )
    return apply_edits(model, description.edits)


def save_model(model: nn.Module, folder: Path, description: ModelDescription) -> None:
    """Write the torch artifact into ``folder`` (made if absent; the caller renames it into place).

    ``model`` must be what ``description`` builds, with other weights. Tensors that share memory
    are stored once per name. Raises ArtifactError where the state dict holds what is no tensor.
    """
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(
                f"cannot store {name!r} of the model: a {type(value).__name__}, not a tensor",
                hint="remove get_extra_state from the module, or keep that state in a buffer",
            )
        state[name] = value.detach().cpu().clone().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "builder": description.builder,
        "args": dict(description.args),
        "edits": [dict(edit) for edit in description.edits],
    }
    if description.file is not None:
        copy = folder / description.file.name
        if copy != description.file:
            shutil.copyfile(description.file, copy)
        record["builder"] = f"{copy.name}:{description.builder.partition(':')[2]}"
        record["builder_sha256"] = hash_path(copy)
    _save(state, folder / WEIGHTS_FILE)
    (folder / MODEL_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(dict(state), str(path))
    except safetensors.SafetensorError as exc:  # "I/O error: No space left on device (os error 28)"
        found = re.search(r"os error (\d+)", str(exc))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from exc


def read_description(folder: Path) -> ModelDescription:
    """What ``model.json`` says. Raises ArtifactError where it is missing, newer or was tampered with."""
    path = folder / MODEL_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = record["schema"]
        if schema > SCHEMA:
            raise ArtifactError(
                f"{path} has schema {schema}, this edgepipe reads up to {SCHEMA}",
                hint="upgrade edgepipe",
            )
        description = ModelDescription(
            record["builder"], record["args"], tuple(record["edits"]), root=folder
        )
        expected = record.get("builder_sha256")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(
            f"{folder} is no torch model folder: {path.name}: {type(exc).__name__}: {exc}",
            hint="a torch artifact holds model.json and weights.safetensors; run the recipe again",
        ) from exc
    file = description.file
    if file is not None and (not file.is_file() or hash_path(file) != expected):
        raise ArtifactError(
            f"{file} is missing or is not the builder this model was saved with",
            hint="run the recipe again",
            code="changed-builder",
        )
    return description


def load_model(folder: Path) -> nn.Module:
    """Build, replay the edits, load the weights. In evaluation mode, on the CPU."""
    model = build_model(read_description(folder))
    load_state(model, read_weights(folder / WEIGHTS_FILE), source=folder / WEIGHTS_FILE)
    return model.eval()


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Load a state dict strictly; a mismatch is an ArtifactError that names the first few keys."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [
        f"{title} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for title, names in (
            ("missing:", missing),
            ("unexpected:", unexpected),
            ("wrong shape:", misshapen),
        )
        if names
    ]
    if problems:
        raise ArtifactError(
            f"the weights in {source} do not fit the model that the builder makes: {'; '.join(problems)}",
            hint="check [model] builder and args against the training code that wrote the weights",
            code="weights-mismatch",
        )
    model.load_state_dict(dict(state))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from ``.safetensors``, ``.pth`` or ``.pt``; nothing in the file is executed.

    ``.pth`` and ``.pt`` go through torch's restricted unpickler (``weights_only=True``). Raises
    ArtifactError for a pickled module, a TorchScript archive, a checkpoint that holds more than
    tensors, and a truncated file.
    """
    if not path.is_file():
        raise ArtifactError(f"weights file {path} does not exist", hint="check [model] weights", code="no-such-file")  # fmt: skip
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(str(path))
        except (safetensors.SafetensorError, OSError, ValueError) as exc:
            raise ArtifactError(
                f"{path} is no whole safetensors file: {exc}", hint="write or copy it again"
            ) from exc
    if path.suffix not in (".pth", ".pt"):
        raise ArtifactError(
            f"weights file {path} is neither .safetensors nor .pth nor .pt",
            hint="torch.save(model.state_dict(), 'weights.pth')",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # it warns of pickle protocols just before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:
        raise ArtifactError(_why_refused(path, exc), hint=_SAVE_STATE, code="not-weights") from exc
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        nested = [k for k, v in state.items() if isinstance(v, dict)] if isinstance(state, dict) else []  # fmt: skip
        raise ArtifactError(
            f"{path} holds a {type(state).__name__} that is no state dict"
            + (f"; its keys {nested} hold dicts" if nested else ""),
            hint=f"torch.save(torch.load('{path.name}')[{nested[0]!r}], 'weights.pth')"
            if nested
            else _SAVE_STATE,
            code="not-weights",
        )
    return state


_SAVE_STATE = (
    "in the code that made it, torch.save(model.state_dict(), 'weights.pth'), and name the function "
    'that builds the model: [model] builder = "file.py:build", weights = "weights.pth"'
)


def _why_refused(path: Path, exc: Exception) -> str:
    if "TorchScript" in str(exc):
        return f"{path} is a TorchScript archive, not a state dict"
    if isinstance(exc, pickle.UnpicklingError) and "Unsupported" in str(exc):
        return (
            f"{path} is a pickled Python object (such as a whole module), and unpickling it would run "
            f"code from the file; only a state dict of tensors is read"
        )
    return f"{path} is no whole PyTorch weights file: {str(exc).splitlines()[0][:200]}"


def _find_builder(description: ModelDescription) -> Any:
    module_name, _, name = description.builder.partition(":")
    if not module_name or not name.isidentifier():
        raise ArtifactError(
            f"{description.builder!r} names no builder",
            hint='write "file.py:function" or "package.module:function"',
            code="bad-builder",
        )
    file = description.file
    if file is not None and not file.is_file():
        raise ArtifactError(f"builder file {file} does not exist", hint="check [model] builder", code="bad-builder")  # fmt: skip
    try:
        module = _run_file(file) if file else importlib.import_module(module_name)
    except Exception as exc:
        hint = "mend the file; try it with: python " + str(file or f"-c 'import {module_name}'")
        if isinstance(exc, ModuleNotFoundError):
            hint = (
                f"install {exc.name!r}. If it is a file beside the builder: a builder file must stand "
                'alone; move both into a package and write "package.module:build"'
            )
        raise ArtifactError(
            f"cannot import builder {file or module_name}: {type(exc).__name__}: {exc}",
            hint=hint,
            code="bad-builder",
        ) from exc
    build = getattr(module, name, None)
    if not callable(build):
        functions = sorted(k for k, v in vars(module).items() if callable(v) and k[0] != "_")
        raise ArtifactError(
            f"{file or module_name} has no function {name!r}",
            hint=f"it has: {', '.join(functions) or 'none'}",
            code="bad-builder",
        )
    return build


def _run_file(file: Path) -> types.ModuleType:
    """Execute a builder file as a module of its own, without touching sys.path."""
    name = f"edgepipe_builder_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file, loader=FromSource(name, str(file)))
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
