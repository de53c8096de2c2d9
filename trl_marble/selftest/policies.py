# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The old policy's and the base model's velocities, and that asking for them leaves the trained weights alone."""

import torch

from ..pipelines import FlowPipeline
from .micro_step import MicroStep, scatter
from .subject import Subject
from .verdicts import Failed, Finding


def check_policies(subject: Subject) -> Finding:
    """With the adapter off, velocities are the base's; swapped in, the old weights give theirs; and both go again."""
    with subject.pipeline() as pipeline, subject.trainer(pipeline) as trainer:
        step, weights = MicroStep(trainer), trainer.weights
        where = step.drawn.x_t, step.drawn.t, step.conditioning
        weights.old.lerp_(0.0)  # the old policy is what is trained now
        with torch.no_grad():
            expected_old = weights.velocity(*where)
        scatter(trainer, seed=1)
        before = {name: parameter.detach().clone() for name, parameter in weights.trained.items()}
        old, base = weights.old_velocity(*where), weights.base_velocity(*where)
        with torch.no_grad():
            trained = weights.velocity(*where)
        if not torch.equal(old, expected_old):
            raise Failed("with the old weights swapped in, velocities are not those of the old policy")
        changed = [name for name, value in before.items() if not torch.equal(value, weights.trained[name])]
        if changed or not all(parameter.requires_grad for parameter in weights.parameters):
            raise Failed(f"asking the old policy or the base model changed {len(changed)} trained weights")
        if torch.equal(trained, base) or torch.equal(trained, old):
            raise Failed("another policy's velocities are those of the trained one: the adapter has no effect")
        precision = trainer.flow.autocast_dtype
        pipeline.transformer.unload_lora()
        plain = FlowPipeline(
            pipeline,
            trainer.args.height,
            trainer.args.width,
            num_frames=trainer.args.num_frames,
            autocast_dtype=precision,
        )
        plain.family = trainer.flow.family
        with torch.no_grad():
            if not torch.equal(plain.velocity(*where), base):
                raise Failed("with the adapter off, velocities are not those of the base model")
    return Finding("base and old velocities are exact; the trained weights came back bit for bit")
