# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Seeds by place."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_marble.seeding import Draw, derive_seed


places = st.lists(st.integers(0, 2**32 - 1), max_size=4)


@given(st.integers(0, 2**32 - 1), st.sampled_from(Draw), places)
def test_a_place_has_one_seed_that_torch_takes(seed, draw, place) -> None:
    derived = derive_seed(seed, draw, *place)
    assert derived == derive_seed(seed, draw, *place)
    assert torch.Generator().manual_seed(derived).initial_seed() % 2**64 == derived


def test_places_have_different_seeds() -> None:
    for length in range(4):
        places = list(itertools.product(range(6), repeat=length))
        seeds = {derive_seed(seed, draw, *place) for seed in range(4) for draw in Draw for place in places}
        assert len(seeds) == 4 * len(Draw) * len(places)


def test_seeds_stay_what_they_are() -> None:
    """A checkpoint of today must be resumed with the same draws by a later version."""
    assert derive_seed(42, Draw.ROLLOUT, 0, 0) == 11465652750463011511
    assert Draw.MEASURED == 4
