"""Operators that ONNX lacks are captured as others that compute the same: PyTorch itself is the judge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from edgepipe.torch_ops.equivalents import bake_parametrizations, whole_bags, with_known_operators

pytestmark = pytest.mark.slow  # each is captured by torch.export


class Calls(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.cdist(x, x[:, :2] + 0.5), "cdist"),
        (lambda x: torch.cdist(x, x + 0.5, p=1), "cdist"),
        (lambda x: torch.cdist(x, x + 0.5, p=3), "cdist"),
        (lambda x: torch.cdist(x, x + 0.5, p=float("inf")), "cdist"),
        (lambda x: torch.hypot(x, x.flip(1)), "hypot"),
        (lambda x: x.median(1), "median"),
        (lambda x: x.median(2, keepdim=True), "median"),
        (lambda x: x.median(), "median"),
        (lambda x: x.kthvalue(3, dim=2), "kthvalue"),
        (lambda x: F.adaptive_max_pool2d(x, (3, 2)), "max_pool"),
        (lambda x: F.rrelu(x, 0.1, 0.4), "rrelu"),
    ],
)  # fmt: skip
def test_an_operator_that_onnx_lacks_is_written_with_others(
    function: Callable[[torch.Tensor], object], operator: str
) -> None:
    x = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Calls(function).eval(), (x,))
    assert any(operator in str(node.target) for node in program.graph.nodes)
    written = with_known_operators(program)
    assert not any(operator in str(node.target) for node in written.graph.nodes)
    torch.testing.assert_close(written.module()(x), program.module()(x))


def test_a_program_without_such_operators_stays_itself() -> None:
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    assert with_known_operators(program) is program


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_bags_of_one_size_are_embeddings(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding)
    nn.init.normal_(bag.weight)
    tokens = torch.tensor([[0, 0, 0, 0], [5, 5, 5, 5], [0, 5, 2, 3], [1, 1, 4, 0]])
    with whole_bags():
        program = torch.export.export(bag.eval(), (tokens,))
    assert not any("bag" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(tokens), bag(tokens))


def test_a_pool_whose_places_are_read_is_left_as_it_is() -> None:
    pool = nn.AdaptiveMaxPool2d((3, 2), return_indices=True)
    program = torch.export.export(pool, (torch.zeros(1, 4, 5),))
    assert with_known_operators(program) is program


def test_bags_of_their_own_sizes_are_left_to_pytorch() -> None:
    bag = nn.EmbeddingBag(6, 3)
    with whole_bags():
        torch.testing.assert_close(bag(torch.arange(6), torch.tensor([0, 2])), nn.EmbeddingBag.forward(bag, torch.arange(6), torch.tensor([0, 2])))  # fmt: skip


def test_parametrized_weights_become_what_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
    ).eval()
    x = torch.randn(2, 4)
    expected = model(x)
    bake_parametrizations(model)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(f"{i}.{n}" for i in range(3) for n in ("weight", "bias"))  # fmt: skip
    torch.testing.assert_close(model(x), expected)
