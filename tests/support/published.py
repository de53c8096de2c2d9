# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Micro-steps of models of published sizes, on fake tensors that say that they are on a GPU.

Fake tensors have a device, a shape and a dtype, and no values. So nothing is as large as the model, a product of
tensors on two devices raises, and so does whatever would have to read a value, for which a GPU would be waited for.
"""

import collections
import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_marble.balance import Objective, WeightedBackward, gram_matrix
from trl_marble.losses import FrozenVelocities, StepCounts
from trl_marble.losses.nft import NFTLoss
from trl_marble.pipelines import (
    Conditioning,
    FlowPipeline,
    Policy,
    PolicyWeights,
    add_trainable_adapter,
    lora_config,
    plain_lora_linears,
)


EXAMPLES = Path(__file__).parents[2] / "examples"
DEVICE = torch.device("cuda", 0)
NUM_REWARDS, BATCH = 5, 2
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "attention")


@dataclass(frozen=True)
class Published:
    """
    A pipeline of the size of published weights.

    Args:
        pipeline (`Callable[[], DiffusionPipeline]`):
            Makes it, without text encoders.
        conditioning (`dict[str, tuple[int, ...]]`):
            Shapes of the embeddings of one prompt.
        latents (`tuple[int, ...]`):
            Shape of one noisy latent, as the transformer sees it.
        decoded (`tuple[int, ...]`):
            Shape of one latent, as the VAE sees it.
        billions (`float`):
            Parameters of the transformer.
        size (`dict[str, int]`):
            Height, width and frames.
        masks (`dict[str, tuple[int, ...]]`):
            Shapes of masks of one prompt.
    """

    pipeline: Callable[[], DiffusionPipeline]
    conditioning: dict[str, tuple[int, ...]]
    latents: tuple[int, ...]
    decoded: tuple[int, ...]
    billions: float
    size: dict[str, int]
    masks: dict[str, tuple[int, ...]] = field(default_factory=dict)


@functools.cache
def _memory_script() -> ModuleType:
    """examples/benchmarks/memory.py, which has three of the models."""
    spec = importlib.util.spec_from_file_location("memory_script", EXAMPLES / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_memory(name: str, billions: float, **more: Any) -> Published:
    model = _memory_script().MODELS[name]
    return Published(
        lambda: model.pipeline(FlowMatchEulerDiscreteScheduler()),
        model.conditioning,
        model.latents,
        model.decoded,
        billions,
        {"height": model.height, "width": model.width},
        **more,
    )


def flux2_klein() -> DiffusionPipeline:
    """FLUX.2-klein-4B, as in scripts/convert_flux2_to_diffusers.py of diffusers; its VAE is the default."""
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        vae=AutoencoderKLFlux2(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def wan_1b() -> DiffusionPipeline:
    """Wan2.1-T2V-1.3B, as in scripts/convert_wan_to_diffusers.py of diffusers; the rest are defaults."""
    return WanPipeline(
        transformer=WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        vae=AutoencoderKLWan(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


@functools.cache
def published() -> dict[str, Published]:
    """The models, by the class of their pipeline."""
    return {
        "StableDiffusion3Pipeline": _from_memory("sd3.5m", 2.2),
        "FluxPipeline": _from_memory("flux", 11.9),
        "Flux2KleinPipeline": Published(
            flux2_klein,
            {"prompt_embeds": (512, 7680)},
            (1024, 128),
            (32, 64, 64),
            3.9,
            {"height": 512, "width": 512},
        ),
        "QwenImagePipeline": _from_memory("qwen-image", 20.4, masks={"prompt_embeds_mask": (128,)}),
        "WanPipeline": Published(
            wan_1b,
            {"prompt_embeds": (512, 4096)},
            (16, 5, 60, 104),
            (16, 2, 60, 104),
            1.4,
            {"height": 480, "width": 832, "num_frames": 17},
        ),
    }


class Operations(TorchDispatchMode):
    """
    Counts what a GPU would do.

    Attributes:
        products (`Counter`):
            Products by operation and the dtypes of their operands.
        copies (`Counter`):
            Copies from one device to another: how often, by the two devices.
        reads (`int`):
            How often a value is read, for which the program waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.copies: collections.Counter[tuple[str, str]] = collections.Counter()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":  # a number of the CPU is there: Wan's pipeline reads one of the solver's
            self.reads += tensors[0].device.type != "cpu"
            return False if tensors[0].dtype == torch.bool else 1.0
        result = func(*args, **(kwargs or {}))
        if name in PRODUCTS or "scaled_dot_product" in name:
            operands = tensors[:3] if "scaled_dot_product" in name else tensors  # without sums of its softmax
            floats = {str(each.dtype).removeprefix("torch.") for each in operands if each.is_floating_point()}
            self.products[name, *sorted(floats)] += 1
        devices = {each.device.type for each in tensors if each.dim() > 0}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and devices and leaf.device.type not in devices:
                self.copies[min(devices), leaf.device.type] += 1
        return result


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Fake tensors on a GPU that there is not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@dataclass(frozen=True)
class Report:
    """
    What one micro-step did.

    Args:
        billions (`float`):
            Parameters of the transformer.
        parts (`dict[str, Operations]`):
            What each part of it did.
        results (`dict[str, Tensor]`):
            Some of its results.
    """

    billions: float
    parts: dict[str, Operations]
    results: dict[str, Tensor]


def micro_step(model: Published, balance_on: str = "advantage") -> Report:
    """
    Of a model on a GPU: a velocity as in sampling, the decoding, and a measured micro-step of an update.

    Args:
        model ([`Published`]):
            The model.
        balance_on (`str`, *optional*, defaults to `"advantage"`):
            See `MarbleConfig`.
    """
    parts: dict[str, Operations] = collections.defaultdict(Operations)
    with torch.device("meta"):
        pipeline = model.pipeline()
    for component in (pipeline.transformer, pipeline.vae):
        _convert(component)
    add_trainable_adapter(pipeline, lora_config(pipeline))
    transformer = pipeline.transformer
    with fake():
        for component in (transformer, pipeline.vae):
            component.to_empty(device=DEVICE)
        flow = FlowPipeline(pipeline, **model.size, autocast_dtype=torch.bfloat16)
        trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        weights = PolicyWeights(Policy(flow), trained)
        linears = plain_lora_linears(transformer, trained)
        assert linears is not None
        rows = WeightedBackward(2 * NUM_REWARDS + 1, linears)
        loss = NFTLoss(0.1, 5.0, balance_on, 1e-4)
        embeddings = {
            name: torch.zeros(BATCH, *shape, dtype=torch.bfloat16, device=DEVICE)
            for name, shape in model.conditioning.items()
        }
        masks = {
            name: torch.ones(BATCH, *shape, dtype=torch.long, device=DEVICE) for name, shape in model.masks.items()
        }
        conditioning = Conditioning(embeddings | masks)
        x0 = torch.zeros(BATCH, *model.latents, device=DEVICE)
        noise = torch.zeros_like(x0)
        t = torch.full((BATCH,), 0.5, device=DEVICE)
        advantages = torch.zeros(NUM_REWARDS, BATCH, device=DEVICE)
        counts = StepCounts(
            torch.full((NUM_REWARDS,), BATCH, device=DEVICE), torch.tensor(BATCH, device=DEVICE), BATCH
        )
        drawn = _drawn(x0, noise, t)
        # The first call for a conditioning goes through the pipeline, and what it does is recorded for the others.
        with parts["pipeline"], torch.no_grad():
            first = weights.old_velocity(drawn.x_t, t, conditioning)
        with parts["rollout"], torch.no_grad():
            old = weights.old_velocity(drawn.x_t, t, conditioning)
        with parts["reference"]:
            reference = weights.base_velocity(drawn.x_t, t, conditioning)
        with parts["decode"], torch.no_grad():
            image = pipeline.vae.decode(torch.zeros(1, *model.decoded, dtype=torch.bfloat16, device=DEVICE)).sample
        with rows.recording(BATCH):
            frozen = FrozenVelocities(old, reference)
            with parts["forward"]:
                velocity = weights.velocity(drawn.x_t, t, conditioning)
            with parts["loss"]:
                terms = loss.terms(velocity, drawn, frozen)
                coefficients = loss.coefficients(terms, advantages, counts)
                objectives = [
                    Objective(term, torch.cat([own, own, own[:1]]))
                    for term, own in zip(terms, coefficients, strict=False)
                ]
            with parts["backward"]:
                rows.backward(objectives)
        with parts["balance"]:
            gram = gram_matrix(rows.gradients)
        results = {"first": first, "velocity": velocity, "image": image, "gradients": rows.gradients, "gram": gram}
        number = sum(p.numel() for p in transformer.parameters() if not p.requires_grad)
    return Report(number / 1e9, dict(parts), results)


def _convert(component: Any) -> None:
    """To bf16, but for what `from_pretrained` keeps in fp32."""
    kept = set(component._keep_in_fp32_modules or [])
    for place, module in component.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point() or kept & {*place.split("."), name}:
                    continue
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.data = tensor.data.to(torch.bfloat16)
                else:  # a new one: a buffer may be a view, and what it is of would stay in fp32
                    tensors[name] = tensor.to(torch.bfloat16)


def _drawn(x0: Tensor, noise: Tensor, t: Tensor) -> Any:
    from trl_marble.losses import Drawn

    at = t.view(-1, *[1] * (x0.ndim - 1))
    return Drawn((1 - at) * x0 + at * noise, t, x0, noise)
