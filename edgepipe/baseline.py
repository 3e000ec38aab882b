"""Baselines: the last model that was released, with the figures it was released on.

::

    ci/baselines/<profile>/<recipe>.json     what was measured, on what, and the verdicts
    ci/baselines/<profile>/<recipe>.tflite   the model file, so that the next one can be measured beside it

They are committed and reviewed like code. `promote` writes them, and nothing else does.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edgepipe
from edgepipe import stats
from edgepipe.artifact import Artifact, artifact_from_dict, artifact_to_dict, hash_path
from edgepipe.errors import ArtifactError, RequestError
from edgepipe.gate import Evidence, Gate, Status, Verdict
from edgepipe.measurement import Measurement
from edgepipe.metrics import METRICS
from edgepipe.store import replacing, write_json
from edgepipe.units import format_value

SCHEMA = 1
DEFAULT_FOLDER = Path("ci/baselines")
# Gates that judge a model against the baseline rather than against a limit.
GATES_ON_BASELINE = ("slowdown", "growth", "instructions")
NO_BASELINE = "there is no baseline on this profile"
# Two figures that differ in any of these say nothing about two models (MEASUREMENT, section 8).
COMPARABLE = (
    "model_inputs", "profile", "machine", "page_size_bytes", "runtime", "runtime_version",
    "runtime_sha256", "backend", "threads", "affinity", "kernel_mode", "weight_cache", "cpu_model",
    "is_emulated",
)  # fmt: skip
# Without these a record is comparable with nothing, and must not become a baseline.
REQUIRED = ("model_inputs", "profile", "machine", "page_size_bytes", "runtime", "runtime_version", "threads", "boot_id")  # fmt: skip
# Figures that depend on the evaluation data; comparable only on the same.
ON_DATA = ("task_metric", "accuracy_drop", "parity", "device_task_metric", "device_accuracy_drop", "device_flips", "device_mismatch")  # fmt: skip
# Kept for the reader of a baseline; no address or name of a machine.
CONDITIONS = ("emulated", "device_model", "os", "governor", "temperature_before_c", "temperature_after_c", "data_sha256")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One promoted model on one profile.

    ``figures`` are summaries by metric (see `summarise`), ``comparable`` the values of
    `COMPARABLE` they were taken with, ``conditions`` what else a reader may ask.
    """

    path: Path
    recipe: str
    profile: str
    run: str
    promoted: str
    edgepipe: str
    model: Artifact
    comparable: Mapping[str, Any]
    conditions: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Any]]
    verdicts: tuple[Mapping[str, Any], ...]


def is_on_baseline(gate: Gate) -> bool:
    """Whether a gate judges a model against the baseline."""
    return gate.name in GATES_ON_BASELINE and getattr(gate, "is_on_baseline", True)


def baseline_path(folder: Path, profile: str, recipe: str) -> Path:
    """Where the baseline of a recipe on a profile lies; its model has the suffix ``.tflite``."""
    return folder / profile / f"{recipe}.json"


def load_baseline(folder: Path, profile: str, recipe: str) -> Baseline | None:
    """The baseline of a recipe on a profile, its model's sha256 checked; None where there is none.

    Raises RequestError (code ``bad-baseline``) for one that is damaged or of a newer schema: a
    broken baseline must not be taken for none.
    """
    path = baseline_path(folder, profile, recipe)
    mend = f"restore it (git checkout -- {path.with_suffix('.*')}), or remove both files and promote anew"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] > SCHEMA:
            raise RequestError(
                f"{path} has schema {data['schema']}, this edgepipe reads up to {SCHEMA}",
                hint="upgrade edgepipe",
                code="bad-baseline",
            )
        found = Baseline(
            path=path,
            model=artifact_from_dict(data["model"], root=path.parent),
            recipe=str(data["recipe"]),
            profile=str(data["profile"]),
            run=str(data["run"]),
            promoted=str(data["promoted"]),
            edgepipe=str(data["edgepipe"]),
            comparable=dict(data["comparable"]),
            conditions=dict(data["conditions"]),
            figures={name: dict(figure) for name, figure in data["figures"].items()},
            verdicts=tuple(dict(v) for v in data["verdicts"]),
        )
        sha256 = hash_path(found.model.path)
    except FileNotFoundError as exc:
        if not path.exists():
            return None
        raise RequestError(f"{path} has no model file beside it", hint=mend, code="bad-baseline") from exc  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArtifactError) as exc:
        raise RequestError(f"{path} is no baseline: {type(exc).__name__}: {exc}", hint=mend, code="bad-baseline") from exc  # fmt: skip
    if sha256 != found.model.sha256:
        raise RequestError(
            f"{found.model.path} is not the model of {path.name}: sha256 {sha256[:12]}, the record says {found.model.sha256[:12]}",
            hint=mend,
            code="bad-baseline",
        )
    if (found.profile, found.recipe) != (profile, recipe):
        raise RequestError(
            f"{path} is the baseline of {found.recipe} on {found.profile}, not of {recipe} on {profile}",
            hint="a baseline that was moved or copied proves nothing: promote a run of this recipe",
            code="bad-baseline",
        )
    return found


def device_context(measurements: Mapping[str, Measurement]) -> Mapping[str, Any]:
    """The context that all measurements of one device share; empty where it was not measured."""
    return next((m.context for m in measurements.values() if "runtime" in m.context), {})


def _measured_beside(measurements: Mapping[str, Measurement]) -> set[str]:
    """The sha256 of every model that measurements were taken beside."""
    return {str(m.context["baseline_sha256"]) for m in measurements.values() if "baseline_sha256" in m.context}  # fmt: skip


def model_inputs(model: Artifact) -> list[dict[str, Any]]:
    """What a model is fed, as far as two models must agree to be measured side by side."""
    return [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in model.inputs]


def comparable(context: Mapping[str, Any]) -> dict[str, Any]:
    """The values that must agree, as JSON holds them."""
    found = {key: context.get(key) for key in COMPARABLE}
    found["is_emulated"] = bool(context.get("emulated") or context.get("is_emulated"))
    return dict(json.loads(json.dumps(found)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Every key of `COMPARABLE` whose values differ, with both: ``threads: baseline 4, run 1``.

    A baseline of an edgepipe that did not ask for the CPU's model yet differs in none.
    """
    unasked = {"cpu_model"} - set(old)
    old, new = comparable(old), comparable(new)
    return tuple(
        f"{key}: baseline {_short(old[key])}, run {_short(new[key])}"
        for key in COMPARABLE
        if old[key] != new[key] and key not in unasked
    )


def _differences_that_count(baseline: Baseline, context: Mapping[str, Any]) -> tuple[str, ...]:
    """Why figures taken under ``context`` cannot be compared with a baseline.

    A null device stands for any board: both models ran on it, so that a slower one FAILs there as it
    would on the board (and nothing PASSes). It must only be fed the same.
    """
    changed = differences(baseline.comparable, context) if context else ()
    if context.get("simulated"):
        return tuple(line for line in changed if line.startswith("model_inputs:"))
    return changed


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a sha256
        return value[:12]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return ", ".join(f"{v.get('name')} {v.get('dtype')} {'x'.join(map(str, v.get('shape', [])))}" for v in value)  # fmt: skip
    return "none" if value in (None, "", []) else str(value)


def refuse_incomparable(
    verdicts: Sequence[Verdict],
    devices: Sequence[Evidence],
    baselines: Mapping[str, Baseline | None],
    measured_against: Mapping[str, str],
    *,
    run_id: str,
) -> tuple[Verdict, ...]:
    """Verdicts of `GATES_ON_BASELINE`, INCONCLUSIVE where their evidence does not bear on the baseline.

    ``baselines`` are those on disk now, by the board's name; ``measured_against`` the sha256 of the
    model that was really measured beside the candidate, by the same. A run that was promoted itself
    is judged as it was then. Boards that were not measured keep their verdicts.
    """
    why: dict[str, tuple[str, str]] = {}
    for device in devices:
        if device.missing:
            continue
        found = baselines.get(device.device)
        context, beside = device_context(device.measurements), measured_against.get(device.device, "")  # fmt: skip
        if found is None:
            why[device.device] = (
                NO_BASELINE,
                "promote a run that may be one: edgepipe gate --promote",
            )
        elif others := _measured_beside(device.measurements) - {beside}:
            why[device.device] = (
                f"figures of other measurements are among these: beside the model {min(others)[:12]}, the run says {beside[:12] or 'none'}",
                "run the recipe again",
            )
        elif found.run == run_id and beside:
            continue
        elif changed := _differences_that_count(found, context):
            why[device.device] = (
                f"the baseline ({found.path.name}) cannot be compared: {'; '.join(changed)}",
                f"measure as the baseline was, or remove {found.path} and its .tflite and promote anew",
            )
        elif not beside:
            itself = "this run is the baseline itself: nothing was measured beside it"
            why[device.device] = (
                itself if found.run == run_id else "no baseline was measured beside the model",
                "run the recipe again",
            )
        elif beside != found.model.sha256:
            why[device.device] = (
                f"measured against the model {beside[:12]}, but the baseline is now {found.model.sha256[:12]}",
                "run the recipe again",
            )
    return tuple(
        dataclasses.replace(
            v,
            status=Status.INCONCLUSIVE,
            reason=why[v.device][0],
            value=None,
            details=(why[v.device][1],),
        )
        if v.gate in GATES_ON_BASELINE and v.device in why
        else v
        for v in verdicts
    )


# ----------------------------------------------------------------------------------- promoting


def why_not_promotable(
    verdicts: Sequence[Verdict],
    shipped: Artifact,
    devices: Sequence[Evidence],
    baselines: Mapping[str, Baseline | None],
) -> str:
    """Why a run must not become a baseline, or an empty string.

    Every gate must have PASSed. Only the gates that ask for the very baseline that is missing may
    be INCONCLUSIVE: otherwise there could be no first one. That of an emulated board says so, and
    is compared with no real one.
    """
    if not devices:
        return "no device was measured"
    open_ = [v for v in verdicts if v.status is not Status.PASS and not _asks_for_missing(v, baselines)]  # fmt: skip
    for device in devices:
        if device.missing:
            return f"{device.device} was not measured: {device.missing}"
        measured = device.measurements.items()
        contexts = [m.context for name, m in measured if not name.endswith("_baseline")]
        if any(c.get("simulated") for c in contexts):
            return f"{device.device} was measured on the null device, which is no board"
        if any(c.get("model_sha256") != shipped.sha256 for c in contexts):
            return f"{device.device} was measured with another model than the one that ships"
        context = device_context(device.measurements)
        missing = [key for key in REQUIRED if context.get(key) in (None, "")]
        if missing:
            return f"{device.device} was measured without {', '.join(missing)}: comparable with nothing"  # fmt: skip
    if open_:
        return "; ".join(f"{v.gate}{f' on {v.device}' if v.device else ''} is {v.status}" for v in open_)  # fmt: skip
    if shipped.kind != "tflite":
        return f"the recipe ships a {shipped.kind} model; a baseline is a .tflite file"
    try:
        sha256 = hash_path(shipped.path)
    except OSError:
        return f"the model is gone: {shipped.path}"
    return "" if sha256 == shipped.sha256 else f"{shipped.path} has changed since the run"


def _asks_for_missing(verdict: Verdict, baselines: Mapping[str, Baseline | None]) -> bool:
    return (
        verdict.gate in GATES_ON_BASELINE
        and verdict.status is Status.INCONCLUSIVE
        and verdict.reason == NO_BASELINE
        and baselines.get(verdict.device) is None
    )


def promote(
    *,
    folder: Path,
    recipe: str,
    run_id: str,
    shipped: Artifact,
    model: Evidence,
    device: Evidence,
    verdicts: Sequence[Verdict],
) -> Path:
    """Make a run the baseline of its recipe on one profile. Returns the path of the record.

    Each of the two files is replaced whole; if the machine dies between them, `load_baseline`
    refuses the pair.
    """
    context = device_context(device.measurements)
    path = baseline_path(folder, device.profile, recipe)
    kept = dataclasses.replace(shipped, path=path.with_suffix(".tflite"), facts={})
    measured = {**model.measurements, **device.measurements}
    data = {
        "schema": SCHEMA,
        "recipe": recipe,
        "profile": device.profile,
        "run": run_id,
        "promoted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "edgepipe": edgepipe.__version__,
        "model": artifact_to_dict(kept, relative_to=path.parent),
        "comparable": comparable(context),
        "conditions": _conditions(measured),
        "figures": {name: summarise(measured[name]) for name in METRICS if name in measured},
        "verdicts": [
            {"gate": v.gate, "status": v.status.value, "reason": v.reason}
            for v in verdicts
            if v.device in ("", device.device)
        ],
    }
    with replacing(kept.path) as temporary:
        shutil.copyfile(shipped.path, temporary)
    write_json(path, data)
    return path


def _conditions(measured: Mapping[str, Measurement]) -> dict[str, Any]:
    return {
        key: next((m.context[key] for m in measured.values() if key in m.context), None)
        for key in CONDITIONS
    }


def summarise(measurement: Measurement) -> dict[str, Any]:
    """Percentiles of the valid sessions and of each session, six digits each."""

    def digits(value: float) -> float:
        return float(f"{value:.6g}")

    sessions = measurement.valid_sessions
    return {
        "unit": measurement.unit,
        "p50": digits(stats.sessions_percentile(sessions, 0.5)) if sessions else None,
        "p90": digits(stats.sessions_percentile(sessions, 0.9)) if sessions else None,
        "sessions": [
            {"n": len(s), **{f"p{q}": digits(stats.percentile(s, q / 100)) for q in (10, 50, 90)}}
            for s in measurement.samples
            if s
        ],
        "excluded": {str(number): cause for number, cause in measurement.excluded.items()},
    }


def changes(
    old: Baseline | None, model: Evidence, device: Evidence
) -> tuple[tuple[str, str, str, str], ...]:
    """(metric, old, new, change) for every figure a promotion would replace, as a person reads them."""
    measured = {**model.measurements, **device.measurements}
    before: Mapping[str, Mapping[str, Any]] = old.figures if old else {}
    other_data = old is not None and old.conditions.get("data_sha256") != _conditions(measured)["data_sha256"]  # fmt: skip
    size = measured.get("model_bytes")
    is_merged = size is not None and bool(size.context.get("model_signature"))
    other_files = old is not None and bool(old.model.signature) != is_merged
    rows = []
    for metric in METRICS:
        was = before.get(metric, {}).get("p50")
        now = summarise(measured[metric])["p50"] if metric in measured else None
        if was is None and now is None:
            continue
        unit = METRICS[metric].unit
        change = "" if was is None or now is None or not was else f"{100 * (now / was - 1):+.1f} %"
        if change and other_data and metric.startswith(ON_DATA):
            change = "(other data)"
        if change and other_files and metric == "model_bytes":
            change = "(merged, or not)"
        old_text, new_text = ("-" if v is None else format_value(v, unit) for v in (was, now))
        rows.append((metric, old_text, new_text, change))
    return tuple(rows)
