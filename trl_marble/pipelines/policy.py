# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trained policy as a module, and the base model that is left of it without its adapter."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .conditioning import Conditioning
from .flow_pipeline import FlowPipeline


class Policy(nn.Module):
    """
    The model that [`~transformers.Trainer`] trains: calling it gives the velocity.

    The transformer is its only submodule, so that moving, wrapping and counting parameters concern nothing else. It
    has no `config` on purpose: `Trainer` would take a diffusers configuration for one of its own.

    Args:
        flow (`FlowPipeline`):
            The pipeline whose transformer is trained.
    """

    def __init__(self, flow: FlowPipeline):
        super().__init__()
        self.flow = flow  # not a module
        self.transformer = flow.transformer

    @property
    def device(self) -> torch.device:
        """The device of the transformer."""
        return self.flow.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's base weights."""
        return self.flow.dtype

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity of `FlowPipeline.velocity`, whose arguments these are."""
        return self.flow.velocity(x_t, t, conditioning)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """
        Recompute the transformer's blocks in the backward pass instead of storing their activations.

        Args:
            activation_checkpointing_kwargs (`dict`, *optional*):
                Arguments of `torch.utils.checkpoint.checkpoint`.
            every_n_layers (`int`, *optional*, defaults to `1`):
                Only 1 is supported: diffusers checkpoints every block or none.
            offload (`bool`, *optional*, defaults to `False`):
                Only `False` is supported.

        Raises:
            `ValueError`: an unsupported setting, `use_reentrant=True` among them: reentrant checkpointing gives no
                gradients where the inputs of a block need none, as those of the first block of a frozen base; or
                checkpointing gives wrong gradients in this family, or nobody has compared them.
        """
        if (fault := self.flow.family.checkpointing_fault) is not None:
            raise ValueError(
                f"Gradient checkpointing is not to be trusted for {type(self.flow.pipeline).__name__}: {fault}. Set "
                "activation_checkpointing=False, and lower the batch size if memory is short."
            )
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers={every_n_layers} and offload={offload} are not supported by diffusers transformers; "
                "leave both out of the checkpointing kwargs."
            )
        arguments = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if arguments["use_reentrant"]:
            raise ValueError(
                "use_reentrant=True gives no gradients for adapters on a frozen transformer; set use_reentrant=False "
                "or leave it out."
            )
        self.transformer.enable_gradient_checkpointing(functools.partial(checkpoint, **arguments))

    def activation_checkpointing_disable(self) -> None:
        """Store activations again."""
        self.transformer.disable_gradient_checkpointing()


def adapter_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    """
    The layers of a transformer that have adapters.

    Args:
        transformer (`torch.nn.Module`):
            The transformer, with or without adapters.
    """
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_disabled(transformer: nn.Module, layers: Sequence[BaseTunerLayer] | None = None) -> Iterator[None]:
    """
    Let the transformer be the base model, the reference policy, inside the context.

    Every adapter layer and every `requires_grad` flag is left as it was found.

    Args:
        transformer (`torch.nn.Module`):
            The transformer, with or without adapters.
        layers (`Sequence[BaseTunerLayer]`, *optional*):
            Its [`adapter_layers`], where they are known already: to list them takes 20 ms for a model such as Stable
            Diffusion 3.5 Medium.
    """
    if layers is None:
        layers = adapter_layers(transformer)
    # Not by peft's own switch, which also sets the flags, weight by weight. Attributes of modules are slow to set.
    enabled = [vars(layer) for layer in layers if not layer._disable_adapters]
    try:
        for attributes in enabled:
            attributes["_disable_adapters"] = True
        yield
    finally:
        for attributes in enabled:
            attributes["_disable_adapters"] = False


@contextmanager
def adapter_in_use(layers: Sequence[BaseTunerLayer], name: str) -> Iterator[None]:
    """
    Let another adapter, alone, be the one that is applied inside the context.

    Every `requires_grad` flag is left as it was found.

    Args:
        layers (`Sequence[BaseTunerLayer]`):
            The transformer's [`adapter_layers`].
        name (`str`):
            The adapter's name in the transformer. Layers that it does not change are the base model's.
    """
    before = [layer._active_adapter for layer in layers]
    attributes = [vars(layer) for layer in layers]  # see `adapters_disabled`
    try:
        for each in attributes:
            each["_active_adapter"] = [name]
        yield
    finally:
        for each, active in zip(attributes, before, strict=True):
            each["_active_adapter"] = active
