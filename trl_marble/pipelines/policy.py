# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The trained policy as a module, and the other policies that share its weights: old, averaged and reference."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .conditioning import Conditioning
from .flow_pipeline import FlowPipeline


MANY_VERSIONS = 64  # of one block's code; more would be a sign that something is compiled again and again


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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """What `Trainer` calls `activation_checkpointing_enable` before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()


class WeightShadow:
    """
    A second set of values for the trainable parameters, such as the old policy's or their moving average.

    Create it when the parameters are on their final device.

    Args:
        parameters (`Iterable[tuple[str, torch.nn.Parameter]]`):
            Unique names and the live parameters. The shadow starts as a copy of their values.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]):
        self._parameters = dict(parameters)
        self._values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._swapped_in = False

    @torch.no_grad()
    def lerp_(self, decay: float) -> None:
        """
        Move toward the live parameters: `shadow <- decay * shadow + (1 - decay) * live`, an exact copy for decay 0.

        Args:
            decay (`float`):
                In [0, 1].

        Raises:
            `ValueError`: `decay` is not in [0, 1].
            `RuntimeError`: the shadow is swapped in.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {decay}.")
        self._refuse_while_swapped_in("lerp_")
        for name, value in self._values.items():
            if decay == 0.0:
                value.copy_(self._parameters[name])
            else:
                value.lerp_(self._parameters[name], 1.0 - decay)

    def equals_live(self) -> bool:
        """
        Whether the live parameters have exactly the shadow's values.

        Raises:
            `RuntimeError`: the shadow is swapped in.
        """
        self._refuse_while_swapped_in("equals_live")
        return all(torch.equal(value, self._parameters[name]) for name, value in self._values.items())

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """
        Let the live parameters hold the shadow's values inside the context.

        Only the tensors behind the parameters are exchanged: nothing is copied, and optimizers, hooks and
        `requires_grad` flags see the same parameters as before. A backward pass belongs on the same side of the
        context as its forward pass, for it reads the values that the parameters hold at that moment.

        Raises:
            `RuntimeError`: the shadow is swapped in already.
        """
        self._refuse_while_swapped_in("swapped_in")
        live = {name: parameter.data for name, parameter in self._parameters.items()}
        self._swapped_in = True
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._values[name]
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = live[name]
            self._swapped_in = False

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow's values by parameter name; they are not copied."""
        return dict(self._values)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """
        Take over saved values.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`):
                What `state_dict` returned for parameters of the same names and shapes.

        Raises:
            `ValueError`: names or shapes differ; nothing was loaded.
            `RuntimeError`: the shadow is swapped in.
        """
        self._refuse_while_swapped_in("load_state_dict")
        missing = sorted(self._values.keys() - state_dict.keys())
        unexpected = sorted(state_dict.keys() - self._values.keys())
        misshapen = [
            f"{name}: {tuple(state_dict[name].shape)} instead of {tuple(value.shape)}"
            for name, value in self._values.items()
            if name in state_dict and state_dict[name].shape != value.shape
        ]
        if missing or unexpected or misshapen:
            raise ValueError(
                f"The saved weights belong to another adapter. Missing: {missing}. Unexpected: {unexpected}. Of "
                f"another shape: {misshapen}. Load one of the same base model and LoRA configuration."
            )
        for name, value in self._values.items():
            value.copy_(state_dict[name])

    def _refuse_while_swapped_in(self, method: str) -> None:
        if self._swapped_in:
            raise RuntimeError(f"{method} was called while these weights are swapped in; leave swapped_in() first.")


def transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The members of the module lists right below a transformer: most of its weights, in the order of their use."""
    return [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]


def compile_blocks(transformer: nn.Module, backend: str, mode: str | None = None) -> None:
    """
    Compile the transformer's blocks one by one, in place: all blocks of a kind are compiled once.

    (The diffusers method for this knows no blocks in some families, Stable Diffusion 3 among them.)

    Args:
        transformer (`torch.nn.Module`):
            The transformer. Its blocks are the members of the module lists right below it.
        backend (`str`):
            As `torch.compile` has it.
        mode (`str`, *optional*):
            As `torch.compile` has it.

    Raises:
        `ValueError`: the transformer has no blocks.
    """
    blocks = transformer_blocks(transformer)
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no lists of blocks to compile; set torch_compile=False.")
    # Every kind of block is compiled for sampling, training, per-reward gradients and the base model, each again for
    # other batch sizes. Beyond its limit PyTorch would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MANY_VERSIONS)
    # Without this the only backward pass of one step may be compiled to overwrite what the first of two still needs.
    torch._functorch.config.donated_buffer = False
    for block in blocks:
        block.compile(backend=backend, mode=mode)


@contextmanager
def adapters_disabled(transformer: nn.Module) -> Iterator[None]:
    """
    Let the transformer be the base model, the reference policy, inside the context.

    Every adapter layer and every `requires_grad` flag is left as it was found (peft's own switch sets the flags).

    Args:
        transformer (`torch.nn.Module`):
            The transformer, with or without adapters.
    """
    layers = [
        module
        for module in transformer.modules()
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters
    ]
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
