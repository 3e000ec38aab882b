"""`Recipe`: model + data + ordered stages + devices + gates, from one TOML file.

`load_recipe` finds every mistake it can without importing a framework, and reports all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepipe.bench import MeasureOptions
from edgepipe.data import DataSource, path_exists, split_reference, user_path
from edgepipe.errors import ArtifactError, RecipeError, RequestError
from edgepipe.gate import GATES, Gate
from edgepipe.metrics import TASK_METRICS
from edgepipe.resources import profile_paths
from edgepipe.schema import build, near_miss, read_toml, record
from edgepipe.stage import Stage, earlier_of, files_of, functions_of, profiles_of
from edgepipe.stages import STAGES, stage_class
from edgepipe.stages.load import ModelSource, check_source
from edgepipe.state import EXPLICIT, STREAMING, Steps

SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # part of a folder's name
_VARIABLE = re.compile(r"\$\{(\w+)\}")
TABLES = ("schema", "name", "seed", "buckets", "devices", "baselines", "model", "data", "stages", "evaluate", "measure", "gates")  # fmt: skip
NEEDS_EVALUATION = (
    "accuracy_drop", "task_metric", "parity", "device_agreement", "device_task_metric", "device_accuracy_drop",
)  # fmt: skip
PROVING = ("export_onnx", "to_tflite")  # stages whose data decides nothing about the model
SOURCE_KINDS = {".onnx": "onnx", ".tflite": "tflite", ".pt2": "pt2"}


@record
class EvaluateOptions:
    """``data`` and ``metric`` of the task; ``metric`` is a built-in name or ``"file.py:function"``.

    A function of your own gets the outputs by name, (N, ...) each, and the labels, and returns a
    share from 0 to 1, or one truth value a sample (which gives the accuracy drop an interval).

    ``reference`` says which model the accuracy drop is counted from: 0 = the model the recipe
    starts from, n = the result of stage n. Default: 0 where the model comes with weights, else 1
    (the first stage trains it).

    ``steps``: which answers of a model with state are judged, those of the ``last`` step of each sequence
    or of ``each`` (labels (N, T); a function of your own then gets (N, T, ...)).
    """

    data: str
    metric: str = "top1"
    reference: int | None = None
    steps: Steps = "last"


@dataclasses.dataclass(frozen=True)
class Recipe:
    path: Path
    name: str
    seed: int
    model: ModelSource
    data: Mapping[str, DataSource]
    stages: tuple[Stage, ...]
    evaluate: EvaluateOptions | None
    devices: tuple[str, ...]
    measure: MeasureOptions
    gates: tuple[Gate, ...]
    baselines: Path | None = None
    bucket: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def reference_stage(self) -> int:
        """Number of the stage whose result is the reference (0 = the source model)."""
        if self.evaluate is not None and self.evaluate.reference is not None:
            return self.evaluate.reference
        return 0 if self.model.file or self.model.weights else min(1, len(self.stages))


def load_recipe(path: Path, bucket: Mapping[str, int] | None = None) -> Recipe:
    """Read and check a recipe. Raises one RecipeError listing every mistake with its key.

    ``bucket`` chooses one size for each free dimension that the recipe lists under ``[buckets]``:
    ``${length}`` stands for it anywhere, and the recipe's name ends in ``-length32``, so that each
    bucket is a model with its own file, ranges, measurements and baseline; `load_buckets` loads all.
    """
    path = path.resolve()
    raw = read_toml(path, error=RecipeError)
    problems: list[str] = []
    sizes = _choose_bucket(_declared_buckets(raw, path), bucket or {}, path)

    def attempt(function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RequestError as exc:
            problems.append(exc.message)
            return None

    raw = _expand(raw, "", problems, sizes)
    if isinstance(raw.get("schema"), int) and raw["schema"] > SCHEMA:
        raise RecipeError(f"{path}: schema {raw['schema']} is newer than {SCHEMA}", hint="upgrade edgepipe")  # fmt: skip
    if raw.get("schema") != SCHEMA:
        problems.append(f'"schema = {SCHEMA}" is missing at the top')
    for key in raw:
        if key not in TABLES:
            problems.append(f"{key}: unknown key{near_miss(key, list(TABLES))} (legal: {', '.join(TABLES)})")  # fmt: skip
    name = raw.get("name", path.stem)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"name: {name!r} is not a plain name (at most 100 of A-Z a-z 0-9 . _ -)")
    elif sizes:
        name = f"{name}-{bucket_key(sizes)}"
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        problems.append(f"seed: {seed!r} is not a whole number from 0 to 2**63 - 1")

    def table(key: str, kind: type) -> Any:
        value = raw.get(key, kind())
        if not isinstance(value, kind):
            problems.append(f"{key}: should be {'a table' if kind is dict else 'an array'}")
            return kind()
        return value

    root = path.parent
    model = attempt(build, ModelSource, table("model", dict), where="[model]", error=RecipeError)
    data: dict[str, DataSource] = {}
    sources = table("data", dict)
    for key, value in sources.items():
        source = attempt(build, DataSource, value, where=f"[data.{key}]", error=RecipeError)
        if source is not None:
            data[key] = resolve_source(source, root)
            check_data(data[key], f"[data.{key}]", problems)
    stages = _entries(table("stages", list), "stage", STAGES, stage_class, problems)
    gates = _entries(table("gates", list), "gate", GATES, GATES.__getitem__, problems)
    evaluate = None
    if "evaluate" in raw:
        evaluate = attempt(build, EvaluateOptions, table("evaluate", dict), where="[evaluate]", error=RecipeError)  # fmt: skip
    stages = [_judged_like(stage, evaluate, number, problems) for number, stage in enumerate(stages, 1)]  # fmt: skip
    measure = attempt(build, MeasureOptions, table("measure", dict), where="[measure]", error=RecipeError)  # fmt: skip
    devices = table("devices", list)
    known_profiles = profile_paths()
    for number, device in enumerate(devices):
        if device in devices[:number]:
            problems.append(f"devices: {device!r} is named twice")
        elif not isinstance(device, str) or device not in known_profiles:
            problems.append(f"devices: unknown profile {device!r}{near_miss(str(device), list(known_profiles))} (`edgepipe devices list` shows them)")  # fmt: skip

    baselines = raw.get("baselines")
    if baselines is not None and (not isinstance(baselines, str) or not baselines):
        problems.append(f"baselines: {baselines!r} is not the name of a folder")
        baselines = None

    if model is not None:
        model = dataclasses.replace(model, root=root)
        kind = _check_model(model, problems)
        end = _check_order(kind, stages, problems) if kind else ""
        if end and end != "tflite" and devices:
            problems.append(f"devices: measuring needs a TFLite model, but the last stage gives {end}; add to_tflite")  # fmt: skip
    known_data = set(sources)
    for number, stage in enumerate(stages, 1):
        for used in stage.data_names() if stage else ():
            if used not in known_data:
                problems.append(f"[[stages]] {number} ({stage.name}): reads [data.{used}], which is not there{near_miss(used, sorted(known_data))}")  # fmt: skip
        for function in functions_of(stage) if stage else ():
            _check_file(function, root, f"[[stages]] {number} ({stage.name})", problems)
        for file in files_of(stage) if stage else ():
            if not path_exists(user_path(file, root)):
                problems.append(f"[[stages]] {number} ({stage.name}): {user_path(file, root)} does not exist")  # fmt: skip
        for earlier in earlier_of(stage) if stage else ():
            if not 0 <= earlier < number:
                problems.append(f"[[stages]] {number} ({stage.name}): reads the result of stage {earlier}, which comes no earlier (legal: 0 to {number - 1})")  # fmt: skip
        for profile in profiles_of(stage) if stage else ():
            if profile not in known_profiles:
                problems.append(f"[[stages]] {number} ({stage.name}): unknown profile {profile!r}{near_miss(profile, list(known_profiles))} (`edgepipe devices list` shows them)")  # fmt: skip
    streaming = 0 if model is not None and model.state else _streaming_stage(stages)
    _check_streaming(stages, streaming, problems)
    _check_state(model, evaluate, data, stages, problems)
    _check_evaluation(evaluate, known_data, stages, streaming, gates, root, problems)
    if any(gate and gate.scope == "device" for gate in gates) and not devices:
        problems.append("devices: some gates need a device, but none is named")
    if problems:
        raise RecipeError(
            f"{path}: " + "\n  ".join(["", *problems] if len(problems) > 1 else problems),
            hint="mend the recipe; `edgepipe check` looks at it without running anything",
        )
    return Recipe(
        path=path, name=name, seed=seed, model=model, data=data, stages=tuple(stages),
        evaluate=evaluate, devices=tuple(devices), measure=measure, gates=tuple(gates),
        baselines=user_path(Path(baselines), root) if baselines else None, bucket=sizes,
    )  # fmt: skip


def load_buckets(path: Path, only: Mapping[str, Sequence[int]] | None = None) -> list[Recipe]:
    """The recipe of every bucket, in the order of ``[buckets]``; of a recipe without any, that one.

    ``only`` leaves some sizes of a free dimension, as `parse_bucket` reads them. All are read before
    one is run: RecipeError with what is wrong with each.
    """
    declared = _declared_buckets(read_toml(path.resolve(), error=RecipeError), path.resolve())
    chosen = only or {}
    firsts = {name: sizes[0] for name, sizes in declared.items()}
    for name, asked in chosen.items():
        for size in asked:
            _choose_bucket(declared, {**firsts, name: size}, path.resolve())
    ways = itertools.product(*(chosen.get(name, sizes) for name, sizes in declared.items()))
    recipes: list[Recipe] = []
    wrong: dict[str, tuple[str, RecipeError]] = {}
    for way in ways:
        bucket = dict(zip(declared, way, strict=True))
        try:
            recipes.append(load_recipe(path, bucket))
        except RecipeError as exc:
            wrong.setdefault(exc.message, (bucket_text(bucket), exc))
    if len(wrong) > 1:
        lines = "\n".join(f"bucket {name}: {message}" for message, (name, _) in wrong.items())
        raise RecipeError(lines, hint=next(iter(wrong.values()))[1].hint)
    for _, error in wrong.values():
        raise error
    return recipes


def bucket_text(bucket: Mapping[str, int]) -> str:
    """``{"length": 16, "width": 4}`` -> ``"length=16 width=4"``."""
    return " ".join(f"{name}={size}" for name, size in bucket.items())


def bucket_key(bucket: Mapping[str, int]) -> str:
    """What recipes, files and signatures of a bucket are called: ``"length16-width4"``."""
    return "-".join(f"{name}{size}" for name, size in bucket.items())


def resolve_source(source: DataSource, root: Path) -> DataSource:
    """Paths relative to ``root``, the folder of the file that names them."""
    path = user_path(source.path, root) if source.path is not None else None
    return dataclasses.replace(source, path=path, root=root)


def parse_bucket(texts: Sequence[str]) -> dict[str, list[int]]:
    """``["length=16", "length=32"]`` -> ``{"length": [16, 32]}``. Raises RecipeError for anything else."""
    found: dict[str, list[int]] = {}
    for text in texts:
        name, equals, size = text.partition("=")
        if not (name and equals and size.isdecimal()):
            raise RecipeError(f"--bucket {text!r} is not NAME=SIZE", hint="--bucket length=32")
        sizes = found.setdefault(name, [])
        if int(size) not in sizes:
            sizes.append(int(size))
    return found


def _declared_buckets(raw: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """``[buckets]``: the sizes of each free dimension, none twice."""
    declared = raw.get("buckets", {})
    legal = isinstance(declared, dict) and all(
        re.fullmatch(r"[A-Za-z]\w*", name)
        and isinstance(sizes, list)
        and sizes
        and all(type(size) is int and size > 0 for size in sizes)
        and len(set(sizes)) == len(sizes)
        for name, sizes in declared.items()
    )
    if not legal:
        raise RecipeError(
            f"{path}: [buckets] should give sizes for each free dimension, none twice, got {declared!r}",
            hint="length = [16, 32, 64]",
        )
    return dict(declared)


def _choose_bucket(
    declared: Mapping[str, Sequence[int]], chosen: Mapping[str, int], path: Path
) -> dict[str, int]:
    """Bucket name -> the size that was chosen, in the recipe's order."""
    choices = "; ".join(f"{n} = {', '.join(map(str, s))}" for n, s in declared.items()) or "none"
    if unknown := sorted(chosen.keys() - declared.keys()):
        raise RecipeError(
            f"{path} has no bucket {unknown[0]!r}{near_miss(unknown[0], list(declared))} ([buckets]: {choices})",
            hint="leave --bucket out, or declare it: [buckets] length = [16, 32, 64]",
        )
    for name, sizes in declared.items():
        if chosen.get(name) not in sizes:
            got = f"{name} = {chosen[name]} is none of them" if name in chosen else f"none was chosen of {name}"  # fmt: skip
            raise RecipeError(
                f"{path} is one recipe for each bucket ([buckets]: {choices}), and {got}",
                hint=f"choose one of each, like --bucket {name}={sizes[0]}",
                code="no-bucket",
            )
    return {name: chosen[name] for name in declared}


def _expand(value: Any, key: str, problems: list[str], sizes: Mapping[str, int]) -> Any:
    """Replace ``${NAME}`` in every string by that bucket's size or else that environment variable.

    A string that is nothing but a bucket becomes a number.
    """
    if isinstance(value, dict):
        return {k: _expand(v, f"{key}.{k}" if key else k, problems, sizes) for k, v in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [_expand(v, f"{key}[{i}]", problems, sizes) for i, v in enumerate(value, 1)]
    if not isinstance(value, str):
        return value
    whole = _VARIABLE.fullmatch(value)
    if whole and whole[1] in sizes:
        return sizes[whole[1]]

    def look_up(match: re.Match[str]) -> str:
        if match[1] in sizes:
            return str(sizes[match[1]])
        found = os.environ.get(match[1])
        if not found:
            problems.append(f"{key}: the environment variable {match[1]} is not set")
        return found or ""

    return _VARIABLE.sub(look_up, value)


def _entries(
    tables: list[Any], key: str, registry: Mapping[str, Any], find: Any, problems: list[str]
) -> list[Any]:
    """``[[stages]]`` or ``[[gates]]`` -> records; None in the place of a broken one."""
    entries: list[Any] = []
    for number, options in enumerate(tables, 1):
        where = f"[[{key}s]] {number}"
        entries.append(None)
        if not isinstance(options, dict) or not isinstance(options.get(key), str):
            problems.append(f'{where}: has no {key} = "..." (legal: {", ".join(registry)})')
            continue
        name = options[key]
        if name not in registry:
            problems.append(f"{where}: unknown {key} {name!r}{near_miss(name, list(registry))} (legal: {', '.join(registry)})")  # fmt: skip
            continue
        rest = {k: v for k, v in options.items() if k != key}
        try:
            entries[-1] = build(find(name), rest, where=f"{where} ({name})", error=RecipeError)
        except RequestError as exc:
            problems.append(exc.message)
    return entries


def _judged_like(
    stage: Any, evaluate: EvaluateOptions | None, number: int, problems: list[str]
) -> Any:
    """A stage that judges by a metric uses the recipe's, unless it names one, but not its data."""
    if evaluate is None or not getattr(stage, "evaluate", ""):
        return stage
    if stage.evaluate == evaluate.data:
        problems.append(
            f"[[stages]] {number} ({stage.name}): evaluate = {stage.evaluate!r} is what the recipe is"
            " judged by in the end: choosing by it would flatter the result; name a set of its own"
        )
    if hasattr(stage, "steps"):
        stage = dataclasses.replace(stage, steps=evaluate.steps)
    return stage if stage.metric else dataclasses.replace(stage, metric=evaluate.metric)


def _check_file(reference: str, root: Path, key: str, problems: list[str]) -> None:
    """A "file.py:name" reference whose file does not exist is a problem."""
    try:
        module, _ = split_reference(reference, root)
    except RequestError as exc:
        problems.append(f"{key}: {exc.message} ({exc.hint})")
        return
    if isinstance(module, Path) and not path_exists(module):
        problems.append(f"{key}: {module} does not exist")


def check_data(source: DataSource, where: str, problems: list[str]) -> None:
    """Adds to ``problems`` what is wrong with a `DataSource`, as far as that goes without reading it."""
    if source.kind == "python":
        if not source.function:
            problems.append(f'{where}: kind = "python" needs function = "file.py:name"')
        else:
            _check_file(source.function, source.root or Path(), f"{where} function", problems)
    elif source.kind != "random":
        if source.path is None:
            problems.append(f'{where}: kind = "{source.kind}" needs a path')
        elif not path_exists(source.path):
            problems.append(f"{where} path: {source.path} does not exist")
        elif source.kind in ("npz", "npy") and source.path.is_dir():
            problems.append(f"{where} path: {source.path} is a folder, not a .{source.kind} file")
    for fold in (source.fold, source.not_fold):
        if fold is not None and not 0 <= fold[0] < fold[1]:
            problems.append(f"{where}: fold [k, n] needs 0 <= k < n, got {list(fold)}")
    if source.kind == "images" and source.image is None:
        problems.append(f"{where}: images need a declared preprocessing: [data.NAME.image] size = [height, width]")  # fmt: skip
    if source.kind == "wavs" and source.audio is None:
        problems.append(f"{where}: WAV files need a declared preprocessing: [data.NAME.audio]")


def _check_model(model: ModelSource, problems: list[str]) -> str:
    """Checks ``[model]`` as far as that goes without loading it; returns the artifact kind or ""."""
    try:
        check_source(model)
    except ArtifactError as exc:
        problems.append(f"{exc.message} ({exc.hint})")
    if bool(model.file) == bool(model.builder):
        return ""
    for key, path in (("file", model.file), ("weights", model.weights)):
        if path and (not path_exists(model.resolve(path)) or not model.resolve(path).is_file()):
            problems.append(f"[model] {key}: {model.resolve(path)} does not exist")
    if model.file:
        suffix = model.file.suffix.lower()
        if suffix not in SOURCE_KINDS:
            legal = ", ".join(SOURCE_KINDS)
            problems.append(
                f"[model] file: {model.file} is none of {legal}; weights of a PyTorch model "
                '(.pth, .safetensors) go under weights, beside builder = "file.py:function"'
            )
        return SOURCE_KINDS.get(suffix, "")
    _check_file(model.builder, model.root or Path(), "[model] builder", problems)
    return "torch"


def _check_order(kind: str, stages: list[Any], problems: list[str]) -> str:
    """Each stage must accept what the one before produces; returns the last kind, "" if broken."""
    before = "the model"
    for number, stage in enumerate(stages, 1):
        if stage is None:
            return ""
        if kind not in stage.accepts:
            makers = [n for n in STAGES if stage_class(n).produces in stage.accepts]
            advice = f"; put {' or '.join(makers)} before it" if makers else ""
            problems.append(
                f"[[stages]] {number} ({stage.name}): needs {' or '.join(stage.accepts)}, "
                f"but {before} gives {kind}{advice}"
            )
            return ""
        if stage.produces != "same":
            kind = stage.produces
        before = f"stage {number} ({stage.name})"
    return kind


def _streaming_stage(stages: list[Any]) -> int:
    """Number of the first stage that makes a streaming model; 0 where there is none."""
    return next((n for n, stage in enumerate(stages, 1) if getattr(stage, "streaming", False)), 0)


def _check_streaming(stages: list[Any], streaming: int, problems: list[str]) -> None:
    """Stages that run samples through a streaming model would see states that it never has in use."""
    for number, stage in enumerate(stages, 1):
        if stage and streaming and number > streaming:
            what = STREAMING.format(cannot="no ranges can be taken of it")
            problems.append(f"[[stages]] {number} ({stage.name}): the model of [[stages]] {streaming} {what} ({EXPLICIT})")  # fmt: skip


def _check_state(
    model: ModelSource | None, evaluate: EvaluateOptions | None, data: Mapping[str, DataSource],
    stages: list[Any], problems: list[str],
) -> None:  # fmt: skip
    """What goes with a model with state, whose samples are sequences."""
    state = model.state if model is not None else {}
    if evaluate is not None and evaluate.steps == "each" and not state:
        problems.append('[evaluate] steps = "each": the model has no [model.state], so there is one step')  # fmt: skip
    for name, source in data.items():
        for known in sorted({*source.inputs} & {*state}):
            problems.append(f"[data.{name}] inputs: {known!r} is state ([model.state] {known} = {state[known]!r}): it starts at zero and takes no data")  # fmt: skip
    for number, stage in enumerate(stages, 1):
        if not state and getattr(stage, "back_steps", None):
            problems.append(f"[[stages]] {number} ({stage.name}): back_steps: the model has no [model.state], so there is one step")  # fmt: skip
        if state and getattr(stage, "streaming", False):
            problems.append(f"[[stages]] {number} ({stage.name}): streaming is for state inside the file, and [model.state] wires this model's: leave streaming out")  # fmt: skip


def _check_evaluation(
    evaluate: EvaluateOptions | None, known_data: set[str], stages: list[Any], streaming: int,
    gates: list[Any], root: Path, problems: list[str],
) -> None:  # fmt: skip
    needed = [g.name for g in gates if g and g.name in NEEDS_EVALUATION]
    if evaluate is None:
        if needed:
            problems.append(f"[evaluate]: is missing; gate {needed[0]} needs data and metric")
        return
    for number, stage in enumerate(stages, 1):
        if stage is None or stage.name in PROVING or evaluate.data not in stage.data_names():
            continue
        which = f"[[stages]] {number} ({stage.name})"
        calibrates, used = f"the calibration set of {which}", ""
        if getattr(stage, "calibration", "") == evaluate.data:
            used = calibrates
        elif getattr(stage, "data", "") == evaluate.data:
            used = calibrates if stage.name.startswith("quantize") else f"what {which} learns from"
        elif getattr(stage, "validation", "") == evaluate.data and (
            getattr(stage, "early_stop", 0) or getattr(stage, "max_drop", 0)
        ):
            used = f"what {which} chooses by"
        if used:
            problems.append(
                f"[evaluate] data = {evaluate.data!r} is {used}: a model fits the data that it was made by;"
                " name a set of its own"
            )
    if streaming:
        problems.append(
            f"[evaluate]: the model of [[stages]] {streaming} {STREAMING.format(cannot='nothing can be evaluated')} ({EXPLICIT})"
        )
    if evaluate.data not in known_data:
        problems.append(f"[evaluate] data: no [data.{evaluate.data}]{near_miss(evaluate.data, sorted(known_data))}")  # fmt: skip
    if ":" in evaluate.metric:
        _check_file(evaluate.metric, root, "[evaluate] metric", problems)
    elif evaluate.metric not in TASK_METRICS:
        problems.append(
            f"[evaluate] metric: unknown metric {evaluate.metric!r}{near_miss(evaluate.metric, list(TASK_METRICS))} "
            f'(legal: {", ".join(TASK_METRICS)}, or your own "file.py:function")'
        )
    if evaluate.reference is not None and not 0 <= evaluate.reference <= len(stages):
        problems.append(f"[evaluate] reference: stage {evaluate.reference} of {len(stages)}")
