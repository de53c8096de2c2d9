# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trainer, in the order of the data: prompts, rollout, rewards, advantages, gradients, update, adapter."""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..balance import BalanceSchedule, old_policy_decay, weight_ema_decay
from ..callbacks import LiveTableCallback, MarbleCallback, RolloutPicture, RunPictures
from ..checkpoint.division import BatchDivision
from ..checkpoint.folder import check_writable
from ..data import RepeatPromptSampler, prepare_prompts, source_weights
from ..evaluation.base_evaluations import BaseEvaluations
from ..evaluation.prompt_sets import check_best_metric, prepare_evaluation_sets
from ..hub import save_adapter
from ..hub.slider import split_adapter
from ..memory_advice import update_advice
from ..metrics import MetricBuffer
from ..nonfinite import refuse_nonfinite
from ..pipelines import Policy, PolicyWeights, load_pipeline, with_rgb_images
from ..processes import FailingTogether
from ..rewards import RewardFunc
from ..rollout import RolloutBatch, StoredBatch
from ..step_times import StepTimes
from . import construction
from .balance_slider import check_balance_slider
from .checkpointed_trainer import OPTIMIZER_FILE
from .follow_policy import FollowPolicy
from .marble_config import MarbleConfig
from .observed_trainer import ObservedTrainer
from .run_state import RunState, describe_run, refuse_nonfinite_optimizer
from .teachers import read_teachers
from .unsupported_methods import WithoutPredictions


class MarbleNFTTrainer(WithoutPredictions, ObservedTrainer):
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
        reward_funcs (`str`, `RewardFunc` or a list of them, *optional*):
            The rewards, see [`~trl_marble.rewards.RewardFunc`]; `None` to learn from `teachers` alone. Called with
            keywords `images` (`videos` for a pipeline of videos), `prompts`, the other columns of the dataset,
            `trainer_state`, and where they accept them `log_metric` and `log_extra`; they return one score per image,
            or `None` where they do not apply. A string is a known name (`"pickscore"`) or a dotted path
            (`"my_rewards.brightness"`), see [`~trl_marble.rewards.load_reward`].
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
        weighting (`Callable[[Tensor], Tensor]`, *optional*):
            In the place of `args.weighting`: any callable from the Gram matrix `[K, K]` of the per-reward gradients to
            coefficients `[K]`, such as a `torchjd` weighting.
        teachers (`Mapping[str, str]`, *optional*):
            LoRA adapters of the same base model whose velocities the policy is to have: source of prompts (the column
            `source` of `train_dataset`) -> Hub id, folder or file. `"all:<name>"` teaches on all prompts, and so does
            `"all"`. Beside rewards, or alone.

    Raises:
        `ValueError`: For a pipeline that is not flow matching, a prompt set without prompts or without the images that
            the pipeline edits, the wrong number of reward weights, a held-out reward that is trained on, rewards that
            cannot be called with the columns of the prompt set, rewards of images for a pipeline of videos (see
            [`~trl_marble.rewards.FrameReward`]) or the other way round, a teacher of no source of the prompts or of
            another model, or settings that do not fit together or that the pipeline cannot be sampled with.
        `OSError`: If the output folder cannot be written.
    """

    args: MarbleConfig
    model: Policy
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None

    def __init__(
        self,
        pipeline: str | os.PathLike | DiffusionPipeline,
        reward_funcs: str | RewardFunc | list[str | RewardFunc] | None = None,
        args: MarbleConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        weighting: Callable[[Tensor], Tensor] | None = None,
        eval_reward_funcs: str | RewardFunc | list[str | RewardFunc] | None = None,
        teachers: Mapping[str, str | os.PathLike] | None = None,
    ) -> None:
        args = construction.default_config(pipeline) if args is None else args
        if not isinstance(args, MarbleConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; pass a `MarbleConfig`.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing; pass a `datasets.Dataset` with a `prompt` column.")
        construction.check_weighting(weighting, args)
        self.weighting = weighting
        train_dataset = prepare_prompts(train_dataset, "train_dataset")
        eval_dataset = None if eval_dataset is None else prepare_evaluation_sets(eval_dataset)
        self.source_weights = source_weights(train_dataset)
        check_writable(Path(args.output_dir))

        # Rewards, then the base model, the adapter that is trained, and the other sets of weights for it.
        self.scorers = construction.build_scorers(reward_funcs, eval_reward_funcs, args)
        self.scorer = self.scorers[0]
        self.teachers = read_teachers(teachers, train_dataset, self.scorer.names, args)
        names = [name for scorer in self.scorers for name in scorer.fixed_names]
        check_best_metric(args.metric_for_best_model, names, eval_dataset, args.eval_on_start)
        set_seed(args.seed)  # the adapter is initialized here, before `Trainer` sets the seed
        self.pipeline = load_pipeline(pipeline)
        self.flow = construction.build_flow(self.pipeline, args)
        self.edits = construction.check_prompts(self.flow, self.scorers, train_dataset, eval_dataset)
        check_balance_slider(self.flow, self.edits, self.scorer.names, self.teachers, args)
        num_parts = len(self.scorer) if args.balance_slider else None
        trainable, frozen = construction.add_adapters(self.flow, peft_config, self.teachers, num_parts)
        construction.cache_embeddings(self.flow, train_dataset, eval_dataset, args)
        construction.place_pipeline(self.flow, trainable, args)
        super().__init__(
            model=Policy(self.flow),
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=with_rgb_images(train_dataset) if self.edits else train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[FollowPolicy(self), *(callbacks or [])],  # first: the others see the policies as they are now
            optimizers=optimizers,
        )
        if sys.stdout.isatty() and not args.disable_tqdm and not self._callbacks_of(LiveTableCallback):
            self.add_callback(LiveTableCallback())
        # Of `Policy.forward` only, and with a cache: the pipeline has a precision of its own for all of its calls.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        # The loss of a micro-batch is already its share of the optimizer step's.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = False, True

        self.together, self.metrics = FailingTogether(), MetricBuffer()
        self.weights = PolicyWeights(self.model, trainable, samples_apart=args.sampling_policy_preset is not None)
        num_rows = len(self.scorer) + len(self.teachers)
        self.schedule = BalanceSchedule(num_rows, args.balance_every, args.balance_ema)
        self.policy_loss = construction.build_policy_loss(args, has_rewards=len(self.scorer) > 0)
        self.base_evaluations = BaseEvaluations()
        images_per_step = args.generation_batch_size * args.gradient_accumulation_steps // args.steps_per_generation
        self.times = StepTimes(args.device, self.scorer.names, images_per_step, learns=bool(self.scorer.learners))
        self.sampler = construction.build_sampler(self.flow, self.together, self.progress, self.times, args)
        shared = self.accelerator, self.metrics
        self.rollouts = construction.build_source(
            self.sampler, self.scorer, self.train_dataset, self.edits, *shared, args, self.teachers
        )
        self.layout = self.rollouts.layout
        self.update = construction.build_update(
            self.weights,
            self.policy_loss,
            self.schedule,
            weighting,
            self.scorer.names,
            self.layout,
            self.edits,
            *shared,
            self.progress,
            self.times,
            args,
            self.teachers,
        )
        identity = frozen | describe_run(self.flow, self.scorer, self.source_weights, args.balance_slider)
        division = BatchDivision(args.world_size, self.layout)
        parts = self.schedule, self.rollouts, self.update.kl_control, self.base_evaluations
        self.run_state = RunState(self.weights, *parts, identity, division)
        self.evaluator = construction.build_evaluator(
            self.flow, self.scorers, self.accelerator, self.together, self.progress, args
        )
        self.pictures = RunPictures(args.output_dir, self.callback_handler.callbacks)
        self.evaluations = []
        self._batch: RolloutBatch  # from the first micro-batch on
        self._stored_batch: StoredBatch | None = None  # of a checkpoint, until its embeddings are made anew
        self._micro_step = 0

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
        self._prompt_sampler = construction.build_prompt_sampler(self.train_dataset, self.source_weights, self.args)
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

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """
        Train, see [`~transformers.Trainer.train`].

        If training stops by an exception, what was trained so far is saved as a checkpoint first, and training can be
        resumed from there. So it is if the process receives SIGTERM: then the run stops and the process exits.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                The folder of a checkpoint to go on from; `True` or `"latest"` for the latest valid one in
                `args.output_dir`, where a warning names checkpoints that were damaged since they were written, or not
                written to their end; `"auto"` for the same if there is one, else to begin anew; `False` to begin anew.
                Defaults to `args.resume_from_checkpoint`. Settings that are not those of the checkpoint are used, and
                a warning names them. The number of processes may be another one, with the same images per step.
            kwargs:
                See [`~transformers.Trainer.train`].

        Raises:
            `FileNotFoundError`: If there is no checkpoint to resume from.
            `FileExistsError`: If the run would write its checkpoints among those of another one, see
                `MarbleConfig.overwrite_output_dir`.
            `ValueError`: If the files of the checkpoint are not those that were written (the message names the latest
                valid one), or if it belongs to another run.
            `OSError`: If a checkpoint cannot be written, as on a full disk. Those before it are as they were.
            `SystemExit`: With status 143, after SIGTERM.
        """
        self._micro_step, self._stored_batch = 0, None
        self.forget_recorded()
        own_callbacks = self._callbacks_of(MarbleCallback)
        for callback in own_callbacks:
            for replaced in callback.replaces:
                self.remove_callback(replaced)
            callback.open(self.scorer.names, self.held_out_names)
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
        position = self.layout.locate(self._micro_step)
        is_last = self.accelerator.sync_gradients
        if position.micro_batch_of_update == 0:
            self.times.begin("step")
        if position.starts_generation:
            self._batch = self._sample(inputs, position.generation)
        elif self._stored_batch is not None:
            self._batch, self._stored_batch = self.rollouts.restore(self._stored_batch, inputs), None
        advice = functools.partial(update_advice, self.layout.micro_batch_size, self.layout.micro_batches_per_update)
        phase = functools.partial(self.together.phase, self.args.base_is_sharded)
        if position.micro_batch_of_update == 0:
            with phase(ask=self.update.compares_groups), advice():
                self.update.begin(self.state.global_step, self._batch, position)
            self.update.join_groups()
        with phase(ask=is_last), advice():
            loss = self.update.accumulate(self._batch, position)
        if is_last:
            with self.together.phase(), advice():
                self.update.finish()
            self.times.begin("optimizer")
        self._micro_step += 1
        # `Trainer` averages over processes what here is a share of a sum, and keeps a sum in which a NaN would stay.
        return loss.nan_to_num(0.0, 0.0, 0.0) * self.args.world_size

    def _sample(self, row_numbers: list[int], generation: int) -> RolloutBatch:
        """Sample the rows' prompts, score the images and compare them with their group."""
        sampler = self.weights.sampler or (self.weights.old if self.policy_loss.samples_with_old else None)
        weights = nullcontext() if sampler is None else sampler.swapped_in()
        with self.times.measure("rollout"), self.weights.sampling(weights):
            batch, record = self.rollouts.sample(row_numbers, generation, self.state)
        if self.args.log_images:
            self.latest_rollout = RolloutPicture.of(record, self.args.num_images_to_log)
        return batch

    def _after_optimizer_step(self) -> None:
        """Let the averaged weights follow every step, and the policies that sample every generation batch."""
        step = self.state.global_step
        self.update.commit()
        self.rollouts.commit()
        self.weights.averaged.lerp_(weight_ema_decay(step, self.args.weight_ema_decay))
        if self.layout.locate(self._micro_step).starts_generation:
            schedules = (self.args.old_policy_schedule, self.args.sampling_policy_schedule)
            for shadow, schedule in zip((self.weights.old, self.weights.sampler), schedules, strict=True):
                if shadow is not None and schedule is not None:
                    shadow.lerp_(old_policy_decay(step, *schedule))
        self.times.end("optimizer")
        self.times.end("step")
        self._between_steps = True

    # ---- Saving and resuming ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter with the averaged weights; nothing else is needed to use it, and nothing is pickled."""
        refuse_nonfinite("averaged weights", self.weights.averaged.state_dict())
        if self.args.should_save:
            with self.weights.averaged.swapped_in():
                file = save_adapter(self.pipeline, output_dir or self.args.output_dir)
            if self.args.balance_slider:
                split_adapter(file, self.scorer.names)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.run_state.refuse_nonfinite()  # before anything is written
        refuse_nonfinite_optimizer(self.bare_optimizer)
        super()._save_checkpoint(model, trial)
        with self.together.phase():
            self._log_plots()

    def _write_run_state(self, folder: Path) -> None:
        if self.args.should_save:
            self.run_state.save(folder)
        # By the step: a failure may have come some micro-batches after it.
        if not self.layout.starts_generation_after(self.state.global_step):
            self._batch.save(folder, self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / OPTIMIZER_FILE).is_file():
            raise FileNotFoundError(
                f"`{folder}` has no `{OPTIMIZER_FILE}`: nothing can be resumed from a checkpoint that was saved with "
                "`save_only_model=True`. Load its adapter with `load_lora_weights` instead."
            )
        self.run_state.load(folder)
        step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        self._micro_step = step * self.layout.micro_batches_per_update
        if not self.layout.starts_generation_after(step):
            own = self.layout.own_samples(self.args.process_index)
            self._stored_batch = StoredBatch.load(folder, own, self.layout.updates_per_pass, self.args.device)

    def _load_run_state(self, folder: Path) -> None:
        self.run_state.load(folder)
