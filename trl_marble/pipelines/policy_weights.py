# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""All weights of a policy, and the velocities that they give: trained, old, averaged and base."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .conditioning import Conditioning
from .policy import Policy, adapter_in_use, adapter_layers, adapters_disabled
from .weight_shadow import WeightShadow, check_same_weights, find_places


# Most of a transformer's modules, all the more with an adapter. They do the same in training and evaluation.
_MODELESS = {
    nn.Linear,
    nn.Identity,
    nn.ModuleDict,
    nn.ParameterDict,
    nn.ModuleList,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.SiLU,
    nn.GELU,
}


class PolicyWeights:
    """
    Owns the weights of a policy: those that are trained, the old policy's, their moving average, the base model's
    (without the adapter), and those that sample images, where these are none of the others. All of them run through
    the same module in the same precision, that of the [`~trl_marble.pipelines.FlowPipeline`].

    Create it when the weights are on their final device, and all other adapters are loaded.

    Args:
        policy ([`~trl_marble.pipelines.Policy`]):
            The module.
        trained (`Mapping[str, nn.Parameter]`):
            Its trainable weights by unique names.
        samples_apart (`bool`, *optional*, defaults to `False`):
            Whether there are weights of their own for sampling images, `sampler`.
    """

    def __init__(self, policy: Policy, trained: Mapping[str, nn.Parameter], samples_apart: bool = False) -> None:
        self.policy = policy
        self.flow = policy.flow
        self.trained = dict(trained)
        self.parameters = list(self.trained.values())
        self.old = WeightShadow(self.trained.items())
        self.averaged = WeightShadow(self.trained.items())
        self.sampler = WeightShadow(self.trained.items()) if samples_apart else None
        modules = list(policy.modules())  # listed once: there are thousands of them
        self._attributes = [vars(module) for module in modules if type(module) not in _MODELESS]
        self._places = find_places(policy, self.parameters)
        self._adapter_layers = adapter_layers(policy.transformer)
        self._has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)

    def are_on_policy(self) -> bool:
        """
        Whether the old policy's velocity is the trained one's: its weights are the same, and there is no dropout, with
        which no forward pass for training is one of the old policy.
        """
        return not self._has_dropout and self.old.equals_live()

    # ---- Velocities ----

    def velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The trained policy's velocity, attached. See [`~trl_marble.pipelines.FlowPipeline.velocity`]."""
        self._set_mode(training=True)
        return self.policy(x_t, t, conditioning)

    @torch.no_grad()
    def detached_velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The trained policy's velocity, as the policy samples: detached and without dropout."""
        with self.sampling(nullcontext()):
            return self.policy(x_t, t, conditioning)

    @torch.no_grad()
    def old_velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The old policy's velocity.

        Ask for frozen velocities before the trained one: with gradient checkpointing that one runs again during the
        backward pass, and must find the model as it was.
        """
        with self.sampling(self.old.put_into(self._places)):
            return self.policy(x_t, t, conditioning)

    @torch.no_grad()
    def base_velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The base model's velocity, guided where the pipeline has a `reference_guidance_scale`. See
        [`~PolicyWeights.old_velocity`] for when to ask.
        """
        with self.sampling(adapters_disabled(self.policy.transformer, self._adapter_layers)):
            return self.flow.reference_velocity(x_t, t, conditioning)

    @torch.no_grad()
    def velocity_of(self, adapter_name: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The velocity of another adapter of the transformer, such as a teacher's. See [`~PolicyWeights.old_velocity`]
        for when to ask.
        """
        with self.sampling(adapter_in_use(self._adapter_layers, adapter_name)):
            return self.policy(x_t, t, conditioning)

    @contextmanager
    def sampling(self, weights: AbstractContextManager[None]) -> Iterator[None]:
        """
        The model as it samples, without dropout, with some weights.

        Args:
            weights (context manager):
                What puts them in place, such as `weights.averaged.swapped_in()`; `nullcontext()` for the trained ones.
        """
        self._set_mode(training=False)
        with weights:
            yield

    def _set_mode(self, training: bool) -> None:
        """
        As `policy.train(training)` for all modules that have modes. It would take 20 ms for a model such as Stable
        Diffusion 3.5 Medium.
        """
        for attributes in self._attributes:
            attributes["training"] = training

    # ---- State ----

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All weights but the base model's; they are not copied."""
        shadows = {name: shadow.state_dict() for name, shadow in self._shadows().items()}
        return {"current": {name: parameter.detach() for name, parameter in self.trained.items()}, **shadows}

    def _shadows(self) -> dict[str, WeightShadow]:
        shadows = {"old": self.old, "average": self.averaged}
        return shadows if self.sampler is None else shadows | {"sampler": self.sampler}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """
        Take over saved weights.

        Args:
            state_dict (`Mapping[str, Mapping[str, Tensor]]`):
                What [`~PolicyWeights.state_dict`] returned for an adapter of the same names and shapes.

        Raises:
            `ValueError`: If names or shapes differ; nothing was loaded.
        """
        for saved in state_dict.values():
            check_same_weights(self.trained, saved)
        for name, parameter in self.trained.items():
            parameter.copy_(state_dict["current"][name])
        for kind, shadow in self._shadows().items():
            shadow.load_state_dict(state_dict[kind])
