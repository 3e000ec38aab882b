"""Which conversions are tried, which is the best, and what a person reads about them."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from edgepipe import toolchain
from edgepipe.report import text_table
from edgepipe.routes import (
    Attempt,
    attempts_table,
    best,
    candidates,
    is_clean,
    is_worthwhile,
    reason,
)


def proven(route: str = "onnx2tf", **changes: Any) -> Attempt:
    exporter = "torch.export" if route == "litert-torch" else "dynamo"
    facts = {"transposes": 0, "transpose_bytes": 0, "operators": 10, "bytes": 1000, "parity": 1e-7}
    return Attempt(route, exporter, route != "litert-torch", ok=True, **{**facts, **changes})


def test_auto_tries_the_other_converter_before_variants_of_the_first() -> None:
    tried = [str(c) for c in candidates("auto", exporter="dynamo", has_program=True)]
    assert tried == [
        "onnx2tf from dynamo", "litert-torch", "onnx2tf from torchscript", "onnx2tf from dynamo, not simplified",
        "onnx2tf from torchscript, not simplified", "tf from dynamo", "tf from torchscript",
    ]  # fmt: skip


def test_without_a_program_there_is_no_second_exporter_and_litert_torch_is_still_on_record() -> (
    None
):
    tried = [str(c) for c in candidates("auto", exporter="given", has_program=False)]
    assert tried == ["onnx2tf from given", "litert-torch", "onnx2tf from given, not simplified", "tf from given"]  # fmt: skip


def test_a_loose_relu6_is_the_converters_fault_and_an_exp_of_the_model_is_not() -> None:
    loose = proven(loose_ops={"RELU6": 1})
    assert not is_clean(loose, transposes=0, source_operators=["Conv", "Clip"])
    own = proven(loose_ops={"EXP": 1, "REDUCE_MAX": 2})
    assert is_clean(own, transposes=0, source_operators=["Exp", "ReduceMax"])


def test_a_transpose_that_the_model_asks_for_is_clean_and_one_more_is_not() -> None:
    assert is_clean(proven(transposes=2), transposes=2, source_operators=[])
    assert not is_clean(proven(transposes=3), transposes=2, source_operators=[])


def test_the_best_is_clean_then_has_the_fewest_loose_operators_then_the_fewest_transposes() -> None:
    loose = proven(transposes=1, loose_ops={"RELU6": 1})
    many = proven(transposes=2)
    assert best([many, loose]) is many
    clean = dataclasses.replace(loose, clean=True)
    assert best([many, clean]) is clean
    assert best([many, proven(transposes=1, bytes=10_000)]).bytes == 10_000


def tried_by_auto(results: dict[str, Attempt]) -> list[str]:
    """What auto tries where nothing is clean: candidate -> its result, all others refuse."""
    attempts: list[Attempt] = []
    for way in candidates("auto", exporter="dynamo", has_program=True):
        if is_worthwhile(way, attempts, ["Conv", "Clip"]):
            refused = Attempt(way.route, way.exporter, way.simplified, ok=False, code="parity")
            attempts.append(results.get(str(way), refused))
    return [str(attempt.candidate) for attempt in attempts]


def test_auto_tries_each_converter_and_another_form_of_the_graph_only_where_int8_gains() -> None:
    twice = ["onnx2tf from dynamo", "litert-torch"]
    forms = ["onnx2tf from torchscript", "onnx2tf from dynamo, not simplified", "onnx2tf from torchscript, not simplified"]  # fmt: skip
    transposed = proven(transposes=3)
    assert tried_by_auto({"onnx2tf from dynamo": transposed}) == twice
    loose = proven(loose_ops={"RELU6": 1})
    assert tried_by_auto({"onnx2tf from dynamo": loose}) == twice + forms
    mended = dataclasses.replace(transposed, exporter="torchscript")
    found = {"onnx2tf from dynamo": loose, "onnx2tf from torchscript": mended}
    assert tried_by_auto(found) == [*twice, forms[0]]


def test_auto_calls_tensorflow_only_where_nothing_else_converts() -> None:
    assert tried_by_auto({})[-2:] == ["tf from dynamo", "tf from torchscript"]
    assert "tf from dynamo" not in tried_by_auto({"litert-torch": proven("litert-torch")})


def test_equal_results_are_told_apart_by_latency_only_where_it_differs_by_a_tenth() -> None:
    first, second = proven(latency_s=1.0), proven("litert-torch", latency_s=0.95)
    assert best([first, second]) is first
    faster = dataclasses.replace(second, latency_s=0.8)
    assert best([first, faster]) is faster


def test_the_table_and_the_reason_say_what_won_and_what_failed() -> None:
    lost = Attempt("onnx2tf", "dynamo", True, ok=False, code="keeps-state", message="...", seconds=4.2)  # fmt: skip
    failed = Attempt("tf", "dynamo", True, ok=False, code="unsupported-op", op="DFT", source_line="net.py:3 in forward: fft(x)")  # fmt: skip
    won = proven("litert-torch", operators=193, bytes=32_100, seconds=15.0, clean=True)
    attempts = [lost, won, failed]
    assert reason(won, attempts, "auto") == "clean; failed: onnx2tf from dynamo: keeps-state, tf from dynamo: unsupported-op"  # fmt: skip
    facts = {"route": "litert-torch", "exporter": "torch.export", "simplified": False, "attempts": [dataclasses.asdict(a) for a in attempts]}  # fmt: skip
    text = text_table(attempts_table(facts))
    rows = [line.split() for line in text.splitlines()[2:]]
    assert rows[0][:4] == ["onnx2tf", "from", "dynamo", "keeps-state"]
    assert rows[1][:7] == ["litert-torch", "chosen", "1.0e-07", "0", "0", "193", "32.1"]
    assert "DFT (net.py:3 in forward: fft(x))" in text


def test_litert_torch_borrows_torch_and_its_lock_does_not_have_it() -> None:
    tool = toolchain.TOOLCHAINS["litert-torch"]
    pinned = {line.partition("==")[0] for line in tool.lock.read_text().splitlines() if "==" in line}  # fmt: skip
    assert "litert-torch" in pinned
    assert "torch" not in pinned
    assert not [name for name in pinned if name.startswith("nvidia")]
    links = toolchain._find_borrowed(tool)
    assert {"torch", "torchgen"} <= {path.name for path in links}
    assert all(path.exists() for path in links)
    assert toolchain.find_python(tool) is None or str(toolchain.find_python(tool)) == sys.executable


def test_the_converters_refusal_is_read_with_its_pytorch_line() -> None:
    """litert-torch 0.10.0's own words about a model that it cannot lower."""
    sys.path.insert(0, str(toolchain.LOCKS))
    try:
        import child
    finally:
        sys.path.remove(str(toolchain.LOCKS))
    words = (
        "Lowering not found: aten.linalg_qr.default\n\nWhile executing %linalg_qr : [num_users=1] = "
        "call_function[target=torch.ops.aten.linalg_qr.default](args = (%mul,), kwargs = {})\nOriginal traceback:\n"
        'File "/home/me/net.py", line 19, in forward\n    return torch.linalg.qr(y)[0]\n'
    )
    found = child._explain(RuntimeError(words))
    assert (found["reason"], found["op"], found["node"]) == ("unsupported-op", "aten.linalg_qr.default", "linalg_qr")  # fmt: skip
    assert found["source_line"] == "net.py:19 in forward: return torch.linalg.qr(y)[0]"
    complex_words = words.replace("Lowering not found: aten.linalg_qr.default", "Unsupported ir element type: complex<f32>")  # fmt: skip
    found = child._explain(RuntimeError(complex_words))
    assert (found["op"], found["message"]) == ("aten.linalg_qr.default", "Unsupported ir element type: complex<f32>")  # fmt: skip
