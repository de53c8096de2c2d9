# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Sampling and scoring a whole prompt set: batch by batch, on any number of processes, and to be continued."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerState
from transformers.utils import logging

from ..data import prepare_prompts, read_rows
from ..media import Sample
from ..pipelines import (
    FlowPipeline,
    edits_images,
    encode_distinct,
    find_adapter,
    load_pipeline,
    loaded_adapter,
    verify_velocities,
    with_rgb_images,
)
from ..pipelines.quantization import first_values
from ..processes import FailingTogether
from ..rewards import PendingScores, RewardError, RewardFunc, RewardScorer
from ..rewards.protocol import BrokenRewardError, check_media
from ..rewards.signatures import check_signatures
from ..world_size import check_world_size
from .contact_sheet import write_contact_sheet
from .evaluation_config import EvaluationConfig
from .measures import PromptDiversity
from .records import BatchRecords, ImageRecord, file_digest
from .results import (
    CONTACT_SHEET_FILE,
    GROUP_COLUMNS,
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
    """
    prompts = prepare_prompts(prompts, "prompts")
    if not isinstance(args, EvaluationConfig):
        raise TypeError(f"`args` is a {type(args).__name__}; pass an `EvaluationConfig`.")
    scorer = RewardScorer(reward_funcs, args.reward_timeout)
    if taken := set(scorer.names) & {*NUMBER_COLUMNS, *TEXT_COLUMNS}:
        raise ValueError(
            f"A reward is named {sorted(taken)[0]!r}, a column of the table of scores. Rename the function."
        )
    # Without an accelerator it has to be told, or the processes would not find each other.
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
    plan = _Plan(with_rgb_images(prompts) if edits else prompts, edits, args)
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
            _evaluate_share(flow, scorer, plan, records, args, state, together)
    finally:
        scorer.close()
    with together.phase():
        if state.is_main_process:
            _merge(settings, scorer.names, plan, records, args)
    return EvaluationResults.load(folder)


class _Plan:
    """Which image is sampled from what, and with which others: the same for any number of processes."""

    def __init__(self, prompts: Dataset, edits: bool, args: EvaluationConfig) -> None:
        self.prompts = prompts
        self.edits = edits
        self.num_generations = args.num_generations
        self.seed = args.seed
        self.num_images = len(prompts) * args.num_generations
        self.batches = [
            range(start, min(start + args.batch_size, self.num_images))
            for start in range(0, self.num_images, args.batch_size)
        ]

    def place(self, index: int) -> tuple[int, int]:
        """Row of the prompt set and number among its images."""
        return divmod(index, self.num_generations)

    def image_seed(self, index: int) -> int:
        return image_seed(self.seed, *self.place(index))

    def image_name(self, index: int) -> str:
        return "{:05d}_{:02d}".format(*self.place(index))


class _Sampled(NamedTuple):
    """A batch of images whose scores are on their way."""

    number: int
    images: list[Sample]
    pending: PendingScores


def image_seed(seed: int, prompt_index: int, generation: int) -> int:
    """
    The seed of one image of an evaluation.

    Args:
        seed (`int`):
            Seed of the evaluation, not negative.
        prompt_index (`int`):
            Row of the prompt set.
        generation (`int`):
            Number of the image among those of the row.

    Returns:
        `int`: of 53 bits, which every reader of JSON and CSV keeps exactly. Different places give unrelated seeds, and
        none of them is one of training.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(prompt_index, generation))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 11


def _evaluate_share(
    flow: FlowPipeline,
    scorer: RewardScorer,
    plan: _Plan,
    records: BatchRecords,
    args: EvaluationConfig,
    state: PartialState,
    together: FailingTogether,
) -> None:
    """Do what is missing of this process's batches. A batch is scored while the next one is sampled."""
    with together.phase():
        share = range(state.process_index, len(plan.batches), state.num_processes)
        missing = [number for number in share if not _is_finished(records, number)]
        num_missing = sum(len(plan.batches[number]) for number in missing)
        total = sum(len(plan.batches[number]) for number in share)
    # As many rounds on all processes, so that none of them goes on when one has failed.
    rounds = max(gather_object([len(missing)]))
    waiting: _Sampled | None = None
    with tqdm(
        total=total,
        initial=total - num_missing,
        desc="evaluation",
        unit="image",
        leave=False,
        dynamic_ncols=True,
        disable=not state.is_local_main_process,
    ) as bar:
        for place in range(rounds + 1):
            with together.phase():
                sampled = _sample(flow, scorer, plan, missing[place], args) if place < len(missing) else None
                if waiting is not None:
                    _finish(waiting, scorer, plan, records, args)
                    bar.update(len(waiting.images))
                waiting = sampled
    scorer.release()


def _is_finished(records: BatchRecords, number: int) -> bool:
    try:
        return records.read(number) is not None
    except ValueError as error:
        logger.warning(f"{error} Its batch is sampled and scored again.")
        return False


@torch.no_grad()
def _sample(flow: FlowPipeline, scorer: RewardScorer, plan: _Plan, number: int, args: EvaluationConfig) -> _Sampled:
    indices = plan.batches[number]
    columns = read_rows(plan.prompts, [plan.place(index)[0] for index in indices])
    texts = columns.pop("prompt")
    seeds = [plan.image_seed(index) for index in indices]
    conditioning, index = encode_distinct(flow, texts, columns["image"] if plan.edits else None)
    device = flow.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])  # for solvers that draw noise at every step
        images: list[Sample] = list(flow.rollout(conditioning.select(index), seeds, args.num_inference_steps).images)
    return _Sampled(number, images, scorer.submit(images, texts, columns, TrainerState()))


def _finish(
    sampled: _Sampled, scorer: RewardScorer, plan: _Plan, records: BatchRecords, args: EvaluationConfig
) -> None:
    """Wait for a batch's scores and put it on disk."""
    scores = scorer.collect(sampled.pending)
    if scores.errors:
        if args.reward_failure == "raise":
            error = scores.errors[0]
            mask = ", or set `reward_failure='mask'` to leave failed images out"
            text = f"{error} Batches that were finished are kept: evaluate again to continue"
            text += "." if isinstance(error, BrokenRewardError) else f"{mask}."
            raise RewardError(text) from error.__cause__
        logger.warning(f"Left out as not applicable: {int(scores.failed.sum())} failed rewards. {scores.errors[0]}")
    written = [
        records.save_image(index, plan.image_name(index), image, scores.rewards[:, i], scores.failed[:, i])
        for i, (index, image) in enumerate(zip(plan.batches[sampled.number], sampled.images, strict=True))
    ]
    records.write(sampled.number, written)


def _merge(
    settings: dict[str, Any], names: list[str], plan: _Plan, records: BatchRecords, args: EvaluationConfig
) -> None:
    """Put all batches into one table, and write it with its summary and its contact sheet."""
    scored: list[ImageRecord] = []
    for number in range(len(plan.batches)):
        batch = records.read(number)
        if batch is None:
            raise FileNotFoundError(
                f"Batch {number} is missing in `{records.folder}`; `output_dir` must be one folder for all processes."
            )
        scored += batch
    failed = np.array([record.failed for record in scored]).sum(axis=0)
    table = _table(plan, scored, names)
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


def _table(plan: _Plan, scored: Sequence[ImageRecord], names: Sequence[str]) -> pd.DataFrame:
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
    for k, name in enumerate(names):
        columns[name] = np.array([record.rewards[k] for record in scored], dtype=float)  # None becomes NaN
    return pd.DataFrame(columns)


def _settings(
    pipeline: str | Path | DiffusionPipeline,
    flow: FlowPipeline,
    adapter: Path | None,
    reward_names: list[str],
    plan: _Plan,
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
        "adapter_digest": None if adapter is None else file_digest(adapter),
        "rewards": reward_names,
        "num_prompts": len(plan.prompts),
        "prompts_digest": _prompts_digest(plan.prompts),
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


def _pipeline_digest(pipeline: DiffusionPipeline) -> str:
    """Of the scheduler's settings and the name, shape, dtype and first 64 values of every weight of a pipeline."""
    # Keys with an underscore say how the settings came about.
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(pipeline.scheduler).__name__, scheduler], default=repr).encode())
    for component, module in sorted(pipeline.components.items()):
        if isinstance(module, nn.Module):
            for name, weight in module.named_parameters():
                digest.update(f"{component}.{name} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(first_values(weight).numpy().tobytes())
    return digest.hexdigest()


def _prompts_digest(prompts: Dataset) -> str:
    """Of all rows and columns of a prompt set."""
    digest = hashlib.sha256()
    for row in prompts:
        digest.update(json.dumps(row, sort_keys=True, default=_content).encode() + b"\n")
    return digest.hexdigest()


def _content(value: Any) -> str:
    """Of a value that JSON does not have; the `repr` of an image would tell its place in memory."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)
