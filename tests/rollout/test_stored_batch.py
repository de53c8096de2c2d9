# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A generation batch that some processes have saved is read by any other number of processes."""

import dataclasses

import pytest
import torch

from trl_marble.pipelines import Conditioning
from trl_marble.rollout import RolloutBatch, StoredBatch, steps_of_samples, training_order
from trl_marble.rollout.batch import digest_of
from trl_marble.sde import Transitions


NUMBER, UPDATES, SEED = 24, 2, 3
TIMES = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0])
PROMPTS = [f"prompt {i // 4}" for i in range(NUMBER)]


def encode(prompts, images):
    different = list(dict.fromkeys(prompts))
    assert images is None
    index = torch.tensor([different.index(prompt) for prompt in prompts])
    return Conditioning({"embeds": torch.tensor([float(prompt.split()[1]) for prompt in different])}), index


def points_of(ids: torch.Tensor) -> torch.Tensor:
    """What samples went through in two steps of their rollout."""
    return ids.view(-1, 1, 1) + torch.tensor([0.0, 0.25, 0.5]).view(1, 3, 1) + torch.zeros(1, 1, 2)


def parts(processes: int, with_steps: bool = False) -> list[RolloutBatch]:
    """What each of some processes has of one and the same generation batch, with steps of rollouts or without."""
    share = NUMBER // processes
    batches = []
    for process in range(processes):
        own = range(process * share, (process + 1) * share)
        ids = torch.tensor(own)[training_order(NUMBER, own, UPDATES, SEED)]
        prompts = PROMPTS[own.start : own.stop]
        conditioning, index = encode(prompts, None)
        batch = RolloutBatch(
            prompts=prompts,
            conditioning=conditioning,
            rows_digest=digest_of(prompts),
            prompt_index=index[ids - own.start],
            sample_ids=ids,
            latents=ids[:, None] * torch.ones(1, 3),
            advantages=torch.stack([ids + 0.5, -ids.float()]),
            first_half=ids % 3 == 0,
            counts=torch.arange(8).view(UPDATES, 2, 2),
            active=torch.ones(UPDATES, 2, 2, dtype=torch.bool),
            scored=torch.tensor([12, 11]),
            weighted_sum=torch.tensor([0.5, 2.0]),
            transitions=Transitions(points_of(ids), TIMES, 1) if with_steps else None,
        )
        batches.append(batch)
    return batches


def load(folder, process: int, processes: int) -> StoredBatch:
    share = NUMBER // processes
    own = range(process * share, (process + 1) * share)
    return StoredBatch.load(folder, own, UPDATES, torch.device("cpu"))


def restore(folder, process: int, processes: int, prompts: list[str] = PROMPTS) -> RolloutBatch:
    stored = load(folder, process, processes)
    return stored.with_rows(prompts[stored.covered.start : stored.covered.stop], None, encode)


@pytest.mark.parametrize("with_steps", [False, True])
@pytest.mark.parametrize("saving", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("reading", [1, 2, 3, 4, 12])
def test_every_sample_is_found_in_its_step(tmp_path, saving, reading, with_steps) -> None:
    for process, batch in enumerate(parts(saving, with_steps)):
        batch.save(tmp_path, process)
    steps = steps_of_samples(NUMBER, UPDATES, SEED)
    seen: list[int] = []
    for process, expected in enumerate(parts(reading)):
        found = restore(tmp_path, process, reading)
        ids = found.sample_ids
        assert steps[ids].tolist() == steps[expected.sample_ids].tolist()  # sorted, equally many of each
        assert sorted(ids.tolist()) == sorted(expected.sample_ids.tolist())
        assert found.latents[:, 0].equal(ids.float()) and found.advantages[0].equal(ids + 0.5)
        assert found.first_half.equal(ids % 3 == 0)
        assert found.prompts_of(ids) == [PROMPTS[i] for i in ids]
        told = found.conditioning.select(found.prompt_index).kwargs["embeds"]
        assert told.tolist() == [i // 4 for i in ids.tolist()]
        assert found.rows_digest == expected.rows_digest and found.prompts == expected.prompts
        for name in ("counts", "active", "scored", "weighted_sum"):
            assert getattr(found, name).equal(getattr(expected, name))
        if saving == reading:  # nothing moves
            for field in dataclasses.fields(RolloutBatch):
                value = getattr(expected, field.name)
                assert not torch.is_tensor(value) or getattr(found, field.name).equal(value), field.name
        if with_steps:
            assert found.transitions is not None and found.transitions.points.equal(points_of(ids))
            assert found.transitions.times.equal(TIMES) and found.transitions.begin == 1
        else:
            assert found.transitions is None
        seen += ids.tolist()
    assert sorted(seen) == list(range(NUMBER))


def test_other_rows_are_refused_by_whichever_process_has_them(tmp_path) -> None:
    for process, batch in enumerate(parts(4)):
        batch.save(tmp_path, process)
    other = [*PROMPTS[:-1], "another one"]
    restore(tmp_path, 0, 2, other)
    with pytest.raises(ValueError, match="sampled from other rows than those of this run .the first is 'prompt 4'"):
        restore(tmp_path, 1, 2, other)


def test_a_part_that_is_not_there_is_missed_by_those_who_need_it(tmp_path) -> None:
    for process, batch in enumerate(parts(4)[:3]):
        batch.save(tmp_path, process)
    load(tmp_path, 0, 2)
    with pytest.raises(FileNotFoundError, match="has 6 of the 12 images .* Copy the files `generation_batch_\\*.saf"):
        load(tmp_path, 1, 2)
