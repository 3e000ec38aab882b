"""The zoo of students: the published networks at full width, any small one for any input."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe import cli
from edgepipe.errors import RequestError
from edgepipe.op_table import OpCost, OpTable, save_op_table
from edgepipe.profile import find_profile
from edgepipe.recipe import RecipeError
from edgepipe.resources import profile_paths
from edgepipe.schema import build
from edgepipe.stages.distill import Distill
from edgepipe.students import FOLDER, STUDENTS, student_args
from edgepipe.torch_ops.model import ModelDescription, build_model, load_model, save_model
from edgepipe.torch_ops.result import describe_builder

pytestmark = pytest.mark.slow  # real processes and trainings: not for the inner loop


def description(name: str, shape: tuple[int, ...], classes: int, **given: Any) -> ModelDescription:
    return ModelDescription(
        STUDENTS[name].builder, student_args(name, shape, classes, given), root=FOLDER
    )


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters", "macs"),
    [
        # Howard et al. 2017, table 4; Sandler et al. 2018, table 4; Howard et al. 2019, table 3
        ("mobilenet_v1", (1, 3, 224, 224), 1000, 4.2e6, 569e6),
        ("mobilenet_v2", (1, 3, 224, 224), 1000, 3.4e6, 300e6),
        ("mobilenet_v3_small", (1, 3, 224, 224), 1000, 2.5e6, 56e6),
        # He et al. 2016, table 6: 0.27 M; MLPerf Tiny's models (Banbury et al. 2021, table 2)
        ("resnet20", (1, 3, 32, 32), 10, 0.27e6, 41e6),
        ("resnet8", (1, 3, 32, 32), 10, 78e3, 12.5e6),
        ("ds_cnn", (1, 1, 49, 10), 12, 23e3, 2.7e6),
    ],
)
def test_networks_of_full_width_are_those_that_were_published(
    name: str, shape: tuple[int, ...], classes: int, parameters: float, macs: float
) -> None:
    layers, found = describe_builder(description(name, shape, classes, width=1.0), shape)
    assert found == pytest.approx(macs, rel=0.07)
    assert sum(layer.parameters for layer in layers) == pytest.approx(parameters, rel=0.07)


sides = st.integers(1, 70)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", STUDENTS)
@given(channels=st.integers(1, 4), size=st.one_of(st.tuples(sides), st.tuples(sides, sides)), classes=st.integers(2, 12))  # fmt: skip
def test_every_student_takes_pictures_spectrograms_and_series_of_any_size(
    name: str, channels: int, size: tuple[int, ...], classes: int
) -> None:
    shape = (1, channels, *size)
    model = build_model(description(name, shape, classes, width=0.25)).eval()
    with torch.no_grad():
        scores = model(torch.randn(2, *shape[1:]))
    assert scores.shape == (2, classes)
    assert torch.isfinite(scores).all()
    wide = [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(count % 8 == 0 for count in wide)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_wider_student_costs_more(name: str) -> None:
    shape = (1, 3, 32, 32)
    costs = [
        describe_builder(description(name, shape, 10, width=width), shape)[1]
        for width in STUDENTS[name].widths
    ]
    assert costs == sorted(set(costs))


@pytest.mark.parametrize("path", [p for p in FOLDER.glob("*.py") if p.stem != "__init__"], ids=lambda p: p.stem)  # fmt: skip
def test_a_file_of_the_zoo_stands_alone(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    used |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in used} <= {"torch", *sys.stdlib_module_names}
    assert path.name in {student.file for student in STUDENTS.values()}


def test_an_artifact_of_a_student_holds_the_code_that_builds_it(tmp_path: Path) -> None:
    chosen = description("tiny_vit", (1, 1, 16, 16), 4, width=0.25)
    model = build_model(chosen).eval()
    save_model(model, tmp_path / "model", chosen)
    assert (tmp_path / "model" / "tiny_vit.py").is_file()
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(load_model(tmp_path / "model")(x), model(x))


# ------------------------------------------------------------------------------ edgepipe students


def students(
    capsys: pytest.CaptureFixture[str], store: Path, *more: str, code: int = 0
) -> dict[str, Any]:
    arguments = ["students", "--profile", "rpi4b_4gb", "--input", "1x28x28", "--store", str(store)]
    assert cli.main([*arguments, "--json", "--quiet", *more]) == code
    return dict(json.loads(capsys.readouterr().out))


def test_students_within_both_limits_are_proposed_the_widest_of_each_family(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limits = ("--max-latency", "800 us", "--max-bytes", "120 kB")
    found = students(capsys, tmp_path, *limits)
    assert found["source"] == "estimated"
    names = [s["student"] for s in found["students"]]
    assert len(names) == len(set(names)) >= 4
    every = students(capsys, tmp_path, *limits, "--all")["students"]
    assert all(s["latency_s"] <= 800e-6 and s["file_bytes"] <= 120e3 for s in every)
    for s in found["students"]:
        assert s["width"] == max(e["width"] for e in every if e["student"] == s["student"])
    # each next width was beyond a limit
    for name in ("resnet8", "ds_cnn"):
        only = students(capsys, tmp_path, "--student", name, "--all")["students"]
        beyond = [s for s in only if s["width"] > max(e["width"] for e in every if e["student"] == name)]  # fmt: skip
        beyond.sort(key=lambda s: s["width"])
        assert not beyond or beyond[0]["latency_s"] > 800e-6 or beyond[0]["file_bytes"] > 120e3


def test_the_lines_for_a_recipe_are_a_stage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import tomllib

    found = students(capsys, tmp_path, "--student", "resnet8")
    (stage,) = tomllib.loads(found["recipe"])["stages"]
    assert stage.pop("stage") == "distill"
    made = build(Distill, stage, where="recipe", error=RecipeError)
    assert (made.student, made.args["width"]) == ("resnet8", found["students"][0]["width"])


def test_latencies_come_from_the_table_that_was_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile = find_profile("rpi4b_4gb", profile_paths())
    kinds = ("conv", "pointwise", "depthwise", "dense")
    cost = OpCost(op_s=0.0, mac_s=1e-9, byte_s=0.0)
    table = OpTable(
        profile=profile.name, source="measured", threads=profile.threads, invoke_s=0.0,
        costs={f"{kind} int8": cost for kind in kinds}, error=0.1, same={"runtime_version": profile.runtime_version},
    )  # fmt: skip
    save_op_table(tmp_path, profile, table)
    found = students(capsys, tmp_path, "--all", "--student", "tiny_vit")
    assert found["source"] == "measured"
    for s in found["students"]:  # also what attention multiplies, which is in no layer
        assert s["latency_s"] == pytest.approx(1e-9 * s["macs"], rel=0.01)


def test_where_nothing_fits_the_smallest_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = students(capsys, tmp_path, "--max-bytes", "1 kB", code=2)
    assert found["error"] == "no-student-fits"
    assert "ds_cnn, width 0.25" in found["message"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--input", "28"), "'28' is no shape"),
        (("--input", "0x28x28"), "no shape"),
        (("--student", "resnet9"), "did you mean 'resnet8'"),
        (("--max-latency", "5"), "is not a time"),
        (("--profile", "rpi4"), "unknown device profile"),
        (("--classes", "1"), "at least 2"),
    ],
)
def test_bad_requests_of_students_are_named(
    more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in students(capsys, tmp_path, *more, code=2)["message"]


def test_text_says_what_the_latencies_are_worth(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["students", "--profile", "rpi4b_4gb", "--input", "6x64", "--student", "ds_cnn"]
    assert cli.main([*arguments, "--store", str(tmp_path), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "latency, estimated" in text
    assert "off by a factor of two" in text
    assert 'stage = "distill"' in text


def test_a_student_that_the_zoo_lacks_is_refused_with_a_near_miss() -> None:
    with pytest.raises(RequestError, match="did you mean 'mobilenet_v2'"):
        Distill(student="mobilenet_2")
