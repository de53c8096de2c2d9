# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Watches a run for rewards that rise at the cost of others, and for a policy that drifts too far."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .hacking_signals import HackingSignal, History, Kind, Limits, find_signals, last_good_step
from .marble_callback import MarbleCallback


logger = logging.get_logger(__name__)


class RewardHackingCallback(MarbleCallback):
    """
    Warns, or stops training, when some rewards are bought with others.

    Evaluations are compared with the first one of the run, and training steps with the first steps. The signals:

    - A reward fell clearly while a reward that is trained on rose clearly: a held-out one (`eval_reward_funcs` of the
      trainer), or one that is trained on too. Clearly is by `threshold` standard errors of the difference,
      sqrt(se_first^2 + se_now^2), each taken over prompts; as evaluations have the same prompts and seeds, this is on
      the careful side. With a single prompt there is no error, and no such signal. In a run without evaluations the
      rewards of the rollouts are compared, the mean over `window` logged steps with that of the first ones.
    - The updates go against a reward: the mean of `balance/heldout_cos/<name>`, the cosine between the update's
      direction and the reward's gradient on other prompts, is clearly negative in a window of steps that measured it.
    - The policy drifts: the KL to the base model (`kl`, `eval_kl`), divided by the mean square of the first step's
      velocity, is above `max_drift`; or the velocity's root mean square is above `max_velocity_growth` times that of
      the first step.
    - The diversity within prompts is below `min_diversity` times its first value.

    Every signal is given once for each reward. Its message names the settings to change, and the checkpoint to go back
    to. A resumed run keeps the first evaluation and the first steps of the run that it resumes, and does not repeat
    what was said. Where it evaluates other prompts, or with other settings, the first evaluation of those counts.

    Nothing is needed for it, but it sees most with an `eval_dataset`, `eval_strategy="steps"`, held-out rewards, and
    `eval_on_start=True`, so that the first evaluation is of the base model.

    Example:

    ```python
    trainer.add_callback(RewardHackingCallback("stop"))
    ```

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` logs a warning. `"stop"` also ends training after the step, with an evaluation where
            `eval_strategy` is not `"no"`, and a checkpoint where `save_strategy` is `"steps"` or `"epoch"`. A run that
            is resumed from it goes on, and is not stopped by the same signal again.
        threshold (`float`, *optional*, defaults to `2.0`):
            Number of standard errors, greater than 0, from which the change between two evaluations is clear.
        min_diversity (`float`, *optional*, defaults to `0.7`):
            Fraction, in `[0, 1)`, of its first value below which diversity is a signal. `0.0` leaves it alone.
        max_drift (`float`, *optional*, defaults to `0.08`):
            Largest KL, greater than 0, relative to the mean square of the velocity. Measured on ShapeWorld only: the
            worst reward gained .22 to .37 standard deviations in runs that ended at .07 or less, .15 above .09.
        max_velocity_growth (`float`, *optional*, defaults to `1.25`):
            Largest growth of the velocity, greater than 1. On ShapeWorld runs with a KL penalty reached 1.12, and
            those that lost two of five rewards 1.4.
        window (`int`, *optional*, defaults to `20`):
            Number of logged steps, at least 2, over which cosines and the rewards of rollouts are averaged.
        step_threshold (`float`, *optional*, defaults to `3.0`):
            `threshold` for these means, whose standard errors are taken over steps. Higher, as windows are far more
            often looked at than evaluations.

    Raises:
        `ValueError`: For another action, or numbers out of range.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        threshold: float = Limits.threshold,
        min_diversity: float = Limits.min_diversity,
        max_drift: float = Limits.max_drift,
        max_velocity_growth: float = Limits.max_velocity_growth,
        window: int = Limits.window,
        step_threshold: float = Limits.step_threshold,
    ) -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f"`action` is {action!r}; it must be 'warn' or 'stop'.")
        self.action = action
        self.limits = Limits(
            threshold=threshold,
            step_threshold=step_threshold,
            window=window,
            min_diversity=min_diversity,
            max_drift=max_drift,
            max_velocity_growth=max_velocity_growth,
        )
        self._names: list[str] = []
        self._held_out_names: list[str] = []
        self._said: set[tuple[Kind, str | None]] = set()

    def open(self, reward_names: Sequence[str], held_out_names: Sequence[str]) -> None:
        self._names, self._held_out_names = list(reward_names), list(held_out_names)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # What was said before is worked out again, so that a resumed run does not repeat it.
        self._said = set()
        for end in range(len(state.log_history)):
            self._said |= {(signal.kind, signal.reward) for signal in self._find(state.log_history[: end + 1])}
        if state.is_world_process_zero and args.eval_strategy == "no":
            seen = "has nothing to watch" if args.logging_strategy == "no" else "watches the logged steps only"
            logger.warning(f"`RewardHackingCallback` {seen}: there are no evaluations (`eval_strategy='no'`).")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        history = state.log_history
        signals = [signal for signal in self._find(history) if (signal.kind, signal.reward) not in self._said]
        if not signals:
            return
        self._said |= {(signal.kind, signal.reward) for signal in signals}
        if state.is_world_process_zero:
            ending = "Training stops here. " if self.action == "stop" else ""
            step = last_good_step(history, self._names, self.limits)
            for signal in signals:
                what = "Reward hacking" if signal.is_damage else "A sign of reward hacking"
                advice = advise(signal, args, step, self._held_out_names)
                logger.warning(f"{what} at step {state.global_step}: {signal.message} {ending}{advice}")
        if self.action == "stop":
            control.should_training_stop = True
            # Of a step: what is stopped is evaluated once more. An evaluation that stops it is over by then.
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = control.should_save or args.save_strategy != "no"

    def _find(self, history: History) -> list[HackingSignal]:
        return find_signals(history, self._names, self._held_out_names, self.limits)


def advise(signal: HackingSignal, args: Any, step: int, held_out_names: Sequence[str]) -> str:
    """
    What to do about a signal.

    Args:
        signal ([`HackingSignal`]):
            The signal.
        args ([`MarbleConfig`]):
            The settings of the run.
        step (`int`):
            The step to go back to, see [`last_good_step`].
        held_out_names (`Sequence[str]`):
            The rewards that are not trained on.

    Returns:
        `str`: The settings to change, with their values, and the checkpoint to go back to.
    """
    if args.kl_target is None:
        less_drift = f"raise `beta` ({args.beta:g} now)"
    else:
        less_drift = f"lower `kl_target` ({args.kl_target:g} now; `beta` follows it)"
    ways = [less_drift, f"lower `learning_rate` ({args.learning_rate:g})"]
    if signal.kind == "cosine":
        ways.append("use more images a step (`gradient_accumulation_steps`), which have less noise")
    if signal.reward in held_out_names:
        ways.append(f"train on `{signal.reward}` too, if it is what you want")
    checkpoint = find_checkpoint_until(step, Path(args.output_dir))
    if checkpoint is None:
        back = "There is no checkpoint from before it: keep some (`save_steps`)."
    else:
        back = f"The checkpoint to go back to is `{checkpoint}`."
    return f"What to do: {', '.join(ways[:-1])}, or {ways[-1]}. {back}"


def find_checkpoint_until(step: int, folder: Path) -> Path | None:
    """
    The latest checkpoint of a run that is not after a step.

    Args:
        step (`int`):
            The optimizer step.
        folder (`Path`):
            The output folder of the run.
    """
    matches = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*")]
    steps = [int(match[1]) for match in matches if match and int(match[1]) <= step]
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{max(steps)}" if steps else None
