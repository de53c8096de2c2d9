# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Where in `transformers`' loop the trainer acts."""

from typing import Any

from transformers import TrainerCallback


class FollowPolicy(TrainerCallback):
    """Calls the trainer after each optimizer step, before anything is logged, evaluated or saved."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # Not every dataloader wrapper of `accelerate` forwards the epoch to the sampler.
        self.trainer._prompt_sampler.set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # Not by an event: callbacks that fail at the last one before the update leave a whole step behind.
        self.trainer.bare_optimizer.register_step_pre_hook(self._begin_update)
        self.trainer._between_steps = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.trainer._after_optimizer_step()

    def _begin_update(self, optimizer, args, kwargs) -> None:
        self.trainer._between_steps = False
