# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "tqdm"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""Pretrain EmojiWorld: the pipeline as ShapeWorld's, from its weights, and the networks that are the learned rewards.

```bash
python examples/scripts/pretrain_emojiworld.py --output_dir runs/emojiworld
```

It downloads the pictures (74 MB) unless `--emoji` says where they are. After an interruption, the same command
continues from the last saved state. It writes a diffusers folder (`runs/emojiworld/pipeline`), the four networks
(`runs/emojiworld/networks`, with measurements on new pictures in `networks.json`) and grids of samples beside them.
`examples/benchmarks/emojiworld/` expects the two folders as `emojiworld-sd3` and `networks`.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

from trl_marble.shapeworld import PIPELINE_FOLDER


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from emojiworld.captions import BACKGROUNDS, all_words, emoji_images, pair, plain, scene  # noqa: E402
from emojiworld.degradations import HELD_OUT, LEARNED, degrade  # noqa: E402
from emojiworld.drawing import generate  # noqa: E402
from emojiworld.networks import NETWORKS, Regressor, Scorer, build_network, load_network, save_network  # noqa: E402
from emojiworld.pictures import download, read_emoji  # noqa: E402
from pretrain_shapeworld import (  # noqa: E402
    Run,
    as_input,
    build_pipeline,
    encode,
    publish,
    save_grid,
    train_flow,
    train_vae,
)


LIGHT = 0.4  # strongest degradation of the pictures that scorers learn from
LARGEST_SCALE = 50.0  # of the cosines in the contrastive loss
NEW_PICTURES = 512  # on which the networks are measured
GRID_PROMPTS = (
    "fox",
    "panda",
    "strawberry",
    "sunflower",
    "ice cream",
    "dragon",
    "penguin on a blue background",
    "pineapple on a purple background",
    "lobster on a white background",
    "owl on a green background",
    "frog and pizza",
    "cactus and hamburger",
    "butterfly and banana",
    "whale and mushroom",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/emojiworld"))
    parser.add_argument(
        "--emoji",
        type=Path,
        default=None,
        help="Tarball or folder of the npm package emoji-datasource-google 16.0.0; downloaded by default.",
    )
    parser.add_argument(
        "--initial_vae",
        type=Path,
        default=PIPELINE_FOLDER / "vae",
        help="Folder of the weights that the VAE starts from, ShapeWorld's by default; `none` for random weights.",
    )
    parser.add_argument(
        "--initial_transformer",
        type=Path,
        default=PIPELINE_FOLDER / "transformer",
        help="The same for the transformer.",
    )
    parser.add_argument("--num_pictures", type=int, default=60_000, help="Pictures drawn before training starts.")
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--flow_steps", type=int, default=9500)
    parser.add_argument("--network_steps", type=int, default=1200, help="Of each of the four networks.")
    parser.add_argument("--vae_batch_size", type=int, default=64)
    parser.add_argument("--flow_batch_size", type=int, default=128)
    parser.add_argument("--network_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak of the one-cycle schedules.")
    parser.add_argument("--ema_decay", type=float, default=0.998, help="Of the averaged weights, which are saved.")
    parser.add_argument("--save_every", type=int, default=250, help="Steps between saved states.")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="Needs a C++ compiler.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------------------
# The pipeline
# --------------------------------------------------------------------------------------------------------------------


def build_untrained(args: argparse.Namespace) -> StableDiffusion3Pipeline:
    """ShapeWorld's pipeline with EmojiWorld's words, and the initial weights of VAE and transformer."""
    names = list(emoji_images())
    captions = [*map(plain, names), *(scene(names[0], colour) for colour in BACKGROUNDS), pair(*names[:2])]
    pipeline = build_pipeline([caption.prompt for caption in captions])
    for part, kind, folder in (
        (pipeline.vae, AutoencoderKL, args.initial_vae),
        (pipeline.transformer, SD3Transformer2DModel, args.initial_transformer),
    ):
        if folder != Path("none"):
            part.load_state_dict(kind.from_pretrained(folder, torch_dtype=torch.float32).state_dict())
    return pipeline


# --------------------------------------------------------------------------------------------------------------------
# The networks
# --------------------------------------------------------------------------------------------------------------------


def contrastive_loss(scorer: Scorer, pictures: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """CLIP's symmetric loss. A caption that is equal to a picture's own is not a wrong one for it."""
    scale = scorer.log_scale.exp().clamp(max=LARGEST_SCALE)
    embeddings = scorer.encode_pictures(pictures), scorer.encode_captions(captions)
    with torch.autocast("cpu", enabled=False):  # the cosines of neighbours differ by less than bfloat16 resolves
        logits = scale * embeddings[0] @ embeddings[1].T
    numbers = torch.tensor([captions.index(caption) for caption in captions])
    equal = (numbers[:, None] == numbers) & ~torch.eye(len(captions), dtype=torch.bool)
    logits = logits.masked_fill(equal, float("-inf"))
    own = torch.arange(len(captions))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def damaged(
    name: str, pictures: torch.Tensor, strongest: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `[batch, 3, 64, 64]` with the damage that a network learns, as its input, and the strengths."""
    kinds = HELD_OUT if name.endswith("_heldout") else LEARNED
    worse, strengths = degrade(pictures.permute(0, 2, 3, 1).numpy(), kinds, strongest, rng)
    return as_input(torch.from_numpy(worse).permute(0, 3, 1, 2)), torch.from_numpy(strengths)


def train_network(name: str, pictures: torch.Tensor, prompts: list[str], args: argparse.Namespace) -> float:
    """Train one of the networks and write it to the folder `networks`; returns the seconds that it took."""
    own = argparse.Namespace(**vars(args) | {"seed": args.seed + NETWORKS.index(name) + 1})
    torch.manual_seed(own.seed)
    network = build_network(name, all_words())
    run = Run(name, [network], args.network_steps, own)
    for _, generator in run.remaining():
        chosen = torch.randint(len(pictures), (args.network_batch_size,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        if isinstance(network, Scorer):
            batch, _ = damaged(name, pictures[chosen], LIGHT, rng)
            with torch.autocast("cpu", torch.bfloat16):
                loss = contrastive_loss(network, batch, [prompts[i] for i in chosen.tolist()])
        else:
            batch, strengths = damaged(name, pictures[chosen], 1.0, rng)
            with torch.autocast("cpu", torch.bfloat16):
                values = network(batch)
            loss = mse_loss(values, 1 - strengths)
        run.update(loss)
    run.load_average()
    folder = args.output_dir / "networks"
    folder.mkdir(exist_ok=True)
    save_network(network, folder / f"{name}.safetensors")
    return run.seconds


@torch.no_grad()
def measure_networks(emoji: Mapping[str, Image.Image], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How good the saved networks are on new pictures.

    Of a scorer, the share of pictures whose own caption fits best among all that were drawn; of a regressor, the mean
    error and the correlation with the strengths, each of its own kinds of damage.
    """
    captions, images = zip(*generate(NEW_PICTURES, args.seed + 1000, emoji), strict=True)
    pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    prompts = [caption.prompt for caption in captions]
    results = {}
    for name in NETWORKS:
        network = load_network(name, args.output_dir / "networks")
        if isinstance(network, Regressor):
            batch, strengths = damaged(name, pictures, 1.0, np.random.default_rng(args.seed))
            values = network(batch)
            correlation = float(np.corrcoef(values.numpy(), 1 - strengths.numpy())[0, 1])
            results[name] = {"mean_error": (values - (1 - strengths)).abs().mean().item(), "correlation": correlation}
        else:
            distinct = list(dict.fromkeys(prompts))
            cosines = network.encode_pictures(as_input(pictures)) @ network.encode_captions(distinct).T
            best = cosines.argmax(1).tolist()
            hits = [distinct[index] == prompt for index, prompt in zip(best, prompts, strict=True)]
            results[name] = {"accuracy": sum(hits) / len(hits), "among": len(distinct)}
    return results


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    emoji = read_emoji(args.emoji or download(args.output_dir / "emoji-datasource-google-16.0.0.tgz"))
    torch.manual_seed(args.seed)

    drawn = tqdm(generate(args.num_pictures, args.seed, emoji), total=args.num_pictures, desc="draw", mininterval=5)
    prompts, images = zip(*((caption.prompt, np.asarray(image)) for caption, image in drawn), strict=True)
    pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    save_grid(as_input(pictures[:64]), args.output_dir / "drawn.png")

    pipeline = build_untrained(args)
    # For a few dozen tokens on a CPU the backward pass of PyTorch's fused attention took 42% of a step.
    with sdpa_kernel(SDPBackend.MATH):
        seconds = train_vae(pipeline, pictures, args)
        latents = encode(pipeline, pictures, args)
        seconds += train_flow(pipeline, latents, list(prompts), args, GRID_PROMPTS)
    publish(pipeline, args.output_dir, GRID_PROMPTS)
    seconds += sum(train_network(name, pictures, list(prompts), args) for name in NETWORKS)
    measured = measure_networks(emoji, args)
    (args.output_dir / "networks.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))
    print(f"trained for {seconds / 60:.1f} minutes; pipeline and networks are in {args.output_dir}")


if __name__ == "__main__":
    main()
