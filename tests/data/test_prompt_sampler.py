# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Order of the prompts: whole groups, every prompt, another order each epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_marble.data import RepeatPromptSampler


@st.composite
def samplers(draw) -> RepeatPromptSampler:
    num_prompts = draw(st.integers(1, 12))
    return RepeatPromptSampler(
        num_prompts=num_prompts,
        num_generations=draw(st.integers(1, 4)),
        prompts_per_batch=draw(st.integers(1, num_prompts)),
        num_repeats=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def batches(sampler: RepeatPromptSampler) -> list[list[int]]:
    """The indices, cut into generation batches as often as they come."""
    indices = list(sampler)
    size = sampler.prompts_per_batch * sampler.num_generations
    assert len(indices) % size == 0
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@given(samplers())
def test_the_length_is_what_is_yielded(sampler) -> None:
    assert len(list(sampler)) == len(sampler)
    assert len(batches(sampler)) == sampler.num_batches * sampler.num_repeats


@given(samplers())
def test_a_batch_holds_whole_groups_of_different_prompts(sampler) -> None:
    for batch in batches(sampler):
        groups = [
            batch[start : start + sampler.num_generations] for start in range(0, len(batch), sampler.num_generations)
        ]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == sampler.prompts_per_batch


@given(samplers())
def test_a_batch_is_repeated_in_a_row(sampler) -> None:
    every = batches(sampler)
    for start in range(0, len(every), sampler.num_repeats):
        assert every[start : start + sampler.num_repeats] == [every[start]] * sampler.num_repeats


@given(samplers())
def test_every_prompt_comes_and_none_much_more_often(sampler) -> None:
    per_visit = sampler.num_generations * sampler.num_repeats
    indices = list(sampler)
    visits = [indices.count(prompt) / per_visit for prompt in range(sampler.num_prompts)]
    assert set(visits) <= {1, 2}
    assert sum(visits) < sampler.num_prompts + sampler.prompts_per_batch


@given(samplers(), st.integers(0, 1000))
def test_the_order_depends_on_seed_and_epoch_alone(sampler, epoch) -> None:
    sampler.set_epoch(epoch)
    first = list(sampler)
    again = RepeatPromptSampler(
        sampler.num_prompts, sampler.num_generations, sampler.prompts_per_batch, sampler.num_repeats, sampler.seed
    )
    again.set_epoch(epoch + 1)
    list(again)  # what was iterated before leaves no trace
    again.set_epoch(epoch)
    assert list(sampler) == first == list(again)


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = set()
    for seed in range(3):
        sampler = RepeatPromptSampler(num_prompts=50, num_generations=1, prompts_per_batch=1, seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 12


def test_the_docstring_example() -> None:
    assert list(RepeatPromptSampler(num_prompts=3, num_generations=2, prompts_per_batch=2)) == [2, 2, 0, 0, 1, 1, 2, 2]


def test_too_few_prompts_are_refused() -> None:
    RepeatPromptSampler(num_prompts=4, num_generations=2, prompts_per_batch=4)
    with pytest.raises(ValueError, match="has 3 prompts, but one generation batch takes 4. Add prompts"):
        RepeatPromptSampler(num_prompts=3, num_generations=2, prompts_per_batch=4)
