# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Faster sampling by what diffusers has for it: another attention backend, and caches between solver steps."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers.hooks
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.cache_utils import CacheMixin
from torch import nn


ATTENTION_CLASSES = (Attention, MochiAttention, AttentionModuleMixin)  # those of `ModelMixin.set_attention_backend`
BACKENDS = tuple(backend.value for backend in AttentionBackendName)
# Not SeaCache and TextKVCache, which are for transformers that are not trained here, and do nothing in others.
CACHES = (
    "FirstBlockCacheConfig",
    "TaylorSeerCacheConfig",
    "MagCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
)
# These keep one state for a sample, so that with guidance each prediction would be made from the other's.
ONE_STATE = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")
# Given here: nobody can write a function into a file, and the others follow from how rollouts are sampled.
GIVEN = ("current_timestep_callback", "is_guidance_distilled", "num_inference_steps")


@dataclass(frozen=True)
class Acceleration:
    """
    How the rollouts of a training are sampled faster.

    Args:
        attention_backend (`str`, *optional*):
            A backend of diffusers (`"flash"`, `"sage"`, ...), in the place of the transformer's own.
        cache (`Mapping[str, Any]`, *optional*):
            A cache of diffusers: under `"type"` the name of its class of settings, such as `"FirstBlockCacheConfig"`,
            and its settings by their names.

    Raises:
        `ValueError`: there is no such backend or cache, or it has not these settings.
    """

    attention_backend: str | None = None
    cache: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.attention_backend is not None and self.attention_backend not in BACKENDS:
            raise ValueError(
                f"`rollout_attention_backend` is {self.attention_backend!r}; it must be one of {', '.join(BACKENDS)}."
            )
        if self.cache is not None:
            _check_cache(self.cache)
            try:
                self._make_cache(None, 2)
            except Exception as error:  # whatever a class says of values that it was not made for
                raise ValueError(f"`rollout_cache` is {self.cache!r}, which diffusers refuses: {error}") from error

    def check(self, transformer: Any, guided: bool) -> None:
        """
        Make sure that a transformer has what is asked for. Where a backend is a kernel of the Hub, it is loaded.

        Args:
            transformer (`torch.nn.Module`):
                The transformer.
            guided (`bool`):
                Whether rollouts use classifier-free guidance.

        Raises:
            `ValueError`: it has not. The message says what is missing.
        """
        name = type(transformer).__name__
        if self.attention_backend is not None:
            if not _processors(transformer):
                raise ValueError(
                    f"`rollout_attention_backend={self.attention_backend!r}` would have no effect: {name} computes "
                    "attention by itself, not through diffusers' backends. Leave the setting out."
                )
            with _backend_kept(transformer):
                try:
                    transformer.set_attention_backend(self.attention_backend)
                except Exception as error:  # a package or a kernel that is missing, by many names
                    raise ValueError(
                        f"`rollout_attention_backend={self.attention_backend!r}` cannot be used: {error}"
                    ) from error
        if self.cache is None:
            return
        if not isinstance(transformer, CacheMixin):
            raise ValueError(
                f"`rollout_cache` needs a transformer that diffusers has caches for, and {name} is none. Leave the "
                "setting out; `num_inference_steps` is what else decides how long rollouts take."
            )
        if transformer.is_cache_enabled:
            raise ValueError(
                f"`rollout_cache` is for rollouts only, and {name} has a cache already, which would change the update "
                "too. Call `pipeline.transformer.disable_cache()` first."
            )
        if guided and self.cache["type"] in ONE_STATE:
            raise ValueError(
                f"`rollout_cache` with {self.cache['type']!r} gives wrong images with classifier-free guidance, as it "
                "takes the two predictions of a step for those of two steps. Set `guidance_scale=1.0`, or use "
                "'FirstBlockCacheConfig'."
            )

    @contextlib.contextmanager
    def applied(self, driver: Any, num_inference_steps: int) -> Iterator[None]:
        """
        Sample faster inside the context, in one call of a pipeline. After it, also after an error, the transformer is
        as it was before.

        Args:
            driver ([`~diffusers.DiffusionPipeline`]):
                The pipeline that is called.
            num_inference_steps (`int`):
                Number of its solver steps.
        """
        with contextlib.ExitStack() as stack:
            if self.attention_backend is not None:
                stack.enter_context(_backend_kept(driver.transformer))
                for processor in _processors(driver.transformer):
                    processor._attention_backend = AttentionBackendName(self.attention_backend)
            if self.cache is not None:
                stack.enter_context(_cache_enabled(driver.transformer, self._make_cache(driver, num_inference_steps)))
            yield

    def _make_cache(self, driver: Any, num_inference_steps: int) -> Any:
        """The object that diffusers takes."""
        assert self.cache is not None
        settings = dict(self.cache)
        kind = getattr(diffusers.hooks, settings.pop("type"))
        given = {
            "current_timestep_callback": lambda: driver.current_timestep,
            "is_guidance_distilled": True,  # there is no guidance, see `check`
            "num_inference_steps": num_inference_steps,
        }
        known = {field.name for field in dataclasses.fields(kind)}
        for name, value in settings.items():
            if name.endswith("_dtype") and isinstance(value, str):
                settings[name] = getattr(torch, value)
        return kind(**settings, **{name: value for name, value in given.items() if name in known})


def _check_cache(cache: Any) -> None:
    """Make sure that there is such a cache with such settings; only its own class looks at their values."""
    example = "{'type': 'FirstBlockCacheConfig', 'threshold': 0.1}"
    if not isinstance(cache, Mapping) or cache.get("type") not in CACHES:
        raise ValueError(
            f"`rollout_cache` is {cache!r}; it must be a mapping such as {example}, with one of the types "
            f"{', '.join(CACHES)}."
        )
    fields = dataclasses.fields(getattr(diffusers.hooks, cache["type"]))
    known = [
        field.name
        for field in fields
        if field.name not in GIVEN and not field.name.startswith("_") and not field.name.endswith("_callback")
    ]
    for name, value in cache.items():
        if name != "type" and name not in known:
            raise ValueError(
                f"`rollout_cache` has {name!r}, which is no setting of {cache['type']} that can be chosen here; it "
                f"has {', '.join(known) or 'none'}."
            )
        if (
            name.endswith("_dtype")
            and isinstance(value, str)
            and not isinstance(getattr(torch, value, 0), torch.dtype)
        ):
            raise ValueError(
                f"`rollout_cache` has {name}={value!r}; it must be a dtype of PyTorch, such as 'float32'."
            )


def _processors(transformer: nn.Module) -> list[Any]:
    """What computes attention by the backends of diffusers, which have such an attribute."""
    found = [module.processor for module in transformer.modules() if isinstance(module, ATTENTION_CLASSES)]
    return [processor for processor in found if "_attention_backend" in dir(processor)]


@contextlib.contextmanager
def _backend_kept(transformer: nn.Module) -> Iterator[None]:
    """Give everything back the attention backend that it has now; diffusers' own reset knows only the default."""
    before = [(processor, processor._attention_backend) for processor in _processors(transformer)]
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        yield
    finally:
        for processor, backend in before:
            processor._attention_backend = backend
        _AttentionBackendRegistry.set_active_backend(active)


@contextlib.contextmanager
def _cache_enabled(transformer: Any, config: Any) -> Iterator[None]:
    """A cache that begins empty and leaves nothing behind."""
    try:
        transformer.enable_cache(config)
        yield
    finally:
        transformer._cache_config = config  # also where enabling it has failed half-way
        transformer.disable_cache()
