"""The JSON Schema of profiles, for editors: it is what the code says, and agrees with the loader."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.cli import main
from edgepipe.errors import ProfileError, RequestError
from edgepipe.profile import SCHEMA_FILE, load_profile, profile_schema, schema_text
from edgepipe.schema import read_toml
from edgepipe.units import UNITS, parse_quantity, quantity_pattern

FOLDER = Path(__file__).parents[2] / "device_profiles"
PATHS = sorted(FOLDER.glob("*.toml"))
VALIDATOR = jsonschema.Draft202012Validator(profile_schema())


def test_the_published_schema_is_what_the_code_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert (FOLDER / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), (
        f"run: edgepipe devices schema > device_profiles/{SCHEMA_FILE}"
    )
    assert main(["devices", "schema"]) == 0
    assert capsys.readouterr().out == schema_text()


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(profile_schema())


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_shipped_profile_names_the_schema_and_fits_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"#:schema {SCHEMA_FILE}"
    VALIDATOR.validate(read_toml(path, error=ProfileError))


def test_the_profile_in_the_readme_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(#:schema .*?)```", (FOLDER.parent / "README.md").read_text(), re.S)  # fmt: skip
    path = tmp_path / "mine.toml"
    path.write_text(text)
    VALIDATOR.validate(read_toml(path, error=ProfileError))
    profile = load_profile(path)
    assert (profile.soc, profile.affinity, profile.thermal.abort_above) == ("BCM2711", (2, 3), 80)


@pytest.mark.slow
def test_check_jsonschema_takes_them() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", FOLDER / SCHEMA_FILE, *PATHS]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


# ---------------------------------------------------------------------- the loader and the schema


def to_toml(data: dict[str, Any]) -> str:
    """Plain data as TOML: every table inline, strings with the escapes of JSON (which TOML has, too)."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item)

    return "".join(f"{json.dumps(key)} = {value(item)}\n" for key, item in data.items())


def loads(data: dict[str, Any], folder: Path) -> bool:
    path = folder / "mutant.toml"
    path.write_text(to_toml(data), encoding="utf-8")
    try:
        load_profile(path)
    except ProfileError:
        return False
    return True


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands in nested tables and arrays."""
    if at:
        yield at
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():  # fmt: skip
        yield from places(data[key], (*at, key))


# TOML has neither null nor, in our files, anything but these
JUNK = st.one_of(
    st.sampled_from(["", "any", "x", "4 GiB", "-4 GiB", "60 C", "50 %", "~/x", "xssh", "ssh", "0x"]),
    st.integers(-2, 70000), st.booleans(), st.just(1.5),
    st.just([]), st.just({}), st.lists(st.integers(-1, 9), max_size=2),
)  # fmt: skip
KEYS = st.sampled_from(
    ["schema", "extends", "thread", "name", "emulated", "thermal", "transports", "python", "x"]
)
# Rules that JSON Schema has no words for.
BEYOND = ("extends", "sources", "thermal", "kernel", "python", "swap_bytes", "governor")


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_schema_and_the_loader_agree_on_mutants(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = data.draw(st.sampled_from(PATHS))
    mutant = copy.deepcopy(read_toml(path, error=ProfileError))
    at = data.draw(st.sampled_from([*places(mutant)]))
    table = mutant
    for key in at[:-1]:
        table = table[key]
    change = data.draw(st.sampled_from(["drop", "replace", "add"]))
    if change == "drop":
        del table[at[-1]]
    elif change == "replace":
        table[at[-1]] = data.draw(JUNK)
    else:
        mutant[data.draw(KEYS)] = data.draw(JUNK)
    fits = VALIDATOR.is_valid(mutant)
    taken = loads(mutant, tmp_path_factory.mktemp("mutant"))
    if taken:
        assert fits, f"{mutant} is loaded, but the schema refuses it"
    beyond = "extends" in mutant or at[0] in BEYOND or change == "add"
    if fits and not beyond:
        assert taken, f"{mutant} fits the schema, but is not loaded"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2}, {"schema": True}, {"thread": 1}, {"ram_bytes": 4}, {"ram_bytes": "4 GHz"}, {"bits": 16},
        {"machine": "arm64"}, {"threads": 0}, {"ssh_port": 0}, {"runtime": "tflite"}, {"clusters": 1},
        {"transports": ["usb"]}, {"clusters": [{"core": "x", "count": 0, "max_frequency_mhz": 1}]},
        {"clusters": [{"core": "x", "count": 1, "max_frequency_mhz": 1, "isa": ["dotprd"]}]}, {"sources": {}},
        {"emulated": {"kind": "whole", "cpu": "x", "memory": "1 GiB"}}, {"work_dir": "x"}, {"name": "x"},
        {"runtime_sha256": "X"}, {"affinity": [-1]}, {"sources": {"sok": "x"}}, {"delegation": {"min_share": "1"}},
    ],
)  # fmt: skip
def test_both_refuse_a_mistake(change: dict[str, Any], tmp_path: Path) -> None:
    good = read_toml(FOLDER / "rpi5_8gb.toml", error=ProfileError)
    assert VALIDATOR.is_valid(good)
    assert loads(good, tmp_path)
    assert not VALIDATOR.is_valid({**good, **change})
    assert not loads({**good, **change}, tmp_path)


def test_both_refuse_a_profile_without_a_key_that_it_needs(tmp_path: Path) -> None:
    good = read_toml(FOLDER / "rpi5_8gb.toml", error=ProfileError)
    optional = {"threads", "work_dir", "thermal"}
    for key in good:
        less = {k: v for k, v in good.items() if k != key}
        assert VALIDATOR.is_valid(less) == loads(less, tmp_path) == (key in optional), key


@given(dimension=st.sampled_from([*UNITS]), text=st.text(max_size=8) | st.from_regex(r"-?\d{1,3} ?[a-zA-Z%]{1,4}"))  # fmt: skip
def test_the_pattern_of_a_quantity_is_what_the_parser_takes(dimension: str, text: str) -> None:
    try:
        parse_quantity(text, dimension)
        parsed = True
    except RequestError:
        parsed = False
    assert bool(re.search(quantity_pattern(dimension), text)) == parsed
