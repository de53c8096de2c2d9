# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Watches evaluations for rewards that rise at the cost of what nobody trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils import logging

from ..evaluation import format_value
from ..evaluation.summary import SIGNIFICANT
from .marble_callback import MarbleCallback


logger = logging.get_logger(__name__)

DIVERSITY = "eval_drift/diversity"
ADVICE = (
    "What to do: go back to a checkpoint from before (`output_dir/checkpoint-*`), raise `beta` or lower "
    "`learning_rate`, and train on the reward that fell if it is what you want."
)


@dataclass(frozen=True)
class HackingSignal:
    """
    A sign that a run trades what it is not trained on for what it is.

    Args:
        fallen (`str`):
            The held-out reward that fell, or `"diversity"`.
        message (`str`):
            What changed, and by how much.
    """

    fallen: str
    message: str


class RewardHackingCallback(MarbleCallback):
    """
    Warns, or stops training, when a reward is being hacked.

    Evaluations are compared with the first one of the run. A signal is either a held-out reward (`eval_reward_funcs`
    of the trainer) that fell clearly while a reward that is trained on rose clearly, or a diversity within
    prompts below a fraction of what it was. Clearly is by `threshold` standard errors of the difference,
    sqrt(se_first^2 + se_now^2), each taken over prompts; as evaluations have the same prompts and seeds, this is on
    the careful side. With a single prompt there is no error, and no such signal.

    It needs evaluations: an `eval_dataset`, `eval_strategy="steps"` and `eval_on_start=True`, so that the first one is
    of the base model. A resumed run keeps the first evaluation of the run that it resumes.

    Example:

    ```python
    trainer = MarbleNFTTrainer(
        ..., eval_dataset=prompts, eval_reward_funcs=["aesthetic"], callbacks=[RewardHackingCallback("stop")]
    )
    ```

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` logs a warning, once for each held-out reward and once for diversity. `"stop"` also ends training
            after the evaluation, with a checkpoint where `save_strategy` is not `"no"`. A run that is resumed from it
            goes on, and is not stopped by the same signal again.
        threshold (`float`, *optional*, defaults to `2.0`):
            Number of standard errors, greater than 0, from which a change is clear.
        min_diversity (`float`, *optional*, defaults to `0.7`):
            Fraction, in `[0, 1)`, of its first value below which diversity is a signal. `0.0` leaves it alone.

    Raises:
        `ValueError`: For another action, or numbers out of range.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        threshold: float = SIGNIFICANT,
        min_diversity: float = 0.7,
    ) -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f"`action` is {action!r}; it must be 'warn' or 'stop'.")
        if not 0 < threshold < math.inf:
            raise ValueError(f"`threshold` is {threshold}; it must be a number of standard errors greater than 0.")
        if not 0 <= min_diversity < 1:
            raise ValueError(
                f"`min_diversity` is {min_diversity}; it must be a fraction in [0, 1) of the first value, 0 for none."
            )
        self.action, self.threshold, self.min_diversity = action, threshold, min_diversity
        self._names: list[str] = []
        self._held_out_names: list[str] = []

    def open(self, reward_names: Sequence[str], held_out_names: Sequence[str]) -> None:
        self._names, self._held_out_names = list(reward_names), list(held_out_names)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if args.eval_strategy == "no":
            logger.warning(
                "`RewardHackingCallback` sees nothing: `eval_strategy` is 'no'. Set `eval_strategy='steps'`, "
                "`eval_steps` and `eval_on_start=True`, and pass an `eval_dataset`."
            )
        elif not self._held_out_names:
            logger.warning(
                "`RewardHackingCallback` watches diversity only: there is no held-out reward. Pass "
                "`eval_reward_funcs` to the trainer."
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        rows = [row for row in state.log_history if _is_evaluation(row)]
        if not self._names or f"eval_rewards/{self._names[0]}/mean" not in metrics:
            return  # an evaluation before training, or under another prefix
        *earlier, now = rows
        # What was said at earlier evaluations is worked out again, so that a resumed run does not repeat it.
        said = {signal.fallen for row in earlier for signal in self._signals(rows[0], row)}
        signals = [signal for signal in self._signals(rows[0], now) if signal.fallen not in said]
        if not signals:
            return
        if state.is_world_process_zero:
            ending = "Training stops here. " if self.action == "stop" else ""
            for signal in signals:
                logger.warning(f"Reward hacking at step {state.global_step}: {signal.message} {ending}{ADVICE}")
        if self.action == "stop":
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def _signals(self, first: Mapping[str, Any], now: Mapping[str, Any]) -> list[HackingSignal]:
        return find_signals(
            first, now, self._names, self._held_out_names, threshold=self.threshold, min_diversity=self.min_diversity
        )


def find_signals(
    first: Mapping[str, Any],
    now: Mapping[str, Any],
    names: Sequence[str],
    held_out_names: Sequence[str],
    *,
    threshold: float,
    min_diversity: float,
) -> list[HackingSignal]:
    """
    Compare two evaluations.

    Args:
        first (`Mapping[str, Any]`):
            Metrics of the earlier one.
        now (`Mapping[str, Any]`):
            Metrics of the later one. What one of the two lacks gives no signal.
        names (`Sequence[str]`):
            The rewards that are trained on.
        held_out_names (`Sequence[str]`):
            Those that are not.
        threshold (`float`):
            Number of standard errors from which a change is clear.
        min_diversity (`float`):
            Fraction of its first value below which diversity is a signal.
    """
    changes = {name: _change(first, now, name) for name in (*names, *held_out_names)}
    risen = [name for name in names if changes[name][1] >= threshold]
    signals = []
    for name in held_out_names if risen else ():
        if changes[name][1] <= -threshold:
            fall = _say(first, now, name, changes[name])
            rises = " and ".join(_say(first, now, riser, changes[riser]) for riser in risen)
            signals.append(HackingSignal(name, f"held-out {fall}, while {rises}."))
    if DIVERSITY in first and DIVERSITY in now and now[DIVERSITY] < min_diversity * first[DIVERSITY]:
        message = (
            f"diversity, how much the images of a prompt differ, fell from {first[DIVERSITY]:.3f} to "
            f"{now[DIVERSITY]:.3f}, less than {min_diversity:.0%} of it."
        )
        signals.append(HackingSignal("diversity", message))
    return signals


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval_rewards/") for key in row)


def _change(first: Mapping[str, Any], now: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The change of a reward's mean, and the same in standard errors; 0 where one evaluation did not measure it."""
    key = f"eval_rewards/{name}"
    change = now.get(f"{key}/mean", math.nan) - first.get(f"{key}/mean", math.nan)
    error = math.hypot(now.get(f"{key}/standard_error", math.nan), first.get(f"{key}/standard_error", math.nan))
    if not math.isfinite(change) or not math.isfinite(error):
        return 0.0, 0.0
    return change, change / error if error > 0 else math.copysign(math.inf, change) if change else 0.0


def _say(first: Mapping[str, Any], now: Mapping[str, Any], name: str, change: tuple[float, float]) -> str:
    verb = "rose" if change[0] > 0 else "fell"
    values = [format_value(row[f"eval_rewards/{name}/mean"]) for row in (first, now)]
    return f"`{name}` {verb} from {values[0]} to {values[1]} ({change[1]:+.1f} standard errors)"
