# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The influence of an image is the derivative of a set's value, which finite differences of its weights find too."""

import numpy as np
import pytest
import torch

from trl_marble.rewards import set_values
from trl_marble.rewards.set_values import frechet_distance, gaussian_kernel, median_distance, squared_mmd, vendi_score


STEP = 1e-5
SMOOTHING = 0.05


def draw(number, size, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(number, size)) * scale + shift


def derivatives(value, number):
    """Of a function of weights, towards each image alone."""
    even, single = np.full(number, 1 / number), np.eye(number)
    ahead = [value((1 - STEP) * even + STEP * one) for one in single]
    behind = [value((1 + STEP) * even - STEP * one) for one in single]
    return (np.array(ahead) - np.array(behind)) / (2 * STEP)


def root(matrix):
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


# The values, of weighted images, written down anew.


def entropy_of(features, weights):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit.T @ (unit * weights[:, None]))
    return -sum(value * np.log(value) for value in values if value > 1e-12)


def mmd_of(features, reference, weights, width):
    def kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(axis=2) / (2 * width**2))

    crossed = weights @ kernel(features, reference).mean(axis=1)
    return weights @ kernel(features, features) @ weights - 2 * crossed + kernel(reference, reference).mean()


def frechet_of(features, reference, weights, noise):
    mean = weights @ features
    centred = features - mean
    eye = np.eye(features.shape[1])
    own = centred.T @ (centred * weights[:, None]) + noise * eye
    other = np.cov(reference.T, bias=True) + noise * eye
    distance = ((mean - reference.mean(axis=0)) ** 2).sum()
    return distance + np.trace(own + other - 2 * root(root(own) @ other @ root(own)))


@pytest.mark.parametrize(("number", "size"), [(24, 6), (6, 24)], ids=["many images", "many features"])
@pytest.mark.parametrize("kind", ["vendi", "mmd", "frechet"])
def test_influence_is_the_derivative(kind, number, size) -> None:
    features, reference = draw(number, size, 0), draw(60, size, 1, 1.3, 0.4)
    ours, theirs = torch.from_numpy(features), torch.from_numpy(reference)
    if kind == "vendi":
        found = vendi_score(ours)
        value = lambda weights: np.exp(entropy_of(features, weights))  # noqa: E731
    elif kind == "mmd":
        found = squared_mmd(ours, theirs, 2.0)
        value = lambda weights: mmd_of(features, reference, weights, 2.0)  # noqa: E731
    else:
        covariance = torch.from_numpy(np.cov(reference.T, bias=True))
        found = frechet_distance(ours, theirs.mean(dim=0), covariance, SMOOTHING)
        value = lambda weights: frechet_of(features, reference, weights, SMOOTHING)  # noqa: E731
    assert found.value.item() == pytest.approx(value(np.full(number, 1 / number)), abs=1e-9)
    expected = derivatives(value, number)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.influence.numpy(), expected, atol=1e-6)
    assert found.influence.mean().item() == pytest.approx(0, abs=1e-9)
    assert found.credit.mean().item() == pytest.approx(found.value.item())


def test_vendi_score_counts_different_images() -> None:
    apart = torch.eye(5)
    assert vendi_score(apart).value.item() == pytest.approx(5)
    assert vendi_score(3 * apart[[0] * 4]).value.item() == pytest.approx(1)
    two = vendi_score(apart[[0, 0, 0, 1]])
    assert 1 < two.value < 2 and two.influence.argmax() == 3  # the one that is unlike the others


def test_influence_ranks_images_as_leaving_them_out_does() -> None:
    features = torch.from_numpy(draw(12, 5, 2))
    others = [vendi_score(torch.cat([features[:i], features[i + 1 :]])).value.item() for i in range(12)]
    assert vendi_score(features).influence.argsort().tolist() == np.argsort(others)[::-1].tolist()


def test_a_set_that_is_the_reference_has_no_distance() -> None:
    reference = torch.from_numpy(draw(30, 4, 3))
    covariance = torch.from_numpy(np.cov(reference.numpy().T, bias=True))
    assert squared_mmd(reference, reference, 1.0).value.item() == pytest.approx(0, abs=1e-12)
    assert frechet_distance(reference, reference.mean(dim=0), covariance, 0.1).value.item() == pytest.approx(
        0, abs=1e-9
    )
    shifted = frechet_distance(reference + 2, reference.mean(dim=0), covariance, 0.1)
    assert shifted.value.item() == pytest.approx(4 * 2**2)


def test_bandwidth_is_the_median_distance_and_never_zero() -> None:
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    assert median_distance(torch.zeros(3, 2)) == 1.0
    assert gaussian_kernel(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), 2.0).item() == pytest.approx(np.exp(-0.5))


def test_a_policy_that_follows_the_credit_of_its_samples_raises_the_value() -> None:
    """A policy over five different pictures, which begins with nearly always the same one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([4.0, 0, 0, 0, 0], dtype=torch.float64)
    pictures = torch.eye(5)
    drawn = torch.multinomial(logits.softmax(0), 64, replacement=True, generator=generator)
    before = vendi_score(pictures[drawn]).value
    for _ in range(60):
        drawn = torch.multinomial(logits.softmax(0), 64, replacement=True, generator=generator)
        advantage = vendi_score(pictures[drawn]).influence
        slope = torch.nn.functional.one_hot(drawn, 5) - logits.softmax(0)  # of the log-probability
        logits += 0.5 * (advantage[:, None] * slope).mean(dim=0)
    assert before < 2 and vendi_score(pictures[drawn]).value > 4.5


def test_a_kernel_is_averaged_in_blocks(monkeypatch) -> None:
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    whole = set_values.gaussian_kernel(features.double(), features.double(), 2.0).mean().item()
    monkeypatch.setattr(set_values, "BLOCK", 3)
    assert set_values.mean_kernel(features, 2.0) == pytest.approx(whole, rel=1e-12)


def test_of_many_features_some_give_the_bandwidth(monkeypatch) -> None:
    features = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    whole = set_values.median_distance(features)
    monkeypatch.setattr(set_values, "MOST", 100)
    some = set_values.median_distance(features)
    assert some != whole and some == pytest.approx(whole, rel=0.1)
