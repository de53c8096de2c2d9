# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "tqdm"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""Pretrain the ShapeWorld pipeline from scratch: VAE, then text encoders and transformer together by flow matching.

```bash
python examples/scripts/pretrain_shapeworld.py --output_dir runs/shapeworld
```

After an interruption, the same command continues from the last saved state. It writes a diffusers folder
(`runs/shapeworld/pipeline`) and grids of samples beside it.

The weights in the package took 76 minutes on two CPU cores (VAE 9, the rest 67, with tests running beside it
part of the time), in one run with the defaults.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from trl_marble.shapeworld.prompts import SPLIT_SIZES, all_captions
from trl_marble.shapeworld.world import generate


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WARMUP = 0.06  # of all steps
PROMPT_TOKENS = 10  # of the longest caption, begin and end included
DEFAULT_T5_TOKENS = 256  # all-zero tokens that diffusers adds by default where a pipeline has no T5
GRID_PROMPTS = (
    "a red circle",
    "a white circle",
    "two yellow triangles",
    "three blue squares",
    "four green circles",
    "a red square and a blue circle",
    "a purple circle above a green square",
    "a white triangle left of a red circle",
    'a red sign that says "7"',
    'a green sign that says "5"',
    'a yellow sign that says "ok"',
    'a blue sign that says "fox"',
    'a white sign that says "sun"',
    "many purple shapes",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/shapeworld"))
    parser.add_argument("--num_pictures", type=int, default=60_000, help="Pictures drawn before training starts.")
    parser.add_argument("--vae_steps", type=int, default=1400)
    parser.add_argument("--flow_steps", type=int, default=14_000)
    parser.add_argument("--vae_batch_size", type=int, default=64)
    parser.add_argument("--flow_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak of the one-cycle schedules.")
    parser.add_argument("--ema_decay", type=float, default=0.998, help="Of the averaged weights, which are saved.")
    parser.add_argument("--save_every", type=int, default=250, help="Steps between saved states.")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="Needs a C++ compiler.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------------------
# The parts, untrained
# --------------------------------------------------------------------------------------------------------------------


def merge_pieces(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encode a word: apply the earliest merge that fits until none does."""
    rank = {pair: i for i, pair in enumerate(merges)}
    while len(pieces) > 1:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        best = min(pairs, key=lambda pair: rank.get(pair, len(merges)))
        if best not in rank:
            break
        at = pairs.index(best)
        pieces = pieces[:at] + ["".join(best)] + pieces[at + 2 :]
    return pieces


def build_tokenizer(prompts: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for every word of the prompts, and single bytes for all other text.

    Merges of later words rank below those of earlier ones, so no word can lose its token to a later one.
    """
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [BOS, EOS, *alphabet, *(c + "</w>" for c in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word for prompt in prompts for word in prompt.replace('"', ' " ').split()):
        pieces = merge_pieces([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
            pieces = merge_pieces(pieces, merges)  # a pair can be in a word twice, such as the cu of cucumber
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=PROMPT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=192,
            projection_dim=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP's own initial embeddings (std .02) drown in the transformer's biases, and the words are hardly used for
    # thousands of steps.
    embeddings = encoder.get_input_embeddings()
    torch.nn.init.normal_(embeddings.weight, std=1.0)
    for name, parameter in encoder.named_parameters():
        if name.endswith("position_embedding.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def build_silent_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 whose output is zero, as diffusers' default without a T5: a saved pipeline does not load without one."""
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=96, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_pipeline(prompts: list[str]) -> StableDiffusion3Pipeline:
    """The complete pipeline with random weights: 64-pixel images, 8x8x8 latents, 16 image tokens."""
    tokenizer = build_tokenizer(prompts)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=5,
            caption_projection_dim=160,
            joint_attention_dim=96,
            pooled_projection_dim=96,
            pos_embed_max_size=4,
        ),
        vae=AutoencoderKL(
            sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 16, 32, 64),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=8,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
        ),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class Run:
    """One phase of training: optimizer, one-cycle learning rate, weight average, progress bar and saved state."""

    def __init__(self, name: str, modules: list[torch.nn.Module], steps: int, args: argparse.Namespace) -> None:
        self.modules, self.steps, self.args = torch.nn.ModuleList(modules).train(), steps, args
        self.path = args.output_dir / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), args.learning_rate, weight_decay=0.01, fused=True
        )
        self.ema = {k: v.detach().clone() for k, v in self.modules.state_dict().items() if v.is_floating_point()}
        self.step, self.seconds = 0, 0.0
        self.loss: float | None = None  # running mean
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step, self.seconds = state["ema"], state["step"], state["seconds"]
        self.bar = tqdm(total=steps, initial=self.step, desc=name, mininterval=5)

    def remaining(self) -> Iterator[tuple[int, torch.Generator]]:
        """The remaining steps, each with its random generator, so that a resumed run draws the same."""
        started = time.perf_counter() - self.seconds
        for step in range(self.step, self.steps):
            yield step, torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
            self.step, self.seconds = step + 1, time.perf_counter() - started
            self.bar.update()
            if self.step % self.args.save_every == 0 or self.step == self.steps:
                self.save()
        self.bar.close()

    def schedule(self) -> float:
        """Share of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
        done = self.step / self.steps
        return done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * self.schedule()
        self.optimizer.step()
        decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
        weights = self.modules.state_dict()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), [weights[k] for k in self.ema], 1 - decay)
        self.loss = loss.item() if self.loss is None else 0.98 * self.loss + 0.02 * loss.item()
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)

    def save(self) -> None:
        state = {"modules": self.modules, "optimizer": self.optimizer}
        state = {k: v.state_dict() for k, v in state.items()}
        state |= {"ema": self.ema, "step": self.step, "seconds": self.seconds}
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the modules carry the averaged weights."""
        own = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.load_average()
        yield
        self.modules.load_state_dict(own)
        self.modules.train()

    def load_average(self) -> None:
        self.modules.load_state_dict(self.modules.state_dict() | self.ema)
        self.modules.eval()


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().div(127.5).sub(1.0)


def train_vae(pipeline: StableDiffusion3Pipeline, pictures: torch.Tensor, args: argparse.Namespace) -> float:
    vae = pipeline.vae
    run = Run("vae", [vae], args.vae_steps, args)
    for step, generator in run.remaining():
        batch = as_input(pictures[torch.randint(len(pictures), (args.vae_batch_size,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            restored = vae.decode(posterior.sample(generator)).sample.float()
        error = restored - batch
        run.update(error.abs().mean() + 2 * error.square().mean() + 2e-4 * posterior.kl().mean() / 512)
        if (step + 1) % args.save_every == 0:
            save_grid(restored[:32].detach(), args.output_dir / "vae.png", batch[:32])
    run.load_average()
    return run.seconds


@torch.no_grad()
def encode(pipeline: StableDiffusion3Pipeline, pictures: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """All pictures as latents of unit variance; writes the scaling into the VAE's config for the pipeline."""
    path = args.output_dir / "latents.pt"
    if path.exists():
        latents = torch.load(path, weights_only=True)
    else:
        batches = tqdm(pictures.split(250), desc="encode", mininterval=5)
        with torch.autocast("cpu", torch.bfloat16):
            latents = torch.cat([pipeline.vae.encode(as_input(b)).latent_dist.mode().float() for b in batches])
        torch.save(latents, path)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    pipeline.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    prompts: list[str],
    args: argparse.Namespace,
    grid_prompts: Sequence[str] = GRID_PROMPTS,
) -> float:
    transformer = pipeline.transformer
    # Without the option, the compiler would put the fused attention back that `main` turns off.
    compiled = torch.compile(transformer, options={"pattern_matcher": False}) if args.compile else transformer
    run = Run("flow", [transformer, pipeline.text_encoder, pipeline.text_encoder_2], args.flow_steps, args)
    for step, generator in run.remaining():
        # Without T5 a pipeline appends `max_sequence_length` zero tokens, 256 by default. They have no content and
        # make a step ten times as slow, so most do without (`max_sequence_length=0`); a small batch now and then keeps
        # the default working.
        plain = step % 24 == 23
        size = args.flow_batch_size // 6 if plain else args.flow_batch_size
        chosen = torch.randint(len(latents), (size,), generator=generator)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [prompts[i] for i in chosen.tolist()],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=DEFAULT_T5_TOKENS if plain else 0,
        )
        data = latents[chosen]
        noise = torch.randn(data.shape, generator=generator)
        # Objects fill many latents, so what and where they are is decided while there is still much noise.
        t = torch.sigmoid(0.8 + 1.2 * torch.randn(size, generator=generator))
        mixed = torch.lerp(data, noise, t.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = (transformer if plain else compiled)(mixed, embeds, pooled, t * 1000, return_dict=False)[0]
        run.update(mse_loss(velocity.float(), noise - data))
        if (step + 1) % args.save_every == 0:
            with run.averaged():
                publish(pipeline, args.output_dir, grid_prompts)
    run.load_average()
    return run.seconds


# --------------------------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------------------------


def save_grid(pictures: torch.Tensor, path: Path, *others: torch.Tensor) -> None:
    """Rows of eight pictures with values in [-1, 1]; further sets go below."""
    rows = torch.cat([pictures, *others]).clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
    grid = np.concatenate([np.concatenate(list(rows[i : i + 8]), 1) for i in range(0, len(rows), 8)])
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def publish(pipeline: StableDiffusion3Pipeline, output_dir: Path, grid_prompts: Sequence[str] = GRID_PROMPTS) -> None:
    """Save a diffusers folder with half-precision weights, and a grid of samples drawn without guidance."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for _ in grid_prompts for i in range(8)]
    images = pipeline(
        [p for p in grid_prompts for _ in range(8)],
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=generators,
        max_sequence_length=0,
        output_type="pt",
    ).images
    save_grid(images * 2 - 1, output_dir / "samples.png")
    encoder, tokenizer = build_silent_t5()
    complete = pipeline.components | {"text_encoder_3": encoder, "tokenizer_3": tokenizer}
    StableDiffusion3Pipeline(**complete).save_pretrained(output_dir / "pipeline")
    for name in ("transformer", "vae"):
        part = type(getattr(pipeline, name)).from_pretrained(output_dir / "pipeline" / name).half()
        part.register_to_config(_name_or_path=name)  # not where it lay on this machine
        part.save_pretrained(output_dir / "pipeline" / name)


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    drawn = tqdm(generate(args.num_pictures, args.seed), total=args.num_pictures, desc="draw", mininterval=5)
    prompts, images = zip(*((caption.prompt, np.asarray(image)) for caption, image in drawn), strict=True)
    pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    pipeline = build_pipeline([caption.prompt for tag in SPLIT_SIZES for caption in all_captions(tag)])
    # For a few dozen tokens on a CPU the backward pass of PyTorch's fused attention took 42% of a step.
    with sdpa_kernel(SDPBackend.MATH):
        seconds = train_vae(pipeline, pictures, args)
        latents = encode(pipeline, pictures, args)
        seconds += train_flow(pipeline, latents, list(prompts), args)
    publish(pipeline, args.output_dir)
    print(f"trained for {seconds / 60:.1f} minutes; the pipeline is in {args.output_dir / 'pipeline'}")


if __name__ == "__main__":
    main()
