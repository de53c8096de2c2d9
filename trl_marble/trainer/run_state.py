# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds of a run beside the optimizer: all weights of the policy and the balance."""

from pathlib import Path
from typing import Any

import torch

from ..balance import BalanceSchedule
from ..checkpoint.run_state import load_state, save_state
from ..evaluation.base_evaluations import BaseEvaluations
from ..nonfinite import refuse_nonfinite
from ..pipelines import FlowPipeline, PolicyWeights
from ..rewards import RewardScorer
from .marble_config import MarbleConfig


class RunState:
    """
    Saves and loads the components of a run that have a `state_dict`.

    Args:
        weights ([`~trl_marble.pipelines.PolicyWeights`]):
            The weights of the policy.
        schedule ([`~trl_marble.balance.BalanceSchedule`]):
            The balance.
        base_evaluations ([`~trl_marble.evaluation.base_evaluations.BaseEvaluations`]):
            What later evaluations are compared with.
        identity (`dict[str, Any]`):
            What a run must share with a checkpoint that it resumes from, see [`describe_run`].
    """

    def __init__(
        self,
        weights: PolicyWeights,
        schedule: BalanceSchedule,
        base_evaluations: BaseEvaluations,
        identity: dict[str, Any],
    ) -> None:
        self.weights, self.schedule, self.base_evaluations = weights, schedule, base_evaluations
        self.identity = identity

    def save(self, folder: Path) -> None:
        """Write to a checkpoint folder."""
        own = {"balance": self.schedule.state_dict(), "base_evaluations": self.base_evaluations.state_dict()}
        save_state(folder, self.weights.state_dict() | own, self.identity)

    def load(self, folder: Path) -> None:
        """Take over what [`~RunState.save`] wrote, see [`~trl_marble.checkpoint.run_state.load_state`]."""
        groups = load_state(folder, self.identity)
        balance = groups.pop("balance")
        self.base_evaluations.load_state_dict(groups.pop("base_evaluations", {}))  # none without an evaluation
        self.weights.load_state_dict(groups)
        self.schedule.load_state_dict(balance)

    def refuse_nonfinite(self) -> None:
        """
        Make sure that the weights can be saved.

        Raises:
            `FloatingPointError`: If they are not finite.
        """
        for kind, weights in self.weights.state_dict().items():
            refuse_nonfinite(f"{kind} weights", weights)


def refuse_nonfinite_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """
    Make sure that an optimizer's state can be saved.

    Raises:
        `FloatingPointError`: If it is not finite.
    """
    for state in optimizer.state_dict()["state"].values():
        refuse_nonfinite("optimizer", {name: value for name, value in state.items() if torch.is_tensor(value)})


def describe_run(
    flow: FlowPipeline,
    fingerprint: str,
    scorer: RewardScorer,
    source_weights: dict[str, float] | None,
    args: MarbleConfig,
) -> dict[str, Any]:
    """What a run must share with a checkpoint that it resumes from, ready for JSON."""
    config = flow.transformer.peft_config["default"]
    lora = {"r": config.r, "lora_alpha": config.lora_alpha}
    # What else says how strong the adapter is; ranks and DoRA are seen in the weights.
    lora |= {name: value for name in ("use_rslora", "alpha_pattern") if (value := getattr(config, name))}
    return {
        "pipeline": type(flow.pipeline).__name__,
        "base_model": fingerprint,
        "rewards": scorer.names,
        "source_weights": source_weights,
        "lora": lora,
        "world_size": args.world_size,
        "generation_batch": [
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.steps_per_generation,
            args.num_iterations,
        ],
    }
