# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trl_marble.balance import Objective, SeparateBackward, WeightedBackward, flatten_gradients


@pytest.mark.parametrize("balance_on", ["loss", "advantage"])
@pytest.mark.parametrize("num_rewards", [1, 3, 5])
def test_each_row_is_the_gradient_of_its_loss(make_problem, num_rewards, balance_on, separate_gradients):
    problem = make_problem(num_rewards)
    coefficients = problem.coefficients(balance_on=balance_on)
    gradients = separate_gradients(problem.terms(balance_on=balance_on), coefficients, problem.parameters)
    for k in range(num_rewards):
        problem.net.zero_grad()
        terms = problem.terms(balance_on=balance_on)
        sum(own[k] @ term for term, own in zip(terms, coefficients, strict=True)).backward()
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.parameters]
        torch.testing.assert_close(gradients[k], torch.cat([g.flatten() for g in expected]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("balance_on", ["loss", "advantage"])
def test_identity_2_the_same_cotangents_serve_every_reward(make_problem, balance_on, separate_gradients):
    """g_k = sum_i sum_c coefficients[c][k, i] J_i^T a_{i, c}, with a_c the same for every k."""
    problem = make_problem(4)
    coefficients = problem.coefficients(balance_on=balance_on)
    shared = torch.zeros(len(coefficients), 6, sum(p.numel() for p in problem.parameters), dtype=torch.float64)
    for i in range(6):
        for row, term in enumerate(problem.terms([i], balance_on)):  # J_i^T a_{i, c}
            grads = torch.autograd.grad(term.sum(), problem.parameters, retain_graph=True, allow_unused=True)
            shared[row, i] = flatten_gradients(grads, problem.parameters)
    expected = sum(own @ part for own, part in zip(coefficients, shared, strict=True))
    actual = separate_gradients(problem.terms(balance_on=balance_on), coefficients, problem.parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4], [5]]])
def test_how_the_step_is_split_does_not_matter(make_problem, split, separate_gradients):
    problem = make_problem(3)
    whole = separate_gradients(problem.terms(), problem.coefficients(), problem.parameters)
    parts = sum(separate_gradients(problem.terms(s), problem.coefficients(s), problem.parameters) for s in split)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-12)


def test_unused_parameters_have_gradient_zero_and_grad_stays_untouched(make_problem, separate_gradients):
    problem = make_problem(2)
    gradients = separate_gradients(problem.terms(), problem.coefficients(), problem.parameters)
    start = sum(
        p.numel() for p in problem.parameters[: [p is problem.net.unused for p in problem.parameters].index(True)]
    )
    assert torch.equal(gradients[:, start : start + 4], torch.zeros(2, 4, dtype=torch.float64))
    assert gradients.abs().sum(dim=1).min() > 0
    assert all(p.grad is None for p in problem.parameters)


def test_rewards_without_a_sample_cost_no_backward_pass(make_problem, separate_gradients):
    problem = make_problem(4)
    problem.advantages[[0, 2, 3]] = torch.nan
    problem.counts[3] = 0
    terms = problem.terms()
    passes = []
    terms[0].register_hook(lambda grad: passes.append(1))
    gradients = separate_gradients(terms, problem.coefficients(), problem.parameters)
    assert len(passes) == 1
    assert (gradients != 0).any(dim=1).tolist() == [False, True, False, False]


def test_the_graph_is_freed_unless_asked_otherwise(make_problem, separate_gradients):
    problem = make_problem(2)
    terms, coefficients = problem.terms(), problem.coefficients()
    separate_gradients(terms, coefficients, problem.parameters, retain_graph=True)
    separate_gradients(terms, coefficients, problem.parameters)
    with pytest.raises(RuntimeError, match="second time"):
        torch.stack(terms).sum().backward()


# ---- The weighted backward pass, against one backward pass a row ----


class TokenNet(nn.Module):
    """Linear layers over tokens, in blocks with residual connections, as in a transformer."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False):
        super().__init__()
        self.enter = nn.Linear(6, 8, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.leave = nn.Linear(8, 4)  # a frozen bias is no obstacle
        self.leave.bias.requires_grad_(False)
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed

    def block(self, x, layer):
        return x + self.dropout(torch.tanh(layer(x)))

    def forward(self, x):
        x = self.enter(x)
        for layer in self.blocks:
            if self.checkpointed:
                x = checkpoint(self.block, x, layer, use_reentrant=False)
            else:
                x = self.block(x, layer)
        return self.leave(x)


def weighted_problem(num_rows, dtype=torch.float64, **kwargs):
    """A net, and two losses of each of 5 samples with coefficients, some of them masked."""
    torch.manual_seed(0)
    net = TokenNet(**kwargs).to(dtype)
    x = torch.randn(5, 3, 6, dtype=dtype)
    coefficients = torch.randn(2, num_rows, 5, dtype=dtype)
    coefficients[:, torch.rand(num_rows, 5) < 0.3] = 0
    coefficients[:, :, 4] = 0  # a sample that no row asks for

    def objectives():
        output = net(x).to(dtype)
        losses = output.square().flatten(1).mean(dim=1), (output.sin() * x[..., :4]).flatten(1).sum(dim=1)
        return [Objective(loss, part) for loss, part in zip(losses, coefficients, strict=True)]

    linears = [net.enter, *net.blocks, net.leave]
    return net, linears, objectives


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 20])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_weighted_backward_is_separate_backward(num_rows, checkpointed, dtype, tolerance):
    net, linears, objectives = weighted_problem(num_rows, dtype, checkpointed=checkpointed)
    separate = SeparateBackward(num_rows, [linear.weight for linear in linears])
    separate.backward(objectives())
    weighted = WeightedBackward(num_rows, linears)
    with weighted.recording(5):
        weighted.backward(objectives())
    assert weighted.gradients.dtype == dtype and separate.gradients.abs().sum(dim=1).min() > 0
    assert relative_error(weighted.gradients, separate.gradients) < tolerance
    assert all(p.grad is None for p in net.parameters())


def test_rows_add_up_over_micro_batches():
    _, linears, objectives = weighted_problem(3)
    once, thrice = (WeightedBackward(3, linears) for _ in range(2))
    with once.recording(5):
        once.backward(objectives())
    for _ in range(3):
        with thrice.recording(5):
            thrice.backward(objectives())
    torch.testing.assert_close(thrice.gradients, 3 * once.gradients)


def test_one_backward_pass_an_objective_whatever_the_number_of_rows():
    for num_rows in (1, 20):
        _, linears, objectives = weighted_problem(num_rows)
        rows = WeightedBackward(num_rows, linears)
        passes = []
        with rows.recording(5):
            both = objectives()
            both[0].losses.register_hook(lambda grad, passes=passes: passes.append("first"))
            both[1].losses.register_hook(lambda grad, passes=passes: passes.append("second"))
            rows.backward(both)
        assert passes == ["first", "second"]


def test_a_layer_without_tokens_has_no_gradient():
    layer = nn.Linear(4, 3, bias=False)
    rows = WeightedBackward(1, [layer])
    with rows.recording(2):
        rows.backward([Objective(layer(torch.randn(2, 0, 4)).flatten(1).sum(dim=1), torch.ones(1, 2))])
    assert rows.gradients.equal(torch.zeros(1, 12))


def test_dropout_is_that_of_the_forward_pass():
    net, linears, objectives = weighted_problem(3, dropout=0.5)
    separate, weighted = SeparateBackward(3, [li.weight for li in linears]), WeightedBackward(3, linears)
    torch.manual_seed(7)
    separate.backward(objectives())
    torch.manual_seed(7)
    with weighted.recording(5):
        weighted.backward(objectives())
    assert relative_error(weighted.gradients, separate.gradients) < 1e-14
    torch.manual_seed(8)
    with weighted.recording(5):
        weighted.backward(objectives())
    assert relative_error(weighted.gradients / 2, separate.gradients) > 1e-3


def test_autocast_multiplies_in_its_dtype():
    _, linears, objectives = weighted_problem(3, torch.float32)
    weights = [linear.weight for linear in linears]
    exact, separate, weighted = (
        SeparateBackward(3, weights),
        SeparateBackward(3, weights),
        WeightedBackward(3, linears),
    )
    exact.backward(objectives())
    with weighted.recording(5):
        with torch.autocast("cpu", torch.bfloat16):
            forward = objectives()
        weighted.backward(forward)
    with torch.autocast("cpu", torch.bfloat16):
        forward = objectives()
    separate.backward(forward)
    assert weighted.gradients.dtype == torch.float32
    error = relative_error(weighted.gradients, exact.gradients)
    assert 1e-4 < error < 1.5 * relative_error(separate.gradients, exact.gradients)


def test_nothing_stays_patched_also_after_an_exception():
    net, linears, objectives = weighted_problem(2)
    before = [(type(linear), dict(vars(linear))) for linear in linears]
    output = net(torch.ones(2, 3, 6, dtype=torch.float64))
    rows = WeightedBackward(2, linears)
    with rows.recording(5):
        rows.backward(objectives())
    with pytest.raises(KeyError, match="stop"), rows.recording(5):
        assert type(linears[0]) is not nn.Linear
        raise KeyError("stop")
    assert [(type(linear), dict(vars(linear))) for linear in linears] == before
    assert torch.equal(net(torch.ones(2, 3, 6, dtype=torch.float64)), output)
    with rows.recording(5):  # and it can be entered again
        rows.backward(objectives())


def test_what_cannot_be_weighted_is_refused():
    linear = nn.Linear(2, 2, bias=False)
    with pytest.raises(TypeError, match="Conv2d is not an nn.Linear: use SeparateBackward"):
        WeightedBackward(1, [nn.Conv2d(2, 2, 1)])
    with pytest.raises(ValueError, match="trainable bias"):
        WeightedBackward(1, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="twice"):
        WeightedBackward(1, [linear, linear])
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        WeightedBackward(0, [linear])
    rows = WeightedBackward(1, [linear])
    with pytest.raises(ValueError, match=r"input of shape \(6, 2\) for 3 samples"), rows.recording(3):
        linear(torch.ones(6, 2))
    one = Objective(torch.ones(3), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="outside recording"):
        rows.backward([one])
    with pytest.raises(ValueError, match="3 losses, but recording.* 4 samples"), rows.recording(4):
        rows.backward([one])
    with pytest.raises(ValueError, match=r"here \(1, 3\), got \(2, 3\)"), rows.recording(3):
        rows.backward([Objective(torch.ones(3), torch.ones(2, 3))])
    with pytest.raises(RuntimeError, match="entered twice"), rows.recording(3), rows.recording(3):
        pass
    assert type(linear) is nn.Linear
