# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Losses that compare the samples of a prompt, against their published forms with autograd in float64."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from trl_marble import MarbleConfig
from trl_marble.balance import Objective, SeparateBackward
from trl_marble.losses import CRDLoss, DGPOLoss, DPOLoss, Drawn, FrozenVelocities, GDROLoss, Penalties
from trl_marble.update.group_table import GroupTable


C = 5.0
GROUPS = torch.tensor([0, 2, 1, 0, 2, 0, 0, 1, 2, 0])  # of the samples of a micro-step, in the order of training
SIZE = 5  # samples of a prompt in the generation batch, of which the optimizer step has 5, 2 and 3


def crd(**settings):
    defaults = {"crd_objective": "mse", "crd_beta": 0.7, "balance_on": "loss", "beta": 0.0}
    unused = {"reference_guidance_scale": None, "sampling_policy_preset": None}
    return CRDLoss(advantage_clip=C, **(defaults | unused | settings))


def dgpo(**settings):
    defaults = {"dgpo_beta": 3.0, "dgpo_reference": "base", "dgpo_clip_range": 0.1, "beta": 0.0}
    return DGPOLoss(**(defaults | {"reference_guidance_scale": None} | settings))


def gdro(**settings):
    defaults = {"gdro_beta": 2.0, "gdro_temperature": 0.7, "gdro_best": 0.1, "beta": 0.0}
    return GDROLoss(**(defaults | settings))


@pytest.fixture
def problem(make_problem):
    """Samples of three prompts; one reward applies to one sample of a group only, and one to none of another."""
    problem = make_problem(num_rewards=4, batch=len(GROUPS))
    problem.advantages[1, GROUPS == 1] = torch.nan
    problem.advantages[2, (GROUPS == 2).nonzero()[1:]] = torch.nan
    return problem


def prepare(problem, loss, on_policy=False):
    """The terms of a step and what it compares them with: as the update finds them, part by part."""
    frozen = FrozenVelocities(None if on_policy else problem.frozen.old, problem.frozen.reference)
    ids = torch.empty_like(GROUPS)
    for group in GROUPS.unique():
        members = (GROUPS == group).nonzero().flatten()
        ids[members] = group * SIZE + torch.arange(len(members)).flip(0)
    differs = not on_policy or "reference" in loss.needs
    with torch.no_grad():
        before = torch.stack(list(loss.terms(problem.velocity(), problem.drawn, frozen)))[None] if differs else None
    groups = GroupTable(ids, problem.advantages, before, SIZE).at(0, ids)
    # In the step itself the frozen velocities are not read.
    terms = loss.terms(problem.velocity(), problem.drawn, FrozenVelocities() if differs else frozen)
    return terms, problem.counts._replace(groups=groups)


def rows_of(problem, loss, terms, counts):
    coefficients = loss.coefficients(terms, problem.advantages, counts)
    assert len(coefficients) == 1  # C = 1
    assert (coefficients[0][problem.advantages.isnan()] == 0).all()
    rows = SeparateBackward(len(problem.advantages), list(problem.net.parameters()))
    rows.backward([Objective(terms[0], coefficients[0])], retain_graph=True)
    return rows.gradients


def assert_same(found, expected):
    assert expected.norm() > 0
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


def centre(values, valid):
    """Minus the mean over the valid samples of the group, one after the other."""
    centred = torch.zeros_like(values)
    for group in GROUPS.unique():
        own = GROUPS == group
        if (own & valid).any():
            centred = torch.where(own, values - values[own & valid].mean().detach(), centred)
    return centred


def log_ratio(problem, old):
    target = problem.drawn.noise - problem.drawn.x0

    def log_p(velocity):
        error = velocity - target
        return -error.square().mean(dim=1) / error.detach().abs().mean(dim=1).clamp(min=1e-5)

    return log_p(problem.velocity()) - log_p(old).detach()


def crd_losses(problem, objective, b, old, advantages, counts):
    """As published, reward by reward: centred, regressed, times C / b."""
    for k, own in enumerate(advantages):
        valid = ~own.isnan()
        reward = centre(0.5 + own.nan_to_num() / (2 * C), valid)
        rho = centre(log_ratio(problem, old), valid)
        if objective == "mse":
            each = (b * rho - reward).square()
        else:
            each = binary_cross_entropy_with_logits(b * rho, reward.sigmoid(), reduction="none")
        yield C / b * each[valid].sum() / counts.valid[k]


@pytest.mark.parametrize("objective", ["mse", "bce"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_all_gradients_of_crd_from_one_weighted_pass_are_those_of_k_losses(problem, objective, on_policy):
    loss = crd(crd_objective=objective)
    terms, counts = prepare(problem, loss, on_policy)
    assert (counts.groups.terms is None) == on_policy
    found = rows_of(problem, loss, terms, counts)
    old = problem.velocity().detach() if on_policy else problem.frozen.old
    for k, expected in enumerate(crd_losses(problem, objective, 0.7, old, problem.advantages, counts)):
        assert_same(found[k], problem.gradient(expected))
    assert loss.shared(problem.velocity(), terms, FrozenVelocities(), None, counts) is None


@pytest.mark.parametrize("objective", ["mse", "bce"])
def test_signal_plus_trust_region_is_the_loss_of_a_reward(problem, objective):
    """With one reward: by either way of balancing."""
    problem = problem._replace(advantages=problem.advantages[:1])
    counts = problem.counts._replace(valid=problem.counts.valid[:1], scored=problem.counts.valid[0])
    problem = problem._replace(counts=counts)
    scored = ~problem.advantages[0].isnan()
    gradients, rest = [], None
    for balance_on in ("loss", "advantage"):
        loss = crd(crd_objective=objective, balance_on=balance_on)
        terms, counts = prepare(problem, loss)
        (own,) = loss.coefficients(terms, problem.advantages, counts)
        rest = loss.shared(problem.velocity(), terms, FrozenVelocities(), scored, counts)
        total = (own[0] * terms[0]).sum() + (0.0 if rest is None else rest.sum())
        gradients.append(problem.gradient(total))
    assert_same(*gradients)
    rho = centre(log_ratio(problem, problem.frozen.old), scored)[scored]
    value = (0.7 * rho).square() if objective == "mse" else (0.7 * rho).exp().log1p() - 0.7 * rho / 2
    torch.testing.assert_close(rest.sum(), C / 0.7 * value.sum() / problem.counts.scored)


def test_the_trust_region_pulls_nowhere_at_the_old_policy(problem):
    loss = crd(balance_on="advantage")
    terms, counts = prepare(problem, loss, on_policy=True)
    assert loss.shared(problem.velocity(), terms, FrozenVelocities(), None, counts) is None


def dgpo_losses(problem, reference, advantages, counts, clip, clipped):
    """As published, reward by reward: the sigmoid of the sum over the group, and no gradient where it is clipped."""
    target = problem.drawn.noise - problem.drawn.x0
    mse, old, other = (
        (velocity - target).square().mean(dim=1)
        for velocity in (problem.velocity(), problem.frozen.old, getattr(problem.frozen, reference))
    )
    ratio = (old - mse).exp().detach()
    for k, own in enumerate(advantages):
        valid, a = ~own.isnan(), own.nan_to_num()
        stops = torch.where(a > 0, ratio > 1 + clip, ratio < 1 - clip)
        clipped.append(int((stops & valid).sum()))
        total = 0.0
        for group in GROUPS.unique():
            own_group = (GROUPS == group) & valid
            s = 3.0 / max(int(own_group.sum()), 1) * (a * (mse - other))[own_group].sum().detach()
            total = total + (s.sigmoid() * a * torch.where(stops, mse.detach(), mse))[own_group].sum()
        yield total / counts.valid[k]


@pytest.mark.parametrize("reference", ["base", "old"])
@pytest.mark.parametrize("clip", [0.02, 10.0])
def test_all_gradients_of_dgpo_from_one_weighted_pass_are_those_of_k_losses(problem, reference, clip):
    loss = dgpo(dgpo_reference=reference, dgpo_clip_range=clip)
    terms, counts = prepare(problem, loss)
    found, clipped = rows_of(problem, loss, terms, counts), []
    name = "reference" if reference == "base" else "old"
    for k, expected in enumerate(dgpo_losses(problem, name, problem.advantages, counts, clip, clipped)):
        assert_same(found[k], problem.gradient(expected))
    assert (sum(clipped) > 0) == (clip == 0.02)


def test_dgpo_compared_with_the_policy_itself_weighs_every_group_by_a_half(problem):
    loss = dgpo(dgpo_reference="old")
    terms, counts = prepare(problem, loss, on_policy=True)
    (own,) = loss.coefficients(terms, problem.advantages, counts)
    torch.testing.assert_close(own, 0.5 * problem.advantages.nan_to_num() / counts.valid[:, None])


def preferences(problem, beta):
    """`-beta (mse - mse_ref)` of each sample."""
    target = problem.drawn.noise - problem.drawn.x0
    mse, other = (
        (velocity - target).square().mean(dim=1) for velocity in (problem.velocity(), problem.frozen.reference)
    )
    return mse, -beta * (mse - other)


def groups_of(advantages):
    """The samples of each group that a reward applies to."""
    for group in GROUPS.unique():
        yield ((group == GROUPS) & ~advantages.isnan()).nonzero().flatten()


def test_all_gradients_of_gdro_from_one_weighted_pass_are_those_of_k_losses(problem):
    """The published ranking loss, pick by pick."""
    loss = gdro()
    terms, counts = prepare(problem, loss)
    found = rows_of(problem, loss, terms, counts)
    for k, own in enumerate(problem.advantages):
        mse, s = preferences(problem, 2.0)
        total = torch.zeros(())
        for members in groups_of(own):
            ranked = members[own[members].argsort(descending=True)]
            each = torch.zeros(())
            for i in range(len(ranked) - 1):
                left = ranked[i:]
                q = (own[left] / 0.7).softmax(dim=0)
                each = each + s[left].logsumexp(dim=0) - (q * s[left]).sum()
            if len(ranked) > 0:
                each = each + 0.1 * 2.0 * mse[ranked[0]]
            total = total + len(members) * each
        assert_same(found[k], problem.gradient(total / counts.valid[k]))


def test_all_gradients_of_dpo_from_one_weighted_pass_are_those_of_k_losses(problem):
    """Each reward's best and worst of a prompt: two samples with a gradient, or none."""
    loss = DPOLoss(dpo_beta=4.0, beta=0.0)
    terms, counts = prepare(problem, loss)
    (coefficients,), found = (
        loss.coefficients(terms, problem.advantages, counts),
        rows_of(problem, loss, terms, counts),
    )
    for k, own in enumerate(problem.advantages):
        _, s = preferences(problem, 2.0)
        total = torch.zeros(())
        for members in groups_of(own):
            assert (coefficients[k, members] != 0).sum() == (2 if len(members) > 1 else 0)
            if len(members) > 1:
                best, worst = members[own[members].argmax()], members[own[members].argmin()]
                total = total - len(members) * (s[best] - s[worst]).sigmoid().log()
        assert_same(found[k], problem.gradient(total / counts.valid[k]))


def test_a_prompt_whose_samples_are_alike_makes_no_pair(problem):
    problem.advantages[0] = 1.5
    problem.advantages[0, GROUPS == 2] = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    loss = DPOLoss(dpo_beta=4.0, beta=0.0)
    terms, counts = prepare(problem, loss)
    (own,) = loss.coefficients(terms, problem.advantages, counts)
    assert (own[0, GROUPS != 2] == 0).all() and sorted(own[0, GROUPS == 2].sign().tolist()) == [-1, 0, 1]


EACH = {
    "mse": crd(),
    "bce": crd(crd_objective="bce"),
    "dgpo": dgpo(),
    "gdro": gdro(),
    "dpo": DPOLoss(dpo_beta=4.0, beta=0.0),
}


@pytest.mark.parametrize("loss", EACH.values(), ids=EACH)
def test_how_a_group_is_cut_changes_nothing(problem, loss):
    terms, counts = prepare(problem, loss)
    (whole,) = loss.coefficients(terms, problem.advantages, counts)
    for part in (slice(0, 1), slice(3, 7)):
        groups = counts.groups
        compared = groups._replace(
            place=groups.place[part], advantages=groups.advantages[:, part], terms=groups.terms[:, part]
        )
        own = loss.coefficients(
            [term[part] for term in terms], problem.advantages[:, part], counts._replace(groups=compared)
        )
        torch.testing.assert_close(own[0], whole[:, part], rtol=1e-14, atol=0)  # vectors of other lengths round


def test_the_table_finds_groups_wherever_their_samples_lie():
    """Groups of 4, of which the step has two samples of the first, one of the second and four of the third."""
    ids = torch.tensor([9, 2, 11, 6, 8, 1, 10])
    terms = torch.stack([torch.stack([ids, 10 * ids]), torch.stack([ids + 100, ids])]).double()  # [T=2, N=2, S]
    table = GroupTable(ids, -ids[None].double(), terms, num_generations=4)
    groups = table.at(1, torch.tensor([10, 6, 2]))
    assert groups.terms[0].tolist() == [[108, 109, 110, 111], [106, 0, 0, 0], [101, 102, 0, 0]]
    assert groups.own().tolist() == [[110, 106, 102], [10, 6, 2]]
    assert groups.advantages[0, 0].tolist() == [-8, -9, -10, -11]
    assert groups.advantages[0, 1].isnan().tolist() == [False, True, True, True]
    assert table.at(0, torch.tensor([1])).terms[1].tolist() == [[10, 20, 0, 0]]
    assert GroupTable(ids, -ids[None].double(), None, 4).at(0, ids).own() is None


@pytest.mark.parametrize("loss", EACH.values(), ids=EACH)
def test_what_is_not_finite_in_one_sample_is_seen_in_its_group_only(problem, loss):
    for name in loss.needs - {"group"}:
        velocity = getattr(problem.frozen, name).clone()
        velocity[0] = torch.nan  # of group 0
        terms, counts = prepare(problem._replace(frozen=problem.frozen._replace(**{name: velocity})), loss)
        (own,) = loss.coefficients(terms, problem.advantages, counts)
        assert own[0, GROUPS == 0].isnan().any() and own[:, GROUPS != 0].isfinite().all()


@pytest.mark.parametrize(
    ("loss", "needs", "penalties"),
    [
        (crd(beta=0.3), {"old", "group"}, Penalties(reference=0.3)),
        (dgpo(beta=0.2), {"old", "group", "reference"}, Penalties(reference=0.2)),
        (dgpo(dgpo_reference="old"), {"old", "group"}, Penalties()),
        (gdro(), {"group", "reference"}, Penalties()),
        (DPOLoss(dpo_beta=4.0, beta=0.1), {"group", "reference"}, Penalties(reference=0.1)),
    ],
)
def test_what_the_losses_need(loss, needs, penalties):
    assert loss.needs == needs and loss.penalties == penalties and loss.samples_with_old


def test_a_loss_without_the_groups_that_it_needs_says_so(problem):
    terms = crd().terms(problem.velocity(), problem.drawn, FrozenVelocities())
    with pytest.raises(ValueError, match="compares the samples of a prompt with each other: `groups` is missing"):
        crd().coefficients(terms, problem.advantages, problem.counts)


def test_half_precision_is_computed_in_float32():
    tensors = [torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    t = torch.tensor([0.2, 0.5, 0.8])
    drawn = Drawn(tensors[0], t, tensors[0], tensors[1])
    for loss in EACH.values():
        terms = loss.terms(tensors[2], drawn, FrozenVelocities(tensors[1], tensors[0]))
        assert {term.dtype for term in terms} == {torch.float32} and {term.shape for term in terms} == {(3,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crd_beta": 0.5}, r"`crd_beta=0.5` has no effect with `policy_loss='nft'`"),
        ({"policy_loss": "crd", "nft_beta": 0.2}, r"`nft_beta=0.2` has no effect with `policy_loss='crd'`"),
        ({"policy_loss": "dgpo", "balance_on": "loss"}, "`balance_on='loss'` has no effect with `policy_loss='dgpo'`"),
        ({"policy_loss": "dgpo", "sampling_policy_preset": 2}, "`sampling_policy_preset=2` has no effect"),
        ({"reference_guidance_scale": 4.5}, r"`reference_guidance_scale=4.5` has no effect with `policy_loss='nft'`"),
        ({"policy_loss": "crd", "beta": 0.0, "reference_guidance_scale": 4.5}, "no effect with `beta=0.0`"),
        (
            {"policy_loss": "dgpo", "dgpo_reference": "old", "beta": 0.0, "reference_guidance_scale": 4.5},
            "no effect with `beta=0.0`",
        ),
        ({"policy_loss": "crd", "crd_objective": "mae"}, "`crd_objective` is 'mae'; it must be one of 'mse', 'bce'"),
        ({"policy_loss": "crd", "crd_beta": 0.0}, "`crd_beta` is 0.0; it must be a finite number greater than 0"),
        ({"policy_loss": "crd", "sampling_policy_preset": 9}, "`sampling_policy_preset` is 9; it must be one of None"),
        ({"policy_loss": "dgpo", "dgpo_reference": "ema"}, "`dgpo_reference` is 'ema'"),
        ({"policy_loss": "dgpo", "dgpo_clip_range": -1.0}, "`dgpo_clip_range` is -1.0"),
        ({"policy_loss": "gdro", "dpo_beta": 10.0}, r"`dpo_beta=10.0` has no effect with `policy_loss='gdro'`"),
        ({"policy_loss": "dpo", "gdro_best": 1.0}, r"`gdro_best=1.0` has no effect with `policy_loss='dpo'`"),
        ({"policy_loss": "gdro", "gdro_best": -1.0}, "`gdro_best` is -1.0; it must be 0 or greater"),
        ({"policy_loss": "gdro", "gdro_temperature": 0.0}, "`gdro_temperature` is 0.0"),
    ],
)
def test_settings_that_the_loss_does_not_use_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MarbleConfig(str(tmp_path), use_cpu=True, **settings)


def test_dgpo_compares_with_the_guided_base_without_a_kl(tmp_path):
    MarbleConfig(str(tmp_path), use_cpu=True, policy_loss="dgpo", beta=0.0, reference_guidance_scale=4.5)
