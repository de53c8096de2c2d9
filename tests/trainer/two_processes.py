# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Run by `test_two_processes.py` under torchrun: trains with the settings given and leaves every step's gradient."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerCallback

from trl_marble.rewards import RewardError


sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer_helpers import blue, bright, prompt_set, small_trainer  # noqa: E402


def red_only(images, prompts, **kwargs):
    """Applies to two of the six prompts, so that one process may have no valid sample."""
    values = bright(images)
    return [value if "red" in prompt else None for value, prompt in zip(values, prompts, strict=True)]


def sees_nothing_on_rank_1(images, **kwargs):
    if PartialState().process_index == 1:
        raise ConnectionError("scorer went away")
    return bright(images)


def dark(images, **kwargs):
    return [-value for value in bright(images)]


class Keep(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))


if __name__ == "__main__":
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    rewards = [bright, blue, red_only]
    if settings.pop("fails", False):
        rewards[0] = sees_nothing_on_rank_1
    trainer = small_trainer(folder, rewards, eval_dataset=prompt_set(), eval_reward_funcs=dark, **settings)
    keep = Keep()
    trainer.add_callback(keep)
    try:
        trainer.train()
    except RewardError as error:
        (folder / f"rank{trainer.args.process_index}.txt").write_text(str(error))
        raise SystemExit(0) from error
    metrics = trainer.evaluate()
    diversities = [row["drift/diversity"] for row in trainer.state.log_history if "drift/diversity" in row]
    measured = {
        "diversity": torch.tensor([*diversities, metrics["eval_drift/diversity"]]),
        "evaluation": trainer.evaluations[-1].rewards.nan_to_num().contiguous(),
    }
    gradients = {str(i): gradient for i, gradient in enumerate(keep.gradients)}
    alphas = {
        "alpha": trainer.schedule.alpha.nan_to_num(),
        "old": next(iter(trainer.old_policy.state_dict().values())),
    }
    save_file(gradients | alphas | measured, folder / f"rank{trainer.args.process_index}.safetensors")
