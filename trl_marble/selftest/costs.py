# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a step costs: passes, times, images per second, and peak memory beside the computed one."""

from statistics import median

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..pipelines import measured_linears
from ..step_times import GB
from ..trainer import MarbleNFTTrainer
from .live_tensors import LiveTensors
from .passes import count_passes
from .subject import Subject
from .verdicts import Failed, Finding


STEPS = 3


def check_costs(subject: Subject) -> Finding:
    """
    Train for a few steps: two backward passes for each micro-step, whatever the number of rewards.

    The computed memory adds up the tensors that exist at the same time, as the table in docs/scaling.md does; the
    measured one is what PyTorch's allocator reports, which only a GPU has.
    """
    with subject.trainer(bf16=subject.bf16, max_steps=STEPS, regularizer_fraction=1.0) as trainer:
        with count_passes(trainer.flow.transformer) as passes:
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "time/step" in entry][1:]  # the first step warms up
        times = {
            name.removeprefix("time/"): median(entry[name] for entry in logs)
            for name in logs[0]
            if name.startswith("time/")
        }
        micro_steps = STEPS * trainer.update.grid.per_sample * trainer.args.gradient_accumulation_steps
        weighs = measured_linears(trainer.weights.flow, trainer.weights.trained, False, 4) is not None
        rate = median(entry["images_per_second"] for entry in logs)
    with subject.trainer(bf16=subject.bf16) as trainer:
        memory = _memory(trainer)
    counts = {"forwards": passes.forwards, "backwards": passes.backwards}
    measured = {"passes": counts, "seconds": times, "images_per_second": rate, "memory": memory}
    if weighs and passes.backwards != 2 * micro_steps:
        raise Failed(
            f"{passes.backwards} backward passes in {micro_steps} micro-steps; there have to be two in each",
            **measured,
        )
    peak = memory["measured_gb"]
    beside = "not known on this device" if peak is None else f"{peak:.2f} GB"
    return Finding(
        f"{times['step']:.2f} s a step, {rate:.2f} images per second, {passes.backwards} backward passes in "
        f"{micro_steps} micro-steps; peak memory {beside}, computed {memory['computed_gb']:.2f} GB",
        measured,
    )


def _memory(trainer: MarbleNFTTrainer) -> dict[str, float | None]:
    """The peak of one step, in GB: computed from the sizes of tensors, and measured where the device knows it."""
    device = trainer.args.device
    held = _held(trainer.pipeline, trainer)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with LiveTensors() as tensors:
        trainer.train()
    return {
        "computed_gb": (held + tensors.peak) / GB,
        "measured_gb": torch.cuda.max_memory_allocated(device) / GB if on_gpu else None,
    }


def _held(pipeline: DiffusionPipeline, trainer: MarbleNFTTrainer) -> int:
    """Bytes that are there before the step: the pipeline, and the copies of the adapter."""
    modules = [each for each in pipeline.components.values() if isinstance(each, nn.Module)]
    tensors: list[Tensor] = [tensor for each in modules for tensor in (*each.parameters(), *each.buffers())]
    for shadow in (trainer.weights.old, trainer.weights.averaged):
        tensors.extend(shadow.state_dict().values())
    return sum(tensor.nbytes for tensor in tensors)
