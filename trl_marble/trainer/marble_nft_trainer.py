# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trainer, in the order of the data: prompts, rollout, rewards, advantages, gradients, update, adapter."""

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, gather_object, set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from peft import LoraConfig
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging

from ..balance import (
    OLD_POLICY_PRESETS,
    BalanceSchedule,
    aggregate_advantages,
    get_weighting,
    nft_losses,
    old_policy_decay,
    weight_ema_decay,
    weighted_sum_weights,
)
from ..data import RepeatPromptSampler, prepare_prompts, read_rows, source_weights
from ..evaluation import Evaluation
from ..evaluation.diversity import group_diversity, thumbnails
from ..hub import save_adapter
from ..pipelines import (
    Conditioning,
    FlowPipeline,
    Policy,
    WeightShadow,
    adapters_disabled,
    add_trainable_adapter,
    edits_images,
    encode_distinct,
    load_pipeline,
    lora_config,
    with_rgb_images,
)
from ..processes import FailingTogether
from ..rewards import RewardFunc, RewardScorer
from ..rewards.protocol import check_media
from ..rewards.signatures import check_signatures
from .callbacks import MarbleCallback
from .checkpoint_folder import check_writable
from .checkpointed_trainer import OPTIMIZER_FILE, CheckpointedTrainer
from .checkpointing import base_fingerprint, copy_into, load_state, save_state
from .evaluating import PolicyEvaluation, evaluate_policy
from .evaluation_sets import (
    check_best_metric,
    evaluation_sets,
    pool_evaluations,
    prepare_evaluation_sets,
    set_label,
)
from .generation import GenerationBatch, digest_of, training_order
from .held_out import held_out_scorer
from .live_table import LiveTableCallback, ProgressBar
from .marble_config import MarbleConfig
from .metrics import MetricBuffer, average_logged
from .nonfinite import NonFiniteGuard, finite_mean, refuse_nonfinite, refuse_nonfinite_run
from .out_of_memory import rollout_advice, update_advice
from .pictures import RolloutRecord, choose_rows, log_evaluation, log_plots, log_rollout
from .preparation import measured_linears, place_base
from .publishing import push_checkpoint, push_output, write_card, write_card_beside_adapter
from .reward_failures import count_failures
from .sampling import sample_and_score
from .seeding import Draw, derive_seed
from .step_gradient import LossShares, StepGradient
from .unsupported_methods import WithoutPredictions


logger = logging.get_logger(__name__)


class MarbleNFTTrainer(WithoutPredictions, CheckpointedTrainer):
    """
    Trainer for flow-matching pipelines against several rewards at once: MARBLE
    (https://huggingface.co/papers/2605.06507) on DiffusionNFT (https://huggingface.co/papers/2509.16117).

    Example:

    ```python
    from trl_marble import MarbleConfig, MarbleNFTTrainer
    from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs

    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=reward_funcs(),
        args=MarbleConfig("shapeworld-marble"),
        train_dataset=load_prompts("train"),
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        pipeline (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            The flow-matching pipeline to align: a Hub id, a local folder, or the object. Its parts are frozen and a
            LoRA adapter is added to its transformer.
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards, see [`~trl_marble.rewards.RewardFunc`]. Called with keywords `images` (`videos` for a pipeline
            of videos), `prompts`, the other columns of the dataset, `trainer_state`, and where they accept them
            `log_metric` and `log_extra`; they return one score per image, or `None` where they do not apply. A string
            is a known name (`"pickscore"`) or a dotted path (`"my_rewards.brightness"`), see
            [`~trl_marble.rewards.load_reward`].
        args ([`MarbleConfig`], *optional*):
            Configuration. Defaults to `MarbleConfig` with an output folder named after the pipeline.
        train_dataset ([`~datasets.Dataset`]):
            Prompts, in a column `prompt`. All other columns are passed to the rewards. Where the pipeline edits
            images, the column `image` (`datasets.Image`) holds them, of any mode: both the pipeline and the rewards
            get them in RGB. Of conversations the last user message is the prompt. A set that
            [`~trl_marble.data.mix_prompts`] made gives each generation batch its share of every source.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Prompts to evaluate on; or several sets by name, which are evaluated one by one and together.
        eval_reward_funcs (`str`, `RewardFunc` or a list of them, *optional*):
            Held-out rewards: scored in evaluations beside `reward_funcs`, and never trained on. What rises in training
            and not here is not quality, see [`RewardHackingCallback`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            The adapter. Defaults to rank 32, alpha 64. Without `target_modules` it is put on the projections that are
            usually trained in the pipeline's family.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to add to the default ones. In a terminal a [`LiveTableCallback`] is one of these, unless one is
            given here or `args.disable_tqdm` is set.
        optimizers (`tuple` of optimizer and scheduler, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler to use instead of those that `args` describe.
        weighting (`str` or `Callable[[Tensor], Tensor]`, *optional*, defaults to `"mgda"`):
            How `multi_objective_aggregation="marble"` finds the coefficients: a name, or any callable from the Gram
            matrix `[K, K]` of the per-reward gradients to coefficients `[K]`, such as a `torchjd` weighting.

    Raises:
        `ValueError`: For a pipeline that is not flow matching, a prompt set without prompts or without the images that
            the pipeline edits, the wrong number of reward weights, a held-out reward that is trained on, rewards that
            cannot be called with the columns of the prompt set, rewards of images for a pipeline of videos (see
            [`~trl_marble.rewards.FrameReward`]) or the other way round, or settings that do not fit together.
        `OSError`: If the output folder cannot be written.
    """

    args: MarbleConfig
    model: Policy
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    hub_model_id: Any  # transformers sets it later than where it declares it as `None`

    def __init__(
        self,
        pipeline: str | os.PathLike | DiffusionPipeline,
        reward_funcs: str | RewardFunc | list[str | RewardFunc],
        args: MarbleConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        weighting: str | Callable[[Tensor], Tensor] = "mgda",
        eval_reward_funcs: str | RewardFunc | list[str | RewardFunc] | None = None,
    ) -> None:
        if args is None:
            place = Path(type(pipeline).__name__ if isinstance(pipeline, DiffusionPipeline) else pipeline)
            args = MarbleConfig(f"{place.absolute().name}-marble")
        if not isinstance(args, MarbleConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; pass a `MarbleConfig`.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing; pass a `datasets.Dataset` with a `prompt` column.")
        train_dataset = prepare_prompts(train_dataset, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = prepare_evaluation_sets(eval_dataset)
        self.source_weights = source_weights(train_dataset)
        check_writable(Path(args.output_dir))

        self.scorer = RewardScorer(reward_funcs, args.reward_timeout)
        self.held_out_scorer = held_out_scorer(eval_reward_funcs, reward_funcs, self.scorer)
        if self.held_out_scorer is not None and eval_dataset is None:
            logger.warning(
                f"Held-out rewards ({', '.join(self.held_out_names)}) are scored in evaluations only, and there is no "
                "`eval_dataset`: pass one to the trainer, or to `evaluate`."
            )
        for scorer in self.scorers:
            scorer.to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
        num_rewards = len(self.scorer)
        if args.reward_weights is not None and len(args.reward_weights) != num_rewards:
            raise ValueError(
                f"`reward_weights` has {len(args.reward_weights)} values ({args.reward_weights}) for {num_rewards} "
                f"rewards ({', '.join(self.scorer.names)}); pass one weight a reward, in their order."
            )
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * num_rewards)
        if args.multi_objective_aggregation != "marble" and weighting != "mgda":
            raise ValueError(
                f"`weighting` has no effect with `multi_objective_aggregation={args.multi_objective_aggregation!r}`; "
                "leave one of the two out."
            )
        self.weighting = get_weighting("equal" if args.multi_objective_aggregation == "equal" else weighting)

        # The base model, the adapter that is trained, and two more sets of values for it.
        set_seed(args.seed)  # the adapter is initialized here, before `Trainer` sets the seed
        self.pipeline = load_pipeline(pipeline)
        self.flow = FlowPipeline(
            self.pipeline,
            args.height,
            args.width,
            args.guidance_scale,
            args.max_sequence_length,
            num_frames=args.num_frames,
            autocast_dtype=torch.bfloat16 if args.bf16 else None,
        )
        self.edits = edits_images(self.flow, train_dataset, "train_dataset")
        if self.edits:
            train_dataset = with_rgb_images(train_dataset)
        for set_name, prompts in evaluation_sets(eval_dataset).items():
            edits_images(self.flow, prompts, set_label(set_name))
        for scorer in self.scorers:
            check_media(scorer.funcs, scorer.names, self.flow.family.output, type(self.pipeline).__name__)
        self._check_rewards([self.scorer], train_dataset, "train_dataset")
        for set_name, prompts in evaluation_sets(eval_dataset).items():
            self._check_rewards(self.scorers, prompts, set_label(set_name))
        check_best_metric(args.metric_for_best_model, [*self.scorer.names, *self.held_out_names], eval_dataset)
        self.trainable = dict(add_trainable_adapter(self.pipeline, peft_config or lora_config(self.pipeline)))
        self._fingerprint = base_fingerprint(self.flow.transformer)
        place_base(self.flow, self.trainable.values(), args)
        super().__init__(
            model=Policy(self.flow),
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[_FollowPolicy(self), *(callbacks or [])],  # first: the others see the policies as they are now
            optimizers=optimizers,
        )
        if sys.stdout.isatty() and not args.disable_tqdm and not self._has_callback(LiveTableCallback):
            self.add_callback(LiveTableCallback())
        # Of `Policy.forward` only, and with a cache: the pipeline has a precision of its own for all of its calls.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self.parameters = list(self.trainable.values())
        self.old_policy = WeightShadow(self.trainable.items())
        self.average = WeightShadow(self.trainable.items())
        self.schedule = BalanceSchedule(num_rewards, args.balance_every, args.balance_ema, args.normalize_gradients)
        self.metrics = MetricBuffer()
        self.together = FailingTogether()
        linears = measured_linears(self.flow, self.trainable, self.edits, args)
        self.nonfinite = NonFiniteGuard(args, self.accelerator, self.scorer.names, self.metrics)
        self.step_gradient = StepGradient(
            args,
            self.accelerator,
            self.parameters,
            linears,
            self.schedule,
            self.weighting,
            self.scorer.names,
            self.metrics,
            self.nonfinite,
        )
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.flow.transformer.modules())

        # The loss of a micro-batch is already its share of the optimizer step's.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True

        self.times = self.flow.training_times(args.num_inference_steps)
        self.num_times = max(1, int(len(self.times) * args.timestep_fraction))
        self._cycle_length = args.steps_per_generation * args.num_iterations
        self.evaluations: list[Evaluation] = []
        self._batch: GenerationBatch  # from the first micro-batch on
        self._prompts: list[str]  # of this process's samples of it
        self._conditioning: Conditioning | None = None  # of the generation batch; a resumed run makes it anew
        self._micro_step = 0
        self._latest_rollout: RolloutRecord | None = None
        self._latest_images_step: int | None = None
        self._silent_rewards: set[str] = set()

    def _has_callback(self, kind: type[TrainerCallback]) -> bool:
        return any(isinstance(callback, kind) for callback in self.callback_handler.callbacks)

    @property
    def held_out_names(self) -> list[str]:
        """Names of the rewards that are scored in evaluations and never trained on."""
        return [] if self.held_out_scorer is None else self.held_out_scorer.names

    @property
    def scorers(self) -> list[RewardScorer]:
        """What evaluations score with: the rewards that are trained on, then the held-out ones."""
        return [self.scorer, *([] if self.held_out_scorer is None else [self.held_out_scorer])]

    def _check_rewards(self, scorers: list[RewardScorer], dataset: Dataset, name: str) -> None:
        """Refuse rewards that cannot be called with the columns of a dataset."""
        for scorer in scorers:
            check_signatures(scorer.funcs, scorer.names, self.flow.family.output, dataset.column_names, name)

    # ---- Prompts ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RepeatPromptSampler:
        return self._prompt_sampler

    def get_train_dataloader(self):
        """
        Batches of row numbers: in each, this process's part of a generation batch.

        A generation batch comes once for every micro-batch that trains on it, so that epochs, steps and resuming are
        counted as `transformers` does. Its rows are read once, when it is sampled: `transformers` holds all
        micro-batches of an optimizer step at once.
        """
        self._prompt_sampler = RepeatPromptSampler(
            num_prompts=len(self.train_dataset),
            num_generations=self.args.num_generations,
            prompts_per_batch=self.args.prompts_per_generation,
            num_repeats=self.args.steps_per_generation * self.args.num_iterations,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            # [:] makes a list of the column, which is much faster to read.
            sources=None if self.source_weights is None else self.train_dataset["source"][:],
            source_weights=self.source_weights,
        )
        return self._get_dataloader(
            dataset=range(len(self.train_dataset)),  # type: ignore[arg-type]
            description="Training",
            batch_size=self.args.per_device_train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if self.args.base_is_sharded:
            return Policy(self.flow)  # another object, so that `Trainer` does not wrap it for DDP, which cannot shard
        return super()._wrap_model(model, training, dataloader)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """
        Train, see [`~transformers.Trainer.train`].

        If training stops by an exception, what was trained so far is saved as a checkpoint first, and training can be
        resumed from there.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                The folder of a checkpoint to go on from; `True` or `"latest"` for the latest valid one in
                `args.output_dir`, where a warning names checkpoints that were damaged since they were written, or not
                written to their end; `"auto"` for the same if there is any; `False` to begin anew. Defaults to
                `args.resume_from_checkpoint`. Settings that are not those of the checkpoint are used, and a warning
                names them.
            kwargs:
                See [`~transformers.Trainer.train`].

        Raises:
            `FileNotFoundError`: If there is no checkpoint to resume from.
            `FileExistsError`: If the run would write its checkpoints among those of another one, see
                `MarbleConfig.overwrite_output_dir`.
            `ValueError`: If the files of the checkpoint are not those that were written (the message names the latest
                valid one), or if it belongs to another run.
            `OSError`: If a checkpoint cannot be written, as on a full disk. Those before it are as they were.
        """
        self._micro_step = 0
        self._latest_images_step = None
        self.metrics.clear()
        own_callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, MarbleCallback)]
        for callback in own_callbacks:
            callback.open(self)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for callback in own_callbacks:
                callback.close()
            for scorer in self.scorers:
                scorer.close()

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: list[int], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        One micro-batch: sample and score if a generation batch begins, then accumulate gradients; the last micro-batch
        of an optimizer step turns them into the update's direction.

        Args:
            model (`nn.Module`):
                The policy as `accelerate` wrapped it. Not called: gradients are reduced here, once for the whole step.
            inputs (`list[int]`):
                The rows of the dataset that are this process's part of the generation batch, by number.
            num_items_in_batch:
                Not used.

        Returns:
            `Tensor`: The micro-batch's share of the step's loss, detached.
        """
        cycle, place = divmod(self._micro_step, self._cycle_length)
        iteration, slot = divmod(place, self.args.steps_per_generation)
        if place == 0:
            self._batch = self._generate(inputs, cycle)
        elif self._conditioning is None:
            with self.together.phase():
                self._encode_again(inputs)
        update = slot // self.args.gradient_accumulation_steps
        is_last = self.accelerator.sync_gradients
        with self.together.phase(exchanges=self.args.base_is_sharded, ask=is_last), update_advice(self.args):
            if slot % self.args.gradient_accumulation_steps == 0:
                self._begin_update(update)
            loss = self._accumulate(slot, cycle, iteration)
        if is_last:
            with self.together.phase():
                left_out = self.nonfinite.settle()
            with self.together.phase(), update_advice(self.args):
                if left_out is not None:
                    self._repeat_update(slot, cycle, iteration, left_out)
            with self.together.phase(), update_advice(self.args):
                self.step_gradient.finish()
        self._micro_step += 1
        return loss

    # ---- Rollout, rewards, advantages ----

    def _generate(self, row_numbers: list[int], cycle: int) -> GenerationBatch:
        """Sample the rows' prompts with the old policy, score the images and compare them with their group."""
        with self.together.phase():  # it may fail in one process, where a dataset reads files
            columns = read_rows(self.train_dataset, row_numbers)
        self._prompts = prompts = columns.pop("prompt")
        sample_ids = range(self.args.process_index * len(prompts), (self.args.process_index + 1) * len(prompts))
        seeds = [derive_seed(self.args.seed, Draw.ROLLOUT, cycle, i) for i in sample_ids]
        to_edit = columns["image"] if self.edits else None
        batch_size = self.args.rollout_batch_size
        with self.together.phase(), rollout_advice("rollout_batch_size", batch_size):
            conditioning, prompt_index = encode_distinct(self.flow, prompts, to_edit)
        self._conditioning = conditioning
        with self.old_policy.swapped_in(), rollout_advice("rollout_batch_size", batch_size):
            latents, images, finite, scores = sample_and_score(
                self, [self.scorer], conditioning, prompt_index, prompts, columns, seeds, batch_size
            )
        with self.together.phase():
            number_nonfinite = self.nonfinite.settle_latents(finite, prompts)
        if self.args.on_nonfinite == "mask":
            self.metrics.record("nonfinite/latents", number_nonfinite)
        rewards, failed = scores.rewards, {}
        if self.args.masks_rewards:
            with self.together.phase():
                failed = count_failures(scores, self.scorer.names, self.accelerator)
        all_rewards = self._gather(rewards.T).T
        groups = torch.arange(all_rewards.shape[1]) // self.args.num_generations
        self._record_rewards(all_rewards, failed)
        for name, mean in average_logged(scores.metrics).items():
            self.metrics.record(name, mean)
        features = self._gather(thumbnails(images).masked_fill(~finite[:, None], torch.nan))
        self.metrics.record("drift/diversity", group_diversity(features, groups).nanmean().item())
        if self.args.log_images:
            sources = None if "source" not in columns else gather_object([str(source) for source in columns["source"]])
            rows = choose_rows(prompts, images, rewards, scores.extras, self.args.num_images_to_log)
            self._latest_rollout = RolloutRecord(rows, all_rewards, sources)
        advantages = aggregate_advantages(
            all_rewards,
            groups=groups,
            reward_weights=self.reward_weights,
            mode=self.args.multi_objective_aggregation,
            scale_rewards=self.args.scale_rewards,
            advantage_clip=self.args.advantage_clip,
        )[:, sample_ids.start : sample_ids.stop]

        # Micro-batches hold samples of many prompts, in an order that resuming finds again.
        num_updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        order_seed = derive_seed(self.args.seed, Draw.ORDER, cycle)
        order = training_order(self.args.generation_batch_size, sample_ids, num_updates, order_seed)
        advantages = advantages[:, order]
        updates = advantages.chunk(num_updates, dim=1)
        counts = torch.stack([(~part.isnan()).sum(dim=1) for part in updates])
        signals = torch.stack([(part.nan_to_num() != 0).sum(dim=1) for part in updates])
        scored = torch.stack([(~part.isnan()).any(dim=0).sum() for part in updates])
        device = self.args.device
        self.metrics.record("drift/latent_rms", _mean_rms(latents[finite.to(device)]).item())
        return GenerationBatch(
            rows_digest=digest_of(prompts, to_edit),
            prompt_index=prompt_index[order].to(device),
            sample_ids=torch.tensor(sample_ids)[order],
            latents=latents[order.to(device)],
            finite=finite[order],
            advantages=advantages.to(device),
            counts=self.accelerator.reduce(counts.to(device), reduction="sum"),
            active=self.accelerator.reduce(signals.to(device), reduction="sum") > 0,
            scored=self.accelerator.reduce(scored.to(device), reduction="sum"),
            weighted_sum=self._weighted_sum(all_rewards),
        )

    def _encode_again(self, rows: list[int]) -> None:
        """Embeddings for a generation batch that was read from a checkpoint, of the same rows of the dataset."""
        columns = read_rows(self.train_dataset, rows)
        self._prompts = prompts = columns["prompt"]
        to_edit = columns["image"] if self.edits else None
        if digest_of(prompts, to_edit) != self._batch.rows_digest:
            raise ValueError(
                "The checkpoint was saved in the middle of a generation batch that was sampled from other rows than "
                f"those of this run (the first is {prompts[0]!r}). Resume with the same `train_dataset` and without "
                "`ignore_data_skip`, or from a checkpoint between two generation batches."
            )
        self._conditioning, _ = encode_distinct(self.flow, prompts, to_edit)

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, in the order of the generation batch, on the CPU."""
        return self.accelerator.gather(values.contiguous().to(self.args.device)).cpu()

    def _record_rewards(self, rewards: Tensor, failed: dict[str, int]) -> None:
        for name, row in zip(self.scorer.names, rewards, strict=True):
            valid = row[~row.isnan()]
            if self.args.masks_rewards:
                self.metrics.record(f"rewards/{name}/failed", failed[name])
            self.metrics.record(f"rewards/{name}/valid", len(valid) / len(row))
            self.metrics.record(f"rewards/{name}/mean", valid.mean().item() if len(valid) else float("nan"))
            self.metrics.record(f"rewards/{name}/std", _spread(valid) if len(valid) else float("nan"))
            if len(valid) == 0 and name not in self._silent_rewards:
                self._silent_rewards.add(name)
                if self.accelerator.is_main_process:
                    warnings.warn(
                        f"Reward `{name}` applied to none of the {len(row)} images of step "
                        f"{self.state.global_step + 1}; it takes no part in it. (This is said once for each reward.)",
                        stacklevel=2,
                    )

    def _weighted_sum(self, rewards: Tensor) -> Tensor:
        """How "weighted sum of the raw rewards, then one advantage" would mix the per-reward gradients."""
        valid = ~rewards.isnan()
        if self.args.scale_rewards == "none":
            stds = torch.ones(len(rewards))
        else:
            stds = torch.tensor([_spread(row[keep]) for row, keep in zip(rewards, valid, strict=True)])
        return weighted_sum_weights(self.reward_weights, stds, valid.sum(dim=1)).to(self.args.device)

    # ---- Per-reward gradients and the update ----

    def _begin_update(self, update: int, left_out: Tensor | None = None) -> None:
        """Start an optimizer step, with samples left out at some timesteps where it is taken again."""
        self.nonfinite.begin(self.state.global_step, self._batch, self._prompts, update, self.num_times, left_out)
        # With dropout a forward pass for training is not one of the old policy, whatever the weights.
        self._on_policy = not self._has_dropout and self.old_policy.equals_live()
        self.step_gradient.begin(self.state.global_step, self._batch, update, self.num_times, self._on_policy)

    def _repeat_update(self, last_slot: int, cycle: int, iteration: int, left_out: Tensor) -> None:
        """Accumulate the gradients of an optimizer step anew, without what was not finite."""
        update = last_slot // self.args.gradient_accumulation_steps
        self.model.zero_grad()
        self._begin_update(update, left_out)
        with self.metrics.paused():
            for slot in range(update * self.args.gradient_accumulation_steps, last_slot + 1):
                self._accumulate(slot, cycle, iteration)

    def _accumulate(self, slot: int, cycle: int, iteration: int) -> Tensor:
        """Add the gradients of one micro-batch, over its timesteps."""
        batch = self._batch
        size = self.args.per_device_train_batch_size
        part = slice(slot * size, (slot + 1) * size)
        x0 = batch.latents[part].float()
        assert self._conditioning is not None
        conditioning = self._conditioning.select(batch.prompt_index[part])
        shares = self.step_gradient.shares(batch.advantages[:, part])
        generators = [
            torch.Generator().manual_seed(derive_seed(self.args.seed, Draw.TRAINING_NOISE, cycle, iteration, i))
            for i in batch.sample_ids[part].tolist()
        ]
        # Which timesteps, [B, T]: without replacement, drawn sample by sample so that the batch split does not matter.
        drawn = torch.stack([torch.randperm(len(self.times), generator=g)[: self.num_times] for g in generators])
        first_place = slot % self.args.gradient_accumulation_steps * self.num_times
        loss = torch.zeros((), device=self.args.device)
        with self.progress("update", self.num_times) as bar:
            for place, columns in enumerate(drawn.T, start=first_place):
                t = self.times[columns].to(x0)
                noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
                t_ = t.view(-1, *[1] * (x0.ndim - 1))
                x_t = (1 - t_) * x0 + t_ * noise
                used = self.nonfinite.without_left_out(place, x_t, x0, t, conditioning, shares)
                if used is not None:
                    loss += self._backward(*used, place)
                bar.update()
        # `Trainer` averages over processes what here is each process's share of a sum.
        return loss * self.args.world_size

    def _backward(
        self, x_t: Tensor, x0: Tensor, t: Tensor, conditioning: Conditioning, shares: LossShares, place: int
    ) -> Tensor:
        """Forward and backward passes for one noisy version of a micro-batch. Returns its share of the loss."""
        old_velocity, base_velocity = self._frozen_velocities(x_t, t, conditioning)
        with self.step_gradient.recording(place, len(x_t)):
            velocity = self.model(x_t, t, conditioning)
            self.metrics.record("drift/velocity_rms", _mean_rms(velocity.detach()))
            if old_velocity is None:
                old_velocity = velocity.detach()
            losses = nft_losses(velocity, old_velocity, x_t, x0, t, self.args.nft_beta)
            divergence = None
            if base_velocity is not None:
                divergence = (velocity.float() - base_velocity.float()).square().flatten(1).mean(dim=1)
            self.nonfinite.note(place, t, losses, divergence)
            return self.step_gradient.backward(losses, divergence, shares)

    @torch.no_grad()
    def _frozen_velocities(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        Velocities of the old policy (`None` if it is the trained one) and of the base model (`None` with `beta=0`).

        They come before the trained policy's: with gradient checkpointing that one runs again during the backward
        pass, and must find the model as it was.
        """
        old = base = None
        self.model.eval()
        if not self._on_policy:
            with self.old_policy.swapped_in():
                old = self.model(x_t, t, conditioning)
        if self.args.beta > 0:
            with adapters_disabled(self.flow.transformer):
                base = self.model(x_t, t, conditioning)
        self.model.train()
        return old, base

    def _after_optimizer_step(self) -> None:
        """Let the averaged weights follow every step, and the old policy every generation batch."""
        step = self.state.global_step
        self.step_gradient.commit()
        self.average.lerp_(min(weight_ema_decay(step), self.args.weight_ema_decay))
        if self._micro_step % self._cycle_length == 0:
            flat, rate, maximum = OLD_POLICY_PRESETS[self.args.old_policy_preset]
            self.old_policy.lerp_(old_policy_decay(step, flat, rate, maximum))
        self._between_steps = True

    # ---- Evaluation and logging ----

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Score the averaged weights on a prompt set, with the same seeds at every call.

        Args:
            eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
                Prompts, or several sets by name; defaults to the trainer's `eval_dataset`.
            ignore_keys:
                Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Put before the metrics' names.

        Returns:
            `dict[str, float]`: For each reward `<prefix>_rewards/<name>/mean`, `/standard_error` and `/valid`
            (fraction of the images that it applies to), held-out ones included; `<prefix>_drift/diversity`, how much
            the images of a prompt differ from each other (with at least two a prompt); and
            `<prefix>_drift/velocity_norm`, the norm of the velocity relative to the base model's. The images and
            rewards themselves are appended to `trainer.evaluations`, which keeps the images of the first and the
            latest evaluation. With several sets each has its metrics under
            `<prefix>_<set>_...`, and those under `<prefix>_...` are of the prompts of all sets together.

        Raises:
            `ValueError`: If there is no dataset to evaluate on.
        """
        dataset = self.eval_dataset if eval_dataset is None else prepare_evaluation_sets(eval_dataset)
        if dataset is None:
            raise ValueError("There is nothing to evaluate on: pass `eval_dataset` here or to the trainer.")
        if not isinstance(dataset, dict):
            return self._record_evaluation(self._evaluate_on(dataset), metric_key_prefix)
        metrics: dict[str, float] = {}
        results: dict[str, PolicyEvaluation] = {}
        for name, prompts in dataset.items():
            results[name] = self._evaluate_on(prompts, name)
            metrics |= self._record_evaluation(results[name], f"{metric_key_prefix}_{name}")
        return metrics | self._record_evaluation(pool_evaluations(results), metric_key_prefix)

    def _evaluate_on(self, dataset: Dataset, name: str | None = None) -> PolicyEvaluation:
        """Evaluate the averaged weights on one prompt set."""
        self._check_rewards(self.scorers, dataset, set_label(name))
        with (
            self.average.swapped_in(),
            rollout_advice("per_device_eval_batch_size", self.args.per_device_eval_batch_size),
        ):
            return evaluate_policy(self, dataset, name)

    def _record_evaluation(self, result: PolicyEvaluation, metric_key_prefix: str) -> dict[str, float]:
        """Keep an evaluation, log it and tell the callbacks. Returns its metrics."""
        evaluation = result.evaluation
        self._keep_evaluation(evaluation)
        metrics = result.metrics(metric_key_prefix, count_failures=self.args.masks_rewards)
        with self.together.phase():
            super().log(dict(metrics))
            if self.args.log_images and result.gallery_rewards and self.is_world_process_zero():
                names = evaluation.reward_names
                log_evaluation(
                    self, metric_key_prefix, names, evaluation.gallery, result.gallery_rewards, result.gallery_extras
                )
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _keep_evaluation(self, evaluation: Evaluation) -> None:
        """Keep all rewards, and the images of the first and the latest evaluation of each prompt set."""
        before = [place for place, each in enumerate(self.evaluations) if each.name == evaluation.name]
        for place in before[1:]:
            self.evaluations[place] = dataclasses.replace(self.evaluations[place], gallery={})
        self.evaluations.append(evaluation)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training step's log also holds what was recorded since the last one, averaged NaN-aware."""
        if "loss" not in logs:
            super().log(logs, start_time)
            if "train_runtime" in logs and self.args.log_images and self.is_world_process_zero():
                log_plots(self)  # training is over, and the trackers are still open
            return
        recorded = self.metrics.flush(self.accelerator)
        with self.together.phase():
            super().log({**logs, **recorded}, start_time)
            # A run that was resumed inside a generation batch has sampled nothing yet.
            if self._latest_rollout is not None and self.is_world_process_zero():
                step, latest = self.state.global_step, self._latest_images_step
                if latest is None or step - latest >= self.args.log_images_steps:
                    self._latest_images_step = step
                    log_rollout(self, self.scorer.names, self._latest_rollout)

    def progress(self, what: str, total: int) -> ProgressBar:
        """
        A bar for one part of a step, as a context manager: in the live table where there is one, else of tqdm.

        Args:
            what (`str`):
                What is being done.
            total (`int`):
                How much there is to do; tell what was done by `update(number)`.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LiveTableCallback) and callback.shows_bars:
                return callback.bar(what, total)
        return tqdm(
            total=total,
            desc=what,
            leave=False,
            dynamic_ncols=True,
            disable=self.args.disable_tqdm or not self.is_local_process_zero(),
        )

    # ---- Saving, resuming, publishing ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter with the averaged weights; nothing else is needed to use it, and nothing is pickled."""
        refuse_nonfinite("averaged weights", self.average.state_dict())
        if self.args.should_save:
            with self.average.swapped_in():
                save_adapter(self.pipeline, output_dir or self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapter, with the averaged weights, and its model card.

        A `README.md` that this package did not write, or that was changed since, is left as it is, with a warning.

        Args:
            output_dir (`str`, *optional*):
                The folder. Defaults to `args.output_dir`.
            _internal_call (`bool`, *optional*, defaults to `False`):
                Whether the trainer itself saves, as for a checkpoint, which gets no card.
        """
        super().save_model(output_dir, _internal_call=True)
        if _internal_call:
            return
        if self.args.should_save:
            write_card_beside_adapter(self, Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        refuse_nonfinite_run(self)  # before anything is written
        super()._save_checkpoint(model, trial)
        with self.together.phase():
            if self.args.log_images and self.args.should_save:
                log_plots(self)

    def _write_run_state(self, folder: Path) -> None:
        if self.args.should_save:
            tensors: dict[str, Mapping[str, Tensor]] = {
                "current": self.trainable,
                "old": self.old_policy.state_dict(),
                "average": self.average.state_dict(),
                "balance": self.schedule.state_dict(),
            }
            save_state(folder, tensors, self._identity())
        # By the step: a failure may have come some micro-batches after it.
        if self.state.global_step * self.args.gradient_accumulation_steps % self._cycle_length != 0:
            self._batch.save(folder / self._batch_file())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        groups = load_state(folder, self._identity())
        if not (folder / OPTIMIZER_FILE).is_file():
            raise FileNotFoundError(
                f"`{folder}` has no `{OPTIMIZER_FILE}`: nothing can be resumed from a checkpoint that was saved with "
                "`save_only_model=True`. Load its adapter with `load_lora_weights` instead."
            )
        self._take_over(groups)
        step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        self._micro_step = step * self.args.gradient_accumulation_steps
        if self._micro_step % self._cycle_length != 0:
            self._batch = GenerationBatch.load(folder / self._batch_file(), self.args.device)
            self._conditioning = None

    def _load_best_model(self) -> None:
        """With `load_best_model_at_end`: everything that was trained is as it was at the best evaluation."""
        folder = Path(str(self.state.best_model_checkpoint))
        logger.warning(f"Loading the best checkpoint, `{folder}` ({self.state.best_metric}).")
        self._take_over(load_state(folder, self._identity()))

    def _take_over(self, groups: dict[str, dict[str, Tensor]]) -> None:
        copy_into(self.trainable, groups["current"])
        self.old_policy.load_state_dict(groups["old"])
        self.average.load_state_dict(groups["average"])
        self.schedule.load_state_dict(groups["balance"])

    def _identity(self) -> dict[str, Any]:
        """What a run must share with a checkpoint that it resumes from."""
        config = self.flow.transformer.peft_config["default"]
        lora = {"r": config.r, "lora_alpha": config.lora_alpha}
        # What else says how strong the adapter is; ranks and DoRA are seen in the weights.
        lora |= {name: value for name in ("use_rslora", "alpha_pattern") if (value := getattr(config, name))}
        return {
            "pipeline": type(self.pipeline).__name__,
            "base_model": self._fingerprint,
            "rewards": self.scorer.names,
            "source_weights": self.source_weights,
            "lora": lora,
            "world_size": self.args.world_size,
            "generation_batch": [
                self.args.per_device_train_batch_size,
                self.args.gradient_accumulation_steps,
                self.args.steps_per_generation,
                self.args.num_iterations,
            ],
        }

    def _batch_file(self) -> str:
        return f"generation_batch_{self.args.process_index}.safetensors"

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, **kwargs: Any
    ) -> None:
        """
        Write the model card, with its pictures, to the output folder. It is rendered anew from this run.

        Args:
            model_name (`str`, *optional*):
                Title of the card. Defaults to the name of the output folder.
            kwargs:
                Accepted for compatibility with [`~transformers.Trainer.push_to_hub`]; not used.
        """
        if self.is_world_process_zero():
            write_card(self, model_name)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Push the adapter and its card, rendered anew from this run, with the card's pictures.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to return only when everything is pushed.
            token (`str`, *optional*):
                An access token with the right to write. Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                The branch to push to. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether a repository that is created here is private. Defaults to `args.hub_private_repo`.
            model_name (`str`, *optional*):
                Title of the card. Defaults to the repository's name.
            kwargs:
                Accepted for compatibility with [`~transformers.Trainer.push_to_hub`]; not used.

        Returns:
            The commit, or its future where `blocking` is `False`; `None` in all processes but the first.
        """
        return push_output(self, commit_message, blocking, token, revision, private, model_name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            push_checkpoint(self, Path(checkpoint_folder))


class _FollowPolicy(TrainerCallback):
    """Calls the trainer after each optimizer step, before anything is logged, evaluated or saved."""

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # Not every dataloader wrapper of `accelerate` forwards the epoch to the sampler.
        self.trainer._prompt_sampler.set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # Not by an event: callbacks that fail at the last one before the update leave a whole step behind.
        self.trainer.bare_optimizer.register_step_pre_hook(self._begin_update)
        self.trainer._between_steps = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.trainer._after_optimizer_step()

    def _begin_update(self, optimizer, args, kwargs) -> None:
        self.trainer._between_steps = False


def _spread(values: Tensor) -> float:
    """Standard deviation, 0 where there is no value."""
    return values.std(correction=0).item() if len(values) else 0.0


def _mean_rms(values: Tensor) -> Tensor:
    """Root mean square of each finite sample, averaged over samples: the same however they are cut into batches."""
    return finite_mean(values.float().square().flatten(1).mean(dim=1).sqrt())
