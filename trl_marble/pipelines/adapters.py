# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find a saved LoRA adapter, load it onto a pipeline, and remove it again."""

import json
import math
import os
import warnings
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
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .loading import load_pipeline
from .lora_layouts import DESCRIPTIONS, Layout, find_layout, to_diffusers_layout


# Fields of a LoRA's configuration that say how its weights are used, or have no effect on loading. Others must have
# their defaults: some import a module by name (`megatron_core`), change the base weights before those of the adapter
# are loaded (`init_lora_weights="pissa"`) or repeat layers of the model (`layer_replication`).
_PLAIN_FIELDS = frozenset(
    "r lora_alpha rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern "
    "use_rslora use_dora lora_bias bias lora_dropout fan_in_fan_out inference_mode "
    "peft_type task_type peft_version revision base_model_name_or_path auto_mapping".split()
)
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PLAIN_INITIALIZATIONS = (True, False, "gaussian")  # which the adapter's weights replace


def find_adapter(adapter: str | Path) -> Path:
    """
    Find the file of a LoRA adapter.

    Args:
        adapter (`str` or `Path`):
            A Hub id or a folder with `pytorch_lora_weights.safetensors` (or PEFT's `adapter_model.safetensors` and
            `adapter_config.json`), or a `.safetensors` file.

    Returns:
        `Path`: the file; for a Hub id it is in the cache.

    Raises:
        `ValueError`: the file is not a safetensors file.
        `OSError`: there is no such file, folder or repository.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        for name in (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"The folder `{adapter}` has no adapter (no `{LORA_WEIGHT_NAME_SAFE}`).")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter `{adapter}` is not a .safetensors file; other files are not loaded.")
        return path
    if path.suffix == ".safetensors":
        raise FileNotFoundError(f"The adapter `{adapter}` does not exist.")
    try:
        try:
            return Path(hf_hub_download(str(adapter), LORA_WEIGHT_NAME_SAFE))
        except RemoteEntryNotFoundError:
            hf_hub_download(str(adapter), PEFT_CONFIG)  # to the same folder of the cache
            return Path(hf_hub_download(str(adapter), PEFT_WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"There is no adapter `{adapter}`: it is neither a folder nor a file on this machine, and no "
            f"`{LORA_WEIGHT_NAME_SAFE}` could be downloaded from a Hub repository of that name. The cause: {error}"
        ) from error


def adapter_metadata(file: str | Path) -> dict[str, Any]:
    """
    Read the LoRA configuration in an adapter's file: `"<component>.<field>"` -> value, empty if the file has none.

    Args:
        file (`str` or `Path`):
            A safetensors file.

    Raises:
        `ValueError`: the file is damaged or not a safetensors file, or its configuration is not a JSON object.
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
    Load an adapter onto its base pipeline, from safetensors files only.

    An adapter that does not fit the pipeline is refused before anything is changed; `pipeline.load_lora_weights` would
    leave out the weights that do not fit. Files in the layout of PEFT, ComfyUI or kohya, or without a prefix, are
    loaded where only their keys have to be renamed.

    Args:
        pipeline (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            The base pipeline: a Hub id, a local folder (both are loaded in fp32), or the object, which is changed in
            place: it has and uses the adapter afterwards. Its other adapters stay, but are switched off; to use
            several together, call `pipeline.set_adapters([...], [...])`.
        adapter (`str` or `os.PathLike`):
            Hub id (`"user/name"`), a folder with `pytorch_lora_weights.safetensors`, or a `.safetensors` file. An
            adapter in PEFT's layout needs its `adapter_config.json`, which has its alpha, in the same folder.
        weight (`float`, *optional*, defaults to `1.0`):
            How strongly the adapter is applied: 0 is the base pipeline, 1 the trained strength.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter's name in the pipeline.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline.

    Raises:
        `OSError`: there is no such adapter.
        `ValueError`: the file is not a safetensors file, was made for another model, is in a layout that cannot be
            converted, contains values that are not finite or has metadata that asks for more than plain LoRA; `weight`
            is not finite; or the pipeline has an adapter of that name already, or cannot have one (`"half"` and other
            methods of modules, names with dots).
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight} is not finite. Pass a number such as 1.0.")
    pipeline = load_pipeline(pipeline)
    _load(pipeline, adapter, adapter_name)
    pipeline.set_adapters(adapter_name, weight)
    return pipeline


def _load(pipeline: DiffusionPipeline, adapter: str | os.PathLike, adapter_name: str) -> dict[str, Tensor]:
    """Load an adapter, see [`load_adapter`]. Returns its weights by diffusers' names, as they are in the file."""
    if adapter_name in adapter_names(pipeline):
        raise ValueError(
            f"The pipeline has an adapter {adapter_name!r} already. Pass another `adapter_name`, or remove it with "
            f"`pipeline.delete_adapters({adapter_name!r})`."
        )
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})  # peft will put it into one
    except KeyError as error:
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of a module ({error}). Pass another, such as 'default'."
        ) from error
    file = find_adapter(os.fspath(adapter))
    config = adapter_metadata(file)
    _refuse_more_than_lora(config, str(adapter))
    state = load_file(file)
    if (layout := find_layout(state)) == "PEFT":
        config = _read_peft_config(file)
        _refuse_more_than_lora(config, str(adapter))
    source, state = _convert_layout(pipeline, file, layout, state, config)
    _check_fits(pipeline, state, str(adapter))
    verbosity = logging.get_verbosity()
    if not any(key.startswith("text_encoder") for key in state):
        logging.set_verbosity_error()  # diffusers warns about each text encoder that the file has no weights for
    try:
        pipeline.load_lora_weights(source, adapter_name=adapter_name, use_safetensors=True)
    finally:
        logging.set_verbosity(verbosity)
    return state


@contextmanager
def loaded_adapter(pipeline: DiffusionPipeline, file: Path | None) -> Iterator[None]:
    """
    Load an adapter for the time of a context, and remove it at its end, also after an error.

    Its weights have the precision of the file, as in training, and not that of the base.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline without adapters.
        file (`Path`, *optional*):
            The adapter, see [`find_adapter`]. `None` changes nothing.

    Raises:
        `ValueError`: the pipeline has adapters already, or the adapter was made for another model.
    """
    if file is None:
        yield
        return
    if present := adapter_names(pipeline):
        raise ValueError(
            f"The pipeline has adapters already ({', '.join(present)}), and `{file}` would be evaluated together with "
            "them. Pass a pipeline without adapters, or evaluate its own adapters with `adapter=None`."
        )
    try:
        _restore_precision(pipeline, _load(pipeline, file, "default"), "default")
        yield
    finally:
        pipeline.unload_lora_weights()


def load_beside_trained(
    pipeline: DiffusionPipeline, adapter: str | os.PathLike, adapter_name: str, trained_name: str = "default"
) -> dict[str, Tensor]:
    """
    Load a frozen adapter of the transformer beside the one that is trained, which stays in use.

    Its weights have the precision of the file.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline with the adapter that is trained, changed in place.
        adapter (`str` or `os.PathLike`):
            See [`find_adapter`].
        adapter_name (`str`):
            The name that it gets in the pipeline.
        trained_name (`str`, *optional*, defaults to `"default"`):
            The adapter that is trained.

    Returns:
        `dict[str, Tensor]`: its weights by diffusers' names.

    Raises:
        `OSError`: there is no such adapter.
        `ValueError`: it cannot be loaded onto this pipeline, see [`load_adapter`], or changes more than the
            transformer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of which there is to be one more
        state = _load(pipeline, adapter, adapter_name)
    if others := sorted({key.partition(".")[0] for key in state} - {"transformer"}):
        raise ValueError(
            f"The adapter `{adapter}` changes {', '.join(others)} beside the transformer, and only the transformer is "
            "trained. Pass an adapter of the transformer alone."
        )
    _restore_precision(pipeline, state, adapter_name)
    pipeline.transformer.set_adapter(trained_name)  # which also freezes all others
    return state


def _restore_precision(pipeline: DiffusionPipeline, state: Mapping[str, Tensor], adapter_name: str) -> None:
    """Give the weights of an adapter, which peft has rounded as the base is, the precision of the file."""
    for component in sorted({key.partition(".")[0] for key in state}):
        if not component.startswith("transformer"):
            continue  # the names of text encoders' layers in files are not those in memory
        model = getattr(pipeline, component)
        own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{component}.")}
        dtype = next(iter(own.values())).dtype
        rounded = [p for name, p in model.named_parameters() if adapter_name in name.split(".") and p.dtype != dtype]
        for parameter in rounded:
            parameter.data = parameter.data.to(dtype)
        if rounded:
            set_peft_model_state_dict(model, own, adapter_name)


def adapter_names(pipeline: DiffusionPipeline) -> list[str]:
    """The names of the adapters of all components of a pipeline, sorted."""
    return sorted({name for names in pipeline.get_list_adapters().values() for name in names})


def _refuse_more_than_lora(config: Mapping[str, Any], adapter: str) -> None:
    """Raise a `ValueError` if an adapter's configuration asks for more than loading its weights."""
    for key, value in config.items():
        field = key.rpartition(".")[2]
        plain = field in _PLAIN_FIELDS or (field == "init_lora_weights" and value in _PLAIN_INITIALIZATIONS)
        if not plain and value and value != LoraConfig().to_dict().get(field):
            raise ValueError(
                f"The metadata of the adapter `{adapter}` sets {key!r} to {str(value)[:80]!r}, which is more than "
                "plain LoRA and is not loaded: it could change more than the adapter's weights do. Ask its author "
                "for an adapter without it."
            )


def _read_peft_config(file: Path) -> dict[str, Any]:
    """The configuration that PEFT writes into the same folder, which has the adapter's alpha."""
    path = file.with_name(PEFT_CONFIG)
    if not path.is_file():
        raise ValueError(
            f"The adapter `{file}` is in {DESCRIPTIONS['PEFT']}, whose alpha is in a separate file, and there is no "
            f"`{PEFT_CONFIG}` in the same folder. Put it there, or load the adapter where it was trained and save it "
            "with `trl_marble.hub.save_adapter`."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not JSON ({error}). Download or save it again.") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"`{path}` is not the configuration of a LoRA. No other adapters are loaded.")
    return config


def _convert_layout(
    pipeline: DiffusionPipeline, file: Path, layout: Layout, state: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[str | dict[str, Tensor], dict[str, Tensor]]:
    """
    Convert an adapter to diffusers' names: what to load it from (the file or renamed weights), and its weights.

    Which layouts diffusers converts itself depends on the pipeline. It does so here, but not for PEFT's layout, where
    it would not look for alpha.
    """
    try:
        converted = pipeline.lora_state_dict(str(file), use_safetensors=True)
    except Exception:
        if layout == "diffusers":
            raise
        converted = {}  # by a converter for another model, which did not find the keys that it needs
    # What it did not convert ("transformer.<layer>.lora_down.weight", ".alpha") it cannot load either.
    is_converted = converted and layout != "PEFT" and find_layout(converted) != "older diffusers"
    if layout == "diffusers" or (is_converted and not _find_misfits(pipeline, converted)):
        return str(file), converted
    problem = f"its keys, such as {min(state)!r}, are not weights of a LoRA"
    if layout != "unknown":
        try:
            renamed = to_diffusers_layout(state, config, _layer_shapes(pipeline))
            if len(_find_misfits(pipeline, renamed)) < len(renamed):
                return renamed, renamed  # the pipeline has some of these layers; whether all fit is checked next
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
    """The shape of the weight of each layer of the transformers, by the layer's name in the pipeline."""
    # Where a layer has an adapter already, its own weight is one level deeper.
    shapes: dict[str, tuple[int, ...]] = {}
    for component, model in pipeline.components.items():
        if component.startswith("transformer") and model is not None:
            for name, weight in model.named_parameters():
                shapes[f"{component}.{name}".removesuffix(".weight").removesuffix(".base_layer")] = weight.shape
            for name, layer in model.named_modules():
                if isinstance(layer, nn.Linear):  # quantized weights are packed and have another shape
                    shapes[f"{component}.{name}".removesuffix(".base_layer")] = (layer.out_features, layer.in_features)
    return shapes


def _find_misfits(pipeline: DiffusionPipeline, state: Mapping[str, Tensor]) -> list[str]:
    """The keys of a LoRA state dict whose layer the pipeline does not have, or has in another shape."""
    shapes = _layer_shapes(pipeline)
    misfits = []
    for key, value in state.items():
        layer, _, part = key.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        if layer not in shapes:
            # Layers of text encoders have other names in files than in memory; diffusers converts them.
            if not layer.startswith("text_encoder"):
                misfits.append(key)
            continue
        shape = shapes[layer]
        fits = {"lora_A": value.shape[1:] == shape[1:], "lora_B": value.shape[:1] == shape[:1]}
        if not fits.get(part, True):
            misfits.append(key)
    return misfits


def _check_fits(pipeline: DiffusionPipeline, state: Mapping[str, Tensor], adapter: str) -> None:
    """Raise a `ValueError` if a LoRA state dict has values that are not finite, or weights that do not fit."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key!r} in the adapter {adapter!r} has values that are not finite. Train it again.")
    misfits = _find_misfits(pipeline, state)
    if misfits or not state:
        first = f" (first: {misfits[0]!r})" if misfits else ""
        raise ValueError(
            f"The adapter {adapter!r} was made for another model: {len(misfits)} of its {len(state)} weights do not "
            f"fit the {type(pipeline).__name__}{first}. Load it onto the base model that its card names."
        )
