# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Tiny random pipelines of the real classes, made without network: 16 px images, 16 tokens, milliseconds a call."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"


def tiny_sd3(
    t5: bool = True,
    num_layers: int = 2,
    dual_attention_layers: tuple[int, ...] = (),
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """A fresh SD3 pipeline in fp32; the same seed gives the same weights. Without T5 it conditions on CLIP alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=num_layers,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                pos_embed_max_size=8,
                dual_attention_layers=dual_attention_layers,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=CLIPTextModelWithProjection(_clip_config()).eval(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(width=64) if t5 else None,
            tokenizer_3=_t5_tokenizer() if t5 else None,
        )


def tiny_flux(guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """A fresh Flux pipeline in fp32; the same seed gives the same weights. Ask it for 16 px: its default is 256."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
            ),
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config()).eval(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(width=32),
            tokenizer_2=_t5_tokenizer(),
        )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=100,
        projection_dim=32,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """One token per character, 77 in all."""
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    for character in CHARACTERS:
        tokens += [character, character + "</w>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4)).eval()


def _t5_tokenizer() -> T5Tokenizer:
    """One token per character."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(c, -3.0) for c in CHARACTERS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
