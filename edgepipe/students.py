"""The zoo of students by name: small networks to train or to distil into, sized by width.

The networks themselves are in ``torch_ops/students``, one file for each family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "torch_ops" / "students"


@dataclasses.dataclass(frozen=True)
class Student:
    """A network of the zoo. ``widths`` are those that `edgepipe students` tries.

    ``args`` are what tells it from others of its file.
    """

    file: str
    title: str
    widths: tuple[float, ...]
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def builder(self) -> str:
        """As a recipe names it, relative to `FOLDER`."""
        return f"{self.file}:build"


STUDENTS: dict[str, Student] = {
    "ds_cnn": Student("ds_cnn.py", "one resolution throughout; sound, motion, small pictures", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
    "resnet8": Student("resnet.py", "plain 3x3 convolutions with residuals", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), {"blocks": 1}),
    "resnet20": Student("resnet.py", "the same, three times as deep", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), {"blocks": 3}),
    "mobilenet_v1": Student("mobilenet_v1.py", "depthwise separable convolutions", (0.1, 0.125, 0.25, 0.35, 0.5, 0.75, 1.0)),
    "mobilenet_v2": Student("mobilenet_v2.py", "inverted residuals", (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.4)),
    "mobilenet_v3_small": Student("mobilenet_v3_small.py", "squeeze-and-excite, hard-swish; needs care in int8", (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)),
    "tiny_vit": Student("tiny_vit.py", "attention between patches", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
}  # fmt: skip


def student_args(
    name: str, shape: Sequence[int], classes: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the builder of student ``name`` for an input ``shape`` (1, C, H, W) or (1, C, L).

    ``given`` are the user's own, like ``{"width": 0.5}``.
    """
    own = {"num_classes": classes, "in_channels": shape[1], "size": list(shape[2:])}
    return {**STUDENTS[name].args, **own, **given}
