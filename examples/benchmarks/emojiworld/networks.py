# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The learned rewards: a small CLIP-like scorer and a regressor of quality, and a held-out one of each.

The held-out networks have another architecture, and were trained with another seed and other degradations: what
deceives the learned rewards need not deceive them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


NETWORKS_FOLDER = Path(__file__).parent / "networks"
NETWORKS = ("matching", "quality", "matching_heldout", "quality_heldout")
EMBEDDING = 64  # components of the embeddings that a scorer compares
START_SCALE = 10.0  # of the cosines in the contrastive loss, before it is learned; CLIP's is 14


class StridedTrunk(nn.Sequential):
    """Four 3x3 convolutions that halve the picture each, then the mean over what is left (4x4)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.width = widths[-1]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 convolution, between an average pool and the sum of both."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(before, width, 1)
        self.change = nn.Sequential(
            nn.Conv2d(before, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2)
        return F.relu(self.skip(x) + self.change(x))


class ResidualTrunk(nn.Sequential):
    """A 5x5 convolution, three residual blocks after average pools, then the mean over what is left (8x8)."""

    def __init__(self, widths: tuple[int, ...] = (12, 24, 48, 96)) -> None:
        blocks = [ResidualBlock(before, width) for before, width in zip(widths, widths[1:], strict=False)]
        stem = [nn.Conv2d(3, widths[0], 5, padding=2), nn.ReLU()]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.width = widths[-1]


class Scorer(nn.Module):
    """
    A small CLIP: the cosine of a picture's and a caption's embedding.

    A caption's embedding comes from the mean of the vectors of its words, so their order does not count.

    Args:
        trunk (`nn.Module`): Pictures `[batch, 3, 64, 64]` to features `[batch, trunk.width]`.
        words (`Sequence[str]`): All words that captions can have.
    """

    def __init__(self, trunk: StridedTrunk | ResidualTrunk, words: Sequence[str]) -> None:
        super().__init__()
        self.words = {word: index for index, word in enumerate(words)}
        self.trunk = trunk
        self.picture_projection = nn.Linear(trunk.width, EMBEDDING)
        self.word_vectors = nn.EmbeddingBag(len(self.words), EMBEDDING, mode="mean")
        self.caption_projection = nn.Linear(EMBEDDING, EMBEDDING)
        self.log_scale = nn.Parameter(torch.tensor(START_SCALE).log())

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors `[batch, 64]` of pictures `[batch, 3, 64, 64]` in [-1, 1]."""
        return F.normalize(self.picture_projection(self.trunk(pictures)).float(), dim=1)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors `[batch, 64]` of captions; words that are not known are refused."""
        unknown = sorted({word for caption in captions for word in caption.split() if word not in self.words})
        if unknown:
            raise ValueError(
                f"the scorer does not know {', '.join(map(repr, unknown))}; use prompts of EmojiWorld's `load_prompts`"
            )
        bags = [[self.words[word] for word in caption.split()] for caption in captions]
        offsets = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        vectors = self.word_vectors(torch.tensor([index for bag in bags for index in bag]), offsets)
        return F.normalize(self.caption_projection(vectors).float(), dim=1)

    def forward(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """The cosine `[batch]` of each picture with its caption."""
        return (self.encode_pictures(pictures) * self.encode_captions(captions)).sum(1)


class Regressor(nn.Module):
    """
    The quality of a picture: from 0 (damaged as strongly as in training) to 1 (not damaged).

    Args:
        trunk (`nn.Module`): Pictures `[batch, 3, 64, 64]` to features `[batch, trunk.width]`.
    """

    def __init__(self, trunk: StridedTrunk | ResidualTrunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.width, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Qualities `[batch]` of pictures `[batch, 3, 64, 64]` in [-1, 1]."""
        return self.head(self.trunk(pictures)).float().sigmoid().squeeze(1)


def build_network(name: str, words: Sequence[str]) -> Scorer | Regressor:
    """One of the networks, untrained.

    Args:
        name (`str`): One of `NETWORKS`.
        words (`Sequence[str]`): All words that captions can have; regressors need none.

    Returns:
        `Scorer` or `Regressor`
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; use one of {', '.join(NETWORKS)}")
    trunk = ResidualTrunk() if name.endswith("_heldout") else StridedTrunk()
    return Scorer(trunk, words) if name.startswith("matching") else Regressor(trunk)


def save_network(network: Scorer | Regressor, path: Path) -> None:
    """Write the weights in half precision, with the words of a scorer."""
    words = list(network.words) if isinstance(network, Scorer) else []
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, path, metadata={"words": json.dumps(words)})


def load_network(name: str, folder: Path = NETWORKS_FOLDER) -> Scorer | Regressor:
    """Load one of the trained networks, in fp32 and for inference.

    Args:
        name (`str`): One of `NETWORKS`.
        folder (`Path`, *optional*, defaults to the folder beside this file): Where the weights are.

    Returns:
        `Scorer` or `Regressor`

    Raises:
        `FileNotFoundError`: If the weights are not there.
    """
    path = folder / f"{name}.safetensors"
    if name in NETWORKS and not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Train the networks with `python examples/scripts/pretrain_emojiworld.py`, and "
            "copy the folder `networks` of its output there."
        )
    with safe_open(path, "pt") as file:
        network = build_network(name, json.loads(file.metadata()["words"]))
        network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})
    return network.eval().requires_grad_(False)
