"""Running torch folders and .pt2 files on arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepipe.errors import ArtifactError
from edgepipe.torch_ops.model import ModelDescription, build_model, save_model
from edgepipe.torch_ops.run import count_macs, flatten_outputs, run_torch

BUILDER = """\
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)
    def forward(self, x, y):
        return {"sum": self.drop(self.a(x)), "rest": (x * y, [y])}

class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)

class OneOnly(nn.Module):
    def forward(self, x):
        return x.reshape(1, 3) * 2

class Asserts(nn.Module):
    def forward(self, x):
        assert len(x) == 1, "one at a time"
        return 2 * x

class State(nn.Module):
    def forward(self, x):
        return torch.stack([x, 2 * x])

def build(): return Two()
def mixes(): return Mixes()
def one_only(): return OneOnly()
def asserts(): return Asserts()
def state(): return State()
def embedding(): return nn.Embedding(5, 3)
"""


def saved(root: Path, function: str) -> Path:
    (root / "net.py").write_text(BUILDER)
    description = ModelDescription(f"net.py:{function}", root=root)
    save_model(build_model(description), root / function, description)
    return root / function


def test_many_samples_give_what_each_gives_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, "build")
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(600, 3)).astype(np.float32) for _ in range(2))
    together = run_torch(folder, [x, y])
    assert [o.shape for o in together] == [(600, 2), (600, 3), (600, 3)]
    for i in (0, 255, 256, 599):
        for whole, single in zip(together, run_torch(folder, [x[i : i + 1], y[i : i + 1]]), strict=True):  # fmt: skip
            np.testing.assert_allclose(whole[i : i + 1], single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["mixes", "one_only", "asserts"])
def test_a_model_that_cannot_take_a_batch_is_run_one_by_one(tmp_path: Path, function: str) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    (result,) = run_torch(saved(tmp_path, function), [x])
    np.testing.assert_array_equal(result, np.zeros_like(x) if function == "mixes" else 2 * x)


def test_samples_that_begin_alike_do_not_hide_that_a_model_mixes_them(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)[[0, 0, 1, 2]]
    (result,) = run_torch(saved(tmp_path, "mixes"), [x])
    np.testing.assert_array_equal(result, np.zeros_like(x))


def test_a_state_of_two_layers_keeps_both_rows_of_every_sample(tmp_path: Path) -> None:
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    (result,) = run_torch(saved(tmp_path, "state"), [x])
    rows = [row for sample in x for row in (sample, 2 * sample)]
    np.testing.assert_array_equal(result, np.array(rows)[:, None])


def test_what_a_model_raises_on_the_data_is_an_error_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"shape \(3, 1\): IndexError") as caught:
        run_torch(saved(tmp_path, "embedding"), [np.array([[1], [2], [7]])])
    assert "values in the data" in caught.value.hint


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_pt2_gives_what_its_model_gives(tmp_path: Path, dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).eval()
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (torch.zeros(4, 3),), dynamic_shapes=shapes)
    torch.export.save(program, str(tmp_path / "m.pt2"))
    x = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)  # 4 + 4 + 2 filled up
    (result,) = run_torch(tmp_path / "m.pt2", [x])
    with torch.no_grad():
        np.testing.assert_allclose(result, model(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_outputs_are_flattened_in_the_order_they_are_returned() -> None:
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert [t.item() for t in flatten_outputs({"z": c, "a": (a, None, [b])})] == [2, 0, 1]
    with pytest.raises(ArtifactError, match="returns a str"):
        flatten_outputs((a, "text"))


def test_macs_of_a_convolution_are_counted_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x)

    # 8 filters x 3 channels x 9 taps x 100 positions
    assert count_macs(Net(), [torch.zeros(1, 3, 10, 10)]) == 8 * 3 * 9 * 100


def test_multiply_accumulates_of_a_model_that_takes_a_parameter_apart_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.first = nn.LSTMCell(3, 4), nn.Parameter(torch.ones(2, 1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, c = self.first
            return self.cell(x, (h, c))[0]

    net = Net()
    assert count_macs(net, [torch.zeros(1, 3)]) == 16 * 3 + 16 * 4
    assert all(parameter.requires_grad for parameter in net.parameters())
