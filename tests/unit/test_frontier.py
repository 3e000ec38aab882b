"""Which precisions no other one beats, why one is slower than float, and what an old runtime lacks."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from edgepipe.frontier import Row, frontier_table, mark_frontier, notes, why_slower


def row(precision, score=0.9, size=100, ratio=1.0, memory=50.0, **more):
    bounds = (ratio, ratio * 0.99, ratio * 1.01)
    return Row(precision, path="x", size_bytes=size, score=score, agreement=score, sqnr_db=20.0, latency_s=ratio / 1e3, latency_ratio=bounds, memory_bytes=memory, **more)  # fmt: skip


def marked(*rows):
    return {r.precision for r in mark_frontier(rows) if r.on_frontier}


def test_what_is_worse_in_something_and_better_in_nothing_is_not_on_the_frontier():
    base = row("float32")
    assert marked(base, row("slow", ratio=2.0)) == {"float32"}
    assert marked(base, row("small", size=50, ratio=2.0)) == {"float32", "small"}
    assert marked(base, row("better", score=0.91, size=200)) == {"float32", "better"}
    assert marked(base, row("best", score=0.91, size=50)) == {"best"}


def test_a_difference_that_two_measurements_of_one_model_have_decides_nothing():
    assert marked(row("float32"), row("same", ratio=1.02)) == {"float32", "same"}
    assert marked(row("float32"), row("better", score=0.91, ratio=1.02)) == {"better"}


def test_a_precision_that_failed_is_never_on_the_frontier_nor_in_its_way():
    failed = Row("int8", error="float islands")
    assert marked(row("float32"), row("slow", ratio=2.0), failed) == {"float32"}


def test_what_not_every_row_has_is_not_compared():
    unmeasured = dataclasses.replace(row("other", size=50), latency_ratio=None, memory_bytes=None)
    assert marked(row("float32"), unmeasured) == {"other"}


values = st.sampled_from([0.5, 0.7, 1.0, 1.5, 2.0])


@given(st.lists(st.tuples(values, values, values), min_size=1, max_size=6))
def test_some_precision_is_always_on_the_frontier_and_each_other_one_is_beaten_by_one_there(
    figures,
):
    rows = [row(str(i), score=s / 2, size=int(100 * b), ratio=r) for i, (s, b, r) in enumerate(figures)]  # fmt: skip
    front = [r for r in mark_frontier(rows) if r.on_frontier]
    assert front
    for other in mark_frontier(rows):
        if not other.on_frontier:
            assert any(
                f.score >= other.score and f.size_bytes <= other.size_bytes and f.cost <= other.cost
                for f in front
            )


def test_slower_than_float_is_said_only_where_the_sessions_exclude_the_opposite():
    slow = dataclasses.replace(row("float16", ratio=1.1), latency_ratio=(1.1, 0.95, 1.3))
    assert why_slower(slow, None) == ()
    assert why_slower(row("float16", ratio=1.1), None)
    hair = dataclasses.replace(row("weight_int8"), latency_ratio=(1.003, 1.001, 1.005))
    assert why_slower(hair, None) == ()
    assert why_slower(row("int8", ratio=0.5), ()) == ()


def test_int8_without_dot_product_is_slow_for_that_reason_unless_the_cores_have_it():
    int8 = row("int8", ratio=1.4, float_islands=2, delegated_share=1.0)
    told = " ".join(why_slower(int8, ()))
    assert "dotprod" in told
    assert "2 float island(s)" in told
    assert "dotprod" not in " ".join(why_slower(int8, ("dotprod",)))
    assert "dotprod" not in " ".join(why_slower(int8, None))  # not known is not no


def test_each_precision_has_its_own_reason_and_an_unknown_one_is_admitted():
    assert "turned back into floats" in why_slower(row("weight_int8", ratio=2.0), None)[0]
    assert "reference kernels" in why_slower(row("int16x8", ratio=20.0), None)[0]
    assert "anew in each inference" in why_slower(row("dynamic_int8", ratio=2.0), None)[0]
    assert "builtin kernels" in why_slower(row("int8", ratio=2.0, delegated_share=0.2), None)[0]
    assert "no reason found" in why_slower(row("int8", ratio=2.0), None)[0]


def test_instructions_stand_for_time_on_an_emulated_board():
    counted = dataclasses.replace(row("weight_int8"), latency_s=None, latency_ratio=None, instructions=3e6, instructions_ratio=1.5)  # fmt: skip
    assert counted.is_slower
    table = frontier_table([counted], metric="top1", device="virt-pi-4")
    assert "1.50 (instructions)" in table.rows[0]
    assert "latency" not in table.header


def test_notes_name_failures_and_what_an_old_runtime_lacks():
    need = {"operator": "FULLY_CONNECTED", "version": 12, "tflite": "2.17.0", "why": "w"}
    rows = [row("dynamic_int8", runtime_needs=(need,)), Row("int8", error="2 float islands")]
    assert any("TensorFlow Lite 2.17.0" in line for line in notes(rows))
    assert any("2.17.0" in line for line in notes(rows, runtime=("tflite-runtime", "2.14.0")))
    for fine in (("tflite-runtime", "2.17.0"), ("litert", "2.3.0")):
        assert not any("2.17.0" in line for line in notes(rows, runtime=fine))
    assert "int8: 2 float islands" in notes(rows)


def test_instructions_are_not_called_time():
    counted = dataclasses.replace(
        row("int8"), latency_ratio=None, instructions_ratio=1.5, why=("w",)
    )
    assert notes([counted]) == ["int8 takes more instructions than float (1.50x): w"]
    assert notes([row("int8", ratio=1.5, why=("w",))]) == ["int8 is slower than float (1.50x): w"]
