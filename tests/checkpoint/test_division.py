# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The same batches on another number of processes are a run that goes on; others are refused, with what to set."""

from pathlib import Path

import pytest

from trl_marble.checkpoint.division import BatchDivision
from trl_marble.rollout import BatchLayout


FOLDER = Path("run/checkpoint-3")


def division(processes: int, *layout: int) -> BatchDivision:
    return BatchDivision(processes, BatchLayout(*layout))


SAVED = division(2, 8, 3, 6, 1)  # 48 images a step, two steps a generation batch


def test_a_checkpoint_knows_its_division() -> None:
    assert BatchDivision.from_json({"rewards": ["a"]} | SAVED.to_json()) == SAVED
    assert SAVED.to_json() == {"world_size": 2, "generation_batch": [8, 3, 6, 1]}  # as format 3 has always had it


@pytest.mark.parametrize("own", [SAVED, division(1, 8, 6, 12, 1), division(4, 4, 3, 6, 1), division(48, 1, 1, 2, 1)])
def test_the_same_batches_may_be_divided_otherwise(own) -> None:
    own.check_continues(SAVED, FOLDER)


@pytest.mark.parametrize(
    ("own", "advice"),
    [
        (division(1, 8, 3, 6, 1), "Set `gradient_accumulation_steps=6` and `steps_per_generation=12`."),
        (division(3, 8, 3, 6, 1), "Set `gradient_accumulation_steps=2` and `steps_per_generation=4`."),
        (division(6, 8, 3, 6, 1), "Set `gradient_accumulation_steps=1` and `steps_per_generation=2`."),
        (
            division(16, 8, 1, 2, 1),  # fewer images than a micro-batch for each process
            "Set `per_device_train_batch_size=3`.",
        ),
        (
            division(4, 5, 3, 6, 1),  # 12 images are no number of micro-batches of 5
            "Set `per_device_train_batch_size=4`.",
        ),
        (
            division(5, 8, 3, 6, 1),
            "48 images cannot be divided equally among 5 processes: start one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48.",
        ),
        (division(2, 8, 3, 3, 1), "Set `steps_per_generation=6`."),
        (division(2, 8, 3, 6, 2), "Set `num_iterations=1`."),
    ],
)
def test_other_batches_are_refused_with_what_to_set(own, advice) -> None:
    with pytest.raises(ValueError) as caught:
        own.check_continues(SAVED, FOLDER)
    message = str(caught.value)
    expected = "48 images per optimizer step (`per_device_train_batch_size` 8 x `gradient_accumulation_steps` 3 x 2 "
    assert message.startswith(f"`{FOLDER}` was trained with {expected}") and message.endswith(advice)


def test_what_is_advised_is_accepted() -> None:
    for own in (division(1, 7, 3, 6, 4), division(3, 100, 1, 1, 1), division(24, 1, 1, 5, 1)):
        with pytest.raises(ValueError) as caught:
            own.check_continues(SAVED, FOLDER)
        names = "per_device_train_batch_size gradient_accumulation_steps steps_per_generation num_iterations".split()
        sizes = dict(zip(names, own.to_json()["generation_batch"], strict=True))
        advice = str(caught.value).rpartition("Set ")[2]
        for setting in advice.rstrip(".").split(" and "):
            name, value = setting.strip("`").split("=")
            sizes[name] = int(value)
        division(own.num_processes, *sizes.values()).check_continues(SAVED, FOLDER)
