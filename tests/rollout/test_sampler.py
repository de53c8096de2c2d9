# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import diffusers.schedulers.scheduling_flow_match_euler_discrete as euler
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_sd3
from trainer_helpers import small_trainer


def test_the_noise_of_a_solver_is_not_that_which_an_image_begins_with(tmp_path, monkeypatch):
    pipeline = tiny_sd3(num_layers=1)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    trainer = small_trainer(tmp_path, pipeline=pipeline, max_steps=1)
    draw, sample = euler.randn_tensor, trainer.flow.rollout
    drawn: list[torch.Tensor] = []
    seeds: list[int] = []

    def keep_drawn(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    def keep_seeds(conditioning, batch_seeds, *args, **kwargs):
        seeds.extend(batch_seeds)
        return sample(conditioning, batch_seeds, *args, **kwargs)

    monkeypatch.setattr(euler, "randn_tensor", keep_drawn)
    monkeypatch.setattr(trainer.flow, "rollout", keep_seeds)
    trainer.train()
    shape = drawn[0].shape[1:]
    for seed in seeds:
        initial = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert not any(torch.equal(initial, noise) for noise in drawn[0])
