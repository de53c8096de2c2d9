# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a loss sees of the samples that a sample is compared with."""

from typing import NamedTuple

from torch import Tensor


class Groups(NamedTuple):
    """
    The group of each sample of a micro-step: the samples of its prompt that the optimizer step is trained on, itself
    among them, wherever they lie, at the same place in their draws. All of a group have the same time and the same
    noise there. G is the size of the largest group.

    Args:
        place (`torch.Tensor` of shape `(B,)`, int64):
            Where in its group each sample is.
        advantages (`torch.Tensor` of shape `(K, B, G)`):
            NaN where a reward does not apply, and where a group has no sample more.
        terms (`torch.Tensor` of shape `(N, B, G)`, *optional*):
            What [`~PolicyLoss.terms`] returned for them in a pass without gradients before the step. `None` where the
            loss reads the old policy's velocity only, and the old policy is the trained one: each sample then is what
            it is compared with.
    """

    place: Tensor
    advantages: Tensor
    terms: Tensor | None

    def own(self) -> Tensor | None:
        """The terms `(N, B)` of the samples themselves, as the pass without gradients found them."""
        if self.terms is None:
            return None
        place = self.place.expand(len(self.terms), -1)[..., None]
        return self.terms.gather(2, place).squeeze(2)

    def looked_ahead(self) -> Tensor:
        """The terms `(N, B, G)`, for a loss that always has them."""
        if self.terms is None:
            raise ValueError("This loss needs the terms of the samples that it compares, and there are none.")
        return self.terms


def group_mean(values: Tensor, valid: Tensor) -> Tensor:
    """
    The mean over the samples of a group.

    Args:
        values (`torch.Tensor` of shape `(..., B, G)`):
            Of each sample of each group.
        valid (`torch.BoolTensor` of shape `(..., B, G)`):
            Which of them count.

    Returns:
        `torch.Tensor` of shape `(..., B)`: 0 where none counts.
    """
    total = values.expand(valid.shape).masked_fill(~valid, 0.0).sum(dim=-1)
    return total / valid.sum(dim=-1).clamp_min(1)
