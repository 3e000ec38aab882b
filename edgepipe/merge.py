"""One file of all buckets of a recipe: a signature for each, the weights once, proven on real samples."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepipe.artifact import artifact_from_dict
from edgepipe.data import at_most
from edgepipe.errors import RequestError
from edgepipe.pipeline import RunResult
from edgepipe.recipe import SOURCE_KINDS, Recipe
from edgepipe.store import replacing
from edgepipe.units import format_bytes

log = logging.getLogger(__name__)

# Samples of each bucket that the merged file is proven on.
SAMPLES = 16


def check_mergeable(recipes: Sequence[Recipe]) -> None:
    """RequestError, before any work, for recipes whose results `merge_buckets` cannot take."""
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


def merge_buckets(
    recipes: Sequence[Recipe], results: Sequence[RunResult], output: Path
) -> dict[str, Any]:
    """Write the shipped files of several buckets as one, and note it in each one's run.

    A signature is called like its bucket, ``length16``; the first is the main graph. Every one is run
    by LiteRT beside its own file on up to `SAMPLES` samples, and gives the same bits. Returns what is
    noted: ``file``, ``sha256``, ``bytes``, ``bytes_apart`` and ``samples`` by signature. Raises
    ArtifactError where it cannot be merged or differs, DataError for samples.
    """
    from edgepipe.array_ops.calibration import file_batches
    from edgepipe.array_ops.load import load_samples
    from edgepipe.tflite_ops.merge import check_merged, merge_signatures

    files, batches = {}, {}
    for recipe, result in zip(recipes, results, strict=True):
        key = "-".join(f"{name}{size}" for name, size in recipe.bucket.items())
        files[key] = result.shipped.path.read_bytes()
        source = artifact_from_dict(result.run.read()["steps"][0]["artifact"])
        samples = load_samples(at_most(recipe.data[_data_name(recipe)], SAMPLES), source.inputs)
        batches[key] = list(file_batches(samples, result.shipped.inputs))
    merged = merge_signatures(files)
    compared = check_merged(merged, files, batches)
    with replacing(output) as temporary:
        temporary.write_bytes(merged)
    apart = sum(map(len, files.values()))
    log.info(
        "merged %d files of together %s into one of %s, each signature proven on its own samples",
        len(files), format_bytes(apart), format_bytes(len(merged)),
    )  # fmt: skip
    facts = {
        "file": str(output),
        "sha256": hashlib.sha256(merged).hexdigest(),
        "bytes": len(merged),
        "bytes_apart": apart,
        "samples": compared,
    }
    for result in results:
        result.run.update(merged=facts)
    return facts
