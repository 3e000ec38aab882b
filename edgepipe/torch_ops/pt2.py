"""Loading ``.pt2`` files (torch.export.save) without letting them run code."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from edgepipe.errors import ArtifactError

_SAVE_AGAIN = "torch.export.save(torch.export.export(model.eval(), (example,)), 'model.pt2')"


def load_pt2(path: Path) -> ExportedProgram:
    """The exported program in ``path``. Raises ArtifactError for anything else.

    ``torch.export.load`` unpickles members of the archive, evaluates shape expressions and looks
    operators up by any name under ``torch`` (torch 2.13: ``export/pt2_archive/_package.py``,
    ``_export/serde/serialize.py``). Here every ``torch.load`` inside it is held to
    ``weights_only``; archives that would be unpickled by other means, hold compiled code, call
    anything but registered operators or evaluate anything but arithmetic are refused before.
    """
    try:
        _refuse_code(path)
        with _weights_only(), _quiet("torch.export"):
            return torch.export.load(str(path))
    except ArtifactError:
        raise
    except Exception as exc:
        raise ArtifactError(
            f"{path} is no whole .pt2 file of torch.export.save that this PyTorch {torch.__version__} reads: "
            f"{(str(exc).splitlines() or [type(exc).__name__])[0][:200]}",
            hint=f"write it again: {_SAVE_AGAIN}",
        ) from exc


def save_pt2(program: ExportedProgram, path: Path) -> None:
    """Write a program where `load_pt2` will read it. Raises ArtifactError where it cannot be kept."""
    try:
        with _quiet("torch.export"):
            torch.export.save(program, str(path))
        _refuse_code(path)
    except Exception as exc:
        path.unlink(missing_ok=True)
        reason = exc.message if isinstance(exc, ArtifactError) else (str(exc).splitlines() or [type(exc).__name__])[0]  # fmt: skip
        raise ArtifactError(
            f"the exported program cannot be kept as {path.name}: {reason[:300]}",
            hint="only routes that start from ONNX can convert it",
        ) from exc


def input_shapes(program: ExportedProgram) -> list[tuple[str, tuple[int | None, ...], str]]:
    """(name, shape, dtype) of the user's inputs in call order; None marks a dynamic dimension.

    Raises ArtifactError for an input that is no tensor.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs: list[tuple[str, tuple[int | None, ...], str]] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            value = nodes[spec.arg.name].meta["val"]
            if not isinstance(value, torch.Tensor):
                raise ArtifactError(
                    f"input {spec.arg.name!r} of the exported program is no tensor but {value!r}",
                    hint="export with tensor inputs only: fix the others inside the module",
                )
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
            inputs.append((spec.arg.name, shape, str(value.dtype).removeprefix("torch.")))
    return inputs


def call_arguments(
    program: ExportedProgram, tensors: Sequence[torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the program, from its inputs in order."""
    args, kwargs = torch.utils._pytree.tree_unflatten(list(tensors), program.call_spec.in_spec)
    return args, kwargs


def _refuse_code(path: Path) -> None:
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    if "archive_format" not in records:
        raise ArtifactError(
            f"{path} is a zip file but no .pt2 archive of PyTorch 2.8 or newer",
            hint=f"write it again: {_SAVE_AGAIN}",
        )
    if any(name.startswith("data/aotinductor/") for name in records):
        raise ArtifactError(
            f"{path} holds code compiled by AOTInductor for one machine, not an exported program",
            hint=_SAVE_AGAIN,
        )
    for name in records:
        if name.startswith("data/constants/") and name.endswith("_config.json"):
            entries = json.loads(reader.get_record(name))["config"].values()
            suspects = [e["path_name"] for e in entries if not e["path_name"].startswith("tensor_")]
        elif name.startswith("models/"):
            suspects = list(_unsafe_names(json.loads(reader.get_record(name))))
        else:
            continue
        if suspects:
            raise ArtifactError(
                f"loading {path} would run code from the file: its {name} holds {suspects[0][:80]!r}",
                hint="export a model of registered operators whose constants are all tensors: "
                + _SAVE_AGAIN,
                code="not-weights",
            )


_OPERATOR = re.compile(r"torch\.ops(\.[A-Za-z0-9_]+){2,3}|torch\.sym_\w+|_operator\.\w+|math\.\w+")
# numbers, operators, symbols, sympy's classes: no builtin function, no attribute. Possessive (++), so
# that a long hostile expression costs linear time.
_ARITHMETIC = re.compile(
    r"(Symbol\('\w++'|(?:[A-Z]\w*+|floor|ceiling|sqrt)\(|\(|[A-Za-z]\w*+(?!\s*\()|\d++(\.\d++)?|[\s,)+*/%<>=&|~-])*+"
)


def _unsafe_names(data: Any) -> Iterator[str]:
    """Operators and shape expressions of a serialized program that are not what they should be."""
    if isinstance(data, dict):
        for node in data.get("nodes") or []:
            target = str(node["target"])
            if "__" in target or not _OPERATOR.fullmatch(target):
                yield target
        expression = str(data.get("expr_str") or "")
        if "__" in expression or not _ARITHMETIC.fullmatch(expression):
            yield expression
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _unsafe_names(item)


@contextmanager
def _weights_only() -> Iterator[None]:
    # overrides even an explicit weights_only=False: torch/serialization.py, torch.load
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """torch logs the traceback of an error that we raise ourselves."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
