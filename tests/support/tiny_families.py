# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Tiny random pipelines of every family, made without network, as those of tiny.py: the same seed gives the same weights.

They are as small as each class allows: images of 16 to 64 px, a fraction of a second to build, milliseconds a call.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny import CHARACTERS, _clip_config, _clip_tokenizer, _t5, _t5_tokenizer, _vae, tiny_flux, tiny_sd3
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)


# Every word here is one token of the tiny chat tokenizers, so that the fixed texts that pipelines put around a prompt
# have as many tokens as with the real tokenizers: Qwen-Image drops the first 34 by number.
TEMPLATE_WORDS = re.findall(
    r" ?\w+",
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:\nuser\nassistant\n"  # Qwen-Image, Krea 2
    "You are a prompt engineer. Describe"  # Kandinsky 5
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."  # Flux.2
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start>",  # Lumina 2
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- Flux.2


def tiny_flux2(seed: int = 0) -> Flux2Pipeline:
    """Flux.2 [dev]: one embedded guidance value, 30 layers of a text encoder of which it reads three."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Flux2Pipeline(
            transformer=_flux2_transformer(guidance_embeds=True),
            scheduler=_dynamic_euler(),
            vae=_flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(_mistral3_config(num_hidden_layers=30)).eval(),
            tokenizer=_chat_tokenizer(),
        )


def tiny_flux2_klein(seed: int = 0) -> Flux2KleinPipeline:
    """Flux.2 [klein], a base model: the distilled ones ignore their guidance scale."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Flux2KleinPipeline(
            transformer=_flux2_transformer(guidance_embeds=False),
            scheduler=_dynamic_euler(),
            vae=_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(_qwen3_config(num_hidden_layers=27)).eval(),
            tokenizer=_chat_tokenizer(),
            is_distilled=False,
        )


def _flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def _flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        sample_size=16,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


# --- Qwen-Image, Z-Image


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image: its guidance scale is `true_cfg_scale`, and its schedule is stretched to end at 0.02."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QwenImagePipeline(
            **_qwen_image_denoiser(),
            vae=_qwen_image_vae(),
            text_encoder=_qwen25_vl(),
            tokenizer=_chat_tokenizer(),
        )


def _qwen_image_denoiser() -> dict[str, Any]:
    """The transformer and the scheduler."""
    return dict(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            time_shift_type="exponential",
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )


def _qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    ).eval()


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    """Z-Image: lists of text embeddings of different lengths; its output is data - noise, and guidance is off at 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ).eval()
        with torch.no_grad():  # made with torch.empty
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
        return ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=Qwen3Model(_qwen3_config(num_hidden_layers=2)).eval(),
            tokenizer=_chat_tokenizer(),
        )


# --- Sana, Lumina 2


def tiny_sana(seed: int = 0) -> SanaPipeline:
    """Sana: its own solver is a multistep one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SanaPipeline(
            transformer=SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=8,
                sample_size=8,
            ).eval(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            vae=_dc_ae(),
            text_encoder=_gemma2(),
            tokenizer=_gemma_tokenizer(),
        )


def _dc_ae() -> AutoencoderDC:
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    ).eval()


def tiny_lumina2(seed: int = 0) -> Lumina2Pipeline:
    """Lumina 2: a boolean mask of the text; its output is data - noise, and it counts time from noise to data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                hidden_size=32,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(8, 4, 4),
                axes_lens=(300, 32, 32),
                cap_feat_dim=8,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=_vae_of_factor_8(),
            text_encoder=_gemma2(),
            tokenizer=_gemma_tokenizer(),
        )


# --- HiDream, AuraFlow, Chroma, CogView4


def tiny_hidream(seed: int = 0) -> HiDreamImagePipeline:
    """Four text encoders; a mixture of experts whose load-balancing loss runs in training mode only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = HiDreamImagePipeline(
            transformer=HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_channels=[32, 16],
                text_emb_dim=64,
                num_routed_experts=2,
                num_activated_experts=2,
                axes_dims_rope=(8, 4, 4),
                max_resolution=(8, 8),
                llama_layers=[0, 1],
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=CLIPTextModelWithProjection(_clip_config()).eval(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(width=32),
            tokenizer_3=_t5_tokenizer(),
            text_encoder_4=LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    vocab_size=400,
                    attn_implementation="eager",
                )
            ).eval(),
            tokenizer_4=_chat_tokenizer(),
        )
        pipeline.default_sample_size = 8  # it scales every size that it is asked for to the area of its default
        return pipeline


def tiny_aura_flow(seed: int = 0) -> AuraFlowPipeline:
    """AuraFlow: one time for all samples of a call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ).eval()
        # The gates of the attention come from the embedded time. A random one is so small that prompts hardly matter.
        with torch.no_grad():
            transformer.time_step_proj.linear_2.weight.mul_(10)
        return AuraFlowPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            vae=_vae(),
            text_encoder=_umt5(),
            tokenizer=_t5_tokenizer(),
        )


def tiny_chroma(seed: int = 0) -> ChromaPipeline:
    """Chroma: Flux without an embedded guidance value and with a mask of the text; guided by a negative prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ChromaPipeline(
            transformer=ChromaTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=64,
                approximator_hidden_dim=32,
                approximator_layers=1,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_t5(width=32),
            tokenizer=_t5_tokenizer(),
        )


def tiny_cogview4(seed: int = 0) -> CogView4Pipeline:
    """CogView4: texts are padded without a mask; the transformer is told the time before the scheduler's shift."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CogView4Pipeline(
            transformer=CogView4Transformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                text_embed_dim=32,
                time_embed_dim=8,
                condition_dim=4,
                sample_size=8,
                rope_axes_dim=(16, 16),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.25,
                max_shift=0.75,
                base_image_seq_len=256,
                time_shift_type="linear",
            ),
            vae=_vae(),
            text_encoder=GlmModel(
                GlmConfig(
                    hidden_size=32,
                    intermediate_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=8,
                    vocab_size=400,
                    pad_token_id=0,
                )
            ).eval(),
            tokenizer=_with_start(_chat_tokenizer(), "<|im_start|>"),
        )


# --- Krea 2, ERNIE-Image, Kandinsky 5, Bria FIBO, Ideogram 4


def tiny_krea2(seed: int = 0) -> Krea2Pipeline:
    """It stacks the hidden states of several layers: embeddings of shape [batch, tokens, layers, width]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Krea2Pipeline(
            transformer=Krea2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=32,
                text_hidden_dim=16,
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=16,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(8, 4, 4),
            ).eval(),
            scheduler=_dynamic_euler(),
            vae=_qwen_image_vae(),
            text_encoder=Qwen3VLModel(_qwen3_vl_config()).eval(),
            tokenizer=_chat_tokenizer(),
            text_encoder_select_layers=(1, 2),
            is_distilled=False,
        )


def tiny_ernie_image(seed: int = 0) -> ErnieImagePipeline:
    """Its text embeddings are a list of tensors of different lengths."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ErnieImagePipeline(
            transformer=_without_zeros(
                ErnieImageTransformer2DModel(
                    hidden_size=32,
                    num_attention_heads=2,
                    num_layers=2,
                    ffn_hidden_size=32,
                    in_channels=16,
                    out_channels=16,
                    patch_size=1,
                    text_in_dim=16,
                    rope_axes_dim=(8, 4, 4),
                )
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
            vae=_flux2_vae(),
            text_encoder=Mistral3Model(_mistral3_config(num_hidden_layers=2)).eval(),
            tokenizer=_chat_tokenizer(),
        )


def tiny_kandinsky5(seed: int = 0) -> Kandinsky5T2IPipeline:
    """Kandinsky 5: an image is a video of one frame; texts are padded without a mask, all samples share one time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = Kandinsky5T2IPipeline(
            transformer=_kandinsky5_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae_of_factor_8(),
            text_encoder=_qwen25_vl(),
            tokenizer=_chat_tokenizer(),  # stands for the processor, whose class needs torchvision
            text_encoder_2=CLIPTextModel(_clip_config()).eval(),
            tokenizer_2=_clip_tokenizer(),
        )
        pipeline.resolutions = [(32, 32)]  # it takes the nearest of its own, of which the least is 1024 x 1024
        return pipeline


def _kandinsky5_transformer() -> Kandinsky5Transformer3DModel:
    return _without_zeros(
        Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=32,
            time_dim=32,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(8, 4, 4),
        )
    ).eval()


def tiny_bria_fibo(seed: int = 0) -> BriaFiboPipeline:
    """It takes text only, no embeddings. The embedding table holds the number of its token for the empty prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BriaFiboPipeline(
            transformer=BriaFiboTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                text_encoder_dim=8,
                axes_dims_rope=[4, 4, 8],
            ).eval(),
            scheduler=_dynamic_euler(),
            vae=_wan_vae_of_factor_16(),
            text_encoder=SmolLM3ForCausalLM(
                SmolLM3Config(
                    hidden_size=8,
                    intermediate_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    vocab_size=128001,
                    pad_token_id=0,
                    bos_token_id=0,
                    eos_token_id=0,
                    max_position_embeddings=2048,
                )
            ).eval(),
            tokenizer=_chat_tokenizer(),
        )


def tiny_ideogram4(seed: int = 0) -> Ideogram4Pipeline:
    """Two transformers: the second, without text, is the negative branch of every guided step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = dict(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16 * 13,
            mrope_section=(4, 2, 2),
        )
        return Ideogram4Pipeline(
            transformer=Ideogram4Transformer2DModel(**settings).eval(),
            unconditional_transformer=Ideogram4Transformer2DModel(**settings).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_flux2_vae(),
            text_encoder=Qwen3VLModel(_qwen3_vl_config(num_hidden_layers=36)).eval(),
            tokenizer=_chat_tokenizer(),
        )


# --- parts


def _without_zeros(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that start at zero would make the output zero, or the prompt without effect, whatever the code does."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module


def _dynamic_euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def _chat_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, one per word of the templates, pads on the right."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=2048
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(sorted(set(TEMPLATE_WORDS)))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _gemma_tokenizer() -> GemmaTokenizer:
    """One token per character, one per word of the templates."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS, *CHARACTERS[:26].upper(), "<", ">", "-"]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=512
    )
    tokenizer.add_tokens(sorted(set(TEMPLATE_WORDS)))
    return _with_start(tokenizer, "<bos>")


def _with_start(tokenizer: PreTrainedTokenizerFast, token: str) -> PreTrainedTokenizerFast:
    """Every text starts with this token, so that the empty prompt is not an empty sequence."""
    start = (token, tokenizer.convert_tokens_to_ids(token))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[start])
    return tokenizer


def _wan_vae_of_factor_16() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, False],
        latents_mean=[0.1] * 16,
        latents_std=[1.5] * 16,
    ).eval()


def _vae_of_factor_8() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def _gemma2() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            hidden_size=8,
            intermediate_size=16,
            head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=400,
            attn_implementation="eager",
        )
    ).eval()


def _qwen3_config(num_hidden_layers: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=num_hidden_layers,
        vocab_size=400,
        max_position_embeddings=2048,
    )


def _qwen25_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rope_theta=1e6,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def _qwen3_vl_config(num_hidden_layers: int = 2) -> Qwen3VLConfig:
    text = dict(
        hidden_size=16,
        intermediate_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=num_hidden_layers,
        vocab_size=400,
        pad_token_id=0,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default"},
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    vision["deepstack_visual_indexes"] = [0]
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def _mistral3_config(num_hidden_layers: int) -> Mistral3Config:
    text = dict(
        model_type="mistral",
        hidden_size=16,
        intermediate_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=num_hidden_layers,
        vocab_size=400,
        max_position_embeddings=2048,
    )
    vision = dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return Mistral3Config(text_config=text, vision_config=vision)


def _umt5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


# How each is asked for its smallest image, beside prompts, generators and steps. Classifier-free guidance is off.
TINY: dict[str, tuple[Callable[..., DiffusionPipeline], dict[str, Any]]] = {
    "StableDiffusion3Pipeline": (tiny_sd3, dict(height=16, width=16, max_sequence_length=24, guidance_scale=1.0)),
    "FluxPipeline": (tiny_flux, dict(height=16, width=16, max_sequence_length=24, guidance_scale=3.5)),
    "Flux2Pipeline": (tiny_flux2, dict(height=16, width=16, max_sequence_length=64, guidance_scale=4.0)),
    "Flux2KleinPipeline": (tiny_flux2_klein, dict(height=16, width=16, max_sequence_length=32, guidance_scale=1.0)),
    "QwenImagePipeline": (tiny_qwen_image, dict(height=16, width=16, max_sequence_length=24, true_cfg_scale=1.0)),
    "ZImagePipeline": (tiny_z_image, dict(height=16, width=16, max_sequence_length=24, guidance_scale=0.0)),
    "SanaPipeline": (
        tiny_sana,
        dict(
            height=32,
            width=32,
            max_sequence_length=24,
            guidance_scale=1.0,
            use_resolution_binning=False,
            complex_human_instruction=None,
        ),
    ),
    "Lumina2Pipeline": (tiny_lumina2, dict(height=32, width=32, max_sequence_length=64, guidance_scale=1.0)),
    "HiDreamImagePipeline": (tiny_hidream, dict(height=16, width=16, max_sequence_length=24, guidance_scale=1.0)),
    "AuraFlowPipeline": (tiny_aura_flow, dict(height=16, width=16, max_sequence_length=24, guidance_scale=1.0)),
    "ChromaPipeline": (tiny_chroma, dict(height=16, width=16, max_sequence_length=24, guidance_scale=1.0)),
    "CogView4Pipeline": (tiny_cogview4, dict(height=16, width=16, max_sequence_length=24, guidance_scale=1.0)),
    "Krea2Pipeline": (tiny_krea2, dict(height=16, width=16, max_sequence_length=24, guidance_scale=0.0)),
    "ErnieImagePipeline": (tiny_ernie_image, dict(height=16, width=16, guidance_scale=1.0)),
    "Kandinsky5T2IPipeline": (
        tiny_kandinsky5,
        dict(height=32, width=32, max_sequence_length=24, guidance_scale=1.0),
    ),
    "BriaFiboPipeline": (tiny_bria_fibo, dict(height=64, width=64, max_sequence_length=24, guidance_scale=1.0)),
    "Ideogram4Pipeline": (
        tiny_ideogram4,
        dict(height=16, width=16, max_sequence_length=64, guidance_scale=1.0, guidance_schedule=None),
    ),
}
