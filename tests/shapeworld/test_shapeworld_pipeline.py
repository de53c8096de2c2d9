# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from trl_marble.shapeworld import PIPELINE_FOLDER, all_captions, generate, load_pipeline, split_captions
from trl_marble.shapeworld.prompts import SPLIT_SIZES
from trl_marble.shapeworld.rewards import composition, reader


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompts, **arguments):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipeline(prompts, num_inference_steps=8, guidance_scale=1.0, generator=generators, **arguments).images


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in PIPELINE_FOLDER.rglob("*") if file.is_file()) < 12e6


def test_everything_is_fp32(pipeline):
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_a_plain_pipeline_without_empty_tokens_gives_the_same_pictures(pipeline):
    plain = StableDiffusion3Pipeline.from_pretrained(PIPELINE_FOLDER, text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is StableDiffusion3Pipeline
    assert plain.transformer.dtype == plain.vae.dtype == plain.text_encoder.dtype == torch.float32
    prompts = ["a red circle", "two blue squares"]
    ours, theirs = sample(pipeline, prompts), sample(plain, prompts, max_sequence_length=0)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_folder_alone_works_in_a_plain_pipeline_with_its_default_empty_tokens():
    plain = StableDiffusion3Pipeline.from_pretrained(PIPELINE_FOLDER)
    plain.set_progress_bar_config(disable=True)
    captions = all_captions("colors")[::3]
    images = sample(plain, [c.prompt for c in captions])
    assert np.mean(composition(images=images, include=[c.include for c in captions])) > 0.6


def test_every_word_is_one_token_and_any_text_tokenizes(pipeline):
    prompts = {caption.prompt for tag in SPLIT_SIZES for caption in all_captions(tag)}
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        for prompt in prompts:
            words = prompt.replace('"', ' " ').split()
            assert tokenizer.tokenize(prompt) == [word + "</w>" for word in words]
            assert len(words) + 2 <= tokenizer.model_max_length
        assert tokenizer.tokenize("A RED Circle") == tokenizer.tokenize("a red circle")
        odd = "smörgås, 数 99%"
        assert tokenizer.unk_token_id not in tokenizer(odd).input_ids[1:-1]
        assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True).replace(" ", "") == odd.replace(
            " ", ""
        )


def test_pictures_survive_the_vae(pipeline):
    vae: AutoencoderKL = pipeline.vae
    pictures = torch.stack([torch.from_numpy(np.array(image)) for _, image in generate(64, seed=99)])
    pictures = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        restored = vae.decode(latents).sample
    assert (restored - pictures).abs().mean() < 0.06
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1 and abs(scaled.std() - 1) < 0.1


def test_samples_without_guidance_show_what_the_prompts_ask_for_but_not_perfectly(pipeline):
    captions = [c for c in split_captions("test") if c.source != "free"]
    images = sample(pipeline, [c.prompt for c in captions for _ in range(2)])
    doubled = [c for c in captions for _ in range(2)]
    composed = composition(images=images, include=[c.include for c in doubled])
    read = reader(images=images, text=[c.text for c in doubled])
    composed, read = ([v for v in values if v is not None] for values in (composed, read))
    assert 0.4 < np.mean(composed) < 0.95
    assert 0.3 < np.mean(read) < 0.95
