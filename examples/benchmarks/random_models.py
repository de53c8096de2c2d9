# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 3 pipelines of several sizes with random weights. Time and memory do not depend on the weights."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from trl_marble.shapeworld import load_pipeline


# Arguments of the transformer, number of text tokens, channels of the VAE.
SIZES = {
    "tiny": (
        {"sample_size": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4},
        {"joint_attention_dim": 64, "pooled_projection_dim": 64, "in_channels": 4},
        10,
        (8, 8, 8, 8),
    ),
    "small": (
        {"sample_size": 32, "num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 6},
        {"joint_attention_dim": 512, "pooled_projection_dim": 512, "in_channels": 16},
        77,
        (16, 16, 32, 32),
    ),
    # As stabilityai/stable-diffusion-3.5-medium has it, at 512 pixels, with CLIP's 77 and T5's 256 tokens.
    "sd3.5m": (
        {"sample_size": 64, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24}
        | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16},
        333,
        (128, 256, 512, 512),
    ),
}


class RandomTextPipeline(StableDiffusion3Pipeline):
    """Stable Diffusion 3 with random embeddings and without text encoders, which would only need memory."""

    text_tokens: int

    def encode_prompt(  # type: ignore[override]
        self, prompt: list[str] | None, *args, prompt_embeds=None, pooled_prompt_embeds=None, **kwargs
    ):
        if prompt is None:
            return prompt_embeds, None, pooled_prompt_embeds, None
        config, generator = self.transformer.config, torch.Generator().manual_seed(0)
        shape = (len(prompt), self.text_tokens, config.joint_attention_dim)
        embeds = torch.randn(shape, generator=generator)
        pooled = torch.randn(len(prompt), config.pooled_projection_dim, generator=generator)
        embeds, pooled = (x.to(self.transformer.device, self.transformer.dtype) for x in (embeds, pooled))
        return embeds, None, pooled, None


def random_pipeline(size: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> RandomTextPipeline:
    """A pipeline of one of `SIZES`, whose weights are drawn on a device: on a CPU billions of them take a minute."""
    with torch.device(device):
        return _random_pipeline(size, dtype)


def _random_pipeline(size: str, dtype: torch.dtype) -> RandomTextPipeline:
    blocks, widths, text_tokens, vae_channels = SIZES[size]
    width = blocks["attention_head_dim"] * blocks["num_attention_heads"]
    torch.manual_seed(0)
    pipeline = RandomTextPipeline(
        transformer=SD3Transformer2DModel(
            **({"pos_embed_max_size": blocks["sample_size"] // 2} | blocks | widths),
            patch_size=2,
            out_channels=widths["in_channels"],
            caption_projection_dim=width,
        ).to(dtype),
        vae=AutoencoderKL(
            block_out_channels=vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2 if size == "sd3.5m" else 1,
            latent_channels=widths["in_channels"],
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
        ).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=load_pipeline().tokenizer,
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")),
    )
    pipeline.text_tokens = text_tokens
    return pipeline
