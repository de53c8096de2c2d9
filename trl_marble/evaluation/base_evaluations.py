# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run was evaluated to before its first step, which later evaluations are compared with."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from .evaluation import Evaluation


class BaseEvaluations:
    """Keeps the rewards of the evaluations before the first step, for as long as the run goes on."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, Tensor]] = {}  # rewards and groups by the digest of the evaluation

    def find(self, evaluation: Evaluation) -> Evaluation | None:
        """
        The evaluation of the same images before the first step. One that is of before it is kept, and is its own base.

        Args:
            evaluation ([`Evaluation`]):
                Any evaluation of the run.
        """
        if evaluation.step == 0:
            self._known[evaluation.digest] = evaluation.rewards, evaluation.groups
        if evaluation.digest not in self._known:
            return None
        rewards, groups = self._known[evaluation.digest]
        return dataclasses.replace(evaluation, step=0, rewards=rewards, groups=groups, gallery={}, kl=None)

    def state_dict(self) -> dict[str, Tensor]:
        """What is known, as tensors by name."""
        pairs = self._known.items()
        return {f"{digest}/rewards": rewards for digest, (rewards, _) in pairs} | {
            f"{digest}/groups": groups for digest, (_, groups) in pairs
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what [`~BaseEvaluations.state_dict`] returned."""
        digests = [name.removesuffix("/rewards") for name in state_dict if name.endswith("/rewards")]
        self._known = {name: (state_dict[f"{name}/rewards"], state_dict[f"{name}/groups"]) for name in digests}
