# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Weights by progress against plain loops, and what they must not depend on."""

import math

import pytest
import torch

from trl_marble.balance import ProgressWeights, aggregate_advantages


NAN = math.nan
NAMES = ["a", "b", "c"]


def batches(number=5, prompts=4, images=3, seed=0):
    """Generation batches of two of four prompts, `(ids, rewards [3, images])`; the third reward applies to odd ids."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        ids = torch.randperm(prompts, generator=generator)[:2].repeat_interleave(images)
        rewards = torch.rand(3, len(ids), generator=generator)
        rewards[2, ids % 2 == 0] = NAN
        made.append((ids, rewards))
    return made


def base_images(prompts=4, images=2, seed=1):
    ids = torch.arange(prompts).repeat_interleave(images)
    rewards = torch.rand(3, len(ids), generator=torch.Generator().manual_seed(seed))
    rewards[2, ids % 2 == 0] = NAN
    return ids, rewards


def same(state, other):
    return all(value.nan_to_num(9.0).equal(other[name].nan_to_num(9.0)) for name, value in state.items())


def feed(progress, made, base=None):
    """A run: base images of what is new, then the batch, then the optimizer step."""
    base_ids, base_rewards = base or base_images()
    for ids, rewards in made:
        new = torch.isin(base_ids, torch.tensor(progress.missing(ids), dtype=torch.int64))
        if new.any():
            progress.add_base(base_ids[new], base_rewards[:, new])
        progress.observe(ids, rewards)
        progress.commit()
    return progress


def plain(made, temperature=0.15, ema=0.9):
    """Progress, scales and weights by loops over numbers."""
    base_ids, base_rewards = base_images()
    progress, scales = [], []
    seen = {i for ids, _ in made for i in ids.tolist()}
    for k in range(3):
        own = [(i, r) for i, r in zip(base_ids.tolist(), base_rewards[k].tolist(), strict=True) if not math.isnan(r)]
        own = [(i, r) for i, r in own if i in seen]
        values = [r for _, r in own]
        mean = sum(values) / len(values)
        scale = math.sqrt(sum((r - mean) ** 2 for r in values) / len(values))
        total = 0.0  # the policy begins as the base
        for ids, rewards in made:
            gains = []
            for prompt in set(ids.tolist()):
                of_base = [r for i, r in own if i == prompt]
                now = [r for i, r in zip(ids.tolist(), rewards[k].tolist(), strict=True) if i == prompt]
                now = [r for r in now if not math.isnan(r)]
                if of_base and now:
                    gains.append(sum(now) / len(now) - sum(of_base) / len(of_base))
            if gains:
                total = ema * total + (1 - ema) * sum(gains) / len(gains)
        progress.append(total / scale)
        scales.append(scale)
    exponentials = [math.exp(-p / temperature) for p in progress]
    return progress, scales, [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_it_is_what_plain_loops_find(number):
    made = batches(number)
    found, (progress, scales, weights) = feed(ProgressWeights(NAMES), made), plain(made)
    assert found.progress.tolist() == pytest.approx(progress, rel=1e-9)
    assert found.scales.tolist() == pytest.approx(scales, rel=1e-9)
    assert found.weights.tolist() == pytest.approx(weights, rel=1e-9)
    assert found.weights.sum().item() == pytest.approx(1)


def test_the_one_that_lags_weighs_most_and_temperature_says_how_much():
    prompts = torch.zeros(4, dtype=torch.int64)
    base = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).repeat(3, 1)
    now = torch.tensor([[0.8], [0.5], [0.65]]).repeat(1, 4)
    for temperature in (0.15, 1.0, 100.0):
        progress = ProgressWeights(NAMES, temperature, ema=0.0)
        progress.add_base(prompts, base)
        progress.observe(prompts, now)
        assert progress.progress.tolist() == pytest.approx([0.6, 0.0, 0.3], abs=1e-6)
        assert (progress.weights[1] / progress.weights[0]).item() == pytest.approx(math.exp(0.6 / temperature))
    assert progress.weights.tolist() == pytest.approx([1 / 3] * 3, abs=0.01)


@pytest.mark.parametrize(("factor", "shift"), [(10, 3), (1e-3, -50), (1e4, 0)])
def test_the_scale_of_a_reward_changes_neither_weights_nor_advantages(factor, shift):
    def changed(rewards):
        rewards = rewards.double().clone()
        rewards[1] = rewards[1] * factor + shift
        rewards[2] = rewards[2] / factor - shift
        return rewards

    made, (ids, base) = batches(), base_images()
    made[-1][1][1, 0] = NAN  # a failed image: there the sum of raw rewards would depend on where zero is
    expected = feed(ProgressWeights(NAMES), made)
    found = feed(ProgressWeights(NAMES), [(i, changed(r)) for i, r in made], (ids, changed(base)))
    assert torch.allclose(found.progress, expected.progress, rtol=1e-7, atol=1e-9)
    assert torch.allclose(found.weights, expected.weights, rtol=1e-7)
    groups, rewards = made[-1]
    for scale in ("batch", "group"):
        before, after = (
            aggregate_advantages(progress.in_units_of_scales(values), groups, progress.weights, "progress", scale)
            for progress, values in ((expected, rewards), (found, changed(rewards)))
        )
        assert before.abs().max() > 0.1 and torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("scale", ["batch", "group"])
def test_the_advantage_is_that_of_normalize_then_sum(scale):
    groups, rewards = batches()[0]
    weights = torch.tensor([2.0, 0.3, 0.7])
    found = aggregate_advantages(rewards, groups, weights, "progress", scale)
    expected = aggregate_advantages(rewards, groups, weights, "normalize_then_sum", scale)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_a_reward_that_applies_to_no_image_yet_weighs_as_one_that_has_come_nowhere():
    prompts = torch.zeros(2, dtype=torch.int64)
    progress = ProgressWeights(NAMES)
    assert progress.weights.tolist() == pytest.approx([1 / 3] * 3) and progress.progress.isnan().all()
    progress.add_base(prompts, torch.tensor([[0.0, 1.0], [0.0, 1.0], [NAN, NAN]]))
    progress.observe(prompts, torch.tensor([[0.5, 0.5], [0.8, 0.8], [NAN, NAN]]))
    assert progress.progress[2].isnan() and progress.weights.isfinite().all()
    assert progress.weights[2] == progress.weights[0] > progress.weights[1]
    # Its base images failed: a prompt of which there is no mean gives no difference, and is not counted as 0.
    progress.observe(prompts, torch.tensor([[0.5, 0.5], [0.8, 0.8], [0.3, 0.9]]))
    assert progress.progress[2].isnan() and progress.scales[2] == pytest.approx(0.3)


def test_a_reward_that_is_constant_on_the_base_model_has_its_scale_from_training():
    prompts = torch.zeros(2, dtype=torch.int64)
    progress = ProgressWeights(["sparse", "constant"])
    progress.add_base(prompts, torch.full((2, 2), 0.1))
    progress.observe(prompts, torch.full((2, 2), 0.1))
    assert progress.scales.tolist() == [0, 0] and progress.progress.tolist() == [0, 0]
    assert progress.weights.tolist() == [0.5, 0.5]
    progress.observe(prompts, torch.tensor([[0.1, 1.1], [0.1, 0.1]]))
    expected = torch.tensor([0.1] * 5 + [1.1]).std(correction=0).item()
    assert progress.scales.tolist() == pytest.approx([expected, 0], abs=1e-6)
    assert progress.progress[0] > 0 and progress.progress[1] == 0


def test_a_reward_at_its_target_weighs_nothing_until_it_falls_below():
    prompts = torch.zeros(2, dtype=torch.int64)
    base = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    progress = ProgressWeights(NAMES, ema=0.0, targets=[0.7, None, 2.0])

    def weights_at(*levels):
        progress.observe(prompts, torch.tensor(levels)[:, None].repeat(1, 2))
        assert progress.levels.tolist() == pytest.approx(levels, abs=1e-6)
        return progress.weights.tolist()

    progress.add_base(prompts, base)
    assert weights_at(0.6, 0.5, 0.5)[0] > 0
    assert weights_at(0.75, 0.5, 0.5) == pytest.approx([0, 0.5, 0.5])
    assert weights_at(0.69, 0.5, 0.5)[0] > 0
    progress = ProgressWeights(NAMES, ema=0.0, targets=[0.7, 0.8, 0.9])
    progress.add_base(prompts, base)
    assert weights_at(0.7001, 0.9, 1.0) == [0, 0, 0] and progress.reached.all()
    groups = torch.tensor([0, 0])
    advantages = aggregate_advantages(torch.rand(3, 2), groups, progress.weights, "progress")
    assert advantages.tolist() == [[0, 0]]


def test_the_average_starts_at_the_base():
    """The first images are the base model's own, so what differs is noise."""
    prompts = torch.zeros(2, dtype=torch.int64)
    progress = ProgressWeights(NAMES, ema=0.9)
    progress.add_base(prompts, torch.tensor([[0.0, 1.0]]).repeat(3, 1))
    assert progress.progress.isnan().all()
    for expected in (0.1, 0.19):
        progress.observe(prompts, torch.tensor([[1.0, 1.0]]).repeat(3, 1))
        assert progress.progress.tolist() == pytest.approx([expected] * 3)


def test_with_bounds_the_progress_is_the_share_of_the_way():
    prompts = torch.zeros(2, dtype=torch.int64)
    progress = ProgressWeights(NAMES, ema=0.0, bounds=[1.0, None, 4.5])
    progress.add_base(prompts, torch.tensor([[0.4, 0.6], [0.0, 1.0], [0.0, 1.0]]))
    progress.observe(prompts, torch.tensor([[0.75, 0.75], [0.75, 0.75], [2.5, 2.5]]))
    assert progress.scales.tolist() == pytest.approx([0.5, 0.5, 4.0])
    assert progress.progress.tolist() == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize("bound", [0.5, 0.4])
def test_a_bound_that_the_base_model_has_reached_is_refused_with_the_values(bound):
    progress = ProgressWeights(NAMES, bounds=[None, bound, 3.0])
    with pytest.raises(ValueError, match=f"bound of reward `b` is {bound}, and its mean over .* is 0.5"):
        progress.add_base(torch.zeros(2, dtype=torch.int64), torch.tensor([[0.0, 1.0]] * 3))


def test_what_no_step_has_used_is_not_in_the_state_and_can_be_taken_back():
    made = batches()
    expected, progress = feed(ProgressWeights(NAMES), made), feed(ProgressWeights(NAMES), made[:3])
    committed = progress.state_dict()
    progress.observe(*made[3])
    assert not progress.progress.equal(feed(ProgressWeights(NAMES), made[:3]).progress)  # it counts at once
    assert same(progress.state_dict(), committed)
    progress.roll_back()
    feed(progress, made[3:])
    assert same(progress.state_dict(), expected.state_dict())


def test_a_restored_state_goes_on_as_the_original():
    made = batches(8)
    expected, restored = feed(ProgressWeights(NAMES), made), ProgressWeights(NAMES)
    restored.load_state_dict(feed(ProgressWeights(NAMES), made[:4]).state_dict())
    feed(restored, made[4:])
    assert restored.weights.equal(expected.weights) and restored.scales.equal(expected.scales)
    with pytest.raises(ValueError, match="saved progress is of 3 rewards, this run has 1"):
        ProgressWeights(["a"]).load_state_dict(expected.state_dict())


def test_prompts_are_sampled_from_the_base_model_once():
    progress = ProgressWeights(NAMES)
    ids, rewards = base_images()
    assert progress.missing(torch.tensor([3, 1, 3])) == [3, 1]
    with pytest.raises(ValueError, match="no images of the base model"):
        progress.observe(ids, rewards)
    progress.add_base(ids, rewards)
    assert progress.missing(torch.tensor([3, 9])) == [9]
    with pytest.raises(ValueError, match="each is sampled once"):
        progress.add_base(ids, rewards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": []}, "names is empty"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"targets": [1.0]}, "targets has 1 values for 3 rewards"),
        ({"bounds": [1.0, NAN, None]}, "bounds must be finite"),
        ({"priorities": [1.0, 2.0, 0.0]}, "priorities must be 3 positive numbers"),
        ({"priorities": [1.0]}, "priorities must be 3 positive numbers"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProgressWeights(**({"names": NAMES} | settings))


def test_wrong_rewards_are_refused():
    ids, rewards = base_images()
    progress = ProgressWeights(NAMES)
    with pytest.raises(ValueError, match="one int64 id per image"):
        progress.add_base(ids, rewards[:2])
    rewards[0, 0] = math.inf
    with pytest.raises(ValueError, match="infinite"):
        progress.add_base(ids, rewards)


def test_a_bound_that_a_resumed_run_sets_too_low_is_refused_at_once():
    """Else its reward would silently have no part in the sum: no prompt may be new any more."""
    before, prompts = ProgressWeights(["a"]), torch.tensor([1, 1])
    before.add_base(prompts, torch.tensor([[0.4, 0.8]]))
    before.commit()
    with pytest.raises(
        ValueError, match="The bound of reward `a` is 0.5, and its mean over the base model's images is 0.6"
    ):
        ProgressWeights(["a"], bounds=[0.5]).load_state_dict(before.state_dict())
    ProgressWeights(["a"], bounds=[0.7]).load_state_dict(before.state_dict())


def test_a_reward_of_twice_the_priority_is_to_come_twice_as_far():
    prompts = torch.tensor([7, 7])

    def weights(gains, **settings):
        progress = ProgressWeights(["a", "b"], ema=0.0, **settings)
        progress.add_base(prompts, torch.tensor([[0.0, 2.0], [0.0, 2.0]]))  # standard deviation 1
        progress.observe(prompts, 1 + torch.tensor(gains)[:, None].expand(2, 2))
        return progress.weights

    assert weights([0.3, 0.6], priorities=[1, 2]).tolist() == pytest.approx([0.5, 0.5])
    torch.testing.assert_close(weights([0.3, 0.6], priorities=[2, 2]), weights([0.3, 0.6]))
    torch.testing.assert_close(weights([0.3, 0.6], priorities=[10, 20]), weights([0.3, 0.6], priorities=[1, 2]))


def test_a_reward_that_ranks_the_images_of_a_prompt_is_refused():
    prompts = torch.arange(20).repeat_interleave(4)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(20)]).flatten().float()
    scores = torch.rand(80, generator=generator)
    few = ProgressWeights(["rank", "score"])
    few.add_base(prompts[:60], torch.stack([order[:60] / 3, scores[:60]]))  # it may be by chance
    with pytest.raises(ValueError, match=r"`rank` has the mean 0.5 on .* each of 20 prompts"):
        few.add_base(prompts[60:], torch.stack([order[60:] / 3, scores[60:]]))
    # What is the same for all images, or applies to some, is none.
    order[::4] = torch.nan
    ProgressWeights(["rank", "same"]).add_base(prompts, torch.stack([order, torch.ones(80)]))
