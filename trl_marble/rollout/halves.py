# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Two halves of an optimizer step's prompts, to measure on one what was found on the other."""

import torch
from torch import Tensor


def split_prompts(prompts: Tensor, applies: Tensor, steps: Tensor, seed: int) -> Tensor:
    """
    Split the prompts of each optimizer step into two halves at random.

    All images of a prompt are in one half, for they share the prompt and the mean that their rewards are compared
    with. Prompts of one kind, to which (to any image of which) the same rewards apply, are split evenly: of an odd
    number one half has one more.

    Args:
        prompts (`Tensor` of shape `[B]`, int64):
            The number of each sample's prompt.
        applies (`Tensor` of shape `[K, B]`, bool):
            Whether a reward applies to a sample.
        steps (`Tensor` of shape `[B]`, int64):
            The optimizer step in which each sample is trained on.
        seed (`int`):
            The same for all processes, which pass the samples of all processes.

    Returns:
        `Tensor` of shape `[B]`, bool: which samples are in the first half of their step.
    """
    generator = torch.Generator().manual_seed(seed)
    in_first = torch.zeros(len(prompts), dtype=torch.bool)
    kinds = {prompt: tuple(applies[:, prompts == prompt].any(dim=1).tolist()) for prompt in prompts.unique().tolist()}
    for step in steps.unique().tolist():
        in_step = steps == step
        by_kind: dict[tuple[bool, ...], list[int]] = {}
        for prompt in prompts[in_step].unique().tolist():
            by_kind.setdefault(kinds[prompt], []).append(prompt)
        # Every other prompt, kind by kind: halves differ by at most one prompt, of each kind and of all.
        shuffled = [
            by_kind[kind][place]
            for kind in sorted(by_kind)
            for place in torch.randperm(len(by_kind[kind]), generator=generator).tolist()
        ]
        begin = int(torch.randint(2, (), generator=generator))
        in_first |= in_step & torch.isin(prompts, torch.tensor(shuffled[begin::2], dtype=prompts.dtype))
    return in_first
