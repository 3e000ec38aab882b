"""PyTorch to ONNX through ``torch.export``."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from edgepipe.errors import StageError
from edgepipe.torch_ops.equivalents import (
    bake_parametrizations,
    masks_as_given,
    tiny_constants_kept,
    whole_bags,
    with_known_operators,
)
from edgepipe.torch_ops.pt2 import call_arguments, input_shapes

STAGE = "export_onnx"
_NODE = re.compile(r"translating node %(\w+)")
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')
_TORCH_FOLDER, _PYTHON_FOLDER = str(Path(torch.__file__).parent), sysconfig.get_path("stdlib")


def export_onnx(
    model: nn.Module | ExportedProgram,
    inputs: Sequence[torch.Tensor],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
    optimize: bool,
    log_path: Path,
) -> ExportedProgram:
    """Write ``model`` as one ONNX file with the fixed shapes of ``inputs`` (float32 weights inside).

    Returns the program that was captured for it, of the same shapes and in PyTorch's operators. Each node keeps the PyTorch line it came from (``pkg.torch.onnx.stack_trace``). What torch says
    meanwhile goes to ``log_path``. Raises StageError naming the operator and the source line where
    torch gives them.
    """
    with log_path.open("a", encoding="utf-8") as log, _output_to(log), tiny_constants_kept():
        program = _capture(model, inputs)
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(input_names),
                output_names=list(output_names),
                optimize=optimize,
                verbose=False,
            )
        except Exception as exc:
            traceback.print_exc(file=log)
            raise _conversion_error(exc, program, log_path) from exc
        assert exported is not None  # None is for the old exporter
        exported.save(str(path), external_data=False)
    return program


def export_torchscript(
    program: ExportedProgram,
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    log_path: Path,
) -> None:
    """Write a captured program as ONNX (opset 18) through TorchScript, PyTorch's older exporter.

    Its graphs differ from `export_onnx`'s, and converters may take one and not the other. Raises
    StageError where it cannot; the log says why.
    """
    inputs = tuple(torch.zeros([n or 1 for n in shape], dtype=getattr(torch, dtype)) for _, shape, dtype in input_shapes(program))  # fmt: skip
    with log_path.open("a", encoding="utf-8") as log, _output_to(log), _native_output_to(log):
        try:
            torch.onnx.export(
                _Traceable(program), inputs, str(path), dynamo=False, opset_version=18,
                input_names=list(input_names), output_names=list(output_names),
            )  # fmt: skip
        except Exception as exc:
            traceback.print_exc(file=log)
            reason = next((line for line in str(exc).splitlines() if line.strip()), "")
            raise StageError(
                f"the TorchScript exporter failed: {type(exc).__name__}: {reason[:300]}",
                stage=STAGE, hint=f"the whole report is in {log_path}", code="op-not-converted", log_path=str(log_path),
            ) from exc  # fmt: skip


class _Traceable(nn.Module):
    """An exported program for the tracer, which would set it to evaluation mode: it has no modes."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program
        self.inner = program.module()

    def train(self, mode: bool = True) -> _Traceable:
        return self

    def forward(self, *inputs: torch.Tensor) -> Any:
        args, kwargs = call_arguments(self.program, inputs)
        return self.inner(*args, **kwargs)


def _capture(model: nn.Module | ExportedProgram, inputs: Sequence[torch.Tensor]) -> ExportedProgram:
    """The program for exactly these input shapes. Its errors go to stderr, too."""
    args: tuple[Any, ...] = tuple(inputs)
    kwargs: dict[str, Any] = {}
    if isinstance(model, ExportedProgram):
        sizes = [shape for _, shape, _ in input_shapes(model)]
        if all(None not in shape for shape in sizes):
            return model
        args, kwargs = call_arguments(model, inputs)
        model = model.module()
    else:
        bake_parametrizations(model)
    try:
        with masks_as_given(), whole_bags():
            program = torch.export.export(model, args, kwargs, strict=False)
        return with_known_operators(program)
    except Exception as exc:
        traceback.print_exc()
        place = _user_line(str(exc)) or _user_line("".join(traceback.format_exception(exc)))
        reason = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise StageError(
            f"torch.export cannot trace the model{place}: {type(exc).__name__}: {reason[:300]}",
            stage=STAGE,
            hint="write that line without control flow on tensor values "
            "(torch.where, masks), and sizes without tensors (no packed sequences, no .item()); https://docs.pytorch.org/docs/stable/export.html",
            code="cannot-trace",
        ) from exc


def _conversion_error(exc: Exception, program: ExportedProgram, log_path: Path) -> StageError:
    chain: list[BaseException] = [exc]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(link) for link in chain)
    operator = _OPERATOR.search(text)
    name = f"{operator[1]}.{operator[2]}" if operator else ""
    node = _find_node(program, _NODE.search(text), name)
    place = _user_line(node.meta.get("stack_trace") or "") if node is not None else ""
    if operator:
        message = f"operator {name}{place} has no ONNX counterpart"
        hint = "rewrite that line with operators that ONNX has; see https://onnx.ai/onnx/operators/"
    else:
        reason = next((line for line in str(chain[-1]).splitlines() if line.strip()), "")
        message = f"torch.onnx.export failed{place}: {type(chain[-1]).__name__}: {reason[:300]}"
        hint = f"the whole report is in {log_path}"
    return StageError(message, stage=STAGE, hint=hint, code="op-not-converted", log_path=str(log_path))  # fmt: skip


def _find_node(
    program: ExportedProgram, named: re.Match[str] | None, operator: str
) -> fx.Node | None:
    """The node by name, else (decomposition renames) by its operator."""
    nodes: list[fx.Node] = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        if named and node.name == named[1]:
            return node
    for node in nodes:
        if operator and str(node.target) == operator:
            return node
    return None


def _user_line(stack_trace: str) -> str:
    """`` (line 12 of model.py: return torch.linalg.qr(y)[0])`` for the innermost line outside torch and Python."""
    frames = [f for f in _FRAME.findall(stack_trace) if _is_the_users(f[0])]
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f" (line {line} of {Path(file).name}: {code.strip()})"


def _is_the_users(file: str) -> bool:
    if file == __file__ or file.startswith(_TORCH_FOLDER):
        return False
    return not file.startswith(_PYTHON_FOLDER) or "site-packages" in file


@contextlib.contextmanager
def _native_output_to(log: TextIO) -> Iterator[None]:
    """TorchScript's exporter writes the graph it fails on to file descriptor 1, past sys.stdout."""
    saved = os.dup(1)
    os.dup2(log.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Send what torch prints, warns and logs to ``log``."""
    handlers = [
        handler
        for name, logger in logging.root.manager.loggerDict.items()
        if name.partition(".")[0] in ("torch", "onnxscript") and isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler  # torch's trace handler closes what it is given
    ]
    before = [handler.setStream(log) for handler in handlers]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
