"""One file of all buckets of a recipe: a signature for each, the weights once, proven on real samples."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from edgepipe.artifact import Artifact
from edgepipe.data import DataSource, at_most
from edgepipe.errors import RequestError
from edgepipe.recipe import SOURCE_KINDS, Recipe, bucket_key
from edgepipe.units import format_bytes

log = logging.getLogger(__name__)

# Samples of each bucket that the merged file is proven on.
SAMPLES = 16
# What the evaluation of a file reads of the stage that made it.
FACTS_KEPT = ("calibration", "calibration_samples")


def check_mergeable(recipes: Sequence[Recipe]) -> None:
    """RequestError, before any work, for recipes whose results `merge_models` cannot take."""
    if len(recipes) < 2:
        raise RequestError(
            "--merge makes one file of several buckets, but there is only one",
            hint="leave --bucket out, or declare [buckets] in the recipe",
        )
    for recipe in recipes:
        kinds = [stage.produces for stage in recipe.stages if stage.produces != "same"]
        file = recipe.model.file
        kind = kinds[-1] if kinds else SOURCE_KINDS.get(file.suffix.lower(), "") if file else "torch"  # fmt: skip
        if kind != "tflite":
            raise RequestError(
                f"--merge joins TFLite files, but this recipe ships {kind or 'none'}",
                hint="add the stages export_onnx and to_tflite",
            )
        if recipe.model.state:
            raise RequestError(
                "--merge: its proof runs samples one by one, and this model has state ([model.state])",
                hint="leave --merge out: each bucket has a file of its own",
            )
        if not _data_name(recipe):
            raise RequestError(
                "--merge proves its file on real samples, but this recipe has none",
                hint="add [data.NAME] and [evaluate] to the recipe",
            )


def _data_name(recipe: Recipe) -> str:
    """The data set that a bucket's file is run on: what it is evaluated by, else what ranges are of."""
    if recipe.evaluate is not None:
        return recipe.evaluate.data
    names = [name for stage in recipe.stages for name in stage.data_names()]
    return names[-1] if names else next(iter(recipe.data), "")


def proof_data(recipe: Recipe) -> DataSource:
    """The samples that the signature of a bucket is proven on."""
    return at_most(recipe.data[_data_name(recipe)], SAMPLES)


def merge_models(
    recipes: Sequence[Recipe], models: Sequence[Sequence[Artifact]], folder: Path
) -> Artifact:
    """Write the files of several buckets as one into ``folder``; the first is its main graph.

    ``models`` are the source and the result of every stage of each. A signature is called like its bucket,
    ``length16``. Every one is run by LiteRT beside its own file on up to `SAMPLES` samples, and gives the
    same bits. Its facts hold ``merged``: ``sha256``, ``bytes``, ``bytes_apart`` and ``samples`` by signature.
    Raises ArtifactError where they cannot be merged or differ, DataError for samples.
    """
    from edgepipe.array_ops.calibration import file_batches
    from edgepipe.array_ops.load import load_samples
    from edgepipe.tflite_ops.merge import check_merged, merge_signatures

    files, batches = {}, {}
    for recipe, made in zip(recipes, models, strict=True):
        key = bucket_key(recipe.bucket)
        files[key] = made[-1].path.read_bytes()
        samples = load_samples(proof_data(recipe), made[0].inputs)
        batches[key] = list(file_batches(samples, made[-1].inputs))
    content = merge_signatures(files)
    compared = check_merged(content, files, batches)
    path = folder / "model.tflite"
    path.write_bytes(content)
    apart = sum(map(len, files.values()))
    log.info(
        "merged %d files of together %s into one of %s, each signature proven on its own samples",
        len(files), format_bytes(apart), format_bytes(len(content)),
    )  # fmt: skip
    sha256 = hashlib.sha256(content).hexdigest()
    facts = {"sha256": sha256, "bytes": len(content), "bytes_apart": apart, "samples": compared}
    first = models[0][-1]
    return dataclasses.replace(
        first,
        path=path,
        sha256=sha256,
        parents=tuple(made[-1].sha256 for made in models),
        facts={"merged": facts},
        signature=next(iter(files)),
    )


def as_signature(merged: Artifact, model: Artifact, key: str) -> Artifact:
    """The model of one bucket, which is now a signature of what `merge_models` made."""
    kept = {name: model.facts[name] for name in FACTS_KEPT if name in model.facts}
    return dataclasses.replace(
        model,
        path=merged.path,
        sha256=merged.sha256,
        parents=(model.sha256, *model.parents),
        facts={**kept, **merged.facts},
        signature=key,
    )
