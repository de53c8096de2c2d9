# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What chooses prompts, and whether pipeline, rewards and prompt sets fit together."""

from collections.abc import Sequence

from datasets import Dataset
from transformers.utils import logging

from ...data import RepeatPromptSampler
from ...evaluation.prompt_sets import evaluation_sets, set_label
from ...pipelines import FlowPipeline, edits_images
from ...rewards import RewardScorer
from ...rewards.protocol import check_media
from ...rewards.signatures import check_signatures
from ..marble_config import MarbleConfig


logger = logging.get_logger(__name__)


def build_prompt_sampler(
    dataset: Dataset, source_weights: dict[str, float] | None, args: MarbleConfig
) -> RepeatPromptSampler:
    """What chooses the prompts of generation batches."""
    return RepeatPromptSampler(
        num_prompts=len(dataset),
        num_generations=args.num_generations,
        prompts_per_batch=args.prompts_per_generation,
        num_repeats=args.steps_per_generation * args.num_iterations,
        seed=args.seed if args.data_seed is None else args.data_seed,
        # [:] makes a list of the column, which is much faster to read.
        sources=None if source_weights is None else dataset["source"][:],
        source_weights=source_weights,
    )


def check_prompts(
    flow: FlowPipeline,
    scorers: Sequence[RewardScorer],
    train_dataset: Dataset,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> bool:
    """
    See that the pipeline, the rewards and the prompt sets fit together.

    Returns:
        `bool`: Whether the pipeline edits the images of the prompt sets.

    Raises:
        `ValueError`: If they do not.
    """
    edits = edits_images(flow, train_dataset, "train_dataset")
    output = flow.family.output
    for scorer in scorers:
        check_media(scorer.funcs, scorer.names, output, type(flow.pipeline).__name__)
    trained = scorers[0]
    check_signatures(trained.funcs, trained.names, output, train_dataset.column_names, "train_dataset")
    for name, prompts in evaluation_sets(eval_dataset).items():
        check_evaluation_prompts(flow, scorers, prompts, name)
    if len(scorers) > 1 and eval_dataset is None:
        logger.warning(
            f"Held-out rewards ({', '.join(scorers[1].names)}) are scored in evaluations only, and there is no "
            "`eval_dataset`: pass one to the trainer, or to `evaluate`."
        )
    return edits


def check_evaluation_prompts(
    flow: FlowPipeline, scorers: Sequence[RewardScorer], prompts: Dataset, name: str | None
) -> bool:
    """See that rewards can score a prompt set; whether the pipeline edits its images."""
    if scorers[0].learners and not any(scorer.fixed_names for scorer in scorers):
        raise ValueError(
            f"There is nothing to evaluate on {set_label(name)}: all rewards learn ({', '.join(scorers[0].names)}), "
            "and evaluations leave those out. Pass `eval_reward_funcs`, or no `eval_dataset`."
        )
    edits = edits_images(flow, prompts, set_label(name))
    for scorer in scorers:
        check_signatures(scorer.funcs, scorer.names, flow.family.output, prompts.column_names, set_label(name))
    return edits
