"""Options of structured pruning: how much to remove, what goes first, and in how many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from edgepipe.errors import RequestError, StageOptionError
from edgepipe.schema import Unit, record
from edgepipe.training import TrainingOptions
from edgepipe.units import format_bytes, format_seconds, parse_quantity

# XNNPACK's int8 kernels work on 8 output channels at once (the NR of its NEON GEMMs is 8 or 16):
# what is left over costs as much as a whole block
AUTO_ROUND_TO = 8


@record
class PruningTarget:
    """What the pruned model may cost; one of the four.

    ``macs``, ``parameters`` and ``bytes`` (of the int8 weights) are shares of what the stage was given
    where they are at most 1, like ``macs = 0.5``, else absolute, like ``macs = 1000000`` or
    ``bytes = "200 kB"``. ``latency`` is an estimate for a device of ``profile``.
    """

    macs: float = 0.0
    parameters: float = 0.0
    bytes: float | str = 0.0
    latency: Annotated[float, Unit("time")] = 0.0
    profile: str = ""

    def __post_init__(self) -> None:
        given = [n for n in ("macs", "parameters", "bytes", "latency") if getattr(self, n)]
        if len(given) != 1:
            raise StageOptionError(
                f"prune: target needs exactly one of macs, parameters, bytes and latency, not {' and '.join(given) or 'none'}",
                hint="target = { macs = 0.5 } leaves half of the MACs",
            )
        if isinstance(self.bytes, str):
            try:
                parse_quantity(self.bytes, "size")
            except RequestError as exc:
                raise StageOptionError(f"prune: target.bytes: {exc.message}", hint=exc.hint) from exc  # fmt: skip
        elif self.bytes > 1:
            raise StageOptionError(
                f"prune: target.bytes {self.bytes:g} is neither a share nor a size",
                hint='bytes = 0.5, or bytes = "200 kB"',
            )
        if self.value <= 0 or self.value == 1:
            raise StageOptionError(
                f"prune: target.{self.metric} {self.value:g} is no target",
                hint="a share is between 0 and 1",
            )
        if bool(self.latency) != bool(self.profile):
            raise StageOptionError(
                "prune: target.latency and target.profile go together",
                hint='target = { latency = "5 ms", profile = "rpi4b_4gb" }',
            )

    @property
    def metric(self) -> str:
        return next(n for n in ("macs", "parameters", "bytes", "latency") if getattr(self, n))

    @property
    def value(self) -> float:
        """The share, or the absolute value in its base unit."""
        value = getattr(self, self.metric)
        return parse_quantity(value, "size") if isinstance(value, str) else float(value)

    def text(self, cost: float) -> str:
        """A cost for people: ``1.2e+06 MACs``, ``200 kB``, ``5 ms``."""
        if self.metric == "latency":
            return format_seconds(cost)
        if self.metric == "bytes":
            return format_bytes(cost)
        return f"{cost:.4g} {'MACs' if self.metric == 'macs' else 'parameters'}"

    @property
    def is_share(self) -> bool:
        return self.metric != "latency" and not isinstance(self.bytes, str) and self.value < 1


@record
class PruningOptions:
    """Which channels go.

    ``ratio`` is the share of channels to remove (0.5 unless there is a ``target``), of each layer or
    (``ranking = "global"``) of all together; ``ratios`` names other shares for layers by pattern,
    ``{ "features.3*" = 0.2 }``, the first that matches counts. ``target`` says what the model may
    cost instead. What stays is rounded to multiples of ``round_to`` channels (``"auto"``: 8, what
    int8 kernels work on at once); attention loses whole heads. Layers whose name matches a pattern in
    ``ignore``, and those that make the outputs, stay whole.

    ``importance`` says which channels go first: those with the smallest weights (``l1``, ``l2``),
    with the smallest scale in the batch norm after them (``batch_norm``), on which the loss depends
    least (``taylor``, from ``samples`` of ``data``), or any (``random``, a control).

    With ``steps`` the model shrinks in so many equal parts, and with ``finetune = { epochs = 1 }``
    it is trained after each. ``max_drop``, like ``"1 point"``, ends that when the accuracy on
    ``validation`` has fallen by more, and keeps the last step that had not.
    """

    ratio: float | None = None
    ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target: PruningTarget | None = None
    importance: Literal["l2", "l1", "batch_norm", "taylor", "random"] = "l2"
    ranking: Literal["layer", "global"] = "layer"
    round_to: int | Literal["auto"] = "auto"
    ignore: tuple[str, ...] = ()
    data: str = "train"
    samples: int = 512
    steps: int = 1
    finetune: TrainingOptions | None = None
    validation: str = ""
    max_drop: Annotated[float, Unit("points")] = 0.0

    def __post_init__(self) -> None:
        if self.ratio is not None and self.target is not None:
            raise StageOptionError(
                "prune: ratio and target contradict each other", hint="give one of them"
            )
        if not 0 < self.removed_share < 1:
            raise StageOptionError(
                f"prune: ratio {self.ratio:g} is not between 0 and 1",
                hint="0.3 removes three channels in ten",
            )
        for pattern, ratio in self.ratios.items():
            if not 0 <= ratio < 1:
                raise StageOptionError(
                    f"prune: ratios: {pattern!r} = {ratio:g} is not at least 0 and below 1",
                    hint="0 keeps a layer whole",
                )
        if self.round_to != "auto" and self.round_to < 1:
            raise StageOptionError(f"prune: round_to {self.round_to} is below 1")
        if self.steps < 1 or self.samples < 1:
            raise StageOptionError("prune: steps and samples are at least 1")
        if self.max_drop < 0 or (self.max_drop and not self.validation):
            raise StageOptionError(
                "prune: max_drop is above 0 points and needs validation data",
                hint='validation = "NAME of a [data] table"',
            )

    @property
    def removed_share(self) -> float:
        return 0.5 if self.ratio is None else self.ratio

    @property
    def multiple(self) -> int:
        """What numbers of channels are multiples of."""
        return AUTO_ROUND_TO if self.round_to == "auto" else self.round_to

    def data_names(self) -> tuple[str, ...]:
        names = [self.data] if self.importance == "taylor" else []
        names += [self.validation] if self.validation else []
        names += self.finetune.data_names() if self.finetune else []
        return tuple(dict.fromkeys(names))
