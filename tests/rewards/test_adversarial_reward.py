# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The adversarial reward: what it learns, what it keeps, and what it takes as a reference."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from trl_marble.checkpoint.tensor_tree import load_tree, save_tree
from trl_marble.rewards import AdversarialReward


def pixels(images):
    return torch.stack([torch.from_numpy(np.asarray(image.resize((4, 4))) / 255).flatten() for image in images])


def noisy(colour, seed, number=16):
    """Images of a colour with noise."""
    noise = np.random.default_rng(seed).normal(0, 40, (number, 8, 8, 3)) + colour
    return [Image.fromarray(each.clip(0, 255).astype(np.uint8)) for each in noise]


REFERENCE, OTHERS = noisy((150, 100, 100), 0), noisy((100, 100, 150), 1)


def score(reward, images):
    return torch.tensor(reward(images=images, prompts=[""] * len(images), trainer_state=None))


def learn(reward, images, times=1, **more):
    for _ in range(times):
        features = reward.features(images, [""] * len(images))
        reward.update(features=features, rewards={}, trainer_state=None, **more)


def test_it_learns_to_tell_two_kinds_of_images():
    reward, logged = AdversarialReward(REFERENCE, pixels), {}
    assert score(reward, [*REFERENCE, *OTHERS]).eq(0).all()  # nothing was learned
    for expected in (0.5, 1.0):
        learn(reward, OTHERS, log_metric=lambda name, value: logged.update({name: value}))
        assert logged["adversarial/accuracy"] == expected
        learn(reward, OTHERS, 30)
    fresh = score(reward, noisy((150, 100, 100), 2)), score(reward, noisy((100, 100, 150), 3))
    assert (fresh[0] > 0).float().mean() > 0.9 and (fresh[1] < 0).float().mean() > 0.9
    assert 0 < logged["adversarial/loss"] < np.log(2)


def test_images_of_one_distribution_are_not_told_apart():
    reward = AdversarialReward(noisy(120, 4, 200), pixels)
    for seed in range(20):
        learn(reward, noisy(120, 100 + seed, 100))
    assert score(reward, noisy(120, 5, 200)).abs().mean() < 0.5


def test_the_gradient_penalty_bounds_the_scores():
    free, default, bound = (AdversarialReward(REFERENCE, pixels, gradient_penalty=each) for each in (0.0, 0.1, 10.0))
    for reward in (free, default, bound):
        learn(reward, OTHERS, 40)
    scores = [score(reward, OTHERS).mean() for reward in (free, default, bound)]
    assert scores[0] < -4 < -3.5 < scores[1] < -1.5 < -0.5 < scores[2] < 0


def test_its_loss_is_that_of_the_docstring():
    reward = AdversarialReward(REFERENCE, pixels, steps=1, learning_rate=0.05, gradient_penalty=0.5, seed=3)
    learn(reward, OTHERS, 3)
    head = {name: value.detach().double().requires_grad_() for name, value in reward._head.items()}
    reference, others = pixels(REFERENCE).double(), pixels(OTHERS).double()
    centred = reference - reference.mean(dim=0)
    unit = centred.norm(dim=1).pow(2).mean().sqrt()
    real, fake = centred / unit, (others - reference.mean(dim=0)) / unit
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 3)
    first, second = (torch.randperm(16, generator=generator) for _ in range(2))
    share = torch.rand(16, 1, generator=generator).double()
    between = ((1 - share) * real[first] + share * fake[second]).requires_grad_()

    def network(scaled):
        hidden = torch.nn.functional.silu(scaled @ head["first"].T + head["first_bias"])
        return hidden @ head["last"] + head["last_bias"]

    slopes = torch.autograd.grad(network(between).sum(), between, create_graph=True)[0]
    of_real, of_fake = network(real), network(fake)
    loss = -torch.nn.functional.logsigmoid(of_real).mean() - torch.nn.functional.logsigmoid(-of_fake).mean()
    loss = loss + 0.25 * slopes.norm(dim=1).pow(2).mean()
    expected = dict(zip(head, torch.autograd.grad(loss, list(head.values())), strict=True))
    learn(reward, OTHERS)
    for name, gradient in expected.items():
        torch.testing.assert_close(reward._head[name].grad.double(), gradient, rtol=1e-3, atol=1e-6)


def test_a_state_that_was_saved_goes_on_bit_by_bit(tmp_path):
    whole, first = AdversarialReward(REFERENCE, pixels), AdversarialReward(REFERENCE, pixels)
    learn(whole, OTHERS, 5)
    learn(first, OTHERS, 2)
    save_tree(tmp_path / "state.safetensors", first.state_dict(), "the reward")
    second = AdversarialReward(REFERENCE, pixels)
    second.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert torch.equal(score(second, OTHERS), score(first, OTHERS))
    learn(second, OTHERS, 3)
    assert torch.equal(score(second, OTHERS), score(whole, OTHERS))
    learn(first, OTHERS)  # changes nothing of what was saved
    assert not torch.equal(score(second, OTHERS), score(first, OTHERS))

    second.load_state_dict(AdversarialReward(REFERENCE, pixels).state_dict())
    assert score(second, OTHERS).eq(0).all()


def test_the_global_random_generator_is_left_as_it_is():
    state = torch.get_rng_state()
    learn(AdversarialReward(REFERENCE, pixels), OTHERS)
    assert torch.equal(torch.get_rng_state(), state)


def test_references_may_be_a_folder_a_dataset_or_features(tmp_path):
    for number, image in enumerate(REFERENCE):
        image.save(tmp_path / f"{number:02}.png")
    (tmp_path / "notes.txt").write_text("none of them")
    dataset = Dataset.from_dict({"image": REFERENCE, "label": list(range(16))})
    found = [AdversarialReward(each, pixels).reference for each in (REFERENCE, tmp_path, str(tmp_path), dataset)]
    found.append(AdversarialReward(pixels(REFERENCE), pixels).reference)
    assert found[0].shape == (16, 48) and all(torch.equal(each, found[0]) for each in found)


def test_a_state_of_another_size_is_refused():
    small, large = AdversarialReward(REFERENCE, pixels, hidden_size=8), AdversarialReward(REFERENCE, pixels)
    learn(small, OTHERS)
    with pytest.raises(ValueError, match=r"`first` is of shape \(8, 48\), and here it is of shape \(64, 48\)"):
        large.load_state_dict(copy.deepcopy(small.state_dict()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reference": REFERENCE[:1]}, ValueError, "must have at least two images, and the list has 1 images"),
        ({"reference": "nowhere"}, ValueError, "the folder `nowhere` has 0 images"),
        ({"reference": 3}, TypeError, "`reference` is a int"),
        ({"reference": Dataset.from_dict({"picture": [1, 2]})}, ValueError, r"with the columns \['picture'\]"),
        ({"reference": torch.zeros(4)}, ValueError, r"of shape \(4,\)"),
        ({"reference": torch.ones(4, 2)}, ValueError, "at least two images that differ"),
        ({"extractor": 3}, TypeError, "`extractor` is 3"),
        ({"steps": 0}, ValueError, "`steps` is 0"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` is 0.0"),
        ({"gradient_penalty": -1.0}, ValueError, "`gradient_penalty` is -1.0"),
    ],
)
def test_what_is_no_reference_or_setting_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        AdversarialReward(**{"reference": REFERENCE, "extractor": pixels} | settings)
