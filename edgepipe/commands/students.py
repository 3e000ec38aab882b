"""``edgepipe students``: small networks that fit a device, to distil a model into."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli import Output
from edgepipe.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgepipe.errors import RequestError
    from edgepipe.op_table import OpTable
    from edgepipe.torch_ops.result import Layer


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A student of some width. ``file_bytes`` and ``latency_s`` are those of its int8 TFLite file."""

    student: str
    width: float
    macs: int
    parameters: int
    file_bytes: int
    latency_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Propose networks of the zoo that fit a device: of each family the widest within the limits.\n"
        "The latency is computed from what operators cost there: as measured by `edgepipe calibrate\n"
        "--ops`, else estimated from the profile's cores, which may be off by a factor of two.\n\n"
        '  edgepipe students --profile rpi4b_4gb --max-latency "5 ms" --input 3x96x96\n'
        '  edgepipe students --profile rpi_zero2w --max-bytes "100 kB" --input 1x49x10 --classes 12\n'
        "  edgepipe students --profile rpi5_8gb --input 6x128 --student ds_cnn --all\n\n"
        "Then comes the stage for a recipe that distils into the first of them."
    )
    parser.add_argument(
        "--profile", required=True, metavar="NAME", help="device profile (`edgepipe devices list`)"
    )
    parser.add_argument("--input", required=True, metavar="CxHxW", help="shape of one sample: channels x height x width, or channels x length of a series")  # fmt: skip
    parser.add_argument("--max-latency", default="", metavar="TIME", help='like "5 ms"')
    parser.add_argument("--max-bytes", default="", metavar="SIZE", help='of the int8 file, like "100 kB"')  # fmt: skip
    parser.add_argument(
        "--classes", type=int, default=10, metavar="N", help="class scores (default: 10)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of the runtime (default: the profile's)",
    )
    parser.add_argument("--student", default="", metavar="NAME", help="only this one")
    parser.add_argument("--all", action="store_true", help="every width that fits, not only the widest")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.errors import RequestError
    from edgepipe.op_table import load_op_table
    from edgepipe.profile import find_profile
    from edgepipe.report import Table, text_table
    from edgepipe.resources import profile_paths
    from edgepipe.schema import near_miss
    from edgepipe.students import STUDENTS
    from edgepipe.units import parse_quantity

    if args.student and args.student not in STUDENTS:
        raise RequestError(f"no student {args.student!r}{near_miss(args.student, list(STUDENTS))}", hint=f"there are: {', '.join(STUDENTS)}")  # fmt: skip
    if args.classes < 2 or args.threads < 0:
        raise RequestError("--classes is at least 2, --threads at least 1", hint="edgepipe students --help")  # fmt: skip
    shape = input_shape(args.input)
    max_latency_s = parse_quantity(args.max_latency, "time") if args.max_latency else math.inf
    max_bytes = parse_quantity(args.max_bytes, "size") if args.max_bytes else math.inf
    profile = find_profile(args.profile, profile_paths())
    table = load_op_table(Path(args.store), profile, threads=args.threads)
    names = [args.student] if args.student else list(STUDENTS)
    fitting, smallest = [], []
    for name in names:
        found = candidates(name, shape, args.classes, table, max_latency_s, max_bytes)
        smallest.append(found[0])
        inside = [c for c in found if c.latency_s <= max_latency_s and c.file_bytes <= max_bytes]
        fitting += inside if args.all else inside[-1:]
    if not fitting:
        raise _nothing_fits(smallest)
    fitting.sort(key=lambda c: (-c.macs, c.student))
    rows = tuple(
        (
            c.student, f"{c.width:g}", f"{c.macs / 1e6:.3g} M", f"{c.parameters:,}",
            format_bytes(c.file_bytes), format_seconds(c.latency_s), STUDENTS[c.student].title,
        )
        for c in fitting
    )  # fmt: skip
    title = f"int8 students for {'x'.join(map(str, shape[1:]))} on {profile.name}, threads: {table.threads}"  # fmt: skip
    header = ("student", "width", "MACs", "parameters", "file, about", f"latency, {table.source}", "")  # fmt: skip
    error = (
        f"measured operators: predictions are typically within {100 * table.error:.0f} %"
        if table.source == "measured"
        else "estimated from the profile alone, perhaps off by a factor of two; measure it: "
        f"edgepipe calibrate --ops --device ADDRESS --profile {profile.name}"
    )
    recipe = recipe_lines(fitting[0])
    out.text(
        f"{text_table(Table(title, header, rows))}\n{error}\n"
        "Which family learns your task best only training tells. For the first of them:\n\n"
        + recipe
    )
    out.json(
        {
            "profile": profile.name,
            "source": table.source,
            "error": table.error,
            "students": [dataclasses.asdict(c) for c in fitting],
            "recipe": recipe,
        }
    )
    return 0


def input_shape(text: str) -> tuple[int, ...]:
    """``"3x96x96"`` -> (1, 3, 96, 96), ``"6x128"`` -> (1, 6, 128)."""
    from edgepipe.errors import RequestError

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise RequestError(
            f"--input {text!r} is no shape of a sample",
            hint="3x96x96 for colour pictures, 1x49x10 for spectrograms, 6x128 for series",
        )
    return (1, *(int(n) for n in text.split("x")))


def candidates(
    name: str,
    shape: Sequence[int],
    classes: int,
    table: OpTable,
    max_latency_s: float = math.inf,
    max_bytes: float = math.inf,
) -> list[Candidate]:
    """The widths of student ``name``, ascending, up to the first that is beyond a limit.

    ``shape`` is that of the input, (1, C, H, W) or (1, C, L).
    """
    from edgepipe.op_table import Op, estimate, op_of_layer
    from edgepipe.students import FOLDER, STUDENTS, student_args
    from edgepipe.torch_ops.model import ModelDescription
    from edgepipe.torch_ops.result import describe_builder

    found: list[Candidate] = []
    for width in STUDENTS[name].widths:
        args = student_args(name, shape, classes, {"width": width})
        description = ModelDescription(STUDENTS[name].builder, args, root=FOLDER)
        layers, macs = describe_builder(description, shape)
        ops = [op_of_layer(layer, "int8") for layer in layers]
        between = macs - sum(layer.macs for layer in layers)
        if between:  # attention: no layer's own
            ops.append(Op("attention", "dense", "int8", between, 0))
        found.append(
            Candidate(
                student=name,
                width=width,
                macs=macs,
                parameters=sum(layer.parameters for layer in layers),
                file_bytes=file_bytes(layers),
                latency_s=estimate(ops, table).latency_s,
            )
        )
        if found[-1].latency_s > max_latency_s or found[-1].file_bytes > max_bytes:
            break
    return found


def _nothing_fits(smallest: Sequence[Candidate]) -> RequestError:
    from edgepipe.errors import RequestError

    fast = min(smallest, key=lambda c: c.latency_s)
    small = min(smallest, key=lambda c: c.file_bytes)
    return RequestError(
        f"no student fits: the fastest ({fast.student}, width {fast.width:g}) takes some "
        f"{format_seconds(fast.latency_s)}, the smallest ({small.student}, width {small.width:g}) has some "
        f"{format_bytes(small.file_bytes)}",
        hint="allow more time or bytes, make the input smaller, or write a network of your own",
        code="no-student-fits",
    )


def file_bytes(layers: Sequence[Layer]) -> int:
    """About how large the int8 TFLite file is: within 10 % for every family of the zoo.

    Weights, 20 bytes for each output channel (bias, scales) and 1340 for each layer (operators and
    tensors with their names), less what the last layers do without: least squares over 13 converted
    students of 12 to 300 kB (tests/e2e/test_students.py holds it to that).
    """
    computing = [layer for layer in layers if layer.macs]
    weights = sum(math.prod(layer.shape) for layer in computing)
    channels = sum(layer.shape[0] for layer in computing)
    return weights + 20 * channels + max(0, 1340 * len(computing) - 5250)


def recipe_lines(candidate: Candidate) -> str:
    """The stage that trains a candidate, as TOML."""
    options: dict[str, Any] = {
        "stage": '"distill"',
        "student": f'"{candidate.student}"',
        "args": f"{{ width = {candidate.width:g} }}",
        "epochs": "30",
        "lr": "0.005",
        "validation": '"validation"',
    }
    return "\n".join(["[[stages]]", *(f"{key} = {value}" for key, value in options.items())])
