"""What happens on a null device: its figures, its noise and its faults, as written in its address.

::

    null://quiet                                  10 ms, 4 MB, nothing goes wrong
    null://noisy?sd=0.02&slowdown=1.05            two loads of one file differ by 2 %; candidate 5 % slower
    null://contended?latency=25ms&fault=reboot@session:2&fault=drop@status:3
"""

from __future__ import annotations

import dataclasses
import math
import random
import urllib.parse
from typing import Annotated, Any

from edgepipe.errors import RequestError
from edgepipe.schema import Unit, build, near_miss, record

# Scenario by name -> the options it sets; an address may change each of them.
SCENARIOS: dict[str, dict[str, Any]] = {
    "quiet": {},
    "noisy": {"sd": 0.02},
    "drifting": {"per_minute": 0.01},
    "throttling": {"at_session": 2},
    "contended": {"contended": True},
}
# The steps of the protocol at which a link may break.
STEPS = ("hello", "push", "facts", "start", "status", "pull", "end")
# Fault by name -> (what may follow the @, where it strikes when nothing does, what it does).
FAULTS: dict[str, tuple[tuple[str, ...], tuple[str, int], str]] = {
    "drop": (STEPS, ("start", 1), "the link breaks before the board gets the n-th call of a step"),
    "drop-reply": (STEPS, ("start", 1), "the board does the n-th call of a step, its answer is lost"),
    "busy": ((), ("", 0), "another job holds the board"),
    "reboot": (("session",), ("session", 1), "the board restarts in the middle of the n-th session"),
    "kill-worker": (("session",), ("session", 1), "somebody kills the process that measures"),
    "kill-agent": (("session",), ("session", 1), "somebody kills the supervisor"),
    "torn-journal": (("session",), ("session", 2), "the supervisor dies while it writes a line"),
    "corrupt-journal": (("line",), ("line", 2), "a byte of the n-th line flips on the board's disk, and the supervisor dies"),
    "disk-full": (("session",), ("session", 0), "no space: from the start, or in the n-th session"),
    "oom": (("session",), ("session", 1), "the kernel kills the worker: out of memory"),
    "crash": (("session",), ("session", 1), "the model crashes the worker"),
    "no-runtime": ((), ("", 0), "nothing on the board can run a model"),
    "too-hot": ((), ("", 0), "the board does not cool down"),
    "clock-jump": (("session",), ("session", 1), "the board's clock is set during a session"),
    "truncated-model": ((), ("", 0), "the board's disk cuts the model file short, once"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once: at the ``number``-th ``where`` (counted from 1; 0 = always)."""

    name: str
    where: str
    number: int


@dataclasses.dataclass(frozen=True)
class NoiseModel:
    """How a latency scatters; every figure is the standard deviation of a logarithm, except ``wait``.

    CPU time of one inference of one arm in one session, with N(s) normal of mean 0 and sd s::

        cpu  = latency * exp(N(session) + N(load) + N(cpu))     session: shared by all arms
        wall = cpu * wait * exp(N(wall_session) + N(wall))      load: of each arm's own load

    so that with many rounds the log ratio of two arms scatters over sessions with ``load * sqrt(2)``,
    and interleaving cancels ``session``. ``tail`` of the wall times are stretched by 2 to 4.
    """

    session: float
    load: float
    cpu: float
    wait: float
    wall_session: float
    wall: float
    tail: float

    def draw(
        self, rng: random.Random, *, latency_s: float, session: float, load: float, wall: float
    ) -> tuple[float, float]:
        """(wall, cpu) seconds of one inference; the three effects are those drawn for its session."""
        cpu_s = latency_s * math.exp(session + load + rng.gauss(0, self.cpu))
        wall_s = cpu_s * self.wait * math.exp(wall + abs(rng.gauss(0, self.wall)))
        if rng.random() < self.tail:
            wall_s *= rng.uniform(2, 4)
        return max(wall_s, cpu_s), cpu_s


# Recorded runs of MobileNetV2 int8, 10 ms, 1 thread, on two x86 cores: an idle machine (median of
# processes scatters by 0.25 %), and one with a load of 5 (wall median 1.96 times the CPU time; one
# session of 100 rounds: log ratio of the arms with sd 1.5 % by wall, 0.3 % by CPU time, which is
# 1.5 % higher).
QUIET = NoiseModel(session=0.002, load=0.002, cpu=0.005, wait=1.001, wall_session=0.001, wall=0.004, tail=0.002)  # fmt: skip
CONTENDED = NoiseModel(session=0.005, load=0.002, cpu=0.01, wait=1.8, wall_session=0.04, wall=0.15, tail=0.03)  # fmt: skip
CONTENDED_CPU_BIAS = 1.015


@record
class Scenario:
    """Everything a null device does; the same scenario gives the same figures.

    ``latency`` is the CPU time of one inference with one thread; the arm ``candidate`` takes
    ``slowdown`` times that, and ``growth`` more than ``memory`` (anonymous, steady state).
    ``sd`` is the standard deviation over sessions of the log ratio of two loads of one file, which
    is what ``edgepipe calibrate`` finds. ``per_minute`` is a drift of both arms. In latency session
    ``at_session`` (0: none) the board throttles. ``flips`` is the share of samples whose outputs
    are upset; the others are what this host computes.
    """

    latency: Annotated[float, Unit("time")] = 0.010
    slowdown: float = 1.0
    memory: Annotated[float, Unit("size")] = 4e6
    growth: Annotated[float, Unit("size")] = 0.0
    flips: float = 0.0
    sd: float = 0.003
    contended: bool = False
    per_minute: float = 0.0
    at_session: int = 0
    seed: int = 1
    fault: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {value:g} should be {legal}"
            for name, value, low, high, legal in (
                ("latency", self.latency, 1e-6, 3600.0, "1 us to 1 h"),
                ("slowdown", self.slowdown, 0.01, 100.0, "0.01 to 100, like 1.05"),
                ("memory", self.memory, 0.0, 1e12, "0 B or more"),
                ("growth", self.growth, -self.memory, 1e12, "at least minus the memory"),
                ("flips", self.flips, 0.0, 1.0, "a share from 0 to 1"),
                ("sd", self.sd, 0.0, 1.0, "0 to 1, like 0.02 for 2 %"),
                ("per_minute", self.per_minute, -0.5, 10.0, "-0.5 to 10, like 0.01 for 1 %"),
                ("at_session", self.at_session, 0, 1000, "the number of a session, from 1"),
            )
            if not low <= value <= high
        ]
        if wrong:
            raise RequestError("; ".join(wrong), hint="mend the options of the null device")
        for text in self.fault:
            parse_fault(text)

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(parse_fault(text) for text in self.fault)

    @property
    def noise(self) -> NoiseModel:
        return dataclasses.replace(
            CONTENDED if self.contended else QUIET, load=self.sd / math.sqrt(2)
        )


def parse_fault(text: str) -> Fault:
    """``"reboot@session:2"`` -> Fault("reboot", "session", 2). Raises RequestError with the legal ones."""
    name, _, rest = text.partition("@")
    if name not in FAULTS:
        raise RequestError(
            f"a null device has no fault {name!r}{near_miss(name, list(FAULTS))}",
            hint=f"legal faults: {', '.join(FAULTS)}",
            code="bad-address",
        )
    places, (where, number), _ = FAULTS[name]
    if rest:
        where, _, count = rest.partition(":")
        number = int(count) if count.isdecimal() else (1 if not count else 0)
        if where not in places or number < 1:
            legal = ", ".join(f"{name}@{place}:1" for place in places) or name
            raise RequestError(
                f"the fault {text!r} of a null device strikes nowhere",
                hint=f"legal: {legal}",
                code="bad-address",
            )
    return Fault(name, where, number)


def parse_scenario(address: str) -> Scenario:
    """``null://NAME[?option=value&...]`` -> Scenario; ``fault`` may be given more than once.

    Quantities carry their unit (``latency=10ms``, ``memory=4MB``). Raises RequestError for unknown
    names, with the legal ones.
    """
    parts = urllib.parse.urlsplit(address)
    name = parts.netloc + parts.path
    if name not in SCENARIOS:
        raise RequestError(
            f"{address!r}: a null device has no scenario {name!r}{near_miss(name, list(SCENARIOS))}",
            hint=f"legal: {', '.join(f'null://{known}' for known in SCENARIOS)}",
            code="bad-address",
        )
    try:
        pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))  # fmt: skip
    except ValueError as exc:
        raise RequestError(
            f"{address!r}: {exc}", hint="write ?option=value&option=value", code="bad-address"
        ) from exc
    options: dict[str, Any] = {key: value for key, value in pairs if key != "fault"}
    doubled = sorted(key for key in options if [k for k, _ in pairs].count(key) > 1)
    if doubled:
        raise RequestError(f"{address!r}: {', '.join(doubled)} is given twice", code="bad-address")
    for field in dataclasses.fields(Scenario):
        if field.name in options and field.type in _NUMBERS:
            options[field.name] = _NUMBERS[field.type](options[field.name])
    options["fault"] = [fault for key, value in pairs if key == "fault" for fault in value.split(",")]  # fmt: skip
    return build(Scenario, {**SCENARIOS[name], **options}, where=address, error=RequestError)


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text  # `build` names the key
    return value if math.isfinite(value) else text


def _whole(text: str) -> Any:
    return int(text) if text.isdecimal() else text


def _truth(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


# annotations of this module are text (from __future__ import annotations)
_NUMBERS = {"float": _number, "int": _whole, "bool": _truth}
