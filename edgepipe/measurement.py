"""`Measurement`: one metric with all its raw samples and the context that makes it comparable."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from edgepipe.errors import RequestError

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Raw samples in base units (s, B, points, dB, or none).

    ``samples[i]`` holds the samples of session *i* (one fresh process on the device); facts that
    need no sampling (a file size, an accuracy) are one session of one sample. ``excluded`` gives
    for a session number the cause, measured independently of the value, that disqualifies it.
    ``context`` says what was measured where: model sha256, profile, runtime and its version and
    sha256, threads, governor, temperature before and after, ...
    """

    metric: str
    unit: str
    samples: tuple[tuple[float, ...], ...]
    warmups: tuple[tuple[float, ...], ...] = ()
    excluded: Mapping[int, str] = dataclasses.field(default_factory=dict)
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def valid_sessions(self) -> tuple[tuple[float, ...], ...]:
        return tuple(s for i, s in enumerate(self.samples) if i not in self.excluded and s)


def single(metric: str, unit: str, value: float, context: Mapping[str, Any]) -> Measurement:
    """A fact that needs no sampling, as a measurement."""
    return Measurement(metric, unit, ((float(value),),), context=dict(context))


def measurement_to_dict(measurement: Measurement) -> dict[str, Any]:
    """Plain data for JSON. (`dataclasses.asdict` would copy thousands of samples one by one.)"""
    return {
        "schema": SCHEMA,
        "metric": measurement.metric,
        "unit": measurement.unit,
        "samples": measurement.samples,
        "warmups": measurement.warmups,
        "excluded": {str(k): v for k, v in measurement.excluded.items()},
        "context": measurement.context,
    }


def measurement_from_dict(data: Mapping[str, Any]) -> Measurement:
    """Inverse of `measurement_to_dict`. Refuses data of a newer schema.

    Raises ValueError or TypeError for samples that no device can have given: no numbers, or NaN,
    or a time below 0.
    """
    if data.get("schema", 0) > SCHEMA:
        raise RequestError(
            f"measurement has schema {data['schema']}, this edgepipe reads up to {SCHEMA}",
            hint="upgrade edgepipe",
        )
    samples = tuple(tuple(s) for s in data["samples"])
    for sample in itertools.chain.from_iterable(samples):
        if not isinstance(sample, int | float):
            raise TypeError(f"{sample!r} is no sample of {data['metric']}")
        # NaN is not equal to itself
        if sample != sample or (data["unit"] == "s" and not 0 <= sample < math.inf):
            raise ValueError(f"{sample} {data['unit']} is no sample of {data['metric']}")
    return Measurement(
        metric=data["metric"],
        unit=data["unit"],
        samples=samples,
        warmups=tuple(tuple(s) for s in data["warmups"]),
        excluded={int(k): v for k, v in data["excluded"].items()},
        context=data["context"],
    )
