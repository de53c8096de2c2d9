# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How a generation batch that was sampled and scored is put into the order in which it is trained on."""

import torch
from accelerate import Accelerator
from torch import Tensor

from ..seeding import Draw, derive_seed
from .batch import RolloutBatch, digest_of, steps_of_samples, training_order
from .halves import split_prompts
from .layout import BatchLayout
from .rows import ScoredRows


class BatchArranger:
    """
    Makes the batch that is trained on: micro-batches hold samples of many prompts, in an order that resuming finds
    again.

    Args:
        layout ([`BatchLayout`]):
            How a generation batch is cut into optimizer steps.
        seed (`int`):
            Seed of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Adds up over processes.
    """

    def __init__(self, layout: BatchLayout, seed: int, accelerator: Accelerator) -> None:
        self.layout, self.seed, self.accelerator = layout, seed, accelerator

    def arrange(
        self,
        generation: int,
        scored: ScoredRows,
        groups: Tensor,
        advantages: Tensor,
        taught: Tensor,
        weighted_sum: Tensor,
    ) -> RolloutBatch:
        """
        Arrange a generation batch, of whose images of all processes it gets the groups `[B]`, the advantages `[K, B]`
        and the rows of the teachers `[T, B]`. All processes call it.
        """
        rows, samples, num_samples = scored.rows, scored.samples, len(groups)
        own = self.layout.own_samples(self.accelerator.process_index)
        num_updates, device = self.layout.updates_per_pass, samples.latents.device
        order_seed = derive_seed(self.seed, Draw.ORDER, generation)
        order = training_order(num_samples, own, num_updates, order_seed)
        of_all = torch.cat([advantages, taught])
        steps = steps_of_samples(num_samples, num_updates, order_seed)
        in_first = split_prompts(groups, ~of_all.isnan(), steps, derive_seed(self.seed, Draw.HALVES, generation))
        of_own, first_half = (part[..., own.start : own.stop][..., order] for part in (of_all, in_first))
        updates = of_own.chunk(num_updates, dim=1)
        halves = torch.stack([first_half, ~first_half]).chunk(num_updates, dim=1)
        counts = torch.stack([_count(~part.isnan(), half) for part, half in zip(updates, halves, strict=True)])
        signals = torch.stack(
            [_count(part.nan_to_num() != 0, half) for part, half in zip(updates, halves, strict=True)]
        )
        is_scored = torch.stack([(~part[: len(advantages)].isnan()).any(dim=0).sum() for part in updates])
        return RolloutBatch(
            prompts=rows.prompts,
            conditioning=scored.embeddings.conditioning,
            rows_digest=digest_of(rows.prompts, rows.images),
            prompt_index=scored.embeddings.prompt_index[order],
            sample_ids=torch.tensor(own)[order],
            latents=samples.latents[order.to(device)],
            advantages=of_own.to(device),
            first_half=first_half.to(device),
            counts=self.accelerator.reduce(counts.to(device), reduction="sum"),
            active=(self.accelerator.reduce(signals.to(device), reduction="sum") > 0).cpu(),
            scored=self.accelerator.reduce(is_scored.to(device), reduction="sum"),
            weighted_sum=weighted_sum,
            transitions=None if samples.transitions is None else samples.transitions.select(order.to(device)),
            replaced={place: row for place, row in scored.replaced.items() if place in own},
        )


def _count(samples: Tensor, halves: Tensor) -> Tensor:
    """Count samples `[K, B]` that are true, in each of the halves `[2, B]`: `[2, K]`."""
    return (samples & halves[:, None]).sum(dim=2)
