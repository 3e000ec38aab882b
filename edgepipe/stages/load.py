"""`LoadModel`: the step before the first stage, from what a recipe names to an artifact."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgepipe.artifact import Artifact, TensorSpec, hash_path, make_artifact
from edgepipe.data import user_path
from edgepipe.errors import ArtifactError
from edgepipe.host_memory import check_fits
from edgepipe.schema import record
from edgepipe.stage import StageContext
from edgepipe.state import check_names, with_state

log = logging.getLogger(__name__)


@record
class TensorOption:
    """One input, ``[[model.inputs]]``. ``shape`` begins with the batch, which is 1; that of a scalar is [].

    ``layout`` names each axis, like ``NCHW``; without it the axes are PyTorch's usual ones for
    that rank. Of a model file only what it leaves open needs saying: layout, free dimensions.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: Literal[
        "float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"
    ] = "float32"
    layout: str = ""


@record
class ModelSource:
    """Where the model comes from, ``[model]``: a builder, or a file.

    ``builder`` = ``"file.py:function"`` (one file that imports only installed packages) or
    ``"package.module:function"``, called with ``args``; ``weights`` is its state dict
    (.safetensors, .pth, .pt), without which it starts from seeded random ones. ``file`` is an
    .onnx, .tflite or .pt2 (torch.export.save). ``outputs`` names the outputs of a PyTorch model
    in order (default: output_0, output_1, ...). ``state`` says which input is fed by which output of
    the step before (`edgepipe.state`).
    """

    builder: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    file: Path | None = None
    weights: Path | None = None
    inputs: tuple[TensorOption, ...] = ()
    outputs: tuple[str, ...] = ()
    state: dict[str, str] = dataclasses.field(default_factory=dict)
    # folder that relative paths are relative to; filled in by the recipe loader
    root: Path | None = dataclasses.field(default=None, metadata={"internal": True})

    def resolve(self, path: Path) -> Path:
        return user_path(path, self.root)


@dataclasses.dataclass(frozen=True)
class LoadModel:
    """Copies the model into the work folder, checks that it is what it should be, and runs it once."""

    name: ClassVar[str] = "load"
    title: ClassVar[str] = "load and check the model"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.torch_ops", "edgepipe.tflite_ops.flatbuffer", "edgepipe.tflite_ops.inspect",
        "edgepipe.tflite_ops.onnx_model", "edgepipe.tflite_ops.run", "edgepipe.state",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "onnx", "onnxruntime", "ai-edge-litert")  # fmt: skip

    source: ModelSource

    def run(self, context: StageContext) -> Artifact:
        """The source model as an artifact. Raises ArtifactError where it is not a working model."""
        return with_state(self._load(context), self.source.state)

    def _load(self, context: StageContext) -> Artifact:
        source = self.source
        check_source(source)
        given = source.file or source.weights
        if given is not None:
            check_fits([source.resolve(given)])
        if source.file is None:
            return _load_builder(source, context)
        check_file(source)
        path = source.resolve(source.file)
        loaders = {".onnx": _load_onnx, ".tflite": _load_tflite, ".pt2": _load_pt2}
        return loaders[path.suffix.lower()](path, source, context)


def check_file(source: ModelSource) -> None:
    """What the file of a source tells at a glance: is it there, what its name says, and one model?

    Imports no framework. Raises ArtifactError, and RequestError for a .tflite of several signatures.
    """
    if source.file is None:
        return
    path = source.resolve(source.file)
    if not path.is_file():
        raise ArtifactError(f"model file {path} does not exist", hint="check the path", code="no-such-file")  # fmt: skip
    if path.suffix in (".pth", ".pt", ".safetensors"):
        raise ArtifactError(
            f"{path} holds weights, which are no model without the code that builds it",
            hint=f'builder = "file.py:function", weights = "{source.file}"',
            code="weights-without-builder",
        )
    found = _looks_like(path)
    if path.suffix.lower() not in (".onnx", ".tflite", ".pt2"):
        raise ArtifactError(
            f"model file {path} is none of .onnx, .tflite, .pt2{found}",
            hint="export it to ONNX, or name the builder of a PyTorch model",
        )
    is_tflite = path.suffix.lower() == ".tflite"
    if found or (is_tflite and not _is_tflite(path)):
        raise ArtifactError(
            f"{path} is not {'a TFLite model' if is_tflite else f'a {path.suffix} model'}{found}",
            hint="check the path",
            code="wrong-format",
        )
    if is_tflite:
        from edgepipe.tflite_ops.flatbuffer import check_signature
        from edgepipe.tflite_ops.inspect import read_model

        read_model(path)  # a damaged file has no signatures to speak of
        check_signature(path, "", option="")


def _is_tflite(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(8)[4:] == b"TFL3"


def check_source(source: ModelSource) -> None:
    """Everything that can be said of a source without loading it. Raises ArtifactError."""
    if bool(source.file) == bool(source.builder):
        raise ArtifactError(
            "[model] should name either a builder or a file",
            hint='builder = "file.py:function" or file = "model.onnx"',
        )
    if source.file and source.weights:
        raise ArtifactError(
            f"[model] names a file ({source.file.name}) and weights",
            hint="weights belong to a builder; a file has its own",
        )
    if source.file and source.outputs and source.file.suffix.lower() != ".pt2":
        raise ArtifactError(
            f"[model] outputs is for PyTorch models; the outputs of {source.file.name} have names already",
            hint="remove outputs",
        )
    unshaped = [option.name for option in source.inputs if option.shape is None]
    if source.builder and (not source.inputs or unshaped):
        raise ArtifactError(
            f"the inputs of builder {source.builder} are not declared"
            + (f": {', '.join(unshaped)} has no shape" if unshaped else ""),
            hint='[[model.inputs]]\nname = "image"\nshape = [1, 3, 96, 96]',
            code="no-inputs",
        )
    names = [option.name for option in source.inputs]
    if source.builder:
        check_names(source.state, names, source.outputs)
    for option in source.inputs:
        where = f"[[model.inputs]] {option.name!r}"
        if names.count(option.name) > 1:
            raise ArtifactError(f"{where} is declared twice", hint="give each input its own name")
        if "N" in option.layout[1:] and option.name not in source.state:
            raise ArtifactError(
                f"{where}: layout {option.layout!r} has the samples (N) on another axis than the first",
                hint="let the model take and give samples first, like batch_first = True of nn.LSTM",
                code="samples-not-first",
            )
        shape = option.shape or ()
        batch = shape[:1]
        if option.name in source.state and 1 in shape[:2]:  # (layers, N, C) of an RNN
            batch = (1,)
        if shape and (batch != (1,) or min(shape) < 1):
            raise ArtifactError(
                f"{where}: shape {list(shape)} should begin with the batch, 1, and have no zeros",
                hint=f"shape = {[1, *shape[1:]]}",
            )
        if (
            option.layout
            and shape
            and (len(option.layout) != len(shape) or len(set(option.layout)) != len(option.layout))
        ):
            raise ArtifactError(
                f"{where}: layout {option.layout!r} should name each of the {len(shape)} axes once",
                hint='like layout = "NCHW"',
            )


def _load_builder(source: ModelSource, context: StageContext) -> Artifact:
    from edgepipe.torch_ops.model import (
        ModelDescription,
        build_model,
        load_state,
        read_weights,
        save_model,
    )

    description = ModelDescription(source.builder, source.args, root=source.root)
    facts: dict[str, Any] = {"builder": source.builder}
    if description.file is not None and description.file.is_file():
        facts["builder_sha256"] = hash_path(description.file)
    model = build_model(description, seed=context.seed)
    if source.weights is not None:
        path = source.resolve(source.weights)
        load_state(model, read_weights(path), source=path)
        facts |= {"weights": path.name, "weights_sha256": hash_path(path)}
    else:
        log.info("%s starts from random weights, seed %d", source.builder, context.seed)
        facts |= {"weights": "random", "seed": context.seed}
    inputs = tuple(TensorSpec(o.name, o.shape or (), o.dtype, o.layout) for o in source.inputs)
    folder = context.work_dir / "model"
    save_model(model, folder, description)
    outputs, count = describe_outputs(folder, inputs, source.outputs)
    return make_artifact(
        "torch", folder, inputs=inputs, outputs=outputs, facts={**facts, **count}
    )  # fmt: skip


def describe_outputs(
    folder: Path, inputs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[tuple[TensorSpec, ...], dict[str, int]]:
    """Output specs of a torch folder and its size (parameters, macs), by loading and running it."""
    from edgepipe.torch_ops.model import load_model
    from edgepipe.torch_ops.run import (
        check_same_at_every_call,
        count_macs,
        example_inputs,
        output_shapes,
    )

    model = load_model(folder)
    examples = example_inputs([(spec.shape, spec.dtype) for spec in inputs])
    check_same_at_every_call(model, examples)
    shapes = output_shapes(model, examples)
    parameters = sum(p.numel() for p in model.parameters())
    outputs = _name_outputs(shapes, names)
    return outputs, {"parameters": parameters, "macs": count_macs(model, examples)}


def _name_outputs(
    shapes: list[tuple[tuple[int, ...], str]], names: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    if not shapes:
        raise ArtifactError("the model returns no tensor", hint="return tensors from forward")
    names = names or tuple(f"output_{i}" for i in range(len(shapes)))
    if len(names) != len(shapes) or len(set(names)) != len(names):
        raise ArtifactError(
            f"[model] outputs names {', '.join(names)}, but the model returns {len(shapes)} tensors of shape "
            f"{', '.join(str(shape) for shape, _ in shapes)}",
            hint="give each one a name of its own, in order",
        )
    return tuple(
        TensorSpec(name, shape, dtype) for name, (shape, dtype) in zip(names, shapes, strict=True)
    )


def _load_pt2(path: Path, source: ModelSource, context: StageContext) -> Artifact:
    from edgepipe.torch_ops.pt2 import call_arguments, input_shapes, load_pt2
    from edgepipe.torch_ops.run import example_inputs, output_shapes

    program = load_pt2(path)
    declared = {option.name: option for option in source.inputs}
    found = input_shapes(program)
    if set(declared) - {name for name, _, _ in found}:
        raise ArtifactError(
            f"{path} has no input {', '.join(sorted(set(declared) - {n for n, _, _ in found}))}",
            hint=f"it has: {', '.join(name for name, _, _ in found)}",
        )
    inputs = []
    for name, shape, dtype in found:
        option = declared.get(name) or TensorOption(name=name)
        sizes: tuple[int | None, ...] = option.shape or (shape and (shape[0] or 1, *shape[1:]))
        fixed = tuple(size for size in sizes if size is not None)
        if len(fixed) != len(shape) or any(s not in (None, f) for s, f in zip(shape, fixed, strict=False)):  # fmt: skip
            raise ArtifactError(
                f"input {name!r} of {path} has shape {['?' if s is None else s for s in shape]}"
                + (f", the recipe says {list(option.shape)}" if option.shape else ""),
                hint=f'[[model.inputs]] name = "{name}", shape = [...], a number for each ?',
            )
        inputs.append(TensorSpec(name, fixed, dtype, option.layout))
    module = program.module()

    def call(*tensors: Any) -> Any:
        args, kwargs = call_arguments(program, tensors)
        return module(*args, **kwargs)

    shapes = output_shapes(call, example_inputs([(s.shape, s.dtype) for s in inputs]))
    copy = context.work_dir / "model.pt2"
    shutil.copyfile(path, copy)
    outputs = _name_outputs(shapes, source.outputs)
    return make_artifact(
        "pt2", copy, inputs=tuple(inputs), outputs=outputs, facts={"file": path.name}
    )


def _load_onnx(path: Path, source: ModelSource, context: StageContext) -> Artifact:
    from edgepipe.tflite_ops.onnx_model import onnx_specs, read_onnx, save_onnx

    copy = context.work_dir / "model.onnx"
    save_onnx(read_onnx(path), copy)  # one file, whatever lay beside the original
    inputs, outputs = onnx_specs(
        copy,
        shapes={o.name: o.shape for o in source.inputs if o.shape},
        layouts={o.name: o.layout for o in source.inputs if o.layout},
        where=path,
    )
    return make_artifact("onnx", copy, inputs=inputs, outputs=outputs, facts={"file": path.name})


def _load_tflite(path: Path, source: ModelSource, context: StageContext) -> Artifact:
    from edgepipe.tflite_ops.inspect import tensor_specs
    from edgepipe.tflite_ops.run import refuse_crashing

    copy = context.work_dir / "model.tflite"
    shutil.copyfile(path, copy)
    inputs, outputs = tensor_specs(copy)
    refuse_crashing(path)
    layouts = {o.name: o.layout for o in source.inputs if o.layout}
    unknown = sorted({o.name for o in source.inputs} - {spec.name for spec in inputs})
    if unknown:
        raise ArtifactError(
            f"{path} has no input {', '.join(unknown)}",
            hint=f"it has: {', '.join(spec.name for spec in inputs)}",
        )
    inputs = tuple(
        dataclasses.replace(spec, layout=layouts[spec.name], source_layout=layouts[spec.name])
        if spec.name in layouts
        else spec
        for spec in inputs
    )
    return make_artifact("tflite", copy, inputs=inputs, outputs=outputs, facts={"file": path.name})


# First bytes of files that people take for a model file of another kind.
_SIGNATURES = (
    (0, b"PK\x03\x04", "a zip archive, like PyTorch's .pth and .pt2", (".pt2",)),
    (4, b"TFL3", "a TFLite model", (".tflite",)),
    (0, b"\x80\x02", "a Python pickle, like old PyTorch files", ()),
    (0, b"\x89HDF", "an HDF5 file, like Keras models", ()),
    (0, b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`", ()),
    (0, b"<!DOCTYPE", "a web page", ()),
    (0, b"<html", "a web page", ()),
)


def _looks_like(path: Path) -> str:
    """``"; it looks like ..."`` where the first bytes are those of another kind of file."""
    with path.open("rb") as stream:
        head = stream.read(32)
    if not head:
        return "; it is empty"
    for offset, magic, what, suffixes in _SIGNATURES:
        if head[offset:].startswith(magic):
            return "" if path.suffix.lower() in suffixes else f"; it looks like {what}"
    if path.suffix.lower() == ".pt2":
        return "; it is no zip archive, which a .pt2 file is"
    return ""
