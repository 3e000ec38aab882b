"""Doors: a TRANSPOSE changes the layout and neither names nor values; every output has a tensor of its own."""

import numpy as np
import pytest

from edgepipe.errors import StageError
from edgepipe.stage import StageContext
from edgepipe.stages.to_tflite import _check_runs
from edgepipe.tflite_ops.doors import move_axes, own_outputs, unmade_outputs
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.run import open_tflite

from .tflite_builder import Graph


def sum_and_difference(shape):
    """Inputs a and b -> a + b, which is read again inside, and (a + b) - b."""
    graph = Graph()
    a, b = graph.input("a", shape), graph.input("b", shape)
    total = graph.op("ADD", [a, b], "sum", shape, "AddOptions")
    return graph.bytes([total, graph.op("SUB", [total, b], "difference", shape, "SubOptions")])


@pytest.mark.parametrize(
    ("inner", "outer", "shape", "axes"),
    [
        ("NHWC", "NCHW", (1, 2, 3, 4), (0, 3, 1, 2)),
        ("NDHWC", "NCDHW", (1, 2, 3, 4, 5), (0, 4, 1, 2, 3)),
    ],
)
def test_doors_move_axes_and_keep_names_and_values(inner, outer, shape, axes):
    content = sum_and_difference(shape)
    moved = move_axes(content, {1: (inner, outer)}, {0: (inner, outer)})
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=shape).astype(np.float32) for _ in range(2))
    run = open_tflite(moved).get_signature_runner("serving_default")
    found = run(a=a, b=b.transpose(axes))
    np.testing.assert_array_equal(found["sum"], (a + b).transpose(axes))
    np.testing.assert_array_equal(found["difference"], (a + b) - b)
    graph = parse_model(moved, where="moved").subgraphs[0]
    doors = [[graph.tensors[i] for i in side] for side in (graph.inputs, graph.outputs)]
    outside = tuple(shape[i] for i in axes)
    assert [[(t.name, t.shape) for t in side] for side in doors] == [
        [("a", shape), ("b", outside)],
        [("sum", outside), ("difference", shape)],
    ]
    names = [t.name for t in graph.tensors]
    assert len(set(names)) == len(names)
    versions = {o.version for o in graph.operators if o.name == "TRANSPOSE"}
    assert versions == {4 if len(shape) == 5 else 1}


def test_an_output_that_is_an_input_or_another_output_gets_a_tensor_of_its_own():
    graph = Graph()
    a, b = graph.input("a", (1, 3)), graph.input("b", (1, 3))
    total = graph.op("ADD", [a, b], "sum", (1, 3), "AddOptions")
    content = graph.bytes([total, b, total, total])
    made = own_outputs(content, where="made")
    inner = parse_model(made, where="made").subgraphs[0]
    assert len({*inner.inputs, *inner.outputs}) == 2 + 4
    interpreter = open_tflite(made)
    values = [np.float32([[1, 2, 3]]), np.float32([[10, 20, 30]])]
    for detail, array in zip(interpreter.get_input_details(), values, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    found = [interpreter.get_tensor(d["index"]).tolist() for d in interpreter.get_output_details()]
    assert found == [[[11, 22, 33]], [[10, 20, 30]], [[11, 22, 33]], [[11, 22, 33]]]
    (signature,) = parse_model(made, where="made").signatures
    assert {*signature.outputs.values()} <= {*inner.outputs}
    assert own_outputs(made, where="made") is made


def test_an_output_that_nothing_makes_is_named(tmp_path):
    graph = Graph()
    a = graph.input("a", (1, 3))
    made = graph.op("ADD", [a, a], "sum", (1, 3), "AddOptions")
    lost = graph.input("lost", (1, 3))
    assert graph.inputs.pop() == lost
    content = graph.bytes([made, a, lost, graph.const("k", np.zeros(3, np.float32))])
    assert unmade_outputs(parse_model(content, where="x").subgraphs[0]) == ["lost"]
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    context = StageContext(work_dir=tmp_path, data={}, seed=0, log_path=tmp_path / "log.txt")
    with pytest.raises(StageError, match="lost output 'lost'") as caught:
        _check_runs(path, context)
    assert (caught.value.code, "once" in caught.value.hint) == ("invalid-graph", True)
