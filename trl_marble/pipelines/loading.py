# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Load a pipeline and add a trainable adapter to its transformer."""

import copy
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .assumed_family import assume_family
from .families import Family, find_family
from .quantization import lora_linear_classes


def load_pipeline(
    pipeline: str | os.PathLike | DiffusionPipeline, dtype: torch.dtype | None = None, **components: Any
) -> DiffusionPipeline:
    """
    Load a pipeline, from safetensors files only and without running any code from its repository.

    Args:
        pipeline (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            A model id on the Hub, a local folder, or a pipeline, which is returned as it is.
        dtype (`torch.dtype`, *optional*):
            The dtype of the loaded weights. Defaults to fp32.
        components (`Any`):
            Components to use instead of the loaded ones, such as `text_encoder_3=None` for none, and
            `quantization_config`, see [`quantization_config`].

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline.

    Raises:
        `TypeError`: `pipeline` is none of these.
        `ValueError`: both `dtype` and a pipeline object were passed; the object has its dtype already.
        `OSError`: there is no pipeline with safetensors weights under that name.
    """
    if isinstance(pipeline, DiffusionPipeline):
        if dtype is not None:
            raise ValueError(
                f"dtype={dtype} was given together with a loaded {type(pipeline).__name__}. Leave it out, and call "
                f"`pipeline.to({dtype})` first if the pipeline should change its dtype."
            )
        return pipeline
    if not isinstance(pipeline, (str, os.PathLike)):
        raise TypeError(
            "`pipeline` must be a Hub model id, a local folder or a diffusers.DiffusionPipeline, got "
            f"{type(pipeline).__name__}."
        )
    folder = Path(pipeline)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The folder {os.fspath(pipeline)!r} has no diffusers pipeline (no model_index.json). Pass the "
            "folder that `pipeline.save_pretrained` wrote."
        )
    try:
        return DiffusionPipeline.from_pretrained(os.fspath(pipeline), dtype=dtype, use_safetensors=True, **components)
    except (OSError, ValueError, AttributeError) as error:  # the last for a class that diffusers does not have
        raise OSError(
            f"No pipeline could be loaded from {os.fspath(pipeline)!r}. It must be a local folder or a Hub model id "
            f"of a diffusers pipeline with safetensors weights. The cause: {error}"
        ) from error


def lora_config(
    pipeline: DiffusionPipeline | Family,
    r: int = 32,
    lora_alpha: int = 64,
    target_modules: str | Sequence[str] | None = None,
) -> LoraConfig:
    """
    The LoRA of a pipeline, by default on the attention layers of its family, with gaussian initialization and rank and
    alpha of [DiffusionNFT](https://huggingface.co/papers/2509.16117).

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`] or `Family`):
            The pipeline, or its row of the table.
        r (`int`, *optional*, defaults to `32`):
            The rank.
        lora_alpha (`int`, *optional*, defaults to `64`):
            The scale of the update is `lora_alpha / r`.
        target_modules (`str` or `Sequence[str]`, *optional*):
            Other layers, as peft names them, such as `"all-linear"`.

    Returns:
        [`~peft.LoraConfig`]: the configuration.

    Raises:
        `ValueError`: the pipeline's class is known not to work.
    """
    family = pipeline if isinstance(pipeline, Family) else find_family(pipeline) or assume_family(pipeline)
    targets = family.lora_target_modules if target_modules is None else target_modules
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        init_lora_weights="gaussian",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def add_trainable_adapter(
    pipeline: DiffusionPipeline, peft_config: LoraConfig, adapter_name: str = "default"
) -> list[tuple[str, torch.nn.Parameter]]:
    """
    Freeze the whole pipeline and add a LoRA with fp32 weights to its transformer.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, changed in place.
        peft_config ([`~peft.LoraConfig`]):
            The LoRA. It is copied. Without `target_modules` it uses those of the pipeline's family.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter in the transformer.

    Returns:
        `list[tuple[str, torch.nn.Parameter]]`: names in the transformer and the trainable parameters, in the
        transformer's own order.

    Raises:
        `TypeError`: `peft_config` is not a `LoraConfig`.
        `ValueError`: the transformer has adapters already, or the configuration trains weights other than a LoRA,
            which an adapter file cannot contain.
    """
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"`peft_config` must be a peft.LoraConfig, got {type(peft_config).__name__}.")
    if peft_config.modules_to_save or peft_config.bias != "none":
        raise ValueError(
            f"modules_to_save={peft_config.modules_to_save!r} and bias={peft_config.bias!r} train weights that a "
            'diffusers LoRA file cannot contain. Leave modules_to_save unset and bias="none".'
        )
    transformer = pipeline.transformer
    if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
        raise ValueError(
            f"The transformer has adapters already ({', '.join(sorted(transformer.peft_config))}). Add them to "
            "the base weights with `pipeline.fuse_lora()` followed by `pipeline.unload_lora_weights()`, or remove "
            "them with `pipeline.unload_lora_weights()` alone."
        )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None and not peft_config.target_parameters:
        peft_config.target_modules = lora_config(pipeline).target_modules
    try:
        transformer.add_adapter(peft_config, adapter_name=adapter_name)
    except ValueError as error:  # such as names that no layer has
        linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        endings = sorted({re.sub(r"^.*\.(?=[^.\d])", "", name) for name in linears})
        raise ValueError(
            f"The adapter does not fit {type(transformer).__name__}: {error} Pass a `peft_config` whose "
            f"`target_modules` are among the endings of its linear layers' names: {', '.join(endings)}."
        ) from error
    trainable = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    for _, parameter in trainable:
        # peft creates them in the base's dtype; small updates to bf16 weights would be rounded away.
        parameter.data = parameter.data.to(torch.float32)
    return trainable


def plain_lora_linears(transformer: torch.nn.Module, names: Iterable[str]) -> list[torch.nn.Linear] | None:
    """
    Find the linear layers of the trainable weights, if the adapter is a plain LoRA on linear layers.

    Args:
        transformer (`torch.nn.Module`):
            The transformer with its adapter.
        names (`Iterable[str]`):
            The trainable parameters' names in the transformer, see [`add_trainable_adapter`].

    Returns:
        `list[torch.nn.Linear]`: the layer of each parameter, in order; `None` if a parameter is anything else, such as
        a magnitude of DoRA, a bias, or a convolution.
    """
    plain: dict[str, torch.nn.Linear] = {}
    classes = lora_linear_classes()
    for path, layer in transformer.named_modules():
        # A variant, such as DoRA, does not only multiply by the weights.
        if isinstance(layer, classes) and not layer.lora_variant:
            for part in ("lora_A", "lora_B"):
                for adapter, module in getattr(layer, part).items():
                    if type(module) is torch.nn.Linear:
                        plain[f"{path}.{part}.{adapter}.weight"] = module
    names = list(names)
    return [plain[name] for name in names] if all(name in plain for name in names) else None
