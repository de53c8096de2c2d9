# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "rich"]
# ///
"""The GPU memory of an optimizer step, for several models and settings.

```bash
python examples/benchmarks/memory.py --models sd3.5m flux qwen-image
```

The transformers have the published sizes but no values: everything runs on PyTorch's fake tensors, which have only
sizes. The script tracks when they are allocated and freed during a step of the rollout, the decoding of its images,
and the forward and backward passes of one micro-batch of the update. So the figures are computed, on any machine. They
include PyTorch's tensors only. In addition a GPU needs 0.5 to 1 GB for CUDA itself, memory lost to fragmentation, and
the rewards' memory. With `--device cuda` the same code runs on a GPU, with arbitrary weights, and the peak that
PyTorch reports is printed beside the computed one.

The assumptions: bf16 with fp32 LoRAs on the default layers, a fused attention kernel (no matrix of all pairs of
tokens), and quantized layers that convert one weight at a time to bf16. Text encoders are counted without activations.
"""

import argparse
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
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
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from trl_marble.balance import Objective, WeightedBackward
from trl_marble.losses.nft import implicit_losses
from trl_marble.pipelines import (
    Conditioning,
    FlowPipeline,
    Policy,
    WeightShadow,
    adapters_disabled,
    add_trainable_adapter,
    lora_config,
    plain_lora_linears,
)
from trl_marble.selftest.live_tensors import LiveTensors


GB = 1e9
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # a number; a scale of one byte for 64 of them, one of four for 256 scales


# --------------------------------------------------------------------------------------------------------------------
# Models of the published sizes
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """
    A pipeline without text encoders, and its inputs.

    Args:
        pipeline (`Callable[[SchedulerMixin], DiffusionPipeline]`):
            Makes it around a scheduler.
        text_encoders (`Callable[[], list[nn.Module]]`):
            Makes the text encoders, which are only counted.
        conditioning (`dict[str, tuple[int, ...]]`):
            Shapes of the embeddings of one prompt.
        latents (`tuple[int, ...]`):
            Shape of one noisy latent of that height and width, as the transformer sees it.
        decoded (`tuple[int, ...]`):
            Shape of one latent of that height and width, as the VAE sees it.
        height (`int`, *optional*, defaults to `512`):
            Height of the images in pixels.
        width (`int`, *optional*, defaults to `512`):
            Width of the images in pixels.
    """

    pipeline: Callable[[SchedulerMixin], DiffusionPipeline]
    text_encoders: Callable[[], list[nn.Module]]
    conditioning: dict[str, tuple[int, ...]]
    latents: tuple[int, ...]
    decoded: tuple[int, ...]
    height: int = 512
    width: int = 512


def sd35_medium(scheduler: SchedulerMixin) -> DiffusionPipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            in_channels=16,
            out_channels=16,
        ),
        vae=_vae(),
        **_without("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"),
        scheduler=scheduler,
    )


def tiny_sd3(scheduler: SchedulerMixin) -> DiffusionPipeline:
    """For tests. Its activations are larger than its weights."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        **_without("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"),
        scheduler=scheduler,
    )


def flux_dev(scheduler: SchedulerMixin) -> DiffusionPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        vae=_vae(),
        **_without("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
        scheduler=scheduler,
    )


def qwen_image(scheduler: SchedulerMixin) -> DiffusionPipeline:
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(),
        vae=AutoencoderKLQwenImage(),
        **_without("tokenizer", "text_encoder"),
        scheduler=scheduler,
    )


def _without(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
    )


def _clip_l() -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return CLIPTextModelWithProjection(config)


def _clip_g() -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    return CLIPTextModelWithProjection(config)


def _t5_xxl() -> nn.Module:
    config = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


def _qwen25_vl_7b() -> nn.Module:
    text = dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_scaling={"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    )
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


MODELS = {
    "tiny": Model(
        tiny_sd3,
        lambda: [nn.Linear(1000, 100), nn.Linear(1000, 50)],
        {"prompt_embeds": (24, 64), "pooled_prompt_embeds": (64,)},
        (4, 32, 32),
        (4, 32, 32),
        height=64,
        width=64,
    ),
    "sd3.5m": Model(
        sd35_medium,
        lambda: [_clip_l(), _clip_g(), _t5_xxl()],
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},  # 77 tokens of CLIP, 256 of T5
        (16, 64, 64),
        (16, 64, 64),
    ),
    "flux": Model(
        flux_dev,
        lambda: [_clip_l(), _t5_xxl()],
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        (1024, 64),
        (16, 64, 64),
    ),
    "qwen-image": Model(
        qwen_image,
        lambda: [_qwen25_vl_7b()],
        {"prompt_embeds": (128, 3584)},
        (1024, 64),
        (16, 1, 64, 64),
    ),
}


# --------------------------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def norms_of_cuda_autocast() -> Iterator[None]:
    """
    Normalize in fp32, as autocast does on CUDA. (Fake tensors follow the rules of CPUs, where it does not.)

    (Not a `TorchFunctionMode`: the recomputation of gradient checkpointing would not see it.)
    """

    def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def normalize(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(input, *args, **kwargs)
            numbers = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
            options = {name: arg.float() if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
            return norm(input.float(), *numbers, **options)

        return normalize

    norms = F.layer_norm, F.group_norm
    F.layer_norm, F.group_norm = map(in_fp32, norms)
    try:
        yield
    finally:
        F.layer_norm, F.group_norm = norms


# --------------------------------------------------------------------------------------------------------------------
# One step
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The settings that change the memory; see `MarbleConfig` and `docs/scaling.md`."""

    batch_size: int = 8
    rollout_batch_size: int = 24
    activation_checkpointing: bool = False
    offload_components: bool = False
    nf4: bool = False


@dataclass(frozen=True)
class Need:
    """
    Bytes.

    Args:
        weights (`int`):
            The transformer's.
        others (`int`):
            Those of text encoders and VAE.
        training (`int`):
            The adapter with its gradients, optimizer state and copies.
        encode, decode, rollout, update (`int`):
            The peak in each part of a step.
    """

    weights: int
    others: int
    training: int
    encode: int
    decode: int
    rollout: int
    update: int

    @property
    def peak(self) -> int:
        return max(self.encode, self.decode, self.rollout, self.update)


class Step:
    """
    The parts of a step that need memory, on a pipeline of a model's size.

    Args:
        model ([`Model`]):
            What it is called with.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            On the meta device, with its adapter; see [`without_values`]. It comes to the device without values.
        num_rewards (`int`):
            K.
        device (`torch.device` or `str`):
            Where to run.
    """

    def __init__(
        self, model: Model, pipeline: DiffusionPipeline, num_rewards: int, device: torch.device | str
    ) -> None:
        self.model, self.pipeline, self.device = model, pipeline, torch.device(device)
        for component in (pipeline.transformer, pipeline.vae):
            component.to_empty(device=self.device)
        self.flow = FlowPipeline(pipeline, model.height, model.width)
        self.dtype = self.flow.dtype
        self.policy = Policy(self.flow)
        trainable = {name: p for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
        self.adapter = sum(parameter.nbytes for parameter in trainable.values())
        self.frozen = _bytes(pipeline.transformer) - self.adapter
        self.vae = _bytes(pipeline.vae)
        linears = plain_lora_linears(pipeline.transformer, trainable)
        assert linears is not None
        self.rows = WeightedBackward(2 * num_rewards + 1, linears)
        self.old_policy = WeightShadow(trainable.items())

    def checkpoint(self, yes: bool) -> None:
        """Recompute activations from here on, or store them."""
        if yes:
            self.policy.activation_checkpointing_enable()
        else:
            self.policy.activation_checkpointing_disable()

    @property
    def training(self) -> int:
        """Adapter, two moments of AdamW, the old and the averaged copy, one gradient per reward and the shared one."""
        return self.adapter * (1 + 2 + 2 + len(self.rows.gradients))

    def _autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _conditioning(self, batch: int) -> Conditioning:
        return Conditioning(
            {
                name: torch.zeros(batch, *shape, dtype=self.dtype, device=self.device)
                for name, shape in self.model.conditioning.items()
            }
        )

    def rollout(self, batch: int) -> None:
        """One solver step."""
        x_t = torch.zeros(batch, *self.model.latents, device=self.device)
        t = torch.full((batch,), 0.5, device=self.device)
        with torch.no_grad(), self._autocast():
            self.policy.eval()(x_t, t, self._conditioning(batch))

    def decode(self, batch: int) -> None:
        """Latents to images."""
        latents = torch.zeros(batch, *self.model.decoded, dtype=self.dtype, device=self.device)
        with torch.no_grad(), self._autocast():
            self.pipeline.vae.decode(latents)

    def update(self, batch: int) -> None:
        """Forward and backward passes of one micro-step that is measured."""
        x_t, x0 = (torch.zeros(batch, *self.model.latents, device=self.device) for _ in range(2))
        t = torch.full((batch,), 0.5, device=self.device)
        conditioning = self._conditioning(batch)
        self.policy.eval()
        with torch.no_grad(), self._autocast():
            with self.old_policy.swapped_in():
                old = self.policy(x_t, t, conditioning)
            with adapters_disabled(self.flow.transformer):
                base = self.policy(x_t, t, conditioning)
        self.policy.train()
        coefficients = torch.ones(len(self.rows.gradients), batch, device=self.device)
        with self.rows.recording(batch):
            with self._autocast():
                velocity = self.policy(x_t, t, conditioning)
            positive, negative = implicit_losses(velocity, old, x_t, x0, t, 0.1)
            divergence = (velocity.float() - base.float()).square().flatten(1).mean(dim=1)
            self.rows.backward([Objective(each, coefficients) for each in (positive, negative, divergence)])


def without_values(
    model: Model, dtype: torch.dtype = torch.bfloat16, target_modules: str | None = None
) -> DiffusionPipeline:
    """A model's pipeline with an adapter, by default the package's, on the meta device, without values."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    with torch.device("meta"):
        pipeline = model.pipeline(scheduler)
    for component in (pipeline.transformer, pipeline.vae):
        component.to(dtype)
    add_trainable_adapter(pipeline, lora_config(pipeline, target_modules=target_modules))
    return pipeline


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _nf4_saves(transformer: nn.Module) -> int:
    """Bytes that 4-bit weights save, less one weight in bf16 at a time."""
    weights = [m.weight for m in transformer.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    saved = sum(weight.nbytes - round(weight.numel() * NF4_BYTES) for weight in weights)
    return saved - max(weight.nbytes for weight in weights)


def compute(model: Model, settings: Sequence[Setting], num_rewards: int = 5) -> list[Need]:
    """Compute the memory of each setting, without a GPU and without allocating it."""
    texts = _text_encoders(model)
    pipeline = without_values(model)
    with FakeTensorMode(allow_non_fake_inputs=True), norms_of_cuda_autocast():
        step = Step(model, pipeline, num_rewards, "cpu")

        @functools.cache
        def peak(part: str, batch_size: int, activation_checkpointing: bool = False) -> int:
            step.checkpoint(activation_checkpointing)
            with LiveTensors() as tensors:
                getattr(step, part)(batch_size)
            return tensors.peak

        needs = []
        for setting in settings:
            weights = step.frozen - (_nf4_saves(pipeline.transformer) if setting.nf4 else 0)
            others = 0 if setting.offload_components else sum(texts) + step.vae
            held = weights + others + step.training
            needs.append(
                Need(
                    weights=weights,
                    others=others,
                    training=step.training,
                    encode=held + (max(texts) if setting.offload_components else 0),
                    rollout=held + peak("rollout", setting.rollout_batch_size),
                    decode=held
                    + (step.vae if setting.offload_components else 0)
                    + peak("decode", setting.rollout_batch_size),
                    update=held + peak("update", setting.batch_size, setting.activation_checkpointing),
                )
            )
    return needs


def measure(model: Model, setting: Setting, num_rewards: int, device: str) -> int:
    """The peak that PyTorch reports on a GPU. Blocks of equal size replace text encoders, moments and averages."""
    texts = _text_encoders(model)
    step = Step(model, without_values(model), num_rewards, device)
    blocks = [torch.empty(3 * step.adapter, dtype=torch.uint8, device=device)]
    if setting.offload_components:
        step.pipeline.vae.to("cpu")
    else:
        blocks.append(torch.empty(sum(texts), dtype=torch.uint8, device=device))
    torch.cuda.reset_peak_memory_stats(device)
    if setting.offload_components:
        del blocks[1:]
        torch.empty(max(texts), dtype=torch.uint8, device=device)
    step.rollout(setting.rollout_batch_size)
    step.pipeline.vae.to(device)
    step.decode(setting.rollout_batch_size)
    if setting.offload_components:
        step.pipeline.vae.to("cpu")
    step.checkpoint(setting.activation_checkpointing)
    step.update(setting.batch_size)
    peak = torch.cuda.max_memory_allocated(device)
    del step, blocks
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def _text_encoders(model: Model) -> list[int]:
    """Bytes of each in bf16."""
    with torch.device("meta"):
        return [_bytes(encoder.to(torch.bfloat16)) for encoder in model.text_encoders()]


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def settings_in_turn() -> dict[str, Setting]:
    """The settings of the table; each adds one to those before it."""
    settings = {"defaults": Setting()}
    setting = Setting()
    for name, change in (
        ("+ activation_checkpointing", {"activation_checkpointing": True}),
        ("+ rollout_batch_size 4", {"rollout_batch_size": 4}),
        ("+ offload_components", {"offload_components": True}),
        ("+ quantize_base nf4", {"nf4": True}),
        ("+ per_device_train_batch_size 1", {"batch_size": 1}),
    ):
        setting = replace(setting, **change)
        settings[name] = setting
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sd3.5m", "flux", "qwen-image"])
    parser.add_argument("--rewards", type=int, default=5, metavar="K")
    parser.add_argument("--device", help="A CUDA device to measure on too, such as `cuda`.")
    args = parser.parse_args()
    if args.device is not None and torch.device(args.device).type != "cuda":
        raise SystemExit(f"--device {args.device}: only CUDA reports a peak; leave it out to compute.")
    console = Console(width=130)
    settings = settings_in_turn()
    for name in args.models:
        model = MODELS[name]
        where = "" if args.device is None else f", measured on {torch.cuda.get_device_name(args.device)}"
        size = f"{model.height} x {model.width} pixels"
        table = Table(title=f"{name}, {size}, {args.rewards} rewards, GB: computed{where}")
        columns = ("encode", "rollout", "decode", "update")
        for column in ("setting", "transformer", "encoders, VAE", "adapter", *columns, "peak"):
            table.add_column(column, justify="left" if column == "setting" else "right", no_wrap=True)
        if args.device is not None:
            table.add_column("measured", justify="right")
        for (label, setting), need in zip(
            settings.items(), compute(model, list(settings.values()), args.rewards), strict=True
        ):
            parts = (need.weights, need.others, need.training, *(getattr(need, part) for part in columns), need.peak)
            cells = [f"{part / GB:.1f}" for part in parts]
            if args.device is not None:
                measured = None if setting.nf4 else measure(model, setting, args.rewards, args.device)
                cells.append("-" if measured is None else f"{measured / GB:.1f}")
            table.add_row(label, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
