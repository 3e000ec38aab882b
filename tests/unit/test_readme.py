"""What the README says of gates and options is what there is."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from edgepipe.bench import MeasureOptions
from edgepipe.cli import COMMANDS
from edgepipe.errors import RequestError
from edgepipe.gate import GATES
from edgepipe.schema import build

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_its_row_with_its_options(name: str) -> None:
    gate = GATES[name]
    options = ", ".join(f"`{f.name}`" for f in dataclasses.fields(gate)) or "-"  # type: ignore[arg-type]
    assert f"| `{name}` | {options} | {gate.title} |" in README


def test_every_option_of_measure_is_shown_as_it_is_by_default() -> None:
    text = README.partition("```toml\n[measure]   ")[2].partition("```")[0]
    shown = tomllib.loads("[measure]" + text)["measure"]
    assert set(shown) == {field.name for field in dataclasses.fields(MeasureOptions)}
    assert build(MeasureOptions, shown, where="README", error=RequestError) == MeasureOptions()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_table(name: str) -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `edgepipe ")]
    assert any(f"`edgepipe {name}" in row or f"`{name}`" in row for row in rows)
