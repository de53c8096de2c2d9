# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Embeddings are computed in chunks, once, and found again for the same encoders and settings only."""

import pytest
import tiny
import tiny_families
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from trl_marble.pipelines import FlowPipeline, embedding_cache
from trl_marble.pipelines.embedding_cache import encoder_fingerprint, join_rows


PROMPTS = ["a red cat", "two very large dogs", "six", "a red cat"]
FAMILIES = ["StableDiffusion3Pipeline", "QwenImagePipeline", "ZImagePipeline", "Krea2Pipeline"]


def make_flow(name: str, **settings) -> FlowPipeline:
    make, call = tiny_families.TINY[name]
    own = {key: call[key] for key in ("height", "width", "max_sequence_length") if key in call}
    return FlowPipeline(make(), **(own | settings))


def count_runs(flow: FlowPipeline) -> list[int]:
    runs, own = [], flow.pipeline.encode_prompt

    def encode_prompt(prompt=None, **kwargs):
        if prompt is not None:  # `__call__` has the embeddings
            runs.append(len(prompt))
        return own(prompt, **kwargs)

    flow.pipeline.encode_prompt = encode_prompt
    return runs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_in_chunks_and_from_the_disk_velocities_are_the_same(name, tmp_path, monkeypatch):
    flow = make_flow(name, guidance_scale=2.0)
    together = flow.encode(PROMPTS)
    x_t = torch.randn(flow.rollout(together, [1, 2, 3, 4], 2).latents.shape)
    inputs = x_t, torch.tensor([0.9, 0.4, 0.6, 0.5])
    expected = flow.velocity(*inputs, together)
    monkeypatch.setattr(embedding_cache, "PROMPTS_AT_ONCE", 2)
    runs = count_runs(flow)
    torch.testing.assert_close(flow.velocity(*inputs, flow.encode(PROMPTS)), expected, rtol=0, atol=2e-5)
    assert max(runs) == 2
    flow.cache_embeddings(tmp_path)
    first = flow.velocity(*inputs, flow.encode(PROMPTS))
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-5)
    runs.clear()
    flow.drop_text_encoders()
    assert torch.equal(flow.velocity(*inputs, flow.encode(PROMPTS)), first)
    assert flow.rollout(flow.encode(PROMPTS), [1, 2, 3, 4], 2).latents.isfinite().all()
    assert runs == [] and all(file.suffix == ".safetensors" for file in tmp_path.rglob("*.*"))
    with pytest.raises(ValueError, match="'another' is not in the cache.*cache_embeddings=False"):
        flow.encode(["another"])


def test_other_settings_and_damaged_files_find_nothing(tmp_path):
    def runs(change=lambda flow: None, **settings) -> list[int]:
        flow = FlowPipeline(tiny.tiny_sd3(), **({"max_sequence_length": 24} | settings))
        change(flow)
        flow.cache_embeddings(tmp_path)
        counted = count_runs(flow)
        flow.encode(PROMPTS)
        return counted

    assert runs() == [3] and runs() == []
    assert runs(max_sequence_length=20) == [3] and runs(guidance_scale=2.0) == [3]
    assert runs(lambda flow: flow.transformer.to(torch.bfloat16)) == [3]
    assert runs() == []
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert runs() == [3] and runs() == []


def last_number(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().view(-1)[-1]


def add_adapter(pipeline) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    # `add_adapter` of transformers does the same; version 5.24 wants a peft that is not released yet.
    inject_adapter_in_model(adapter, pipeline.text_encoder)


CHANGES = {
    # Of the last weight of an encoder, one number at its end.
    "weight": lambda pipeline: last_number(list(pipeline.text_encoder_2.parameters())[-1]).add_(1e-3),
    "buffer": lambda pipeline: pipeline.text_encoder.register_buffer("offset", torch.ones(1)),
    "dtype": lambda pipeline: pipeline.text_encoder_3.to(torch.bfloat16),
    "adapter": add_adapter,
    "configuration": lambda pipeline: pipeline.text_encoder.config.update({"hidden_act": "gelu"}),
    "vocabulary": lambda pipeline: pipeline.tokenizer_3.add_tokens("cat"),
    "padding": lambda pipeline: setattr(pipeline.tokenizer, "padding_side", "left"),
    "attribute": lambda pipeline: setattr(pipeline, "tokenizer_max_length", 5),
    "no encoder": lambda pipeline: setattr(pipeline, "text_encoder_3", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_covers_whatever_changes_an_embedding(change):
    pipeline = tiny.tiny_sd3()
    before = encoder_fingerprint(pipeline, [])
    assert encoder_fingerprint(tiny.tiny_sd3(), []) == before  # of equal weights, in other objects
    CHANGES[change](pipeline)
    assert encoder_fingerprint(pipeline, []) != before


def test_the_fingerprint_covers_which_layers_of_an_encoder_are_read():
    pipeline = tiny_families.TINY["Krea2Pipeline"][0]()
    before = encoder_fingerprint(pipeline, [])
    vars(pipeline)["text_encoder_select_layers"] = (0, 2)  # diffusers sets it only when a pipeline is made
    assert encoder_fingerprint(pipeline, []) != before


def test_the_fingerprint_covers_how_strong_an_adapter_is_and_no_other_component():
    pipeline = tiny.tiny_sd3()
    add_adapter(pipeline)
    before = encoder_fingerprint(pipeline, [])
    with torch.no_grad():
        last_number(next(pipeline.transformer.parameters())).add_(1)
        last_number(next(pipeline.vae.parameters())).add_(1)
    assert encoder_fingerprint(pipeline, []) == before
    for module in pipeline.text_encoder.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.5)
    assert encoder_fingerprint(pipeline, []) != before


def test_what_takes_text_only_has_no_embeddings(tmp_path):
    with pytest.raises(ValueError, match="BriaFiboPipeline takes no embeddings .* Set cache_embeddings=False"):
        make_flow("BriaFiboPipeline").cache_embeddings(tmp_path)


def test_rows_of_different_lengths_need_a_mask():
    short, long = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    joined = join_rows([{"prompt_embeds": short}, {"prompt_embeds": long, "prompt_embeds_mask": torch.ones(1, 4)}])
    assert joined["prompt_embeds_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert joined["prompt_embeds"].shape == (2, 4, 3)
    with pytest.raises(ValueError, match="`prompt_embeds` of different lengths"):
        join_rows([{"prompt_embeds": short}, {"prompt_embeds": long}])
