# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
One LoRA that is K of them: each has a part of its ranks, and each sample its own shares of the parts.

K adapters with weights w_k together are one: sum_k w_k B_k A_k = [B_1 ... B_K] diag(w_1, ..., w_K) [A_1; ...; A_K].
So the parts are trained as one adapter, and mixing multiplies what comes out of its first factor, by K w_k. With equal
shares, w_k = 1 / K, that is 1: the adapter as it is, with its scale alpha / (K r), is the equal mixture of its parts.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .flow_pipeline import FlowPipeline
from .loading import add_trainable_adapter, lora_config, plain_lora_linears


def add_mixed_adapter(flow: FlowPipeline, peft_config: LoraConfig | None, parts: int) -> dict[str, nn.Parameter]:
    """
    Add one trainable LoRA in the place of several, see [`mixing`].

    Args:
        flow ([`FlowPipeline`]):
            The pipeline, changed in place.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Each of them. Defaults to that of the pipeline's family.
        parts (`int`):
            How many there are.

    Returns:
        `dict[str, nn.Parameter]`: the trainable weights by name.

    Raises:
        `ValueError`: they are no plain LoRA of linear layers, or do not fit the pipeline.
    """
    config = copy.deepcopy(peft_config) if peft_config is not None else lora_config(flow.pipeline)
    if config.use_rslora or config.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            f"`balance_slider=True` trains plain LoRAs, and `peft_config` has use_rslora={config.use_rslora} and "
            f"init_lora_weights={config.init_lora_weights!r}. Set use_rslora=False and init_lora_weights='gaussian'."
        )
    # Alpha stays: each part has its full strength where its share is 1, and a K-th of it as it is.
    config.r *= parts
    config.rank_pattern = {name: parts * rank for name, rank in (config.rank_pattern or {}).items()}
    trainable = dict(add_trainable_adapter(flow.pipeline, config))
    if plain_lora_linears(flow.transformer, trainable) is None:
        flow.pipeline.unload_lora_weights()  # for another try with the same pipeline
        raise ValueError(
            "`balance_slider=True` trains plain LoRAs of linear layers, and `peft_config` has others. Set "
            "use_dora=False and lora_bias=False, and leave convolutions and `target_parameters` out."
        )
    if config.init_lora_weights == "gaussian":  # whose standard deviation is 1 / rank: that of the parts
        for name, weight in trainable.items():
            if ".lora_A." in name:
                weight.data.mul_(parts)
    return trainable


@contextmanager
def mixing(flow: FlowPipeline, shares: Tensor | None, adapter_name: str = "default") -> Iterator[None]:
    """
    Apply an adapter of [`add_mixed_adapter`] to each sample with its own shares of the parts, in the context.

    Backward passes belong inside of it: with gradient checkpointing, layers run again there.

    Args:
        flow ([`FlowPipeline`]):
            The pipeline. Its calls have as many samples as there are rows of shares.
        shares (`Tensor` of shape `[B, K]`, *optional*):
            The share of each part, 1 together. One row is for any number of samples. `None` is for an adapter without
            parts, which stays as it is.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter's name in the transformer.

    Raises:
        `RuntimeError`: a layer's input does not have one row for each sample.
    """
    if shares is None:
        yield
        return
    layers = [module for module in flow.transformer.modules() if isinstance(module, LoraLayer)]
    pairs = [pair for layer in layers for pair in layer.lora_A.items()]
    firsts = [first for name, first in pairs if name == adapter_name and isinstance(first, nn.Linear)]
    number, parts = shares.shape
    scale = (parts * shares).to(flow.device, torch.float32)
    ranks = {first.out_features for first in firsts}
    factors = {rank: scale.repeat_interleave(rank // parts, dim=1) for rank in ranks}
    most = 2 if flow.is_guided else 1  # some pipelines put negative prompts before the others in one batch

    def multiply(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        factor = factors[module.out_features]
        if number > 1:
            copies, rest = divmod(len(output), number)
            if rest or not 1 <= copies <= most:
                raise RuntimeError(
                    f"`balance_slider=True` needs layers whose inputs have a row for each of the {number} samples, "
                    f"and one has {len(output)} rows. Choose other `target_modules`, or one sample at a time: "
                    "per_device_train_batch_size=1 and rollout_batch_size=1."
                )
            factor = factor.repeat(copies, 1)
        factor = factor.view(len(factor), *[1] * (output.ndim - 2), -1)
        return (output * factor).to(output.dtype)

    handles = [first.register_forward_hook(multiply) for first in firsts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
