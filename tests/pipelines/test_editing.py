# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Images to be edited: which datasets have them, what is encoded, and what a call sees. See also test_families.py."""

import datasets
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image, ImageOps
from tiny import tiny_sd3
from tiny_edits import (
    TINY_EDITS,
    edit_image,
    edit_instruction,
    edit_set,
    edit_set_of_all_modes,
    tiny_bria_fibo_edit,
    tiny_flux_kontext,
    tiny_qwen_image_edit,
    tiny_qwen_image_edit_plus,
)
from tiny_families import tiny_flux2

from trl_marble.media import to_rgb
from trl_marble.pipelines import FlowPipeline, edits_images, encode_distinct, families, with_rgb_images


RED, BLUE, WIDE = edit_image("red white"), edit_image("blue black"), edit_image("white red", width=96)
PROMPTS = ["a cat", "two very large dogs", "a cat"]


@pytest.fixture(scope="module")
def kontext() -> FlowPipeline:
    return FlowPipeline(tiny_flux_kontext(), 16, 16, guidance_scale=3.5, max_sequence_length=24)


@pytest.fixture(scope="module")
def qwen() -> FlowPipeline:
    return FlowPipeline(tiny_qwen_image_edit(), 16, 16)


# --- datasets --------------------------------------------------------------------------------------------------------


def test_images_are_edited_where_the_pipeline_takes_them_and_the_dataset_has_them(kontext, qwen):
    with_images, without = edit_set(), Dataset.from_dict({"prompt": ["a cat"]})
    assert edits_images(kontext, with_images, "it") and edits_images(qwen, with_images, "it")
    assert not edits_images(kontext, without, "it")
    assert not edits_images(FlowPipeline(tiny_sd3(), 16, 16), with_images, "it")


def test_a_dataset_without_the_images_that_a_pipeline_needs_is_refused(qwen):
    dataset = edit_set().rename_column("image", "source")
    with pytest.raises(ValueError, match="edits images, but `train_dataset` has no column `image`"):
        edits_images(qwen, dataset, "train_dataset")
    assert edits_images(qwen, dataset.rename_column("source", "image"), "train_dataset")  # as the message says


def test_a_column_that_does_not_hold_images_is_refused(kontext, tmp_path):
    RED.save(tmp_path / "red.png")
    paths = Dataset.from_dict({"prompt": ["a cat"], "image": [str(tmp_path / "red.png")]})
    with pytest.raises(ValueError, match=r"the column is of type Value\('string'\)"):
        edits_images(kontext, paths, "it")
    images = paths.cast_column("image", datasets.Image())  # as the message says
    assert edits_images(kontext, images, "it") and images[0]["image"].size == RED.size
    with pytest.raises(ValueError, match="decode=False"):
        edits_images(kontext, paths.cast_column("image", datasets.Image(decode=False)), "it")


def test_a_row_without_an_image_is_refused_and_numbered(kontext):
    features = Features({"prompt": Value("string"), "image": datasets.Image()})
    rows = {"prompt": ["a"] * 1003, "image": [RED] * 1001 + [None, RED]}
    dataset = Dataset.from_dict(rows, features=features)
    with pytest.raises(ValueError, match="Row 1001 of `it` has no image"):
        edits_images(kontext, dataset, "it")
    with pytest.raises(ValueError, match="Row 1 of `it` has no image"):
        edits_images(kontext, dataset.select([0, 1001]), "it")
    filtered = dataset.filter(lambda image: image is not None, input_columns="image")
    assert len(filtered) == 1002 and edits_images(kontext, filtered, "it")


def test_a_warning_names_a_pipeline_outside_the_table_that_could_edit(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())
    flow = FlowPipeline(tiny_flux2(), 16, 16)
    with pytest.warns(UserWarning, match="Flux2Pipeline takes an image, but is not in the table"):
        assert not edits_images(flow, edit_set(), "it")


def test_images_of_any_mode_are_read_in_rgb(kontext):
    rows = edit_set_of_all_modes()
    assert [row["image"].mode for row in rows] == ["L", "P", "RGBA", "CMYK", "1", "I;16"]
    converted = with_rgb_images(rows)
    for before, after in zip(rows, converted, strict=True):
        assert after["image"] == to_rgb(before["image"]) and after["tag"] == before["tag"]
    assert converted.select([3, 1])["tag"][:] == ["d", "b"] and converted[:2]["image"][1].mode == "RGB"
    assert edits_images(kontext, converted, "it")


def test_the_transform_of_the_dataset_runs_first():
    def flip(batch):
        return batch | {"image": [ImageOps.mirror(image) for image in batch["image"]]}

    rows = edit_set_of_all_modes()
    images = with_rgb_images(rows.with_transform(flip))[:]["image"]
    assert images == [to_rgb(ImageOps.mirror(row["image"])) for row in rows]
    with pytest.raises(ValueError, match=r"has the format 'torch'.*with_format\(None\)"):
        with_rgb_images(rows.with_format("torch"))


# --- encoding --------------------------------------------------------------------------------------------------------


def test_every_different_pair_of_prompt_and_image_is_encoded_once(kontext):
    prompts = ["a cat", "a dog", "a cat", "a cat", "a dog"]
    images = [RED, RED, BLUE, edit_image("red white"), RED]
    conditioning, index = encode_distinct(kontext, prompts, images)
    assert index.tolist() == [0, 1, 2, 0, 1]
    assert conditioning.kwargs["image"] == [RED, RED, BLUE]
    expected = kontext.encode(["a cat", "a dog", "a cat"], [RED, RED, BLUE])
    assert torch.equal(conditioning.kwargs["prompt_embeds"], expected.kwargs["prompt_embeds"])
    assert encode_distinct(kontext, prompts)[1].tolist() == [0, 1, 0, 0, 1]


def test_images_of_the_same_bytes_in_another_size_or_mode_are_different(kontext):
    images = [Image.frombytes("L", size, bytes(64)) for size in ((8, 8), (4, 16))] + [Image.new("RGB", (8, 8))]
    assert encode_distinct(kontext, ["a cat"] * 3, images)[1].tolist() == [0, 1, 2]


def test_images_that_are_encoded_are_in_rgb(kontext):
    images = [row["image"] for row in edit_set_of_all_modes()]
    held = kontext.encode(["a cat"] * 6, images).kwargs["image"]
    assert held == [to_rgb(image) for image in images]


def test_the_text_encoder_sees_each_different_row_once(qwen):
    runs = []
    handle = qwen.pipeline.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    try:
        conditioning, index = encode_distinct(qwen, PROMPTS, [RED, BLUE, RED])
        samples = conditioning.select(index)
        latents = qwen.rollout(samples, [1, 2, 3], 2).latents
        qwen.velocity(latents, torch.tensor([0.9, 0.4, 0.5]), samples)
        qwen.velocity(latents[:1], torch.tensor([0.2]), conditioning.select(index[:1]))
    finally:
        handle.remove()
    assert len(runs) == 2


# --- calls -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_EDITS)
def test_an_image_changes_the_velocity_of_its_own_sample_only(name):
    make, call = TINY_EDITS[name]
    guidance = call.get("guidance_scale", 1.0)
    flow = FlowPipeline(make(), call["height"], call["width"], guidance, call.get("max_sequence_length"))
    prompts = [edit_instruction(prompt) for prompt in PROMPTS] if name == "BriaFiboEditPipeline" else PROMPTS
    x_t = flow.rollout(flow.encode(prompts, [RED] * 3), [1, 2, 3], 2).latents
    times = torch.tensor([0.9, 0.5, 0.9])

    def velocity(images):
        return flow.velocity(x_t, times, flow.encode(prompts, images))

    before, after = velocity([RED, RED, BLUE]), velocity([RED, WIDE, BLUE])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("make", "size", "options"),
    [(tiny_flux_kontext, 16, {"max_area": 256, "guidance_scale": 3.5}), (tiny_bria_fibo_edit, 64, {})],
)
def test_without_an_image_a_batch_is_made_from_text_in_one_call(make, size, options):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    prompts = [edit_instruction(prompt) for prompt in PROMPTS] if make is tiny_bria_fibo_edit else PROMPTS
    plain = pipeline(
        prompt=prompts,
        height=size,
        width=size,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        num_inference_steps=2,
        output_type="pt",
        max_sequence_length=64,
        **({"guidance_scale": 1.0} | options),
    ).images
    flow = FlowPipeline(pipeline, size, size, options.get("guidance_scale", 1.0), 64)
    calls = []
    handle = flow.transformer.register_forward_hook(lambda *_: calls.append(1))
    rollout = flow.rollout(flow.encode(prompts), [1, 2, 3], 2, output_type="pt")
    handle.remove()
    assert len(calls) == 2
    assert torch.equal(rollout.images, plain)


def test_images_have_the_requested_size(kontext):
    flow = FlowPipeline(kontext.pipeline, 16, 32, guidance_scale=3.5, max_sequence_length=24)
    (image,) = flow.rollout(flow.encode(["a cat"], [WIDE]), [1], 2).images
    assert image.size == (32, 16)
    plus = FlowPipeline(tiny_qwen_image_edit_plus(), 16, 32)
    (image,) = plus.rollout(plus.encode(["a cat"], [WIDE]), [1], 2).images
    assert image.size == (32, 16)


def test_images_are_refused_or_required(kontext, qwen):
    with pytest.raises(ValueError, match="QwenImageEditPipeline edits images, but there are none"):
        qwen.encode(["a cat"])
    with pytest.raises(ValueError, match="got 1 images for 2 prompts"):
        kontext.encode(["a cat", "a dog"], [RED])
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline takes no images to edit, but there are 1"):
        FlowPipeline(tiny_sd3(), 16, 16).encode(["a cat"], [RED])
