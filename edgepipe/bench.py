"""Preflight, push, run on the device, and what came back as Measurements."""

from __future__ import annotations

from typing import Annotated, Literal

from edgepipe.schema import Unit, record


@record
class MeasureOptions:
    """How a model is measured: ``[measure]`` in a recipe.

    ``threads`` 0 means what the device profile says. ``warmup`` and ``session`` are per session, a
    fresh process each; a session lasts at least 30 inferences. ``affinity`` lists the CPU numbers
    to stay on (empty: all). ``budget`` bounds the whole measurement.
    """

    threads: int = 0
    sessions: int = 3
    memory_sessions: int = 2
    warmup: Annotated[float, Unit("time")] = 0.5
    session: Annotated[float, Unit("time")] = 2.0
    backend: Literal["auto", "litert-c", "litert-interpreter", "tflite-runtime-interpreter"] = (
        "auto"
    )
    affinity: tuple[int, ...] = ()
    seed: int = 0
    budget: Annotated[float, Unit("time")] = 600.0
