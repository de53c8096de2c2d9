# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "rich"]
# ///
"""
What `trl-marble estimate` knows of models: operations of a pass, and memory, as functions of the size of the images.

```bash
python examples/benchmarks/model_costs.py --models sd3.5m flux qwen-image
```

Everything is computed with the fake tensors of `memory.py`, which have the published sizes and no data, for three
sizes of images and two of batches, with an adapter on the package's layers and on all linear ones. It is written as
coefficients to `trl_marble/cli/model_costs.json`. It takes minutes for each model. Run it again when a step allocates
other tensors.

With P = height x width / 512^2 and batches of B images:

- operations of a forward pass of one image: `linear[0] + linear[1] P` in products with weights, and
  `attention[0] + attention[1] P + attention[2] P^2` in attention;
- bytes that a part of a step needs beside the weights: `part[0] + B (part[1] + part[2] P)`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import memory
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


FILE = Path(__file__).resolve().parents[2] / "trl_marble" / "cli" / "model_costs.json"
HUB_IDS = {
    "sd3.5m": ["stabilityai/stable-diffusion-3.5-medium"],
    "flux": ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"],
    "qwen-image": ["Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"],
}
# Layers -> peft's `target_modules`; `None` for those of the package.
ADAPTERS = {"default": None, "all-linear": "all-linear"}
SCALES = (0.5, 0.75, 1.0)  # of height and width
BATCHES = {"rollout": (4, 24), "decode": (4, 24), "update": (4, 8)}
REWARDS = 5  # does not matter for what is measured here: gradient buffers are counted apart
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def count_attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def at_scale(model: memory.Model, scale: float) -> memory.Model:
    """The same model with smaller images."""

    def resized(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 2:  # tokens, channels
            return round(shape[0] * scale**2), shape[1]
        return (*shape[:-2], round(shape[-2] * scale), round(shape[-1] * scale))

    latents, decoded = resized(model.latents), resized(model.decoded)
    height, width = round(model.height * scale), round(model.width * scale)
    return replace(model, latents=latents, decoded=decoded, height=height, width=width)


class Steps:
    """The parts of a step of one model, at any size."""

    def __init__(self, model: memory.Model, pipeline: DiffusionPipeline) -> None:
        self.model = model
        self.step = memory.Step(model, pipeline, REWARDS, "cpu")

    def at(self, scale: float) -> memory.Step:
        self.step.model = model = at_scale(self.model, scale)
        self.step.flow.height, self.step.flow.width = model.height, model.width
        return self.step

    def pixels(self, scale: float) -> float:
        """P of the formulas above."""
        return self.model.height * self.model.width * scale**2 / 512**2

    def peak(self, part: str, batch: int, scale: float) -> int:
        with memory.LiveTensors() as tensors:
            getattr(self.at(scale), part)(batch)
        return tensors.peak

    def operations(self, scale: float) -> tuple[int, int]:
        """Of a forward pass of one image: products with weights, and attention."""
        mapping = {ATTENTION: count_attention}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            self.at(scale).rollout(1)
        counts = counter.get_flop_counts()["Global"]
        return counter.get_total_flops() - counts[ATTENTION], counts[ATTENTION]

    def bytes_of_part(self, part: str) -> list[int]:
        """The coefficients `[0]`, `[1]` and `[2]` of the formula above."""
        few, many = BATCHES[part]
        small, large = self.peak(part, few, SCALES[0]), self.peak(part, few, SCALES[-1])
        by_image = (self.peak(part, many, SCALES[-1]) - large) / (many - few)
        by_pixel = (large - small) / few / (self.pixels(SCALES[-1]) - self.pixels(SCALES[0]))
        return [round(large - few * by_image), round(by_image - by_pixel * self.pixels(SCALES[-1])), round(by_pixel)]


def model_costs(name: str) -> dict[str, Any]:
    """The entry of one model, with each of the adapters."""
    model = memory.MODELS[name]
    costs: dict[str, Any] = {
        "hub_ids": HUB_IDS.get(name, []),
        "text_encoders": memory._text_encoders(model),
        "adapters": {},
    }
    for layers, target_modules in ADAPTERS.items():
        pipeline = memory.without_values(model, target_modules=target_modules)
        with FakeTensorMode(allow_non_fake_inputs=True), memory.norms_of_cuda_autocast():
            steps = Steps(model, pipeline)
            step = steps.step
            linear, attention = zip(*(steps.operations(scale) for scale in SCALES), strict=True)
            pixels = [steps.pixels(scale) for scale in SCALES]
            peaks = {part: steps.bytes_of_part(part) for part in ("rollout", "decode", "update")}
            step.checkpoint(True)
            peaks["update_checkpointed"] = steps.bytes_of_part("update")
            costs |= {
                "transformer": step.frozen,
                "transformer_nf4": step.frozen - memory._nf4_saves(pipeline.transformer),
                "vae": step.vae,
            }
            costs["adapters"][layers] = {
                "bytes_of_rank_32": step.adapter,
                "linear": np.polyfit(pixels, linear, 1)[::-1].round().tolist(),
                "attention": np.polyfit(pixels, attention, 2)[::-1].round().tolist(),
                "peaks": peaks,
            }
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=memory.MODELS, default=list(HUB_IDS))
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for name in args.models:
        known[name] = model_costs(name)
        args.output.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name} is in {args.output}", flush=True)


if __name__ == "__main__":
    main()
