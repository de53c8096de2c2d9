# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""States of real optimizers, schedulers and generators come back as they were, and nothing is pickled."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trl_marble.checkpoint.random_state import random_state, set_random_state
from trl_marble.checkpoint.tensor_tree import load_tree, save_tree


CPU = torch.device("cpu")


def assert_same(value: Any, other: Any) -> None:
    assert type(value) is type(other)
    if isinstance(value, torch.Tensor):
        assert value.dtype == other.dtype and value.shape == other.shape
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(value, dict):
        assert list(value) == list(other)
        for key in value:
            assert_same(value[key], other[key])
    elif isinstance(value, list | tuple):
        assert len(value) == len(other)
        for one, another in zip(value, other, strict=True):
            assert_same(one, another)
    else:
        assert value == other or value != value  # NaN


TREES = [
    {"a": [1, -2.5, True, None, "text"], 3: (0.9, (0.999, []))},
    {"nested": {"x": torch.arange(6).reshape(2, 3).T, "y": torch.tensor(3.0)}, 0: {}, "0": torch.ones(0)},
    [float("inf"), float("-inf"), float("nan"), 0.1 + 0.2, 5e-324, 2**63],
    {"bf16": torch.randn(3).bfloat16(), "bytes": torch.arange(5, dtype=torch.uint8), "view": torch.ones(4)[::2]},
    {0: torch.zeros(1), "0": torch.ones(1), "a/b": torch.full((1,), 2.0), "a": {"b": torch.full((1,), 3.0)}},
    torch.arange(3),
    {"tensor": {"dict": [], "tuple": ()}},  # words of the file's own structure
    None,
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_a_tree_comes_back_as_it_was(tmp_path, tree) -> None:
    save_tree(tmp_path / "tree.safetensors", tree, "a test")
    assert_same(load_tree(tmp_path / "tree.safetensors"), tree)


def test_tensors_that_share_memory_are_written_each(tmp_path) -> None:
    weight = torch.randn(2, 2)
    save_tree(tmp_path / "tree.safetensors", {"a": weight, "b": weight, "c": weight[0]}, "a test")
    assert_same(load_tree(tmp_path / "tree.safetensors"), {"a": weight, "b": weight, "c": weight[0]})


class OwnTensor(torch.Tensor):
    """Stands for quantized tensors and others that are more than their values."""


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"state": {0: {"when": 1j}}}, "`state_dict().state.0.when` is a complex"),
        ({"groups": [{"f": print}]}, "`state_dict().groups.0.f` is a builtin_function_or_method"),
        ({"state": torch.ones(2).as_subclass(OwnTensor)}, "`state_dict().state` is a OwnTensor"),
        ({"state": {(1, 2): 3}}, "`state_dict().state` is a dict"),
        ({1.5, 2.5}, "`state_dict()` is a set"),
    ],
)
def test_what_only_pickle_could_write_is_refused_by_name(tmp_path, tree, place) -> None:
    with pytest.raises(TypeError) as caught:
        save_tree(tmp_path / "tree.safetensors", tree, "the optimizer Odd")
    assert place in str(caught.value) and "the optimizer Odd cannot be saved" in str(caught.value)
    assert not (tmp_path / "tree.safetensors").exists()


OPTIMIZERS = [
    torch.optim.AdamW,
    lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True, fused=True),
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    torch.optim.Adagrad,
    torch.optim.Adafactor,
    torch.optim.RMSprop,
    torch.optim.NAdam,
]
SCHEDULERS = [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
]


def set_up(make_optimizer: Any, make_scheduler: Any) -> tuple[nn.Linear, Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    groups = [{"params": [model.weight], "weight_decay": 0.01}, {"params": [model.bias]}]
    optimizer = make_optimizer(groups, lr=0.05)
    return model, optimizer, make_scheduler(optimizer)


def steps(model: nn.Linear, optimizer: Any, scheduler: Any, numbers: range) -> None:
    for step in numbers:
        data = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        def closure(data=data):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(loss.item()) if plateau else scheduler.step()


PAIRS = [(each, SCHEDULERS[0]) for each in OPTIMIZERS] + [(OPTIMIZERS[0], each) for each in SCHEDULERS[1:]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make_optimizer", "make_scheduler"), PAIRS, ids=range(len(PAIRS)))
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, make_optimizer, make_scheduler) -> None:
    whole = set_up(make_optimizer, make_scheduler)
    steps(*whole, range(5))
    for name, part in (("optimizer", whole[1]), ("scheduler", whole[2])):
        save_tree(tmp_path / name, part.state_dict(), name)
    resumed = set_up(make_optimizer, make_scheduler)
    resumed[0].load_state_dict(whole[0].state_dict())
    resumed[1].load_state_dict(load_tree(tmp_path / "optimizer"))
    resumed[2].load_state_dict(load_tree(tmp_path / "scheduler"))
    for each in (whole, resumed):
        steps(*each, range(5, 9))
    assert torch.equal(whole[0].weight, resumed[0].weight) and torch.equal(whole[0].bias, resumed[0].bias)
    assert_same(resumed[1].state_dict(), whole[1].state_dict())


def draw() -> list[Any]:
    return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_random_generators_go_on_where_they_were(tmp_path) -> None:
    draw()  # one number of each normal pair is used, the other waits
    save_tree(tmp_path / "random", random_state(CPU), "the generators")
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    set_random_state(load_tree(tmp_path / "random"), CPU)
    assert [draw() for _ in range(3)] == expected
