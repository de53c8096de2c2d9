# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Tiny random text-to-video pipelines, as those of images in tiny_families.py: the same seed gives the same weights.

Every video is of 16 or 32 px and two or three latent frames, so that time in the video is an axis of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny import _clip_config, _clip_tokenizer, _t5, _t5_tokenizer
from tiny_families import (
    _chat_tokenizer,
    _gemma2,
    _gemma_tokenizer,
    _kandinsky5_transformer,
    _qwen25_vl,
    _umt5,
)
from transformers import CLIPTextModel, LlamaConfig, LlamaModel


# --- Wan and those built on it


def tiny_wan(expand_timesteps: bool = False, boundary_ratio: float | None = None, seed: int = 0) -> WanPipeline:
    """
    Wan 2.1, or 2.2: the 5B with `expand_timesteps`, whose loop writes one time into every token, and the 14B with a
    `boundary_ratio`, below which a second transformer takes over.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanPipeline(
            transformer=WanTransformer3DModel(**_wan_settings()).eval(),
            transformer_2=None if boundary_ratio is None else WanTransformer3DModel(**_wan_settings()).eval(),
            scheduler=_flow_solver(),
            vae=_wan_vae(),
            text_encoder=_umt5(),
            tokenizer=_t5_tokenizer(),
            expand_timesteps=expand_timesteps,
            boundary_ratio=boundary_ratio,
        )


def tiny_wan_expanded(seed: int = 0) -> WanPipeline:
    """The 5B of Wan 2.2."""
    return tiny_wan(expand_timesteps=True, seed=seed)


def tiny_skyreels(seed: int = 0) -> SkyReelsV2Pipeline:
    """SkyReels-V2: Wan with a transformer of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SkyReelsV2Pipeline(
            transformer=SkyReelsV2Transformer3DModel(**_wan_settings()).eval(),
            scheduler=_flow_solver(),
            vae=_wan_vae(),
            text_encoder=_umt5(),
            tokenizer=_t5_tokenizer(),
        )


def tiny_sana_video(seed: int = 0) -> SanaVideoPipeline:
    """Sana-Video: the texts and the linear attention of Sana, the videos of Wan; it calls the frames `frames`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SanaVideoPipeline(
            transformer=SanaVideoTransformer3DModel(
                in_channels=16,
                out_channels=16,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=8,
                sample_size=8,
                rope_max_seq_len=32,
            ).eval(),
            scheduler=_flow_solver(),
            vae=_wan_vae(),
            text_encoder=_gemma2(),
            tokenizer=_gemma_tokenizer(),
        )


def _wan_settings() -> dict[str, Any]:
    return dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 16,
        latents_std=[1.5] * 16,
    ).eval()


def _flow_solver() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


# --- LTX-Video


def tiny_ltx(seed: int = 0) -> LTXPipeline:
    """LTX-Video: packed latents, and a schedule that is shifted by the size and stretched to end at 0.1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LTXPipeline(
            transformer=_ltx_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.95,
                max_shift=2.05,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
                shift_terminal=0.1,
            ),
            vae=_ltx_vae(),
            text_encoder=_t5(width=32),
            tokenizer=_t5_tokenizer(),
        )


def tiny_ltx_condition(seed: int = 0) -> LTXConditionPipeline:
    """LTX-Video from 0.9.5 on: every token has a time, and the scheduler is given data - noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LTXConditionPipeline(
            transformer=_ltx_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_ltx_vae(timestep_conditioning=True),
            text_encoder=_t5(width=32),
            tokenizer=_t5_tokenizer(),
        )


def _ltx_transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()


def _ltx_vae(**settings: Any) -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        patch_size=1,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        **settings,
    ).eval()


# --- HunyuanVideo, Mochi, Kandinsky 5


def tiny_hunyuan_video(seed: int = 0) -> HunyuanVideoPipeline:
    """HunyuanVideo: guidance is an input, and the text goes through a small transformer before the large one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return HunyuanVideoPipeline(
            transformer=HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=1,
                patch_size_t=1,
                guidance_embeds=True,
                text_embed_dim=16,
                pooled_projection_dim=32,
                rope_axes_dim=(4, 6, 6),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=_hunyuan_video_vae(),
            text_encoder=LlamaModel(
                LlamaConfig(
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    vocab_size=400,
                )
            ).eval(),
            tokenizer=_chat_tokenizer(),
            text_encoder_2=CLIPTextModel(_clip_config()).eval(),
            tokenizer_2=_clip_tokenizer(),
        )


def _hunyuan_video_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def tiny_mochi(seed: int = 0) -> MochiPipeline:
    """Mochi: it counts time from noise to data, so that its sigmas and the sign of its output are turned around."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MochiPipeline(
            transformer=MochiTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                pooled_projection_dim=16,
                text_embed_dim=32,
                time_embed_dim=4,
                max_sequence_length=24,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=AutoencoderKLMochi(
                encoder_block_out_channels=(32, 32, 32, 32),
                decoder_block_out_channels=(32, 32, 32, 32),
                layers_per_block=(1, 1, 1, 1, 1),
            ).eval(),
            text_encoder=_t5(width=32),
            tokenizer=_t5_tokenizer(),
            force_zeros_for_empty_prompt=True,
        )


def tiny_kandinsky5_video(seed: int = 0) -> Kandinsky5T2VPipeline:
    """Kandinsky 5: texts are padded without a mask."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Kandinsky5T2VPipeline(
            transformer=_kandinsky5_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=_hunyuan_video_vae(),
            text_encoder=_qwen25_vl(),
            tokenizer=_chat_tokenizer(),  # stands for the processor, whose class needs torchvision
            text_encoder_2=CLIPTextModel(_clip_config()).eval(),
            tokenizer_2=_clip_tokenizer(),
        )


# As `TINY`: how each is asked for its smallest video, beside prompts, generators and steps.
TINY_VIDEOS: dict[str, tuple[Callable[..., DiffusionPipeline], dict[str, Any]]] = {
    "WanPipeline": (
        tiny_wan,
        dict(height=16, width=16, num_frames=5, max_sequence_length=24, guidance_scale=1.0),
    ),
    "WanPipeline, expand_timesteps": (
        tiny_wan_expanded,
        dict(height=16, width=16, num_frames=5, max_sequence_length=24, guidance_scale=1.0),
    ),
    "SkyReelsV2Pipeline": (
        tiny_skyreels,
        dict(height=16, width=16, num_frames=5, max_sequence_length=24, guidance_scale=1.0),
    ),
    "SanaVideoPipeline": (
        tiny_sana_video,
        dict(
            height=32,
            width=32,
            frames=5,
            max_sequence_length=24,
            guidance_scale=1.0,
            use_resolution_binning=False,
            complex_human_instruction=None,
        ),
    ),
    "LTXPipeline": (
        tiny_ltx,
        dict(height=32, width=32, num_frames=5, max_sequence_length=24, guidance_scale=1.0),
    ),
    "LTXConditionPipeline": (
        tiny_ltx_condition,
        dict(height=32, width=32, num_frames=5, max_sequence_length=24, guidance_scale=1.0),
    ),
    "HunyuanVideoPipeline": (
        tiny_hunyuan_video,
        dict(height=16, width=16, num_frames=5, max_sequence_length=24, guidance_scale=6.0),
    ),
    "MochiPipeline": (
        tiny_mochi,
        dict(height=16, width=16, num_frames=7, max_sequence_length=24, guidance_scale=1.0),
    ),
    "Kandinsky5T2VPipeline": (
        tiny_kandinsky5_video,  # its template alone is more than 600 tokens of this tokenizer
        dict(height=16, width=16, num_frames=5, max_sequence_length=1000, guidance_scale=1.0),
    ),
}
