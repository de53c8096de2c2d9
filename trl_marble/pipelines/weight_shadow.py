# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A second set of values for the weights that are trained."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


# Where a module holds a parameter: its dictionary of parameters, and the name in it.
Place = tuple[dict[str, nn.Parameter | None], str]


def find_places(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[Place]:
    """
    Where a module holds parameters.

    Args:
        module (`torch.nn.Module`):
            The module.
        parameters (`Iterable[torch.nn.Parameter]`):
            Parameters of it, each of which is in one place.

    Returns:
        `list`: The place of each, in their order.

    Raises:
        `ValueError`: if one of them is in two places.
    """
    places: dict[nn.Parameter, Place] = {}
    wanted = list(parameters)
    ids = set(map(id, wanted))
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter in places and id(parameter) in ids:
                raise ValueError(f"Two modules share one trained weight (`{name}`): its values cannot be exchanged.")
            if parameter is not None:
                places[parameter] = part._parameters, name
    return [places[parameter] for parameter in wanted]


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
        # The same memory, as what can be in a parameter's place. The flag too: compiled code depends on it.
        self._stand_ins = [
            nn.Parameter(value, parameter.requires_grad)
            for value, parameter in zip(self._values.values(), self._parameters.values(), strict=True)
        ]
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
        # One answer for all of them: the program waits for the device once.
        differ = [(value != self._parameters[name]).any() for name, value in self._values.items()]
        return not torch.stack(differ).any()

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
        parameters = list(self._parameters.values())
        live = [parameter.data for parameter in parameters]
        self._swapped_in = True
        try:
            for parameter, value in zip(parameters, self._values.values(), strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(parameters, live, strict=True):
                parameter.data = value
            self._swapped_in = False

    @contextmanager
    def put_into(self, places: Sequence[Place]) -> Iterator[None]:
        """
        Let modules hold the shadow's values, as other parameters, inside the context.

        For single calls without gradients, such as those of every micro-step: more than twice as fast as
        [`~WeightShadow.swapped_in`], which makes a tensor for each parameter and exchanges what is behind it. The live
        parameters are not changed; whoever holds them outside of the modules sees their own values.

        Args:
            places (`Sequence`):
                Of all live parameters, see [`find_places`].
        """
        live = [owner[name] for owner, name in places]
        try:
            for (owner, name), parameter in zip(places, self._stand_ins, strict=True):
                owner[name] = parameter
            yield
        finally:
            for (owner, name), held in zip(places, live, strict=True):
                owner[name] = held

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
        check_same_weights(self._values, state_dict)
        for name, value in self._values.items():
            value.copy_(state_dict[name])

    def _refuse_while_swapped_in(self, method: str) -> None:
        if self._swapped_in:
            raise RuntimeError(f"{method} was called while these weights are swapped in; leave swapped_in() first.")


def check_same_weights(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """
    See that saved weights are of the adapter of this run.

    Args:
        weights (`Mapping[str, Tensor]`):
            The adapter's weights by name.
        saved (`Mapping[str, Tensor]`):
            The saved ones.

    Raises:
        `ValueError`: If names or shapes differ.
    """
    missing = sorted(weights.keys() - saved.keys())
    unexpected = sorted(saved.keys() - weights.keys())
    misshapen = [
        f"{name}: {tuple(saved[name].shape)} instead of {tuple(value.shape)}"
        for name, value in weights.items()
        if name in saved and saved[name].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"The saved weights belong to another adapter. Missing: {missing}. Unexpected: {unexpected}. Of another "
            f"shape: {misshapen}. Use the base model and the `peft_config` that the checkpoint was trained with."
        )
