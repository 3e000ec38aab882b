"""What a compressing stage says of its result is counted, not guessed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgepipe.torch_ops.result import describe_layers, totals
from edgepipe.torch_ops.run import count_macs


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.depthwise(self.norm(self.conv(x)))).mean((2, 3)))


def test_layers_are_counted_as_torch_counts_them() -> None:
    model, inputs = Mixed().eval(), [torch.randn(1, 3, 8, 8)]
    layers = describe_layers(model, inputs, {"conv": "halved"})
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(*inputs)
    found = totals(layers)
    assert found["macs"] == counter.get_total_flops() // 2
    unused = sum(p.numel() for p in model.unused.parameters())
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) - unused
    assert [layer.name for layer in layers] == ["conv", "norm", "depthwise", "up", "head"]
    by_name = {layer.name: layer for layer in layers}
    assert by_name["head"].bytes == 4 * 5 + 5 * 4
    assert (by_name["conv"].note, by_name["head"].note) == ("halved", "")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GRU(6, 5), (7, 1, 6)),
        (nn.GRU(6, 5, num_layers=2, bidirectional=True, batch_first=True), (1, 7, 6)),
        (nn.LSTM(6, 5, num_layers=2), (7, 1, 6)),
        (nn.LSTM(6, 5), (7, 6)),
        (nn.RNN(6, 5, batch_first=True), (1, 7, 6)),
        (nn.LSTMCell(6, 5), (1, 6)),
        (nn.GRUCell(6, 5), (1, 6)),
    ],
)
def test_recurrent_layers_cost_all_their_matrices_at_each_step(layer: nn.Module, shape: tuple[int, ...]) -> None:  # fmt: skip
    found = totals(describe_layers(layer.eval(), [torch.randn(shape)]))
    steps = 1 if isinstance(layer, nn.RNNCellBase) else 7
    assert found["macs"] == steps * sum(p.numel() for n, p in layer.named_parameters() if "weight" in n)  # fmt: skip
    assert count_macs(layer, [torch.randn(shape)]) == found["macs"]


def test_counts_are_for_one_sample_whatever_the_batch() -> None:
    model = Mixed().eval()
    one, four = (totals(describe_layers(model, [torch.randn(n, 3, 8, 8)])) for n in (1, 4))
    assert one == four
