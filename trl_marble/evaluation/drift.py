# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How far a policy is from its base model: the KL of flow matching, at noised versions of the policy's own samples."""

import functools
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..losses.forward_process import mean_square_distance
from ..pipelines import Conditioning, FlowPipeline, adapters_disabled
from ..seeding import Draw, derive_seed


class DriftMeter:
    """
    Measures how far the weights that are in place are from the base model, the same module without its adapters.

    It costs two passes of the transformer for each image, without guidance.

    Args:
        flow ([`~trl_marble.pipelines.FlowPipeline`]):
            The pipeline with its adapter.
        num_inference_steps (`int`):
            Number of solver steps, whose times are those at which velocities are compared.
    """

    def __init__(self, flow: FlowPipeline, num_inference_steps: int) -> None:
        self.flow, self.num_inference_steps = flow, num_inference_steps

    @functools.cached_property
    def times(self) -> Tensor:
        """The time grid of the solver, of shape `[T]`, see [`~trl_marble.pipelines.FlowPipeline.training_times`]."""
        return self.flow.training_times(self.num_inference_steps)

    @torch.no_grad()
    def measure(self, x0: Tensor, places: Sequence[float], seeds: Sequence[int], conditioning: Conditioning) -> Tensor:
        """
        Compare velocities at `x_t = (1 - t) x0 + t noise`, with one time and one noise for each image.

        Args:
            x0 (`Tensor` of shape `[B, ...]`):
                Clean latents that the policy sampled.
            places (`Sequence[float]`):
                Place of each image's time in the grid, in [0, 1).
            seeds (`Sequence[int]`):
                The seed of each image. The noise comes from it, and is not the noise that the image was sampled from.
            conditioning ([`~trl_marble.pipelines.Conditioning`]):
                One row per image.

        Returns:
            `Tensor` of shape `[B, 3]`, float32, on the CPU: means over the elements of `(v - v_base)^2`, of `v^2` and
            of `v_base^2`.
        """
        x0 = x0.float()
        t = self.times[[int(place * len(self.times)) for place in places]].to(x0)
        generators = [torch.Generator().manual_seed(derive_seed(seed, Draw.EVALUATION_NOISE)) for seed in seeds]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0)
        t_ = t.view(-1, *[1] * (x0.ndim - 1))
        x_t = (1 - t_) * x0 + t_ * noise
        transformer = self.flow.transformer
        was_training = transformer.training
        transformer.eval()
        try:
            policy = self.flow.velocity(x_t, t, conditioning)
            with adapters_disabled(transformer):
                base = self.flow.velocity(x_t, t, conditioning)
        finally:
            transformer.train(was_training)
        zero = torch.zeros_like(base)
        pairs = ((policy, base), (policy, zero), (base, zero))
        return torch.stack([mean_square_distance(*pair) for pair in pairs], dim=1).cpu()


def knows_its_base(flow: FlowPipeline) -> bool:
    """
    Whether a pipeline without its adapters is its base model: all of them are in the transformer, and none is fused
    into its weights. A pipeline without adapters may be a base model, or have been trained in all of its weights.
    """
    components = {name: part for name, part in flow.pipeline.components.items() if isinstance(part, nn.Module)}
    layers = {
        name: [layer for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
        for name, part in components.items()
    }
    own = layers.pop("transformer")
    return bool(own) and not any(layers.values()) and not any(layer.merged for layer in own)
