# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
A reward that learns to tell reference images from those of the policy.

D is a small network on frozen features f, from which the mean of the reference is taken, in units of the root mean
square distance of the reference from it. After each generation batch it takes a few steps of Adam on

    L = mean_ref softplus(-D(f)) + mean_policy softplus(D(f)) + (gamma / 2) mean_between |grad_f D(f)|^2

the logistic loss of GANs (https://huggingface.co/papers/1406.2661) with a gradient penalty at random points between
reference and policy (those of https://huggingface.co/papers/1704.00028, with slope 0 as the aim, as in
https://huggingface.co/papers/1902.03984). With a step of length s from one to the other D changes by at most s times
the root mean square slope on the way, so that it stays bounded and smooth where it tells all images apart.

The reward of an image is D(f). Where D is the best possible without a penalty it is log p_ref(f) / p_policy(f), so
that the mean of the reward over the policy's images is -KL(policy, reference). A discriminator as the reward of a
flow-matching policy is that of https://huggingface.co/papers/2511.20256, with another loss (hinge) and other heads.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ..media import to_rgb
from .extractor_reward import Extractor, ExtractorReward
from .learning_reward import LearningReward


CHUNK = 64  # reference images that are in memory at once
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class AdversarialReward(ExtractorReward, LearningReward):
    """
    How much an image looks like one of a reference set and not like the policy's, by a small network that learns to
    tell the two apart while the policy is trained.

    As one reward among others it works against artifacts that the others do not see: whatever the policy does that the
    reference does not, the network learns to see. Its scores are logits, above 0 for "of the reference". In the first
    generation batch all are 0: nothing was learned yet. What changes with time cannot be compared over time, so the
    reward has no part in evaluations, and cannot be used with `multi_objective_aggregation="progress"`.

    It logs `adversarial/accuracy`, the share of a generation batch and of as many reference images that the network
    told right before it learned from them, and `adversarial/loss`.

    Args:
        reference (`str`, `Path`, [`~datasets.Dataset`], `list[PIL.Image.Image]` or `Tensor` of shape `[M, D]`):
            At least two images: a folder of them, a dataset with a column `image`, or a list; or their features.
        extractor (`Callable`, *optional*):
            From a list of N images to features, a tensor of shape `[N, D]`: a [`FeatureModel`] such as
            [`CLIPFeatures`] and [`DINOv2Features`], or a function. Defaults to `CLIPFeatures()`.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the network's hidden layer.
        steps (`int`, *optional*, defaults to `10`):
            Optimizer steps for each generation batch. Each sees the batch and as many reference images.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of these steps.
        gradient_penalty (`float`, *optional*, defaults to `0.1`):
            gamma, the weight of the gradient penalty. With the default the scores of images that are easy to tell end
            near -2 and 2.
        seed (`int`, *optional*, defaults to `0`):
            Of the first weights and of the reference images of each step.

    Raises:
        `TypeError`: If `reference` or `extractor` is none of these.
        `ValueError`: If there are fewer than two reference images, or a number is out of range.

    Example:

    ```python
    from trl_marble.rewards import AdversarialReward, DINOv2Features

    reward_funcs = ["pickscore", AdversarialReward("my_photographs", DINOv2Features())]
    ```
    """

    def __init__(
        self,
        reference: str | Path | Dataset | Sequence[Image.Image] | Tensor,
        extractor: Extractor | None = None,
        hidden_size: int = 64,
        steps: int = 10,
        learning_rate: float = 1e-3,
        gradient_penalty: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(extractor)
        for name, value, least in (("hidden_size", hidden_size, 1), ("steps", steps, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least {least}.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` is {learning_rate}; it must be greater than 0.")
        if not gradient_penalty >= 0:
            raise ValueError(f"`gradient_penalty` is {gradient_penalty}; it must not be negative.")
        self.hidden_size, self.steps, self.learning_rate = hidden_size, steps, learning_rate
        self.gradient_penalty, self.seed = gradient_penalty, seed
        self._images = None if isinstance(reference, Tensor) else _list_images(reference)
        self._reference = _check_features(reference) if isinstance(reference, Tensor) else None
        self._updates = 0
        self._head: dict[str, nn.Parameter] = {}  # empty until it is needed, and so the number of features is known
        self._optimizer: torch.optim.Adam | None = None

    @property
    def reference(self) -> Tensor:
        """Features of the reference images, of shape `[M, D]`, float32 on the CPU; computed on first use."""
        if self._reference is None:
            assert self._images is not None
            parts = [self.extractor(images).detach().float().cpu() for images in _in_chunks(self._images)]
            self._reference, self._images = _check_features(torch.cat(parts)), None
        return self._reference

    def features(self, images: list[Image.Image], prompts: list[str], **columns: Any) -> Tensor:
        return self.extractor(images).detach().float()

    @torch.no_grad()
    def score(self, features: Tensor) -> Tensor:
        return self._logits(self._scale(features))

    def update(
        self,
        *,
        features: Tensor,
        rewards: dict[str, list[float | None]],
        trainer_state: Any,
        log_metric: Any = None,
        **more: Any,
    ) -> None:
        """Take some steps on the logistic loss of a generation batch, see [`LearningReward.update`]."""
        fake, real, optimizer = self._scale(features), self._scale(self.reference), self._build()
        # By the number of the update: a resumed run draws the same.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._updates)
        for step in range(self.steps):
            drawn = real[torch.randperm(len(real), generator=generator)[: len(fake)]]
            partners = fake[torch.randperm(len(fake), generator=generator)[: len(drawn)]]
            between = torch.lerp(drawn, partners, torch.rand(len(drawn), 1, generator=generator)).requires_grad_()
            (slope,) = torch.autograd.grad(self._logits(between).sum(), between, create_graph=True)
            of_real, of_fake = self._logits(drawn), self._logits(fake)
            loss = softplus(-of_real).mean() + softplus(of_fake).mean()
            if step == 0 and log_metric is not None:
                told = of_real.sign().mean() - of_fake.sign().mean()  # a score of 0 counts as a half
                log_metric("adversarial/accuracy", 0.5 + told.item() / 4)
                log_metric("adversarial/loss", loss.item())
            optimizer.zero_grad()
            (loss + self.gradient_penalty / 2 * slope.square().sum(dim=1).mean()).backward()
            optimizer.step()
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The network, its optimizer, and how often it has learned."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return {"updates": self._updates, "head": dict(self._head), "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Take over what [`~AdversarialReward.state_dict`] returned.

        Raises:
            `ValueError`: If it is of a network of another size.
        """
        self._updates, self._head, self._optimizer = state_dict["updates"], {}, None
        if not state_dict["head"]:
            return
        optimizer = self._build()
        for name, parameter in self._head.items():
            saved = state_dict["head"][name]
            if saved.shape != parameter.shape:
                raise ValueError(
                    f"The state is of a network whose `{name}` is of shape {tuple(saved.shape)}, and here it is of "
                    f"shape {tuple(parameter.shape)}; use the `hidden_size` and `extractor` that it was trained with."
                )
            parameter.data.copy_(saved)
        optimizer.load_state_dict(state_dict["optimizer"])

    def _build(self) -> torch.optim.Adam:
        """Make the network, where it is not yet made, with 0 for all images; and the optimizer, which is returned."""
        if self._optimizer is None:
            size = self.reference.shape[1]
            generator = torch.Generator().manual_seed(self.seed)
            tensors = {
                "first": torch.randn(self.hidden_size, size, generator=generator),
                "first_bias": torch.zeros(self.hidden_size),
                "last": torch.zeros(self.hidden_size),
                "last_bias": torch.zeros(()),
            }
            self._head = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
            self._optimizer = torch.optim.Adam(self._head.values(), lr=self.learning_rate)
        return self._optimizer

    def _logits(self, scaled: Tensor) -> Tensor:
        self._build()
        head = self._head
        return silu(scaled @ head["first"].T + head["first_bias"]) @ head["last"] + head["last_bias"]

    def _scale(self, features: Tensor) -> Tensor:
        """Features around 0, with the reference's root mean square distance from its mean as the unit."""
        centre = self.reference.mean(dim=0)
        unit = (self.reference - centre).square().sum(dim=1).mean().sqrt()
        return (features.cpu().float() - centre) / unit


def _list_images(reference: Any) -> Sequence[Any]:
    """Images, or what they are read from."""
    if isinstance(reference, str | Path):
        folder = Path(reference)
        found: Sequence[Any] = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        what = f"the folder `{folder}` has {len(found)} images ({', '.join(sorted(SUFFIXES))})"
    elif isinstance(reference, Dataset):
        if not isinstance(reference.features.get("image"), ImageFeature):
            raise ValueError(
                f"`reference` is a dataset with the columns {reference.column_names}; its images must be in a column "
                "`image` of the kind `datasets.Image`."
            )
        found, what = reference.select_columns("image"), f"the dataset has {len(reference)} rows"  # type: ignore[assignment]
    elif isinstance(reference, Sequence) and all(isinstance(each, Image.Image) for each in reference):
        found, what = reference, f"the list has {len(reference)} images"
    else:
        raise TypeError(
            f"`reference` is a {type(reference).__name__}; pass a folder, a dataset with a column `image`, a list of "
            "images (PIL), or a tensor of features."
        )
    if len(found) < 2:
        raise ValueError(f"`reference` must have at least two images, and {what}.")
    return found


def _in_chunks(images: Sequence[Any]) -> Iterator[list[Image.Image]]:
    """Images in RGB, some at a time."""
    for start in range(0, len(images), CHUNK):
        yield [_read(images[place]) for place in range(start, min(start + CHUNK, len(images)))]


def _read(image: Any) -> Image.Image:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return to_rgb(opened)
    return to_rgb(image["image"] if isinstance(image, dict) else image)


def _check_features(features: Tensor) -> Tensor:
    """
    Features of a reference, float32 on the CPU.

    Raises:
        `ValueError`: If they are not of at least two different images, or not finite.
    """
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(
            f"The features of `reference` are of shape {tuple(features.shape)}; they must be of shape (number of "
            "images, number of features), and finite."
        )
    if len(features) < 2 or (features == features[0]).all():
        raise ValueError("The features of `reference` must be of at least two images that differ.")
    return features.detach().float().cpu()
