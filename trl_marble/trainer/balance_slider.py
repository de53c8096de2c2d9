# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Whether a run can train one adapter for every balance between its rewards."""

from collections.abc import Sequence

from ..pipelines import FlowPipeline, Teacher
from ..rollout import ShareDraws
from .marble_config import MarbleConfig


def check_balance_slider(
    flow: FlowPipeline, edits: bool, reward_names: Sequence[str], teachers: Sequence[Teacher], args: MarbleConfig
) -> None:
    """
    See that `balance_slider=True` fits the rest of the run.

    Raises:
        `ValueError`: If there are fewer than two rewards, or there are teachers, or the pipeline is called for one
            sample or one time, and batches have more.
    """
    if not args.balance_slider:
        return
    if len(reward_names) < 2:
        raise ValueError(
            "`balance_slider=True` trains for every balance between rewards, and "
            f"{'there are none' if not reward_names else f'`{reward_names[0]}` is the only one'}. Pass two rewards or "
            "more, or leave it out."
        )
    if teachers:
        raise ValueError(
            "`balance_slider=True` trains one part of the adapter for each reward, and the teacher "
            f"{teachers[0].key!r} has none; leave one of the two out."
        )
    sizes = {name: getattr(args, name) for name in ("per_device_train_batch_size", "rollout_batch_size")}
    if (flow.splits_batches or edits) and set(sizes.values()) != {1}:
        given = " and ".join(f"`{name}={size}`" for name, size in sizes.items())
        raise ValueError(
            f"`balance_slider=True` mixes the parts of the adapter within a batch, and {type(flow.pipeline).__name__} "
            f"is not called for a whole batch here ({given}). Set both to 1, with more `gradient_accumulation_steps`."
        )


def share_draws(args: MarbleConfig, num_rewards: int) -> ShareDraws | None:
    """What draws the shares of the rewards; `None` without `balance_slider`."""
    return ShareDraws(args.seed, num_rewards, args.num_generations) if args.balance_slider else None
