"""The registry of stages: name -> module and class. Modules are light; they are imported on use."""

from __future__ import annotations

import importlib

from edgepipe.stage import Stage

STAGES: dict[str, tuple[str, str]] = {
    "finetune": ("edgepipe.stages.finetune", "Finetune"),
    "distill": ("edgepipe.stages.distill", "Distill"),
    "prune": ("edgepipe.stages.prune", "Prune"),
    "low_rank": ("edgepipe.stages.low_rank", "LowRank"),
    "sparsify": ("edgepipe.stages.sparsify", "Sparsify"),
    "export_onnx": ("edgepipe.stages.export_onnx", "ExportOnnx"),
    "to_tflite": ("edgepipe.stages.to_tflite", "ToTflite"),
    "qat": ("edgepipe.stages.qat", "Qat"),
    "quantize_int8": ("edgepipe.stages.quantize_int8", "QuantizeInt8"),
    "quantize": ("edgepipe.stages.quantize", "Quantize"),
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage; KeyError for an unknown name."""
    module, attribute = STAGES[name]
    return getattr(importlib.import_module(module), attribute)
