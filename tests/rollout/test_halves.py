# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The halves of a step's prompts: complete prompts, of every kind evenly."""

import pytest
import torch

from trl_marble.rollout import split_prompts, steps_of_samples, training_order


GENERATIONS = 6


def a_batch(num_prompts=11, num_updates=1):
    """Two general rewards, one of which fails for some images, and two that apply to every third prompt."""
    prompts = torch.arange(num_prompts).repeat_interleave(GENERATIONS)
    applies = torch.ones(4, len(prompts), dtype=torch.bool)
    applies[1, ::7] = False
    applies[2] = prompts % 3 == 0
    applies[3] = prompts % 3 == 1
    return prompts, applies, steps_of_samples(len(prompts), num_updates, seed=1)


@pytest.mark.parametrize("num_updates", [1, 2, 3, 11])  # with 11 most steps have some of the prompts only
def test_halves_are_of_complete_prompts_and_each_kind_is_split_evenly(num_updates):
    prompts, applies, steps = a_batch(num_updates=num_updates)
    sizes = set()
    for seed in range(20):
        in_first = split_prompts(prompts, applies, steps, seed)
        for step in range(num_updates):
            samples = zip(prompts.tolist(), in_first.tolist(), steps.tolist(), strict=True)
            present = {(prompt, half) for prompt, half, at in samples if at == step}
            halves = dict(present)
            assert len(halves) == len(present)  # no prompt is in both
            kinds = [[p for p in halves if p % 3 == kind] for kind in range(3)]
            for of_kind in (*kinds, list(halves)):
                assert abs(sum(1 if halves[p] else -1 for p in of_kind)) <= 1
            sizes.add(sum(halves.values()))
    if num_updates == 1:
        assert sizes == {5, 6}  # either half is the larger one


def test_halves_depend_on_the_seed_alone():
    prompts, applies, steps = a_batch()
    drawn = [split_prompts(prompts, applies, steps, seed) for seed in range(20)]
    assert torch.equal(split_prompts(prompts, applies, steps, 3), drawn[3])
    assert len({tuple(half.tolist()) for half in drawn}) > 15
    # Over the seeds each prompt is in either half, and any two are together or not.
    first = torch.stack(drawn)[:, ::GENERATIONS].double()
    assert ((first.mean(dim=0) - 0.5).abs() < 0.4).all()
    together = (first[:, :, None] == first[:, None]).double().mean(dim=0)
    assert (together[~torch.eye(len(together), dtype=torch.bool)] < 1).all()


def test_the_steps_of_samples_are_those_of_the_order_in_which_they_are_trained_on():
    steps = steps_of_samples(24, 4, seed=5)
    for own in (range(24), range(8, 24)):
        order = training_order(24, own, 4, seed=5)
        found = steps[own.start : own.stop][order]
        assert found.tolist() == sorted(found.tolist())
        assert found.bincount().tolist() == [len(own) // 4] * 4
