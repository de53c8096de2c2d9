# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Embeddings are computed in chunks, once, and found again for the same encoders and settings only."""

import pytest
import tiny
import tiny_families
import torch

from trl_marble.pipelines import FlowPipeline, embedding_cache
from trl_marble.pipelines.embedding_cache import join_rows


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


def test_other_encoders_and_settings_find_nothing(tmp_path):
    def runs(change=lambda flow: None, **settings) -> list[int]:
        flow = FlowPipeline(tiny.tiny_sd3(), **({"max_sequence_length": 24} | settings))
        change(flow)
        flow.cache_embeddings(tmp_path)
        counted = count_runs(flow)
        flow.encode(PROMPTS)
        return counted

    def another_weight(flow):
        with torch.no_grad():
            next(flow.pipeline.text_encoder_2.parameters()).add_(1)

    assert runs() == [3] and runs() == []
    assert runs(max_sequence_length=20) == [3] and runs(guidance_scale=2.0) == [3]
    assert runs(another_weight) == [3]
    assert runs(lambda flow: flow.pipeline.tokenizer_3.add_tokens("cat")) == [3]
    assert runs() == []
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert runs() == [3] and runs() == []


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
