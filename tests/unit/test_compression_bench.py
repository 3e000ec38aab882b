"""ci/bench/compression.py: rows are kept and made once, and the tables say what was not measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgepipe.errors import StageError

FILE = Path(__file__).parents[2] / "ci" / "bench" / "compression.py"


@pytest.fixture(scope="module")
def compression() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("compression_bench", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_row_is_made_once_and_then_kept(
    compression: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def row(bench: object, name: str) -> dict[str, object]:
        made.append(name)
        return {"peak_rss_bytes": 200_000_000, "note": ""}

    monkeypatch.setitem(compression.ROWS, "memory/plain", row)
    bench = compression.Bench(tmp_path)
    first = compression.make_row(bench, "memory/plain")
    assert compression.make_row(bench, "memory/plain") == first
    assert made == ["memory/plain"]
    assert first["command"].endswith("--only memory/plain")


def test_a_row_that_failed_is_tried_again(
    compression: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(bench: object, name: str) -> dict[str, object]:
        raise StageError("cannot", stage="prune")

    monkeypatch.setitem(compression.ROWS, "alone/prune", row)
    failed = compression.make_row(compression.Bench(tmp_path), "alone/prune")
    assert failed["error"] == "cannot"
    monkeypatch.setitem(compression.ROWS, "alone/prune", lambda bench, name: {"note": "well"})
    assert compression.make_row(compression.Bench(tmp_path), "alone/prune")["note"] == "well"


def test_the_table_compares_with_the_plain_loop_and_shows_what_is_missing(
    compression: ModuleType,
) -> None:
    lines = compression.table(
        [
            {"row": "memory/plain", "peak_rss_bytes": 200_000_000, "note": ""},
            {"row": "memory/qat", "peak_rss_bytes": 300_000_000, "note": ""},
            {"row": "memory/distill", "error": "no teacher"},
        ]
    )
    assert "| memory/qat | 300 MB | 1.50x |" in lines
    assert "| memory/distill | not measured: no teacher |" in lines


def test_accuracy_of_a_file_is_that_of_its_largest_score(
    compression: ModuleType, tmp_path: Path
) -> None:
    np = pytest.importorskip("numpy")
    from edgepipe.tflite_ops.tiny import tiny_tflite

    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_tflite(size=4))
    model = compression.open_tflite(path)
    shape = tuple(model.get_input_details()[0]["shape"][1:])
    inputs = np.random.default_rng(0).normal(size=(20, *shape)).astype(np.float32)
    answers = []
    for row in inputs:
        model.set_tensor(model.get_input_details()[0]["index"], row[np.newaxis])
        model.invoke()
        answers.append(int(model.get_tensor(model.get_output_details()[0]["index"]).argmax()))
    labels = np.array(answers)
    assert compression.tflite_accuracy(path, inputs, labels) == 1.0
    labels[:5] = (labels[:5] + 1) % 4
    assert compression.tflite_accuracy(path, inputs, labels) == 0.75
