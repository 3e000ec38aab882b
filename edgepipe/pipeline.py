"""Run a recipe: stages through the cache, evaluation, measurement on devices, gates."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import edgepipe
from edgepipe import bench
from edgepipe.artifact import (
    Artifact,
    TensorSpec,
    artifact_to_dict,
    hash_path,
    load_artifact,
    save_artifact,
)
from edgepipe.baseline import DEFAULT_FOLDER, Baseline, baseline_path, model_inputs
from edgepipe.calibration import quote_noise
from edgepipe.data import at_most, fingerprint, named_files, source_hash, user_path
from edgepipe.device import open_device
from edgepipe.errors import ConnectError, DataError, EdgepipeError, NotReadyError, StageError
from edgepipe.evaluate import DeviceEvaluation, choose_evaluation, evaluate
from edgepipe.gate import Evidence, Gate, SlowdownGate, Status, Verdict, overall
from edgepipe.inventory import Target
from edgepipe.judge import check_budgets, judge, load_baselines
from edgepipe.lab import on_boards
from edgepipe.measurement import (
    Measurement,
    measurement_from_dict,
    measurement_to_dict,
    single,
)
from edgepipe.merge import as_signature, merge_models, proof_data
from edgepipe.op_table import estimate_change, gain_note, load_op_table
from edgepipe.predict import predict
from edgepipe.profile import find_profile
from edgepipe.recipe import Recipe, bucket_key, bucket_text
from edgepipe.rescue import KEPT_HASHES, check_evaluation_data
from edgepipe.resources import profile_paths, target_dir
from edgepipe.stage import (
    StageContext,
    arguments_of,
    earlier_of,
    files_of,
    functions_of,
    profiles_of,
)
from edgepipe.stages.load import LoadModel
from edgepipe.store import Run, Store, unique_name, write_json

log = logging.getLogger(__name__)
T = TypeVar("T")

# Below it no number of sessions decides, and they would all be measured.
MIN_TOLERANCE = 0.001
# Labels that are looked at before anything is made; wrong ones are seldom few
LABELS_CHECKED = 500


@dataclasses.dataclass(frozen=True)
class RunResult:
    run: Run
    shipped: Artifact
    status: Status
    verdicts: tuple[Verdict, ...]


def run(
    recipe: Recipe,
    store: Store,
    *,
    targets: Sequence[Target] = (),
    remeasure: bool = False,
    baselines: Path | None = None,
    together: Mapping[str, Any] | None = None,
) -> RunResult:
    """Run a recipe and judge it. Every finished step is kept, so running again resumes.

    A measurement of the same file on the same device with the same options is used again until it
    is older than ``[measure] max_age``; ``remeasure`` takes a new one. Where a gate compares with
    the baseline, the baseline's model is measured beside the new one; ``baselines`` is the folder
    they lie in (default: the recipe's, else ``ci/baselines`` in the working folder).

    Several boards are measured at once. One that cannot be measured does not stop the others: its
    gates are INCONCLUSIVE and say why, so that the run is. ``together`` is what `run_buckets` notes of
    the runs that were asked for at once.

    Raises EdgepipeError where a step could not be done, the measurement on the only board included;
    a failed gate is a result, not an error.
    """
    folder, found = _refuse_early(recipe, targets, baselines)
    record = _begin(recipe, store, folder, together)
    with _recorded(record):
        _say_baselines(recipe, folder, found)
        steps = _Steps(store, record, total=len(recipe.stages) + 2 + len(targets))
        models = run_stages(recipe, steps)
        return _finish(recipe, steps, models, record, targets, remeasure, found)


def _begin(
    recipe: Recipe, store: Store, baselines: Path, together: Mapping[str, Any] | None
) -> Run:
    """The record of a run that nothing was done of yet."""
    record = store.new_run(recipe.name)
    record.update(
        edgepipe=edgepipe.__version__,
        recipe_path=str(recipe.path),
        recipe_text=recipe.path.read_text(encoding="utf-8"),
        steps=[],
        gates=_gates_to_list(recipe.gates),
        baselines=str(baselines),
        **({"bucket": dict(recipe.bucket)} if recipe.bucket else {}),
        **({"together": dict(together)} if together else {}),
    )
    return record


@contextlib.contextmanager
def _recorded(record: Run) -> Iterator[None]:
    """What is logged meanwhile, and how it ended where it did not end well, stands in the run's record."""
    with _log_to(record.folder / "log.txt"):
        try:
            yield
        except KeyboardInterrupt:
            record.update(status="interrupted")
            raise
        except EdgepipeError as exc:
            record.update(status="failed", error=exc.as_dict())
            raise
        except BaseException:  # sys.exit in a builder included
            log.exception("unexpected error")
            record.update(status="failed", error={"error": "bug", "message": "see log.txt"})
            raise


def _refuse_early(
    recipe: Recipe, targets: Sequence[Target], baselines: Path | None
) -> tuple[Path, dict[str, Baseline | None]]:
    """The folder of baselines and those in it, by profile; a damaged one is refused before any work."""
    check_budgets(recipe.gates, [target.profile for target in targets])
    folder = (baselines or recipe.baselines or DEFAULT_FOLDER).resolve()
    profiles = sorted({target.profile.name for target in targets})
    return folder, load_baselines(recipe.gates, folder, profiles, recipe.name)


def run_buckets(
    recipes: Sequence[Recipe],
    store: Store,
    *,
    targets: Sequence[Sequence[Target]],
    remeasure: bool = False,
    baselines: Path | None = None,
    merge: bool = False,
) -> Iterator[tuple[Run, RunResult | EdgepipeError]]:
    """Run the recipes of several buckets one after the other, in one store: each one's run and result.

    ``targets`` are the boards of each. The error that ended a bucket is its result and does not stop
    the others; what is wrong before any work (a budget, a damaged baseline) is raised for all. The
    runs know of each other, so that `Store.find_together` finds them.

    With ``merge`` the stages of all are run first, and their files become one with a signature for
    each, which is what is evaluated, measured and judged. Where the stages of one failed, nothing is
    merged and each of the others is judged by its own file. Recipes must pass `merge.check_mergeable`.
    """
    for recipe, boards in zip(recipes, targets, strict=True):
        _refuse_early(recipe, boards, baselines)
    name = unique_name(datetime.datetime.now(datetime.UTC), "buckets")
    together = {
        "id": name,
        "recipes": [recipe.name for recipe in recipes],
        "buckets": [bucket_text(recipe.bucket) for recipe in recipes],
    }
    if merge:
        try:
            yield from _run_merged(recipes, store, targets, remeasure, baselines, together)
        except (KeyboardInterrupt, GeneratorExit):
            # those whose stages are done and that wait for the others, too
            for waiting in store.runs_together(together):
                if waiting.read()["status"] not in ("complete", "failed"):
                    waiting.update(status="interrupted")
            raise
        return
    for number, (recipe, boards) in enumerate(zip(recipes, targets, strict=True), 1):
        log.info("bucket %s (%d of %d)", bucket_text(recipe.bucket), number, len(recipes))
        result: RunResult | EdgepipeError
        try:
            result = run(
                recipe, store, targets=boards, remeasure=remeasure, baselines=baselines, together=together,
            )  # fmt: skip
            found = result.run
        except EdgepipeError as exc:
            begun = store.runs_together(together)
            if len(begun) < number:  # there is no record to tell of it
                raise
            _warn_of(recipe, exc)
            result, found = exc, begun[-1]
        yield found, result


def _run_merged(
    recipes: Sequence[Recipe],
    store: Store,
    targets: Sequence[Sequence[Target]],
    remeasure: bool,
    baselines: Path | None,
    together: Mapping[str, Any],
) -> Iterator[tuple[Run, RunResult | EdgepipeError]]:
    """`run_buckets` with ``merge``."""
    begun: list[tuple[Run, _Steps, dict[str, Baseline | None]]] = []
    made: list[list[Artifact] | EdgepipeError] = []
    for number, (recipe, boards) in enumerate(zip(recipes, targets, strict=True), 1):
        log.info("bucket %s (%d of %d): stages", bucket_text(recipe.bucket), number, len(recipes))
        folder, found = _refuse_early(recipe, boards, baselines)
        record = _begin(recipe, store, folder, together)
        steps = _Steps(store, record, total=len(recipe.stages) + 3 + len(boards))
        begun.append((record, steps, found))
        try:
            with _recorded(record):
                _say_baselines(recipe, folder, found)
                made.append(run_stages(recipe, steps))
        except EdgepipeError as exc:
            _warn_of(recipe, exc)
            made.append(exc)
    models = [m for m in made if not isinstance(m, EdgepipeError)]
    # once for all, lest a file of the user's that changes meanwhile makes them two
    key = _merge_key(recipes, models) if len(models) == len(recipes) else ""
    if not key:
        log.warning("nothing is merged, since a bucket failed: the others are judged by files of their own")  # fmt: skip
    elif not recipes[0].measure.weight_cache:
        log.info("a runtime packs the weights of every signature, whichever it runs: [measure] weight_cache = true measures with one packed copy for all")  # fmt: skip
    for number, (recipe, boards) in enumerate(zip(recipes, targets, strict=True)):
        (record, steps, found), own = begun[number], made[number]
        if isinstance(own, EdgepipeError):
            yield record, own
            continue
        log.info("bucket %s (%d of %d)", bucket_text(recipe.bucket), number + 1, len(recipes))
        result: RunResult | EdgepipeError
        try:
            with _recorded(record):
                if key:
                    own = [*own[:-1], _merge(recipes, models, number, steps, key)]
                result = _finish(recipe, steps, own, record, boards, remeasure, found)
        except EdgepipeError as exc:
            _warn_of(recipe, exc)
            result = exc
        yield record, result


def _merge_key(recipes: Sequence[Recipe], models: Sequence[Sequence[Artifact]]) -> str:
    inputs = []
    for recipe, made in zip(recipes, models, strict=True):
        inputs += [bucket_key(recipe.bucket), *_identity(recipe, made[-1])]
        inputs += [repr(made[0].inputs), fingerprint(proof_data(recipe))]
    modules = ("edgepipe.merge", "edgepipe.array_ops", "edgepipe.tflite_ops")
    return step_key("merge", {}, modules, ("numpy", "ai-edge-litert"), inputs)


def _merge(
    recipes: Sequence[Recipe],
    models: Sequence[Sequence[Artifact]],
    number: int,
    steps: _Steps,
    key: str,
) -> Artifact:
    """The shipped model of one bucket as a signature of the file of all, made and proven once."""
    with steps.step("merge", key, _is_whole) as work_dir:
        if work_dir is not None:
            save_artifact(merge_models(recipes, models, work_dir), work_dir)
    merged = load_artifact(steps.store.root / "cache" / key)
    shipped = as_signature(merged, models[number][-1], bucket_key(recipes[number].bucket))
    steps.lineage[-1]["artifact"] = artifact_to_dict(shipped)
    return shipped


def _warn_of(recipe: Recipe, error: EdgepipeError) -> None:
    log.warning("%s: %s", recipe.name, error.message)
    if error.hint:
        log.warning("hint: %s", error.hint)


def _say_baselines(recipe: Recipe, folder: Path, found: Mapping[str, Baseline | None]) -> None:
    for profile, baseline in found.items():
        path = baseline_path(folder, profile, recipe.name)
        if baseline is None:
            log.info("no baseline at %s: gates that compare with it will be INCONCLUSIVE", path)
        else:
            log.info("baseline: %s of %s, promoted %s", baseline.model.sha256[:12], path, baseline.promoted[:10])  # fmt: skip


def _finish(
    recipe: Recipe,
    steps: _Steps,
    models: Sequence[Artifact],
    record: Run,
    targets: Sequence[Target],
    remeasure: bool,
    baselines: Mapping[str, Baseline | None],
) -> RunResult:
    """Evaluate, measure and judge the last of ``models``, which ships: the source and a result of each stage."""
    shipped = models[-1]
    measured = _model_measurements(recipe, steps, models)
    record.save_measurements("model", measured)
    record.update(
        shipped=artifact_to_dict(shipped),
        **({"merged": shipped.facts["merged"]} if shipped.signature else {}),
    )
    by_board = {t.name: baselines.get(t.profile.name) for t in targets} if baselines else {}
    beside = {name: _measurable(baseline, shipped) for name, baseline in by_board.items()}
    outcomes = _measure_all(recipe, steps, models, targets, remeasure, beside, record)
    evidence = [_evidence_of(shipped, target, outcome) for target, outcome in outcomes]
    measured_against = {name: model.sha256 for name, model in beside.items() if model}
    verdicts = judge(
        recipe.gates,
        Evidence(shipped.sha256, "", measured),
        evidence,
        baselines=by_board,
        measured_against=measured_against,
        run_id=record.id,
    )
    status = overall(verdicts) if recipe.gates or targets else Status.PASS
    record.update(
        status="complete",
        verdict=status.value,
        verdicts=[dataclasses.asdict(v) for v in verdicts],
        devices=[_device_entry(target, outcome) for target, outcome in outcomes],
        measured_against=measured_against,
    )
    return RunResult(record, shipped, status, verdicts)


def _device_entry(
    target: Target, outcome: Mapping[str, Measurement] | EdgepipeError
) -> dict[str, Any]:
    """What a run's record says of a board."""
    entry: dict[str, Any] = {"name": target.name, "profile": target.profile.name, "address": target.address}  # fmt: skip
    if isinstance(outcome, EdgepipeError):
        entry["error"] = outcome.as_dict()
    return entry


def _evidence_of(
    shipped: Artifact, target: Target, outcome: Mapping[str, Measurement] | EdgepipeError
) -> Evidence:
    profile = target.profile.name
    if isinstance(outcome, EdgepipeError):
        return Evidence(shipped.sha256, target.name, {}, profile=profile, missing=outcome.message)
    return Evidence(shipped.sha256, target.name, outcome, profile=profile)


class _Steps:
    """Builds steps through the cache, logs progress, records lineage. Measuring threads share it."""

    def __init__(self, store: Store, record: Run | None, total: int) -> None:
        self.store, self.record, self.total, self.number = store, record, total, 0
        self.lineage: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def step(self, name: str, key: str, is_good: Callable[[Path], bool]) -> Iterator[Path | None]:
        """Yields the folder to build the step in, or None where the cache has a good one."""
        started = time.monotonic()
        kept = self.store.entry(key)
        entry = {"step": name, "key": key, "cached": kept is not None and is_good(kept)}
        with self._lock:
            self.number += 1
            self.lineage.append(entry)
            label = f"[{self.number}/{self.total}] {name}"
        if kept and not entry["cached"]:
            log.info("%s: what is kept is too old, or was changed", label)
        if entry["cached"]:
            yield None
            log.info("%s: unchanged, kept", label)
        else:
            log.info("%s ...", label)
            with self.store.building(key, is_good=is_good) as work_dir:
                yield work_dir
            entry["seconds"] = round(time.monotonic() - started, 2)
            log.info("%s: done in %.1f s", label, time.monotonic() - started)
        if self.record:
            with self._lock:
                self.record.update(steps=self.lineage)

    def log_path(self, name: str) -> Path:
        if self.record:
            return self.record.log_path(f"{self.number:02d}-{name}")
        folder = self.store.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"


def convert(recipe: Recipe, store: Store) -> Artifact:
    """Only the stages of a recipe: the artifact of the last one. Nothing is recorded as a run."""
    return run_stages(recipe, _Steps(store, None, len(recipe.stages) + 1))[-1]


def run_stages(recipe: Recipe, steps: _Steps) -> list[Artifact]:
    """The source model and the result of every stage, in order."""
    source = LoadModel(source=recipe.model)
    key = step_key(
        source.name,
        {k: v for k, v in dataclasses.asdict(recipe.model).items() if k != "root"},
        (LoadModel.__module__, *source.ops),
        source.packages,
        [str(recipe.seed), *_source_hashes(recipe)],
    )
    models = [_build(steps, "load", key, (), source, recipe)]
    _check_labels(recipe, models[0], steps.store)
    _check_evaluation_data(recipe, models[0].inputs, steps.store)
    for stage in recipe.stages:
        parent = models[-1]
        key = step_key(
            stage.name,
            dataclasses.asdict(stage),  # type: ignore[call-overload]
            (type(stage).__module__, *stage.ops),
            stage.packages,
            [
                *_identity(recipe, parent),
                str(recipe.seed),
                *(fingerprint(recipe.data[name]) for name in stage.data_names()),
                *_identity(recipe, *(models[number] for number in earlier_of(stage))),
                *(source_hash(name, recipe.path.parent) for name in functions_of(stage)),
                *(hash_path(user_path(file, recipe.path.parent)) for file in files_of(stage)),
                *named_files(arguments_of(stage), recipe.path.parent),
                *(_op_table(name, steps.store) for name in profiles_of(stage)),
            ],
        )
        models.append(_build(steps, stage.name, key, models, stage, recipe))
        _predict_gain(models[-1], recipe, steps)
    return models


def _check_labels(recipe: Recipe, model: Artifact, store: Store) -> None:
    """DataError where labels of ``[evaluate]`` do not fit the model's answers, before long work.

    Told from `LABELS_CHECKED` samples and one answer, whose shape is that of all. A function of the
    user's own is left alone: such answers would be none that it was written for.
    """
    if recipe.evaluate is None or ":" in recipe.evaluate.metric:
        return
    metric, judged_steps = recipe.evaluate.metric, recipe.evaluate.steps
    source = at_most(recipe.data[recipe.evaluate.data], LABELS_CHECKED)
    found_by = ("edgepipe.pipeline", "edgepipe.array_ops")
    identity = _identity(recipe, model)
    key = step_key("check_labels", {}, found_by, ("numpy",), [fingerprint(source), metric, judged_steps, *identity])  # fmt: skip
    if store.entry(key):
        return
    from edgepipe.array_ops.load import load_samples
    from edgepipe.array_ops.task_metrics import check_labels

    with store.building(key) as work_dir:
        if work_dir is None:
            return
        samples = load_samples(source, model.inputs)
        try:
            if samples.labels is not None:  # without any there is parity, and no task metric
                first = predict(model, samples.take([0]).inputs, steps=judged_steps)
                check_labels(metric, first, samples.labels, steps=judged_steps)
        except DataError as exc:
            where = f"[data.{recipe.evaluate.data}] ({samples.origin})"
            raise DataError(f"{where}: {exc.message}", hint=exc.hint, code=exc.code) from exc
        write_json(work_dir / "result.json", {})


def _check_evaluation_data(recipe: Recipe, inputs: Sequence[TensorSpec], store: Store) -> None:
    """DataError where ``[evaluate]`` judges by samples that ranges are taken from, before long work.

    What was found in order is kept, so that data is not read for it again.
    """
    if recipe.evaluate is None:
        return
    from edgepipe.array_ops.load import open_samples

    evaluation = recipe.data[recipe.evaluate.data]
    for stage in recipe.stages:
        name = getattr(stage, "calibration", "")
        if stage.name.startswith("quantize"):
            name = getattr(stage, "data", "")
        if not name:
            continue
        samples = getattr(stage, "samples", 0)
        source = at_most(recipe.data[name], KEPT_HASHES if samples == "auto" else samples)
        found_by = ("edgepipe.pipeline", "edgepipe.rescue", "edgepipe.array_ops")
        key = step_key("check_evaluation_data", {}, found_by, ("numpy",), [fingerprint(source), fingerprint(evaluation), repr(inputs)])  # fmt: skip
        if store.entry(key):
            continue
        with store.building(key) as work_dir:
            if work_dir is not None:
                calibration, judged_by = (open_samples(s, inputs) for s in (source, evaluation))
                where = f"[data.{recipe.evaluate.data}] and the [data.{name}] of {stage.name}"
                check_evaluation_data(calibration, judged_by, (source, evaluation), where=where)
                write_json(work_dir / "result.json", {})


def _predict_gain(made: Artifact, recipe: Recipe, steps: _Steps) -> None:
    """Record what a stage that changed layers does for latency on the recipe's devices, and warn
    where it does nothing. A device with neither an operator table nor known cores is left out."""
    quantized = any(stage.name.startswith("quantize") for stage in recipe.stages)
    predicted = {}
    for name in recipe.devices if "layers_before" in made.facts else ():
        try:
            table = load_op_table(steps.store.root, find_profile(name, profile_paths()), threads=recipe.measure.threads)  # fmt: skip
        except NotReadyError:
            continue
        change = estimate_change(made.facts, table, dtype="int8" if quantized else "float32")
        if change is None:
            continue
        before, after = change
        note = gain_note(before, after)
        if note:
            log.warning("%s", note)
        predicted[name] = {"before_s": before.latency_s, "after_s": after.latency_s, "source": table.source, "note": note}  # fmt: skip
    if predicted:
        steps.lineage[-1]["predicted"] = predicted


def _op_table(profile: str, store: Store) -> str:
    return repr(load_op_table(store.root, find_profile(profile, profile_paths())))


def _identity(recipe: Recipe, *models: Artifact) -> list[str]:
    """Everything about models that decides what is made of them or measured on them."""
    parts = [f"{m.kind} {m.sha256} {m.inputs!r} {m.outputs!r}{m.signature}" for m in models]
    for model in models:
        if learned := model.facts.get("learned_ranges"):  # which quantize_int8 takes
            parts.append(json.dumps(learned, sort_keys=True))
        if (
            model.kind == "torch"
        ):  # the code of a builder that is installed lies outside the artifact
            builder = json.loads((model.path / "model.json").read_text(encoding="utf-8"))["builder"]
            is_file = builder.partition(":")[0].endswith(".py")
            parts.append(source_hash(builder, model.path if is_file else recipe.model.root))
    return parts


def _is_whole(entry: Path) -> bool:
    """Whether a kept artifact is still the file that its record describes."""
    try:
        artifact = load_artifact(entry)
        return hash_path(artifact.path) == artifact.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(
    steps: _Steps, name: str, key: str, models: Sequence[Artifact], stage: Any, recipe: Recipe
) -> Artifact:
    with steps.step(name, key, _is_whole) as work_dir:
        if work_dir is not None:
            context = StageContext(
                work_dir=work_dir,
                data=recipe.data,
                seed=recipe.seed,
                log_path=steps.log_path(name),
                checkpoint=steps.store.root / "checkpoints" / key,
                root=recipe.path.parent,
                store=steps.store.root,
                models=tuple(models),
            )
            try:
                made = stage.run(models[-1], context) if models else stage.run(context)
            except StageError as exc:
                exc.log_path = exc.log_path or str(context.log_path)
                raise
            save_artifact(made, work_dir)
    (steps.store.root / "checkpoints" / key).unlink(missing_ok=True)
    artifact = load_artifact(steps.store.root / "cache" / key)
    steps.lineage[-1]["artifact"] = artifact_to_dict(artifact)
    return artifact


def _source_hashes(recipe: Recipe) -> list[str]:
    """Content of every file the source model comes from. A missing file is for `LoadModel` to report."""
    model = recipe.model
    files = [model.resolve(p) for p in (model.file, model.weights) if p]
    files += [f for path in files for f in _external_data(path)]
    hashes = [hash_path(path) if path.is_file() else "" for path in files]
    if model.builder:
        hashes.append(source_hash(model.builder, model.root))
        hashes += named_files(model.args, model.root)
    return hashes


# A StringStringEntryProto {key: "location"}, followed by the value's tag and one-byte length: how
# an .onnx names the files its weights lie in (onnx.proto, TensorProto.external_data).
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")


def _external_data(path: Path) -> list[Path]:
    """The files beside an .onnx that hold its weights, found without importing onnx."""
    if path.suffix.lower() != ".onnx" or not path.is_file():
        return []
    content = path.read_bytes()
    names = {content[m.end() : m.end() + m[1][0]] for m in _LOCATION.finditer(content)}
    return [path.parent / name.decode(errors="replace") for name in sorted(names)]


def step_key(
    name: str, options: Mapping[str, Any], modules: Sequence[str],
    packages: Sequence[str], inputs: Sequence[str],
) -> str:  # fmt: skip
    """sha256 over everything that decides a step's result: options, our code, versions, inputs."""
    parts = [
        name,
        repr(sorted((k, repr(v)) for k, v in options.items())),
        *(_module_hash(m) for m in sorted(set(modules))),
        *(f"{p}={_version(p)}" for p in sorted(set(packages))),
        *inputs,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _module_hash(module: str) -> str:
    """Source hash of a module or of a whole package of ours, without importing it."""
    path = Path(edgepipe.__file__).parent.joinpath(*module.split(".")[1:])
    return hash_path(path if path.is_dir() else path.with_suffix(".py"))


EVALUATION_MODULES = (
    "edgepipe.evaluate", "edgepipe.predict", "edgepipe.state", "edgepipe.array_ops", "edgepipe.tflite_ops", "edgepipe.torch_ops",
)  # fmt: skip
MEASURING_MODULES = (
    "edgepipe.bench", "edgepipe.sessions", "edgepipe.job", "edgepipe.crunner", "edgepipe.device.snapshot",
    "edgepipe.stats", "edgepipe.runtime", *EVALUATION_MODULES,
)  # fmt: skip
EVALUATION_PACKAGES = ("numpy", "ai-edge-litert", "onnxruntime", "torch")


def _model_measurements(
    recipe: Recipe, steps: _Steps, models: Sequence[Artifact]
) -> dict[str, Measurement]:
    """Facts about the file that ships: size, float islands, task metric, parity."""
    shipped, reference = models[-1], models[recipe.reference_stage]
    float_model = float_model_of(recipe, models)
    options = recipe.evaluate
    inputs = _identity(recipe, models[0], shipped, float_model, reference)
    inputs += _evaluation_identity(recipe)
    key = step_key("evaluate", {}, EVALUATION_MODULES, EVALUATION_PACKAGES, inputs)

    def make(work_dir: Path) -> list[Measurement]:
        context = {"model_sha256": shipped.sha256}
        if shipped.signature:
            context["model_signature"] = shipped.signature
        if options:
            data = fingerprint(recipe.data[options.data])
            context["data_sha256"] = hashlib.sha256(data.encode()).hexdigest()
        measured = [single("model_bytes", "B", shipped.size_bytes, context)]
        if shipped.kind == "tflite":
            measured.append(_float_islands(shipped, context))
        if options:
            found = evaluate(
                shipped=shipped,
                float_model=float_model,
                reference=reference,
                inputs=models[0].inputs,
                source=recipe.data[options.data],
                metric=options.metric,
                root=recipe.path.parent,
                steps=options.steps,
            )
            measured += (dataclasses.replace(m, context={**m.context, **context}) for m in found)
        return measured

    return _measuring_step(steps, "evaluate", key, make)


def _evaluation_identity(recipe: Recipe) -> list[str]:
    """Everything about ``[evaluate]`` that decides what it finds."""
    options = recipe.evaluate
    if options is None:
        return []
    parts = [options.data, options.metric, options.steps, fingerprint(recipe.data[options.data])]
    if ":" in options.metric:
        parts.append(source_hash(options.metric, recipe.path.parent))
    return parts


def float_model_of(recipe: Recipe, models: Sequence[Artifact]) -> Artifact:
    """What the shipped file was quantised from; the reference model where nothing was quantised."""
    for stage, before in zip(reversed(recipe.stages), reversed(models[:-1]), strict=True):
        if stage.name.startswith("quantize"):
            return before
    return models[recipe.reference_stage]


def _float_islands(shipped: Artifact, context: Mapping[str, Any]) -> Measurement:
    from edgepipe.tflite_ops.inspect import describe

    found = describe(shipped.path, signature=shipped.signature)
    listed = [dataclasses.asdict(island) for island in found.float_islands]
    return single("float_islands", "", found.float_operators, {**context, "islands": listed})


def _measuring_step(
    steps: _Steps,
    name: str,
    key: str,
    make: Callable[[Path], Sequence[Measurement]],
    is_fresh: Callable[[float], bool] = lambda taken: True,
) -> dict[str, Measurement]:
    """Measurements by metric: those in the cache while they are fresh, else what ``make`` gives.

    ``taken`` is in seconds since the epoch. Another run may replace the entry at any time, so it is
    read once, when it is found good.
    """
    found: dict[str, Measurement] = {}

    def is_good(entry: Path) -> bool:
        try:
            data = json.loads((entry / "result.json").read_text(encoding="utf-8"))
            kept = [measurement_from_dict(m) for m in data["measurements"]]
            fresh = is_fresh(float(data["taken"]))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        found.update({m.metric: m for m in kept} if fresh else {})
        return fresh

    with steps.step(name, key, is_good) as work_dir:
        if work_dir is not None:
            measured = make(work_dir)
            data = {
                "taken": time.time(),
                "measurements": [measurement_to_dict(m) for m in measured],
            }
            write_json(work_dir / "result.json", data, indent=None)
            found.update({m.metric: m for m in measured})
    return found


def _measurable(baseline: Baseline | None, shipped: Artifact) -> Artifact | None:
    """The baseline's model, if the two can be fed the same."""
    if baseline is None or model_inputs(baseline.model) != model_inputs(shipped):
        return None
    return baseline.model


def _measure_all(
    recipe: Recipe,
    steps: _Steps,
    models: Sequence[Artifact],
    targets: Sequence[Target],
    remeasure: bool,
    baselines: Mapping[str, Artifact | None],
    record: Run,
) -> list[tuple[Target, Mapping[str, Measurement] | EdgepipeError]]:
    """Measure the shipped file on every board; what came of each, kept in ``record`` as it comes.

    ``baselines`` are the models to measure beside it, by the board's name. The error of the only
    board is raised, that of one of several is its outcome.
    """
    evaluation = _once(lambda: _device_evaluation(recipe, models))

    def work(target: Target, stop: threading.Event) -> Mapping[str, Measurement]:
        beside = baselines.get(target.name)
        return _measure(recipe, steps, models, target, remeasure, beside, evaluation, stop)

    def finished(target: Target, outcome: Mapping[str, Measurement] | EdgepipeError) -> None:
        if isinstance(outcome, EdgepipeError):
            log.warning("%s was not measured: %s", target.name, outcome.message)
            if outcome.hint:
                log.warning("hint: %s", outcome.hint)
            if isinstance(outcome, ConnectError) and target.power:
                log.warning("its power is switched by: %s", target.power)
        else:
            record.save_measurements(target.name, outcome)

    if len(targets) == 1:  # in this thread, where Ctrl-C interrupts whatever it is doing
        (target,) = targets
        found = work(target, threading.Event())
        finished(target, found)
        return [(target, found)]
    return list(zip(targets, on_boards(targets, work, finished=finished), strict=True))


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """The result of ``make``, which is called at the first use, by one of the threads."""
    lock = threading.Lock()
    made: list[T] = []

    def get() -> T:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


def _measure(
    recipe: Recipe,
    steps: _Steps,
    models: Sequence[Artifact],
    target: Target,
    remeasure: bool,
    baseline: Artifact | None,
    evaluation: Callable[[], DeviceEvaluation | None],
    stop: threading.Event,
) -> dict[str, Measurement]:
    """Measure the shipped file on one device, or use a measurement that is still good.

    With ``baseline`` both are measured, side by side.
    """
    shipped, options = models[-1], _measure_options(recipe)
    key = step_key(
        "measure",
        {k: v for k, v in dataclasses.asdict(options).items() if k != "max_age"},
        MEASURING_MODULES,
        EVALUATION_PACKAGES,
        [
            *_identity(recipe, models[0], shipped, models[recipe.reference_stage]),
            target.address,
            _this_machine() if target.address == "local" else "",
            repr(target.profile),
            hash_path(target_dir(target.profile.target)),
            *_evaluation_identity(recipe),
            str(recipe.seed),
            f"{baseline.sha256}{baseline.signature}" if baseline else "",
        ],
    )

    def is_fresh(taken: float) -> bool:
        age_s = time.time() - taken
        if remeasure or not 0 <= age_s <= options.max_age:
            return False
        log.info("using the measurement taken %.0f min ago (--remeasure takes a new one)", age_s / 60)  # fmt: skip
        return True

    def make(work_dir: Path) -> Sequence[Measurement]:
        device = open_device(target.address)
        try:
            result = bench.measure(
                shipped,
                device,
                target.profile,
                options,
                evaluation=evaluation(),
                baseline=baseline,
                stop=stop,
            )
        finally:
            device.close()
        write_json(work_dir / "raw.json", result.raw)
        return result.measurements

    name = f"measure on {target.name} ({target.address})"
    found = _measuring_step(steps, name, key, make, is_fresh)
    return {m.metric: m for m in quote_noise(steps.store.root, tuple(found.values()))}


def _this_machine() -> str:
    """What tells this machine since its start from any other: a store may be carried around, by CI say."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")


def _measure_options(recipe: Recipe) -> bench.MeasureOptions:
    """``[measure]``, with sessions enough for the strictest slowdown that a gate tolerates."""
    limits = [gate.max for gate in recipe.gates if isinstance(gate, SlowdownGate)]
    if not limits:
        return recipe.measure
    strictest = min(max(min(limits), MIN_TOLERANCE), 1.0)  # what [measure] tolerance may be
    return dataclasses.replace(recipe.measure, tolerance=strictest)


def _device_evaluation(recipe: Recipe, models: Sequence[Artifact]) -> DeviceEvaluation | None:
    """The evaluation samples that the board shall answer."""
    options = recipe.evaluate
    if options is None:
        return None
    return choose_evaluation(
        shipped=models[-1],
        reference=models[recipe.reference_stage],
        inputs=models[0].inputs,
        source=recipe.data[options.data],
        metric=options.metric,
        root=recipe.path.parent,
        count=recipe.measure.evaluate_samples,
        seed=recipe.seed,
        steps=options.steps,
    )


def _gates_to_list(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    return [{"gate": g.name, **dataclasses.asdict(g)} for g in gates]  # type: ignore[call-overload]


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Everything edgepipe logs also goes to a run's log.txt."""
    handler = logging.FileHandler(path, encoding="utf-8")
    # threads are called after the boards they measure on
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(threadName)s]: %(message)s"))  # fmt: skip
    logger = logging.getLogger("edgepipe")
    logger.addHandler(handler)
    if logger.level in (logging.NOTSET,) or logger.level > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
