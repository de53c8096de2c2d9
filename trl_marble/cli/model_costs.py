# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Operations and memory of models of known sizes, as examples/benchmarks/model_costs.py has computed them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trainer import MarbleConfig
from .train import ScriptArguments


FILE = Path(__file__).with_name("model_costs.json")
PIXELS = 512**2
RANK = 32
T5 = 2  # its place among Stable Diffusion 3's text encoders
# A backward pass of a LoRA has as many products with weights as a forward pass, because the weights themselves get no
# gradient. Attention has five products there, one of which it computes anew, where a forward pass has two.
BACKWARD_ATTENTION = 2.5


@dataclass(frozen=True)
class ModelCosts:
    """
    What a model costs with an adapter. examples/benchmarks/model_costs.py explains the coefficients.

    Args:
        name (`str`):
            Its name there.
        numbers (`dict[str, Any]`):
            Of its entry in model_costs.json, what does not depend on the adapter.
        adapter (`dict[str, Any]`):
            What does.
        knows_memory (`bool`):
            Whether the adapter is one that these numbers are for; otherwise they are those of the package's, whose
            operations differ little.
    """

    name: str
    numbers: dict[str, Any]
    adapter: dict[str, Any]
    knows_memory: bool = True

    def forward(self, height: int, width: int) -> float:
        """Floating-point operations of a forward pass of one image."""
        linear, attention = self._operations(height, width)
        return linear + attention

    def backward(self, height: int, width: int) -> float:
        """Those of a backward pass of one image."""
        linear, attention = self._operations(height, width)
        return linear + BACKWARD_ATTENTION * attention

    def _operations(self, height: int, width: int) -> tuple[float, float]:
        size = height * width / PIXELS
        linear, attention = (
            sum(coefficient * size**power for power, coefficient in enumerate(self.adapter[kind]))
            for kind in ("linear", "attention")
        )
        return linear, attention

    def peak_memory(self, script_args: ScriptArguments, args: MarbleConfig, num_rewards: int) -> float:
        """
        The computed peak of a step in bytes, without the rewards' models and what CUDA itself needs.

        Args:
            script_args ([`ScriptArguments`]):
                What is trained.
            args ([`~trl_marble.MarbleConfig`]):
                The settings, with `height` and `width`.
            num_rewards (`int`):
                K.
        """
        parts = num_rewards if args.balance_slider else 1
        adapter = self.adapter["bytes_of_rank_32"] * parts * script_args.lora_r / RANK
        # A gradient of each reward in both halves of the step, and of what they share; or one of all rewards.
        gradients = 2 * num_rewards + 1 if args.balances_gradients else 1
        copies = 2 if args.sampling_policy_preset is None else 3  # old, averaged, and what samples
        training = adapter * (1 + copies + 2 + gradients)
        texts = list(self.numbers["text_encoders"])
        if not script_args.use_t5:
            del texts[T5]
        vae, offloads, caches = self.numbers["vae"], args.offload_components, args.cache_embeddings
        weights = self.numbers["transformer_nf4" if script_args.quantize_base == "nf4" else "transformer"]
        held = weights + training + (0 if offloads else vae) + (0 if offloads or caches else sum(texts))
        # Cached embeddings are made once, before anything else is done.
        encoding = max(texts) if offloads else sum(texts) if caches else 0
        size = (args.height or 0) * (args.width or 0) / PIXELS
        sampled, trained = args.rollout_batch_size or args.num_generations, args.per_device_train_batch_size
        update = "update_checkpointed" if args.activation_checkpointing else "update"
        return held + max(
            encoding,
            self._part("rollout", sampled, size),
            self._part("decode", sampled, size) + (vae if offloads else 0),
            self._part(update, trained, size),
        )

    def _part(self, name: str, batch_size: int, size: float) -> float:
        once, by_image, by_pixel = self.adapter["peaks"][name]
        return once + batch_size * (by_image + by_pixel * size)


def find_costs(model: str, target_modules: Sequence[str] | None = None) -> ModelCosts | None:
    """
    The costs of a model.

    Args:
        model (`str`):
            Its Hub id.
        target_modules (`Sequence[str]`, *optional*):
            The layers that are adapted, as `lora_target_modules` has them. Defaults to those of its family.

    Returns:
        [`ModelCosts`], *optional*: `None` for a model that nothing was computed of.
    """
    layers = "default" if target_modules is None else " ".join(target_modules).lower()
    for name, numbers in json.loads(FILE.read_text()).items():
        if model.lower() in (hub_id.lower() for hub_id in numbers["hub_ids"]):
            adapters = numbers["adapters"]
            return ModelCosts(name, numbers, adapters.get(layers, adapters["default"]), layers in adapters)
    return None
