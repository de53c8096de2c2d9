# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scoring a pipeline or an adapter on a prompt set, with everything on disk, so that it can be continued."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import TrainerState
from transformers.utils import logging

from ..data import prepare_prompts
from ..media import open_sample
from ..pipelines import FlowPipeline, edits_images, find_adapter, load_pipeline, loaded_adapter, verify_velocities
from ..pipelines.quantization import first_values
from ..processes import FailingTogether
from ..progress import tqdm_bar
from ..rewards import RewardError, RewardFunc, RewardScorer
from ..rewards.protocol import check_media
from ..rewards.signatures import check_signatures
from ..rollout import FailurePolicy, RolloutSampler, Samples
from ..world_size import check_world_size
from .contact_sheet import write_contact_sheet
from .drift import DriftMeter, knows_its_base
from .evaluation_config import EvaluationConfig
from .evaluator import EvaluationPlan, digest_prompts, evaluate_batches
from .measures import PromptDiversity
from .records import BatchRecords, ImageRecord, file_digest
from .results import (
    CONTACT_SHEET_FILE,
    GROUP_COLUMNS,
    KL_COLUMN,
    NUMBER_COLUMNS,
    SUMMARY_FILE,
    TEXT_COLUMNS,
    EvaluationResults,
)
from .statistics import number_prompts


logger = logging.get_logger(__name__)


def evaluate_pipeline(
    pipeline: str | Path | DiffusionPipeline,
    reward_funcs: str | RewardFunc | list[str | RewardFunc],
    prompts: Dataset,
    args: EvaluationConfig,
) -> EvaluationResults:
    """
    Score a pipeline, with or without an adapter, on a prompt set with several rewards.

    Images and scores are written batch by batch. Called again with the same settings after an interruption, it does
    what is missing and gives the very same scores. Under `accelerate launch` or `torchrun` each process takes its
    share of the batches; the number of processes changes nothing about the result. All of them must see `output_dir`.

    Example:

    ```python
    from trl_marble.evaluation import EvaluationConfig, compare_evaluations, evaluate_pipeline
    from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs

    steps = {"num_inference_steps": 8}
    task = (load_pipeline(), reward_funcs(), load_prompts("test"))
    base = evaluate_pipeline(*task, EvaluationConfig("runs/base", **steps))
    ours = evaluate_pipeline(*task, EvaluationConfig("runs/ours", adapter="runs/demo", **steps))
    compare_evaluations({"base": base, "ours": ours}, "runs/base-vs-ours").print_table()
    ```

    Args:
        pipeline (`str`, `Path` or [`~diffusers.DiffusionPipeline`]):
            The flow-matching pipeline: a Hub id, a local folder, or the object. An object is used on the device and in
            the dtype that it has, and is left as it was.
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards, as the trainer takes them. `trainer_state` is that of no step, and what they log
            with `log_metric` and `log_extra` is not kept.
        prompts ([`~datasets.Dataset`]):
            Prompts, in a column `prompt`. All other columns are passed to the rewards; `source` and `tag` also group
            the averages. For a pipeline that edits images, the column `image` holds those to be edited.
        args ([`EvaluationConfig`]):
            Configuration.

    Returns:
        [`EvaluationResults`]: also in `args.output_dir`: `scores.csv`, `evaluation.json`, `images/`,
        `contact_sheet.html`, and in `records/` what continuing needs.

    Raises:
        `ValueError`: for a pipeline that is not flow matching, a prompt set without prompts or without the images that
            the pipeline edits, rewards of images for a pipeline of videos or the other way round, rewards that cannot
            be called with the columns of the prompt set, rewards whose names are those of columns of the table, an
            `output_dir` with an evaluation of other settings, or fewer processes than were launched.
        `OSError`: if the pipeline or the adapter cannot be found.
        [`~trl_marble.rewards.RewardError`]: if a reward failed, see `EvaluationConfig.reward_failure`.
        `FloatingPointError`: if latents are not finite, see `EvaluationConfig.reward_failure`.
    """
    prompts = prepare_prompts(prompts, "prompts")
    if not isinstance(args, EvaluationConfig):
        raise TypeError(f"`args` is a {type(args).__name__}; pass an `EvaluationConfig`.")
    scorer = RewardScorer(reward_funcs, args.reward_timeout)
    if taken := set(scorer.names) & {*NUMBER_COLUMNS, *TEXT_COLUMNS, KL_COLUMN}:
        raise ValueError(
            f"A reward is named {sorted(taken)[0]!r}, a column of the table of scores. Rename the function."
        )
    # Without an accelerator `cpu` is needed, or the processes would not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_world_size(state.num_processes)
    is_object = isinstance(pipeline, DiffusionPipeline)
    model = load_pipeline(pipeline, None if is_object or not args.bf16 else torch.bfloat16)
    if not is_object:
        model.to(state.device)
    flow = FlowPipeline(
        model,
        args.height,
        args.width,
        args.guidance_scale,
        args.max_sequence_length,
        num_frames=args.num_frames,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
    )
    check_media(scorer.funcs, scorer.names, flow.family.output, type(model).__name__)
    check_signatures(scorer.funcs, scorer.names, flow.family.output, prompts.column_names, "prompts")
    verify_velocities(flow)
    adapter = None if args.adapter is None else find_adapter(args.adapter)
    edits = edits_images(flow, prompts, "prompts")
    plan = EvaluationPlan(prompts, edits, args.num_generations, args.seed, args.batch_size)
    settings = _settings(pipeline, flow, adapter, scorer.names, plan, args)
    folder = Path(args.output_dir)
    records = BatchRecords(folder)

    together = FailingTogether()
    with together.phase():
        if state.is_main_process:
            records.begin(settings)
    scorer.to(flow.device, torch.bfloat16 if args.bf16 else torch.float32)
    try:
        with ExitStack() as stack:
            with together.phase():
                stack.enter_context(loaded_adapter(model, adapter))
                measures_kl = knows_its_base(flow)
            with together.phase():
                share = range(state.process_index, len(plan.batches), state.num_processes)
                missing = [number for number in share if not _is_finished(records, number)]

            def keep(number: int, samples: Samples) -> None:
                _keep(number, samples, plan, records)

            sampler = RolloutSampler(
                flow,
                together,
                args.num_inference_steps,
                FailurePolicy(args.reward_failure),
                reward_timeout=args.reward_timeout,
                make_bar=functools.partial(tqdm_bar, disable=not state.is_local_main_process),
            )
            drift = DriftMeter(flow, args.num_inference_steps) if measures_kl else None
            evaluate_batches(plan, sampler, [scorer], missing, TrainerState(), keep, drift)
        of_sets = _score_sets(plan, records, share, sampler, scorer) if scorer.of_sets.any() else {}
    except RewardError as error:
        kept = "Batches that were finished are kept: evaluate again with the same settings to continue."
        raise RewardError(f"{error} {kept}") from error.__cause__
    finally:
        scorer.close()
    with together.phase():
        if state.is_main_process:
            _merge(settings, scorer.names, plan, records, args, measures_kl, of_sets)
    return EvaluationResults.load(folder)


def _is_finished(records: BatchRecords, number: int) -> bool:
    try:
        return records.read(number) is not None
    except ValueError as error:
        logger.warning(f"{error} Its batch is sampled and scored again.")
        return False


def _keep(number: int, samples: Samples, plan: EvaluationPlan, records: BatchRecords) -> None:
    """Put a scored batch on disk."""
    scores = samples.scores
    failed = scores.failed | ~samples.finite  # no reward was asked about images that are not finite
    if failed.any():
        first = scores.errors[0] if scores.errors else "Latents are not finite."
        logger.warning(f"Left out as not applicable: {int(failed.sum())} failed rewards. {first}")
    kl = [None] * len(samples.images) if samples.measured is None else samples.measured[:, 0].tolist()
    written = [
        records.save_image(index, _image_name(plan, index), image, scores.rewards[:, i], failed[:, i], kl[i])
        for i, (index, image) in enumerate(zip(plan.batches[number], samples.images, strict=True))
    ]
    records.write(number, written)


def _score_sets(
    plan: EvaluationPlan, records: BatchRecords, share: Sequence[int], sampler: RolloutSampler, scorer: RewardScorer
) -> dict[int, tuple[list[float], list[bool]]]:
    """
    Ask the rewards that compare images, once all images are on disk. All processes call it.

    Args:
        plan ([`EvaluationPlan`]):
            What was sampled.
        records ([`BatchRecords`]):
            What is on disk.
        share (`Sequence[int]`):
            The batches of this process.
        sampler ([`~trl_marble.rollout.RolloutSampler`]):
            Knows what becomes of failures.
        scorer ([`~trl_marble.rewards.RewardScorer`]):
            The rewards.

    Returns:
        `dict[int, tuple]`: number of the image -> its rewards, NaN in the places of the others, and which failed.
    """
    with sampler.together.phase():
        own = [record for number in share for record in records.read(number) or []]
        images = [open_sample(records.folder / record.file) for record in own]
        # What failed in these rows before any reward was asked is not finite.
        finite = torch.tensor([not any(_of_rows(record.failed, scorer.of_sets)) for record in own], dtype=torch.bool)
        sets = plan.set_images([record.index for record in own], images, finite)
    scores = sampler.score_sets(scorer, sets, TrainerState())
    found = {
        number: (scores.rewards[:, place].tolist(), scores.failed[:, place].tolist())
        for place, number in enumerate(sets.numbers)
    }
    return {number: values for each in gather_object([found]) for number, values in each.items()}


def _of_rows(values: Sequence[bool], rows: Tensor) -> list[bool]:
    return [value for value, chosen in zip(values, rows.tolist(), strict=True) if chosen]


def _add_sets(record: ImageRecord, found: tuple[list[float], list[bool]]) -> ImageRecord:
    """A record with what rewards that compare images found of it."""
    rewards = [own if value != value else value for own, value in zip(record.rewards, found[0], strict=True)]
    failed = [own or fails for own, fails in zip(record.failed, found[1], strict=True)]
    return dataclasses.replace(record, rewards=rewards, failed=failed)


def _image_name(plan: EvaluationPlan, index: int) -> str:
    """The name of an image's file, without its ending."""
    return "{:05d}_{:02d}".format(*plan.place(index))


def _merge(
    settings: dict[str, Any],
    names: list[str],
    plan: EvaluationPlan,
    records: BatchRecords,
    args: EvaluationConfig,
    measures_kl: bool,
    of_sets: Mapping[int, tuple[list[float], list[bool]]],
) -> None:
    """Put all batches into one table, and write it with its summary and its contact sheet."""
    scored: list[ImageRecord] = []
    for number in range(len(plan.batches)):
        batch = records.read(number)
        if batch is None:
            raise FileNotFoundError(
                f"Batch {number} is missing in `{records.folder}`; `output_dir` must be one folder for all processes."
            )
        scored += [_add_sets(record, of_sets[record.index]) if of_sets else record for record in batch]
    failed = np.array([record.failed for record in scored]).sum(axis=0)
    table = _table(plan, scored, names, measures_kl)
    for name, number in zip(names, failed.tolist(), strict=True):
        if number and (args.reward_failure == "raise" or not table[name].notna().any()):
            raise RewardError(
                f"Reward `{name}` failed for {number} of {len(table)} images and scored {table[name].notna().sum()}. "
                "Set `reward_failure='mask'` to leave failed images out, as long as some are left; or fix the reward "
                "and evaluate in another `output_dir`."
            )
    diversity = PromptDiversity().compute(
        features=torch.stack([record.thumbnail_features() for record in scored]).numpy(),
        groups=number_prompts(table["prompt"], table["prompt_index"], plan.edits),
    )
    results = EvaluationResults(
        folder=records.folder,
        settings=settings,
        reward_names=names,
        table=table,
        failed=dict(zip(names, failed.tolist(), strict=True)),
        prompt_diversity=diversity["per_group"],
    )
    (records.folder / SUMMARY_FILE).unlink(missing_ok=True)
    write_contact_sheet({results.title: results}, records.folder / CONTACT_SHEET_FILE)
    results.save()


def _table(
    plan: EvaluationPlan, scored: Sequence[ImageRecord], names: Sequence[str], measures_kl: bool
) -> pd.DataFrame:
    places = [plan.place(record.index) for record in scored]
    columns: dict[str, Any] = {
        "index": [record.index for record in scored],
        "prompt_index": [row for row, _ in places],
        "generation": [generation for _, generation in places],
        "seed": [plan.image_seed(record.index) for record in scored],
    }
    for column in ("prompt", *GROUP_COLUMNS):
        if column in plan.prompts.column_names:
            values = plan.prompts[column][:]
            texts = [None if values[row] in (None, "") else str(values[row]) for row, _ in places]
            columns[column] = pd.Series(texts, dtype="object")
    columns["image"] = pd.Series([record.file for record in scored], dtype="object")
    if measures_kl:
        columns[KL_COLUMN] = np.array([record.kl for record in scored], dtype=float)
    for k, name in enumerate(names):
        columns[name] = np.array([record.rewards[k] for record in scored], dtype=float)  # None becomes NaN
    return pd.DataFrame(columns)


def _settings(
    pipeline: str | Path | DiffusionPipeline,
    flow: FlowPipeline,
    adapter: Path | None,
    reward_names: list[str],
    plan: EvaluationPlan,
    args: EvaluationConfig,
) -> dict[str, Any]:
    """What every score depends on, and what was evaluated."""
    model = flow.pipeline
    named = model.config.get("_name_or_path") if isinstance(pipeline, DiffusionPipeline) else str(pipeline)
    return {
        "pipeline": str(named or type(model).__name__),
        "pipeline_class": flow.family.pipeline_class.__name__,
        "adapter": None if args.adapter is None else str(args.adapter),
        "pipeline_digest": _pipeline_digest(model),
        "base_digest": _pipeline_digest(model, with_adapters=False),
        "adapter_digest": None if adapter is None else file_digest(adapter),
        "rewards": reward_names,
        "num_prompts": len(plan.prompts),
        "prompts_digest": digest_prompts(plan.prompts),
        "edits_images": plan.edits,
        "num_generations": args.num_generations,
        "seed": args.seed,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": float(args.guidance_scale),
        "height": args.height,
        "width": args.width,
        "num_frames": args.num_frames,
        "max_sequence_length": args.max_sequence_length,
        "bf16": args.bf16,
        "batch_size": args.batch_size,
    }


def _pipeline_digest(pipeline: DiffusionPipeline, with_adapters: bool = True) -> str:
    """
    Of the scheduler's settings and the name, shape, dtype and first 64 values of every weight of a pipeline; without
    its adapters it is that of the pipeline that they were put on.
    """
    # Keys with an underscore say how the settings came about.
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(pipeline.scheduler).__name__, scheduler], default=repr).encode())
    for component, module in sorted(pipeline.components.items()):
        if isinstance(module, nn.Module):
            for name, weight in module.named_parameters():
                if not with_adapters and "lora_" in name:
                    continue
                name = name if with_adapters else name.replace(".base_layer.", ".")
                digest.update(f"{component}.{name} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(first_values(weight).numpy().tobytes())
    return digest.hexdigest()
