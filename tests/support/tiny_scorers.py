# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The five rewards of the paper with tiny random models, saved as on the Hub and loaded by the real code."""

import functools
from pathlib import Path

import torch
from tiny import _clip_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from trl_marble.rewards import CLIPScore, GenEval, HPSv2, OCRAccuracy, PickScore


def five_rewards(folder: Path, **settings) -> list:
    """PickScore, HPSv2, CLIPScore, OCR (the real reader) and GenEval."""
    for name in ("clip", "detector"):
        (folder / name).mkdir(parents=True)
    clip, detector = str(folder / "clip"), str(folder / "detector")
    _random_clip("quick_gelu").save_pretrained(clip)
    _clip_tokenizer().save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(clip)
    torch.save({"state_dict": open_clip_weights(_random_clip("gelu"))}, folder / "clip" / "HPS_v2.1_compressed.pt")
    tiny_detector().save_pretrained(detector)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(detector)
    return [
        PickScore(clip, clip, **settings),
        HPSv2(clip, tokenizer=clip, **settings),
        CLIPScore(clip, **settings),
        OCRAccuracy(num_threads=1),
        GenEval(detector, clip, **settings),
    ]


def _random_clip(activation):
    """With the head widths of ViT-H-14, which HPSv2 expects."""
    torch.manual_seed(3)
    alike = {"num_hidden_layers": 1, "intermediate_size": 64, "hidden_act": activation, "num_attention_heads": 2}
    words = {"hidden_size": 128, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 160, "image_size": 28, "patch_size": 14}
    return CLIPModel(CLIPConfig(text_config=alike | words, vision_config=alike | vision, projection_dim=16)).eval()


def open_clip_weights(model):
    """The weights of a CLIPModel in the layout of open_clip, written down tensor by tensor."""
    text, image = model.text_model, model.vision_model
    weights = {
        "positional_embedding": text.embeddings.position_embedding.weight,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "ln_final.weight": text.final_layer_norm.weight,
        "ln_final.bias": text.final_layer_norm.bias,
        "text_projection": model.text_projection.weight.T,
        "logit_scale": model.logit_scale,
        "visual.class_embedding": image.embeddings.class_embedding,
        "visual.positional_embedding": image.embeddings.position_embedding.weight,
        "visual.conv1.weight": image.embeddings.patch_embedding.weight,
        "visual.ln_pre.weight": image.pre_layrnorm.weight,
        "visual.ln_pre.bias": image.pre_layrnorm.bias,
        "visual.ln_post.weight": image.post_layernorm.weight,
        "visual.ln_post.bias": image.post_layernorm.bias,
        "visual.proj": model.visual_projection.weight.T,
    }
    for tower, prefix in ((text, ""), (image, "visual.")):
        for number, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}transformer.resblocks.{number}", layer.self_attn
            for kind in ("weight", "bias"):
                parts = [getattr(each, kind) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
                weights |= {
                    f"{block}.ln_1.{kind}": getattr(layer.layer_norm1, kind),
                    f"{block}.attn.in_proj_{kind}": torch.cat(parts),
                    f"{block}.attn.out_proj.{kind}": getattr(attention.out_proj, kind),
                    f"{block}.ln_2.{kind}": getattr(layer.layer_norm2, kind),
                    f"{block}.mlp.c_fc.{kind}": getattr(layer.mlp.fc1, kind),
                    f"{block}.mlp.c_proj.{kind}": getattr(layer.mlp.fc2, kind),
                }
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


@functools.cache
def tiny_detector(num_labels=80):
    """A random Mask2Former that is sure of what it sees: about ten objects an image, and others in other images."""
    torch.manual_seed(0)
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    sizes |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16)
    config = Mask2FormerConfig(
        backbone_config=swin,
        **sizes,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=num_labels,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.mul_(300)
        for parameter in model.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule(
            "2"
        ).parameters():
            parameter.mul_(150)
    return model
