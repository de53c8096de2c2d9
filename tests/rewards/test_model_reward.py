# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The base class of rewards that a model computes, on a real small model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch import nn

from trl_marble.rewards.model_reward import ModelReward, to_rgb


class Brightness(ModelReward):
    """A linear layer that averages the red channel of the first pixel; applies to prompts with an exclamation mark."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loads, self.batches = 0, []

    def load(self):
        self.loads += 1
        return nn.Linear(1, 1)

    def applies(self, prompts, **columns):
        return [prompt.endswith("!") for prompt in prompts]

    def score(self, images, prompts, **columns):
        self.batches.append((prompts, columns))
        assert torch.is_inference_mode_enabled() and not self.model.training
        assert not any(parameter.requires_grad for parameter in self.model.parameters())
        pixels = torch.tensor([[image.getpixel((0, 0))[0]] for image in images]).to(self.device, self.dtype)
        assert self.model(pixels).dtype == self.dtype
        return (pixels / 255).flatten().tolist()


def pictures(*levels):
    return [Image.new("RGB", (3, 2), (level, 0, 0)) for level in levels]


def test_only_what_applies_is_scored_in_batches_and_in_order():
    reward = Brightness(batch_size=2)
    prompts = ["a!", "b", "c!", "d!", "e"]
    values = reward(images=pictures(255, 9, 51, 0, 9), prompts=prompts, trainer_state=None, number=[0, 1, 2, 3, 4])
    assert values == [1.0, None, pytest.approx(0.2), 0.0, None]
    assert reward.batches == [(["a!", "c!"], {"number": [0, 2]}), (["d!"], {"number": [3]})]


def test_the_model_is_loaded_once_and_only_when_it_is_needed():
    reward = Brightness()
    assert reward(images=pictures(1), prompts=["no"]) == [None]
    assert reward.loads == 0
    for _ in range(2):
        reward(images=pictures(1), prompts=["yes!"])
    assert reward.loads == 1


def test_it_follows_the_trainer_unless_a_dtype_was_chosen():
    for chosen, expected in ((None, torch.bfloat16), (torch.float64, torch.float64)):
        reward = Brightness(dtype=chosen).to("cpu", torch.bfloat16)
        reward(images=pictures(1), prompts=["yes!"])
        assert reward.model.weight.dtype == expected


def test_release_moves_the_weights_only_with_offload():
    for offload in (False, True):
        reward = Brightness(offload=offload).to("meta")
        reward.release()  # nothing is loaded yet
        reward.model.to("meta")
        if offload:
            with pytest.raises(NotImplementedError, match="meta"):  # a meta tensor cannot leave: it was asked to
                reward.release()
        else:
            reward.release()
            assert reward.model.weight.device.type == "meta"


def test_images_of_any_mode_become_rgb():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 255))).getpixel((0, 0)) == (10, 20, 30)
    assert to_rgb(Image.new("LA", (1, 1), (7, 255))).getpixel((0, 0)) == (7, 7, 7)
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 0, 0, 0))).mode == "RGB"
    same = Image.new("RGB", (1, 1))
    assert to_rgb(same) is same


def test_a_batch_holds_at_least_one_image():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        Brightness(batch_size=0)


def test_models_are_loaded_one_at_a_time():
    """`transformers` patches itself while it loads; two loads at once left tied weights untied for good."""
    loading, most = 0, 0
    second = threading.Event()

    class Slow(Brightness):
        def load(self):
            nonlocal loading, most
            loading += 1
            most = max(most, loading)
            if loading > 1:
                second.set()
            second.wait(0.05)  # a second one would come now
            loading -= 1
            return super().load()

    rewards = [Slow() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for values in threads.map(lambda reward: reward([Image.new("RGB", (1, 1))], ["now!"]), rewards):
            assert values[0] is not None
    assert most == 1 and [reward.loads for reward in rewards] == [1] * 4
