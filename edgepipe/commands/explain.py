"""``edgepipe explain``: which layers of an int8 file lost what, and why; which operators cost what on a board."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.adhoc import add_state_argument, add_steps_argument
from edgepipe.cli import Output
from edgepipe.commands.on_device import add_device_arguments

if TYPE_CHECKING:
    from edgepipe.artifact import Artifact, TensorSpec
    from edgepipe.layer_explain import OpTime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say layer by layer what an int8 file lost against the float file it was made from: noise, range,\n"
        "clipping, dead and outlier channels, what each layer alone spoils, and which rung of the ladder\n"
        "(edgepipe quantize --max-drop) mends it. With --device also what each operator costs there.\n"
        "Without the int8 file, plain int8 of the float file is explained.\n\n"
        "  edgepipe explain net.tflite net_int8.tflite --data samples.npz\n"
        "  edgepipe explain net.tflite net_int8.tflite --data samples.npz --evaluate labelled.npz --html why.html\n"
        "  edgepipe explain net.tflite net_int8.tflite --data samples.npz --device ssh://pi@raspberrypi --profile rpi4b_4gb"
    )
    parser.add_argument("float_model", type=Path, metavar="FLOAT.tflite", help="the very file that was quantised")  # fmt: skip
    parser.add_argument(
        "int8_model",
        type=Path,
        nargs="?",
        metavar="INT8.tflite",
        help="what was made of it (default: plain int8 with ranges of --data)",
    )
    parser.add_argument("--data", required=True, metavar="SAMPLES", help="real inputs: x.npz, x.npy, file.py:function, or a TOML file with the keys of a [data.NAME] table")  # fmt: skip
    parser.add_argument("--evaluate", metavar="SAMPLES", help="inputs with labels: also the task metric, and what it would be with a layer in float")  # fmt: skip
    parser.add_argument("--metric", default="top1", help="task metric of --evaluate: top1, ... or file.py:function (default: top1)")  # fmt: skip
    parser.add_argument("--layout", default="", metavar="NCHW", help="order of the samples' axes where it is not the file's")  # fmt: skip
    add_state_argument(parser)
    add_steps_argument(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots; it loads nothing from anywhere")  # fmt: skip
    parser.add_argument("--no-try", action="store_true", help="name rungs by rule, without trying them (a file for each rung and layer at fault)")  # fmt: skip
    add_device_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    import tempfile

    from edgepipe import adhoc, layer_explain
    from edgepipe.layer_html import html_report
    from edgepipe.report import text_table
    from edgepipe.state import with_state
    from edgepipe.store import check_output, replacing

    check_output(args.html, option="--html")
    adhoc.check_steps(args)
    state = adhoc.parse_state(args.state)
    float_model = with_state(_model(args.float_model, args.layout), state)
    int8_model = _model(args.int8_model, args.layout) if args.int8_model else None
    if int8_model is not None:
        int8_model = _like(float_model, int8_model)
    data = adhoc.data_source(args.data)
    evaluation = adhoc.data_source(args.evaluate) if args.evaluate else None
    with tempfile.TemporaryDirectory(prefix="edgepipe-") as folder:
        if int8_model is None:
            int8_model = layer_explain.plain_int8(float_model, data, Path(folder) / "plain-int8.tflite")  # fmt: skip
        found = layer_explain.explain_layers(
            float_model, int8_model, data, evaluation=evaluation, metric=args.metric, root=Path.cwd(),
            steps=args.steps, try_rungs=not args.no_try,
        )  # fmt: skip
        ops, where = _operators(args, int8_model)
    tables = [layer_explain.rungs_table(found)] if found.rungs else []
    tables += [layer_explain.ops_table(ops, device=where)] if ops else []
    title = f"{int8_model.path.name} against {float_model.path.name}"
    if args.html:
        with replacing(args.html) as temporary:
            temporary.write_text(html_report(found, title=title, tables=tables), encoding="utf-8")
    out.text("\n".join([title, *(f"  {line}" for line in layer_explain.summary(found)), ""]))
    for table in (layer_explain.layers_table(found), *tables):
        out.text(text_table(table) + "\n")
    if where and not ops:
        out.text(f"{where} did not time single operators")
    out.json({
        **layer_explain.as_dict(found), "float": str(args.float_model), "int8": str(args.int8_model or "plain"),
        "device": where, "operators": [dataclasses.asdict(op) for op in ops],
    })  # fmt: skip
    return 0


def _model(path: Path, layout: str) -> Artifact:
    """A .tflite file with its tensor specs; samples may come in another ``layout``."""
    from edgepipe.artifact import make_artifact
    from edgepipe.commands.on_device import tflite_model
    from edgepipe.layer_explain import with_layout
    from edgepipe.tflite_ops.inspect import tensor_specs
    from edgepipe.tflite_ops.run import refuse_crashing

    tflite_model(path)  # a readable error for another format
    inputs, outputs = tensor_specs(path)
    refuse_crashing(path)
    return make_artifact("tflite", path, inputs=with_layout(inputs, layout), outputs=outputs)


def _like(float_model: Artifact, int8_model: Artifact) -> Artifact:
    """The int8 file's tensors under the names and layouts of the float file's, whose order it keeps."""
    from edgepipe.errors import ArtifactError

    def renamed(ours: tuple[TensorSpec, ...], theirs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:  # fmt: skip
        if [s.shape for s in ours] != [s.shape for s in theirs]:
            raise ArtifactError(
                f"{float_model.path} and {int8_model.path} differ in their inputs or outputs:"
                f" {[s.shape for s in ours]} and {[s.shape for s in theirs]}",
                hint="give the very float file that was quantised",
                code="not-comparable",
            )
        return tuple(
            dataclasses.replace(new, name=old.name, layout=old.layout, source_layout=old.source_layout, fed_by=old.fed_by)
            for old, new in zip(ours, theirs, strict=True)
        )  # fmt: skip

    return dataclasses.replace(
        int8_model,
        inputs=renamed(float_model.inputs, int8_model.inputs),
        outputs=renamed(float_model.outputs, int8_model.outputs),
    )


def _operators(args: argparse.Namespace, model: Artifact) -> tuple[list[OpTime], str]:
    """The operators on the device that was named, and which one that is; nothing without one."""
    from edgepipe.bench import measure
    from edgepipe.commands.on_device import find_target, measure_options, opened
    from edgepipe.layer_explain import operator_times

    if not any(getattr(args, name, None) for name in ("device", "profile", "lab", "match")):
        return [], ""
    target = find_target(args)
    options = measure_options(args, command="explain", sessions=1, memory_sessions=0, energy=False, instructions=False)  # fmt: skip
    with opened(target) as device:
        result = measure(model, device, target.profile, options)
    measured = {m.metric: m for m in result.measurements}
    return operator_times(measured, model.path), f"{target.profile.name} ({target.address})"
