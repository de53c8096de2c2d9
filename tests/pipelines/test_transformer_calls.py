# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Velocities against calls of the transformer that are written by hand, as a model's paper has it, for the main families.

Those of Stable Diffusion 3 and Flux are in test_flow_pipeline.py. Times are in [0, 1], latents of 16 px images or of
videos of two latent frames.
"""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_families import TINY as TINY_IMAGES
from tiny_videos import TINY_VIDEOS
from torch import Tensor

from trl_marble.pipelines import FlowPipeline


TINY = TINY_IMAGES | TINY_VIDEOS
EMBEDDED_GUIDANCE = {"Flux2Pipeline": 4.0, "HunyuanVideoPipeline": 6.0}
PROMPTS = ["a red cat", "two very large dogs", "six blue birds"]
TIMES = torch.tensor([0.9, 0.35, 0.6])


def qwen_image(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time as it is; the shape of the image in patches, one list per sample."""
    side = int(x_t.shape[1] ** 0.5)
    return transformer(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=rows["prompt_embeds"],
        encoder_hidden_states_mask=rows.get("prompt_embeds_mask"),
        img_shapes=[[(1, side, side)]] * len(x_t),
    ).sample


def flux2(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time as it is; four coordinates per token: image (0, row, column, 0), text (0, 0, 0, place)."""
    batch, side = len(x_t), int(x_t.shape[1] ** 0.5)
    image_ids = torch.tensor([[0, row, column, 0] for row in range(side) for column in range(side)])
    text_ids = torch.tensor([[0, 0, 0, place] for place in range(rows["prompt_embeds"].shape[1])])
    return transformer(
        hidden_states=x_t,
        timestep=t,
        guidance=torch.full([1], 4.0),
        encoder_hidden_states=rows["prompt_embeds"],
        img_ids=image_ids.expand(batch, -1, -1),
        txt_ids=text_ids.expand(batch, -1, -1),
    ).sample


def z_image(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time runs from noise to data, and so does the velocity; samples and texts are lists, an image has one frame."""
    frames = list(x_t.to(rows["prompt_embeds"][0].dtype)[:, :, None])
    velocities = transformer(frames, 1 - t, rows["prompt_embeds"], return_dict=False)[0]
    return -torch.stack([velocity.float() for velocity in velocities])[:, :, 0]


def sana(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time in thousandths."""
    return transformer(
        x_t.to(rows["prompt_embeds"].dtype),
        encoder_hidden_states=rows["prompt_embeds"],
        encoder_attention_mask=rows["prompt_attention_mask"],
        timestep=1000 * t,
    ).sample


def lumina2(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time runs from noise to data, and so does the velocity."""
    return -transformer(
        hidden_states=x_t,
        timestep=1 - t,
        encoder_hidden_states=rows["prompt_embeds"],
        encoder_attention_mask=rows["prompt_attention_mask"],
    ).sample


def wan(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time in thousandths; texts are padded with zeros and need no mask."""
    embeds = rows["prompt_embeds"]
    return transformer(x_t.to(embeds.dtype), timestep=1000 * t, encoder_hidden_states=embeds).sample


def ltx(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time in thousandths; places are counted in seconds, at 25 frames per second, and in pixels."""
    return transformer(
        x_t.to(rows["prompt_embeds"].dtype),
        timestep=1000 * t,
        encoder_hidden_states=rows["prompt_embeds"],
        encoder_attention_mask=rows["prompt_attention_mask"],
        num_frames=2,
        height=8,
        width=8,
        rope_interpolation_scale=(4 / 25, 4, 4),
    ).sample


def hunyuan_video(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time and guidance in thousandths."""
    dtype = rows["prompt_embeds"].dtype
    return transformer(
        x_t.to(dtype),
        timestep=1000 * t,
        encoder_hidden_states=rows["prompt_embeds"],
        encoder_attention_mask=rows["prompt_attention_mask"].to(dtype),
        pooled_projections=rows["pooled_prompt_embeds"],
        guidance=torch.full([len(x_t)], 6000.0, dtype=dtype),
    ).sample


def mochi(transformer: Any, x_t: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
    """Time in thousandths runs from noise to data, and so does the velocity."""
    dtype = rows["prompt_embeds"].dtype
    return -transformer(
        x_t.to(dtype),
        timestep=(1000 * (1 - t)).to(dtype),
        encoder_hidden_states=rows["prompt_embeds"],
        encoder_attention_mask=rows["prompt_attention_mask"],
    ).sample


CALLS = {
    "QwenImagePipeline": qwen_image,
    "Flux2Pipeline": flux2,
    "ZImagePipeline": z_image,
    "SanaPipeline": sana,
    "Lumina2Pipeline": lumina2,
    "WanPipeline": wan,
    "LTXPipeline": ltx,
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_velocity_is_the_hand_written_call(name, dtype):
    make, call = TINY[name]
    pipeline = make().to(dtype)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=name == "MochiPipeline")
    settings = {key: call[key] for key in ("height", "width", "num_frames", "max_sequence_length") if key in call}
    flow = FlowPipeline(pipeline, guidance_scale=EMBEDDED_GUIDANCE.get(name, 1.0), **settings)
    conditioning = flow.encode(PROMPTS)
    latents = flow.rollout(conditioning, [1, 2, 3], 2).latents
    x_t = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    velocity = flow.velocity(x_t, TIMES, conditioning)
    expected = CALLS[name](flow.transformer, x_t, TIMES, conditioning.kwargs)
    assert velocity.dtype == dtype and velocity.std() > 0.01
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # the pipelines round times to their dtype
    assert (velocity - expected).norm() <= tolerance * expected.norm()
