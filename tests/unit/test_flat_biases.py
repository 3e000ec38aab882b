"""Biases of a converted file have the shape that int8 needs."""

from __future__ import annotations

import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from edgepipe.tflite_ops.convert import flat_biases
from edgepipe.tflite_ops.flatbuffer import parse_model
from edgepipe.tflite_ops.tiny import tiny_tflite


def test_a_bias_of_rank_4_becomes_one_of_rank_1_and_others_stay() -> None:
    plain = tiny_tflite()
    assert flat_biases(plain, where="m") is plain
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(plain))
    model.subgraphs[0].tensors[2].shape = np.array([1, 1, 1, 4], np.int32)
    odd = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    made = parse_model(flat_biases(odd, where="m"), where="m").subgraphs[0]
    assert [t.shape for t in made.tensors] == [(1, 4), (4, 4), (4,), (1, 4)]
