# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest
import tiny
import torch
from peft import LoraConfig

from trl_marble.pipelines import (
    FlowPipeline,
    add_trainable_adapter,
    find_family,
    load_pipeline,
    lora_config,
)


def test_a_folder_gives_the_same_weights_and_pictures(tmp_path):
    pipeline = tiny.tiny_sd3()
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is type(pipeline)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name
    images = []
    for each in (pipeline, loaded, load_pipeline(str(tmp_path))):
        flow = FlowPipeline(each, max_sequence_length=16)
        images.append(flow.rollout(flow.encode(["a cat"]), [3], 2, output_type="pt").images)
    # Not bit for bit: loaded tensors lie elsewhere in memory, and the order of CPU sums follows their alignment.
    torch.testing.assert_close(images[1], images[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images[2], images[0], rtol=1e-5, atol=1e-5)


def test_dtype_of_what_is_loaded(tmp_path):
    tiny.tiny_sd3().save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=torch.bfloat16)
    assert loaded.transformer.dtype == loaded.text_encoder.dtype == loaded.vae.dtype == torch.bfloat16
    assert load_pipeline(tmp_path).transformer.dtype == torch.float32


def test_a_pipeline_passes_through():
    pipeline = tiny.tiny_sd3()
    assert load_pipeline(pipeline) is pipeline
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 .*pipeline.to\(torch.bfloat16\)"):
        load_pipeline(pipeline, dtype=torch.bfloat16)


def test_pickled_weights_are_refused(tmp_path):
    tiny.tiny_sd3().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("transformer/*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(tmp_path)


def test_places_without_a_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no model_index.json"):
        load_pipeline(tmp_path)
    with pytest.raises(OSError, match="missing/folder.*local folder or a Hub model id"):
        load_pipeline("missing/folder")
    with pytest.raises(OSError, match="not/a/hub/id.*local folder or a Hub model id"):
        load_pipeline("not/a/hub/id")
    with pytest.raises(TypeError, match="got int"):
        load_pipeline(3)


def test_default_lora():
    config = lora_config(tiny.tiny_sd3())
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (32, 64, "gaussian")
    assert len(config.target_modules) == 8
    flux = find_family(tiny.tiny_flux())
    assert set(lora_config(flux, r=4, lora_alpha=8).target_modules) == set(flux.lora_target_modules)


@pytest.mark.parametrize("make", [tiny.tiny_sd3, tiny.tiny_flux])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_is_trainable_and_in_fp32(make, dtype):
    pipeline = make().to(dtype=dtype)
    trainable = add_trainable_adapter(pipeline, lora_config(pipeline, r=4), adapter_name="mine")
    assert all("lora_" in name and ".mine." in name for name, _ in trainable)
    assert {parameter.dtype for _, parameter in trainable} == {torch.float32}
    assert pipeline.transformer.dtype == dtype
    ids = {id(parameter) for _, parameter in trainable}
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                assert parameter.requires_grad == (id(parameter) in ids)
                assert parameter.dtype == (torch.float32 if id(parameter) in ids else dtype)


def test_every_default_target_exists_in_the_transformer():
    for pipeline in (tiny.tiny_sd3(), tiny.tiny_flux()):
        names = [name for name, _ in pipeline.transformer.named_modules()]
        for target in find_family(pipeline).lora_target_modules:
            assert any(name.endswith("." + target) for name in names), target


def test_a_new_adapter_changes_nothing_until_it_is_trained():
    pipeline = tiny.tiny_sd3()
    flow = FlowPipeline(pipeline, max_sequence_length=16)
    conditioning = flow.encode(["a cat"])
    before = flow.rollout(conditioning, [3], 2).latents
    add_trainable_adapter(pipeline, lora_config(pipeline))
    assert torch.equal(flow.rollout(conditioning, [3], 2).latents, before)


def test_a_transformer_with_adapters_is_refused():
    pipeline = tiny.tiny_sd3()
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["attn.to_q"]), adapter_name="theirs")
    with pytest.raises(ValueError, match=r"has adapters already \(theirs\).*fuse_lora.*unload_lora_weights"):
        add_trainable_adapter(pipeline, lora_config(pipeline))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert add_trainable_adapter(pipeline, lora_config(pipeline))


def test_what_an_adapter_file_cannot_hold_is_refused():
    pipeline = tiny.tiny_sd3()
    with pytest.raises(ValueError, match=r"modules_to_save=\['proj_out'\]"):
        add_trainable_adapter(pipeline, LoraConfig(target_modules=["attn.to_q"], modules_to_save=["proj_out"]))
    with pytest.raises(ValueError, match="bias='all'"):
        add_trainable_adapter(pipeline, LoraConfig(target_modules=["attn.to_q"], bias="all"))
    with pytest.raises(TypeError, match="got dict"):
        add_trainable_adapter(pipeline, {"r": 4})


def test_the_callers_lora_config_is_not_changed():
    config = LoraConfig(target_modules=["attn.to_q"], base_model_name_or_path="mine")
    before = config.to_dict()
    add_trainable_adapter(tiny.tiny_sd3(), config)
    assert config.to_dict() == before
