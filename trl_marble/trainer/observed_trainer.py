# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a trainer shows of itself: evaluations, logs, pictures and progress bars."""

import dataclasses
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from ..callbacks import LiveTableCallback, RolloutPicture, RunPictures
from ..evaluation import Evaluation
from ..evaluation.base_evaluations import BaseEvaluations
from ..evaluation.evaluator import EvaluationPlan
from ..evaluation.policy_evaluation import PolicyEvaluation, PolicyEvaluator
from ..evaluation.prompt_sets import is_gain, pool_evaluations, prepare_evaluation_sets
from ..memory_advice import rollout_advice
from ..metrics import MetricBuffer
from ..pipelines import PolicyWeights
from ..progress import ProgressBar, tqdm_bar
from ..rollout import RolloutSampler
from ..step_times import StepTimes
from .construction import check_evaluation_prompts
from .published_trainer import PublishedTrainer


class ObservedTrainer(PublishedTrainer):
    """A [`PublishedTrainer`] that evaluates the averaged weights, and logs numbers and pictures."""

    eval_dataset: Dataset | dict[str, Dataset] | None
    weights: PolicyWeights
    sampler: RolloutSampler
    evaluator: PolicyEvaluator
    evaluations: list[Evaluation]
    metrics: MetricBuffer
    times: StepTimes
    pictures: RunPictures
    latest_rollout: RolloutPicture | None = None
    base_evaluations: BaseEvaluations
    _latest_images_step: int | None = None
    control: Any  # what `transformers` declares leaves out that callbacks return it

    @property
    def held_out_names(self) -> list[str]:
        """Names of the rewards that are scored in evaluations and never trained on."""
        return [name for scorer in self.scorers[1:] for name in scorer.names]

    def _callbacks_of(self, kind: type[TrainerCallback]) -> list[Any]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)]

    # ---- Evaluation ----

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
            the images of a prompt differ from each other (with at least two a prompt);
            `<prefix>_drift/velocity_norm`, the norm of the velocity relative to the base model's; `<prefix>_kl`, the
            mean square distance of the two velocities; and, if these prompts were evaluated before the first step,
            the gains since, see [`~trl_marble.evaluation.GainPoint`]: `<prefix>_gain/<name>/mean` of each reward, and
            of those that are trained on together `<prefix>_gain_worst`, `<prefix>_gain_mean`, `<prefix>_joint_gain`
            and `<prefix>_joint_fall`, with their standard errors. The images and rewards themselves are appended to
            `trainer.evaluations`, which keeps the images of the first, the latest and the best evaluation. With
            several sets each has its metrics under `<prefix>_<set>_...`, and those under `<prefix>_...` are of the
            prompts of all sets together.

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

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate in training, where the gain that the best checkpoint is chosen by must be known."""
        metrics = super()._evaluate(*args, **kwargs)
        best = self.args.metric_for_best_model
        if best and is_gain(best, self.eval_dataset) and f"eval_{best.removeprefix('eval_')}" not in metrics:
            raise ValueError(
                f"`metric_for_best_model` is {best!r}, and the run that is resumed did not evaluate these prompts, "
                "seeds and rewards, with these settings of sampling, before its first step. Resume with the "
                "`eval_dataset`, `num_generations_eval`, `eval_reward_funcs`, `seed`, `guidance_scale`, "
                "`eval_num_inference_steps`, `eval_height` and `eval_width` (or those of rollouts) that it began "
                "with, or choose the mean of a reward."
            )
        return metrics

    def _evaluate_on(self, dataset: Dataset, name: str | None = None) -> PolicyEvaluation:
        """Evaluate the averaged weights on one prompt set."""
        args, batch_size = self.args, self.args.per_device_eval_batch_size
        edits = check_evaluation_prompts(self.flow, self.scorers, dataset, name)
        plan = EvaluationPlan(dataset, edits, args.num_generations_eval, args.seed, batch_size)
        with (
            self.weights.sampling(self.weights.averaged.swapped_in()),
            rollout_advice("per_device_eval_batch_size", batch_size),
        ):
            return self.evaluator.evaluate(plan, self.state, name)

    def _record_evaluation(self, result: PolicyEvaluation, metric_key_prefix: str) -> dict[str, float]:
        """Keep an evaluation, log it and hand it to the callbacks. Returns its metrics."""
        # All rewards are kept, and the images of the first, the latest and the best evaluation of each prompt set.
        before = [place for place, each in enumerate(self.evaluations) if each.name == result.evaluation.name]
        for place in before[1:]:
            if self.evaluations[place].step == self.state.best_global_step:
                continue
            self.evaluations[place] = dataclasses.replace(self.evaluations[place], gallery={})
        self.evaluations.append(result.evaluation)
        base = self.base_evaluations.find(result.evaluation)
        metrics = result.metrics(metric_key_prefix, self.sampler.failures.leaves_out, base)
        with self.together.phase():
            super().log(dict(metrics))
            if self.args.log_images and result.gallery_rewards and self.is_world_process_zero():
                self.pictures.log_evaluation(self.state.global_step, metric_key_prefix, result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Logging ----

    def forget_recorded(self) -> None:
        """Begin a run with nothing recorded and no picture logged."""
        self.metrics.clear()
        self.times.clear()
        self._latest_images_step = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training step's log also holds what was recorded since the last one, averaged NaN-aware."""
        if "loss" not in logs:
            super().log(logs, start_time)
            if "train_runtime" in logs:
                self._log_plots()  # training is over, and the trackers are still open
            return
        for name, value in self.times.flush().items():  # the loss has been read, and so the device waited for
            self.metrics.record(name, value)
        recorded = self.metrics.flush(self.accelerator)
        with self.together.phase():
            super().log({**logs, **recorded}, start_time)
            # A run that was resumed inside a generation batch has sampled nothing yet.
            if self.latest_rollout is not None and self.is_world_process_zero():
                step, latest = self.state.global_step, self._latest_images_step
                if latest is None or step - latest >= self.args.log_images_steps:
                    self._latest_images_step = step
                    self.pictures.log_rollout(step, self.scorers[0].names, self.latest_rollout)

    def _log_plots(self) -> None:
        if self.args.log_images and self.args.should_save:
            self.pictures.log_plots(self.state.global_step, self.state.log_history)

    def progress(self, what: str, total: int) -> ProgressBar:
        """
        A bar for one part of a step, as a context manager: in the live table where there is one, else of tqdm.

        Args:
            what (`str`):
                What is being done.
            total (`int`):
                How much there is to do; say what was done by `update(number)`.
        """
        for callback in self._callbacks_of(LiveTableCallback):
            if callback.shows_bars:
                return callback.bar(what, total)
        return tqdm_bar(what, total, disable=self.args.disable_tqdm or not self.is_local_process_zero())
