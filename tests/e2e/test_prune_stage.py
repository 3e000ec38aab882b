"""Pruning as a stage of a recipe: attention to int8 under a latency target, and the real keyword spotter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepipe.artifact import load_artifact
from edgepipe.op_table import estimate_layers, estimated_table
from edgepipe.profile import find_profile
from edgepipe.resources import profile_paths
from edgepipe.torch_ops.result import describe_layers

from .conftest import EdgepipeRunner

RECIPES = Path(__file__).parents[2] / "ci" / "recipes"

NET = '''\
"""Patches, a transformer layer, four classes."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 64, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 9, 64))
        self.block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        return self.head(self.block(x).mean(1))


def build():
    return Net()
'''

STAGES = """\
[[stages]]
stage = "finetune"
epochs = 4
lr = 0.003
[[stages]]
stage = "prune"
target = { latency = "TARGET us", profile = "rpi4b_4gb" }
importance = "taylor"
ratios = { "block.linear1" = 0.5 }
steps = 2
finetune = { epochs = 1 }
validation = "calibration"
max_drop = "50 points"
[[stages]]
stage = "finetune"
epochs = 4
"""


def latency_s() -> float:
    """What the net of this file is estimated to take on the board."""
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    layers = describe_layers(namespace["build"]().eval(), [torch.zeros(1, 1, 12, 12)])
    profile = find_profile("rpi4b_4gb", profile_paths())
    return estimate_layers(layers, estimated_table(profile)).latency_s


@pytest.mark.slow
def test_a_transformer_is_pruned_to_a_latency_and_survives_int8(
    project: Path, edgepipe: EdgepipeRunner
) -> None:
    (project / "net.py").write_text(NET)
    recipe = project / "recipe.toml"
    text = recipe.read_text().replace("args = { width = 16 }\n", "").replace("reference = 2\n", "reference = 1\n")  # fmt: skip
    start, end = text.index('[[stages]]\nstage = "prune"'), text.index('[[stages]]\nstage = "export')  # fmt: skip
    target_s = 0.8 * latency_s()
    stages = STAGES.replace("TARGET", f"{1e6 * target_s:.3f}")
    recipe.write_text(text[:start] + stages + text[end:])
    done = edgepipe("run", "recipe.toml", "--no-devices", "--json")
    result = json.loads(done.stdout)
    assert "verdicts" in result, done.stdout + done.stderr
    verdicts = {v["gate"]: v["status"] for v in result["verdicts"]}
    assert verdicts["accuracy_drop"] == verdicts["parity"] == "PASS", done.stderr
    assert "latency goes by the estimated operators of rpi4b_4gb" in done.stderr

    (step,) = [s for s in result["steps"] if s["step"] == "prune"]
    pruned = load_artifact(project / ".edgepipe" / "cache" / step["key"])
    facts = pruned.facts
    assert 0.95 * target_s < facts["target"]["reached"] <= facts["target"]["most"] == pytest.approx(target_s, rel=1e-4)  # fmt: skip
    assert facts["channels"]["block.linear1"] == [128, 64]
    assert facts["heads"]["block.self_attn.query"][1] < 4
    assert len(facts["steps"]) == len(facts["epochs"]) == 2
    edits = json.loads((pruned.path / "model.json").read_text())["edits"]
    assert edits[0] == {"edit": "plain_attention", "layer": "block.self_attn"}
    left = facts["heads"]["block.self_attn.query"][1]
    sets = [e for e in edits if e["edit"] == "set"]
    assert sets[-1] == {"edit": "set", "layer": "block.self_attn", "attribute": "num_heads", "value": left}  # fmt: skip
    notes = {layer["name"]: layer["note"] for layer in facts["layers"]}
    assert notes["block.self_attn.query"] == f"4 -> {left} heads"
    assert notes["head"] == "left whole: it makes an output of the model"


@pytest.mark.data
@pytest.mark.slow
def test_the_keyword_spotter_loses_no_point_at_55_percent_of_its_macs_and_int8(
    data_dir: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgepipe", "run", str(RECIPES / "keyword_spotting_pruned.toml"), "--no-devices", "--json", "--store", str(tmp_path)],
        env={**os.environ, "EDGEPIPE_DATA": str(data_dir)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    verdicts = {v["gate"]: v["status"] for v in result["verdicts"]}
    assert verdicts == {"size": "PASS", "accuracy_drop": "PASS", "full_integer": "PASS"}
    (step,) = [s for s in result["steps"] if s["step"] == "prune"]
    facts = load_artifact(tmp_path / "cache" / step["key"]).facts
    assert 0.5 < facts["after"]["macs"] / facts["before"]["macs"] <= 0.55
