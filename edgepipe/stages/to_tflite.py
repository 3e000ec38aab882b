"""`to_tflite`: ONNX to float32 TFLite, proven to compute the same."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from edgepipe import toolchain
from edgepipe.artifact import Artifact, hash_path, make_artifact
from edgepipe.errors import ArtifactError, MissingExtra, StageError, StageOptionError
from edgepipe.parity import parity_inputs, verify
from edgepipe.schema import Unit, near_miss, record
from edgepipe.stage import StageContext

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

NAME = "to_tflite"
# route -> toolchain and the script that converts
ROUTES = {
    "onnx2tf": ("onnx2tf", "onnx_to_tflite_direct.py"),
    "tf": ("onnx2tf-tf", "onnx_to_tflite_tf.py"),
}


@record
class ToTflite:
    """Options of the stage.

    ``route``: which converter; ``auto`` is onnx2tf where this machine has or can get a Python 3.12
    for it, else TensorFlow's (the record says which). ``input_layout``: the layout of NCHW inputs in
    the file; those named in ``keep_layout`` stay as they are. ``batch`` fixes a free batch. Every
    output may be off by ``max_relative_error`` of its largest value, on ``parity_samples`` samples
    of ``data`` ("" = noise only) and one sample of noise for each of ``parity_seeds`` seeds. With
    ``sparse`` the weights that XNNPACK can skip zeros of are stored without them; such a file runs in
    float only, and where XNNPACK would skip none, that is an error that says why.
    """

    name: ClassVar[str] = NAME
    title: ClassVar[str] = "convert ONNX to float32 TFLite and prove that it computes the same"
    accepts: ClassVar[tuple[str, ...]] = ("onnx",)
    produces: ClassVar[str] = "tflite"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.tflite_ops.convert", "edgepipe.tflite_ops.run", "edgepipe.tflite_ops.bisect",
        "edgepipe.tflite_ops.onnx_model", "edgepipe.tflite_ops.sparse", "edgepipe.parity", "edgepipe.array_ops.compare",
        "edgepipe.array_ops.noise", "edgepipe.toolchain", "edgepipe.toolchains",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "ai-edge-litert", "numpy")

    route: Literal["auto", "onnx2tf", "tf"] = "auto"
    input_layout: Literal["NHWC", "NCHW"] = "NHWC"
    keep_layout: tuple[str, ...] = ()
    batch: int | None = None
    data: str = "calibration"
    max_relative_error: float = 1e-4
    parity_samples: int = 8
    parity_seeds: int = 3
    timeout: Annotated[float, Unit("time")] = 600.0
    sparse: bool = False

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
        """The TFLite file. Nothing is kept where conversion or the proof fails."""
        from edgepipe.tflite_ops.convert import match_tensors, prepare_onnx
        from edgepipe.tflite_ops.sparse import sparsity_facts, store_sparse

        layouts = self._layouts(artifact)
        prepared = prepare_onnx(artifact.path, artifact.inputs, batch=self.batch)
        source = context.data[self.data] if self.data_names() else None
        inputs = parity_inputs(source, artifact.inputs, self.parity_samples, self.parity_seeds)
        target = context.work_dir / "model.tflite"
        route, why = self._route()
        with tempfile.TemporaryDirectory(prefix="edgepipe-to_tflite-") as folder:
            made = self._convert(artifact, prepared, layouts, route, Path(folder), context)
            del prepared
            stateful = _check_runs(made, context)
            shutil.move(made, target)
        if self.sparse:
            target.write_bytes(store_sparse(target.read_bytes(), where=target.name))
        # the first real sample and the last of noise: what fits both is no coincidence
        rows = [inputs[spec.name][[0, -1]] for spec in artifact.inputs]
        try:
            match = match_tensors(
                artifact.path, target, artifact.inputs, artifact.outputs, rows,
                layouts=layouts, tolerance=self.max_relative_error,
            )  # fmt: skip
        except ArtifactError as exc:
            raise StageError(exc.message, stage=NAME, hint=exc.hint, code="parity", log_path=str(context.log_path)) from exc  # fmt: skip
        converted = make_artifact(
            "tflite", target, inputs=match.inputs, outputs=match.outputs, parent=artifact
        )
        for spec in match.inputs:
            if spec.layout != layouts[spec.name]:
                log.warning("input %s is %s in the TFLite file: the converter did not make it %s", spec.name, spec.layout, layouts[spec.name])  # fmt: skip
        try:
            parity = verify(
                artifact, converted, inputs,
                max_relative_error=self.max_relative_error, stage=NAME,
            )  # fmt: skip
        except StageError as exc:
            raise self._departed(artifact, converted, inputs, exc, context) from exc
        lock = toolchain.find_toolchain(ROUTES[route][0]).lock
        facts: dict[str, Any] = {
            "route": route,
            "route_reason": why,
            # state that lasts from one inference to the next unless the runner resets it (LSTM)
            "variable_tensors": stateful,
            **sparsity_facts(target.read_bytes(), where=target.name),
            "toolchain": {"name": ROUTES[route][0], "lock_sha256": hash_path(lock)},
            "parity": {**parity, "seeds": self.parity_seeds, "data": source.kind if source else "noise"},
        }  # fmt: skip
        return make_artifact(
            "tflite",
            target,
            inputs=match.inputs,
            outputs=match.outputs,
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

    def _route(self) -> tuple[str, str]:
        """The route, and why. Makes sure that its toolchain is there."""
        if self.route != "auto":
            toolchain.ensure(ROUTES[self.route][0])
            return self.route, "asked for"
        try:
            toolchain.ensure("onnx2tf")
        except MissingExtra as exc:
            # only the lack of a Python is a reason for another converter, which the record then names
            if exc.code == "no-python":
                log.warning("%s: converting with TensorFlow instead (route = tf)", exc.message)
                toolchain.ensure("onnx2tf-tf")
                return "tf", "no Python 3.12 for onnx2tf on this machine"
            if exc.code == "missing-toolchain" and toolchain.is_installed("onnx2tf-tf"):
                log.warning("onnx2tf is not installed: converting with TensorFlow instead (route = tf)")  # fmt: skip
                return "tf", "onnx2tf is not installed and may not be"
            raise
        return "onnx2tf", "preferred"

    def _convert(
        self, artifact: Artifact, prepared: bytes, layouts: dict[str, str], route: str,
        folder: Path, context: StageContext,
    ) -> Path:  # fmt: skip
        """The converter's file, in ``folder``. Raises StageError, naming the operator at fault."""
        name, script = ROUTES[route]
        log.info("converting %s with %s", artifact.path.name, toolchain.TOOLCHAINS[name].summary)
        # onnx2tf makes every 3-D to 5-D input channels-last unless told otherwise
        keep = [spec.name for spec in artifact.inputs if layouts[spec.name] == spec.layout]
        answer = toolchain.call(
            name, script, {"model": "model.onnx", "keep_shape": keep},
            files={"model.onnx": prepared}, work_dir=folder, timeout_s=self.timeout,
            log_path=context.log_path, stage=NAME,
        )  # fmt: skip
        if answer["ok"]:
            made = folder / str(answer["tflite"])
            if made.is_file() and made.stat().st_size:
                return made
            raise StageError(
                f"{name} says it made {made.name}, but it did not",
                stage=NAME, code="no-output", log_path=str(context.log_path), hint="look at the log",
            )  # fmt: skip
        # onnx2tf 1.x says in its log at which node it stopped, 2.x in its error
        node = answer.get("node") or _node_in_log(context.log_path)
        if node or "op" in answer:
            raise _unsupported(artifact, answer.get("op", ""), node, answer["message"], name, context)  # fmt: skip
        raise StageError(
            f"{name} cannot convert {artifact.path.name}: {answer['message']}",
            stage=NAME, code=answer["reason"], log_path=str(context.log_path),
            hint="its log says more; a model exported with torch.onnx.export(dynamo=True, opset 18) converts best",
        )  # fmt: skip

    def _departed(
        self, artifact: Artifact, converted: Artifact, inputs: dict[str, np.ndarray],
        failure: StageError, context: StageContext,
    ) -> StageError:  # fmt: skip
        """The parity failure, with the first operator that computes something else."""
        from edgepipe.array_ops.layout import to_layout
        from edgepipe.tflite_ops.bisect import first_departure

        count = len(next(iter(inputs.values())))
        batch = converted.inputs[0].shape[0]
        for index in (count - 1, *range(count - 1)):  # the last is noise, which hides least
            rows = {name: array[[index]].repeat(batch, axis=0) for name, array in inputs.items()}
            departure = first_departure(
                artifact.path,
                converted.path,
                [rows[spec.name] for spec in artifact.inputs],
                [to_layout(rows[s.name], s.source_layout, s.layout) for s in converted.inputs],
                tolerance=self.max_relative_error,
            )
            if departure:
                break
        where = (
            f"the first operator to compute something else is {departure}; {departure.last_equal!r} is still equal"
            if departure
            else "yet every operator that can be compared one by one computes the same"
        )
        return StageError(
            f"{failure.message}; {where}",
            stage=NAME, hint=failure.hint, code="parity", log_path=str(context.log_path),
        )  # fmt: skip


def _node_in_log(path: Path) -> str:
    """The node after which onnx2tf 1.x gave up, or ""."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        found = re.findall(r"onnx_op_name: (\S+)", stream.read().decode(errors="replace"))
    return found[-1] if found else ""


def _unsupported(
    artifact: Artifact, operator: str, node: str, reason: str, name: str, context: StageContext
) -> StageError:
    from edgepipe.tflite_ops.bisect import find_node

    found_node, found_operator, line = find_node(artifact.path, node, operator) or (node, operator, "")  # fmt: skip
    source = f", from {line}" if line else ""
    return StageError(
        f"{name} cannot convert operator {found_operator} (node {found_node!r}{source}): {reason}",
        stage=NAME, code="unsupported-op", log_path=str(context.log_path),
        hint="write that line with other PyTorch operators, or do it outside the model",
    )  # fmt: skip


def _check_runs(path: Path, context: StageContext) -> int:
    """Refuse a file that LiteRT cannot run: custom or Flex operators, a damaged graph.

    Returns the number of its variable tensors.
    """
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
        refuse_crashing(path)
        open_tflite(path)
    except ArtifactError as exc:
        raise StageError(
            f"the converter made a file that cannot run: {exc.message}",
            stage=NAME, code="invalid-graph", log_path=str(context.log_path), hint="look at the log",
        ) from exc  # fmt: skip
    return sum(tensor.is_variable for graph in graphs for tensor in graph.tensors)
