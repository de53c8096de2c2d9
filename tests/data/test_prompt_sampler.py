# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Order of the prompts: complete groups, every prompt, another order each epoch, a share for every source."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

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
def test_a_batch_has_complete_groups_of_different_prompts(sampler) -> None:
    for batch in batches(sampler):
        groups = [
            batch[start : start + sampler.num_generations] for start in range(0, len(batch), sampler.num_generations)
        ]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == sampler.prompts_per_batch


@given(samplers())
def test_a_batch_is_repeated_consecutively(sampler) -> None:
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


def test_the_docstring_examples() -> None:
    assert list(RepeatPromptSampler(num_prompts=3, num_generations=2, prompts_per_batch=2)) == [2, 2, 0, 0, 1, 1, 2, 2]
    sampler = RepeatPromptSampler(4, num_generations=1, prompts_per_batch=2, sources=["a", "a", "a", "b"])
    assert list(sampler) == [2, 3, 1, 3]


def test_too_few_prompts_are_refused() -> None:
    RepeatPromptSampler(num_prompts=4, num_generations=2, prompts_per_batch=4)
    with pytest.raises(ValueError, match="has 3 prompts, but one generation batch takes 4. Add prompts"):
        RepeatPromptSampler(num_prompts=3, num_generations=2, prompts_per_batch=4)


# ---- Several sources ----


@st.composite
def mixes(draw) -> dict:
    """Arguments of a sampler of two or three sources, each with at least what a batch takes of it."""
    number = draw(st.integers(2, 3))
    weights = {f"source {i}": draw(st.sampled_from([0.1, 0.25, 0.3, 1, 1.5, 2, 7])) for i in range(number)}
    prompts_per_batch = draw(st.integers(1, 9))
    total = sum(Fraction(str(weight)) for weight in weights.values())
    sources = []
    for source, weight in weights.items():
        needed = math.ceil(Fraction(str(weight)) * prompts_per_batch / total)
        sources += [source] * (needed + draw(st.integers(0, 7)))
    return {
        "num_prompts": len(sources),
        "num_generations": draw(st.integers(1, 3)),
        "prompts_per_batch": prompts_per_batch,
        "num_repeats": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "sources": draw(st.permutations(sources)),
        "source_weights": weights,
    }


def generation_batches(arguments: dict, epochs: int) -> list[list[int]]:
    """The prompts of each generation batch over some epochs, each prompt and each batch once."""
    sampler = RepeatPromptSampler(**arguments)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        every = batches(sampler)
        assert len(every) == sampler.num_batches * sampler.num_repeats == len(sampler) // len(every[0])
        for start in range(0, len(every), sampler.num_repeats):
            assert every[start : start + sampler.num_repeats] == [every[start]] * sampler.num_repeats
            found.append(every[start][:: sampler.num_generations])
            assert every[start] == [index for index in found[-1] for _ in range(sampler.num_generations)]
    return found


@given(mixes())
def test_every_source_has_its_share_in_every_batch_and_exactly_in_the_long_run(arguments) -> None:
    weights = {source: Fraction(str(weight)) for source, weight in arguments["source_weights"].items()}
    served = dict.fromkeys(weights, 0)
    for number, batch in enumerate(generation_batches(arguments, epochs=12), start=1):
        counts = Counter(arguments["sources"][index] for index in batch)
        for source, weight in weights.items():
            share = weight / sum(weights.values()) * arguments["prompts_per_batch"]
            assert counts[source] in (math.floor(share), math.ceil(share))
            served[source] += counts[source]
            assert abs(served[source] - number * share) < 1


def test_shares_hold_for_many_sources_in_small_batches() -> None:
    weights = {str(i): 2.0**-i for i in range(12)}
    sources = [source for source in weights for _ in range(250)]
    arguments = {"num_prompts": 3000, "num_generations": 1, "prompts_per_batch": 1, "sources": sources}
    found = generation_batches({**arguments, "source_weights": weights}, epochs=2)
    served = dict.fromkeys(weights, 0)
    for number, (index,) in enumerate(found, start=1):
        served[sources[index]] += 1
        for source, weight in weights.items():
            assert abs(served[source] - number * weight / sum(weights.values())) < 2
    assert served["0"] > 2900 and served["11"] in (0, 1, 2, 3)


@given(mixes())
def test_no_prompt_comes_again_before_its_source_is_exhausted(arguments) -> None:
    """Not within an epoch, not across epochs, and never twice in a batch."""
    drawn: dict[str, list[int]] = {source: [] for source in arguments["source_weights"]}
    for batch in generation_batches(arguments, epochs=6):
        assert len(set(batch)) == len(batch) == arguments["prompts_per_batch"]
        for index in batch:
            drawn[arguments["sources"][index]].append(index)
    # Passes begin and end inside a batch, in which the order of a source's own prompts is that of its draws.
    for source, indices in drawn.items():
        rows = {row for row, name in enumerate(arguments["sources"]) if name == source}
        for start in range(0, len(indices), len(rows)):
            one_pass = indices[start : start + len(rows)]
            assert len(set(one_pass)) == len(one_pass)
            assert set(one_pass) <= rows


@given(mixes(), st.integers(0, 5))
def test_the_order_of_a_mix_depends_on_its_arguments_and_the_epoch_alone(arguments, epoch) -> None:
    sampler, again = RepeatPromptSampler(**arguments), RepeatPromptSampler(**arguments)
    sampler.set_epoch(epoch)
    first = list(sampler)
    again.set_epoch(epoch + 1)
    list(again)
    again.set_epoch(epoch)
    assert list(sampler) == first == list(again)


@given(mixes())
def test_only_the_ratios_of_weights_matter(arguments) -> None:
    scaled = {source: 8 * weight for source, weight in arguments["source_weights"].items()}
    assert list(RepeatPromptSampler(**arguments)) == list(
        RepeatPromptSampler(**{**arguments, "source_weights": scaled})
    )
    equal = dict.fromkeys(scaled, 1)
    plentiful = {**arguments, "sources": arguments["sources"] * 9, "num_prompts": 9 * arguments["num_prompts"]}
    assert list(RepeatPromptSampler(**{**plentiful, "source_weights": None})) == list(
        RepeatPromptSampler(**{**plentiful, "source_weights": equal})
    )


@given(samplers(), st.integers(0, 5), st.sampled_from([None, {"all": 0.3}]))
def test_one_source_is_sampled_like_a_set_that_was_not_mixed(sampler, epoch, weights) -> None:
    mixed = RepeatPromptSampler(
        sampler.num_prompts,
        sampler.num_generations,
        sampler.prompts_per_batch,
        sampler.num_repeats,
        sampler.seed,
        sources=["all"] * sampler.num_prompts,
        source_weights=weights,
    )
    sampler.set_epoch(epoch)
    mixed.set_epoch(epoch)
    assert list(mixed) == list(sampler)


def test_sources_are_spread_over_a_batch() -> None:
    """So that each of four processes rolls out as much of each source."""
    sources = ["a"] * 20 + ["b"] * 20
    sampler = RepeatPromptSampler(40, 1, 16, sources=sources)
    for batch in batches(sampler):
        for start in range(0, 16, 4):
            assert sorted(sources[index] for index in batch[start : start + 4]) == ["a", "a", "b", "b"]


def test_epochs_and_seeds_of_a_mix_have_their_own_orders() -> None:
    orders = set()
    for seed in range(3):
        sampler = RepeatPromptSampler(60, 1, 3, seed=seed, sources=["a"] * 10 + ["b"] * 20 + ["c"] * 30)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 12


def loaded(arguments: dict, processes: int = 1, process: int = 0, epoch: int = 0, skip: int = 0) -> list[list[int]]:
    """What a process gets of an epoch, through the loader and in the steps of `transformers.Trainer`."""
    size = arguments["prompts_per_batch"] * arguments["num_generations"]
    assert size % processes == 0
    sampler = RepeatPromptSampler(**arguments)
    plain = DataLoader(range(arguments["num_prompts"]), batch_size=size // processes, sampler=sampler, collate_fn=list)
    loader = prepare_data_loader(plain, num_processes=processes, process_index=process, put_on_device=False)
    sampler.set_epoch(epoch)
    if skip > 0:
        loader = skip_first_batches(loader, skip)
    loader.set_epoch(epoch)
    return list(loader)


MIX = {
    "num_prompts": 31,
    "num_generations": 4,
    "prompts_per_batch": 6,
    "num_repeats": 2,
    "seed": 5,
    "sources": ["a"] * 4 + ["b"] * 20 + ["c"] * 7,
    "source_weights": {"a": 1, "b": 1.5, "c": 2},
}


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_order_is_the_same_on_any_number_of_processes(epoch) -> None:
    alone = loaded(MIX, epoch=epoch)
    for processes in (2, 3, 8):
        parts = [loaded(MIX, processes, process, epoch) for process in range(processes)]
        assert [sum(shares, []) for shares in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_continues_with_the_same_prompts(epoch, processes) -> None:
    whole = loaded(MIX, processes, processes - 1, epoch)
    assert len(whole) == 12
    for done in range(len(whole)):
        assert loaded(MIX, processes, processes - 1, epoch, skip=done) == whole[done:]


def test_a_source_that_is_too_small_for_its_share_is_refused() -> None:
    sources = ["big"] * 20 + ["small"] * 2
    RepeatPromptSampler(22, 1, 4, sources=sources)
    with pytest.raises(ValueError, match="The source 'small' has 2 prompts, but its share .* is 2.5 of 5 different"):
        RepeatPromptSampler(22, 1, 5, sources=sources)
    RepeatPromptSampler(22, 1, 5, sources=sources, source_weights={"big": 3, "small": 2})


def test_sources_and_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="has 2 entries, and the dataset has 3 prompts"):
        RepeatPromptSampler(3, 1, 1, sources=["a", "b"])
    with pytest.raises(ValueError, match="`source_weights` needs `sources`"):
        RepeatPromptSampler(3, 1, 1, source_weights={"a": 1})
    with pytest.raises(ValueError, match=r"`weights` has the sources \['a'\], the prompt sets are \['a', 'b'\]"):
        RepeatPromptSampler(3, 1, 1, sources=["a", "b", "b"], source_weights={"a": 1})
    with pytest.raises(ValueError, match="The source 'b' has the weight 0"):
        RepeatPromptSampler(3, 1, 1, sources=["a", "b", "b"], source_weights={"a": 1, "b": 0})
