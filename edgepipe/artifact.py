"""`Artifact`: a model on disk. It never holds a live model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepipe.errors import ArtifactError

# The newest record that this reads. One without a signature is written as schema 1, which older ones read.
SCHEMA = 2
KINDS = ("torch", "pt2", "onnx", "tflite")

# The layout a tensor of this rank has in PyTorch unless the recipe says otherwise.
TORCH_LAYOUTS = {0: "", 1: "N", 2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output. ``layout`` names each axis, like ``NCHW`` or ``NHWC``: never guessed.

    ``name`` is the source model's name for the tensor, in every artifact made from it, and
    ``source_layout`` the layout it has there; ``shape`` and ``layout`` are those of this file.
    Specs are in the file's own order. Quantized tensors: real = scale * (stored - zero_point).
    An input with ``fed_by`` is state: the output of that name at the step before, zeros at first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = ""
    source_layout: str = ""
    scale: float = 0.0
    zero_point: int = 0
    fed_by: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.layout:
            object.__setattr__(self, "layout", TORCH_LAYOUTS.get(len(self.shape), ""))
        if not self.source_layout:
            object.__setattr__(self, "source_layout", self.layout)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A model on disk: a file, or for kind ``torch`` a folder (model.json, weights.safetensors).

    ``parents`` are the sha256 of the models it was made from, nearest first. ``facts`` is the
    evidence its stage gathered (parity, calibration, toolchain, ...): plain JSON data. ``signature``
    is which one of a .tflite file of several this model is; empty: the file's main graph.
    """

    kind: str
    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parents: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    signature: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {KINDS}")

    @property
    def size_bytes(self) -> int:
        if self.path.is_dir():
            return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())
        return self.path.stat().st_size


def make_artifact(
    kind: str,
    path: Path,
    *,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    parent: Artifact | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Artifact:
    """An artifact for a file just written: hashes it and extends the parent's lineage."""
    parents = (parent.sha256, *parent.parents) if parent else ()
    return Artifact(kind, path, hash_path(path), inputs, outputs, parents, dict(facts or {}))


def hash_path(path: Path) -> str:
    """sha256 of a file; of a folder, over names and hashes of its files, without hidden ones and bytecode."""
    digest = hashlib.sha256()
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            # a store (.edgepipe) in a folder of data would give that folder a new hash at every run
            folders[:] = sorted(f for f in folders if f != "__pycache__" and not f.startswith("."))
            for name in sorted(f for f in files if not f.startswith(".")):
                item = Path(folder) / name
                if item.is_file():
                    relative = item.relative_to(path).as_posix()
                    digest.update(
                        f"{relative}\0{hash_path(item)}\n".encode(errors="surrogateescape")
                    )
        return digest.hexdigest()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def artifact_to_dict(artifact: Artifact, *, relative_to: Path | None = None) -> dict[str, Any]:
    """Plain data; with ``relative_to`` the path is stored relative, so a folder can be moved."""
    data = dataclasses.asdict(artifact)
    path = artifact.path.relative_to(relative_to) if relative_to else artifact.path
    if not artifact.signature:
        del data["signature"]
    return {"schema": SCHEMA if artifact.signature else 1, **data, "path": path.as_posix()}


def artifact_from_dict(data: Mapping[str, Any], *, root: Path | None = None) -> Artifact:
    """Inverse of `artifact_to_dict`. Refuses data of a newer schema."""
    if data.get("schema", 0) > SCHEMA:
        raise ArtifactError(
            f"artifact record has schema {data['schema']}, this edgepipe reads up to {SCHEMA}",
            hint="upgrade edgepipe",
        )
    path = Path(data["path"])
    return Artifact(
        kind=data["kind"],
        path=root / path if root else path,
        sha256=data["sha256"],
        inputs=tuple(TensorSpec(**spec) for spec in data["inputs"]),
        outputs=tuple(TensorSpec(**spec) for spec in data["outputs"]),
        parents=tuple(data["parents"]),
        facts=data["facts"],
        signature=data.get("signature", ""),
    )


def save_artifact(artifact: Artifact, folder: Path) -> None:
    """Write ``artifact.json`` beside the model file, which must lie in ``folder``."""
    text = json.dumps(artifact_to_dict(artifact, relative_to=folder), indent=1)
    (folder / "artifact.json").write_text(text + "\n", encoding="utf-8")


def load_artifact(folder: Path) -> Artifact:
    """Read what `save_artifact` wrote."""
    data = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    return artifact_from_dict(data, root=folder)
