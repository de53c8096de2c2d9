# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Held-out cosines and the share of signal: against plain loops, and without the bias that the in-sample ones have."""

import math

import pytest
import torch

from trl_marble.balance import direction_cosines, gram_matrix, harmonize, heldout_cosines, mgda_weights, signal_shares


ALL = torch.ones(3, dtype=torch.bool)


def random_halves(seed, size=3, number=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, size, number, generator=generator, dtype=torch.float64)


def joint_gram(first, second):
    return gram_matrix(torch.cat([first, second]))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_they_are_what_loops_over_the_gradients_give():
    first, second = random_halves(0)
    of_first, of_second = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.7, -0.1, 0.4])
    found = heldout_cosines(joint_gram(first, second), of_first, of_second, ALL)
    directions = [
        [sum(w * g[place] for w, g in zip(weights.tolist(), half.tolist(), strict=True)) for place in range(40)]
        for weights, half in ((of_first, first), (of_second, second))
    ]
    for k in range(3):
        expected = (cosine(directions[0], second[k].tolist()) + cosine(directions[1], first[k].tolist())) / 2
        assert found[k].item() == pytest.approx(expected, rel=1e-6)  # the weights are float32


def test_the_share_of_signal_is_what_loops_over_the_gradients_give():
    first, second = random_halves(1)
    share = torch.tensor([0.5, 1 / 3, 0.6], dtype=torch.float64)
    found = signal_shares(joint_gram(first, second), share, ALL)
    for k, f in enumerate(share.tolist()):
        inner = sum(x * y for x, y in zip(first[k].tolist(), second[k].tolist(), strict=True))
        squared = sum((x + y) ** 2 for x, y in zip(first[k].tolist(), second[k].tolist(), strict=True))
        assert found[k].item() == pytest.approx(inner / (f * (1 - f)) / squared, rel=1e-12)


def test_equal_halves_have_the_in_sample_cosines_and_nothing_but_signal():
    half, _ = random_halves(2)
    weights = mgda_weights(gram_matrix(half))
    gram = joint_gram(half, half)
    assert torch.allclose(heldout_cosines(gram, weights, weights, ALL), direction_cosines(gram_matrix(half), weights))
    assert torch.allclose(signal_shares(gram, torch.full((3,), 0.5), ALL), torch.ones(3, dtype=torch.float64))


def test_without_a_gradient_in_one_half_there_is_nothing_to_say():
    first, second = random_halves(3)
    first[0] = 0  # a reward that applies to prompts of the second half only
    gram, equal = joint_gram(first, second), torch.full((3,), 1 / 3)
    active = torch.tensor([True, True, False])  # and one with a gradient that is no signal
    share = torch.tensor([0.0, 0.5, 0.5])
    for found in (heldout_cosines(gram, equal, equal, active), signal_shares(gram, share, active)):
        assert found.isnan().tolist() == [True, False, True]


def test_gradients_that_cancel_have_no_direction():
    _, second = random_halves(4)
    first = torch.stack([second[0], -second[0], 0 * second[0]])
    weights = torch.tensor([0.5, 0.5, 0.0])
    found = heldout_cosines(joint_gram(first, second), weights, weights, ALL)
    other_way = direction_cosines(gram_matrix(second), weights)  # that of the second half exists
    assert found[2].isnan() and found[:2].isfinite().all() and other_way.isfinite().all()
    opposite = torch.stack([second[0], -second[0]])
    half = torch.tensor([0.5, 0.5])
    assert heldout_cosines(joint_gram(opposite, opposite), half, half, ALL[:2]).tolist() == [0.0, 0.0]


def test_bad_shapes_are_refused():
    first, second = random_halves(5)
    gram = joint_gram(first, second)
    with pytest.raises(ValueError, match=r"got shapes \(6, 6\), \(3,\), \(2,\), \(3,\)"):
        heldout_cosines(gram, torch.ones(3), torch.ones(2), ALL)
    with pytest.raises(ValueError, match=r"got shapes \(3, 3\), \(3,\), \(3,\)"):
        signal_shares(gram[:3, :3], torch.ones(3), ALL)


# ---- Without bias ----

STEPS, NUMBER = 400, 200


def synthetic_steps(signals, noise, first_share=0.5, seed=0):
    """
    In-sample cosines, held-out cosines and shares of signal in the mean squared norm, of many steps: `(STEPS, K)`.

    A step's gradient is the signal plus noise of the squared length `noise`; that of a half has its part of both.
    """
    generator = torch.Generator().manual_seed(seed)
    in_sample, held_out, shares, squared_norms = [], [], [], []
    sizes = torch.tensor([first_share, 1 - first_share], dtype=torch.float64)
    active = torch.ones(len(signals), dtype=torch.bool)
    for _ in range(STEPS):
        drawn = torch.randn(2, *signals.shape, generator=generator, dtype=torch.float64)
        scale = (noise / NUMBER * sizes[:, None]).sqrt()[:, :, None]
        first, second = sizes[:, None, None] * signals + scale * drawn
        gram = gram_matrix(first + second)
        in_sample.append(direction_cosines(gram, harmonize(gram, mgda_weights).weights))
        weights = [harmonize(gram_matrix(half), mgda_weights).weights for half in (first, second)]
        joint = joint_gram(first, second)
        held_out.append(heldout_cosines(joint, *weights, active))
        shares.append(signal_shares(joint, torch.full((len(signals),), first_share), active))
        squared_norms.append(gram.diagonal())
    weights = torch.stack(squared_norms)
    # The signal of each step divided by the mean squared norm.
    return torch.stack(in_sample), torch.stack(held_out), torch.stack(shares) * weights / weights.mean(dim=0)


def mean_and_error(values):
    return values.mean(dim=0), values.std(dim=0) / math.sqrt(len(values))


def test_of_pure_noise_the_in_sample_cosines_are_positive_and_the_held_out_ones_zero():
    signals = torch.zeros(4, NUMBER, dtype=torch.float64)
    in_sample, held_out, shares = synthetic_steps(signals, torch.ones(4, dtype=torch.float64))
    assert in_sample.min() > 0.3  # in every step, of every reward, which all mean nothing
    for values in (held_out, shares):
        mean, error = mean_and_error(values)
        assert (mean.abs() < 4 * error).all() and error.max() < 0.01


@pytest.mark.parametrize("first_share", [0.5, 1 / 3])
def test_a_known_share_of_signal_is_recovered(first_share):
    units = torch.linalg.qr(random_halves(6, number=NUMBER)[0].T).Q.T
    known = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    _, _, shares = synthetic_steps(units * known[:, None].sqrt(), 1 - known, first_share)
    mean, error = mean_and_error(shares)
    assert ((mean - known).abs() < 4 * error + 1e-3).all() and error.max() < 0.01


def test_a_reward_that_each_step_makes_worse_is_found():
    """Two rewards that agree and one that is against them, in noise: in-sample all is well, held out it is not."""
    unit = torch.zeros(NUMBER, dtype=torch.float64)
    unit[0] = 1
    signals = torch.stack([unit, unit, -0.5 * unit])
    in_sample, held_out, _ = synthetic_steps(signals, torch.tensor([0.2, 0.2, 3.0], dtype=torch.float64))
    mean, error = mean_and_error(in_sample)
    assert (mean > 10 * error).all()
    mean, error = mean_and_error(held_out)
    assert mean[2] < -4 * error[2] and (mean[:2] > 4 * error[:2]).all()
