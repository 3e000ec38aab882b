"""Imports point one way, and only the named modules may import a framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from edgepipe.stages import STAGES, stage_class
from edgepipe.stages.load import LoadModel

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "edgepipe"

FRAMEWORKS = (
    "torch", "torch_pruning", "tensorly", "safetensors", "tensorflow", "onnx", "onnxscript", "onnxruntime", "onnx2tf", "litert_torch",
    "ai_edge_litert", "litert_quantizer", "paramiko", "numpy", "scipy", "PIL", "sklearn",
)  # fmt: skip

# Who may import what, anywhere in the file. Longest prefix wins; nobody else may at all.
ALLOWED = {
    "edgepipe.torch_ops": {"torch", "torch_pruning", "tensorly", "safetensors", "onnx", "numpy"},
    "edgepipe.tflite_ops": {"onnx", "onnxruntime", "ai_edge_litert", "litert_quantizer", "numpy"},
    "edgepipe.array_ops": {"numpy", "PIL"},
    "edgepipe.device.ssh": {"paramiko"},
    # scripts that run inside a converter's own environment, never imported by edgepipe
    "edgepipe.toolchains": {"onnx", "onnx2tf", "tensorflow", "torch", "litert_torch", "numpy"},
}

# Layers: a module imports only from its own layer or one further right.
LAYERS = (
    ("edgepipe.cli", "edgepipe.commands", "edgepipe.__main__"),
    ("edgepipe.pipeline", "edgepipe.merge", "edgepipe.judge", "edgepipe.report", "edgepipe.layer_report", "edgepipe.ci_output", "edgepipe.recipe", "edgepipe.adhoc", "edgepipe.frontier", "edgepipe.layer_html"),
    ("edgepipe.bench", "edgepipe.benchmark_model", "edgepipe.evaluate", "edgepipe.inventory", "edgepipe.lab", "edgepipe.baseline", "edgepipe.explain", "edgepipe.layer_explain", "edgepipe.calibration", "edgepipe.op_timing", "edgepipe.testing", "edgepipe.probe", "edgepipe.doctor"),
    ("edgepipe.stages", "edgepipe.device", "edgepipe.store", "edgepipe.runtime", "edgepipe.parity", "edgepipe.input_range", "edgepipe.routes", "edgepipe.payload", "edgepipe.preflight", "edgepipe.job", "edgepipe.crunner", "edgepipe.glibc", "edgepipe.android", "edgepipe.op_table", "edgepipe.emulator"),
    ("edgepipe.predict", "edgepipe.toolchain", "edgepipe.toolchains"),
    ("edgepipe.torch_ops", "edgepipe.tflite_ops"),
    ("edgepipe.array_ops",),
    ("edgepipe.stage", "edgepipe.state", "edgepipe.pruning", "edgepipe.range_table", "edgepipe.rescue", "edgepipe.host_memory", "edgepipe.training", "edgepipe.distillation", "edgepipe.students", "edgepipe.gate", "edgepipe.profile", "edgepipe.match", "edgepipe.emulated", "edgepipe.resources"),
    ("edgepipe.data", "edgepipe.artifact", "edgepipe.measurement", "edgepipe.metrics", "edgepipe.sessions", "edgepipe.stats"),
    ("edgepipe.schema", "edgepipe.table"),
    ("edgepipe.units", "edgepipe.password"),
    ("edgepipe.errors",),
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names imported by a file; with ``top_level_only`` those run when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (top_level_only and (inside or typing_only)) and not typing_only:
                pending.append(child)
    return found


def prefix_of(name: str, prefixes: tuple[str, ...] | dict[str, set[str]]) -> str:
    matching = [p for p in prefixes if name == p or name.startswith(p + ".")]
    return max(matching, key=len, default="")


@pytest.mark.parametrize("name", MODULES)
def test_only_the_named_modules_import_a_framework(name: str) -> None:
    allowed = ALLOWED.get(prefix_of(name, ALLOWED), set())
    used = {i.partition(".")[0] for i in imports(MODULES[name])} & set(FRAMEWORKS)
    assert used <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    def rank(module: str) -> int | None:
        for number, layer in enumerate(LAYERS):
            if prefix_of(module, layer):
                return number
        return None

    own = rank(name)
    if name == "edgepipe":
        return
    assert own is not None, f"{name} has no layer: add it to LAYERS"
    for imported in imports(MODULES[name]):
        if imported in MODULES and imported != "edgepipe":
            other = rank(imported)
            assert other is not None
            # cli is the front door: commands are handed its Output type
            assert other >= own or (imported == "edgepipe.cli"), f"{name} imports {imported}"


def test_ops_are_imported_only_inside_functions() -> None:
    for name, path in MODULES.items():
        if not prefix_of(name, tuple(ALLOWED)):
            top = imports(path, top_level_only=True)
            heavy = {
                i for i in top if i.startswith("edgepipe.") and i.split(".")[1].endswith("_ops")
            }
            assert not heavy, f"{name} imports {heavy} at its top"


def test_importing_every_light_module_loads_no_framework() -> None:
    light = [n for n in MODULES if not prefix_of(n, tuple(ALLOWED)) and n != "edgepipe.__main__"]
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}: importlib.import_module(name)\n"
        f"print(sorted(set({FRAMEWORKS!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "targets").rglob("*.py")), ids=lambda p: p.name)
def test_what_runs_on_a_board_is_python_3_7_and_needs_no_package(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 7))
    ours = {p.stem for p in path.parent.glob("*.py")} | set(sys.stdlib_module_names)
    runtimes = {"numpy", "ai_edge_litert", "tflite_runtime"}  # only inside functions
    assert {i.partition(".")[0] for i in imports(path, top_level_only=True)} <= ours
    assert {i.partition(".")[0] for i in imports(path)} <= ours | runtimes


def test_a_stage_that_reads_data_is_keyed_by_all_that_reads_it() -> None:
    """What load.py imports decides results, too; else a mended reader leaves old results in the cache."""
    reading, pending = set[str](), {"edgepipe.array_ops.load"}
    while pending:
        module = pending.pop()
        reading.add(module)
        found = {name for name in imports(MODULES[module]) if name in MODULES}
        pending |= {
            n for n in found if n.startswith("edgepipe.array_ops.") or n == "edgepipe.state"
        } - reading
    assert {"edgepipe.array_ops.readers", "edgepipe.state"} <= reading
    # to_tflite only proves by data what it made without
    for stage in map(stage_class, STAGES.keys() - {"to_tflite"}):
        named = tuple(f"{op}." for op in stage.ops)
        missing = sorted(m for m in reading if not f"{m}.".startswith(named))
        assert not missing, f"{stage.name}: {missing}"


@pytest.mark.parametrize("name", ["load", "to_tflite", "quantize_int8", "quantize"])
def test_a_stage_that_makes_tflite_files_is_keyed_by_all_that_makes_them(name: str) -> None:
    stage = LoadModel if name == "load" else stage_class(name)
    # what else decides about a file, beside the modules that make it
    making = (
        "edgepipe.input_range",
        "edgepipe.parity",
        "edgepipe.predict",
        "edgepipe.range_table",
        "edgepipe.rescue",
        "edgepipe.routes",
        "edgepipe.state",
        "edgepipe.stats",
        "edgepipe.tflite_ops.",
        "edgepipe.torch_ops.rounding",
        "edgepipe.torch_ops.tflite_module",
    )
    reached, pending = set[str](), {stage.__module__}
    while pending:
        module = pending.pop()
        reached.add(module)
        found = imports(MODULES[module]) & MODULES.keys()
        pending |= {n for n in found if n.startswith(making)} - reached
    assert "edgepipe.tflite_ops.run" in reached
    named = tuple(f"{op}." for op in stage.ops)
    missing = sorted(m for m in reached - {stage.__module__} if not f"{m}.".startswith(named))
    assert not missing
