"""Stage ``qat``: train the float TFLite graph so that it survives int8."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgepipe.artifact import Artifact, make_artifact
from edgepipe.data import at_most
from edgepipe.errors import StageError, StageOptionError
from edgepipe.predict import with_states
from edgepipe.schema import record
from edgepipe.stage import StageContext
from edgepipe.stages.quantize_int8 import source_specs
from edgepipe.state import state_numbers
from edgepipe.training import TrainingOptions

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from edgepipe.array_ops.load import Samples

log = logging.getLogger(__name__)

# Samples on which the int8 file must compute what was trained, and the share of output values that
# must be within one step. Every operator is; over a deep network LiteRT's own two sets of kernels
# (XNNPACK's and the built-in ones) drift apart by more than that, and this only catches mistakes.
AGREEMENT_SAMPLES = 64
AGREEMENT_SEQUENCES = 8
MIN_WITHIN_ONE = 0.95
# A gate makes several steps of one: the sigmoid of an input in steps of 0.07 moves by up to 0.07 / 4, 4.5
# steps of 1/256. So of a model with state the difference may instead be this far below the outputs, where
# int8's own rounding is (a GRU that was trained on spoken words: 40 dB, 96 % within one step).
MIN_SQNR_DB = 30.0


@record
class Qat(TrainingOptions):
    """Quantisation-aware training, between ``to_tflite`` and ``quantize_int8``.

    Works on the converted graph: batch norms are folded and activations fused as in the file that
    ships. Ranges start from ``calibration`` data as post-training quantisation takes them; with
    ``ranges = "learned"`` they are trained with the weights until ``freeze_after`` of the steps (LSQ+),
    with ``"minmax"`` they stay. ``float_weight`` is the share of the loss that asks for the float
    model's own answers instead of the label. ``quantize_int8`` then takes the ranges as they are.
    A model with state is trained along sequences, its states rounded from step to step as the int8 file's.
    """

    name: ClassVar[str] = "qat"
    title: ClassVar[str] = "train the converted model with int8 rounding, weights and ranges"
    accepts: ClassVar[tuple[str, ...]] = ("tflite",)
    produces: ClassVar[str] = "tflite"
    ops: ClassVar[tuple[str, ...]] = (
        "edgepipe.training", "edgepipe.torch_ops.qat", "edgepipe.torch_ops.tflite_module", "edgepipe.torch_ops.sequences", "edgepipe.predict",
        "edgepipe.torch_ops.train", "edgepipe.torch_ops.augment", "edgepipe.torch_ops.data",
        "edgepipe.torch_ops.edits", "edgepipe.torch_ops.attention",
        "edgepipe.tflite_ops.quantize", "edgepipe.tflite_ops.flatbuffer", "edgepipe.array_ops", "edgepipe.state",
    )  # fmt: skip
    packages: ClassVar[tuple[str, ...]] = ("torch", "litert-quantizer", "ai-edge-litert", "numpy")

    epochs: int = 5
    lr: float = 1e-4
    weight_decay: float = 0.0
    calibration: str = "calibration"
    samples: int = 500
    ranges: Literal["learned", "minmax"] = "learned"
    freeze_after: float = 0.8
    float_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.freeze_after <= 1 or not 0 <= self.float_weight <= 1:
            raise StageOptionError("qat: freeze_after and float_weight are shares from 0 to 1")

    def data_names(self) -> tuple[str, ...]:
        return (*super().data_names(), self.calibration)

    def run(self, artifact: Artifact, context: StageContext) -> Artifact:
        import copy

        from edgepipe.array_ops.calibration import file_batches
        from edgepipe.array_ops.load import load_samples
        from edgepipe.tflite_ops import quantize as quantizing
        from edgepipe.torch_ops import qat as ops
        from edgepipe.torch_ops.data import training_set
        from edgepipe.torch_ops.sequences import source_axes, unrolled
        from edgepipe.torch_ops.tflite_module import TfliteModule
        from edgepipe.torch_ops.train import accuracy, train

        where = artifact.path.name
        specs, states = source_specs(artifact.inputs), state_numbers(artifact)
        content, _ = quantizing.fuse_activations(artifact.path.read_bytes(), where=where)
        body = TfliteModule(content, artifact.inputs, artifact.outputs, where=where)
        data = training_set(context.data[self.data], specs)
        validation = training_set(context.data[self.validation], specs) if self.validation else None
        source = at_most(context.data[self.calibration], self.samples)
        calibration = with_states(load_samples(source, specs), artifact)
        log.info("ranges start from %d samples", len(calibration))
        batches = list(file_batches(calibration, artifact.inputs))
        start = quantizing.collect_ranges(content, batches, where=where, total=len(batches)).table()
        start = quantizing.joined_states(content, start, states, where=where)
        owners = ops.range_owners(content, where=where, states=states)
        model = ops.QatModel(body, owners, start, learned=self.ranges == "learned")
        axes = source_axes(artifact)  # a graph of one sample takes any number of them
        whole = unrolled(model, artifact, data, back_steps=self.back_steps, axes=axes)
        judged = validation or data
        scores: dict[str, Any] = {"before": {"int8": accuracy(whole, judged)}}
        with model.as_float():
            scores["before"]["float"] = accuracy(whole, judged)
        teacher: nn.Module | None = None
        if self.float_weight:
            before = copy.deepcopy(body)  # its hooks still lead to `model`: take them off
            before.on_activation = before.on_weight = lambda value, name: value
            before.requires_grad_(False)
            teacher = unrolled(before, artifact, data, axes=axes)
        history = train(
            whole,
            data,
            self,
            seed=context.seed,
            stage=self.name,
            validation=validation,
            objective=ops.objective(self.label_smoothing, teacher, self.float_weight),
            after_step=ops.freeze_after(model, self.freeze_after),
            checkpoint=context.checkpoint,
        )
        scores["after"] = {"int8": accuracy(whole, judged)}
        log.info(
            "%s accuracy with int8 rounding: %.2f %% before, %.2f %% after (float %.2f %%)",
            "validation" if validation else "training", 100 * scores["before"]["int8"],
            100 * scores["after"]["int8"], 100 * scores["before"]["float"],
        )  # fmt: skip
        baked = model.baked(content)
        learned = model.learned_ranges()
        int8 = quantizing.quantize(baked, learned, states=states, where=where)
        if states:
            shown, length = _sequences(calibration, artifact)
            agreed, apart = (
                ops.agreement(model, int8, shown, where=where, states=states, length=length, goes_on=how)
                for how in ("together", "apart")
            )  # fmt: skip
            alone = {"agreement_apart": dataclasses.asdict(apart)}
        else:
            agreed = ops.agreement(model, int8, batches[:AGREEMENT_SAMPLES], where=where)
            alone = {}
        is_near = bool(states) and agreed.sqnr_db >= MIN_SQNR_DB
        if agreed.within_one < MIN_WITHIN_ONE and not is_near:
            raise StageError(
                f"the int8 file of {where} departs from what was trained: only {100 * agreed.within_one:.2f} % "
                f"of {agreed.values} output values are within one step ({agreed.sqnr_db:.0f} dB)",
                stage=self.name,
                hint="quantise this model without qat, and report the model that shows it",
                code="qat-parity",
            )
        path = context.work_dir / "model.tflite"
        path.write_bytes(baked)
        return make_artifact(
            "tflite",
            path,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            parent=artifact,
            facts={
                "learned_ranges": {name: list(ends) for name, ends in learned.items()},
                "accuracy": scores,
                "agreement": dataclasses.asdict(agreed),
                **alone,
                "seed": context.seed,
                "epochs": [dataclasses.asdict(epoch) for epoch in history],
            },
        )


def _sequences(samples: Samples, artifact: Artifact) -> tuple[list[Sequence[np.ndarray]], int]:
    """The first few sequences as single inferences of the file, step after step, and how long one is."""
    from edgepipe.array_ops.calibration import file_batches
    from edgepipe.array_ops.roll import one_by_one

    assert samples.states_from is not None
    few = samples.take(range(min(len(samples), AGREEMENT_SEQUENCES)))
    single = one_by_one(samples.states_from, artifact.inputs, few.inputs)
    plain = [dataclasses.replace(spec, fed_by="") for spec in artifact.inputs]
    batches: list[Sequence[np.ndarray]] = list(
        file_batches(dataclasses.replace(few, inputs=single, labels=None), plain)
    )
    return batches, len(batches) // len(few)
