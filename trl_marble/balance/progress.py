# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Weights of rewards from how far each of them has come since the base model."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


# From so many prompts on, equal means are not taken for chance: rewards may have few values.
LEAST_PROMPTS = 16


class ProgressWeights:
    """
    Weighs each reward by how far it has come since the base model: those that lag weigh most.

    The progress of reward k is `p_k = (J_k - J_k(base)) / c_k`, its gain in units of its scale, and the weights are
    `softmax(-p / temperature)`. They are the gradient of `-temperature * log(sum_k exp(-p_k / temperature))`, which is
    about the least progress of all for a small temperature, and about their mean for a large one (smooth Tchebycheff
    scalarization, https://huggingface.co/papers/2402.19078). They weigh the rewards' scaled advantages, see
    [`aggregate_advantages`], so that no gradient of a single reward is needed.

    - **Gain.** For each prompt, the mean reward of its images less the mean reward of the base model's images of the
      same prompt. Prompts are averaged, and then generation batches, by a moving average.
    - **Scale.** `c_k` is the standard deviation of the reward over all images of the base model so far. While these
      all have the same reward, it is the one over all images so far, those of training included, and a reward that
      has never varied adds nothing. With a bound, `c_k` is what lies between it and the base model, so that the
      progress is a share of that way.
    - **Priorities.** Divided by them before the weights are formed: a reward with twice the priority is to come twice
      as far.
    - **Targets.** A reward whose level, `J_k(base)` plus its gain, is at its target or above weighs nothing until it
      falls below again.

    What is found counts at once, but only what was committed is in the state: a generation batch that no optimizer
    step has used, because the run stopped, is sampled again.

    Args:
        names (`Sequence[str]`):
            Of the K rewards, at least one.
        temperature (`float`, *optional*, defaults to `0.15`):
            In units of the progress, above 0.
        ema (`float`, *optional*, defaults to `0.9`):
            Decay in `[0, 1)` of the moving average over generation batches. It starts at 0: the
            first images are the base model's.
        targets (`Sequence[float | None]`, *optional*):
            One per reward, in the reward's own unit. `None`: the reward always counts.
        bounds (`Sequence[float | None]`, *optional*):
            One per reward: the highest value that can be hoped for. `None`: `c_k` is the standard deviation.
        priorities (`Sequence[float]`, *optional*):
            One per reward, positive; only their ratios matter. Defaults to equal ones.

    Raises:
        `ValueError`: if a setting is out of range.

    Example:

    ```python
    >>> import torch
    >>> from trl_marble.balance import ProgressWeights
    >>> progress = ProgressWeights(["easy", "hard"], ema=0.0)
    >>> prompts = torch.tensor([7, 7])
    >>> progress.add_base(prompts, torch.tensor([[0.0, 1.0], [0.0, 10.0]]))
    >>> progress.observe(prompts, torch.tensor([[0.6, 0.6], [5.0, 5.0]]))
    >>> [round(value, 2) for value in progress.weights.tolist()]
    [0.21, 0.79]
    ```
    """

    def __init__(
        self,
        names: Sequence[str],
        temperature: float = 0.15,
        ema: float = 0.9,
        targets: Sequence[float | None] | None = None,
        bounds: Sequence[float | None] | None = None,
        priorities: Sequence[float] | None = None,
    ):
        if not names:
            raise ValueError("names is empty: weights need at least one reward.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}.")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1) (0: no average), got {ema}.")
        self.names, self.temperature, self.ema = list(names), temperature, ema
        self._targets = _optional_values("targets", targets, len(names))
        self._bounds = _optional_values("bounds", bounds, len(names))
        self._priorities = _shares("priorities", [1.0] * len(names) if priorities is None else priorities, len(names))
        self._committed = self._state = _State.empty(len(names))

    # ---- What is found ----

    @property
    def progress(self) -> Tensor:
        """`p` of shape `(K,)`, float64 on the CPU: NaN for a reward of which no prompt has both means yet."""
        gain, scales = self._gains, self.scales
        # Without a scale all images have had the same reward, and nothing was gained.
        return torch.where(scales > 0, gain / scales, gain)

    @property
    def scales(self) -> Tensor:
        """`c` of shape `(K,)`, float64 on the CPU: 0 for a reward that has not varied, NaN for one without images."""
        own = _std(self._state.base)
        scales = torch.where(own > 0, own, _std(self._state.seen))
        to_bound = self._bounds - _mean(self._state.base)
        return torch.where(to_bound.isnan(), scales, to_bound)

    @property
    def levels(self) -> Tensor:
        """
        Mean of each reward over the base model's images plus its gain, of shape `(K,)`, float64 on the CPU; NaN where
        the progress is.
        """
        return _mean(self._state.base) + self._gains

    @property
    def reached(self) -> Tensor:
        """Which rewards are at their target or above, of shape `(K,)`, bool."""
        return self.levels >= self._targets  # never where either is NaN

    @property
    def weights(self) -> Tensor:
        """
        `w` of shape `(K,)`, float64 on the CPU, sums to 1. 0 for rewards that have reached their target; all 0 if all
        have. A reward without a progress has the weight of one that has come nowhere.
        """
        reached = self.reached
        if reached.all():
            return torch.zeros(len(self.names), dtype=torch.float64)
        logits = -self.progress.nan_to_num(nan=0.0) / self._priorities / self.temperature
        return logits.masked_fill(reached, -math.inf).softmax(dim=0)

    def in_units_of_scales(self, rewards: Tensor) -> Tensor:
        """
        `R / c`: after it, what is added to the standard deviations of advantages is equally small for all rewards.

        Args:
            rewards (`torch.Tensor` of shape `(K, B)`):
                Raw rewards, NaN where a reward does not apply.

        Returns:
            `torch.Tensor` of shape `(K, B)`, float64 on the CPU. A reward without a scale is left as it is.
        """
        return rewards.detach().cpu().double() / torch.where(self.scales > 0, self.scales, 1.0)[:, None]

    # ---- What it is found from ----

    def missing(self, prompts: Tensor) -> list[int]:
        """
        The prompts without images of the base model, each once, in the order in which it comes first.

        Args:
            prompts (`torch.LongTensor` of shape `(B,)`):
                Ids of prompts.
        """
        known = set(self._state.prompts.tolist())
        return [prompt for prompt in dict.fromkeys(prompts.tolist()) if prompt not in known]

    def add_base(self, prompts: Tensor, rewards: Tensor) -> None:
        """
        Take in images of the base model: all images of prompts that had none.

        Args:
            prompts (`torch.LongTensor` of shape `(B,)`):
                The id of each image's prompt.
            rewards (`torch.Tensor` of shape `(K, B)`):
                Their raw rewards, NaN where a reward does not apply.

        Raises:
            `ValueError`: if shapes are wrong, a prompt has images already, a bound is not above the mean of its
            reward, or a reward only compares a prompt's images with each other.
        """
        values = self._checked(prompts, rewards)
        if len(self.missing(prompts)) < len(prompts.unique()):
            raise ValueError("Some of the prompts have images of the base model already: each is sampled once.")
        state = self._state
        ids, means = _means_by_prompt(prompts, values)
        self._state = state._replace(
            prompts=torch.cat([state.prompts, ids]),
            means=torch.cat([state.means, means]),
            base=_add(state.base, values),
            seen=_add(state.seen, values),
        )
        self._check_bounds()
        self._refuse_rankings()

    def observe(self, prompts: Tensor, rewards: Tensor) -> None:
        """
        Take in the rewards of a generation batch.

        Args:
            prompts (`torch.LongTensor` of shape `(B,)`):
                The id of each image's prompt. [`~ProgressWeights.add_base`] has seen all of them.
            rewards (`torch.Tensor` of shape `(K, B)`):
                Raw rewards of all processes, NaN where a reward does not apply.

        Raises:
            `ValueError`: if shapes are wrong, or a prompt has no images of the base model.
        """
        values, state = self._checked(prompts, rewards), self._state
        if self.missing(prompts):
            raise ValueError("Some of the prompts have no images of the base model: add them first.")
        ids, means = _means_by_prompt(prompts, values)
        place = {prompt: i for i, prompt in enumerate(state.prompts.tolist())}
        gain = (means - state.means[[place[prompt] for prompt in ids.tolist()]]).nanmean(dim=0)
        found = ~gain.isnan()  # the other rewards keep their average
        decay = torch.ones_like(gain).masked_fill(found, self.ema)
        self._state = state._replace(
            seen=_add(state.seen, values),
            gain=decay * state.gain + (1 - decay) * gain.nan_to_num(),
            measured=state.measured | found,
        )

    def commit(self) -> None:
        """Keep what was taken in since the last time: an optimizer step has used it."""
        self._committed = self._state

    def roll_back(self) -> None:
        """Forget what was not committed."""
        self._state = self._committed

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that was committed, as tensors."""
        return {name: tensor.clone() for name, tensor in self._committed._asdict().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """
        Restores the state.

        Args:
            state_dict (`dict`):
                What [`~ProgressWeights.state_dict`] returned.

        Raises:
            `ValueError`: if it was saved for another number of rewards, or a bound is not above the base model's mean.
        """
        saved = len(state_dict["gain"])
        if saved != len(self.names):
            raise ValueError(
                f"The saved progress is of {saved} rewards, this run has {len(self.names)}: resume with the reward "
                "functions of the checkpoint."
            )
        self._committed = self._state = _State(
            **{name: state_dict[name].detach().cpu().clone() for name in _State._fields}
        )
        self._check_bounds()  # they may have changed since

    def _check_bounds(self) -> None:
        for name, bound, mean in zip(self.names, self._bounds.tolist(), _mean(self._state.base).tolist(), strict=True):
            if bound <= mean:
                raise ValueError(
                    f"The bound of reward `{name}` is {bound:g}, and its mean over the base model's images is "
                    f"{mean:g}: progress is measured as a share of the way between them, so the bound must be higher. "
                    "Give the highest value that can be hoped for, or `None`."
                )

    def _refuse_rankings(self) -> None:
        """Refuse rewards whose mean is the same on each prompt, though images differ: no policy can raise it."""
        deviations = _std(self._state.base).tolist()
        for name, deviation, means in zip(self.names, deviations, self._state.means.T, strict=True):
            known = means[~means.isnan()]
            if len(known) < LEAST_PROMPTS or deviation == 0 or (known - known[0]).abs().max() > 1e-4 * deviation:
                continue
            raise ValueError(
                f"Reward `{name}` has the mean {known[0]:.3g} on the base model's images of each of {len(known)} "
                "prompts, though it differs between images: it ranks a prompt's images, and whatever the policy does, "
                "it makes no progress. Use another aggregation, such as 'normalize_then_sum', or a reward that "
                "scores each image."
            )

    @property
    def _gains(self) -> Tensor:
        """The moving averages, NaN before the first value."""
        state = self._state
        return torch.where(state.measured, state.gain, torch.nan)

    def _checked(self, prompts: Tensor, rewards: Tensor) -> Tensor:
        if prompts.dtype != torch.int64 or rewards.shape != (len(self.names), *prompts.shape) or prompts.ndim != 1:
            raise ValueError(
                f"prompts must hold one int64 id per image, and rewards be of shape ({len(self.names)}, images); got "
                f"{prompts.dtype} of shape {tuple(prompts.shape)} and {tuple(rewards.shape)}."
            )
        values = rewards.detach().cpu().double()
        if values.isinf().any():
            raise ValueError("A reward is infinite: return None or NaN where a reward does not apply.")
        return values


class _State(NamedTuple):
    """Tensors that are never changed in place."""

    prompts: Tensor  # [N], of which there are images of the base model
    means: Tensor  # [N, K], their mean rewards, NaN where none applies
    base: Tensor  # moments [4, K] of the base model's images
    seen: Tensor  # moments [4, K] of all images
    gain: Tensor  # [K], moving average
    measured: Tensor  # [K], bool: whether it has any value yet

    @classmethod
    def empty(cls, num_rewards: int) -> "_State":
        moments = torch.zeros(4, num_rewards, dtype=torch.float64)
        gain = torch.zeros(num_rewards, dtype=torch.float64)
        none = torch.empty(0, num_rewards, dtype=torch.float64)
        return cls(
            torch.empty(0, dtype=torch.int64), none, moments, moments, gain, torch.zeros(num_rewards, dtype=torch.bool)
        )


def _optional_values(what: str, values: Sequence[float | None] | None, number: int) -> Tensor:
    """One number per reward, NaN for `None`."""
    if values is None:
        values = [None] * number
    if len(values) != number:
        raise ValueError(f"{what} has {len(values)} values for {number} rewards: give one per reward, or None.")
    if not all(value is None or math.isfinite(value) for value in values):
        raise ValueError(f"{what} must be finite numbers or None, got {list(values)}.")
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _shares(what: str, values: Sequence[float], number: int) -> Tensor:
    """One positive number per reward, divided by their mean."""
    if len(values) != number or not all(0 < value < math.inf for value in values):
        raise ValueError(f"{what} must be {number} positive numbers, one per reward, got {list(values)}.")
    given = torch.tensor(values, dtype=torch.float64)
    return given / given.mean()


def _means_by_prompt(prompts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The different prompts `[n]`, in ascending order, and the means `[n, K]` over the images a reward applies to."""
    ids = prompts.unique()
    means = torch.stack([values[:, prompts == prompt].nanmean(dim=1) for prompt in ids])
    return ids, means


# Moments of each reward: a first value, and of the differences to it their number, sum and sum of squares. With it the
# deviation of equal values is exactly 0, and a shift of the reward changes nothing.


def _add(moments: Tensor, values: Tensor) -> Tensor:
    """Moments `[4, K]` with those of further values `[K, B]`, NaN where there is none."""
    first, count, total, squares = moments
    valid = ~values.isnan()
    own_first = values.nan_to_num().gather(1, valid.int().argmax(dim=1, keepdim=True)).squeeze(1)
    first = torch.where(count > 0, first, own_first)
    difference = (values - first[:, None]).nan_to_num()
    return torch.stack(
        [first, count + valid.sum(dim=1), total + difference.sum(dim=1), squares + difference.square().sum(dim=1)]
    )


def _mean(moments: Tensor) -> Tensor:
    """`[K]`, NaN without a value."""
    first, count, total, _ = moments
    return first + total / count


def _std(moments: Tensor) -> Tensor:
    """Population standard deviation `[K]`, NaN without a value."""
    _, count, total, squares = moments
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()
