"""What ``bench``, ``compare`` and ``calibrate`` share: options, the device, the model, its samples."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from edgepipe.artifact import Artifact
    from edgepipe.bench import MeasureOptions
    from edgepipe.cli import Output
    from edgepipe.device.base import Device
    from edgepipe.errors import EdgepipeError
    from edgepipe.inventory import Target

T = TypeVar("T")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Which device, and how to measure there."""
    add_board_arguments(parser, default="local, or the profile's boards in the lab")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the runtime (default: the profile's)")  # fmt: skip
    parser.add_argument("--set-governor", metavar="NAME", help="let the board's clock have this governor while it measures, like performance; the old one is put back (needs root or sudo without a password there)")  # fmt: skip
    parser.add_argument("--session", metavar="TIME", help='how long one session measures (default: "2 s")')  # fmt: skip
    parser.add_argument("--budget", metavar="TIME", help='give up after this long (default: "10 min")')  # fmt: skip


def add_board_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Which boards; see `inventory.resolve_targets`."""
    group = parser.add_argument_group("boards")
    group.add_argument("--device", metavar="ADDRESS", action="append", default=[], help=f"where to measure: local, ssh://user@host[:port], adb://SERIAL, virt://virt-pi-4, labgrid://PLACE, null://quiet for a board that is only simulated, or a board of the lab by name; may be repeated (default: {default})")  # fmt: skip
    group.add_argument("--profile", metavar="NAME", help="device profile that describes them (default: the lab's, else the one that a recipe names; local, virt:// and null:// need none)")  # fmt: skip
    group.add_argument("--lab", type=Path, metavar="FILE", help="your inventory of boards (default: edgepipe.local.toml)")  # fmt: skip
    group.add_argument("--match", metavar="EXPR", help="the boards of the lab that fit, like 'soc=bcm2712 tag=upper' (keys: board, tag, and those of `edgepipe devices match`)")  # fmt: skip


def asks_for_many(args: argparse.Namespace) -> bool:
    """Whether the result is a list of boards, however many they turn out to be."""
    return len(args.device) > 1 or args.lab is not None or args.match is not None


def add_samples_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=Path, metavar="FILE", help=".npz (arrays by input name) or .npy: also compare the device's outputs of the model with this machine's")  # fmt: skip


def measure_options(args: argparse.Namespace, *, command: str, **more: Any) -> MeasureOptions:
    """The arguments that are called like options of `MeasureOptions`, and ``more``."""
    from edgepipe.bench import MeasureOptions
    from edgepipe.errors import RequestError
    from edgepipe.schema import build

    named = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(MeasureOptions)}
    given = {name: value for name, value in (named | more).items() if value is not None}
    return build(MeasureOptions, given, where=f"edgepipe {command}", error=RequestError)


def find_targets(args: argparse.Namespace) -> list[Target]:
    """The boards of `add_board_arguments`; this machine where nothing is said."""
    from edgepipe.inventory import resolve_targets

    # a profile without an address is looked up
    is_said = args.device or args.profile is not None or asks_for_many(args)
    devices = args.device if is_said else ["local"]
    return resolve_targets([], devices=devices, profile=args.profile, lab=args.lab, match=args.match)  # fmt: skip


def find_target(args: argparse.Namespace) -> Target:
    """The same for what is done on one board at a time."""
    from edgepipe.errors import RequestError

    targets = find_targets(args)
    if len(targets) != 1:
        raise RequestError(
            f"one board at a time, not {', '.join(t.name for t in targets)}",
            hint="name one with --device",
        )
    return targets[0]


def on_each(
    targets: Sequence[Target],
    work: Callable[[Device, Target, threading.Event], T],
    show: Callable[[Target, T], str],
    out: Output,
) -> list[tuple[Target, T | EdgepipeError]]:
    """``work`` on every board, side by side; each result is shown when it is there.

    The error of the only board is raised, that of one of several shown and returned.
    """
    import threading

    from edgepipe.cli import error_text
    from edgepipe.errors import ConnectError, EdgepipeError
    from edgepipe.lab import on_boards

    def on_board(target: Target, stop: threading.Event) -> T:
        with opened(target) as device:
            return work(device, target, stop)

    def finished(target: Target, outcome: T | EdgepipeError) -> None:
        if not isinstance(outcome, EdgepipeError):
            out.text(show(target, outcome))
            return
        power = f"\nits power is switched by: {target.power}" if target.power and isinstance(outcome, ConnectError) else ""  # fmt: skip
        out.text(f"{target.name} ({target.address}) was not measured\n{error_text(outcome)}{power}")

    if len(targets) == 1:  # in this thread, where Ctrl-C interrupts whatever it is doing
        result = on_board(targets[0], threading.Event())
        out.text(show(targets[0], result))
        return [(targets[0], result)]
    outcomes = on_boards(targets, on_board, finished=finished)
    return list(zip(targets, outcomes, strict=True))


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Device]:
    from edgepipe.device import open_device

    device = open_device(target.address)
    try:
        yield device
    finally:
        device.close()


def add_weight_cache_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weight-cache", action="store_true", help="keep XNNPACK's packed weights in a file: less memory, faster loads")  # fmt: skip


def add_signature_argument(parser: argparse.ArgumentParser, *, of: str) -> None:
    parser.add_argument("--signature", metavar="KEY", default="", help=f"which one of {of}, a file of several signatures (edgepipe run --merge writes such; edgepipe inspect lists them)")  # fmt: skip


def tflite_model(path: Path, *, signature: str | None = None) -> Artifact:
    """The file, or that signature of it, as an artifact without specs: the runner reads shapes itself.

    RequestError where the file has no such signature, or has several and none is named; None is for
    commands that have no way to name one.
    """
    from edgepipe.artifact import make_artifact
    from edgepipe.errors import ArtifactError

    try:
        with path.open("rb") as stream:
            head = stream.read(8)
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror}", hint="check the path", code="no-such-file") from exc  # fmt: skip
    if head[4:8] != b"TFL3":  # the file identifier of tflite schema.fbs
        raise ArtifactError(
            f"{path} is not a TFLite file", hint="convert it first: edgepipe convert MODEL"
        )
    from edgepipe.tflite_ops.flatbuffer import check_signature

    check_signature(path, signature or "", option="" if signature is None else "--signature")
    made = make_artifact("tflite", path, inputs=(), outputs=())
    return dataclasses.replace(made, signature=signature or "")


def read_samples(args: argparse.Namespace, model: Path) -> dict[str, Any] | None:
    """The samples of ``--samples``; ``model`` will then run in this process as well."""
    if args.samples is None:
        return None
    from edgepipe.tflite_ops.raw import read_samples
    from edgepipe.tflite_ops.run import refuse_crashing

    samples = read_samples(args.samples)
    refuse_crashing(model)
    return samples
