# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Finding a saved LoRA adapter, putting it on a pipeline, and taking it off again."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .loading import load_pipeline
from .lora_layouts import DESCRIPTIONS, Layout, find_layout, to_diffusers_layout


# Fields of a LoRA's configuration that say how its weights are used, or nothing that is done on loading. Others must
# have their defaults: there are some that import a module by name (`megatron_core`), change the base weights before
# the adapter's come (`init_lora_weights="pissa"`) or repeat layers of the model (`layer_replication`).
_PLAIN_FIELDS = frozenset(
    "r lora_alpha rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern "
    "use_rslora use_dora lora_bias bias lora_dropout fan_in_fan_out inference_mode "
    "peft_type task_type peft_version revision base_model_name_or_path auto_mapping".split()
)
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PLAIN_INITIALIZATIONS = (True, False, "gaussian")  # which the adapter's weights replace


def find_adapter(adapter: str | Path) -> Path:
    """
    The file of a LoRA adapter.

    Args:
        adapter (`str` or `Path`):
            A Hub id or a folder with `pytorch_lora_weights.safetensors` (or PEFT's `adapter_model.safetensors` and
            `adapter_config.json`), or a `.safetensors` file.

    Returns:
        `Path`: the file, in the Hub's cache for a Hub id.

    Raises:
        `ValueError`: for a file of another kind than safetensors.
        `OSError`: where there is no such file, folder or repository.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        for name in (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"The folder `{adapter}` holds no adapter (no `{LORA_WEIGHT_NAME_SAFE}`).")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter `{adapter}` is not a .safetensors file; no other kind is loaded.")
        return path
    if path.suffix == ".safetensors":
        raise FileNotFoundError(f"The adapter `{adapter}` does not exist.")
    try:
        try:
            return Path(hf_hub_download(str(adapter), LORA_WEIGHT_NAME_SAFE))
        except RemoteEntryNotFoundError:
            hf_hub_download(str(adapter), PEFT_CONFIG)  # into the same folder of the cache
            return Path(hf_hub_download(str(adapter), PEFT_WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"There is no adapter `{adapter}`: it is neither a folder nor a file here, and no "
            f"`{LORA_WEIGHT_NAME_SAFE}` could be fetched from a Hub repository of that name. The cause: {error}"
        ) from error


def adapter_metadata(file: str | Path) -> dict[str, Any]:
    """
    The LoRA configuration in an adapter's file: `"<component>.<field>"` -> value, empty where the file has none.

    Args:
        file (`str` or `Path`):
            A safetensors file.

    Raises:
        `ValueError`: the file is damaged or no safetensors file, or its configuration is no JSON object.
    """
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}). Download or save it again.") from error
    try:
        metadata = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The metadata in {file} is not JSON ({error}). Download or save it again.") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata in {file} is a {type(metadata).__name__}, not a JSON object. Save it again.")
    return metadata


def load_adapter(
    pipeline: str | os.PathLike | DiffusionPipeline,
    adapter: str | os.PathLike,
    *,
    weight: float = 1.0,
    adapter_name: str = "default",
) -> DiffusionPipeline:
    """
    Load an adapter onto its base pipeline, from safetensors only.

    Unlike `pipeline.load_lora_weights` it refuses an adapter that does not fit the pipeline, before it changes
    anything, instead of leaving out what does not fit. Files of other layouts (PEFT's, ComfyUI's, kohya's, without a
    prefix) are loaded where only their keys have to be renamed.

    Args:
        pipeline (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            The base pipeline: a Hub id, a local folder (both loaded in fp32), or the object, which is changed in
            place: it gets the adapter and uses it. Other adapters that it has stay, but are switched off; use
            several together with `pipeline.set_adapters([...], [...])`.
        adapter (`str` or `os.PathLike`):
            Hub id (`"user/name"`), a folder with `pytorch_lora_weights.safetensors`, or a `.safetensors` file. One of
            PEFT needs its `adapter_config.json` beside it, where its alpha is.
        weight (`float`, *optional*, defaults to `1.0`):
            How much of the adapter's change is applied: 0 is the base pipeline, 1 what was trained.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter's name in the pipeline.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline.

    Raises:
        `OSError`: there is no adapter at that place.
        `ValueError`: the file is no safetensors file, was made for another model, is in a layout that cannot be
            converted, holds values that are not finite or has metadata that asks for more than plain LoRA; `weight` is
            not finite; or the pipeline has an adapter of that name, or cannot have one (`"half"` and other methods of
            modules, names with dots).
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight} is not finite. Pass a number such as 1.0.")
    pipeline = load_pipeline(pipeline)
    if adapter_name in adapter_names(pipeline):
        raise ValueError(
            f"The pipeline has an adapter {adapter_name!r} already. Pass another `adapter_name`, or remove it with "
            f"`pipeline.delete_adapters({adapter_name!r})`."
        )
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})  # where peft will put it
    except KeyError as error:
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of a module ({error}). Pass another, such as 'default'."
        ) from error
    file = find_adapter(os.fspath(adapter))
    config = adapter_metadata(file)
    _refuse_more_than_lora(config, str(adapter))
    state = load_file(file)
    if (layout := find_layout(state)) == "PEFT":
        config = _peft_config(file)
        _refuse_more_than_lora(config, str(adapter))
    source, state = _with_own_names(pipeline, file, layout, state, config)
    _check_fits(pipeline, state, str(adapter))
    verbosity = logging.get_verbosity()
    if not any(key.startswith("text_encoder") for key in state):
        logging.set_verbosity_error()  # diffusers warns of each text encoder that the file has nothing for
    try:
        pipeline.load_lora_weights(source, adapter_name=adapter_name, use_safetensors=True)
    finally:
        logging.set_verbosity(verbosity)
    pipeline.set_adapters(adapter_name, weight)
    return pipeline


@contextmanager
def loaded_adapter(pipeline: DiffusionPipeline, file: Path | None) -> Iterator[None]:
    """
    Within the context the pipeline has the adapter; after it, also after an error, it is as it was.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline without adapters.
        file (`Path`, *optional*):
            The adapter, see [`find_adapter`]. `None` changes nothing.

    Raises:
        `ValueError`: if the pipeline has adapters already, or the adapter was made for another model.
    """
    if file is None:
        yield
        return
    if present := adapter_names(pipeline):
        raise ValueError(
            f"The pipeline has adapters already ({', '.join(present)}), so `{file}` would be evaluated on top of "
            "them. Pass a pipeline without adapters, or evaluate the ones that are there with `adapter=None`."
        )
    try:
        load_adapter(pipeline, file)
        yield
    finally:
        pipeline.unload_lora_weights()


def adapter_names(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the adapters of all components of a pipeline, sorted."""
    return sorted({name for names in pipeline.get_list_adapters().values() for name in names})


def _refuse_more_than_lora(config: Mapping[str, Any], adapter: str) -> None:
    """Raise a `ValueError` where an adapter's configuration asks for more than its own weights."""
    for key, value in config.items():
        field = key.rpartition(".")[2]
        plain = field in _PLAIN_FIELDS or (field == "init_lora_weights" and value in _PLAIN_INITIALIZATIONS)
        if not plain and value and value != LoraConfig().to_dict().get(field):
            raise ValueError(
                f"The metadata of the adapter `{adapter}` sets {key!r} to {str(value)[:80]!r}, which is more than "
                "plain LoRA and is not loaded: it could change the pipeline beyond the adapter's own weights. Ask its "
                "author for an adapter without it."
            )


def _peft_config(file: Path) -> dict[str, Any]:
    """The configuration that PEFT writes beside an adapter, without which nobody knows its strength."""
    path = file.with_name(PEFT_CONFIG)
    if not path.is_file():
        raise ValueError(
            f"The adapter `{file}` is in {DESCRIPTIONS['PEFT']}, whose alpha is in a file of its own, and there is no "
            f"`{PEFT_CONFIG}` beside it. Put it there, or load the adapter where it was trained and save it with "
            "`trl_marble.hub.save_adapter`."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not JSON ({error}). Download or save it again.") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"`{path}` is not the configuration of a LoRA. No other adapters are loaded.")
    return config


def _with_own_names(
    pipeline: DiffusionPipeline, file: Path, layout: Layout, state: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[str | dict[str, Tensor], dict[str, Tensor]]:
    """
    What to load an adapter from, the file or renamed weights, and its weights under the names that diffusers has.

    Layouts that diffusers converts by itself, which depends on the pipeline, are left to it; but not PEFT's, since it
    would not look for alpha.
    """
    try:
        converted = pipeline.lora_state_dict(str(file), use_safetensors=True)
    except Exception:
        if layout == "diffusers":
            raise
        converted = {}  # a converter for another model, that did not find what it needs
    # What it did not convert ("transformer.<layer>.lora_down.weight", ".alpha") it cannot load either.
    is_converted = converted and layout != "PEFT" and find_layout(converted) != "older diffusers"
    if layout == "diffusers" or (is_converted and not _find_misfits(pipeline, converted)):
        return str(file), converted
    problem = f"its keys, such as {min(state)!r}, are no weights of a LoRA"
    if layout != "unknown":
        try:
            renamed = to_diffusers_layout(state, config, _layer_shapes(pipeline))
            if len(_find_misfits(pipeline, renamed)) < len(renamed):
                return renamed, renamed  # of layers that the pipeline knows; whether all fit is checked next
            problem = f"the {type(pipeline).__name__} has no layer of the name and shape of {min(state)!r}"
        except ValueError as error:
            problem = str(error)
    raise ValueError(
        f"The adapter `{file}` is in {DESCRIPTIONS[layout]}, not in diffusers', and cannot be converted: {problem}. "
        "Pass an adapter whose keys are 'transformer.<layer>.lora_A.weight' and 'transformer.<layer>.lora_B.weight', "
        "with the names that diffusers gives the layers. Where the layers have those of the model's original code, "
        "the program that wrote it may export it for diffusers."
    )


def _layer_shapes(pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of each of the transformers' layers, by the layer's name in the pipeline."""
    # Where a layer has an adapter already, its own weight lies one level deeper.
    shapes: dict[str, tuple[int, ...]] = {}
    for component, model in pipeline.components.items():
        if component.startswith("transformer") and model is not None:
            for name, weight in model.named_parameters():
                shapes[f"{component}.{name}".removesuffix(".weight").removesuffix(".base_layer")] = weight.shape
            for name, layer in model.named_modules():
                if isinstance(layer, nn.Linear):  # quantized weights are packed, so that theirs is another shape
                    shapes[f"{component}.{name}".removesuffix(".base_layer")] = (layer.out_features, layer.in_features)
    return shapes


def _find_misfits(pipeline: DiffusionPipeline, state: Mapping[str, Tensor]) -> list[str]:
    """The keys of a LoRA state dict whose layer the pipeline has not, or in another shape."""
    shapes = _layer_shapes(pipeline)
    misfits = []
    for key, value in state.items():
        layer, _, part = key.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        if layer not in shapes:
            # Text encoders go by other names in files than in memory; diffusers sorts that out.
            if not layer.startswith("text_encoder"):
                misfits.append(key)
            continue
        shape = shapes[layer]
        fits = {"lora_A": value.shape[1:] == shape[1:], "lora_B": value.shape[:1] == shape[:1]}
        if not fits.get(part, True):
            misfits.append(key)
    return misfits


def _check_fits(pipeline: DiffusionPipeline, state: Mapping[str, Tensor], adapter: str) -> None:
    """Raise a `ValueError` where a LoRA state dict has weights for layers that the pipeline has not, or is broken."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key!r} in the adapter {adapter!r} is not finite; the adapter is broken.")
    misfits = _find_misfits(pipeline, state)
    if misfits or not state:
        first = f" (first: {misfits[0]!r})" if misfits else ""
        raise ValueError(
            f"The adapter {adapter!r} was made for another model: {len(misfits)} of its {len(state)} weights do not "
            f"fit the {type(pipeline).__name__}{first}. Load it onto the base model that its card names."
        )
