"""What ``bench``, ``compare`` and ``calibrate`` share: options, the device, the model, its samples."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgepipe.artifact import Artifact
    from edgepipe.bench import MeasureOptions
    from edgepipe.device.base import Device
    from edgepipe.inventory import Target


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Which device, and how to measure there."""
    parser.add_argument("--device", metavar="ADDRESS", help="where to measure: local, ssh://user@host[:port], or null://quiet for a simulated board (default: local, or the profile's from edgepipe.local.toml)")  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help="device profile that describes it (default: localhost)")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the runtime (default: the profile's)")  # fmt: skip
    parser.add_argument("--session", metavar="TIME", help='how long one session measures (default: "2 s")')  # fmt: skip
    parser.add_argument("--budget", metavar="TIME", help='give up after this long (default: "10 min")')  # fmt: skip


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


def find_target(args: argparse.Namespace) -> Target:
    """The device of ``--device`` and ``--profile``; this machine where neither is given."""
    from edgepipe.inventory import resolve_targets

    # a profile without an address is looked up
    address = "local" if args.device is None and args.profile is None else args.device
    (target,) = resolve_targets([], address=address, profile=args.profile)
    return target


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Device]:
    from edgepipe.device import open_device

    device = open_device(target.address)
    try:
        yield device
    finally:
        device.close()


def tflite_model(path: Path) -> Artifact:
    """The file as an artifact without specs: the runner reads shapes from the file itself."""
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
    return make_artifact("tflite", path, inputs=(), outputs=())


def read_samples(args: argparse.Namespace, model: Path) -> dict[str, Any] | None:
    """The samples of ``--samples``; ``model`` will then run in this process as well."""
    if args.samples is None:
        return None
    from edgepipe.tflite_ops.raw import read_samples
    from edgepipe.tflite_ops.run import refuse_crashing

    samples = read_samples(args.samples)
    refuse_crashing(model)
    return samples
