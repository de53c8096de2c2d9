# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The loss on transitions against its published form, written out with normal distributions in float64."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from tiny import tiny_sd3
from tiny_families import TINY
from tiny_videos import TINY_VIDEOS
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from trainer_helpers import blue, bright, small_trainer

from trl_marble import MarbleConfig
from trl_marble.balance import Objective, SeparateBackward
from trl_marble.losses import Drawn, FrozenVelocities, GRPOLoss, Penalties, Sampled, StepCounts
from trl_marble.losses.forward_process import mean_square_distance
from trl_marble.sde import SDESteps, Transitions


GRID = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.2, 0.0])
SDE = pytest.mark.parametrize("sde", ["flow_sde", "cps"])


def grpo(**settings):
    defaults = {
        "grpo_sde": "flow_sde",
        "grpo_noise_level": 0.7,
        "grpo_window_size": 2,
        "grpo_window": "fixed",
        "grpo_window_every": 25,
        "grpo_clip_range": 0.02,
        "grpo_guard": False,
        "grpo_reweighting": "none",
        "beta": 0.0,
    }
    return GRPOLoss(**(defaults | settings))


class Problem(NamedTuple):
    """A velocity network, transitions that another one has sampled, and advantages of K rewards."""

    net: nn.Module
    old: nn.Module
    base: nn.Module
    transitions: Transitions
    advantages: Tensor
    counts: StepCounts


def make_problem(sde, num_rewards=4, batch=8, begin=0, seed=0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def network(near=None, by=0.5):
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        for i, parameter in enumerate(net.parameters()):
            start = torch.zeros_like(parameter) if near is None else list(near.parameters())[i].data
            parameter.data = start + by * random(*parameter.shape)
        return net

    net = network()
    old, base = network(net, 0.1), network(net, 0.1)
    steps = SDESteps.of_grid(sde, 0.7, GRID)
    points = [random(batch, 4)]
    for i in range(begin, begin + 2):
        step = steps.at(i).expand(points[-1])
        mean = step.mean(points[-1], velocity(old, points[-1], step.t)).detach()
        points.append(mean + step.deviation[:, None] * random(batch, 4))
    advantages = (2 * random(num_rewards, batch)).clamp(-5, 5)
    advantages[torch.rand(num_rewards, batch, generator=generator) > 0.6] = torch.nan
    advantages[:, 0] = 1.5
    valid, scored = ~advantages.isnan(), (~advantages.isnan()).any(dim=0)
    counts = StepCounts(2 * valid.sum(dim=1), 2 * scored.sum(), 2 * batch)
    return Problem(net, old, base, Transitions(torch.stack(points, dim=1), GRID, begin), advantages, counts)


def velocity(net, x, t):
    return net(torch.cat([x, t[:, None]], dim=1))


def replay(loss, x0, transitions) -> list[Drawn]:
    return list(loss.draw(Sampled(x0, transitions), GRID, len(transitions.points[0]) - 1, []))


def replayed(loss, problem) -> list[Drawn]:
    return replay(loss, torch.zeros(len(problem.transitions.points), 4).double(), problem.transitions)


def gaussian(sde, problem, net, place) -> Normal:
    """The distribution of where a step goes to, in its published form."""
    index = problem.transitions.begin + place
    x, t, t_next = problem.transitions.points[:, place], GRID[index].item(), GRID[index + 1].item()
    v, dt = velocity(net, x, torch.full([len(x)], t).double()), t_next - t
    if sde == "cps":
        s = t_next * torch.tensor(0.35 * torch.pi, dtype=torch.float64).sin()
        return Normal((1 - t_next) * (x - t * v) + (t_next**2 - s**2).sqrt() * (x + (1 - t) * v), s)
    s2 = 0.49 * t / (1 - (t if index > 0 else GRID[1].item()))
    mean = x * (1 + s2 * dt / (2 * t)) + v * (1 + s2 * (1 - t) / (2 * t)) * dt
    return Normal(mean, torch.tensor(-s2 * dt, dtype=torch.float64).sqrt())


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@SDE
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize(("guard", "reweighting"), [(False, "none"), (False, "noise"), (True, "step"), (True, "none")])
def test_all_gradients_from_one_weighted_pass_are_those_of_k_losses(sde, begin, guard, reweighting):
    """sum_i w (m/n) max(-A ratio, -A clip(ratio)), one autograd call per reward."""
    problem, loss = make_problem(sde, begin=begin), grpo(grpo_sde=sde, grpo_guard=guard, grpo_reweighting=reweighting)
    parameters = list(problem.net.parameters())
    noise = torch.stack([SDESteps.of_grid(sde, 0.7, GRID).deviation[i] for i in range(4)])
    weights = {"none": torch.ones(4), "noise": noise / noise.mean()}
    weights["step"] = -1 / GRID.double().diff()[:4]
    weights["step"] = weights["step"] / weights["step"].mean()
    clipped = 0
    for place, drawn in enumerate(replayed(loss, problem)):
        found = velocity(problem.net, drawn.x_t, drawn.t)
        frozen = FrozenVelocities(velocity(problem.old, drawn.x_t, drawn.t).detach())
        terms = loss.terms(found, drawn, frozen)
        coefficients = loss.coefficients(terms, problem.advantages, problem.counts)
        assert len(coefficients) == 1  # C = 1
        rows = SeparateBackward(4, parameters)
        rows.backward([Objective(terms[0], coefficients[0])])

        x_next = problem.transitions.points[:, place + 1]
        now = gaussian(sde, problem, problem.net, place)
        old = gaussian(sde, problem, problem.old, place)
        log_ratio = (now.log_prob(x_next) - old.log_prob(x_next).detach()).mean(dim=1)
        torch.testing.assert_close(log_ratio, loss_of(loss, grpo_guard=False).terms(found, drawn, frozen)[0])
        if guard:
            square = (now.mean - old.mean.detach()).square().mean(dim=1) / (2 * now.variance[0, 0])
            log_ratio = now.stddev[0, 0] * (log_ratio + square)
        ratio, weight = log_ratio.exp(), weights[reweighting][begin + place]
        for k, advantages in enumerate(problem.advantages):
            valid = ~advantages.isnan()
            a, n = advantages[valid], problem.counts.valid[k]
            both = torch.stack([-a * ratio[valid], -a * ratio[valid].clamp(0.98, 1.02)])
            clipped += int((both[1] > both[0]).sum())
            total = weight * both.max(dim=0).values.sum() / n
            expected = torch.autograd.grad(total, parameters, retain_graph=True)
            expected = torch.cat([gradient.flatten() for gradient in expected])
            assert (rows.gradients[k] - expected).norm() <= 1e-12 * expected.norm()
    assert clipped > 0


def loss_of(loss, **settings):
    return grpo(**(vars(loss) | settings))


@SDE
@pytest.mark.parametrize("guard", [False, True])
def test_at_the_old_policy_the_ratio_is_exactly_1_and_its_gradient_that_of_the_likelihood(sde, guard):
    problem, loss = make_problem(sde), grpo(grpo_sde=sde, grpo_guard=guard)
    for place, drawn in enumerate(replayed(loss, problem)):
        found = velocity(problem.net, drawn.x_t, drawn.t).detach().requires_grad_()
        log_ratio, _ = loss.terms(found, drawn, FrozenVelocities())
        assert not log_ratio.any()
        (gradient,) = torch.autograd.grad(log_ratio.sum(), found)
        # By hand: (x' - mu) / s^2 times d mu / d v, over the number of elements.
        step, x_next = drawn.transition.step, problem.transitions.points[:, place + 1]
        by_hand = (x_next - step.mean(drawn.x_t, found)) / step.deviation.square()[:, None]
        by_hand = by_hand * step.velocity_factor[:, None] / 4
        scale = step.deviation[:, None] if guard else 1
        torch.testing.assert_close(gradient, scale * by_hand.detach(), rtol=1e-12, atol=1e-14)


@SDE
def test_the_kl_is_that_of_the_two_distributions(sde):
    """With the variance of the step, `s^2 (t - t')` of Flow-SDE; the published code leaves the length out."""
    problem, loss = make_problem(sde), grpo(grpo_sde=sde, beta=0.3)
    assert loss.penalties == Penalties(reference=0.3) and loss.needs == {"old"}
    for place, drawn in enumerate(replayed(loss, problem)):
        distance = mean_square_distance(
            velocity(problem.net, drawn.x_t, drawn.t), velocity(problem.base, drawn.x_t, drawn.t)
        )
        both = [gaussian(sde, problem, net, place) for net in (problem.net, problem.base)]
        torch.testing.assert_close(drawn.kl_weight * distance, kl_divergence(*both).mean(dim=1), rtol=1e-11, atol=0)


def test_the_noisy_input_is_that_of_its_time():
    problem, loss = make_problem("flow_sde"), grpo()
    x0 = torch.randn(8, 4).double()
    for place, drawn in enumerate(replay(loss, x0, problem.transitions)):
        assert torch.equal(drawn.x_t, problem.transitions.points[:, place])
        t = drawn.t[:, None]
        torch.testing.assert_close((1 - t) * drawn.x0 + t * drawn.noise, drawn.x_t)


def test_rounding_in_float32_does_not_reach_the_ratio():
    """Of policies that are as close as a clip of 1e-5 keeps them, with a thousandth of it for rounding."""
    generator = torch.Generator().manual_seed(0)
    x, v, change = (torch.randn(2, 4000, generator=generator) for _ in range(3))
    step = SDESteps.of_grid("flow_sde", 0.7, GRID).at(1).expand(x)
    x_next = step.mean(x, v) + step.deviation[:, None] * torch.randn(2, 4000, generator=generator)
    ratios = []
    for dtype in (torch.float32, torch.float64):
        points = torch.stack([x, x_next], dim=1).to(dtype)
        (drawn,) = replay(grpo(), x.to(dtype), Transitions(points, GRID, 1))
        old = v.to(dtype)
        ratios.append(grpo().terms(old + 1e-2 * change.to(dtype), drawn, FrozenVelocities(old))[0].double())
    assert 1e-5 < ratios[1].abs().max() < 1e-4
    torch.testing.assert_close(*ratios, rtol=0, atol=1e-8)


def test_windows():
    assert grpo().window(7, num_steps=6, seed=0).begin == 0
    assert grpo(grpo_window="random", grpo_window_size=5).window(7, num_steps=6, seed=0).begin == 0
    moved = [grpo(grpo_window="sliding", grpo_window_every=3).window(i, 10, 0).begin for i in range(15)]
    assert moved == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3  # steps 0 to 4 of 10
    drawn = [grpo(grpo_window="random").window(i, 10, 0) for i in range(400)]
    assert drawn == [grpo(grpo_window="random").window(i, 10, 0) for i in range(400)]
    assert Counter(window.begin for window in drawn).keys() == {0, 1, 2, 3}
    assert min(Counter(window.begin for window in drawn).values()) > 70
    assert [window.begin for window in drawn] != [
        grpo(grpo_window="random").window(i, 10, 1).begin for i in range(400)
    ]


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_loss": "nft", "grpo_guard": True}, r"`grpo_guard=True` has no effect with `policy_loss='nft'`"),
        ({"policy_loss": "awm", "grpo_window_size": 3}, "has no effect with `policy_loss='awm'`"),
        ({"nft_beta": 0.2}, r"`nft_beta=0.2` has no effect with `policy_loss='grpo'`"),
        ({"timestep_fraction": 0.5}, "which trains on `grpo_window_size` steps"),
        ({"old_policy_preset": 2}, "which samples each generation batch with the trained policy"),
        ({"grpo_window_every": 2}, "has no effect with `grpo_window='random'`"),
        ({"grpo_clip_range": 1e-3}, "where the likelihood ratio is 1"),
        ({"grpo_clip_range": 0.0, "num_iterations": 2}, "`grpo_clip_range` is 0.0"),
        ({"grpo_window_size": 4, "num_inference_steps": 4}, "it must be smaller, as the last step adds no noise"),
        ({"grpo_window_size": 0}, "`grpo_window_size` is 0; it must be at least 1"),
        ({"grpo_noise_level": 0.0}, r"`grpo_noise_level` is 0.0; it must be in \(0, 1\]"),
        ({"grpo_sde": "ddim"}, "`grpo_sde` is 'ddim'; it must be one of 'flow_sde', 'cps'"),
        ({"grpo_guard": True, "grpo_reweighting": "noise"}, "weights steps by their noise already"),
        ({"rollout_cache": {"type": "FirstBlockCacheConfig"}}, "`rollout_cache` changes the velocities"),
        ({"beta": 0.0, "kl_target": 0.1}, "needs a first value of `beta`"),
    ],
)
def test_settings_that_have_no_effect_or_a_wrong_one_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MarbleConfig(str(tmp_path), use_cpu=True, **({"policy_loss": "grpo"} | settings))


def test_guided_rollouts_are_refused_whose_velocity_is_not_the_trained_one(tmp_path):
    with pytest.raises(ValueError, match="`guidance_scale=4.5` they follow a guided one"):
        small_trainer(tmp_path, policy_loss="grpo", guidance_scale=4.5, num_inference_steps=4)


# ---- Runs ----


GRPO = {
    "policy_loss": "grpo",
    "num_inference_steps": 4,
    "beta": 0.1,
    "balance_every": 1,
    "learning_rate": 0.01,
}


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.weights.parameters])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grpo_sde": "cps", "grpo_window": "sliding", "grpo_window_every": 1},
        {"grpo_guard": True, "grpo_reweighting": "step", "num_iterations": 2, "grpo_window_size": 3},
        {"multi_objective_aggregation": "progress", "grpo_reweighting": "noise"},
    ],
)
def test_it_trains_with_its_own_settings(tmp_path, settings):
    settings = GRPO | settings
    if "multi_objective_aggregation" in settings:
        del settings["balance_every"]
    trainer = small_trainer(tmp_path / "run", max_steps=2, **settings)
    before = weights_of(trainer)
    trainer.train()
    assert (weights_of(trainer) - before).norm() > 1e-4
    row = trainer.state.log_history[0]
    assert row["kl"] == 0 and trainer.state.log_history[1]["kl"] > 0
    if "balance_every" in settings:
        assert row["balance/cos_min"] >= -1e-6


def test_on_policy_no_pass_of_the_old_policy_is_run_and_later_in_a_batch_one_is(tmp_path):
    for iterations, expected in ((1, 0), (2, 2)):  # two steps of the window, in the second pass
        trainer = small_trainer(tmp_path / str(iterations), max_steps=2, num_iterations=iterations, **GRPO)
        calls = []
        own = trainer.weights.old_velocity
        trainer.weights.old_velocity = lambda *args, own=own, calls=calls: (calls.append(1), own(*args))[1]
        trainer.train()
        assert len(calls) == expected


def test_the_direction_is_the_gradient_of_the_loss_over_whole_steps(tmp_path):
    """What a training step leaves in `.grad`, against the likelihoods of the transitions that it has kept."""
    settings = GRPO | {"beta": 0.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    del settings["balance_every"]
    trainer = small_trainer(
        tmp_path, [bright], multi_objective_aggregation="sum_then_normalize", num_iterations=2, **settings
    )
    trainer.create_optimizer()
    batch = trainer._sample([0, 0, 1, 1], 0)
    with torch.no_grad():  # the old policy differs from now on
        for i, parameter in enumerate(trainer.weights.parameters):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    positions = [trainer.layout.locate(place) for place in range(2)]
    trainer.update.begin(0, batch, positions[0])
    for position in positions:
        trainer.update.accumulate(batch, position)
    trainer.update.finish()
    found = torch.cat([parameter.grad.flatten() for parameter in trainer.weights.parameters])
    steps = SDESteps.of_grid("flow_sde", 0.7, batch.transitions.times)
    conditioning, total = batch.conditioning.select(batch.prompt_index), 0
    for place in range(2):
        x, x_next = batch.transitions.points[:, place], batch.transitions.points[:, place + 1]
        step = steps.at(batch.transitions.begin + place).expand(x)
        old = Normal(
            step.mean(x, trainer.weights.old_velocity(x, step.t, conditioning)), step.deviation.view(-1, 1, 1, 1)
        )
        now = Normal(step.mean(x, trainer.weights.velocity(x, step.t, conditioning)), old.stddev)
        ratio = (now.log_prob(x_next) - old.log_prob(x_next)).flatten(1).mean(dim=1).exp()
        a = batch.advantages[0]
        total = total + torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4)).sum() / 8
    expected = torch.autograd.grad(total, trainer.weights.parameters)
    assert relative_error(found, torch.cat([gradient.flatten() for gradient in expected])) < 1e-3


def test_evaluations_sample_without_noise(tmp_path):
    trainer = small_trainer(tmp_path / "a", max_steps=1, **GRPO)
    other = small_trainer(tmp_path / "b", max_steps=1, num_inference_steps=4)
    found, expected = (each.evaluate(each.train_dataset) for each in (trainer, other))
    names = [name for name in expected if "rewards/" in name]
    assert names and {name: found[name] for name in names} == {name: expected[name] for name in names}


@pytest.mark.parametrize(
    "name",
    ["FluxPipeline", "QwenImagePipeline", "ZImagePipeline", "SanaPipeline", "WanPipeline"],
)
def test_families_train_on_their_transitions(tmp_path, name):
    make, call = (TINY | TINY_VIDEOS)[name]
    size = {key: call[key] for key in ("height", "width", "max_sequence_length") if key in call}
    if name == "FluxPipeline":
        size["guidance_scale"] = call["guidance_scale"]
    if "num_frames" in call:
        size["num_frames"] = call["num_frames"]
    rewards = (bright_video, blue_video) if "num_frames" in call else (bright, blue)
    trainer = small_trainer(tmp_path, rewards, pipeline=make(), max_steps=1, **(GRPO | size))
    before = weights_of(trainer)
    trainer.train()
    assert (weights_of(trainer) - before).norm() > 1e-4
    assert trainer.state.log_history[0]["balance/cos_min"] >= -1e-6


def bright_video(videos, **kwargs):
    return bright([video[0] for video in videos])


def blue_video(videos, **kwargs):
    return blue([video[0] for video in videos])


# ---- Nothing of how a step is done changes it ----

RESUMED = GRPO | {
    "steps_per_generation": 2,
    "num_iterations": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 5,
    "kl_target": 0.01,
    "regularizer_fraction": 0.5,
}


def test_resumed_run_equals_the_uninterrupted_run(tmp_path):
    whole = small_trainer(tmp_path / "whole", **RESUMED)
    whole.train()
    for step in (1, 4):  # in the middle of a generation batch, and between two
        resumed = small_trainer(tmp_path / f"resumed-{step}", **RESUMED)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert weights_of(resumed).equal(weights_of(whole))
        for kind in ("old", "average"):
            for name, value in whole.weights.state_dict()[kind].items():
                assert resumed.weights.state_dict()[kind][name].equal(value)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_image_that_overflows_in_the_window_is_left_out(tmp_path, step):
    trainer = small_trainer(tmp_path, on_nonfinite="skip", max_steps=1, grpo_window="fixed", **GRPO)
    calls = []

    def overflow(module, inputs, output):
        """Of the second image of the first call of the pipeline, in one of its four steps."""
        calls.append(1)
        if len(calls) == step:
            output[0][1] = torch.nan

    trainer.flow.transformer.register_forward_hook(overflow)
    trainer.train()
    batch = trainer._batch
    left_out = batch.sample_ids == 1
    assert trainer.state.log_history[0]["nonfinite/latents"] == 1
    assert batch.advantages[:, left_out].isnan().all() and not batch.transitions.points[left_out].any()
    assert batch.transitions.points.isfinite().all() and batch.transitions.points[~left_out].flatten(1).any(1).all()
    assert weights_of(trainer).isfinite().all()


def test_a_batch_of_another_loss_is_not_gone_on_with(tmp_path):
    other = {**RESUMED, "policy_loss": "nft"}
    small_trainer(tmp_path / "nft", **(other | {"max_steps": 1})).train()
    trainer = small_trainer(tmp_path / "grpo", **RESUMED)
    with pytest.raises(TypeError, match="this generation batch has none"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nft" / "checkpoint-1"))


@pytest.mark.parametrize("split", [(2, 2), (1, 4)])
def test_how_a_step_is_split_into_micro_batches_does_not_change_it(tmp_path, split):
    def direction(folder, size, accumulation):
        settings = GRPO | {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}
        trainer = small_trainer(
            folder,
            pipeline=tiny_sd3(num_layers=1),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            **settings,
        )
        before = weights_of(trainer)
        trainer.train()
        return weights_of(trainer) - before

    whole, parts = direction(tmp_path / "whole", 4, 1), direction(tmp_path / "parts", *split)
    assert whole.norm() > 0 and relative_error(parts, whole) < 1e-4
