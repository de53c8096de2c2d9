# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds of a run beside the optimizer: all weights of the policy and the balance."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.division import BatchDivision
from ..checkpoint.run_state import load_identity, load_state, save_state
from ..checkpoint.tensor_tree import load_tree, save_tree
from ..nonfinite import refuse_nonfinite
from ..pipelines import FlowPipeline, PolicyWeights
from ..rewards import RewardScorer
from ..rollout import RolloutSource


REWARDS_FILE = "reward_states.safetensors"


class Stateful(Protocol):
    """A component of a run whose state decides how the run goes on."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its state; the tensors are not changed."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over a state."""


class RunState:
    """
    Saves and loads the components of a run that have a `state_dict`.

    Args:
        weights ([`~trl_marble.pipelines.PolicyWeights`]):
            The weights of the policy.
        balance ([`~trl_marble.balance.BalanceSchedule`]):
            The balance.
        rollouts ([`~trl_marble.rollout.RolloutSource`]):
            Has the progress of the rewards, where the run has weights from it, and the rewards that learn.
        kl_control ([`~trl_marble.update.KLControl`] or `None`):
            What adapts `beta`, where something does.
        base_evaluations ([`~trl_marble.evaluation.base_evaluations.BaseEvaluations`]):
            What later evaluations are compared with.
        identity (`dict[str, Any]`):
            What a run must share with a checkpoint that it resumes from, see [`describe_run`].
        division ([`~trl_marble.checkpoint.division.BatchDivision`]):
            How the run divides its batches.
    """

    def __init__(
        self,
        weights: PolicyWeights,
        balance: Stateful,
        rollouts: RolloutSource,
        kl_control: Stateful | None,
        base_evaluations: Stateful,
        identity: dict[str, Any],
        division: BatchDivision,
    ) -> None:
        self.weights, self.identity, self.division = weights, identity, division
        self.learning = rollouts.learning
        components = {
            "balance": balance,
            "progress": rollouts.progress,
            "kl_control": kl_control,
            "base_evaluations": base_evaluations,
        }
        # One that a checkpoint does not have, because a setting has changed since, begins anew.
        self.components = {name: component for name, component in components.items() if component is not None}

    def save(self, folder: Path) -> None:
        """Write to a checkpoint folder."""
        states = {name: component.state_dict() for name, component in self.components.items()}
        save_state(folder, {**self.weights.state_dict(), **states}, self.identity | self.division.to_json())
        if self.learning is not None:
            save_tree(folder / REWARDS_FILE, self.learning.state_dict(), "the rewards")

    def load(self, folder: Path) -> None:
        """
        Take over what [`~RunState.save`] wrote, see [`~trl_marble.checkpoint.run_state.load_state`].

        Raises:
            `ValueError`: If it belongs to another run, or other rewards learn.
        """
        groups = load_state(folder, self.identity)
        learned = self._read_rewards(folder)
        self.division.check_continues(BatchDivision.from_json(load_identity(folder)), folder)
        # A checkpoint of a run that did not sample apart has no weights for it.
        kinds = {kind: kind if kind in groups else "current" for kind in self.weights.state_dict()}
        self.weights.load_state_dict({kind: groups[found] for kind, found in kinds.items()})
        for name, component in self.components.items():
            if name in groups:
                component.load_state_dict(groups[name])
        if self.learning is not None:
            self.learning.load_state_dict(learned)

    def _read_rewards(self, folder: Path) -> dict[str, Any]:
        """The states of the rewards that learn."""
        saved = load_tree(folder / REWARDS_FILE) if (folder / REWARDS_FILE).is_file() else {}
        names = [] if self.learning is None else self.learning.names
        if saved.keys() != set(names):
            raise ValueError(
                f"In `{folder}` the rewards that learn are {sorted(saved)}, in this run {sorted(names)}. Resume with "
                "the rewards that the checkpoint was trained with, or start anew without `resume_from_checkpoint`."
            )
        return saved

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
    flow: FlowPipeline, scorer: RewardScorer, source_weights: dict[str, float] | None, has_parts: bool
) -> dict[str, Any]:
    """
    What a run must share with a checkpoint that it resumes from, ready for JSON, beside the base model and teachers.
    """
    config = flow.transformer.peft_config["default"]
    lora = {"r": config.r, "lora_alpha": config.lora_alpha}
    # What else says how strong the adapter is; ranks and DoRA are seen in the weights.
    lora |= {name: value for name in ("use_rslora", "alpha_pattern") if (value := getattr(config, name))}
    if has_parts:  # of its ranks, one for each reward
        lora["balance_slider"] = True
    return {
        "pipeline": type(flow.pipeline).__name__,
        "rewards": scorer.names,
        "source_weights": source_weights,
        "lora": lora,
    }
