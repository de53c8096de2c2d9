# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Set rewards on features of tiny models and of functions; their mathematics is in test_set_values.py."""

import math

import pytest
import torch
from PIL import Image
from tiny import _clip_tokenizer
from tiny_scorers import _random_clip
from transformers import BitImageProcessor, CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from trl_marble.rewards import (
    CLIPFeatures,
    DINOv2Features,
    FrechetReward,
    MMDReward,
    RewardScorer,
    VendiDiversity,
    reward_names,
)
from trl_marble.rewards.protocol import reward_center, reward_scope
from trl_marble.rewards.set_values import vendi_score


def picture(red, blue=0):
    return Image.new("RGB", (30, 28), (red, 0, blue))


def colours(images):
    return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]) / 255


def score(reward, images, groups):
    return torch.tensor(reward(images=images, prompts=["p"] * len(images), groups=groups))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    _random_clip("quick_gelu").save_pretrained(folder)
    _clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return str(folder)


def test_diversity_is_within_a_prompt() -> None:
    images = [picture(255), picture(0, 255), picture(255), picture(250)]
    scores = score(VendiDiversity(colours), images, [0, 0, 1, 1])
    assert scores[:2].tolist() == pytest.approx([2, 2]) and scores[2:].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert (reward_scope(VendiDiversity()), reward_center(VendiDiversity())) == ("group", "group")


@pytest.mark.parametrize("kind", [MMDReward, FrechetReward])
def test_images_that_are_rare_in_the_batch_and_common_in_the_reference_score_best(kind) -> None:
    reward = kind([picture(shade) for shade in range(100, 140, 5)], colours)
    images = [picture(shade) for shade in (0, 5, 10, 15, 120)]
    scores = score(reward, images, [0, 0, 0, 0, 1])
    assert scores.argmax() == 4 and scores.mean() < 0
    nearer = score(reward, [picture(shade) for shade in range(100, 140, 8)], [0] * 5)
    assert scores.mean() < nearer.mean() <= 1e-6
    assert (reward_scope(reward), reward_center(reward)) == ("batch", "batch")


def test_a_reference_may_be_features_and_there_may_be_fewer_images_than_features() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 20, generator=generator)

    def embed(images):
        return torch.randn(len(images), 20, generator=generator) + 1

    for reward in (MMDReward(reference, embed), FrechetReward(reference, embed), FrechetReward(reference, embed, 4)):
        assert score(reward, [picture(0)] * 6, [0] * 6).isfinite().all()


def test_clip_features_are_those_of_images_and_texts(clip) -> None:
    extractor = CLIPFeatures(clip, batch_size=2)
    images = [picture(255), picture(0, 255), picture(90, 90)]
    features = extractor(images)
    assert features.shape == (3, 16) and features.norm(dim=1).tolist() == pytest.approx([1] * 3)
    torch.testing.assert_close(extractor(images[2:]), features[2:])
    assert extractor.of_texts(["a", "b"]).shape == (2, 16)
    scores = score(VendiDiversity(extractor), images, [0] * 3)
    torch.testing.assert_close(scores.mean().double(), vendi_score(features).value, check_dtype=False)
    for reward in (MMDReward(["a red dog", "a cat", "a hat"], extractor), MMDReward(images, extractor)):
        assert score(reward, images, [0] * 3).isfinite().all()


def test_dinov2_features_are_those_of_the_class_token(tmp_path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    images = [picture(255), picture(0, 255)]
    features = DINOv2Features(str(tmp_path))(images)
    with torch.no_grad():
        hidden = model(pixel_values=processor(images, return_tensors="pt").pixel_values).last_hidden_state
    torch.testing.assert_close(features, hidden[:, 0], atol=1e-4, rtol=1e-4)


def test_the_scorer_sends_models_to_its_device_and_gives_memory_back(clip) -> None:
    reward = VendiDiversity(CLIPFeatures(clip, offload=True))
    scorer = RewardScorer([reward])
    scorer.to(torch.device("cpu"), torch.bfloat16)
    reward.extractor([picture(0)])
    assert reward.extractor.model.dtype == torch.bfloat16
    scorer.release()
    assert reward.extractor.model.device.type == "cpu" and reward_names([reward]) == ["VendiDiversity"]


def test_bad_input_is_refused(clip) -> None:
    images = [picture(0), picture(1)]
    with pytest.raises(TypeError, match=r"`extractor` is 'clip'; pass an object such as `CLIPFeatures\(\)`"):
        VendiDiversity("clip")
    with pytest.raises(TypeError, match="must be a list of images .* got list of Image, str"):
        MMDReward([picture(0), "a"], colours)
    with pytest.raises(TypeError, match="got list of nothing"):
        MMDReward([], colours)
    with pytest.raises(ValueError, match="`reference` has texts, and `extractor` takes images only"):
        MMDReward(["a", "b"], colours)
    with pytest.raises(ValueError, match="`reference` has 1 members"):
        MMDReward(images[:1], colours)
    with pytest.raises(ValueError, match=r"`reference` is a tensor of shape \(2,\)"):
        MMDReward(torch.tensor([1.0, math.nan]), colours)
    with pytest.raises(ValueError, match="`num_components` must be at least 1, got 0"):
        FrechetReward(images, colours, num_components=0)
    with pytest.raises(ValueError, match="`smoothing` must be greater than 0, got 0"):
        FrechetReward(images, colours, smoothing=0)
    with pytest.raises(ValueError, match="`DINOv2Features` has no features of texts; use `CLIPFeatures`"):
        DINOv2Features(clip).embed_texts(["a"])


def test_a_frechet_distance_does_not_depend_on_the_order_of_its_reference() -> None:
    reference = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    images = [picture(shade) for shade in range(0, 200, 20)]
    features = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    scores = [
        score(FrechetReward(reference[order], lambda _: features, **components), images, [0] * 10)
        for order in ([0, 1, 2, 3], [2, 0, 3, 1])
        for components in ({}, {"num_components": 3})  # four members differ in three directions
    ]
    for each in scores[1:]:
        torch.testing.assert_close(each, scores[0], rtol=1e-4, atol=1e-5)


def test_a_reference_of_equal_members_is_refused() -> None:
    reward = FrechetReward([picture(100)] * 3, colours)
    with pytest.raises(ValueError, match="All 3 members of `reference` have the same features"):
        score(reward, [picture(90), picture(80)], [0, 0])


def test_constants_of_a_reference_are_computed_once(monkeypatch) -> None:
    from trl_marble.rewards import set_rewards

    reference, images = [picture(shade) for shade in range(100, 140, 5)], [picture(90), picture(120)]
    before = [score(kind(reference, colours), images, [0, 0]) for kind in (MMDReward, FrechetReward)]
    rewards = [kind(reference, colours) for kind in (MMDReward, FrechetReward)]
    for reward in rewards:
        score(reward, images, [0, 0])
    for name in ("median_distance", "mean_kernel", "principal_directions"):
        monkeypatch.delattr(set_rewards, name)
    assert all(torch.equal(score(reward, images, [0, 0]), own) for reward, own in zip(rewards, before, strict=True))
