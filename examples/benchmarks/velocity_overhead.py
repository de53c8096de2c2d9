# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "rich"]
# ///
"""What a velocity costs beyond the call of the transformer.

```bash
python examples/benchmarks/velocity_overhead.py
```

The models have as many modules as the published ones, with their text encoders, VAE and LoRA, but are a few numbers
wide: what is measured is Python, and does not depend on the width. Times are CPU time on one thread, outside of the
transformer, each as the lowest and the median of some calls: what else runs on the machine adds to the median.
`trained`, `old` and `base` are the velocities that a training step asks for. `recorded` is the first one for a
conditioning, which goes through the pipeline. `pipeline` is what each of them would cost without the recording.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from trl_marble.pipelines import (
    Conditioning,
    FlowPipeline,
    Policy,
    PolicyWeights,
    add_trainable_adapter,
    lora_config,
)


BATCH, TOKENS, WIDTH, PIXELS = 4, 8, 16, 32
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


# --------------------------------------------------------------------------------------------------------------------
# Models of the published depths
# --------------------------------------------------------------------------------------------------------------------


def sd35_medium() -> DiffusionPipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=4,
            num_layers=24,
            **HEADS,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=4,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            in_channels=4,
            out_channels=4,
        ),
        vae=_vae(),
        text_encoder=_clip(num_hidden_layers=12),
        text_encoder_2=_clip(num_hidden_layers=32),
        text_encoder_3=_t5(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        scheduler=SCHEDULER,
    )


def flux1() -> DiffusionPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=19,
            num_single_layers=38,
            **HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
            guidance_embeds=True,
        ),
        vae=_vae(),
        text_encoder=_clip(num_hidden_layers=12),
        text_encoder_2=_t5(),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=SCHEDULER,
    )


def qwen_image() -> DiffusionPipeline:
    text = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 28, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 100}
    text |= {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    vision = {"depth": 32, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=60,
            **HEADS,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
        ),
        vae=AutoencoderKLQwenImage(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=None,
        scheduler=SCHEDULER,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
    )


def _clip(num_hidden_layers: int) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=num_hidden_layers,
        vocab_size=100,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def _t5() -> nn.Module:
    config = T5Config(
        vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=24, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


PROMPT, POOLED = (TOKENS, WIDTH), (WIDTH,)
# What makes the pipeline, shapes of the embeddings of one prompt, and of a latent.
MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "sd3.5m": (sd35_medium, {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED}, (4, 4, 4)),
    "flux": (flux1, {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED}, (4, 16)),
    "qwen-image": (qwen_image, {"prompt_embeds": PROMPT}, (4, 16)),
}


# --------------------------------------------------------------------------------------------------------------------
# Time outside of the transformer
# --------------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """CPU time of calls, without that inside of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.inside = 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.inside -= time.process_time()

    def _end(self, *_: Any) -> None:
        self.inside += time.process_time()

    def measure(self, call: Callable[[], Any]) -> float:
        """Milliseconds outside."""
        self.inside, start = 0.0, time.process_time()
        velocity = call()
        outside = time.process_time() - start - self.inside
        del velocity  # with all that was stored for its backward pass
        return 1000 * outside


def measure_model(name: str, bf16: bool, repeats: int) -> dict[str, Any]:
    """Milliseconds outside of the transformer, the lowest and the median, and the number of modules."""
    make, shapes, latents = MODELS[name]
    torch.manual_seed(0)
    pipeline = make()
    trainable = add_trainable_adapter(pipeline, lora_config(pipeline, r=2, lora_alpha=4))
    flow = FlowPipeline(pipeline, PIXELS, PIXELS, autocast_dtype=torch.bfloat16 if bf16 else None)
    weights = PolicyWeights(Policy(flow), dict(trainable))

    def conditioning() -> Conditioning:
        rows = {key: torch.randn(BATCH, *shape) for key, shape in shapes.items()}
        if name == "qwen-image":
            rows["prompt_embeds_mask"] = torch.ones(BATCH, TOKENS, dtype=torch.long)
        return Conditioning(rows)

    x_t, t, rows = torch.randn(BATCH, *latents), torch.rand(BATCH), conditioning()
    calls: dict[str, Callable[[], Any]] = {
        "trained": lambda: weights.velocity(x_t, t, rows),
        "old": lambda: weights.old_velocity(x_t, t, rows),
        "base": lambda: weights.base_velocity(x_t, t, rows),
        "recorded": lambda: weights.velocity(x_t, t, conditioning()),
    }
    for call in calls.values():
        call()
    watch = Stopwatch(flow.transformer)
    # In turn, as in training: the modules change between training and evaluation mode.
    rounds = [{label: watch.measure(call) for label, call in calls.items()} for _ in range(repeats)]
    times = {label: [each[label] for each in rounds] for label in calls}
    flow.is_listed = False  # then every velocity goes through the pipeline
    times["pipeline"] = [watch.measure(calls["trained"]) for _ in range(repeats)]
    row = {label: {"lowest": min(values), "median": statistics.median(values)} for label, values in times.items()}
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return row | {"modules": sum(len(list(part.modules())) for part in parts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bf16", action="store_true", help="With autocast, as `MarbleConfig(bf16=True)`.")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="Write the table here too.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {name: measure_model(name, args.bf16, args.repeats) for name in args.models}
    table = Table(title="Milliseconds of a velocity outside of the transformer: lowest, and median")
    for column in ("model", "modules", "trained", "old", "base", "recorded", "pipeline"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in report.items():
        columns = (row[column] for column in ("trained", "old", "base", "recorded", "pipeline"))
        times = [f"{column['lowest']:.2f}, {column['median']:.2f}" for column in columns]
        table.add_row(name, f"{row['modules']:,}", *times)
    Console().print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
