# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Evaluating a policy in training: rewards on the same prompts and seeds every time, diversity, and drift."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..media import Sample
from ..nonfinite import CAUSES
from ..rewards import RewardScorer, Scores
from ..rewards.call_log import LogKey, column_names
from ..rollout import RolloutSampler, Samples, average_logged, count_failures
from ..rollout.diversity import group_diversity, thumbnails
from .drift import DriftMeter
from .evaluation import Evaluation
from .evaluator import EvaluationPlan, digest_evaluation, evaluate_batches
from .gains import GainPoint
from .statistics import clustered_mean, number_prompts


@dataclass(frozen=True)
class PolicyEvaluation:
    """
    An evaluation and what else was measured on the way. The same on all processes.

    Args:
        evaluation ([`~trl_marble.evaluation.Evaluation`]):
            Rewards, those that are trained on first, and the images of some prompts.
        gallery_rewards (`dict[str, Tensor]`):
            Prompt of the gallery -> rewards of its images, of shape `[K, number of images]`.
        gallery_extras (`dict[str, dict[str, list]]`):
            Prompt of the gallery -> what rewards logged with `log_extra`: column -> one value for each of its images.
        logged (`dict[str, float]`):
            Means of what rewards logged with `log_metric`.
        failed (`dict[str, int]`):
            How many images each reward failed for; empty where a failure raises.
        nonfinite_latents (`int` or `None`):
            How many images have latents that are not finite; `None` where that raises.
        diversity (`float`):
            Mean over prompts of [`~trl_marble.evaluation.group_diversity`], in [0, 1]; NaN with one image a
            prompt.
        velocity_norm (`float`):
            Norm of the policy's velocity relative to the base model's, over all images.
    """

    evaluation: Evaluation
    gallery_rewards: dict[str, Tensor]
    gallery_extras: dict[str, dict[str, list[Any]]]
    logged: dict[str, float]
    failed: dict[str, int]
    nonfinite_latents: int | None
    diversity: float
    velocity_norm: float

    def metrics(self, prefix: str, shows_failures: bool, base: Evaluation | None = None) -> dict[str, float]:
        """
        What is logged of it, by `<prefix>_...` names; without a diversity where none was measured.

        Args:
            prefix (`str`):
                Put before the names.
            shows_failures (`bool`):
                Whether failed rewards are counted.
            base ([`~trl_marble.evaluation.Evaluation`], *optional*):
                The evaluation of the same prompts and seeds before training, for the gains since.
        """
        kl, kl_error = self.evaluation.kl_to_base()
        metrics = {f"{prefix}_kl": kl, f"{prefix}_kl_standard_error": kl_error}
        if base is not None:
            metrics |= _log_gains(self.evaluation.gains_since(base), prefix)
        metrics[f"{prefix}_drift/velocity_norm"] = self.velocity_norm
        if not math.isnan(self.diversity):
            metrics[f"{prefix}_drift/diversity"] = self.diversity
        if self.nonfinite_latents is not None:
            metrics[f"{prefix}_nonfinite/latents"] = self.nonfinite_latents
        metrics |= {f"{prefix}_{name}": value for name, value in self.logged.items()}
        valid = (~self.evaluation.rewards.isnan()).double().mean(dim=1).tolist()
        for share, (name, (mean, error)) in zip(valid, self.evaluation.summary().items(), strict=True):
            key = f"{prefix}_rewards/{name}"
            metrics |= {f"{key}/mean": mean, f"{key}/standard_error": error, f"{key}/valid": share}
            if shows_failures:
                metrics[f"{key}/failed"] = self.failed[name]
        return metrics


def _log_gains(point: GainPoint, prefix: str) -> dict[str, float]:
    """Gains by the names that [`~trl_marble.evaluation.run_gains`] reads."""
    pairs = {
        f"{prefix}_gain_worst": point.worst,
        f"{prefix}_gain_mean": point.mean,
        f"{prefix}_joint_gain": point.joint_gain,
        f"{prefix}_joint_fall": point.joint_fall,
    }
    logged: dict[str, float] = {}
    for name, pair in pairs.items():
        logged[name], logged[f"{name}_standard_error"] = pair
    for name, pair in point.gains.items():
        logged[f"{prefix}_gain/{name}/mean"], logged[f"{prefix}_gain/{name}/standard_error"] = pair
    return logged


class _ScoredImage(NamedTuple):
    """An image as processes send it to each other: without its pixels, unless it is shown in the gallery."""

    number: int
    rewards: list[float]
    thumbnail: np.ndarray
    drift: list[float]  # see `DriftMeter.measure`
    shown: Sample | None
    extras: dict[LogKey, Any]  # of an image that is shown


class PolicyEvaluator:
    """
    Evaluates the weights that are in place.

    Args:
        sampler ([`~trl_marble.rollout.RolloutSampler`]):
            Samples and scores.
        scorers (`Sequence[RewardScorer]`):
            The rewards that are trained on, then the held-out ones. Evaluations leave out the scores of rewards that
            learn: those at two steps are not of one reward, and cannot be compared.
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over processes.
        num_shown (`int`):
            Prompts of the gallery.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        scorers: Sequence[RewardScorer],
        accelerator: Accelerator,
        num_shown: int,
    ) -> None:
        self.sampler, self.scorers = sampler, scorers
        self.accelerator, self.num_shown = accelerator, num_shown
        self.drift = DriftMeter(sampler.flow, sampler.num_inference_steps)
        self.names = [name for scorer in scorers for name in scorer.names]
        fixed = {name for scorer in scorers for name in scorer.fixed_names}
        self.kept = [row for row, name in enumerate(self.names) if name in fixed]

    def evaluate(self, plan: EvaluationPlan, trainer_state: Any, name: str | None = None) -> PolicyEvaluation:
        """
        Sample and score a prompt set. All processes call it.

        Args:
            plan ([`EvaluationPlan`]):
                What there is to sample.
            trainer_state ([`~transformers.TrainerState`]):
                The state of the run, passed on to the rewards.
            name (`str`, *optional*):
                The name of the prompt set, where there are several.
        """
        together, failures = self.sampler.together, self.sampler.failures
        # Images of the gallery: those of prompts spread over the dataset.
        rows = len(plan.prompts)
        shown_rows = {(k * rows) // self.num_shown for k in range(self.num_shown)}
        own: list[_ScoredImage] = []
        own_scores: list[Scores] = []
        compared: list[tuple[Sample, Tensor]] = []  # for rewards that compare images, where there are any
        has_sets = any(scorer.of_sets.any() for scorer in self.scorers)
        num_nonfinite = 0

        def keep(number: int, samples: Samples) -> None:
            nonlocal num_nonfinite
            own.extend(_describe(samples, plan, number, shown_rows))
            own_scores.append(samples.scores._replace(extras={}))
            num_nonfinite += int((~samples.finite).sum())
            if has_sets:
                compared.extend(zip(samples.images, samples.finite, strict=True))

        share = range(self.accelerator.process_index, len(plan.batches), self.accelerator.num_processes)
        evaluate_batches(plan, self.sampler, self.scorers, share, trainer_state, keep, self.drift)
        scores = Scores.concatenate(own_scores) if own_scores else _no_scores(len(self.names))
        if has_sets:
            scores = Scores.join([scores, self._score_sets(plan, own, compared, trainer_state)])
            for place, image in enumerate(own):
                extras = image.extras | _extras_of(scores, place, image.shown is not None)
                own[place] = image._replace(rewards=scores.rewards[:, place].tolist(), extras=extras)
        with together.phase():
            failed = count_failures(scores, self.names, self.accelerator) if failures.leaves_out else {}
            logged = average_logged(scores.metrics)

        images = sorted(gather_object(own), key=lambda image: image.number)
        latents = sum(gather_object([num_nonfinite]))
        with together.phase():
            if latents == plan.num_images:
                raise FloatingPointError(
                    f"The latents of all {latents} images of the evaluation are not finite. {CAUSES}"
                )
        prompt_rows = [plan.place(image.number)[0] for image in images]
        groups = torch.from_numpy(number_prompts([plan.texts[row] for row in prompt_rows], prompt_rows, plan.edits))
        features = torch.stack([torch.from_numpy(image.thumbnail) for image in images])
        drift = torch.tensor([image.drift for image in images])
        policy, base = drift[:, 1:].double().nanmean(dim=0)
        per_prompt = group_diversity(features, groups).numpy()
        images = [image._replace(rewards=[image.rewards[row] for row in self.kept]) for image in images]
        names = [self.names[row] for row in self.kept]
        gallery, gallery_rewards, gallery_extras = _make_gallery(images, plan)
        return PolicyEvaluation(
            evaluation=Evaluation(
                trainer_state.global_step,
                names,
                torch.tensor([image.rewards for image in images]).T,
                groups,
                gallery,
                name,
                drift[:, 0],
                digest_evaluation(plan, self.sampler, names),
                [name for scorer in self.scorers[1:] for name in scorer.names],
            ),
            gallery_rewards=gallery_rewards,
            gallery_extras=gallery_extras,
            logged=logged,
            failed=failed,
            nonfinite_latents=None if failures.raises_nonfinite else latents,
            diversity=clustered_mean(per_prompt, np.arange(len(per_prompt)))[0],
            velocity_norm=(policy / base).sqrt().item(),
        )

    def _score_sets(
        self,
        plan: EvaluationPlan,
        own: Sequence[_ScoredImage],
        compared: Sequence[tuple[Sample, Tensor]],
        trainer_state: Any,
    ) -> Scores:
        """The scores of this process's images by rewards that compare images, with a row for each reward."""
        with self.sampler.together.phase():
            finite = torch.tensor([bool(is_finite) for _, is_finite in compared], dtype=torch.bool)
            images = plan.set_images([image.number for image in own], [image for image, _ in compared], finite)
        parts = [self.sampler.score_sets(scorer, images, trainer_state) for scorer in self.scorers]
        return Scores.stack(parts)


def _extras_of(scores: Scores, place: int, is_shown: bool) -> dict[LogKey, Any]:
    """What rewards logged of an image that is shown."""
    return {key: values[place] for key, values in scores.extras.items()} if is_shown else {}


def _describe(samples: Samples, plan: EvaluationPlan, number: int, shown_rows: set[int]) -> list[_ScoredImage]:
    """The images of a batch, to be sent to other processes."""
    features = thumbnails(samples.images).masked_fill(~samples.finite[:, None], torch.nan).numpy()
    assert samples.measured is not None
    described = []
    for place, index in enumerate(plan.batches[number]):
        is_shown = plan.place(index)[0] in shown_rows
        extras = _extras_of(samples.scores, place, is_shown)
        image = samples.images[place] if is_shown else None
        rewards = samples.scores.rewards[:, place].tolist()
        drift = samples.measured[place].tolist()
        described.append(_ScoredImage(index, rewards, features[place], drift, image, extras))
    return described


def _make_gallery(
    images: Sequence[_ScoredImage], plan: EvaluationPlan
) -> tuple[dict[str, list[Sample]], dict[str, Tensor], dict[str, dict[str, list[Any]]]]:
    """By prompt: the images that are shown, their rewards `[K, images]`, and what else was logged of them."""
    gallery: dict[str, list[Sample]] = {}
    rewards: dict[str, list[Tensor]] = {}
    extras: dict[str, dict[str, list[Any]]] = {}
    keys = list(dict.fromkeys(key for image in images for key in image.extras))  # not every process may have them all
    for image in images:
        if image.shown is not None:
            prompt = plan.texts[plan.place(image.number)[0]]
            gallery.setdefault(prompt, []).append(image.shown)
            rewards.setdefault(prompt, []).append(torch.tensor(image.rewards))
            columns = extras.setdefault(prompt, {column: [] for column in column_names(keys)})
            for key, values in zip(keys, columns.values(), strict=True):
                values.append(image.extras.get(key))
    return gallery, {prompt: torch.stack(values, dim=1) for prompt, values in rewards.items()}, extras


def _no_scores(num_rewards: int) -> Scores:
    """Those of a process that has no batch."""
    nothing = torch.empty(num_rewards, 0)
    return Scores(nothing, nothing.bool(), [])
