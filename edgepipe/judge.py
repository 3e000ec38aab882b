"""Judge evidence: every gate, then what bears on the baseline, then why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepipe.baseline import (
    Baseline,
    is_on_baseline,
    load_baseline,
    refuse_incomparable,
)
from edgepipe.errors import RecipeError
from edgepipe.explain import explain
from edgepipe.gate import (
    Evidence,
    Gate,
    LatencyGate,
    MemoryGate,
    RunsOnDeviceGate,
    Verdict,
    judge_all,
)
from edgepipe.profile import DeviceProfile


def needs_baseline(gates: Sequence[Gate]) -> bool:
    return any(is_on_baseline(gate) for gate in gates)


def check_budgets(gates: Sequence[Gate], profiles: Sequence[DeviceProfile]) -> None:
    """Refuse a gate that has no limit of its own where a profile has no budget for it, either."""
    for gate in gates:
        if isinstance(gate, (LatencyGate, MemoryGate)) and gate.max is None:
            for profile in profiles:
                if getattr(profile.budgets, gate.name) is None:
                    raise RecipeError(
                        f"gate {gate.name!r} has no max, and profile {profile.name} no budget for {gate.name}",
                        hint="give the gate a max, or the profile a [budgets] table",
                    )


def load_baselines(
    gates: Sequence[Gate], folder: Path, profiles: Sequence[str], recipe: str
) -> dict[str, Baseline | None]:
    """The baseline of each profile, None where there is none; empty where no gate asks for one."""
    if not needs_baseline(gates):
        return {}
    return {profile: load_baseline(folder, profile, recipe) for profile in profiles}


def judge(
    gates: Sequence[Gate],
    model: Evidence,
    devices: Sequence[Evidence],
    *,
    baselines: Mapping[str, Baseline | None],
    measured_against: Mapping[str, str],
    run_id: str,
) -> tuple[Verdict, ...]:
    """Every gate's verdict with its explanation; `RunsOnDeviceGate` is judged for every device.

    ``baselines`` and ``measured_against`` are those of `refuse_incomparable`, by the board's name.
    """
    verdicts = list(judge_all([], model, devices))
    for gate in gates:
        if gate.name == RunsOnDeviceGate.name and devices:
            continue  # among them already
        given = [v for v in judge_all([gate], model, devices) if v.gate == gate.name]
        standing = given
        if is_on_baseline(gate):
            standing = list(refuse_incomparable(given, devices, baselines, measured_against, run_id=run_id))  # fmt: skip
        for verdict, kept in zip(given, standing, strict=True):
            if kept is verdict:
                found = next((d for d in devices if d.device == verdict.device), model)
                # a device's answers may be explained by what is known of the file itself
                known = {**model.measurements, **found.measurements}
                lines = explain(gate, verdict, known)
                kept = dataclasses.replace(verdict, details=(*verdict.details, *lines))
            verdicts.append(kept)
    return tuple(verdicts)
