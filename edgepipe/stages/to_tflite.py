"""`to_tflite`: to float32 TFLite by the best of several converters, proven to compute the same."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from edgepipe import toolchain
from edgepipe.artifact import Artifact, TensorSpec, hash_path, make_artifact
from edgepipe.errors import ArtifactError, MissingExtra, StageError, StageOptionError
from edgepipe.parity import parity_inputs, verify
from edgepipe.predict import single_steps
from edgepipe.routes import (
    ROUTES,
    Attempt,
    Candidate,
    best,
    candidates,
    is_clean,
    is_worthwhile,
    reason,
)
from edgepipe.schema import Unit, near_miss, record
from edgepipe.stage import StageContext
from edgepipe.state import batch_axis

if TYPE_CHECKING:
    import numpy as np

    from edgepipe.tflite_ops.convert import Match

log = logging.getLogger(__name__)

NAME = "to_tflite"


class ConversionError(StageError):
    """One candidate, or all, gave no proven model. ``op``, ``node`` and ``source_line`` are at fault.

    ``attempts``: what was tried, where all failed.
    """

    op = node = source_line = ""
    attempts: tuple[Attempt, ...] = ()


def _failed(
    message: str, *, hint: str, code: str, context: StageContext, **at_fault: str
) -> ConversionError:
    error = ConversionError(
        message, stage=NAME, hint=hint, code=code, log_path=str(context.log_path)
    )
    for name, value in at_fault.items():
        setattr(error, name, value)
    return error


@dataclasses.dataclass(frozen=True)
class _Proven:
    """A converted file that was proven to compute what its source does."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Mapping[str, Any]
    variable_tensors: int
    doors: Sequence[Mapping[str, str]]


@record
class ToTflite:
    """Options of the stage.

    ``route``: which converter. ``auto`` tries one after the other (`routes.candidates`: converters,
    both of PyTorch's exporters, graph simplification) until one is clean: it computes the same, and
    neither a TRANSPOSE is left that the model does not ask for nor an operator that int8 would leave
    in float by the converter's fault. Where none is, it keeps the best (`routes.rank`), and tries
    no more than may be better (`routes.is_worthwhile`); ``all`` tries everything. A converter is
    installed when its turn comes. ``auto`` calls TensorFlow's, 2.4 GB, only where nothing else
    converts, and installs it only where there is no Python 3.12 for onnx2tf. The record lists every attempt. ``streaming``
    declares a model whose state shall last from one inference to the next (a fused LSTM); any other
    file that keeps state is refused. ``input_layout``: the layout of NCHW inputs in
    the file; those named in ``keep_layout`` stay as they are. ``output_layout``: that of NCHW outputs
    (default: what the converter makes, mostly ``input_layout``; the record's specs say which). Where the
    converter makes another one, a TRANSPOSE is put at that door (``facts["doors"]``), and the file
    proven with it. An output that feeds a state has the layout of that state. ``batch`` fixes a free batch. Every
    output may be off by ``max_relative_error`` of its largest value, on ``parity_samples`` samples
    of ``data`` ("" = noise only) and one sample of noise for each of ``parity_seeds`` seeds. With
    ``sparse`` the weights that XNNPACK can skip zeros of are stored without them; such a file runs in
    float only, and where XNNPACK would skip none, that is an error that says why.
    """

    name: ClassVar[str] = NAME
    title: ClassVar[str] = (
        "convert to float32 TFLite by the best converter and prove that it computes the same"
    )
    accepts: ClassVar[tuple[str, ...]] = ("onnx",)
    produces: ClassVar[str] = "tflite"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.tflite_ops.convert", "edgepipe.tflite_ops.doors", "edgepipe.tflite_ops.run", "edgepipe.tflite_ops.bisect",
        "edgepipe.tflite_ops.onnx_model", "edgepipe.tflite_ops.onnx_rewrites", "edgepipe.tflite_ops.onnx_graph", "edgepipe.tflite_ops.onnx_linear", "edgepipe.tflite_ops.onnx_pools", "edgepipe.tflite_ops.onnx_recurrent", "edgepipe.tflite_ops.onnx_types", "edgepipe.tflite_ops.sparse", "edgepipe.parity", "edgepipe.predict", "edgepipe.state", "edgepipe.array_ops",
        "edgepipe.tflite_ops.flatbuffer", "edgepipe.tflite_ops.inspect", "edgepipe.tflite_ops.quantize", "edgepipe.tflite_ops.scalar_functions", "edgepipe.toolchain", "edgepipe.toolchains", "edgepipe.routes",
        "edgepipe.tflite_ops.candidates", "edgepipe.tflite_ops.stand_in", "edgepipe.tflite_ops.rewrite", "edgepipe.torch_ops.export", "edgepipe.torch_ops.equivalents", "edgepipe.torch_ops.pt2",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = (
        "onnxruntime",
        "ai-edge-litert",
        "litert-quantizer",
        "numpy",
        "torch",
    )

    route: Literal["auto", "all", "onnx2tf", "litert-torch", "tf"] = "auto"
    input_layout: Literal["NHWC", "NCHW"] = "NHWC"
    keep_layout: tuple[str, ...] = ()
    output_layout: Literal["", "NHWC", "NCHW"] = ""
    batch: int | None = None
    data: str = "calibration"
    max_relative_error: float = 1e-4
    parity_samples: int = 8
    parity_seeds: int = 3
    timeout: Annotated[float, Unit("time")] = 600.0
    sparse: bool = False
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise StageOptionError(f"{NAME}: batch is at least 1")
        if not 0 < self.max_relative_error < 1:
            raise StageOptionError(f"{NAME}: max_relative_error is above 0 and below 1")
        if self.parity_samples < 0 or self.parity_seeds < 0 or self.timeout <= 0:
            raise StageOptionError(f"{NAME}: parity_samples, parity_seeds and timeout are positive")
        if self.parity_seeds == 0 and (self.parity_samples == 0 or not self.data):
            raise StageOptionError(f"{NAME}: parity needs samples or seeds: a conversion is never trusted")  # fmt: skip

    def data_names(self) -> tuple[str, ...]:
        return (self.data,) if self.data and self.parity_samples else ()

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        """The TFLite file. Nothing is kept where every conversion, or its proof, fails."""
        from edgepipe.tflite_ops.candidates import source_operators, source_transposes
        from edgepipe.tflite_ops.convert import prepare_onnx
        from edgepipe.tflite_ops.sparse import sparsity_facts

        if not artifact.inputs:
            raise ArtifactError(
                f"{artifact.path} has no inputs: its outputs are always the same",
                hint="keep these values as data beside the model",
                code="no-input",
            )
        for spec in artifact.outputs:
            if 0 in spec.shape:
                raise ArtifactError(
                    f"output {spec.name!r} of {artifact.path} has no elements: its shape is {list(spec.shape)}",
                    hint="export the model without that output",
                    code="empty-output",
                )
        layouts = self._layouts(artifact)
        prepared = prepare_onnx(
            artifact.path,
            artifact.inputs,
            batch=self.batch,
            where=str(artifact.facts.get("file", "")),
            streaming=self.streaming,
        )
        source = context.data[self.data] if self.data_names() else None
        inputs = parity_inputs(source, artifact.inputs, self.parity_samples, self.parity_seeds)
        rows = single_steps(artifact, inputs)
        needed = source_transposes(artifact.path)
        own = source_operators(artifact.path)
        target = context.work_dir / "model.tflite"
        with tempfile.TemporaryDirectory(prefix="edgepipe-to_tflite-") as folder:
            job = _Job(self, artifact, context, layouts, inputs, rows, prepared, Path(folder))
            attempts: list[Attempt] = []
            proven: list[_Proven] = []
            failures: list[Exception] = []
            exporter = "dynamo" if "exported_program" in artifact.facts else "given"
            for candidate in candidates(self.route, exporter=exporter, has_program=bool(job.program)):  # fmt: skip
                if self.route == "auto" and not is_worthwhile(candidate, attempts, own):
                    continue
                attempt, made, failure = job.attempt(candidate, attempts)
                if failure is not None:
                    failures.append(failure)
                if made is not None:
                    proven.append(made)
                    # inputs that stay channels first, as do signals (N, C, L), cost one each
                    doors = [s for s in (*made.inputs, *made.outputs) if s.layout in ("NCL", "NCHW", "NCDHW")]  # fmt: skip
                    clean = is_clean(attempt, transposes=needed + len(doors), source_operators=own)
                    attempt = dataclasses.replace(attempt, clean=clean)
                attempts.append(attempt)
                _say(attempt)
                if attempt.clean and self.route != "all":
                    break
                if attempt.ok and self.route not in ("auto", "all"):
                    break
            if not proven:
                raise _nothing_proven(attempts, failures, context)
            attempts = _with_latencies(attempts, proven)
            good = [attempt for attempt in attempts if attempt.ok]
            chosen = best(good)
            made = proven[good.index(chosen)]
            shutil.move(made.path, target)
        why = reason(chosen, attempts, self.route)
        if len(attempts) > 1:
            log.info("kept %s: %s", chosen.candidate, why)
        for door in made.doors:
            log.info("%s is %s by a TRANSPOSE: the converter made it %s", door["name"], door["layout"], door["converted"])  # fmt: skip
        name = ROUTES[chosen.route][0]
        facts: dict[str, Any] = {
            "route": chosen.route,
            "exporter": chosen.exporter,
            "simplified": chosen.simplified,
            "route_reason": why,
            "attempts": [dataclasses.asdict(a) for a in attempts],
            # state that lasts from one inference to the next unless the runner resets it (LSTM)
            "variable_tensors": made.variable_tensors,
            "streaming": self.streaming,
            # inputs and outputs that got a TRANSPOSE, for the layout asked for
            "doors": made.doors,
            **sparsity_facts(target.read_bytes(), where=target.name),
            "toolchain": {"name": name, "lock_sha256": hash_path(toolchain.find_toolchain(name).lock)},
            "parity": {**made.parity, "seeds": self.parity_seeds, "data": source.kind if source else "noise"},
        }  # fmt: skip
        return make_artifact(
            "tflite",
            target,
            inputs=made.inputs,
            outputs=made.outputs,
            parent=artifact,
            facts=facts,
        )

    def _layouts(self, artifact: Artifact) -> dict[str, str]:
        """Source input name -> the layout it shall have in the file."""
        names = [spec.name for spec in artifact.inputs]
        for name in self.keep_layout:
            if name not in names:
                raise StageOptionError(
                    f"{NAME}: keep_layout names no input of the model: {name!r}{near_miss(name, names)}",
                    hint=f"inputs: {', '.join(names)}",
                )
        moved = {"NCHW": "NHWC", "NCDHW": "NDHWC"} if self.input_layout == "NHWC" else {}
        return {
            spec.name: spec.layout if spec.name in self.keep_layout else moved.get(spec.layout, spec.layout)
            for spec in artifact.inputs
        }  # fmt: skip


@dataclasses.dataclass
class _Job:
    """Everything that the attempts to convert one model share.

    ``inputs`` are for `predict`; ``rows`` are single inferences, of every input (n, ...).
    """

    options: ToTflite
    artifact: Artifact
    context: StageContext
    layouts: Mapping[str, str]
    inputs: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    prepared: bytes
    folder: Path

    def __post_init__(self) -> None:
        self.program, self.no_program = _exported_program(self.artifact)
        self._torchscript: Path | StageError | None = None

    def attempt(
        self, candidate: Candidate, before: Sequence[Attempt]
    ) -> tuple[Attempt, _Proven | None, Exception | None]:
        """What became of one candidate: its proven file, or the error that says why there is none."""
        from edgepipe.tflite_ops.candidates import left_behind

        started = time.monotonic()

        def failed(exc: StageError | MissingExtra, code: str) -> tuple[Attempt, None, Exception]:
            return Attempt(
                candidate.route, candidate.exporter, candidate.simplified, ok=False, code=code, message=exc.message,
                seconds=round(time.monotonic() - started, 2), op=getattr(exc, "op", ""), node=getattr(exc, "node", ""), source_line=getattr(exc, "source_line", ""),
            ), None, exc  # fmt: skip

        if candidate.route == "litert-torch" and self.program is None:
            exc = _failed(self.no_program, hint="convert from PyTorch or a .pt2 file, or use route = onnx2tf", code="no-exported-program", context=self.context)  # fmt: skip
            return failed(exc, exc.code)
        name = ROUTES[candidate.route][0]
        try:
            self._ensure(name, before)
        except MissingExtra as exc:
            # another converter stands in for a missing one, and the record says so; but that
            # installing fails, before anything could be tried, is for the user to mend
            absent = exc.code in ("no-python", "missing-toolchain", "no-borrowed-package")
            if not absent and all(
                a.code in ("no-toolchain", "no-exported-program") for a in before
            ):
                raise
            return failed(exc, "no-toolchain")
        folder = self.folder / str(len(before))
        folder.mkdir()
        try:
            made = self._prove(self._convert(candidate, folder))
        except StageError as exc:
            if exc.code == "not-sparse":
                raise
            return failed(exc, exc.code)
        return Attempt(
            candidate.route, candidate.exporter, candidate.simplified, ok=True,
            parity=max(o["max_abs_relative"] for o in made.parity["outputs"].values()),
            seconds=round(time.monotonic() - started, 2), **left_behind(made.path),
        ), made, None  # fmt: skip

    def _ensure(self, name: str, before: Sequence[Attempt]) -> None:
        """Make sure a toolchain is there. TensorFlow's is installed only where onnx2tf cannot be."""
        wanted = self.options.route != "auto" or name != "onnx2tf-tf" or not before
        if not wanted and not toolchain.is_installed(name):
            first = next((a for a in before if a.route == "onnx2tf"), None)
            if first is None or first.code != "no-toolchain" or not toolchain.may_install():
                raise MissingExtra(
                    f"the {name} toolchain is not installed, and is large",
                    hint=f"edgepipe toolchains install {name}",
                    code="missing-toolchain",
                )
        toolchain.ensure(name)

    def _convert(self, candidate: Candidate, folder: Path) -> tuple[Path, int]:
        """The converter's file, which LiteRT can run, and the number of its variable tensors."""
        name, script = ROUTES[candidate.route]
        log.info("converting %s with %s", self.artifact.path.name, candidate)
        request: dict[str, Any]
        files: dict[str, Path | bytes]
        graph = self.artifact.path
        if candidate.route == "litert-torch":
            assert self.program is not None  # or there would be no such candidate
            moved = {s.name: self.layouts[s.name] != s.layout for s in self.artifact.inputs}
            out = (self.options.output_layout or self.options.input_layout) == "NHWC"
            request = {
                "model": "model.pt2",
                "channels_last": [moved[s.name] for s in self.artifact.inputs],
                "outputs_channels_last": [out and s.layout in ("NCHW", "NCDHW") for s in self.artifact.outputs],
            }  # fmt: skip
            files = {"model.pt2": self.program}
        else:
            # onnx2tf makes every 3-D to 5-D input channels-last unless told otherwise
            keep = [s.name for s in self.artifact.inputs if self.layouts[s.name] == s.layout]
            request = {"model": "model.onnx", "keep_shape": keep, "simplify": candidate.simplified}
            if candidate.exporter == "torchscript":
                graph = self._export_torchscript()
            files = {"model.onnx": graph if candidate.exporter == "torchscript" else self.prepared}
        answer = toolchain.call(
            name, script, request, files=files, work_dir=folder, timeout_s=self.options.timeout,
            log_path=self.context.log_path, stage=NAME,
        )  # fmt: skip
        if not answer["ok"]:
            raise self._refused(answer, candidate, graph)
        made = folder / str(answer["tflite"])
        if not made.is_file() or not made.stat().st_size:
            raise _failed(f"{name} says it made {made.name}, but it did not", hint="look at the log", code="no-output", context=self.context)  # fmt: skip
        return made, _check_runs(made, self.context)

    def _export_torchscript(self) -> Path:
        """The program as ONNX by the older exporter, made once; its StageError each time."""
        from edgepipe.tflite_ops.onnx_model import read_onnx, save_onnx
        from edgepipe.tflite_ops.onnx_rewrites import rewrite_for_converters
        from edgepipe.torch_ops.export import export_torchscript
        from edgepipe.torch_ops.pt2 import load_pt2

        if self._torchscript is None:
            assert self.program is not None  # or there would be no such candidate
            path = self.folder / "torchscript.onnx"
            try:
                export_torchscript(
                    load_pt2(self.program), path, log_path=self.context.log_path,
                    input_names=[s.name for s in self.artifact.inputs], output_names=[s.name for s in self.artifact.outputs],
                )  # fmt: skip
                graph = read_onnx(path)
                if rewrite_for_converters(graph, streaming=self.options.streaming):
                    save_onnx(graph, path)
                self._torchscript = path
            except StageError as exc:
                self._torchscript = exc
            except ArtifactError as exc:
                self._torchscript = _failed(exc.message, hint=exc.hint, code="op-not-converted", context=self.context)  # fmt: skip
        if isinstance(self._torchscript, StageError):
            raise self._torchscript
        return self._torchscript

    def _refused(
        self, answer: Mapping[str, Any], candidate: Candidate, graph: Path
    ) -> ConversionError:
        """The converter's own refusal, with the operator and the line of PyTorch at fault."""
        from edgepipe.tflite_ops.bisect import find_node

        name = ROUTES[candidate.route][0]
        op, line = str(answer.get("op", "")), str(answer.get("source_line", ""))
        # onnx2tf 1.x says in its log at which node it stopped, 2.x in its error
        node = answer.get("node") or (_node_in_log(self.context.log_path) if candidate.route == "tf" else "")  # fmt: skip
        if not (node or op):
            return _failed(
                f"{name} cannot convert {self.artifact.path.name}: {answer['message']}",
                hint="its log says more; a model exported with torch.onnx.export(dynamo=True, opset 18) converts best",
                code=answer["reason"], context=self.context,
            )  # fmt: skip
        if candidate.route != "litert-torch":
            node, op, line = find_node(graph, node, op) or (node, op, "")
        place = f", from {line}" if line else ""
        return _failed(
            f"{name} cannot convert operator {op} (node {node!r}{place}): {answer['message']}",
            hint="write that line with other PyTorch operators, or do it outside the model",
            code="unsupported-op", context=self.context, op=op, node=node, source_line=line,
        )  # fmt: skip

    def _prove(self, converted: tuple[Path, int]) -> _Proven:
        """The file with its tensors named and every output compared. Raises StageError."""
        from edgepipe.tflite_ops.candidates import keeps_state
        from edgepipe.tflite_ops.convert import flat_biases, match_tensors
        from edgepipe.tflite_ops.doors import own_outputs
        from edgepipe.tflite_ops.sparse import store_sparse

        path, variable_tensors = converted
        content = flat_biases(path.read_bytes(), where="model.tflite")
        path.write_bytes(own_outputs(content, where="model.tflite"))
        if self.options.sparse:
            path.write_bytes(store_sparse(path.read_bytes(), where="model.tflite"))
        tolerance = self.options.max_relative_error
        # a real sample and the last of noise: what fits both is no coincidence; no state is at its start
        first = self._count() // len(next(iter(self.inputs.values()))) - 1
        rows = [self._row(spec, [first, -1]) for spec in self.artifact.inputs]
        try:
            match = match_tensors(
                self.artifact.path, path, self.artifact.inputs, self.artifact.outputs, rows,
                layouts=self.layouts, tolerance=tolerance,
            )  # fmt: skip
        except ArtifactError as exc:
            told = exc.message.replace(str(path), "the converted model")
            code = "invalid-graph" if exc.code == "cannot-run" else "parity"
            raise _failed(told, hint=exc.hint, code=code, context=self.context) from exc
        match, doors = self._with_doors(path, match)
        made = make_artifact("tflite", path, inputs=match.inputs, outputs=match.outputs, parent=self.artifact)  # fmt: skip
        try:
            parity = verify(self.artifact, made, self.inputs, max_relative_error=tolerance, stage=NAME)  # fmt: skip
        except StageError as exc:
            raise self._departed(made, exc) from exc
        last = {spec.name: self._row(spec, [-1]) for spec in self.artifact.inputs}
        stateful = keeps_state(path, last, match.inputs)
        if stateful and not self.options.streaming:
            raise _failed(
                "the converted model keeps state from one inference to the next: the same input gives another output the second time",
                hint="where that is meant, declare it with streaming = true (--streaming); else convert from PyTorch, so that "
                "other routes can be tried",
                code="keeps-state", context=self.context,
            )  # fmt: skip
        if self.options.streaming and not stateful:
            raise _failed(
                "the model is declared streaming, but the converted file keeps no state",
                hint="leave streaming out, or use operators whose state TFLite keeps (torch.nn.LSTM)",
                code="no-state", context=self.context,
            )  # fmt: skip
        return _Proven(path, match.inputs, match.outputs, parity, variable_tensors, doors)

    def _count(self) -> int:
        spec = self.artifact.inputs[0]
        return self.rows[spec.name].shape[batch_axis(spec.layout)]

    def _row(self, spec: TensorSpec, numbers: Sequence[int]) -> np.ndarray:
        """Some of `rows` for one input of the source."""
        return self.rows[spec.name].take(numbers, axis=batch_axis(spec.layout))

    def _with_doors(self, path: Path, match: Match) -> tuple[Match, list[Mapping[str, str]]]:
        """The match once inputs and outputs of the file have the layouts asked for; what was moved."""
        from edgepipe.array_ops.layout import permute_shape
        from edgepipe.tflite_ops.doors import move_axes

        outputs = {}
        if self.options.output_layout:
            moved = (
                {"NCHW": "NHWC", "NCDHW": "NDHWC"} if self.options.output_layout == "NHWC" else {}
            )
            maps = [s for s in self.artifact.outputs if s.layout in ("NCHW", "NCDHW")]
            outputs = {s.name: moved.get(s.layout, s.layout) for s in maps}
        # what feeds a state comes out as the state goes in
        outputs |= {s.fed_by: self.layouts[s.name] for s in match.inputs if s.fed_by}
        sides, moves = [], []
        doors: list[Mapping[str, str]] = []
        for specs, asked in ((match.inputs, self.layouts), (match.outputs, outputs)):
            to = [asked.get(spec.name, spec.layout) for spec in specs]
            # a scalar that the file has as [1] stays what it is
            to = [
                t if len(t) == len(s.layout) else s.layout for s, t in zip(specs, to, strict=True)
            ]
            moves.append({i: (s.layout, t) for i, (s, t) in enumerate(zip(specs, to, strict=True)) if s.layout != t})  # fmt: skip
            doors += [{"name": specs[i].name, "converted": was, "layout": t} for i, (was, t) in moves[-1].items()]  # fmt: skip
            sides.append(tuple(
                dataclasses.replace(s, layout=t, shape=permute_shape(s.shape, s.layout, t))
                for s, t in zip(specs, to, strict=True)
            ))  # fmt: skip
        if doors:
            path.write_bytes(move_axes(path.read_bytes(), *moves))
        return dataclasses.replace(match, inputs=sides[0], outputs=sides[1]), doors

    def _departed(self, converted: Artifact, failure: StageError) -> ConversionError:
        """The parity failure, with the first operator that computes something else."""
        from edgepipe.array_ops.layout import to_layout
        from edgepipe.tflite_ops.bisect import first_departure
        from edgepipe.tflite_ops.onnx_model import half_precision, read_onnx

        count = self._count()
        batch = converted.inputs[0].shape[0]
        departure = None
        for index in (count - 1, *range(count - 1)):  # the last is noise, which hides least
            rows = {spec.name: self._row(spec, [index] * batch) for spec in self.artifact.inputs}
            with contextlib.suppress(ArtifactError):  # a file that fails on these inputs
                departure = first_departure(
                    self.artifact.path,
                    converted.path,
                    [rows[spec.name] for spec in self.artifact.inputs],
                    [to_layout(rows[s.name], s.source_layout, s.layout) for s in converted.inputs],
                    tolerance=self.options.max_relative_error,
                )
            if departure:
                break
        where = (
            f"the first operator to compute something else is {departure}; {departure.last_equal!r} is still equal"
            if departure
            else "yet every operator that can be compared one by one computes the same"
        )
        hint = half_precision(read_onnx(self.artifact.path)) or failure.hint
        return _failed(
            f"{failure.message}; {where}",
            hint=hint, code="parity", context=self.context,
            op=departure.operator if departure else "", node=departure.node if departure else "",
            source_line=departure.source if departure else "",
        )  # fmt: skip


def _exported_program(artifact: Artifact) -> tuple[Path | None, str]:
    """The program that export_onnx kept beside its model, or None and why there is none."""
    kept = artifact.facts.get("exported_program")
    if not kept:
        return None, f"{artifact.path.name} comes without the PyTorch program it was exported from"
    path = artifact.path.parent / str(kept["file"])
    if not path.is_file() or hash_path(path) != kept["sha256"]:
        return (
            None,
            f"{path} is not the PyTorch program that {artifact.path.name} was exported with",
        )
    return path, ""


def _say(attempt: Attempt) -> None:
    if not attempt.ok:
        log.info("%s: %s: %s", attempt.candidate, attempt.code, attempt.message)
        return
    loose = ", ".join(f"{n} {name}" for name, n in attempt.loose_ops.items())
    log.info(
        "%s: proven, %d operators, %d transposes%s%s", attempt.candidate, attempt.operators, attempt.transposes,
        f", float or spelt out: {loose}" if loose else "", "" if attempt.clean else " (not clean)",
    )  # fmt: skip


def _with_latencies(attempts: Sequence[Attempt], proven: Sequence[_Proven]) -> list[Attempt]:
    """The attempts, the proven ones with the latencies by which equal ones are told apart."""
    from edgepipe.tflite_ops.candidates import host_latencies_s

    if len(proven) < 2:
        return list(attempts)
    timed = iter(host_latencies_s([made.path for made in proven]))
    return [dataclasses.replace(a, latency_s=next(timed)) if a.ok else a for a in attempts]


def _nothing_proven(
    attempts: Sequence[Attempt], failures: Sequence[Exception], context: StageContext
) -> Exception:
    """The error for a model that no candidate converted: the first conversion's, and what else was tried."""
    with context.log_path.open("a", encoding="utf-8") as output:
        output.write(json.dumps([dataclasses.asdict(a) for a in attempts], indent=1) + "\n")
    ran = [e for e in failures if isinstance(e, StageError) and e.code != "no-exported-program"]
    first = next(iter(ran or failures))
    if not isinstance(first, StageError):
        return first
    others = [f"{a.candidate} ({a.code})" for a, e in zip(attempts, failures, strict=True) if e is not first]  # fmt: skip
    tried = f"; also tried: {', '.join(others)}" if others else ""
    error = _failed(first.message + tried, hint=first.hint, code=first.code, context=context)
    for name in ("op", "node", "source_line"):
        setattr(error, name, getattr(first, name, ""))
    error.attempts = tuple(attempts)
    error.__cause__ = first
    return error


def _node_in_log(path: Path) -> str:
    """The node after which onnx2tf 1.x gave up, or ""."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        found = re.findall(r"onnx_op_name: (\S+)", stream.read().decode(errors="replace"))
    return found[-1] if found else ""


def _check_runs(path: Path, context: StageContext) -> int:
    """Refuse a file that LiteRT cannot run: custom or Flex operators, a damaged graph.

    Returns the number of its variable tensors.
    """
    from edgepipe.tflite_ops.doors import unmade_outputs
    from edgepipe.tflite_ops.inspect import read_model
    from edgepipe.tflite_ops.run import open_tflite, refuse_crashing

    try:
        graphs = read_model(path).subgraphs
        operators = {operator.name for graph in graphs for operator in graph.operators}
        foreign = sorted(name for name in operators if name.startswith(("Flex", "ONNX_")))
        if foreign:
            raise StageError(
                f"the converter left operators that no plain TFLite runtime has: {', '.join(foreign)}",
                stage=NAME, code="unsupported-op", log_path=str(context.log_path),
                hint="write them with other PyTorch operators, or do them outside the model",
            )  # fmt: skip
        if lost := unmade_outputs(graphs[0]):
            raise StageError(
                f"the converter lost output {lost[0]!r}: no operator makes it",
                stage=NAME, code="invalid-graph", log_path=str(context.log_path),
                hint="is it another output once more, or a view of one? Return each tensor once",
            )  # fmt: skip
        refuse_crashing(path)
        open_tflite(path)
    except ArtifactError as exc:
        raise StageError(
            f"the converter made a file that cannot run: {exc.message.replace(str(path), 'it')}",
            stage=NAME, code="invalid-graph", log_path=str(context.log_path),
            hint="write the operator that LiteRT names with other PyTorch operators or types (int32, float32), or do it outside the model",
        ) from exc  # fmt: skip
    return sum(tensor.is_variable for graph in graphs for tensor in graph.tensors)
